"""Whatever is made, resumed, begun from or drawn with over a mesh: each device gets its shards.

No large parameter is ever whole on a device, nor has a program there an array of its shape.
"""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokgen import interfaces, parameters, rng, sharding
from tokgen.checkpoints import loading, run as runs
from tokgen.config import building, reading
from tokgen.sampling import decode
from tokgen.training import optimizer as optimizers, train_state

GRIDS = {"next_scale": ((1, 1), (2, 2), (4, 4))}
LARGE = 4096  # elements; every kernel of the networks below has more
CLASSES = tuple(map(str, range(90)))
OTHERS = ("a", "b", *CLASSES[:-5], "c")  # begun from by name: the class table is put together

pytestmark = pytest.mark.long


@contextlib.contextmanager
def compiled():
    """The programs that are made meanwhile, as texts: their shapes are those of one device."""
    found, real = [], jax._src.compiler.compile_or_get_cached

    def watched(*words, **named):
        made = real(*words, **named)
        found.extend(module.to_string() for module in made.hlo_modules())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax._src.compiler, "compile_or_get_cached", watched)
        yield found


def whole(tree, programs=()) -> list[str]:
    """Large leaves that some device has whole, and programs that have an array of their shape."""
    found = []
    for path, leaf in parameters.paths(tree).items():
        if leaf.size <= LARGE:
            continue
        if max(shard.data.size for shard in leaf.addressable_shards) == leaf.size:
            found.append(path)
        shape = f"[{','.join(map(str, leaf.shape))}]"
        found += [f"{path}, in a program" for text in programs if shape in text]
    return found


@pytest.mark.parametrize(
    ("family", "strategy", "sizes"),
    [
        ("next_scale", "fsdp", (1, 8, 1)),
        ("raster", "tensor", (2, 2, 2)),
        ("masked", "fsdp", (2, 4, 1)),
    ],
)
def test_no_device_has_a_large_parameter_whole(family, strategy, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "LARGE", LARGE)
    overrides = ("generator.width=96", "generator.depth=3", "generator.heads=8", "steps=0")
    settings = reading.load(f"configs/generator/shapes.py:{family}", overrides)
    layout = interfaces.TokenLayout((512,), GRIDS.get(family, ((4, 4),)))
    mesh = sharding.make_mesh(*sizes)
    optimizer = optimizers.optimizer(10, learning_rate=0.1)

    def network(classes):
        def make():
            return building.generator(settings, layout, len(classes), rngs=rng.rngs(0))

        how = dict(mesh=mesh, strategy=strategy, ema=0.9)
        return train_state.create(make, optimizer, **how)

    def opened(folder, classes=CLASSES):
        about = dict(kind="generator", layout=layout, classes=classes, best="nats", data="")
        return runs.start(tmp_path / folder, settings, **about)

    with jax.set_mesh(mesh), compiled() as programs:
        graph, state = network(CLASSES)
        assert sum(leaf.size > LARGE for leaf in jax.tree.leaves(state)) > 20
        assert not whole({"model": state}, programs)
        run = opened("run")
        run.save({"model": state}, {"nats": 1.0})
        run.close()
        run = opened("run")
        again, _ = runs.resume_or_start(run, {"model": state})
        run.close()
        assert not whole(again, programs)
        with settings.unlocked():
            settings.init_from = str(tmp_path / "run")
        run = opened("other", OTHERS)
        begun, said = runs.resume_or_start(run, {"model": network(OTHERS)[1]})
        run.close()
        assert "85 of 88 classes" in said
        assert not whole(begun, programs)
        drawing = decode.laid_out(parameters.merge(graph, state.ema, state.stats))
        loaded = loading.load_to_draw(tmp_path / "run").module
        for module in (drawing, loaded):
            params = parameters.split(module)[1]
            assert sum(leaf.size > LARGE for leaf in jax.tree.leaves(params)) > 8
            assert not whole(params, programs)
        del programs[:]
        # and one that is gathered would be seen, where it lies and where it is computed
        path, leaf = max(parameters.paths(state.params).items(), key=lambda pair: pair[1].size)
        gathered = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, PartitionSpec()))(
            leaf
        )
        assert whole({path: gathered}, programs) == [path, f"{path}, in a program"]


def test_a_decoder_is_that_of_its_tokenizer_without_the_encoder(tmp_path):
    """Its quantizer, which training reads, in the dtypes that it had; its images to the bit."""
    overrides = ("encoder.widths=(16,)", "decoder.widths=(16,)", "precision.compute=bfloat16")
    overrides += ("encoder.blocks=1", "decoder.blocks=1", "steps=0")
    settings = reading.load("configs/tokenizer/shapes.py:pyramid", overrides)
    module = building.tokenizer(settings, rngs=rng.rngs(0))
    _, params, stats = parameters.split(module)
    zero = np.zeros((), np.int32)
    state = train_state.TrainState(zero, zero, params, stats, (), None)
    about = dict(kind="tokenizer", layout=module.layout, classes=(), best="l2", data="")
    run = runs.start(tmp_path, settings, **about)
    run.save({"model": state}, {"l2": 1.0})
    run.close()
    known, found = loading.load_tokenizer(tmp_path), loading.load_decoder(tmp_path)
    assert found.module.encoder is None and found.fingerprint == known.fingerprint
    codec, theirs = (parameters.split(m.module.quantizer)[1] for m in (found, known))
    jax.tree.map(np.testing.assert_array_equal, codec, theirs)
    assert jax.tree.map(lambda x: x.dtype, codec) == jax.tree.map(lambda x: x.dtype, theirs)
    layout = known.layout
    tokens_BLG = np.random.default_rng(0).integers(
        0, min(layout.vocab), (2, layout.length, layout.groups)
    )
    np.testing.assert_array_equal(found.module.decode(tokens_BLG), known.module.decode(tokens_BLG))

"""What is loaded for drawing: the tokens are those of the whole network, with fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import parameters, rng, sharding
from tokgen.checkpoints import checkpoint, loading, run as runs, stream
from tokgen.config import building
from tokgen.nn import linear
from tokgen.sampling import decode, drawing, presets

SIDES = (1, 2, 4)
# Recipe, alphabet of a position; every family, and what their networks differ by
FAMILIES = [
    ("generator/var", (16,)),
    ("generator/var:d36s", (16,)),
    ("generator/llamagen", (16,)),
    ("generator/rar", (16,)),
    ("generator/npp", (16,)),
    ("generator/ibq", (16,)),
    ("generator/openmagvit2", (8, 16)),
    ("generator/maskgit", (16,)),
    ("generator/maskbit", (4, 4)),
    ("generator/titok", (16,)),
    ("generator/titok:s128", (16,)),
    ("generator/shapes:random", (16,)),
]
# One loop of all its steps: the least to compile.
QUICK = ("generator/maskgit", (16,))


def saved(folder, reference, vocab, width=32, depth=3):
    """The step of a small generator of random numbers, and the codec of its tokens."""
    config = recipes.load(reference)
    config.generator.update(width=width, depth=depth, heads=2)
    if "hidden" in config.generator:
        config.generator.hidden = 48
    codec, layout = None, recipes.square(4, *vocab)
    if config.generator.name == "next_scale":
        config.generator.channels = 8
        section = recipes.load("tokenizer/var_vqvae").quantizer
        section.scales = SIDES
        section.quantizer.update(codes=16, channels=8)
        codec = building.build(section, "quantizer", grid=(4, 4), rngs=nnx.Rngs(0))
        layout = codec.layout
    make = nnx.eval_shape(lambda: building.generator(config, layout, 10, rngs=rng.rngs(0)))
    _, params, _ = parameters.split(make)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape, scale=0.2), leaf.dtype), params
    )
    zero = jnp.zeros((), jnp.int32)
    run = runs.start(
        folder,
        config,
        kind="generator",
        layout=layout,
        classes=tuple(f"class{number}" for number in range(10)),
        best="imported",
        data="",
    )
    run.save({"model": dict(step=zero, skipped=zero, params=params, stats={})}, {"imported": 0.0})
    run.close()
    return run.folder(0), codec


def drawn(loaded, codec):
    """Tokens of two classes by the preset of the config."""
    found = loaded.config.presets.to_dict()
    _, generator, sampler = presets.choose(loaded.module, found, presets.Choice(), loaded.classes)
    keys_B = rng.per_image(0, "sample", jnp.arange(2))
    tokens_BLG, invalid_B, _ = drawing.draw_tokens(
        generator, codec, jnp.asarray([3, 7]), keys_B, sampler
    )
    assert not np.any(invalid_B)
    return np.asarray(tokens_BLG)


@pytest.mark.parametrize(
    "reference, vocab, compute",
    [
        pytest.param(
            *row,
            compute,
            id=f"{row[0]}-{compute}",
            marks=() if (row, compute) == (QUICK, "bfloat16") else pytest.mark.long,
        )
        for row in FAMILIES
        for compute in ("float32", "bfloat16")
    ],
)
def test_tokens_are_those_of_the_whole_network(tmp_path, reference, vocab, compute):
    step, codec = saved(tmp_path, reference, vocab)
    whole = loading.load_generator(step, compute=compute)
    spare = loading.load_to_draw(step, compute=compute)
    tokens_BLG = drawn(whole, codec)
    np.testing.assert_array_equal(drawn(spare, codec), tokens_BLG)
    assert len(np.unique(tokens_BLG)) > 2
    assert spare.fingerprint == whole.fingerprint
    sizes = [jax.tree.leaves(each.module) for each in (whole, spare)]
    count = [sum(leaf.size for leaf in leaves) for leaves in sizes]
    nbytes = [sum(leaf.nbytes for leaf in leaves) for leaves in sizes]
    # panels have a number more each, the 1 by which they divide
    ones = sum(isinstance(part, linear.Panels) for _, part in nnx.iter_modules(spare.module))
    assert count[0] == count[1] - ones
    nbytes[1] -= 4 * ones
    assert nbytes[1] < 0.9 * nbytes[0] if compute == "bfloat16" else nbytes[1] == nbytes[0]


@pytest.mark.parametrize("compute", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_panels_are_made_of_what_is_read(tmp_path, monkeypatch, compute):
    """Or a kernel would be there in both forms."""
    step, codec = saved(tmp_path, *FAMILIES[3], width=128, depth=1)
    whole = loading.load_generator(step, compute=compute).module
    monkeypatch.setattr(linear, "_panels", lambda *_: pytest.fail("a kernel was there"))
    found = loading.load_to_draw(step, compute=compute)
    parts = [part for _, part in nnx.iter_modules(found.module)]
    assert sum(isinstance(part, linear.Panels) for part in parts) > 4
    monkeypatch.undo()
    ours, theirs = found.module, decode.laid_out(whole)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize("layered", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_network_is_loaded_piece_by_piece_into_its_shards(tmp_path, monkeypatch, layered):
    """A step that was written layer by layer is read so, and no device holds all of it."""
    step, codec = saved(tmp_path / "whole", *FAMILIES[2])
    if layered:
        step = rewritten(step, tmp_path / "pieces")
    alone = loading.load_generator(step, compute="float32")
    tokens_BLG = drawn(alone, codec)
    sizes, read = [], checkpoint.pieces.read

    def watched(*words):
        for path, layer, numbers in read(*words):
            sizes.append(numbers.size)
            yield path, layer, numbers

    monkeypatch.setattr(checkpoint.pieces, "read", watched)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        shared = loading.load_to_draw(step, compute="float32")
        np.testing.assert_array_equal(drawn(shared, codec), tokens_BLG)
    leaves = jax.tree.leaves(shared.module)
    most = max(leaf.size for leaf in leaves)
    assert max(sizes) == most if layered else max(sizes) > most
    kernels = [leaf for leaf in leaves if leaf.size >= 32 * 32]
    assert kernels and all(leaf.addressable_shards[0].data.size < leaf.size for leaf in kernels)
    assert shared.fingerprint == alone.fingerprint


def rewritten(step, folder):
    """The step of a run whose leaves are written layer by layer, as an import writes them."""
    meta = checkpoint.read_meta(step)
    found = loading.load(step)
    params = parameters.paths(parameters.split(found.module)[1])
    leaves = {f"model/params/{path}": np.asarray(leaf) for path, leaf in params.items()}
    leaves |= {f"model/{name}": np.zeros((), np.int32) for name in ("step", "skipped")}

    def pieces():
        for path, leaf in leaves.items():
            if "/blocks/" in path:
                yield from ((path, layer, row) for layer, row in enumerate(leaf))
            else:
                yield path, None, leaf

    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    run = runs.start(
        folder,
        found.config,
        kind="generator",
        layout=found.layout,
        classes=found.classes,
        best="imported",
        data="",
    )
    run.save_stream(0, stream.Stream(shapes, pieces()), {"imported": 0.0})
    run.close()
    assert meta["manifest"] == checkpoint.read_meta(run.folder(0))["manifest"]
    return run.folder(0)


def test_norms_and_tables_keep_their_dtype(tmp_path):
    step, _ = saved(tmp_path, *FAMILIES[0])
    _, params, _ = parameters.split(loading.load_to_draw(step, compute="bfloat16").module)
    for path, leaf in parameters.paths(params).items():
        # the head gives logits, which are float32 whatever is computed before
        narrow = path.endswith(("/kernel", "/bias")) and not path.startswith("head/")
        assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), path

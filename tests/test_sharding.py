import functools
import itertools
import math
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from tests import recipes
from tokgen import interfaces, parameters, rng, sharding
from tokgen.config import building, reading
from tokgen.data import sources
from tokgen.discriminators import blur, feature_heads, patchgan, stylegan
from tokgen.evaluation import validation
from tokgen.generators import autoregressive
from tokgen.nn.precision import FLOAT32
from tokgen.sampling import drawing, sampler as samplers
from tokgen.training import optimizer as optimizers, train_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "tokenizer").glob("*.py"))
# The fields of a config that decide how a generator's parameters are called.
FORM = {"name", "conditioning", "positions", "variant", "head", "stack", "entry", "inputs"}
VARIANTS = {"shapes": ("", "vq", "ema", "hard")}  # of the others only the plain config

VIT = dict(name="vit", tokens=5, width=8, depth=2, heads=2, patch=4)
CONV = dict(name="conv", widths=(32, 32), blocks=1, hidden=4)
# What recipes may leave out: a decoder in two parts, text, scales, every variant.
TOKENIZERS = {
    "tokenizer in two parts": dict(
        encoder=VIT,
        quantizer=dict(name="vq", codes=16, channels=4, update="ema"),
        decoder=dict(
            name="two_stage",
            codes={**VIT, "channels": 24, "head": "codes"},
            pixels=dict(name="conv", latent=6, grid=(2, 2), widths=(32, 32, 32), blocks=1),
            codebook=(24, 6),
        ),
    ),
    "continuous tokenizer with text": dict(
        encoder=VIT,
        quantizer=dict(name="gaussian", channels=4),
        decoder={**VIT, "text": (3, 6)},
    ),
    "tokenizer of scales": dict(
        encoder=CONV,
        quantizer=dict(
            name="multiscale",
            quantizer=dict(name="vq", codes=16, channels=4),
            scales=(1, 2, 4),
            phi=2,
        ),
        decoder=CONV,
    ),
    **{
        f"tokenizer of {variant}": dict(
            encoder={**CONV, "variant": variant},
            quantizer=dict(name="lfq", bits=6),
            decoder={**CONV, "variant": variant},
        )
        for variant in ("vqgan", "light", "local", "maskgit", "maskbit", "taming", "magvit2")
    },
}


def _networks():
    """(name, module) of every network that a config or a training program builds."""
    for file in FILES:
        for variant in VARIANTS.get(file.stem, ("",)):
            reference = f"tokenizer/{file.stem}" + (f":{variant}" if variant else "")
            yield reference, recipes.abstract(reference)
    seen = set()
    for reference in recipes.GENERATORS:
        asked = recipes.load(reference).generator.to_dict()
        form = repr([(name, asked[name]) for name in sorted(set(asked) & FORM)])
        if form not in seen:  # sizes of the same form have the same names
            seen.add(form)
            yield reference, recipes.abstract(reference)
    for name, make in _others():
        yield name, nnx.eval_shape(make)


def _others():
    """(name, constructor) of discriminators, and of tokenizers of parts that no config names."""
    for norm in patchgan.NORMS:
        yield (
            f"discriminator with {norm} norm",
            lambda norm=norm: patchgan.Discriminator(3, norm=norm, rngs=nnx.Rngs(0)),
        )
    for form in stylegan.FORMS:
        yield (
            f"discriminator of StyleGAN, {form}",
            lambda form=form: stylegan.Discriminator(3, 16, form=form, rngs=nnx.Rngs(0)),
        )
    yield "discriminator with blur", lambda: blur.Discriminator(3, 32, rngs=nnx.Rngs(0))
    tiny = dict(size=8, patch=4, width=6, depth=2, heads=2, levels=(0, 1))
    yield "discriminator on features", lambda: feature_heads.Discriminator(rngs=nnx.Rngs(0), **tiny)
    for name, sections in TOKENIZERS.items():
        settings = reading.load("configs/tokenizer/shapes.py", ("view.size=(8, 8)",))
        with settings.unlocked():
            for section, content in sections.items():
                settings[section] = content
        yield name, lambda settings=settings: building.tokenizer(settings, rngs=nnx.Rngs(0))


def _abstract_state(module, name):
    """Everything that is sharded, without computing anything."""
    _, params, stats = parameters.split(module)
    chain = optimizers.optimizer(10, learning_rate=1e-3, name=name, weight_decay=0.1).chain
    opt_state = jax.eval_shape(chain.init, params)
    return {"params": params, "stats": stats, "opt_state": opt_state, "ema": params}


def test_every_parameter_has_a_row_and_every_row_a_parameter():
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    alive, missing = set(), []
    for name, module in _networks():
        blocks = any("/blocks/" in path for path in parameters.paths(parameters.split(module)[1]))
        for optimizer in ("adamw", "muon")[: 1 + blocks]:  # Muon is for the blocks alone
            for path, leaf in parameters.paths(_abstract_state(module, optimizer)).items():
                if leaf.ndim == 0:
                    continue  # counters
                found = [p for p, _ in sharding.TABLE if re.search(rf"(^|/){p}$", path)]
                if not found:
                    missing.append(f"{name}: {path} {leaf.shape}")
                    continue
                alive.add(found[0])
                axes = sharding.letters(path)
                assert axes == dict(sharding.TABLE)[found[0]]
                # a row that splits speaks of every dimension but that of what is stacked: layers,
                # skips of a U, the maps of a position's symbols
                spare = leaf.ndim - len(axes)
                stacked = re.search("/blocks/|/skips/kernel|head/logits/kernel", path) is not None
                whole = not axes.strip(".")
                assert whole or spare <= stacked, (
                    f"{name}: {path} {leaf.shape} has more axes than {axes}"
                )
                for strategy in sharding.STRATEGIES:
                    parts = sharding.spec(path, leaf.shape, strategy, mesh)
                    assert parts[:1] == (None,) or not (stacked and spare)
    assert not missing, "\n".join(sorted(missing))
    dead = [pattern for pattern, _ in sharding.TABLE if pattern not in alive]
    assert not dead, f"rows that no parameter needs: {dead}"


def test_a_mesh_in_words():
    mesh = AbstractMesh((4, 2, 1), ("data", "fsdp", "tensor"))
    assert sharding.told(mesh) == "mesh data 4, fsdp 2, tensor 1"


def test_moments_and_averages_lie_as_their_parameter():
    module = nnx.eval_shape(functools.partial(_generator, LAYOUT))
    mesh = AbstractMesh((2, 2, 2), sharding.AXES)
    laid = parameters.paths(train_state.shardings(_abstract_state(module, "adamw"), mesh, "tensor"))
    params = {k.removeprefix("params/"): v for k, v in laid.items() if k.startswith("params/")}
    assert len({str(value.spec) for value in params.values()}) > 4
    for prefix in ("ema/", "opt_state/1/mu/", "opt_state/1/nu/"):
        for path, placed in params.items():
            assert laid[prefix + path].spec == placed.spec, prefix + path


def test_an_unknown_parameter_is_an_error_with_the_rows():
    with pytest.raises(ValueError, match="(?s)'encoder/kernels'.*attention/out/kernel"):
        sharding.letters("encoder/kernels")
    with pytest.raises(ValueError, match="no row"):
        sharding.letters("encoder/unscale")  # a part of a name is no name
    with pytest.raises(ValueError, match="data.*fsdp.*tensor.*'ddp'"):
        sharding.spec("norm/scale", (4,), "ddp", AbstractMesh((1, 1, 1), sharding.AXES))


QUERY, UP, DOWN, TABLE = (
    "transformer/blocks/attention/query/kernel",
    "transformer/blocks/mlp/up/kernel",
    "transformer/blocks/mlp/down/kernel",
    "embeddings/table",
)
MODULATION = "transformer/blocks/modulation/kernel"


@pytest.mark.parametrize(
    "path, shape, strategy, sizes, expected",
    [
        # (data, fsdp, tensor); letters are aligned from the right, a stacked Y stays whole
        (UP, (4, 16, 32), "fsdp", (2, 4, 1), (None, "fsdp", None)),
        (UP, (16, 32), "fsdp", (2, 4, 1), ("fsdp", None)),
        (UP, (4, 16, 32), "tensor", (1, 2, 4), (None, "fsdp", "tensor")),
        (DOWN, (4, 32, 16), "tensor", (1, 2, 4), (None, "tensor", "fsdp")),
        (QUERY, (4, 16, 8, 4), "tensor", (1, 4, 2), (None, "fsdp", "tensor", None)),
        ("transformer/blocks/attention/out/kernel", (2, 8, 4, 16), "tensor", (1, 4, 2),
         (None, "tensor", None, "fsdp")),
        (TABLE, (1, 64, 16), "tensor", (1, 2, 4), (None, "tensor", "fsdp")),
        ("head/head/kernel", (16, 1, 64), "tensor", (1, 2, 4), ("fsdp", None, "tensor")),
        ("labels/table", (11, 16), "tensor", (1, 2, 4), (None, "fsdp")),
        # what does not divide passes its axis on, within the parameter and never to Y
        (UP, (4, 18, 32), "fsdp", (2, 4, 1), (None, None, "fsdp")),
        (QUERY, (4, 6, 8, 4), "tensor", (1, 4, 2), (None, None, "fsdp", "tensor")),
        (QUERY, (4, 6, 3, 4), "fsdp", (2, 4, 1), (None, None, None, "fsdp")),
        (UP, (4, 18, 30), "fsdp", (2, 4, 1), (None, None, None)),
        (TABLE, (1, 63, 16), "tensor", (1, 1, 4), (None, None, "tensor")),
        # nothing is split under "data", over an axis of size 1, or where a row says "."
        (UP, (4, 16, 32), "data", (2, 2, 2), (None, None, None)),
        (UP, (4, 16, 32), "tensor", (8, 1, 1), (None, None, None)),
        ("encoder/conv_in/kernel", (4, 4, 16, 16), "tensor", (2, 2, 2), (None,) * 4),
        ("labels/table", (12, 15), "fsdp", (2, 4, 1), (None, None)),
        ("quantizer/codebook", (512, 512), "tensor", (2, 2, 2), (None, None)),
        # but for what is large: it lies over its longest dimension, never over layers
        ("quantizer/codebook", (4096, 512), "tensor", (2, 2, 2), ("fsdp", None)),
        ("encoder/conv_in/kernel", (3, 3, 512, 512), "fsdp", (2, 4, 1), (None, None, None, "fsdp")),
        ("encoder/conv_in/kernel", (3, 3, 512, 510), "fsdp", (2, 4, 1), (None, None, "fsdp", None)),
        (MODULATION, (64, 768, 6, 768), "tensor", (2, 1, 4), (None, None, None, "tensor")),
        (MODULATION, (64, 768, 6, 768), "tensor", (2, 2, 2), (None, "fsdp", None, None)),
        ("transformer/blocks/mlp_norm/scale", (4, 16), "tensor", (2, 2, 2), (None, None)),
    ],
)  # fmt: skip
def test_the_rules_of_a_partition(path, shape, strategy, sizes, expected):
    mesh = AbstractMesh(sizes, sharding.AXES)
    assert sharding.spec(path, shape, strategy, mesh) == PartitionSpec(*expected)
    for axis, size in zip(expected, shape, strict=True):
        assert axis is None or size % mesh.shape[axis] == 0


def test_a_large_parameter_does_not_stay_whole_by_accident():
    shape = (1, 1001, 1001)
    with pytest.raises(ValueError) as error:
        sharding.spec(UP, shape, "fsdp", AbstractMesh((2, 4, 1), sharding.AXES))
    for word in (UP, str(shape), "'fsdp': 4", "divide"):
        assert word in str(error.value)
    # where nothing asks for it, or no axis has anything to offer, it may
    for strategy, sizes in (("data", (2, 4, 1)), ("fsdp", (8, 1, 1))):
        parts = sharding.spec(UP, shape, strategy, AbstractMesh(sizes, sharding.AXES))
        assert parts == PartitionSpec(None, None, None)
    small = (1, 999, 1001)
    assert math.prod(small) < sharding.LARGE
    sharding.spec(UP, small, "fsdp", AbstractMesh((2, 4, 1), sharding.AXES))


def test_the_mesh_uses_all_devices():
    devices = jax.device_count()
    assert devices == 8
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = sharding.make_mesh(2, -1, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    for sizes in ((3, 1, 1), (2, 2, 1), (-1, -1, 1), (-1, 3, 1), (16, 1, 1), (0, 1, 8)):
        with pytest.raises(ValueError, match="devices = 8"):
            sharding.make_mesh(*sizes)


TOPOLOGIES = [
    *("v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v6e:8x8", "v6e:16x16"),
    *("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8"),
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_mesh_of_powers_of_two_can_be_made_of_a_topology(topology):
    pytest.importorskip("libtpu", reason="describing a TPU that is not there needs libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    most, seen = len(devices).bit_length() - 1, set()
    for data, fsdp in itertools.product(range(most + 1), repeat=2):
        if data + fsdp <= most:
            sizes = 2**data, 2**fsdp, 2 ** (most - data - fsdp)
            mesh = sharding._of(devices, *sizes)
            assert tuple(mesh.shape.values()) == sizes
            assert set(mesh.devices.flat) == set(devices)
            rows = [
                sharding.rows_of(mesh, sharding.ways(mesh), index)
                for index in range(len({d.process_index for d in devices}))
            ]
            assert all(len(each) for each in rows)
            seen.add(str(rows))
    assert len(seen) > 3


def test_data_spans_slices_and_the_rest_stays_within_one():
    def device(index):
        found = dict(id=index, slice_index=index // 4, process_index=index // 4, platform="cpu")
        return types.SimpleNamespace(**found, device_kind="cpu", coords=None)

    devices = [device(index) for index in range(8)]
    arranged = sharding._over_slices(devices, 2, (4, 2, 1))
    assert arranged.shape == (4, 2, 1)
    slices = np.vectorize(lambda each: each.slice_index)(arranged)
    assert (slices == slices[:, :1]).all() and slices[:, 0, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(interfaces.UserError, match="2 slices of 4 devices.*1 x 8 x 1"):
        sharding._over_slices(devices, 2, (1, 8, 1))


def test_constrain_does_nothing_without_a_mesh_and_acts_under_one():
    x = jnp.ones((8, 4, 6, 5))
    assert sharding.constrain(x, "BNLK") is x
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        y = jax.jit(lambda x: sharding.constrain(x, "BNLK"))(x)
        assert y.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor", None, None) or (
            y.sharding.is_equivalent_to(
                jax.NamedSharding(y.sharding.mesh, PartitionSpec(("data", "fsdp"), "tensor")), 4
            )
        )
        assert y.addressable_shards[0].data.shape == (2, 2, 6, 5)
        # what does not divide stays whole: a head too many is no error
        odd = jax.jit(lambda x: sharding.constrain(x, "BNLK"))(jnp.ones((8, 3, 6, 5)))
        assert odd.addressable_shards[0].data.shape == (2, 3, 6, 5)
        with pytest.raises(ValueError):
            sharding.constrain(x, "BNL")
    np.testing.assert_array_equal(y, x)


def test_a_batch_lies_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, 2)
    image = np.arange(8 * 3).reshape(8, 3)
    batch = sharding.global_batch({"image": image}, mesh)["image"]
    np.testing.assert_array_equal(batch, image)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_a_batch_that_does_not_divide_is_filled_up_or_refused():
    mesh = sharding.make_mesh(4, 2, 1)
    given = {"rows": np.arange(11), "pairs": np.arange(22).reshape(11, 2), "none": None}
    for rows, count in ((5, 16), (11, 16), (17, 24)):
        found = sharding.filled(given, rows, mesh)
        wanted = np.minimum(np.arange(count), 10)
        np.testing.assert_array_equal(found["rows"], wanted)
        np.testing.assert_array_equal(found["pairs"][:, 0], 2 * wanted)
        each = {shard.data.shape for shard in found["pairs"].addressable_shards}
        assert each == {(count // 8, 2)} and found["none"] is None
    sharding.check_batch(16, mesh)
    for batch, words in ((11, "give 8 or 16, or"), (5, "give 8, or")):
        with pytest.raises(interfaces.UserError, match=f"8 devices.*batch_size={batch}: {words}"):
            sharding.check_batch(batch, mesh)
    with pytest.raises(interfaces.UserError, match="give 8 or 16"):
        sharding.global_batch({"image": np.zeros((11, 2))}, mesh)


def test_the_mesh_that_is_set_is_the_current_one():
    assert sharding.current().size == jax.device_count()
    with jax.set_mesh(_single()):
        assert sharding.current().size == 1


LAYOUT = interfaces.TokenLayout((64,), ((3, 3),))


def _generator(layout):
    return autoregressive.Generator(
        layout,
        5,
        width=32,
        depth=2,
        heads=2,
        variant="llama_narrow",
        precision=FLOAT32,
        rngs=nnx.Rngs(rng.key(0, "init")),
    )


def _single():
    """A mesh of one device."""
    device = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(device, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


# ---------------------------------------------------------------- drawing and measuring


class Decoder(nnx.Module):
    """Tokens of LAYOUT as gray images."""

    quantizer = None

    def decode(self, tokens_BLG):
        gray_BHW1 = tokens_BLG.reshape(-1, 3, 3, 1) / 64
        return jnp.broadcast_to(gray_BHW1, (*gray_BHW1.shape[:3], 3))


class Tokens(sources.RandomAccess):
    """Eleven images of LAYOUT as a source."""

    holds, layout, classes = "tokens", LAYOUT.to_json(), tuple("abcde")
    fingerprint = "eleven"

    def __len__(self):
        return 11

    def __getitems__(self, indices):
        draws = (np.random.default_rng(index) for index in map(int, indices))
        return [{"tokens": d.integers(0, 64, (1, 9, 1)), "label": 0} for d in draws]


def test_drawing_and_likelihoods_are_shared_by_the_devices_to_the_bit(monkeypatch):
    """Each device does its part of the work, though 11 images and batches of 5 do not divide."""
    generator, sampler = _generator(LAYOUT), samplers.Sampler(guidance=(2.0,) * 9)
    work, program = {}, drawing.draw_tokens

    def measured(*arguments, **static):
        compiled = program.lower(*arguments, **static).compile()
        work.setdefault(sharding.current().size, compiled.cost_analysis()["flops"])
        return compiled(*arguments[:4], *arguments[5:])

    monkeypatch.setattr(drawing, "draw_tokens", measured)
    found, nats = {}, {}
    for mesh in (_single(), sharding.make_mesh()):
        monkeypatch.setattr(sharding, "make_mesh", lambda mesh=mesh: mesh)
        module = jax.device_put(generator, sharding.replicated(mesh))
        label_N = np.arange(11, dtype=np.int32) % 5
        found[mesh.size] = drawing.draw(
            module, Decoder(), label_N, sampler, seed=1, batch=4, what=""
        )
        figures = validation.likelihood(module, None, Tokens(), count=11, batch=5)
        nats[mesh.size] = figures["nats_per_token"]
    tokens_NLG, image_NHW3 = found[1]
    assert tokens_NLG.shape == (11, 9, 1) and image_NHW3.shape == (11, 3, 3, 3)
    assert len(np.unique(tokens_NLG)) > 20 and nats[1] > 1
    for ours, alone in zip(found[8], found[1], strict=True):
        np.testing.assert_array_equal(ours, alone)
    assert nats[8] == nats[1]
    # batches of 4 are filled up to 8: an image for each device, of four for one alone
    assert work[8] < 0.3 * work[1]


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(8, 32, 1), (64, 4, 1), (1, 64, 4), (4, 16, 4)])
def test_no_large_parameter_stays_whole_in_any_recipe(sizes):
    """On a mesh of 256 that is not refused; what frozen feature networks hold, too."""
    mesh, refused = AbstractMesh(sizes, sharding.AXES), []
    strategy = "tensor" if sizes[2] > 1 else "fsdp"
    for name, module in _networks():
        for path, leaf in parameters.paths(_abstract_state(module, "adamw")).items():
            if leaf.ndim == 0 or leaf.size <= sharding.LARGE:
                continue
            try:
                parts = sharding.spec(path, leaf.shape, strategy, mesh)
            except interfaces.UserError as error:
                assert "sizes that do: 2" in str(error)
                refused.append(name)
                continue
            assert any(parts), (name, path, leaf.shape)
    assert len(set(refused)) < 3, refused

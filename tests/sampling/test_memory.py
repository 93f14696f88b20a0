"""What a decode keeps, and a batch that does not fit."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import rng, sharding
from tokgen.config import building, reading
from tokgen.generators import autoregressive, masked
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn.precision import FLOAT32, Precision
from tokgen.sampling import decode, drawing, memory, sampler as samplers

LAYOUT = TokenLayout((7,), ((2, 2),))
SMALL = dict(width=16, depth=2, heads=2, hidden=16, precision=FLOAT32)
FREE = samplers.Sampler()


def make(**options):
    how = SMALL | dict(variant="llama_narrow", window=2) | options
    return autoregressive.Generator(LAYOUT, 5, **how, rngs=nnx.Rngs(0))


def on(*rooms):
    """A mesh of stand-ins: devices with so many bytes, and a hundred in use."""
    devices = [
        types.SimpleNamespace(
            memory_stats=lambda room=room: room and {"bytes_limit": room + 100, "bytes_in_use": 100}
        )
        for room in rooms
    ]
    return types.SimpleNamespace(
        local_devices=devices,
        size=len(rooms),
        shape={"data": len(rooms), "fsdp": 1, "tensor": 1},
    )


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_kept_is_what_a_decode_ends_with(apart, monkeypatch):
    monkeypatch.setattr(decode, "SCANNED", () if apart else ("cpu",))
    generator, cond = make(), jnp.arange(3)
    guided = samplers.Sampler(guidance=(1.0, 2.0, 2.0, 2.0))
    keys_B = rng.per_image(0, "sample", cond)
    for how, rows in ((FREE, 3), (guided, 6)):
        run = lambda g, how=how: decode.generate(g, None, cond, how, keys_B=keys_B)  # noqa: E731
        state = jax.eval_shape(run, generator)
        found = memory.kept(generator, None, cond, how, 3)
        ended = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
        assert found.images == 3 and found.cache == ended * rows // 3
        # keys and values of four slots in two layers of width 16, float32
        assert found.cache == rows * 4 * 2 * 2 * 16 * 4
        assert found.rest > rows * 4 * (4 + 1)  # tokens, and which were given


@pytest.mark.parametrize(
    "recipe, layout, megabytes",
    [
        ("generator/rar.py:xxl", TokenLayout((1024,), ((16, 16),)), 57.9),
        (
            "generator/var.py:d30",
            TokenLayout((4096,), tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))),
            156.7,
        ),
    ],
)
def test_published_models_keep_what_a_closed_form_says(recipe, layout, megabytes):
    """2 layers width slots 2 bytes a row: RAR-XXL 40 x 1,408 x 257, VAR-d30 30 x 1,920 x 680."""
    settings = reading.load(f"configs/{recipe}")
    settings.precision = dict(params="bfloat16", compute="bfloat16")
    make = lambda: building.generator(settings, layout, 1000, rngs=nnx.Rngs(0))  # noqa: E731
    codec = None
    if "var" in recipe:
        tokenizer = reading.load("configs/tokenizer/var_vqvae.py:256")
        build = lambda: building.tokenizer(tokenizer, rngs=nnx.Rngs(0))  # noqa: E731
        codec = nnx.eval_shape(build).quantizer
    found = memory.kept(nnx.eval_shape(make), codec, np.arange(1), FREE, 1)
    assert found.cache / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_a_batch_is_refused_with_the_largest_that_fits():
    generator, cond = make(), np.arange(3)
    one, two = (memory.kept(generator, None, cond, FREE, n).all for n in (1, 2))
    always, each = 2 * one - two, two - one
    exactly = always + 3 * each
    asked = (generator, None, cond, FREE)

    def ask(batch, *rooms, **how):
        memory.check(*asked, batch, on(*rooms), **how)

    ask(3, exactly)
    with pytest.raises(UserError, match=r"batch of 4 .* the device, .*MB an image.* is 3$"):
        ask(4, exactly)
    ask(6, exactly, exactly + each)  # three each, and the fuller one counts
    with pytest.raises(UserError, match=r"batch of 7 .* each of 2 devices, .* --batch .* is 6$"):
        ask(7, exactly, exactly + each)
    with pytest.raises(UserError, match="use more devices"):
        ask(1, always + each - 1)
    with pytest.raises(UserError, match="split the network over the devices, --mesh 1,1,2$"):
        ask(2, always + each - 1, exactly)
    each = 2 * each  # resampled: those that were lie beside those that go on
    ask(1, always + 3 * each, particles=3)
    with pytest.raises(UserError, match="1 images with 4 particles each.* --particles .* are 3$"):
        ask(1, always + 3 * each, particles=4)
    with pytest.raises(UserError, match="3 images with 4 particles each.* --batch .* is 8$"):
        ask(3, always + 11 * each, particles=4)
    ask(2**40, None)  # a device that says nothing
    memory.check(generator, None, cond, FREE, 2**40, sharding.make_mesh())  # as a CPU


def test_a_generator_without_a_cache_keeps_little():
    generator = masked.Generator(LAYOUT, 5, **SMALL, steps=3, rngs=nnx.Rngs(0))
    found = memory.kept(generator, None, np.arange(1), FREE, 8)
    assert found.cache == 0 and 0 < found.rest < 1000


def test_half_the_precision_is_half_the_cache():
    wide, narrow = (
        memory.kept(make(precision=Precision("float32", kind)), None, np.arange(1), FREE, 2)
        for kind in ("float32", "bfloat16")
    )
    assert wide.cache == 2 * narrow.cache and dataclasses.asdict(wide)["images"] == 2


def test_drawing_refuses_before_any_work(monkeypatch):
    generator = make()
    monkeypatch.setattr(memory, "room", lambda mesh: 1000)
    monkeypatch.setattr(drawing, "draw_tokens", lambda *_: pytest.fail("work on the device"))
    tokenizer = types.SimpleNamespace(quantizer=None)
    with pytest.raises(UserError, match="largest --batch|more devices|split the network"):
        drawing.draw(generator, tokenizer, np.arange(5), FREE, seed=0, batch=4096)

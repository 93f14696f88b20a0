"""Drawing batch by batch: what crosses between host and devices, and how often is compiled."""

import contextlib
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.generators import test_contract
from tokgen import rng, sharding
from tokgen.interfaces import UserError
from tokgen.sampling import decode, drawing, sampler as samplers

FAMILIES = ("autoregressive", "factor", "rar", "captions", "masked", "u_shaped", "next_scale")
# What a program calls the host by
CALLS = re.compile(r"infeed|outfeed|\bsend\b|\brecv\b|callback|host_compute", re.IGNORECASE)


class Tokenizer(nnx.Module):
    """Pixels that are the first symbol of the first token."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def decode(self, tokens_BLG):
        """[B, 2, 2, 3]."""
        image_B111 = tokens_BLG[:, :1, :1, None].astype(jnp.float32) / 8
        return jnp.broadcast_to(image_B111, (len(tokens_BLG), 2, 2, 3))


def guided(generator) -> samplers.Sampler:
    """Guided at first, then not: null rows are dropped on the way."""
    total = decode.steps(generator)
    return samplers.Sampler(top_k=3, top_p=0.9, guidance=(2.0,) * (total - 1) + (1.0,))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_moves_nothing_between_host_and_device(name):
    generator, codec, cond = test_contract.make(name)
    cond = jax.tree.map(jnp.asarray, cond)
    keys_B = rng.per_image(0, "sample", jnp.arange(test_contract.B))
    operands = jax.device_put((generator.unstacked(), codec, cond, keys_B), jax.devices()[0])
    program = drawing.draw_tokens.lower(*operands, guided(generator)).compile()
    with jax.transfer_guard("disallow"):
        tokens_BLG, invalid_B, near_B = jax.block_until_ready(program(*operands))
    assert not CALLS.findall(re.sub(r"metadata=\{[^}]*\}", "", program.as_text()))
    assert tokens_BLG.max() < generator.layout.absent and not invalid_B.any()


def guarded(program):
    """A program that may be handed nothing which lies on the host."""

    def call(*operands, **static):
        to_host = jax.transfer_guard_device_to_host("disallow")
        with jax.transfer_guard_host_to_device("disallow"), to_host:
            return program(*operands, **static)

    return call


def compilations(records) -> list[str]:
    """Programs that jax said that it compiles."""
    return [r.getMessage() for r in records if r.getMessage().startswith("Compiling ")]


@pytest.mark.parametrize("name", ["rar", "masked", "next_scale"])
def test_batches_seeds_and_labels_share_a_program(name, caplog, monkeypatch):
    """The last batch is smaller; images of other seeds, labels and numbers of images.

    And the programs are handed what lies on the devices.
    """
    for program in ("draw_tokens", "decode_pixels"):
        monkeypatch.setattr(drawing, program, guarded(getattr(drawing, program)))
    generator, codec, _ = test_contract.make(name)
    generator, tokenizer = generator.unstacked(), Tokenizer(codec)
    sampler, batch = guided(generator), 2 * sharding.ways(sharding.make_mesh())
    caplog.set_level(logging.WARNING, "jax")
    with jax.log_compiles():
        for images, seed in ((batch + 3, 0), (2 * batch, 7), (2 * batch - 5, 2**32 - 1)):
            caplog.clear()
            label_N = np.int32((np.arange(images) + seed) % test_contract.CLASSES)
            tokens_NLG, image_NHW3 = drawing.draw(
                *(generator, tokenizer, label_N, sampler), seed=seed, batch=batch, what=""
            )
            assert len(tokens_NLG) == len(image_NHW3) == images
            found = compilations(caplog.records)
            assert bool(found) == (seed == 0), found


@pytest.mark.parametrize("broken", [None, 1])
def test_the_next_batch_is_begun_before_one_is_handed_over(broken, monkeypatch):
    """Two at a time, not three; and one that is not finite is told before another is begun."""
    order = []

    def draw_tokens(generator, codec, cond_B, keys_B, sampler, held, kept, *, particles):
        number = sum(what == "begun" for what, _ in order)
        order.append(("begun", number))
        flags_B = np.full(len(cond_B), number == broken)
        return np.asarray(cond_B)[:, None, None], flags_B, flags_B

    def decode_pixels(tokenizer, tokens_BLG):
        return np.zeros((len(tokens_BLG), 2, 2, 3), np.uint8), np.zeros(len(tokens_BLG), bool)

    monkeypatch.setattr(drawing, "draw_tokens", draw_tokens)
    monkeypatch.setattr(drawing, "decode_pixels", decode_pixels)
    nothing = types.SimpleNamespace(check=lambda cond: None, unstacked=lambda: None, quantizer=None)
    batch, refused = sharding.ways(sharding.make_mesh()), contextlib.nullcontext()
    if broken is not None:
        refused = pytest.raises(UserError, match=f"number {batch * broken}")
    tokens = []
    with refused:
        asked = (nothing, nothing, np.arange(3 * batch, dtype=np.int32), None)
        for number, part in enumerate(drawing.drawn(*asked, seed=0, batch=batch, what="")):
            order.append(("taken", number))
            tokens += part.tokens_BLG[:, 0, 0].tolist()
    begun, taken = ([(what, k) for k in range(3)] for what in ("begun", "taken"))
    wanted = [begun[0], begun[1], taken[0], begun[2], taken[1], taken[2]]
    assert order == (wanted if broken is None else wanted[:3])
    assert tokens == list(range(batch * (3 if broken is None else 1)))


def test_what_the_compiler_is_told_depends_on_the_platform_at_the_first_use(monkeypatch):
    told = []
    monkeypatch.setattr(
        jax, "jit", lambda function, compiler_options: told.append(compiler_options) or function
    )
    programs = [drawing.Program(abs) for _ in range(2)]
    for program, platform in zip(programs, ("cpu", "tpu"), strict=True):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert program(-1) == program(-2) - 1 == 1
    assert told == [{"xla_backend_optimization_level": 1}, None]

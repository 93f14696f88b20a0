"""Arrays through a tokenizer that was loaded: as the module gives them, in any batches."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import tokens
from tokgen.config import building, reading
from tokgen.interfaces import UserError

NARROW = ("encoder.widths=(16,)", "decoder.widths=(16,)", "encoder.blocks=1", "decoder.blocks=1")


def loaded(*changes: str):
    settings = reading.load("configs/tokenizer/shapes.py", [*NARROW, *changes])
    module = building.tokenizer(settings, rngs=nnx.Rngs(0))
    return types.SimpleNamespace(module=module, config=settings, layout=module.layout, step="runs")


@pytest.fixture(scope="module")
def tokenizer():
    return loaded()


@pytest.fixture(scope="module")
def image_NHW3() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def test_images_become_the_tokens_of_the_module_and_images_again(tokenizer, image_NHW3):
    tokens_NLG = tokens.encode(tokenizer, image_NHW3, batch=2)
    wanted = jax.jit(type(tokenizer.module).encode)(tokenizer.module, image_NHW3 / np.float32(255))
    assert tokens_NLG.shape == (5, 64, 1) and len(np.unique(tokens_NLG)) > 1
    np.testing.assert_array_equal(tokens_NLG, wanted)
    decoded = tokens.decode(tokenizer, tokens_NLG, batch=4)
    exact = 255 * np.asarray(tokenizer.module.decode(jnp.asarray(tokens_NLG)))
    assert decoded.dtype == np.uint8 and np.abs(decoded - exact).max() < 0.51
    again = tokens.reconstruct(tokenizer, image_NHW3, batch=3)
    assert np.abs(decoded.astype(int) - again).max() <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda image: image / 255, "uint8 .N, 32, 32, 3.; found float64"),
        (lambda image: image[:, :16], r"found uint8 \[5, 16, 32, 3\]"),
        (lambda image: image[0], r"found uint8 \[32, 32, 3\]"),
        (lambda image: image[:0], r"found uint8 \[0, 32, 32, 3\]"),
    ],
)
@pytest.mark.parametrize("call", [tokens.encode, tokens.reconstruct])
def test_other_images_are_refused(tokenizer, image_NHW3, call, change, said):
    with pytest.raises(UserError, match=said):
        call(tokenizer, change(image_NHW3))


def test_tokens_of_another_layout_are_refused(tokenizer):
    with pytest.raises(UserError, match="must be 64 positions"):
        tokens.decode(tokenizer, np.zeros((2, 63, 1), np.int32))
    with pytest.raises(UserError, match="0 to 239"):
        tokens.decode(tokenizer, np.full((2, 64, 1), 240))
    with pytest.raises(UserError, match="found none"):
        tokens.decode(tokenizer, np.zeros((0, 64, 1), np.int32))
    with pytest.raises(UserError, match="batch must be a whole number from 1 to"):
        tokens.decode(tokenizer, np.zeros((2, 64, 1), np.int32), batch=0)


def test_a_decoder_that_reads_text_is_told_how_it_gets_it(tokenizer, image_NHW3):
    config = {**tokenizer.config, "decoder": {"text": (77, 768)}}
    reader = types.SimpleNamespace(**{**vars(tokenizer), "config": types.SimpleNamespace(**config)})
    for call, given in (
        (tokens.decode, np.zeros((2, 64, 1), np.int32)),
        (tokens.reconstruct, image_NHW3),
    ):
        with pytest.raises(UserError, match="reads text.*tokgen reconstruct --text"):
            call(reader, given)
    tokens.encode(reader, image_NHW3)  # it needs no text


def test_a_continuous_tokenizer_reconstructs_and_writes_no_tokens(image_NHW3):
    continuous = loaded("quantizer.name=gaussian", "quantizer.channels=4")
    with pytest.raises(UserError, match="continuous tokenizer, which writes no tokens"):
        tokens.encode(continuous, image_NHW3)
    with pytest.raises(UserError, match="continuous tokenizer, which reads no tokens"):
        tokens.decode(continuous, np.zeros((5, 64, 1), np.int32))
    assert tokens.reconstruct(continuous, image_NHW3).shape == image_NHW3.shape

"""What is loaded for encoding and decoding alone: tokens and images of the whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import parameters
from tokgen.checkpoints import checkpoint, loading
from tokgen.config import building
from tokgen.nn import transformer


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A small TiTok of two stages, of random numbers."""
    config = recipes.load("tokenizer/titok:s128")
    small = dict(tokens=6, width=32, depth=2, heads=2)
    config.view.size = (32, 32)
    config.encoder.update(small)
    config.quantizer.update(codes=16)
    config.decoder.update(codebook=(8, 32))
    config.decoder.codes.update(small, channels=8)
    config.decoder.pixels.update(latent=32, grid=(2, 2), widths=(32,) * 5, blocks=1)

    def make():
        return recipes.scattered(building.tokenizer(config, rngs=nnx.Rngs(0)))

    folder = tmp_path_factory.mktemp("run")
    layout = nnx.eval_shape(make).layout
    recipes.save(folder, config, make, kind="tokenizer", layout=layout, best="l2")
    return checkpoint.find(folder)


both = jax.jit(
    lambda tokenizer, image: (found := tokenizer.encoded(image)[0], tokenizer.decoded(found)[0])
)


@pytest.mark.long
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_tokens_and_images_are_those_of_the_whole_network(step, compute):
    whole, spare = (
        load(step, compute=compute) for load in (loading.load_tokenizer, loading.load_to_code)
    )
    image_BHW3 = jax.random.uniform(jax.random.key(0), (3, 32, 32, 3))
    (tokens, images), (found, decoded) = (both(each.module, image_BHW3) for each in (whole, spare))
    np.testing.assert_array_equal(found, tokens)
    assert len(np.unique(tokens)) > 2
    if compute == "float32":
        np.testing.assert_allclose(decoded, images, atol=1e-5)
    assert spare.fingerprint == whole.fingerprint
    for network, form in ((whole, nnx.Module), (spare, nnx.List)):
        stacks = [
            part.blocks
            for _, part in nnx.iter_modules(network.module)
            if isinstance(part, transformer.Transformer)
        ]
        assert len(stacks) == 2
        assert all(isinstance(stack, nnx.List) == (form is nnx.List) for stack in stacks)
    _, params, _ = parameters.split(spare.module)
    for path, leaf in parameters.paths(params).items():
        narrow = path.endswith(("/kernel", "/bias")) and "norm" not in path
        wanted = jnp.dtype(compute) if narrow else jnp.float32
        assert leaf.dtype == wanted, path

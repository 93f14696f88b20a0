"""Operations counted from a jaxpr, against XLA's own count of the same program."""

import jax
import jax.numpy as jnp
import pytest

from tokgen import flops

NUMBERS = ("NHWC", "HWIO", "NHWC")


def told(function, *shapes):
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="SAME"),
        dict(window_strides=(2, 2), padding=((0, 1), (0, 1))),
        dict(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 3)),
        dict(window_strides=(1, 1), padding=((2, 2), (1, 1)), lhs_dilation=(2, 3)),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
        dict(window_strides=(1, 1), padding="VALID", batch_group_count=2),
    ],
)
def test_convolutions_multiply_no_zeros_of_padding_or_dilation(options):
    channels = 6 // options.get("feature_group_count", 1)
    image = jax.ShapeDtypeStruct((2, 9, 12, 6), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, 8), jnp.float32)

    def convolved(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, dimension_numbers=NUMBERS, **options)

    assert flops.of(convolved, image, kernel) == told(convolved, image, kernel)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_backward_pass_of_a_convolution_is_counted_as_xla_does(stride):
    """Of a strided one, whose gradient is spread out with zeros between."""
    image = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((4, 4, 8, 8), jnp.float32)

    def convolved(image, kernel):
        padding = ((1, 2), (1, 2))
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            image, kernel, strides, padding, dimension_numbers=NUMBERS
        )

    def pulled(image, kernel, gradient):
        return jax.vjp(convolved, image, kernel)[1](gradient)

    gradient = jax.eval_shape(convolved, image, kernel)
    forward, backward = (
        flops.of(convolved, image, kernel),
        flops.of(pulled, image, kernel, gradient),
    )
    # what was traced has the forward pass in it, which XLA sees is not needed
    assert backward - forward == told(pulled, image, kernel, gradient)
    assert backward == 3 * forward

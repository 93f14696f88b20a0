"""What devices sum over a batch, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from tokgen.planning import sums


def test_a_gradient_is_summed_over_devices_for_every_use_of_its_weights():
    """Of uses whose gradients are added as they are, once."""

    def summed(function):
        kernel_DF = jax.ShapeDtypeStruct((8, 4), np.float32)
        one, two = (
            jax.make_jaxpr(jax.grad(function))(kernel_DF, np.zeros((rows, 8), np.float32)).jaxpr
            for rows in (16, 32)
        )
        return sums.summed(one, two)

    def twice(kernel_DF, x_BD):
        return jnp.sum((x_BD @ kernel_DF) * (2 * x_BD @ kernel_DF))

    def apart(kernel_DF, x_BD):
        return jnp.sum((x_BD @ jnp.sin(kernel_DF)) * (x_BD @ jnp.cos(kernel_DF)))

    def in_parts(kernel_DF, x_BD):
        def part(total, x_BD):
            return total + jnp.sum((x_BD @ kernel_DF) ** 2), ()

        return jax.lax.scan(part, 0.0, x_BD.reshape(4, -1, 8))[0]

    def either(kernel_DF, x_BD):  # one of two is taken: the dearer is reckoned, not both
        return jax.lax.cond(kernel_DF[0, 0] > 0, twice, apart, kernel_DF, x_BD)

    size, loss = 8 * 4 * 4, 4
    found = [summed(each) for each in (twice, apart, in_parts, either)]
    assert found == [size + loss, 2 * size + loss, 4 * (size + loss), 2 * size + loss]

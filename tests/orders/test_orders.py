import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import interfaces, orders
from tokgen.orders import random

LAYOUT = interfaces.TokenLayout((16,), ((3, 5),))
NAMES = orders.known()


@pytest.mark.parametrize("name", NAMES)
def test_every_order_handles_every_position_once(name):
    order = orders.named(name)
    for seed in range(3):
        places = jax.jit(order, static_argnums=0)(LAYOUT, jax.random.key(seed))
        assert places.shape == (15,) and jnp.issubdtype(places.dtype, jnp.integer)
        np.testing.assert_array_equal(np.sort(places), np.arange(15))
        np.testing.assert_array_equal(places, order(LAYOUT, jax.random.key(seed)))


def test_raster_goes_by_rows_and_columns_by_columns():
    np.testing.assert_array_equal(orders.named("raster")(LAYOUT), np.arange(15))
    by_columns = [row * 5 + column for column in range(5) for row in range(3)]
    np.testing.assert_array_equal(orders.named("columns")(LAYOUT), by_columns)


def test_a_random_order_is_uniform_over_positions():
    count = 3000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = np.asarray(jax.vmap(lambda key: random.order(LAYOUT, key))(keys))
    for place in (0, 7, 14):
        seen = np.bincount(drawn[:, place], minlength=15)
        # chi-square with 14 degrees of freedom: 36.1 is passed once in a thousand
        assert ((seen - count / 15) ** 2 / (count / 15)).sum() < 36.1


@pytest.mark.parametrize("name", ["rastr", "named", "__init__", "TokenLayout", ""])
def test_what_is_no_order_is_refused_with_the_names_of_those_that_are(name):
    with pytest.raises(ValueError) as error:
        orders.named(name)
    assert ", ".join(NAMES) in str(error.value) and repr(name) in str(error.value)

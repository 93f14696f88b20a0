"""Mask schedules against closed forms in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from tokgen.generators import mask_schedules

N, EXPONENT = 36, 2.5
CLOSED = {
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "arccos": lambda r: math.acos(r) * 2 / math.pi,
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "root": lambda r: 1 - math.sqrt(r),
    "power": lambda r: 1 - r**EXPONENT,
    "log": lambda r: -math.log(r) / math.log(N),
    "exponential": lambda r: 1 - N ** -(1 - r),
    "decay": lambda r: 1 - math.exp(-5 * (1 - r)),
}
R = np.linspace(0, 1, 201, dtype=np.float32)


@pytest.mark.parametrize("name", CLOSED)
def test_a_schedule_is_its_closed_form_and_falls_from_one_to_nothing(name):
    share = np.asarray(mask_schedules.share(name, R, N, EXPONENT))
    wanted = [min(max(CLOSED[name](float(r)), 1e-6), 1) for r in R[1:]]
    np.testing.assert_allclose(share[1:], wanted, rtol=2e-5, atol=2e-7)
    assert share.dtype == np.float32 and (np.diff(share) <= 0).all()
    # those that only approach 1 do so to 1 - 1/N and 1 - exp(-5)
    first = {"exponential": 1 - 1 / N, "decay": 1 - math.exp(-5)}.get(name, 1.0)
    np.testing.assert_allclose(share[0], first, rtol=1e-6)
    assert share[-1] == np.float32(1e-6)


def test_every_schedule_is_tested():
    found = [
        name
        for name, value in vars(mask_schedules).items()
        if getattr(value, "__module__", "") == mask_schedules.__name__
    ]
    assert set(found) - {"share", "named"} == set(CLOSED)
    with pytest.raises(ValueError, match="schedule must be one of .*arccos.*; found 'arcos'"):
        mask_schedules.named("arcos")


@pytest.mark.parametrize("name", ["log", "exponential"])
def test_a_count_per_sample_is_a_schedule_per_sample(name):
    count_B = jnp.asarray([5.0, 36.0, 256.0])
    share_B = mask_schedules.share(name, 0.4, count_B)
    alone = [float(mask_schedules.share(name, 0.4, int(count))) for count in count_B]
    np.testing.assert_array_equal(share_B, np.float32(alone))
    assert len(set(alone)) == 3

"""What tests of whole training runs share."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests import shared_steps
from tokgen import metrics_log, sharding
from tokgen.training import launch


@pytest.fixture(scope="module")
def one_device():
    """A mesh of one device compiles fastest, each config once; signals stay those of the tests."""
    device = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(device, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda data=-1, fsdp=1, tensor=1: mesh)
        patch.setattr(launch.signal, "signal", lambda number, handler: None)
        patch.setattr(metrics_log, "curves", lambda workdir: None)
        shared_steps.share(patch)
        # a run sets its mesh for good: what this module leaves must not meet the next one
        with jax.set_mesh(Mesh(np.empty((), object), ())):
            yield

"""A batch in parts: the same gradients, on every mesh, in less memory."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import family_steps, test_devices
from tokgen import errors, flops, parameters, sharding
from tokgen.config import reading
from tokgen.data import views
from tokgen.training import accumulation, fields, train_state

ALONE = (1, 1, 1)


def test_every_part_has_rows_of_every_device_and_none_moves():
    mesh, rows = family_steps.mesh_of((2, 4, 1)), np.arange(32 * 3).reshape(32, 3)
    with jax.set_mesh(mesh):
        batch = jax.device_put(rows, sharding.of_batch(mesh))
        for program in (
            jax.jit(lambda x: accumulation.cut(x, 4)),
            jax.jit(lambda x: accumulation.joined(accumulation.cut(x, 4))),
        ):
            assert not re.findall(test_devices.COLLECTIVE, program.lower(batch).compile().as_text())
        parts = jax.jit(lambda x: accumulation.cut(x, 4))(batch)
        back = jax.jit(accumulation.joined)(parts)
    np.testing.assert_array_equal(parts, np.moveaxis(rows.reshape(8, 4, 3), 1, 0))
    assert {shard.data.shape for shard in parts.addressable_shards} == {(4, 1, 3)}
    np.testing.assert_array_equal(back, rows)


def first(run, parts, **changed):
    """(networks, scalars) of the first step, on one device."""
    mesh = family_steps.mesh_of(ALONE)
    with jax.set_mesh(mesh):
        state = jax.device_put(run.state, train_state.shardings(run.state, mesh, "data"))
        batch = next(family_steps.batches(run, mesh, 0))
        step = run.make("data", accumulate=parts, **changed)
        return jax.device_get(step(state, batch, run.frozen)[:2])


def check_alike(found, expected, close=1e-6):
    (found, scalars), (expected, wanted) = found, expected
    for name in wanted:
        np.testing.assert_allclose(scalars[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    before = parameters.paths(family_steps.traces(expected))
    top = max(np.abs(leaf).max() for leaf in before.values())
    for path, leaf in parameters.paths(family_steps.traces(found)).items():
        own = np.abs(before[path]).max()
        # a bias before a norm has no gradient but rounding
        assert np.abs(leaf - before[path]).max() < close * (own if own > 1e-3 * top else top), path
    for path, leaf in parameters.paths(expected).items():
        np.testing.assert_allclose(
            parameters.paths(found)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path
        )


def test_four_quarters_of_a_batch_are_the_batch_for_a_generator():
    run = family_steps.generator("raster", label_drop=0.0, rates=dict(token=0.0, residual=0.0))
    check_alike(first(run, 4), first(run, 1))


def test_four_quarters_of_a_batch_are_the_batch_for_a_gan():
    """With its adaptive weight, its quantizer's upkeep and its discriminator, where no term is of
    the batch as a whole."""
    run = family_steps.tokenizer("shapes:ema", norm="group")
    check_alike(first(run, 4), first(run, 1), close=1e-5)


def test_each_part_draws_for_itself():
    """One part draws as a batch always did; gradients are summed in float32."""
    drawn = []

    def of_part(params, batch, key):
        return params, jax.random.uniform(key), batch

    program = functools.partial(accumulation.averaged, of_part, strategy="data")
    for parts in (1, 2):
        gradients, mean, rows = jax.jit(functools.partial(program, parts=parts))(
            {"scale": jnp.ones(3, jnp.bfloat16)}, jnp.arange(8), jax.random.key(3)
        )
        drawn.append(mean)
        np.testing.assert_array_equal(rows, np.arange(8))
        np.testing.assert_array_equal(gradients["scale"], np.ones(3))
    assert gradients["scale"].dtype == jnp.float32
    assert drawn[0] == jax.random.uniform(jax.random.key(3)) and drawn[0] != drawn[1]


def test_four_parts_need_less_memory_for_the_same_operations():
    run, mesh = family_steps.begun("raster"), family_steps.mesh_of(ALONE)
    sizes, work = [], []
    with jax.set_mesh(mesh):
        for parts in (1, 4):
            batch = jax.tree.map(
                lambda rows: np.repeat(rows, 8, 0), run.batch(np.random.default_rng(0))
            )
            step = run.make("data", accumulate=parts)
            memory = step.lower(run.state, batch, run.frozen).compile().memory_analysis()
            sizes.append(memory.temp_size_in_bytes)
            work.append(flops.of_training(step, run.state, batch, run.frozen))
    assert sizes[1] < 0.5 * sizes[0] and work[0] == work[1]


@pytest.mark.parametrize("name", ["generator/shapes", "tokenizer/shapes"])
def test_what_does_not_divide_is_refused_with_numbers_that_do(name):
    check = fields.check_generator if name.startswith("generator") else fields.check_tokenizer
    check(reading.load(f"configs/{name}.py", ("batch_size=48", "accumulate=3")))
    words = "batch_size=64 has no 3; give accumulate=1 or 2, or batch_size=66"
    with pytest.raises(errors.UserError, match=words):
        check(reading.load(f"configs/{name}.py", ("batch_size=64", "accumulate=3")))
    with pytest.raises(errors.UserError, match="accumulate"):
        check(reading.load(f"configs/{name}.py", ("accumulate=0",)))


def test_fields_that_a_config_may_leave_out_have_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(fields.Fields)}
    resize = inspect.signature(views.View).parameters["resize"].default
    found = {name: defaults[name] for name in ("accumulate", "profile")} | {"view.resize": resize}
    assert found == {"accumulate": 1, "profile": (), "view.resize": "adm"}
    assert found.keys() == reading.LEFT_OUT.keys()


def test_parts_lie_evenly_over_the_devices():
    mesh = family_steps.mesh_of((2, 4, 1))
    sharding.check_batch(64, mesh, parts=4)
    words = (
        "accumulate=4 parts of a batch.*8 devices.*batch_size=48: give 32 or 64, accumulate=3, or"
    )
    with pytest.raises(errors.UserError, match=words):
        sharding.check_batch(48, mesh, parts=4)

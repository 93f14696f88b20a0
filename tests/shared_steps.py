"""Runs of one config share their compiled step: tests of runs begin them again and again.

A process that goes on with a run compiles it anew; tests/test_end_to_end.py kills such processes.
"""

import pytest
from jax.sharding import Mesh

from tokgen.config import building
from tokgen.interfaces import TokenLayout
from tokgen.training import dry_run, generator_step, stages, tokenizer_step

MAKERS = (
    *((dry_run, "tokenizer"), (dry_run, "generator"), (generator_step, "step")),
    *((tokenizer_step, "plain_step"), (tokenizer_step, "adversarial_step")),
)
# What tells two steps of one config apart; structures and optimizers follow from these.
TELLING = (stages.Stage, TokenLayout, Mesh, int)


def share(patch: pytest.MonkeyPatch) -> None:
    """While the patch holds, each config is traced once."""
    for module, name in MAKERS:
        patch.setattr(module, name, once(getattr(module, name)))


def once(make):
    """A maker of (settings, ...) that is asked once for the same; an error is told every time."""
    made = {}

    def remembered(settings, *others, **options):
        telling = [each for each in others if isinstance(each, TELLING)]
        key = repr((building.plain(settings), telling, sorted(options.items())))
        if key not in made:
            made[key] = make(settings, *others, **options)
        return made[key]

    return remembered

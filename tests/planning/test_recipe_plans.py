"""The tables of meshes in the recipes' docstrings, against what `tokgen plan` proposes today."""

import pathlib
import re

import pytest

from tokgen.config import reading
from tokgen.planning import description, devices, plan, recipes

HEADING = "| variant | devices | mesh, strategy | a device holds | a step at least |"

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("configs/*/*.py"))
CHEAP = [f"configs/tokenizer/{name}.py" for name in ("shapes", "cifar10_f4", "ablation")]
CHEAP += ["configs/generator/shapes.py"]
# Whose codes a tokenizer learns
TEACHERS = {"configs/tokenizer/titok.py": "configs/tokenizer/maskgit_vqgan.py"}


def rows(path):
    """(variant, devices, what follows) of a recipe's table."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    at = lines.index(HEADING) + 2
    for line in lines[at:]:
        if not line.startswith("|"):
            return
        variant, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        yield variant, cells[0], " | ".join(cells)


@pytest.mark.parametrize("path", FILES)
def test_every_recipe_names_meshes(path):
    for variant, spec, told in rows(path):
        reading.load(f"{path}:{variant}" if variant else path)
        assert devices.read(spec).chip is not None
        assert re.search(r"\| \d+,\d+,\d+ (data|fsdp|tensor) \| [\d.]+ [MG]B \| \S.* ms$", told)


@pytest.mark.parametrize(
    "path", [pytest.param(f, marks=() if f in CHEAP else pytest.mark.long) for f in FILES]
)
def test_the_meshes_of_a_recipe_are_those_that_are_proposed(path):
    for variant, spec, told in rows(path):
        reference = f"{path}:{variant}" if variant else path
        chips = devices.read(spec)
        recipe = recipes.read(reference, tokenizer=TEACHERS.get(path, ""), platform=chips.platform)
        assert description.of_recipe(plan.proposed(recipe, chips), chips) == told

"""A choice by name, and what is said of one that is none."""

import pytest

from tokgen import choices
from tokgen.errors import UserError

TABLE = {"hinge": 1, "vanilla": 2}


def test_what_the_table_has_under_a_name():
    assert choices.named(TABLE, "vanilla", "loss") == 2


@pytest.mark.parametrize("name", ["hing", "", None, 3, ("hinge",), ["hinge"]])
def test_any_other_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(UserError, match="^loss must be one of hinge, vanilla; found ") as refused:
        choices.named(TABLE, name, "loss")
    assert ("did you mean 'hinge'?" in str(refused.value)) == ("hing" in str(name))

"""What is asked for of an edit."""

import math

import numpy as np
import pytest

from tests.app import made
from tokgen.app import changes
from tokgen.editing import edits
from tokgen.interfaces import TokenLayout, UserError


def ask(**own) -> changes.Ask:
    how = dict(way="variation", label=1, number=2, seed=0, preset="default", settings={})
    return changes.Ask(**how | own)


def test_each_way_is_one_argument_of_an_edit():
    offer, mask_HW = made.offer(), np.eye(32, dtype=bool)
    assert changes.checked(offer, ask(strength=0.5))["strength"] == 0.5
    assert changes.checked(offer, ask(way="region", mask_HW=mask_HW))["mask"] is mask_HW
    wide = changes.checked(offer, ask(way="canvas", sides=["left", "top"], share=0.5))
    assert wide["grow"] == "left=16,top=16" and wide["classes"] == 1
    pyramid = made.offer(ways=("scales",), layout=TokenLayout((16,), ((1, 1), (2, 2), (4, 4))))
    assert changes.checked(pyramid, ask(way="scales", scales=2))["scales"] == 2


def test_particles_are_asked_for_where_an_order_needs_them():
    offer = made.offer(particles=True)
    mask_HW = np.ones((32, 32), bool)
    assert changes.checked(offer, ask(way="region", mask_HW=mask_HW))["particles"] == 64
    assert "particles" not in changes.checked(offer, ask())
    with pytest.raises(UserError, match="particles must lie from 8 to 128"):
        changes.checked(offer, ask(way="region", mask_HW=mask_HW, particles=10**6))


WRONG = {
    "nothing painted": (dict(way="region", mask_HW=np.zeros((32, 32), bool)), "nothing painted"),
    "no mask": (dict(way="region"), "nothing painted"),
    "no sides": (dict(way="canvas", sides=[]), "choose a side"),
    "a side": (dict(way="canvas", sides=["up"]), "must be one of left, right"),
    "huge": (dict(way="canvas", sides=["left"], share=1e9), "share of a side must lie"),
    "nan": (dict(strength=math.nan), "share that is drawn anew must lie"),
    "number": (dict(number=3), "edits must be one of 1, 2, 4"),
    "class": (dict(label=99), "the class must lie"),
    "scales": (dict(way="scales"), "model cannot draw the finer scales anew"),
    "way": (dict(way="x"), "cannot draw that anew"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_edited_is_refused(name):
    own, said = WRONG[name]
    with pytest.raises(UserError, match=said):
        changes.checked(made.offer(), ask(**own))


def test_what_was_there_is_shown_first_in_its_own_size():
    image_HW3 = np.full((48, 32, 3), 200, np.uint8)
    mask_HW = np.zeros((48, 32), bool)
    mask_HW[:8] = True
    found = edits.Edits(image_HW3[None], None, np.zeros(1, int), image_HW3[None], mask_HW[None])
    (shown, name), (edit, _) = changes.named(found)
    assert name == "before" and shown.size == edit.size == (32, 48)
    assert (np.asarray(shown)[8:] == 200).all() and (np.asarray(shown)[:8] != 200).all()

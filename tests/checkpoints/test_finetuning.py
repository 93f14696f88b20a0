"""Which rows of a class table a run keeps that begins from an import of ImageNet's classes."""

import pytest

from tokgen.checkpoints import finetuning
from tokgen.data import imagenet

COUNTED = tuple(map(str, range(1000)))
ORDERED = list(range(1000))
CASES = {
    "numbers of folders": (COUNTED, None),
    "numbers from 1": (tuple(map(str, range(1, 1001))), None),
    "wnids": (imagenet.SYNSETS, None),
    "the same": (imagenet.NAMES, None),
    "a thousand others": (tuple(f"kind{n:03}" for n in range(1000)), None),
    "half in other words": (
        tuple(name if n % 2 else f"old {name}" for n, name in enumerate(imagenet.NAMES)),
        None,
    ),
    "another order": (imagenet.NAMES[::-1], (ORDERED[::-1], ORDERED)),
    "wnids in another order": (imagenet.SYNSETS[::-1], (ORDERED[::-1], ORDERED)),
    "a few wnids": (imagenet.SYNSETS[5:9], ([5, 6, 7, 8], [0, 1, 2, 3])),
    "a few as folders are called": (("Golden_Retriever", "cat"), ([207], [0])),
    "few others": (("x", "y"), ([], [])),
    "few numbers": (COUNTED[:100], ([], [])),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_that_finetuning_keeps(name):
    """Of names, what numbers kept: as many stay by number, unless a name says otherwise."""
    new, rows = CASES[name]
    assert finetuning._moved(list(imagenet.NAMES), list(new)) == rows
    if rows is None and name != "the same":
        assert finetuning._moved(list(COUNTED), list(new)) is None

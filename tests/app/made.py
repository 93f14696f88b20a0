"""What is offered of a model that there is not, for tests that need none."""

from tokgen.app import draws, offers
from tokgen.interfaces import TokenLayout

CLASSES = ("disc", "ring", "square")
SETTINGS = (
    offers.Setting("temperature", "temperature", 0.0, 2.0, 0.05),
    offers.Setting("top_k", "top-k", 0, 16, 1),
)
PRESETS = {
    "default": {"temperature": 0.7, "top_k": 0},
    "by step": {"temperature": None, "top_k": 4},
}


def offer(**own) -> offers.Offer:
    """A generator of 8 x 8 tokens."""
    how = dict(title="model", told="", draws=True, why="", classes=CLASSES, presets=PRESETS)
    how |= dict(settings=SETTINGS, ways=("region", "variation", "canvas"), particles=False)
    how |= dict(size=(32, 32), layout=TokenLayout((16,), ((8, 8),)))
    return offers.Offer(**how | own)


def ask(**own) -> draws.Ask:
    """Four pictures of the first class."""
    return draws.Ask(**dict(label=0, number=4, seed=0, preset="default", settings={}) | own)

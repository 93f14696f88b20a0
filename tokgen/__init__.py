"""Images as discrete tokens: what a user of the library calls.

    import tokgen

    model = tokgen.load("runs/generator")          # or a published model by its name
    samples = model.sample("ring", number=8, seed=0)
    samples.images[0].save("ring.png")             # PIL; a notebook shows `samples`
    tokens = model.encode(model.fit("photo.jpg"))  # of any image
    images = tokgen.to_pil(model.decode(tokens))
    nats = -model.log_likelihood(samples.images, classes="ring")

`load` gives an ImageGenerator or an ImageTokenizer; `models` lists what is published, and `pull`
fetches it. `sample`, `pretokenize`, `validate`, `make_reference`, `score`, `sweep`, `compare`,
`import_file` and `export_checkpoint` are the commands of `tokgen` without a command line. What
cannot be used is refused with a UserError. docs/library.md has it on a page.

Nothing heavy is imported before it is asked for: `import tokgen` is no more than a table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # X as X: it is passed on
    from tokgen.checkpoints.exporting import export_checkpoint as export_checkpoint
    from tokgen.checkpoints.importing import import_file as import_file
    from tokgen.checkpoints.loading import (
        Loaded as Loaded,
        load_generator as load_generator,
        load_tokenizer as load_tokenizer,
        load_tokenizer_of as load_tokenizer_of,
    )
    from tokgen.checkpoints.pulling import pull as pull
    from tokgen.errors import UserError as UserError
    from tokgen.evaluation.checkpoint_validation import (
        Settings as ValidationSettings,  # noqa: F401
        validate as validate,
    )
    from tokgen.evaluation.comparison import compare as compare
    from tokgen.evaluation.reference_making import (
        Settings as ReferenceSettings,  # noqa: F401
        make as make_reference,  # noqa: F401
    )
    from tokgen.evaluation.score import score as score
    from tokgen.evaluation.score_settings import Settings as ScoreSettings  # noqa: F401
    from tokgen.evaluation.sweep import (
        Settings as SweepSettings,  # noqa: F401
        sweep as sweep,
    )
    from tokgen.image_generator import ImageGenerator as ImageGenerator
    from tokgen.image_grid import grid as grid, save_png as save_png, to_pil as to_pil
    from tokgen.image_models import load as load
    from tokgen.image_tokenizer import ImageTokenizer as ImageTokenizer
    from tokgen.samples import Samples as Samples, sample as sample
    from tokgen.sampling.presets import Choice as SamplingChoice  # noqa: F401
    from tokgen.tokens import (
        decode as decode,
        encode as encode,
        pretokenize as pretokenize,
        reconstruct as reconstruct,
    )
    from tokgen.traces import Trace as Trace
    from tokgen.zoo.model import known as models  # noqa: F401

# Name -> (its module, what it is called there)
_HOMES = {
    "ImageGenerator": ("tokgen.image_generator", "ImageGenerator"),
    "ImageTokenizer": ("tokgen.image_tokenizer", "ImageTokenizer"),
    "Loaded": ("tokgen.checkpoints.loading", "Loaded"),
    "ReferenceSettings": ("tokgen.evaluation.reference_making", "Settings"),
    "Samples": ("tokgen.samples", "Samples"),
    "SamplingChoice": ("tokgen.sampling.presets", "Choice"),
    "ScoreSettings": ("tokgen.evaluation.score_settings", "Settings"),
    "SweepSettings": ("tokgen.evaluation.sweep", "Settings"),
    "Trace": ("tokgen.traces", "Trace"),
    "UserError": ("tokgen.errors", "UserError"),
    "ValidationSettings": ("tokgen.evaluation.checkpoint_validation", "Settings"),
    "compare": ("tokgen.evaluation.comparison", "compare"),
    "decode": ("tokgen.tokens", "decode"),
    "encode": ("tokgen.tokens", "encode"),
    "export_checkpoint": ("tokgen.checkpoints.exporting", "export_checkpoint"),
    "grid": ("tokgen.image_grid", "grid"),
    "import_file": ("tokgen.checkpoints.importing", "import_file"),
    "load": ("tokgen.image_models", "load"),
    "load_generator": ("tokgen.checkpoints.loading", "load_generator"),
    "load_tokenizer": ("tokgen.checkpoints.loading", "load_tokenizer"),
    "load_tokenizer_of": ("tokgen.checkpoints.loading", "load_tokenizer_of"),
    "make_reference": ("tokgen.evaluation.reference_making", "make"),
    "models": ("tokgen.zoo.model", "known"),
    "pretokenize": ("tokgen.tokens", "pretokenize"),
    "pull": ("tokgen.checkpoints.pulling", "pull"),
    "reconstruct": ("tokgen.tokens", "reconstruct"),
    "sample": ("tokgen.samples", "sample"),
    "save_png": ("tokgen.image_grid", "save_png"),
    "score": ("tokgen.evaluation.score", "score"),
    "sweep": ("tokgen.evaluation.sweep", "sweep"),
    "to_pil": ("tokgen.image_grid", "to_pil"),
    "validate": ("tokgen.evaluation.checkpoint_validation", "validate"),
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """What is asked for, imported now; it stays, so that the next time costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tokgen' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = getattr(importlib.import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*_HOMES, *(name for name in globals() if name.startswith("__"))})

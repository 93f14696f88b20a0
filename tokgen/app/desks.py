"""What the page works with: models and what is offered of them, one thing at a time."""

from __future__ import annotations

import dataclasses
import functools
import html
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gradio

from tokgen import report, runtime
from tokgen.app import draws, offers
from tokgen.errors import UserError

FILES = 64  # of each kind that the page writes itself, the latest


@dataclasses.dataclass(frozen=True)
class Desk:
    """Models that are loaded, by their place, and a folder for files that a browser asks for."""

    models: Sequence[offers.Model]
    offers: Sequence[offers.Offer]
    folder: pathlib.Path
    programs: draws.Programs = dataclasses.field(default_factory=draws.Programs)
    _count: Any = dataclasses.field(default_factory=itertools.count)

    def keep(self, data: bytes, ending: str) -> pathlib.Path:
        """A file of its own; the oldest of its kind goes where there are many."""
        path = self.folder / f"tokgen-{next(self._count):06}.{ending}"
        path.write_bytes(data)
        for old in sorted(self.folder.glob(f"*.{ending}"))[:-FILES]:
            old.unlink(missing_ok=True)
        return path


def told(handler: Callable) -> Callable:
    """A handler whose errors that a user can mend are messages on the page, and no others."""

    @functools.wraps(handler)
    def asked(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except UserError as error:
            raise _message(str(error)) from None
        except (MemoryError, RuntimeError) as error:
            if not runtime.is_exhausted(error):
                raise
            report.say("a request needed more memory than there is")
            raise _message("This needs more memory than there is: ask for fewer.") from None

    return asked


def _message(text: str) -> gradio.Error:
    text = text[:1].upper() + text[1:600]
    return gradio.Error(html.escape(text, quote=False), duration=12, print_exception=False)


def at_work(event: Callable, handler: Callable, inputs: list, outputs: list, **how: Any) -> Any:
    """An event that asks a model: all such wait in one line, since there is one device."""
    return event(
        told(handler),
        inputs,
        outputs,
        concurrency_limit=1,
        concurrency_id="device",
        api_visibility="private",
        **how,
    )


def at_once(event: Callable, handler: Callable, inputs: list, outputs: list, **how: Any) -> Any:
    """An event that asks no model, and waits for none."""
    how = dict(queue=False, show_progress="hidden", api_visibility="private") | how
    return event(told(handler), inputs, outputs, **how)

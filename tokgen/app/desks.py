"""What the page works with: models and what is offered of them, one thing at a time."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio

from tokgen import report, runtime
from tokgen.app import draws, files, offers
from tokgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Desk:
    """Models that are loaded, by their place, and files that a browser asks for."""

    models: Sequence[offers.Model]
    offers: Sequence[offers.Offer]
    files: files.Files
    programs: draws.Programs = dataclasses.field(default_factory=draws.Programs)

    def at_work(
        self, event: Callable, handler: Callable, inputs: list, outputs: list, **how: Any
    ) -> Any:
        """An event that asks a model: all such wait in one line, since there is one device."""

        @functools.wraps(handler)
        def with_room(*arguments: Any) -> Any:
            self.files.make_room()
            return handler(*arguments)

        return event(
            told(with_room),
            inputs,
            outputs,
            concurrency_limit=1,
            concurrency_id="device",
            api_visibility="private",
            **how,
        )


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


def at_once(event: Callable, handler: Callable, inputs: list, outputs: list, **how: Any) -> Any:
    """An event that asks no model, and waits for none."""
    how = dict(queue=False, show_progress="hidden", api_visibility="private") | how
    return event(told(handler), inputs, outputs, **how)

"""Files that the page itself writes for a browser: few, and none for long."""

from __future__ import annotations

import itertools
import pathlib
import time

from tokgen.app import bounds, gate
from tokgen.errors import UserError


class Files:
    """Files in a folder of the page's.

    Args:
        folder: where they lie; beside it lies what was uploaded.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._count = folder, itertools.count()

    def keep(self, data: bytes, ending: str) -> pathlib.Path:
        """A file of its own; the oldest of its kind goes where there are many."""
        path = self._folder / f"tokgen-{next(self._count):06}.{ending}"
        path.write_bytes(data)
        for old in sorted(self._folder.glob(f"*.{ending}"))[: -bounds.FILES]:
            old.unlink(missing_ok=True)
        return path

    def make_room(self) -> None:
        """Delete what is old; UserError where even so there is no room for what work makes."""
        oldest = time.time() - bounds.KEPT
        for file in self._folder.iterdir():
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)
        if gate.size(self._folder.parent) > bounds.DISK:
            raise UserError(gate.FULL)

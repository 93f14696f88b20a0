"""The images of a source that could not be read: counted, told by name, once each.

A source has one such record (`source.unreadable`): whoever reads the source adds to it, and each
image is told once, however often it is met. What becomes of such an image is the reader's: training
puts another one into its place, measuring leaves it out.
"""

import itertools
import json
from collections.abc import Iterable, Mapping

from tokgen import distributed, interfaces, report

ENOUGH = 10_000  # images over which an allowed share is taken at least
NAMED = 10  # images that a message names
_RECORDED = 20  # images that a record names
REPLACED, LEFT_OUT = "others stand in", "left out"


class Record:
    """The distinct images of a source that could not be read: their indices, each with a reason.

    `looked` is the number of distinct images that were looked at; `unavailable` of those that were
    not even bytes.
    """

    def __init__(self, source):
        self._source = source
        self._reasons: dict[int, str] = {}
        self._heard = 0  # how many there were when they were told last
        self.told: set[str] = set()  # names of those that were told; shared by sources of one set
        self.looked = self.unavailable = 0

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, index: int) -> bool:
        return int(index) in self._reasons

    def add(self, index: int, reason: str) -> None:
        """Note an image; the first reason stands."""
        self._reasons.setdefault(int(index), reason)

    def gather(self) -> None:
        """Note what any process of a job could not read, in their order; all wait for all."""
        own = json.dumps(self.listing())
        for text in distributed.gathered("images that could not be read", own):
            for index, reason in json.loads(text):
                self.add(index, reason)

    def names(self) -> tuple[str, ...]:
        """Of all of them, in the order in which they were met."""
        return tuple(name_of(self._source, index) for index in self._reasons)

    def files(self) -> dict[str, str]:
        """{name: reason} of all of them."""
        return dict(zip(self.names(), self._reasons.values(), strict=True))

    def listing(self) -> list[tuple[int, str]]:
        """Index and reason of all of them."""
        return list(self._reasons.items())

    def record(self) -> dict:
        """How many, of how many, and the first of them by name, as plain JSON."""
        first = dict(itertools.islice(self.files().items(), _RECORDED))
        return {"count": len(self), "of": len(self._source), "files": first}

    def listed(self) -> str:
        """A line each; no more than NAMED."""
        return self._lines(self.files())

    def _lines(self, files: Mapping[str, str]) -> str:
        lines = [f"  {name}: {why}" for name, why in itertools.islice(files.items(), NAMED)]
        if len(files) > NAMED:
            place = self._source.path or "DIR"
            more = len(files) - NAMED
            lines.append(f"  and {more} more (tokgen data {place} --scan full names all)")
        return "\n".join(lines)

    def tell(self, fate: str, *, last: bool = True) -> None:
        """Say those that were not told yet, and what becomes of them.

        Before the `last` time only the first few are told as they come, later ones when their
        number has doubled: a folder full of text files shall not be a wall of text.
        """
        if len(self) == self._heard or (
            not last and self._heard >= NAMED and len(self) < 2 * self._heard
        ):
            return
        before, self._heard = self._heard, len(self)
        new = {name: why for name, why in self.files().items() if name not in self.told}
        self.told.update(new)
        if new:
            report.say(
                f"{len(self)} of {len(self._source)} images cannot be read ({fate}"
                f"{f'; {len(new)} of them new' if before else ''}):\n{self._lines(new)}"
            )

    def among(self, indices: Iterable[int]) -> dict[int, tuple[str, str]]:
        """{index: (name, reason)} of those of some indices, all of which could not be read."""
        return {int(i): (name_of(self._source, i), self._reasons[int(i)]) for i in indices}

    def check(self, max_bad: float, option: str = "--config.max_bad") -> None:
        """An error where more images than the share `max_bad` of those looked at are unreadable."""
        # a rate of 0.0003 times 10,000 is 2.9999999999999996
        allowed = int(max_bad * max(self.looked, ENOUGH) + 1e-6)
        if len(self) > allowed:
            raise interfaces.UserError(
                f"{len(self)} of {max(self.looked, len(self))} images cannot be read, and "
                f"{max_bad:g} of them, or {allowed}, may be; repair or remove them (a run that was "
                f"begun goes on with --accept-data), or allow more by {option}=SHARE:\n"
                f"{self.listed()}"
            )


def name_of(source, index: int) -> str:
    """What messages call an image: its name, which any line of text can hold."""
    name = str(source.name(index))
    # file names may hold whatever bytes
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def share(*sources) -> None:
    """Let sources of one set, read for several ends, tell each image once."""
    told = sources[0].unreadable.told
    for source in sources[1:]:
        source.unreadable.told = told

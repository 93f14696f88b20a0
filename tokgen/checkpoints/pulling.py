"""Published models by name: fetched, imported into this user's cache, and found there.

`pull` fetches the file of a row of the zoo, and that of its tokenizer, says before what that takes
and under which licence, and imports both as `tokgen import` does. What lies in the cache is a whole
checkpoint: a process that is killed leaves none, and the same call goes on with what it fetched.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

from tokgen import report, runtime
from tokgen.checkpoints import checkpoint
from tokgen.data import imagenet
from tokgen.errors import UserError
from tokgen.output import failures, locks
from tokgen.pretrained import hub
from tokgen.zoo import model as zoo

CLASSES = {"imagenet": imagenet.NAMES}
BYTES = 4  # of a number in a checkpoint


def folder(name: str) -> pathlib.Path:
    """Where the checkpoint of a published model lies, or will lie."""
    zoo.named(name)
    return checkpoint.pulled(name)


def pull(name: str, *, yes: bool = False, file: str | os.PathLike = "") -> pathlib.Path:
    """Bring a published model and its tokenizer into the cache; the folder of its checkpoint.

    Nothing is asked, and no request made, for what is there already.

    Args:
        name: of the zoo, as `tokgen models` lists them.
        yes: fetch without a question; a terminal is asked else.
        file: the published file, where the user has it: it is imported, and not fetched.

    Raises:
        UserError: nobody agrees, the hub does not give the file, it is not what the hub says it
            is, it does not fit, or there is no room.

    Examples:
        >>> tokgen.pull("rar-b", yes=True).name
        'rar-b'
        >>> tokgen.load("rar-b").classes[207]
        'golden retriever'
    """
    model, place, needed = zoo.named(name), folder(name), missing(name)
    if not needed:
        return place
    wanted = [one for one in needed if one != name or not file]
    if model.tokenizer and model.tokenizer not in needed:
        checkpoint.read_meta(checkpoint.find(folder(model.tokenizer)))  # a damaged one is told now
    _check_homes(name, wanted)
    if file and not os.path.exists(file):
        raise UserError(
            f"no file {file}: --file names the published {model.file}, where you have it"
        )
    _check_room(needed, wanted)
    _tell(name, needed, wanted)
    if wanted:
        _check_agreed(name, sum(zoo.named(one).size for one in wanted), yes)
    _make(place.parent)
    if len(wanted) > 1:  # before the first of them takes its time
        for one in wanted:
            hub.check(*_asked(one), without=_elsewhere(one))
    for one in needed:
        _bring(one, file if one == name else "")
    return place


def missing(name: str) -> list[str]:
    """The names of what must be brought before a model can be used: its tokenizer, itself."""
    both = (zoo.named(name).tokenizer, name)
    return [one for one in both if one and not folder(one).exists()]


def check_kind(name: str, kind: str) -> None:
    """An error where a CKPT names a published model of the other kind; a path is not looked at."""
    if zoo.is_name(name) and zoo.named(name).kind != kind:
        raise UserError(
            f"{name} is a {zoo.named(name).kind}; need a {kind}: tokgen models has both"
        )


def remove(name: str) -> str:
    """Remove a published model from the cache, and what was fetched of it; what is to be said."""
    place = folder(name)
    with _held(name):
        size, fetched = taken(place), _fetched(name)
        begun = taken(fetched)
        part = place.with_name(f".{name}.removed")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        if place.exists():
            place.replace(part)  # at one blow: a half is never found
        for one in (part, fetched):
            shutil.rmtree(one, ignore_errors=True)
    if begun and not size:
        return f"{name} is not here; {report.amount(begun)} that had come of it are removed"
    if not size:
        return f"{name} is not here"
    tokenizer = zoo.named(name).tokenizer
    if tokenizer and folder(tokenizer).exists():
        stays = f"; its tokenizer {tokenizer} stays ({report.amount(taken(folder(tokenizer)))})"
        return f"{name} is removed; it took {report.amount(size)}{stays}"
    users = [one for one, model in zoo.known().items() if model.tokenizer == name]
    users = [one for one in users if folder(one).exists()]
    again = f"; {', '.join(users)} will fetch it again" if users else ""
    return f"{name} is removed; it took {report.amount(size)}{again}"


def taken(place: pathlib.Path) -> int:
    """Bytes that a folder takes; 0 where there is none."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _asked(name: str) -> tuple[str, str, pathlib.Path]:
    """What the hub is asked for: repository and file; and where it goes."""
    model = zoo.named(name)
    return model.repository, model.file, _fetched(name)


def _elsewhere(name: str) -> str:
    """What helps where the hub does not."""
    return f"fetch it elsewhere, and then: tokgen pull {name} --file PATH"


def _fetched(name: str) -> pathlib.Path:
    """Where the published file lies until it is imported."""
    return folder(name).with_name(f".{name}.fetched")


def _make(models: pathlib.Path) -> None:
    """The folder of all models."""
    with failures.reserved(models, option=""):
        models.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _held(name: str) -> Iterator[None]:
    """One process at a time brings or removes a model; others wait for it."""
    place = folder(name)
    _make(place.parent)
    with failures.told(place.parent, option=""):
        lock = place.with_name(f".{name}.pull")
        with locks.waiting(lock, f"{name} is being pulled by {{}}; waiting for it"):
            yield


def _bring(name: str, file: str | os.PathLike) -> None:
    """Fetch a file, import it, and remove it: an export gives it back."""
    model, place = zoo.named(name), folder(name)
    with _held(name):
        if place.exists():  # by another process, meanwhile
            return
        fetched = _fetched(name)
        found = file or _found(name)
        report.say(f"{name}: importing {pathlib.Path(found).name}")
        try:
            _import(name, found)
        except UserError as error:
            # the disk has its part in errors of the system
            if not (file or isinstance(error.__cause__, OSError)):
                shutil.rmtree(fetched, ignore_errors=True)
            raise UserError(f"{model.file} cannot be imported as {name}: {error}") from error
        shutil.rmtree(fetched, ignore_errors=True)
    report.say(f"{name} is here: {place} ({report.amount(taken(place))})")


def _found(name: str) -> pathlib.Path:
    """The file of a model, fetched."""
    try:
        about = zoo.named(name).size
        return hub.fetch(*_asked(name), about=about, without=_elsewhere(name))
    except (KeyboardInterrupt, runtime.Stopped):
        report.say(f"{name}: the same command goes on with what came")
        raise


def _import(name: str, file: str | os.PathLike) -> None:
    """A published file into a checkpoint, read as one of the systems that its row names."""
    from tokgen.checkpoints import importing  # what writes, and Orbax with it: seldom needed

    model = zoo.named(name)
    systems = [one for one in (model.system, model.otherwise) if one]
    for system in systems:
        try:
            importing.import_file(
                file,
                folder(name),
                system,
                unknown=model.unknown,
                tokenizer=folder(model.tokenizer) if model.tokenizer else "",
                classes=CLASSES.get(model.classes, ()),
                row=model,
            )
            return
        except UserError as error:
            if isinstance(error.__cause__, OSError) or system == systems[-1]:
                raise


def _check_homes(name: str, wanted: Sequence[str]) -> None:
    """An error where a file that is wanted does not lie on the hub."""
    for one in wanted:
        model = zoo.named(one)
        if not model.repository:
            first = "" if one == name else f"{name} needs its tokenizer {one} first; "
            tokenizer = f" --tokenizer {model.tokenizer}" if model.tokenizer else ""
            raise UserError(
                f"{first}{one} is not on the Hugging Face hub: fetch {model.file} "
                f"({report.amount(model.size)}, licence {model.licence}) from {model.address} and "
                f"then: tokgen pull {one} --file FILE (into the cache), or: tokgen import FILE "
                f"--system {model.system}{tokenizer} --out DIR"
            )


def _staying(name: str) -> int:
    """About the bytes of a checkpoint: all that the file has, averages too, or float32 of it."""
    model = zoo.named(name)
    return max(BYTES * model.parameters, model.size)


def _check_room(needed: Sequence[str], wanted: Sequence[str]) -> None:
    """An error where the disk cannot hold the files and the checkpoints."""
    place = runtime.cache_folder()
    # a file goes when its checkpoint is there, so that the largest comes on top
    files = [zoo.named(one).size - taken(_fetched(one)) for one in wanted]
    size = sum(map(_staying, needed)) + max(files, default=0)
    there = next(one for one in (place, *place.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"{' and '.join(needed)} take {report.amount(size)}; found {report.amount(free)} free "
            f"in {place}: make room, or name another folder with TOKGEN_CACHE"
        )


def _tell(name: str, needed: Sequence[str], wanted: Sequence[str]) -> None:
    """What is about to be done, under which licence."""
    for one in needed:
        model = zoo.named(one)
        figures = f"{model.parameters:,} parameters"
        if model.fid is not None:
            figures += f", {'rFID' if model.kind == 'tokenizer' else 'FID'} {model.fid:.2f}"
        whose = "" if one == name else f" of {name}"
        report.say(
            f"{one}: {model.kind}{whose}, {figures} ({model.paper}); licence {model.licence}"
        )
        if one in wanted:
            report.say(
                f"  {model.file}, {report.amount(model.size)}, from {model.repository} at "
                f"{hub.host()}"
            )
            if twin := _twin(one):
                report.say(
                    f"  {twin} is of the same file: tokgen export {twin} --out DIR writes it, and "
                    f"tokgen pull {one} --file takes it"
                )
    size = sum(map(_staying, needed))
    report.say(
        f"  to {checkpoint.pulled(name).parent}, where about {report.amount(size)} stay; the files "
        "are not kept: tokgen export gives them back"
    )


def _twin(name: str) -> str:
    """A model that is here, and whose published file is the same one; "" where there is none."""
    places = {one: (model.home, model.file) for one, model in zoo.known().items()}
    same = [one for one, place in places.items() if place == places[name] and one != name]
    return next((one for one in same if folder(one).exists()), "")


def _check_agreed(name: str, size: int, yes: bool) -> None:
    """An error unless the user agrees to what was said."""
    if yes:
        return
    amount = report.amount(size)
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(
            f"{name} is not here, and to fetch {amount} needs your word: add --yes to the command "
            "(yes=True in Python), or run it at a terminal, which is asked"
        )
    print(f"fetch {amount}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(f"{name} was not fetched, as you said")

"""Files of the Hugging Face hub: a published file by name, whole and verified; folders by hf://.

A published file is public. It is asked for without a token, and nothing is sent but the requests
for it. `huggingface_hub` knows the hub (HF_ENDPOINT, HF_HUB_OFFLINE, proxies, time-outs) and what
it says of a file; the bytes are read here, since its own downloads begin anew in every process,
and what takes an hour must survive a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import tokgen
from tokgen import archives, report
from tokgen.errors import UserError
from tokgen.output import failures

if TYPE_CHECKING:
    import huggingface_hub

TRIES, PAUSE = 5, 1.0  # attempts in a row that bring nothing; seconds after the first, then doubled
PART = ".part"  # what the name of a file ends in that is not whole yet
CHUNK, UNIT = 2**20, 10**6  # bytes that are hashed at a time; bytes that progress counts
SHOWN = 10 * UNIT  # smaller files are there before a bar is
NEAR = 0.9, 1.1  # of the size that was told: what is no news
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # the hub's: git's SHA-1 of small files, or SHA-256
ELSEWHERE = "fetch it elsewhere"  # what goes without the hub
PUBLIC = "huggingface.co"

WHO = dict(library_name="tokgen", library_version=tokgen.__version__)

T = TypeVar("T")


def check(repository: str, file: str, folder: pathlib.Path, *, without: str = ELSEWHERE) -> None:
    """An error where `fetch` would not get the file, and it is not here: one request, of its size.

    `without` is what helps where the hub does not.
    """
    _check_environment()
    if not _folders(folder) and _cached_blob(repository, file) is None:
        with _told(repository, file, without):
            _described(repository, file)


def fetch(
    repository: str,
    file: str,
    folder: pathlib.Path,
    *,
    about: int = 0,
    without: str = ELSEWHERE,
) -> pathlib.Path:
    """A file of the repository OWNER/NAME, verified against the hub's own hash; where it lies.

    It is written to `folder`/HASH, and what a process that ended left there is gone on with. No
    request is made for one that is whole there, or in the hub's cache of this user. A size far from
    `about`, which the user was told, is said. `without` is what helps where the hub does not.

    Raises:
        UserError: it cannot be had, or is not what the hub says it is; in words for the user.
    """
    _check_environment()
    found = _whole(folder, file) or _cached(repository, file)
    if found is not None:
        return found
    with _told(repository, file, without), _without_empty(folder):
        said, revised = _described(repository, file)
        if about and not NEAR[0] * about < said.size < NEAR[1] * about:
            size = report.amount(said.size)
            report.say(f"{file} is {size} large, and not {report.amount(about)}")
        place = folder / said.etag
        for other in _folders(folder):
            if other != place:  # of another revision of the file
                shutil.rmtree(other)
        place.mkdir(parents=True, exist_ok=True)
        part = place / (pathlib.PurePosixPath(file).name + PART)
        with failures.told(part, option=""):
            _read(revised, part, said.size)
        if not _matches(part, said.etag):
            shutil.rmtree(place)
            raise UserError(
                f"{file} of {repository} is not what {host()} says it is: {said.size:,} bytes "
                f"came, and their hash is not {said.etag[:16]}...; they were removed. Run the same "
                "command again; if it happens again, look at the proxy or mirror (HF_ENDPOINT) in "
                "between"
            )
    return part.replace(part.with_suffix(""))


@contextlib.contextmanager
def _without_empty(folder: pathlib.Path) -> Iterator[None]:
    """A folder without files and folders that hold nothing, where the block ends in an error."""
    try:
        yield
    except BaseException:
        for one in (*sorted(folder.rglob("*"), reverse=True), folder):
            with contextlib.suppress(OSError):
                if one.is_dir():
                    one.rmdir()
                elif not one.stat().st_size:
                    one.unlink()
        raise


def folder(reference: str) -> pathlib.Path:
    """A folder of a hub repository, `hf://OWNER/NAME[/FOLDER]`, in the hub's own cache.

    It may be a private one: the token of this user is sent, if there is one.
    """
    _check_environment()
    import huggingface_hub

    owner, name, *inside = [*reference.removeprefix("hf://").split("/"), ""]
    within = "/".join(inside).strip("/")
    if not owner or not name:
        raise UserError(f"a hub reference is hf://OWNER/NAME[/FOLDER]; found {reference}")
    repository = f"{owner}/{name}"
    with _told(repository, within or "files", "copy the folder from elsewhere"):
        root = huggingface_hub.snapshot_download(
            repository, allow_patterns=[f"{within}/**"] if within else None
        )
    return pathlib.Path(root) / within


def _check_environment() -> None:
    """An error for what the environment says of the hub and huggingface_hub cannot take."""
    try:
        from huggingface_hub import constants
    except ValueError as error:  # it reads its numbers when it is imported
        raise UserError(
            f"a variable of the environment that begins with HF_ cannot be read ({error}): mend it"
        ) from error
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise UserError(
            f"HF_ENDPOINT must begin with https:// or http://; found {constants.ENDPOINT!r}"
        )


def _folders(place: pathlib.Path) -> list[pathlib.Path]:
    """One for each hash that a file was begun under."""
    if not place.is_dir():
        return []
    return [one for one in sorted(place.iterdir()) if HASH.fullmatch(one.name)]


def _whole(place: pathlib.Path, file: str) -> pathlib.Path | None:
    """What an earlier process fetched and did not come to use."""
    for one in _folders(place):
        found = one / pathlib.PurePosixPath(file).name
        if found.is_file():
            if _matches(found, one.name):
                return found
            found.unlink()
    return None


def _cached(repository: str, file: str) -> pathlib.Path | None:
    """The file in the hub's own cache, if it is whole there."""
    found = _cached_blob(repository, file)
    if found is None:
        return None
    blob = pathlib.Path(os.path.realpath(found))
    if not _matches(blob, blob.name):
        report.say(f"{found} does not match its hash: it is left where it is, and fetched anew")
        return None
    report.say(f"{file} is taken from the hub's cache, {found}")
    return pathlib.Path(found)


def _cached_blob(repository: str, file: str) -> str | None:
    """Where the hub's own cache has a file under its hash, which is the name of a blob."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, file)
    named = isinstance(found, str) and HASH.fullmatch(os.path.basename(os.path.realpath(found)))
    return found if named else None


def _matches(file: pathlib.Path, digest: str) -> bool:
    """Whether a file has the hash that the hub gives: SHA-256, or of small ones git's SHA-1."""
    if len(digest) == 64:
        return archives.sha256(file) == digest
    found = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            found.update(chunk)
    return found.hexdigest() == digest


def _described(repository: str, file: str) -> tuple[huggingface_hub.HfFileMetadata, str]:
    """(what the hub says of a file, the address of the revision that this is true of)."""
    import huggingface_hub
    from huggingface_hub import constants

    address = huggingface_hub.hf_hub_url(repository, file)
    with _private():
        said = _again(
            lambda: huggingface_hub.get_hf_file_metadata(
                address, timeout=constants.HF_HUB_ETAG_TIMEOUT, token=False, **WHO
            )
        )
    if not (said.commit_hash and said.size and HASH.fullmatch(said.etag or "")):
        raise UserError(
            f"{host()} does not answer as the Hugging Face hub does: it gives no size, revision "
            f"and hash of {file}; see to HF_ENDPOINT, or to a proxy or login page in between"
        )
    return said, huggingface_hub.hf_hub_url(repository, file, revision=said.commit_hash)


def _read(address: str, part: pathlib.Path, size: int) -> None:
    """Go on with a file where it ends, until it has `size` bytes; again and again if cut."""
    done = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    if size - done > free:
        raise UserError(
            f"{part.stem} takes {report.amount(size - done)} more; found {report.amount(free)} "
            f"free in {part.parent}: make room, or name another folder with TOKGEN_CACHE"
        )
    bar = report.bar(
        math.ceil(size / UNIT),
        initial=done // UNIT,
        unit="megabyte",
        what=part.stem,
        shown=size >= SHOWN,
    )
    with bar, open(part, "ab") as opened:
        if done:
            report.say(f"{part.stem}: {report.amount(done)} are here already; going on")

        def attempt() -> None:
            _append(address, opened, size, bar)

        _again(attempt, lambda: opened.tell())


def _append(address: str, opened: BinaryIO, size: int, bar: report.Lines) -> None:
    """One request for the rest of a file."""
    import huggingface_hub
    from huggingface_hub import constants, utils

    with _private():
        headers = utils.build_hf_headers(token=False, **WHO)
    done = opened.seek(0, os.SEEK_END)
    if done > size:  # of no file that the hub described
        done = opened.truncate(0)
    if done == size:
        return
    headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    session = huggingface_hub.get_session()
    wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
    asked = dict(headers=headers, timeout=wait, follow_redirects=True)
    with session.stream("GET", address, **asked) as response:
        utils.hf_raise_for_status(response)
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if done and not (response.status_code == 206 and begins):
            bar.update(-(done // UNIT))
            done = opened.truncate(0)  # it begins anew, whatever was asked for
        for chunk in response.iter_bytes():
            opened.write(chunk)
            bar.update((done + len(chunk)) // UNIT - done // UNIT)
            done += len(chunk)
            if done > size:
                break
    opened.flush()
    if done > size:
        opened.truncate(0)
        raise UserError(
            f"{host()} sends more than the {size:,} bytes that it gives as the size of "
            f"{pathlib.Path(opened.name).stem}; what came was removed. Look at the proxy or mirror "
            "(HF_ENDPOINT) in between"
        )
    if done < size:
        raise ConnectionResetError("the connection was closed in the middle")


def _again(attempt: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
    """What an attempt gives; those that a network or a server spoils are made anew.

    `done` counts what they brought: as long as it grows, there is no end to them.
    """
    from huggingface_hub import errors

    tries, before = 0, done()
    while True:
        try:
            return attempt()
        except (errors.HTTPError, ConnectionResetError) as error:
            now = done()
            tries, before = (1, now) if now > before else (tries + 1, now)
            if tries >= TRIES or not _passing(error):
                raise
            wait = PAUSE * 2 ** (tries - 1)
            report.say(f"{host()}: {_words(error)}; trying again in {wait:.3g} s")
            time.sleep(wait)


def _passing(error: Exception) -> bool:
    """Whether what went wrong may be right a second later."""
    status = _status(error)
    if status:
        return status == 408 or status >= 500
    return not _is_misled(error)


def _is_misled(error: BaseException) -> bool:
    """Whether an answer leads where nothing can be read. The classes are those of the library that
    asks, which is not the same one in all versions of huggingface_hub: they are told by name.
    """
    return type(error).__name__ in ("UnsupportedProtocol", "TooManyRedirects")


def _status(error: BaseException) -> int:
    """The status of an answer that is an error; 0 where there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _words(error: BaseException) -> str:
    """What went wrong, in a few words: those of the system where it was the first to say so."""
    if status := _status(error):
        return f"status {status}"
    while error.__cause__ is not None:
        error = error.__cause__
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())[:200] or type(error).__name__


@contextlib.contextmanager
def _told(repository: str, file: str, without: str) -> Iterator[None]:
    """What keeps a file away is one message, with what helps."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) in failures.ENVIRONMENT:
            raise
        raise UserError(_refused(repository, file, error, without)) from error


def _refused(repository: str, file: str, error: BaseException, without: str) -> str:
    """Why a file cannot be had, and what to do about it; `without` the hub, as a last resort."""
    from huggingface_hub import errors

    cause = error
    while cause is not None:  # an answer, or none, may be the reason of another error
        if _status(cause) or isinstance(cause, errors.OfflineModeIsEnabled):
            error = cause
        cause = cause.__cause__
    asked, status = host(), _status(error)
    what = f"{file} of {repository}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what} is not here, and HF_HUB_OFFLINE is set: unset it, or {without}"
    if status == 404:
        other = "" if asked == PUBLIC else f"; HF_ENDPOINT names this hub in the place of {PUBLIC}"
        return f"{asked} has no {what} (status 404): it was moved or removed{other}"
    if status in (401, 403):
        return (
            f"{asked} does not give {what} (status {status}): it may be gone, or asks for an "
            f"account. Get it with a browser, and {without}"
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdigit() else "later"
        return f"{asked} takes no more requests for now (status 429): try again {when}"
    if status >= 500:
        return f"{asked} is out of order (status {status}): try again later; {what} goes on then"
    if status:
        return f"{asked} does not give {what} (status {status})"
    if _is_misled(error):
        return (
            f"{asked} leads from {what} to an address that cannot be read ({_words(error)}): look "
            "at the proxy or mirror (HF_ENDPOINT) in between"
        )
    return (
        f"{what} cannot be fetched from {asked} ({_words(error)}): see to the network "
        f"(HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror) and run the same command again, which "
        f"goes on, or {without}"
    )


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """huggingface_hub without what it tells of this machine, and asks for, besides the file."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def host() -> str:
    """The hub that is asked, without its https:// and without a password."""
    from huggingface_hub import constants

    place = constants.ENDPOINT.partition("://")[2] or constants.ENDPOINT
    return place.rpartition("@")[2]

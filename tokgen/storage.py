"""Where a path leads: to files of this host, or to objects of a bucket, `gs://BUCKET/FOLDER`.

A local path is a `pathlib.Path`, and nothing stands between. One in a bucket is an
`etils.epath.Path`, which has the same methods. What no object store has is asked of neither: an
object cannot be renamed, appended to or locked. It appears whole or not at all, so that what is
written last says of a folder that the rest is there. No package of Google Cloud is imported before
a path leads there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from tokgen.errors import UserError

if TYPE_CHECKING:
    import gcsfs

SCHEME = "gs://"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_JOINED = re.compile(r"gs:/(?=[^/])")  # what pathlib makes of a path in a bucket
# what tensorstore says of the way to a store; of what lies there it says other words
_STATUS = re.compile(
    r"\b(?:ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED"
    r"|UNAUTHENTICATED|UNAVAILABLE): |\bCURL error|http_response_code='(?:401|403|408|429|5..)'"
)
_FORBIDDEN = re.compile(r"\bForbidden\b|\bPERMISSION_DENIED\b|\A403 |, 403\Z")
_PERMISSION = re.compile(r"\bstorage\.(?:buckets|folders|objects)\.[a-zA-Z]+\b")


class NotReached(UserError):
    """A bucket, or the way there, refuses: that says nothing of what lies in it."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path leads into a bucket."""
    return os.fspath(path).startswith((SCHEME, "gs:/"))


def path(path: str | os.PathLike, option: str = "") -> pathlib.Path:
    """The path that a user wrote, with the methods of `pathlib.Path` wherever it leads.

    Args:
        path: a local path, or `gs://BUCKET/FOLDER`.
        option: what names it in messages, as "--workdir".

    Raises:
        UserError: a path of another scheme, or one that names no folder of a bucket.
        ModuleNotFoundError: the packages of the extra `gcs` are missing.
    """
    text, named = os.fspath(path), f"{option} {path}".lstrip()
    if not is_remote(text):
        if scheme := _URL.match(text):
            raise UserError(
                f"{named}: need a local path or gs://BUCKET/FOLDER; found one of {scheme[0]}, "
                "which is not read: mount it, or copy it to a place that is"
            )
        return path if isinstance(path, pathlib.Path) else pathlib.Path(path)
    bucket, _, name = _JOINED.sub(SCHEME, text).removeprefix(SCHEME).partition("/")
    if not bucket or not name.strip("/"):
        raise UserError(f"{named}: need gs://BUCKET/FOLDER; found no folder: name one")
    _prepare()
    from etils import epath

    return epath.Path(f"{SCHEME}{bucket}/{os.path.normpath(name)}")


def local(path: str | os.PathLike, what: str) -> None:
    """An error where a path does not lead to files of this host; `what` needs one that does."""
    text = os.fspath(path)
    if is_remote(text) or _URL.match(text):
        raise UserError(
            f"{what} must be local files; found {text}: copy them (of a bucket with gcloud storage "
            "cp -r, or mount it), and name the local path"
        )


def _prepare() -> None:
    """Whatever is read of a bucket is read by gcsfs, and is what is there now."""
    import fsspec
    import gcsfs

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # `reached` tells it in one message
    os.environ.setdefault("EPATH_USE_TF", "false")  # also where TensorFlow is installed
    for protocol in gcsfs.GCSFileSystem.protocol:
        # other processes write there, too
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def files(path: pathlib.Path) -> gcsfs.GCSFileSystem:
    """What reads and writes the bucket that a path lies in: the one that etils asks, too."""
    return path._backend.fs(path)


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """The size of every file below a folder, by its path from there."""
    if not is_remote(folder):
        found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return {str(file.relative_to(folder)): file.stat().st_size for file in found}
    root = f"{folder}/".removeprefix(SCHEME)
    found = files(folder).find(root, detail=True)
    # a folder that was made by hand is an object, too, whose name ends in a slash
    there = {n: told["size"] for n, told in found.items() if not n.endswith("/")}
    return {name.removeprefix(root): there[name] for name in sorted(there)}


def changed(folder: pathlib.Path) -> float:
    """When a folder of a bucket was last written to, in seconds since 1970; 0: nothing is there."""
    found = files(folder).find(f"{folder}/", detail=True)
    return max((told["mtime"].timestamp() for told in found.values()), default=0.0)


def is_dir(path: pathlib.Path) -> bool:
    """Whether a path leads to a folder. `is_dir` of a path in a bucket says no, too, where nobody
    answers."""
    if not is_remote(path):
        return path.is_dir()
    try:
        return files(path).info(str(path))["type"] == "directory"
    except FileNotFoundError:
        return False


def names(folder: pathlib.Path) -> list[str]:
    """Of files and folders in a folder; nothing where there is none."""
    if not is_remote(folder):
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    try:
        found = files(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    # a folder that was made by hand is an object of its own name
    own = str(folder).removeprefix(SCHEME)
    inside = (name.rstrip("/") for name in found)
    return sorted({name.rpartition("/")[2] for name in inside if name != own})


def opened(file: str | os.PathLike) -> BinaryIO:
    """A file, to be read and closed."""
    return files(path(file)).open(str(file), "rb") if is_remote(file) else open(file, "rb")


def size(file: str | os.PathLike) -> int:
    """Of a file, in bytes."""
    return files(path(file)).size(str(file)) if is_remote(file) else os.stat(file).st_size


def save(file: pathlib.Path, content: bytes) -> None:
    """Write an object of a bucket: it is there when this returns, whole."""
    files(file).pipe_file(str(file), content)


def upload(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a local file into a bucket, where it appears whole."""
    files(target).put_file(str(source), str(target))


def download(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy an object of a bucket into a local file."""
    files(source).get_file(str(source), str(target))


def unmark(folder: pathlib.Path, marks: Sequence[str]) -> None:
    """Remove the files by which a folder of a bucket says that it is whole, one after the other."""
    for mark in marks:
        (folder / mark).unlink(missing_ok=True)


def move(folder: pathlib.Path, target: pathlib.Path, marks: Sequence[str]) -> None:
    """A folder to another place of its bucket: copied, and then removed.

    Its `marks` say that it is whole, so they come last there, and go first here.
    """
    store = files(folder)
    for name in sorted(sizes(folder), key=lambda name: name in marks):
        store.cp_file(str(folder / name), str(target / name))
    unmark(folder, marks)
    folder.rmtree(missing_ok=True)


def bucket(path: pathlib.Path) -> str:
    """The name of the bucket that a path lies in."""
    return str(path).removeprefix(SCHEME).partition("/")[0]


def resolved(path: pathlib.Path) -> pathlib.Path:
    """A path that means the same from any folder; links of local files are followed."""
    return path if is_remote(path) else path.resolve()


def refusals() -> tuple[type[Exception], ...]:
    """What the packages raise where a bucket, or the way there, refuses."""
    import aiohttp
    import gcsfs.retry
    from google.api_core import exceptions as answers
    from google.auth import exceptions as credentials

    # those of the package requests are OSErrors
    return (
        *(answers.GoogleAPIError, credentials.GoogleAuthError),
        *(gcsfs.retry.HttpError, aiohttp.ClientError, OSError),
    )


def absolute(path: pathlib.Path) -> pathlib.Path:
    """As `resolved`, and no link is followed."""
    return path if is_remote(path) else path.absolute()


def is_refusal(error: BaseException) -> bool:
    """Whether an error is of a bucket that was not reached, or refused; of a missing file, too."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, refusals()):
        return True
    # tensorstore, and Orbax with it, has no classes of its own
    plain = isinstance(error, ValueError) or type(error) is Exception
    return plain and bool(_STATUS.search(str(error)))


def refused(error: BaseException) -> str:
    """What a bucket said when it refused, and what mends it."""
    said = str(error).strip() or repr(error)
    told = said.splitlines()[0][:300]
    if not _FORBIDDEN.search(said):
        return (
            f"{told}; see to the name of the bucket, to the connection, and to who is asking: "
            "gcloud auth application-default login, or the roles of the machine"
        )
    found = _PERMISSION.search(said)
    lacking = f"the permission {found[0]}" if found else "a permission"
    return (
        f"{told}; the account that asks lacks {lacking}: grant it roles/storage.objectAdmin "
        "(storage.objects.*) and roles/storage.legacyBucketReader (storage.buckets.get) on the "
        "bucket, or ask as another: gcloud auth application-default login"
    )


@contextlib.contextmanager
def reached(path: str | os.PathLike) -> Iterator[None]:
    """What a bucket refuses, as one message; of a local path nothing is caught."""
    if not is_remote(path):
        yield
        return
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        raise NotReached(f"{path} cannot be used: {refused(error)}") from error


@contextlib.contextmanager
def asked(path: str | os.PathLike) -> Iterator[None]:
    """As `reached`, where it is an answer that a file is missing."""
    missing = None
    with reached(path):
        try:
            yield
        except FileNotFoundError as error:
            missing = error
    if missing is not None:
        raise missing

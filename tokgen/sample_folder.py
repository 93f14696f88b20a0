"""Images of a trained generator, written into a folder: by tens, or by the ten thousand.

`write` is what `tokgen sample` calls. Images lie in parts (`evaluation.sample_parts`) until all are
there, and are then put together. So many per class make a result that is whole or not there; so
many in all (`--total`) a folder that grows, which several processes may fill without knowing of
each other: each draws its share, and whoever ends last puts the parts together.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures

import numpy as np

from tokgen import (
    archives,
    image_grid,
    output,
    records,
    report,
    runtime,
    samples,
    sharding,
    traces,
)
from tokgen.checkpoints import checkpoint, pulling
from tokgen.data import classes as names_
from tokgen.errors import UserError
from tokgen.evaluation import given_images, made_images, sample_parts
from tokgen.output import locks, places
from tokgen.sampling import drawing
from tokgen.zoo import model as zoo

RECORDS = {sample_parts.RECORD: ("checkpoint", "settings")}
MERGING = "lock-merging"  # held by who puts the parts together
CHUNKS = 16  # batches whose texts are in memory together
LARGE = 10**9  # bytes that are told before they are written
TOKENS = "tokens.npy"
# How labels are made of (seed, total, classes), for whoever wants the same
ORDERS = {
    "equal": "classes[(arange(total) % len(classes))[numpy.random.default_rng([seed, "
    f"{made_images.LABELS}]).permutation(total)]]",
    "drawn": f"classes[numpy.random.default_rng([seed, {made_images.CLASSES}])"
    ".integers(0, len(classes), total)]",
}


def write(
    settings: samples.Settings,
    out: str | os.PathLike,
    *,
    png: bool | None = None,
    overwrite: bool = False,
    part: str = "",
    trace: bool = False,
) -> str:
    """Draw into a folder; what is to be said.

    It holds samples.npz (the layout of ADM's evaluator) with its SHA-256 beside it, tokens.npy,
    grid.png, samples.json and, with `png`, a file per image. Stopped at any point, the same call
    goes on with it.

    Args:
        settings: what is drawn.
        out: the folder.
        png: whether each image has a file of its own; None: unless settings say a total.
        overwrite: whether an earlier result in its place is replaced.
        part: "I/N", of a total: which share of the images this call draws; "" is all.
        trace: whether trace.gif and trace.png show how the first images came to be.
    """
    samples.check(settings)
    share = _share(settings, part, overwrite)
    if trace:
        traces.check(settings)
    png = not settings.total if png is None else png
    inputs = (settings.checkpoint, settings.tokenizer, settings.text)
    about = dict(records=RECORDS, overwrite=overwrite, inputs=inputs)
    if not settings.total:
        with output.folder(out, **about) as place:
            runtime.devices()
            return _filled(settings, place, png, share, trace)
    lock = places.LOCK if share == (1, 1) else f"{places.LOCK}-{share[0]}-of-{share[1]}"
    about |= dict(record=sample_parts.RECORD, what="samples of another command line", lock=lock)
    with output.growing(out, **about) as place:
        runtime.devices()
        try:
            return _filled(settings, place, png, share)
        except (KeyboardInterrupt, runtime.Stopped):
            count = _count(place.path, settings.total)
            report.say(
                f"{count:,} of {settings.total:,} images are in {place.path}, and the same command "
                "goes on with them"
            )
            raise
        except FileNotFoundError as error:
            if not str(error.filename).startswith(str(place.path)):
                raise
            raise UserError(
                f"{error.filename} is gone: removed, or put together by another process at the "
                "same time; run the same command again"
            ) from error


def check_write(
    settings: samples.Settings, out: str | os.PathLike, *, overwrite: bool = False, part: str = ""
) -> None:
    """What `write` would refuse, sooner: before a published model is fetched."""
    samples.check(settings)
    _share(settings, part, overwrite)
    check = output.check_growing if settings.total else output.check_folder
    check(out, records=RECORDS, overwrite=overwrite)
    if not zoo.is_name(settings.checkpoint):
        return
    pulling.check_kind(settings.checkpoint, "generator")
    model = zoo.named(settings.checkpoint)
    classes = pulling.CLASSES.get(model.classes, ())
    samples.check_condition(settings, "text" if model.text else "label", len(classes))
    if classes:
        names_.chosen(settings.classes, classes)


def _share(settings: samples.Settings, part: str, overwrite: bool) -> tuple[int, int]:
    """(I, N) of "I/N"."""
    if not part:
        return 1, 1
    words = part.split("/")
    numbers = tuple(int(word) for word in words if word.isdecimal() and len(word) < 8)
    if not settings.total:
        raise UserError("--part is of a number of images in all: say --total, or leave it out")
    if len(words) != 2 or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise UserError(f"--part must be I/N, the share I of N, as 1/4 to 4/4; found {part!r:.100}")
    if overwrite:
        raise UserError(
            "--overwrite would replace what the other parts write: remove the folder, or name a "
            "new one, and leave --overwrite out"
        )
    return numbers


def _filled(
    settings: samples.Settings,
    place: output.Folder,
    png: bool,
    share: tuple[int, int],
    trace: bool = False,
) -> str:
    """Draw what an unfinished result does not have yet of a share, and write all; what is said."""
    ready = samples.prepared(settings, *samples.networks(settings))
    kind_N, path = ready.kinds.kind_N, place.path
    record, beside = _record(settings, ready, png)
    place.claim(record, beside)
    total, index_KX = len(kind_N), _by_kind(settings, kind_N)
    there = sample_parts.there(path)  # before the checksum: parts go once it is written
    if _checksum(path):
        _verify(path)
        _tidy(path)
        told = _told(place, index_KX, total)
        told += "; they were there already, and samples.npz has its checksum"
        return told + (_traced(settings, ready, path) if trace else "")
    _check_room(settings, ready, place, png)
    _draw(settings, ready, place, png, share, there)
    if missing := total - _count(path, total):
        return (
            f"part {share[0]}/{share[1]} is drawn; {total - missing:,} of {total:,} images are in "
            f"{place.target}: the part that ends last puts them together, or this command again"
        )
    where = str(place.target).replace("{", "{{").replace("}", "}}")
    with locks.waiting(path / MERGING, f"{{}} puts the images of {where} together: waiting for it"):
        if not _checksum(path):  # by the process that was waited for
            _merged(path, kind_N, index_KX, record | beside)
        _tidy(path)
    return _told(place, index_KX, total) + (_traced(settings, ready, path) if trace else "")


def _traced(settings: samples.Settings, ready: samples.Prepared, path: pathlib.Path) -> str:
    """Write how the first images came to be; what is to be said of it."""
    found = traces.traced(ready, settings)
    image_grid.save_png(path / "trace.png", found.strip())
    found.save_gif(path / "trace.gif")
    return f"; trace.gif and trace.png: {found}"


def _count(path: pathlib.Path, total: int) -> int:
    """How many images are there, in parts or put together."""
    there = sample_parts.there(path)  # before the checksum: parts go once it is written
    return total if _checksum(path) else sample_parts.count(there, total)


def _tidy(path: pathlib.Path) -> None:
    """Remove what a finished folder needs no more, and what killed processes left in it."""
    shutil.rmtree(path / sample_parts.FOLDER, ignore_errors=True)
    for left in path.glob(places.BESIDE):
        left.unlink(missing_ok=True)
    for lock in [path / places.LOCK, *path.glob(places.LOCKS)]:
        with contextlib.suppress(UserError), locks.passing(lock, ""):  # unless somebody holds it
            pass


def _told(place: output.Folder, index_KX: np.ndarray, count: int) -> str:
    """What lies in a folder that is finished, in words."""
    found = records.load(place.path / sample_parts.RECORD)
    _, _, shown = samples.laid_out(found["size"], index_KX, count)
    near = len(found["near_ties"])
    rounded = (
        f"; {near} of them have a draw near a tie: with another batch, or elsewhere, their tokens "
        "may differ"
    )
    return (
        f"{count} images in {place.target}: grid.png ({shown}), samples.npz (arr_0 images, arr_1 "
        f"labels), samples.json (settings){rounded * bool(near)}"
    )


def _record(settings: samples.Settings, ready: samples.Prepared, png: bool) -> tuple[dict, dict]:
    """(what images these are, what else is said of them) in samples.json."""
    kinds, config = ready.kinds, ready.tokenizer.config
    cond = (kinds.texts, kinds.kind_N)
    ranking = settings.ranking
    ranked = {"candidates": ranking.candidates, "rank": ranking.by}
    total = {"class_counts": settings.class_counts, "order": ORDERS[settings.class_counts]}
    record = {
        "fingerprint": ready.loaded.fingerprint,
        "tokenizer": ready.tokenizer.fingerprint,
        "seed": settings.seed,
        "preset": settings.sampling.preset,
        "settings": ready.settings,
        "classes": kinds.classes,
        "names": list(ready.loaded.classes),  # what the numbers of samples.npz are called
        "number": None if settings.total else settings.number,
        "total": settings.total or None,
        **(total if settings.total else {}),
        "kinds": int(kinds.kind_N.max()) + 1,
        "size": list(config.view.size),
        "precision": ready.loaded.config.precision.compute,
        "versions": checkpoint.versions(),
        "conditions": made_images.conditions(cond),
        **(ranked if ranking.candidates > 1 else {}),
        "images_per_part": sample_parts.EACH,
        "png": png,
    }
    beside = {"checkpoint": str(ready.loaded.step), "text": settings.text}
    return record, beside | {"near_ties": None, "sha256": None}


def _by_kind(settings: samples.Settings, kind_N: np.ndarray) -> np.ndarray:
    """[kinds, images of each] the numbers of images: as many of each as there are of the rarest."""
    if not settings.total:
        return np.arange(len(kind_N)).reshape(-1, settings.number)
    order_N = np.argsort(kind_N, kind="stable")
    _, first_K, count_K = np.unique(kind_N[order_N], return_index=True, return_counts=True)
    return order_N[first_K[:, None] + np.arange(count_K.min())]


def _check_room(
    settings: samples.Settings, ready: samples.Prepared, place: output.Folder, png: bool
) -> None:
    """An error where the disk cannot hold what is to be written; of much it is told."""
    total = len(ready.kinds.kind_N)
    view, layout = ready.tokenizer.config.view, ready.loaded.layout
    each = int(np.prod(view.size)) * 3
    done = sample_parts.count(sample_parts.there(place.path), total)
    part = each // 3 * view.channels + 4 * layout.length * len(layout.vocab)
    need = (total - done) * (part * (1 + png)) + total * part
    free = shutil.disk_usage(place.path).free
    for left in _left(place.path):
        with contextlib.suppress(FileNotFoundError):
            free += left.stat().st_size
    rows, columns = view.size
    told = (
        f"{total:,} images of {rows} x {columns} pixels are {report.amount(total * each)} in "
        "samples.npz, and lie in parts beside it until it is whole"
    )
    if settings.total or need > LARGE:
        done_ = f"{done:,} are there; " if done else ""
        report.say(f"{told}; {done_}{report.amount(need)} to write, {report.amount(free)} free")
    if need > free:
        raise UserError(
            f"{told}: {report.amount(need)} are to be written; {place.target} has "
            f"{report.amount(free)} free: make room there, or name another --out"
        )


# ---------------------------------------------------------------- parts


def _draw(
    settings: samples.Settings,
    ready: samples.Prepared,
    place: output.Folder,
    png: bool,
    share: tuple[int, int],
    there: set[int],
) -> None:
    """Draw the parts of a share that are not there yet."""
    path, total = place.path, len(ready.kinds.kind_N)
    bounds = sample_parts.bounds(total)
    first, stop = ((share[0] - 1) * len(bounds) // share[1], share[0] * len(bounds) // share[1])
    own = bounds[first:stop]
    done = sample_parts.count((start for start, _ in own if start in there), total)
    what = f"sample part {share[0]}/{share[1]}" if share[1] > 1 else "sample"
    count = own[-1][1] - own[0][0] if own else 0
    if done == count:
        return
    drawn: dict[int, dict[str, np.ndarray]] = {}  # of parts that are not whole yet

    def save(start: int, arrays: dict[str, np.ndarray]) -> None:
        if png:  # first: what is in a part has its pictures
            _save_pngs(path, settings, ready, start, arrays["image"])
        sample_parts.save(path, start, arrays)

    with (
        report.bar(count, initial=done, unit="image", what=what) as bar,
        futures.ThreadPoolExecutor(1) as writer,  # the devices need not wait for the disk
    ):
        written: list[futures.Future] = []
        for index_B, arrays in _batches(settings, ready, own, there):
            if _checksum(path):  # others drew the same, under another division, and were faster
                return
            start_B = index_B // sample_parts.EACH * sample_parts.EACH
            while written:  # what went wrong is raised here, and no more than a batch waits
                written.pop().result()
            for start in np.unique(start_B).tolist():
                if start in there:
                    continue
                found = {name: array[start_B == start] for name, array in arrays.items()}
                bar.update(len(found["image"]))
                if start in drawn:
                    before = drawn.pop(start)
                    found = {n: np.concatenate([before[n], array]) for n, array in found.items()}
                drawn[start] = found
                if start + len(found["image"]) == min(start + sample_parts.EACH, total):
                    written.append(writer.submit(save, start, drawn.pop(start)))
        while written:
            written.pop().result()


def _batches(
    settings: samples.Settings,
    ready: samples.Prepared,
    own: list[tuple[int, int]],
    there: set[int],
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(numbers of images, what is kept of them) of the batches of a share with images to draw.

    A batch has the same images whenever it is drawn, and so many rows: going on after a kill
    computes with the same programs on the same rows, and rounds no image otherwise.
    """
    index_N = np.arange(own[0][0], own[-1][1])
    ways = sharding.ways(sharding.current())
    batch = drawing.even(len(index_N), settings.batch, ways)
    chunks = [index_N[k : k + batch] for k in range(0, len(index_N), batch)]
    each = sample_parts.EACH
    chunks = [
        c for c in chunks if not there.issuperset(range(c[0] // each * each, c[-1] + 1, each))
    ]
    together = len(chunks) if ready.kinds.texts is None else CHUNKS
    for k in range(0, len(chunks), together):
        several = chunks[k : k + together]
        index_M = np.concatenate([sharding.padded(chunk, batch) for chunk in several])
        parts = samples.parts(ready, settings, index_M, batch=batch, what="")
        for index_B, part in zip(several, parts, strict=True):
            arrays = {"tokens": part.tokens_BLG, "image": part.image_BHW3, "near": part.near_B}
            kept = {name: array[: len(index_B)] for name, array in arrays.items()}
            yield index_B, kept | {"label": ready.kinds.kind_N[index_B]}


def _save_pngs(
    path: pathlib.Path,
    settings: samples.Settings,
    ready: samples.Prepared,
    start: int,
    image_BHW3: np.ndarray,
) -> None:
    """A file for each image of a part."""
    for i, image_HW3 in enumerate(image_BHW3, start):
        number = int(ready.kinds.kind_N[i])
        kind = f"text{number}"
        if ready.kinds.texts is None:
            kind = names_.file_name(number, ready.loaded.classes)
        image_grid.save_png(path / f"seed{settings.seed}-{i:05d}-{kind}.png", image_HW3)


# ---------------------------------------------------------------- the whole


def _merged(path: pathlib.Path, kind_N: np.ndarray, index_KX: np.ndarray, record: Mapping) -> None:
    """Put the parts together, one in memory at a time: samples.npz, its checksum, all the others.

    Killed at any point, it is begun again; the record that says the checksum is written last.
    """
    for left in _left(path):
        left.unlink(missing_ok=True)
    total, whole = len(kind_N), path / sample_parts.WHOLE
    first = _part(path, 0, min(sample_parts.EACH, total))
    layout_RX, _, _ = samples.laid_out(first["image"].shape[1:], index_KX, total)
    wanted = dict.fromkeys(np.unique(layout_RX[layout_RX >= 0]).tolist())
    near, shape = [], (total, *first["image"].shape[1:3], 3)
    with (
        given_images.writing(whole, shape, kind_N) as add,
        _writing(path / TOKENS, (total, *first["tokens"].shape[1:]), first["tokens"].dtype) as note,
        report.bar(total, unit="image", what="put together", delay=samples.DELAY) as bar,
    ):
        for start, stop in sample_parts.bounds(total):
            part = _part(path, start, stop)
            add(made_images.coloured(part["image"]))
            note(part["tokens"])
            near += (start + np.flatnonzero(part["near"])).tolist()
            # copies: a view would keep its whole part in memory
            own = [i for i in range(start, stop) if i in wanted]
            wanted |= {i: part["image"][i - start].copy() for i in own}
            bar.update(stop - start)
    picture, _ = samples.sheet_of(wanted, index_KX, total)
    image_grid.save_png(path / "grid.png", picture)
    digest = archives.sha256(whole)
    records.save(path / f"{whole.name}.sha256", f"{digest}  {whole.name}\n")
    found = {"near_ties": near, "sha256": digest}
    records.save(path / sample_parts.RECORD, json.dumps({**record, **found}, indent=2) + "\n")


def _left(path: pathlib.Path) -> list[pathlib.Path]:
    """What may lie there of whoever was killed while putting together: it is made anew."""
    names = (sample_parts.WHOLE, TOKENS)
    return [*(path / n for n in names), *(f for n in names for f in path.glob(f".{n}.*.part"))]


def _part(path: pathlib.Path, start: int, stop: int) -> dict[str, np.ndarray]:
    part = sample_parts.load(path, start, stop)
    if part is None:
        file = sample_parts.file(path, start)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return part


@contextlib.contextmanager
def _writing(
    path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[Callable[[np.ndarray], object]]:
    """A function that adds rows to a new .npy of a shape; it appears whole or not at all."""
    made = places.beside(path)
    try:
        with open(made, "wb") as target:
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(target, header)
            yield lambda rows: target.write(np.ascontiguousarray(rows).tobytes())
            target.flush()
            os.fsync(target.fileno())
        made.replace(path)
    except Exception:  # a full disk, a part that is damaged
        made.unlink(missing_ok=True)
        raise


def _checksum(path: pathlib.Path) -> str:
    """The checksum of a folder that is finished; "" of any other."""
    try:
        found = records.load(path / sample_parts.RECORD)
    except (OSError, ValueError):
        return ""
    return (isinstance(found, dict) and found.get("sha256")) or ""


def _verify(path: pathlib.Path) -> None:
    """An error where samples.npz is not what was written."""
    whole, expected = path / sample_parts.WHOLE, _checksum(path)
    found = archives.sha256(whole) if whole.exists() else "no such file"
    if found != expected:
        raise UserError(
            f"{whole} is damaged: its SHA-256 must be {expected}; found {found}: restore a copy, "
            "or remove the folder and draw it again"
        )

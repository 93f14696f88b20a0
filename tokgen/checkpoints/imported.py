"""Imported weights as a checkpoint, and what an export needs of it.

An import is a run of one step, 0. Arrays of the published file that have no place in our model lie
in a file of their own in the step, so that an export can give them back.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import parameters, records, storage
from tokgen.checkpoints import checkpoint, loading, run as runs, stream
from tokgen.interfaces import UserError
from tokgen.pretrained import entries, transfer
from tokgen.pretrained.formats import reader, writer

ASIDE = "aside.safetensors"
COUNTS = ("step", "skipped")  # of a TrainState
FIGURES = {"imported": 0.0}


def save_imported(
    workdir: pathlib.Path,
    imported: transfer.Imported,
    source: dict,
    tokenizer: loading.Loaded | None = None,
    classes: tuple[str, ...] = (),
) -> pathlib.Path:
    """A checkpoint of step 0; its folder. `tokenizer` is the one that a generator's tokens are of.

    Classes of a generator are named by their numbers where `classes` has no names for them: a
    published file has none.
    """
    with _started(workdir, imported, source, tokenizer, classes) as run:
        _, params, stats = parameters.split(imported.module)
        average = None if imported.average is None else parameters.split(imported.average)[1]
        zero = jnp.zeros((), jnp.int32)
        # the paths of a TrainState, without what an optimizer would keep
        state = dict(step=zero, skipped=zero, params=params, stats=stats)
        state |= {} if average is None else {"ema": average}
        run.save({"model": state}, FIGURES)
    return run.folder(0)


def save_fitting(
    workdir: pathlib.Path,
    fitting: transfer.Fitting,
    source: dict,
    tokenizer: loading.Loaded | None = None,
    classes: tuple[str, ...] = (),
) -> pathlib.Path:
    """As `save_imported`, each array read when it is written: memory holds few of them."""
    with _started(workdir, fitting, source, tokenizer, classes) as run:
        zero = np.zeros((), np.int32)
        counts = {f"model/{name}": jax.ShapeDtypeStruct((), zero.dtype) for name in COUNTS}
        leaves = {f"model/{path}": leaf for path, leaf in fitting.leaves().items()}
        pieces = ((f"model/{path}", layer, part) for path, layer, part in fitting.pieces())
        pieces = itertools.chain(((path, None, zero) for path in counts), pieces)
        run.save_stream(0, stream.Stream(counts | leaves, pieces), FIGURES)
    return run.folder(0)


@contextlib.contextmanager
def _started(
    workdir: pathlib.Path,
    model: transfer.Imported | transfer.Fitting,
    source: dict,
    tokenizer: loading.Loaded | None,
    classes: tuple[str, ...],
) -> Iterator[runs.Run]:
    """The run of an import; what has no place in our model is written beside its step."""
    made_by = None
    if tokenizer is not None:
        loading.check_layout(tokenizer, model.layout, "the generator")
        made_by = checkpoint.reference(tokenizer.step, workdir)
        made_by |= {"fingerprint": tokenizer.fingerprint}
    with runs.lock(workdir):
        run = runs.start(
            workdir,
            model.config,
            kind=model.kind,
            layout=model.layout,
            classes=classes or tuple(str(number) for number in range(model.classes)),
            best="imported",
            data="",
            tokenizer=made_by,
            source=source | _recorded(model.form),
        )
        yield run
        if model.aside:
            writer.write(run.folder(0) / ASIDE, model.aside, form="safetensors")
        run.close()


def load_imported(path: str | os.PathLike) -> tuple[loading.Loaded, transfer.Imported]:
    """(a network for use; its live and its averaged weights apart, with what lay aside)."""
    loaded = loading.load(path)
    has = {p.split("/")[1] for p in loaded.meta["manifest"] if p.startswith("model/")}
    live = loading.load(path, which="params").module if "ema" in has else loaded.module
    average = loaded.module if "ema" in has else None
    file = loaded.step / ASIDE
    aside = {}
    if file.exists():
        storage.local(file, "what lies beside the arrays of an imported checkpoint")
        aside = reader.read(file)
    return loaded, transfer.Imported(
        config=loaded.config,
        module=live,
        average=average,
        aside=aside,
        form=form_of(loaded.meta.get("source") or {}, str(loaded.step)),
        layout=loaded.layout,
        classes=len(loaded.classes),
    )


def _recorded(form: entries.Form) -> dict:
    """How the published file was written, for the record: names of arrays by their dtype."""
    said = {
        "dtypes": _grouped(form.dtypes),
        "entry": form.entry,
        "average": form.average,
        "average_dtype": form.average_dtype if form.average is not None else "",
        "average_dtypes": _grouped(form.average_dtypes),
        "written": form.written,
    }
    return {"dtype": form.dtype} | {k: v for k, v in said.items() if v or k == "entry"}


def _grouped(dtypes: dict[str, str]) -> dict[str, list[str]]:
    return {
        dtype: sorted(key for key, found in dtypes.items() if found == dtype)
        for dtype in sorted(set(dtypes.values()))
    }


def form_of(source: dict, where: str) -> entries.Form:
    """The form that a record states; of imports that did not state it, what they did."""
    fields = {}
    try:
        for name in ("dtype", "entry", "average", "average_dtype", "written"):
            if source.get(name) is not None:
                fields[name] = records.checked(source, **{name: str})[name]
                if not fields[name].isprintable():
                    raise ValueError(f"{name} is no name")
        for name in ("dtypes", "average_dtypes"):
            groups = records.checked(source, **{name: dict})[name] if name in source else {}
            fields[name] = {key: dtype for dtype, keys in groups.items() for key in keys}
            if not all(isinstance(key, str) for key in fields[name]):
                raise ValueError(f"{name} must be names by dtype")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the record of {where} does not say how its file was written: {error}"
        ) from error
    return entries.Form(**fields)

"""What a published file does not tell is what the zoo says of the file of that name."""

import json
import pathlib

import pytest

from tests import command_line, published
from tokgen import runtime
from tokgen.checkpoints import checkpoint, importing

SMALL = published.Small("generator/llamagen", published._generator())
FINE = "llamagen-b-384"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small file in LlamaGen's form, with the name of one of 384 pixels."""
    place = tmp_path_factory.mktemp("files") / published.KNOWN[FINE].file
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.SMALL, FINE, SMALL)
        published.write(FINE, place)
    return place


def imported(file, out, capfd, *words, heads=4):
    """(the grid of an import by hand, what was said)."""
    config = file.parent / "config.json"
    config.write_text(json.dumps({"n_head": heads}))
    called = ("import", file, "--system", "llamagen_c2i", "--config", config, "--out", out)
    assert command_line.call(*called, *words) == 0
    meta = checkpoint.read_meta(checkpoint.find(out))
    return meta["layout"]["grids"], meta["source"], capfd.readouterr().err


def test_a_file_by_hand_has_the_tokens_of_its_name(file, tmp_path, capfd):
    grids, source, said = imported(file, tmp_path / "fine", capfd)
    assert grids == [[24, 24]]
    assert "c2i_B_384.pt is the file of llamagen-b-384: it is read with --config of " in said
    assert '{"block_size": 576}, which' in said
    assert source["home"] == published.KNOWN[FINE].home and source["licence"] == "MIT"
    other = file.with_name("mine.pt")
    other.write_bytes(file.read_bytes())
    grids, _, said = imported(other, tmp_path / "coarse", capfd)
    assert grids == [[16, 16]] and "is the file of" not in said


@pytest.fixture
def named(tmp_path, monkeypatch):
    """An empty file of that name, and the rows that it may be of."""
    monkeypatch.chdir(tmp_path)

    def made(name):
        row = published.KNOWN[name]
        pathlib.Path(row.file).touch()
        return pathlib.Path(row.file), importing._rows(pathlib.Path(row.file), row.system)

    return made


def test_every_row_is_found_by_the_name_of_its_file(named):
    """What it needs is taken, or told where other rows have the same file."""
    for name, row in published.KNOWN.items():
        file, rows = named(name)
        assert name in rows
        config, fields, notes = importing._settings(file, "", (), rows)
        if (config, fields) == (dict(row.configuration), row.overrides):
            assert bool(notes) == bool(
                config or fields or len({r.pixels for r in rows.values()}) > 1
            )
        else:
            (note,) = notes
            assert f"for {name} add {importing._options(row.configuration, row.overrides)}" in note
            assert (config, fields) == ({}, ())


def test_what_is_given_comes_first(named):
    file, rows = named("llamagen-3b")
    assert importing._settings(file, {"block_size": 9}, (), rows) == ({"block_size": 9}, (), ())
    file, rows = named("maskgit-tokenizer-512")
    mine = ("view.size=64,64",)
    assert importing._settings(file, "", mine, rows) == ({}, mine, ())
    file, rows = named("llamagen-tokenizer")
    assert importing._settings(file, "", mine, rows) == ({}, mine, ())


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("npp-xl", "not stated"),
        ("llamagen-b", "MIT or not stated"),
        ("maskgit-256", "Apache-2.0 (code)"),
    ],
)
def test_the_licence_is_that_of_the_file(name, licence, named):
    row, (file, rows) = published.KNOWN[name], named(name)
    assert importing._source(file, row.system, rows)["licence"] == licence
    of_row = importing._source(file, row.system, {"": row})  # of one that is pulled
    assert (of_row["home"], of_row["licence"]) == (row.home, row.licence)

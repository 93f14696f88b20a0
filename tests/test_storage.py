"""Paths of buckets: what they mean, what is refused of them, and what moves there."""

import json
import pathlib
import subprocess
import sys

import pytest

from tokgen import records, runtime, storage
from tokgen.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKS = ("sizes.json", "done")


def test_a_local_path_is_that_of_pathlib():
    assert storage.path("runs/a") == pathlib.Path("runs/a")
    path = pathlib.Path("runs/../a")
    assert storage.path(path) is path
    assert not storage.is_remote("tfds:cifar10") and not storage.is_remote("./gs:/a")


@pytest.mark.parametrize("text", ["gs://bucket/run/", "gs:/bucket/run", "gs://bucket/a/../run"])
def test_a_path_of_a_bucket_keeps_its_name(bucket, text):
    path = storage.path(text)
    assert str(path) == "gs://bucket/run" and str(path / "a") == "gs://bucket/run/a"
    assert storage.path(path / "a") == path / "a" and storage.bucket(path) == "bucket"
    assert storage.resolved(path) == storage.absolute(path) == path


@pytest.mark.parametrize(
    "text, found",
    [
        ("s3://bucket/run", "--workdir s3://bucket/run: need a local path or gs://BUCKET/FOLDER"),
        ("az://bucket/run", "found one of az://, which is not read"),
        ("http://host/run", "found one of http://"),
        ("gs://bucket", "--workdir gs://bucket: need gs://BUCKET/FOLDER; found no folder"),
        ("gs://", "found no folder"),
        ("gs:///run", "found no folder"),
    ],
)
def test_other_addresses_are_refused(text, found):
    with pytest.raises(UserError, match=found):
        storage.path(text, "--workdir")


def test_what_needs_local_files_says_so():
    storage.local("runs/a", "images")
    for text in ("gs://bucket/a", "s3://bucket/a"):
        with pytest.raises(UserError, match=f"images must be local files; found {text}: copy"):
            storage.local(text, "images")


@pytest.mark.long
def test_nothing_of_google_is_imported_for_local_paths():
    program = (
        "import sys; from tokgen import storage; from tokgen.training import launch; "
        "from tokgen.data import token_shards; storage.path('runs/a').exists(); "
        "from tokgen import metrics_log; metrics_log._event_writer(); "
        "print({'gcsfs', 'google.cloud.storage', 'google.auth', 'aiohttp'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "set()\n"


def test_the_extra_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert runtime.call("tokgen x", lambda: storage.path("gs://bucket/run")) == 2
    said = capsys.readouterr().err
    assert 'the package gcsfs, which is not installed; remedy: pip install "tokgen[gcs]"' in said


def test_files_of_a_bucket_are_listed_as_those_of_a_folder(bucket, tmp_path):
    for folder in (tmp_path, storage.path(bucket)):
        records.save(folder / "a.json", '{"a": 1}') if folder is not tmp_path else (
            folder / "a.json"
        ).write_text('{"a": 1}')
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b").write_bytes(b"bb")
    remote = storage.path(bucket)
    storage.save(remote / "in" / "b", b"bb")
    storage.save(storage.path(f"{bucket}2") / "beside", b"")
    for folder in (tmp_path, remote):
        assert storage.sizes(folder) == {"a.json": 8, "in/b": 2}
        assert storage.names(folder) == ["a.json", "in"]
        assert storage.size(folder / "in" / "b") == 2
        assert records.load(folder / "a.json") == {"a": 1}
        assert storage.names(folder / "other") == [] and storage.sizes(folder / "other") == {}
        with storage.opened(folder / "in" / "b") as file:
            assert file.read() == b"bb"
    with pytest.raises(ValueError, match="has 8 bytes, a record at most 4"):
        records.load(remote / "a.json", limit=4)
    with pytest.raises(FileNotFoundError):
        records.load(remote / "none.json")


def test_a_folder_that_moves_says_that_it_is_whole_last_and_first(bucket, monkeypatch):
    folder, target = storage.path(f"{bucket}/1"), storage.path(f"{bucket}/aside/1")
    for name in ("a", "state/b", *MARKS):
        storage.save(folder / name, name.encode())
    copied, store = [], storage.files(folder)
    copy = store.cp_file
    monkeypatch.setattr(
        store, "cp_file", lambda a, b: (copied.append(a.rpartition("/")[2]), copy(a, b))
    )
    storage.move(folder, target, MARKS)
    assert copied[:2] == ["a", "b"] and sorted(copied[2:]) == sorted(MARKS)
    assert storage.sizes(folder) == {} and not folder.exists()
    assert sorted(storage.sizes(target)) == sorted(["a", "state/b", *MARKS])

    def killed(path, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(folder), "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.move(target, folder, MARKS)
    assert sorted(storage.sizes(target)) == ["a", "state/b"]  # no half that says it is whole


def test_files_go_there_and_back(bucket, tmp_path):
    there = storage.path(bucket) / "shard"
    (tmp_path / "a").write_bytes(bytes(range(256)) * 30000)  # more than one request takes
    storage.upload(tmp_path / "a", there)
    storage.download(there, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for content in (b"a\r", b"a\n", b"a\r\n", b"\r", b""):
        storage.save(there, content)
        assert there.read_bytes() == content


def test_what_a_bucket_refuses_is_one_message(bucket):
    with pytest.raises(UserError, match="gs://none/run cannot be used: .*; see to the name of"):
        with storage.reached("gs://none/run"):
            storage.save(storage.path("gs://none/run") / "a", b"")
    with pytest.raises(FileNotFoundError), storage.reached("runs/a"):
        raise FileNotFoundError  # local errors pass


def test_what_an_account_may_not_do_is_named(bucket):
    for said, lacking in (
        (
            "Forbidden: https://storage.googleapis.com/b/a\nme does not have storage.buckets.get",
            "storage.buckets.get",
        ),
        ("403 GET http://a: Permission 'storage.objects.list' denied", "storage.objects.list"),
    ):
        role = "grant it roles/storage.objectAdmin .* and roles/storage.legacyBucketReader"
        with pytest.raises(storage.NotReached, match=f"the permission {lacking}: {role}"):
            with storage.reached(bucket):
                raise OSError(said)
    with pytest.raises(UserError, match="lacks a permission: grant it"), storage.reached(bucket):
        raise OSError("Forbidden: b/a\n")
    assert "lacks" not in storage.refused(ConnectionError("no route to gs://a/checkpoints/403/a"))


def test_what_is_no_refusal_passes(bucket):
    for error in (UserError("a 403"), ValueError("no JSON"), RuntimeError("RESOURCE_EXHAUSTED: a")):
        with pytest.raises(type(error), match=str(error)) as found, storage.reached(bucket):
            raise error
        assert found.value is error


def test_a_folder_that_nobody_answers_for_is_not_said_to_be_none(bucket, monkeypatch):
    folder = storage.path(bucket)
    assert not storage.is_dir(folder)
    storage.save(folder / "a", b"")
    assert storage.is_dir(folder) and not storage.is_dir(folder / "a")

    def down(path, **how):
        raise ConnectionError("no route")

    monkeypatch.setattr(storage.files(folder), "info", down)
    with pytest.raises(ConnectionError):
        storage.is_dir(folder)


def test_what_is_missing_is_an_answer(bucket):
    with pytest.raises(FileNotFoundError, match="lock"), storage.asked(bucket):
        storage.opened(f"{bucket}/lock").close()
    with pytest.raises(UserError, match="cannot be used: no route; see to"):
        with storage.asked(bucket):
            raise ConnectionError("no route")


def test_a_record_in_a_bucket_is_bounded(bucket):
    file = storage.path(bucket) / "a.json"
    storage.save(file, json.dumps([[[]]] * 10).encode())
    assert records.load(file) == [[[]]] * 10

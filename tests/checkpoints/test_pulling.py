"""Published models by name, from a hub on the loopback: pulled once, then without a network."""

import contextlib
import dataclasses
import pathlib
import shutil
import threading
import time
import types

import pytest
from huggingface_hub import constants

import tokgen
from tests import command_line, loopback, published
from tokgen import errors, report, runtime
from tokgen.checkpoints import checkpoint, importing, loading, pulling
from tokgen.data import imagenet
from tokgen.pretrained import parity
from tokgen.zoo import model as zoo

NAME, TOKENIZER = "var-d16", "var-tokenizer"
SWEEP = ("sweep", "--protocol", "adm-50k", "--reference", "nowhere.npz", "--out", "new")
IMPORT = ("import", "--system", "var")
ELSEWHERE = ("maskgit-tokenizer-256", "maskgit-256")  # whose files are not on the hub


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(rows of the zoo, files) of a small generator and its tokenizer."""
    rows, files = published.rows(tmp_path_factory.mktemp("files"), NAME)
    rows[NAME] = dataclasses.replace(rows[NAME], licence="not stated")  # other than its system's
    return rows, files


@contextlib.contextmanager
def serving(small, folder):
    """A hub that has both, and an empty cache in `folder`."""
    rows, files = small
    elsewhere = {name: published.KNOWN[name] for name in ELSEWHERE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "devices", lambda batch_size=0: None)
        patch.chdir(folder)
        with published.served(rows | elsewhere, files, folder, patch) as found:
            yield found


@pytest.fixture
def served(small, tmp_path):
    with serving(small, tmp_path) as found:
        yield found


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one command left, said and asked for."""

    folder: pathlib.Path
    models: pathlib.Path
    said: list[str]
    asked: list[str]
    requests: list[loopback.Request]


@pytest.fixture(scope="module")
def drawn(small, tmp_path_factory):
    """An image by name, from an empty cache, with one command."""
    folder, lines = tmp_path_factory.mktemp("drawn"), []
    words = ("sample", NAME, "--classes", "golden retriever", "--number", "1", "--out", "one")
    with serving(small, folder) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "say", lines.append)
        assert command_line.call(*words, "--yes") == 0
        models = runtime.cache_folder() / "models"
        return Drawn(folder, models, lines, hub.asked(), hub.requests)


@pytest.fixture
def here(drawn, served):
    """The hub, and both models in the cache."""
    shutil.copytree(drawn.models, runtime.cache_folder() / "models")
    return served


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(report, "say", lines.append)
    return lines


def kept():
    """What lies in the cache of models."""
    place = runtime.cache_folder() / "models"
    return sorted(one.name for one in place.iterdir()) if place.is_dir() else []


def test_one_command_draws(drawn, small):
    said = "\n".join(drawn.said)
    for row in small[0].values():
        assert f"{row.file}, {report.amount(row.size)}, from {row.repository}" in said
    assert "licence MIT" in said and "1 images in one" in said
    rows = [small[0][name] for name in (TOKENIZER, NAME)]
    expected = [
        f"HEAD /{row.repository}/resolve/main/{row.file}" for row in rows
    ]  # is either there?
    for row in rows:
        expected += [
            f"HEAD /{row.repository}/resolve/main/{row.file}",
            f"GET /{row.repository}/resolve/{loopback.COMMIT}/{row.file}",
            f"GET /stored/{row.repository}/{row.file}",
        ]
    assert drawn.asked == expected
    for request in drawn.requests:
        assert not {"authorization", "cookie"} & set(request.headers)
    # neither files nor locks
    assert sorted(one.name for one in drawn.models.iterdir()) == [NAME, TOKENIZER]
    (picture,) = (drawn.folder / "one").glob("seed0-*.png")
    assert "golden_retriever" in picture.name


def test_the_next_command_asks_nobody(here):
    here.status = 500
    assert command_line.call("checkpoint", NAME) == 0
    assert here.requests == []


def repository_file(name):
    row = zoo.named(name)
    return f"{row.repository}/{row.file}"


def test_what_is_pulled_says_where_it_is_from(here):
    place = pulling.pull(NAME)
    assert place == pulling.folder(NAME) == runtime.cache_folder() / "models" / NAME
    model = tokgen.load(NAME, tokenizer=TOKENIZER)
    assert model.classes == imagenet.NAMES and model.step.parent.parent == place
    assert f"ImageGenerator of {NAME}: " in repr(model)
    source = model.loaded.meta["source"]
    assert source["file"] == "var_d16.pth" and source["system"] == "var"
    assert source["licence"] == "not stated" and source["home"] == zoo.named(NAME).home
    assert model.tokenizer.step.parent.parent.resolve() == pulling.folder(TOKENIZER)
    assert here.requests == []


def test_a_tokenizer_that_is_here_is_not_fetched_again(here, said, monkeypatch):
    shutil.rmtree(pulling.folder(NAME))
    brought = []
    monkeypatch.setattr(pulling, "_bring", lambda name, file: brought.append(name))
    pulling.pull(NAME, yes=True)
    assert brought == [NAME] and not [line for line in said if line.startswith(f"{TOKENIZER}:")]


def test_nothing_is_fetched_without_a_word(served, monkeypatch):
    with pytest.raises(errors.UserError, match="needs your word: add --yes .*yes=True"):
        pulling.pull(NAME)
    for answer in ("n\n", "\n", ""):
        terminal(monkeypatch, answer)
        with pytest.raises(errors.UserError, match="not fetched, as you said"):
            pulling.pull(NAME)
    assert served.requests == [] and kept() == []
    terminal(monkeypatch, "y\n")
    monkeypatch.setattr(pulling, "_bring", lambda name, file: brought.append(name))
    brought = []
    pulling.pull(NAME)
    assert brought == [TOKENIZER, NAME]


def terminal(monkeypatch, answer):
    """A person who answers."""
    keys = types.SimpleNamespace(isatty=lambda: True, readline=lambda: answer)
    screen = types.SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr(pulling, "sys", types.SimpleNamespace(stdin=keys, stderr=screen))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", NAME, "--out", "taken"], "is not empty"),
        (["sample", NAME, "--out", "new", "--classes", "goldn retriever"], "golden retriever"),
        (["sample", NAME, "--out", "new", "--classes", "1000"], "0 to 999"),
        (["sample", NAME, "--out", "new", "--text", "x.npz"], "found one of 1000 classes"),
        (["sample", "llamagen-t2i-256", "--out", "new"], "reads text"),
        (["sample", NAME, "--out", "new", "--number", "0"], "must be at least 1"),
        (["sample", TOKENIZER, "--out", "new"], "need a generator"),
        (["reconstruct", NAME, "taken", "--out", "new"], "need a tokenizer"),
        (["reconstruct", TOKENIZER, "nowhere", "--out", "new"], "found nothing"),
        (["reconstruct", TOKENIZER, "taken", "--out", "taken"], "is not empty"),
        (["pretokenize", "--tokenizer", NAME, "--out", "new"], "need a tokenizer"),
        (["export", NAME, "--out", "taken"], "is not empty"),
        (
            ["evaluate", NAME, "--protocol", "adm-50k", "--out", "new"],
            "compares with a reference",
        ),
        (["evaluate", NAME, "--samples", "9"], "are of a score"),
        ([*SWEEP, NAME, "--temperature", "0.5", "1", "--seeds", "0"], "--seeds must be at least 1"),
        ([*SWEEP, TOKENIZER, "--temperature", "0.5", "1"], "need a generator"),
        ([*IMPORT, "nowhere.pth", "--tokenizer", TOKENIZER, "--out", "new"], "no file nowhere.pth"),
        ([*IMPORT, "taken", "--tokenizer", TOKENIZER, "--out", "taken"], "is not empty"),
        ([*IMPORT, "taken", "--tokenizer", NAME, "--out", "new"], "need a tokenizer"),
    ],
)
def test_what_is_refused_anyway_is_refused_before_it_is_fetched(
    words, told, served, tmp_path, capfd, monkeypatch
):
    known = zoo.known() | {"llamagen-t2i-256": published.KNOWN["llamagen-t2i-256"]}
    monkeypatch.setattr(zoo, "known", lambda: known)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert told in command_line.refused(capfd, *words, "--yes")
    assert served.requests == []


def test_a_model_that_the_hub_lacks_is_told_before_its_tokenizer_is_fetched(served):
    del served.files[repository_file(NAME)]
    with pytest.raises(errors.UserError, match=r"has no var_d16.pth .*HF_ENDPOINT"):
        pulling.pull(NAME, yes=True)
    assert not [line for line in served.asked() if line.startswith("GET")]


def test_without_a_hub_the_file_that_is_missing_has_its_own_command(served, small, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = next(iter(small[1].values()))
    with pytest.raises(errors.UserError, match=f"then: tokgen pull {TOKENIZER} --file PATH"):
        pulling.pull(NAME, yes=True, file=file)


def test_a_slash_after_a_name_and_a_folder_that_hides_one(here, tmp_path, monkeypatch):
    with pytest.raises(errors.UserError, match=f"is called {NAME}, without a slash"):
        checkpoint.find(f"{NAME}/")
    (tmp_path / NAME).mkdir()
    with pytest.raises(errors.UserError, match="hides the published model"):
        checkpoint.find(NAME)


def test_a_name_in_python_is_not_fetched_unasked(served):
    with pytest.raises(errors.UserError, match=r'tokgen pull var-d16 .* tokgen.pull\("var-d16"'):
        tokgen.sample(NAME)
    assert served.requests == []


def test_a_name_that_is_misspelt(served):
    with pytest.raises(errors.UserError, match="did you mean var-d16"):
        checkpoint.find("var-d15")
    with pytest.raises(errors.UserError, match="did you mean var-d16"):
        pulling.pull("var-d15", yes=True)
    with pytest.raises(errors.UserError) as caught:
        checkpoint.find("runs/nothing")
    assert "published" not in str(caught.value)


def test_a_folder_of_that_name_comes_first(here, said, tmp_path):
    checkpoint._tell_local.cache_clear()
    shutil.copytree(pulling.folder(TOKENIZER), tmp_path / NAME)
    assert checkpoint.find(NAME) == pathlib.Path(NAME) / "checkpoints" / "0"
    assert said[-1] == f"{NAME} is the one in this folder, not the published model of that name"


def test_a_file_that_the_user_has_is_imported_without_a_question(here, small):
    _, files = small
    pulling.remove(NAME)
    pulling.pull(NAME, file=files[repository_file(NAME)])
    assert here.requests == [] and kept() == [NAME, TOKENIZER]
    meta = checkpoint.read_meta(checkpoint.find(NAME))
    assert tuple(meta["classes"]) == imagenet.NAMES
    assert all(file.exists() for file in files.values())
    pulling.remove(NAME)
    with pytest.raises(errors.UserError, match="no file gone.pth: --file names"):
        pulling.pull(NAME, file="gone.pth")


def test_a_file_that_is_not_on_the_hub_has_its_address_told(served):
    for name in ELSEWHERE:  # of a generator its tokenizer's first
        with pytest.raises(errors.UserError) as caught:
            pulling.pull(name, yes=True)
        for words in (
            zoo.named("maskgit-tokenizer-256").address,
            "tokgen pull maskgit-tokenizer-256 --file FILE",
            "tokgen import FILE --system maskgit_tokenizer --out DIR",
        ):
            assert words in str(caught.value)
    assert served.requests == []


def test_what_is_removed_is_gone(here):
    assert "is removed; it took" in pulling.remove(NAME)
    assert kept() == [TOKENIZER] and pulling.remove(NAME) == f"{NAME} is not here"
    pulling.remove(TOKENIZER)
    assert kept() == [] and here.requests == []


@pytest.mark.long
def test_a_tokenizer_that_was_removed_is_brought_back_for_its_generator(here):
    assert f"; {NAME} will fetch it again" in pulling.remove(TOKENIZER)
    before = checkpoint.read_meta(checkpoint.find(NAME))["tokenizer"]["fingerprint"]
    with pytest.raises(errors.UserError, match="needs your word"):
        pulling.pull(NAME)
    pulling.pull(NAME, yes=True)
    assert not [line for line in here.asked() if "var_d16" in line]
    loaded = loading.load_generator(NAME)
    assert loading.load_tokenizer_of(loaded).fingerprint == before


def test_a_damaged_model_says_how_it_is_fetched_again(here):
    (file,) = pulling.folder(NAME).glob("checkpoints/0/meta/metadata")
    file.write_text("{")
    with pytest.raises(errors.UserError, match=f"tokgen pull {NAME} --remove, then tokgen pull"):
        loading.load_generator(NAME)


def test_a_damaged_tokenizer_is_told_before_its_generator_is_fetched(here):
    shutil.rmtree(pulling.folder(NAME))
    (file,) = pulling.folder(TOKENIZER).glob("checkpoints/0/meta/metadata")
    file.write_text("{")
    with pytest.raises(errors.UserError, match=f"tokgen pull {TOKENIZER} --remove, then"):
        pulling.pull(NAME, yes=True)
    assert here.requests == []


def test_a_removal_that_was_killed_is_gone_on_with(here):
    half = pulling.folder(NAME).with_name(f".{NAME}.removed")
    (half / "checkpoints").mkdir(parents=True)
    assert "is removed" in pulling.remove(NAME)
    assert kept() == [TOKENIZER]


def refused(name, file):
    raise errors.UserError("other keys")


def test_a_wrong_file_costs_nothing_of_what_was_fetched(here, small, monkeypatch):
    shutil.rmtree(pulling.folder(NAME))
    monkeypatch.setattr(pulling.hub, "TRIES", 1)
    here.cuts = 1
    with pytest.raises(errors.UserError, match="goes on"):
        pulling.pull(NAME, yes=True)
    monkeypatch.setattr(pulling, "_import", refused)
    with pytest.raises(errors.UserError, match="cannot be imported as var-d16: other keys"):
        pulling.pull(NAME, file=small[1][repository_file(TOKENIZER)])
    assert kept() == [f".{NAME}.fetched", TOKENIZER]


def test_of_one_file_under_two_names_the_first_is_told(here, said, monkeypatch):
    twin = f"{TOKENIZER}-512"
    known = zoo.known() | {twin: zoo.named(TOKENIZER)}
    monkeypatch.setattr(zoo, "known", lambda: known)
    with pytest.raises(errors.UserError, match="needs your word"):
        pulling.pull(twin)
    assert [line for line in said if f"tokgen export {TOKENIZER} --out DIR" in line]


def test_room_is_looked_for_before_anything_is_asked(served, monkeypatch):
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**5))
    with pytest.raises(errors.UserError, match=r"take .* MB; found 100 kB free .*TOKGEN_CACHE"):
        pulling.pull(NAME, yes=True)
    assert served.requests == []


def test_a_cache_that_cannot_be_made_is_one_message(served):
    runtime.cache_folder().mkdir()
    (runtime.cache_folder() / "models").write_text("a file")
    with pytest.raises(errors.UserError, match="models: file exists; see to its permissions"):
        pulling.pull(NAME, yes=True)
    assert served.requests == []


def test_a_file_of_another_model_leaves_nothing(here, small):
    shutil.rmtree(pulling.folder(NAME))
    served, files = here, small[1]
    served.files[repository_file(NAME)] = files[repository_file(TOKENIZER)]
    with pytest.raises(errors.UserError, match="var_d16.pth cannot be imported as var-d16: "):
        pulling.pull(NAME, yes=True)
    assert kept() == [TOKENIZER]


def test_what_was_fetched_is_imported_after_a_kill(served, small, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    def imported(file, out, system, **_):
        assert file.read_bytes() == small[1][repository_file(TOKENIZER)].read_bytes()
        out.mkdir()

    monkeypatch.setattr(importing, "import_file", killed)
    with pytest.raises(KeyboardInterrupt):
        pulling.pull(TOKENIZER, yes=True)
    assert kept() == [f".{TOKENIZER}.fetched"]
    served.requests.clear()
    monkeypatch.setattr(importing, "import_file", imported)
    pulling.pull(TOKENIZER, yes=True)
    assert served.requests == [] and kept() == [TOKENIZER]


def test_another_process_that_pulls_is_waited_for(served, said, monkeypatch):
    monkeypatch.setattr(pulling.locks, "WAIT", 0.01)
    place, found = pulling.folder(TOKENIZER), []
    place.parent.mkdir(parents=True)
    with pulling.locks.passing(place.with_name(f".{TOKENIZER}.pull"), "held"):
        second = threading.Thread(target=lambda: found.append(pulling.pull(TOKENIZER, yes=True)))
        second.start()
        while not [line for line in said if "is being pulled by process" in line]:
            time.sleep(0.01)
        place.mkdir()  # as the first one does when it is done
    second.join()
    assert found == [place] and served.requests == []


FIXTURES = {  # generator and tokenizer: the rows whose systems they are of, fields that fit
    ("rar", "maskgit_vqgan"): ("rar-b", {"maskgit-vqgan": ("view.size=8,8",)}),
    ("var", "var_vqvae"): ("var-d16", {}),
    ("llamagen_c2i", "llamagen_vq"): ("llamagen-b", {"llamagen-tokenizer": ("view.size=8,8",)}),
}


@pytest.mark.long
@pytest.mark.parametrize("pair", FIXTURES)
def test_files_of_the_original_code_come_by_name(pair, shared, tmp_path, monkeypatch):
    name, overrides = FIXTURES[pair]
    rows, files = {}, {}
    for folder, one in zip(pair, (name, published.KNOWN[name].tokenizer), strict=True):
        fixture, row = parity.Folder(shared / "parity" / folder), published.KNOWN[one]
        said = dict(configuration=fixture.config, overrides=overrides.get(one, ()))
        rows[one] = dataclasses.replace(row, parameters=10, size=10, **said)
        files[f"{row.repository}/{row.file}"] = fixture.file()
    monkeypatch.chdir(tmp_path)
    with published.served(rows, files, tmp_path, monkeypatch):
        words = ("sample", name, "--classes", "3", "--number", "1", "--yes", "--out", "look")
        assert command_line.call(*words) == 0
    assert loading.load_generator(pulling.folder(name)).classes[3] == "3"  # it has but ten

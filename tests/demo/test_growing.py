"""A page is there while the demo trains, says what is done, and stands in the way of no result."""

import pytest

from tests.demo.test_demo import measured
from tokgen import image_grid
from tokgen.demo import demo, growing, page
from tokgen.interfaces import UserError

REFRESH = 'http-equiv="refresh"'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a demo without trainings; (stage that is killed, what is looked at there)."""
    seen, stops = [], []
    file = tmp_path / "out" / "index.html"

    def passed(name, folder):
        seen.append((name, file.read_text() if file.exists() else ""))
        if stops and stops[-1] == name:
            raise stops.pop() and KeyboardInterrupt
        folder.mkdir(exist_ok=True)

    def train(program, settings, workdir, steps, given=()):
        passed(workdir.name, workdir)
        (workdir / "images").mkdir(exist_ok=True)
        name = {"tokenizer": "reconstructions-0000001.png", "generator": "samples-0000001.png"}
        for drawn in (workdir / "images" / name[workdir.name], workdir / "curves.png"):
            image_grid.save_png(drawn, measured()[1]["pairs"])

    monkeypatch.setattr(demo.local_classifier, "load_or_train", lambda: None)
    monkeypatch.setattr(demo.runtime, "devices", lambda batch: None)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "pretokenize", lambda tokenizer, out: passed("tokens", out))
    monkeypatch.setattr(demo, "measure", lambda *words: measured())
    monkeypatch.setattr(demo.edited, "measure", lambda *words: (measured()[0]["edits"], {}))

    def run(*killed, steps=1, overwrite=False):
        seen.clear()
        stops.extend(killed)
        options = dict(tokenizer_steps=steps, generator_steps=2, samples=10)
        demo.run(tmp_path / "out", overwrite=overwrite, **options)

    run.seen, run.file = seen, file
    return run


def test_the_page_grows_and_the_last_one_is_the_whole(run):
    run()
    first, second, third = (text for _, text in run.seen)
    assert all(REFRESH in text for text in (first, second, third))
    assert "The tokenizer is trained</th><td>now" in first and first.count("to come") == 4
    assert "The tokenizer is trained</th><td>done in 0 s" in second and "<img" not in first
    assert second.count("<img") == third.count("<img") == 2
    whole = run.file.read_text()
    assert REFRESH not in whole and growing.MARK not in whole and page.TITLE in whole
    assert not (run.file.parent / growing.SECONDS).exists()
    assert "The tokenizer is trained</th><td>0 s" in whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_demo_that_was_stopped_says_so_and_goes_on(run, overwrite):
    with pytest.raises(KeyboardInterrupt):
        run("generator", overwrite=overwrite)
    stopped = run.file.read_text()
    assert "was stopped; the same command" in stopped and REFRESH not in stopped
    if not overwrite:
        with pytest.raises(UserError, match="tokenizer_steps: 1 there, 3 here"):
            run(steps=3)
        assert run.file.read_text() == stopped
    run(overwrite=overwrite)
    assert REFRESH in run.seen[0][1] and "done in" in run.seen[0][1]
    assert "since it was gone on with" in run.file.read_text()


def test_what_was_killed_leaves_no_result_in_the_way(run):
    run.file.parent.mkdir()
    run.file.write_text("a page of something else")
    with pytest.raises(UserError, match="not empty"):
        run()
    assert run.file.read_text() == "a page of something else"
    run.file.write_text(growing.MARK)
    run()
    assert page.TITLE in run.file.read_text()


def test_an_earlier_page_stays_until_the_new_one_is_whole(run):
    run()
    whole = run.file.read_text()
    with pytest.raises(KeyboardInterrupt):
        run("tokens", steps=2, overwrite=True)
    assert run.seen[-1][1] == run.file.read_text() == whole
    beside = run.file.parent.with_name(".out.part") / "index.html"
    assert "was stopped" in beside.read_text()
    run(steps=2, overwrite=True)
    assert not beside.exists() and "gone on with" in run.file.read_text()

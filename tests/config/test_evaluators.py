"""The section `evaluators`: begun and changed by overrides, held against what each kind takes."""

import pathlib

import pytest

from tokgen.checkpoints import continuation
from tokgen.config import building, evaluators, reading
from tokgen.interfaces import UserError
from tokgen.training import fields

GENERATOR, TOKENIZER = "configs/generator/shapes.py", "configs/tokenizer/shapes.py"
BEGIN = ("evaluators.fid.kind=score", "evaluators.fid.every=50", "evaluators.fid.reference=r.npz")


def test_a_config_without_the_section_has_none():
    for config, check in ((GENERATOR, fields.check_generator), (TOKENIZER, fields.check_tokenizer)):
        settings = reading.load(config)
        assert "evaluators" not in settings and evaluators.of(settings) == {}
        check(settings)


def test_a_command_line_begins_evaluators_and_types_their_arguments():
    """In any order; several of a kind, and what a kind leaves to its default."""
    overrides = (*reversed(BEGIN), "evaluators.fid.metrics=('fid',)", "evaluators.fid.samples=7")
    other = (name.replace(".fid.", ".plain.") for name in BEGIN)
    overrides += (*other, "evaluators.plain.preset=no_guidance", "evaluators.look.kind=grid")
    settings = reading.load(GENERATOR, (*overrides, "evaluators.look.every=0"))
    fields.check_generator(settings)
    found = evaluators.of(settings)
    score = evaluators.Score(kind="score", every=50, reference="r.npz", samples=7, metrics=("fid",))
    plain = evaluators.Score(kind="score", every=50, reference="r.npz", preset="no_guidance")
    assert found == {"fid": score, "plain": plain}  # a period of 0 is none
    settings = reading.load(
        TOKENIZER, ("evaluators.own.kind=reconstruction", "evaluators.own.every=9")
    )
    reading.override(settings, ("evaluators.own.images=30", "evaluators.own.split=train"))
    fields.check_tokenizer(settings)
    assert evaluators.of(settings)["own"].shown == 32


def test_another_kind_keeps_what_both_take():
    settings = reading.load(GENERATOR, (*BEGIN, "evaluators.fid.seed=4"))
    reading.override(settings, ("evaluators.fid.kind=grid",))
    assert settings.evaluators.fid.to_dict() == {"kind": "grid", "every": 50, "seed": 4}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("evaluators.fid.kind=fid",), ["fid.kind", "score, likelihood, grid", "'fid'"]),
        (("evaluators.fid.kind=score", "evaluators.fid.kind=('score',)"), ["fid.kind"]),
        (
            ("evaluators.fid.every=5",),
            ["an evaluator begins with", "--config.evaluators.NAME.kind=score"],
        ),
        ((*BEGIN, "evaluators.fid.evry=5"), ["unknown config key", "evaluators.fid.every"]),
        ((*BEGIN, "evaluators.fid.every=often"), ["evaluators.fid.every", "int", "'often'"]),
        ((*BEGIN, "evaluators.fid.every=-1"), ["evaluators.fid.every", "from 0", "-1"]),
        (("evaluators.fid.kind=score",), ["needs 'every'", "needs 'reference'"]),
        ((*BEGIN, "evaluators.fid.preset=best"), ["fid.preset", "default, no_guidance", "'best'"]),
        ((*BEGIN, "evaluators.fid.accept=('all',)"), ["evaluators.fid.accept", "few", "'all'"]),
        (
            [f"evaluators.a.{w}" for w in ("kind=likelihood", "every=1", "images=3", "split=test")],
            ["evaluators.a.split", "held_out, train", "'test'"],
        ),
        (("evaluators.train.kind=grid", "evaluators.train.every=1"), ["evaluators.train", "none"]),
        (("evaluators.a-b.kind=grid", "evaluators.a-b.every=1"), ["evaluators.a-b", "letters"]),
    ],
)
def test_what_cannot_be_is_told_with_what_can(overrides, parts):
    with pytest.raises(UserError) as error:
        fields.check_generator(reading.load(GENERATOR, tuple(overrides)))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("kind", [["score"], {}, 3, None])
def test_a_kind_of_a_config_file_that_is_no_word(kind):
    settings = reading.load(GENERATOR)
    with settings.unlocked():
        settings.evaluators = {"fid": {"kind": kind, "every": 1}}
    with pytest.raises(UserError, match=r"evaluators\.fid"):
        fields.check_generator(settings)


def test_kinds_are_those_of_what_is_trained():
    with pytest.raises(UserError, match="score, reconstruction; found 'grid'"):
        reading.load(TOKENIZER, ("evaluators.look.kind=grid",))
    settings = reading.load(TOKENIZER)
    with settings.unlocked():
        settings.evaluators = {"a": {"kind": "likelihood", "every": 1}, "b": 3}
    with pytest.raises(
        UserError, match=r"a\.kind must be one of(.|\n)*evaluators\.b must be a sec"
    ):
        fields.check_tokenizer(settings)


def test_a_run_that_began_without_evaluators_goes_on_with_them():
    def checked(there, here):
        config, new = (building.plain(reading.load(GENERATOR, o)) for o in (there, here))
        record = {"kind": "generator", "layout": None, "classes": [], "tokenizer": None, "data": ""}
        meta = record | {"config": config}
        continuation.check(
            meta, pathlib.Path("1"), pathlib.Path("run"), new, record | {"held_out": ""}
        )

    checked((), BEGIN)
    checked(BEGIN, ())
    checked(BEGIN, (*BEGIN, "evaluators.fid.every=3"))
    with pytest.raises(UserError, match="seed"):
        checked((), (*BEGIN, "seed=5"))

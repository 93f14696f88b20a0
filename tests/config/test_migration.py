"""Words of earlier versions: read in today's, and told in the first again."""

import itertools
import re

import pytest

from tokgen.config import migration

TABLES = ("FIELDS", "VALUES", "PARAMETERS", "METRICS")
Row = migration.Row


@pytest.fixture
def words(monkeypatch):
    """Tables of the test's own, of each kind of row."""
    fields = (
        *(Row("", "rival", "opponent"), Row("opponent", "force", "weight")),
        Row(r"(encoder|decoder)(\..*)?", "bits", "pieces"),
        Row(r"stages\.\d+", "aim", "goal"),
    )
    monkeypatch.setattr(migration, "FIELDS", fields)
    monkeypatch.setattr(migration, "VALUES", (Row(r"opponent\.name", "old", "new"),))
    parameters = Row("", "rival", "opponent"), Row(r"(.*/)?params(/.*)?", "lead", "entry")
    monkeypatch.setattr(migration, "PARAMETERS", parameters)
    monkeypatch.setattr(migration, "METRICS", (Row("", "rival", "opponent_loss"),))


THEN = {
    "rival": {"force": 0.5, "name": "old", "other": "old"},
    "encoder": {"bits": 3, "pixels": {"name": "conv", "bits": 4}},
    "quantizer": {"bits": 5, "force": 1},
    "stages": [{"aim": "codes", "train": r"lead/.*|(.*/)?lead|leading/x", "bits": 1}],
    "optimizer": {"decayed": r"(.*/)?lead/kernel|rival"},
}
NOW = {
    "opponent": {"weight": 0.5, "name": "new", "other": "old"},
    "encoder": {"pieces": 3, "pixels": {"name": "conv", "pieces": 4}},
    "quantizer": {"bits": 5, "force": 1},
    "stages": [{"goal": "codes", "train": r"entry/.*|(.*/)?entry|leading/x", "bits": 1}],
    "optimizer": {"decayed": r"(.*/)?entry/kernel|rival"},
}


def test_config_is_told_in_todays_words_and_back(words):
    assert migration.config(THEN) == NOW
    assert migration.first_config(NOW) == THEN


def test_todays_words_stay(words):
    assert migration.config(NOW) == NOW
    assert migration.parameter("opponent/params/entry/kernel") == "opponent/params/entry/kernel"


def test_a_flag_becomes_a_name_and_back():
    then = {"generator": {"remat": True}, "decoder": {"codes": {"remat": False}}, "ema": True}
    now = {"generator": {"remat": "full"}, "decoder": {"codes": {"remat": "none"}}, "ema": True}
    assert migration.config(then) == now and migration.first_config(now) == then
    assert migration.first_config({"generator": {"remat": "dots"}})["generator"]["remat"] == "dots"


def test_both_words_of_a_field_are_refused(words):
    with pytest.raises(ValueError, match="field rival is there as opponent too"):
        migration.config({"rival": {}, "opponent": {}})


def test_paths_of_arrays_and_fields(words):
    assert migration.parameter("rival/params/a/lead/kernel") == "opponent/params/a/entry/kernel"
    assert migration.first_parameter("opponent/params/entry/b") == "rival/params/lead/b"
    assert migration.parameter("model/stats/rival/lead") == "model/stats/rival/lead"
    assert migration.field("rival.force") == "opponent.weight"
    assert migration.field("rival.optimizer.force") == "opponent.optimizer.force"
    assert migration.field("decoder.a.b.bits") == "decoder.a.b.pieces"


def test_metrics(words):
    assert migration.metrics({"rival": 1.0, "l2": 0.5}) == {"opponent_loss": 1.0, "l2": 0.5}


@pytest.mark.parametrize("table", TABLES)
def test_table_is_one_to_one_and_has_no_chains(table):
    """Two rows that may apply at one place share no word, so either direction is a function."""
    rows = getattr(migration, table)
    for row in rows:
        re.compile(row.where)
        assert row.then != row.now
        assert ("/" if table == "PARAMETERS" else ".") not in f"{row.then}{row.now}"
    for a, b in itertools.combinations(rows, 2):
        if a.where == b.where or table == "METRICS":
            assert len({a.then, a.now, b.then, b.now}) == 4, (a, b)

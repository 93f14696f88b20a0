"""`hf://OWNER/NAME/FOLDER` is a checkpoint in the hub's own cache."""

import sys
import types

import pytest

from tokgen.checkpoints import checkpoint
from tokgen.interfaces import UserError


def hub(tmp_path, asked):
    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404")
        return str(tmp_path)

    return types.SimpleNamespace(snapshot_download=snapshot_download)


def test_folder_of_a_repository(tmp_path, monkeypatch):
    asked = []
    step = tmp_path / "runs" / "tokenizer" / "checkpoints" / "7"
    (step / "meta").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(tmp_path, asked))
    found = checkpoint.find("hf://somebody/tokens/runs/tokenizer/checkpoints/7")
    assert found == step
    assert asked == [("somebody/tokens", ["runs/tokenizer/checkpoints/7/**"])]


def test_what_cannot_be_fetched_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(tmp_path, []))
    with pytest.raises(UserError, match="cannot fetch hf://nobody/nothing: 404"):
        checkpoint.find("hf://nobody/nothing")
    with pytest.raises(UserError, match="hf://OWNER/NAME"):
        checkpoint.find("hf:///x")

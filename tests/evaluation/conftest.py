"""What ranks candidates is held against the models that edits are tested with."""

from tests.editing.conftest import images, model, runs

__all__ = ["images", "model", "runs"]

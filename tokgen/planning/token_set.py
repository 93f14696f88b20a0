"""The tokens of a recipe on disk: what `tokgen pretokenize` would write of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tokgen import report
from tokgen.data import token_header, token_records, token_writer, views
from tokgen.interfaces import TokenLayout
from tokgen.planning import recipes

# How many images a recipe is for is known by its classes, where they are ImageNet's
CLASSES, IMAGENET, OTHERS = 1000, 1_281_167, 1_000_000


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Tokens of a layout, of so many views of every image."""

    layout: TokenLayout
    views: tuple[str, ...]

    @property
    def packing(self) -> token_records.Packing:
        """How its records are written."""
        layout = token_header.plain_layout(self.layout.to_json())
        return token_records.Packing(
            {
                "format": token_header.FORMAT,
                "layout": layout,
                "views": self.views,
                "classes": (),
                "dtype": token_header.smallest_integer(layout["vocab"]),
            }
        )

    @property
    def image(self) -> int:
        """Bytes of an image's records: tokens of all views, each with the label."""
        return self.packing.records_each * self.packing.width

    def most(self, images: int) -> int:
        """Bytes of the shards of so many images, at most: tokens that repeat are compressed."""
        shards = token_header.shards_of_split("train", images, token_writer.SHARD)
        each, width = self.packing.records_each, self.packing.width
        return sum(token_records.most((s.stop - s.start) * each, width) for s in shards)


def rows(recipe: recipes.Recipe) -> Iterator[tuple[str, str]]:
    """What a recipe needs of a disk, in words: a generator's tokens, and features of texts.

    A tokenizer's images are there already.
    """
    known = recipe.settings.get("made_for", {}).get("classes") == CLASSES
    images, whose = (IMAGENET, "ImageNet's ") if known else (OTHERS, "every ")
    if "generator" in recipe.settings:
        yield "tokens on disk", _tokens(recipe, images, whose)
    if (text := recipe.dearest.step.batch.get("text")) is not None:
        _, length, channels = text.shape
        image = 2 * length * channels  # float16, as their files may be
        yield (
            "texts on disk",
            f"{report.amount(image * images)} for {whose}{images:,} images, beside them: of one "
            f"{report.amount(image)}, {length} features of {channels:,} numbers in float16, twice "
            "as much in float32; tokgen writes none (docs/data.md)",
        )


def _tokens(recipe: recipes.Recipe, images: int, whose: str) -> str:
    layout, stored = (
        recipe.dearest.step.frozen.layout,
        recipe.settings.data.get("views", "center,flip"),
    )
    tokens = TokenSet(layout, views.stored(stored))
    symbols = f" x {layout.groups}" if layout.groups > 1 else ""
    many = "s" if len(tokens.views) > 1 else ""
    return (
        f"at most {report.amount(tokens.most(images))} for {whose}{images:,} images; of one "
        f"{report.amount(tokens.image)} before compression: {len(tokens.views)} view{many} of "
        f"{layout.length}{symbols} tokens in {tokens.packing.dtype.name}"
    )

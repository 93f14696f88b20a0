"""A record of token shards: the label, then the tokens of a view, in as few bytes as they need.

A label is a little-endian uint32; after it come L x G tokens, little-endian, in the smallest
unsigned integer that holds the alphabet. The views of an image follow each other, so that training,
which wants one of them, reads one. Until format 3 a record held all views of an image.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from array_record.python import array_record_module

from tokgen.data import token_header

_LABEL_BYTES = 4
# One record per group: a read decodes what it asked for and nothing else.
_WRITER_OPTIONS = "group_size:1"
# Reading ahead is waste where every read goes somewhere else.
_READER_OPTIONS = "readahead_buffer_size:0"
# Of a file beside what its records hold, as array_record 0.8 was measured to write it: of each
# record its header and its place in the index, a header in every block; two blocks, and a third
# that is filled up
_RECORD, _BLOCK, _BLOCK_HEADER, _BLOCKS = 68, 2**16, 24, 3


class Packing:
    """Between arrays and records, as a header describes them."""

    def __init__(self, header: Mapping):
        vocab, grids = header["layout"]["vocab"], header["layout"]["grids"]
        self.vocab_G = np.array(vocab, np.int64)
        self.labels = max(1, len(header["classes"]))
        length = sum(rows * columns for rows, columns in grids)
        self.shape = (len(header["views"]), length, len(vocab))
        # of an image, each with an equal part of its views
        self.records_each = self.shape[0] if header["format"] >= token_header.BY_VIEW else 1
        self.dtype = np.dtype(header["dtype"]).newbyteorder("<")
        # in memory: on the way to the device no more bytes than these are moved
        self.loaded = np.dtype(token_header.loaded_integer(vocab))
        held = math.prod(self.shape) // self.records_each
        self.width = _LABEL_BYTES + held * self.dtype.itemsize

    def records(self, tokens_BXLG: np.ndarray, label_B: np.ndarray) -> np.ndarray:
        """uint8 [B x records_each, width]"""
        tokens_BXLG, label_B = np.asarray(tokens_BXLG), np.asarray(label_B)
        shape = (len(label_B), *self.shape)
        if tokens_BXLG.shape != shape or tokens_BXLG.dtype.kind not in "iu":
            raise ValueError(
                f"tokens must be integers {shape}: images, views, positions, symbols; found "
                f"{tokens_BXLG.dtype} {tokens_BXLG.shape}"
            )
        problem = self.range_problem(tokens_BXLG, label_B)
        if problem:
            raise ValueError(problem)
        count = len(label_B) * self.records_each
        tokens_RU = np.ascontiguousarray(tokens_BXLG.astype(self.dtype)).reshape(count, -1)
        labels_R1 = np.repeat(label_B.astype("<u4"), self.records_each)[:, None]
        return np.concatenate([labels_R1.view(np.uint8), tokens_RU.view(np.uint8)], axis=1)

    def places(self, image: int, view: int | None) -> list[int]:
        """Which records of a shard hold a view of its image with that number; None: all views."""
        first = image * self.records_each
        if view is None or self.records_each == 1:
            return list(range(first, first + self.records_each))
        return [first + view]

    def unpack(self, records: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """`loaded` [R, views of a record, L, G] and int64 [R]"""
        record_RU = np.frombuffer(b"".join(records), np.uint8).reshape(-1, self.width)
        labels_R1 = np.ascontiguousarray(record_RU[:, :_LABEL_BYTES]).view("<u4")
        tokens_RU = np.ascontiguousarray(record_RU[:, _LABEL_BYTES:]).view(self.dtype)
        shape = (self.shape[0] // self.records_each, *self.shape[1:])
        return (
            tokens_RU.reshape(-1, *shape).astype(self.loaded, copy=False),
            labels_R1[:, 0].astype(np.int64),
        )

    def range_problem(self, tokens_BXLG: np.ndarray, label_B: np.ndarray) -> str:
        """What lies outside its alphabet; empty if nothing does."""
        if not len(label_B):
            return ""
        low_G, high_G = tokens_BXLG.min(axis=(0, 1, 2)), tokens_BXLG.max(axis=(0, 1, 2))
        for symbol, (low, high) in enumerate(zip(low_G, high_G, strict=True)):
            if low < 0 or high >= self.vocab_G[symbol]:
                return (
                    f"tokens of symbol {symbol} must lie in [0, {self.vocab_G[symbol]}); found "
                    f"{low} to {high}"
                )
        if label_B.min() < 0 or label_B.max() >= self.labels:
            return (
                f"labels must lie in [0, {self.labels}); found {label_B.min()} to {label_B.max()}"
            )
        return ""


def most(count: int, width: int) -> int:
    """Bytes of a file of `count` records of `width` bytes, at most: what repeats is compressed."""
    inside = -(-count * (width + _RECORD) * _BLOCK // (_BLOCK - _BLOCK_HEADER))
    return inside + _BLOCKS * _BLOCK


def reader(path: str) -> array_record_module.ArrayRecordReader:
    """Reads the records of a file, a few here and there."""
    return array_record_module.ArrayRecordReader(path, options=_READER_OPTIONS)


def writer(path: str) -> array_record_module.ArrayRecordWriter:
    """Writes a file that `reader` reads a few records of at little cost."""
    return array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)

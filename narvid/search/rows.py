"""What an index holds, row by row, wherever it lies: files, frames, windows, the bytes of features; and a filter.

Not here: tables (store.py), collections (milvus_store.py).

Shapes: K frames of a window, n windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np

HALF = ("look",)  # fields that are kept in 16 bits: no score of a text reads them


class File(NamedTuple):
    """A video file; `path` is relative to the videos folder, with slashes. why: "" or why it could not be read."""

    id: int
    path: str
    size: int  # bytes
    mtime_ns: int
    seconds: float
    why: str
    note: str  # what is amiss in a file that is indexed nevertheless
    narration: str  # which narration it was indexed with, as build.py marks it; its column is called told
    content: str = ""  # a digest of the file, "" in an index of version 1
    recorded: float | None = None  # seconds since 1970, where the file says when it was recorded
    speech: str = ""  # what its speech was read from, as speech_sources.py marks it; "": not looked for yet
    speech_note: str = ""  # what is amiss in that


class Filter(NamedTuple):
    """Of which files windows may be answers, as `Store.all_windows` takes it."""

    folder: str = ""
    min_seconds: float = 0.0
    max_seconds: float = inf
    since: float = -inf
    until: float = inf
    has_speech: bool = False


EVERY = Filter()  # which leaves nothing out


class Frame(NamedTuple):
    """A frame of a file, counted from 0; `time` in seconds from the file's first frame."""

    number: int
    time: float
    sentence: str | None


class Window(NamedTuple):
    """A stretch of a file in seconds; picks: the numbers of its K frames or fewer, in order."""

    id: int
    file: int
    path: str
    start: float
    end: float
    picks: list[int]


def text_of(text: str) -> str:
    """What SQLite can hold: bytes of a file name that are not UTF-8 are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def pack(features: dict[str, np.ndarray | None], n: int, known: dict | None) -> tuple[np.ndarray, dict]:
    """Fields (n, ...) -> their bytes side by side (n, bytes), and {name: [type, shape of a row] or None}.

    known: the layout of what is there already, whose types are taken; HALF stands for what else is kept in 16 bits.
    """
    layout, parts = dict.fromkeys(features), [np.empty((n, 0), np.uint8)]
    for name, field in features.items():
        if field is not None:
            kind = "<f2" if name in HALF else field.dtype
            if known and known.get(name) and np.issubdtype(field.dtype, np.floating):
                kind = known[name][0]
            rows = np.ascontiguousarray(field, kind)
            layout[name] = [rows.dtype.str, list(rows.shape[1:])]
            parts.append(rows.reshape(n, -1).view(np.uint8))
    return np.concatenate(parts, axis=1), layout


def unpack(layout: dict, rows: Sequence[bytes]) -> dict[str, np.ndarray | None]:
    """What `pack` made, n rows -> {name: (n, ...) or None}."""
    found = {name: field and np.empty((len(rows), *field[1]), field[0]) for name, field in layout.items()}
    for i, row in enumerate(rows):
        start = 0
        for field in found.values():
            if field is not None:
                field[i] = np.frombuffer(row, field.dtype, field[i].size, start).reshape(field.shape[1:])
                start += field[i].nbytes
    return found

"""What is said in the files of an index in Milvus: what speech_store.py offers, without its database.

  NAME_said      file, row: [what it was read from, what is amiss, put, utterances]
  NAME_speech    id, file, put, middle: seconds, words: their stems, windows: ids, row: [start, end, text], v: vector

What is said in a file is written in one go, a put, and is there when the file's row in NAME_said names that put: it is
written last, in one step. Utterances of another put are never found; the writer deletes them, or the next one does.

Shapes: m utterances, D numbers of a vector, P texts.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from narvid.search.milvus import MOST, pieces
from narvid.search.rows import EVERY, Filter
from narvid.search.speech_store import TOKENS, Utterance

if TYPE_CHECKING:
    from narvid.search.milvus_store import MilvusStore

FIELDS = {  # as in milvus_store.py
    "said": {"file": "INT64", "row": "pieces"},
    "speech": {"id": "INT64", "file": "INT64", "put": "INT64", "middle": "DOUBLE", "words": "pieces", "windows": "ids",
               "row": "pieces"},
}
TOGETHER = 16  # texts in a search
_one = threading.Lock()  # around `_splitter`


class MilvusSpeech:
    """The speech of an open MilvusStore; what it offers is what SpeechStore offers, the arguments are the same."""

    def __init__(self, store: MilvusStore):
        self.store, self.milvus, self._dim, self._room, self._last = store, store.milvus, None, False, None

    @property
    def exists(self) -> bool:
        """Whether there is room for it: an older index gets that when it is opened for writing."""
        self._room = self._room or self.milvus.has("said")
        return self._room

    def make(self) -> None:
        """Room for speech, where there is none."""
        self.milvus.make("said", FIELDS["said"])

    # ---- a file's ----

    def put(self, file: int, source: str, note: str, said: Sequence[tuple[float, float, str]],
            vectors: np.ndarray) -> None:
        """Store what is said in a file in place of what was there."""
        state, rows = self.store.ready(), np.asarray(vectors, np.float16).astype(np.float32)  # as in SQLite
        if said and not self._width():
            self.milvus.make("speech", FIELDS["speech"], rows.shape[1])
        windows = self.store.windows_of_file(file) if said else []
        before, first = self._marks([file]).get(file, (0,))[-1], state.get("utterance", 1)
        self.store.take_in_hand(state | {"utterance": first + max(1, len(said))}, {
            "file": file, "put": first, "heard": bool(said or before),
            "add": {"spoken": bool(said) - bool(before), "utterances": len(said) - before}})
        self.milvus.insert("speech", ({
            "id": first + i, "file": file, "put": first, "middle": (start + end) / 2, "words": stems(text),
            "windows": [id for id, begin, until in windows if begin <= (start + end) / 2 < until],
            "row": pieces(json.dumps([start, end, text])), "v": row}
            for i, ((start, end, text), row) in enumerate(zip(said, rows, strict=True))), 8 * max(1, rows.shape[1]))
        if said:
            self.store.check_whole("speech", f"file == {file} and put == {first}", len(said),
                                   f"what is said in {self.store.file(file).path}")
        self.milvus.upsert("said", {"file": file, "row": pieces(json.dumps([source, note, first, len(said)]))})
        self.finish(written=True)

    def drop(self) -> None:
        """Forget all speech, and that it was looked for."""
        self.store.take_in_hand(self.store.ready(), {"put": None})
        self.finish()

    def finish(self, written: bool | None = None) -> None:
        """Bring a put or a drop in hand to an end: delete what is left of the other state, say what has changed.

        written: the put is there, None: look.
        """
        state = self.store.state()
        hand = state["hand"]
        if hand["put"] is None:
            self.milvus.delete("said", "file >= 0")  # not the collections: readers have them open
            if self._width():
                self.milvus.delete("speech", "id >= 0")
            self.store.let_go(state, {name: -state.get(name, 0) for name in ("spoken", "utterances")})
            return
        if written is None:
            mark = self._marks([hand["file"]]).get(hand["file"])
            written = mark is not None and mark[2] == hand["put"]
        if self._width():
            other = f"put != {hand['put']}" if written else f"put == {hand['put']}"
            self.milvus.delete("speech", f"file == {hand['file']} and {other}")
        self.store.let_go(state, hand["add"] if written and hand["heard"] else None)  # silence changes no answer

    def forget(self, files: Sequence[int]) -> None:
        """Delete all that is said in files which are gone."""
        if self.exists:
            self.milvus.delete("said", f"file in {files}")
        if self._width():
            self.milvus.delete("speech", f"file in {files}")

    def of_file(self, file: int) -> list[Utterance]:
        """All that is said in a file, in time order."""
        _, _, put, count = self._marks([file]).get(file, ("", "", 0, 0))
        where = f"file == {int(file)} and put == {put}"
        rows = [row for page in self._pages(where, ["id", "middle", "row"]) for row in page] if count else []
        return [_utterance(row) for row in sorted(rows, key=lambda row: (row["middle"], row["id"]))]

    def count(self) -> tuple[int, int]:
        """The number of files in which something is said, and of utterances."""
        state = self.store.state()
        return state.get("spoken", 0), state.get("utterances", 0)

    def marks(self) -> dict[int, tuple[str, str]]:
        """Of each file in which speech was looked for: what it was read from, and what is amiss."""
        pages = self.milvus.pages("said", "", ["file", "row"]) if self.exists else ()
        return {row["file"]: tuple(json.loads("".join(row["row"]))[:2]) for page in pages for row in page}

    def counts_of(self, files: Iterable[int]) -> tuple[int, int]:
        """`count`, of these files."""
        counts = [mark[3] for mark in self._marks(files).values()]
        return sum(map(bool, counts)), sum(counts)

    # ---- all of it ----

    def ids(self, where: Filter = EVERY) -> np.ndarray:
        """Ids (m,) int64 of all utterances, or of those in the files that a filter leaves, rising."""
        return self._there([row for page in self._pages("", ["id", "file", "put"]) for row in page], where)

    def within(self, ids: np.ndarray, where: Filter) -> np.ndarray:
        """Which of these utterances (n,) are said in a file that the filter leaves."""
        if where == EVERY:
            return np.ones(len(ids), bool)
        return np.isin(ids, self._there(self._rows(ids, ["id", "file", "put"]).values(), where))

    def nearest(self, eos: np.ndarray, count: int, where: Filter) -> list[np.ndarray]:
        """For each of P texts (P, D) ids of the `count` utterances nearest to it, of those that the filter leaves."""
        if not self._width():
            return [np.empty(0, np.int64)]
        files = self._left(where)
        asked = "" if files is None else f"file in {sorted(files)}"
        blocks = (eos[start:start + TOGETHER].astype(np.float32) for start in range(0, len(eos), TOGETHER))
        return [self._there(hits, EVERY) for block in blocks for hits in self.milvus.nearest(
            "speech", block, min(count, MOST), asked, ["file", "put"], None, 1.0)]

    def of_windows(self, windows: Sequence[int]) -> tuple[np.ndarray, list[Utterance], np.ndarray]:
        """What is said in these windows: the place (m,) of each utterance's window among them, rising; the utterances,
        in time order within a window; their vectors (m, D) float32.
        """
        place_of = {int(id): place for place, id in enumerate(windows)}
        rows = [row for start in range(0, len(place_of), 1000) if self._width() for page in self._pages(
            f"array_contains_any(windows, {[*place_of][start:start + 1000]})",
            ["id", "file", "put", "middle", "windows", "row", "v"]) for row in page]
        there = set(self._there(rows, EVERY).tolist())
        found = sorted({(place_of[window], row["middle"], row["id"]): row for row in rows if row["id"] in there
                        for window in row["windows"] if window in place_of}.items())
        places = np.fromiter((place for (place, _, _), _ in found), np.int64, len(found))
        vectors = np.array([row["v"] for _, row in found], np.float32).reshape(len(found), self._width() or 0)
        return places, [_utterance(row) for _, row in found], vectors

    def windows_of(self, utterances: Sequence[int]) -> np.ndarray:
        """Ids of the windows in which these utterances are said, each once, rising."""
        return self._windows(self._rows(utterances, ["id", "file", "windows"]).values())

    def speaking(self, where: Filter) -> np.ndarray:
        """Ids of the windows in which something is said, of the files that the filter leaves, rising."""
        rows = [row for page in self._pages("", ["id", "file", "put", "windows"]) for row in page]
        there = set(self._there(rows, where).tolist())
        return self._windows([row for row in rows if row["id"] in there])

    def with_word(self, word: str, most: int) -> np.ndarray:
        """Ids of the utterances that hold a word, in whichever of its English forms; at most so many, rising."""
        if not (parts := stems(word)) or not most or not self._width():
            return np.empty(0, np.int64)
        asked, fields = f"array_contains_all(words, {json.dumps(parts)})", ["id", "file", "put"]
        rows = self.milvus.rows("speech", asked, fields, min(most, MOST))
        if len(rows) == MOST < most:
            rows = [row for page in self._pages(asked, fields) for row in page]
        return self._there(rows, EVERY)[:most]

    # ---- inside ----

    def _marks(self, files: Iterable[int]) -> dict[int, tuple[str, str, int, int]]:
        """NAME_said of these files, those that are in it."""
        asked = [int(file) for file in files] if self.exists else []
        rows = self.milvus.get("said", "file", asked, ["file", "row"])
        return {file: tuple(json.loads("".join(row["row"]))) for file, row in rows.items()}

    def _left(self, where: Filter) -> set[int] | None:
        """Ids of the files that a filter leaves, None for all; a search asks several times, so the last are kept."""
        if where._replace(has_speech=False) == EVERY:
            return None
        last, change = self._last, self.store.change
        if last is None or last[:2] != (change, where):
            last = self._last = change, where, self.store.files_of(where)[0]
        return last[2]

    def _there(self, rows: Iterable[dict], where: Filter) -> np.ndarray:
        """Ids, rising, of those of these utterances that their file's put holds, in files that the filter leaves."""
        rows, left = list(rows), self._left(where)
        if not rows:
            return np.empty(0, np.int64)
        puts = {file: mark[2] for file, mark in self._marks({row["file"] for row in rows}).items()}
        return np.array(sorted(row["id"] for row in rows if puts.get(row["file"]) == row["put"]
                               and (left is None or row["file"] in left)), np.int64)

    def _windows(self, rows: Collection[dict]) -> np.ndarray:
        """The windows of these utterances, without those of a file that is gone, or on its way out."""
        files = self.store.visible({row["file"] for row in rows})
        return np.unique(np.array([id for row in rows if row["file"] in files for id in row["windows"]], np.int64))

    def _rows(self, ids: Sequence[int], fields: Sequence[str]) -> dict[int, dict]:
        return self.milvus.get("speech", "id", ids, fields) if len(ids) and self._width() else {}

    def _pages(self, where: str, fields: Sequence[str]) -> Iterator[list[dict]]:
        return self.milvus.pages("speech", where, fields) if self._width() else iter(())

    def _width(self) -> int | None:
        """D; None as long as nothing was ever said."""
        if self._dim is None and self.milvus.has("speech"):
            self._dim = self.milvus.dim("speech")
        return self._dim


@lru_cache(maxsize=1)
def _splitter() -> sqlite3.Connection | None:
    """SQLite's full-text search as a splitter of texts, so that a word is the same here and there."""
    database = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        database.execute(f"CREATE VIRTUAL TABLE texts USING fts5(text, {TOKENS})")
        database.execute("CREATE VIRTUAL TABLE terms USING fts5vocab(texts, 'row')")
    except sqlite3.OperationalError:  # this SQLite has none
        return None
    return database


def stems(text: str) -> list[str]:
    """The different words of a text, in their stems where SQLite can find those."""
    if (database := _splitter()) is None:
        return sorted(set(text.casefold().split()))
    with _one:
        database.execute("DELETE FROM texts")
        database.execute("INSERT INTO texts VALUES (?)", (text,))
        return [term for term, in database.execute("SELECT term FROM terms LIMIT 4096")]  # an ARRAY holds no more


def _utterance(row: dict) -> Utterance:
    return Utterance(row["id"], *json.loads("".join(row["row"])))

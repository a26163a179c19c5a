"""What is said in the files, in the index's database: utterances with their times, found by word, window or number.

Here: the tables and their SQL, the nearest vectors. Not here: where utterances come from (speech_sources.py), what they
are worth to a query (speech.py), files and windows (store.py), an index in Milvus (milvus_speech.py).

An utterance belongs to the windows that its middle lies in. Words are found by SQLite's full-text search (FTS5), which
triggers keep in step within the same transaction; a database that was made without FTS5 is read through instead.

Shapes: m utterances, D numbers of a vector, P texts.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from narvid.search.rows import EVERY, Filter
from narvid.search.stage_one import StageOne, up_to_date

if TYPE_CHECKING:
    from narvid.search.store import Store

SCHEMA = """
CREATE TABLE speech_of (file INTEGER PRIMARY KEY REFERENCES files ON DELETE CASCADE, source TEXT NOT NULL,
    note TEXT NOT NULL);
CREATE TABLE speech (id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
    middle REAL NOT NULL, start REAL NOT NULL, "end" REAL NOT NULL, text TEXT NOT NULL, vector BLOB NOT NULL);
CREATE INDEX speech_of_file ON speech (file, middle)
"""
TOKENS = "tokenize='porter unicode61 remove_diacritics 2'"
WORDS = (  # foreign keys fire triggers too: what is removed with a file is removed here
    f"CREATE VIRTUAL TABLE speech_words USING fts5(text, content=speech, content_rowid=id, {TOKENS})",
    "CREATE TRIGGER speech_put AFTER INSERT ON speech BEGIN "
    "INSERT INTO speech_words (rowid, text) VALUES (new.id, new.text); END",
    "CREATE TRIGGER speech_gone AFTER DELETE ON speech BEGIN "
    "INSERT INTO speech_words (speech_words, rowid, text) VALUES ('delete', old.id, old.text); END",
)
TRAINED_ON = 50_000  # utterances at most that the index of vectors is trained on
HEARD_IN = 'speech.file = windows.file AND middle >= windows.start AND middle < windows."end"'


class Utterance(NamedTuple):
    """What is said from `start` to `end`, in seconds of its file."""

    id: int
    start: float
    end: float
    text: str


class SpeechStore:
    """The speech of an open Store, which creates its tables. Where they are missing, in an older index that cannot be
    written to, nothing is said.
    """

    def __init__(self, store: Store):
        self.store = store
        self._index, self._last = None, None

    @staticmethod
    def create(run) -> None:
        """The tables, in a transaction; without the one for words where this SQLite lacks FTS5."""
        for statement in SCHEMA.split(";"):
            run(statement)
        try:
            for statement in WORDS:
                run(statement)
        except sqlite3.OperationalError as error:
            if "no such module" not in str(error):
                raise

    @property
    def exists(self) -> bool:
        """Whether there are tables."""
        return self._has("speech_of")

    # ---- a file's ----

    def put(self, file: int, source: str, note: str, said: Sequence[tuple[float, float, str]],
            vectors: np.ndarray) -> None:
        """Store what is said in a file, in one transaction, in place of what was there.

        source: what it was read from, as speech_sources.py marks it; note: what is amiss. said: (start, end, text) of m
        utterances, which lie within the file; vectors (m, D).
        """
        rows = np.ascontiguousarray(vectors, "<f2")
        heard = said or self.of_file(file)  # silence changes no answer
        with self.store.changing() if heard else self.store.transaction() as run:
            run("DELETE FROM speech WHERE file = ?", (file,))
            run("INSERT OR REPLACE INTO speech_of VALUES (?, ?, ?)", (file, source, note))
            for (start, end, text), row in zip(said, rows, strict=True):
                run('INSERT INTO speech (file, middle, start, "end", text, vector) VALUES (?, ?, ?, ?, ?, ?)',
                    (file, (start + end) / 2, start, end, text, row.tobytes()))

    def drop(self) -> None:
        """Forget all speech, and that it was looked for."""
        with self.store.changing() as run:
            run("DELETE FROM speech")
            run("DELETE FROM speech_of")

    def of_file(self, file: int) -> list[Utterance]:
        """All that is said in a file, in time order."""
        sql = 'SELECT id, start, "end", text FROM speech WHERE file = ? ORDER BY middle, id'
        return [Utterance(*row) for row in self.store.all(sql, file)] if self.exists else []

    def count(self) -> tuple[int, int]:
        """The number of files in which something is said, and of utterances."""
        sql = "SELECT count(DISTINCT file), count(*) FROM speech"
        return self.store.all(sql)[0] if self.exists else (0, 0)

    # ---- all of it ----

    def ids(self, where: Filter | None = None) -> np.ndarray:
        """Ids (m,) int64 of all utterances, or of those in the files that a filter leaves, rising."""
        if not self.exists:
            return np.empty(0, np.int64)
        joined, values = self.store.narrowed("speech", where) if where else ("", [])
        rows = self.store.all(f"SELECT speech.id FROM speech{joined} ORDER BY speech.id", *values)
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def vectors(self, block: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Block by block: ids (n,) int64, rising, and vectors (n, D) float32."""
        last = -1
        while rows := self.store.all("SELECT id, vector FROM speech WHERE id > ? ORDER BY id LIMIT ?", last, block):
            last = rows[-1][0]
            yield np.array([row[0] for row in rows], np.int64), _matrix([row[1] for row in rows])

    def within(self, ids: np.ndarray, where: Filter) -> np.ndarray:
        """Which of these utterances (n,) are said in a file that the filter leaves."""
        return np.ones(len(ids), bool) if where == EVERY else np.isin(ids, self._left(where))

    def nearest(self, eos: np.ndarray, count: int, where: Filter) -> list[np.ndarray]:
        """For each of P texts (P, D) ids of the `count` utterances nearest to it, in the files that the filter leaves,
        and of all that the index of vectors does not know yet; it is made again when those are more than `count`.
        """
        every, left = self._left(EVERY), self._left(where)
        if len(every) <= count:
            return [left]

        def make() -> StageOne:
            sample = np.concatenate([vectors[::-(-len(every) // TRAINED_ON)] for _, vectors in self.vectors()])
            blocks = ((ids, vectors[:, None], np.ones(len(ids), bool)) for ids, vectors in self.vectors())
            return StageOne.make(blocks, sample, len(every))

        index = self._index = up_to_date(self._index, self.store.folder, "speech", every, count, make)
        known = np.isin(index.ids, left)
        return [*index.nearest(eos, count, None if known.all() else known), np.setdiff1d(left, index.ids)]

    def of_windows(self, windows: Sequence[int]) -> tuple[np.ndarray, list[Utterance], np.ndarray]:
        """What is said in these windows: the place (m,) of each utterance's window among them, rising; the utterances,
        in time order within a window; their vectors (m, D) float32.
        """
        place_of = {int(id): place for place, id in enumerate(windows)}
        rows = []
        for some in _parts(list(place_of)):
            rows += self.store.all(
                'SELECT windows.id, speech.id, speech.start, speech."end", text, vector FROM windows JOIN speech ON '
                f"{HEARD_IN} WHERE windows.id IN ({', '.join('?' * len(some))})", *some)
        rows.sort(key=lambda row: (place_of[row[0]], row[2], row[1]))
        places = np.fromiter((place_of[row[0]] for row in rows), np.int64, len(rows))
        return places, [Utterance(*row[1:5]) for row in rows], _matrix([row[5] for row in rows])

    def windows_of(self, utterances: Sequence[int]) -> np.ndarray:
        """Ids of the windows in which these utterances are said, each once, rising."""
        found = set()
        for some in _parts([int(id) for id in utterances]):
            found.update(row[0] for row in self.store.all(
                f"SELECT windows.id FROM speech JOIN windows ON {HEARD_IN} WHERE speech.id IN "
                f"({', '.join('?' * len(some))})", *some))
        return np.array(sorted(found), np.int64)

    def with_word(self, word: str, most: int) -> np.ndarray:
        """Ids of the utterances that hold a word, in whichever of its English forms; at most so many, rising."""
        if self._has("speech_words"):
            rows = self.store.all("SELECT rowid FROM speech_words WHERE speech_words MATCH ? ORDER BY rowid LIMIT ?",
                                  f'"{word}"', most)
        else:
            of_its_own = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
            near = self.store.all("SELECT id, text FROM speech WHERE text LIKE ? ORDER BY id", f"%{word}%")
            rows = [row for row in near if of_its_own.search(row[1])][:most]
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def _left(self, where: Filter) -> np.ndarray:
        """`ids`, remembered of all, and of the last filter, until the index changes."""
        if self._last is None or self._last[0] != (change := self.store.change):
            self._last = (change := self.store.change), {EVERY: self.ids()}
        kept = self._last[1]
        if where not in kept:
            self._last = change, (kept := {EVERY: kept[EVERY], where: self.ids(where)})
        return kept[where]

    def _has(self, table: str) -> bool:
        return bool(self.store.all("SELECT 1 FROM sqlite_master WHERE name = ?", table))


def _parts(ids: list[int]) -> Iterator[list[int]]:
    """A statement takes so many values with every version of SQLite."""
    return (ids[start:start + 500] for start in range(0, len(ids), 500))


def _matrix(rows: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(rows), "<f2").reshape(len(rows), -1 if rows else 0).astype(np.float32)

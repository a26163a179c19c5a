"""The index on disk: INDEX/index.db, one SQLite file. Video files, their frames and sentences, windows and features.

Here: what is stored and how it is found again. Not here: locks, connections, damaged files (database.py), where the
frames come from (build.py), what the features mean (embedding.py), what is said (speech_store.py), which window
answers a query (engine.py).

One transaction a video file: a kill at any moment loses the file in hand and nothing else. One process writes, any
number of them read, from as many threads as they like (database.py). Space of removed files is used again, but the file
on disk does not shrink.

File names are stored as bytes, for they need not be UTF-8. A window is a stretch of a file, the unit that is found;
ids of files and windows are never used again.

Shapes: K frames of a window, P numbers of its stage-one vector, n windows.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from narvid.search.database import SEVERAL, VERSION, Database
from narvid.search.rows import EVERY, File, Filter, Frame, Window, pack, text_of, unpack
from narvid.search.speech_store import HEARD_IN, SpeechStore
from narvid.search.stage_one import Candidates

if TYPE_CHECKING:
    from narvid.search.embedding import Embedder

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, seconds REAL NOT NULL, why TEXT NOT NULL, note TEXT NOT NULL, told TEXT NOT NULL);
CREATE TABLE frames (file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE, number INTEGER NOT NULL,
    time REAL NOT NULL, sentence TEXT, jpeg BLOB NOT NULL, PRIMARY KEY (file, number));
CREATE TABLE windows (id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
    start REAL NOT NULL, "end" REAL NOT NULL, picks TEXT NOT NULL);
CREATE INDEX windows_of_file ON windows (file);
CREATE TABLE pooled (window INTEGER PRIMARY KEY REFERENCES windows ON DELETE CASCADE, vector BLOB NOT NULL);
CREATE TABLE features (window INTEGER PRIMARY KEY REFERENCES windows ON DELETE CASCADE, rows BLOB NOT NULL);
"""
MARKS = """CREATE TABLE marks (file INTEGER PRIMARY KEY REFERENCES files ON DELETE CASCADE, content TEXT NOT NULL,
    recorded REAL)"""
# marks came with version 2, speech later: an index without them gets them when it is opened for writing.
# pooled and features stand in tables of their own: a scan of windows reads neither, stage one reads only the first.


class Store(Database):
    """An index folder, open. Use as a context manager, or close().

    create: the settings of a new index (a dict that JSON can hold); without it the index must exist.
    read_only: nothing can be written and nothing is locked; without it no second process may have it open for writing.
    Opening and every method raise InputError, one sentence, where the folder is no index, was written by a newer
    version, is damaged, may not be written, or the disk is full.
    """

    def __init__(self, path: str | Path, *, create: dict | None = None, read_only: bool = False):
        fill = None if create is None else partial(_fill, settings=create)
        self.speech = SpeechStore(self)
        super().__init__(Path(path), create=fill, read_only=read_only)
        try:
            if not read_only and not self._has("marks"):
                with self.transaction() as run:
                    run(MARKS)
                    run(f"PRAGMA user_version = {VERSION}")
            if not read_only and not self.speech.exists:
                with self.transaction() as run:
                    SpeechStore.create(run)
        except BaseException:
            self.close()
            raise

    # ---- what holds for the whole index ----

    @property
    def settings(self) -> dict:
        """How the index was made: videos folder, model, windows, captioner."""
        return self._fact("settings")

    def update_settings(self, **changes) -> None:
        """Change some of the settings."""
        with self.transaction() as run:
            _state(run, "settings", self.settings | changes)
            if changes.get("folders"):  # an earlier version would take all of them for one
                run(f"PRAGMA user_version = {SEVERAL}")

    @property
    def statistics(self) -> dict | None:
        """{"text" | "like": ((mean, std) of S_qv, (mean, std) of S_qn or None)} for Eq. 11; None before there are any.

        Read it for every query: it is written after the files, and `change` does not rise with it.
        """
        stored = self._fact("statistics")
        return stored and {kind: tuple(view and tuple(view) for view in views) for kind, views in stored.items()}

    @statistics.setter
    def statistics(self, statistics: dict | None) -> None:
        with self.transaction() as run:
            _state(run, "statistics", statistics)

    @property
    def change(self) -> int:
        """Rises with every committed change of files; read it before what shall be made again when it differs."""
        return self._fact("change")

    @contextmanager
    def changing(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """A transaction after which `change` has risen."""
        with self.transaction() as run:
            yield run
            _state(run, "change", self.change + 1)

    @property
    def folder(self) -> Path:
        """Where what can be made again lies: clips, frames that wait, stage one."""
        return self.path

    def count(self) -> int:
        """The number of windows."""
        return self.one("SELECT count(*) FROM windows")[0]

    # ---- files ----

    def files(self) -> list[File]:
        """All files, in the order of their paths' bytes."""
        return [_file(row) for row in self.all(f"{self._files()} ORDER BY path")]

    def file(self, id: int) -> File:
        """One file; KeyError where there is none (any more)."""
        return _file(self.one(f"{self._files()} WHERE files.id = ?", id))

    def frames(self, file: int) -> list[Frame]:
        """All frames of a file, in time order; [] for one that does not exist or could not be read."""
        rows = self.all("SELECT number, time, sentence FROM frames WHERE file = ? ORDER BY number", file)
        return [Frame(*row) for row in rows]

    def jpeg(self, file: int, number: int) -> bytes:
        """A frame's jpg file; KeyError where there is none."""
        return self.one("SELECT jpeg FROM frames WHERE file = ? AND number = ?", file, number)[0]

    def put_file(
        self,
        path: str,
        size: int,
        mtime_ns: int,
        seconds: float,
        note: str,
        frames: Sequence[tuple[float, bytes, str | None]],
        windows: Sequence[tuple[float, float, list[int]]],
        features: dict[str, np.ndarray | None],
        pooled: np.ndarray,
        *,
        narration: str = "",
        content: str = "",
        recorded: float | None = None,
    ) -> None:
        """Store a file in one transaction, in place of what was there under this path.

        frames: (number, seconds, picture, sentence or None) of those kept. windows: (start, end, numbers of the picked
        frames) of each of n. features: name -> (n, ...), float32 or bool, of one shape in the whole index, or
        None where the model has no such field. pooled: (n, P) float32.
        """
        known = self._fact("layout")
        rows, layout = pack(features, len(windows), known)
        vectors = np.ascontiguousarray(pooled, self._fact("pooled", "<f4"))
        if vectors.shape != (len(windows), vectors[0].size):
            raise ValueError(f"pooled is {vectors.shape}, of {len(windows)} windows")
        with self.transaction() as run:
            if known not in (None, layout):
                raise ValueError(f"features of {path} are {layout}, the index holds {known}")
            _state(run, "layout", layout)
            file = _replace(run, path, size, mtime_ns, seconds, "", note, narration)
            run("INSERT INTO marks VALUES (?, ?, ?)", (file, content, recorded))
            for number, time, jpeg, sentence in frames:
                run("INSERT INTO frames VALUES (?, ?, ?, ?, ?)", (file, number, time, sentence, jpeg))
            for (start, end, picks), row, vector in zip(windows, rows, vectors, strict=True):
                insert = 'INSERT INTO windows (file, start, "end", picks) VALUES (?, ?, ?, ?)'
                window = run(insert, (file, start, end, json.dumps(picks))).lastrowid
                run("INSERT INTO pooled VALUES (?, ?)", (window, vector.tobytes()))
                run("INSERT INTO features VALUES (?, ?)", (window, row.tobytes()))
            _state(run, "change", self.change + 1)

    def fail_file(self, path: str, size: int, mtime_ns: int, why: str) -> None:
        """Remember why a file could not be read, in place of what was there under this path."""
        with self.transaction() as run:
            file = _replace(run, path, size, mtime_ns, 0.0, why, "", "")
            run("INSERT INTO marks VALUES (?, ?, NULL)", (file, ""))
            _state(run, "change", self.change + 1)

    def move_file(self, path: str, to: str, mtime_ns: int) -> None:
        """A file has another name by now; all else that is known of it stays."""
        with self.transaction() as run:
            run("DELETE FROM files WHERE path = ?", (os.fsencode(to),))
            move = "UPDATE files SET path = ?, mtime_ns = ? WHERE path = ?"
            run(move, (os.fsencode(to), mtime_ns, os.fsencode(path)))
            _state(run, "change", self.change + 1)

    def touch_file(self, path: str, mtime_ns: int) -> None:
        """The file was written to, and is what it was."""
        with self.transaction() as run:
            run("UPDATE files SET mtime_ns = ? WHERE path = ?", (mtime_ns, os.fsencode(path)))

    def remove_file(self, path: str) -> None:
        """Forget a file with all that belongs to it."""
        with self.transaction() as run:
            run("DELETE FROM files WHERE path = ?", (os.fsencode(path),))
            _state(run, "change", self.change + 1)

    # ---- windows ----

    def windows(self, ids: Sequence[int]) -> list[Window]:
        """These windows, in this order; KeyError where one does not exist (any more)."""
        sql = 'SELECT windows.id, file, path, start, "end", picks FROM windows JOIN files ON files.id = file'
        rows = self._in_order(f"{sql} WHERE windows.id", ids)
        return [Window(id, file, os.fsdecode(path), *times, json.loads(p)) for id, file, path, *times, p in rows]

    def all_windows(self, folder: str = "", min_seconds: float = 0.0, max_seconds: float = inf,
                    since: float = -inf, until: float = inf, has_speech: bool = False) -> np.ndarray:
        """Ids (n,) int64, rising, of the windows of all files in a folder, with its subfolders, and of such a length.

        folder: relative to the videos folder, "" for all. The length in seconds is the file's, bounds included. since,
        until: seconds since 1970, when it was recorded, else when it was last written to; the second is excluded.
        has_speech: only those in which something is said.
        """
        where = Filter(folder, min_seconds, max_seconds, since, until, has_speech)
        joined, values = self.narrowed("windows", where) if where != EVERY else ("", [])
        rows = self.all(f"SELECT windows.id FROM windows{joined} ORDER BY windows.id", *values)
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def narrowed(self, table: str, where: Filter) -> tuple[str, list]:
        """SQL behind `FROM table`, windows or speech, that leaves a filter's rows, and its values."""
        marked = self._has("marks")
        sql = f" JOIN files ON files.id = {table}.file"
        sql += " LEFT JOIN marks ON marks.file = files.id" if marked else ""
        date = "coalesce(recorded, mtime_ns / 1e9)" if marked else "mtime_ns / 1e9"
        sql += f" WHERE seconds BETWEEN ? AND ? AND {date} >= ? AND {date} < ?"
        values = [where.min_seconds, where.max_seconds, where.since, where.until]
        if parts := [part for part in where.folder.split("/") if part not in ("", ".")]:
            prefix = os.fsencode("/".join(parts))
            sql += " AND path > ? AND path < ?"
            values += [prefix + b"/", prefix + b"0"]  # the byte behind the slash
        if where.has_speech and table == "windows":
            sql += f" AND EXISTS (SELECT 1 FROM speech WHERE {HEARD_IN})" if self.speech.exists else " AND 0"
        return sql, values

    def features(self, ids: Sequence[int]) -> dict[str, np.ndarray | None]:
        """What put_file got, (n, ...) for these windows in this order; KeyError where one does not exist."""
        rows = self._in_order("SELECT window, rows FROM features WHERE window", ids)
        return unpack(self._fact("layout") or {}, [row for _, row in rows])

    def pooled(self, block: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Stage one's vectors, block by block: ids (n,) int64, rising, and vectors (n, P) float32."""
        last, kind = -1, self._fact("pooled", "<f4")
        while rows := self.all("SELECT * FROM pooled WHERE window > ? ORDER BY window LIMIT ?", last, block):
            last = rows[-1][0]
            vectors = np.frombuffer(b"".join(row[1] for row in rows), kind).reshape(len(rows), -1)
            vectors = vectors.astype("<f4", copy=False)
            yield np.array([row[0] for row in rows], np.int64), vectors

    def candidates(self, embedder: Embedder, kind: str, count: int) -> Candidates:
        """Stage one: which windows are scored for a query of a kind, "text" or "like", at most `count`."""
        return Candidates(self, embedder, kind, count)

    # ---- inside ----

    def _in_order(self, sql: str, ids: Sequence[int]) -> list[tuple]:
        """The row of each id, which is its first column; KeyError where there is none."""
        ids, rows = [int(id) for id in ids], {}
        for start in range(0, len(ids), 500):  # a statement takes so many values with every version of SQLite
            part = ids[start : start + 500]
            rows |= {row[0]: row for row in self.all(f"{sql} IN ({', '.join('?' * len(part))})", *part)}
        return [rows[id] for id in ids]

    def fact(self, name: str):
        """Something else that holds for the whole index, None where nobody has said it."""
        return self._fact(name, None)

    def set_fact(self, name: str, value) -> None:
        """Any value that JSON can hold."""
        with self.transaction() as run:
            _state(run, name, value)

    def _fact(self, name: str, *default):
        rows = self.all("SELECT value FROM facts WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows or not default else default[0]

    def _files(self) -> str:
        marked, speech = self._has("marks"), self.speech.exists
        columns = "coalesce(content, ''), recorded" if marked else "'', NULL"
        columns += ", coalesce(source, ''), coalesce(speech_of.note, '')" if speech else ""
        joined = " LEFT JOIN marks ON marks.file = files.id" if marked else ""
        joined += " LEFT JOIN speech_of ON speech_of.file = files.id" if speech else ""
        return f"SELECT files.*, {columns} FROM files{joined}"

    def _has(self, table: str) -> bool:
        return bool(self.all("SELECT 1 FROM sqlite_master WHERE name = ?", table))


def _fill(run: Callable, settings: dict) -> None:
    """The tables of a new index."""
    if settings.get("folders"):
        run(f"PRAGMA user_version = {SEVERAL}")
    for statement in (*SCHEMA.split(";"), MARKS):
        run(statement)
    SpeechStore.create(run)
    facts = {"settings": settings, "statistics": None, "change": 0, "layout": None, "pooled": "<f2"}
    for name, value in facts.items():
        run("INSERT INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def _state(run: Callable, name: str, value) -> None:
    """Write a fact."""
    run("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def _replace(run: Callable, path, size, mtime_ns, seconds, why, note, narration) -> int:
    """A file's new row in place of all that was there under this path -> its id."""
    name = os.fsencode(path)
    run("DELETE FROM files WHERE path = ?", (name,))
    insert = "INSERT INTO files (path, size, mtime_ns, seconds, why, note, told) VALUES (?, ?, ?, ?, ?, ?, ?)"
    return run(insert, (name, size, mtime_ns, seconds, text_of(why), text_of(note), narration)).lastrowid


def _file(row: tuple) -> File:
    id, path, *rest = row
    return File(id, os.fsdecode(path), *rest)

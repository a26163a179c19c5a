"""The index in Milvus: the same things as in store.py, so that many machines search one index.

Here: which collections hold what, and in which order it is written. Not here: connections and errors (milvus.py), one
writer (milvus_lease.py), the nearest windows (milvus_stage.py), speech (milvus_speech.py), what the features mean
(embedding.py).

  NAME_facts      name: value          settings, statistics, layout, the writer's lease, and "state" (below)
  NAME_files      id, path, seconds, date (what filters ask for), row: File as JSON, windows and sentences of it
  NAME_frames     "FILE/NUMBER", file, row: [number, time, sentence], picture
  NAME_windows    id, file, sentence, row: [start, end, picks], v: the vector of `like`
  NAME_features   id of a window, file, rows: what put_file got
  NAME_vectors    id, window, file, sentence, v: the vectors of texts, where a window has several
  NAME_said, NAME_speech                 what is said (milvus_speech.py)

A file is there when its row in NAME_files is: it is written last and deleted first, and what belongs to no such row is
never found. "state" says which ids are given out (none is ever used again), how many windows there are, how often files
have changed, and what is in hand: where a writer was killed the next one brings that to an end.
A replaced file's new row is written before the old one is deleted: for that moment both are found, each whole.

Bytes are base64 in lists of VARCHAR (pieces), a third more: a VARCHAR holds 65,535 bytes and a JSON field no more, a
BINARY_VECTOR wants an index, is kept in memory and is unknown to milvus-lite, a FLOAT_VECTOR refuses what is no number.
A folder's name as a filter sees it is percent-encoded, so that no name can be a part of the question.

Shapes: n windows, S vectors of a window, W their width, P = numbers of all of them side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import numpy as np

from narvid import InputError
from narvid.search import milvus_speech
from narvid.search.milvus import PAGE, Milvus, pieces, place_of
from narvid.search.milvus_stage import MilvusCandidates
from narvid.search.stage_one import vectors_of
from narvid.search.rows import EVERY, File, Filter, Frame, Window, pack, text_of, unpack

VERSION = 1
FIELDS = {
    "facts": {"name": ("VARCHAR", 256), "value": "pieces"},
    "files": {"id": "INT64", "path": ("VARCHAR", 65_535), "seconds": "DOUBLE", "date": "DOUBLE", "row": "pieces"},
    "frames": {"id": ("VARCHAR", 64), "file": "INT64", "row": "pieces", "picture": "pieces"},
    "windows": {"id": "INT64", "file": "INT64", "sentence": "BOOL", "row": "pieces"},
    "features": {"id": "INT64", "file": "INT64", "rows": "pieces"},
    "vectors": {"id": "INT64", "window": "INT64", "file": "INT64", "sentence": "BOOL"},
}
OF_A_FILE = ("frames", "windows", "features", "vectors")
SLOTS = 4096  # vectors of a window, at most; the id of one is the window's times this, and its number
READ_AT_ONCE = 16_000_000  # bytes of features in an answer


class MilvusStore:
    """An index in Milvus, open. Use as a context manager, or close(). What it offers is what Store offers, without
    `pooled`; the arguments are the same. path: how it is called; folder: of this machine, for what can be made again.
    """

    def __init__(self, path: str, *, create: dict | None = None, read_only: bool = False):
        self.place = place_of(path)
        self.path = self.place.text.partition("?")[0]
        self.milvus, self._read_only, self._born = Milvus(self.place), read_only, None
        self._ids = self._known = None
        self.speech = milvus_speech.MilvusSpeech(self)
        try:
            if create is not None:
                self._create(create)
            else:
                self._check()
                if not read_only:
                    self.milvus.lock()
            if not read_only:
                self.speech.make()
                self._sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process write, and end the connection."""
        self.milvus.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """Of this machine and this user: clips that were made, frames that wait; all of it can be deleted."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        known = hashlib.sha256(f"{self.place.uri} {self.place.database}".encode()).hexdigest()[:12]
        folder = home / "narvid" / f"{self.place.name}-{known}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    # ---- what holds for the whole index ----

    @property
    def settings(self) -> dict:
        """As in Store."""
        return self.milvus.fact("settings")

    def update_settings(self, **changes) -> None:
        """Change some of the settings."""
        self.set_fact("settings", self.settings | changes)

    @property
    def statistics(self) -> dict | None:
        """As in Store."""
        stored = self.fact("statistics")
        return stored and {kind: tuple(view and tuple(view) for view in views) for kind, views in stored.items()}

    @statistics.setter
    def statistics(self, statistics: dict | None) -> None:
        self.set_fact("statistics", statistics)

    @property
    def change(self) -> int:
        """Rises with every file that was written or deleted."""
        return self.state()["change"]

    def count(self) -> int:
        """The number of windows."""
        return self.state()["windows"]

    def fact(self, name: str):
        """Something else that holds for the whole index, None where nobody has said it."""
        try:
            return self.milvus.fact(name)
        except KeyError:
            return None

    def set_fact(self, name: str, value) -> None:
        """Any value that JSON can hold."""
        self._may_write()
        self.milvus.set_fact(name, value)

    # ---- files ----

    def files(self) -> list[File]:
        """All files, in the order of their paths' bytes."""
        files, marks = [], self.speech.marks()
        for page in self.milvus.pages("files", "", ["id", "row"]):
            for row in page:
                speech, note = marks.get(row["id"], ("", ""))
                files.append(_row(row)[0]._replace(speech=speech, speech_note=note))
        return sorted(files, key=lambda file: os.fsencode(file.path))

    def file(self, id: int) -> File:
        """One file; KeyError where there is none (any more)."""
        return self._files([id])[id]

    def frames(self, file: int) -> list[Frame]:
        """All frames of a file, in time order; [] for one that does not exist or could not be read."""
        if not self.visible([file]):
            return []
        rows = self.milvus.pages("frames", f"file == {file}", ["id", "row"])
        return sorted(Frame(*json.loads("".join(row["row"]))) for page in rows for row in page)

    def jpeg(self, file: int, number: int) -> bytes:
        """A frame's picture; KeyError where there is none."""
        name = f"{int(file)}/{int(number)}"
        return b64decode("".join(self.milvus.get("frames", "id", [name], ["id", "picture"])[name]["picture"]))

    def put_file(self, path: str, size: int, mtime_ns: int, seconds: float, note: str,
                 frames: Iterable[tuple[int, float, bytes, str | None]],
                 windows: Sequence[tuple[float, float, list[int]]], features: dict[str, np.ndarray | None],
                 pooled: np.ndarray, *, narration: str = "", content: str = "", recorded: float | None = None) -> None:
        """Store a file in place of what was there under this path; until it is whole nobody finds it."""
        self._may_write()
        known = self._layout()
        rows, layout = pack(features, len(windows), known)
        if known not in (None, layout):
            raise ValueError(f"features of {path} are {layout}, the index holds {known}")
        settings = self.settings
        dim = settings.get("dim") or pooled.shape[1]  # without a word on it: one vector a window
        views = 1 + (bool(settings.get("narration")) and "dim" in settings)
        of_text, sentence = vectors_of(pooled, dim, views, "text")
        of_like, _ = vectors_of(pooled, dim, views, "like")
        if known is None:
            self.milvus.make("windows", FIELDS["windows"], of_like.shape[2])
            self.milvus.make("features", FIELDS["features"], on_disk=True)
            self.milvus.make("vectors", FIELDS["vectors"], of_text.shape[2])
            self.milvus.set_fact("vectors", list(of_text.shape[1:]))
            self.milvus.set_fact("layout", layout)
        file, first = self._begin(path, len(windows), int(sentence.sum()))
        ids = range(first, first + len(windows))
        counts = dict.fromkeys(OF_A_FILE, 0)

        def counted(name: str, some: Iterable[dict]) -> Iterator[dict]:
            for row in some:
                counts[name] += 1
                yield row

        self.milvus.insert("frames", counted("frames", ({
            "id": f"{file}/{number}", "file": file, "row": pieces(json.dumps([number, time, said])),
            "picture": pieces(b64encode(picture).decode())} for number, time, picture, said in frames)), 20_000)
        self.milvus.insert("windows", counted("windows", ({
            "id": id, "file": file, "sentence": bool(has), "row": pieces(json.dumps(window)), "v": vector}
            for id, has, window, vector in zip(ids, sentence, windows, of_like[:, 0], strict=True))),
            4 * of_like.shape[2])
        self.milvus.insert("features", counted("features", ({
            "id": id, "file": file, "rows": pieces(b64encode(row.tobytes()).decode())}
            for id, row in zip(ids, rows, strict=True))), rows.shape[1] * 4 // 3)
        if of_text.shape[1] > 1:
            self.milvus.insert("vectors", counted("vectors", ({
                "id": id * SLOTS + slot, "window": id, "file": file, "sentence": bool(has), "v": vector}
                for id, has, some in zip(ids, sentence, of_text, strict=True)
                for slot, vector in enumerate(some) if vector.any())), 4 * of_text.shape[2])
        for name, count in counts.items():
            self.check_whole(name, f"file == {file}", count, path)
        self._end(File(file, path, size, mtime_ns, seconds, "", text_of(note), narration, content, recorded),
                  len(windows), int(sentence.sum()))

    def fail_file(self, path: str, size: int, mtime_ns: int, why: str) -> None:
        """Remember a file that could not be read, in place of what was there."""
        file, _ = self._begin(path, 0, 0)
        self._end(File(file, path, size, mtime_ns, 0.0, text_of(why), "", "", "", None), 0, 0)

    def move_file(self, path: str, new: str, mtime_ns: int) -> None:
        """A file's new name and date; all else stays."""
        state, [(file, *counts)] = self.ready(), self._by_path(path).values()
        self.take_in_hand(state, {"new": file.id, "old": [], "add": {}})
        self._end(file._replace(path=new, mtime_ns=mtime_ns), *counts)

    def touch_file(self, path: str, mtime_ns: int) -> None:
        """A file's new date; what it holds is the same."""
        self.move_file(path, path, mtime_ns)

    def remove_file(self, path: str) -> None:
        """Forget a file with all that belongs to it."""
        state, old = self.ready(), self._by_path(path)
        self.take_in_hand(state, {"new": None, "old": sorted(old), "add": self._more(old)})
        self._finish(written=True)

    # ---- windows ----

    def windows(self, ids: Sequence[int]) -> list[Window]:
        """These windows, in this order; KeyError where one does not exist (any more)."""
        rows = self.milvus.get("windows", "id", ids, ["id", "file", "row"]) if self._layout() else {}
        files = self._files({row["file"] for row in rows.values()})
        return [Window(int(id), (row := rows[id])["file"], files[row["file"]].path, *json.loads("".join(row["row"])))
                for id in ids]

    def all_windows(self, folder: str = "", min_seconds: float = 0.0, max_seconds: float = inf,
                    since: float = -inf, until: float = inf, has_speech: bool = False) -> np.ndarray:
        """As in Store."""
        where = Filter(folder, min_seconds, max_seconds, since, until, has_speech)
        if self._layout() is None:
            return np.empty(0, np.int64)
        if has_speech:
            return self.speech.speaking(where)
        state = self.state()["change"]
        if where != EVERY:
            left = sorted(self.files_of(where)[0])
            pages = (page for start in range(0, len(left), PAGE)
                     for page in self.milvus.pages("windows", f"file in {left[start:start + PAGE]}", ["id"]))
        elif self._ids is not None and self._ids[0] == state:
            return self._ids[1]
        else:
            seen = self.files_of(EVERY)[0]
            pages = ([row for row in page if row["file"] in seen]
                     for page in self.milvus.pages("windows", "", ["id", "file"]))
        ids = np.unique(np.fromiter((row["id"] for page in pages for row in page), np.int64))
        if where == EVERY:
            self._ids = state, ids
        return ids

    def windows_of_file(self, file: int) -> list[tuple[int, float, float]]:
        """(id, start, end) of each of its windows."""
        pages = self.milvus.pages("windows", f"file == {file}", ["id", "row"]) if self._layout() else ()
        return [(row["id"], *json.loads("".join(row["row"]))[:2]) for page in pages for row in page]

    def features(self, ids: Sequence[int]) -> dict[str, np.ndarray | None]:
        """As in Store."""
        layout = self._layout() or {}
        size = sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in filter(None, layout.values()))
        rows = {}
        if len(ids):
            rows = self.milvus.get("features", "id", ids, ["id", "rows"], max(1, READ_AT_ONCE // max(1, size)))
        return unpack(layout, [b64decode("".join(rows[id]["rows"])) for id in ids])

    def candidates(self, embedder, kind: str, count: int) -> MilvusCandidates:
        """Stage one, in Milvus."""
        return MilvusCandidates(self, kind, count)

    # ---- for stage one ----

    def files_of(self, where: Filter) -> tuple[set[int], int, int]:
        """Ids of the files that a filter leaves, how many windows they have, and how many of those a sentence; whether
        something is said in them is not asked.
        """
        parts = [f"seconds >= {where.min_seconds!r}"] * (where.min_seconds > 0)
        parts += [f"seconds <= {where.max_seconds!r}"] * (where.max_seconds < inf)
        parts += [f"date >= {where.since!r}"] * (where.since > -inf) + [f"date < {where.until!r}"] * (where.until < inf)
        if folder := "/".join(part for part in where.folder.split("/") if part not in ("", ".")):
            parts.append(f'path > "{quoted(folder)}/" and path < "{quoted(folder)}0"')  # the byte behind the slash
        files, windows, sentences = set(), 0, 0
        for page in self.milvus.pages("files", " and ".join(parts), ["id", "row"]):
            for row in page:
                _, some, of_them = json.loads("".join(row["row"]))
                files.add(row["id"])
                windows, sentences = windows + some, sentences + of_them
        return files, windows, sentences

    def with_sentence(self, ids: Sequence[int]) -> int:
        """How many of these windows have a sentence."""
        rows = self.milvus.get("windows", "id", ids, ["id", "sentence"]) if len(ids) else {}
        return sum(row["sentence"] for row in rows.values())

    # ---- inside ----

    def _create(self, settings: dict) -> None:
        """A new index; what a killed creation has left is gone on with."""
        if self.milvus.has("facts") and self.milvus.fields("facts") != {*FIELDS["facts"], "v"}:
            raise InputError(f"{self.path}: the collection {self.place.name}_facts is in use for something else; give "
                             "another name")
        self.milvus.make("facts", FIELDS["facts"])
        self.milvus.lock()
        if self.fact("settings") is not None:
            raise InputError(f"{self.path} is an index already; nothing is replaced: give another name")
        self.milvus.drop(name for name in (*FIELDS, *milvus_speech.FIELDS) if name != "facts")
        for name in ("files", "frames"):
            self.milvus.make(name, FIELDS[name])
        state = {"change": 0, "windows": 0, "sentences": 0, "spoken": 0, "utterances": 0, "file": 1, "window": 1,
                 "utterance": 1, "hand": None, "born": uuid4().hex}
        facts = {"layout": None, "vectors": None, "statistics": None, "state": state, "version": VERSION}
        for name, value in (facts | {"settings": settings}).items():  # the settings last: with them it is an index
            self.milvus.set_fact(name, value)

    def _check(self) -> None:
        """InputError unless this is an index, one that this version can read, with vectors as it says."""
        advice = f"make one with `python -m narvid.search index VIDEOS --engine {self.path}`"
        if not self.milvus.has("facts") or self.fact("settings") is None:
            raise InputError(f"{self.path} is no index, or one that was never finished: {advice}")
        if self.fact("version") > VERSION:
            raise InputError(f"{self.path} was written by a newer version of narvid: update narvid, or index anew")
        shape = self.fact("vectors")
        if shape and (dim := self.milvus.dim("vectors")) != shape[1]:
            raise InputError(f"{self.path}: {self.place.name}_vectors holds vectors of {dim} numbers, the index was "
                             f"made with {shape[1]}: something else has changed it; index into another name")

    def _may_write(self) -> None:
        if self._read_only:
            raise InputError(f"{self.path} was opened for reading: it cannot be written")

    def state(self) -> dict:
        state = self.milvus.fact("state")
        self._born = self._born or state["born"]
        if state["born"] != self._born:
            raise InputError(f"{self.path} was deleted and made anew since it was opened: start again")
        return state

    def _begin(self, path: str, windows: int, sentences: int) -> tuple[int, int]:
        """Ids for a new file and its windows; it, and what is there under this path, are in hand from now on."""
        state, old = self.ready(), self._by_path(path)
        new, first = state["file"], state["window"]
        self.take_in_hand(state | {"file": new + 1, "window": first + windows},
                          {"new": new, "old": sorted(old), "add": self._more(old, windows, sentences)})
        return new, first

    def _more(self, old: dict[int, tuple[File, int, int]], windows: int = 0, sentences: int = 0) -> dict[str, int]:
        """What of everything there is more when these files are gone, and a new one is there."""
        spoken, utterances = self.speech.counts_of(old)
        return {"windows": windows - sum(n for _, n, _ in old.values()), "spoken": -spoken,
                "sentences": sentences - sum(n for _, _, n in old.values()), "utterances": -utterances}

    def ready(self) -> dict:
        """The state, with nothing in hand any more: what an error left there is swept first."""
        self._may_write()
        if (state := self.state())["hand"]:
            self._sweep()
            state = self.state()
        return state

    def take_in_hand(self, state: dict, hand: dict) -> None:
        """From now on what happens to these files is brought to an end, here or in the next process.

        hand: {"new": the file that shall be there, None where a file goes, "old": the files that go with that, "add":
        what there is more of then}, or what MilvusSpeech.put says.
        """
        self.milvus.set_fact("state", state | {"hand": hand})

    def let_go(self, state: dict, add: dict[str, int] | None) -> None:
        """Nothing is in hand any more; add: what there is more of, None where nothing has changed."""
        more = {} if add is None else {"change": state["change"] + 1} | {
            name: state.get(name, 0) + n for name, n in add.items()}
        self.milvus.set_fact("state", state | {"hand": None} | more)

    def _end(self, file: File, windows: int, sentences: int) -> None:
        """All of the file is there: its row, and away with what it replaces."""
        self._put_row(file, windows, sentences)
        self._finish(written=True)

    def _finish(self, written: bool) -> None:
        """Delete what the files in hand leave behind, and say what has changed; written: the new one is there."""
        state = self.state()
        hand = state["hand"]
        if gone := hand["old"] if written else [hand["new"]]:
            self.milvus.delete("files", f"id in {gone}")
            self.speech.forget(gone)
            for name in OF_A_FILE if self._layout() else OF_A_FILE[:1]:
                self.milvus.delete(name, f"file in {gone}")
        self.let_go(state, hand["add"] if written else None)

    def _sweep(self) -> None:
        """Bring to an end what a killed writer had in hand."""
        hand = self.state()["hand"]
        if hand and "put" in hand:
            self.speech.finish()
        elif hand:
            self._finish(written=hand["new"] is None or bool(self.visible([hand["new"]])))

    def check_whole(self, name: str, where: str, count: int, what: str) -> None:
        """InputError where less can be read than was written; a reader sees all of it from here on."""
        if (found := self.milvus.count(name, where)) < count:
            raise InputError(f"{self.path}: of {count} rows of {what} in {self.place.name}_{name} only {found} can be "
                             "read; the same command writes that again")

    def _put_row(self, file: File, windows: int, sentences: int) -> None:
        date = file.mtime_ns / 1e9 if file.recorded is None else file.recorded
        row = pieces(json.dumps([file._asdict(), windows, sentences]))
        self.milvus.upsert("files", {"id": file.id, "path": quoted(file.path), "seconds": float(file.seconds),
                                     "date": date, "row": row})

    def _by_path(self, path: str) -> dict[int, tuple[File, int, int]]:
        """{id: (file, windows, sentences)} of those of this path: one, or none; two where a writer was killed."""
        rows = self.milvus.rows("files", f'path == "{quoted(path)}"', ["id", "row"])
        return {row["id"]: _row(row) for row in rows}

    def _files(self, ids: Iterable[int]) -> dict[int, File]:
        ids = [int(id) for id in ids]
        rows = self.milvus.get("files", "id", ids, ["id", "row"])
        return {id: _row(rows[id])[0] for id in ids}

    def visible(self, files: Iterable[int]) -> set[int]:
        """Those of these files that are there."""
        return set(self.milvus.get("files", "id", [int(id) for id in files], ["id"]))

    def _layout(self) -> dict | None:
        """Of the features; it is said once and never changed."""
        self._known = self._known or self.fact("layout")
        return self._known


def is_index(path: str) -> bool:
    """Whether there is an index under this name; InputError where nobody answers."""
    milvus = Milvus(place_of(path))
    try:
        return milvus.has("facts") and milvus.fact("settings") is not None
    except KeyError:  # killed while it was made
        return False
    finally:
        milvus.close()


def quoted(path: str) -> str:
    """A file name as a filter may hold it: the beginning of a path is the beginning of its quoted form."""
    return quote(os.fsencode(path), safe="/")


def _row(row: dict) -> tuple[File, int, int]:
    """A row of NAME_files -> the file, its windows, those with a sentence."""
    file, windows, sentences = json.loads("".join(row["row"]))
    return File(**file), windows, sentences

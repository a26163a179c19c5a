"""Stage one of a search in Milvus: the windows nearest to a query, asked of the engine that keeps their vectors.

A window has several vectors and a query one, so that a search answers with fewer windows than hits. Where Milvus groups
by a field (group_by_field; not with every index, IVF_RABITQ among those) it is asked for one hit a window, else for
PER_CANDIDATE times as many; in either way for twice as many again until there are enough.

Here: what stage_one.py does with FAISS, behind the same three methods. Not here: the collections (milvus_store.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from narvid.search.milvus import GROUPING, MOST
from narvid.search.stage_one import PER_CANDIDATE
from narvid.search.rows import EVERY, Filter

if TYPE_CHECKING:
    from narvid.search.milvus_store import MilvusStore

TOGETHER = 16  # queries in a search


class Left(NamedTuple):
    """What a filter leaves: files or windows, whose ids are said; field None: everything."""

    field: str | None
    ids: list[int] | None
    windows: int
    sentences: int  # windows that have one


class MilvusCandidates:
    """Stage one in Milvus: the three methods of stage_one.Candidates."""

    def __init__(self, store: MilvusStore, kind: str, count: int):
        self.store, self.kind, self.count = store, kind, count
        self._now, self._left = None, {}

    def refresh(self) -> None:
        """Take notice of a changed index."""
        state = self.store.state()
        if state != self._now:
            self._now, self._left = state, {}

    def windows(self, where: Filter, most: float) -> np.ndarray | None:
        """Ids, rising, of all windows that the filter leaves; None where those are more than `most`."""
        return None if self._of(where).windows > most else self.store.all_windows(*where)

    def nearest(self, queries: np.ndarray, where: Filter) -> list[np.ndarray]:
        """Ids of the windows to score for each of the queries (B, W), rising: `count` of those with a sentence, and as
        many of those without.
        """
        left, found = self._of(where), []
        for count, sentence in ((left.sentences, "true"), (left.windows - left.sentences, "false")):
            if count:
                part = f"sentence == {sentence}" if 0 < left.sentences < left.windows else ""
                found.append(self._nearest(queries, min(count, self.count), left, part,
                                           count / max(1, self._now["windows"])))
        return [np.unique(np.concatenate(both)) for both in zip(*found)]

    def _of(self, where: Filter) -> Left:
        if where == EVERY:
            return Left(None, None, self._now["windows"], self._now["sentences"])
        left = self._left.get(where)
        if left is None:
            if where.has_speech:  # a window's property, not its file's
                ids = self.store.all_windows(*where).tolist()
                left = Left("window", ids, len(ids), self.store.with_sentence(ids))
            else:
                files, *counts = self.store.files_of(where)
                left = Left("file", sorted(files), *counts)
            self._left = {where: left}  # the last one: the next page of answers has the same
        return left

    def _nearest(self, queries: np.ndarray, wanted: int, left: Left, part: str, share: float) -> list[list[int]]:
        """`wanted` windows for each query, best first, of those that are left and where an expression holds: more and
        more hits are asked for, until there are so many.
        """
        check = left.field is None  # then windows of no file may be among the hits
        slots, _ = self.store.fact("vectors")
        name, window = ("vectors", "window") if self.kind == "text" and slots > 1 else ("windows", "id")
        grouped = name == "vectors" and self.store.milvus.index in GROUPING
        parts = [part] * bool(part)
        if not check:
            parts.append(f"{left.field if left.field == 'file' else window} in {left.ids}")
        where = " and ".join(parts)
        limit = wanted * (PER_CANDIDATE if name == "vectors" and not grouped else 1)
        found, todo = [[] for _ in queries], list(range(len(queries)))
        while todo:
            limit, short = min(limit, MOST), []
            for start in range(0, len(todo), TOGETHER):
                some = todo[start:start + TOGETHER]
                rows = self.store.milvus.nearest(name, queries[some], limit, where, [window, "file"],
                                                 window if grouped else None, share)
                there = self.store.visible({row["file"] for hits in rows for row in hits}) if check else None
                for b, hits in zip(some, rows):
                    ids = dict.fromkeys(row[window] for row in hits if there is None or row["file"] in there)
                    more, found[b] = len(ids) > len(found[b]), list(ids)[:wanted]
                    if len(found[b]) < wanted and limit < MOST and (more or len(hits) == limit):
                        short.append(b)
            limit, todo = 2 * limit, short
        return found

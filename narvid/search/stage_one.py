"""Stage one of a search: the windows nearest to a query among very many, by vectors alone (FAISS).

Here: which FAISS index, how it is made, kept and asked, when it is made again. Not here: what the vectors are
(embedding.py) and how the candidates are then scored (engine.py).

`Candidates` is all that the engine knows of stage one: another engine for vectors offers its three methods.

Few vectors are kept in a byte a dimension and all compared. Many are kept in a bit a dimension (RaBitQ, after a random
rotation) and compared in those lists (IVF) that are nearest to the query: enough to find candidates, which stage two
scores from the features.

Shapes: N windows, S vectors of a window, W their width, B queries.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import numpy as np

from narvid import InputError
from narvid.files import replace
from narvid.search.rows import EVERY, Filter

if TYPE_CHECKING:
    from narvid.search.embedding import Embedder
    from narvid.search.store import Store

FLAT = 200_000  # vectors up to which all are compared (docs/scaling.md: measured)
LISTS = 1024  # of an IVF index
PROBED = 64  # lists that a query looks into, where no filter leaves windows out
TRAINING = 50_000  # vectors that an index is trained on
PER_CANDIDATE = 4  # vectors asked for a candidate: neighbouring frames of one window are often found together
BLOCK = 1024  # windows whose vectors are in memory at a time, when the index is made


class _Windows(NamedTuple):
    """The windows of the store at one moment."""

    change: int
    ids: np.ndarray  # rising
    index: StageOne | None  # None where all windows are candidates
    new: np.ndarray  # ids that the index does not know yet: always candidates


class Candidates:
    """The windows that stage two scores: `count` a query, of a store, for queries of a kind, "text" or "like"."""

    def __init__(self, store: Store, embedder: Embedder, kind: str, count: int):
        self.store, self.embedder, self.kind, self.count = store, embedder, kind, count
        self._lock, self._now, self._last = threading.Lock(), None, None

    def refresh(self) -> None:
        """Take notice of a changed store; before every search.

        The index is made again only when it lacks more windows than a query has candidates: fewer are candidates of
        every query.
        """
        with self._lock:
            change, before = self.store.change, self._now
            if before is not None and before.change == change:
                return
            ids, index = self.store.all_windows(), None
            if len(ids) > self.count:
                index = up_to_date(before and before.index, self.store.folder, self.kind, ids, self.count,
                                   lambda: make_stage_one(self.store, self.embedder, ids, self.kind))
            self._now = _Windows(change, ids, index, np.setdiff1d(ids, index.ids) if index else ids)

    def windows(self, where: Filter, most: float) -> np.ndarray | None:
        """Ids, rising, of all windows that the filter leaves; None where those are more than `most`."""
        ids = self._left(self._now, where)
        return ids if len(ids) <= most else None

    def nearest(self, queries: np.ndarray, where: Filter) -> list[np.ndarray]:
        """Ids of the windows to score for each of the queries (B, W), rising; there are more than `count`."""
        now = self._now
        left = self._left(now, where)
        known = np.isin(now.index.ids, left)
        near = candidates_of(now.index, queries, self.count, None if known.all() else known)
        new = np.intersect1d(now.new, left)
        return [np.union1d(ids, new) for ids in near]

    def _left(self, now: _Windows, where: Filter) -> np.ndarray:
        if where == EVERY:
            return now.ids
        if self._last is None or self._last[:2] != (now.change, where):
            self._last = (now.change, where, self.store.all_windows(*where))
        return self._last[2]


def up_to_date(index: StageOne | None, folder: Path, kind: str, ids: np.ndarray, count: int,
               make: Callable[[], StageOne]) -> StageOne:
    """The index at hand, else the one that was kept in the folder; made again, and kept, only when it lacks more than
    `count` of the ids.
    """
    index = index or StageOne.load(folder, kind)
    if index is None or len(np.setdiff1d(ids, index.ids)) > count:
        index = make()
        index.save(folder, kind)
    return index


def make_stage_one(store: Store, embedder: Embedder, ids: np.ndarray, kind: str) -> StageOne:
    """Stage one's index of all windows, their vectors read block by block; trained on a seeded sample of them."""
    some = np.random.default_rng(0).permutation(ids)[:TRAINING // embedder.max_frames]
    pooled = embedder.pool_videos(embedder.unpack(store.features(np.sort(some))))
    vectors, _ = embedder.vectors_of(pooled, kind)
    sample = vectors[vectors.any(axis=2)]
    blocks = ((block, *embedder.vectors_of(pooled, kind)) for block, pooled in store.pooled(BLOCK))
    return StageOne.make(blocks, sample, round(len(sample) / len(some) * len(ids)))


def candidates_of(stage: StageOne, vectors: np.ndarray, count: int, inside: np.ndarray | None) -> list[np.ndarray]:
    """Ids of the windows to score for each of the queries (B, W): `count` of those with a sentence, and as many of
    those without; their vectors lack a part and would lose against the others. inside (N,): where to look.
    """
    if stage.has_sentence.all() or not stage.has_sentence.any():
        return stage.nearest(vectors, count, inside)
    inside = True if inside is None else inside
    halves = [stage.nearest(vectors, count, which & inside) for which in (stage.has_sentence, ~stage.has_sentence)]
    return [np.concatenate(both) for both in zip(*halves)]


class StageOne:
    """The index. ids (N,): the windows, rising; has_sentence (N,): which have one. Made by `make` or `load`."""

    def __init__(self, index, ids: np.ndarray, has_sentence: np.ndarray):
        self.index, self.ids, self.has_sentence = index, ids, has_sentence

    @classmethod
    def make(cls, blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], sample: np.ndarray,
             count: int) -> StageOne:
        """blocks: (ids (n,), vectors (n, S, W), has_sentence (n,)) of all windows; vectors of zeros are none.

        sample: vectors (any, W) to train on. count: about how many there will be; it decides the kind of index.
        """
        faiss = _faiss()
        width = sample.shape[1]
        # Fewer than 39 vectors a list make FAISS warn; so small a sample comes of a small index.
        lists = max(1, min(LISTS, len(sample) // 39))
        index = faiss.index_factory(width, "IDMap,SQ8" if count <= FLAT else f"IVF{lists},RaBitQ",
                                    faiss.METRIC_INNER_PRODUCT)
        ids, has_sentence, n = [], [], 0
        index.train(_rotate(sample))
        for block_ids, vectors, block_has_sentence in blocks:
            real = vectors.any(axis=2)  # (n, S)
            positions = np.broadcast_to(np.arange(n, n + len(vectors))[:, None], real.shape)[real]
            index.add_with_ids(_rotate(vectors[real]), positions)
            ids.append(block_ids)
            has_sentence.append(block_has_sentence)
            n += len(vectors)
        return cls(index, np.concatenate(ids), np.concatenate(has_sentence))

    def nearest(self, queries: np.ndarray, count: int, allowed: np.ndarray | None = None) -> list[np.ndarray]:
        """The ids of at most `count` windows for each of the queries (B, W), best first.

        allowed (N,) bool: the windows to look among.
        """
        faiss = _faiss()
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        if isinstance(self.index, faiss.IndexIVF):
            share = 1.0 if allowed is None else max(allowed.mean(), 1 / self.index.nlist)
            probed = min(self.index.nlist, int(np.ceil(PROBED / share)))  # as many windows are looked at as without
            parameters = faiss.IVFRaBitQSearchParameters(sel=selector, nprobe=probed)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        k = min(PER_CANDIDATE * count, self.index.ntotal)
        _, rows = self.index.search(_rotate(queries), k, params=parameters)  # (B, k), -1: no more
        found = []
        for row in rows:
            row = row[row >= 0]
            _, first = np.unique(row, return_index=True)
            found.append(self.ids[row[np.sort(first)[:count]]])
        return found

    def save(self, folder: Path, kind: str) -> None:
        """Keep it in the index folder; one that cannot be written to is searched all the same."""
        paths = files_of(folder, kind)
        temporary = [path.with_name(f".{os.getpid()}.{path.name}") for path in paths]
        with contextlib.suppress(OSError, RuntimeError, InputError):  # the second is FAISS's
            _faiss().write_index(self.index, str(temporary[0]))
            np.savez(temporary[1], ids=self.ids, has_sentence=self.has_sentence, total=self.index.ntotal)
            for path, final in zip(temporary, paths):
                replace(path, final)
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, kind: str) -> StageOne | None:
        """What was kept, perhaps of an earlier state of the index; None where there is nothing whole."""
        try:
            vectors, windows = files_of(folder, kind)
            index = _faiss().read_index(str(vectors))
            with np.load(windows) as kept:
                whole = index.ntotal == kept["total"]
                has_sentence = kept["has_sentence" if "has_sentence" in kept else "told"]  # told: its name before
                return cls(index, kept["ids"], has_sentence) if whole else None
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, BadZipFile):
            return None


def vectors_of(pooled: np.ndarray, dim: int, views: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What Embedder.pool_videos made, (V, P) -> vectors for queries of a kind, "text" or "like", (V, S, W), and (V,)
    whether a video has a sentence. W = views * dim.
    """
    vectors = pooled.reshape(len(pooled), -1, views * dim)
    has_sentence = vectors[:, -1, dim:].any(axis=1)
    if vectors.shape[1] > 1:
        vectors = vectors[:, -1:] if kind == "like" else vectors[:, :-1]
    return vectors, has_sentence


def files_of(folder: Path, kind: str) -> tuple[Path, Path]:
    """Where stage one of queries of a kind lies: FAISS's file, and which windows its vectors belong to."""
    return folder / f"stage_one_{kind}.faiss", folder / f"stage_one_{kind}.npz"


def _rotate(vectors: np.ndarray) -> np.ndarray:
    """The same random rotation for all (n, W): it spreads each vector evenly over its dimensions, as bits need it.

    Signs, then two small rotations, of rows and columns of the vector as a matrix: far less work than one large one.
    """
    signs, of_rows, of_columns = _rotation(vectors.shape[1])
    n, a, b = len(vectors), len(of_rows), len(of_columns)
    x = (vectors * signs).reshape(n * a, b) @ of_columns
    x = x.reshape(n, a, b).transpose(0, 2, 1).reshape(n * b, a) @ of_rows
    return np.ascontiguousarray(x.reshape(n, a * b), np.float32)


@lru_cache(maxsize=1)
def _rotation(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    a = max(n for n in range(1, int(width ** 0.5) + 1) if width % n == 0)
    of_rows, of_columns = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in (a, width // a))
    return rng.choice(np.float32([-1, 1]), width), of_rows, of_columns


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise InputError(f'searching this many windows needs FAISS ({error}): pip install "narvid[search]"') from error
    return faiss

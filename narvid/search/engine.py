"""A query -> candidates (stage one) -> evaluation's exact scores (stage two) -> answers, a file each.

Here: which windows are scored, Eq. 11 with the statistics of the index, the order. Not here: the model (embedding.py),
nearest vectors (stage_one.py), the statistics (statistics.py), what an answer says (answers.py), what is stored
(store.py).

A pair without a narration, because the window has no sentence or the query is a picture, is scored by 2 z(S_qv):
Eq. 11 with all its weight on the view that there is.

Legend: B queries, n windows in hand, K frames of a window and sentences of its narration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from narvid import InputError, fusion
from narvid.data.frames import read_frames
from narvid.data.videos import read_video
from narvid.search.answers import MOMENTS, NEAR, Answer, Answers, Moment, Seen, by_file, in_words, reasons
from narvid.search.embedding import AnyQueries, Embedder, ViewStatistics
from narvid.search.reading import windows_of
from narvid.search.statistics import compute_statistics, height, of_text
from narvid.search.store import Filter, Store, Window

CANDIDATES = 1000  # windows that stage two scores a query; docs/scaling.md says what that finds
BLOCK = 1024  # windows whose features are in memory at a time: 50 MB at K 12, D 512, two views
RANKED = 5000  # windows that are put together by file
PLAIN = ((0.0, 1.0), None)  # in place of statistics, where there are none: the cosine alone
TOGETHER = 64  # queries scored at a time


class _Scores(NamedTuple):
    """Of B queries with n windows."""

    fused: np.ndarray  # (B, n), Eq. 11
    video: np.ndarray  # (B, n)
    narration: np.ndarray | None  # (B, n)
    both: np.ndarray  # (B, n) whether the narration counts


class Abandoned(Exception):
    """Nobody waits for the answers any more."""


class Engine:
    """Searches one index with the model that made it (InputError for another). candidates: of stage two, a query."""

    def __init__(self, store: Store, embedder: Embedder, *, candidates: int = CANDIDATES):
        embedder.check(store.settings, store.path)
        self.store, self.embedder, self.candidates = store, embedder, candidates
        self.stages = {kind: store.candidates(embedder, kind, candidates) for kind in ("text", "like")}
        self._measured = None

    def search(self, queries: list[str], **same) -> list[Answers]:
        """The best windows for each query.

        Keywords, the same in every way to search: top (10): how many answers, fewer where there are fewer, after the
        first `skip` (0); folder (relative to the videos folder), min_seconds, max_seconds (the file's length), since,
        until (its date, seconds since 1970): what lies outside is left out before anything is ranked; exact (False):
        every window is a candidate; one_a_file (True): an answer is a file, its best window first; wanted: called now
        and then, and where it answers False the search ends with Abandoned. Of windows of one file that overlap only
        the best counts.
        """
        found = []
        for start in range(0, len(queries), TOGETHER):
            encoded = self.embedder.queries(queries[start:start + TOGETHER])
            found += self._find(encoded, np.full(len(encoded[0]), self.embedder.narration), "text", **same)
        return found

    def rows(self, queries: list[str]) -> list[Answers]:
        """How high the best answers stand, without them."""
        return self.search(queries, top=0)

    def like_window(self, window: int, **same) -> Answers:
        """Windows like this one, without it and what overlaps it; KeyError where there is no such window."""
        [itself] = self.store.windows([window])
        return self._like(self.embedder.unpack(self.store.features([window])), itself=itself, **same)

    def like_picture(self, data: bytes, **same) -> Answers:
        """Windows that look like a picture, given the bytes of its file; InputError where that is no picture."""
        try:
            frames = read_frames([BytesIO(data)], self.embedder.picture)
        except InputError as error:
            raise InputError("the picture cannot be read: no jpg, png, webp or gif below 178 million pixels") from error
        return self._like(self.embedder.videos([frames]), **same)

    def like_clip(self, path: str | Path, **same) -> Answers:
        """Windows that look like the first window of a video file; InputError names a file that cannot be read."""
        settings = self.store.settings
        clip = read_video(path, fps=settings["fps"], short_side=settings["short_side"])
        _, _, picked = windows_of(clip, settings["window"], settings["fps"], self.embedder.max_frames)[0]
        frames = read_frames([BytesIO(clip.jpegs[i]) for i in picked], self.embedder.picture)
        return self._like(self.embedder.videos([frames]), **same)

    # ----------------------------------------------------------------------------------------------------- inside

    def _like(self, videos: NamedTuple, **same) -> Answers:
        return self._find(self.embedder.like(videos), self.embedder.has_sentence(videos), "like", **same)[0]

    def _find(self, queries: AnyQueries, narration_used: np.ndarray, kind: str, **same) -> list[Answers]:
        """narration_used (B,): whether it counts for a query; kind: of the statistics; keywords as in `_found`."""
        try:
            self.stages[kind].refresh()
            return self._found(queries, narration_used, kind, **same)
        except KeyError:  # a file was indexed again between stage one and stage two: once more
            self.stages[kind].refresh()
            return self._found(queries, narration_used, kind, **same)

    def _found(self, queries: AnyQueries, narration_used: np.ndarray, kind: str, *, top: int = 10, folder: str = "",
               min_seconds: float = 0.0, max_seconds: float = inf, since: float = -inf, until: float = inf,
               exact: bool = False, itself: Window | None = None, wanted: Callable[[], bool] | None = None,
               skip: int = 0, one_a_file: bool = True) -> list[Answers]:
        stage, where = self.stages[kind], Filter(folder, min_seconds, max_seconds, since, until)
        every = stage.windows(where, inf if exact else self.candidates)
        if every is not None and not len(every):
            return [Answers() for _ in narration_used]
        statistics = self._statistics()
        statistics = statistics[kind] if kind == "like" or of_text(statistics) else None
        how = {"top": top, "skip": skip, "one_a_file": one_a_file, "itself": itself}
        if every is not None:
            scores = self._score(queries, narration_used, every, statistics, wanted)
            return [self._answers(_row(queries, b), kind, every, _row(scores, b), statistics, **how)
                    for b in range(len(narration_used))]
        answers = []
        for b, ids in enumerate(stage.nearest(self.embedder.pool_queries(queries, statistics or PLAIN), where)):
            row = _row(queries, b)
            scores = self._score(row, narration_used[b:b + 1], ids, statistics, wanted)
            answers.append(self._answers(row, kind, ids, _row(scores, 0), statistics, **how))
        return answers

    def _statistics(self) -> dict[str, ViewStatistics]:
        """Those of the index; before its first run has ended, those of what there is."""
        stored = self.store.statistics
        if stored is None and self._measured is None:
            self._measured = compute_statistics(self.store, self.embedder, None)
        return stored or self._measured

    def _score(self, queries: AnyQueries, narration_used: np.ndarray, ids: np.ndarray,
               statistics: ViewStatistics | None, wanted: Callable[[], bool] | None) -> _Scores:
        """Stage two: evaluation's scores of B queries with these windows, their features read block by block."""
        parts, narration_used = [], narration_used & (statistics is not None and statistics[1] is not None)
        for start in range(0, len(ids), BLOCK):
            if wanted is not None and not wanted():
                raise Abandoned
            videos = self.embedder.unpack(self.store.features(ids[start:start + BLOCK]))
            scores = self.embedder.score(queries, videos)
            both = torch.from_numpy(narration_used[:, None] & self.embedder.has_sentence(videos)[None])  # (B, n)
            fused = scores["video"] if statistics is None else fuse(scores, both, self.embedder.weight, statistics)
            parts.append(_Scores(fused.numpy(), scores["video"].numpy(),
                                 scores["narration"].numpy() if "narration" in scores else None, both.numpy()))
        return _Scores(*(None if column[0] is None else np.concatenate(column, axis=1) for column in zip(*parts)))

    def _answers(self, query: AnyQueries, kind: str, ids: np.ndarray, scores: _Scores,
                 statistics: ViewStatistics | None, *, top: int, skip: int, one_a_file: bool,
                 itself: Window | None) -> Answers:
        """The best of n scored windows, for one query."""
        fused, answers = scores.fused[0], Answers()
        if kind == "text" and statistics is not None:
            answers.height, level = height(fused), self.store.fact("level")
            answers.fits = None if level is None or answers.height is None else answers.height >= level
        if not top:
            return answers
        order = np.argsort(-fused, kind="stable")[:RANKED]  # of equal ones the window with the smaller id
        middle = float(np.median(fused))
        near = middle + NEAR * (float(fused.max()) - middle) if answers.fits is not False else inf
        place_of = {}
        groups = by_file(self._by_rank(ids, fused, order, place_of), itself, one_a_file, near)
        taken = list(groups) if one_a_file else list(islice(groups, skip + top))
        answers.total, taken = len(taken), taken[skip:skip + top]
        if not taken:
            return answers
        videos = self.embedder.unpack(self.store.features([group[0][1].id for group in taken]))
        weights = self.embedder.filter_weights(query, videos) or {}
        for j, group in enumerate(taken):
            (score, window), others = group[0], group[1:]
            place = place_of[window.id]
            both = bool(scores.both[0, place])
            frames = self._frames(window, {view: w[0, j] for view, w in weights.items()}, both)
            s_video, s_narration = float(scores.video[0, place]), float(scores.narration[0, place]) if both else None
            moments = [Moment(w.id, w.start, w.end, at, w.picks[len(w.picks) // 2]) for at, w in others[:MOMENTS]]
            answers.append(Answer(
                skip + j + 1, window.file, window.id, window.path, window.start, window.end, score, s_video,
                s_narration, frames, reasons(s_video, s_narration, frames, statistics), in_words(frames, window.end),
                len(others), moments))
        return answers

    def _by_rank(self, ids: np.ndarray, fused: np.ndarray, order: np.ndarray,
                 place_of: dict[int, int]) -> Iterator[tuple[float, Window]]:
        """(score, window) from the best on, read from the store as far as is asked for; places in ids are noted."""
        for start in range(0, len(order), 256):
            places = order[start:start + 256]
            for place, window in zip(places.tolist(), self.store.windows(ids[places].tolist())):
                place_of[window.id] = place
                yield float(fused[place]), window

    def _frames(self, window: Window, weights: dict[str, np.ndarray], both: bool) -> list[Seen]:
        """The window's frames with the filter's weights, each a view's (K,); without a filter all count alike."""
        of_file = {frame.number: frame for frame in self.store.frames(window.file)}
        frames = [of_file[number] for number in window.picks]
        count = sum(frame.sentence is not None for frame in frames)
        found = []
        for k, frame in enumerate(frames):
            used = both and frame.sentence is not None
            at_frame = float(weights["video"][k]) if weights else 1 / len(frames)
            at_sentence = (float(weights["narration"][k]) if weights else 1 / count) if used else 0.0
            found.append(Seen(*frame, at_frame, at_sentence))
        return found


def fuse(scores: dict[str, Tensor], both: Tensor, weight: float, statistics: ViewStatistics) -> Tensor:
    """Eq. 11 (B, n) with given statistics; 2 z(S_qv) where `both` (B, n) says that the narration does not count; what
    hardly spreads is centred, not divided, for videos that look alike are ranked too.
    """
    of_video, of_narration = (of and (of[0], of[1] if fusion.spreads(*of) else 1.0) for of in statistics)
    alone = fusion.fuse(scores["video"], scores["video"], 1.0, (of_video, of_video))
    if not both.any():
        return alone
    return torch.where(both, fusion.fuse(scores["video"], scores["narration"], weight, (of_video, of_narration)), alone)


def _row(features: AnyQueries | _Scores, b: int) -> AnyQueries | _Scores:
    """Row b of a tuple of arrays or tensors, as one of one row."""
    if isinstance(features, dict):
        return {view: _row(of_view, b) for view, of_view in features.items()}
    return type(features)(*(None if x is None else x[b:b + 1] for x in features))

"""A query -> candidates (stage one) -> evaluation's exact scores (stage two) -> answers, a file each.

Here: which windows are scored, Eq. 11 with the statistics of the index, the order. Not here: the model (embedding.py),
nearest vectors (stage_one.py), the statistics (statistics.py), what an answer says (answers.py), what is stored
(store.py).

A pair without a narration, because the window has no sentence or the query is a picture, is scored by 2 z(S_qv):
Eq. 11 with all its weight on the view that there is. A query of several parts (parts.py) scores the sum of its parts'
own scores of Eq. 11, each with the statistics of its kind, "text" or "like", times their weights.

Legend: B queries, P parts, n windows in hand, K frames of a window and sentences of its narration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from narvid.search.answers import (MOMENTS, NEAR, Answer, Answers, Looked, Moment, Said, Seen, by_file, in_words,
                                   reasons)
from narvid.search.embedding import AnyQueries, Embedder, ViewStatistics
from narvid.search.parts import Part, name, scaled, sentence
from narvid.search.reading import first_window
from narvid.search.speech import Asked, Speech, counted
from narvid.search.statistics import (JUDGED_FROM, SHARE, compute_statistics, height, nonsense, of_text,
                                      speech_statistics)
from narvid.search.rows import Filter, Frame, Window
from narvid.search.store import Store

CANDIDATES = 1000  # windows that stage two scores a query; docs/scaling.md says what that finds
BLOCK = 1024  # windows whose features are in memory at a time: 50 MB at K 12, D 512, two views
RANKED = 5000  # windows that are put together by file
PLAIN = ((0.0, 1.0), None)  # in place of statistics, where there are none: the cosine alone
TOGETHER = 64  # queries scored at a time
SHARED = 2  # times as many windows as a query has candidates: up to so many are scored for all queries of a batch


class _Scores(NamedTuple):
    """Of P parts with n windows."""

    fused: np.ndarray  # (P, n), Eq. 11
    video: np.ndarray  # (P, n)
    narration: np.ndarray | None  # (P, n)
    both: np.ndarray  # (P, n) whether the narration counts
    speech: np.ndarray | None = None  # (P, n) z_qs, NaN where nothing is said; None where speech plays no part


class _Group(NamedTuple):
    """P parts that are scored together: all texts of all queries, or one picture, clip or window."""

    kind: str  # of the statistics, "text" or "like"
    features: AnyQueries  # P rows
    narration_used: np.ndarray  # (P,) whether it counts
    query: np.ndarray  # (P,) whose part it is
    weight: np.ndarray  # (P,)
    names: list[str]  # P, for an explanation
    asked: Asked | None = None  # P texts as speech is asked for them; None where nothing is said, and for pictures


class _Scored(NamedTuple):
    """A part of a query with its scores of n windows."""

    weight: float
    name: str
    features: AnyQueries  # one row
    scores: _Scores  # one row
    statistics: ViewStatistics | None
    asked: Asked | None


class _Read:
    """What the answers to a batch of queries read of the store, once for all of them."""

    def __init__(self, store: Store):
        self.store, self.level = store, store.fact("level")
        self._windows: dict[int, Window] = {}
        self._frames: dict[int, dict[int, Frame]] = {}

    def windows(self, ids: list[int]) -> list[Window]:
        """These windows, in this order; KeyError where one does not exist (any more)."""
        new = [id for id in ids if id not in self._windows]
        self._windows.update(zip(new, self.store.windows(new)))
        return [self._windows[id] for id in ids]

    def frames(self, window: Window) -> list[Frame]:
        """The picked frames of a window, in order."""
        if window.file not in self._frames:
            self._frames[window.file] = {frame.number: frame for frame in self.store.frames(window.file)}
        return [self._frames[window.file][number] for number in window.picks]


class Abandoned(Exception):
    """Nobody waits for the answers any more."""


class Engine:
    """Searches one index with the model that made it (InputError for another). candidates: of stage two, a query."""

    def __init__(self, store: Store, embedder: Embedder, *, candidates: int = CANDIDATES):
        embedder.check(store.settings, store.path)
        self.store, self.embedder, self.candidates = store, embedder, candidates
        self.stages = {kind: store.candidates(embedder, kind, candidates) for kind in ("text", "like")}
        self.speech, self._measured, self._speech_measured = Speech(store, embedder), None, None

    @property
    def window(self) -> tuple[float, float, int, int]:
        """What a window of this index is: seconds, frames a second, their short side, and how many are picked."""
        settings = self.store.settings
        return settings["window"], settings["fps"], settings["short_side"], self.embedder.max_frames

    def search(self, queries: Sequence[str | list[Part]], **same) -> list[Answers]:
        """The best windows for each query, a sentence or a list of parts (parts.py); the value of a picture or a clip
        is what see_picture or see_clip makes of it.

        Keywords: top (10): how many answers, fewer where there are fewer, after the first `skip` (0); folder (relative
        to the videos folder), min_seconds, max_seconds (the file's length), since, until (its date, seconds
        since 1970), has_speech (False; True: something is said in the window): what lies outside is left out before
        anything is ranked; exact (False): every window is a candidate; one_a_file (True): an answer is a file, its best
        window first; wanted: called now and then, and where it answers False the search ends with Abandoned. Of windows
        of one file that overlap only the best counts, and none that overlaps a window which is asked for. KeyError
        where there is no such window.
        """
        found = []
        for start in range(0, len(queries), TOGETHER):
            batch = [scaled(sentence(query) if isinstance(query, str) else query)
                     for query in queries[start:start + TOGETHER]]
            try:
                found += self._found(batch, **same)
            except KeyError:  # a file was indexed again between stage one and stage two: once more
                found += self._found(batch, **same)
        return found

    def rows(self, queries: list[str]) -> list[Answers]:
        """How high the best answers stand, without them."""
        return self.search(queries, top=0)

    def like_window(self, window: int, **same) -> Answers:
        """Windows like this one, without it and what overlaps it; KeyError where there is no such window."""
        return self.search([[Part(1.0, "window", window)]], **same)[0]

    def like_picture(self, data: bytes, **same) -> Answers:
        """Windows that look like a picture, given the bytes of its file; InputError where that is no picture."""
        return self.search([[Part(1.0, "picture", self.see_picture(data))]], **same)[0]

    def like_clip(self, path: str | Path, **same) -> Answers:
        """Windows that look like the first window of a video file; InputError names a file that cannot be read."""
        return self.search([[Part(1.0, "clip", self.see_clip(path))]], **same)[0]

    def see_picture(self, data: bytes) -> NamedTuple:
        """The features of a picture, given the bytes of its file; InputError where that is no picture."""
        try:
            frames = read_frames([BytesIO(data)], self.embedder.picture)
        except InputError as error:
            raise InputError("the picture cannot be read: no jpg, png, webp or gif below 178 million pixels") from error
        return self.embedder.videos([frames])

    def see_clip(self, path: str | Path) -> NamedTuple:
        """The features of the first window of a video file; InputError names a file that cannot be read."""
        return self.see_frames(first_window(path, *self.window))

    def see_frames(self, jpegs: list[bytes]) -> NamedTuple:
        """The features of a window with these frames (reading.first_window)."""
        return self.embedder.videos([read_frames([BytesIO(jpeg) for jpeg in jpegs], self.embedder.picture)])

    # ----------------------------------------------------------------------------------------------------- inside

    def _groups(self, batch: list[list[Part]]) -> list[_Group]:
        """The parts of a batch of queries, encoded."""
        groups, texts = [], [(b, part) for b, parts in enumerate(batch) for part in parts if part.kind == "text"]
        if texts:
            narration_used, values = np.full(len(texts), self.embedder.narration), [part.value for _, part in texts]
            encoded = self.embedder.queries(values)
            groups.append(_Group("text", encoded, narration_used, np.array([b for b, _ in texts]),
                                 np.array([part.weight for _, part in texts]), [name(part) for _, part in texts],
                                 self.speech.ask(values, encoded.eos.float().cpu().numpy())))
        for b, part in ((b, part) for b, parts in enumerate(batch) for part in parts if part.kind != "text"):
            videos = part.value
            if part.kind == "window":
                videos = self.embedder.unpack(self.store.features([part.value]))
            groups.append(_Group("like", self.embedder.like(videos), self.embedder.has_sentence(videos), np.array([b]),
                                 np.array([part.weight]), [name(part)]))
        return groups

    def _found(self, batch: list[list[Part]], *, top: int = 10, folder: str = "", min_seconds: float = 0.0,
               max_seconds: float = inf, since: float = -inf, until: float = inf, exact: bool = False,
               wanted: Callable[[], bool] | None = None, skip: int = 0, one_a_file: bool = True,
               has_speech: bool = False) -> list[Answers]:
        """Answers to each of a batch of queries whose weights are scaled; keywords as in `search`."""
        groups = self._groups(batch)
        where = Filter(folder, min_seconds, max_seconds, since, until, has_speech)
        stages = {kind: self.stages[kind] for kind in dict.fromkeys(group.kind for group in groups)}
        for stage in stages.values():
            stage.refresh()
        every = next(iter(stages.values())).windows(where, inf if exact else self.candidates)
        if every is not None and not len(every):
            return [Answers() for _ in batch]
        itself = [[part.value for part in parts if part.kind == "window"] for parts in batch]
        statistics = self._statistics()
        if "text" in stages and not of_text(statistics):
            statistics = dict.fromkeys(statistics)  # the cosines alone, of all parts: they are added
        how = {"top": top, "skip": skip, "one_a_file": one_a_file, "read": _Read(self.store)}
        candidates = self._candidates(groups, len(batch), where, statistics) if every is None else [every] * len(batch)
        union = np.unique(np.concatenate(candidates)) if every is None else every
        together = every is not None or len(union) <= SHARED * self.candidates  # their features are read once for all
        scores, answers = self._score(groups, union, statistics, wanted) if together else None, []
        for b, ids in enumerate(candidates):
            own = groups
            if not together:
                own = [_part_of_group(group, group.query == b) for group in groups if (group.query == b).any()]
                scores = self._score(own, ids, statistics, wanted)
            parts = _parts_of(b, own, scores, statistics)
            if together and len(ids) < len(union):
                places = np.searchsorted(union, ids)
                parts = [part._replace(scores=_columns(part.scores, places)) for part in parts]
            answers.append(self._answers(parts, ids, _is_text(batch[b]), self.store.windows(itself[b]), **how))
        return answers

    def _candidates(self, groups: list[_Group], count: int, where: Filter,
                    statistics: dict[str, ViewStatistics | None]) -> list[np.ndarray]:
        """Stage one: for each of `count` queries the ids to score, rising. The parts of a kind make one vector, since
        a vector's score is their sum; what is found for each kind is put together.
        """
        vectors, found = {}, [np.empty(0, np.int64)] * count  # vectors: {kind: {query: its parts' sum}}
        for group in groups:
            pooled = self.embedder.pool_queries(group.features, statistics[group.kind] or PLAIN, group.narration_used)
            of_kind = vectors.setdefault(group.kind, {})
            for b, weight, vector in zip(group.query.tolist(), group.weight.tolist(), pooled):
                of_kind[b] = of_kind.get(b, 0) + weight * vector
        for kind, of_kind in vectors.items():
            for b, ids in zip(of_kind, self.stages[kind].nearest(np.stack(list(of_kind.values())), where)):
                found[b] = np.union1d(found[b], ids)
        for group in (group for group in groups if group.asked is not None):
            for p in np.flatnonzero(group.weight > 0):
                asked, b = _rows(group.asked, slice(p, p + 1)), group.query[p]
                found[b] = np.union1d(found[b], self.speech.candidates(asked, where, max(1, self.candidates // 4)))
        return found

    def _statistics(self) -> dict[str, ViewStatistics]:
        """Those of the index; before its first run has ended, those of what there is."""
        stored = self.store.statistics
        if stored is None and self._measured is None:
            self._measured = compute_statistics(self.store, self.embedder, None)
        return stored or self._measured

    def _of_speech(self) -> Sequence[Sequence[float]]:
        """Mean and deviation of share and cosine of what is said (speech.py), as `_statistics`."""
        stored = self.store.fact("speech_statistics")
        if stored is None and self._speech_measured is None:
            self._speech_measured = speech_statistics(self.store, self.speech, self.embedder, None)
        return stored or self._speech_measured

    def _score(self, groups: list[_Group], ids: np.ndarray, statistics: dict[str, ViewStatistics | None],
               wanted: Callable[[], bool] | None) -> list[_Scores]:
        """Stage two: evaluation's scores of all parts with these windows, their features read block by block."""
        found = [[] for _ in groups]
        for start in range(0, len(ids), BLOCK):
            videos = self.embedder.unpack(self.store.features(ids[start:start + BLOCK]))
            has_sentence = self.embedder.has_sentence(videos)
            for group, parts in zip(groups, found):
                if wanted is not None and not wanted():
                    raise Abandoned
                of_kind = statistics[group.kind]
                used = group.narration_used & (of_kind is not None and of_kind[1] is not None)
                scores = self.embedder.score(group.features, videos)
                both = torch.from_numpy(used[:, None] & has_sentence[None])  # (P, n)
                fused = scores["video"] if of_kind is None else fuse(scores, both, self.embedder.weight, of_kind)
                fused, speech = fused.numpy(), None
                if group.asked is not None and of_kind is not None:
                    speech = counted(self.speech.fit(group.asked, ids[start:start + BLOCK]), self._of_speech())
                    fused = fused + np.nan_to_num(speech, nan=0.0)
                parts.append(_Scores(fused, scores["video"].numpy(), scores["narration"].numpy()
                                     if "narration" in scores else None, both.numpy(), speech))
        return [_Scores(*(None if column[0] is None else np.concatenate(column, axis=1) for column in zip(*parts)))
                for parts in found]

    def _answers(self, parts: list[_Scored], ids: np.ndarray, judged: bool, itself: list[Window], *, top: int,
                 skip: int, one_a_file: bool, read: _Read) -> Answers:
        """The best of n scored windows, for one query; judged: whether it shall be said that nothing fits."""
        fused, answers = sum(part.weight * part.scores.fused[0] for part in parts), Answers()
        if judged and parts[0].statistics is not None:
            answers.height, level = height(fused), read.level
            answers.fits = None if level is None or answers.height is None else answers.height >= level
        if not top:
            return answers
        order = np.argsort(-fused, kind="stable")[:RANKED]  # of equal ones the window with the smaller id
        middle = float(np.median(fused))
        near = middle + NEAR * (float(fused.max()) - middle) if answers.fits is not False else inf
        place_of = {}
        groups = by_file(self._by_rank(ids, fused, order, place_of, read), itself, one_a_file, near)
        taken = list(groups) if one_a_file else list(islice(groups, skip + top))
        answers.total, taken = len(taken), taken[skip:skip + top]
        if not taken:
            return answers
        videos = self.embedder.unpack(self.store.features([group[0][1].id for group in taken]))
        weights = [(self.embedder.filter_weights(part.features, videos) or {}) if part.weight > 0 else {}
                   for part in parts]
        spoken = self._said(parts, [(group[0][1].id, place_of[group[0][1].id]) for group in taken])
        for j, group in enumerate(taken):
            (score, window), others = group[0], group[1:]
            place = place_of[window.id]
            looked = [Looked(part.weight, part.name, float(part.scores.video[0, place]),
                             float(part.scores.narration[0, place]) if part.scores.both[0, place] else None,
                             part.statistics) for part in parts]
            frames = self._frames(read.frames(window), looked,
                                  [{view: w[0, j] for view, w in of.items()} for of in weights])
            heard = [part for part in looked if part.s_narration is not None]
            s_video = sum(part.weight * part.s_video for part in looked)
            s_narration = sum(part.weight * part.s_narration for part in heard) if heard else None
            speech, said = spoken.get(window.id, (None, None))
            moments = [Moment(w.id, w.start, w.end, at, w.picks[len(w.picks) // 2]) for at, w in others[:MOMENTS]]
            answers.append(Answer(
                skip + j + 1, window.file, window.id, window.path, window.start, window.end, score, s_video,
                s_narration, frames, reasons(looked, frames, speech, said), in_words(frames, window.end), len(others),
                moments, speech, said))
        return answers

    def _said(self, parts: list[_Scored], windows: list[tuple[int, int]]) -> dict[int, tuple[float, Said | None]]:
        """Of windows (id, place among the scores) in which something is said: what it adds to the score, and what the
        part that it adds most to is answered by; None where it adds nothing.
        """
        found = {}
        for part in (part for part in parts if part.scores.speech is not None):
            best = self.speech.best(part.asked, [id for id, _ in windows])
            for id, place in windows:
                if id in best:
                    added, most, said = found.get(id, (0.0, 0.0, None))
                    more = part.weight * float(part.scores.speech[0, place])
                    found[id] = (added + more, more, Said(*best[id][1:])) if more > most else (added + more, most, said)
        return {id: (added, said) for id, (added, _, said) in found.items()}

    def _by_rank(self, ids: np.ndarray, fused: np.ndarray, order: np.ndarray,
                 place_of: dict[int, int], read: _Read) -> Iterator[tuple[float, Window]]:
        """(score, window) from the best on, read from the store as far as is asked for; places in ids are noted."""
        for start in range(0, len(order), 256):
            places = order[start:start + 256]
            for place, window in zip(places.tolist(), read.windows(ids[places].tolist())):
                place_of[window.id] = place
                yield float(fused[place]), window

    def _frames(self, frames: list[Frame], parts: list[Looked],
                weights: list[dict[str, np.ndarray]]) -> list[Seen]:
        """A window's frames with what the parts that are looked for look at: the filter's weights, each a view's
        (K,), summed as the parts are; without a filter all count alike.
        """
        has_sentence = np.array([frame.sentence is not None for frame in frames])
        at_frame, at_sentence, narrated = np.zeros(len(frames)), np.zeros(len(frames)), 0.0
        for part, of in ((part, of) for part, of in zip(parts, weights) if part.weight > 0):
            at_frame += part.weight * (of["video"][:len(frames)] if of else np.full(len(frames), 1 / len(frames)))
            if part.s_narration is not None:
                narrated += part.weight
                at_sentence += part.weight * has_sentence * (
                    of["narration"][:len(frames)] if of else 1 / has_sentence.sum())
        at_sentence /= narrated or 1.0
        return [Seen(*frame, float(a), float(b)) for frame, a, b in zip(frames, at_frame, at_sentence)]


def measure_level(store: Store, embedder: Embedder) -> float | None:
    """The height (`height`) above which an answer to a text fits, by what nonsense reaches in this very index.

    None where there are too few windows to say.
    """
    if store.count() < JUDGED_FROM:
        return None
    heights = [answers.height for answers in Engine(store, embedder).rows(nonsense())]
    return float(np.quantile([h for h in heights if h is not None] or [np.nan], 1 - SHARE))


def fuse(scores: dict[str, Tensor], both: Tensor, weight: float, statistics: ViewStatistics) -> Tensor:
    """Eq. 11 (B, n) with given statistics; 2 z(S_qv) where `both` (B, n) says that the narration does not count; what
    hardly spreads is centred, not divided, for videos that look alike are ranked too.
    """
    of_video, of_narration = (of and (of[0], of[1] if fusion.spreads(*of) else 1.0) for of in statistics)
    alone = fusion.fuse(scores["video"], scores["video"], 1.0, (of_video, of_video))
    if not both.any():
        return alone
    return torch.where(both, fusion.fuse(scores["video"], scores["narration"], weight, (of_video, of_narration)), alone)


def _is_text(parts: list[Part]) -> bool:
    """Whether it can be said that nothing fits a query: it is a single text, like the nonsense it is held against."""
    return len(parts) == 1 and parts[0].kind == "text"


def _parts_of(query: int, groups: list[_Group], scores: list[_Scores],
              statistics: dict[str, ViewStatistics | None]) -> list[_Scored]:
    """The parts of one query out of all groups."""
    return [_Scored(group.weight[p].item(), group.names[p], _rows(group.features, slice(p, p + 1)),
                    _rows(of_group, slice(p, p + 1)), statistics[group.kind],
                    None if group.asked is None else _rows(group.asked, slice(p, p + 1)))
            for group, of_group in zip(groups, scores) for p in np.flatnonzero(group.query == query).tolist()]


def _part_of_group(group: _Group, which: np.ndarray) -> _Group:
    """Those of its parts (P,)."""
    return group._replace(features=_rows(group.features, which), narration_used=group.narration_used[which],
                          query=group.query[which], weight=group.weight[which],
                          names=[name for name, own in zip(group.names, which) if own],
                          asked=None if group.asked is None else _rows(group.asked, which))


def _columns(scores: _Scores, places: np.ndarray) -> _Scores:
    """The scores of these windows."""
    return _Scores(*(None if x is None else x[:, places] for x in scores))


def _rows(features: AnyQueries | _Scores | Asked, which: slice | np.ndarray) -> AnyQueries | _Scores | Asked:
    """These rows of a tuple of arrays or tensors."""
    if isinstance(features, dict):
        return {view: _rows(of_view, which) for view, of_view in features.items()}
    return type(features)(*(None if x is None else x[which] for x in features))

"""An answer, and what is said of it: where it is, in words, and why it stands where it stands.

Here: texts and the grouping of windows by file. Not here: scores (engine.py), how a page or a table shows them.
This file must not import torch: a query that a running server answers does without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from narvid.search.rows import File, Window

if TYPE_CHECKING:
    from narvid.search.embedding import ViewStatistics

MOMENTS = 12  # further ones of a file that are listed; all are counted
NEAR = 0.5  # a further moment stands at least this share as far above the middle of all scores as the best answer


class Seen(NamedTuple):
    """A frame of an answer and its sentence, with what the filter lets the query look at; 0 is dropped."""

    number: int
    time: float
    sentence: str | None
    frame_weight: float
    sentence_weight: float


class Looked(NamedTuple):
    """What a part of a query found in a window; s_narration: None where the narration does not count."""

    weight: float
    name: str
    s_video: float
    s_narration: float | None
    statistics: ViewStatistics | None


class Moment(NamedTuple):
    """A further window of an answer's file; frame: the number of a picture of it, from its middle."""

    window: int
    start: float
    end: float
    score: float
    frame: int


class Said(NamedTuple):
    """What is said in an answer, in seconds of its file."""

    start: float
    end: float
    text: str


class Answer(NamedTuple):
    """A window found: times in seconds of its file; score is Eq. 11's, s_video and s_narration its two parts, of a
    query of several parts the sums of theirs.
    """

    rank: int
    file: int
    window: int
    path: str
    start: float
    end: float
    score: float
    s_video: float
    s_narration: float | None  # None where the narration is not used
    frames: list[Seen]
    why: str
    words: str  # what happens, and when
    more: int  # further moments in this file
    moments: list[Moment]  # the best of them
    speech: float | None = None  # what of the score is for what is said (z_qs of speech.py); None where nothing is
    said: Said | None = None  # what is said that fits best, where it counts

    def as_dict(self) -> dict:
        """For JSON: frames, moments and what is said as dicts too."""
        lists = {name: [x._asdict() for x in getattr(self, name)] for name in ("frames", "moments")}
        return self._asdict() | lists | {"said": self.said and self.said._asdict()}


class Answers(list):
    """Answers to one query, best first. fits: whether the best fits at all, None where nobody can say; total: how many
    there would be without a limit; height: of the best (statistics.height).
    """

    fits: bool | None = None
    total: int = 0
    height: float | None = None


def as_dict(answer: Answer, file: File) -> dict:
    """An answer as programs and the page get it: with the file's length, and the moment to play from: that of its best
    frame, or, where what is said counts for most of the score, of that.
    """
    best = max(answer.frames, key=lambda frame: frame.frame_weight + frame.sentence_weight, default=None)
    moment = {"best": best.number if best else None, "moment": best.time if best else answer.start}
    if answer.said and 2 * answer.speech > answer.score:
        moment["moment"] = max(answer.start, answer.said.start)
    return {**answer.as_dict(), **moment, "seconds": file.seconds, "date": date_of(file),
            "recorded": file.recorded is not None}


def date_of(file: File) -> float:
    """When it was recorded, else written to, in seconds since 1970."""
    return file.mtime_ns / 1e9 if file.recorded is None else file.recorded


def printable(text: str) -> str:
    """A file name may hold line breaks, terminal codes and bytes that are no text: these are written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss, the fraction cut off."""
    whole = int(seconds + 1e-6)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:{'02' if hours else ''}d}:{whole % 60:02d}"


def by_file(ranked: Iterable[tuple[float, Window]], itself: Sequence[Window], one_a_file: bool,
            near: float) -> Iterator[list[tuple[float, Window]]]:
    """(score, window) from the best on -> for each answer its window, and further ones of the file that score `near`.

    Of windows of one file that overlap only the best counts, and none that overlaps one of `itself`. not one_a_file:
    every window that is left is an answer. Windows are read as far as is asked for, unless files are put together.
    """
    seen: dict[int, list[Window]] = {}
    for window in itself:
        seen.setdefault(window.file, []).append(window)
    groups: dict[int, list[tuple[float, Window]]] = {}
    for score, window in ranked:
        others = seen.setdefault(window.file, [])
        if any(w.start < window.end and window.start < w.end for w in others):
            continue
        others.append(window)
        if not one_a_file:
            yield [(score, window)]
        elif window.file not in groups or score >= near:
            groups.setdefault(window.file, []).append((score, window))
    yield from groups.values()


def in_words(frames: Sequence[Seen], end: float) -> str:
    """When it happens and, where a sentence says it, what: "0:04 to 0:06: a red star grows"."""
    weight = [frame.frame_weight + frame.sentence_weight for frame in frames]
    best = max(range(len(frames)), key=lambda k: (weight[k], -k))
    first = last = best
    sentence = frames[best].sentence
    while first > 0 and weight[first - 1] >= 0.5 * weight[best] and frames[first - 1].sentence == sentence:
        first -= 1
    while last + 1 < len(frames) and weight[last + 1] >= 0.5 * weight[best] and frames[last + 1].sentence == sentence:
        last += 1
    until = frames[last + 1].time if last + 1 < len(frames) else max(end, frames[last].time)
    when = f"{clock(frames[first].time)} to {clock(until)}"
    return when if not sentence or not sentence.strip() else f"{when}: {sentence.strip()}"


def reasons(parts: Sequence[Looked], frames: Sequence[Seen], speech: float | None = None,
            said: Said | None = None) -> str:
    """Why a window stands where it stands, in a sentence: what each part says of it, and which frames count."""
    if len(parts) == 1:
        found = _standing(parts[0])
    else:
        found = "; ".join(f"{'minus ' if part.weight < 0 else ''}{part.name}: {_standing(part)}" for part in parts)
    best, told = (max(frames, key=lambda frame: frame[-n]) for n in (2, 1))
    looked = f"the frame at {best.time:.1f} s counts most ({best.frame_weight:.0%})"
    if told.sentence_weight > 0:
        looked += f', of the sentences "{told.sentence}" ({told.sentence_weight:.0%})'
    if best.frame_weight == min(frame.frame_weight for frame in frames):
        looked = "all its frames count alike"
    spoken = f'; at {clock(said.start)} is said "{said.text}", which adds {speech:.2f}' if said else ""
    return f"{found}; {looked}{spoken}"


def _standing(part: Looked) -> str:
    """How far a part's scores of a window stand above others; without statistics the cosines."""
    from narvid.fusion import spreads  # torch is there by now

    values = [("frames", part.s_video, 0), ("sentences", part.s_narration, 1)]
    values = [(name, s, i) for name, s, i in values if s is not None]
    if part.statistics is None:
        return " and ".join(f"the cosine of its {name} with the query is {s:.3f}" for name, s, _ in values)
    found = []
    for name, s, i in values:
        mean, std = part.statistics[i] or (0.0, 0.0)
        z = (s - mean) / std if spreads(mean, std) else 0.0
        found.append(f"its {name} lie {abs(z):.1f} standard deviations {'above' if z >= 0 else 'below'}")
    return " and ".join(found) + " the mean of all pairs"

"""The narration file: timestamped sentences of each video, and their join with frames.

A narration is what a captioner wrote about the extracted frames of one video: one sentence a frame, in chronological
order (Sec. 3.1), each with the time of its frame in seconds. Sentences meet frames by that time, never by position.
No pixel is touched here (`frames.py`), no sentence is made (`narvid/narration`) and none is tokenized (`datasets.py`).
What published files hold is in `published_narrations.py`, what is wrong with a file in `narvid/narration/check.py`.

A frame has one sentence or none: that is decided here and nowhere else (`Narration.times` increase strictly, `join`
gives a frame at most one). To let it have several, change these two and what `join` returns.

    {"video": "video7", "captioner": "llava-1.5-7b", "prompt": "...", "sentences": [{"time": 0.0, "text": "..."}, ...]}

Beside it may stand "source": "speech": then the sentences are what is said around each frame, and silence is a hole.

Check a file, ours or a published one, against the extracted frames; turn a published one into the form above:
    python -m narvid.narration check narrations.jsonl --frames data/msrvtt/frames
    python -m narvid.narration convert published.json --frames data/msrvtt/frames --out data/msrvtt/narrations.jsonl
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import comb
from pathlib import Path
from statistics import median
from typing import NamedTuple

from narvid import InputError
from narvid.data.frames import pick_frames
from narvid.data.published_narrations import CAPTIONER, assign, parse_published, read_form
from narvid.files import write_json_lines
from narvid.parsing import parse_json

LONE_FRAME_TOLERANCE = 0.25  # seconds, where a video has one frame and hence no spacing
RATE_MARGIN = 0.1  # sentences and frames whose median spacings differ by more belong to different frame rates, ...
SPEECH = "speech"  # the source of sentences that somebody in the video says
STRAY_SHARE = 0.1  # ... if more of the sentences than this lie on no frame; of any other rate a quarter and more do


class Narration(NamedTuple):
    """What one captioner wrote about one video; `times` in seconds, strictly increasing, one a sentence.

    source: "speech" for what is said in the video (narvid/narration/speech.py), "" for captions.
    """

    captioner: str
    prompt: str
    times: list[float]
    sentences: list[str]
    source: str = ""


# ---- reading ----


def load_narrations(path: str | Path, frame_times: Mapping[str, Sequence[float]] | None = None) -> dict[str, Narration]:
    """Read a narration file, ours (JSON lines) or the release's list of {"video_file", "caption_1", "caption_2", ...}.

    frame_times: video -> times (s) of all its extracted frames; needed for the published form only, which has no times.
    There m captions belong to all n frames (m == n) or to the m frames a release picks of n (m < n); videos without
    extracted frames are left out, since nothing can date their captions.
    Raises InputError with file and line for anything malformed, a video narrated twice, m > n, Cap4Video's titles.
    """
    text, form = read_form(path)
    if form == "ours":
        return parse_lines(path, text)
    captions_of = parse_published(path, text, form, frame_times or ())
    if form == "titles" or frame_times is None:
        reason = "titles are of whole videos, not of frames" if form == "titles" else "the published form has no times"
        raise InputError(
            f"{path}: {reason}; convert it first with "
            f"`python -m narvid.narration convert {path} --frames DIR --out narrations.jsonl`"
        )
    narrations, misaligned = date_published(form, captions_of, frame_times)
    for video, reason in misaligned.items():
        raise InputError(f"{path}: {video}: {reason}")
    return narrations


def parse_lines(path: str | Path, text: str) -> dict[str, Narration]:
    """The text of a file in our form -> narrations; `path` is for messages. InputError names the malformed line."""
    narrations, line_of = {}, {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = parse_json(line, path, line=number)
        try:
            video, narration = _parse(entry)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if video in narrations:
            raise InputError(f"{path}:{number}: {video} is narrated twice (first in line {line_of[video]}); keep one")
        narrations[video], line_of[video] = narration, number
    return narrations


def _parse(entry: object) -> tuple[str, Narration]:
    """The value of one line of our form; InputError says what is wrong with it."""
    if not isinstance(entry, dict):
        raise InputError('expected {"video", "captioner", "prompt", "sentences"}')
    for key in ("video", "captioner", "prompt"):
        if not isinstance(entry.get(key), str) or (key == "video" and not entry[key]):
            raise InputError(f'"{key}" is missing or no text')
    video = entry["video"]
    if not isinstance(entry.get("sentences"), list):
        raise InputError(f'{video}: "sentences" is missing or not a list')
    times, sentences = [], []
    for position, sentence in enumerate(entry["sentences"], start=1):
        if not isinstance(sentence, dict) or not isinstance(sentence.get("text"), str):
            raise InputError(f'{video}: sentence {position} has no "text"')
        time = sentence.get("time")
        if type(time) not in (int, float) or not 0 <= time < math.inf:
            raise InputError(f'{video}: sentence {position} has no "time" in seconds, a number >= 0')
        if times and time <= times[-1]:
            raise InputError(f"{video}: times do not increase at sentence {position} ({times[-1]} s, then {time} s)")
        times.append(float(time))
        sentences.append(sentence["text"])
    if entry.get("source", "") not in ("", SPEECH):
        raise InputError(f'{video}: "source" is {str(entry["source"])[:40]!r}; it is "{SPEECH}", or left out')
    return video, Narration(entry["captioner"], entry["prompt"], times, sentences, entry.get("source", ""))


def date_published(
    form: str, captions_of: Mapping[str, list[str]], frame_times: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Narration], dict[str, str]]:
    """Give published captions the times of their frames -> (narrations, video -> why it has none).

    form: "release" or "titles". Videos without extracted frames are left out.
    """
    narrations, misaligned = {}, {}
    for video, captions in captions_of.items():
        if video not in frame_times:
            continue
        try:
            narrations[video] = Narration(CAPTIONER[form], "", *assign(form, captions, frame_times[video]))
        except InputError as error:
            misaligned[video] = str(error)
    return narrations, misaligned


# ---- joining ----


def join(
    narration: Narration, times: Sequence[float], all_times: Sequence[float], *, video: str, path: str | Path
) -> list[str | None]:
    """The sentence of each of K picked frames, by time -> K; None (to be masked) where there is none or a blank one.

    times: of the picked frames (s); all_times: of all extracted frames of the video (s); video and path: for messages.
    A sentence belongs to a frame if it is the nearest and no farther than a quarter of the median frame spacing.
    However few sentences there are, a frame without one is a hole as long as those there are lie on frames.
    Raises InputError where frames have no sentence because the narration has another frame rate or another clock.
    """
    tolerance = _spacing(all_times) / 4 if len(all_times) > 1 else LONE_FRAME_TOLERANCE
    found = [_nearest(narration.times, time, tolerance) for time in times]
    if None in found and (reason := _disagreement(narration, all_times, tolerance)):
        raise InputError(f"{path}: {video}: {reason}")
    sentences = [None if index is None else narration.sentences[index] for index in found]
    return [sentence if sentence and not sentence.isspace() else None for sentence in sentences]


def _spacing(times: Sequence[float]) -> float:
    """Median distance of neighbouring times, in seconds; needs two of them."""
    return float(median(later - earlier for earlier, later in pairwise(times)))


def _nearest(times: Sequence[float], time: float, tolerance: float) -> int | None:
    """Index of the nearest of increasing `times` within the tolerance; the earlier one of two equally near."""
    after = bisect_left(times, time)
    near = [index for index in (after - 1, after) if 0 <= index < len(times)]
    best = min(near, key=lambda index: abs(times[index] - time), default=None)
    # A microsecond of slack: a distance of exactly the tolerance must not depend on rounding.
    return best if best is not None and abs(times[best] - time) <= tolerance + 1e-6 else None


def _disagreement(narration: Narration, all_times: Sequence[float], tolerance: float) -> str:
    """Why frames have no sentence, or "" where the narration merely has holes."""
    strays = [time for time in narration.times if _nearest(all_times, time, tolerance) is None]
    n, m = len(all_times), len(narration.times)
    if len(strays) <= STRAY_SHARE * m:
        # Failures may leave just these frames by chance, except where there are many other ways to choose m of n.
        of_picks = [all_times[index] for index in pick_frames(n, m)] if 3 * m <= 2 * n and comb(n, m) > 10**6 else []
        if of_picks and all(abs(a - b) <= tolerance for a, b in zip(narration.times, of_picks)):
            return (
                f"narration of other frames: it has a sentence for {m} evenly picked ones of {n}, and others are asked "
                f"for; pick as many (--max_frames {m}), or narrate the others too"
            )
        return ""
    if n > 1 and m > 1:
        of_frames, of_sentences = _spacing(all_times), _spacing(narration.times)
        if abs(of_sentences - of_frames) > RATE_MARGIN * of_frames:
            return (
                f"narration of another frame rate: a sentence every {of_sentences:.2f} s, a frame every "
                f"{of_frames:.2f} s, {len(strays)} of {m} sentences on no frame; extract frames at its rate, or "
                "narrate these frames"
            )
    if len(strays) == m:
        return (
            f"narration of another clock: sentences from {narration.times[0]:.2f} s to {narration.times[-1]:.2f} s, "
            "none at a frame; check that narrations and frames come from the same video files, or narrate these frames"
        )
    return ""


def with_speech(captions: Sequence[str | None], said: Sequence[str | None],
                lengths: Callable[[list[str]], list[int]], max_words: int) -> list[str | None]:
    """A frame's sentence from two sources: the caption, then what is said, cut to fit the text tower together.

    Where they do not fit, each has half of the tokens, and what the other leaves of its half. lengths: texts -> tokens
    of each, special ones included; max_words: what the tower reads.
    """
    special = lengths([""])[0]

    def of_frame(caption: str | None, speech: str | None) -> str | None:
        if not (caption and speech):
            return caption or speech
        room = max_words - special
        of_caption, of_speech = (n - special for n in lengths([caption, speech]))
        if of_caption + of_speech > room:
            caption = _first_words(caption, max(room - of_speech, room // 2) + special, lengths)
            speech = _first_words(speech, room - lengths([caption])[0] + 2 * special, lengths)
        return f"{caption} {speech}".strip()

    return [of_frame(*pair) for pair in zip(captions, said, strict=True)]


def _first_words(text: str, most: int, lengths: Callable[[list[str]], list[int]]) -> str:
    """As many first words as have at most so many tokens."""
    words = text.split()
    too_long = bisect_left(range(1, len(words) + 1), True, key=lambda n: lengths([" ".join(words[:n])])[0] > most)
    return " ".join(words[:too_long])


def to_entry(video: str, narration: Narration) -> dict:
    """What one line of a narration file holds."""
    sentences = [{"time": time, "text": text} for time, text in zip(narration.times, narration.sentences, strict=True)]
    entry = {"video": video, "captioner": narration.captioner, "prompt": narration.prompt, "sentences": sentences}
    return entry | ({"source": narration.source} if narration.source else {})


def write_narrations(path: str | Path, items: Iterable[tuple[str, Narration]]) -> None:
    """Write (video, narration) pairs as JSON lines; the file appears whole or not at all."""
    write_json_lines(path, (to_entry(video, narration) for video, narration in items))

"""The narration file: timestamped sentences of each video, their join with frames, the validator, published formats.

A narration is what a captioner wrote about the extracted frames of one video: one sentence a frame, in chronological
order (Sec. 3.1), each with the time of its frame in seconds. Sentences meet frames by that time, never by position.
No pixel is touched here (`frames.py`), no sentence is made (`captioners.py`) and none is tokenized (`clip.py`).

    {"video": "video7", "captioner": "llava-1.5-7b", "prompt": "...", "sentences": [{"time": 0.0, "text": "..."}, ...]}

Check a file against the extracted frames, and turn a published one into the form above:
    python -m narvid.narrations narrations.json --frames data/msrvtt/frames --out data/msrvtt/narrations.jsonl
"""

import argparse
import json
import math
import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from narvid import InputError
from narvid.frames import load_frame_index, pick_frames

PUBLISHED = "unknown (published file)"  # captioner of a published file: the format does not name it
LONE_FRAME_TOLERANCE = 0.25  # seconds, where a video has one frame and hence no spacing
RATE_MARGIN = 0.1  # sentences and frames whose median spacings differ by more belong to different frame rates


class Narration(NamedTuple):
    """What one captioner wrote about one video; `times` in seconds, strictly increasing, one a sentence."""

    captioner: str
    prompt: str
    times: list[float]
    sentences: list[str]


PROBLEMS = {
    "missing": "frames, no narration",
    "empty": "a narration without a single word",
    "misaligned": "frames and sentences disagree about time",
    "holes": "some frames without a sentence; training masks them",
    "unused": "a narration, no frames",
}


class Report(NamedTuple):
    """What `validate` found; `problems`: kind (a key of PROBLEMS) -> video -> what is wrong with it."""

    narrations: int
    frames: int
    captioners: dict[str, int]
    problems: dict[str, dict[str, str]]
    mean_words: float
    framed_share: float
    repeated_share: float


# ---- reading ----


def load_narrations(path: str | Path, frame_times: Mapping[str, Sequence[float]] | None = None) -> dict[str, Narration]:
    """Read a narration file, ours (JSON lines) or the published list of {"video_file", "caption_1", "caption_2", ...}.

    frame_times: video -> times (s) of all its extracted frames; needed for the published form only, which has no times.
    There m captions belong to all n frames (m == n) or to the m frames a release picks of n (m < n); videos without
    extracted frames are left out, since nothing can date their captions.
    Raises InputError with file and line for anything malformed, a video narrated twice, m > n.
    """
    text = _read(path)
    if not text.lstrip().startswith("["):
        return _parse_lines(path, text)
    if frame_times is None:
        raise InputError(
            f"{path}: the published form has no times; convert it first with "
            f"`python -m narvid.narrations {path} --frames DIR --out narrations.jsonl`"
        )
    narrations, misaligned = _date(_parse_published(path, text, frame_times), frame_times)
    for video, reason in misaligned.items():
        raise InputError(f"{path}: {video}: {reason}")
    return narrations


def _read(path: str | Path) -> str:
    """The file's text; a file that starts with "[" is in the published form."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read the narration file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a UTF-8 text file; give the narration file itself, unpacked") from None
    if not text.strip():
        raise InputError(f"{path}: the narration file is empty")
    return text


def _parse_lines(path: str | Path, text: str) -> dict[str, Narration]:
    narrations, line_of = {}, {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            video, narration = _parse(line)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if video in narrations:
            raise InputError(f"{path}:{number}: {video} is narrated twice (first in line {line_of[video]}); keep one")
        narrations[video], line_of[video] = narration, number
    return narrations


def _parse(line: str) -> tuple[str, Narration]:
    """One line of our form; InputError says what is wrong with it."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON ({error.msg}, column {error.colno}); one object a line is expected") from None
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
    return video, Narration(entry["captioner"], entry["prompt"], times, sentences)


def _parse_published(path: str | Path, text: str, frame_times: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """video -> captions, in order. `video_file` loses its extension where only the bare name has frames."""
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: malformed JSON ({error.msg}); is the file complete?") from None
    captions_of, entry_of = {}, {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("video_file"), str) or not entry["video_file"]:
            raise InputError(f'{where}: "video_file" is missing or not a text')
        name = entry["video_file"]
        video = next((known for known in (name, os.path.splitext(name)[0]) if known in frame_times), name)
        if video in captions_of:
            raise InputError(f"{where}: {video} is narrated twice (first in entry {entry_of[video]}); keep one")
        keys = [f"caption_{k}" for k in range(1, 1 + sum(key.startswith("caption_") for key in entry))]
        for key in keys:
            if not isinstance(entry.get(key), str):
                raise InputError(f"{where}: {video}: {key} is missing or no text; number captions from 1, no gaps")
        captions_of[video], entry_of[video] = [entry[key] for key in keys], number
    return captions_of


def _date(
    captions_of: Mapping[str, list[str]], frame_times: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Narration], dict[str, str]]:
    """Give published captions the times of their frames -> (narrations, video -> why it has none)."""
    narrations, misaligned = {}, {}
    for video, captions in captions_of.items():
        if video not in frame_times:
            continue
        m, n = len(captions), len(frame_times[video])
        if m > n:
            misaligned[video] = f"{m} captions for {n} extracted frames; extract frames at the rate they were made from"
            continue
        # The release sub-samples frames and never captions, so fewer captions than frames are those of the picked ones.
        times = [float(frame_times[video][index]) for index in pick_frames(n, m)] if m else []
        narrations[video] = Narration(PUBLISHED, "", times, captions)
    return narrations, misaligned


# ---- joining ----


def join(
    narration: Narration, times: Sequence[float], all_times: Sequence[float], *, video: str, path: str | Path
) -> list[str | None]:
    """The sentence of each of K picked frames, by time -> K; None (to be masked) where there is none or a blank one.

    times: of the picked frames (s); all_times: of all extracted frames of the video (s); video and path: for messages.
    A sentence belongs to a frame if it is the nearest and no farther than a quarter of the median frame spacing.
    Raises InputError where frames have no sentence because the narration has another frame rate or another clock.
    """
    tolerance = _spacing(all_times) / 4 if len(all_times) > 1 else LONE_FRAME_TOLERANCE
    found = [_nearest(narration.times, time, tolerance) for time in times]
    if None in found and (reason := _disagreement(narration, found, all_times, tolerance)):
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


def _disagreement(narration: Narration, found: list[int | None], all_times: Sequence[float], tolerance: float) -> str:
    """Why picked frames have no sentence, or "" where the narration merely has holes."""
    if not narration.times:
        return ""
    if len(all_times) > 1 and len(narration.times) > 1:
        of_frames, of_sentences = _spacing(all_times), _spacing(narration.times)
        if abs(of_sentences - of_frames) > RATE_MARGIN * of_frames:
            return (
                f"narration of another frame rate: a sentence every {of_sentences:.2f} s, a frame every "
                f"{of_frames:.2f} s, {found.count(None)} of {len(found)} frames unmatched; extract frames at its rate, "
                f"narrate these frames, or pick as many as were narrated (--max_frames {len(narration.times)})"
            )
    if all(_nearest(narration.times, time, tolerance) is None for time in all_times):
        return (
            f"narration of another clock: sentences from {narration.times[0]:.2f} s to {narration.times[-1]:.2f} s, "
            "none at a frame; check that narrations and frames come from the same video files, or narrate these frames"
        )
    return ""


def to_line(video: str, narration: Narration) -> str:
    """One line of a narration file, without the line break."""
    sentences = [{"time": time, "text": text} for time, text in zip(narration.times, narration.sentences, strict=True)]
    entry = {"video": video, "captioner": narration.captioner, "prompt": narration.prompt, "sentences": sentences}
    return json.dumps(entry, ensure_ascii=False)


def write_narrations(path: str | Path, items: Iterable[tuple[str, Narration]]) -> None:
    """Write (video, narration) pairs as JSON lines; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(to_line(video, narration) + "\n" for video, narration in items)
    os.replace(temporary, path)


# ---- validating ----


def validate(
    path: str | Path, frame_times: Mapping[str, Sequence[float]], *, max_frames: int | None = None
) -> tuple[Report, dict[str, Narration]]:
    """Compare a narration file of either form with the extracted frames -> (report, narrations that could be dated).

    frame_times: video -> times (s) of all its extracted frames. max_frames: check the frames that training picks.
    Raises InputError only where the file itself is malformed; all else is named in the report.
    """
    text = _read(path)
    if text.lstrip().startswith("["):
        narrated = _parse_published(path, text, frame_times)
        narrations, misaligned = _date(narrated, frame_times)
    else:
        narrated = narrations = _parse_lines(path, text)
        misaligned = {}
    missing = {video: f"{len(times)} frames" for video, times in frame_times.items() if video not in narrated}
    unused = {video: "not in the frame index" for video in narrated if video not in frame_times}
    empty, holes, frames, framed = {}, {}, 0, 0
    for video, all_times in frame_times.items():
        times = all_times if max_frames is None else [all_times[i] for i in pick_frames(len(all_times), max_frames)]
        frames += len(times)
        if video not in narrations:
            continue
        try:
            sentences = join(narrations[video], times, all_times, video=video, path=path)
        except InputError as error:
            misaligned[video] = str(error).removeprefix(f"{path}: {video}: ")
            continue
        blank = sentences.count(None)
        framed += len(sentences) - blank
        if blank:
            kind = holes if "".join(narrations[video].sentences).strip() else empty
            kind[video] = f"{blank} of {len(sentences)} frames"
    problems = {"missing": missing, "empty": empty, "misaligned": misaligned, "holes": holes, "unused": unused}
    captioners = Counter(narration.captioner for narration in narrations.values())
    mean_words, repeated_share = _language(narrations)
    report = Report(len(narrated), frames, captioners, problems, mean_words, framed / max(frames, 1), repeated_share)
    return report, narrations


def _language(narrations: Mapping[str, Narration]) -> tuple[float, float]:
    """Mean words a sentence, and the share of sentences that repeat the one before; blank sentences do not count."""
    words = sentences = pairs = repeated = 0
    for narration in narrations.values():
        texts = [" ".join(text.split()) for text in narration.sentences if text.strip()]
        words += sum(text.count(" ") + 1 for text in texts)
        sentences += len(texts)
        pairs += max(len(texts) - 1, 0)
        repeated += sum(earlier == later for earlier, later in pairwise(texts))
    return words / max(sentences, 1), repeated / max(pairs, 1)


def print_report(path: str | Path, report: Report) -> None:
    """One screen: counts, the first videos of each kind, what the sentences look like."""
    captioners = ", ".join(f"{name} ({count})" for name, count in report.captioners.items()) or "none"
    print(f"{path}: {report.narrations} narrations; captioner: {captioners}")
    print(f"{report.framed_share:10.2%}  of {report.frames} frames have a sentence")
    print(f"{report.mean_words:10.2f}  words a sentence")
    print(f"{report.repeated_share:10.2%}  of the sentences equal the one before")
    for kind, meaning in PROBLEMS.items():
        found = report.problems[kind]
        print(f"{len(found):10}  {kind}: {meaning}")
        for video in list(found)[:3]:
            print(f"{'':14}{video}: {found[video]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report; exit 1 where a video has no narration, an empty one or a misaligned one."""
    parser = argparse.ArgumentParser(prog="python -m narvid.narrations", allow_abbrev=False)
    parser.add_argument("file", help="narration file, ours or a published one")
    parser.add_argument("--frames", required=True, help="folder of extracted frames, with its index")
    parser.add_argument("--max_frames", type=int, help="check the frames that training picks (default: all)")
    parser.add_argument("--out", help="write the narrations there in our form (JSON lines)")
    args = parser.parse_args(argv)
    try:
        if args.max_frames is not None and args.max_frames < 1:
            raise InputError(f"--max_frames {args.max_frames}: at least one frame is needed")
        report, narrations = validate(args.file, load_frame_index(args.frames), max_frames=args.max_frames)
        print_report(args.file, report)
        if args.out:
            if misaligned := report.problems["misaligned"]:
                raise InputError(f"{args.out} is not written: {len(misaligned)} narrations are misaligned, see above")
            write_narrations(args.out, narrations.items())
            print(f"wrote {len(narrations)} narrations to {args.out}")
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(any(report.problems[kind] for kind in ("missing", "empty", "misaligned")))


if __name__ == "__main__":
    main()

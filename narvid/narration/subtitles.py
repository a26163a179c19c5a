"""Sentences that exist already, with their times: subtitles, tracks of video files, transcripts of Whisper's family.

    read_sentences("video7.en.vtt") -> [Timed(start, end, text), ...]

.srt, .vtt, .ass and .ssa; .json of Whisper, WhisperX, whisper.cpp and transformers; text tracks of mp4, mkv and others
(mov_text, SubRip, WebVTT, ASS), which are opened through data/decoding.py. Automatic captions that roll, each line
shown again while the next is spoken, are undone. Tags, styles, speakers' marks and sounds in brackets go.
Not here: which frames they belong to (speech.py), speech that nobody has written down (transcribe.py).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from contextlib import suppress
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av

from narvid import InputError
from narvid.data.decoding import open_video
from narvid.files import read_json, read_text
from narvid.narration.answers import one_line

ADVICE = "leave it out, or fetch it again as UTF-8"
TEXT_FILES = (".srt", ".vtt", ".ass", ".ssa", ".json")
LONGEST = 10.0  # seconds that a line without an end stays, at most
TOUCHING = 0.1  # seconds between a line and the next, at most, for the two to be one that rolls
ROLLING = 1 / 3  # share of neighbours that repeat a line from which on a file is taken for one that rolls
TEXT_TRACKS = ("mov_text", "subrip", "srt", "webvtt", "text", "ass", "ssa")  # codecs; others are pictures of letters


class Timed(NamedTuple):
    """What is said from `start` to `end`, in seconds from the first frame; one line of text."""

    start: float
    end: float
    text: str


def read_sentences(path: str | Path, language: str | None = None) -> list[Timed]:
    """The sentences of a subtitle file, a transcript or a video's text track, in time order; [] where none is spoken.

    language: of a track, as the video file names it (eng, en); None for its first one. InputError names file and line
    of what is malformed, and a file of no such kind.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".json":
        cues = _of_json(path)
    elif kind in TEXT_FILES:
        text = read_text(path, advice=ADVICE).replace("\r\n", "\n").replace("\r", "\n")
        cues = {".srt": _of_srt, ".vtt": _of_vtt}.get(kind, _of_ass)(path, text)
    else:
        cues = _of_video(path, language)
    cues = [Timed(max(0.0, start), max(0.0, start, end), text) for start, end, text in sorted(cues, key=lambda c: c[0])]
    lines = [(cue, [said for line in cue.text.split("\n") if (said := _said(line))]) for cue in cues]
    return [cue._replace(text=one_line(" ".join(of_cue))) for cue, of_cue in _unrolled(lines)]


# ---- the words of a line ----

_SOUND = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|[♪♫]")
_MARK = re.compile(r"^\s*(?:>>+|[-–—](?=\s))\s*")  # another speaker


def _said(line: str) -> str:
    """A line without the marks of speakers; "" for a sound, such as [Music], or nothing."""
    line = _MARK.sub("", line).strip()
    return line if any(c.isalnum() for c in _SOUND.sub("", line)) else ""


def _without_tags(text: str) -> str:
    """Text without <i>, <c.colour>, <00:00:01.500>, {\\an8} and with HTML's escapes undone."""
    return unescape(re.sub(r"\{[\\=][^{}]*\}|</?[a-zA-Z][^<>]*>|<[\d:.]+>", "", text))


# ---- captions that roll ----


def _unrolled(cues: Sequence[tuple[Timed, list[str]]]) -> list[tuple[Timed, list[str]]]:
    """Each line once, at the time at which it came; files that do not roll are as they were.

    Automatic captions show a line again above the next one, and alone for a moment between the two; others grow word by
    word.
    """
    cues = [(cue, lines) for cue, lines in cues if lines]
    touching = [b.start - a.end <= TOUCHING for (a, _), (b, _) in pairwise(cues)]
    again = sum(close and (_repeated(a, b) > 0 or _grows(a, b))
                for close, ((_, a), (_, b)) in zip(touching, pairwise(cues), strict=True))
    if again <= ROLLING * len(touching):
        return cues
    rolled, shown = cues[:1], cues[0][1]
    for close, (cue, lines) in zip(touching, cues[1:], strict=True):
        new = lines[_repeated(shown, lines):] if close else lines
        last, of_last = rolled[-1]
        if not new:
            rolled[-1] = last._replace(end=max(last.end, cue.end)), of_last
        elif close and _grows(shown, lines):
            rolled[-1] = last._replace(end=max(last.end, cue.end)), [*of_last[:-1], new[-1]]
        else:
            rolled.append((cue, new))
        shown = lines
    return rolled


def _repeated(before: Sequence[str], lines: Sequence[str]) -> int:
    """How many first lines were the last ones before."""
    return next((n for n in range(min(len(before), len(lines)), 0, -1) if list(before[-n:]) == list(lines[:n])), 0)


def _grows(before: Sequence[str], lines: Sequence[str]) -> bool:
    """Whether the last line is the one before and more."""
    return len(before) == len(lines) and before[:-1] == lines[:-1] and lines[-1].startswith(before[-1] + " ")


# ---- subtitle files ----

_CLOCK = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})(?:[.,:](\d{1,3}))?"
_ARROW = re.compile(rf"^\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?$")


def _of_srt(path: Path, text: str) -> list[Timed]:
    """A line of times, then text up to the next one; the number above a line of times belongs to it."""
    lines = text.split("\n")
    at = [number for number, line in enumerate(lines) if _ARROW.match(line)]
    if not at and text.strip():
        raise InputError(f"{path}:1: no line of times such as 00:00:01,500 --> 00:00:03,000; is it a .srt file? "
                         f"{ADVICE}")
    cues = []
    for first, after in pairwise([*at, len(lines)]):
        body = lines[first + 1 : after]
        if after < len(lines) and body and re.fullmatch(r"\s*\d+\s*", body[-1]):
            body = body[:-1]
        cues.append(Timed(*_times(_ARROW.match(lines[first])), _without_tags("\n".join(body))))
    return cues


def _of_vtt(path: Path, text: str) -> list[Timed]:
    """WebVTT: blocks between empty lines; those without a line of times are notes, styles and regions."""
    if not re.match(r"WEBVTT(?:[ \t].*)?(?:\n|$)", text):
        raise InputError(f"{path}:1: does not begin with WEBVTT; {ADVICE}")
    cues = []
    for block in re.split(r"\n{2,}", text):  # a line of one blank is no empty one: automatic captions hold them
        lines = block.split("\n")
        at = [number for number, line in enumerate(lines) if _ARROW.match(line)]
        if re.match(r"(?:NOTE|STYLE|REGION)\b", lines[0]):
            continue
        for first, after in pairwise([*at, len(lines)]):
            body = "\n".join(lines[first + 1 : after])
            cues.append(Timed(*_times(_ARROW.match(lines[first])), _without_tags(body)))
    return cues


def _of_ass(path: Path, text: str) -> list[Timed]:
    """The Dialogue lines of [Events], whose Format line names the columns; the text is the last."""
    cues, columns = [], None
    for number, line in enumerate(text.split("\n"), 1):
        name, _, rest = line.partition(":")
        if name == "Format" and rest.rstrip().endswith("Text"):  # [V4+ Styles] has one too
            columns = [column.strip() for column in rest.split(",")]
            columns[-1] = "Text"
        if name != "Dialogue":
            continue
        values = rest.split(",", len(columns or ()) - 1) if columns else []
        entry = dict(zip(columns or (), values, strict=False))
        times = [re.fullmatch(rf"\s*{_CLOCK}\s*", entry.get(column, "")) for column in ("Start", "End")]
        if len(values) != len(columns or ()) or None in times:
            raise InputError(f"{path}:{number}: no Dialogue line as the Format line of [Events] describes it; {ADVICE}")
        start, end = (_seconds(*found.groups()) for found in times)
        cues.append(Timed(start, end, _ass_text(entry["Text"])))
    if columns is None and text.strip():
        raise InputError(f"{path}:1: no [Events] with a Format line; is it an .ass file? {ADVICE}")
    return cues


_TAGS = r"\{[^{}]{0,200}\\p%s[^{}]{0,200}\}"  # overrides that begin or end a drawing


def _ass_text(text: str) -> str:
    """What of a Dialogue's text is read: no overrides, no drawings."""
    text = re.sub(rf"{_TAGS % '[1-9]'}.*?(?:{_TAGS % '0'}|$)", "", text)
    return re.sub(r"\\[Nn]", "\n", re.sub(r"\{[^{}]*\}", "", text)).replace("\\h", " ")


def _times(found: re.Match) -> tuple[float, float]:
    parts = found.groups()
    return _seconds(*parts[:4]), _seconds(*parts[4:])


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    part = int(fraction) / 10 ** len(fraction) if fraction else 0.0
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + part


# ---- transcripts ----


def _of_json(path: Path) -> list[Timed]:
    """Whisper and WhisperX: segments; transformers: chunks; whisper.cpp: transcription, in milliseconds."""
    value = read_json(path, advice=ADVICE)
    if isinstance(value, dict):
        value = next((value[name] for name in ("segments", "chunks", "transcription") if name in value), None)
    if not isinstance(value, list):
        raise InputError(f'{path}: no transcript: it has none of the lists "segments" (Whisper, WhisperX), "chunks" '
                         f'(transformers), "transcription" (whisper.cpp); {ADVICE}')
    cues = []
    for number, entry in enumerate(value, 1):
        entry = entry if isinstance(entry, dict) else {}
        start, end = entry.get("start"), entry.get("end")
        if isinstance(stamps := entry.get("timestamp"), list) and len(stamps) == 2:
            start, end = stamps
        if isinstance(offsets := entry.get("offsets"), dict):
            start, end = (x / 1000 if _is_time(x := offsets.get(name)) else None for name in ("from", "to"))
        if end is None and _is_time(start):  # the last chunk of a recording that was cut
            end = start + LONGEST
        if not (_is_time(start) and _is_time(end) and isinstance(entry.get("text"), str)):
            raise InputError(f"{path}: its segment {number} has no start, end and text; {ADVICE}")
        cues.append(Timed(float(start), float(end), entry["text"]))
    return cues


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9


# ---- tracks of video files ----


def has_text_track(path: str | Path, language: str | None = None) -> bool:
    """Whether a video file holds a track of text, in this language where one is given; InputError names no video."""
    container, _ = open_video(path)
    with container:
        return bool(_text_tracks(container, language))


def _text_tracks(container: av.container.InputContainer, language: str | None) -> list[av.stream.Stream]:
    tracks = [s for s in container.streams.subtitles if s.codec_context and s.codec_context.name in TEXT_TRACKS]
    if language is not None:
        tracks = [s for s in tracks if s.language and s.language.lower()[:2] == language.lower()[:2]]
    return tracks


def _of_video(path: Path, language: str | None) -> list[Timed]:
    container, picture = open_video(path)
    with container:
        tracks = _text_tracks(container, language)
        if not tracks:
            pictures = len(container.streams.subtitles)
            what = f"{pictures} tracks of other kinds or languages" if pictures else "no track of subtitles"
            raise InputError(f"{path}: holds no text track{f' in {language}' if language else ''} ({what}); name a "
                             "file of subtitles, or transcribe it (--speech MODEL)")
        track = next((s for s in tracks if s.disposition & type(s.disposition).default), tracks[0])
        origin = float((picture.start_time or 0) * picture.time_base)  # time 0 is the first frame, as everywhere
        cues = []
        with suppress(av.FFmpegError):  # the rest of a file that ends too early
            for packet in container.demux(track):
                if packet.pts is None:
                    continue
                start = float(packet.pts * packet.time_base) - origin
                length = float((packet.duration or 0) * packet.time_base)
                text = _of_packet(bytes(packet), track.codec_context.name)
                cues.append((start, start + length if length else None, _without_tags(text)))
    starts = [start for start, _, _ in cues] + [float("inf")]
    return [Timed(start, min(after, start + LONGEST) if end is None else end, text)
            for (start, end, text), after in zip(cues, starts[1:], strict=True)]


def _of_packet(payload: bytes, codec: str) -> str:
    """The text of a cue, as its track carries it; FFmpeg's decoders lose cues in av 17."""
    if codec == "mov_text":  # a length, the text, and boxes of styles
        payload = payload[2:2 + int.from_bytes(payload[:2], "big")]
    marked = payload[:2] in (codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE)
    text = payload.decode("utf-16" if marked else "utf-8", errors="replace").replace("\r\n", "\n")
    return _ass_text(text.split(",", 8)[-1]) if codec in ("ass", "ssa") else text

"""Frames: which ones, decoding a video, reading and resizing. The only file that sees pixels.

Here: the sampling rule, the layout of a frame folder and its index file, video -> RGB arrays (PyAV), jpg -> uint8
tensor (PIL). Not here: normalisation (the device does it, in the towers), sentences (narrations.py), which videos to
use (datasets.py).

A frame folder, written by scripts/extract_frames.py:
  <frames_dir>/<video>/<index:05d>.jpg   the frames of a video in time order, counted from 0
  <frames_dir>/index.jsonl               one line a video: {"video", "times": [seconds, ...], "sampling": "1 fps",
                                         "short_side", "quality", "source": file, "note": what was amiss, if so}

Shapes: K frames of a video; H, W height and width of a picture.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from narvid import InputError

if TYPE_CHECKING:
    import torch

# torch and av are imported where they are used: the extractor's workers never need torch (a second and 200 MB each),
# training never needs av.

CLOCK_TOLERANCE = 6e-4  # seconds; containers that count in milliseconds round a frame's time by up to half of one
INDEX_NAME = "index.jsonl"


def pick_frames(n: int, k: int) -> list[int]:
    """Indices of the frames to use of n extracted ones: all if n <= k, else linspace(0, n-1, k) truncated to integers.

    The floats are numpy's, not exact fractions, as in the field: at n = 123, k = 15 one index differs by one.
    """
    if n < 1 or k < 1:
        raise ValueError(f"pick_frames needs at least one frame and one place, got n = {n}, k = {k}")
    if n <= k:
        return list(range(n))
    return np.linspace(0, n - 1, k).astype(int).tolist()


# ---- the frame folder ----


def frame_path(frames_dir: str | Path, video: str, index: int) -> Path:
    """Where frame number `index` of a video lies."""
    return Path(frames_dir) / video / f"{index:05d}.jpg"


def load_frame_index(frames_dir: str | Path) -> dict[str, list[float]]:
    """Video id -> time in seconds of each of its frames, from the folder's index file; InputError names the line."""
    path = Path(frames_dir) / INDEX_NAME
    if not path.is_file():
        raise InputError(
            f"{path} is missing: make the frames with scripts/extract_frames.py --videos DIR --out {frames_dir}"
        )
    times: dict[str, list[float]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = parse_index_line(line)
        except ValueError as e:
            torn = number == len(lines)  # no line break behind it: the writer was killed
            what = "is torn, the extraction was interrupted" if torn else f"is {e}"
            raise InputError(f"{path}, line {number} {what}: run extract_frames again, it completes the folder") from e
        if entry["video"] in times:
            raise InputError(f"{path}, line {number}: {entry['video']!r} stands there twice; run extract_frames again")
        times[entry["video"]] = entry["times"]
    return times


def parse_index_line(line: str) -> dict:
    """One line of the index file as a dict with a checked "video" and "times"; ValueError says what is wrong."""
    try:
        entry = json.loads(line)
        video, times = entry["video"], [float(t) for t in entry["times"]]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'no {{"video": id, "times": [seconds, ...]}} ({e})') from e
    if not (isinstance(video, str) and times and np.isfinite(times).all() and times == sorted(times)):
        raise ValueError(f"no video with rising times: {line[:80]}")
    return {**entry, "times": times}


# ---- reading jpgs ----


def check_jpg(path: str | Path) -> None:
    """Raise an InputError naming the file unless a whole jpg is there; reads its header and end, decodes if odd."""
    try:
        with open(path, "rb") as f:
            head = f.read(2)
            f.seek(-min(2, os.fstat(f.fileno()).st_size), os.SEEK_END)
            tail = f.read(2)
    except OSError as e:
        raise InputError(f"frame {path} cannot be read ({e.strerror}): run extract_frames again") from e
    if head != b"\xff\xd8":
        raise InputError(
            f"frame {path} is {'no jpg' if head else 'empty'}: delete its folder and run extract_frames again"
        )
    if tail != b"\xff\xd9":  # some writers pad behind the end marker
        _open_rgb(path)
        return
    try:
        Image.open(path).close()  # parses the header only
    except (OSError, ValueError, SyntaxError) as e:
        raise InputError(f"frame {path} is no jpg ({e}): delete its folder and run extract_frames again") from e


def read_frames(paths: Sequence[str | Path], size: int) -> "torch.Tensor":
    """Decode frames for CLIP: shorter side to `size`, bicubic; centre crop -> uint8 RGB (K, 3, size, size).

    The pixels are those of CLIP's own preprocessing. An unreadable or truncated file raises an InputError naming it.
    """
    import torch

    pixels = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    for i, path in enumerate(paths):
        pixels[i] = np.asarray(_centre_square(_open_rgb(path), size)).transpose(2, 0, 1)
    return torch.from_numpy(pixels)  # (K, 3, size, size)


def _open_rgb(path: str | Path) -> Image.Image:
    """The decoded picture in RGB; InputError naming the file if it is missing or does not decode to its end."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as e:  # PIL's own errors are of these three kinds
        raise InputError(f"frame {path} cannot be decoded ({e}): delete its folder and run extract_frames again") from e


def _centre_square(picture: Image.Image, size: int) -> Image.Image:
    """CLIP's resize and crop, with torchvision's rounding: the long side is cut to an integer, the margin rounded."""
    width, height = picture.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


# ---- decoding videos ----


def decode_video(
    path: str | Path,
    *,
    fps: float | None = None,
    n: int | None = None,
    short_side: int | None = None,
    notes: list[str] | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Frames of a video in time order, each at most once: (seconds from the first frame, uint8 RGB (H, W, 3)).

    fps: for every target time j / fps the frame that is on screen then; a clip with fewer frames gives what it has.
    n: the same for n targets from the first frame's time to the last's. Decodes twice: no header's length is trusted.
    short_side: shrink so that the shorter side has this many pixels; smaller pictures stay as they are.
    notes: a list that receives what is amiss in a file that still gives frames (truncated, broken frames).
    Iterating raises an InputError that names the file if it gives no frame at all. Pixels are taken as square.
    """
    if (fps is None) == (n is None) or (n if fps is None else fps) <= 0:
        raise ValueError(f"decode_video takes fps or n, one of them and positive, got fps = {fps}, n = {n}")
    notes = [] if notes is None else notes
    return _to_rgb(path, _at_rate(path, fps, notes) if fps else _uniform(path, n, notes), short_side)


def _at_rate(path, fps, notes):
    """Yield (time, frame) of the frames on screen at one or more of the times 0, 1 / fps, 2 / fps, ..."""
    for time, end, frame in _timed(path, notes):
        target = math.ceil((time - CLOCK_TOLERANCE) * fps) / fps  # the first target this frame is in time for
        if target < end - CLOCK_TOLERANCE:
            yield time, frame


def _uniform(path, n, notes):
    """Yield (time, frame) of the frames on screen at n times from the first frame's to the last's, both included."""
    times = np.array([time for time, _, _ in _timed(path, notes)])
    targets = np.linspace(0, times[-1], n) + CLOCK_TOLERANCE
    keep = set((np.searchsorted(times, targets, side="right") - 1).tolist())
    for i, (time, _, frame) in enumerate(_timed(path, [])):
        if i in keep:
            yield time, frame


def _timed(path, notes):
    """Yield (time, end, frame) for every frame of a video: on screen from `time` to `end`, in seconds from the first.

    Time stamps win over the header's frame rate, which only fills in where a stamp is missing or the clock restarts.
    """
    container, stream = _open_video(path)
    with container:
        rate = float(stream.average_rate or 0)
        step = 1 / rate if 0.01 < rate < 1000 else 1 / 25  # headers also say 0 and 90000
        frame = origin = None  # origin: the stamp that means time 0
        count, time = 0, 0.0
        for next_frame in _sound_frames(container, stream, notes):
            expected = time + step if count else 0.0
            stamp = next_frame.time
            if stamp is not None and (origin is None or stamp - origin < time - 1.0):
                origin = stamp - expected  # the first stamp, or joined recordings whose clock starts again
            next_time = expected if stamp is None else max(time, round(stamp - origin, 6))
            if count:
                yield time, next_time, frame
            frame, time, count = next_frame, next_time, count + 1
        if not count:
            raise InputError(f"{path}: not one frame of the video decodes; fetch it again or leave it out")
        end = time + (float(frame.duration * frame.time_base) if frame.duration else step)
        announced = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        if count < 0.95 * stream.frames or end < 0.9 * announced - 1.0:
            notes.append(
                f"{count} frames, {end:.1f} s decode of {stream.frames or '?'} frames, {announced:.1f} s announced"
            )
        yield time, end, frame


def _open_video(path):
    """The open container and its first video stream (a cover picture is none); InputError names what is no video."""
    import av

    try:
        # the prefix keeps a colon in the name from being read as a protocol; old files carry titles that are not UTF-8
        container = av.open(f"file:{path}", metadata_errors="replace")
    except (av.FFmpegError, OSError) as e:
        raise InputError(f"{path} cannot be opened as a video ({e.strerror}): fetch it again or leave it out") from e
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & av.stream.Disposition.attached_pic:
            stream.codec_context.thread_count = 1  # one video a core is faster than one video on all cores
            return container, stream
    container.close()
    raise InputError(f"{path} holds no video that can be decoded (sound only, or an unknown codec): leave it out")


def _sound_frames(container, stream, notes):
    """Decode forward once and yield the frames in display order; broken ones are left out and counted in the notes."""
    broken = 0
    for frame in _decoded(container, stream):
        if frame is None or frame.is_corrupt:  # shown, its missing parts would be grey or the previous frame's
            broken += 1
        else:
            yield frame
    if broken:
        notes.append(f"{broken} broken frames left out")


def _decoded(container, stream):
    """Yield the frames of a stream, and None for every piece of the file that cannot be read or decoded."""
    import av

    packets = container.demux(stream)
    packet = stream
    while packet is not None:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            packet = None
            yield None
        try:
            yield from stream.decode(packet)  # None: what the decoder still holds back
        except av.EOFError:
            return
        except av.FFmpegError:
            yield None


def _to_rgb(path, shown, short_side):
    """(time, decoded frame) -> (time, RGB array): colours by the frame's own tags, shrunk, turned as the file says."""
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    reformatter = VideoReformatter()  # one a video: it keeps its tables from frame to frame
    one_thread = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}  # older ones never use more
    for time, frame in shown:
        scale = min(1.0, (short_side or math.inf) / min(frame.width, frame.height))
        try:
            picture = reformatter.reformat(
                frame,
                width=max(1, round(frame.width * scale)),
                height=max(1, round(frame.height * scale)),
                format="rgb24",
                interpolation="BICUBIC",
                src_color_range=frame.color_range,
                dst_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU601,  # RGB has none, but without it av < 17 overlooks the source's
                **one_thread,
            )
        except (av.FFmpegError, ValueError) as e:
            raise InputError(f"{path}: pixel format {frame.format.name} cannot be turned into RGB ({e})") from e
        turns = round(frame.rotation / 90)  # counter-clockwise, as numpy counts
        yield time, np.ascontiguousarray(np.rot90(picture.to_ndarray(), turns))

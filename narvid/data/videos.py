"""Video files: decoding one at chosen times, and writing one again as a small mp4 (PyAV).

Here: which decoded frame is on screen when, damaged files, colours and rotation. Not here: frame folders and what
training reads (frames.py), which files, the pool of workers (extraction.py,
search/reading.py). Training never imports this.

Shapes: H, W height and width of a picture.
"""

import math
import os
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from time import sleep
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from narvid import InputError

SUFFIXES = (  # of what is taken for a video file
    ".3g2", ".3gp", ".3gpp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip
SHORT_SIDE, QUALITY = 256, 95  # of the frames that are kept as jpgs, where nothing else is said
CLOCK_TOLERANCE = 6e-4  # seconds; containers that count in milliseconds round a frame's time by up to half of one
BT601, LIMITED = 6, 1  # FFmpeg's numbers for the colours that every reader assumes where a file names none
# Old files carry titles that are not UTF-8. av 19 reads them all and no longer takes the argument.
ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def decode_video(
    path: str | Path,
    *,
    fps: float | None = None,
    n: int | None = None,
    short_side: int | None = None,
    max_seconds: float = math.inf,
    notes: list[str] | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Frames of a video in time order, each at most once: (seconds from the first frame, uint8 RGB (H, W, 3)).

    fps: for every target time j / fps the frame that is on screen then; a clip with fewer frames gives what it has.
    n: the same for n targets from the first frame's time to the last's. Decodes twice: no header's length is trusted.
    short_side: shrink so that the shorter side has this many pixels; smaller pictures stay as they are.
    max_seconds: as if the video were cut there; what begins later is neither taken nor decoded.
    notes: a list that receives what is amiss in a file that still gives frames (truncated, broken frames).
    Iterating raises an InputError that names the file if it gives no frame at all. Pixels are taken as square.
    """
    if (fps is None) == (n is None) or (n if fps is None else fps) <= 0:
        raise ValueError(f"decode_video takes fps or n, one of them and positive, got fps = {fps}, n = {n}")
    notes = [] if notes is None else notes
    if fps:
        shown = ((time, frame) for time, _, frame in _at_rate(path, fps, max_seconds, notes))
    else:
        shown = _uniform(path, n, max_seconds, notes)
    return _pictures(path, shown, short_side)


class Clip(NamedTuple):
    """What was read of a video file: its length, what is amiss, and time (s) and jpg file of each frame."""

    seconds: float
    note: str
    times: list[float]
    jpegs: list[bytes]


def read_video(path: str | Path, *, fps: float = 1.0, short_side: int = SHORT_SIDE) -> Clip:
    """A whole video file, its frames as scripts/extract_frames.py writes them: jpgs of the same size and quality.

    Held in memory; InputError names a file that gives no frame.
    """
    times, jpegs, notes = [], [], []
    for seconds, pixels in decode_video(path, fps=fps, short_side=short_side, notes=notes):
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        times.append(round(seconds, 3))
        jpegs.append(file.getvalue())
    seconds = times[-1] + 1 / fps
    if not notes:  # the decoder found what the file announces
        seconds = _announced_seconds(path) or seconds
    return Clip(max(seconds, times[-1]), "; ".join(notes), times, jpegs)


def _announced_seconds(path: str | Path) -> float:
    """The length that a video file announces, or 0."""
    with open_container(path) as container:
        stream = container.streams.video[0]
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return max(0.0, ((container.duration or 0) - max(0, container.start_time or 0)) / 1e6)


def compress_video(
    path: str | Path,
    out: str | Path,
    *,
    fps: float = 3.0,
    short_side: int | None = 224,
    crf: int = 18,
    max_seconds: float = math.inf,
    notes: list[str] | None = None,
) -> int:
    """Write a video again as a small mp4 without sound, its frame j what is on screen at j / fps; returns their number.

    The rate is constant: a picture shown for longer is repeated, so that seconds mean the same in both files, which end
    less than 1 / fps apart. crf: x264's quality, 0 (lossless) to 51. The rest, and the errors, are decode_video's.
    """
    taken = _at_rate(path, fps, max_seconds, [] if notes is None else notes)
    shown = _pictures(path, ((ticks, frame) for _, ticks, frame in taken), short_side, yuv=True)
    rate, count = Fraction(fps).limit_denominator(10**6), 0
    # No B-frames: stamps rise in file order from 0, without an edit list. A key frame every 5 s: readers seek.
    options = {"crf": str(crf), "bf": "0", "g": str(math.ceil(5 * fps)), "threads": "1"}
    with av.open(f"file:{out}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
        halver = VideoReformatter()  # of the colours' resolution
        for ticks, pixels in shown:
            if not count:
                stream.height, stream.width = pixels.shape[1:]
            frame = av.VideoFrame.from_ndarray(pixels, format="yuv444p")
            frame = halver.reformat(frame, format="yuv420p", interpolation="BICUBIC", threads=1)
            for _ in range(ticks):
                frame.pts, frame.time_base, count = count, 1 / rate, count + 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return count


def start_worker() -> None:
    """Begin a process that decodes for another: it leaves Ctrl-C to its parent and ends with it, also when the parent
    is killed and cannot tell.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _at_rate(path, fps, max_seconds, notes):
    """Yield (time, ticks, frame): those on screen at one or more of the times 0, 1 / fps, ..., and at how many."""
    for time, end, frame in _timed(path, max_seconds, notes):
        first = math.ceil((time - CLOCK_TOLERANCE) * fps)  # the first of these times that this frame is in time for
        ticks = math.ceil((end - CLOCK_TOLERANCE) * fps) - first
        if ticks > 0:
            yield time, ticks, frame


def _uniform(path, n, max_seconds, notes):
    """Yield (time, frame) of the frames on screen at n times from the first frame's to the last's, both included."""
    times = np.array([time for time, _, _ in _timed(path, max_seconds, notes)])
    targets = np.linspace(0, times[-1], n) + CLOCK_TOLERANCE
    keep = set((np.searchsorted(times, targets, side="right") - 1).tolist())
    for i, (time, _, frame) in enumerate(_timed(path, max_seconds, [])):
        if i in keep:
            yield time, frame


def _timed(path, max_seconds, notes):
    """Yield (time, end, frame) for every frame of a video: on screen from `time` to `end`, in seconds from the first.

    Time stamps win over the header's frame rate, which only fills in where a stamp is missing or the clock restarts.
    """
    least = 2 * CLOCK_TOLERANCE  # so long the first frame is on screen, whatever the file or the caller says
    max_seconds = max(max_seconds, least)
    container, stream = _open_video(path)
    with container:
        rate = float(stream.average_rate or 0)
        step = 1 / rate if 0.01 < rate < 1000 else 1 / 25  # headers also say 0 and 90000
        frame = origin = None  # origin: the stamp that means time 0
        count, time = 0, 0.0
        frames = _sound_frames(container, stream, notes)
        for next_frame in frames:
            expected = time + step if count else 0.0
            stamp = next_frame.time
            if stamp is not None and (origin is None or stamp - origin < time - 1.0):
                origin = stamp - expected  # the first stamp, or joined recordings whose clock starts again
            next_time = expected if stamp is None else max(time, round(stamp - origin, 6))
            if count:
                yield time, min(next_time, max_seconds), frame
            if next_time >= max_seconds - CLOCK_TOLERANCE:
                frames.close()  # now, not some time later: it notes the broken frames
                return
            frame, time, count = next_frame, next_time, count + 1
        if not count:
            raise InputError(f"{path}: not one frame of the video decodes; fetch it again or leave it out")
        end = time + max(least, float(frame.duration * frame.time_base) if frame.duration else step)
        announced = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        late = max(0.0, origin or 0.0)  # some containers announce the last stamp, not the length
        if count < 0.95 * stream.frames or late + end < 0.9 * announced - 1.0:
            notes.append(
                f"{count} frames, {end:.1f} s decode of {stream.frames or '?'} frames, {announced:.1f} s announced"
            )
        yield time, min(end, max_seconds), frame


def open_container(path):
    """The av container of a video file, to read from; av.FFmpegError or OSError where the file is none."""
    # the prefix keeps a colon in the name from being read as a protocol
    return av.open(f"file:{path}", **ANY_TITLE)


def _open_video(path):
    """The open container and its first video stream (a cover picture is none); InputError names what is no video."""
    try:
        container = open_container(path)
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
    try:
        for frame in _decoded(container, stream):
            if frame is None or frame.is_corrupt:  # shown, its missing parts would be grey or the previous frame's
                broken += 1
            else:
                yield frame
    finally:  # also when the rest of the video is not asked for
        if broken:
            notes.append(f"{broken} broken frames left out")


def _decoded(container, stream):
    """Yield the frames of a stream, and None for every piece of the file that cannot be read or decoded."""
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


def _pictures(path, shown, short_side, *, yuv=False):
    """(x, decoded frame) -> (x, array): colours by the frame's own tags, shrunk, turned as the file says.

    RGB (H, W, 3); with yuv (3, H, W) in the colours above, its sides in even numbers, ready for 4:2:0 video. Not by way
    of RGB: FFmpeg rounds down on the way back, and a compressed video would be darker.
    """
    reformatter = VideoReformatter()  # one a video: it keeps its tables from frame to frame
    step, sides = (2, (1, 2)) if yuv else (1, (0, 1))
    for x, frame in shown:
        scale = min(1.0, (short_side or math.inf) / min(frame.width, frame.height))
        try:
            picture = reformatter.reformat(
                frame,
                width=max(1, round(frame.width * scale / step)) * step,
                height=max(1, round(frame.height * scale / step)) * step,
                format="yuv444p" if yuv else "rgb24",
                interpolation="BICUBIC",
                src_color_range=frame.color_range,
                dst_color_range=ColorRange.MPEG if yuv else ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU601,  # that of yuv; RGB has none
                threads=1,
            )
        except (av.FFmpegError, ValueError) as e:
            raise InputError(f"{path}: pixel format {frame.format.name} cannot be converted ({e})") from e
        turns = round(frame.rotation / 90)  # counter-clockwise, as numpy counts
        yield x, np.ascontiguousarray(np.rot90(picture.to_ndarray(), turns, sides))

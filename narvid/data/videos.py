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
from av.video.reformatter import VideoReformatter
from PIL import Image

from narvid import InputError
from narvid.data.decoding import CLOCK_TOLERANCE, announced_seconds, open_video, timed_frames
from narvid.data.pixels import BT601, LIMITED, pictures

SUFFIXES = (  # of what is taken for a video file
    ".3g2", ".3gp", ".3gpp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
)
SHORT_SIDE, QUALITY = 256, 95  # of the frames that are kept as jpgs, where nothing else is said


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
    Iterating raises an InputError that names the file if it gives no frame at all.
    """
    if (fps is None) == (n is None) or (n if fps is None else fps) <= 0:
        raise ValueError(f"decode_video takes fps or n, one of them and positive, got fps = {fps}, n = {n}")
    notes = [] if notes is None else notes
    if fps:
        shown = ((time, frame) for time, _, frame in _at_rate(timed_frames(path, max_seconds, notes), fps))
    else:
        shown = _uniform(path, n, max_seconds, notes)
    return pictures(path, shown, short_side, notes)


class Clip(NamedTuple):
    """What was read of a video file: its length, what is amiss, and time (s) and jpg file of each frame."""

    seconds: float
    note: str
    times: list[float]
    jpegs: list[bytes]


def read_video(path: str | Path, *, fps: float = 1.0, short_side: int = SHORT_SIDE, jpegs: list | None = None,
               max_seconds: float = math.inf) -> Clip:
    """A whole video file, its frames as scripts/extract_frames.py writes them: jpgs of the same size and quality.

    jpegs: what they are appended to; None: a list, in memory. max_seconds: of a longer file no more is read. InputError
    names a file that gives no frame.
    """
    times, jpegs, notes, end = [], [] if jpegs is None else jpegs, [], 0.0

    def whole():
        nonlocal end
        for time, end, frame in timed_frames(path, max_seconds, notes):
            yield time, end, frame

    shown = ((time, frame) for time, _, frame in _at_rate(whole(), fps))
    for seconds, pixels in pictures(path, shown, short_side, notes):
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        times.append(round(seconds, 3))
        jpegs.append(file.getvalue())
    container, stream = open_video(path)
    with container:
        seconds = announced_seconds(container, stream)
    if abs(seconds - end) > max(1.0, 0.05 * end):  # what decodes counts, not what is promised
        seconds = times[-1] + 1 / fps
    return Clip(max(seconds, times[-1]), "; ".join(notes), times, jpegs)


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
    notes = [] if notes is None else notes
    taken = _at_rate(timed_frames(path, max_seconds, notes), fps)
    shown = pictures(path, ((ticks, frame) for _, ticks, frame in taken), short_side, notes, yuv=True)
    rate, count = Fraction(fps).limit_denominator(10**6), 0
    # No B-frames: stamps rise in file order from 0, without an edit list. A key frame every 5 s: readers seek.
    options = {"crf": str(crf), "bf": "0", "g": str(math.ceil(5 * fps)), "threads": "1"}
    try:
        with av.open(f"file:{out}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
            halver = VideoReformatter()  # of the colours' resolution
            for ticks, pixels in shown:
                if not count:
                    stream.height, stream.width = pixels.shape[1:]
                frame = av.VideoFrame.from_ndarray(_fitted(pixels, stream.height, stream.width), format="yuv444p")
                frame = halver.reformat(frame, format="yuv420p", interpolation="BICUBIC", threads=1)
                for _ in range(ticks):
                    frame.pts, frame.time_base, count = count, 1 / rate, count + 1
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.FFmpegError as e:
        if isinstance(e, OSError):  # the disk, not the video
            raise
        raise InputError(f"{path} cannot be written as h264 ({e.strerror}): leave it out") from e
    return count


def _fitted(yuv, height, width):
    """A picture (3, H, W) of another size than the file's first one in its place, whole, with black around.

    The size changes within recordings of calls and of screens that are turned.
    """
    if yuv.shape[1:] == (height, width):
        return yuv
    scale = min(height / yuv.shape[1], width / yuv.shape[2])
    h, w = (max(1, round(scale * side)) for side in yuv.shape[1:])
    frame = av.VideoFrame.from_ndarray(yuv, format="yuv444p").reformat(w, h, interpolation="BICUBIC", threads=1)
    black = np.repeat(np.uint8([16, 128, 128]), height * width).reshape(3, height, width)
    top, left = (height - h) // 2, (width - w) // 2
    black[:, top : top + h, left : left + w] = frame.to_ndarray()
    return black


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


def _at_rate(frames, fps):
    """Yield (time, ticks, frame): those on screen at one or more of the times 0, 1 / fps, ..., and at how many."""
    for time, end, frame in frames:
        first = math.ceil((time - CLOCK_TOLERANCE) * fps)  # the first of these times that this frame is in time for
        ticks = math.ceil((end - CLOCK_TOLERANCE) * fps) - first
        if ticks > 0:
            yield time, ticks, frame


def _uniform(path, n, max_seconds, notes):
    """Yield (time, frame) of the frames on screen at n times from the first frame's to the last's, both included."""
    times = np.array([time for time, _, _ in timed_frames(path, max_seconds, notes)])
    targets = np.linspace(0, times[-1], n) + CLOCK_TOLERANCE
    keep = set((np.searchsorted(times, targets, side="right") - 1).tolist())
    for i, (time, _, frame) in enumerate(timed_frames(path, max_seconds, [])):
        if i in keep:
            yield time, frame

"""Opening and decoding a video file: the one door, and the one clock.

Here: which files count as videos, which of their streams is the picture, which decoded frame is on screen from when to
when, damaged files. Not here: which of the frames are taken (videos.py), what they look like (pixels.py).
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from narvid import InputError

CLOCK_TOLERANCE = 6e-4  # seconds; containers that count in milliseconds round a frame's time by up to half of one
# FFmpeg also reads playlists, lists of pictures and scripts, which lead to other files. These hold what they show, or
# sound alone, which is recognised below.
CONTAINERS = (
    "mov,matroska,avi,flv,asf,mpeg,mpegts,ogg,gif,rm,mxf,nut,dv,wtv,ivf,obu,m4v,mpegvideo,h264,hevc,yuv4mpegpipe,"
    "flac,mp3,wav,aac"
)
LIMITS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
WIDEST_PIXEL = 4.0  # times its height; what says more is a slip of whoever wrote the file
SHORT_PAUSE = 60.0  # seconds; what the stamps leave out is never questioned up to here
# Old files carry titles that are not UTF-8. av 19 reads them all and no longer takes the argument.
ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# FFmpeg's own decoders of these two leave the alpha out.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def open_video(path: str | Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    """The open container of a video file and the stream that is its picture: the largest, but for cover pictures.

    Every video is opened here. InputError names what is no video, also a playlist: it would lead to other files.
    """
    try:
        # the prefix keeps a colon in the name from being read as a protocol
        container = av.open(f"file:{path}", options=LIMITS, **ANY_TITLE)
    except (av.FFmpegError, OSError, ValueError) as e:
        why = "no container that holds video itself; playlists and lists of pictures are not followed"
        why = why if isinstance(e, av.ArgumentError) else getattr(e, "strerror", None) or e
        raise InputError(f"{path} cannot be opened as a video ({why}): fetch it again or leave it out") from e
    no_picture = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & no_picture]
    if not streams:
        container.close()
        raise InputError(f"{path} holds no video that can be decoded (sound only, or an unknown codec): leave it out")
    # A single frame beside a video is its poster. Of equals, max takes the first.
    stream = max(streams, key=lambda s: (s.frames != 1, s.codec_context.width * s.codec_context.height))
    stream.codec_context.thread_count = 1  # one video a core is faster than one video on all cores
    return container, stream


def sound_of(path: str | Path, rate: int) -> np.ndarray:
    """What a video file sounds like: mono float32 (n,), `rate` samples a second from its first frame on; (0,) for none.

    Pieces that do not decode are left out. InputError names what is no video.
    """
    container, picture = open_video(path)
    with container:
        if not container.streams.audio:
            return np.zeros(0, np.float32)
        stream = container.streams.best("audio") or container.streams.audio[0]
        resampler, parts = av.AudioResampler(format="flt", layout="mono", rate=rate), []
        for frame in _decoded(container, stream):
            if frame is not None:
                frame.pts = None  # the samples count on, whatever the stamps say
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
        late = float((stream.start_time or 0) * stream.time_base - (picture.start_time or 0) * picture.time_base)
    sound = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if late <= 0:
        return sound[round(-late * rate) :]
    return np.concatenate([np.zeros(round(late * rate), np.float32), sound])


def pixel_ratio(path: str | Path, notes: list[str]) -> float:
    """Width of a pixel over its height, as the file says: old television's is not 1. `notes`: what cannot be."""
    container, stream = open_video(path)
    with container:
        ratio = float(stream.sample_aspect_ratio or 1)
    if not 1 / WIDEST_PIXEL <= ratio <= WIDEST_PIXEL:
        note = f"pixels {ratio:.3g} times as wide as high are taken as square"
        notes += [] if note in notes else [note]
        return 1.0
    return ratio


def announced_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """The length of the picture that a video file announces, or 0; sound may last longer."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    with suppress(KeyError, ValueError):  # Matroska's way: 00:01:02.345000000
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return max(0.0, ((container.duration or 0) - max(0, container.start_time or 0)) / 1e6)


def _shown(stream: av.VideoStream) -> int:
    """The frames of a stream less those that an edit list leaves out: a phone trims a clip without touching it."""
    entries = stream.index_entries
    return sum(not entry.is_discard for entry in entries) if entries else stream.frames


def timed_frames(
    path: str | Path, max_seconds: float, notes: list[str]
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Yield (time, end, frame) of every frame of a video: on screen from `time` to `end`, in seconds from the first.

    Cut at max_seconds. `notes` receives what is amiss; InputError names a file that gives no frame.
    """
    least = 2 * CLOCK_TOLERANCE  # so long the first frame is on screen, whatever the file or the caller says
    max_seconds = max(max_seconds, least)
    container, stream = open_video(path)
    with container:
        clock = _Clock(path, stream, notes)
        frame, time, count = None, 0.0, 0
        frames = _sound_frames(container, stream, notes)
        for next_frame in frames:
            next_time = clock.time_of(next_frame)
            if count:
                yield time, min(next_time, max_seconds), frame
            if next_time >= max_seconds - CLOCK_TOLERANCE:
                frames.close()  # now, not some time later: it notes the broken frames
                return
            frame, time, count = next_frame, next_time, count + 1
        if not count:
            raise InputError(f"{path}: not one frame of the video decodes; fetch it again or leave it out")
        end = time + max(least, clock.length_of(frame))
        announced = announced_seconds(container, stream) - clock.leapt
        late = max(0.0, clock.start)  # some containers announce the last stamp, not the length
        if count < 0.95 * stream.frames and count < 0.95 * _shown(stream) or late + end < 0.9 * announced - 1.0:
            notes.append(
                f"{count} frames, {end:.1f} s decode of {stream.frames or '?'} frames, {announced:.1f} s announced"
            )
        yield time, min(end, max_seconds), frame


# ---- the clock ----


class _Clock:
    """Times of the frames of a video, given in display order: seconds from the first one, never falling.

    Time stamps count, not the header's rate: rates vary, and a picture may stand for half an hour. The file's own rate
    counts on where there is no stamp, and where a stamp cannot be true: more than a second back (joined recordings,
    whose clock starts again), a leap ahead (see _measure), the same one for more than a second. From there the stamps
    count again; after a leap and back they count as before it.
    """

    def __init__(self, path, stream, notes):
        self._path, self._notes = path, notes
        self.start = self.leapt = 0.0  # seconds: the first stamp, all leaps ahead
        self._origin = self._before = self._stamp = None  # stamps: of time 0, the same before a leap, of the last frame
        self._time, self._count, self._standing = 0.0, 0, 0  # of the last frame; frames; how many more had its stamp
        self._longest = None  # seconds of a pause, once it is measured
        rates = (float(rate or 0) for rate in (stream.average_rate, stream.guessed_rate))
        self._step = next((1 / rate for rate in rates if 0.01 < rate < 1000), 1 / 25)  # headers also say 0 and 90000

    def time_of(self, frame: av.VideoFrame) -> float:
        """When this frame, the next in display order, comes on screen."""
        stamp, expected = frame.time, self._time + self._step if self._count else 0.0
        self._count += 1
        if stamp is None:
            self._time = expected
            return expected
        if self._origin is None:
            self.start, self._origin = stamp, stamp - expected
        self._standing = self._standing + 1 if stamp == self._stamp else 0
        self._stamp = stamp
        ahead = stamp - self._origin - self._time
        if abs(ahead) > 1.0 and self._before is not None and abs(stamp - self._before - expected) <= 1.0:
            self._origin, self._before = self._before, None
        elif ahead < -1.0 or self._leaps(ahead):
            self.leapt += max(0.0, ahead)
            self._note(ahead)
            self._before, self._origin = self._origin, stamp - self._time - self._step
        elif self._standing * self._step > 1.0:
            self._note(0.0)
            self._before = self._origin if self._before is None else self._before
            self._origin, self._standing = stamp - self._time - self._standing * self._step, 0
        self._time = max(self._time, round(stamp - self._origin, 6))
        return self._time

    def length_of(self, frame: av.VideoFrame) -> float:
        """Seconds that this frame, the last one, stays."""
        length = float(frame.duration * frame.time_base) if frame.duration else self._step
        if not self._leaps(length):
            return length
        self.leapt += length
        self._note(length)
        return self._step

    def _leaps(self, ahead):
        if ahead <= SHORT_PAUSE:
            return False
        if self._longest is None:
            self._longest, self._step = _measure(self._path, self._step)
        return ahead > self._longest

    def _note(self, leap):
        what = f"leap by {leap:.0f} s" if leap else "stand still"
        note = f"the time stamps {what} at {self._time:.1f} s: there the file's own rate counts"
        if not any("the time stamps" in other for other in self._notes):
            self._notes.append(note)


def _measure(path, step):
    """(the longest step between two stamps that is a pause and no leap of the clock, the usual step), in seconds.

    No header can decide: it adds up the same stamps. The file's own rate does, read from all its packets. A leap is
    longer than a minute, than 1,000 times the step that nine of ten do not exceed, and than all the other steps
    together; and there is no sound that goes on meanwhile. So four slides in half an hour are four slides: they keep no
    rate that a pause could break.
    """
    container, stream = open_video(path)
    stamps, sound = [], {}
    with container, suppress(av.FFmpegError):
        for packet in container.demux():
            if packet.stream.type == "audio":
                length = packet.duration * packet.time_base if packet.duration else 0
                sound[packet.stream.index] = sound.get(packet.stream.index, 0.0) + float(length)
            stamp = packet.pts if packet.dts is None else packet.dts
            if packet.stream.index == stream.index and stamp is not None:
                stamps.append(float(stamp * packet.time_base))
    steps = np.sort(np.diff(stamps))
    steps = steps[steps > 0]
    if not len(steps):
        return math.inf, step
    longest = max(SHORT_PAUSE, 1000 * steps[math.ceil(0.9 * len(steps)) - 1])
    usual = steps[steps <= longest].sum()
    if max(sound.values(), default=0.0) > usual + steps[steps > longest].sum() / 2:
        return math.inf, step
    return float(max(longest, usual)), float(np.median(steps))


# ---- damaged files ----


def _sound_frames(container, stream, notes):
    """Decode forward once and yield the frames in display order, without the combs of interlaced ones.

    Broken ones are left out and counted in the notes.
    """
    broken, fields = 0, None
    raw = stream.codec_context.codec.canonical_name == "rawvideo"
    try:
        for frame in _decoded(container, stream):
            if frame is None or frame.is_corrupt:  # shown, its missing parts would be grey or the previous frame's
                broken += 1
                continue
            if raw and frame.format.name == "bgra" and not frame.to_ndarray()[..., 3].any():
                frame = frame.reformat(format="bgr0")  # old AVI files leave the fourth byte at 0: it is no alpha
            if fields is None and frame.interlaced_frame:
                fields = _Fields(stream)
            yield from [frame] if fields is None else fields.joined(frame)
        if fields is not None:
            yield from fields.joined(None)
    finally:  # also when the rest of the video is not asked for
        if broken:
            notes.append(f"{broken} broken frames left out")


class _Fields:
    """FFmpeg's filter that makes one whole picture of two fields, which were taken one after the other.

    Frames go through it from the first interlaced one on, in order; those that are not come out as they are.
    """

    def __init__(self, stream):
        self._stream, self._form, self._graph = stream, None, None

    def joined(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """Take the next frame, or None behind the last, and yield what is ready: each waits for the one behind it."""
        form = frame and (frame.format.name, frame.width, frame.height)
        if form != self._form and self._graph is not None:
            self._graph.push(None)
            yield from self._ready()
            self._graph = None
        if frame is None:
            return
        if self._graph is None:
            self._form, self._graph = form, av.filter.Graph()
            chain = (self._graph.add_buffer(width=frame.width, height=frame.height, format=frame.format,
                                            time_base=frame.time_base or self._stream.time_base),
                     self._graph.add("bwdif", "mode=send_frame:deint=interlaced"), self._graph.add("buffersink"))
            for before, behind in pairwise(chain):
                before.link_to(behind)
            self._graph.configure()
        self._graph.push(frame)
        yield from self._ready()

    def _ready(self):
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                yield self._graph.pull()


def _decoded(container, stream):
    """Yield the frames of a stream, and None for every piece of the file that cannot be read or decoded."""
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and (name := WITH_ALPHA.get(decoder.codec.canonical_name)):
        with suppress(av.codec.codec.UnknownCodecError):  # an FFmpeg built without it
            decoder = av.CodecContext.create(name, "r")
            decoder.thread_count = 1
    packets = container.demux(stream)
    packet = stream
    while packet is not None:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            packet = None
            yield None
        try:
            yield from decoder.decode(packet)  # None: what the decoder still holds back
        except av.EOFError:
            return
        except av.FFmpegError:
            yield None

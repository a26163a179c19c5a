"""A stretch of a video file as an mp4 that a browser plays while it is being made: copied, or else encoded.

Here: packets and frames of the stretch, its sound, both from its first moment on. Not here: which files need this, the
folder of made clips (clips.py), who may ask (server.py), opening a file (narvid/data/decoding.py).

Times are those of the index: seconds from the file's first frame. Where a file's clock cannot be trusted (its note says
so) the frames are counted from the beginning as when it was indexed, which takes longer, and there is no sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import VideoReformatter

from narvid import InputError
from narvid.data.decoding import open_video, timed_frames
from narvid.data.pixels import BT601, LIMITED, pictures

SHORT_SIDE, RATE, CRF = 360, 30.0, 25  # of what is encoded to be looked at: pixels, at most so many frames a second
SOUND_RATE = 48000  # samples a second
COPIED_SOUND = ("aac", "mp3")  # codecs that an mp4 holds and every browser plays
STREAMED = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "400000"}  # microseconds
WHOLE = {"movflags": "+faststart"}
TICK = Fraction(1, 90000)


def key_frame_before(path: str | Path, start: float) -> float:
    """Seconds of the file at which a copy that shall hold `start` has to begin; InputError where none can be found."""
    container, stream = open_video(path)
    with container:
        origin = _origin(container, stream)
        packet = next(_packets_from(container, [stream], stream, origin + start), None)
        if packet is None:
            raise InputError(f"{path}: no key frame to begin with")
        return max(0.0, float(_stamp(packet) * packet.time_base) - origin)


def copied(path: str | Path, start: float, end: float, sink: Callable[[bytes], int] | str) -> Iterator[None]:
    """Write the packets from the key frame at or before `start` up to `end`; yields after each, so that it can end.

    sink: called with bytes as they come, or the name of a file to write. Sound that a browser may not play is encoded.
    The copy's time 0 is key_frame_before(path, start). InputError where the mp4 cannot hold it.
    """
    container, stream = open_video(path)
    with container, _mp4(sink) as out:
        origin = _origin(container, stream)
        video = out.add_stream_from_template(stream, opaque=True)  # its decoder need not be its encoder's twin
        sound = _Sound(container, out, copy=container.format.name.startswith(("mov", "matroska", "flv")))
        first, last = None, -1
        for packet in _packets_from(container, [stream, *sound.streams], stream, origin + start):
            if packet.stream is stream:
                time = _stamp(packet) * packet.time_base
                if first is None:
                    first = time
                elif float(time) - origin >= end:
                    break
                shift = int(first / packet.time_base)
                last = max(_stamp(packet) - shift, last + 1)  # joined recordings: stamps that fall are no mp4's
                packet.pts = max(last, packet.pts - shift if packet.pts is not None else last)
                packet.dts, packet.stream = last, video
                out.mux(packet)
            elif first is not None:
                sound.take(packet, float(first), origin + end)
            yield
        sound.end()


def encoded(path: str | Path, start: float, end: float, sink: Callable[[bytes], int] | str, *, counted: bool = False,
            short_side: int | None = SHORT_SIDE, crf: int = CRF) -> Iterator[None]:
    """Write what is on screen from `start` to `end` as H.264 with its sound; yields after each frame.

    counted: the file's clock cannot be trusted. Colours, rotation and what is transparent are as in the index.
    """
    container, stream = open_video(path)
    with container, _mp4(sink) as out:
        stream.codec_context.thread_count = 0  # one viewer waits; indexing has a process a core
        origin = _origin(container, stream)
        video = out.add_stream("libx264", rate=30, options={
            "crf": str(crf), "preset": "veryfast", "tune": "zerolatency", "g": "30", "threads": "2"})
        video.codec_context.time_base = TICK
        video.codec_context.colorspace, video.codec_context.color_range = BT601, LIMITED
        sound = _Sound(container, out, copy=False, silent=counted)
        sound.wait = True  # the first packet fixes the size of the picture
        if counted:
            frames = ((time, frame) for time, until, frame in timed_frames(path, end, []) if until > start)
        else:
            frames = _frames_from(container, stream, origin, start, end, sound)
        halver, last = VideoReformatter(), -1.0
        for time, pixels in pictures(path, _thinned(frames), short_side, [], yuv=True):
            picture = av.VideoFrame.from_ndarray(pixels, format="yuv444p")
            if last < 0:
                video.width, video.height = picture.width, picture.height
                sound.wait = False
            picture = halver.reformat(picture, format="yuv420p", width=video.width, height=video.height, threads=1)
            now = max(time - start, 0.0) if last < 0 else max(time - start, last + 0.001)
            picture.pts, picture.time_base, last = round(now / TICK), TICK, now
            out.mux(video.encode(picture))
            yield
        if last < 0:
            raise InputError(f"{path}: no frame between {start:.1f} and {end:.1f} s can be decoded")
        out.mux(video.encode())
        sound.end()


# ---- inside ----


class _Sink:
    """What PyAV writes to; it must not look as if it could seek."""

    def __init__(self, take: Callable[[bytes], int]):
        self.take = take

    def write(self, data: bytes) -> int:
        self.take(bytes(data))
        return len(data)


def _mp4(sink: Callable[[bytes], int] | str) -> av.container.OutputContainer:
    if callable(sink):
        return av.open(_Sink(sink), "w", format="mp4", options=STREAMED, buffer_size=8192)
    return av.open(f"file:{sink}", "w", format="mp4", options=WHOLE)


def _stamp(packet: av.Packet) -> int:
    return packet.dts if packet.dts is not None else packet.pts


def _origin(container, stream) -> float:
    """The stamp of the first frame, in seconds; the container is then at its beginning again."""
    for packet in container.demux(stream):
        with suppress(av.FFmpegError):
            if frames := stream.decode(packet):
                origin = frames[0].time or 0.0
                break
    else:
        raise InputError(f"{container.name}: not one frame of the video decodes")
    _seek(container, stream, origin)
    return origin


def _seek(container, stream, seconds: float) -> None:
    with suppress(av.FFmpegError):  # a form without an index is read on from where it is, or from its beginning
        container.seek(int(seconds / stream.time_base), stream=stream, backward=True)
    with suppress(AttributeError):
        stream.codec_context.flush_buffers()


def _packets_from(container, streams, stream, seconds: float) -> Iterator[av.Packet]:
    """Packets of these streams from the key frame of `stream` at or before this stamp on; broken ones are passed over.

    Where seeking lands too late, as in files without an index, those from the beginning on.
    """
    _seek(container, stream, seconds)
    packets, held, begun = _demuxed(container, streams), [], False
    for packet in packets:
        if packet.stream is not stream and not begun:
            continue  # sound before the first picture
        if not begun and not packet.is_keyframe:
            continue
        shown = packet.dts if packet.pts is None else packet.pts
        if not begun and float(shown * packet.time_base) > seconds + 0.05:
            _seek(container, stream, -1e6 if container.start_time is None else container.start_time / 1e6 - 10)
            packets = _demuxed(container, streams)
            last = None
            for packet in packets:  # the last key frame that is not too late
                late = packet.stream is stream and float(_stamp(packet) * packet.time_base) > seconds
                if packet.stream is stream and packet.is_keyframe and not (late and held):
                    held, last = [], packet
                if last is not None:
                    held.append(packet)
                if late:
                    break
            yield from held
            yield from packets
            return
        begun = True
        yield packet


def _demuxed(container, streams) -> Iterator[av.Packet]:
    packets = container.demux(streams)
    failed = 0
    while failed < 100:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            failed += 1
            continue
        if _stamp(packet) is not None and packet.size:
            yield packet


def _frames_from(container, stream, origin: float, start: float, end: float, sound: _Sound):
    """(seconds, frame) from the one on screen at `start` on; packets of the sound go to `sound` as they come."""
    before = None
    for packet in _packets_from(container, [stream, *sound.streams], stream, origin + start):
        if packet.stream is not stream:
            sound.take(packet, origin + start, origin + end)
            continue
        with suppress(av.FFmpegError):
            for frame in stream.decode(packet):
                if frame.time is None:
                    continue
                time = frame.time - origin
                if time <= start:
                    before = (time, frame)
                    continue
                if before is not None:
                    yield before
                    before = None
                if time >= end:
                    return
                yield time, frame
    with suppress(av.FFmpegError):
        for frame in stream.decode(None):
            if frame.time is not None and start < frame.time - origin < end:
                if before is not None:
                    yield before
                    before = None
                yield frame.time - origin, frame
    if before is not None:
        yield before


def _thinned(frames):
    """No more than RATE frames a second."""
    last = None
    for time, frame in frames:
        if last is None or time - last > 0.9 / RATE:
            last = time
            yield time, frame


class _Sound:
    """The file's first sound in the mp4: copied where a browser plays it, else as AAC. streams: what to demux."""

    def __init__(self, container, out, *, copy: bool, silent: bool = False):
        found = [] if silent else [s for s in container.streams.audio if s.codec_context is not None]
        self.streams, self.out, self.resampler, self.next = found[:1], out, None, None
        self.wait, self.held = False, []
        if not found:
            return
        self.copy = copy and found[0].codec_context.codec.canonical_name in COPIED_SOUND
        if self.copy:
            self.stream = out.add_stream_from_template(found[0], opaque=True)
        else:
            self.stream = out.add_stream("aac", rate=SOUND_RATE, layout="stereo")
            self.resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SOUND_RATE)

    def take(self, packet: av.Packet, start: float, end: float) -> None:
        """A packet of the sound; start, end: stamps of the stretch, in seconds."""
        self.held.append(packet)
        if not self.wait:
            for held in self.held:
                self._take(held, start, end)
            self.held = []

    def _take(self, packet: av.Packet, start: float, end: float) -> None:
        time = float(_stamp(packet) * packet.time_base)
        if not start <= time < end:
            return
        if self.copy:
            stamp = _stamp(packet) - int(start / packet.time_base)
            if self.next is None or stamp > self.next:
                packet.pts = packet.dts = self.next = stamp
                packet.stream = self.stream
                self.out.mux(packet)
            return
        with suppress(av.FFmpegError):  # a broken piece of sound is silence
            for frame in packet.decode():
                self._encode(frame, start)

    def _encode(self, frame: av.AudioFrame, start: float) -> None:
        at = round(((frame.time or 0.0) - start) * SOUND_RATE)
        for piece in self.resampler.resample(frame):
            if self.next is None or at > self.next + SOUND_RATE // 10:  # a gap
                self.next = max(at, 0)
            piece.pts, piece.time_base = self.next, Fraction(1, SOUND_RATE)
            self.next += piece.samples
            self.out.mux(self.stream.encode(piece))

    def end(self) -> None:
        if self.resampler is not None and self.next is not None:
            with suppress(av.FFmpegError):
                self.out.mux(self.stream.encode())

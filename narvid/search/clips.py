"""Clips for a browser: which video files it plays as they are, and the making of stretches of those it does not.

Here: how a file is played, a stretch on its way to one viewer, the folder in which made ones wait to be asked for
again. Not here: packets and frames (preview.py), which file may be served to whom (watching.py).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import av

from narvid import InputError, files
from narvid.data.decoding import announced_seconds, open_video
from narvid.search import preview
from narvid.search.rows import File

PLAYABLE = {  # container as FFmpeg names it -> (endings, codecs, sounds, media type); 4:2:0 of 8 bits alone
    "mov,mp4,m4a,3gp,3g2,mj2": ((".mp4", ".m4v", ".mov", ".qt"), ("h264", "vp9", "av1"),
                                ("aac", "mp3", "opus", "flac"), "video/mp4"),
    "matroska,webm": ((".webm",), ("vp8", "vp9", "av1"), ("opus", "vorbis"), "video/webm"),
}
COPIED = ("h264", "av1", "vp9")  # codecs that an mp4 holds and a browser plays
KEPT = COPIED + ("hevc", "mpeg4")  # and those that others play: of a stretch that is downloaded
LONGEST = 120.0  # seconds of a preview
FARTHEST = 20.0  # seconds before the asked-for moment at which a copy may begin
CHUNK = 64_000  # bytes
LIMIT = 300_000_000  # bytes of made clips that wait; the oldest go first
AT_ONCE = 16  # previews under way; of more, the one that waits the longest is given up


class Played(NamedTuple):
    """kind: "file", as it is; "copied", a stretch of its packets; "encoded". counted: its clock cannot be trusted."""

    kind: str
    media_type: str = "video/mp4"
    counted: bool = False


@lru_cache(maxsize=4096)
def how_played(path: Path, size: int, mtime_ns: int, seconds: float | None = None, note: str = "") -> Played:
    """How a browser gets to see this file; cached for that very file. InputError where it cannot be opened.

    seconds, note: of the index. A browser follows the file's own clock and first streams, so a file that announces much
    more, or shows another stream, is not played as it is.
    """
    container, stream = open_video(path)
    with container:
        endings, codecs, sounds, media_type = PLAYABLE.get(container.format.name, ((), (), (), ""))
        codec, first = stream.codec_context.codec.canonical_name, stream == container.streams.video[0]
        plain = stream.codec_context.pix_fmt in ("yuv420p", "yuvj420p")
        sound = [s.codec_context.codec.canonical_name for s in container.streams.audio if s.codec_context is not None]
        trusted = "the time stamps" not in note
        if seconds is not None and announced_seconds(container, stream) > 1.1 * seconds + 10:
            trusted = False
    if not trusted:
        return Played("encoded", counted=True)
    if plain and first and codec in codecs and path.suffix.lower() in endings and (not sound or sound[0] in sounds):
        return Played("file", media_type)
    return Played("copied" if plain and codec in COPIED else "encoded")


def begin_of_copy(played: Played, path: Path, start: float) -> float | None:
    """Where a copy that shall show `start` begins, in seconds of the file: with a key frame. None: it is encoded."""
    if played.kind != "copied":
        return None
    try:
        found = preview.key_frame_before(path, start)
        steps = preview.copied(path, start, start + 0.1, lambda data: len(data))
        next(steps, None)
        steps.close()
    except (InputError, av.FFmpegError, ValueError):  # what an mp4 cannot hold after all
        return None
    return found if start - found <= FARTHEST else None


class Making:
    """A stretch on its way to one viewer, made as far as it is asked for, in whichever thread asks.

    ways: each called with what takes the bytes; the next one where one fails before it has given any. kept: where the
    whole of it goes when it is there; None: nowhere.
    """

    def __init__(self, ways: list[Callable[[Callable], Iterator[None]]], kept: Path | None):
        self.closed, self._lock, self._chunks = False, threading.Lock(), self._made(ways, kept)

    def read(self) -> bytes:
        """The next bytes, b"" at the end or after close(); InputError where no way leads to a clip."""
        with self._lock:
            return b"" if self.closed else next(self._chunks, b"")

    def close(self) -> None:
        """Give it up, with what is there of it; what is being made this moment is finished first."""
        self.closed = True
        with self._lock:
            self._chunks.close()

    def _made(self, ways: list[Callable], kept: Path | None) -> Iterator[bytes]:
        with _Keeping(kept) as file:
            for way in ways:
                got, sent = [], 0
                try:
                    with closing(way(got.append)) as steps:
                        for _ in steps:
                            if self.closed:
                                return
                            if sum(map(len, got)) >= (CHUNK if sent else 1):  # the first picture at once
                                data = b"".join(got)
                                got.clear()
                                sent += file.write(data)
                                yield data
                except (av.FFmpegError, ValueError) as error:  # an InputError, too
                    if sent or way is ways[-1]:
                        raise error if isinstance(error, InputError) else InputError(
                            f"no clip for browsers could be made ({error})") from error
                    continue
                data = b"".join(got)
                file.write(data)
                file.done()
                yield data
                return


class _Keeping:
    """Writes a made clip under a temporary name; whole ones get theirs. A full disk is no reason to stop."""

    def __init__(self, path: Path | None):
        self.path, self.file = path, None

    def __enter__(self):
        if self.path is not None:
            with suppress(OSError):
                self.path.parent.mkdir(exist_ok=True)
                self.file = open(self.path.with_name(f"{uuid4().hex}.tmp"), "wb")
        return self

    def write(self, data: bytes) -> int:
        if self.file is not None:
            try:
                self.file.write(data)
            except OSError:
                self._drop()
        return len(data)

    def done(self) -> None:
        if self.file is not None:
            with suppress(OSError, InputError):  # a disk that does not take it: the clip is made again
                self.file.close()
                files.replace(self.file.name, self.path)
                self.file = None

    def _drop(self) -> None:
        file, self.file = self.file, None
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(file.name)

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self._drop()


class Folder:
    """Made clips that wait to be asked for again: no more than `limit` bytes of them."""

    def __init__(self, path: Path, limit: int = LIMIT):
        self.path, self.limit = path, limit

    def place(self, file: File, start: float, end: float, kind: str) -> Path:
        """Where the clip of this stretch lies or would lie; by what the file is, for it may change, not its path."""
        what = repr((file.path, file.size, file.mtime_ns, round(start, 3), round(end, 3), kind))
        return self.path / f"{hashlib.sha256(what.encode('utf-8', 'backslashreplace')).hexdigest()[:32]}.{kind}.mp4"

    def find(self, place: Path) -> bool:
        """Whether it is there; it has then been used last."""
        try:
            os.utime(place)
        except OSError:
            return place.is_file()
        return True

    def sweep(self, at_start: bool = False) -> None:
        """Drop what has been used the longest ago, down to the limit; at the start also what is half made."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(self.path):
                with suppress(OSError):
                    ours = entry.name.endswith((".copied.mp4", ".encoded.mp4"))
                    if at_start and not ours:
                        os.unlink(entry.path)
                    elif ours:
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self.limit:
                break
            with suppress(OSError):
                os.unlink(path)
                left -= size

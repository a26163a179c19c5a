"""One video file, read for the index by a worker process: its frames wait on disk, however long the video is.

Here: what is read of a file and in which form it waits. Not here: decoding (narvid/data/videos.py), windows and worker
processes (reading.py), the index (store.py).
This file must not import torch: see reading.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from tempfile import mkstemp
from typing import NamedTuple

from PIL import Image

from narvid.data.decoding import open_video
from narvid.data.videos import read_video
from narvid.files import read_parts, unwritable
from narvid.search.reading import windows_of

FOLDER = "reading"  # in the index folder; emptied at every start
LOOK_SIDE, LOOK_QUALITY = 192, 45  # of the pictures that are kept to be looked at: WebP, pixels of the shorter side


class Spool:
    """A list of byte strings in a file of its own: append, len, [n]; `remove` deletes it."""

    def __init__(self, folder: str | Path):
        number, self.path = mkstemp(".jpgs", dir=folder)
        os.close(number)
        self._ends, self._file = [0], None

    def append(self, data: bytes) -> None:
        """One more."""
        try:
            self._file = self._file or open(self.path, "r+b")
            self._file.seek(self._ends[-1])
            self._file.write(data)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(number)
        self._file = self._file or open(self.path, "r+b")
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number])

    def remove(self) -> None:
        """Delete the file; a second time does nothing."""
        if self._file:
            self._file.close()
            self._file = None
        with suppress(OSError):
            os.unlink(self.path)

    def __getstate__(self):
        if self._file:
            self._file.flush()
        return self.__dict__ | {"_file": None}  # the process that gets it opens it again


class Opened(Sequence):
    """Some of a spool's pictures as files, each opened when it is asked for."""

    def __init__(self, spool: Sequence[bytes], numbers: Sequence[int]):
        self.spool, self.numbers = spool, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> BytesIO:
        return BytesIO(self.spool[self.numbers[place]])


class Read(NamedTuple):
    """What was read of a file: narvid.data.videos.Clip's fields, its frames in a Spool; and what the index adds."""

    seconds: float
    note: str
    times: list[float]
    jpegs: Spool
    windows: list[tuple[float, float, list[int]]]  # start, end, numbers of the picked frames
    looks: dict[int, int]  # number of a picked frame -> place in `jpegs` of the picture that is kept
    content: str
    recorded: float | None


def read_file(path: str, *, folder: str, fps: float, short_side: int, window: float, max_frames: int) -> Read:
    """A video file, ready to be encoded; InputError names one that cannot be read. folder: of the spool."""
    jpegs = Spool(folder)
    try:
        clip = read_video(path, fps=fps, short_side=short_side, jpegs=jpegs)
        windows = windows_of(clip, window, fps, max_frames)
        looks = {}
        for number in sorted({number for _, _, picks in windows for number in picks}):
            looks[number] = len(jpegs)
            jpegs.append(for_looking(jpegs[number]))
        return Read(clip.seconds, clip.note, clip.times, jpegs, windows, looks, content_of(path), recorded_at(path))
    except BaseException:
        jpegs.remove()
        raise


def for_looking(jpeg: bytes) -> bytes:
    """A frame as it is kept in the index: small, for people."""
    with Image.open(BytesIO(jpeg)) as picture:
        scale = min(1.0, LOOK_SIDE / min(picture.size))
        size = [max(1, round(side * scale)) for side in picture.size]
        small, file = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), BytesIO()
    small.save(file, "WEBP", quality=LOOK_QUALITY, method=2)
    return file.getvalue()


def content_of(path: str | Path) -> str:
    """A digest of the whole file: the same wherever it lies and whatever it is called."""
    digest = hashlib.blake2b(digest_size=20)
    for part in read_parts(path):
        digest.update(part)
    return digest.hexdigest()


def recorded_at(path: str | Path) -> float | None:
    """When the video was recorded, in seconds since 1970, where its file says so."""
    container, stream = open_video(path)
    with container:
        for said in (container.metadata, stream.metadata):
            for name in ("com.apple.quicktime.creationdate", "creation_time", "date"):
                with suppress(ValueError, KeyError, OverflowError, OSError):
                    date = datetime.fromisoformat(said[name].strip().replace("Z", "+00:00"))
                    seconds = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
                    if seconds > 86400:  # cameras without a clock write 1904 or 1970
                        return seconds
    return None

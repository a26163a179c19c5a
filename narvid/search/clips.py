"""Clips for a browser: which video files it can play as they are, and an mp4 of those it cannot, made once.

Not here: which file may be served to whom (server.py), decoding and encoding (narvid/data/videos.py).
"""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import av

from narvid import InputError
from narvid.data.decoding import announced_seconds, open_video
from narvid.data.videos import compress_video
from narvid.files import replace
from narvid.search.store import File

MADE_CLIP = {"fps": 15.0, "short_side": 360, "crf": 23, "max_seconds": 7200.0}  # of what browsers cannot play
PLAYABLE = {  # container as FFmpeg names it -> (endings, codecs, media type); 4:2:0 of 8 bits alone
    "mov,mp4,m4a,3gp,3g2,mj2": ((".mp4", ".m4v", ".mov", ".qt"), ("h264", "vp9", "av1"), "video/mp4"),
    "matroska,webm": ((".webm",), ("vp8", "vp9", "av1"), "video/webm"),
}


@lru_cache(maxsize=4096)
def playable_as(path: Path, size: int, mtime_ns: int, seconds: float | None = None) -> str | None:
    """The media type as which every current browser plays this file, None if it may not; cached for that very file.

    seconds: its length in the index. A browser follows the file's own clock and first stream, so one that announces
    much more or shows another stream is not played as it is.
    """
    try:
        container, stream = open_video(path)
    except InputError:
        return None
    with container:
        endings, codecs, media_type = PLAYABLE.get(container.format.name, ((), (), None))
        codec = stream.codec_context
        plays = codec.codec.canonical_name in codecs and codec.pix_fmt in ("yuv420p", "yuvj420p")
        plays = plays and stream == container.streams.video[0] and path.suffix.lower() in endings
        if seconds is not None and announced_seconds(container, stream) > 1.1 * seconds + 10:
            plays = False
    return media_type if plays else None


def made(folder: Path, file: File, path: Path) -> Path:
    """The mp4, without sound, of the file that lies at `path`, in a folder of such clips; made where it is missing.

    It appears whole or not at all. InputError where the file cannot be read or the folder not be written.
    """
    clip = folder / clip_name(file)
    if clip.exists():
        return clip
    temporary = clip.with_suffix(".tmp")
    try:
        folder.mkdir(exist_ok=True)
        compress_video(path, temporary, **MADE_CLIP)
        replace(temporary, clip)
    except (OSError, av.FFmpegError) as error:
        raise InputError(f"no mp4 for browsers could be made of {file.path} ({error.strerror})") from error
    return clip


def clip_name(file: File) -> str:
    """By what the file is, for it may change and keep its path."""
    return hashlib.sha256(repr((file.path, file.size, file.mtime_ns)).encode()).hexdigest()[:32] + ".mp4"


def sweep(folder: Path, files: Iterable[File]) -> None:
    """Drop half made clips, and those of files that are no longer in the index."""
    wanted = {clip_name(file) for file in files}
    for path in folder.glob("*"):
        if path.name not in wanted:
            with suppress(OSError):  # an index that may not be written is served as it is
                path.unlink()

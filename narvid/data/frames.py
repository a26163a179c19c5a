"""Frames: which ones, the frame folder, reading and resizing them.

Here: the sampling rule, the layout of a frame folder and its index file, jpg -> uint8 tensor (PIL). Not here: video
files (videos.py), normalisation (the device does it, in the towers), sentences (narrations.py), which videos to use
(datasets.py).

A frame folder, written by scripts/extract_frames.py:
  <frames_dir>/<video>/<index:05d>.jpg   the frames of a video in time order, counted from 0
  <frames_dir>/index.jsonl               one line a video: {"video", "times": [seconds, ...], "sampling": "1 fps",
                                         "short_side", "quality", "source": file, "note": what was amiss, if so}

Shapes: K frames of a video; H, W height and width of a picture.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from narvid import InputError
from narvid.files import read_json_lines

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: the extractor's workers do without it (a second and 200 MB each).

INDEX_NAME = "index.jsonl"
FRAME_NAME = re.compile(r"[0-9]{5,}\.jpg")
COMPLETE = "run extract_frames again, it completes the folder"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # PIL knows others, and starts programs for some
LONGEST = 100  # times a picture's short side; what is longer is cropped before it is resized
ORIENTATION = 0x0112  # of EXIF
_NAMES = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
TURNS = {number: Image.Transpose[name] for number, name in enumerate(_NAMES, 2)}  # what EXIF's orientation asks for
# What PIL raises at a file that is no whole picture, or too large a one.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)


class Picture(NamedTuple):
    """What an image tower is given: a square of `size` pixels, its colours normalised on the device (towers)."""

    size: int
    resize: str = "shortest"  # side to `size`, then the middle is cut out; "squash": both sides to `size`
    interpolation: str = "bicubic"  # or "bilinear"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of colours from 0 to 1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


def pick_frames(n: int, k: int) -> list[int]:
    """Indices of the frames to use of n extracted ones: all if n <= k, else linspace(0, n-1, k) truncated to integers.

    The floats are numpy's, not exact fractions, as in the field: at n = 123, k = 15 one index differs by one.
    """
    if n < 1 or k < 1:
        raise ValueError(f"pick_frames needs at least one frame and one place, got n = {n}, k = {k}")
    if n <= k:
        return list(range(n))
    return np.linspace(0, n - 1, k).astype(int).tolist()


def draw_frames(n: int, k: int, rng: np.random.Generator) -> list[int]:
    """One frame at random out of each of k equal segments of n extracted ones, in order; all if n <= k."""
    if n <= k:
        return list(range(n))
    edges = np.arange(k + 1) * n // k  # segment j is edges[j], ..., edges[j + 1] - 1
    return rng.integers(edges[:-1], edges[1:]).tolist()


# ---- the frame folder ----


def frame_path(frames_dir: str | Path, video: str, index: int) -> Path:
    """Where frame number `index` of a video lies."""
    return Path(frame_paths(frames_dir, video, [index])[0])


def frame_paths(frames_dir: str | Path, video: str, indices: Sequence[int]) -> list[str]:
    """Where these frames of a video lie; plain strings, for there are a hundred thousand of them in a corpus."""
    folder = os.path.join(frames_dir, video)
    return [f"{folder}{os.sep}{index:05d}.jpg" for index in indices]


def is_frame(name: str) -> bool:
    """Whether a file of this name is a frame: NNNNN.jpg. File managers leave others (Thumbs.db, .DS_Store)."""
    return FRAME_NAME.fullmatch(name) is not None


def load_frame_index(frames_dir: str | Path) -> dict[str, list[float]]:
    """Video id -> time in seconds of each of its frames, from the folder's index file; InputError names the line."""
    path = Path(frames_dir) / INDEX_NAME
    if not path.exists():
        raise InputError(
            f"{path} is missing: make the frames with scripts/extract_frames.py --videos DIR --out {frames_dir}"
        )
    times: dict[str, list[float]] = {}
    for number, entry in read_json_lines(path, advice=COMPLETE):
        if not has_frames(entry):
            raise InputError(f'{path}:{number}: no {{"video": id, "times": [rising seconds, ...]}}; {COMPLETE}')
        if entry["video"] in times:
            raise InputError(f"{path}:{number}: {entry['video']!r} stands there twice; {COMPLETE}")
        times[entry["video"]] = [float(time) for time in entry["times"]]
    return times


def has_frames(entry: dict) -> bool:
    """Whether a line of the index file has what every reader needs: a video's id and the rising times of its frames."""
    video, times = entry.get("video"), entry.get("times")
    return (isinstance(video, str) and video != "" and isinstance(times, list) and len(times) > 0
            and all(type(time) in (int, float) for time in times) and times == sorted(times))


def spelling_among(known: Iterable[str]) -> Callable[[str], str]:
    """video -> a part of a sentence: how an id that is none of the `known` is spelt among them, or nothing.

    A spreadsheet makes 7010.0 of 7010 and 1 of 01, macOS writes an accented letter as two, lists name files with their
    extension. Such ids are named and not joined: those of two videos may differ in no more.
    """

    def plain(video: str) -> str:
        video = unicodedata.normalize("NFKC", video).casefold().strip()
        return re.sub(r"(?<=.)\.(0+|mp4|m4v|mkv|mov|avi|webm)$", "", video).lstrip("0")

    spellings = {plain(video): video for video in known}

    def spelling(video: str) -> str:
        other = spellings.get(plain(video))
        if other in (None, video):
            return ""
        return f" (but for {ascii(other)}: here it is {ascii(video)}, make them alike)"

    return spelling


def read_list(paths: Sequence[str | Path]) -> set[str]:
    """The video ids of JSON lines files such as test.jsonl, {"video": id, ...} a line."""
    videos = set()
    for path in paths:
        for number, entry in read_json_lines(path):
            if not isinstance(entry.get("video"), str) or not entry["video"]:
                raise InputError(f'{path}:{number}: no "video"; a line is {{"video": id, ...}}')
            videos.add(entry["video"])
    return videos


# ---- reading jpgs ----


def check_jpg(path: str | Path) -> bytes:
    """Raise an InputError naming the file unless a whole jpg is there -> what tells its picture from another.

    That is its size and the first and last 4 KB, of which a disk gives no less anyway: a picture that is changed in
    the middle alone has another length, or other bits from there on. Damage shows when the frame is read.
    """
    try:
        with open(path, "rb", buffering=0) as f:
            head = f.read(4096)
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 4096))
            tail = f.read(4096)
    except OSError as e:
        raise InputError(f"frame {path} cannot be read ({e.strerror}): run extract_frames again") from e
    if head[:2] != b"\xff\xd8":
        raise InputError(
            f"frame {path} is {'no jpg' if head else 'empty'}: delete its folder and run extract_frames again"
        )
    if tail[-2:] != b"\xff\xd9":  # some writers pad behind the end marker
        _open_picture(path)
    return b"%d " % size + head + tail


def read_frames(paths: Sequence[str | Path], picture: Picture) -> "torch.Tensor":
    """Decode frames and resize them as `picture` says -> uint8 RGB (K, 3, size, size); mean and std are not applied.

    The bytes equal those that open_clip's transform has before it makes floats of them, bit for bit; after the towers'
    normalisation the floats differ from open_clip's by less than 1e-6, for it divides by 255 first. What costs is
    decoding, and twice as much the resizing: frames stored with `size` as their shorter side are not resized.
    Other pictures are taken too: upright as their EXIF says, over white where they are transparent. InputError names a
    file that is unreadable, truncated or larger than 178 million pixels.
    """
    import torch

    pixels = np.empty((len(paths), 3, picture.size, picture.size), dtype=np.uint8)
    for i, path in enumerate(paths):
        square = _square(_open_picture(path), picture)
        if square.mode == "RGBA":
            square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
        pixels[i] = np.asarray(square).transpose(2, 0, 1)
    return torch.from_numpy(pixels)  # (K, 3, size, size)


def _open_picture(path: str | Path) -> Image.Image:
    """The decoded picture, upright, in RGB or RGBA; InputError naming the file if it does not decode to its end."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            turn = TURNS.get(picture.getexif().get(ORIENTATION)) if "exif" in picture.info else None
            if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
            transparent = "A" in picture.getbands() or "transparency" in picture.info
            mode = "RGBA" if transparent else "RGB"
            picture = picture if picture.mode == mode else picture.convert(mode)
            return picture if turn is None else picture.transpose(turn)
    except PICTURE_ERRORS as e:
        raise InputError(f"frame {path} cannot be decoded ({e}): delete its folder and run extract_frames again") from e


def _square(image: Image.Image, picture: Picture) -> Image.Image:
    """open_clip's resize and crop, with torchvision's rounding: the long side cut to an integer, the margin rounded."""
    size, how = picture.size, Image.Resampling[picture.interpolation.upper()]
    if picture.resize == "squash":
        return image if image.size == (size, size) else image.resize((size, size), how)
    width, height = image.size
    short = min(width, height)
    if max(width, height) > LONGEST * short:  # resized in whole, a line of pixels would fill the memory
        width, height = min(width, LONGEST * short), min(height, LONGEST * short)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), how)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))

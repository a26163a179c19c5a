"""A decoded video frame -> the picture that a viewer sees, as sRGB bytes: colours, what is hidden, which side is up.

Here: pixels of one frame. Not here: which frame and when (videos.py, decoding.py), jpgs and other pictures
(frames.py).

Shapes: H, W height and width of a picture.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from narvid import InputError
from narvid.data.decoding import pixel_ratio

# FFmpeg's numbers.
BT601, LIMITED = 6, 1  # the colours that every reader assumes where a file names none
BT709, BT2020, DCI_P3, DISPLAY_P3 = 1, 9, 11, 12  # of matrices (the first two) and of primaries
PQ, HLG = 16, 18  # transfers of HDR
READABLE = {0, 1, 2, 3, 4, 5, 6, 7, 9}  # matrices that FFmpeg's scaler knows; 0, 2 and 3 name none
LIKE_BT2020 = {10, 13, 14, 15}  # its constant-luminance form, ICtCp, IPT: made for its primaries
WHITE_NITS = 203  # HDR's white of paper, which becomes SDR's white (ITU-R BT.2408)
TO_BT709 = {  # linear light, from the primaries
    BT2020: [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    DISPLAY_P3: [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]],
}
TO_BT709[DCI_P3] = TO_BT709[DISPLAY_P3]
KNEE = 0.85  # of SDR's white: what is brighter is pressed together, so that HDR's lights keep their colour


def pictures(
    path: str | Path, shown: Iterable[tuple], short_side: int | None, notes: list[str], *, yuv: bool = False
) -> Iterator[tuple]:
    """(x, decoded frame) -> (x, array): sRGB as the frame's tags say, over white, shrunk, upright.

    RGB (H, W, 3), uint8; with yuv (3, H, W) in BT.601 of limited range, its sides in even numbers, ready for 4:2:0
    video. Not by way of RGB: FFmpeg rounds down on the way back, and a compressed video would be darker.
    Pixels that are not square are made so, by the width. `notes` receives what had to be guessed. InputError names a
    file whose pixels cannot be converted.
    """
    ratio = pixel_ratio(path, notes)
    reformatter = VideoReformatter()  # one a video: it keeps its tables from frame to frame
    step, sides = (2, (1, 2)) if yuv else (1, (0, 1))
    for x, frame in shown:
        shown_sides = frame.width * ratio, frame.height
        scale = min(1.0, (short_side or math.inf) / min(shown_sides))
        width, height = (max(1, round(side * scale / step)) * step for side in shown_sides)
        try:
            _name_matrix(frame, notes)
            pixels = _hard(reformatter, frame, width, height)
            if pixels is None:
                pixels = _converted(reformatter, frame, "yuv444p" if yuv else "rgb24", width, height)
            elif yuv:
                pixels = _yuv(pixels)
        except (av.FFmpegError, ValueError) as e:
            raise InputError(f"{path}: pixel format {frame.format.name} cannot be converted ({e})") from e
        yield x, _upright(pixels, frame, sides)


def _converted(reformatter, frame, format, width, height):
    """FFmpeg's scaler: (H, W, C), or (3, H, W) of yuv444p, which is in the colours above."""
    yuv = format == "yuv444p"
    return reformatter.reformat(
        frame,
        width=width,
        height=height,
        format=format,
        interpolation="BICUBIC",
        src_color_range=frame.color_range,
        dst_color_range=ColorRange.MPEG if yuv else ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU601,  # that of yuv; RGB has none
        threads=1,
    ).to_ndarray()


def _name_matrix(frame, notes):
    """Give a frame whose colour matrix FFmpeg's scaler does not know the nearest one that it does."""
    matrix = int(frame.colorspace)
    if matrix in READABLE:
        return
    nearest = BT2020 if matrix in LIKE_BT2020 or frame.color_primaries == BT2020 else BT709
    frame.colorspace = nearest
    note = f"colour matrix {matrix} cannot be read, BT.{2020 if nearest == BT2020 else 709} is taken"
    if note not in notes:
        notes.append(note)


# ---- what FFmpeg's scaler does not do ----


def _hard(reformatter, frame, width, height):
    """RGB (H, W, 3), uint8, of a frame with transparency or with colours beyond SDR's; None for any other."""
    wide = frame.color_trc in (PQ, HLG) or frame.color_primaries in TO_BT709
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    if not alpha:
        return _srgb(_converted(reformatter, frame, "rgb48le", width, height), frame) if wide else None
    # Hidden colours must not be blurred into the visible ones: first the white behind, then the size.
    rgba = VideoReformatter()
    pixels = _converted(rgba, frame, "rgba64le" if wide else "rgba", frame.width, frame.height)
    opacity = pixels[..., 3:] / np.float32(np.iinfo(pixels.dtype).max)
    if opacity.min() == 1 and not wide:
        return None
    rgb = _srgb(pixels[..., :3], frame) if wide else pixels[..., :3]
    over = av.VideoFrame.from_ndarray(np.rint(rgb * opacity + 255 * (1 - opacity)).astype(np.uint8), format="rgb24")
    over.color_range = ColorRange.JPEG
    return _converted(rgba, over, "rgb24", width, height)


def _srgb(pixels, frame):
    """Coded RGB (H, W, 3), uint16, of HDR or of wide primaries -> sRGB, uint8; brighter than paper is pressed together.

    FFmpeg's filter does the same, after four seconds of making its table for each video.
    """
    light = _light(int(frame.color_trc))[pixels]  # 1: SDR's white
    if frame.color_trc == HLG:  # its light is the scene's: a display of 1,000 nits shows it brighter and steeper
        luminance = light @ np.float32([0.2627, 0.6780, 0.0593])
        light *= 1000 / WHITE_NITS * luminance[..., None] ** 0.2
    # HDR without primaries is BT.2020's
    matrix = TO_BT709.get(int(frame.color_primaries), TO_BT709[BT2020] if frame.color_primaries == 2 else np.eye(3))
    light = np.maximum(light @ np.float32(matrix).T, 0)
    brightest = light.max(axis=2, keepdims=True)
    pressed = KNEE + (1 - KNEE) * (1 - np.exp((KNEE - brightest) / (1 - KNEE)))
    if frame.color_trc in (PQ, HLG):
        light *= np.where(brightest > KNEE, pressed / np.maximum(brightest, KNEE), 1)
    light = np.minimum(light, 1)
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * coded).astype(np.uint8)


@lru_cache(maxsize=4)
def _light(transfer):
    """The linear light (65536,) of each 16-bit code: PQ's on a display, HLG's of the scene, else by sRGB's curve."""
    code = np.arange(65536) / 65535
    if transfer == PQ:
        root = code ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        return np.float32(light * 10000 / WHITE_NITS)
    if transfer == HLG:
        bright = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.float32(np.where(code <= 0.5, code**2 / 3, bright))
    return np.float32(np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4))


def _yuv(pixels):
    """RGB (H, W, 3) -> (3, H, W) in BT.601 of limited range."""
    matrix = [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]
    planes = np.tensordot(np.float32(matrix) / 255, pixels, axes=(1, 2))  # (3, H, W)
    return np.rint(planes + np.float32([16, 128, 128])[:, None, None]).astype(np.uint8)


# ---- which side is up ----


def _upright(pixels, frame, sides):
    """Mirrored and turned as the frame's display matrix says, to the nearest quarter turn; sides: the axes H and W."""
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # Column vectors: (x, y) of the file is shown at (a x + c y, b x + d y), y counted downwards.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # x becomes y
        pixels, a, d = np.swapaxes(pixels, *sides), c, b
    flipped = [side for side, sign in zip(sides, (d, a)) if sign < 0]
    return np.ascontiguousarray(np.flip(pixels, flipped))

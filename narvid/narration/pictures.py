"""Which pictures a captioner is asked about: nearly alike neighbours share a sentence, different ones must not.

Not here: models and servers (captioners.py, chat_server.py), the run over a frame folder (narrate.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from narvid import InputError
from narvid.data.frames import PICTURE_ERRORS
from narvid.narration.answers import Failed, is_refusal
from narvid.narration.captioners import Captioner

SAME_FRAME = 5.0  # grey levels: neighbours in 15 MSR-VTT clips differ by 0 or 1 (stills), once by 6, else by 14 or more

# ---- near-identical frames ----


def distinct_frames(paths: Sequence[str | Path], threshold: float) -> list[int]:
    """For each frame of a video, in time order, the index of the frame whose sentence it gets; its own where captioned.

    A frame is captioned if it differs by `threshold` or more (`distance`) from the last captioned one, not from its
    neighbour, so that slow drift adds up. 0 captions every frame and reads none.
    """
    if threshold <= 0:
        return list(range(len(paths)))
    captioned, last = [], None
    for index, path in enumerate(paths):
        seen = thumbnail(path)
        if last is None or distance(seen, last) >= threshold:
            last, leader = seen, index
        captioned.append(leader)
    return captioned


def thumbnail(path: str | Path) -> np.ndarray:
    """The picture in 16 x 16 grey cells, int16 (16, 16) of 0..255; decodes the jpg at an eighth of its size or more."""
    try:
        with Image.open(path) as picture:
            picture.draft("L", (32, 32))
            small = picture.convert("L").resize((16, 16), Image.Resampling.BOX)
    except PICTURE_ERRORS as error:
        raise InputError(
            f"frame {path} cannot be decoded ({error}): delete its folder and run extract_frames again"
        ) from error
    return np.asarray(small, dtype=np.int16)


def size_of(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header; InputError where it has none."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except PICTURE_ERRORS as error:
        raise InputError(
            f"frame {path} cannot be decoded ({error}): delete its folder and run extract_frames again"
        ) from error


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two thumbnails' cells, 0..255.

    Not the mean: a small thing that moves before a still background is what a video is about, and changes few cells.
    """
    return float(np.abs(a - b).max())


# ---- does the picture reach the model? ----


def made_pictures() -> tuple[bytes, bytes]:
    """Two jpgs that nobody would describe alike: a red disc on white, white stripes on blue."""
    disc, stripes = Image.new("RGB", (336, 336), "white"), Image.new("RGB", (336, 336), (20, 40, 160))
    ImageDraw.Draw(disc).ellipse((60, 60, 276, 276), fill=(220, 20, 20))
    for left in range(0, 336, 56):
        ImageDraw.Draw(stripes).rectangle((left, 0, left + 20, 336), fill="white")
    files = BytesIO(), BytesIO()
    for picture, file in zip((disc, stripes), files, strict=True):
        picture.save(file, "JPEG", quality=95)
    return files[0].getvalue(), files[1].getvalue()


def check_sees(captioner: Captioner, pairs: Iterable[Sequence[bytes]]) -> list[str]:
    """The answers to the first pair of different pictures that differ; InputError where those of every pair are alike.

    A prompt without the image token, a template that drops the picture and a text-only model all give fluent sentences
    about nothing. Decoding is greedy here, so that only the picture can make a difference. A picture that is refused or
    gets half a thought says nothing of the next pair's; InputError where no pair gets sentences, and at once where the
    request itself fails. Where a model does nothing but apologise, its apologies are returned: they are counted later.
    """
    alike = refused = why = None
    for pair in pairs:
        answers = captioner.caption(pair)
        why = next((answer.why for answer in answers if isinstance(answer, Failed)), None)
        if any(isinstance(answer, Failed) and answer.kind == "failed" for answer in answers):
            break
        if why is None and any(map(is_refusal, answers)):
            refused = answers
        elif why is None and answers[0] != answers[1]:
            return answers
        elif why is None:
            alike = answers[0]
    if why is None and alike is not None:
        raise InputError(
            f"{captioner.label}: two different pictures get the same sentence, {alike[:80]!r}: the picture does not "
            "reach the model; its prompt lacks the image token, its chat template drops images, or it is a text-only "
            "model"
        )
    if why is None and refused:
        return refused
    raise InputError(f"{captioner.label}: no sentence for a first picture ({why})")

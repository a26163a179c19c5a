"""A query made of parts: texts, pictures, clips and windows of this index, each with a sign and a weight.

  "a dog on a beach" - "people" + 0.5*picture.jpg          in one piece: page, API, a line of --queries, one argument
  "a dog on a beach" - people + 0.5*picture.jpg            on the command line, every part and sign an argument

A part is a text in quotes, a file, or picture:NAME, clip:NAME, window:NUMBER, with its weight, 0.5* (or 0.5:, as rclip
writes it), before it. In one piece the first part is in quotes or has such a name; whatever begins otherwise is a
sentence, be there a sign in it or not.
Here: the way from text to parts and back. Not here: reading the files (who has them), what a part scores (engine.py).
This file must not import torch: a query that a running server answers does without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from narvid import InputError
from narvid.data.videos import SUFFIXES

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MOST = 16  # parts of a query
HEAVIEST = 1000.0
_WEIGHT = re.compile(r"(nan|inf|[0-9.]+(?:e[+-]?[0-9]+)?)[*:]", re.IGNORECASE)
_QUOTED = re.compile(r'["“„]((?:\\.|[^"”“\\])*)["”“]', re.DOTALL)  # the curved ones: what phones write
_NAMED = re.compile(r"(picture|clip|window):")
_SIGN = re.compile(r'\s*([+-])(?=\s|["“„]|$)')
_FIRST = re.compile(rf"\s*(?:[+-]\s+)?(?:{_WEIGHT.pattern})?")


class Part(NamedTuple):
    """weight: with its sign. kind: "text", "picture", "clip" or "window". value: the text, a file or what a server
    calls one that was sent, a number; for the engine what it has made of a picture or a clip.
    """

    weight: float
    kind: str
    value: Any


def sentence(text: str) -> list[Part]:
    """The query that is this one text, whatever it holds."""
    return [Part(1.0, "text", text)]


def parse(text: str, more: str = "") -> list[Part]:
    """A query in one piece -> its parts as written; `more`: parts that are added. InputError points at a mistake."""
    parts = [] if more and not text.strip() else _parts(text) if is_expression(text) else sentence(text)
    return checked(parts + (_parts(more) if more else []))


def parse_arguments(arguments: Sequence[str]) -> list[Part]:
    """A query as a command line has it -> its parts as written.

    More than one argument: lone + and - between the parts, and a text needs no quotes of its own.
    """
    if len(arguments) == 1:
        return parse(arguments[0])
    if not {"+", "-"} & set(arguments):
        raise InputError(f'the query is {len(arguments)} arguments: put the sentence into quotes, "{arguments[0]} '
                         '..."; or put a lone + or - between the parts of a query')
    arguments = [*([] if arguments[0] in ("+", "-") else ["+"]), *arguments]
    for n, argument in enumerate(arguments):
        if n % 2 == 0 and argument not in ("+", "-"):
            raise InputError(f"the query, at {argument!r}: a lone + or - must stand before it")
        if argument in ("+", "-") and (n % 2 == 1 or n + 1 == len(arguments)):
            raise InputError(f"the query, at {' '.join(arguments[:n + 1])!r}: a part is missing, a text, a picture "
                             "or a clip")
    return checked([_argument(sign, text) for sign, text in zip(arguments[::2], arguments[1::2])])


def is_expression(text: str) -> bool:
    """Whether a query in one piece is parts: it begins with one that is in quotes or named, a sign or nothing behind.

    One whose quotation mark is not closed, or where a sign was forgotten, is taken for one, too, and its mistake named.
    """
    start = _FIRST.match(text).end()
    named = _NAMED.match(text, start)
    if quoted := _QUOTED.match(text, named.end() if named else start):
        end = quoted.end()
    elif named and (bare := re.compile(r"[^\s\"“„]+").match(text, named.end())):
        end = bare.end()
    else:
        return text[start:start + 1] in ('"', "“", "„")
    behind = text[end:].lstrip()
    return not behind or bool(_SIGN.match(text, end) or _WEIGHT.match(behind)) or behind[0] in '"“„'


def checked(parts: list[Part]) -> list[Part]:
    """The same; InputError where they are too many, or none says what to look for."""
    if len(parts) > MOST:
        raise InputError(f"the query has {len(parts)} parts; at most {MOST} are taken")
    if not any(part.weight > 0 for part in parts):
        raise InputError("every part of the query has a minus: say also what to look for")
    return parts


def scaled(parts: Sequence[Part]) -> list[Part]:
    """Weights whose positive ones have the sum 1: scores stay as high as those of a single text."""
    total = sum(part.weight for part in parts if part.weight > 0)
    return [part._replace(weight=part.weight / total) for part in parts]


def written(parts: Sequence[Part]) -> str:
    """What `parse` reads as these parts; a single text as the sentence it is, where that reads so."""
    if len(parts) == 1 and parts[0].kind == "text" and not is_expression(parts[0].value):
        return parts[0].value
    words = [f"{'-' if part.weight < 0 else '+'} {'' if abs(part.weight) == 1 else f'{abs(part.weight):.9g}*'}"
             f"{_value(part)}" for part in parts]
    return " ".join(words).removeprefix("+ ")


def name(part: Part) -> str:
    """How an explanation calls a part."""
    return f'"{part.value}"' if part.kind == "text" else f"the {part.kind}"


# ---- inside ----


def _parts(text: str) -> list[Part]:
    """The parts as they are written."""
    parts, at, sign = [], 0, None
    if first := _SIGN.match(text):
        sign, at = first[1], first.end()
    while True:
        at += len(text[at:]) - len(text[at:].lstrip())
        weight, at = _weight_at(text, at, sign or "+")
        kind, value, at = _operand_at(text, at)
        parts.append(Part(weight, kind, value))
        if not text[at:].strip():
            return parts
        following = _SIGN.match(text, at)
        if not following:
            at += len(text[at:]) - len(text[at:].lstrip())
            _mistake(text, at, "a + or - must stand before it")
        sign, at = following[1], following.end()


def _weight_at(text: str, at: int, sign: str) -> tuple[float, int]:
    """The signed weight that stands here, 1 where none does, and where it ends."""
    found = _WEIGHT.match(text, at)
    if not found:
        return (-1.0 if sign == "-" else 1.0), at
    try:
        weight = float(found[1])
    except ValueError:
        weight = 0.0
    if not 1 / HEAVIEST <= weight <= HEAVIEST:  # not so of nan
        _mistake(text, at, f"{found[1]} is no weight: it is a number from {1 / HEAVIEST:g} to {HEAVIEST:g}")
    return (-weight if sign == "-" else weight), found.end()


def _operand_at(text: str, at: int) -> tuple[str, str | int, int]:
    """(kind, value, where it ends) of what stands here: a text in quotes, a named thing, a file."""
    named = _NAMED.match(text, at)
    begin = named.end() if named else at
    if text[begin:begin + 1] in ('"', "“", "„"):
        quoted = _QUOTED.match(text, begin)
        if not quoted:
            _mistake(text, begin, "this quotation mark is not closed")
        value, end = re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL), quoted.end()
    else:
        bare = re.compile(r"\S*").match(text, begin)
        value, end = bare[0], bare.end()
        if value in ("", "+", "-"):
            _mistake(text, at, "a part is missing, a text in quotes, a picture or a clip")
        if not named and _kind_of_file(value) is None:
            _mistake(text, at, f"put a text into quotes; a file ends in {' '.join(PICTURES)} or as a video does")
    kind = named[1] if named else "text" if text[at] in '"“„' else _kind_of_file(value)
    value = value.strip()
    if not value:
        _mistake(text, at, "this part is empty")
    if kind == "window":
        if not re.fullmatch(r"[0-9]{1,18}", value):
            _mistake(text, at, "a window is a number, that of an answer")
        return kind, int(value), end
    return kind, value, end


def _argument(sign: str, text: str) -> Part:
    """A part that is an argument of its own: what names no file is a text."""
    weight, at = _weight_at(text, 0, sign)
    if not text[at:].strip():
        _mistake(text, at, "this part is empty")
    if _NAMED.match(text, at) or text[at:at + 1] in ('"', "“", "„"):
        kind, value, end = _operand_at(text, at)
        if text[end:].strip():
            _mistake(text, end, "give every part as an argument of its own, or all of them as one in quotes")
        return Part(weight, kind, value)
    return Part(weight, _kind_of_file(text[at:]) or "text", text[at:].strip())


def _kind_of_file(name: str) -> str | None:
    suffix = Path(name).suffix.lower()
    return "picture" if suffix in PICTURES else "clip" if suffix in SUFFIXES else None


def _value(part: Part) -> str:
    value = str(part.value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{value}"' if part.kind == "text" else f"{part.kind}:{value}" if re.fullmatch(
        r"\w+", value) else f'{part.kind}:"{value}"'


def _mistake(text: str, at: int, what: str) -> NoReturn:
    rest = text[at:at + 30] + ("..." if len(text) > at + 30 else "")
    where = f"at character {at + 1}, {rest}" if rest.strip() else "at its end"
    raise InputError(f"the query, {where}: {what}")

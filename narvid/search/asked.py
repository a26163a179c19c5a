"""What a request may say, checked: parameters, numbers, bodies. A mistake is named, with the status code that fits.

Not here: who may ask (guard.py), what is answered (site.py, watching.py).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

MAX_QUERY = 2000  # characters; CLIP reads 77 tokens
MAX_TOP = 100
MAX_SKIP = 10_000
MAX_PICTURE = 20_000_000  # bytes
MAX_CLIP = 200_000_000
BODY_SECONDS = 60.0  # that a picture may take to arrive
CLIP_SECONDS = 300.0
NUMBERS = {  # of all filters: the value where none is given
    "min_seconds": 0.0, "max_seconds": math.inf, "since": -math.inf, "until": math.inf}
FILTERS = ("top", "skip", "folder", "moments", "has_speech", *NUMBERS)


def parameters(request: Request, *known: str) -> dict[str, str]:
    """The parameters of a request; an unknown or repeated one is named."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            raise HTTPException(400, f"there is no parameter {name[:40]!r}; {', '.join(known)} are known")
        if names.count(name) > 1:
            raise HTTPException(400, f"{name} is given {names.count(name)} times; give it once")
    return dict(request.query_params)


def filters(request: Request, *own: str) -> dict:
    """The parameters that every search takes, checked; `own`: those beside them."""
    values = parameters(request, *own, *FILTERS)
    limits = {"top": (1, MAX_TOP, 10), "skip": (0, MAX_SKIP, 0), "moments": (0, 1, 0), "has_speech": (0, 1, 0)}
    whole = {}
    for name, (least, most, usual) in limits.items():
        whole[name] = whole_number(values.get(name, str(usual)))
        if whole[name] is None or not least <= whole[name] <= most:
            wanted = f"a whole number from {least} to {most}"
            raise HTTPException(400, f"{name} is {values[name][:40]!r}; it must be {wanted}")
    numbers = {name: number(values, name, usual) for name, usual in NUMBERS.items()}
    return {"top": whole["top"], "skip": whole["skip"], "one_a_file": not whole["moments"],
            "has_speech": bool(whole["has_speech"]), "folder": values.get("folder", "").strip("/"), **numbers}


def number(values: dict[str, str], name: str, usual: float | None = None) -> float:
    """A number of seconds, 0 or more; `usual` where it is not given."""
    if name not in values and usual is not None:
        return usual
    try:
        found = float(values[name])
    except ValueError:
        found = math.nan
    except KeyError:
        raise HTTPException(400, f"{name} is missing: it is a number of seconds") from None
    if not 0 <= found < math.inf:
        raise HTTPException(400, f"{name} is {values[name][:40]!r}; it must be a number of seconds, 0 or more")
    return found


def whole_number(text: str) -> int | None:
    """A whole number that SQLite can hold, or None."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def number_of(request: Request, name: str) -> int:
    """The number of a file or a frame in the path."""
    found = whole_number(request.path_params[name])
    if found is None:
        raise HTTPException(404, f"{request.path_params[name][:40]!r} is no number of a {name}")
    return found


async def body_of(request: Request) -> bytes:
    """The picture that is a request's body."""
    body = bytearray()
    await read_body(request, body.extend, MAX_PICTURE, BODY_SECONDS, "picture")
    return bytes(body)


async def read_body(request: Request, take: Callable[[bytes], object], most: int, seconds: float, what: str) -> None:
    """Hand a request's body to `take`, no more than `most` bytes, and no longer than so many seconds."""
    async def read() -> int:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise HTTPException(413, f"the {what} is larger than {most / 1e6:g} MB; send a smaller one")
            take(chunk)
        return size

    try:
        size = await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the {what} did not arrive within {seconds:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, f"the {what} did not arrive whole") from None
    if not size:
        raise HTTPException(400, f"no {what} was sent: its bytes are the request's body")

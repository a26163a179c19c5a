"""What the page and other programs ask of an index: answers, pictures of frames, what there is (JSON over HTTP).

Here: /api/..., /frame/.... page/openapi.json says what each takes and gives; a mistake is answered by
{"error": sentence} and the status code that fits. Not here: clips (watching.py), parameters (asked.py), who may ask
(guard.py), how answers are found (engine.py), what is stored (store.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from narvid import InputError
from narvid.data.frames import FORMATS
from narvid.search.answers import as_dict, date_of
from narvid.search.asked import (CLIP_SECONDS, MAX_CLIP, MAX_QUERY, body_of, filters, number_of, parameters, read_body,
                                 whole_number)
from narvid.search.engine import Abandoned, Engine
from narvid.search.folders import folders_of
from narvid.search.parts import Part, parse, written
from narvid.search.reading import first_window, read_all
from narvid.search.store import Store

MAX_LISTED = 1000  # folders and unreadable files that the page gets to know of
KEPT = 64  # pictures and clips that were sent wait to be asked for again, the last ones
NAME = 24  # letters of their names
WALL = 36  # windows of the start page
LOOK_EVERY = 0.1  # seconds between two looks whether anybody still waits


class Sent(NamedTuple):
    """A picture or a clip that was sent: what the engine made of it, and a small picture of it (WebP)."""

    kind: str
    value: object
    small: bytes


class Json(JSONResponse):
    """In ASCII: file names may hold what UTF-8 cannot."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Site:
    """The endpoints. Searches run in one thread, for the engine is not made for more; clips and frames go on meanwhile.

    Threads are kept, since each has a connection of its own to the index.
    """

    def __init__(self, store: Store, engine: Engine):
        self.store, self.engine = store, engine
        self.reading, self.searching = ThreadPoolExecutor(4), ThreadPoolExecutor(1)
        self.sent: OrderedDict[str, Sent] = OrderedDict()
        self.receiving = asyncio.Semaphore(2)

    async def read(self, function: Callable, *args):
        """function(*args) in a thread that reads."""
        return await asyncio.get_running_loop().run_in_executor(self.reading, function, *args)

    async def about(self, request: Request) -> Response:
        parameters(request)
        return Json(await self.read(about, self.store, self.engine.embedder.frames_alone))

    async def wall(self, request: Request) -> Response:
        parameters(request)
        return Json({"windows": await self.read(wall, self.store)})

    async def search(self, request: Request) -> Response:
        """Answers to a sentence, or to a query of parts, pictures and clips among them that were sent before."""
        how = filters(request, "q", "parts")
        query, more = (request.query_params.get(name, "").strip() for name in ("q", "parts"))
        if not query and not more:
            raise HTTPException(400, "q is missing: the sentence to search for")
        for name, text in ("q", query), ("parts", more):
            if len(text) > MAX_QUERY:
                raise HTTPException(400, f"{name} is too long: {len(text)} characters, at most {MAX_QUERY} are taken")
        try:
            parts = parse(query, more)
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        head = {"query": written(parts)}
        if len(parts) > 1 or parts[0].kind != "text":
            head["parts"] = [{**part._asdict(), **await self._window_named(part)} for part in parts]
        ready = [part._replace(value=self._sent(part).value) if part.kind in ("picture", "clip") else part
                 for part in parts]
        return await self._answer(request, lambda **same: self.engine.search([ready], **same)[0], how, head)

    async def _window_named(self, part: Part) -> dict:
        """Of a part that is a window what a page shows of it."""
        return await self._named(part.value) if part.kind == "window" else {}

    async def _named(self, window: int) -> dict:
        try:
            [itself] = await self.read(self.store.windows, [window])
        except KeyError:
            raise HTTPException(404, f"the index has no window {window} (any more)") from None
        return {"window": window, "file": itself.file, "path": itself.path, "start": itself.start, "end": itself.end,
                "frame": itself.picks[len(itself.picks) // 2], "frames": itself.picks}

    def _sent(self, part: Part) -> Sent:
        """What was sent under this name."""
        found = self.sent.get(part.value)
        if found is None or found.kind != part.kind:
            if re.fullmatch(r"[0-9a-f]+", part.value):
                raise HTTPException(404, f"this {part.kind} is no longer here; choose it again")
            raise HTTPException(404, f"{part.kind} {part.value[:80]!r} was not sent: send the file first, the answer "
                                "names it")
        self.sent.move_to_end(part.value)
        return found

    def _keep(self, name: str, sent: Sent) -> None:
        self.sent[name] = sent
        self.sent.move_to_end(name)
        while len(self.sent) > KEPT:
            self.sent.popitem(last=False)

    async def like(self, request: Request) -> Response:
        how = filters(request, "window")
        window = whole_number(request.query_params.get("window", ""))
        if window is None:
            raise HTTPException(400, "window is missing, or no number: that of an answer")
        named = await self._named(window)
        return await self._answer(request, partial(self.engine.like_window, window), how, {"like": named})

    async def picture(self, request: Request) -> Response:
        """A picture that is sent, or one that was sent before."""
        how = filters(request, "picture")
        if request.method == "POST":
            data = await body_of(request)
            name = hashlib.sha256(data).hexdigest()[:NAME]
            return await self._see(request, how, "picture", name, partial(self.engine.see_picture, data), data)
        name = request.query_params.get("picture", "")
        part = Part(1.0, "picture", self._sent(Part(1.0, "picture", name)).value)
        return await self._answer(request, lambda **same: self.engine.search([[part]], **same)[0], how,
                                  {"picture": name})

    async def query_clip(self, request: Request) -> Response:
        """A video that is sent; of it the first window is looked at. It is read by a process of its own, as files are
        when they are indexed: one on which the decoder dies costs that process.
        """
        how = filters(request)
        async with self.receiving:  # few at a time: they lie on the disk while they arrive
            with tempfile.NamedTemporaryFile(prefix="narvid_", suffix=".clip") as file:
                digest = hashlib.sha256()

                def take(chunk: bytes) -> None:
                    digest.update(chunk)
                    file.write(chunk)

                try:
                    await read_body(request, take, MAX_CLIP, CLIP_SECONDS, "clip")
                    file.flush()
                except OSError as error:
                    raise HTTPException(507, f"the clip cannot be kept ({error.strerror})") from None
                window, fps, short_side, max_frames = self.engine.window
                look = partial(first_window, window=window, fps=fps, short_side=short_side, max_frames=max_frames)
                [jpegs] = await self.read(lambda: list(read_all([file.name], look, 1)))
        if isinstance(jpegs, InputError):
            raise HTTPException(400, str(jpegs).replace(file.name, "the clip"))
        see = partial(self.engine.see_frames, jpegs)
        return await self._see(request, how, "clip", digest.hexdigest()[:NAME], see, jpegs[len(jpegs) // 2])

    async def _see(self, request: Request, how: dict, kind: str, name: str, see: Callable, picture: bytes) -> Response:
        """Answers to what was sent, which is kept for later queries; see(): its features."""
        def search(**same):
            value = see()
            self._keep(name, Sent(kind, value, _small(picture)))
            return self.engine.search([[Part(1.0, kind, value)]], **same)[0]

        try:
            return await self._answer(request, search, how, {kind: name})
        except InputError as error:
            raise HTTPException(400, str(error)) from error

    async def shown_picture(self, request: Request) -> Response:
        """What was sent, small; of a clip a frame."""
        found = self.sent.get(request.path_params["picture"])
        if found is None:
            raise HTTPException(404, "this picture is no longer here")
        return Response(found.small, media_type="image/webp")

    async def frame(self, request: Request) -> Response:
        file, number = number_of(request, "file"), number_of(request, "frame")
        try:
            picture = await self.read(self.store.jpeg, file, number)
        except KeyError:
            raise HTTPException(404, f"the index has no frame {number} of file {file}") from None
        kind = "jpeg" if picture[:2] == b"\xff\xd8" else "webp"  # the former in indexes of version 1
        return Response(picture, media_type=f"image/{kind}", headers={"cache-control": "private, max-age=600"})

    async def _answer(self, request: Request, search: Callable, how: dict, head: dict) -> Response:
        """Search in the one thread that does; where nobody waits any more the search ends, begun or not."""
        gone = threading.Event()

        def run() -> dict:
            if gone.is_set():
                raise Abandoned
            start = time.perf_counter()
            try:
                answers = search(**how, wanted=lambda: not gone.is_set())
                found = [as_dict(answer, self.store.file(answer.file)) for answer in answers]
            except KeyError:
                raise HTTPException(503, "the index has just changed; search again") from None
            return {**head, "answers": found, "total": answers.total, "fits": answers.fits,
                    "took": round(time.perf_counter() - start, 4)}

        search_of = asyncio.get_running_loop().run_in_executor(self.searching, run)
        try:
            while not (await asyncio.wait([search_of], timeout=LOOK_EVERY))[0]:
                if await request.is_disconnected():
                    gone.set()
            return Json(await search_of)
        except Abandoned:
            return Response(status_code=499)
        finally:
            gone.set()


def about(store: Store, frames_alone: str) -> dict:
    """What the page says of the index as a whole; frames_alone: what to say where there is no narration."""
    files, settings = store.files(), store.settings
    narrated = settings["narration"] and settings["captioner"] is not None
    read = [file for file in files if not file.why]
    failed = [{"path": file.path, "why": file.why} for file in files if file.why]
    unheard = [{"path": file.path, "why": file.speech_note} for file in files if file.speech_note]
    folders = {parent.as_posix() for file in read for parent in Path(file.path).parents} - {"."}
    return {
        "videos": " and ".join(folder.name for folder in folders_of(settings).values()),
        "files": len(read),
        "windows": store.count(),
        "seconds": sum(file.seconds for file in read),
        "folders": sorted(folders)[:MAX_LISTED],
        "failed": failed[:MAX_LISTED],
        "failures": len(failed),
        "spoken": store.speech.count()[0],
        "unheard": unheard[:MAX_LISTED],
        "method": settings["method"],
        "narrated": narrated,
        "loses": "" if narrated else frames_alone,
        "dates": [min(map(date_of, read), default=0.0), max(map(date_of, read), default=0.0)],
        "examples": examples(store) if narrated else [],
    }


def some_windows(store: Store, count: int) -> list:
    """Windows spread evenly over the index."""
    ids = store.all_windows()
    picked = ids[np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int))] if len(ids) else []
    return store.windows(list(picked))


def wall(store: Store) -> list[dict]:
    """Windows of the start page: where they are, and their frames."""
    return [{"file": w.file, "window": w.id, "path": w.path, "start": w.start, "end": w.end, "frames": w.picks}
            for w in some_windows(store, WALL)]


def examples(store: Store) -> list[str]:
    """Sentences of the index itself, short ones, to begin with."""
    found = []
    for window in some_windows(store, 12):
        sentences = [f.sentence for f in store.frames(window.file) if f.number in window.picks and f.sentence]
        found += [s.strip().rstrip(".") for s in sentences[:1] if 8 <= len(s.strip()) <= 70]
    return list(dict.fromkeys(found))[:4]


def _small(data: bytes) -> bytes:
    with Image.open(BytesIO(data), formats=FORMATS) as picture:  # the search has opened it before, through the one door
        file = BytesIO()
        picture = ImageOps.exif_transpose(picture)
        picture.thumbnail((160, 160))
        picture.convert("RGB").save(file, "WEBP", quality=60)
    return file.getvalue()

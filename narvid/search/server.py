"""The page and its JSON: an index served to a browser on this machine (Starlette, uvicorn).

  GET  /                            page.html, one file: no address but this server's is ever asked for anything
  GET  /api/about                   what is indexed, with which model, which files could not be read
  GET  /api/search?q=TEXT           answers; also top, folder, min_seconds, max_seconds
  GET  /api/like?window=ID          windows like that one; the same filters
  POST /api/picture                 the bytes of an image file; the same filters
  GET  /frame/FILE/NUMBER.jpg       a stored frame
  GET  /clip/FILE                   the video, in part where a Range is asked for; what browsers cannot play, as an mp4

A mistake is answered by {"error": sentence} and the status code that fits. No path ever comes from a request: files
are named by their ids in the index, and one that has left the videos folder, or changed since, is not served.
Not here: who may ask (guard.py), what browsers can play (clips.py), how answers are found (engine.py), what is stored
(store.py), flags (__main__.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import socket
import stat
import threading
import time
import webbrowser
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from narvid import InputError
from narvid.search import clips
from narvid.search.engine import Answer, Engine
from narvid.search.store import File, Store

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route

    from narvid.search.guard import Guard, is_loopback, names_of, policy_of
except ImportError as error:
    raise InputError(f'{error.name} is not installed, the page needs it: pip install "narvid[search]"') from error

PAGE = Path(__file__).with_name("page.html")
MAX_QUERY = 2000  # characters; CLIP reads 77 tokens
MAX_TOP = 100
MAX_PICTURE = 20_000_000  # bytes
MAX_LISTED = 1000  # folders and unreadable files that the page gets to know of
FILTERS = ("top", "folder", "min_seconds", "max_seconds")


# ---- what a request may say ----


def _filters(request: Request, *own: str) -> dict:
    """The parameters that every search takes, checked; an unknown, repeated or senseless one is named."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in own + FILTERS:
            raise HTTPException(400, f"there is no parameter {name[:40]!r}; {', '.join(own + FILTERS)} are known")
        if names.count(name) > 1:
            raise HTTPException(400, f"{name} is given {names.count(name)} times; give it once")
    values = request.query_params
    top = _whole(values.get("top", "10"))
    if top is None or not 1 <= top <= MAX_TOP:
        raise HTTPException(400, f"top is {values['top'][:40]!r}; it must be a whole number from 1 to {MAX_TOP}")
    seconds = {"min_seconds": 0.0, "max_seconds": math.inf}
    for name in seconds.keys() & set(names):
        try:
            seconds[name] = float(values[name])
        except ValueError:
            seconds[name] = math.nan
        if not 0 <= seconds[name] < math.inf:
            raise HTTPException(400, f"{name} is {values[name][:40]!r}; it must be a number of seconds, 0 or more")
    return {"top": top, "folder": values.get("folder", "").strip("/"), **seconds}


def _whole(text: str) -> int | None:
    """A whole number that SQLite can hold, or None."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _id(request: Request, name: str) -> int:
    number = _whole(request.path_params[name])
    if number is None:
        raise HTTPException(404, f"{request.path_params[name][:40]!r} is no number of a {name}")
    return number


async def _body(request: Request) -> bytes:
    """The request's body, read no further than MAX_PICTURE."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_PICTURE:
            raise HTTPException(413, f"the picture is larger than {MAX_PICTURE // 10**6} MB; send a smaller one")
    if not body:
        raise HTTPException(400, "no picture was sent: its bytes are the request's body")
    return bytes(body)


# ---- what is answered ----


class Json(JSONResponse):
    """In ASCII: file names may hold what UTF-8 cannot."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Site:
    """The endpoints. Searches run in one thread, for the engine is not made for more; clips and frames go on meanwhile.

    Threads are kept, since each has a connection of its own to the index.
    """

    def __init__(self, store: Store, engine: Engine, page: str):
        self.store, self.engine, self.page = store, engine, page
        self.clips = Path(store.path) / "clips"
        self.reading, self.searching = ThreadPoolExecutor(4), ThreadPoolExecutor(1)
        self.making = asyncio.Lock()

    async def show_page(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html")

    async def _read(self, function: Callable, *args):
        return await asyncio.get_running_loop().run_in_executor(self.reading, function, *args)

    async def about(self, request: Request) -> Response:
        return Json(await self._read(about, self.store, self.engine.embedder.frames_alone))

    async def search(self, request: Request) -> Response:
        filters, query = _filters(request, "q"), request.query_params.get("q", "").strip()
        if not query or len(query) > MAX_QUERY:
            what = "too long" if query else "missing"
            raise HTTPException(400, f"q is {what}: say in up to {MAX_QUERY} characters what to look for")
        return await self._answer(lambda: self.engine.search([query], **filters)[0], {"query": query})

    async def like(self, request: Request) -> Response:
        filters, window = _filters(request, "window"), _whole(request.query_params.get("window", ""))
        if window is None:
            raise HTTPException(400, "window is missing or no whole number; an answer says which window it is")
        try:
            [found] = await self._read(self.store.windows, [window])
        except KeyError:
            raise HTTPException(404, f"the index has no window {window} (any more); search again") from None
        head = {"like": {"path": found.path, "start": found.start, "end": found.end}}
        return await self._answer(partial(self.engine.like_window, window, **filters), head)

    async def picture(self, request: Request) -> Response:
        filters, data = _filters(request), await _body(request)
        try:
            return await self._answer(partial(self.engine.like_picture, data, **filters), {})
        except InputError as error:
            raise HTTPException(400, str(error)) from error

    async def _answer(self, search: Callable[[], list[Answer]], head: dict) -> Response:
        def run() -> dict:
            start = time.perf_counter()
            try:
                answers = [as_dict(answer, self.store.file(answer.file)) for answer in search()]
            except KeyError:
                raise HTTPException(503, "the index has just changed; search again") from None
            return {**head, "answers": answers, "took": round(time.perf_counter() - start, 4)}

        return Json(await asyncio.get_running_loop().run_in_executor(self.searching, run))

    async def frame(self, request: Request) -> Response:
        file, number = _id(request, "file"), _id(request, "frame")
        try:
            picture = await self._read(self.store.jpeg, file, number)
            kind = "jpeg" if picture[:2] == b"\xff\xd8" else "webp"  # jpegs are of version 1
            return Response(picture, media_type=f"image/{kind}")
        except KeyError:
            raise HTTPException(404, f"the index has no frame {number} of file {file}") from None

    async def clip(self, request: Request) -> Response:
        if "," in request.headers.get("range", ""):  # no browser asks so, and it can be made to cost much
            raise HTTPException(416, "ask for one range at a time")
        file, path, found = await self._read(self._indexed_file, _id(request, "file"))
        media_type = await self._read(clips.playable_as, path, found.st_size, found.st_mtime_ns, file.seconds)
        if media_type is None:
            async with self.making:
                try:
                    path = await _in_daemon(clips.made, self.clips, file, path)
                except InputError as error:
                    raise HTTPException(415, str(error)) from error
            media_type, found = "video/mp4", path.stat()
        return FileResponse(path, media_type=media_type, stat_result=found)

    def _indexed_file(self, number: int) -> tuple[File, Path, os.stat_result]:
        """An indexed file as it lies on the disk, if it is still the one that was indexed."""
        try:
            file = self.store.file(number)
        except KeyError:
            raise HTTPException(404, f"the index has no file {number} (any more)") from None
        if file.why:
            raise HTTPException(404, f"{file.path} is not indexed: it could not be read")
        root = Path(self.store.settings["videos"]).resolve()
        try:
            path = (root / file.path).resolve(strict=True)
            found = path.stat()
        except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle, before Python 3.13
            raise HTTPException(410, f"{file.path} is not there any more; run the index command again") from None
        if not path.is_relative_to(root) or not stat.S_ISREG(found.st_mode):
            raise HTTPException(403, f"{file.path} leads out of the videos folder; it is not served")
        if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
            raise HTTPException(409, f"{file.path} has changed since it was indexed; run the index command again")
        return file, path, found


async def _in_daemon(function: Callable, *args):
    """The result of function(*args), in a thread that Ctrl-C does not wait for; the next start clears up behind it."""
    future = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # from here on nobody but this thread ends it
        try:
            future.set_result(function(*args))
        except BaseException as error:  # handed on, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


def as_dict(answer: Answer, file: File) -> dict:
    """An answer as the page gets it: with the file's length, and the moment that its best frame shows."""
    best = max(answer.frames, key=lambda frame: frame.frame_weight + frame.sentence_weight, default=None)
    moment = {"best": best.number if best else None, "moment": best.time if best else answer.start}
    return {**answer.as_dict(), **moment, "seconds": file.seconds}


def about(store: Store, frames_alone: str) -> dict:
    """What the page says of the index as a whole; frames_alone: what to say where there is no narration."""
    files, settings = store.files(), store.settings
    narrated = settings["narration"] and settings["captioner"] is not None
    read = [file for file in files if not file.why]
    failed = [{"path": file.path, "why": file.why} for file in files if file.why]
    folders = {parent.as_posix() for file in read for parent in Path(file.path).parents} - {"."}
    return {
        "videos": Path(settings["videos"]).name,
        "files": len(read),
        "windows": store.count(),
        "seconds": sum(file.seconds for file in read),
        "folders": sorted(folders)[:MAX_LISTED],
        "failed": failed[:MAX_LISTED],
        "failures": len(failed),
        "method": settings["method"],
        "narrated": narrated,
        "loses": "" if narrated else frames_alone,
    }


# ---- the server ----


def create_app(store: Store, engine: Engine, hosts: tuple[str, ...] = names_of("127.0.0.1")) -> Starlette:
    """The application; `hosts`: the names under which it answers (names_of)."""
    page = PAGE.read_text(encoding="utf-8")
    site = Site(store, engine, page)
    clips.sweep(site.clips, store.files())
    routes = [
        Route("/", site.show_page),
        Route("/api/about", site.about),
        Route("/api/search", site.search),
        Route("/api/like", site.like),
        Route("/api/picture", site.picture, methods=["POST"]),
        Route("/frame/{file}/{frame}.jpg", site.frame),
        Route("/clip/{file}", site.clip),
    ]
    handlers = {
        HTTPException: lambda request, error: Json({"error": error.detail}, error.status_code, error.headers),
        InputError: lambda request, error: Json({"error": str(error)}, 503),
        Exception: lambda request, error: Json({"error": "a fault of this program; its window says more"}, 500),
    }
    guard = Middleware(Guard, hosts=hosts, policy=policy_of(page))
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


def serve(store: Store, engine: Engine, *, host: str = "127.0.0.1", port: int = 8000, show: bool = False) -> None:
    """Serve until Ctrl-C. Port 0 takes a free one; show opens the page in a browser. InputError if it cannot listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:  # the latter: no such port
        why = getattr(error, "strerror", error)
        raise InputError(f"--host {host} --port {port}: cannot listen there ({why}); give others") from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    if not is_loopback(host):
        print(f"warning: --host {host} lets everyone who reaches this machine search and watch, without a password")
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if show:
        webbrowser.open(address)
    app = create_app(store, engine, names_of(host))
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", server_header=False, proxy_headers=False,
                            timeout_graceful_shutdown=1)  # fmt: skip
    running = uvicorn.Server(config)
    # Ctrl-C cuts off whoever is still watching; uvicorn would report each of them with a traceback.
    log, until_then = logging.getLogger("uvicorn.error"), lambda record: not running.should_exit
    log.addFilter(until_then)
    try:
        running.run(sockets=[listener])
    except KeyboardInterrupt:  # raised again by uvicorn when all is closed
        pass
    finally:
        log.removeFilter(until_then)

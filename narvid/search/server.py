"""The page and its JSON, served: which address answers what, and a server that runs until Ctrl-C (Starlette, uvicorn).

  GET  /, /page.css, /page.js, ...           the page; no address but this server's is ever asked for anything
  GET  /api, /openapi.json                   what a program can ask, for people and for programs
  GET  /api/about, /api/wall                 what is indexed; windows for the start page
  GET  /api/search, /api/like                answers to a sentence or a query of parts (parts.py), to a window
  GET, POST /api/picture                     answers to a picture, sent before or now
  POST /api/query_clip                       answers to a video that is sent
  GET  /frame/FILE/NUMBER, /picture/NAME     pictures
  and those of watching.py

Not here: who may ask (guard.py), what is answered (site.py, watching.py), flags (__main__.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from narvid import InputError
from narvid.search.engine import Engine
from narvid.search.serving import announced
from narvid.search.store import Store

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from narvid.search.guard import Door, Guard, addresses, is_loopback, names_of
    from narvid.search.site import Json, Site
    from narvid.search.watching import Watching
except ImportError as error:
    raise InputError(f'{error.name} is not installed, the page needs it: pip install "narvid[search]"') from error

PAGE = Path(__file__).with_name("page")
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/parts.js": "parts.js",
         "/opened.js": "opened.js", "/api": "api.html", "/api.js": "api.js", "/openapi.json": "openapi.json"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json"}
HEADER_SECONDS = 10.0  # that the head of a request may take to arrive


def create_app(store: Store, engine: Engine, hosts: tuple[str, ...] = names_of("127.0.0.1"), *, local: bool = True,
               password: str | None = None, key: str = "") -> Starlette:
    """The application; `hosts`: the names under which it answers (names_of); local: only this machine reaches it."""
    site = Site(store, engine)
    watching = Watching(site, local)
    watching.folder.sweep(at_start=True)
    routes = [
        *(Route(path, _file(name)) for path, name in FILES.items()),
        Route("/api/about", site.about),
        Route("/api/wall", site.wall),
        Route("/api/search", site.search),
        Route("/api/like", site.like),
        Route("/api/picture", site.picture, methods=["GET", "POST"]),
        Route("/api/query_clip", site.query_clip, methods=["POST"]),
        Route("/api/clip", watching.how),
        Route("/api/path", watching.path),
        Route("/api/reveal", watching.reveal, methods=["POST"]),
        Route("/frame/{file}/{frame}", site.frame),
        Route("/picture/{picture}", site.shown_picture),
        Route("/clip/{file}", watching.clip),
        Route("/preview/{file}", watching.preview),
        Route("/cut/{file}", watching.cut),
    ]
    handlers = {
        HTTPException: lambda request, error: Json({"error": error.detail}, error.status_code, error.headers),
        InputError: lambda request, error: Json({"error": str(error)}, 503),
        Exception: lambda request, error: Json({"error": "a fault of this program; its window says more"}, 500),
    }
    door = None if password is None else Door(password, key, (PAGE / "login.html").read_text(encoding="utf-8"))
    guard = Middleware(Guard, hosts=hosts, door=door)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


def _file(name: str):
    """The endpoint of one of the page's files, read once."""
    content, kind = (PAGE / name).read_bytes(), KINDS[Path(name).suffix]

    async def show(request: Request) -> Response:
        return Response(content, media_type=kind)

    return show


class Impatient(H11Protocol):
    """Closes a connection whose request does not arrive: its threads and memory are for those who ask."""

    _waiting = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle:
            self._wait()
        super().data_received(data)
        if self.cycle is not None and not (idle and self.cycle.response_complete):
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _arrived(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def serve(store: Store, engine: Engine, *, host: str = "127.0.0.1", port: int = 8000, show: bool = False,
          allowed: Sequence[str] = (), password: str | None = None, opened: bool = False) -> None:
    """Serve until Ctrl-C. Port 0 takes a free one; show opens the page in a browser. InputError if it cannot listen.

    allowed: further names under which it may be asked. Where others reach this machine, a password is asked for: the
    one that is given, else one that is made up and printed; opened: none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:  # the latter: no such port
        why = getattr(error, "strerror", error)
        raise InputError(f"--host {host} --port {port}: cannot listen there ({why}); give others") from error
    port, local, key = listener.getsockname()[1], is_loopback(host), secrets.token_urlsafe(32)
    everywhere = host in ("0.0.0.0", "::")
    address = _address("127.0.0.1" if everywhere else host, port)
    for other in addresses() if everywhere else []:
        print(f"{_address(other, port)}  (from other machines in this network, also a phone)")
    if not local and opened:
        print(f"warning: --host {host} --open lets everyone who reaches this machine search and watch, without a "
              "password")
    elif not local and password is None:
        password = "-".join(secrets.token_hex(2) for _ in range(3))
        print(f"password: {password}")
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if show:
        webbrowser.open(address)
    app = create_app(store, engine, names_of(host, allowed), local=local, key=key,
                     password=None if opened else password)
    config = uvicorn.Config(app, http=Impatient, ws="none", log_level="warning", server_header=False,
                            proxy_headers=False, timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    # Ctrl-C cuts off whoever is still watching; uvicorn would report each of them with a traceback.
    log, until_then = logging.getLogger("uvicorn.error"), lambda record: not running.should_exit
    log.addFilter(until_then)
    try:
        with announced(store.folder, address, key):
            running.run(sockets=[listener])
    except KeyboardInterrupt:  # raised again by uvicorn when all is closed
        pass
    finally:
        log.removeFilter(until_then)


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

"""Who may ask the server: this machine's own page and programs, or who knows the password; not other web sites.

A page from anywhere can make a browser send requests to 127.0.0.1, under a name of its own if it rebinds one. Hence:
  Host             must be a name of this server (DNS rebinding)
  Origin           where given, must be the page's own; browsers give it with every POST
  Sec-Fetch-Site   where given, must be this site, but for links to the page
  Cookie           where there is a password: what /login gave; a program on this machine sends the key in a header
and headers that keep the page to itself: no script but its own, no address but this server's, in nobody's frame.
Not here: what is answered (server.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from narvid.search.serving import KEY_HEADER

OTHER_SITE = "requests of other web sites are not answered"
HOST = re.compile(r"(?P<name>[A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with none a form would be sent from "null"
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # numbers of files live as long as their index
    # the server's own files alone; no text becomes markup
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
}
COOKIE = "narvid_search"
PUBLIC = ("/page.css",)  # what the page that asks for the password needs
WRONG_SECONDS = 1.0


class Guard:
    """The middleware. hosts: names of this server, "*" for any address in numbers; door: where there is a password."""

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...], door: Door | None = None):
        self.app, self.hosts, self.door = app, hosts, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name != "cache-control" or name not in headers:
                        headers[name] = value
            await send(message)

        why = refusal(Headers(scope=scope), link=scope["method"] == "GET" and scope["path"] == "/", hosts=self.hosts)
        answer = JSONResponse({"error": why}, 403) if why else None
        if answer is None and self.door is not None:
            answer = await self.door.answer(Request(scope, receive))
        await (answer or self.app)(scope, receive, send_with_headers)


class Door:
    """A password, and who has given it. key: what a program on this machine says instead (serving.py)."""

    def __init__(self, password: str, key: str, page: str):
        self._digest, self._key, self._page = _digest(password), key or secrets.token_urlsafe(32), page
        self._cookie, self._one = secrets.token_urlsafe(32), asyncio.Lock()

    async def answer(self, request: Request) -> Response | None:
        """What is answered in place of the site; None for one who may come in."""
        if request.url.path == "/login" and request.method == "POST":
            return await self._login(request)
        if self._knows(request.cookies.get(COOKIE, ""), self._cookie):
            return RedirectResponse("/", 303) if request.url.path == "/login" else None
        if self._knows(request.headers.get(KEY_HEADER, ""), self._key) or request.url.path in PUBLIC:
            return None
        if request.method == "GET" and request.url.path in ("/", "/login", "/api"):
            return Response(self._page.replace("WRONG", ""), 401, media_type="text/html")
        return JSONResponse({"error": "give the password first: open this server's page"}, 401)

    async def _login(self, request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > 4096:
                return JSONResponse({"error": "too long for a password"}, 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
        async with self._one:  # guesses are made one by one, a wrong one a second
            if not hmac.compare_digest(_digest(given), self._digest):
                await asyncio.sleep(WRONG_SECONDS)
                return Response(self._page.replace("WRONG", "This is not the password."), 401, media_type="text/html")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._cookie, max_age=30 * 86400, httponly=True, samesite="strict")
        return answer

    @staticmethod
    def _knows(said: str, secret: str) -> bool:
        return hmac.compare_digest(said.encode("utf-8", "replace"), secret.encode())


def _digest(text: str) -> bytes:
    """Of one length, so that comparing takes one time."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def refusal(headers: Headers, *, link: bool, hosts: tuple[str, ...]) -> str:
    """Why a request with these headers is not answered, "" if it is; link: it asks for the page itself."""
    host = headers.get("host", "")
    if not is_ours(host, hosts):
        return f"this server has no name {host[:80]!r}; open the address that it printed when it started"
    origin = headers.get("origin")
    if origin is not None and _host_of(origin) != host:
        return OTHER_SITE
    if not link and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):  # none: typed, a bookmark
        return OTHER_SITE
    return ""


def is_ours(host: str, hosts: tuple[str, ...]) -> bool:
    """Whether a Host header names this server.

    Numbers are safe where all addresses are listened to: a site that rebinds reaches us under its own name.
    """
    match = HOST.fullmatch(host)
    if not match:
        return False
    name = match["name"].strip("[]").lower()
    return name in hosts or ("*" in hosts and _is_number(name))


def names_of(host: str, allowed: Sequence[str] = ()) -> tuple[str, ...]:
    """The names under which a server that listens at `host` may be asked; allowed: more of them."""
    names = ("127.0.0.1", "localhost", "::1", host.lower(), *(name.lower() for name in allowed))
    return names if is_loopback(host) else (*names, socket.gethostname().lower(), "*")


def addresses() -> list[str]:
    """Those of this machine that others on its network can open, as far as it knows them; nothing is sent."""
    found = []
    for family, far in ((socket.AF_INET, "10.255.255.255"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as asking:
                asking.connect((far, 9))
                found.append(asking.getsockname()[0])
        except OSError:  # no such network
            continue
    return [address for address in found if not is_loopback(address)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_of(origin: str) -> str | None:
    """host[:port] of an http address, None for anything else ("null")."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc if parts.scheme in ("http", "https") else None

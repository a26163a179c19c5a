"""Who may ask the server: this machine's own page and programs, not other web sites.

A page from anywhere can make a browser send requests to 127.0.0.1, under a name of its own if it rebinds one. Hence:
  Host             must be a name of this server (DNS rebinding)
  Origin           where given, must be the page's own; browsers give it with every POST
  Sec-Fetch-Site   where given, must be this site, but for links to the page
and headers that keep the page to itself: no script but its own, no address but this server's, in nobody's frame.
Not here: what is answered (server.py).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER_SITE = "requests of other web sites are not answered"
HOST = re.compile(r"(?P<name>[A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # numbers of files live as long as their index
}


class Guard:
    """The middleware. hosts: names of this server, "*" for any address in numbers; policy: policy_of its page."""

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...], policy: str):
        self.app, self.hosts, self.headers = app, hosts, HEADERS | {"content-security-policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        why = refusal(Headers(scope=scope), link=scope["method"] == "GET" and scope["path"] == "/", hosts=self.hosts)
        await (JSONResponse({"error": why}, 403) if why else self.app)(scope, receive, send_with_headers)


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


def names_of(host: str) -> tuple[str, ...]:
    """The names under which a server that listens at `host` may be asked."""
    names = ("127.0.0.1", "localhost", "::1", host.lower())
    return names if is_loopback(host) else (*names, socket.gethostname().lower(), "*")


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


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page: its own inline script and style by their hashes, nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        hashes[tag] = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src 'self' data: blob:; "
        "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )

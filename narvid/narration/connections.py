"""POST after POST to one address over connections that stay open: one a thread, with the standard library alone.

The whole answer has to come within the timeout, for a server that sends a byte now and then would never end. The
environment's proxies are used. Not here: what is sent and what comes back (chat.py), what is tried again
(chat_server.py).
"""

from __future__ import annotations

import base64
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from narvid import InputError

LARGEST = 2**24  # bytes of an answer; a chat completion has thousands
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, http.client.CannotSendRequest)


class Answer(NamedTuple):
    """What came back of a request."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connections:
    """`post` may be called from many threads. Raises OSError (TimeoutError) or HTTPException where no answer came."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float):
        parts = urlsplit(url)
        self._timeout, self._of_thread = timeout, threading.local()
        self._tls = _tls() if parts.scheme == "https" else None
        self._host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._port = parts.port or (443 if self._tls else 80)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {**headers, "Content-Type": "application/json", "Accept": "application/json"}
        if login := _login(parts):
            self._headers["Authorization"] = login
        self._proxy = _proxy(parts)
        self._through = {}
        if self._proxy is not None:
            self._through = {"Proxy-Authorization": login} if (login := _login(self._proxy)) else {}
            if not self._tls:
                self._headers |= self._through
                self._target = f"http://{parts.netloc.rpartition('@')[2]}{self._target}"

    def post(self, body: bytes) -> Answer:
        """Send a request and read its answer; a connection that the server has closed meanwhile is opened anew."""
        connection = getattr(self._of_thread, "connection", None)
        if connection is not None and connection.sock is not None:
            with suppress(*_STALE):
                return self._exchange(connection, body)
            connection.close()
        self._of_thread.connection = connection = self._open()
        return self._exchange(connection, body)

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes) -> Answer:
        end = time.monotonic() + self._timeout
        connection.response_class = lambda sock, **how: http.client.HTTPResponse(_InTime(sock, end), **how)
        try:
            if connection.sock is not None:
                connection.sock.settimeout(self._timeout)
            connection.request("POST", self._target, body, self._headers)
            with connection.getresponse() as response:
                content = response.read(LARGEST + 1)
                if len(content) > LARGEST:
                    raise http.client.HTTPException(f"the answer is longer than {LARGEST >> 20} MiB")
                if left := response.length:  # read(n) takes a connection that ends early for the end
                    raise http.client.IncompleteRead(content, left)
                return Answer(response.status, response.headers, content)
        except BaseException:
            connection.close()
            raise

    def _open(self) -> http.client.HTTPConnection:
        host, port = (self._proxy.hostname, self._proxy.port) if self._proxy else (self._host.strip("[]"), self._port)
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=self._timeout)
        connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._tls)
        if self._proxy:
            connection.set_tunnel(self._host, self._port, headers=self._through)
        return connection


class _InTime(io.RawIOBase):
    """Stands for a socket that is read until `end`: a socket's own timeout starts again with each byte."""

    def __init__(self, sock: socket.socket, end: float):
        self._sock, self._end, self._file = sock, end, sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _tls() -> ssl.SSLContext:
    """The system's certificates, or certifi's where the system has none (small containers)."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not (paths.cafile or paths.capath):
        with suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context


def _login(parts: SplitResult) -> str | None:
    """The header's value for NAME:PASSWORD@ in an address."""
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The environment's proxy for an address (HTTPS_PROXY, NO_PROXY, ...), None for none."""
    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    try:
        proxy = urlsplit(address if "://" in address else f"http://{address}")
        if proxy.scheme == "http" and proxy.hostname:
            return proxy._replace(netloc=proxy.netloc if proxy.port else f"{proxy.netloc}:80")
    except ValueError:  # a port that is no number
        pass
    raise InputError(f"the environment's proxy for {parts.scheme}:// is {proxy_shown(address)}: only http:// proxies "
                     "are used; set another one, or NO_PROXY")


def proxy_shown(address: str) -> str:
    """A proxy's address without its password."""
    return repr(address.rpartition("@")[2])

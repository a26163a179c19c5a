"""A running server and who asks it: it says in its index where it listens; a query of its machine asks it there.

Loading a model takes seconds, which a server has spent already. Here: INDEX/serving.json and the asking, also for
programs of yours (`from narvid.search import Client`). Not here: what the server answers (site.py), the tables
(__main__.py). This file must not import torch.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from math import inf
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlencode, urlsplit

from narvid import InputError
from narvid.files import replace
from narvid.search.answers import Answer, Answers, Moment, Said, Seen
from narvid.search.parts import Part, parse, written

NAME = "serving.json"
SECONDS = 300.0  # that a running server may take for one query
FINDING = 2.0  # and for saying that it is there
KEY_HEADER = "x-narvid-key"  # in which a program of this machine says what serving.json has told it


@contextmanager
def announced(index: Path, address: str, key: str) -> Iterator[None]:
    """While inside, the index's folder says where it is served; an index that may not be written says nothing."""
    path, temporary = index / NAME, index / f".{os.getpid()}.{NAME}"
    with suppress(OSError, InputError):
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"address": address, "key": key, "process": os.getpid()}, file)
        replace(temporary, path)
    try:
        yield
    finally:
        with suppress(OSError, ValueError, KeyError):
            if json.loads(path.read_text())["key"] == key:  # another server may have come since
                path.unlink()


class Client:
    """Asks a running server, of this machine (`find`) or another: Client("http://host:8000", "the password")."""

    def __init__(self, address: str, password: str | None = None, *, key: str = ""):
        """InputError where nothing answers, or another password is asked for. key: what a server says in its index."""
        self.address, self._headers = urlsplit(address if "//" in address else f"http://{address}"), {KEY_HEADER: key}
        if self.address.scheme != "http" or not self.address.hostname:
            raise InputError(f"{address!r} is no address of a server: give it as http://127.0.0.1:8000")
        try:
            if password is not None:
                self._log_in(password)
            self._ask("GET", "/api/about", None, FINDING)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{address} does not answer ({error}): start `narvid-search serve` there") from error

    @classmethod
    def find(cls, index: str | Path) -> Client | None:
        """The server of an index that runs on this machine; None where there is none that answers."""
        with suppress(OSError, ValueError, KeyError, TypeError, InputError):
            said = json.loads((Path(index) / NAME).read_text())
            return cls(said["address"], key=said["key"])
        return None

    def search(self, query: str | Sequence[Part], *, top: int = 10, folder: str = "", min_seconds: float = 0.0,
               max_seconds: float = inf, since: float = -inf, until: float = inf, has_speech: bool = False,
               one_a_file: bool = True) -> Answers:
        """Answers to a sentence, or to a query of parts: pictures and clips are files here, or named as sent before.

        The keywords are the engine's.
        """
        usual = {"folder": "", "min_seconds": 0.0, "max_seconds": inf, "since": -inf, "until": inf}
        given = {"folder": folder, "min_seconds": min_seconds, "max_seconds": max_seconds, "since": since,
                 "until": until}
        values = {name: value for name, value in given.items() if value != usual[name]}
        values |= ({} if one_a_file else {"moments": 1}) | ({"has_speech": 1} if has_speech else {})
        parts = parse(query) if isinstance(query, str) else query
        values["q"] = written([self._sent(part) for part in parts])
        left, answers = top, Answers()
        while left > 0:
            more = values | {"top": min(left, 100), "skip": len(answers)}
            found = self._ask("GET", f"/api/search?{urlencode(more)}", None, SECONDS)
            answers.fits, answers.total = found["fits"], found["total"]
            for said in found["answers"]:
                said["frames"] = [Seen(**frame) for frame in said["frames"]]
                said["moments"] = [Moment(**moment) for moment in said["moments"]]
                said["said"] = said["said"] and Said(**said["said"])
                answers.append(Answer(**{name: said[name] for name in Answer._fields}))
            if len(found["answers"]) < more["top"]:
                break
            left -= len(found["answers"])
        return answers

    def send(self, path: str | Path, kind: str = "picture") -> str:
        """Send a picture or a "clip" -> the name under which queries find it there."""
        with _opened(path) as file:
            size, address = os.fstat(file.fileno()).st_size, {"picture": "/api/picture", "clip": "/api/query_clip"}
            try:
                return self._ask("POST", f"{address[kind]}?top=1", file, SECONDS, {"content-length": str(size)})[kind]
            except InputError as error:
                raise InputError(f"{path}: {error}") from error

    def _sent(self, part: Part) -> Part:
        if part.kind not in ("picture", "clip") or re.fullmatch(r"[0-9a-f]{24}", str(part.value)):
            return part
        return part._replace(value=self.send(part.value, part.kind))

    def _log_in(self, password: str) -> None:
        """The cookie for a password, as the page gets it."""
        connection = http.client.HTTPConnection(self.address.hostname, self.address.port, timeout=FINDING)
        with closing(connection):
            connection.request("POST", "/login", urlencode({"password": password}))
            response = connection.getresponse()
            if response.status == 401:
                raise InputError(f"{self.address.netloc}: this is not its password")
            self._headers["cookie"] = (response.headers.get("set-cookie") or "").partition(";")[0]

    def _ask(self, method: str, path: str, body: BinaryIO | None, seconds: float, headers: dict | None = None) -> dict:
        connection = http.client.HTTPConnection(self.address.hostname, self.address.port, timeout=seconds)
        with closing(connection):
            connection.request(method, path, body, self._headers | (headers or {}))
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            raise InputError(answer["error"])
        return answer


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error

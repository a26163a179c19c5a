"""A running server and the commands of its machine: it says in its index where it listens, a query asks it there.

Loading a model takes seconds, which a server has spent already. Here: INDEX/serving.json and the asking. Not here: what
the server answers (site.py), the tables (__main__.py).
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from narvid import InputError
from narvid.files import replace
from narvid.search.answers import Answer, Answers, Moment, Seen

NAME = "serving.json"
SECONDS = 300.0  # that a running server may take for one query
HEADER = "x-narvid-key"


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


class Served:
    """A server of this index that runs on this machine."""

    def __init__(self, address: str, key: str):
        self.address, self.key = urlsplit(address), key

    @classmethod
    def find(cls, index: Path) -> Served | None:
        """One that answers, or None."""
        with suppress(OSError, ValueError, KeyError, TypeError, http.client.HTTPException, InputError):
            said = json.loads((Path(index) / NAME).read_text())
            served = cls(said["address"], said["key"])
            served._ask("GET", "/api/about", None, 2.0)
            return served
        return None

    def search(self, text: str, **how) -> Answers:
        """Answers to a sentence; the keywords are the engine's."""
        return self._answers("GET", "/api/search", {"q": text}, None, how)

    def like_picture(self, data: bytes, **how) -> Answers:
        """Answers to a picture, given the bytes of its file."""
        return self._answers("POST", "/api/picture", {}, data, how)

    def _answers(self, method: str, path: str, values: dict, body: bytes | None, how: dict) -> Answers:
        left, answers = how["top"], Answers()
        usual = {"folder": "", "min_seconds": 0.0, "max_seconds": inf, "since": -inf, "until": inf}
        values |= {name: how[name] for name, value in usual.items() if how[name] != value}
        values |= {} if how["one_a_file"] else {"moments": 1}
        while left > 0:
            more = values | {"top": min(left, 100), "skip": len(answers)}
            found = self._ask(method, f"{path}?{urlencode(more)}", body, SECONDS)
            answers.fits, answers.total = found["fits"], found["total"]
            for said in found["answers"]:
                said["frames"] = [Seen(**frame) for frame in said["frames"]]
                said["moments"] = [Moment(**moment) for moment in said["moments"]]
                answers.append(Answer(**{name: said[name] for name in Answer._fields}))
            if len(found["answers"]) < more["top"]:
                break
            left -= len(found["answers"])
        return answers

    def _ask(self, method: str, path: str, body: bytes | None, seconds: float) -> dict:
        connection = http.client.HTTPConnection(self.address.hostname, self.address.port, timeout=seconds)
        try:
            connection.request(method, path, body, {HEADER: self.key})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise InputError(answer["error"])
        return answer

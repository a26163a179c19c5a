"""Picture -> sentence by a server that speaks OpenAI's protocol.

Here: addresses, keys, what is tried again, the pace, parameters that a server does not take. Not here: requests and
answers as they are written (chat.py), connections (connections.py), the check before a run (pictures.py).
"""

from __future__ import annotations

import http.client
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from narvid import InputError
from narvid.narration.answers import Failed
from narvid.narration.captioners import MAX_NEW_TOKENS, first_line
from narvid.narration.chat import INSTEAD, Chat, data_url, parsed
from narvid.narration.connections import Connections
from narvid.progress import say

REQUESTS = 64  # under way at once: fewer leave a server of today waiting
LONGEST_PAUSE = 60.0  # seconds that a server may ask for before the next try


class ServerCaptioner:
    """A model behind an OpenAI-compatible /chat/completions: vLLM, SGLang, llama.cpp, `transformers serve`, a hosted
    one.

    url: with its path; /v1 is added to one that has none. The key is read from the environment variable `api_key_env`.
    timeout: seconds for one request and its whole answer. 408, 409, 429, 5xx, timeouts and broken connections are tried
    again `retries` times, with exponential back-off and jitter, or when the server says (Retry-After); then the picture
    counts as failed. requests_per_second: between the starts of new requests; a repeated one follows the back-off.

    A parameter that the server refuses in a call without keys (the check before a run) is sent otherwise from then on;
    that is printed once and stands in the label. With keys nothing changes: sentences of two kinds would mix.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        seed: int = 0,
        one_sentence: bool = False,
        api_key_env: str | None = None,
        retries: int = 5,
        timeout: float = 60.0,
        requests_per_second: float | None = None,
    ):
        address = _address(url)
        shown = re.sub(r"(?<=//)[^/@]*@|\?.*", "", address)  # without what is nobody's business
        self._chat = Chat(model, prompt, shown=shown, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                          one_sentence=one_sentence)
        self._connections = Connections(_with_path(address), {"Authorization": f"Bearer {_key(api_key_env)}"}, timeout)
        self._retries, self._timeout, self._may_change = retries, timeout, True
        self._pause = 1 / requests_per_second if requests_per_second else 0.0
        self._next_start, self._lock = 0.0, threading.Lock()
        self.prompt = self._chat.prompt

    @property
    def label(self) -> str:
        """Model, decoding, and the parameters that the server would not take."""
        return self._chat.label

    def go_on(self, label: str) -> None:
        """Ask as for the sentences that have this label, and change nothing: none may be made in another way."""
        found = re.match(re.escape(self._chat.asked_label) + r"(?: without=([\w,]+))?(?: |$)", label)
        if found:
            self._chat.without = {name for name in (found[1] or "").split(",") if name in INSTEAD}
        self._may_change = False

    def caption(self, pictures: Sequence[bytes], keys: Sequence[str] | None = None) -> list[str | Failed]:
        """One answer a picture, one request after the other; may be called from many threads."""
        return [self._ask(*pair) for pair in zip(pictures, keys or [None] * len(pictures), strict=True)]

    def _ask(self, picture: bytes, key: str | None) -> str | Failed:
        self._wait_for_turn()
        try:
            status, headers, content = self._post(self._chat.body(data_url(picture), key))
        except TimeoutError:
            return self._chat.failed(f"no whole answer within {self._timeout:g} s")
        except (OSError, http.client.HTTPException) as error:
            return self._chat.failed(f"{type(error).__name__}: {first_line(error)}")
        if 300 <= status < 400:
            return self._chat.failed(f"{status}: it has moved to {headers.get('Location')!r}; give --server that one")
        body = parsed(content)
        refused = self._chat.refused_parameter(status, body) if key is None and self._may_change else None
        if refused and refused[0] not in self._chat.without:
            name, said = refused
            self._chat.without.add(name)
            say(f"{self._chat.shown} does not take {name} ({said}): {INSTEAD[name]}")
            return self._ask(picture, key)
        return self._chat.answer(status, body)

    def _post(self, body: bytes):
        """The answer to a request, of the last try where none succeeds."""
        for tried in range(self._retries + 1):
            last, pause = tried == self._retries, min(0.5 * 2**tried, 8.0) * random.uniform(0.75, 1.0)
            try:
                answer = self._connections.post(body)
            except (OSError, http.client.HTTPException):
                if last:
                    raise
            else:
                if last or not _worth_another_try(answer.status, answer.headers):
                    return answer
                pause = _asked_pause(answer.headers) or pause
            time.sleep(pause)

    def _wait_for_turn(self) -> None:
        if not self._pause:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + self._pause
        time.sleep(max(0.0, start - time.monotonic()))


def _worth_another_try(status: int, headers: Mapping[str, str]) -> bool:
    said = headers.get("x-should-retry")
    return said == "true" if said in ("true", "false") else status in (408, 409, 429) or status >= 500


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds until the server wants to be asked again; 0 where it does not say."""
    pauses = []
    for name, second in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(ValueError):
            pauses.append(float(headers.get(name, "")) / second)
    with suppress(ValueError, TypeError):  # a date counts from the server's own clock, for ours may differ
        until, now = (parsedate_to_datetime(headers.get(name, "")) for name in ("retry-after", "date"))
        pauses.append((until - now).total_seconds())
    return next((pause for pause in pauses if 0 < pause <= LONGEST_PAUSE), 0.0)


def _with_path(address: str) -> str:
    """Where requests go: the address with /chat/completions, before a query that it may have."""
    parts = urlsplit(address)
    return parts._replace(path=parts.path + "/chat/completions").geturl()


def _address(url: str) -> str:
    """A server's base address; InputError for what is none."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and (parts.hostname or "").encode("idna") and parts.port != 0
    except ValueError:  # half a bracket, a port that is no number, a name that none can have
        good = False
    if not good or re.search(r"[\s\x00-\x20\x7f\\<>\"]", url):
        raise InputError(f"--server {url!r}: no address such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") if parts.path.strip("/") else "/v1"
    return parts._replace(path=path, fragment="").geturl()


def _key(variable: str | None) -> str:
    """The key that an environment variable holds; a server of one's own wants none."""
    key = os.environ.get(variable or "OPENAI_API_KEY", "").strip()
    if variable and not key:
        raise InputError(f"--api_key_env {variable}: the environment has no such variable, or an empty one")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"{variable or 'OPENAI_API_KEY'} in the environment: holds characters that no key has")
    return key or "none"

"""Picture -> sentence by a server that speaks OpenAI's protocol, and what real ones send instead of a sentence.

Errors, pages, half answers, lists of parts and refused pictures become Failed; a parameter that a model does not take
is sent otherwise. Not here: what the text of an answer is worth (answers.py), the check before a run (pictures.py).
"""

from __future__ import annotations

import base64
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from narvid import InputError
from narvid.narration.answers import Failed, sentence
from narvid.narration.captioners import MAX_NEW_TOKENS, decoding, first_line, optional, prompt_text, seed_of

# openai is imported where it is used: it is optional.

INSTEAD = {
    "max_tokens": "max_completion_tokens is sent instead",
    "temperature": "it is left to the server",
    "seed": "it is left to the server",
}  # parameter of a request -> what is done where a server refuses it
_NOT_TAKEN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|deprecated|"
    r"max_completion_tokens|temperature\W+(?:must be|may only be|can only be)|only the default",
    re.IGNORECASE,
)
_CONTENT = re.compile(
    r"content[ _-]?(?:policy|filter|management)|safety|moderation|responsible ?ai|data_?inspection|inappropriate|"
    r"prohibited[ _]content|flagged",
    re.IGNORECASE,
)


class ServerCaptioner:
    """A model behind an OpenAI-compatible /chat/completions: vLLM, `transformers serve`, llama.cpp, a hosted one.

    url: with its path; /v1 is added to one that has none. The key is read from the environment variable `api_key_env`.
    timeout: seconds for one request and its whole answer. 408, 409, 429, 5xx, timeouts and broken connections are tried
    again `retries` times, with exponential back-off and jitter (the openai library's); then the picture counts as
    failed. requests_per_second: between the starts of new requests; a repeated one follows the back-off alone.

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
        api_key_env: str | None = None,
        retries: int = 5,
        timeout: float = 60.0,
        requests_per_second: float | None = None,
    ):
        openai = optional("openai")
        self._url, self._model, self._max_new_tokens = _address(url), model, max_new_tokens
        self._temperature, self._seed, self._timeout = temperature, seed, timeout
        self._shown = re.sub(r"(?<=//)[^/@]*@|\?.*", "", self._url)  # without what is nobody's business
        key = _key(api_key_env)
        try:
            http = openai.DefaultHttpxClient(event_hooks={"response": [self._end_in_time]})
            self._client = openai.OpenAI(
                base_url=self._url, api_key=key, max_retries=retries, timeout=timeout, http_client=http
            )
        except Exception as error:  # the HTTP library's own kinds, which changed their module: an address or a proxy
            raise InputError(f"--server {url}: cannot be asked ({first_line(error)})") from error
        self._pause = 1 / requests_per_second if requests_per_second else 0.0
        self._next_start, self._lock = 0.0, threading.Lock()
        self._without, self._may_change = set(), True
        self.prompt = prompt_text(prompt)
        self._asked_label = f"{model} server {decoding(temperature, seed, max_new_tokens)}"

    @property
    def label(self) -> str:
        """Model, decoding, and the parameters that the server would not take."""
        return self._asked_label + (f" without={','.join(sorted(self._without))}" if self._without else "")

    def go_on(self, label: str) -> None:
        """Ask as for the sentences that have this label, and change nothing: none may be made in another way."""
        found = re.match(re.escape(self._asked_label) + r"(?: without=([\w,]+))?(?: |$)", label)
        if found:
            self._without = {name for name in (found[1] or "").split(",") if name in INSTEAD}
        self._may_change = False

    def caption(self, pictures: Sequence[bytes], keys: Sequence[str] | None = None) -> list[str | Failed]:
        """One answer a picture, one request after the other; may be called from many threads."""
        return [self._ask(*pair) for pair in zip(pictures, keys or [None] * len(pictures), strict=True)]

    def _ask(self, picture: bytes, key: str | None) -> str | Failed:
        import openai

        self._wait_for_turn()
        try:
            return self._sentence(self._client.chat.completions.create(**self._request(picture, key)))
        except (openai.APIError, TimeoutError) as error:
            if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):  # of _end_in_time
                return self._failed(f"no whole answer within {self._timeout:g} s")
            name = _refused_parameter(error)
            if name and key is None and self._may_change and name not in self._without:
                self._without.add(name)
                print(f"{self._shown} does not take {name} ({_message(error)}): {INSTEAD[name]}", flush=True)
                return self._ask(picture, key)
            status = getattr(error, "status_code", type(error).__name__)  # timeouts and broken connections have none
            return self._failed(f"{status}: {_message(error)}", error.code, status)
        except (ValueError, TypeError, AttributeError, LookupError):  # a page, half a JSON, no choices
            return self._failed("the answer is no chat completion")

    def _request(self, picture: bytes, key: str | None) -> dict:
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.prompt}]
        sampling = {"temperature": 0.0}
        if self._temperature is not None:  # without a key only the picture may make a difference
            sampling = {"temperature": 0.0 if key is None else self._temperature, "seed": seed_of(self._seed, key)}
        limit = "max_completion_tokens" if "max_tokens" in self._without else "max_tokens"
        sampling = {name: value for name, value in sampling.items() if name not in self._without}
        messages = [{"role": "user", "content": content}]
        return {"model": self._model, "messages": messages, limit: self._max_new_tokens, **sampling}

    def _sentence(self, answer) -> str | Failed:
        """What a chat completion says; raises one of Python's errors where it is none."""
        if error := getattr(answer, "error", None):  # some proxies send it with status 200
            error = error if isinstance(error, dict) else {"message": error}
            return self._failed(first_line(str(error.get("message") or error)), error.get("code"))
        choice = answer.choices[0]
        said, end = choice.message.content, str(getattr(choice, "finish_reason", "")).lower()
        if isinstance(said, list):  # of parts; those of another type are its reasoning
            parts = [{"text": part} if isinstance(part, str) else part for part in said]
            said = "".join(part["text"] for part in parts if part.get("type", "text") in ("text", "output_text"))
        refusal = getattr(choice.message, "refusal", None)
        if end == "content_filter" or (refusal and not said):
            return Failed(f"{self._shown}: the picture was refused: {first_line(refusal or end)}", "refused")
        return sentence(said, cut=end in ("length", "max_tokens"), limit=self._max_new_tokens)

    def _failed(self, why: str, code: object = None, status: int | str = 400) -> Failed:
        """A refused picture, for its content, says nothing of the next one; any other failure does."""
        refused = status in (400, 403, 422, 451) and _CONTENT.search(f"{code} {why}")
        return Failed(f"{self._shown}: {why}", "refused" if refused else "failed")

    def _end_in_time(self, response) -> None:
        """The library's timeout starts again with each byte: a server that sends one now and then would never end."""
        chunks, end = response.iter_bytes, time.monotonic() + self._timeout

        def in_time(*args) -> Iterator[bytes]:
            for chunk in chunks(*args):
                if time.monotonic() > end:
                    raise TimeoutError
                yield chunk

        response.iter_bytes = in_time

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + self._pause
        time.sleep(max(0.0, start - time.monotonic()))


def _refused_parameter(error) -> str | None:
    """The parameter, of those that may change, whose very presence or value a server refuses."""
    text = f"{error} {error.body}"
    if getattr(error, "status_code", None) not in (400, 422) or not _NOT_TAKEN.search(text):
        return None
    if error.param in INSTEAD:
        return error.param
    found = re.search(rf"\b(?:{'|'.join(INSTEAD)})\b", text)
    return found and found[0]


def _message(error) -> str:
    """The server's own sentence out of an error; of a page, its first words."""
    said = error.body or error
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    elif isinstance(said, str):
        said = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", said)
    return first_line(str(said))


def _address(url: str) -> str:
    """A server's base address; InputError for what is none."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # half a bracket, a port that is no number
        good = False
    if not good or re.search(r"[\s\x00-\x20\x7f\\<>\"]", url):
        raise InputError(f"--server {url!r}: no address such as http://localhost:8000/v1")
    if not parts.path.strip("/"):
        return f"{parts.scheme}://{parts.netloc}/v1"
    return url.rstrip("/").removesuffix("/chat/completions")


def _key(variable: str | None) -> str:
    """The key that an environment variable holds; a server of one's own wants none."""
    key = os.environ.get(variable or "OPENAI_API_KEY", "").strip()
    if variable and not key:
        raise InputError(f"--api_key_env {variable}: the environment has no such variable, or an empty one")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"{variable or 'OPENAI_API_KEY'} in the environment: holds characters that no key has")
    return key or "none"

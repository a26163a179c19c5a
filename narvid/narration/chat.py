"""OpenAI's /chat/completions as it is written: the request about a picture, and what the answer to it is worth.

Errors, pages, half answers, lists of parts and refused pictures become Failed. The same bytes go to a server
(chat_server.py) and into batch files (batches.py). Not here: connections, what a sentence is (answers.py).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from http import HTTPStatus

from narvid.narration.answers import Failed, sentence
from narvid.narration.captioners import MAX_NEW_TOKENS, decoding, first_line, prompt_text, seed_of

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
_PICTURE = "\0"  # stands for a picture's address while the rest of a request is written


class Chat:
    """How one model is asked about pictures. prompt, temperature, seed, key: as in captioners.py.

    without: parameters, of INSTEAD, that the model does not take. shown: who answers, for messages.
    """

    def __init__(self, model: str, prompt: str | None = None, *, shown: str, max_new_tokens: int = MAX_NEW_TOKENS,
                 temperature: float | None = None, seed: int = 0, one_sentence: bool = False,
                 without: Iterable[str] = ()):
        self.model, self.prompt, self.shown, self.without = model, prompt_text(prompt), shown, set(without)
        self._temperature, self._seed, self._max_new_tokens = temperature, seed, max_new_tokens
        self._one_sentence = one_sentence
        self.asked_label = f"{model} server {decoding(temperature, seed, max_new_tokens, one_sentence)}"

    @property
    def label(self) -> str:
        """Model, decoding, and the parameters that are not sent."""
        return self.asked_label + (f" without={','.join(sorted(self.without))}" if self.without else "")

    # ---- the request ----

    def body(self, url: bytes, key: str | None) -> bytes:
        """The JSON of a request about the picture at `url`, which must need no escape: data:, file:, http:."""
        content = [{"type": "image_url", "image_url": {"url": _PICTURE}}, {"type": "text", "text": self.prompt}]
        sampling = {"temperature": 0.0}
        if self._temperature is not None:  # without a key only the picture may make a difference
            sampling = {"temperature": 0.0 if key is None else self._temperature, "seed": seed_of(self._seed, key)}
        limit = "max_completion_tokens" if "max_tokens" in self.without else "max_tokens"
        sampling = {name: value for name, value in sampling.items() if name not in self.without}
        request = {"model": self.model, "messages": [{"role": "user", "content": content}],
                   limit: self._max_new_tokens, **sampling}
        before, after = json.dumps(request).encode().split(json.dumps(_PICTURE).encode()[1:-1])
        return b"".join((before, url, after))  # a picture is never looked through for characters to escape

    # ---- the answer ----

    def answer(self, status: int, body: object) -> str | Failed:
        """A sentence, or why there is none. body: what came back, JSON where it is JSON, else its text."""
        if status != 200:
            error = _error(body)
            code = error.get("code") if isinstance(error, dict) else None
            return self.failed(f"{status}: {message_of(error) or _phrase(status)}", code, status)
        try:
            return self._sentence(body)
        except (ValueError, TypeError, AttributeError, LookupError):  # a page, half a JSON, no choices
            said = message_of(body)[:80] if isinstance(body, str) else ""
            begins = f", it begins with {said!r}" if said else ""
            return self.failed(f"the answer is no chat completion{begins}", status=status)

    def _sentence(self, answer) -> str | Failed:
        """What a chat completion says; raises one of Python's errors where it is none."""
        if error := answer.get("error"):  # some proxies send it with status 200
            error = error if isinstance(error, dict) else {"message": error}
            return self.failed(first_line(str(error.get("message") or error)), error.get("code"))
        choice = answer["choices"][0]
        message, end = choice["message"], str(choice.get("finish_reason")).lower()
        said, refusal = message.get("content"), message.get("refusal")
        if isinstance(said, list):  # of parts; those of another type are its reasoning
            parts = [{"text": part} if isinstance(part, str) else part for part in said]
            said = "".join(part["text"] for part in parts if part.get("type", "text") in ("text", "output_text"))
        if end == "content_filter" or (refusal and not said):
            return Failed(f"{self.shown}: the picture was refused: {first_line(str(refusal or end))}", "refused")
        return sentence(said, cut=end in ("length", "max_tokens"), limit=self._max_new_tokens,
                        one=self._one_sentence)

    def failed(self, why: str, code: object = None, status: int = 400) -> Failed:
        """A refused picture, for its content, says nothing of the next one; any other failure does."""
        refused = status in (400, 403, 422, 451) and _CONTENT.search(f"{code} {why}")
        return Failed(f"{self.shown}: {why}", "refused" if refused else "failed")

    def refused_parameter(self, status: int, body: object) -> tuple[str, str] | None:
        """(the parameter, of INSTEAD, whose very presence or value is refused, the server's own sentence)."""
        error = _error(body)
        if status not in (400, 422) or not _NOT_TAKEN.search(f"{body} {error}"):
            return None
        name = error.get("param") if isinstance(error, dict) else None
        if name not in INSTEAD:
            found = re.search(rf"\b(?:{'|'.join(INSTEAD)})\b", str(body))
            name = found and found[0]
        return name and (name, message_of(error))


def data_url(picture: bytes) -> bytes:
    """A jpg as the address that holds it whole."""
    return b"data:image/jpeg;base64," + base64.b64encode(picture)


def parsed(body: bytes) -> object:
    """An answer's value where it is JSON, else its text."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace")


def _error(body: object) -> object:
    """What of a body speaks of the error."""
    return body.get("error") or body if isinstance(body, dict) else body


def message_of(error: object) -> str:
    """The server's own sentence out of an error; of a page, its first words."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    elif isinstance(error, str):
        error = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", error)
    text = str(error if error is not None else "").strip()
    return first_line(text) if text else ""


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in [*HTTPStatus] else "an error"

"""What a captioner answered: a sentence, or why there is none. Text in, text out.

Models think aloud, apologise, stop in the middle and leave tokens of their own in what they say. Here this is
sorted out, for captioners of every kind alike; a narration holds clean sentences of one line. English refusals only.
Not here: models and servers (captioners.py), where answers are kept (journals.py).
"""

from __future__ import annotations

import re
import unicodedata
from html import unescape
from typing import NamedTuple

KINDS = {
    "failed": "no answer: the request or the picture",
    "empty": "an answer without a word",
    "cut": "the token limit ended the answer",
    "refused": "an apology or a refusal",
}  # of answers that are no whole sentence, with their meaning
STOP_AFTER = 10  # frames in a row without a sentence: the server is down or the model mute, for all that follow too


class Failed(NamedTuple):
    """In place of a sentence: why there is none, and its kind of KINDS."""

    why: str
    kind: str = "failed"


class Cut(str):
    """A sentence that the token limit ended; to all who read it a sentence like any other."""


def kind_of(answer: str | Failed) -> str:
    """A key of KINDS, or "" for a whole sentence."""
    if isinstance(answer, Failed):
        return answer.kind
    return "refused" if is_refusal(answer) else "cut" if isinstance(answer, Cut) else ""


def in_a_row(failures: int, answer: str | Failed) -> int:
    """How many failures there were one after the other that all pictures share: a refused picture is no sign of one."""
    if isinstance(answer, Failed):
        return failures + (answer.kind != "refused")
    return 0


# ---- a sentence ----

# The names that models' chat templates use, in <>, [] and Kimi's brackets.
_NAMES = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
OPEN = re.compile(rf"[<\[◁]{_NAMES}[>\]▷]", re.IGNORECASE)
_TAG = re.compile(rf"[<\[◁](/?){_NAMES}[>\]▷]", re.IGNORECASE)
_TOKENS = r"/?(?:s|pad|unk|bos|eos|mask|image|answer|(?:start|end)_of_(?:text|turn|utterance))"
# What a tokenizer would take for its own: CLIP's, and those that captioners use.
_SPECIAL = re.compile(rf"[<＜](?:[|｜][^<>|｜]{{1,40}}[|｜]|{_TOKENS})[>＞]", re.IGNORECASE)


def sentence(text: object, *, cut: bool, limit: int, one: bool = False) -> str | Failed:
    """A model's answer in one clean line: without its reasoning, special tokens and control characters.

    cut: whether the token limit ended it. limit: that number, named where nothing is left but half a thought.
    one: up to the first full stop alone.
    """
    if not isinstance(text, str):
        why = f"the token limit of {limit} ended the answer before its first word: raise --max_new_tokens"
        return Failed(why, "cut") if cut else Failed("the answer holds no text", "empty")
    said, unfinished = _without_reasoning(text)
    said = one_line(_SPECIAL.sub(" ", unescape(unescape(said))))  # CLIP's tokenizer undoes these escapes twice as well
    if any(c.isalnum() for c in said):
        said = Cut(said) if cut else said
        return first_sentence(said) if one else said
    if cut or unfinished:
        return Failed(f"the token limit of {limit} ended the answer in its reasoning: raise --max_new_tokens", "cut")
    return Failed("the answer is empty", "empty")


def _without_reasoning(text: str) -> tuple[str, bool]:
    """(what stands outside of blocks, whether the last block is unfinished); whatever it holds, a block ends once."""
    parts, inside, position = [], False, 0
    for tag in _TAG.finditer(text):
        if not inside:
            parts.append(text[position : tag.start()])
        if tag[1] and not inside:
            parts = []  # the prompt has opened this block
        inside, position = not tag[1], tag.end()
    return " ".join(parts if inside else [*parts, text[position:]]), inside


def one_line(text: str) -> str:
    """A text as it can be stored: without line breaks, control characters and half surrogate pairs."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


# A full stop that ends a sentence: not those of "Mr. Smith", "J. Smith", "e.g. a", "U.S. army" and "No. 7".
_STOP = re.compile(r"(?:[.!?]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[”』」]?)")
_SHORT = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|approx|No|Fig)$")


def first_sentence(text: str) -> str:
    """A text up to the full stop that ends its first sentence; a Cut text that has one is whole then."""
    for stop in _STOP.finditer(text):
        before, behind = text[: stop.start()], text[stop.end() :].lstrip()
        abbreviated = stop[0] == "." and _SHORT.search(before)
        if not any(c.isalnum() for c in before) or before.isdigit() or (behind and abbreviated):
            continue  # "1. A man ...", a name, an abbreviation
        return text[: stop.end()]
    return text


# ---- refusals ----

_CANNOT = (
    r"(?:(?:can ?not|can't) and (?:will not|won't)|can ?not|can't|could ?not|couldn't|won't(?: be able)?|will not|"
    r"(?:would|'d) rather not|(?:must|have to) decline|"
    r"(?:am|'m) (?:\w+ )?(?:unable|not able|not allowed|not permitted|not comfortable|not supposed|not going)|"
    r"(?:don't|do not) (?:feel comfortable|have the (?:ability|capability|capacity)))"
)
_TASK = (  # what is refused: a deed that only an assistant is asked for ...
    r"(?:assist|help|comply|fulfil+|provide|describ\w+|caption|process|view|access|open|generat\w+|creat\w+|write|"
    r"writing|answer|continu\w+|analy[sz]\w+|discuss\w*|engag\w+|complete|support|respond|interpret|do (?:that|this))"
)
_PICTURE = r"(?:images?|pictures?|photos?|photographs?|frames?|screenshots?|videos?|requests?|contents?)"
_LOOK = rf"(?:see|identify|recogni[sz]e|look at|make out|discern|find) (?:\w+ ){{0,3}}{_PICTURE}"  # ... or the picture
_NOT = rf"\bi ?(?:\w+ly )?{_CANNOT} (?:to )?(?:\w+ly )?(?:{_TASK}\b(?! but\b| noticing\b)|{_LOOK}\b)"
_REFUSAL = re.compile(
    "|".join((
        r"^(?:(?:i'm|i am|we're|we are) (?:\w+ ){0,2})?(?:sorry|afraid|(?:my )?apologies|i apologi[sz]e|unfortunately|"
        rf"regrettably)\b[^\"]{{0,90}}?\b(?:i|we) ?(?:\w+ )?{_CANNOT}",
        r"^(?:i'm|i am) (?:\w+ ){0,2}sorry[,.!]?(?:$| but\b)",
        rf"^(?:as|being) an? (?:\w+[- ]){{0,2}}(?:ai|artificial intelligence|language model|assistant)\b[^.\"]{{0,90}}?"
        rf"\bi ?(?:\w+ )?{_CANNOT}",
        rf"(?:^|[.!?] )(?:(?:however|but|so|unfortunately|therefore|and),? )*{_NOT}",
        rf"^i (?:don't|do not) (?:\w+ )?(?:see|have|find) (?:(?:any|an?|the|your|access|to) )+{_PICTURE}\b(?! of\b)",
        r"^(?:i'm|i am) (?:just |only )?an? (?:\w+[- ])*(?:ai|language model|assistant)\b",
        rf"^(?:this|the|your) {_PICTURE} (?:(?:was|has been|is|may|might|seems to|appears to) )*(?:be )?"
        r"(?:rejected|refused|flagged|violat\w+|against (?:our|the|my) )",
        rf"^(?:no {_PICTURE} (?:was|were|is|has been)|you (?:haven't|have not|didn't|did not)) (?:\w+ )?"
        r"(?:provided?|attach(?:ed)?|upload(?:ed)?|shared?|includ(?:ed?))\b",
        rf"^(?:please|could you|can you) (?:\w+ )?(?:upload|provide|share|attach|send) (?:\w+ )?{_PICTURE}\b",
    ))
)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")


def is_refusal(text: str) -> bool:
    """Whether an English answer is an apology or a refusal: it begins as one, or says "I" about its own task.

    What somebody in the picture says, or a sign, is no refusal: quoted words do not count.
    """
    plain = " ".join(_QUOTED.sub('"', text[:600].replace("’", "'")).lower().split()).lstrip("*_# ")
    return bool(_REFUSAL.search(plain))

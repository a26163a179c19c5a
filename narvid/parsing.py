"""Text to values: JSON, csv and YAML, each fault one InputError with file and line. No file is opened here (files.py).

Refused beside what the formats forbid themselves: nesting without end, NaN and numbers that no tensor holds, a name
that stands twice, NUL, half a surrogate pair, YAML's references.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import yaml

from narvid import InputError

ADVICE = "correct the file, or make it again"
DEEPEST = 100  # levels of lists and objects; no file of this field has ten
LARGEST = 2**63  # whole numbers beyond are no frame, count or seed, and tensors do not hold them
TOO_DEEP = f"lists or objects are nested more than {DEEPEST} deep"
NO_NUMBER = "a number is NaN, infinite or too large"
HALF = "a text holds NUL or half a surrogate pair (\\ud800 to \\udfff), which no file name and no tokenizer takes"
# Where the text of a JSON file holds such a fault; it is looked for only once the value is known to have it.
PLACES = {
    NO_NUMBER: r'(?<![\w"])-?(NaN|Infinity)(?![\w"])|\d[\d.]{18,}|\d[eE]\+?\d{3}',
    HALF: r"\\u0000|\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]",
}

# ---- JSON ----


def parse_json(text: str, path: str | Path, *, line: int | None = None, advice: str = ADVICE) -> object:
    """The value of a JSON text that was read of `path`; `line`: where it stands there, if it is one line of many."""
    try:
        value = _JSON.decode(text)
        fault = fault_of(value)
        position = match.start() if fault in PLACES and (match := re.search(PLACES[fault], text)) else 0
    except json.JSONDecodeError as error:
        fault, position = f"malformed JSON ({error.msg}, column {error.colno})", error.pos
        if not text.strip():
            fault = "is empty"
    except RecursionError:
        fault, position = TOO_DEEP, 0
    except _Twice as error:
        fault, position = f"{error} stands there twice", text.rfind(json.dumps(error.args[0], ensure_ascii=False))
    except ValueError:  # more digits than Python turns into a number
        fault, position = NO_NUMBER, re.search(r"\d{4000}|$", text).start()
    if fault:
        number = line or text.count("\n", 0, max(position, 0)) + 1
        raise InputError(f"{path}:{number}: {fault}; {advice}")
    return value


class _Twice(ValueError):
    """A name that stands twice in one object: the second value would replace the first without a word."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(name for name, _ in pairs if name in seen or seen.add(name)))
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_unique)
_NOT_A_LETTER = re.compile("[\0\ud800-\udfff]")


def fault_of(value: object) -> str | None:
    """What is wrong with a value that JSON or YAML allows and no file of ours may hold; level by level, unlike repr."""
    level = [value]
    for _ in range(DEEPEST):
        below = []
        for item in level:
            if isinstance(item, str):
                if _NOT_A_LETTER.search(item):
                    return HALF
            elif isinstance(item, (int, float)):
                if not (isfinite(item) if isinstance(item, float) else -LARGEST <= item < LARGEST):
                    return NO_NUMBER
            elif isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
        if not below:
            return None
        level = below
    return TOO_DEEP


_SEEN = re.compile(r"[^\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")


def is_blank(text: str) -> bool:
    """Whether nothing of a text is seen: white space, and letters without width, which spreadsheets leave behind."""
    return not _SEEN.search(text)


# ---- csv ----


def parse_csv(text: str, path: str | Path, columns: Sequence[str], *,
              advice: str = ADVICE) -> list[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) of each line of a csv text below its header, which must have these columns.

    Another number of fields than the header's, a column that stands twice and a text without a line are InputErrors.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        begins = rows[-1][0] + 1 if rows else 1
        raise InputError(f"{path}:{begins}: malformed csv ({error}); {advice}") from None
    header = rows[0][1] if rows else []
    if absent := [column for column in columns if column not in header]:
        empty = "" if header else "is empty: "
        raise InputError(f"{path}:1: {empty}no column {absent[0]!r} in the header {','.join(header)[:200]!r}; is this "
                         "the right file?")
    if len(rows) < 2:
        raise InputError(f"{path}: has no line below its header; {advice}")
    if twice := [column for column in columns if header.count(column) > 1]:
        raise InputError(f"{path}:1: column {twice[0]!r} stands there twice; {advice}")
    for number, row in rows:
        if len(row) != len(header):
            raise InputError(f"{path}:{number}: the line does not have the header's {len(header)} fields; {advice}")
    return [(number, dict(zip(header, row))) for number, row in rows[1:]]


# ---- YAML ----


def parse_yaml(text: str, path: str | Path, *, advice: str = ADVICE) -> dict[str, object]:
    """YAML of one 'flag: value' a line; without anchors and tags, which let a short file mean a huge one."""
    try:
        value = yaml.load(text, _PlainYaml)  # noqa: S506 (a SafeLoader)
        fault = fault_of(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{path}:{mark.line + 1 if mark else 1}: not YAML of one 'flag: value' a line "
                         f"({error.problem or error.context}); {advice}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: holds a character that YAML does not allow; {advice}") from None
    except RecursionError:
        fault = TOO_DEEP
    except ValueError as error:  # 2020-13-45 is a date to YAML, 6,000 digits are a number
        raise InputError(f"{path}: a value cannot be read ({error}); {advice}") from None
    if fault:
        raise InputError(f"{path}: {fault}; {advice}")
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{path}: must hold one 'flag: value' a line; {advice}")
    return value


class _PlainYaml(yaml.SafeLoader):
    """YAML as JSON with fewer quotes: no references, and no name twice in one mapping."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a reference (*name)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep=deep)

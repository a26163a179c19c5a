"""Mutate every kind of file that is read; a mutant must end in one sentence, or be read right.

    python scripts/fuzz.py --seconds 60                 fresh seeds; exit 1 at the first mutant that ends otherwise
    python scripts/fuzz.py --seed 7 --formats preset    what that seed makes of one kind

Right is what a plain reader makes of the same text (fuzz_formats.py). tests/test_fuzz.py runs some of each.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fuzz_formats import FORMATS, Format

from narvid import InputError
from narvid.flags import Parser, command, count, positive

SECONDS = 10  # that a mutant of a few kilobytes may take
DEEP = 20_000
FRAGMENTS = [b"NaN", b"1e999", b"-1", b'"\\ud83d"', b"\\u0000", b"\0", b"\xff", b"\xed\xa0\xbd", "\u2028".encode(),
             b"\r", b"[" * DEEP, b'{"a":' * DEEP, b"9" * 6000, b"0." + b"9" * 400, b"\n", b'"', b"{", b"}", b"null",
             b"\\", b",",
             b"*a", b"&a ", b"!!python/name:os.system", b"<<: ", b": ", b"- ", b"\t", b"<end_of_text>", b"../..", b"%s",
             b"\xef\xbb\xbf", b"true", b"- - - - ", b"\xc2\x85", b"'", b"#", b"? "]
VALUES = [None, True, [], {}, "", " ", -1, 0, 10**400, 1e308, 0.5, "\ud83d", "a\0b", ["x"], {"a": 1}, "x" * 10_000,
          2**63, "../..", "\u2028", float("nan"), [[[]]], "nan", "1"]


# -------------------------------------------------------------------------------------------------------- the mutants


def mutant(rng: random.Random, content: bytes) -> bytes:
    """One to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice((splice, splice, other_value, other_value, other_value, cut, doubled, flipped, line_ends))(
            rng, content)
    return content


def splice(rng: random.Random, content: bytes) -> bytes:
    """Something hostile in some place, or in place of some bytes."""
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(FRAGMENTS) + content[at + rng.choice((0, 0, 1, 5)):]


def other_value(rng: random.Random, content: bytes) -> bytes:
    """Another value, or another name, in a JSON text or in one line of it; in other texts another word."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    for part in (content, lines[number]):
        try:
            value = {"": json.loads(part)}
        except (ValueError, RecursionError):
            continue
        holder, key = rng.choice(list(places(value)))
        if isinstance(holder, dict) and key and rng.random() < 0.2:
            holder[rng.choice(["", "x", "video", "time"])] = holder.pop(key)
        elif rng.random() < 0.15:
            del holder[key]
        else:
            holder[key] = rng.choice(VALUES)
        new = json.dumps(value.get(""), ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
        return new if part is content else b"\n".join([*lines[:number], new, *lines[number + 1:]])
    words = lines[number].split(b" ")
    words[rng.randrange(len(words))] = str(rng.choice(VALUES)).encode("utf-8", "surrogatepass")
    return b"\n".join([*lines[:number], b" ".join(words), *lines[number + 1:]])


def places(value: object):
    """(holder, key) of every value inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def cut(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.choices(range(len(content) + 1), k=2))
    return content[:start] if rng.random() < 0.5 else content[:start] + content[end:]


def doubled(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.choices(range(len(content) + 1), k=2))
    return content[:end] + content[start:]


def flipped(rng: random.Random, content: bytes) -> bytes:
    if not content:
        return content
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def line_ends(rng: random.Random, content: bytes) -> bytes:
    return rng.choice((content.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + content, content + b"\n\n", content.rstrip(),
                       content.replace(b"\n", b"\n\n"), content.decode("utf-8", "replace").encode("utf-16")))


# ------------------------------------------------------------------------------------------------------------ the run


def accepted(form: Format, content: bytes, folder: Path) -> bool:
    """Whether a content is read; AssertionError where it ends in anything but one sentence or the right value."""
    path = folder / form.name / "n.jsonl.parts" / form.name  # journals expect this folder, and nobody minds it
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, other in {**form.beside, form.name: content}.items():
        (path.parent / name).write_bytes(other)
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        value = form.read(path)
    except (InputError, SystemExit) as refused:
        sentence = str(refused)
        assert sentence and "\n" not in sentence and len(sentence) < 1500, f"no one sentence: {sentence[:2000]!r}"
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    right = form.right(content if form.name.endswith(".pkl") else content.decode("utf-8-sig", "replace"))
    assert value == right or (isinstance(value, set) and value <= right), f"read as {value!r}, right is {right!r}"
    return True


class TooSlow(BaseException):
    """No Exception, which a reader of foreign formats may catch."""


def too_slow(*_):
    raise TooSlow(f"takes more than {SECONDS} s")


def fuzz(name: str, seed: int, mutants: int, folder: Path) -> int:
    """So many mutants of a format -> how many were accepted. One that is neither read right nor refused is kept."""
    form, rng, good = FORMATS[name], random.Random(f"{name} {seed}"), 0
    for number in range(mutants):
        content = mutant(rng, form.sample)
        try:
            good += accepted(form, content, folder)
        except (Exception, TooSlow) as error:
            kept = Path(tempfile.gettempdir(), f"fuzz-{name.replace(' ', '_')}-{seed}-{number}-{form.name}")
            kept.write_bytes(content)
            raise AssertionError(f"{name}, seed {seed}, mutant {number}, kept as {kept}: {type(error).__name__}: "
                                 f"{str(error)[:300]}") from error
    return good


def main(argv: list[str] | None = None) -> None:
    """Rounds over all formats with one seed after the other."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=positive, default=60, help="how long [60]")
    parser.add_argument("--seed", type=count, help="this one alone [fresh ones]")
    parser.add_argument("--mutants", type=positive, default=50, help="of a format and a seed [50]")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="[all]")
    args = parser.parse_args(argv)
    end, tried, good = time.monotonic() + args.seconds, dict.fromkeys(args.formats, 0), dict.fromkeys(args.formats, 0)
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little")
    with tempfile.TemporaryDirectory() as folder:
        while True:
            for name in args.formats:
                try:
                    good[name] += fuzz(name, seed, args.mutants, Path(folder))
                except AssertionError as wrong:
                    sys.exit(f"error: {wrong}")
                tried[name] += args.mutants
            seed += 1
            if args.seed is not None or time.monotonic() > end:
                break
    for name in args.formats:
        print(f"{name:26} {tried[name]:7,} mutants, {good[name]:6,} read right, {tried[name] - good[name]:7,} refused")


if __name__ == "__main__":
    command(main)

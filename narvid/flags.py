"""Flags as this project wants them: one sentence for a mistake, checked numbers, presets on disk as argv.

Nothing here knows a particular flag; they are declared in main_task_retrieval.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from math import inf

from narvid import InputError
from narvid.files import read_yaml


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake instead of the usage of fifty flags."""

    where = ""  # "FILE: " while flags that stand in a file are looked at

    def error(self, message: str):
        sys.exit(f"error: {self.where}{message} (--help lists every flag)")


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def count(text: str) -> int:
    """A whole number from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 up")
    return value


def number(text: str) -> float:
    """A number from 0 up."""
    value = float(text)
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def read_preset(path: str, parser: argparse.ArgumentParser) -> dict:
    """A YAML preset as {flag: value}; what is no such thing ends in parser.error."""
    try:
        return read_yaml(path)
    except InputError as error:
        parser.error(f"--config {error}")


def preset_argv(preset: dict, path: str, parser: Parser) -> list[str]:
    """A preset as argv; values are checked here because argparse would not say which file they stand in."""
    argv = as_argv(preset, path, parser)
    parser.where = f"{path}: "
    parser.parse_args([*argv, "--output_dir", "."])  # only to name the file where a value is wrong
    parser.where = ""
    return argv


def as_argv(values: dict, path: str, parser: argparse.ArgumentParser) -> list[str]:
    """{flag: value} from `path` as argv; an unknown name or a value that no flag can take ends in parser.error."""
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    argv = []
    for key, value in values.items():
        if key not in actions:
            parser.error(f"{path}: there is no flag {key!r}")
        if value is None:
            parser.error(f"{path}: {key} has no value; give one, or leave the line out")
        if isinstance(actions[key], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                parser.error(f"{path}: {key} must be true or false, not {value!r}")
            argv.append(f"--{'' if value else 'no-'}{key}")
        else:
            argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def command(main: Callable[[], object]) -> None:
    """Run a command's main; a user's mistake, or a file system's refusal, ends it in one sentence with status 1."""
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")

"""Flags as this project wants them: one sentence for a mistake, checked numbers, presets on disk as argv; the end of a
command, also of one that ends by a fault of our own.

Nothing here knows a particular flag; the trainer's are declared in narvid/run/settings.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

from narvid import InputError, one_line
from narvid.files import misread, read_yaml, write_text
from narvid.parsing import fault_of


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake instead of the usage of fifty flags."""

    where = ""  # "FILE: " while flags that stand in a file are looked at

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; text that is no UTF-8 is refused here, before a run writes it into its files."""
        texts = [text for text in (sys.argv[1:] if args is None else args) if isinstance(text, str)]
        if fault := misread(texts):
            self.error(fault)
        for text in texts:
            if fault_of(text):
                self.error(f"{ascii(text)} is no UTF-8 text: rename it, or write it otherwise")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        sys.exit(one_line(f"error: {self.where}{message} (--help lists every flag)"))


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """--help with each flag's default; where that is None, the flag's own text says what stands for it."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


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


# ---- how a command ends ----


def command(main: Callable[[], object]) -> None:
    """Run a command's main as the process that it is: every bad end is one sentence and exit status 1.

    A user's mistake, or a file system's refusal, has its own sentence; what nobody foresaw has `fault_of_ours`.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us (>&-): else the next file would be taken for it
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal need not know every letter of a caption
    try:
        main()
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end complains
            sys.exit(1)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    except Exception as error:  # the net
        sys.exit(fault_of_ours(error, sys.argv[1:]))


FAULT = "this is a fault of this program, not of your files"


def fault_of_ours(error: Exception, argv: Sequence[str]) -> str:
    """The one line for an error that nobody foresaw: what it is, where the traceback was written, what is saved.

    The traceback goes to the run that is being written, else to the folder for temporary files: a foreign file in a
    folder that is not a run yet would keep the next one out.
    """
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return f"error: out of memory ({what}); lower the batch size, or in training set --micro_batch"
    given = dict(zip(argv, argv[1:])) | dict(text.split("=", 1) for text in argv if "=" in text)
    run = Path(given.get("--output_dir") or "")
    is_run = "--output_dir" in given and (run / "config.yaml").is_file()
    name = f"fault-{os.uname().nodename}-{os.getpid()}.txt"
    try:
        path = (run if is_run else Path(tempfile.gettempdir())) / name
        write_text(path, "".join(traceback.format_exception(error)))
        where = f"the full traceback is in {path}, please report it"
    except (InputError, OSError) as refused:  # the latter: there is no folder for temporary files
        last = " ".join(traceback.format_tb(error.__traceback__)[-1].split())
        where = f"its traceback could not be written ({refused}), it ends with {last}"
    saved = "files that were written are whole"
    if is_run and (run / "last.pt").is_file():
        saved = f"{run / 'last.pt'} is whole, --resume auto goes on from it"
    return f"error: {FAULT} ({what}); {where}; {saved}"

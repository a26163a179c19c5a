"""tqdm as this project wants it: a bar on a terminal; in a log file one line at most every 30 seconds."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from time import monotonic
from typing import TextIO

from tqdm import tqdm as every_state

SECONDS = 30


class tqdm(every_state):
    """tqdm.tqdm, of whose many states a file keeps one each half minute and the last; nothing of short work."""

    next_line = 0.0  # when a file may get its next line; shared by all bars of a process

    def __init__(self, *args, **options):
        self.in_file, self.started, self.written = not sys.stderr.isatty(), monotonic(), None
        if self.in_file:  # `display` alone chooses; miniters=1 keeps tqdm's own thread out
            options |= {"file": _Lines(), "mininterval": 0, "miniters": 1, "delay": 0, "smoothing": 0, "leave": False}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """What every redraw of tqdm calls: in a file, a line if one is due and there is something new to say."""
        if not self.in_file:
            return super().display(msg, pos)
        if msg is None and monotonic() >= max(self.started + SECONDS, tqdm.next_line):
            self._write_line()
        return True

    def close(self) -> None:
        """The end of long work is always written; later lines then wait, so that the mean stays one in 30 seconds."""
        if self.in_file and not getattr(self, "disable", True) and monotonic() >= self.started + SECONDS:
            with self.get_lock():
                self._write_line()
        super().close()

    def _write_line(self) -> None:
        if self.n != self.written:  # a long step, or a second redraw of the same state, says nothing new
            self.written = self.n
            tqdm.next_line = max(monotonic(), tqdm.next_line) + SECONDS
            super().display(pos=0)  # below no other bar: a file has no place to move to


def say(text: str, stream: TextIO | None = None) -> None:
    """Print above a progress bar, to stdout. Where nobody reads (`| head` has left, the disk of a log is full), work
    goes on.
    """
    stream = stream or sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in it, and all that follows


def remark(text: str) -> None:
    """`say` to stderr what is no result, once for all processes of this machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        say(text, sys.stderr)


class _Lines:
    """Stands for stderr: what tqdm redraws in place becomes a line each time."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            with suppress(OSError):  # nobody reads any more
                sys.stderr.write(text + "\n")

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

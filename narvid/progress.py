"""tqdm as this project wants it: a bar on a terminal; in a log file one line at most every 30 seconds."""

from __future__ import annotations

import sys

from tqdm import tqdm as every_state

SECONDS = 30


class tqdm(every_state):
    """tqdm.tqdm, of whose many states a file keeps one each half minute, and nothing of short work."""

    def __init__(self, *args, **options):
        if not sys.stderr.isatty():
            options |= {"file": _Lines(), "mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS,
                        "leave": False}
        super().__init__(*args, **options)


class _Lines:
    """Stands for stderr: what tqdm redraws in place becomes a line each time."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()

"""Progress bars: tqdm on a terminal; in a log file one line at most every 30 seconds."""

from __future__ import annotations

import sys

from tqdm import tqdm

SECONDS = 30


def bar(iterable=None, **options) -> tqdm:
    """tqdm(iterable, **options), of whose many states a file keeps one each half minute and nothing of short work."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "leave": False}
    return tqdm(iterable, **options)


class _Lines:
    """Stands for stderr: what tqdm redraws in place becomes a line each time."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()

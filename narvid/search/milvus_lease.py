"""One process writes an index in Milvus: its lease, a row that says who holds it and that it is alive.

The lease is a row of NAME_facts: holder, a word of its own, and a number that it raises every BEAT
seconds. Another process that wants to write looks at the row: where the number moves it gives up and names the holder;
where it stands still for STALE seconds by its own clock (clocks of two machines are never compared) the holder is
taken for dead. Milvus cannot compare and set, so it writes its word, waits SETTLE seconds and looks whether it is still
there; a holder that finds another's word, or that could not raise its number for STALE seconds, writes nothing more.
Here: taking, holding and giving it back. Not here: the row's collection (milvus.py).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from narvid import InputError
from narvid.progress import remark

if TYPE_CHECKING:
    from narvid.search.milvus import Milvus

BEAT, STALE, SETTLE = 5.0, 20.0, 1.0  # seconds


class Lease:
    """The right to write, held by a thread of its own until end()."""

    def __init__(self, milvus: Milvus):
        self.milvus, self.word, self.number, self.lost = milvus, uuid4().hex, 0, ""
        self.holder = f"{socket.gethostname()}, process {os.getpid()}"
        self.where = milvus.where
        self._wait_for_another()
        self._raise()
        time.sleep(SETTLE)
        self._look()
        self.check()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """InputError where another process has become the writer, or may have."""
        if not self.lost and time.monotonic() - self._raised > STALE:  # this process stood still, or Milvus did
            self._look()
            self._raise()
        if self.lost:
            raise InputError(f"{self.where} is being written by {self.lost}, which took this process for dead: start "
                             "again when that one has ended")

    def end(self) -> None:
        """Give the right back."""
        self._ended.set()
        self._thread.join()
        with suppress(InputError):
            self._look()
            if not self.lost:
                self.milvus.set_fact("writer", None, checked=False)

    def _wait_for_another(self) -> None:
        before, since = self._row(), time.monotonic()
        if before is not None:
            remark(f"{self.where}: looking whether {before['holder']} still writes, for {STALE:g} s")
        while (row := before) is not None and time.monotonic() - since < STALE:
            time.sleep(min(BEAT, STALE) / 4)
            if (row := self._row()) != before:
                break
        if row is not None and row != before:
            raise InputError(f"{self.where} is being written by {row['holder']}: wait for it")

    def _row(self) -> dict | None:
        try:
            return self.milvus.fact("writer")
        except KeyError:
            return None

    def _raise(self) -> None:
        if not self.lost:
            self.number += 1
            self._raised = time.monotonic()  # before: what takes long counts
            row = {"holder": self.holder, "word": self.word, "number": self.number}
            self.milvus.set_fact("writer", row, checked=False)

    def _look(self) -> None:
        row = self._row()
        if row is not None and row["word"] != self.word:
            self.lost = row["holder"]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT) and not self.lost:
            with suppress(InputError):  # nobody answers: the next write says so
                self._look()
                self._raise()

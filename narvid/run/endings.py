"""How a run ends before its time: a refusal, a signal, a process that is lost. One sentence each, and an exit code.

Here: who says the sentence, what torchrun gets to print, and signals, which wait for the end of a step. Not here: what
is saved then (main_task_retrieval.py).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from narvid import InputError, distributed
from narvid.files import write_json
from narvid.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last is what Slurm is often set to send
AGAIN = 1.0  # seconds: what comes sooner is the first signal once more, from the terminal and from torchrun


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end, and the step is over. `saved`: what there is to go on with."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number, self.saved = number, "nothing new had to be saved"


class Signals:
    """Signals of SIGNALS while this is entered: `number` is the first that came, 0 before.

    A second one, AGAIN later, ends the process at once, wherever it is; files are written under another name until they
    are whole. A signal that was ignored before (nohup) stays so. Loader workers, which a terminal's Ctrl-C reaches too,
    leave the decision to their parent.
    """

    number = 0

    def __init__(self):
        self._at_once, self._before = False, {}

    def __enter__(self) -> Signals:
        global _entered
        if threading.current_thread() is threading.main_thread():  # else Python does not allow it
            self._wake, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._before = {n: signal.signal(n, self._hear) for n in SIGNALS
                            if signal.getsignal(n) != signal.SIG_IGN}
            self._wake_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            threading.Thread(target=_leave_at_the_second, args=(self._wake, set(self._before)), daemon=True).start()
            _entered = self
        return self

    def __exit__(self, *error) -> None:
        global _entered
        if self._before:
            signal.set_wakeup_fd(self._wake_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._told)  # the thread reads the end and goes
        _entered = None

    def _hear(self, number: int, _frame) -> None:
        self.number = self.number or number
        if self._at_once:
            raise Stopped(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped where it comes: nothing there has to be finished."""
        self._at_once = True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self._at_once = False


def _leave_at_the_second(wake: int, signals: set[int]) -> None:
    """In a thread of its own: the main one may wait for a process that never comes, where no handler runs."""
    first = None
    while number := os.read(wake, 1):
        if number[0] in signals:
            first = first or time.monotonic()
            if time.monotonic() - first > AGAIN:
                os._exit(128 + number[0])
    os.close(wake)


_entered: Signals | None = None


def _forget_in_child() -> None:
    if _entered is not None:
        signal.set_wakeup_fd(-1)
        for number in _entered._before:
            # torch gives SIGTERM a handler in its workers: its last resort against one that hangs.
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Around a whole run: an InputError, Stopped or a lost process ends it in one sentence with an exit code.

    All ranks may come here together. Rank 0 speaks for all if all say the same; torchrun's report, which cannot be
    kept from being printed, ends with the sentence.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        _leave(f"stopped by {name}: {stopped.saved}; --resume auto goes on", 128 + stopped.number, speaks=rank == 0)
    except InputError as error:
        said_by_all = isinstance(error, distributed.SaidByAll)
        if said_by_all:
            distributed.stop()
        _leave(f"error: {error}", 1, speaks=rank == 0 or not said_by_all)
    except RuntimeError as error:
        if not distributed.is_lost(error):
            raise
        saved = getattr(error, "saved", "nothing new had to be saved")
        # Rank 1 speaks too: it may be rank 0 that is gone.
        _leave(f"error: process {rank} lost another process of this run, which has ended or has not answered in time "
               f"(--rank_timeout); {saved}; --resume auto goes on", 1, speaks=rank < 2)
    distributed.stop()


def _leave(sentence: str, code: int, *, speaks: bool) -> None:
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
        with suppress(InputError):  # a full disk must not hide the sentence
            write_json(report, {"message": said})
    if code == 1 and speaks:
        sys.exit(sentence)  # the interpreter prints it
    if speaks:
        say(sentence, sys.stderr)
    sys.exit(code)

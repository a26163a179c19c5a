"""Runs of the trainer as processes of their own, several at a time, each with its part of the machine.

Here: which runs have not ended, who gets which GPUs, what a run that failed has said. Not here: which runs there are
(sweep.py, scripts/ablate_demo.py), training (main_task_retrieval.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from narvid import InputError
from narvid.progress import tqdm
from narvid.run import same_run, settings
from narvid.run.run_dir import RunDir

TRAINER = Path(__file__).resolve().parents[2] / "main_task_retrieval.py"


class Place(NamedTuple):
    """What one run gets of the machine."""

    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them, a process each; (): the CPU
    threads: int | None = None  # of a run on the CPU; None: torch's own choice


class Ended(NamedTuple):
    """A run whose process has ended."""

    name: str
    seconds: float
    said: str | None  # why it failed; None: it did not


def gpus_here() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES knows them by."""
    found = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:found] if named else [str(number) for number in range(found)]


def places(gpus: list[str], gpus_a_run: int | None, jobs: int | None) -> list[Place]:
    """What each of the runs under way at one time gets.

    gpus_a_run: None gives all of them to one run. jobs: runs at a time; None is one a group of GPUs, or one on the CPU.
    InputError where there are fewer GPUs than a run wants. GPUs that make no whole group stay unused.
    """
    if not gpus:
        if gpus_a_run not in (None, 1):
            raise InputError(f"--gpus_a_run {gpus_a_run}: this machine has no GPU that torch can use; leave it out")
        jobs = jobs or 1
        own = os.environ.get("OMP_NUM_THREADS", "")  # who has said it knows better
        return [Place(threads=int(own) if own.isdecimal() else max(1, (os.cpu_count() or 1) // jobs))] * jobs
    size = gpus_a_run or len(gpus)
    if size > len(gpus):
        raise InputError(f"--gpus_a_run {size}: this machine has {len(gpus)}; say {len(gpus)} or less, or all")
    groups = [tuple(gpus[start:start + size]) for start in range(0, len(gpus) - size + 1, size)]
    return [Place(groups[i % len(groups)]) for i in range(jobs or len(groups))]


def unfinished(runs: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of {name: the trainer's argv} that have not ended; InputError where a folder holds a run of other flags."""
    todo = {}
    for name, argv in runs.items():
        args = settings.parse_args(argv)
        run = RunDir(args.output_dir, vars(args), writes=False)
        if (before := run.settings()) is not None:
            same_run.check_settings(run.path, before, args)
        if not run.final_result():
            todo[name] = argv
    return todo


def call_of(argv: list[str], place: Place) -> tuple[list[str], dict[str, str]]:
    """A run's process: its command, and what its environment has beside ours."""
    launch, environment = [], {}
    if len(place.gpus) > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(len(place.gpus))]
    if place.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    if place.threads:
        environment["OMP_NUM_THREADS"] = str(place.threads)
    return [sys.executable, *launch, str(TRAINER), *argv], environment


class Children:
    """The processes under way; once they were told to end, no other begins."""

    def __init__(self):
        self.under_way: set[subprocess.Popen] = set()
        self.stopping, self._lock = False, threading.Lock()

    def train(self, argv: list[str], place: Place) -> str | None:
        """One run to its end -> None, or the last thing that it said where it failed."""
        command, environment = call_of(argv, place)
        with self._lock:
            if self.stopping:
                return "stopped"
            child = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.PIPE, text=True, errors="replace")
            self.under_way.add(child)
        try:
            said = child.communicate()[1].strip().splitlines()
        finally:
            self.under_way.discard(child)
        if not child.returncode:
            return None
        sentences = [line.strip() for line in said if line.strip().startswith(("error: ", "stopped by "))]
        last = (sentences or said or [f"exit status {child.returncode}"])[-1]
        return last.removeprefix("error: ")

    def stop(self) -> None:
        """The trainer ends after its step, and saves before that."""
        with self._lock:
            self.stopping = True
            for child in self.under_way:
                child.terminate()


@contextmanager
def _term_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM is a Ctrl-C: no run may be left behind without its parent."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_all(runs: dict[str, list[str]], where: list[Place], *, ended: Callable[[Ended], None]) -> None:
    """Every run of {name: the trainer's argv}, in this order, as many at a time as there are places.

    ended: called as each one ends, whichever it is; what it raises keeps the runs that have not begun from beginning.
    Ctrl-C and SIGTERM end those under way, which save first; the same call goes on with them.
    """
    free: SimpleQueue[Place] = SimpleQueue()
    for place in where:
        free.put(place)
    children = Children()

    def one(name: str) -> Ended:
        place, start = free.get(), time.monotonic()
        try:
            said = children.train(runs[name], place)
            return Ended(name, time.monotonic() - start, said)
        finally:
            free.put(place)

    with _term_as_interrupt(), ThreadPoolExecutor(len(where)) as pool:
        waiting = [pool.submit(one, name) for name in runs]
        try:
            for done in tqdm(as_completed(waiting), total=len(runs), desc="runs", unit="run"):
                ended(done.result())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those under way come to their end; the next call skips them
            raise

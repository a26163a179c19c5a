"""The order of training pairs, and the loader that hands batches over from its workers. What an item is: datasets.py.

Legend: B queries.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from narvid import InputError
from narvid.progress import remark

SHARED_MEMORY = Path("/dev/shm")  # a container has 64 MiB unless its owner asked for more


class PairSampler(Sampler):
    """This rank's part of each global batch of query indices, the same global batches for any number of ranks.

    The order of an epoch comes from (seed, epoch) alone. One optimiser step takes `batch_size` queries over all ranks
    in `accumulation` micro-batches; what does not fill a last batch is dropped. `set(epoch, step)` says where to go on.
    """

    def __init__(self, n: int, batch_size: int, *, rank: int, world_size: int, seed: int, accumulation: int = 1):
        if batch_size % (world_size * accumulation):
            raise InputError(f"--batch_size {batch_size} is global and must divide by {world_size} processes x "
                             f"{accumulation} accumulation steps")
        if n < batch_size:
            raise InputError(f"{n} training pairs do not fill one batch of {batch_size} (on {world_size} processes); "
                             "lower --batch_size or the number of processes")
        self.n, self.batch_size, self.rank, self.world_size = n, batch_size, rank, world_size
        self.seed, self.accumulation = seed, accumulation
        self.epoch = self.step = 0

    @property
    def part(self) -> int:
        """Queries of this rank in a micro-batch."""
        return self.batch_size // self.accumulation // self.world_size

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return self.n // self.batch_size

    def set(self, epoch: int, step: int) -> None:
        """The next iteration gives epoch `epoch` from optimiser step `step` on."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        micro, part = self.batch_size // self.accumulation, self.part
        for start in range(self.step * self.batch_size, self.steps * self.batch_size, micro):
            yield order[start + self.rank * part:][:part].tolist()


class _Loader(DataLoader):
    """A worker that ends is noticed when its next batch is waited for, and not before: as an InputError.

    torch raises where its parent is at that moment, in the middle of an update or of a file too. A signal to the whole
    process group ends the workers with the step still to be finished and saved.
    """

    def __iter__(self) -> Iterator:
        with self._heeding():
            batches = super().__iter__()
        if self.num_workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self._heeded(batches)

    def _heeded(self, batches: Iterator) -> Iterator:
        with self._heeding():
            yield from batches

    @contextmanager
    def _heeding(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise InputError(f"a process that loads frames has ended before its time ({error}): the system does that "
                             f"where memory ends. Give --num_workers less than {self.num_workers}, leave out "
                             f"--cache_frames, or enlarge {SHARED_MEMORY}; --resume auto goes on") from error


def make_loader(dataset: Dataset, collate_fn, sampler, *, num_workers: int) -> DataLoader:
    """DataLoader over `sampler`, which yields lists of items; with fewer workers where shared memory is small.

    The number of workers changes no batch. On Linux they are forked, with every Python: one that starts anew imports
    torch for seconds, and would be sent the whole corpus.
    """
    largest = sampler.part if isinstance(sampler, PairSampler) else max(map(len, sampler), default=0)
    num_workers = _workers_that_fit(num_workers, largest * getattr(dataset, "item_bytes", 0))
    return _Loader(dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=num_workers,
                   multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
                   pin_memory=torch.cuda.is_available(), persistent_workers=num_workers > 0)


def free_shared_memory() -> float:
    """Bytes, 0 where it may not be written; infinite where the system gives shared memory no folder."""
    if SHARED_MEMORY.exists() and not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else inf


def _workers_that_fit(num_workers: int, batch: int) -> int:
    """How many workers have room for their batches, two each and one in use, for all processes of this machine.

    A worker that has none waits for ever, or dies with a bus error; one process without workers needs no room.
    """
    free = free_shared_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not num_workers or 0 < free >= (2 * num_workers + 1) * batch:
        return num_workers
    fit = max(0, int((free / batch - 1) / 2)) if free else 0
    remark(f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, and {num_workers} loader workers need "
           f"{(2 * num_workers + 1) * batch / 2**20:,.0f} MiB for batches of {batch / 2**20:,.0f} MiB: {fit} workers "
           "are used, which is slower; enlarge it (docker run --shm-size=16g, or --ipc=host)")
    return fit

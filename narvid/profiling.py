"""Where a training step's time goes: marks set by the code that is measured, a clock that reads them, a table.

Marks cost next to nothing while no profile runs, and no synchronisation while one does. Time is exclusive: it belongs
to the innermost mark alone. On a CPU it is wall time. On a GPU it is that of its stream, between events: time in
which the GPU has nothing to do counts where it waits (for a batch, say). No tensors, no flags, no files here.
"""

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

STAGES = ("data", "towers", "heads", "matching", "loss", "backward", "optimiser", "communication", "rest")
WARM_UP = 3  # steps that are not measured: allocators, autotuning and --compile are still at work

_running: list["Profile"] = []  # at most one, while one of its steps is under way


class Profile:
    """A clock for `steps` steps of a run, after `warm_up` others; 0: never."""

    def __init__(self, steps: int, device: torch.device, warm_up: int = WARM_UP):
        self.steps, self.warm_up, self.on_gpu, self.seen = steps, warm_up, device.type == "cuda", 0
        self.marks: list[tuple] = []  # (moment, the stage that begins; None: no step is under way)
        self.stack: list[str] = []  # the stages now open, the innermost last

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a whole training step; what no `stage` inside claims is "rest"."""
        self.seen += 1
        if not self.warm_up < self.seen <= self.warm_up + self.steps:
            yield
            return
        if self.on_gpu and not self.marks:
            torch.cuda.reset_peak_memory_stats()
        _running.append(self)
        try:
            with stage("rest"):
                yield
        finally:
            _running.clear()

    def begin(self, name: str) -> None:
        """A stage opens inside the one now open."""
        self.stack.append(name)
        self._mark()

    def turn(self, name: str) -> None:
        """From here on the innermost stage goes by another name."""
        self.stack[-1] = name
        self._mark()

    def end(self) -> None:
        """The innermost stage is over, the one around it goes on."""
        self.stack.pop()
        self._mark()

    def _mark(self) -> None:
        now = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((now, self.stack[-1] if self.stack else None))

    def cut_short(self) -> str | None:
        """At the end of a run that had too few steps: what was measured of them, and a sentence; else None."""
        asked, measured = self.steps, self.seen - self.warm_up
        if not asked or measured >= asked:
            return None
        self.steps = max(measured, 0)
        said = (f"--profile {asked}: the run ended after {self.seen} steps, of which the first {self.warm_up} are not "
                "measured")
        return "\n".join(filter(None, [self.table(), said]))

    def table(self) -> str | None:
        """Once all steps are measured: ms a step and share of every stage; before and after that None."""
        if not self.marks or self.seen < self.warm_up + self.steps:
            return None
        if self.on_gpu:
            torch.cuda.synchronize()
        spent = dict.fromkeys(STAGES, 0.0)  # ms
        for (start, name), (end, _) in pairwise(self.marks):
            if name is not None:
                spent[name] += start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)
        self.marks.clear()
        whole = sum(spent.values())
        lines = [f"{'':13} {'ms a step':>10} {'share':>7}   mean of {self.steps} steps"]
        lines += [f"{name:13} {ms / self.steps:10.1f} {ms / whole:7.1%}" for name, ms in spent.items()]
        lines += [f"{'step':13} {whole / self.steps:10.1f}"]
        if self.on_gpu:
            lines += [f"peak memory on the GPU {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB"]
        return "\n".join(lines)


class Interval:
    """What is measured between two logged lines: pairs a second, the share of time waiting for data, peak memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self.start, self.waited, self.pairs = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        """The time inside is spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def measured(self) -> dict[str, float]:
        """{"pairs/s", "data_wait"} since the last call, and on a GPU "peak_GiB" so far."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        values = {"pairs/s": self.pairs / seconds, "data_wait": self.waited / seconds}
        if self.device.type == "cuda":
            values["peak_GiB"] = torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        self._begin()
        return values


class stage(contextlib.ContextDecorator):
    """Marks what runs inside `with stage(name)`, or a function below `@stage(name)`, as one of STAGES."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        if _running:
            _running[0].begin(self.name)

    def __exit__(self, *error) -> None:
        if _running:
            _running[0].end()


def all_reduce(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own reduction of a bucket of gradients, as a hook that sees the last one leave.

    The others travel while the backward pass goes on and cost it nothing that a mark could show; from the last one on
    it only waits. That is communication.
    """
    if bucket.is_last() and _running:
        _running[0].turn("communication")
    return allreduce_hook(group, bucket)

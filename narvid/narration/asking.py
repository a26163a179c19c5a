"""Jobs -> answers, as fast as the captioner takes them: batches for a model of this process, prepared by workers ahead
of it; many requests at once for a server. Every answer goes to the journal as it comes.

Not here: which jobs there are (narrate.py), captioners (captioners.py, chat_server.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TextIO

from narvid import InputError
from narvid.narration.answers import STOP_AFTER, Failed, in_a_row, kind_of
from narvid.narration.captioners import Captioner, LocalCaptioner
from narvid.narration.journals import append
from narvid.narration.pictures import size_of
from narvid.narration.preparing import prepared_ahead, read_picture
from narvid.progress import tqdm

FRAMES = 16  # that a local model captions at once


class Job(NamedTuple):
    """One frame to caption, the times of the frames that share its sentence, and how often it was asked before."""

    video: str
    path: Path
    time: float
    shared: list[float]
    again: int

    @property
    def key(self) -> str:
        """What a sampled frame's random numbers come from; asked again, it has others."""
        return f"{self.video} {self.time}" + f" again {self.again}" * bool(self.again)


def caption_all(jobs: Sequence[Job], captioner: Captioner, journal: TextIO, maker: tuple[str, str], *,
                at_once: int, workers: int, shows: bool) -> Counter[str]:
    """Caption the jobs; each answer goes to the journal as it comes. Returns how many of each kind ("": a sentence).

    at_once: frames of a batch, or requests under way. workers: processes that prepare pictures for a local model.
    """
    kinds, failures = Counter(), 0
    if isinstance(captioner, LocalCaptioner):
        answers = by_model(alike(jobs), captioner, at_once, workers)
    else:
        answers = by_server(jobs, captioner, at_once)
    with tqdm(total=len(jobs), unit="frame", disable=not (shows and jobs), smoothing=0.05) as bar:
        for job, answer in answers:
            append(journal, maker, job.video, job.time, job.shared, answer, job.again)
            bar.update()
            kinds[kind_of(answer)] += 1
            failures = in_a_row(failures, answer)
            if failures == STOP_AFTER:
                raise InputError(
                    f"{failures} frames in a row got no sentence, the last one because: {answer.why}. "
                    "What is captioned is kept; once that is mended, the same command continues"
                )
    return kinds


def alike(jobs: Sequence[Job]) -> list[Job]:
    """Jobs ordered by the size of their pictures: a batch costs what its largest picture costs for all.

    The frames of a video are of one size, so one of each is looked at.
    """
    size = {job.video: job.path for job in reversed(jobs)}
    size = {video: size_of(path) for video, path in size.items()}
    return sorted(jobs, key=lambda job: size[job.video])


def by_model(jobs: Sequence[Job], captioner: LocalCaptioner, size: int,
             workers: int) -> Iterator[tuple[Job, str | Failed]]:
    """(job, answer) batch by batch; the pictures of the next ones are prepared meanwhile."""
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    paths = [[job.path for job in batch] for batch in batches]
    prepared = prepared_ahead(captioner.prepare, paths, single=captioner.samples, workers=min(workers, len(batches)))
    for batch, inputs in zip(batches, prepared, strict=True):
        keys = [job.key for job in batch] if captioner.samples else None
        yield from zip(batch, captioner.generate(inputs, keys), strict=True)


def by_server(jobs: Sequence[Job], captioner: Captioner, requests: int) -> Iterator[tuple[Job, str | Failed]]:
    """(job, answer) as they come, of this many requests under way."""

    def ask(job: Job) -> str | Failed:
        return captioner.caption([read_picture(job.path)], [job.key])[0]

    pool, done, running = ThreadPoolExecutor(requests), SimpleQueue(), {}
    try:
        for number, job in enumerate(jobs, 1):
            future = pool.submit(ask, job)
            running[future] = job
            future.add_done_callback(done.put)  # to look at all that run each time one is done would cost more
            while len(running) == requests or (running and number == len(jobs)):
                future = done.get()
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)

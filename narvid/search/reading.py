"""Which files of a folder are videos, how a long one is cut into windows, many of them read by worker processes.

Here: all before a model is asked. Not here: what is read of a video (narvid/data/videos.py), sentences (sentences.py),
features and what is indexed already (build.py).
This file must not import torch: its worker processes do without it (a second and 200 MB each).
"""

import os
import stat
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import inf
from multiprocessing import get_context
from pathlib import Path

from narvid import InputError
from narvid.data.frames import pick_frames
from narvid.data.videos import SUFFIXES, Clip, read_video, start_worker

# ---- which files ----


def find_videos(folder: Path, skip: Path) -> dict[str, tuple[int, int]]:
    """Path relative to the folder -> (bytes, mtime in ns) of every video file, by suffix, in the order of path bytes.

    Subfolders are searched, but for hidden ones and `skip` (the index, whose clips are not videos to search). Hidden
    files are passed over, and symlinks that lead to a folder or out of this one. InputError where a folder cannot be
    read or there is no video at all: neither may look as if the user had deleted everything.
    """
    if not os.path.isdir(folder):  # False, too, where a folder above may not be read
        raise InputError(f"{folder} is no folder that can be read: give the one that holds your videos")
    root, skip, found = folder.resolve(), Path(os.path.realpath(skip)), {}
    for parent, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != skip]
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            status = _status(path)
            if not status or (path.is_symlink() and not path.resolve().is_relative_to(root)):
                continue
            if stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                found[path.relative_to(root).as_posix()] = (status.st_size, status.st_mtime_ns)
    if not found:
        raise InputError(f"no video in {folder}: no file ends in one of {' '.join(SUFFIXES)} (links to "
                         "folders, or out of this one, are passed over)")
    return dict(sorted(found.items(), key=lambda item: os.fsencode(item[0])))


def _unreadable(error: OSError):
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): mend that, or move it away") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # a dangling link, or deleted since
        return None


# ---- windows ----


def cut(seconds: float, window: float, fps: float) -> list[tuple[float, float]]:
    """(start, end) of the windows of a video: one every window / 2 seconds, the last one ending at the video's end.

    A video no longer than a window is one window. Half a frame of slack: clips cut at 30 s last 30.03 s.
    """
    windows = []
    while (start := len(windows) * window / 2) + window < seconds - 0.5 / fps:
        windows.append((start, start + window))
    return [*windows, (seconds - window if windows else 0.0, seconds)]


def frames_between(times: Sequence[float], start: float, end: float, fps: float) -> range:
    """Numbers of the frames of a window, at least one: from the one on screen at its start up to its end.

    times: of all frames, rising; end: inf for the last window, to which all frames belong that are left.
    A frame stands for the tick (a multiple of 1 / fps) at which it was on screen. It may have come a little earlier, so
    the border between two ticks lies half-way.
    """
    slack = 0.5 / fps
    first = max(0, bisect_right(times, start + slack) - 1)
    return range(first, max(first + 1, bisect_left(times, end - slack)))


def windows_of(clip: Clip, window: float, fps: float, max_frames: int) -> list[tuple[float, float, list[int]]]:
    """(start, end, numbers of the at most max_frames picked frames) of each window of a clip."""
    windows = []
    for start, end in cut(clip.seconds, window, fps):
        shown = frames_between(clip.times, start, end if end < clip.seconds else inf, fps)
        windows.append((start, end, [shown[i] for i in pick_frames(len(shown), max_frames)]))
    return windows


def first_window(path: str | Path, window: float, fps: float, short_side: int, max_frames: int) -> list[bytes]:
    """The picked frames of the first window of a video file, as jpgs; no more of the file is read."""
    clip = read_video(path, fps=fps, short_side=short_side, max_seconds=window + 2 + 2 / fps)
    _, _, picked = windows_of(clip, window, fps, max_frames)[0]
    return [clip.jpegs[i] for i in picked]


def join_alike(windows: Sequence[tuple[float, float, list[int]]],
               shown: Callable[[int], Hashable]) -> list[tuple[float, float, list[int]]]:
    """One window, from the start of the first to the end of the last, for every run of windows that show the same.

    shown: of a frame's number, its picture and its sentence. Half an hour of one slide is one answer, not a hundred.
    """
    joined, last = [], None
    for start, end, picks in windows:
        content = set(map(shown, picks))
        if content == last:
            joined[-1] = (joined[-1][0], end, joined[-1][2])
        else:
            joined.append((start, end, picks))
        last = content
    return joined


# ---- many files ----


def read_all(paths: Sequence[str], read: Callable, workers: int) -> Iterator:
    """read(path) of each path, in order, or the InputError it ended with; never more than workers + 1 ahead.

    workers: processes; 0 reads in this one. A file on which the decoder itself dies costs that file, not the run, but
    only with workers.
    """
    if not workers:
        yield from (_answer(read, path) for path in paths)
        return
    todo, running, pool = deque(paths), deque(), _pool(workers)
    try:
        while todo or running:
            while todo and len(running) <= workers:
                running.append((todo[0], _submit(pool, read, todo.popleft())))
            path, future = running.popleft()
            try:
                answer = future.result()
            except BrokenProcessPool:  # perhaps on another file: this one alone, and the others once more
                pool.shutdown()
                answer = _alone(read, path)
                todo.extendleft(path for path, _ in reversed(running))
                running.clear()
                pool = _pool(workers)
            yield answer
    finally:
        pool.shutdown(cancel_futures=True)


def _answer(read: Callable, path: str):
    try:
        return read(path)
    except InputError as error:
        return error


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: the parent has threads, which a fork must not copy, and perhaps a GPU
    return ProcessPoolExecutor(workers, get_context("spawn"), start_worker)


def _submit(pool: ProcessPoolExecutor, read: Callable, path: str) -> Future:
    try:
        return pool.submit(_answer, read, path)
    except BrokenProcessPool as error:  # a worker has just died
        future = Future()
        future.set_exception(error)
        return future


def _alone(read: Callable, path: str):
    with _pool(1) as pool:
        try:
            return _submit(pool, read, path).result()
        except BrokenProcessPool:
            return InputError(f"{path}: the process that read it died (a decoder crash, or no memory left)")

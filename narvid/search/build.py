"""Folder of video files -> index; the same again when files are new, changed or gone.

Here: what has to be done, in which order, and what of it is stored together. Not here: decoding and windows
(reading.py), sentences (sentences.py), features (embedding.py), tables (store.py).

Everything of a file is one transaction, its sentences too. Files go in the order of their paths and are encoded one by
one, so that a run that was killed and continued makes the same index as one that was not.

Shapes: K frames of a window and sentences of its narration, n windows, P numbers of a stage-one vector.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from narvid import InputError, one_line
from narvid.narration.captioners import Captioner
from narvid.narration.pictures import SAME_FRAME, distinct_frames
from narvid.data.frames import read_frames
from narvid.data.videos import SHORT_SIDE, Clip, read_video
from narvid.progress import tqdm
from narvid.search.database import NAME
from narvid.search.engine import compute_statistics
from narvid.search.reading import find_videos, join_alike, read_all, windows_of
from narvid.search.store import File, Store
from narvid.search.sentences import NO_SENTENCE, Narrator

if TYPE_CHECKING:
    from narvid.search.embedding import Embedder

WINDOW = 30.0  # seconds; MSR-VTT's clips, which the released models were trained on, last 10 to 30
ENCODED_AT_ONCE = 16  # windows
OURS = ("window", "fps", "short_side", "captioner", "prompt")  # settings that are not the model's


class Report(NamedTuple):
    """Numbers of files: those that this run added, indexed again, forgot; those in the index that could not be read,
    those that were as before; and of windows, all in all.
    """

    added: int
    changed: int
    removed: int
    failed: int
    unchanged: int
    windows: int


def update(
    videos_dir: str | Path,
    index: str | Path,
    embedder: Embedder,
    *,
    captioner: Captioner | None = None,
    narrations: str | Path | None = None,
    window: float = WINDOW,
    fps: float = 1.0,
    short_side: int = SHORT_SIDE,
    statistics_queries: list[str] | None = None,
    retry: bool = False,
    workers: int = 0,
) -> Report:
    """Bring an index up to date with a folder of video files, or make it.

    captioner or narrations (a narration file): where sentences come from; neither: frames alone, which is said.
    window: seconds of video that are one answer. fps, short_side: of the frames, as in scripts/extract_frames.py.
    statistics_queries: to measure the mean and standard deviation for Eq. 11; None: the engine takes its own.
    retry: once more the files that could not be read or have frames without a sentence. workers: decoding processes, 0
    for none; a script that gives some needs `if __name__ == "__main__"`.
    What cannot be read is printed, remembered and not tried again until the file has changed. InputError where the
    folder holds no video, the index was made in another way, the captioner fails or the disk does.
    """
    narrator, found = Narrator(captioner, narrations), find_videos(Path(videos_dir), Path(index))
    if not narrator.is_silent and not embedder.narration:
        raise InputError("this model reads no narration: leave the captioner and the narrations out")
    narrator.check(found)
    settings = {"videos": str(Path(videos_dir).resolve()), "window": window, "fps": fps, "short_side": short_side}
    settings |= {**narrator.settings, **embedder.settings}
    if narrator.is_silent and embedder.frames_alone:
        print(embedder.frames_alone)
    with open_index(Path(index), settings, narrator, embedder) as store:
        known = {file.path: file for file in store.files()}
        for path in (gone := known.keys() - found):
            store.remove_file(path)
        todo = [path for path in found if is_due(known.get(path), found[path], narrator, path, retry)]
        index_files(store, todo, found, narrator, embedder, workers)
        if store.count() and store.settings.get("measured_at") != store.change:
            store.statistics = compute_statistics(store, embedder, statistics_queries)
            store.update_settings(measured_at=store.change)
        changed = len(known.keys() & set(todo))
        failed = sum(bool(file.why) for file in store.files())
        unchanged = sum(not known[path].why for path in found.keys() - set(todo))
        return Report(len(todo) - changed, changed, len(gone), failed, unchanged, store.count())


def open_index(index: Path, settings: dict, narrator: Narrator, embedder: Embedder) -> Store:
    """The index, open for writing, new where there is none; InputError where it was made with other settings."""
    if not os.path.exists(index / NAME):
        return Store(index, create=settings)
    store = Store(index)
    try:
        stored = store.settings
        if store.count() or stored.get("captioner") != settings["captioner"]:
            narrator.go_on(stored.get("captioner"))
            settings = {**settings, **narrator.settings}
        for name in OURS:
            if stored.get(name) != settings[name]:
                raise InputError(
                    f"{index} was made with {name} {stored.get(name)!r}, this run asks for {settings[name]!r}: give "
                    "the same flags, or another --out"
                )
        embedder.check(stored, index)
        if stored["videos"] != settings["videos"] and os.path.exists(stored["videos"]):
            raise InputError(
                f"{index} is the index of {stored['videos']}, not of {settings['videos']}: give another --out"
            )
        store.update_settings(**settings)  # the folder and the checkpoint may lie elsewhere by now
    except BaseException:
        store.close()
        raise
    return store


def is_due(file: File | None, status: tuple[int, int], narrator: Narrator, path: str, retry: bool) -> bool:
    """Whether a file of the folder has to be indexed, given what the index knows of it."""
    if file is None or (file.size, file.mtime_ns) != status:
        return True
    if file.why:
        return retry
    wants_sentences = narrator.captioner is not None and NO_SENTENCE in file.note
    return file.narration != narrator.version(path) or (retry and wants_sentences)


def index_files(
    store: Store,
    paths: Sequence[str],
    status: dict[str, tuple[int, int]],
    narrator: Narrator,
    embedder: Embedder,
    workers: int,
) -> None:
    """Read, narrate, encode and store these files, one transaction each; those that cannot be read are printed."""
    settings = store.settings
    root = Path(settings["videos"])
    read = partial(read_video, fps=settings["fps"], short_side=settings["short_side"])
    with closing(read_all([str(root / path) for path in paths], read, workers)) as clips:
        for path, clip in tqdm(zip(paths, clips, strict=True), "index", len(paths), unit=" files", disable=not paths):
            if isinstance(clip, InputError):
                why = str(clip).replace(one_line(str(root / path)), one_line(path))
                tqdm.write(f"skipped: {printable(why)}")
                store.fail_file(path, *status[path], why)
                continue
            windows = windows_of(clip, settings["window"], settings["fps"], embedder.max_frames)
            picked = sorted({number for _, _, picks in windows for number in picks})
            sentences, note = narrator.sentences_of(path, clip, picked)
            if narrator.settings["captioner"] != store.settings["captioner"]:  # the server refused a parameter
                store.update_settings(**narrator.settings)
            leaders = distinct_frames([BytesIO(clip.jpegs[n]) for n in picked], SAME_FRAME)
            seen = dict(zip(picked, leaders, strict=True))
            windows = join_alike(windows, lambda n, seen=seen, sentences=sentences: (seen[n], sentences[n]))
            features, pooled = encode(clip, windows, None if narrator.is_silent else sentences, embedder)
            frames = [(*frame, sentences.get(n)) for n, frame in enumerate(zip(clip.times, clip.jpegs, strict=True))]
            note = "; ".join(filter(None, (clip.note, note)))
            store.put_file(path, *status[path], clip.seconds, note, frames, windows, features, pooled,
                           narration=narrator.version(path))


def printable(text: str) -> str:
    """A file name may hold line breaks, terminal codes and bytes that are no text: these are written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def encode(
    clip: Clip,
    windows: Sequence[tuple[float, float, list[int]]],
    sentences: dict[int, str | None] | None,
    embedder: Embedder,
) -> tuple[dict[str, np.ndarray | None], np.ndarray]:
    """Features of a clip's windows, name -> (n, ...) or None, and their stage-one vectors (n, P).

    sentences: of the picked frames by their number; None where nobody narrates.
    """
    packed, pooled = [], []
    for first in range(0, len(windows), ENCODED_AT_ONCE):
        picks = [numbers for _, _, numbers in windows[first : first + ENCODED_AT_ONCE]]
        frames = [read_frames([BytesIO(clip.jpegs[n]) for n in numbers], embedder.image_size) for numbers in picks]
        of_windows = None if sentences is None else [[sentences[n] for n in numbers] for numbers in picks]
        videos = embedder.videos(frames, of_windows)
        packed.append(embedder.pack(videos))
        pooled.append(embedder.pool_videos(videos))
    fields = {name: None if field is None else np.concatenate([part[name] for part in packed])
              for name, field in packed[0].items()}
    return fields, np.concatenate(pooled)

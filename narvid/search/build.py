"""Folders of video files -> index; the same again when files are new, changed or gone.

Here: what has to be done, in which order, and what of it is stored together. Not here: which folders (folders.py),
decoding and windows (reading.py), sentences (sentences.py), features (embedding.py), tables (store.py).

Everything of a file is one transaction, its sentences too. Files go in the order of their paths and are encoded one by
one, so that a run that was killed and continued makes the same index as one that was not.

Shapes: K frames of a window and sentences of its narration, n windows, P numbers of a stage-one vector.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from narvid import InputError, one_line
from narvid.narration.captioners import Captioner
from narvid.narration.pictures import SAME_FRAME, distinct_frames
from narvid.data.frames import read_frames
from narvid.data.videos import SHORT_SIDE
from narvid.progress import say, tqdm
from narvid.search.answers import printable
from narvid.search.engine import measure_level
from narvid.search.folders import as_settings, choose, find, name_of, place, place_of
from narvid.search.reading import join_alike, read_all
from narvid.search.opening import in_engine, is_there, open_store
from narvid.search.rows import File
from narvid.search.store import Store
from narvid.search.sentences import NO_SENTENCE, Narrator
from narvid.search.spool import FOLDER, Opened, Read, content_of, read_file
from narvid.search.speech import Speech
from narvid.search.speech_sources import Hearing, index_speech, marks
from narvid.search.statistics import compute_statistics, speech_statistics

if TYPE_CHECKING:
    from narvid.search.embedding import Embedder

WINDOW = 30.0  # seconds; MSR-VTT's clips, which the released models were trained on, last 10 to 30
ENCODED_AT_ONCE = 16  # windows
EVERY = 5.0  # seconds between two looks of `watch`
OURS = ("window", "fps", "short_side", "captioner", "prompt")  # settings that are not the model's


class Report(NamedTuple):
    """Numbers of files: those that this run added, indexed again, forgot; those in the index that could not be read,
    those that were as before, and those of them that lie elsewhere by now; and of windows, all in all. spoken: of files
    in which something is said.
    """

    added: int
    changed: int
    removed: int
    failed: int
    unchanged: int
    windows: int
    moved: int = 0
    spoken: int = 0


def update(videos_dir: str | Path | Sequence[str | Path], index: str | Path, embedder: Embedder, *,
           statistics_queries: list[str] | None = None, retry: bool = False, check_content: bool = False,
           forget: Sequence[str] = (), workers: int = 0, **how) -> Report:
    """Bring an index up to date with a folder of video files, or several, or make it.

    how: as `opened` takes it: captioner or narrations, window, fps, short_side, hearing. Folders of the index that are
    not given stay as they are; forget: those to be taken out of it, by name or place.
    statistics_queries: to measure the mean and standard deviation for Eq. 11, kept for later runs; None: those that are
    kept, else the narration's sentences, else neutral ones. check_content: read every file, to find those that changed
    without a change of size and date. A file that was moved or renamed is known by its content. retry: once more
    the files that could not be read or have frames without a sentence. workers: decoding processes, 0 for none; a
    script that gives some needs `if __name__ == "__main__"`.
    What cannot be read is printed, remembered and not tried again until the file has changed. InputError where a folder
    holds no video, the index was made in another way, the captioner fails or the disk does.
    """
    with opened(videos_dir, index, embedder, **how) as run:
        gone = sum(run.forget(name) for name in forget)
        report = run.bring_up(retry=retry, check_content=check_content, workers=workers)
        measure(run.store, embedder, statistics_queries)
        return report._replace(removed=report.removed + gone)


def watch(videos_dir: str | Path | Sequence[str | Path], index: str | Path, embedder: Embedder, *,
          every: float = EVERY, statistics_queries: list[str] | None = None, workers: int = 0,
          say: Callable[[str], object] = print, **how) -> None:
    """`update`, and then look every few seconds until KeyboardInterrupt: what has stopped growing is indexed, what is
    gone, twice, is taken out. say: called with a line for whatever was done. A folder that is not there is waited for.
    """
    with opened(videos_dir, index, embedder, **how) as run:
        report = run.bring_up(workers=workers)
        measure(run.store, embedder, statistics_queries)
        say(f"{report.added} files new, {report.changed} changed, {report.removed} removed; watching, Ctrl-C ends it")
        known, before, away = {file.path: file for file in run.known()}, run.found, {}
        subtitles = run.hearing and marks(run.store, before)
        while True:
            time.sleep(every)
            now = {}
            for name in run.names:
                try:
                    now |= find(run.folders, [name], index)
                except InputError as error:  # not one whose files were deleted: they stay
                    now |= {path: status for path, status in before.items() if name_of(run.folders, path) == name}
                    if away.get(name) != str(error):
                        say(f"{error}; what is indexed of it stays")
                    away[name] = str(error)
                else:
                    away.pop(name, None)
            growing = {path for path, status in now.items() if before.get(path) != status}
            growing |= before.keys() - now.keys()  # gone since the last look: perhaps it comes by another name
            before, subtitles_before = now, subtitles
            subtitles = run.hearing and marks(run.store, now)
            if subtitles == subtitles_before and not known.keys() - now.keys() - growing and not any(
                    is_due(known.get(path), now[path], run.narrator, path, False) for path in now.keys() - growing):
                continue
            report = run.bring_up(now, growing, workers=workers)
            measure(run.store, embedder, statistics_queries)
            known = {file.path: file for file in run.known()}
            say(f"{report.added} files new, {report.changed} changed, {report.removed} removed, {report.moved} moved "
                f"or renamed, {report.failed} of all could not be read; {index} holds {report.windows} windows")


class Run(NamedTuple):
    """An index that is open for writing, with what it is brought up to date with."""

    store: Store
    embedder: Embedder
    narrator: Narrator
    folders: dict[str, Path]  # of the index
    names: list[str]  # of those that are looked at
    found: dict[str, tuple[int, int]]  # what lies in them: path -> (bytes, mtime in ns)
    hearing: Hearing | None  # None: the index holds no speech

    def known(self) -> list[File]:
        """What the index holds of these folders."""
        return [file for file in self.store.files() if name_of(self.folders, file.path) in self.names]

    def bring_up(self, found: dict[str, tuple[int, int]] | None = None, growing: Set[str] = frozenset(), *,
                 retry: bool = False, check_content: bool = False, workers: int = 0) -> Report:
        """Bring the index up to date with what is found; paths that are growing are left for later."""
        store, found = self.store, self.found if found is None else found
        found = {path: status for path, status in found.items() if path not in growing}
        known = {file.path: file for file in self.known() if file.path not in growing}
        moved = follow_moves(store, known, found)
        known = {file.path: file for file in self.known() if file.path not in growing}
        for path in (gone := known.keys() - found):
            store.remove_file(path)
        todo = [path for path in found if is_due(known.get(path), found[path], self.narrator, path, retry)
                and not only_touched(store, known.get(path), found[path], self.narrator)]
        if check_content:
            todo = sorted({*todo, *changed_content(store, known, found.keys() - set(todo))}, key=os.fsencode)
        index_files(store, todo, found, self.narrator, self.embedder, workers)
        if self.hearing is not None and store.speech.exists:
            index_speech(store, found, self.embedder, self.hearing, retry)
        elif store.speech.count()[0]:
            store.speech.drop()
        changed = len(known.keys() & set(todo))
        failed = sum(bool(file.why) for file in store.files())
        unchanged = sum(not known[path].why for path in found.keys() - set(todo))
        return Report(len(todo) - changed, changed, len(gone), failed, unchanged, store.count(), moved,
                      store.speech.count()[0])

    def forget(self, folder: str) -> int:
        """Take a folder out of the index, with its files; returns how many."""
        place = Path(folder).resolve()
        name = next((name for name, at in self.folders.items() if place == at or folder == name), None)
        if name is None:
            have = " and ".join(map(str, self.folders.values()))
            raise InputError(f"--forget {folder}: the index has no such folder, it has {have}")
        if name in self.names:
            raise InputError(f"--forget {folder}: this folder is also one of those to index: leave it out there")
        files = [file.path for file in self.store.files() if name_of(self.folders, file.path) == name]
        for path in files:
            self.store.remove_file(path)
        del self.folders[name]
        self.store.update_settings(**as_settings(self.folders))
        return len(files)


@contextmanager
def opened(videos_dir: str | Path | Sequence[str | Path], index: str | Path, embedder: Embedder, *,
           captioner: Captioner | None = None, narrations: str | Path | None = None, window: float = WINDOW,
           fps: float = 1.0, short_side: int = SHORT_SIDE, hearing: Hearing | None = Hearing()) -> Iterator[Run]:
    """The index, open for writing or new, and what lies in the given folders.

    captioner or narrations (a narration file): where sentences come from; neither: frames alone, which is said.
    window: seconds of video that are one answer. fps, short_side: of the frames, as in scripts/extract_frames.py.
    hearing: how what is said is found; None: it is not, and what the index holds of it is forgotten.
    """
    if window * fps < 1:
        raise InputError(f"--window {window:g} s is shorter than the {1 / fps:g} s between two frames (--fps): give a "
                         "longer one")
    index = str(index) if in_engine(index) else Path(index)
    given = [videos_dir] if isinstance(videos_dir, (str, Path)) else list(videos_dir)
    narrator, stored, files = Narrator(captioner, narrations), None, []
    if is_there(index):
        with open_store(index, read_only=True) as store:
            stored, files = store.settings, store.files()
    folders = choose(given, stored, files, index)
    given = [Path(folder).resolve() for folder in given]
    names = [name for name, folder in folders.items() if folder in given]
    found = find(folders, names, index)
    if not narrator.is_silent and not embedder.narration:
        raise InputError("this model reads no narration: leave the captioner and the narrations out")
    narrator.check(found)
    settings = {**as_settings(folders), "window": window, "fps": fps, "short_side": short_side}
    settings |= {**narrator.settings, **embedder.settings}
    if narrator.is_silent and embedder.frames_alone:
        print(embedder.frames_alone)
    with open_index(index, settings, narrator, embedder) as store:
        yield Run(store, embedder, narrator, folders, names, found, hearing)


def follow_moves(store: Store, known: dict[str, File], found: dict[str, tuple[int, int]]) -> int:
    """Give files their new names in the index where one of the same content is gone; returns how many."""
    lost, count = {}, 0
    for path in known.keys() - found:
        if known[path].content:
            lost.setdefault(known[path].size, []).append(known[path])
    for path in found.keys() - known:
        candidates = lost.get(found[path][0])
        if not candidates:
            continue
        try:
            content = content_of(place(store, path))
        except InputError:  # reading it says so
            continue
        if file := next((file for file in candidates if file.content == content), None):
            candidates.remove(file)
            store.move_file(file.path, path, found[path][1])
            count += 1
    return count


def only_touched(store: Store, file: File | None, status: tuple[int, int], narrator: Narrator) -> bool:
    """Whether a file has another date and nothing else is new; the index then gets to know the date."""
    if file is None or not file.content or file.why or file.size != status[0] or file.mtime_ns == status[1]:
        return False
    if file.narration != narrator.version(file.path):
        return False
    with suppress(InputError):
        if content_of(place(store, file.path)) == file.content:
            store.touch_file(file.path, status[1])
            return True
    return False


def changed_content(store: Store, known: dict[str, File], paths: Iterable[str]) -> list[str]:
    """Those of these files that do not hold what was indexed, or of which the index cannot say."""
    changed = []
    for path in tqdm(sorted(paths), "check content", unit=" files"):
        if known[path].why:
            continue
        with suppress(InputError):
            if content_of(place(store, path)) == known[path].content:
                continue
        changed.append(path)
    return changed


def measure(store: Store, embedder: Embedder, queries: list[str] | None) -> None:
    """What scores are standardised with and what a good one is, where files or queries have changed since."""
    stored = store.fact("statistics_queries")
    if not store.count() or (store.settings.get("measured_at") == store.change and queries in (None, stored)
                             and store.fact("level_measured")):
        return
    queries = queries or stored
    store.statistics = compute_statistics(store, embedder, queries)
    of_speech = speech_statistics(store, Speech(store, embedder), embedder, queries)
    store.set_fact("speech_statistics", of_speech)
    store.set_fact("statistics_queries", queries)
    store.set_fact("level", measure_level(store, embedder))
    store.set_fact("level_measured", True)
    store.update_settings(measured_at=store.change)


def open_index(index: str | Path, settings: dict, narrator: Narrator, embedder: Embedder) -> Store:
    """The index, open for writing, new where there is none; InputError where it was made with other settings."""
    if not is_there(index):
        return open_store(index, create=settings)
    store = open_store(index)
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
        store.update_settings(**settings)  # the folders and the checkpoint may lie elsewhere by now
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
    folder = store.folder / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if not paths:
        return
    folder.mkdir()
    read = partial(read_file, folder=str(folder), fps=settings["fps"], short_side=settings["short_side"],
                   window=settings["window"], max_frames=embedder.max_frames)
    places = [str(place_of(settings, path)[1]) for path in paths]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        clips = stack.enter_context(closing(read_all(places, read, workers)))
        for path, at, clip in tqdm(zip(paths, places, clips, strict=True), "index", len(paths), unit=" files"):
            if isinstance(clip, InputError):
                why = str(clip).replace(one_line(at), one_line(path))
                say(f"skipped: {printable(why)}")
                store.fail_file(path, *status[path], why)
            else:
                index_file(store, path, status[path], clip, narrator, embedder)
                clip.jpegs.remove()


def index_file(store: Store, path: str, status: tuple[int, int], clip: Read, narrator: Narrator,
               embedder: Embedder) -> None:
    """Narrate, encode and store a file that was read."""
    sentences, note = narrator.sentences_of(path, clip, list(clip.looks))
    if narrator.settings["captioner"] != store.settings["captioner"]:  # the server refused a parameter
        store.update_settings(**narrator.settings)
    leaders = distinct_frames(Opened(clip.jpegs, list(clip.looks)), SAME_FRAME)
    seen = dict(zip(clip.looks, leaders, strict=True))
    windows = join_alike(clip.windows, lambda n: (seen[n], sentences[n]))
    features, pooled = encode(clip, windows, None if narrator.is_silent else sentences, embedder)
    shown = sorted({number for _, _, picks in windows for number in picks})
    frames = ((n, clip.times[n], clip.jpegs[clip.looks[n]], sentences.get(n)) for n in shown)
    note = "; ".join(filter(None, (clip.note, note)))
    store.put_file(path, *status, clip.seconds, note, frames, windows, features, pooled,
                   narration=narrator.version(path), content=clip.content, recorded=clip.recorded)


def encode(
    clip: Read,
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
        frames = [read_frames([BytesIO(clip.jpegs[n]) for n in numbers], embedder.picture) for numbers in picks]
        of_windows = None if sentences is None else [[sentences[n] for n in numbers] for numbers in picks]
        videos = embedder.videos(frames, of_windows)
        packed.append(embedder.pack(videos))
        pooled.append(embedder.pool_videos(videos))
    fields = {name: None if field is None else np.concatenate([part[name] for part in packed])
              for name, field in packed[0].items()}
    return fields, np.concatenate(pooled)

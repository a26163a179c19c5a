"""What is said in the files of a folder -> the index: subtitles beside a video, tracks inside it, its sound.

Here: which file says it, when it has to be read again, what one utterance is. Not here: the forms of subtitles and the
model that listens (narvid/narration), the tables (speech_store.py), what an utterance is worth to a query (speech.py).

A video's own file is opened, its pictures are not: speech comes after the videos, a file a transaction, and a changed
subtitle file costs no decoding.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from narvid import InputError, one_line
from narvid.data.decoding import sound_of
from narvid.narration.speech import tag_of, video_of
from narvid.narration.subtitles import TEXT_FILES, Timed, has_text_track, read_sentences
from narvid.narration.transcribe import RATE, Transcriber
from narvid.progress import say, tqdm
from narvid.search.answers import printable
from narvid.search.folders import place_of
from narvid.search.store import Store

if TYPE_CHECKING:
    from narvid.search.embedding import Embedder

INSIDE = "track"  # the mark of a video without a file of subtitles: its own track was looked for
PAUSE = 1.0  # seconds of silence that end an utterance
WORDS = 20  # an utterance takes no further line from so many on; PE-Core's tower reads 32 tokens
LARGEST = 64_000_000  # bytes of a file of subtitles
LANGUAGE = re.compile(r"(?:[a-z]{2,3}(?:[-_][a-z0-9]+)*)?", re.IGNORECASE)


class Hearing(NamedTuple):
    """How what is said is found. transcriber: listens to files that have neither subtitles nor a text track; what one
    has heard stays without it. language: of several subtitles or tracks.
    """

    transcriber: Transcriber | None = None
    language: str | None = None


class Beside(NamedTuple):
    """A video's file of subtitles. mark: changes when the file does; note: what is amiss in the choice."""

    path: Path
    size: int  # bytes
    mark: str
    note: str


def index_speech(store: Store, paths: Iterable[str], embedder: Embedder, hearing: Hearing, retry: bool = False) -> None:
    """Bring the speech of these indexed files up to date, each in a transaction; what is amiss is printed and kept.

    retry: once more those in which something is amiss.
    """
    transcriber, language = hearing
    places = _places(store, paths)
    beside = subtitles_beside(places, language)
    inside = " ".join(filter(None, [INSIDE, language]))
    inside = f"{inside} or {transcriber.label}" if transcriber else inside
    todo = []
    for file in store.files():
        if file.path not in beside or file.why:
            continue
        found = beside[file.path]
        wanted = found.mark if found else inside
        kept = not found and transcriber is None and file.speech.startswith(f"{INSIDE} or ")
        if (file.speech != wanted and not kept) or (retry and file.speech_note):
            todo.append((file, found, wanted))
    for file, found, mark in tqdm(todo, "speech", unit=" files", disable=not todo):
        root, place = places[file.path]
        said, sound, note = [], (), found.note if found else ""
        try:
            if found or has_text_track(place, language):
                said = _read(place, found, language)
            elif transcriber is not None:
                sound = sound_of(place, RATE)
        except InputError as error:
            note = one_line(str(error).replace(f"{root}{os.sep}", ""))
        if len(sound):
            said = transcriber.sentences(sound)  # a model that cannot be loaded ends the run
        said, note = utterances(within(said, file.seconds)), printable(note)
        if note:
            say(f"{printable(file.path)}: {note}")
        texts = [text for _, _, text in said]
        vectors = embedder.text_vectors(texts) if texts else np.zeros((0, 1), np.float32)
        store.speech.put(file.id, mark, note, said, vectors)


def marks(store: Store, paths: Iterable[str]) -> dict[str, str]:
    """Of the files among these that have subtitles beside them what marks those; it changes when one of them does."""
    return {path: found.mark for path, found in subtitles_beside(_places(store, paths)).items() if found}


def _places(store: Store, paths: Iterable[str]) -> dict[str, tuple[Path, Path]]:
    settings = store.settings
    return {path: place_of(settings, path) for path in paths}


def _read(video: Path, found: Beside | None, language: str | None) -> list[Timed]:
    """What its subtitles say, beside it or, without such, inside; InputError where they cannot be read."""
    if found and found.size > LARGEST:
        raise InputError(f"{found.path} is larger than {LARGEST / 1e6:g} MB: no subtitles are; leave it out")
    return read_sentences(found.path) if found else read_sentences(video, language)


# ---- which file says it ----


def subtitles_beside(places: dict[str, tuple[Path, Path]], language: str | None = None) -> dict[str, Beside | None]:
    """For each video its file of subtitles or transcript, in the same folder: named like it, perhaps with a language
    (a.srt, a.en.vtt); None where there is none. places: of each video the indexed folder, and where it lies.

    Of several: the one in `language`, else the one without a language, else the first; which is noted.
    """
    of_folder: dict[Path, dict[str, list[str]]] = {}
    for _, video in places.values():
        of_folder.setdefault(video.parent, {})[video.stem] = []
    for folder, stems in of_folder.items():
        for name in _names(folder):
            kind = Path(name).suffix.lower()
            if kind in TEXT_FILES and (stem := video_of(Path(name), stems)) is not None:
                if kind != ".json" or LANGUAGE.fullmatch(tag_of(Path(name), stem)):  # a.info.json is no transcript
                    stems[stem].append(name)
    return {path: _chosen(root, video, of_folder[video.parent][video.stem], language)
            for path, (root, video) in places.items()}


def _names(folder: Path) -> list[str]:
    try:
        return sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=os.fsencode)
    except OSError:  # gone since the videos were found
        return []


def _chosen(root: Path, video: Path, names: list[str], language: str | None) -> Beside | None:
    found = []
    for name in names:
        place = video.parent / name
        try:
            status = place.stat()
        except OSError:  # a dangling link, or deleted since
            continue
        ours = not place.is_symlink() or place.resolve().is_relative_to(root.resolve())
        if ours and stat.S_ISREG(status.st_mode):
            found.append((tag_of(Path(name), video.stem), TEXT_FILES.index(place.suffix.lower()), place, status))
    wanted = [of for of in found if language and of[0].startswith(language.lower())] or found
    if not wanted:
        return None
    tag, _, place, status = min(wanted, key=lambda of: (of[0] != "", of[0], of[1]))
    others = sorted({of[0] for of in wanted if of[0] != tag})
    note = f"{place.name} was taken of {len(others) + 1} subtitles; --language takes others" if others else ""
    mark = printable(f"{place.name[len(video.stem):]} {status.st_size} {status.st_mtime_ns}")
    return Beside(place, status.st_size, mark, note)


# ---- what an utterance is ----


def within(said: Sequence[Timed], seconds: float) -> list[Timed]:
    """What begins before the file ends, cut there."""
    return [Timed(s.start, max(s.start, min(s.end, seconds)), s.text) for s in said if s.start < seconds]


def utterances(said: Sequence[Timed]) -> list[tuple[float, float, str]]:
    """Lines in time order -> (start, end, text) of utterances: lines up to the end of a sentence, a pause or WORDS
    words. Subtitles break sentences where a line is full; half of one is neither found nor understood.
    """
    joined: list[tuple[float, float, str]] = []
    for line in said:
        if joined:
            start, end, text = joined[-1]
            goes_on = line.start - end < PAUSE and not re.search(r"[.!?…。！？]['\"”’)]*$", text)
            if goes_on and len(text.split()) + len(line.text.split()) <= WORDS:
                joined[-1] = start, max(end, line.end), f"{text} {line.text}"
                continue
        joined.append(tuple(line))
    return joined

"""Sound -> timed sentences by faster-whisper, which is optional (pip install -e '.[speech]').

What is done stands in a journal, <OUT>.parts/<model>.speech.jsonl, a video a line, so that a run that is stopped goes
on with the next video. Sound is opened as video is, through data/decoding.py. Not here: frames, files (speech.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from narvid import InputError
from narvid.data.decoding import sound_of
from narvid.files import appending, lock, read_json_lines
from narvid.narration.answers import one_line
from narvid.narration.captioners import first_line
from narvid.narration.journals import parts_folder
from narvid.narration.subtitles import Timed
from narvid.progress import tqdm

RATE = 16000  # samples a second that Whisper hears


class Transcriber:
    """A Whisper model on the GPU where there is one; its weights are loaded with the first sound.

    language: code such as en, None to guess it a video. Decoding is Whisper's own with beams and without sampling.
    """

    def __init__(self, model: str, language: str | None = None):
        try:
            import faster_whisper
        except ImportError as error:
            raise InputError(f"faster_whisper is not installed ({first_line(error)}); in the repository run: "
                             "pip install -e '.[speech]'") from error
        self.label = f"faster-whisper {model.rstrip('/')}" + (f" language={language}" if language else "")
        self._name, self._language = model, language
        self._class, self._model = faster_whisper.WhisperModel, None

    def sentences(self, sound: np.ndarray) -> list[Timed]:
        """float32 samples, RATE a second, -1..1 -> what is said."""
        if self._model is None:
            try:
                self._model = self._class(self._name)
            except Exception as error:  # of the hub, of ctranslate2, of the file system
                raise InputError(f"--speech {self._name}: no Whisper that faster-whisper can load "
                                 f"({first_line(error)})") from error
        try:
            segments, _ = self._model.transcribe(sound, language=self._language, temperature=0.0, vad_filter=False,
                                                 condition_on_previous_text=False)
            return [Timed(float(s.start), float(s.end), text) for s in segments if (text := one_line(s.text))]
        except ValueError as error:
            raise InputError(f"--speech {self._name}: {first_line(error)}") from error


def transcribed(chosen: Mapping[str, Path], listener: Transcriber, out: Path,
                failed: list[dict]) -> Iterator[tuple[str, list[Timed]]]:
    """(video, its sentences) of all; those that an earlier run wrote down are not heard again.

    failed: receives {"video", "file", "why"} of what cannot be opened.
    """
    name = re.sub(r"[^\w.-]", "_", listener.label)
    journal = parts_folder(out) / f"{name}.speech.jsonl"
    with lock(journal.parent, f".{journal.stem}.lock"), appending(journal) as file:
        done = dict(_of(entry, f"{journal}:{line}") for line, entry in read_json_lines(journal, whole=True))
        for video, path in tqdm(chosen.items(), desc="listening", unit="video", disable=len(chosen) == len(done)):
            if video not in done:
                try:
                    sound = sound_of(path, RATE)
                except InputError as error:
                    failed.append({"video": video, "file": str(path), "why": str(error)})
                    continue
                done[video] = listener.sentences(sound) if len(sound) else []
                file.write(json.dumps({"video": video, "said": done[video]}, ensure_ascii=False) + "\n")
                file.flush()
            yield video, done[video]


def _of(entry: dict, where: str) -> tuple[str, list[Timed]]:
    with suppress(TypeError, ValueError, KeyError):
        if isinstance(entry["video"], str):
            return entry["video"], [Timed(float(start), float(end), str(text)) for start, end, text in entry["said"]]
    raise InputError(f"{where}: no line of this journal; delete that line, its video is then heard again")

"""Published files of captions: what stands in them, and which frame each caption is given, since none has times.

Two forms are read. Our own form and the join by time are in `narrations.py`, the command that converts in
`narvid/narration/check.py`.

NarVid's release, one list a corpus, captions in the order of the frames they were made from:
    [{"video_file": "video7.mp4", "caption_1": "...", "caption_2": "...", ...}, ...]

Cap4Video's titles, up to 30 sentences about a whole video, best first by CLIP's similarity to it:
    {"titles": {video: [...]}, "title": {video: ...}, "sentences": ...}     MSR-VTT, train: beside the annotations
    {video: {"titles": [...], "gt": "..."}}                                 MSR-VTT, test
    {video: {"captions": [...], "max1": "..."}}                             MSVD, VATEX, DiDeMo, train
    {video: [...]}                                                          MSVD, VATEX, DiDeMo, test
"""

import os
from collections.abc import Container, Sequence
from pathlib import Path

from narvid import InputError
from narvid.data.frames import pick_frames
from narvid.files import read_text
from narvid.parsing import parse_json

# A caption beside the wrong frame looks like any other, so the rule is printed wherever it is applied.
ALIGNMENT = {
    "release": "as many captions as frames belong to all of them, fewer to as many evenly picked ones, in order",
    "titles": "titles are of the whole video, of no moment: frame j is given title j mod m of m, the best first, "
              "so the times of this narration mean nothing",
}
CAPTIONER = {"release": "unknown (published file)", "titles": "Cap4Video titles (of whole videos)"}
OUR_KEYS = {"video", "captioner", "prompt", "sentences"}
COMPLETE = "is the file complete?"
TITLE_KEYS = ("titles", "captions")  # of one video's entry: MSR-VTT's, the other corpora's


def read_form(path: str | Path) -> tuple[str, str]:
    """The text of a file of narrations, and its form: "release" (a list), "titles" (one object a file) or "ours"."""
    text = read_text(path, advice="give the narration file itself, unpacked")
    if not text.strip():
        raise InputError(f"{path}: the narration file is empty")
    return text, _form_of(text.lstrip())


def _form_of(text: str) -> str:
    """By how it starts."""
    if text.startswith("["):
        return "release"
    try:
        entry = parse_json(text.partition("\n")[0], "")
    except InputError:  # an indented object, or a broken first line of our form
        return "titles" if text[0] == "{" and not text[1:].partition("\n")[0].strip() else "ours"
    if not isinstance(entry, dict) or (OUR_KEYS & entry.keys() and not {"titles", "videos"} & entry.keys()):
        return "ours"
    return "titles"


def parse_published(path: str | Path, text: str, form: str, known: Container[str]) -> dict[str, list[str]]:
    """video -> captions in the file's order. A name loses its extension where only the bare name is in `known`.

    Raises InputError naming the entry of whatever is malformed, and a video that stands there twice.
    """
    named = _release_entries(path, text) if form == "release" else _titles_by_name(path, text).items()
    captions_of, entry_of = {}, {}
    for number, (name, captions) in enumerate(named, start=1):
        video = next((alias for alias in (name, os.path.splitext(name)[0]) if alias in known), name)
        if video in captions_of:
            first = entry_of[video]
            raise InputError(f"{path}: entry {number}: {video} is narrated twice (first in entry {first}); keep one")
        captions_of[video], entry_of[video] = captions, number
    return captions_of


def assign(form: str, captions: Sequence[str], times: Sequence[float]) -> tuple[list[float], list[str]]:
    """Captions of one video and times (s) of all its n frames -> (times, sentences), by the rule in ALIGNMENT.

    Raises InputError for more captions than frames in the release's form.
    """
    m, n = len(captions), len(times)
    if not m:
        return [], []
    if form == "titles":  # no hole: an untitled frame would be masked, as if it had a picture and no sentence
        return [float(time) for time in times], [captions[j % m] for j in range(n)]
    if m > n:
        raise InputError(f"{m} captions for {n} extracted frames; extract frames at the rate they were made from")
    # The release sub-samples frames and never captions, so fewer captions than frames are those of the picked ones.
    return [float(times[index]) for index in pick_frames(n, m)], list(captions)


# ---- the forms ----


def _release_entries(path, text):
    """Yield (video_file, captions) of each entry."""
    for number, entry in enumerate(parse_json(text, path, advice=COMPLETE), start=1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("video_file"), str) or not entry["video_file"]:
            raise InputError(f'{where}: "video_file" is missing or not a text')
        keys = [f"caption_{k}" for k in range(1, 1 + sum(key.startswith("caption_") for key in entry))]
        for key in keys:
            if not isinstance(entry.get(key), str):
                raise InputError(
                    f"{where}: {entry['video_file']}: {key} is missing or no text; number captions from 1, no gaps"
                )
        yield entry["video_file"], [entry[key] for key in keys]


def _titles_by_name(path, text):
    """name of a video -> its titles."""
    entries = parse_json(text, path, advice=COMPLETE)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: holds no video")
    if {"videos", "sentences", "titles"} & entries.keys():  # MSR-VTT's annotation file, with titles or without
        entries = entries.get("titles")
        if not isinstance(entries, dict) or not entries:
            raise InputError(
                f'{path}: has no "titles" of videos; it is neither Cap4Video\'s file of titles nor narrations, '
                "one object a line"
            )
    return {video: _titles_of(f"{path}: {video}", entry) for video, entry in entries.items()}


def _titles_of(where, entry):
    """One video's titles as a list; a lone text is a list of one, null is none."""
    if isinstance(entry, dict):
        if not (keys := [key for key in TITLE_KEYS if key in entry]):
            raise InputError(f'{where}: has neither "titles" nor "captions"; this is no file of titles')
        entry = entry[keys[0]]
    titles = [] if entry is None else [entry] if isinstance(entry, str) else entry
    if not isinstance(titles, list):
        raise InputError(f"{where}: its titles are no list of texts; this is no file of titles")
    for number, title in enumerate(titles, start=1):
        if not isinstance(title, str):
            raise InputError(f"{where}: title {number} is no text; this is no file of titles, or a broken one")
    return titles

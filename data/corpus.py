"""What every prepare_<corpus>.py shares: reading official files with line numbers, checking splits, writing them.

Nothing here knows a corpus. A split is a list of (video, query) pairs in the order of the official lists. A prepared
corpus is {train,val,test}.jsonl, one {"video": id, "query": text} a line, and prepared.json, which is written last.
The scripts run as `python data/prepare_<corpus>.py`, so they import this file by its bare name.
"""

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    from narvid import InputError
except ModuleNotFoundError:  # not installed: run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from narvid import InputError

SPLITS = ("train", "val", "test")
VIDEO_EXTENSIONS = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts"}

Pairs = list[tuple[str, str]]

# ---- reading ----


def read_json(path: Path) -> object:
    """A JSON file; InputError names the line where it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); see data/README.md for the files needed"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; download it again") from None
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}, column {error.colno}"
        raise InputError(f"{place}: malformed JSON ({error.msg}); download it again") from None


def read_list(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv list with a header, one line a video, values without surrounding white space.

    The first column is the video's id. A missing column, a line with more or fewer fields than the header, an empty
    value and an id that stands there twice are InputErrors.
    """
    header, lines = _read_csv(path)
    if absent := [column for column in columns if column not in header]:
        raise InputError(
            f"{path}:1: no column {absent[0]!r} in the header {','.join(header)!r}; is this the right file?"
        )
    rows, line_of = [], {}
    for number, line in lines:
        where = f"{path}:{number}"
        if None in line or None in line.values():
            raise InputError(f"{where}: the line does not have the header's {len(header)} fields; correct the line")
        values = [line[column].strip() for column in columns]
        if "" in values:
            raise InputError(f"{where}: {columns[values.index('')]} is empty; correct the line")
        if values[0] in line_of:
            raise InputError(f"{where}: {values[0]} is listed twice (first in line {line_of[values[0]]}); remove one")
        rows.append(values)
        line_of[values[0]] = number
    return rows


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader]
            return list(reader.fieldnames or []), lines
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); see data/README.md for the files needed"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; download it again") from None
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num + 1}: malformed csv ({error}); correct the line") from None


# ---- checking ----


def pair(videos: Sequence[str], captions: Mapping[str, list[str]], listed_in: Path, captions_in: str) -> Pairs:
    """Every listed video with each of its captions; a video without one is an InputError."""
    for video in videos:
        if not captions.get(video):
            raise InputError(
                f"{listed_in}: {video} has no caption in {captions_in}; do both come from the same release?"
            )
    return [(video, caption) for video in videos for caption in captions[video]]


def count(pairs: Pairs) -> tuple[int, int]:
    """(videos, queries) of a split."""
    return len({video for video, _ in pairs}), len(pairs)


def check(splits: Mapping[str, Pairs], expected: Mapping[str, tuple[int, int]], *, allow_partial: bool) -> None:
    """Print what was found beside what the protocol has; InputError where splits overlap or a count is off."""
    print(f"{'split':8}{'videos':>10}{'expected':>10}{'queries':>10}{'expected':>10}")
    for name, pairs in splits.items():
        (videos, queries), (of_videos, of_queries) = count(pairs), expected[name]
        print(f"{name:8}{videos:>10,}{of_videos:>10,}{queries:>10,}{of_queries:>10,}")
    split_of = {}
    for name, pairs in splits.items():
        for video, _ in pairs:
            if split_of.setdefault(video, name) != name:
                raise InputError(
                    f"{video} is in both {split_of[video]} and {name}; a test video must not be trained on"
                )
    for name, pairs in splits.items():
        if count(pairs) != expected[name] and not allow_partial:
            raise InputError(
                f"{name} has {count(pairs)[0]:,} videos and {count(pairs)[1]:,} queries, the protocol "
                f"{expected[name][0]:,} and {expected[name][1]:,}; get the complete files, or pass --allow_partial"
            )


def drop_missing(
    splits: Mapping[str, Pairs], folder: Path, out: Path, *, allowed: bool
) -> tuple[dict[str, Pairs], list[str]]:
    """Look every video up in a folder, as <id>.<extension> or as a folder <id> of frames -> (splits left, ids missing).

    Empty files and folders count as missing. Unless dropping is allowed, missing videos are an InputError, and their
    whole list is left in missing.txt.
    """
    present = _videos_in(folder)
    listed = dict.fromkeys(video for pairs in splits.values() for video, _ in pairs)
    missing = [video for video in listed if video not in present]
    (out / "missing.txt").unlink(missing_ok=True)
    if not missing:
        return dict(splits), []
    some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
    found = f"{len(missing):,} of {len(listed):,} videos are not in {folder} ({some})"
    if not allowed:
        _write(out / "missing.txt", "".join(f"{video}\n" for video in missing))
        raise InputError(f"{found}; get those listed in {out / 'missing.txt'}, or pass --drop_missing")
    absent = set(missing)
    left = {name: [pair for pair in pairs if pair[0] not in absent] for name, pairs in splits.items()}
    for name, pairs in left.items():
        if not pairs:
            raise InputError(f"{folder}: not one video of {name} is there; add some, or choose another protocol")
    print(f"dropped: {found}")
    if len(left["test"]) < len(splits["test"]):
        print("dropped from test too: results are not comparable with published ones")
    return left, missing


def _videos_in(folder: Path) -> set[str]:
    """Ids with a video file or a folder of frames, neither of them empty."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; --videos takes the folder of the video files or of their frames")
    present = set()
    for entry in os.scandir(folder):
        stem, extension = os.path.splitext(entry.name)
        if entry.is_dir():
            if any(os.scandir(entry.path)):
                present.add(entry.name)
        elif extension.lower() in VIDEO_EXTENSIONS and entry.stat().st_size > 0:
            present.update((stem, entry.name))  # some corpora keep the extension in the id
    return present


# ---- writing ----


def write_corpus(out: Path, corpus: str, protocol: str, splits: Mapping[str, Pairs], missing: Sequence[str]) -> None:
    """Write the splits, remove those of another protocol, vouch for all of them with prepared.json, written last."""
    texts = {
        name: "".join(json.dumps({"video": video, "query": query}, ensure_ascii=False) + "\n" for video, query in pairs)
        for name, pairs in splits.items()
    }
    (out / "prepared.json").unlink(missing_ok=True)
    for name in SPLITS:
        if name in texts:
            _write(out / f"{name}.jsonl", texts[name])
        else:
            (out / f"{name}.jsonl").unlink(missing_ok=True)
    counts = {name: count(pairs) for name, pairs in splits.items()}
    prepared = {
        "corpus": corpus,
        "protocol": protocol,
        "videos": {name: videos for name, (videos, _) in counts.items()},
        "queries": {name: queries for name, (_, queries) in counts.items()},
        "missing": list(missing),
    }
    _write(out / "prepared.json", json.dumps(prepared, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {', '.join(f'{name}.jsonl' for name in splits)} and prepared.json to {out}")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""What every prepare_<corpus>.py shares: its command line, reading official files, checking splits, writing them.

Nothing here knows a corpus. A split is a list of (video, query) pairs in the order of the official lists. A prepared
corpus is {train,val,test}.jsonl, one {"video": id, "query": text} a line, and prepared.json, which is written last.
The scripts run as `python data/prepare_<corpus>.py`, so they import this file by its bare name.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

try:
    from narvid import InputError, files
except ModuleNotFoundError:  # not installed: run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from narvid import InputError, files
from narvid.data.frames import is_frame, spelling_among
from narvid.flags import command  # noqa: F401 (what the scripts start with)
from narvid.parsing import fault_of, is_blank

SPLITS = ("train", "val", "test")
AGAIN = "download it again, data/README.md says where"
VIDEO_EXTENSIONS = {
    ".3g2", ".3gp", ".3gpp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
}

Pairs = list[tuple[str, str]]
Figure = int | tuple[int, int]  # a count, or the lowest and highest that the files in circulation have
Counts = Mapping[str, tuple[Figure, Figure]]  # split -> (videos, queries)

# ---- the command line ----


def main(
    argv: list[str] | None,
    *,
    name: str,
    title: str,
    protocols: Mapping[str, Counts],
    read_splits: Callable[[Path, str], dict[str, Pairs]],
) -> None:
    """argv -> the prepared folder; exit 1 with one sentence where the files are not what the protocol needs.

    read_splits(annotations folder, protocol) gives split -> pairs; protocols has the counts expected of them.
    """
    only = next(iter(protocols)) if len(protocols) == 1 else None
    parser = argparse.ArgumentParser(allow_abbrev=False, description=f"{title} annotations -> {{train,val,test}}.jsonl")
    parser.add_argument("--annotations", type=Path, required=True, help="folder of the official files")
    parser.add_argument(
        "--protocol", choices=list(protocols), required=not only, default=only, help="splits, as in data/README.md"
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder to write, e.g. data/{name}")
    parser.add_argument(
        "--videos", type=Path, help="folder of video files or of frame folders: check that all are there"
    )
    parser.add_argument("--drop_missing", action="store_true", help="leave out videos that --videos does not hold")
    parser.add_argument("--allow_partial", action="store_true", help="accept counts other than the protocol's")
    args = parser.parse_args(argv)
    if args.drop_missing and args.videos is None:
        parser.error("--drop_missing needs --videos")
    try:
        splits, missing = read_splits(args.annotations, args.protocol), []
        check(splits, protocols[args.protocol], allow_partial=args.allow_partial)
        if args.videos:
            splits, missing = drop_missing(splits, args.videos, args.out, allowed=args.drop_missing)
        write_corpus(args.out, name, args.protocol, splits, missing)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


# ---- reading ----


def first_file(annotations: Path, *names: str) -> Path:
    """The first of these files that is there; InputError names them all where none is."""
    for name in names:
        if (annotations / name).is_file():
            return annotations / name
    raise InputError(f"{annotations}: no {' and no '.join(names)} is there; see data/README.md for the files needed")


def read_json(path: Path) -> object:
    """An official JSON file."""
    return files.read_json(path, advice=AGAIN)


def read_ids(path: Path) -> list[str]:
    """A list of ids, one a line, without a header. An id that stands there twice and an empty list are InputErrors."""
    line_of: dict[str, int] = {}
    for number, line in enumerate(files.read_lines(path, advice=AGAIN), 1):
        video = line.strip()
        if video in line_of:
            raise InputError(f"{path}:{number}: {video} is listed twice (first in line {line_of[video]}); remove one")
        if video:
            line_of[video] = number
    if not line_of:
        raise InputError(f"{path}: is empty; download it again")
    return list(line_of)


def read_list(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv list with a header, one line a video, values without surrounding white space.

    The first column is the video's id. An empty value and an id that stands there twice are InputErrors, and what
    files.read_csv refuses.
    """
    rows, line_of = [], {}
    for number, line in files.read_csv(path, columns, advice=AGAIN):
        where = f"{path}:{number}"
        values = [line[column].strip() for column in columns]
        if "" in values:
            raise InputError(f"{where}: {columns[values.index('')]} is empty; correct the line")
        if values[0] in line_of:
            raise InputError(f"{where}: {values[0]} is listed twice (first in line {line_of[values[0]]}); remove one")
        rows.append(values)
        line_of[values[0]] = number
    return rows


# ---- checking ----


def distinct(videos: list[str], where: str | Path) -> list[str]:
    """The same ids; one that stands there twice is an InputError."""
    seen: set[str] = set()
    for video in videos:
        if video in seen:
            raise InputError(f"{where}: {video} stands there twice; remove one")
        seen.add(video)
    return videos


def sentence(text: object, where: str) -> str:
    """A caption without surrounding white space; InputError where it is no text or empty."""
    if not isinstance(text, str) or is_blank(text):
        raise InputError(f"{where}: the caption is {'empty' if isinstance(text, str) else 'no text'}; correct it")
    if fault := fault_of(text):  # of a pickle; JSON was looked at
        raise InputError(f"{where}: {fault}; correct it")
    return text.strip()


def paragraph(sentences: Sequence[object], where: str) -> str:
    """All sentences of a video, in the order given, as one query."""
    return " ".join(sentence(text, f"{where}, sentence {number}") for number, text in enumerate(sentences, 1))


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


def check(splits: Mapping[str, Pairs], expected: Counts, *, allow_partial: bool) -> None:
    """Print what was found beside what the protocol has; InputError where splits overlap or a count is off."""
    print(f"{'split':8}{'videos':>10}{'expected':>18}{'queries':>10}{'expected':>18}")
    for name, pairs in splits.items():
        (videos, queries), (of_videos, of_queries) = count(pairs), expected[name]
        print(f"{name:8}{videos:>10,}{_shown(of_videos):>18}{queries:>10,}{_shown(of_queries):>18}")
    split_of = {}
    for name, pairs in splits.items():
        for video, _ in pairs:
            if split_of.setdefault(video, name) != name:
                raise InputError(
                    f"{video} is in both {split_of[video]} and {name}; a test video must not be trained on"
                )
    for name, pairs in splits.items():
        if not pairs:
            raise InputError(f"{name} has no video at all; get the complete files")
        if not all(map(_fits, count(pairs), expected[name])) and not allow_partial:
            raise InputError(
                f"{name} has {count(pairs)[0]:,} videos and {count(pairs)[1]:,} queries, the protocol "
                f"{' and '.join(map(_shown, expected[name]))}; get the complete files, or pass --allow_partial"
            )


def _fits(found: int, figure: Figure) -> bool:
    return figure[0] <= found <= figure[1] if isinstance(figure, tuple) else found == figure


def _shown(figure: Figure) -> str:
    return "-".join(f"{n:,}" for n in figure) if isinstance(figure, tuple) else f"{figure:,}"


def drop_missing(
    splits: Mapping[str, Pairs], folder: Path, out: Path, *, allowed: bool
) -> tuple[dict[str, Pairs], list[str]]:
    """Look every video up below a folder, as <id>.<extension> or a folder <id> of jpgs -> (splits left, ids missing).

    Empty files and folders count as missing. Unless dropping is allowed, missing videos are an InputError, and their
    whole list is left in missing.txt.
    """
    present = _videos_in(folder)
    listed = dict.fromkeys(video for pairs in splits.values() for video, _ in pairs)
    missing = [video for video in listed if video not in present]
    files.remove(out / "missing.txt")
    if not missing:
        return dict(splits), []
    some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
    spelling = spelling_among(present)(missing[0])
    found = f"{len(missing):,} of {len(listed):,} videos are not in {folder} ({some}){spelling}"
    if not allowed:
        files.write_text(out / "missing.txt", "".join(f"{video}\n" for video in missing))
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
    """Ids with a video file that is not empty, or a folder of jpgs, at any depth."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; --videos takes the folder of the video files or of their frames")
    present = set()
    for parent, names in files.walk(folder):
        if any(map(is_frame, names)):
            present.add(os.path.basename(parent))
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file() and path.stat().st_size > 0:
                present.add(path.stem)
    return present


# ---- writing ----


def write_corpus(out: Path, corpus: str, protocol: str, splits: Mapping[str, Pairs], missing: Sequence[str]) -> None:
    """Write the splits, remove those of another protocol, vouch for all of them with prepared.json, written last."""
    files.remove(out / "prepared.json")
    for name in SPLITS:
        if name in splits:
            pairs = splits[name]
            files.write_json_lines(out / f"{name}.jsonl", ({"video": video, "query": query} for video, query in pairs))
        else:
            files.remove(out / f"{name}.jsonl")
    counts = {name: count(pairs) for name, pairs in splits.items()}
    prepared = {
        "corpus": corpus,
        "protocol": protocol,
        "videos": {name: videos for name, (videos, _) in counts.items()},
        "queries": {name: queries for name, (_, queries) in counts.items()},
        "missing": list(missing),
    }
    files.write_json(out / "prepared.json", prepared)
    print(f"wrote {', '.join(f'{name}.jsonl' for name in splits)} and prepared.json to {out}")

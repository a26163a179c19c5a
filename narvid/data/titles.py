"""Titles: sentences about a whole video, for the baseline cap4video: read, joined with a split, added as pairs.

Cap4Video's files hold up to 30 titles a video, best first by CLIP's similarity to it (forms: published_narrations.py).
A narration serves as well: its distinct sentences are the titles, evenly picked where they are too many. No tensor
here; titles become tokens in datasets.collate.

Cap4Video trains its first stage with one more pair a video, the video and its best title. A corpus with these pairs:
    python -m narvid.data.titles --titles FILE ... --corpus data/msrvtt --out data/msrvtt_titles
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np

from narvid import InputError
from narvid.data.datasets import AGAIN, Split, read_pairs
from narvid.data.frames import pick_frames, spelling_among
from narvid.data.narrations import load_narrations
from narvid.data.published_narrations import parse_published, read_form
from narvid.flags import command
from narvid.files import read_json, read_text, write_json, write_json_lines, write_text


def load_titles(paths: Sequence[str | Path], known: Container[str], max_titles: int) -> dict[str, list[str]]:
    """Titles of all files: video -> at most `max_titles`, best first, blank ones left out; a video may have none.

    known: ids of the corpus; a name in a file loses its extension where only the bare name is known. Raises InputError
    for a malformed file and for a video that has titles in two.
    """
    titles: dict[str, list[str]] = {}
    for path in paths:
        text, form = read_form(path)
        found = ({video: narration.sentences for video, narration in load_narrations(path).items()} if form == "ours"
                 else parse_published(path, text, form, known))
        for video, sentences in found.items():
            if video in titles:
                raise InputError(f"{path}: {video} has titles in another of the files too; give only one of them")
            sentences = [sentence for sentence in sentences if sentence.strip()]
            if form != "titles":  # sentences of frames: none is the best, and neighbours often say the same
                sentences = list(dict.fromkeys(sentences))
                sentences = [sentences[i] for i in pick_frames(len(sentences), max_titles)] if sentences else []
            titles[video] = sentences[:max_titles]
    return titles


def with_titles(split: Split, titles: Mapping[str, list[str]], *, paths: Sequence[str | Path],
                missing: str = "error") -> Split:
    """The split with the titles of its videos. missing: "error" or "skip-video" for videos without a title."""
    has = np.array([bool(titles.get(video)) for video in split.videos])
    if not has.any() or (missing == "error" and not has.all()):
        without = [video for video, some in zip(split.videos, has) if not some]
        raise InputError(f"{', '.join(map(str, paths))}: no title for {len(without)} of {len(has)} videos, the first "
                         f"is {without[0]}{spelling_among(titles)(without[0])}; name the file that holds them with "
                         "--titles, or leave such videos out with --missing_narration skip-video")
    videos = [video for video, some in zip(split.videos, has) if some]
    left = has[split.video_of_query]  # queries whose video stays
    return split._replace(
        queries=[query for query, some in zip(split.queries, left) if some],
        video_of_query=(np.cumsum(has) - 1)[split.video_of_query[left]], videos=videos,
        picks=[picks for picks, some in zip(split.picks, has) if some], titles=[titles[video] for video in videos],
        skipped=sorted([*split.skipped, *(video for video, some in zip(split.videos, has) if not some)]))


# ---- the extra training pairs ----


def add_pairs(corpus: Path, out: Path, titles: Mapping[str, list[str]]) -> tuple[int, int]:
    """Write `out` like the prepared folder `corpus`, train.jsonl with one more pair a video -> (pairs added, videos).

    The other splits stay as they are; prepared.json, where there is one, is written last and counts the new pairs.
    Videos without a title get no pair.
    """
    pairs = [(video, query) for _, video, query in read_pairs(corpus / "train.jsonl")]
    videos = dict.fromkeys(video for video, _ in pairs)
    added = [(video, titles[video][0]) for video in videos if titles.get(video)]
    if not added:
        raise InputError(f"{corpus / 'train.jsonl'}: none of its {len(videos)} videos has a title; give the file of "
                         "the training videos")
    copied = {name: read_text(corpus / name) for name in ("val.jsonl", "test.jsonl") if (corpus / name).exists()}
    prepared = None
    if (corpus / "prepared.json").exists():
        prepared = read_json(corpus / "prepared.json", dict, advice=AGAIN)
        if not isinstance(prepared.get("queries"), dict):
            raise InputError(f'{corpus / "prepared.json"}: has no "queries"; {AGAIN}')
        prepared["queries"]["train"] = len(pairs) + len(added)
        prepared["title_pairs"] = len(added)
    write_json_lines(out / "train.jsonl", ({"video": video, "query": query} for video, query in [*pairs, *added]))
    for name, text in copied.items():
        write_text(out / name, text)
    if prepared:
        write_json(out / "prepared.json", prepared)
    return len(added), len(videos)


def main(argv: Sequence[str] | None = None) -> None:
    """argv -> the folder with the extra pairs, and how many there are."""
    parser = argparse.ArgumentParser(prog="python -m narvid.data.titles", allow_abbrev=False)
    parser.add_argument("--titles", nargs="+", required=True, metavar="FILE", help="titles of the training videos")
    parser.add_argument("--corpus", type=Path, required=True, help="prepared folder, e.g. data/msrvtt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/msrvtt_titles")
    args = parser.parse_args(argv)
    try:
        if args.out.resolve() == args.corpus.resolve():
            raise InputError(f"--out {args.out}: is the corpus itself; name another folder")
        known = {video for _, video, _ in read_pairs(args.corpus / "train.jsonl")}
        added, videos = add_pairs(args.corpus, args.out, load_titles(args.titles, known, max_titles=1))
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {added} pairs added, {videos - added} training videos have no title; train with "
          f"--data_dir {args.out} --frames {args.corpus / 'frames'}")


if __name__ == "__main__":
    command(main)

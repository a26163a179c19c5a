"""DiDeMo, paragraphs: the official json files and the id lists -> {train,val,test}.jsonl. Files: data/README.md.

python data/prepare_didemo.py --annotations DIR --out data/didemo

A video's query is all its descriptions, joined in the order of the json file, as the family does: several annotators
described overlapping moments, so there is no order in time that all of them share.
"""

import os
from pathlib import Path

import corpus
from corpus import InputError

PUBLIC_TRAIN, PAPER_TRAIN = 8392, 8395  # ids in the public list; videos in the paper
TRAIN = (PUBLIC_TRAIN, PAPER_TRAIN)
PROTOCOLS = {"paragraph": {"train": (TRAIN, TRAIN), "val": (1065, 1065), "test": (1004, 1004)}}


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """video -> its descriptions in file order; the json holds videos that no list has."""
    content = corpus.read_json(path)
    if not isinstance(content, list):
        raise InputError(f'{path}: is no list of {{"video", "description"}}; is this the official file?')
    descriptions: dict[str, list[str]] = {}
    for position, entry in enumerate(content):
        video, text = (entry.get("video"), entry.get("description")) if isinstance(entry, dict) else (None, None)
        if not isinstance(video, str):
            raise InputError(f'{path}: entry {position} has no "video"; download it again')
        descriptions.setdefault(video, []).append(corpus.sentence(text, f"{path}: entry {position}, {video}"))
    return descriptions


def video_id(name: str) -> str:
    """The id of a listed file name: without its extension, which changes when a video is compressed."""
    return os.path.splitext(name)[0]


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (video, paragraph) pairs, one a listed video."""
    splits = {}
    for split in PROTOCOLS[protocol]:
        listed_in = corpus.first_file(annotations, f"{split}_list.txt", f"splits/{split}_list.txt")
        names = corpus.read_ids(listed_in)
        descriptions = read_descriptions(annotations / f"{split}_data.json")
        for name in names:
            if name not in descriptions:
                raise InputError(f"{listed_in}: {name} has no description in {split}_data.json; is it the right list?")
        ids = corpus.distinct([video_id(name) for name in names], f"{listed_in}, extensions apart")
        paragraphs = [corpus.paragraph(descriptions[name], name) for name in names]
        splits[split] = list(zip(ids, paragraphs))
        print(f"{split}: {len(names):,} videos listed; {len(descriptions) - len(names):,} others in the json, left out")
    found = len(splits["train"])
    print(f"train: {found:,} here; the public list has {PUBLIC_TRAIN:,} ids, the paper says {PAPER_TRAIN:,}")
    return splits


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder (corpus.main)."""
    corpus.main(argv, name="didemo", title="DiDeMo", protocols=PROTOCOLS, read_splits=read_splits)


if __name__ == "__main__":
    corpus.command(main)

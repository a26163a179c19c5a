"""ActivityNet Captions, paragraphs, val_1: train.json and val_1.json -> {train,test}.jsonl. Files: data/README.md.

python data/prepare_activitynet.py --annotations DIR --out data/activitynet

A video's query is all its sentences, joined in the order of the json file, as the family does. In 376 of the 14,926
videos that is not the order of their start times.
"""

from pathlib import Path

import corpus
from corpus import InputError

FILES = {"train": ("train.json", "train_list.txt"), "test": ("val_1.json", "val_1_list.txt")}
PROTOCOLS = {"paragraph": {"train": (10009, 10009), "test": (4917, 4917)}}


def read_paragraphs(path: Path) -> dict[str, list[str]]:
    """video -> [its paragraph], in file order."""
    content = corpus.read_json(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: is no dict of {{id: {{"timestamps", "sentences"}}}}; is this the official file?')
    paragraphs = {}
    for video, entry in content.items():
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        if not isinstance(sentences, list) or not sentences:
            raise InputError(f'{path}: {video} has no list "sentences"; download it again')
        paragraphs[video] = [corpus.paragraph(sentences, f"{path}: {video}")]
    return paragraphs


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (video, paragraph) pairs: of the listed videos, or of the whole json where no list is there."""
    splits = {}
    for split in PROTOCOLS[protocol]:
        name, list_name = FILES[split]
        paragraphs, listed_in = read_paragraphs(annotations / name), annotations / list_name
        videos = corpus.read_ids(listed_in) if listed_in.is_file() else list(paragraphs)
        splits[split] = corpus.pair(videos, paragraphs, listed_in, name)
    return splits


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder (corpus.main)."""
    corpus.main(argv, name="activitynet", title="ActivityNet", protocols=PROTOCOLS, read_splits=read_splits)


if __name__ == "__main__":
    corpus.command(main)

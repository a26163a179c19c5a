"""VATEX, English: the official captions and CLIP2Video's lists -> {train,val,test}.jsonl. Files: data/README.md.

python data/prepare_vatex.py --annotations DIR --protocol hgr --out data/vatex
"""

from pathlib import Path

import corpus
from corpus import InputError

CAPTIONS = ("vatex_training_v1.0.json", "vatex_validation_v1.0.json")
LISTS = {split: f"{split}_list.txt" for split in corpus.SPLITS}  # the HGR split
TEST_1K5 = "test1k5_sec_list.txt"

# 10 captions a video in both. hgr is the split of the tables; 1k5 has a test of its own, drawn from HGR's val and test.
COUNTS = {"train": (25991, 259910), "val": (1500, 15000), "test": (1500, 15000)}
PROTOCOLS = {"hgr": COUNTS, "1k5": COUNTS}


def read_captions(annotations: Path) -> dict[str, list[str]]:
    """video -> its English captions; a video that stands twice in the official files is an InputError."""
    captions: dict[str, list[str]] = {}
    for name in CAPTIONS:
        path = annotations / name
        content = corpus.read_json(path)
        if not isinstance(content, list):
            raise InputError(f'{path}: is no list of {{"videoID", "enCap"}}; is this the official file?')
        for position, entry in enumerate(content):
            video, english = (entry.get("videoID"), entry.get("enCap")) if isinstance(entry, dict) else (None, None)
            if not isinstance(video, str) or not isinstance(english, list):
                raise InputError(f'{path}: entry {position} has no "videoID" or no list "enCap"; download it again')
            if video in captions:
                raise InputError(f"{path}: {video} stands there twice, or in {CAPTIONS[0]} too; remove one")
            captions[video] = [corpus.sentence(text, f"{path}: {video}, enCap {n}") for n, text in enumerate(english)]
    return captions


def read_ids(annotations: Path, protocol: str) -> dict[str, tuple[list[str], Path]]:
    """Split -> (its videos, the list they come from)."""
    ids = {split: (corpus.read_ids(annotations / name), annotations / name) for split, name in LISTS.items()}
    if protocol == "1k5":
        test = corpus.read_ids(annotations / TEST_1K5)
        taken = set(test)
        rest = [video for split in ("val", "test") for video in ids[split][0] if video not in taken]
        ids["val"] = (rest, ids["val"][1])  # what the new test leaves of HGR's val and test
        ids["test"] = (test, annotations / TEST_1K5)
    return ids


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (video, query) pairs: every English caption of every listed video."""
    ids = read_ids(annotations, protocol)
    captions = read_captions(annotations)
    return {
        split: corpus.pair(videos, captions, path, " or ".join(CAPTIONS)) for split, (videos, path) in ids.items()
    }


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder (corpus.main)."""
    corpus.main(argv, name="vatex", title="VATEX", protocols=PROTOCOLS, read_splits=read_splits)


if __name__ == "__main__":
    corpus.command(main)

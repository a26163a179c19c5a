"""MSR-VTT: the official annotations -> {train,val,test}.jsonl. Where to get the files: data/README.md.

python data/prepare_msrvtt.py --annotations DIR --protocol 9k --out data/msrvtt
"""

from pathlib import Path

import corpus
from corpus import InputError

JOINED = "MSRVTT_data.json"
OFFICIAL = ("train_val_videodatainfo.json", "test_videodatainfo.json")
TEST_1KA = "MSRVTT_JSFUSION_test.csv"

TEST_1KB = "test_list_miech.txt"

# Protocol -> split -> (list of its videos, (videos, queries)). 20 captions a video; 1k-A and 1k-B have one query each.
PROTOCOLS = {
    "9k": {"train": ("MSRVTT_train.9k.csv", (9000, 180000)), "test": (TEST_1KA, (1000, 1000))},
    "7k": {"train": ("MSRVTT_train.7k.csv", (7010, 140200)), "test": (TEST_1KA, (1000, 1000))},
    "full": {
        "train": ("MSRVTT_train.full.csv", (6513, 130260)),
        "val": ("MSRVTT_val.full.csv", (497, 9940)),
        "test": ("MSRVTT_test.full.csv", (2990, 59800)),
    },
    "1kB": {"train": ("train_list_miech.txt", (6656, 133120)), "test": (TEST_1KB, (1000, 1000))},
}


def read_captions(annotations: Path) -> tuple[dict[str, list[str]], str]:
    """(video -> its captions in file order, names of the files they come from)."""
    names = (JOINED,) if (annotations / JOINED).is_file() else OFFICIAL
    if absent := [name for name in names if not (annotations / name).is_file()]:
        raise InputError(f"{annotations}: neither {JOINED} nor {absent[0]} is there; see data/README.md")
    captions = {}
    for name in names:
        content = corpus.read_json(annotations / name)
        if not isinstance(content, dict) or not isinstance(content.get("sentences"), list):
            raise InputError(f'{annotations / name}: no list "sentences"; is this the official file?')
        for position, sentence in enumerate(content["sentences"]):
            video, caption = _fields(sentence, f"{annotations / name}: sentences[{position}]")
            captions.setdefault(video, []).append(caption)
    return captions, " and ".join(names)


def _fields(sentence: object, where: str) -> tuple[str, str]:
    """Video id and caption of one official sentence; the caption loses surrounding white space, nothing else."""
    video, caption = (sentence.get("video_id"), sentence.get("caption")) if isinstance(sentence, dict) else (None, None)
    if not isinstance(video, str) or not isinstance(caption, str):
        raise InputError(f'{where}: no "video_id" or no "caption"; download the file again')
    if corpus.is_blank(caption):
        raise InputError(f"{where}: the caption of {video} is empty; correct it")
    return video, caption.strip()


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (video, query) pairs, in the order of the official lists."""
    captions, captions_in = read_captions(annotations)
    splits = {}
    for split, (name, _) in PROTOCOLS[protocol].items():
        path = annotations / name
        if name == TEST_1KA:  # its sentences stand as they are: some are not among the video's captions
            splits[split] = [(video, query) for video, query in corpus.read_list(path, ["video_id", "sentence"])]
            continue
        if path.suffix == ".txt":
            videos = corpus.read_ids(path)
        else:
            videos = [video for (video,) in corpus.read_list(path, ["video_id"])]
        splits[split] = corpus.pair(videos, captions, path, captions_in)
        if name == TEST_1KB:  # the list names videos alone; collaborative-experts queries with each one's first caption
            splits[split] = [(video, captions[video][0]) for video in videos]
    return splits


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder (corpus.main)."""
    counts = {
        protocol: {split: expected for split, (_, expected) in splits.items()} for protocol, splits in PROTOCOLS.items()
    }
    corpus.main(argv, name="msrvtt", title="MSR-VTT", protocols=counts, read_splits=read_splits)


if __name__ == "__main__":
    corpus.command(main)

"""MSR-VTT: the official annotations -> {train,val,test}.jsonl. Where to get the files: data/README.md.

python data/prepare_msrvtt.py --annotations DIR --protocol 9k --out data/msrvtt
"""

import argparse
import sys
from pathlib import Path

import corpus
from corpus import InputError

JOINED = "MSRVTT_data.json"
OFFICIAL = ("train_val_videodatainfo.json", "test_videodatainfo.json")
TEST_1KA = "MSRVTT_JSFUSION_test.csv"

# Protocol -> split -> (list of its videos, (videos, queries)). 20 captions a video; 1k-A has one fixed sentence each.
PROTOCOLS = {
    "9k": {"train": ("MSRVTT_train.9k.csv", (9000, 180000)), "test": (TEST_1KA, (1000, 1000))},
    "7k": {"train": ("MSRVTT_train.7k.csv", (7010, 140200)), "test": (TEST_1KA, (1000, 1000))},
    "full": {
        "train": ("MSRVTT_train.full.csv", (6513, 130260)),
        "val": ("MSRVTT_val.full.csv", (497, 9940)),
        "test": ("MSRVTT_test.full.csv", (2990, 59800)),
    },
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
    if not caption.strip():
        raise InputError(f"{where}: the caption of {video} is empty; correct it")
    return video, caption.strip()


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (video, query) pairs, in the order of the official lists."""
    captions, captions_in = read_captions(annotations)
    splits = {}
    for split, (name, _) in PROTOCOLS[protocol].items():
        path = annotations / name
        if (
            name == TEST_1KA
        ):  # its sentences are taken as they stand: 32 of them are not verbatim among the video's captions
            splits[split] = [(video, query) for video, query in corpus.read_list(path, ["video_id", "sentence"])]
        else:
            videos = [video for (video,) in corpus.read_list(path, ["video_id"])]
            splits[split] = corpus.pair(videos, captions, path, captions_in)
    return splits


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder; exit 1 with one sentence where the files are not what the protocol needs."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="MSR-VTT annotations -> {train,val,test}.jsonl")
    parser.add_argument("--annotations", type=Path, required=True, help="folder of the official json and csv files")
    parser.add_argument(
        "--protocol", choices=list(PROTOCOLS), required=True, help="9k and 7k test on 1k-A, full on 2,990"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/msrvtt")
    parser.add_argument(
        "--videos", type=Path, help="folder of video files or of frame folders: check that all are there"
    )
    parser.add_argument("--drop_missing", action="store_true", help="leave out videos that --videos does not hold")
    parser.add_argument("--allow_partial", action="store_true", help="accept counts other than the protocol's")
    args = parser.parse_args(argv)
    if args.drop_missing and args.videos is None:
        parser.error("--drop_missing needs --videos")
    expected = {split: counts for split, (_, counts) in PROTOCOLS[args.protocol].items()}
    try:
        splits, missing = read_splits(args.annotations, args.protocol), []
        corpus.check(splits, expected, allow_partial=args.allow_partial)
        if args.videos:
            splits, missing = corpus.drop_missing(splits, args.videos, args.out, allowed=args.drop_missing)
        corpus.write_corpus(args.out, "msrvtt", args.protocol, splits, missing)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

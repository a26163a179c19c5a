"""LSMDC: the three official csv files -> {train,val,test}.jsonl. Where to get the files: data/README.md.

python data/prepare_lsmdc.py --annotations DIR --out data/lsmdc
"""

from pathlib import Path

import corpus
from corpus import InputError, files

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
COLUMNS = 6  # clip id, start and end aligned, start and end extracted, sentence; tab separated, no header, no quoting

# One sentence a clip, but for 33 of the 128,118 sentences of the whole corpus, whose clip has another one already.
PROTOCOLS = {
    "standard": {"train": ((101046, 101079), 101079), "val": ((7375, 7408), 7408), "test": (1000, 1000)},
}


def read_csv(path: Path) -> corpus.Pairs:
    """(clip, sentence) of every line."""
    pairs = []
    for number, line in enumerate(files.read_lines(path, advice=corpus.AGAIN), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != COLUMNS or not fields[0].strip():
            raise InputError(f"{path}:{number}: {len(fields)} fields, not {COLUMNS} with a clip id first; correct it")
        pairs.append((fields[0].strip(), corpus.sentence(fields[-1], f"{path}:{number}")))
    if not pairs:
        raise InputError(f"{path}: is empty; download it again")
    return pairs


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (clip, sentence) pairs, in file order; in test a clip that stands there twice is an InputError."""
    splits = {split: read_csv(annotations / FILES[split]) for split in PROTOCOLS[protocol]}
    corpus.distinct([clip for clip, _ in splits["test"]], annotations / FILES["test"])
    for split, pairs in splits.items():
        if repeated := len(pairs) - corpus.count(pairs)[0]:
            print(f"{split}: {repeated:,} sentences whose clip has another one already; kept, the official files do so")
    return splits


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder (corpus.main)."""
    corpus.main(argv, name="lsmdc", title="LSMDC", protocols=PROTOCOLS, read_splits=read_splits)


if __name__ == "__main__":
    corpus.command(main)

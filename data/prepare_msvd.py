"""MSVD: the captions and the three lists -> {train,val,test}.jsonl. Where to get the files: data/README.md.

python data/prepare_msvd.py --annotations DIR --out data/msvd
"""

import io
import pickle
import pickletools
from pathlib import Path

import corpus
from corpus import InputError, files

CAPTIONS = ("raw-captions.pkl", "captions_msvd.json")
PROTOCOLS = {"standard": {"train": (1200, 48774), "val": (100, 4290), "test": (670, 27763)}}


class PlainUnpickler(pickle.Unpickler):
    """A pickle can name any function and call it; this reader refuses every name, so nothing is ever called."""

    def __init__(self, content: bytes, path: Path):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> None:
        raise InputError(
            f"{self.path}: asks to run {module}.{name}, and captions need nothing but dicts, lists and strings; "
            "nothing was run, do not use this file"
        )

    def persistent_load(self, pid: object) -> None:
        raise InputError(f"{self.path}: refers to objects outside the file; download it again")


def read_pickle(path: Path) -> object:
    """What a pickle of plain Python values holds; InputError where it holds more or is broken."""
    content = files.read_bytes(path, advice=corpus.AGAIN)
    try:
        for number, (step, argument, _) in enumerate(pickletools.genops(content)):
            if "PUT" in step.name and int(argument) > number:  # the unpickler would make room for as many values
                raise pickle.UnpicklingError(f"slot {argument} of {number}")
        return PlainUnpickler(content, path).load()
    except InputError:
        raise
    except Exception as error:  # a broken pickle raises whatever its first wrong byte leads to
        what = f"{type(error).__name__} {str(error)[:60]!r}"
        raise InputError(f"{path}: is no whole pickle ({what}); download it again") from None


def read_captions(path: Path) -> dict[str, list[str]]:
    """video -> captions: of the pickle {id: [[word, ...], ...]}, or of the json {id: [caption, ...]}."""
    content = read_pickle(path) if path.suffix == ".pkl" else corpus.read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds no dict of captions; is this the right file?")
    for video, captions in content.items():
        if not isinstance(video, str) or not isinstance(captions, list):
            raise InputError(f"{path}: {video!r} is not a text with a list of captions; is this the right file?")
    return {
        video: [_joined(caption, f"{path}: {video}, caption {number}") for number, caption in enumerate(captions, 1)]
        for video, captions in content.items()
    }


def _joined(caption: object, where: str) -> str:
    """A caption as text. Tuples, numbers and bytes are no captions of any published file, so they are refused too."""
    if isinstance(caption, list):
        for word in caption:
            if not isinstance(word, str):
                raise InputError(f"{where}: holds a {type(word).__name__} instead of a word; download the file again")
        caption = " ".join(caption)
    return corpus.sentence(caption, where)


def read_splits(annotations: Path, protocol: str) -> dict[str, corpus.Pairs]:
    """Split -> (video, query) pairs: every caption of every listed video."""
    path = corpus.first_file(annotations, *CAPTIONS)
    captions, splits = read_captions(path), {}
    for split in PROTOCOLS[protocol]:
        listed_in = annotations / f"{split}_list.txt"
        splits[split] = corpus.pair(corpus.read_ids(listed_in), captions, listed_in, path.name)
    return splits


def main(argv: list[str] | None = None) -> None:
    """argv -> the prepared folder (corpus.main)."""
    corpus.main(argv, name="msvd", title="MSVD", protocols=PROTOCOLS, read_splits=read_splits)


if __name__ == "__main__":
    corpus.command(main)

"""Features of frozen towers as a split holds them: read from disk in place of pixels and tokens.

Filling the folder is narvid/run/feature_cache.py, where its layout stands too.

Legend: B queries, K frames of a video, L words of a query, U distinct sentences, D joint dimension; T rows of an entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from narvid import InputError


class Store:
    """All entries of one kind in a folder: key -> (T, D), read where it lies on disk, memory shared by processes."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.files: list[Tensor] = []
        self.place: dict[str, tuple[int, int, int]] = {}  # key -> file, first row, row behind the last
        for path in sorted(folder.glob(f"{kind}-*.pt")):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                keys, rows, features = json.loads(state["keys"]), state["rows"], state["features"]
                ends = rows.cumsum(0).tolist()
                if not (len(keys) == len(ends) > 0 and ends[-1] == len(features) and all(rows > 0)):
                    raise ValueError("keys, rows and features do not fit")
            except Exception as error:  # zip, pickle and torch each raise their own
                raise InputError(f"{path}: cannot be read or is damaged ({type(error).__name__}); delete it, its "
                                 "features are then made again") from error
            self.place.update(zip(keys, zip([len(self.files)] * len(keys), [0, *ends], ends)))
            self.files.append(features)

    def __reduce__(self):
        return Store, (self.folder, self.kind)  # a worker that is not forked opens the files, it gets no copy

    def __getitem__(self, key: str) -> Tensor:
        number, first, end = self.place[key]
        return self.files[number][first:end]  # (T, D)


class Features(NamedTuple):
    """What a split reads in place of pixels and tokens (Split.features)."""

    frames: Store
    words: Store
    eos: Store
    videos: list[str]  # V keys

    def of_video(self, video: int) -> Tensor:
        """Index of a video -> the features of its picked frames (K_v, D)."""
        return self.frames[self.videos[video]]

    def of_queries(self, queries: list[str]) -> tuple[Tensor, Tensor]:
        """B training queries -> eos, then words (B, 1 + L, D), zero-padded, and mask (B, L) True = a word."""
        both = [self.words[query] for query in queries]  # eos first
        padded = pad_sequence(both, batch_first=True)  # (B, 1 + L, D)
        return padded, torch.arange(1, padded.shape[1]) < torch.tensor([[len(x)] for x in both])

    def of_sentences(self, sentences: list[str]) -> Tensor:
        """U sentences, or titles -> eos (U, 1, D)."""
        return torch.stack([self.eos[sentence] for sentence in sentences])

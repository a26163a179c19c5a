"""Pictures -> what a model of transformers reads, in this process or in workers that go ahead of the model.

Decoding and resizing a picture takes a core longer than a fast GPU takes to caption it, so that one process that does
both leaves the GPU waiting. Not here: the model (captioners.py), which pictures (asking.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from narvid import InputError
from narvid.data.frames import PICTURE_ERRORS, check_jpg
from narvid.files import read_bytes

# torch and transformers are imported where they are used: a server's client needs neither.

MOST_WORKERS = 8  # more than any model of today keeps up with


class Preparer:
    """A processor and the text that stands for prompt and picture (None: the picture alone). It holds no weights."""

    def __init__(self, name: str, processor, template: str | None):
        self.name, self.processor, self.template = name, processor, template

    def __call__(self, pictures: Sequence[bytes], names: Sequence[object] | None = None):
        """The bytes of N image files -> the model's inputs, on the CPU; InputError where it cannot make them."""
        decoded = [_decode(*pair) for pair in zip(pictures, names or ["a picture"] * len(pictures), strict=True)]
        try:
            if self.template is None:
                return self.processor(images=decoded, return_tensors="pt")
            start = self.processor.tokenizer.bos_token
            return self.processor(
                text=[self.template] * len(decoded),
                images=[[picture] for picture in decoded],  # flat, some processors take them for one text's pictures
                padding=True,
                return_tensors="pt",
                # templates may hold the start token
                add_special_tokens=not (start and self.template.startswith(start)),
            )
        except (ValueError, TypeError) as error:
            why = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise InputError(f"--captioner {self.name} cannot caption a picture: {why}") from error


def read_picture(path: Path) -> bytes:
    """A frame's file, checked to be a whole jpg."""
    check_jpg(path)
    return read_bytes(path)


def _decode(picture: bytes, name: object) -> Image.Image:
    try:
        return Image.open(BytesIO(picture)).convert("RGB")
    except PICTURE_ERRORS as error:
        raise InputError(f"{name} cannot be decoded ({error}): extract its frames again") from error


# ---- ahead of the model ----


def prepared_ahead(preparer: Preparer, batches: Sequence[Sequence[Path]], *, single: bool, workers: int) -> Iterator:
    """For each batch of picture files the inputs of its pictures, in order: one for all, or one each if `single`.

    workers: processes that prepare later batches meanwhile, two each. InputError names a picture that is not whole.
    """
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or the library warns of every fork
    prepared = _Prepared(preparer, batches, single, workers)
    for inputs in torch.utils.data.DataLoader(prepared, batch_size=None, collate_fn=_as_it_is, num_workers=workers):
        if isinstance(inputs, InputError):
            raise inputs
        yield [{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in of_some.items()}
               for of_some in inputs]


class _Prepared:
    """Item i: the inputs of batch i. Tensors go through shared memory where it has room, else as arrays by a pipe."""

    def __init__(self, preparer: Preparer, batches: Sequence[Sequence[Path]], single: bool, workers: int):
        self.preparer, self.batches, self.single, self.workers = preparer, batches, single, workers

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int):
        from narvid.data.loader import free_shared_memory

        try:
            paths = self.batches[i]
            parts = [[path] for path in paths] if self.single else [paths]
            inputs = [dict(self.preparer([read_picture(path) for path in part], part)) for part in parts]
        except InputError as error:  # raised in a worker, it would come with the worker's traceback
            return error
        tensors = [x for of_some in inputs for x in of_some.values() if hasattr(x, "nbytes")]
        if self.workers and 4 * self.workers * sum(x.nbytes for x in tensors) > free_shared_memory():
            return [{name: x.numpy() if hasattr(x, "numpy") else x for name, x in of_some.items()}
                    for of_some in inputs]
        return inputs


def _as_it_is(item):
    return item


def free_workers(on_gpu: bool) -> int:
    """How many workers to start where nobody says: the cores that are left, none where the model itself takes them."""
    if not on_gpu:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))

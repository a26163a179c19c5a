"""The features of frozen towers on disk, so that heads train without pixels and towers: --feature_cache DIR.

Every frame, query and sentence goes through the towers once, before the first step; batches then carry features where
they carried pixels and tokens, and the towers' encode_frames and encode_text hand them on. What is trained above the
towers knows nothing of it, nor does evaluation, whose videos come from here too.

    DIR/<key>/made_of.json       what the key stands for: weights, CLIP config, number format, max_words
              frames-*.pt        a video's picked frames (K_v, D); known by id, and number, size and mtime of each jpg
              words-*.pt         a training query's eos and then its words (1 + L, D)
              eos-*.pt           the eos (1, D) of a sentence of a narration, or of a title

Other weights or another config have another key, and so have training and evaluation where their number formats
differ; a jpg written anew makes its video a new one: nothing stale is read, and nothing is deleted. The device is no
part of the key: a GPU may fill what a small machine trains from. Files are written whole, under a temporary name, and
never change: a kill costs at most what came after the last one, ranks and other runs add theirs; two runs that fill at
once do so twice. Reading them is narvid/data/features.py.
Not here: which flags go together, the towers.

Legend: V videos, K frames of a video, B queries, L words of a query, U distinct sentences, D joint dimension.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from narvid import InputError, files
from narvid.towers import Towers
from narvid.data.features import Features, Store
from narvid.data.datasets import FrameDataset, Split
from narvid.data.loader import make_loader
from narvid.distributed import World, agree
from narvid.evaluation import Encoding
from narvid.data.frames import frame_paths
from narvid.progress import say, tqdm

KINDS = {"frames": "video", "words": "query", "eos": "sentence"}  # what one entry is of
VERSION = 2  # raise it with every change that makes other features of the same frames and texts
SECONDS, BYTES = 60, 2**28  # a file is written when it took so long or holds so much
FRAMES, TEXTS = 256, 256  # through a tower at a time


# ------------------------------------------------------------------------------------------------------------ filling


@torch.no_grad()
def with_features(splits: dict[str, Split], folder: str | Path, towers: Towers, encoding: Encoding,
                  world: World) -> dict[str, Split]:
    """The splits with their features, of which `folder` keeps what `towers` gave; what it lacks is encoded first.

    All ranks call it, each encodes its share. Of queries only those of split "train" are needed. InputError where the
    disk has no room, cannot be written or is not the same for all ranks, and for frames that cannot be read.
    """
    towers.eval()
    made_of = _made_of(towers, encoding, world)
    folder = Path(folder, _digest(json.dumps(made_of)))
    keys = {name: _video_keys(split) for name, split in splits.items()}
    wanted = _wanted(splits, keys)
    stores = {kind: Store(folder, kind) for kind in KINDS}
    missing = {kind: [entry for entry in wanted[kind].items() if entry[0] not in stores[kind].place] for kind in KINDS}
    # Also a barrier: nobody writes before everybody has looked, or the ranks' shares would not be of the same list.
    agree(_prepare(folder, made_of, wanted, missing, encoding) if world.rank == 0 else None, world)
    if any(missing.values()):
        mine = {kind: entries[world.rank::world.size] for kind, entries in missing.items()}
        agree(_fill(folder, mine, towers, encoding, world), world)
        stores = {kind: Store(folder, kind) for kind in KINDS}
        if any(key not in stores[kind].place for kind in KINDS for key in wanted[kind]):
            raise InputError(f"--feature_cache {folder.parent}: holds the features of some processes only; it must be "
                             "one folder that all of them see")
    towers.train()
    return {name: split._replace(features=Features(**stores, videos=keys[name])) for name, split in splits.items()}


def _made_of(towers: Towers, encoding: Encoding, world: World) -> dict:
    """All that decides what the towers make of a frame or a text."""
    weights = hashlib.blake2b(digest_size=16)
    for name, value in towers.state_dict().items():
        if name != "logit_scale":  # it is trained, and no feature depends on it
            weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            weights.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    blank = torch.zeros(1, 3, encoding.picture.size, encoding.picture.size, dtype=torch.uint8, device=world.device)
    with encoding.autocast():
        feature = towers.encode_frames(blank)  # (1, D)
    # No feature depends on the first three; the others joined later and say nothing where they are as OpenAI's.
    of_heads = ("temporal_quick_gelu", "scale_limit", "tokenizer")
    usual = {"custom_text": False, "resize": "shortest", "interpolation": "bicubic", "tokenizer_digest": None}
    config = {name: value for name, value in asdict(towers.config).items()
              if name not in of_heads and (name not in usual or value != usual[name])}
    return {"version": VERSION, "weights": weights.hexdigest(), "clip_config": config,
            "max_words": encoding.max_words, "dim": feature.shape[1], "dtype": str(feature.dtype).split(".")[1]}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _video_keys(split: Split) -> list[str]:
    """V keys: a video's id with the number, size and time of change of every picked jpg."""

    def key(video: int) -> str:
        numbers = split.picks[video]
        states = map(os.stat, frame_paths(split.frames_dir, split.videos[video], numbers))
        files = [f"{number} {state.st_size} {state.st_mtime_ns}" for number, state in zip(numbers, states)]
        return f"{split.videos[video]} {_digest(' '.join(files))}"

    with ThreadPoolExecutor(8) as pool:  # for network file systems, as in datasets.check_frames
        return list(pool.map(key, range(len(split.videos))))


def _wanted(splits: dict[str, Split], keys: dict[str, list[str]]) -> dict[str, dict]:
    """{kind: {key: what to encode}}, in an order that is the same on all ranks."""
    frames = {key: (split, video) for name, split in splits.items() for video, key in enumerate(keys[name])}
    of_videos = [texts for split in splits.values() for texts in split.titles or split.sentences or []]
    queries = splits["train"].queries if "train" in splits else []
    return {"frames": frames, "words": dict(zip(queries, queries)),
            "eos": {text: text for texts in of_videos for text in texts if text is not None}}


def _prepare(folder: Path, made_of: dict, wanted: dict, missing: dict, encoding: Encoding) -> str | None:
    """Say what is to be done, make the folder; what stands against it as a sentence."""
    texts = [text for text, _ in missing["words"]]
    some = texts[::max(1, len(texts) // 500)]
    words = float(encoding.tokenize(some, encoding.max_words)[1].sum()) / len(some) * len(texts) if texts else 0
    rows = sum(len(split.picks[video]) for _, (split, video) in missing["frames"]) + words + len(missing["eos"])
    needed = rows * made_of["dim"] * getattr(torch, made_of["dtype"]).itemsize
    counts = [f"{len(missing[kind])} of {len(wanted[kind])} {plural}"
              for kind, plural in zip(KINDS, ("videos", "queries", "sentences"))]
    say(f"{folder}: {', '.join(counts)} are to be encoded, about {needed / 2**20:,.0f} MiB")
    try:
        files.try_writing(folder, int(needed))
        files.write_json(folder / "made_of.json", made_of)
    except InputError as error:
        return f"--feature_cache {error}"
    return None


def _fill(folder: Path, mine: dict, towers: Towers, encoding: Encoding, world: World) -> str | None:
    """Encode and write this rank's share {kind: [(key, what to encode)]}; what went wrong as a sentence."""
    try:
        for kind, entries in mine.items():
            encoded = (_encode_videos if kind == "frames" else _encode_texts)(kind, entries, towers, encoding, world)
            bar = tqdm(total=len(entries), desc=f"encode {kind}", unit=KINDS[kind], disable=world.rank > 0)
            parts, since = [], time.monotonic()
            for part in encoded:
                parts.append(part)
                bar.update(len(part[0]))
                if time.monotonic() - since > SECONDS or sum(x.nbytes for *_, x in parts) > BYTES:
                    _write(folder, kind, parts)
                    parts, since = [], time.monotonic()
            if parts:
                _write(folder, kind, parts)
            bar.close()
    except InputError as error:
        return str(error)
    return None


Part = tuple[list[str], list[int], Tensor]  # keys, rows of each, features (sum of rows, D)


def _encode_videos(kind: str, entries: list, towers: Towers, encoding: Encoding, world: World) -> Iterator[Part]:
    """Entries (key, (split, video)), several videos at a time, read by the loader's workers."""
    split_of = {id(split): split for _, (split, _) in entries}
    for split in split_of.values():
        some = [(key, video) for key, (other, video) in entries if other is split]
        batches, held = [], FRAMES
        for i, (_, video) in enumerate(some):
            held += len(split.picks[video])
            if held > FRAMES:
                batches.append([])
                held = len(split.picks[video])
            batches[-1].append(i)
        dataset = FrameDataset(split, torch.tensor([video for _, video in some]).numpy(), encoding.picture)
        for items in make_loader(dataset, list, batches, num_workers=encoding.num_workers):
            pixels = torch.cat([x.frames for x in items])  # (N, 3, H, W)
            with encoding.autocast():
                features = [towers.encode_frames(x.to(world.device)).cpu() for x in pixels.split(FRAMES)]
            yield [some[x.item][0] for x in items], [len(x.frames) for x in items], torch.cat(features)


def _encode_texts(kind: str, entries: list, towers: Towers, encoding: Encoding, world: World) -> Iterator[Part]:
    """Entries (text, text), those of like length together: little padding."""
    texts = sorted((text for text, _ in entries), key=len)
    for start in range(0, len(texts), TEXTS):
        some = texts[start:start + TEXTS]
        tokens, mask = encoding.tokenize(some, encoding.max_words)
        with encoding.autocast():
            eos, words = towers.encode_text(tokens.to(world.device), words=kind == "words")
        if kind == "words":
            both = torch.cat([eos[:, None], words], dim=1).cpu()
            yield some, (1 + mask.sum(dim=1)).tolist(), both[F.pad(mask, (1, 0), value=True)]
        else:
            yield some, [1] * len(some), eos.cpu()


def _write(folder: Path, kind: str, parts: list[Part]) -> None:
    """One more file of a kind; InputError where the disk does not take it."""
    keys, rows, features = zip(*parts)
    # One string of keys: a list of them takes torch's reader twenty times as long.
    state = {"keys": json.dumps(sum(keys, [])), "rows": torch.tensor(sum(rows, [])), "features": torch.cat(features)}
    path = folder / f"{kind}-{uuid.uuid4().hex}.pt"
    with files.writing(path, binary=True) as file:
        torch.save(state, file)

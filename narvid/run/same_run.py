"""Whether a run that goes on is the one that was begun: known by content, not by path, name or machine.

A checkpoint holds an `identity`: settings (the flags that change what is computed), data (digests of what training and
evaluation read), start (digests of the files that the first weights came from), machine (said where it differs, not
refused). Not here: the run directory (run_dir.py).

Legend: B queries, V videos, K frames of a video.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from narvid import InputError
from narvid.data.datasets import Split
from narvid.distributed import World
from narvid.files import read_json, read_parts
from narvid.methods import METHODS
from narvid.run.settings import DEFAULT_METHOD, flags_of
from narvid.towers.architectures import CONFIG as OF_OPEN_CLIP
from narvid.towers.architectures import HUB

# Flags that may differ between a run and its continuation: they do not change what is computed.
FREE_TO_CHANGE = ("config", "resume", "output_dir", "num_workers", "cache_frames", "feature_cache", "log_every",
                  "save_every", "save_every_minutes", "tensorboard", "profile", "show_kept",
                  "rank_timeout")
OF_DATA = ("data_dir", "frames", "narrations", "speech", "titles")
OF_START = ("checkpoint", "clip_pretrained", "clip_model", "tokenizer")
GONE = "a file that is gone"


def check_settings(folder: str | Path, before: dict, args: argparse.Namespace) -> None:
    """InputError unless the flags in a run's config.yaml, or in its last.pt, are these.

    A flag that is newer than the run has its default. What a training run reads is left to `check`, by its content.
    """
    if before.get("method", DEFAULT_METHOD) not in [*METHODS]:
        raise InputError(f"--output_dir {folder}: its config.yaml names a method that is not there, "
                         f"{before['method']!r}; choose a new folder")
    skip = FREE_TO_CHANGE + (() if args.eval_only else OF_DATA + OF_START)
    then, now = vars(flags_of(before)), json.loads(json.dumps(vars(args)))
    differ = [name for name in sorted(then.keys() | now.keys())
              if name not in skip and then.get(name) != now.get(name)]
    if differ:
        changes = ", ".join(f"--{name} {then.get(name)} there, {now.get(name, 'no such flag')} here"
                            for name in differ[:4])
        raise InputError(f"--output_dir {folder}: holds another run ({changes}); continue a run with its own flags")


def identity_of(args: argparse.Namespace, splits: dict[str, Split], world: World) -> dict:
    """{"settings", "data", "start", "machine"} of this run, plain values."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE + OF_DATA + OF_START}
    machine = {"processes": world.size, "threads": torch.get_num_threads(), "device": world.device.type,
               "torch": str(torch.__version__)}
    data = {f"{name}'s {what}": digest for name, split in splits.items() for what, digest in _digests(split).items()}
    start = {f"--{name}": _content(name, getattr(args, name)) for name in OF_START
             if name != "tokenizer"} if world.rank == 0 else {}  # the towers' config knows that one by its content
    return {"settings": json.loads(json.dumps(settings)), "data": data, "start": start, "machine": machine}


def _digests(split: Split) -> dict[str, str]:
    """What is read of a split -> its number and digest."""
    pairs = [(split.videos[v], query) for v, query in zip(split.video_of_query.tolist(), split.queries)]
    read = {"queries": pairs, "videos": split.videos, "frame numbers": split.picks, "sentences": split.sentences,
            "titles": split.titles}
    digests = {what: f"{len(items)} ({_digest([json.dumps(items).encode()])})"
               for what, items in read.items() if items is not None}
    return digests | {"pictures": split.pictures}


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _content(flag: str, name: str | None) -> str | None:
    """What weights or a model config are known by: a file's digest, or the name under which open_clip has them."""
    if name is None:
        return None
    if Path(name, OF_OPEN_CLIP).is_file():  # a folder as the hub has them: how pictures are made, and the weights
        weights = sorted(path for kind in ("safetensors", "bin") for path in Path(name).glob(f"*.{kind}"))
        config = json.dumps(read_json(Path(name, OF_OPEN_CLIP)), sort_keys=True).encode()
        return _digest([config, *(part for path in weights for part in read_parts(path))])
    if Path(name).is_dir():  # a run's, or an exported model
        name = next((str(path) for path in (Path(name, "best.pt"), Path(name, "model.safetensors")) if path.is_file()),
                    name)
    if not Path(name).is_file():  # open_clip's names have no dot and, but for the hub's, no slash
        gone = flag == "checkpoint" or Path(name).suffix or "/" in name and not name.startswith(HUB)
        return GONE if gone else name
    if name.endswith(".json"):
        return _digest([json.dumps(read_json(name), sort_keys=True).encode()])
    return _digest(read_parts(name))


def check(folder: Path, state: dict, identity: dict, args: argparse.Namespace) -> list[str]:
    """InputError that names what differs, unless the run of this last.pt is this one -> what should be said of it.

    identity: of now; what it started from is taken over from `state` where the files are gone.
    """
    before = state.get("identity")
    if before is None:
        check_settings(folder, {**state["args"], "select_on": args.select_on}, args)
        return ["last.pt is of a version that did not note the run's data; only its settings were compared"]
    if not isinstance(before, dict) or not all(isinstance(before.get(part), dict) for part in identity):
        raise InputError(f"{folder}: its last.pt is damaged, what it says of its run is not whole; begin again in a "
                         "new --output_dir")
    check_settings(folder, before["settings"], args)
    gone = [name for name, value in identity["start"].items() if value == GONE]
    identity["start"] |= {name: before["start"].get(name) for name in gone}
    # Versions before knew a folder by its path, and so a tokenizer.
    identity["start"] |= {f"--{name}": getattr(args, name) for name in OF_START
                          if getattr(args, name) and before["start"].get(f"--{name}") == getattr(args, name)}
    start = {name: value for name, value in before["start"].items() if name in identity["start"]}
    then, now = before["data"] | start, identity["data"] | identity["start"]
    differ = [name for name in then | now if then.get(name) != now.get(name)]
    if differ:
        changes = ", ".join(f"{name} {then.get(name)} there, {now.get(name)} here" for name in differ[:4])
        raise InputError(f"--output_dir {folder}: its run read something else ({changes}); continue it with what it "
                         "began with, or choose a new folder")
    then, now = before["machine"], identity["machine"]
    changes = ", ".join(f"{name} {then.get(name)} before, {now[name]} now"
                        for name in now if then.get(name) != now[name])
    said = [f"{', '.join(gone)}: no longer there, and not needed: last.pt has the weights"] if gone else []
    return said + ([f"goes on with {changes}: the last digits may differ from those of an unbroken run"]
                   if changes else [])

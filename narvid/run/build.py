"""From settings to what a run works with: the model, the splits, and how evaluation encodes.

Not here: flags (settings.py), training (main_task_retrieval.py).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from narvid import InputError, distributed, towers
from narvid.data.datasets import Split, check_frames, load_split
from narvid.data.frames import load_frame_index
from narvid.data.narrations import load_narrations
from narvid.data.titles import load_titles, with_titles
from narvid.evaluation import Encoding
from narvid.methods import METHODS
from narvid.run import optim
from narvid.run.exported import load_model
from narvid.run.settings import DEFAULT_METHOD, autocast, is_ours


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """The method with the weights that the flags name: a checkpoint of ours, a released one, CLIP's, or random ones.

    `model.progress` says of which epoch and step a checkpoint of ours is, {} for other weights.
    InputError in one sentence for what cannot be built or loaded.
    """
    try:
        stored = load_model(args.checkpoint) if args.checkpoint else {}
        clip = _build_towers(args, stored)
        _check_sizes(args, clip.config)
        model = METHODS[args.method].from_flags(clip, args)
        if is_ours(stored):
            towers.load_weights(model, stored["model"], source=args.checkpoint)
        elif stored and not hasattr(model, "load_release"):
            raise InputError(f"{args.checkpoint}: no checkpoint of a run here, and {args.method} has no released form; "
                             "name a run's best.pt")
        elif stored:
            model.load_release({k.removeprefix("module."): v for k, v in stored.items()}, args.checkpoint)
        elif clip.config.embed_dim != clip.positional_embedding.shape[1]:
            print("the text tower is not as wide as the joint dimension: what the method starts from its blocks starts "
                  "from random weights", file=sys.stderr)
    except ValueError as error:
        raise InputError(str(error)) from error
    model.progress = {key: stored[key] for key in ("epoch", "step") if is_ours(stored) and key in stored}
    if args.recipe == "reported":
        optim.to_half(clip)
    if args.freeze_towers:
        clip.requires_grad_(False)
        clip.logit_scale.requires_grad_(True)
    else:
        optim.freeze(clip, args.freeze_layers)
    clip.set_grad_checkpointing(args.grad_checkpointing)
    if args.compile:
        towers.compile_blocks(clip, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def _build_towers(args: argparse.Namespace, stored: dict) -> torch.nn.Module:
    """CLIP's towers, of the size that the checkpoint or --clip_model says, with CLIP's weights where they count."""
    half = args.recipe == "reported"
    if is_ours(stored):
        for flag, value in (("method", stored["args"].get("method", DEFAULT_METHOD)),
                            ("clip_model", stored["args"]["clip_model"])):
            if getattr(args, flag) != value:
                raise InputError(f"{args.checkpoint}: a checkpoint of another model, --{flag} {value}, not "
                                 f"{getattr(args, flag)}")
        try:
            return towers.build_towers(towers.ClipConfig(**stored["clip_config"]), half=half)
        except Exception as error:  # whatever open_clip raises for sizes that make no sense
            raise InputError(f"{args.checkpoint}: holds no sizes of towers that can be built "
                             f"({type(error).__name__}: {str(error)[:200]}); name another checkpoint") from error
    averaged = METHODS[args.method].averages_clip(args)
    if averaged and not (stored and args.clip_pretrained):
        raise InputError(f"--method {args.method} is told to average a released --checkpoint with CLIP's weights: give "
                         "both --checkpoint and --clip_pretrained")
    quick_gelu = True if stored else args.quick_gelu  # released checkpoints descend from OpenAI's weights
    pretrained = None if stored and not averaged else args.clip_pretrained
    return towers.load_clip(args.clip_model, pretrained, quick_gelu, half=half)


def _check_sizes(args: argparse.Namespace, config: towers.ClipConfig) -> None:
    if args.max_words > config.context_length:
        raise InputError(f"--max_words {args.max_words}: the text tower has {config.context_length} positions")
    most = METHODS[args.method].max_frames
    if most and args.max_frames > most:
        raise InputError(f"--max_frames {args.max_frames}: there are {most} temporal positions")


def load_data(args: argparse.Namespace, world: distributed.World) -> dict[str, Split]:
    """{"train", "val", "test"}: the splits that this run needs, every picked frame looked at."""
    reads = METHODS[args.method].reads(args)
    frame_times = load_frame_index(args.frames)
    narrations = load_narrations(args.narrations, frame_times) if "narration" in reads else None
    wanted = ["test"] if args.eval_only else ["train", "test"]
    wanted += ["val"] if args.select_on == "val" and not args.eval_only else []
    load = partial(load_split, frames_dir=args.frames, frame_times=frame_times, narrations=narrations,
                   narrations_path=args.narrations, missing_narration=args.missing_narration)
    longest = {"train": None} if args.frame_sampling == "segments" else {}  # its items may draw any frame
    splits = {name: load(Path(args.data_dir, f"{name}.jsonl"), max_frames=longest.get(name, args.max_frames))
              for name in wanted}
    if "titles" in reads:
        titles = load_titles(args.titles, frame_times, args.max_titles)
        splits = {name: with_titles(split, titles, paths=args.titles, missing=args.missing_narration)
                  for name, split in splits.items()}
    for name, split in splits.items():
        if len(split.videos) < world.size:
            raise InputError(f"{Path(args.data_dir, name)}.jsonl: its {len(split.videos)} videos cannot be shared "
                             f"among {world.size} processes; start fewer")
    error = None
    try:
        for split in splits.values():
            check_frames(split, distributed.share(len(split.videos), world))
    except InputError as e:
        error = str(e)
    if error := distributed.agree(error, world):
        raise InputError(error)
    return splits


def encoding_of(model: torch.nn.Module, args: argparse.Namespace, world: distributed.World) -> Encoding:
    """What the flags say about turning a split into features and scores."""
    return Encoding(model.clip.config.image_size, args.max_words, args.max_frames, args.eval_batch_size,
                    args.num_workers, partial(autocast, args, world.device), model.score,
                    METHODS[args.method].views(args))

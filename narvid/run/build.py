"""From settings to what a run works with: the model, the splits, and how evaluation encodes.

Not here: flags (settings.py), training (main_task_retrieval.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from narvid import InputError, distributed, towers
from narvid.data.datasets import Speech, Split, check_frames, load_split
from narvid.data.frames import load_frame_index
from narvid.data.narrations import load_narrations
from narvid.data.titles import load_titles, with_titles
from narvid.evaluation import Encoding
from narvid.methods import METHODS
from narvid.progress import remark
from narvid.run import optim
from narvid.run.exported import load_model
from narvid.run.feature_cache import with_features
from narvid.run.settings import DEFAULT_METHOD, ON_VAL, autocast, eval_autocast, is_ours


def build_model(args: argparse.Namespace, last: dict | None = None) -> torch.nn.Module:
    """The method with the weights that the flags name: a checkpoint of ours, a released one, CLIP's, or random ones.

    last: the last.pt of a run that goes on; then with its weights, and what the flags name need not be there any more.
    `model.progress` says of which epoch and step a checkpoint of ours is, {} for other weights.
    InputError in one sentence for what cannot be built or loaded.
    """
    try:
        stored = last or (load_model(args.checkpoint) if args.checkpoint else {})
        source = "last.pt" if last else args.checkpoint
        clip = _build_towers(args, stored, source, resumed=last is not None)
        _check(args, clip)
        model = METHODS[args.method].from_flags(clip, args)
        if is_ours(stored):
            towers.load_weights(model, stored["model"], source=source)
        elif stored and not hasattr(model, "load_release"):
            raise InputError(f"{args.checkpoint}: no checkpoint of a run here, and {args.method} has no released form; "
                             "name a run's best.pt")
        elif stored:
            model.load_release({k.removeprefix("module."): v for k, v in stored.items()}, source)
        elif not clip.text_blocks():
            remark("the text tower has no blocks as wide as the joint dimension, or others than CLIP's: what the "
                   "method starts from its blocks starts from random weights")
    except ValueError as error:
        raise InputError(str(error)) from error
    if broken := [name for name, x in model.state_dict().items() if not x.isfinite().all()]:
        raise InputError(f"{source or args.clip_pretrained}: {len(broken)} of its weights are not finite "
                         f"({broken[0]}); its training has diverged, name an earlier checkpoint")
    model.progress = {key: stored[key] for key in ("epoch", "step") if is_ours(stored) and key in stored}
    if _is_half(args):
        optim.to_half(clip)
    if args.freeze_towers:
        clip.requires_grad_(False)
        clip.logit_scale.requires_grad_(True)
    elif args.train_towers and args.train_towers[0] == "last":
        optim.freeze_but_last(clip, int(args.train_towers[1]))
    else:
        optim.freeze(clip, args.freeze_layers)
    try:
        clip.set_grad_checkpointing(args.grad_checkpointing)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.compile:
        towers.compile_blocks(clip, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def _is_half(args: argparse.Namespace) -> bool:
    """Recipe `reported` trains fp16 towers; where nothing is trained, evaluation's format counts alone."""
    return args.recipe == "reported" and not (args.eval_only and args.eval_precision != "train")


def _build_towers(args: argparse.Namespace, stored: dict, source: str | None, *, resumed: bool) -> torch.nn.Module:
    """CLIP's towers, of the size that the checkpoint or --clip_model says, with CLIP's weights where they count."""
    half = _is_half(args)
    if is_ours(stored):
        for flag, default in (("method", DEFAULT_METHOD), ("clip_model", None)):
            value = stored["args"].get(flag, default)
            if getattr(args, flag) != value and not resumed:
                raise InputError(f"{source}: a checkpoint of another model, --{flag} {value}, not "
                                 f"{getattr(args, flag)}")
        try:
            config = towers.ClipConfig(**stored["clip_config"])
            return towers.build_towers(replace(config, tokenizer=args.tokenizer or config.tokenizer), half=half)
        except Exception as error:  # whatever open_clip raises for sizes that make no sense
            raise InputError(f"{source}: holds no sizes of towers that can be built "
                             f"({type(error).__name__}: {str(error)[:200]}); name another checkpoint") from error
    averaged = METHODS[args.method].averages_clip(args)
    if averaged and not (stored and args.clip_pretrained):
        raise InputError(f"--method {args.method} averages a released --checkpoint with CLIP's weights: give "
                         "both --checkpoint and --clip_pretrained")
    quick_gelu = True if stored else args.quick_gelu  # released checkpoints descend from OpenAI's weights
    pretrained = None if stored and not averaged else args.clip_pretrained
    return towers.load_towers(args.clip_model, pretrained, quick_gelu=quick_gelu, tokenizer=args.tokenizer, half=half)


def _check(args: argparse.Namespace, clip: towers.Towers) -> None:
    """ValueError, or InputError, for flags that do not go with these towers."""
    clip.tokenizer.load()
    clip.config = replace(clip.config, tokenizer_digest=clip.tokenizer.digest)
    if args.recipe == "reported":
        clip.require_openai("--recipe reported")
    if args.max_words > clip.context_length:
        raise InputError(f"--max_words {args.max_words}: the text tower of --clip_model {args.clip_model} reads "
                         f"{clip.context_length} tokens; say --max_words {clip.context_length} or less")
    most = METHODS[args.method].max_frames
    if most and args.max_frames > most:
        raise InputError(f"--max_frames {args.max_frames}: there are {most} temporal positions")


def load_data(args: argparse.Namespace, world: distributed.World,
              lengths: Callable | None = None) -> dict[str, Split]:
    """{"train", "val", "test"}: the splits that this run needs, every picked frame looked at.

    lengths: of the towers' tokenizer, which --sentence both needs. All ranks call it, and all raise what one of them
    finds amiss.
    """
    with distributed.together(world):
        return _load_data(args, world, lengths)


def _load_data(args: argparse.Namespace, world: distributed.World, lengths: Callable | None) -> dict[str, Split]:
    reads = METHODS[args.method].reads(args)
    frame_times = load_frame_index(args.frames)
    path = args.speech if args.sentence == "speech" else args.narrations
    narrations = load_narrations(path, frame_times) if "narration" in reads else None
    speech = None
    if narrations is not None and args.sentence == "both":
        speech = Speech(load_narrations(args.speech), args.speech, lengths, args.max_words)
    wanted = ["test"] if args.eval_only else ["train", "test"]
    wanted += ["val"] if args.select_on == "val" and not args.eval_only or args.fusion_weight == ON_VAL else []
    load = partial(load_split, frames_dir=args.frames, frame_times=frame_times, narrations=narrations,
                   narrations_path=path, speech=speech, missing_narration=args.missing_narration)
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
    _refuse_leaks(splits, args)
    return {name: split._replace(pictures=_digest_of_pictures(split, world)) for name, split in splits.items()}


def _refuse_leaks(splits: dict[str, Split], args: argparse.Namespace) -> None:
    """A video that is trained on is no test of anything."""
    trained = set(splits["train"].videos) if "train" in splits else set()
    for name in splits.keys() - {"train"}:
        both = [video for video in splits[name].videos if video in trained]
        if both and not args.allow_leak:
            raise InputError(f"{Path(args.data_dir, name)}.jsonl: {len(both)} of its {len(splits[name].videos)} videos "
                             f"stand in train.jsonl too ({', '.join(both[:3])}); leave them out of one, or say "
                             "--allow_leak")


def _digest_of_pictures(split: Split, world: distributed.World) -> str:
    """Each rank looks at its share; of a few videos all do, so that one with other frames is found."""
    with distributed.together(world):
        few = check_frames(split, range(0, len(split.videos), -(-len(split.videos) // 64)))
        mine = check_frames(split, distributed.share(len(split.videos), world))
    every = distributed.everybody((sum(few), sum(mine)), world)
    for rank, (of_few, _) in enumerate(every):
        if of_few != every[0][0]:
            raise distributed.SaidByAll(f"{split.frames_dir}: process {rank} finds other frames there than process 0; "
                                        "all processes must see the same data")
    return f"{sum(map(len, split.picks))} ({sum(of_share for _, of_share in every) % 2**48:012x})"


def encoding_of(model: torch.nn.Module, args: argparse.Namespace, world: distributed.World) -> Encoding:
    """What the flags say about turning a split into features and scores."""
    return Encoding(model.clip.picture, model.clip.tokenizer, args.max_words, args.max_frames, args.eval_batch_size,
                    args.num_workers, partial(eval_autocast, args, world.device), model.score,
                    METHODS[args.method].views(args))


def with_cached_features(splits: dict[str, Split], model: torch.nn.Module, args: argparse.Namespace,
                         world: distributed.World) -> dict[str, Split]:
    """The splits with the features of --feature_cache: "train" in training's number format, others in evaluation's."""
    of_evaluation = encoding_of(model, args, world)
    of_training = of_evaluation._replace(autocast=partial(autocast, args, world.device))
    if args.eval_precision in ("train", args.precision if args.recipe == "modern" else "train"):
        return with_features(splits, args.feature_cache, model.clip, of_training, world)
    trained = {name: split for name, split in splits.items() if name == "train"}
    others = {name: split for name, split in splits.items() if name != "train"}
    return {**(trained and with_features(trained, args.feature_cache, model.clip, of_training, world)),
            **with_features(others, args.feature_cache, optim.in_fp32(model.clip), of_evaluation, world)}

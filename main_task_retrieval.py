"""Train and evaluate NarVid: python main_task_retrieval.py --config configs/msrvtt_vitb16.yaml --output_dir runs/msrvtt

Works alike under plain python (CPU or one GPU) and torchrun (gloo or nccl). The only file that reads flags.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from narvid import InputError, distributed, losses
from narvid import towers as towers_module
from narvid.towers import ClipConfig, load_clip, load_weights
from narvid.run import optim
from narvid.methods.cap4video import Cap4Video
from narvid.methods.clip2video import CLIP2Video
from narvid.methods.clip4clip import CLIP4Clip
from narvid.methods.internvideo import InternVideo
from narvid.methods.zeroshot import ZeroShot
from narvid.data.datasets import FrameDataset, PairSampler, check_frames, collate, load_split, make_loader, read_queries
from narvid.evaluation import (Encoding, combine, encode_videos, frames_kept, score_queries, selection_score, show,
                               table_of_matrices, with_dsl, with_qb_norm)
from narvid.run.feature_cache import with_features
from narvid.flags import Parser, as_argv, count, number, positive, positive_float, preset_argv, read_preset, share
from narvid.data.frames import load_frame_index
from narvid.run.gradient_cache import backward_in_parts
from narvid.metrics import text_to_video_ranks
from narvid.model import MODULES, NarVid, NarVidConfig
from narvid.data.narrations import load_narrations
from narvid.profiling import Profile, all_reduce, stage
from narvid.run.run_dir import RunDir, load_checkpoint
from narvid.similarity import match
from narvid.data.titles import load_titles, with_titles

METHODS = {"narvid": NarVid, "clip4clip": CLIP4Clip, "clip2video": CLIP2Video, "cap4video": Cap4Video,
           "zeroshot": ZeroShot, "internvideo": InternVideo}

# ------------------------------------------------------------------------------------------------------------ flags


def build_parser(method: str = "narvid") -> Parser:
    """The flags of every method, and those of this one; another method's are refused, not ignored."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--method", choices=METHODS, default=method,
                        help="what is trained; `--method NAME --help` lists its own flags")

    g = parser.add_argument_group("data")
    g.add_argument("--data_dir", default="data/msrvtt", help="folder with {train,val,test}.jsonl")
    g.add_argument("--frames", help="folder of extracted frames [data_dir/frames]")
    g.add_argument("--narrations", help="narration file, ours or a published one [data_dir/narrations.jsonl]")
    g.add_argument("--missing_narration", choices=["error", "skip-video"], default="error",
                   help="what to do with a video that has no sentence at all")
    g.add_argument("--max_words", type=positive, default=64, help="tokens of a query or sentence, with start and end")
    g.add_argument("--max_frames", type=positive, default=12, help="K: frames of a video")
    g.add_argument("--frame_sampling", choices=["uniform", "segments"], default="uniform",
                   help="in training; segments: one frame at random from each K-th part of a video, with its sentence")
    g.add_argument("--num_workers", type=count, default=4, help="loader processes a rank")
    g.add_argument("--cache_frames", action=switch, default=False,
                   help="decode once: V * K * 3 * side^2 bytes of shared memory a process")

    g = parser.add_argument_group("model")
    g.add_argument("--clip_model", default="ViT-B-32", help="open_clip model name, or a model config in .json")
    g.add_argument("--clip_pretrained", help="open_clip tag (openai), or a weights file; none: random weights")
    g.add_argument("--quick_gelu", action=switch, default=None, help="activation, where nothing else tells")
    g.add_argument("--checkpoint", help="start from these weights: a run's best.pt, or the method's released file")

    if method == "narvid":
        add_narvid_flags(parser.add_argument_group(method))
    else:
        METHODS[method].add_flags(parser.add_argument_group(method))

    g = parser.add_argument_group("optimisation")
    g.add_argument("--exclude_same_video", action=switch, default=False,
                   help="another caption of the same video in the batch is no negative")
    g.add_argument("--recipe", choices=["reported", "modern"], default="modern",
                   help="reported: fp16 towers and BertAdam, as behind the published tables; modern: AdamW over fp32")
    g.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="autocast of recipe modern")
    g.add_argument("--epochs", type=positive, default=5)
    g.add_argument("--batch_size", type=positive, default=64, help="pairs of one optimiser step, over all processes")
    g.add_argument("--micro_batch", type=count, default=0,
                   help="pairs a process encodes at a time, each twice; the loss is that of the whole batch; 0: all")
    g.add_argument("--gradient_accumulation_steps", type=positive, default=1,
                   help="parts of a step with a loss each; negatives come from the part alone (see --micro_batch)")
    g.add_argument("--lr", type=number, default=1e-4, help="peak rate of everything but CLIP")
    g.add_argument("--clip_lr", type=number, help="peak rate of CLIP [reported 1e-7; modern 1e-6, cited and not tuned]")
    g.add_argument("--weight_decay", type=number, default=0.2, help="the family's 0.2")
    g.add_argument("--warmup", type=share, default=0.1, help="share of all steps")
    g.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="global clip")
    g.add_argument("--freeze_layers", type=int, default=0,
                   help="blocks of both towers frozen from below, with the embeddings; -1: everything is trained")
    g.add_argument("--freeze_towers", action=switch, default=False, help="instead: train heads and logit scale alone")
    g.add_argument("--feature_cache", metavar="DIR",
                   help="with --freeze_towers: folder that keeps the towers' features, encoded once for all runs")
    g.add_argument("--grad_checkpointing", action=switch, default=False, help="recompute tower blocks in backward")
    g.add_argument("--compile", action=switch, default=False,
                   help="torch.compile for the blocks of both towers; the first steps take minutes")

    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval_only", action=switch, default=False, help="evaluate --checkpoint on test and leave")
    g.add_argument("--select_on", choices=["val", "last", "test"],
                   help="what chooses the epoch [val where val.jsonl exists, else last]")
    g.add_argument("--eval_every", type=count, default=0, help="evaluate --select_on's split every n steps too")
    g.add_argument("--eval_batch_size", type=positive, default=64,
                   help="videos or queries encoded at a time; scored in squares of twice as many, on a GPU four times")
    g.add_argument("--fusion_weight", type=share, default=0.5, help="of S_qv in S_fusion; 0.5 is Eq. 11")
    g.add_argument("--dsl_scale", type=number, default=0.0, help="also report DSL with this scale; 0: no")
    g.add_argument("--qb_norm_queries", type=count, default=0, help="also QB-Norm with n training queries, beta 20")
    g.add_argument("--save_similarity", action=switch, default=False, help="write both test matrices to similarity.npz")

    g = parser.add_argument_group("run")
    g.add_argument("--config", help="preset: a YAML file of these flags; the command line wins")
    g.add_argument("--output_dir", required=True, help="run directory")
    g.add_argument("--resume", choices=["auto", "never"], default="never", help="auto: from last.pt if it is there")
    g.add_argument("--seed", type=count, default=42)
    g.add_argument("--deterministic", action=switch, default=False, help="only deterministic kernels")
    g.add_argument("--save_every", type=count, default=0, help="save every n steps too; 0: at an epoch's end")
    g.add_argument("--log_every", type=positive, default=50, help="steps")
    g.add_argument("--profile", type=count, default=0, help="log where the time of n early steps goes; 0: no")
    g.add_argument("--tensorboard", action=switch, default=False, help="write curves (pip install tensorboard)")
    return parser


def add_narvid_flags(g) -> None:
    """The paper's own flags: modules, matching, loss."""
    g.add_argument("--modules", nargs="*", choices=MODULES, default=list(MODULES), help="Table 3: modules switched on")
    g.add_argument("--temporal_layers", type=positive, default=4, help="blocks of a temporal encoder (the family's 4)")
    g.add_argument("--dropout", type=share, default=0.1, help="in co-attention")
    g.add_argument("--fidelity", choices=["reported", "paper"], default="reported",
                   help="behaviour that made the published tables, or the text of the paper (README)")
    g.add_argument("--filter", choices=["nucleus", "topk", "none"], default="nucleus", help="Sec. 3.4, of module QAF")
    g.add_argument("--filter_p", type=share, default=0.4, help="p: cumulative weight of the nucleus")
    g.add_argument("--filter_k", type=positive, default=3, help="k of --filter topk")
    g.add_argument("--temperature", type=positive_float, default=0.1, help="of the filter's and the word weights'")
    g.add_argument("--hard_loss", choices=["hinge", "nce"], default="hinge", help="of module CVH: Eqs. 8-9, or Eq. 12")
    g.add_argument("--lam", type=number, default=0.7, help="lambda: a negative is hard within lambda sigma (Eq. 6)")
    g.add_argument("--eta", type=number, default=1.8, help="eta: the hinge's margin is eta lambda sigma (Eq. 8)")
    g.add_argument("--alpha", type=number, default=1.0, help="alpha: weight of the hard-negative loss (Eq. 10)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with presets and checkpoints as argv that stands before the user's own, so that argparse checks all."""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--checkpoint", "--method"):
        first.add_argument(flag)
    first.add_argument("--eval_only", action=argparse.BooleanOptionalAction)
    given, _ = first.parse_known_args(argv)
    preset = read_preset(given.config, first) if given.config else {}
    checkpoint = given.checkpoint or preset.get("checkpoint")
    stored = args_of_checkpoint(checkpoint, first) if checkpoint else {}
    method = given.method or preset.get("method") or stored.get("method", "narvid")
    if method not in [*METHODS]:
        first.error(f"--method {method}: choose from {', '.join(METHODS)}")
    parser = build_parser(method)
    eval_only = preset.get("eval_only", False) if given.eval_only is None else given.eval_only
    preset = preset_argv(preset, given.config, parser) if preset else []
    stored = checkpoint_argv(stored, checkpoint, parser, eval_only=eval_only) if stored else []
    # A checkpoint is evaluated as it was trained, whatever a preset says; training may go on with other values.
    args = parser.parse_args([*preset, *stored, *argv] if eval_only else [*stored, *preset, *argv])

    args.eval_only |= method == "zeroshot"
    args.frames = args.frames or str(Path(args.data_dir, "frames"))
    args.narrations = args.narrations or str(Path(args.data_dir, "narrations.jsonl"))
    if "titles" in args:
        args.titles = args.titles or [str(Path(args.data_dir, "titles.json"))]
    if args.clip_lr is None:
        args.clip_lr = 1e-7 if args.recipe == "reported" else 1e-6
    has_val = Path(args.data_dir, "val.jsonl").exists()
    untold = "none, nothing is trained" if method == "zeroshot" else "unknown"
    args.select_on = args.select_on or (untold if args.eval_only else "val" if has_val else "last")
    if args.select_on == "val" and not has_val and not args.eval_only:
        parser.error(f"--select_on val: there is no {Path(args.data_dir, 'val.jsonl')}; say last (or test: it peeks)")
    if args.micro_batch and getattr(args, "head", None) == "tightTransf":
        parser.error("--micro_batch needs a score without parameters, which tightTransf has not")
    if args.feature_cache:
        refuse_feature_cache(args, parser)
    if args.eval_every and args.select_on == "last" and not args.eval_only:
        parser.error("--eval_every evaluates the split that chooses the epoch: add --select_on val or test")
    if args.eval_only and not args.checkpoint and method != "zeroshot":
        parser.error("--eval_only evaluates a --checkpoint: give one")
    if args.eval_only and any(word.split("=")[0] == "--select_on" for word in argv):
        parser.error("--select_on is of training; with --eval_only the checkpoint says what chose its epoch")
    return args


def refuse_feature_cache(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Stop where features of the towers cannot stand in for them."""
    if not args.freeze_towers:
        parser.error("--feature_cache keeps what frozen towers give: add --freeze_towers")
    if args.cache_frames:
        parser.error("--cache_frames keeps pixels, --feature_cache reads none: leave it out (--no-cache_frames)")
    inside = {"method": "internvideo", "linear_patch": "3d", "stage": "titles"}  # they reach into the towers
    for flag, value in inside.items():
        if getattr(args, flag, None) == value:
            parser.error(f"--feature_cache: --{flag} {value} needs more of the towers than their features")


def args_of_checkpoint(path: str, parser: argparse.ArgumentParser) -> dict:
    """The flags that a checkpoint of ours was trained with; {} for a released one."""
    try:
        stored = load_checkpoint(path)
        return stored["args"] if is_ours(stored) else {}
    except InputError as error:
        parser.error(str(error))


def checkpoint_argv(stored: dict, path: str, parser: argparse.ArgumentParser, *, eval_only: bool) -> list[str]:
    """What a checkpoint of ours says about its model, so that it needs no flag again."""
    groups = {g.title: g for g in parser._action_groups}
    method = parser.get_default("method")
    own = [a.dest for title in ("model", method) for a in groups[title]._group_actions if a.dest != "checkpoint"]
    own = [dest for dest in own if dest not in ("hard_loss", "lam", "eta", "alpha", "titles")]  # of loss and data
    own += ["max_words", "max_frames", "fusion_weight", "recipe", "precision"]
    own += ["select_on"] if eval_only else []  # its epoch was chosen when it was trained, and the result says on what
    return as_argv({k: v for k, v in stored.items() if k in own and v is not None}, path, parser)


# ------------------------------------------------------------------------------------------------------------ model


def build_model(args: argparse.Namespace) -> tuple[torch.nn.Module, ClipConfig]:
    """The method with the weights that the flags name: a checkpoint of ours, a released one, CLIP's, or random ones."""
    try:
        stored = load_checkpoint(args.checkpoint) if args.checkpoint else {}
        towers, clip_config = build_towers(args, stored)
        if args.max_words > clip_config.context_length:
            raise InputError(f"--max_words {args.max_words}: the text tower has {clip_config.context_length} positions")
        if args.max_frames > NarVidConfig.positions:
            raise InputError(f"--max_frames {args.max_frames}: there are {NarVidConfig.positions} temporal positions")
        if args.method == "narvid":
            model = NarVid(towers, NarVidConfig(clip_config.embed_dim, tuple(args.modules), args.temporal_layers,
                                                dropout=args.dropout, temperature=args.temperature))
            model.heads.start_from_text_tower(towers)
        else:
            model = METHODS[args.method](towers, clip_config, **flags_of_method(args))
        if is_ours(stored):
            load_weights(model, stored["model"], source=args.checkpoint)
        elif stored and not hasattr(model, "load_release"):
            raise InputError(f"{args.checkpoint}: no checkpoint of a run here, and {args.method} has no released form; "
                             "name a run's best.pt")
        elif stored:
            model.load_release({k.removeprefix("module."): v for k, v in stored.items()}, args.checkpoint)
        elif clip_config.embed_dim != towers.positional_embedding.shape[1]:
            print("the text tower is not as wide as the joint dimension: what the method starts from its blocks starts "
                  "from random weights", file=sys.stderr)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.recipe == "reported":
        optim.to_half(towers)
    if args.freeze_towers:
        towers.requires_grad_(False)
        towers.logit_scale.requires_grad_(True)
    else:
        optim.freeze(towers, args.freeze_layers)
    towers.set_grad_checkpointing(args.grad_checkpointing)
    if args.compile:
        towers_module.compile_blocks(towers, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model, clip_config


def build_towers(args: argparse.Namespace, stored: dict) -> tuple[torch.nn.Module, ClipConfig]:
    """CLIP's towers, of the size that the checkpoint or --clip_model says, with CLIP's weights where they count."""
    half = args.recipe == "reported"
    if is_ours(stored):
        for flag, value in (("method", stored["args"].get("method", "narvid")),
                            ("clip_model", stored["args"]["clip_model"])):
            if getattr(args, flag) != value:
                raise InputError(f"{args.checkpoint}: a checkpoint of another model, --{flag} {value}, not "
                                 f"{getattr(args, flag)}")
        clip_config = ClipConfig(**stored["clip_config"])
        return towers_module.build_towers(clip_config, half=half), clip_config
    merged = getattr(args, "merge_clip", 0)  # InternVideo averages its release with CLIP's weights
    if merged and not (stored and args.clip_pretrained):
        raise InputError("--merge_clip averages a released --checkpoint with CLIP's weights: give both --checkpoint "
                         "and --clip_pretrained")
    quick_gelu = True if stored else args.quick_gelu  # released checkpoints descend from OpenAI's weights
    pretrained = None if stored and not merged else args.clip_pretrained
    return load_clip(args.clip_model, pretrained, quick_gelu, half=half)


def is_ours(stored: dict) -> bool:
    """Whether a checkpoint was written by this trainer; a released one is a state dict."""
    return "clip_config" in stored


def flags_of_method(args: argparse.Namespace) -> dict:
    """A baseline's own flags, which are its constructor's arguments."""
    group = Parser().add_argument_group()
    METHODS[args.method].add_flags(group)
    return {action.dest: getattr(args, action.dest) for action in group._group_actions}


def autocast(args: argparse.Namespace, device: torch.device):
    """The number format of towers and heads; matching and losses are always computed outside, in fp32."""
    if args.recipe == "reported" or args.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if args.precision == "bf16" else torch.float16)


def matching(args: argparse.Namespace) -> dict:
    """Arguments of similarity.match: without QAF every real frame counts alike, without NM only the coarse cosine."""
    method = args.filter if "QAF" in args.modules else "uniform"
    return dict(method=method, p=args.filter_p, k=args.filter_k, temperature=args.temperature, fidelity=args.fidelity,
                fine="NM" in args.modules)


# ------------------------------------------------------------------------------------------------------------- data


def uses_narration(args: argparse.Namespace) -> bool:
    """Whether the method reads the sentences of the picked frames."""
    if args.method == "narvid":
        return "NM" in args.modules
    return METHODS[args.method].uses == "narration" and getattr(args, "use_narration", True)


def load_data(args: argparse.Namespace, world: distributed.World) -> dict[str, object]:
    """{"train", "val", "test"}: the splits that this run needs, every picked frame looked at."""
    frame_times = load_frame_index(args.frames)
    narrations = load_narrations(args.narrations, frame_times) if uses_narration(args) else None
    wanted = ["test"] if args.eval_only else ["train", "test"]
    wanted += ["val"] if args.select_on == "val" and not args.eval_only else []
    load = partial(load_split, frames_dir=args.frames, frame_times=frame_times, narrations=narrations,
                   narrations_path=args.narrations, missing_narration=args.missing_narration)
    longest = {"train": None} if args.frame_sampling == "segments" else {}  # its items may draw any frame
    splits = {name: load(Path(args.data_dir, f"{name}.jsonl"), max_frames=longest.get(name, args.max_frames))
              for name in wanted}
    if "titles" in args:
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
    error = distributed.agree(error, world)
    if error:
        raise InputError(error)
    return splits


# --------------------------------------------------------------------------------------------------------- training


def loss_parts(model, similarity, scale, video_index, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Eq. 10 as named parts to be summed: NCE of each view and, with CVH, alpha times the hard-negative loss.

    similarity {view: (B, B)} of the global batch, whose pair i is of video video_index[i].
    """
    exclude = video_index[:, None] == video_index[None, :] if args.exclude_same_video else None
    if args.method != "narvid":
        return model.loss(similarity, scale, exclude)
    half = 0.5 if args.fidelity == "paper" and "narration" in similarity else 1.0  # Eq. 5's 1/2; the release has none
    parts = {f"nce_{view}": half * losses.nce(s, scale, exclude) for view, s in similarity.items()}
    if "CVH" in args.modules:
        views = (similarity["video"], similarity["narration"])
        if args.hard_loss == "hinge":
            hard = losses.cross_view_hard_negative(*views, lam=args.lam, eta=args.eta, exclude=exclude)
        else:
            hard = losses.hard_negative_nce(*views, lam=args.lam, scale=scale, exclude=exclude)
        parts |= {name: args.alpha * value for name, value in hard.items()}
    return parts


def train_step(model, batches: list, optimizer, scaler, where: str, split, args, world) -> dict[str, float]:
    """One optimiser step over the parts of one global batch that have a loss each -> the mean of each loss part."""
    totals: dict[str, torch.Tensor] = {}
    optimizer.zero_grad(set_to_none=True)

    def loss_of(batch, queries, videos, scale) -> torch.Tensor:
        """This rank's features -> the loss of the whole batch, on every rank; scaled for backward."""
        # Every rank scores its queries with all videos, then the rows meet: words stay where they are.
        videos = distributed.gather_features(videos)
        score = partial(match, **matching(args)) if args.method == "narvid" else plain(model).score
        with stage("matching"):
            similarity = {view: distributed.gather(s) for view, s in score(queries, videos).items()}
        video_index = distributed.gather(batch.video.to(world.device, non_blocking=True))
        with stage("loss"):
            parts = loss_parts(plain(model), similarity, scale, video_index, args)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value.detach().double() / len(batches)
        return scaler.scale(sum(parts.values()) / len(batches))

    encode = partial(features_of, model, args=args, world=world)
    no_sync = model.no_sync if world.size > 1 else contextlib.nullcontext
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if 0 < args.micro_batch < len(batch.video):
            backward_in_parts(encode, partial(loss_of, batch), batch, args.micro_batch, no_sync, reduce=last)
        else:
            with contextlib.nullcontext() if last else no_sync():
                loss = loss_of(batch, *encode(batch))
                with stage("backward"):
                    loss.backward()
    with stage("optimiser"):
        scaler.unscale_(optimizer)
        norm = optim.clip_gradients(model.parameters(), args.max_grad_norm)
        *values, norm = torch.stack([*totals.values(), norm.double()]).tolist()  # the CPU waits for the GPU
        stop_unless_finite(sum(values), f"the loss at {where}", batches, split, world)
        if not scaler.is_enabled():  # a scaler skips such a step and halves its scale
            stop_unless_finite(norm, f"the gradient at {where}", batches, split, world)
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < 1:
            stop_unless_finite(norm, f"even at loss scale 1 the gradient at {where}", batches, split, world)
        with torch.no_grad():  # CLIP's own bound; not inside forward, where the gradient would vanish at it
            plain(model).clip.logit_scale.clamp_(max=np.log(100))
    return dict(zip(totals, values))


def features_of(model, batch, args, world) -> tuple:
    """A batch -> queries, videos and logit scale."""
    with stage("data"):
        batch = batch.to(world.device)
    with stage("heads"), autocast(args, world.device):  # less the towers, which have a mark of their own
        return model(batch.tokens, batch.word_mask, batch.frames, batch.mask, batch.sentences, batch.sentence_of_frame,
                     batch.narration_mask)


def stop_unless_finite(value: float, what: str, batches: list, split, world) -> None:
    """Loss and gradient norm are the same on all ranks, so all stop; last.pt stays as it is."""
    if not np.isfinite(value):
        index = distributed.gather(torch.cat([batch.video for batch in batches]).to(world.device))
        names = ", ".join(split.videos[v] for v in index.tolist())
        raise InputError(f"{what} is {value}; videos of the batch: {names}. The last good checkpoint is kept; "
                         "lower the learning rates or look at these videos")


def plain(model) -> torch.nn.Module:
    """The model below DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# ------------------------------------------------------------------------------------------------------- evaluation


def encoding_of(model, args: argparse.Namespace, clip_config: ClipConfig, world) -> Encoding:
    """What the flags say about turning a split into features and scores."""
    if args.method == "narvid":
        score, views = partial(match, **matching(args)), ("video", "narration") if uses_narration(args) else ("video",)
    else:
        score, views = model.score, model.views
    return Encoding(clip_config.image_size, args.max_words, args.max_frames, args.eval_batch_size, args.num_workers,
                    partial(autocast, args, world.device), score, views)


def evaluate(model, splits: dict, name: str, args, clip_config, world, run: RunDir, *, final: bool = False) -> dict:
    """One split -> {"split", "metrics", "dsl"?, "qb_norm"?, ...}; post-processing is for the final evaluation."""
    model = plain(model).eval()
    split = splits[name]
    encoding = encoding_of(model, args, clip_config, world)
    videos = encode_videos(model, split, encoding, world)
    scores = score_queries(model, split.queries, videos, encoding, world)
    result = {"split": name, "select_on": args.select_on, "queries": len(split.queries), "videos": len(split.videos),
              "videos_without_narration": len(split.skipped), "videos_missing": split.missing}
    truth = (split.video_of_query, partial(getattr(model, "combine", combine), weight=args.fusion_weight))
    result["metrics"] = distributed.from_first(lambda: table_of_matrices(scores, *truth), world)
    if final and world.rank == 0:
        ranks = {name: text_to_video_ranks(s.numpy(), split.video_of_query) for name, s in truth[1](scores)}
        run.save_csv("ranks.csv", {"video": [split.videos[v] for v in split.video_of_query], "query": split.queries,
                                   **ranks})
    if final and "QAF" in getattr(args, "modules", ()):
        options = {name: value for name, value in matching(args).items() if name != "fine"}
        result["frames_kept"] = frames_kept(model, split.queries, videos, encoding, world, **options)
    if final and args.dsl_scale:
        result["dsl"] = distributed.from_first(lambda: with_dsl(scores, *truth, args.dsl_scale), world)
    if final and args.qb_norm_queries:
        queries = read_queries(Path(args.data_dir, "train.jsonl"))
        queries = random.Random(args.seed).sample(queries, min(args.qb_norm_queries, len(queries)))
        bank = score_queries(model, queries, videos, encoding, world)
        result["qb_norm"] = distributed.from_first(lambda: with_qb_norm(scores, bank, *truth), world)
    if final and args.save_similarity:
        names = {"video": "S_qv", "narration": "S_qn"}
        run.save_arrays("similarity.npz", {"video_of_query": split.video_of_query, "videos": np.array(split.videos),
                                           "queries": np.array(split.queries),
                                           **{names.get(view, f"S_{view}"): s.numpy() for view, s in scores.items()}})
    model.train()
    return result


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """One run -> the test metrics {"S_qv" | "S_qn" | "S_sum" | "S_fusion": what retrieval_metrics returns}."""
    args = parse_args(argv)
    try:
        return run_task(args, distributed.start())["metrics"]
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()


def run_task(args: argparse.Namespace, world: distributed.World) -> dict:
    run = RunDir(args.output_dir, vars(args), resume=args.resume == "auto", writes=world.rank == 0)
    if args.resume == "auto" and (result := run.final_result()):
        run.log(f"{args.output_dir}: this run has ended\n{show(result)}")
        return result
    seed_everything(args)
    splits = load_data(args, world)
    model, clip_config = build_model(args)
    model.to(world.device)
    if args.feature_cache:
        splits = with_features(splits, args.feature_cache, model.clip, clip_config,
                               encoding_of(model, args, clip_config, world), world)
    test = partial(evaluate, splits=splits, name="test", args=args, clip_config=clip_config, world=world, run=run,
                   final=True)
    if args.eval_only:
        run.open()
        return finish(run, [], test(model))

    train = splits["train"]
    sampler = PairSampler(len(train.queries), args.batch_size, rank=world.rank, world_size=world.size,
                          seed=args.seed, accumulation=args.gradient_accumulation_steps)
    dataset = FrameDataset(train, train.video_of_query, clip_config.image_size, cache=args.cache_frames, seed=args.seed,
                           segments=args.max_frames if args.frame_sampling == "segments" else None)
    to_batch = partial(collate, split=train, max_words=args.max_words, max_frames=args.max_frames, with_queries=True)
    loader = make_loader(dataset, to_batch, sampler, num_workers=args.num_workers)
    optimizer = optim.build_optimizer(model, recipe=args.recipe, lr=args.lr, clip_lr=args.clip_lr,
                                      weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.recipe == "modern" and args.precision == "fp16")
    progress = resume(run, model, optimizer, scaler)
    run.open(tensorboard=args.tensorboard, step=progress["global_step"])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    profile = Profile(args.profile, world.device)
    if args.profile and world.size > 1:
        wrapped.register_comm_hook(None, all_reduce)
    run.log(f"{len(train.queries)} pairs of {len(train.videos)} videos, {sampler.steps} steps an epoch; {world.size} "
            f"process(es), {world.device.type}; from epoch {progress['epoch'] + 1}, step {progress['step']}")

    def save(name: str) -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f"the weights are not finite after step {progress['global_step']}; the last good "
                             "checkpoint is kept, lower the learning rates")
        # What a checkpoint says of its choice: only best.pt was chosen.
        stored = vars(args) | ({"select_on": "last"} if name == "last.pt" else {})
        run.save(name, {"model": model.state_dict(), "clip_config": asdict(clip_config), "args": stored, **progress}
                 | ({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()} if name == "last.pt" else {}))

    def select() -> None:
        """Evaluate the split that chooses the epoch, keep the best; then write last.pt, which knows of both."""
        if args.select_on != "last":
            result = evaluate(model, splits, args.select_on, args, clip_config, world, run)
            result |= {"epoch": progress["epoch"], "step": progress["step"]}
            progress["results"].append(result)
            run.log(show(result))
            run.scalars({f"{args.select_on}/R@1": selection_score(result)}, progress["global_step"])
            if selection_score(result) > progress["best"]:
                progress["best"] = selection_score(result)
                save("best.pt")
            run.write_results(progress["results"])
        save("last.pt")

    while progress["epoch"] < args.epochs:
        train_one_epoch(wrapped, loader, sampler, optimizer, scaler, progress, train, args, world, run, profile,
                        save=partial(save, "last.pt"), select=select)
    if args.select_on == "last":
        save("best.pt")
    distributed.barrier(world)  # rank 0 has written best.pt
    model.load_state_dict(run.load("best.pt")["model"])
    return finish(run, progress["results"], test(model))


def resume(run: RunDir, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler) -> dict:
    """Where to go on: 1. weights, 2. optimiser, 3. loss scale, 4. progress and results so far.

    Nothing random is stored: the order of samples comes from (seed, epoch), dropout from (seed, step, rank).
    """
    state = run.load("last.pt")
    fresh = {"epoch": 0, "step": 0, "global_step": 0, "best": -1.0, "results": []}
    if state is None:
        return fresh
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    run.write_results(state["results"])
    progress = {key: state[key] for key in fresh}
    best = run.load("best.pt")
    if best and best["global_step"] > progress["global_step"]:
        progress["best"] = fresh["best"]  # written just before the kill; on a GPU its score may not come again
    return progress


def train_one_epoch(model, loader, sampler: PairSampler, optimizer, scaler, progress: dict, split, args, world,
                    run: RunDir, profile: Profile, *, save, select) -> None:
    """From progress["step"] to the end of progress["epoch"]; leaves progress at the start of the next epoch."""
    epoch, total = progress["epoch"], sampler.steps * args.epochs
    sampler.set(epoch, progress["step"])
    loader.dataset.epoch.fill_(epoch)
    batches = iter(loader)
    bar = tqdm(range(progress["step"], sampler.steps), initial=progress["step"], total=sampler.steps,
               desc=f"epoch {epoch + 1}/{args.epochs}", unit="step", disable=world.rank > 0)
    for step in bar:
        factor = optim.warmup_cosine(progress["global_step"] / total, args.warmup)
        optim.set_lr(optimizer, factor)
        seed = np.random.SeedSequence([args.seed, progress["global_step"], world.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))  # dropout
        with profile.step():
            with stage("data"):
                of_step = [next(batches) for _ in range(args.gradient_accumulation_steps)]
            parts = train_step(model, of_step, optimizer, scaler, f"epoch {epoch + 1}, step {step + 1}", split, args,
                               world)
        if table := profile.table():
            run.log(table)
        progress["step"], progress["global_step"] = step + 1, progress["global_step"] + 1
        loss = sum(parts.values())
        bar.set_postfix(loss=f"{loss:.3f}")
        if progress["global_step"] % args.log_every == 0:
            run.log(f"epoch {epoch + 1} step {step + 1}/{sampler.steps} loss {loss:.4f} "
                    + " ".join(f"{name} {value:.4f}" for name, value in parts.items())
                    + f" lr {factor * args.lr:.2e} scale {plain(model).clip.logit_scale.exp().item():.1f}")
            run.scalars({"loss": loss, **parts, "lr": factor * args.lr}, progress["global_step"])
        if step + 1 == sampler.steps:
            progress["epoch"], progress["step"] = epoch + 1, 0
            select()
        elif args.eval_every and (step + 1) % args.eval_every == 0:
            select()
        elif args.save_every and (step + 1) % args.save_every == 0:
            save()


def finish(run: RunDir, results: list[dict], result: dict) -> dict:
    """Record and print the test result that ends a run."""
    result |= {"final": True}
    run.write_results([*results, result])
    run.log(show(result))
    return result


def seed_everything(args: argparse.Namespace) -> None:
    """Seeds for the initial weights; every later draw is seeded where it is made."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


if __name__ == "__main__":
    main()

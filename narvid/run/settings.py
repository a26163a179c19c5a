"""The settings of a run: the one place where flags are declared, and what presets and checkpoints add to them.

A preset and a checkpoint are turned into argv that stands before the user's own, so that argparse checks all alike.
A method declares its own flags in its file. Not here: building anything (build.py).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import cache
from pathlib import Path

import torch

from narvid import InputError
from narvid.flags import (Parser, WithDefaults, as_argv, count, number, positive, positive_float, preset_argv,
                          read_preset, share)
from narvid.methods import METHODS
from narvid.methods.protocol import names_of
from narvid.run.exported import load_model
from narvid.run.run_dir import RunDir

ABOUT = """Train and evaluate NarVid: python main_task_retrieval.py --config configs/msrvtt_vitb16.yaml --output_dir
runs/msrvtt. The same under torchrun, on CPUs or GPUs."""
DEFAULT_METHOD = "narvid"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UNKNOWN = "unknown"  # what chose the epoch of weights that do not say it
ON_VAL = "val"  # as --fusion_weight: chosen on the val split; best.pt holds the number that was chosen
# Flags outside the groups "model" and the method's that a checkpoint brings back: its features and scores need them.
OF_A_CHECKPOINT = ("sentence", "max_words", "max_frames", "fusion_weight", "recipe", "precision")


def build_parser(method: str = DEFAULT_METHOD) -> Parser:
    """The flags of every method, and those of this one; another method's are refused, not ignored."""
    parser = Parser(description=ABOUT, allow_abbrev=False, formatter_class=WithDefaults)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--method", choices=METHODS, default=method,
                        help="what is trained; `--method NAME --help` lists its own flags")

    g = parser.add_argument_group("data")
    g.add_argument("--data_dir", default="data/msrvtt", help="folder with {train,val,test}.jsonl")
    g.add_argument("--frames", help="folder of extracted frames [data_dir/frames]")
    g.add_argument("--narrations", help="narration file, ours or a published one [data_dir/narrations.jsonl]")
    g.add_argument("--speech", help="narration file of what is said, of `python -m narvid.narration import` "
                                    "[data_dir/speech.jsonl where --sentence reads it]")
    g.add_argument("--sentence", choices=["caption", "speech", "both"], default="caption",
                   help="what stands beside a frame; both: its caption and what is said meanwhile, cut to --max_words")
    g.add_argument("--missing_narration", choices=["error", "skip-video"], default="error",
                   help="what to do with a video that has no sentence at all")
    g.add_argument("--allow_leak", action=switch, default=False,
                   help="train although a video of the training split is in val or test too")
    g.add_argument("--max_words", type=positive, default=64, help="tokens of a query or sentence, with start and end")
    g.add_argument("--max_frames", type=positive, default=12, help="K: frames of a video, at most")
    g.add_argument("--frame_sampling", choices=["uniform", "segments"], default="uniform",
                   help="in training; segments: one frame at random from each K-th part of a video, with its sentence")
    g.add_argument("--num_workers", type=count, default=4, help="loader processes of each training process")
    g.add_argument("--cache_frames", action=switch, default=False,
                   help="decode once: V * K * 3 * side^2 bytes of shared memory a process")

    g = parser.add_argument_group("model")
    g.add_argument("--clip_model", default="ViT-B-32",
                   help="open_clip model name, a model config in .json, or a folder with open_clip_config.json")
    g.add_argument("--clip_pretrained", help="open_clip tag (openai), a weights file, or a folder as the hub has it; "
                   "none: a folder's own, else random weights")
    g.add_argument("--tokenizer", help="folder of the text tower's tokenizer, where it is not CLIP's [from the hub]")
    g.add_argument("--quick_gelu", action=switch, default=None,
                   help="QuickGELU as activation; for a file of weights that does not tell")
    g.add_argument("--checkpoint", help="start from these weights: a run, an exported folder, or a released file")

    METHODS[method].add_flags(parser.add_argument_group(method))

    g = parser.add_argument_group("optimisation")
    g.add_argument("--exclude_same_video", action=switch, default=False,
                   help="another caption of the same video in the batch is no negative")
    g.add_argument("--recipe", choices=["reported", "modern"], default="modern",
                   help="reported: fp16 towers and BertAdam, as behind the published tables; modern: AdamW over fp32")
    g.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="autocast of recipe modern")
    g.add_argument("--epochs", type=positive, default=5, help="passes over the training queries")
    g.add_argument("--batch_size", type=positive, default=64, help="pairs of one optimiser step, over all processes")
    g.add_argument("--micro_batch", type=count, default=0,
                   help="to save memory: pairs that a process encodes at a time, each twice; the loss stays that of "
                        "the whole batch; 0: all at once")
    g.add_argument("--gradient_accumulation_steps", type=positive, default=1,
                   help="parts of a step, each with a loss and negatives of its own (unlike --micro_batch)")
    g.add_argument("--lr", type=number, default=1e-4, help="peak learning rate of everything but CLIP")
    g.add_argument("--clip_lr", type=number, help="peak learning rate of CLIP [recipe reported 1e-7; modern 1e-6, "
                   "cited and not tuned]")
    g.add_argument("--weight_decay", type=number, default=0.2, help="of the optimiser; 0.2 as in CLIP4Clip")
    g.add_argument("--warmup", type=share, default=0.1, help="share of all steps in which the rates rise")
    g.add_argument("--max_grad_norm", type=positive_float, default=1.0,
                   help="norm to which all gradients together are clipped")
    g.add_argument("--freeze_layers", type=int, default=0,
                   help="freeze the embeddings and the first n blocks of both towers; -1: everything is trained")
    g.add_argument("--freeze_towers", action=switch, default=False, help="instead: train heads and logit scale alone")
    g.add_argument("--train_towers", nargs="+", metavar="full | last N | frozen",
                   help="instead of these two: everything; the last N blocks of both towers and what stands behind "
                        "them; the logit scale alone")
    g.add_argument("--layer_decay", type=share, default=1.0,
                   help="a tower's rate falls by this factor with each block towards its input; 1: it does not")
    g.add_argument("--feature_cache", metavar="DIR",
                   help="with --freeze_towers: folder that keeps the towers' features, encoded once for all runs")
    g.add_argument("--grad_checkpointing", action=switch, default=False, help="recompute tower blocks in backward")
    g.add_argument("--compile", action=switch, default=False,
                   help="torch.compile for the blocks of both towers; the first steps take minutes")

    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval_only", action=switch, default=False, help="evaluate --checkpoint on test; train nothing")
    g.add_argument("--select_on", choices=["val", "last", "test"],
                   help="what chooses the epoch [val where val.jsonl exists, else last]")
    g.add_argument("--eval_every", type=count, default=0, help="evaluate --select_on's split also every n steps; 0: no")
    g.add_argument("--eval_batch_size", type=positive, default=64, help="videos or queries encoded at a time")
    g.add_argument("--eval_precision", choices=["fp32", "bf16", "fp16", "train"], default="fp32",
                   help="number format of evaluation; fp32: whatever the batch, the scores are the same to 1e-5; "
                        "train: that of --recipe and --precision")
    g.add_argument("--fusion_weight", type=share_or_val, default=0.5,
                   help="of S_qv in S_fusion; 0.5 is Eq. 11; val: the best of 21 on the val split, never on test")
    g.add_argument("--dsl_scale", type=number, default=0.0, help="also report dual softmax (DSL) of this scale; 0: no")
    g.add_argument("--qb_norm_queries", type=count, default=0,
                   help="also report QB-Norm with n training queries and beta 20; 0: no")
    g.add_argument("--ndcg", action=switch, default=False, help="also report nDCG@10; one candidate a query is right")
    g.add_argument("--show_kept", nargs="+", metavar="QUERY",
                   help="print the best videos of these texts, with the frames and sentences that the filter keeps")
    g.add_argument("--save_similarity", action=switch, default=False, help="write both test matrices to similarity.npz")

    g = parser.add_argument_group("run")
    g.add_argument("--config", help="preset: a YAML file of these flags; the command line wins")
    g.add_argument("--output_dir", required=True, help="folder of this run: results, checkpoints, log")
    g.add_argument("--resume", choices=["auto", "never"], default="never", help="auto: from last.pt if it is there")
    g.add_argument("--seed", type=count, default=42, help="of new weights, order and dropout")
    g.add_argument("--deterministic", action=switch, default=False, help="deterministic GPU kernels alone; slower")
    g.add_argument("--save_every", type=count, default=0, help="save also every n steps; 0: at an epoch's end")
    g.add_argument("--save_every_minutes", type=number, default=10.0, help="save also every n minutes; 0: no")
    g.add_argument("--rank_timeout", type=positive_float, default=30.0,
                   help="minutes that a process waits for another before the run ends")
    g.add_argument("--log_every", type=positive, default=50, help="steps from one line of the log to the next")
    g.add_argument("--profile", type=count, default=0, help="log where the time of n early steps goes; 0: no")
    g.add_argument("--tensorboard", action=switch, default=False, help="write curves (pip install tensorboard)")
    return parser


def share_or_val(text: str) -> float | str:
    """A number from 0 to 1, or "val"."""
    return text if text == ON_VAL else share(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line over those of --config and --checkpoint; a mistake ends the process in one sentence."""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--checkpoint", "--method", "--output_dir", "--resume"):
        first.add_argument(flag)
    first.add_argument("--eval_only", action=argparse.BooleanOptionalAction)
    given, _ = first.parse_known_args(argv)
    for flag, value in vars(given).items():
        if value == "":
            first.error(f"--{flag}: is empty; name one, or leave the flag out")
    preset = read_preset(given.config, first) if given.config else {}
    checkpoint = given.checkpoint or preset.get("checkpoint")
    stored = _stored_flags(checkpoint, given, preset, first) if checkpoint else {}
    method = given.method or preset.get("method") or stored.get("method", DEFAULT_METHOD)
    if method not in [*METHODS]:
        first.error(f"--method {method}: choose from {', '.join(METHODS)}")
    parser = build_parser(method)
    eval_only = preset.get("eval_only", False) if given.eval_only is None else given.eval_only
    preset = preset_argv(preset, given.config, parser) if preset else []
    from_checkpoint = _checkpoint_argv(stored, checkpoint, parser, eval_only=eval_only) if stored else []
    # A checkpoint is evaluated as it was trained, whatever a preset says; training may go on with other values.
    args = parser.parse_args([*preset, *from_checkpoint, *argv] if eval_only else [*from_checkpoint, *preset, *argv])
    args.eval_only |= not METHODS[method].trained
    if args.eval_only and any(word.split("=")[0] == "--select_on" for word in argv):
        parser.error("--select_on is of training; with --eval_only the checkpoint says what chose its epoch")
    if args.eval_only and "select_on" not in stored:
        args.select_on = UNKNOWN if METHODS[method].trained else "none, nothing is trained"  # a preset cannot know
    _check_train_towers(args, parser)
    _fill_in(args)
    _refuse(args, parser)
    return args


def _check_train_towers(args: argparse.Namespace, parser: Parser) -> None:
    words = args.train_towers or []
    if words not in ([], ["full"], ["frozen"]) and not (
            len(words) == 2 and words[0] == "last" and words[1].isdecimal() and 0 < int(words[1]) < 1000):
        parser.error(f"--train_towers {' '.join(words)}: say full, frozen, or last and a number of blocks")
    if words and words != ["frozen"] and args.freeze_towers:
        parser.error(f"--train_towers {' '.join(words)} and --freeze_towers: leave one of the two out")
    if words and args.freeze_layers not in (0, -1 if words == ["full"] else 0):
        parser.error(f"--train_towers {' '.join(words)} and --freeze_layers {args.freeze_layers}: leave one of the two "
                     "out")


def preset_flags(path: str) -> argparse.Namespace:
    """A preset alone as flags, checked like a command line; a mistake ends the process in one sentence."""
    first = Parser(add_help=False, allow_abbrev=False)
    preset = read_preset(path, first)
    method = preset.get("method", DEFAULT_METHOD)
    if method not in [*METHODS]:
        first.error(f"{path}: method {method}: choose from {', '.join(METHODS)}")
    parser = build_parser(method)
    return parser.parse_args([*preset_argv(preset, path, parser), "--output_dir", "."])


def flags_of(config: dict) -> argparse.Namespace:
    """A run's config.yaml as flags; a flag that is newer than the run has its default."""
    return argparse.Namespace(**_defaults(config.get("method", DEFAULT_METHOD)) | config)


@cache
def _defaults(method: str) -> dict:
    return vars(build_parser(method).parse_args(["--output_dir", "."]))


def _fill_in(args: argparse.Namespace) -> None:
    """The defaults that depend on other flags."""
    if args.train_towers == ["frozen"]:
        args.freeze_towers = True
    if args.train_towers == ["full"]:
        args.freeze_layers = -1
    args.frames = args.frames or str(Path(args.data_dir, "frames"))
    args.narrations = args.narrations or str(Path(args.data_dir, "narrations.jsonl"))
    if args.sentence != "caption":
        args.speech = args.speech or str(Path(args.data_dir, "speech.jsonl"))
    if "titles" in METHODS[args.method].reads(args):
        args.titles = args.titles or [str(Path(args.data_dir, "titles.json"))]
    if args.clip_lr is None:
        args.clip_lr = 1e-7 if args.recipe == "reported" else 1e-6
    args.select_on = args.select_on or ("val" if Path(args.data_dir, "val.jsonl").exists() else "last")


def _refuse(args: argparse.Namespace, parser: Parser) -> None:
    """Stop where flags do not go together."""
    method = METHODS[args.method]
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name}: is empty; name one, or leave the flag out")
        if isinstance(value, int) and abs(value) >= 2**32:  # beyond it seeds, and soon tensors, end
            parser.error(f"--{name} {value}: must be below 2^32")
    if args.sentence != "caption" and "narration" not in method.reads(args):
        parser.error(f"--sentence {args.sentence}: {named(args)} reads no narration")
    if args.speech and args.sentence == "caption":
        parser.error("--speech is read with --sentence speech or both: add one of them")
    if args.rank_timeout > 1e5:
        parser.error(f"--rank_timeout {args.rank_timeout:g}: at most 1e5 minutes, ten weeks")
    if args.layer_decay == 0:
        parser.error("--layer_decay 0: nothing but the top would be trained; say --train_towers last 1")
    if args.max_words < 3:
        parser.error(f"--max_words {args.max_words}: the start, one word and the end need 3")
    if args.dsl_scale > 1e6:
        parser.error(f"--dsl_scale {args.dsl_scale:g}: at most 1e6, where a softmax is a maximum already")
    if args.qb_norm_queries and not Path(args.data_dir, "train.jsonl").is_file():
        parser.error(f"--qb_norm_queries takes its queries from {Path(args.data_dir, 'train.jsonl')}, which is not "
                     "there; leave it out, or prepare the annotations")
    if args.select_on == "val" and not args.eval_only and not Path(args.data_dir, "val.jsonl").exists():
        parser.error(f"--select_on val: there is no {Path(args.data_dir, 'val.jsonl')}; say last (or test: it peeks)")
    if args.fusion_weight == ON_VAL:
        if "fusion_weight" in method.unread(args):
            parser.error(f"--fusion_weight val: {named(args)} has nothing to weigh; leave it out")
        if not Path(args.data_dir, "val.jsonl").exists():
            parser.error(f"--fusion_weight val: there is no {Path(args.data_dir, 'val.jsonl')} to choose it on; say a "
                         "number (0.5 is Eq. 11), or name the run's best.pt, which holds the one that was chosen")
    if args.micro_batch and method.score_has_parameters(args):
        parser.error(f"--micro_batch needs a score without parameters, which {named(args)} has not")
    if args.feature_cache and not args.freeze_towers:
        parser.error("--feature_cache keeps what frozen towers give: add --freeze_towers")
    if args.feature_cache and args.cache_frames:
        parser.error("--cache_frames keeps pixels, --feature_cache reads none: leave it out (--no-cache_frames)")
    if args.feature_cache and not method.features_suffice(args):
        parser.error(f"--feature_cache: {named(args)} needs more of the towers than their features")
    if args.eval_every and args.select_on == "last" and not args.eval_only:
        parser.error("--eval_every evaluates the split that chooses the epoch: add --select_on val or test")
    if args.eval_only and not args.checkpoint and method.trained:
        parser.error("--eval_only evaluates a --checkpoint: give one")


def named(args: argparse.Namespace) -> str:
    """The method with those of its own flags that are not at their default."""
    defaults = _defaults(args.method)
    own = [f"--{name} {getattr(args, name)}" for name in sorted(names_of(METHODS[args.method].add_flags))
           if getattr(args, name) != defaults[name] and name not in METHODS[args.method].loss_flags]
    return " ".join([f"--method {args.method}", *own])


# -------------------------------------------------------------------------------------------- what a checkpoint says


def is_ours(stored: dict) -> bool:
    """Whether a checkpoint was written by this trainer; a released one is a state dict."""
    return "clip_config" in stored


def _stored_flags(path: str, given: argparse.Namespace, preset: dict, parser: Parser) -> dict:
    """The flags that a checkpoint of ours was trained with; {} for a released one.

    A run that goes on has them itself: the checkpoint it started from may be gone.
    """
    eval_only = preset.get("eval_only", False) if given.eval_only is None else given.eval_only
    try:
        if given.output_dir and not eval_only and (given.resume or preset.get("resume")) == "auto":
            if (of_run := RunDir(given.output_dir, {}, writes=False).settings()) is not None:
                return of_run
        stored = load_model(path)
        return stored["args"] if is_ours(stored) else {}
    except InputError as error:
        parser.error(str(error))


def _checkpoint_argv(stored: dict, path: str, parser: Parser, *, eval_only: bool) -> list[str]:
    """What a checkpoint of ours says about its model, so that it needs no flag again."""
    own = of_a_model(parser.get_default("method"))
    own |= {"select_on"} if eval_only else set()  # its epoch was chosen when it was trained; the result says on what
    argv = as_argv({k: v for k, v in stored.items() if k in own and v is not None}, path, parser)
    parser.where = f"{path}: "
    parser.parse_args([*argv, "--output_dir", "."])  # only to name the file where a value is wrong
    parser.where = ""
    return argv


def of_a_model(method: str) -> set[str]:
    """The flags that a model's features and scores need."""
    groups = build_parser(method)._action_groups
    of_model = {a.dest for g in groups if g.title == "model" for a in g._group_actions} - {"checkpoint"}
    return {*of_model, *names_of(METHODS[method].add_flags), *OF_A_CHECKPOINT} - METHODS[method].loss_flags


def autocast(args: argparse.Namespace, device: torch.device):
    """The number format of towers and heads; matching and losses are always computed outside, in fp32."""
    if args.recipe == "reported" or args.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[args.precision])


def eval_autocast(args: argparse.Namespace, device: torch.device):
    """The same of evaluation and search."""
    if args.eval_precision == "train":
        return autocast(args, device)
    if args.eval_precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[args.eval_precision])

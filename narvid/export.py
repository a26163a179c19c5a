"""A model as a folder to keep, to move and to give away: python -m narvid.export runs/x --out models/x

Whatever takes a run's best.pt takes the folder too: --checkpoint, narvid-search, narvid.Retriever. Here: what stands in
it, and its card. Not here: how it is written and read (narvid/run/exported.py).
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch

from narvid import InputError
from narvid.evaluation import show
from narvid.flags import Parser, command
from narvid.methods import METHODS
from narvid.report.runs import final_of, is_result, read_results
from narvid.run.build import build_model
from narvid.run.exported import AGAIN, CONFIG, load_model, read_config, write_exported
from narvid.run.settings import DEFAULT_METHOD, build_parser, is_ours, named, of_a_model, parse_args

CARD = """---
library_name: narvid
tags:
- text-video-retrieval
---
# {title}

{of}

It finds videos by sentences. Method `{named}`; the CLIP towers are {clip_model},
for pictures of {side} pixels, with a joint dimension of {dim}. It looks at up to {max_frames} frames of a video, one
a second at most, and reads up to {max_words} tokens of a query{narration_used}.

## Use

    from narvid import Retriever
    model = Retriever.load("{folder}")
    videos = model.encode_videos(["video.mp4"])
    print(model.score(model.encode_queries(["what happens"]), videos)["fused"])

Loading it executes nothing. `--checkpoint {folder}` evaluates it, trains it further, or searches with it.

## Data

Number and digest of what it was trained and evaluated on:

{data}

## Recipe

{recipe}

## Results

{results}

## Licence

{licence}
"""
# What the makers of open_clip's weights state, by the beginning of the tag; others are not known here.
LICENCES = {"openai": "MIT (github.com/openai/CLIP)", "laion": "MIT (huggingface.co/laion)",
            "datacomp": "MIT (huggingface.co/laion)", "webli": "Apache 2.0 (SigLIP, huggingface.co/timm)",
            "meta": "Apache 2.0 (Perception Encoder, huggingface.co/facebook)",
            "metaclip": "CC BY-NC 4.0 (MetaCLIP, huggingface.co/facebook)"}


def export(folder: str | Path, model: torch.nn.Module, flags: argparse.Namespace, source: Path | None,
           known: dict | None, *, licence: str | None = None) -> None:
    """Write a model, built with these flags, to a folder.

    source: where it was loaded from, for the result that is known of it. known: of `known_of`. licence: of the weights
    that its training started from, where we do not know it.
    InputError where the folder holds anything else, or the disk refuses.
    """
    result = result_of(source) if source else None
    kept = {name: value for name, value in vars(flags).items()
            if name in of_a_model(flags.method) and name != "tokenizer"}
    if model.progress:  # a released file does not say what chose it
        kept["select_on"] = flags.select_on
    config = {"flags": {"method": flags.method, **kept}, "towers": asdict(model.clip.config),
              "epoch": model.progress.get("epoch"), "step": model.progress.get("step"), **(known or UNKNOWN),
              "result": result}
    write_exported(folder, model.state_dict(), config,
                   card(Path(folder).name, model, flags, known or UNKNOWN, result, licence), model.clip.tokenizer)


UNKNOWN = {"data": None, "training": None}


def known_of(stored: dict) -> dict[str, dict | None]:
    """What a checkpoint says of its training: "data", number and digest of queries, pictures, ...; "training", flags.

    The flags are those that say nothing of its features and scores: optimisation, loss, seed, and the weights that it
    started from.
    """
    data = (stored.get("identity") or {}).get("data") or None
    if not is_ours(stored) or "training" in stored:  # the latter: an exported folder
        return {"data": data, "training": stored.get("training")}
    flags, method = stored["args"], stored["args"].get("method", DEFAULT_METHOD)
    if method not in [*METHODS] or "recipe" not in flags:  # a checkpoint that was put together by hand
        return {"data": data, "training": None}
    groups = build_parser(method)._action_groups
    names = {action.dest for group in groups if group.title == "optimisation" for action in group._group_actions}
    names = (names | METHODS[method].loss_flags | {"seed", "frame_sampling"}) - {"feature_cache", "compile"}
    training = {name: flags[name] for name in sorted(names & flags.keys()) if flags[name] is not None}
    started = flags.get("checkpoint")
    return {"data": data, "training": training | ({"checkpoint": Path(started).name} if started else {})}


def result_of(path: Path) -> dict | None:
    """The result on test that is known of a model: of a run that has ended, or what an exported folder says."""
    if (path / CONFIG).exists():
        result = read_config(path)["result"]
        if result is not None and not is_result(result):
            raise InputError(f"{path / CONFIG}: its result is no result of this code; {AGAIN}")
        return result
    folder = path if path.is_dir() else path.parent
    return final_of(read_results(folder)) if path.is_dir() or path.name == "best.pt" else None


def recipe_of(flags: argparse.Namespace, training: dict | None) -> str:
    """The trainer's flags behind these weights, as a command line would have them."""
    if not training:
        return "It is not known."
    words = [_as_text(name, value) for name, value in training.items() if name != "checkpoint"]
    start = training.get("checkpoint") or flags.clip_pretrained
    begun = f"Training started from {Path(start).name if start else 'random weights'}, with"
    lines = textwrap.wrap(" ".join(words), 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([begun, "", *(f"    {line}" for line in lines)])


def _as_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name}"
    return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])


def licence_of(flags: argparse.Namespace, training: dict | None, stated: str | None) -> str:
    """What is known of the licence of the weights that training started from; it may bind who shares the result."""
    ours = "\n\nThe code is MIT; it says nothing of the videos and sentences behind the weights."
    start = (training or {}).get("checkpoint") or flags.clip_pretrained
    if stated:
        return f"Of the weights that its training started from: {stated}.{ours}"
    if training and not start:
        return f"Its training started from random weights: no other model's licence is part of it.{ours}"
    beginnings = sorted((tag for tag in LICENCES if (flags.clip_pretrained or "").startswith(tag)), key=len)
    if beginnings and not (training or {}).get("checkpoint"):
        return (f"Its towers started from {flags.clip_model}, {flags.clip_pretrained}; their makers state: "
                f"{LICENCES[beginnings[-1]]}.{ours}")
    start = Path(start).name if start else "a released file"
    return (f"The licence of the weights that it started from ({start}) is not known here: look at where they come "
            f"from, and say it with `--licence`.{ours}")


def card(folder: str, model: torch.nn.Module, flags: argparse.Namespace, known: dict, result: dict | None,
         licence: str | None = None) -> str:
    """The model card, in Markdown."""
    progress = model.progress
    of = "Weights as they were released, not trained by this code."
    if progress:
        of = f"Trained by this code; the state after epoch {progress['epoch']}"
        of += f" and {progress['step']} steps" if progress["step"] else ""
        of += f", chosen on: {flags.select_on}."
    data, training = known["data"], known["training"]
    lines = [f"- {name}: {value}" for name, value in data.items()] if data else ["It is not known."]
    narrated = "narration" in METHODS[flags.method].reads(flags)
    text = "\n".join(f"    {line}".rstrip() for line in show(result).splitlines()) if result else "None are known."
    return CARD.format(title=folder, folder=folder, of=of, named=named(flags).removeprefix("--method "), results=text,
                       data="\n".join(lines), recipe=recipe_of(flags, training),
                       licence=licence_of(flags, training, licence),
                       narration_used=" and of each sentence of a narration, one a frame" if narrated else "",
                       clip_model=Path(flags.clip_model).stem, side=model.clip.picture.size,
                       dim=model.clip.dim, max_frames=flags.max_frames, max_words=flags.max_words)


def main(argv: list[str] | None = None) -> None:
    """The command; a mistake ends it in one sentence."""
    parser = Parser(prog="python -m narvid.export", description="A model as a folder to keep, to move, to give away.",
                    epilog="Other flags are the trainer's: a released file wants --method and --clip_model.",
                    allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run's folder or best.pt, or the released file of a method")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the exported model, a folder of its own")
    parser.add_argument("--licence", metavar="TEXT",
                        help="licence of the weights that training started from, for the model card")
    args, more = parser.parse_known_args(argv)
    if not Path(args.run).exists():
        raise InputError(f"{args.run}: is not there; name a run's folder, its best.pt or a released file")
    flags = parse_args(["--eval_only", "--output_dir", args.out, "--checkpoint", args.run, *more])
    export(args.out, build_model(flags), flags, Path(args.run), known_of(load_model(args.run)), licence=args.licence)
    print(f"{args.out} holds the model; use it wherever a run's best.pt is used")


if __name__ == "__main__":
    command(main)

"""A model as a folder to keep, to move and to give away: python -m narvid.export runs/x --out models/x

Whatever takes a run's best.pt takes the folder too: --checkpoint, narvid-search, narvid.Retriever. Here: what stands in
it, and its card. Not here: how it is written and read (narvid/run/exported.py).
"""

from __future__ import annotations

import argparse
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
from narvid.run.settings import named, of_a_model, parse_args

CARD = """# {title}

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

{data}

## Results

{results}
"""


def export(folder: str | Path, model: torch.nn.Module, flags: argparse.Namespace, source: Path | None,
           data: dict | None) -> None:
    """Write a model, built with these flags, to a folder.

    source: where it was loaded from, for the result that is known of it. data: of `data_of`.
    InputError where the folder holds anything else, or the disk refuses.
    """
    result = result_of(source) if source else None
    kept = {name: value for name, value in vars(flags).items() if name in of_a_model(flags.method)}
    if model.progress:  # a released file does not say what chose it
        kept["select_on"] = flags.select_on
    config = {"flags": {"method": flags.method, **kept}, "towers": asdict(model.clip.config),
              "epoch": model.progress.get("epoch"), "step": model.progress.get("step"), "data": data, "result": result}
    write_exported(folder, model.state_dict(), config, card(Path(folder).name, model, flags, data, result))


def data_of(stored: dict) -> dict[str, str] | None:
    """What a checkpoint says of the data that it was trained on: number and digest of queries, pictures, ..."""
    return (stored.get("identity") or {}).get("data") or None


def result_of(path: Path) -> dict | None:
    """The result on test that is known of a model: of a run that has ended, or what an exported folder says."""
    if (path / CONFIG).exists():
        result = read_config(path)["result"]
        if result is not None and not is_result(result):
            raise InputError(f"{path / CONFIG}: its result is no result of this code; {AGAIN}")
        return result
    folder = path if path.is_dir() else path.parent
    return final_of(read_results(folder)) if path.is_dir() or path.name == "best.pt" else None


def card(folder: str, model: torch.nn.Module, flags: argparse.Namespace, data: dict | None,
         result: dict | None) -> str:
    """The model card, in Markdown."""
    progress = model.progress
    of = "Weights as they were released, not trained by this code."
    if progress:
        of = f"Trained by this code; the state after epoch {progress['epoch']}"
        of += f" and {progress['step']} steps" if progress["step"] else ""
        of += f", chosen on: {flags.select_on}."
    lines = [f"- {name}: {value}" for name, value in data.items()] if data else ["It is not known."]
    narrated = "narration" in METHODS[flags.method].reads(flags)
    text = "\n".join(f"    {line}".rstrip() for line in show(result).splitlines()) if result else "None are known."
    return CARD.format(title=folder, folder=folder, of=of, named=named(flags).removeprefix("--method "), results=text,
                       data="\n".join(lines),
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
    args, more = parser.parse_known_args(argv)
    if not Path(args.run).exists():
        raise InputError(f"{args.run}: is not there; name a run's folder, its best.pt or a released file")
    flags = parse_args(["--eval_only", "--output_dir", args.out, "--checkpoint", args.run, *more])
    export(args.out, build_model(flags), flags, Path(args.run), data_of(load_model(args.run)))
    print(f"{args.out} holds the model; use it wherever a run's best.pt is used")


if __name__ == "__main__":
    command(main)

"""The paper's figures from the runs on this disk: 3, 6 and 7, and training curves and a heat map of the similarities.

  python scripts/make_figures.py --runs runs --out figures

Writes each as PDF (vector) and PNG, one column wide. Nothing is drawn that is not on disk; what is missing is named,
with the command that makes it. Needs matplotlib.

  figure3     R@1 with the narrations of different captioners: runs that differ in --narrations alone, two captioners
              or more by the narration files' own word; a run without narration (--modules without NM) is a line
  figure6     distributions of S_qv and S_qn, own and other videos, before and after Eq. 11 standardises them
  figure7     R@1 over lambda and over eta: runs that differ in --lam alone, or in --eta alone
  curves      losses of log.txt; R@1 where a split chose the epoch
  heatmap     S_qv and S_qn, a query a row, its own video on the diagonal

Runs that differ in --seed alone are one point, with mean and standard deviation. figure6, curves and heatmap are of one
run each, and carry its name.

Here: finding runs, grouping them. Drawing: drawing.py. Not here: the numbers (results.jsonl, similarity.npz).
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from narvid import InputError
from narvid.files import read_text, writing
from narvid.flags import Parser, WithDefaults
from narvid.data.published_narrations import CAPTIONER, read_form
from narvid.parsing import parse_json
from narvid.methods import METHODS
from narvid.report.drawing import (draw_captioners, draw_curves, draw_distributions, draw_heatmap, draw_sweeps,
                                   pyplot)
from narvid.report.runs import ADVICE, final_of, read_config, read_results
from narvid.run.same_run import FREE_TO_CHANGE
from narvid.run.settings import flags_of

# These say where and how often, not what is measured.
NO_DIFFERENCE = {*FREE_TO_CHANGE, "seed", "save_similarity", "dsl_scale", "qb_norm_queries", "ndcg",
                 "eval_batch_size", "eval_every"}


class Run(NamedTuple):
    """One run directory."""

    name: str  # of its folder, below --runs
    path: Path
    config: dict
    results: list[dict]  # evaluations, the final one last
    final: dict | None  # None: has not ended

    @property
    def recall(self) -> float:
        """Text-to-video R@1 of the method's result, the last matrix of the table."""
        return list(self.final["metrics"].values())[-1]["text_to_video"]["R@1"]


# ------------------------------------------------------------------------------------------------------- finding runs


def read_runs(folder: Path) -> list[Run]:
    """Every run below `folder`, by name; RUN/eval belongs to RUN and is none of its own."""
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    runs = [read_run(path, folder) for path in found if not (path.parent / "config.yaml").exists()]
    if not runs:
        raise InputError(f"--runs {folder}: holds no run; name the folder that --output_dir of your runs lies in")
    return runs


def read_run(path: Path, folder: Path) -> Run:
    """One run directory; InputError names what is damaged."""
    results = read_results(path)
    name = path.relative_to(folder).as_posix() if path != folder else path.resolve().name
    return Run(name, path, read_config(path), results, final_of(results))


def likeness(run: Run, *leave_out: str) -> str:
    """Two runs are alike if this is: all flags but these and those that change nothing, and the test set."""
    kept = {k: v for k, v in run.config.items() if k not in NO_DIFFERENCE and k not in leave_out}
    return json.dumps([kept, run.final["queries"], run.final["videos"]], sort_keys=True)


def group(runs: list[Run], *leave_out: str) -> list[list[Run]]:
    """Runs that differ in `leave_out` and the seed alone, together."""
    groups = defaultdict(list)
    for run in runs:
        groups[likeness(run, *leave_out)].append(run)
    return list(groups.values())


def captioner_of(path: str) -> str | None:
    """Who wrote a narration file, by its own word, else the file's name; None where it is not on this disk."""
    if not Path(path).exists():
        return None
    text, form = read_form(path)
    if form != "ours":
        return Path(path).stem
    entry = parse_json(text.lstrip().partition("\n")[0], path)
    captioner = entry.get("captioner") if isinstance(entry, dict) else None
    if not isinstance(captioner, str):
        raise InputError(f"{path}: its first line names no captioner; see `python -m narvid.narration check`")
    return Path(path).stem if captioner in ("", CAPTIONER["release"]) else captioner


def reads(run: Run, what: str) -> bool:
    """Whether the run's method sees "narration" or "titles"."""
    flags = flags_of(run.config)
    return what in METHODS[flags.method].reads(flags)


def uses(run: Run, flag: str) -> bool:
    """Whether the run's method has this flag, and computes with it under the run's other flags."""
    flags = flags_of(run.config)
    return flag in flags and flag not in METHODS[flags.method].unread(flags)


# ------------------------------------------------------------------------------------------------- data of the figures


def captioner_data(runs: list[Run]) -> tuple[dict[str, list[float]], list[float]]:
    """Figure 3 -> {captioner: R@1 of each seed}, R@1 of the same without narration; ({}, []) where there are not two.

    Of several sets of like runs the one with most captioners.
    """
    best: dict[str, list[float]] = {}
    bare: list[float] = []
    ended = [run for run in runs if run.final]
    with_narration = [run for run in ended if reads(run, "narration")]
    names = {path: captioner_of(path) for path in {run.config["narrations"] for run in with_narration}}
    for alike in group([run for run in with_narration if names[run.config["narrations"]]], "narrations"):
        found = defaultdict(list)
        for run in alike:
            found[names[run.config["narrations"]]].append(run.recall)
        if len(found) > max(1, len(best)):
            best = dict(found)
            like = likeness(alike[0], "narrations", "modules")
            bare = [run.recall for run in ended if not reads(run, "narration")
                    and likeness(run, "narrations", "modules") == like]
    return best, bare


def sweep_data(runs: list[Run], flag: str) -> list[tuple[dict, dict[float, list[float]]]]:
    """Figure 7 -> lines of (config, {value of the flag: R@1 of each seed}), each over two values or more."""
    lines = []
    for alike in group([run for run in runs if run.final and uses(run, flag)], flag):
        found = defaultdict(list)
        for run in alike:
            found[float(run.config[flag])].append(run.recall)
        if len(found) > 1:
            lines.append((alike[0].config, dict(sorted(found.items()))))
    return lines


def load_similarity(run: Run) -> dict[str, np.ndarray] | None:
    """The run's two matrices (B, V) and video_of_query (B,); None where it has not stored both."""
    path = next((path for path in (run.path / "similarity.npz", run.path / "eval" / "similarity.npz")
                 if path.exists()), None)
    if path is None:
        return None
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in ("S_qv", "S_qn", "video_of_query") if name in stored}
    except Exception as error:  # zip, zlib and numpy each raise their own
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); delete it and evaluate again") from error
    return arrays if len(arrays) == 3 else None


LOGGED_STEP = r"^(?:\d\d:\d\d:\d\d )?epoch (\d+) step (\d+)/(\d+) (loss .*?) lr "  # the time is missing in old logs


def curve_data(run: Run) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, float]]]:
    """log.txt and results.jsonl -> {"loss" and its parts: [(step, value)]}, [(step, R@1 of the choosing split)]."""
    path = run.path / "log.txt"
    text = read_text(path, advice=ADVICE) if path.exists() else ""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    steps = 0
    for epoch, step, total, parts in re.findall(LOGGED_STEP, text, re.MULTILINE):
        steps = int(total)
        at, words = (int(epoch) - 1) * steps + int(step), parts.split()
        for name, value in zip(words[::2], words[1::2]):
            values[name][at] = float(value)  # steps run again after a resume: the last time counts
    chosen = [(x["epoch"] * steps + x["step"], list(x["metrics"].values())[-1]["text_to_video"]["R@1"])
              for x in run.results if "step" in x and not x.get("final")]
    if len(values) == 2:  # the loss and its only part
        del values["loss"]
    return {name: sorted(line.items()) for name, line in values.items()}, chosen if steps else []


# ------------------------------------------------------------------------------------------------------------- writing


def write(figure, out: Path, name: str) -> None:
    """PDF and PNG, whole or not at all."""
    for kind in ("pdf", "png"):
        with writing(out / f"{name}.{kind}", binary=True) as file:
            figure.savefig(file, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        figure.set_layout_engine("none")  # it has its layout
    print(f"{out / name}.pdf, .png")


def draw_one_run(plt, run: Run, out: Path) -> None:
    """figure6, heatmap and curves of a run, or what is missing for them."""
    name = run.name.replace("/", "_")
    arrays = load_similarity(run)
    if arrays:
        write(draw_distributions(plt, arrays), out, f"figure6_{name}")
        write(draw_heatmap(plt, arrays), out, f"heatmap_{name}")
    elif reads(run, "narration"):
        print(f"not drawn: figure6_{name}, heatmap_{name}: no similarity.npz with S_qv and S_qn; make it:\n"
              f"  python main_task_retrieval.py --data_dir {run.config['data_dir']} --frames {run.config['frames']} "
              f"--narrations {run.config['narrations']} {_speech(run)}--eval_only --checkpoint {run.path / 'best.pt'} "
              f"--save_similarity --output_dir {run.path / 'eval'}")
    losses, chosen = curve_data(run)
    if losses:
        write(draw_curves(plt, losses, chosen, run.config["select_on"]), out, f"curves_{name}")
    elif not run.config.get("eval_only"):
        print(f"not drawn: curves_{name}: log.txt has no line of a step; train with a smaller --log_every than "
              f"{run.config['log_every']}")
    plt.close("all")


def _speech(run: Run) -> str:
    return f"--speech {run.config['speech']} " if run.config.get("speech") else ""


def draw_comparisons(plt, runs: list[Run], out: Path) -> None:
    """figure3 and figure7 over all runs, or what is missing for them."""
    base = next((str(run.config["config"]) for run in runs if run.final and run.config.get("config")), "PRESET.yaml")
    command = f"  python main_task_retrieval.py --config {base}"
    found, bare = captioner_data(runs)
    if found:
        write(draw_captioners(plt, found, bare), out, "figure3")
    else:
        print("not drawn: figure3: no two runs with narrations of different captioners and else the same flags; make "
              f"one:\n{command} --narrations OTHER.jsonl --output_dir RUNS/captioner_other")
    sweeps = {flag: lines for flag in ("lam", "eta") if (lines := sweep_data(runs, flag))}
    if sweeps:
        write(draw_sweeps(plt, sweeps, NO_DIFFERENCE), out, "figure7")
    for flag in ("lam", "eta"):
        if flag not in sweeps:
            print(f"not drawn: figure7, panel {flag}: no two runs that differ in --{flag} alone; make one:\n"
                  f"{command} --{flag} VALUE --output_dir RUNS/{flag}_VALUE")
    plt.close("all")


def main(argv: list[str] | None = None) -> None:
    """Draw what can be drawn, say what cannot."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=WithDefaults)
    parser.add_argument("--runs", type=Path, required=True, help="folder with run directories")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--run", nargs="+", metavar="NAME", help="figure6, curves and heatmap of these runs only [all]")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    names = [run.name for run in runs]
    if unknown := [name for name in args.run or () if name not in names]:
        raise InputError(f"--run {unknown[0]}: {args.runs} has {', '.join(names)}")
    plt = pyplot()
    draw_comparisons(plt, runs, args.out)
    for run in runs:
        if args.run is None or run.name in args.run:
            draw_one_run(plt, run, args.out)

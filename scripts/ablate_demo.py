"""Tables 3, 4 and 11 of the paper on a corpus of the demo's generator: rows x seeds, each a run of its own, one table.

  bash scripts/ablate_demo.sh                                       # makes corpora and towers first
  python scripts/ablate_demo.py --seeds 1 2 3 --steps 60            # where they are there
  python scripts/ablate_demo.py --on val --only cvh --seeds 1 --out runs/ablate_val/rate --clip_lr 1e-4

Flags that are not listed below go to main_task_retrieval.py, for all rows. Runs that have ended are not run again.
Here: which rows there are, in which order they run, the table. Not here: training (main_task_retrieval.py), reading
ranks (compare_runs.py), statistics (narvid/metrics.py).
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from narvid import InputError
from narvid.files import read_lines, write_text, writing
from narvid.flags import command, count, positive
from narvid.model import MODULES
from narvid.progress import tqdm
from narvid.run.run_dir import RunDir, load_checkpoint
from narvid.run import settings
from narvid.report import launching
from narvid.report.comparison import difference, read_side, spread
from narvid.report.launching import unfinished
from narvid.report.runs import read_ranks

LADDER = {name: ["--modules", *MODULES[:n]] for n, name in enumerate(("frames", "nm", "cmi", "qaf"))}
ROWS = LADDER | {  # run -> its flags beyond the preset, which switches all four modules on
    "cvh": [], "none": ["--filter", "none"],
    "top3": ["--filter", "topk", "--filter_k", "3"], "top4": ["--filter", "topk", "--filter_k", "4"],
    "nucleus0.3": ["--filter_p", "0.3"], "nucleus0.4": ["--filter_p", "0.4"], "hard_nce": ["--hard_loss", "nce"],
}
SECONDS_A_RUN = 80  # of one core, 60 steps and 8,000 test queries (LOG.md)
TABLES = {  # title -> (row, run, the paper's R@1 on MSR-VTT)
    "Table 3: modules": [
        ("frames alone", "frames", 44.5), ("+ NM", "nm", 48.6), ("+ CMI", "cmi", 49.5), ("+ QAF", "qaf", 50.4),
        ("+ CVH", "cvh", 51.0)],
    "Table 4: filters, all modules on": [
        ("none", "none", 48.1), ("top 3", "top3", 50.3), ("top 4", "top4", 50.2), ("nucleus 0.3", "nucleus0.3", 50.3),
        ("nucleus 0.4", "nucleus0.4", 51.0), ("nucleus, the preset's p", "cvh", None)],
    "Table 11: losses, all else on": [
        ("NCE", "qaf", 50.4), ("NCE + hard-negative NCE (Eq. 12)", "hard_nce", 50.9), ("NCE + CVH", "cvh", 51.0)],
}

# ---------------------------------------------------------------------------------------------------------- the runs


def export_towers(run: Path, target: Path) -> None:
    """The towers of a finished run as a bare state dict, which --clip_pretrained takes."""
    if target.is_file():
        return
    if not (run / "best.pt").is_file():
        raise InputError(f"{run / 'best.pt'}: the rows' common towers are not there; `bash scripts/ablate_demo.sh` "
                         "trains them")
    model = load_checkpoint(run / "best.pt")["model"]
    with writing(target, binary=True) as file:
        torch.save({key.removeprefix("clip."): value for key, value in model.items() if key.startswith("clip.")}, file)


def take_pairs(corpus: Path, folder: Path, *, pairs: int, on: str) -> None:
    """{train,test}.jsonl in `folder`: `pairs` training pairs, evenly taken, and the pairs of split `on` as test.

    One epoch over them is the wanted number of steps. Choices are made with on = "val": then nothing can read test.
    """
    advice = "`bash scripts/ablate_demo.sh` makes the corpus"
    splits = {name: read_lines(corpus / f"{name}.jsonl", advice=advice) for name in ("train", on)}
    every = splits["train"]
    if pairs > len(every):
        raise InputError(f"{corpus / 'train.jsonl'}: {len(every)} pairs, the steps take {pairs}; lower --steps or "
                         "--batch_size, or make a larger corpus")
    lines = {"train": [every[i * len(every) // pairs] for i in range(pairs)], "test": splits[on]}
    for name, chosen in lines.items():
        write_text(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in chosen))


def train_all(runs: dict[str, list[str]], *, jobs: int, threads: int) -> None:
    """Every run that has not ended, `jobs` at a time; says how long it will take once the first one has ended."""
    todo, start, took = unfinished(runs), time.monotonic(), []
    minutes = len(todo) * SECONDS_A_RUN / jobs / 60
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them ended; {len(todo)} to do, {jobs} at a time with "
          f"{threads} thread(s) each: about {minutes:.0f} minutes on the machine of LOG.md", flush=True)

    def ended(run: launching.Ended) -> None:
        if run.said:
            raise InputError(f"{run.name}: the run failed: {run.said}")
        if not took:
            took.append(time.monotonic() - start)
            tqdm.write(f"{run.name} took {took[0]:.0f} s: about {took[0] * len(todo) / jobs / 60:.0f} minutes for all")

    launching.train_all(todo, [launching.Place(threads=threads)] * jobs, ended=ended)


# --------------------------------------------------------------------------------------------------------- the table


def table_of(title: str, rows: list[tuple], runs_of: dict[str, list[Path]], samples: int) -> list[str]:
    """One table in markdown: mean and deviation over seeds, and what a row gains on the one above and on the first."""
    columns = ("row", "R@1", "R@5", "R@10", "MdR", "S_qv R@1", "S_qn R@1", "kept", "R@1 - row above [95 %], p",
               "R@1 - first row [95 %], p", "paper, MSR-VTT R@1")
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    hits = []  # (seeds, B) of each row so far: 100 where the rank is 1
    for name, run, published in rows:
        pairs, ranks, _ = read_side(runs_of[run], None)
        video = np.array([video for video, _ in pairs])
        hits.append(100.0 * (ranks <= 1))
        cells = [spread(100.0 * (ranks <= k)).strip() for k in (1, 5, 10)]
        cells += [f"{np.mean(np.median(ranks, axis=1)):.4g}", *of_views(runs_of[run])]
        for other in (hits[-2:-1], hits[:1] if len(hits) > 2 else []):
            cells.append(difference(other[0], hits[-1], video, samples) if other else "")
        lines.append(f"| {' | '.join([name, *cells, '' if published is None else f'{published:.1f}'])} |")
    return lines


def of_views(runs: list[Path]) -> list[str]:
    """R@1 of each view alone, and the mean frames and sentences that the filter keeps, over the seeds of a row."""
    results = [RunDir(run, {}, writes=False).final_result() for run in runs]
    cells = []
    for view in ("S_qv", "S_qn"):
        seen = [result["metrics"][view]["text_to_video"]["R@1"] for result in results if view in result["metrics"]]
        cells.append(f"{np.mean(seen):.1f}" if seen else "")
    kept = [list(result["frames_kept"].values()) for result in results if "frames_kept" in result]
    return [*cells, " / ".join(f"{mean:.2f}" for mean in np.mean(kept, axis=0)) if kept else ""]


def report(runs_of: dict[str, list[Path]], args: argparse.Namespace) -> str:
    """All tables whose rows have been run, with what they rest on."""
    first = next(iter(runs_of.values()))
    videos = [video for video, _ in read_ranks(first[0], None)[0]]
    about = (f"Split {args.on}: {len(videos):,} queries, {len(set(videos))} videos (chance: R@1 "
             f"{100 / len(set(videos)):.2f}); {len(args.seeds)} seed(s), {args.steps} steps, preset {args.config}"
             + (f" with {' '.join(args.more)}" if args.more else "") + ". Text-to-video, S_fusion (frames alone: S_qv),"
             " mean and standard deviation over seeds. Intervals: paired bootstrap over videos and seeds. Kept: frames "
             "and sentences of a video that the filter keeps.")
    lines = [f"# Ablations on {args.corpus}", "", about, ""]
    shown = set()
    for title, rows in TABLES.items():
        if all(run in runs_of for _, run, _ in rows):
            lines += [*table_of(title, rows, runs_of, args.samples), ""]
            shown |= {run for _, run, _ in rows}
    for name, runs in runs_of.items():
        if name not in shown:  # of a table that is not complete
            lines += [f"{name}: R@1 {spread(100.0 * (read_side(runs, None)[1] <= 1)).strip()}", ""]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Our flags; those of the trainer, unchecked, in `more`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="configs/ablate_demo.yaml", help="preset of all rows")
    parser.add_argument("--corpus", type=Path, default=Path("demo_ablate"), help="prepared, with frames and narrations")
    parser.add_argument("--towers", type=Path, default=Path("runs/ablate/towers"), help="the run that trained them")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs and ablation.md")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="these rows alone")
    parser.add_argument("--seeds", type=count, nargs="+", default=[1, 2, 3], help="order, dropout, new weights")
    parser.add_argument("--steps", type=positive, default=60, help="steps of each run")
    parser.add_argument("--on", choices=["test", "val"], default="test", help="split that is evaluated; val to choose")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--threads", type=positive, default=1, help="of each run")
    parser.add_argument("--samples", type=positive, default=10_000, help="how often the bootstrap draws")
    args, args.more = parser.parse_known_args(argv)
    return args


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, print the tables, write them to ablation.md."""
    args = parse_args(argv)
    towers, data = args.towers / "towers.pt", args.out / f"pairs_{args.on}_{args.steps}"
    export_towers(args.towers, towers)
    common = ["--config", args.config, *args.more, "--data_dir", str(data), "--frames", str(args.corpus / "frames"),
              "--narrations", str(args.corpus / "narrations.jsonl"), "--clip_pretrained", str(towers),
              "--select_on", "last", "--resume", "auto"]
    batch_size = settings.parse_args([*common, "--output_dir", str(args.out)]).batch_size
    take_pairs(args.corpus, data, pairs=args.steps * batch_size, on=args.on)
    runs_of = {name: [args.out / f"{name}_seed{seed}" for seed in args.seeds] for name in args.only}
    runs = {f"{name}, seed {seed}": [*common, *ROWS[name], "--seed", str(seed), "--output_dir", str(runs_of[name][i])]
            for i, seed in enumerate(args.seeds) for name in args.only}  # all rows of a seed, then the next one's
    train_all(runs, jobs=args.jobs, threads=args.threads)
    text = report(runs_of, args)
    print(text)
    write_text(args.out / "ablation.md", text)


if __name__ == "__main__":
    command(main)

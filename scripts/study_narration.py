"""When do filtering and narration pay? Rows x captioners x queries x seeds on the demo's generator; a table, a figure.

  bash scripts/study_narration.sh                            # makes corpora and towers first
  python scripts/study_narration.py --seeds 1 --errors 0 50  # where they are there

Varied are the share of a video's events that a query speaks of and the share of sentences about nothing shown; rows are
filters, with and without narration. Runs that have ended are not run again. Here: which cells there are, the report.
Not here: the runs and their towers (scripts/ablate_demo.py), the generator (make_demo_corpus.py).
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from narvid.files import write_text, writing
from narvid.flags import Parser, command, count, positive
from narvid.report.comparison import read_side, spread
from narvid.run import settings
from scripts import ablate_demo

SHARES = {"1of6": 14, "1of3": 8, "2of3": 8}  # corpus -> frames of a video, all of which are read
WITHOUT = None  # the captioner of a row that reads no narration
FILTERS = {"none": ["--filter", "none"], "p0.4": ["--filter_p", "0.4"], "p0.8": ["--filter_p", "0.8"],
           "p0.999": ["--filter_p", "0.999"]}
TINY = ["--batch_size", "8", "--max_words", "16"]


def cells_of(args: argparse.Namespace) -> dict[str, tuple[str, int | None, str]]:
    """Name -> (corpus, percent of wrong sentences or WITHOUT, filter); one without narration has no captioner."""
    return {f"{corpus}_{'video' if error is WITHOUT else error}_{name}": (corpus, error, name)
            for corpus in args.shares for error in (WITHOUT, *args.errors) for name in args.filters}


def flags_of(args: argparse.Namespace, cell: tuple[str, int | None, str], towers: Path) -> list[str]:
    """The trainer's flags of one cell, without seed and folder."""
    corpus, error, name = cell
    folder = args.corpora / corpus
    flags = ["--config", args.config, *(TINY if args.tiny else []), "--max_frames", str(SHARES[corpus]), *args.more,
             "--data_dir", str(args.out / f"pairs_{corpus}_{args.steps}"), "--frames", str(folder / "frames"),
             "--narrations", str(folder / f"narrations_{0 if error is WITHOUT else error}.jsonl"),
             "--clip_pretrained", str(towers), "--select_on", "last", "--resume", "auto", *FILTERS[name]]
    return flags + (["--modules", "QAF"] if error is WITHOUT else [])  # the filter alone, on frames


def table(args: argparse.Namespace, runs_of: dict[str, list[Path]]) -> tuple[list[str], dict[str, float]]:
    """Text-to-video R@1 of every cell in markdown, mean and deviation over seeds; and the means alone."""
    lines = [f"| a query speaks of | narration | {' | '.join(args.filters)} |", "|---" * (2 + len(args.filters)) + "|"]
    means = {}
    for corpus in args.shares:
        for error in (WITHOUT, *args.errors):
            who = "none" if error is WITHOUT else f"{error} % of the sentences wrong"
            row = []
            for name in args.filters:
                cell = f"{corpus}_{'video' if error is WITHOUT else error}_{name}"
                hits = 100.0 * (read_side(runs_of[cell], None)[1] <= 1)
                means[cell] = float(np.mean(hits))
                row.append(spread(hits).strip())
            lines.append(f"| {corpus.replace('of', ' of ')} | {who} | {' | '.join(row)} |")
    return lines, means


def draw(args: argparse.Namespace, means: dict[str, float], path: Path) -> None:
    """A panel a corpus: R@1 over the filters, a line a captioner."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(args.shares), figsize=(4 * len(args.shares), 3.4), squeeze=False)
    for axis, corpus in zip(axes[0], args.shares):
        for error in (WITHOUT, *args.errors):
            values = [means[f"{corpus}_{'video' if error is WITHOUT else error}_{name}"] for name in args.filters]
            axis.plot(args.filters, values, marker="o",
                      label="no narration" if error is WITHOUT else f"{error} % wrong")
        axis.set_title(f"a query speaks of {corpus.replace('of', ' of ')} events", fontsize=10)
        axis.set_xlabel("filter")
    axes[0][0].set_ylabel("text-to-video R@1")
    axes[0][0].legend(fontsize=8)
    with writing(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Our flags; those of the trainer, unchecked, in `more`."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="configs/ablate_demo.yaml", help="preset of all cells")
    parser.add_argument("--corpora", type=Path, default=Path("demo_study"), help="folder of the three corpora")
    parser.add_argument("--towers", type=Path, default=Path("runs/demo"), help="the run that trained them")
    parser.add_argument("--out", type=Path, help="folder of the runs and of study.md [--corpora/runs]")
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=list(SHARES), help="corpora")
    parser.add_argument("--errors", nargs="+", type=int, choices=(0, 20, 50), default=[0, 20, 50],
                        help="percent of sentences about nothing shown")
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=list(FILTERS), help="of frames and sentences")
    parser.add_argument("--seeds", type=count, nargs="+", default=[1, 2, 3], help="order, dropout, new weights")
    parser.add_argument("--steps", type=positive, default=30, help="of each run")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, of one thread each")
    parser.add_argument("--tiny", action="store_true", help="one seed and two steps, to see that it works")
    args, args.more = parser.parse_known_args(argv)
    args.out = args.out or args.corpora / "runs"
    if args.tiny:
        args.seeds, args.steps = args.seeds[:1], 2
    return args


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, print the table, write study.md and study.png."""
    args = parse_args(argv)
    towers = args.out / "towers.pt"
    ablate_demo.export_towers(args.towers, towers)
    cells = cells_of(args)
    flags = {name: flags_of(args, cell, towers) for name, cell in cells.items()}
    for name, (corpus, *_) in cells.items():
        batch_size = settings.parse_args([*flags[name], "--output_dir", str(args.out)]).batch_size
        ablate_demo.take_pairs(args.corpora / corpus, args.out / f"pairs_{corpus}_{args.steps}",
                               pairs=args.steps * batch_size, on="test")
    runs_of = {name: [args.out / f"{name}_seed{seed}" for seed in args.seeds] for name in cells}
    runs = {f"{name}, seed {seed}": [*flags[name], "--seed", str(seed), "--output_dir", str(runs_of[name][i])]
            for i, seed in enumerate(args.seeds) for name in cells}
    ablate_demo.train_all(runs, jobs=args.jobs, threads=1)
    lines, means = table(args, runs_of)
    text = "\n".join([f"Text-to-video R@1 (S_fusion; without narration S_qv), {len(args.seeds)} seed(s), {args.steps} "
                      "steps:", "", *lines, ""])
    print(text)
    write_text(args.out / "study.md", text)
    draw(args, means, args.out / "study.png")


if __name__ == "__main__":
    command(main)

"""Is one run better than another, or is it luck? Seeds with mean and spread, paired bootstrap on the same queries.

  python scripts/compare_runs.py --a runs/base_seed1 runs/base_seed2 --b runs/new_seed1 runs/new_seed2
  python scripts/compare_runs.py --a runs/base --b runs/new --matrix S_qv

Reads ranks.csv, which every final evaluation writes: a line a query, with the rank of its video in each matrix.
Text-to-video only. Here: files and the table. Not here: the statistics (narvid/metrics.py).
"""

import argparse
from pathlib import Path

import numpy as np

from narvid import InputError
from narvid.flags import Parser, WithDefaults
from narvid.metrics import paired_bootstrap
from narvid.report.runs import read_ranks


def read_side(runs: list[Path], matrix: str | None) -> tuple[list[tuple[str, str]], np.ndarray, str]:
    """The runs of one side -> their common pairs, ranks (runs, B), what they are of."""
    sides = [read_ranks(run, matrix) for run in runs]
    for run, side in zip(runs, sides):
        if side[0] != sides[0][0]:
            raise InputError(f"{run / 'ranks.csv'}: other queries than in {runs[0] / 'ranks.csv'}; compare runs of one "
                             "test split")
    names = dict.fromkeys(side[2] for side in sides)
    return sides[0][0], np.stack([side[1] for side in sides]), "/".join(names)


def samples(text: str) -> int:
    """A whole number from 1 to a million: more would say nothing more."""
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 0 < int(text) <= 10 ** 6):
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a whole number from 1 to 1000000")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Print both sides and their difference."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=WithDefaults)
    parser.add_argument("--a", type=Path, nargs="+", required=True, metavar="RUN", help="one or several seeds")
    parser.add_argument("--b", type=Path, nargs="+", required=True, metavar="RUN", help="the same of the other side")
    parser.add_argument("--matrix", help="S_qv, S_qn, S_sum, S_fusion ... [the last one of each run]")
    parser.add_argument("--samples", type=samples, default=10_000, help="draws of the bootstrap, at most a million")
    args = parser.parse_args(argv)
    pairs, ranks_a, matrix_a = read_side(args.a, args.matrix)
    pairs_b, ranks_b, matrix_b = read_side(args.b, args.matrix)
    if pairs != pairs_b:
        raise InputError(f"{args.b[0] / 'ranks.csv'}: other queries than in {args.a[0] / 'ranks.csv'}; a paired "
                         "comparison needs the same test split")
    video = np.array([video for video, _ in pairs])
    print(f"{len(pairs)} queries, {len(set(video))} videos; A: {len(ranks_a)} run(s), {matrix_a}; "
          f"B: {len(ranks_b)} run(s), {matrix_b}")
    print("text-to-video |          A |          B |  B - A   95 % interval      p")
    for k in (1, 5, 10):
        a, b = 100.0 * (ranks_a <= k), 100.0 * (ranks_b <= k)
        found = paired_bootstrap(a, b, video, samples=args.samples)
        print(f"R@{k:<11}| {spread(a)} | {spread(b)} | {found.mean:+6.2f}  {found.low:+6.2f} {found.high:+6.2f}  "
              f"{found.p:7.4f}")
    if 1 in (len(ranks_a), len(ranks_b)):
        print("one run on a side: the interval holds the luck of the test videos, not that of the training seed")


def spread(values: np.ndarray) -> str:
    """Mean over seeds and their standard deviation. (seeds, B) -> text."""
    means = values.mean(axis=1)
    return f"{means.mean():5.1f}" + (f" ±{means.std(ddof=1):4.1f}" if len(means) > 1 else " " * 6)


def difference(a: np.ndarray, b: np.ndarray, video: np.ndarray, n: int) -> str:
    """The second minus the first, 95 % interval and p, as a table's cell. (seeds, B) twice, (B,) -> text."""
    found = paired_bootstrap(a, b, video, samples=n)
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}], {found.p:.2g}"

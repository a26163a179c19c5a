"""Does a search say "nothing here fits well" when it should, and does it rank as evaluation does?

  python scripts/judge_search.py INDEX --real demo/test.jsonl --unrelated FILE [--ranks runs/demo/ranks.csv]

Three kinds of queries: real ones, unrelated sentences (one a line), and words of random letters. How high the best
answer stands (narvid/search/statistics.py) is measured for all; on the first half of each kind it is looked up which
share of nonsense the level may leave above itself, on the second half how many of each kind are said not to fit: with
that level, and with the level that the index holds. --ranks: of a run on the same videos; counted is for how many
queries the video's rank in the search, among those videos, is the rank in evaluation.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from narvid.files import read_csv, read_json_lines, read_lines
from narvid.flags import Parser, command, positive
from narvid.search.__main__ import open_engine
from narvid.search.statistics import nonsense
from narvid.search.store import Store

FLAGGED = 0.05  # of real queries that may be said not to fit, on the half on which the level is chosen


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("index", type=Path, metavar="INDEX", help="of narvid-search index")
    add("--real", type=Path, required=True, metavar="FILE", help="JSON lines of {\"video\", \"query\"}")
    add("--unrelated", type=Path, required=True, metavar="FILE", help="sentences of other things, one a line")
    add("--ranks", type=Path, metavar="FILE", help="ranks.csv of a run that was evaluated on the index's videos")
    add("--queries", type=positive, default=250, help="at most so many of each kind [250]")
    add("--checkpoint", metavar="RUN", help="where the index's model lies by now")
    return parser.parse_args(argv)


def told_apart(heights: dict[str, np.ndarray], level: float) -> str:
    """The share of each kind that is said not to fit."""
    return ", ".join(f"{name} {np.mean(values < level):.1%}" for name, values in heights.items())


def main(argv: list[str] | None = None) -> None:
    """Print the shares."""
    args = parse_args(argv)
    real = [entry for _, entry in read_json_lines(args.real)][:args.queries]
    queries = {"real": [entry["query"] for entry in real],
               "unrelated": [line for line in read_lines(args.unrelated) if line.strip()][:args.queries],
               "gibberish": [query for seed in range(1, 5) for query in nonsense(seed)][:args.queries]}
    with Store(args.index, read_only=True) as store:
        engine = open_engine(store, args.checkpoint)
        heights = {name: np.array([answers.height for answers in engine.rows(texts)], float)
                   for name, texts in queries.items()}
        first, second = ({name: values[start::2] for name, values in heights.items()} for start in (0, 1))
        chosen = np.quantile(first["real"], FLAGGED)
        share = np.mean(first["gibberish"] >= chosen)
        print(f"{store.count()} windows; queries: " + ", ".join(f"{len(v)} {name}" for name, v in queries.items()))
        print(f"first half: a level that {FLAGGED:.0%} of the real ones do not reach is {chosen:.2f}; {share:.1%} of "
              "gibberish reaches it")
        print(f"second half, said not to fit with that level: {told_apart(second, chosen)}")
        if (level := store.fact("level")) is not None:
            print(f"second half, with the index's own level {level:.2f}: {told_apart(second, level)}")
        if args.ranks:
            print_ranks(engine, real, args.ranks)


def print_ranks(engine, real: list[dict], path: Path) -> None:
    """How many queries rank their video as ranks.csv says (column S_fusion), among the videos of the index."""
    rank_of = {(row["video"], row["query"]): int(row["S_fusion"]) for _, row in read_csv(
        path, ["video", "query", "S_fusion"])}
    known = [entry for entry in real if (entry["video"], entry["query"]) in rank_of]
    same, apart = 0, []
    for entry, answers in zip(known, engine.search([e["query"] for e in known], top=10**6, exact=True)):
        rank = next(answer.rank for answer in answers if Path(answer.path).stem == entry["video"])
        expected = rank_of[entry["video"], entry["query"]]
        same += rank == expected
        apart.append(abs(rank - expected))
    print(f"{same} of {len(known)} queries rank their video as evaluation does; the ranks of the others differ by up "
          f"to {max(apart, default=0)}, {np.mean(apart):.2f} in the mean of all")


if __name__ == "__main__":
    command(main)

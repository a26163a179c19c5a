"""When do filtering and narration pay? Cells x seeds on the demo's generator; three tables, a figure.

  bash scripts/study_narration.sh                            # makes corpora and towers first
  python scripts/study_narration.py --seeds 1 --errors 0 50  # where they are there

A cell is a share of a video's events that a query speaks of, a narration (no information at all, or a share of
sentences about nothing shown) and a filter. The towers are common to all and frozen, so a run trains heads on cached
features; many runs share a process, for starting one takes as long as half a run. Runs that have ended are not run
again. Here: which cells there are, their queries, the report. Not here: towers and training pairs (ablate_demo.py), the
generator (make_demo_corpus.py).
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from narvid import InputError
from narvid.data.narrations import load_narrations, write_narrations
from narvid.files import read_json, read_json_lines, read_text, remove, write_json_lines, write_text, writing
from narvid.flags import Parser, command, count, positive
from narvid.progress import tqdm
from narvid.report.comparison import difference, read_side, spread
from narvid.report.launching import unfinished
from narvid.report.runs import read_ranks
from narvid.run import settings
from narvid.run.run_dir import RunDir
from scripts import ablate_demo, make_demo_corpus

SHARES = {"1of6": 14, "1of3": 8, "2of3": 8}  # corpus -> frames of a video, all of which are read
BLANK = "blank"  # the narration that says the same of every frame: same model, same heads, no information
FILTERS = {"none": ["--filter", "none"], "p0.4": ["--filter_p", "0.4"], "p0.8": ["--filter_p", "0.8"],
           "p0.999": ["--filter_p", "0.999"], "mean": ["--modules", "NM", "CMI", "CVH"]}  # mean: all frames alike
TINY = ["--batch_size", "8", "--max_words", "16"]
SECONDS_A_RUN = 12  # of one core (LOG.md)

Cell = tuple[str, str, str]  # corpus, narration, filter

# ---------------------------------------------------------------------------------------------------------- the runs


def flags_of(args: argparse.Namespace, cell: Cell, towers: Path) -> list[str]:
    """The trainer's flags of one cell, without seed and folder."""
    corpus, narration, name = cell
    folder = args.corpora / corpus
    return ["--config", args.config, *(TINY if args.tiny else []), "--max_frames", str(SHARES[corpus]),
            "--data_dir", str(args.out / f"pairs_{corpus}_{args.steps}"), "--frames", str(folder / "frames"),
            "--narrations", str(folder / f"narrations_{narration}.jsonl"), "--clip_pretrained", str(towers),
            "--no-cache_frames", "--freeze_towers", "--feature_cache", str(args.out / "features"),
            "--select_on", "last", "--resume", "auto", *FILTERS[name], *args.more]


def make_blank(corpus: Path) -> None:
    """narrations_blank.jsonl: as many sentences, all the same."""
    target = corpus / f"narrations_{BLANK}.jsonl"
    if not target.is_file():
        said = load_narrations(corpus / "narrations_0.jsonl")
        write_narrations(target, ((video, of._replace(sentences=["a video"] * len(of.sentences)))
                                  for video, of in said.items()))


def take_queries(corpus: Path, folder: Path) -> None:
    """Write the test queries that no other test video fits to {folder}/test.jsonl.

    The fewer events a query names, the more of them there are: R@1 would say how many.
    """
    made = read_json(corpus / "generator.json", dict)
    truth = make_demo_corpus.read_truth(corpus / "truth.jsonl")
    lines = [line for _, line in read_json_lines(corpus / "test.jsonl")]
    videos = list(dict.fromkeys(line["video"] for line in lines))
    meant = [query for video in videos for query in make_demo_corpus.make_queries(
        made["seed"], int(video.removeprefix("video")), truth[video],
        mentioned=made.get("mentioned", make_demo_corpus.MENTIONED))]
    doubtful = make_demo_corpus.ambiguous([mentions for _, mentions in meant], [truth[video] for video in videos])
    if [text for text, _ in meant] != [line["query"] for line in lines]:
        raise InputError(f"{corpus / 'test.jsonl'}: holds other queries than the generator makes; delete {corpus} and "
                         "make it anew")
    write_json_lines(folder / "test.jsonl", [line for line, bad in zip(lines, doubtful) if not bad])


def train(job: tuple[str, list[str]]) -> tuple[str, float, str | None]:
    """One run in a process of the pool -> its name, seconds, and why it failed (None: it did not)."""
    import main_task_retrieval  # here, so that the parent has no trainer

    name, argv = job
    start, said = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main_task_retrieval.main(argv)
    except SystemExit as left:
        if isinstance(left.code, int) and left.code > 128:  # a signal, and the run has saved: this process ends too
            raise
        lines = (said.getvalue() + (left.code if isinstance(left.code, str) else "")).strip().splitlines()
        return name, time.monotonic() - start, lines[-1].removeprefix("error: ")
    for weights in ("best.pt", "last.pt"):  # 78 MB a run that nobody reads
        remove(Path(settings.parse_args(argv).output_dir, weights))
    return name, time.monotonic() - start, None


def train_all(runs: dict[str, list[str]], jobs: int) -> None:
    """Every run that has not ended, `jobs` at a time, one thread each; says beforehand and on the way how long."""
    todo = unfinished(runs)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them ended; {len(todo)} to do, {jobs} at a time: about "
          f"{len(todo) * SECONDS_A_RUN / jobs / 60:.0f} minutes on the machine of LOG.md", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    before, start = signal.signal(signal.SIGTERM, signal.default_int_handler), time.monotonic()
    try:
        # What leaves this block early, an error or Ctrl-C, ends the processes by SIGTERM; the trainer saves first.
        with multiprocessing.get_context("spawn").Pool(min(jobs, max(len(todo), 1))) as pool:
            ended = pool.imap_unordered(train, todo.items())
            for number, (name, _, failed) in enumerate(tqdm(ended, total=len(todo), desc="runs", unit="run"), 1):
                if failed:
                    raise InputError(f"{name}: the run failed: {failed}")
                if number in (jobs, 4 * jobs):  # the first ones also fill the cache
                    minutes = (time.monotonic() - start) / number * (len(todo) - number) / 60
                    tqdm.write(f"{name}: run {number} of {len(todo)} has ended; about {minutes:.0f} minutes are left")
            pool.close()
            pool.join()
    finally:
        signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------------------------- the report


def say(narration: str) -> str:
    """A narration in words."""
    return "none" if narration == BLANK else f"{narration} % wrong"


def hits_of(runs: list[Path]) -> np.ndarray:
    """(seeds, B): 100 where the right video is first."""
    return 100.0 * (read_side(runs, None)[1] <= 1)


def table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    head = ["a query speaks of", "narration", *columns]
    return [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]


def report(args: argparse.Namespace, runs_of: dict[Cell, list[Path]]) -> str:
    """R@1 of every cell; what each filter gains on none, what each narration gains on a blank one."""
    rates, of_filters, of_narrations, told = [], [], [], []
    for corpus in args.shares:
        share = corpus.replace("of", " of ")
        video = np.array([video for video, _ in read_ranks(runs_of[corpus, args.narrations[0], args.filters[0]][0],
                                                           None)[0]])
        told.append(f"{share}: {len(video):,} queries, {len(set(video))} videos")
        hits = {cell: hits_of(runs) for cell, runs in runs_of.items() if cell[0] == corpus}
        for narration in args.narrations:
            row = [hits[corpus, narration, name] for name in args.filters]
            first = runs_of[corpus, narration, args.filters[0]]
            views = " / ".join(filter(None, ablate_demo.of_views(first)[:2]))
            who = [share, say(narration)]
            rates.append([*who, *(spread(of).strip() for of in row), views, *weights_of(first)])
            of_filters.append([*who, *(difference(row[0], of, video, args.samples) for of in row[1:])])
            if narration != args.narrations[0]:
                others = [hits[corpus, args.narrations[0], name] for name in args.filters]
                of_narrations.append([*who, *(difference(a, b, video, args.samples) for a, b in zip(others, row))])
        kept = {name: ablate_demo.of_views([run for narration in args.narrations
                                            for run in runs_of[corpus, narration, name]])[2] for name in args.filters}
        told[-1] += f"; kept of {SHARES[corpus]} frames / sentences: " + ", ".join(
            f"{name} {mean or 'all'}" for name, mean in kept.items())
    about = [f"{len(args.seeds)} seed(s), {args.steps} steps{''.join(' ' + word for word in args.more)}. Text-to-video,"
             " S_fusion; mean and deviation over seeds. Intervals: 95 %, paired bootstrap over videos and seeds; p.",
             "", *(f"- {line}" for line in told), ""]
    weights = ["its weight of S_qv"] if len(rates[0]) > 3 + len(args.filters) else []
    first = f"{args.filters[0]}: S_qv / S_qn"
    lines = [*about, *table("R@1", [*args.filters, first, *weights], rates)]
    if args.filters[1:]:
        lines += table(f"R@1, a filter less `{args.filters[0]}`", args.filters[1:], of_filters)
    if args.narrations[1:]:
        lines += table(f"R@1, a narration less {say(args.narrations[0])}", args.filters, of_narrations)
    return "\n".join(lines)


def weights_of(runs: list[Path]) -> list[str]:
    """What --fusion_weight val has chosen, seed by seed; [] where nothing was chosen."""
    chosen = [RunDir(run, {}, writes=False).final_result().get("fusion_weight") for run in runs]
    return [] if None in chosen else [", ".join(f"{weight:g}" for weight in chosen)]


def draw(args: argparse.Namespace, runs_of: dict[Cell, list[Path]], path: Path) -> None:
    """A panel a corpus: R@1 over the filters, a line a narration, bars of one deviation over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(args.shares), figsize=(4 * len(args.shares), 3.4), squeeze=False, sharey=True)
    for axis, corpus in zip(axes[0], args.shares):
        for narration in args.narrations:
            means = np.array([hits_of(runs_of[corpus, narration, name]).mean(axis=1) for name in args.filters])
            axis.errorbar(args.filters, means.mean(axis=1), means.std(axis=1, ddof=min(1, means.shape[1] - 1)),
                          marker="o", capsize=3, label=f"narration: {say(narration)}")
        axis.set_title(f"a query speaks of {corpus.replace('of', ' of ')} events", fontsize=10)
        axis.set_xlabel("filter")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("text-to-video R@1")
    axes[0][0].legend(fontsize=8)
    with writing(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)


# --------------------------------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Our flags; those of the trainer, unchecked, in `more`."""
    about = f"{__doc__.splitlines()[0]} Flags that are not listed here are the trainer's (main_task_retrieval.py)."
    parser = Parser(description=about, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default="configs/ablate_demo.yaml", help="preset of all cells")
    parser.add_argument("--corpora", type=Path, default=Path("demo_study"), help="folder of the three corpora")
    parser.add_argument("--towers", type=Path, help="the run that trained them [--corpora/runs/towers]")
    parser.add_argument("--out", type=Path, help="folder of the runs and of study.md [--corpora/runs]")
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=list(SHARES), help="corpora")
    parser.add_argument("--narrations", nargs="+", choices=(BLANK, "0", "20", "50"), default=[BLANK, "0", "20", "50"],
                        help="percent of sentences about nothing shown; the first is what others are compared with")
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=["none", "p0.4", "p0.8", "p0.999"],
                        help="of frames and sentences; the first is what others are compared with")
    parser.add_argument("--seeds", type=count, nargs="+", default=[1, 2, 3], help="order, dropout, new weights")
    parser.add_argument("--steps", type=positive, default=40, help="of each run")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, of one thread each")
    parser.add_argument("--samples", type=positive, default=10_000, help="of the bootstrap")
    parser.add_argument("--tiny", action="store_true", help="one seed and two steps, to see that it works")
    args, args.more = parser.parse_known_args(argv)
    args.out = args.out or args.corpora / "runs"
    args.towers = args.towers or args.corpora / "runs" / "towers"
    if args.tiny:
        args.seeds, args.steps = args.seeds[:1], 2
    return args


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, print the tables, write study.md and study.png."""
    args = parse_args(argv)
    towers = args.towers / "towers.pt"
    ablate_demo.export_towers(args.towers, towers)
    cells = [(corpus, narration, name) for corpus in args.shares for narration in args.narrations
             for name in args.filters]
    flags = {cell: flags_of(args, cell, towers) for cell in cells}
    for corpus in args.shares:
        make_blank(args.corpora / corpus)
        pairs = args.out / f"pairs_{corpus}_{args.steps}"
        write_text(pairs / "val.jsonl", read_text(args.corpora / corpus / "val.jsonl"))  # for --fusion_weight val
        some = flags[corpus, args.narrations[0], args.filters[0]]
        batch_size = settings.parse_args([*some, "--output_dir", str(args.out)]).batch_size
        ablate_demo.take_pairs(args.corpora / corpus, pairs, pairs=args.steps * batch_size, on="test")
        take_queries(args.corpora / corpus, pairs)
    runs_of = {cell: [args.out / f"{'_'.join(cell)}_seed{seed}" for seed in args.seeds] for cell in cells}
    runs = {f"{' '.join(cell)}, seed {seed}": [*flags[cell], "--seed", str(seed), "--output_dir", str(runs_of[cell][i])]
            for i, seed in enumerate(args.seeds) for cell in cells}  # all cells of a seed, then the next one's
    train_all(runs, args.jobs)
    text = report(args, runs_of)
    print(text)
    write_text(args.out / "study.md", text)
    draw(args, runs_of, args.out / "study.png")


if __name__ == "__main__":
    command(main)

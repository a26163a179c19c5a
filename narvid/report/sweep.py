"""Seeds and values of flags in one command: every combination a run, then one table and Figure 7.

  bash scripts/sweep.sh msrvtt_vitb32 --seeds 1 2 3 --set lam=0.5,0.7,0.9
  bash scripts/sweep.sh msrvtt_vitb32 --set lam=0.5,0.7 --set eta=1.0,1.8 --dry_run
  bash scripts/sweep.sh demo --set "modules=NM,NM CMI" --epochs 2              # other flags are the trainer's

Runs that have ended are kept, killed ones go on. OUT/sweep.md holds the table: mean and deviation over seeds, and the
paired bootstrap of compare_runs against the first combination; OUT/figure7 where lambda or eta vary.
Here: which runs there are, how long they take, the table. Not here: processes (launching.py), reading ranks
(comparison.py), drawing (figures.py), statistics (narvid/metrics.py).

Legend: B queries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from narvid import InputError
from narvid.files import appending, lock, read_json_lines, write_text
from narvid.flags import Parser, WithDefaults, count, positive
from narvid.progress import say
from narvid.report.comparison import difference, read_side, samples, spread
from narvid.report.drawing import draw_sweeps, pyplot
from narvid.report.figures import NO_DIFFERENCE, read_run, sweep_data, write
from narvid.report.launching import Ended, Place, gpus_here, places, train_all, unfinished
from narvid.run.run_dir import RunDir

OURS = ("seed", "output_dir", "config", "resume")  # flags that the sweep itself gives every run
JOURNAL = "sweep.jsonl"  # seconds of the runs that were begun and ended by one call
FIGURE = ("lam", "eta")

# ----------------------------------------------------------------------------------------------------- which runs


def read_setting(text: str) -> tuple[str, list[str]]:
    """FLAG=VALUE,VALUE -> the flag, its values; a value of several words is several arguments."""
    flag, equals, values = text.removeprefix("--").partition("=")
    values = [value.strip() for value in values.split(",")]
    if not (equals and re.fullmatch("[a-z_]+", flag)):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: write FLAG=VALUE,VALUE, such as lam=0.5,0.7")
    if flag in OURS:
        raise argparse.ArgumentTypeError(f"{flag}: the sweep gives it to every run itself (--seeds, --out, PRESET)")
    if twice := [value for value in values if values.count(value) > 1]:
        raise argparse.ArgumentTypeError(f"{flag}: {twice[0]!r} stands there twice")
    return flag, values


def combinations(sets: list[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Every combination of the values, the last flag's changing first -> {name of a folder: the trainer's argv}."""
    if twice := [flag for flag, _ in sets if [name for name, _ in sets].count(flag) > 1]:
        raise InputError(f"--set {twice[0]}: stands there twice; give all its values in one --set")
    found: dict[str, list[str]] = {}
    for values in itertools.product(*(values for _, values in sets)):
        pairs = [(flag, value) for (flag, _), value in zip(sets, values)]
        name = "_".join(f"{flag}_{_as_name(value)}" for flag, value in pairs) or "preset"
        if name in found:
            raise InputError(f"--set: two combinations would both be called {name}; give files other names")
        found[name] = [word for flag, value in pairs for word in _as_argv(flag, value)]
    return found


def _as_name(value: str) -> str:
    """A value as a part of a folder's name; of a path its last part."""
    return re.sub(r"[^\w.+-]+", "-", Path(value).stem if "/" in value else value) or "none"


def _as_argv(flag: str, value: str) -> list[str]:
    if value in ("true", "false"):
        return [f"--{'no-' if value == 'false' else ''}{flag}"]
    return [f"--{flag}", *value.split()]


def runs_of(args: argparse.Namespace) -> dict[str, dict[int, Path]]:
    """{combination: {seed: run folder}}."""
    return {name: {seed: args.out / f"{name}_seed{seed}" for seed in args.seeds} for name in combinations(args.set)}


def argv_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """{run: the trainer's argv}: all combinations of a seed, then the next seed's."""
    every, folders = combinations(args.set), runs_of(args)
    return {folders[name][seed].name: ["--config", str(args.preset), *args.more, *flags, "--seed", str(seed),
                                       "--output_dir", str(folders[name][seed]), "--resume", "auto"]
            for seed in args.seeds for name, flags in every.items()}


# ---------------------------------------------------------------------------------------------- how long, what is left


def seconds_of_runs(out: Path) -> dict[str, float]:
    """{run: seconds} of the journal."""
    path = out / JOURNAL
    advice = "delete it: it only serves to say how long runs take"
    found = {}
    for line, entry in read_json_lines(path, advice=advice) if path.exists() else ():
        name, seconds = entry.get("run"), entry.get("seconds")
        if not isinstance(name, str) or isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise InputError(f"{path}:{line}: is no run with its seconds; {advice}")
        found[name] = float(seconds)
    return found


def how_long(left: list[str], known: dict[str, float], jobs: int) -> str:
    """What is to be said of the time that the runs `left` will take, `jobs` at a time."""
    if not left:
        return "nothing is left to do"
    if not known:
        return f"how long the {len(left)} that are left take is not known: no run has ended here"
    of_like: dict[str, list[float]] = {}  # runs of one combination take alike
    for name, seconds in known.items():
        of_like.setdefault(name.rpartition("_seed")[0], []).append(seconds)
    mean = float(np.mean([*known.values()]))
    total = sum(float(np.mean(of_like.get(name.rpartition("_seed")[0], [mean]))) for name in left)
    return (f"at most {_duration(total / min(jobs, len(left)))} for the {len(left)} that are left: a run took "
            f"{_duration(mean)}, mean of {len(known)} that ended here")


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show_plan(args: argparse.Namespace, left: dict[str, list[str]], where: list[Place]) -> str:
    """What would run, and how long: --dry_run."""
    lines = []
    for of_seeds in runs_of(args).values():
        for run in of_seeds.values():
            state = "to do" if run.name in left else "ended"
            if run.name in left and (run / "last.pt").exists():
                state = "goes on"
            lines.append(f"{state:<8} {run}")
    place = f"{len(where[0].gpus)} GPU(s) each" if where[0].gpus else f"on the CPU, {where[0].threads} thread(s) each"
    lines.append(f"{len(lines)} runs, {len(lines) - len(left)} ended; {len(where)} at a time, {place}")
    return "\n".join([*lines, how_long([*left], seconds_of_runs(args.out), len(where))])


# -------------------------------------------------------------------------------------------------- training, the table


def train(args: argparse.Namespace, left: dict[str, list[str]], where: list[Place]) -> dict[str, str]:
    """Every run that is left -> {run: what it said} of those that failed; the others are not kept waiting by them."""
    failed: dict[str, str] = {}
    fresh = {name for name in left if not (args.out / name / "config.yaml").exists()}
    still = [*left]

    def ended(run: Ended) -> None:
        still.remove(run.name)
        if run.said:
            failed[run.name] = run.said
            say(f"{args.out / run.name}: failed: {run.said}")
            return
        if run.name in fresh:  # of the others a part of the time is not known
            with appending(args.out / JOURNAL) as file:
                file.write(json.dumps({"run": run.name, "seconds": round(run.seconds, 1)}) + "\n")
        if still:
            say(f"{args.out / run.name}: ended; {how_long(still, seconds_of_runs(args.out), len(where))}")

    train_all(left, where, ended=ended)
    return failed


def report(args: argparse.Namespace) -> str:
    """The table in markdown: a row a combination, over the seeds that have ended."""
    rows = {name: [run for run in of_seeds.values() if RunDir(run, {}, writes=False).final_result()]
            for name, of_seeds in runs_of(args).items()}
    sides = {name: read_side(runs, args.matrix) for name, runs in rows.items() if runs}
    if not sides:
        raise InputError(f"{args.out}: no run has ended; what each one said stands above and in its log.txt")
    first, (pairs, base, _) = next(iter(sides.items()))
    video = np.array([video for video, _ in pairs])
    lines = ["| flags | seeds | matrix | R@1 | R@5 | R@10 | R@1 - first row [95 %], p |", "|" + "---|" * 7]
    for name, (own_pairs, ranks, matrix) in sides.items():
        if own_pairs != pairs:
            raise InputError(f"{rows[name][0] / 'ranks.csv'}: other queries than in {rows[first][0] / 'ranks.csv'}; "
                             "compare runs of one test split")
        cells = [spread(100.0 * (ranks <= k)).strip() for k in (1, 5, 10)]
        gain = "" if name == first else difference(100.0 * (base <= 1), 100.0 * (ranks <= 1), video, args.samples)
        flags = " ".join(combinations(args.set)[name]) or "the preset's"
        lines.append(f"| {' | '.join([flags, str(len(ranks)), matrix, *cells, gain])} |")
    over = " and seeds" if len(args.seeds) > 1 else "; one seed says nothing of the luck in training"
    about = (f"Preset {' '.join([str(args.preset), *args.more])}; split test: {len(pairs):,} queries, "
             f"{len(set(video))} videos. Text-to-video, mean and standard deviation over seeds; intervals: paired "
             f"bootstrap over videos{over}. A value that is chosen from this table is chosen on test.")
    return "\n".join([f"# Sweep {args.out}", "", about, "", *lines, ""])


def draw(args: argparse.Namespace) -> None:
    """Figure 7 over lambda and eta where they vary, of this sweep's runs alone."""
    varied = [flag for flag, values in args.set if flag in FIGURE and len(values) > 1]
    paths = [run for of_seeds in runs_of(args).values() for run in of_seeds.values()]
    runs = [read_run(path, args.out) for path in paths if (path / "config.yaml").exists()] if varied else []
    sweeps = {flag: lines for flag in varied if (lines := sweep_data(runs, flag))}
    if sweeps:
        write(draw_sweeps(pyplot(), sweeps, NO_DIFFERENCE), args.out, "figure7")
    for flag in varied:
        if flag not in sweeps:
            print(f"not drawn: figure7, panel {flag}: no two values of it have ended in runs that compute with it")


# ---------------------------------------------------------------------------------------------------- the command line


def gpus(text: str) -> int | None:
    """A number of GPUs; None for all."""
    return None if text == "all" else positive(text)


def preset_path(text: str) -> Path:
    """A preset's name or file."""
    path = Path(text) if text.endswith((".yaml", ".yml")) else Path("configs", f"{text}.yaml")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no {path}; name a file of configs/, with or without .yaml")
    return path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Our flags; those of the trainer in `more`."""
    parser = Parser(prog="bash scripts/sweep.sh", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=WithDefaults,
                    epilog="Other flags are the trainer's, the same for all runs.")
    parser.add_argument("preset", metavar="PRESET", type=preset_path, help="a file of configs/")
    parser.add_argument("--seeds", type=count, nargs="+", default=[1, 2, 3], help="seeds of every combination")
    parser.add_argument("--set", type=read_setting, action="append", default=[], metavar="FLAG=VALUE,VALUE",
                        help="values of one flag of the trainer; several times: every combination; the first one is "
                             "what the others are compared with")
    parser.add_argument("--out", type=Path, help="folder of runs, table and figure [runs/sweep_PRESET]")
    parser.add_argument("--gpus_a_run", type=gpus, default=1, help="GPUs of one run, or all")
    parser.add_argument("--jobs", type=positive, help="runs at a time [one a group of GPUs; on the CPU one]")
    parser.add_argument("--matrix", help="S_qv, S_qn, S_sum, S_fusion ... [the last one of each run]")
    parser.add_argument("--samples", type=samples, default=10_000, help="draws of the bootstrap, at most a million")
    parser.add_argument("--dry_run", action="store_true", help="say what would run and how long, and leave")
    args, args.more = parser.parse_known_args(argv)
    args.seeds = [*dict.fromkeys(args.seeds)]
    args.out = args.out or Path("runs", f"sweep_{args.preset.stem}")
    given = {word.split("=")[0].removeprefix("--").removeprefix("no-") for word in args.more if word.startswith("--")}
    if own := sorted(given & {*OURS, *(flag for flag, _ in args.set)}):
        parser.error(f"--{own[0]}: the sweep gives it to every run itself (--seeds, --set, --out, PRESET)")
    if "eval_only" in given:
        parser.error("--eval_only: a sweep trains; evaluate one checkpoint with main_task_retrieval.py")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, print the table, write it, draw."""
    args = parse_args(argv)
    where = places(gpus_here(), args.gpus_a_run, args.jobs)
    left = unfinished(argv_of(args))
    print(show_plan(args, left, where), flush=True)
    if args.dry_run:
        return
    with ExitStack() as held:
        held.enter_context(lock(args.out))
        failed = train(args, left, where) if left else {}
        text = report(args)
        print(text)
        write_text(args.out / "sweep.md", text)
        draw(args)
    if failed:
        names = ", ".join(str(args.out / name) for name in failed)
        raise InputError(f"{len(failed)} of {len(left)} runs failed and are not in the table: {names}; the same "
                         "command tries them again")

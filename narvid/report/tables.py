"""The tables of the paper and of the systems it builds on, ours beside the published numbers.

python scripts/eval_tables.py runs                       (or bash scripts/eval_tables.sh)

Which runs belong to a row: report/published.py. Those of a row are averaged, but never trained ones with released
weights, epochs chosen on different splits, or different test sets. A run that was trained to the end and lacks what a
row needs is evaluated by the trainer's --eval_only into RUN/eval. Nothing else is written but RUNS/tables.md and .csv.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from narvid import InputError
from narvid.files import write_csv, write_text
from narvid.flags import Parser
from narvid.report.runs import final_of, read_config, read_results
from narvid.run.run_dir import load_checkpoint
from narvid.run.settings import DEFAULT_METHOD
from narvid.report.published import DIRECTIONS, ROOT, Row, differences, last_name, meaning, read_published


@dataclass
class Run:
    """One run directory."""

    path: Path
    config: dict
    result: dict | None  # the final evaluation
    why: str = ""  # there is none, or not all of it

    @property
    def group(self) -> tuple:
        """Runs that differ here are not averaged: the way, what chose the epoch, the test set."""
        way = "released" if self.config["eval_only"] and self.config["checkpoint"] else "trained"
        return way, self.result["select_on"], self.result["queries"], self.result["videos"]


# ------------------------------------------------------------------------------------------------------------ the runs


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Run directories one or two levels below `folder`, and sentences about what is none."""
    runs, said = [], []
    found = sorted({path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/config.yaml")})
    for path in found:
        if (path.parent / "config.yaml").exists():
            continue  # RUN/eval
        try:
            config = {"method": DEFAULT_METHOD, "eval_only": False, "checkpoint": None} | read_config(path)
            runs.append(Run(path, config, final_result(path)))
        except InputError as error:
            said.append(f"{path}: left out, it cannot be read ({error})")
    return with_evaluations(runs, said), said


def final_result(path: Path) -> dict | None:
    """The final evaluation in a run directory; InputError where the file is damaged."""
    return final_of(read_results(path))


def with_evaluations(runs: list[Run], said: list[str]) -> list[Run]:
    """The runs, each with what RUN/eval, or an --eval_only run of its best.pt on the same test set, adds to its result.

    Such --eval_only runs do not stand for themselves: they would count a training twice, and their config tells how the
    model is built, but not how it was trained.
    """
    by_path, own = {run.path.resolve(): run for run in runs}, []
    for run in runs:
        evaluated = Path(ROOT, str(run.config["checkpoint"]))
        trained = by_path.get(evaluated.parent.resolve())
        if not run.config["eval_only"] or evaluated.name not in ("best.pt", "last.pt"):
            own.append(run)
        elif trained is None:
            said.append(f"{run.path}: left out, it evaluates {run.config['checkpoint']}, whose run is not here; put "
                        "that run below the same folder")
        elif evaluated.name == "best.pt" and _same_test(run, trained):
            trained.result = run.result | trained.result
    for run in own:
        try:
            run.result = (final_result(run.path / "eval") or {}) | (run.result or {}) or None
        except InputError as error:
            run.why = f"its evaluation cannot be read ({error})"
    return own


def _same_test(run: Run, other: Run) -> bool:
    """Whether two results are of one test set under one fusion weight."""
    if not (run.result and other.result):
        return False
    named = [(last_name(r.config["data_dir"]), _weight(r), r.result["queries"], r.result["videos"])
             for r in (run, other)]
    return named[0] == named[1]


def _weight(run: Run) -> float | None:
    """Of Eq. 11: the number that was chosen on val, where it was, else the flag."""
    return run.result.get("fusion_weight", run.config.get("fusion_weight"))


def complete(run: Run, *, kept: bool) -> None:
    """Evaluate where the result, or Table 4's frames_kept, is missing and can be had; else say why in run.why."""
    if run.why or run.result and not (kept and "frames_kept" not in run.result):
        return
    if run.config["eval_only"]:
        run.why = "" if run.result else "this evaluation did not end; start its command again with --resume auto"
    elif not run.result and (done := last_epoch(run)) != (epochs := run.config.get("epochs")):
        run.why = f"unfinished, {done} of {epochs} epochs; start its command again with --resume auto"
    elif not (run.path / "best.pt").exists():
        run.why = ("Table 4's number of kept frames is not in its result, and best.pt, which would tell, is gone" if
                   run.result else "has no best.pt to evaluate; start its command again with --resume auto")
    else:
        evaluate(run)


def last_epoch(run: Run) -> int:
    """Whole epochs in last.pt; 0 where there is none."""
    try:
        return load_checkpoint(run.path / "last.pt")["epoch"] if (run.path / "last.pt").exists() else 0
    except (InputError, KeyError):
        return 0


def evaluate(run: Run) -> None:
    """--eval_only of best.pt into RUN/eval, with the run's own data; why it was refused goes to run.why."""
    argv = ["--eval_only", "--checkpoint", run.path / "best.pt", "--output_dir", run.path / "eval", "--resume", "auto"]
    for flag in ("data_dir", "frames", "narrations", "speech", "missing_narration", "num_workers", "eval_batch_size",
                 "dsl_scale", "qb_norm_queries"):
        argv += [f"--{flag}", run.config[flag]] if run.config.get(flag) is not None else []
    command = [sys.executable, str(ROOT / "main_task_retrieval.py"), *map(str, argv)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if ended.returncode:
        run.why = f"could not be evaluated: {(ended.stderr.strip().splitlines() or ['it was killed'])[-1]}"
    else:
        run.result = final_result(run.path / "eval") | (run.result or {})


def assign(runs: list[Run], rows: list[Row]) -> tuple[dict[int, list[Run]], list[str]]:
    """{index of a row: its runs}, evaluated where that was missing; and sentences about what fills no row."""
    runs_of_row, said = {i: [] for i in range(len(rows))}, []
    for run in runs:
        try:
            means = meaning(run.config)
        except (KeyError, TypeError, AttributeError) as error:
            said.append(f"{run.path}: left out, its config.yaml is not one of this code ({error!r}); remove it")
            continue
        mine = [i for i, row in enumerate(rows) if any(not differences(means, of_row) for of_row in row.ways.values())]
        for i in mine:
            runs_of_row[i].append(run)
        if mine:
            complete(run, kept=any(rows[i].kept for i in mine))
            said += [f"{run.path}: {run.why}"] if run.why else []
            continue
        said.append(f"{run.path}: of no row; {nearest(means, rows)}")
    return runs_of_row, said


def nearest(means: dict, rows: list[Row]) -> str:
    """The row that a run misses by the fewest flags, and these."""
    corpora = sorted({of_row["data_dir"] for row in rows for of_row in row.ways.values()})
    if means["data_dir"] not in corpora:
        return f"no table is of {means['data_dir']}, the last folder of its --data_dir, but of {', '.join(corpora)}"
    candidates = [(row, of_row, differences(means, of_row)) for row in rows for of_row in row.ways.values()]
    row, _, gap = min(candidates, key=lambda c: ([means[k] != c[1][k] for k in ("method", "data_dir")], len(c[2])))
    title = ", ".join(filter(None, [row.table, row.part, row.name]))
    return f"nearest is {title}: {'; '.join(gap[:4])}" + (f"; and {len(gap) - 4} more" if len(gap) > 4 else "")


# ---------------------------------------------------------------------------------------------------------- the lines


@dataclass
class Line:
    """One line of one table in one direction: a row, and those of its runs that may be averaged."""

    row: Row
    direction: str  # T2V or V2T
    runs: list[Run]
    status: str  # "run", "other test set", "unfinished", "not run", "published only"

    def values(self, key: str) -> np.ndarray | None:
        """metrics, dsl or qb_norm of every run that has it, (runs, metrics)."""
        found = []
        for run in self.runs:
            table = run.result.get(key, {})
            of = table.get(self.row.matrix or next(reversed(run.result["metrics"])), {})
            if DIRECTIONS[self.direction] in of:
                found.append([of[DIRECTIONS[self.direction]][metric] for metric in self.row.metrics])
        return np.array(found, dtype=float) if found else None

    def mean(self, key: str) -> list[float | None]:
        values = self.values(key)
        return [None] * len(self.row.metrics) if values is None else values.mean(axis=0).tolist()

    @property
    def published(self) -> list[float | None]:
        return self.row.published.get(self.direction) or [None] * len(self.row.metrics)

    @property
    def difference(self) -> list[float | None]:
        """Ours minus the published; none across different test sets."""
        pairs = zip(self.mean("metrics"), self.published)
        return [None if self.status != "run" or None in pair else pair[0] - pair[1] for pair in pairs]

    @property
    def spread(self) -> list[float | None]:
        """Standard deviation over runs, where there are several."""
        values = self.values("metrics")
        return [None] * len(self.row.metrics) if len(self.runs) < 2 else values.std(axis=0, ddof=1).tolist()

    @property
    def kept(self) -> dict[str, float]:
        """Table 4's mean number of kept frames, and sentences, over the runs that have it."""
        found = [run.result["frames_kept"] for run in self.runs if "frames_kept" in run.result]
        return {view: float(np.mean([f[view] for f in found])) for view in found[0]} if found else {}

    @property
    def select_on(self) -> str:
        return self.runs[0].result["select_on"] if self.runs else ""

    @property
    def label(self) -> str:
        released = bool(self.runs) and not self.row.eval_only and self.runs[0].group[0] == "released"
        return self.row.name + (" (released weights)" if released else "")


def lines_of(row: Row, runs: list[Run], direction: str) -> list[Line]:
    """A line for each group of runs that may be averaged; one line where there is no result."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.result:
            groups.setdefault(run.group, []).append(run)
    lines = [Line(row, direction, group, "run" if list(key[2:]) == row.test else "other test set")
             for key, group in sorted(groups.items(), reverse=True, key=lambda item: str(item[0]))]
    status = "published only" if not row.ways else "unfinished" if runs else "not run"
    return lines or ([Line(row, direction, [], status)] if direction in row.published else [])


# ---------------------------------------------------------------------------------------------------------- the texts

INTRODUCTION = """Values stand in the order of the heading. Difference: ours minus published. Spread: standard deviation
of (n) runs. DSL, QB-Norm: ours after post-processing. A number in brackets is that of a command at the end."""
COMMANDS = """From the top folder. `python scripts/check_data.py PRESET` says what data is missing; for more seeds add
`--seed N` and another `--output_dir`."""


def as_markdown(tables: list[dict], rows: list[Row], runs_of_row: dict[int, list[Run]], said: list[str]) -> str:
    """The tables, the runs, what was left out and why, and the commands of what was not run."""
    todo: dict[tuple, int] = {}  # commands -> number
    parts = ["# Published tables and ours", INTRODUCTION]
    for table in tables:
        parts.append(f"## {table['table']}: {table['about']}")
        for direction, name in DIRECTIONS.items():
            lines = [line for i, row in enumerate(rows) if row.table == table["table"]
                     for line in lines_of(row, runs_of_row[i], direction)]
            if lines:
                parts.append(f"{name.replace('_', '-').capitalize()}, {' / '.join(table['metrics'])}")
                parts.append(markdown_table(lines, todo))
        parts += ["\n".join(f"- {note}" for note in table["notes"])] if "notes" in table else []
    runs = {run.path: run for of_row in runs_of_row.values() for run in of_row if run.result}
    for heading, sentences in (("Runs in the tables", map(describe, runs.values())),
                               ("Runs without a row, or without a result", said)):
        listed = "\n".join(f"- {sentence}" for sentence in sentences)
        parts += [f"## {heading}", listed] if listed else []
    if todo:
        parts += ["## Commands of what was not run", COMMANDS]
        parts.append("\n".join(f"{number}. " + "\n   ".join(steps) for steps, number in todo.items()))
    return "\n\n".join(parts) + "\n"


def describe(run: Run) -> str:
    """What runs of one row may differ in."""
    config, result = run.config, run.result
    said = [f"seed {config.get('seed')}", f"frames {config.get('frames')}", f"narrations {config.get('narrations')}"]
    said += [f"speech {config['speech']}"] if config.get("speech") else []
    said += [f"from {config['checkpoint']}"] if config["checkpoint"] else []
    said += [f"fusion weight {result['fusion_weight']:g} chosen on val"] if "fusion_weight_on" in result else []
    return f"{run.path}: {', '.join(said)}; {result['queries']} queries, {result['videos']} videos"


def markdown_table(lines: list[Line], todo: dict[tuple, int]) -> str:
    """Padded, so that it can be read as it stands; numbers the commands of lines that were not run in `todo`."""
    with_parts, with_kept = any(line.row.part for line in lines), any(line.row.kept for line in lines)
    cells = [[""] * with_parts + ["row", "published", "ours", "difference", "spread (n)", "epoch chosen on", "DSL",
                                  "QB-Norm"] + ["kept, published", "kept, ours"] * with_kept]
    for line in lines:
        spread = (strokes(line.spread, "±{:.1f}") + f" ({len(line.runs)})").removeprefix("- ") if line.runs else "-"
        cells.append([line.row.part] * with_parts
                     + [line.label, strokes(line.published), ours(line, todo), strokes(line.difference, "{:+.1f}"),
                        spread, line.select_on or "-", strokes(line.mean("dsl")), strokes(line.mean("qb_norm"))])
        if with_kept:
            kept = ", ".join(f"{value:.2f} ({view})" for view, value in line.kept.items())
            cells[-1] += [f"{line.row.kept:.2f}" if line.row.kept else "-", kept or "-"]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells)


def ours(line: Line, todo: dict[tuple, int]) -> str:
    """Our values, or why there are none and the number of the command that would make them."""
    if line.status == "published only":
        return "-"
    if not line.runs:
        return f"{line.status} [{todo.setdefault(tuple(line.row.commands), len(todo) + 1)}]"
    values, result = strokes(line.mean("metrics")), line.runs[0].result
    if line.status == "other test set":
        values += f" (other test set: {result['queries']} queries, {result['videos']} videos)"
    return values


def strokes(values: list[float | None], form: str = "{:.1f}") -> str:
    """51.0 / 76.4 / -; a lone stroke where there is nothing."""
    if all(value is None for value in values):
        return "-"
    return " / ".join("-" if value is None else form.format(value) for value in values)


def as_csv(rows: list[Row], runs_of_row: dict[int, list[Run]]) -> Iterator[list]:
    """One value a line, nothing rounded."""
    yield ["table", "part", "row", "direction", "metric", "published", "ours", "difference", "spread", "runs",
           "select_on", "dsl", "qb_norm", "status", "command"]
    for i, row in enumerate(rows):
        for direction in DIRECTIONS:
            for line in lines_of(row, runs_of_row[i], direction):
                head = [row.table, row.part, line.label, DIRECTIONS[direction]]
                tail = [line.status, "" if line.runs else " ".join(row.commands).replace("`", "")]
                columns = zip(row.metrics, line.published, line.mean("metrics"), line.difference, line.spread,
                              line.mean("dsl"), line.mean("qb_norm"))
                for *values, dsl, qb_norm in columns:
                    yield [*head, *values, len(line.runs), line.select_on, dsl, qb_norm, *tail]
                for view in ["video", "narration"] if row.kept and direction == "T2V" else []:
                    published = row.kept if view == "video" else ""
                    yield [*head, f"kept ({view})", published, line.kept.get(view, ""), "", "", len(line.runs),
                           line.select_on, "", "", *tail]


def main(argv: list[str] | None = None) -> None:
    """Print the tables and write them beside the runs."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="?", help="folder with run directories one or two levels below [runs]")
    args = parser.parse_args(argv)
    folder = args.runs or ROOT / "runs"
    if args.runs and not folder.is_dir():
        raise InputError(f"{folder}: is no folder; name the one that holds the run directories")
    tables, rows = read_published()
    runs, said = read_runs(folder)
    runs_of_row, more = assign(runs, rows)
    text = as_markdown(tables, rows, runs_of_row, said + more)
    write_text(folder / "tables.md", text)
    write_csv(folder / "tables.csv", as_csv(rows, runs_of_row))
    print(text)

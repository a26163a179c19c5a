"""Reading finished runs for tables, figures, galleries and comparisons: one reader a file, every value checked.

    RUN/config.yaml     flags            RUN/results.jsonl     evaluations, the final one last
    RUN/ranks.csv       the final evaluation's rank of every query's video, a column a matrix

InputError in one sentence names the file, what is wrong in it, and what to do.

Legend: B queries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from narvid import InputError
from narvid.files import read_csv, read_json_lines, read_yaml
from narvid.flags import as_argv
from narvid.methods import METHODS
from narvid.metrics import NAMES
from narvid.run.settings import DEFAULT_METHOD, build_parser

ADVICE = "remove this run or evaluate it again"
FREE_TEXT = ("select_on", "config")  # hold more than the command line takes


def read_config(run: Path) -> dict:
    """config.yaml as {flag: value}; values are checked by the trainer's own parser, flags it does not know are kept."""
    path = run / "config.yaml"
    config = read_yaml(path, advice=ADVICE)
    method = config.get("method", DEFAULT_METHOD)
    if not isinstance(method, str) or method not in METHODS:
        raise _damaged(path, f"names no method of this code but {str(method)[:40]!r}")
    parser = build_parser(method)
    known = {action.dest for action in parser._actions} - set(FREE_TEXT)
    try:
        argv = as_argv({k: v for k, v in config.items() if k in known and v is not None}, str(path), parser)
        here = [] if config.get("output_dir") is not None else ["--output_dir", "."]
        read = vars(parser.parse_args([*argv, *here]))
    except SystemExit as refused:  # a parser ends the process
        reason = str(refused.code).removeprefix("error: ").removesuffix(" (--help lists every flag)")
        raise _damaged(path, f"is not of this code ({reason.removeprefix(f'{path}: ')})") from None
    missing = [flag for flag in ("data_dir", "max_frames") if config.get(flag) is None]
    if missing:
        raise _damaged(path, f"has no {missing[0]}")
    return config | {flag: read[flag] for flag in config.keys() & known if config[flag] is not None}


def read_results(run: Path) -> list[dict]:
    """results.jsonl as evaluations, the final one last; [] where there is none yet."""
    path = run / "results.jsonl"
    if not path.exists():
        return []
    results = list(read_json_lines(path, advice=ADVICE))
    for line, result in results:
        if not is_result(result):
            raise _damaged(path, "is no result of this code", line)
    return [result for _, result in results]


def final_of(results: list[dict]) -> dict | None:
    """The evaluation that ended the run; None where it has not ended."""
    return results[-1] if results and results[-1].get("final") else None


def read_ranks(run: Path, matrix: str | None) -> tuple[list[tuple[str, str]], np.ndarray, str]:
    """ranks.csv -> (video, query) of every line, ranks (B,), the matrix they are of (default: the last one)."""
    path = run / "ranks.csv"
    lines = read_csv(path, ("video", "query"), advice="name folders of runs that have ended, or evaluate them again")
    matrices = [name for name in (lines[0][1] if lines else ()) if name not in ("video", "query")]
    if not matrices:
        raise _damaged(path, "holds no ranks")
    if matrix and matrix not in matrices:
        raise InputError(f"{path}: has no matrix {matrix}, only {', '.join(matrices)}")
    matrix = matrix or matrices[-1]
    ranks = np.empty(len(lines), dtype=np.int64)
    for i, (line, values) in enumerate(lines):
        text = values[matrix]
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
            raise _damaged(path, f"has no whole number above 0 as rank of {matrix} ({text[:20]!r})", line)
        ranks[i] = int(text)
    return [(values["video"], values["query"]) for _, values in lines], ranks, matrix


def is_result(value: object) -> bool:
    """Whether a line of results.jsonl holds what readers ask of it."""
    return (isinstance(value, dict) and {"metrics", "select_on", "queries", "videos", "split"} <= value.keys()
            and isinstance(value["select_on"], str) and isinstance(value["split"], str)
            and all(isinstance(value[name], int) for name in ("queries", "videos"))
            and _is_table(value["metrics"], NAMES) and value["metrics"] != {}
            and all(_is_table(value[name], NAMES) for name in ("dsl", "qb_norm") if name in value)
            and _all_of(value.get("frames_kept", {}), _is_number)
            and all(isinstance(value.get(name, 0), int) for name in ("epoch", "step")))


def _is_table(table: object, names: tuple[str, ...]) -> bool:
    """{matrix: {direction: {metric: number}}}, all metrics there."""
    return _all_of(table, lambda directions: "text_to_video" in directions and _all_of(
        directions, lambda metrics: set(names) <= metrics.keys() and _all_of(metrics, _is_number)))


def _all_of(values: object, fits: Callable) -> bool:
    try:
        return isinstance(values, dict) and all(fits(value) for value in values.values())
    except (AttributeError, TypeError):
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def _damaged(path: Path, what: str, line: int | None = None) -> InputError:
    return InputError(f"{path}{f':{line}' if line else ''}: {what}; {ADVICE}")

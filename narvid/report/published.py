"""published.yaml -> the rows of the published tables, each with what a run of it looks like and the command for it.

Whether a run belongs to a row is decided by what their flags mean: meaning(config) holds all that changes what is
computed. Left out are FREE, and folders: of a path only the last name counts, so that of --data_dir must be the
corpus's (data/msrvtt, /ssd/msrvtt) and that of --narrations the row's (narrations.jsonl). Where the frames lie is not
compared, nor how densely they were extracted, which a config does not tell.

Not here: runs and results (eval_tables.py).
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from narvid.files import read_yaml
from narvid.flags import as_argv
from narvid.methods import METHODS
from narvid.run.same_run import FREE_TO_CHANGE, OF_DATA, OF_START
from narvid.run.settings import DEFAULT_METHOD, build_parser, flags_of, parse_args

ROOT = Path(__file__).resolve().parents[2]  # of the clone, with configs/ and runs/
PUBLISHED = Path(__file__).with_name("published.yaml")
DIRECTIONS = {"T2V": "text_to_video", "V2T": "video_to_text"}
# Runs of one row may differ in these. Those that change the test set or the choice of the epoch keep runs apart later,
# when results are averaged.
FREE = {*FREE_TO_CHANGE, "frames", "missing_narration", "seed", "deterministic", "grad_checkpointing", "select_on",
        "eval_every", "eval_batch_size", "dsl_scale", "qb_norm_queries", "ndcg", "save_similarity"}
PATHS = tuple(flag for flag in (*OF_DATA, *OF_START) if flag not in ("frames", "checkpoint"))


@dataclass
class Row:
    """One row of one published table, resolved."""

    table: str
    part: str
    name: str
    metrics: list[str]
    published: dict[str, list]  # {"T2V": values} and "V2T" where the source has it
    matrix: str | None = None
    kept: float | None = None
    eval_only: bool = False
    test: list[int] | None = None  # queries, videos
    ways: dict[str, dict] = field(default_factory=dict)  # {"trained" | "released": meaning of its config}
    commands: list[str] = field(default_factory=list)  # in Markdown; [] where it cannot be run here


# ------------------------------------------------------------------------------------------------- what a config means


def meaning(config: dict) -> dict:
    """Of a resolved config, all that changes what is computed: {flag: value}."""
    args = flags_of(config)
    config = vars(args)
    kept = {flag: value for flag, value in config.items() if flag not in FREE}
    for flag in PATHS:
        names = kept.get(flag)
        kept[flag] = sorted(map(last_name, names)) if isinstance(names, list) else names and last_name(names)
    kept["checkpoint"] = bool(kept["checkpoint"])  # weights to start from have any name
    method = METHODS[args.method]
    kept |= method.alike(args)
    unread = method.unread(args) | ({"narrations"} if "narration" not in method.reads(args) else set())
    if kept["clip_pretrained"] in ("openai", f"{kept['clip_model']}.pt"):  # the tag, or OpenAI's own file
        kept["clip_pretrained"] = "openai"
        unread |= {"quick_gelu"} if kept["quick_gelu"] is not False else set()
    if args.recipe == "reported":
        unread.add("precision")
    return {flag: value for flag, value in kept.items() if flag not in unread}


def last_name(path: str) -> str:
    """What counts of a path."""
    return Path(path).name


def differences(run: dict, row: dict) -> list[str]:
    """Two meanings -> ["epochs 3, not 5", ...]; [] where they are the same."""
    return [f"{flag} {_show(run.get(flag))}, not {_show(row.get(flag))}" for flag in sorted(run.keys() | row.keys())
            if run.get(flag) != row.get(flag)]


def _show(value) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------------ the rows


def read_published(path: Path = PUBLISHED) -> tuple[list[dict], list[Row]]:
    """The data file -> its tables as they stand there, and every row of them."""
    content = read_yaml(path)
    rows = []
    for table in content["tables"]:
        for part, entries in table["parts"].items():
            for entry in entries:
                row = Row(table["table"], part, entry["row"], table["metrics"],
                          {d: entry[d] for d in DIRECTIONS if d in entry}, entry.get("matrix"), entry.get("kept"),
                          entry.get("eval_only", False))
                if "preset" in entry:
                    resolve(row, entry, content["corpora"])
                rows.append(row)
    return content["tables"], rows


def resolve(row: Row, entry: dict, corpora: dict[str, list[int]]) -> None:
    """A row's preset and flags -> its ways, commands and test set."""
    flags, released = entry.get("flags", {}), {"checkpoint": "CHECKPOINT", **entry.get("released", {})}
    means = _meaning_of(entry["preset"], json.dumps(flags))
    # The checkpoint is not among the flags, since the trainer opens the one that it is given.
    row.ways["trained"] = means | {"eval_only": row.eval_only, "checkpoint": "checkpoint" in entry}
    if not row.eval_only:
        beside = {flag: value for flag, value in released.items() if flag != "checkpoint"}
        means = _meaning_of(entry["preset"], json.dumps(flags | beside))
        row.ways["released"] = means | {"eval_only": True, "checkpoint": True}
    row.test = corpora[means["data_dir"]]
    row.commands = commands(entry, flags, released if "released" in entry else None)


@cache
def _meaning_of(preset: str, flags: str) -> dict:
    """Of a preset's name and more flags, in JSON."""
    config = ROOT / "configs" / f"{preset}.yaml"
    method = read_yaml(config).get("method", DEFAULT_METHOD)
    argv = as_argv(json.loads(flags), PUBLISHED.name, build_parser(method))
    return meaning(vars(parse_args(["--config", str(config), *argv, "--output_dir", "."])))


def commands(entry: dict, flags: dict, released: dict | None) -> list[str]:
    """What fills the row, to be run from the top folder, in Markdown: a text a step, or another way."""
    preset, checkpoint = entry["preset"], entry.get("checkpoint")
    evaluate = f"python main_task_retrieval.py --config configs/{preset}.yaml --eval_only"
    train = f"bash scripts/train_preset.sh {preset}"
    name = run_name(preset, flags)
    if entry.get("eval_only"):
        more = flags | ({"checkpoint": checkpoint} if checkpoint else {})
        return [f"`{evaluate} {flag_text(more | {'output_dir': f'runs/{name}'})}`"]
    steps = []
    if checkpoint and checkpoint.startswith("runs/"):  # an earlier stage of the same preset
        steps.append(f"`{train} --output_dir {Path(checkpoint).parent}`, then")
        name = preset
    more = flags | ({"checkpoint": checkpoint} if checkpoint else {}) | {"output_dir": f"runs/{name}"}
    steps.append(f"`{train} {flag_text(more)}`")
    if released:
        more = flags | released | {"output_dir": f"runs/{name}_released"}
        steps.append(f"or the released weights: `{evaluate} {flag_text(more)}`")
    return steps


def flag_text(flags: dict) -> str:
    """Flags as they are typed."""
    words = []
    for flag, value in flags.items():
        switch = isinstance(value, bool)
        words.append(f"--{'no-' if value is False else ''}{flag}")
        words += [] if switch else map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def run_name(preset: str, flags: dict) -> str:
    """A folder of its own for every preset with flags."""
    words = [preset]
    for flag, value in flags.items():
        values = (value or ["none"]) if isinstance(value, list) else [value]
        words += [Path(value).stem] if flag in PATHS else [flag, *map(str, values)]
    return "_".join(words)

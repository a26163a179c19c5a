"""The gallery: what two methods, or two matrices of one run, answer to the same queries, as a page to look at.

  python scripts/make_gallery.py --run runs/x --out gallery                          S_qv beside S_fusion of one run
  python scripts/make_gallery.py --run runs/x --other runs/y --out gallery           two runs (Figs. 4 and 8-11)

Writes <out>/index.html, which opens without a server, and <out>/pictures/. Each answer comes with the frames that the
model saw, the weights of the query-aware filter (Sec. 3.4), the sentences and the scores. Everything is computed anew
from the run's checkpoint by the trainer's own functions and compared with the run's ranks.csv.

Here: from runs to the data of the page. Not here: the page itself (gallery.html), the numbers (narvid/evaluation.py).

Legend: B queries, V videos, K frames of a video and sentences of its narration, D joint dimension.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from narvid import InputError, distributed
from narvid.files import list_folder, read_text, write_text, writing
from narvid.data.datasets import Split
from narvid.evaluation import Encoding, encode_videos, score_queries
from narvid.flags import Parser, WithDefaults, as_argv, positive
from narvid.data.frames import Picture, frame_paths, load_frame_index, read_frames
from narvid.metrics import text_to_video_ranks
from narvid.methods import METHODS
from narvid.progress import tqdm
from narvid.run.build import build_model, encoding_of, load_data
from narvid.run.same_run import OF_DATA
from narvid.run.settings import DEFAULT_METHOD, ON_VAL, build_parser, parse_args
from narvid.report.runs import final_of, read_config, read_ranks, read_results

TEMPLATE = Path(__file__).with_name("gallery.html")
TILE = 112  # pixels: side of a frame on the page
TITLES = 5  # of a video are shown, where a method reads titles
# Said on this command's line, of another machine's disk, or of training alone: not taken from config.yaml.
NOT_TAKEN = (*OF_DATA, "checkpoint", "config", "output_dir", "eval_only", "select_on", "resume", "cache_frames",
             "tensorboard")


class Measured(NamedTuple):
    """One run, evaluated anew on the test split."""

    args: argparse.Namespace
    split: Split
    times: list[list[float]]  # V lists: seconds of each picked frame
    matrices: dict[str, np.ndarray]  # name -> (B, V), the method's result last
    kept: Callable  # (query, shown videos) -> {view: (n, K)} weights; {} for a method without the query-aware filter


class Side(NamedTuple):
    """One of the two columns."""

    source: int  # which Measured
    matrix: str
    ranks: np.ndarray  # (B,) of the right video


# -------------------------------------------------------------------------------------------------------- measuring


def trainer_args(run: Path, data_dir: str | None, out: Path) -> argparse.Namespace:
    """The trainer's flags that evaluate this run on the test split, from its config.yaml."""
    path, config = run / "config.yaml", read_config(run)
    checkpoint = str(run / "best.pt") if (run / "best.pt").exists() else config.get("checkpoint")
    method = config.get("method", DEFAULT_METHOD)
    if not checkpoint and METHODS[method].trained:
        raise InputError(f"{run / 'best.pt'}: is missing; name the folder of a run that has ended")
    if config.get("fusion_weight") == ON_VAL:  # the number that was chosen
        config = config | {"fusion_weight": (final_of(read_results(run)) or {}).get("fusion_weight", 0.5)}
    kept = {flag: value for flag, value in config.items() if value is not None and flag not in NOT_TAKEN}
    data_dir = data_dir or config["data_dir"]
    argv = ["--data_dir", data_dir, "--output_dir", str(out), "--eval_only"]
    for flag, default in (("frames", "frames"), ("narrations", "narrations.jsonl"), ("speech", "speech.jsonl"),
                          ("titles", "titles.json")):
        paths = config.get(flag) or []
        paths = paths if isinstance(paths, list) else [paths]
        if paths and [Path(x) for x in paths] != [Path(config["data_dir"], default)]:  # lies somewhere else
            argv += [f"--{flag}", *paths]
    argv += ["--checkpoint", checkpoint] if checkpoint else []
    return parse_args([*as_argv(kept, path, build_parser(method)), *argv])


@torch.no_grad()
def measure(args: argparse.Namespace, world: distributed.World) -> Measured:
    """The test split through the trainer's own functions."""
    model = build_model(args)
    split = load_data(args, world, model.clip.tokenizer.lengths)["test"]
    model.to(world.device).eval()
    encoding = encoding_of(model, args, world)
    videos = encode_videos(model, split, encoding, world)
    scores = score_queries(model, split.queries, videos, encoding, world)
    matrices = model.combine(scores, weight=args.fusion_weight)
    frame_times = load_frame_index(args.frames)
    times = [[frame_times[video][k] for k in picked] for video, picked in zip(split.videos, split.picks)]
    return Measured(args, split, times, {name: s.numpy() for name, s in matrices},
                    partial(_kept, model, split.queries, videos, encoding, world))


@torch.no_grad()
def _kept(model, queries: list[str], videos: NamedTuple, encoding: Encoding, world: distributed.World, query: int,
          shown: list[int]) -> dict[str, np.ndarray]:
    """What one query keeps of the shown videos -> {view: (n, K)}; {} for a method without a filter."""
    tokens, word_mask = encoding.tokenize(queries[query:query + 1], encoding.max_words)
    with encoding.autocast():
        encoded = model.encode_queries(tokens.to(world.device), word_mask.to(world.device))
    some = type(videos)(*(None if x is None else x[shown] for x in videos))
    return {view: weights[0].cpu().numpy() for view, weights in (model.kept(encoded, some) or {}).items()}


def compare_with_record(run: Path, measured: Measured) -> str:
    """Are these the ranks that the run wrote down? One sentence."""
    if not (run / "ranks.csv").exists():
        return f"{run}: no ranks.csv to compare with"
    name = list(measured.matrices)[-1]
    pairs, recorded, _ = read_ranks(run, name)
    split = measured.split
    if pairs != [(split.videos[v], query) for v, query in zip(split.video_of_query, split.queries)]:
        return f"{run}: its ranks.csv is of other queries than {measured.args.data_dir}: another test split"
    same = int((text_to_video_ranks(measured.matrices[name], split.video_of_query) == recorded).sum())
    return f"{run}: {same} of {len(recorded)} ranks of {name} are those of its ranks.csv"


def weights(measured: Measured, query: int, shown: list[int]) -> dict[str, np.ndarray]:
    """What the filter makes of these videos for a query (Eq. 4) -> {"frames": (n, K), "sentences": (n, K)}.

    Dropped and padded ones are 0; "sentences" is missing where there is no narration view; {} without a filter.
    """
    names = {"video": "frames", "narration": "sentences"}
    return {names[view]: kept for view, kept in measured.kept(query, shown).items()}


# ------------------------------------------------------------------------------------------------- data of the page


def choose_sides(sources: list[Measured], matrices: list[str | None]) -> list[Side]:
    """Left and right: the last matrix of each run, or the first and the last of the only one; `matrices` wins."""
    sides = []
    for position, wanted in enumerate(matrices):
        source = min(position, len(sources) - 1)
        measured = sources[source]
        names = list(measured.matrices)
        default = names[0] if len(sources) == 1 and position == 0 else names[-1]
        if wanted and wanted not in names:
            raise InputError(f"--{'left' if position == 0 else 'right'} {wanted}: this run has {', '.join(names)}")
        matrix = wanted or default
        ranks = text_to_video_ranks(measured.matrices[matrix], measured.split.video_of_query)
        sides.append(Side(source, matrix, ranks))
    if sides[0][:2] == sides[1][:2]:
        raise InputError(f"both sides would show {sides[0].matrix} of the same run; add --other RUN, or choose with "
                         "--left and --right")
    return sides


def make_data(sources: list[Measured], runs: list[Path], sides: list[Side], *, queries: int, top: int) -> dict:
    """All that the page shows, as JSON will hold it; `videos` are those of the split that are shown."""
    split = sources[0].split
    chosen = np.unique(np.linspace(0, len(split.queries) - 1, min(queries, len(split.queries))).round().astype(int))
    data = {"of": {"queries": len(split.queries), "videos": len(split.videos)}, "sides": [], "videos": {},
            "queries": [make_query(sources, sides, int(query), top) for query in chosen]}
    names = [run.name for run in runs]
    for side in sides:
        measured, run = sources[side.source], runs[side.source]
        data["sides"].append({"run": str(run) if len(set(names)) < len(runs) else run.name, "path": str(run),
                              "method": measured.args.method, "matrix": side.matrix, "source": side.source,
                              "filter": METHODS[measured.args.method].describe_filter(measured.args),
                              "scores": _shown_scores(measured, side.matrix),
                              "recall": [round(float(100 * (side.ranks <= k).mean()), 1) for k in (1, 5, 10)]})
    right_first = [side.ranks == 1 for side in sides]
    data["counts"] = {name: int(x.sum()) for name, x in (
        ("gained", ~right_first[0] & right_first[1]), ("lost", right_first[0] & ~right_first[1]),
        ("failed", ~right_first[0] & ~right_first[1]), ("kept", right_first[0] & right_first[1]))}
    shown = sorted({answer["video"] for query in data["queries"] for column in query["answers"] for answer in column})
    for video in shown:
        numbers = sorted({k for measured in sources for k in measured.split.picks[video]})
        name = hashlib.sha1(json.dumps([split.videos[video], numbers]).encode()).hexdigest()[:16]
        data["videos"][video] = {"id": split.videos[video], "strip": f"pictures/{name}.jpg", "frames": numbers,
                                 "sources": [_of_source(measured, video, numbers) for measured in sources]}
    return data


def make_query(sources: list[Measured], sides: list[Side], query: int, top: int) -> dict:
    """A query with the first `top` answers of both sides, and the right one where it is not among them."""
    split = sources[0].split
    right, answers = int(split.video_of_query[query]), []
    for side in sides:
        measured = sources[side.source]
        row = measured.matrices[side.matrix][query]  # (V,)
        order = np.lexsort((np.arange(len(row)) == right, -row))  # ties count against the right one
        shown = [int(v) for v in order[:top]]
        rank = {v: i for i, v in enumerate(shown, 1)}
        if right not in rank:
            shown, rank[right] = [*shown, right], int(side.ranks[query])
        found = weights(measured, query, shown)
        names = _shown_scores(measured, side.matrix)
        answers.append([{"video": v, "rank": rank[v],
                         "scores": [round(float(measured.matrices[name][query, v]), 4) for name in names],
                         **{kind: [_short(x) for x in w[i][:len(split.picks[v])]] for kind, w in found.items()}}
                        for i, v in enumerate(shown)])
    first = [int(side.ranks[query]) == 1 for side in sides]
    status = {(False, True): "gained", (True, False): "lost", (False, False): "failed", (True, True): "kept"}
    return {"text": split.queries[query], "right": right, "ranks": [int(side.ranks[query]) for side in sides],
            "status": status[tuple(first)], "answers": answers}


def _shown_scores(measured: Measured, matrix: str) -> list[str]:
    return [name for name in measured.matrices if name != "S_sum" or matrix == "S_sum"]


def _of_source(measured: Measured, video: int, numbers: list[int]) -> dict:
    """Which tiles of the strip a run saw of a video, when, and with which sentences or titles (Cap4Video's)."""
    titles = measured.split.titles
    sentences = measured.split.sentences if "narration" in METHODS[measured.args.method].reads(measured.args) else None
    return {"tiles": [numbers.index(k) for k in measured.split.picks[video]],
            "times": [round(time, 2) for time in measured.times[video]],
            "sentences": sentences and sentences[video], "titles": titles and titles[video][:TITLES]}


def _short(value: float) -> float:
    """Three digits that count: a small weight must not be rounded to a dropped frame."""
    return float(f"{float(value):.3g}")


# ----------------------------------------------------------------------------------------------------------- writing


def write_strips(out: Path, data: dict, frames_dir: Path) -> None:
    """One jpg a shown video: its frames side by side, cropped as the model sees them."""
    for video in tqdm(data["videos"].values(), desc="pictures", unit="video"):
        paths = frame_paths(frames_dir, video["id"], video["frames"])
        pixels = read_frames(paths, Picture(TILE)).numpy()  # (n, 3, side, side)
        strip = Image.fromarray(np.concatenate(list(pixels.transpose(0, 2, 3, 1)), axis=1))
        with writing(out / video["strip"], binary=True) as file:
            strip.save(file, format="JPEG", quality=80)


def make_page(data: dict) -> str:
    """The page with its data inside. No text of the data can end the script element or start a comment in it."""
    text = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return read_text(TEMPLATE).replace("__DATA__", text)


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else than a gallery."""
    if out.exists() and (not out.is_dir() or {*list_folder(out)} - {"index.html", "pictures"}):
        raise InputError(f"--out {out}: holds something else than a gallery; choose an empty or a new folder")


def main(argv: list[str] | None = None) -> Path:
    """One page -> its path."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=WithDefaults)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that has ended; the right column")
    parser.add_argument("--other", type=Path, help="the run to compare with, the left column [the same run]")
    parser.add_argument("--data_dir", help="where the corpus is now [as config.yaml says]")
    parser.add_argument("--left", help="matrix of the left column [last of --other, else S_qv]")
    parser.add_argument("--right", help="matrix of the right column [the last one: S_fusion]")
    parser.add_argument("--queries", type=positive, default=200, help="evenly taken from the test split")
    parser.add_argument("--top", type=positive, default=5, help="answers to show")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    given = parser.parse_args(argv)
    check_out(given.out)
    runs = [given.other, given.run] if given.other else [given.run]
    all_args = [trainer_args(run, given.data_dir, given.out) for run in runs]  # mistakes first, then the work
    world = distributed.start()
    sources = [measure(args, world) for args in all_args]
    for run, measured in zip(runs, sources):
        print(compare_with_record(run, measured))
    splits = [measured.split for measured in sources]
    if len({(*split.queries, "", *split.videos, "", str(split.frames_dir)) for split in splits}) > 1:
        raise InputError(f"{runs[0]} and {runs[1]} have other test queries, videos or frames; give both the same "
                         "corpus with --data_dir")
    sides = choose_sides(sources, [given.left, given.right])
    data = make_data(sources, runs, sides, queries=given.queries, top=given.top)
    write_strips(given.out, data, splits[-1].frames_dir)
    page = given.out / "index.html"
    write_text(page, make_page(data))
    print(f"{page}: {len(data['queries'])} of {data['of']['queries']} queries, {len(data['videos'])} videos; of all "
          "queries " + ", ".join(f"{count} {name}" for name, count in data["counts"].items()))
    return page

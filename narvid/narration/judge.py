"""How well a captioner's sentences fit the frames they were written about, before anything is trained on them.

    python -m narvid.narration judge A.jsonl [B.jsonl ...] --frames DIR --towers ViT-B-32 --clip_pretrained openai
    python -m narvid.narration judge A.jsonl --frames DIR --checkpoint runs/x --out judged

Each sentence is compared with its own frame, with the other frames of its video and with frames of other videos, by the
cosines of the two towers. What they cannot tell apart they cannot judge: a low fit says that these towers see no
likeness. The same videos of every file are judged. Here: from files to the report and its page (judge.html). Not
here: the measures (fit.py), what is malformed or misaligned (check.py).
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from narvid import InputError
from narvid.data.frames import Picture, frame_paths, load_frame_index, pick_frames, read_frames, read_list
from narvid.data.narrations import Narration, join, load_narrations, write_narrations
from narvid.files import list_folder, read_text, write_json_lines, write_text, writing
from narvid.flags import Parser, count, positive, share
from narvid.narration.answers import is_refusal
from narvid.progress import tqdm

TEMPLATE = Path(__file__).with_name("judge.html")
AT_ONCE = 64  # videos, and sentences, that a tower reads at a time
POOL = 2000  # frames, evenly taken, that stand for all other videos
BINS = 10  # of the histogram
TILE = 160  # pixels: side of a frame on the page
COLUMNS = {  # of the table -> how a value of `Judged.row` is written
    "videos": "d", "sentences": "d", "fit": ".3f", "cosine": ".3f", "rank, others": ".1%", "rank, video": ".1%",
    "first in video": ".1%", "differ": ".3f", "repeated": ".1%", "cut": ".1%", "refused": ".1%", "letters": "s",
}
MEANINGS = {
    "fit": "cosine of a sentence with its own frame, less its mean cosine with frames of other videos",
    "rank, others": "frames of other videos that fit a sentence better than its own; chance 50 %, best 0 %",
    "rank, video": "the same of the other frames of its video; like frames, and sentences of the whole video, raise it",
    "first in video": "sentences that no other frame of the video fits better or as well",
    "differ": "1 - cosine of two sentences of a video, mean; 0: always the same",
    "repeated": "sentences that stand in another video too",
    "cut": "sentences longer than the text tower reads",
    "refused": "apologies (English ones)",
    "letters": "share of the letters by writing system, not by language",
}


class Sentence(NamedTuple):
    """One sentence and what it was found to be; `frame` is its frame's number in the folder."""

    video: str
    frame: int
    time: float
    text: str
    cosine: float
    rank_in_video: float
    margin_in_video: float
    rank_among_others: float
    fit: float


class Judged(NamedTuple):
    """One narration file, or what one captioner wrote of it."""

    file: str
    captioner: str
    sentences: list[Sentence]
    row: dict  # column -> value
    histogram: list[int]  # sentences by rank among frames of other videos, BINS of equal width, the best first


class Encoder(NamedTuple):
    """Two towers on their device."""

    name: str
    towers: object
    device: object


def load_encoder(args: argparse.Namespace) -> Encoder:
    """The towers of --checkpoint, or those of --towers with --clip_pretrained; InputError where they are not there."""
    from narvid import Retriever, distributed, towers  # torch takes seconds to load

    if args.checkpoint:
        model = Retriever.load(args.checkpoint, towers=args.towers or "ViT-B-32", tokenizer=args.tokenizer)
        return Encoder(str(args.checkpoint), model.model.clip.eval(), model.device)
    device = distributed.start().device
    try:
        pair = towers.load_towers(args.towers, args.clip_pretrained, quick_gelu=args.quick_gelu,
                                  tokenizer=args.tokenizer)
        pair.tokenizer.load()
    except ValueError as error:
        raise InputError(str(error).replace("--clip_model", "--towers")) from error
    return Encoder(f"{args.towers}, {args.clip_pretrained}", pair.to(device).eval(), device)


def choose_videos(files: Mapping[str, Mapping[str, Narration]], frame_times: Mapping[str, Sequence[float]],
                  most: int, only: set[str] | None = None) -> list[str]:
    """The videos of `only` that have frames and that every file narrates; `most` of them, evenly taken, 0: all."""
    common = [video for video in frame_times
              if (only is None or video in only) and all(video in narrations for narrations in files.values())]
    if not common:
        raise InputError(f"{', '.join(files)}: no video with frames is narrated in "
                         f"{'all of them' if len(files) > 1 else 'it'}; give the --frames that were narrated, or "
                         "another --only")
    if most and len(common) > most:
        common = [common[i * len(common) // most] for i in range(most)]
    return common


def encode_frames(encoder: Encoder, frames_dir: Path, picks: Mapping[str, Sequence[int]]):
    """The picked frames of each video, one video after the other -> (F, D) on the CPU."""
    import torch

    every = [path for video, numbers in picks.items() for path in frame_paths(frames_dir, video, numbers)]
    parts, bar = [], tqdm(total=len(every), desc="frames", unit="frame")
    with torch.no_grad(), bar:
        for start in range(0, len(every), AT_ONCE):
            pixels = read_frames(every[start:start + AT_ONCE], encoder.towers.picture)
            parts.append(encoder.towers.encode_frames(pixels.to(encoder.device)).float().cpu())
            bar.update(len(pixels))
    return torch.cat(parts)


def encode_texts(encoder: Encoder, texts: Sequence[str]):
    """N texts -> (N, D) on the CPU; equal ones are read once."""
    import torch

    different = sorted(set(texts), key=len)  # those of like length together: little padding
    place = {text: number for number, text in enumerate(different)}
    parts, bar = [], tqdm(total=len(different), desc="sentences", unit="sentence")
    with torch.no_grad(), bar:
        for start in range(0, len(different), AT_ONCE):
            some = different[start:start + AT_ONCE]
            tokens, _ = encoder.towers.tokenize(some, encoder.towers.context_length)
            parts.append(encoder.towers.encode_text(tokens.to(encoder.device), words=False)[0].float().cpu())
            bar.update(len(some))
    return torch.cat(parts)[torch.tensor([place[text] for text in texts])]


def judge_file(name: str, narrations: Mapping[str, Narration], frames_dir: Path,
               frame_times: Mapping[str, Sequence[float]], picks: Mapping[str, Sequence[int]], frames,
               encode: Callable, lengths: Callable, context_length: int) -> list[Judged]:
    """All of one file, a Judged a captioner. frames (F, D): of `picks`; encode: texts -> (N, D); lengths: of tokens."""
    import torch

    from narvid.narration.fit import fit, repeated_across, scripts, spread_in_video

    found, own, video_of_frame = [], [], []  # found: (number of the video, frame, time, text)
    for number, (video, numbers) in enumerate(picks.items()):
        times = [frame_times[video][k] for k in numbers]
        texts = join(narrations[video], times, frame_times[video], video=video, path=name)
        for k, time, text in zip(numbers, times, texts, strict=True):
            if text is not None:
                found.append((number, k, time, text))
                own.append(len(video_of_frame))
            video_of_frame.append(number)
    if not found:
        raise InputError(f"{name}: has no sentence for a frame of the {len(picks)} videos that are judged; look at it "
                         f"with `python -m narvid.narration check {name} --frames {frames_dir}`")
    texts = [text for *_, text in found]
    features = encode(texts)
    pool = torch.arange(len(frames))[::-(-len(frames) // POOL)]
    measured = fit(features, frames, torch.tensor(own), torch.tensor(video_of_frame), pool)
    tokens, videos = lengths(texts), list(picks)
    columns = [column.double().tolist() for column in measured]
    every = [Sentence(videos[number], k, time, text, *values)
             for (number, k, time, text), *values in zip(found, *columns, strict=True)]
    judged, captioner_of = [], [narrations[sentence.video].captioner for sentence in every]
    for captioner in sorted(set(captioner_of)):
        rows = [i for i, one in enumerate(captioner_of) if one == captioner]
        of_video: dict[str, list[str]] = {}
        for i in rows:
            of_video.setdefault(every[i].video, []).append(texts[i])
        spread = spread_in_video(features[rows], torch.tensor([found[i][0] for i in rows]))
        of = {field: np.array([getattr(every[i], field) for i in rows]) for field in Sentence._fields[4:]}
        row = {"videos": len(of_video), "sentences": len(rows), "fit": mean(of["fit"]), "cosine": mean(of["cosine"]),
               "rank, others": mean(of["rank_among_others"]), "rank, video": mean(of["rank_in_video"]),
               "first in video": mean(np.where(np.isnan(of["rank_in_video"]), np.nan, of["rank_in_video"] == 0)),
               "differ": mean(np.array([*spread.values()])), "repeated": repeated_across(of_video.values()),
               "cut": float(np.mean([tokens[i] > context_length for i in rows])),
               "refused": float(np.mean([is_refusal(texts[i]) for i in rows])),
               "letters": ", ".join(f"{name} {part:.1%}" for name, part in scripts(texts[i] for i in rows)[:3])}
        ranks = of["rank_among_others"][~np.isnan(of["rank_among_others"])]
        histogram = np.histogram(ranks, BINS, (0, 1))[0].tolist()
        judged.append(Judged(name, captioner, [every[i] for i in rows], row, histogram))
    return judged


def mean(values: np.ndarray) -> float | None:
    """Of those that are numbers; None where there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def worst_first(sentences: Sequence[Sentence]) -> list[Sentence]:
    """By fit; a sentence that could be compared with nothing comes last."""
    return sorted(sentences, key=lambda sentence: (np.isnan(sentence.fit), sentence.fit))


# ---- the report ----


def table(judged: Sequence[Judged]) -> list[list[str]]:
    """The rows of the table as text, the header first."""
    cells = [["file", "captioner", *COLUMNS]]
    for one in judged:
        cells.append([one.file, one.captioner, *("-" if one.row[column] is None else format(one.row[column], form)
                                                 for column, form in COLUMNS.items())])
    return cells


def report(encoder: str, judged: Sequence[Judged], worst: int) -> str:
    """One screen: the table a captioner, what its columns mean, the histograms, the worst sentences."""
    cells = [list(column) for column in zip(*table(judged))]  # one row a captioner is wide: turned on its side
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [f"towers: {encoder}"]
    lines += ["  ".join(f"{text:{width}}" for text, width in zip(line, widths)).rstrip() for line in cells]
    lines += ["", *(f"{name}: {meaning}" for name, meaning in MEANINGS.items())]
    for one in judged:
        lines += ["", f"{one.file}, {one.captioner}: sentences by rank among frames of other videos"]
        most = max([*one.histogram, 1])
        lines += [f"{100 * i // BINS:>4}-{100 * (i + 1) // BINS:>3} % {n:>8} {'#' * round(40 * n / most)}"
                  for i, n in enumerate(one.histogram)]
        lines += [f"{s.fit:8.3f}  {s.video} at {s.time:.1f} s: {s.text}" for s in worst_first(one.sentences)[:worst]]
    return "\n".join(lines)


def make_data(encoder: str, judged: Sequence[Judged], worst: int) -> dict:
    """All that the page shows."""
    def number(value: float) -> float | None:
        return None if np.isnan(value) else round(value, 4)

    header, *rows = table(judged)
    return {"towers": encoder, "header": header, "rows": rows, "meanings": MEANINGS, "files": [
        {"file": one.file, "captioner": one.captioner, "histogram": one.histogram, "worst": [
            {"video": s.video, "time": round(s.time, 2), "text": s.text, "fit": number(s.fit),
             "cosine": number(s.cosine), "others": number(s.rank_among_others), "inside": number(s.rank_in_video),
             "picture": picture_name(s)} for s in worst_first(one.sentences)[:worst]]} for one in judged]}


def picture_name(sentence: Sentence) -> str:
    """Where its frame lies beside the page; a video's id may hold what a file name may not."""
    name = hashlib.sha1(json.dumps([sentence.video, sentence.frame]).encode()).hexdigest()[:16]
    return f"pictures/{name}.jpg"


def write_page(out: Path, data: dict, judged: Sequence[Judged], frames_dir: Path, worst: int) -> None:
    """<out>/index.html, its pictures, and sentences.jsonl with every sentence; index.html comes last."""
    shown = {picture_name(s): s for one in judged for s in worst_first(one.sentences)[:worst]}
    for name, sentence in tqdm(shown.items(), desc="pictures", unit="picture", delay=2):
        pixels = read_frames(frame_paths(frames_dir, sentence.video, [sentence.frame]), Picture(TILE))[0].numpy()
        with writing(out / name, binary=True) as file:
            Image.fromarray(pixels.transpose(1, 2, 0)).save(file, format="JPEG", quality=85)
    write_json_lines(out / "sentences.jsonl", (
        {"file": one.file, "captioner": one.captioner}
        | {key: None if isinstance(value, float) and np.isnan(value) else value
           for key, value in s._asdict().items()} for one in judged for s in one.sentences))
    text = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    write_text(out / "index.html", read_text(TEMPLATE).replace("__DATA__", text))


def without_worst(narrations: Mapping[str, Narration], sentences: Sequence[Sentence],
                  part: float) -> dict[str, Narration]:
    """The narrations without the worst share of the judged sentences; what was not judged stays.

    Training masks a frame without a sentence; a video keeps its best one, for training refuses a video without any.
    """
    order = worst_first(sentences)
    best = {sentence.video: sentence for sentence in order}
    wanted, dropped = round(part * len(order)), set()
    for sentence in order:
        if len(dropped) < wanted and best[sentence.video] is not sentence:
            dropped.add((sentence.video, sentence.text, sentence.time))
    texts_of: dict[str, list[tuple[str, float]]] = {}
    for video, text, time in dropped:
        texts_of.setdefault(video, []).append((text, time))
    kept = {}
    for video, narration in narrations.items():
        gone = set()
        for text, time in texts_of.get(video, ()):  # the sentence that was joined with this frame: the nearest such one
            same = [i for i, said in enumerate(narration.sentences) if said == text]
            gone.add(min(same, key=lambda i: abs(narration.times[i] - time)))
        pairs = [pair for i, pair in enumerate(zip(narration.times, narration.sentences)) if i not in gone]
        kept[video] = narration._replace(times=[time for time, _ in pairs], sentences=[text for _, text in pairs])
    return kept


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else than a page of this command."""
    if out.exists() and (not out.is_dir() or {*list_folder(out)} - {"index.html", "pictures", "sentences.jsonl"}):
        raise InputError(f"--out {out}: holds something else than judged narrations; choose an empty or a new folder")


# ---- the command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(prog="python -m narvid.narration judge", allow_abbrev=False,
                    description="How well sentences fit their frames, before they are trained on.")
    parser.add_argument("files", nargs="+", metavar="NARRATIONS", help="narration files, compared on the same videos")
    parser.add_argument("--frames", type=Path, required=True, help="folder of extracted frames, with its index")
    parser.add_argument("--towers", metavar="NAME", help="open_clip's name, a config in .json, or a folder")
    parser.add_argument("--clip_pretrained", metavar="W", help="weights of --towers: open_clip's tag, or a file")
    parser.add_argument("--quick_gelu", action=argparse.BooleanOptionalAction,
                        help="QuickGELU as activation of --towers; for a file of weights that does not tell")
    parser.add_argument("--checkpoint", metavar="RUN", help="instead: the towers of this run")
    parser.add_argument("--tokenizer", metavar="DIR", help="of the towers, where it is not CLIP's [from the hub]")
    parser.add_argument("--max_frames", type=positive, default=12, help="frames of a video, as training picks [12]")
    parser.add_argument("--videos", type=count, default=500, help="how many are judged, evenly taken; 0: all [500]")
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE",
                        help="judge the videos of these JSON lines alone, such as train.jsonl")
    parser.add_argument("--worst", type=count, default=100,
                        help="how many of each captioner's worst sentences the page shows [100]")
    parser.add_argument("--out", type=Path, help="folder of the page, and of every sentence as JSON lines")
    parser.add_argument("--drop_worst", type=share, default=0.0, metavar="SHARE",
                        help="write the narrations without this share of the judged sentences, the worst, to --kept")
    parser.add_argument("--kept", type=Path, help="with --drop_worst: the narration file to write")
    args = parser.parse_args(argv)
    if not (args.towers or args.checkpoint):
        parser.error("name what judges: --towers NAME with --clip_pretrained W, or --checkpoint RUN")
    if args.towers and not args.checkpoint and not (args.clip_pretrained or Path(args.towers).is_dir()):
        parser.error(f"--towers {args.towers}: without --clip_pretrained its weights are random and judge nothing")
    if args.checkpoint and args.clip_pretrained:
        parser.error("--checkpoint brings its own weights: leave --clip_pretrained out")
    if bool(args.drop_worst) != bool(args.kept):
        parser.error("--drop_worst and --kept go together")
    if args.kept and len(args.files) > 1:
        parser.error("--drop_worst is of one file: name one")
    if args.kept and os.path.realpath(args.kept) == os.path.realpath(args.files[0]):
        parser.error(f"--kept {args.kept} is the file that is judged: give another one")
    if len({os.path.realpath(path) for path in args.files}) < len(args.files):
        parser.error("the same file is named twice: leave one out")
    return args


def main(argv: Sequence[str] | None = None) -> list[Judged]:
    """`judge`: print the report; with --out write its page."""
    args = parse_args(argv)
    if args.out:
        check_out(args.out)
    frame_times = load_frame_index(args.frames)
    files = {path: load_narrations(path, frame_times) for path in args.files}
    videos = choose_videos(files, frame_times, args.videos, read_list(args.only) if args.only else None)
    picks = {video: pick_frames(len(frame_times[video]), args.max_frames) for video in videos}
    encoder = load_encoder(args)
    frames = encode_frames(encoder, args.frames, picks)
    judged = []
    for path, narrations in files.items():
        judged += judge_file(path, narrations, args.frames, frame_times, picks, frames,
                             lambda texts: encode_texts(encoder, texts), encoder.towers.tokenizer.lengths,
                             encoder.towers.context_length)
    print(f"{len(videos)} videos, {sum(map(len, picks.values()))} frames")
    print(report(encoder.name, judged, min(args.worst, 5)))
    if args.out:
        write_page(args.out, make_data(encoder.name, judged, args.worst), judged, args.frames, args.worst)
        print(f"{args.out / 'index.html'}: the {args.worst} worst sentences of each beside their frames")
    if args.kept:
        [(path, narrations)] = files.items()
        sentences = [sentence for one in judged for sentence in one.sentences]
        kept = without_worst(narrations, sentences, args.drop_worst)
        write_narrations(args.kept, kept.items())
        gone = sum(len(narrations[video].sentences) - len(kept[video].sentences) for video in kept)
        print(f"{args.kept}: {gone} of {len(sentences)} judged sentences left out")
    return judged

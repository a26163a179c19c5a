"""Frame folder -> narration file: which frames are captioned, by which shard, and in which order of steps.

  python -m narvid.narration narrate --frames data/msrvtt/frames --out data/msrvtt/narrations.jsonl
  python -m narvid.narration narrate --frames FRAMES --out OUT --server http://localhost:8000/v1 --model NAME
  bash scripts/narrate.sh FRAMES OUT                               one process a GPU, packages installed where missing

Near-identical neighbours share a sentence (--same_frame). Videos are dealt to shards (--shard, Slurm arrays, torchrun).
Killed, the same command continues; the shard that finds nothing missing writes OUT, whole, and OUT's .failed.jsonl
where frames have no sentence, which the next run tries again. New videos of the frame folder are added to OUT.
Here: frames, flags, the loop. Not here: models, servers, prompts (captioners.py), what is done already (journals.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from PIL import Image

from narvid import InputError
from narvid.narration.captioners import (
    DEFAULT_MODEL,
    MAX_NEW_TOKENS,
    Captioner,
    Failed,
    LocalCaptioner,
    ServerCaptioner,
    check_sees,
    made_pictures,
)
from narvid.flags import Parser, count, number, positive, positive_float
from narvid.data.frames import check_jpg, frame_path, load_frame_index, pick_frames
from narvid.narration.journals import (
    Known,
    Shard,
    append,
    check_times,
    failed_file,
    my_shard,
    one_at_a_time,
    open_journal,
    read_known,
    write_out,
)
from narvid.progress import tqdm

SAME_FRAME = 5.0  # grey levels: neighbours in 15 MSR-VTT clips differ by 0 or 1 (stills), once by 6, else by 14 or more
STOP_AFTER = 10  # frames in a row without a sentence: the server is down or the model mute, for all that follow too


class Job(NamedTuple):
    """One frame to caption, and the times of the frames that share its sentence."""

    video: str
    path: Path
    time: float
    shared: list[float]


# ---- near-identical frames ----


def distinct_frames(paths: Sequence[str | Path], threshold: float) -> list[int]:
    """For each frame of a video, in time order, the index of the frame whose sentence it gets; its own where captioned.

    A frame is captioned if it differs by `threshold` or more (`distance`) from the last captioned one, not from its
    neighbour, so that slow drift adds up. 0 captions every frame and reads none.
    """
    if threshold <= 0:
        return list(range(len(paths)))
    captioned, last = [], None
    for index, path in enumerate(paths):
        seen = thumbnail(path)
        if last is None or distance(seen, last) >= threshold:
            last, leader = seen, index
        captioned.append(leader)
    return captioned


def thumbnail(path: str | Path) -> np.ndarray:
    """The picture in 16 x 16 grey cells, int16 (16, 16) of 0..255; decodes the jpg at an eighth of its size or more."""
    try:
        with Image.open(path) as picture:
            picture.draft("L", (32, 32))
            small = picture.convert("L").resize((16, 16), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"frame {path} cannot be decoded ({error}): delete its folder and run extract_frames again"
        ) from error
    return np.asarray(small, dtype=np.int16)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two thumbnails' cells, 0..255.

    Not the mean: a small thing that moves before a still background is what a video is about, and changes few cells.
    """
    return float(np.abs(a - b).max())


# ---- which frames, which shard ----


def read_lists(paths: Sequence[Path]) -> set[str]:
    """The video ids of JSON lines files such as test.jsonl."""
    videos = set()
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--list {path} cannot be read: {error}") from error
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                videos.add(str(json.loads(line)["video"]))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f'{path}, line {line_number}: expected {{"video": id, ...}}') from error
    return videos


def wanted_frames(args: argparse.Namespace, times: Mapping[str, list[float]]) -> dict[str, list[int]]:
    """Video -> indices of the frames that get a sentence, in the order of the frame index."""
    videos = list(times)
    if args.list:
        listed = read_lists(args.list)
        videos = [video for video in videos if video in listed]
        if absent := sorted(listed - set(videos)):
            print(f"{len(absent)} listed videos have no frames in {args.frames}: {', '.join(absent[:3])}, ...")
    if not videos:
        raise InputError(f"{args.frames}: no frames of any video to narrate")
    return {video: pick_frames(len(times[video]), args.max_frames or len(times[video])) for video in videos}


def plan(args: argparse.Namespace, times: Mapping[str, list[float]], wanted: Mapping[str, list[int]], known: Known,
         shard: Shard) -> list[Job]:
    """The frames that this shard has to caption: those without a sentence, less the ones that share another's."""
    todo = []
    for video in list(wanted)[shard.index :: shard.n]:
        done = known.texts.get(video, {})
        if any(times[video][index] not in done for index in wanted[video]):
            todo.append(video)
    jobs = []
    for video in tqdm(todo, "comparing frames", unit="video", disable=not (shard.shows and todo and args.same_frame)):
        paths = [frame_path(args.frames, video, index) for index in wanted[video]]
        done, groups = known.texts.get(video, {}), {}
        for index, path, leader in zip(wanted[video], paths, distinct_frames(paths, args.same_frame), strict=True):
            if times[video][index] not in done:
                groups.setdefault(leader, []).append((path, times[video][index]))
        jobs += [Job(video, *group[0], [time for _, time in group[1:]]) for group in groups.values()]
    return jobs


# ---- captioning ----


def caption_all(jobs: Sequence[Job], captioner: Captioner, journal: TextIO, maker: tuple[str, str], *,
                batch_size: int, threads: int, shows: bool) -> int:
    """Caption the jobs; each answer goes to the journal as it comes. Returns how many frames failed."""
    failed = in_a_row = 0
    with tqdm(total=len(jobs), unit="frame", disable=not (shows and jobs), smoothing=0.05) as bar:
        for job, answer in answered(jobs, captioner, batch_size=batch_size, threads=threads):
            failure = answer.why if isinstance(answer, Failed) else None
            text = None if failure else answer
            append(journal, maker, job.video, job.time, job.shared, text=text, why=failure)
            bar.update()
            in_a_row = in_a_row + 1 if failure else 0
            failed += bool(failure)
            if in_a_row == STOP_AFTER:
                raise InputError(
                    f"{in_a_row} frames in a row got no sentence, the last one because: {failure}. "
                    "What is captioned is kept; once that is mended, the same command continues"
                )
    return failed


def answered(jobs: Sequence[Job], captioner: Captioner, *, batch_size: int,
             threads: int) -> Iterator[tuple[Job, str | Failed]]:
    """(job, answer) as they come: batches one after the other for a model, many requests at once for a server."""
    pool = ThreadPoolExecutor(threads)
    running = {}
    try:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            running[pool.submit(caption_batch, captioner, batch)] = batch
            while len(running) == threads or (running and start + batch_size >= len(jobs)):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from zip(running.pop(future), future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def caption_batch(captioner: Captioner, batch: Sequence[Job]) -> list[str | Failed]:
    """Read the frames of a batch and caption them."""
    return captioner.caption([read_picture(job.path) for job in batch], [f"{job.video} {job.time}" for job in batch])


def read_picture(path: Path) -> bytes:
    """A frame's file, checked to be a whole jpg."""
    check_jpg(path)
    return path.read_bytes()


def picture_pairs(jobs: Sequence[Job]) -> Iterator[Sequence[bytes]]:
    """Pairs of different pictures for check_sees: two frames of different videos, far from alike, then made ones."""
    first_frames = {job.video: job.path for job in jobs}
    paths = list(first_frames.values())
    paths = [paths[index] for index in pick_frames(len(paths), 16)]
    if len(paths) > 1:
        seen = [thumbnail(path) for path in paths]
        farthest = max(range(1, len(paths)), key=lambda index: distance(seen[0], seen[index]))
        yield [read_picture(paths[0]), read_picture(paths[farthest])]
    yield made_pictures()


# ---- the run ----


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, those that exclude each other refused."""
    parser = Parser(prog="python -m narvid.narration narrate", allow_abbrev=False,
                    description="Caption a folder of frames.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("frames")
    group.add_argument("--frames", type=Path, required=True, metavar="DIR", help="frame folder, of extract_frames.py")
    group.add_argument("--out", type=Path, required=True, metavar="JSONL", help="the narration file; kept and added to")
    group.add_argument("--list", type=Path, nargs="+", metavar="JSONL", help="only the videos in these split files")
    group.add_argument("--max_frames", type=positive, metavar="K", help="only the K frames that training picks")
    group.add_argument("--same_frame", type=number, default=SAME_FRAME, metavar="LEVELS",
                       help="a frame whose 16 x 16 grey cells all differ by less than this (of 255) from the last "
                            "captioned one shares its sentence; 0: none does")
    group = parser.add_argument_group("captioner")
    group.add_argument("--captioner", default=DEFAULT_MODEL, metavar="NAME", help="hub name or folder of a model")
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="bf16 on a GPU and fp32 without, if not given")
    group.add_argument("--load_4bit", action="store_true", help="4-bit weights (bitsandbytes, GPU)")
    group.add_argument("--prompt", help="A, B or C of Table 7, or a text of your own; C if not given")
    group.add_argument("--max_new_tokens", type=positive, default=MAX_NEW_TOKENS, help="CLIP reads 77 at most")
    group.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    group.add_argument("--sampling_temperature", type=positive_float, default=0.2, help="of --sample")
    group.add_argument("--captioner_seed", type=count, default=0, help="of --sample, with each frame's video and time")
    group = parser.add_argument_group("server, in place of --captioner")
    group.add_argument("--server", metavar="URL", help="OpenAI-compatible, such as http://localhost:8000/v1")
    group.add_argument("--model", metavar="NAME", help="the server's name for its model")
    group.add_argument("--api_key_env", metavar="VARIABLE", help="holds the key; OPENAI_API_KEY if not given")
    group.add_argument("--retries", type=count, default=5, help="of a request, with growing pauses")
    group.add_argument("--timeout", type=positive_float, default=60.0, help="of a request, in seconds")
    group.add_argument("--requests_per_second", type=positive_float, help="at most; no limit if not given")
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=positive, default=16, help="frames at once; for a server: requests at once")
    group.add_argument("--shard", metavar="I/N", help="do part I of N; a Slurm array and torchrun are understood as is")
    group.add_argument("--merge", action="store_true", help="caption nothing; write OUT from what the shards have done")
    args = parser.parse_args(argv)
    if bool(args.server) != bool(args.model):
        parser.error("--server and --model go together")
    if args.server and (args.captioner != DEFAULT_MODEL or args.dtype or args.load_4bit):
        parser.error("--captioner, --dtype and --load_4bit do not go with --server")
    return args


def make_captioner(args: argparse.Namespace) -> Captioner:
    """The captioner that the flags describe."""
    decoding = {"max_new_tokens": args.max_new_tokens, "seed": args.captioner_seed,
                "temperature": args.sampling_temperature if args.sample else None}
    if args.server:
        return ServerCaptioner(args.server, args.model, args.prompt, **decoding, api_key_env=args.api_key_env,
                               retries=args.retries, timeout=args.timeout, requests_per_second=args.requests_per_second)
    return LocalCaptioner(args.captioner, args.prompt, **decoding, dtype=args.dtype, load_4bit=args.load_4bit)


def narrate(args: argparse.Namespace, times: Mapping[str, list[float]], wanted: Mapping[str, list[int]],
            shard: Shard) -> tuple[str, str]:
    """Caption this shard's frames; returns the captioner and the prompt to record."""
    captioner = make_captioner(args)
    maker = (f"{captioner.label} same_frame={args.same_frame:g}", captioner.prompt)
    known = read_known(args.out, maker)
    check_times(args.out, known, times)
    with open_journal(args.out, shard) as journal:
        jobs = plan(args, times, wanted, known, shard)
        shared = sum(len(job.shared) for job in jobs)
        mine = list(wanted)[shard.index :: shard.n]
        frames = sum(len(wanted[video]) for video in mine)
        print(f"shard {shard.index + 1}/{shard.n}: {len(mine)} videos, {frames} frames; "
              f"{frames - len(jobs) - shared} have a sentence, {len(jobs)} to caption, {shared} share a neighbour's "
              f"({shared / max(len(jobs) + shared, 1):.1%}); {maker[0]}, {args.batch_size} at once", flush=True)
        if jobs:
            answers = check_sees(captioner, picture_pairs(jobs))
            print(f"two different pictures, two answers: {answers[0][:60]!r}, {answers[1][:60]!r}", flush=True)
        start = time.monotonic()
        size, threads = (1, args.batch_size) if args.server else (args.batch_size, 1)
        failed = caption_all(jobs, captioner, journal, maker, batch_size=size, threads=threads, shows=shard.shows)
    seconds = time.monotonic() - start
    print(f"{len(jobs)} frames in {seconds:.1f} s, {len(jobs) / max(seconds, 1e-9):.2f} a second; {failed} failed")
    return maker


def finish(args: argparse.Namespace, times: Mapping[str, list[float]], wanted: Mapping[str, list[int]],
           maker: tuple[str, str] | None, shard: Shard) -> None:
    """Write OUT if every wanted frame has a sentence or a reason for none; otherwise say which shards are awaited."""
    known = read_known(args.out, maker)  # again: other shards went on in the meantime
    check_times(args.out, known, times)
    missing, awaited = 0, set()
    for position, (video, indices) in enumerate(wanted.items()):
        settled = {*known.texts.get(video, ()), *known.failed.get(video, ())}
        if gaps := sum(times[video][index] not in settled for index in indices):
            missing += gaps
            awaited.add(position % shard.n + 1)
    if missing and args.merge:
        raise InputError(
            f"{args.out} is not written: {missing} frames have no sentence yet; run the shards that were stopped again"
        )
    if missing:
        numbers = ", ".join(map(str, sorted(awaited)))
        print(f"shard {shard.index + 1}/{shard.n} done; waiting for shards {numbers}; the last to end writes OUT; if "
              "none has, run this with --merge when all have ended")
        return
    failed = write_out(args.out, known, times)
    print(f"{args.out}: {len(known.texts)} videos, {sum(map(len, known.texts.values()))} sentences")
    if failed:
        print(f"{failed} frames have none, {failed_file(args.out)} says why; the next run tries them again")
    if not known.texts:
        raise InputError(f"not one frame got a sentence; {failed_file(args.out)} says why")


def main(argv: Sequence[str] | None = None) -> None:
    """`narrate`: caption this process's share of the frames, write OUT if nothing is missing."""
    args = parse_args(argv)
    shard = my_shard(args.shard)
    times = load_frame_index(args.frames)
    wanted = wanted_frames(args, times)
    maker = None if args.merge else narrate(args, times, wanted, shard)
    with one_at_a_time(args.out):
        finish(args, times, wanted, maker, shard)

"""Videos -> a frame folder (layout: narvid/data/frames.py). All cores, resumable, one run at a time for a folder.

  python scripts/extract_frames.py --videos DIR --out frames                    1 frame a second, the paper's choice
  python scripts/extract_frames.py --videos DIR --out frames_12 --num_frames 12 --list test.jsonl
  python scripts/extract_frames.py --videos DIR --out small --compress          <id>.mp4 of 3 frames a second, no sound

A video's id is its file name without the last extension; folders below DIR are searched too. A video that gives no
frame is written to <out>/failed.jsonl with the reason and tried again by the next run; it never becomes a black frame.
Stopped at any moment, the same command continues and ends with the same files. A second folder of videos adds to what
is there; a video whose file was replaced (another size or time of change) is done again.
Small videos have an index of their own, <out>/videos.jsonl, one line each: {"video", "frames", "bytes", "sampling":
"3 fps", "short_side", "crf", "source": file, "source_bytes", "source_mtime", "note": what was amiss, if so}.
Here: which files, worker processes, what is done already. Not here: pixels and times (narvid/data/videos.py).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from math import inf
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from narvid import InputError, files
from narvid.data.frames import INDEX_NAME, frame_path, has_frames, is_frame, read_list, spelling_among
from narvid.data.videos import QUALITY, SHORT_SIDE, compress_video, decode_video, start_worker
from narvid.data.videos import SUFFIXES as EXTENSIONS
from narvid.flags import Parser, positive, positive_float
from narvid.parsing import fault_of, parse_json
from narvid.progress import say, tqdm

FAILED_NAME = "failed.jsonl"
SMALL_INDEX_NAME = "videos.jsonl"  # of --compress; not frames.INDEX_NAME, so that neither is taken for the other
UNFINISHED = ".unfinished"  # folder inside --out; a hidden name is never a video's
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_noinv_fmt}]"


class Job(NamedTuple):
    video: str
    source: Path
    out: Path
    how: dict  # keyword arguments of decode_video or compress_video
    quality: int | None  # of the jpgs; None: a small video


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description="Extract frames from videos, or make the videos small.", allow_abbrev=False)
    add = parser.add_argument
    add("--videos", type=Path, required=True, metavar="DIR", help="folder of video files, searched with its subfolders")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--list", type=Path, nargs="+", metavar="JSONL", help='only the videos in these files ({"video": id} a line)')
    add("--compress", action="store_true", help="write small videos without sound (h264 mp4) in place of jpgs")
    add("--fps", type=positive_float, help="frames per second of video (default 1, with --compress 3)")
    add("--num_frames", type=positive, help="frames per video, uniform in time, in place of --fps")
    add("--max_seconds", type=positive_float, default=inf, help="only this much of a video's beginning (default all)")
    add("--short_side", type=positive, help="pixels; larger pictures shrink to it (default 256, with --compress 224)")
    add("--quality", type=int, choices=range(1, 101), metavar="1..100", help="of the jpgs (default 95)")
    add("--crf", type=int, choices=range(52), metavar="0..51", help="with --compress, 0 is lossless (default 18)")
    add("--workers", type=positive, default=usable_cores(), help="processes, one thread each (default all cores)")
    args = parser.parse_args(argv)
    if args.fps and args.num_frames:
        parser.error("--num_frames stands in place of --fps: give one of them")
    if args.compress and (args.num_frames or args.quality):
        parser.error("--compress takes --fps and --crf; --num_frames and --quality are for jpgs")
    if args.crf is not None and not args.compress:
        parser.error("--crf is the quality of --compress; that of jpgs is --quality")
    defaults = {"fps": 1.0, "short_side": SHORT_SIDE, "quality": QUALITY}
    if args.compress:
        defaults = {"fps": 3.0, "short_side": 224, "crf": 18}
    elif args.num_frames:
        del defaults["fps"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def usable_cores() -> int:
    """The cores this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def how_to(args: argparse.Namespace) -> tuple[dict, dict]:
    """Job.how, and what every line of the index file records."""
    sampling = f"{args.fps:g} fps" if args.fps else f"{args.num_frames} uniform"
    if args.max_seconds < inf:
        sampling += f", first {args.max_seconds:g} s"
    how = {"fps": args.fps, "short_side": args.short_side, "max_seconds": args.max_seconds}
    settings = {"sampling": sampling, "short_side": args.short_side}
    if args.compress:
        return {**how, "crf": args.crf}, {**settings, "crf": args.crf}
    return {**how, "n": args.num_frames}, {**settings, "quality": args.quality}


# ---- which videos ----


def find_videos(folder: Path) -> dict[str, Path]:
    """Video id -> file, sorted by id. Hidden files are passed over (file managers leave some with video names)."""
    if not folder.is_dir():
        raise InputError(f"--videos {folder} is not a folder")
    found: dict[str, Path] = {}
    for parent, names in files.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() not in EXTENSIONS or name.startswith("."):
                continue
            if fault_of(str(path)):
                raise InputError(f"{ascii(str(path))[1:-1]}: a file name that is not UTF-8: rename it")
            if path.stem in (INDEX_NAME, FAILED_NAME):
                raise InputError(f"{path}: the folder of its frames would be called {path.stem}, as a file that is "
                                 "written beside it: rename it")
            other = found.setdefault(path.stem, path)
            if other != path and os.path.realpath(other) != os.path.realpath(path):
                raise InputError(f"{other} and {path} have one id, {path.stem!r}: rename or remove one of them")
    if not found:
        raise InputError(f"no video in {folder}: no file ends in one of {' '.join(EXTENSIONS)}")
    return dict(sorted(found.items()))


def state_of(source: Path) -> dict:
    """What tells a video file from the one that replaces it."""
    try:
        state = source.stat()
    except OSError:  # a dangling link: the decoder says so
        return {}
    return {"source_bytes": state.st_size, "source_mtime": round(state.st_mtime, 3)}


def read_done(index: Path, settings: dict) -> dict[str, dict]:
    """Video id -> line of the index file, of the videos whose files are all there; what cannot be read is not done.

    Refuses a folder made with other settings.
    """
    if not index.exists():
        return {}
    done = {}
    for line in files.read_lines(index, whole=True, advice=f"delete it, and {index.parent} is made anew"):
        try:
            entry = parse_json(line, index)
        except InputError:
            continue  # torn by a kill: that video is done again
        if not isinstance(entry, dict) or not (has_frames(entry) if index.name == INDEX_NAME else is_small(entry)):
            continue
        theirs = {name: entry.get(name) for name in settings}
        if theirs != settings:
            raise InputError(f"{index.parent} was made with {theirs}, this run asks for {settings}: give another --out")
        if is_whole(index.parent, entry):
            done[entry["video"]] = entry
    return done


def is_small(entry: dict) -> bool:
    """Whether a line of the index of small videos has what is read of it."""
    return (isinstance(entry.get("video"), str) and entry["video"] != ""
            and all(type(entry.get(name)) is int for name in ("frames", "bytes")))


def is_whole(out: Path, entry: dict) -> bool:
    """Whether what a line of an index file lists is there: so many frames, or a small video of so many bytes."""
    path = os.path.join(out, entry["video"] if "times" in entry else f"{entry['video']}.mp4")
    if not os.path.exists(path):  # False, too, for what can be no name
        return False
    if "times" in entry:
        return sum(map(is_frame, files.list_folder(path))) == len(entry["times"])
    return os.path.getsize(path) == entry["bytes"]


def write_lines(path: Path, entries: list[dict]) -> None:
    """Write JSON lines sorted by video."""
    files.write_json_lines(path, sorted(entries, key=lambda entry: entry["video"]))


# ---- the work ----


def extract_video(job: Job) -> dict:
    """In a worker: write a video's files under a temporary name, then rename. Returns {"times"} or {"frames", "bytes"},
    with a "note" where something was amiss, or {"why"} there is nothing.
    """
    temporary = job.out / UNFINISHED / job.video
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    notes = []
    try:
        made = write_jpgs(job, notes) if job.quality else write_small(job, notes)
    except InputError as e:
        shutil.rmtree(temporary)
        return {"why": str(e)}
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise files.unwritable(job.out, e) from e
    return {**made, "note": "; ".join(notes)} if notes else made


def write_jpgs(job: Job, notes: list[str]) -> dict:
    """Write <out>/<video>/<index>.jpg."""
    unfinished, times = job.out / UNFINISHED, []
    for index, (seconds, pixels) in enumerate(decode_video(job.source, **job.how, notes=notes)):
        Image.fromarray(pixels).save(frame_path(unfinished, job.video, index), "JPEG", quality=job.quality)
        times.append(round(seconds, 3))
    folder = job.out / job.video
    shutil.rmtree(folder, ignore_errors=True)  # frames without a line in the index: a run was stopped in between
    files.replace(unfinished / job.video, folder)
    return {"times": times}


def write_small(job: Job, notes: list[str]) -> dict:
    """Write <out>/<video>.mp4."""
    temporary = job.out / UNFINISHED / job.video
    path = temporary / f"{job.video}.mp4"
    frames = compress_video(job.source, path, **job.how, notes=notes)
    made = {"frames": frames, "bytes": path.stat().st_size}
    files.replace(path, job.out / path.name)
    temporary.rmdir()
    return made


def run_jobs(jobs: list[Job], workers: int) -> Iterator[tuple[Job, dict]]:
    """Yield (job, result) as they finish. A file on which the decoder itself dies costs that file, not the run."""
    while jobs:
        left = []
        yield from run_pool(jobs, workers, left)
        if left and len(jobs) == 1:
            yield left[0], {"why": f"{left[0].source}: the worker process died (a decoder crash, or no memory left)"}
            return
        started = [job for job in left if (job.out / UNFINISHED / job.video).exists()]
        if left and not started:
            raise InputError("the worker processes die before they start: is there memory for --workers of them?")
        for job in started:  # one of these it was: each alone
            yield from run_jobs([job], 1)
        jobs = [job for job in left if job not in started]


def run_pool(jobs: list[Job], workers: int, left: list[Job]) -> Iterator[tuple[Job, dict]]:
    """Yield (job, result) until all is done or a worker dies; what is not done then is appended to `left`."""
    # spawn: the parent has threads (tqdm's), which a fork must not copy
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), start_worker)
    running = {}
    try:
        for job in jobs:
            try:
                running[pool.submit(extract_video, job)] = job
            except BrokenProcessPool:  # a worker died while jobs were still being handed in
                left.append(job)
        for future in as_completed(running):
            if isinstance(future.exception(), BrokenProcessPool):
                left.append(running[future])
            else:
                yield running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the run ----


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    index = args.out / (SMALL_INDEX_NAME if args.compress else INDEX_NAME)
    if args.compress and args.out.resolve().is_relative_to(args.videos.resolve()):
        raise InputError(f"--out {args.out} lies in --videos: the small videos would be taken for originals next time")
    if not index.exists() and args.out.exists() and any(name[0] != "." for name in files.list_folder(args.out)):
        raise InputError(f"{args.out} is in use and holds no {index.name}; nothing is replaced: give another --out")
    videos = find_videos(args.videos)
    wanted = read_list(args.list) if args.list else set(videos)
    with files.lock(args.out):
        bring_up_to_date(args, index, videos, wanted)


def bring_up_to_date(args: argparse.Namespace, index: Path, videos: dict[str, Path], wanted: set[str]) -> None:
    """Extract what is missing or was replaced, write the index and the list of failures."""
    how, settings = how_to(args)
    done, failed_before = read_done(index, settings), read_failed(index.parent / FAILED_NAME)
    states = {video: state_of(videos[video]) for video in wanted & set(videos)}
    replaced = [video for video, state in states.items() if "source_bytes" in done.get(video, {})
                and {name: done[video].get(name) for name in ("source_bytes", "source_mtime")} != state]
    if replaced:
        say(f"{len(replaced)} videos are other files than those that were extracted, and are done again: "
            f"{min(replaced)}, ...")
    for video in replaced:
        del done[video]
    jobs = [Job(video, videos[video], args.out, how, args.quality) for video in sorted(states.keys() - done.keys())]
    tidy(index, done)
    spelling = spelling_among(videos)
    absent = [{"video": v, "file": None, "why": f"no file of this name in {args.videos}{spelling(v)}"}
              for v in sorted(wanted - set(videos))]
    failed = absent + extract_all(jobs, args, index, settings, states, done)
    write_lines(index, list(done.values()))
    elsewhere = [entry for video, entry in failed_before.items() if video not in wanted and video not in done]
    write_lines(args.out / FAILED_NAME, failed + elsewhere)
    shutil.rmtree(args.out / UNFINISHED)
    report(index, [done[video] for video in wanted & set(done)], failed, new=len(jobs) - len(failed) + len(absent))


def read_failed(path: Path) -> dict[str, dict]:
    """Video id -> line of the list of failures; what another folder of videos failed in stays there."""
    if not path.exists():
        return {}
    return {entry["video"]: entry for _, entry in files.read_json_lines(path, whole=True, advice="delete it")
            if isinstance(entry.get("video"), str)}


def tidy(index: Path, done: dict[str, dict]) -> None:
    """Make the folder, drop what a killed run left half written, and leave an index file that can be appended to."""
    unfinished = index.parent / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished)
    unfinished.mkdir()
    write_lines(index, list(done.values()))


def extract_all(
    jobs: list[Job], args: argparse.Namespace, index: Path, settings: dict, states: dict, done: dict[str, dict]
) -> list[dict]:
    """Run the jobs; every finished video joins `done` and, at once, the index file. Returns the failures."""
    failed = []
    bar = tqdm(total=len(jobs), unit=" videos", bar_format=BAR)
    with files.appending(index) as lines, bar:
        for job, result in run_jobs(jobs, args.workers):
            source = str(job.source.relative_to(args.videos))
            bar.update()
            if "why" in result:
                failed.append({"video": job.video, "file": source, "why": result["why"]})
                continue
            note = {"note": result.pop("note")} if "note" in result else {}
            done[job.video] = {"video": job.video, **result, **settings, "source": source, **states[job.video], **note}
            lines.write(json.dumps(done[job.video], ensure_ascii=False) + "\n")
            lines.flush()
    return failed


def report(index: Path, done: list[dict], failed: list[dict], *, new: int) -> None:
    """The closing summary; exit status 1 only if there is nothing at all to work with."""
    frames = sum(len(entry["times"]) if "times" in entry else entry["frames"] for entry in done)
    print(f"{len(done)} videos, {frames} frames in {index.parent} ({new} videos new)")
    noted = sorted(entry["video"] for entry in done if "note" in entry)
    if noted:
        print(f'{len(noted)} are not as they should be, "note" in {index} says what is amiss: {noted[0]}, ...')
    if failed:
        print(f"{len(failed)} failed, {index.parent / FAILED_NAME} says why; the first: {failed[0]['why']}")
    if not done:
        sys.exit("error: no video gave a frame")

"""Videos -> a frame folder (layout: narvid/frames.py). All cores, resumable, one run at a time for a folder.

  python scripts/extract_frames.py --videos DIR --out frames                    1 frame a second, the paper's choice
  python scripts/extract_frames.py --videos DIR --out frames_12 --num_frames 12 --list test.jsonl

A video's id is its file name without the last extension; folders below DIR are searched too. A video that gives no
frame is written to <out>/failed.jsonl with the reason and tried again by the next run; it never becomes a black frame.
Stopped at any moment, the same command continues and ends with the same files.
Here: which files, worker processes, what is done already. Not here: pixels and times (narvid/frames.py).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from tqdm import tqdm

from narvid import InputError
from narvid.frames import INDEX_NAME, decode_video, frame_path, parse_index_line

EXTENSIONS = (
    ".3g2", ".3gp", ".3gpp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip
FAILED_NAME = "failed.jsonl"
UNFINISHED = ".unfinished"  # folder inside --out; a hidden name is never a video's


class Job(NamedTuple):
    video: str
    source: Path
    out: Path
    fps: float | None
    n: int | None
    short_side: int
    quality: int


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Extract frames from videos.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--videos", type=Path, required=True, metavar="DIR", help="folder of video files, searched with its subfolders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the frame folder to write")
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument("--fps", type=_positive(float), default=1.0, help="frames per second of video")
    sampling.add_argument(
        "--num_frames", type=_positive(int), help="frames per video, uniform in time, in place of --fps"
    )
    parser.add_argument(
        "--short_side", type=_positive(int), default=256, help="pixels; larger pictures are shrunk to this"
    )
    parser.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100", default=95, help="of the jpgs")
    parser.add_argument("--workers", type=_positive(int), default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument(
        "--list", type=Path, nargs="+", metavar="JSONL", help='only the videos in these files ({"video": id} a line)'
    )
    return parser.parse_args(argv)


def _positive(kind):
    def convert(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


# ---- which videos ----


def find_videos(folder: Path) -> dict[str, Path]:
    """Video id -> file, sorted by id. Hidden files are passed over (file managers leave some with video names)."""
    if not folder.is_dir():
        raise InputError(f"--videos {folder} is not a folder")
    found: dict[str, Path] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() not in EXTENSIONS or name.startswith("."):
                continue
            if path.stem in found:
                raise InputError(
                    f"{found[path.stem]} and {path} have one id, {path.stem!r}: rename or remove one of them"
                )
            found[path.stem] = path
    if not found:
        raise InputError(f"no video in {folder}: no file ends in one of {' '.join(EXTENSIONS)}")
    return dict(sorted(found.items()))


def read_lists(paths: list[Path]) -> set[str]:
    """The video ids of JSON lines files such as test.jsonl."""
    ids = set()
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"--list {path} cannot be read: {e}") from e
        for number, line in enumerate(lines, 1):
            try:
                ids.add(str(json.loads(line)["video"]))
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f'{path}, line {number}: expected {{"video": id, ...}}') from e
    return ids


def read_done(out: Path, settings: dict) -> dict[str, dict]:
    """Video id -> line of the index file, of the videos whose frames are all there; what cannot be read is not done.

    Refuses a folder made with other settings, and one that this script did not make.
    """
    path = out / INDEX_NAME
    if not path.exists():
        if out.exists() and any(not name.startswith(".") for name in os.listdir(out)):
            raise InputError(
                f"{out} is in use and holds no {INDEX_NAME}, so nothing there may be replaced: give another --out"
            )
        return {}
    done = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_index_line(line)
        except ValueError:
            continue  # torn by a kill: that video is done again
        theirs = {name: entry.get(name) for name in settings}
        if theirs != settings:
            raise InputError(f"{out} holds frames made with {theirs}, this run asks for {settings}: give another --out")
        folder = out / entry["video"]
        if folder.is_dir() and len(os.listdir(folder)) == len(entry["times"]):
            done[entry["video"]] = entry
    return done


def write_lines(path: Path, entries: list[dict]) -> None:
    """Write JSON lines sorted by video, through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    lines = [json.dumps(entry) + "\n" for entry in sorted(entries, key=lambda entry: entry["video"])]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


# ---- the work ----


def extract_video(job: Job) -> dict:
    """In a worker: write a video's frames under a temporary name, then rename. Returns {"times", "note"} or {"why"}."""
    unfinished = job.out / UNFINISHED
    temporary = unfinished / job.video
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    times, notes = [], []
    try:
        shown = decode_video(job.source, fps=job.fps, n=job.n, short_side=job.short_side, notes=notes)
        for index, (seconds, pixels) in enumerate(shown):
            Image.fromarray(pixels).save(frame_path(unfinished, job.video, index), "JPEG", quality=job.quality)
            times.append(round(seconds, 3))
    except InputError as e:
        shutil.rmtree(temporary)
        return {"why": str(e)}
    folder = job.out / job.video
    shutil.rmtree(folder, ignore_errors=True)  # frames without a line in the index: a run was stopped in between
    os.replace(temporary, folder)
    return {"times": times, "note": "; ".join(notes)}


def start_worker() -> None:
    """A worker leaves Ctrl-C to its parent and ends with it, also when the parent is killed and cannot tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    fps, n = (None, args.num_frames) if args.num_frames else (args.fps, None)
    settings = {
        "sampling": f"{n} uniform" if n else f"{fps:g} fps",
        "short_side": args.short_side,
        "quality": args.quality,
    }
    videos = find_videos(args.videos)
    wanted = read_lists(args.list) if args.list else set(videos)
    done = read_done(args.out, settings)
    jobs = [
        Job(video, source, args.out, fps, n, args.short_side, args.quality)
        for video, source in videos.items()
        if video in wanted and video not in done
    ]
    tidy(args.out, done)
    absent = [{"video": v, "file": None, "why": f"no file of this name in {args.videos}"} for v in wanted - set(videos)]
    failed = absent + extract_all(jobs, args, settings, done)
    write_lines(args.out / INDEX_NAME, list(done.values()))
    write_lines(args.out / FAILED_NAME, failed)
    shutil.rmtree(args.out / UNFINISHED)
    report(args.out, [done[video] for video in wanted & set(done)], failed, new=len(jobs) - len(failed) + len(absent))


def tidy(out: Path, done: dict[str, dict]) -> None:
    """Make the folder, drop what a killed run left half written, and leave an index file that can be appended to."""
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / UNFINISHED)
    (out / UNFINISHED).mkdir()
    write_lines(out / INDEX_NAME, list(done.values()))


def extract_all(jobs: list[Job], args: argparse.Namespace, settings: dict, done: dict[str, dict]) -> list[dict]:
    """Run the jobs; every finished video joins `done` and, at once, the index file. Returns the failures."""
    failed = []
    with open(args.out / INDEX_NAME, "a", encoding="utf-8") as index, tqdm(total=len(jobs), unit="video") as bar:
        for job, result in run_jobs(jobs, args.workers):
            entry = {"video": job.video, "file": str(job.source.relative_to(args.videos))}
            bar.update()
            if "why" in result:
                failed.append({**entry, "why": result["why"]})
                continue
            entry = {"video": job.video, "times": result["times"], **settings, "source": entry["file"]}
            done[job.video] = {**entry, "note": result["note"]} if result["note"] else entry
            index.write(json.dumps(done[job.video]) + "\n")
            index.flush()
    return failed


def report(out: Path, done: list[dict], failed: list[dict], *, new: int) -> None:
    """The closing summary; exit status 1 only if there is nothing at all to work with."""
    frames = sum(len(entry["times"]) for entry in done)
    print(f"{len(done)} videos, {frames} frames in {out} ({new} videos new)")
    noted = sorted(entry["video"] for entry in done if "note" in entry)
    if noted:
        print(f'{len(noted)} gave less than they announce, "note" in {out / INDEX_NAME} says what: {noted[0]}, ...')
    if failed:
        print(f"{len(failed)} failed, {out / FAILED_NAME} says why; the first: {failed[0]['why']}")
    if not done:
        sys.exit("error: no video gave a frame")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")

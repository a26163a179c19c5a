"""How fast frames are read, and how soon training starts.

  python scripts/bench_frames.py --frames data/msrvtt/frames         frames a second of one core, several ways at once
  python scripts/bench_frames.py --startup 10000 --corpus fake_corpus  from start to first batch, on a corpus made there
  python scripts/bench_frames.py --startup 10000 --corpus fake_corpus --epoch --size 32   memory of the loader's workers

The ways of reading take turns, round after round, in one thread; printed are medians of the rounds, and the median of
the ratios to PIL with torchvision in the same round. "warm" counts the thread's processor time, so that others on the
machine hardly matter; "cold" counts the clock, the files' pages having been dropped before (posix_fadvise; names and
inodes stay in memory, which no program can drop for itself). The fake corpus has small pictures: it counts files.
--epoch goes through all its pairs with decoded frames in shared memory, so that it takes minutes. Needs Linux.

Here: measuring. Not here: the reading itself (narvid/data/frames.py, narvid/data/datasets.py).
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

import main_task_retrieval as trainer
from narvid.towers.tokenizer import Tokenizer
from narvid import InputError
from narvid.data.datasets import FrameDataset, Split, collate
from narvid.data.loader import PairSampler, make_loader
from narvid.distributed import World
from narvid.files import write_json_lines
from narvid.flags import command, count, positive
from narvid.data.frames import Picture, frame_paths, load_frame_index, read_frames
from narvid.data.narrations import load_narrations

K = 12  # frames read together: those of a video
REFERENCE = "PIL + torchvision, to floats"
SENTENCE = ("The picture shows a man and a woman who stand next to each other in a kitchen and prepare a meal. Both "
            "look at what they do; the man holds a knife and cuts vegetables on a wooden board. Around them several "
            "bowls, cups and bottles stand on the table.")  # as long as an answer to prompt C

# ------------------------------------------------------------------------------------------------- ways of reading


def pack(paths: list[str], packed: Path) -> dict[str, tuple[int, int]]:
    """All files one behind the other in one -> path -> (offset, length) in bytes."""
    index, offset = {}, 0
    with open(packed, "wb") as f:
        for path in paths:
            raw = Path(path).read_bytes()
            f.write(raw)
            index[path], offset = (offset, len(raw)), offset + len(raw)
        f.flush()
        os.fsync(f.fileno())  # only clean pages can be dropped
    return index


def ways_of_reading(paths: list[str], size: int, packed: Path) -> dict[str, Callable]:
    """Name -> function of K paths; those that give pixels give uint8 (K, 3, size, size), or floats of that shape."""
    index, file = pack(paths, packed), os.open(packed, os.O_RDONLY)
    transform = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), ToTensor()])

    def from_pack(some: list[str]) -> list[bytes]:
        return [os.pread(file, length, offset) for offset, length in map(index.__getitem__, some)]

    def with_opencv(some: list[str]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(_opencv_square(path, size)).permute(2, 0, 1) for path in some])

    return {
        REFERENCE: lambda some: torch.stack([transform(Image.open(path).convert("RGB")) for path in some]),
        "OpenCV, bilinear: other pixels": with_opencv,
        "read_frames, folders": lambda some: read_frames(some, Picture(size)),
        "read_frames, one packed file": lambda some: read_frames(
            [io.BytesIO(raw) for raw in from_pack(some)], Picture(size)),
        "bytes alone, folders": lambda some: [Path(path).read_bytes() for path in some],
        "bytes alone, one packed file": from_pack,
    }


def _opencv_square(path: str, size: int) -> np.ndarray:
    """imread, resize, crop as one usually writes it -> RGB (size, size, 3)."""
    picture = cv2.imread(path)
    height, width = picture.shape[:2]
    scale = size / min(height, width)
    picture = cv2.resize(picture, (max(size, int(width * scale)), max(size, int(height * scale))))
    top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
    return cv2.cvtColor(picture[top : top + size, left : left + size], cv2.COLOR_BGR2RGB)


def drop_pages(files: list[str]) -> None:
    """Take these files out of the page cache; the kernel may decline."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def bench_reading(paths: list[str], size: int, rounds: int, *, cold: bool) -> None:
    """Print frames a second of each way, and its ratio to the reference of the same rounds."""
    order = np.random.default_rng(0).permutation(len(paths) // K)
    groups = [paths[K * g :][:K] for g in order]
    with tempfile.TemporaryDirectory(dir=Path(paths[0]).parent.parent) as folder:  # the same disk
        packed = Path(folder, "packed")
        ways = ways_of_reading(paths, size, packed)
        seconds, clock = {name: [] for name in ways}, time.perf_counter if cold else time.thread_time
        for _ in range(rounds):
            for name, read in ways.items():
                if cold:
                    drop_pages([*paths, str(packed)])
                start = clock()
                for group in groups:
                    read(group)
                seconds[name].append((clock() - start) / (K * len(groups)))
    print(f"\n{'cold' if cold else 'warm':34} frames/s   ms a frame   x reference")
    for name, each in seconds.items():
        ratio = np.median(np.array(seconds[REFERENCE]) / each)
        print(f"{name:34} {1 / np.median(each):8.0f}   {1000 * np.median(each):10.3f}   {ratio:11.2f}")


def bench_text(rounds: int) -> None:
    """Print what the loader spends on words, beside its frames: a sentence of every frame and a query."""
    print(f"\n{'words, warm':34}   texts/s    ms a text")
    for name, text in (("a sentence", SENTENCE), ("a query", "a man and a woman are cooking in a kitchen")):
        seconds = []
        for number in range(rounds):
            texts = [f"{text} {number} {i}" for i in range(200)]
            start = time.thread_time()
            tokens, _ = Tokenizer({})(texts, 77)
            seconds.append((time.thread_time() - start) / len(texts))
        each = np.median(seconds)
        print(f"{f'{name}, {tokens.shape[1]} tokens':34} {1 / each:9.0f} {1000 * each:12.3f}")


# ----------------------------------------------------------------------------------------------------- the loader


def bench_loader(times: dict[str, list[float]], frames_dir: Path, size: int, workers: int, epochs: int) -> None:
    """Print frames a second from files to batches with so many workers, and what memory each has to itself."""
    videos = list(times)
    picks = [list(range(len(times[video]))) for video in videos]
    split = Split(videos, np.arange(len(videos)), videos, frames_dir, picks, None, [], 0)
    dataset = FrameDataset(split, np.tile(np.arange(len(videos)), 4), Picture(size), segments=K)
    to_batch = partial(collate, split=split, tokenize=Tokenizer({}), max_words=64, max_frames=K, with_queries=False)
    items = np.arange(len(dataset))
    batches = [items[i : i + 8].tolist() for i in range(0, len(items), 8)]
    loader = make_loader(dataset, to_batch, batches, num_workers=workers)
    speeds, memory = [], []
    for epoch in range(epochs):
        dataset.epoch.fill_(epoch)
        start = time.perf_counter()
        frames = sum(int(batch.mask.sum()) for batch in loader)
        speeds.append(frames / (time.perf_counter() - start))
        memory.append([private_memory(process.pid) for process in multiprocessing.active_children()])
    speed = np.median(speeds[1:])  # the first starts the workers
    kept = "; ".join(" ".join(f"{m:.0f}" for m in one) for one in zip(*memory)) or "-"
    print(f"{workers} workers   {speed:8.0f} frames/s   {speed / max(1, workers):8.0f} a worker   "
          f"MB of its own after each epoch: {kept}")


def private_memory(pid: int) -> float:
    """MB that no other process shares, of a process on Linux."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


# ----------------------------------------------------------------------------------------------------- the start


def make_corpus(folder: Path, videos: int) -> None:
    """`videos` of K frames with 20 queries each in train.jsonl for nine of ten, 1 in test.jsonl for the others."""
    jpg = io.BytesIO()
    Image.effect_noise((48, 32), 50).convert("RGB").save(jpg, "JPEG", quality=95)
    times = [float(k) for k in range(K)]
    index, narrations, pairs = [], [], {"train": [], "test": []}
    for v in range(videos):
        video = f"video{v}"
        (folder / "frames" / video).mkdir(parents=True)
        for path in frame_paths(folder / "frames", video, range(K)):
            Path(path).write_bytes(jpg.getvalue())
        index.append({"video": video, "times": times})
        sentences = [{"time": t, "text": f"a man with the number {v} stands at {t} s before a wooden table"}
                     for t in times]
        narrations.append({"video": video, "captioner": "none", "prompt": "", "sentences": sentences})
        split, number = ("test", 1) if v % 10 == 9 else ("train", 20)
        pairs[split] += [{"video": video, "query": f"person {q} does something with {v} things"} for q in range(number)]
    for name, entries in (("frames/index", index), ("narrations", narrations), *pairs.items()):
        write_json_lines(folder / f"{name}.jsonl", entries)


def bench_startup(corpus: Path, size: int, workers: int, sampling: str, *, cold: bool) -> None:
    """Print the seconds of what the trainer does before its first step, imports and model aside."""
    if cold:
        drop_pages([str(path) for path in corpus.rglob("*.*")])
    marks = []

    def mark():
        marks.append((time.perf_counter(), time.process_time()))

    argv = ["--data_dir", corpus, "--output_dir", "unused", "--frame_sampling", sampling, "--batch_size", 64]
    mark()
    args = trainer.parse_args([str(word) for word in argv])
    times = load_frame_index(args.frames)
    mark()
    load_narrations(args.narrations, times)
    mark()
    train = trainer.load_data(args, World(0, 1, torch.device("cpu")))["train"]  # reads both again
    mark()
    sampler = PairSampler(len(train.queries), args.batch_size, rank=0, world_size=1, seed=args.seed)
    segments = args.max_frames if sampling == "segments" else None
    dataset = FrameDataset(train, train.video_of_query, Picture(size), segments=segments, seed=args.seed)
    to_batch = partial(collate, split=train, tokenize=Tokenizer({}), max_words=args.max_words,
                       max_frames=args.max_frames, with_queries=True)
    next(iter(make_loader(dataset, to_batch, sampler, num_workers=workers)))
    mark()
    index, narrations, data, batch = np.diff(np.array(marks), axis=0)
    parts = {"frame index": index, "narrations": narrations,
             "splits, joined with both, and a look at every frame": data - index - narrations,
             f"first batch of {args.batch_size}, {workers} workers (their processor time is not counted)": batch,
             "in all": data + batch}
    print(f"\n{'cold' if cold else 'warm'}, {sampling}: {len(train.queries)} pairs of {len(train.videos)} videos\n"
          "  clock   processor (s)")
    for name, (clock, processor) in parts.items():
        print(f"{clock:7.1f} {processor:7.1f}   {name}")


def bench_epoch(corpus: Path, size: int, workers: int) -> None:
    """Print the memory that each worker has to itself while an epoch goes by.

    Python counts references inside its objects, so a worker that only reads a string gets a copy of its page: memory
    grows until every page of the split was touched, and then no more.
    """
    args = trainer.parse_args(["--data_dir", str(corpus), "--output_dir", "unused"])
    train = trainer.load_data(args, World(0, 1, torch.device("cpu")))["train"]
    sampler = PairSampler(len(train.queries), args.batch_size, rank=0, world_size=1, seed=args.seed)
    dataset = FrameDataset(train, train.video_of_query, Picture(size), cache=True)
    to_batch = partial(collate, split=train, tokenize=Tokenizer({}), max_words=args.max_words,
                       max_frames=args.max_frames, with_queries=True)
    shown = {max(1, round(sampler.steps * part)) for part in (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)}
    print(f"\n{workers} workers, {len(train.queries)} pairs\n   pairs   MB of its own, each worker")
    for step, _ in enumerate(make_loader(dataset, to_batch, sampler, num_workers=workers), 1):
        if step in shown:
            memory = (f"{private_memory(process.pid):.1f}" for process in multiprocessing.active_children())
            print(f"{step * args.batch_size:8}   {' '.join(memory)}", flush=True)


# ------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--frames", type=Path, help="folder of extracted frames: measure reading")
    what.add_argument("--startup", type=positive, metavar="VIDEOS", help="measure the start with so many videos")
    parser.add_argument("--corpus", type=Path, help="with --startup: folder to make the corpus in, or that has it")
    parser.add_argument("--frame_sampling", choices=["uniform", "segments"], default="uniform", help="with --startup")
    parser.add_argument("--epoch", action="store_true", help="with --startup: memory during an epoch instead")
    parser.add_argument("--size", type=positive, default=224, help="side in pixels")
    parser.add_argument("--rounds", type=positive, default=7, help="measurements of each way of reading")
    parser.add_argument("--max_videos", type=positive, default=100, help="of --frames")
    parser.add_argument("--num_workers", type=count, nargs="*", default=[1, 2], help="loader processes")
    args = parser.parse_args(argv)
    if args.startup and not args.corpus:
        parser.error("--startup makes a corpus: say where, --corpus DIR")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        if args.startup:
            if not (args.corpus / "test.jsonl").exists():
                make_corpus(args.corpus, args.startup)
            for workers in args.num_workers if args.epoch else ():
                bench_epoch(args.corpus, args.size, workers)
            for workers, cold in itertools.product(() if args.epoch else args.num_workers, (False, True)):
                bench_startup(args.corpus, args.size, workers, args.frame_sampling, cold=cold)
            return
        times = dict(list(load_frame_index(args.frames).items())[:args.max_videos])
        paths = [path for video in times for path in frame_paths(args.frames, video, range(len(times[video])))]
        if len(paths) < K:
            raise InputError(f"{args.frames}: {len(paths)} frames are too few to measure; extract {K} at least")
        with Image.open(paths[0]) as first:
            print(f"{len(paths)} frames of {len(times)} videos, the first {first.width} x {first.height}, "
                  f"{sum(map(os.path.getsize, paths)) / len(paths) / 1000:.1f} kB each -> {args.size} x {args.size}")
        for cold in (False, True):
            bench_reading(paths, args.size, args.rounds, cold=cold)
        bench_text(args.rounds)
        print()
        for workers in args.num_workers:
            bench_loader(times, args.frames, args.size, workers, epochs=6)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command(main)

"""How fast frames are extracted, beside the field's way, on the same clips in the same run.

  python scripts/bench_extract.py                          15-second clips of 320x240 made here, 30 frames a second
  python scripts/bench_extract.py --folder VIDEOS          your own videos

The field's way: OpenCV seeks to each second, reads one frame, PIL shrinks it; with OpenCV's own choice of threads, as
the field's code runs, and with one. Ours: decode_video, once from beginning to end, one thread. All in this process and
with the same jpg writer, taken in turns; medians over the repeats. Times are CPU time: what counts when every core
extracts, whatever else the machine does. Before that the pictures are compared in full size, each with the other way's
at the same second. Last, scripts/extract_frames.py with all its workers and their start, in real time.
Here: making clips, the field's loop, timing. Not here: our decoder (narvid/data/videos.py).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import cv2
import numpy as np
from narvid.data.extraction import find_videos, usable_cores
from PIL import Image

from narvid import InputError
from narvid.flags import Parser, command, positive
from narvid.data.decoding import CLOCK_TOLERANCE
from narvid.data.videos import decode_video
from narvid.progress import tqdm

SHORT_SIDE, QUALITY, RATE = 224, 95, 30  # pixels, of the jpgs, frames per second of the clips made here
COPIES = 4  # of every clip, for the whole script
Pictures = dict[int, np.ndarray]  # second -> uint8 RGB (H, W, 3)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process in one sentence."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--clips", type=positive, default=8, help="how many to make (default %(default)s); of --folder at most to take")
    add("--seconds", type=positive, default=15, help="of a clip made here (default %(default)s)")
    add("--size", type=size, default=(320, 240), metavar="WxH", help="of a clip made here (default 320x240)")
    add("--folder", type=Path, metavar="DIR", help="these videos in place of clips made here")
    add("--repeats", type=positive, default=5, help="of every measurement (default %(default)s)")
    return parser.parse_args(argv)


def size(text: str) -> tuple[int, int]:
    """'320x240' -> (320, 240)."""
    try:
        width, height = map(positive, text.split("x"))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 320x240") from e
    if width % 2 or height % 2:
        raise argparse.ArgumentTypeError(f"{text}: h264 needs even numbers")
    return width, height


def make_clip(path: Path, seconds: int, width: int, height: int, seed: int) -> None:
    """Write an h264 clip: a window that wanders over a blurred random picture, x264's usual settings and key frames."""
    noise = np.random.default_rng(seed).integers(0, 256, (2 * height, 2 * width, 3), np.uint8)
    scene = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * RATE):
            left, top = (round((1 + wave) / 2 * side) for wave, side in
                         ((np.sin(i / 40 + seed), width), (np.cos(i / 57), height)))
            window = np.ascontiguousarray(scene[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())


# ---- the two ways ----


def by_seeking(path: Path, short_side: int | None, threads: int = 1) -> Pictures:
    """The field's way: seek to the frame on screen at each second of the length that the header states.

    threads: of OpenCV's decoder; 0 is its own choice.
    """
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    rate, count = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    pictures = {}
    for second in range(int(np.ceil(count / rate - CLOCK_TOLERANCE)) if rate > 0 else 0):
        video.set(cv2.CAP_PROP_POS_FRAMES, int((second + CLOCK_TOLERANCE) * rate))
        read, pixels = video.read()
        if not read:
            break
        picture = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        scale = min(1.0, (short_side or np.inf) / min(picture.size))
        if scale < 1:
            picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
        pictures[second] = np.asarray(picture)
    video.release()
    return pictures


def by_decoding_once(path: Path, short_side: int | None) -> Pictures:
    """Ours. A frame's own time lies before the second at which it is on screen, by less than a frame."""
    shown = decode_video(path, fps=1, short_side=short_side)
    return {int(np.ceil(at - CLOCK_TOLERANCE)): pixels for at, pixels in shown}


def compare(clips: list[Path]) -> str:
    """One line: how many seconds both ways have a picture of, and how far the pictures differ."""
    differences, count = [], 0
    for clip in tqdm(clips, desc="comparing"):
        theirs, ours = by_seeking(clip, None), by_decoding_once(clip, None)
        count += len(theirs | ours)
        for second in theirs.keys() & ours.keys():
            differences.append(np.abs(theirs[second].astype(int) - ours[second]).mean())
    if not differences:
        raise InputError(f"OpenCV and PyAV have no second in common, {clips[0]} is the first video")
    return (
        f"pictures of {len(differences)} of {count} seconds compared: mean absolute difference "
        f"{np.mean(differences):.3f} of 255, the largest {max(differences):.3f}"
    )


# ---- timing ----


def measure(way: Callable[[Path, int], Pictures], clips: list[Path], folder: Path) -> tuple[float, float]:
    """CPU seconds for decoding all clips, and for writing their jpgs."""
    decoding = writing = 0.0
    for clip in clips:
        start = time.process_time()
        pictures = way(clip, SHORT_SIDE)
        decoded = time.process_time()
        for second, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / f"{second:05d}.jpg", "JPEG", quality=QUALITY)
        decoding += decoded - start
        writing += time.process_time() - decoded
    return decoding, writing


def measure_script(clips: list[Path], folder: Path) -> float:
    """Videos a second of the whole script, every clip COPIES times so that the start of the workers counts less."""
    videos = folder / "videos"
    videos.mkdir()
    for clip in clips:
        for copy in range(COPIES):
            (videos / f"{copy}_{clip.name}").symlink_to(clip.resolve())
    script = Path(__file__).with_name("extract_frames.py")
    command = [sys.executable, script, "--videos", videos, "--out", folder / "frames", "--short_side", str(SHORT_SIDE)]
    start = time.perf_counter()
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise InputError(f"extract_frames.py ended with {run.stderr.splitlines()[-1]}")
    return len(clips) * COPIES / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print the figures; returns our speed as multiples of OpenCV's with its own threads and with one:
    {"decoding": [x, x], "decoding and jpgs": [x, x]}.
    """
    args = parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clips = own_clips(args) if args.folder else make_clips(args, folder)
        print(compare(clips))
        ways = {"OpenCV": partial(by_seeking, threads=0), "OpenCV, 1 thread": by_seeking, "ours": by_decoding_once}
        times = {name: [] for name in ways}
        for _ in tqdm(range(args.repeats), desc="measuring"):
            for name, way in ways.items():
                times[name].append(measure(way, clips, folder))
        ratios = {}
        for what, parts in (("decoding", 1), ("decoding and jpgs", 2)):
            seconds = {name: median(sum(each[:parts]) for each in times[name]) for name in ways}
            rates = ", ".join(f"{name} {len(clips) / seconds[name]:.2f}" for name in ways)
            ratios[what] = [seconds[name] / seconds["ours"] for name in ways if name != "ours"]
            print(f"{what}, videos/s of one core: {rates}: {ratios[what][0]:.2f} x and {ratios[what][1]:.2f} x")
        rate = measure_script(clips, folder)
        print(f"extract_frames.py, {usable_cores()} workers, {len(clips) * COPIES} videos: {rate:.2f} videos/s")
    return ratios


def own_clips(args: argparse.Namespace) -> list[Path]:
    clips = list(find_videos(args.folder).values())[: args.clips]
    print(f"{len(clips)} videos of {args.folder}, medians of {args.repeats} repeats")
    return clips


def make_clips(args: argparse.Namespace, folder: Path) -> list[Path]:
    clips = [folder / f"{i}.mp4" for i in range(args.clips)]
    for seed, clip in enumerate(tqdm(clips, desc="making clips")):
        make_clip(clip, args.seconds, *args.size, seed)
    width, height = args.size
    print(f"{len(clips)} clips of {args.seconds} s, {width}x{height}, {RATE} fps, medians of {args.repeats} repeats")
    return clips


if __name__ == "__main__":
    command(main)

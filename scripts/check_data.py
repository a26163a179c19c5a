"""What a preset needs on disk: what is there, what is missing, what to do next; exit 0 when training can start.

python scripts/check_data.py msvd                        (or configs/msvd.yaml, or a preset of your own)

Reads the preset, the annotations, the index of the frames and the narrations; opens no picture (the trainer looks at
each before it starts) and changes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from narvid import InputError
from narvid.flags import command
from narvid.data.datasets import AGAIN, read_pairs
from narvid.data.frames import load_frame_index
from narvid.data.narrations import load_narrations
from narvid.files import read_json
from narvid.methods import METHODS
from narvid.run.settings import preset_flags

SPLITS = ("train", "val", "test")
NEEDED = ("train", "test")
PROTOCOL = {"msrvtt": "9k", "vatex": "hgr"}  # of the paper's tables, where a corpus has several


class Finding(NamedTuple):
    """One line of the screen; `todo` is the command that mends it, None where nothing is amiss."""

    what: str
    found: str
    todo: str | None


# ---- the preset ----


def preset_of(name: str) -> tuple[Path, argparse.Namespace]:
    """(its file, its flags) of a path, or of the name of a file in configs/."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "configs" / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in (ROOT / "configs").glob("*.yaml")))
        raise InputError(f"{path}: is not there; presets here: {there}")
    return path, preset_flags(str(path))


# ---- what is there ----


def check_annotations(data_dir: Path) -> tuple[Finding, dict[str, set[str]]]:
    """(finding, split -> ids of its videos)."""
    corpus = data_dir.name
    script = f"data/prepare_{corpus}.py"
    if not (ROOT / script).is_file():
        script = "data/prepare_<corpus>.py"
    protocol = f" --protocol {PROTOCOL[corpus]}" if corpus in PROTOCOL else ""
    todo = f"python {script} --annotations DIR{protocol} --videos VIDEOS --out {data_dir}   (files: data/README.md)"
    counts, videos = {}, {}
    for split in SPLITS:
        path = data_dir / f"{split}.jsonl"
        if path.is_file():
            ids = [video for _, video, _ in read_pairs(path)]
            videos[split], counts[split] = set(ids), (len(set(ids)), len(ids))
    if absent := [f"{split}.jsonl" for split in NEEDED if not videos.get(split)]:
        return Finding("annotations", f"no query in {' and '.join(absent)}", todo), videos
    found = ", ".join(f"{split} {v:,} videos {q:,} queries" for split, (v, q) in counts.items())
    prepared = read_prepared(data_dir / "prepared.json")
    if prepared is None:  # a corpus of one's own needs no prepare script
        unfinished = (ROOT / script).is_file()
        return Finding("annotations", f"{found}; no prepared.json", todo if unfinished else None), videos
    if counts != {split: (prepared["videos"][split], prepared["queries"][split]) for split in prepared["videos"]}:
        return Finding("annotations", f"{found}: not what prepared.json says; changed since?", todo), videos
    missing = f"; {len(prepared['missing']):,} missing videos left out" if prepared["missing"] else ""
    return Finding("annotations", f"{prepared['protocol']}: {found}{missing}", None), videos


def read_prepared(path: Path) -> dict | None:
    """prepared.json, None where there is none."""
    if not path.exists():
        return None
    prepared = read_json(path, dict, advice=AGAIN)
    counts = [prepared.get(name) for name in ("videos", "queries")]
    if not (isinstance(prepared.get("protocol"), str) and isinstance(prepared.get("missing"), list)
            and all(isinstance(of, dict) and all(type(n) is int for n in of.values()) for of in counts)
            and counts[0].keys() == counts[1].keys()):
        raise InputError(f"{path}: is not what the prepare scripts write; {AGAIN}")
    return prepared


def check_frames(frames_dir: Path, data_dir: Path, videos: set[str]) -> tuple[Finding, dict[str, list[float]]]:
    """(finding, video -> times in s of its frames)."""
    todo = f"python scripts/extract_frames.py --videos VIDEOS --out {frames_dir}"
    if data_dir.name.startswith("didemo"):
        todo += " --max_seconds 31"  # the annotated part, as CLIP4Clip takes it
    if rate := re.fullmatch(r"frames_(\d+)fps", frames_dir.name):
        todo += f" --fps {rate[1]}"
    try:
        times = load_frame_index(frames_dir)
    except InputError as error:
        return Finding("frames", str(error).split(": make the frames")[0], todo), {}
    here = [times[video] for video in videos if video in times]
    found = f"{len(here):,} of {len(videos):,} videos in {frames_dir}{_some(videos - times.keys())}"
    if here:
        found += f"; {sum(map(len, here)) / len(here):.1f} frames each"
    return Finding("frames", found, todo if len(here) < len(videos) else None), times


def check_narrations(path: Path, frames_dir: Path, times: Mapping[str, Sequence[float]], videos: set[str]) -> Finding:
    """Whether each video has a sentence. Whether sentences fit their frames: python -m narvid.narration check."""
    if not path.is_file():
        return Finding("narrations", f"no {path}", "get or make a narration file (data/README.md, Narrations)")
    try:
        narrations = load_narrations(path, times)
    except InputError as error:
        return Finding("narrations", str(error), f"python -m narvid.narration check {path} --frames {frames_dir}")
    narrated = {video for video in videos
                if video in narrations and any(s.strip() for s in narrations[video].sentences)}
    captioners = sorted({narrations[video].captioner for video in narrated})
    found = f"{len(narrated):,} of {len(videos):,} videos in {path}{_some(videos - narrated)}"
    if captioners:
        found += f"; by {', '.join(captioners[:3])}"
    todo = "narrate the rest (data/README.md, Narrations), or train with --missing_narration skip-video"
    return Finding("narrations", found, todo if len(narrated) < len(videos) else None)


def check_speech(path: Path, frames_dir: Path, times: Mapping[str, Sequence[float]], videos: set[str]) -> Finding:
    """In how many videos somebody speaks; the others are silent, which is nothing to mend."""
    todo = f"python -m narvid.narration import SUBTITLES --frames {frames_dir} --out {path}   (docs/narration.md)"
    if not path.is_file():
        return Finding("speech", f"no {path}", todo)
    try:
        said = load_narrations(path, times)
    except InputError as error:
        return Finding("speech", str(error), todo)
    spoken = sum(video in said and any(s.strip() for s in said[video].sentences) for video in videos)
    return Finding("speech", f"in {spoken:,} of {len(videos):,} videos somebody speaks, by {path}",
                   None if spoken else todo)


def _some(missing: Iterable[str]) -> str:
    """(missing: a, b, c, ...) or nothing."""
    names = sorted(missing)
    return f" (missing: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


# ---- the screen ----


def check(path: Path, flags: argparse.Namespace, data_dir: Path) -> list[Finding]:
    """Everything the preset needs, in the order in which it is made."""
    annotations, of_split = check_annotations(data_dir)
    videos = set().union(*of_split.values())
    frames_dir = Path(flags.frames or data_dir / "frames")
    frames, times = check_frames(frames_dir, data_dir, videos)
    findings = [annotations, frames]
    reads = METHODS[flags.method].reads(flags)
    if "titles" in reads:
        for titles in flags.titles or [data_dir / "titles.json"]:
            found, todo = ("there", None) if Path(titles).is_file() else ("missing", "get the titles (data/README.md)")
            findings.append(Finding("titles", f"{titles} {found}", todo))
    if "narration" in reads and flags.sentence != "speech":
        narrations = Path(flags.narrations or data_dir / "narrations.jsonl")
        findings.append(check_narrations(narrations, frames_dir, times, videos))
    if flags.sentence != "caption":
        findings.append(check_speech(Path(flags.speech or data_dir / "speech.jsonl"), frames_dir, times, videos))
    return findings


def main(argv: list[str] | None = None) -> None:
    """Print the screen; exit 1 where something is missing."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="what a preset needs on disk, and what is there")
    parser.add_argument("preset", help="name of a file in configs/ without .yaml, or a path")
    parser.add_argument("--data_dir", type=Path, help="look there instead of where the preset says")
    args = parser.parse_args(argv)
    try:
        path, flags = preset_of(args.preset)
        findings = check(path, flags, args.data_dir or Path(flags.data_dir))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for what, found, todo in findings:
        print(f"{'[ ]' if todo else '[x]'} {what:12} {found}")
    todo = next((finding.todo for finding in findings if finding.todo), None)
    if todo and (ROOT / "scripts" / f"{path.stem}.sh").is_file():
        todo = f"bash scripts/{path.stem}.sh   (makes all of it)"  # the demo
    print(f"next: {todo or train_command(path)}")
    sys.exit(1 if todo else 0)


def train_command(path: Path) -> str:
    """How training with this preset is started."""
    corpus, _, size = path.stem.partition("_")
    if path.parent.resolve() == ROOT / "configs" and (ROOT / "scripts" / f"train_{corpus}.sh").is_file():
        return f"bash scripts/train_{corpus}.sh {size}".strip()
    return f"python main_task_retrieval.py --config {path} --output_dir runs/{path.stem}"


if __name__ == "__main__":
    command(main)

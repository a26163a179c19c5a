"""What of a narration file is done: the journals of the shards that make it, and the file that is made of them.

A shard appends every sentence at once to its own journal, <OUT>.parts/<shard>-of-<n>.jsonl, one captioned frame a line:
  {"video", "time": of that frame, "shared": [times of the frames that share its sentence], "text" or "why" there is
  none, "captioner", "prompt"}
Whoever starts reads all journals and OUT. So a kill costs the frames in hand and nothing else, and the number of shards
may change between two runs. OUT's own videos stay. Not here: frames, models, flags (narrate.py, captioners.py).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from narvid import InputError
from narvid.data.narrations import Narration, load_narrations, write_narrations

ENTRY = {"video", "time", "shared", "captioner", "prompt"}


class Shard(NamedTuple):
    """Part `index` (from 0) of `n`; `shows`: whether this process draws the progress bar."""

    index: int
    n: int
    shows: bool


class Known(NamedTuple):
    """What journals and OUT hold: (captioner, prompt) or None, and video -> time -> sentence or reason for none."""

    maker: tuple[str, str] | None
    texts: dict[str, dict[float, str]]
    failed: dict[str, dict[float, str]]


def my_shard(text: str | None, environ: Mapping[str, str] = os.environ) -> Shard:
    """The part that --shard i/n names, else this task of a Slurm job array; divided among torchrun's ranks, if any."""
    index, n = 0, 1
    if text:
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise InputError(f"--shard {text}: expected i/n with i from 1 to n, such as 2/8")
        index, n = int(first) - 1, int(second)
    elif "SLURM_ARRAY_TASK_COUNT" in environ:
        task, start = int(environ["SLURM_ARRAY_TASK_ID"]), int(environ["SLURM_ARRAY_TASK_MIN"])
        index = (task - start) // int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        n = int(environ["SLURM_ARRAY_TASK_COUNT"])
        if index >= n:
            raise InputError(f"task {task} of a Slurm array of {n}: the array has gaps; give --shard i/n instead")
    rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    return Shard(index * size + rank, n * size, rank == 0)


# ---- what is captioned already ----


def parts_folder(out: Path) -> Path:
    """Where the journals of a narration file lie."""
    return out.with_name(out.name + ".parts")


def read_known(out: Path, maker: tuple[str, str] | None) -> Known:
    """All journals, then OUT; InputError where one was made otherwise than by `maker`, or where two sentences disagree.

    maker None (--merge): whatever the first line says; the others must say the same.
    """
    known, texts_from = Known(maker, {}, {}), {}
    for where, entry in _entries(out):
        known = _same_maker(known, (entry["captioner"], entry["prompt"]), where)
        for moment in map(float, (entry["time"], *entry["shared"])):
            if "text" in entry:
                _add(known, texts_from, entry["video"], moment, entry["text"], where)
            else:
                known.failed.setdefault(entry["video"], {})[moment] = entry["why"]
    if out.exists():
        for video, narration in load_narrations(out).items():
            known = _same_maker(known, (narration.captioner, narration.prompt), f"{out}, video {video}")
            for moment, text in zip(narration.times, narration.sentences, strict=True):
                if text.strip():
                    _add(known, texts_from, video, moment, text, f"{out}, video {video}")
    return known


def _entries(out: Path) -> Iterator[tuple[str, dict]]:
    """(file and line, entry) of every line of every journal; a torn one, behind the last line break, does not count."""
    for path in sorted(parts_folder(out).glob("*-of-*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line_number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
                if not ENTRY <= entry.keys():
                    raise ValueError(f"no {ENTRY}")
            except (ValueError, AttributeError) as error:
                raise InputError(
                    f"{path}, line {line_number} is damaged; delete that line, its frame is then captioned again"
                ) from error
            yield f"{path}, line {line_number}", entry


def _same_maker(known: Known, made_by: tuple[str, str], where: str) -> Known:
    if known.maker in (None, made_by):
        return known._replace(maker=made_by)
    theirs, ours = (" with prompt ".join(map(repr, maker)) for maker in (made_by, known.maker))
    raise InputError(f"{where} was made by {theirs}, this run is {ours}: use the same flags, or give another --out")


def _add(known: Known, texts_from: dict, video: str, moment: float, text: str, where: str) -> None:
    if known.texts.setdefault(video, {}).setdefault(moment, text) != text:
        raise InputError(
            f"{where}: {video} has another sentence at {moment} s than in {texts_from[video, moment]}; delete one"
        )
    texts_from.setdefault((video, moment), where)


def check_times(out: Path, known: Known, times: Mapping[str, list[float]]) -> None:
    """InputError if a sentence stands at a time at which its video has no frame (any more)."""
    for video, told in known.texts.items():
        if stray := set(told) - set(times.get(video, told)):
            raise InputError(
                f"{out}: {video} has a sentence at {min(stray)} s and no frame there: its frames were extracted anew; "
                "give another --out"
            )


def open_journal(out: Path, shard: Shard) -> TextIO:
    """This shard's journal, to append to: locked against a second process, its torn last line cut off."""
    folder = parts_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shard.index + 1}-of-{shard.n}.jsonl"
    journal = open(path, "a", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another process: shard {shard.index + 1} runs already") from None
    except OSError:
        pass  # a disk without locks
    journal.truncate(path.read_bytes().rfind(b"\n") + 1)
    return journal


def append(journal: TextIO, maker: tuple[str, str], video: str, moment: float, shared: Sequence[float], *,
           text: str | None, why: str | None) -> None:
    """One captioned frame's line: its sentence, or why it has none; out of this process's hands when this returns."""
    entry = {"video": video, "time": moment, "shared": list(shared)} | ({"why": why} if why else {"text": text})
    entry |= {"captioner": maker[0], "prompt": maker[1]}
    journal.write(json.dumps(entry, ensure_ascii=False) + "\n")
    journal.flush()


# ---- the narration file ----


def failed_file(out: Path) -> Path:
    """Where the frames without a sentence are listed."""
    return out.with_name(f"{out.stem}.failed.jsonl")


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Held while a shard looks what is there and writes OUT: a shard that looked earlier must not write later."""
    parts_folder(out).mkdir(parents=True, exist_ok=True)
    with open(parts_folder(out) / "lock", "w") as lock:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_out(out: Path, known: Known, times: Mapping[str, list[float]]) -> int:
    """Write the narrations and the list of failed frames, in the order of the frame index; returns how many failed."""
    order = [*times, *(video for video in known.texts if video not in times)]
    told = [(video, sorted(known.texts[video].items())) for video in order if video in known.texts]
    failed = [{"video": video, "time": moment, "why": why} for video in times if video in known.failed
              for moment, why in sorted(known.failed[video].items()) if moment not in known.texts.get(video, ())]
    failed_file(out).unlink(missing_ok=True)
    if failed:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in failed)
        temporary = failed_file(out).with_suffix(".tmp")
        temporary.write_text(lines, encoding="utf-8")
        os.replace(temporary, failed_file(out))
    made_by = known.maker
    write_narrations(out, ((video, Narration(*made_by, *map(list, zip(*pairs, strict=True)))) for video, pairs in told))
    return len(failed)

"""What of a narration file is done: the journals of the shards that make it, and the file that is made of them.

A shard appends every sentence at once to its own journal, <OUT>.parts/<shard>-of-<n>.jsonl, and answers to batch files
(batches.py) go to <set>-of-batch.jsonl, one captioned frame a line:
  {"video", "time": of that frame, "shared": [times of the frames that share its sentence], "text" or "why" there is
  none, "kind": of answers.KINDS, left out for a whole sentence, "again": how often it was asked again, if it was,
  "captioner", "prompt"}
Whoever starts reads all journals and OUT. So a kill costs the frames in hand and nothing else, and the number of shards
may change between two runs. OUT's own videos stay. Of several answers to a frame a sentence counts before half of one,
that before a refusal, that before none, then the newest: whatever journals they stand in, nothing gets lost by asking
again. Not here: frames, models, flags (narrate.py, captioners.py).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from narvid import InputError
from narvid.files import appending, lock, read_json_lines, remove, write_json_lines
from narvid.narration.answers import KINDS, Cut, Failed, is_refusal, kind_of
from narvid.data.narrations import Narration, load_narrations, write_narrations

MEND = "delete that line, its frame is then captioned again"


class Shard(NamedTuple):
    """Part `index` (from 0) of `n`; `shows`: whether this process draws the progress bar."""

    index: int
    n: int
    shows: bool

    @property
    def journal(self) -> str:
        """The name of its journal."""
        return f"{self.index + 1}-of-{self.n}"


class Answer(NamedTuple):
    """What is known of a frame: its sentence or Failed, how often it was asked again, and where that stands."""

    said: str | Failed
    again: int
    where: str

    @property
    def rank(self) -> tuple[int, int]:
        """Of two answers the one with the higher rank counts."""
        if isinstance(self.said, Failed):
            return 0, self.again
        return (1 if is_refusal(self.said) else 2 if isinstance(self.said, Cut) else 3), self.again


class Known(NamedTuple):
    """What journals and OUT hold: (captioner, prompt) or None, and video -> time -> the answer that counts."""

    maker: tuple[str, str] | None
    answers: dict[str, dict[float, Answer]]

    def texts(self, video: str) -> dict[float, str]:
        """Time -> sentence, of one video."""
        return {moment: answer.said for moment, answer in self.answers.get(video, {}).items()
                if not isinstance(answer.said, Failed)}


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


def made_by(out: Path) -> tuple[str, str] | None:
    """(captioner, prompt) of the first sentence there is, in the journals or in OUT; None where there is none."""
    for _, entry in _entries(out):
        if "text" in entry:
            return entry["captioner"], entry["prompt"]
    for narration in load_narrations(out).values() if out.exists() else ():
        return narration.captioner, narration.prompt
    return None


def read_known(out: Path, maker: tuple[str, str] | None) -> Known:
    """All journals, then OUT; InputError where one was made otherwise than by `maker`, or where two sentences disagree.

    maker None (--merge): whatever the first sentence says; the others must say the same. A failure of another maker
    does not count: nothing of it reaches OUT.
    """
    known, superseded = Known(maker, {}), set()
    for where, entry in _entries(out):
        made = entry["captioner"], entry["prompt"]
        if "text" in entry:
            known = _same_maker(known, made, where)
        elif known.maker not in (None, made):
            continue
        said = said_in(entry)
        for moment in map(float, (entry["time"], *entry["shared"])):
            _add(known, superseded, entry["video"], moment, Answer(said, entry.get("again", 0), where))
    if out.exists():
        for video, narration in load_narrations(out).items():
            known = _same_maker(known, (narration.captioner, narration.prompt), f"{out}, video {video}")
            for moment, text in zip(narration.times, narration.sentences, strict=True):
                if text.strip() and (video, moment, text) not in superseded:
                    _add(known, superseded, video, moment, Answer(text, 0, f"{out}, video {video}"))
    return known


def _entries(out: Path) -> Iterator[tuple[str, dict]]:
    """(file and line, entry) of every line of every journal; a torn one, behind the last line break, does not count."""
    for path in sorted(parts_folder(out).glob("*-of-*.jsonl")):
        for line, entry in read_json_lines(path, advice=MEND, whole=True):
            if not _is_entry(entry):
                raise InputError(f"{path}:{line}: no line of a journal; {MEND}")
            yield f"{path}:{line}", entry


def said_in(entry: dict) -> str | Failed:
    """What a journal's line holds."""
    if "text" not in entry:
        return Failed(entry["why"], entry.get("kind", "failed"))
    return Cut(entry["text"]) if entry.get("kind") == "cut" else entry["text"]


def _is_entry(entry: dict) -> bool:
    """Whether a line is what `append` writes."""
    if not isinstance(entry.get("shared"), list):
        return False
    texts = [entry.get(key) for key in ("video", "captioner", "prompt", "text" if "text" in entry else "why")]
    times = [entry.get("time"), *entry["shared"]]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(time) in (int, float) and 0 <= time < 1e9 for time in times)
        and entry.get("kind", "failed") in tuple(KINDS)
        and type(entry.get("again", 0)) is int
    )


def _same_maker(known: Known, made: tuple[str, str], where: str) -> Known:
    if known.maker in (None, made):
        return known._replace(maker=made)
    theirs, ours = (" with prompt ".join(map(repr, maker)) for maker in (made, known.maker))
    raise InputError(f"{where} was made by {theirs}, this run is {ours}: use the same flags, or give another --out")


def _add(known: Known, superseded: set, video: str, moment: float, new: Answer) -> None:
    """Keep the answer that counts; `superseded`: (video, time, text) of those that do not."""
    old = known.answers.setdefault(video, {}).setdefault(moment, new)
    if old.said == new.said:
        return
    if old.rank[0] == new.rank[0] == 3:  # nobody asks again for a whole sentence
        raise InputError(f"{new.where}: {video} has another sentence at {moment} s than in {old.where}; delete one")
    worse, better = (old, new) if old.rank <= new.rank else (new, old)
    known.answers[video][moment] = better
    superseded.add((video, moment, worse.said))


def check_times(out: Path, known: Known, times: Mapping[str, list[float]]) -> None:
    """InputError if a sentence stands at a time at which its video has no frame (any more)."""
    for video in known.answers:
        if stray := set(known.texts(video)) - set(times.get(video, known.texts(video))):
            raise InputError(
                f"{out}: {video} has a sentence at {min(stray)} s and no frame there: its frames were extracted anew; "
                "give another --out"
            )


@contextmanager
def open_journal(out: Path, name: str) -> Iterator[TextIO]:
    """A shard's journal, to append to: no second process has it, and its torn last line is cut off."""
    path = parts_folder(out) / f"{name}.jsonl"
    with lock(path.parent, f".{path.stem}.lock"), appending(path) as journal:
        yield journal


def append(journal: TextIO, maker: tuple[str, str], video: str, moment: float, shared: Sequence[float],
           said: str | Failed, again: int) -> None:
    """One captioned frame's line: its sentence, or why it has none; out of this process's hands when this returns."""
    entry = {"video": video, "time": moment, "shared": list(shared)}
    entry |= {"why": said.why} if isinstance(said, Failed) else {"text": said}
    entry |= {"kind": kind} if (kind := kind_of(said)) else {}
    entry |= {"again": again} if again else {}
    entry |= {"captioner": maker[0], "prompt": maker[1]}
    journal.write(json.dumps(entry, ensure_ascii=False) + "\n")
    journal.flush()


# ---- the narration file ----


def failed_file(out: Path) -> Path:
    """Where the frames without a whole sentence are listed."""
    return out.with_name(f"{out.stem}.failed.jsonl")


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Held while a shard looks what is there and writes OUT: a shard that looked earlier must not write later."""
    with lock(parts_folder(out), wait=True):
        yield


def write_out(out: Path, known: Known, times: Mapping[str, list[float]]) -> Counter[tuple[str, bool]]:
    """Write the narrations and, in OUT's .failed.jsonl, every answer that is no whole sentence, in the index's order.

    Returns how many of each: (kind of answers.KINDS, whether its text stands in OUT all the same) -> number.
    """
    order = [*times, *(video for video in known.answers if video not in times)]
    with_sentence = [(video, sorted(texts.items())) for video in order if (texts := known.texts(video))]
    entries, counts = [], Counter()
    for video in times:
        for moment, (said, _, _) in sorted(known.answers.get(video, {}).items()):
            if kind := kind_of(said):
                failed = isinstance(said, Failed)
                counts[kind, not failed] += 1
                entry = {"video": video, "time": moment, "kind": kind}
                entry |= {"why": said.why} if failed else {"why": KINDS[kind], "text": said}
                entries.append(entry)
    remove(failed_file(out))
    if entries:
        write_json_lines(failed_file(out), entries)
    maker = known.maker
    write_narrations(out, ((video, Narration(*maker, *map(list, zip(*pairs, strict=True))))
                           for video, pairs in with_sentence))
    return counts

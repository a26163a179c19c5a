"""What came back for a set of requests (batches.py) -> the narration file, with the checks and the report of the loop.

  python -m narvid.narration answers DIR --out narrations.jsonl

Files in DIR/answers may be in any order and hold lines of errors, repeats and half a last line; each answer is named
after its request. Not here: what an answer is worth (chat.py), what counts of several (journals.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from narvid import InputError
from narvid.data.frames import load_frame_index
from narvid.files import read_json_lines, read_lines, walk
from narvid.flags import Parser
from narvid.narration.answers import KINDS, Failed, kind_of
from narvid.narration.batches import CHECKS, read_jobs, read_set
from narvid.narration.chat import Chat, message_of
from narvid.narration.journals import (Answer, Known, append, check_times, one_at_a_time, open_journal, read_known,
                                       said_in)
from narvid.narration.narrate import write_whole
from narvid.narration.pictures import check_sees
from narvid.parsing import parse_json

UNANSWERED = Failed("no answer came back")


class Came(NamedTuple):
    """What came back: request -> its best answer, and how many lines were repeats or could not be read."""

    said: dict[str, str | Failed]
    repeats: int
    unreadable: list[str]  # file and line of each


def read_answers(folder: Path, of_set: dict, jobs: Mapping[str, dict], chat: Chat) -> Came:
    """All files of DIR/answers; InputError where one answers another set, or there is none.

    Of several answers to a request a sentence counts before half of one, that before a refusal, that before none.
    """
    names = {*jobs, *(f"{of_set['set']}-{check}" for check in CHECKS)}
    said, repeats, unreadable = {}, 0, []
    for path in _answer_files(folder / "answers"):
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line, path, line=number)
                request = entry.get("custom_id") if isinstance(entry, dict) else None
            except InputError:  # an engine that was killed, or writes at this moment
                request = None
            if not isinstance(request, str):
                unreadable.append(f"{path}:{number}")
                continue
            if request not in names:
                raise InputError(f"{path}:{number}: answers {request[:60]!r}, which is no request of {folder} (its set "
                                 f"is {of_set['set']}); take that file away, it belongs to another set")
            answer = _of_entry(entry, chat)
            repeats += request in said
            if request not in said or Answer(answer, 0, "").rank > Answer(said[request], 0, "").rank:
                said[request] = answer
    return Came(said, repeats, unreadable)


def _answer_files(folder: Path) -> list[Path]:
    files = [Path(parent, name) for parent, names in walk(folder) for name in names
             if name.endswith((".jsonl", ".json"))] if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: no answers there; put the files that came back into it (*.jsonl)")
    return files


def _of_entry(entry: dict, chat: Chat) -> str | Failed:
    """What one line of an answer file says."""
    response, error = entry.get("response"), entry.get("error")
    if isinstance(response, dict) and response.get("body") is not None:
        status = response.get("status_code", 200)
        return chat.answer(status if type(status) is int else 400, response["body"])
    error = {"message": error} if isinstance(error, str) else error
    error = error.get("error") or error if isinstance(error, dict) else {}
    code = error.get("code") if isinstance(error, dict) else None
    return chat.failed(message_of(error) if error else "the line has neither an answer nor an error", code)


def answers(argv: Sequence[str] | None = None) -> None:
    """`answers`: take in what came back and, if nothing is awaited, write the narration file."""
    parser = Parser(prog="python -m narvid.narration answers", allow_abbrev=False,
                    description="Read what came back for the requests of a folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `requests` wrote; answers lie in DIR/answers")
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL", help="narration file, kept and added to")
    parser.add_argument("--frames", type=Path, metavar="DIR", help="where the frames lie now, if they have moved")
    parser.add_argument("--give_up", action="store_true", help="requests without an answer count as failed")
    args = parser.parse_args(argv)
    of_set = read_set(args.folder)
    chat = Chat(of_set["model"], of_set["prompt"], shown=of_set["model"], without=of_set["without"],
                **{name: of_set[name] for name in ("max_new_tokens", "temperature", "seed", "one_sentence")})
    jobs = read_jobs(args.folder, of_set)
    times = load_frame_index(args.frames or of_set["frames"])
    came = read_answers(args.folder, of_set, jobs, chat)
    _check_sees(of_set, jobs, came.said)
    maker = of_set["captioner"], of_set["prompt"]
    with one_at_a_time(args.out):
        known = read_known(args.out, maker)
        check_times(args.out, known, times)
        kinds, awaited = _take_in(args.out, of_set, jobs, came.said, known, maker, give_up=args.give_up)
        _say(came, kinds, len(jobs))
        if awaited:
            where = ", ".join(f"{file} ({n})" for file, n in sorted(awaited.items())[:5])
            print(f"{awaited.total()} requests have no answer yet, of {where}: put the rest into "
                  f"{args.folder / 'answers'} and run this again, or add --give_up, then they count as failed; "
                  f"{args.out} is not written")
            return
        write_whole(args.out, read_known(args.out, maker), times)


def _take_in(out: Path, of_set: dict, jobs: Mapping[str, dict], said: Mapping[str, str | Failed], known: Known,
             maker: tuple[str, str], *, give_up: bool) -> tuple[Counter[str], Counter[str]]:
    """Append to the set's journal what it lacks -> (kinds of what is new, files of the requests that are awaited)."""
    kinds, awaited, name = Counter(), Counter(), f"{of_set['set']}-of-batch"
    with open_journal(out, name) as journal:
        ours = {(entry["video"], float(entry["time"])): Answer(said_in(entry), entry.get("again", 0), "")
                for _, entry in read_json_lines(journal.name, whole=True)}
        for request, job in jobs.items():
            place = job["video"], float(job["time"])
            old = known.answers.get(place[0], {}).get(place[1])
            if old is not None and old.rank[0] == 3:  # a whole sentence, of another set perhaps: nothing is better
                continue
            answer = said.get(request, UNANSWERED if give_up and place not in ours else None)
            if answer is None:
                awaited[job["file"]] += place not in ours
            elif place not in ours or Answer(answer, job["again"], "").rank > ours[place].rank:
                append(journal, maker, *place, job["shared"], answer, job["again"])
                kinds[kind_of(answer)] += 1
    return kinds, +awaited


def _say(came: Came, kinds: Counter[str], requests: int) -> None:
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)
    print(f"{len(came.said)} of {requests + len(CHECKS)} requests are answered, {came.repeats} lines are repeats; new: "
          f"{kinds.total()}, of them {counts}")
    if came.unreadable:
        print(f"{len(came.unreadable)} lines are no answers and do not count, such as {came.unreadable[0]}")


class _Given:
    """Answers that are there already, in a captioner's form."""

    def __init__(self, of_label: str):
        self.label = of_label

    def caption(self, pictures: Sequence[str], keys: Sequence[str] | None = None) -> list[str]:
        return list(pictures)


def _check_sees(of_set: dict, jobs: Mapping[str, dict], said: Mapping[str, str | Failed]) -> None:
    """As before a run of `narrate`: InputError where different pictures get one and the same sentence."""
    made = [said.get(f"{of_set['set']}-{check}") for check in CHECKS]
    of_videos = {job["video"]: said[name] for name, job in jobs.items() if isinstance(said.get(name), str)}
    first, *others = of_videos.values() if len(of_videos) > 1 else [None]
    pairs = [made, [first, next((other for other in others if other != first), first)]]
    if pairs := [pair for pair in pairs if all(isinstance(answer, str) for answer in pair)]:
        check_sees(_Given(of_set["captioner"]), pairs)

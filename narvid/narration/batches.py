"""Narration through batch files, the form that OpenAI's Batch API, `vllm run-batch` and hosted services read.

  python -m narvid.narration requests FRAMES --out DIR --model NAME
  vllm run-batch -i DIR/requests-00001.jsonl -o DIR/answers/00001.jsonl --model NAME          or any other engine
  python -m narvid.narration answers DIR --out narrations.jsonl

DIR holds one set of requests and never another: set.json (what is asked, and of whom), jobs.jsonl (a request's frame,
and the frames that share its sentence) and requests-NNNNN.jsonl. Every request is named after its set, so an answer to
another set is known. What comes back is put into DIR/answers/, in any order, as often as one likes. `answers` appends
it to a journal of OUT's (journals.py) before it writes OUT, so a kill costs nothing; the same command continues.
Here: writing a set and reading it. Not here: what a request says (chat.py), which frames (narrate.py), what came back
(batch_answers.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from narvid import InputError
from narvid.data.frames import check_jpg, load_frame_index
from narvid.files import lock, read_json, read_json_lines, write_json, write_json_lines, writing
from narvid.flags import Parser, WithDefaults, positive, positive_float
from narvid.narration.asking import Job
from narvid.narration.chat import INSTEAD, Chat, data_url
from narvid.narration.journals import Known, Shard, check_times, read_known
from narvid.narration.narrate import (decoding, how_to_ask, label, plan, wanted_frames, what_to_ask_again,
                                      which_frames)
from narvid.narration.pictures import made_pictures
from narvid.narration.preparing import read_picture
from narvid.progress import tqdm

REQUESTS, MEGABYTES = 50_000, 200  # of a file, the most that OpenAI takes; MB of a million bytes
URL = "/v1/chat/completions"
CHECKS = ("check-1", "check-2")  # requests about made pictures: different ones must get different answers
AGAIN = "write the requests again, into another folder"


class Line(NamedTuple):
    """One request: its name, whose picture it is about, and how many bytes it has."""

    name: str
    job: Job | None  # None: a made picture
    picture: int  # of made_pictures
    size: int


# ---- requests ----


def requests(argv: Sequence[str] | None = None) -> None:
    """`requests`: write a set of request files about the frames that have no sentence yet."""
    args = _request_flags(argv)
    chat = Chat(args.model, args.prompt, shown=args.model, without=args.without, **decoding(args))
    times = load_frame_index(args.frames)
    wanted = wanted_frames(args, times)
    maker = label(chat, args)
    known = Known(maker, {})
    if args.narrations:
        known = read_known(args.narrations, maker)
        check_times(args.narrations, known, times)
    jobs = plan(args, times, wanted, known, Shard(0, 1, True))
    if not jobs:
        print(f"nothing to ask: every frame has a sentence in {args.narrations}, or its kind is not in --again")
        return
    with lock(args.out):
        files = write_set(args, chat, maker, jobs)
    shared = sum(len(job.shared) for job in jobs)
    print(f"{args.out}: {len(jobs)} requests in {len(files)} files, {sum(files.values()) / 1e6:.1f} MB; {shared} "
          f"frames share a neighbour's sentence ({shared / (len(jobs) + shared):.1%}); {maker[0]}")
    allowed = f" --allowed-local-media-path {Path(args.frames).absolute()}" if args.pictures == "file" else ""
    first = args.out / next(iter(files))
    print(f"put what comes back into {args.out / 'answers'}, such as by\n  vllm run-batch -i {first} -o "
          f"{args.out / 'answers' / first.name} --model {args.model}{allowed}\nthen python -m narvid.narration answers "
          f"{args.out} --out {args.narrations or 'narrations.jsonl'}")


def _request_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m narvid.narration requests", allow_abbrev=False,
                    description="Write batch files that ask about frames.",
                    formatter_class=WithDefaults)
    parser.add_argument("frames", type=Path, help="frame folder, of extract_frames.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this set")
    group = parser.add_argument_group("frames")
    group.add_argument("--narrations", type=Path, metavar="JSONL",
                       help="where the answers will go: what it has already is not asked")
    which_frames(group)
    what_to_ask_again(group)
    group = parser.add_argument_group("request")
    group.add_argument("--model", required=True, metavar="NAME", help="the engine's name for its model")
    how_to_ask(group)
    group.add_argument("--without", type=_without, default=[], metavar="NAMES",
                       help="parameters that the model does not take, such as max_tokens,temperature: " +
                            "; ".join(f"{name}: {what}" for name, what in INSTEAD.items()))
    group.add_argument("--pictures", choices=("base64", "file"), default="base64",
                       help="base64: each picture stands in its request; file: its path (vllm run-batch "
                            "--allowed-local-media-path, on a machine that has the frames at the same place)")
    group.add_argument("--file_requests", type=positive, default=REQUESTS, help="requests in a file, at most")
    group.add_argument("--file_mb", type=positive_float, default=MEGABYTES, help="megabytes of a file, at most")
    return parser.parse_args(argv)


def _without(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in INSTEAD]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(INSTEAD)}")
    return sorted(names)


def write_set(args: argparse.Namespace, chat: Chat, maker: tuple[str, str], jobs: Sequence[Job]) -> dict[str, int]:
    """Write a set's files, those that a kill left out alone -> {name: bytes} of its request files.

    InputError where the folder holds another set, a picture is not whole, or one request is larger than a file may be.
    """
    name = _name_of(args, maker, jobs)
    before = read_set(args.out) if (args.out / "set.json").exists() else None
    if before and before["set"] != name:
        raise InputError(f"{args.out}: holds another set of requests, whose answers may still come; name another "
                         "folder")
    lines = list(_lines(args, chat, name, jobs))
    files = _files(lines, args)
    if before is None:  # the last of all but the files: what it names is whole
        file_of = {line.name: file for file, of_file in files.items() for line in of_file}
        write_json_lines(args.out / "jobs.jsonl", (
            {"id": line.name, "video": line.job.video, "time": line.job.time, "shared": line.job.shared,
             "again": line.job.again, "file": file_of[line.name]} for line in lines if line.job))
        write_json(args.out / "set.json", {
            "set": name, "frames": str(args.frames), "captioner": maker[0], "model": args.model, "prompt": maker[1],
            "without": args.without, "requests": len(jobs), **decoding(args)})
    with tqdm(total=len(lines), desc="requests", unit="request", disable=len(lines) < 1000) as bar:
        for file, of_file in files.items():
            if not (args.out / file).exists():
                with writing(args.out / file, binary=True) as out:
                    for line in of_file:
                        out.write(_text(line, chat, _address(line, args)))
                        bar.update()
            else:
                bar.update(len(of_file))
    return {file: sum(line.size for line in of_file) for file, of_file in files.items()}


def _name_of(args: argparse.Namespace, maker: tuple[str, str], jobs: Sequence[Job]) -> str:
    """12 hex digits of all that is asked: other flags, frames or pictures make another set."""
    digest = hashlib.blake2b(json.dumps([*maker, args.model, args.pictures, args.file_requests, args.file_mb]).encode(),
                             digest_size=6)
    for job in tqdm(jobs, desc="check frames", unit="frame", disable=len(jobs) < 10000):
        digest.update(json.dumps([job.video, job.time, job.shared, job.again]).encode() + check_jpg(job.path))
    return digest.hexdigest()


def _lines(args: argparse.Namespace, chat: Chat, name: str, jobs: Sequence[Job]) -> Iterator[Line]:
    """The requests of a set, the two about made pictures first."""
    of_check = [Line(f"{name}-{check}", None, number, 0) for number, check in enumerate(CHECKS)]
    of_jobs = (Line(f"{name}-{number:08d}", job, 0, 0) for number, job in enumerate(jobs))
    for line in chain(of_check, of_jobs):
        yield line._replace(size=len(_text(line, chat, b"")) + _address_length(line, args))


def _text(line: Line, chat: Chat, address: bytes) -> bytes:
    """A request as its line in a file; pictures that nobody asks about in a run are asked without a key, as there."""
    envelope = json.dumps({"custom_id": line.name, "method": "POST", "url": URL}).encode()
    return envelope[:-1] + b', "body": ' + chat.body(address, line.job and line.job.key) + b"}\n"


def _address(line: Line, args: argparse.Namespace) -> bytes:
    """A picture as its request has it."""
    if line.job is None:
        return data_url(made_pictures()[line.picture])
    if args.pictures == "base64":
        return data_url(read_picture(line.job.path))
    return line.job.path.absolute().as_uri().encode()


def _address_length(line: Line, args: argparse.Namespace) -> int:
    if args.pictures == "base64" and line.job:
        return len(data_url(b"")) + -(-line.job.path.stat().st_size // 3) * 4
    return len(_address(line, args))


def _files(lines: Sequence[Line], args: argparse.Namespace) -> dict[str, list[Line]]:
    """File name -> its requests, as many as a file may hold."""
    files, size, most = [], 0, int(args.file_mb * 1e6)
    for line in lines:
        if line.size > most:
            what = line.job.path if line.job else "a made picture"
            raise InputError(f"{what}: its request has {line.size / 1e6:.2f} MB, more than --file_mb {args.file_mb:g}")
        if not files or size + line.size > most or len(files[-1]) == args.file_requests:
            files.append([])
            size = 0
        files[-1].append(line)
        size += line.size
    return {f"requests-{number:05d}.jsonl": of_file for number, of_file in enumerate(files, 1)}


# ---- what is on disk ----


def read_set(folder: Path) -> dict:
    """A folder's set.json; InputError where it is none."""
    path = folder / "set.json"
    if not path.exists():
        raise InputError(f"{path} is missing: write the requests with `python -m narvid.narration requests`")
    entry = read_json(path, dict, advice=AGAIN)
    texts = [entry.get(name) for name in ("set", "frames", "captioner", "model", "prompt")]
    numbers = [entry.get(name) for name in ("requests", "max_new_tokens", "seed")]
    without, temperature = entry.get("without"), entry.get("temperature")
    if not (all(isinstance(text, str) and text or text == "" for text in texts) and entry["set"]
            and all(type(n) is int for n in numbers) and type(temperature) in (int, float, type(None))
            and type(entry.get("one_sentence")) is bool and isinstance(without, list)
            and all(name in tuple(INSTEAD) for name in without)):
        raise InputError(f"{path}: is not what `requests` writes; {AGAIN}")
    return entry


def read_jobs(folder: Path, of_set: dict) -> dict[str, dict]:
    """Request -> its line of jobs.jsonl."""
    path, jobs = folder / "jobs.jsonl", {}
    for number, entry in read_json_lines(path, advice=AGAIN):
        texts = [entry.get(name) for name in ("id", "video", "file")]
        shared = entry.get("shared")
        times = [entry.get("time"), *shared] if isinstance(shared, list) else [None]
        if not (all(isinstance(text, str) for text in texts) and type(entry.get("again")) is int
                and all(type(time) in (int, float) and 0 <= time < 1e9 for time in times)):
            raise InputError(f"{path}:{number}: no line that `requests` writes; {AGAIN}")
        jobs[entry["id"]] = entry
    if len(jobs) != of_set["requests"]:
        raise InputError(f"{path}: has {len(jobs)} requests, and set.json says {of_set['requests']}; {AGAIN}")
    return jobs

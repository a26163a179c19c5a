"""Frame folder -> narration file: which frames are captioned, by which shard, and in which order of steps.

  python -m narvid.narration narrate --frames data/msrvtt/frames --out data/msrvtt/narrations.jsonl
  python -m narvid.narration narrate --frames FRAMES --out OUT --server http://localhost:8000/v1 --model NAME
  bash scripts/narrate.sh FRAMES OUT                               one process a GPU, packages installed where missing

Near-identical neighbours share a sentence (--same_frame). Videos are dealt to shards (--shard, Slurm arrays, torchrun).
Killed, the same command continues; the shard that finds nothing missing writes OUT, whole, and OUT's .failed.jsonl,
which lists every answer that is no whole sentence. A frame without a sentence is asked about again by the next run, a
refusal by --again refused. New videos of the frame folder are added to OUT.
Here: frames, flags, the run. Not here: models, servers, prompts (captioners.py, chat_server.py), how many are asked at
once (asking.py), which pictures are nearly alike (pictures.py), what an answer is worth (answers.py), what is done
already (journals.py).
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from narvid import InputError
from narvid.data.frames import frame_path, load_frame_index, pick_frames, read_list
from narvid.flags import Parser, WithDefaults, count, number, positive, positive_float
from narvid.narration.answers import KINDS, Failed, is_refusal, kind_of
from narvid.narration.asking import FRAMES, Job, caption_all
from narvid.narration.captioners import DEFAULT_MODEL, MAX_NEW_TOKENS, Captioner, LocalCaptioner
from narvid.narration.chat_server import REQUESTS, ServerCaptioner
from narvid.narration.journals import (Answer, Known, Shard, check_times, failed_file, made_by, my_shard,
                                       one_at_a_time, open_journal, read_known, write_out)
from narvid.narration.pictures import SAME_FRAME, check_sees, distance, distinct_frames, made_pictures, thumbnail
from narvid.narration.preparing import free_workers, read_picture
from narvid.progress import say, tqdm


# ---- which frames, which shard ----


def wanted_frames(args: argparse.Namespace, times: Mapping[str, list[float]]) -> dict[str, list[int]]:
    """Video -> indices of the frames that get a sentence, in the order of the frame index."""
    videos = list(times)
    if args.list:
        listed = read_list(args.list)
        videos = [video for video in videos if video in listed]
        if absent := sorted(listed - set(videos)):
            say(f"{len(absent)} listed videos have no frames in {args.frames}: {', '.join(absent[:3])}, ...")
    if not videos:
        raise InputError(f"{args.frames}: no frames of any video to narrate")
    return {video: pick_frames(len(times[video]), args.max_frames or len(times[video])) for video in videos}


def plan(args: argparse.Namespace, times: Mapping[str, list[float]], wanted: Mapping[str, list[int]], known: Known,
         shard: Shard) -> list[Job]:
    """The frames that this shard has to caption: new ones and those of --again, less the ones that share another's."""
    todo = {}
    for video in list(wanted)[shard.index :: shard.n]:
        answers = known.answers.get(video, {})
        asked = {moment for moment, answer in answers.items() if not is_due(answer.said, args.again)}
        if open_frames := [index for index in wanted[video] if times[video][index] not in asked]:
            todo[video] = set(open_frames)
    jobs = []
    for video in tqdm(todo, "comparing frames", unit="video", disable=not (shard.shows and todo and args.same_frame)):
        paths = [frame_path(args.frames, video, index) for index in wanted[video]]
        answers, groups = known.answers.get(video, {}), {}
        for index, path, leader in zip(wanted[video], paths, distinct_frames(paths, args.same_frame), strict=True):
            if index in todo[video]:
                groups.setdefault(leader, []).append((path, times[video][index]))
        for group in groups.values():
            again = max(times_asked(answers.get(moment)) for _, moment in group)
            jobs.append(Job(video, *group[0], [moment for _, moment in group[1:]], again))
    return jobs


def times_asked(answer: Answer | None) -> int:
    """How many answers a frame had; a request that failed is none, and is made again as it was."""
    return 0 if answer is None else answer.again + (kind_of(answer.said) != "failed")


def is_due(said: str | Failed, again: Sequence[str] | None) -> bool:
    """Whether a frame that was asked before is asked again: without --again, where it has no sentence."""
    return isinstance(said, Failed) if again is None else kind_of(said) in again


# ---- the run ----


def picture_pairs(jobs: Sequence[Job]) -> Iterator[Sequence[bytes]]:
    """Pairs of different pictures for check_sees: two frames of different videos, far from alike, then made ones."""
    paths = list({job.video: job.path for job in jobs}.values())
    paths = [paths[index] for index in pick_frames(len(paths), 16)]
    if len(paths) > 1:
        seen = [thumbnail(path) for path in paths]
        farthest = max(range(1, len(paths)), key=lambda index: distance(seen[0], seen[index]))
        yield [read_picture(paths[0]), read_picture(paths[farthest])]
    yield made_pictures()


def kinds(text: str) -> list[str]:
    """A list for --again, such as refused,empty."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(KINDS)}")
    return names


def which_frames(group: argparse._ArgumentGroup) -> None:
    """The flags that say which frames are asked about."""
    group.add_argument("--list", type=Path, nargs="+", metavar="JSONL", help="only the videos in these split files")
    group.add_argument("--max_frames", type=positive, metavar="K", help="only the K frames that training picks")
    group.add_argument("--same_frame", type=number, default=SAME_FRAME, metavar="LEVELS",
                       help="a frame whose 16 x 16 grey cells all differ by less than this (of 255) from the last "
                            "captioned one shares its sentence; 0: none does")


def how_to_ask(group: argparse._ArgumentGroup) -> None:
    """The flags that say what is asked about a frame, and how an answer is decoded."""
    group.add_argument("--prompt", help="A, B or C of Table 7, S (one short sentence), or a text of your own; C if not "
                                        "given")
    group.add_argument("--one_sentence", action="store_true", help="cut each answer at its first full stop")
    group.add_argument("--max_new_tokens", type=positive, default=MAX_NEW_TOKENS,
                       help="tokens of an answer, at most; CLIP reads 77")
    group.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    group.add_argument("--sampling_temperature", type=positive_float, default=0.2, help="of --sample")
    group.add_argument("--captioner_seed", type=count, default=0, help="of --sample, with each frame's video and time")


def what_to_ask_again(group: argparse._ArgumentGroup) -> None:
    """The flag that says which frames are asked about once more."""
    group.add_argument("--again", type=kinds, metavar="KINDS",
                       help="frames to ask about once more, by what they got: " +
                            "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items()) +
                            "; such as refused,empty. If not given: every frame without a sentence")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, those that exclude each other refused."""
    parser = Parser(prog="python -m narvid.narration narrate", allow_abbrev=False,
                    description="Caption a folder of frames.", formatter_class=WithDefaults)
    group = parser.add_argument_group("frames")
    group.add_argument("--frames", type=Path, required=True, metavar="DIR", help="frame folder, of extract_frames.py")
    group.add_argument("--out", type=Path, required=True, metavar="JSONL", help="the narration file; kept and added to")
    which_frames(group)
    group = parser.add_argument_group("captioner")
    group.add_argument("--captioner", default=DEFAULT_MODEL, metavar="NAME", help="hub name or folder of a model")
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="bf16 on a GPU and fp32 without, if not given")
    group.add_argument("--load_4bit", action="store_true", help="4-bit weights (bitsandbytes, GPU)")
    how_to_ask(group)
    group = parser.add_argument_group("server, in place of --captioner")
    group.add_argument("--server", metavar="URL", help="OpenAI-compatible, such as http://localhost:8000/v1")
    group.add_argument("--model", metavar="NAME", help="the server's name for its model")
    group.add_argument("--api_key_env", metavar="VARIABLE",
                       help="environment variable with the server's key; OPENAI_API_KEY if not given")
    group.add_argument("--retries", type=count, default=5,
                       help="further tries of a request that failed, with growing pauses")
    group.add_argument("--timeout", type=positive_float, default=60.0, help="seconds to wait for an answer")
    group.add_argument("--requests_per_second", type=positive_float, help="at most; no limit if not given")
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=positive, help=f"frames at once, {FRAMES} if not given; for a server: "
                                                           f"requests under way, {REQUESTS} if not given")
    group.add_argument("--workers", type=count, help="processes that prepare pictures for a model on this machine; as "
                                                     "many as cores are left if not given, none without a GPU")
    group.add_argument("--shard", metavar="I/N", help="do part I of N; a Slurm array and torchrun are understood as is")
    group.add_argument("--merge", action="store_true", help="caption nothing; write OUT from what the shards have done")
    what_to_ask_again(group)
    args = parser.parse_args(argv)
    if args.merge and args.again:
        parser.error("--again captions and --merge does not: run the shards with --again, then --merge")
    if bool(args.server) != bool(args.model):
        parser.error("--server and --model go together")
    if args.server and (args.captioner != DEFAULT_MODEL or args.dtype or args.load_4bit):
        parser.error("--captioner, --dtype and --load_4bit do not go with --server")
    if args.server and args.workers is not None:
        parser.error("--workers prepare pictures for a model on this machine; a server does that itself")
    args.batch_size = args.batch_size or (REQUESTS if args.server else FRAMES)
    return args


def make_captioner(args: argparse.Namespace) -> Captioner:
    """The captioner that the flags describe."""
    if args.server:
        return ServerCaptioner(args.server, args.model, args.prompt, **decoding(args), api_key_env=args.api_key_env,
                               retries=args.retries, timeout=args.timeout, requests_per_second=args.requests_per_second)
    return LocalCaptioner(args.captioner, args.prompt, **decoding(args), dtype=args.dtype, load_4bit=args.load_4bit)


def decoding(args: argparse.Namespace) -> dict:
    """How tokens are chosen, as captioners take it."""
    return {"max_new_tokens": args.max_new_tokens, "seed": args.captioner_seed, "one_sentence": args.one_sentence,
            "temperature": args.sampling_temperature if args.sample else None}


def narrate(args: argparse.Namespace, times: Mapping[str, list[float]], wanted: Mapping[str, list[int]],
            shard: Shard) -> tuple[str, str]:
    """Caption this shard's frames; returns the captioner and the prompt to record."""
    captioner = make_captioner(args)
    if args.server and (made := made_by(args.out)):
        captioner.go_on(made[0])
    maker = label(captioner, args)
    known = read_known(args.out, maker)
    check_times(args.out, known, times)
    with open_journal(args.out, shard.journal) as journal:
        jobs = plan(args, times, wanted, known, shard)
        shared = sum(len(job.shared) for job in jobs)
        mine = list(wanted)[shard.index :: shard.n]
        frames = sum(len(wanted[video]) for video in mine)
        with_sentence = sum(times[video][index] in texts for video in mine if (texts := known.texts(video))
                            for index in wanted[video])
        if jobs:
            answers = check_sees(captioner, picture_pairs(jobs))
            maker = label(captioner, args)  # the check may have changed a parameter
            said = "two different pictures, two answers"
            if any(map(is_refusal, answers)):
                said = "the captioner refuses pictures that anybody may see; it will say so of every frame"
            say(f"{said}: {answers[0][:60]!r}, {answers[1][:60]!r}")
        say(f"shard {shard.index + 1}/{shard.n}: {len(mine)} videos, {frames} frames; {with_sentence} have a sentence, "
            f"{len(jobs)} to caption, {shared} share a neighbour's ({shared / max(len(jobs) + shared, 1):.1%}); "
            f"{maker[0]}, {args.batch_size} at once")
        start = time.monotonic()
        workers = 0 if args.server else args.workers if args.workers is not None else free_workers(captioner.on_gpu)
        found = caption_all(jobs, captioner, journal, maker, at_once=args.batch_size, workers=workers,
                            shows=shard.shows)
    seconds = time.monotonic() - start
    counts = ", ".join(f"{found[kind]} {kind}" for kind in KINDS)
    print(f"{len(jobs)} frames in {seconds:.1f} s, {len(jobs) / max(seconds, 1e-9):.2f} a second; {counts}")
    return maker


def label(captioner: Captioner, args: argparse.Namespace) -> tuple[str, str]:
    """(captioner, prompt) as every sentence records them."""
    return f"{captioner.label} same_frame={args.same_frame:g}", captioner.prompt


def finish(args: argparse.Namespace, times: Mapping[str, list[float]], wanted: Mapping[str, list[int]],
           maker: tuple[str, str] | None, shard: Shard) -> None:
    """Write OUT if every wanted frame has a sentence or a reason for none; otherwise say which shards are awaited."""
    known = read_known(args.out, maker)  # again: other shards went on in the meantime
    check_times(args.out, known, times)
    missing, awaited = 0, set()
    for position, (video, indices) in enumerate(wanted.items()):
        settled = known.answers.get(video, ())
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
    write_whole(args.out, known, times)


def write_whole(out: Path, known: Known, times: Mapping[str, list[float]]) -> None:
    """Write OUT and say what it holds; InputError where that is nothing."""
    counts = write_out(out, known, times)
    texts = [known.texts(video) for video in known.answers]
    print(f"{out}: {sum(map(bool, texts))} videos, {sum(map(len, texts))} sentences")
    report(counts, failed_file(out))
    if not any(texts):
        raise InputError(f"not one frame got a sentence; {failed_file(out)} says why")


def report(counts: Counter[tuple[str, bool]], listed: Path) -> None:
    """Say how many answers are no whole sentence, what OUT has in their place and how they are asked for again."""
    holes = {kind: counts[kind, False] for kind in KINDS if counts[kind, False]}
    if holes:
        these = ", ".join(f"{n} {kind}" for kind, n in holes.items())
        print(f"{sum(holes.values())} frames have none ({these}), {listed} says why; the next run tries them again")
    if refused := counts["refused", True]:
        print(f"{refused} sentences are refusals, which {listed} lists: --again refused asks once more, "
              "`python -m narvid.narration check --drop refused` leaves them out")
    if cut := counts["cut", True]:
        print(f"{cut} sentences end where the token limit cut them (--max_new_tokens), as {listed} lists")


def main(argv: Sequence[str] | None = None) -> None:
    """`narrate`: caption this process's share of the frames, write OUT if nothing is missing."""
    args = parse_args(argv)
    shard = my_shard(args.shard)
    times = load_frame_index(args.frames)
    wanted = wanted_frames(args, times)
    maker = None if args.merge else narrate(args, times, wanted, shard)
    with one_at_a_time(args.out):
        finish(args, times, wanted, maker, shard)

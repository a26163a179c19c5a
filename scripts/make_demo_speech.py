"""Speech for the demo's videos: subtitles that say what no picture shows, and queries that only the subtitles answer.

    python scripts/make_demo_speech.py --out demo                                       # demo/subtitles, demo/spoken
    python -m narvid.narration import demo/subtitles --frames demo/frames --out demo/speech.jsonl
    python main_task_retrieval.py --config configs/demo.yaml --data_dir demo/spoken --frames demo/frames \\
        --narrations demo/narrations.jsonl --speech demo/speech.jsonl --sentence both --output_dir runs/spoken_both

In each of a video's events somebody gives a name and a number, 40 x 40 of them; of up to 533 videos in a row no two
share a pair. A query of demo/spoken asks for one such pair in other words: its training split has the demo's queries
and so many spoken ones a video, its test split one spoken query a video and nothing else. Pictures and captions say
nothing of them. Everything depends on the seed and the video's number alone. The videos, their other queries and their
narration are make_demo_corpus.py's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone that is not installed

from narvid import InputError
from narvid.data.datasets import read_pairs
from narvid.files import write_json_lines, write_text
from narvid.flags import Parser, command, count, positive
from scripts.make_demo_corpus import EVENTS, pick, random_of, read_truth

SPEECH_STREAM, PAIR_STREAM = 4, 5  # behind those of make_demo_corpus.py
NAMES = (
    "anna ben carl dora emil fiona george hanna ivan julia kevin laura martin nina oscar paula quentin rosa simon tina "
    "victor wendy xavier yvonne adam bella chris diana edward frank grace henry iris jack kate leo maria noah olga pia"
).split()
NUMBERS = range(10, 50)
SAID = ("my name is {name} and I take {number}", "{name} here , {number} please", "this is {name} , I bid {number}",
        "call me {name} ; the answer is {number}")
ASKED = ("somebody named {name} mentions the number {number}", "a person called {name} says {number}",
         "{name} talks about {number}", "we hear {name} speak of number {number}")


def make_speech(seed: int, number: int, events: Sequence[dict]) -> list[dict]:
    """What is said in one video: [{"start", "end" (seconds), "name", "number", "text"}], once in each event."""
    pairs = np.random.default_rng([seed, PAIR_STREAM]).permutation(len(NAMES) * len(NUMBERS))
    rng, said = random_of(seed, number, SPEECH_STREAM), []
    for i, event in enumerate(events):
        pair = int(pairs[(EVENTS * number + i) % len(pairs)])
        who = {"name": NAMES[pair % len(NAMES)], "number": NUMBERS[pair // len(NAMES)]}
        start = round(event["start"] + rng.uniform(0.1, 0.5), 3)
        said.append({"start": start, "end": start + 1.0, **who, "text": pick(rng, SAID).format(**who)})
    return said


def make_spoken_queries(seed: int, number: int, said: Sequence[dict], n: int) -> list[str]:
    """Different queries about what is said in one video, at most as many as there are."""
    every = [form.format(name=one["name"], number=one["number"]) for one in said for form in ASKED]
    order = random_of(seed, number, SPEECH_STREAM + 2).permutation(len(every))
    return [every[i] for i in order[:n]]


def to_srt(said: Iterable[dict]) -> str:
    """Timed sentences as a .srt file holds them."""

    def clock(seconds: float) -> str:
        whole = round(1000 * seconds)
        return f"{whole // 3600000:02}:{whole // 60000 % 60:02}:{whole // 1000 % 60:02},{whole % 1000:03}"

    return "\n".join(f"{n}\n{clock(one['start'])} --> {clock(one['end'])}\n{one['text']}\n"
                     for n, one in enumerate(said, 1))


def main(argv: Sequence[str] | None = None) -> None:
    """Write OUT/subtitles/*.srt and OUT/spoken/{train,test}.jsonl."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the demo's corpus, prepared")
    parser.add_argument("--spoken", type=positive, default=len(ASKED) * EVENTS, metavar="N",
                        help="spoken queries of a training video")
    parser.add_argument("--seed", type=count, default=0, help="all random choices depend on it")
    args = parser.parse_args(argv)
    said = {video: make_speech(args.seed, int(video.removeprefix("video")), events)
            for video, events in read_truth(args.out / "truth.jsonl").items()}
    for video, of_video in said.items():
        write_text(args.out / "subtitles" / f"{video}.srt", to_srt(of_video))
    for split, n in (("train", args.spoken), ("test", 1)):
        pairs = [(video, query) for _, video, query in read_pairs(args.out / f"{split}.jsonl")]
        if unknown := next((video for video, _ in pairs if video not in said), None):
            raise InputError(f"{args.out / split}.jsonl: {unknown} is no video of this corpus; prepare it again")
        spoken = [(video, query) for video in dict.fromkeys(video for video, _ in pairs)
                  for query in make_spoken_queries(args.seed, int(video.removeprefix("video")), said[video], n)]
        kept = pairs if split == "train" else []
        write_json_lines(args.out / "spoken" / f"{split}.jsonl",
                         ({"video": video, "query": query} for video, query in [*kept, *spoken]))
        print(f"{args.out / 'spoken' / split}.jsonl: {len(spoken)} spoken queries, {len(kept)} others")


if __name__ == "__main__":
    command(main)

"""What sharing sentences between near-identical frames saves, and a narration file as it would have come out.

  python scripts/share_sentences.py --frames demo/frames --same_frame 2 5 16
  python scripts/share_sentences.py --frames demo/frames --same_frame 16 --narrations demo/narrations.jsonl \\
      --out demo/shared.jsonl

The first prints the share of frames that need no caption of their own, for each threshold of `python -m
narvid.narration narrate --same_frame`. The second gives the frames of a finished narration the sentences that they
would have shared: train or evaluate with it to see what the saving costs, before a large corpus is narrated.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from narvid.flags import Parser, command, number
from narvid.data.frames import frame_path, load_frame_index
from narvid.narration.pictures import distinct_frames
from narvid.data.narrations import Narration, load_narrations, write_narrations
from narvid.progress import tqdm


def share_sentences(narration: Narration, times: list[float], leaders: list[int]) -> Narration:
    """Each sentence replaced by that of the frame which would have been captioned in its place, where it has one."""
    sentence_at = dict(zip(narration.times, narration.sentences))
    leader_at = dict(zip(times, (times[i] for i in leaders)))
    shared = [sentence_at.get(leader_at.get(t, t), text) for t, text in zip(narration.times, narration.sentences)]
    return narration._replace(sentences=shared)


def main(argv: list[str] | None = None) -> None:
    """Print the savings; write the narration where one is asked for."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, metavar="DIR", help="folder of extracted frames")
    parser.add_argument("--same_frame", type=number, nargs="+", required=True, metavar="LEVELS", help="thresholds")
    parser.add_argument("--narrations", type=Path, help="a narration with a sentence of its own for each frame")
    parser.add_argument("--out", type=Path, help="write it there with shared sentences; takes one threshold")
    args = parser.parse_args(argv)
    if bool(args.narrations) != bool(args.out) or (args.out and len(args.same_frame) > 1):
        parser.error("--narrations and --out go together, with one --same_frame")
    times = load_frame_index(args.frames)
    leaders_of: dict[float, dict[str, list[int]]] = {}
    for threshold in args.same_frame:
        leaders_of[threshold] = leaders = {
            video: distinct_frames([frame_path(args.frames, video, i) for i in range(len(of_video))], threshold)
            for video, of_video in tqdm(times.items(), desc=f"threshold {threshold:g}", unit="video")}
        frames = sum(map(len, leaders.values()))
        saved = frames - sum(len(set(of_video)) for of_video in leaders.values())
        print(f"threshold {threshold:5g}: {saved} of {frames} frames share a sentence, {saved / frames:.1%} saved")
    if args.out:
        narrations = load_narrations(args.narrations, times)
        leaders = leaders_of[args.same_frame[0]]
        changed = {video: share_sentences(narration, times[video], leaders[video]) if video in times else narration
                   for video, narration in narrations.items()}
        write_narrations(args.out, changed.items())
        print(f"wrote {len(changed)} narrations to {args.out}")


if __name__ == "__main__":
    command(main)

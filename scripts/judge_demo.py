"""Does `python -m narvid.narration judge` find the wrong sentences? On the demo, whose generator knows which are wrong.

  python scripts/judge_demo.py --corpus demo --checkpoint runs/demo          # after scripts/demo.sh

The captioner is simulated once more with the corpus' own seed and must write what narrations.jsonl holds; that says
which sentences are wrong. Printed is the area under the ROC curve of "fits badly" against "is wrong" (50 %: chance) on
the test videos, which the model was not trained on: of the fit that `judge` reports, of its other measures, and of the
plain cosine of the two towers. Here: the labels. Not here: the measures (narvid/narration/fit.py).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from narvid import InputError
from narvid.data.frames import load_frame_index
from narvid.data.narrations import load_narrations
from narvid.files import read_json
from narvid.flags import Parser, command, positive, share
from narvid.narration import judge
from narvid.narration.fit import area_under_roc
from scripts.make_demo_corpus import NARRATION_STREAM, narrate_video, random_of, read_truth

KINDS = {"any": ("hallucination", "colour", "shape"), "hallucination": ("hallucination",), "colour": ("colour",),
         "shape": ("shape",)}
MEASURES = {  # name -> how badly a sentence fits
    "fit: cosine less the mean one with other videos' frames": lambda s: -s.fit,
    "rank among frames of other videos": lambda s: s.rank_among_others,
    "cosine less the mean one with its own video's frames": lambda s: -s.margin_in_video,
    "plain cosine": lambda s: -s.cosine,
}


def errors_of(corpus: Path, rates: dict[str, float]) -> dict[tuple[str, float], list[str]]:
    """(video, time of a frame) -> the errors of its sentence, [] where it is right."""
    seed, times = read_json(corpus / "generator.json", dict)["seed"], load_frame_index(corpus / "frames")
    narrations, found = load_narrations(corpus / "narrations.jsonl"), {}
    for video, events in read_truth(corpus / "truth.jsonl").items():
        rng = random_of(seed, int(video.removeprefix("video")), NARRATION_STREAM)
        written = narrate_video(rng, events, times[video], rates)
        if video in narrations and narrations[video].sentences != [sentence["text"] for sentence in written]:
            raise InputError(f"{corpus / 'narrations.jsonl'}: {video} is narrated otherwise than the generator does "
                             "with these rates; give the rates of `make_demo_corpus.py narrate`")
        found |= {(video, sentence["time"]): sentence["wrong"] for sentence in written}
    return found


def table(sentences: list[judge.Sentence], errors: dict[tuple[str, float], list[str]]) -> list[str]:
    """A line a measure: its area under the curve for each kind of error, in percent, against the right sentences."""
    wrong = [errors[sentence.video, sentence.time] for sentence in sentences]
    lines = [f"{'':58}" + "".join(f"{kind:>15}" for kind in KINDS)]
    lines.append(f"{'wrong sentences':58}" + "".join(
        f"{sum(bool({*names} & {*kinds}) for names in wrong):>15}" for kinds in KINDS.values()))
    for name, badness in MEASURES.items():
        cells = []
        for kinds in KINDS.values():
            chosen = [i for i, names in enumerate(wrong) if not names or {*names} & {*kinds}]
            area = area_under_roc([badness(sentences[i]) for i in chosen], [bool(wrong[i]) for i in chosen])
            cells.append(100 * area)
        lines.append(f"{name:58}" + "".join(f"{cell:>15.1f}" for cell in cells))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("demo"), help="of make_demo_corpus.py, with its frames")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo"), help="the run whose towers judge")
    parser.add_argument("--max_frames", type=positive, default=8, help="frames of a video")
    for name, rate in (("hallucination", 0.05), ("colour", 0.08), ("shape", 0.08), ("repeat", 0.85)):
        parser.add_argument(f"--{name}_rate", type=share, default=rate, help="that narrations.jsonl was made with")
    args = parser.parse_args(argv)
    errors = errors_of(args.corpus, {name: getattr(args, f"{name}_rate")
                                     for name in ("hallucination", "colour", "shape", "repeat")})
    [judged] = judge.main([str(x) for x in (
        args.corpus / "narrations.jsonl", "--only", args.corpus / "test.jsonl", "--frames", args.corpus / "frames",
        "--checkpoint", args.checkpoint, "--max_frames", args.max_frames, "--videos", 0, "--worst", 0)])
    print("\narea under the ROC curve of \"fits badly\" against \"is wrong\", percent; chance 50")
    print("\n".join(table(judged.sentences, errors)))


if __name__ == "__main__":
    command(main)

"""mteb's own numbers for a model on the demo's test videos, beside ours: the plug-in tried without a download.

  pip install -e ".[mteb]"                                    # Python 3.11 or newer
  python scripts/mteb_demo.py --run runs/demo                 # after `bash scripts/demo.sh`

Both directions are tasks of mteb, built of demo/test.jsonl and demo/videos. Each query of the demo has one video, so
mteb's recall and nDCG must be ours. Exits with 1 where they differ by more than 0.01.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from narvid import InputError
from narvid.files import read_json_lines
from narvid.flags import Parser, command

DIRECTIONS = {"text_to_video": ("DemoT2V", "t2v"), "video_to_text": ("DemoV2T", "v2t")}
METRICS = {"R@1": "recall_at_1", "R@5": "recall_at_5", "R@10": "recall_at_10", "nDCG@10": "ndcg_at_10"}


def task_of(direction: str, pairs: list[dict], videos: Path):
    """One direction as a task of mteb; an item's id is the video's name on both sides."""
    from datasets import Dataset, Features, Value, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    names = [pair["video"] for pair in pairs]
    texts = Dataset.from_dict({"id": names, "text": [pair["query"] for pair in pairs]})
    files = Dataset.from_dict({"id": names, "video": [str(videos / f"{name}.mp4") for name in names]},
                              features=Features({"id": Value("string"), "video": Video()}))
    title, category = DIRECTIONS[direction]

    class Demo(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=title, description="Generated videos of three events each", dataset={"path": "demo", "revision": "1"},
            type="Any2AnyRetrieval", eval_langs=["eng-Latn"], eval_splits=["test"], main_score="ndcg_at_10",
            reference=None, category=category, modalities=["video", "text"], date=None, domains=None,
            task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
            bibtex_citation=None)

        def load_data(self, num_proc=None, **_):
            sides = (texts, files) if direction == "text_to_video" else (files, texts)
            split = {"queries": sides[0], "corpus": sides[1], "top_ranked": None,
                     "relevant_docs": {name: {name: 1} for name in names}}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Demo()


def ours(model, pairs: list[dict], videos: Path, narrations: Path) -> dict[str, dict[str, float]]:
    """Both directions by our metrics, of video files that are read once more."""
    import numpy as np

    from narvid.metrics import retrieval_metrics

    paths = [videos / f"{pair['video']}.mp4" for pair in pairs]
    queries = model.encode_queries([pair["query"] for pair in pairs])
    scores = model.score(queries, model.encode_videos(paths, narrations))
    return retrieval_metrics(scores["fused"].numpy(), np.arange(len(pairs)), ndcg=True)


def main(argv: list[str] | None = None) -> None:
    """Print mteb's numbers and ours."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="a run, an exported folder, or a released file")
    parser.add_argument("--data_dir", type=Path, default=Path("demo"), help="corpus of scripts/demo.sh")
    args = parser.parse_args(argv)
    try:
        import mteb
    except ImportError as error:
        raise InputError(f"mteb is not installed ({error}): pip install -e \".[mteb]\", Python 3.11 or newer") from None
    from narvid.mteb import SearchModel

    pairs = [entry for _, entry in read_json_lines(args.data_dir / "test.jsonl", advice="run scripts/demo.sh first")]
    videos, narrations = args.data_dir / "videos", args.data_dir / "narrations.jsonl"
    model = SearchModel.load(args.run, narrations=narrations)
    expected, worst = ours(model.retriever, pairs, videos, narrations), 0.0
    for direction in DIRECTIONS:
        result = mteb.evaluate(model, task_of(direction, pairs, videos), cache=None, show_progress_bar=False)
        [scores] = result.task_results[0].scores["test"]
        found = {name: 100 * scores[theirs] for name, theirs in METRICS.items()}
        worst = max([worst, *(abs(found[name] - expected[direction][name]) for name in METRICS)])
        print(direction, json.dumps({"mteb": {name: round(value, 2) for name, value in found.items()},
                                     "ours": {name: round(expected[direction][name], 2) for name in METRICS}}))
    print(f"{result.model_name}, mteb {mteb.__version__}: largest difference {worst:.4f} points")
    if worst > 0.01:
        sys.exit(1)


if __name__ == "__main__":
    command(main)

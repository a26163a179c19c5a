"""What the demo shows, in small: a model trained by the ordinary commands reads the narration and the query's words.

One training of about half a minute on a small corpus of the demo's generator, with smaller towers; its three
evaluations go through the same commands with one input changed each.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from main_task_retrieval import main
from scripts import make_demo_corpus

ROOT = Path(__file__).resolve().parents[2]
TEST_VIDEOS = 100
TOWERS = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}
pytestmark = pytest.mark.slow


def flags(home, corpus, name, *more):
    given = ["--config", ROOT / "configs" / "demo.yaml", "--clip_model", home / "towers.json", "--data_dir", corpus,
             "--frames", home / "demo" / "frames", "--max_frames", 4, "--num_workers", 0, "--output_dir", home / name,
             *more]
    return [str(flag) for flag in given]


def evaluate(home, name, queries=None, narrations=None):
    """Text-to-video R@1 of each matrix with the test queries or the narrations (one JSON object a line) replaced."""
    corpus = home / name
    corpus.mkdir()
    for file, lines in (("test.jsonl", queries), ("narrations.jsonl", narrations)):
        text = (home / "demo" / file).read_text() if lines is None else "".join(json.dumps(x) + "\n" for x in lines)
        (corpus / file).write_text(text)
    more = ("--eval_only", "--checkpoint", home / "run" / "best.pt")
    metrics = main(flags(home, corpus, f"{name}_run", *more))
    return {matrix: both["text_to_video"]["R@1"] for matrix, both in metrics.items()}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_demo_shows(tmp_path):
    """One test, so that one process trains: far above chance; at chance with the narrations of other videos; worse with
    other words in the queries.
    """
    home, corpus = tmp_path, tmp_path / "demo"
    commands = [
        ["scripts/make_demo_corpus.py", "videos", "--out", corpus, "--train", 256, "--test", TEST_VIDEOS],
        ["data/prepare_msrvtt.py", "--annotations", corpus / "annotations", "--protocol", "9k", "--allow_partial",
         "--out", corpus],
        ["scripts/extract_frames.py", "--videos", corpus / "videos", "--out", corpus / "frames"],
        ["scripts/make_demo_corpus.py", "narrate", "--out", corpus, "--frames", corpus / "frames"],
    ]
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    (home / "towers.json").write_text(json.dumps(TOWERS))
    metrics = main(flags(home, corpus, "run"))
    trained = {matrix: both["text_to_video"]["R@1"] for matrix, both in metrics.items()}
    assert trained["S_qn"] > 15 and trained["S_fusion"] > 15, trained  # chance: 1

    narrations = {entry["video"]: entry for entry in read(corpus / "narrations.jsonl")}
    videos = [entry["video"] for entry in read(corpus / "test.jsonl")]
    others = np.roll(videos, 1 + len(videos) // 3)
    permuted = narrations | {video: dict(narrations[video], sentences=narrations[other]["sentences"])
                             for video, other in zip(videos, others, strict=True)}
    found = evaluate(home, "permuted", narrations=permuted.values())
    assert found["S_qn"] <= 4 < trained["S_qn"], found  # 100 queries, chance 1 %: more than 4 in 0.3 % of cases

    colours = make_demo_corpus.WORDS["colour"]  # each word becomes another colour's: the sentence stays as good
    names = list(colours)
    swap = {word: colours[names[(i + 1) % len(names)]][0][j] for i, name in enumerate(names)
            for j, word in enumerate(colours[name][0])}
    queries = [dict(entry, query=" ".join(swap.get(word, word) for word in entry["query"].split()))
               for entry in read(corpus / "test.jsonl")]
    found = evaluate(home, "recoloured", queries=queries)
    assert found["S_fusion"] <= 0.6 * trained["S_fusion"], found

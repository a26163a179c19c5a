"""Real MSR-VTT clips through the ordinary commands: prepare, extract, narrate from a file, train an epoch, evaluate.

Looks for msrvtt/{annotations,videos} below $NARVID_REAL_DATA, else below ../shared/real, and skips where neither is
there. The towers are small ones with random weights, or ViT-B/32 with those of the file $NARVID_CLIP_WEIGHTS: what is
tested is the path, not the figures, so people's own captions stand in for a captioner's sentences.
"""

import json
import math
import os
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real")) / "msrvtt"
WEIGHTS = os.environ.get("NARVID_CLIP_WEIGHTS")
CAPTIONS = 5  # of a clip's 20 are trained on: 4 steps instead of 16

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not (REAL / "annotations").is_dir() or not (REAL / "videos").is_dir(),
                                 reason=f"no MSR-VTT in {REAL}; set NARVID_REAL_DATA")]


def command(log: Path, *argv) -> str:
    """python argv -> what it printed; anything but exit status 0 fails the test with that."""
    log.unlink(missing_ok=True)
    code = tiny.wait(tiny.start(tiny.python, *argv, log=log), timeout=180)
    assert code == 0, log.read_text()
    return log.read_text()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def narrate(data: Path) -> None:
    """A sentence a frame from the clip's captions, in turn; the query that is asked in the test is held out."""
    captions = {}
    for sentence in json.loads((REAL / "annotations" / "MSRVTT_data.json").read_text())["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    asked = {entry["video"]: entry["query"] for entry in read_lines(data / "test.jsonl")}
    with open(data / "narrations.jsonl", "w", encoding="utf-8") as f:
        for entry in read_lines(data / "frames" / "index.jsonl"):
            others = [c for c in captions[entry["video"]] if c.strip() != asked.get(entry["video"])]
            sentences = [{"time": t, "text": others[i % len(others)]} for i, t in enumerate(entry["times"])]
            line = {"video": entry["video"], "captioner": "people", "prompt": "", "sentences": sentences}
            f.write(json.dumps(line) + "\n")


def test_real_clips_from_official_files_to_a_table(tmp_path):
    data, run, log = tmp_path / "msrvtt", tmp_path / "run", tmp_path / "log"
    command(log, ROOT / "data" / "prepare_msrvtt.py", "--annotations", REAL / "annotations", "--protocol", "9k",
            "--out", data, "--videos", REAL / "videos", "--drop_missing", "--allow_partial")
    train, test = read_lines(data / "train.jsonl"), read_lines(data / "test.jsonl")
    clips = list(dict.fromkeys(entry["video"] for entry in train))
    assert len(train) == 20 * len(clips) and clips and test

    command(log, ROOT / "scripts" / "extract_frames.py", "--videos", REAL / "videos", "--out", data / "frames",
            "--workers", 1)
    index = {entry["video"]: entry["times"] for entry in read_lines(data / "frames" / "index.jsonl")}
    assert index.keys() == {p.stem for p in (REAL / "videos").iterdir()}
    for video, times in index.items():
        assert len(times) == len(list((data / "frames" / video).glob("*.jpg"))) > 5 and times[:2] == [0.0, 1.0], video

    narrate(data)
    printed = command(log, "-m", "narvid.narration", "check", data / "narrations.jsonl", "--frames",
                      data / "frames")
    assert f"{len(index)} narrations; captioner: people" in printed and "100.00%" in printed

    kept = [entry for i, entry in enumerate(train) if i % 20 < CAPTIONS]
    (data / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    (tmp_path / "towers.json").write_text(json.dumps(tiny.CLIP))
    towers = [tmp_path / "towers.json"]
    if WEIGHTS:
        towers = ["ViT-B-32", "--clip_pretrained", WEIGHTS, "--freeze_layers", 11]
    printed = command(log, ROOT / "main_task_retrieval.py", "--data_dir", data, "--output_dir", run, "--clip_model",
                      *towers, "--modules", "NM", "CMI", "QAF", "CVH", "--exclude_same_video", "--max_frames", 2,
                      "--max_words", 16, "--epochs", 1, "--batch_size", 16, "--precision", "fp32",
                      "--num_workers", 0, "--log_every", 1, "--save_similarity")
    losses = tiny.losses(run)
    assert len(losses) == len(kept) // 16 and all(0 < loss < 50 for loss in losses)
    [result] = tiny.results(run)
    assert (result["split"], result["select_on"], result["queries"]) == ("test", "last", len(test))
    missing = len(json.loads((data / "prepared.json").read_text())["missing"])
    assert result["videos_missing"] == missing and f"{missing} videos of the corpus" in printed
    for name in ("S_qv", "S_qn", "S_sum", "S_fusion"):
        assert f"\n{name}" in printed
        assert all(math.isfinite(x) for direction in result["metrics"][name].values() for x in direction.values())
    best = torch.load(run / "best.pt", weights_only=True)
    assert best["model"]["clip.visual.proj"].shape[1] == (512 if WEIGHTS else tiny.CLIP["embed_dim"])
    assert best["global_step"] == len(losses)

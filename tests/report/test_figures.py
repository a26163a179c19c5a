"""scripts/make_figures.py: which runs make a figure, with which numbers; what is missing is said; the files are whole.

Runs are written by hand here, with flags that the trainer resolves. Drawing is tried where matplotlib is installed.
"""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import tiny
import yaml

import main_task_retrieval as trainer
from narvid import InputError
from narvid.metrics import NAMES, retrieval_metrics
from narvid.report import drawing
from narvid.report import figures as make_figures

LOG = """12 pairs of 4 videos, 10 steps an epoch
epoch 1 step 5/10 loss 3.0000 nce_video 2.0000 nce_narration 1.0000 lr 1e-04 scale 14.3
epoch 1 step 10/10 loss 2.5000 nce_video 1.5000 nce_narration 1.0000 lr 1e-04 scale 14.3
val: a table
epoch 1 step 10/10 loss 2.4000 nce_video 1.4000 nce_narration 1.0000 lr 1e-04 scale 14.3
epoch 2 step 5/10 loss 2.0000 nce_video 1.2500 nce_narration 0.7500 lr 1e-04 scale 14.3
"""


def write_run(folder, recall, *flags, narrations=None, **other):
    """An ended run of these flags with this R@1 of S_fusion, and a poorer S_qv."""
    narrations = ["--narrations", str(narrations)] if narrations else []
    args = vars(trainer.parse_args(["--data_dir", "nowhere", "--output_dir", str(folder), *narrations,
                                    *map(str, flags)]))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"# commit: none\n{yaml.safe_dump(args)}")
    metrics = {name: {"text_to_video": dict.fromkeys(NAMES, 50.0) | {"R@1": value}}
               for name, value in (("S_qv", 1.0), ("S_fusion", recall))}
    final = {"split": "test", "select_on": args["select_on"], "queries": 9, "videos": 9, "metrics": metrics,
             "final": True, **other}
    (folder / "results.jsonl").write_text(json.dumps(final) + "\n")
    return folder


def write_narrations(path, captioner):
    path.write_text(json.dumps({"video": "a", "captioner": captioner, "prompt": "", "sentences": []}) + "\n")
    return path


def write_similarity(run):
    rng = np.random.default_rng(0)
    video_of_query = np.repeat(np.arange(6), 2)
    arrays = {name: rng.normal(size=(12, 6)).astype(np.float32) for name in ("S_qv", "S_qn")}
    arrays["S_qv"][np.arange(12), video_of_query] += 2
    np.savez(run / "similarity.npz", video_of_query=video_of_query, videos=np.array(["v"] * 6), **arrays)
    return arrays, video_of_query


@pytest.fixture
def runs(tmp_path):
    """Two captioners (one with two seeds), a run without narration, a lambda and an eta sweep, a baseline."""
    blip, llava = (write_narrations(tmp_path / f"{name}.jsonl", name) for name in ("blip", "llava"))
    folder = tmp_path / "runs"
    for seed, recall in ((1, 50.0), (2, 52.0)):
        write_run(folder / f"llava{seed}", recall, "--seed", seed, narrations=llava)
    write_run(folder / "blip", 48.0, narrations=blip)
    write_run(folder / "bare", 44.0, "--modules", narrations=blip)
    write_run(folder / "bare_other_lr", 12.0, "--modules", "--lr", 1, narrations=blip)
    write_run(folder / "lam/1.1", 49.0, "--lam", 1.1, narrations=llava)
    write_run(folder / "eta/2.2", 47.0, "--eta", 2.2, narrations=llava)
    write_run(folder / "eta/2.2_other_epochs", 99.0, "--eta", 2.2, "--epochs", 9, narrations=llava)
    write_run(folder / "eta/2.2_on_test", 99.0, "--eta", 2.2, "--select_on", "test", narrations=llava)
    write_run(folder / "eta/2.2_without_cvh", 99.0, "--eta", 2.2, "--modules", "NM", narrations=llava)
    write_run(folder / "clip4clip", 40.0, "--method", "clip4clip")
    return folder


def test_figure3_takes_captioners_of_like_runs_and_the_same_without_narration(runs):
    found, bare = make_figures.captioner_data(make_figures.read_runs(runs))
    assert {name: sorted(values) for name, values in found.items()} == {"llava": [50.0, 52.0], "blip": [48.0]}
    assert bare == [44.0]
    assert drawing.mean_and_spread(found["llava"]) == (51.0, pytest.approx(2 ** 0.5))


def test_figure3_needs_two_captioners_that_are_on_disk(runs, tmp_path):
    (tmp_path / "blip.jsonl").unlink()
    assert make_figures.captioner_data(make_figures.read_runs(runs)) == ({}, [])


@pytest.mark.parametrize("flag, expected", [("lam", {0.7: [50.0, 52.0], 1.1: [49.0]}),
                                            ("eta", {1.8: [50.0, 52.0], 2.2: [47.0]})])
def test_figure7_takes_runs_that_differ_in_its_flag_and_the_seed_alone(runs, flag, expected):
    (_, found), = make_figures.sweep_data(make_figures.read_runs(runs), flag)
    assert {value: sorted(recalls) for value, recalls in found.items()} == expected
    assert list(found) == sorted(found)


def test_curves_take_the_last_time_that_a_step_was_run(tmp_path):
    run = write_run(tmp_path / "run", 50.0)
    (run / "log.txt").write_text(LOG)
    chosen = {"epoch": 1, "step": 0, "split": "val", "select_on": "val", "queries": 9, "videos": 9,
              "metrics": {"S_fusion": {"text_to_video": dict.fromkeys(NAMES, 50.0) | {"R@1": 30.0}}}}
    (run / "results.jsonl").write_text(json.dumps(chosen) + "\n" + (run / "results.jsonl").read_text())
    losses, points = make_figures.curve_data(make_figures.read_run(run, tmp_path))
    assert losses == {"loss": [(5, 3.0), (10, 2.4), (15, 2.0)], "nce_video": [(5, 2.0), (10, 1.4), (15, 1.25)],
                      "nce_narration": [(5, 1.0), (10, 1.0), (15, 0.75)]}
    assert points == [(10, 30.0)]


def test_the_log_of_a_real_run_is_read(tmp_path, corpus, weights):
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--checkpoint", weights, "--select_on", "val", "--epochs", 1,
                            "--save_similarity"))
    run, = make_figures.read_runs(tmp_path / "run")
    losses, chosen = make_figures.curve_data(run)
    assert [value for _, value in losses["loss"]] == tiny.losses(tmp_path / "run")
    assert [step for step, _ in losses["loss"]] == [1, 2] and [step for step, _ in chosen] == [2]
    assert run.recall == run.final["metrics"]["S_fusion"]["text_to_video"]["R@1"]
    arrays = make_figures.load_similarity(run)
    for name in ("S_qv", "S_qn"):
        expected = run.final["metrics"][name]["text_to_video"]["R@1"]
        assert drawing.own_recall(arrays, name) == pytest.approx(expected)


def test_recall_on_the_heat_map_is_that_of_the_metrics(tmp_path):
    run = write_run(tmp_path / "run", 50.0)
    arrays, video_of_query = write_similarity(run)
    expected = retrieval_metrics(arrays["S_qv"], video_of_query)["text_to_video"]["R@1"]
    stored = make_figures.load_similarity(make_figures.read_run(run, tmp_path))
    assert drawing.own_recall(stored, "S_qv") == expected


@pytest.mark.parametrize("part", [0, 3, 200, -1])
def test_half_a_similarity_file_is_one_sentence(tmp_path, part):
    run = write_run(tmp_path / "run", 50.0)
    write_similarity(run)
    path = run / "similarity.npz"
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(InputError, match="similarity.npz: cannot be read .*; delete it and evaluate again"):
        make_figures.load_similarity(make_figures.read_run(run, tmp_path))


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no run"):
        make_figures.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    run = write_run(tmp_path / "runs/x", 1.0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        make_figures.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--run y: .* has x"):
        make_figures.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--run", "y"])
    (run / "results.jsonl").write_text('{"final": true}\n')
    with pytest.raises(InputError, match="results.jsonl:1: is no result"):
        make_figures.read_runs(tmp_path / "runs")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib on this machine")
def test_every_figure_is_drawn_a_column_wide_and_what_is_missing_is_named(runs, tmp_path, capsys):
    write_similarity(runs / "blip")
    (runs / "blip" / "log.txt").write_text(LOG)
    make_figures.main(["--runs", str(runs), "--out", str(tmp_path / "out"), "--run", "blip", "bare", "llava1"])
    said = capsys.readouterr().out
    drawn = ["curves_blip", "figure3", "figure6_blip", "figure7", "heatmap_blip"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")]
    for name in drawn:
        pdf = (tmp_path / "out" / f"{name}.pdf").read_bytes()
        width = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf).group(1))
        assert width == pytest.approx(72 * drawing.WIDTH, abs=0.5)
        assert b"/Type3" not in pdf.replace(b" ", b"")  # fonts that publishers take
    assert "not drawn: figure6_llava1, heatmap_llava1" in said and "--save_similarity" in said
    assert "not drawn: curves_bare" in said and "figure3:" not in said and "figure7," not in said

"""scripts/ablate_demo.py: which pairs, which rows, what the table says; scripts/measure_update.py: what it measures."""

import csv
import json
import math
from pathlib import Path

import pytest
import tiny
import torch

import main_task_retrieval as trainer
from narvid.methods import NarVid
from narvid import InputError
from narvid.distributed import World
from narvid.report import launching
from scripts import ablate_demo, measure_update

ROOT = Path(__file__).resolve().parents[2]


def small_flags(corpus):
    """Those of tiny.py that are no path: for all rows."""
    given = tiny.flags(corpus, "none", "--clip_model", corpus / "clip.json", "--no-quick_gelu", "--epochs", 1,
                       "--eval_batch_size", 64)
    return given[2:4] + given[6:]


# ---- pairs and rows ----


def test_pairs_are_taken_evenly_and_choices_never_see_the_test_split(corpus, tmp_path):
    every = (corpus / "train.jsonl").read_text().splitlines()
    ablate_demo.take_pairs(corpus, tmp_path / "pairs", pairs=13, on="val")
    assert len(every) == 39 and (tmp_path / "pairs" / "train.jsonl").read_text().splitlines() == every[::3]
    assert (tmp_path / "pairs" / "test.jsonl").read_text() == (corpus / "val.jsonl").read_text()
    with pytest.raises(InputError, match="39 pairs, the steps take 40"):
        ablate_demo.take_pairs(corpus, tmp_path / "pairs", pairs=40, on="test")
    with pytest.raises(InputError, match="none.*ablate_demo.sh"):
        ablate_demo.take_pairs(tmp_path / "none", tmp_path / "pairs", pairs=1, on="test")


def test_every_row_differs_from_the_preset_where_its_table_says(corpus):
    def matching(run):
        given = ["--config", ROOT / "configs" / "ablate_demo.yaml", *ablate_demo.ROWS[run], "--output_dir", "x"]
        args = trainer.parse_args([str(x) for x in given])
        how = NarVid.filter_options(args)
        return len(args.modules), how["method"], {"topk": how["k"], "nucleus": how["p"]}.get(how["method"]), (
            args.hard_loss if "CVH" in args.modules else None)

    p = trainer.parse_args(["--config", str(ROOT / "configs" / "ablate_demo.yaml"), "--output_dir", "x"]).filter_p
    assert [matching(run) for _, run, _ in ablate_demo.TABLES["Table 3: modules"]] == [
        (0, "uniform", None, None), (1, "uniform", None, None), (2, "uniform", None, None), (3, "nucleus", p, None),
        (4, "nucleus", p, "hinge")]
    assert [matching(run)[1:3] for _, run, _ in ablate_demo.TABLES["Table 4: filters, all modules on"]] == [
        ("none", None), ("topk", 3), ("topk", 4), ("nucleus", 0.3), ("nucleus", 0.4), ("nucleus", p)]
    assert [matching(run)[3] for _, run, _ in ablate_demo.TABLES["Table 11: losses, all else on"]] == [
        None, "nce", "hinge"]


def test_rows_are_trained_from_the_same_towers_once_and_tabulated(corpus, tmp_path, monkeypatch):
    towers = tmp_path / "towers"
    towers.mkdir()
    tiny.write_checkpoint(towers / "best.pt", corpus / "clip.json")
    preset = tmp_path / "preset.yaml"
    preset.write_text("filter_p: 0.9\n")
    trained = []

    def in_this_process(_, argv, place):
        trained.append(argv[-1])
        trainer.main(argv)

    monkeypatch.setattr(launching.Children, "train", in_this_process)
    flags = ["--config", preset, "--corpus", corpus, "--towers", towers, "--out", tmp_path / "out", "--seeds", 1,
             "--steps", 1, "--jobs", 1, "--samples", 200, "--only", "qaf", "cvh"]
    flags = [str(x) for x in flags] + small_flags(corpus)
    ablate_demo.main(flags)
    assert [Path(run).name for run in trained] == ["qaf_seed1", "cvh_seed1"]
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "11 videos" in text and "1 steps" in text and "\ncvh: R@1 " in text and "## Table" not in text
    best = torch.load(tmp_path / "out" / "qaf_seed1" / "best.pt", weights_only=True)["model"]
    start = torch.load(towers / "best.pt", weights_only=True)["model"]
    # the first step's rate is 0: what is stored are the weights that the row started from
    assert all(torch.equal(best[key], start[key]) for key in start if key.startswith("clip."))
    ablate_demo.main(flags)  # nothing is left to do
    assert len(trained) == 2 and (tmp_path / "out" / "ablation.md").read_text() == text
    with pytest.raises(InputError, match="another run .*lam"):
        ablate_demo.main([*flags, "--lam", "0.5"])


def test_a_run_that_fails_is_named_with_what_it_said(monkeypatch):
    monkeypatch.setattr(ablate_demo, "unfinished", lambda runs: runs)
    monkeypatch.setattr(launching.Children, "train", lambda _, argv, place: "no such flag")
    with pytest.raises(InputError, match="^cvh, seed 1: the run failed: no such flag$"):
        ablate_demo.train_all({"cvh, seed 1": []}, jobs=1, threads=1)


def test_towers_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="best.pt.*ablate_demo.sh"):
        ablate_demo.export_towers(tmp_path, tmp_path / "towers.pt")


def write_run(folder, ranks, kept=None):
    """A finished run of one matrix: ranks (B,), query i of video i."""
    folder.mkdir(parents=True)
    with open(folder / "ranks.csv", "w", newline="") as f:
        csv.writer(f).writerows([("video", "query", "S_qv"), *((f"v{i}", f"q{i}", r) for i, r in enumerate(ranks))])
    score = 100 * sum(rank <= 1 for rank in ranks) / len(ranks)
    result = {"final": True, "metrics": {"S_qv": {"text_to_video": {"R@1": score}}}}
    result |= {"frames_kept": {"video": kept, "narration": kept}} if kept else {}
    (folder / "results.jsonl").write_text(json.dumps(result) + "\n")
    return folder


def test_the_table_by_hand(tmp_path):
    ranks = {"a": [[1, 2, 6, 20], [1, 1, 6, 20]], "b": [[1, 1, 1, 4], [1, 1, 1, 4]], "c": [[1, 1, 1, 1], [1, 1, 1, 1]]}
    runs = {name: [write_run(tmp_path / name / str(i), of, kept=2.5 if name == "c" else None)
                   for i, of in enumerate(both)] for name, both in ranks.items()}
    lines = ablate_demo.table_of("T", [("A", "a", 44.5), ("B", "b", None), ("C", "c", None)], runs, samples=300)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert cells[0][:8] == ["A", "37.5 ±17.7", "50.0 ± 0.0", "75.0 ± 0.0", "3.75", "37.5", "", ""]
    assert cells[0][8:] == ["", "", "44.5"]
    assert cells[1][1] == "75.0 ± 0.0" and cells[1][8].startswith("+37.50 [") and cells[1][9] == ""
    assert cells[2][7] == "2.50 / 2.50"
    assert cells[2][8].startswith("+25.00 [") and cells[2][9].startswith("+62.50 [")


# ---- how far a step moves the weights ----


def test_every_weight_has_one_part_and_blocks_are_split_by_depth(corpus):
    model = tiny.first_step(tiny.flags(corpus, "none")).model
    parts = measure_update.parts_of(model)
    whole = parts.pop("all of CLIP")
    found = [id(p) for weights in parts.values() for p in weights]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found) == len(set(found)) and set(found) == trained
    assert {id(p) for p in whole} == {id(p) for p in model.clip.parameters() if p.requires_grad}
    names = [measure_update.part_of(f"clip.visual.transformer.resblocks.{i}.ln_1.weight", (12, 6)) for i in (0, 5, 11)]
    assert names == ["image blocks, low", "image blocks, mid", "image blocks, high"]
    assert measure_update.part_of("clip.transformer.resblocks.5.ln_1.weight", (12, 6)) == "text blocks, high"


def test_change_by_hand_also_where_fp16_would_lose_it():
    before, after = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert measure_update.change([before], [after]) == (0.1, 0.5)
    tiny_before = torch.tensor([1.0, 6e-8], dtype=torch.float16)
    relative, moved = measure_update.change([tiny_before], [torch.tensor([1.0, 0.0], dtype=torch.float16)])
    assert relative == pytest.approx(6e-8, rel=0.01) and moved == 0.5


def test_the_matching_rate_between_and_beyond_the_measured_ones():
    rates, found = [1e-7, 1e-6, 1e-5], [2e-5, 2e-4, 4e-3]
    assert measure_update.matching_rate(2e-4, rates, found) == pytest.approx(1e-6)
    assert measure_update.matching_rate(math.sqrt(2e-4 * 2e-5), rates, found) == pytest.approx(10**-6.5)
    assert measure_update.matching_rate(2e-6, rates, found) == pytest.approx(1e-8)
    assert math.isnan(measure_update.matching_rate(0.0, rates, found))
    assert math.isnan(measure_update.matching_rate(1e-3, rates, [1e-3, 1e-3, 1e-3]))  # they say nothing about rates


def test_a_run_of_either_recipe_is_measured_on_the_same_batches(corpus, tmp_path):
    world, common = World(0, 1, torch.device("cpu")), tiny.flags(corpus, tmp_path / "none", "--select_on", "last")
    slow, splits = measure_update.measure([*common, "--clip_lr", "1e-6"], 1, world, None)
    fast, _ = measure_update.measure([*common, "--clip_lr", "1e-5"], 1, world, splits)
    half, _ = measure_update.measure([*common, "--recipe", "reported", "--clip_lr", "1e-7"], 1, world, splits)
    assert slow.keys() == fast.keys() == half.keys()
    # of the first step AdamW changes each weight by the rate, whatever the gradient
    assert fast["all of CLIP"][0] == pytest.approx(10 * slow["all of CLIP"][0], rel=0.01)
    assert fast["co-attention"] == slow["co-attention"]
    assert half["image blocks, low"][0] != slow["image blocks, low"][0]
    assert not (tmp_path / "none").exists()
    text = measure_update.show(half, [slow, fast], [1e-6, 1e-5])
    assert len(text.splitlines()) == 2 + len(half) and "all of CLIP" in text
    with pytest.raises(InputError, match="--steps 9"):
        measure_update.measure(common, 9, world, splits)


def test_one_rate_is_refused():
    with pytest.raises(InputError, match="two rates or more"):
        measure_update.main(["--rates", "1e-6"])

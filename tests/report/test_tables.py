"""scripts/eval_tables.py and its data: published numbers are sane, every row can be run, a run finds its rows and no
others, what is printed is what the results say."""

import csv
import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import main_task_retrieval as trainer
from narvid import InputError
from narvid.methods import narvid
from narvid.report import tables as eval_tables
from narvid.report.published import PUBLISHED, differences, meaning, read_published

ROOT = Path(__file__).resolve().parents[2]
CONTENT = yaml.safe_load(PUBLISHED.read_text())
ENTRIES = [(f"{table['table']}, {part}, {entry['row']}", table, entry) for table in CONTENT["tables"]
           for part, entries in table["parts"].items() for entry in entries]
T2V, V2T = "text_to_video", "video_to_text"
METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")


@pytest.fixture(scope="module")
def rows():
    return read_published()[1]


# ---- the data file ----


def test_the_tables_of_the_design_are_there():
    numbers = ["Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 8", "Table 9", "Table 10", "Table 11"]
    assert [table["table"] for table in CONTENT["tables"]] == [
        *(f"NarVid, {number}" for number in numbers), "CLIP2Video", "InternVideo", "CLIP4Clip (MMAction2)",
        "PE-Core, zero-shot"]


@pytest.mark.parametrize("table, entry", [pytest.param(*x[1:], id=x[0]) for x in ENTRIES])
def test_published_numbers_are_ranks_and_percentages(table, entry):
    assert entry.keys() <= {"row", "T2V", "V2T", "kept", "preset", "flags", "matrix", "checkpoint", "eval_only",
                            "released"}
    assert "T2V" in entry and list(table["metrics"]) == list(METRICS[:len(table["metrics"])])
    for direction in {"T2V", "V2T"} & entry.keys():
        values = entry[direction]
        assert len(values) == len(table["metrics"])
        assert all(0 < low < high for low, high in pairwise([*values[:3], 100]))
        assert all(value is None or value >= 1 for value in values[3:])
        if len(values) > 3:  # half of the ranks are at most the median
            for k, recall in zip((1, 5, 10), values):
                assert recall == 50 or (recall > 50) == (values[3] <= k)
    assert 0 < entry.get("kept", 1) <= 12


def test_every_row_with_a_preset_can_be_run_and_the_others_are_of_other_systems(rows):
    """Resolving a row parses its flags under its method: read_published would have left with a sentence."""
    assert len(rows) == len(ENTRIES)
    for row, (_, _, entry) in zip(rows, ENTRIES):
        assert bool(row.ways) == bool(row.commands) == ("preset" in entry)
        assert "preset" in entry or not re.match("NarVid|Cap4Video|CLIP4Clip|CLIP2Video|InternVideo", entry["row"])
        if row.ways:
            assert row.ways["trained"]["data_dir"] in CONTENT["corpora"] and row.test[0] >= row.test[1]


def test_rows_with_different_numbers_are_different_runs(rows):
    """Except DiDeMo's, where the paper gives two numbers to one row: a flag forgotten in the file would show here."""
    shared = set()
    for i, a in enumerate(rows):
        for b in rows[:i]:
            if a.ways and b.ways and a.ways["trained"] == b.ways["trained"] and (a.matrix or "S_fusion") == (
                    b.matrix or "S_fusion") and a.published["T2V"][:3] != b.published["T2V"][:3]:
                shared.add((b.table, a.table))
    assert shared == {("NarVid, Table 2", "NarVid, Table 10")}


def test_the_presets_headers_say_the_same_numbers():
    """They were copied by other hands."""
    seen = 0
    for name, _, entry in ENTRIES:
        same = entry.get("flags", {}).keys() <= {"data_dir", "stage", "freeze_towers"}
        if "preset" not in entry or "matrix" in entry or not same or "Table 2, " in name and "CLIP4Clip" in name:
            continue  # not the row of the header
        text = (ROOT / "configs" / f"{entry['preset']}.yaml").read_text()
        for direction, values in (("text-to-video", entry["T2V"]), ("video-to-text", entry.get("V2T", []))):
            said = re.search(rf"# .*{direction}((?: +\d+(?:\.\d+)?)+)", text)
            if said and values:
                pairs = list(zip(map(float, said[1].split()), values))
                assert all(of_preset == here for of_preset, here in pairs), (name, direction)
                seen += len(pairs)
    assert seen >= 150


# ---- which run is whose ----


def config_of(*argv):
    """What a run with these flags writes to config.yaml."""
    args = vars(trainer.parse_args([str(word) for word in (*argv, "--output_dir", "out")]))
    return json.loads(json.dumps(args))


def preset(name, *argv):
    return config_of("--config", ROOT / "configs" / f"{name}.yaml", *argv)


def rows_of(config, rows):
    found = [row for row in rows for way in row.ways.values() if not differences(meaning(config), way)]
    return [f"{row.table}: {row.name}" for row in found]


ABLATED = ["NarVid, Table 3: NM CMI QAF", "NarVid, Table 5: alpha 0", "NarVid, Table 11: L_NCE"]
MAIN = ["NarVid, Table 1: NarVid", "NarVid, Table 3: NM CMI QAF CVH", "NarVid, Table 4: nucleus p=0.4",
        "NarVid, Table 5: alpha 1.0", *(f"NarVid, Table 10: {m}" for m in ("S_qv", "S_qn", "S_sum", "S_fusion")),
        "NarVid, Table 11: L_NCE + L_CVH"]


def test_without_its_module_the_hard_negatives_say_nothing_but_other_losses_do(monkeypatch):
    off = {"hard_loss", "lam", "eta", "alpha"}
    assert off <= meaning(preset("msrvtt_vitb32")).keys()
    for flags in (["--modules", "NM", "CMI"], ["--alpha", 0]):
        config = preset("msrvtt_vitb32", *flags)
        assert not off & meaning(config).keys()
        monkeypatch.setattr(narvid.NarVid, "loss_flags", narvid.NarVid.loss_flags | {"another_weight"})
        assert meaning(config | {"another_weight": 0.5})["another_weight"] == 0.5


@pytest.mark.parametrize("config, wanted", [
    (preset("msrvtt_vitb32"), MAIN),
    (preset("msrvtt_vitb32", "--seed", 7, "--data_dir", "/ssd/msrvtt", "--frames", "/ram/f", "--num_workers", 9,
            "--dsl_scale", 100, "--select_on", "test", "--clip_pretrained", "/w/ViT-B-32.pt"), MAIN),
    (preset("msrvtt_vitb32", "--data_dir", "/ssd/MSRVTT"), []),
    (preset("msrvtt_vitb32", "--epochs", 6), []),
    (preset("msrvtt_vitb32", "--narrations", "blip.jsonl"), []),
    (preset("msrvtt_vitb32", "--alpha", 0), ABLATED),
    (preset("msrvtt_vitb32", "--modules", "QAF", "CMI", "NM", "--lam", 3), ABLATED),
    (preset("msrvtt_vitb32", "--filter", "topk", "--filter_k", 4, "--filter_p", 0.9), ["NarVid, Table 4: top-k k=4"]),
    (preset("msrvtt_vitb32", "--modules"), ["NarVid, Table 3: none"]),
    (preset("msvd", "--narrations", "/x/narrations_prompt_b.jsonl"), ["NarVid, Table 8: prompt B"]),
    (preset("clip4clip_msrvtt_vitb32", "--data_dir", "/x/vatex"), ["NarVid, Table 2: CLIP4Clip"]),
    (preset("internvideo_msvd"), []),  # from CLIP, not from the released weights
    (preset("internvideo_msvd") | {"checkpoint": "/w/InternVideo.ckpt"}, ["InternVideo: MSVD"]),
    (preset("internvideo_msvd") | {"checkpoint": "/w/tuned.bin", "eval_only": True}, ["InternVideo: MSVD"]),
    (preset("msrvtt_vitb32") | {"an_idea_of_mine": 0.5}, []),
])
def test_a_run_belongs_to_the_rows_that_its_flags_mean(config, wanted, rows):
    assert rows_of(config, rows) == wanted


def test_a_run_older_than_a_flag_still_belongs(rows):
    config = preset("msrvtt_vitb32")
    del config["frame_sampling"], config["method"]
    assert rows_of(config, rows) == MAIN


# ---- the tables ----


def write_run(path, config, *values, matrices=("S_qv", "S_qn", "S_sum", "S_fusion"), **more):
    """A run directory with a final result, each value of matrix i lowered by i; without values an unfinished one."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("# commit: 0\n" + yaml.safe_dump(config))
    if values:
        metrics = {name: {d: dict(zip(METRICS, (v - i for v in values))) for d in (T2V, V2T)}
                   for i, name in enumerate(reversed(matrices))}
        final = {"split": "test", "select_on": config["select_on"], "queries": 1000, "videos": 1000,
                 "metrics": dict(reversed(metrics.items())), "final": True} | more
        lines = [final | {"split": "val", "final": False}, final]
        (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def show(rows, capsys, monkeypatch):
    """folder -> (what is printed, the lines of tables.csv as dictionaries)."""
    monkeypatch.setattr(eval_tables, "read_published", lambda: (CONTENT["tables"], rows))  # read once, for speed
    return partial(_show, capsys)


def _show(capsys, folder):
    eval_tables.main([str(folder)])
    text = (folder / "tables.md").read_text()
    assert capsys.readouterr().out == text + "\n" and not list(folder.glob(".*"))
    with open(folder / "tables.csv", newline="") as f:
        return text, list(csv.DictReader(f))


def test_seeds_are_averaged_and_what_must_not_be_mixed_is_not(tmp_path, show):
    dsl = {"S_fusion": {T2V: dict.fromkeys(METRICS, 60.0), V2T: dict.fromkeys(METRICS, 61.0)}}
    qb_norm = {"S_fusion": {T2V: dict.fromkeys(METRICS, 70.0)}}
    config = preset("msrvtt_vitb32")
    write_run(tmp_path / "a", config, 50.0, 75.0, 85.0, 1.0, 12.0, frames_kept={"video": 3.5, "narration": 3.0})
    write_run(tmp_path / "deep" / "b", config | {"seed": 1}, 52.0, 77.0, 87.0, 2.0, 14.0, dsl=dsl, qb_norm=qb_norm)
    write_run(tmp_path / "c", config | {"select_on": "test"}, 56.0, 78.0, 88.0, 1.0, 9.0)
    write_run(tmp_path / "d", config, 57.0, 79.0, 89.0, 1.0, 8.0, queries=998, videos=998)
    text, lines = show(tmp_path)

    found = [line for line in lines if line["row"] == "NarVid" and line["part"] == "CLIP ViT-B/32"]
    first = {(line["select_on"], line["status"]): line for line in found
             if line["direction"] == T2V and line["metric"] == "R@1"}
    assert len(first) == 3 and len(found) == 3 * 2 * 5
    seeds = first["last", "run"]
    assert [float(seeds[k]) for k in ("published", "ours", "spread", "runs", "dsl", "qb_norm")] == pytest.approx(
        [51.0, 51.0, 2 ** 0.5, 2, 60.0, 70.0])
    assert float(seeds["difference"]) == pytest.approx(0) and first["last", "other test set"]["difference"] == ""
    assert "| CLIP ViT-B/32 | NarVid    | 51.0 / 76.4 / 85.2 / 1.0 / 11.6 | 51.0 / 76.0 / 86.0 / 1.5 / 13.0 " in text
    assert "| +0.0 / -0.4 / +0.8 / +0.5 / +1.4 | ±1.4 / ±1.4 / ±1.4 / ±0.7 / ±1.4 (2) | last " in text
    assert "(other test set: 998 queries, 998 videos)" in text
    backwards = [line for line in found if line["direction"] == V2T and line["select_on"] == "last"
                 and line["status"] == "run" and line["metric"] == "R@5"]
    assert float(backwards[0]["dsl"]) == 61.0 and backwards[0]["qb_norm"] == ""

    by_matrix = {line["row"]: float(line["ours"]) for line in lines if line["table"] == "NarVid, Table 10"
                 and line["metric"] == "R@1" and line["direction"] == T2V and line["runs"] == "2"}
    assert by_matrix == {"S_qv": 48.0, "S_qn": 49.0, "S_sum": 50.0, "S_fusion": 51.0}
    assert "3.57            | 3.50 (video), 3.00 (narration)" in text
    assert f"- {tmp_path / 'deep' / 'b'}: seed 1, frames data/msrvtt/frames" in text


def test_what_is_not_there_is_said_with_the_command_for_it(tmp_path, show):
    config = preset("msrvtt_vitb16")
    write_run(tmp_path / "started", config)
    write_run(tmp_path / "other", preset("msvd", "--lam", 3, "--epochs", 7), 50.0, 75.0, 85.0, 1.0, 12.0)
    write_run(tmp_path / "torn", config)
    (tmp_path / "torn" / "results.jsonl").write_text('{"split": "te')
    write_run(tmp_path / "foreign", {"lr": 1})
    write_run(tmp_path / "demo", preset("demo"), 50.0, 75.0, 85.0, 1.0, 12.0)
    write_run(tmp_path / "evaluated", preset("didemo") | {"eval_only": True, "checkpoint": "/gone/best.pt"}, 50.0, 75.0,
              85.0, 1.0, 12.0)
    (tmp_path / "empty").mkdir()
    text, lines = show(tmp_path)
    said = [line for line in text.splitlines() if line.startswith(f"- {tmp_path}")]
    said = {line.split(":")[0].rpartition("/")[2]: line for line in said}
    assert "unfinished, 0 of 5 epochs" in said["started"]
    assert "nearest is NarVid, Table 2, MSVD, NarVid: epochs 7, not 5; lam 3.0, not 0.9" in said["other"]
    assert "cannot be read" in said["torn"] and "has no data_dir" in said["foreign"]
    assert "whose run is not here" in said["evaluated"] and "no table is of demo," in said["demo"]
    assert {line["status"] for line in lines} == {"unfinished", "not run", "published only"}
    number = re.search(r"NM CMI QAF  .* not run \[(\d+)\]", text)[1]
    assert (f"\n{number}. `bash scripts/train_preset.sh msrvtt_vitb32 --modules NM CMI QAF --output_dir "
            "runs/msrvtt_vitb32_modules_NM_CMI_QAF`\n") in text
    assert all(line["ours"] == "" for line in lines) and all(
        bool(line["command"]) == (line["status"] != "published only") for line in lines)
    with pytest.raises(InputError, match="is no folder"):
        eval_tables.main([str(tmp_path / "nowhere")])


def test_released_weights_have_a_line_of_their_own(tmp_path, show):
    config, matrices = preset("clip2video_msvd"), ("S_global", "S_alignment", "S_fusion")
    of = {"matrices": matrices, "queries": 27763, "videos": 670}
    write_run(tmp_path / "mine", config, 40.0, 70.0, 80.0, 2.0, 12.0, **of)
    write_run(tmp_path / "theirs", config | {"eval_only": True, "checkpoint": "/w/pytorch_model.bin.2",
                                             "select_on": "unknown"}, 46.0, 76.0, 85.0, 2.0, 10.0, **of)
    ours = {line["row"]: float(line["ours"]) for line in show(tmp_path)[1]
            if line["table"] == "CLIP2Video" and line["metric"] == "R@1" and line["direction"] == T2V and line["ours"]}
    assert ours == {"MSVD": 40.0, "MSVD (released weights)": 46.0}


# ---- evaluating what was not ----


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of one epoch on the tiny corpus."""
    path = tmp_path_factory.mktemp("runs") / "run"
    trainer.main(tiny.flags(corpus, path, "--epochs", 1, "--select_on", "last"))
    return path


def the_run(path):
    (run,), said = eval_tables.read_runs(path.parent)
    assert said == []
    return run


def test_a_run_trained_to_the_end_is_evaluated_once(trained, monkeypatch):
    before = eval_tables.final_result(trained)
    (trained / "results.jsonl").unlink()
    run = the_run(trained)
    assert run.result is None
    eval_tables.complete(run, kept=True)
    assert run.why == "" and run.result["metrics"] == before["metrics"] and run.result["select_on"] == "last"
    assert run.result["frames_kept"] == before["frames_kept"]

    monkeypatch.setattr(eval_tables.subprocess, "run", lambda *_, **__: pytest.fail("evaluated again"))
    again = the_run(trained)
    eval_tables.complete(again, kept=True)
    assert again.result == run.result


def test_unfinished_runs_and_missing_data_are_named(trained, tmp_path):
    def moved(name, **changed):
        """A copy of the run whose last.pt says otherwise, under another config."""
        path = tmp_path / name / "run"
        path.mkdir(parents=True)
        (path / "best.pt").symlink_to(trained / "best.pt")
        torch.save({"epoch": changed.pop("epoch", 1)}, path / "last.pt")
        config = yaml.safe_load((trained / "config.yaml").read_text()) | changed
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        run = the_run(path)
        eval_tables.complete(run, kept=False)
        assert run.result is None and not (path / "eval").exists()
        return run.why

    assert moved("half", epoch=0) == "unfinished, 0 of 1 epochs; start its command again with --resume auto"
    assert moved("gone", data_dir="nowhere/msrvtt", frames="nowhere/msrvtt/frames").startswith(
        "could not be evaluated: error: nowhere/msrvtt")


def test_an_evaluation_of_a_run_adds_what_the_run_lacks_and_is_no_second_seed(tmp_path, show):
    config = preset("msrvtt_vitb32")
    run = write_run(tmp_path / "run", config, 50.0, 75.0, 85.0, 1.0, 12.0, frames_kept={"video": 3.5})
    dsl = {"S_fusion": {d: dict.fromkeys(METRICS, 60.0) for d in (T2V, V2T)}}
    write_run(tmp_path / "dsl", config | {"eval_only": True, "checkpoint": str(run / "best.pt")}, 1.0, 2.0, 3.0, 4.0,
              5.0, dsl=dsl)
    qb_norm = {"S_fusion": {T2V: dict.fromkeys(METRICS, 70.0)}}
    write_run(run / "eval", config | {"eval_only": True, "checkpoint": "/before/it/was/moved/best.pt"}, 1.0, 2.0, 3.0,
              4.0, 5.0, qb_norm=qb_norm)
    text, lines = show(tmp_path)
    assert "## Runs without a row" not in text
    line, = [line for line in lines if line["row"] == "NarVid" and line["part"] == "CLIP ViT-B/32"
             and line["metric"] == "R@1" and line["direction"] == T2V]
    assert [float(line[k]) for k in ("ours", "dsl", "qb_norm", "runs")] == [50.0, 60.0, 70.0, 1]

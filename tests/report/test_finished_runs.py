"""narvid/report/runs.py: one sentence for a broken run directory, whichever file and value is broken."""

import json
import shutil

import numpy as np
import pytest
import tiny
import yaml

import main_task_retrieval as trainer
from narvid import InputError
from narvid.report import runs


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of one epoch on the tiny corpus."""
    path = tmp_path_factory.mktemp("runs") / "run"
    trainer.main(tiny.flags(corpus, path, "--epochs", 1, "--select_on", "val"))
    return path


def test_what_a_run_writes_is_read(run):
    config, results = runs.read_config(run), runs.read_results(run)
    assert config["epochs"] == 1 and config["select_on"] == "val"
    assert [result["split"] for result in results] == ["val", "test"] and runs.final_of(results) == results[1]
    pairs, ranks, matrix = runs.read_ranks(run, None)
    assert len(pairs) == len(ranks) == 26 and matrix == "S_fusion" and ranks.min() >= 1
    assert runs.read_ranks(run, "S_qv")[2] == "S_qv"
    wanted = results[1]["metrics"]["S_fusion"]["text_to_video"]["MnR"]
    assert ranks.mean() == pytest.approx(wanted)


def test_a_run_that_has_not_ended_has_no_final_result(run, tmp_path):
    assert runs.read_results(tmp_path) == [] and runs.final_of([]) is None
    assert runs.final_of(runs.read_results(run)[:1]) is None


def changed(run, tmp_path, name, text):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return copy


CONFIGS = ["", "- a list", "{", "a: [1, 2", "[" * 5000, "method: clip3clip", "method: [narvid]", "1: 2", "epochs: many",
           b"\xff\xfe"]


@pytest.mark.parametrize("text", CONFIGS)
def test_a_broken_config_is_one_sentence(run, tmp_path, text):
    copy = changed(run, tmp_path, "config.yaml", text)
    with pytest.raises(InputError, match=r"config.yaml.*(; remove this run or evaluate it again|; save it as UTF-8)$"):
        runs.read_config(copy)


@pytest.mark.parametrize("flag, value", [("epochs", "many"), ("modules", 3), ("modules", ["XX"]), ("lr", {"a": 1}),
                                         ("max_frames", None), ("exclude_same_video", "perhaps"), ("filter_p", 7)])
def test_a_value_that_no_flag_takes_is_named(run, tmp_path, flag, value):
    config = yaml.safe_load((run / "config.yaml").read_text()) | {flag: value}
    copy = changed(run, tmp_path, "config.yaml", yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"config.yaml: .*{flag}"):
        runs.read_config(copy)


def test_results_are_checked_line_by_line(run, tmp_path):
    first, last = (run / "results.jsonl").read_text().splitlines()
    good = json.loads(last)
    broken = ["{}", "[]", "3", "{", "[" * 100_000, "null", json.dumps(good | {"metrics": {}}),
              json.dumps(good | {"metrics": {"S_qv": {"text_to_video": {"R@1": 3.0}}}}),
              json.dumps(good | {"metrics": {"S_qv": 3}}), json.dumps(good | {"queries": "many"}),
              json.dumps(good | {"metrics": good["metrics"] | {"S_qv": {"text_to_video": dict.fromkeys(
                  ("R@1", "R@5", "R@10", "MdR", "MnR"), float("nan"))}}}),
              json.dumps(good | {"dsl": []}), json.dumps(good | {"frames_kept": {"video": None}})]
    for number, line in enumerate(broken):
        copy = changed(run, tmp_path / str(number), "results.jsonl", f"{first}\n{line}\n{last}\n")
        with pytest.raises(InputError, match="results.jsonl:2: .*; remove this run or evaluate it again"):
            runs.read_results(copy)


def test_ranks_with_a_byte_order_mark_are_read(run, tmp_path):
    copy = changed(run, tmp_path, "ranks.csv", b"\xef\xbb\xbf" + (run / "ranks.csv").read_bytes())
    (pairs, ranks, _), (again, same, _) = runs.read_ranks(run, None), runs.read_ranks(copy, None)
    assert pairs == again and np.array_equal(ranks, same)


@pytest.mark.parametrize("text, said", [
    ("", "is empty"), ("video,query,S_qv\n", "no line below"), ("video,S_qv\na,1\n", "no column 'query'"),
    ("video,query\na,b\n", "holds no ranks"),
    ("video,query,S_qv\na,b,0\n", ":2: .*above 0"), ("video,query,S_qv\na,b,1\na,b\n", ":3: "),
    ("video,query,S_qv\na,b,-1\n", ":2: .*above 0"), ("video,query,S_qv\na,b,1e3\n", ":2: .*above 0"),
    ("video,query,S_qv\na,b," + "9" * 6000 + "\n", ":2: .*above 0"), ("video,query,S_qv\na,b,١\n", ":2: "),
    (b"\xff\xfe", "is UTF-16 text"), (b"\xe9", "not UTF-8"),
])
def test_broken_ranks_are_one_sentence(run, tmp_path, text, said):
    with pytest.raises(InputError, match=f"ranks.csv.*{said}"):
        runs.read_ranks(changed(run, tmp_path, "ranks.csv", text), None)

"""scripts/compare_runs.py on ranks.csv files: what it prints and refuses; and that the trainer writes such files."""

import csv

import numpy as np
import pytest
import tiny

import main_task_retrieval as trainer
from narvid import InputError
from narvid.data.datasets import read_queries
from narvid.metrics import summarise
from narvid.report import comparison as compare_runs
from narvid.report.runs import read_ranks


def write(folder, ranks, queries=None):
    """A run's ranks.csv with one matrix."""
    folder.mkdir()
    with open(folder / "ranks.csv", "w", newline="") as f:
        queries = queries or [f"query, {i}" for i in range(len(ranks))]
        videos = [f"v{i}" for i in range(len(ranks))]
        csv.writer(f).writerows([("video", "query", "S_qv"), *zip(videos, queries, ranks)])
    return folder


def test_seeds_get_mean_and_spread_and_a_clear_difference_is_one(tmp_path, capsys):
    rng = np.random.default_rng(0)
    a = [write(tmp_path / f"a{i}", rng.integers(1, 20, 300)) for i in range(3)]
    b = [write(tmp_path / f"b{i}", rng.integers(1, 4, 300)) for i in range(3)]
    compare_runs.main(["--a", *map(str, a), "--b", *map(str, b), "--samples", "500"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("300 queries, 300 videos; A: 3 run(s), S_qv; B: 3 run(s), S_qv")
    assert lines[2].startswith("R@1") and "±" in lines[2] and lines[2].split()[-1] == "0.0020"


@pytest.mark.parametrize("change, said", [
    (dict(queries=["other"] * 5), "other queries"),
    (dict(ranks=["1", "2", "x", "1", "1"]), "no whole number above 0"),
])
def test_refuses(tmp_path, change, said):
    a = write(tmp_path / "a", [1, 2, 3, 4, 5])
    b = write(tmp_path / "b", **dict(dict(ranks=[1, 2, 3, 4, 5]), **change))
    with pytest.raises(InputError, match=said):
        compare_runs.main(["--a", str(a), "--b", str(b)])
    with pytest.raises(InputError, match="name folders of runs"):
        compare_runs.main(["--a", str(a), "--b", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no matrix S_qn"):
        compare_runs.main(["--a", str(a), "--b", str(a), "--matrix", "S_qn"])


@pytest.mark.parametrize("samples", ["0", "-1", "1.5", "x", str(10**30), "9" * 6000])
def test_samples_of_the_bootstrap_that_are_no_number_of_any(tmp_path, samples):
    a = write(tmp_path / "a", [1, 2, 3])
    with pytest.raises(SystemExit, match=r"--samples: \S+ is not a whole number from 1 to 1000000"):
        compare_runs.main(["--a", str(a), "--b", str(a), "--samples", samples])


def test_a_run_writes_the_ranks_of_its_table(corpus, tmp_path, capsys):
    returned = trainer.main(tiny.flags(corpus, tmp_path / "run"))
    for matrix, metrics in returned.items():
        pairs, ranks, name = read_ranks(tmp_path / "run", matrix)
        assert name == matrix and summarise(ranks) == metrics["text_to_video"]
    assert [query for _, query in pairs] == read_queries(corpus / "test.jsonl")

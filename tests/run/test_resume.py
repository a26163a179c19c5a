"""A run killed at any moment and continued ends as if nothing had happened: bit for bit, on CPU, in one process.

Killed means SIGKILL: nothing is tidied up. A process counts its own moments (before, after and in the middle of every
write, before and after every step) and dies at the n-th, or is shot from outside.
"""

import io
import itertools
import os
import random
import signal
import time

import numpy as np
import pytest
import tiny
import torch

import main_task_retrieval as trainer

pytestmark = pytest.mark.slow

# Dropout on, evaluations and saves inside the epochs, 2 x 4 steps: there is much that could go another way.
FLAGS = ("--batch_size", 8, "--dropout", 0.3, "--eval_every", 3, "--save_every", 1, "--save_similarity")


def die_at(moment, argv):
    """main(argv), which kills its own process at the n-th moment."""
    count = itertools.count(1)
    real_replace, real_save, real_step = os.replace, torch.save, trainer.train_step

    def tick():
        if next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(source, target):
        tick()
        real_replace(source, target)
        tick()

    def save(state, file):
        whole = io.BytesIO()
        real_save(state, whole)
        file.write(whole.getvalue()[:1000])
        file.flush()
        tick()  # torn
        file.write(whole.getvalue()[1000:])

    def step(*args):
        tick()
        parts = real_step(*args)
        tick()
        return parts

    os.replace, torch.save, trainer.train_step = replace, save, step
    trainer.main(argv)


def assert_same(a, b, where=""):
    """Nested checkpoints are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(one, other):
    """The folders of two runs hold the same, but for the flags that may differ."""
    names = {"config.yaml", "log.txt", "results.jsonl", "last.pt", "best.pt", "similarity.npz", "ranks.csv"}
    assert {p.name for p in other.iterdir()} - {".lock"} == names
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(run / name, weights_only=True) for run in (one, other))
        a.pop("args"), b.pop("args")
        assert_same(a, b, name)
    for name in ("results.jsonl", "ranks.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (np.load(run / "similarity.npz") for run in (one, other))
    assert all(np.array_equal(a[name], b[name]) for name in ("S_qv", "S_qn"))


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """A run that nobody disturbs -> (its metrics, its folder)."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return trainer.main(tiny.flags(corpus, run, *FLAGS)), run


def resumed(corpus, run):
    return tiny.flags(corpus, run, *FLAGS, "--resume", "auto")


# Chains of lives: each number is how many moments a life lasts; the last life runs to the end.
CHAINS = {"before anything is written": [1, 2], "in the first step": [3, 4, 5],
          **{f"anywhere {seed}": random.Random(seed).choices(range(4, 25), k=4) for seed in range(2)}}


@pytest.mark.parametrize("lives", CHAINS.values(), ids=CHAINS)
def test_killed_runs_end_like_the_unbroken_one(corpus, unbroken, tmp_path, lives):
    metrics, whole = unbroken
    run = tmp_path / "run"
    for moment in lives:
        code = tiny.wait(tiny.start(die_at, moment, resumed(corpus, run), log=tmp_path / "log"))
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert trainer.main(resumed(corpus, run)) == metrics
    assert_same_run(whole, run)


def test_run_shot_from_outside_ends_like_the_unbroken_one(corpus, unbroken, tmp_path):
    metrics, whole = unbroken
    run, log = tmp_path / "run", tmp_path / "log"
    steps, rng = 0, random.Random(time.time())
    while steps < 6:  # of 8
        process = tiny.start(trainer.main, resumed(corpus, run), log=log)
        deadline, wanted = time.time() + 60, steps + 3
        while process.is_alive() and time.time() < deadline and steps < wanted:
            time.sleep(0.01)
            steps = (run / "log.txt").read_text().count(" epoch ") if (run / "log.txt").exists() else 0
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert tiny.wait(process) == -signal.SIGKILL, log.read_text()
    assert trainer.main(resumed(corpus, run)) == metrics
    assert_same_run(whole, run)


def test_continued_run_goes_on_where_it_was(corpus, unbroken, tmp_path):
    """Otherwise the tests above would also pass for a trainer that starts again."""
    run = tmp_path / "run"
    assert tiny.wait(tiny.start(die_at, 25, resumed(corpus, run), log=tmp_path / "log")) == -signal.SIGKILL
    reached = torch.load(run / "last.pt", weights_only=True)
    assert reached["global_step"] > 2
    trainer.main(resumed(corpus, run))
    starts = [line for line in (run / "log.txt").read_text().splitlines() if "; from epoch" in line]
    assert len(starts) == 2 and starts[1].endswith(f"from epoch {reached['epoch'] + 1}, step {reached['step']}")


def test_finished_run_answers_at_once(corpus, unbroken, monkeypatch):
    metrics, run = unbroken
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix in (".pt", ".jsonl")}
    monkeypatch.setattr(trainer, "build_model", None)  # what is not needed is not called
    assert trainer.main(resumed(corpus, run)) == metrics
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.suffix in (".pt", ".jsonl")}


def test_second_run_into_the_same_folder_is_refused(corpus, unbroken, tmp_path):
    _, run = unbroken
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match="error: --output_dir .*holds another run.*--resume auto"):
        trainer.main(tiny.flags(corpus, run, *FLAGS))
    assert (run / "config.yaml").read_bytes() == before

    (tmp_path / "thesis.txt").write_text("do not overwrite")
    with pytest.raises(SystemExit, match="holds files but no run"):
        trainer.main(resumed(corpus, tmp_path))


@pytest.mark.parametrize("flag, value", [("--lr", "0.002"), ("--seed", "5"), ("--epochs", "4"), ("--filter", "none")])
def test_run_is_not_continued_with_other_flags(corpus, unbroken, flag, value):
    _, run = unbroken
    with pytest.raises(SystemExit, match=f"error: .*holds another run .*{flag} .* there, {value} here"):
        trainer.main([*resumed(corpus, run), flag, value])


def test_flags_that_change_no_result_may_differ(corpus, unbroken, tmp_path):
    metrics, whole = unbroken
    run = tmp_path / "run"
    assert tiny.wait(tiny.start(die_at, 30, resumed(corpus, run), log=tmp_path / "log")) == -signal.SIGKILL
    again = [*resumed(corpus, run), "--num_workers", "1", "--cache_frames", "--log_every", "2", "--save_every", "3"]
    assert trainer.main(again) == metrics
    assert_same_run(whole, run)

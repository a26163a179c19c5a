"""--profile: time belongs to the innermost mark alone, warm-up and evaluation to none, and the run stays as it is;
and scripts/bench_step.py, which reads the same marks.
"""

import re

import pytest
import tiny
import torch

import main_task_retrieval as trainer
from narvid import distributed, profiling
from narvid.profiling import STAGES, WARM_UP, Profile, stage
from scripts import bench_step


class Clock:
    """A clock that the test moves, read as wall time or through the events of a GPU that is not there."""

    def __init__(self, monkeypatch):
        self.now, self.synchronised = 0.0, False
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(self, "synchronised", True))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2 ** 30)

    def wait(self, ms):
        self.now += ms / 1000


class Event:
    """Like torch's: says nothing about time before the GPU has got there."""

    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = self.clock.now

    def elapsed_time(self, end):
        assert self.clock.synchronised
        return 1000 * (end.at - self.at)


def read(table):
    """The table's text -> {stage: ms a step}."""
    return {name: float(ms) for name, ms in re.findall(r"^(\w+) +([\d.]+)(?: +[\d.]+%)?$", table, re.MULTILINE)}


@stage("towers")
def towers(clock):
    clock.wait(40)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nested_marks_count_once(monkeypatch, device):
    clock = Clock(monkeypatch)
    profile = Profile(2, torch.device(device))
    for number in range(WARM_UP + 4):
        measured = WARM_UP <= number < WARM_UP + 2
        unit = 1 if measured else 1000  # what is not measured would be seen
        with profile.step():
            clock.wait(5 * unit)  # rest
            with stage("data"):
                clock.wait(10 * unit)
            with stage("heads"):
                clock.wait(1 * unit)
                towers(clock)
                clock.wait(2 * unit)
            with stage("backward"):
                clock.wait(30 * unit)
                with stage("communication"):
                    clock.wait(7 * unit)
                clock.wait(20 * unit * (1 + number % 2))
        clock.wait(1000)
        towers(clock)  # an evaluation between two steps
        table = profile.table()
        assert (table is not None) == (number == WARM_UP + 1)
        if table:
            expected = dict.fromkeys(STAGES, 0.0) | {"data": 10, "towers": 40, "heads": 3, "backward": 60,
                                                     "communication": 7, "rest": 5, "step": 125}
            assert read(table) == expected
            assert re.search(r"^towers +40.0 +32.0%$", table, re.MULTILINE)
            assert ("3.00 GiB" in table) == (device == "cuda")


def test_without_profile_nothing_is_kept(monkeypatch):
    clock = Clock(monkeypatch)
    profile = Profile(0, torch.device("cpu"))
    for _ in range(WARM_UP + 2):
        with profile.step():
            towers(clock)
    assert profile.table() is None and not profile.marks


def test_step_that_fails_leaves_no_clock_running(monkeypatch):
    clock = Clock(monkeypatch)
    profile = Profile(1, torch.device("cpu"))
    profile.seen = WARM_UP
    with pytest.raises(KeyError), profile.step(), stage("loss"):
        raise KeyError
    kept = len(profile.marks)
    towers(clock)
    assert len(profile.marks) == kept and not profile.stack


def test_run_on_two_ranks_is_the_run_without_profile(corpus, weights, tmp_path):
    """Every stage is seen, with the waiting for gradients, and the losses are those of one process."""
    def argv(run, *more):
        return tiny.flags(corpus, tmp_path / run, "--checkpoint", weights, "--dropout", 0, "--batch_size", 6,
                          "--epochs", 1, "--select_on", "last", *more)

    trainer.main(argv("one"))
    ranks = tiny.start_ranks(2, trainer.main, argv("two", "--profile", 3, "--micro_batch", 2), log=tmp_path / "log")
    assert [tiny.wait(process) for process in ranks] == [0, 0], (tmp_path / "log.0").read_text()
    assert tiny.losses(tmp_path / "two") == pytest.approx(tiny.losses(tmp_path / "one"), rel=1e-3)
    logged = (tmp_path / "two" / "log.txt").read_text()
    assert "ms a step" not in (tmp_path / "one" / "log.txt").read_text() and logged.count("ms a step") == 1
    found = read(logged)
    assert list(found) == [*STAGES, "step"] and all(ms > 0 for ms in found.values())
    assert sum(found[name] for name in STAGES) == pytest.approx(found["step"], abs=0.1 * len(STAGES))


def test_last_bucket_of_gradients_opens_communication(monkeypatch):
    clock, profile = Clock(monkeypatch), Profile(1, torch.device("cpu"))
    profile.seen = WARM_UP
    monkeypatch.setattr(profiling, "allreduce_hook", lambda group, bucket: clock.wait(1))

    class Bucket:
        def __init__(self, last):
            self.is_last = lambda: last

    with profile.step(), stage("backward"):
        clock.wait(10)
        profiling.all_reduce(None, Bucket(False))
        clock.wait(10)
        profiling.all_reduce(None, Bucket(True))
        clock.wait(8)
    found = read(profile.table())
    assert (found["backward"], found["communication"]) == (21, 9)
    profiling.all_reduce(None, Bucket(True))  # and no harm where no profile runs


# ---------------------------------------------------------------------------------------------- scripts/bench_step.py


def test_benchmark_of_a_step_prints_every_row(corpus, capsys):
    bench_step.main(["--model", str(corpus / "clip.json"), "--videos", "4", "--frames", "3", "--repeats", "1",
                     "--threads", "1", "--micro_batch", "2"])
    printed = capsys.readouterr().out
    assert "fp32" not in printed and "(the paper's batch is 64)" in printed
    shares = dict(re.findall(r"^([a-z ]+\S) +[\d.]+ +([\d.]+)%$", printed.partition("seconds")[0], re.MULTILINE))
    assert 50 < float(shares["towers"]) < 100 == float(shares["step"]) and 0 < float(shares["heads"]) < 50
    rows = dict(re.findall(r"^([a-z]+(?:, [a-z]+.*?)?) +[\d.]+ +([\d.]+) +[\d.]+ +[\d.]+%$", printed, re.MULTILINE))
    assert list(rows) == ["unit", "towers", "step", "step, checkpointing", "step, micro-batch 2"]
    assert float(rows["towers"]) == 1
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in STAGES)
    share = re.search(r"^share of the matrix rate: the step reaches ([\d.]+)% of .* bf16 on this CPU", printed,
                      re.MULTILINE)
    assert re.search(rf"^step +[\d.]+ +[\d.]+ +[\d.]+ +{share[1]}%$", printed, re.MULTILINE)
    assert "45 %" not in printed and printed.count("not measured, there is no GPU here") == 1


def test_counted_work_grows_with_the_batch(corpus):
    args = bench_step.parse_args(["--model", str(corpus / "clip.json"), "--videos", "2", "--frames", "3"])
    bench = bench_step.Bench(args, distributed.start())
    few = bench_step.flops_of(bench.towers)
    bench.batch = bench_step.make_batch(6, 3, tiny.SIDE)
    assert bench_step.flops_of(bench.towers) == 3 * few > 0
    queries, sentences = bench.batch.word_mask.sum(dim=1), (bench.batch.sentences > 0).sum(dim=1)
    assert queries.max() == 22 and queries.min() >= 10 and sentences.max() == 25 and sentences.min() >= 10
    ends = bench.batch.tokens.argmax(dim=1)  # where the text tower looks for the end
    assert torch.equal(ends, queries - 1) and bench.batch.sentences.unique(dim=0).shape[0] == 18


def test_a_run_that_is_shorter_than_the_profile_prints_what_it_has_and_says_so(corpus, tmp_path):
    trainer.main(tiny.flags(corpus, tmp_path / "run", "--profile", 20, "--select_on", "last"))  # 4 steps
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "mean of 1 steps" in log
    assert "--profile 20: the run ended after 4 steps, of which the first 3 are not measured" in log
    trainer.main(tiny.flags(corpus, tmp_path / "short", "--profile", 20, "--select_on", "last", "--epochs", 1))
    log = (tmp_path / "short" / "log.txt").read_text()
    assert "ms a step" not in log and "--profile 20: the run ended after 2 steps" in log

"""scripts/sweep.sh: which runs there are, who gets which GPUs, what is kept, what the table and the plan say."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny

import main_task_retrieval as trainer
from narvid import InputError
from narvid.flags import command
from narvid.report import launching, sweep
from narvid.report.launching import Ended, Place

ROOT = Path(__file__).resolve().parents[2]


def small_flags(corpus):
    """Those of tiny.py but --output_dir, which the sweep gives."""
    given = tiny.flags(corpus, "none", "--epochs", 1, "--select_on", "last", "--temporal_layers", 1)
    at = given.index("--output_dir")
    return given[:at] + given[at + 2:]


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("alpha: 0.5\n")
    return path


@pytest.fixture
def trained(monkeypatch):
    """Runs are trained in this process; the list names them."""
    names = []

    def in_this_process(_, argv, place):
        names.append(Path(argv[argv.index("--output_dir") + 1]).name)
        trainer.main(argv)

    monkeypatch.setattr(launching.Children, "train", in_this_process)
    monkeypatch.setattr(sweep, "gpus_here", lambda: [])
    return names


# ---- the whole ----


def test_every_value_with_every_seed_is_trained_once_tabulated_and_drawn(corpus, preset, tmp_path, trained, capsys):
    out = tmp_path / "out"
    argv = [str(preset), "--seeds", "1", "2", "--set", "lam=0.5,0.9", "--out", str(out), "--samples", "200",
            *small_flags(corpus)]
    sweep.main([*argv, "--dry_run"])
    said = capsys.readouterr().out
    assert said.count("to do ") == 4 and "4 runs, 0 ended; 1 at a time" in said and "no run has ended here" in said
    assert not out.exists() and trained == []
    sweep.main(argv)
    assert trained == ["lam_0.5_seed1", "lam_0.9_seed1", "lam_0.5_seed2", "lam_0.9_seed2"]
    for name, value, seed in (("lam_0.5_seed2", 0.5, 2), ("lam_0.9_seed1", 0.9, 1)):
        config = sweep.read_run(out / name, out).config
        assert (config["lam"], config["seed"], config["alpha"]) == (value, seed, 0.5)
    table = (out / "sweep.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| --lam")]
    assert [row[:3] for row in rows] == [["| --lam 0.5", "2", "S_fusion"], ["| --lam 0.9", "2", "S_fusion"]]
    firsts = [tiny.results(out / f"lam_0.9_seed{seed}")[-1]["metrics"]["S_fusion"]["text_to_video"]["R@1"]
              for seed in (1, 2)]
    assert rows[1][3].startswith(f"{sum(firsts) / 2:.1f} ±")
    assert "[" not in rows[0][6] and "[" in rows[1][6] and "11 videos" in table
    assert {path.name for path in out.glob("figure7.*")} == {"figure7.pdf", "figure7.png"}
    capsys.readouterr()
    sweep.main(argv)  # nothing is left to do, and the table is the same
    assert len(trained) == 4 and (out / "sweep.md").read_text() == table
    assert "nothing is left to do" in capsys.readouterr().out
    sweep.main([*argv, "--dry_run", "--set", "eta=1.8", "--seeds", "1", "3"])
    assert "no run has ended" not in capsys.readouterr().out  # its journal knows how long runs take
    with pytest.raises(InputError, match="another run .*lr"):
        sweep.main([*argv, "--lr", "0.5"])


def test_a_run_that_fails_keeps_no_other_waiting_and_is_named(corpus, preset, tmp_path, monkeypatch, trained, capsys):
    def one_fails(_, argv, place):
        if argv[argv.index("--lam") + 1] == "0.5":
            return "the loss is nan"
        trainer.main(argv)

    monkeypatch.setattr(launching.Children, "train", one_fails)
    argv = [str(preset), "--seeds", "1", "--set", "lam=0.5,0.9", "--out", str(tmp_path / "out"), "--samples", "200",
            *small_flags(corpus)]
    with pytest.raises(InputError, match="1 of 2 runs failed.*lam_0.5_seed1; the same command tries them again"):
        sweep.main(argv)
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "--lam 0.9" in table and "--lam 0.5" not in table and "one seed says nothing" in table
    assert "failed: the loss is nan" in capsys.readouterr().out


# ---- which runs ----


def test_combinations_have_names_and_argv():
    found = sweep.combinations([("modules", ["", "NM CMI"]), ("exclude_same_video", ["true", "false"])])
    assert found == {
        "modules_none_exclude_same_video_true": ["--modules", "--exclude_same_video"],
        "modules_none_exclude_same_video_false": ["--modules", "--no-exclude_same_video"],
        "modules_NM-CMI_exclude_same_video_true": ["--modules", "NM", "CMI", "--exclude_same_video"],
        "modules_NM-CMI_exclude_same_video_false": ["--modules", "NM", "CMI", "--no-exclude_same_video"]}
    assert sweep.combinations([]) == {"preset": []}
    assert [*sweep.combinations([("narrations", ["a/x.jsonl", "a/y.jsonl"])])] == ["narrations_x", "narrations_y"]


@pytest.mark.parametrize("argv, said", [
    (["nothing"], "there is no configs/nothing.yaml"),
    (["demo", "--set", "lam"], "write FLAG=VALUE"),
    (["demo", "--set", "lam=1,1"], "'1' stands there twice"),
    (["demo", "--set", "seed=1,2"], "seed: the sweep gives it"),
    (["demo", "--set", "lam=1,2", "--lam", "3"], "--lam: the sweep gives it"),
    (["demo", "--set", "lam=1", "--set", "lam=2"], "--set lam: stands there twice"),
    (["demo", "--set", "narrations=a/x.jsonl,b/x.jsonl"], "both be called narrations_x"),
    (["demo", "--set", "lam=much", "--dry_run"], "--lam"),
    (["demo", "--set", "lamb=1", "--dry_run"], "--lamb"),
    (["demo", "--eval_only"], "a sweep trains"),
    (["demo", "--gpus_a_run", "0"], "not a whole number above 0"),
    (["demo", "--gpus_a_run", "2", "--dry_run"], "has no GPU that torch can use"),
])
def test_mistakes_are_one_sentence(argv, said, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "gpus_here", lambda: [])
    with pytest.raises((SystemExit, InputError), match=said) as refused:
        sweep.main([*argv, "--out", str(tmp_path / "out")])
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


# ---- who gets what, how long ----


def test_gpus_are_shared_out(monkeypatch):
    gpus = ["0", "1", "2", "3", "4"]
    assert launching.places(gpus, 1, None) == [Place((gpu,)) for gpu in gpus]
    assert launching.places(gpus, 2, None) == [Place(("0", "1")), Place(("2", "3"))]
    assert launching.places(gpus, None, None) == [Place(tuple(gpus))]
    assert launching.places(["0", "1"], 1, 3) == [Place(("0",)), Place(("1",)), Place(("0",))]
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launching.places([], 1, 4) == [Place(threads=3)] * 4  # as the user has it
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launching.places([], 1, None) == [Place(threads=8)] and launching.places([], 1, 3) == [Place(threads=2)] * 3
    with pytest.raises(InputError, match="this machine has 2"):
        launching.places(["0", "1"], 3, None)
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert launching.gpus_here() == ["5", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launching.gpus_here() == ["0", "1"]


def test_several_gpus_of_a_run_are_torchrun():
    words, environment = launching.call_of(["--seed", "1"], Place(("2", "3")))
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert words[6:] == [str(ROOT / "main_task_retrieval.py"), "--seed", "1"]
    assert environment == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert launching.call_of([], Place(threads=2)) == ([sys.executable, str(ROOT / "main_task_retrieval.py")],
                                                       {"OMP_NUM_THREADS": "2"})


def test_how_long_by_hand():
    known = {"lam_0.5_seed1": 100.0, "lam_0.5_seed2": 140.0, "lam_0.9_seed1": 300.0}
    assert sweep.how_long(["lam_0.5_seed3", "lam_0.9_seed2"], known, 1).startswith("at most 7.0 minutes for the 2")
    assert sweep.how_long(["lam_0.9_seed2"], known, 4).startswith("at most 5.0 minutes for the 1")
    assert sweep.how_long(["lam_0.7_seed1", "lam_0.7_seed2"], known, 2).startswith("at most 3.0 minutes")  # the mean
    assert "a run took 3.0 minutes, mean of 3" in sweep.how_long(["lam_0.7_seed1"], known, 1)


def test_a_broken_journal_is_one_sentence(tmp_path):
    (tmp_path / sweep.JOURNAL).write_text('{"run": "a_seed1", "seconds": 5.0}\n{"run": "b_seed1", "seconds": "x"}\n')
    with pytest.raises(InputError, match="sweep.jsonl:2: is no run with its seconds; delete it"):
        sweep.seconds_of_runs(tmp_path)


# ---- processes ----

STANDS_FOR_THE_TRAINER = """
import json, os, pathlib, signal, sys, time
out, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: (out.with_suffix(".saved").touch(), sys.exit("stopped by SIGTERM: saved")))
out.write_text(json.dumps([time.time(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")]))
if kind == "fails":
    print("a bar", file=sys.stderr)
    print("error: no such flag", file=sys.stderr)
    print("a report of torchrun", file=sys.stderr)
    sys.exit(1)
time.sleep(60 if kind == "long" else 0.3)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    path = tmp_path / "stand_in.py"
    path.write_text(STANDS_FOR_THE_TRAINER)
    monkeypatch.setattr(launching, "TRAINER", path)
    return path


def test_runs_get_a_free_place_each_and_failures_are_told(stand_in, tmp_path):
    runs = {name: [str(tmp_path / name), "fails" if name == "b" else "short"] for name in "abcd"}
    ended: list[Ended] = []
    launching.train_all(runs, [Place(("3",)), Place(("5",))], ended=ended.append)
    assert {run.name: run.said for run in ended} == {"a": None, "b": "no such flag", "c": None, "d": None}
    seen = {name: json.loads((tmp_path / name).read_text()) for name in runs}
    assert {gpu for _, gpu, _ in seen.values()} == {"3", "5"}
    for name, (start, gpu, _) in seen.items():
        others = [t for other, (t, g, _) in seen.items() if other != name and g == gpu and other != "b" and name != "b"]
        assert all(abs(start - t) >= 0.3 for t in others)  # never two at a time on one GPU


def begin(folder, stand_in):
    """Two long runs, one at a time."""
    launching.TRAINER = stand_in
    runs = {name: [str(folder / name), "long"] for name in "ab"}
    command(lambda: launching.train_all(runs, [Place(threads=1)], ended=print))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_under_way_and_begins_no_other(stand_in, tmp_path, number):
    process = tiny.start(begin, tmp_path, stand_in, log=tmp_path / "log")
    until = time.monotonic() + 60
    while not ((tmp_path / "a").exists() and (tmp_path / "a").read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert tiny.wait(process) == 1 and "stopped; the same command continues" in (tmp_path / "log").read_text()
    assert (tmp_path / "a.saved").exists() and not (tmp_path / "b").exists()

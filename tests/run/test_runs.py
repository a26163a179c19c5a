"""What happens to a run besides training: other data, other hands on its folder, signals, lost processes, full disks.

Each ends in one sentence, or goes on to what the unbroken run gives. Kills are in test_resume.py, bad input before a
run in test_bad_input.py.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from test_resume import assert_same_run

import main_task_retrieval as trainer
from narvid import evaluation, files
from narvid.data.frames import frame_path
from narvid.run import endings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--epochs", 1, "--select_on", "last", "--dropout", 0.3, "--save_similarity")  # two steps
UNFORESEEN = "fault of this program"  # how the net below all sentences begins


def said(corpus, run, *more):
    """The one sentence with which a run is refused."""
    with pytest.raises(SystemExit) as left:
        trainer.main(tiny.flags(corpus, run, *FLAGS, *more))
    assert isinstance(left.value.code, str) and left.value.code.startswith("error: ")
    assert "\n" not in left.value.code and UNFORESEEN not in left.value.code
    return left.value.code


def stop_after(step, argv, number=signal.SIGKILL):
    """main(argv), to which a signal comes as step `step` (from 1) is over."""
    steps, real = [], trainer.train_step

    def one(*args):
        got = real(*args)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return got

    trainer.train_step = one
    trainer.main(argv)


@pytest.fixture(scope="module")
def begun(corpus, weights, tmp_path_factory):
    """A run that was killed after its first of two steps, and the one that was not -> (data, start, broken, whole)."""
    folder = tmp_path_factory.mktemp("begun")
    data = Path(shutil.copytree(corpus, folder / "data"))
    start = Path(shutil.copy(weights, folder / "start.pt"))
    flags = (*FLAGS, "--checkpoint", start, "--clip_model", corpus / "clip.json", "--save_every", 1)
    log = folder / "log"
    assert tiny.wait(tiny.start(stop_after, 2, tiny.flags(data, folder / "broken", *flags), log=log)) == -9
    trainer.main(tiny.flags(data, folder / "whole", *flags))
    assert torch.load(folder / "broken" / "last.pt", weights_only=True)["global_step"] == 1
    return data, start, folder / "broken", folder / "whole"


@pytest.fixture
def broken(begun, corpus, tmp_path):
    """Copies, to be spoilt -> (data, run, what continues it)."""
    data, start, run, _ = begun
    data, run = shutil.copytree(data, tmp_path / "moved"), shutil.copytree(run, tmp_path / "run")
    flags = (*FLAGS, "--checkpoint", start, "--clip_model", corpus / "clip.json", "--save_every", 1)
    return Path(data), Path(run), (*flags, "--resume", "auto")


# ---- the same run: by content ----


def test_the_same_data_elsewhere_and_a_start_that_is_gone_go_on(begun, broken):
    data, run, flags = broken
    flags = [run.parent / "gone.pt" if flag == begun[1] else flag for flag in flags]
    for path in sorted(data.rglob("*.jpg")):  # a copy has other times
        os.utime(path, (1, 1))
    trainer.main(tiny.flags(data, run, *flags))
    assert_same_run(begun[3], run)
    assert "--checkpoint: no longer there, and not needed" in (run / "log.txt").read_text()


def edit(name, old, new):
    def change(data):
        text = (data / name).read_text()
        assert old in text
        (data / name).write_text(text.replace(old, new, 1))
    return change


def drop_last_line(data):
    path = data / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def repaint(data):
    """Another picture under the same name, of the same size in bytes."""
    path = frame_path(data / "frames", "train3", 0)
    size = path.stat().st_size
    for level in range(256):
        Image.new("RGB", Image.open(path).size, (level, 0, 9)).save(path, quality=95, subsampling=0)
        if path.stat().st_size <= size:
            break
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\0" * (size - len(content)) + content[-2:])
    assert path.stat().st_size == size


CHANGES = {
    "a query": (edit("train.jsonl", "very ", "not "), ["train's queries 39 (", "there, 39 ("]),
    "a query of test": (edit("test.jsonl", "very ", "not "), ["test's queries"]),
    "a line less": (drop_last_line, ["train's queries 39 (", "there, 38 ("]),
    "a sentence": (edit("narrations.jsonl", "a picture of", "no picture of"), ["train's sentences"]),
    "a picture": (repaint, ["train's pictures"]),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_other_data_is_refused_by_name(broken, change, words):
    data, run, flags = broken
    change(data)
    before = (run / "last.pt").read_bytes()
    message = said(data, run, *flags)
    assert all(word in message for word in words) and "read something else" in message, message
    others = {"queries", "sentences", "pictures"} - {words[0].split()[1]}
    assert not any(f"'s {other} " in message for other in others), message
    assert (run / "last.pt").read_bytes() == before


def test_another_model_config_or_start_is_refused_by_name(broken, corpus, tmp_path):
    data, run, flags = broken
    flipped = json.loads((corpus / "clip.json").read_text()) | {"quick_gelu": True}
    (tmp_path / "clip.json").write_text(json.dumps(flipped))
    assert "--clip_model " in said(data, run, *flags, "--clip_model", tmp_path / "clip.json")
    (tmp_path / "same.json").write_text(json.dumps(json.loads((corpus / "clip.json").read_text()), indent=3))
    other = tiny.write_checkpoint(tmp_path / "other.pt", corpus / "clip.json", seed=3)
    message = said(data, run, *flags, "--clip_model", tmp_path / "same.json", "--checkpoint", other)
    assert "--checkpoint " in message and "--clip_model" not in message


def test_weights_of_another_run_are_refused_by_their_seed(broken, tmp_path):
    data, run, flags = broken
    last = torch.load(run / "last.pt", weights_only=True)
    last["identity"]["settings"]["seed"] = 7
    torch.save(last, run / "last.pt")
    assert "--seed 7 there, 42 here" in said(data, run, *flags)


def test_a_flag_that_is_newer_than_the_run_has_its_default(begun, broken):
    data, run, flags = broken
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["fusion_weight"], config["rank_timeout"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    last = torch.load(run / "last.pt", weights_only=True)
    del last["identity"]["settings"]["fusion_weight"]
    torch.save(last, run / "last.pt")
    assert "--fusion_weight 0.5 there, 0.3 here" in said(data, run, *flags, "--fusion_weight", 0.3)
    trainer.main(tiny.flags(data, run, *flags))
    assert_same_run(begun[3], run)


def test_a_run_of_before_goes_on_and_other_machines_are_said(begun, broken):
    data, run, flags = broken
    last = torch.load(run / "last.pt", weights_only=True)
    identity = last.pop("identity")
    torch.save(last, run / "last.pt")
    trainer.main(tiny.flags(data, run, *flags))
    assert "did not note the run's data" in (run / "log.txt").read_text()
    torch.save(last | {"identity": identity | {"machine": identity["machine"] | {"processes": 4, "threads": 64}}},
               run / "last.pt")
    (run / "results.jsonl").unlink()
    trainer.main(tiny.flags(data, run, *flags))
    assert "goes on with processes 4 before, 1 now, threads 64 before, 1 now" in (run / "log.txt").read_text()


# ---- one writer ----


def test_a_second_process_is_refused_at_once(begun, broken):
    data, run, flags = broken
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    with files.lock(run):
        other = tiny.start(trainer.main, tiny.flags(data, run, *flags), log=run.parent / "log")
        assert tiny.wait(other) == 1
    message = (run.parent / "log").read_text()
    assert message.startswith("error: ") and "is being written by another process" in message
    assert message.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}


def test_a_refused_run_leaves_no_folder(corpus, tmp_path):
    said(corpus, tmp_path / "a" / "run", "--frames", tmp_path)
    assert not (tmp_path / "a" / "run").exists()


# ---- signals ----


def lines_of(log):
    return [line for line in log.read_text().splitlines() if line.startswith(("stopped", "error", "Traceback"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_the_step_and_leaves_with_its_code(corpus, weights, begun, tmp_path, number):
    data, start, _, whole = begun
    flags = (*FLAGS, "--checkpoint", start, "--clip_model", corpus / "clip.json", "--save_every", 1)
    argv, run = tiny.flags(data, tmp_path / "run", *flags, "--save_every", 0, "--num_workers", 1), tmp_path / "run"
    assert tiny.wait(tiny.start(stop_after, 1, argv, number, log=tmp_path / "log")) == 128 + number
    assert lines_of(tmp_path / "log") == [
        f"stopped by {number.name}: last.pt holds epoch 1, step 1; --resume auto goes on"]
    assert torch.load(run / "last.pt", weights_only=True)["global_step"] == 1
    trainer.main(tiny.flags(data, run, *flags, "--resume", "auto"))
    assert_same_run(whole, run)


def stop_the_group_in_a_step(argv, number):
    """A process group of its own, as a terminal's: the signal reaches the loader's workers too, within a step."""
    os.setpgid(0, 0)
    step, taken = trainer.train_step, []

    def signalled(*args, **options):
        taken.append(1)
        if len(taken) == 1:
            os.killpg(0, number)
            time.sleep(1)  # here the death of a worker would be heard of
        return step(*args, **options)

    trainer.train_step = signalled
    trainer.main(argv)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_interrupts_no_step(corpus, weights, begun, tmp_path, number):
    data, start, _, whole = begun
    flags = (*FLAGS, "--checkpoint", start, "--clip_model", corpus / "clip.json", "--save_every", 1)
    argv, run = tiny.flags(data, tmp_path / "run", *flags, "--save_every", 0, "--num_workers", 2), tmp_path / "run"
    code = tiny.wait(tiny.start(stop_the_group_in_a_step, argv, number, log=tmp_path / "log"))
    assert code == 128 + number, (tmp_path / "log").read_text()
    assert torch.load(run / "last.pt", weights_only=True)["global_step"] == 1
    assert lines_of(tmp_path / "log")[-1].startswith(f"stopped by {number.name}: last.pt holds epoch ")
    trainer.main(tiny.flags(data, run, *flags, "--resume", "auto"))
    assert_same_run(whole, run)


def signal_at(name, argv, number=signal.SIGINT):
    """main(argv), to which a signal comes in the first call of the trainer's function `name`."""
    real, calls = getattr(trainer, name), []

    def first(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(trainer, name, first)
    trainer.main(argv)


EVALUATED = ("--epochs", 2, "--dropout", 0.3, "--eval_every", 1, "--save_similarity")


@pytest.fixture(scope="module")
def evaluated(corpus, tmp_path_factory):
    """A whole run that is evaluated after each of its four steps."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    trainer.main(tiny.flags(corpus, run, *EVALUATED))
    return run


@pytest.mark.parametrize(("where", "saved", "step"), [
    ("score_split", "last.pt holds epoch 1, step 1", 1),  # in the first evaluation, which is made again
    ("load_data", "nothing new had to be saved", None),
    ("selection_score", "last.pt holds epoch 1, step 1", 1),  # between evaluation and saving
])
def test_a_signal_in_an_evaluation_or_before_the_first_step(corpus, evaluated, tmp_path, where, saved, step):
    run, argv = tmp_path / "run", tiny.flags(corpus, tmp_path / "run", *EVALUATED)
    assert tiny.wait(tiny.start(signal_at, where, argv, log=tmp_path / "log")) == 130
    assert lines_of(tmp_path / "log") == [f"stopped by SIGINT: {saved}; --resume auto goes on"]
    if step:
        assert torch.load(run / "last.pt", weights_only=True)["global_step"] == step
    trainer.main([*argv, "--resume", "auto"])
    assert_same_run(evaluated, run)


def look_often():
    """torch looks every 5 seconds whether its workers live; here every half second."""
    torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.5,)


def kill_in_an_evaluation(argv, number):
    """main(argv), whose first evaluation loses a process that loads frames."""
    def first(loader, **how):
        before = multiprocessing.active_children()
        batches = iter(loader)
        [os.kill(child.pid, number) for child in multiprocessing.active_children() if child not in before]
        return bar(batches, **how)

    look_often()
    bar, evaluation.tqdm = evaluation.tqdm, first
    trainer.main(argv)


def kill_a_worker(argv, number):
    """main(argv), whose loader loses a process in the second step, as the system does it where memory ends."""
    look_often()
    step, taken = trainer.train_step, []

    def one(*args):
        taken.append(1)
        if len(taken) == 2:
            os.kill(multiprocessing.active_children()[0].pid, number)
        return step(*args)

    trainer.train_step = one
    trainer.main(argv)


def test_a_loader_that_is_killed_ends_the_run_in_one_sentence_and_no_step_is_lost(corpus, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ("--epochs", 6, "--select_on", "last", "--dropout", 0.3, "--save_similarity", "--num_workers", 2)
    process = tiny.start(kill_a_worker, tiny.flags(corpus, run, *flags), signal.SIGKILL, log=tmp_path / "log")
    assert tiny.wait(process) == 1
    (sentence,) = lines_of(tmp_path / "log")
    assert "a process that loads frames has ended before its time" in sentence and "--num_workers" in sentence
    assert UNFORESEEN not in sentence and torch.load(run / "last.pt", weights_only=True)["global_step"] >= 2
    trainer.main(tiny.flags(corpus, whole, *flags))
    trainer.main(tiny.flags(corpus, run, *flags, "--resume", "auto"))
    assert_same_run(whole, run)


def test_a_loader_that_is_killed_in_an_evaluation_costs_no_step(corpus, evaluated, tmp_path):
    run, argv = tmp_path / "run", tiny.flags(corpus, tmp_path / "run", *EVALUATED)
    process = tiny.start(kill_in_an_evaluation, [*argv, "--num_workers", "1"], signal.SIGKILL, log=tmp_path / "log")
    assert tiny.wait(process) == 1
    (sentence,) = lines_of(tmp_path / "log")
    assert "a process that loads frames has ended before its time" in sentence and UNFORESEEN not in sentence
    assert torch.load(run / "last.pt", weights_only=True)["global_step"] == 1
    trainer.main([*argv, "--resume", "auto"])
    assert_same_run(evaluated, run)


def hide_the_frames(argv, frames):
    """main(argv), whose frames are no longer there when the first step is over."""
    step = trainer.train_step

    def one(*args):
        got = step(*args)
        frames.rename(frames.with_name("away"))
        return got

    trainer.train_step = one
    trainer.main(argv)


def test_a_frame_that_is_lost_under_way_costs_no_step(corpus, weights, begun, tmp_path):
    _, start, _, whole = begun
    data, run = Path(shutil.copytree(corpus, tmp_path / "data")), tmp_path / "run"
    flags = (*FLAGS, "--checkpoint", start, "--clip_model", corpus / "clip.json", "--save_every", 1)
    argv = tiny.flags(data, run, *flags, "--save_every", 0)
    assert tiny.wait(tiny.start(hide_the_frames, argv, data / "frames", log=tmp_path / "log")) == 1
    (sentence,) = lines_of(tmp_path / "log")
    assert "00000.jpg cannot be read" in sentence or ".jpg cannot be decoded" in sentence
    assert torch.load(run / "last.pt", weights_only=True)["global_step"] == 1
    (data / "away").rename(data / "frames")
    trainer.main(tiny.flags(data, run, *flags, "--resume", "auto"))
    assert_same_run(whole, run)


def test_a_run_whose_output_nobody_reads_goes_on(corpus, tmp_path):
    """Its reader has left (| head), or the disk of its log file is full: log.txt has it all."""
    assert tiny.wait(tiny.start(trainer.main, tiny.flags(corpus, tmp_path / "run", *FLAGS), log=Path("/dev/full"))) == 0
    assert "S_fusion" in (tmp_path / "run" / "log.txt").read_text() and (tmp_path / "run" / "best.pt").exists()


def test_a_stopped_run_whose_output_nobody_reads_keeps_its_exit_code(corpus, tmp_path):
    """By which a cluster's script knows that it must be started again."""
    argv = tiny.flags(corpus, tmp_path / "run", *FLAGS, "--save_every", 1)
    assert tiny.wait(tiny.start(signal_while_saving, argv, log=Path("/dev/full"))) == 143


def signal_while_saving(argv):
    """main(argv): one SIGTERM in the middle of the first last.pt, and the checkpoint must be whole all the same."""
    real = torch.save

    def save(state, file):
        torch.save = real
        os.kill(os.getpid(), signal.SIGTERM)
        real(state, file)

    torch.save = save
    trainer.main(argv)


def test_a_signal_while_saving(corpus, tmp_path):
    argv = tiny.flags(corpus, tmp_path / "run", *FLAGS, "--save_every", 1)
    assert tiny.wait(tiny.start(signal_while_saving, argv, log=tmp_path / "log")) == 143
    assert lines_of(tmp_path / "log") == ["stopped by SIGTERM: last.pt holds epoch 1, step 1; --resume auto goes on"]
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["global_step"] == 1


def hang_in_a_save(argv, flag):
    """main(argv), whose second last.pt takes for ever."""
    real, calls = torch.save, []

    def save(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            Path(flag).write_text("now")
            time.sleep(600)
        real(state, file)

    torch.save = save
    trainer.main(argv)


def test_a_second_ctrl_c_leaves_at_once_and_spoils_nothing(corpus, tmp_path):
    argv, flag = tiny.flags(corpus, tmp_path / "run", *FLAGS, "--save_every", 1), tmp_path / "flag"
    process = tiny.start(hang_in_a_save, argv, flag, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)  # torchrun hands on what the terminal has sent already: not a second one
    time.sleep(endings.AGAIN)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert tiny.wait(process, 20) == 130
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["global_step"] == 1
    trainer.main([*argv, "--resume", "auto"])  # what was half written is in nobody's way
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_minutes_decide_beside_steps(corpus, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(trainer.RunDir, "save", lambda run, name, state: saves.append((name, state["global_step"])))
    with pytest.raises((TypeError, SystemExit)):  # best.pt was not written
        trainer.main(tiny.flags(corpus, tmp_path / "a", *FLAGS, "--epochs", 2, "--save_every_minutes", 1e-9))
    assert [step for name, step in saves if name == "last.pt"] == [0, 1, 2, 2, 3, 4]
    saves.clear()
    with pytest.raises((TypeError, SystemExit)):
        trainer.main(tiny.flags(corpus, tmp_path / "b", *FLAGS, "--epochs", 2, "--save_every_minutes", 0))
    assert [step for name, step in saves if name == "last.pt"] == [2, 4]


# ---- several processes ----


def ranks(argvs, log, function=trainer.main, timeout=120):
    """function(argv) on as many ranks as there are argvs -> their exit codes."""
    processes = tiny.start_ranks(len(argvs), by_rank, function, argvs, log=log)
    return [tiny.wait(process, timeout) for process in processes]


def by_rank(function, argvs):
    function(argvs[int(os.environ["RANK"])])


def last_lines(log):
    return [[line for line in log.with_name(f"{log.name}.{rank}").read_text().splitlines()
             if line.startswith(("error", "stopped", "Traceback"))] for rank in range(2)]


def test_a_rank_that_sees_other_data_ends_all(corpus, tmp_path):
    """Another sentence, and another picture that is not in its own share."""
    for name, change, words in (("a", CHANGES["a sentence"][0], "train's sentences"),
                                ("b", repaint_first, "process 1 finds other frames there than process 0")):
        other = Path(shutil.copytree(corpus, tmp_path / name))
        change(other)
        argvs = [tiny.flags(data, tmp_path / "run", *FLAGS, "--clip_model", corpus / "clip.json")
                 for data in (corpus, other)]
        assert ranks(argvs, tmp_path / name / "log") == [1, 1]
        mine, others = last_lines(tmp_path / name / "log")
        assert len(mine) == 1 and words in mine[0] and "must see the same data" in mine[0] and others == []
        assert not (tmp_path / "run").exists()


def repaint_first(data):
    Image.new("RGB", (32, 32), (1, 2, 3)).save(frame_path(data / "frames", "train0", 0))


def test_a_rank_without_last_pt_ends_all(begun, broken):
    data, run, flags = broken
    argvs = [tiny.flags(data, folder, *flags) for folder in (run, run.parent / "elsewhere")]
    assert ranks(argvs, run.parent / "log") == [1, 1]
    mine, others = last_lines(run.parent / "log")
    assert others == [] and len(mine) == 1
    assert "process 1 sees another run than process 0 (step 0 there, 1 on process 0" in mine[0]


def freeze(argv):
    """main(argv), of which rank 1 stands still after the first step, for ever."""
    real = trainer.train_step

    def one(*args):
        got = real(*args)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return got

    trainer.train_step = one
    trainer.main(argv)


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_rank_that_is_lost_ends_the_run_in_one_sentence_and_no_step_is(corpus, tmp_path, how):
    argv = tiny.flags(corpus, tmp_path / "run", *FLAGS, "--rank_timeout", 0.1)
    function = freeze if how == "hangs" else partial(stop_rank_1, signal.SIGKILL)
    processes = tiny.start_ranks(2, function, argv, log=tmp_path / "log")
    assert tiny.wait(processes[0], 120) == 1
    processes[1].kill()
    tiny.wait(processes[1])
    mine, _ = last_lines(tmp_path / "log")
    assert mine == ["error: process 0 lost another process of this run, which has ended or has not answered in time "
                    "(--rank_timeout); last.pt holds epoch 1, step 1; --resume auto goes on"]
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["global_step"] == 1


def stop_rank_1(number, argv):
    if os.environ["RANK"] == "1":
        stop_after(1, argv, number)
    trainer.main(argv)


def test_two_ranks_stop_at_one_step_by_a_signal_to_one_and_go_on_bitwise(corpus, tmp_path):
    flags = (*FLAGS, "--epochs", 2, "--save_similarity")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ranks([tiny.flags(corpus, whole, *flags)] * 2, tmp_path / "whole_log") == [0, 0]
    argv = tiny.flags(corpus, run, *flags)
    assert ranks([argv] * 2, tmp_path / "log", partial(stop_rank_1, signal.SIGTERM)) == [143, 143]
    assert last_lines(tmp_path / "log") == [
        ["stopped by SIGTERM: last.pt holds epoch 1, step 1; --resume auto goes on"], []]
    argv = [*argv, "--resume", "auto", "--save_every", "1"]
    assert ranks([argv] * 2, tmp_path / "kill_log", kill_both)[0] == -9
    assert torch.load(run / "last.pt", weights_only=True)["global_step"] == 2
    assert ranks([argv] * 2, tmp_path / "log_end") == [0, 0]
    assert_same_run(whole, run)


def kill_both(argv):
    stop_after(2, argv, signal.SIGKILL)


def test_under_torchrun_the_sentence_stands_first_and_last(corpus, tmp_path):
    """torchrun's own report cannot be kept from being printed; it ends with the sentence."""
    wide = ("--clip_model", corpus / "wide.json")  # of others there is a remark first
    edited = Path(shutil.copytree(corpus, tmp_path / "data"))
    CHANGES["a line less"][0](edited)
    with open(edited / "train.jsonl", "a") as file:
        file.write('{"video": "nowhere", "query": "a dog"}\n')
    process = tiny.torchrun(tiny.flags(edited, tmp_path / "run", *wide))
    printed = [line for line in process.communicate(timeout=120)[0].strip().splitlines()
               if not line.startswith("[Gloo]")]  # torch 2.8 greets
    assert process.returncode == 1
    words = "video nowhere has no frames"
    sentences = [line for line in printed if words in line]
    assert printed[0] == sentences[0] and printed[0].startswith("error: ")
    assert set(printed[-1]) == {"="} and words in printed[-2]  # the end of torchrun's frame
    assert sum(line.startswith("error: ") for line in printed) == 1  # one rank spoke


def with_report(argv, folder):
    """main(argv), as torchrun starts it: what each rank leaves in a file of its own, torchrun prints at the end."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"report{os.environ['RANK']}")
    trainer.main(argv)


def test_a_mistaken_flag_is_one_sentence_of_all_ranks(corpus, tmp_path):
    argv = tiny.flags(corpus, tmp_path / "run", "--lr", "much")
    started = tiny.start_ranks(2, with_report, argv, tmp_path, log=tmp_path / "log")
    assert [tiny.wait(process) for process in started] == [1, 1]
    (said,) = [line for rank in range(2) for line in (tmp_path / f"log.{rank}").read_text().splitlines()
               if not line.startswith("[Gloo]")]
    assert said.startswith("error: ") and "argument --lr: invalid number" in said
    reports = [json.loads((tmp_path / f"report{rank}").read_text()) for rank in range(2)]
    assert [report["message"]["message"] for report in reports] == [said, said]


def test_ctrl_c_on_torchrun_saves_and_one_rank_says_so(corpus, tmp_path):
    """A terminal sends it to all processes at once, and torchrun once more to its workers."""
    argv = tiny.flags(corpus, tmp_path / "run", *FLAGS, "--epochs", 500, "--num_workers", 1)
    process = tiny.torchrun(argv, start_new_session=True)
    deadline, log = time.monotonic() + 120, tmp_path / "run" / "log.txt"
    while not (log.exists() and " step 2/2 " in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    said = re.findall(r"^stopped by SIGINT: last.pt holds epoch (\d+), step (\d); .*", printed, re.MULTILINE)
    assert len(said) == 1 and "DataLoader" not in printed, printed
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (last["epoch"] + 1, last["step"]) == tuple(map(int, said[0]))


# ---- disks ----


def limited(size, argv):
    """main(argv), whose files may not be larger than `size` bytes: as a full disk, but without root."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    trainer.main(argv)


def test_a_disk_that_cannot_take_a_checkpoint_is_found_before_the_data_is_read(corpus, begun, tmp_path):
    argv = tiny.flags(tmp_path / "no data", tmp_path / "run", "--clip_model", corpus / "clip.json")
    assert tiny.wait(tiny.start(limited, 200_000, argv, log=tmp_path / "log")) == 1
    assert "cannot be written: it would be larger than a file may be here" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()
    data, start, broken, _ = begun  # going on with a full disk
    run, before = tmp_path / "copy", (broken / "last.pt").read_bytes()
    shutil.copytree(broken, run)
    argv = tiny.flags(data, run, *FLAGS, "--checkpoint", start, "--clip_model", corpus / "clip.json", "--save_every", 1,
                      "--resume", "auto")
    assert tiny.wait(tiny.start(limited, 200_000, argv, log=tmp_path / "log2")) == 1
    assert lines_of(tmp_path / "log2")[0].startswith("error: ") and (run / "last.pt").read_bytes() == before


def full_later(argv):
    """main(argv), whose disk is full once the first step is over."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = trainer.RunDir.save

    def save(run, name, state):
        if state["global_step"] > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        real(run, name, state)

    trainer.RunDir.save = save
    trainer.main(argv)


def test_a_disk_that_fills_up_keeps_the_last_good_file(corpus, tmp_path):
    argv = tiny.flags(corpus, tmp_path / "run", *FLAGS, "--save_every", 1)
    assert tiny.wait(tiny.start(full_later, argv, log=tmp_path / "log")) == 1
    (sentence,) = lines_of(tmp_path / "log")
    assert f"{tmp_path / 'run' / 'last.pt'}: cannot be written" in sentence and "as it was" in sentence
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["global_step"] == 1
    trainer.main([*argv, "--resume", "auto"])


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run", "a" * 300, "nul\0byte"])
def test_a_folder_that_cannot_be_is_one_sentence(corpus, tmp_path, folder):
    message = said(corpus, tmp_path / folder)
    assert len(message) < 900 and "run" in message or "a" * 300 in message or "nul" in message


# ---- last.pt, and other checkpoints of ours, damaged ----


def without(*keys):
    def spoil(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]
    return spoil


def with_value(key, value):
    return lambda state: state.update({key: value})


SPOILT = {"no model": without("model"), "no step": without("global_step"), "no optimizer": without("optimizer"),
          "a list": with_value("model", [1]), "an odd optimizer": with_value("optimizer", {"state": {}}),
          "no args": with_value("args", None), "an identity of nothing": with_value("identity", {"data": 3}),
          "a torn file": None}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("has_best", [False, True])
def test_a_damaged_last_pt_names_the_way_out(broken, spoil, has_best):
    data, run, flags = broken
    if has_best:
        shutil.copy(run / "last.pt", run / "best.pt")
    if spoil is None:
        (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:-9000])
    else:
        state = torch.load(run / "last.pt", weights_only=True)
        spoil(state)
        torch.save(state, run / "last.pt")
    message = said(data, run, *flags)
    assert "last.pt" in message and message.endswith("begin again in a new --output_dir"), message
    if "what it says of its run" not in message:
        assert (f"--checkpoint {run / 'best.pt'}" in message) == has_best


def test_a_best_pt_that_was_deleted_is_missed_in_one_sentence(corpus, evaluated, tmp_path):
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    (run / "best.pt").unlink()
    (run / "results.jsonl").unlink()
    with pytest.raises(SystemExit, match="error: .*best.pt: is gone; evaluate last.pt, --eval_only --checkpoint"):
        trainer.main(tiny.flags(corpus, run, *EVALUATED, "--resume", "auto"))

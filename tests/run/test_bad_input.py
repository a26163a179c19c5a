"""Bad input ends in one sentence that names the place and the way out, with a non-zero exit, before any training.

Each case damages a copy of the tiny corpus, or gives a flag that does not fit, and runs the trainer. Flags and presets
as such: test_presets.py; the official annotation files: test_prepare_msrvtt.py.
"""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import main_task_retrieval as trainer
from narvid import InputError
from narvid.data.loader import PairSampler
from narvid.data.frames import frame_path
from narvid.search.embedding import Embedder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def damaged(corpus, tmp_path):
    """A copy of the corpus, to be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def refusal(corpus, output_dir, *more):
    """The sentence with which a run ends; nothing may have been trained."""
    with pytest.raises(SystemExit) as left:
        trainer.main(tiny.flags(corpus, output_dir, *more))
    message = left.value.code
    assert isinstance(message, str) and message.startswith("error: ")  # a text is exit code 1, on stderr
    assert "\n" not in message and "Traceback" not in message and len(message) < 600
    assert not list(output_dir.glob("*.pt")) and not (output_dir / "results.jsonl").exists()
    return message


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def insert(path, number, text):
    """Make `text` line `number` of a file."""
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*before[: number - 1], text + "\n", *before[number - 1 :]]))


# ---- files ----


def no_file(name):
    return lambda corpus: (corpus / name).unlink()


def empty(name):
    return lambda corpus: (corpus / name).write_text("\n")


def with_line(name, number, text):
    return lambda corpus: insert(corpus / name, number, text)


def in_latin1(corpus):
    (corpus / "train.jsonl").write_bytes('{"video": "train0", "query": "café"}\n'.encode("latin-1"))


def frames_of(video, write):
    """Do something to the last frame of a video that training picks."""
    return lambda corpus: write(frame_path(corpus / "frames", video, 0))


def cut(path):
    path.write_bytes(path.read_bytes()[:-150])


def rotten(path):
    """Begins and ends as a jpg does, and is none."""
    path.write_bytes(b"\xff\xd8" + b"not a picture" * 20 + b"\xff\xd9")


def without_narration(corpus):
    rewrite(corpus / "narrations.jsonl", [e for e in lines(corpus / "narrations.jsonl") if e["video"] != "train1"])


def at_another_rate(corpus):
    """train1 narrated every 1.7 seconds."""
    entries = lines(corpus / "narrations.jsonl")
    entry = next(e for e in entries if e["video"] == "train1")
    entry["sentences"] = [{"time": 1.7 * k, "text": "something"} for k in range(4)]
    rewrite(corpus / "narrations.jsonl", entries)


FILES = {
    "no train file": (no_file("train.jsonl"), ["train.jsonl", "cannot be read", "prepare"]),
    "no test file": (no_file("test.jsonl"), ["test.jsonl", "cannot be read"]),
    "empty train file": (empty("train.jsonl"), ["train.jsonl", "empty"]),
    "empty test file": (empty("test.jsonl"), ["test.jsonl", "empty"]),
    "malformed JSON": (with_line("train.jsonl", 3, '{"video": "train0", '), ["train.jsonl:3", "JSON"]),
    "malformed JSON of val": (with_line("val.jsonl", 2, "video,query"), ["val.jsonl:2", "JSON"]),
    "no object": (with_line("test.jsonl", 2, '["test0", "a dog"]'), ["test.jsonl:2", "no object", "prepare"]),
    "query without a video": (with_line("train.jsonl", 4, '{"query": "a dog"}'), ["train.jsonl:4", '"video"']),
    "blank video": (with_line("train.jsonl", 4, '{"video": " ", "query": "a dog"}'), ["train.jsonl:4", '"video"']),
    "video without a query": (with_line("train.jsonl", 4, '{"video": "train0"}'), ["train.jsonl:4", '"query"']),
    "blank query": (with_line("train.jsonl", 4, '{"video": "train0", "query": " "}'), ["train.jsonl:4", '"query"']),
    "query without width": (
        with_line("train.jsonl", 4, '{"video": "train0", "query": "\u200b \u00a0"}'), ["train.jsonl:4", '"query"']
    ),
    "not UTF-8": (in_latin1, ["train.jsonl", "UTF-8"]),
    "video without frames": (
        with_line("train.jsonl", 5, '{"video": "video77", "query": "a dog"}'),
        ["train.jsonl:5", "video77", "no frames", "extract_frames"],
    ),
    "no frame index": (no_file("frames/index.jsonl"), ["index.jsonl", "extract_frames"]),
    "torn frame index": (
        lambda corpus: (corpus / "frames" / "index.jsonl").write_text('{"video": "train0", "times": [0.0'),
        ["index.jsonl:1", "extract_frames"],
    ),
    "missing jpg": (frames_of("train2", Path.unlink), ["train2/00000.jpg", "extract_frames"]),
    "truncated jpg": (frames_of("train2", cut), ["train2/00000.jpg", "extract_frames"]),
    "empty jpg": (frames_of("test3", lambda path: path.write_bytes(b"")), ["test3/00000.jpg", "empty"]),
    "text as jpg": (frames_of("val1", lambda path: path.write_text("hello")), ["val1/00000.jpg", "no jpg"]),
    "rotten jpg": (frames_of("train2", rotten), ["train2/00000.jpg", "extract_frames"]),
    "no narration file": (no_file("narrations.jsonl"), ["narrations.jsonl", "cannot be read"]),
    "empty narration file": (empty("narrations.jsonl"), ["narrations.jsonl", "empty"]),
    "malformed narration": (with_line("narrations.jsonl", 6, '{"video": "x"'), ["narrations.jsonl:6", "JSON"]),
    "times that fall": (
        with_line("narrations.jsonl", 2, json.dumps({"video": "x", "captioner": "", "prompt": "", "sentences": [
            {"time": 1, "text": "a"}, {"time": 0, "text": "b"}]})),
        ["narrations.jsonl:2", "x", "increase"],
    ),
    "no narration": (without_narration, ["narrations.jsonl", "train1", "--missing_narration skip-video"]),
    "another frame rate": (at_another_rate, ["narrations.jsonl", "train1", "another frame rate", "1.70 s", "1.00 s"]),
}


@pytest.mark.parametrize(("damage", "words"), FILES.values(), ids=FILES)
def test_a_bad_file_is_named_before_training(damaged, tmp_path, damage, words):
    damage(damaged)
    message = refusal(damaged, tmp_path / "run")
    assert all(word in message for word in words), message


def test_a_video_without_a_narration_can_be_skipped_and_is_counted(damaged, tmp_path):
    entries = [e for e in lines(damaged / "narrations.jsonl") if e["video"] not in ("train1", "test1")]
    rewrite(damaged / "narrations.jsonl", entries)
    trainer.main(tiny.flags(damaged, tmp_path / "run", "--missing_narration", "skip-video", "--epochs", 1))
    result = lines(tmp_path / "run" / "results.jsonl")[-1]
    assert result["videos"] == tiny.VIDEOS["test"] - 1 and result["videos_without_narration"] == 1


# ---- weights and checkpoints ----


def clip_weights(weights):
    """The towers of a checkpoint as a bare state dict."""
    stored = torch.load(weights, weights_only=True)["model"]
    return {key.removeprefix("clip."): value for key, value in stored.items() if key.startswith("clip.")}


def test_weights_of_another_shape_are_refused(corpus, weights, tmp_path):
    state = clip_weights(weights)
    state["text_projection"] = torch.zeros(16, 128)
    torch.save(state, tmp_path / "clip.pt")
    message = refusal(corpus, tmp_path / "run", "--clip_pretrained", tmp_path / "clip.pt", "--quick_gelu")
    assert all(word in message for word in ("clip.pt", "another shape", "text_projection", "(16, 128)", "(16, 64)"))


def test_weights_that_do_not_tell_their_activation_are_refused(corpus, weights, tmp_path):
    torch.save(clip_weights(weights), tmp_path / "clip.pt")
    message = refusal(corpus, tmp_path / "run", "--clip_pretrained", tmp_path / "clip.pt")
    assert "clip.pt" in message and "--quick_gelu" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.pt", ["nowhere.pt", "No such file"]),
        ("garbage.pt", ["garbage.pt", "no checkpoint"]),
        ("torn.pt", ["torn.pt", "damaged"]),
        ("list.pt", ["list.pt", "list"]),
        ("foreign.pt", ["foreign.pt", "another model"]),
    ],
)
@pytest.mark.parametrize("how", [[], ["--eval_only"]], ids=["train", "eval"])
def test_what_is_no_checkpoint_is_refused(corpus, weights, tmp_path, how, name, words):
    path = tmp_path / name
    if name == "garbage.pt":
        path.write_bytes(b"hello\n" * 99)
    if name == "torn.pt":
        path.write_bytes(weights.read_bytes()[:-5000])
    if name in ("list.pt", "foreign.pt"):
        torch.save([1] if name == "list.pt" else {"epoch": 3, "state_dict": {}}, path)
    message = refusal(corpus, tmp_path / "run", "--checkpoint", path, *how)
    assert all(word in message for word in words), message


def spoilt(**parts):
    """A checkpoint of ours, of which some parts are something else, or (None) missing."""
    def spoil(state):
        for name, value in parts.items():
            state[name] = value
            if value is None:
                del state[name]
    return spoil


def with_nan(state):
    state["model"]["clip.text_projection"][3, 4] = torch.nan


SPOILT = {
    "nothing": (lambda state: state.clear(), ["is an empty checkpoint"]),
    "no model": (spoilt(model=None), ["its model is missing"]),
    "no args": (spoilt(args=None), ["its args is missing"]),
    "no clip_config": (spoilt(clip_config=None), ["its clip_config is missing"]),
    "a list of weights": (spoilt(model=[1, 2]), ["its model is a list"]),
    "numbers as weights": (spoilt(model={"clip.logit_scale": 3.0}), ["its model holds more than weights"]),
    "a text as config": (spoilt(clip_config="ViT-B-32"), ["its clip_config is a str"]),
    "a config of nothing": (spoilt(clip_config={}), ["no sizes of towers that can be built"]),
    "a config of other sizes": (
        spoilt(clip_config={"embed_dim": 64, "vision_cfg": {"layers": "two"}, "text_cfg": {}}),
        ["no sizes of towers that can be built"]),
    "a flag of another type": (spoilt(args={"clip_model": "clip.json", "modules": ["NM"], "max_words": "many"}),
                               ["spoilt.pt: argument --max_words", "many"]),
    "an unknown method": (spoilt(args={"method": "telepathy"}), ["telepathy", "choose from"]),
    "weights that are not finite": (with_nan, ["1 of its weights are not finite (clip.text_projection)"]),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("how", [[], ["--eval_only"]], ids=["train", "eval"])
def test_a_checkpoint_of_ours_with_damaged_parts_is_refused(corpus, weights, tmp_path, how, spoil, words):
    state = torch.load(weights, weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "spoilt.pt")
    message = refusal(corpus, tmp_path / "run", "--checkpoint", tmp_path / "spoilt.pt", *how)
    assert "spoilt.pt" in message or "telepathy" in message
    assert all(word in message for word in words), message
    with pytest.raises(InputError) as refused:  # search has the same door
        Embedder.load(tmp_path / "spoilt.pt")
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_video_of_train_in_test_is_refused_unless_it_is_meant(damaged, tmp_path):
    insert(damaged / "test.jsonl", 3, '{"video": "train4", "query": "a dog"}')
    message = refusal(damaged, tmp_path / "run")
    assert "test.jsonl: 1 of its 12 videos stand in train.jsonl too (train4)" in message and "--allow_leak" in message
    trainer.main(tiny.flags(damaged, tmp_path / "run", "--allow_leak", "--epochs", 1, "--select_on", "last"))


def test_queries_for_qb_norm_are_looked_for_before_the_evaluation(damaged, corpus, weights, tmp_path):
    (damaged / "train.jsonl").unlink()
    more = ("--eval_only", "--checkpoint", weights, "--clip_model", corpus / "clip.json", "--qb_norm_queries", 5)
    assert "train.jsonl, which is not there" in refusal(damaged, tmp_path / "run", *more)
    (damaged / "train.jsonl").write_text("no JSON\n")
    (damaged / "frames" / "index.jsonl").unlink()  # it would be missed first if the data were read first
    assert "train.jsonl" in refusal(damaged, tmp_path / "run", *more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--clip_model", "ViT-B-32"], ["another model", "clip.json", "ViT-B-32"]),
        (["--modules", "NM"], ["another model", "not known"]),
        (["--temporal_layers", 3], ["another model", "are missing"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(corpus, weights, tmp_path, more, words):
    message = refusal(corpus, tmp_path / "run", "--checkpoint", weights, *more)
    assert all(word in message for word in [weights.name, *words]), message


def test_a_checkpoint_of_other_towers_is_refused(corpus, weights, tmp_path):
    """The flags fit, the tensors do not."""
    stored = torch.load(weights, weights_only=True)
    stored["clip_config"]["text_cfg"]["layers"] = 1
    torch.save(stored, tmp_path / "other.pt")
    assert "another model" in refusal(corpus, tmp_path / "run", "--checkpoint", tmp_path / "other.pt")


# ---- flags that do not fit the data, the model or each other ----


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max_words", 2], ["--max_words 2", "need 3"]),
        (["--seed", 2**32], ["--seed 4294967296", "2^32"]),
        (["--eval_batch_size", 10**30], ["--eval_batch_size", "2^32"]),
        (["--rank_timeout", 1e300], ["--rank_timeout", "1e5"]),
        (["--dsl_scale", 1e308], ["--dsl_scale", "1e6"]),
        (["--checkpoint", ""], ["--checkpoint: is empty"]),
        (["--clip_pretrained", ""], ["--clip_pretrained: is empty"]),
        (["--config", ""], ["--config: is empty"]),
        (["--batch_size", 1000], ["39 training pairs", "1000", "--batch_size"]),
        (["--batch_size", 9, "--gradient_accumulation_steps", 2], ["--batch_size 9", "2 accumulation steps"]),
        (["--max_words", 78], ["--max_words 78", "77"]),
        (["--max_frames", 78], ["--max_frames 78", "77"]),
        (["--modules", "CMI"], ["CMI", "NM"]),
        (["--clip_model", "ViT-B-99"], ["ViT-B-99", "ViT-B-32"]),
        (["--clip_model", "RN51"], ["RN51", "ViT"]),
        (["--clip_pretrained", "openai"], ["openai", "clip.json"]),
        (["--freeze_layers", 3], ["3 layers", "2"]),
        (["--dropout", 1.5], ["--dropout", "0 to 1"]),
        (["--frames", "nowhere"], ["nowhere/index.jsonl", "extract_frames"]),
        (["--nonsense", 3], ["--nonsense"]),
        (["--epochs", "three"], ["--epochs", "three"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_flags_that_do_not_fit_are_refused(corpus, tmp_path, more, words):
    message = refusal(corpus, tmp_path / "run", *more)
    assert all(word in message for word in words), message


def test_more_processes_than_samples_are_refused():
    with pytest.raises(InputError) as refused:
        PairSampler(3, 8, rank=5, world_size=8, seed=0)
    assert all(word in str(refused.value) for word in ("3 training pairs", "8 processes"))


def test_an_output_directory_with_something_else_in_it_is_refused_and_left_alone(corpus, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was")
    message = refusal(corpus, tmp_path / "thesis")
    assert "thesis" in message and "choose" in message
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_an_output_directory_that_holds_another_run_is_refused(corpus, tmp_path):
    there = vars(trainer.parse_args(tiny.flags(corpus, tmp_path / "run"))) | {"lr": 0.5}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(there))
    message = refusal(corpus, tmp_path / "run")
    assert "holds another run" in message and "--resume auto" in message
    message = refusal(corpus, tmp_path / "run", "--resume", "auto")
    assert "holds another run" in message and "--lr 0.5 there, 0.001 here" in message
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == there


def test_a_file_as_output_directory_is_refused(corpus, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(SystemExit) as left:
        trainer.main(tiny.flags(corpus, tmp_path / "run"))
    assert "run" in left.value.code and "\n" not in left.value.code


# ---- a loss that is not finite ----


def videos_of_step(corpus, epoch, step, batch_size=16):
    """The videos of a step, in the order of the batch."""
    pairs = lines(corpus / "train.jsonl")
    sampler = PairSampler(len(pairs), batch_size, rank=0, world_size=1, seed=42)
    sampler.set(epoch, step)
    return [pairs[i]["video"] for i in next(iter(sampler))]


def broken_run(corpus, output_dir, *more):
    with pytest.raises(SystemExit) as left:
        trainer.main(tiny.flags(corpus, output_dir, *more))
    assert left.value.code.startswith("error: ") and "\n" not in left.value.code
    return left.value.code


def test_a_rate_that_explodes_stops_with_epoch_step_and_videos_and_leaves_whole_files(corpus, tmp_path):
    """Nothing is planted: the first step has rate 0, the second one 1e37, then a loss of NaN or a gradient of inf."""
    flags = ["--epochs", 3, "--lr", 1e37, "--clip_lr", 1e37, "--warmup", 0.5, "--select_on", "last"]
    message = broken_run(corpus, tmp_path / "run", *flags, "--save_every", 1)
    assert "the loss at epoch 2, step 1 is nan" in message or "the gradient at epoch 2, step 1 is " in message
    assert ", ".join(videos_of_step(corpus, 1, 0)) in message and "learning rate" in message
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert stored["global_step"] == 2 and not list((tmp_path / "run").glob(".*.tmp"))


def test_a_planted_nan_stops_at_once_and_the_good_checkpoint_goes_on(corpus, weights, tmp_path, monkeypatch):
    """A NaN comes into a weight in the second epoch: what the first one left is whole, and a resumed run ends well."""
    out = tmp_path / "run"
    steps = []

    def plant(optimizer, factor):
        steps.append(factor)
        if len(steps) == 4:  # epoch 2, step 2
            optimizer.param_groups[-1]["params"][0].data.view(-1)[0] = torch.nan
        set_lr(optimizer, factor)

    set_lr = trainer.optim.set_lr
    monkeypatch.setattr(trainer.optim, "set_lr", plant)
    message = broken_run(corpus, out, "--checkpoint", weights)
    assert "the loss at epoch 2, step 2 is nan" in message
    assert f"videos of the batch: {', '.join(videos_of_step(corpus, 1, 1))}." in message
    last = torch.load(out / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in last["model"].values())
    assert (out / "best.pt").exists()

    monkeypatch.setattr(trainer.optim, "set_lr", set_lr)
    metrics = trainer.main(tiny.flags(corpus, out, "--checkpoint", weights, "--resume", "auto"))
    assert metrics["S_fusion"]["text_to_video"]["MnR"] >= 1


# ---- from the shell ----


def test_as_a_script_the_sentence_goes_to_the_interpreter_which_prints_it_and_exits_with_1(tmp_path, monkeypatch):
    argv = ["main_task_retrieval.py", "--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "main_task_retrieval.py"), run_name="__main__")
    assert left.value.code.startswith("error: ") and "index.jsonl" in left.value.code


def test_a_malformed_csv_line_stops_the_preparation(tmp_path):
    (tmp_path / "MSRVTT_data.json").write_text('{"sentences": [{"video_id": "video0", "caption": "a dog"}]}')
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo1,again\n")
    command = [sys.executable, ROOT / "data" / "prepare_msrvtt.py", "--annotations", tmp_path, "--protocol", "9k"]
    command += ["--out", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "MSRVTT_train.9k.csv:3" in run.stderr and not (tmp_path / "out").exists()

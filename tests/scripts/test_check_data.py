"""scripts/check_data.py: its screen at every stage; the presets and train_<corpus>.sh of the corpora it points to."""

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "scripts")
    check_data = importlib.import_module("check_data")

CORPORA = ("msrvtt", "msvd", "vatex", "didemo", "activitynet", "lsmdc")


def screen(capsys, *argv):
    """(exit code, lines printed)."""
    with pytest.raises(SystemExit) as left:
        check_data.main([str(x) for x in argv])
    return left.value.code, capsys.readouterr().out.splitlines()


def json_lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture
def data(tmp_path):
    """data/msvd, complete: three videos, five queries, one missing video."""
    folder = tmp_path / "msvd"
    (folder / "frames").mkdir(parents=True)
    for split, videos in {"train": ["a", "a", "a"], "val": ["b"], "test": ["c"]}.items():
        (folder / f"{split}.jsonl").write_text(json_lines(*({"video": v, "query": "text"} for v in videos)))
    prepared = {"corpus": "msvd", "protocol": "standard", "missing": ["gone"]}
    prepared |= {"videos": {"train": 1, "val": 1, "test": 1}, "queries": {"train": 3, "val": 1, "test": 1}}
    (folder / "prepared.json").write_text(json.dumps(prepared))
    index = [{"video": v, "times": [0.0, 1.0, 2.0][:n]} for v, n in (("a", 3), ("b", 2), ("c", 1), ("unlisted", 1))]
    (folder / "frames" / "index.jsonl").write_text(json_lines(*index))
    narrate(folder, a="a dog", b="a cat", c="a cow", unlisted="a hen")
    return folder


def narrate(folder, **sentence_of):
    """narrations.jsonl: one sentence a video, at its first frame."""
    common = {"captioner": "small-captioner", "prompt": "C"}
    entries = [{"video": v, **common, "sentences": [{"time": 0.0, "text": t}]} for v, t in sentence_of.items()]
    (folder / "narrations.jsonl").write_text(json_lines(*entries))


# ---- the stages ----


def test_complete_data_lead_to_training(data, capsys):
    code, lines = screen(capsys, "msvd", "--data_dir", data)
    assert code == 0 and len(lines) == 4
    assert [line[:3] for line in lines[:3]] == ["[x]"] * 3
    assert "standard: train 1 videos 3 queries, val 1 videos 1 queries, test 1 videos 1 queries" in lines[0]
    assert "1 missing videos left out" in lines[0]
    assert f"3 of 3 videos in {data / 'frames'}; 2.0 frames each" in lines[1]
    assert "3 of 3 videos" in lines[2] and "by small-captioner" in lines[2]
    assert lines[3] == "next: bash scripts/train_msvd.sh"


@pytest.mark.parametrize("corpus", CORPORA)
def test_an_empty_folder_leads_to_the_corpus_prepare_script(tmp_path, capsys, corpus):
    preset = "msrvtt_vitb16" if corpus == "msrvtt" else corpus
    code, lines = screen(capsys, preset, "--data_dir", tmp_path / corpus)
    assert code == 1 and [line[:3] for line in lines[:3]] == ["[ ]"] * 3
    assert lines[3].startswith(f"next: python data/prepare_{corpus}.py --annotations DIR ")
    script = (ROOT / "data" / f"prepare_{corpus}.py").read_text()
    assert ("--protocol" in lines[3]) == (corpus in ("msrvtt", "vatex"))  # where there are several
    if "--protocol" in lines[3]:
        assert f'"{lines[3].split("--protocol ")[1].split()[0]}": ' in script


def test_missing_frames_are_named_and_come_before_narrations(data, capsys):
    (data / "frames" / "index.jsonl").write_text(json_lines({"video": "b", "times": [0.0]}))
    narrate(data, a="a dog")
    code, lines = screen(capsys, "msvd", "--data_dir", data)
    assert code == 1 and [line[:3] for line in lines[:3]] == ["[x]", "[ ]", "[ ]"]
    assert "1 of 3 videos" in lines[1] and "(missing: a, c)" in lines[1]
    assert "1 of 3 videos" in lines[2] and "(missing: b, c)" in lines[2]
    assert lines[3] == f"next: python scripts/extract_frames.py --videos VIDEOS --out {data / 'frames'}"


def test_an_empty_sentence_is_no_narration(data, capsys):
    narrate(data, a="a dog", b=" ", c="a cow")
    code, lines = screen(capsys, "msvd", "--data_dir", data)
    assert code == 1 and "2 of 3 videos" in lines[2] and "(missing: b)" in lines[2]
    assert "skip-video" in lines[3]


def test_narrations_matter_only_to_the_module_that_reads_them(data, tmp_path, capsys):
    (data / "narrations.jsonl").unlink()
    preset = tmp_path / "mine.yaml"
    for modules, code in (("[NM]", 1), ("[]", 0)):
        preset.write_text(f"data_dir: {data}\nmodules: {modules}\n")
        got, lines = screen(capsys, preset)
        assert got == code and len(lines) == 4 - (modules == "[]")
    assert lines[-1] == f"next: python main_task_retrieval.py --config {preset} --output_dir runs/mine"


def test_a_baseline_asks_for_what_it_reads(data, tmp_path, capsys):
    (data / "narrations.jsonl").unlink()
    own = tmp_path / "own.yaml"
    own.write_text(f"method: cap4video\ndata_dir: {data}\ntitles: [{tmp_path / 'titles.json'}]")
    code, lines = screen(capsys, own)
    assert code == 1 and [line[4:10] for line in lines[:3]] == ["annota", "frames", "titles"] and len(lines) == 4
    own.write_text(f"method: clip4clip\ndata_dir: {data}")
    assert screen(capsys, own)[0] == 0
    own.write_text(f"method: clip2video\ndata_dir: {data}\nframes: {data / 'frames_5fps'}")
    assert screen(capsys, own)[1][-1].endswith(f"--out {data / 'frames_5fps'} --fps 5")


def test_the_preset_says_where_frames_and_narrations_lie(data, tmp_path, capsys):
    (data / "frames").rename(tmp_path / "elsewhere")
    (data / "narrations.jsonl").rename(tmp_path / "sentences.jsonl")
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"data_dir: {data}\nframes: {tmp_path}/elsewhere\nnarrations: {tmp_path}/sentences.jsonl\n")
    code, lines = screen(capsys, preset)
    assert code == 0 and "elsewhere" in lines[1] and "sentences.jsonl" in lines[2]


def test_annotations_changed_after_preparing_are_noticed(data, capsys):
    with open(data / "train.jsonl", "a") as file:
        file.write(json_lines({"video": "a", "query": "added by hand"}))
    code, lines = screen(capsys, "msvd", "--data_dir", data)
    assert code == 1 and "not what prepared.json says" in lines[0] and "prepare_msvd.py" in lines[3]


def test_an_unfinished_preparation_is_noticed_and_an_own_corpus_needs_none(data, tmp_path, capsys):
    (data / "prepared.json").unlink()
    assert screen(capsys, "msvd", "--data_dir", data)[0] == 1
    data.rename(tmp_path / "holidays")
    assert screen(capsys, "msvd", "--data_dir", tmp_path / "holidays")[0] == 0


def test_the_demo_is_made_by_its_script(tmp_path, capsys):
    assert screen(capsys, "demo", "--data_dir", tmp_path)[1][-1].startswith("next: bash scripts/demo.sh")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", '{"video": "a", "query": "x"}\n{"vid', ["train.jsonl:2"]),
        ("prepared.json", "[]", ["prepared.json", "prepare the annotations again"]),
    ],
)
def test_a_broken_file_is_one_sentence(data, capsys, name, content, words):
    (data / name).write_text(content)
    message, _ = screen(capsys, "msvd", "--data_dir", data)
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize("name", ["frames/index.jsonl", "narrations.jsonl"])
def test_a_broken_index_or_narration_file_is_shown_in_its_line(data, capsys, name):
    (data / name).write_text('{"video": "a"}\n')
    code, lines = screen(capsys, "msvd", "--data_dir", data)
    number = 1 if name.startswith("frames") else 2
    assert code == 1 and lines[number].startswith("[ ]") and Path(name).name in lines[number]


def test_a_preset_that_is_none_is_one_sentence(tmp_path, capsys):
    assert "presets here: " in screen(capsys, "mvsd")[0]
    for text in ("- a\n", "a: [\n", ""):
        (tmp_path / "my.yaml").write_text(text)
        message, _ = screen(capsys, tmp_path / "my.yaml")
        assert message.startswith("error: ") and "my.yaml" in message and "\n" not in message


@pytest.mark.parametrize("line", [
    "method: clip3clip", "method: [narvid]", "nonsense: 1", "epochs: many", "lr: {a: 1}", "modules: 3", "modules: [XX]",
    "max_frames:", "filter_p: 7", "1: 2", "data_dir: [a, b]"])
def test_a_preset_with_an_unknown_method_flag_or_value_is_one_sentence(data, tmp_path, capsys, line):
    """Never exit status 0, which lets a script go on to training."""
    (tmp_path / "mine.yaml").write_text(f"data_dir: {data}\n" * (not line.startswith("data_dir")) + f"{line}\n")
    message, _ = screen(capsys, tmp_path / "mine.yaml")
    assert message.startswith("error: ") and "mine.yaml" in message and "\n" not in message


def elsewhere(folder, *argv):
    os.chdir(folder)
    tiny.python(*argv)


def test_from_the_shell(data, tmp_path):
    command = (ROOT / "scripts" / "check_data.py", "msvd", "--data_dir", data)
    assert tiny.wait(tiny.start(elsewhere, data, *command, log=tmp_path / "log")) == 0
    assert (tmp_path / "log").read_text().endswith("next: bash scripts/train_msvd.sh\n")


# ---- the presets and scripts it points to ----

PUBLISHED = {  # Sec. 4.1, App. B.2: p, lambda, eta, alpha, epochs, batch, frames
    "msvd": (0.5, 0.9, 1.8, 1.0, 5, 64, 12),
    "vatex": (0.5, 0.9, 1.8, 0.8, 5, 64, 12),
    "didemo": (0.5, 1.0, 1.9, 1.0, 10, 24, 32),
}
FAMILY = {"lsmdc": (5, 128, 12), "activitynet": (5, 128, 64)}  # CLIP4Clip: epochs, batch, frames


def preset(corpus):
    path = ROOT / "configs" / f"{corpus}.yaml"
    return yaml.safe_load(path.read_text()), path.read_text()


@pytest.mark.parametrize("corpus", [*PUBLISHED, *FAMILY])
def test_presets_carry_the_published_values(corpus):
    flags, text = preset(corpus)
    if corpus in PUBLISHED:
        names = ("filter_p", "lam", "eta", "alpha", "epochs", "batch_size", "max_frames")
        assert tuple(flags[name] for name in names) == PUBLISHED[corpus]
        assert "Table 2" in text
    else:
        assert tuple(flags[name] for name in ("epochs", "batch_size", "max_frames")) == FAMILY[corpus]
        for name in ("filter_p", "lam", "eta", "alpha"):  # published nowhere, and said so
            assert "ours, untuned" in next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    want = {"clip_model": "ViT-B-16", "clip_pretrained": "openai", "recipe": "reported", "fidelity": "reported"}
    want |= {"data_dir": f"data/{corpus}", "max_words": 64, "temperature": 0.1, "warmup": 0.1, "weight_decay": 0.2}
    assert {name: flags[name] for name in want} == want
    assert float(flags["lr"]) == 1e-4 and float(flags["clip_lr"]) == 1e-7
    assert flags.keys() == preset("msrvtt_vitb16")[0].keys()


def test_didemo_says_where_the_release_differs():
    lines = [line for line in preset("didemo")[1].splitlines() if "release's script says" in line]
    assert ["15" in lines[0], "32" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize(
    ("script", "argv", "name"),
    [(corpus, [], corpus) for corpus in CORPORA if corpus != "msrvtt"]
    + [("msrvtt", [], "msrvtt_vitb16"), ("msrvtt", ["vitb32"], "msrvtt_vitb32")],
)
def test_a_train_script_starts_the_trainer_with_its_preset(tmp_path, script, argv, name):
    python = tmp_path / "python"  # counts 2 GPUs, and shows how it was called instead of training
    python.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] && echo 2 || echo "$PWD:" "$@"\n')
    python.chmod(0o755)
    command = ["bash", ROOT / "scripts" / f"train_{script}.sh", *argv, "--seed", "7"]
    environment = {key: value for key, value in os.environ.items() if key != "NPROC"} | {"NARVID_PYTHON": str(python)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stdout.strip() == (
        f"{ROOT}: -m torch.distributed.run --standalone --nproc_per_node 2 main_task_retrieval.py "
        f"--config configs/{name}.yaml --output_dir runs/{name} --resume auto --seed 7"
    )
    assert (ROOT / "configs" / f"{name}.yaml").is_file()

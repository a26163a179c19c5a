"""narvid.Retriever and the exported folder: evaluation's numbers from video files, loading that executes nothing.

Weights are random: what is tested is the way, not what is found.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import main_task_retrieval as trainer
import narvid
from narvid import InputError, Retriever, export, fusion
from narvid.data import extraction
from narvid.data.narrations import load_narrations
from narvid.methods import METHODS
from narvid.run import settings
from narvid.run.exported import load_model
from scripts import make_demo_corpus

CLOSE = dict(rtol=0, atol=1e-5)
CPU = torch.device("cpu")
QUERIES = ["a red cross grows", "a green star bounces", "a blue square flashes"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Four of the demo's videos with frames, narrations and queries, as evaluation wants them."""
    home = tmp_path_factory.mktemp("demo")
    make_demo_corpus.main(["videos", "--out", str(home), "--train", "0", "--test", "4", "--workers", "1"])
    extraction.main(["--videos", str(home / "videos"), "--out", str(home / "frames"), "--workers", "1"])
    make_demo_corpus.main(["narrate", "--out", str(home), "--frames", str(home / "frames")])
    pairs = [{"video": f"video{v}", "query": f"{query} {v}"} for v in range(4) for query in QUERIES[:2]]
    (home / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return home


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """A run that has ended, with the tiny NarVid."""
    stored = torch.load(weights, weights_only=True)
    stored["args"] |= {"max_frames": 6, "max_words": 24, "precision": "fp32", "filter_p": 0.9, "fusion_weight": 0.6,
                       "select_on": "val", "recipe": "modern", "epochs": 2, "lr": 1e-3, "alpha": 0.5, "seed": 42}
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    data = {"train's queries": "39 (0123456789ab)", "test's pictures": "60 (ba9876543210)"}
    torch.save(stored | {"epoch": 2, "step": 0, "identity": {"data": data}}, folder / "best.pt")
    return folder


@pytest.fixture(scope="module")
def measured(demo, run):
    """What evaluation makes of the demo: (queries, {"S_qv", "S_qn"} and the fused matrix, result)."""
    out = run.with_name("evaluated")
    argv = ["--data_dir", str(demo), "--eval_only", "--checkpoint", str(run / "best.pt"), "--num_workers", "0",
            "--output_dir", str(out), "--save_similarity"]
    trainer.main(argv)
    shutil.copy(out / "results.jsonl", run)
    with np.load(out / "similarity.npz") as arrays:
        return arrays["queries"].tolist(), {name: torch.from_numpy(arrays[name]) for name in ("S_qv", "S_qn")}


@pytest.fixture(scope="module")
def model(run, measured):
    return Retriever.load(run, device="cpu")


def paths(demo):
    return [demo / "videos" / f"video{v}.mp4" for v in range(4)]


def test_importing_narvid_imports_no_torch():
    asked = "import sys, narvid; print('torch' in sys.modules, 'numpy' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", asked], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert got.stdout.strip() == "False False", got.stderr
    assert narvid.Retriever is Retriever and Retriever.__module__ == "narvid.retriever"
    with pytest.raises(AttributeError, match="no attribute 'Retreiver'"):
        narvid.Retreiver


def test_video_files_get_the_scores_of_the_evaluation(demo, model, measured):
    queries, expected = measured
    videos = model.encode_videos(paths(demo), demo / "narrations.jsonl")
    scores = model.score(model.encode_queries(queries), videos)
    assert list(scores) == ["video", "narration", "fused"] and all(s.shape == (8, 4) for s in scores.values())
    torch.testing.assert_close(scores["video"], expected["S_qv"], **CLOSE)
    torch.testing.assert_close(scores["narration"], expected["S_qn"], **CLOSE)
    torch.testing.assert_close(scores["fused"], fusion.fuse(expected["S_qv"], expected["S_qn"], 0.6), rtol=0, atol=1e-3)


def test_the_fused_score_takes_statistics_and_divides_by_no_zero(demo, model):
    videos = model.encode_videos(paths(demo), demo / "narrations.jsonl")
    queries = model.encode_queries(QUERIES)
    given = ((0.1, 0.5), (0.2, 0.0))
    scores = model.score(queries, videos, statistics=given)
    torch.testing.assert_close(scores["fused"], 2 * 0.6 * (scores["video"] - 0.1) / 0.5)
    alone = model.score(model.encode_queries(QUERIES[:1]), model.encode_videos(paths(demo)[:1]))
    assert alone["fused"].shape == (1, 1) and alone["fused"].item() == 0
    untold = model.score(queries, model.encode_videos(paths(demo)))
    assert (untold["narration"].std(correction=0) == 0) and untold["fused"].std() > 0


def test_sentences_are_joined_by_time_however_they_are_given(demo, model):
    of_video = load_narrations(demo / "narrations.jsonl")
    pairs = [[*zip(of_video[p.stem].times, of_video[p.stem].sentences)] for p in paths(demo)]
    maps = [[{"time": time, "text": text} for time, text in of_one] for of_one in pairs]
    wanted = model.encode_videos(paths(demo), demo / "narrations.jsonl")
    for narrations in (pairs, maps):
        got = model.encode_videos([str(path) for path in paths(demo)], narrations)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    some = model.encode_videos(paths(demo), [pairs[0], None, pairs[2][1:], []])
    assert some.narration_mask.any(dim=1).tolist() == [True, False, True, False]
    assert not some.narration_mask[2, 0] and some.narration_mask[2, 1]


def test_a_batch_in_parts_is_the_batch(demo, run, model):
    small = Retriever.load(run, device="cpu")
    small.encoding = small.encoding._replace(batch_size=3)
    for encode, given in (("encode_videos", (paths(demo), demo / "narrations.jsonl")), ("encode_queries", (QUERIES,))):
        for a, b in zip(getattr(small, encode)(*given), getattr(model, encode)(*given)):
            n = min(a.shape[1], b.shape[1])
            torch.testing.assert_close(a[:, :n], b[:, :n], **CLOSE)


def test_mistakes_are_one_sentence(demo, model, run, tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"no video")
    (tmp_path / "text.pt").write_text("no checkpoint")
    one = paths(demo)[:1]
    for act, said in {
        lambda: model.encode_videos([tmp_path / "no.mp4"]): "no.mp4 cannot be opened as a video",
        lambda: model.encode_videos([tmp_path / "none.mp4"]): "none.mp4 cannot be opened as a video",
        lambda: model.encode_videos([]): "there is no video",
        lambda: model.encode_queries([]): "there is no text",
        lambda: model.encode_videos(one, [None, None]): "2 narrations for 1 videos",
        lambda: model.encode_videos(one, [[(1.0, "a"), (1.0, "b")]]): "video0.mp4: sentence 2 of its narration",
        lambda: model.encode_videos(one, [[(float("nan"), "a")]]): "sentence 1 of its narration",
        lambda: model.encode_videos(one, [[{"time": 0.0}]]): "sentence 1 of its narration",
        lambda: model.encode_videos(one, [["a text"]]): "sentence 1 of its narration",
        lambda: model.encode_videos(one, tmp_path / "none.jsonl"): "none.jsonl",
        lambda: model.encode_videos([shutil.copy(one[0], tmp_path / "other.mp4")], demo / "narrations.jsonl"):
            "no narration for video other .* narrate it",
        lambda: Retriever.load(tmp_path): "neither a run's folder with a best.pt nor an exported model",
        lambda: Retriever.load(tmp_path / "none.pt"): "none.pt: cannot be read",
        lambda: Retriever.load(tmp_path / "text.pt"): "text.pt: is no checkpoint",
        lambda: Retriever.load(run, device="gpu"): "device gpu: cannot be used here",
        lambda: Retriever.load(None, towers="ViT-Z"): "ViT-Z",
    }.items():
        with pytest.raises(InputError, match=said) as error:
            act()
        assert "\n" not in str(error.value)


# ---- every method ----

FORMS = [("narvid", "--modules", "NM"), ("narvid", "--modules"), ("clip4clip", "--head", "seqTransf"),
         ("clip4clip", "--head", "tightTransf"), ("zeroshot", "--no-use_narration")]
FORMS += [(name,) for name in METHODS]


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_every_method_is_saved_and_loaded_to_the_bit(form, corpus, demo, tmp_path):
    """Of a method, built by its flags: what an exported folder scores is what it scores. Titles cannot be given."""
    method, *own = form
    args = trainer.parse_args(["--method", method, "--clip_model", str(corpus / "clip.json"), "--max_frames", "6",
                               "--output_dir", "unused", "--num_workers", "0", "--precision", "fp32", *own])
    torch.manual_seed(0)
    made = Retriever(trainer.build_model(args), args, CPU)
    made.save(tmp_path / "exported")
    if "titles" in METHODS[method].reads(args):
        with pytest.raises(InputError, match="reads titles"):
            Retriever.load(tmp_path / "exported")
        return
    loaded = Retriever.load(tmp_path / "exported", device="cpu")
    narrations = demo / "narrations.jsonl" if made.narrated else None
    one, two = (model.score(model.encode_queries(QUERIES), model.encode_videos(paths(demo)[:2], narrations))
                for model in (made, loaded))
    assert one.keys() == two.keys() == {*METHODS[method].views(args), "fused"}
    assert all(torch.equal(one[view], two[view]) and one[view].isfinite().all() for view in one)
    if not made.narrated:
        with pytest.raises(InputError, match="reads no narration"):
            loaded.encode_videos(paths(demo)[:1], [[(0.0, "a text")]])


# ---- the exported folder ----


@pytest.fixture
def exported(run, measured, tmp_path, capsys):
    export.main([str(run), "--out", str(tmp_path / "model")])
    assert "holds the model" in capsys.readouterr().out
    return tmp_path / "model"


def test_the_folder_holds_the_model_its_result_and_a_card(exported, run, demo, model):
    assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    stored = torch.load(run / "best.pt", weights_only=True)["model"]
    weights = load_file(exported / "model.safetensors")
    assert stored.keys() == weights.keys() and all(torch.equal(stored[name], weights[name]) for name in stored)
    config = json.loads((exported / "config.json").read_text())
    assert config["epoch"] == 2 and config["flags"]["filter_p"] == 0.9 and config["flags"]["select_on"] == "val"
    assert config["result"] == tiny.results(run)[-1]
    assert str(demo) not in json.dumps(config["flags"])  # no path of this machine's data
    card = (exported / "README.md").read_text()
    for said in ("# model\n", "after epoch 2, chosen on: val", "narvid --filter_p 0.9", "pictures of 32 pixels",
                 "joint\ndimension of 64", "6 frames", "24 tokens", "S_fusion |", "8 queries, 4 videos",
                 "- train's queries: 39 (0123456789ab)\n- test's pictures: 60 (ba9876543210)",
                 'Retriever.load("model")', "started from random weights, with", "--recipe modern", "--lr 0.001",
                 "--seed 42", "epoch chosen on val", "no other model's licence"):
        assert said.replace("\n", " ") in card.replace("\n", " ") or said in card, said
    again = Retriever.load(exported, device="cpu")
    again.save(exported.with_name("again"))
    assert (exported.with_name("again") / "config.json").read_bytes() == (exported / "config.json").read_bytes()


def test_the_card_says_whose_licence_the_weights_came_with(exported, run):
    flags = settings.parse_args(["--eval_only", "--output_dir", "x", "--checkpoint", str(exported)])
    training = json.loads((exported / "config.json").read_text())["training"]
    for started, known, said in [
        ("openai", training, "makers state: MIT (github.com/openai/CLIP)"), ("laion2b_s34b_b79k", training, "MIT"),
        ("meta", training, "Apache 2.0 (Perception"), ("metaclip_400m", training, "CC BY-NC 4.0"),
        ("dfn2b", training, "started from (dfn2b) is not known here"),
        ("openai", training | {"checkpoint": "old.pt"}, "started from (old.pt) is not known here"),
        (None, None, "started from (a released file) is not known here"), (None, training, "random weights"),
    ]:
        flags.clip_pretrained = started
        assert said in export.licence_of(flags, known, None), started
    export.main([str(run), "--out", str(exported), "--licence", "GPL 3"])
    assert "started from: GPL 3." in (exported / "README.md").read_text()


def test_a_model_of_the_hub_is_fetched_and_loaded(exported, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repository, revision=None, allow_patterns=None):
        asked.append((repository, revision, allow_patterns))
        if repository == "nobody/nothing":
            raise ConnectionError("no route\nto the hub")
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    of_folder = Retriever.load(exported, device="cpu")
    for name in ("somebody/narvid-demo", "hf-hub:somebody/narvid-demo", "hf-hub:somebody/narvid-demo@v1"):
        model = Retriever.load(name, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), of_folder.model.parameters()))
    files = ["config.json", "model.safetensors", "README.md", "tokenizer/*.json"]  # and no code
    assert asked == [("somebody/narvid-demo", revision, files) for revision in (None, None, "v1")]
    for name, said in (("nobody/nothing", "nobody/nothing: is not on this disk, and the hub gives no such model"),
                       ("hf-hub:nobody/nothing", "hub gives no such model (ConnectionError: no route)")):
        with pytest.raises(InputError, match=re.escape(said)) as error:
            Retriever.load(name)
        assert "\n" not in str(error.value)
    (tmp_path / "runs").mkdir()
    for name in ("runs/mistyped", "some/where/deep", "other/best.pt", "none"):  # files of this disk: nobody is asked
        with pytest.raises(InputError, match="cannot be read"):
            Retriever.load(name)
    assert len(asked) == 5
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        Retriever.load("somebody/narvid-demo")


def test_a_folder_of_an_earlier_version_says_nothing_of_its_recipe(exported):
    config = exported / "config.json"
    stored = json.loads(config.read_text())
    assert stored["training"] == {"recipe": "modern", "precision": "fp32", "epochs": 2, "lr": 1e-3, "alpha": 0.5,
                                  "seed": 42}
    del stored["training"]
    config.write_text(json.dumps(stored))
    Retriever.load(exported, device="cpu").save(exported)
    assert "## Recipe\n\nIt is not known." in (exported / "README.md").read_text()


def test_the_trainer_evaluates_an_exported_folder_and_a_runs_folder(exported, run, demo):
    for number, checkpoint in enumerate((exported, run)):
        metrics = trainer.main(["--data_dir", str(demo), "--eval_only", "--checkpoint", str(checkpoint),
                                "--num_workers", "0", "--output_dir", str(exported.with_name(f"e{number}"))])
        assert metrics == tiny.results(run)[-1]["metrics"]


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_damaged_folder_is_one_sentence_and_nothing_is_executed(exported, tmp_path):
    config, weights = exported / "config.json", exported / "model.safetensors"
    whole = json.loads(config.read_text()), weights.read_bytes()

    def without(name):
        return lambda: config.write_text(json.dumps({k: v for k, v in whole[0].items() if k != name}))

    def changed(**values):
        return lambda: config.write_text(json.dumps(whole[0] | values))

    flipped = bytearray(whole[1])
    flipped[-1000] ^= 1
    others = load_file(weights) | {"clip.logit_scale": torch.tensor(1.0)}
    towers, flags = whole[0]["towers"], whole[0]["flags"]
    for damage, said in [
        (config.unlink, "config.json"),
        (weights.unlink, "model.safetensors: is missing; export the model again"),
        (lambda: config.write_text("{"), "config.json:1: malformed JSON"),
        (lambda: config.write_text("[]"), "config.json"),
        (changed(form=2), "is of form 2, this version reads form 1"),
        *[(without(name), f"its {name} is missing") for name in ("flags", "towers", "epoch", "result", "sha256")],
        (changed(flags={}), "its flags name no method"),
        (changed(flags=flags | {"method": "nonesuch"}), "nonesuch"),
        (changed(flags=flags | {"max_words": -1}), f"{exported}: argument --max_words: -1 is not"),
        (changed(flags=flags | {"filter": ["a", "b"]}), f"{exported}: argument --filter: invalid choice"),
        (changed(towers={"embed_dim": 64}), "its towers are not described"),
        (changed(towers=towers | {"more": 1}), "its towers are not described"),
        (changed(towers=towers | {"embed_dim": "x"}), "holds no sizes of towers that can be built"),
        (changed(towers=towers | {"embed_dim": 128}), "weights of another shape"),
        (changed(towers=towers | {"vision_cfg": 5}), "holds no sizes of towers that can be built"),
        (lambda: weights.write_bytes(whole[1][:-100]), "model.safetensors: is damaged"),
        (lambda: weights.write_bytes(b""), "model.safetensors: is damaged"),
        (lambda: weights.write_bytes(flipped), "is not the file that config.json was written for"),
        (lambda: save_file(others, weights), "is not the file that config.json was written for"),
        (lambda: torch.save({"model": Trap(tmp_path / "executed")}, weights), "model.safetensors: is damaged"),
    ]:
        config.write_text(json.dumps(whole[0]))
        weights.write_bytes(whole[1])
        damage()
        with pytest.raises(InputError, match=re.escape(said)) as error:
            Retriever.load(exported)
        assert "\n" not in str(error.value) and not (tmp_path / "executed").exists(), said
    torch.save({"model": Trap(tmp_path / "executed")}, tmp_path / "trap.pt")
    with pytest.raises(InputError, match="trap.pt: is no checkpoint"):
        Retriever.load(tmp_path / "trap.pt")
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_something_else_is_left_alone(exported, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("my thesis")
    with pytest.raises(InputError, match="mine: holds something else than an exported model"):
        export.main([str(run), "--out", str(tmp_path / "mine")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    export.main([str(run), "--out", str(exported)])  # in place of its own
    assert load_model(exported)["epoch"] == 2
    with pytest.raises(InputError, match="none: is not there"):
        export.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")])

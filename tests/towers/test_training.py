"""Towers of other families in the trainer: train, resume, evaluate; rates by depth and what of them is trained.

tests/test_distributed.py has their first step on two ranks.
"""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import main_task_retrieval as trainer
from narvid import InputError, Retriever
from narvid.run import optim
from narvid.towers import Towers, architectures, compile_blocks, load_towers
from narvid.towers import __main__ as towers_command
from narvid.data.frames import pick_frames, read_frames
from narvid.run.build import build_model

pytestmark = pytest.mark.slow

METHODS = [("narvid",), ("clip4clip", "--head", "seqTransf")]


def of(corpus, folder, name, *more):
    return tiny.flags(corpus, folder, *tiny.towers_of(corpus, name), *more)


@pytest.mark.parametrize("method", METHODS, ids="-".join)
@pytest.mark.parametrize("name", tiny.OTHER_TOWERS)
def test_a_run_that_was_broken_ends_like_the_unbroken_one(corpus, tmp_path, monkeypatch, name, method):
    metrics = trainer.main(of(corpus, tmp_path / "whole", name, "--method", *method))
    step, taken = trainer.train_step, []

    def broken(*args, **options):
        taken.append(1)
        if len(taken) == 3:
            raise MemoryError("no room")
        return step(*args, **options)

    monkeypatch.setattr(trainer, "train_step", broken)
    argv = of(corpus, tmp_path / "broken", name, "--method", *method, "--resume", "auto", "--save_every", 1)
    with pytest.raises(MemoryError):
        trainer.main(argv)
    monkeypatch.undo()
    assert trainer.main(argv) == metrics
    best = [torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("whole", "broken")]
    assert best[0]["model"].keys() == best[1]["model"].keys()
    assert all(torch.equal(value, best[1]["model"][key]) for key, value in best[0]["model"].items())
    assert all(np.isfinite(tiny.losses(tmp_path / "whole"))) and best[0]["clip_config"]["custom_text"] is True

    # Evaluation brings back all but the tokenizer's content.
    again = trainer.main(tiny.flags(corpus, tmp_path / "again", "--eval_only", "--checkpoint",
                                    tmp_path / "whole" / "best.pt", "--clip_model", corpus / f"{name}.json"))
    assert again == metrics


@pytest.mark.parametrize("name", tiny.OTHER_TOWERS)
def test_zero_shot_and_the_retriever_agree(corpus, tmp_path, name):
    argv = of(corpus, tmp_path / "run", name, "--method", "zeroshot", "--save_similarity")
    trainer.main(argv)
    saved = np.load(tmp_path / "run" / "similarity.npz")
    more = {"tokenizer": str(corpus / "tokenizer")} if name == "siglip" else {}
    torch.manual_seed(42)
    retriever = Retriever.load(None, towers=str(corpus / f"{name}.json"), pretrained=None, **more)
    queries = [json.loads(line)["query"] for line in (corpus / "test.jsonl").read_text().splitlines()]
    args = trainer.parse_args(argv)
    trainer.seed_everything(args)
    model = build_model(args)
    retriever.model.load_state_dict(model.state_dict())  # the run's: its seed stands before the first weight
    retriever.encoding = retriever.encoding._replace(max_frames=6)  # as tiny.flags
    encoded = retriever.encode_queries(queries)
    frames = {}
    for line in (corpus / "test.jsonl").read_text().splitlines():
        frames.setdefault(json.loads(line)["video"], None)
    paths = {video: sorted((corpus / "frames" / video).glob("*.jpg")) for video in frames}
    assert list(frames) == saved["videos"].tolist()
    pictures = [read_frames([of_video[k] for k in pick_frames(len(of_video), retriever.encoding.max_frames)],
                            retriever.encoding.picture) for of_video in paths.values()]
    videos = retriever.encode_frames(pictures, [[None] * len(x) for x in pictures])
    got = retriever.score(encoded, videos)["video"]
    np.testing.assert_allclose(got.numpy(), saved["S_qv"], atol=1e-5)


def test_scores_do_not_depend_on_the_batch(corpus, tmp_path):
    """Texts of many lengths: what a tower reads in full it must read in full everywhere."""
    made = []
    for size in (1, 5, 64):
        trainer.main(of(corpus, tmp_path / f"run{size}", "siglip", "--method", "zeroshot", "--save_similarity",
                        "--eval_batch_size", size))
        made.append(np.load(tmp_path / f"run{size}" / "similarity.npz"))
    for other in made[1:]:
        for key in ("S_qv", "S_qn"):
            np.testing.assert_allclose(other[key], made[0][key], atol=1e-5)


# ---- which parameters, at which rates ----


@pytest.mark.parametrize("name", [None, *tiny.OTHER_TOWERS])
def test_rates_fall_by_depth(corpus, tmp_path, name):
    argv = tiny.flags(corpus, tmp_path, "--freeze_layers", -1) if name is None else of(
        corpus, tmp_path, name, "--freeze_layers", -1)
    model = build_model(trainer.parse_args(argv))
    optimizer = optim.build_optimizer(model, recipe="modern", lr=1e-3, clip_lr=1e-2, weight_decay=0.2, layer_decay=0.5)
    rate = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {key: rate[id(p)] for key, p in model.named_parameters()}
    depths = model.clip.depths()
    for key, (depth, top) in depths.items():
        assert rates[f"clip.{key}"] == pytest.approx(1e-2 * 0.5 ** (top - depth))
    assert rates["clip.logit_scale"] == 1e-2
    assert {value for key, value in rates.items() if not key.startswith("clip.")} == {1e-3}
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    plain = optim.build_optimizer(model, recipe="modern", lr=1e-3, clip_lr=1e-2, weight_decay=0.2)
    assert [group["name"] for group in plain.param_groups] == ["clip_no_decay", "clip_decay", "heads_no_decay",
                                                               "heads_decay"]


@pytest.mark.parametrize("name", [None, *tiny.OTHER_TOWERS])
def test_what_of_the_towers_is_trained(corpus, tmp_path, name):
    def trained(*more):
        argv = tiny.flags(corpus, tmp_path, *(tiny.towers_of(corpus, name) if name else []), *more)
        clip = build_model(trainer.parse_args(argv)).clip
        return {key for key, p in clip.named_parameters() if p.requires_grad}, clip

    everything, clip = trained("--train_towers", "full")
    assert everything == {key for key, _ in clip.named_parameters()}
    assert trained("--train_towers", "frozen")[0] == {"logit_scale"}
    last = trained("--train_towers", "last", 1)[0]
    depths = clip.depths()
    assert last == {"logit_scale"} | {key for key, (depth, top) in depths.items() if depth >= top - 1}
    frozen = everything - trained("--freeze_layers", 1)[0]
    assert frozen == {key for key, (depth, top) in depths.items() if depth <= 1 and depth < top}


@pytest.mark.parametrize("words", ["half", "last", "last 0", "last x", "full frozen"])
def test_a_mistaken_part_is_refused(corpus, tmp_path, capsys, words):
    with pytest.raises(SystemExit, match="say full, frozen, or last and a number of blocks"):
        trainer.parse_args(tiny.flags(corpus, tmp_path, "--train_towers", *words.split()))


# ---- what other towers cannot do ----


@pytest.mark.parametrize("more", [("--recipe", "reported"), ("--method", "clip4clip", "--linear_patch", "3d"),
                                  ("--method", "internvideo"), ("--method", "cap4video")], ids=" ".join)
def test_what_reaches_into_openais_towers_is_refused_in_one_sentence(corpus, tmp_path, more):
    with pytest.raises(InputError, match="needs towers of OpenAI's form") as error:
        build_model(trainer.parse_args(of(corpus, tmp_path, "timm", *more)))
    assert more[-2] in str(error.value) or more[1] in str(error.value)


def test_a_checkpoint_under_the_name_of_other_towers_is_refused(corpus, tmp_path):
    trainer.main(of(corpus, tmp_path / "run", "timm", "--epochs", 1, "--select_on", "last"))
    with pytest.raises((InputError, SystemExit), match="checkpoint of another model"):
        trainer.main(of(corpus, tmp_path / "again", "siglip", "--eval_only", "--checkpoint",
                        tmp_path / "run" / "best.pt"))


def clip_folder(corpus, folder, **pictures):
    """The tiny CLIP as the hub has such models: config, weights, and how its pictures are made."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": pictures}))
    torch.manual_seed(0)
    save_file(load_towers(str(corpus / "clip.json")).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def broken_run(argv, monkeypatch):
    """Of two steps the first is taken and saved."""
    step, taken = trainer.train_step, []

    def one(*args, **options):
        taken.append(1)
        if len(taken) == 2:
            raise MemoryError("no room")
        return step(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(trainer, "train_step", one)
        trainer.main(argv)


def test_a_run_goes_on_only_with_the_pictures_that_it_began_with(corpus, tmp_path, monkeypatch):
    """By content: the folder of its model may move; the same weights with other pictures are another model."""
    def argv(folder, run="run"):
        return tiny.flags(corpus, tmp_path / run, "--clip_model", folder, "--epochs", 1, "--select_on", "last",
                          "--resume", "auto", "--save_every", 1)

    folder = clip_folder(corpus, tmp_path / "one", mean=[0.5] * 3)
    trainer.main(argv(folder, "whole"))
    broken_run(argv(folder), monkeypatch)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for n, other in enumerate(({}, {"mean": [0.5] * 3, "resize_mode": "squash"}, {"mean": [0.5] * 3, "std": [0.5] * 3},
                               {"mean": [0.5] * 3, "interpolation": "bilinear"})):
        with pytest.raises(SystemExit, match="its run read something else .--clip_model ") as refused:
            trainer.main(argv(clip_folder(corpus, tmp_path / f"other{n}", **other)))
        assert "\n" not in str(refused.value)
        assert (tmp_path / "run" / "last.pt").read_bytes() == before
    (folder / "README.md").write_text("what its makers say of it")
    folder.rename(tmp_path / "elsewhere")
    trainer.main(argv(tmp_path / "elsewhere"))
    whole, went_on = (torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("whole", "run"))
    assert all(torch.equal(value, went_on["model"][key]) for key, value in whole["model"].items())
    assert whole["clip_config"] == went_on["clip_config"] and whole["clip_config"]["mean"] == (0.5,) * 3


def test_a_run_whose_folders_are_gone_goes_on(corpus, tmp_path, monkeypatch):
    """last.pt has the weights, and knows how pictures are made; the tokenizer is asked for."""
    folder = clip_folder(corpus, tmp_path / "one", resize_mode="squash")
    argv = tiny.flags(corpus, tmp_path / "run", "--clip_model", folder, "--epochs", 1, "--select_on", "last",
                      "--resume", "auto", "--save_every", 1)
    broken_run(argv, monkeypatch)
    folder.rename(tmp_path / "gone")
    trainer.main(argv)
    assert "--clip_model: no longer there, and not needed" in (tmp_path / "run" / "log.txt").read_text()
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["clip_config"]["resize"] == "squash"


def test_a_run_goes_on_with_its_tokenizer_at_another_place_and_with_no_other(corpus, tmp_path, monkeypatch):
    def argv(tokenizer):
        return tiny.flags(corpus, tmp_path / "run", "--clip_model", corpus / "siglip.json", "--tokenizer", tokenizer,
                          "--epochs", 1, "--select_on", "last", "--resume", "auto", "--save_every", 1)

    broken_run(argv(corpus / "tokenizer"), monkeypatch)
    moved, other = (shutil.copytree(corpus / "tokenizer", tmp_path / name) for name in ("moved", "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="is another tokenizer than the one the model was trained with"):
        trainer.main(argv(other))
    trainer.main(argv(moved))


@pytest.mark.parametrize("of_other", [{"mean": (0.5,) * 3}, {"std": (0.3,) * 3}, {"resize_mode": "squash"}], ids=str)
def test_a_run_is_not_continued_with_another_tag_of_the_same_architecture(corpus, tmp_path, monkeypatch, of_other):
    path = clip_folder(corpus, tmp_path / "weights") / "open_clip_model.safetensors"
    tags = {"one": {"url": "here"}, "other": {"url": "here", **of_other}}
    monkeypatch.setattr(architectures, "get_pretrained_cfg", lambda name, tag: tags.get(tag))
    monkeypatch.setattr(architectures, "download_pretrained", lambda tag: str(path))

    def argv(tag):
        return tiny.flags(corpus, tmp_path / "run", "--clip_pretrained", tag, "--epochs", 1, "--select_on", "last",
                          "--resume", "auto", "--save_every", 1)

    broken_run(argv("one"), monkeypatch)
    with pytest.raises(SystemExit, match="--clip_pretrained one there, other here"):
        trainer.main(argv("other"))
    trainer.main(argv("one"))
    kept = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["clip_config"]
    assert (kept["mean"], kept["resize"]) == (tuple(tiny.clip.ClipConfig(**tiny.CLIP).mean), "shortest")


def test_more_words_than_the_text_tower_reads_are_refused(corpus, tmp_path):
    with pytest.raises(InputError, match="reads 24 tokens; say --max_words 24 or less"):
        build_model(trainer.parse_args(of(corpus, tmp_path, "siglip", "--max_words", 32)))


def test_without_its_tokenizer_a_run_is_refused_before_the_data_is_read(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **o: 1 / 0)
    argv = tiny.flags(corpus, tmp_path, "--clip_model", corpus / "siglip.json", "--data_dir", tmp_path / "nothing")
    with pytest.raises(InputError, match="tokenizer none cannot be read.*--tokenizer"):
        build_model(trainer.parse_args(argv))


def test_the_logit_scale_that_weights_came_with_is_kept(corpus, tmp_path):
    towers = load_towers(str(corpus / "siglip.json"))
    state = towers.state_dict() | {"logit_scale": torch.tensor([4.8]), "logit_bias": torch.tensor([-12.0])}
    torch.save(state, tmp_path / "siglip.pt")
    towers = load_towers(str(corpus / "siglip.json"), str(tmp_path / "siglip.pt"))
    towers.bound_scale()
    assert towers.logit_scale.item() == pytest.approx(4.8, abs=1e-6) and towers.config.scale_limit > 121
    with torch.no_grad():
        towers.logit_scale += 1
    towers.bound_scale()
    assert towers.logit_scale.item() == pytest.approx(4.8, abs=1e-6)


# ---- python -m narvid.towers ----


def said(capsys, *argv):
    towers_command.main(list(map(str, argv)))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [None, *tiny.OTHER_TOWERS])
def test_check_compares_with_open_clips_own_model(corpus, capsys, name):
    argv = ["check", corpus / f"{name or 'clip'}.json"]
    argv += ["--tokenizer", corpus / "tokenizer"] if name == "siglip" else []
    with pytest.raises(SystemExit) as left:
        said(capsys, *argv)
    out = capsys.readouterr().out
    assert not left.value.code and "D 64" in out and "s a frame on one core" in out
    assert out.count("cosine with open_clip's at least 1.0") + out.count("at least 0.9999") == 2, out


def test_check_says_what_is_not_open_clips(corpus, capsys, monkeypatch):
    whole = Towers.encode_frames
    monkeypatch.setattr(Towers, "encode_frames", lambda self, frames: whole(self, frames.flip(2)))
    with pytest.raises(SystemExit) as left:
        said(capsys, "check", corpus / "clip.json")
    out = capsys.readouterr().out
    assert left.value.code and "NOT open_clip's" in out


def test_check_without_the_tokenizer_looks_at_frames_alone(corpus, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **o: 1 / 0)
    with pytest.raises(SystemExit) as left:
        said(capsys, "check", corpus / "siglip.json")
    out = capsys.readouterr().out
    assert not left.value.code and "texts: not compared" in out and "--tokenizer" in out


def test_an_exported_folder_holds_its_tokenizer(corpus, tmp_path, monkeypatch):
    trainer.main(of(corpus, tmp_path / "run", "siglip", "--epochs", 1, "--select_on", "last"))
    model = Retriever.load(tmp_path / "run", device="cpu")
    model.save(tmp_path / "exported")
    texts = ["red turns blue", "a picture of green and white"]
    want = model.encode_queries(texts).eos
    (tmp_path / "exported").rename(tmp_path / "elsewhere")
    (corpus / "tokenizer").rename(tmp_path / "gone")
    try:
        again = Retriever.load(tmp_path / "elsewhere", device="cpu")
        assert torch.equal(again.encode_queries(texts).eos, want)
        again.save(tmp_path / "elsewhere")  # over itself
        assert torch.equal(Retriever.load(tmp_path / "elsewhere", device="cpu").encode_queries(texts).eos, want)
    finally:
        (tmp_path / "gone").rename(corpus / "tokenizer")


# ---- what saves time and memory ----


@pytest.mark.parametrize("name", tiny.OTHER_TOWERS)
def test_cached_features_and_checkpointed_blocks_change_no_loss(corpus, tmp_path, name):
    plain = of(corpus, tmp_path / "plain", name, "--select_on", "last", "--epochs", 1)
    trainer.main([*plain, "--freeze_towers"])
    trainer.main([*of(corpus, tmp_path / "cached", name, "--select_on", "last", "--epochs", 1), "--freeze_towers",
                  "--feature_cache", str(tmp_path / "cache")])
    assert tiny.losses(tmp_path / "cached") == pytest.approx(tiny.losses(tmp_path / "plain"), abs=2e-4)
    for more, folder in (([], "whole"), (["--grad_checkpointing"], "checkpointed")):
        trainer.main([*of(corpus, tmp_path / folder, name, "--select_on", "last", "--epochs", 1), *more])
    assert tiny.losses(tmp_path / "checkpointed") == pytest.approx(tiny.losses(tmp_path / "whole"), abs=2e-4)


def test_blocks_of_a_timm_tower_are_compiled_and_compute_the_same(corpus):
    torch._dynamo.reset()
    plain = load_towers(str(corpus / "timm.json")).eval()
    compiled = load_towers(str(corpus / "timm.json")).eval()
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled, torch.device("cpu"), backend="eager")
    assert len(plain.blocks()) == len(plain.visual.trunk.blocks) + 2
    frames = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens, _ = plain.tokenize(["a picture of red", "blue"], 32)
    with torch.no_grad():
        for ours, want in zip((compiled.encode_frames(frames), *compiled.encode_text(tokens)),
                              (plain.encode_frames(frames), *plain.encode_text(tokens))):
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


def test_towers_without_blocks_are_not_compiled(corpus, tmp_path):
    config = json.loads((corpus / "clip.json").read_text())
    config["vision_cfg"] = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear",
                            "image_size": 64}
    (tmp_path / "convnext.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="have no blocks that are alike; leave --compile out"):
        build_model(trainer.parse_args(tiny.flags(corpus, tmp_path, "--clip_model", tmp_path / "convnext.json",
                                                  "--compile")))

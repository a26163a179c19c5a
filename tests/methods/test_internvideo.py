"""The baseline InternVideo: both towers against reference_internvideo.py, its files, its padding, its presets, a run.

B queries, V videos, K frames, S tokens of a frame, C width of the image tower, D joint dimension.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import reference_internvideo as reference
import torch
import torch.nn.functional as F
import yaml
from open_clip import get_model_config

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid.run import optim
from narvid.methods.internvideo import InternVideo, Queries, Videos
from narvid.metrics import retrieval_metrics
from narvid.run.run_dir import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIDE, PATCH, WIDTH, DIM = 48, 16, 128, 64  # 3 x 3 patches, 2 heads
SIZES = clip.ClipConfig(
    DIM, {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": 5, "head_width": 64},
    {"context_length": 77, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2}, quick_gelu=True)


def make_model(**flags):
    torch.manual_seed(0)
    return InternVideo(clip.build_towers(SIZES), **flags).double().eval()


def block_shapes(prefix, width, norms=("ln_1", "ln_2")):
    """What a block of CLIP or of the decoder holds."""
    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
              "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
              "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
              "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def release_shapes(width, layers, patch, grid, dim, text_width, text_layers, words):
    """Every tensor of a released retrieval model, without its prefix "clip."."""
    visual, shapes = "visual.transformer", {
        "visual.conv1.weight": (width, 3, 1, patch, patch), "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + grid**2, width), "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,), "visual.transformer.temporal_cls_token": (1, 1, width),
        "visual.transformer.balance": (width,), "visual_ln_post.weight": (width,), "visual_ln_post.bias": (width,),
        "visual_proj": (width, dim), "token_embedding.weight": (words, text_width),
        "positional_embedding": (77, text_width), "ln_final.weight": (text_width,), "ln_final.bias": (text_width,),
        "text_projection": (text_width, dim), "text_mask_embedding": (1, 1, text_width), "logit_scale": ()}
    for i in range(layers):
        shapes |= block_shapes(f"{visual}.resblocks.{i}", width)
    for j in range(4):
        shapes |= block_shapes(f"{visual}.dec.{j}", width, ("ln_1", "ln_2", "ln_3"))
        shapes |= {f"{visual}.dpe.{j}.weight": (width, 1, 3, 3, 3), f"{visual}.dpe.{j}.bias": (width,)}
    for i in range(text_layers):
        shapes |= block_shapes(f"transformer.resblocks.{i}", text_width)
    return shapes


SMALL = dict(width=WIDTH, layers=5, patch=PATCH, grid=3, dim=DIM, text_width=64, text_layers=2, words=60)
LARGE = dict(width=1024, layers=24, patch=14, grid=16, dim=768, text_width=768, text_layers=12, words=49408)
BASE = dict(width=768, layers=12, patch=16, grid=14, dim=512, text_width=512, text_layers=12, words=49408)


@cache
def random_weights(**sizes):
    """Random weights, in fp32, under the release's names."""
    rng, state = np.random.RandomState(0), {}
    for key, shape in release_shapes(**SMALL | sizes).items():
        values = 0.12 * rng.standard_normal(shape)
        values += key.endswith("weight") and len(shape) == 1  # LayerNorm
        if "dpe" in key or "token" in key or "balance" in key:
            values = 5 * values
        state[key] = torch.tensor(values, dtype=torch.float32)
    return state


def released(prefix="", **sizes):
    return {prefix + key: value for key, value in random_weights(**sizes).items()}


def loaded(**flags):
    model = make_model(**flags)
    model.load_release(released("clip."), "file")
    return model


def as_numpy(state):
    return {key: value.double().numpy() for key, value in state.items()}


def batch(real, max_frames, seed=0):
    """Random videos of real[v] frames, rubbish where padded -> frames (V, K, 3, H, W) uint8, mask (V, K)."""
    rng = np.random.RandomState(seed)
    frames = torch.tensor(rng.randint(0, 256, (len(real), max_frames, 3, SIDE, SIDE)), dtype=torch.uint8)
    return frames, torch.arange(max_frames) < torch.tensor(real)[:, None]


# -------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("unmasked", [False, True])
def test_the_video_tower_is_the_loops(unmasked):
    """With padding masked a video is its real frames; as released, pictures of the mean colour stand behind them."""
    model, weights = loaded(unmasked_padding=unmasked), as_numpy(released())
    frames, mask = batch([2, 3], 3)
    got = model.encode_videos(frames, mask).video
    mean, std = (np.array(x).reshape(3, 1, 1) for x in (SIZES.mean, SIZES.std))
    pictures = (frames.double().numpy() / 255 - mean) / std * mask.numpy()[:, :, None, None, None]
    for v, real in enumerate((2, 3)):
        want = reference.video(pictures[v] if unmasked else pictures[v, :real], weights)
        np.testing.assert_allclose(got[v].detach().numpy(), want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_the_text_tower_is_the_loops_over_all_77_positions_and_may_be_cut():
    """Causal attention: the end token's feature does not see what follows it."""
    model, weights = loaded(), as_numpy(released())
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[0, :5] = torch.tensor([58, 7, 3, 20, 59])
    tokens[1, :3] = torch.tensor([58, 11, 59])
    whole, cut = (model.encode_queries(x, x > 0).eos.detach() for x in (tokens, tokens[:, :5]))
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-12)
    want = np.stack([reference.sentence(row, weights) for row in tokens.numpy()])
    np.testing.assert_allclose(whole.numpy(), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_before_training_the_decoder_says_what_clip_says():
    """Token and balance 0, every layer the identity: last LayerNorm and projection of the mean class token."""
    model = make_model()
    frames, mask = batch([3, 1], 3)
    visual, decoder = model.clip.visual, model.decoder
    assert sum(p.abs().sum() for p in (decoder.token, decoder.balance)) == 0
    pixels = (frames.double() - model.clip.pixel_mean) / model.clip.pixel_std
    for v, real in enumerate((3, 1)):
        mean = visual.transformer(visual._embeds(pixels[v, :real]))[:, 0].mean(dim=0)
        got = model.encode_videos(frames, mask).video[v]
        torch.testing.assert_close(got, decoder.ln_post(mean) @ decoder.proj, rtol=1e-3, atol=1e-4)
    assert all((layer.dpe.weight != 0).all() and (layer.dpe.bias == 0).all() for layer in decoder.layers)


def test_the_loss_is_symmetric_cross_entropy_and_the_score_the_cosine():
    rng = np.random.RandomState(1)
    eos, video = rng.standard_normal((4, DIM)), rng.standard_normal((4, DIM))
    model = make_model()
    similarity = model.score(Queries(torch.tensor(eos)), Videos(torch.tensor(3 * video)))
    logits, want = np.zeros((4, 4)), 0.0
    for i in range(4):
        for j in range(4):
            cosine = eos[i] @ video[j] / np.linalg.norm(eos[i]) / np.linalg.norm(video[j])
            assert similarity["video"][i, j].item() == pytest.approx(cosine, abs=1e-12)
            logits[i, j] = 20 * cosine
    for i in range(4):
        want -= (2 * logits[i, i] - np.log(np.exp(logits[i]).sum()) - np.log(np.exp(logits[:, i]).sum())) / 8
    parts = model.loss(similarity, torch.tensor(20.0, dtype=torch.float64), None)
    assert list(parts) == ["nce_video"] and parts["nce_video"].item() == pytest.approx(want)
    assert list(similarity) == list(model.views(None))


# ------------------------------------------------------------------------------------------------------- properties


def test_padding_changes_nothing_unless_it_is_asked_to():
    frames, mask = batch([2, 1, 3], 3)
    longer = torch.cat([frames, 255 - frames[:, :2]], dim=1)
    longer_mask = F.pad(mask, (0, 2))
    for unmasked in (False, True):
        model = loaded(unmasked_padding=unmasked)
        short, long = model.encode_videos(frames, mask).video, model.encode_videos(longer, longer_mask).video
        assert ((short - long).abs().max() < 1e-9) == (not unmasked)
        rubbish = torch.where(mask[..., None, None, None], frames, 255 - frames)
        assert (model.encode_videos(rubbish, mask).video - short).abs().max() < 1e-12


def test_videos_are_encoded_each_by_itself():
    model = loaded()
    frames, mask = batch([2, 1, 3], 3)
    videos, order = model.encode_videos(frames, mask), torch.tensor([2, 0, 1])
    shuffled = model.encode_videos(frames[order], mask[order])
    torch.testing.assert_close(shuffled.video, videos.video[order], rtol=0, atol=1e-10)
    queries = Queries(torch.randn(5, DIM, dtype=torch.float64))
    scores = model.score(queries, videos)["video"]
    assert scores.shape == (5, 3)  # more queries than videos
    torch.testing.assert_close(model.score(queries, shuffled)["video"], scores[:, order], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.score(Queries(queries.eos[:1]), videos)["video"], scores[:1], rtol=0, atol=1e-12)


def test_the_convolution_alone_tells_the_order_of_frames():
    model = loaded()
    frames, mask = batch([3], 3)
    there, back = (model.encode_videos(x, mask).video for x in (frames, frames[:, [1, 2, 0]]))
    assert (there - back).abs().max() > 1e-3
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.dpe.weight)
    there, back = (model.encode_videos(x, mask).video for x in (frames, frames[:, [1, 2, 0]]))
    assert (there - back).abs().max() < 1e-10


@pytest.mark.parametrize("freeze_output", [False, True])
def test_what_is_trained_gets_a_gradient_and_nothing_else_does(freeze_output):
    model = loaded(freeze_output=freeze_output).train()
    optim.freeze(model.clip, 0)
    frames, mask = batch([2, 1], 2)
    tokens = torch.tensor([[58, 4, 59], [58, 9, 59]])
    queries, videos, scale = model(tokens, tokens > 0, frames, mask, None, None, None)
    sum(model.loss(model.score(queries, videos), scale, None).values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (name in trained), name
    output = {f"decoder.{name}" for name in ("proj", "ln_post.weight", "ln_post.bias", "token", "balance")}
    assert (trained & output == set()) if freeze_output else output <= trained
    assert {"decoder.layers.0.dpe.weight", "decoder.layers.3.mlp.c_proj.bias", "clip.text_projection",
            "clip.logit_scale", "clip.visual.transformer.resblocks.0.attn.in_proj_weight"} <= trained


def test_gradient_checkpointing_changes_no_gradient():
    frames, mask = batch([2, 1], 2)
    gradients = []
    for checkpointing in (False, True):
        model = loaded().train()
        optim.freeze(model.clip, 0)
        model.clip.set_grad_checkpointing(checkpointing)
        calls = []
        last = model.clip.visual.transformer.resblocks[-1]
        handle = last.register_forward_pre_hook(lambda *_: calls.append(1))
        model.encode_videos(frames, mask).video.square().sum().backward()
        handle.remove()
        assert len(calls) == 1 + checkpointing  # the blocks that feed the decoder run anew too
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_half_precision_towers_give_fp32_features_near_the_exact_ones():
    """Recipe reported: the towers in fp16, the decoder never; and bf16 autocast."""
    model = loaded()
    frames, mask = batch([2, 3], 3)
    exact = F.normalize(model.encode_videos(frames, mask).video.float())
    half = InternVideo(clip.build_towers(SIZES, half=True)).eval()
    half.load_release(released(), "file")
    with torch.autocast("cpu", torch.bfloat16):
        parts = [half.encode_videos(frames, mask).video]
    optim.to_half(half.clip)
    parts.append(half.encode_videos(frames, mask).video)
    for got in parts:
        assert got.dtype == torch.float32
        assert (F.normalize(got) * exact).sum(dim=1).min() > 0.99


def test_random_features_retrieve_at_chance():
    model, generator = make_model(), torch.Generator().manual_seed(0)
    hits = [retrieval_metrics(model.score(*(kind(torch.randn(20, 8, generator=generator)) for kind in (Queries, Videos))
                                          )["video"].numpy(), np.arange(20))["text_to_video"]["R@1"]
            for _ in range(200)]
    assert np.mean(hits) == pytest.approx(100 / 20, abs=1.2)  # 4,000 draws: standard error 0.35


# --------------------------------------------------------------------------------------------------- released files


@pytest.mark.parametrize(("name", "sizes", "tensors", "millions"),
                         [("ViT-L-14", LARGE, 513, 478.1), ("ViT-B-16", BASE, 369, 178.1)])
def test_the_whole_table_of_released_weights_fits(name, sizes, tensors, millions):
    """Counts as of the released files. No memory: everything on the meta device."""
    config = get_model_config(name)
    with torch.device("meta"):
        state = {f"clip.{key}": torch.empty(shape) for key, shape in release_shapes(**sizes).items()}
        config = clip.ClipConfig(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=True)
        model = InternVideo(clip.build_towers(config))
        model.load_release(state, "file")
    assert len(state) == tensors == 1 + len(model.state_dict())
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    decoder = sum(p.numel() for p in model.decoder.layers.parameters()) / 1e6
    assert decoder == pytest.approx({"ViT-L-14": 50.5, "ViT-B-16": 28.4}[name], abs=0.05)


def as_pretrained():
    """The pre-training's file: names of its own, other heads besides, all below "state_dict"."""
    state = released("module.clip.")
    for old, new in (("visual_proj", "visual.proj"), ("visual_ln_post", "visual.ln_post")):
        state = {key.replace(old, new): value for key, value in state.items()}
    state["caption_head.clip.weight"] = torch.ones(3)
    return {"state_dict": state, "epoch": 3}


def test_both_formats_load_from_disk_to_the_same_model(tmp_path):
    want = loaded().state_dict()
    for name, content in (("fine-tuned.bin", released("clip.")), ("pretrained.ckpt", as_pretrained()),
                          ("bare.bin", released())):
        torch.save(content, tmp_path / name)
        model = make_model()
        model.load_release(load_checkpoint(tmp_path / name), name)
        got = model.state_dict()
        assert all(torch.equal(got[key], want[key]) for key in want), name
    file = released()
    assert torch.equal(want["clip.visual.conv1.weight"], file["visual.conv1.weight"][:, :, 0].double())
    assert torch.equal(want["decoder.layers.2.ln_3.bias"], file["visual.transformer.dec.2.ln_3.bias"].double())
    assert torch.equal(want["decoder.layers.1.dpe.bias"], file["visual.transformer.dpe.1.bias"].double())


def test_averaging_with_clip_leaves_out_what_clip_does_not_call_so():
    model = make_model(merge_clip=0.25)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_release(as_pretrained(), "file")
    plain, after = loaded().state_dict(), model.state_dict()
    for key, value in after.items():
        want = 0.25 * before[key] + 0.75 * plain[key] if key.startswith("clip.") else plain[key]
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6, msg=key)
    kept = {"decoder.proj", "decoder.ln_post.weight", "decoder.token", "decoder.layers.0.dpe.weight"}
    assert all(torch.equal(after[key], plain[key]) for key in kept)
    assert not torch.equal(after["clip.logit_scale"], plain["clip.logit_scale"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("clip.visual.transformer.dec.1.ln_3.bias"), ["1 are missing", "layers.1.ln_3.bias"]),
        (lambda s: s.pop("clip.visual.transformer.temporal_cls_token"), ["not the weights", "temporal_cls_token"]),
        (lambda s: s.pop("clip.visual_proj"), ["not the weights of InternVideo", "visual_proj"]),
        (lambda s: s.update({"clip.visual.transformer.dec.4.ln_1.bias": torch.ones(WIDTH)}), ["1 are not known"]),
        (lambda s: s.update({"head.weight": torch.ones(1)}), ["head.weight", "1 are not known"]),
        (lambda s: s.update({"clip.visual.positional_embedding": torch.ones(5, WIDTH)}), ["another shape", "(5, "]),
        (lambda s: s.update(released("clip.", patch=32)), ["B/32"]),
        (lambda s: s.update(released("clip.", patch=8)), ["patches of 8", "ViT-L-14"]),
        (lambda s: s.update(released("clip.", dim=32)), ["joint dimension 32"]),
        (lambda s: s.update({"epoch": 3}), ["state dict of tensors"]),
    ])
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(change, words):
    state = released("clip.")
    change(state)
    with pytest.raises(ValueError) as refused:
        make_model().load_release(state, "some.bin")
    message = str(refused.value)
    assert message.startswith("some.bin: ") and "\n" not in message
    assert all(word in message for word in words), message


# -------------------------------------------------------------------------------------------------- presets, a run

FINE_TUNED = {  # frames, batch, epochs, rate, weight of CLIP
    "msrvtt": (12, 128, 5, 4e-6, 0.0), "msvd": (8, 64, 5, 2.5e-6, 0.0), "lsmdc": (8, 64, 5, 2e-6, 0.5),
    "didemo": (32, 16, 5, 2e-6, 0.0), "vatex": (8, 128, 5, 5e-6, 0.0), "activitynet": (64, 64, 30, 2e-6, 0.0)}
ZERO_SHOT = {"msrvtt": (8, 0.5), "msvd": (12, 0.25), "lsmdc": (6, 0.5), "didemo": (32, 0.0), "activitynet": (16, 0.5),
             "vatex": (8, 0.5)}


@pytest.mark.parametrize("corpus_name", FINE_TUNED)
def test_presets_carry_the_releases_values(corpus_name):
    frames, batch_size, epochs, rate, merge = FINE_TUNED[corpus_name]
    both = {"method": "internvideo", "data_dir": f"data/{corpus_name}", "clip_model": "ViT-L-14", "max_words": 77,
            "dsl_scale": 100, "unmasked_padding": True, "precision": "fp32"}
    fine_tuned = both | {
        "max_frames": frames, "batch_size": batch_size, "epochs": epochs, "lr": rate, "clip_lr": rate,
        "merge_clip": merge, "freeze_output": True, "freeze_layers": 0, "grad_checkpointing": True, "warmup": 0.1,
        "weight_decay": 0.2}
    frames, merge = ZERO_SHOT[corpus_name]
    zero_shot = both | {"max_frames": frames, "merge_clip": merge}
    for name, want in ((f"internvideo_{corpus_name}", fine_tuned), (f"internvideo_zeroshot_{corpus_name}", zero_shot)):
        path = ROOT / "configs" / f"{name}.yaml"
        args = trainer.parse_args(["--config", str(path), "--output_dir", "out", "--select_on", "last"])
        assert {key: getattr(args, key) for key in want} == want
        assert want.keys() <= yaml.safe_load(path.read_text()).keys()
        assert "R@1" in path.read_text() and f"--config configs/{name}.yaml" in path.read_text()


def test_it_trains_and_its_best_checkpoint_evaluates_to_the_same_numbers(corpus, tmp_path):
    argv = [str(x) for x in (
        "--method", "internvideo", "--data_dir", corpus, "--clip_model", corpus / "clip.json", "--max_frames", 6,
        "--num_workers", 0, "--precision", "fp32", "--epochs", 1, "--batch_size", 16, "--lr", 1e-3, "--clip_lr", 1e-3,
        "--eval_batch_size", 5, "--freeze_output", "--grad_checkpointing", "--select_on", "last")]
    returned = trainer.main([*argv, "--output_dir", str(tmp_path / "run")])
    assert list(returned) == ["S_qv"]
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    again = trainer.main(["--eval_only", "--checkpoint", str(tmp_path / "run" / "best.pt"), "--data_dir", str(corpus),
                          "--num_workers", "0", "--eval_batch_size", "5", "--output_dir", str(tmp_path / "again")])
    assert again == returned
    trained = best["model"]
    assert trained["decoder.layers.0.attn.out_proj.weight"].abs().max() > 0  # it was zero
    assert trained["decoder.token"].abs().max() == 0 and trained["decoder.balance"].abs().max() == 0  # frozen

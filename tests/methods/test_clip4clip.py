"""narvid.methods.clip4clip: its four heads and its 3-d patches against reference_clip4clip.py, with the release's
keys, from pixels and words to scores; then through the trainer.

B queries, V videos, K frames, D joint dimension; masks True = real.
"""

import functools

import numpy as np
import pytest
import reference
import reference_clip4clip as slow
import tiny
import torch

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid import InputError
from narvid.run import optim
from narvid.methods.clip4clip import HEADS, CLIP4Clip, Queries, mean_pool
from narvid.metrics import retrieval_metrics
from narvid.model import NarVid, NarVidConfig
from narvid.similarity import match

D, K, LAYERS = 64, 4, 2
CONFIG = clip.ClipConfig(D, tiny.WIDE["vision_cfg"], {**tiny.WIDE["text_cfg"], "vocab_size": 50}, quick_gelu=True)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)  # (5, K)
TOKENS = torch.tensor([[48, 3, 49, 0, 0], [48, 7, 7, 12, 49], [48, 49, 0, 0, 0]])  # 49 ends; (3, 5)
FRAMES = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (5, K, 3, 32, 32)).astype(np.uint8))
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)


def build(head, linear_patch="2d", normalize_frames=True):
    """The head over fresh towers, as the trainer builds it."""
    torch.manual_seed(0)
    return CLIP4Clip(clip.build_towers(CONFIG), head=head, temporal_layers=LAYERS, linear_patch=linear_patch,
                     normalize_frames=normalize_frames)


@functools.cache
def released(head, linear_patch="2d"):
    """A random state dict with exactly the keys of a checkpoint of CLIP4Clip's own code."""
    rng = np.random.RandomState(0)
    state = {}

    def put(name, *shape, around=0.0):
        state[name] = torch.tensor(around + 0.1 * rng.standard_normal(shape), dtype=torch.float32)

    def put_layers(name, **shapes):
        for layer, shape in shapes.items():
            put(f"{name}{layer}.weight", *shape, around=float(len(shape) == 1))
            put(f"{name}{layer}.bias", shape[0])

    for name, value in clip.build_towers(CONFIG).state_dict().items():
        put(f"clip.{name}", *value.shape, around=float(value.ndim == 1 and name.endswith("weight")))
    if linear_patch == "3d":
        put("clip.visual.conv2.weight", 64, 3, 3, 16, 16)
    if head.startswith("seq"):
        put("frame_position_embeddings.weight", 77, D)
    if head == "seqLSTM":
        for name in ("ih", "hh"):
            put(f"lstm_visual.weight_{name}_l0", 4 * D, D)
            put(f"lstm_visual.bias_{name}_l0", 4 * D)
    if head == "tightTransf":
        put("cross.embeddings.position_embeddings.weight", 77, D)
        put_layers("cross.pooler.", ln_pool=(D,), dense=(D, D))
        put_layers("", similarity_dense=(1, D))
    for i in range(LAYERS if head.endswith("Transf") else 0):
        block = f"{'cross.transformer' if head == 'tightTransf' else 'transformerClip'}.resblocks.{i}."
        put(f"{block}attn.in_proj_weight", 3 * D, D)
        put(f"{block}attn.in_proj_bias", 3 * D)
        put_layers(f"{block}attn.", out_proj=(D, D))
        put_layers(block, ln_1=(D,), ln_2=(D,))
        put_layers(f"{block}mlp.", c_fc=(4 * D, D), c_proj=(D, 4 * D))
    return state


def from_release(head, linear_patch="2d", normalize_frames=True):
    """The model with those weights, in float64 and without dropout, and the state as numpy has it."""
    state = released(head, linear_patch)
    model = build(head, linear_patch, normalize_frames).double().eval()
    model.load_release(state, "release.bin")
    return model, {key: value.double().numpy() for key, value in state.items()}


@torch.no_grad()
def scores(model, frames=FRAMES, mask=MASK, tokens=TOKENS, block=None):
    """(B, V) as evaluation computes it."""
    queries = model.encode_queries(tokens, tokens > 0)
    return model.score(queries, model.encode_videos(frames, mask, None, None, None), block=block)["video"]


# ---------------------------------------------------------------------------------------------------------- the maths


@pytest.fixture(scope="module")
def clip_features():
    """What numpy makes of pixels and tokens with the release's towers: (3, D) and (5, K, D)."""
    state = {key.removeprefix("clip."): value.double().numpy() for key, value in released("meanP").items()}
    mean, std = (255 * np.array(x, np.float32)[:, None, None] for x in (CONFIG.mean, CONFIG.std))  # as the towers hold
    eos = np.array([reference.clip_text(state, tokens)[0] for tokens in TOKENS.tolist()])
    frames = np.zeros((*MASK.shape, D))
    for v, k in MASK.nonzero().tolist():
        frames[v, k] = reference.clip_image(state, (FRAMES[v, k].numpy() - mean.astype(float)) / std)
    return eos, frames


@pytest.mark.parametrize("head, normalize", [*((head, True) for head in HEADS), ("meanP", False)])
def test_every_query_with_every_video_scores_as_in_numpy(clip_features, head, normalize):
    model, state = from_release(head, normalize_frames=normalize)
    eos, frames = clip_features
    want = [[slow.score(state, head, query, frames[v], MASK[v].numpy(), normalize=normalize) for v in range(len(MASK))]
            for query in eos]
    got = scores(model)
    assert got.shape == (3, 5)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    assert got.std() > 1e-4  # weights that tell videos apart


def test_3d_patches_are_a_convolution_over_the_real_frames():
    model, state = from_release("meanP", "3d")
    seen = []
    model.clip.visual.conv1.register_forward_hook(lambda module, given, out: seen.append(out))
    scores(model)
    pixels = ((FRAMES - model.clip.pixel_mean) / model.clip.pixel_std).double().numpy()
    kernel = state["clip.visual.conv2.weight"]
    want = [slow.conv3d(kernel, video, mask.numpy())[mask.numpy()] for video, mask in zip(pixels, MASK)]
    np.testing.assert_allclose(seen[0], np.concatenate(want), rtol=1e-9, atol=1e-9)


@EVERY_HEAD
def test_3d_starts_as_2d_and_its_kernel_is_trained(head):
    flat, deep = build(head).eval(), build(head, "3d").eval()
    deep.load_state_dict({k: v for k, v in flat.state_dict().items() if "visual.conv" not in k}, strict=False)
    torch.testing.assert_close(scores(deep), scores(flat), rtol=1e-5, atol=1e-6)
    optim.freeze(deep.clip, 0)
    trained = {name for name, p in deep.named_parameters() if p.requires_grad and "visual.conv" in name}
    assert trained == {"clip.visual.conv2.weight"} and not any("conv1" in name for name, _ in deep.named_parameters())


def test_the_first_row_of_table_3_is_seqtransf():
    """NarVid without a module, from the same weights, scores the same."""
    model, _ = from_release("seqTransf")
    narvid = NarVid(model.clip, NarVidConfig(D, (), temporal_layers=LAYERS)).double().eval()
    narvid.heads.temporal_frames.load_state_dict(model.temporal.state_dict())
    with torch.no_grad():
        queries, videos, _ = narvid(TOKENS, TOKENS > 0, FRAMES, MASK, None, None, None)
    want = match(queries, videos, method="uniform", fine=False)
    assert want.keys() == {"video"} and want["video"].std() > 1e-4
    torch.testing.assert_close(scores(model), want["video"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head, encoder", [("seqTransf", "temporal"), ("tightTransf", "pairs.encoder")])
def test_transformers_start_from_the_text_tower(head, encoder):
    model = build(head)
    mine, text = model.get_submodule(encoder), model.clip
    assert torch.equal(mine.positions, text.positional_embedding)
    for block, of_text in zip(mine.blocks, text.transformer.resblocks, strict=True):
        assert all(torch.equal(x, of_text.state_dict()[name]) for name, x in block.state_dict().items())


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("head, linear_patch", [*((head, "2d") for head in HEADS), ("meanP", "3d")])
def test_padding_changes_nothing_and_videos_do_not_see_each_other(head, linear_patch):
    model, _ = from_release(head, linear_patch)
    expected = scores(model)
    noise = FRAMES.flip(0)
    padded = torch.where(MASK[:, :, None, None, None], FRAMES, noise)  # other pixels where there is no frame
    longer = torch.cat([padded, noise], dim=1), torch.cat([MASK, torch.zeros_like(MASK)], dim=1)
    torch.testing.assert_close(scores(model, *longer), expected, rtol=1e-9, atol=1e-9)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(scores(model, FRAMES[order], MASK[order]), expected[:, order], rtol=1e-9, atol=1e-9)
    one = torch.cat([scores(model, FRAMES[v:v + 1], MASK[v:v + 1], TOKENS[1:2]) for v in range(5)], dim=1)
    torch.testing.assert_close(one, expected[1:2], rtol=1e-9, atol=1e-9)


@EVERY_HEAD
def test_order_of_frames_matters_to_all_heads_but_the_mean(head):
    model, _ = from_release(head)
    turned, full = scores(model, FRAMES.flip(1), MASK[[0] * 5]), scores(model, FRAMES, MASK[[0] * 5])
    assert ((turned - full).abs().max() < 1e-9) == (head == "meanP")


@pytest.mark.parametrize("block", [2, 4])
def test_tiles_change_neither_logits_nor_gradients(block):
    model, _ = from_release("tightTransf")
    torch.testing.assert_close(scores(model, block=block), scores(model), rtol=1e-9, atol=1e-9)
    gradients = []
    for side in (block, None):
        queries, videos, _ = model(TOKENS, TOKENS > 0, FRAMES, MASK)
        model.zero_grad()
        model.score(queries, videos, block=side)["video"].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters())) - 1  # all but the logit scale
    for mine, whole in zip(*gradients):
        torch.testing.assert_close(mine, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("linear_patch", ["2d", "3d"])
@EVERY_HEAD
def test_every_parameter_learns(head, linear_patch):
    model, _ = from_release(head, linear_patch)
    optim.freeze(model.clip, -1)
    queries, videos, scale = model.train()(TOKENS, TOKENS > 0, FRAMES[:3], MASK[:3], None, None, None)
    sum(model.loss(model.score(queries, videos), scale, None).values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    still = {name for name, g in gradients.items() if g.abs().max() < 1e-9}
    # Logits have no scale, and a bias added to all of them moves no softmax.
    assert still == ({"clip.logit_scale", "pairs.logit.bias"} if head == "tightTransf" else set())


@EVERY_HEAD
def test_the_loss_is_cross_entropy_of_scaled_cosines_or_of_bare_logits(head):
    rng = np.random.default_rng(0)
    s, exclude = rng.uniform(-1, 1, (4, 4)), np.zeros((4, 4), bool)
    exclude[0, 2] = exclude[2, 0] = True
    parts = build(head).loss({"video": torch.tensor(s)}, torch.tensor(7.3, dtype=torch.float64), torch.tensor(exclude))
    want = reference.nce(s, 1.0 if head == "tightTransf" else 7.3, exclude)
    assert {name: value.item() for name, value in parts.items()} == {"nce_video": pytest.approx(want, rel=1e-9)}


@EVERY_HEAD
def test_random_features_are_found_by_chance(head):
    """Of V = 10 videos the right one is first in a tenth of all cases: nothing tells the score which it is."""
    model, _ = from_release(head)
    rng = torch.Generator().manual_seed(0)
    found = []
    with torch.no_grad():
        for _ in range(40):
            real = torch.arange(K) < torch.randint(1, K + 1, (10, 1), generator=rng)
            noise = torch.randn(int(real.sum()), D, generator=rng, dtype=torch.float64)
            model._encode_frames = lambda frames, mask, noise=noise: noise
            videos = model.encode_videos(FRAMES, real)
            queries = Queries(torch.randn(10, D, generator=rng, dtype=torch.float64))
            s = model.score(queries, videos)["video"]
            found.append(retrieval_metrics(s.numpy(), np.arange(10))["text_to_video"]["R@1"])
    assert 5.5 < np.mean(found) < 14.5  # 400 trials: 10 +- 1.5


def test_a_video_without_one_real_frame_scores_nothing_and_breaks_nothing():
    for normalize in (True, False):
        pooled = mean_pool(torch.randn(2, K, D), torch.tensor([[True] * K, [False] * K]), normalize=normalize)
        assert pooled[1].abs().max() == 0 and pooled[0].norm().item() == pytest.approx(1, rel=1e-5)
    for head in HEADS:
        model, _ = from_release(head)
        assert scores(model, FRAMES[:2], MASK[:2] & torch.tensor([[True], [False]])).isfinite().all()


def test_dropout_is_tighttransfs_and_of_training_alone():
    for head in HEADS:
        model, _ = from_release(head)
        assert torch.equal(scores(model), scores(model))
        model.train()
        assert torch.equal(scores(model), scores(model)) == (head != "tightTransf")


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_sentence():
    model, _ = from_release("tightTransf")
    with pytest.raises(InputError, match="--max_frames 77: --head tightTransf has 77 positions"):
        model.encode_videos(FRAMES, torch.ones(5, 77, dtype=torch.bool))
    with pytest.raises(ValueError, match="release.bin: weights of another model: 31 are missing.*pairs"):
        model.load_release(released("meanP"), "release.bin")
    with pytest.raises(ValueError, match="release.bin: weights of another model: 0 are missing.*31 are not known"):
        build("meanP").load_release(released("tightTransf"), "release.bin")
    narrow = clip.ClipConfig(32, CONFIG.vision_cfg, CONFIG.text_cfg)
    with pytest.raises(ValueError, match="--head seqTransf: the joint dimension must be a multiple of 64"):
        CLIP4Clip(clip.build_towers(narrow), head="seqTransf", temporal_layers=1, linear_patch="2d",
                  normalize_frames=True)


def test_a_checkpoint_of_mmaction2_holds_the_towers_alone_under_state_dict():
    state = released("meanP")
    model = build("meanP", normalize_frames=False)
    model.load_release({"meta": {"epoch": 5}, "state_dict": state}, "mmaction2.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------- the trainer


@pytest.mark.parametrize("more", [
    ["--head", "tightTransf", "--linear_patch", "3d", "--recipe", "reported"],
    ["--head", "seqLSTM", "--precision", "bf16", "--no-normalize_frames", "--dsl_scale", "20"],
], ids=lambda more: more[1])
def test_a_run_trains_and_its_checkpoint_alone_says_how_to_evaluate_it(corpus, tmp_path, more):
    run = tmp_path / "run"
    returned = trainer.main(tiny.flags(corpus, run, "--method", "clip4clip", "--epochs", 1, "--narrations", "nowhere",
                                       *more))
    assert list(returned) == ["S_qv"] and np.isfinite(tiny.losses(run)).all()
    again = trainer.main(["--eval_only", "--checkpoint", str(run / "best.pt"), "--data_dir", str(corpus),
                          "--num_workers", "0", "--output_dir", str(tmp_path / "again"), "--eval_batch_size", "5"])
    assert again == returned

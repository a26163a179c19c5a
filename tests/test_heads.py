"""narvid.model's heads, loaded from the keys of a released checkpoint, against reference.py: co-attention (Eq. 2),
temporal encoders (Eq. 3), word weights (App. A).

V videos, K frames and sentences, D joint dimension; masks True = real. What padded slots hold afterwards is nobody's
business, so outputs are compared on real slots.
"""

import numpy as np
import pytest
import reference
import torch

from narvid.model import heads_from_release

CO_ATTENTION = "co_connetion_transformer_model_block.0"


def released(D, seed=0):
    """A random state dict with exactly the keys of a released checkpoint, those that nothing uses among them."""
    rng = np.random.default_rng(seed)
    state = {}

    def put(name, *shape, around=0.0, spread=0.1):
        state[name] = torch.tensor(around + spread * rng.normal(size=shape), dtype=torch.float32)

    def put_linear(name, inside=D, outside=D):
        put(f"{name}.weight", outside, inside)
        put(f"{name}.bias", outside)

    def put_norm(name):
        put(f"{name}.weight", D, around=1.0)
        put(f"{name}.bias", D)

    def put_block(name):
        put(f"{name}.attn.in_proj_weight", 3 * D, D)
        put(f"{name}.attn.in_proj_bias", 3 * D)
        put_linear(f"{name}.attn.out_proj")
        put_norm(f"{name}.ln_1")
        put_norm(f"{name}.ln_2")
        put_linear(f"{name}.mlp.c_fc", D, 4 * D)
        put_linear(f"{name}.mlp.c_proj", 4 * D, D)

    put("clip.logit_scale")
    put("clip.positional_embedding", 77, 2 * D)
    put("clip.text_projection", 2 * D, D)
    put("clip.visual.proj", 3 * D, D)
    put("clip.visual.conv1.weight", 3 * D, 3, 4, 4)
    for stream in "12":
        for role in ("query", "key", "value"):
            put_linear(f"{CO_ATTENTION}.biattention.{role}{stream}")
        put_linear(f"{CO_ATTENTION}.biOutput.dense{stream}")
        put_linear(f"{CO_ATTENTION}.biOutput.q_dense{stream}")
        put_norm(f"{CO_ATTENTION}.biOutput.LayerNorm{stream}")
    for stream in "vt":
        put_linear(f"{CO_ATTENTION}.{stream}_intermediate.dense")
        put_linear(f"{CO_ATTENTION}.{stream}_output.dense")
        put_norm(f"{CO_ATTENTION}.{stream}_output.LayerNorm")
    put("frame_position_embeddings.weight", 77, D)
    put("caption_position_embeddings.weight", 77, D)
    for i in range(4):
        put_block(f"transformerClip.resblocks.{i}")
        put_block(f"transformerCaption.resblocks.{i}")
    for name in ("text_weight_fc", "video_weight_fc", "caption_weight_fc"):
        put_linear(f"{name}.0")
        put_linear(f"{name}.2", D, 1)
    return state


def make(D, seed=0, V=4, K=5):
    """Features of V videos with padding at their ends and sentences missing in between."""
    rng = np.random.default_rng(seed)
    mask = np.arange(K) < np.array([K, 3, 1, 4])[:V, None]
    narration_mask = mask.copy()
    narration_mask[0, [1, 3]] = False
    narration_mask[3, 0] = False
    features = [torch.tensor(rng.normal(size=(V, K, D)), dtype=torch.float64) for _ in range(2)]
    return *features, torch.tensor(mask), torch.tensor(narration_mask)


def plain(state):
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def assert_real_slots(got, want, mask, tolerance):
    got = got.detach().double().numpy()
    for v in range(len(mask)):
        real = mask[v].numpy()
        np.testing.assert_allclose(got[v][real], want[v][real], rtol=tolerance, atol=tolerance)


# float32: LayerNorms over activations of size 10 and more lose some 1e-6 of their size in every block
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
SIZES = pytest.mark.parametrize("D", [64, 128])


@SIZES
@PRECISIONS
@pytest.mark.parametrize("step", ["co_attend", "enhance"])
def test_co_attention_and_temporal_encoders(step, dtype, tolerance, D):
    state = released(D)
    heads = heads_from_release(state).to(dtype)
    frames, narration, mask, narration_mask = make(D)
    frames, narration = frames.to(dtype), narration.to(dtype)
    with torch.no_grad():
        got = getattr(heads, step)(frames, narration, mask, narration_mask)
    one_video = {"co_attend": reference.co_attention, "enhance": reference.enhance}[step]
    weights = plain(state)
    want = [
        one_video(weights, *(x[v].double().numpy() for x in (frames, narration)), mask[v], narration_mask[v])
        for v in range(len(mask))
    ]
    assert_real_slots(got[0], [w[0] for w in want], mask, tolerance)
    assert_real_slots(got[1], [w[1] for w in want], narration_mask, tolerance)
    if step == "enhance":
        assert torch.equal(got.mask, mask) and torch.equal(got.narration_mask, narration_mask)


@SIZES
@PRECISIONS
def test_word_weights(dtype, tolerance, D):
    state = released(D)
    heads = heads_from_release(state).to(dtype)
    rng = np.random.default_rng(1)
    words = torch.tensor(rng.normal(size=(4, 7, D)), dtype=dtype)
    word_mask = torch.tensor(np.arange(7) < np.array([7, 2, 5, 1])[:, None])
    with torch.no_grad():
        got = heads.word_weights(words, word_mask)
    want = [reference.word_weights(plain(state), words[b].double().numpy(), word_mask[b].numpy()) for b in range(4)]
    np.testing.assert_allclose(got.double().numpy(), np.array(want), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.sum(1), torch.ones(4, dtype=dtype), rtol=1e-6, atol=1e-6)


def test_heads_come_in_eval_mode_and_repeat_themselves():
    heads = heads_from_release(released(64)).double()
    assert not heads.training
    inputs = make(64)
    for first, second in zip(heads.enhance(*inputs), heads.enhance(*inputs)):
        assert torch.equal(first, second)


def test_a_second_release_gives_other_features():
    """The weights really come from the state dict: two of them, two answers."""
    inputs = make(64)
    first, second = (heads_from_release(released(64, seed)).double() for seed in (0, 1))
    assert (first.co_attend(*inputs)[0] - second.co_attend(*inputs)[0]).abs().max() > 0.1
    assert (first.enhance(*inputs).frames - second.enhance(*inputs).frames).abs().max() > 0.1


@pytest.mark.parametrize("step", ["co_attend", "enhance"])
def test_padding_and_missing_sentences_change_nothing(step):
    """Other content in padded slots, and two more of them, leave every real slot as it was."""
    heads = heads_from_release(released(64)).double()
    frames, narration, mask, narration_mask = make(64)
    with torch.no_grad():
        want = getattr(heads, step)(frames, narration, mask, narration_mask)
        other_frames = frames.masked_fill(~mask[..., None], 31.0)
        other_narration = narration.masked_fill(~narration_mask[..., None], -31.0)
        more = torch.full((4, 2, 64), 17.0, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.bool)
        got = getattr(heads, step)(
            *(torch.cat([x, more[0]], 1) for x in (other_frames, other_narration)),
            *(torch.cat([x, more[1]], 1) for x in (mask, narration_mask)),
        )
    assert_real_slots(got[0][:, :5], want[0].numpy(), mask, 1e-9)
    assert_real_slots(got[1][:, :5], want[1].numpy(), narration_mask, 1e-9)


def test_videos_do_not_see_each_other():
    heads = heads_from_release(released(64)).double()
    inputs = make(64)
    with torch.no_grad():
        whole = heads.enhance(*inputs)
        for v in range(4):
            alone = heads.enhance(*(x[v : v + 1] for x in inputs))
            assert_real_slots(alone.frames, whole.frames[v : v + 1].numpy(), inputs[2][v : v + 1], 1e-9)
            assert_real_slots(alone.narration, whole.narration[v : v + 1].numpy(), inputs[3][v : v + 1], 1e-9)


def test_the_order_of_the_frames_matters_to_the_temporal_encoders_only():
    heads = heads_from_release(released(64)).double()
    frames, narration, _, _ = make(64)
    full, back = torch.ones(4, 5, dtype=torch.bool), torch.arange(4, -1, -1)
    with torch.no_grad():
        for step, moves in (("co_attend", False), ("enhance", True)):
            there = getattr(heads, step)(frames, narration, full, full)
            turned = getattr(heads, step)(frames[:, back], narration[:, back], full, full)
            assert ((turned[0][:, back] - there[0]).abs().max() > 1e-3) == moves
            assert ((turned[1][:, back] - there[1]).abs().max() > 1e-3) == moves


@pytest.mark.parametrize("view", ["narration", "frames", "both"])
def test_a_video_without_narration_or_frames(view):
    """Nothing to attend to is a zero answer, not NaN, and its gradients are finite for every parameter."""
    state = released(64)
    heads = heads_from_release(state).double()
    frames, narration, mask, narration_mask = make(64)
    if view != "frames":
        narration_mask[1] = False
    if view != "narration":
        mask[1] = False
    got = heads.enhance(frames.requires_grad_(), narration.requires_grad_(), mask, narration_mask)
    arrays = frames.detach().numpy(), narration.detach().numpy(), mask, narration_mask
    want = [reference.enhance(plain(state), *(x[v] for x in arrays)) for v in range(4)]
    assert_real_slots(got.frames, [w[0] for w in want], mask, 1e-9)
    assert_real_slots(got.narration, [w[1] for w in want], narration_mask, 1e-9)
    assert got.frames.isfinite().all() and got.narration.isfinite().all()
    (got.frames[mask].sum() + got.narration[narration_mask].sum()).backward()
    assert frames.grad.isfinite().all() and narration.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in heads.parameters())

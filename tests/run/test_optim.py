"""The optimiser against slow numpy, the groups by name, schedule, clipping, freezing, fp16 weights and resuming."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from narvid import InputError
from narvid.towers import ClipConfig, build_towers
from narvid.run.optim import BertAdam, build_optimizer, clip_gradients, freeze, set_lr, to_half, warmup_cosine

STEPS = 50
FORMS = ("fp32", "factor", "product")  # see reference_moments


def reference_clip(g, max_norm=1.0):
    """One tensor's gradient, clipped to max_norm; every intermediate rounded to the gradient's dtype."""
    dtype = g.dtype
    norm = np.sqrt(np.sum(g.astype(np.float64) ** 2)).astype(dtype)
    padded = (np.float32(norm) + np.float32(1e-6)).astype(dtype)
    shrink = min((np.float32(max_norm) / np.float32(padded)).astype(dtype), dtype.type(1))
    return (g.astype(np.float32) * np.float32(shrink)).astype(dtype)


def reference_moments(g, m, v, form):
    """The two running means. Each line is one tensor operation: computed in fp32, stored in the tensor's dtype.

    form says how torch adds 0.1 * g to an fp16 m: "fp32" rounds the sum only (GPU), "factor" rounds 0.1 before (vector
    code of a CPU), "product" rounds 0.1 and the product before (a CPU's code for what fills no vector). For fp32 all
    three are the same.
    """
    dtype, wide_g = g.dtype, g.astype(np.float32)
    tenth = np.float32(1 - 0.9) if form == "fp32" else np.float32(dtype.type(1 - 0.9))
    product = tenth * wide_g if form != "product" else (tenth * wide_g).astype(dtype)
    m = (m.astype(np.float32) * np.float32(0.9)).astype(dtype)
    m = (m.astype(np.float32) + product.astype(np.float32)).astype(dtype)
    v = (v.astype(np.float32) * np.float32(0.98)).astype(dtype)
    v = (v.astype(np.float32) + np.float32(1 - 0.98) * wide_g * wide_g).astype(dtype)
    return m, v


def reference_parameter(p, m, v, *, lr, weight_decay):
    """The parameter after the step; rounding as above: the decay's product and lr * update are rounded before use."""
    dtype = p.dtype
    root = np.sqrt(v.astype(np.float32)).astype(dtype)
    root = (root.astype(np.float32) + np.float32(1e-6)).astype(dtype)
    update = (m.astype(np.float32) / root.astype(np.float32)).astype(dtype)
    decay = (p.astype(np.float32) * np.float32(weight_decay)).astype(dtype)
    update = (update.astype(np.float32) + decay.astype(np.float32)).astype(dtype)
    update = (update.astype(np.float32) * np.float32(lr)).astype(dtype)
    return (p.astype(np.float32) - update.astype(np.float32)).astype(dtype)


def weights_and_gradients(dtype, largest):
    """Weights as large as CLIP's and STEPS gradients, each element with its own scale between 1e-5 and `largest`.

    With 0.1 the norm of the gradient is a little under 1; every fifth is three times as large and meets the clip.
    """
    rng, shape = np.random.default_rng(0), (40, 32)
    weights = rng.normal(0, 0.03, shape).astype(dtype)
    scale = 10 ** rng.uniform(-5, np.log10(largest), shape)
    gradients = [rng.normal(0, 1, shape) * scale * (3 if step % 5 == 4 else 1) for step in range(STEPS)]
    return weights, [g.astype(dtype) for g in gradients]


def run_ours(weights, gradients, *, lr, weight_decay):
    """Yields, after each step with the schedule: (lr, p before, gradient as left by the step, m, v, p after)."""
    p = nn.Parameter(torch.from_numpy(weights.copy()))
    optimizer = BertAdam([{"params": [p], "base_lr": lr}], lr, weight_decay=weight_decay)
    for step, g in enumerate(gradients):
        before = p.detach().numpy().copy()
        factor = warmup_cosine(step / STEPS)
        set_lr(optimizer, factor)
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        assert m.dtype == v.dtype == p.dtype
        yield (lr * factor, before, *(t.detach().numpy().copy() for t in (p.grad, m, v, p)))


def run_reference(weights, gradients, form, *, lr, weight_decay):
    """Both moments and the parameter after all steps."""
    p, m, v = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    for step, g in enumerate(gradients):
        m, v = reference_moments(reference_clip(g), m, v, form)
        p = reference_parameter(p, m, v, lr=lr * warmup_cosine(step / STEPS), weight_decay=weight_decay)
    return m, v, p


# ---------------------------------------------------------------- BertAdam against numpy


@pytest.mark.parametrize("lr", [1e-4, 1e-7])
def test_fifty_steps_in_fp32(lr):
    weights, gradients = weights_and_gradients(np.float32, largest=0.1)
    *_, (*_, m, v, p) = run_ours(weights, gradients, lr=lr, weight_decay=0.2)
    expected_m, expected_v, expected_p = run_reference(weights, gradients, "fp32", lr=lr, weight_decay=0.2)
    assert np.abs(p - weights).max() > 5 * lr  # something happened
    np.testing.assert_allclose(m, expected_m, rtol=1e-6, atol=3e-8)  # terms of 0.1 nearly cancel
    np.testing.assert_allclose(v, expected_v, rtol=1e-6, atol=0)
    np.testing.assert_allclose(p, expected_p, rtol=0, atol=1e-8)  # the spacing of fp32 at 0.1 is 7e-9


@pytest.mark.parametrize("lr", [1e-4, 1e-7])
def test_every_fp16_step_rounds_as_the_release(lr):
    """Every step starts from our state, so nothing gathers, and is bitwise the reference's."""
    weights, gradients = weights_and_gradients(np.float16, largest=0.1)
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    clipped = 0
    for g, (rate, before, left, m_after, v_after, after) in zip(
            gradients, run_ours(weights, gradients, lr=lr, weight_decay=0.2), strict=True):
        clipped += not np.array_equal(left, g)
        np.testing.assert_array_equal(left, reference_clip(g))
        expected_m, expected_v = zip(*(reference_moments(left, m, v, form) for form in FORMS), strict=True)
        assert np.any([m_after == form for form in expected_m], axis=0).all()
        np.testing.assert_array_equal(v_after, expected_v[0])
        m, v = m_after, v_after
        np.testing.assert_array_equal(after, reference_parameter(before, m, v, lr=rate, weight_decay=0.2))
    assert clipped == STEPS // 5


@pytest.mark.parametrize("lr", [1e-4, 1e-7])
def test_fifty_steps_in_fp16(lr):
    """Left alone for 50 steps the run is bitwise the reference's, in one of the forms that torch has for a sum."""
    weights, gradients = weights_and_gradients(np.float16, largest=0.1)
    *_, (*_, m, v, p) = run_ours(weights, gradients, lr=lr, weight_decay=0.2)
    runs = [run_reference(weights, gradients, form, lr=lr, weight_decay=0.2) for form in FORMS]
    assert any(all(np.array_equal(ours, theirs) for ours, theirs in zip((m, v, p), run, strict=True)) for run in runs)


def test_what_fp16_does_to_1e_7():
    """In fp16 at CLIP's rate part of the weights never move and part of the second moments are exactly 0; in fp32 all
    move, and no further than a few 1e-7. What moves in fp16 moves while its second moment is 0, by lr * m / eps."""
    moved, no_second_moment, distance, steps = {}, {}, {}, {}
    for dtype in ("float16", "float32"):
        weights, gradients = weights_and_gradients(dtype, largest=0.01)
        run = list(run_ours(weights, gradients, lr=1e-7, weight_decay=0.2))
        *_, last_v, last_p = run[-1]
        moved[dtype], no_second_moment[dtype] = last_p != weights, last_v == 0
        distance[dtype] = np.abs(last_p.astype(np.float64) - weights).max()
        steps[dtype] = [(v == 0, np.abs(after.astype(np.float64) - before)) for _, before, _, _, v, after in run]
    assert 0.05 < moved["float16"].mean() < 0.5
    assert 0.2 < no_second_moment["float16"].mean() < 0.8
    assert moved["float32"].all() and not no_second_moment["float32"].any()
    assert distance["float16"] > 100 * distance["float32"]
    far = sum(size[zero].sum() for zero, size in steps["float16"])
    near = sum(size[~zero].sum() for zero, size in steps["float16"])
    assert far > 1000 * near > 0


def test_gradient_of_one_parameter_is_clipped_alone():
    small, large = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    small.grad, large.grad = torch.full((4,), 0.25), torch.full((4,), 50.0)
    BertAdam([small, large], 1e-3).step()
    assert torch.equal(small.grad, torch.full((4,), 0.25))
    torch.testing.assert_close(large.grad, torch.full((4,), 0.5))


def test_global_clip_comes_before_the_clip_of_each_parameter():
    """After the global clip no parameter exceeds 1, so the second clip only acts where the first is left out."""
    p = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for q in p:
        q.grad = torch.full((3,), 2.0)
    clip_gradients(p)
    after_global = [q.grad.clone() for q in p]
    BertAdam(p, 1e-3).step()
    assert all(torch.equal(q.grad, g) for q, g in zip(p, after_global, strict=True))
    torch.testing.assert_close(p[0].grad.norm() ** 2 + p[1].grad.norm() ** 2, torch.tensor(1.0))


def test_global_norm_over_mixed_dtypes():
    rng = torch.Generator().manual_seed(1)
    parameters = []
    for dtype, size, scale in [(torch.float16, 1000, 0.5), (torch.float32, 300, 2.0), (torch.float16, 7, 1e-3)]:
        p = nn.Parameter(torch.zeros(size, dtype=dtype))
        p.grad = (torch.randn(size, generator=rng) * scale).to(dtype)
        parameters.append(p)
    parameters.append(nn.Parameter(torch.zeros(2)))  # has no gradient
    before = [p.grad.double() for p in parameters[:3]]
    exact = torch.cat(before).norm()
    norm = clip_gradients(iter(parameters), 1.0)
    assert norm.dtype == torch.float32 and norm.ndim == 0
    torch.testing.assert_close(norm.double(), exact, rtol=5e-4, atol=0)
    for p, g in zip(parameters, before, strict=False):
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad.double(), g / exact, rtol=2e-3, atol=6e-8)
    unchanged = [p.grad.clone() for p in parameters[:3]]
    clip_gradients(parameters, 2.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, unchanged, strict=False))


# ---------------------------------------------------------------- schedule


def test_schedule():
    assert warmup_cosine(0.0) == 0.0
    assert warmup_cosine(0.05) == pytest.approx(0.5)
    assert warmup_cosine(0.0999999) == pytest.approx(1.0, abs=1e-5)
    assert warmup_cosine(0.1) == pytest.approx(0.9755282581)  # 0.5 * (1 + cos(0.1 pi)): the step down
    assert warmup_cosine(0.5) == pytest.approx(0.5)
    assert warmup_cosine(1.0) == pytest.approx(0.0, abs=1e-12)
    assert warmup_cosine(0.1, warmup=0.2) == pytest.approx(0.5)
    assert warmup_cosine(0.0, warmup=0.0) == 1.0


@pytest.mark.parametrize("recipe", ["reported", "modern"])
def test_set_lr_scales_each_group_from_its_own_rate(recipe):
    optimizer = build_optimizer(toy_model(), recipe=recipe, lr=1e-4, clip_lr=1e-7, weight_decay=0.2)
    for factor in (0.0, 0.5, 0.25):  # not cumulative
        set_lr(optimizer, factor)
        for group in optimizer.param_groups:
            base = 1e-7 if group["name"].startswith("clip") else 1e-4
            assert group["lr"] == pytest.approx(base * factor)


# ---------------------------------------------------------------- groups

# name: (decayed by reported, decayed by modern); shapes below
DECAYED = {
    "clip.logit_scale": (True, False),
    "clip.positional_embedding": (True, False),
    "clip.text_projection": (True, True),
    "clip.visual.class_embedding": (True, False),
    "clip.visual.positional_embedding": (True, False),
    "clip.visual.conv1.weight": (True, True),
    "clip.visual.ln_pre.weight": (True, False),
    "clip.visual.ln_pre.bias": (False, False),
    "clip.token_embedding.weight": (True, True),
    "clip.transformer.resblocks.0.attn.in_proj_weight": (True, True),
    "clip.transformer.resblocks.0.attn.in_proj_bias": (False, False),
    "heads.co_attention.frames.query.weight": (True, True),
    "heads.co_attention.frames.query.bias": (False, False),
    # LayerNorm1 and LayerNorm2 of the release: "LayerNorm.weight" does not occur in these names
    "heads.co_attention.frames.norm_attention.weight": (True, False),
    "heads.co_attention.narration.norm_attention.bias": (False, False),
    "heads.co_attention.narration.norm_feed_forward.weight": (False, False),  # LayerNorm of the release
    "heads.co_attention.narration.feed_forward.0.weight": (True, True),
    "heads.temporal_frames.positions": (True, False),
    "heads.temporal_narration.blocks.3.ln_1.weight": (True, False),
    "heads.temporal_narration.blocks.3.mlp.c_fc.weight": (True, True),
    "heads.word_weight_mlp.2.weight": (True, True),
    "heads.word_weight_mlp.2.bias": (False, False),
}


def toy_model():
    """A tree of modules whose parameters carry the names above, all ones."""
    vectors = ("bias", "logit_scale", "class_embedding", "ln_pre.weight", "ln_1.weight", "norm_attention.weight",
               "norm_feed_forward.weight")
    root = nn.Module()
    for name in DECAYED:
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        shape = () if last == "logit_scale" else (3,) if name.endswith(vectors) else (2, 3)
        module.register_parameter(last, nn.Parameter(torch.ones(shape)))
    return root


def names_of(optimizer, model):
    """{group name: set of parameter names}"""
    name = {id(p): n for n, p in model.named_parameters()}
    return {group["name"]: {name[id(p)] for p in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("column, recipe", [(0, "reported"), (1, "modern")])
def test_groups_by_name(column, recipe):
    model = toy_model()
    optimizer = build_optimizer(model, recipe=recipe, lr=1e-4, clip_lr=1e-7, weight_decay=0.2)
    expected = {}
    for name, decayed in DECAYED.items():
        tower = name.split(".")[0]
        expected.setdefault(f"{tower}_{'decay' if decayed[column] else 'no_decay'}", set()).add(name)
    assert names_of(optimizer, model) == expected
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.2)
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
    assert isinstance(optimizer, BertAdam if recipe == "reported" else torch.optim.AdamW)


@pytest.mark.parametrize("column, recipe", [(0, "reported"), (1, "modern")])
def test_decay_takes_effect_where_it_should(column, recipe):
    """With gradients of zero a step multiplies the decayed parameters by 1 - lr * 0.2 and leaves the others alone."""
    model = toy_model()
    optimizer = build_optimizer(model, recipe=recipe, lr=1e-1, clip_lr=1e-2, weight_decay=0.2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        rate = 1e-2 if name.startswith("clip.") else 1e-1
        expected = 1 - rate * 0.2 if DECAYED[name][column] else 1.0
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected), msg=name)


def test_tower_keeps_its_rate_below_a_wrapper():
    wrapped = nn.Module()
    wrapped.module = toy_model()
    optimizer = build_optimizer(wrapped, recipe="reported", lr=1e-4, clip_lr=1e-7, weight_decay=0.2)
    groups = names_of(optimizer, wrapped)
    assert "module.clip.text_projection" in groups["clip_decay"]
    assert "module.heads.temporal_frames.positions" in groups["heads_decay"]


@pytest.mark.parametrize("recipe", ["reported", "modern"])
def test_frozen_parameters_are_left_out_and_left_alone(recipe):
    model = toy_model()
    for p in model.clip.parameters():
        p.requires_grad_(False)
    optimizer = build_optimizer(model, recipe=recipe, lr=1e-1, clip_lr=1e-1, weight_decay=0.2)
    assert set(names_of(optimizer, model)) == {"heads_decay", "heads_no_decay"}
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # also the frozen ones: a stale gradient must not move them
    optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.clip.parameters())
    assert all((p != 1).all() for p in model.heads.parameters())


def test_a_parameter_without_a_gradient_is_skipped():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = BertAdam([used, unused], 0.1, weight_decay=0.2)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state
    assert (used != 1).all()


def test_refusals():
    model = toy_model()
    with pytest.raises(InputError, match="no recipe 'adam'"):
        build_optimizer(model, recipe="adam", lr=1e-4, clip_lr=1e-7, weight_decay=0.2)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(InputError, match="nothing is left to train"):
        build_optimizer(model, recipe="modern", lr=1e-4, clip_lr=1e-7, weight_decay=0.2)


# ---------------------------------------------------------------- the towers


def small_clip():
    torch.manual_seed(0)
    vision = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"layers": 2, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 40}
    return build_towers(ClipConfig(16, vision, text, quick_gelu=True), half=True)


def frozen_names(clip):
    return {name for name, p in clip.named_parameters() if not p.requires_grad}


def test_freeze():
    clip = small_clip()
    freeze(clip, 0)
    inputs = {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre.weight",
              "visual.ln_pre.bias", "token_embedding.weight", "positional_embedding"}
    assert frozen_names(clip) == inputs

    freeze(clip, 1)
    first = {n for n, _ in clip.named_parameters() if ".resblocks.0." in f".{n}"}
    assert len(first) == 2 * 12 and frozen_names(clip) == inputs | first

    freeze(clip, 3)  # deeper than the text tower: all its blocks
    blocks = {n for n, _ in clip.named_parameters() if "resblocks." in n}
    assert frozen_names(clip) == inputs | blocks
    assert {"visual.ln_post.weight", "visual.proj", "ln_final.bias", "text_projection", "logit_scale"} <= {
        n for n, p in clip.named_parameters() if p.requires_grad}

    freeze(clip, -1)
    assert not frozen_names(clip)
    for layers in (-2, 4):
        with pytest.raises(InputError, match="choose -1"):
            freeze(clip, layers)


def test_to_half_converts_what_the_family_converts():
    clip = small_clip()
    to_half(clip)
    kept = {n for n, p in clip.named_parameters() if p.dtype == torch.float32}
    norms = {n for n, _ in clip.named_parameters() if ".ln_" in f".{n}"}
    embeddings = {"logit_scale", "positional_embedding", "token_embedding.weight", "visual.class_embedding",
                  "visual.positional_embedding"}
    assert kept == norms | embeddings
    rest = [n for n, p in clip.named_parameters() if p.dtype == torch.float16]
    assert {"visual.conv1.weight", "visual.proj", "text_projection"} <= set(rest)
    assert len(rest) == 3 + 5 * 8  # per block: weight and bias of in_proj, out_proj, c_fc, c_proj


def half_clip_step(clip, optimizer, step):
    """One training step of the fp16 towers on random images and tokens; returns the loss."""
    rng = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 16, 16, generator=rng).half()
    tokens = torch.randint(1, 40, (4, 8), generator=rng)
    image = nn.functional.normalize(clip.visual(images).float(), dim=-1)  # (B, D)
    text = nn.functional.normalize(clip.encode_text(tokens, words=False)[0].float(), dim=-1)  # (B, D)
    loss = nn.functional.cross_entropy(clip.logit_scale.exp() * image @ text.T, torch.arange(4))
    optimizer.zero_grad()
    loss.backward()
    clip_gradients(clip.parameters())
    set_lr(optimizer, warmup_cosine(step / 8))
    optimizer.step()
    return loss.item()


def holder(clip):
    """The towers under the name they have in the model."""
    model = nn.Module()
    model.clip = clip
    return model


def saved_and_loaded(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("recipe", ["reported", "modern"])
def test_resumed_run_is_bitwise_the_unbroken_one(recipe):
    """fp16 towers for both recipes: the state must come back in the parameter's own dtype."""
    def start():
        clip = small_clip()
        to_half(clip)
        freeze(clip, 0)
        return clip, build_optimizer(holder(clip), recipe=recipe, lr=1e-3, clip_lr=1e-3, weight_decay=0.2)

    clip, optimizer = start()
    for step in range(4):
        half_clip_step(clip, optimizer, step)
    weights, state = saved_and_loaded(clip.state_dict(), optimizer.state_dict())
    first = {n: p.detach().clone() for n, p in clip.named_parameters()}
    unbroken = [half_clip_step(clip, optimizer, step) for step in range(4, 8)]

    resumed, resumed_optimizer = start()
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    for p in (p for group in resumed_optimizer.param_groups for p in group["params"]):
        assert all(t.dtype == p.dtype for key, t in resumed_optimizer.state[p].items() if key != "step")
    assert [half_clip_step(resumed, resumed_optimizer, step) for step in range(4, 8)] == unbroken
    for (name, p), q in zip(clip.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    moved = {n for n, p in clip.named_parameters() if not torch.equal(p, first[n])}
    assert {"visual.proj", "text_projection", "visual.ln_post.weight"} <= moved
    assert not moved & frozen_names(clip)
    assert [g["name"] for g in resumed_optimizer.param_groups] == [g["name"] for g in optimizer.param_groups]

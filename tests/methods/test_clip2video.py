"""narvid/methods/clip2video.py against reference_clip2video.py, its released weights, and a run of the trainer.

B queries, V videos, K frames of a video, L words, D joint dimension; masks True = real.
"""

from pathlib import Path

import numpy as np
import pytest
import reference
import reference_clip2video as slow
import tiny
import torch
import yaml
from open_clip.model import CLIP, convert_weights_to_lp

import main_task_retrieval as trainer
from narvid import towers as clip
from narvid import losses
from narvid.methods.clip2video import CLIP2Video, Queries, Videos

START, END = 98, 99  # a vocabulary of 100 makes towers cheap
TOWERS = {**tiny.WIDE, "text_cfg": {**tiny.WIDE["text_cfg"], "vocab_size": 100}}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LENGTHS = [6, 2, 5, 1, 3]  # frames of five videos: all, only one coarse frame, odd, one alone
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])


def build(dim=64, *, layers=2, centers=5, weight=0.5, state=None, seed=0):
    """A model over tiny towers, its heads those of reference_clip2video.released unless a whole `state` is given."""
    torch.manual_seed(seed)
    config = clip.ClipConfig(**{**TOWERS, "embed_dim": dim}, quick_gelu=True)
    model = CLIP2Video(clip.build_towers(config), centers=centers, center_weight=weight, temporal_layers=layers)
    if state is None:
        heads = {key: torch.tensor(x) for key, x in slow.released(dim, layers, centers, seed).items()}
        state = {**{f"clip.{key}": x for key, x in model.clip.state_dict().items()}, **heads}
    model.load_release(state, "made.bin")
    return model.eval()


def make_frames(dim=64, lengths=LENGTHS, slots=6, seed=1):
    """CLIP's features of videos of several lengths, (V, K, D), noise in the padding too; mask (V, K)."""
    frames = np.random.default_rng(seed).normal(size=(len(lengths), slots, dim))
    return torch.tensor(frames), torch.arange(slots) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------- the blocks, against loops


@PRECISIONS
@pytest.mark.parametrize("dim", [64, 128])
def test_videos_equal_the_loops_over_their_real_frames(dim, dtype, tolerance):
    frames, mask = make_frames(dim)
    with torch.no_grad():
        got = build(dim).to(dtype).enhance(frames.to(dtype), mask)
    state = slow.released(dim, layers=2)
    for v, length in enumerate(LENGTHS):
        real = frames[v, :length].numpy()
        np.testing.assert_allclose(got.pooled[v].double(), slow.pooled(state, real), atol=tolerance)
        np.testing.assert_allclose(got.aligned[v].double(), slow.aligned_video(state, real), atol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("centers", [1, 7])
def test_alignment_equals_the_loops(centers, dtype, tolerance):
    words = np.random.default_rng(2).normal(size=(4, 9, 64))
    lengths = torch.tensor([9, 1, 4, 7])
    with torch.no_grad():
        got = build(centers=centers).to(dtype).align(torch.tensor(words, dtype=dtype),
                                                     torch.arange(9) < lengths[:, None])
    state = slow.released(64, layers=2, centers=centers)
    want = [slow.aligned(state, x[:length]) for x, length in zip(words, lengths)]
    np.testing.assert_allclose(got.double(), want, atol=tolerance)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_few_frame_slots(slots):
    """One slot has no difference at all, two have none among the coarse frames."""
    model, state = build().double(), slow.released(64, layers=2)
    frames, mask = make_frames(lengths=[slots, 1], slots=slots)
    got = model.enhance(frames, mask)
    for v, length in enumerate([slots, 1]):
        real = frames[v, :length].numpy()
        np.testing.assert_allclose(got.pooled[v].detach(), slow.pooled(state, real), atol=1e-9)
        np.testing.assert_allclose(got.aligned[v].detach(), slow.aligned_video(state, real), atol=1e-9)


def test_padding_changes_nothing_and_is_finite_backwards():
    model = build().double()
    frames, mask = make_frames()
    want = model.enhance(frames, mask)
    other = torch.cat([frames.masked_fill(~mask[..., None], 31.0), torch.full((5, 3, 64), -17.0)], dim=1)
    other.requires_grad_()
    got = model.enhance(other, torch.cat([mask, torch.zeros(5, 3, dtype=torch.bool)], dim=1))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    (got.pooled.sum() + got.aligned.sum()).backward()
    assert other.grad.isfinite().all() and (other.grad[:, 6:] == 0).all()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if not name.startswith("clip."))


def test_a_video_without_a_frame_is_a_number_and_leaves_the_others_alone():
    model = build().double()
    frames, mask = make_frames()
    want = model.enhance(frames, mask)
    mask[1] = False
    got = model.enhance(frames, mask)
    others = [0, 2, 3, 4]
    for a, b in zip(got, want):
        assert a.isfinite().all()
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=1e-12)


def test_videos_do_not_see_each_other():
    model = build().double()
    frames, mask = make_frames()
    order = torch.tensor([3, 0, 4, 2, 1])
    whole, turned = model.enhance(frames, mask), model.enhance(frames[order], mask[order])
    alone = model.enhance(frames[2:3], mask[2:3])
    for name in Videos._fields:
        torch.testing.assert_close(getattr(turned, name), getattr(whole, name)[order], rtol=0, atol=1e-12)
        torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[2], rtol=0, atol=1e-12)


def test_the_order_of_frames_matters():
    model = build().double()
    frames, mask = make_frames(lengths=[6])
    there, back = model.enhance(frames, mask), model.enhance(frames.flip(1), mask)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(there, back))


def test_words_after_the_end_and_the_start_token_do_not_count():
    model = build().double()
    tokens = torch.tensor([[START, 20, 29, END, 0, 0], [START, 20, 68, 18, 29, END]])
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    whole = model.encode_queries(tokens, mask)
    cut = model.encode_queries(tokens[:1, :4], mask[:1, :4])
    for a, b in zip(whole, cut):
        torch.testing.assert_close(a[:1], b, rtol=0, atol=1e-12)
    words = model.clip.encode_text(tokens)[1].detach().numpy()
    state = slow.released(64, layers=2)
    for row, length in ((0, 4), (1, 6)):
        want = slow.aligned_query(state, words[row, :length])
        np.testing.assert_allclose(whole.aligned[row].detach(), want, atol=1e-9)


# --------------------------------------------------------------------------------------------------- scores and losses


def unrelated(model, queries, videos, seed=0):
    """Noise through the heads: unit vectors of so many queries and videos that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    words, eos, frames = (torch.tensor(rng.normal(size=shape), dtype=torch.float32)
                          for shape in ((queries, 6, 64), (queries, 64), (videos, 6, 64)))
    with torch.no_grad():
        aligned = model.align(words, torch.ones(queries, 6, dtype=torch.bool))
        made = Queries(torch.nn.functional.normalize(eos, dim=1), aligned)
        return made, model.enhance(frames, torch.ones(videos, 6, dtype=torch.bool))


def test_scores_are_cosines_of_any_number_of_queries_and_videos():
    model = build()
    queries, videos = unrelated(model, 7, 3)
    scores = model.score(queries, videos)
    assert tuple(scores) == CLIP2Video.views(None) == ("global", "alignment")
    for view, q, v in (("global", queries.eos, videos.pooled), ("alignment", queries.aligned, videos.aligned)):
        want = [[reference.cosine(a, b) for b in v.numpy()] for a in q.numpy()]
        np.testing.assert_allclose(scores[view], want, atol=1e-6)
    order = torch.tensor([2, 0, 1])
    turned = model.score(queries, Videos(*(x[order] for x in videos)), block=2)
    for view in CLIP2Video.views(None):
        torch.testing.assert_close(turned[view], scores[view][:, order])
    some = model.score(Queries(*(x[4:6] for x in queries)), videos)
    torch.testing.assert_close(some["alignment"], scores["alignment"][4:6])


def test_noise_is_found_by_chance():
    """R@1 of 10 pairs that are none is 10 %; over 60 draws its standard error is below 2 points."""
    model, hits = build(), {name: [] for name in ("S_global", "S_alignment", "S_fusion")}
    for seed in range(60):
        queries, videos = unrelated(model, 10, 10, seed)
        for name, s in model.combine(model.score(queries, videos), 0.5):
            hits[name] += [(s.argmax(dim=d) == torch.arange(10)).double().mean().item() for d in (0, 1)]
    for name, share in hits.items():
        assert 0.05 < np.mean(share) < 0.15, name


def test_the_loss_weighs_two_cross_entropies():
    rng = np.random.default_rng(3)
    s = {view: rng.uniform(-1, 1, (5, 5)) for view in CLIP2Video.views(None)}
    exclude = np.zeros((5, 5), dtype=bool)
    exclude[0, 3] = exclude[3, 0] = True
    got = build(weight=0.3).loss({view: torch.tensor(x) for view, x in s.items()}, 4.0, torch.tensor(exclude))
    want = {"nce_global": 0.3 * reference.nce(s["global"], 4.0, exclude),
            "nce_alignment": 0.7 * reference.nce(s["alignment"], 4.0, exclude)}
    assert {name: pytest.approx(part.item()) for name, part in got.items()} == want
    whole = {view: torch.eye(5, dtype=torch.float64) for view in CLIP2Video.views(None)}
    parts = build(weight=1.0).loss(whole, 4.0, None)
    assert parts["nce_alignment"] == 0 and parts["nce_global"] == losses.nce(whole["global"], 4.0)


def test_the_result_is_the_weighted_sum():
    s = {view: torch.tensor(x) for view, x in (("global", [[1.0, 0.0, 0.5]]), ("alignment", [[0.0, 0.5, 0.5]]))}
    table = dict(build().combine(s, 0.25))
    assert list(table) == ["S_global", "S_alignment", "S_fusion"]
    assert torch.equal(table["S_fusion"], torch.tensor([[0.25, 0.375, 0.5]]))


# -------------------------------------------------------------------------------------------------- weights, gradients


def pixels(count):
    """Frames of noise (count, 3, side, side) uint8."""
    rng = np.random.default_rng(0)
    return torch.tensor(rng.integers(0, 256, (count, 3, tiny.SIDE, tiny.SIDE)), dtype=torch.uint8)


def released_file(path, centers=7):
    """A file of a release's form: half precision towers under "clip.", heads under the release's names."""
    torch.manual_seed(1)
    towers = CLIP(**TOWERS, quick_gelu=True)
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if name != "logit_scale":
                around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # LayerNorm
                parameter.copy_(around + 0.15 * torch.randn_like(parameter))
    convert_weights_to_lp(towers, torch.float16)
    heads = {key: torch.tensor(x, dtype=torch.float32) for key, x in slow.released(64, centers=centers).items()}
    torch.save({**{f"clip.{key}": x for key, x in towers.state_dict().items()}, **heads}, path)
    return path


def test_a_released_file_gives_what_numpy_computes_from_pixels_and_tokens(tmp_path):
    loaded = torch.load(released_file(tmp_path / "pytorch_model.bin.22"), weights_only=True)
    model = build(layers=4, centers=7, state=loaded)
    state = {key: x.double().numpy() for key, x in loaded.items()}
    towers = {key.removeprefix("clip."): x for key, x in state.items() if key.startswith("clip.")}
    mean, std = (model.clip.get_buffer(name).numpy() for name in ("pixel_mean", "pixel_std"))
    lengths, shown = (4, 1), pixels(5)
    frames = torch.zeros(2, 4, 3, tiny.SIDE, tiny.SIDE, dtype=torch.uint8)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    frames[mask] = shown
    texts = [[START, 20, 29, END], [START, 68, END], [START, 18, 18, 20, END]]
    tokens = torch.zeros(3, 5, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, :len(text)] = torch.tensor(text)
    with torch.no_grad():
        queries = model.encode_queries(tokens, torch.arange(5) <= tokens.argmax(dim=1)[:, None])
        scores = model.score(queries, model.encode_videos(frames, mask, None, None, None))

    images = np.array([reference.clip_image(towers, (x - mean) / std) for x in shown.numpy()])
    for b, text in enumerate(texts):
        eos, words = reference.clip_text(towers, text)
        for v, own in enumerate((images[:4], images[4:])):
            assert scores["global"][b, v].item() == pytest.approx(slow.unit(eos) @ slow.pooled(state, own), abs=2e-5)
            want = slow.aligned_query(state, words) @ slow.aligned_video(state, own)
            assert scores["alignment"][b, v].item() == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("emb_center"), ["made.bin", "embedding_centers"]),
        (lambda s: s.update({"frame2t_projection": torch.zeros(64, 64)}), ["made.bin", "frame2t_projection"]),
        (lambda s: s.update({"weight_center": torch.zeros(9, 64)}), ["made.bin", "--centers 9"]),
        (lambda s: [s.pop(k) for k in [*s] if k.startswith("transformerClip.resblocks.3")], ["--temporal_layers 3"]),
        (lambda s: s.update({"type_position_embeddings.weight": torch.zeros(3, 64)}), ["made.bin", "types", "(3, 64)"]),
    ],
    ids=["missing", "unknown", "centers", "layers", "shape"],
)
def test_other_weights_are_refused_in_one_sentence(tmp_path, change, words):
    state = torch.load(released_file(tmp_path / "model.bin"), weights_only=True)
    change(state)
    with pytest.raises(ValueError) as refusal:
        build(layers=4, centers=7, state=state)
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)


def test_heads_start_from_the_text_tower():
    config = clip.ClipConfig(**TOWERS)
    model = CLIP2Video(clip.build_towers(config), centers=5, center_weight=0.5, temporal_layers=2)
    text = model.clip
    assert torch.equal(model.positions, text.positional_embedding)
    assert torch.equal(model.types, text.positional_embedding[:2])
    for block, number in ((model.temporal_blocks[0], 0), (model.temporal_blocks[1], 1), (model.difference_block, 0),
                          (model.alignment_block, 0)):
        own, theirs = block.state_dict(), text.transformer.resblocks[number].state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    centers = torch.cat([model.weight_centers, model.embedding_centers])
    assert centers.std().item() == pytest.approx(0.125, rel=0.1)
    wide = clip.ClipConfig(**{**TOWERS, "embed_dim": 128})  # nothing of a width of 64 fits
    model = CLIP2Video(clip.build_towers(wide), centers=5, center_weight=0.5, temporal_layers=2)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match="multiple of 64"):
        CLIP2Video(clip.build_towers(clip.ClipConfig(**{**TOWERS, "embed_dim": 96})), centers=5, center_weight=0.5,
                   temporal_layers=2)


def test_every_parameter_learns():
    model = build().train()
    tokens = torch.tensor([[START, 20, word, END] for word in (29, 68, 18, 37)])
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]
    frames = torch.zeros(4, 6, 3, tiny.SIDE, tiny.SIDE, dtype=torch.uint8)
    frames[mask] = pixels(15)
    queries, videos, scale = model(tokens, torch.ones_like(tokens, dtype=torch.bool), frames, mask, None, None, None)
    sum(model.loss(model.score(queries, videos), scale, None).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------------------- the trainer, the presets


def test_a_run_and_its_checkpoint_evaluated_alone_agree(corpus, tmp_path):
    own = ("--method", "clip2video", "--centers", 3, "--fusion_weight", 0.4, "--epochs", 1)
    trained = trainer.main(tiny.flags(corpus, tmp_path / "run", *own))
    assert list(trained) == ["S_global", "S_alignment", "S_fusion"]
    assert len(tiny.losses(tmp_path / "run")) == 2
    alone = trainer.main([str(x) for x in (
        "--eval_only", "--checkpoint", tmp_path / "run" / "best.pt", "--data_dir", corpus, "--num_workers", 0,
        "--output_dir", tmp_path / "alone", "--eval_batch_size", 3)])
    assert alone == trained


# The release's README: R@1, R@5, R@10, MdR, MnR of text-to-video, then of video-to-text.
PUBLISHED = {
    "msrvtt_9k": ("45.6 72.6 81.7 2 14.6", "43.5 72.3 82.1 2 10.2"),
    "msrvtt_full": ("29.8 55.5 66.2 4 45.5", "54.6 82.1 90.8 1 5.3"),
    "msvd": ("47.0 76.8 85.9 2 9.6", "58.7 85.6 91.6 1 4.3"),
    "vatex_hgr": ("61.2 90.9 95.6 1 3.4", "77.9 98.1 99.1 1 1.6"),
    "vatex_1k5": ("57.3 90.0 95.5 1 3.6", "76.0 97.7 99.9 1 1.5"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_carry_the_published_values(name):
    text = (CONFIGS / f"clip2video_{name}.yaml").read_text()
    for row, numbers in zip(("text-to-video", "video-to-text"), PUBLISHED[name]):
        line = next(line for line in text.splitlines() if line.startswith("#") and row in line)
        assert line.split(row)[1].split() == numbers.split()
    values = yaml.safe_load(text)
    want = {"method": "clip2video", "centers": 7 if "vatex" in name else 5, "center_weight": 0.5, "fusion_weight": 0.5,
            "temporal_layers": 4, "max_words": 32, "max_frames": 12, "clip_model": "ViT-B-32", "seed": 42}
    assert {key: values[key] for key in want} == want
    assert f"--config configs/clip2video_{name}.yaml" in text and next(iter(values)) == "method"

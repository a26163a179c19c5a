"""What the released code of other systems gave on random inputs (tests/golden), given again by ours.

Each model is built as a user builds it: from a file with the release's own keys. CLIP's towers are left out: features
go in where the feature cache's do. `python -m pytest tests/test_golden.py -s` prints the table of docs/evidence.md.
"""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from main_task_retrieval import build_model, parse_args
from narvid import losses
from narvid.run.optim import BertAdam, set_lr, warmup_cosine
from narvid.similarity import filter_weights, match
from narvid.towers import ClipConfig, build_towers

FOLDER = Path(__file__).resolve().parent / "golden"
CLIP = {"embed_dim": 128, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}}
# Largest absolute difference allowed: two to four times what was measured, for other builds of torch.
BOUNDS = {
    "NarVid, features after the heads (up to 4)": 5e-6,
    "NarVid, word weights and filter weights": 5e-7,
    "NarVid, similarities": 2e-7,
    "NarVid, losses": 1e-6,
    "NarVid, gradients of the loss": 1e-6,
    "CLIP4Clip seqTransf, cosines": 3e-7,
    "CLIP4Clip seqTransf, logits (up to 70)": 2e-5,
    "CLIP4Clip seqTransf, losses": 2e-6,
    "CLIP2Video, cosines": 5e-7,
    "CLIP2Video, logits (up to 70)": 2e-5,
    "CLIP2Video, losses": 2e-6,
    "BertAdam, weights after each of 50 steps, fp32": 1e-9,
    "BertAdam, weights after each of 50 steps, fp16": 0.0,
}


@pytest.fixture(scope="module")
def measured():
    """Row of BOUNDS -> the largest difference seen; printed at the end."""
    rows = {}
    yield rows
    print("\n| against released code | largest difference | allowed |\n|---|---|---|")
    for row in (row for row in BOUNDS if row in rows):
        print(f"| {row} | {rows[row]:.1e} | {BOUNDS[row]:.0e} |")


@pytest.fixture
def agree(measured):
    """agree(row, ours, theirs): no further apart than BOUNDS says."""

    def check(row, ours, theirs):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        difference = (ours.detach().double() - theirs.double()).abs().max().item()
        measured[row] = max(measured.get(row, 0.0), difference)
        assert difference <= BOUNDS[row], f"{row}: {difference:.1e}"

    return check


def golden(name):
    """Arrays of one file -> tensors; what fp16 holds exactly is stored so."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays if name == "bertadam" else {
        key: x.float() if x.dtype == torch.float16 else x for key, x in arrays.items()}


def build(method, numbers, folder, *flags):
    """The method with the release's weights, loaded from a file as a user's would be, and random towers."""
    torch.manual_seed(0)
    state = {f"clip.{key}": value for key, value in build_towers(ClipConfig(**CLIP)).state_dict().items()}
    state |= {key.removeprefix("w."): value for key, value in numbers.items() if key.startswith("w.")}
    torch.save(state, folder / "released.bin")
    (folder / "clip.json").write_text(json.dumps(CLIP))
    own = ["--method", method, "--clip_model", folder / "clip.json", "--checkpoint", folder / "released.bin"]
    return build_model(parse_args([str(x) for x in (*own, "--output_dir", folder / "run", *flags)])).eval()


def with_eos(eos, words=None):
    """Features in the feature cache's form: eos (N, D), then words (N, L, D)."""
    return torch.cat([eos[:, None], *([] if words is None else [words])], dim=1)


# ----------------------------------------------------------------------------------------------------------- NarVid


@pytest.fixture(scope="module")
def narvid(tmp_path_factory):
    """The numbers, and the model. The narration's own temporal encoder is left out of the file, for its size."""
    numbers = golden("narvid")
    stand_in = {key.replace("transformerClip", "transformerCaption").replace("frame_p", "caption_p"): value
                for key, value in numbers.items() if "transformerClip" in key or "frame_position" in key}
    folder = tmp_path_factory.mktemp("narvid")
    return numbers, build("narvid", numbers | stand_in, folder, "--temporal_layers", 1)


@torch.no_grad()
def test_narvid_from_features_to_similarities(narvid, agree):
    z, model = narvid
    heads, mask = "NarVid, features after the heads (up to 4)", z["frame_mask"]
    sentences = torch.arange(mask.numel()).view(mask.shape)
    queries = model.encode_queries(with_eos(z["eos"], z["word"]), z["word_mask"])
    videos = model.encode_videos(z["frames"], mask, with_eos(z["narration"].flatten(0, 1)), sentences, mask)
    attended = model.heads.co_attend(z["frames"], z["narration"], mask, mask)
    for ours, theirs in zip(attended, ("co_frames", "co_narration")):
        agree(heads, ours, z[theirs])
    agree(heads, videos.frames, z["frames_enhanced"])
    agree("NarVid, word weights and filter weights", queries.word_weights, z["word_weights"])

    videos = videos._replace(narration=z["narration_enhanced"])
    cosine = torch.einsum("bd,vkd->bvk", F.normalize(queries.eos, dim=-1), F.normalize(videos.frames, dim=-1))
    agree("NarVid, word weights and filter weights", filter_weights(cosine, mask), z["nucleus_qv"])
    similarity, coarse = model.score(queries, videos), match(queries, videos, fine=False)
    for view, name in (("video", "qv"), ("narration", "qn")):
        agree("NarVid, similarities", similarity[view], z[f"s_{name}"])
        agree("NarVid, similarities", coarse[view], z[f"coarse_{name}"])
        agree("NarVid, similarities", 2 * similarity[view] - coarse[view], z[f"fine_{name}"])


def test_narvid_from_similarities_to_losses_and_gradients(narvid, agree):
    z, model = narvid
    similarity = {"video": z["s_qv"].requires_grad_(), "narration": z["s_qn"].requires_grad_()}
    of_queries, of_videos = losses.hard_negatives(*similarity.values(), lam=0.7)
    assert torch.equal(of_queries, z["hard_q"]) and torch.equal(of_videos, z["hard_v"])
    assert 0 < of_queries.sum() < 90 and 0 < of_videos.sum() < 90
    parts = model.loss(similarity, model.clip.logit_scale.exp(), None)
    for name, theirs in (("nce_video", "nce_qv"), ("nce_narration", "nce_qn"), ("hard_video", "hinge_qv"),
                         ("hard_narration", "hinge_qn")):
        agree("NarVid, losses", parts[name], z[theirs])
    total = sum(parts.values())
    agree("NarVid, losses", total, z["loss_alpha1"])
    for ours, theirs in zip(torch.autograd.grad(total, [*similarity.values()]), ("grad_qv", "grad_qn")):
        agree("NarVid, gradients of the loss", ours, z[theirs])


# ------------------------------------------------------------------------------------------- CLIP4Clip, CLIP2Video


@torch.no_grad()
@pytest.mark.parametrize("form", ["full", "var"])
def test_clip4clip(tmp_path, agree, form):
    """Six videos with all frames, or padded to the longest; with six and with nine queries."""
    z = golden("clip4clip")
    model = build("clip4clip", z, tmp_path, "--temporal_layers", 2)
    scale, mask = model.clip.logit_scale.exp(), z[f"mask_{form}"]
    assert mask.all() == (form == "full")
    videos = model.encode_videos(z["frames"], mask)
    for count in (6, 9):
        scores = model.score(model.encode_queries(with_eos(z[f"text{count}"]), None), videos)
        agree("CLIP4Clip seqTransf, cosines", scores["video"], z[f"cos_q{count}_{form}"])
        agree("CLIP4Clip seqTransf, logits (up to 70)", scale * scores["video"], z[f"logits_q{count}_{form}"])
        if count == 6:
            agree("CLIP4Clip seqTransf, losses", sum(model.loss(scores, scale, None).values()), z[f"loss_q6_{form}"])


def as_released(model):
    """Undo the second departure that clip2video.py names: frames see the difference of the last one to the padding."""
    ours = model.difference_tokens

    def difference_tokens(frames, mask):
        tokens, no_key = ours(frames, mask)
        no_key[:, 1::2] = ~mask[:, :-1]
        return tokens, no_key

    model.difference_tokens = difference_tokens
    return model


@torch.no_grad()
@pytest.mark.parametrize("form", ["full", "var_fixedmask"])
def test_clip2video(tmp_path, agree, form):
    """Padded videos: the release's mask is mended (each video has its own), its second slip is put into ours."""
    z = golden("clip2video")
    model = build("clip2video", z, tmp_path, "--temporal_layers", 2)
    scale, mask = model.clip.logit_scale.exp(), z["mask_full" if form == "full" else "mask_var"]
    if form != "full":
        ours = model.enhance(z["frames"], mask).pooled
        assert (as_released(model).enhance(z["frames"], mask).pooled - ours).abs().max() > 1e-3  # it matters
    videos = model.enhance(z["frames"], mask)  # with what stands in padded places, which encode_videos sets to zero
    for count in (6, 9):
        scores = model.score(model.encode_queries(with_eos(z[f"text{count}"], z[f"word{count}"]),
                                                  z[f"word_mask{count}"]), videos)
        views, weighted = [*scores], (scores["global"] + scores["alignment"]) / 2
        for view, theirs in zip(views, ("cos_global", "cos_tab")):
            agree("CLIP2Video, cosines", scores[view], z[f"{theirs}_q{count}_{form}"])
        agree("CLIP2Video, logits (up to 70)", scale * scores["global"], z[f"logits_global_q{count}_{form}"])
        agree("CLIP2Video, logits (up to 70)", scale * weighted, z[f"score_q{count}_{form}"])
        if count == 6:
            agree("CLIP2Video, losses", sum(model.loss(scores, scale, None).values()), z[f"loss_q6_{form}"])


# --------------------------------------------------------------------------------------------------------- BertAdam


@pytest.mark.parametrize("weight_decay", [0.2, 0.0])
@pytest.mark.parametrize("lr", ["1e-4", "1e-7"])
@pytest.mark.parametrize("form", ["fp32", pytest.param("fp16", marks=pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="another CPU rounds fp16 sums in another place"))])
def test_bertadam(agree, form, lr, weight_decay):
    z, row = golden("bertadam"), f"BertAdam, weights after each of 50 steps, {form}"
    p = nn.Parameter(z[f"p0_{form}"].clone())
    optimizer = BertAdam([{"params": [p], "base_lr": float(lr)}], float(lr), weight_decay=weight_decay)
    expected = z[f"params_{form}_lr{lr}_wd{weight_decay}"]
    for step, gradient in enumerate(z[f"grads_{form}"]):
        set_lr(optimizer, warmup_cosine(step / len(expected)))
        p.grad = gradient.clone()
        optimizer.step()
        agree(row, p, expected[step])
    if (lr, weight_decay) == ("1e-4", 0.2):
        assert p.dtype == expected.dtype and not torch.equal(p, z[f"p0_{form}"])
        for name, state in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            torch.testing.assert_close(optimizer.state[p][state], z[f"{name}_final_{form}"], rtol=1e-5,
                                       atol=1e-9 if form == "fp32" else 0)


# ------------------------------------------------------------------------------------------------------- the record


def test_the_page_states_what_is_allowed_here():
    page = (FOLDER.parents[1] / "docs" / "evidence.md").read_text()
    for row, bound in BOUNDS.items():
        line = next((line for line in page.splitlines() if line.startswith(f"| {row} |")), "")
        assert line.endswith(f" {bound:.0e} |"), row
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000

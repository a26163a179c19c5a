"""narvid.towers: every model of open_clip, and each family at small size against open_clip's own computation.

The other side is built by open_clip's classes from the same config, never through Towers, and read with their
encode_image and encode_text; pictures go through open_clip's own transform.

N frames or texts, T tokens of a text, D joint dimension.
"""

import copy
import json
import re
import warnings

import numpy as np
import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch.overrides import TorchFunctionMode

from narvid.data.frames import read_frames
from narvid.run import optim
from narvid.towers import ClipConfig, architectures, build_towers, config_of, load_towers
from narvid.towers.weights import load_towers_weights

pytestmark = pytest.mark.slow

LENGTH, VOCABULARY = 12, 60
TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
PE = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": None, "image_size": 160}
FAMILIES = {  # what is small here of each row of docs/towers.md
    "OpenAI": (CLIP, {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}),
    "LAION": (CLIP, {"vision_cfg": VIT, "text_cfg": TEXT}),
    "ResNet": (CLIP, {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16,
                                     "patch_size": None}, "text_cfg": TEXT}),
    "ConvNeXt": (CLIP, {"vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear",
                                       "image_size": 64}, "text_cfg": TEXT}),
    "PE-Core, EVA02, ViTamin": (CustomTextCLIP, {"vision_cfg": PE, "text_cfg": TEXT, "custom_text": True}),
    "MetaCLIP 2": (CLIP, {"vision_cfg": VIT, "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 2}}),
    "SigLIP": (CustomTextCLIP, {"vision_cfg": VIT, "text_cfg": TEXT | SIGLIP, "custom_text": True,
                                "init_logit_bias": -10}),
    "SigLIP2": (CustomTextCLIP, {"vision_cfg": VIT, "custom_text": True, "text_cfg": TEXT | SIGLIP | {
        "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}}),
    "SigLIP i18n": (CustomTextCLIP, {"vision_cfg": VIT, "text_cfg": TEXT | SIGLIP | {"proj_type": "none"},
                                     "custom_text": True}),
    "CLIPA": (CLIP, {"vision_cfg": VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
                     "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"}}),
    "MobileCLIP": (CustomTextCLIP, {"vision_cfg": VIT, "text_cfg": TEXT | {"no_causal_mask": True},
                                    "custom_text": True}),
    "CoCa": (CoCa, {"vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5,
                                         "output_tokens": True},
                    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True}, "custom_text": True,
                    "multimodal_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 64, "heads": 2,
                                       "layers": 1}}),
}
READ_IN_FULL = {"SigLIP", "SigLIP2", "SigLIP i18n", "CLIPA", "MobileCLIP", "CoCa"}


def lively(module):
    """Weights anew, biases, LayerNorms and statistics among them: an unread one would show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point() or name.startswith("logit"):
                continue
            scale_like = value.ndim == 1 and name.endswith(("weight", "running_var", "gamma"))
            value.copy_((1.0 if scale_like else 0.0) + 0.1 * torch.randn_like(value).clamp(-3, 3))
    return module.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, open_clip's own model, Towers with its weights)."""
    kind, config = FAMILIES[request.param]
    own = {name: value for name, value in config.items() if name != "custom_text"}
    theirs = lively(kind(64, **copy.deepcopy(own)))
    model = architectures.Model("small", {"embed_dim": 64, **config}, None, None)
    towers = build_towers(config_of(model, config.get("quick_gelu", False), {}, None)).eval()
    load_towers_weights(towers, theirs.state_dict(), source="their state dict")
    return request.param, theirs, towers


def texts(name, *, full=False):
    """Tokens (4, T): short and full texts in one batch, padded as the family pads; and where each text ends."""
    rng, lengths = np.random.default_rng(5), [LENGTH, 3, 7, 5]
    tokens = torch.zeros(4, LENGTH, dtype=torch.long)
    end = 2 if name == "MetaCLIP 2" else VOCABULARY - 1
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.tensor([*rng.integers(3, VOCABULARY - 1, length - 1), end])
    return tokens, lengths


def test_a_family_computes_what_open_clip_does(family):
    name, theirs, towers = family
    side = towers.picture.size
    frames = torch.tensor(np.random.default_rng(1).integers(0, 256, (3, 3, side, side)), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (towers.picture.mean, towers.picture.std))
    tokens, _ = texts(name)
    plain = {"normalize": False}
    with torch.no_grad():
        torch.testing.assert_close(towers.encode_frames(frames),
                                   theirs.encode_image((frames / 255 - mean) / std, **plain), rtol=1e-5, atol=1e-5)
        eos, words = towers.encode_text(tokens)
        want = theirs.encode_text(tokens, **plain)
        torch.testing.assert_close(eos, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(towers.encode_text(tokens, words=False)[0], want, rtol=1e-5, atol=1e-5)
        many = tokens.repeat(40, 1)  # read in parts of like length, where that may be
        torch.testing.assert_close(towers.encode_text(many, words=False)[0], want.repeat(40, 1), rtol=1e-5, atol=1e-5)
    assert words.shape == (4, LENGTH, 64) and eos.abs().max() > 0.1


def test_words_are_open_clips_token_outputs_projected(family):
    name, theirs, towers = family
    tokens, lengths = texts(name)
    with torch.no_grad():
        _, words = towers.encode_text(tokens)
        if hasattr(theirs, "text"):
            theirs.text.output_tokens = True
            _, hidden = theirs.text(tokens)
            if name == "CoCa":
                hidden = theirs.text.ln_final(hidden)
            projection = theirs.text.text_projection
        else:
            hidden = theirs.forward_intermediates(text=tokens, normalize_intermediates=True)["text_intermediates"][-1]
            projection = theirs.text_projection
        if projection is not None:
            hidden = projection(hidden) if isinstance(projection, torch.nn.Module) else hidden @ projection
    torch.testing.assert_close(words, hidden, rtol=1e-5, atol=1e-5)
    if hasattr(theirs, "text"):
        theirs.text.output_tokens = name == "CoCa"


def test_a_text_is_cut_only_where_that_changes_nothing(family):
    name, _, towers = family
    tokens, lengths = texts(name)
    assert towers.cuts_text == (name not in READ_IN_FULL)
    with torch.no_grad():
        eos, words = towers.encode_text(tokens)
        if not towers.cuts_text:
            with pytest.raises(ValueError, match=f"{LENGTH} tokens a text are needed, not 7"):
                towers.encode_text(tokens[2:, :7])
            other = tokens[2:].clone()
            other[:, 8:] = 1  # padding of another kind is seen
            assert (towers.encode_text(other)[0] - eos[2:]).abs().max() > 1e-3
            return
        got, some = towers.encode_text(tokens[2:, :7])
    torch.testing.assert_close(got, eos[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some, words[2:, :7], rtol=1e-5, atol=1e-5)


def test_every_trained_parameter_gets_a_gradient(family):
    name, theirs, towers = family
    side = towers.picture.size
    tokens, _ = texts(name)
    towers.zero_grad()
    frames = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    eos, words = towers.encode_text(tokens)
    (towers.encode_frames(frames).square().sum() + eos.square().sum() + words.square().sum()).backward()
    missing = [n for n, p in towers.named_parameters() if p.grad is None]
    assert missing == ["logit_scale"]


def test_batch_norms_keep_their_statistics():
    towers = build_towers(ClipConfig(64, FAMILIES["ResNet"][1]["vision_cfg"], TEXT)).train()
    before = {name: value.clone() for name, value in towers.state_dict().items() if "running" in name}
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    together, alone = towers.encode_frames(frames), towers.encode_frames(frames[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)
    assert before and all(torch.equal(value, towers.state_dict()[name]) for name, value in before.items())


# ---- depth ----


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_its_depth(name):
    kind, config = FAMILIES[name]
    model = architectures.Model("small", {"embed_dim": 64, **config}, None, None)
    towers = build_towers(config_of(model, False, {}, None))
    depths = towers.depths()
    assert depths.keys() == {n for n, _ in towers.named_parameters()} - {"logit_scale"}
    for visual in (True, False):
        of_tower = {n: d for n, d in depths.items() if n.startswith("visual.") == visual}
        (top,) = {top for _, top in of_tower.values()}
        assert {depth for depth, _ in of_tower.values()} == set(range(top + 1))
    last = [n for n, (depth, top) in depths.items() if depth == top]
    assert not any(".resblocks." in n or ".blocks." in n for n in last)
    if name in ("PE-Core, EVA02, ViTamin", "SigLIP", "OpenAI"):
        blocks = {n: depth for n, (depth, _) in depths.items() if "blocks." in n}
        assert all(f"blocks.{depth - 1}." in n for n, depth in blocks.items())


def test_first_blocks_of_a_real_timm_tower_are_frozen_by_name():
    """PE-Core T, 12 blocks: what --freeze_layers 2 and --train_towers last 2 leave to train, written out."""
    model = architectures.find_model("PE-Core-T-16-384")
    with torch.device("meta"):
        towers = build_towers(config_of(model, False, model.pictures, None))
    parts = {re.sub(r"^visual\.trunk\.(blocks\.\d+|[^.]+).*", r"\1", n): p for n, p in towers.named_parameters()
             if n.startswith("visual.")}
    outputs = {"norm", "attn_pool", "head"}
    inputs = {"patch_embed", "pos_embed", "cls_token", "norm_pre"} & parts.keys()
    assert parts.keys() == {f"blocks.{n}" for n in range(12)} | inputs | outputs and "pos_embed" in inputs

    def trained():
        sets = {part: {p.requires_grad for n, p in towers.named_parameters() if n.startswith(f"visual.trunk.{part}.")
                       or n == f"visual.trunk.{part}"} for part in parts}
        assert all(len(of_part) == 1 for of_part in sets.values())  # a part is trained or is not
        return {part for part, of_part in sets.items() if of_part == {True}}

    optim.freeze(towers, 2)
    assert trained() == outputs | {f"blocks.{n}" for n in range(2, 12)}
    optim.freeze_but_last(towers, 2)
    assert trained() == outputs | {"blocks.10", "blocks.11"}
    text = {n.split(".")[3] for n, p in towers.named_parameters() if p.requires_grad and ".resblocks." in n}
    assert text == {"10", "11"} and not towers.text.token_embedding.weight.requires_grad


# ---- texts of very unlike length ----


def test_texts_of_3_and_of_64_tokens_in_one_batch_of_siglip(corpus):
    """Each as open_clip reads it alone; what stands behind the short one's end is seen by the tower, and no word."""
    config = json.loads((corpus / "siglip.json").read_text())
    text = config["text_cfg"] | {"context_length": 64}
    model = architectures.Model("small", config | {"text_cfg": text}, None, None)
    theirs = lively(CustomTextCLIP(64, config["vision_cfg"], text))
    towers = build_towers(config_of(model, False, {}, str(corpus / "tokenizer"))).eval()
    load_towers_weights(towers, theirs.state_dict(), source="their state dict")
    tokens, mask = towers.tokenize(["red blue", "very red " * 50], 64)
    ids = json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    long = [ids["very"], ids["red"]] * 32
    assert tokens.tolist() == [[ids["red"], ids["blue"]] + [ids["</s>"]] * 62, long[:63] + [ids["</s>"]]]
    assert mask.sum(dim=1).tolist() == [2, 63]
    with torch.no_grad():
        eos, words = towers.encode_text(tokens)
        want = torch.cat([theirs.encode_text(row[None], normalize=False) for row in tokens])
        alone = torch.cat([towers.encode_text(row[None])[1] for row in tokens])
    torch.testing.assert_close(eos, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(words, alone, rtol=1e-5, atol=1e-5)
    assert (eos[0] - eos[1]).abs().max() > 0.1


# ---- all models ----


class Unfilled(TorchFunctionMode):
    """What works in place does nothing: on meta there are no values, and to draw them takes two thirds of the time."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def test_every_model_is_accepted():
    """All that open_clip builds without a hub: widths, context and, with every tag, how pictures are made."""
    built, starts = 0, 0
    for name in open_clip.list_models():
        model = architectures.find_model(name)
        for tag in open_clip.list_pretrained_tags_by_model(name):
            said = open_clip.get_pretrained_cfg(name, tag)
            want = merge_preprocess_dict(PreprocessCfg(), said)
            got = architectures._pictures(tag, said)
            assert {key: want[key] for key in got} == got, (name, tag)
        if "hf_model_name" in model.config["text_cfg"]:
            continue
        with torch.device("meta"), torch.no_grad(), Unfilled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's deprecations
            towers = build_towers(config_of(model, bool(model.config.get("quick_gelu")), model.pictures or {}, None))
            assert towers.dim == model.config["embed_dim"]
            assert towers.context_length == model.config["text_cfg"]["context_length"]
            assert towers.picture.size == model.config["vision_cfg"]["image_size"]
            assert towers.dim % 64 == 0  # heads of 64
            positions = towers.of_text.positional_embedding.shape[0]
            assert positions == towers.context_length + (towers.pool == "cls")
            projection = towers.of_text.text_projection
            out = towers.of_text.ln_final.weight.shape[0] if projection is None else getattr(
                projection, "weight", torch.empty(projection.shape[::-1]) if isinstance(
                    projection, torch.Tensor) else None).shape[0]
            assert out == towers.dim, name
        built, starts = built + 1, starts + bool(towers.text_blocks())
    assert (built, starts) == (134, 126)


@pytest.mark.parametrize("name", ["coca_roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "nllb-clip-base"])
def test_a_text_tower_of_the_hub_that_cannot_be_fetched_is_one_sentence(monkeypatch, name):
    import transformers

    def fail(*args, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr("open_clip.hf_model.AutoConfig.from_pretrained", fail)
    with pytest.raises(ValueError, match="needs the config of .* could not be fetched") as error:
        load_towers(name)
    assert "\n" not in str(error.value)


# ---- pictures ----


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(71, 50), (50, 71), (48, 48), (200, 31)])
def test_a_frame_that_is_not_square_arrives_as_in_open_clips_transform(tmp_path, resize, interpolation, size):
    pixels = np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "00000.jpg", quality=95)
    said = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.5), "resize_mode": resize, "interpolation": interpolation}
    transform = image_transform_v2(PreprocessCfg(size=48, **said), is_train=False)
    with Image.open(tmp_path / "00000.jpg") as opened:
        want = transform(opened)
    pictures = architectures._pictures("a test", said)
    model = architectures.Model("small", {"embed_dim": 64, "vision_cfg": VIT | {"image_size": 48}, "text_cfg": TEXT},
                                None, None)
    towers = build_towers(config_of(model, False, pictures, None))
    seen = read_frames([tmp_path / "00000.jpg"], towers.picture)
    towers.visual.forward = lambda pixels: pixels  # what the tower is given
    torch.testing.assert_close(towers.encode_frames(seen)[0], want, rtol=1e-5, atol=1e-5)


def test_pictures_belong_to_the_tag():
    """The crop of dfn5b's ViT-H-14, which wants its pictures squashed."""
    assert architectures.find_model("ViT-H-14-378").pictures["resize_mode"] == "squash"
    assert architectures.find_model("ViT-H-14").pictures is None  # LAION's are cropped
    for name in ("ViT-H-14", "ViT-H-14-quickgelu", "ViT-H-14-378", "ViT-H-14-378-quickgelu"):
        tag = open_clip.get_pretrained_cfg(name, "dfn5b")
        if tag:
            assert architectures._pictures("dfn5b", tag)["resize_mode"] == "squash"
    assert architectures.find_model("ViT-B-16-SigLIP2").pictures == {
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash", "interpolation": "bicubic"}

"""narvid.towers: every form of weights file, which activation they get, and both towers against the numpy CLIP.

N frames or texts, T tokens of a text, D joint dimension. The small towers have a vocabulary of 600: ids are made here,
the last one is the end token, as in CLIP's.
"""

import json
import zipfile

import numpy as np
import open_clip
import pytest
import reference
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from PIL import Image
from safetensors.torch import save_file

from narvid import towers as clip
from narvid.towers import architectures, pair
from narvid.run import optim
from narvid.data.frames import Picture, read_frames
from narvid.model import Heads, NarVidConfig
from narvid.run.optim import to_half

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 20, "vocab_size": 600, "width": 128, "heads": 2, "layers": 2},
}
END = 599
# TorchScript is deprecated; OpenAI's files remain.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def towers_with_life(seed=0, **changes):
    """Small towers of ours, with QuickGELU."""
    return enliven(clip.build_towers(clip.ClipConfig(**{**SMALL, "quick_gelu": True, **changes})), seed).eval()


def enliven(towers, seed=0):
    """Weights anew, biases, LayerNorms and positions among them: an unread parameter would show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if name != "logit_scale":
                around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # LayerNorm
                parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    return towers


class Holder(torch.nn.Module):
    """Parameters and buffers under the names of a state dict; computes nothing."""

    def __init__(self, state):
        super().__init__()
        inner = {}
        for key, value in state.items():
            head, _, rest = key.partition(".")
            if rest:
                inner.setdefault(head, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(key, torch.nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(key, value)
        for head, part in inner.items():
            self.add_module(head, Holder(part))


def openai_state():
    """What OpenAI's archives hold: fp16 where convert_weights puts it, fp32 elsewhere, and three numbers as buffers."""
    towers = enliven(CLIP(**SMALL, quick_gelu=True))
    convert_weights_to_lp(towers, torch.float16)
    numbers = {"input_resolution": 32, "context_length": 20, "vocab_size": 600}
    return {**towers.state_dict(), **{name: torch.tensor(number) for name, number in numbers.items()}}


def bare_state():
    return {key: value for key, value in openai_state().items() if key not in clip.ARCHIVE_KEYS}


def save_archive(path):
    torch.jit.save(torch.jit.script(Holder(openai_state())), path)


def save_wrapped(path):
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in bare_state().items()}}, path)


FORMS = {
    "archive.pt": save_archive,
    "bare.pt": lambda path: torch.save(bare_state(), path),
    "wrapped.pt": save_wrapped,
    "hub.safetensors": lambda path: save_file(bare_state(), path),
    "dumped.pt": lambda path: torch.save(openai_state(), path),  # an archive's state dict, saved again
}
SAYS_QUICK_GELU = ("archive.pt", "dumped.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model config and every form of the same weights."""
    path = tmp_path_factory.mktemp("clip")
    (path / "small.json").write_text(json.dumps(SMALL))
    for name, save in FORMS.items():
        save(path / name)
    return path


def load(folder, form, quick_gelu=None, **options):
    return clip.load_towers(str(folder / "small.json"), str(folder / form), quick_gelu=quick_gelu, **options)


def refusal(*arguments):
    """The one sentence with which load_clip refuses."""
    with pytest.raises(ValueError) as refused:
        clip.load_towers(*map(str, arguments[:2]), quick_gelu=arguments[2] if arguments[2:] else None)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700
    return str(refused.value)


def some_frames(n=2):
    return torch.tensor(np.random.default_rng(1).integers(0, 256, (n, 3, 32, 32)), dtype=torch.uint8)


def some_texts(n=3, lengths=(4, 9, 2)):
    """Tokens (N, T) of texts of several lengths, zero-padded after the end token."""
    rng = np.random.default_rng(2)
    tokens = torch.zeros(n, max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths[:n]):
        tokens[row, : length - 1] = torch.tensor(rng.integers(1, END, length - 1))
        tokens[row, length - 1] = END
    return tokens


def normalised(frames):
    """(x / 255 - mean) / std with OpenAI's numbers, (N, 3, H, W) float64."""
    mean, std = (np.array(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (frames.numpy() / 255 - mean) / std


# ---- every form of weights, against numpy ----


@pytest.mark.parametrize("form", FORMS)
def test_features_equal_the_numpy_clip_from_every_form_of_file(folder, form):
    towers = load(folder, form, None if form in SAYS_QUICK_GELU else True)
    config = towers.config
    assert config.quick_gelu
    state = {key: value.double().numpy() for key, value in bare_state().items()}
    frames, tokens = some_frames(), some_texts()
    towers.eval()
    with torch.no_grad():
        image = towers.encode_frames(frames)
        eos, words = towers.encode_text(tokens)
    for got, picture in zip(image, normalised(frames)):
        np.testing.assert_allclose(got.numpy(), reference.clip_image(state, picture), rtol=1e-4, atol=1e-4)
    for n, length in enumerate((4, 9, 2)):
        want_eos, want_words = reference.clip_text(state, tokens[n, :length].tolist())
        np.testing.assert_allclose(eos[n].numpy(), want_eos, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(words[n, :length].numpy(), want_words, rtol=1e-4, atol=1e-4)
    assert np.abs(want_eos).max() > 0.1  # or 1e-4 would prove little


def test_the_archive_really_is_torchscript_in_half_precision(folder):
    state = torch.jit.load(folder / "archive.pt").state_dict()
    assert state["visual.conv1.weight"].dtype == state["text_projection"].dtype == torch.float16
    assert state["transformer.resblocks.0.attn.in_proj_weight"].dtype == torch.float16
    assert state["ln_final.weight"].dtype == state["token_embedding.weight"].dtype == torch.float32


def test_weights_are_those_of_the_file_and_fp32(folder):
    towers = load(folder, "archive.pt")
    for key, value in bare_state().items():
        got = towers.state_dict()[key]
        assert got.dtype == torch.float32 and torch.equal(got, value.float())


# ---- which activation ----


def uses_quick_gelu(towers):
    names = {type(m).__name__ for m in towers.modules()}
    assert ("QuickGELU" in names) != ("GELU" in names)
    return "QuickGELU" in names


@pytest.mark.parametrize("form", SAYS_QUICK_GELU)
def test_the_archives_own_keys_choose_quick_gelu_and_contradiction_is_refused(folder, form):
    assert uses_quick_gelu(load(folder, form)) and uses_quick_gelu(load(folder, form, True))
    message = refusal(folder / "small.json", folder / form, False)
    assert form in message and "was trained with QuickGELU" in message and "--no-quick_gelu" in message


@pytest.mark.parametrize("form", [form for form in FORMS if form not in SAYS_QUICK_GELU])
def test_a_file_that_does_not_tell_demands_a_flag(folder, form):
    message = refusal(folder / "small.json", folder / form)
    assert form in message and "--quick_gelu" in message and "--no-quick_gelu" in message
    assert uses_quick_gelu(load(folder, form, True)) and not uses_quick_gelu(load(folder, form, False))


def test_a_model_config_may_say_quick_gelu_itself(folder, tmp_path):
    config = tmp_path / "small-quickgelu.json"
    config.write_text(json.dumps({**SMALL, "quick_gelu": True}))
    assert uses_quick_gelu(clip.load_towers(str(config), str(folder / "bare.pt")))
    assert not uses_quick_gelu(clip.load_towers(str(folder / "small.json")))  # random weights need none


@pytest.fixture
def hub(folder, monkeypatch):
    """A hub that has the small weights under every tag; ViT-B-32 is small here too."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: SMALL)
    monkeypatch.setattr(architectures, "download_pretrained", lambda tag: str(folder / "hub.safetensors"))


@pytest.mark.parametrize(
    ("name", "tag", "quick"),
    [("ViT-B-32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False), ("ViT-B-32-quickgelu", "openai", True)],
)
def test_the_tag_chooses_the_activation(hub, name, tag, quick):
    towers = clip.load_towers(name, tag)
    config = towers.config
    assert uses_quick_gelu(towers) == config.quick_gelu == quick
    assert config.mean == tuple(open_clip.OPENAI_DATASET_MEAN) and config.std == tuple(open_clip.OPENAI_DATASET_STD)
    assert f"was trained with{'' if quick else 'out'} QuickGELU" in refusal(name, tag, not quick)


def test_a_tag_of_another_model_is_refused_with_those_that_exist(hub):
    message = refusal("ViT-B-32", "laion2b_s32b_b82k")  # ViT-L-14's
    assert "laion2b_s32b_b82k" in message and "laion2b_s34b_b79k" in message and "openai" in message


def test_a_failing_download_is_one_sentence(monkeypatch):
    def fail(tag):
        raise OSError("no route to host\n\nCheck your connection\nand try again")

    monkeypatch.setattr(architectures, "download_pretrained", fail)
    message = refusal("ViT-B-32", "openai")
    assert "openai" in message and "no route to host" in message and "--clip_pretrained" in message


# ---- what is refused ----


def change(tmp_path, edit):
    state = openai_state()
    edit(state)
    torch.save(state, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.update(text_projection=torch.zeros(128, 32)), ["another shape", "text_projection", "(128, 32)"]),
        (lambda s: s.pop("ln_final.bias"), ["another model", "1 are missing", "ln_final.bias"]),
        (lambda s: s.update({"visual.extra": torch.zeros(2)}), ["another model", "1 are not known", "visual.extra"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, tmp_path, edit, words):
    message = refusal(folder / "small.json", change(tmp_path, edit))
    assert all(word in message for word in ["changed.pt", *words])


NO_WEIGHTS = ("garbage.pt", "garbage.safetensors", "garbage.zip", "empty.pt", "list.pt", "numbers.pt")


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_a_file_that_holds_no_weights_is_refused(folder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pt" else b"no weights in here, and more than one line\n" * 40)
    if name == "garbage.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("holiday/constants.pkl", "sun")
    if name in ("list.pt", "numbers.pt"):
        torch.save([1, 2] if name == "list.pt" else {"epoch": 3}, path)
    assert name in refusal(folder / "small.json", path, True)


NESTED = "[" * 200_000
CANNOT_BE_BUILT = {json.dumps({"embed_dim": 64, "vision_cfg": SMALL["vision_cfg"] | vision,
                               "text_cfg": SMALL["text_cfg"] | text} | more): word
                   for vision, text, more, word in [
    ({"width": 100, "head_width": 30}, {}, {}, "cannot be built"), ({"layers": 0}, {}, {}, "layers"),
    ({"layers": 10**9}, {}, {}, "300,000"),
    ({"layers": 2.5}, {}, {}, "layers"), ({"widht": 64}, {}, {}, "widht"), ({}, {"heads": 7}, {}, "cannot be built"),
    ({}, {"heads": 0}, {}, "cannot be built"), ({}, {"width": -64}, {}, "below 0"),
    ({}, {}, {"embed_dim": "64"}, "built"),
    ({}, {}, {"vision_cfg": [1]}, "objects"), ({"width": 199_936}, {}, {}, "too many"),
    ({}, {"width": 0, "heads": 1}, {}, "cannot be built"), ({}, {}, {"embed_dim": 0}, "cannot be built"),
    ({"timm_model_name": "nothing"}, {}, {}, "timm"),
    ({"image_size": "32"}, {}, {}, "image side"), ({"image_size": 33}, {}, {}, "image side"),
    ({}, {"context_length": "77"}, {}, "cannot be built"), ({"patch_size": 0}, {}, {}, "image side"),
]}


def test_an_unknown_model_is_refused(folder, tmp_path):
    assert "ViT-B-99" in refusal("ViT-B-99")
    assert "nowhere.json" in refusal(tmp_path / "nowhere.json")
    for text, word in (("{", "malformed JSON"), ('{"embed_dim": 64}', "vision_cfg"), ("[]", "no object"),
                       (NESTED, "nested"), *CANNOT_BE_BUILT.items()):
        (tmp_path / "bad.json").write_text(text)
        assert word in refusal(tmp_path / "bad.json")
    assert "nowhere.pt" in refusal(folder / "small.json", tmp_path / "nowhere.pt")


# ---- running the towers ----


def test_padding_and_trimming_change_no_word():
    towers, tokens = towers_with_life(), some_texts()
    with torch.no_grad():
        eos, words = towers.encode_text(tokens)
        padded = torch.nn.functional.pad(tokens, (0, 11))  # to the context length
        padded[1, 10:] = torch.arange(1, 11)  # what stands after the end token cannot be seen
        for other in (padded, padded[:, :12]):
            got_eos, got_words = towers.encode_text(other)
            torch.testing.assert_close(got_eos, eos, rtol=1e-5, atol=1e-5)
            for n, length in enumerate((4, 9, 2)):
                torch.testing.assert_close(got_words[n, :length], words[n, :length], rtol=1e-5, atol=1e-5)
        alone_eos, alone_words = towers.encode_text(tokens[2:, :2])
        torch.testing.assert_close(alone_eos, eos[2:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone_words, words[2:, :2], rtol=1e-5, atol=1e-5)
        own = CLIP(**SMALL, quick_gelu=True).eval()
        own.load_state_dict(towers.state_dict())
        torch.testing.assert_close(own.encode_text(padded), eos, rtol=1e-5, atol=1e-5)


def test_without_words_the_eos_feature_is_the_same():
    towers, tokens = towers_with_life(), some_texts()
    with torch.no_grad():
        want, _ = towers.encode_text(tokens)
        got, words = towers.encode_text(tokens, words=False)
    assert words is None
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_many_texts_are_read_in_parts_of_like_length(monkeypatch):
    """The same features and gradients in the order they came, with fewer tokens through the tower."""
    towers = towers_with_life().double()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 21, (pair.MANY_TEXTS + 3,), generator=generator)
    tokens = some_texts(len(lengths), lengths.tolist())

    def read(many):
        monkeypatch.setattr(pair, "MANY_TEXTS", many)
        towers.zero_grad()
        eos, words = towers.encode_text(tokens, words=False)
        assert words is None
        (eos * torch.arange(len(eos))[:, None]).sum().backward()
        return eos.detach(), towers.token_embedding.weight.grad.clone()

    shapes = []
    towers.transformer.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape[:2]))
    at_once, in_parts = read(10 ** 9), read(len(tokens))
    whole, *parts = shapes
    assert len(parts) == 4 and sum(n for n, _ in parts) == whole[0] == len(tokens)
    assert sum(n * t for n, t in parts) < 0.75 * whole[0] * whole[1]
    for one, other in zip(at_once, in_parts):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [-1, 0, 1])  # with frozen embeddings the first block's input has no gradient
def test_grad_checkpointing_changes_neither_features_nor_gradients(frozen):
    got = []
    for checkpointing in (False, True):
        towers = towers_with_life().train()
        optim.freeze(towers, frozen)
        towers.set_grad_checkpointing(checkpointing)
        eos, words = towers.encode_text(some_texts())
        image = towers.encode_frames(some_frames())
        (eos.square().sum() + words.square().mean() + image.square().sum()).backward()
        trained = [p for name, p in towers.named_parameters() if name != "logit_scale" and p.requires_grad]
        got.append([eos, words, image, *(p.grad for p in trained)])
    assert all(x is not None and torch.equal(x, y) for x, y in zip(*got))


def test_a_jpg_arrives_as_in_open_clips_own_preprocessing(tmp_path):
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    picture.resize((213, 150)).save(tmp_path / "00000.jpg", quality=95)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(32, is_train=False, mean=mean, std=std)
    with Image.open(tmp_path / "00000.jpg") as opened:
        want = transform(opened)
    towers = towers_with_life()
    towers.visual.forward = lambda pixels: pixels  # what the tower is given
    got = towers.encode_frames(read_frames([tmp_path / "00000.jpg"], Picture(32)))[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_half_towers_compute_close_to_full_ones(folder):
    """Recipe `reported`: the dtypes are again those of OpenAI's file, so the weights are exactly the file's."""
    towers = load(folder, "archive.pt", half=True)
    to_half(towers.eval())
    for key, value in bare_state().items():
        got = towers.state_dict()[key]
        assert got.dtype == value.dtype and torch.equal(got, value), key
    full = load(folder, "archive.pt")
    with torch.no_grad():
        got = (towers.encode_frames(some_frames()), *towers.encode_text(some_texts()))
        want = (full.encode_frames(some_frames()), *full.encode_text(some_texts()))
    for half, whole in zip(got, want):
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), whole, rtol=0.03, atol=0.03)


# ---- the temporal encoders start from the text tower ----


def test_temporal_encoders_start_from_the_text_tower_where_widths_agree():
    text = {"context_length": 20, "vocab_size": 600, "width": 64, "heads": 1, "layers": 3}
    towers, heads = towers_with_life(text_cfg=text), Heads(NarVidConfig(64, temporal_layers=2))
    before = heads.temporal_frames.positions.detach().clone()
    assert heads.start_from_text_tower(towers)
    for encoder in (heads.temporal_frames, heads.temporal_narration):
        assert torch.equal(encoder.positions[:20], towers.positional_embedding)
        for block, text_block in zip(encoder.blocks, towers.transformer.resblocks):
            for name, value in text_block.state_dict().items():
                assert torch.equal(block.state_dict()[name], value), name
    assert torch.equal(heads.temporal_frames.positions[20:], before[20:])  # the text tower has only 20


def test_temporal_encoders_are_left_alone_where_widths_differ():
    towers, heads = towers_with_life(), Heads(NarVidConfig(64, temporal_layers=2))
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    assert not heads.start_from_text_tower(towers)
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_started_block_computes_what_the_text_towers_block_does(quick_gelu):
    """Same weights, same activation: without a mask and with CLIP's LayerNorm eps the two agree."""
    text = {"context_length": 20, "vocab_size": 600, "width": 64, "heads": 1, "layers": 2}
    towers = towers_with_life(text_cfg=text, quick_gelu=quick_gelu, temporal_quick_gelu=quick_gelu)
    heads = Heads(NarVidConfig(64, temporal_layers=2))
    heads.start_from_text_tower(towers)
    x, no_padding = torch.randn(3, 5, 64), torch.zeros(3, 5, dtype=torch.bool)
    with torch.no_grad():
        got = heads.temporal_frames.blocks[0](x, no_padding)
        want = towers.transformer.resblocks[0](x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

"""narvid/towers/tokenizer.py: tokens and words of each family, with small tokenizers built by the library tokenizers.

N texts, T tokens of a text.
"""

import pickle

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from narvid.towers import ClipConfig, build_towers
from narvid.towers.tokenizer import Tokenizer

WORDS = ["a", "dog", "cat", "runs", "on", "the", "red", "beach", "!", "hund", "strand", "läuft"]
# Special tokens in the order of their ids, how a text is framed, and what open_clip says of the tower.
KINDS = {
    "siglip": (["<unk>", "</s>"], "$A </s>", {"pad_token": "</s>", "eos_token": "</s>"},
               {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"}}),
    "siglip2": (["<pad>", "<eos>", "<bos>", "<unk>"], "$A <eos>", {"pad_token": "<pad>", "eos_token": "<eos>"},
                {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"}}),
    "clipa": (["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]",
              {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
              {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"strip_sep_token": True}}),
    "metaclip2": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>",
                  {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}, {"pool_type": "eos", "eos_id": 2}),
}


def make(folder, kind, **options):
    """A tokenizer's folder, and open_clip's text_cfg for it."""
    special, frame, roles, text = KINDS[kind]
    unknown = special[-1] if kind != "siglip" else "<unk>"
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {x for x in frame.split() if x != "$A"}
    backend.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, vocabulary[token]) for token in sorted(named)])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, **roles).save_pretrained(folder / kind)
    return str(folder / kind), {"context_length": 8, "vocab_size": 40, "hf_tokenizer_name": "nobody/nothing", **text,
                                **options}


def of(folder, kind, **options):
    source, text = make(folder, kind, **options)
    return Tokenizer(text, source)


TEXTS = ["a dog runs", "a dog on the red beach runs on the red beach", "cat"]
EXPECTED = {  # tokens of TEXTS at max_words 8, and how many of each are words
    "siglip": ([[2, 3, 5, 1, 1, 1, 1, 1], [2, 3, 6, 7, 8, 9, 5, 1], [4, 1, 1, 1, 1, 1, 1, 1]], [3, 7, 1]),
    "siglip2": ([[4, 5, 7, 1, 0, 0, 0, 0], [4, 5, 8, 9, 10, 11, 7, 1], [6, 1, 0, 0, 0, 0, 0, 0]], [3, 7, 1]),
    "clipa": ([[1, 4, 5, 7, 0, 0, 0, 0], [1, 4, 5, 8, 9, 10, 11, 0], [1, 6, 0, 0, 0, 0, 0, 0]], [4, 7, 2]),
    "metaclip2": ([[0, 4, 5, 7, 2, 1, 1, 1], [0, 4, 5, 8, 9, 10, 11, 2], [0, 6, 2, 1, 1, 1, 1, 1]], [5, 8, 3]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_words(tmp_path, kind):
    tokens, mask = of(tmp_path, kind)(TEXTS, 8)
    want, words = EXPECTED[kind]
    assert tokens.tolist() == want
    assert mask.sum(dim=1).tolist() == words and mask.dtype == torch.bool
    assert all(row[:n].all() and not row[n:].any() for row, n in zip(mask, words))


@pytest.mark.parametrize("kind", KINDS)
def test_short_texts_are_cut_only_for_towers_that_allow_it(tmp_path, kind):
    tokens, mask = of(tmp_path, kind)([TEXTS[0], TEXTS[2]], 8)
    whole = kind != "metaclip2"
    assert tokens.shape == mask.shape == (2, 8 if whole else 5)
    assert tokens.tolist() == [row[:tokens.shape[1]] for row in (EXPECTED[kind][0][0], EXPECTED[kind][0][2])]


@pytest.mark.parametrize("kind", KINDS)
def test_max_words_cuts_the_text_and_keeps_its_end(tmp_path, kind):
    tokens, mask = of(tmp_path, kind)(TEXTS, 4)
    width = 8 if kind != "metaclip2" else 4
    assert tokens.shape == (3, width)
    end = {"siglip": 1, "siglip2": 1, "clipa": 0, "metaclip2": 2}[kind]
    assert tokens[1, 3] == end  # the separator of clipa is taken off again
    assert mask.sum(dim=1).tolist() == {"siglip": [3, 3, 1], "siglip2": [3, 3, 1], "clipa": [3, 3, 2],
                                        "metaclip2": [4, 4, 3]}[kind]
    if width == 8:
        assert (tokens[:, 4:] == {"siglip": 1, "siglip2": 0, "clipa": 0}[kind]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "!!!", "a </s> dog <eos> <pad> [SEP] [CLS] runs &lt;/s&gt; [PAD]"])
def test_a_text_without_words_has_one_and_marks_in_a_text_end_nothing(tmp_path, kind, text):
    tokens, mask = of(tmp_path, kind, context_length=64)([text, "a dog"], 64)
    assert mask.any(dim=1).all()
    if "dog" in text:  # of both, "a", "dog" and "runs" are there, and the only end is the text's own
        vocabulary = {word: len(KINDS[kind][0]) + n for n, word in enumerate(WORDS)}
        words = tokens[0][mask[0]].tolist()
        assert [x for x in words if x in (vocabulary["a"], vocabulary["dog"], vocabulary["runs"])] == [
            vocabulary[word] for word in ("a", "dog", "runs")]
        special = {number for number, token in enumerate(KINDS[kind][0]) if "unk" not in token.lower()}
        own = {"metaclip2": [0, 2], "clipa": [1]}.get(kind, [])
        assert [x for x in words if x in special] == own


def test_other_languages_are_words_too(tmp_path):
    tokens, mask = of(tmp_path, "siglip2")(["Hund läuft Strand", "a dog"], 8)
    assert tokens[0, :4].tolist() == [13, 15, 14, 1] and mask[0].sum() == 3


def test_of_clips_families_only_the_end_token_differs():
    text = ["a dog runs", "a"]
    tokens, mask = Tokenizer({})(text, 77)
    assert tokens.shape == (2, 5) and mask.sum(dim=1).tolist() == [5, 3]
    mobile = Tokenizer({"no_causal_mask": True, "context_length": 77})(text, 20)
    assert mobile[0].shape == (2, 77) and mobile[1].sum(dim=1).tolist() == [5, 3]
    coca = Tokenizer({"embed_cls": True, "context_length": 76})(text, 20)
    assert coca[0].shape == (2, 76) and coca[1].sum(dim=1).tolist() == [4, 2]  # the end token is not pooled
    assert torch.equal(mobile[0][:, :5], tokens) and torch.equal(coca[0][:, :5], tokens)
    pe = Tokenizer({"context_length": 32})(["dog " * 100, "a"], 64)
    assert pe[0].shape == (2, 32) and pe[0][0, -1] == 49407 and pe[1].sum(dim=1).tolist() == [32, 3]
    assert Tokenizer({})([], 77)[0].shape == (0, 0)


def test_lengths_are_those_before_the_cut(tmp_path):
    assert Tokenizer({"context_length": 8})(["dog " * 20], 8)[0].shape == (1, 8)
    assert Tokenizer({"context_length": 8}).lengths(["dog " * 20, "a dog", ""]) == [22, 4, 2]
    assert of(tmp_path, "siglip2").lengths(TEXTS) == [4, 12, 2]


def test_without_its_tokenizer_a_tower_loads_and_tokenize_asks_for_it(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    text = {"context_length": 8, "vocab_size": 40, "width": 64, "heads": 1, "layers": 1, "no_causal_mask": True,
            "pool_type": "last", "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    towers = build_towers(ClipConfig(64, vision, text, custom_text=True))
    assert towers.encode_text(torch.ones(1, 8, dtype=torch.long))[0].shape == (1, 64)
    with pytest.raises(ValueError, match="timm/ViT-B-16-SigLIP.*fetched from the hub.*--tokenizer") as error:
        towers.tokenize(["a dog"], 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong, sentence", [
    ({"vocab_size": 5}, "has 15 tokens and the text tower 5"), ({"eos_id": 1}, "ends a text with token 2"),
])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, wrong, sentence):
    source, text = make(tmp_path, "metaclip2", **wrong)
    if "vocab_size" in wrong:
        sentence = sentence.replace("15", str(len(KINDS["metaclip2"][0]) + len(WORDS)))
    with pytest.raises(ValueError, match=sentence) as error:
        Tokenizer(text, source)(["a dog"], 8)
    assert "--tokenizer" in str(error.value)


def test_a_checkpoints_tokenizer_is_known_by_its_content(tmp_path):
    source, text = make(tmp_path, "siglip2")
    first = Tokenizer(text, source)
    digest = first.digest
    first(TEXTS, 5)
    assert first.digest == digest  # whatever it was called with
    (tmp_path / "siglip2").rename(tmp_path / "elsewhere")
    assert Tokenizer(text, str(tmp_path / "elsewhere"), digest)(["a"], 8)[0].shape == (1, 8)
    other, _ = make(tmp_path, "metaclip2")
    with pytest.raises(ValueError, match="is another tokenizer than the one the model was trained with"):
        Tokenizer(text, other, digest)(["a"], 8)
    assert Tokenizer({}).digest is None


def test_a_worker_gets_a_tokenizer_that_reads_its_files_anew(tmp_path):
    tokenizer = of(tmp_path, "clipa")
    want = tokenizer(TEXTS, 8)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again._loaded is None and all(torch.equal(x, y) for x, y in zip(again(TEXTS, 8), want))

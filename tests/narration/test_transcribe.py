"""narvid/narration/transcribe.py with a tiny random Whisper that ctranslate2 has converted.

It says nothing sensible; what is tested is that sound reaches it, that times are sane, that what is done is kept. Skips
without faster-whisper (pip install -e '.[speech]').
"""

import json
import sys

import numpy as np
import pytest
from test_subtitles import make_index, make_video

from narvid import InputError
from narvid.data.narrations import load_narrations
from narvid.narration import __main__ as narration
from narvid.narration import transcribe


def save_whisper(folder):
    """A Whisper of two layers with a tokenizer of single bytes and the special tokens that Whisper has."""
    import torch
    import transformers
    from ctranslate2.converters import TransformersConverter
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
               "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
               *(f"<|{second / 50:.2f}|>" for second in range(1501))]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0],
                                                unk_token=special[0], pad_token=special[0])
    end, number = 256, {token: 256 + n for n, token in enumerate(special)}
    config = transformers.WhisperConfig(
        vocab_size=256 + len(special), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=number["<|startoftranscript|>"], init_std=0.5)
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens, model.generation_config.begin_suppress_tokens = [], [end]
    model.generation_config.alignment_heads = [[1, 0]]
    model.generation_config.no_timestamps_token_id = number["<|notimestamps|>"]
    model.generation_config.lang_to_id = {f"<|{code}|>": number[f"<|{code}|>"] for code in LANGUAGES}
    model.generation_config.is_multilingual = True
    model.save_pretrained(folder / "hf")
    fast.save_pretrained(folder / "hf")
    transformers.WhisperFeatureExtractor().save_pretrained(folder / "hf")
    TransformersConverter(str(folder / "hf"), copy_files=["tokenizer.json", "preprocessor_config.json"]).convert(
        str(folder / "whisper"))
    return folder / "whisper"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("transformers")
    return save_whisper(tmp_path_factory.mktemp("models"))


def test_what_a_model_hears_becomes_a_narration_and_is_heard_once(whisper, tmp_path, monkeypatch, capsys):
    frames, out = make_index(tmp_path / "frames", {"a": 4, "b": 4, "c": 4, "d": 4}), tmp_path / "s.jsonl"
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mp4", sound=True)
    make_video(tmp_path / "videos" / "b.mp4")
    make_video(tmp_path / "videos" / "c.mp4", sound=True)
    (tmp_path / "videos" / "d.mp4").write_text("no video")
    argv = ["import", str(tmp_path / "videos"), "--frames", str(frames), "--out", str(out), "--speech", str(whisper),
            "--language", "en"]
    narration.main(argv)
    printed = capsys.readouterr().out
    assert "1 files give nothing" in printed and "d.mp4 cannot be opened" in printed
    said = load_narrations(out)
    assert said.keys() == {"a", "b", "c"} and said["b"].sentences == [] and said["a"].sentences
    assert said["a"].source == "speech" and said["a"].sentences == said["c"].sentences
    assert said["a"].captioner == f"faster-whisper {whisper} language=en within=2"
    [journal] = (tmp_path / "s.jsonl.parts").glob("*.speech.jsonl")
    lines = journal.read_text().splitlines()
    assert [json.loads(line)["video"] for line in lines] == ["a", "b", "c"]
    assert all(0 <= start <= end <= 30 and text for start, end, text in json.loads(lines[0])["said"])
    journal.write_text(lines[0] + "\n" + lines[1] + "\n" + lines[2][:9])  # a kill in the middle of a line
    whole, heard = out.read_bytes(), []
    real = transcribe.Transcriber.sentences
    monkeypatch.setattr(transcribe.Transcriber, "sentences",
                        lambda self, sound: heard.append(len(sound)) or real(self, sound))
    narration.main(argv)
    assert len(heard) == 1 and out.read_bytes() == whole
    journal.write_text('{"video": "a", "said": [[0]]}\n')
    with pytest.raises(SystemExit, match="speech.jsonl:1: no line of this journal"):
        narration.main(argv)


def test_a_model_that_is_none(whisper, tmp_path):
    with pytest.raises(InputError, match="no Whisper that faster-whisper can load"):
        transcribe.Transcriber(str(tmp_path)).sentences(np.zeros(16000, np.float32))


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(InputError, match=r"faster_whisper is not installed .* pip install -e '\.\[speech\]'"):
        transcribe.Transcriber("large-v3")

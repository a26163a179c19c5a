"""Each captioner that docs/narration.md names, as a tiny model of its own classes, with its own processor: what it
says hangs on the picture, alone as in a batch, and through the workers. LLaVA and BLIP: test_captioners.py.

What a random model says is nothing; seeds are tried until two pictures get two answers, which none would give if the
picture did not arrive.
"""

import pytest
import torch
from test_captioners import SMALL, TEMPLATE, WORDS
from test_narrate import make_frames, sentences

from narvid import InputError
from narvid.narration import __main__ as narration
from narvid.narration.captioners import LocalCaptioner
from narvid.narration.pictures import check_sees, made_pictures

transformers = pytest.importorskip("transformers")
SEEDS = range(12)
TEXT = SMALL | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
                "max_position_embeddings": 512}
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "initializer_range": 0.5}


def need(*names):
    """The classes of transformers of these names; the test is skipped where a version is older than they are."""
    if missing := [name for name in names if not hasattr(transformers, name)]:
        pytest.skip(f"transformers {transformers.__version__} has no {missing[0]}")
    return [getattr(transformers, name) for name in names]


def make_tokenizer(special: list[str], **named):
    """(tokenizer of whole words, its vocabulary)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *special,
                                                    *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = {"extra_special_tokens": named} if named else {"additional_special_tokens": special}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"], **more), vocabulary


def template(picture: str) -> str:
    return TEMPLATE.replace("<image>", picture)


# ---- the architectures: (processor, function that makes the model) ----


def qwen(model, config, processor, video_processor, rope, **vision):
    """Qwen2.5-VL and Qwen3-VL: as many tokens as the picture has patches."""
    tokenizer, ids = make_tokenizer(["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"])
    pictures = transformers.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64,
                                                  temporal_patch_size=2)
    videos = video_processor(patch_size=8, merge_size=2)
    whole = processor(pictures, tokenizer, videos,
                      chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"))
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0} | rope
    text = TEXT | {"vocab_size": len(ids), "head_dim": 16, "rope_parameters": rope}
    special = {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    return whole, lambda: model(config(text_config=text, vision_config=QWEN | vision, **special))


def need_version_5():
    """Before, these processors took the tokenizer class of their own model alone; a tiny one has the general class."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this processor of transformers 4 takes no tokenizer but its own")


def qwen2_5():
    need_version_5()
    return qwen(*need("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor",
                      "Qwen2VLVideoProcessor"), {}, window_size=32, fullatt_block_indexes=[1])


def qwen3():
    return qwen(*need("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
                {"mrope_interleaved": True}, num_position_embeddings=64, deepstack_visual_indexes=[0])


def smolvlm():
    pytest.importorskip("num2words")  # its processor wants it
    model, config, processor, pictures, videos = need(
        "SmolVLMForConditionalGeneration", "SmolVLMConfig", "SmolVLMProcessor", "SmolVLMImageProcessor",
        "SmolVLMVideoProcessor")
    tokenizer, ids = make_tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"])
    side = {"longest_edge": 32}
    whole = processor(pictures(size=side, max_image_size=side, do_image_splitting=False), tokenizer, videos(size=side),
                      image_seq_len=4, chat_template=TEMPLATE)
    text = TEXT | {"model_type": "llama", "vocab_size": len(ids)}
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    return whole, lambda: model(config(text_config=text, vision_config=vision, image_token_id=ids["<image>"],
                                       scale_factor=2, pad_token_id=3))


def florence2():
    need_version_5()
    model, config, processor = need("Florence2ForConditionalGeneration", "Florence2Config", "Florence2Processor")
    tokenizer, ids = make_tokenizer(["<image>"], image_token="<image>")
    side = {"height": 32, "width": 32}
    pictures = transformers.CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    pictures.image_seq_length = 17  # 4 x 4 patches and their mean
    vision = {"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
              "patch_prenorm": (False, True), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2),
              "window_size": 4, "projection_dim": 32, "max_temporal_embeddings": 10, "max_position_embeddings": 16}
    text = {"model_type": "bart", "d_model": 32, "init_std": 0.5, "max_position_embeddings": 256, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
            "vocab_size": len(ids), "tie_word_embeddings": False}
    text |= {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))}

    def make():
        made = model(config(vision_config=vision, text_config=text, image_token_id=ids["<image>"],
                            tie_word_embeddings=False))
        with torch.no_grad():
            for name, weight in made.named_parameters():
                weight.mul_(8 if "encoder_attn." in name else 1)  # else its decoder hardly listens
        return made

    return processor(image_processor=pictures, tokenizer=tokenizer), make


NAMED = {"qwen2_5": qwen2_5, "qwen3": qwen3, "smolvlm": smolvlm, "florence2": florence2}


@pytest.fixture(scope="module", params=NAMED)
def folder(request, tmp_path_factory):
    """A model of this architecture on disk that says different things of two pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    processor, make = NAMED[request.param]()
    processor.save_pretrained(folder)
    for seed in SEEDS:
        torch.manual_seed(seed)
        make().save_pretrained(folder)
        answers = LocalCaptioner(str(folder), max_new_tokens=8).caption(made_pictures())
        if answers[0] != answers[1] and all(isinstance(answer, str) for answer in answers):
            return folder
    raise AssertionError(f"{request.param}: with each of {len(SEEDS)} seeds two pictures get one answer, {answers}")


def test_what_it_says_hangs_on_the_picture_and_not_on_the_batch(folder):
    captioner, pictures = LocalCaptioner(str(folder), max_new_tokens=8), made_pictures()
    answers = captioner.caption(pictures)
    assert answers[0] != answers[1] and check_sees(captioner, [pictures]) == answers
    assert [captioner.caption([picture])[0] for picture in pictures] == answers
    assert captioner.caption(pictures[::-1]) == answers[::-1]


def test_its_pictures_are_prepared_by_workers(folder, tmp_path):
    frames, said = make_frames(tmp_path / "frames", {"a": 2, "b": 2}), []
    for workers in (0, 1):
        out = tmp_path / f"{workers}.jsonl"
        narration.main(["narrate", "--frames", str(frames), "--out", str(out), "--captioner", str(folder),
                        "--max_new_tokens", "8", "--batch_size", "2", "--workers", str(workers)])
        said.append(sentences(out))
    assert said[0] == said[1] and said[0].keys() == {"a", "b"}


def test_what_preparing_costs_is_measured_for_both_families(tmp_path, capsys):
    from scripts import bench_narrate

    frames = make_frames(tmp_path / "frames", {"a": 4})
    bench_narrate.main(["--frames", str(frames), "--pictures", "16", "--batch_size", "4", "--only", "preparing"])
    printed = capsys.readouterr().out
    assert printed.count("preparing, LLaVA 1.5") == printed.count("preparing, Qwen2-VL") >= 2
    assert printed.count("1 workers, batches of 4") == 2 and "client" not in printed


def test_florence_knows_its_own_prompts_alone(tmp_path):
    processor, make = florence2()
    processor.save_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    assert LocalCaptioner(str(tmp_path)).prompt == "<DETAILED_CAPTION>"
    assert LocalCaptioner(str(tmp_path), "<CAPTION>").prompt == "<CAPTION>"
    with pytest.raises(InputError, match="'florence2' models know the prompts <DETAILED_CAPTION> <CAPTION>"):
        LocalCaptioner(str(tmp_path), "C")

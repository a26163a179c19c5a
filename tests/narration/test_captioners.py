"""narvid/narration/captioners.py with real models, small and random: LLaVA, BLIP, and LLaVA behind a server.

A random LLaVA says nothing sensible, but what it says hangs on every pixel, on the prompt and on the decoding, which is
what is tested. The server is transformers' own; it starts while the other tests run.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_narrate import make_frames, sentences

from narvid import InputError
from narvid.data import loader
from narvid.narration import captioners, preparing
from narvid.narration import __main__ as narration
from narvid.narration.answers import Cut, Failed
from narvid.narration.captioners import LocalCaptioner
from narvid.narration.pictures import check_sees, made_pictures
from narvid.data.narrations import load_narrations

transformers = pytest.importorskip("transformers")
WORDS = [*captioners.PROMPTS["C"].split(), "USER:", "ASSISTANT:", *(f"word{n}" for n in range(200))]
SPECIAL = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "initializer_range": 0.5}
TEMPLATE = ("{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
            "<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:")


# ---- the models ----


def save_llava(folder: Path, *, template: str | None = TEMPLATE, blind: bool = False) -> Path:
    """A LLaVA of two layers; `blind`: its projector maps every picture to nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate([*SPECIAL.values(), "<image>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL, additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"])
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        pictures, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**SMALL, vocab_size=len(vocabulary), bos_token_id=1, eos_token_id=2,
                                             pad_token_id=3),
        image_token_index=vocabulary["<image>"], image_seq_length=16)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    if blind:
        torch.nn.init.zeros_(model.get_submodule("model.multi_modal_projector.linear_2").weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """A BLIP of two layers, its output weights not tied to its input's, or it would repeat one word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder / "words")
    config = transformers.BlipConfig(
        text_config={**SMALL, "vocab_size": len(special) + len(WORDS), "encoder_hidden_size": 32, "bos_token_id": 2,
                     "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "tie_word_embeddings": False},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8}, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module", autouse=True)
def server(llava):
    """`transformers serve` of the small LLaVA -> its address, not waited for; None where that command is not there."""
    if not all(map(importlib.util.find_spec, ("openai", "fastapi", "uvicorn", "transformers.cli"))):
        yield None  # transformers[serving], 5.0 or newer
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", llava, "--port", port, "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return make_frames(tmp_path_factory.mktemp("frames"), {"a": 4, "b": 2})


@pytest.fixture(scope="module")
def pictures(frames) -> list[bytes]:
    return [path.read_bytes() for path in sorted(frames.glob("*/*.jpg"))]


def captioner(model, prompt=None, **more) -> LocalCaptioner:
    return LocalCaptioner(str(model), prompt, max_new_tokens=8, **more)


# ---- a model in this process ----


def test_greedy_sentences_are_the_model_s_likeliest_tokens(llava, pictures):
    processor = transformers.AutoProcessor.from_pretrained(llava)
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    expected = []
    for picture in pictures[:2]:
        image = Image.open(BytesIO(picture)).convert("RGB")
        text = f"USER: <image>\n{captioners.PROMPTS['C']} ASSISTANT:"
        inputs = processor(text=text, images=image, return_tensors="pt")
        tokens = []
        while len(tokens) < 8 and 2 not in tokens:
            added = torch.tensor([tokens], dtype=torch.long)
            ids = torch.cat([inputs["input_ids"], added], dim=1)  # (1, prompt + tokens)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids),
                               pixel_values=inputs["pixel_values"]).logits
            tokens.append(int(logits[0, -1].argmax()))
        expected.append(" ".join(processor.decode(tokens, skip_special_tokens=True).split()))
    assert captioner(llava).caption(pictures[:2]) == expected


def test_a_sentence_hangs_on_its_picture_and_prompt_and_not_on_the_batch(llava, pictures):
    local = captioner(llava)
    answers = local.caption(pictures)
    assert len(set(answers)) == len(pictures)
    assert [local.caption([picture])[0] for picture in pictures] == answers
    assert captioner(llava, "Please").caption(pictures) != answers
    assert local.label == f"{llava} fp32 greedy max_new_tokens=8" and local.prompt == captioners.PROMPTS["C"]
    assert check_sees(local, [made_pictures()]) == local.caption(made_pictures())


def test_sampling_hangs_on_seed_and_key_alone(llava, pictures):
    local = captioner(llava, temperature=2.0, seed=1)
    keys = [f"a {n}" for n in range(3)]
    answers = local.caption(pictures[:3], keys)
    assert local.caption(pictures[2::-1], keys[::-1]) == answers[::-1]
    assert local.caption(pictures[:1], ["b 0"]) != answers[:1]
    assert captioner(llava, temperature=2.0, seed=2).caption(pictures[:3], keys) != answers
    assert local.caption(pictures[:3]) == captioner(llava).caption(pictures[:3])  # no keys: greedy
    assert local.label.endswith("fp32 sample temperature=2 seed=1 max_new_tokens=8")


def test_workers_change_no_sentence_and_batches_hold_pictures_of_like_size(llava, tmp_path, monkeypatch):
    """Greedy and sampled; half the pictures are larger, and their videos lie between the others in the index."""
    frames = make_frames(tmp_path / "frames", {"a": 3, "b": 3, "c": 2, "d": 2})
    for path in [*frames.glob("b/*.jpg"), *frames.glob("d/*.jpg")]:
        Image.open(path).resize((96, 48)).save(path, quality=95)
    for how in ([], ["--sample", "--sampling_temperature", 2]):
        said, sizes = [], []
        for workers in (0, 2):
            if how:
                monkeypatch.setattr(loader, "free_shared_memory", lambda: 0)  # then they use a pipe
            out = tmp_path / f"{workers}{len(how)}.jsonl"
            narrate(frames, out, "--captioner", llava, "--batch_size", 2, "--workers", workers, *how)
            said.append(sentences(out))
            journal = (out.with_name(out.name + ".parts") / "1-of-1.jsonl").read_text().splitlines()
            sizes.append([json.loads(line)["video"] in "bd" for line in journal])
        assert said[0] == said[1] and len({text for texts in said[0].values() for text in texts}) == 10
        assert sizes[0] == sizes[1] == [False] * 5 + [True] * 5
    next(frames.glob("c/00001.jpg")).write_bytes(b"\xff\xd8 torn \xff\xd9")
    message = error(frames, tmp_path / "n.jsonl", "--captioner", llava, "--workers", 1, "--same_frame", 0)
    assert "c/00001.jpg cannot be decoded" in message


def test_as_many_workers_as_cores_are_left(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert preparing.free_workers(on_gpu=False) == 0
    assert [preparing.free_workers(on_gpu=True) for size in (1, 2, 4, 12)
            if not monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))] == [8, 5, 2, 1]


def test_llava_without_a_template_gets_the_prompt_of_its_model_card(llava, pictures, tmp_path):
    plain = captioner(save_llava(tmp_path, template=None))
    assert plain.caption(pictures[:2]) == captioner(llava).caption(pictures[:2])


def test_bf16_is_recorded_and_used(llava, pictures):
    local = captioner(llava, dtype="bf16")
    assert all(isinstance(answer, str) for answer in local.caption(pictures[:2]))
    assert {p.dtype for p in local._model.parameters()} == {torch.bfloat16} and " bf16 greedy" in local.label


def test_an_answer_is_cut_where_the_limit_comes_before_the_model_s_own_end(llava, pictures):
    local = captioner(llava)
    answers = local.caption(pictures)
    assert {type(answer) for answer in answers} == {Cut}
    words = answers[0].split()
    local._model.generation_config.eos_token_id = local._processor.tokenizer.convert_tokens_to_ids(words[3])
    ends = [words[3] in answer.split() for answer in answers]
    assert len(set(ends)) == 2  # one batch has both
    ended = local.caption(pictures)
    assert [type(answer) is str for answer in ended] == ends
    assert ended[0].split() == words[: words.index(words[3]) + 1]


def test_a_block_that_the_template_opens_and_nobody_closes_is_no_sentence(pictures, tmp_path):
    thinks = captioner(save_llava(tmp_path, template=TEMPLATE + " <think>\n"))
    [answer] = thinks.caption(pictures[:1])
    assert answer.kind == "cut" and "limit of 8" in answer.why


def test_blip_takes_the_picture_alone(tmp_path, pictures):
    blip = captioner(save_blip(tmp_path))
    answers = blip.caption(pictures)
    assert len(set(answers)) > 1 and not any(isinstance(answer, Failed) for answer in answers)
    assert [blip.caption([picture])[0] for picture in pictures] == answers and blip.prompt == ""
    with pytest.raises(InputError, match="take no prompt"):
        captioner(tmp_path, "A")


def test_the_prompts_of_table_7():
    assert captioners.prompt_text("A") == "Briefly describe the object in the image in one sentence."
    assert captioners.prompt_text(None) == captioners.prompt_text("C") != captioners.prompt_text("B")
    assert captioners.prompt_text("What is it?") == "What is it?"


# ---- what is refused ----


def narrate(frames, out, *more) -> None:
    narration.main([str(x) for x in ("narrate", "--frames", frames, "--out", out, "--max_new_tokens", 8, *more)])


def error(frames, out, *more) -> str:
    with pytest.raises(SystemExit) as stopped:
        narrate(frames, out, *more)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_model_that_does_not_see_is_found_out(frames, tmp_path):
    blind = save_llava(tmp_path / "blind", blind=True)
    assert "the picture does not reach the model" in error(frames, tmp_path / "n.jsonl", "--captioner", blind)
    assert not (tmp_path / "n.jsonl").exists()


def test_a_template_that_drops_the_picture_is_found_out(frames, tmp_path):
    deaf = save_llava(tmp_path / "deaf", template=TEMPLATE.replace("<image>", ""))
    message = error(frames, tmp_path / "n.jsonl", "--captioner", deaf)
    assert "cannot caption a picture" in message or "does not reach the model" in message


def test_models_that_cannot_caption(frames, tmp_path):
    message = error(frames, tmp_path / "n.jsonl", "--captioner", tmp_path / "nowhere")
    assert "nowhere" in message and "no model that transformers can read" in message
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SMALL, vocab_size=99, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    transformers.BertTokenizerFast.from_pretrained(save_blip(tmp_path / "blip") / "words").save_pretrained(folder)
    assert "'llama' models" in error(frames, tmp_path / "n.jsonl", "--captioner", folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_4_bits_need_a_gpu(frames, tmp_path, llava):
    assert "needs a GPU" in error(frames, tmp_path / "n.jsonl", "--captioner", llava, "--load_4bit")


def test_without_the_library_it_says_what_to_install(frames, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = error(frames, tmp_path / "n.jsonl")
    assert "transformers is not installed" in message and "pip install -e '.[captioners]'" in message


# ---- through the command line, here and behind a server ----


def wait_for(address: str, seconds: float = 120) -> None:
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    for _ in range(int(seconds / 0.1)):
        with socket.socket() as client:
            if client.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no server at {address}")


@pytest.mark.slow
def test_a_server_says_what_the_model_itself_says(frames, tmp_path, llava, server):
    if server is None:
        pytest.skip("no `transformers serve`: pip install 'transformers[serving]>=5'")
    local, served = tmp_path / "local.jsonl", tmp_path / "served.jsonl"
    narrate(frames, local, "--captioner", llava, "--batch_size", 4)
    assert [len(texts) for texts in sentences(local).values()] == [4, 2]
    assert len({text for texts in sentences(local).values() for text in texts}) == 6
    assert load_narrations(local)["a"].captioner == f"{llava} fp32 greedy max_new_tokens=8 same_frame=5"
    wait_for(server)
    narrate(frames, served, "--server", server, "--model", llava, "--batch_size", 1)
    assert sentences(served) == sentences(local)
    assert load_narrations(served)["a"].captioner == f"{llava} server greedy max_new_tokens=8 same_frame=5"

"""Picture -> sentence: an image-text model in this process (transformers), or a server that speaks OpenAI's protocol.

Two captioners with one form. Making one is cheap: no weight is loaded and no request sent before the first picture.
  label                                  str, recorded with every narration: model, number type, decoding
  prompt                                 str, recorded too; "" for a model that takes none
  caption(pictures, keys=None) -> list   of str, or Failed where there is no sentence
A picture is the bytes of an image file, so that a server gets a frame as it lies on the disk. `keys` name the pictures
(video and time): with sampling, a picture's random numbers come from its key and the seed, never from its neighbours
in a batch. Without keys the decoding is greedy.
Not here: videos, frame folders, resumption, flags (narrate.py).
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import threading
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from io import BytesIO
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

from narvid import InputError

# torch, transformers and openai are imported where they are used: a client needs no torch, the other two are optional.

DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"  # the paper's captioner (App. C)
MAX_NEW_TOKENS = 77  # CLIP's context: what a longer answer adds never reaches the text tower
PROMPTS = {  # Table 7, word for word; Table 8 compares them and settles on C
    "A": "Briefly describe the object in the image in one sentence.",
    "B": (
        "You want to view an image, one of the frames in a video clip, and organize the text description into a single "
        "sentence. Follow these steps. 1. Analyze the input image by dividing it into objects, actions, and other "
        "parts. 2. Create a one-sentence text description based on your previous analysis. 3. Output only the "
        "processed text without any additional description."
    ),
    "C": "Please describe this image for image-captioning task",
}
WITHOUT_PROMPT = ("blip", "blip-2", "git")  # model types that were trained to caption a picture and nothing else
WITHOUT_TEMPLATE = {"llava": "USER: <image>\n{prompt} ASSISTANT:"}  # model type -> the form on its model card


class Failed(NamedTuple):
    """In place of a sentence: why there is none."""

    why: str


class LocalCaptioner:
    """An image-text model of the transformers library, by hub name or folder, on this process's GPU or the CPU.

    prompt: a key of PROMPTS or any text, None for C. dtype: bf16, fp16 or fp32; None for bf16 on a GPU, fp32 without.
    temperature: None is greedy. Raises InputError for a model that cannot be read or whose prompt form is unknown.
    """

    def __init__(
        self,
        model: str,
        prompt: str | None = None,
        *,
        dtype: str | None = None,
        load_4bit: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        seed: int = 0,
    ):
        import torch

        transformers = _optional("transformers")
        self._device = torch.device("cpu")
        if torch.cuda.is_available():
            _optional("accelerate")  # puts the weights on the GPU without a copy in memory for each process
            self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if load_4bit:
            if self._device.type == "cpu":
                raise InputError("--load_4bit needs a GPU, and none is visible; leave it out")
            _optional("bitsandbytes")
        dtype = dtype or ("fp32" if self._device.type == "cpu" else "bf16")
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        try:
            kind = transformers.AutoConfig.from_pretrained(model).model_type
            self._processor = transformers.AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"--captioner {model}: no model that transformers can read ({_line(error)})") from error
        self._model_name, self._load_4bit, self._max_new_tokens = model, load_4bit, max_new_tokens
        self._temperature, self._seed = temperature, seed
        self._template, self.prompt = self._prompt_form(kind, prompt)
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # a decoder goes on where the prompt ends
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        number_type = dtype + " 4bit" * load_4bit
        self.label = f"{model.rstrip('/')} {number_type} {_decoding(temperature, seed, max_new_tokens)}"

    def _prompt_form(self, kind: str, prompt: str | None) -> tuple[str | None, str]:
        """(text that stands for picture and prompt, or None for the picture alone; the prompt to record)."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt_text(prompt)}]
            messages = [{"role": "user", "content": content}]
            text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return text, prompt_text(prompt)
        if kind in WITHOUT_TEMPLATE:
            return WITHOUT_TEMPLATE[kind].format(prompt=prompt_text(prompt)), prompt_text(prompt)
        if kind not in WITHOUT_PROMPT:
            raise InputError(
                f"--captioner {self._model_name}: its processor has no chat template and this file knows no prompt "
                f"form of {kind!r} models; take another one, or serve it and use --server"
            )
        if prompt is not None:
            raise InputError(f"--captioner {self._model_name}: {kind!r} models take no prompt; leave --prompt out")
        return None, ""

    @cached_property
    def _model(self):
        import torch
        import transformers

        place = {"device_map": {"": self._device}} if self._device.type == "cuda" else {}
        if self._load_4bit:
            place["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=self._dtype
            )
        try:
            auto = transformers.AutoModelForImageTextToText
            model = auto.from_pretrained(self._model_name, dtype=self._dtype, **place)  # in eval mode
        except (OSError, ValueError, ImportError) as error:
            raise InputError(
                f"--captioner {self._model_name}: no image-text model that transformers can load ({_line(error)})"
            ) from error
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"--captioner {self._model_name} does not fit into the GPU's memory; try --load_4bit or a smaller model"
            ) from error
        tokenizer = getattr(self._processor, "tokenizer", None)
        if model.generation_config.pad_token_id is None and tokenizer is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    def caption(self, pictures: Sequence[bytes], keys: Sequence[str] | None = None) -> list[str | Failed]:
        """One answer a picture: in one batch, or one by one where they are sampled."""
        import torch

        if keys is None or self._temperature is None:
            return self._generate(pictures, do_sample=False, temperature=None, top_p=None, top_k=None)
        _ = self._model  # loaded before the first seed is set: loading may draw random numbers
        answers = []
        for picture, key in zip(pictures, keys, strict=True):
            torch.manual_seed(_seed_of(self._seed, key))
            # The temperature is all there is to record: what else a model's own settings would cut off is switched off.
            answers += self._generate([picture], do_sample=True, temperature=self._temperature, top_p=1.0, top_k=0)
        return answers

    def _generate(self, pictures: Sequence[bytes], **decoding) -> list[str | Failed]:
        import torch

        decoded = [Image.open(BytesIO(picture)).convert("RGB") for picture in pictures]
        try:
            inputs = self._inputs(decoded).to(self._device, self._dtype)
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs, num_beams=1, max_new_tokens=self._max_new_tokens, **decoding
                )  # (N, prompt + new), or (N, new) where an encoder has read the prompt
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"the GPU's memory is too small for {len(pictures)} pictures at once: lower --batch_size "
                "(what is captioned is kept)"
            ) from error
        except (ValueError, TypeError) as error:
            raise InputError(f"--captioner {self._model_name} cannot caption a picture: {_line(error)}") from error
        prompt = inputs.get("input_ids")  # (N, prompt)
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        return [_sentence(text) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, pictures: list[Image.Image]):
        if self._template is None:
            return self._processor(images=pictures, return_tensors="pt")
        start = self._processor.tokenizer.bos_token
        return self._processor(
            text=[self._template] * len(pictures),
            images=[[picture] for picture in pictures],  # flat, some processors take them for one text's pictures
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (start and self._template.startswith(start)),  # templates may hold the start token
        )


class ServerCaptioner:
    """A model behind an OpenAI-compatible /chat/completions: vLLM, `transformers serve`, llama.cpp, a hosted one.

    url: with its path; /v1 is added to one that has none. The key is read from the environment variable `api_key_env`.
    timeout: seconds for one request. 408, 409, 429, 5xx, timeouts and broken connections are tried again `retries`
    times, with exponential back-off and jitter (the openai library's); then the picture counts as failed.
    requests_per_second: between the starts of new requests; a repeated one follows the back-off alone.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        seed: int = 0,
        api_key_env: str | None = None,
        retries: int = 5,
        timeout: float = 60.0,
        requests_per_second: float | None = None,
    ):
        openai = _optional("openai")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"--server {url}: no address such as http://localhost:8000/v1")
        if api_key_env and not os.environ.get(api_key_env):
            raise InputError(f"--api_key_env {api_key_env}: the environment has no such variable, or an empty one")
        key = os.environ.get(api_key_env or "OPENAI_API_KEY") or "none"  # a server of one's own wants none
        url = url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"
        self._url, self._model, self._max_new_tokens = url, model, max_new_tokens
        self._temperature, self._seed = temperature, seed
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout)
        self._pause = 1 / requests_per_second if requests_per_second else 0.0
        self._next_start, self._lock = 0.0, threading.Lock()
        self.prompt = prompt_text(prompt)
        self.label = f"{model} server {_decoding(temperature, seed, max_new_tokens)}"

    def caption(self, pictures: Sequence[bytes], keys: Sequence[str] | None = None) -> list[str | Failed]:
        """One answer a picture, one request after the other; may be called from many threads."""
        return [self._ask(*pair) for pair in zip(pictures, keys or [None] * len(pictures), strict=True)]

    def _ask(self, picture: bytes, key: str | None) -> str | Failed:
        import openai

        sampling = {"temperature": 0.0}
        if key is not None and self._temperature is not None:
            sampling = {"temperature": self._temperature, "seed": _seed_of(self._seed, key)}
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.prompt}]
        self._wait_for_turn()
        try:
            answer = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                max_tokens=self._max_new_tokens,
                **sampling,
            )
            return _sentence(answer.choices[0].message.content)
        except openai.APIError as error:
            status = getattr(error, "status_code", type(error).__name__)  # timeouts and broken connections have none
            return Failed(f"{self._url}: {status}: {_line(error)}")
        except (ValueError, TypeError, AttributeError, IndexError):  # a page, half a JSON, no choices
            return Failed(f"{self._url}: the answer is no chat completion")

    def _wait_for_turn(self) -> None:
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + self._pause
        time.sleep(max(0.0, start - time.monotonic()))


Captioner = LocalCaptioner | ServerCaptioner


# ---- what both share ----


def prompt_text(prompt: str | None) -> str:
    """The text of prompt A, B or C (Table 7); any other text as it is; None for C, the paper's choice (Table 8)."""
    return PROMPTS.get(prompt or "C", prompt)


def _decoding(temperature: float | None, seed: int, max_new_tokens: int) -> str:
    how = "greedy" if temperature is None else f"sample temperature={temperature:g} seed={seed}"
    return f"{how} max_new_tokens={max_new_tokens}"


def _seed_of(seed: int, key: str) -> int:
    """31 bits (servers take no more) from the run's seed and a picture's key."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big") >> 1


def _sentence(text: object) -> str | Failed:
    """An answer in one line, or Failed for one without a word."""
    if not isinstance(text, str):
        return Failed("the answer holds no text")
    text = " ".join(text.encode("utf-8", "replace").decode().split())  # half a surrogate pair cannot be written
    return text or Failed("the answer is empty")


def _line(error: Exception) -> str:
    """The first line of an error's message; libraries add advice below."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _optional(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        packages = "bitsandbytes" if name == "bitsandbytes" else "-e '.[captioners]'"
        raise InputError(
            f"{name} is not installed ({_line(error)}); in the repository run: pip install {packages}"
        ) from error


# ---- does the picture reach the model? ----


def made_pictures() -> tuple[bytes, bytes]:
    """Two jpgs that nobody would describe alike: a red disc on white, white stripes on blue."""
    disc, stripes = Image.new("RGB", (336, 336), "white"), Image.new("RGB", (336, 336), (20, 40, 160))
    ImageDraw.Draw(disc).ellipse((60, 60, 276, 276), fill=(220, 20, 20))
    for left in range(0, 336, 56):
        ImageDraw.Draw(stripes).rectangle((left, 0, left + 20, 336), fill="white")
    files = BytesIO(), BytesIO()
    for picture, file in zip((disc, stripes), files, strict=True):
        picture.save(file, "JPEG", quality=95)
    return files[0].getvalue(), files[1].getvalue()


def check_sees(captioner: Captioner, pairs: Iterable[Sequence[bytes]]) -> list[str]:
    """The answers to the first pair of different pictures that differ; InputError where those of every pair are alike.

    A prompt without the image token, a template that drops the picture and a text-only model all give fluent sentences
    about nothing. Decoding is greedy here, so that only the picture can make a difference.
    """
    answers = []
    for pair in pairs:
        answers = captioner.caption(pair)
        for answer in answers:
            if isinstance(answer, Failed):
                raise InputError(f"{captioner.label}: no sentence for a first picture ({answer.why})")
        if answers[0] != answers[1]:
            return answers
    raise InputError(
        f"{captioner.label}: two different pictures get the same sentence, {answers[0][:80]!r}: the picture does not "
        "reach the model; its prompt lacks the image token, its chat template drops images, or it is a text-only model"
    )

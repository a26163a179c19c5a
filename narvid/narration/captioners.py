"""Picture -> sentence: the form of a captioner, and the one that runs a model in this process (transformers).

Not here: models behind a server (chat_server.py), pictures as a model reads them (preparing.py), what an answer is
worth (answers.py), whether the picture is seen (pictures.py), frame folders, resumption, flags (narrate.py).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from narvid import InputError
from narvid.narration.answers import OPEN, Failed, one_line, sentence
from narvid.narration.preparing import Preparer

# torch and transformers are imported where they are used: a server's client needs neither.

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
    "S": "Describe what happens in this image in one short sentence of at most 20 words.",  # ours, for short towers
}
WITHOUT_PROMPT = ("blip", "blip-2", "git")  # model types that were trained to caption a picture and nothing else
WITHOUT_TEMPLATE = {"llava": "USER: <image>\n{prompt} ASSISTANT:"}  # model type -> the form on its model card
TASKS = {"florence2": ("<DETAILED_CAPTION>", "<CAPTION>", "<MORE_DETAILED_CAPTION>")}  # model type -> all its prompts


class Captioner(Protocol):
    """What both captioners are. Making one is cheap: no weight is loaded and no request sent before the first picture.

    label: recorded with every narration: model, number type, decoding. prompt: recorded too; "" for a model that takes
    none.
    """

    label: str
    prompt: str

    def caption(self, pictures: Sequence[bytes], keys: Sequence[str] | None = None) -> list[str | Failed]:
        """One answer a picture: a sentence, or Failed where there is none.

        pictures: the bytes of image files, so that a server gets a frame as it lies on the disk. keys name the pictures
        (video and time): with sampling, a picture's random numbers come from its key and the seed, never from its
        neighbours in a batch. Without keys the decoding is greedy.
        """


class LocalCaptioner:
    """An image-text model of the transformers library, by hub name or folder, on this process's GPU or the CPU.

    prompt: a key of PROMPTS or any text, None for C. one_sentence: answers are cut at their first full stop.
    dtype: bf16, fp16 or fp32; None for bf16 on a GPU, fp32 without.
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
        one_sentence: bool = False,
    ):
        import torch

        transformers = optional("transformers")
        self._device = torch.device("cpu")
        if torch.cuda.is_available():
            optional("accelerate")  # puts the weights on the GPU without a copy in memory for each process
            self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if load_4bit:
            if self._device.type == "cpu":
                raise InputError("--load_4bit needs a GPU, and none is visible; leave it out")
            optional("bitsandbytes")
        dtype = dtype or ("fp32" if self._device.type == "cpu" else "bf16")
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        try:
            kind = transformers.AutoConfig.from_pretrained(model).model_type
            self._processor = transformers.AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            why = first_line(error)
            raise InputError(f"--captioner {model}: no model that transformers can read ({why})") from error
        self._model_name, self._load_4bit, self._max_new_tokens = model, load_4bit, max_new_tokens
        self._temperature, self._seed, self._one_sentence = temperature, seed, one_sentence
        self._template, self.prompt = self._prompt_form(kind, prompt)
        opened = re.search(OPEN.pattern + r"\s*$", self._template or "", re.IGNORECASE)
        self._opened = opened[0] if opened else ""  # some templates begin the reasoning themselves
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # a decoder goes on where the prompt ends
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.prepare = Preparer(model, self._processor, self._template)
        number_type = dtype + " 4bit" * load_4bit
        self.label = f"{model.rstrip('/')} {number_type} {decoding(temperature, seed, max_new_tokens, one_sentence)}"

    def _prompt_form(self, kind: str, prompt: str | None) -> tuple[str | None, str]:
        """(text that stands for picture and prompt, or None for the picture alone; the prompt to record)."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt_text(prompt)}]
            messages = [{"role": "user", "content": content}]
            text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return text, prompt_text(prompt)
        if kind in TASKS:
            if prompt not in (None, *TASKS[kind]):
                raise InputError(f"--captioner {self._model_name}: {kind!r} models know the prompts "
                                 f"{' '.join(TASKS[kind])} alone; give one of them, or leave --prompt out")
            return prompt or TASKS[kind][0], prompt or TASKS[kind][0]
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
                f"--captioner {self._model_name}: no image-text model that transformers can load ({first_line(error)})"
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
        if keys is None or self._temperature is None:
            return self.generate([self.prepare(pictures)], None)
        return self.generate([self.prepare([picture]) for picture in pictures], keys)

    @property
    def samples(self) -> bool:
        """Whether `generate` wants the inputs of each picture by themselves, with its key."""
        return self._temperature is not None

    @property
    def on_gpu(self) -> bool:
        """Where the model runs."""
        return self._device.type == "cuda"

    def generate(self, inputs: Sequence, keys: Sequence[str] | None) -> list[str | Failed]:
        """The answers to what `prepare` made of pictures: of all in one, or with keys of one picture each."""
        import torch

        if keys is None:
            [of_all] = inputs
            return self._generate(of_all, do_sample=False, temperature=None, top_p=None, top_k=None)
        _ = self._model  # loaded before the first seed is set: loading may draw random numbers
        answers = []
        for of_one, key in zip(inputs, keys, strict=True):
            torch.manual_seed(seed_of(self._seed, key))
            # The temperature is all there is to record: what else a model's own settings would cut off is switched off.
            answers += self._generate(of_one, do_sample=True, temperature=self._temperature, top_p=1.0, top_k=0)
        return answers

    def _generate(self, inputs, **decoding) -> list[str | Failed]:
        import torch

        inputs = {name: self._placed(x) for name, x in inputs.items()}
        try:
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs, num_beams=1, max_new_tokens=self._max_new_tokens, **decoding
                )  # (N, prompt + new), or (N, new) where an encoder has read the prompt
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"the GPU's memory is too small for {len(next(iter(inputs.values())))} pictures at once: lower "
                "--batch_size (what is captioned is kept)"
            ) from error
        except (ValueError, TypeError) as error:
            raise InputError(f"--captioner {self._model_name} cannot caption a picture: {first_line(error)}") from error
        prompt = inputs.get("input_ids")  # (N, prompt)
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        whole = torch.isin(tokens, self._ends().to(tokens.device)).any(dim=1).tolist()
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [sentence(self._opened + text, cut=not ended, limit=self._max_new_tokens, one=self._one_sentence)
                for text, ended in zip(texts, whole, strict=True)]

    def _placed(self, x):
        """A tensor on the model's device, in its number type where it holds numbers of that kind."""
        if not hasattr(x, "is_floating_point"):
            return x  # some processors add plain numbers
        return x.to(self._device, self._dtype if x.is_floating_point() else None)

    def _ends(self):
        """The tokens that end an answer, of which a batch goes on until its last picture has one; BLIP's is [SEP]."""
        import torch

        ends = self._model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        tokenizer = getattr(self._processor, "tokenizer", None)
        ends += [getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")]
        return torch.tensor([end for end in ends if end is not None], dtype=torch.long)


# ---- what captioners share ----


def prompt_text(prompt: str | None) -> str:
    """The text of A, B or C (Table 7), or of S; any other text as it is; None for C, the paper's choice (Table 8)."""
    return PROMPTS.get(prompt or "C", prompt)


def decoding(temperature: float | None, seed: int, max_new_tokens: int, one_sentence: bool = False) -> str:
    """How tokens are chosen, for a label."""
    how = "greedy" if temperature is None else f"sample temperature={temperature:g} seed={seed}"
    return f"{how} max_new_tokens={max_new_tokens}" + " one_sentence" * one_sentence


def seed_of(seed: int, key: str | None) -> int:
    """31 bits (servers take no more) from the run's seed and a picture's key."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big") >> 1


def first_line(error: Exception | str) -> str:
    """The first line of an error's message; libraries add advice below."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0][:300])


def optional(name: str):
    """An optional library; InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        packages = "bitsandbytes" if name == "bitsandbytes" else "-e '.[captioners]'"
        raise InputError(
            f"{name} is not installed ({first_line(error)}); in the repository run: pip install {packages}"
        ) from error

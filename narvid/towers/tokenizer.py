"""The tokenizer of a text tower: texts -> tokens, and which of them are words.

CLIP's byte pairs come with open_clip; every other tokenizer is a folder or a name on the hub, read with `transformers`.
What each family counts as a word stands in docs/towers.md and in `Tokenizer.__call__`.

Legend: N texts, T tokens of a text. Masks are bool, True = a word.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

OWN_MARKS = re.compile("<(start|end)_of_text>")
LONGEST_TEXT = 40 * 77  # letters: CLIP's longest token has fewer than 40, and a word of a million takes its BPE hours
ADVICE = "give its folder (tokenizer.json and tokenizer_config.json) with --tokenizer"


class Tokenizer:
    """Callable: texts, max_words -> tokens (N, T) and word_mask (N, T). Nothing is read from disk before it is needed.

    text_cfg: open_clip's. source: folder, or name on the hub, of a tokenizer that is not CLIP's; None: the one that
    text_cfg names. digest: of the tokenizer's content, where a checkpoint knows it; None: any.
    """

    def __init__(self, text_cfg: dict, source: str | None = None, digest: str | None = None):
        self.source = source or text_cfg.get("hf_tokenizer_name")
        self.options = dict(text_cfg.get("tokenizer_kwargs") or {})
        self.context_length, self.vocab_size = text_cfg.get("context_length", 77), text_cfg.get("vocab_size", 49408)
        # Which place of a text is its feature; hub: towers that mask their padding and pool as their makers say.
        self.pool = "hub" if text_cfg.get("hf_model_name") else "cls" if text_cfg.get("embed_cls") else text_cfg.get(
            "pool_type", "argmax")
        self.pools_end = self.pool in ("argmax", "eos")
        self.end_id = text_cfg.get("eos_id", 2) if self.pool == "eos" else None
        # A tower that sees behind the last word: its texts are always read in full length.
        self.whole = self.pool != "hub" and (bool(text_cfg.get("no_causal_mask")) or not self.pools_end)
        self.expected, self._loaded = digest, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_loaded": None}  # a loader's worker reads it anew

    def __call__(self, texts: list[str], max_words: int) -> tuple[Tensor, Tensor]:
        """Special tokens are each family's own; texts are cut to max_words tokens with them.

        T is the longest of these texts, or the context length where the tower sees padding too (`whole`). Padding is no
        word. The end token is one where its feature is the text's (CLIP: start and end count, App. A), and none where
        another place is pooled (SigLIP, CLIPA, CoCa). A text of nothing else has its first token for a word.
        """
        if not texts:
            return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
        max_words = min(max_words, self.context_length)
        tokens, real, words = (self._of_hub if self.source else self._of_clip)(texts, max_words)  # real, words (N,)
        length = self.context_length if self.whole else int(real.max())
        if tokens.shape[1] < length:
            tokens = F.pad(tokens, (0, length - tokens.shape[1]), value=self.pad_id)
        return tokens[:, :length], torch.arange(length) < words[:, None].clamp(min=1)

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text before it is cut, special ones included."""
        loaded = self.load()
        if not self.source:
            return [len(loaded.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in loaded.tokenizer([loaded.clean_fn(text) for text in texts]).input_ids]

    @property
    def pad_id(self) -> int:
        """What stands behind a text."""
        return (self.load().tokenizer.pad_token_id or 0) if self.source else 0

    def load(self):
        """open_clip's tokenizer object. ValueError, one sentence, where it is not there or of another tower."""
        if self._loaded is None:
            self._loaded = _from_hub(self.source, json.dumps(self.options)) if self.source else _clips()
            self._check(self._loaded)
        return self._loaded

    @property
    def digest(self) -> str | None:
        """Of the tokenizer's content; None for CLIP's."""
        return _digest(self.load()) if self.source else None

    def _check(self, loaded) -> None:
        size = len(loaded.tokenizer) if self.source else loaded.vocab_size
        name = self.source or "CLIP's tokenizer"
        if size > self.vocab_size:
            raise ValueError(f"{name}: has {size} tokens and the text tower {self.vocab_size}; it belongs to another "
                             f"model, {ADVICE}" if self.source else
                             f"the text tower's vocab_size {self.vocab_size} is less than the tokenizer's {size}")
        if self.source and loaded.tokenizer.pad_token_id is None:
            raise ValueError(f"{name}: has no padding token; it belongs to another model, {ADVICE}")
        if self.source and self.end_id is not None and loaded.tokenizer.eos_token_id != self.end_id:
            raise ValueError(f"{name}: ends a text with token {loaded.tokenizer.eos_token_id} and the text tower looks "
                             f"for {self.end_id}; it belongs to another model, {ADVICE}")
        if self.source and self.expected not in (None, _digest(loaded)):
            raise ValueError(f"{name}: is another tokenizer than the one the model was trained with; {ADVICE}")

    def _of_clip(self, texts: list[str], max_words: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (N, T), and of each how many stand before the padding and how many of these are words, (N,)."""
        tokens = self.load()(texts, context_length=max_words)
        # The padding id 0 is also that of "!", so a text ends at the end token, which has the largest id.
        end = tokens.argmax(dim=1)
        return tokens, end + 1, end + self.pools_end

    def _of_hub(self, texts: list[str], max_words: int) -> tuple[Tensor, Tensor, Tensor]:
        loaded = self.load()
        tokens, of = loaded(texts, context_length=max_words), loaded.tokenizer
        places = torch.arange(1, 1 + tokens.shape[1])
        # A separator that is taken off again (CLIPA) leaves token 0.
        real = (tokens != of.pad_token_id) & ((tokens != 0) if loaded.strip_sep_token else True)
        ends = set() if self.pools_end else {of.eos_token_id, of.sep_token_id} - {None}
        words = real & ~torch.isin(tokens, torch.tensor(sorted(ends), dtype=tokens.dtype))
        return tokens, *(torch.where(some, places, 0).amax(dim=1) for some in (real, words))


@lru_cache(maxsize=1)
def _clips() -> open_clip.SimpleTokenizer:
    """CLIP's, but for texts that hold its own marks: `<end_of_text>` in a caption would end it there."""
    tokenizer = open_clip.SimpleTokenizer()
    clean = tokenizer.clean_fn  # it undoes HTML's escapes too, so the marks are looked for behind it
    tokenizer.clean_fn = lambda text: OWN_MARKS.sub(r"< \1_of_text >", clean(text)[:LONGEST_TEXT])
    return tokenizer


@lru_cache(maxsize=4)
def _from_hub(source: str, options: str) -> open_clip.tokenizer.HFTokenizer:
    try:
        from open_clip.tokenizer import HFTokenizer
        tokenizer = HFTokenizer(source, **json.loads(options))
    except ImportError as error:
        raise ValueError(f"the tokenizer {source} needs the package transformers; pip install transformers") from error
    except Exception as error:  # the hub's client, a damaged file, a folder without one: each raises its own
        where = "" if Path(source).is_dir() else " (no such folder, and it could not be fetched from the hub)"
        raise ValueError(f"the tokenizer {source} cannot be read{where}; {ADVICE}") from error
    special = re.compile("|".join(map(re.escape, sorted(tokenizer.tokenizer.all_special_tokens, key=len, reverse=True)))
                         or r"(?!)")
    clean = tokenizer.clean_fn
    # Its own marks in a caption would be taken for themselves: a space behind their first letter undoes that.
    tokenizer.clean_fn = lambda text: special.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}",
                                                  clean(text)[:LONGEST_TEXT])
    return tokenizer


def _digest(loaded) -> str:
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # less what a call sets
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    else:
        content = loaded.tokenizer.get_vocab()
    content = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

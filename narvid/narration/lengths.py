"""How much of a narration a text tower reads: how many sentences it cuts, and what they lose. Counts, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from narvid import InputError
from narvid.data.narrations import Narration
from narvid.progress import tqdm

AT_ONCE = 1000  # sentences


class Reading(NamedTuple):
    """What a tower reads of a narration file; `lost` are the tokens behind its end, of each sentence that is cut."""

    tower: str
    context_length: int
    sentences: int
    tokens: int
    lost: list[int]

    def __str__(self) -> str:
        cut, n = len(self.lost), max(self.sentences, 1)
        said = (f"{self.tower} reads {self.context_length} tokens: {cut} of {self.sentences} sentences are cut "
                f"({cut / n:.2%}), {sum(self.lost) / max(self.tokens, 1):.2%} of all tokens are lost")
        if not cut:
            return said
        middle, most = sorted(self.lost)[cut // 2], max(self.lost)
        return f"{said}; a cut one loses {sum(self.lost) / cut:.1f} on average, {middle} in the middle, {most} at most"


def readings(names: Sequence[str], narrations: Mapping[str, Narration], tokenizer: str | None) -> Iterable[Reading]:
    """For each of open_clip's models, configs in .json or folders what it reads of these narrations.

    tokenizer: folder of one that is not CLIP's. InputError for a model that is none, or whose tokenizer is not there.
    """
    from narvid.towers.architectures import find_model  # torch and open_clip take seconds to load
    from narvid.towers.tokenizer import Tokenizer

    texts = [text for narration in narrations.values() for text in narration.sentences if text.strip()]
    for name in names:
        try:
            model = find_model(name)
            of_model = Tokenizer(model.config["text_cfg"], tokenizer or model.tokenizer)
            lengths, bar = [], tqdm(total=len(texts), desc=name, unit="sentence", delay=2, leave=False)
            for start in range(0, len(texts), AT_ONCE):
                lengths += of_model.lengths(texts[start : start + AT_ONCE])
                bar.update(min(AT_ONCE, len(texts) - start))
            bar.close()
        except ValueError as error:
            raise InputError(str(error).replace("--clip_model", "--towers")) from error
        room = of_model.context_length
        yield Reading(name, room, len(texts), sum(lengths), [n - room for n in lengths if n > room])

"""The sentences of a video's picked frames: from a captioner, from a ready narration file, or none.

Here: which frames are captioned, what happens to those without a sentence. Not here: models and servers, what an answer
is worth, which frames are nearly alike (narvid/narration), the file's form and the join by time
(narvid/data/narrations.py), features (build.py).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from narvid import InputError
from narvid.data.narrations import join, load_narrations, to_entry
from narvid.search.spool import Opened, Read
from narvid.narration.answers import KINDS, STOP_AFTER, Failed, in_a_row, is_refusal
from narvid.narration.captioners import Captioner
from narvid.narration.chat_server import ServerCaptioner
from narvid.narration.pictures import SAME_FRAME, check_sees, distinct_frames, made_pictures

AT_ONCE = 16  # pictures in a batch, or requests to a server
NO_SENTENCE = "without a sentence"  # in a file's note; --retry looks for it


class Narrator:
    """Sentences for frames, from one of two sources or from neither.

    captioner: of narvid/narration. narrations: a narration file, keyed by video id = file name without folder and
    suffix.
    """

    def __init__(self, captioner: Captioner | None, narrations: str | Path | None):
        if captioner is not None and narrations is not None:
            raise InputError("a captioner and a narration file exclude each other: give one of them")
        self.captioner, self.path = captioner, narrations
        self.is_silent = captioner is None and narrations is None
        self._of_video = load_narrations(narrations) if narrations is not None else {}
        self._checked, self._failures = False, 0

    @property
    def settings(self) -> dict[str, str | None]:
        """What of this an index records; the first picture may change a server's (ServerCaptioner)."""
        if self.captioner is not None:
            return {"captioner": f"{self.captioner.label} same_frame={SAME_FRAME:g}", "prompt": self.captioner.prompt}
        return {"captioner": None if self.is_silent else "narration file", "prompt": ""}

    def go_on(self, label: str | None) -> None:
        """Caption as an index was captioned that records this label."""
        if label is not None and isinstance(self.captioner, ServerCaptioner):
            self.captioner.go_on(label)

    def check(self, paths: Iterable[str]) -> None:
        """InputError where the narration file fits none of these videos, or one id of it two of them."""
        path_of = {}
        for path in paths:
            video = PurePosixPath(path).stem
            if video in self._of_video and path_of.setdefault(video, path) != path:
                raise InputError(f"{path_of[video]} and {path} have one id, {video!r}, in {self.path}: rename one")
        if self.path is not None and not path_of:
            raise InputError(f"{self.path} narrates none of these videos; an id is a file's name without its suffix")

    def version(self, path: str) -> str:
        """Marks what the narration file says about a video, "" where it says nothing; files are due when it changes."""
        narration = self._of_video.get(PurePosixPath(path).stem)
        text = json.dumps(to_entry("", narration), ensure_ascii=False) if narration else ""
        return hashlib.sha256(text.encode()).hexdigest() if narration else ""

    def sentences_of(self, path: str, clip: Read, numbers: Sequence[int]) -> tuple[dict[int, str | None], str]:
        """The sentence or None of each of these frames of a clip, and a note on what is missing, "" if nothing is.

        path: relative to the videos folder. InputError where the narration is that of other frames, the captioner sees
        no pictures, or too many frames in a row fail.
        """
        if self.captioner is not None:
            return self._caption(path, clip, numbers)
        sentences = [None] * len(numbers)
        if narration := self._of_video.get(video := PurePosixPath(path).stem):
            times = [clip.times[n] for n in numbers]
            sentences = join(narration, times, clip.times, video=video, path=self.path)
        return dict(zip(numbers, sentences, strict=True)), "" if self.is_silent else _note(sentences)

    def _caption(self, path: str, clip: Read, numbers: Sequence[int]) -> tuple[dict[int, str | None], str]:
        """Near-identical neighbours share a sentence, as when a narration file is made; an apology is none here."""
        if not self._checked:
            pairs = [made_pictures(), [clip.jpegs[numbers[0]], clip.jpegs[numbers[-1]]]]
            check_sees(self.captioner, pairs)
            self._checked = True
        leaders = distinct_frames(Opened(clip.jpegs, numbers), SAME_FRAME)
        asked = sorted(set(leaders))
        answers = dict(zip(asked, self._answers(path, clip, [numbers[i] for i in asked]), strict=True))
        given = [answers[leader] for leader in leaders]
        why = next((answer.why for answer in given if isinstance(answer, Failed)), "")
        sentences = [None if isinstance(answer, Failed) else answer for answer in given]
        return dict(zip(numbers, sentences, strict=True)), _note(sentences, why)

    def _answers(self, path: str, clip: Read, numbers: Sequence[int]) -> list[str | Failed]:
        name = path.encode("utf-8", "backslashreplace").decode()  # a captioner hashes it
        size, threads = (1, AT_ONCE) if isinstance(self.captioner, ServerCaptioner) else (AT_ONCE, 1)

        def ask(start: int) -> list[str | Failed]:
            batch = numbers[start : start + size]
            return self.captioner.caption([clip.jpegs[n] for n in batch], [f"{name} {clip.times[n]}" for n in batch])

        answers = []
        with ThreadPoolExecutor(threads) as pool:
            for batch in pool.map(ask, range(0, len(numbers), size)):
                answers += batch
        for answer in answers:
            self._failures = in_a_row(self._failures, answer)
            if self._failures == STOP_AFTER:
                raise InputError(
                    f"{STOP_AFTER} frames in a row got no sentence, the last one because: {answer.why}. The files "
                    "before this one are indexed; once that is mended, the same command continues"
                )
        apology = Failed(KINDS["refused"], "refused")
        return [apology if isinstance(answer, str) and is_refusal(answer) else answer for answer in answers]


def _note(sentences: Sequence[str | None], why: str = "") -> str:
    missing = list(sentences).count(None)
    return f"{missing} of {len(sentences)} frames {NO_SENTENCE}{f' ({why})' if why else ''}" if missing else ""

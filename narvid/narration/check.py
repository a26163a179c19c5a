"""What is wrong with a narration file, and the command that checks one.

Names every video whose narration is missing, misaligned, cut by the text tower, a copy of another video's, and so on.
Not here: our form and the join (`narrations.py`), published forms and their alignment (`published_narrations.py`),
what a refusal is (`answers.py`).

    python -m narvid.narration check FILE --frames DIR [--max_frames K] [--max_words 64] [--list FILE]
    python -m narvid.narration check FILE --frames DIR --drop refused --out FILE
    python -m narvid.narration check FILE --frames DIR --towers PE-Core-B-16 ViT-B-32
"""

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import NamedTuple

from narvid import InputError
from narvid.files import write_json_lines
from narvid.flags import Parser, positive
from narvid.narration.answers import is_refusal
from narvid.narration.lengths import readings
from narvid.data.frames import load_frame_index, pick_frames
from narvid.data.narrations import SPEECH, Narration, date_published, join, parse_lines, write_narrations
from narvid.data.published_narrations import ALIGNMENT, parse_published, read_form
from narvid.progress import tqdm

ERRORS = {
    "missing": "frames, no narration",
    "empty": "a narration without a single word, or of refusals alone",
    "misaligned": "frames and sentences disagree about time",
}
WARNINGS = {
    "holes": "some frames without a sentence; training masks them",
    "refused": "apologies in place of sentences; --drop refused leaves them out, narrate --again refused asks again",
    "unused": "a narration, no frames",
    "truncated": "sentences longer than the text tower reads; the rest is never seen",
    "equal": "nearly all sentences are another video's; is one of the two narrated from wrong frames?",
    "generic": "one or two different sentences in all, the same as another video's",
}
SAME = 0.9  # share of the distinct sentences of two videos, of either, that makes their narrations equal
GENERIC = 2  # up to so many distinct sentences (a black screen, a still) two videos share by chance
CANDIDATES = 500  # only a captioner with a few dozen sentences in all gives a rare sentence more videos
COMMON = 0.1  # share of the videos with one and the same sentence from which on the report asks why


class Report(NamedTuple):
    """What `validate` found; `problems`: kind (a key of ERRORS or WARNINGS) -> video -> what is wrong with it.

    refused: how many sentences are refusals.
    Shares: of frames with a sentence, of sentences that repeat the one before, of sentences cut at max_words tokens,
    of tokens lost by that, of videos that contain the most frequent sentence (`common`).
    `alignment`: which frame each caption of a published file was given; "" for our form, whose sentences have times.
    """

    narrations: int
    frames: int
    captioners: dict[str, int]
    problems: dict[str, dict[str, str]]
    mean_words: float
    framed_share: float
    refused: int
    repeated_share: float
    max_words: int
    cut_share: float
    lost_share: float
    common: str
    common_share: float
    alignment: str


def validate(
    path: str | Path,
    frame_times: Mapping[str, Sequence[float]],
    *,
    max_frames: int | None = None,
    max_words: int = 64,
) -> tuple[Report, dict[str, Narration]]:
    """Compare a narration file of any form with the extracted frames -> (report, narrations that could be dated).

    frame_times: video -> times (s) of all its extracted frames. max_frames: check the frames that training picks.
    max_words: tokens of a sentence that the text tower reads, start and end included.
    Raises InputError only where the file itself is malformed; all else is named in the report.
    """
    alignment, narrated, narrations, misaligned = _read(path, frame_times)
    problems = {kind: {} for kind in (*ERRORS, *WARNINGS)}
    problems["missing"] = {video: f"{len(of)} frames" for video, of in frame_times.items() if video not in narrated}
    problems["unused"] = {video: "not in the frame index" for video in narrated if video not in frame_times}
    problems["misaligned"] = misaligned
    frames = framed = 0
    for video, all_times in frame_times.items():
        times = all_times if max_frames is None else [all_times[i] for i in pick_frames(len(all_times), max_frames)]
        frames += len(times)
        if video not in narrations:
            continue
        try:
            sentences = join(narrations[video], times, all_times, video=video, path=path)
        except InputError as error:
            misaligned[video] = str(error).removeprefix(f"{path}: {video}: ")
            continue
        blank = sentences.count(None)
        framed += len(sentences) - blank
        if blank:
            kind = "holes" if "".join(narrations[video].sentences).strip() else "empty"
            problems[kind][video] = f"{blank} of {len(sentences)} frames"
    problems["refused"], refused = _refusals(narrations)
    problems["empty"] |= {video: what for video, what in problems["refused"].items() if what.startswith("all ")}
    if narrations and all(narration.source == SPEECH for narration in narrations.values()):
        problems["holes"] |= problems["missing"] | problems["empty"]  # of what is said, silence is no fault
        problems["missing"], problems["empty"] = {}, {}
    mean_words, repeated_share = _language(narrations)
    problems["truncated"], cut_share, lost_share = _truncated(narrations, max_words)
    said = {video: said for video, narration in narrations.items() if (said := _said(narration))}
    problems["equal"], problems["generic"] = _equal(said)
    captioners = Counter(narration.captioner for narration in narrations.values())
    report = Report(len(narrated), frames, captioners, problems, mean_words, framed / max(frames, 1), refused,
                    repeated_share, max_words, cut_share, lost_share, *_most_frequent(said), alignment)
    return report, narrations


def _read(path, frame_times):
    """(alignment, videos in the file, narrations of those that could be dated, video -> why it could not)."""
    text, form = read_form(path)
    if form == "ours":
        narrations = parse_lines(path, text)
        return "", narrations, narrations, {}
    captions_of = parse_published(path, text, form, frame_times)
    return ALIGNMENT[form], captions_of, *date_published(form, captions_of, frame_times)


# ---- language ----


def _refusals(narrations: Mapping[str, Narration]) -> tuple[dict[str, str], int]:
    """Video -> how many of its sentences are refusals, and their number in all."""
    found, total = {}, 0
    for video, narration in narrations.items():
        if refusals := [text for text in narration.sentences if is_refusal(text)]:
            n = sum(not text.isspace() for text in narration.sentences if text)
            share = f"all {n}" if len(refusals) == n else f"{len(refusals)} of {n}"
            found[video] = f"{share} sentences, such as {_quote(refusals[0])}"
            total += len(refusals)
    return found, total


def _language(narrations: Mapping[str, Narration]) -> tuple[float, float]:
    """Mean words a sentence, and the share of sentences that repeat the one before; blank sentences do not count."""
    words = sentences = pairs = repeated = 0
    for narration in narrations.values():
        texts = [" ".join(text.split()) for text in narration.sentences if text.strip()]
        words += sum(text.count(" ") + 1 for text in texts)
        sentences += len(texts)
        pairs += max(len(texts) - 1, 0)
        repeated += sum(earlier == later for earlier, later in pairwise(texts))
    return words / max(sentences, 1), repeated / max(pairs, 1)


def _truncated(narrations: Mapping[str, Narration], max_words: int) -> tuple[dict[str, str], float, float]:
    """Video -> how much is cut, the share of all sentences that are cut, the share of all tokens lost."""
    count = _token_counter()
    found, sentences, cut, tokens, lost = {}, 0, 0, 0, 0
    for video, narration in tqdm(narrations.items(), desc="tokens", unit="video", delay=2, leave=False):
        counts = [count(text) for text in narration.sentences if text.strip()]
        over = [n - max_words for n in counts if n > max_words]
        if over:
            found[video] = f"{len(over)} of {len(counts)} sentences, {sum(over)} of {sum(counts)} tokens lost"
        sentences, cut = sentences + len(counts), cut + len(over)
        tokens, lost = tokens + sum(counts), lost + sum(over)
    return found, cut / max(sentences, 1), lost / max(tokens, 1)


def _token_counter():
    """text -> its CLIP tokens, start and end included. No token spans two words, so each word is looked at once."""
    import open_clip  # here: with torch it takes seconds to load, and converting needs none of it

    encode = open_clip.SimpleTokenizer().encode
    tokens_of = cache(lambda word: len(encode(word)))

    @cache
    def count(text: str) -> int:
        # Outside ASCII the tokenizer repairs broken encodings, for which it needs the sentence as a whole.
        return 2 + (sum(map(tokens_of, text.split())) if text.isascii() else len(encode(text)))

    return count


# ---- equal narrations ----


def _said(narration: Narration) -> frozenset[str]:
    """Its distinct sentences; white space and case make no difference, blank ones do not count."""
    return frozenset(" ".join(text.split()).casefold() for text in narration.sentences if text.strip())


def _equal(said: Mapping[str, frozenset[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """Videos that say what another says -> (equal: video -> whose sentences, generic: the same for one or two)."""
    videos_of = defaultdict(list)
    for video, sentences in said.items():
        videos_of[sentences].append(video)
    near = _nearly_equal(videos_of)
    equal, generic = {}, {}
    for video, sentences in said.items():
        same = videos_of[sentences]
        if len(same) > 1:
            other = same[0] if same[0] != video else same[1]
            whose = other + (f" and {len(same) - 2} more" if len(same) > 2 else "")
            if len(sentences) > GENERIC:
                equal[video] = f"the same {len(sentences)} sentences as {whose}"
            else:
                generic[video] = f"says only {' and '.join(map(_quote, sorted(sentences)))}, as {whose}"
        elif other := near.get(sentences):
            shared = len(sentences & other)
            equal[video] = f"{shared} of {len(sentences)} distinct sentences stand in {videos_of[other][0]} too"
    return equal, generic


def _nearly_equal(sets: Collection[frozenset[str]]) -> dict[frozenset[str], frozenset[str]]:
    """Of distinct sets: each one -> the first found that shares at least SAME of the larger one's sentences.

    Two such sets of size n share a sentence among the n - ceil(SAME n) + 1 rarest of each, so only those are indexed
    and compared, each with the last CANDIDATES sets that hold it: linear, where all pairs would take hours.
    """
    sets = [s for s in sets if len(s) + 1 <= len(s) / SAME]  # fewer: SAME of them are all of them
    videos_with = Counter(sentence for s in sets for sentence in s)
    holders, near = defaultdict(list), {}
    for s in sets:
        rarest = sorted(s, key=lambda sentence: (videos_with[sentence], sentence))[: len(s) - ceil(SAME * len(s)) + 1]
        for sentence in rarest:
            for other in holders[sentence][-CANDIDATES:]:
                if len(s & other) >= SAME * max(len(s), len(other)):
                    near.setdefault(s, other)
                    near.setdefault(other, s)
                    break
            holders[sentence].append(s)
    return near


def _most_frequent(said: Mapping[str, frozenset[str]]) -> tuple[str, float]:
    """The sentence that most videos contain, and their share."""
    videos_with = Counter(sentence for sentences in said.values() for sentence in sentences)
    [(sentence, videos)] = videos_with.most_common(1) or [("", 0)]
    return sentence, videos / max(len(said), 1)


def _quote(sentence: str) -> str:
    return f'"{sentence if len(sentence) <= 60 else sentence[:57] + "..."}"'


# ---- the report ----


def print_report(path: str | Path, report: Report) -> None:
    """One screen: counts, what the sentences look like, the first videos of each kind of problem."""
    captioners = ", ".join(f"{name} ({count})" for name, count in report.captioners.items()) or "none"
    print(f"{path}: {report.narrations} narrations; captioner: {captioners}")
    if report.alignment:
        print(f"            {report.alignment}")
    print(f"{report.framed_share:10.2%}  of {report.frames} frames have a sentence")
    print(f"{report.mean_words:10.2f}  words a sentence")
    print(f"{report.refused:10}  sentences are refusals")
    print(f"{report.repeated_share:10.2%}  of the sentences equal the one before")
    print(f"{report.cut_share:10.2%}  of the sentences are cut at {report.max_words} tokens (--max_words); "
          f"{report.lost_share:.2%} of all tokens are lost")
    print(f"{report.common_share:10.2%}  of the videos contain the most frequent sentence, {_quote(report.common)}")
    if report.common_share >= COMMON:
        print(f"{'':12}many videos for one sentence: does the captioner look at its frames?")
    for title, kinds in (("errors (exit status 1):", ERRORS), ("warnings (exit status 0):", WARNINGS)):
        print(title)
        for kind, meaning in kinds.items():
            found = report.problems[kind]
            print(f"{len(found):10}  {kind}: {meaning}")
            for video in list(found)[:3]:
                print(f"{'':14}{video}: {found[video]}")


def write_list(path: str | Path, report: Report) -> int:
    """Every problem of every video as JSON lines {"video", "kind", "what"} -> their number."""
    lines = [{"video": video, "kind": kind, "what": what}
             for kind, found in report.problems.items() for video, what in found.items()]
    write_json_lines(path, lines)
    return len(lines)


# ---- the command line ----


def drop_refused(path: str | Path, narrations: Mapping[str, Narration], out: str | Path) -> None:
    """Write narrations of our form without the sentences that are refusals; training masks their frames.

    A video of refusals alone stays, without a sentence. InputError where `out` is the file itself.
    """
    if os.path.realpath(path) == os.path.realpath(out):
        raise InputError(f"--out {out} is the file that is checked: give another one")
    kept, dropped = {}, 0
    for video, narration in narrations.items():
        pairs = [pair for pair in zip(narration.times, narration.sentences, strict=True) if not is_refusal(pair[1])]
        kept[video] = narration._replace(times=[time for time, _ in pairs], sentences=[text for _, text in pairs])
        dropped += len(narration.times) - len(pairs)
    write_narrations(out, kept.items())
    print(f"wrote {len(kept)} narrations to {out}, {dropped} refusals left out")


def main(argv: Sequence[str] | None = None) -> None:
    """`check`: print the report; exit status 1 where a video has no narration, an empty one or a misaligned one."""
    parser = Parser(prog="python -m narvid.narration check", allow_abbrev=False,
                    description="Compare narrations with the extracted frames.")
    parser.add_argument("file", help="narration file, ours or a published one")
    parser.add_argument("--frames", required=True, help="folder of extracted frames, with its index")
    parser.add_argument("--max_frames", type=positive, help="check the frames that training picks (default: all)")
    parser.add_argument("--max_words", type=positive, default=64, help="tokens of a sentence that training reads [64]")
    parser.add_argument("--towers", nargs="+", metavar="NAME", default=[],
                        help="say how much these towers cut: open_clip's names, configs in .json, or folders")
    parser.add_argument("--tokenizer", metavar="DIR", help="of --towers, where it is not CLIP's [from the hub]")
    parser.add_argument("--list", help="write every problem there as JSON lines: video, kind, what")
    parser.add_argument("--drop", choices=("refused",), help="write the narrations to --out without such sentences")
    parser.add_argument("--out", help="with --drop: the narration file to write")
    args = parser.parse_args(argv)
    if bool(args.drop) != bool(args.out):
        parser.error("--drop and --out go together")
    if args.tokenizer and not args.towers:
        parser.error("--tokenizer is that of --towers: name them")
    frame_times = load_frame_index(args.frames)
    report, narrations = validate(args.file, frame_times, max_frames=args.max_frames, max_words=args.max_words)
    if args.drop and report.alignment:
        parser.error(f"--drop: {args.file} is in a published form; turn it into ours with `convert`, then --drop")
    print_report(args.file, report)
    for reading in readings(args.towers, narrations, args.tokenizer) if args.towers else ():
        print(reading)
    if args.list:
        print(f"wrote {write_list(args.list, report)} problems to {args.list}")
    if args.drop:
        drop_refused(args.file, narrations, args.out)
    sys.exit(any(report.problems[kind] for kind in ERRORS))

"""A published narration file in our form, by the rules of data/published_narrations.py, which are printed.

    python -m narvid.narration convert FILE --frames DIR --out narrations.jsonl
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from narvid import InputError
from narvid.data.frames import load_frame_index
from narvid.data.narrations import date_published, write_narrations
from narvid.data.published_narrations import ALIGNMENT, parse_published, read_form
from narvid.flags import Parser


def convert(path: str | Path, frame_times: Mapping[str, Sequence[float]], out: str | Path) -> None:
    """Write a published file in our form and print which frame each caption was given.

    frame_times: video -> times (s) of all its extracted frames. Raises InputError, and writes nothing, where a video
    is misaligned, no video has frames, or the file is in our form.
    """
    text, form = read_form(path)
    if form == "ours":
        raise InputError(f"{path}: is in our form already; use it as it is, and `check` it")
    captions_of = parse_published(path, text, form, frame_times)
    narrations, misaligned = date_published(form, captions_of, frame_times)
    if misaligned:
        video, reason = next(iter(misaligned.items()))
        raise InputError(f"{out} is not written: {len(misaligned)} videos of {path} are misaligned, {video}: {reason}")
    if not narrations:
        name = next(iter(captions_of), "none")
        raise InputError(f"{path}: none of its {len(captions_of)} videos ({name}, ...) has frames; is it this corpus?")
    write_narrations(out, narrations.items())
    print(f"{path}: {ALIGNMENT[form]}")
    print(f"wrote {len(narrations)} narrations to {out}; {len(captions_of) - len(narrations)} videos have no frames")


def main(argv: Sequence[str] | None = None) -> None:
    """`convert`: write a published narration file in our form."""
    parser = Parser(prog="python -m narvid.narration convert", allow_abbrev=False,
                    description="Write a published file in our form.")
    parser.add_argument("file", help="a published narration file")
    parser.add_argument("--frames", required=True, help="folder of extracted frames, with its index")
    parser.add_argument("--out", required=True, help="write the narrations there in our form (JSON lines)")
    args = parser.parse_args(argv)
    convert(args.file, load_frame_index(args.frames), args.out)

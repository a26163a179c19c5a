"""What is said in videos -> a narration file: each frame gets what is said around it, and silence is a hole.

  python -m narvid.narration import SUBTITLES... --frames data/msrvtt/frames --out data/msrvtt/speech.jsonl
  python -m narvid.narration import VIDEOS --frames FRAMES --out OUT --speech large-v3     transcribes (faster-whisper)

SUBTITLES are files, or folders of them: subtitles, transcripts, video files with text tracks (subtitles.py). A file
belongs to the video that its name begins with: video7.srt, video7.en.vtt. What cannot be read is reported and listed in
OUT's .failed.jsonl. Not here: formats (subtitles.py), the model that listens (transcribe.py), what training makes of a
second source (data/narrations.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from narvid import InputError
from narvid.data.frames import load_frame_index
from narvid.data.narrations import SPEECH, Narration, write_narrations
from narvid.data.videos import SUFFIXES
from narvid.files import remove, walk, write_json_lines
from narvid.flags import Parser, WithDefaults, number
from narvid.narration.journals import failed_file
from narvid.narration.subtitles import TEXT_FILES, Timed, read_sentences
from narvid.narration.transcribe import Transcriber, transcribed
from narvid.progress import tqdm

WITHIN = 2.0  # seconds between a frame and what is said, at most


def said_around(sentences: Sequence[Timed], times: Sequence[float], within: float) -> list[str | None]:
    """What is said from `within` seconds before each frame to as many behind it; None where nobody speaks.

    sentences: in time order. A sentence that is said twice in a row stands once.
    """
    texts = []
    for time in times:
        near = [s.text for s in sentences if s.start - within <= time <= s.end + within]
        kept = [text for i, text in enumerate(near) if i == 0 or text != near[i - 1]]
        texts.append(" ".join(kept) or None)
    return texts


def to_narration(captioner: str, texts: Sequence[str | None], times: Sequence[float]) -> Narration:
    """A video's speech as its narration: a sentence for each frame at which somebody speaks."""
    pairs = [(time, text) for time, text in zip(times, texts, strict=True) if text]
    return Narration(captioner, "", [time for time, _ in pairs], [text for _, text in pairs], SPEECH)


# ---- which file belongs to which video ----


def sources_of(paths: Sequence[Path], videos: Mapping[str, object],
               language: str | None) -> tuple[dict[str, Path], list[Path]]:
    """(video -> the file with its sentences, files of no video). A file of subtitles comes before a video file.

    language: of several files the one whose name says so (video7.en.srt). InputError where two are left.
    """
    found: dict[str, list[Path]] = {}
    strays = []
    for path in _files(paths):
        video = video_of(path, videos)
        found.setdefault(video, []).append(path) if video else strays.append(path)
    chosen = {}
    for video, of_video in found.items():
        texts = [path for path in of_video if path.suffix.lower() in TEXT_FILES] or of_video
        if len(texts) > 1 and language:
            texts = [path for path in texts if tag_of(path, video).startswith(language.lower())] or texts
        if len(texts) > 1:
            raise InputError(f"{texts[0]} and {texts[1]} both belong to {video}: name one of them, or say --language")
        chosen[video] = texts[0]
    return {video: chosen[video] for video in videos if video in chosen}, strays


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for parent, names in walk(path):
            yield from (Path(parent, name) for name in names if name[0] != "."
                        and Path(name).suffix.lower() in (*TEXT_FILES, *SUFFIXES))


def video_of(path: Path, videos: Mapping[str, object]) -> str | None:
    """The id that a file name begins with; what follows may be a language."""
    name = path.stem
    while name not in videos and "." in name:
        name = name.rpartition(".")[0]
    return name if name in videos else None


def tag_of(path: Path, video: str) -> str:
    return path.stem[len(video) :].strip(".").lower()


# ---- the command ----


def main(argv: Sequence[str] | None = None) -> None:
    """`import`: write what is said in the videos as a narration file."""
    args = _parse_args(argv)
    times = load_frame_index(args.frames)
    chosen, strays = sources_of(args.sources, times, args.language)
    if strays:
        print(f"{len(strays)} files belong to no video of {args.frames}, such as {strays[0]}")
    if not chosen:
        raise InputError(f"none of the {len(strays)} files belongs to a video of {args.frames}: a file is named after "
                         "its video, such as video7.srt or video7.en.vtt")
    captioner, failed, said = f"subtitles within={args.within:g}", [], {}
    if args.speech:
        listener = Transcriber(args.speech, args.language)
        captioner = f"{listener.label} within={args.within:g}"
        sentences = transcribed(chosen, listener, args.out, failed)
    else:
        sentences = _read(chosen, args.language, failed)
    for video, of_video in sentences:
        said[video] = to_narration(captioner, said_around(of_video, times[video], args.within), times[video])
    remove(failed_file(args.out))
    if failed:
        write_json_lines(failed_file(args.out), failed)
        print(f"{len(failed)} files give nothing, {failed_file(args.out)} says why, such as {failed[0]['why']}")
    speaks = sum(bool(narration.sentences) for narration in said.values())
    if not speaks:
        raise InputError(f"{args.out} is not written: in none of the {len(chosen)} videos is anything said")
    write_narrations(args.out, said.items())
    frames, spoken = sum(map(len, times.values())), sum(len(narration.sentences) for narration in said.values())
    print(f"{args.out}: {spoken} of {frames} frames have a sentence, in {speaks} of {len(times)} videos; "
          f"{len(said) - speaks} are silent, {len(times) - len(said)} have no file")


def _read(chosen: Mapping[str, Path], language: str | None, failed: list[dict]) -> Iterator[tuple[str, list[Timed]]]:
    for video, path in tqdm(chosen.items(), desc="subtitles", unit="video", disable=len(chosen) < 100):
        try:
            yield video, read_sentences(path, language)
        except InputError as error:
            failed.append({"video": video, "file": str(path), "why": str(error)})


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m narvid.narration import", allow_abbrev=False,
                    description="Write what is said in videos as a narration file.",
                    formatter_class=WithDefaults)
    parser.add_argument("sources", type=Path, nargs="+", metavar="FILE",
                        help="subtitles, transcripts, video files with text tracks, or folders of them; with --speech: "
                             "video files")
    parser.add_argument("--frames", type=Path, required=True, metavar="DIR", help="frame folder, of extract_frames.py")
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL", help="the narration file to write")
    parser.add_argument("--within", type=number, default=WITHIN, metavar="SECONDS",
                        help="a frame gets what is said no farther from it than this")
    parser.add_argument("--language", metavar="CODE", help="such as en: of several files or tracks; of --speech, where "
                                                           "it shall not be guessed")
    parser.add_argument("--speech", metavar="MODEL", help="transcribe with this Whisper: a name that faster-whisper "
                                                          "knows, such as large-v3, or the folder of a converted model")
    return parser.parse_args(argv)

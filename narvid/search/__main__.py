"""Search your own videos from the command line.

  python -m narvid.search index VIDEOS --out INDEX --checkpoint runs/x --captioner llava-hf/llava-1.5-7b-hf
  python -m narvid.search query INDEX "a woman slices bread"
  python -m narvid.search serve INDEX                                  a page on http://127.0.0.1:8000/

`index` again brings the index up to date with the folder. Installed, the command is also called narvid-search.
Here: flags and what is printed. Not here: everything that happens (build.py, engine.py, server.py).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import datetime
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from narvid import InputError
from narvid.files import as_text, read_text
from narvid.narration.captioners import LocalCaptioner
from narvid.narration.chat_server import ServerCaptioner
from narvid.narration.transcribe import Transcriber
from narvid.flags import Parser, command, count, number, positive, positive_float
from narvid.progress import say
from narvid.search.answers import as_dict, clock, printable
from narvid.search.folders import folders_of, place
from narvid.search.parts import Part, parse, parse_arguments, written
from narvid.search.serving import Client
from narvid.search.opening import in_engine, is_there, open_store
from narvid.search.store import Store

if TYPE_CHECKING:
    from narvid.search.answers import Answer, Answers
    from narvid.search.engine import Engine

PARTS = """parts: narvid-search query INDEX "a dog on a beach" - people + 0.5*picture.jpg. Texts, pictures, clips and
windows (window:12, the number of an answer with --json) with lone + and - between them, each with a weight before it if
you like. In one piece, and on the lines of --queries, a text stands in quotes of its own:
'"a dog on a beach" - "people" + 0.5*picture.jpg'"""
WIDEST = 60  # letters of a file name in a table
# What needs torch is imported where it is used: --help and a mistaken flag do without it.


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of one of the three commands."""
    parser = Parser(prog="narvid-search", description="Search your own videos.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="index | query | serve")

    index = commands.add_parser("index", help="a folder of videos -> an index, made or brought up to date",
                                allow_abbrev=False)
    add = index.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEOS", help="folder of video files, searched with its subfolders; "
        "or several: those that the index has and that are not named stay as they are")
    add("--out", type=Path, metavar="INDEX", help="the index, a folder of its own")
    add("--engine", type=engine, metavar="ENGINE", help="faiss, in the folder --out; or, without --out, milvus:URI, "
        "which holds all of the index for many machines: milvus:http://HOST:19530/NAME, milvus:FILE.db/NAME [faiss]",
        default="faiss")
    add("--checkpoint", metavar="RUN", help="a run, an exported folder, or a released NarVid file [plain CLIP]")
    add("--clip_model", help="open_clip name, .json or folder, of plain towers or of a released file [the index's; "
        "else ViT-B-32, on a GPU PE-Core-B-16]")
    add("--clip_pretrained", help="of plain towers: open_clip tag, or a weights file [laion2b_s34b_b79k, meta]")
    add("--tokenizer", help="folder of the text tower's tokenizer, where it is not CLIP's [from the hub]")
    add("--captioner", metavar="NAME", help="narrate with this image-text model of transformers, name or folder")
    add("--server", metavar="URL", help="or with a model behind an OpenAI-compatible server; needs --model")
    add("--model", metavar="NAME", help="of --server")
    add("--narrations", type=Path, metavar="FILE", help="or take the sentences from a narration file")
    add("--prompt", help="of the captioner: A, B or C of Table 7, or your own [C]")
    add("--window", type=positive_float, help="seconds; longer videos are cut into windows that overlap by half [30]")
    add("--fps", type=positive_float, default=1.0, help="frames per second that are looked at [1]")
    add("--statistics_queries", metavar="FILE", help="queries, one a line, that stand for yours where Eq. 11 wants "
        "mean and deviation [the narration's own sentences]")
    add("--check", choices=["content"], help="content: read every file whole, to find what changed and kept its size "
        "and date [size and date]")
    add("--forget", action="append", default=[], metavar="FOLDER", help="take this folder out of the index; may be "
        "given again")
    add("--watch", action="store_true", help="stay, and index what comes, changes and goes until Ctrl-C")
    add("--every", type=positive_float, metavar="SECONDS", help="between two looks of --watch [5]")
    add("--retry", action="store_true", help="once more what could not be read, or lacks a sentence")
    add("--no_speech", action="store_true", help="search no speech: leave subtitles alone, and forget those that the "
        "index holds [what is said is searched: subtitles beside the videos, a.srt, a.en.vtt, and text tracks inside]")
    add("--speech", metavar="MODEL", help="and hear files without subtitles with this Whisper: a name that "
        "faster-whisper knows, such as large-v3, or the folder of a converted model")
    add("--language", metavar="CODE", help="such as en: of several subtitles or tracks; of --speech, where it shall "
        "not be guessed")

    query = commands.add_parser("query", help="answers to a sentence, or a query of several parts",
                                allow_abbrev=False, epilog=PARTS)
    add = query.add_argument
    add("index", type=where, metavar="INDEX", help="a folder, or milvus:URI")
    add("text", nargs="*", metavar="TEXT", help="what happens in the video, or parts with + and - between them")
    add("--queries", metavar="FILE", help="one a line; - is the standard input")
    add("--picture", metavar="FILE", help="windows that look like this picture")
    add("--clip", metavar="FILE", help="windows like the beginning of this video")
    add("--top", type=positive, default=10, help="how many answers [10]")
    add("--folder", default="", help="only videos in this folder, relative to the indexed one")
    add("--min_seconds", type=number, default=0.0, help="only videos of this length or longer")
    add("--max_seconds", type=number, default=inf, help="only videos of this length or shorter")
    add("--since", type=day, default=-inf, metavar="DATE", help="only videos of 2024-12-31 or later: recorded then, "
        "where the file says it, else written then")
    add("--until", type=day, default=inf, metavar="DATE", help="only videos of before that day")
    add("--has_speech", action="store_true", help="only windows in which something is said")
    add("--moments", action="store_true", help="every moment is an answer, not every file")
    add("--exact", action="store_true", help="score every window, not only stage one's candidates")
    add("--json", action="store_true", help="one JSON object a query, one a line")

    serve = commands.add_parser("serve", help="a page to search in, on this machine", allow_abbrev=False)
    add = serve.add_argument
    add("index", type=where, metavar="INDEX", help="a folder, or milvus:URI")
    add("--host", default="127.0.0.1", help="address to listen at [127.0.0.1: this machine alone]")
    add("--port", type=count, default=8000, help="0 takes a free one [8000]")
    add("--browser", action="store_true", help="open the page in a browser")
    add("--password", metavar="TEXT", help="asked for before anything is shown [where others reach this machine one "
        "is made up and printed]")
    add("--open", action="store_true", help="no password, although others reach this machine")
    add("--allow_host", action="append", default=[], metavar="NAME", help="a further name under which the server may "
        "be asked, for instance of a proxy before it; may be given again")
    for asking in (query, serve):
        asking.add_argument("--checkpoint", metavar="RUN", help="where the index's model lies by now")
        asking.add_argument("--tokenizer", help="where the folder of its tokenizer lies by now")
    args, rest = parser.parse_known_args(argv)
    if args.command == "query" and not args.text and not any(word[:1] == "-" != word for word in rest):
        args.text, rest = rest, []  # argparse gives up the words behind a flag, where none stood before it
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: Parser) -> None:
    """Flags that exclude or need one another."""
    if args.command == "index":
        if (args.engine == "faiss") == (args.out is None):
            parser.error("give --out INDEX, the folder of the index" if args.out is None else
                         f"--out and --engine {args.engine} exclude each other: the engine holds all of the index")
        args.out = args.out or args.engine
        sources = [f"--{name}" for name in ("captioner", "server", "narrations") if getattr(args, name)]
        if len(sources) > 1:
            parser.error(f"{' and '.join(sources)} exclude each other: give one of them")
        if bool(args.server) != bool(args.model):
            parser.error("--server and --model go together: the address, and the model's name there")
        if args.no_speech and (args.speech or args.language):
            parser.error("--no_speech excludes --speech and --language: leave it out, or them")
        if args.prompt and not (args.captioner or args.server):
            parser.error("--prompt is the captioner's: give --captioner or --server too, or leave it out")
        if args.every and not args.watch:
            parser.error("--every is of --watch: give it too, or leave it out")
        if args.watch and (args.retry or args.check or args.forget):
            parser.error("--watch goes without --retry, --check and --forget: run them once before")
        if args.checkpoint and args.clip_pretrained:
            parser.error("--clip_pretrained is for plain CLIP; --checkpoint brings its weights: leave one out")
    if args.command == "serve":
        if args.open and args.host in ("127.0.0.1", "localhost", "::1"):
            parser.error("--open is for a --host that others reach; --browser opens the page in a browser")
        if args.open and args.password is not None:
            parser.error("--open and --password exclude each other")
        if args.password == "":
            parser.error("--password is empty: give one, or --open for none")
    if args.command == "query":
        asked = [name for name in ("text", "queries", "picture", "clip") if getattr(args, name) not in (None, [])]
        if len(asked) != 1:
            parser.error('give one of "a sentence", --queries, --picture and --clip')
        if args.min_seconds > args.max_seconds:
            parser.error(f"--min_seconds {args.min_seconds:g} is more than --max_seconds {args.max_seconds:g}")
        if len(args.text) == 1 and not args.text[0].strip():
            parser.error("the sentence is empty: say what to look for")


# ---- the three commands ----


def index_videos(args: argparse.Namespace) -> None:
    """Make an index of a folder of videos, or bring it up to date."""
    from narvid.search.build import EVERY, WINDOW, update, watch
    from narvid.search.embedding import Embedder
    from narvid.search.speech_sources import Hearing

    queries = [text for _, text in read_queries(args.statistics_queries)] if args.statistics_queries else None
    captioner = None
    if args.captioner:
        captioner = LocalCaptioner(args.captioner, args.prompt)
    elif args.server:
        captioner = ServerCaptioner(args.server, args.model, args.prompt)
    narrated = captioner is not None or args.narrations is not None
    if args.checkpoint:
        name, pretrained = args.clip_model or "ViT-B-32", None
    else:
        name, pretrained = towers_of(args)
    embedder = Embedder.load(args.checkpoint, clip_model=in_full(name), clip_pretrained=in_full(pretrained),
                             tokenizer=in_full(args.tokenizer), narration=narrated)
    how = {"captioner": captioner, "narrations": args.narrations, "window": args.window or WINDOW, "fps": args.fps,
           "statistics_queries": queries, "hearing": None if args.no_speech else Hearing(
               Transcriber(args.speech, args.language) if args.speech else None, args.language),
           "workers": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1}
    if args.watch:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            watch(args.videos, args.out, embedder, every=args.every or EVERY, say=said_at, **how)
        except KeyboardInterrupt:
            said_at(f"stopped; {args.out} is whole")
        return
    report = update(args.videos, args.out, embedder, retry=args.retry, check_content=args.check == "content",
                    forget=args.forget, **how)
    moved = f" ({report.moved} moved or renamed)" if report.moved else ""
    spoken = f"; in {report.spoken} files something is said" if report.spoken else ""
    print(f"{report.added} files new, {report.changed} changed, {report.removed} removed, {report.unchanged} as before"
          f"{moved}, {report.failed} of all could not be read; {args.out} holds {report.windows} windows{spoken}")
    print(f'search it: python -m narvid.search query {args.out} "what happens"   or: python -m narvid.search serve '
          f"{args.out}")


def said_at(line: str) -> None:
    """A line, with the time."""
    say(f"{datetime.now():%H:%M:%S}  {printable(line)}")


def towers_of(args: argparse.Namespace) -> tuple[str, str | None]:
    """Plain towers: as named, as the index has them that is there already, or as chosen for this machine; said."""
    import torch

    from narvid.search.towers import choose, describe

    name, pretrained = args.clip_model, args.clip_pretrained
    if name is None and pretrained is None and is_there(args.out):
        with open_store(args.out, read_only=True) as store:
            settings = store.settings
        if settings.get("checkpoint") is None:
            args.tokenizer = args.tokenizer or settings.get("tokenizer")
            return settings["clip_model"], settings["clip_pretrained"]
    name, pretrained = choose(name, pretrained, gpu=torch.cuda.is_available())
    print(describe(name, pretrained))
    return name, pretrained


def query_index(args: argparse.Namespace) -> None:
    """Print the answers to one query or many."""
    queries = list(asked_for(args))
    names = ("top", "folder", "min_seconds", "max_seconds", "since", "until", "has_speech")
    same = {name: getattr(args, name) for name in names} | {"one_a_file": not args.moments}
    with open_store(args.index, read_only=True) as store:
        if not store.count():
            raise InputError(f"{args.index}: nothing is indexed yet; fill it with `python -m narvid.search index`")
        if args.folder and not len(store.all_windows(args.folder)):
            raise InputError(f"--folder {args.folder}: no indexed video lies there; give a folder below "
                             f"{' or '.join(map(str, folders_of(store.settings).values()))}, as the index calls it")
        for part in (part for _, parts in queries for part in parts if part.kind == "window"):
            try:
                store.windows([part.value])
            except KeyError:
                raise InputError(f"window:{part.value}: the index has no such window (any more)") from None
        served = None if args.exact or args.checkpoint else Client.find(store.folder)
        if served:
            found = (served.search(parts, **same) for _, parts in queries)
        else:
            found = in_batches(open_engine(store, args.checkpoint, args.tokenizer), [parts for _, parts in queries],
                               exact=args.exact, **same)
        for (asked, parts), answers in zip(queries, named_by_flag(args, found)):
            if args.json:
                if len(parts) > 1:
                    asked |= {"parts": [part._asdict() for part in parts]}
                print(json.dumps(asked | {"fits": answers.fits, "answers": [in_full_dict(a, store) for a in answers]}))
            else:
                print("\n".join(table(next(iter(asked.values())), answers)))


def in_full_dict(answer: Answer, store: Store) -> dict:
    """An answer for --json: with its moment, its file's length and date, and where the file lies."""
    try:
        return as_dict(answer, store.file(answer.file)) | {"absolute_path": str(place(store, answer.path))}
    except KeyError:
        raise InputError(f"{answer.path}: the index has just changed; search again") from None


def named_by_flag(args: argparse.Namespace, found: Iterator[Answers]) -> Iterator[Answers]:
    """The same; a mistake in a file that a flag names begins with the flag."""
    try:
        yield from found
    except InputError as error:
        flag = "--picture " if args.picture else "--clip " if args.clip else ""
        raise InputError(f"{flag}{error}") from error


def asked_for(args: argparse.Namespace) -> Iterator[tuple[dict, list[Part]]]:
    """What is asked, as --json names it, and its parts; InputError points at a mistake."""
    if args.picture or args.clip:
        kind = "picture" if args.picture else "clip"
        yield {kind: getattr(args, kind)}, [Part(1.0, kind, getattr(args, kind))]
    elif args.queries:
        for line, text in read_queries(args.queries):
            try:
                parts = parse(text)
            except InputError as error:
                raise InputError(f"{args.queries}, line {line}: {error}") from error
            yield {"query": text}, parts
    else:
        parts = parse_arguments(args.text)
        yield {"query": written(parts)}, parts


def in_batches(engine: Engine, queries: list[list[Part]], **same) -> Iterator[Answers]:
    """The engine's answers to each query; the pictures and clips of a batch are read when its turn has come."""
    from narvid.search.engine import TOGETHER

    def seen(part: Part) -> Part:
        if part.kind not in ("picture", "clip"):
            return part
        try:
            value = engine.see_clip(part.value) if part.kind == "clip" else engine.see_picture(read_bytes(part.value))
        except InputError as error:
            raise InputError(str(error) if part.value in str(error) else f"{part.value}: {error}") from error
        return part._replace(value=value)

    for start in range(0, len(queries), TOGETHER):
        batch = [[seen(part) for part in parts] for parts in queries[start:start + TOGETHER]]
        yield from engine.search(batch, **same)


def serve_index(args: argparse.Namespace) -> None:
    """Show the page until it is stopped."""
    from narvid.search import server

    with open_store(args.index, read_only=True) as store:
        engine = open_engine(store, args.checkpoint, args.tokenizer)
        server.serve(store, engine, host=args.host, port=args.port, show=args.browser, allowed=args.allow_host,
                     password=args.password, opened=args.open)


def open_engine(store: Store, checkpoint: str | None, tokenizer: str | None = None) -> Engine:
    """The engine of an index with the model that made it, from where it was or from where the flags say."""
    from narvid.search.embedding import Embedder
    from narvid.search.engine import Engine

    settings = store.settings
    there = checkpoint or settings["checkpoint"]
    if there is not None and not Path(there).exists():
        raise InputError(f"{there}: the index's model is not there; say with --checkpoint where it lies")
    with redirect_stdout(sys.stderr):  # what loading says is no answer
        embedder = Embedder.load(there, clip_model=settings["clip_model"], narration=settings["narration"],
                                 clip_pretrained=settings["clip_pretrained"],
                                 tokenizer=tokenizer or settings.get("tokenizer"),
                                 eval_precision=settings.get("eval_precision", "train"))  # as it was indexed
    return Engine(store, embedder)


# ---- reading and printing ----


def in_full(name: str | None) -> str | None:
    """A file or folder by its whole path, for the index remembers it; any other name as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def read_queries(name: str) -> list[tuple[int, str]]:
    """The number of a line and its query, blank lines left out; "-" is the standard input."""
    where, advice = "the standard input" if name == "-" else name, "give a UTF-8 file of one query a line"
    text = as_text(sys.stdin.buffer.read(), where, advice=advice) if name == "-" else read_text(name, advice=advice)
    queries = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not queries:
        raise InputError(f"{where} holds no query: write one a line")
    return queries


def read_bytes(path: str) -> bytes:
    """A picture file, whole."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def engine(text: str) -> str:
    """faiss, or milvus: and what follows."""
    if text != "faiss" and not in_engine(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no engine: faiss and milvus:URI are")
    return text


def where(text: str) -> Path | str:
    """A folder, or an index in an engine by its name."""
    return text if in_engine(text) else Path(text)


def day(text: str) -> float:
    """A date, 2024-12-31 -> its midnight here, in seconds since 1970."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").timestamp()
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date of the form 2024-12-31") from error


def shortened(path: str) -> str:
    """A path that would make a table too wide, without its middle."""
    return path if len(path) <= WIDEST else f"{path[:WIDEST // 2 - 2]} .. {path[2 - WIDEST // 2:]}"


def table(asked: str, answers: Answers) -> Iterator[str]:
    """The answers as lines of a table; below each what the filter kept, with its weight."""
    rows = [(shortened(printable(a.path)), f"{clock(a.start)}-{clock(a.end)}", a) for a in answers]
    wide = max([len(path) for path, _, _ in rows] + [4])
    poor = ": nothing here fits well; these come nearest" if answers.fits is False else ""
    yield printable(asked) + (poor if rows else ": no answer")
    if rows:
        yield f"{'rank':>5}  {'file':{wide}}  {'time':>13}  {'S_qv':>6}  {'S_qn':>6}  {'fused':>6}"
    for path, time, a in rows:
        s_narration = "" if a.s_narration is None else f"{a.s_narration:.3f}"
        yield f"{a.rank:>5}  {path:{wide}}  {time:>13}  {a.s_video:>6.3f}  {s_narration:>6}  {a.score:>6.2f}"
        more = f", {a.more} more moment{'s' if a.more > 1 else ''}" if a.more else ""
        yield f"{'':7}{printable(a.words)}{more}"
        if a.said:
            yield f"{'':7}{clock(a.said.start)} said: {printable(a.said.text)} ({a.speech:+.2f})"
        kept = [f"{clock(f.time)} {f.frame_weight:.0%}" for f in a.frames if f.frame_weight > 0]
        yield f"{'':7}frames {', '.join(kept)}"
        for frame in (f for f in a.frames if f.sentence_weight > 0):
            yield f"{'':7}{clock(frame.time):>6} {frame.sentence_weight:>4.0%}  {printable(frame.sentence)}"


def main(argv: list[str] | None = None) -> None:
    """The command narvid-search; a mistake ends it with one sentence and exit status 1."""
    args = parse_args(argv)
    try:
        {"index": index_videos, "query": query_index, "serve": serve_index}[args.command](args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def start() -> None:
    """What narvid-search runs."""
    command(main)


if __name__ == "__main__":
    start()

"""How fast a narration is made around the model: reading, the server's client, preparing pictures for a local model.

  python scripts/bench_narrate.py --frames data/msrvtt/frames
  python scripts/bench_narrate.py --frames FRAMES --captioner Qwen/Qwen2.5-VL-3B-Instruct        with its own processor

  reading and encoding: a frame's file, checked and turned into the bytes of its request, by one core
  client: requests to a server that knows its answer already and runs in another process; processor time of the client
  preparing: a local model's pictures by worker processes, whose number is doubled until there are no more cores

Processor time (time.process_time) hardly depends on what else runs on the machine; pictures a second of the clock do.
Frames are read once before, so the disk does not count. Without --captioner the pictures are prepared as for LLaVA 1.5
(336 pixels) and for Qwen2-VL (as many patches as the picture has), from their image processors' own default settings.
Here: measuring. Not here: what is measured (narvid/narration/asking.py, chat_server.py, preparing.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from narvid import InputError
from narvid.data.frames import frame_path, load_frame_index
from narvid.flags import command, positive
from narvid.narration.asking import FRAMES, Job, by_server
from narvid.narration.captioners import LocalCaptioner
from narvid.narration.chat import Chat, data_url
from narvid.narration.chat_server import REQUESTS, ServerCaptioner
from narvid.narration.preparing import Preparer, prepared_ahead, read_picture

PARTS = ("reading", "client", "preparing")
ANSWER = json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "created": 1764000000, "model": "m", "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content":
     "A man and a woman stand in a kitchen and prepare a meal; both look at the bowl on the table."}}],
    "usage": {"prompt_tokens": 603, "completion_tokens": 22, "total_tokens": 625}}).encode()


# ---- a server that costs nothing ----


def serve(listening: socket.socket) -> None:
    """Answer every POST at once, on connections that stay open; a thread a connection."""

    def talk(connection: socket.socket) -> None:
        reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        with connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                length = 0
                while line.strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                    line = lines.readline()
                lines.read(length)
                connection.sendall(reply % (len(ANSWER), ANSWER))

    while True:
        threading.Thread(target=talk, args=(listening.accept()[0],), daemon=True).start()


# ---- the three measurements ----


def bench_reading(paths: Sequence[Path]) -> None:
    """Print pictures a second of one core, from the file to the bytes of the request."""
    chat = Chat("m", shown="m")
    start, size = time.process_time(), 0
    for path in paths:
        size += len(chat.body(data_url(read_picture(path)), None))
    seconds = time.process_time() - start
    print(f"reading and encoding: {len(paths) / seconds:8,.0f} pictures/s a core, {1000 * seconds / len(paths):.3f} ms "
          f"of processor time a picture, {size / len(paths) / 1000:.0f} kB a request")


def bench_client(paths: Sequence[Path], requests: int) -> None:
    """Print pictures a second, and the client's processor time a picture, reading and encoding with it."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * requests) as listening:
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listening,), daemon=True)
        server.start()
        captioner = ServerCaptioner(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "m")
    jobs = [Job("", path, 0.0, [], 0) for path in paths]
    for count in (requests, len(jobs)):  # the first ones open the connections
        start, cpu = time.perf_counter(), time.process_time()
        answers = [answer for _, answer in by_server(jobs[:count], captioner, requests)]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        if not all(isinstance(answer, str) for answer in answers):
            raise InputError(f"the server of this script failed: {answers[0]}")
    server.terminate()
    print(f"client:               {len(jobs) / seconds:8,.0f} pictures/s, {requests} requests under way, "
          f"{1000 * cpu / len(jobs):.3f} ms of processor time a picture (at most 0.8 wanted)")


def bench_preparing(name: str, preparer: Preparer, paths: Sequence[Path], size: int) -> None:
    """Print pictures a second of the clock by number of workers."""
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 0
    while workers <= cores:
        prepared = prepared_ahead(preparer, batches, single=False, workers=workers)
        next(prepared)  # the workers have started
        start = time.perf_counter()
        n = sum(1 for _ in prepared) * size
        where = f"{workers} workers" if workers else "in this process"
        print(f"preparing, {name}: {n / (time.perf_counter() - start):8,.0f} pictures/s, {where}, batches of {size}")
        workers = max(1, 2 * workers)


def processors() -> dict[str, Preparer]:
    """The image processors of two families with their default settings, without text: what costs are the pictures."""
    import transformers

    llava = transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    qwen = transformers.Qwen2VLImageProcessor()
    return {"LLaVA 1.5": Preparer("LLaVA 1.5", llava, None), "Qwen2-VL": Preparer("Qwen2-VL", qwen, None)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the three measurements."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=Path, required=True, metavar="DIR", help="frame folder, of extract_frames.py")
    parser.add_argument("--pictures", type=positive, default=2000, help="frames to take, again from the first if few")
    parser.add_argument("--requests", type=positive, default=REQUESTS, help="under way at once")
    parser.add_argument("--captioner", metavar="NAME", help="hub name or folder of a model whose processor is measured")
    parser.add_argument("--batch_size", type=positive, default=FRAMES, help="pictures prepared together")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="of the three, these")
    args = parser.parse_args(argv)
    every = [frame_path(args.frames, video, index) for video, times in load_frame_index(args.frames).items()
             for index in range(len(times))]
    paths = [every[number % len(every)] for number in range(args.pictures)]
    for path in set(paths):
        read_picture(path)
    if "reading" in args.only:
        bench_reading(paths)
    if "client" in args.only:
        bench_client(paths, args.requests)
    if "preparing" not in args.only:
        return
    import torch

    torch.set_num_threads(1)
    found = {args.captioner: LocalCaptioner(args.captioner).prepare} if args.captioner else processors()
    for name, preparer in found.items():
        bench_preparing(name, preparer, paths[:max(args.batch_size * 2, len(paths) // 4)], args.batch_size)


if __name__ == "__main__":
    command(main)

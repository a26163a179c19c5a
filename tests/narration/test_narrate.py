"""narvid/narration/narrate.py and journals.py through the command line, against a small server of the test's own.

The server answers with a sentence that names the picture it was sent, so a sentence at the wrong frame is seen; it
counts what it is asked, so a frame captioned twice is seen; and it fails in the ways that servers do. No torch here.
"""

import base64
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from narvid import InputError
from narvid.narration import __main__ as narration
from narvid.narration import answers, journals, pictures
from narvid.data.frames import frame_path, pick_frames
from narvid.data.narrations import Narration, load_narrations, write_narrations

ROOT = Path(__file__).resolve().parents[2]
VIDEOS = {"a": 7, "b": 5, "c": 1, "d": 6, "e": 4}  # frames of each


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No rank, array or key of the machine that runs the tests; and no certificates, which take longer than a run."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "OPENAI_API_KEY"):
            monkeypatch.delenv(name)


# ---- frames ----


def make_frames(folder: Path, videos=VIDEOS, seed=0) -> Path:
    """A frame folder whose frames all differ: 8 x 8 coloured patches."""
    rng, lines = np.random.RandomState(seed), []
    for video, n in videos.items():
        (folder / video).mkdir(parents=True)
        for index in range(n):
            patches = rng.randint(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(patches).resize((64, 64), 0).save(frame_path(folder, video, index), quality=95)
        lines.append(json.dumps({"video": video, "times": [round(1.001 * index, 3) for index in range(n)]}) + "\n")
    with open(folder / "index.jsonl", "a") as index_file:
        index_file.writelines(lines)
    return folder


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return make_frames(tmp_path_factory.mktemp("frames"))


def sentence_of(picture: bytes) -> str:
    return f"picture {zlib.crc32(picture)}"


def expected_of(frames: Path, videos=VIDEOS) -> dict[str, list[str]]:
    return {video: [sentence_of(frame_path(frames, video, index).read_bytes()) for index in range(n)]
            for video, n in videos.items()}


def sentences(out: Path) -> dict[str, list[str]]:
    return {video: narration.sentences for video, narration in load_narrations(out).items()}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the server ----


def chat(text, finish="stop", **message) -> tuple[int, str, str]:
    answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text} | message}]}
    return 200, "application/json", json.dumps(answer)


class Server:
    """What it was asked; to be replaced by a test: `answer`: picture -> (status, type, body), and `refuse`: request ->
    the same, or None to answer."""

    def __init__(self):
        self.asked, self.bodies, self.starts = Counter(), [], []
        self.now = self.most = 0
        self.answer = lambda picture: chat(sentence_of(picture))
        self.refuse = lambda body: None
        self.headers, self.trickle = {"retry-after-ms": "1"}, 0.0  # trickle: seconds between two bytes of an answer
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.handle(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def handle(self, request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        picture = base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
        with self.lock:
            self.asked[sentence_of(picture)] += 1
            self.bodies.append((request.path, request.headers, body))
            self.starts.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        status, kind, text = self.refuse(body) or self.answer(picture)
        with self.lock:
            self.now -= 1
        try:
            request.send_response(status)
            for name, value in {"content-type": kind, **self.headers}.items():
                request.send_header(name, value)
            request.end_headers()
            for part in text if self.trickle else [text]:
                request.wfile.write(part.encode())
                time.sleep(self.trickle)
        except OSError:
            pass  # the client gave up


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def flags(frames, out, server, *more) -> list[str]:
    return [str(x) for x in ("--frames", frames, "--out", out, "--server", server.url, "--model", "m",
                             "--batch_size", 3, "--retries", 0, "--timeout", 5, *more)]


def run(frames, out, server, *more) -> None:
    narration.main(["narrate", *flags(frames, out, server, *more)])


def error(frames, out, server, *more) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(frames, out, server, *more)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def asked_for_narration(server, frames) -> Counter:
    """Requests a frame, without the two or more of the check before a run."""
    expected = {text for texts in expected_of(frames).values() for text in texts}
    return Counter({text: n for text, n in server.asked.items() if text in expected})


# ---- a run ----


def test_every_frame_gets_its_own_sentence(frames, tmp_path, server, capsys):
    out = tmp_path / "new" / "narrations.jsonl"
    run(frames, out, server, "--prompt", "B")
    assert sentences(out) == expected_of(frames)
    assert list(load_narrations(out)) == list(VIDEOS)  # the frame index's order
    narration = load_narrations(out)["a"]
    assert narration.captioner == "m server greedy max_new_tokens=77 same_frame=5"
    assert narration.prompt.startswith("You want to view an image, one of the frames")
    assert narration.times == [0.0, 1.001, 2.002, 3.003, 4.004, 5.005, 6.006]
    assert "5 videos, 23 frames; 0 have a sentence, 23 to caption" in capsys.readouterr().out
    path, headers, body = server.bodies[-1]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer none"
    assert body["temperature"] == 0 and body["max_tokens"] == 77 and body["model"] == "m"
    assert body["messages"][0]["content"][1]["text"] == narration.prompt
    before = server.asked.total()
    run(frames, out, server, "--prompt", "B")
    assert server.asked.total() == before and sentences(out) == expected_of(frames)
    assert sorted(p.name for p in tmp_path.rglob("*.jsonl")) == ["1-of-1.jsonl", "narrations.jsonl"]


def test_a_sampled_frame_is_sent_its_own_seed_whatever_the_batch(frames, tmp_path, server):
    seeds = []
    for size in (1, 4):
        server.bodies.clear()
        run(frames, tmp_path / f"{size}.jsonl", server, "--sample", "--captioner_seed", 3, "--batch_size", size)
        seeds.append({body["messages"][0]["content"][0]["image_url"]["url"]: (body["seed"], body["temperature"])
                      for _, _, body in server.bodies if "seed" in body})
    assert seeds[0] == seeds[1]
    assert len({seed for seed, _ in seeds[0].values()}) == 23 and {t for _, t in seeds[0].values()} == {0.2}
    captioner = load_narrations(tmp_path / "1.jsonl")["a"].captioner
    assert captioner == "m server sample temperature=0.2 seed=3 max_new_tokens=77 same_frame=5"


def test_new_videos_are_added_and_the_others_kept(tmp_path, server):
    frames, out = make_frames(tmp_path / "frames", {"a": 3, "b": 2}), tmp_path / "n.jsonl"
    run(frames, out, server)
    first = server.asked.copy()
    make_frames(frames, {"c": 2}, seed=1)
    for part in (tmp_path / "n.jsonl.parts").iterdir():
        part.unlink()  # OUT alone is enough
    run(frames, out, server)
    assert sentences(out) == expected_of(frames, {"a": 3, "b": 2, "c": 2})
    assert all(server.asked[text] == first[text] for text in expected_of(frames, {"a": 3, "b": 2})["a"])


def test_only_listed_videos_and_picked_frames(frames, tmp_path, server, capsys):
    (tmp_path / "test.jsonl").write_text('{"video": "d", "query": "x"}\n{"video": "zz", "query": "x"}\n')
    run(frames, tmp_path / "n.jsonl", server, "--list", tmp_path / "test.jsonl", "--max_frames", 4)
    assert sentences(tmp_path / "n.jsonl") == {"d": [expected_of(frames)["d"][index] for index in pick_frames(6, 4)]}
    assert "1 listed videos have no frames" in capsys.readouterr().out
    run(frames, tmp_path / "n.jsonl", server, "--list", tmp_path / "test.jsonl")  # the frames between are added
    assert sentences(tmp_path / "n.jsonl") == {"d": expected_of(frames)["d"]}
    assert set(asked_for_narration(server, frames).values()) <= {1, 2, 3}


def test_many_requests_at_once_but_no_more_than_asked_for(frames, tmp_path, server):
    def slow(picture):
        time.sleep(0.02)
        return chat(sentence_of(picture))

    server.answer = slow
    run(frames, tmp_path / "n.jsonl", server, "--batch_size", 4)
    assert server.most == 4


def test_no_more_requests_a_second_than_asked_for(frames, tmp_path, server):
    run(frames, tmp_path / "n.jsonl", server, "--requests_per_second", 100, "--batch_size", 8)
    assert server.starts[-1] - server.starts[0] > 0.01 * (len(server.starts) - 2)


def test_the_script_runs_it(frames, tmp_path, server):
    command = ["bash", ROOT / "scripts" / "narrate.sh", frames, tmp_path / "n.jsonl", *flags(frames, "x", server)[4:]]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, check=False,
                          env=os.environ | {"NARVID_PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    assert sentences(tmp_path / "n.jsonl") == expected_of(frames)


# ---- near-identical frames ----


def drifting(folder: Path, levels) -> list[Path]:
    """Grey frames of these levels, with a patch of noise that all share."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(0).randint(0, 40, (32, 32))
    paths = [frame_path(folder.parent, folder.name, index) for index in range(len(levels))]
    for path, level in zip(paths, levels, strict=True):
        Image.fromarray((noise + level).astype(np.uint8)).convert("RGB").save(path, quality=95)
    return paths


@pytest.mark.parametrize("threshold, expected", [
    (5.0, [0, 0, 0, 3, 3, 3, 6, 7, 7]),
    (1.0, [0, 1, 2, 3, 4, 5, 6, 7, 7]),
    (100.0, [0, 0, 0, 0, 0, 0, 0, 7, 7]),
    (0.0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
])
def test_slow_drift_adds_up(tmp_path, threshold, expected):
    paths = drifting(tmp_path / "v", [50, 52, 54, 56, 58, 60, 62, 180, 180])
    assert pictures.distinct_frames(paths, threshold) == expected


def test_a_small_thing_that_moves_makes_another_frame(tmp_path):
    paths = drifting(tmp_path / "v", [50, 50])
    picture = Image.new("RGB", (256, 256), (90, 90, 90))
    for path, left in zip(paths, (10, 40), strict=True):
        moved = picture.copy()
        moved.paste((250, 250, 250), (left, 100, left + 12, 112))
        moved.save(path, quality=95)
    seen = [pictures.thumbnail(path) for path in paths]
    assert np.abs(seen[0] - seen[1]).mean() < 2  # a mean would hardly notice
    assert pictures.distinct_frames(paths, pictures.SAME_FRAME) == [0, 1]


def test_frames_that_share_are_asked_once_and_told_each(tmp_path, server, capsys):
    paths = drifting(tmp_path / "frames" / "v", [50, 50, 50, 120, 120])
    (tmp_path / "frames" / "index.jsonl").write_text('{"video": "v", "times": [0, 1, 2, 3, 4]}\n')
    run(tmp_path / "frames", tmp_path / "n.jsonl", server, "--batch_size", 1)
    texts = [sentence_of(path.read_bytes()) for path in paths]
    assert sentences(tmp_path / "n.jsonl") == {"v": [texts[0]] * 3 + [texts[3]] * 2}
    assert "5 frames; 0 have a sentence, 2 to caption, 3 share a neighbour's (60.0%)" in capsys.readouterr().out
    assert server.asked[texts[0]] + server.asked[texts[3]] == 2


def test_a_broken_frame_stops_the_run_before_it_begins(tmp_path, server):
    frames = make_frames(tmp_path / "frames", {"a": 3})
    frame_path(frames, "a", 1).write_bytes(b"\xff\xd8 torn")
    assert "a/00001.jpg cannot be decoded" in error(frames, tmp_path / "n.jsonl", server)
    assert "a/00001.jpg" in error(frames, tmp_path / "n.jsonl", server, "--same_frame", 0)
    assert not (tmp_path / "n.jsonl").exists()


# ---- shards ----


@pytest.mark.parametrize("text, environment, expected", [
    (None, {}, (0, 1, True)),
    ("2/8", {}, (1, 8, True)),
    (None, {"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, False)),
    ("2/8", {"RANK": "0", "WORLD_SIZE": "2"}, (2, 16, True)),
    (None, {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "5",
            "SLURM_ARRAY_TASK_STEP": "2"}, (2, 3, True)),
    (None, {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "RANK": "1",
            "WORLD_SIZE": "2"}, (3, 6, False)),
    ("1/2", {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "5"}, (0, 2, True)),
])
def test_which_shard(text, environment, expected):
    assert journals.my_shard(text, environment) == expected


@pytest.mark.parametrize("text, environment", [
    ("0/8", {}), ("9/8", {}), ("x", {}), ("1/", {}), ("-1/2", {}),
    (None, {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1"}),
])
def test_no_such_shard(text, environment):
    with pytest.raises(InputError, match="shard"):
        journals.my_shard(text, environment)


def test_two_shards_make_the_file_that_one_makes(frames, tmp_path, server, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "n.jsonl"
    run(frames, whole, server)
    assert "2 frames have no sentence" not in capsys.readouterr().out
    server.asked.clear()
    run(frames, out, server, "--shard", "1/2")
    assert "shard 1/2 done; waiting for shards 2; the last to end writes" in capsys.readouterr().out
    assert not out.exists()
    assert "frames have no sentence yet" in error(frames, out, server, "--merge")
    run(frames, out, server, "--shard", "2/2")
    assert out.read_bytes() == whole.read_bytes()
    assert asked_for_narration(server, frames).total() <= 23 + 4  # each once, and the two checks before the shards
    out.unlink()
    run(frames, out, server, "--merge")
    assert out.read_bytes() == whole.read_bytes()


def test_merging_with_a_torn_journal(frames, tmp_path, server):
    """Half a last line is a frame without a sentence, not half a sentence; its shard makes it again."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "n.jsonl"
    run(frames, whole, server)
    for shard in ("1/2", "2/2"):
        run(frames, out, server, "--shard", shard)
    out.unlink()
    journal = tmp_path / "n.jsonl.parts" / "2-of-2.jsonl"
    journal.write_bytes(journal.read_bytes()[:-15])
    assert "1 frames have no sentence yet; run the shards" in error(frames, out, server, "--merge") and not out.exists()
    run(frames, out, server, "--shard", "2/2")
    assert out.read_bytes() == whole.read_bytes()


def test_the_number_of_shards_may_change(frames, tmp_path, server):
    out = tmp_path / "n.jsonl"
    run(frames, out, server, "--shard", "2/3")
    first = read_lines(tmp_path / "n.jsonl.parts" / "2-of-3.jsonl")
    run(frames, out, server)
    second = read_lines(tmp_path / "n.jsonl.parts" / "1-of-1.jsonl")
    captioned = Counter((entry["video"], entry["time"]) for entry in first + second)
    assert len(first) == 9 and len(captioned) == 23 and set(captioned.values()) == {1}
    assert sentences(out) == expected_of(frames)


def test_a_shard_that_runs_is_not_started_again(frames, tmp_path, server):
    with journals.open_journal(tmp_path / "n.jsonl", journals.Shard(0, 1, True).journal):
        assert "1-of-1.lock: is being written by another process" in error(frames, tmp_path / "n.jsonl", server)


# ---- faults ----


GARBAGE = {
    "a page": (200, "text/html", "<html>busy</html>"),
    "half a json": (200, "application/json", '{"choices": [{"mess'),
    "no choices": (200, "application/json", '{"object": "chat.completion", "choices": []}'),
    "null choices": (200, "application/json", '{"choices": null}'),
    "a list": (200, "application/json", "[1, 2]"),
    "no text": chat(None),
    "blank text": chat(" \n "),
    "nothing": (200, "application/json", ""),
    "refused": (400, "application/json", '{"error": {"message": "image too large"}}'),
    "overloaded": (503, "text/plain", "busy"),
}


def test_garbage_is_a_failure_and_never_a_sentence(frames, tmp_path, server, capsys):
    out, expected = tmp_path / "n.jsonl", expected_of(frames)
    places = [("a", 1), ("a", 3), ("a", 5), ("b", 0), ("b", 2), ("b", 4), ("d", 1), ("d", 3), ("d", 5), ("e", 1)]
    bad = dict(zip((expected[video][index] for video, index in places), GARBAGE.values(), strict=True))
    server.answer = lambda picture: bad.get(sentence_of(picture)) or chat(sentence_of(picture))
    run(frames, out, server)
    assert sentences(out) == {video: [text for text in texts if text not in bad] for video, texts in expected.items()}
    failed = read_lines(tmp_path / "n.failed.jsonl")
    assert [(entry["video"], round(entry["time"] / 1.001)) for entry in failed] == places
    reasons = dict(zip(GARBAGE, (entry["why"] for entry in failed), strict=True))
    assert "image too large" in reasons["refused"] and "503" in reasons["overloaded"]
    assert "empty" in reasons["blank text"] and "no text" in reasons["no text"]
    assert all("no chat completion" in reasons[fault] for fault in list(GARBAGE)[:5])
    assert "10 frames have none" in capsys.readouterr().out
    server.answer = lambda picture: chat(sentence_of(picture))
    run(frames, out, server)
    assert sentences(out) == expected_of(frames) and not (tmp_path / "n.failed.jsonl").exists()


def test_a_busy_server_is_asked_again(frames, tmp_path, server):
    seen = Counter()

    def busy(picture):
        seen[picture] += 1
        status = [408, 429, 500, 503][zlib.crc32(picture) % 4]
        return (status, "text/plain", "busy") if seen[picture] % 3 else chat(sentence_of(picture))

    server.answer = busy
    run(frames, tmp_path / "n.jsonl", server, "--retries", 2)
    assert sentences(tmp_path / "n.jsonl") == expected_of(frames)


def test_a_request_that_stalls_fails_alone(frames, tmp_path, server):
    bad = expected_of(frames)["b"][0]

    def stall(picture):
        if sentence_of(picture) == bad:
            time.sleep(1)
        return chat(sentence_of(picture))

    server.answer = stall
    run(frames, tmp_path / "n.jsonl", server, "--timeout", 0.3)
    assert [entry["video"] for entry in read_lines(tmp_path / "n.failed.jsonl")] == ["b"]
    assert sum(map(len, sentences(tmp_path / "n.jsonl").values())) == 22


def test_nobody_at_that_address(frames, tmp_path, server):
    server.http.server_close()
    message = error(frames, tmp_path / "n.jsonl", server)
    assert "no sentence for a first picture" in message and server.url in message
    server.url = "localhost"
    assert "no address such as" in error(frames, tmp_path / "n.jsonl", server)


def test_a_server_that_dies_half_way_stops_the_run_and_costs_nothing(frames, tmp_path, server):
    out, answered = tmp_path / "n.jsonl", []

    def dying(picture):
        answered.append(picture)
        return chat(sentence_of(picture)) if len(answered) <= 8 else (502, "text/plain", "bad gateway")

    server.answer = dying
    message = error(frames, out, server, "--batch_size", 1)
    assert f"{answers.STOP_AFTER} frames in a row got no sentence" in message and "502" in message
    assert not out.exists()
    kept = [entry for entry in read_lines(tmp_path / "n.jsonl.parts" / "1-of-1.jsonl") if "text" in entry]
    assert len(kept) == 6  # two were the check
    server.answer = lambda picture: chat(sentence_of(picture))
    server.asked.clear()
    run(frames, out, server)
    assert sentences(out) == expected_of(frames) and not (tmp_path / "n.failed.jsonl").exists()
    assert not set(server.asked) & {entry["text"] for entry in kept}


def test_a_server_that_does_not_see_is_found_out(frames, tmp_path, server):
    server.answer = lambda picture: chat("A busy street with cars and people.")
    message = error(frames, tmp_path / "n.jsonl", server)
    assert "the picture does not reach the model" in message and "image token" in message
    assert server.asked.total() == 4  # two frames of different videos, then two made pictures
    assert not (tmp_path / "n.jsonl").exists()


def test_videos_that_look_alike_do_not_condemn_a_captioner(frames, tmp_path, server):
    ours = {text for texts in expected_of(frames).values() for text in texts}
    server.answer = lambda picture: chat("a man" if sentence_of(picture) in ours else sentence_of(picture))
    run(frames, tmp_path / "n.jsonl", server)
    assert sentences(tmp_path / "n.jsonl")["c"] == ["a man"]


def test_killed_at_any_moment_it_goes_on_where_it_was(frames, tmp_path, server):
    out = tmp_path / "n.jsonl"

    def slow(picture):
        time.sleep(0.03)
        return chat(sentence_of(picture))

    server.answer = slow
    command = [sys.executable, "-m", "narvid.narration", "narrate", *flags(frames, out, server)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while server.asked.total() < 12 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL, (tmp_path / "log").read_text()
    journal = tmp_path / "n.jsonl.parts" / "1-of-1.jsonl"
    kept = read_lines(journal)
    assert 12 - 2 - 2 * 3 <= len(kept) < 23 and not out.exists()  # without the check, and those in hand
    with open(journal, "a") as f:
        f.write('{"video": "e", "time": 3.0')  # as a kill in the middle of a line leaves it
    server.asked.clear()
    run(frames, out, server)
    assert sentences(out) == expected_of(frames)
    entries = read_lines(journal)
    assert entries[: len(kept)] == kept and len(entries) == 23
    assert len({(entry["video"], entry["time"]) for entry in entries}) == 23


# ---- what is refused ----


@pytest.fixture(scope="module")
def made(frames, tmp_path_factory) -> Path:
    """A folder with a finished narration file and its journal."""
    server, folder = Server(), tmp_path_factory.mktemp("made")
    run(frames, folder / "n.jsonl", server)
    server.http.shutdown()
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    (tmp_path / "n.jsonl.parts").mkdir()
    for path in made.rglob("*.jsonl"):
        (tmp_path / path.relative_to(made)).write_bytes(path.read_bytes())
    return tmp_path / "n.jsonl"


@pytest.mark.parametrize("more", [["--prompt", "A"], ["--same_frame", 4], ["--sample"], ["--max_new_tokens", 9]])
@pytest.mark.parametrize("left", ["n.jsonl", "n.jsonl.parts/1-of-1.jsonl"])
def test_other_settings_do_not_mix(frames, copy, server, more, left):
    for path in (copy, copy.parent / "n.jsonl.parts" / "1-of-1.jsonl"):
        if path != copy.parent / left:
            path.unlink()
    message = error(frames, copy, server, *more)
    assert "was made by" in message and "give another --out" in message and copy.name in message
    assert not server.asked


def edit(path: Path, number: int, change) -> None:
    lines = read_lines(path)
    change(lines[number])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_two_sentences_for_a_frame_are_refused(frames, copy, server):
    edit(copy, 1, lambda line: line["sentences"][3].update(text="something else"))
    message = error(frames, copy, server)
    assert "video b: b has another sentence at 3.003 s than in" in message and "1-of-1.jsonl:" in message


def test_a_damaged_line_is_named(frames, copy, server):
    journal = copy.with_name("n.jsonl.parts") / "1-of-1.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:4], lines[4][:30] + "\n", *lines[5:]]))
    assert "1-of-1.jsonl:5: malformed JSON" in error(frames, copy, server)


def test_frames_extracted_anew_are_not_mixed_with_old_sentences(frames, copy, server, tmp_path):
    again = make_frames(tmp_path / "again")
    index = (again / "index.jsonl").read_text().replace("1.001", "1.25")
    (again / "index.jsonl").write_text(index)
    assert "a has a sentence at 1.001 s and no frame there" in error(again, copy, server)


@pytest.mark.parametrize("more, what", [
    (["--captioner", "x"], "do not go with --server"),
    (["--load_4bit"], "do not go with --server"),
    (["--shard", "3/2"], "expected i/n"),
    (["--api_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    (["--list", "no_such.jsonl"], "no_such.jsonl: cannot be read"),
    (["--batch_size", "0"], "above 0"),
])
def test_flags_that_do_not_fit(frames, tmp_path, server, more, what):
    assert what in error(frames, tmp_path / "n.jsonl", server, *more)


# ---- what sharing costs: scripts/share_sentences.py ----


def test_shared_sentences_are_those_of_the_captioned_frames(tmp_path, capsys):
    """Two stills of three frames each, then a frame of its own: two sentences are given three times."""
    from scripts import share_sentences

    frames = tmp_path / "frames"
    (frames / "v").mkdir(parents=True)
    for index, grey in enumerate((10, 10, 10, 200, 200, 201, 90)):
        Image.new("L", (32, 32), grey).save(frames / "v" / f"{index:05d}.jpg")
    times = [float(second) for second in range(7)]
    (frames / "index.jsonl").write_text(json.dumps({"video": "v", "times": times}) + "\n")
    narration = Narration("c", "p", times[:6], list("abcdef"))  # the last frame has no sentence
    write_narrations(tmp_path / "sentences.jsonl", [("v", narration)])
    share_sentences.main(["--frames", str(frames), "--same_frame", "0", "5"])
    assert "4 of 7 frames share a sentence, 57.1% saved" in capsys.readouterr().out
    share_sentences.main(["--frames", str(frames), "--same_frame", "5",
                          "--narrations", str(tmp_path / "sentences.jsonl"),
                          "--out", str(tmp_path / "shared.jsonl")])
    assert load_narrations(tmp_path / "shared.jsonl") == {"v": narration._replace(sentences=list("aaaddd"))}
    with pytest.raises(SystemExit, match="go together"):
        share_sentences.main(["--frames", str(frames), "--same_frame", "5", "--out", "x"])

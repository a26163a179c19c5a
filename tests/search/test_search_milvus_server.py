"""An index in a Milvus server, from files to the page: the commands that people type, kills of either side, two
processes that search at once, a browser. The server is milvus-lite's own, a process of this test.

Weights are random: what is tested is the way, not what is found.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymilvus", reason='pymilvus is not installed: pip install "narvid[milvus]"')
pytest.importorskip("milvus_lite", reason='milvus-lite is not installed: pip install "narvid[milvus]"')
pytest.importorskip("uvicorn")

import test_search_end_to_end
import test_search_index
from test_search_end_to_end import QUERY, ask, demo, run, serve_and_ask  # noqa: F401
from test_search_index import put, rows

from narvid import InputError
from narvid.search import milvus, milvus_lease
from narvid.search.__main__ import main, open_engine
from narvid.search.milvus import Milvus, place_of
from narvid.search.milvus_store import MilvusStore
from narvid.search.opening import open_store

# flake8: noqa: F811  fixtures are imported and asked for
pytestmark = pytest.mark.slow
BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
ROOT = Path(__file__).resolve().parents[2]


class Server:
    """milvus-lite's server, a process that can be killed and started again on the same folder."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self.folder), "--host", "127.0.0.1",
             "--port", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while time.monotonic() < until:
            try:
                Milvus(place_of(self.name("x"))).close()
                return
            except InputError:
                time.sleep(0.3)
        raise TimeoutError("milvus-lite's server does not start")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def name(self, index):
        return f"milvus:http://127.0.0.1:{self.port}/{index}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("milvus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        for name, seconds in {"SETTLE": 0.0, "BEAT": 0.5, "STALE": 3.0}.items():
            patch.setattr(milvus_lease, name, seconds)
        running = Server(home / "data")
        yield running
        running.kill()


@pytest.fixture(scope="module")
def index(demo, run, server):
    """The demo's five videos, indexed by the command."""
    main(["index", str(demo / "videos"), "--engine", server.name("films"), "--checkpoint", str(run), "--narrations",
          str(demo / "narrations.jsonl"), "--window", "6"])
    return server.name("films")


def test_index_query_and_page_agree(index, demo, capsys):
    test_search_end_to_end.test_index_query_and_page_agree(index, demo, capsys)


def test_the_answers_are_those_of_a_folder(index, demo, run, capsys):
    main(["index", str(demo / "videos"), "--out", str(demo / "folder"), "--checkpoint", str(run), "--narrations",
          str(demo / "narrations.jsonl"), "--window", "6"])
    for how in ([QUERY], [QUERY, "--folder", "more"], ["--clip", demo / "videos" / "video1.mp4"]):
        [here], [there] = ask(capsys, index, *how), ask(capsys, demo / "folder", *how)
        assert [a["score"] for a in here["answers"]] == pytest.approx([a["score"] for a in there["answers"]], abs=1e-6)
        assert [(a["path"], a["start"]) for a in here["answers"]] == [(a["path"], a["start"]) for a in there["answers"]]


def test_again_only_what_is_new(index, demo, run, server, capsys):
    again = ["index", str(demo / "videos"), "--engine", index, "--checkpoint", str(run), "--narrations",
             str(demo / "narrations.jsonl"), "--window", "6"]
    main(again)
    assert "0 files new, 0 changed, 0 removed, 5 as before, 1 of all could not be read" in capsys.readouterr().out
    with MilvusStore(index), pytest.raises(SystemExit, match=f"error: {index} is being written by .*: wait for it"):
        main(again)
    for argv, said in {(*again, "--out", "x"): "--out and --engine milvus:.* exclude each other",
                       (*again[:2], "--engine", "mysql:x"): "'mysql:x' is no engine: faiss and milvus:URI are",
                       again[:2] and ("index", again[1]): "give --out INDEX, the folder of the index",
                       ("query", server.name("none"), "x"): "none is no index, or one that was never finished",
                       ("query", index, "x", "--folder", "mroe"): "--folder mroe: no indexed video lies there"}.items():
        with pytest.raises(SystemExit, match=f"error: .*{said}"):
            main([str(word) for word in argv])


def test_a_browser_shows_and_plays_what_lies_in_the_engine(index):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSERS:
        pytest.skip("no chromium and no chrome on this machine")
    from test_search_server import running

    from narvid.search.server import create_app

    with open_store(index, read_only=True) as store, running(create_app(store, open_engine(store, None))) as port:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSERS[0], args=["--no-sandbox"])
            page, wrong = browser.new_page(viewport={"width": 1000, "height": 800}), []
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("#start").wait_for()
            page.locator("#q").fill(QUERY)
            page.keyboard.press("Enter")
            page.locator("#answers .card").first.wait_for()
            names = page.locator("#answers .card .name").all_inner_texts()
            assert sorted(names) == [f"video{n}.mp4" for n in range(5)]
            image = page.locator("#answers .card img").first
            page.wait_for_function("(image) => image.complete && image.naturalWidth > 0", arg=image.element_handle())
            page.locator("#answers .card button").first.click()
            video = page.locator("#answer video")
            page.wait_for_function("(video) => video.readyState > 1 && video.videoWidth > 0",
                                   arg=video.element_handle())
            assert not wrong
            browser.close()


# ---- kills ----

CHILD = """
import sys
import numpy as np
from narvid.search import milvus, milvus_lease
milvus.PATIENCE = 300.0
milvus_lease.SETTLE, milvus_lease.BEAT, milvus_lease.STALE = 0.0, 0.5, 3.0
from narvid.search.milvus_store import MilvusStore
with MilvusStore(sys.argv[1]) as store:
    for n in range(int(sys.argv[2]), int(sys.argv[3])):
        rng = np.random.default_rng(n)
        store.put_file(f"{n}.mp4", n, n, 9.0, "", [(k, float(k), rng.bytes(20_000), f"at {k}") for k in range(4)],
                       [(float(k), k + 5.0, [k]) for k in range(4)],
                       {"x": rng.standard_normal((4, 6, 64), dtype=np.float32)},
                       rng.standard_normal((4, 8), dtype=np.float32))
        print(n, flush=True)
"""


def child(name, first, stop):
    return subprocess.Popen([sys.executable, "-c", CHILD, name, str(first), str(stop)], stdout=subprocess.PIPE,
                            cwd=ROOT, text=True)


def inside(store):
    """All that the index holds, but for ids."""
    ids = store.all_windows()
    return ({file.path: file[2:] for file in store.files()}, [window[2:] for window in store.windows(ids)],
            store.features(ids)["x"].tobytes(), store.count(),
            {file.path: [(*f, store.jpeg(file.id, f.number)) for f in store.frames(file.id)] for file in store.files()})


@pytest.fixture(scope="module")
def whole(server):
    """Ten files, written without a break."""
    MilvusStore(server.name("whole"), create={}).close()
    assert child(server.name("whole"), 0, 10).wait() == 0
    with MilvusStore(server.name("whole"), read_only=True) as store:
        return inside(store)


def test_a_killed_client_goes_on_where_it_was(server, whole):
    MilvusStore(server.name("client"), create={}).close()
    first = 0
    for files in (2, 3, 2):  # killed somewhere in the file after these
        writing = child(server.name("client"), first, 10)
        for _ in range(files):
            assert writing.stdout.readline().strip() == str(first)
            first += 1
        time.sleep(0.02)
        writing.send_signal(signal.SIGKILL)
        writing.wait()
        with MilvusStore(server.name("client"), read_only=True) as store:
            there = len(store.files())
            assert there in (first, first + 1) and inside(store)[4] == {f"{n}.mp4": whole[4][f"{n}.mp4"]
                                                                         for n in range(there)}
        first = there
    assert child(server.name("client"), first, 10).wait() == 0
    with MilvusStore(server.name("client"), read_only=True) as store:
        assert [part for part in inside(store)[:1]] == [whole[0]] and inside(store)[2:] == whole[2:]


def test_a_killed_server_loses_nothing_and_the_client_goes_on(server, whole, monkeypatch):
    """SIGKILL of the engine while files are written, and another one in its place: the writer waits for it."""
    MilvusStore(server.name("engine"), create={}).close()
    reader = MilvusStore(server.name("engine"), read_only=True)
    writing = child(server.name("engine"), 0, 10)
    for n in range(3):
        assert writing.stdout.readline().strip() == str(n)
    server.kill()
    monkeypatch.setattr(milvus, "PATIENCE", 4.0)
    with pytest.raises(InputError, match=r"/engine does not answer: is Milvus running there\? The same command goes"):
        reader.count()
    server.start()
    said = writing.stdout.read()
    assert writing.wait() == 0 and "does not answer; it is asked again" in said, said
    seen = inside(reader)
    assert seen[0] == whole[0] and seen[2:] == whole[2:]
    reader.close()


def test_two_processes_search_while_a_third_writes(server, whole):
    """Both give the answers of one; neither sees half a file."""
    name = server.name("busy")
    MilvusStore(name, create={}).close()
    assert child(name, 0, 3).wait() == 0
    search = """
import sys, json
import numpy as np
from narvid.search.milvus_store import MilvusStore
from narvid.search.store import EVERY
with MilvusStore(sys.argv[1], read_only=True) as store:
    stage, seen, full = store.candidates(None, "text", 5), [], 0
    while full < 10:
        stage.refresh()
        [ids] = stage.nearest(np.ones((1, 8), np.float32), EVERY)
        try:
            files = [window.file for window in store.windows(store.all_windows())]
            store.features(ids)
        except KeyError:
            continue
        seen.append([files.count(file) for file in set(files)])
        full = len(seen[-1])
    print(json.dumps([sorted(ids.tolist()), [n for counts in seen for n in counts]]))
"""
    searching = [subprocess.Popen([sys.executable, "-c", search, name], stdout=subprocess.PIPE, cwd=ROOT, text=True)
                 for _ in range(2)]
    writing = child(name, 3, 10)
    answers = [json.loads(process.communicate(timeout=500)[0]) for process in searching]
    assert writing.wait() == 0
    assert answers[0][0] == answers[1][0] and len(answers[0][0]) == 5
    assert all(set(counts) == {4} for _, counts in answers)

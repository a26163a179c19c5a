"""The server of narvid.search: what it answers, and what nobody can get out of it.

A real server on a real socket, asked through http.client, which sends a request as it stands: `..`, ranges, Host. The
index is real, the engine is not: it answers with every window there is, and writes down what it was asked.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from io import BytesIO
from math import inf
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import av
import numpy as np
import pytest
from PIL import Image
from test_frames import make_clip

from narvid import InputError

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from narvid.search import __main__ as commands
from narvid.search import asked, clips, guard, server
from narvid.search import site as sites
from narvid.search.answers import Answer, Answers, Moment, Said, Seen
from narvid.search.engine import Abandoned
from narvid.search import Client
from narvid.search.parts import written
from narvid.search.reading import first_window
from narvid.search.serving import announced
from narvid.search.store import Store

HOSTILE = "<img src=x onerror=alert(1)> & 'co' #1?.mp4"
HOSTILE_SENTENCE = "<script>document.title='run'</script><svg onload=document.title='run'> &amp;"
SECRET = b"the secret of another folder"
WEIGHTS = [0.0, 0.25, 0.75, 0.0]  # of an answer's frames, at 0, 2, 4 and 6 s


def name_of(parts):
    """The one text of a query; of several parts, or another, how it is written."""
    if len(parts) == 1 and parts[0].kind == "text":
        return parts[0].value
    if len(parts) == 1 and parts[0].weight == 1:
        return f"{parts[0].kind} of {parts[0].value}"
    return written(parts)


class FakeEngine:
    """Every window of the folder is an answer; "none" has no answer, "slow" waits for `go_on`, others fail."""

    def __init__(self, store):
        self.store, self.asked, self.go_on, self.running = store, [], threading.Event(), []
        self.embedder = SimpleNamespace(frames_alone="no captioner: frames alone are searched")

    def search(self, queries, **same):
        return [self.found(query, **same) for query in queries]

    def found(self, parts, *, top, folder, min_seconds, max_seconds, skip=0, since=-inf, until=inf, wanted=None,
              one_a_file=True, exact=False, has_speech=False):
        query = parts if isinstance(parts, str) else name_of(parts)
        self.since, self.one_a_file = (since, until), one_a_file
        self.asked.append((query, top, folder, min_seconds, max_seconds))
        if query == "slow":
            self.running.append(query)
            assert self.running == ["slow"]
            try:
                while not self.go_on.wait(0.02):
                    if not wanted():
                        raise Abandoned
            finally:
                self.running.remove(query)
        if query == "fault":
            raise RuntimeError("secret detail")
        if query == "busy":
            raise InputError("the index is being written by another process; wait for it")
        where = folder, min_seconds, max_seconds, since, until, has_speech
        ids = [] if query == "none" else self.store.all_windows(*where)
        answers = Answers([self.answer(rank, w) for rank, w in enumerate(self.store.windows(ids), 1)][skip:skip + top])
        answers.total, answers.fits = len(ids), query != "gibberish"
        return answers

    def like_window(self, window, **same):
        answers = self.search([f"like {window}"], **same)[0]
        answers[:] = [answer for answer in answers if answer.window != window]
        answers.total -= 1
        return answers

    window = (4.0, 1.0, 32, 6)

    def see_picture(self, data):
        try:
            Image.open(BytesIO(data)).load()
        except OSError:
            raise InputError("the picture cannot be read: give a whole jpg or png") from None
        return f"{len(data)} bytes"

    def see_clip(self, path):
        return f"{len(first_window(path, *self.window))} frames"

    def see_frames(self, jpegs):
        return f"{len(jpegs)} frames"

    def answer(self, rank, window):
        frames = [Seen(*frame, weight, weight) for frame, weight in zip(self.store.frames(window.file), WEIGHTS)]
        why, said = f"because of {HOSTILE_SENTENCE}", self.store.speech.of_file(window.file)
        return Answer(rank, window.file, window.id, window.path, window.start, window.end, 3.0 - rank, 0.5, 0.25,
                      frames, why, "0:02 to 0:06: it stays red", 1, [Moment(window.id, 6.0, 8.0, 1.5, 3)],
                      *((0.9 * (3.0 - rank), Said(*said[0][1:])) if said else ()))


def put(store, name, *, path=None):
    """Index a file as it is: 4 frames, one window."""
    path = path or Path(store.settings["videos"]) / name
    status, jpg = path.stat(), BytesIO()
    Image.new("RGB", (32, 24), (200, 30, 30)).save(jpg, "JPEG")
    sentences = ["a red field", HOSTILE_SENTENCE, "it stays red", None]
    frames = [(i, 2.0 * i, jpg.getvalue(), sentence) for i, sentence in enumerate(sentences)]
    store.put_file(name, status.st_size, status.st_mtime_ns, 8.0, "", frames, [(0.0, 8.0, [0, 1, 2, 3])],
                   {"frames": np.zeros((1, 2), np.float32)}, np.zeros((1, 2), np.float32))


def make_index(home):
    """Four videos, the avi one no browser plays, and a file that could not be read -> the folder of the index."""
    videos = home / "videos"
    (videos / "sub" / "deep").mkdir(parents=True)
    make_clip(videos / "plain.mp4", np.arange(0, 8, 0.5))
    make_clip(videos / "sub" / "old.avi", np.arange(0, 8, 0.5), codec="mpeg4", rate=2)
    for name in (HOSTILE, "sub/deep/third.mp4"):
        (videos / name).write_bytes((videos / "plain.mp4").read_bytes())
    (home / "secret.mp4").write_bytes(SECRET)
    settings = {"videos": str(videos), "method": "narvid", "narration": True, "captioner": "people"}
    with Store(home / "index", create=settings) as store:
        for name in ("plain.mp4", "sub/old.avi", HOSTILE, "sub/deep/third.mp4"):
            put(store, name)
        store.fail_file("broken.mp4", 3, 3, "broken.mp4 cannot be opened as a video")
        id_of = {file.path: file.id for file in store.files()}
        store.speech.put(id_of[HOSTILE], "x", "", [(5.0, 7.0, f"he says {HOSTILE_SENTENCE}")], np.ones((1, 2)))
        store.speech.put(id_of["plain.mp4"], "y", "plain.srt is amiss", [], np.ones((0, 2)))
    return home / "index"


@contextmanager
def running(app, http="h11"):
    """A server in a thread of this process -> its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uvicorns = uvicorn.Server(uvicorn.Config(app, http=http, ws="none", log_level="critical"))
        thread = threading.Thread(target=uvicorns.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            uvicorns.should_exit = True
            thread.join()


class Site:
    """The running server, its index and its engine."""

    def __init__(self, store, engine, port):
        self.store, self.engine, self.port, self.videos = store, engine, port, Path(store.settings["videos"])
        self.id_of = {file.path: file.id for file in store.files()}

    def ask(self, path, method="GET", body=None, **headers):
        """(status, headers, body) of a request that is sent as it stands."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        answer = response.status, response.headers, response.read()
        connection.close()
        return answer

    def json(self, path, *args, **headers):
        status, got, body = self.ask(path, *args, **headers)
        assert got["content-type"] == "application/json", body
        return status, json.loads(body)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with Store(make_index(tmp_path_factory.mktemp("search")), read_only=True) as store:
        engine = FakeEngine(store)
        with running(server.create_app(store, engine)) as port:
            yield Site(store, engine, port)


# ---- answers ----


def test_a_search_says_where_and_why_and_hands_the_filters_on(site):
    status, found = site.json("/api/search?q=a+red+field&folder=sub/&top=7&min_seconds=2.5&max_seconds=60")
    assert status == 200 and found["query"] == "a red field"
    assert site.engine.asked[-1] == ("a red field", 7, "sub", 2.5, 60.0)
    assert [a["path"] for a in found["answers"]] == ["sub/old.avi", "sub/deep/third.mp4"]
    answer = found["answers"][0]
    assert (answer["best"], answer["moment"], answer["seconds"], answer["s_narration"]) == (2, 4.0, 8.0, 0.25)
    assert answer["frames"][1] == {"number": 1, "time": 2.0, "sentence": HOSTILE_SENTENCE, "frame_weight": 0.25,
                                   "sentence_weight": 0.25}


def test_more_like_a_window_leaves_it_out_and_names_it(site):
    status, found = site.json("/api/like?window=1")
    assert status == 200 and found["like"]["path"] == "plain.mp4" and len(found["answers"]) == 3
    assert found["like"]["frames"] == [0, 1, 2, 3]
    assert site.json("/api/like?window=99")[0] == 404
    assert site.json("/api/like?window=99999999999999999999999999")[0] == 400


def test_about_counts_and_names_what_could_not_be_read(site):
    status, about = site.json("/api/about")
    assert status == 200 and (about["files"], about["windows"], about["failures"]) == (4, 4, 1)
    assert about["failed"] == [{"path": "broken.mp4", "why": "broken.mp4 cannot be opened as a video"}]
    assert about["folders"] == ["sub", "sub/deep"] and about["narrated"] and about["loses"] == ""
    assert str(site.videos.parent) not in json.dumps(about)


@pytest.mark.parametrize("query, named", [
    ("", "q is missing"), ("q=%20", "q is missing"), ("q=" + 2001 * "x", "too long"), ("q=a&top=0", "top"),
    ("q=a&top=101", "top"), ("q=a&top=1e3", "top"), ("q=a&min_seconds=nan", "min_seconds"),
    ("q=a&min_seconds=-1", "min_seconds"), ("q=a&max_seconds=inf", "max_seconds"), ("q=a&max_seconds=", "max_seconds"),
    ("q=a&q=b", "q is given 2 times"), ("q=a&path=/etc", "'path'"), ("window=1", "'window'")])
def test_a_senseless_parameter_is_named(site, query, named):
    before = len(site.engine.asked)
    status, answer = site.json(f"/api/search?{query}")
    assert status == 400 and named in answer["error"] and len(site.engine.asked) == before


def test_faults_are_sentences_without_details(site):
    status, answer = site.json("/api/search?q=busy")
    assert status == 503 and answer["error"] == "the index is being written by another process; wait for it"
    status, answer = site.json("/api/search?q=fault")
    assert status == 500 and "secret" not in answer["error"] and "Traceback" not in answer["error"]
    assert site.json("/nothing")[0] == 404 and site.json("/api/search", "POST")[0] == 405


def test_file_names_that_are_no_text_are_answered(site, tmp_path):
    with Store(tmp_path / "index", create=site.store.settings) as store:
        put(store, "caf\udce9.mp4", path=site.videos / "plain.mp4")
        with running(server.create_app(store, FakeEngine(store))) as port:
            status, found = Site(store, None, port).json("/api/search?q=x")
    assert status == 200 and found["answers"][0]["path"] == "caf\udce9.mp4"


def test_a_picture_is_searched_by_its_bytes(site):
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    status, found = site.json("/api/picture?top=2", "POST", picture.getvalue())
    assert status == 200 and len(found["answers"]) == 2
    assert site.engine.asked[-1][0] == f"picture of {len(picture.getvalue())} bytes"
    name = found["picture"]
    again = site.json(f"/api/picture?picture={name}&skip=1")[1]  # of a page that is loaded again
    assert again["picture"] == name and len(again["answers"]) == 3
    assert site.ask(f"/picture/{name}")[2][8:12] == b"WEBP" and site.json("/api/picture?picture=x")[0] == 404
    assert site.json("/api/picture", "POST", b"no picture")[0] == 400
    assert site.json("/api/picture", "POST", b"")[0] == 400


def test_a_picture_of_any_size_does_not_fill_the_memory(site, monkeypatch):
    monkeypatch.setattr(asked, "MAX_PICTURE", 100_000)
    chunks = iter([b"x" * 60_000, b"x" * 60_000])  # without a length: chunked
    assert site.json("/api/picture", "POST", chunks)[0] == 413


# ---- clips ----


def test_a_clip_is_the_file_in_whole_and_in_part(site):
    whole = (site.videos / "plain.mp4").read_bytes()
    clip = f"/clip/{site.id_of['plain.mp4']}"
    status, headers, body = site.ask(clip)
    assert (status, headers["content-type"], headers["accept-ranges"]) == (200, "video/mp4", "bytes") and body == whole
    status, headers, body = site.ask(clip, "HEAD")
    assert status == 200 and headers["content-length"] == str(len(whole)) and body == b""
    for wanted, part in {"bytes=0-3": whole[:4], "bytes=5-": whole[5:], "bytes=-7": whole[-7:],
                         "bytes=0-99999999999999999999999": whole}.items():
        status, headers, body = site.ask(clip, Range=wanted)
        assert status == 206 and body == part and headers["content-range"].endswith(f"/{len(whole)}"), wanted


@pytest.mark.parametrize("asked, statuses", [
    ("bytes=9-2", {200, 400, 416}), ("bytes=99999999999-", {416}), ("bytes=-0", {416}), ("bytes=x-y", {200, 400}),
    ("bytes=", {200, 400}), ("items=0-1", {200, 400}), ("bytes=--5", {200, 400, 416}),
    ("bytes=" + "9" * 5000 + "-", {200, 400, 416}), ("bytes=0-1,4-5", {416}),
    ("bytes=" + ",".join(f"{i}-{i}" for i in range(0, 2000, 2)), {416})])
def test_odd_ranges_give_no_more_than_the_file(site, asked, statuses):
    size = (site.videos / "plain.mp4").stat().st_size
    status, _, body = site.ask(f"/clip/{site.id_of['plain.mp4']}", Range=asked)
    assert status in statuses and len(body) < size + 500


def test_what_browsers_cannot_play_is_a_preview_that_is_made_once(site):
    file, folder = site.id_of["sub/old.avi"], Path(site.store.path) / "clips"
    shutil.rmtree(folder, ignore_errors=True)
    status, how = site.json(f"/api/clip?file={file}&start=2&end=7")
    assert status == 200 and (how["preview"], how["begins"], how["ends"]) == (True, 2.0, 7.0)
    first, again = site.ask(how["src"]), site.ask(how["src"])
    assert first[0] == again[0] == 200 and first[1]["content-type"] == "video/mp4" and first[2] == again[2]
    with av.open(BytesIO(first[2])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert max(frame.time for frame in container.decode(video=0)) == pytest.approx(4.5, abs=0.6)
    assert len(list(folder.glob("*.encoded.mp4"))) == 1
    assert site.ask(how["src"], Range="bytes=0-3")[2] == first[2][:4]
    shutil.rmtree(folder)
    assert site.ask(how["src"], Range="bytes=0-1")[2] == first[2][:2]  # as Safari begins
    assert site.json("/api/clip?file=1&start=2&end=7")[1] == {"src": "/clip/1", "begins": 0.0, "ends": 8.0,
                                                              "preview": False}
    for path in (f"/preview/{file}?start=5&end=5", f"/preview/{file}?start=5", f"/preview/{file}?start=x&end=7",
                 "/api/clip?start=5&end=7", "/api/clip?file=99&start=1&end=2"):
        assert site.ask(path)[0] in (400, 404), path


def test_leaving_ends_what_is_made_for_one(site, tmp_path, monkeypatch):
    """Ten viewers of a long clip leave after its first bytes: nothing goes on, nothing is left, others are served."""
    steps = []

    def endless(path, start, end, sink, **how):
        with suppress(GeneratorExit):
            while True:
                steps.append(time.monotonic())
                sink(b"x" * 70_000)
                time.sleep(0.002)
                yield
        steps.append("closed")

    monkeypatch.setattr("narvid.search.preview.encoded", endless)
    file, folder = site.id_of["sub/old.avi"], Path(site.store.path) / "clips"
    for n in range(10):
        with socket.create_connection(("127.0.0.1", site.port)) as connection:
            connection.sendall(f"GET /preview/{file}?start={n / 10}&end=7 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    for _ in range(300):
        if steps.count("closed") == 10:
            break
        time.sleep(0.02)
    assert steps.count("closed") == 10 and not list(folder.glob("*.tmp"))
    before = len(steps)
    time.sleep(0.1)
    assert len(steps) == before
    assert site.ask("/clip/1")[0] == 200


def test_the_folder_of_made_clips_has_a_limit_and_is_swept(site, tmp_path):
    folder = clips.Folder(tmp_path, limit=250)
    file = site.store.file(1)
    places = [folder.place(file, n, n + 1, "encoded") for n in range(4)]
    assert len(set(places)) == 4
    for age, place in enumerate(places):
        place.write_bytes(bytes(100))
        os.utime(place, (age, age))
    (tmp_path / "half.tmp").touch()
    assert folder.find(places[0]) and not folder.find(tmp_path / "none.encoded.mp4")
    folder.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {places[0].name, places[3].name, "half.tmp"}
    folder.sweep(at_start=True)
    assert {path.name for path in tmp_path.iterdir()} == {places[0].name, places[3].name}
    clips.Folder(tmp_path / "none").sweep()


@pytest.mark.parametrize("name, codec, pix_fmt, expected", [
    ("a.mp4", "libx264", "yuv420p", ("file", "video/mp4")), ("a.mov", "libx264", "yuv420p", ("file", "video/mp4")),
    ("a.webm", "libvpx", "yuv420p", ("file", "video/webm")), ("a.mkv", "libx264", "yuv420p", ("copied", "video/mp4")),
    ("a.mp4", "libx264", "yuv444p", ("encoded", "video/mp4")), ("a.mp4", "mpeg4", "yuv420p", ("encoded", "video/mp4"))])
def test_how_browsers_play_files(tmp_path, name, codec, pix_fmt, expected):
    path = make_clip(tmp_path / name, [0, 0.5, 1], codec=codec, pix_fmt=pix_fmt, rate=2)
    assert clips.how_played(path, 0, 0)[:2] == expected
    assert clips.how_played(path, 0, 0, 1.5, "the time stamps leap by 9 s at 1.0 s") == ("encoded", "video/mp4", True)


@pytest.mark.parametrize("start, end, codec", [(2.0, 7.0, "h264"), (0.0, 3.0, "h264")])
def test_a_stretch_to_keep_is_copied_where_it_can_be(site, start, end, codec):
    status, headers, body = site.ask(f"/cut/1?start={start}&end={end}")
    assert status == 200 and f'filename="plain_{start:.0f}-{end:.0f}.mp4"' in headers["content-disposition"]
    with av.open(BytesIO(body)) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == codec
        assert container.duration / 1e6 >= end - start - 0.6
    for _ in range(100):  # it goes when it has been sent
        if not (left := list((Path(site.store.path) / "clips").glob("*.tmp.mp4"))):
            break
        time.sleep(0.02)
    assert not left
    assert site.json("/cut/1?start=0&end=9999")[0] == 400


def test_only_its_own_machine_gets_to_know_where_a_file_lies(site, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **how: started.append(command))
    path = str(site.videos / "plain.mp4")
    assert site.json("/api/path?file=1") == (200, {"path": path})
    assert site.json("/api/reveal?file=1", "POST")[0] == 200 and str(Path(path).parent) in started[0][-1]
    assert site.json("/api/reveal?file=1")[0] == 405 and site.json("/api/path")[0] == 400
    with running(server.create_app(site.store, site.engine, local=False)) as port:
        other = Site(site.store, site.engine, port)
        assert other.json("/api/path?file=1")[0] == other.json("/api/reveal?file=1", "POST")[0] == 403
    assert len(started) == 1


def test_frames_come_from_the_index_alone(site):
    file = site.id_of[HOSTILE]
    status, headers, body = site.ask(f"/frame/{file}/2")
    assert (status, headers["content-type"]) == (200, "image/jpeg") and body == site.store.jpeg(file, 2)
    for path in (f"/frame/{file}/4", "/frame/99/0", f"/frame/{file}/-1", f"/frame/{file}/0.png"):
        assert site.ask(path)[0] == 404, path


# ---- what cannot be had ----


@pytest.mark.parametrize("path", [
    "/clip/../../secret.mp4", "/clip/..%2f..%2fsecret.mp4", "/clip/%2e%2e/secret.mp4", "/clip/../secret.mp4",
    "//secret.mp4", "/clip//etc/passwd", "/clip/%2Fetc%2Fpasswd", "/clip/plain.mp4", "/clip/0", "/clip/-1", "/clip/1.0",
    "/clip/1%00", "/clip/99999999999999999999", "/clip/" + 5000 * "9", "/clip/%D9%A1", "/clip/5",
    "/frame/1/..%2f..%2f0.jpg", "/index.db", "/page.html", "/../server.py"])
def test_no_path_of_a_request_leads_to_a_file(site, path):
    status, _, body = site.ask(path)
    assert status == 404 and SECRET not in body and b"ftyp" not in body


def test_a_file_that_is_not_the_indexed_one_is_not_served(site, tmp_path):
    videos, clip = site.videos, f"/clip/{site.id_of['sub/deep/third.mp4']}"
    path, folder = videos / "sub" / "deep" / "third.mp4", videos / "sub" / "deep"
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)

    def refused(status):
        got, answer = site.json(clip)
        assert got == status and "third.mp4" in answer["error"]

    path.unlink()
    refused(410)
    path.symlink_to(videos.parent / "secret.mp4")  # out of the folder
    refused(403)
    path.unlink()
    path.symlink_to(path)  # in a circle
    refused(410)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    refused(403)
    path.unlink()
    path.write_bytes(whole[:-1] + b"x")  # another content of the same size
    refused(409)
    path.write_bytes(whole)
    os.utime(path, ns=times)
    assert site.ask(clip)[0] == 200
    folder.rename(tmp_path / "deep")
    folder.symlink_to(tmp_path / "deep")  # the same file, but outside
    refused(403)
    folder.unlink()
    (tmp_path / "deep").rename(folder)


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:{port}"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""},
    {"Host": "user@127.0.0.1"}, {"Host": "192.168.0.7"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://["}, {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"}])
def test_other_sites_are_not_answered(site, headers):
    headers = {name: value.format(port=site.port) for name, value in headers.items()}
    before = len(site.engine.asked)
    for path, method in (("/api/search?q=x", "GET"), ("/api/picture", "POST"), ("/clip/1", "GET"),
                         ("/frame/1/0", "GET")):
        status, answer = site.json(path, method, b"x" if method == "POST" else None, **headers)
        assert status == 403 and answer["error"], path
    assert len(site.engine.asked) == before


def test_the_page_itself_may_be_linked_to_and_ask(site):
    assert site.ask("/?q=x", Sec_Fetch_Site="cross-site")[0] == 200
    for host in (f"127.0.0.1:{site.port}", f"localhost:{site.port}", f"[::1]:{site.port}"):
        assert site.ask("/api/search?q=x", Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200


def test_names_of_a_server_that_others_reach(monkeypatch):
    names = guard.names_of("0.0.0.0")
    for host, ours in {"192.168.0.7:8000": True, "[fe80::1]:8000": True, "evil.example": False,
                       socket.gethostname(): True, "1.2.3.4.evil.example": False}.items():
        assert guard.is_ours(host, names) == ours, host
    assert not guard.is_ours("192.168.0.7", guard.names_of("127.0.0.1"))


def test_every_answer_keeps_the_page_to_itself(site):
    for path in ("/", "/page.js", "/api/about", "/clip/1", "/nothing"):
        headers = site.ask(path)[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    pages = {path.name: path.read_text(encoding="utf-8") for path in server.PAGE.iterdir()}
    for name, text in pages.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|https?://", text), name
        assert not re.search(r"<script>|<style|\son\w+=| style=", text), name


def test_what_programs_can_ask_is_written_down(site):
    """Every address of the server stands in openapi.json with the parameters that it takes, and no other."""
    api = site.json("/openapi.json")[1]
    routes = {route.path: route.methods - {"HEAD"} for route in server.create_app(site.store, site.engine).routes}
    routes = {path: methods for path, methods in routes.items() if path not in server.FILES}
    assert {path: {method.upper() for method in of} for path, of in api["paths"].items()} == routes
    for path, of in api["paths"].items():
        for method, said in of.items():
            names = [api["components"]["parameters"][p["$ref"].split("/")[-1]]["name"] if "$ref" in p else p["name"]
                     for p in said["parameters"]]
            if not path.startswith(("/api/search", "/api/like", "/api/picture")):
                continue
            assert set(asked.FILTERS) <= set(names)
            status, answer = site.json(f"{path}?nonsense=1", method.upper(), b"x" if method == "post" else None)
            assert status == 400 and all(name in answer["error"] for name in names)
    answer = site.json("/api/search?q=x")[1]["answers"][0]
    assert answer.keys() == api["components"]["schemas"]["Answer"]["properties"].keys()
    assert site.ask("/api")[1]["content-type"].startswith("text/html")


# ---- a password ----


@pytest.fixture
def locked(site, monkeypatch):
    monkeypatch.setattr(guard, "WRONG_SECONDS", 0.05)
    app = server.create_app(site.store, site.engine, password="open \u00e9 sesame", key="of-the-machine", local=False)
    with running(app) as port:
        yield Site(site.store, site.engine, port)


def test_without_the_password_nothing_is_shown(locked):
    for path in ("/api/search?q=x", "/clip/1", "/frame/1/0", "/openapi.json", "/page.js", "/api/about"):
        assert locked.json(path)[0] == 401, path
    status, _, page = locked.ask("/")
    assert status == 401 and b'type="password"' in page and b"plain" not in page
    form = {"Content_Type": "application/x-www-form-urlencoded", "Origin": f"http://127.0.0.1:{locked.port}"}
    for wrong in (b"password=wrong", b"password=", b"", b"password=open%20%C3%A9%20sesam", bytes(5000)):
        status, headers, _ = locked.ask("/login", "POST", wrong, **form)
        assert status in (401, 413) and "set-cookie" not in headers
    status, headers, _ = locked.ask("/login", "POST", b"password=open+%C3%A9+sesame", **form)
    assert status == 303 and headers["location"] == "/"
    cookie = headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict"))
    cookie = cookie.split(";")[0]
    assert locked.ask("/api/search?q=x", Cookie=cookie)[0] == 200 and locked.ask("/", Cookie=cookie)[0] == 200
    assert locked.ask("/api/search?q=x", Cookie=cookie + "x")[0] == 401
    assert locked.ask("/api/about", X_Narvid_Key="of-the-machine")[0] == 200
    assert locked.ask("/login", "POST", b"password=open+%C3%A9+sesame", Origin="http://evil.example")[0] == 403


def test_a_server_for_others_makes_up_a_password(site, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(server, "create_app", lambda *args, **how: made.append((args, how)))
    monkeypatch.setattr(server.uvicorn, "Server", lambda config: SimpleNamespace(run=lambda sockets: None))
    monkeypatch.setattr(server, "addresses", lambda: ["192.168.0.7"])
    server.serve(site.store, site.engine, host="0.0.0.0", port=0, allowed=["films.example"])
    (_, _, hosts), how = made[0]
    printed = capsys.readouterr().out
    assert f"password: {how['password']}" in printed and len(how["password"]) == 14 and not how["local"]
    assert re.search(r"http://192\.168\.0\.7:\d+/  \(from other machines", printed) and "films.example" in hosts
    server.serve(site.store, site.engine, host="0.0.0.0", port=0, opened=True)
    assert made[1][1]["password"] is None and "without a password" in capsys.readouterr().out
    server.serve(site.store, site.engine, port=0)
    assert made[2][1]["password"] is None and made[2][1]["local"] and capsys.readouterr().out.startswith("http://127")
    assert not (Path(site.store.path) / "serving.json").exists()


def test_a_query_to_a_running_server_needs_no_torch(site):
    index = Path(site.store.path)
    code = ("import sys; from narvid.search.__main__ import main; main(sys.argv[1:]); "
            "sys.exit('torch was imported' if 'torch' in sys.modules else 0)")
    with announced(index, f"http://127.0.0.1:{site.port}/", "key"):
        done = subprocess.run([sys.executable, "-c", code, "query", str(index), "a red field", "--top", "2"], text=True,
                              capture_output=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr
    assert "plain.mp4" in done.stdout and "0:02 to 0:06: it stays red, 1 more moment\n" in done.stdout


def test_a_query_is_answered_by_the_running_server(site, tmp_path):
    index = Path(site.store.path)
    assert Client.find(index) is None
    how = {"folder": "sub", "min_seconds": 0.0, "max_seconds": inf, "since": -inf, "until": inf, "one_a_file": True}
    with announced(index, f"http://127.0.0.1:{site.port}/", "key"):
        assert (index / "serving.json").stat().st_mode & 0o777 == 0o600
        found = Client.find(index).search("a red field", top=1, **how)
        assert site.engine.asked[-1] == ("a red field", 1, "sub", 0.0, inf)
        assert found == site.engine.search(["a red field"], top=1, folder="sub", min_seconds=0.0, max_seconds=inf)[0]
        assert found.fits is True and found.total == 2
        with pytest.raises(InputError, match="written by another process"):
            Client.find(index).search("busy", top=1, **how)
    assert not (index / "serving.json").exists()
    (index / "serving.json").write_text('{"address": "http://127.0.0.1:1/", "key": "x"}')  # of one that was killed
    assert Client.find(index) is None
    (index / "serving.json").unlink()


# ---- queries of several parts ----


def png(colour, name=None):
    picture = BytesIO()
    Image.new("RGB", (8, 8), colour).save(picture, "PNG")
    if name:
        name.write_bytes(picture.getvalue())
    return picture.getvalue()


def test_words_pictures_and_clips_make_one_query(site):
    """Pictures and clips by the names under which they were sent; what is wrong is said where it stands."""
    sent = png("red")
    picture = site.json("/api/picture?top=1", "POST", sent)[1]["picture"]
    status, found = site.json("/api/query_clip?top=2", "POST", (site.videos / "plain.mp4").read_bytes())
    assert status == 200 and len(found["answers"]) == 2
    assert site.engine.asked[-1][0] == "clip of 4 frames"  # 4 s of its 8: a window of this index, at 1 a second
    clip = found["clip"]
    assert site.ask(f"/picture/{clip}")[2][8:12] == b"WEBP"
    query = f'"a dog" - "people" + 0.5*picture:{picture} - clip:{clip} + window:2'
    status, found = site.json("/api/search?" + urlencode({"q": query, "top": 3}))
    assert status == 200 and found["query"] == query and len(found["answers"]) == 3
    expected = f'"a dog" - "people" + 0.5*picture:"{len(sent)} bytes" - clip:"4 frames" + window:2'
    assert site.engine.asked[-1][0] == expected
    assert [(part["kind"], part["weight"]) for part in found["parts"]] == [
        ("text", 1), ("text", -1), ("picture", 0.5), ("clip", -1), ("window", 1)]
    assert found["parts"][4]["path"] == "sub/old.avi" and found["parts"][4]["frames"] == [0, 1, 2, 3]
    status, found = site.json("/api/search?" + urlencode({"q": "a - b", "parts": f"- picture:{picture}"}))
    assert found["query"] == f'"a - b" - picture:{picture}'
    assert "parts" not in site.json("/api/search?q=a+-+b")[1]
    for query, code, said in (('"a" - people', 400, "at character 7, people: put a text into quotes"),
                              ('- "a"', 400, "has a minus"), ('"a" + window:99', 404, "no window 99"),
                              ('"a" + picture:abcdef', 404, "no longer here"), ('"a" + b.jpg', 404, "was not sent"),
                              (f'"a" + clip:{picture}', 404, "this clip is no longer here")):
        status, answer = site.json("/api/search?" + urlencode({"q": query}))
        assert status == code and said in answer["error"]


def test_the_command_line_takes_parts_as_arguments_and_as_lines(site, monkeypatch, capsys, tmp_path):
    """By itself and through a server: the same; flags may stand anywhere."""
    monkeypatch.setattr(commands, "open_engine", lambda *_: site.engine)
    index, sent, clip = site.store.path, len(png("red", tmp_path / "a b.png")), site.videos / "plain.mp4"
    asked = ["a dog", "-", "people", "+", f"0.5*{tmp_path}/a b.png", "-", str(clip), "+", "window:2"]
    written_out = (f'"a dog" - "people" + 0.5*picture:"{tmp_path}/a b.png" - clip:"{clip}" + window:2')
    (tmp_path / "queries.txt").write_text(f'a - b\n\n"a dog" - "people"\n"a" + picture:"{tmp_path}/a b.png"\n')
    with announced(Path(index), f"http://127.0.0.1:{site.port}/", "key"):
        monkeypatch.setattr(commands.Client, "find", classmethod(lambda cls, _: Client(f"127.0.0.1:{site.port}")))
        for exact in ([], ["--exact"]):  # which a server is not asked for
            commands.main(["query", str(index), *exact, "--json", "--top", "2", *asked])
            said = json.loads(capsys.readouterr().out)
            assert said["query"] == written_out and len(said["answers"]) == 2
            assert [part["kind"] for part in said["parts"]] == ["text", "text", "picture", "clip", "window"]
            assert site.engine.asked[-1][0].startswith(f'"a dog" - "people" + 0.5*picture:"{sent} bytes" - clip:"4 fr')
            commands.main(["query", str(index), "--queries", str(tmp_path / "queries.txt"), "--json", *exact])
            lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert [line["query"] for line in lines][:2] == ["a - b", '"a dog" - "people"'] and "parts" not in lines[0]
            searched = [query for query, *_ in site.engine.asked if not query.startswith("picture of")]  # being sent
            assert searched[-3:-1] == ["a - b", '"a dog" - "people"']
            assert searched[-1] == f'"a" + picture:"{sent} bytes"'
            commands.main(["query", str(index), "--picture", str(tmp_path / "a b.png"), *exact])
            assert capsys.readouterr().out.startswith(f"{tmp_path}/a b.png\n")
            (tmp_path / "bad.txt").write_text('a\n\n"b" - c\n')
            (tmp_path / "text.png").write_text("no picture")
            for arguments, said in ((["a", "dog"], "put the sentence into quotes"), (["-", "a"], "has a minus"),
                                    (["a", "+", "nan*b"], "nan is no weight"),
                                    (["a", "+", "window:99"], "the index has no such window"),
                                    (["a", "+", "gone.jpg"], "gone.jpg cannot be read"),
                                    (["a", "-", str(tmp_path / "text.png")], "text.png: the picture cannot be read"),
                                    (["--queries", str(tmp_path / "bad.txt")], "bad.txt, line 3: the query, at char")):
                with pytest.raises(SystemExit, match=said) as error:
                    commands.main(["query", str(index), *exact, *arguments])
                assert "\n" not in str(error.value)


def test_clips_that_are_none_and_too_large_ones_are_refused(site, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for body in (b"no video at all", b"#EXTM3U\n#EXTINF:1\n/etc/passwd\n"):
        status, answer = site.json("/api/query_clip", "POST", body)
        assert status == 400 and "the clip" in answer["error"] and str(tmp_path) not in answer["error"]
    monkeypatch.setattr(sites, "MAX_CLIP", 1000)
    status, answer = site.json("/api/query_clip", "POST", (site.videos / "plain.mp4").read_bytes())
    assert status == 413 and "larger than 0.001 MB" in answer["error"]
    assert site.json("/api/query_clip", "POST", b"")[0] == 400 and not list(tmp_path.iterdir())


def test_a_client_sends_what_a_query_names(site, tmp_path):
    client = Client(f"127.0.0.1:{site.port}")
    sent = png("blue", tmp_path / "my picture.png")
    found = client.search(f'"a field" + 2*picture:"{tmp_path}/my picture.png" - {site.videos}/plain.mp4', top=3,
                          one_a_file=False)
    assert [a.rank for a in found] == [1, 2, 3] and site.engine.one_a_file is False
    assert f'picture:"{len(sent)} bytes" - ' in site.engine.asked[-1][0] and "4 frames" in site.engine.asked[-1][0]
    name = client.send(tmp_path / "my picture.png")
    assert len(client.search(f'"a" - picture:{name}')) == 4
    with pytest.raises(InputError, match="missing.jpg cannot be read"):
        client.search(f'"a" + {tmp_path}/missing.jpg')
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="text.png: the picture cannot be read"):
        client.search(f'"a" + {tmp_path}/text.png')
    for address in ("http://127.0.0.1:1", "ftp://x", "http://"):
        with pytest.raises(InputError, match="does not answer|is no address"):
            Client(address)


def test_a_client_gives_the_password(site, monkeypatch):
    monkeypatch.setattr(guard, "WRONG_SECONDS", 0.1)
    with running(server.create_app(site.store, site.engine, password="open sesame", key="the key")) as port:
        assert len(Client(f"http://127.0.0.1:{port}", "open sesame").search("x")) == 4
        assert len(Client(f"http://127.0.0.1:{port}", key="the key").search("x")) == 4
        for password, said in (("wrong", "this is not its password"), (None, "give the password first")):
            with pytest.raises(InputError, match=said):
                Client(f"http://127.0.0.1:{port}", password)


def test_the_client_of_the_docs(site, monkeypatch, tmp_path, capsys):
    docs = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "Client" in block]
    (tmp_path / "INDEX").symlink_to(site.store.path)
    monkeypatch.chdir(tmp_path)
    with announced(Path(site.store.path), f"http://127.0.0.1:{site.port}/", "key"):
        exec(block, {})
    assert capsys.readouterr().out.startswith("[('plain.mp4', 0.0, 8.0, 2.0), (")
    assert site.engine.asked[-1][:2] == ('"a red star" - "a blue square"', 3)


# ---- at the same time ----


def test_clips_go_on_while_a_search_runs_and_searches_wait_for_each_other(site):
    site.engine.go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(site.json, "/api/search?q=slow") for _ in range(2)]
        for _ in range(500):
            if site.engine.running:
                break
            time.sleep(0.01)
        assert [site.ask(path)[0] for path in ("/clip/1", "/frame/1/0", "/api/about")] == [200, 200, 200]
        assert not any(answer.done() for answer in slow)
        site.engine.go_on.set()
        assert [answer.result()[0] for answer in slow] == [200, 200]


def test_an_abandoned_search_ends_and_the_next_one_is_answered(site):
    site.engine.go_on.clear()
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        connection.sendall(b"GET /api/search?q=slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(500):
            if site.engine.running:
                break
            time.sleep(0.01)
        assert site.engine.running
    assert site.json("/api/search?q=x")[0] == 200  # in the same one thread
    assert not site.engine.running


def test_an_upload_that_breaks_off_is_no_fault(site, capfd):
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        connection.sendall(b"POST /api/picture HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        time.sleep(0.1)
    assert site.json("/api/search?q=x")[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_a_request_that_does_not_arrive_is_closed(site, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    with running(server.create_app(site.store, site.engine), http=server.Impatient) as port:
        other = Site(site.store, site.engine, port)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            assert other.ask("/")[0] == 200
            start = time.monotonic()
            assert slow.recv(100) == b"" and time.monotonic() - start < 3
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:  # the second one of a connection
            connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(5000).startswith(b"HTTP/1.1 404")
            connection.sendall(b"GET / HT")
            while connection.recv(5000):
                pass


def test_ctrl_c_ends_it_cleanly_while_a_clip_is_being_watched(site, tmp_path, capfd):
    big = tmp_path / "big.mp4"
    big.write_bytes((site.videos / "plain.mp4").read_bytes() + bytes(8_000_000))  # more than a socket takes at once
    with Store(tmp_path / "index", create=site.store.settings | {"videos": str(tmp_path)}) as store:
        put(store, "big.mp4")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def watch():
            try:
                for _ in range(200):
                    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(f"GET /clip/1 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                        got.append(connection.recv(1000))
                        return signal.raise_signal(signal.SIGINT) or time.sleep(2)  # and watches on
                    time.sleep(0.02)
            finally:
                got.append(b"end")

        got, thread = [], threading.Thread(target=watch)
        thread.start()
        server.serve(store, FakeEngine(store), port=port)  # comes back, and raises no KeyboardInterrupt
        assert got[0].startswith(b"HTTP/1.1 200") and len(got) == 1  # it was still being watched
        thread.join()
    printed = capfd.readouterr()
    assert f"http://127.0.0.1:{port}/" in printed.out and printed.err == ""


def test_an_address_in_use_is_one_sentence(site):
    with pytest.raises(InputError, match=r"--port \d+: cannot listen there"):
        server.serve(site.store, site.engine, port=site.port)
    with pytest.raises(InputError, match="--port 70000: cannot listen there"):
        server.serve(site.store, site.engine, port=70000)

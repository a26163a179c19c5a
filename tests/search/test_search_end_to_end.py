"""Search from files to answers, by the commands that people type: index, query, serve.

The demo's videos with a tiny NarVid, and the real clips below $NARVID_REAL_DATA, else below ../shared/real. Weights are
random: what is tested is the way, not what is found.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest
import tiny
import torch

from narvid.data.narrations import load_narrations
from narvid.search import Client
from narvid.search.__main__ import main, table
from narvid.search.answers import Answer, Answers, Seen
from narvid.search.store import Store
from scripts import make_demo_corpus

pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real"))
pytestmark = pytest.mark.slow
QUERY = "a red star grows, and later a blue square flashes"


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """A run's folder with the tiny NarVid, as the trainer leaves it."""
    stored = torch.load(weights, weights_only=True)
    stored["args"] |= {"max_frames": 6, "max_words": 24, "precision": "fp32", "filter_p": 0.9}
    folder = tmp_path_factory.mktemp("run")
    torch.save(stored, folder / "best.pt")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Five of the demo's videos, one of them in a subfolder, a broken one, and their narrations."""
    home = tmp_path_factory.mktemp("demo")
    make_demo_corpus.main(["videos", "--out", str(home), "--train", "0", "--test", "5", "--workers", "1"])
    (home / "frames").mkdir()
    seconds = range(make_demo_corpus.seconds_of(3))
    times = [{"video": f"video{n}", "times": [float(t) for t in seconds]} for n in range(5)]
    (home / "frames" / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    make_demo_corpus.main(["narrate", "--out", str(home), "--frames", str(home / "frames")])
    (home / "videos" / "more").mkdir()
    (home / "videos" / "video4.mp4").rename(home / "videos" / "more" / "video4.mp4")
    (home / "videos" / "broken.mp4").write_bytes(b"no video")
    return home


@pytest.fixture(scope="module")
def index(demo, run):
    main(["index", str(demo / "videos"), "--out", str(demo / "index"), "--checkpoint", str(run),
          "--narrations", str(demo / "narrations.jsonl"), "--window", "6"])
    return demo / "index"


def ask(capsys, *argv):
    """The JSON lines that a query prints."""
    capsys.readouterr()
    main(["query", *map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def serve_and_ask(index, paths):
    """`serve`, until a thread has asked it for these paths and pressed Ctrl-C -> (status, body) of each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def get(path):
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    def ask_and_stop():
        try:
            for _ in range(1000):  # until it listens
                with suppress(ConnectionRefusedError):
                    get("/")
                    break
                time.sleep(0.02)
            return [get(path) for path in paths]
        finally:
            signal.raise_signal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask_and_stop)
        main(["serve", str(index), "--port", str(port)])
        return answers.result()


def test_index_query_and_page_agree(index, demo, capsys):
    [asked] = ask(capsys, index, QUERY, "--top", 20)
    assert asked["query"] == QUERY and [a["rank"] for a in asked["answers"]] == list(range(1, 6))  # a window a file
    narrations = load_narrations(demo / "narrations.jsonl")
    for answer in asked["answers"]:
        assert answer["end"] - answer["start"] == 6 and 0 <= answer["start"] and answer["end"] <= 8
        assert math.isfinite(answer["score"]) and answer["s_narration"] is not None
        narration = narrations[Path(answer["path"]).stem]
        for frame in answer["frames"]:
            assert answer["start"] <= frame["time"] <= answer["end"]
            assert frame["sentence"] == narration.sentences[narration.times.index(frame["time"])]
        for view in ("frame_weight", "sentence_weight"):
            assert sum(frame[view] for frame in answer["frames"]) == pytest.approx(1)
        assert answer["absolute_path"] == str(demo / "videos" / answer["path"])
        assert answer["seconds"] >= answer["end"] > answer["moment"] >= answer["start"]
        assert answer["moment"] in [frame["time"] for frame in answer["frames"]]
    scores = [answer["score"] for answer in asked["answers"]]
    assert scores == sorted(scores, reverse=True)
    [exact] = ask(capsys, index, QUERY, "--top", 20, "--exact")
    assert exact == asked
    [few] = ask(capsys, index, QUERY, "--folder", "more")
    assert [answer["path"] for answer in few["answers"]] == ["more/video4.mp4"]

    first = asked["answers"][0]
    best = max(first["frames"], key=lambda frame: frame["frame_weight"] + frame["sentence_weight"])
    search, clip, frame, about = serve_and_ask(index, [
        f"/api/search?top=20&q={quote(QUERY)}", f"/clip/{first['file']}",
        f"/frame/{first['file']}/{best['number']}", "/api/about"])
    page = json.loads(search[1])["answers"]
    assert search[0] == 200 and [a["window"] for a in page] == [a["window"] for a in asked["answers"]]
    assert [a["score"] for a in page] == pytest.approx(scores) and page[0]["moment"] == best["time"]
    assert clip == (200, (demo / "videos" / first["path"]).read_bytes())
    assert frame[0] == 200 and frame[1][8:12] == b"WEBP"
    counts = json.loads(about[1])
    assert (counts["files"], counts["windows"], counts["failures"]) == (5, 10, 1)


def test_a_table_is_read_by_people_and_a_file_holds_many_queries(index, demo, capsys, tmp_path):
    main(["query", str(index), QUERY, "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == QUERY and lines[1].split() == ["rank", "file", "time", "S_qv", "S_qn", "fused"]
    assert re.fullmatch(r" +1  (more/)?video\d\.mp4 +0:0[02]-0:0[68] +-?\d\.\d{3} +-?\d\.\d{3} +-?\d+\.\d\d", lines[2])
    assert re.fullmatch(r" +0:0\d to 0:0\d: \w.*", lines[3])
    assert re.match(r" +frames 0:0\d \d+%", lines[4]) and re.match(r" +0:0\d +\d+%  \w+", lines[5])
    (tmp_path / "queries.txt").write_text(f"\ufeff{QUERY}\n\n  a square  \n", encoding="utf-8")
    assert [line["query"] for line in ask(capsys, index, "--queries", tmp_path / "queries.txt")] == [QUERY, "a square"]
    [like] = ask(capsys, index, "--clip", demo / "videos" / "video1.mp4", "--top", 1)
    assert like["answers"][0]["path"] == "video1.mp4" and like["answers"][0]["start"] == 0


def test_a_table_is_no_wider_than_a_name_may_be(index, capsys):
    found = Answers([Answer(1, 1, 1, "a/" + 300 * "long" + "/end.mp4", 0.0, 6.0, 2.0, 0.5, None,
                            [Seen(0, 0.0, None, 1.0, 0.0)], "why", "0:00 to 0:06", 0, [])])
    lines = list(table("a query", found))
    assert max(map(len, lines)) < 120 and "a/longlong" in lines[2] and "/end.mp4" in lines[2] and " .. " in lines[2]
    found.fits = False
    assert next(table("x", found)) == "x: nothing here fits well; these come nearest"
    assert list(table("x", Answers())) == ["x: no answer"]


def test_days_and_moments(index, capsys):
    tomorrow = (datetime.now() + timedelta(days=1)).strftime("%Y-%m-%d")
    [late], [early] = ask(capsys, index, QUERY, "--since", tomorrow), ask(capsys, index, QUERY, "--until", tomorrow)
    assert late["answers"] == [] and len(early["answers"]) == 5
    [moments] = ask(capsys, index, QUERY, "--moments", "--top", "50")
    assert len(moments["answers"]) >= len(early["answers"]) and early["answers"][0]["words"]


def test_again_only_what_is_new(index, demo, run, capsys):
    again = ["index", str(demo / "videos"), "--out", str(index), "--checkpoint", str(run), "--narrations",
             str(demo / "narrations.jsonl"), "--window", "6"]
    main(again)
    assert "0 files new, 0 changed, 0 removed, 5 as before, 1 of all could not be read" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*window 6.0, this run asks for 9.0"):
        main([*again[:-1], "9"])


def test_a_watched_folder_shows_in_a_running_page(demo, run, tmp_path):
    """Two real processes: one indexes what comes and takes out what goes, the other answers with it."""
    videos, index = tmp_path / "videos", tmp_path / "index"
    videos.mkdir()
    shutil.copy(demo / "videos" / "video0.mp4", videos)
    command, logs = (tiny.python, "-m", "narvid.search"), [tmp_path / name for name in ("watching", "serving")]
    watching = tiny.start(*command, "index", videos, "--out", index, "--checkpoint", run, "--watch", "--every", "0.2",
                          log=logs[0])
    try:
        wait_for(lambda: "watching, Ctrl-C ends it" in logs[0].read_text())
        serving = tiny.start(*command, "serve", index, "--port", "0", log=logs[1])
        try:
            wait_for(lambda: "Ctrl-C ends it" in logs[1].read_text())
            client = wait_for(lambda: Client.find(index))
            assert [a.path for a in client.search(QUERY)] == ["video0.mp4"]
            shutil.copy(demo / "videos" / "video1.mp4", videos)
            wait_for(lambda: {a.path for a in client.search(QUERY)} == {"video0.mp4", "video1.mp4"})
            (videos / "video0.mp4").unlink()
            wait_for(lambda: [a.path for a in client.search(QUERY)] == ["video1.mp4"])
            for words in ("the password is swordfish", "it was changed to marlin"):  # subtitles come, and are edited
                (videos / "video1.srt").write_text(f"1\n00:00:00,500 --> 00:00:01,500\n{words}\n")
                wait_for(lambda: (said := client.search(words)[0].said) and said.text == words)
        finally:
            os.kill(serving.pid, signal.SIGINT)
            tiny.wait(serving)
    finally:
        watching.terminate()
        code, rest = tiny.wait(watching), logs[0].read_text().partition("watching, Ctrl-C ends it")[2]
    assert code == 0 and "1 files new" in rest and f"stopped; {index} is whole" in rest
    with Store(index) as store:  # nobody holds it any more
        assert [file.path for file in store.files()] == ["video1.mp4"]


def wait_for(condition):
    """Its first true answer, within two minutes of a busy machine."""
    end = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def test_the_retriever_of_the_docs(demo, run, tmp_path, monkeypatch, capsys):
    docs = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    [block] = [block for block in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "Retriever" in block]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    for n, name in enumerate(("one.mp4", "two.mp4")):
        shutil.copy(demo / "videos" / f"video{n}.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert capsys.readouterr().out.strip() in ("tensor([0])", "tensor([1])")


def test_mistakes_are_one_sentence(index, demo, run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for argv, said in {
        ("query", index): 'give one of "a sentence"',
        ("query", index, "x", "--picture", "y"): "give one of",
        ("query", index, " "): "the sentence is empty",
        ("query", index, '"a'): "this quotation mark is not closed",
        ("index", demo, "--out", tmp_path / "i", "--every", "3"): "--every is of --watch",
        ("index", demo, "--out", tmp_path / "i", "--watch", "--retry"): "--watch goes without",
        ("index", demo, demo, "--out", tmp_path / "i", "--checkpoint", run): "is given twice",
        ("query", index, "--queries", tmp_path / "empty.txt"): "empty.txt holds no query",
        ("query", index, "--picture", tmp_path / "none.png"): r"--picture .*none.png cannot be read \(No such file",
        ("query", index, "--picture", tmp_path / "empty.txt"): "--picture .*empty.txt: the picture cannot be read",
        ("query", tmp_path, "x"): "is no index",
        ("query", index, "x", "--checkpoint", tmp_path / "none.pt"): "none.pt: the index's model is not there",
        ("query", index, "x", "--top", "0"): "--top",
        ("query", index, "x", "--folder", "mroe"): "--folder mroe: no indexed video lies there",
        ("query", index, "x", "--min_seconds", "9", "--max_seconds", "1"): "--min_seconds 9 is more than",
        ("query", index, "x", "--since", "yesterday"): "'yesterday' is no date of the form 2024-12-31",
        ("serve", tmp_path / "none"): "is no index",
        ("serve", index, "--open"): "--open is for a --host that others reach",
        ("serve", index, "--host", "0.0.0.0", "--open", "--password", "x"): "exclude each other",
        ("serve", index, "--password", ""): "--password is empty",
        ("index", demo, "--out", tmp_path / "i", "--server", "http://localhost"): "--server and --model go together",
        ("index", demo, "--out", tmp_path / "i", "--prompt", "A"): "--prompt is the captioner's",
        ("index", demo, "--out", tmp_path / "i", "--captioner", "a", "--narrations", "b"): "exclude each other",
        ("index", demo, "--out", tmp_path / "i", "--checkpoint", "a", "--clip_pretrained", "b"): "leave one out",
        ("index", tmp_path / "none", "--out", tmp_path / "i", "--checkpoint", run): "none is no folder",
    }.items():
        with pytest.raises(SystemExit, match=f"error: .*{said}"):
            main([str(word) for word in argv])
    assert not (tmp_path / "i").exists()


@pytest.mark.skipif(not (REAL / "msrvtt" / "videos").is_dir(), reason=f"no videos in {REAL}; set NARVID_REAL_DATA")
def test_real_clips_are_indexed_and_found(run, capsys, tmp_path):
    found = [path for corpus in ("msrvtt", "msvd") for path in sorted((REAL / corpus / "videos").glob("*"))]
    (tmp_path / "videos").mkdir()
    for path in found:
        shutil.copy(path, tmp_path / "videos")
    main(["index", str(tmp_path / "videos"), "--out", str(tmp_path / "index"), "--checkpoint", str(run),
          "--window", "12"])
    printed = capsys.readouterr().out
    assert f"{len(found)} files new" in printed and "frames alone are searched" in printed
    failed = int(re.search(r"(\d+) of all could not be read", printed)[1])
    [asked] = ask(capsys, tmp_path / "index", "a man is talking", "--top", 100)
    named = {answer["path"] for answer in asked["answers"]}
    assert len(named) == len(found) - failed and named <= {path.name for path in found}
    for answer in asked["answers"]:
        assert answer["s_narration"] is None and 0 <= answer["start"] < answer["end"] < 60
        assert answer["end"] - answer["start"] <= 12.6
        assert all(answer["start"] - 1 <= frame["time"] <= answer["end"] for frame in answer["frames"])

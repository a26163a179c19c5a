"""narvid/narration/batches.py and batch_answers.py through the command line, with an engine of the test's own.

The engine answers with a sentence that names the picture of its request, so a sentence at the wrong frame is seen. It
shuffles, drops, repeats and errs, as batch services do.
"""

import base64
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_narrate import (alone, chat, drifting, expected_of, make_frames, read_lines, sentence_of,  # noqa: F401
                          sentences)

from narvid.data.narrations import load_narrations
from narvid.narration import __main__ as narration
from narvid.narration import batch_answers, batches, journals

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real")) / "msrvtt" / "videos"
VIDEOS = {"a": 7, "b": 5, "c": 1, "d": 6, "e": 4}
APOLOGY = "I'm sorry, but I can't help with this image."


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return make_frames(tmp_path_factory.mktemp("frames"), VIDEOS)


def command(*argv) -> None:
    narration.main([str(x) for x in argv])


def write_requests(frames, folder, *more) -> None:
    command("requests", frames, "--out", folder, "--model", "m", *more)


def error(*argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        command(*argv)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---- the engine ----


def picture_of(request: dict) -> bytes:
    url = request["body"]["messages"][0]["content"][0]["image_url"]["url"]
    if url.startswith("file:"):
        return Path(unquote(urlsplit(url).path)).read_bytes()
    return base64.b64decode(url.removeprefix("data:image/jpeg;base64,"), validate=True)


def line_of(request: dict, text=None, finish="stop") -> dict:
    """A line as `vllm run-batch` and the hosted services write it."""
    body = json.loads(chat(sentence_of(picture_of(request)) if text is None else text, finish)[2])
    return {"id": "batch_req_1", "custom_id": request["custom_id"], "error": None,
            "response": {"status_code": 200, "request_id": "r", "body": body}}


def all_requests(folder) -> list[dict]:
    return [line for path in sorted(folder.glob("requests-*.jsonl")) for line in read_lines(path)]


def write_answers(folder, name, lines) -> Path:
    path = folder / "answers" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- what is asked ----


def test_a_request_is_that_of_the_server_s_client(frames, tmp_path, capsys):
    write_requests(frames, tmp_path, "--prompt", "B", "--max_new_tokens", 40)
    lines = all_requests(tmp_path)
    assert len(lines) == 2 + 23 and len({line["custom_id"] for line in lines}) == 25
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert all(len(line["custom_id"]) <= 64 for line in lines)
    body = lines[2]["body"]
    assert body["model"] == "m" and body["max_tokens"] == 40 and body["temperature"] == 0.0
    assert body["messages"][0]["content"][1]["text"].startswith("You want to view an image, one of the frames")
    assert [sentence_of(picture_of(line)) for line in lines[2:]] == [t for texts in expected_of(frames, VIDEOS).values()
                                                                     for t in texts]
    assert "23 requests in 1 files" in capsys.readouterr().out


def test_files_hold_no_more_than_they_may(frames, tmp_path):
    write_requests(frames, tmp_path / "few", "--file_requests", 10)
    assert [len(read_lines(path)) for path in sorted((tmp_path / "few").glob("requests-*"))] == [10, 10, 5]
    write_requests(frames, tmp_path / "small", "--file_mb", 0.02)
    small = [path.read_bytes() for path in sorted((tmp_path / "small").glob("requests-*"))]
    assert len(small) > 3 and max(map(len, small)) <= 20_000
    assert all(len(one + after[:after.index(b"\n") + 1]) > 20_000 for one, after in zip(small, small[1:]))
    assert len(all_requests(tmp_path / "small")) == 25
    assert "more than --file_mb 0.001" in error("requests", frames, "--out", tmp_path / "x", "--model", "m",
                                                "--file_mb", 0.001)


def test_paths_in_place_of_pictures(frames, tmp_path, capsys):
    write_requests(frames, tmp_path / "r", "--pictures", "file")
    assert f"--allowed-local-media-path {frames}" in capsys.readouterr().out
    urls = [line["body"]["messages"][0]["content"][0]["image_url"]["url"] for line in all_requests(tmp_path / "r")]
    assert urls[2] == f"file://{frames}/a/00000.jpg" and urls[0].startswith("data:")
    write_answers(tmp_path / "r", "1.jsonl", map(line_of, all_requests(tmp_path / "r")))
    command("answers", tmp_path / "r", "--out", tmp_path / "n.jsonl")
    assert sentences(tmp_path / "n.jsonl") == expected_of(frames, VIDEOS)


def test_parameters_that_a_model_does_not_take(frames, tmp_path):
    write_requests(frames, tmp_path / "r", "--without", "temperature,max_tokens", "--sample")
    body = all_requests(tmp_path / "r")[2]["body"]
    assert "temperature" not in body and "max_tokens" not in body and body["max_completion_tokens"] == 77
    assert isinstance(body["seed"], int)
    write_answers(tmp_path / "r", "1.jsonl", map(line_of, all_requests(tmp_path / "r")))
    command("answers", tmp_path / "r", "--out", tmp_path / "n.jsonl")
    label = "m server sample temperature=0.2 seed=0 max_new_tokens=77 without=max_tokens,temperature same_frame=5"
    assert load_narrations(tmp_path / "n.jsonl")["a"].captioner == label
    assert "none of max_tokens" in error("requests", frames, "--out", tmp_path, "--model", "m", "--without", "x")


def test_frames_that_are_nearly_the_same_are_asked_once(tmp_path, capsys):
    paths = drifting(tmp_path / "frames" / "v", [50, 50, 50, 120, 120])
    (tmp_path / "frames" / "index.jsonl").write_text('{"video": "v", "times": [0, 1, 2, 3, 4]}\n')
    write_requests(tmp_path / "frames", tmp_path / "r")
    assert "2 requests in 1 files" in (printed := capsys.readouterr().out) and "3 frames share" in printed
    write_answers(tmp_path / "r", "1.jsonl", map(line_of, all_requests(tmp_path / "r")))
    command("answers", tmp_path / "r", "--out", tmp_path / "n.jsonl")
    texts = [sentence_of(path.read_bytes()) for path in paths]
    assert sentences(tmp_path / "n.jsonl") == {"v": [texts[0]] * 3 + [texts[3]] * 2}


# ---- what comes back ----


def test_shuffled_dropped_repeated_and_erring(frames, tmp_path, capsys):
    """Everything at once, twice; then what failed is written out again and comes back."""
    out, first, second, rng = tmp_path / "n.jsonl", tmp_path / "r1", tmp_path / "r2", random.Random(0)
    write_requests(frames, first, "--file_requests", 9)
    asked = all_requests(first)
    rng.shuffle(asked)
    of = {request["custom_id"]: request for request in asked}
    checks = [name for name in of if "check" in name]
    names = [name for name in of if "check" not in name]
    bad = {
        names[0]: {"response": {"status_code": 400, "body": {"error": {"message": "image too large", "code": "big"}}}},
        names[1]: {"response": None, "error": {"code": "batch_expired", "message": "could not be run in time"}},
        names[2]: {"response": {"status_code": 200, "body": {"choices": []}}, "error": None},
        names[3]: {"response": {"status_code": 400, "body": None}, "error": {"error": {"message": "no such model"}}},
        names[4]: {"response": {"status_code": 400, "body": {"error": {"message": "no", "code": "content_filter"}}}},
        names[5]: {"custom_id": names[5]},
    }
    lines = [line_of(of[name]) if name not in bad else {"custom_id": name} | bad[name] for name in of]
    dropped = [line for line in lines if line["custom_id"] in names[6:9]]
    lines = [line for line in lines if line not in dropped]
    cut, apology = line_of(of[names[10]], "A man stands in", "length"), line_of(of[names[11]], APOLOGY)
    repeats = [cut, apology, *lines[10:14], line_of(of[names[12]], "Another sentence of the same picture.")]
    repeats.append(line_of(of[names[0]], None) | {"response": None, "error": "no"})
    written = [*rng.sample(lines, len(lines)), *repeats]
    write_answers(first, "a/part-0.jsonl", written[:12])
    write_answers(first, "b.jsonl", written[12:])
    (first / "answers" / "c.jsonl").write_text('{"custom_id": "' + names[6][:15])  # the engine was killed here
    (first / "answers" / "d.jsonl").write_text("[1]\n\n")
    command("answers", first, "--out", out)
    printed = capsys.readouterr().out
    assert f"{len(lines)} of 25 requests are answered, 8 lines are repeats; new: 20" in printed
    assert "2 lines are no answers and do not count" in printed and "3 requests have no answer yet" in printed
    assert not out.exists() and len(checks) == 2
    write_answers(first, "late.jsonl", dropped[:1])
    command("answers", first, "--out", out)
    assert "2 requests have no answer yet" in capsys.readouterr().out and not out.exists()
    command("answers", first, "--out", out, "--give_up")
    printed = capsys.readouterr().out
    assert "8 frames have none (7 failed, 1 refused)" in printed
    why = Counter(line["why"].partition(": ")[2] or line["why"] for line in read_lines(tmp_path / "n.failed.jsonl"))
    assert why == {"400: image too large": 1, "could not be run in time": 1, "the answer is no chat completion": 1,
                   "no such model": 1, "400: no": 1, "the line has neither an answer nor an error": 1,
                   "no answer came back": 2}
    lost = {sentence_of(picture_of(of[name])) for name in [*bad, *(line["custom_id"] for line in dropped[1:])]}
    expected = expected_of(frames, VIDEOS)
    whole = {video: kept for video, texts in expected.items() if (kept := [t for t in texts if t not in lost])}
    assert sentences(out) == whole
    write_requests(frames, second, "--narrations", out)
    assert "8 requests in 1 files" in capsys.readouterr().out
    assert {sentence_of(picture_of(line)) for line in all_requests(second)[2:]} == lost
    assert not {line["custom_id"] for line in all_requests(second)} & set(of)
    write_answers(second, "1.jsonl", map(line_of, all_requests(second)[:4]))
    command("answers", second, "--out", out)
    assert "6 requests have no answer yet" in capsys.readouterr().out and sentences(out) == whole
    write_answers(second, "2.jsonl", map(line_of, all_requests(second)))
    command("answers", second, "--out", out)
    assert sentences(out) == expected and not (tmp_path / "n.failed.jsonl").exists()
    write_requests(frames, tmp_path / "r3", "--narrations", out)
    assert "nothing to ask" in capsys.readouterr().out and not (tmp_path / "r3").exists()


def test_what_is_refused_or_cut_is_asked_again_on_request(frames, tmp_path):
    out = tmp_path / "n.jsonl"
    write_requests(frames, tmp_path / "1", "--max_frames", 2)
    asked = all_requests(tmp_path / "1")
    cut = line_of(asked[3], "A man stands in", "length")
    write_answers(tmp_path / "1", "1.jsonl", [*map(line_of, asked[:2]), line_of(asked[2], APOLOGY), cut,
                                              *map(line_of, asked[4:])])
    command("answers", tmp_path / "1", "--out", out)
    assert [line["kind"] for line in read_lines(tmp_path / "n.failed.jsonl")] == ["refused", "cut"]
    write_requests(frames, tmp_path / "2", "--max_frames", 2, "--narrations", out, "--again", "refused,cut")
    again = all_requests(tmp_path / "2")
    assert [picture_of(line) for line in again[2:]] == [picture_of(line) for line in asked[2:4]]
    write_answers(tmp_path / "2", "1.jsonl", [*map(line_of, again[:3]), line_of(again[3], " ")])
    command("answers", tmp_path / "2", "--out", out)
    first, last = expected_of(frames, VIDEOS)["a"][0], "A man stands in"
    assert sentences(out)["a"] == [first, last]
    out.unlink()
    command("answers", tmp_path / "2", "--out", out)  # the journals alone know which answer counts
    assert sentences(out)["a"] == [first, last]


def test_answers_of_another_set_are_refused(frames, tmp_path):
    write_requests(frames, tmp_path / "old")
    write_requests(frames, tmp_path / "new", "--prompt", "A")
    old = write_answers(tmp_path / "new", "1.jsonl", map(line_of, all_requests(tmp_path / "old")))
    message = error("answers", tmp_path / "new", "--out", tmp_path / "n.jsonl")
    assert f"{old}:1: answers '" in message and "it belongs to another set" in message
    assert not (tmp_path / "n.jsonl").exists() and not (tmp_path / "n.jsonl.parts").exists()
    assert "holds another set of requests" in error("requests", frames, "--out", tmp_path / "old", "--model", "m",
                                                    "--prompt", "A")
    write_answers(tmp_path / "old", "1.jsonl", map(line_of, all_requests(tmp_path / "old")))
    command("answers", tmp_path / "old", "--out", tmp_path / "n.jsonl")
    (tmp_path / "new" / "answers" / "1.jsonl").unlink()
    write_answers(tmp_path / "new", "1.jsonl", map(line_of, all_requests(tmp_path / "new")))
    assert "was made by" in error("answers", tmp_path / "new", "--out", tmp_path / "n.jsonl")
    assert "was made by" in error("requests", frames, "--out", tmp_path / "x", "--model", "m", "--prompt", "A",
                                  "--narrations", tmp_path / "n.jsonl")


def test_frames_made_anew_are_another_set(tmp_path):
    frames = make_frames(tmp_path / "frames", {"a": 2})
    write_requests(frames, tmp_path / "r")
    before = all_requests(tmp_path / "r")
    write_requests(frames, tmp_path / "r")  # the same again changes nothing
    assert all_requests(tmp_path / "r") == before
    (frames / "a" / "00001.jpg").write_bytes((frames / "a" / "00000.jpg").read_bytes())
    assert "holds another set" in error("requests", frames, "--out", tmp_path / "r", "--model", "m", "--same_frame", 0)


def test_an_engine_that_does_not_see_is_found_out(frames, tmp_path):
    write_requests(frames, tmp_path / "r")
    write_answers(tmp_path / "r", "1.jsonl", [line_of(line, "A busy street.") for line in all_requests(tmp_path / "r")])
    assert "the picture does not reach the model" in error("answers", tmp_path / "r", "--out", tmp_path / "n.jsonl")
    assert not (tmp_path / "n.jsonl.parts").exists()


def test_the_loop_goes_on_with_what_a_batch_began(frames, tmp_path):
    """Sentences of a batch file and of the loop are one narration: the same model, asked in the same words."""
    from test_narrate import Server, flags

    write_requests(frames, tmp_path / "r")
    asked = all_requests(tmp_path / "r")
    write_answers(tmp_path / "r", "1.jsonl", map(line_of, asked[:12]))
    command("answers", tmp_path / "r", "--out", tmp_path / "n.jsonl")
    server = Server()
    command("narrate", *flags(frames, tmp_path / "n.jsonl", server))
    assert server.asked.total() == 2 + 13 and sentences(tmp_path / "n.jsonl") == expected_of(frames, VIDEOS)
    server.http.shutdown()


# ---- kills ----


def killed(kill, *argv) -> int:
    """Run a command in a child of this process that `kill` prepares; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            kill()
            command(*argv)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_after(module, name: str, calls: int, half: bool = False):
    """Replace a function so that the process ends in its call number `calls`, in the middle of a line if `half`."""
    def prepare():
        real, left = getattr(module, name), [calls]

        def dying(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                if half:
                    args[0].write('{"video": "a", "ti')
                    args[0].flush()
                os._exit(9)
            return real(*args, **options)

        setattr(module, name, dying)
    return prepare


@pytest.mark.parametrize("calls, half", [(0, False), (3, True), (12, False), (22, True)])
def test_a_kill_while_answers_are_taken_in_costs_none(frames, tmp_path, calls, half):
    out, folder = tmp_path / "n.jsonl", tmp_path / "r"
    write_requests(frames, folder)
    path = write_answers(folder, "1.jsonl", map(line_of, all_requests(folder)))
    assert killed(die_after(batch_answers, "append", calls, half), "answers", folder, "--out", out) == 9
    kept = [path.read_bytes().rfind(b"\n") + 1 and len(path.read_bytes().splitlines()) - half
            for path in (tmp_path / "n.jsonl.parts").glob("*.jsonl")]
    assert kept == [calls] and not out.exists()
    lines = read_lines(path)
    write_answers(folder, "1.jsonl", lines[2 + calls:])  # what was taken in is not needed any more
    command("answers", folder, "--out", out)
    assert sentences(out) == expected_of(frames, VIDEOS)


def test_a_kill_before_the_file_is_written_costs_nothing(frames, tmp_path):
    write_requests(frames, tmp_path / "r")
    write_answers(tmp_path / "r", "1.jsonl", map(line_of, all_requests(tmp_path / "r")))
    end = die_after(journals, "write_narrations", 0)
    assert killed(end, "answers", tmp_path / "r", "--out", tmp_path / "n.jsonl") == 9
    command("answers", tmp_path / "r", "--out", tmp_path / "n.jsonl")
    assert sentences(tmp_path / "n.jsonl") == expected_of(frames, VIDEOS)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_kill_while_requests_are_written_leaves_the_same_set(frames, tmp_path, calls):
    write_requests(frames, tmp_path / "whole", "--file_requests", 5)
    argv = ("requests", frames, "--out", tmp_path / "r", "--model", "m", "--file_requests", 5)
    assert killed(die_after(batches, "writing", calls), *argv) == 9
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("requests-*")}
    assert len(done) == calls
    command(*argv)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())  # not written again
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.json*"))
    assert names == sorted(path.name for path in (tmp_path / "r").glob("*.json*"))
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "r" / name).read_bytes() for name in names)


# ---- broken files ----


@pytest.mark.parametrize("name, content, words", [
    ("set.json", "{}", "is not what `requests` writes"),
    ("set.json", "[]", "is this the right file"),
    ("set.json", None, "is missing: write the requests"),
    ("jobs.jsonl", '{"id": "x"}\n', "jobs.jsonl:1: no line that `requests` writes"),
    ("jobs.jsonl", "", "has 0 requests, and set.json says 23"),
    ("answers/1.jsonl", b"\xff\xfe{", "is UTF-16 text"),
    ("answers/1.jsonl", None, "no answers there"),
])
def test_broken_files_are_named(frames, tmp_path, name, content, words):
    write_requests(frames, tmp_path)
    write_answers(tmp_path, "1.jsonl", map(line_of, all_requests(tmp_path)))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in error("answers", tmp_path, "--out", tmp_path / "n.jsonl")
    assert not (tmp_path / "n.jsonl").exists()


# ---- real clips ----


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no MSR-VTT in {REAL}; set NARVID_REAL_DATA")
def test_real_clips_through_batch_files(tmp_path, capsys):
    """Five clips: extract, requests in several files, an engine that shuffles, drops, repeats and errs, check."""
    (tmp_path / "videos").mkdir()
    for clip in sorted(REAL.glob("*.mp4"))[:5]:
        (tmp_path / "videos" / clip.name).symlink_to(clip)
    subprocess.run([sys.executable, "scripts/extract_frames.py", "--videos", tmp_path / "videos", "--out",
                    tmp_path / "frames", "--workers", "1"], check=True, cwd=ROOT, capture_output=True)
    write_requests(tmp_path / "frames", tmp_path / "r", "--file_mb", 1)
    asked, rng, out = all_requests(tmp_path / "r"), random.Random(1), tmp_path / "n.jsonl"
    assert len(list((tmp_path / "r").glob("requests-*"))) > 1
    lines = [line_of(line) for line in asked]
    lines[5] |= {"response": {"status_code": 500, "body": {"error": {"message": "out of memory"}}}}
    came = [*rng.sample(lines, len(lines)), *rng.sample(lines, 4)]
    came.remove(lines[8])
    write_answers(tmp_path / "r", "1.jsonl", came)
    command("answers", tmp_path / "r", "--out", out, "--give_up")
    write_requests(tmp_path / "frames", tmp_path / "r2", "--narrations", out)
    again = all_requests(tmp_path / "r2")
    assert len(again) == 2 + (1 if lines[8] in came else 2)  # the repeats may hold it
    write_answers(tmp_path / "r2", "1.jsonl", map(line_of, again))
    command("answers", tmp_path / "r2", "--out", out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command("check", out, "--frames", tmp_path / "frames")
    assert stopped.value.code == 0 and "100.00%  of" in capsys.readouterr().out
    spoken = {text for texts in sentences(out).values() for text in texts}
    assert spoken == {sentence_of(picture_of(line)) for line in asked[2:]}

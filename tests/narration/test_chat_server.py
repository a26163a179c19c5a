"""What real captioning servers send instead of a sentence, through the command line: refused pictures and parameters,
reasoning, apologies, cut, empty and broken answers, stalls; asked again, resumed, sharded and merged."""

import base64
import contextlib
import json
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest
from test_narrate import (  # noqa: F401 (alone: a fixture of every test)
    ROOT,
    Server,
    alone,
    chat,
    error,
    make_frames,
    read_lines,
    run,
    sentence_of,
    sentences,
    expected_of,
)

from narvid import InputError
from narvid.data.frames import load_frame_index
from narvid.data.narrations import join, load_narrations
from narvid.narration import __main__ as narration
from narvid.narration.chat_server import ServerCaptioner
from narvid.narration.pictures import made_pictures

VIDEOS = {"a": 4, "b": 3}
APOLOGY = "I'm sorry, but I can't help with this image."


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return make_frames(tmp_path_factory.mktemp("frames"), VIDEOS)


def refusal(message, param=None, code="invalid_request_error", status=400):
    return status, "application/json", json.dumps({"error": {"message": message, "param": param, "code": code}})


POLICY = refusal("The picture was refused by the safety system.", code="content_policy_violation")


def answers(server, frames, of):
    """The server answers what `of` says for a frame's (video, index), and else the sentence of the picture."""
    place = {text: (video, index) for video, texts in expected_of(frames, all_of(frames)).items()
             for index, text in enumerate(texts)}
    server.answer = lambda picture: of.get(place.get(sentence_of(picture))) or chat(sentence_of(picture))


def all_of(frames):
    return {video: len(times) for video, times in load_frame_index(frames).items()}


def check(path, frames, *more):
    with pytest.raises(SystemExit) as stopped:
        narration.main(["check", str(path), "--frames", str(frames), *map(str, more)])
    return stopped.value.code


# ---- a picture that is refused is a hole ----


def test_refused_pictures_are_holes_and_end_nothing(tmp_path, server, capsys):
    """The first picture of each video, and more in a row than a server that is down would be given."""
    frames, out = make_frames(tmp_path / "frames", {"a": 16, "b": 4}), tmp_path / "n.jsonl"
    bad = {("a", index): POLICY for index in range(13)} | {("b", 0): POLICY}
    answers(server, frames, bad)
    run(frames, out, server, "--batch_size", 1)
    failed = read_lines(tmp_path / "n.failed.jsonl")
    assert [(line["video"], line["kind"]) for line in failed] == [(video, "refused") for video, _ in bad]
    assert "refused by the safety system" in failed[0]["why"]
    assert "14 frames have none (14 refused)" in capsys.readouterr().out
    expected, times = expected_of(frames, {"a": 16, "b": 4}), load_frame_index(frames)
    for video, narrated in load_narrations(out).items():
        texts = [None if (video, index) in bad else text for index, text in enumerate(expected[video])]
        assert join(narrated, times[video], times[video], video=video, path=out) == texts
    assert check(out, frames) == 0
    printed = capsys.readouterr().out
    assert "30.00%  of 20 frames have a sentence" in printed
    assert "a: 13 of 16 frames" in printed and "b: 1 of 4 frames" in printed


def test_a_refusal_in_a_field_of_its_own_is_one(frames, tmp_path, server):
    answers(server, frames, {
        ("a", 0): chat(None, refusal="I can't do that."), ("a", 1): chat("A half", finish="content_filter"),
        ("a", 2): refusal("Flagged", code=403, status=403),
        ("b", 0): (200, "application/json", json.dumps({"error": {"message": "no", "code": "content_filter"}})),
    })
    run(frames, tmp_path / "n.jsonl", server)
    assert [line["kind"] for line in read_lines(tmp_path / "n.failed.jsonl")] == ["refused"] * 4


@pytest.mark.parametrize("answer, words", [
    (POLICY, "refused by the safety system"),
    (refusal("Incorrect API key provided", code="invalid_api_key", status=401), "Incorrect API key provided"),
    (refusal("The model `m` does not exist", code="model_not_found", status=404), "The model `m` does not exist"),
    ((404, "text/html", "<html><style>p {}</style>\n<title>Not found</title></html>"), "404: Not found)"),
    (chat("<think>The user wants a caption of", finish="length"), "raise --max_new_tokens"),
    (chat(None, finish="length", reasoning_content="The user wants"), "raise --max_new_tokens"),
    (chat(" "), "the answer is empty"),
])
def test_what_every_picture_gets_ends_the_run_at_once_in_one_sentence(frames, tmp_path, server, answer, words):
    server.answer = lambda picture: answer
    message = error(frames, tmp_path / "n.jsonl", server)
    assert "no sentence for a first picture" in message and words in message
    assert server.asked.total() <= 4 and not (tmp_path / "n.jsonl").exists()


def test_no_secret_and_no_odd_character_of_a_server_s_message_is_stored(frames, tmp_path, server):
    server.url = server.url.replace("//", "//me:secret@") + "/v1?key=secret"
    answers(server, frames, {("a", 1): refusal("half \ud83d\0\nsecond line"),
                             ("b", 0): chat(None, refusal="No\0.\ud83d")})
    out = tmp_path / "n.jsonl"
    run(frames, out, server)
    stored = [path.read_text() for path in tmp_path.rglob("*.jsonl")]
    assert len(stored) == 3 and not any("secret" in text or "\\u0000" in text for text in stored)
    assert [line["kind"] for line in read_lines(tmp_path / "n.failed.jsonl")] == ["failed", "refused"]
    answers(server, frames, {})
    run(frames, out, server)
    assert sentences(out) == expected_of(frames, VIDEOS)


# ---- what a server wraps around a sentence ----


@pytest.mark.parametrize("error", ["out of memory", {"message": "out of memory"}, {"code": 500, "x": "out of memory"}])
def test_an_error_with_status_200_is_told(frames, tmp_path, server, error):
    answers(server, frames, {("b", 1): (200, "application/json", json.dumps({"error": error}))})
    run(frames, tmp_path / "n.jsonl", server)
    [failed] = read_lines(tmp_path / "n.failed.jsonl")
    assert failed["kind"] == "failed" and "out of memory" in failed["why"]


@pytest.mark.parametrize("answer", [
    lambda text: chat(f"<think>\nLet me look.\n</think>\n\n{text}"),
    lambda text: chat(text, reasoning_content="Let me look.", reasoning="Hm."),
    lambda text: chat([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                       {"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]),
    lambda text: chat([text]),
    lambda text: chat(f"{text}<end_of_text>\0"),
    lambda text: (200, "application/json", json.dumps({"choices": [{"message": {"content": text}},
                                                                   {"message": {"content": "another"}}]})),
])
def test_the_sentence_alone_is_kept(tmp_path, frames, server, answer):
    server.answer = lambda picture: answer(sentence_of(picture))
    run(frames, tmp_path / "n.jsonl", server)
    assert sentences(tmp_path / "n.jsonl") == expected_of(frames, VIDEOS) and not (tmp_path / "n.failed.jsonl").exists()


@pytest.mark.parametrize("content", [[{"type": "text"}], [7], [{"type": "text", "text": 7}], {"a": 1}, 7, []])
def test_parts_that_are_no_text_are_a_failure(frames, tmp_path, server, content):
    answers(server, frames, {("b", 1): chat(content)})
    run(frames, tmp_path / "n.jsonl", server)
    [failed] = read_lines(tmp_path / "n.failed.jsonl")
    assert failed["video"] == "b" and ("no chat completion" in failed["why"] or failed["kind"] == "empty")


def test_one_sentence_is_cut_and_recorded(frames, tmp_path, server):
    out, expected = tmp_path / "n.jsonl", expected_of(frames, VIDEOS)
    server.answer = lambda picture: chat(f"{sentence_of(picture)} stands. It is the", finish="length")
    run(frames, out, server, "--one_sentence", "--prompt", "S")
    assert sentences(out) == {video: [f"{text} stands." for text in texts] for video, texts in expected.items()}
    assert not (tmp_path / "n.failed.jsonl").exists()
    label = "m server greedy max_new_tokens=77 one_sentence same_frame=5"
    assert {narrated.captioner for narrated in load_narrations(out).values()} == {label}
    assert "one short sentence" in server.bodies[-1][2]["messages"][0]["content"][1]["text"]
    assert "was made by" in error(frames, out, server, "--prompt", "S")


# ---- counted, listed, asked again ----


MIXED = {("a", 0): chat(APOLOGY), ("a", 1): chat(" "), ("a", 2): chat("<think>I", finish="length"),
         ("b", 0): chat("A man stands in", finish="length"), ("b", 1): (503, "text/plain", "busy")}


def test_every_kind_is_counted_and_listed(frames, tmp_path, server, capsys):
    out = tmp_path / "n.jsonl"
    answers(server, frames, MIXED)
    run(frames, out, server)
    printed = capsys.readouterr().out
    assert "; 1 failed, 1 empty, 2 cut, 1 refused" in printed
    assert "3 frames have none (1 failed, 1 empty, 1 cut)" in printed
    assert "1 sentences are refusals" in printed and "1 sentences end where the token limit cut them" in printed
    failed = [(line["video"], line["time"], line["kind"], line.get("text"))
              for line in read_lines(tmp_path / "n.failed.jsonl")]
    assert failed == [("a", 0.0, "refused", APOLOGY), ("a", 1.001, "empty", None), ("a", 2.002, "cut", None),
                      ("b", 0.0, "cut", "A man stands in"), ("b", 1.001, "failed", None)]
    expected = expected_of(frames, VIDEOS)
    assert sentences(out) == {"a": [APOLOGY, expected["a"][3]], "b": ["A man stands in", expected["b"][2]]}


def test_check_counts_refusals_and_leaves_them_out_on_request(frames, tmp_path, server, capsys):
    out, clean = tmp_path / "n.jsonl", tmp_path / "clean.jsonl"
    answers(server, frames, {("a", 0): chat(APOLOGY), ("a", 2): chat(APOLOGY), **{("b", k): chat(APOLOGY)
                                                                                  for k in range(3)}})
    run(frames, out, server)
    assert check(out, frames, "--drop", "refused", "--out", clean, "--list", tmp_path / "problems.jsonl") == 1
    printed = capsys.readouterr().out
    assert "5  sentences are refusals" in printed and f"wrote 2 narrations to {clean}, 5 refusals left out" in printed
    problems = {(line["video"], line["kind"]): line["what"] for line in read_lines(tmp_path / "problems.jsonl")}
    assert problems["a", "refused"] == f'2 of 4 sentences, such as "{APOLOGY}"'
    assert problems["b", "empty"] == problems["b", "refused"] == f'all 3 sentences, such as "{APOLOGY}"'
    expected = expected_of(frames, VIDEOS)["a"]
    assert sentences(clean) == {"a": [expected[1], expected[3]], "b": []}
    assert load_narrations(clean)["a"].times == [1.001, 3.003]
    for wrong in (["--drop", "refused"], ["--out", clean], ["--drop", "empty", "--out", clean]):
        assert "error: " in check(out, frames, *wrong)
    with pytest.raises(SystemExit, match="is the file that is checked"):
        narration.main(["check", str(out), "--frames", str(frames), "--drop", "refused", "--out", str(out)])


@pytest.mark.parametrize("again, left", [
    ([], ["refused", "cut"]),  # those without a sentence
    (["--again", "refused,empty"], ["cut", "cut", "failed"]),
    (["--again", "cut"], ["refused", "empty", "failed"]),
    (["--again", "failed"], ["refused", "empty", "cut", "cut"]),
])
def test_what_is_asked_again(frames, tmp_path, server, again, left):
    out = tmp_path / "n.jsonl"
    answers(server, frames, MIXED)
    run(frames, out, server)
    answers(server, frames, {})
    server.asked.clear()
    run(frames, out, server, *again)
    assert [line["kind"] for line in read_lines(tmp_path / "n.failed.jsonl")] == left
    asked = set(server.asked) & {text for texts in expected_of(frames, VIDEOS).values() for text in texts}
    assert len(asked) == 5 - len(left)
    run(frames, out, server)
    run(frames, out, server, "--again", "refused,cut")
    assert sentences(out) == expected_of(frames, VIDEOS) and not (tmp_path / "n.failed.jsonl").exists()
    out.unlink()
    run(frames, out, server, "--merge")  # the journals alone know which answer counts
    assert sentences(out) == expected_of(frames, VIDEOS)


def test_asking_again_loses_nothing(frames, tmp_path, server):
    """A sentence that was cut, an apology: the second answer is worse, the run dies, the shards are others."""
    out, expected = tmp_path / "n.jsonl", expected_of(frames, VIDEOS)
    answers(server, frames, MIXED)
    run(frames, out, server)
    before = sentences(out)
    answers(server, frames, dict.fromkeys(MIXED, chat(" ")))
    run(frames, out, server, "--again", "refused,cut")
    assert sentences(out) == before
    answers(server, frames, {("b", 0): chat(APOLOGY)})
    run(frames, out, server, "--again", "refused,empty,cut,failed", "--shard", "1/2")
    assert sentences(out) == {"a": expected["a"], "b": before["b"]}  # shard 1 has video a
    run(frames, out, server, "--again", "failed,cut", "--shard", "2/2")
    assert sentences(out) == {"a": expected["a"], "b": ["A man stands in", *expected["b"][1:]]}
    answers(server, frames, {})
    out_as_it_was = out.read_bytes()
    run(frames, out, server, "--again", "cut")
    assert sentences(out) == expected
    out.write_bytes(out_as_it_was)  # a kill after the answer and before the file
    run(frames, out, server)
    assert sentences(out) == expected


def test_a_sampled_frame_is_asked_again_with_other_random_numbers_and_after_a_failure_with_the_same(
    frames, tmp_path, server
):
    def seeds():
        return {sentence_of_body(body): body["seed"] for _, _, body in server.bodies if body["temperature"]}

    def sentence_of_body(body):
        return sentence_of(base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]))

    expected = expected_of(frames, VIDEOS)
    answers(server, frames, MIXED)
    run(frames, tmp_path / "n.jsonl", server, "--sample")
    first = seeds()
    server.bodies.clear()
    answers(server, frames, {})
    run(frames, tmp_path / "n.jsonl", server, "--sample", "--again", "refused,failed")
    second = seeds()
    assert second.keys() == {expected["a"][0], expected["b"][1]}
    assert second[expected["a"][0]] != first[expected["a"][0]] and second[expected["b"][1]] == first[expected["b"][1]]


@pytest.mark.parametrize("more, words", [
    (["--again", "refuzed"], "'refuzed' is none of failed, empty, cut, refused"),
    (["--again", ""], "'' is none of"),
    (["--again", "cut", "--merge"], "run the shards with --again, then --merge"),
])
def test_kinds_that_do_not_exist(frames, tmp_path, server, more, words):
    assert words in error(frames, tmp_path / "n.jsonl", server, *more)


# ---- parameters that a model does not take ----


def picky(*, max_tokens=False, temperature=False, seed=False):
    """Refuses the parameters named, in the words of servers of today."""
    def refuse(body):
        if max_tokens and "max_tokens" in body:
            return refusal("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens",
                           "unsupported_parameter")
        if temperature and body.get("temperature", 1) != 1:
            return refusal("Unsupported value: 'temperature' must be 1.", "temperature", "unsupported_value")
        if seed and "seed" in body:
            return 422, "application/json", json.dumps({"detail": [
                {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]})
        return None

    return refuse


@pytest.mark.parametrize("refused, more, label", [
    ({"max_tokens": True}, [], "m server greedy max_new_tokens=77 without=max_tokens same_frame=5"),
    ({"temperature": True}, [], "m server greedy max_new_tokens=77 without=temperature same_frame=5"),
    ({"max_tokens": True, "temperature": True, "seed": True}, ["--sample"],
     "m server sample temperature=0.2 seed=0 max_new_tokens=77 without=max_tokens,seed,temperature same_frame=5"),
])
def test_a_parameter_is_changed_once_said_and_recorded(frames, tmp_path, server, capsys, refused, more, label):
    out = tmp_path / "n.jsonl"
    server.refuse = picky(**refused)
    run(frames, out, server, *more, "--shard", "1/2")
    assert capsys.readouterr().out.count("does not take") == len(refused)
    assert server.asked.total() == 4 + 2 + len(refused)
    server.bodies.clear()
    run(frames, out, server, *more)  # knows it from the journal
    assert "does not take" not in capsys.readouterr().out and sentences(out) == expected_of(frames, VIDEOS)
    assert all(server.refuse(body) is None for _, _, body in server.bodies) and len(server.bodies) == 3 + 2
    assert {narrated.captioner for narrated in load_narrations(out).values()} == {label}
    if "max_tokens" in refused:
        assert {body["max_completion_tokens"] for _, _, body in server.bodies} == {77}
    (tmp_path / "n.jsonl.parts").rename(tmp_path / "gone")  # and from the file alone
    server.bodies.clear()
    make_frames(tmp_path / "frames", {**VIDEOS, "c": 1})
    run(tmp_path / "frames", out, server, *more)
    assert all(server.refuse(body) is None for _, _, body in server.bodies)
    assert sentences(out).keys() == {"a", "b", "c"}


def test_sentences_of_two_kinds_do_not_mix(frames, tmp_path, server):
    out = tmp_path / "n.jsonl"
    run(frames, out, server, "--shard", "1/2")
    server.refuse = picky(temperature=True)
    assert "'temperature' must be 1" in error(frames, out, server)  # it did take it before
    assert "not one frame got a sentence" in error(frames, tmp_path / "other.jsonl", Late(server))
    assert all("'temperature' must be 1" in line["why"] for line in read_lines(tmp_path / "other.failed.jsonl"))


class Late:
    """A server that begins to refuse when the check is over."""

    def __init__(self, server):
        self.url, seen = server.url, []
        refuse = picky(temperature=True)
        server.refuse = lambda body: refuse(body) if len(seen) > 1 or seen.append(body) else None


def test_a_second_refusal_ends_in_the_server_s_sentence(frames, tmp_path, server):
    server.refuse = lambda body: refusal("max_completion_tokens and max_tokens are unsupported", "max_tokens")
    message = error(frames, tmp_path / "n.jsonl", server)
    assert "max_completion_tokens and max_tokens are unsupported" in message and server.asked.total() == 3
    server.refuse = lambda body: refusal("max_tokens must be at most 64", "max_tokens", "invalid_value")
    assert "must be at most 64" in error(frames, tmp_path / "n.jsonl", server) and server.asked.total() == 5


# ---- addresses and connections ----


@pytest.mark.parametrize("url", [
    "localhost", "localhost:8000", "/tmp/model", "ftp://host/v1", "http://", "http:///v1", "http://my host/v1",
    " http://host", "http://host:port/v1", "http://host:99999", "http://[::1/v1", "http://a\nb", "http://h\0st",
    "http://é..é/", "http://<host>/v1", "file:///v1", "",
])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError) as refused:
        ServerCaptioner(url, "m")
    assert str(refused.value).startswith("--server ") and "\n" not in str(refused.value)


def test_an_address_with_the_path_of_the_request(frames, tmp_path, server):
    server.url += "/api/v1/chat/completions"
    run(frames, tmp_path / "n.jsonl", server)
    assert {path for path, _, _ in server.bodies} == {"/api/v1/chat/completions"}


def test_a_key_with_a_line_break_is_none(monkeypatch, server):
    monkeypatch.setenv("MY_KEY", "sk-1\nsk-2")
    with pytest.raises(InputError, match="MY_KEY in the environment: holds characters that no key has") as refused:
        ServerCaptioner(server.url, "m", api_key_env="MY_KEY")
    assert "sk-" not in str(refused.value)


def test_retry_after_is_waited_for(server):
    times = []

    def busy(picture):
        times.append(time.monotonic())
        return chat("A cat.") if len(times) > 1 else (429, "application/json", '{"error": {"message": "slowly"}}')

    server.answer, server.headers = busy, {"retry-after-ms": "300"}
    assert ServerCaptioner(server.url, "m").caption([made_pictures()[0]]) == ["A cat."]
    assert times[1] - times[0] >= 0.3


@pytest.mark.parametrize("hours", [0, -1000, 1000])
def test_retry_after_as_a_date_counts_from_the_server_s_clock(server, hours):
    """Whatever ours says: the two may differ."""
    times, now = [], time.time() + 3600 * hours

    def busy(picture):
        times.append(time.monotonic())
        return chat("A cat.") if len(times) > 1 else (429, "application/json", '{"error": {"message": "slowly"}}')

    server.answer = busy
    server.http.RequestHandlerClass.date_time_string = lambda *_: formatdate(now, usegmt=True)
    server.headers = {"Retry-After": formatdate(now + 2, usegmt=True)}
    assert ServerCaptioner(server.url, "m").caption([made_pictures()[0]]) == ["A cat."]
    assert 1.9 <= times[1] - times[0] < 5


def test_a_connection_that_breaks_in_the_answer_is_tried_again(server):
    whole, seen = chat("A cat."), []
    server.headers = {"content-length": str(len(whole[2]))}
    server.answer = lambda picture: whole if seen else (seen.append(1) or 200, whole[1], whole[2][:20])
    assert ServerCaptioner(server.url, "m").caption([made_pictures()[0]]) == ["A cat."]


def test_an_answer_that_trickles_for_ever_ends_in_time(server):
    server.answer, server.trickle = lambda picture: (200, "application/json", " " * 1000), 0.05
    start = time.monotonic()
    [answer] = ServerCaptioner(server.url, "m", timeout=0.3, retries=0).caption([made_pictures()[0]])
    assert "no whole answer within 0.3 s" in answer.why and time.monotonic() - start < 3


class Lasting(Server):
    """A server that keeps connections open, and counts them; `close`: after an answer, without having said so."""

    def __init__(self):
        super().__init__()
        self.http.RequestHandlerClass.protocol_version = "HTTP/1.1"
        self.connections, self.close = set(), False

    def handle(self, request):
        self.connections.add(request.client_address)
        whole = self.answer
        self.answer = lambda picture: self._measured(whole(picture))
        try:
            super().handle(request)
        finally:
            self.answer = whole
        if self.close:
            request.close_connection = True

    def _measured(self, answer):
        self.headers = {"content-length": str(len(answer[2].encode()))}
        return answer


@pytest.fixture
def lasting():
    server = Lasting()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_connection_serves_many_requests_and_one_that_was_closed_is_opened_anew(lasting):
    picture = made_pictures()[0]
    asked = ServerCaptioner(lasting.url, "m", retries=0)
    assert asked.caption([picture] * 4) == [sentence_of(picture)] * 4 and len(lasting.connections) == 1
    lasting.close = True
    for _ in range(3):
        assert asked.caption([picture]) == [sentence_of(picture)]
        time.sleep(0.05)  # until the client can see that the connection has ended
    assert len(lasting.connections) == 3 and lasting.asked.total() == 7


def test_many_requests_are_under_way_if_nothing_else_is_said(tmp_path, server):
    frames = make_frames(tmp_path / "frames", {"a": 80})
    ours, end = set(expected_of(frames, {"a": 80})["a"]), time.monotonic() + 10
    server.http.socket.listen(128)

    def patient(picture):
        while sentence_of(picture) in ours and server.most < 64 and time.monotonic() < end:
            time.sleep(0.01)
        return chat(sentence_of(picture))

    server.answer = patient
    narration.main(["narrate", "--frames", str(frames), "--out", str(tmp_path / "n.jsonl"), "--server", server.url,
                    "--model", "m"])
    assert server.most == 64


def test_through_a_proxy_that_wants_a_password(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:se%20cret@"))
    monkeypatch.setenv("no_proxy", "")
    picture = made_pictures()[0]
    assert ServerCaptioner("http://captions.example/v1", "m").caption([picture]) == [sentence_of(picture)]
    path, headers, _ = server.bodies[-1]
    assert path == "http://captions.example/v1/chat/completions" and headers["host"] == "captions.example"
    assert base64.b64decode(headers["proxy-authorization"].removeprefix("Basic ")) == b"me:se cret"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ServerCaptioner(server.url, "m").caption([picture]) == [sentence_of(picture)]
    assert server.bodies[-1][0] == "/v1/chat/completions"
    monkeypatch.setenv("http_proxy", "socks5://me:secret@host:1")
    with pytest.raises(InputError, match="only http:// proxies") as refused:
        ServerCaptioner("http://captions.example/v1", "m")
    assert "secret" not in str(refused.value)


def forward(one, other):
    """Bytes of a connection to another until it ends."""
    with contextlib.suppress(OSError):
        while part := one.recv(65536):
            other.sendall(part)
        other.shutdown(socket.SHUT_WR)


class Tunnel(socketserver.BaseRequestHandler):
    """A proxy for CONNECT alone; `asked`: what stood in the requests."""

    asked = []

    def handle(self):
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(4096)
        self.asked.append(head.decode())
        host, port = head.split()[1].decode().rsplit(":", 1)
        with socket.create_connection((host, int(port))) as server:
            self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=forward, args=(server, self.request), daemon=True)
            back.start()
            forward(self.request, server)
            back.join(5)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_over_tls_with_the_system_s_certificates_and_through_a_proxy(server, tmp_path, monkeypatch):
    monkeypatch.undo()  # `alone` loads no certificates
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    url, picture = server.url.replace("http:", "https:"), made_pictures()[0]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    [answer] = ServerCaptioner(url, "m", retries=0).caption([picture])
    assert "certificate" in answer.why.lower()  # nobody vouches for it
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ServerCaptioner(url, "m").caption([picture] * 2) == [sentence_of(picture)] * 2
    monkeypatch.setenv("no_proxy", "")
    Tunnel.asked.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"me:secret@127.0.0.1:{proxy.server_address[1]}")
        assert ServerCaptioner(url, "m", timeout=5).caption([picture]) == [sentence_of(picture)]
        proxy.shutdown()
    [head] = Tunnel.asked
    assert head.startswith(f"CONNECT {url.removeprefix('https://')} ")
    assert f"Basic {base64.b64encode(b'me:secret').decode()}" in head and "Bearer" not in head


def test_an_address_that_has_moved_is_said(server):
    server.answer = lambda picture: (308, "text/plain", "")
    server.headers = {"location": "https://elsewhere/v1"}
    [answer] = ServerCaptioner(server.url, "m").caption([made_pictures()[0]])
    assert "308: it has moved to 'https://elsewhere/v1'" in answer.why


def test_an_answer_without_end_is_none(server):
    server.answer = lambda picture: (200, "application/json", " " * (2**24 + 2))
    [answer] = ServerCaptioner(server.url, "m", retries=0).caption([made_pictures()[0]])
    assert "longer than 16 MiB" in answer.why


@pytest.mark.parametrize("url, path", [
    ("/v1?key=a", "/v1/chat/completions?key=a"), ("?key=a", "/v1/chat/completions?key=a"),
    ("/api/v1/chat/completions?version=1", "/api/v1/chat/completions?version=1"), ("/v1/", "/v1/chat/completions"),
])
def test_what_stands_behind_an_address_stays_there(server, url, path):
    ServerCaptioner(server.url + url, "m").caption([made_pictures()[0]])
    assert server.bodies[-1][0] == path


# ---- torn and broken journals ----


LINE = {"video": "a", "time": 0.0, "shared": [], "text": "A cat.", "captioner": "c", "prompt": "p"}


@pytest.mark.parametrize("line", [
    '{"video": "a", "ti', "7", "[]", "null", '"a"', "{}", "[" * 100_000, '{"time": ' + "9" * 6000 + "}", "a\0b",
    LINE | {"time": None}, LINE | {"time": "0"}, LINE | {"time": -1}, LINE | {"time": True},
    LINE | {"time": 10**400}, LINE | {"shared": 7}, LINE | {"shared": ["x"]}, LINE | {"text": None},
    LINE | {"text": 7}, LINE | {"video": []}, LINE | {"captioner": {}}, LINE | {"prompt": None},
    LINE | {"kind": "odd"}, LINE | {"kind": []}, LINE | {"again": "1"}, LINE | {"text": "half \ud83d"},
    {name: value for name, value in LINE.items() if name != "text"}, LINE | {"why": 7, "text": 7},
])
def test_a_broken_line_of_a_journal_is_named_and_a_torn_last_one_dropped(frames, tmp_path, server, line):
    out, parts = tmp_path / "n.jsonl", tmp_path / "n.jsonl.parts"
    broken = line if isinstance(line, str) else json.dumps(line)
    good = [json.dumps(LINE | {"video": video, "time": times[0], "shared": times[1:]})
            for video, times in load_frame_index(frames).items()]
    parts.mkdir()
    (parts / "1-of-1.jsonl").write_text(f"{good[0]}\n{broken}\n{good[1]}\n")
    message = error(frames, out, server, "--merge")
    assert "1-of-1.jsonl:2: " in message and "delete that line" in message and not out.exists()
    (parts / "1-of-1.jsonl").write_text(f"{good[0]}\n{good[1]}\n{broken}")
    run(frames, out, server, "--merge")
    assert sentences(out) == {"a": ["A cat."] * 4, "b": ["A cat."] * 3}


# ---- what the client costs: scripts/bench_narrate.py ----


def test_the_client_costs_less_than_a_millisecond_of_processor_time_a_picture(tmp_path):
    """In a process of its own: processor time is a process's, with whatever other tests left running."""
    frames = make_frames(tmp_path / "frames", {"a": 20})
    command = [sys.executable, "scripts/bench_narrate.py", "--frames", frames, "--pictures", 1000, "--only", "client"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    [cost] = re.findall(r"64 requests under way, ([0-9.]+) ms of processor time a picture", done.stdout)
    assert 0 < float(cost) <= 0.8 and "preparing" not in done.stdout

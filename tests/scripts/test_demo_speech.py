"""scripts/make_demo_speech.py: who says what, that queries are true of one video, and that only speech tells."""

import json

import numpy as np
import pytest

from narvid.data.narrations import load_narrations
from narvid.narration import __main__ as narration
from narvid.narration.subtitles import read_sentences
from scripts import make_demo_corpus, make_demo_speech


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six videos without pictures, prepared, with the index of their frames."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "frames").mkdir()
    make_demo_corpus.write_annotations(folder, seed=0, train=4, val=0, test=2)
    truth = read_lines(folder / "truth.jsonl")
    for split in ("train", "test"):
        lines = [{"video": line["video"], "query": f"query of {line['video']}"} for line in truth
                 if line["split"] == split]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = [{"video": line["video"], "times": [float(t) for t in range(8)]} for line in truth]
    (folder / "frames" / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in index))
    make_demo_speech.main(["--out", str(folder), "--spoken", "5"])
    return folder


def test_what_is_said_stands_in_the_subtitles_and_in_one_video_alone(corpus):
    said = {path.stem: read_sentences(path) for path in (corpus / "subtitles").glob("*.srt")}
    assert len(said) == 6 and all(len(of_video) == make_demo_corpus.EVENTS for of_video in said.values())
    pairs = [tuple(word for word in cue.text.split() if word in make_demo_speech.NAMES or word.isdigit())
             for of_video in said.values() for cue in of_video]
    assert len(set(pairs)) == len(pairs) == 18 and all(len(pair) == 2 for pair in pairs)
    truth = make_demo_corpus.read_truth(corpus / "truth.jsonl")
    for video, of_video in said.items():
        for cue, event in zip(of_video, truth[video], strict=True):
            assert event["start"] < cue.start < event["end"] and cue.end == pytest.approx(cue.start + 1)


def test_no_two_of_five_hundred_videos_share_a_pair():
    events = [{"start": 0.0, "end": 1.0}] * make_demo_corpus.EVENTS
    pairs = [(one["name"], one["number"]) for number in range(533)
             for one in make_demo_speech.make_speech(3, number, events)]
    assert len(set(pairs)) == len(pairs) == 1599


def test_a_spoken_query_is_answered_by_its_own_video_s_subtitles(corpus):
    train, test = (read_lines(corpus / "spoken" / f"{split}.jsonl") for split in ("train", "test"))
    assert len(train) == 4 * (1 + 5) and len(test) == 2
    assert sum(line["query"].startswith("query of") for line in train) == 4
    said = {path.stem: " ".join(cue.text for cue in read_sentences(path)) for path in corpus.glob("subtitles/*.srt")}
    for line in [*train, *test]:
        words = [word for word in line["query"].split() if word in make_demo_speech.NAMES or word.isdigit()]
        if words:
            answers = [video for video, text in said.items()
                       if any(f"{a}{b}" in text.replace(" ", "") for a, b in _orders(words, text))]
            assert line["video"] in answers
    assert len({line["query"] for line in train}) == 24


def _orders(words, text):
    """Name and number, with what the subtitles' forms say between them."""
    name, number = words
    return [(name, between + number) for between in ("andItake", "here,", ",Ibid", ";theansweris")]


def test_the_subtitles_become_a_second_source(corpus, tmp_path):
    narration.main(["import", str(corpus / "subtitles"), "--frames", str(corpus / "frames"), "--out",
                    str(tmp_path / "s.jsonl")])
    said = load_narrations(tmp_path / "s.jsonl")
    assert len(said) == 6 and np.mean([len(narrated.sentences) for narrated in said.values()]) > 7

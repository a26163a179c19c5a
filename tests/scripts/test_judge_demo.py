"""scripts/judge_demo.py: which sentences are wrong, and the table of areas under the curve."""

import json

import pytest

from narvid import InputError
from narvid.narration.judge import Sentence
from scripts import judge_demo, make_demo_corpus

RATES = {"hallucination": 0.05, "colour": 0.08, "shape": 0.08, "repeat": 0.85}


@pytest.fixture
def demo(tmp_path):
    """The texts of 40 videos of the generator, without a picture."""
    make_demo_corpus.write_annotations(tmp_path, seed=5, train=0, val=0, test=40)
    (tmp_path / "generator.json").write_text(json.dumps({"generator": 1, "seed": 5}))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "index.jsonl").write_text("".join(
        json.dumps({"video": f"video{n}", "times": [float(t) for t in range(8)]}) + "\n" for n in range(40)))
    make_demo_corpus.main(["narrate", "--out", str(tmp_path), "--seed", "5"])
    return tmp_path


def test_a_sentence_is_wrong_where_it_does_not_say_what_is_shown(demo):
    errors = judge_demo.errors_of(demo, RATES)
    truth = make_demo_corpus.read_truth(demo / "truth.jsonl")
    narrations = {line["video"]: line["sentences"]
                  for line in map(json.loads, (demo / "narrations.jsonl").read_text().splitlines())}
    assert len(errors) == 320 and 30 < sum(map(bool, errors.values())) < 120
    for (video, time), names in errors.items():
        event = next(event for event in truth[video] if time < event["end"])
        [text] = [sentence["text"] for sentence in narrations[video] if sentence["time"] == time]
        said = [any(word in text.split() for word in make_demo_corpus.WORDS[a][event[a]][1])
                for a in ("colour", "shape")]
        if "hallucination" not in names:
            assert said == ["colour" not in names, "shape" not in names]


def test_other_rates_than_the_files_are_refused(demo):
    with pytest.raises(InputError, match="video.*rates"):
        judge_demo.errors_of(demo, RATES | {"colour": 0.9})


def test_the_table_sets_each_kind_of_error_against_the_right_sentences():
    def sentence(time, fit, cosine):
        return Sentence("v", int(time), time, "x", cosine, 0.5, 0.0, 0.5, fit)

    sentences = [sentence(0.0, 0.9, 0.1), sentence(1.0, 0.8, 0.5), sentence(2.0, 0.1, 0.3), sentence(3.0, 0.85, 0.2)]
    errors = {("v", 0.0): [], ("v", 1.0): [], ("v", 2.0): ["colour"], ("v", 3.0): ["shape", "hallucination"]}
    lines = judge_demo.table(sentences, errors)
    assert lines[0].split() == ["any", "hallucination", "colour", "shape"]
    assert lines[1].split()[2:] == ["2", "1", "1", "1"]
    assert lines[2].split()[-4:] == ["75.0", "50.0", "100.0", "50.0"]  # fit
    assert lines[3].split()[-4:] == ["50.0"] * 4  # nothing tells them apart
    assert lines[5].split()[-4:] == ["50.0"] * 4  # cosine: 0.3 and 0.2 lie between 0.1 and 0.5

"""The embedded corpus: real and reproducible video files, MSR-VTT's formats, queries true of their videos, a captioner
that errs as stated, and a retrieval task that the narration solves for whoever understands both grammars only."""

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import make_demo_corpus as demo

from narvid import InputError
from narvid.data.narrations import load_narrations

RATES = {"hallucination": 0.05, "colour": 0.08, "shape": 0.08, "repeat": 0.85}
TIMES = [float(second) for second in range(demo.seconds_of(demo.EVENTS))]  # at one frame a second


def parse(text: str, grammar: int) -> dict:
    """What one event in words says: attribute -> value, from the inverse of the grammar's table."""
    said = {}
    for attribute, values in demo.WORDS.items():
        for value, words in values.items():
            if any(re.search(rf"\b{word}\b", text) for word in words[grammar]):
                assert attribute not in said, f"{text!r} says two {attribute}s"
                said[attribute] = value
    return said


def parse_query(text: str) -> list[dict]:
    """The two mentions of a query, in the order in which they stand."""
    for frame in demo.QUERY_FRAMES:
        if match := re.fullmatch(re.escape(frame).replace(r"\{\}", "(.+)"), text):
            return [parse(mention, demo.QUERY) for mention in match.groups()]
    raise AssertionError(f"no query frame reads {text!r}")


def make(out: Path, *flags: str, train: int = 3, test: int = 2) -> Path:
    demo.main(["videos", "--out", str(out), "--train", str(train), "--test", str(test), "--workers", "1", *flags])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_index(frames: Path, count: int) -> None:
    frames.mkdir(parents=True)
    lines = [json.dumps({"video": f"video{number}", "times": TIMES}) + "\n" for number in range(count)]
    (frames / "index.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("demo"))


# ---- the video files ----


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(tmp_path):
    alone = make(tmp_path / "alone", train=15, test=5)
    shared = make(tmp_path / "shared", "--workers", "2", train=15, test=5)
    assert contents(alone / "videos") == contents(shared / "videos")
    assert contents(alone / "annotations") == contents(shared / "annotations")
    other = make(tmp_path / "other", "--seed", "1", train=1, test=1)
    assert (other / "videos/video0.mp4").read_bytes() != (alone / "videos/video0.mp4").read_bytes()
    assert demo.make_truth(1, 0) != demo.make_truth(0, 0)


def test_a_video_is_h264_and_shows_its_events(corpus):
    for number in range(5):
        with av.open(str(corpus / f"videos/video{number}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            shown = {
                float(frame.time): frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(stream)
            }
        assert len(shown) == demo.seconds_of(demo.EVENTS) * demo.FPS
        for event in demo.make_truth(0, number):
            for time in (time for time in TIMES if event["start"] <= time < event["end"]):
                near = np.abs(shown[time] - demo.RGB[event["colour"]]).max(-1) < 50
                assert near.mean() > 0.02, f"video{number} at {time} s shows no {event['colour']}"
                y, x = (np.argwhere(near).mean(0) / demo.SIDE - 0.5) / demo.REACH
                homes = {place: np.hypot(x - home[0], y - home[1]) for place, home in demo.HOME.items()}
                assert min(homes, key=homes.get) == event["place"], f"video{number} at {time} s"


def test_every_event_shows_in_two_frames_at_one_frame_a_second():
    for number in range(300):
        events = demo.make_truth(0, number)
        assert events[0]["start"] == 0 and events[-1]["end"] == demo.seconds_of(demo.EVENTS)
        assert all(a["end"] == b["start"] for a, b in pairwise(events))
        assert all(sum(event["start"] <= time < event["end"] for time in TIMES) >= 2 for event in events)


def test_a_stopped_run_goes_on_and_keeps_what_is_there(corpus, tmp_path):
    out = make(tmp_path / "demo")
    before = contents(out / "videos")
    times = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    (out / "videos/video1.mp4").unlink()
    (out / "videos/.video1.mp4.0a1b2c3d.tmp").write_bytes(b"half a video")
    make(out)
    assert contents(out / "videos") == before
    kept = {path.name for path in (out / "videos").iterdir() if path.stat().st_mtime_ns == times[path.name]}
    assert kept == set(before) - {"video1.mp4", ".lock"}
    with pytest.raises(InputError, match="seed"):
        make(out, "--seed", "7")


# ---- the annotation ----


def test_annotation_has_the_original_form(corpus):
    data = json.loads((corpus / "annotations/MSRVTT_data.json").read_text())
    assert set(data) == {"info", "videos", "sentences"}
    keys = {"category", "url", "video_id", "start time", "end time", "split", "id"}
    assert all(set(video) == keys for video in data["videos"])
    assert [video["split"] for video in data["videos"]] == ["train"] * 3 + ["test"] * 2
    assert all(set(sentence) == {"caption", "video_id", "sen_id"} for sentence in data["sentences"])
    assert Counter(s["video_id"] for s in data["sentences"]) == {f"video{number}": 20 for number in range(5)}
    assert (
        len({s["sen_id"] for s in data["sentences"]})
        == len({(s["video_id"], s["caption"]) for s in data["sentences"]})
        == 100
    )
    assert (corpus / "annotations/MSRVTT_train.9k.csv").read_text().split() == [
        "video_id",
        "video0",
        "video1",
        "video2",
    ]
    with open(corpus / "annotations/MSRVTT_JSFUSION_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["vid_key"], row["video_id"]) for row in rows] == [
        ("ret0", "msr3", "video3"),
        ("ret1", "msr4", "video4"),
    ]
    captions = {(s["video_id"], s["caption"]) for s in data["sentences"]}
    assert all((row["video_id"], row["sentence"]) in captions for row in rows)
    truth = [json.loads(line) for line in (corpus / "truth.jsonl").read_text().splitlines()]
    assert [line["events"] for line in truth] == [demo.make_truth(0, number) for number in range(5)]


def test_queries_name_two_of_the_three_events_in_order():
    named = Counter()
    for number in range(100):
        events = demo.make_truth(0, number)
        queries = demo.make_queries(0, number, events)
        assert len({text for text, _ in queries}) == demo.CAPTIONS
        for text, mentions in queries:
            assert parse_query(text) == mentions
            assert demo.fits(mentions, events)
            named.update(len(mention) for mention in mentions)
    assert set(named) == {3, 4} and 0.7 < named[4] / sum(named.values()) < 0.8


def test_the_grammars_share_no_word_for_an_attribute():
    for values in demo.WORDS.values():
        words = [
            {word for value in values.values() for phrase in value[grammar] for word in phrase.split()}
            for grammar in (0, 1)
        ]
        assert not (words[0] & words[1]) - {"in", "the", "near", "at", "on"}


def test_fits_wants_both_events_in_order_and_ambiguous_counts_other_videos():
    def event(colour, place):
        return {"colour": colour, "shape": "star", "action": "spin", "place": place}

    video = [event("red", "left"), event("blue", "top"), event("red", "right")]
    assert demo.fits([{"colour": "red"}, {"place": "right", "shape": "star"}], video)
    assert demo.fits([{"colour": "blue"}, {"colour": "red"}], video)
    assert not demo.fits([{"place": "top"}, {"place": "left"}], video)  # both are there, in the other order
    assert not demo.fits([{"colour": "blue"}, {"colour": "blue"}], video)  # one event is not two
    queries = [[{"colour": "blue"}, {"colour": "red"}], [{"colour": "red"}, {"place": "right"}], [{"place": "top"}] * 2]
    truth = [video, video[:2], [event("green", "top")] * 3]
    assert demo.ambiguous(queries, truth) == [False, True, False]  # the second fits the first video


def test_ambiguous_looks_at_every_caption_of_a_video():
    truth = [demo.make_truth(0, number) for number in range(30)]
    captions = [demo.make_queries(0, number, events) for number, events in enumerate(truth)]
    vague = [[{"shape": mention.get("shape", "star")} for mention in mentions] for of in captions for _, mentions in of]
    one_by_one = [any(demo.fits(mentions, events) for video, events in enumerate(truth) if video != query // 20)
                  for query, mentions in enumerate(vague)]
    assert len(vague) == 600 and 0 < sum(one_by_one) < 600
    assert demo.ambiguous(vague, truth) == one_by_one


# ---- the narration ----


def test_the_captioner_errs_as_stated():
    """Errors counted by reading the sentences, not by the captioner's own notes."""
    rng, counts, equal, sentences = np.random.default_rng(0), Counter(), [], 0
    for number in range(600):
        events = demo.make_truth(0, number)
        written = demo.narrate_video(rng, events, TIMES, RATES)
        assert [sentence["time"] for sentence in written] == TIMES
        equal += [a["text"] == b["text"] for a, b in pairwise(written)]
        for sentence in written:
            event = next(event for event in events if sentence["time"] < event["end"])
            said = parse(sentence["text"], demo.NARRATION)
            wrong = [attribute for attribute in demo.ATTRIBUTES if said[attribute] != event[attribute]]
            counts.update(["hallucination"] if len(wrong) > 2 else wrong)
            sentences += 1
    assert set(counts) == {"hallucination", "colour", "shape"}
    assert counts["hallucination"] / sentences == pytest.approx(0.05, abs=0.01)
    assert counts["colour"] / sentences == pytest.approx(0.08 * 0.95, abs=0.015)
    assert counts["shape"] / sentences == pytest.approx(0.08 * 0.95, abs=0.015)
    assert 0.4 < np.mean(equal) < 0.65  # 5 of 7 neighbours belong to one event


def test_narrate_writes_one_sentence_a_frame_at_its_time(corpus, capsys):
    write_index(corpus / "frames", 5)
    demo.main(["narrate", "--out", str(corpus)])
    first = (corpus / "narrations.jsonl").read_bytes()
    narrations = load_narrations(corpus / "narrations.jsonl")
    assert list(narrations) == [f"video{number}" for number in range(5)]
    assert all(narration.times == TIMES and len(narration.sentences) == len(TIMES) for narration in narrations.values())
    demo.main(["narrate", "--out", str(corpus), "--frames", str(corpus / "frames")])
    assert (corpus / "narrations.jsonl").read_bytes() == first
    assert "hallucinated" in capsys.readouterr().out


def test_with_validation_videos_protocol_full_can_be_prepared(tmp_path):
    out = make(tmp_path / "demo", "--val", "2", train=3, test=1)
    subprocess.run([sys.executable, ROOT / "data" / "prepare_msrvtt.py", "--annotations", out / "annotations",
                    "--protocol", "full", "--allow_partial", "--out", out], check=True, capture_output=True)
    lines = {split: (out / f"{split}.jsonl").read_text().splitlines() for split in ("train", "val", "test")}
    assert {split: len(of) for split, of in lines.items()} == {"train": 60, "val": 40, "test": 20}
    assert {json.loads(line)["video"] for line in lines["val"]} == {"video3", "video4"}


def test_narrate_names_the_missing_frames(tmp_path):
    with pytest.raises(InputError, match="truth.jsonl"):
        demo.main(["narrate", "--out", str(tmp_path)])
    out = make(tmp_path / "demo", train=1, test=1)
    write_index(out / "frames", 1)
    with pytest.raises(InputError, match="video1"):
        demo.main(["narrate", "--out", str(out)])


# ---- what the corpus asks for ----


def agreement(mention: dict, sentences: list[dict]) -> list[int]:
    return [sum(said.get(attribute) == value for attribute, value in mention.items()) for said in sentences]


def best_in_order(mentions: list[dict], narration: list[dict]) -> int:
    """The best agreement of two mentions with an earlier and a later sentence."""
    first, second = (agreement(mention, narration) for mention in mentions)
    return max(max(first[:k]) + second[k] for k in range(1, len(second)))


def recall_at_1(similarity: np.ndarray) -> float:
    """In per cent; ties count against."""
    return 100 * np.mean((similarity >= np.diag(similarity)[:, None]).sum(1) == 1)


def test_understanding_retrieves_and_matching_strings_does_not(capsys):
    numbers = range(1800, 2000)
    truth = [demo.make_truth(0, number) for number in numbers]
    queries = [demo.make_queries(0, number, events, 1)[0] for number, events in zip(numbers, truth, strict=True)]
    ambiguous = sum(demo.ambiguous([mentions for _, mentions in queries], truth))
    assert ambiguous <= 0.03 * len(truth)
    texts = [
        [s["text"] for s in demo.narrate_video(demo.random_of(0, n, demo.NARRATION_STREAM), events, TIMES, RATES)]
        for n, events in zip(numbers, truth, strict=True)
    ]
    narrations = [[parse(text, demo.NARRATION) for text in video] for video in texts]
    understood = np.array([[best_in_order(mentions, video) for video in narrations] for _, mentions in queries])
    bags = [set(" ".join(video).split()) for video in texts]
    strings = np.array([[len(set(text.split()) & bag) / len(bag) for bag in bags] for text, _ in queries])
    oracle, overlap = recall_at_1(understood), recall_at_1(strings)
    with capsys.disabled():
        print(f"\ndemo corpus, 200 test videos: {ambiguous} ambiguous queries; R@1 by understanding {oracle:.1f} %, "
              f"by common words {overlap:.1f} %")
    assert oracle > 80
    assert overlap < 5


# ---- other numbers of events, and of events that a query names ----


def test_six_events_of_which_a_query_names_one():
    spans = set()
    for number in range(200):
        events = demo.make_truth(3, number, 6)
        assert len(events) == 6 and events[0]["start"] == 0 and events[-1]["end"] == demo.seconds_of(6) == 14
        seen = [sum(event["start"] <= second < event["end"] for second in range(14)) for event in events]
        assert min(seen) >= 2 and sum(seen) == 14
        spans.add(tuple(seen))
        queries = demo.make_queries(3, number, events, mentioned=1)
        assert len(queries) == demo.CAPTIONS and all(demo.fits(mentions, events) for _, mentions in queries)
        for text, [mention] in queries:
            assert parse(text, demo.QUERY) == mention and len(mention) >= 3
    assert len(spans) == 21  # 6 with one long event, 15 with two
    named = [demo.make_queries(3, number, demo.make_truth(3, number, 6), mentioned=2) for number in range(20)]
    assert all(len(mentions) == 2 and parse_query(text) == mentions
               for of_video in named for text, mentions in of_video)


def test_a_query_may_name_one_event_or_two_of_two():
    events = [demo.make_truth(3, number, 2) for number in range(20)]
    named = [query for number in range(20) for query in demo.make_queries(3, number, events[number], mentioned=0)]
    assert all(demo.fits(mentions, events[i // demo.CAPTIONS]) for i, (_, mentions) in enumerate(named))
    assert all((parse_query(text) if len(mentions) == 2 else [parse(text, demo.QUERY)]) == mentions
               for text, mentions in named)
    assert 150 < sum(len(mentions) == 2 for _, mentions in named) < 250


def test_a_corpus_of_six_events_is_written_and_is_another_one(tmp_path):
    corpus = make(tmp_path / "six", "--events", "6", "--mentioned", "1", train=1, test=1)
    with av.open(str(corpus / "videos" / "video1.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 14 * demo.FPS
    with pytest.raises(InputError, match="another --out"):
        make(corpus, train=1, test=1)
    with pytest.raises(InputError, match="leaves out"):
        make(tmp_path / "two", "--events", "2")

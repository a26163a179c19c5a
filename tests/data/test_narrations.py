"""narvid/data/narrations.py, narvid/data/published_narrations.py: every form, the join by time, refusals."""

import json
import time

import pytest

from narvid import InputError
from narvid.data.frames import pick_frames
from narvid.data.narrations import Narration, join, load_narrations, write_narrations
from narvid.data.published_narrations import assign
from narvid.data.titles import load_titles

SECONDS = [float(t) for t in range(12)]  # 12 frames at 1 fps


def narrate(times, text="at {}"):
    times = [float(t) for t in times]
    return Narration("captioner", "prompt", times, [text.format(t) for t in times])


def joined(narration, times, all_times=None):
    return join(narration, times, all_times or times, video="video7", path="n.jsonl")


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def published(video, captions, **more):
    return {"video_file": video, **{f"caption_{k}": text for k, text in enumerate(captions, 1)}, **more}


# ---- joining ----


def test_sentences_follow_the_picked_frames():
    picked = [SECONDS[i] for i in pick_frames(12, 5)]
    assert joined(narrate(SECONDS), picked, SECONDS) == [f"at {t}" for t in picked]


@pytest.mark.parametrize("jitter", [0.04, -0.2, 0.25])
def test_jitter_up_to_a_quarter_of_the_spacing_is_forgiven(jitter):
    narration = narrate(SECONDS)
    moved = narration._replace(times=[t + jitter * (-1) ** i for i, t in enumerate(SECONDS)])
    assert joined(moved, SECONDS) == narration.sentences


def test_beyond_the_tolerance_a_frame_has_no_sentence():
    moved = narrate(SECONDS)._replace(times=[*SECONDS[:5], 5.26, *SECONDS[6:]])
    sentences = joined(moved, SECONDS)
    assert sentences[5] is None and sentences.count(None) == 1


def test_the_tolerance_follows_the_spacing_of_the_extracted_frames_not_of_the_picked_ones():
    picked = [0.0, 5.0, 10.0]  # 5 s apart, but of frames 1 s apart: 0.4 s off is another moment
    assert joined(narrate([0, 1, 2, 3, 4, 5.4, 6.4, 7, 8, 9, 10]), picked, SECONDS)[1] is None
    half = [t / 2 for t in range(24)]
    assert joined(narrate([0.2, *half[1:]]), half)[0] is None


def test_the_nearest_of_several_sentences_is_taken():
    narration = narrate([0, 0.9, 1.05, 1.2, 2, 3])
    assert joined(narration, [0.0, 1.0, 2.0, 3.0]) == ["at 0.0", "at 1.05", "at 2.0", "at 3.0"]


def test_holes_and_blank_sentences_are_none_and_move_nothing():
    narration = narrate([t for t in SECONDS if t not in (3, 4)])
    narration.sentences[0], narration.sentences[1] = "", " \t"
    assert joined(narration, SECONDS) == [None, None, "at 2.0", None, None, *(f"at {t}" for t in SECONDS[5:])]


def test_a_narration_denser_than_the_frames_is_fine():
    dense = narrate([t / 4 for t in range(48)])
    assert joined(dense, SECONDS) == [f"at {t}" for t in SECONDS]


def test_one_frame_or_one_sentence_has_no_rate():
    assert joined(narrate([0.2]), [0.0]) == ["at 0.2"]
    assert joined(narrate([0, 0.6]), [0.0]) == ["at 0.0"]
    with pytest.raises(InputError, match="another clock"):
        joined(narrate([0.3]), [0.0])
    assert joined(narrate([4]), SECONDS) == [None] * 4 + ["at 4.0"] + [None] * 7
    assert joined(narrate([]), SECONDS) == [None] * 12


@pytest.mark.parametrize("left", [[0], [11], [3, 4], [0, 2, 4, 6, 8, 10], [1, 4, 5, 11], range(0, 12, 5), range(11)])
def test_however_many_sentences_are_missing_the_others_stay(left):
    narration = narrate([SECONDS[index] for index in left])
    assert joined(narration, SECONDS) == [f"at {t}" if t in left else None for t in SECONDS]
    moved = narration._replace(times=[time + 0.2 for time in narration.times])
    assert joined(moved, SECONDS) == joined(narration, SECONDS)


def test_one_sentence_off_its_frame_is_no_other_rate():
    times = [float(t) for t in range(60)]
    narration = narrate([*times[:40:2], 41.4])  # a median spacing of two frames
    assert joined(narration, times) == [f"at {t}" if t < 40 and t % 2 == 0 else None for t in times]


def test_sentences_for_other_picks_are_refused_with_their_number():
    times = [float(t) for t in range(30)]
    narration = narrate([times[index] for index in pick_frames(30, 12)])
    assert None not in joined(narration, narration.times, times)
    with pytest.raises(InputError, match=r"sentence for 12 evenly picked ones of 30, .*\(--max_frames 12\)"):
        joined(narration, [times[index] for index in pick_frames(30, 16)], times)
    holes = narration._replace(times=narration.times[1:], sentences=narration.sentences[1:])
    assert joined(holes, narration.times, times) == [None, *holes.sentences]


@pytest.mark.parametrize("spacing", [0.7, 1.25, 1.5, 1.75, 2.5])
def test_another_frame_rate_is_refused_with_both_spacings(spacing):
    narration = narrate([spacing * k for k in range(round(12 / spacing))])
    with pytest.raises(InputError, match="n.jsonl: video7: narration of another frame rate") as refused:
        joined(narration, SECONDS)
    assert f"{spacing:.2f} s" in str(refused.value) and "1.00 s" in str(refused.value)


def test_a_rate_within_ten_percent_only_leaves_holes():
    sentences = joined(narrate([1.04 * k for k in range(12)]), SECONDS)
    assert sentences[:7] == [f"at {1.04 * k}" for k in range(7)] and sentences[8:11] == [None] * 3


def test_the_same_rate_on_another_clock_is_refused_instead_of_masked():
    with pytest.raises(InputError, match="video7: narration of another clock"):
        joined(narrate([t + 0.5 for t in SECONDS]), SECONDS)


# ---- our form ----


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "n.jsonl"
    items = {"video1": narrate(SECONDS, 'a "café"\n中\u2028 {}'), "video2": Narration("c", "", [], [])}
    write_narrations(path, items.items())
    assert load_narrations(path) == items
    assert [file.name for file in path.parent.iterdir()] == ["n.jsonl"]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    assert list(load_narrations(write(tmp_path / "n.jsonl", "\ufeff" + json.dumps(GOOD)))) == ["v2"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "n.jsonl"
    write_narrations(path, [("video1", narrate([0]))])
    with pytest.raises(ValueError):
        write_narrations(path, [("video2", narrate([0])), ("video3", Narration("c", "", [0.0, 1.0], ["one"]))])
    assert list(load_narrations(path)) == ["video1"]


GOOD = {
    "video": "v2",
    "captioner": "c",
    "prompt": "p",
    "sentences": [{"time": 0, "text": "a"}, {"time": 1.5, "text": "b"}],
}


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"video": "v2"', ["malformed JSON"]),
        ('"v2"', ['"captioner"']),
        (without("video"), ['"video"']),
        (GOOD | {"video": ""}, ['"video"']),
        (GOOD | {"video": 7}, ['"video"']),
        (without("captioner"), ['"captioner"']),
        (without("prompt"), ['"prompt"']),
        (without("sentences"), ["v2", '"sentences"']),
        (GOOD | {"sentences": ["a"]}, ["v2", "sentence 1", '"text"']),
        (GOOD | {"sentences": [{"time": 0}]}, ["sentence 1", '"text"']),
        (GOOD | {"sentences": [{"text": "a"}]}, ["sentence 1", '"time"']),
        (GOOD | {"sentences": [{"time": "0", "text": "a"}]}, ["sentence 1", '"time"']),
        (GOOD | {"sentences": [{"time": True, "text": "a"}]}, ["sentence 1", '"time"']),
        (GOOD | {"sentences": [{"time": -1, "text": "a"}]}, ["sentence 1", '"time"']),
        (GOOD | {"sentences": [{"time": float("nan"), "text": "a"}]}, ["NaN"]),
        (GOOD | {"sentences": GOOD["sentences"][::-1]}, ["v2", "do not increase", "sentence 2", "1.5", "0"]),
        (GOOD | {"sentences": GOOD["sentences"][:1] * 2}, ["do not increase"]),
        (GOOD | {"video": "v1"}, ["v1", "twice", "line 1"]),
    ],
)
def test_a_fault_in_a_line_is_refused_with_its_number(tmp_path, entry, words):
    lines = [json.dumps(GOOD | {"video": "v1"}), "", entry if isinstance(entry, str) else json.dumps(entry)]
    with pytest.raises(InputError) as refused:
        load_narrations(write(tmp_path / "n.jsonl", "\n".join(lines)))
    for word in ["n.jsonl:3: ", *words]:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_no_narrations_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl: cannot be read"):
        load_narrations(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="is empty"):
        load_narrations(write(tmp_path / "n.jsonl", " \n"))
    (tmp_path / "n.zip").write_bytes(b"PK\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load_narrations(tmp_path / "n.zip")


# ---- the published form ----


def test_published_captions_take_the_times_of_the_frames(tmp_path):
    times = {"video1": [0.0, 1.001, 2.002], "video2": [t * 1.0 for t in range(33)], "video3": [0.0]}
    captions = {"video1": ["a", "b", "c"], "video2": [f"c{k}" for k in range(12)], "video3": []}
    path = write(tmp_path / "n.json", [published(video, texts) for video, texts in captions.items()])
    loaded = load_narrations(path, times)
    assert {video: narration.sentences for video, narration in loaded.items()} == captions
    assert loaded["video1"].times == times["video1"]
    # numpy's linspace(0, 32, 12) truncated: the frames the release would have picked of 33
    assert loaded["video2"].times == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]
    assert loaded["video3"].times == []


def test_a_published_file_may_be_indented_out_of_order_and_narrate_videos_without_frames(tmp_path):
    entry = {
        "caption_10": "k10",
        "caption_2": "k2",
        "video_file": "video1",
        **{f"caption_{k}": f"k{k}" for k in (1, *range(3, 10))},
    }
    path = write(tmp_path / "n.json", "\n " + json.dumps([entry, published("elsewhere", ["x"])], indent=4))
    loaded = load_narrations(path, {"video1": SECONDS[:10]})
    assert loaded["video1"].sentences == [f"k{k}" for k in range(1, 11)] and list(loaded) == ["video1"]


def test_an_extension_is_dropped_only_where_the_bare_name_has_frames(tmp_path):
    path = write(
        tmp_path / "n.json", [published("a.b_1.avi", ["x"]), published("clip.mov", ["y"]), published("c.mp4", ["z"])]
    )
    loaded = load_narrations(path, {"a.b_1": [0.0], "clip.mov": [0.0], "c": [0.0]})
    assert {video: narration.sentences for video, narration in loaded.items()} == {
        "a.b_1": ["x"],
        "clip.mov": ["y"],
        "c": ["z"],
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"video_file": "video1",\n', ["n.json:2", "malformed JSON"]),
        (["video1"], ["entry 1", '"video_file"']),
        ([{"caption_1": "a"}], ["entry 1", '"video_file"']),
        ([{"video_file": 1, "caption_1": "a"}], ["entry 1", '"video_file"']),
        ([{"video_file": "video1", "caption_1": "a", "caption_3": "c"}], ["video1", "caption_2", "no gaps"]),
        ([{"video_file": "video1", "caption_1": None}], ["video1", "caption_1"]),
        (
            [published("video2", []), published("video1", ["a"]), published("video1.mp4", ["b"])],
            ["entry 3", "video1", "twice"],
        ),
        ([published("video1", ["a", "b", "c"])], ["video1", "3 captions for 2 extracted frames", "rate"]),
    ],
)
def test_a_fault_in_a_published_file_is_refused_with_its_place(tmp_path, content, words):
    with pytest.raises(InputError) as refused:
        load_narrations(write(tmp_path / "n.json", content), {"video1": [0.0, 1.0], "video2": [0.0]})
    for word in ["n.json", *words]:
        assert word in str(refused.value)


def test_a_published_file_needs_the_frame_times(tmp_path):
    with pytest.raises(InputError, match="no times; convert it"):
        load_narrations(write(tmp_path / "n.json", [published("video1", ["a"])]))


def test_a_release_of_ten_thousand_videos_loads_in_seconds(tmp_path):
    text = "The image shows a person standing in a kitchen, preparing a meal on a wooden board beside a window. " * 2
    times = {f"video{v}": SECONDS + [float(t) for t in range(12, 12 + v % 21)] for v in range(10_000)}
    path = write(tmp_path / "n.json", [published(video, [text] * len(of)) for video, of in times.items()])
    start = time.process_time()
    loaded = load_narrations(path, times)
    assert time.process_time() - start < 6
    assert len(loaded) == 10_000 and len(loaded["video20"].times) == 32


# ---- Cap4Video's titles ----

TITLES = {"video1": ["best", "next"], "video2": ["one"], "video3": []}
# The forms, recognised by the keys that Cap4Video's data loaders read.
OF_CORPUS = {
    "MSR-VTT, train": {
        "videos": [{"video_id": "video1"}],
        "sentences": [{"video_id": "video1", "caption": "a query"}],
        "title": {"video1": "best"},
        "titles": {"video1": ["best", "next"], "video2": "one", "video3": None},
    },
    "MSR-VTT, test": {
        "video1": {"gt": "a query", "titles": ["best", "next"]},
        "video2": {"gt": "a query", "titles": "one"},
        "video3": {"gt": "a query", "titles": None},
    },
    "others, train": {
        "video1": {"max1": "best", "captions": ["best", "next"]},
        "video2": {"max1": "one", "captions": ["one"]},
        "video3": {"max1": "", "captions": []},
    },
    "others, test": {"video1": ["best", "next"], "video2": "one", "video3": []},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("corpus", OF_CORPUS)
def test_titles_of_every_corpus_are_read(tmp_path, corpus, indent):
    path = write(tmp_path / "t.json", json.dumps(OF_CORPUS[corpus], indent=indent))
    assert load_titles([path], TITLES, max_titles=30) == TITLES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n"video1": ["a"\n', ["t.json:3", "malformed JSON"]),
        ("{}", ["holds no video"]),
        ({"videos": [], "sentences": [], "info": {}}, ['no "titles"']),
        ({"titles": {}}, ['no "titles"']),
        ({"video1": ["a"], "video2": {"gt": "a"}}, ["video2", '"titles"']),
        ({"video1": ["a"], "video2": 7}, ["video2", "no list"]),
        ({"video1": ["a", None]}, ["video1", "title 2"]),
        ('{"video1": ["a", "b', ["t.json:1", "malformed JSON"]),
    ],
)
def test_a_file_without_titles_is_refused(tmp_path, content, words):
    with pytest.raises(InputError) as refused:
        load_titles([write(tmp_path / "t.json", content)], TITLES, max_titles=30)
    for word in ["t.json", *words]:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_titles_are_given_to_every_frame_best_first():
    assert assign("titles", ["a", "b", "c"], SECONDS[:2]) == ([0.0, 1.0], ["a", "b"])
    assert assign("titles", ["a", "b", "c"], SECONDS[:7]) == (SECONDS[:7], [*"abcabca"])
    assert assign("titles", [], SECONDS) == ([], [])


def test_titles_are_no_narration_until_they_are_converted(tmp_path):
    path = write(tmp_path / "t.json", OF_CORPUS["others, test"])
    with pytest.raises(InputError, match="whole videos, not of frames; convert it first"):
        load_narrations(path, {"video1": SECONDS})
    with pytest.raises(InputError, match='neither "titles" nor "captions"'):
        load_narrations(write(path, {"video1": {"duration": 3}}), {"video1": SECONDS})

"""narvid/narration/check.py: every problem named, cut and equal narrations, both commands and their refusals."""

import json
import random
import time

import pytest
from test_narrations import OF_CORPUS, SECONDS, narrate, published, write

from narvid.narration import __main__ as narration
from narvid.narration import check as check_module
from narvid.narration.check import validate
from narvid.towers.tokenizer import Tokenizer
from narvid.data.narrations import Narration, load_narrations, write_narrations

FRAMES = {f"video{k}": SECONDS for k in range(6)}


@pytest.fixture
def faulty(tmp_path):
    """video0 and video1 good, video2 absent, video3 without words, video4 at another rate, video5 with a hole."""
    items = {
        "video0": narrate(SECONDS),
        "video1": narrate(SECONDS, "always the same"),
        "video3": narrate(SECONDS, " "),
        "video4": narrate([1.5 * k for k in range(8)]),
        "video5": narrate(SECONDS[1:], "and at {}"),
        "video9": narrate(SECONDS, "later, at {}"),
    }
    write_narrations(tmp_path / "n.jsonl", items.items())
    return tmp_path / "n.jsonl"


def check(tmp_path, sentences_of, **options):
    """The report on videos with these sentences, one a second."""
    narrations = {v: Narration("c", "", SECONDS[: len(s)], s) for v, s in sentences_of.items()}
    write_narrations(tmp_path / "n.jsonl", narrations.items())
    frames = {v: SECONDS[: len(s)] for v, s in sentences_of.items()}
    return validate(tmp_path / "n.jsonl", frames, **options)[0]


# ---- frames and sentences ----


def test_the_validator_names_each_problem(faulty):
    report, loaded = validate(faulty, FRAMES)
    assert {kind: list(found) for kind, found in report.problems.items()} == {
        "missing": ["video2"],
        "empty": ["video3"],
        "misaligned": ["video4"],
        "holes": ["video5"],
        "refused": [],
        "unused": ["video9"],
        "truncated": [],
        "equal": [],
        "generic": [],
    }
    assert report.problems["misaligned"]["video4"].startswith("narration of another frame rate")
    assert report.problems["holes"]["video5"] == "1 of 12 frames"
    assert (report.narrations, report.frames, report.captioners) == (6, 72, {"captioner": 6})
    assert report.framed_share == pytest.approx((12 + 12 + 11) / 72)
    assert report.mean_words == pytest.approx((12 * 2 + 12 * 3 + 8 * 2 + 11 * 3 + 12 * 3) / 55)
    assert report.repeated_share == pytest.approx(11 / (11 + 11 + 7 + 10 + 11))
    assert len(loaded) == 6 and report.alignment == ""


def test_the_validator_reads_the_published_form_and_the_frames_training_picks(tmp_path):
    times = {"long": [float(t) for t in range(78)], "short": [0.0, 1.0], "over": [0.0]}
    captions = {"long": [f"c{k}" for k in range(32)], "short": ["a", "b"], "over": ["a", "b"]}
    path = write(tmp_path / "n.json", [published(video, texts) for video, texts in captions.items()])
    report, loaded = validate(path, times, max_frames=32)
    assert list(report.problems["misaligned"]) == ["over"] and not report.problems["missing"]
    assert list(loaded) == ["long", "short"] and report.framed_share == 34 / 35
    report, _ = validate(path, times)  # all 78 frames: 32 sentences are too few
    assert sorted(report.problems["misaligned"]) == ["long", "over"]


def test_the_validator_reads_titles(tmp_path):
    path = write(tmp_path / "t.json", OF_CORPUS["MSR-VTT, test"])
    report, loaded = validate(path, {video: SECONDS for video in ("video1", "video2", "video3", "video4")})
    assert loaded["video1"].sentences == ["best", "next"] * 6 and "title j mod m" in report.alignment
    assert list(report.problems["missing"]) == ["video4"] and list(report.problems["empty"]) == ["video3"]


# ---- sentences longer than the text tower reads ----

LONG = [
    "a man " * 40,
    "it's 3.14, isn't it?! (yes...) don't" * 4,
    "tom &amp; jerry &lt;3 " * 12,
    "caf\u00e9 na\u00efve \u4e2d\u6587 \u201cquoted\u201d \U0001f600 " * 6,
    "voil\u00c3\u00a0 le chat, d\u00c3\u00a9j\u00c3\u00a0 vu " * 4,  # UTF-8 read as Latin-1: the tokenizer repairs it
    "first line\nsecond\tline\r\n" * 12,
    "UPPER Supercalifragilisticexpialidocious x" * 5,
]


def test_the_tokens_counted_are_those_of_the_text_tower():
    count = check_module._token_counter()
    for text in [*LONG, "", "a"]:
        assert count(text) == Tokenizer({}).lengths([text])[0]


def test_cut_sentences_are_counted_with_the_tokens_they_lose(tmp_path):
    sentences = {"video0": ["short", *LONG, " "], "video1": ["a dog runs"] * 3, "video2": ["a " * 62, "b " * 63]}
    tokens = {v: Tokenizer({}).lengths([s for s in of if s.strip()]) for v, of in sentences.items()}
    lost = {v: [n - 64 for n in of if n > 64] for v, of in tokens.items()}
    assert lost["video2"] == [1]  # 62 words, start and end fit
    report = check(tmp_path, sentences)
    assert report.problems["truncated"] == {
        v: f"{len(lost[v])} of {len(tokens[v])} sentences, {sum(lost[v])} of {sum(tokens[v])} tokens lost"
        for v in ("video0", "video2")
    }
    assert report.cut_share == (len(lost["video0"]) + 1) / sum(map(len, tokens.values()))
    assert report.lost_share == (sum(lost["video0"]) + 1) / sum(map(sum, tokens.values()))
    assert not check(tmp_path, sentences, max_words=1000).problems["truncated"]
    assert check(tmp_path, {"video1": ["a dog runs"]}, max_words=4).problems["truncated"] == {
        "video1": "1 of 1 sentences, 1 of 5 tokens lost"
    }


# ---- narrations that are another video's ----

TOLD = [f"sentence number {k} of a story" for k in range(12)]


def test_equal_narrations_name_each_other(tmp_path):
    report = check(tmp_path, {
        "video0": TOLD,
        "video1": [f" {s.upper()} \t" for s in TOLD[::-1]],  # white space, case and order make no difference
        "video2": [f"{s} elsewhere" for s in TOLD],
        "video3": [*TOLD[:-1], "another end"],
        "video4": [*TOLD[:-2], "two", "others"],
    })
    assert report.problems["equal"] == {
        "video0": "the same 12 sentences as video1",
        "video1": "the same 12 sentences as video0",
        "video3": "11 of 12 distinct sentences stand in video0 too",
    }
    assert not report.problems["generic"]


def test_a_part_of_a_longer_narration_is_not_equal_to_it(tmp_path):
    assert not check(tmp_path, {"video0": TOLD, "video1": TOLD[:10], "video2": TOLD[:3]}).problems["equal"]


def test_what_many_videos_say_without_a_story_is_generic(tmp_path):
    black = ["a black screen"] * 4
    report = check(tmp_path, {"video0": black, "video1": black[:1], "video2": black, "video3": ["a white screen"] * 2})
    assert report.problems["generic"] == {
        "video0": 'says only "a black screen", as video1 and 1 more',
        "video1": 'says only "a black screen", as video0 and 1 more',
        "video2": 'says only "a black screen", as video0 and 1 more',
    }
    assert not report.problems["equal"]
    assert (report.common, report.common_share) == ("a black screen", 3 / 4)


def test_nearly_equal_sets_are_those_that_all_pairs_would_find():
    rng = random.Random(0)
    pool = [f"s{k}" for k in range(60)]
    sets = [frozenset(rng.sample(pool, rng.randint(1, 30))) for _ in range(60)]
    sets += [frozenset(rng.sample(sorted(s), max(1, len(s) - rng.randint(0, 3))) + ["new"]) for s in sets]
    sets = list(dict.fromkeys(sets))

    def alike(a, b):
        return a != b and 10 * len(a & b) >= 9 * max(len(a), len(b))

    expected = {s for s in sets if any(alike(s, other) for other in sets)}
    near = check_module._nearly_equal(sets)
    assert near.keys() == expected and len(expected) > 20
    assert all(alike(s, other) for s, other in near.items())


def test_ten_thousand_videos_are_compared_in_seconds():
    said = {f"video{v}": frozenset(f"{v} says {k}" if k else "a start" for k in range(12)) for v in range(10_000)}
    start = time.process_time()
    equal, generic = check_module._equal(said)
    assert time.process_time() - start < 6  # all pairs: 50 million intersections
    assert not equal and not generic


# ---- the commands ----


def run(command, path, frames, tmp_path, *flags):
    """Exit code of the command line, 0 or 1, or its error message."""
    folder = tmp_path / "frames"
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"video": video, "times": times, "sampling": "1 fps", "source": "x"})
        for video, times in frames.items()
    ]
    (folder / "index.jsonl").write_text("".join(f"{line}\n" for line in lines))
    try:
        narration.main([command, str(path), "--frames", str(folder), *map(str, flags)])
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_check_reports_on_one_screen_and_exits_1(faulty, tmp_path, capsys):
    assert run("check", faulty, FRAMES, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    for kind, video in (("missing", "video2"), ("empty", "video3"), ("misaligned", "video4"), ("holes", "video5")):
        at = next(number for number, line in enumerate(lines) if f"  {kind}: " in line)
        assert lines[at].split()[0] == "1" and video in lines[at + 1]


@pytest.mark.parametrize(
    ("videos", "code"), [(["video0", "video5"], 0), (["video2"], 1), (["video3"], 1), (["video4"], 1)]
)
def test_holes_pass_but_missing_empty_and_misaligned_narrations_do_not(faulty, tmp_path, videos, code):
    assert run("check", faulty, {video: SECONDS for video in videos}, tmp_path) == code


def test_cut_and_equal_narrations_are_warnings_and_the_list_has_all_of_them(tmp_path, capsys):
    frames = {f"video{k}": SECONDS for k in range(5)}
    write_narrations(tmp_path / "n.jsonl", [(video, narrate(SECONDS, "a b c d {}")) for video in frames])
    out = tmp_path / "problems.jsonl"
    assert run("check", tmp_path / "n.jsonl", frames, tmp_path, "--max_words", 8, "--list", out) == 0
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(entry["video"], entry["kind"]) for entry in entries] == [
        (video, kind) for kind in ("truncated", "equal") for video in frames
    ]
    assert entries[-1]["what"] == "the same 12 sentences as video0 and 3 more"
    printed = capsys.readouterr().out
    assert printed.index("warnings (exit status 0)") < printed.index("5  truncated: ") < printed.index("5  equal: ")
    assert "100.00%  of the sentences are cut at 8 tokens" in printed and "look at its frames?" in printed
    assert printed.count("the same 12 sentences") == 3 and "wrote 10 problems" in printed


def test_convert_writes_the_published_form_as_ours(tmp_path, capsys):
    times = {"video1": SECONDS, "video2": SECONDS[:3]}
    entries = [published("video1.mp4", ["a"] * 12), published("video2", ["x", "", "z"]), published("video3", ["a"])]
    path, out = write(tmp_path / "n.json", entries), tmp_path / "converted.jsonl"
    assert run("convert", path, times, tmp_path, "--out", out) == 0
    assert load_narrations(out) == load_narrations(path, times)
    printed = capsys.readouterr().out
    assert "wrote 2 narrations" in printed and "1 videos have no frames" in printed and "evenly picked" in printed


@pytest.mark.parametrize("corpus", OF_CORPUS)
def test_convert_says_that_titles_have_no_moment(tmp_path, capsys, corpus):
    path, out = write(tmp_path / "t.json", OF_CORPUS[corpus]), tmp_path / "converted.jsonl"
    assert run("convert", path, {"video1": SECONDS[:3], "video2": SECONDS[:2]}, tmp_path, "--out", out) == 0
    assert "title j mod m of m" in capsys.readouterr().out
    loaded = load_narrations(out)
    assert loaded["video1"].sentences == ["best", "next", "best"] and loaded["video2"].times == [0.0, 1.0]
    assert "Cap4Video" in loaded["video1"].captioner


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([published("video1", ["a", "b"])], ["not written: 1 videos", "video1: 2 captions for 1 extracted frames"]),
        ([published("G5Xr_0.avi", ["a"])], ["none of its 1 videos (G5Xr_0.avi, ...) has frames"]),
        ({"G5Xr_0": ["a"]}, ["none of its 1 videos (G5Xr_0, ...) has frames"]),
        ('{"video": "video1", "captioner": "c", "prompt": "", "sentences": []}', ["in our form already"]),
    ],
)
def test_convert_refuses_what_it_cannot_align(tmp_path, content, words):
    path, out = write(tmp_path / "n.json", content), tmp_path / "converted.jsonl"
    message = run("convert", path, {"video1": [0.0]}, tmp_path, "--out", out)
    for word in ["error: ", "n.json", *words]:
        assert word in message
    assert not out.exists()


def test_the_command_line_turns_faults_into_one_sentence(tmp_path):
    assert run("check", tmp_path / "nowhere", FRAMES, tmp_path).startswith("error: ")
    path = write(tmp_path / "n.jsonl", "{\"")
    assert "n.jsonl:1: malformed JSON" in run("check", path, FRAMES, tmp_path)
    for flag in ("--max_frames", "--max_words"):
        assert f"{flag}: 0 is not" in run("check", path, FRAMES, tmp_path, flag, 0)
    assert "there is no command chekc" in run("chekc", path, FRAMES, tmp_path)


# ---- what towers read ----


def test_how_much_towers_cut(tmp_path, capsys):
    """Towers that read 8 and 77 tokens, and one whose tokenizer counts whole words and one end."""
    import tiny

    texts = ["a cat", "a cat and a dog on a red mat", "a " * 90]
    sentences = [{"time": float(t), "text": text} for t, text in enumerate(texts)]
    line = {"video": "v", "captioner": "c", "prompt": "", "sentences": sentences}
    (tmp_path / "n.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "index.jsonl").write_text(json.dumps({"video": "v", "times": [0.0, 1.0, 2.0]}) + "\n")
    short = tiny.CLIP | {"text_cfg": tiny.CLIP["text_cfg"] | {"context_length": 8}}
    (tmp_path / "short.json").write_text(json.dumps(short))
    (tmp_path / "siglip.json").write_text(json.dumps(tiny.OTHER_TOWERS["siglip"]))
    tiny._write_tokenizer(tmp_path / "words")
    argv = ["check", str(tmp_path / "n.jsonl"), "--frames", str(tmp_path / "frames"), "--towers"]
    with pytest.raises(SystemExit) as stopped:
        narration.main([*argv, str(tmp_path / "short.json"), "ViT-B-32"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    # 4, 11 and 92 tokens with start and end
    assert "short.json reads 8 tokens: 2 of 3 sentences are cut (66.67%), 81.31% of all tokens are lost; a cut one " \
           "loses 43.5 on average, 84 in the middle, 84 at most" in printed
    assert "ViT-B-32 reads 77 tokens: 1 of 3 sentences are cut (33.33%), 14.02% of all" in printed
    with pytest.raises(SystemExit):
        narration.main([*argv, str(tmp_path / "siglip.json"), "--tokenizer", str(tmp_path / "words")])
    assert "siglip.json reads 24 tokens: 1 of 3 sentences are cut" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: --towers Nothing: open_clip knows no such model"):
        narration.main([*argv, "Nothing"])
    with pytest.raises(SystemExit, match="--tokenizer is that of --towers"):
        narration.main([*argv[:-1], "--tokenizer", "x"])

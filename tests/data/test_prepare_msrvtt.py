"""data/prepare_msrvtt.py and data/corpus.py: the protocols' counts, every refusal, missing videos, re-runs."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:  # the scripts import each other by bare names
    patch.syspath_prepend(ROOT / "data")
    import prepare_msrvtt

REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real")) / "msrvtt"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real annotations here")

COUNTS = {
    "9k": {"videos": {"train": 9000, "test": 1000}, "queries": {"train": 180000, "test": 1000}},
    "7k": {"videos": {"train": 7010, "test": 1000}, "queries": {"train": 140200, "test": 1000}},
    "full": {
        "videos": {"train": 6513, "val": 497, "test": 2990},
        "queries": {"train": 130260, "val": 9940, "test": 59800},
    },
}
HEADER = "key,vid_key,video_id,sentence"


@pytest.fixture
def annotations(tmp_path):
    """Small files in the official forms: six videos with two captions each, out of order as in the release."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    sentences = [
        {"caption": f" a  caption {n} of video{v} ", "video_id": f"video{v}", "sen_id": 10 * v + n}
        for n in range(2)
        for v in (3, 0, 5, 1, 4, 2)
    ]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"info": {}, "videos": [], "sentences": sentences}))
    write_list(folder, "train.9k", [0, 1, 2, 3])
    write_list(folder, "train.7k", [2, 0])
    write_list(folder, "train.full", [0, 1])
    write_list(folder, "val.full", [2])
    write_list(folder, "test.full", [4, 5])
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(
        f"{HEADER}\nret0,msr5,video5,it is five\nret1,msr4,video4, it  is four \n"
    )
    return folder


def write_list(folder, name, numbers):
    (folder / f"MSRVTT_{name}.csv").write_text(
        "".join(f"{line}\n" for line in ["video_id", *(f"video{n}" for n in numbers)])
    )


def prepare(annotations, out, *flags, protocol="9k"):
    arguments = ["--annotations", annotations, "--protocol", protocol, "--out", out, *flags]
    prepare_msrvtt.main([str(argument) for argument in arguments])


def refusal(annotations, out, *flags, protocol="9k"):
    """The sentence of a refused run, which must not leave a prepared corpus."""
    with pytest.raises(SystemExit) as stopped:
        prepare(annotations, out, *flags, protocol=protocol)
    assert not (out / "prepared.json").exists()
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


def pairs(path):
    return [(line["video"], line["query"]) for line in map(json.loads, path.read_text().splitlines())]


# ---- what is written ----


def test_9k_takes_every_train_caption_and_the_sentences_of_the_1ka_csv(annotations, tmp_path):
    out = tmp_path / "out"
    prepare(annotations, out, "--allow_partial")
    assert pairs(out / "train.jsonl") == [
        (f"video{v}", f"a  caption {n} of video{v}") for v in range(4) for n in range(2)
    ]
    assert pairs(out / "test.jsonl") == [("video5", "it is five"), ("video4", "it  is four")]
    assert json.loads((out / "prepared.json").read_text()) == {
        "corpus": "msrvtt",
        "protocol": "9k",
        "videos": {"train": 4, "test": 2},
        "queries": {"train": 8, "test": 2},
        "missing": [],
    }
    assert sorted(path.name for path in out.iterdir()) == ["prepared.json", "test.jsonl", "train.jsonl"]


def test_the_order_is_that_of_the_list(annotations, tmp_path):
    prepare(annotations, tmp_path / "out", "--allow_partial", protocol="7k")
    assert [video for video, _ in pairs(tmp_path / "out" / "train.jsonl")] == ["video2", "video2", "video0", "video0"]


def test_full_tests_on_every_caption_and_a_rerun_leaves_no_split_of_the_other_protocol(annotations, tmp_path):
    out = tmp_path / "out"
    prepare(annotations, out, "--allow_partial", protocol="full")
    assert [len(pairs(out / f"{name}.jsonl")) for name in ("train", "val", "test")] == [4, 2, 4]
    prepare(annotations, out, "--allow_partial")
    assert not (out / "val.jsonl").exists()
    assert json.loads((out / "prepared.json").read_text())["protocol"] == "9k"


def test_the_two_official_files_give_the_same_as_the_joined_one(annotations, tmp_path):
    prepare(annotations, tmp_path / "joined", "--allow_partial")
    joined = annotations / "MSRVTT_data.json"
    sentences = json.loads(joined.read_text())["sentences"]
    for name, videos in (("train_val", ("video0", "video1", "video2")), ("test", ("video3", "video4", "video5"))):
        part = [sentence for sentence in sentences if sentence["video_id"] in videos]
        (annotations / f"{name}_videodatainfo.json").write_text(json.dumps({"sentences": part}))
    joined.unlink()
    prepare(annotations, tmp_path / "official", "--allow_partial")
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "official" / name).read_text() == (tmp_path / "joined" / name).read_text()
    (annotations / "test_videodatainfo.json").unlink()
    assert "test_videodatainfo.json" in refusal(annotations, tmp_path / "out")


def test_text_beyond_ascii_and_windows_line_ends_survive(annotations, tmp_path):
    path = annotations / "MSRVTT_JSFUSION_test.csv"
    path.write_bytes(f'\ufeff{HEADER}\r\nr,m,video4,"café, ""two"""\r\nr,m,video5,中\r\n'.encode())
    (annotations / "MSRVTT_train.9k.csv").write_bytes("\ufeffvideo_id\r\nvideo0\r\n".encode())
    prepare(annotations, tmp_path / "out", "--allow_partial")
    text = (tmp_path / "out" / "test.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["query"] for line in text.splitlines()] == ['café, "two"', "中"]


# ---- what is refused ----


def test_other_counts_than_the_protocols_are_refused_after_the_table(annotations, tmp_path, capsys):
    message = refusal(annotations, tmp_path / "out")
    assert "train has 4 videos and 8 queries" in message and "9,000 and 180,000" in message
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["train", "4", "9,000", "8", "180,000"]
    assert table[2].split() == ["test", "2", "1,000", "2", "1,000"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo4\n", ["video4", "both train and test"]),
        ("MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo1\nvideo0\n", ["9k.csv:4", "video0", "twice", "line 2"]),
        ("MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo77\n", ["9k.csv", "video77", "no caption", "MSRVTT_data.json"]),
        ("MSRVTT_train.9k.csv", "video_id\nvideo0,video1\n", ["9k.csv:2", "1 fields"]),
        ("MSRVTT_train.9k.csv", "video\nvideo0\n", ["9k.csv:1", "video_id", "header"]),
        ("MSRVTT_train.9k.csv", "", ["9k.csv:1", "video_id", "header"]),
        ("MSRVTT_train.9k.csv", 'video_id\nvideo0\n"video1\n', ["9k.csv:3", "malformed csv"]),
        (
            "MSRVTT_JSFUSION_test.csv",
            f"{HEADER}\nr,m,video4,it is\nr,m,video4,two\n",
            ["test.csv:3", "video4", "twice"],
        ),
        ("MSRVTT_JSFUSION_test.csv", f"{HEADER}\nr,m,video4,\n", ["test.csv:2", "sentence is empty"]),
        ("MSRVTT_JSFUSION_test.csv", f"{HEADER}\nr,m,video4, \t \n", ["test.csv:2", "sentence is empty"]),
        ("MSRVTT_JSFUSION_test.csv", f"{HEADER}\nr,m,video5,fine\nr,m,video4,one, two\n", ["test.csv:3", "4 fields"]),
        ("MSRVTT_JSFUSION_test.csv", f"{HEADER}\nr,m,video4\n", ["test.csv:2", "4 fields"]),
        ("MSRVTT_data.json", '{"sentences": [\n{"video_id": "video0"', ["data.json:2", "malformed JSON"]),
        ("MSRVTT_data.json", "[]", ["data.json", "sentences"]),
        ("MSRVTT_data.json", '{"sentences": [{"video_id": "video0"}]}', ["data.json", "sentences[0]", "caption"]),
        (
            "MSRVTT_data.json",
            '{"sentences": [{"video_id": "video0", "caption": " "}]}',
            ["sentences[0]", "video0", "empty"],
        ),
    ],
)
def test_a_fault_in_a_file_is_refused_with_its_place(annotations, tmp_path, name, content, words):
    (annotations / name).write_text(content)
    message = refusal(annotations, tmp_path / "out", "--allow_partial")  # --allow_partial excuses counts, nothing else
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_list_in_another_encoding_is_refused(annotations, tmp_path):
    (annotations / "MSRVTT_train.9k.csv").write_bytes("video_id\nvidéo0\n".encode("latin-1"))
    assert "UTF-8" in refusal(annotations, tmp_path / "out")


@pytest.mark.parametrize("name", ["MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"])
def test_an_absent_file_is_named(annotations, tmp_path, name):
    (annotations / name).unlink()
    message = refusal(annotations, tmp_path / "out")
    assert name in message and "data/README.md" in message


def test_a_refused_run_keeps_the_last_good_one(annotations, tmp_path):
    out = tmp_path / "out"
    prepare(annotations, out, "--allow_partial")
    before = {path.name: path.read_text() for path in out.iterdir()}
    (annotations / "MSRVTT_train.9k.csv").write_text("video_id\nvideo4\n")
    with pytest.raises(SystemExit):
        prepare(annotations, out, "--allow_partial")
    assert {path.name: path.read_text() for path in out.iterdir()} == before


def test_from_the_shell_a_refusal_is_one_sentence_and_exit_code_1(annotations, tmp_path):
    command = [sys.executable, ROOT / "data" / "prepare_msrvtt.py", "--annotations", annotations, "--protocol", "9k"]
    command += ["--out", tmp_path / "out"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("error: train has 4 videos") and run.stderr.count("\n") == 1
    subprocess.run([*command, "--allow_partial"], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "out" / "prepared.json").exists()


# ---- missing videos ----


@pytest.fixture
def videos(tmp_path):
    """video0 and video4 as files, video1 as frames; video2 is an empty file, video3 an empty folder, video5 a text."""
    folder = tmp_path / "videos"
    for name in ("video1", "video3"):
        (folder / name).mkdir(parents=True)
    for name in ("video0.mp4", "video4.WEBM", "video1/00000.jpg", "video5.txt"):
        (folder / name).write_bytes(b"data")
    (folder / "video2.mp4").touch()
    return folder


def test_missing_videos_are_refused_and_listed(annotations, tmp_path, videos):
    out = tmp_path / "out"
    message = refusal(annotations, out, "--allow_partial", "--videos", videos)
    assert "3 of 6 videos" in message and "video2, video3, video5" in message and "--drop_missing" in message
    assert (out / "missing.txt").read_text().split() == ["video2", "video3", "video5"]


def test_dropped_videos_are_recorded_and_leave_no_query(annotations, tmp_path, videos, capsys):
    out = tmp_path / "out"
    refusal(annotations, out, "--allow_partial", "--videos", videos)
    prepare(annotations, out, "--allow_partial", "--videos", videos, "--drop_missing")
    assert {video for video, _ in pairs(out / "train.jsonl")} == {"video0", "video1"}
    assert [video for video, _ in pairs(out / "test.jsonl")] == ["video4"]
    prepared = json.loads((out / "prepared.json").read_text())
    assert prepared["missing"] == ["video2", "video3", "video5"]
    assert prepared["videos"] == {"train": 2, "test": 1} and prepared["queries"] == {"train": 4, "test": 1}
    assert "not comparable" in capsys.readouterr().out
    assert not (out / "missing.txt").exists()


def test_a_split_without_a_single_video_is_refused(annotations, tmp_path, videos):
    (videos / "video4.WEBM").unlink()
    message = refusal(annotations, tmp_path / "out", "--allow_partial", "--videos", videos, "--drop_missing")
    assert "not one video of test" in message


def test_dropping_does_not_excuse_a_wrong_count_of_the_annotations(annotations, tmp_path, videos):
    assert "train has 4 videos" in refusal(annotations, tmp_path / "out", "--videos", videos, "--drop_missing")


def test_complete_videos_drop_nothing(annotations, tmp_path, videos):
    for name in ("video2.avi", "video3.mkv", "video5.mp4"):
        (videos / name).write_bytes(b"data")
    prepare(annotations, tmp_path / "out", "--allow_partial", "--videos", videos)
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["missing"] == []


def test_a_wrong_videos_folder_and_a_pointless_flag_are_refused(annotations, tmp_path):
    assert "no folder" in refusal(annotations, tmp_path / "out", "--allow_partial", "--videos", tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stopped:
        prepare(annotations, tmp_path / "out", "--drop_missing")
    assert stopped.value.code == 2


# ---- the real files ----


@pytest.fixture(scope="module")
def real_corpus(tmp_path_factory):
    """protocol -> folder prepared from the real files, each once; their 23 MB of json are parsed once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_msrvtt, "read_captions", functools.cache(prepare_msrvtt.read_captions))

        @functools.cache
        def prepared(protocol, *flags):
            out = tmp_path_factory.mktemp("real")
            prepare(REAL / "annotations", out, *flags, protocol=protocol)
            return out

        yield prepared


@real
@pytest.mark.parametrize("protocol", COUNTS)
def test_real_counts(real_corpus, protocol):
    out = real_corpus(protocol)
    prepared = json.loads((out / "prepared.json").read_text())
    assert {key: prepared[key] for key in ("videos", "queries")} == COUNTS[protocol]
    for split, queries in COUNTS[protocol]["queries"].items():
        assert (out / f"{split}.jsonl").read_text().count("\n") == queries


@real
def test_real_1ka_sentences_are_those_of_the_csv(real_corpus):
    """965 stand verbatim in MSRVTT_data.json, 988 after folding white space: looking them up there would lose some."""
    queries = [query for _, query in pairs(real_corpus("9k") / "test.jsonl")]
    content = json.loads((REAL / "annotations" / "MSRVTT_data.json").read_text())
    captions = {sentence["caption"] for sentence in content["sentences"]}
    assert sum(query in captions for query in queries) == 965
    folded = {" ".join(caption.split()) for caption in captions}
    assert sum(" ".join(query.split()) in folded for query in queries) == 988


@real
def test_the_fifteen_real_clips_make_a_small_corpus(real_corpus):
    out = real_corpus("9k", "--videos", REAL / "videos", "--drop_missing")
    assert {video for video, _ in pairs(out / "test.jsonl")} == {"video9908", "video8331"}
    prepared = json.loads((out / "prepared.json").read_text())
    assert prepared["videos"] == {"train": 13, "test": 2} and prepared["queries"] == {"train": 260, "test": 2}
    assert len(prepared["missing"]) == 9985

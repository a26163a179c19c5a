"""data/prepare_{msvd,vatex,didemo,activitynet,lsmdc}.py and MSR-VTT's 1k-B: counts, order, every refusal of their own.

What they share (csv lists, missing videos, re-runs) is tested in test_prepare_msrvtt.py.
"""

import importlib
import json
import os
import pickle
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:  # the scripts import each other by bare names
    patch.syspath_prepend(ROOT / "data")
    SCRIPTS = {
        name: importlib.import_module(f"prepare_{name}")
        for name in ("msrvtt", "msvd", "vatex", "didemo", "activitynet", "lsmdc")
    }

REAL = Path(os.environ.get("NARVID_REAL_DATA", ROOT.parent / "shared" / "real"))


def real(corpus):
    return pytest.mark.skipif(not (REAL / corpus).is_dir(), reason=f"no real annotations of {corpus} here")


def write(folder, files):
    """name -> lines, or what json holds; a name may lie in a subfolder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_list = path.suffix in (".txt", ".csv")
        path.write_text("".join(f"{line}\n" for line in content) if is_list else json.dumps(content))


def lsmdc_line(clip, sentence):
    return f"{clip}\t00.00.01.000\t00.00.02.000\t00.00.01.000\t00.00.02.000\t{sentence}"


def didemo(*entries):
    return [{"video": video, "description": text, "times": [[1, 1]], "annotation_id": 7} for video, text in entries]


def vatex(*videos):
    return [{"videoID": v, "enCap": [f"{v} caption {n}" for n in range(2)], "chCap": ["字"]} for v in videos]


SMALL = {
    "msrvtt": {
        "MSRVTT_data.json": {
            "sentences": [{"video_id": v, "caption": f"{v} {n}"} for n in ("one", "two") for v in ("v1", "v2")]
        },
        "train_list_miech.txt": ["v1"],
        "test_list_miech.txt": ["v2"],
    },
    "msvd": {
        "captions_msvd.json": {"a_1_2": ["a cat", " a dog "], "b_1_2": ["a cow"], "c_1_2": ["a hen"], "extra": ["-"]},
        "train_list.txt": ["a_1_2"],
        "val_list.txt": ["b_1_2"],
        "test_list.txt": ["c_1_2"],
    },
    "vatex": {
        "vatex_training_v1.0.json": vatex("t1", "t2", "unlisted"),
        "vatex_validation_v1.0.json": vatex("e1", "e2", "v1", "v2"),
        "train_list.txt": ["t2", "t1"],
        "val_list.txt": ["v1", "v2"],
        "test_list.txt": ["e1", "e2"],
        "test1k5_sec_list.txt": ["v2", "e1"],
    },
    "didemo": {
        "train_data.json": didemo(("t.mov", "second."), ("x.mp4", "not listed"), ("t.mov", " first "), ("u.", "alone")),
        "val_data.json": didemo(("v.3gp", "a val")),
        "test_data.json": didemo(("e@N0.1.avi", "a test")),
        "splits/train_list.txt": ["t.mov", "u."],
        "splits/val_list.txt": ["v.3gp"],
        "splits/test_list.txt": ["e@N0.1.avi"],
    },
    "activitynet": {
        "train.json": {
            "v_a": {"timestamps": [[5, 9], [0, 4]], "sentences": ["Later he runs.", "  First he walks."]},
            "v_b": {"timestamps": [[0, 4]], "sentences": ["Alone."]},
        },
        "val_1.json": {"v_c": {"timestamps": [[0, 1]], "sentences": ["A test. "]}},
    },
    "lsmdc": {
        "LSMDC16_annos_training.csv": [lsmdc_line("1_A_00.01", text) for text in ('He says "hi.', "SOMEONE nods.")],
        "LSMDC16_annos_val.csv": [lsmdc_line("2_B_00.01", "A val.")],
        "LSMDC16_challenge_1000_publictect.csv": [lsmdc_line("3_C_00.01", " A test. ")],
    },
}
MANY = [name for name, script in SCRIPTS.items() if len(script.PROTOCOLS) > 1]


@pytest.fixture
def annotations(tmp_path):
    """corpus -> its small files, with some of them replaced."""

    def make(corpus, **changed):
        folder = tmp_path / corpus
        write(folder, SMALL[corpus] | {name.replace("__", "."): content for name, content in changed.items()})
        return folder

    return make


def prepare(corpus, folder, out, *flags):
    SCRIPTS[corpus].main([str(x) for x in ("--annotations", folder, "--out", out, *flags)])
    return {
        path.stem: [(line["video"], line["query"]) for line in map(json.loads, path.read_text().splitlines())]
        for path in out.glob("*.jsonl")
    }


def protocol_of(corpus):
    return ["--protocol", list(SCRIPTS[corpus].PROTOCOLS)[-1]] if corpus in MANY else []


def refusal(corpus, folder, out, *flags):
    with pytest.raises(SystemExit) as left:
        prepare(corpus, folder, out, *flags)
    message = left.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert not (out / "prepared.json").exists()
    return message


# ---- what is written ----

WRITTEN = {
    "msrvtt": {"train": [("v1", "v1 one"), ("v1", "v1 two")], "test": [("v2", "v2 one")]},
    "msvd": {
        "train": [("a_1_2", "a cat"), ("a_1_2", "a dog")],
        "val": [("b_1_2", "a cow")],
        "test": [("c_1_2", "a hen")],
    },
    "vatex": {  # 1k5: what its test leaves of val and test is val
        "train": [(v, f"{v} caption {n}") for v in ("t2", "t1") for n in range(2)],
        "val": [(v, f"{v} caption {n}") for v in ("v1", "e2") for n in range(2)],
        "test": [(v, f"{v} caption {n}") for v in ("v2", "e1") for n in range(2)],
    },
    "didemo": {
        "train": [("t", "second. first"), ("u", "alone")],
        "val": [("v", "a val")],
        "test": [("e@N0.1", "a test")],
    },
    "activitynet": {
        "train": [("v_a", "Later he runs. First he walks."), ("v_b", "Alone.")],
        "test": [("v_c", "A test.")],
    },
    "lsmdc": {
        "train": [("1_A_00.01", 'He says "hi.'), ("1_A_00.01", "SOMEONE nods.")],
        "val": [("2_B_00.01", "A val.")],
        "test": [("3_C_00.01", "A test.")],
    },
}


@pytest.mark.parametrize("corpus", SCRIPTS)
def test_the_small_files_become_these_queries(annotations, tmp_path, corpus):
    out = tmp_path / "out"
    assert prepare(corpus, annotations(corpus), out, "--allow_partial", *protocol_of(corpus)) == WRITTEN[corpus]
    prepared = json.loads((out / "prepared.json").read_text())
    assert prepared["corpus"] == corpus and prepared["protocol"] == list(SCRIPTS[corpus].PROTOCOLS)[-1]
    assert prepared["queries"] == {split: len(pairs) for split, pairs in WRITTEN[corpus].items()}


@pytest.mark.parametrize("corpus", SCRIPTS)
def test_counts_that_are_off_are_refused_beside_the_protocols(annotations, tmp_path, corpus):
    message = refusal(corpus, annotations(corpus), tmp_path / "out", *protocol_of(corpus))
    assert "train has" in message and "--allow_partial" in message
    assert SCRIPTS[corpus].corpus._shown(expected(corpus)["train"][0]) in message


def expected(corpus):
    """split -> (videos, queries) of the script's last protocol."""
    splits = list(SCRIPTS[corpus].PROTOCOLS.values())[-1]
    return {split: counts[1] if corpus == "msrvtt" else counts for split, counts in splits.items()}


@pytest.mark.parametrize("corpus", SCRIPTS)
def test_a_video_of_two_splits_is_refused_by_the_shared_check(annotations, tmp_path, monkeypatch, corpus):
    script, folder = SCRIPTS[corpus], annotations(corpus)
    splits = script.read_splits(folder, list(script.PROTOCOLS)[-1])
    splits["test"] = splits["test"] + splits["train"][:1]
    monkeypatch.setattr(script, "read_splits", lambda *_: splits)
    message = refusal(corpus, folder, tmp_path / "out", "--allow_partial", *protocol_of(corpus))
    assert "both train and test" in message


def test_the_protocol_must_be_named_only_where_there_are_several(annotations, tmp_path):
    for corpus in SCRIPTS:
        if corpus in MANY:
            with pytest.raises(SystemExit) as left:
                prepare(corpus, annotations(corpus), tmp_path / "out", "--allow_partial")
            assert left.value.code == 2


def test_hgr_takes_the_three_lists_as_they_are(annotations, tmp_path):
    splits = prepare("vatex", annotations("vatex"), tmp_path / "out", "--allow_partial", "--protocol", "hgr")
    ids = {split: list(dict.fromkeys(video for video, _ in pairs)) for split, pairs in splits.items()}
    assert ids == {"train": ["t2", "t1"], "val": ["v1", "v2"], "test": ["e1", "e2"]}


def test_didemo_says_both_counts_of_train(annotations, tmp_path, capsys):
    prepare("didemo", annotations("didemo"), tmp_path / "out", "--allow_partial")
    printed = capsys.readouterr().out
    assert "2 here; the public list has 8,392 ids, the paper says 8,395" in printed
    assert "train: 2 videos listed; 1 others in the json, left out" in printed
    assert "8,392-8,395" in printed  # the table accepts either


@pytest.mark.parametrize(("found", "fits"), [(8391, False), (8392, True), (8395, True), (8396, False)])
def test_a_count_may_be_a_range(found, fits):
    corpus = SCRIPTS["didemo"].corpus
    pairs = {"train": [(f"v{n}", "text") for n in range(found)]}
    if fits:
        corpus.check(pairs, SCRIPTS["didemo"].PROTOCOLS["paragraph"], allow_partial=False)
    else:
        with pytest.raises(corpus.InputError, match="8,392-8,395"):
            corpus.check(pairs, SCRIPTS["didemo"].PROTOCOLS["paragraph"], allow_partial=False)


def test_lsmdc_says_how_many_sentences_share_a_clip(annotations, tmp_path, capsys):
    prepare("lsmdc", annotations("lsmdc"), tmp_path / "out", "--allow_partial")
    assert "train: 1 sentences whose clip has another one already" in capsys.readouterr().out


def test_activitynet_lists_choose_where_they_are_there(annotations, tmp_path):
    folder = annotations("activitynet", train_list__txt=["v_b"])
    assert prepare("activitynet", folder, tmp_path / "out", "--allow_partial")["train"] == [("v_b", "Alone.")]


def test_videos_are_found_by_their_id_in_subfolders_too(annotations, tmp_path):
    videos = tmp_path / "videos"
    for name in ("deep/er/t.mp4", "u.3g2", "v.MOV", "e@N0.1/00000.jpg"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(b"data")
    flags = ["--allow_partial", "--videos", videos]
    assert prepare("didemo", annotations("didemo"), tmp_path / "out", *flags) == WRITTEN["didemo"]
    (videos / "u.3g2").unlink()
    (videos / "u.mp4").symlink_to(videos / "nowhere.mp4")
    assert "1 of 4 videos" in refusal("didemo", annotations("didemo"), tmp_path / "new", *flags)
    prepare("didemo", annotations("didemo"), tmp_path / "new", *flags, "--drop_missing")
    assert json.loads((tmp_path / "new" / "prepared.json").read_text())["missing"] == ["u"]


# ---- what is refused ----

FAULTS = [
    ("msrvtt", {"train_list_miech__txt": ["v1", "v1"]}, ["miech.txt:2", "v1", "twice", "line 1"]),
    ("msvd", {"train_list__txt": ["a_1_2", "gone"]}, ["train_list.txt", "gone", "no caption", "captions_msvd.json"]),
    ("msvd", {"test_list__txt": []}, ["test_list.txt", "empty"]),
    ("msvd", {"captions_msvd__json": {"a_1_2": "a cat"}}, ["captions_msvd.json", "'a_1_2'", "list"]),
    ("msvd", {"captions_msvd__json": {"a_1_2": [3]}}, ["captions_msvd.json", "a_1_2, caption 1", "no text"]),
    ("msvd", {"captions_msvd__json": {"a_1_2": ["x", " "]}}, ["a_1_2, caption 2", "empty"]),
    ("vatex", {"test1k5_sec_list__txt": ["t1"]}, ["t1", "both train and test"]),
    ("vatex", {"test1k5_sec_list__txt": ["v1", "nowhere"]}, ["test1k5_sec_list.txt", "nowhere", "no caption"]),
    ("vatex", {"vatex_training_v1.0__json": vatex("t1", "t2", "t1")}, ["training", "t1", "twice"]),
    ("vatex", {"vatex_validation_v1.0__json": vatex("t1")}, ["validation", "t1", "twice", "training_v1.0.json too"]),
    ("vatex", {"vatex_training_v1.0__json": {"t1": []}}, ["vatex_training_v1.0.json", "list"]),
    ("vatex", {"vatex_training_v1.0__json": [{"videoID": "t1"}]}, ["entry 0", "enCap"]),
    ("vatex", {"vatex_training_v1.0__json": [{"videoID": "t1", "enCap": ["", "b"]}]}, ["t1, enCap 0", "empty"]),
    ("didemo", {"splits/train_list__txt": ["t.mov", "t.avi"]}, ["train_list.txt", "t.avi", "no description"]),
    ("didemo", {"splits/val_list__txt": ["t."], "val_data__json": didemo(("t.", "x"))}, ["t is", "train and val"]),
    ("didemo", {"train_data__json": [{"description": "x"}]}, ["train_data.json", "entry 0", "video"]),
    ("didemo", {"train_data__json": didemo(("t.mov", None))}, ["entry 0, t.mov", "no text"]),
    ("didemo", {"train_data__json": {}}, ["train_data.json", "list"]),
    ("activitynet", {"val_1__json": {"v_a": {"sentences": ["x"]}}}, ["v_a", "both train and test"]),
    ("activitynet", {"val_1__json": {"v_c": {"sentences": []}}}, ["val_1.json", "v_c", "sentences"]),
    ("activitynet", {"val_1__json": {"v_c": {"sentences": ["x", " "]}}}, ["v_c, sentence 2", "empty"]),
    ("activitynet", {"val_1__json": []}, ["val_1.json", "dict"]),
    ("activitynet", {"val_1_list__txt": ["v_c", "v_d"]}, ["val_1_list.txt", "v_d", "val_1.json"]),
    ("lsmdc", {"LSMDC16_annos_val__csv": ["2_B\ta sentence"]}, ["val.csv:1", "2 fields", "not 6"]),
    ("lsmdc", {"LSMDC16_annos_val__csv": [lsmdc_line("2_B", " ")]}, ["val.csv:1", "empty"]),
    ("lsmdc", {"LSMDC16_annos_val__csv": []}, ["val.csv", "empty"]),
    (
        "lsmdc",
        {"LSMDC16_challenge_1000_publictect__csv": [lsmdc_line("3_C", "a"), lsmdc_line("3_C", "b")]},
        ["publictect.csv", "3_C", "twice"],
    ),
]


@pytest.mark.parametrize(("corpus", "changed", "words"), FAULTS)
def test_a_fault_in_a_file_is_refused_with_its_place(annotations, tmp_path, corpus, changed, words):
    flags = ["--allow_partial", *protocol_of(corpus)]  # excuses counts, nothing else
    message = refusal(corpus, annotations(corpus, **changed), tmp_path / "out", *flags)
    assert all(word in message for word in words), message


def test_a_file_name_that_differs_in_its_extension_alone_is_one_id(annotations, tmp_path):
    changed = {"splits/train_list__txt": ["t.mov", "t.avi"], "train_data__json": didemo(("t.mov", "x"), ("t.avi", "y"))}
    message = refusal("didemo", annotations("didemo", **changed), tmp_path / "out", "--allow_partial")
    assert "train_list.txt" in message and "t stands there twice" in message


def test_an_id_that_stands_twice_in_one_json_object_is_refused(annotations, tmp_path):
    for corpus, name in (("msvd", "captions_msvd.json"), ("activitynet", "train.json")):
        folder = annotations(corpus)
        key, value = next(iter(json.loads((folder / name).read_text()).items()))
        text = (folder / name).read_text()
        (folder / name).write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}")
        message = refusal(corpus, folder, tmp_path / "out", "--allow_partial")
        assert name in message and f"{key} stands there twice" in message


@pytest.mark.parametrize(("corpus", "name"), [(c, name) for c in SCRIPTS for name in SMALL[c]])
def test_an_absent_file_is_named(annotations, tmp_path, corpus, name):
    folder = annotations(corpus)
    (folder / name).unlink()
    message = refusal(corpus, folder, tmp_path / "out", "--allow_partial", *protocol_of(corpus))
    assert Path(name).name in message and "data/README.md" in message


# ---- MSVD's pickle ----


class Runs:
    """Pickled, it is the order to call os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pickled(annotations):
    """Write raw-captions.pkl into MSVD's small files, where it is preferred to the json."""

    def make(content, protocol=2):
        folder = annotations("msvd")
        data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
        (folder / "raw-captions.pkl").write_bytes(data)
        return folder

    return make


WORDS = {"a_1_2": [["a", "bird"], ["it", "flies"]], "b_1_2": [["é"]], "c_1_2": [["c"]]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_pickle_is_read_and_preferred(pickled, tmp_path, protocol):
    splits = prepare("msvd", pickled(WORDS, protocol), tmp_path / "out", "--allow_partial")
    assert splits["train"] == [("a_1_2", "a bird"), ("a_1_2", "it flies")] and splits["val"] == [("b_1_2", "é")]


def test_a_pickle_of_python_2_is_read(pickled, tmp_path):
    words = b"(dp0\nS'a_1_2'\np1\n(lp2\n(lp3\nS'a'\np4\naS'bird'\np5\naas"  # what cPickle.dumps wrote, protocol 0
    words += b"S'b_1_2'\n(l(lS'x'\naasS'c_1_2'\n(l(lS'y'\naas."
    assert prepare("msvd", pickled(words), tmp_path / "out", "--allow_partial")["train"] == [("a_1_2", "a bird")]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_runs_nothing(pickled, tmp_path, protocol):
    made = tmp_path / "made"
    folder = pickled(WORDS | {"a_1_2": [["a", Runs(made)]]}, protocol)
    message = refusal("msvd", folder, tmp_path / "out", "--allow_partial")
    assert "raw-captions.pkl" in message and "mkdir" in message and not made.exists()
    pickle.loads((folder / "raw-captions.pkl").read_bytes())  # the ordinary reader does run it: the test can fail
    assert made.is_dir()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no whole pickle"]),
        (pickle.dumps(WORDS)[:-20], ["no whole pickle"]),
        (b"<html>404</html>", ["no whole pickle"]),
        (b"(dr\xff\xff\xff\x7f.", ["no whole pickle", "slot 2147483647 of 2"]),  # the reader would make room for them
        (b"Iline\r\x01\n.", ["no whole pickle", "ValueError"]),  # its error repeats control characters
        (b"\x82\x01.", ["no whole pickle"]),  # an extension code
        (b"P1\n.", ["outside the file"]),  # a persistent id
        ([WORDS], ["no dict"]),
        ({}, ["no dict"]),
        ({1: [["a"]]}, ["1 is not a text"]),
        ({"a_1_2": (["a"],)}, ["'a_1_2'", "list"]),
        ({"a_1_2": [("a", "bird")]}, ["a_1_2, caption 1", "no text"]),
        ({"a_1_2": [["a", 2]]}, ["a_1_2, caption 1", "a int instead of a word"]),
        ({"a_1_2": [["a", None]]}, ["NoneType instead of a word"]),
        ({"a_1_2": [[b"a"]]}, ["raw-captions.pkl"]),
        ({"a_1_2": [[]]}, ["a_1_2, caption 1", "empty"]),
        ({"a_1_2": [{"a": "b"}]}, ["caption 1", "no text"]),
        ({"a_1_2": {"a"}}, ["raw-captions.pkl"]),
    ],
)
def test_a_pickle_of_anything_else_is_refused(pickled, tmp_path, content, words):
    message = refusal("msvd", pickled(content), tmp_path / "out", "--allow_partial")
    assert "raw-captions.pkl" in message and all(word in message for word in words), message


# ---- the real files ----


@real("msvd")
def test_real_msvd(tmp_path):
    splits = prepare("msvd", REAL / "msvd" / "annotations", tmp_path)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 48774, "val": 4290, "test": 27763}
    clips = {path.stem for path in (REAL / "msvd" / "videos").iterdir()}
    assert clips <= {video for pairs in splits.values() for video, _ in pairs}


@real("msvd")
def test_real_msvd_is_the_same_from_a_pickle(tmp_path):
    folder, annotations = tmp_path / "annotations", REAL / "msvd" / "annotations"
    folder.mkdir()
    for path in annotations.glob("*_list.txt"):
        (folder / path.name).write_bytes(path.read_bytes())
    captions = json.loads((annotations / "captions_msvd.json").read_text())
    words = {video: [caption.split(" ") for caption in of_video] for video, of_video in captions.items()}
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(words))
    assert prepare("msvd", folder, tmp_path / "out") == prepare("msvd", annotations, tmp_path / "json")


@real("vatex")
@pytest.mark.parametrize("protocol", ["hgr", "1k5"])
def test_real_vatex_lists(tmp_path, protocol):
    """The official captions are not here: ten stand-ins a video, for every listed video."""
    for path in (REAL / "vatex").glob("*_list.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ids = {split: (REAL / "vatex" / f"{split}_list.txt").read_text().split() for split in ("train", "val", "test")}
    for name, videos in (("training", ids["train"]), ("validation", ids["val"] + ids["test"])):
        entries = [{"videoID": video, "enCap": [f"{n}" for n in range(10)], "chCap": []} for video in videos]
        (tmp_path / f"vatex_{name}_v1.0.json").write_text(json.dumps(entries))
    splits = prepare("vatex", tmp_path, tmp_path / "out", "--protocol", protocol)  # counts and overlap are checked
    assert [len(splits[split]) for split in ("train", "val", "test")] == [259910, 15000, 15000]
    if protocol == "1k5":
        own = (REAL / "vatex" / "test1k5_sec_list.txt").read_text().split()
        assert len(set(own) & set(ids["val"])) == 776 and len(set(own) & set(ids["test"])) == 724
        assert {video for video, _ in splits["val"]} == set(ids["val"] + ids["test"]) - set(own)


@real("didemo")
def test_real_didemo(tmp_path, capsys):
    """train_data.json is not here: a stand-in with one description a listed video."""
    names = (REAL / "didemo" / "splits" / "train_list.txt").read_text().split()
    for split in ("val", "test"):
        (tmp_path / f"{split}_data.json").symlink_to(REAL / "didemo" / f"{split}_data.json")
    (tmp_path / "splits").symlink_to(REAL / "didemo" / "splits")
    (tmp_path / "train_data.json").write_text(json.dumps(didemo(*((name, "text") for name in names))))
    splits = prepare("didemo", tmp_path, tmp_path / "out")
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 8392, "val": 1065, "test": 1004}
    printed = capsys.readouterr().out
    assert "val: 1,065 videos listed; 29 others" in printed and "test: 1,004 videos listed; 33 others" in printed
    texts = json.loads((REAL / "didemo" / "test_data.json").read_text())
    name = (REAL / "didemo" / "splits" / "test_list.txt").read_text().split()[0]
    joined = " ".join(entry["description"].strip() for entry in texts if entry["video"] == name)
    assert splits["test"][0] == (name.rpartition(".")[0], joined)


@real("activitynet")
def test_real_activitynet(tmp_path):
    splits = prepare("activitynet", REAL / "activitynet", tmp_path)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 10009, "test": 4917}
    video, paragraph = splits["test"][0]  # the second sentence has two spaces in front of it
    assert video == "v_uqiMw7tQ1Cc" and paragraph.startswith("A weight lifting tutorial is given. The coach helps ")


@real("lsmdc")
def test_real_lsmdc_test(annotations, tmp_path):
    folder = annotations("lsmdc")  # train and val are not here
    name = "LSMDC16_challenge_1000_publictect.csv"
    (folder / name).write_bytes((REAL / "lsmdc" / name).read_bytes())
    splits = prepare("lsmdc", folder, tmp_path / "out", "--allow_partial")
    assert SCRIPTS["lsmdc"].corpus.count(splits["test"]) == (1000, 1000)
    assert splits["test"][0] == (
        "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886",
        "SOMEONE stands below, hands on her hips.",
    )

"""Files and folders as people have them: each situation with the right value. What a single reader does with a broken
file is in test_files.py and, mutated, in test_fuzz.py; disks and folders of runs are in run/test_runs.py.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from narvid.towers.tokenizer import Tokenizer
from narvid import InputError, files
from narvid.data import datasets, extraction, frames, narrations, titles
from narvid.data.frames import load_frame_index, read_list
from narvid.narration import journals
from narvid.report import runs
from narvid.run import run_dir, settings
from narvid.search.__main__ import read_queries
from narvid import towers
from scripts import check_data, fuzz_formats
import corpus as prepare
from test_files import JSON_FAULTS, refusal
from test_frames import make_clip

ROOT = Path(__file__).resolve().parent.parent
ODD = "one \u2028 line \u2029 with \u0085 all \x0b \x1c of them"
HALF = '{"video": "v1", "query": "a cat \\ud83d"}'

# ---- a line ends at \n and nowhere else ----


def official(folder: Path, name: str, caption: str) -> dict[str, list]:
    """What a prepare script makes of its sample, one caption of which is replaced."""
    form = fuzz_formats.FORMATS[name]
    for other, content in form.beside.items():
        (folder / other).write_bytes(content)
    words = {"MSR-VTT's sentences": "a man", "MSR-VTT's list": "a, woman", "MSVD's captions": "a cat",
             "VATEX's captions": "train1 one", "DiDeMo's descriptions": "one", "ActivityNet's paragraphs": "One.",
             "LSMDC's lines": "Someone nods."}
    text = form.sample.decode()
    assert words[name] in text
    path = folder / form.name
    path.write_text(text.replace(words[name], json.dumps(caption)[1:-1] if form.name.endswith("json") else caption))
    return form.read(path)


CORPORA = ["MSR-VTT's sentences", "MSR-VTT's list", "MSVD's captions", "VATEX's captions", "DiDeMo's descriptions",
           "ActivityNet's paragraphs", "LSMDC's lines"]


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_caption_with_other_line_separators_is_prepared_and_read_again(tmp_path, corpus):
    (tmp_path / "official").mkdir()
    written = official(tmp_path / "official", corpus, ODD)
    queries = [query for pairs in written.values() for _, query in pairs]
    assert sum(ODD in query for query in queries) == 1
    for split, pairs in written.items():  # as training reads what the script wrote
        files.write_json_lines(tmp_path / f"{split}.jsonl", [{"video": v, "query": q} for v, q in pairs])
        assert [(video, query) for _, video, query in datasets.read_pairs(tmp_path / f"{split}.jsonl")] == pairs


def test_lists_and_queries_with_other_line_separators(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"video": "a\u2028b"}, ensure_ascii=False) + '\n{"video": "c"}\n')
    assert read_list([path]) == {"a\u2028b", "c"}
    path.write_text(f"{ODD}\r\n\nsecond\n")
    assert read_queries(str(path)) == [(1, ODD), (3, "second")]


# ---- half a surrogate pair, and names that are not UTF-8 ----


@pytest.mark.parametrize("line", [HALF, HALF.replace("cat \\ud83d", "cat").replace("v1", "v\\udc00"),
                                  HALF.replace("\\ud83d", "\\u0000")])
def test_half_a_pair_is_refused_with_its_line_where_it_is_read(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"video": "v1", "query": "a \\ud83d\\ude00"}\n' + line + "\n")
    for read in (datasets.read_pairs, datasets.read_queries, lambda path: read_list([path])):
        assert f"{path}:2: a text holds NUL or half a surrogate pair" in refusal(read, path)
    path.write_text('{"video": "v1", "query": "a \\ud83d\\ude00"}\n')
    assert datasets.read_queries(path) == ["a \U0001f600"]


@pytest.mark.parametrize("corpus", [name for name in CORPORA if fuzz_formats.FORMATS[name].name.endswith("json")])
def test_half_a_pair_in_official_annotations_is_refused_with_its_line(tmp_path, corpus):
    with pytest.raises(SystemExit, match=r"^error: .*json:\d+: a text holds NUL or half a surrogate pair"):
        official(tmp_path, corpus, "a cat \ud83d")


def test_a_video_whose_name_is_not_utf8_is_refused_before_it_is_extracted(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / os.fsdecode(b"videos/caf\xe9.mp4")).write_bytes(b"")
    message = refusal(extraction.find_videos, tmp_path / "videos")
    assert "caf\\udce9.mp4: a file name that is not UTF-8: rename it" in message and message.isascii()


# ---- ids that are nearly those of the files ----

SPELLINGS = {"café": "cafe\u0301", "cafe\u0301": "café", "7010.0": "7010", "7010": "7010.0", "1": "0001",
             "Video7": "video7", "video7.mp4": "video7", "video7": "video7.avi", " video7": "video7", "Ｖ7": "v7"}


@pytest.mark.parametrize("ours", SPELLINGS)
def test_another_spelling_of_an_id_is_named_and_not_joined(tmp_path, ours):
    """In the split, the narrations, the list of an extraction and the folder of videos of a prepare script."""
    theirs = SPELLINGS[ours]
    both = f"but for {ascii(theirs)}: here it is {ascii(ours)}, make them alike"
    (tmp_path / "train.jsonl").write_text(json.dumps({"video": ours, "query": "a cat"}))
    read = functools.partial(datasets.load_split, tmp_path / "train.jsonl", tmp_path, max_frames=3)
    assert both in refusal(read, {"v1": [0.0], theirs: [0.0]})
    assert "but for" not in refusal(read, {"v1": [0.0]})
    said = narrations.Narration("c", "p", [0.0], ["a cat"])
    assert both in refusal(functools.partial(read, {ours: [0.0]}, narrations={theirs: said}))
    videos = tmp_path / "videos"
    videos.mkdir()
    make_clip(videos / f"{theirs}.mp4", [0.0, 0.1])
    pairs = {"test": [(ours, "a cat")]}
    assert both in refusal(functools.partial(prepare.drop_missing, pairs, videos, tmp_path / "out", allowed=False))
    with pytest.raises(SystemExit, match="no video gave a frame"):
        extraction.main(["--videos", str(videos), "--out", str(tmp_path / "frames"), "--workers", "1", "--list",
                         str(tmp_path / "train.jsonl")])
    (line,) = files.read_lines(tmp_path / "frames" / "failed.jsonl")
    assert both in json.loads(line)["why"]


def test_ids_that_differ_by_case_or_zeros_are_two_videos(tmp_path):
    ids = ["a", "A", "1", "01", "1.0", "café", "cafe\u0301", "a,b", "a\nb", "\U0001f600", "x" * 250]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"video": v, "query": f"of {v}"}) + "\n" for v in ids))
    split = datasets.load_split(tmp_path / "train.jsonl", tmp_path, {v: [0.0] for v in ids}, max_frames=3)
    assert split.videos == ids and split.queries == [f"of {v}" for v in ids]


@pytest.mark.parametrize("line, said", [('{"video": 7010, "query": "a cat"}', 'its "video" is the number 7010'),
                                        ('{"video": 7010.0, "query": "a cat"}', 'its "video" is the number 7010.0'),
                                        ('{"video": "v1", "query": 3}', 'its "query" is the number 3')])
def test_a_number_in_place_of_a_text_is_named(tmp_path, line, said):
    (tmp_path / "train.jsonl").write_text(f'{{"video": "v1", "query": "a"}}\n{line}\n')
    message = refusal(datasets.read_pairs, tmp_path / "train.jsonl")
    assert f"train.jsonl:2: {said}" in message and "quotes" in message


# ---- JSON that no reader expects, in every place where JSON, YAML or csv is read ----


def config_of(path: Path) -> dict:
    return runs.read_config(path.parent)


PLACES = {  # a command's reader -> the name that it looks for
    "train.jsonl": datasets.read_pairs, "prepared.json": datasets._missing,
    "index.jsonl": lambda path: load_frame_index(path.parent), "list.jsonl": lambda path: read_list([path]),
    "narrations.jsonl": narrations.load_narrations, "titles.json": lambda path: titles.load_titles([path], (), 3),
    "clip.json": lambda path: towers.checked_model(str(path)), "checked.json": check_data.read_prepared,
    "results.jsonl": lambda path: runs.read_results(path.parent), "config.yaml": config_of,
    "preset.yaml": lambda path: settings.preset_flags(str(path)),
    "1-of-1.jsonl": lambda path: journals.read_known(path.parent.with_suffix(""), None),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
@pytest.mark.parametrize("name", PLACES)
def test_hostile_json_is_one_sentence_wherever_it_is_read(tmp_path, name, fault):
    (tmp_path / "n.jsonl.parts").mkdir()
    path = tmp_path / "n.jsonl.parts" / name
    for content in (JSON_FAULTS[fault][0], f'{{"video": {JSON_FAULTS[fault][0]}}}\n'):
        path.write_text(content + "\n")
        with pytest.raises((InputError, SystemExit)) as refused:
            PLACES[name](path)
        message = str(refused.value)
        assert "\n" not in message and len(message) < 700 and path.name in message


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"null", b'{"missing": 3}', "{}".encode("utf-16"), b"\xff", b"{"])
def test_a_broken_prepared_json_is_one_sentence(tmp_path, content):
    path = tmp_path / "prepared.json"
    path.write_bytes(content)
    for read in (datasets._missing, check_data.read_prepared):
        message = refusal(read, path)
        assert "prepared.json" in message and ("prepare the annotations again" in message or "UTF-16" in message)


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(tmp_path):
    for name, read in PLACES.items():
        (tmp_path / "n.jsonl.parts" / name).mkdir(parents=True)
        with pytest.raises((InputError, SystemExit), match="is a folder"):
            read(tmp_path / "n.jsonl.parts" / name)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refusal(extraction.find_videos, tmp_path / "file")


def test_a_list_with_a_header_alone_is_no_split(tmp_path):
    form = fuzz_formats.FORMATS["MSR-VTT's list"]
    for name, content in {**form.beside, form.name: b"key,vid_key,video_id,sentence\n"}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="JSFUSION_test.csv: has no line below its header"):
        form.read(tmp_path / form.name)  # with --allow_partial


# ---- folders of frames ----


def clip(path: Path, seconds: int = 3, shade: int = 0) -> None:
    """A small video, one picture a second."""
    from test_frames import make_clip

    path.parent.mkdir(parents=True, exist_ok=True)
    make_clip(path, [shade % 2 + second for second in range(seconds)], size=(32, 32))


def extract(videos: Path, out: Path, *more: str) -> None:
    extraction.main(["--videos", str(videos), "--out", str(out), "--workers", "1", *more])


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Two videos and their frames."""
    folder = tmp_path_factory.mktemp("extracted")
    clip(folder / "videos/a.mp4")
    clip(folder / "videos/b.mp4")
    (folder / "videos/bad.mp4").write_bytes(b"nothing")
    extract(folder / "videos", folder / "frames")
    return folder


@pytest.fixture
def here(extracted, tmp_path):
    shutil.copytree(extracted / "videos", tmp_path / "videos")
    shutil.copytree(extracted / "frames", tmp_path / "frames")
    return tmp_path


def changed(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_dir()}


def test_other_files_beside_the_frames_do_not_count(here, capsys):
    for video in "ab":
        for name in ("Thumbs.db", ".DS_Store", "00000.jpg.part", "cover.jpg"):
            (here / "frames" / video / name).write_bytes(b"x")
        (here / "frames" / video / "@eaDir").mkdir()
        (here / "frames" / video / "@eaDir/00000.jpg").write_bytes(b"x")
    before, index = changed(here / "frames"), (here / "frames/index.jsonl").read_text()
    extract(here / "videos", here / "frames")
    assert "2 videos, 6 frames" in (said := capsys.readouterr().out) and "(0 videos new)" in said
    assert changed(here / "frames") == before and (here / "frames/index.jsonl").read_text() == index


def test_a_second_folder_of_videos_adds_to_the_first(here, capsys):
    clip(here / "more/c.mp4")
    (here / "more/broken.mp4").write_bytes(b"nothing")
    extract(here / "more", here / "frames")
    assert sorted(load_frame_index(here / "frames")) == ["a", "b", "c"]
    failed = {line["video"]: line for _, line in files.read_json_lines(here / "frames/failed.jsonl")}
    assert sorted(failed) == ["bad", "broken"]
    clip(here / "more/broken.mp4")
    extract(here / "more", here / "frames")
    failed = [line["video"] for _, line in files.read_json_lines(here / "frames/failed.jsonl")]
    assert failed == ["bad"] and sorted(load_frame_index(here / "frames")) == ["a", "b", "broken", "c"]


def test_a_video_that_was_replaced_is_extracted_again_and_no_other(here, capsys):
    lines = {line["video"]: line for _, line in files.read_json_lines(here / "frames/index.jsonl")}
    state = (here / "videos/a.mp4").stat()  # copied with its times
    assert lines["a"]["source_bytes"] == state.st_size and lines["a"]["source_mtime"] == round(state.st_mtime, 3)
    before = changed(here / "frames")
    clip(here / "videos/b.mp4", seconds=5)
    extract(here / "videos", here / "frames")
    assert "b, ..." in (said := capsys.readouterr().out) and "8 frames" in said
    assert len(load_frame_index(here / "frames")["b"]) == 5
    after = changed(here / "frames")
    assert after["a"] == before["a"] and after["b"] != before["b"]


def test_a_video_that_grows_while_it_is_read_is_read_again_once_it_is_whole(here, monkeypatch, capsys):
    """A recording that goes on, a download: its index line has the state from before it was opened."""
    source, whole = here / "videos/c.mp4", (here / "videos/a.mp4").read_bytes()
    clip(source, seconds=2)
    real = extraction.run_jobs

    def run_jobs(jobs, workers):
        for done in real(jobs, workers):
            if done[0].video == "c":
                source.write_bytes(whole)
            yield done

    monkeypatch.setattr(extraction, "run_jobs", run_jobs)
    extract(here / "videos", here / "frames")
    assert len(load_frame_index(here / "frames")["c"]) == 2
    extract(here / "videos", here / "frames")
    assert "c, ..." in capsys.readouterr().out
    assert len(load_frame_index(here / "frames")["c"]) == len(load_frame_index(here / "frames")["a"]) == 3


def test_an_index_from_before_sizes_stays(here, capsys):
    index = here / "frames/index.jsonl"
    old = [{k: v for k, v in line.items() if not k.startswith("source_")} for _, line in files.read_json_lines(index)]
    files.write_json_lines(index, old)
    before = changed(here / "frames")
    extract(here / "videos", here / "frames")
    assert changed(here / "frames") == before


def test_a_loop_of_links_and_a_second_name_of_a_folder_give_each_video_once(here):
    (here / "videos/sub").mkdir()
    (here / "videos/sub/loop").symlink_to(here / "videos")
    (here / "videos/again").symlink_to(here / "videos/sub")
    (here / "videos/sub/c.mp4").symlink_to(here / "videos/a.mp4")
    (here / "videos/sub/a.mp4").symlink_to(here / "videos/a.mp4")  # the same file under the same id
    assert sorted(extraction.find_videos(here / "videos")) == ["a", "b", "bad", "c"]
    (here / "videos/sub/a.mp4").unlink()
    (here / "videos/sub/a.mp4").write_bytes(b"another")
    assert "have one id, 'a'" in refusal(extraction.find_videos, here / "videos")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
@pytest.mark.parametrize("what", ["extraction.find_videos(path)", "corpus._videos_in(path)"])
def test_a_folder_that_may_not_be_read_is_named_and_not_empty(what):
    code = f"""if True:
        import os, sys
        from pathlib import Path
        sys.path[:0] = ["data"]
        import corpus
        from narvid.data import extraction
        path = Path(sys.argv[1])
        os.seteuid(65534)
        try:
            print({what})
        except corpus.InputError as error:
            print(error)"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders may not be looked into by others
        os.chmod(folder, 0o755)
        Path(folder, "videos/closed").mkdir(parents=True)
        Path(folder, "videos/a.mp4").write_bytes(b"x")
        Path(folder, "videos/closed/b.mp4").write_bytes(b"x")
        os.chmod(Path(folder, "videos/closed"), 0o700)
        run = subprocess.run([sys.executable, "-c", code, Path(folder, "videos")], cwd=ROOT, capture_output=True,
                             text=True)
        assert f"{folder}/videos/closed: the folder cannot be read (Permission denied)" in run.stdout, run


def test_only_frames_make_a_folder_of_frames(tmp_path):
    """--videos of the prepare scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "data")
        import corpus
    for name in ("v1/00000.jpg", "v2/Thumbs.db", "v3/cover.jpg", ".unfinished/v4/00000.jpg", "v5.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert corpus._videos_in(tmp_path) == {"v1", "v5"}


def test_two_extractions_into_one_folder(here):
    with files.lock(here / "frames"):
        assert "is being written by another process" in refusal(extract, here / "videos", here / "frames")


@pytest.mark.parametrize("size", [(65_000, 65_000), (30_000, 30_000)])
def test_a_frame_that_promises_a_gigantic_picture_is_refused(tmp_path, size):
    Image.new("RGB", (16, 16)).save(tmp_path / "00000.jpg", "JPEG")
    content = (tmp_path / "00000.jpg").read_bytes()
    at = content.index(b"\xff\xc0") + 5  # the frame's header: height and width behind the precision
    sides = b"".join(side.to_bytes(2, "big") for side in size)
    (tmp_path / "00000.jpg").write_bytes(content[:at] + sides + content[at + 4:])
    assert f"frame {tmp_path / '00000.jpg'} cannot be decoded" in refusal(
        frames.read_frames, [tmp_path / "00000.jpg"], frames.Picture(32))


# ---- captions that hold the tokenizer's own marks ----


@pytest.mark.parametrize(
    "mark", ["<end_of_text>", "<START_OF_TEXT>", "&lt;end_of_text&gt;", "&amp;lt;end_of_text&amp;gt;"])
def test_the_tokenizers_marks_in_a_caption_end_nothing(mark):
    tokens, mask = Tokenizer({})([f"a man {mark} runs", "a man runs"], 32)
    start, end = 49406, 49407
    assert (tokens == start).sum(dim=1).tolist() == [1, 1] and (tokens == end).sum(dim=1).tolist() == [1, 1]
    assert tokens[0, int(mask[0].sum()) - 2] == tokens[1, int(mask[1].sum()) - 2]  # both end with "runs"
    assert int(mask[0].sum()) > int(mask[1].sum()) == 5


def test_a_word_of_a_million_letters_takes_no_hours():
    tokens, mask = Tokenizer({})(["x" * 10**6 + " y", "".join(chr(97 + 7 * n % 26) for n in range(10**5))], 77)
    assert mask.sum(dim=1).tolist() == [77, 77]
    assert max(map(len, Tokenizer({}).load().encoder)) < 40


# ---- the rest ----


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_dir._commit() == "unknown"


def test_what_is_written_is_renamed_in_one_place():
    """os.replace and Path.rename stand in narvid/files.py alone, and text is read through it."""
    paths = [path for folder in ("narvid", "data", "scripts") for path in (ROOT / folder).rglob("*.py")]
    for path in [*paths, ROOT / "main_task_retrieval.py"]:
        text = path.read_text(encoding="utf-8")
        if path != ROOT / "narvid/files.py":
            assert "os.replace(" not in text and ".rename(" not in text and "os.rename(" not in text, path
        if path.parent.name not in ("scripts",) and path.name not in ("files.py", "parsing.py"):
            for call in ("yaml.safe_load(", "yaml.load(", ".splitlines(keepends", "csv.DictReader(", "csv.reader("):
                assert call not in text, (path, call)

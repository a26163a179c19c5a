"""The kinds of files that scripts/fuzz.py mutates: a sample of each, its reader, and a plain reader to compare with."""

import contextlib
import csv
import importlib
import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from narvid import InputError, towers
from narvid.data import datasets, extraction, frames, narrations, published_narrations
from narvid.narration import batches, journals, subtitles
from narvid.report import runs
from narvid.run import settings
from narvid.search.__main__ import read_queries


class Format(NamedTuple):
    """A file `name` with the content `sample`; `read` takes its path, `right` its text without a byte order mark."""

    name: str
    sample: bytes
    read: Callable[[Path], object]
    right: Callable[[str], object]
    beside: dict[str, bytes] = {}  # other files that the reader looks at


# ------------------------------------------------------------------------------------------------------- the formats

CUE = "00:00:01.000 --> 00:00:02.000"
REQUEST_SET = {"set": "s", "frames": "f", "captioner": "c", "model": "m", "prompt": "", "without": ["seed"],
               "requests": 2, "max_new_tokens": 77, "temperature": None, "seed": 0, "one_sentence": False}
JOB = {"id": "s-1", "video": "v1", "time": 0.0, "shared": [1.0], "again": 0, "file": "requests-00001.jsonl"}


def read_subtitles(path: Path) -> bool:
    """Sentences in time order, each with a word in one line; what else they hold is tests/narration's to say."""
    said = subtitles.read_sentences(path)
    return said == sorted(said, key=lambda one: one.start) and all(
        0 <= one.start <= one.end and one.text and "\n" not in one.text for one in said)


def in_lines(*entries: object) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def plain_lines(text: str) -> list:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def prepared(script: str, *flags: str) -> Callable[[Path], dict[str, list]]:
    """A prepare script's command as a reader: what it writes from the folder of the file."""

    def read(path: Path) -> dict[str, list]:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(f"prepare_{script}").main(
                ["--annotations", str(path.parent), "--out", out, "--allow_partial", *flags])
            return {split.stem: [(pair["video"], pair["query"]) for pair in plain_lines(split.read_text("utf-8"))]
                    for split in Path(out).glob("*.jsonl")}

    return read


def published_right(text: str) -> dict[str, list[str]]:
    entries = json.loads(text)
    if isinstance(entries, list):
        return {entry["video_file"]: [entry[f"caption_{k}"] for k in range(1, 10) if f"caption_{k}" in entry]
                for entry in entries}
    entries = entries["titles"] if {"videos", "sentences", "titles"} & entries.keys() else entries
    found = {}
    for video, titles in entries.items():
        if isinstance(titles, dict):
            titles = titles["titles" if "titles" in titles else "captions"]
        found[video] = [] if titles is None else [titles] if isinstance(titles, str) else titles
    return found


def ours_right(text: str) -> dict:
    return {line["video"]: (line["captioner"], line["prompt"], [x["time"] for x in line["sentences"]],
                            [x["text"] for x in line["sentences"]], line.get("source", ""))
            for line in plain_lines(text)}


def numbers_of(values: dict, text: str) -> dict:
    """The flags of a YAML text as they were read, so that numbers must be equal; words are argparse's matter."""
    return {name: as_number(values[name]) for name, value in yaml.safe_load(text).items() if type(value) in (int, bool)}


def flags_right(text: str) -> dict:
    return {name: as_number(value) for name, value in yaml.safe_load(text).items() if type(value) in (int, bool)}


def as_number(value: object) -> float | str:
    """A folder may be called 7, or True."""
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def read_model_config(path: Path) -> dict:
    try:
        return towers.checked_model(str(path)).config
    except ValueError as error:
        if not isinstance(error, InputError) and not str(error).startswith("--clip_model"):
            raise
        raise InputError(str(error)) from error


def read_run_config(path: Path) -> dict:
    return numbers_of(runs.read_config(path.parent), path.read_text("utf-8-sig"))


def read_preset(path: Path) -> dict:
    return numbers_of(vars(settings.preset_flags(str(path))), path.read_text("utf-8-sig"))


def read_journal(path: Path) -> set:
    known = journals.read_known(path.parent.with_suffix(""), None)
    return {(video, moment) for video, answers in known.answers.items() for moment in answers}


def journal_right(text: str) -> set:
    return {(line["video"], moment) for line in plain_lines(text[:text.rfind("\n") + 1])
            for moment in map(float, [line["time"], *line["shared"]])}


def ranks_right(text: str) -> tuple:
    rows = list(csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline="")))
    return [(row["video"], row["query"]) for row in rows], [int(row["S_fusion"]) for row in rows]


def read_ranks(path: Path) -> tuple:
    pairs, ranks, _ = runs.read_ranks(path.parent, "S_fusion")
    return pairs, ranks.tolist()


SMALL_VIDEOS = {"sampling": "3 fps", "short_side": 224, "crf": 18}
METRICS = {"R@1": 50.0, "R@5": 50.0, "R@10": 100.0, "MdR": 1.0, "MnR": 1.5}
RESULT = {"split": "test", "select_on": "last", "queries": 2, "videos": 2, "final": True, "epoch": 1, "step": 4,
          "metrics": {"S_fusion": {"text_to_video": METRICS, "video_to_text": METRICS}}}
RUN_FLAGS = {"data_dir": "data/x", "max_frames": 12, "max_words": 32, "epochs": 5, "seed": 0, "freeze_towers": False,
             "method": "narvid", "filter_p": 0.4, "output_dir": "runs/x"}
TINY_CLIP = {"embed_dim": 16,
             "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 16},
             "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}}
SAID = {"captioner": "c", "prompt": "p"}
LSMDC = "{0}_A_00.01\t00.00.01\t00.00.02\t00.00.01\t00.00.02\tSomeone nods.\n{0}_A_00.02\t1\t2\t3\t4\tA \u2028 b.\n"
LISTS = {f"{split}_list.txt": f"{split}1\n".encode() for split in ("train", "val", "test")}
MSVD = {"train1": ["a cat", " a dog "], "val1": ["a cow"], "test1": ["a hen"], "extra": ["-"]}
SPLITS = ("train", "val", "test")


def msvd_right(content: dict) -> dict[str, list]:
    words = {video: [" ".join(text) if isinstance(text, list) else text for text in texts]
             for video, texts in content.items()}
    return {split: [(f"{split}1", text.strip()) for text in words[f"{split}1"]] for split in SPLITS}


def msrvtt_right(text: str) -> dict[str, list]:
    of = {video: [line["caption"].strip() for line in json.loads(text)["sentences"] if line["video_id"] == video]
          for video in ("train1", "test1")}
    return {"train": [("train1", text) for text in of["train1"]], "test": [("test1", of["test1"][0])]}


def lists_right(text: str) -> dict[str, list]:
    rows = csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline=""))
    return {"train": [("train1", "a man"), ("train1", "a dog")],
            "test": [(row["video_id"].strip(), row["sentence"].strip()) for row in rows]}


def vatex_right(text: str) -> dict[str, list]:
    of = {entry["videoID"]: entry["enCap"] for entry in json.loads(text)}
    return {split: [(f"{split}1", said.strip()) for said in of[f"{split}1"]] for split in SPLITS}


def didemo_right(text: str) -> dict[str, list]:
    captions = [entry["description"].strip() for entry in json.loads(text) if entry["video"] == "train1"]
    return {"train": [("train1", " ".join(captions))], "val": [("val1", "v")], "test": [("test1", "t")]}


def activitynet_right(text: str) -> dict[str, list]:
    return {"train": [(video, " ".join(said.strip() for said in entry["sentences"]))
                      for video, entry in json.loads(text).items()], "test": [("v_c", "t")]}


def lsmdc_right(text: str) -> dict[str, list]:
    of = {"train": text, "val": LSMDC.format(2), "test": LSMDC.format(3).split("\n")[0]}
    rows = {split: [line.removesuffix("\r").split("\t") for line in lines.split("\n") if line.strip()]
            for split, lines in of.items()}
    return {split: [(row[0].strip(), row[5].strip()) for row in lines] for split, lines in rows.items()}


SENTENCES = [{"video_id": video, "caption": text} for video, text in
             (("train1", "a man"), ("test1", "a \u2028 woman"), ("train1", "a dog"), ("test1", "it is"))]
LINES = {"video": "v1", **SAID, "sentences": [{"time": 0.0, "text": "a cat"}, {"time": 1, "text": "a \u2028 dog"}]}
JOURNAL = {"video": "v1", "time": 0.0, "shared": [1.0], "text": "a cat", **SAID}


def as_json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def read_small_videos(path: Path) -> bool:
    lines = readable(path)
    return all(entry in lines for entry in extraction.read_done(path, SMALL_VIDEOS).values())


def read_published(path: Path) -> dict[str, list[str]]:
    return published_narrations.parse_published(path, *published_narrations.read_form(path), ())


FORMATS = {
    "split": Format(
        "train.jsonl", in_lines({"video": "v1", "query": "a \u2028 cat"}, {"video": "v2", "query": "a \U0001f600"}),
        lambda path: [(video, query) for _, video, query in datasets.read_pairs(path)],
        lambda text: [(line["video"], line["query"]) for line in plain_lines(text)],
    ),
    "list": Format(
        "list.jsonl", in_lines({"video": "v1"}, {"video": "v2", "query": "x"}),
        lambda path: frames.read_list([path]),
        lambda text: {line["video"] for line in plain_lines(text)},
    ),
    "frame index": Format(
        "index.jsonl", in_lines({"video": "v1", "times": [0, 1.5]}, {"video": "v2", "times": [0.0]}),
        lambda path: frames.load_frame_index(path.parent),
        lambda text: {line["video"]: line["times"] for line in plain_lines(text)},
    ),
    "small videos": Format(
        "videos.jsonl", in_lines(*({"video": name, "frames": 3, "bytes": 4, **SMALL_VIDEOS} for name in "ab")),
        read_small_videos, lambda text: True, {"a.mp4": b"1234", "b.mp4": b"1234"},
    ),
    "SubRip": Format("v.srt", f"1\n{CUE}\n<i>a</i> cat\n\n2\n{CUE}\nno {{\\an8}}dog\n".encode(),
                     read_subtitles, lambda text: True),
    "WebVTT": Format("v.vtt", f"WEBVTT\n\nNOTE x\n\n{CUE}\na<00:00:01.5><c> cat</c>\n\n{CUE}\nb\n".encode(),
                     read_subtitles, lambda text: True),
    "ASS": Format("v.ass", b"[Events]\nFormat: Start, End, Text\nDialogue: 0:00:01.00,0:00:02.00,{\\i1}a\\Ncat\n",
                  read_subtitles, lambda text: True),
    "transcript": Format("v.json", as_json({"segments": [{"start": 0.5, "end": 1, "text": "a"}, {"start": 2, "end": 3.5,
                                            "text": "b"}]}), read_subtitles, lambda text: True),
    "request set": Format("set.json", as_json(REQUEST_SET), lambda path: batches.read_set(path.parent), json.loads),
    "requests' frames": Format(
        "jobs.jsonl", in_lines(JOB, JOB | {"id": "s-2", "shared": []}),
        lambda path: batches.read_jobs(path.parent, {"requests": 2}),
        lambda text: {line["id"]: line for line in plain_lines(text)},
    ),
    "narrations": Format(
        "n.jsonl", in_lines(LINES, LINES | {"video": "v2"}),
        lambda path: {video: tuple(fields) for video, fields in narrations.load_narrations(path).items()}, ours_right,
    ),
    "released narrations": Format(
        "n.json", as_json([{"video_file": "v1.mp4", "caption_1": "a", "caption_2": "b"}, {"video_file": "v2"}]),
        read_published, published_right,
    ),
    "titles": Format(
        "t.json", as_json({"v1": ["a cat", "a dog"], "v2": {"titles": ["x"], "gt": "y"}}),
        read_published, published_right,
    ),
    "prepared.json": Format(
        "prepared.json", as_json({"corpus": "x", "missing": ["v1", "v2"]}), datasets._missing,
        lambda text: len(json.loads(text).get("missing", [])),
    ),
    "journal": Format(
        "1-of-1.jsonl", in_lines(JOURNAL, JOURNAL | {"time": 2.0, "shared": []}), read_journal, journal_right,
    ),
    "queries": Format(
        "q.txt", "a cat\n\na \u2028 dog\r\n\U0001f600\n".encode(), lambda path: read_queries(str(path)),
        lambda text: [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()],
    ),
    "preset": Format(
        "p.yaml", b"# a preset\nepochs: 5\nlr: 1e-4\nfilter_p: 0.4\nfreeze_towers: true\nmax_frames: 12\n",
        read_preset, flags_right,
    ),
    "config.yaml": Format("config.yaml", yaml.safe_dump(RUN_FLAGS).encode(), read_run_config, flags_right),
    "results.jsonl": Format(
        "results.jsonl", in_lines(RESULT, RESULT), lambda path: runs.read_results(path.parent), plain_lines,
    ),
    "ranks.csv": Format(
        "ranks.csv", b'video,query,S_qv,S_fusion\nv1,"a, cat",1,2\nv2,a dog,2,1\n', read_ranks, ranks_right,
    ),
    "model config": Format("clip.json", as_json(TINY_CLIP), read_model_config, json.loads),
    "MSR-VTT's sentences": Format(
        "MSRVTT_data.json", as_json({"videos": [], "sentences": SENTENCES}), prepared("msrvtt", "--protocol", "1kB"),
        msrvtt_right, {"train_list_miech.txt": b"train1\n", "test_list_miech.txt": b"test1\n"},
    ),
    "MSR-VTT's list": Format(
        "MSRVTT_JSFUSION_test.csv", b'key,vid_key,video_id,sentence\nr,m,test1,"a, woman"\n',
        prepared("msrvtt", "--protocol", "9k"), lists_right,
        {"MSRVTT_data.json": as_json({"sentences": SENTENCES}), "MSRVTT_train.9k.csv": b"video_id\ntrain1\n"},
    ),
    "MSVD's captions": Format(
        "captions_msvd.json", as_json(MSVD), prepared("msvd"), lambda text: msvd_right(json.loads(text)), LISTS,
    ),
    "MSVD's pickle": Format(
        "raw-captions.pkl",
        pickle.dumps({video: [text.split() for text in texts] for video, texts in MSVD.items()}, protocol=2),
        prepared("msvd"), lambda content: msvd_right(pickle.loads(content, encoding="utf-8")), LISTS,
    ),
    "VATEX's captions": Format(
        "vatex_training_v1.0.json",
        as_json([{"videoID": f"{split}1", "enCap": [f"{split}1 one", " two "], "chCap": ["\u5b57"]}
                 for split in SPLITS]),
        prepared("vatex", "--protocol", "hgr"), vatex_right, {**LISTS, "vatex_validation_v1.0.json": b"[]"},
    ),
    "DiDeMo's descriptions": Format(
        "train_data.json", as_json([{"video": "train1", "description": "one"}, {"video": "x", "description": "-"},
                                    {"video": "train1", "description": " two"}]), prepared("didemo"), didemo_right,
        {**LISTS, "val_data.json": as_json([{"video": "val1", "description": "v"}]),
         "test_data.json": as_json([{"video": "test1", "description": "t"}])},
    ),
    "ActivityNet's paragraphs": Format(
        "train.json", as_json({"v_a": {"sentences": ["One. ", " Two."]}, "v_b": {"sentences": ["x"]}}),
        prepared("activitynet"), activitynet_right, {"val_1.json": as_json({"v_c": {"sentences": ["t"]}})},
    ),
    "LSMDC's lines": Format(
        "LSMDC16_annos_training.csv", LSMDC.format(1).encode(), prepared("lsmdc"), lsmdc_right,
        {"LSMDC16_annos_val.csv": LSMDC.format(2).encode(),
         "LSMDC16_challenge_1000_publictect.csv": LSMDC.format(3).split("\n")[0].encode()},
    ),
}


def readable(path: Path) -> list:
    """The values of the lines of a file that are JSON."""
    found = []
    for line in path.read_bytes().decode("utf-8-sig", "replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found

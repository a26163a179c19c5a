"""narvid.mteb: what mteb's SearchProtocol is given, with stand-ins for its data sets; with mteb itself where it is."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from narvid import InputError
from narvid.metrics import retrieval_metrics
from scripts import make_demo_corpus, mteb_demo


class Rows:
    """A `datasets.Dataset` as far as it is used."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, [*columns]

    def __getitem__(self, at):
        return self.columns[at] if isinstance(at, str) else {name: x[at] for name, x in self.columns.items()}

    def select_columns(self, names):
        return Rows(**{name: self.columns[name] for name in names})

    def cast_column(self, name, feature):
        assert name == "video" and feature == {"decode": False}
        return self


@pytest.fixture(scope="module")
def home(tmp_path_factory, weights):
    """Five of the demo's videos, their narration, a query each, and the tiny model as a run."""
    home = tmp_path_factory.mktemp("mteb")
    make_demo_corpus.main(["videos", "--out", str(home), "--train", "0", "--test", "5", "--workers", "1"])
    entries = [{"video": f"video{v}", "captioner": "", "prompt": "",
                "sentences": [{"time": float(t), "text": f"a red cross {'grows ' * (v + 1)}"} for t in range(8)]}
               for v in range(5)]
    (home / "narrations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    pairs = [{"video": f"video{v}", "query": f"a blue square {'shrinks ' * v}"} for v in range(5)]
    (home / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stored = torch.load(weights, weights_only=True)
    stored["args"] |= {"max_frames": 6, "max_words": 24}
    (home / "run").mkdir()
    torch.save(stored, home / "run" / "best.pt")
    return home


@pytest.fixture
def model(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Video=lambda **options: options))
    from narvid.mteb import SearchModel

    return SearchModel.load(home / "run", narrations=home / "narrations.jsonl", device="cpu")


def sides(home):
    """Texts; videos as mteb has them, by their path or as bytes."""
    names = [f"video{v}" for v in range(5)]
    queries = [json.loads(line)["query"] for line in (home / "test.jsonl").read_text().splitlines()]
    files = [{"path": str(home / "videos" / f"{name}.mp4"), "bytes": None} for name in names]
    files[1] = {"path": "elsewhere/video1.mp4", "bytes": (home / "videos" / "video1.mp4").read_bytes()}
    return Rows(id=names, text=queries), Rows(id=names, video=files, audio=[None] * 5)


def test_scores_are_the_retrievers_in_both_directions(model, home):
    texts, videos = sides(home)
    paths = [home / "videos" / f"video{v}.mp4" for v in range(5)]
    encoded = model.retriever.encode_videos(paths, home / "narrations.jsonl")
    wanted = model.retriever.score(model.retriever.encode_queries(texts["text"]), encoded)["fused"]
    for queries, corpus, scores in ((texts, videos, wanted), (videos, texts, wanted.T)):
        model.index(corpus, task_metadata=None, hf_split="test", hf_subset="default", encode_kwargs={}, num_proc=None)
        found = model.search(queries, top_k=5, task_metadata=None, hf_split="test", hf_subset="default",
                             encode_kwargs={}, num_proc=None)
        got = [[found[f"video{q}"][f"video{c}"] for c in range(5)] for q in range(5)]
        torch.testing.assert_close(torch.tensor(got), scores, rtol=0, atol=1e-5)
        few = model.search(queries, top_k=2)
        assert all([*few[q]] == sorted(found[q], key=found[q].get, reverse=True)[:2] for q in few)
        of_some = model.search(queries, top_k=5, top_ranked={"video0": ["video3", "video1"]})
        assert set(of_some["video0"]) == {"video1", "video3"} and of_some["video2"] == {}


def test_without_a_narration_the_frames_alone_tell_videos_apart(model, home):
    from narvid.mteb import SearchModel

    texts, videos = sides(home)
    bare = SearchModel(model.retriever)
    bare.index(videos)
    queries = model.retriever.encode_queries(texts["text"])
    s = model.retriever.score(queries, model.retriever.encode_videos([home / "videos" / f"video{v}.mp4"
                                                                      for v in range(5)]))
    assert s["narration"].std() == 0
    got = bare.search(texts, top_k=1)
    assert [[*best][0] for best in got.values()] == [f"video{v}" for v in s["video"].argmax(dim=1).tolist()]


def test_what_cannot_be_measured_is_one_sentence(model, home):
    texts, videos = sides(home)
    with pytest.raises(InputError, match="call `index`"):
        model.search(texts, top_k=1)
    model.index(videos)
    with pytest.raises(InputError, match="both are videos"):
        model.search(videos, top_k=1)
    with pytest.raises(InputError, match="the corpus: columns id, video, text; .* either"):
        model.index(Rows(id=["a"], video=[None], text=["b"]))
    with pytest.raises(InputError, match="video a: its file none.mp4 is not there"):
        model.index(Rows(id=["a"], video=[{"path": "none.mp4", "bytes": None}]))


def test_the_script_says_what_is_missing(monkeypatch, home):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match="mteb is not installed"):
        mteb_demo.main(["--run", str(home / "run"), "--data_dir", str(home)])


def test_our_side_of_the_comparison_is_evaluations(model, home):
    pairs = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    got = mteb_demo.ours(model.retriever, pairs, home / "videos", home / "narrations.jsonl")
    texts, videos = sides(home)
    model.index(videos)
    found = model.search(texts, top_k=5)
    matrix = np.array([[found[f"video{q}"][f"video{v}"] for v in range(5)] for q in range(5)])
    assert got == retrieval_metrics(matrix, np.arange(5), ndcg=True)


def test_mteb_itself_gives_our_numbers(home, capsys):
    pytest.importorskip("mteb", reason="mteb is not installed: pip install -e '.[mteb]'")
    mteb_demo.main(["--run", str(home / "run"), "--data_dir", str(home)])
    assert "largest difference 0.00" in capsys.readouterr().out

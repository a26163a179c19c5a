"""Guards over every method of the trainer: no score sees which pair is right, ties count against, NaN is refused.

Random features must be found by chance only, with more queries than videos, so that a score that treats pair (i, i)
differently shows. A method added to METHODS is looked at here; where it scores in several forms, name them in FLAGS.

Legend: B queries, V videos, K frames of a video and sentences of its narration, L words, D joint dimension; masks are
bool, True = real.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import main_task_retrieval as trainer
from narvid import InputError, evaluation
from narvid.data.datasets import Split
from narvid.towers.tokenizer import Tokenizer
from narvid.distributed import World
from narvid.evaluation import table_of_matrices, with_dsl
from narvid.metrics import retrieval_metrics
from narvid.methods import METHODS

B, V, K, SEEDS = 40, 20, 4, 12
TRUTH = np.arange(B) // 2  # (B,), the video of each query
WORLD = World(0, 1, torch.device("cpu"))
FLAGS = {
    "narvid": [["--fidelity", "reported"], ["--fidelity", "paper", "--filter", "topk"], ["--modules", "NM"],
               ["--modules"]],
    "clip4clip": [["--head", head] for head in ("meanP", "seqLSTM", "seqTransf", "tightTransf")],
    "cap4video": [["--stage", "video"], ["--stage", "titles"]],
    "zeroshot": [["--use_narration"], ["--no-use_narration"]],
}
FORMS = [(method, *flags) for method in METHODS for flags in FLAGS.get(method, [[]])]


@pytest.fixture(scope="module", params=FORMS, ids=" ".join)
def subject(request, corpus):
    """A tiny random model of one form, what evaluation asks of it, and its features of B queries and V videos."""
    method, *flags = request.param
    args = trainer.parse_args(["--method", method, "--data_dir", str(corpus), "--clip_model", str(corpus / "clip.json"),
                               "--output_dir", "unused", "--max_words", "24", "--precision", "fp32", "--dsl_scale",
                               "100", "--eval_batch_size", "7", *flags])
    torch.manual_seed(0)
    model = trainer.build_model(args).eval()
    mask = torch.arange(K) < 1 + torch.arange(V)[:, None] % K  # (V, K)
    frames = torch.randint(256, (V, K, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)
    sentences, _ = Tokenizer({})([f"sentence number {n}" for n in range(9)], 24)
    texts = [f"{'very ' * (n % 5)}random query number {n}" for n in range(B)]
    with torch.no_grad():
        queries = model.encode_queries(*Tokenizer({})(texts, 24))
        videos = model.encode_videos(frames, mask, sentences, torch.randint(9, (V, K)), mask)
    return SimpleNamespace(args=args, model=model, texts=texts, queries=queries, videos=videos, score=model.score,
                           combine=partial(model.combine, weight=args.fusion_weight))


def at_random(features, seed):
    """Features of the same shapes, masks as they are: unit vectors, and weights that sum to 1."""
    rng = torch.Generator().manual_seed(seed)

    def draw(name, x):
        if x is None or x.dtype == torch.bool:
            return x
        noise = torch.randn(x.shape, generator=rng)
        if name.endswith("weights"):
            mask = features.word_mask if name.startswith("word") else features.mask
            return noise.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return F.normalize(noise, dim=-1)

    return type(features)(*map(draw, features._fields, features))


def pick(features, rows):
    return type(features)(*(x if x is None else x[rows] for x in features))


@torch.no_grad()
def test_random_features_are_found_by_chance_only(subject):
    tables = []
    for seed in range(SEEDS):
        scores = subject.score(at_random(subject.queries, seed), at_random(subject.videos, 100 + seed), block=16)
        assert all(s.shape == (B, V) for s in scores.values())
        tables.append(table_of_matrices(scores, TRUTH, subject.combine))
    for name in tables[0]:
        for direction, draws in (("text_to_video", SEEDS * B), ("video_to_text", SEEDS * V)):
            mean = {k: np.mean([table[name][direction][k] for table in tables]) for k in ("R@1", "R@5", "MnR")}
            for k, p in ((1, 1 / V), (5, 5 / V)):  # five standard deviations
                assert abs(mean[f"R@{k}"] / 100 - p) < 5 * (p * (1 - p) / draws) ** 0.5, (name, direction)
            assert abs(mean["MnR"] - (V + 1) / 2) < 5 * ((V * V - 1) / 12 / draws) ** 0.5, (name, direction)


@torch.no_grad()
def test_a_pairs_score_does_not_depend_on_where_it_stands(subject):
    queries, videos = at_random(subject.queries, 1), at_random(subject.videos, 2)
    rows, columns = torch.randperm(B, generator=torch.Generator().manual_seed(3))[:31], torch.arange(V).flip(0)
    moved = subject.score(pick(queries, rows), pick(videos, columns), block=5)
    for view, s in subject.score(queries, videos).items():
        torch.testing.assert_close(moved[view], s[rows][:, columns], rtol=1e-4, atol=1e-5)


class Written(dict):
    """What evaluation writes, instead of a run directory."""

    def save_csv(self, name, columns):
        self[name] = columns

    def save_arrays(self, name, arrays):
        self[name] = arrays


@pytest.fixture
def evaluate(subject, monkeypatch):
    """The trainer's evaluation with given features of the videos: (video_of_query) -> (result, what it wrote)."""
    monkeypatch.setattr(evaluation, "encode_videos", lambda *_: at_random(subject.videos, 4))
    subject.args.save_similarity = True

    def evaluated(truth):
        split = Split(subject.texts, truth, [f"video{v}" for v in range(V)], None, None, None, [], 0)
        written = Written()
        result = trainer.evaluate(subject.model, {"test": split}, "test", subject.args, WORLD, written,
                                  final=True)
        subject.model.eval()
        return result, written

    return evaluated


def test_the_evaluation_scores_without_the_ground_truth(subject, evaluate):
    """Another ground truth: the same matrices to the bit, and the metrics that follow from it."""
    other = np.random.RandomState(5).randint(0, V, B)
    (one, written), (two, again) = evaluate(TRUTH), evaluate(other)
    for name, s in written["similarity.npz"].items():
        if name.startswith("S_"):
            assert (s == again["similarity.npz"][name]).all() and s.std() > 0, name
    views = {view: torch.from_numpy(written["similarity.npz"][{"video": "S_qv", "narration": "S_qn"}.get(
        view, f"S_{view}")]) for view in subject.score(subject.queries, subject.videos)}
    matrices = dict(subject.combine(views))
    assert list(matrices) == list(one["metrics"])
    for name, s in matrices.items():
        assert one["metrics"][name] == retrieval_metrics(s.numpy(), TRUTH), name
        assert two["metrics"][name] == retrieval_metrics(s.numpy(), other), name
    assert one["metrics"] != two["metrics"] and one["dsl"] != two["dsl"]


def test_features_that_are_not_finite_are_refused(subject, evaluate, monkeypatch):
    broken = [x.clone() if x is not None and x.is_floating_point() else x for x in at_random(subject.videos, 4)]
    broken[0][3] = float("nan")
    monkeypatch.setattr(evaluation, "encode_videos", lambda *_: type(subject.videos)(*broken))
    with pytest.raises(InputError, match="not finite"):
        evaluate(TRUTH)


@torch.no_grad()
def test_ties_count_against_and_nan_is_refused(subject):
    views = subject.score(subject.queries, subject.videos)
    constant = {view: torch.full((B, V), 0.25) for view in views}
    tables = [table_of_matrices(constant, TRUTH, subject.combine), with_dsl(constant, TRUTH, subject.combine, 100.0)]
    for of in (of for table in tables for of in table.values()):
        assert of["text_to_video"] == of["video_to_text"] == {"R@1": 0, "R@5": 0, "R@10": 0, "MdR": V, "MnR": V}
    for view in views:
        scores = {name: s.clone() for name, s in views.items()}
        scores[view][B - 1, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            table_of_matrices(scores, TRUTH, subject.combine)

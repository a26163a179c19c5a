"""narvid.similarity against reference.py: query-aware filter (Sec. 3.4) and the two-grained match (Sec. 3.5, App. A).

B queries, V videos, K frames and sentences, L words, D joint dimension; masks True = real. Features are random, so that
about half of all cosines are negative: there the two fidelities of the fine score differ.
"""

import numpy as np
import pytest
import reference
import torch
from torch.utils.flop_counter import FlopCounterMode

from narvid import similarity
from narvid.metrics import retrieval_metrics
from narvid.model import Heads, NarVidConfig, Queries, Videos
from narvid.similarity import _heaviest, filter_weights, kept, match
from scripts import bench_eval

FIDELITIES = ["paper", "reported"]
FILTERS = [
    {"method": "nucleus", "p": 0.4},
    {"method": "nucleus", "p": 0.8},
    {"method": "topk", "k": 2},
    {"method": "none"},
    {"method": "uniform"},
]
LOOSE, TIGHT = 1e-5, 1e-9
TOLERANCE = {torch.float32: LOOSE, torch.float64: TIGHT}


def make(seed, B=3, V=4, K=5, L=6, D=8, dtype=torch.float64, narration=True):
    """Random queries and videos: every query has 1..L words, every video 1..K frames, gaps in the narrations."""
    rng = np.random.default_rng(seed)
    word_mask = np.arange(L) < rng.integers(1, L + 1, B)[:, None]  # (B, L)
    logits = np.where(word_mask, rng.normal(size=(B, L)), -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mask = np.arange(K) < rng.integers(1, K + 1, V)[:, None]  # (V, K)
    narration_mask = mask & (rng.random((V, K)) < 0.8)
    narration_mask[:, 0] = True

    def tensor(*shape):
        return torch.tensor(rng.normal(size=shape) * rng.uniform(0.5, 3), dtype=dtype)

    queries = Queries(tensor(B, D), tensor(B, L, D), torch.tensor(word_mask), torch.tensor(weights, dtype=dtype))
    if not narration:
        return queries, Videos(tensor(V, K, D), None, torch.tensor(mask), None)
    masks = torch.tensor(mask), torch.tensor(narration_mask)
    return queries, Videos(tensor(V, K, D), tensor(V, K, D), *masks)


def expected(queries, videos, **options):
    """What reference.py says of the same features, in float64."""
    asked = [x.double().numpy() if x.is_floating_point() else x.numpy() for x in queries]
    result = {"video": reference.score_matrix(*asked, videos.frames.double().numpy(), videos.mask.numpy(), **options)}
    if videos.narration is not None:
        view = videos.narration.double().numpy(), videos.narration_mask.numpy()
        result["narration"] = reference.score_matrix(*asked, *view, **options)
    return result


def assert_equal(got, want, tolerance):
    assert set(got) == set(want)
    for view in want:
        right = torch.as_tensor(want[view], dtype=torch.float64)
        torch.testing.assert_close(got[view].double(), right, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- the filter


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_filter_weights(seed, filtering, fidelity):
    rng = np.random.default_rng(seed)
    B, V, K = rng.integers(1, 7, 3)
    cosine = torch.tensor(rng.uniform(-1, 1, (B, V, K)) * rng.choice([0.05, 0.3, 1]))
    mask = torch.tensor(rng.random((V, K)) < 0.7)
    mask[0] = False  # a video with no real frame
    for temperature in (0.1, 0.03):
        options = {**filtering, "temperature": temperature, "fidelity": fidelity}
        right = [
            [reference.filter_weights(cosine[b, v].numpy(), mask[v].numpy(), **options) for v in range(V)]
            for b in range(B)
        ]
        got = filter_weights(cosine, mask, **options)
        assert got.shape == (B, V, K)
        torch.testing.assert_close(got.double(), torch.tensor(np.array(right)), rtol=TIGHT, atol=TIGHT)


# Softmax weights 0.5, 0.3, 0.2 whatever the order of the frames; the border is walked over by hand.
BORDER = [  # p, what the paper keeps, what the reported code keeps (ranks)
    (0.3, [0], [0]),
    (0.49, [0], [0]),
    (0.51, [0, 1], [0]),
    (0.79, [0, 1], [0]),
    (0.81, [0, 1, 2], [0, 1]),
    (0.99, [0, 1, 2], [0, 1]),
]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("p, paper, reported", BORDER)
def test_nucleus_border_by_hand(p, paper, reported, order):
    mass = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    cosine = 0.1 * mass.log()[list(order)]  # exp(cosine / 0.1) is the mass again
    mask = torch.ones(1, 3, dtype=torch.bool)
    for fidelity, ranks in (("paper", paper), ("reported", reported)):
        right = torch.zeros(3, dtype=torch.float64)
        for slot, place in enumerate(order):
            right[slot] = mass[place] / mass[ranks].sum() if place in ranks else 0
        got = filter_weights(cosine[None, None], mask, p=p, fidelity=fidelity)[0, 0]
        torch.testing.assert_close(got, right, rtol=TIGHT, atol=TIGHT)


def test_nucleus_border_exactly_on_p():
    """Two weights of exactly 1/2: at p = 0.5 the first does not exceed p, so the paper still adds the second."""
    cosine, mask = torch.zeros(1, 1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    for p, fidelity, count in ((0.5, "paper", 2), (0.5, "reported", 1), (0.49, "paper", 1)):
        assert filter_weights(cosine, mask, p=p, fidelity=fidelity).count_nonzero() == count
        assert np.count_nonzero(reference.filter_weights(cosine[0, 0], mask[0], p=p, fidelity=fidelity)) == count


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nucleus_of_p_one_keeps_every_frame(fidelity, dtype):
    rng = np.random.default_rng(0)
    cosine = torch.tensor(rng.uniform(-1, 1, (40, 30, 12)), dtype=dtype)
    mask = torch.ones(30, 12, dtype=torch.bool)
    got = filter_weights(cosine, mask, p=1.0, fidelity=fidelity)
    torch.testing.assert_close(got, filter_weights(cosine, mask, method="none"), rtol=LOOSE, atol=LOOSE)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS, ids=str)
def test_weights_sum_to_one_over_real_frames(filtering, fidelity):
    rng = np.random.default_rng(1)
    cosine = torch.tensor(rng.uniform(-1, 1, (5, 6, 9)), dtype=torch.float32)
    mask = torch.tensor(np.arange(9) < rng.integers(1, 10, 6)[:, None])
    weights = filter_weights(cosine, mask, fidelity=fidelity, **filtering)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 6), rtol=LOOSE, atol=LOOSE)
    assert (weights >= 0).all()
    assert (weights.masked_select(~mask) == 0).all()


def test_top_k_keeps_k_or_what_there_is():
    cosine = torch.linspace(-1, 1, 5, dtype=torch.float64).expand(2, 2, 5)
    mask = torch.tensor([[True] * 5, [True, False, False, True, False]])
    looked_at = filter_weights(cosine, mask, method="topk", k=3) > 0
    assert looked_at[0].tolist() == [[False, False, True, True, True], [True, False, False, True, False]]
    assert (filter_weights(cosine, mask, method="topk", k=99) > 0).sum() == 2 * (5 + 2)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", [{"p": p} for p in (0.05, 0.3, 0.4, 0.6, 0.95)] + FILTERS[2:3], ids=str)
def test_of_equal_frames_the_earlier_stay(filtering, fidelity):
    """Still shots: frames share a few cosines, and the border of the filter runs between equal ones."""
    rng = np.random.default_rng(2)
    cosine = torch.tensor(rng.choice([0.1, 0.15, 0.3], (6, 8, 12)))
    mask = torch.tensor(rng.random((8, 12)) < 0.8)
    got = filter_weights(cosine, mask, fidelity=fidelity, **filtering)
    for b, v in np.ndindex(6, 8):
        right = reference.filter_weights(cosine[b, v].numpy(), mask[v].numpy(), fidelity=fidelity, **filtering)
        np.testing.assert_allclose(got[b, v].numpy(), right, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 12, 33, 64])
def test_the_heaviest_are_those_of_a_sort(frames):
    weights = torch.rand(3, frames, 50, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)
    weights[:, frames // 2] = weights[:, 0]
    right = weights.sort(dim=1, descending=True).values
    for count in {1, min(2, frames), (2 * frames + 4) // 5, frames}:
        assert torch.equal(torch.stack(_heaviest(weights, count), dim=1), right[:, :count])


@pytest.mark.parametrize("wrong", [{"method": "median"}, {"method": "topk"}, {"fidelity": "exact"}], ids=str)
def test_unknown_choices_are_refused(wrong):
    with pytest.raises(ValueError):
        filter_weights(torch.zeros(1, 1, 3), torch.ones(1, 3, dtype=torch.bool), **wrong)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS, ids=str)
@pytest.mark.parametrize("narration", [True, False])
def test_kept_are_the_weights_of_each_query(narration, filtering, fidelity):
    """What is shown of the filter is what `match` computes with: 0 where a frame or a sentence is dropped or padded."""
    queries, videos = make(16, B=5, V=6, dtype=torch.float32, narration=narration)
    got = kept(queries, videos, temperature=0.05, fidelity=fidelity, **filtering)
    views = {"video": (videos.frames, videos.mask)}
    if narration:
        views["narration"] = (videos.narration, videos.narration_mask)
    assert got.keys() == views.keys()
    options = {"temperature": 0.05, "fidelity": fidelity, **filtering}
    for view, (features, mask) in views.items():
        right = [[reference.filter_weights([reference.cosine(eos, frame) for frame in features[v].double().numpy()],
                                           mask[v].numpy(), **options) for v in range(6)]
                 for eos in queries.eos.double().numpy()]
        assert got[view].shape == (5, 6, 5)
        np.testing.assert_allclose(got[view].numpy(), np.array(right), rtol=TIGHT, atol=TIGHT)
        assert (got[view].transpose(1, 2)[:, ~mask.T] == 0).all()


# -------------------------------------------------------------------------------------------------------- the match


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_match(seed, dtype, filtering, fidelity):
    B, V, K, L = np.random.default_rng(seed).integers(1, 7, 4)
    queries, videos = make(seed, B, V, K, L, dtype=dtype)
    want = expected(queries, videos, fidelity=fidelity, **filtering)
    assert_equal(match(queries, videos, fidelity=fidelity, **filtering), want, TOLERANCE[dtype])


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("seed", range(4))
def test_match_of_positive_and_of_negative_cosines(seed, fidelity):
    """All cosines positive, then all negative: only there does the zero of `reported` decide every maximum."""
    queries, videos = make(seed, D=16)
    same_side = [x.abs() for x in (queries.words, queries.eos, videos.frames, videos.narration)]
    queries = queries._replace(words=same_side[0], eos=same_side[1])
    for sign in (1, -1):
        turned = videos._replace(frames=sign * same_side[2], narration=sign * same_side[3])
        got = match(queries, turned, fidelity=fidelity)
        assert_equal(got, expected(queries, turned, fidelity=fidelity), TIGHT)


@pytest.mark.parametrize("filtering", FILTERS, ids=str)
def test_match_coarse_only(filtering):
    queries, videos = make(11)
    coarse = match(queries._replace(word_weights=None), videos, fine=False, **filtering)
    assert_equal(coarse, expected(queries, videos, fine_grained=False, **filtering), TIGHT)


def test_uniform_coarse_is_the_cosine_with_the_mean_frame():
    """Table 3, first row: CLIP4Clip's parameter-free head."""
    queries, videos = make(12, narration=False)
    got = match(queries, videos, method="uniform", fine=False)["video"]
    for v in range(len(videos.frames)):
        frames = torch.nn.functional.normalize(videos.frames[v][videos.mask[v]], dim=-1)
        right = torch.cosine_similarity(queries.eos, frames.mean(0, keepdim=True))
        torch.testing.assert_close(got[:, v], right, rtol=TIGHT, atol=TIGHT)


def test_without_narration_there_is_one_view():
    queries, videos = make(2, narration=False)
    assert_equal(match(queries, videos), expected(queries, videos), TIGHT)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS, ids=str)
def test_padding_changes_nothing(filtering, fidelity):
    """Two more padded frames, sentences and words, full of large numbers."""
    queries, videos = make(3)
    generator = torch.Generator().manual_seed(0)

    def pad(x):
        if x.dtype == torch.bool:
            return torch.cat([x, torch.zeros(len(x), 2, dtype=torch.bool)], 1)
        if x.dim() == 2:
            return torch.cat([x, torch.zeros(len(x), 2, dtype=x.dtype)], 1)
        return torch.cat([x, 50 * torch.randn(len(x), 2, x.shape[2], generator=generator, dtype=x.dtype)], 1)

    padded = Queries(queries.eos, *map(pad, queries[1:])), Videos(*map(pad, videos))
    got = match(*padded, fidelity=fidelity, **filtering)
    assert_equal(got, match(queries, videos, fidelity=fidelity, **filtering), TIGHT)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_content_of_padding_changes_nothing(fidelity):
    queries, videos = make(4)
    hidden = [~m[..., None] for m in (queries.word_mask, videos.mask, videos.narration_mask)]
    other = (
        queries._replace(words=queries.words.masked_fill(hidden[0], 77)),
        videos._replace(
            frames=videos.frames.masked_fill(hidden[1], -77), narration=videos.narration.masked_fill(hidden[2], 77)
        ),
    )
    assert_equal(match(*other, fidelity=fidelity), match(queries, videos, fidelity=fidelity), TIGHT)


def test_permutations():
    """Permuted videos permute columns, permuted queries permute rows, permuted frames change nothing."""
    queries, videos = make(5, B=4, V=6)
    rows, columns, slots = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (4, 6, 5))
    moved = match(Queries(*(x[rows] for x in queries)), Videos(*(x[columns][:, slots] for x in videos)))
    right = {view: s[rows][:, columns] for view, s in match(queries, videos).items()}
    assert_equal(moved, right, TIGHT)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_size_changes_nothing(dtype, fidelity):
    queries, videos = make(6, B=9, V=11, K=7, L=5, D=32, dtype=dtype)
    whole = match(queries, videos, fidelity=fidelity)
    for block in (1, 3, 7, 100):
        assert_equal(match(queries, videos, fidelity=fidelity, block=block), whole, 1e-6)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_tiles_that_match_chooses(monkeypatch, fidelity):
    """Many tiles, as of large inputs: longer queries than videos, with remainders on both sides; gradients too."""
    queries, videos = make(6, B=9, V=11, K=7, L=5, D=32)
    whole = gradients_of(queries, videos, fidelity)
    monkeypatch.setattr(similarity, "_tile_sides", lambda lengths, videos: (4, 3))
    assert_equal(match(queries, videos, fidelity=fidelity), expected(queries, videos, fidelity=fidelity), TIGHT)
    torch.testing.assert_close(gradients_of(queries, videos, fidelity), whole, rtol=TIGHT, atol=TIGHT)


def gradients_of(queries, videos, fidelity):
    """With respect to everything that the towers and the heads give."""
    leaves = [x.clone().requires_grad_() for x in (queries.eos, queries.words, queries.word_weights, videos.frames,
                                                   videos.narration)]
    asked = Queries(*leaves[:2], queries.word_mask, leaves[2] * queries.word_mask)  # a padded word has no weight
    scores = match(asked, videos._replace(frames=leaves[3], narration=leaves[4]), fidelity=fidelity)
    return torch.autograd.grad(sum(s.square().sum() for s in scores.values()), leaves)


@pytest.mark.parametrize("words, frames", [(32, 12), (64, 64), (1, 1)])
def test_tiles_fit_a_cache(words, frames):
    """8 MB of fp32 similarities at most, whatever the lengths; few queries take more videos at a time."""
    videos = Videos(torch.zeros(9, frames, 1), None, torch.ones(9, frames, dtype=torch.bool), None)
    for queries in (1, 100, 10_000):
        high, wide = similarity._tile_sides([words] * queries, videos)
        assert high >= 1 and wide >= 1 and high * wide * words * frames <= 2 ** 21
    assert similarity._tile_sides([], videos)[0] == 1
    assert similarity._tile_sides([words], videos)[1] > similarity._tile_sides([words] * 100, videos)[1]


def test_match_costs_what_the_real_words_cost():
    """Multiplications with words padded to 64, 6 to 16 of them real: what is not there costs nothing."""
    args = bench_eval.parse_args(["--queries", "300", "--videos", "200", "--dim", "64"])
    videos = bench_eval.make_videos(args)
    queries = bench_eval.make_queries(videos, 0, 300)

    def cost(queries, block):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            match(queries, videos, block=block)
        return counter.get_total_flops()

    chosen = cost(bench_eval.padded(queries), None)
    assert chosen == cost(queries, None)
    assert chosen <= cost(queries, 128) < 0.9 * cost(queries, 300)  # like lengths together


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("block", [None, 2])
def test_real_words_may_stand_anywhere(block, fidelity):
    queries, videos = make(13, B=4, V=3, L=5)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    weights = (mask / mask.sum(dim=1, keepdim=True)).double()
    queries = queries._replace(word_mask=mask, word_weights=weights)
    got = match(queries, videos, fidelity=fidelity, block=block)
    assert_equal(got, expected(queries, videos, fidelity=fidelity), TIGHT)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_scores_with_and_without_gradient_are_the_same(fidelity):
    """Without gradient the similarities are masked in place."""
    queries, videos = make(14, B=5, V=6)
    with_gradient = match(queries, videos._replace(frames=videos.frames.clone().requires_grad_()), fidelity=fidelity)
    assert torch.equal(match(queries, videos, fidelity=fidelity)["video"], with_gradient["video"].detach())


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_autocast_reaches_the_fine_products_alone(fidelity):
    queries, videos = make(15, B=20, V=30, K=6, L=5, D=64, dtype=torch.float32)
    exact, coarse = (match(queries, videos, fidelity=fidelity, fine=fine) for fine in (True, False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, half_coarse = (match(queries, videos, fidelity=fidelity, fine=fine, block=16) for fine in (True, False))
    for view in exact:
        assert half[view].dtype == torch.float32
        assert 0 < (half[view] - exact[view]).abs().max() < 0.01  # a dropped frame would cost more
    assert_equal(half_coarse, coarse, 1e-6)


def test_the_fields_way_gives_the_same_scores():
    """scripts/bench_eval.py measures ours against blocks that enhance again, pool in a loop and pad the words to 64."""
    args = bench_eval.parse_args(["--queries", "40", "--videos", "30", "--dim", "64"])
    raw = bench_eval.make_videos(args)
    queries = bench_eval.make_queries(raw, 0, 40)
    heads = Heads(NarVidConfig(dim=64)).eval()
    with torch.no_grad():
        blocks = bench_eval.field_block(heads, bench_eval.padded(queries), raw)
        assert_equal(match(queries, heads.enhance(*raw), block=16), blocks, LOOSE)


def test_the_bench_prints_what_it_compares(capsys, monkeypatch):
    monkeypatch.setattr(bench_eval, "UNIT", 64)
    bench_eval.main(["--queries", "70", "--videos", "65", "--dim", "64", "--sample", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "scaled to 70 x 65" in printed and "70 x 16" in printed
    assert "\nours, block 128 " in printed and "\nours  " in printed
    assert "0 of 8192 pairs differ by more than 1e-05" in printed


def on_the_border(count, seed):
    """Queries and videos whose five frames have the same cosine with eos up to float32 rounding, so that p = 0.4 is
    met at the border within rounding: a filter that depends on the layout of its sums chooses differently."""
    rng = np.random.default_rng(seed)
    D = 128
    frames = np.zeros((count, 5, D))
    eos = np.zeros((count, D))
    axis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    for i in range(count):
        eos[i] = axis[0] * rng.uniform(1, 5)
        turn = np.linalg.qr(rng.normal(size=(D - 1, D - 1)))[0]
        frames[i] = (0.4 * axis[:1] + turn[:5] @ axis[1:]) * rng.uniform(1, 5, (5, 1))
    words = rng.normal(size=(count, 3, D))
    full = torch.ones(count, 3, dtype=torch.bool), torch.full((count, 3), 1 / 3)
    queries = Queries(torch.tensor(eos).float(), torch.tensor(words).float(), *full)
    return queries, Videos(torch.tensor(frames).float(), None, torch.ones(count, 5, dtype=torch.bool), None)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_choice_at_the_border_does_not_depend_on_the_block_nor_on_the_company(fidelity):
    queries, videos = on_the_border(21, seed=0)
    whole = match(queries, videos, fidelity=fidelity)
    for block in (1, 2, 3, 7):
        assert_equal(match(queries, videos, fidelity=fidelity, block=block), whole, 1e-6)
    for i in range(0, 21, 4):
        alone = match(Queries(*(x[i : i + 1] for x in queries)), videos, fidelity=fidelity)
        assert_equal(alone, {"video": whole["video"][i : i + 1]}, 1e-6)
        few = Videos(videos.frames[i : i + 2], None, videos.mask[i : i + 2], None)
        assert_equal(match(queries, few, fidelity=fidelity), {"video": whole["video"][:, i : i + 2]}, 1e-6)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_identical_frames(fidelity):
    """A still video: every frame is the same, every filter gives what one frame gives."""
    queries, videos = make(7, K=4, narration=False)
    still = Videos(videos.frames[:, :1].expand(-1, 4, -1), None, torch.ones(4, 4, dtype=torch.bool), None)
    one = Videos(videos.frames[:, :1], None, torch.ones(4, 1, dtype=torch.bool), None)
    for filtering in FILTERS:
        got = match(queries, still, fidelity=fidelity, **filtering)
        assert_equal(got, expected(queries, one, fidelity=fidelity, **filtering), TIGHT)


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS, ids=str)
def test_a_video_without_frames_scores_zero(filtering, fidelity, fine):
    queries, videos = make(8)
    videos.mask[1], videos.narration_mask[2] = False, False
    videos.frames[~videos.mask] = 0  # as padding leaves the loader; a vector of no direction
    leaves = [x.clone().requires_grad_() for x in (queries.eos, queries.words, videos.frames, videos.narration)]
    got = match(
        queries._replace(eos=leaves[0], words=leaves[1]),
        videos._replace(frames=leaves[2], narration=leaves[3]),
        fidelity=fidelity,
        fine=fine,
        **filtering,
    )
    assert_equal(got, expected(queries, videos, fine_grained=fine, fidelity=fidelity, **filtering), TIGHT)
    assert (got["video"][:, 1] == 0).all() and (got["narration"][:, 2] == 0).all()
    (got["video"].sum() + got["narration"].sum()).backward()
    for leaf in leaves[: 4 if fine else 1]:
        assert leaf.grad.isfinite().all()


def assert_gradients(queries, videos, **options):
    """Autograd against finite differences, for every feature that takes part."""
    leaves = [queries.eos, queries.words, queries.word_weights, videos.frames, videos.narration]
    leaves = [x.clone().requires_grad_() for x in leaves if x is not None]

    def scores(eos, words, word_weights, *views):
        asked = Queries(eos, words, queries.word_mask, word_weights)
        answers = videos._replace(frames=views[0], narration=views[1] if len(views) == 2 else None)
        return tuple(match(asked, answers, **options).values())

    assert torch.autograd.gradcheck(scores, leaves)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("filtering", FILTERS[1:], ids=str)
def test_gradients_of_match(filtering, fidelity):
    queries, videos = make(9, B=2, V=2, K=3, L=2, D=3, narration=False)
    assert_gradients(queries, videos, fidelity=fidelity, **filtering)


def test_gradients_of_both_views_in_blocks():
    queries, videos = make(9, B=2, V=2, K=2, L=2, D=3)
    assert_gradients(queries, videos, p=0.8, block=1)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_random_features_score_at_chance(fidelity):
    """More queries than videos: a score that saw the right answer (as one published system's does) would show."""
    queries, videos = make(10, B=400, V=100, K=4, L=4, D=16, dtype=torch.float32)
    video_of_query = np.arange(400) // 4
    for view, scores in match(queries, videos, fidelity=fidelity, block=50).items():
        got = retrieval_metrics(scores.numpy(), video_of_query)
        assert got["text_to_video"]["R@10"] == pytest.approx(10, abs=4.5), view  # 3 standard deviations
        assert got["text_to_video"]["MnR"] == pytest.approx(50.5, abs=4.5), view
        assert got["video_to_text"]["MnR"] == pytest.approx(50.5, abs=9), view

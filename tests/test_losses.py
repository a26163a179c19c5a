"""narvid.losses against reference.py: NCE (Eq. 5), hard negatives (Eqs. 6-7), rank hinge (Eqs. 8-9), Eq. 12.

Similarities are (B, B): B queries, and the B videos that answer them, pair (i, i) right.
"""

import numpy as np
import pytest
import reference
import torch

from narvid.losses import cross_view_hard_negative, hard_negative_nce, hard_negatives, nce

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
MARGINS = [{"lam": 0.7, "eta": 1.8}, {"lam": 1.1, "eta": 2.0}]  # the paper's for MSR-VTT, B/32 and B/16


def make(seed, B=None, dtype=torch.float64):
    """Two similarity matrices with the right pairs somewhat ahead, and same-video pairs to exclude."""
    rng = np.random.default_rng(seed)
    B = B or int(rng.integers(2, 9))
    both = [torch.tensor(rng.uniform(-0.3, 0.5, (B, B)) + 0.15 * np.eye(B), dtype=dtype) for _ in range(2)]
    exclude = np.triu(rng.random((B, B)) < 0.2, 1)
    return *both, torch.tensor(exclude | exclude.T)


def close(got, want, dtype=torch.float64):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def parts_close(got, want, dtype=torch.float64):
    assert set(got) == {"hard_video", "hard_narration"}
    for name in want:
        close(got[name], want[name], dtype)


# -------------------------------------------------------------------------------------------------------------- NCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_nce(seed, scale, dtype):
    s, _, exclude = make(seed, dtype=dtype)
    right = s.double().numpy()
    close(nce(s, scale), reference.nce(right, scale), dtype)
    close(nce(s, scale, exclude), reference.nce(right, scale, exclude.numpy()), dtype)


def test_nce_by_hand():
    """Scale 1, all similarities equal: the right one of 3 has probability 1/3 both ways; 1/2 with one pair excluded."""
    s = torch.zeros(3, 3, dtype=torch.float64)
    close(nce(s, 1.0), np.log(3))
    exclude = torch.zeros(3, 3, dtype=torch.bool)
    exclude[0, 2] = True  # row 0 and column 2 each lose one candidate
    close(nce(s, 1.0, exclude), (4 * np.log(3) + 2 * np.log(2)) / 6)


def test_nce_of_an_asymmetric_exclusion():
    for seed in range(5):
        s, _, _ = make(seed, B=6)
        exclude = torch.tensor(np.random.default_rng(seed).random((6, 6)) < 0.3)
        close(nce(s, 10.0, exclude), reference.nce(s.numpy(), 10.0, exclude.numpy()))


def test_the_right_pair_is_never_excluded():
    """`exclude` made of equal video ids is True on its diagonal; the positive stays."""
    video = torch.tensor([4, 7, 4, 9])
    same = video[:, None] == video[None]
    off_diagonal = same & ~torch.eye(4, dtype=torch.bool)
    s, s_n, _ = make(0, B=4)
    close(nce(s, 10.0, same), nce(s, 10.0, off_diagonal))
    assert nce(s, 10.0, same) < nce(s, 10.0)
    for got, right in zip(hard_negatives(s, s_n, 1.5, same), hard_negatives(s, s_n, 1.5, off_diagonal)):
        assert torch.equal(got, right)


def test_the_scale_has_a_gradient():
    s, _, _ = make(1)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    nce(s, scale).backward()
    step = 1e-5
    numeric = (reference.nce(s.numpy(), 20 + step) - reference.nce(s.numpy(), 20 - step)) / (2 * step)
    assert scale.grad.item() == pytest.approx(numeric, abs=1e-7)


# --------------------------------------------------------------------------------------------------- hard negatives


@pytest.mark.parametrize("lam", [0.3, 0.7, 1.1])
@pytest.mark.parametrize("seed", range(6))
def test_hard_negatives(seed, lam):
    s_v, s_n, exclude = make(seed)
    for mask in (None, exclude):
        sets = reference.hard_negatives(s_v.numpy(), s_n.numpy(), lam, None if mask is None else mask.numpy())
        for got, right in zip(hard_negatives(s_v, s_n, lam, mask), sets):
            assert got.dtype == torch.bool
            assert got.tolist() == reference.as_matrix(right).tolist()


def test_hard_negatives_of_an_asymmetric_exclusion():
    """exclude[i, j] is query i with video j: rows of the second answer are videos, so there it is turned."""
    s_v, s_n, _ = make(3, B=6)
    exclude = torch.tensor(np.random.default_rng(3).random((6, 6)) < 0.4)
    sets = reference.hard_negatives(s_v.numpy(), s_n.numpy(), 2.0, exclude.numpy())
    for got, right in zip(hard_negatives(s_v, s_n, 2.0, exclude), sets):
        assert got.tolist() == reference.as_matrix(right).tolist()


def test_hard_negatives_by_hand():
    """Row 0 of the video view: 1.0, 0.9, 0.2; sigma = 0.4359. lambda 0.5: only what is over 0.782 is hard."""
    s_v = torch.tensor([[1.0, 0.9, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    s_n = torch.eye(3, dtype=torch.float64)
    of_queries, of_videos = hard_negatives(s_v, s_n, 0.5)
    assert of_queries.int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert of_videos.int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]  # column 1: 0.9, 1.0, 0.0; over 0.725
    s_n[2, 0] = 0.95  # the other view finds another one: row 2, video 0; and column 0, query 2
    of_queries, of_videos = hard_negatives(s_v, s_n, 0.5)
    assert of_queries.int().tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert of_videos.int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_the_border_of_the_set_is_strict():
    """Sigma 0 and a negative exactly as good as the positive: S(i, i) - S(i, j) < 0 is false."""
    s = torch.full((3, 3), 0.25, dtype=torch.float64)
    assert not any(sets.any() for sets in hard_negatives(s, s, 0.7))


def test_exclude_leaves_sigma_over_the_full_row():
    """By hand: the excluded -1.0 makes sigma of row 0 large, 0.954; without it sigma is 0.1 and nothing is hard."""
    s_v = torch.tensor([[1.0, 0.8, 0.9, -1.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    s_n = torch.eye(4, dtype=torch.float64)
    exclude = torch.zeros(4, 4, dtype=torch.bool)
    exclude[0, 3] = exclude[3, 0] = True
    of_queries, _ = hard_negatives(s_v, s_n, 0.5, exclude)
    assert of_queries[0].tolist() == [False, True, True, False]
    got = cross_view_hard_negative(s_v, s_n, lam=0.5, eta=1.8, exclude=exclude)
    parts_close(got, reference.cross_view_hard_negative(s_v.numpy(), s_n.numpy(), 0.5, 1.8, exclude.numpy()))


# ----------------------------------------------------------------------------------------------------- the two losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margins", MARGINS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_cross_view_hard_negative(seed, margins, dtype):
    s_v, s_n, exclude = make(seed, dtype=dtype)
    right = s_v.double().numpy(), s_n.double().numpy()
    for mask in (None, exclude):
        got = cross_view_hard_negative(s_v, s_n, **margins, exclude=mask)
        plain = None if mask is None else mask.numpy()
        parts_close(got, reference.cross_view_hard_negative(*right, **margins, exclude=plain), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("lam", [0.3, 1.1])  # at 0.3 some sets are empty
@pytest.mark.parametrize("seed", range(5))
def test_hard_negative_nce(seed, lam, scale, dtype):
    s_v, s_n, exclude = make(seed, dtype=dtype)
    right = s_v.double().numpy(), s_n.double().numpy()
    for mask in (None, exclude):
        got = hard_negative_nce(s_v, s_n, lam=lam, scale=scale, exclude=mask)
        plain = None if mask is None else mask.numpy()
        parts_close(got, reference.hard_negative_nce(*right, lam, scale, plain), dtype)


def test_both_losses_by_hand():
    """The matrix above: query 0 has the hard negative 1, video 1 has the hard negative 0, and that is all."""
    s_v = torch.tensor([[1.0, 0.9, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    s_n = torch.eye(3, dtype=torch.float64)
    row, column = np.std([1.0, 0.9, 0.2], ddof=1), np.std([0.9, 1.0, 0.0], ddof=1)
    hinge = cross_view_hard_negative(s_v, s_n, lam=0.5, eta=2.0)
    close(hinge["hard_video"], ((0.9 - 1.0 + row) + (0.9 - 1.0 + column)) / 6)
    close(hinge["hard_narration"], 0.0)  # there 0 - 1 + sigma (0.577) is below 0
    eq12 = hard_negative_nce(s_v, s_n, lam=0.5, scale=1.0)
    close(eq12["hard_video"], -(0.1 + 0.1) / 12)
    close(eq12["hard_narration"], -(1.0 + 1.0) / 12)


def test_hinge_pulls_the_right_pair_up_and_the_hard_one_down():
    """The sign of Eq. 8 is that of the released code: as printed, descent would lower the positive."""
    s_v = torch.tensor([[0.5, 0.6], [0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    cross_view_hard_negative(s_v, s_v, lam=0.1, eta=1.0)["hard_video"].backward()
    assert s_v.grad[0, 0] < 0 < s_v.grad[0, 1]


def test_without_hard_negatives_the_losses_are_zero():
    s = 10 * torch.eye(4, dtype=torch.float64).requires_grad_()
    for parts in (cross_view_hard_negative(s, s, lam=0.7, eta=1.8), hard_negative_nce(s, s, lam=0.7, scale=10.0)):
        assert [p.item() for p in parts.values()] == [0, 0]
        assert (torch.autograd.grad(sum(parts.values()), s)[0] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_gradients(seed):
    s_v, s_n, exclude = make(seed, B=4)
    leaves = s_v.requires_grad_(), s_n.requires_grad_()
    options = {"lam": 0.9, "exclude": exclude}
    functions = [
        lambda a, b: nce(a, 10.0, exclude) + nce(b, 10.0),
        lambda a, b: tuple(cross_view_hard_negative(a, b, eta=1.8, **options).values()),
        lambda a, b: tuple(hard_negative_nce(a, b, scale=10.0, **options).values()),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, leaves)


def test_sigma_is_not_detached():
    """The margin grows with the spread of the row: the gradient is the numeric one, not that of a fixed margin."""
    s_v, s_n, _ = make(2, B=5)
    lam, eta, step = 0.9, 1.8, 1e-6
    s_v.requires_grad_()
    cross_view_hard_negative(s_v, s_n, lam=lam, eta=eta)["hard_video"].backward()
    plain, other = s_v.detach().numpy(), s_n.numpy()
    sets, sets_t = reference.hard_negatives(plain, other, lam)
    numeric, detached = np.zeros((5, 5)), np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            nudge = np.zeros((5, 5))
            nudge[i, j] = step
            up, down = (reference.rank_hinge(plain + n, sets, sets_t, lam, eta) for n in (nudge, -nudge))
            numeric[i, j] = (up - down) / (2 * step)
    for matrix, negatives, gradient in ((plain, sets, detached), (plain.T, sets_t, detached.T)):
        for i in range(5):
            for j in negatives[i]:
                if matrix[i, j] - matrix[i, i] + eta * lam * reference.sigma(matrix, i) > 0:
                    gradient[i, j] += 0.1  # 1 / 2B
                    gradient[i, i] -= 0.1
    np.testing.assert_allclose(s_v.grad.numpy(), numeric, atol=1e-7)
    assert np.abs(s_v.grad.numpy() - detached).max() > 0.01


# ------------------------------------------------------------------------------------------------------------- edges


def test_a_batch_of_one():
    s = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    assert not any(sets.any() for sets in hard_negatives(s, s, 0.7))
    parts = dict(cross_view_hard_negative(s, s, lam=0.7, eta=1.8))
    parts["nce"] = nce(s, 100.0)
    parts["eq12"] = sum(hard_negative_nce(s, s, lam=0.7, scale=10.0).values())
    assert [p.item() for p in parts.values()] == [0, 0, 0, 0]
    sum(parts.values()).backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("constant", ["all", "row", "column"])
def test_zero_variance_gives_finite_gradients(constant):
    """Sigma's derivative at 0 is 0 / 0; a batch of equal similarities must survive it."""
    flat, other, _ = make(4, B=4)
    flat[{"all": slice(None), "row": 1, "column": (slice(None), 1)}[constant]] = 0.25
    flat.requires_grad_(), other.requires_grad_()
    for first, second in ((flat, other), (other, flat)):
        want = reference.cross_view_hard_negative(first.detach().numpy(), second.detach().numpy(), 0.9, 1.8)
        parts = cross_view_hard_negative(first, second, lam=0.9, eta=1.8)
        parts_close(parts, want)
        eq12 = hard_negative_nce(first, second, lam=0.9, scale=10.0)
        gradients = torch.autograd.grad(sum(parts.values()) + sum(eq12.values()), (flat, other))
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("seed", range(3))
def test_reordering_the_batch_changes_nothing(seed):
    s_v, s_n, exclude = make(seed, B=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))

    def moved(x):
        return x[order][:, order]

    close(nce(moved(s_v), 10.0, moved(exclude)), nce(s_v, 10.0, exclude))
    got = cross_view_hard_negative(moved(s_v), moved(s_n), lam=0.9, eta=1.8, exclude=moved(exclude))
    parts_close(got, cross_view_hard_negative(s_v, s_n, lam=0.9, eta=1.8, exclude=exclude))
    swapped = cross_view_hard_negative(s_n.T, s_v.T, lam=0.9, eta=1.8, exclude=exclude.T)
    close(sum(swapped.values()), sum(cross_view_hard_negative(s_v, s_n, lam=0.9, eta=1.8, exclude=exclude).values()))

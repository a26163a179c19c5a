"""narvid.fusion against reference.py: Eq. 11 and its weight, dual softmax (DSL), querybank normalisation (QB-Norm).

Similarities are (B, V): B queries, V videos.
"""

import numpy as np
import pytest
import reference
import torch

from narvid.fusion import dsl, fuse, matrix_statistics, qb_norm

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def make(seed, dtype=torch.float64):
    """Two views of different location and spread, as the paper's Figure 6 shows them."""
    rng = np.random.default_rng(seed)
    B, V = rng.integers(2, 9, 2)
    both = rng.uniform(-0.2, 0.5, (B, V)), 0.4 + 0.3 * rng.normal(size=(B, V))
    return [torch.tensor(s, dtype=dtype) for s in both]


def close(got, want, dtype=torch.float64):
    assert got.shape == want.shape
    right = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def plain(*matrices):
    return [s.double().numpy() for s in matrices]


# ----------------------------------------------------------------------------------------------------------- Eq. 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_fuse(seed, weight, dtype):
    s_v, s_n = make(seed, dtype)
    close(fuse(s_v, s_n, weight), reference.fuse(*plain(s_v, s_n), weight), dtype)


def test_fuse_by_hand():
    """Mean 2 and population deviation sqrt(2/3) of 1, 2, 3; the other view is the same ten times as wide."""
    s = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    z = np.array([[-1.0, 0.0, 1.0]]) / np.sqrt(2 / 3)
    close(fuse(s, 10 * s - 5), 2 * z)
    close(fuse(s, -s, 0.75), z)  # 2 (0.75 z - 0.25 z)


def test_even_weight_is_the_printed_sum():
    s_v, s_n = make(1)
    z = [(s - s.mean()) / s.std(correction=0) for s in (s_v, s_n)]
    close(fuse(s_v, s_n), sum(z))


@pytest.mark.parametrize("seed", range(4))
def test_statistics(seed):
    for s in make(seed):
        mean, std = reference.statistics(s.numpy())
        got = [float(x) for x in matrix_statistics(s)]
        assert got == pytest.approx([mean, std], abs=1e-9)


def test_fuse_with_given_statistics():
    """A query asked alone is standardised as the matrix whose statistics were stored."""
    s_v, s_n = make(2)
    stored = matrix_statistics(s_v), matrix_statistics(s_n)
    whole = fuse(s_v, s_n, 0.7)
    close(fuse(s_v, s_n, 0.7, statistics=stored), whole)
    close(fuse(s_v[:1], s_n[:1], 0.7, statistics=stored), whole[:1])
    numbers = (0.1, 2.0), (0.3, 0.5)
    right = reference.fuse(*plain(s_v, s_n), 0.7, numbers)
    close(fuse(s_v, s_n, 0.7, statistics=numbers), right)


def test_fusion_does_not_see_location_or_scale():
    s_v, s_n = make(3)
    close(fuse(3 * s_v + 1, 0.1 * s_n - 7), fuse(s_v, s_n))


def test_a_view_that_hardly_spreads_adds_nothing():
    """Copies of one picture differ by rounding: that outweighs nothing, and the other view keeps its ranking."""
    s_v, s_n = make(4)
    flat = 0.97 + 1e-7 * s_n
    close(fuse(s_v, flat), (s_v - s_v.mean()) / s_v.std(correction=0))
    assert not fuse(flat, flat).any() and not fuse(torch.full((3, 4), 0.1), torch.full((3, 4), 0.1)).any()
    stored = (0.5, 0.0), (0.97, 1e-6)  # another kind of query is not scored in millions
    assert not fuse(s_v, s_n, 0.5, stored).any()


@pytest.mark.parametrize("seed", range(4))
def test_ordinary_matrices_are_divided_bit_for_bit(seed):
    for s in (s for matrix in make(seed, torch.float32) for s in (matrix, 1e-6 * matrix, matrix + 50 * matrix.std())):
        mean, std = matrix_statistics(s)
        assert torch.equal(fuse(s, s, 1.0), 2 * ((s - mean) / std))


# -------------------------------------------------------------------------------------------------------------- DSL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("over", ["queries", "videos"])
@pytest.mark.parametrize("seed", range(4))
def test_dsl(seed, over, dtype):
    for s in make(seed, dtype):
        for scale in (1.0, 20.0, 100.0):
            close(dsl(s, scale, over), reference.dsl(s.double().numpy(), scale, over), dtype)


def test_dsl_by_hand():
    """Scale 0: over the two queries every element is halved, over the four videos it is a quarter."""
    s = torch.arange(8, dtype=torch.float64).reshape(2, 4)
    close(dsl(s, 0.0, "queries"), s / 2)
    close(dsl(s, 0.0, "videos"), s / 4)


def test_dsl_of_an_unknown_axis():
    with pytest.raises(ValueError):
        dsl(torch.zeros(2, 2), 1.0, "rows")


# ---------------------------------------------------------------------------------------------------------- QB-Norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"beta": 5.0}, {"k": 2}, {"beta": 40.0, "k": 3}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_qb_norm(seed, options, dtype):
    rng = np.random.default_rng(seed)
    B, V, bank_size = rng.integers(3, 12, 3)
    s, bank = (torch.tensor(rng.uniform(-0.3, 0.6, (n, V)), dtype=dtype) for n in (B, bank_size))
    close(qb_norm(s, bank, **options), reference.qb_norm(*plain(s, bank), **options), dtype)


def test_qb_norm_by_hand():
    """Video 0 is a hub: both bank queries want it most, so only the test query that wants it is normalised."""
    bank = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]], dtype=torch.float64)
    s = torch.tensor([[0.6, 0.5, 0.0], [0.1, 0.2, 0.7]], dtype=torch.float64)
    got = qb_norm(s, bank)
    below = np.exp(20 * bank.numpy()).sum(0)
    close(got[0], np.exp(20 * s[0].numpy()) / below)
    assert got[0].argmax() == 1  # the hub no longer wins
    assert torch.equal(got[1], s[1])


def test_qb_norm_keeps_its_input():
    s, _ = make(5)
    before = s.clone()
    qb_norm(s, s)
    assert torch.equal(s, before)

"""The nearest code against brute force: sizes and blocks, ties, precision, memory; k-means."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vi_ext.guides import nearest_code as search
from pyro_vi_ext.guides.nearest_code import kmeans, nearest_code

pytestmark = pytest.mark.usefixtures("float64")


def distances(z, codes):
    """Directly computed squared distances, shape (..., K), in the precision of the arguments."""
    return (z.unsqueeze(-2) - codes).square().sum(-1)


def brute_force(z, codes):
    return distances(z, codes).argmin(-1)


# --- the index -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 100, 1000, 2**22])  # below K; N not a multiple
@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (13, 2, 1), (50, 17, 3), (101, 64, 40)])
def test_equal_to_brute_force(n, k, d, block):
    for _ in range(5):
        z, codes = torch.randn(n, d), torch.randn(k, d)
        assert nearest_code(z, codes, block).equal(brute_force(z, codes))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0, 2)])
def test_leading_dimensions_and_empty_input(shape):
    z, codes = torch.randn(*shape, 4), torch.randn(6, 4)
    found = nearest_code(z, codes, block=8)
    assert found.shape == shape and found.dtype == torch.long
    assert found.equal(brute_force(z, codes))


def test_input_that_is_not_contiguous():
    z, codes = torch.randn(4, 9, 5).movedim(0, -1), torch.randn(4, 6).t()
    assert nearest_code(z, codes).equal(brute_force(z, codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_codes_the_first(dtype):
    distinct = torch.randn(10, 3, dtype=dtype)
    copies = torch.randint(10, (64,))
    codes = distinct[copies]
    z = torch.cat([torch.randn(300, 3, dtype=dtype), codes])
    found = nearest_code(z, codes, block=1000)
    assert found.equal(brute_force(z, codes))
    first = torch.stack([(copies == copies[k]).nonzero()[0, 0] for k in range(64)])
    assert found.equal(first[found]) and found[300:].equal(first)
    assert nearest_code(z, codes[:1].expand(64, 3)).eq(0).all()


def test_halfway_the_first():
    """Many codes at one distance, in any order, with coordinates that are exact."""
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    for offset in (0.0, 3.0, 1024.0):
        codes = grid[torch.randperm(16)] + offset
        z = torch.full((1, 4), offset)
        assert nearest_code(z, codes).item() == 0
        z[0, 0] += 0.25  # eight of them are nearer
        assert nearest_code(z, codes).item() == (codes[:, 0] > offset).nonzero()[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halfway_where_arithmetic_rounds(dtype):
    """As argmin: 0.2 is a little nearer to 0.3 in doubles, and equally near in singles."""
    codes = torch.tensor([[0.1], [0.3]], dtype=dtype)
    z = torch.tensor([[0.2]], dtype=dtype)
    for order in ([0, 1], [1, 0], [0, 1, 1], [1, 0, 0, 1]):
        assert nearest_code(z, codes[order]).equal(brute_force(z, codes[order]))
    for _ in range(200):
        codes = torch.randn(2, 2, dtype=dtype)[torch.randint(2, (5,))]
        z = codes.unique(dim=0).mean(0, keepdim=True)
        assert nearest_code(z, codes).equal(brute_force(z, codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_waiting_for_the_device(dtype):
    """What CUDA runs: exact for ties of equal codes, and of two codes."""
    distinct = torch.randn(10, 3, dtype=dtype)
    codes = distinct[torch.randint(10, (64,))]
    z = torch.cat([torch.randn(300, 3, dtype=dtype), codes])
    scores = distances(z, codes)
    argmin = brute_force(z, codes)
    last = 63 - scores.flip(1).argmin(1)  # another of the nearest
    close = scores <= scores.amin(1, keepdim=True) + 1e-5
    assert search._first_or(last, close, z, codes).equal(argmin)
    far = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    both = torch.ones(1, 2, dtype=torch.bool)
    assert search._first_or(torch.tensor([1]), both, far[1:], far).item() == 1


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 300])
def test_codes_that_a_product_cannot_tell_apart(d, dtype):
    """Two tight groups far apart: what tells codes of one group apart is below the rounding."""
    spread = 30 * torch.finfo(dtype).eps
    sides = torch.cat([torch.ones(40, d), -torch.ones(40, d)])
    codes = (sides * (1 + spread * torch.randn(80, d))).to(dtype)[torch.randperm(80)]
    z = torch.cat([codes, codes.roll(1, 0) * (1 + spread / 2)])
    assert nearest_code(z, codes, block=999).equal(brute_force(z, codes))
    assert nearest_code(codes, codes).equal(brute_force(codes, codes))


@pytest.mark.parametrize("d", [16, 512, 2048])
def test_sums_that_round_to_one_side(d):
    """Constant vectors: the errors of their products do not cancel, and grow with D."""
    values = torch.cat([1 + 1e-3 * torch.randn(100), -1 - 1e-3 * torch.randn(100)]).float()
    codes = values.unique().unsqueeze(1).expand(-1, d)
    assert nearest_code(codes, codes).equal(torch.arange(len(codes)))


@pytest.mark.parametrize("d", [2, 64])
def test_a_common_offset_costs_nothing(d, monkeypatch):
    """|z|^2 is 1e8 d and distances are about 2 d: the expanded square would round by more.

    Nor does it cost time: the product alone decides nearly always.
    """
    z, codes = (1e4 + torch.randn(n, d).float() for n in (500, 100))
    decide, pairs = search._nearest_of, []
    monkeypatch.setattr(search, "_nearest_of", lambda p, *a: pairs.append(p) or decide(p, *a))
    assert nearest_code(z, codes).equal(brute_force(z.double(), codes.double()))
    assert len(pairs) == 1 and len(pairs[0][0]) < 505
    expanded = (codes.square().sum(1) - 2 * z @ codes.t()).argmin(1)
    assert not expanded.equal(brute_force(z.double(), codes.double()))


@pytest.mark.parametrize("z_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_searched_in_singles(z_dtype, dtype):
    z, codes = torch.randn(500, 8).to(z_dtype), torch.randn(100, 8).to(dtype)
    assert nearest_code(z, codes).equal(brute_force(z.double(), codes.double()))
    large = 6e4 * torch.eye(3)  # squares are infinite in float16
    assert nearest_code(large.to(z_dtype), large.to(dtype)).tolist() == [0, 1, 2]


def test_autocast_does_not_reach_the_search():
    z, codes = torch.randn(1000, 32).float(), torch.randn(300, 32).float()
    expected = brute_force(z.double(), codes.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_code(z, codes).equal(expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_have_a_valid_index(bad):
    z, codes = torch.randn(6, 3), torch.randn(5, 3)
    expected = brute_force(z, codes)
    z[1], z[4, 2] = bad, bad
    found = nearest_code(z, codes, block=10)
    assert ((found >= 0) & (found < 5)).all()
    fine = z.isfinite().all(1)
    assert found[fine].equal(expected[fine])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("block", [7, 2**22])
def test_codes_that_are_not_finite_are_those_of_argmin(bad, block):
    """An infinite one is never the nearest; NaN always is, and so does not hide."""
    z, codes = torch.randn(50, 3), torch.randn(6, 3)
    codes[2, 1] = bad
    assert nearest_code(z, codes, block).equal(brute_force(z, codes))


# --- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 8)
        return result


@pytest.mark.parametrize("collapsed", [False, True])
def test_memory_is_bounded_by_the_block(collapsed):
    n, k, d, block = 2000, 300, 4, 6000
    z, codes = torch.randn(n, d), torch.randn(k, d)
    codes = codes[:1].expand(k, d) if collapsed else codes
    with Largest() as largest:
        nearest_code(z, codes, block)
    assert block <= largest.elements <= max(2 * block, n * d) < n * k / 40
    with Largest() as largest:
        distances(z, codes)
    assert largest.elements == n * k * d


# --- k-means -------------------------------------------------------------------------------------


def test_kmeans_finds_separated_clusters():
    """With more centres than clusters a start in each is all but sure; a centre is then a mean."""
    truth = 10 * torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    labels = torch.arange(9).repeat(100)
    z = truth[labels] + 0.1 * torch.randn(900, 2)
    for seed in range(5):
        torch.manual_seed(seed)
        centers = kmeans(z, 40)
        assert distances(truth, centers).min(1).values.sqrt().max() < 0.3
        index = nearest_code(z, centers)
        assert distances(z, centers).gather(1, index.unsqueeze(1)).mean() < 2 * 0.1**2


def test_kmeans_ends_at_means_of_what_is_nearest():
    z = torch.cat([torch.randn(50, 2) - 10, torch.randn(150, 2) + 10])
    torch.manual_seed(1)
    centers = kmeans(z, 2)
    centers = centers[centers[:, 0].argsort()]
    torch.testing.assert_close(centers, torch.stack([z[:50].mean(0), z[50:].mean(0)]))


def test_kmeans_moves_a_centre_without_rows():
    """Started at 0, 0 and 10 the second has none: if it stayed, one would be left for 10 and 11."""
    z = torch.tensor([[0.0]] * 50 + [[10.0]] * 50 + [[11.0]] * 50)
    for seed in range(10):
        torch.manual_seed(seed)
        assert kmeans(z, 3, num_iterations=30).sort(0).values.flatten().tolist() == [0, 10, 11]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_kmeans_of_fewer_rows_than_centres(n):
    z = 100 * torch.randn(n, 2)
    centers = kmeans(z, 12)
    assert centers.shape == (12, 2) and centers.isfinite().all()
    spread = z.std(0, correction=0)
    nearest = brute_force(centers, z)
    assert ((centers - z[nearest]).abs() <= 0.06 * spread + 1e-9).all()
    assert set(nearest.tolist()) == set(range(n))
    if n > 1:
        assert len(centers.unique(dim=0)) == 12


def test_kmeans_of_equal_rows():
    centers = kmeans(torch.full((40, 3), 0.7), 8)
    assert torch.allclose(centers, torch.full((8, 3), 0.7), rtol=1e-14)

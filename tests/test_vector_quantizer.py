"""The codebook by hand: codes and gradients, moving averages, restarts, k-means, and its state."""

import copy
import io
import pickle

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from pyro_vi_ext.guides import CodePrior, VectorQuantized, VectorQuantizer, vector_quantizer

pytestmark = pytest.mark.usefixtures("float64")

RESTART = {"restart_threshold": 2.0, "usage_decay": 0.8}


def make(num_codes=6, code_dim=2, ema_decay=None, codes=None, **options):
    """A quantiser with codes that are well apart."""
    quantizer = VectorQuantizer(num_codes, code_dim, ema_decay, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(num_codes, code_dim) if codes is None else codes)
    return quantizer


def batch(quantizer, n=40, spread=1.0):
    """Vectors, their codes and random weights, a third of them zero."""
    z_e = spread * torch.randn(n, quantizer.code_dim)
    weights = torch.rand(n) * (torch.rand(n) > 1 / 3)
    return z_e, quantizer.encode(z_e), weights


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert all(value.equal(found[name]) for name, value in expected.items())


# --- codes, gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_index_to_code_to_index(dtype, scale):
    quantizer = make(50, 3, codes=1.0 + scale * torch.randn(50, 3)).to(dtype)
    indices = torch.randint(50, (7, 4))
    codes = quantizer.decode(indices)
    assert codes.shape == (7, 4, 3) and codes.dtype == dtype
    assert quantizer.encode(codes).equal(indices) and quantizer.indices_of(codes).equal(indices)
    assert quantizer.quantize(codes)[0].equal(codes)


def test_quantize_is_the_nearest_row_of_the_codebook():
    quantizer, z_e = make(20, 3), 10 * torch.randn(50, 4, 3)
    z_q, indices = quantizer.quantize(z_e)
    nearest = (z_e.unsqueeze(-2) - quantizer.codebook).square().sum(-1).argmin(-1)
    assert indices.equal(nearest) and z_q.equal(quantizer.codebook[nearest])


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_straight_through_is_the_identity(ema_decay):
    quantizer = make(ema_decay=ema_decay)
    z_e, g = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2)
    z_q, _ = quantizer.quantize(z_e)
    (found,) = torch.autograd.grad((z_q * g).sum(), z_e, retain_graph=True)
    assert found.equal(g)
    if ema_decay is None:
        to_codes = torch.autograd.grad(z_q.sum(), quantizer.codebook, allow_unused=True)
        assert to_codes == (None,)
    assert not quantizer.quantize(z_e.detach())[0].requires_grad


def test_the_rotation_trick_changes_gradients_only():
    quantizer = make()
    rotated = make(codes=quantizer.codebook.detach(), rotation_trick=True)
    z_e, g = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2)
    (plain, _), (z_q, _) = quantizer.quantize(z_e), rotated.quantize(z_e)
    assert z_q.equal(plain)
    (found,) = torch.autograd.grad((z_q * g).sum(), z_e)
    ratio = plain.norm(dim=1) / z_e.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), ratio * g.norm(dim=1))
    assert not torch.allclose(found, g)


def test_what_is_not_finite_is_no_code():
    quantizer, z_e = make(), torch.randn(4, 2)
    z_e[1, 0], z_e[2, 1] = torch.nan, torch.inf
    z_q, indices = quantizer.quantize(z_e)
    assert z_q[1].isnan().any() and z_q[2].isnan().any()
    assert z_q[[0, 3]].equal(quantizer.codebook[indices[[0, 3]]])


def test_mixed_precision():
    """Encoder outputs in bfloat16: codes keep the precision of the codebook."""
    quantizer = make(30, 4).float()
    z_e = torch.randn(50, 4).bfloat16().requires_grad_()
    z_q, indices = quantizer.quantize(z_e)
    assert z_q.dtype == torch.float32 and z_q.equal(quantizer.codebook[indices])
    z_q.sum().backward()
    assert z_e.grad.equal(torch.ones_like(z_e))


@pytest.mark.parametrize("method", ["encode", "quantize"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4), ()])
def test_vectors_of_another_length_are_refused(method, shape):
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\), the code_dim.*movedim"):
        getattr(make(), method)(torch.zeros(shape))


# --- penalties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("training", [True, False])
def test_penalties_by_hand(ema_decay, training):
    quantizer = make(ema_decay=ema_decay).train(training)
    z_e = torch.randn(3, 7, 2, requires_grad=True)
    indices = quantizer.encode(z_e)
    parts = quantizer.penalties(z_e, indices)
    difference = (z_e - quantizer.codebook[indices]).detach()
    squares = difference.square().sum(-1)
    for part, expected in zip(parts, (squares * (ema_decay is None), squares), strict=True):
        torch.testing.assert_close(part.detach(), expected)

    codebook, commitment = parts
    g = torch.rand(3, 7)
    (found,) = torch.autograd.grad((g * commitment).sum(), z_e)
    torch.testing.assert_close(found, 2 * g.unsqueeze(-1) * difference)
    if ema_decay is None and training:
        to_codes, to_z_e = torch.autograd.grad(
            (g * codebook).sum(), [quantizer.codebook, z_e], allow_unused=True
        )
        expected = torch.zeros(6, 2).index_add_(
            0, indices.flatten(), (-2 * g.unsqueeze(-1) * difference).reshape(-1, 2)
        )
        torch.testing.assert_close(to_codes, expected)
        assert to_z_e is None
        assert not any(p is quantizer.codebook for p in leaves(commitment))
    else:
        assert not codebook.requires_grad


def leaves(tensor):
    """The tensors a gradient would reach."""
    todo, found = [tensor.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None:
            found += [node.variable] if hasattr(node, "variable") else []
            todo += [parent for parent, _ in node.next_functions]
    return found


# --- moving averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_codes_are_the_weighted_means_of_past_assignments(decay):
    """By numpy, from all batches so far; a code never used keeps its bits."""
    quantizer = make(8, 3, decay)
    first, seen = quantizer.codebook.clone(), []
    for t in range(12):
        z_e, indices, weights = batch(quantizer, 6)
        z_e[weights == 0] = torch.nan  # masked: may hold anything
        before = quantizer.codebook.clone()
        quantizer.update(z_e, indices, weights)
        seen.append([a.numpy() for a in (z_e, indices, weights)])
        used_now = torch.bincount(indices, weights, 8) > 0
        for k in range(8):
            total, count = np.zeros(3), 0.0
            for s, (z, i, w) in enumerate(seen):
                mine = (i == k) & (w > 0)
                rate = (1 - decay) * decay ** (t - s)
                total = total + rate * (w[mine, None] * z[mine]).sum(0)
                count = count + rate * w[mine].sum()
            torch.testing.assert_close(quantizer.usage.count[k], torch.tensor(count))
            if used_now[k]:
                mean = torch.as_tensor(total / count)
                torch.testing.assert_close(quantizer.codebook[k], mean, rtol=1e-10, atol=1e-12)
            else:
                assert quantizer.codebook[k].equal(before[k])
    never = torch.stack(
        [torch.bincount(torch.as_tensor(i)[w > 0], minlength=8) for _, i, w in seen]
    )
    never = never.sum(0) == 0
    assert quantizer.codebook[never].equal(first[never])


def test_codes_do_not_drift_while_they_are_not_used():
    """Also where their counts have become too small for float32, after which they are used."""
    quantizer = make(3, 2, 0.9).float()
    far = torch.tensor([[100.0, 1.0], [101.0, 1.0]]).float()
    quantizer.update(far, torch.tensor([0, 0]), torch.ones(2))
    other, codes = torch.randn(4, 2).float(), quantizer.codebook.clone()
    for _ in range(5000):
        quantizer.update(other, torch.full((4,), 1), torch.ones(4))
    assert quantizer.codebook[[0, 2]].equal(codes[[0, 2]])
    assert codes[0].tolist() == [100.5, 1.0] and quantizer.usage.count[0] < 1e-37
    torch.testing.assert_close(quantizer.codebook[1], other.mean(0))
    quantizer.update(far + 7, torch.tensor([0, 0]), torch.ones(2))
    torch.testing.assert_close(quantizer.codebook[0], far.mean(0) + 7)


def test_the_first_use_forgets_the_initial_code():
    quantizer = make(4, 2, 0.99)
    z_e = torch.randn(5, 2)
    quantizer.update(z_e, torch.tensor([2] * 5), torch.ones(5))
    torch.testing.assert_close(quantizer.codebook[2], z_e.mean(0))


def test_a_batch_without_weight_changes_nothing():
    for options in ({}, {"ema_decay": 0.9}, RESTART, {"ema_decay": 0.9, "restart_threshold": 2.0}):
        quantizer = make(**options)
        quantizer.update(*batch(quantizer))
        before = state(quantizer)
        z_e, indices, _ = batch(quantizer)
        quantizer.update(z_e, indices, torch.zeros(40))
        quantizer.update(z_e[:0], indices[:0], torch.zeros(0))
        assert_same(state(quantizer), before)


def test_no_restarts_at_nothing():
    """Though codes have come to be below the threshold, as by another one of a resumed run."""
    quantizer = make(**RESTART)
    quantizer.update(*batch(quantizer))
    quantizer.restart_threshold = 1000.0
    before = state(quantizer)
    quantizer.update(torch.randn(5, 2), torch.zeros(5, dtype=torch.long), torch.zeros(5))
    assert_same(state(quantizer), before)


def test_perplexity_and_usage():
    quantizer = make(4, 1, codes=torch.arange(4.0).unsqueeze(1), usage_decay=0.5)
    assert quantizer.perplexity.isnan()
    z_e = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    quantizer.update(z_e, quantizer.encode(z_e), torch.ones(4))
    assert quantizer.perplexity.item() == pytest.approx(2**1.5)
    assert quantizer.usage.per_batch.tolist() == [1, 2, 1, 0]
    quantizer.update(z_e[:2], torch.tensor([3, 3]), torch.ones(2))
    torch.testing.assert_close(quantizer.usage.count, torch.tensor([0.25, 0.5, 0.25, 1.0]))


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_restarts_hide_no_collapse(ema_decay):
    """One code is used, however many have moved."""
    quantizer = make(64, 2, ema_decay, restart_threshold=1.0)
    z_e, first = torch.randn(1, 2).repeat(100, 1), torch.zeros(100, dtype=torch.long)
    for _ in range(50):
        quantizer.update(z_e, first, torch.ones(100))
    assert quantizer.perplexity.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantizer_in_half_precision_cannot_count(dtype):
    quantizer = make(2, 1, 0.5).to(dtype)
    z_e = torch.full((1000, 1), 1.25, dtype=dtype)
    with pytest.raises(ValueError, match="Keep the quantizer in single precision"):
        quantizer.update(z_e, torch.ones(1000, dtype=torch.long), torch.ones(1000))


def test_gradients_train_no_averages():
    """Without ema_decay an update moves counts alone."""
    quantizer = make()
    before = quantizer.codebook.clone()
    quantizer.update(*batch(quantizer))
    assert quantizer.codebook.equal(before) and quantizer.usage.count.sum() > 0


# --- restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_only_codes_that_are_hardly_used_restart(ema_decay):
    threshold = 1.0
    options = {"ema_decay": ema_decay} if ema_decay else {"usage_decay": 0.8}
    quantizer = make(10, 2, restart_threshold=threshold, **options)
    other = make(10, 2, codes=quantizer.codebook.detach(), **options)
    restarted = 0
    for _ in range(20):
        z_e, indices, weights = batch(quantizer)
        z_e[weights == 0] = torch.nan
        before = state(quantizer)
        other.load_state_dict(before)
        quantizer.update(z_e, indices, weights)
        other.update(z_e, indices, weights)
        dead = other.code_count / other.usage.weight < threshold
        found, without = state(quantizer), state(other)
        restarted += int(dead.sum())
        assert found["codebook"][~dead].equal(without["codebook"][~dead])
        rows = z_e[weights > 0]
        new = found["codebook"][dead]
        assert (new.unsqueeze(1) == rows).all(2).any(1).all()
        count = torch.where(dead, threshold * without["usage.weight"], without["code_count"])
        assert found["code_count"].equal(count)
        assert found["usage.count"].equal(without["usage.count"])  # a restart is no use
        assert found["usage.weight"].equal(without["usage.weight"])
        if ema_decay:
            expected = new * (threshold * found["usage.weight"])
            assert found["code_sum"][dead].equal(expected)
            assert found["code_sum"][~dead].equal(without["code_sum"][~dead])
    assert 5 <= restarted <= 100  # of 200


@pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_a_code_used_just_often_enough_stays(threshold, decay):
    """The average of a constant is the constant, but for rounding in float32."""
    quantizer = make(2, 1, decay, restart_threshold=threshold).float()
    z_e = torch.tensor([[1.0], [2.0], [3.0]])
    weights = torch.tensor([threshold, 50.0, 100.0])
    quantizer.update(z_e, torch.tensor([0, 1, 1]), weights)
    for _ in range(500):
        quantizer.update(z_e, torch.tensor([0, 1, 1]), weights)
        assert quantizer.codebook[0].item() == pytest.approx(1.0, rel=1e-4)
    quantizer.update(z_e, torch.tensor([0, 1, 1]), weights * torch.tensor([0.5, 1, 1]))
    assert quantizer.codebook[0].item() in (1.0, 2.0, 3.0)


def test_a_restarted_code_is_an_average_that_starts_there():
    """It counts as ``threshold`` uses of the row in each batch so far."""
    quantizer = make(2, 1, 0.5, restart_threshold=2.0, codes=torch.tensor([[0.0], [9.0]]))
    quantizer.update(torch.full((4, 1), 1.0), torch.tensor([0] * 4), torch.ones(4))
    assert quantizer.codebook.flatten().tolist() == [1.0, 1.0]
    assert (quantizer.code_count / quantizer.usage.weight).tolist() == [4.0, 2.0]
    assert quantizer.usage.per_batch.tolist() == [4.0, 0.0]  # nothing has used it yet
    z_e = torch.tensor([[1.0], [5.0], [5.0], [5.0]])
    quantizer.update(z_e, torch.tensor([0, 1, 1, 1]), torch.ones(4))
    # code 1: a count of 2 * 0.5, halved, of the row 1, and 0.5 * 3 new uses of 5
    assert quantizer.codebook[1].item() == pytest.approx((0.5 * 1 + 1.5 * 5) / 2)


def test_restarts_choose_rows_by_weight():
    counts = torch.zeros(3)
    for _ in range(100):
        quantizer = make(20, 1, codes=torch.full((20, 1), 9.0), **RESTART)
        z_e = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        weights = torch.tensor([3.0, 1.0, 0.0, 10.0])
        quantizer.update(z_e, torch.tensor([0, 0, 0, 0]), weights)
        counts += torch.stack([(quantizer.codebook[1:] == value).sum() for value in (0, 1, 2)])
    num, p = 1900, torch.tensor([3.0, 1.0, 0.0]) / 14
    assert ((counts / num - p).abs() <= 4 * (p * (1 - p) / num).sqrt()).all()


def test_the_codebook_stays_a_leaf_that_optimizers_know():
    quantizer = make(**RESTART)
    own = quantizer.codebook
    quantizer.update(*batch(quantizer, spread=10.0))
    assert quantizer.codebook is own and own.is_leaf and own.requires_grad
    assert [p is own for p in quantizer.parameters()] == [True]


def test_a_step_between_forward_and_backward_is_harmless():
    """The objective moves averages before the caller differentiates its loss."""
    quantizer = make(**RESTART)
    gradients = []
    for moves in (False, True):
        z_e = torch.linspace(-2.0, 2.0, 12).reshape(6, 2).requires_grad_()
        z_q, indices = quantizer.quantize(z_e)
        codebook, commitment = quantizer.penalties(z_e, indices)
        loss = (z_q**2).sum() + codebook.sum() + commitment.sum()
        if moves:
            quantizer.update(10 + z_e, indices, torch.ones(6))
        gradients.append(torch.autograd.grad(loss, [z_e, quantizer.codebook]))
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


# --- k-means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kmeans_starts_the_codes_once(ema_decay):
    quantizer = make(3, 2, ema_decay, kmeans_init=True)
    assert quantizer.needs_initialization
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    z_e = centers.repeat(30, 1) + 0.1 * torch.randn(90, 2)
    weights = torch.ones(90)
    z_e[:6], weights[:6] = torch.nan, 0.0
    for _ in range(20):  # until the three starts are in the three clusters
        quantizer._initialized.fill_(False)
        assert quantizer.needs_initialization
        quantizer.initialize(z_e, weights)
        assert not quantizer.needs_initialization
        distance = (quantizer.codebook.unsqueeze(1) - centers).norm(dim=2).min(0).values
        if distance.max() < 1:
            break
    means = torch.stack([z_e[6:][k::3].mean(0) for k in range(3)])
    for mean in means:
        assert (quantizer.codebook - mean).abs().sum(1).min() < 1e-12
    assert not (quantizer.usage.count.any() or quantizer.usage.weight.any())


def test_kmeans_waits_for_vectors():
    quantizer = make(3, 2, kmeans_init=True)
    before = state(quantizer)
    quantizer.initialize(torch.randn(5, 2), torch.zeros(5))
    quantizer.initialize(torch.zeros(0, 2), torch.zeros(0))
    quantizer.initialize(torch.full((5, 2), torch.nan), torch.ones(5))  # named by the objective
    assert quantizer.needs_initialization
    assert_same(state(quantizer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kmeans_of_half_precision_is_made_in_that_of_the_codebook(dtype):
    """4000 rows of a cluster: a count in bfloat16 would end at 256."""
    quantizer = make(2, 1, kmeans_init=True).float()
    z_e = torch.tensor([[-5.0], [5.0]]).repeat(4000, 1) + 0.1 * torch.randn(8000, 1)
    quantizer.initialize(z_e.to(dtype), torch.ones(8000))
    assert quantizer.codebook.sort(0).values.flatten().tolist() == pytest.approx([-5, 5], abs=0.02)


def test_no_kmeans_in_evaluation_mode():
    quantizer = make(3, 2, kmeans_init=True).eval()
    assert not quantizer.needs_initialization
    assert quantizer.train().needs_initialization
    assert not make(3, 2).needs_initialization


# --- what changes nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_use_changes_nothing(training):
    options = {"ema_decay": 0.9, "kmeans_init": True, "restart_threshold": 1.0}
    quantizer = make(**options).train(training)
    quantizer.update(*batch(quantizer))
    before = state(quantizer)
    z_e = torch.randn(8, 2, requires_grad=True)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            z_q, indices = quantizer.quantize(z_e)
            quantizer.penalties(z_e, indices)
            quantizer.indices_of(z_q), quantizer.perplexity, quantizer.needs_initialization
            q, p = VectorQuantized(z_e, quantizer), CodePrior(quantizer).expand([8])
            for value in (q.sample(), q.rsample((3,)), p.sample()):
                q.log_prob(value), p.log_prob(value)
            pyro.sample("z", q)
            CodePrior(quantizer, logits=torch.zeros(6)).log_prob(z_q)
    z_q, indices = quantizer.quantize(z_e)
    (z_q.sum() + quantizer.penalties(z_e, indices)[1].sum()).backward()
    assert_same(state(quantizer), before)


# --- state ---------------------------------------------------------------------------------------

OPTIONS = [
    {},
    RESTART,
    {"ema_decay": 0.9, "kmeans_init": True},
    {"ema_decay": 0.7, "kmeans_init": True, "restart_threshold": 5.0, "rotation_trick": True},
]


def train(quantizer, seed, num=6):
    """What a loop would do to it."""
    torch.manual_seed(seed)
    for _ in range(num):
        z_e = torch.randn(30, 2)
        if quantizer.needs_initialization:
            quantizer.initialize(z_e, torch.ones(30))
        quantizer.update(z_e, quantizer.encode(z_e), torch.ones(30))
    return state(quantizer)


def through_state_dict(quantizer, options, assign=False):
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    fresh = VectorQuantizer(6, 2, **options)
    fresh.needs_initialization  # has been asked before  # noqa: B018
    fresh.load_state_dict(torch.load(file), assign=assign)
    return fresh


COPIES = {
    "state_dict": through_state_dict,
    "state_dict, assigned": lambda quantizer, options: through_state_dict(quantizer, options, True),
    "deepcopy": lambda quantizer, options: copy.deepcopy(quantizer),
    "pickle": lambda quantizer, options: pickle.loads(pickle.dumps(quantizer)),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_trains_on_exactly(kind, options, monkeypatch):
    quantizer = VectorQuantizer(6, 2, **options)
    train(quantizer, 1)
    copied = COPIES[kind](quantizer, options)
    assert_same(state(copied), state(quantizer))
    monkeypatch.setattr(vector_quantizer, "kmeans", None)  # not a second time
    before = state(quantizer)
    found = train(copied, 2)
    assert_same(state(quantizer), before)  # they share nothing
    assert_same(found, train(quantizer, 2))
    assert not found["usage.count"].equal(before["usage.count"])


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_made_before_kmeans_has_it_ahead(kind):
    options = {"ema_decay": 0.9, "kmeans_init": True}
    quantizer = VectorQuantizer(6, 2, **options)
    assert quantizer.needs_initialization
    copied = COPIES[kind](quantizer, options)
    train(quantizer, 1)
    assert copied.needs_initialization and not quantizer.needs_initialization
    assert_same(train(copied, 1), state(quantizer))


def test_loading_a_state_from_before_kmeans_takes_it_back():
    quantizer = VectorQuantizer(6, 2, kmeans_init=True)
    before = state(quantizer)
    train(quantizer, 1)
    assert not quantizer.needs_initialization
    quantizer.load_state_dict(before)
    assert quantizer.needs_initialization


def test_everything_that_moves_is_in_the_state():
    ema = {"codebook", "code_sum", "code_count", "usage.count", "usage.weight", "_initialized"}
    quantizer = VectorQuantizer(4, 2, ema_decay=0.9)
    assert set(quantizer.state_dict()) == ema and not list(quantizer.parameters())
    quantizer = VectorQuantizer(4, 2)
    assert set(quantizer.state_dict()) == ema - {"code_sum"}
    assert isinstance(quantizer.codebook, nn.Parameter)


@pytest.mark.parametrize("options", OPTIONS)
def test_precision_follows_the_module(options):
    quantizer = VectorQuantizer(6, 2, **options)
    train(quantizer, 1)
    own = quantizer.codebook
    quantizer.to(torch.float32)
    assert isinstance(quantizer.codebook, nn.Parameter) == isinstance(own, nn.Parameter)
    for name, value in train(quantizer, 2).items():
        assert value.dtype == (torch.bool if name == "_initialized" else torch.float32)
    z_q, _ = quantizer.quantize(torch.randn(3, 2).float())
    assert z_q.dtype == quantizer.perplexity.dtype == torch.float32
    quantizer.double()
    assert train(quantizer, 3)["codebook"].dtype == torch.float64


def test_repr_says_what_it_is():
    assert "VectorQuantizer(\n  4, 2, ema_decay=0.9" in repr(VectorQuantizer(4, 2, 0.9))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, options, match",
    [
        ((1, 2), {}, "num_codes"),
        ((2.5, 2), {}, "num_codes"),
        ((4, 0), {}, "code_dim"),
        ((4, 2), {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), or None; got 1.0"),
        ((4, 2), {"ema_decay": -0.1}, "ema_decay"),
        ((4, 2), {"ema_decay": float("nan")}, "ema_decay"),
        ((4, 2), {"usage_decay": 1.5}, r"usage_decay must be in \[0, 1\)"),
        ((4, 2), {"restart_threshold": 0.0}, "restart_threshold must be a positive number of uses"),
        ((4, 2), {"restart_threshold": -1.0}, "restart_threshold"),
        ((4, 2), {"restart_threshold": float("inf")}, "restart_threshold"),
        ((4, 2), {"restart_threshold": float("nan")}, "restart_threshold"),
        ((4, 2), {"ema_decay": 0.9, "usage_decay": 0.5}, "leave usage_decay=0.5 out"),
    ],
)
def test_arguments_out_of_range(args, options, match):
    with pytest.raises(ValueError, match=match):
        VectorQuantizer(*args, **options)


def test_decay_of_usage():
    assert VectorQuantizer(4, 2).usage.decay == 0.99
    assert VectorQuantizer(4, 2, usage_decay=0.5).usage.decay == 0.5
    assert VectorQuantizer(4, 2, ema_decay=0.7).usage.decay == 0.7
    assert VectorQuantizer(4, 2, ema_decay=0.0).usage.decay == 0.0
    assert VectorQuantizer(4, 2, usage_decay=0.0).usage.decay == 0.0


def test_codes_start_uniform():
    codes = VectorQuantizer(50, 30).codebook
    assert codes.abs().max() <= 1 / 50 and codes.std().item() == pytest.approx(1 / 50 / 3**0.5, 0.1)

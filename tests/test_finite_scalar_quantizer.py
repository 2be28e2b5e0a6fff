"""Finite scalar quantisation: the grid, gradients by hand, exact prior and evidence."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate

from pyro_vi_ext import VQELBO
from pyro_vi_ext.code_sites import codes_of
from pyro_vi_ext.guides import CodePrior, FiniteScalarQuantizer, VectorQuantized

pytestmark = pytest.mark.usefixtures("float64")

LEVELS = ([2], [3], [4], [7, 2], [8, 5, 5, 5], [8, 6, 5], [2, 2, 3, 4, 5])
SMALL = [3, 4]  # one odd, one even


def by_hand(z, level):
    """Index of the level and the code of one number, by the equation of the module."""
    half, offset = level // 2, 0.5 * (level % 2 == 0)
    step = round((half - offset) * math.tanh(z) - offset)
    return step + half, step / half


def values_of(level):
    return [step / (level // 2) for step in range(-(level // 2), level - level // 2)]


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


# --- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_codebook_is_the_grid_and_every_code_gives_its_index(levels, dtype):
    quantizer = FiniteScalarQuantizer(levels).to(dtype)
    indices = torch.arange(quantizer.num_codes)
    codes = quantizer.codebook
    assert codes.dtype == dtype and quantizer.code_dim == len(levels)
    assert quantizer.num_codes == math.prod(levels) and quantizer.code_shape == ()
    grid = itertools.product(*map(values_of, reversed(levels)))  # the first coordinate fastest
    want = torch.tensor([row[::-1] for row in grid], dtype=dtype)
    assert torch.equal(codes, want)
    assert float(codes.min()) == -1.0 and float(codes.max()) <= 1.0
    assert torch.equal(quantizer.indices_of(codes), indices)
    assert torch.equal(quantizer.indices_of(3.0 + (codes - 3.0)), indices)  # up to rounding
    assert torch.equal(quantizer.decode(indices), codes)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_encoder_outputs_reach_all_levels_and_no_others(levels):
    quantizer = FiniteScalarQuantizer(levels)
    z_e = torch.linspace(-30, 30, 20_001).unsqueeze(1).expand(-1, len(levels))
    value, indices = quantizer.quantize(z_e)
    for d, level in enumerate(levels):
        found = value[:, d].unique()
        assert found.tolist() == values_of(level)
        assert bool((value[1:, d] >= value[:-1, d]).all())
    assert torch.equal(value, quantizer.decode(indices))
    assert torch.equal(quantizer.encode(z_e), indices)
    # Reversed by a change of sign, away from the thresholds.
    z = 2 * torch.randn(1000, len(levels))
    last = torch.tensor(levels) - 1
    digits, mirrored = (digits_of(quantizer, sign * z) for sign in (1, -1))
    assert torch.equal(mirrored, last - digits)


def digits_of(quantizer, z_e):
    half = torch.tensor(quantizer.levels) // 2
    return (quantizer.quantize(z_e)[0] * half).round().long() + half


def test_codes_and_indices_are_those_of_the_equation():
    levels = [8, 5, 2]
    quantizer, z_e = FiniteScalarQuantizer(levels), 1.5 * torch.randn(4, 25, 3)
    value, indices = quantizer.quantize(z_e)
    for row, z_q, index in zip(
        z_e.reshape(-1, 3).tolist(), value.reshape(-1, 3).tolist(), indices.flatten(), strict=True
    ):
        (i, a), (j, b), (k, c) = map(by_hand, row, levels)
        assert z_q == [a, b, c] and index == i + 8 * j + 40 * k


def test_values_that_were_drawn_carry_their_indices():
    quantizer = FiniteScalarQuantizer([5] * 27)  # 5^27 < 2^63
    q = VectorQuantized(torch.randn(6, 27), quantizer)
    value = q.rsample()
    assert torch.equal(codes_of(value, quantizer), q.indices)
    assert torch.equal(quantizer.indices_of(value.clone()), q.indices)
    assert torch.equal(quantizer.decode(q.indices), value)


def test_what_is_no_index_has_no_code():
    codes = FiniteScalarQuantizer(SMALL).decode(torch.tensor([-1, 0, 11, 12]))
    assert codes.isfinite().all(-1).tolist() == [False, True, True, False]


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_gradient_is_that_of_the_bounding_function(levels):
    quantizer, z_e = FiniteScalarQuantizer(levels), torch.randn(7, len(levels), requires_grad=True)
    weight = torch.randn(7, len(levels))
    value, _ = quantizer.quantize(z_e)
    (grad,) = torch.autograd.grad((weight * value).sum(), z_e)
    slope = torch.tensor([(n - 1) / 2 / (n // 2) for n in levels])
    torch.testing.assert_close(grad, weight * slope / z_e.detach().cosh().square())


X = torch.tensor([[1.2, -0.3], [0.1, 0.4], [-2.0, 1.0], [0.6, 0.6], [-0.7, -1.1]])
SCALE, COUNT = 2.0, len(X)


def model_and_guide(quantizer, logits=None, bias=0.0):
    bias = torch.nn.Parameter(torch.full((quantizer.code_dim,), bias))

    def model(x):
        with pyro.plate("data", SCALE * len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", CodePrior(quantizer, logits))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("bias", bias)
        with pyro.plate("data", SCALE * len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", VectorQuantized(1.5 * x + shift, quantizer))

    return model, guide, bias


def test_a_step_of_svi_is_a_negative_elbo_with_its_gradient_by_hand():
    x, quantizer, lr = X.double(), FiniteScalarQuantizer(SMALL), 0.01
    logits = torch.randn(quantizer.num_codes, requires_grad=True)
    model, guide, bias = model_and_guide(quantizer, logits)
    digits, codes = zip(
        *(zip(*map(by_hand, row, SMALL), strict=True) for row in (1.5 * x).tolist()), strict=True
    )
    mean, index = torch.tensor(codes), torch.tensor([i + 3 * j for i, j in digits])
    reconstruction = -SCALE * dist.Normal(mean, 1.0).log_prob(x).sum()
    kl = -SCALE * logits.log_softmax(0)[index].sum()
    objective = VQELBO(commitment_cost=7.0)
    loss = SVI(model, guide, pyro.optim.SGD({"lr": lr}), objective).step(x)
    assert loss == pytest.approx(float((reconstruction + kl).detach()), rel=1e-12)
    torch.testing.assert_close(objective.latest.reconstruction, reconstruction)
    torch.testing.assert_close(objective.latest.kl, kl.detach())
    assert float(objective.latest.codebook) == float(objective.latest.commitment) == 0.0
    slope = torch.tensor([1.0, 1.5 / 2]) / (1.5 * x).cosh().square()
    torch.testing.assert_close(bias.detach(), -lr * SCALE * ((mean - x) * slope).sum(0))
    (found,) = torch.autograd.grad(objective.differentiable_loss(model, guide, x), logits)
    # The code of the moved bias is the same here.
    counts = torch.bincount(index, minlength=quantizer.num_codes)
    torch.testing.assert_close(found, SCALE * (COUNT * logits.detach().softmax(0) - counts))


# --- what is counted -----------------------------------------------------------------------------


def test_perplexity_is_that_of_the_moving_average_of_usage():
    quantizer = FiniteScalarQuantizer(SMALL)
    assert quantizer.perplexity.isnan()
    model, guide, _ = model_and_guide(quantizer)
    objective, counts = VQELBO(), torch.zeros(12)
    for scale in (1.0, 0.1, -2.0):
        x = scale * X.double()
        batch = torch.bincount(quantizer.encode(1.5 * x), minlength=12)
        counts = 0.99 * counts + 0.01 * batch
        objective.loss_and_grads(model, guide, x)
    frequencies = counts / counts.sum()
    entropy = -torch.xlogy(frequencies, frequencies).sum()
    torch.testing.assert_close(quantizer.perplexity, entropy.exp())
    other = FiniteScalarQuantizer(SMALL)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.perplexity, quantizer.perplexity)


def test_usage_counts_with_weights():
    quantizer, z_e = FiniteScalarQuantizer(SMALL), torch.randn(6, 2)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0])
    indices = quantizer.encode(z_e)
    quantizer.update(z_e, indices, weights)
    want = torch.zeros(12).index_add_(0, indices, weights)
    torch.testing.assert_close(quantizer.usage.per_batch, want)


def test_nothing_moves_without_gradient_or_in_evaluation_mode():
    quantizer, x = FiniteScalarQuantizer(SMALL), X.double()
    model, guide, _ = model_and_guide(quantizer)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), VQELBO())
    before = state(quantizer)
    assert set(before) == {"usage.count", "usage.weight"}
    svi.evaluate_loss(x)
    quantizer.quantize(x)
    quantizer.eval()
    svi.step(x)
    assert all(torch.equal(value, before[name]) for name, value in state(quantizer).items())
    quantizer.train()
    svi.step(x)
    assert not any(torch.equal(value, before[name]) for name, value in state(quantizer).items())
    assert not list(quantizer.parameters())


def test_usage_of_very_many_codes_is_not_counted():
    quantizer = FiniteScalarQuantizer([8] * 7)
    assert not quantizer.state_dict()
    x = torch.randn(5, 7)
    model, guide, _ = model_and_guide(quantizer)
    assert math.isfinite(SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), VQELBO()).step(x))
    with pytest.raises(NotImplementedError, match="does not count the usage of 2097152 codes"):
        _ = quantizer.perplexity


# --- the prior, exactly --------------------------------------------------------------------------


def test_the_prior_is_a_categorical_over_the_grid():
    quantizer = FiniteScalarQuantizer(SMALL)
    logits = torch.randn(12)
    prior = CodePrior(quantizer, logits)
    values = prior.enumerate_support()
    assert torch.equal(values, quantizer.codebook)
    torch.testing.assert_close(prior.log_prob(values), logits.log_softmax(0))
    assert float(prior.log_prob(values).exp().sum()) == pytest.approx(1.0, abs=1e-12)
    uniform = CodePrior(quantizer).log_prob(values)
    torch.testing.assert_close(uniform, torch.full((12,), -math.log(12)))
    assert quantizer.log_num_codes == pytest.approx(math.log(12))


def test_draws_of_the_prior_have_its_frequencies():
    quantizer, logits, n = FiniteScalarQuantizer(SMALL), torch.randn(12), 40_000
    values = CodePrior(quantizer, logits).sample((n,))
    counts = torch.bincount(quantizer.indices_of(values.clone()), minlength=12)
    p = logits.softmax(0)

    def errors(p):
        return ((counts / n - p) / (p * (1 - p) / n).sqrt()).abs().max()

    assert errors(p) < 4
    assert errors((logits + 0.2 * (torch.arange(12) == p.argmax())).softmax(0)) > 4


@pytest.mark.parametrize("learned", [False, True])
def test_the_evidence_by_enumeration_is_above_the_bound(learned):
    x, quantizer = X.double(), FiniteScalarQuantizer(SMALL)
    logits = torch.randn(12) if learned else None
    model, guide, _ = model_and_guide(quantizer, logits)
    log_p = logits.log_softmax(0) if learned else torch.full((12,), -math.log(12))
    log_x = dist.Normal(quantizer.codebook.unsqueeze(1), 1.0).log_prob(x).sum(-1)
    joint = log_p.unsqueeze(1) + log_x
    evidence = SCALE * float(joint.logsumexp(0).sum())
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    found = -enum.loss(config_enumerate(model), lambda x: None, x)
    assert found == pytest.approx(evidence, rel=1e-12)
    bound = -VQELBO().loss(model, guide, x)
    at = quantizer.encode(1.5 * x)
    assert bound == pytest.approx(SCALE * float(joint[at, torch.arange(COUNT)].sum()), rel=1e-12)
    assert bound < evidence


# --- what is not finite, and errors --------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_code_of_what_is_not_finite_is_nan(bad):
    quantizer, z_e = FiniteScalarQuantizer(SMALL), torch.randn(4, 2)
    z_e[2, 1] = bad
    value, indices = quantizer.quantize(z_e)
    assert value.isnan().nonzero().tolist() == [[2, 1]]
    assert ((indices >= 0) & (indices < 12)).all()


def test_nan_names_the_site_and_moves_nothing():
    quantizer = FiniteScalarQuantizer(SMALL)
    model, guide, _ = model_and_guide(quantizer, torch.randn(12), bias=math.nan)
    before = state(quantizer)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="'[zx]'"):
        SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), VQELBO()).step(X.double())
    assert all(torch.equal(value, before[name]) for name, value in state(quantizer).items())


@pytest.mark.parametrize("bad", [0.3, 1.5, -1.5, math.nan, math.inf])
@pytest.mark.parametrize("coordinate", [0, 1])
def test_a_value_off_the_grid_is_an_error(bad, coordinate):
    quantizer = FiniteScalarQuantizer(SMALL)
    values = quantizer.codebook
    values[5, coordinate] = bad
    with pytest.raises(ValueError, match=r"is not a code \(levels \[3, 4\].*encode\(z_e\)"):
        quantizer.indices_of(values)
    with pytest.raises(ValueError, match="is not a code"):
        CodePrior(quantizer, torch.zeros(12), validate_args=False).log_prob(values)


def test_an_even_number_of_levels_stops_short_of_one():
    quantizer = FiniteScalarQuantizer([4])
    with pytest.raises(ValueError, match=r"\[1.0\] is not a code"):
        quantizer.indices_of(torch.ones(1))


@pytest.mark.parametrize(
    ("levels", "match"),
    [
        ([], "levels must be a list"),
        (8, "levels must be a list.*got 8"),
        ([8, 1], "levels must be an integer >= 2, got 1"),
        ([8, 5.0], "levels must be an integer >= 2, got 5.0"),
        ([8] * 21, r"levels must have a product below 2\^63"),
    ],
)
def test_levels_out_of_range(levels, match):
    with pytest.raises(ValueError, match=match):
        FiniteScalarQuantizer(levels)


def test_shapes_that_do_not_fit_are_errors():
    quantizer = FiniteScalarQuantizer(SMALL)
    for call in (quantizer.encode, quantizer.quantize, quantizer.indices_of):
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\), the code_dim"):
            call(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(\.\.\., 12\)"):
        CodePrior(quantizer, torch.zeros(7))

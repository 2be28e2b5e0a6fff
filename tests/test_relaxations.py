"""H(z), z and z given b: exact laws, exact gradients, and densities between hard values."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.distributions import AffineTransform

from pyro_vi_ext.relaxations import BERNOULLI, CATEGORICAL, ONE_HOT, LinearDensity, relaxation_of

pytestmark = pytest.mark.usefixtures("float64")

N = 20_000
RELAXATIONS = {"Bernoulli": BERNOULLI, "OneHotCategorical": ONE_HOT, "Categorical": CATEGORICAL}
LOGITS = {
    "Bernoulli": [0.7],
    "OneHotCategorical": [0.2, -1.0, 0.9],
    "Categorical": [0.2, -1.0, 0.9],
}
every = pytest.mark.parametrize("name", RELAXATIONS)


def logits_of(name, values=None, dtype=None):
    """Logits (*event), normalised for categories."""
    logits = torch.tensor(LOGITS[name] if values is None else values, dtype=dtype)
    return logits if name == "Bernoulli" else logits - logits.logsumexp(-1)


def distribution(name, logits):
    if name == "Bernoulli":
        return dist.Bernoulli(logits=logits).to_event(1)
    return getattr(dist, name)(logits=logits)


def states(name, logits):
    """All values of one draw, along dimension 0."""
    if name == "Bernoulli":
        return torch.tensor([[0.0], [1.0]]).to(logits).expand(2, len(logits))
    return getattr(dist, name)(logits=logits).enumerate_support()


# --- laws --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_z_given_b_is_on_the_side_of_b(name, size, dtype):
    """Also where b has a probability of e^-100, in single precision."""
    relaxation = RELAXATIONS[name]
    values = [size, -size] if name == "Bernoulli" else [size, 0.0, -size]
    logits = logits_of(name, values, dtype)
    for b in states(name, logits):
        b = b.expand((N,) + b.shape)
        z = relaxation.given(logits, b, relaxation.noise(logits.expand(N, -1)))
        assert z.dtype == dtype and z.isfinite().all()
        assert torch.equal(relaxation.hard(z).to(b), b)


@every
def test_the_most_extreme_noise_is_finite(name):
    relaxation, b = RELAXATIONS[name], torch.tensor([1.0, 0.0, 0.0])
    b = torch.tensor(0) if name == "Categorical" else b
    for noise in (torch.tensor([-88.0, 88.0, 0.0]), torch.tensor([88.0, -88.0, -88.0])):
        logits = torch.full((3,), -1.1).requires_grad_()
        for z in (relaxation.sample(logits, noise), relaxation.given(logits, b, noise)):
            (slope,) = torch.autograd.grad(z.sum(), logits)
            assert z.isfinite().all() and slope.isfinite().all()


def marginals(name, logits, z):
    """Functions of z with known laws: (draws, cdf)."""
    if name == "Bernoulli":
        yield z[:, 0], st.logistic(logits[0].item()).cdf
        return
    for i, location in enumerate(logits.tolist()):
        yield z[:, i], st.gumbel_r(location).cdf
    yield z.amax(-1), st.gumbel_r(0.0).cdf  # of the logits' logsumexp
    yield z[:, 0] - z[:, 1], st.logistic((logits[0] - logits[1]).item()).cdf


def p_value(name, logits, z):
    return min(st.kstest(x.numpy(), cdf).pvalue for x, cdf in marginals(name, logits, z))


def draws_given_b(name, logits, logits_of_z):
    relaxation = RELAXATIONS[name]
    b = distribution(name, logits).sample((N,))
    return relaxation.given(logits_of_z, b, relaxation.noise(logits.expand(N, -1)))


@every
def test_law_of_z(name):
    relaxation, logits = RELAXATIONS[name], logits_of(name)
    z = relaxation.sample(logits, relaxation.noise(logits.expand(N, -1)))
    assert p_value(name, logits, z) > 1e-3
    vectors = relaxation.encode(relaxation.hard(z), logits)
    mean = relaxation.mean(logits)
    error = (mean * (1 - mean) / N).sqrt()
    assert ((vectors.mean(0) - mean).abs() < 4 * error).all()


@every
def test_z_given_b_averaged_over_b_has_the_law_of_z(name):
    logits = logits_of(name)
    assert p_value(name, logits, draws_given_b(name, logits, logits)) > 1e-3
    wrong = logits + 0.2  # not normalised, or another probability
    assert p_value(name, logits, draws_given_b(name, logits, wrong)) < 1e-6


@every
def test_z_given_b_does_not_tell_which_noise(name):
    """Given one b, z has the law of those z that give b."""
    relaxation, logits = RELAXATIONS[name], logits_of(name)
    z = relaxation.sample(logits, relaxation.noise(logits.expand(N, -1)))
    b = states(name, logits)[-1]
    kept = (relaxation.encode(relaxation.hard(z), logits) == relaxation.encode(b, logits)).all(-1)
    given = relaxation.given(logits, b.expand((N,) + b.shape), relaxation.noise(z))
    for i in range(z.shape[-1]):
        assert st.ks_2samp(z[kept, i].numpy(), given[:, i].numpy()).pvalue > 1e-3


@every
def test_paths_have_the_derivative_at_fixed_noise(name):
    relaxation, logits = RELAXATIONS[name], logits_of(name).requires_grad_()
    noise = relaxation.noise(logits.detach().expand(4, -1))
    assert torch.autograd.gradcheck(lambda x: relaxation.sample(x, noise), logits)
    for b in states(name, logits.detach()):
        b = b.expand((4,) + b.shape)
        given = functools.partial(relaxation.given, b=b, noise=noise)
        assert torch.autograd.gradcheck(given, logits)


# --- values and densities ------------------------------------------------------------------------


@every
def test_relaxed_values_lie_inside_and_tend_to_hard_ones(name):
    relaxation, logits = RELAXATIONS[name], logits_of(name)
    z = relaxation.sample(logits, relaxation.noise(logits.expand(100, -1)))
    soft = relaxation.relax(z, 0.7)
    assert ((soft > 0) & (soft < 1)).all()
    if name != "Bernoulli":
        torch.testing.assert_close(soft.sum(-1), torch.ones(100))
    hard = relaxation.encode(relaxation.hard(z), logits)
    torch.testing.assert_close(relaxation.relax(z, 1e-6), hard, atol=1e-9, rtol=0)


@every
def test_linear_log_prob(name):
    relaxation, logits = RELAXATIONS[name], logits_of(name)
    values = states(name, logits)
    found = relaxation.linear_log_prob(logits, values)
    found = found.sum(-1) if name == "Bernoulli" else found
    torch.testing.assert_close(found, distribution(name, logits).log_prob(values))
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0))
    if relaxation.relaxes_value:
        ends = [relaxation.linear_log_prob(logits, value) for value in values[:2]]
        between = relaxation.linear_log_prob(logits, 0.3 * values[0] + 0.7 * values[1])
        torch.testing.assert_close(between, 0.3 * ends[0] + 0.7 * ends[1])


def test_linear_log_prob_of_an_impossible_category():
    logits = torch.tensor([0.5, 0.5, 0.0]).log().requires_grad_()
    log_prob = ONE_HOT.linear_log_prob(logits, torch.tensor([0.25, 0.75, 0.0]))
    torch.testing.assert_close(log_prob, torch.tensor(0.5).log())
    assert torch.autograd.grad(log_prob, logits)[0].isfinite().all()


# --- which distributions, in which clothes -------------------------------------------------------


def dressed(name, logits):
    """A distribution of batch (4, 3), in each of the ways Pyro has to write it."""
    event = logits.shape[-1:] if name == "Bernoulli" else ()
    base = distribution(name, logits)
    mask = torch.tensor([True, False, True])
    yield base.expand([4, 3])
    yield base.expand_by([4, 3])
    yield base.expand([3]).expand([4, 3])
    yield distribution(name, logits.expand(4, 3, -1))
    yield base.expand([4, 3]).mask(mask)
    yield base.expand([4, 3]).mask(mask).mask(torch.ones(4, 1, dtype=torch.bool))
    yield base.expand([4, 3, 2]).to_event(1)
    if event:
        yield dist.Bernoulli(probs=logits.sigmoid().expand(4, 3, *event)).to_event(1)


@every
def test_every_form_of_a_distribution_has_its_linear_density(name):
    for fn in dressed(name, logits_of(name)):
        relaxation, logits = relaxation_of(fn)
        extra = (3,) if name == "Categorical" else ()
        assert relaxation is RELAXATIONS[name]
        assert logits.shape == fn.batch_shape + fn.event_shape + extra
        value = fn.sample()
        density = LinearDensity.of(fn)
        assert density.batch_shape == fn.batch_shape == (4, 3)
        assert density.event_shape == fn.event_shape
        torch.testing.assert_close(density.log_prob(value), fn.log_prob(value))
        copies = value.expand((5,) + value.shape)
        expanded = density.expand([5, 4, 3])
        torch.testing.assert_close(expanded.log_prob(copies), fn.log_prob(copies))


def test_masked_relaxed_values_count_nothing():
    fn = dist.OneHotCategorical(logits=torch.zeros(2, 3)).mask(torch.tensor([True, False]))
    value = torch.tensor([0.2, 0.3, 0.5]).expand(2, 3)
    found = LinearDensity.of(fn).log_prob(value)
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1.0]).log())


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(0.0, 1.0),
        dist.Poisson(1.0),
        dist.Binomial(1, 0.5),
        dist.RelaxedBernoulli(torch.tensor(0.5), probs=torch.tensor(0.5)),
        dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor(0.5)),
        dist.OneHotCategoricalStraightThrough(torch.ones(3) / 3),
        dist.RelaxedOneHotCategorical(torch.tensor(0.5), torch.ones(3) / 3),
        dist.ZeroInflatedDistribution(dist.Bernoulli(0.5), gate=torch.tensor(0.3)),
        dist.TransformedDistribution(dist.Bernoulli(0.5), [AffineTransform(1.0, 2.0)]),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_other_distributions_have_no_relaxation(fn):
    """A distribution made from a Bernoulli is not one."""
    assert relaxation_of(fn) == (None, None)
    with pytest.raises(ValueError, match=f"{type(fn).__name__} has no relaxation"):
        LinearDensity.of(fn)


def test_a_linear_density_cannot_be_sampled():
    with pytest.raises(NotImplementedError, match="scoring only"):
        pyro.sample("b", LinearDensity.of(dist.Bernoulli(0.5)))

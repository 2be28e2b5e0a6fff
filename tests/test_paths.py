"""Paths and densities, on every kind of guide: nothing moves at the exact posterior, and away from
it the doubly reparameterised gradient has the mean of the plain one."""

import functools
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import transforms
from pyro.infer.autoguide import (
    AutoDelta,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import nn
from torch.distributions import constraints

from pyro_vi_ext import ImportanceWeightedELBO, TraceSTL_ELBO
from pyro_vi_ext.paths import Paths, draws, is_reparameterized

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.7, -0.4], dtype=torch.float64)


# --- pairs, each with the guide at the exact posterior -----------------------------------------
#
# A builder takes `wrap`, which puts a function into an outer plate of independent copies, and
# returns (model, guide, log p(x) of one copy). Copies make many draws of a gradient cheap.


def copied(num):
    def wrap(fn):
        @functools.wraps(fn)
        def many():
            with pyro.plate("copies", num, dim=-4):
                return fn()

        return many

    return wrap


def param(name, value, **options):
    return pyro.param(name, lambda: torch.as_tensor(value), **options)


def positive(name, value):
    return param(name, value, constraint=constraints.positive)


def log_evidence(x, variance):
    """log N(x; 0, variance), summed, in the precision of x."""
    return -0.5 * (x**2 / variance + math.log(2 * math.pi * variance)).sum()


def set_to(leaf, value):
    with torch.no_grad():
        leaf.copy_(torch.as_tensor(value))


LOCAL_LOC, LOCAL_SCALE = 0.8 * X, 0.2**0.5
LOCAL_EVIDENCE = log_evidence(X, 1.25)


def local():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def network(wrap):
    net = nn.Linear(1, 2)
    set_to(net.weight, [[0.8], [0.0]])
    set_to(net.bias, [0.0, math.log(LOCAL_SCALE)])

    def guide():
        pyro.module("net", net)
        with pyro.plate("data", 2):
            loc, log_scale = net(X.unsqueeze(-1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return wrap(local), wrap(guide), LOCAL_EVIDENCE


def cached_transform(wrap):
    def guide():
        with pyro.plate("data", 2):
            scale = positive("scale", LOCAL_SCALE)
            affine = transforms.AffineTransform(param("loc", LOCAL_LOC), scale, cache_size=1)
            base = dist.Normal(0.0, 1.0).expand([2])
            pyro.sample("z", dist.TransformedDistribution(base, [affine]))

    return wrap(local), wrap(guide), LOCAL_EVIDENCE


# z1 ~ N(0, 1), z2 | z1 ~ N(z1, 1), x | z2 ~ N(z2, 1). Posterior: z1 ~ N(x/3, 2/3) and z2 | z1 ~
# N((z1 + x) / 2, 1/2); z2 ~ N(2x/3, 2/3); covariance 1/3.


def chain():
    with pyro.plate("data", 2):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=X)


CHAIN_EVIDENCE = log_evidence(X, 3.0)


def hierarchical(wrap):
    def guide():
        with pyro.plate("data", 2):
            scale = positive("scale", (2 / 3) ** 0.5)
            z1 = pyro.sample("z1", dist.Normal(param("slope", 1 / 3) * X, scale))
            loc = param("w", 0.5) * z1 + param("v", 0.5) * X
            pyro.sample("z2", dist.Normal(loc, positive("scale2", 0.5**0.5)))

    return wrap(chain), wrap(guide), CHAIN_EVIDENCE


def auto(cls, model, evidence=None, prepare=lambda guide: None, **options):
    """A builder of an AutoGuide; ``prepare(guide)`` sets it to the exact posterior."""

    def build(wrap):
        guide = cls(model, **options)
        with torch.no_grad():
            poutine.block(guide)()
            prepare(guide)
        return wrap(model), wrap(guide), evidence

    return build


def messenger(cls, model, evidence, prepare):
    """As ``auto``; a guide made of effects must wrap the whole model, and shares parameters."""

    def build(wrap):
        guide = cls(wrap(model), amortized_plates=("copies",))
        with torch.no_grad():
            poutine.block(guide)()
            prepare(guide)
        return wrap(model), guide, evidence

    return build


def set_mean_field(guide):
    set_to(guide.locs.z, LOCAL_LOC)
    guide.scales.z = torch.full((2,), LOCAL_SCALE)


def set_multivariate(guide):
    set_to(guide.loc, torch.cat([X / 3, 2 * X / 3]))
    covariance = torch.eye(4) * 2 / 3
    covariance[[0, 1, 2, 3], [2, 3, 0, 1]] = 1 / 3
    root = torch.linalg.cholesky(covariance)
    guide.scale = root.diagonal()
    guide.scale_tril = root / root.diagonal()[:, None]


def set_hierarchical(guide):
    set_to(guide.locs.z1, X / 3)
    guide.scales.z1 = torch.full((2,), (2 / 3) ** 0.5)
    set_to(guide.locs.z2, X / 2)
    guide.scales.z2 = torch.full((2,), 0.5**0.5)
    guide.weights.z1, guide.weights.z2 = torch.tensor(1.0), torch.tensor(0.5)


def lognormal():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 0.5), obs=X)


def unused():
    """No data depend on the latent, so its posterior is its prior."""
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=X)


def set_iaf(guide):
    last = guide.transform.parts[0].arn.layers[-1]
    set_to(last.weight, torch.zeros_like(last.weight))
    set_to(last.bias, torch.zeros_like(last.bias))


def nested(wrap):
    """Events of two in a plate, in a plate: z of a group, y of its members, x | y. Order: y, z."""
    x = torch.linspace(-1.0, 1.5, 12).reshape(2, 3, 2)

    def model():
        with pyro.plate("groups", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("members", 3, dim=-1):
                y = pyro.sample("y", dist.Normal(z, 1.0).to_event(1))
                pyro.deterministic("twice", 2 * y)
                pyro.sample("x", dist.Normal(y, 1.0).to_event(1), obs=x)

    def guide():
        with pyro.plate("groups", 2, dim=-2):
            loc = param("slope", 0.2) * x.sum(-2, keepdim=True)
            z = pyro.sample("z", dist.Normal(loc, positive("scale", 0.4**0.5)).to_event(1))
            with pyro.plate("members", 3, dim=-1):
                loc = param("w", 0.5) * z + param("v", 0.5) * x
                pyro.sample("y", dist.Normal(loc, positive("scale2", 0.5**0.5)).to_event(1))

    marginal = dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 2 * torch.eye(3))
    return wrap(model), wrap(guide), marginal.log_prob(x.transpose(-1, -2)).sum()


def scaled(wrap):
    """poutine.scale by a number for each unit, in model and guide."""
    scale = torch.tensor([2.0, 0.5])
    model, guide, _ = network(lambda fn: fn)
    model, guide = (poutine.scale(fn, scale=scale) for fn in (model, guide))
    evidence = sum(s * log_evidence(x, 1.25) for s, x in zip(scale, X, strict=True))
    return wrap(model), wrap(guide), evidence


def masked(wrap):
    mask = torch.tensor([True, False])
    model, guide, _ = hierarchical(lambda fn: fn)
    model, guide = (poutine.mask(fn, mask=mask) for fn in (model, guide))
    return wrap(model), wrap(guide), log_evidence(X[0], 3.0)


def subsampled(wrap):
    x = torch.tensor([0.7, -0.7, 0.7, -0.7])

    def model():
        with pyro.plate("data", 4, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    def guide():
        with pyro.plate("data", 4, subsample_size=2) as index:
            loc = param("slope", 0.8) * x[index]
            pyro.sample("z", dist.Normal(loc, positive("scale", LOCAL_SCALE)))

    return wrap(model), wrap(guide), log_evidence(x, 1.25)


def factors(wrap):
    """A factor of the guide that depends on a draw, and the same factor in the model."""

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("in_model", 0.3 * z.sin())
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)

    def guide():
        with pyro.plate("data", 2):
            scale = positive("scale", torch.full((2,), LOCAL_SCALE))
            z = pyro.sample("z", dist.Normal(param("loc", LOCAL_LOC), scale))
            pyro.factor("in_guide", 0.3 * z.sin(), has_rsample=True)

    return wrap(model), wrap(guide), LOCAL_EVIDENCE


EXACT = {
    "network": network,
    "cached-transform": cached_transform,
    "hierarchical": hierarchical,
    "AutoNormal-positive": auto(AutoNormal, lognormal, LOCAL_EVIDENCE, set_mean_field),
    "AutoMultivariateNormal": auto(AutoMultivariateNormal, chain, CHAIN_EVIDENCE, set_multivariate),
    "AutoIAFNormal": auto(AutoIAFNormal, unused, log_evidence(X, 1.0), set_iaf, hidden_dim=[8]),
    "AutoNormalMessenger": messenger(
        AutoNormalMessenger, lognormal, LOCAL_EVIDENCE, set_mean_field
    ),
    "AutoHierarchicalNormalMessenger": messenger(
        AutoHierarchicalNormalMessenger, chain, CHAIN_EVIDENCE, set_hierarchical
    ),
    "nested": nested,
    "scaled": scaled,
    "masked": masked,
    "subsampled": subsampled,
    "factors": factors,
}

OBJECTIVES = {
    "TraceSTL": functools.partial(TraceSTL_ELBO, 2),
    "stl-1": functools.partial(ImportanceWeightedELBO, 1, "stl"),
    "stl-5": functools.partial(ImportanceWeightedELBO, 5, "stl"),
    "dreg-5": functools.partial(ImportanceWeightedELBO, 5, "dreg"),
    "dreg-5-chunks": functools.partial(ImportanceWeightedELBO, 5, "dreg", 2),
    "dreg-5-sequential": functools.partial(
        ImportanceWeightedELBO, 5, "dreg", vectorize_particles=False
    ),
}
LANDING = {name: OBJECTIVES[name] for name in ("TraceSTL", "stl-5", "dreg-5")}


def gradient(module, parameters, seed):
    """The loss, and one vector of its gradient."""
    pyro.set_rng_seed(seed)
    loss = module()
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return loss.detach(), torch.cat([g.reshape(-1) for g in grads])


def parameters_of(model, guide):
    module = ImportanceWeightedELBO(1)(model, guide)
    module()
    return list(module.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_nothing_moves_at_the_exact_posterior(name):
    model, guide, evidence = EXACT[name](copied(2))
    parameters = parameters_of(model, guide)
    _, plain = gradient(ImportanceWeightedELBO(1)(model, guide), parameters, 0)
    assert plain.abs().max() > 0.05  # and yet the plain gradient is no zero
    masked_out = name == "masked"  # draws that no density is charged for keep a mean-zero term
    for label, objective in OBJECTIVES.items():
        module = objective()(model, guide)
        for seed in (1, 2):
            loss, grad = gradient(module, parameters, seed)
            torch.testing.assert_close(loss, -2 * evidence, rtol=1e-11, atol=1e-11)
            assert grad.abs().max() < 1e-11 or masked_out and label.startswith("dreg-5"), label


# --- by definition -----------------------------------------------------------------------------
#
# Two links and a parameter, `slope`, that the guide shares with the model.


def links_model():
    with pyro.plate("data", 2):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(param("slope", 0.4) * z1, 1.0))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=X)


def links(mean):
    """A guide whose second mean is some function of the first draw."""

    def guide():
        slope, scale = param("slope", 0.4), param("scale", 0.9)
        with pyro.plate("data", 2):
            z1 = pyro.sample("z1", dist.Normal(slope * X, scale))
            pyro.sample("z2", dist.Normal(mean(z1) + slope, scale))

    return guide


def times_w(z):
    return param("w", 0.3) * z


def log_densities(z1, z2, p):
    """log p(x, z) and log q(z) of each particle and datum, from draws and parameters."""
    log_p = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(p["slope"] * z1, 1.0).log_prob(z2)
    log_p = log_p + dist.Normal(z2, 1.0).log_prob(X)
    log_q = dist.Normal(p["slope"] * X, p["scale"]).log_prob(z1)
    return log_p, log_q + dist.Normal(p["w"] * z1 + p["slope"], p["scale"]).log_prob(z2)


def off_definition(label):
    """How far a gradient is from partial derivatives of log w put together by hand.

    dreg: w^2 by path, w by log p; stl: w by path, w by log p; pathwise: w by all.
    """
    module = ImportanceWeightedELBO(4, label)(links_model, links(times_w))
    module()
    parameters = dict(module.named_parameters())
    _, found = gradient(module, list(parameters.values()), seed=2)

    pyro.set_rng_seed(2)
    noise = [torch.randn(4, 2) for _ in range(2)]  # of z1, z2: particles, data
    p = {name.split(".")[-1]: leaf for name, leaf in parameters.items()}
    z1 = p["slope"] * X + p["scale"] * noise[0]
    z2 = p["w"] * z1 + p["slope"] + p["scale"] * noise[1]
    leaves = [z.detach().requires_grad_() for z in (z1, z2)]
    log_p, log_q = log_densities(*leaves, p)
    w = (log_p - log_q).detach().softmax(0)
    by_draw = torch.autograd.grad((log_p - log_q).sum(), leaves, retain_graph=True)
    power = {"dreg": 2, "stl": 1, "pathwise": 1}[label]
    surrogate = sum((w**power * g * z).sum() for g, z in zip(by_draw, (z1, z2), strict=True))
    surrogate = surrogate + (w * log_p).sum()
    if label == "pathwise":
        surrogate = surrogate - (w * log_q).sum()
    expected = torch.autograd.grad(-surrogate, list(parameters.values()))
    return (found - torch.stack(expected)).abs().max().item()


@pytest.mark.parametrize("label", ["dreg", "stl", "pathwise"])
def test_gradient_by_definition(label):
    assert off_definition(label) < 1e-11


# Planted faults: each is seen.


def test_copies_fed_back_into_the_draws_are_rejected(monkeypatch):
    """Weights would be applied once for each link of the chain."""
    after_sample = Paths._pyro_post_sample

    def fed_back(self, msg):
        after_sample(self, msg)
        if torch.is_tensor(msg["value"]) and msg["value"].requires_grad:
            msg["value"].register_hook(lambda grad: grad * self._weights[0])

    monkeypatch.setattr(Paths, "_pyro_post_sample", fed_back)
    assert off_definition("dreg") > 1e-3


def test_densities_of_undetached_ancestors_are_rejected(monkeypatch):
    """Scored in the distributions of the first run, log q(z2 | z1) would move z1."""
    monkeypatch.setattr("pyro_vi_ext.paths.is_chain", lambda run, trace: False)
    monkeypatch.setattr("pyro_vi_ext.paths._check_chain", lambda *args: None)
    for label in ("dreg", "stl"):
        assert off_definition(label) > 1e-3


def test_paths_of_another_weight_are_rejected(monkeypatch):
    weigh = Paths.weigh
    monkeypatch.setattr(Paths, "weigh", lambda self, weights: weigh(self, weights.sqrt()))
    assert off_definition("dreg") > 1e-3
    assert mean_difference("hierarchical", dreg_3(), ImportanceWeightedELBO(3), 60) > 6


# --- away from the optimum ---------------------------------------------------------------------


def shared(wrap):
    return wrap(links_model), wrap(links(times_w)), None


def sum_of_two():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=X[0])


def gamma(wrap):
    """Implicitly reparameterised draws, one the rate of the other."""

    def model():
        with pyro.plate("data", 2):
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            z = pyro.sample("z", dist.Gamma(2.0, rate))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)

    def guide():
        with pyro.plate("data", 2):
            shape = positive("shape", 3.0)
            rate = pyro.sample("rate", dist.Gamma(shape, positive("r", 2.0)))
            pyro.sample("z", dist.Gamma(shape, rate + positive("s", 1.0)))

    return wrap(model), wrap(guide), None


MOVED = {
    **EXACT,
    "shared": shared,
    "iaf": auto(AutoIAFNormal, sum_of_two, hidden_dim=[4]),
    "gamma": gamma,
    "AutoStructured": auto(AutoStructured, chain),
    "AutoDelta": auto(AutoDelta, local),
}


def moved(name, copies=500):
    """A pair, and its parameters moved at random."""
    pyro.set_rng_seed(0)
    model, guide, _ = MOVED[name](copied(copies))
    parameters = parameters_of(model, guide)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    return model, guide, parameters


def mean_difference(name, one, other, num_draws=20):
    """The largest difference of two mean gradients, in standard errors, from the same seeds."""
    model, guide, parameters = moved(name)
    modules = [objective(model, guide) for objective in (one, other)]
    rows = []
    for seed in range(num_draws):
        a, b = (gradient(module, parameters, seed)[1] for module in modules)
        rows.append(a - b)
    rows = torch.stack(rows)
    error = rows.std(0) / num_draws**0.5
    return (rows.mean(0) / (error + 1e-12)).abs().max().item()


def dreg_3():
    return ImportanceWeightedELBO(3, "dreg")


@pytest.mark.parametrize("name", MOVED)
def test_dreg_has_the_mean_of_the_plain_gradient(name):
    assert mean_difference(name, dreg_3(), ImportanceWeightedELBO(3)) < 4


@pytest.mark.parametrize("name", ["hierarchical", "nested", "subsampled", "gamma", "shared"])
def test_stl_has_the_mean_of_the_plain_gradient_for_the_elbo(name):
    assert mean_difference(name, TraceSTL_ELBO(2), ImportanceWeightedELBO(1)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("num_particles", [2, 5])
def test_dreg_has_the_mean_of_the_plain_gradient_long(name, num_particles):
    dreg = ImportanceWeightedELBO(num_particles, "dreg", chunk_size=2)
    assert mean_difference(name, dreg, ImportanceWeightedELBO(num_particles), 400) < 4.5


# --- flows: transforms remember what they have inverted ----------------------------------------


def flow_pair(flow, chained=False):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if chained:
            z = pyro.sample("y", dist.Normal(z, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=X[0])

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(param("loc", torch.tensor([0.3, 0.1, 0.2])), 0.7).to_event(1)
        z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
        if chained:
            pyro.sample("y", dist.Normal(z, 0.7).to_event(1))

    return model, guide


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("flow", [transforms.Planar, transforms.Radial])
def test_a_flow_without_an_inverse_is_refused_by_name(flow, chained):
    for make in LANDING.values():
        with pytest.raises(NotImplementedError, match=f"'z'.*{flow.__name__}.*Use a flow"):
            make().loss_and_grads(*flow_pair(flow(3), chained))


TWO_WAY = {
    "iaf": lambda: transforms.affine_autoregressive(3, [4]),
    "coupling": lambda: transforms.affine_coupling(3, [4]),
    "spline": lambda: transforms.spline(3),
}


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("flow", TWO_WAY)
def test_first_gradient_of_a_flow_is_that_of_later_calls(flow, chained):
    """The checks of a first call score the same draws, without gradients."""
    for label, make in OBJECTIVES.items():
        pyro.clear_param_store()
        model, guide = flow_pair(TWO_WAY[flow](), chained)
        parameters = parameters_of(model, guide)
        module = make()(model, guide)
        (_, first), (_, later) = (gradient(module, parameters, seed=3) for _ in range(2))
        torch.testing.assert_close(first, later, rtol=1e-9, atol=1e-9, msg=label)


@pytest.mark.parametrize("label", OBJECTIVES)
@pytest.mark.parametrize("name", ["cached-transform", "AutoNormalMessenger", "iaf"])
def test_first_gradient_of_a_guide_is_that_of_later_calls(name, label):
    model, guide, parameters = moved(name, copies=2)
    module = OBJECTIVES[label]()(model, guide)
    (_, first), (_, later) = (gradient(module, parameters, seed=3) for _ in range(2))
    torch.testing.assert_close(first, later, rtol=1e-9, atol=1e-9)


def test_a_masked_flow_in_a_chain_is_no_error():
    mask = torch.tensor([True, False])
    model, guide = flow_pair(transforms.spline(3), chained=True)

    def many(fn):
        with pyro.plate("data", 2), poutine.mask(mask=mask):
            fn()

    pair = [functools.partial(many, fn) for fn in (model, guide)]
    for make in LANDING.values():
        assert math.isfinite(make().loss_and_grads(*pair))


# --- what can be told of a guide ---------------------------------------------------------------


@pytest.mark.parametrize("label", LANDING)
def test_a_chain_that_cannot_be_followed_is_an_error(label):
    guide = links(torch.vmap(lambda row: 0.5 * row))
    with pytest.raises(ValueError, match="depends on the draw of site 'z1'.*pathwise"):
        LANDING[label]().loss_and_grads(links_model, guide)


@pytest.mark.parametrize("label", LANDING)
def test_dependence_that_comes_is_an_error(label):
    """A wrong gradient otherwise: whether the sites are a chain is told once."""
    depends = {"now": False}
    guide = links(lambda z1: 0.5 * (z1 if depends["now"] else torch.ones(2)))
    objective = LANDING[label]()
    objective.loss_and_grads(links_model, guide)
    depends["now"] = True
    assert math.isfinite(objective.loss(links_model, guide))
    with pytest.raises(ValueError, match="depends on the draw of site 'z1'.*pathwise"):
        objective.loss_and_grads(links_model, guide)


@pytest.mark.parametrize("label", LANDING)
def test_dropout_in_a_chain_is_an_error(label):
    net = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    guide = links(lambda z1: net(z1.unsqueeze(-1)).squeeze(-1))
    with pytest.raises(ValueError, match="'z2' has another log-density.*dropout.*pathwise"):
        LANDING[label]().loss_and_grads(links_model, guide)
    net.eval()
    assert math.isfinite(LANDING[label]().loss_and_grads(links_model, guide))


def test_draws_are_latents_but_point_masses():
    def guide():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("d", dist.Delta(z).expand([2]).to_event(1))
        pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("r", dist.Normal(0.0, 1.0).has_rsample_(False))
        pyro.factor("f", z, has_rsample=True)
        pyro.deterministic("t", 2 * z)
        with pyro.plate("p", 4, subsample_size=2):
            pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).mask(False))

    found = draws(poutine.trace(guide).get_trace())
    reparameterized = {name: is_reparameterized(site) for name, site in found.items()}
    assert reparameterized == {"z": True, "b": False, "r": False, "m": True}


# --- how the runs are made ---------------------------------------------------------------------


@pytest.mark.parametrize("label", OBJECTIVES)
def test_room_for_more_plates_than_there_are_changes_nothing(label):
    model, guide, parameters = moved("nested", copies=2)
    one, other = (
        gradient(OBJECTIVES[label](max_plate_nesting=nesting)(model, guide), parameters, seed=5)
        for nesting in (4, 7)
    )
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("label", OBJECTIVES)
def test_nothing_of_a_step_outlives_it(label):
    """Hooks that held the run would keep every tensor of every step, unseen by the collector."""
    alive = []

    def model():
        chain()
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        alive.append(weakref.ref(z))

    def guide():
        links(times_w)()
        pyro.sample("z", dist.Normal(param("loc", 0.1), 1.0))

    objective = OBJECTIVES[label]()
    for _ in range(2):
        objective.loss_and_grads(model, guide)
        objective.differentiable_loss(model, guide).backward()
    gc.collect()
    assert alive and not any(ref() is not None for ref in alive)

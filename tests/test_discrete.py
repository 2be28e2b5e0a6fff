"""Every estimator for discrete draws against enumeration: one table, one check."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vi_ext import (
    TraceARM_ELBO,
    TraceDisARM_ELBO,
    TraceMuProp_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
    TraceRLOO_ELBO,
    TraceScore_ELBO,
    branches,
    leave_one_out,
    relaxations,
)

from .enumerating import KINDS, Grid, Problem

pytestmark = pytest.mark.usefixtures("float64")


# --- the table ---------------------------------------------------------------------------------


class OwnControl(nn.Module):
    """A control variate of one's own, of z and earlier draws."""

    def __init__(self, kind):
        super().__init__()
        self.kind = KINDS[kind]
        self.weight = nn.Parameter(torch.tensor([0.8, -0.5]))

    def forward(self, sites):
        *earlier, z = sites.values()
        z = torch.tanh(z)
        z = z.sum(-1) if self.kind.draw_dims else z
        for b in earlier:
            b = self.kind.vector(b)[..., 0]
            if torch.broadcast_shapes(b.shape, z.shape) == z.shape:
                z = z + 0.3 * b
        return self.weight[0] * z + self.weight[1] * z**2


def of(cls, **fixed):
    return lambda kind, num_particles, **options: cls(
        num_particles=num_particles, **fixed, **options
    )


def relax_own(kind, num_particles, **options):
    return TraceRELAX_ELBO(OwnControl(kind), num_particles, **options)


#: name -> (factory of (kind, num_particles, **options), kinds it takes, fewest particles)
ALL, BINARY, REAL = tuple(KINDS), ("scalar", "event"), ("scalar", "event", "one hot")
ESTIMATORS = {
    "score": (of(TraceScore_ELBO), ALL, 1),
    "score all": (of(TraceScore_ELBO, score_sites="all"), ALL, 1),
    "rloo": (of(TraceRLOO_ELBO), ALL, 2),
    "nvil": (of(TraceNVIL_ELBO, hidden_dims=(5,)), ALL, 1),
    "muprop": (of(TraceMuProp_ELBO), REAL, 1),
    "arm": (of(TraceARM_ELBO), BINARY, 1),
    "disarm": (of(TraceDisARM_ELBO), BINARY, 1),
    "rebar": (of(TraceREBAR_ELBO, temperature=0.7), REAL, 1),
    "rebar uncoupled": (of(TraceREBAR_ELBO, coupled=False), REAL, 1),
    "rebar leave one out": (of(TraceREBAR_ELBO, leave_one_out=True), REAL, 2),
    "rebar fixed": (of(TraceREBAR_ELBO, learn=False), REAL, 1),
    "relax": (of(TraceRELAX_ELBO, hidden_dims=(5,)), ALL, 1),
    "relax uncoupled": (of(TraceRELAX_ELBO, hidden_dims=(5,), coupled=False), ALL, 1),
    "relax own": (relax_own, ALL, 1),
}


def stir(objective, size=0.3):
    """Learned parts away from where they start (networks start at zero)."""
    learned = getattr(objective, "learned", None)
    with torch.no_grad():
        for parameter in learned.parameters() if learned is not None else ():
            parameter.add_(size * torch.randn_like(parameter))


def deviation(problem, objective):
    """The largest difference of mean and exact gradient over coordinates, in standard errors."""
    p = problem.leaves(problem.copies, *[1] * problem.num_plates)
    model, guide = problem.pair(p)
    objective.differentiable_loss(model, guide)  # makes the learned parts
    stir(objective)
    problem.seen.clear()
    loss = objective.differentiable_loss(model, guide)
    (gradient,) = torch.autograd.grad(loss, p)
    assert all(torch.equal(index, problem.seen[0]) for index in problem.seen)  # one subsample
    _, exact = problem.exact(problem.seen[0])
    gradient = gradient.reshape(problem.copies, -1)
    error = gradient.std(0) / problem.copies**0.5
    return ((gradient.mean(0) - exact).abs() / (error + 1e-12)).max().item()


#: name -> a case that is sharp for it: kind, layers, pooled, particles, vectorised
SHARP = {
    "score": ("index", 2, True, 2, True),
    "score all": ("scalar", 2, True, 1, True),
    "rloo": ("one hot", 2, True, 2, True),
    "nvil": ("index", 2, True, 2, True),
    "muprop": ("one hot", 2, True, 2, True),
    "arm": ("event", 2, True, 2, True),
    "disarm": ("scalar", 3, False, 2, False),
    "rebar": ("event", 2, True, 1, True),
    "rebar uncoupled": ("one hot", 2, True, 2, True),
    "rebar leave one out": ("scalar", 3, True, 2, False),
    "rebar fixed": ("scalar", 2, False, 1, True),
    "relax": ("index", 2, True, 2, True),
    "relax uncoupled": ("event", 2, True, 1, True),
    "relax own": ("one hot", 2, True, 2, True),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mean_gradient_is_that_by_enumeration(name):
    kind, layers, pooled, num_particles, vectorized = SHARP.get(name, ("scalar", 2, True, 2, True))
    objective = ESTIMATORS[name][0](kind, num_particles, vectorize_particles=vectorized)
    assert deviation(Problem(kind, layers, pooled), objective) < 4


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mean_gradient_in_crossed_plates(name):
    factory, _, fewest = ESTIMATORS[name]
    assert deviation(Grid(), factory("scalar", fewest)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("particles", [(1, True), (2, True), (3, False)], ids=str)
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_mean_gradient_everywhere(name, kind, layers, pooled, particles):
    """About 600 cases of about ten coordinates: 4.5 standard errors."""
    factory, kinds, fewest = ESTIMATORS[name]
    num_particles, vectorized = particles
    if kind not in kinds or num_particles < fewest:
        pytest.skip("not for this estimator")
    objective = factory(kind, num_particles, vectorize_particles=vectorized)
    assert deviation(Problem(kind, layers, pooled), objective) < 4.5


# Planted faults: each is seen by the same check.


def test_a_baseline_that_sees_its_own_draw_is_rejected(monkeypatch):
    monkeypatch.setattr(leave_one_out, "without_mean_of_others", lambda f, run: f - f.mean(0))
    assert deviation(Problem("scalar", 2), TraceRLOO_ELBO(2)) > 6


def test_without_the_weight_of_disarm_the_gradient_is_rejected(monkeypatch):
    def weigh(difference, logits, b, other, u):
        return 0.5 * difference * (1 - 2 * other) * (b != other)

    monkeypatch.setattr(TraceDisARM_ELBO, "_weigh", staticmethod(weigh))
    assert deviation(Problem("scalar", 2), TraceDisARM_ELBO(1)) > 6


@pytest.mark.parametrize("name", ["rebar", "rebar uncoupled", "relax", "relax own"])
def test_without_the_path_of_z_given_b_the_gradient_is_rejected(name, monkeypatch):
    given = relaxations.BERNOULLI.given
    monkeypatch.setattr(
        type(relaxations.BERNOULLI), "given", lambda self, *args: given(*args).detach()
    )
    assert deviation(Problem("scalar", 2), ESTIMATORS[name][0]("scalar", 1)) > 6


@pytest.mark.parametrize("name", ["arm", "disarm", "rebar", "relax"])
def test_later_draws_that_stay_are_rejected(name, monkeypatch):
    """They were drawn given the value that is changed: the fault of a relaxation of all at once."""
    monkeypatch.setattr(branches, "descendants", lambda run: {"b0": set(), "b1": set()})
    objective = ESTIMATORS[name][0]("scalar", 1)
    with pytest.raises(ValueError, match="guide site 'b1' depends on an earlier discrete draw"):
        deviation(Problem("scalar", 2), objective)
    with pyro.validation_enabled(False):
        assert deviation(Problem("scalar", 2), objective) > 6


# --- what the base class does --------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_parameters_shared_by_all_copies_get_the_sum_of_their_gradients(name):
    """Learned parts do not move the gradient of the guide by where its leaves are."""
    problem = Problem("scalar", 2, copies=50)
    gradients = []
    for batch in ((50, 1), ()):
        pyro.clear_param_store()
        objective, p = ESTIMATORS[name][0]("scalar", 2), problem.leaves(*batch)
        pyro.set_rng_seed(3)
        loss = objective.differentiable_loss(*problem.pair(p))
        gradients.append(torch.autograd.grad(loss, p)[0].reshape(-1, p.shape[-1]).sum(0))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_loss_is_the_elbo_of_the_same_draws(name):
    """What the estimator draws for itself is drawn last; a loss needs none of it."""
    problem = Problem("scalar", 2, copies=50)
    pair, objective = problem.pair(problem.leaves(50, 1)), ESTIMATORS[name][0]("scalar", 2)
    stock = Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=2)
    losses = []
    for loss in (stock.loss, objective.loss, objective.loss_and_grads, objective.loss_and_grads):
        pyro.set_rng_seed(5)
        losses.append(loss(*pair))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loss_makes_the_learned_parts_that_a_gradient_makes(name):
    problem = Problem("scalar", 2, copies=2)
    pair, names = problem.pair(problem.leaves(2, 1)), []
    for call in ("loss", "loss_and_grads"):
        pyro.clear_param_store()
        getattr(ESTIMATORS[name][0]("scalar", 2), call)(*pair)
        names.append(sorted(pyro.get_param_store().keys()))
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_draws_with_nothing_to_learn_may_have_any_distribution(name):
    """Here a Poisson of the guide that has no parameters, between two Bernoulli that have."""
    copies = pyro.plate("copies", 20_000)
    counts = torch.arange(40.0)
    fixed = dist.Poisson(torch.tensor(1.3))

    def pair(p):
        def guide():
            with copies:
                a = pyro.sample("a", dist.Bernoulli(logits=p[..., 0]))
                n = pyro.sample("n", fixed)
                pyro.sample("b", dist.Bernoulli(logits=p[..., 1] * a - 0.2 * n))

        def model():
            with copies:
                a = pyro.sample("a", dist.Bernoulli(0.4))
                n = pyro.sample("n", dist.Poisson(1.0 + a))
                b = pyro.sample("b", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(a - b + 0.3 * n, 1.0), obs=torch.tensor(0.7))

        return model, guide

    def exact():
        p, loss = torch.tensor([0.3, 0.8], requires_grad=True), 0.0
        for a, b in itertools.product([0.0, 1.0], repeat=2):
            log_q = fixed.log_prob(counts) + dist.Bernoulli(logits=p[0]).log_prob(torch.tensor(a))
            second = dist.Bernoulli(logits=p[1] * a - 0.2 * counts)
            log_q = log_q + second.log_prob(torch.tensor(b))
            log_p = dist.Bernoulli(0.4).log_prob(torch.tensor(a)) + math.log(0.5)
            log_p = log_p + dist.Poisson(1.0 + a).log_prob(counts)
            log_p = log_p + dist.Normal(a - b + 0.3 * counts, 1.0).log_prob(torch.tensor(0.7))
            loss = loss - (log_q.exp() * (log_p - log_q)).sum()
        return torch.autograd.grad(loss, p)[0]

    p = torch.tensor([0.3, 0.8]).expand(20_000, 2).clone().requires_grad_()
    objective = ESTIMATORS[name][0]("scalar", 2)
    (gradient,) = torch.autograd.grad(objective.differentiable_loss(*pair(p)), p)
    error = gradient.std(0) / 20_000**0.5
    assert ((gradient.mean(0) - exact()).abs() < 4 * error).all()


def test_draws_in_another_order_are_an_error():
    orders = itertools.cycle([("a", "b"), ("b", "a")])

    def model():
        for name in "ab":
            pyro.sample(name, dist.Bernoulli(0.5))

    def guide():
        for name in next(orders):
            pyro.sample(name, dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    objective = TraceScore_ELBO(2, vectorize_particles=False)
    with pytest.raises(NotImplementedError, match="site '[ab]' is in one particle.*another place"):
        objective.loss_and_grads(model, guide)

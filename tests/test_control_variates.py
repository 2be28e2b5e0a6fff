"""Learned control variates: what they learn from, what they see, and that nothing else moves."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_vi_ext import TraceREBAR_ELBO, TraceRELAX_ELBO
from pyro_vi_ext.control_variates import (
    ControlledObjective,
    SiteModules,
    context,
    features,
    inputs,
    mlp,
)
from pyro_vi_ext.discrete import Site

from .enumerating import Problem

pytestmark = pytest.mark.usefixtures("float64")

CONTROLLED = {
    "rebar": TraceREBAR_ELBO,
    "rebar uncoupled": lambda **o: TraceREBAR_ELBO(coupled=False, **o),
    "rebar leave one out": lambda **o: TraceREBAR_ELBO(leave_one_out=True, **o),
    "relax": lambda **o: TraceRELAX_ELBO(hidden_dims=(3,), **o),
    "relax uncoupled": lambda **o: TraceRELAX_ELBO(hidden_dims=(3,), coupled=False, **o),
}
every = pytest.mark.parametrize("name", CONTROLLED)


# --- what is learned -----------------------------------------------------------------------------


def stirred(name, kind="scalar", **options):
    """A problem of a chain beside continuous draws; an objective, its learned parts moved."""
    problem = Problem(kind, 2, copies=3)
    p = problem.leaves(1)  # g is summed over the copies
    pair = problem.pair(p)
    objective = CONTROLLED[name](num_particles=2, **options)
    objective.differentiable_loss(*pair)
    with torch.no_grad():
        for parameter in objective.learned.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return objective, pair, p


def gradients(objective, pair, leaves, seed=1):
    pyro.set_rng_seed(seed)
    return torch.autograd.grad(objective.differentiable_loss(*pair), leaves)


@every
@pytest.mark.parametrize("vectorized", [True, False])
def test_control_variates_learn_from_the_squared_gradient(name, vectorized):
    """Their gradient is that of sum g^2 at the same noise, by finite differences."""
    objective, pair, p = stirred(name, vectorize_particles=vectorized)
    learned = list(objective.learned.parameters())
    slopes = gradients(objective, pair, learned)

    def square():
        return gradients(objective, pair, [p])[0].square().sum().item()

    step = 1e-5
    for parameter, slope in zip(learned, slopes, strict=True):
        flat, slope = parameter.data.view(-1), slope.reshape(-1)
        for k in {0, len(flat) - 1}:
            start, values = flat[k].item(), []
            for sign in (1, -1):
                flat[k] = start + sign * step
                values.append(square())
            flat[k] = start
            found = slope[k].item()
            assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-5)
    assert sum(slope.abs().sum() for slope in slopes) > 1e-3


@every
def test_neither_guide_nor_model_sees_what_control_variates_learn_from(name):
    """Their gradient is the same when there is nothing to learn."""
    objective, pair, p = stirred(name)
    (learning,) = gradients(objective, pair, [p])
    objective.learned.requires_grad_(False)
    pyro.clear_param_store()
    (fixed,) = gradients(objective, pair, [p])
    torch.testing.assert_close(learning, fixed, rtol=1e-12, atol=1e-12)


def test_a_gradient_of_the_variance_that_reaches_the_guide_is_rejected(monkeypatch):
    of = ControlledObjective.combine

    def leaking(outputs, cotangents, pathwise, learned):
        leak = sum(cotangent.square().sum() for cotangent in cotangents)
        leak = leak + sum(output.square().sum() for output in outputs)
        return of(outputs, cotangents, pathwise, learned) - leak * bool(learned)

    monkeypatch.setattr(ControlledObjective, "combine", staticmethod(leaking))
    with pytest.raises(AssertionError):
        test_neither_guide_nor_model_sees_what_control_variates_learn_from("rebar")
    with pytest.raises(AssertionError):
        test_control_variates_learn_from_the_squared_gradient("rebar", True)


def test_combine_by_hand():
    """g = psi x for one leaf, and a path of its own: sum (g + path)^2."""
    phi, psi = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([3.0, -1.0])
    pathwise = (phi**3).sum()
    scalar = pathwise + ControlledObjective.combine([2 * phi], [psi * x], pathwise, [psi])
    own, slope = torch.autograd.grad(scalar, [phi, psi], retain_graph=True)
    g = 2 * psi * x + 3 * phi**2
    torch.testing.assert_close(own, g)
    torch.testing.assert_close(slope, -(2 * g * 2 * x).sum())
    scalar = pathwise + ControlledObjective.combine([2 * phi], [psi * x], pathwise, [])
    torch.testing.assert_close(torch.autograd.grad(scalar, phi)[0], g)


# --- names and parameters ------------------------------------------------------------------------


def bit(name="b"):
    def model():
        b = pyro.sample(name, dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.8))

    def guide():
        pyro.sample(name, dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    return model, guide


@every
def test_parameters_are_complete_after_the_first_call(name):
    objective = CONTROLLED[name](num_particles=2)
    module = objective(*bit())
    module()
    names = [key for key, _ in module.named_parameters()]
    learned = {id(parameter) for parameter in objective.learned.parameters()}
    assert "logit" in names and len(names) == 1 + len(learned) > 2
    assert learned < {id(parameter) for parameter in module.parameters()}
    module()
    assert [key for key, _ in module.named_parameters()] == names


@every
def test_two_live_objectives_of_one_name_are_refused(name):
    first, second = (CONTROLLED[name](num_particles=2) for _ in range(2))
    first.loss_and_grads(*bit())
    with pytest.raises(ValueError, match="Two live objects.*name=.*clear_param_store"):
        second.loss_and_grads(*bit())
    CONTROLLED[name](num_particles=2, name="another").loss_and_grads(*bit())
    assert any(key.startswith("another$$$") for key in pyro.get_param_store())


@pytest.mark.parametrize("site", ["type", "keys", "a.b", "net.0.weight", "_"])
def test_a_site_may_have_any_name(site):
    for cls in (TraceREBAR_ELBO, TraceRELAX_ELBO):
        pyro.clear_param_store()
        assert math.isfinite(cls().loss_and_grads(*bit(site)))


def test_sites_of_similar_names_have_parts_of_their_own():
    def model():
        for name in ("a.b", "a_b"):
            pyro.sample(name, dist.Bernoulli(0.4))

    def guide():
        p = pyro.param("p", torch.tensor([0.3, 0.6]))
        for name, probs in zip(("a.b", "a_b"), p, strict=True):
            pyro.sample(name, dist.Bernoulli(probs))

    objective = TraceREBAR_ELBO()
    objective.loss_and_grads(model, guide)
    assert len(list(objective.learned.parameters())) == 4


@every
def test_svi_trains_the_learned_parts(name):
    objective = CONTROLLED[name](num_particles=2)
    svi = SVI(*bit(), pyro.optim.Adam({"lr": 0.05}), loss=objective)
    svi.step()
    before = [parameter.detach().clone() for parameter in objective.learned.parameters()]
    for _ in range(5):
        svi.step()
    after = list(objective.learned.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > len(moved) / 2 and all(p.isfinite().all() for p in after)


# --- the parts -----------------------------------------------------------------------------------


def test_modules_of_a_site_are_made_once_in_its_precision_without_random_numbers():
    class Seen:
        name, log_q = "b", torch.zeros(2, dtype=torch.float32)

    modules = SiteModules()
    pyro.set_rng_seed(0)
    expected = torch.randn(3)
    pyro.set_rng_seed(0)
    made = modules.at(Seen, lambda: nn.Linear(2, 2))
    assert torch.equal(torch.randn(3), expected)
    assert modules.at(Seen, lambda: nn.Linear(5, 5)) is made is modules.get("b")
    assert made.weight.dtype == torch.float32 and modules.get("c") is None
    assert len(list(modules.parameters())) == 2


def test_a_network_is_zero_at_first_and_has_gradients():
    network = mlp(3, (4, 5))
    out = network(torch.randn(6, 2, 3))
    assert out.shape == (6, 2, 1) and not out.any()
    out.sum().backward()
    assert network[-1].weight.grad.abs().sum() > 0
    assert mlp(3, ())(torch.randn(2, 3)).shape == (2, 1)


def sites_of(num_particles=3, vectorized=True):
    """Sites of all, of rows, and of cells, and the run they are of."""
    x = torch.arange(6.0).reshape(2, 3)

    def pair(sample_x):
        def fn():
            rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
            pyro.sample("g", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            with rows:
                pyro.sample("r", dist.Bernoulli(0.5))
                if sample_x:
                    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor([[7.0], [8.0]]))
            with columns:
                pyro.sample("c", dist.Categorical(torch.ones(2, 2, 5)[0, 0]))
            with rows, columns:
                pyro.sample("e", dist.OneHotCategorical(torch.ones(5) / 5))
                if sample_x:
                    with poutine.mask(mask=x > 0):
                        data = torch.where(x > 0, x, float("nan"))
                        pyro.sample("x", dist.Normal(0.0, 1.0), obs=data)

        return fn

    objective = TraceREBAR_ELBO(num_particles, vectorize_particles=vectorized)
    with pyro.validation_enabled(False):
        run = objective._run(pair(True), pair(False), (), {})
    return {name: Site(name, run, []) for name in "grce"}


@pytest.mark.parametrize("vectorized", [True, False])
def test_context_is_what_may_be_known_of_a_unit(vectorized):
    """Earlier draws in no other plates, and data that tell units apart; finite where masked."""
    sites = sites_of(vectorized=vectorized)
    assert context(sites["g"]) is None  # no data for one unit of all
    rows = context(sites["r"])  # g, x of the row, y
    assert rows.shape == (3, 2, 1, 4 + 3 + 1)
    assert torch.equal(rows[0, :, 0, 4], torch.tensor([7.0, 8.0]).asinh())
    assert context(sites["c"]).shape == (3, 1, 3, 4 + 2)
    cells = context(sites["e"])  # g, r, c, x
    assert cells.shape == (3, 2, 3, 4 + 1 + 1 + 1) and cells.isfinite().all()
    torch.testing.assert_close(cells[1, 1, :, -1], torch.tensor([3.0, 4.0, 5.0]).asinh())
    assert torch.equal(cells[..., 4], sites["r"].value.expand(3, 2, 3))
    assert torch.equal(cells[..., 5], sites["c"].value.expand(3, 2, 3).double())
    assert not cells.requires_grad
    assert inputs(sites["e"], sites["e"].value).shape == (3, 2, 3, 5 + 7)


def test_features_of_a_unit_come_last():
    site = sites_of()["r"]
    value = torch.randn(3, 2, 3, 5)
    found = features(value, site)
    assert found.shape == (3, 2, 1, 15)
    torch.testing.assert_close(found.sum(-1)[..., 0], value.sum((2, 3)))
    assert features(value[:, :, :1, 0], site).shape == (3, 2, 1, 1)


def test_a_context_of_the_future_is_rejected(monkeypatch):
    """A network that sees its own draw has another mean: the check of test_discrete sees it."""
    from . import test_discrete

    objective = test_discrete.ESTIMATORS["relax"][0]("scalar", 1)
    assert test_discrete.deviation(Problem("scalar", 2), objective) < 4
    pyro.clear_param_store()

    def peeking(site, value):
        own = features(site.value, site)
        return torch.cat([features(value, site), own], -1)

    monkeypatch.setattr("pyro_vi_ext.relax.inputs", peeking)
    objective = test_discrete.ESTIMATORS["relax"][0]("scalar", 1)
    assert test_discrete.deviation(Problem("scalar", 2), objective) > 6

"""Plates, factors and data that tempt a control variate into counting twice or seeing its draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import (
    TraceARM_ELBO,
    TraceConcrete_ELBO,
    TraceDisARM_ELBO,
    TraceLAX_ELBO,
    TraceMuProp_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
    TraceScore_ELBO,
)
from pyro_vi_ext.enumeration import enumerated_elbo

pytestmark = pytest.mark.usefixtures("float64")

NUM = 2000  # particles
OBJECTIVES = {
    "REBAR": lambda: TraceREBAR_ELBO(NUM),
    "REBAR, uncoupled": lambda: TraceREBAR_ELBO(NUM, coupled=False),
    "RELAX": lambda: TraceRELAX_ELBO(num_particles=NUM),
    "MuProp": lambda: TraceMuProp_ELBO(NUM),
    "DisARM": lambda: TraceDisARM_ELBO(NUM),
    "ARM": lambda: TraceARM_ELBO(NUM),
    "NVIL": lambda: TraceNVIL_ELBO(num_particles=NUM),
}


@pytest.fixture
def logits():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return torch.tensor([0.3, -0.5, 0.8], requires_grad=True)


def deviation(objective, model, guide, parameter, exact, num_repeats=40):
    """Of the mean gradient from the exact one, in standard errors; the largest coordinate."""
    draws = torch.stack(
        [
            torch.autograd.grad(objective.differentiable_loss(model, guide), parameter)[0]
            for _ in range(num_repeats)
        ]
    )
    error = draws.std(0) / num_repeats**0.5
    return ((draws.mean(0) - exact).abs() / error).max().item()


def check(objective, model, guide, parameter):
    exact = torch.autograd.grad(-enumerated_elbo(model, guide), parameter)[0]
    assert deviation(objective, model, guide, parameter, exact) < 4


def summed_model():
    with pyro.plate("a", 3):
        b = pyro.sample("b", dist.Bernoulli(0.4))
    pyro.sample("x", dist.Normal(b.sum(-1, keepdim=True), 0.7), obs=torch.tensor(2.2))


def plated_guide(logits):
    def guide():
        with pyro.plate("a", 3):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    return guide


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_datum_outside_the_plate_counts_once(name, logits):
    check(OBJECTIVES[name](), summed_model, plated_guide(logits), logits)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_datum_in_the_outer_of_two_plates_counts_once(name, logits):
    def model():
        with pyro.plate("n", 2, dim=-1):
            with pyro.plate("t", 3, dim=-2):
                b = pyro.sample("b", dist.Bernoulli(0.4))
            total = b.sum(-2, keepdim=True)
            x = torch.tensor([0.2, 2.9])
            pyro.sample("x", dist.Normal(total, 0.7), obs=x)

    def guide():
        with pyro.plate("n", 2, dim=-1), pyro.plate("t", 3, dim=-2):
            pyro.sample("b", dist.Bernoulli(logits=logits.unsqueeze(-1)))

    check(OBJECTIVES[name](), model, guide, logits)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_factor_of_the_guide_after_the_last_draw(name, logits):
    def model():
        b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide(factor=True):
        b = pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
        if factor:
            pyro.factor("f", 2.0 * b.prod(-1), has_rsample=True)

    def model_with_factor():
        b = pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor(1.0))
        pyro.factor("f", -2.0 * b.prod(-1))

    exact = enumerated_elbo(model_with_factor, lambda: guide(False))
    exact = torch.autograd.grad(-exact, logits)[0]
    assert deviation(OBJECTIVES[name](), model, guide, logits, exact) < 4


def test_ones_own_control_variate_that_sums_over_the_units(logits):
    def shared(sites):
        return sites["b"].sigmoid().sum(-1, keepdim=True)

    objective = TraceRELAX_ELBO(shared, num_particles=NUM)
    check(objective, summed_model, plated_guide(logits), logits)

    def mixing(sites):
        return sites["b"].sigmoid().sum(-1, keepdim=True).expand(sites["b"].shape)

    with pytest.raises(ValueError, match="one unit of site 'b' depends on the draws of other"):
        TraceRELAX_ELBO(mixing, num_particles=2).differentiable_loss(
            summed_model, plated_guide(logits)
        )


def test_ones_own_control_variate_of_continuous_draws():
    loc = torch.tensor([0.3, -0.5, 0.8], requires_grad=True)

    def model():
        with pyro.plate("a", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.7), obs=torch.tensor(2.2))

    def guide():
        with pyro.plate("a", 3):
            pyro.sample("z", dist.Normal(loc, 0.5))

    exact = loc.detach() + (loc.detach().sum() - 2.2) / 0.49
    objective = TraceLAX_ELBO(lambda sites: (sites["z"] ** 2).sum(-1, keepdim=True), NUM)
    assert deviation(objective, model, guide, loc, exact) < 4
    with pytest.raises(ValueError, match="one unit of site 'z' depends on the draws of other"):
        mixing = TraceLAX_ELBO(lambda sites: sites["z"] * sites["z"].sum(-1, keepdim=True), 2)
        mixing.differentiable_loss(model, guide)


@pytest.mark.parametrize(
    "make",
    [lambda: TraceNVIL_ELBO(num_particles=50), lambda: TraceRELAX_ELBO(num_particles=50)],
    ids=["NVIL", "RELAX"],
)
def test_data_that_are_functions_of_the_draw_are_no_input(make, logits):
    x = torch.tensor([0.4, 1.9, -0.7])

    def model():
        with pyro.plate("a", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(0.0, 0.7), obs=x - b)

    guide, objective = plated_guide(logits), make()
    objective.differentiable_loss(model, guide)
    learned = [p for p in objective.learned.parameters() if p.requires_grad]
    if learned:
        adam = torch.optim.Adam(learned, lr=0.02)
        for _ in range(60):
            loss = objective.differentiable_loss(model, guide)
            slopes = torch.autograd.grad(loss, learned)
            for parameter, slope in zip(learned, slopes, strict=True):
                parameter.grad = slope
            adam.step()
    exact = torch.autograd.grad(-enumerated_elbo(model, guide), logits)[0]
    assert deviation(objective, model, guide, logits, exact, 400) < 4


@pytest.mark.parametrize("make", [TraceREBAR_ELBO, TraceRELAX_ELBO, TraceNVIL_ELBO])
def test_a_first_call_without_gradients_makes_what_is_learned(make, logits):
    def model(x):
        with pyro.plate("a", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        plated_guide(logits)()

    module = make()(model, guide)
    state = torch.get_rng_state()
    with torch.no_grad():
        first = module(torch.zeros(3))
    held = {id(p) for p in module.parameters()}
    learned = list(module.elbo.learned.parameters())
    assert learned and all(id(p) in held for p in learned)
    torch.set_rng_state(state)
    assert torch.equal(first, module(torch.zeros(3)).detach())  # its set-up drew nothing


@pytest.mark.parametrize("make", [TraceREBAR_ELBO, TraceRELAX_ELBO, TraceMuProp_ELBO])
def test_excluded_categories(make):
    weights = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.5, 0.2]], requires_grad=True)
    excluded = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])

    def model():
        with pyro.plate("a", 2):
            b = pyro.sample("b", dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2])))
            loc = (b * torch.tensor([-1.0, 0.5, 2.0])).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.3, 1.0]))

    def guide():
        with pyro.plate("a", 2):
            pyro.sample("b", dist.OneHotCategorical(logits=weights + excluded))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    draws = torch.stack(
        [
            torch.autograd.grad(
                make(
                    num_particles=500, **({} if make is TraceMuProp_ELBO else {"name": str(k)})
                ).differentiable_loss(model, guide),
                weights,
            )[0]
            for k in range(30)
        ]
    )
    stock = torch.stack(
        [
            torch.autograd.grad(TraceScore_ELBO(20000).differentiable_loss(model, guide), weights)[
                0
            ]
            for _ in range(30)
        ]
    )
    error = ((draws.var(0) + stock.var(0)) / 30).sqrt()
    assert bool(((draws.mean(0) - stock.mean(0)).abs() <= 4 * error + 1e-12).all())


def test_default_networks_take_data_of_any_dtype(logits):
    def model(x, n):
        with pyro.plate("a", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)
            pyro.sample("n", dist.Poisson(1.0 + b), obs=n)

    def guide(x, n):
        plated_guide(logits)()

    for make in (TraceNVIL_ELBO, TraceRELAX_ELBO):
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            pyro.clear_param_store()
            loss = make().differentiable_loss(model, guide, torch.zeros(3), torch.arange(3))
            assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_concrete_leaves_a_point_mass_alone():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(b + z, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("b", dist.Delta(torch.tensor(1.0)))
        pyro.sample("z", dist.Bernoulli(0.4))

    def without():
        pyro.sample("z", dist.Bernoulli(0.4))

    losses = []
    for pair in (
        (model, guide),
        (pyro.poutine.condition(model, {"b": torch.tensor(1.0)}), without),
    ):
        pyro.set_rng_seed(1)
        losses.append(TraceConcrete_ELBO(num_particles=3).loss(*pair))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)

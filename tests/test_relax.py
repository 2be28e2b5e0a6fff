"""RELAX: control variates of one's own and learned ones; what they see, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_vi_ext import TraceREBAR_ELBO, TraceRELAX_ELBO, TraceScore_ELBO

from .enumerating import Problem

pytestmark = pytest.mark.usefixtures("float64")

X = 0.8


def bits(logits, fn=lambda logits: dist.Bernoulli(logits=logits), prior=0.0):
    """One draw for each row of logits, and x of each."""

    def plate():
        return pyro.plate("data", logits.shape[0])

    def model(*args, **kwargs):
        with plate():
            b = pyro.sample("b", fn(torch.full_like(logits, prior)))
            loc = b if logits.dim() == 1 else b @ torch.arange(1.0, 4.0)
            pyro.sample("x", dist.Normal(loc, 0.5), obs=torch.full(logits.shape[:1], X))

    def guide(*args, **kwargs):
        with plate():
            pyro.sample("b", fn(logits))

    return model, guide


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, sites):
        s = sites["b"].sigmoid()
        return self.weight[0] + self.weight[1] * s + self.weight[2] * s**2


# --- the default control variate -----------------------------------------------------------------


def test_at_first_it_is_rebar():
    """r = 0: the same gradient from the same noise."""
    gradients = []
    for cls in (TraceREBAR_ELBO, TraceRELAX_ELBO):
        problem = Problem("scalar", 2, copies=20)
        p = problem.leaves(20, 1)
        objective = cls(num_particles=2)
        objective.loss(*problem.pair(p))
        pyro.set_rng_seed(2)
        gradients += torch.autograd.grad(objective.differentiable_loss(*problem.pair(p)), p)
    torch.testing.assert_close(*gradients)


def test_an_index_has_the_network_alone():
    """Whose gradient is at first that of the score function."""
    problem, gradients = Problem("index", 2, copies=20), []
    relax = TraceRELAX_ELBO(num_particles=2, hidden_dims=(4,))
    for objective in (TraceScore_ELBO(2), relax):
        p = problem.leaves(20, 1)
        objective.loss(*problem.pair(p))
        pyro.set_rng_seed(2)
        gradients += torch.autograd.grad(objective.differentiable_loss(*problem.pair(p)), p)
    torch.testing.assert_close(*gradients)
    assert not list(relax.constants.parameters()) and list(relax.networks.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: TraceRELAX_ELBO(hidden_dims=(8,)),
        lambda: TraceRELAX_ELBO(hidden_dims=(8,), coupled=False),
        lambda: TraceRELAX_ELBO(Quadratic()),
        lambda: TraceRELAX_ELBO(Quadratic(), coupled=False),
    ],
    ids=["coupled", "uncoupled", "own", "own uncoupled"],
)
def test_training_lowers_the_variance(make):
    logits = torch.full((300,), 0.4, requires_grad=True)
    pair, objective = bits(logits), make()

    def spread():
        losses = [objective.differentiable_loss(*pair) for _ in range(20)]
        return torch.cat([torch.autograd.grad(loss, logits)[0] for loss in losses]).var().item()

    before = spread()
    learned = list(objective.learned.parameters())
    adam = torch.optim.Adam(learned, lr=0.03)
    for _ in range(120):
        slopes = torch.autograd.grad(objective.differentiable_loss(*pair), learned)
        for parameter, slope in zip(learned, slopes, strict=True):
            parameter.grad = slope
        adam.step()
    assert spread() < 0.3 * before


def test_svi_trains_guide_and_network_together():
    fn = dist.OneHotCategorical

    def guide():
        logits = pyro.param("logits", torch.zeros(20, 3))
        with pyro.plate("data", 20):
            pyro.sample("b", fn(logits=logits))

    model, _ = bits(torch.zeros(20, 3), lambda logits: fn(logits=logits))
    objective = TraceRELAX_ELBO(num_particles=5, hidden_dims=(8,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    for _ in range(120):
        svi.step()
    log_p = dist.Normal(torch.arange(1.0, 4.0), 0.5).log_prob(torch.tensor(X))
    found = pyro.param("logits").softmax(-1).mean(0)
    assert (found - log_p.softmax(0)).abs().max() < 0.03
    assert any(p.any() for p in objective.networks.get("b")[-1].parameters())


# --- control variates of one's own ---------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("kind", ["scalar", "event", "one hot", "index"])
def test_what_a_control_variate_is_called_with(kind, vectorized):
    """Earlier discrete draws, hard; its own z, in logit space; the arguments of the pair."""
    calls = []

    def control_variate(sites, *args, **kwargs):
        calls.append((dict(sites), args, kwargs))
        (*_, z) = sites.values()
        return 0.0 * (z if kind == "scalar" else z.sum(-1))

    problem = Problem(kind, 2, copies=5)
    model, guide = problem.pair(problem.leaves(5, 1))

    def taking(fn):
        return lambda data, flag=False: fn()

    objective = TraceRELAX_ELBO(control_variate, 3, vectorize_particles=vectorized)
    objective.loss_and_grads(taking(model), taking(guide), X, flag=True)
    width, num = {"scalar": (), "event": (2,)}.get(kind, (3,)), 3 if vectorized else 1
    lead = (3,) if vectorized else ()
    own = [list(sites) for sites, _, _ in calls]
    assert own == [["b0"]] * (3 // num) + [["b0", "b1"]] * (3 // num)
    for sites, args, kwargs in calls:
        assert args == (X,) and kwargs == {"flag": True}
        units = {"b0": (5, 1), "b1": (5, 3)}
        *earlier, name = sites
        assert sites[name].shape == lead + units[name] + width
        assert ((sites[name] < 0) | (sites[name] > 1)).any()  # not relaxed
        for other in earlier:
            value = sites[other]
            event = () if kind == "index" else width
            assert value.shape == lead + units[other] + event and not value.requires_grad
            assert torch.equal(value, value.round())


def test_uncoupled_it_is_called_at_two_values_of_z():
    """On the same side, since z is of the same draw b, with noise of their own."""
    seen = []

    def control_variate(sites):
        seen.append(sites["b"].detach())
        return sites["b"].sigmoid()

    logits = torch.full((4000,), 0.4, requires_grad=True)
    for coupled, calls in ((True, 1), (False, 2)):
        seen.clear()
        objective = TraceRELAX_ELBO(control_variate, coupled=coupled)
        objective.loss_and_grads(*bits(logits))
        assert len(seen) == calls
    given, free = seen
    assert torch.equal(given > 0, free > 0) and not torch.equal(given, free)


@pytest.mark.parametrize(
    "control_variate", [lambda sites: torch.tensor(-1.5), lambda sites: torch.zeros(20).sum()]
)
@pytest.mark.parametrize("coupled", [True, False])
def test_a_control_variate_without_z_is_a_baseline(control_variate, coupled):
    """Of the score function, by hand."""
    logits = torch.full((20,), 0.4, requires_grad=True)
    objective = TraceRELAX_ELBO(control_variate, 2, coupled=coupled)
    gradients = []
    for one in (objective, TraceScore_ELBO(2)):
        one.loss(*bits(logits))
        pyro.set_rng_seed(2)
        gradients += torch.autograd.grad(one.differentiable_loss(*bits(logits)), logits)
    pyro.set_rng_seed(2)
    b = torch.bernoulli(logits.detach().sigmoid().expand(2, 20))
    shift = control_variate({}) * (b - logits.detach().sigmoid()).mean(0)
    torch.testing.assert_close(gradients[0], gradients[1] + shift)


def test_a_learned_constant_is_a_baseline_too():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.3))

        def forward(self, sites):
            return 1.0 * self.value

    logits = torch.full((20,), 0.4, requires_grad=True)
    control_variate = Constant()
    TraceRELAX_ELBO(control_variate, 2).loss_and_grads(*bits(logits))
    assert control_variate.value.grad.abs() > 1e-3


def test_a_function_has_nothing_to_learn():
    logits = torch.zeros(5, requires_grad=True)
    module = TraceRELAX_ELBO(lambda sites: sites["b"].sigmoid())(*bits(logits))
    module().backward()
    assert list(module.parameters()) == [] and len(pyro.get_param_store()) == 0
    assert logits.grad.abs().sum() > 0


def test_parameters_of_a_control_variate_of_ones_own_are_trained():
    logits, control_variate = torch.zeros(5, requires_grad=True), Quadratic()
    module = TraceRELAX_ELBO(control_variate, 3)(*bits(logits))
    module().backward()
    assert [id(p) for p in module.parameters()] == [id(control_variate.weight)]
    assert control_variate.weight.grad.abs().sum() > 0


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, found",
    [
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(4, 1), r"shape \(4, 1\)"),
        (torch.zeros(7, 2, 5), r"shape \(7, 2, 5\)"),
        (1.0, "float"),
        (None, "NoneType"),
    ],
)
@pytest.mark.parametrize("vectorized", [True, False])
def test_another_shape_than_one_value_per_unit_is_refused(value, found, vectorized):
    logits = torch.zeros(5, requires_grad=True)
    objective = TraceRELAX_ELBO(lambda sites: value, 2, vectorize_particles=vectorized)
    message = f"control variate returned {found} for site 'b'.*one value per unit.*batch shape"
    with pytest.raises(ValueError, match=message):
        objective.loss_and_grads(*bits(logits))


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="control_variate must be a module or function.*got int"):
        TraceRELAX_ELBO(5)


@pytest.mark.parametrize("own", [True, False])
def test_other_distributions_are_refused_by_name(own):
    p = torch.zeros((), requires_grad=True)

    def pair(p):
        return lambda: pyro.sample("k", dist.Poisson(p.exp()))

    objective = TraceRELAX_ELBO((lambda sites: sites["k"]) if own else None)
    with pytest.raises(NotImplementedError, match="site 'k' is a Poisson.*TraceRLOO_ELBO"):
        objective.loss_and_grads(pair(torch.zeros(())), pair(p))


def test_a_later_draw_without_a_relaxation_leaves_the_network():
    p = torch.tensor(0.3, requires_grad=True)

    def pair(p):
        def fn():
            b = pyro.sample("b", dist.Bernoulli(logits=p))
            pyro.sample("n", dist.Poisson(1.5 + b))

        return fn

    objective = TraceRELAX_ELBO(num_particles=2)
    assert math.isfinite(objective.loss_and_grads(pair(torch.zeros(())), pair(p)))
    assert not list(objective.constants.parameters()) and list(objective.networks.parameters())


def test_a_decoder_that_cannot_take_relaxed_values_is_named():
    logits = torch.zeros(5, requires_grad=True)
    model, guide = bits(logits)

    def strict():
        with pyro.plate("data", 5):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            if ((b != 0) & (b != 1)).any():
                raise ValueError("only bits")

    with pytest.raises(ValueError, match="relaxed values of site 'b'.*TraceRLOO_ELBO.*only bits"):
        TraceRELAX_ELBO().loss_and_grads(strict, guide)
    own = TraceRELAX_ELBO(lambda sites: sites["b"].sigmoid())
    assert math.isfinite(own.loss_and_grads(strict, guide))

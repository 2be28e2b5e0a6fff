"""A compiled objective is the objective: loss, gradient, parameters, and what it refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

from pyro_vi_ext import (
    CannotCompile,
    ImportanceWeightedELBO,
    TraceRELAX_ELBO,
    compile_objective,
    fit,
)

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 0.5), obs=x)


def guide(x):
    loc = pyro.param("q_loc", lambda: torch.tensor(0.1))
    scale = pyro.param("q_scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))


def coins(x):
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * b - 1, 0.8), obs=x)


def coins_guide(x):
    logits = pyro.param("logits", lambda: torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Bernoulli(logits=logits))


CASES = {
    "Trace_ELBO": lambda: (model, guide, Trace_ELBO()),
    "dreg": lambda: (model, guide, ImportanceWeightedELBO(5, gradient="dreg")),
    "AutoNormal": lambda: (model, AutoNormal(model), Trace_ELBO(num_particles=2)),
    "RELAX": lambda: (coins, coins_guide, TraceRELAX_ELBO(hidden_dims=(4,))),
}


def train(make_module, parameters_of, num_steps=6):
    torch.manual_seed(3)
    make_module(X)
    optimizer = torch.optim.RMSprop(parameters_of(), lr=0.05)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = make_module(X)
        (2 * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters_of()]


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_the_objective(case):
    found = []
    for compiled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        pair_model, pair_guide, objective = CASES[case]()
        with torch.random.fork_rng():  # a first call, which makes the parameters
            objective.loss_and_grads(pair_model, pair_guide, X)
        store = pyro.get_param_store()
        for leaf in store._params.values():
            leaf.grad = None
        if compiled:
            module = compile_objective(objective, backend="eager")(pair_model, pair_guide)
            found.append(train(module, lambda m=module: list(m.parameters())))
            assert len(module.programs) == 1
        else:

            def call(x, o=objective, m=pair_model, g=pair_guide):
                # Pyro's own differentiable_loss of score terms has another value
                loss = o.differentiable_loss(m, g, x)
                return loss

            found.append(train(call, lambda s=store: list(s._params.values())))
    (plain, plain_parameters), (ours, parameters) = found
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-10, atol=0)
    assert {p.shape for p in parameters} == {p.shape for p in plain_parameters}
    for a, b in zip(
        sorted(parameters, key=lambda p: (p.shape, p.sum().item())),
        sorted(plain_parameters, key=lambda p: (p.shape, p.sum().item())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_parameters_are_complete_after_the_first_call():
    module = compile_objective(Trace_ELBO(), backend="eager")(model, guide)
    module(X)
    assert {name for name, _ in module.named_parameters()} == {"q_loc", "q_scale"}


def test_evaluation_is_not_compiled():
    module = compile_objective(Trace_ELBO(), backend="eager")(model, guide)
    module(X)
    with torch.no_grad():
        torch.manual_seed(0)
        loss = module(X)
    torch.manual_seed(0)
    assert loss.item() == Trace_ELBO().loss(model, guide, X) and not module.programs


def test_a_replaced_parameter_is_used():
    module = compile_objective(Trace_ELBO(), backend="eager")(model, guide)
    module(X), module(X)
    pyro.get_param_store()["q_loc"] = torch.tensor(-3.0)
    for _ in range(2):
        torch.manual_seed(1)
        loss = module(X)
        torch.manual_seed(1)
        assert loss.item() == pytest.approx(Trace_ELBO().loss(model, guide, X), rel=1e-12)
    loss.backward()
    assert pyro.get_param_store()._params["q_loc"].grad is not None


def test_fit_takes_it():
    module = compile_objective(Trace_ELBO(), backend="eager")(model, guide)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
    assert fit(module, X, num_steps=30, optimizer=adam).num_steps == 30
    assert module.programs[0].num_steps == 30


def test_second_derivatives_are_an_error():
    module = compile_objective(Trace_ELBO(), backend="eager")(model, guide)
    module(X)
    leaf = pyro.get_param_store()._params["q_loc"]
    (gradient,) = torch.autograd.grad(module(X), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.backward()


def test_refusals():
    def branching(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc if loc > 0 else -loc, 1.0), obs=x[0])

    module = compile_objective(Trace_ELBO(), backend="eager")(branching, guide)
    module(X)
    with pytest.raises(CannotCompile, match="loc > 0"):
        module(X)
    module = compile_objective(Trace_ELBO(), backend="eager", fallback=True)(branching, guide)
    module(X)
    with pytest.warns(UserWarning, match="not compiled.*loc > 0"):
        module(X)
    module(X).backward()

    with pytest.raises(ValueError, match="takes an ELBO, got function"):
        compile_objective(model)
    with pytest.raises(ValueError, match="backend"):
        compile_objective(Trace_ELBO(), backend="fast")

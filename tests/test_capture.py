"""A captured pass against the pass itself, bit for bit; what it leaves behind; what it refuses."""

import functools
import random
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_vi_ext import ImportanceWeightedELBO
from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.capture import capture
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.stock_pass import StockPass

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.1, 0.9], dtype=torch.float64)


class Captured:
    """The capture of a pair, and the two ways to run it from the same state and seed."""

    def __init__(self, model, guide, loss, *args):
        self.stock = StockPass(model, guide, getattr(loss, "loss_and_grads", loss))
        self.args = args
        found = self.stock.find_leaves(args, {})
        one_name = {leaf: name for name, leaf in found.items()}  # as Program does
        self.names, self.leaves = found, {name: leaf for leaf, name in one_name.items()}
        self.given = Arguments(args, {}).tensors

    @functools.cached_property
    def pass_(self):
        return self.capture()

    def capture(self):
        arguments = Arguments(self.args, {})
        return capture(self.stock.symbolic, self.leaves, arguments, self.stock.modules)

    def buffers(self):
        return [b for module in self.stock.modules.values() for b in module.buffers()]

    def by_graph(self):
        pass_ = self.pass_
        with torch.no_grad():
            losses, gradients = pass_.graph(*self.given, *pass_.inputs)
        return losses, dict(zip(pass_.trained, gradients, strict=True))

    def by_pyro(self):
        for leaf in self.leaves.values():
            leaf.grad = None
        losses = self.stock(*self.args)
        losses = losses if isinstance(losses, tuple) else (losses,)
        gradients = {n: leaf.grad for n, leaf in self.leaves.items() if leaf.grad is not None}
        for leaf in self.leaves.values():
            leaf.grad = None
        return tuple(torch.as_tensor(loss) for loss in losses), gradients

    def outcome(self, run, seed):
        """What a run returns, the buffers and random state it leaves; the buffers are put back."""
        before = [b.clone() for b in self.buffers()]
        pyro.set_rng_seed(seed)
        losses, gradients = run()
        left = [*(b.clone() for b in self.buffers()), torch.get_rng_state()]
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(value)
        return [*losses, *gradients.values(), *left], list(gradients)

    def moved(self):
        """All parameters elsewhere: the graph reads them, it does not remember them."""
        with torch.no_grad():
            for leaf in self.leaves.values():
                leaf.add_(0.1 * torch.rand_like(leaf))


# --- pairs ---------------------------------------------------------------------------------------


def normals(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.sum(-1), s), obs=x)


def gammas(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


def gamma_guide(x):
    a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
    b = pyro.param("b", lambda: torch.tensor(1.5), constraint=constraints.interval(0.5, 4.0))
    pyro.sample("s", dist.Gamma(a, b))


def counts(x):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    n = pyro.sample("n", dist.Poisson(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(k + n, 1.0), obs=x)


def count_guide(x):
    pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))
    rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("n", dist.Poisson(rate))


def batch_norm_pair():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([8, 3]).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        loc, log_scale = net(x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return model, guide, Trace_ELBO(), torch.randn(8, 3)


class Regression(PyroModule):
    """A prior made outside of the pass, as is usual, a constrained parameter, and a nested one."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.scale = PyroParam(torch.tensor(0.7), constraints.positive)

    def forward(self, x):
        mean = self.linear(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, self.scale), obs=x)


def regression_pair():
    model = Regression()
    return model, AutoNormal(model), Trace_ELBO(), X


def correlations(x):
    cholesky = pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.MultivariateNormal(weights, scale_tril=cholesky), obs=x.view(2, 3))


def subsampled(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as i:
        with poutine.scale(scale=0.5), poutine.mask(mask=x[i] > 0):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[i])


def nested_plates(x):
    m = pyro.sample("m", dist.StudentT(4.0, 0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(m, 1.0))
        with pyro.plate("data", 2, dim=-1):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x.view(3, 2))


ENUMERATE = {"enumerate": "parallel"}


def enumerated(impossible):
    """Three components; the first has the prior and the posterior probability 0, if wanted."""
    first = torch.tensor([-torch.inf if impossible else 0.3])

    def model(x):
        loc = pyro.param("loc", torch.tensor([0.0, 1.0, 2.0]))
        prior = pyro.param("prior", torch.tensor([0.2, 0.4]))
        with pyro.plate("data", len(x)):
            logits = torch.cat([first, prior])
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=ENUMERATE)
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = torch.cat([first, pyro.param("q", torch.tensor([0.1, -0.2]))])
            pyro.sample("k", dist.Categorical(logits=logits), infer=ENUMERATE)

    return model, guide, TraceEnum_ELBO(max_plate_nesting=1), X


def summed_out():
    """Enumerated in the model, so that the sum over outcomes is of the model's making."""
    model, _, loss, x = enumerated(impossible=True)
    return model, lambda x: None, loss, x


def literals(x):
    """Numbers and lists of the code, made in each call."""
    loc = torch.tensor([1.0, 2.0, 3.0]).mean() * torch.tensor(0.5)
    m = pyro.sample("m", dist.Normal(loc, torch.ones(()) * torch.tensor(2.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, torch.tensor([0.1])), obs=x)


def shared_leaf():
    """One parameter with several names in the store."""
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("decoder", net)
        gammas(x)
        pyro.factor("pull", -(net(x.unsqueeze(-1)) ** 2).sum())

    def guide(x):
        pyro.module("encoder", net)
        gamma_guide(x)

    return model, guide, Trace_ELBO(), X


PARTICLES = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
PAIRS = {
    "constrained": lambda: (gammas, gamma_guide, Trace_ELBO(), X),
    "batch norm": batch_norm_pair,
    "pyro module": regression_pair,
    "auto normal": lambda: (normals, AutoNormal(normals), Trace_ELBO(), X),
    "full rank": lambda: (normals, AutoMultivariateNormal(normals), Trace_ELBO(**PARTICLES), X),
    "lkj, simplex": lambda: (correlations, AutoNormal(correlations), Trace_ELBO(), X),
    "subsampled": lambda: (subsampled, AutoNormal(subsampled), Trace_ELBO(), X),
    "nested plates": lambda: (nested_plates, AutoNormal(nested_plates), Trace_ELBO(), X),
    "mean field": lambda: (normals, AutoNormal(normals), TraceMeanField_ELBO(), X),
    "renyi": lambda: (normals, AutoNormal(normals), RenyiELBO(alpha=0.5, **PARTICLES), X),
    "wake sleep": lambda: (gammas, gamma_guide, ReweightedWakeSleep(**PARTICLES), X),
    "provenance": lambda: (counts, count_guide, TraceGraph_ELBO(), X),
    "score function": lambda: (counts, count_guide, Trace_ELBO(), X),
    "importance weighted": lambda: (
        normals,
        AutoNormal(normals),
        ImportanceWeightedELBO(num_particles=3, gradient="dreg"),
        X,
    ),
    "literals": lambda: (literals, AutoNormal(literals), Trace_ELBO(), X),
    "shared leaf": shared_leaf,
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


# --- the same numbers ----------------------------------------------------------------------------


@every_pair
def test_the_graph_is_the_pass(pair):
    captured = Captured(*PAIRS[pair]())
    for seed in (1, 2):
        ours, names = captured.outcome(captured.by_graph, seed)
        stock, expected_names = captured.outcome(captured.by_pyro, seed)
        assert set(names) <= set(captured.leaves) and len(names) == len(expected_names) > 0
        assert all(map(torch.equal, ours, stock))  # losses, gradients, buffers, the random state
        captured.moved()


@pytest.mark.parametrize("pair", ["constrained", "auto normal", "batch norm"])
def test_the_comparison_is_sharp(pair):
    captured = Captured(*PAIRS[pair]())
    first, _ = captured.outcome(captured.by_graph, 1)
    other_draws, _ = captured.outcome(captured.by_graph, 2)
    captured.moved()
    other_place, _ = captured.outcome(captured.by_graph, 1)
    for other in (other_draws, other_place):
        assert not torch.equal(first[0], other[0])


def test_single_precision(float64):
    torch.set_default_dtype(torch.float32)
    captured = Captured(normals, AutoNormal(normals), Trace_ELBO(), X.float())
    ours, _ = captured.outcome(captured.by_graph, 1)
    stock, _ = captured.outcome(captured.by_pyro, 1)
    torch.testing.assert_close(ours[0].float(), stock[0].float(), rtol=1e-6, atol=0)
    assert all(map(torch.equal, ours[1:], stock[1:])) and ours[1].dtype == torch.float32


ENUMERATIONS = {
    "all possible": lambda: enumerated(impossible=False),
    "one impossible": lambda: enumerated(impossible=True),
    "summed out": summed_out,
}


@pytest.mark.parametrize("pair", ENUMERATIONS)
def test_enumeration(pair):
    captured = Captured(*ENUMERATIONS[pair]())
    for _ in range(2):  # another order of the sum, so not bit for bit
        (loss,), gradients = captured.by_graph()
        (expected,), expected_gradients = captured.by_pyro()
        assert expected.isfinite() and gradients.keys() == expected_gradients.keys()
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        for name, gradient in gradients.items():
            assert gradient.isfinite().all() and gradient.any()
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-13, atol=1e-15)
        captured.moved()


def test_impossible_outcomes_against_the_sum_by_hand():
    captured = Captured(*enumerated(impossible=True))
    leaves = captured.leaves
    q, p = leaves["q"].log_softmax(0), leaves["prior"].log_softmax(0)
    joint = p + dist.Normal(leaves["loc"][1:], 1.0).log_prob(X.unsqueeze(-1))
    exact = (q.exp() * (q - joint)).sum()
    gradients = torch.autograd.grad(exact, [leaves[name] for name in captured.pass_.trained])
    (loss,), ours = captured.by_graph()
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-13, atol=0)
    for gradient, expected in zip(ours.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_several_losses():
    assert not Captured(*PAIRS["wake sleep"]()).pass_.scalar
    assert Captured(*PAIRS["constrained"]()).pass_.scalar


def test_new_draws_in_each_call():
    captured = Captured(*PAIRS["subsampled"]())
    losses = {captured.by_graph()[0][0].item() for _ in range(20)}
    assert len(losses) == 20


# --- what is an input ----------------------------------------------------------------------------


def test_data_of_a_closure_is_read_at_each_call():
    data = X.clone()
    pair = lambda: gammas(data), lambda: gamma_guide(data), Trace_ELBO()
    captured = Captured(*pair)
    assert any(tensor is data for tensor in captured.pass_.inputs)
    first, _ = captured.outcome(captured.by_graph, 1)
    data.mul_(2.0)
    second, _ = captured.outcome(captured.by_graph, 1)
    stock, _ = captured.outcome(captured.by_pyro, 1)
    assert not torch.equal(first[0], second[0]) and all(map(torch.equal, second, stock))


def test_arguments_are_inputs():
    captured = Captured(*PAIRS["constrained"]())
    captured.given, captured.args = [X + 1.0], (X + 1.0,)
    ours, _ = captured.outcome(captured.by_graph, 1)
    stock, _ = captured.outcome(captured.by_pyro, 1)
    assert all(map(torch.equal, ours, stock))


def test_inputs_are_the_tensors_themselves():
    captured = Captured(*PAIRS["batch norm"]())
    inputs = {id(tensor) for tensor in captured.pass_.inputs}
    assert len(inputs) == len(captured.pass_.inputs)  # each once
    assert {id(leaf) for leaf in captured.leaves.values()} <= inputs
    assert {id(buffer) for buffer in captured.buffers()} <= inputs


def test_a_leaf_with_two_names_has_one_gradient():
    captured = Captured(*PAIRS["shared leaf"]())
    names = {n for n in captured.names if n.endswith("weight")}
    assert len(names) == 2 and len({id(captured.names[n]) for n in names}) == 1
    assert len(names & set(captured.pass_.trained)) == 1
    arguments, stock = Arguments((X,), {}), captured.stock  # and as a leaf under each of its names
    both = capture(stock.symbolic, captured.names, arguments, stock.modules)
    assert len(both.trained) == len(captured.pass_.trained)


def test_literals_of_the_code():
    captured = Captured(*PAIRS["literals"]())
    known = {id(t) for t in (*captured.leaves.values(), *captured.given)}
    listed = [t.tolist() for t in captured.pass_.inputs if id(t) not in known]
    assert [1.0, 2.0, 3.0] in listed
    full = torch.ops.aten.full.default
    numbers = [n.args[1] for n in captured.pass_.graph.graph.nodes if n.target is full]
    assert {0.5, 2.0, 0.1} <= set(numbers)


def test_a_parameter_without_gradient_is_not_trained():
    def guide(x):
        pyro.param("unused", torch.tensor(1.0))
        gamma_guide(x)

    captured = Captured(gammas, guide, Trace_ELBO(), X)
    assert captured.pass_.trained == ["a", "b"] and "unused" in captured.leaves


def test_a_parameter_that_requires_no_gradient_is_an_input_only():
    captured = Captured(*PAIRS["batch norm"]())
    net, num_trained = captured.stock.modules["guide.net"], len(captured.pass_.trained)
    net[0].weight.requires_grad_(False)
    again = Captured(captured.stock.model, captured.stock.guide, Trace_ELBO(), *captured.args)
    assert len(again.pass_.trained) == num_trained - 1
    assert any(tensor is net[0].weight for tensor in again.pass_.inputs)


# --- what it leaves behind -----------------------------------------------------------------------


def random_states():
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return states, np.random.get_state()[2]


def stand(captured):
    """Everything a capture must leave alone: the things themselves, and their values."""
    store = pyro.get_param_store()
    tensors = [*store._params.values(), *captured.buffers()]
    tensors += [p for module in captured.stock.modules.values() for p in module.parameters()]
    gradients = [leaf.grad for leaf in captured.leaves.values()]
    attributes = [
        (path, name, id(value))
        for module in captured.stock.modules.values()
        for path, part in module.named_modules()
        for table in (part.__dict__, part._buffers, part._parameters)
        for name, value in table.items()
        if isinstance(value, torch.Tensor)
    ]
    values = [t.detach().clone() for t in tensors], [None if g is None else +g for g in gradients]
    identities = list(map(id, tensors)), list(map(id, gradients)), list(store._params), attributes
    return values, identities, random_states()


def assert_same_stand(before, after):
    for ours, others in zip(before[0], after[0], strict=True):
        for a, b in zip(ours, others, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert before[1:] == after[1:]


@pytest.mark.parametrize("pair", ["constrained", "batch norm", "pyro module", "subsampled"])
def test_a_capture_leaves_nothing_behind(pair):
    captured = Captured(*PAIRS[pair]())
    for k, leaf in enumerate(captured.leaves.values()):
        leaf.grad = torch.full_like(leaf, 0.5) if k % 2 else None
    before = stand(captured)
    assert captured.pass_.trained
    assert_same_stand(before, stand(captured))


def test_a_refused_capture_leaves_nothing_behind():
    net = nn.BatchNorm1d(3)
    began = []

    def model(x):
        began.append(1)
        random.random(), np.random.rand(), torch.rand(())
        net.note = net(x).sum()
        gammas(X)
        if captured is not None and x.sum() > 0:
            pyro.factor("more", x.sum())

    captured = None
    captured = Captured(model, lambda x: gamma_guide(X), Trace_ELBO(), torch.randn(8, 3))
    passes = len(began)
    del net.note
    for leaf in captured.leaves.values():
        leaf.grad = torch.ones_like(leaf)
    before = stand(captured)
    with pytest.raises(CannotCompile):
        captured.capture()
    assert_same_stand(before, stand(captured))
    assert len(began) == passes + 1 and "note" not in net.__dict__


# --- what is refused -----------------------------------------------------------------------------


def refusal(model, guide=gamma_guide, loss=None):
    """The message of a refusal, which leaves everything as it was."""
    captured = Captured(model, guide, loss or Trace_ELBO(), X)
    before = stand(captured)
    with pytest.raises(CannotCompile) as caught:
        captured.capture()
    assert_same_stand(before, stand(captured))
    return str(caught.value)


def names_the_line(message, code):
    """Whether this file and the very line of code are named."""
    return re.search(rf"test_capture\.py:\d+ `[^`]*{re.escape(code)}", message) is not None


def branches_on_a_draw(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    if s > 1.0:
        pyro.factor("more", s)


def selects_by_a_draw(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0)) + x
    pyro.factor("more", s[s > 0].sum())


def lists_a_draw(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.factor("more", s * sum(s.detach().reshape(1).tolist()))


def reads_an_argument(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.factor("more", s * x[0].item())


def draw_to_numpy(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.factor("more", s * float(s.detach().numpy()))


def data_to_numpy(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.factor("more", s * X.numpy()[0])


def data_as_array(x):
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.factor("more", s * np.asarray(X)[0])


@pytest.mark.parametrize(
    "model, code",
    [
        (branches_on_a_draw, "if s > 1.0:"),
        (selects_by_a_draw, "s[s > 0].sum()"),
        (lists_a_draw, ".tolist()"),
        (reads_an_argument, "x[0].item()"),
        (draw_to_numpy, "s.detach().numpy()"),
        (data_to_numpy, "X.numpy()[0]"),
        (data_as_array, "np.asarray(X)[0]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_read_of_a_value_names_the_line(model, code):
    message = refusal(model)
    assert names_the_line(message, code), message


def test_a_refusal_says_what_to_write_instead():
    assert "torch.where" in refusal(branches_on_a_draw)


@pytest.mark.parametrize(
    "read",
    [
        float,
        torch.Tensor.item,
        torch.Tensor.tolist,
        bool,
        int,
        lambda p: float(p.data),
        lambda p: float(2.0 * p),
        lambda p: f"{p:.6f}",
    ],
    ids=["float", "item", "tolist", "bool", "int", "data", "product", "text"],
)
def test_a_read_of_an_unconstrained_parameter(read):
    """Under a real constraint the parameter is the leaf, which has a value while others do not."""

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("s", dist.Gamma(2.0, 1.0 + abs(float(read(scale)))))

    message = refusal(gammas, guide)
    assert "parameter" in message or "test_capture.py" in message, message


def test_a_read_of_an_unconstrained_parameter_names_the_line():
    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("s", dist.Gamma(2.0, 1.0 + abs(float(scale))))

    message = refusal(gammas, guide)
    assert names_the_line(message, "float(scale)") and "parameter" in message, message


def test_a_read_of_a_constrained_parameter():
    def guide(x):
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("s", dist.Gamma(a, float(a)))

    assert names_the_line(refusal(gammas, guide), "float(a)")


def test_rejection_sampling():
    def model(x):
        a = pyro.sample("a", dist.VonMises(0.0, 1.0))
        pyro.factor("more", a.cos())

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        pyro.sample("a", dist.VonMises(loc, 2.0))

    message = refusal(model, guide)
    assert names_the_line(message, 'pyro.sample("a", dist.VonMises(loc, 2.0))'), message
    assert "site 'a'" in message


COUNTER = [0]


def draws_by_numpy(x):
    pyro.factor("more", pyro.sample("s", dist.Gamma(2.0, 1.0)) * np.random.rand())


def draws_by_python(x):
    pyro.factor("more", pyro.sample("s", dist.Gamma(2.0, 1.0)) * random.random())


def counts_its_calls(x):
    COUNTER[0] += 1
    pyro.factor("more", pyro.sample("s", dist.Gamma(2.0, 1.0)) * COUNTER[0])


def grows_with_its_calls(x):
    COUNTER[0] += 1
    for _ in range(COUNTER[0]):
        pyro.factor(f"more {_}", X.sum())
    gammas(x)


def tensor_of_a_number_of_python(x):
    noise = torch.tensor([random.random(), 1.0])
    pyro.factor("more", pyro.sample("s", dist.Gamma(2.0, 1.0)) * noise.sum())


def scalar_of_a_number_of_python(x):
    noise = torch.tensor(random.random())
    pyro.factor("more", pyro.sample("s", dist.Gamma(2.0, 1.0)) * noise)


def tensor_of_numpy(x):
    noise = torch.from_numpy(np.random.rand(2))
    pyro.factor("more", pyro.sample("s", dist.Gamma(2.0, 1.0)) * noise.sum())


@pytest.mark.parametrize(
    "model, words",
    [
        (draws_by_numpy, "differ in what they compute"),
        (draws_by_python, "differ in what they compute"),
        (counts_its_calls, "differ in what they compute"),
        (grows_with_its_calls, "Two calls"),
        (tensor_of_a_number_of_python, "made of other numbers"),
        (scalar_of_a_number_of_python, "differ in what they compute"),
        (tensor_of_numpy, "other"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_the_same_twice(model, words):
    message = refusal(model)
    assert words in message, message


def test_the_difference_is_shown_at_its_line():
    message = refusal(counts_its_calls)
    assert "test_capture.py" in message and "COUNTER[0])" in message, message


def test_a_gradient_of_some_calls():
    """Which parameters have one is decided by something that the graph cannot hold."""

    def guide(x):
        COUNTER[0] += 1
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("s", dist.Gamma(2.0, a if COUNTER[0] % 2 else a.detach()))

    assert "'a' has a gradient in one call and none in another" in refusal(gammas, guide)


def test_a_tensor_kept_in_a_dict_between_calls():
    kept = {}

    def model(x):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.factor("pull", -((s - kept.get("s", 0.0)) ** 2))
        kept["s"] = s.detach()

    refusal(model)


def test_an_attribute_of_a_module_assigned_in_the_pass():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.last = torch.tensor(0.0)

        def forward(self, x):
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.factor("pull", -((s - self.last) ** 2))
            self.last = s.detach()

    assert "in place" in refusal(Model())


def test_a_buffer_replaced_in_the_pass():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor(1.0))

        def forward(self, x):
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.factor("pull", -((s - self.mean) ** 2))
            self.mean = 0.9 * self.mean + 0.1 * s.detach()

    assert "in place" in refusal(Model())


def test_a_replaced_tensor_is_named():
    """A list of it, not read again, so that only the module gives it away."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("latest", torch.tensor(1.0))

        def forward(self, x):
            gammas(x)
            self.latest = x.sum()

    assert "'model.latest'" in refusal(Model())


def test_a_buffer_updated_in_place_in_the_pass():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor(1.0))

        def forward(self, x):
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.factor("pull", -((s - self.mean) ** 2))
            self.mean.mul_(0.9).add_(0.1 * s.detach())

    captured = Captured(Model(), gamma_guide, Trace_ELBO(), X)
    ours, _ = captured.outcome(captured.by_graph, 1)
    stock, _ = captured.outcome(captured.by_pyro, 1)
    assert all(map(torch.equal, ours, stock))
    pyro.set_rng_seed(1)
    captured.by_graph()
    assert captured.buffers()[0] != 1.0


def test_a_decaying_average_baseline():
    def guide(x):
        logit = pyro.param("logit", torch.tensor(0.3))
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("k", dist.Bernoulli(logits=logit), infer=infer)

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    refusal(model, guide, TraceGraph_ELBO())


def test_a_baseline_in_the_parameter_store_is_named():
    """What a decaying average does, with an objective that can be traced that far."""

    def guide(x):
        gamma_guide(x)
        with torch.no_grad():
            baseline = pyro.param("baseline", torch.tensor(0.0))
        pyro.get_param_store()["baseline"] = 0.9 * baseline.detach() + 0.1 * x.sum()

    message = refusal(gammas, guide)
    assert "decaying average" in message or "keep a tensor" in message, message


def test_a_failing_model_is_a_refusal_that_says_how():
    def model(x):
        gammas(x)
        pyro.factor("wrong", torch.ones(2) @ torch.ones(3))

    captured = Captured(gammas, gamma_guide, Trace_ELBO(), X)
    captured.stock = StockPass(model, gamma_guide, Trace_ELBO().loss_and_grads)
    with pytest.raises(CannotCompile) as caught:
        captured.capture()
    assert names_the_line(str(caught.value), "torch.ones(2) @ torch.ones(3)")


# --- constants -----------------------------------------------------------------------------------


def test_a_constant_that_is_read_is_remembered_with_its_version():
    width = torch.tensor(2.0)

    def model(x):
        s = pyro.sample("s", dist.Gamma(float(width), 1.0))
        pyro.factor("more", s)

    constants = Captured(model, gamma_guide, Trace_ELBO(), X).pass_.constants
    assert constants and all(tensor is width for tensor, _ in constants)
    assert all(version == width._version for _, version in constants)
    width.add_(1.0)
    assert all(version != width._version for _, version in constants)


def test_no_constant_is_read_by_plain_code():
    assert Captured(*PAIRS["batch norm"]()).pass_.constants == []

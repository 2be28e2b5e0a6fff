"""Branches of a run: what is given, held, drawn again and relaxed, and what is refused."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from pyro_vi_ext import TraceDisARM_ELBO, TraceREBAR_ELBO, TraceScore_ELBO
from pyro_vi_ext.branches import Relaxing, branch, descendants
from pyro_vi_ext.discrete import Site
from pyro_vi_ext.scoring import pair_terms

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.9, -0.4, 0.2], dtype=torch.double)
LOGITS = {"a": 0.3, "b": (-0.4, 1.1), "c": (0.2, -0.9), "d": 0.6}
modes = pytest.mark.parametrize("vectorized", [True, False])


def model():
    """a of all; b, d and x of the data; c depends on b."""
    a = pyro.sample("a", dist.Bernoulli(0.3))
    with pyro.plate("data", 3, subsample_size=2) as index:
        b = pyro.sample("b", dist.Bernoulli(0.4 + 0.2 * a))
        c = pyro.sample("c", dist.Bernoulli(0.5))
        d = pyro.sample("d", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(a * b + c - d, 0.7), obs=X[index])


def guide():
    pyro.sample("a", dist.Bernoulli(logits=torch.tensor(LOGITS["a"])))
    with pyro.plate("data", 3, subsample_size=2):
        pyro.sample("d", dist.Bernoulli(logits=torch.tensor(LOGITS["d"])))
        b = pyro.sample("b", dist.Bernoulli(logits=linear("b", pyro.param("one", torch.ones(())))))
        pyro.sample("c", dist.Bernoulli(logits=linear("c", b)))


def linear(name, parent):
    return LOGITS[name][0] + LOGITS[name][1] * parent


def run_of(num_particles, vectorized, pair=(model, guide)):
    objective = TraceScore_ELBO(num_particles, vectorize_particles=vectorized)
    run = objective._run(*pair, (), {})
    rows = [pair_terms(run, part) for part in run.pairs]
    rows = [[*part.model, *part.guide.values()] for part in rows]
    return run, {name: Site(name, run, rows) for name in "abcd"}


def values_of(new, name):
    """(C J, *batch), of a branch."""
    return torch.stack([pair.guide.nodes[name]["value"] for pair in new.run.pairs]).flatten(0, -2)


def log_weight(a, b, c, d, x, logits_c):
    """The terms that b can influence, of each datum: log p - log q of b and c."""
    log_p = dist.Bernoulli(0.3).log_prob(a) + linear_log_prob((0.4 + 0.2 * a).logit(), b)
    log_p = log_p + linear_log_prob(torch.zeros(()), c) + dist.Bernoulli(0.5).log_prob(d)
    log_p = log_p + dist.Normal(a * b + c - d, 0.7).log_prob(x)
    log_q = linear_log_prob(torch.tensor(sum(LOGITS["b"])), b) + linear_log_prob(logits_c, c)
    return 1.5 * (log_p - log_q) - 0.5 * dist.Bernoulli(0.3).log_prob(a)  # a has no scale


def linear_log_prob(logits, v):
    return v * F.logsigmoid(logits) + (1 - v) * F.logsigmoid(-logits)


# --- what is run -------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("copies", [1, 2])
def test_given_held_and_drawn_again(copies, vectorized):
    num = 400
    run, sites = run_of(num, vectorized) if vectorized else run_of(60, False)
    num = run.num_particles
    b = sites["b"].value
    given = torch.stack([1 - b, b][:copies])
    new = branch(run, {"b": given}, copies)
    assert new.run.num_particles == copies * num and run.num_particles == num
    before = {
        name: site.value.expand((num,) + site.value.shape[1:]) for name, site in sites.items()
    }
    drawn = {}
    for name in "abcd":
        found = [pair.guide.nodes[name]["value"] for pair in new.run.pairs]
        found = found[0] if vectorized else torch.stack(found)
        drawn[name] = found.reshape(copies, *before[name].shape)
    assert torch.equal(drawn["b"], given)
    for name in "ad":
        assert torch.equal(drawn[name], before[name].expand(copies, *before[name].shape))
    assert not torch.equal(drawn["c"][0], before["c"])
    for value in (0.0, 1.0):  # c has its distribution given the new b
        c = drawn["c"][drawn["b"] == value]
        p = torch.tensor(linear("c", value)).sigmoid()
        assert abs(c.mean() - p) < 4 * (p * (1 - p) / len(c)) ** 0.5


@modes
@pytest.mark.parametrize("num_particles", [1, 3])
def test_signal_is_the_log_weight_there(num_particles, vectorized):
    run, sites = run_of(num_particles, vectorized)
    index = run.subsample.indices["data"]
    site = sites["b"]
    given = torch.stack([1 - site.value, site.value])
    new = branch(run, {"b": given}, 2)
    assert all(torch.equal(pair.model.nodes["data"]["value"], index) for pair in new.run.pairs)
    found = new.signal(site)
    assert found.shape == (2, num_particles, 2)
    c = [pair.guide.nodes["c"]["value"] for pair in new.run.pairs]
    c = torch.cat([value.reshape(-1, 2) for value in c]).reshape(2, num_particles, 2)
    a, d = sites["a"].value, sites["d"].value
    expected = log_weight(a, given, c, d, X[index], linear("c", given))
    torch.testing.assert_close(found, expected)


@modes
def test_a_branch_at_the_values_of_the_run_is_the_run(vectorized):
    run, sites = run_of(3, vectorized)
    given = {name: site.value.unsqueeze(0) for name, site in sites.items()}
    new = branch(run, given)
    for site in sites.values():
        torch.testing.assert_close(
            new.signal(site)[0], site.signal.expand(3, *site.signal.shape[1:])
        )


# --- relaxed branches --------------------------------------------------------------------------


def half(name, relaxation, logits):
    """A relaxed value that shows its logits."""
    return torch.sigmoid(logits)


@modes
def test_later_draws_are_relaxed_and_scored_linearly(vectorized):
    """Value and gradient of the signal against the formulas."""
    run, sites = run_of(3, vectorized)
    index = run.subsample.indices["data"]
    v = torch.rand(1, 3, 2, requires_grad=True)
    new = branch(run, {"b": v}, 1, lambda: Relaxing(["b", "c"], half))
    found = new.signal(sites["b"])
    c = torch.sigmoid(linear("c", v))
    a, d = sites["a"].value, sites["d"].value
    expected = log_weight(a, v, c, d, X[index], linear("c", v))
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value.sum(), v)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_each_relaxed_run_makes_its_own_draws():
    run, _ = run_of(2, False)
    made = []

    def relaxing():
        made.append(Relaxing(["b", "c"], half))
        return made[-1]

    branch(run, {"b": torch.rand(2, 2, 2)}, 2, relaxing)
    assert len(made) == 4 and all(set(messenger.drawn) == {"c"} for messenger in made)


def test_a_site_that_cannot_be_relaxed_is_refused_by_name():
    def pair():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("k", dist.Categorical(torch.stack([b, 1 - b]) + 0.1))

    run = TraceScore_ELBO()._run(pair, pair, (), {})
    with pytest.raises(NotImplementedError, match="'k' .Categorical. cannot take relaxed values"):
        branch(run, {"b": torch.full((1, 1), 0.5)}, 1, lambda: Relaxing(["b", "k"], half))


def test_code_that_needs_hard_values_is_an_error_that_names_the_site():
    def strict():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        table = torch.tensor([1.0, 2.0])
        if b not in (0.0, 1.0):
            raise IndexError(f"no row {b}")
        pyro.sample("x", dist.Normal(table[b.long()], 1.0), obs=X[0])

    def guide():
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    message = "cannot be run at relaxed values of site 'b'.*real number.*TraceRLOO_ELBO.*no row"
    with pytest.raises(ValueError, match=message):
        TraceREBAR_ELBO().loss_and_grads(strict, guide)
    TraceDisARM_ELBO().loss_and_grads(strict, guide)
    assert pyro.poutine.runtime.get_mask() is None and pyro.distributions.util._VALIDATION_ENABLED


# --- dependence --------------------------------------------------------------------------------


def test_descendants_of_each_draw():
    def guide():
        a = pyro.sample("a", dist.Bernoulli(0.5))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
        d = pyro.sample("d", dist.Delta(b * 2))
        pyro.sample("c", dist.Normal(d, 1.0))
        pyro.sample("e", dist.Bernoulli(0.5))
        pyro.sample("f", dist.Bernoulli(logits=torch.tensor([1.0, 2.0])[a.long()]))

    run = TraceScore_ELBO()._run(guide, guide, (), {})
    expected = {"a": set("bdcf"), "b": set("dc"), "d": set("c"), "c": set(), "e": set(), "f": set()}
    assert descendants(run) == expected
    assert descendants(run) is descendants(run)


def test_where_dependence_cannot_be_followed_all_later_draws_are_drawn_again(monkeypatch):
    def unable(*args):
        raise RuntimeError("provenance")

    monkeypatch.setattr("pyro_vi_ext.branches.guide_roles", unable)
    run, _ = run_of(1, True)
    assert descendants(run) == {"a": set("dbc"), "d": set("bc"), "b": set("c"), "c": set()}


def hidden(read):
    """The second draw depends on the first in a way that leaves no trace in the graph."""

    def model():
        a, b = (pyro.sample(name, dist.Bernoulli(0.4)) for name in "ab")
        pyro.sample("x", dist.Normal(2 * a - b, 0.5), obs=X[0])

    def guide():
        p = pyro.param("p", torch.tensor([0.3, 0.6]))
        a = pyro.sample("a", dist.Bernoulli(p[0]))
        pyro.sample("b", dist.Bernoulli(p[1] if read(a) else 1 - p[1]))

    return model, guide


def through_vmap():
    """Followed neither, and not a matter of hard values."""
    model, _ = hidden(bool)

    def guide():
        p = pyro.param("p", torch.tensor([0.3, 0.6]))
        a = pyro.sample("a", dist.Bernoulli(p[0]))
        pyro.sample("b", dist.Bernoulli(torch.vmap(lambda b: 0.2 + 0.5 * b)(a.reshape(1))[0]))

    return model, guide


def one_of_three():
    """The second draw depends on whether the first is the last of three."""
    states = torch.eye(3)

    def model():
        pyro.sample("a", dist.OneHotCategorical(torch.ones(3) / 3))
        pyro.sample("b", dist.Bernoulli(0.4))

    def guide():
        p = pyro.param("p", torch.tensor([0.5, 0.4, 0.1]))
        a = pyro.sample("a", dist.OneHotCategorical(p))
        pyro.sample("b", dist.Bernoulli(p[0] if torch.equal(a, states[2]) else p[1]))

    return model, guide


READ = {
    "item": lambda a: a.item() > 0.5,
    "numpy": lambda a: np.asarray(a.detach()).sum() > 0.5,
    "if": lambda a: bool(a > 0.5),
}
HELD = {"disarm": TraceDisARM_ELBO, "rebar": TraceREBAR_ELBO}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("name", HELD)
def test_hidden_dependence_is_an_error(name, read):
    """Held draws would have been drawn given another value: a wrong gradient."""
    with pytest.raises(ValueError, match="site 'b' depends on an earlier discrete draw.*item"):
        for _ in range(10):
            HELD[name]().loss_and_grads(*hidden(READ[read]))


@pytest.mark.parametrize("name", HELD)
def test_dependence_through_vmap_is_an_error(name):
    with pytest.raises(ValueError, match="site 'b' depends on an earlier discrete draw"):
        for _ in range(10):
            HELD[name]().loss_and_grads(*through_vmap())


def test_all_other_values_are_tried():
    with pytest.raises(ValueError, match="site 'b' depends on an earlier discrete draw"):
        TraceREBAR_ELBO().loss_and_grads(*one_of_three())


@modes
def test_checks_of_the_first_call_take_no_random_numbers(vectorized):
    p = torch.tensor(0.4, requires_grad=True)

    def guide():
        a = pyro.sample("a", dist.Bernoulli(p))
        with pyro.plate("data", 3, subsample_size=2):
            pyro.sample("d", dist.Bernoulli(p))
            b = pyro.sample("b", dist.Bernoulli(p * a))
            pyro.sample("c", dist.Bernoulli(logits=p * b))

    objective = TraceREBAR_ELBO(2, vectorize_particles=vectorized)
    objective.loss(model, guide)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found += torch.autograd.grad(objective.differentiable_loss(model, guide), p)
    assert torch.equal(*found)


def test_dropout_in_the_guide_is_an_error():
    def guide():
        p = pyro.param("p", torch.full((20,), 0.3))
        pyro.sample("a", dist.Bernoulli(F.dropout(p, 0.5)).to_event(1))
        pyro.sample("b", dist.Bernoulli(p[:1]).to_event(1))

    def model():
        for name, size in (("a", 20), ("b", 1)):
            pyro.sample(name, dist.Bernoulli(torch.full((size,), 0.4)).to_event(1))

    with pytest.raises(ValueError, match="site 'a' depends on an earlier.*dropout"):
        TraceDisARM_ELBO().loss_and_grads(model, guide)


def test_states_are_all_that_changes():
    """A branch leaves the run, its traces and its subsample as they were."""
    run, sites = run_of(2, True)
    before = {n: s["value"].clone() for n, s in run.pairs[0].guide.nodes.items() if "fn" in s}
    indices = dict(run.subsample.indices)
    branch(run, {"b": 1 - sites["b"].value.unsqueeze(0)})
    branch(run, {"a": 1 - sites["a"].value.unsqueeze(0)})
    for name, value in before.items():
        if torch.is_tensor(value):
            assert torch.equal(run.pairs[0].guide.nodes[name]["value"], value)
    assert indices == dict(run.subsample.indices) and len(run.pairs) == 1


@pytest.mark.parametrize("objective", [TraceDisARM_ELBO, TraceREBAR_ELBO])
def test_dropout_above_a_chain_is_an_error(objective):
    def guide():
        p = pyro.param("p", torch.full((20,), 0.3))
        a = pyro.sample("a", dist.Bernoulli(F.dropout(p, 0.5)).to_event(1))
        pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a[..., :1]).to_event(1))

    def model():
        for name, size in (("a", 20), ("b", 1)):
            pyro.sample(name, dist.Bernoulli(torch.full((size,), 0.4)).to_event(1))

    with pytest.raises(ValueError, match="site 'a' depends on an earlier.*dropout"):
        objective().loss_and_grads(model, guide)


def test_the_guide_runs_once_where_nothing_comes_after_the_draw():
    calls = []

    def guide():
        calls.append(1)
        p = pyro.param("p", torch.full((3,), 0.3))
        pyro.sample("a", dist.Bernoulli(p).to_event(1))

    def model():
        a = pyro.sample("a", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=torch.tensor(1.0))

    for objective in (TraceDisARM_ELBO(2), TraceREBAR_ELBO(2)):
        objective.loss_and_grads(model, guide)
        calls.clear()
        objective.loss_and_grads(model, guide)
        assert len(calls) == 1

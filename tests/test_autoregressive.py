"""The chain rule: normalised, causal, drawn as scored, and able to learn a Markov chain exactly."""

import itertools

import pyro
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext.models.autoregressive import Autoregressive, CausalTransformer

pytestmark = pytest.mark.usefixtures("float64")

K, T, C = 3, 4, 2


def make(num_values=K, length=T, **options):
    """A small network far from uniform, so that its sequences have unequal probabilities."""
    network = CausalTransformer(num_values, length, width=8, num_layers=2, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return network


def sequences(num_values=K, length=T):
    return torch.tensor(list(itertools.product(range(num_values), repeat=length)))


def context(*batch, per_position=False):
    return torch.randn(*batch, *((T, C) if per_position else (C,)))


KINDS = {"none": {}, "vector": {"context_dim": C}}
KINDS["per position"] = {"context_dim": C, "context_per_position": True}


def some_context(kind, *batch):
    return None if kind == "none" else context(*batch, per_position=kind == "per position")


# --- the probability -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_sequences_have_total_probability_one(kind):
    p = Autoregressive(make(**KINDS[kind]), some_context(kind, 5))
    batch = p.batch_shape
    assert batch == (() if kind == "none" else (5,))
    states = sequences().reshape(-1, *[1] * len(batch), T)
    log_p = p.log_prob(states)
    assert log_p.shape == (K**T, *batch)
    assert torch.allclose(log_p.exp().sum(0), torch.ones(batch), rtol=1e-12)
    assert log_p.std(0).min() > 0.3  # not uniform: the check is not empty


def test_a_network_that_sees_its_token_is_not_normalised():
    class Leaky(CausalTransformer):
        def forward(self, tokens, context=None):
            return super().forward(tokens.roll(-1, -1), context)

    leaky = Leaky(K, T, width=8)
    leaky.load_state_dict(make().state_dict())
    total = Autoregressive(leaky).log_prob(sequences()).exp().sum()
    assert abs(float(total.detach()) - 1) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_is_the_sum_of_conditionals_each_from_its_prefix_alone(kind):
    network, c = make(**KINDS[kind]), some_context(kind)
    for s in sequences()[::11]:
        total = 0.0
        for t in range(T):
            logits = network(s[: t + 1], c)
            assert logits.shape == (t + 1, K)
            total = total + logits[t].log_softmax(-1)[s[t]]
        assert torch.allclose(Autoregressive(network, c).log_prob(s), total, rtol=1e-12)


def test_logits_do_not_change_with_later_tokens():
    network, s = make(), sequences()
    logits = network(s)
    for t in range(T):
        same_before = (s[:, None, :t] == s[:, :t]).all(-1)
        difference = (logits[:, None, t] - logits[:, t]).abs().amax(-1)
        assert difference[same_before].max() < 1e-13
        if t:
            assert difference[~same_before].min() > 1e-6  # and every earlier token counts


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_causal(training):
    network = make(context_dim=C, context_per_position=True).train(training)
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    network.embedding.register_forward_hook(keep)
    c = context(per_position=True).requires_grad_()
    logits = network(torch.tensor([2, 0, 1, 1]), c)
    for t in range(T):
        embedded[0].grad = None
        c.grad = None
        logits[t, 0].backward(retain_graph=True)
        sees_token = embedded[0].grad.abs().sum(-1) > 0
        assert sees_token.tolist() == [i < t for i in range(T - 1)]
        assert (c.grad.abs().sum(-1) > 0).tolist() == [i <= t for i in range(T)]


def test_evaluation_mode_without_gradient_gives_the_same_numbers():
    """torch runs other kernels then."""
    network = make()
    expected = network(sequences()).detach()
    with torch.no_grad():
        assert torch.allclose(network.eval()(sequences()), expected, rtol=0, atol=1e-13)


# --- draws ---------------------------------------------------------------------------------------


def z_scores(draws, log_p, states):
    n = draws.shape[0]
    counts = (draws[:, None] == states).all(-1).sum(0)
    p = log_p.detach().exp()
    return (counts / n - p) / (p * (1 - p) / n).sqrt()


def test_draws_have_the_probabilities_and_a_planted_bias_is_seen():
    network = make(2, 3, context_dim=C)
    c, states = context(2), sequences(2, 3)
    p = Autoregressive(network, c)
    draws = p.sample((20_000,))
    assert draws.shape == (20_000, 2, 3) and not draws.requires_grad
    log_p = p.log_prob(states.unsqueeze(1))
    for i in range(2):
        assert z_scores(draws[:, i], log_p[:, i], states).abs().max() < 4
    assert z_scores(draws[:, 0], log_p[:, 1], states).abs().max() > 4  # of another context
    with torch.no_grad():
        network.head[-1].bias += torch.tensor([0.1, 0.0])
        biased = p.log_prob(states.unsqueeze(1))
    assert z_scores(draws[:, 0], biased[:, 0], states).abs().max() > 4


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
def test_draws_and_values_of_any_dtype(dtype):
    network = make(2, 3)
    p = Autoregressive(network, dtype=dtype).expand([5])
    draws = p.sample((2,))
    assert draws.dtype == dtype and draws.shape == (2, 5, 3)
    assert p.support.check(draws).all() and not p.support.check(draws + 2).any()
    assert torch.equal(p.log_prob(draws), p.log_prob(draws.long()))
    assert torch.equal(p.log_prob(draws == 1), p.log_prob(draws))


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "per position"])
def test_particles_in_one_pass_equal_a_loop(kind):
    network, c = make(**KINDS[kind]), some_context(kind, 6, 5)
    x = torch.randint(K, (5, T))
    found = Autoregressive(network, c).log_prob(x).detach()
    assert found.shape == (6, 5) and found.std(0).min() > 1e-3  # the context counts
    for i, j in itertools.product(range(6), range(5)):
        assert torch.allclose(found[i, j], Autoregressive(network, c[i, j]).log_prob(x[j]))
    assert network(x[:0], c[:, :0]).shape == (6, 0, T, K)


def test_what_is_only_expanded_runs_once():
    network, rows = make(context_dim=C), []
    network.layers[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    c = context(5).requires_grad_()
    x = torch.randint(K, (5, T))
    weights = torch.randn(6, 5)
    gradients = []
    for many_c, many_x in ((c.expand(6, 5, C), x.expand(6, 5, T)), (c.repeat(6, 1, 1), x)):
        log_p = Autoregressive(network, many_c).log_prob(many_x)
        assert log_p.shape == (6, 5)
        gradients.append(torch.autograd.grad((weights * log_p).sum(), c)[0])
    assert rows == [5, 30]
    assert torch.allclose(*gradients, rtol=1e-12)


def test_a_site_in_plates():
    network, x = make(2, 3, context_dim=C), torch.randint(2, (5, 3)).double()

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(C), 1.0).to_event(1))
            p = Autoregressive(network, z, dtype=z.dtype)
            pyro.sample("x", p, obs=x)
            pyro.sample("y", p)

    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (4, 5)
    assert trace.nodes["y"]["value"].shape == (4, 5, 3)
    p = Autoregressive(network, trace.nodes["z"]["value"])
    assert torch.equal(trace.nodes["x"]["log_prob"], p.log_prob(x))


# --- learning ------------------------------------------------------------------------------------


def test_learns_a_markov_chain():
    """KL to the chain, exact by enumeration, falls below the noise of one batch of N draws."""
    rows = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]])
    states = sequences()
    steps = rows[states[:, :-1], states[:, 1:]]
    log_p = steps.log().sum(-1) - torch.tensor(3.0).log()
    network = CausalTransformer(K, T, width=16, num_layers=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 150)

    def kl():
        log_q = Autoregressive(network).log_prob(states).detach()
        return float((log_p.exp() * (log_p - log_q)).sum())

    before = kl()
    for _ in range(150):
        draws = states[torch.multinomial(log_p.exp(), 500, replacement=True)]
        optimizer.zero_grad()
        (-Autoregressive(network).log_prob(draws).mean()).backward()
        optimizer.step()
        schedule.step()
    # Counting transitions in a single batch has an expected KL of 8 free parameters / 2N.
    assert 0 < kl() < 8 / (2 * 500) < before


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([0.0, 3.0, 1.0, 0.0], r"from 0 to 2, found 3 at position \[1\]"),
        ([0, -1, 1, 0], r"found -1 at position \[1\] \(1 of 4"),
        ([0.5, 0.0, 1.0, 0.0], "found 0.5"),
        ([float("nan"), 0.0, 1.0, 0.0], "found nan"),
        ([0.0, 1.0, 2.0], r"sequences of 4 tokens .* found shape \(3,\)"),
        (1.0, r"found shape \(\)"),
    ],
)
def test_values_that_are_no_tokens(value, found):
    with pytest.raises(ValueError, match=found):
        Autoregressive(make()).log_prob(torch.tensor(value))


@pytest.mark.parametrize(
    ("kind", "shape", "match"),
    [
        ("none", (5, C), r"takes no context, found shape \(5, 2\)"),
        ("vector", None, r"context of shape \(..., 2\), found none"),
        ("vector", (5, C + 1), r"\(..., 2\), found shape \(5, 3\)"),
        ("per position", (5, C), r"\(..., 4, 2\), found shape \(5, 2\)"),
    ],
)
def test_context_that_the_network_does_not_take(kind, shape, match):
    c = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=match):
        Autoregressive(make(**KINDS[kind]), c)


def test_arguments_out_of_range():
    for arguments, match in [
        ((1, 4), "num_values must be an integer >= 2"),
        ((2, 0), "length must be an integer >= 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            CausalTransformer(*arguments)
    with pytest.raises(ValueError, match="num_heads=4 does not divide width=6"):
        CausalTransformer(2, 3, width=6)
    with pytest.raises(ValueError, match="context_per_position needs context_dim"):
        CausalTransformer(2, 3, context_per_position=True)
    with pytest.raises(ValueError, match=r"1 to 4 tokens .* found shape \(2, 5\)"):
        make()(torch.zeros(2, 5, dtype=torch.long))

"""The VAE with Bernoulli latents: densities by hand, evidence and bounds by enumeration."""

import math
from itertools import pairwise, product

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI

from pyro_vi_ext import ImportanceWeightedELBO, log_evidence
from pyro_vi_ext.models.bernoulli_vae import BernoulliVAE

pytestmark = pytest.mark.usefixtures("float64")

D, N = 6, 5
SIZES = {
    "1": ((3,), None),
    "2": ((2, 3), None),
    "nonlinear": ((3,), ((5, 4),)),
    "3": ((2, 1, 2), None),
}


def make(kind="1", **options):
    vae = BernoulliVAE(D, *SIZES[kind], **{"data_mean": torch.linspace(0.1, 0.8, D), **options})
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return vae


def data(rows=N):
    return torch.randint(2, (rows, D)).to(torch.get_default_dtype())


def traces(vae, x, particles=None, latents=None, **kwargs):
    """A guide trace, drawn or at given latents, and the model's replayed against it."""
    fixed = poutine.condition(vae.guide, latents or {})
    with pyro.plate("particles", particles, dim=-2) if particles else poutine.block(hide=[]):
        guide = poutine.trace(fixed).get_trace(x, **kwargs)
        model = poutine.trace(poutine.condition(vae.model, drawn(guide))).get_trace(x, **kwargs)
    for trace in (guide, model):
        trace.compute_log_prob()
    return guide, model


def drawn(trace):
    """The latents of a guide trace, bottom to top."""
    nodes = trace.nodes.items()
    return {n: node["value"] for n, node in nodes if node["type"] == "sample" and n[0] == "b"}


# --- densities by hand ----------------------------------------------------------------------------


def perceptron(network, h):
    linears = list(network)[::2]
    for linear in linears[:-1]:
        h = torch.tanh(h @ linear.weight.T + linear.bias)
    return h @ linears[-1].weight.T + linears[-1].bias


def log_bernoulli(b, logits):
    p = 1 / (1 + (-logits).exp())
    return (b * p.log() + (1 - b) * (1 - p).log()).sum(-1)


def by_hand(vae, x, b):
    """log q and log p of each layer, bottom to top, and log p(x | b_1)."""
    below = [x - vae.data_mean, *(2 * v - 1 for v in b)]
    log_q = [
        log_bernoulli(v, perceptron(net, h))
        for v, net, h in zip(b, vae.encoder, below[:-1], strict=True)
    ]
    downwards = [
        log_bernoulli(v, perceptron(net, h))
        for v, net, h in zip([x, *b[:-1]], vae.decoder, below[1:], strict=True)
    ]
    return log_q, [*downwards[1:], log_bernoulli(b[-1], vae.decoder.prior_logits)], downwards[0]


def check_densities(vae, x, guide, model):
    b = [*drawn(guide).values()]
    log_q, log_p, log_likelihood = by_hand(vae, x, b)
    for i, v in enumerate(b):
        assert guide.nodes[f"b{i + 1}"]["log_prob"].allclose(log_q[i], rtol=1e-10)
        assert model.nodes[f"b{i + 1}"]["log_prob"].allclose(log_p[i], rtol=1e-10)
        assert guide.nodes[f"b{i + 1}"]["log_prob"].shape == v.shape[:-1]
    assert model.nodes["x"]["log_prob"].allclose(log_likelihood, rtol=1e-10)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("particles", [None, 4])
def test_log_densities_by_hand(kind, particles):
    vae, x = make(kind), data()
    guide, model = traces(vae, x, particles)
    check_densities(vae, x, guide, model)
    batch = (N,) if particles is None else (particles, N)
    values = drawn(guide)
    assert [*values] == [f"b{i + 1}" for i in range(len(vae.latent_dims))]
    assert [v.shape for v in values.values()] == [(*batch, d) for d in vae.latent_dims]
    assert set(torch.cat([v.flatten() for v in values.values()]).tolist()) == {0.0, 1.0}
    assert model.nodes["x"]["log_prob"].shape == batch


@pytest.mark.parametrize("kind", SIZES)
def test_relaxed_latents_have_linear_densities_and_gradients_by_hand(kind):
    vae, x = make(kind), data()
    latents = {  # two dimensions of copies and particles on the left
        f"b{i + 1}": torch.rand(2, 4, N, d, requires_grad=True)
        for i, d in enumerate(vae.latent_dims)
    }
    with pyro.validation_enabled(False):
        guide, model = traces(vae, x, latents=latents)
    check_densities(vae, x, guide, model)
    inputs = [*latents.values(), *vae.parameters()]
    found = sum(t.log_prob_sum() for t in (guide, model))
    log_q, log_p, log_likelihood = by_hand(vae, x, [*latents.values()])
    expected = (sum(log_q) + sum(log_p) + log_likelihood).sum()
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert a.allclose(b, rtol=1e-8, atol=1e-10) and a.any()


# --- enumeration ----------------------------------------------------------------------------------


def states(vae):
    """All values of the layers, each of shape (S, 1, d_l)."""
    everything = torch.tensor([*product((0.0, 1.0), repeat=sum(vae.latent_dims))])
    return everything.unsqueeze(1).split(vae.latent_dims, -1)


@torch.no_grad()
def enumerated(vae, x):
    """log q(b | x) and log w = log p(x, b) - log q(b | x) of all states, each (S, N)."""
    log_q, log_p, log_likelihood = by_hand(vae, x, states(vae))
    log_q = sum(log_q)
    return log_q, sum(log_p) + log_likelihood - log_q


def evidence(vae, x):
    log_q, log_w = enumerated(vae, x)
    return (log_q + log_w).logsumexp(0)


def multi_sample_bound(vae, x, num_particles):
    """E log 1/K sum_k w_k over all K-tuples of states, for each datum."""
    log_q, log_w = enumerated(vae, x)
    tuples = torch.cartesian_prod(*[torch.arange(len(log_q))] * num_particles)
    tuples = tuples.reshape(-1, num_particles)
    bound = log_w[tuples].logsumexp(1) - math.log(num_particles)
    return (log_q[tuples].sum(1).exp() * bound).sum(0)


def is_mean(samples, expected):
    se = samples.std(0) / len(samples) ** 0.5
    return bool(((samples.mean(0) - expected).abs() < 4 * se).all())


@pytest.mark.parametrize("kind", SIZES)
def test_the_model_and_the_guide_are_normalised(kind):
    vae, x = make(kind), data(1)
    log_q, _ = enumerated(vae, x)
    assert log_q.logsumexp(0).abs().max() < 1e-12
    everything = torch.tensor([*product((0.0, 1.0), repeat=D)])
    assert abs(evidence(vae, everything).logsumexp(0)) < 1e-12


@pytest.mark.parametrize("kind", SIZES)
def test_log_evidence_finds_the_enumerated_one(kind):
    vae, x = make(kind), data()
    truth = evidence(vae, x)
    found = log_evidence(vae.model, vae.guide, x, num_particles=20_000, chunk_size=4000)
    assert ((found.log_evidence - truth).abs() < 4 * found.standard_error).all()
    assert not ((found.log_evidence - truth - 0.1).abs() < 4 * found.standard_error).all()


@pytest.mark.parametrize("kind", ["1", "2"])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_the_bound_is_the_enumerated_one_at_the_same_number_of_particles(kind, num_particles):
    vae, x = make(kind), data()
    exact = multi_sample_bound(vae, x, num_particles)
    other = multi_sample_bound(vae, x, 3 - num_particles)
    objective = ImportanceWeightedELBO(num_particles=num_particles)
    for i in range(2):
        copies = x[i].expand(100, D)  # of one datum, with draws of their own
        with torch.no_grad():
            losses = [objective.loss(vae.model, vae.guide, copies) for _ in range(100)]
        bounds = -torch.tensor(losses) / len(copies)
        assert is_mean(bounds, exact[i])
        assert not is_mean(bounds, other[i])


@pytest.mark.parametrize("kind", SIZES)
def test_samples_have_the_enumerated_probabilities(kind):
    vae, n = make(kind), 20_000
    everything = torch.tensor([*product((0.0, 1.0), repeat=D)])
    probs = evidence(vae, everything).exp()
    x = vae.sample(n)
    assert x.shape == (n, D)
    counts = torch.bincount((x @ 2.0 ** torch.arange(D - 1.0, -1.0, -1.0)).long(), minlength=2**D)
    expected = n * probs
    common = expected > 20
    chi = ((counts - expected) / (expected * (1 - probs)).sqrt())[common]
    assert common.sum() > 10 and chi.abs().max() < 4.5


# --- running it ----------------------------------------------------------------------------------


def test_the_mean_over_minibatches_is_the_full_log_joint():
    vae, x = make("2"), data(12)
    b = {"b1": torch.randint(2, (12, 2)) * 1.0, "b2": torch.randint(2, (12, 3)) * 1.0}

    def log_joint(fn, rows, **kwargs):
        given = {name: value[rows] for name, value in b.items()}
        trace = poutine.trace(poutine.condition(fn, given)).get_trace(x[rows], **kwargs)
        return trace.log_prob_sum().item()

    for fn in (vae.model, vae.guide):
        full = log_joint(fn, torch.arange(12))
        for extra in (lambda rows: {}, lambda rows: {"index": rows}):
            parts = [
                log_joint(fn, rows, size=12, **extra(rows)) for rows in torch.randperm(12).split(3)
            ]
            assert sum(parts) / 4 == pytest.approx(full, rel=1e-12)
            assert parts[0] != pytest.approx(full, rel=1e-3)


def test_the_multi_sample_bound_has_the_scale_outside():
    vae, x = make("2"), data()
    objective, losses = ImportanceWeightedELBO(num_particles=4), []
    for size in (None, 10 * N):
        pyro.set_rng_seed(3)
        losses.append(objective.loss_and_grads(vae.model, vae.guide, x, size=size))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)


@pytest.mark.parametrize("kind", SIZES)
def test_svi_trains_all_parameters(kind):
    x = data(1).expand(20, D).clone()
    vae = make(kind)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    objective = ImportanceWeightedELBO(num_particles=5)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.03}), objective)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    for name, parameter in vae.named_parameters():
        assert not parameter.equal(before[name]), name
    stored = {id(p) for p in dict(pyro.get_param_store().named_parameters()).values()}
    assert stored == {id(p) for p in vae.parameters()}


def test_a_torch_optimizer_sees_all_parameters():
    vae, x = make("2"), data()
    module = ImportanceWeightedELBO(num_particles=3)(vae.model, vae.guide)
    module(x).backward()
    assert {id(p) for p in module.parameters()} == {id(p) for p in vae.parameters()}
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_networks(dtype):
    vae = make("2").to(dtype)
    for x in (data(), data().float(), data().bool(), data().to(torch.uint8)):
        guide, model = traces(vae, x, 3)
        assert model.nodes["x"]["log_prob"].dtype == guide.nodes["b2"]["value"].dtype == dtype
    assert vae.sample(2).dtype == dtype


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu():
    vae, x = make("2").cuda(), data().cuda()
    module = ImportanceWeightedELBO(num_particles=3)(vae.model, vae.guide)
    loss = module(x, torch.arange(N, device="cuda"), size=100)
    loss.backward()
    assert loss.is_cuda and all(p.grad.is_cuda for p in vae.parameters())
    assert vae.sample(2).is_cuda
    with pytest.raises(ValueError, match=r'site "x".*cpu.*cuda:0'):
        vae.model(x.cpu())


# --- initialisation ------------------------------------------------------------------------------


def test_the_architectures_of_the_papers():
    def count(*widths):
        return sum(a * b + b for a, b in pairwise(widths))

    for options, up in (
        ((), (784, 200)),
        (((200, 200),), (784, 200, 200)),
        (((200,), ((200, 200),)), (784, 200, 200, 200)),
    ):
        vae = BernoulliVAE(784, *options)
        assert sum(p.numel() for p in vae.encoder.parameters()) == count(*up)
        assert sum(p.numel() for p in vae.decoder.parameters()) == count(*up[::-1]) + 200
        tanh = [m for m in vae.modules() if isinstance(m, torch.nn.Tanh)]
        assert len(tanh) == (4 if len(options) == 2 else 0)
        for linear in [m for m in vae.modules() if isinstance(m, torch.nn.Linear)]:
            limit = (6 / sum(linear.weight.shape)) ** 0.5
            assert limit > linear.weight.abs().max() > 0.99 * limit
            assert not linear.bias.any()
        assert not vae.decoder.prior_logits.any()
    uneven = BernoulliVAE(D, (3, 2), ((9, 8), (7, 5)))
    for net, widths in ((uneven.decoder[0], (3, 8, 9, D)), (uneven.decoder[1], (2, 5, 7, 3))):
        assert tuple((m.in_features, m.out_features) for m in net[::2]) == tuple(pairwise(widths))


def test_the_output_starts_at_the_mean_of_the_data_and_the_input_is_centred():
    mean = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    vae = BernoulliVAE(D, data_mean=mean)
    half = {"b1": torch.full((2, 200), 0.5)}  # relaxed: 2b - 1 = 0
    x = (mean > 0.5).expand(2, D)
    with pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(vae.model, half)).get_trace(x)
        at_mean = poutine.trace(vae.guide).get_trace(mean.expand(2, D))
    assert trace.nodes["x"]["fn"].mean.allclose(mean.clamp(0.001, 0.999))
    assert trace.nodes["b1"]["fn"].mean.equal(torch.full((2, 200), 0.5))
    assert not at_mean.nodes["b1"]["fn"].base_dist.logits.any()
    assert BernoulliVAE(D).data_mean.equal(torch.full((D,), 0.5))
    mean.zero_()
    assert vae.data_mean[-1] == 1.0  # a copy
    assert "data_mean" in vae.state_dict() and vae.float().data_mean.dtype == torch.float32


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["model", "guide"])
def test_errors_name_the_site_what_was_found_and_what_to_do(side):
    vae, x = make(), data()
    call = getattr(vae, side)
    with pytest.raises(ValueError, match=r'site "x".*\(B, 6\), found \(5, 4\); flatten'):
        call(x[:, :4])
    with pytest.raises(ValueError, match=r'site "x".*found \(5, 2, 3\)'):
        call(x.reshape(5, 2, 3))
    with pytest.raises(ValueError, match=r'site "x".*data on meta and the networks on cpu'):
        call(x.to("meta"))
    for bad, message in ((0.3, "binarize"), (math.nan, "drop"), (2.0, "drop"), (-1.0, "drop")):
        broken = x.clone()
        broken[2, 4] = bad
        with pytest.raises(
            ValueError, match=rf'site "x".*zeros and ones.*row 2, column 4.*{message}'
        ):
            call(broken)
    with pytest.raises(ValueError, match=r'plate "data".*5 rows and index shape \(4,\)'):
        call(x, torch.arange(4))
    with pytest.raises(ValueError, match=r'plate "data": size=3 .*5 rows'):
        call(x, size=3)
    with pyro.validation_enabled(False):
        call(x * 0.5)


def test_two_models_of_one_name_do_not_train_each_other():
    x, first, second = data(), make(), make()
    first.model(x), first.guide(x)
    for call in (second.model, second.guide):
        with pytest.raises(ValueError, match=r"'bernoulli_vae\.\w+\$\$\$.*clear_param_store"):
            call(x)
    make(name="third").model(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dims": 3}, "latent_dims=3"),
        ({"latent_dims": ()}, r"latent_dims=\(\)"),
        ({"latent_dims": (0,)}, r"latent_dims=\(0,\)"),
        ({"hidden_dims": (200, 200)}, r"hidden_dims=\(200, 200\)"),
        ({"hidden_dims": ()}, r"each of the 1 stochastic.*None"),
        ({"latent_dims": (3, 2), "hidden_dims": ((4,),)}, r"each of the 2 stochastic"),
        ({"data_mean": torch.zeros(5)}, r"data_mean must be 6 .*\(5,\)"),
        ({"data_mean": torch.full((6,), math.nan)}, "data_mean must be 6 .*nan"),
        ({"data_mean": torch.full((6,), 7.0)}, r"data_mean must be 6 .*\[0, 1\].*7 to 7"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BernoulliVAE(D, **options)

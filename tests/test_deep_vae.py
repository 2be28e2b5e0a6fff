"""The deep VAE: densities by hand, evidence in closed form, shapes, scales, errors."""

import math
from itertools import pairwise

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import MultivariateNormal

from pyro_vi_ext import ImportanceWeightedELBO
from pyro_vi_ext.models.deep_vae import DeepVAE

pytestmark = pytest.mark.usefixtures("float64")

D, N = 6, 7
SIZES = {1: ((3,), ((5, 4),)), 2: ((4, 3), ((5, 4), (6,))), 3: ((4, 3, 2), ((5,), (), (3,)))}


def make(layers=1, likelihood="bernoulli", **options):
    vae = DeepVAE(D, *SIZES[layers], likelihood=likelihood, **options)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return vae


def data(likelihood="bernoulli", rows=N):
    x = torch.randn(rows, D)
    return (x > 0).to(x) if likelihood == "bernoulli" else x


def traces(vae, x, particles=None, *args, **kwargs):
    """A guide trace and the model's replayed against it; particles in a plate on the left."""
    with pyro.plate("particles", particles, dim=-2) if particles else poutine.block(hide=[]):
        guide = poutine.trace(vae.guide).get_trace(x, *args, **kwargs)
        model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x, *args, **kwargs)
    for trace in (guide, model):
        trace.compute_log_prob()
    return guide, model


def log_weights(vae, x, particles):
    guide, model = traces(vae, x, particles)
    latents = [n for n in guide.nodes if n[0] == "z"]
    log_q = sum(guide.nodes[n]["log_prob"] for n in latents)
    return sum(model.nodes[n]["log_prob"] for n in [*latents, "x"]) - log_q


# --- densities -----------------------------------------------------------------------------------


def perceptron(network, h):
    linears = list(network)[::2]
    for linear in linears[:-1]:
        h = torch.tanh(h @ linear.weight.T + linear.bias)
    return h @ linears[-1].weight.T + linears[-1].bias


def log_normal(z, mean, log_scale):
    terms = -0.5 * ((z - mean) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)
    return terms.sum(-1)


def heads(network, h):
    out = perceptron(network, h)
    half = out.shape[-1] // 2
    return out[..., :half], out[..., half:]


def by_hand(vae, x, z):
    """log q(z_l | ...) and log p(z_l | ...) of each layer, and log p(x | z_1)."""
    log_q = [log_normal(z[0], *heads(vae.encoder[0], x))]
    log_p = []
    for i in range(1, len(z)):
        log_q.append(log_normal(z[i], *heads(vae.encoder[i], z[i - 1])))
        log_p.append(log_normal(z[i - 1], *heads(vae.decoder[i], z[i])))
    log_p.append(log_normal(z[-1], torch.zeros(()), torch.zeros(())))
    out = perceptron(vae.decoder[0], z[0])
    if vae.likelihood == "gaussian":
        return log_q, log_p, log_normal(x, out, vae.decoder.x_log_scale)
    p = 1 / (1 + (-out).exp())
    return log_q, log_p, (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("particles", [None, 5])
def test_log_densities_by_hand(layers, likelihood, particles):
    vae, x = make(layers, likelihood), data(likelihood)
    guide, model = traces(vae, x, particles)
    names = [f"z{i}" for i in range(1, layers + 1)]
    z = [guide.nodes[name]["value"] for name in names]
    batch = (N,) if particles is None else (particles, N)
    assert [v.shape for v in z] == [(*batch, d) for d in vae.latent_dims]
    log_q, log_p, log_likelihood = by_hand(vae, x, z)
    for i, name in enumerate(names):
        assert guide.nodes[name]["log_prob"].allclose(log_q[i], rtol=1e-10)
        assert model.nodes[name]["log_prob"].allclose(log_p[i], rtol=1e-10)
    assert model.nodes["x"]["log_prob"].shape == batch
    assert model.nodes["x"]["log_prob"].allclose(log_likelihood, rtol=1e-10)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gradients_by_hand(layers, likelihood):
    vae, x = make(layers, likelihood), data(likelihood)
    pyro.set_rng_seed(4)
    trace = poutine.trace(vae.guide).get_trace(x)
    below, z = x, []
    for i, network in enumerate(vae.encoder, 1):
        mean, log_scale = heads(network, below)
        node = trace.nodes[f"z{i}"]
        noise = ((node["value"] - node["fn"].mean) / node["fn"].stddev).detach()
        below = mean + log_scale.exp() * noise
        z.append(below)
    log_q, log_p, log_likelihood = by_hand(vae, x, z)
    loss = (sum(log_q) - sum(log_p) - log_likelihood).sum()
    expected = torch.autograd.grad(loss, list(vae.parameters()))
    pyro.set_rng_seed(4)
    found = Trace_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, x)
    assert found.item() == pytest.approx(loss.item(), rel=1e-10)
    found = torch.autograd.grad(found, list(vae.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert a.allclose(b, rtol=1e-8, atol=1e-10)


def linear_vae(latent_dims):
    """Networks without hidden layers, the model's of constant scales: its evidence is Gaussian."""
    vae = DeepVAE(D, latent_dims, ((),) * len(latent_dims), likelihood="gaussian")
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
        for i, d in enumerate(latent_dims[:-1]):
            vae.decoder[i + 1][0].weight[d:] = 0.0
    return vae


def downwards(vae):
    """Weight, bias and log-scale of each map of the linear model, from the top to x."""
    for i in reversed(range(len(vae.latent_dims))):
        w, b = vae.decoder[i][0].weight.detach(), vae.decoder[i][0].bias.detach()
        half = len(b) // 2
        yield (w[:half], b[:half], b[half:]) if i else (w, b, vae.decoder.x_log_scale.detach())


def evidence(vae):
    mean, covariance = torch.zeros(vae.latent_dims[-1]), torch.eye(vae.latent_dims[-1])
    for w, b, log_scale in downwards(vae):
        mean, covariance = w @ mean + b, w @ covariance @ w.T + (2 * log_scale).exp().diag()
    return MultivariateNormal(mean, covariance)


@torch.no_grad()
def set_guide(vae, wider):
    """Each layer of the guide: the exact mean given the layer below, the sd times `wider`."""
    mean, prior = torch.zeros(vae.latent_dims[-1]), torch.eye(vae.latent_dims[-1])
    for network, (w, b, log_scale) in zip(reversed(vae.encoder), downwards(vae), strict=True):
        marginal = w @ prior @ w.T + (2 * log_scale).exp().diag()
        gain = prior @ w.T @ marginal.inverse()
        sd = (prior - gain @ w @ prior).diagonal().sqrt()
        network[0].weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
        network[0].bias.copy_(torch.cat([mean - gain @ (w @ mean + b), (wider * sd).log()]))
        mean, prior = w @ mean + b, marginal


def is_mean(weights, expected):
    se = weights.std(0) / len(weights) ** 0.5
    return bool(((weights.mean(0) - expected).abs() < 4 * se).all())


@pytest.mark.parametrize("latent_dims", [(2,), (3, 2)])
def test_mean_weight_is_the_evidence_of_the_linear_model(latent_dims):
    vae, x = linear_vae(latent_dims), data("gaussian")
    set_guide(vae, wider=1.5)
    truth = evidence(vae).log_prob(x)
    weights = (log_weights(vae, x, 40_000) - truth).exp().detach()
    assert is_mean(weights, 1.0)
    assert not is_mean(weights, math.exp(0.1))  # a constant of 0.1 nats would be seen
    assert ((weights.std(0) / 200) < 0.02).all()


def test_exact_posterior_has_constant_weights():
    # Orthogonal columns and one noise scale: the posterior is diagonal, of constant scale.
    vae, x = linear_vae((2,)), data("gaussian")
    with torch.no_grad():
        vae.decoder[0][0].weight.copy_(torch.linalg.qr(torch.randn(D, 2))[0] * 2.0)
        vae.decoder.x_log_scale.fill_(-0.4)
    set_guide(vae, wider=1.0)
    truth = evidence(vae).log_prob(x)
    assert log_weights(vae, x, 20).allclose(truth.expand(20, N), rtol=1e-10)


def test_the_guide_of_the_second_layer_depends_on_the_first():
    vae, x = make(2), data()
    z1 = torch.randn(N, 4)
    for value in (z1, z1 + 1.0):
        conditioned = poutine.condition(vae.guide, {"z1": value})
        fn = poutine.trace(conditioned).get_trace(x).nodes["z2"]["fn"]
        assert fn.mean.allclose(heads(vae.encoder[1], value)[0], rtol=1e-12)
    assert not heads(vae.encoder[1], z1)[0].allclose(heads(vae.encoder[1], z1 + 1.0)[0])


# --- running it ----------------------------------------------------------------------------------


def test_networks_that_see_only_x_run_once_per_datum():
    vae, x, seen = make(2), data(), {}
    for name in ("encoder", "decoder"):
        for i, network in enumerate(getattr(vae, name)):
            network.register_forward_pre_hook(
                lambda _, args, key=(name, i): seen.update({key: tuple(args[0].shape)})
            )
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    loss.loss(vae.model, vae.guide, x)
    assert seen == {
        ("encoder", 0): (N, D),
        ("encoder", 1): (5, N, 4),
        ("decoder", 0): (5, N, 4),
        ("decoder", 1): (5, N, 3),
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_sequential_and_vectorised_particles_have_the_same_mean(layers):
    vae, x = make(layers), data()
    draws = {}
    for vectorised in (False, True):
        elbo = Trace_ELBO(2, max_plate_nesting=1, vectorize_particles=vectorised)
        with torch.no_grad():
            losses = [elbo.loss(vae.model, vae.guide, x) for _ in range(300)]
        draws[vectorised] = torch.tensor(losses)
    a, b = draws.values()
    assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / 300).sqrt()


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_the_multi_sample_bound_has_the_scale_outside(gradient):
    vae, x = make(2), data()
    objective = ImportanceWeightedELBO(num_particles=4, gradient=gradient)
    losses = []
    for size in (None, 10 * N):
        pyro.set_rng_seed(3)
        losses.append(objective.loss_and_grads(vae.model, vae.guide, x, size=size))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)
    objective = ImportanceWeightedELBO(num_particles=4)
    pyro.set_rng_seed(3)
    found = objective.loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    log_w = log_weights(vae, x, 4).detach()
    assert found == pytest.approx(-(log_w.logsumexp(0) - math.log(4)).sum().item(), rel=1e-10)


def test_the_mean_over_minibatches_is_the_full_log_joint():
    vae, x = make(2), data(rows=12)
    z = {"z1": torch.randn(12, 4), "z2": torch.randn(12, 3)}

    def log_joint(fn, rows, **kwargs):
        given = {name: value[rows] for name, value in z.items()}
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


def test_a_minibatch_takes_no_random_numbers_for_its_positions():
    vae, x = make(), data()
    state = torch.get_rng_state()
    poutine.trace(poutine.condition(vae.model, {"z1": torch.zeros(N, 3)})).get_trace(x, size=10**6)
    assert state.equal(torch.get_rng_state())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("layers", [1, 2])
def test_svi_trains_all_parameters(layers, likelihood):
    pattern = data(likelihood, rows=1)
    x = (pattern if likelihood == "bernoulli" else 3.0 * pattern).expand(20, D).clone()
    vae = make(layers, likelihood)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, parameter in vae.named_parameters():
        assert not parameter.equal(before[name]), name
    stored = {id(p) for p in dict(pyro.get_param_store().named_parameters()).values()}
    assert stored == {id(p) for p in vae.parameters()}


def test_a_torch_optimizer_sees_all_parameters():
    vae, x = make(2, "gaussian"), data("gaussian")
    module = ImportanceWeightedELBO(num_particles=3)(vae.model, vae.guide)
    module(x).backward()
    assert {id(p) for p in module.parameters()} == {id(p) for p in vae.parameters()}
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_networks(dtype):
    vae = make(2).to(dtype)
    for x in (data(), data().float(), data().bool(), data().to(torch.uint8)):
        guide, model = traces(vae, x, 3)
        assert model.nodes["x"]["log_prob"].dtype == guide.nodes["z2"]["value"].dtype == dtype
    assert vae.sample(2).dtype == vae.decode(vae.encode(data())[0]).dtype == dtype


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_step_on_the_gpu(likelihood):
    vae, x = make(2, likelihood).cuda(), data(likelihood).cuda()
    module = ImportanceWeightedELBO(num_particles=3)(vae.model, vae.guide)
    loss = module(x, torch.arange(N, device="cuda"), size=100)
    loss.backward()
    assert loss.is_cuda and all(p.grad.is_cuda for p in vae.parameters())
    assert vae.active_units(x).variances[1].is_cuda and vae.sample(2).is_cuda
    with pytest.raises(ValueError, match=r'site "x".*cpu.*cuda:0'):
        vae.model(x.cpu())


# --- initialisation ------------------------------------------------------------------------------


def test_the_architectures_of_the_paper():
    def count(*widths):
        return sum(a * b + b for a, b in pairwise(widths))

    one = DeepVAE(784)
    assert sum(p.numel() for p in one.encoder.parameters()) == count(784, 200, 200, 100)
    assert sum(p.numel() for p in one.decoder.parameters()) == count(50, 200, 200, 784)
    two = DeepVAE(784, (100, 50), ((200, 200), (100, 100)))
    encoder = count(784, 200, 200, 200) + count(100, 100, 100, 100)
    decoder = count(50, 100, 100, 200) + count(100, 200, 200, 784)
    assert sum(p.numel() for p in two.encoder.parameters()) == encoder
    assert sum(p.numel() for p in two.decoder.parameters()) == decoder
    uneven = DeepVAE(D, (3, 2), ((9, 8), (7, 5)))
    for net, widths in ((uneven.decoder[0], (3, 8, 9, D)), (uneven.decoder[1], (2, 5, 7, 2 * 3))):
        assert tuple((m.in_features, m.out_features) for m in net[::2]) == tuple(pairwise(widths))
    for linear in [m for m in two.modules() if isinstance(m, torch.nn.Linear)]:
        assert not linear.bias.any()
    for head in two.encoder[1][-1].weight.chunk(2):  # Glorot for 100 -> 50, not for 100 -> 100
        assert 0.2 > head.abs().max() > 0.99 * 0.2 == 0.99 * (6 / 150) ** 0.5


def test_the_output_starts_at_the_mean_of_the_data():
    mean = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    vae = DeepVAE(D, (3,), ((4,),), data_mean=mean)
    start = vae.decode(torch.zeros(3))
    assert start.allclose(mean.clamp(0.001, 0.999))
    vae = DeepVAE(D, (3,), ((4,),), likelihood="gaussian", data_mean=mean * 10)
    assert vae.decode(torch.zeros(3)).allclose(mean * 10)


# --- what else it does ---------------------------------------------------------------------------


def test_encode_and_decode():
    vae, x = make(2), data()
    mean, scale = vae.encode(x)
    expected = heads(vae.encoder[0], x)
    assert mean.allclose(expected[0]) and scale.log().allclose(expected[1])
    assert vae.decode(mean).allclose(perceptron(vae.decoder[0], mean).sigmoid())
    z2 = torch.randn(5, N, 3)
    by_means = vae.decode(heads(vae.decoder[1], z2)[0])
    assert by_means.shape == (5, N, D) and vae.decode(z2, layer=2).allclose(by_means)


def test_samples_have_the_moments_of_the_linear_model():
    vae = linear_vae((3, 2))
    truth, n = evidence(vae), 50_000
    x = vae.sample(n)
    assert x.shape == (n, D)
    assert ((x.mean(0) - truth.mean).abs() < 4 * (truth.variance / n).sqrt()).all()
    products = (x - truth.mean)[:, :, None] * (x - truth.mean)[:, None, :]
    assert is_mean(products, truth.covariance_matrix)
    assert set(make().sample(50).unique().tolist()) == {0.0, 1.0}


def test_active_units_are_counted_without_the_noise_of_the_draws():
    vae, x = linear_vae((3, 2)), data("gaussian")
    with torch.no_grad():
        vae.encoder[0][0].weight[0] = 0.0  # the first unit ignores the data
        vae.encoder[1][0].weight[1, 1:] = 0.0  # the second depends on that unit only
    weight, bias = vae.encoder[0][0].weight[:3], vae.encoder[0][0].bias[:3]
    z1 = x @ weight.T + bias
    z2 = z1 @ vae.encoder[1][0].weight[:2].T
    runs = [vae.active_units(x, num_draws=2) for _ in range(1000)]
    assert runs[0].counts[0] == 2 and runs[0].variances[0].allclose(z1.var(0))
    found = torch.stack([run.variances[1] for run in runs])
    assert z2.var(0)[1] < 1e-12 and is_mean(found, z2.var(0))
    # The variance of the mean of two draws would be too large by half the variance of a draw.
    noise = (vae.encode(x)[1] ** 2).mean(0) @ (vae.encoder[1][0].weight[:2] ** 2).T
    assert not is_mean(found, z2.var(0) + noise / 2)
    assert vae.active_units(x, num_draws=4000).counts == [2, 1]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["model", "guide", "encode"])
def test_errors_name_the_site_what_was_found_and_what_to_do(side):
    vae, x = make(), data()
    call = getattr(vae, side)
    with pytest.raises(ValueError, match=r'site "x".*\(B, 6\), found \(7, 5\); flatten'):
        call(x[:, :5])
    with pytest.raises(ValueError, match=r'site "x".*found \(7, 2, 3\)'):
        call(x.reshape(7, 2, 3))
    with pytest.raises(ValueError, match=r'site "x".*data on meta and the networks on cpu'):
        call(x.to("meta"))
    for bad, message in ((0.3, "binarize"), (math.nan, "drop"), (2.0, "drop"), (-1.0, "drop")):
        broken = x.clone()
        broken[2, 4] = bad
        with pytest.raises(
            ValueError, match=rf'site "x".*zeros and ones.*row 2, column 4.*{message}'
        ):
            call(broken)
    gaussian, broken = make(likelihood="gaussian", name="other"), data("gaussian")
    getattr(gaussian, side)(broken)
    broken[0, 1] = math.inf
    with pytest.raises(ValueError, match=r'site "x".*finite numbers, found inf in row 0, column 1'):
        getattr(gaussian, side)(broken)


def test_the_check_of_values_is_part_of_validation():
    vae, x = make(), data()
    with pyro.validation_enabled(False):
        vae.model(x * 0.5)


def test_minibatches_that_do_not_fit():
    vae, x = make(), data()
    with pytest.raises(ValueError, match=r'plate "data".*7 rows and index shape \(5,\)'):
        vae.guide(x, torch.arange(5))
    with pytest.raises(ValueError, match=r'plate "data": size=5 .*7 rows'):
        vae.model(x, size=5)


def test_two_models_of_one_name_do_not_train_each_other():
    x = data()
    first, second = make(), make()
    first.model(x), first.guide(x)
    for call in (second.model, second.guide):
        with pytest.raises(ValueError, match=r"'deep_vae\.\w+\$\$\$.*clear_param_store.*name="):
            call(x)
    third = make(name="third")
    third.model(x), first.model(x)
    pyro.clear_param_store()
    second.model(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dims": 3}, "latent_dims=3"),
        ({"latent_dims": ()}, r"latent_dims=\(\)"),
        ({"latent_dims": (0,)}, r"latent_dims=\(0,\)"),
        ({"hidden_dims": (200, 200)}, r"hidden_dims=\(200, 200\)"),
        ({"hidden_dims": None}, r"hidden_dims=None"),
        ({"latent_dims": (3, 2)}, r"each of the 2 stochastic"),
        ({"likelihood": "poisson"}, r"likelihood must be.*'poisson'"),
        ({"data_mean": torch.zeros(5)}, r"data_mean must be 6 .*\(5,\)"),
        ({"data_mean": torch.full((6,), math.nan)}, "data_mean must be 6 finite"),
        ({"data_mean": torch.full((6,), 7.0)}, r"data_mean must be in \[0, 1\].*7 to 7"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DeepVAE(D, **options)


def test_active_units_need_a_variance():
    with pytest.raises(ValueError, match="two or more rows"):
        make().active_units(data(rows=1))

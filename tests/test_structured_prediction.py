"""Structured prediction: the guide is the prior, and the m-sample bound by enumeration."""

import math
from itertools import product

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI

from pyro_vi_ext import ImportanceWeightedELBO, log_evidence
from pyro_vi_ext.models.structured_prediction import StructuredPrediction, halves

pytestmark = pytest.mark.usefixtures("float64")

U, D, N = 4, 3, 5
DIMS = (2, 2)


def make(latent_dims=DIMS, **options):
    means = {"upper_mean": torch.linspace(0.2, 0.9, U), "lower_mean": torch.linspace(0.1, 0.7, D)}
    net = StructuredPrediction(U, D, latent_dims, **{**means, **options})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.8 * torch.randn(parameter.shape)
    return net


def data(rows=N):
    return torch.randint(2, (rows, U)) * 1.0, torch.randint(2, (rows, D)) * 1.0


def traces(net, upper, lower, particles=None, latents=None, **kwargs):
    """A guide trace, drawn or at given latents, and the model's at the same latents."""
    guide = poutine.condition(net.guide, latents or {})
    with pyro.plate("particles", particles, dim=-2) if particles else poutine.block(hide=[]):
        guide = poutine.trace(guide).get_trace(upper, lower, **kwargs)
        model = poutine.condition(net.model, dict(zip(names(net), drawn(net, guide), strict=True)))
        model = poutine.trace(model).get_trace(upper, lower, **kwargs)
    for trace in (guide, model):
        trace.compute_log_prob()
    return guide, model


def names(net):
    return [f"b{i}" for i in range(1, len(net.layers))]


def drawn(net, trace):
    return [trace.nodes[name]["value"] for name in names(net)]


# --- densities by hand ----------------------------------------------------------------------------


def log_bernoulli(b, layer, h):
    p = 1 / (1 + (-h @ layer[0].weight.T - layer[0].bias).exp())
    return (b * p.log() + (1 - b) * (1 - p).log()).sum(-1)


def by_hand(net, upper, lower, b):
    """log p(b_l | ...) of each layer and log p(lower | b_L)."""
    below = [upper - net.upper_mean, *(2 * v - 1 for v in b)]
    log_p = [
        log_bernoulli(v, layer, h)
        for v, layer, h in zip([*b, lower], net.layers, below, strict=True)
    ]
    return log_p[:-1], log_p[-1]


def check_densities(net, upper, lower, guide, model):
    log_p, log_likelihood = by_hand(net, upper, lower, drawn(net, guide))
    for name, value in zip(names(net), log_p, strict=True):
        assert guide.nodes[name]["log_prob"].allclose(value, rtol=1e-10)
        assert model.nodes[name]["log_prob"].equal(guide.nodes[name]["log_prob"])
    assert model.nodes["lower"]["log_prob"].allclose(log_likelihood, rtol=1e-10)


@pytest.mark.parametrize("latent_dims", [(3,), (2, 3), (3, 2, 4)])
@pytest.mark.parametrize("particles", [None, 4])
def test_the_guide_is_the_prior_and_the_log_weight_the_likelihood(latent_dims, particles):
    net, (upper, lower) = make(latent_dims), data()
    guide, model = traces(net, upper, lower, particles)
    check_densities(net, upper, lower, guide, model)
    batch = (N,) if particles is None else (particles, N)
    assert [v.shape for v in drawn(net, guide)] == [(*batch, d) for d in latent_dims]
    log_w = sum(model.nodes[name]["log_prob"] for name in [*names(net), "lower"])
    log_w = log_w - sum(guide.nodes[name]["log_prob"] for name in names(net))
    assert log_w.shape == batch
    assert log_w.allclose(model.nodes["lower"]["log_prob"], rtol=1e-10)


def test_relaxed_latents_have_linear_densities_and_gradients_by_hand():
    net, (upper, lower) = make((2, 3)), data()
    latents = {f"b{i}": torch.rand(2, 4, N, d, requires_grad=True) for i, d in enumerate((2, 3), 1)}
    with pyro.validation_enabled(False):
        guide, model = traces(net, upper, lower, latents=latents)
    check_densities(net, upper, lower, guide, model)
    log_p, log_likelihood = by_hand(net, upper, lower, [*latents.values()])
    inputs = [*latents.values(), *net.parameters()]
    found = torch.autograd.grad(model.log_prob_sum(), inputs)
    expected = torch.autograd.grad((sum(log_p) + log_likelihood).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.allclose(b, rtol=1e-8, atol=1e-10) and a.all()


# --- enumeration ----------------------------------------------------------------------------------


def enumerated(net, upper, lower):
    """log p(b | upper) and log p(lower | b) of all states, each (S, N)."""
    dims = [layer[0].out_features for layer in net.layers[:-1]]
    states = torch.tensor([*product((0.0, 1.0), repeat=sum(dims))]).unsqueeze(1)
    log_p, log_likelihood = by_hand(net, upper, lower, states.split(dims, -1))
    return sum(log_p), log_likelihood.expand_as(log_p[0])


def exact_bound(net, upper, lower, m):
    """L_m of each datum, a differentiable sum over all m-tuples of states."""
    log_p, log_w = enumerated(net, upper, lower)
    tuples = torch.cartesian_prod(*[torch.arange(len(log_p))] * m).reshape(-1, m)
    bound = log_w[tuples].logsumexp(1) - math.log(m)
    return (log_p[tuples].sum(1).exp() * bound).sum(0)


def is_mean(samples, expected):
    se = samples.std(0) / len(samples) ** 0.5
    return bool(((samples.mean(0) - expected).abs() < 4 * se).all())


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("m", [1, 2, 3])
def test_value_and_gradient_of_the_bound_are_the_enumerated_ones(m):
    net, (upper, lower) = make(), data()
    parameters, copies = list(net.parameters()), 100
    objective = ImportanceWeightedELBO(num_particles=m)
    rows = [half[:1].expand(copies, -1) for half in (upper, lower)]  # with draws of their own
    values, gradients, pathwise = [], [], []
    for _ in range(150):
        loss = objective.differentiable_loss(net.model, net.guide, *rows)
        values.append(-loss.detach() / copies)
        gradients.append(-flat(torch.autograd.grad(loss, parameters)) / copies)
        _, model = traces(net, *rows, particles=m)
        bound = model.nodes["lower"]["log_prob"].logsumexp(0).mean()
        pathwise.append(flat(torch.autograd.grad(bound, parameters, materialize_grads=True)))
    exact = {k: exact_bound(net, upper[:1], lower[:1], k).squeeze() for k in sorted({m, 1 + m % 3})}
    expected = {k: flat(torch.autograd.grad(v, parameters)) for k, v in exact.items()}
    values, gradients, pathwise = (torch.stack(v) for v in (values, gradients, pathwise))
    assert is_mean(values, exact[m].detach()) and is_mean(gradients, expected[m])
    other = 1 + m % 3
    assert not is_mean(values, exact[other].detach())
    assert not is_mean(gradients, expected[other])
    # Without the score of the draws the hidden layers get no gradient at all.
    assert not is_mean(pathwise, expected[m])
    hidden = sum(p.numel() for p in net.layers[:-1].parameters())
    assert not pathwise[:, :hidden].any() and is_mean(pathwise[:, hidden:], expected[m][hidden:])


def test_the_bound_rises_to_the_enumerated_evidence():
    net, (upper, lower) = make(), data()
    with torch.no_grad():
        log_p, log_w = enumerated(net, upper, lower)
        truth = (log_p + log_w).logsumexp(0)
        bounds = [exact_bound(net, upper, lower, m) for m in (1, 2, 3)]
    for below, above in zip(bounds, [*bounds[1:], truth], strict=True):
        assert (below < above).all()
    for guide in (net.guide, None):  # None proposes from the model's prior: the same
        found = log_evidence(net.model, guide, upper, lower, num_particles=4000, chunk_size=1000)
        assert ((found.log_evidence - truth).abs() < 4 * found.standard_error).all()
        assert not ((found.log_evidence - truth - 0.1).abs() < 4 * found.standard_error).all()


def test_draws_of_the_lower_half_have_the_enumerated_probabilities():
    net, (upper, _), n = make(), data(1), 20_000
    everything = torch.tensor([*product((0.0, 1.0), repeat=D)])
    with torch.no_grad():
        log_p, log_w = enumerated(net, upper.expand(2**D, U), everything)
        probs = (log_p + log_w).logsumexp(0).exp()
        lower = net.model(upper.expand(n, U))
    assert lower.shape == (n, D) and probs.sum() == pytest.approx(1.0, rel=1e-12)
    found = torch.bincount((lower @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=8) / n
    assert ((found - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all()


# --- running it -----------------------------------------------------------------------------------


def test_a_minibatch_has_the_scale_outside_the_bound():
    net, (upper, lower) = make(), data()
    objective, losses = ImportanceWeightedELBO(num_particles=4), []
    for options in ({}, {"size": 10 * N}, {"size": 10 * N, "index": torch.arange(N)}):
        pyro.set_rng_seed(3)
        losses.append(objective.loss_and_grads(net.model, net.guide, upper, lower, **options))
    assert losses[1:] == pytest.approx([10 * losses[0]] * 2, rel=1e-12)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("latent_dims", [(4, 4), (4, 4, 4)])
def test_svi_trains_all_parameters(latent_dims, m):
    upper, lower = (half.expand(20, -1) for half in data(1))
    net = make(latent_dims)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    objective = ImportanceWeightedELBO(num_particles=m)
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.03}), objective)
    losses = [svi.step(upper, lower) for _ in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    for name, parameter in net.named_parameters():
        assert not parameter.equal(before[name]), name
    stored = [id(p) for p in dict(pyro.get_param_store().named_parameters()).values()]
    assert sorted(stored) == sorted(id(p) for p in net.parameters())


def test_a_torch_optimizer_sees_the_shared_parameters_once():
    net, (upper, lower) = make(), data()
    module = ImportanceWeightedELBO(num_particles=3)(net.model, net.guide)
    module(upper, lower).backward()
    found = [id(p) for p in module.parameters()]
    assert sorted(found) == sorted(id(p) for p in net.parameters())
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_networks(dtype):
    net, (upper, lower) = make().to(dtype), data()
    for convert in (torch.Tensor.double, torch.Tensor.float, torch.Tensor.bool):
        guide, model = traces(net, convert(upper), convert(lower), 3)
        assert model.nodes["lower"]["log_prob"].dtype == guide.nodes["b2"]["value"].dtype == dtype


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu():
    net, (upper, lower) = make().cuda(), data()
    module = ImportanceWeightedELBO(num_particles=3)(net.model, net.guide)
    loss = module(upper.cuda(), lower.cuda(), torch.arange(N, device="cuda"), size=100)
    loss.backward()
    assert loss.is_cuda and all(p.grad.is_cuda for p in net.parameters())
    with pytest.raises(ValueError, match=r'"upper".*cpu.*cuda:0'):
        net.guide(upper)


# --- initialisation -------------------------------------------------------------------------------


def test_the_networks_of_the_paper():
    for options, widths in (((), [240, 240]), (((240, 240, 240),), [240, 240, 240])):
        net = StructuredPrediction(392, 392, *options)
        assert all(len(layer) == 1 for layer in net.layers)
        sizes = [(layer[0].in_features, layer[0].out_features) for layer in net.layers]
        assert sizes == [*zip([392, *widths], [*widths, 392], strict=True)]
        for layer in net.layers:
            limit = (6 / sum(layer[0].weight.shape)) ** 0.5
            assert limit > layer[0].weight.abs().max() > 0.99 * limit
            assert not layer[0].bias.any()


def test_the_output_starts_at_the_mean_of_the_data_and_the_input_is_centred():
    mean = torch.tensor([0.0, 0.4, 1.0])
    net = StructuredPrediction(U, D, DIMS, upper_mean=torch.full((U,), 0.3), lower_mean=mean)
    half = {"b1": torch.full((2, 2), 0.5), "b2": torch.full((2, 2), 0.5)}  # relaxed: 2b - 1 = 0
    with pyro.validation_enabled(False):
        model = poutine.condition(net.model, half)
        trace = poutine.trace(model).get_trace(torch.full((2, U), 0.3))
    assert trace.nodes["lower"]["fn"].mean.allclose(mean.clamp(0.001, 0.999))
    assert not trace.nodes["b1"]["fn"].base_dist.logits.any()
    assert StructuredPrediction(U, D, DIMS).upper_mean.equal(torch.full((U,), 0.5))


def test_halves_are_those_of_the_image():
    images = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    upper, lower = halves(images.flatten(1), (5, 3))
    assert upper.equal(images[:, :2].flatten(1)) and lower.equal(images[:, 2:].flatten(1))
    for bad, shape in ((images, (5, 3)), (images.flatten(1), (4, 3)), (torch.ones(2, 3), (1, 3))):
        with pytest.raises(ValueError, match=r"images must have shape .* two lines, found"):
            halves(bad, shape)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["model", "guide"])
def test_errors_of_the_upper_half(side):
    net, (upper, lower) = make(), data()
    call = getattr(net, side)
    with pytest.raises(ValueError, match=r'argument "upper".*\(B, 4\), found \(5, 3\)'):
        call(lower, lower)
    with pytest.raises(ValueError, match=r'argument "upper".*found 0.5 in row 0.*binarize'):
        call(0.5 + 0.0 * upper, lower)
    with pytest.raises(ValueError, match=r'argument "upper".*nan in row 1, column 2.*drop'):
        call(upper.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), lower)
    with pytest.raises(ValueError, match=r'plate "data".*5 rows and index shape \(4,\)'):
        call(upper, lower, torch.arange(4))
    with pytest.raises(ValueError, match=r'plate "data": size=3 .*5 rows'):
        call(upper, lower, size=3)


def test_errors_of_the_lower_half():
    net, (upper, lower) = make(), data()
    with pytest.raises(ValueError, match=r'site "lower".*\(B, 3\), found \(5, 4\)'):
        net.model(upper, upper)
    with pytest.raises(ValueError, match=r'site "lower".*found 2 in row 0'):
        net.model(upper, lower + 2.0)
    with pytest.raises(ValueError, match=r'site "lower": found 4 rows, and 5 rows of upper'):
        net.model(upper, lower[:4])


def test_two_models_of_one_name_do_not_train_each_other():
    (upper, lower), first, second = data(), make(), make()
    first.model(upper, lower), first.guide(upper, lower)
    for call in (second.model, second.guide):
        with pytest.raises(ValueError, match=r"'structured_prediction\$\$\$.*clear_param_store"):
            call(upper, lower)
    make(name="third").model(upper, lower)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dims": 3}, "latent_dims=3"),
        ({"latent_dims": ()}, r"latent_dims=\(\)"),
        ({"upper_dim": 0}, "found 0, latent_dims"),
        ({"lower_dim": 1.5}, "found 1.5, latent_dims"),
        ({"upper_mean": torch.zeros(5)}, r"upper_mean must be 4 .*\(5,\)"),
        ({"lower_mean": torch.full((D,), 2.0)}, r"lower_mean must be 3 .*\[0, 1\].*2 to 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StructuredPrediction(**{"upper_dim": U, "lower_dim": D, **arguments})

"""The learned prior over codes: its probability, its order, and the bound of the whole model."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vi_ext import VQELBO, elbo_terms, fit, log_evidence
from pyro_vi_ext.code_sites import CodePrior, Quantizer, VectorQuantized, codes_of
from pyro_vi_ext.guides import VectorQuantizer
from pyro_vi_ext.models.autoregressive import Autoregressive
from pyro_vi_ext.models.code_prior import AutoregressiveCodePrior

from .resuming import check_resumed

pytestmark = pytest.mark.usefixtures("float64")

K, D, GRID = 3, 2, (2, 2)


class Pairs(Quantizer):
    """Two indices for each latent: one for each of its two coordinates, rounded."""

    num_codes, code_dim, code_shape = 2, 2, (2,)

    def encode(self, z_e):
        return (z_e.detach() > 0.5).long()

    def decode(self, indices):
        return indices.to(torch.get_default_dtype())

    def quantize(self, z_e):
        indices = self.encode(z_e)
        return self.decode(indices) + z_e - z_e.detach(), indices


def make(quantizer=None, grid=GRID, **options):
    quantizer = quantizer or VectorQuantizer(K, D)
    prior = AutoregressiveCodePrior(quantizer, grid, width=8, num_layers=1, **options)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
        if isinstance(quantizer, VectorQuantizer):
            quantizer.codebook.copy_(torch.randn(K, D))
    return prior


def all_indices(prior):
    length = math.prod(prior.indices_shape)
    rows = itertools.product(range(prior.quantizer.num_codes), repeat=length)
    return torch.tensor(list(rows)).reshape(-1, *prior.indices_shape)


# --- the prior of z ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "grid"),
    [(None, (2, 2)), (None, (4,)), (None, ()), (Pairs, (2,)), (Pairs, ())],
)
def test_codes_have_total_probability_one_and_raster_order(quantizer, grid):
    prior = make(quantizer and quantizer(), grid)
    indices = all_indices(prior)
    z = prior.quantizer.decode(indices)
    site = prior.site()
    log_p = site.log_prob(z)
    assert site.event_shape == (*grid, prior.quantizer.code_dim) and site.batch_shape == ()
    assert log_p.exp().sum().item() == pytest.approx(1.0, rel=1e-12)
    by_hand = Autoregressive(prior.network).log_prob(indices.reshape(len(indices), -1))
    assert torch.allclose(log_p, by_hand, rtol=1e-12) and log_p.std() > 0.1
    draws = prior.sample(7)
    assert draws.shape == (7, *prior.indices_shape) and draws.dtype == torch.long
    assert site.expand([5]).sample((7,)).shape == (7, 5, *site.event_shape)


def test_stands_where_the_uniform_prior_stood():
    prior = make()
    uniform = CodePrior(prior.quantizer).expand(GRID).to_event(len(GRID))
    site = prior.site()
    assert site.event_shape == uniform.event_shape and site.event_dim == uniform.event_dim
    assert site.support.event_dim == uniform.support.event_dim and site.support.is_discrete
    assert site.quantizer is prior.quantizer
    z = uniform.expand([3]).sample()
    assert site.expand([3]).log_prob(z).shape == (3,) and site.support.check(z).all()
    masked = site.expand([3]).mask(torch.tensor([True, False, True])).log_prob(z)
    assert masked[1] == 0 and masked[0] == site.log_prob(z)[0]


def test_draws_are_codes_with_their_indices_and_their_probabilities():
    prior = make(grid=(2,))
    site = prior.site().expand([4])
    z = site.sample((5_000,))
    indices = codes_of(z, prior.quantizer)
    assert codes_of(z, prior.quantizer) is codes_of(z, prior.quantizer) and not z.requires_grad
    assert indices.shape == (5_000, 4, 2)
    assert torch.equal(prior.quantizer.decode(indices), z)
    assert torch.equal(prior.quantizer.encode(z), indices)
    states = all_indices(prior)
    p = prior.site().log_prob(prior.quantizer.decode(states)).exp().detach()
    for draws in (indices.flatten(0, 1), prior.sample(20_000)):
        counts = (draws[:, None] == states).all(-1).sum(0)
        z_scores = (counts / 20_000 - p) / (p * (1 - p) / 20_000).sqrt()
        assert z_scores.abs().max() < 4
        rotated = (counts / 20_000 - p.roll(1)) / (p.roll(1) * (1 - p.roll(1)) / 20_000).sqrt()
        assert rotated.abs().max() > 4


def test_gradient_reaches_the_transformer_only():
    prior = make()
    z_e = torch.randn(3, *GRID, D, requires_grad=True)
    z = VectorQuantized(z_e, prior.quantizer).to_event(2).rsample()
    nearest = z.detach().clone().requires_grad_()  # without the indices it was drawn with
    for value in (z, nearest):
        log_p = prior.site().log_prob(value)
        leaves = [z_e, nearest, prior.quantizer.codebook, prior.network.start]
        gradients = torch.autograd.grad(log_p.sum(), leaves, allow_unused=True)
        assert gradients[:3] == (None, None, None) and gradients[3].abs().sum() > 0
    assert torch.equal(prior.site().log_prob(z), prior.site().log_prob(nearest))


def test_particles_of_a_quantised_guide_run_once():
    prior, rows = make(), []
    prior.network.head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[0]))
    q = VectorQuantized(torch.randn(3, *GRID, D), prior.quantizer).to_event(2)
    log_p = prior.site().expand([50, 3]).log_prob(q.expand([50, 3]).rsample())
    assert log_p.shape == (50, 3) and rows == [3]
    assert torch.equal(log_p[7], prior.site().log_prob(q.rsample()))


# --- the bound of the whole model ----------------------------------------------------------------


def whole(prior, x, noise=0.8):
    """x is 3-dimensional; the decoder and the encoder are fixed linear maps."""
    down, up = torch.randn(4 * D, 3), torch.randn(3, 4 * D)
    quantizer = prior.quantizer

    def likelihood(z):
        return dist.Normal(z.flatten(-3) @ down, noise).to_event(1)

    def posterior(x):
        return VectorQuantized((x @ up).unflatten(-1, (*GRID, D)), quantizer).to_event(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.site())
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return model, guide, likelihood, posterior


def test_the_bound_counts_the_learned_prior_and_stays_below_the_exact_evidence():
    prior, x = make(), torch.randn(6, 3)
    model, guide, likelihood, posterior = whole(prior, x)
    z = posterior(x).rsample()
    indices = prior.quantizer.encode(z)
    with torch.no_grad():
        kl = -Autoregressive(prior.network).log_prob(indices.flatten(1))
        reconstruction = likelihood(z).log_prob(x)
        states = prior.quantizer.decode(all_indices(prior))
        joint = prior.site().log_prob(states)[:, None] + likelihood(states[:, None]).log_prob(x)
        evidence = joint.logsumexp(0)
    elbo = reconstruction - kl
    assert (elbo < evidence).all() and (kl - 4 * math.log(K)).abs().min() > 1e-3

    terms = elbo_terms(model, guide, x, num_particles=20, chunk_size=8)
    assert terms.kl["z"].value == pytest.approx(float(kl.sum()), rel=1e-12)
    assert terms.reconstruction["x"].value == pytest.approx(float(reconstruction.sum()), rel=1e-12)
    assert terms.elbo.value == pytest.approx(float(elbo.sum()), rel=1e-12)
    assert terms.elbo.value < float(evidence.sum())
    for options in ({"vectorize_particles": False}, {}):
        parts = VQELBO(num_particles=2, **options).parts(model, guide, x)
        assert float(parts.kl) == pytest.approx(float(kl.sum()), rel=1e-12)
        assert float(parts.negative_elbo) == pytest.approx(-float(elbo.sum()), rel=1e-12)
    # The guide has all its mass on one code: no number of particles finds the others.
    with pytest.warns(UserWarning, match="all its mass at site 'z' on one code"):
        estimate = log_evidence(model, guide, x, num_particles=20)
    assert torch.allclose(estimate.log_evidence, elbo, rtol=1e-10)


def test_a_prior_fitted_to_the_codes_raises_the_bound_by_what_its_loss_falls():
    prior, x = make(), torch.randn(40, 3)
    model, guide, _, posterior = whole(prior, x)
    indices = prior.quantizer.encode(posterior(x).rsample())
    codebook = prior.quantizer.codebook.clone()
    before = elbo_terms(model, guide, x, num_particles=2)
    svi = SVI(prior.model, prior.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = fit(svi, indices, num_steps=60, progress=False).losses
    loss = svi.evaluate_loss(indices)
    after = elbo_terms(model, guide, x, num_particles=2)
    assert losses[0].item() == pytest.approx(before.kl["z"].value, rel=1e-12)
    assert loss == pytest.approx(after.kl["z"].value, rel=1e-12)
    assert after.elbo.value > before.elbo.value + 10
    assert after.reconstruction["x"].value == before.reconstruction["x"].value
    assert after.kl["z"].value < 40 * 4 * math.log(K)  # the KL to a uniform prior
    assert torch.equal(prior.quantizer.codebook, codebook)
    assert prior.quantizer.codebook.grad is None


def test_a_guide_of_other_codes_is_refused():
    prior, other = make(), make()
    model, _, _, _ = whole(prior, None)
    _, guide, _, _ = whole(other, None)
    with pytest.raises(ValueError, match="Site 'z' .* AutoregressiveCodes"):
        elbo_terms(model, guide, torch.randn(2, 3), num_particles=2)


def test_a_model_that_registers_the_prior_trains_it_with_its_codes():
    prior, x = make(), torch.randn(6, 3)
    model, guide, _, _ = whole(prior, x)

    def registered(x):
        pyro.module(prior.name, prior)
        model(x)

    before = {name: p.clone() for name, p in prior.named_parameters()}
    codebook = prior.quantizer.codebook.clone()
    SVI(registered, guide, pyro.optim.Adam({"lr": 0.01}), VQELBO()).step(x)
    assert not torch.equal(prior.network.start, before["network.start"])
    assert not torch.equal(prior.quantizer.codebook, codebook)


# --- maximum likelihood --------------------------------------------------------------------------


def test_the_model_is_the_likelihood_of_indices():
    prior = make()
    indices = all_indices(prior)[:5]
    log_p = prior.site().log_prob(prior.quantizer.decode(indices))
    trace = poutine.trace(prior.model).get_trace(indices)
    trace.compute_log_prob()
    assert torch.allclose(trace.nodes["codes"]["log_prob"], log_p, rtol=1e-12)
    guide = poutine.trace(prior.guide).get_trace(indices)
    assert not [n for n, site in guide.nodes.items() if site["type"] in ("sample", "param")]
    names = {n for n, site in trace.nodes.items() if site["type"] == "param"}
    assert names == {f"code_prior$$${n}" for n, _ in prior.named_parameters()}
    total = -float(log_p.sum().detach())
    for loss in (Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        assert loss.loss(prior.model, prior.guide, indices) == pytest.approx(total, rel=1e-12)
    scaled = Trace_ELBO().loss(prior.model, prior.guide, indices, size=50)
    assert scaled == pytest.approx(10 * total, rel=1e-12)
    bits = elbo_terms(prior.model, prior.guide, indices, num_particles=2).bits_per_dim
    assert bits == pytest.approx(total / (5 * 4 * math.log(2)), rel=1e-12)


def test_the_quantizer_is_a_reference_only():
    prior = make()
    assert not any(isinstance(module, Quantizer) for module in prior.modules())
    keys = {*prior.state_dict(), *dict(prior.named_parameters())}
    assert all(key.startswith("network.") for key in keys)


def test_a_resumed_fit_repeats_the_uninterrupted_one(tmp_path):
    def scenario():
        prior = AutoregressiveCodePrior(Pairs(), (2,), width=8, num_layers=1)
        svi = SVI(prior.model, prior.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        return svi, (all_indices(prior)[:6],), {}

    check_resumed(scenario, 4, tmp_path)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (torch.zeros(5, 2, 2), r'site "codes".* int64, shape \(B, 2, 2\), found torch.float32'),
        (torch.zeros(5, 4, dtype=torch.long), r"found torch.int64 of shape \(5, 4\)"),
        (torch.full((5, 2, 2), 3), "from 0 to 2, found from 3 to 3"),
        (torch.full((5, 2, 2), -1), "found from -1 to -1"),
    ],
)
def test_indices_that_are_no_codes(indices, match):
    with pytest.raises(ValueError, match=match):
        make().model(indices)


def test_values_and_arguments_out_of_place():
    prior = make()
    for value, match in [
        (torch.zeros(5, 4, D), r"codes on a grid, shape \(..., 2, 2, 2\), found \(5, 4, 2\)"),
        (torch.zeros(5, 2, 2, D + 1), "code_dim"),
        (torch.zeros(D), "codes on a grid"),
    ]:
        with pytest.raises(ValueError, match=match):
            prior.site().log_prob(value)
    quantizer = prior.quantizer
    with pytest.raises(ValueError, match="grid must be a tuple .* got 4"):
        AutoregressiveCodePrior(quantizer, 4)
    with pytest.raises(ValueError, match="each entry of grid must be an integer >= 1, got 0"):
        AutoregressiveCodePrior(quantizer, (2, 0))
    with pytest.raises(ValueError, match="quantizer must be a Quantizer, .* got Linear"):
        AutoregressiveCodePrior(torch.nn.Linear(2, 2), (2,))


def test_two_priors_of_one_name():
    first, second = make(), make()
    indices = all_indices(first)
    first.model(indices)
    with pytest.raises(ValueError, match="parameter store holds another tensor under 'code_prior"):
        second.model(indices)

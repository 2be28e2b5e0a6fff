"""The VQ-VAE and its Gaussian twin: densities by hand, shapes, priors, errors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import VQELBO, TraceSTL_ELBO, elbo_terms
from pyro_vi_ext.guides import FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer
from pyro_vi_ext.models.code_prior import AutoregressiveCodePrior
from pyro_vi_ext.models.vq_vae import (
    VQVAE,
    AutoregressiveDecoder,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    GaussianGridVAE,
    MLPDecoder,
    MLPEncoder,
)

pytestmark = pytest.mark.usefixtures("float64")

SHAPE, D, N, K = (8, 12), 3, 5, 7
PIXELS, GRID = 96, (2, 3)
QUANTIZERS = {
    "vector": lambda: VectorQuantizer(K, D),
    "moving averages": lambda: VectorQuantizer(K, D, 0.9, kmeans_init=True),
    "residual": lambda: ResidualQuantizer(2, K, D, 0.9),
    "finite scalar": lambda: FiniteScalarQuantizer([4, 3, 5]),
}
NETWORKS = {
    "mlp": lambda: (MLPEncoder(PIXELS, GRID, D, 8), MLPDecoder(GRID, D, PIXELS, 8)),
    "convolutional": lambda: (ConvolutionalEncoder(SHAPE, D, 4), ConvolutionalDecoder(SHAPE, D, 4)),
    "strong": lambda: (
        MLPEncoder(PIXELS, GRID, D, 8),
        AutoregressiveDecoder(GRID, D, PIXELS, width=8, num_layers=1, num_heads=2),
    ),
}


def data(rows=N):
    return torch.bernoulli(torch.full((rows, PIXELS), 0.4))


def make(networks="mlp", quantizer="vector"):
    return VQVAE(*NETWORKS[networks](), QUANTIZERS[quantizer](), GRID)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("networks", NETWORKS)
def test_the_bound_is_reconstruction_less_log_num_codes_per_position(networks, quantizer):
    vae, x = make(networks, quantizer), data()
    objective = VQELBO()
    objective.loss_and_grads(vae.model, vae.guide, x)  # k-means, moving averages
    parts = objective.parts(vae.model, vae.guide, x)
    q = vae.quantizer
    indices = vae.codes(x)
    assert indices.shape == (N, *GRID, *q.code_shape) and indices.dtype == torch.long
    with torch.no_grad():
        p = vae.decoder(q.decode(indices))
        assert p.batch_shape == (N,) and p.event_shape == (PIXELS,)
        assert -float(parts.reconstruction) == pytest.approx(float(p.log_prob(x).sum()))
    num_codes = q.num_codes ** max(1, math.prod(q.code_shape))
    assert float(parts.kl) == pytest.approx(N * 6 * math.log(num_codes))
    grads = [parameter.grad for parameter in vae.parameters()]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in grads)


@pytest.mark.parametrize("networks", NETWORKS)
def test_particles_are_those_of_a_loop(networks):
    """Decoders broadcast over any number of dimensions on the left."""
    vae = make(networks)
    z, x = torch.randn(2, 4, *GRID, D), data(4)
    with torch.no_grad():
        log_p = vae.decoder(z).log_prob(x)
        for i in range(2):
            for j in range(4):
                one = vae.decoder(z[i, j]).log_prob(x[j])
                assert float(log_p[i, j]) == pytest.approx(float(one))


def test_size_scales_the_loss_of_a_minibatch():
    vae, x = make(), data()
    whole = VQELBO().parts(vae.model, vae.guide, x)
    scaled = VQELBO().parts(vae.model, vae.guide, x, size=50)
    for name in vars(whole):
        assert float(getattr(scaled, name)) == pytest.approx(10 * float(getattr(whole, name)))


@pytest.mark.parametrize("quantizer", ["vector", "residual"])
def test_a_learned_prior_takes_the_place_of_the_uniform_one(quantizer):
    """Its KL is minus its log-probability of the codes; bits per dimension follow."""
    vae, x = make("mlp", quantizer), data()
    prior = AutoregressiveCodePrior(vae.quantizer, GRID, width=8)
    terms = elbo_terms(vae.model, vae.guide, x, num_particles=2, prior=prior.site())
    uniform = elbo_terms(vae.model, vae.guide, x, num_particles=2)
    indices = vae.codes(x)
    with torch.no_grad():
        log_p = float(pyro.poutine.trace(prior.model).get_trace(indices).log_prob_sum())
    assert terms.kl["z"].value == pytest.approx(-log_p)
    assert terms.reconstruction["x"].value == pytest.approx(uniform.reconstruction["x"].value)
    bits = (uniform.kl["z"].value + log_p) / (N * PIXELS * math.log(2))
    assert uniform.bits_per_dim - terms.bits_per_dim == pytest.approx(bits)


@pytest.mark.parametrize("networks", NETWORKS)
def test_samples_are_images(networks):
    vae = make(networks)
    prior = AutoregressiveCodePrior(vae.quantizer, GRID, width=8)
    for site in (None, prior.site()):
        x = vae.sample(2, prior=site)
        assert x.shape == (2, PIXELS) and bool(((x == 0) | (x == 1)).all())
    mean = vae.decode(vae.quantizer.decode(vae.codes(data(2))))
    assert mean.shape == (2, PIXELS) and bool(((mean >= 0) & (mean <= 1)).all())


def test_the_gaussian_twin_by_hand():
    """With the reconstruction at its own draw and the KL in closed form."""
    encoder = MLPEncoder(PIXELS, GRID, 2 * D, 8)
    vae = GaussianGridVAE(encoder, MLPDecoder(GRID, D, PIXELS, 8), GRID, D)
    x, num = data(), 4000
    terms = elbo_terms(vae.model, vae.guide, x, num_particles=num)
    loc, log_scale = encoder(x).detach().chunk(2, -1)
    kl = 0.5 * ((2 * log_scale).exp() + loc**2 - 1 - 2 * log_scale).sum()
    error = terms.kl["z"].standard_error
    assert abs(terms.kl["z"].value - float(kl)) < 4 * error
    assert vae.sample(2).shape == (2, PIXELS)
    loss = TraceSTL_ELBO().differentiable_loss(vae.model, vae.guide, x)
    torch.manual_seed(3)
    loss = TraceSTL_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(3)
    q = vae.posterior(x)
    z = q.rsample()
    p = dist.Normal(0.0, 1.0).log_prob(z).sum() + vae.decoder(z).log_prob(x).sum()
    assert loss == pytest.approx((q.log_prob(z).sum() - p).item())


def test_an_encoder_that_does_not_fit_is_named():
    vae = VQVAE(
        MLPEncoder(PIXELS, (3,), D), MLPDecoder(GRID, D, PIXELS), VectorQuantizer(K, D), GRID
    )
    with pytest.raises(ValueError, match='site "z": the encoder gave shape'):
        VQELBO().loss(vae.model, vae.guide, data())


@pytest.mark.parametrize("x", [torch.full((N, PIXELS), 0.5), torch.zeros(N, 4)])
def test_data_that_are_not_binary_images_are_refused(x):
    vae = make()
    with pytest.raises(ValueError, match='site "x"'):
        VQELBO().loss(vae.model, vae.guide, x)


@pytest.mark.parametrize("shape", [(7, 8), (8,)])
def test_convolutions_need_sides_divisible_by_four(shape):
    with pytest.raises(ValueError, match="image_shape must be"):
        ConvolutionalEncoder(shape, D)


def test_two_of_one_name_are_an_error():
    x = data()
    vae, other = make(), make()
    VQELBO().loss_and_grads(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match="vq_vae"):
        VQELBO().loss_and_grads(other.model, other.guide, x)

"""The guide that is not amortised: the amortised one's bound, its own parameters, its optimum."""

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import MultivariateNormal

from pyro_vi_ext import ImportanceWeightedELBO
from pyro_vi_ext.models.deep_vae import DeepVAE, FreeFormGuide

pytestmark = pytest.mark.usefixtures("float64")

D, N = 6, 7
ELBO = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)


def make(layers=1, **options):
    sizes = {1: ((3,), ((5, 4),)), 2: ((4, 3), ((5, 4), (6,)))}[layers]
    return DeepVAE(D, *sizes, **options), torch.bernoulli(torch.full((N, D), 0.4))


def seeded(guide, vae, x, *args, loss=ELBO, **kwargs):
    pyro.set_rng_seed(5)
    return loss.loss(vae.model, guide, x, *args, **kwargs)


def test_from_the_encoder_it_has_the_elbo_of_the_amortised_guide():
    vae, x = make()
    free = FreeFormGuide.from_amortised(vae, x)
    for loss in (ELBO, Trace_ELBO(), ImportanceWeightedELBO(num_particles=4)):
        expected = seeded(vae.guide, vae, x, loss=loss)
        assert seeded(free, vae, x, loss=loss) == pytest.approx(expected, rel=1e-12)
    rows = torch.tensor([4, 0, 4])
    expected = seeded(vae.guide, vae, x[rows], rows, size=N)
    assert seeded(free, vae, x[rows], rows, size=N) == pytest.approx(expected, rel=1e-12)


def test_two_layers_start_at_the_means_and_are_independent():
    vae, x = make(2)
    free = FreeFormGuide.from_amortised(vae, x)
    loc, log_scale = vae.encoder[1](vae.encode(x)[0]).chunk(2, -1)
    for shift in (0.0, 9.0):
        conditioned = poutine.condition(free, {"z1": torch.full((N, 4), shift)})
        fn = poutine.trace(conditioned).get_trace(x).nodes["z2"]["fn"]
        assert fn.mean.allclose(loc) and fn.stddev.allclose(log_scale.exp())


def test_each_row_has_the_parameters_of_its_index_and_trains_only_them():
    vae, x = make(2)
    free = FreeFormGuide.from_amortised(vae, x)
    rows = torch.tensor([5, 2])
    trace = poutine.trace(free).get_trace(x[rows], rows)
    assert trace.nodes["z2"]["fn"].mean.equal(free.locs[1][rows])
    ELBO(vae.model, free)(x[rows], rows, size=N).backward()
    for parameter in free.parameters():
        assert parameter.shape[0] == N
        assert parameter.grad.any(1).nonzero().flatten().tolist() == [2, 5]


def test_the_same_minibatch_for_model_and_guide_in_our_objectives():
    vae, x = make(2)
    free = FreeFormGuide(N, vae.latent_dims)
    objective = ImportanceWeightedELBO(num_particles=3, gradient="dreg")
    loss = objective(vae.model, free)
    rows = torch.tensor([5, 2, 3])
    for index in (rows, rows.clone()):
        assert torch.isfinite(loss(x[rows], index, size=N))
    names = {id(p) for p in loss.parameters()}
    assert names == {id(p) for p in [*vae.decoder.parameters(), *free.parameters()]}


def test_it_reaches_the_exact_posterior_of_a_linear_model():
    # Orthogonal columns and one noise scale: the exact posterior is diagonal, so the gap closes.
    vae = DeepVAE(D, (2,), ((),), likelihood="gaussian").requires_grad_(False).eval()
    w = 2.0 * torch.linalg.qr(torch.randn(D, 2))[0]
    vae.decoder[0][0].weight.copy_(w)
    vae.decoder.x_log_scale.fill_(-0.4)
    x = torch.randn(N, D)
    truth = MultivariateNormal(torch.zeros(D), w @ w.T + torch.eye(D) * torch.tensor(-0.8).exp())
    free = FreeFormGuide(N, (2,))
    assert not any(parameter.any() for parameter in free.parameters())  # N(0, 1)
    svi = SVI(vae.model, free, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), ELBO)
    for _ in range(300):
        svi.step(x)
    assert set(pyro.get_param_store()) == {f"free_form$$${name}" for name in free.state_dict()}
    elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    gap = truth.log_prob(x).sum().item() + elbo.loss(vae.model, free, x)
    amortised = truth.log_prob(x).sum().item() + elbo.loss(vae.model, vae.guide, x)
    assert 0 < gap < 1e-3 * amortised  # the gap of the untrained encoder


def test_dtype_of_the_model():
    vae, x = make(2)
    free = FreeFormGuide.from_amortised(vae.float(), x.float())
    assert all(parameter.dtype == torch.float32 for parameter in free.parameters())
    assert poutine.trace(free).get_trace(x).nodes["z2"]["value"].dtype == torch.float32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu():
    vae, x = make(2)
    vae, x = vae.cuda(), x.cuda()
    free = FreeFormGuide.from_amortised(vae, x)
    rows = torch.tensor([5, 2], device="cuda")
    ELBO(vae.model, free)(x[rows], rows, size=N).backward()
    assert all(parameter.grad.is_cuda for parameter in free.parameters())


def test_errors_name_the_sites():
    vae, x = make(2)
    free = FreeFormGuide(N, vae.latent_dims)
    with pytest.raises(ValueError, match="sites 'z1', 'z2'.*for 7 data, found 3 rows.*pass index"):
        free(x[:3])
    for index in ([0, 7], [-1, 2]):
        with pytest.raises(ValueError, match=rf"found index from {index[0]} to {index[1]}; count"):
            free(x[:2], torch.tensor(index))
    with pytest.raises(ValueError, match="for 7 data, found size=70; make .* num_data"):
        free(x, size=70)
    with pytest.raises(ValueError, match=r"plate \"data\".*2 rows and index shape \(3,\)"):
        free(x[:2], torch.arange(3))
    with pytest.raises(ValueError, match=r"latent_dims=2"):
        FreeFormGuide(N, 2)
    with pytest.raises(ValueError, match=r"found 0, latent_dims=\(2,\)"):
        FreeFormGuide(0, (2,))
    free(x)
    with pytest.raises(ValueError, match=r"'free_form\$\$\$locs.0'"):
        FreeFormGuide(N, vae.latent_dims)(x)
    with pytest.raises(ValueError, match=r'site "x".*zeros and ones'):
        FreeFormGuide.from_amortised(vae, 0.5 * x)

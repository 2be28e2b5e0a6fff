"""Every structural mistake in a pair is an error that names the site."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import ImportanceWeightedELBO, SemiImplicitELBO, TraceSTL_ELBO

AUXILIARY = {"is_auxiliary": True}
X = torch.arange(8.0, dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("float64")


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def raises(match, model, guide, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        SemiImplicitELBO(**kwargs).loss(model, guide, *args)


def test_extra_guide_site_that_is_not_auxiliary():
    def guide():
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(noise, 1.0))

    raises("'noise' is not in the model.*is_auxiliary", model, guide)


def test_latent_missing_from_the_guide():
    raises("Latent site 'z' of the model is not in the guide", model, lambda: None)


def test_auxiliary_site_that_is_a_latent():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0), infer=AUXILIARY)

    raises("'z' is marked auxiliary but is a latent", model, guide)


def test_observed_site_in_the_guide():
    def guide():
        model()
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    raises("'y' is observed: a guide", model, guide)


def test_guide_site_that_the_model_observes():
    def observing():
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    raises("'z' is observed in the model", observing, model)


def test_plate_of_another_dim_or_size():
    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def plated(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        raises("'z' plate 'data' has dim -2 .* elsewhere dim -1", plated, guide, X)


def test_plate_subsampled_in_the_guide_only():
    def guide(x):
        with pyro.plate("other", len(x), subsample_size=3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def plated(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    raises("Plate 'other' is subsampled .3 of 8. in the guide but", plated, guide, X)


def test_unplated_batch_is_refused():
    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    def batched():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    raises('"z", invalid log_prob shape', batched, guide)


def test_shape_that_does_not_match_the_plate():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    raises("plate.'data'. at site z", guide, guide, X)


@pytest.mark.parametrize("objective", [ImportanceWeightedELBO, TraceSTL_ELBO])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_mixing_variable_under_an_objective_that_needs_a_density(objective, num_particles):
    def semi_implicit():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        pyro.sample("z", dist.Normal(psi, 1.0))

    with pytest.raises(NotImplementedError, match="'psi' is a mixing variable.*SemiImplicitELBO"):
        objective(num_particles).loss(model, semi_implicit)


def test_code_that_mixes_particles():
    def summing(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    raises(
        "'x' of the model has log-prob.*mixes particles",
        summing,
        lambda x: model(),
        X[0],
        num_particles=3,
    )

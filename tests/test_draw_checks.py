"""Models and guides whose draws cannot be exported are refused, and the site is named."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from .exporting import (
    N,
    X,
    export,
    hierarchy,
    plain,
    plain_guide,
    tensor,
)

pytestmark = pytest.mark.usefixtures("float64")


def summed_over_the_minibatch(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])
    pyro.factor("penalty", x[index].sum() * torch.ones(()))


def deterministic_of_the_minibatch(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])
    pyro.deterministic("mean", x[index].mean())


def mixed_draws(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(mu.sum(), 1.0), obs=x)


def mixed_deterministic(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("total", mu.sum())


MODELS = [
    (summed_over_the_minibatch, ValueError, "'penalty'.*'data'.*changes with the minibatch"),
    (deterministic_of_the_minibatch, ValueError, "'mean'.*'data'.*changes with the minibatch"),
    (
        mixed_draws,
        ValueError,
        "'x' of the model has log-prob.*mixes particles.*vectorize_particles=False",
    ),
    (mixed_deterministic, ValueError, "'total' of the model mixes draws"),
]


@pytest.mark.parametrize(
    "model, error, message", MODELS, ids=lambda v: getattr(v, "__name__", None)
)
def test_models_that_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        export(model, plain_guide, X)


def test_one_by_one_takes_models_that_mix_draws():
    data = export(mixed_deterministic, plain_guide, X, vectorize_particles=False)
    assert (data["posterior"]["total"] == data["posterior"]["mu"]).all()


def test_model_that_cannot_be_vectorised_at_all():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(torch.ones(2, 3) @ w, 1.0).to_event(1), obs=x[:2])

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    with pytest.raises(ValueError, match="vectorize_particles=False"):
        export(model, guide, X)
    data = export(model, guide, X, vectorize_particles=False, num_draws=5)
    w = tensor(data, "posterior", "w")
    expected = dist.Normal(w.sum(-1, keepdim=True), 1.0).log_prob(X[:2]).sum(-1)
    torch.testing.assert_close(tensor(data, "log_likelihood", "x"), expected)


def test_global_guide_that_depends_on_the_minibatch():
    def guide(x, batch):
        with pyro.plate("data", N, subsample_size=batch) as index:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("mu", dist.Normal(x[index].mean(), 1.0))

    with pytest.raises(ValueError, match="'mu' of the guide.*changes with the minibatch"):
        export(hierarchy, guide, X, 3)


def test_global_noise_hidden_in_a_delta():
    """A draw made outside of pyro.sample cannot be repeated in the next minibatch."""

    def guide(x, batch):
        pyro.sample("mu", dist.Delta(torch.randn(())))
        with pyro.plate("data", N, subsample_size=batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'mu'.*changes with the minibatch"):
        export(hierarchy, guide, X, 3, vectorize_particles=False)


def test_local_latent_outside_its_plate_in_the_guide():
    def guide(x, batch):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="'z'.*'data' in the model but not in the guide"):
            export(hierarchy, guide, X, 3, vectorize_particles=False)


@pytest.mark.parametrize("validate", [True, False])
def test_nan_is_named(validate):
    def guide(x):
        pyro.sample("mu", dist.Normal(torch.tensor(math.nan), 1.0))

    x = X.clone()
    x[2] = math.nan
    with pyro.validation_enabled(validate):
        with pytest.raises(ValueError, match="'mu' is NaN"):
            export(plain, guide, X)
        with pytest.raises(ValueError, match="'x'"):
            export(plain, plain_guide, x)

"""A subsampled plate is walked once over, by guides and data that follow its indices."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)

from .exporting import (
    N,
    X,
    assert_constant,
    export,
    hand_computed,
    hierarchy,
    plain_guide,
    stats,
    tensor,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_pyro_subsample_and_switched_off_groups():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=pyro.subsample(x, event_dim=0))

    def guide(x):
        pyro.sample("mu", dist.Normal(X.sum() / (N + 1), (N + 1) ** -0.5))

    cov = torch.eye(N) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(N), cov).log_prob(X)
    data = export(model, guide, X, posterior_predictive=False, log_likelihood=False)
    assert_constant(data, evidence)
    assert set(data.children) == {"posterior", "sample_stats", "observed_data"}


def test_soft_constraints_inside_a_walked_plate():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("soft", dist.Normal(0.0, 1.0), obs=z)
            pyro.sample("soft too", dist.Normal(0.0, 1.0), obs=mu)
            pyro.factor("tilt", -z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    data = export(model, guide, X)
    assert set(data["observed_data"].data_vars) == {"x"}
    z = tensor(data, "posterior", "z")
    normal = dist.Normal(0.0, 1.0)
    log_p = (2 * normal.log_prob(z) - z + normal.log_prob(X - z)).sum(1)
    log_p = log_p + (N + 1) * normal.log_prob(tensor(data, "posterior", "mu"))
    torch.testing.assert_close(stats(data, "log_p"), log_p)


@pytest.mark.parametrize("batch", [3, 4])
def test_auto_normal_with_subsampled_latents(batch):
    """AutoNormal makes its plates by itself; each of its N locations meets its own datum."""
    guide = AutoNormal(hierarchy, init_scale=0.3)
    guide(X, batch)
    with torch.no_grad():
        guide.locs.z_unconstrained.copy_(0.8 * X)
    data = export(hierarchy, guide, X, batch)
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    assert set(data["posterior"].data_vars) == {"mu", "z", "twice", "shifted"}
    log_q = dist.Normal(guide.locs.mu, 0.3).log_prob(mu)
    log_q = log_q + dist.Normal(0.8 * X, 0.3).log_prob(z).sum(1)
    torch.testing.assert_close(stats(data, "log_q"), log_q.detach())
    torch.testing.assert_close(stats(data, "log_p"), hand_computed(data, X)[1])


@pytest.mark.parametrize("auto", [AutoNormalMessenger, AutoDelta])
def test_other_guides_that_follow_the_indices(auto):
    guide = auto(hierarchy)
    guide(X, 4)
    data = export(hierarchy, guide, X, 4)
    torch.testing.assert_close(stats(data, "log_p"), hand_computed(data, X)[1])
    z = tensor(data, "posterior", "z")
    assert z.shape == (50, N)


@pytest.mark.parametrize("auto", [AutoMultivariateNormal, AutoLaplaceApproximation])
def test_joint_latents_of_one_minibatch_are_refused(auto):
    """These guides give every minibatch the coordinates of the first."""
    guide = auto(hierarchy)
    guide(X, 3)
    with pytest.raises(NotImplementedError, match="'z' is a Delta in the subsampled plate 'data'"):
        export(hierarchy, guide, X, 3)


def test_point_masses_that_follow_the_indices():
    """A Delta may depend on global draws and on the index, or on neither."""

    def guide(x, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=batch) as index:
            pyro.sample("z", dist.Delta(mu * torch.arange(N)[index]))

    data = export(hierarchy, guide, X, 3)
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    torch.testing.assert_close(z, mu[:, None] * torch.arange(N))

    def constant(x, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=batch):
            pyro.sample("z", dist.Delta(mu.expand(mu.shape[:-1] + (batch,))))

    data = export(hierarchy, constant, X, 3)
    z = tensor(data, "posterior", "z")
    torch.testing.assert_close(z, tensor(data, "posterior", "mu")[:, None].expand(50, N))


def minibatch_argument(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def explicit_subsample(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample=torch.tensor([3, 1, 2])) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def two_plates(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])
    with pyro.plate("more", N, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=x[index])


def sequential_plate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", N, subsample_size=3):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


MODELS = [
    (minibatch_argument, ValueError, r"'x'.*'data' \(10 of 100\).*obs=data\[ind\]"),
    (explicit_subsample, ValueError, r"'data' fixes its subsample \(3 of 10.*subsample_size"),
    (two_plates, NotImplementedError, "'data', 'more'"),
    (sequential_plate, NotImplementedError, "'x_.' is in the sequential plate 'data'"),
]


@pytest.mark.parametrize(
    "model, error, message", MODELS, ids=lambda v: getattr(v, "__name__", None)
)
def test_models_that_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        export(model, plain_guide, X)

"""The density in unconstrained coordinates: normalised, per unit, refused where there is none."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import constraints

from pyro_vi_ext.unconstrained import UnconstrainedModel

pytestmark = pytest.mark.usefixtures("float64")

DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def prepare(model, *args, vectorized=True):
    return UnconstrainedModel(model, args, {}, float("inf"), vectorized)


def integral(model, *grids):
    """Trapezoids over each coordinate of exp(log prior)."""
    mesh = torch.stack(torch.meshgrid(*grids, indexing="ij"), -1)
    with torch.no_grad():
        log_prior = prepare(model)(mesh.flatten(0, -2)).log_prior.reshape(mesh.shape[:-1])
    total = log_prior.exp()
    for grid in reversed(grids):
        total = torch.trapezoid(total, grid)
    return total.item()


# --- the change of variables -------------------------------------------------------------------


PRIORS = {
    "real": dist.Normal(0.3, 2.0),
    "positive": dist.Gamma(2.0, 3.0),
    "interval": dist.Uniform(-1.0, 3.0),
    "unit interval": dist.Beta(0.7, 2.0),
    "heavy tail": dist.HalfCauchy(2.0),
    "angle": dist.VonMises(0.5, 2.0),
    "masked": dist.Gamma(2.0, 3.0).mask(False),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_the_prior_is_normalised_in_unconstrained_coordinates(prior):
    def model():
        pyro.sample("z", prior)
        pyro.factor("likelihood", torch.tensor(0.0))

    grid = torch.linspace(-50.0, 50.0, 20_001)
    assert integral(model, grid) == pytest.approx(1.0, abs=1e-6)


def test_a_simplex_has_one_coordinate_less():
    def model():
        pyro.sample("z", dist.Dirichlet(torch.tensor([1.5, 2.0, 0.8])))
        pyro.factor("likelihood", torch.tensor(0.0))

    grid = torch.linspace(-25.0, 25.0, 501)
    assert prepare(model).draw(4).u.shape == (4, 2)
    assert integral(model, grid, grid) == pytest.approx(1.0, abs=1e-6)


def test_a_support_may_depend_on_another_latent():
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, a))
        pyro.factor("likelihood", torch.tensor(0.0))

    grid = torch.linspace(-30.0, 30.0, 601)
    assert integral(model, grid, grid) == pytest.approx(1.0, abs=1e-6)


def test_a_cholesky_factor_has_fewer_dimensions_of_its_event():
    def model():
        pyro.sample("z", dist.LKJCholesky(3, 1.5))
        pyro.factor("likelihood", torch.tensor(0.0))

    grid = torch.linspace(-10.0, 10.0, 81)
    assert integral(model, grid, grid, grid) == pytest.approx(1.0, abs=1e-4)


def test_draws_rounded_to_an_end_of_the_support_stay_finite_in_their_dtype():
    """One in seven draws or so is rounded to 0 or to infinity."""

    def model():
        pyro.sample("z", dist.LogNormal(torch.tensor(0.0, dtype=torch.float32), 60.0))
        pyro.factor("likelihood", torch.tensor(0.0))

    with pyro.validation_enabled(False):
        point = prepare(model).draw(2000)
    assert point.u.dtype == torch.float32 and torch.isfinite(point.u).all()
    assert torch.isfinite(point.log_prior).all()
    assert ((point.u.abs() > 87.0).sum() / 2000).item() == pytest.approx(0.13, abs=0.03)


# --- units -------------------------------------------------------------------------------------


def nested(x):  # (2, 3); a unit is an element of "data"
    with pyro.plate("data", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("repeats", 2, dim=-2):
            w = pyro.sample("w", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1), w), obs=x)


@pytest.mark.parametrize("vectorized", [True, False])
def test_densities_per_unit_are_those_of_a_run_by_hand(vectorized):
    x = torch.randn(2, 3)
    target = prepare(nested, x, vectorized=vectorized)
    point = target.draw(5)
    assert list(target.plates) == ["data"] and target.units == (1, 3)
    assert point.u.shape == (5, 1, 3, 4)
    assert point.log_prior.shape == point.log_lik.shape == (5, 1, 3)
    z, log_w = point.u[..., :2], point.u[..., 2:]  # (5, 1, 3, 2) twice
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    prior = prior + (dist.Gamma(2.0, 1.0).log_prob(log_w.exp()) + log_w).sum(-1)
    likelihood = dist.Normal(z.sum(-1, keepdim=True), log_w.exp()).log_prob(x.T).sum(-1)
    torch.testing.assert_close(point.log_prior, prior)
    torch.testing.assert_close(point.log_lik, likelihood)
    _, force = target.pull(point.u, 0.5)
    torch.testing.assert_close(force[..., :2].sum(-1), _force_on_z(z, log_w, x))


def _force_on_z(z, log_w, x):
    residual = (x.T - z.sum(-1, keepdim=True)) / (2 * log_w).exp()
    return -z.sum(-1) + 2 * 0.5 * residual.sum(-1)


def test_packing_is_undone_by_unpacking():
    target = prepare(nested, torch.randn(2, 3))
    u = torch.randn(5, 1, 3, 4)
    values = target._unpack(u)
    assert values[0]["z"].shape == (5, 1, 3, 2) and values[0]["w"].shape == (5, 2, 3)
    assert torch.equal(target._pack(values), u)


def test_masks_hide_data_and_never_a_prior():
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3):
            with poutine.mask(mask=torch.tensor([True, True, False])):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    target = prepare(model, DATA)
    point = target.draw(4)
    z, y = point.u.unbind(-1)
    normal = dist.Normal(0.0, 1.0)
    torch.testing.assert_close(point.log_prior, normal.log_prob(z) + normal.log_prob(y - z))
    torch.testing.assert_close(point.log_lik, 2 * seen * normal.log_prob(DATA - z))


def test_a_delta_is_a_function_of_the_latents():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Delta(z.exp()))
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    point = prepare(model, DATA[0]).draw(4)
    assert point.u.shape == (4, 1)
    torch.testing.assert_close(
        point.log_lik, dist.Normal(point.u[:, 0].exp(), 1.0).log_prob(DATA[0])
    )


def test_one_subsample_for_all_evaluations():
    def model(x):
        with pyro.plate("data", 1000, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.arange(1000.0)
    target = prepare(model, x)
    assert target.scale == pytest.approx(1000 / 3)
    (index,) = target.subsample.indices.values()
    for point in (target.draw(4), target(torch.randn(4, 3, 1))):
        expected = dist.Normal(point.u[..., 0], 1.0).log_prob(x[index])
        torch.testing.assert_close(point.log_lik, expected)


# --- numerical accidents -----------------------------------------------------------------------


def correlated(x):
    rho = pyro.sample("rho", dist.Normal(0.0, 0.2))  # a covariance for |rho| < 1 only
    cov = torch.eye(2) + rho[..., None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), cov), obs=x)


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_matrix_that_cannot_be_factorised_has_no_density(vectorized):
    target = prepare(correlated, DATA[:2], vectorized=vectorized)
    rho = torch.tensor([0.5, 2.0, -0.3, -1.5, 0.1])
    point, force = target.pull(rho.unsqueeze(-1), 1.0)
    good = rho.abs() < 1.0
    assert torch.equal(point.log_lik.isnan(), ~good)
    alone, alone_force = target.pull(rho[good].unsqueeze(-1), 1.0)
    torch.testing.assert_close(point.log_density(1.0)[good], alone.log_density(1.0))
    torch.testing.assert_close(force[good], alone_force)
    assert not force[~good].any()


def test_one_unit_of_many_cannot_be_dropped_for_a_singular_matrix():
    def model(x):
        with pyro.plate("data", 2):
            rho = pyro.sample("rho", dist.Normal(0.0, 0.2))
            cov = torch.eye(2) + rho[..., None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), cov), obs=x)

    target = prepare(model, torch.randn(2, 2))
    with pytest.raises(ValueError, match="multiple of the identity"):
        target(torch.tensor([0.1, 2.0]).reshape(1, 2, 1))


def test_a_force_that_is_not_finite_is_zero_and_stays_with_its_particle():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, z.exp()), obs=x)

    target = prepare(model, DATA[0])
    point, force = target.pull(torch.tensor([[-1e4], [0.5]]), 1.0)
    assert not torch.isfinite(point.log_lik[0]) and force[0] == 0.0
    torch.testing.assert_close(force[1, 0], DATA[0] ** 2 * torch.tensor(-1.0).exp() - 1.5)


def test_parameters_get_no_gradient_and_no_grad_mode_does_not_matter():
    loc = torch.tensor(0.2, requires_grad=True)

    def model(x):
        z = pyro.sample("z", dist.Normal(loc + pyro.param("a", torch.tensor(0.1)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    target = prepare(model, DATA[0])
    with torch.no_grad():
        point, force = target.pull(torch.tensor([[0.0], [1.0]]), 1.0)
    torch.testing.assert_close(force[:, 0], torch.tensor([0.8, -1.2]))
    assert loc.grad is None and pyro.param("a").unconstrained().grad is None
    assert not (point.log_lik.requires_grad or force.requires_grad)


# --- refusals ----------------------------------------------------------------------------------


def observe(z):
    pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[0])


def discrete():
    observe(pyro.sample("z", dist.Poisson(1.0)))


def improper():
    observe(pyro.sample("z", dist.ImproperUniform(constraints.positive, (), ())))


def no_bijection():
    observe(pyro.sample("z", dist.ProjectedNormal(torch.ones(3))).sum(-1))


def no_latent():
    observe(0.0)


def no_data():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def changing():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0.0:
        z = pyro.sample("z2", dist.Normal(z, 1.0))
    observe(z)


def random_density():
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + torch.rand(()))


def mixed_units():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0), obs=DATA)


def mixed_particles():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z - z.mean(0))


def two_scales():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        observe(z)


def subsampled_with_a_global_latent():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, subsample_size=2) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[index])


def needs_single_runs():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    observe(torch.tensor([1.0, 2.0]).dot(z))


@pytest.mark.parametrize(
    "model, error, message",
    [
        (
            discrete,
            NotImplementedError,
            "'z' .Poisson.* discrete.*importance sampling with a guide",
        ),
        (improper, NotImplementedError, "'z' .ImproperUniform.*proper prior"),
        (no_bijection, NotImplementedError, "'z' .ProjectedNormal"),
        (no_latent, ValueError, "no latent site"),
        (no_data, ValueError, "no observed site .*z.*evidence is 1"),
        (random_density, ValueError, "dropout"),
        (mixed_units, ValueError, "another unit .*'data'.*mixes elements"),
        (mixed_particles, ValueError, "particles"),
        (two_scales, ValueError, "one scale per unit.*'z'.*'x'"),
        (subsampled_with_a_global_latent, ValueError, "Annealed.*one scale per unit.*'z'.*'x'"),
        (needs_single_runs, ValueError, "vectorize_particles=False"),
    ],
)
def test_refusals_say_what_was_found_and_what_to_write(model, error, message):
    with pytest.raises(error, match=message):
        prepare(model)


def test_latents_that_come_and_go_are_refused():
    with pytest.raises(NotImplementedError, match="'z2' is not in every run"):
        prepare(changing, vectorized=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_likelihood_that_is_no_number_is_refused(value):
    def model():
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)))
        pyro.factor("energy", torch.tensor(value))

    with pyro.validation_enabled(False):
        target = prepare(model)
        with pytest.raises(ValueError, match="'energy' is NaN or .inf at a draw from the prior"):
            target.draw(3)


def test_the_sequential_path_runs_what_cannot_be_vectorised():
    target = prepare(needs_single_runs, vectorized=False)
    point = target.draw(3)
    expected = dist.Normal(point.u @ torch.tensor([1.0, 2.0]), 1.0).log_prob(DATA[0])
    torch.testing.assert_close(point.log_lik, expected)

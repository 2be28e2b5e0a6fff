"""Roles of guide sites: which are mixing variables, and what depends on them directly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.guides import AutoSemiImplicit
from pyro_vi_ext.roles import guide_roles

AUXILIARY = {"is_auxiliary": True}


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)


def model():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 3):
        pyro.sample("b", dist.LogNormal(0.0, 1.0))


@pytest.mark.parametrize(
    "auto",
    [
        AutoNormal,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        lambda m: AutoIAFNormal(m, hidden_dim=[8]),
    ],
    ids=["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoIAFNormal"],
)
def test_latents_of_autoguides_are_conditionals(auto):
    roles = guide_roles(auto(model))
    assert roles.mixing == () and roles.given_mixing() == ()
    assert roles.deltas == {"a", "b"}
    for name in roles.deltas:
        (source,) = roles.parents[name]
        assert name in roles.delta_children(source)


def test_noise_of_auto_semi_implicit_is_mixing():
    guide = AutoSemiImplicit(model)
    roles = guide_roles(guide)
    (noise,), (latent,) = roles.mixing, roles.given_mixing()
    assert roles.parents[latent] == {noise}
    assert set(roles.delta_children(latent)) == {"a", "b"}


def chain():
    psi1 = pyro.sample("psi1", dist.Normal(0.0, 1.0), infer=AUXILIARY)
    psi2 = pyro.sample("psi2", dist.Normal(psi1, 1.0), infer=AUXILIARY)
    a = pyro.sample("a", dist.Normal(psi2, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("c", dist.Normal(b + psi1, 1.0))
    unused = pyro.sample("unused", dist.Normal(0.0, 1.0), infer=AUXILIARY)
    pyro.sample("d", dist.Delta(unused.exp(), log_density=-unused))


def test_dependence_is_direct():
    roles = guide_roles(chain)
    assert roles.mixing == ("psi1", "psi2")
    assert roles.given_mixing() == ("a", "c")  # not b, which depends on psi through a only
    assert roles.parents["b"] == {"a"}
    assert roles.parents["c"] == {"b", "psi1"}
    assert roles.conditional_parents("c") == {"b"}
    assert roles.delta_children("unused") == ("d",)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    guide_roles(chain)
    assert torch.equal(torch.get_rng_state(), state)


def test_dependence_through_a_network_and_a_transform():
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))

    def guide():
        pyro.module("net", net)
        noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer=AUXILIARY)
        base = dist.Normal(net(psi).squeeze(-1), 1.0)
        sigmoid = torch.distributions.transforms.SigmoidTransform()
        pyro.sample("a", dist.TransformedDistribution(base, [sigmoid]))
        pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))

    roles = guide_roles(guide)
    assert roles.mixing == ("psi",) and roles.given_mixing() == ("a",)


def test_a_factor_on_a_mixing_variable_is_refused():
    def guide():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        pyro.sample("a", dist.Normal(psi, 1.0))
        pyro.factor("extra", -psi, has_rsample=True)

    with pytest.raises(ValueError, match="'extra' is a factor that depends directly"):
        guide_roles(guide)


def test_an_unused_auxiliary_site_is_no_part_of_log_q():
    """It integrates to one; stock Pyro reports its entropy as if it were evidence."""

    def guide():
        pyro.sample("unused", dist.Normal(torch.zeros(5), 1.0).to_event(1), infer=AUXILIARY)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def target():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert guide_roles(guide).unused == {"unused"}
    assert SemiImplicitELBO(5).loss(target, guide) == pytest.approx(0.0, abs=1e-6)
    stock = pyro.infer.Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=0)
    assert -stock.loss(target, guide) > 6.5


def test_a_dependence_that_cannot_be_followed_is_refused():
    def guide():
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        pyro.sample("z", dist.Delta(torch.tensor(noise.item())))

    with pytest.raises(ValueError, match="'noise', and the Delta site 'z' on no site"):
        guide_roles(guide)

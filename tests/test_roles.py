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


@pytest.mark.parametrize("write", [lambda p: torch.zeros(()), lambda p: torch.tensor(p.item())])
def test_noise_on_which_nothing_is_seen_to_depend_is_refused(write):
    """Scored it would add its entropy, unscored a dependence may have been missed."""

    def guide():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        pyro.sample("z", dist.Normal(write(psi), 1.0))

    with pytest.raises(ValueError, match="seen to depend on the auxiliary site 'psi'"):
        guide_roles(guide)


def test_a_conditional_on_a_delta_is_no_dependence_on_its_source():
    def target():
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("v", dist.Normal(z, 1.0))

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        z = pyro.sample("z", dist.Delta(u.exp(), log_density=-u))
        pyro.sample("v", dist.Normal(z, 1.0))

    roles = guide_roles(guide)
    assert roles.mixing == () and roles.parents["v"] == {"z"}
    assert SemiImplicitELBO(5).loss(target, guide) == pytest.approx(0.0, abs=1e-5)


def test_auxiliary_deltas_of_noise_are_transparent():
    def guide():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        h = pyro.sample("h", dist.Delta(2 * psi), infer=AUXILIARY)
        pyro.sample("z", dist.Normal(h, 1.0))

    roles = guide_roles(guide)
    assert roles.mixing == ("psi",) and roles.given_mixing() == ("z",)
    assert roles.unscored == {"psi", "h"}

"""The log joint in log r and logit p is that of the traced model, for any size of counts."""

import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext.models.negative_binomial import load_mites, negative_binomial
from pyro_vi_ext.models.negative_binomial_joint import make_log_joint

PRIOR = (0.5, 0.1, 2.0, 3.0)  # a, b, alpha, beta


def traced(x, s, v):
    """log p(x, r, p) from the model, plus log r + log p (1 - p)."""
    conditioned = poutine.condition(negative_binomial, {"r": s.exp(), "p": v.sigmoid()})
    log_prob = poutine.trace(conditioned).get_trace(x, *PRIOR).log_prob_sum()
    jacobian = s + torch.nn.functional.logsigmoid(v) + torch.nn.functional.logsigmoid(-v)
    return float(log_prob + jacobian)


@pytest.mark.parametrize("name", ["mites", "zeros", "beyond one block"])
def test_the_lattice_has_the_joint_of_the_model(name):
    x = {
        "mites": load_mites(torch.float64),
        "zeros": torch.zeros(3, dtype=torch.float64),
        "beyond one block": torch.tensor([0.0, 7.0, 2500.0], dtype=torch.float64),
    }[name]
    log_joint = make_log_joint(x, *PRIOR)
    s = torch.tensor([-3.0, 0.1, 2.0], dtype=torch.float64)
    v = torch.tensor([-1.0, 0.4], dtype=torch.float64)
    values = log_joint(s, v)
    assert values.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert values[i, j].item() == pytest.approx(traced(x, s[i], v[j]), rel=1e-10)


def test_the_profile_is_the_largest_value_over_p():
    log_joint = make_log_joint(load_mites(), *PRIOR)
    s = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)
    profile, best = log_joint.profile(s), log_joint.best_v(s)
    v = torch.linspace(-5.0, 5.0, 4001, dtype=torch.float64)
    lattice = log_joint(s, v)
    assert (profile >= lattice.max(1).values).all()
    assert profile.allclose(lattice.max(1).values, atol=1e-3)
    assert (best - v[lattice.argmax(1)]).abs().max() < 0.0025


def test_bad_counts_and_priors_are_refused():
    with pytest.raises(ValueError, match=r'site "x".*0\.5 at index 1'):
        make_log_joint(torch.tensor([1.0, 0.5]), *PRIOR)
    with pytest.raises(ValueError, match="prior parameter b"):
        make_log_joint(load_mites(), 1.0, 0.0, 1.0, 1.0)

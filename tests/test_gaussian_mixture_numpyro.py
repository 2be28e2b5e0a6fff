"""The conjugate mixture in NumPyro: the log joint of its Pyro twin, and updates in closed form."""

import numpy as np
import pyro
import pytest
import torch

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from pyro_vi_ext.cavi import CAVI  # noqa: E402
from pyro_vi_ext.models.gaussian_mixture_conjugate import conjugate_mixture as twin  # noqa: E402
from pyro_vi_ext.models.gaussian_mixture_numpyro import conjugate_mixture  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Singular sample"),  # torch draws such a Wishart matrix anew
]

X = np.random.default_rng(0).normal(size=(9, 2))


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("marginalize", [False, True])
def test_log_joint_is_that_of_pyro(full, marginalize):
    x, options = torch.as_tensor(X), {"full": full, "marginalize": marginalize}
    priors = {"concentration": 0.7, "scale": 1.3, "shape": 1.5, "rate": 0.4}
    evaluate = jax.jit(
        lambda values: log_density(
            conjugate_mixture, (jnp.asarray(X), 3), options | priors, values
        )[0]
    )
    for _ in range(5):
        trace = pyro.poutine.trace(twin).get_trace(x, 3, **options, **priors)
        values = {
            name: trace.nodes[name]["value"].numpy()
            for name in ("weights", "means", "precisions", "z")[: 3 + (not marginalize)]
        }
        expected = float(trace.log_prob_sum())
        assert float(evaluate(values)) == pytest.approx(expected, abs=1e-10, rel=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_coordinate_ascent_takes_it_with_labels(full):
    cavi = CAVI(conjugate_mixture, X, 2, marginalize=False, full=full)  # compares log joints
    assert set(cavi.plan.factors) == {"weights", "means", "precisions", "z"}

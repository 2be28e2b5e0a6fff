"""Rows spread over devices: the same answer, and nothing but sums goes between devices."""

import os
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

from pyro_vi_ext.cavi import CAVI  # noqa: E402


def mixture(x):
    pi = numpyro.sample("pi", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("components", 2):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.5))
        mu = numpyro.sample("mu", dist.Normal(0.0, 3 / jnp.sqrt(tau)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("x", dist.Normal(mu[z], 1 / jnp.sqrt(tau[z])), obs=x)


FOUR_DEVICES = """
import jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from test_sharding import mixture
from pyro_vi_ext.cavi import CAVI

assert len(jax.devices()) == 4
rng = np.random.default_rng(0)
x = rng.normal(size=40) + 4.0 * (rng.random(40) < 0.5)
cavi = CAVI(mixture, x, blocks=[("mu", "tau")])
one = cavi.run(12, tol=0)
four = cavi.shard("data").run(12, tol=0)
np.testing.assert_allclose(four.losses, one.losses, rtol=1e-12)
for name, own in one.params.items():
    for key, value in own.items():
        np.testing.assert_allclose(four.params[name][key], value, rtol=1e-9, atol=1e-12)
onehot = four.state["z"]["onehot"]
assert {shard.data.shape for shard in onehot.addressable_shards} == {(10, 2)}
place = cavi._sharding
arguments = place.arrays(cavi.plan.arrays), four.state, four.params
text = cavi._more.lower(*arguments, num=2).compile().as_text()
assert "all-reduce" in text and "all-gather" not in text
moved = cavi.update(x[::-1] + 1.0).run(12, tol=0)
assert len(moved.state["z"]["onehot"].addressable_shards) == 4
try:
    cavi.update(x[:38])
except ValueError as error:
    assert "38 rows, which 4 devices" in str(error), error
else:
    raise AssertionError("38 rows on 4 devices")
again = cavi.run(12, tol=0)  # as before the update that failed
np.testing.assert_array_equal(again.losses, moved.losses)
"""


def test_four_devices_give_the_answer_of_one():
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES], env=env, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_devices_and_plates_are_checked():
    cavi = CAVI(mixture, np.arange(5.0))
    with pytest.raises(ValueError, match="no plate of the model"):
        cavi.shard("rows")
    with pytest.raises(ValueError, match="one device at least"):
        cavi.shard("data", [])
    assert cavi.shard("data", jax.devices()[:1]).run(2).losses.shape == (2,)

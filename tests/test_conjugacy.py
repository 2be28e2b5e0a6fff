"""Which statistics a term may have, which axes are joint, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from pyro_vi_ext.cavi import CAVI  # noqa: E402
from pyro_vi_ext.cavi.conjugacy import Use, make_block  # noqa: E402
from pyro_vi_ext.cavi.derivation import Latent, NotConjugateError, derive  # noqa: E402
from pyro_vi_ext.cavi.gaussian_layout import Member, Precision  # noqa: E402
from pyro_vi_ext.cavi.plan import make_plan  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402

sample = numpyro.sample
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 3))
Y = X[:, 0]
G, H = np.array([0, 1, 2, 0, 1, 2]), np.array([1, 1, 0, 2, 0, 2])


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


def normal(loc, precision):
    return dist.Normal(loc, 1 / jnp.sqrt(precision))


def derived(model):
    """The derivation at the prior's means: to draw from Gammas is slow to compile."""

    def mean(site):
        if site["type"] == "sample" and not site["is_observed"]:
            return site["fn"].mean * jnp.ones(site["fn"].shape())

    return derive(handlers.substitute(model, substitute_fn=mean), (), {}, jax.random.PRNGKey(0))


def block_of(derivation, names):
    uses = []
    for term, source in zip(derivation.terms, derivation.sources, strict=True):
        own = tuple(atom for atom in term.atoms if atom.site in names)
        rest = replace(term, atoms=tuple(atom for atom in term.atoms if atom.site not in names))
        if own:
            uses.append(Use(source, own, frozenset(rest.labels())))
    return make_block([latent for n, latent in derivation.latents.items() if n in names], uses)


# --- refusals: of sites of one model, in one block or another ------------------------------------


def refused_in_some_block():
    a = sample("a", dist.Normal(0.0, 1.0))
    tau = sample("tau", dist.Gamma(2.0, 1.0))
    m = sample("m", normal(0.0, tau))
    v = sample("v", dist.InverseGamma(2.0, 1.0))
    s = sample("s", dist.Normal(0.0, jnp.sqrt(v)))
    sample("z", dist.Bernoulli(0.5))
    sample("c", dist.LogNormal(0.0, 1.0))
    sample("y_a", normal(a + m, tau).expand([6]), obs=Y)
    sample("y_s", dist.Normal(s, 1.0).expand([6]), obs=Y)
    numpyro.factor("square", -(tau**2) * m)
    b = sample("b", dist.Normal(0.0, 1.0))
    numpyro.factor("cube", 0.01 * a**2 * b)
    d = sample("d", dist.Normal(0.0, 1.0))
    numpyro.factor("product", 0.1 * v * s + 0.1 * d * b)
    alpha = sample("alpha", dist.Gamma(2.0, 1.0).expand([3]))
    w = sample("w", normal(0.0, alpha))
    sample("y_w", normal(X @ w, 1.0), obs=Y)
    beta = sample("beta", dist.Gamma(2.0, 1.0).expand([3]))
    f = sample("f", normal(0.0, beta))
    sample("y_f", normal(X[:3] @ f, beta), obs=Y[:3])
    rho = sample("rho", dist.Gamma(2.0, 1.0).expand([3]))
    mu = sample("mu", normal(0.0, rho))
    sample("y_mu", normal(mu[G], rho[H]), obs=Y)
    eta = sample("eta", dist.Gamma(2.0, 1.0).expand([3]))
    n = sample("n", normal(0.0, eta[:, None]).expand([3, 3]))
    sample("y_n", normal(n[G, H], eta[H]), obs=Y)
    t = sample("T", dist.Wishart(4.0, rate_matrix=jnp.eye(3)))
    u = sample("u", dist.MultivariateNormal(jnp.zeros(3), precision_matrix=t))
    numpyro.factor("entry", 0.1 * t[0, 0] * u[0])
    r = sample("R", dist.Wishart(4.0, rate_matrix=jnp.eye(3)))
    e = sample("e", dist.MultivariateNormal(jnp.zeros(3), precision_matrix=r))
    numpyro.factor("weighted", 0.1 * ((r @ e) * e * jnp.arange(1.0, 4.0)).sum())


PRIORS = "The priors of its Gaussian sites must have the block's precision too"
GROUPINGS = [  # which blocks there may be at all
    ([("a", "nope")], r"Block \('a', 'nope'\): no latent site 'nope'; found 'a', "),
    ([("a", "y_a")], "no latent site 'y_a'"),
    ([("m", "tau"), ("a", "m")], "Site 'm' is in two blocks"),
    (["mu"], "A block is a tuple of two site names or more, got 'mu'"),
    ([("m",)], r"two site names or more, got \('m',\)"),
    ([("m", "m")], r"two site names or more, got \('m', 'm'\)"),
]
REFUSED = [
    (("m", "tau", "v"), ValueError, r"'tau' \(Gamma\), .*'v' \(InverseGamma\).* at most one"),
    (("tau", "v"), ValueError, "A block has one Gaussian site or more"),
    (("a", "z"), ValueError, r"found 'a' \(Normal\), 'z' \(BernoulliProbs\)"),
    (("a", "c"), ValueError, r"'c' \(LogNormal\)"),
    (("a", "tau"), NotConjugateError, rf"Site 'a': .* has a\^2, .* {PRIORS}"),
    (("m", "tau"), NotConjugateError, r"Site 'square': .* has tau\^2 x m, .* for tau, its loga"),
    (("s", "v"), NotConjugateError, r"Site 'product': .* has v x s, .* for 1/v, its logarithm"),
    (("a", "b"), NotConjugateError, r"Site 'cube': .* has a\^2 x b, .* products of at most two"),
    (("w", "alpha"), NotConjugateError, r"Site 'y_w': .* has w, .* alpha times at most two"),
    (("f", "beta"), NotConjugateError, "axis 0 of 'beta', of size 3, is no axis of 'f'"),
    (("mu", "rho"), NotConjugateError, "axis 0 of 'rho', of size 3, is no axis of 'mu'"),
    (("n", "eta"), NotConjugateError, "axis 0 of 'eta', of size 3, is no axis of 'n'"),
    (("u", "T"), NotConjugateError, "Site 'entry': .* has T x u, .* its log-determinant"),
    (("e", "R"), NotConjugateError, "Site 'weighted': .* has .*, contracted with each other"),
]


@pytest.fixture(scope="module")
def refused():
    return derived(refused_in_some_block)


@pytest.mark.parametrize("blocks, message", GROUPINGS)
def test_a_block_is_of_two_sites_or_more_that_are_in_no_other(refused, blocks, message):
    with pytest.raises(ValueError, match=message):
        make_plan(refused, blocks)


@pytest.mark.parametrize("names, error, message", REFUSED, ids=["-".join(x[0]) for x in REFUSED])
def test_refusals_name_the_site_and_the_reason(refused, names, error, message):
    with pytest.raises(error) as caught:
        block_of(refused, names)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_product_with_another_factor_is_fine(refused):
    block = block_of(refused, ("b", "d"))
    assert block.members == (Member("b", ()), Member("d", ())) and block.precision is None


def test_sites_of_different_subsample_scales_are_refused():
    latents = [Latent("a", "Normal", (), weight=1.0), Latent("b", "Normal", (4,), weight=2.5)]
    with pytest.raises(ValueError, match=r"\('a', 'b'\): .* plates of different subsample scales"):
        make_block(latents, [])


# --- layouts -------------------------------------------------------------------------------------


def many_layouts():
    tau = sample("tau", dist.Gamma(2.0, 1.0).expand([3, 2]))
    a = sample("a", normal(0.0, tau.T).expand([2, 3]))
    b = sample("b", normal(0.0, tau).expand([3, 2]))
    sample("y_a", normal(a + b.T, tau.T), obs=X[:2])
    v = sample("v", dist.InverseGamma(2.0, 1.0).expand([1, 2]))
    c = sample("c", dist.Normal(0.0, jnp.sqrt(v)[..., None, :]).expand([3, 4, 2]))
    mean = jnp.einsum("kpd,p->kd", c, jnp.arange(1.0, 5.0))
    sample("y_c", dist.Normal(mean, jnp.sqrt(v)).expand([3, 2]), obs=X.reshape(3, 6)[:, :2])
    t = sample("T", dist.Wishart(4.0, rate_matrix=jnp.eye(2)).expand([3]))
    d = sample("d", dist.MultivariateNormal(jnp.zeros(2), precision_matrix=t).expand([4, 3]))
    e = sample("e", dist.MultivariateNormal(jnp.zeros(2), precision_matrix=2 * t))
    mean = jnp.einsum("pkd,p->kd", d, jnp.arange(1.0, 5.0)) + e
    sample("y_d", dist.MultivariateNormal(mean, precision_matrix=t), obs=X[:3, :2])
    f = sample("f", dist.Normal(0.0, 1.0).expand([3]))
    g = sample("g", dist.Normal(0.0, 1.0).expand([2]))
    sample("y_f", dist.Normal(f[:, None] + g, 1.0), obs=X[:3, :2])
    s = sample("s", dist.Exponential(1.0))
    h = sample("h", normal(0.0, s).expand([3]))
    sample("y_h", normal(h[G], s), obs=Y)
    p = sample("p", dist.Normal(0.0, 1.0).expand([3]))
    r = sample("r", dist.Normal(0.0, 1.0).expand([2]))
    sample("y_p", dist.Normal(p, 1.0), obs=Y[:3])
    sample("y_r", dist.Normal(r, 1.0), obs=Y[:2])


@pytest.fixture(scope="module")
def layouts():
    return derived(many_layouts)


@pytest.mark.parametrize(
    "names, members, sizes, precision",
    [
        (
            ("a", "b", "tau"),
            (Member("a", (2, 3), (0, 1)), Member("b", (3, 2), (1, 0))),
            (2, 3),
            Precision("tau", "Gamma", (3, 2), (1, 0)),
        ),
        (
            ("c", "v"),
            (Member("c", (3, 4, 2), (0, 2)),),
            (3, 2),
            Precision("v", "InverseGamma", (1, 2), (None, 1)),
        ),
        (
            ("d", "e", "T"),
            (Member("d", (4, 3, 2), (1,), 2), Member("e", (3, 2), (0,), 1)),
            (3,),
            Precision("T", "Wishart", (3, 2, 2), (0,)),
        ),
        (("f", "g"), (Member("f", (3,)), Member("g", (2,))), (), None),
        (("p", "r"), (Member("p", (3,)), Member("r", (2,))), (), None),  # these never meet
        (("h", "s"), (Member("h", (3,), (0,)),), (3,), Precision("s", "Exponential", ())),
    ],
)
def test_layouts(layouts, names, members, sizes, precision):
    """Sites in the order of the model, the precision last; what meets in a product is joint."""
    block = block_of(layouts, names)
    assert block.members == members
    assert block.batch_shape == sizes
    assert block.precision == precision


# --- layouts that are easily found wrongly -------------------------------------------------------


def one_component():
    """Axes of size 1: each is like each other."""
    tau = sample("tau", dist.Gamma(2.0, 1.0).expand([1, 1]))
    mu = sample("mu", normal(0.0, tau).expand([1, 3]))
    sample("y", normal(mu, tau).expand([6, 3]), obs=X)


def one_index_of_two_sizes():
    a = sample("a", dist.Normal(0.0, 1.0).expand([3]))
    b = sample("b", dist.Normal(0.0, 1.0).expand([4]))
    sample("y", dist.Normal(a[G] + b[G], 1.0), obs=Y)


def an_element_of_the_precision():
    tau = sample("tau", dist.Gamma(2.0, 1.0).expand([3]))
    mu = sample("mu", normal(0.0, tau[0]).expand([1]))
    sample("y", normal(mu[0], tau[0]).expand([6]), obs=Y)


def a_diagonal_of_precisions():
    tau = sample("tau", dist.Gamma(2.0, 1.0).expand([3, 3]))
    mu = sample("mu", normal(0.0, tau[np.arange(3), np.arange(3)]))
    sample("y", normal(mu[G], tau[G, G]), obs=Y)


def names_with_colons():
    names = ("a", "b:c", "a:b", "c")
    values = [sample(name, dist.Normal(0.0, 1.0)) for name in names]
    sample("y", dist.Normal(values[0] + X @ jnp.stack(values[1:]), 1.0), obs=Y)


def two_components():
    """As one_component, of two: this one is right, so the test can pass."""
    tau = sample("tau", dist.Gamma(2.0, 1.0).expand([2, 1]))
    mu = sample("mu", normal(0.0, tau).expand([2, 3]))
    sample("y", normal(mu[:, None], tau[:, None]), obs=X.reshape(2, 3, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "block"),
    [
        (two_components, ("mu", "tau")),
        (one_component, ("mu", "tau")),
        (one_index_of_two_sizes, ("a", "b")),
        (an_element_of_the_precision, ("mu", "tau")),
        (a_diagonal_of_precisions, ("mu", "tau")),
        (names_with_colons, ("a", "b:c", "a:b", "c")),
    ],
)
def test_is_exact_or_refused(model, block):
    """log p - log q is the bound, wherever it is evaluated."""
    try:
        cavi = CAVI(model, blocks=[block])
    except NotConjugateError as error:
        assert "Please report it" not in str(error)
        return
    result, (factor,) = cavi.run(1), cavi.plan.factors.values()
    shapes = {name: (3, *factor.shape_of(name)) for name in factor.sites}
    values = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    values = {name: np.exp(x) if name == "tau" else x for name, x in values.items()}
    log_p = jax.vmap(lambda v: log_density(model, (), {}, v)[0])(values)
    np.testing.assert_allclose(log_p - result.log_density(values), result.bound, rtol=1e-10)

"""Factors of mean-field posteriors, against SciPy, quadrature and derivatives."""

import itertools

import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402

from pyro_vi_ext.cavi.factor import Factor  # noqa: E402
from pyro_vi_ext.cavi.families import FAMILIES, GaussianAxes  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True):
        yield


def factor_of(kind, shape=(), joint=(), num_values=0):
    return Factor("site", kind, FAMILIES[kind], GaussianAxes(shape, joint), num_values)


def array(*values):
    return np.array(values, dtype=float)


def spd(rng, *batch, size):
    root = rng.normal(size=(*batch, size, size))
    return root @ np.swapaxes(root, -1, -2) + np.eye(size)


def half(matrix):
    return -0.5 * matrix


RNG = np.random.default_rng(0)
PRECISIONS = spd(RNG, 2, size=3)
CONCENTRATIONS = array([0.3, 2.5, 7.0], [4.0, 0.9, 11.0])
LOGITS = sp.log_softmax(RNG.normal(size=(4, 3)), -1)

# kind: factor, parameters of q, its natural parameters by hand, values in the support.
MEMBERS = {
    "Normal": (
        factor_of("Normal", (2,)),
        {"loc": array(-0.7, 3.0), "covariance": array(0.4, 9.0)},
        {"x": array(-0.7 / 0.4, 3.0 / 9.0), "xx": array(-0.5 / 0.4, -0.5 / 9.0)},
        array([0.3, -1.0], [2.0, 8.0]),
    ),
    "MultivariateNormal": (
        factor_of("MultivariateNormal", (2, 3), joint=(1,)),
        {
            "loc": np.arange(6.0).reshape(2, 3),
            "covariance": np.linalg.inv(PRECISIONS),
        },
        {
            "x": np.einsum("nij,nj->ni", PRECISIONS, np.arange(6.0).reshape(2, 3)),
            "xx": half(PRECISIONS),
        },
        RNG.normal(size=(2, 2, 3)),
    ),
    "LogNormal": (
        factor_of("LogNormal", (2,)),
        {"loc": array(-0.7, 1.0), "covariance": array(0.4, 0.09)},
        {"x": array(-0.7 / 0.4 - 1, 1.0 / 0.09 - 1), "xx": array(-0.5 / 0.4, -0.5 / 0.09)},
        array([0.3, 3.0], [2.0, 2.4]),
    ),
    "Gamma": (
        factor_of("Gamma", (3,)),
        {"concentration": array(0.2, 1.0, 30.0), "rate": array(2.0, 0.5, 7.0)},
        {"log": array(-0.8, 0.0, 29.0), "pow1": array(-2.0, -0.5, -7.0)},
        array([0.3, 0.2, 4.0], [1.0, 3.0, 5.0]),
    ),
    "InverseGamma": (
        factor_of("InverseGamma", (3,)),
        {"concentration": array(0.2, 1.0, 30.0), "rate": array(2.0, 0.5, 7.0)},
        {"log": array(-1.2, -2.0, -31.0), "pow-1": array(-2.0, -0.5, -7.0)},
        array([0.3, 0.2, 4.0], [1.0, 3.0, 5.0]),
    ),
    "Beta": (
        factor_of("Beta", (3,)),
        {"concentration1": array(0.4, 3.0, 20.0), "concentration0": array(0.7, 1.0, 9.0)},
        {"log": array(-0.6, 2.0, 19.0), "log1m": array(-0.3, 0.0, 8.0)},
        array([0.3, 0.2, 0.6], [0.99, 0.8, 0.7]),
    ),
    "Dirichlet": (
        factor_of("Dirichlet", (2, 3)),
        {"concentration": CONCENTRATIONS},
        {"log": CONCENTRATIONS - 1},
        array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], [[0.6, 0.3, 0.1], [0.3, 0.2, 0.5]]),
    ),
    "CategoricalProbs": (
        factor_of("CategoricalProbs", (4,), num_values=3),
        {"logits": LOGITS},
        {"onehot": LOGITS + array(1.0, -5.0, 0.0, 700.0)[:, None]},
        np.array([[0, 1, 2, 0], [2, 2, 1, 1]]),
    ),
    "BernoulliProbs": (
        factor_of("BernoulliProbs", (4,), num_values=2),
        {"logits": sp.log_softmax(LOGITS[:, :2], -1)},
        {"onehot": LOGITS[:, :2]},
        np.array([[0, 1, 1, 0], [1, 1, 0, 0]]),
    ),
    "Wishart": (
        factor_of("Wishart", (2, 3, 3)),
        {"concentration": array(2.2, 9.0), "rate_matrix": PRECISIONS},
        {"logdet": (array(2.2, 9.0) - 4) / 2, "pow1": half(PRECISIONS)},
        np.stack([spd(RNG, 2, size=3), spd(RNG, 2, size=3)]),
    ),
}
SAME_FAMILY = {  # priors with the factor of another
    "Exponential": "Gamma",
    "BernoulliLogits": "BernoulliProbs",
    "CategoricalLogits": "CategoricalProbs",
}


@pytest.fixture(params=MEMBERS)
def member(request):
    return MEMBERS[request.param]


def close(got, want, tolerance=1e-10):
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=tolerance)


def inner(natural, statistics):
    """<eta, t> of each element of the batch, summed: one number."""
    return sum((natural[key] * statistics[key]).sum() for key in natural)


def test_every_family_has_a_member_here():
    augmented = {"PolyaGamma", "ChineseRestaurantTable"}  # in test_augmentations
    assert set(MEMBERS) | set(SAME_FAMILY) | augmented == set(FAMILIES)
    for kind, other in SAME_FAMILY.items():
        assert FAMILIES[kind] is FAMILIES[other]
    assert FAMILIES.get("Cauchy") is None


def test_update_gives_the_member_with_these_natural_parameters(member):
    factor, q, natural, _ = member
    close(factor.update(natural), q)
    assert set(natural) == set(factor.family.keys)
    assert factor.is_proper(q)


def test_moments_are_the_gradient_of_the_log_normalizer(member):
    factor, q, natural, _ = member

    def log_normalizer(eta):
        own = factor.update(eta)
        return factor.entropy(own) + inner(eta, factor.moments(own))

    close(jax.grad(log_normalizer)(natural), factor.moments(q), 1e-9)


def test_density_is_that_of_the_exponential_family(member):
    factor, q, natural, values = member
    log_normalizer = factor.entropy(q) + inner(natural, factor.moments(q))
    for value in values:
        want = inner(natural, factor.statistics({"site": value})) - log_normalizer
        got = factor.marginals(q)["site"].log_prob(value).sum()
        assert float(got) == pytest.approx(float(want), rel=1e-9)


# --- against SciPy -------------------------------------------------------------------------------

ONE_DIMENSIONAL = {
    "Normal": lambda q: st.norm(q["loc"], q["covariance"] ** 0.5),
    "LogNormal": lambda q: st.lognorm(q["covariance"] ** 0.5, scale=np.exp(q["loc"])),
    "Gamma": lambda q: st.gamma(q["concentration"], scale=1 / q["rate"]),
    "InverseGamma": lambda q: st.invgamma(q["concentration"], scale=q["rate"]),
    "Beta": lambda q: st.beta(q["concentration1"], q["concentration0"]),
}
STATISTICS = {
    "Normal": {"x": lambda x: x, "xx": np.square},
    "LogNormal": {"x": np.log, "xx": lambda x: np.log(x) ** 2},
    "Gamma": {"log": np.log, "pow1": lambda x: x},
    "InverseGamma": {"log": np.log, "pow-1": np.reciprocal},
    "Beta": {"log": np.log, "log1m": lambda x: np.log1p(-x)},
}

# Densities of a variable u on the whole line, up to a factor, and the statistics as functions of u:
# u = x, log x or logit x. There the trapezoidal rule converges exponentially.
GRID = np.linspace(-500.0, 500.0, 200_001)


def log_beta(u, a, b):
    return a * sp.log_expit(u) + b * sp.log_expit(-u)


def log_gamma(u, a, b):
    return a * u - b * np.exp(np.minimum(u, 700.0))


ON_THE_LINE = {
    "Normal": (
        lambda u, q: -0.5 * (u - q["loc"]) ** 2 / q["covariance"],
        {"x": lambda u: u, "xx": np.square},
    ),
    "LogNormal": (
        lambda u, q: -0.5 * (u - q["loc"]) ** 2 / q["covariance"],
        {"x": lambda u: u, "xx": np.square},
    ),
    "Gamma": (
        lambda u, q: log_gamma(u, q["concentration"], q["rate"]),
        {"log": lambda u: u, "pow1": np.exp},
    ),
    "InverseGamma": (
        lambda u, q: log_gamma(-u, q["concentration"], q["rate"]),
        {"log": lambda u: u, "pow-1": lambda u: np.exp(-u)},
    ),
    "Beta": (
        lambda u, q: log_beta(u, q["concentration1"], q["concentration0"]),
        {"log": sp.log_expit, "log1m": lambda u: sp.log_expit(-u)},
    ),
}


def expectation(log_density, function):
    """By the trapezoidal rule: the values are 0 at both ends."""
    log_p = log_density(GRID)
    p = np.exp(log_p - log_p.max())
    return (p * function(GRID)).sum() / p.sum()


@pytest.mark.parametrize("kind", ONE_DIMENSIONAL)
def test_entropy_is_scipys(kind):
    factor, q, _, _ = MEMBERS[kind]
    entropies = factor.family.entropy(q, factor)
    want = ONE_DIMENSIONAL[kind]({k: np.asarray(v) for k, v in q.items()}).entropy()
    np.testing.assert_allclose(entropies, want, rtol=1e-10)
    assert float(factor.entropy(q)) == pytest.approx(want.sum(), rel=1e-10)


@pytest.mark.parametrize("kind", ONE_DIMENSIONAL)
def test_moments_by_quadrature_of_scipys_density(kind):
    factor, q, _, values = MEMBERS[kind]
    moments = factor.moments(q)
    for i in range(factor.axes.shape[0]):
        frozen = ONE_DIMENSIONAL[kind]({k: float(v[i]) for k, v in q.items()})
        np.testing.assert_allclose(
            factor.marginals(q)["site"].log_prob(values[0])[i],
            frozen.logpdf(values[0, i]),
            rtol=1e-9,
        )
        log_density, statistics = ON_THE_LINE[kind]
        own = {k: float(v[i]) for k, v in q.items()}
        for key, function in statistics.items():
            want = expectation(lambda u, f=log_density, own=own: f(u, own), function)
            assert float(moments[key][i]) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_of_a_value(kind):
    factor, _, _, values = MEMBERS[kind]
    close(
        factor.statistics({"site": values[0]}),
        {k: f(np.asarray(values[0])) for k, f in STATISTICS[kind].items()},
    )


def test_dirichlet_entropy_and_marginals_are_scipys():
    factor, q, _, _ = MEMBERS["Dirichlet"]
    a = np.asarray(q["concentration"])
    entropies = [st.dirichlet(row).entropy() for row in a]
    np.testing.assert_allclose(factor.family.entropy(q, factor), entropies, rtol=1e-11)
    got = factor.moments(q)["log"]
    for i, k in itertools.product(range(2), range(3)):
        one, rest = a[i, k], a[i].sum() - a[i, k]
        want = expectation(lambda u, one=one, rest=rest: log_beta(u, one, rest), sp.log_expit)
        assert float(got[i, k]) == pytest.approx(want, rel=1e-10)


def test_wishart_entropy_and_mean_are_scipys():
    factor, q, _, values = MEMBERS["Wishart"]
    moments = factor.moments(q)
    for i, (nu, rate) in enumerate(zip(*map(np.asarray, q.values()), strict=True)):
        frozen = st.wishart(nu, np.linalg.inv(rate))
        assert float(factor.family.entropy(q, factor)[i]) == pytest.approx(frozen.entropy())
        np.testing.assert_allclose(moments["pow1"][i], frozen.mean(), rtol=1e-10)
        # E log|X| = sum_d E log chi2(nu - d) - log|rate|, d = 0, ..., D - 1 (Bartlett).
        want = -np.linalg.slogdet(rate)[1]
        for d in range(3):  # chi2(n) is Gamma(n / 2, 1 / 2)
            want += expectation(lambda u, a=(nu - d) / 2: log_gamma(u, a, 0.5), lambda u: u)
        assert float(moments["logdet"][i]) == pytest.approx(want, rel=1e-10)
        got = factor.marginals(q)["site"].log_prob(values[0])[i]
        assert float(got) == pytest.approx(frozen.logpdf(np.asarray(values[0, i])), rel=1e-9)
    got = factor.statistics({"site": values[0]})
    np.testing.assert_allclose(got["logdet"], np.log(np.linalg.det(values[0])), rtol=1e-12)
    assert np.array_equal(got["pow1"], values[0])


def test_discrete_entropy_is_scipys_also_where_a_probability_is_zero():
    factor = factor_of("CategoricalProbs", (3,), num_values=3)
    p = np.array([[0.2, 0.3, 0.5], [0.0, 0.4, 0.6], [0.0, 1.0, 0.0]])
    q = factor.update({"onehot": np.log(np.where(p > 0, p, 1.0)) + np.where(p > 0, 3.0, -2000.0)})
    np.testing.assert_allclose(factor.moments(q)["onehot"], p, rtol=1e-14)
    want = st.entropy(p, axis=-1)
    np.testing.assert_allclose(factor.family.entropy(q, factor), want, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(factor.marginals(q)["site"].probs, p, rtol=1e-14)
    onehot = factor.statistics({"site": jnp.array([2, 1, 0])})["onehot"]
    assert onehot.dtype == np.float64 and np.array_equal(onehot, np.eye(3)[[2, 1, 0]])


def test_bernoulli_distribution_has_the_probability_of_one():
    factor, q, natural, _ = MEMBERS["BernoulliProbs"]
    eta = np.asarray(natural["onehot"])
    np.testing.assert_allclose(factor.marginals(q)["site"].probs, sp.expit(eta[:, 1] - eta[:, 0]))


# --- joint axes ----------------------------------------------------------------------------------

SHAPE = (2, 3, 4)
JOINT = [joint for size in range(4) for joint in itertools.combinations(range(3), size)]


@pytest.mark.parametrize("joint", JOINT)
def test_rows_and_matrices_of_joint_axes_round_trip(joint):
    axes = GaussianAxes(SHAPE, joint)
    x = np.arange(24).reshape(SHAPE)
    rows = np.asarray(axes.to_rows(x))
    batch = tuple(SHAPE[a] for a in axes.batch)
    assert rows.shape == (*batch, axes.size)
    np.testing.assert_array_equal(axes.from_rows(rows), x)
    # Entry (i, j) of a matrix belongs to entries i and j of its row.
    second = RNG.normal(size=(*SHAPE, *(SHAPE[a] for a in joint)))
    matrices = np.asarray(axes.to_matrices(second))
    assert matrices.shape == (*batch, axes.size, axes.size)
    np.testing.assert_array_equal(axes.from_matrices(matrices), second)
    for at in itertools.product(*map(range, SHAPE)):
        i = np.argwhere(rows == x[at])[0]
        for other in itertools.product(*(range(SHAPE[a]) for a in joint)):
            partner = list(at)
            for axis, value in zip(joint, other, strict=True):
                partner[axis] = value
            j = np.argwhere(rows == x[tuple(partner)])[0]
            assert np.array_equal(i[:-1], j[:-1])
            assert matrices[tuple(i)][j[-1]] == second[at + other]


@pytest.mark.parametrize("kind", ["Normal", "LogNormal"])
@pytest.mark.parametrize("joint", JOINT)
def test_joint_factor_is_the_gaussian_of_its_natural_parameters(kind, joint):
    """Through one dense Gaussian of all 24 entries, built from the natural parameters alone."""
    rng = np.random.default_rng(1)
    factor = factor_of(kind, SHAPE, joint)
    axes = factor.axes
    batch = tuple(SHAPE[a] for a in axes.batch)
    precision = spd(rng, *batch, size=axes.size) + axes.size * np.eye(axes.size)
    linear = rng.normal(size=SHAPE)
    # Only the symmetric part counts: <eta, x x'> is blind to the rest.
    skew = rng.normal(size=precision.shape) * (axes.size > 1)
    second = half(precision) + skew - np.swapaxes(skew, -1, -2)
    quadratic = np.asarray(axes.from_matrices(second))
    natural = {"x": linear - (kind == "LogNormal"), "xx": quadratic}
    w = rng.normal(size=SHAPE)
    x = np.exp(w) if kind == "LogNormal" else w

    @jax.jit
    def all_of(natural, x):
        q = factor.update(natural)
        posterior = factor.marginals(q)["site"]
        value = axes.to_rows(x) if joint else x
        assert posterior.batch_shape + posterior.event_shape == value.shape
        log_q = posterior.log_prob(value).sum()
        return (
            factor.moments(q),
            factor.entropy(q),
            factor.statistics({"site": x}),
            log_q,
            factor.is_proper(q),
        )

    moments, entropy, statistics, log_q, proper = jax.tree.map(np.asarray, all_of(natural, x))
    dense = np.zeros((24, 24))
    order = np.asarray(axes.to_rows(np.arange(24).reshape(SHAPE))).reshape(-1, axes.size)
    for row, block in zip(order, precision.reshape(-1, axes.size, axes.size), strict=True):
        dense[np.ix_(row, row)] = block
    covariance = np.linalg.inv(dense)
    loc = covariance @ linear.reshape(-1)
    gaussian = st.multivariate_normal(loc, covariance)
    full = (covariance + np.outer(loc, loc)).reshape(SHAPE + SHAPE)
    outer = np.einsum("abc,def->abcdef", w, w)
    np.testing.assert_allclose(moments["x"].reshape(-1), loc, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(statistics["x"], w, atol=1e-14)
    for at in itertools.product(*map(range, SHAPE)):
        chosen = tuple(slice(None) if a in joint else at[a] for a in range(3))
        np.testing.assert_allclose(moments["xx"][at], full[at][chosen], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(statistics["xx"][at], outer[at][chosen], atol=1e-13)
    log_normal = kind == "LogNormal"
    assert entropy == pytest.approx(gaussian.entropy() + log_normal * loc.sum(), rel=1e-10)
    assert log_q == pytest.approx(gaussian.logpdf(w.reshape(-1)) - log_normal * w.sum(), rel=1e-10)
    assert proper


def test_log_normal_is_a_gaussian_of_the_logarithm():
    """Change of variables: q(x) = N(log x) / x, and H[q(x)] = H[q(log x)] + E log x."""
    factor, q, _, values = MEMBERS["LogNormal"]
    plain = MEMBERS["Normal"][0]
    shift = q["loc"].sum()
    assert float(factor.entropy(q)) == pytest.approx(float(plain.entropy(q) + shift), rel=1e-14)
    close(factor.moments(q), plain.moments(q))
    log_x = jnp.log(values)
    want = plain.marginals(q)["site"].log_prob(log_x) - log_x
    np.testing.assert_allclose(factor.marginals(q)["site"].log_prob(values), want, rtol=1e-12)


# --- improper ------------------------------------------------------------------------------------

INDEFINITE = np.array([np.eye(2), [[1.0, 2.0], [2.0, 1.0]]])
DEFINITE = np.array([np.eye(2), np.eye(2)])
TWO = factor_of("Normal", (2,))
JOINED = factor_of("MultivariateNormal", (2, 2), joint=(1,))
WISHART = factor_of("Wishart", (2, 2, 2))
IMPROPER = [
    *[
        (factor_of(kind, (2,)), {"concentration": array(*a), "rate": array(*b)})
        for kind in ("Gamma", "InverseGamma")
        for a, b in [
            ([1, 0], [1, 1]), ([1, -1], [1, 1]), ([1, 1], [0, 1]), ([1, 1], [-1, 1]),
            ([1, np.nan], [1, 1]), ([1, 1], [np.inf, 1]),
        ]
    ],
    (factor_of("Beta", (2,)), {"concentration1": array(1, 0), "concentration0": array(1, 1)}),
    (factor_of("Beta", (2,)), {"concentration1": array(1, 1), "concentration0": array(-1, 1)}),
    (factor_of("Dirichlet", (3,)), {"concentration": array(1, 0, 1)}),
    (factor_of("Dirichlet", (3,)), {"concentration": array(1, np.nan, 1)}),
    (TWO, {"loc": array(0, 0), "covariance": array(1, 0)}),
    (TWO, {"loc": array(0, 0), "covariance": array(1, -1)}),
    (TWO, {"loc": array(0, 0), "covariance": array(1, np.inf)}),
    (TWO, {"loc": array(0, np.nan), "covariance": array(1, 1)}),
    (JOINED, {"loc": np.zeros((2, 2)), "covariance": INDEFINITE}),
    (JOINED, {"loc": np.zeros((2, 2)), "covariance": INDEFINITE * np.nan}),
    (JOINED, {"loc": np.full((2, 2), np.inf), "covariance": DEFINITE}),
    (WISHART, {"concentration": array(3, 1), "rate_matrix": DEFINITE}),
    (WISHART, {"concentration": array(3, np.nan), "rate_matrix": DEFINITE}),
    (WISHART, {"concentration": array(3, 3), "rate_matrix": INDEFINITE}),
    (factor_of("CategoricalProbs", (1,), num_values=2), {"logits": array([np.nan, 0])}),
]  # fmt: skip


@pytest.mark.parametrize("factor, q", IMPROPER)
def test_an_improper_factor_is_flagged(factor, q):
    assert not bool(factor.is_proper(q))


@pytest.mark.parametrize(
    "factor, shapes",
    [
        (TWO, {"x": (2,), "xx": (2,)}),
        (JOINED, {"x": (2, 2), "xx": (2, 2, 2)}),
        (factor_of("LogNormal", (2,)), {"x": (2,), "xx": (2,)}),
        (WISHART, {"logdet": (2,), "pow1": (2, 2, 2)}),
        (factor_of("InverseGamma", (2,)), {"log": (2,), "pow-1": (2,)}),
    ],
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_latent_that_nothing_informs_is_flagged(factor, shapes, zero):
    """Natural parameters of zero: a flat factor."""
    q = factor.update({key: jnp.full(shape, zero) for key, shape in shapes.items()})
    assert not bool(factor.is_proper(q))

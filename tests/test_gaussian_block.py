"""Joint factors: an exponential family whatever its layout, and exact posteriors where they are."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats as st
from scipy.special import digamma, logsumexp, multigammaln

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from pyro_vi_ext.cavi import CAVI  # noqa: E402
from pyro_vi_ext.cavi.gaussian_block import GaussianBlock  # noqa: E402
from pyro_vi_ext.cavi.gaussian_layout import Member, Precision  # noqa: E402
from pyro_vi_ext.cavi.starts import first_moments  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


# --- the factor by itself, of layouts written by hand --------------------------------------------

# Axes of equal sizes tell no mistakes apart; so sizes differ, but for one layout of equal ones.
GAMMA = GaussianBlock(  # three batch axes in cyclic orders, with a joint one between them
    (Member("a", (4, 2, 3, 2), (2, 3, 0)), Member("b", (2, 4, 3), (2, 0, 1))),
    (3, 2, 4),
    Precision("t", "Gamma", (4, 3, 2), (2, 0, 1)),
)
INVERSE = GaussianBlock(  # the variance has one of the batch axes, and an axis of size 1
    (Member("a", (2, 3, 2), (1, 2)), Member("b", (2, 3), (1, 0))),
    (3, 2),
    Precision("v", "InverseGamma", (2, 1), (1, None)),
)
WISHART = GaussianBlock(  # one matrix for each element of the second batch axis
    (Member("a", (2, 3, 2), (1,), 2), Member("b", (3, 2), (0,), 1)),
    (3,),
    Precision("T", "Wishart", (3, 2, 2), (0,)),
)
SHARED = GaussianBlock(  # one matrix for all; its columns are not the last axis
    (Member("a", (3, 2, 2), (0,), 1), Member("b", (2, 3), (1,), 0)),
    (3,),
    Precision("T", "Wishart", (2, 2), ()),
)
EQUAL = GaussianBlock(
    (Member("a", (2, 2, 2), (1, 0)), Member("b", (2, 2), (0, 1)), Member("c", (2, 2, 2), (2, 0))),
    (2, 2),
    Precision("t", "Exponential", (2, 2), (1, 0)),
)
KNOWN = GaussianBlock((Member("a", (2, 3), (1,)), Member("b", (3,), (0,))), (3,))
WEIGHTED = GaussianBlock((Member("a", (2,)),), (), Precision("t", "Gamma", (), ()), 2.5)

slow = pytest.mark.slow
LAYOUTS = [
    pytest.param(GAMMA, id="gamma"),
    pytest.param(INVERSE, id="inverse-gamma", marks=slow),
    pytest.param(WISHART, id="wishart"),
    pytest.param(SHARED, id="shared-wishart", marks=slow),
    pytest.param(EQUAL, id="equal-sizes", marks=slow),
    pytest.param(KNOWN, id="no-precision", marks=slow),
    pytest.param(WEIGHTED, id="weighted", marks=slow),
]


def positive(rng, *shape):
    x = rng.normal(size=(*shape, shape[-1]))
    return x @ np.swapaxes(x, -1, -2) + np.eye(shape[-1])


def rows(block):
    """(member, batch position, row, column) -> index of the member's array, element by element."""
    start = 0
    for a in block.members:
        joint = [i for i in range(len(a.shape)) if i not in a.batch and i != a.matrix]
        sizes = [a.shape[i] for i in joint]
        for index in np.ndindex(*a.shape):
            place = tuple(index[i] for i in a.batch)
            row = np.ravel_multi_index([index[i] for i in joint], sizes) if joint else 0
            yield a, place, start + int(row), 0 if a.matrix is None else index[a.matrix], index
        start += math.prod(sizes)


def dense(block, values):
    """X of all members, shape (*batch, n, D), element by element."""
    x = np.zeros((*block.batch_shape, block.size, block.dim))
    for a, place, row, column, index in rows(block):
        x[(*place, row, column)] = values[a.name][index]
    return x


def precisions(block, t):
    """The precision of each position of the block's batch, D x D."""
    found, p = np.zeros((*block.batch_shape, block.dim, block.dim)), block.precision
    for place in np.ndindex(*block.batch_shape):
        own = t[tuple(0 if axis is None else place[axis] for axis in p.batch)]
        found[place] = own if p.kind == "Wishart" else own ** (-1 if p.kind[0] == "I" else 1)
    return found


def log_density_by_hand(block, q, values):
    x, total = dense(block, values), 0.0
    p = block.precision
    wide = np.ones((*block.batch_shape, 1, 1)) if p is None else precisions(block, values[p.name])
    for place in np.ndindex(*block.batch_shape):
        covariance = np.kron(q["covariance"][place], np.linalg.inv(wide[place]))
        normal = st.multivariate_normal(q["loc"][place].ravel(), covariance)
        total += normal.logpdf(x[place].ravel())
    if p is None:
        return total
    for place in np.ndindex(*q["concentration"].shape):
        nu, rate, t = q["concentration"][place], q["rate_matrix"][place], values[p.name][place]
        if p.kind == "Wishart":
            total += st.wishart(nu, np.linalg.inv(rate)).logpdf(t)
        else:
            family = st.invgamma if p.kind == "InverseGamma" else st.gamma
            scale = rate[0, 0] / 2
            total += family(nu / 2, scale=scale if p.kind == "InverseGamma" else 1 / scale).logpdf(
                t
            )
    return total


def random_parameters(block, rng):
    n, dim = block.size, block.dim
    q = {
        "loc": rng.normal(size=(*block.batch_shape, n, dim)),
        "covariance": np.linalg.inv(positive(rng, *block.batch_shape, n)),
    }
    if block.precision is not None:
        batch = block.precision.shape[: len(block.precision.batch)]
        q["concentration"] = 8.0 + 4 * rng.random(batch)
        q["rate_matrix"] = positive(rng, *batch, dim)
    return q


def random_values(block, rng):
    values, p = {a.name: rng.normal(size=a.shape) for a in block.members}, block.precision
    if p is not None:
        matrix = p.kind == "Wishart"
        values[p.name] = (
            positive(rng, *p.shape[:-1]) if matrix else np.exp(rng.normal(size=p.shape))
        )
    return values


def natural(block, q, rng):
    """Natural parameters of the factor, element by element; what is antisymmetric has no effect."""
    inverse = np.linalg.inv(q["covariance"])
    p, eta = block.precision, {}
    linear = inverse @ q["loc"]
    places = {}
    number = {a.name: i for i, a in enumerate(block.members)}
    for a, place, row, column, index in rows(block):
        eta.setdefault(f"x:{number[a.name]}", np.zeros(a.shape))[index] = linear[
            (*place, row, column)
        ]
        plain = tuple(i for axis, i in enumerate(index) if axis != a.matrix)
        places.setdefault(a, {})[plain] = place, row
    for i, a in enumerate(block.members):
        for b in block.members[i:]:
            joint = [k for k in range(len(b.shape)) if k not in b.batch and k != b.matrix]
            shape = [a.shape[k] for k in range(len(a.shape)) if k != a.matrix]
            array = np.zeros([*shape, *(b.shape[k] for k in joint)])
            for first, (place, row) in places[a].items():
                for second, (other, column) in places[b].items():
                    if place == other:
                        axes = [k for k in range(len(b.shape)) if k != b.matrix]
                        at = tuple(second[axes.index(k)] for k in joint)
                        size = -0.5 if a is b else -1.0
                        array[(*first, *at)] = size * inverse[(*place, row, column)]
                        array[(*first, *at)] += 0.1 * np.sign(row - column) if a is b else 0.0
            eta[f"xx:{number[a.name]}:{number[b.name]}"] = array
    if p is not None:
        log, own = block.keys[:2]
        batch, quadratic = q["concentration"].shape, np.zeros(q["rate_matrix"].shape)
        count = np.zeros(batch)
        for place in np.ndindex(*block.batch_shape):
            at = tuple(0 if axis is None else place[axis] for axis in p.batch)
            quadratic[at] += q["loc"][place].T @ inverse[place] @ q["loc"][place]
            count[at] += block.size
        power = (q["concentration"] + count - block.dim - 1) / 2
        eta[log] = -(power + 2) if p.kind == "InverseGamma" else power
        matrix = -(q["rate_matrix"] + quadratic) / 2
        eta[own] = matrix if p.kind == "Wishart" else matrix[..., 0, 0]
    return {key: block.weight * value for key, value in eta.items()}


def inner(x, y):
    return sum(jnp.vdot(x[key], y[key]) for key in x)


@pytest.mark.parametrize("block", LAYOUTS)
def test_the_factor_is_an_exponential_family(block):
    """Everything follows from the natural parameters and from a density written by hand:

    log q(z) = <eta, t(z)> - A(eta), E[t] = grad A, H = A - <eta, E[t]>.
    """
    rng = np.random.default_rng(0)
    q = random_parameters(block, rng)
    eta, values = natural(block, q, rng), [random_values(block, rng) for _ in range(3)]
    points = jax.tree.map(lambda *x: np.stack(x), *values)

    @jax.jit
    def everything(eta, points):
        one = jax.tree.map(lambda g: g / block.weight, eta)  # what one of its copies has
        first = jax.tree.map(lambda v: v[0], points)

        def normalizer(one):
            own = block.update(jax.tree.map(lambda g: g * block.weight, one))
            return inner(one, block.statistics(first)) - block.log_density(own, first)

        found = block.update(eta)
        value, gradient = jax.value_and_grad(normalizer)(one)
        return (
            found,
            jax.vmap(partial(block.log_density, found))(points),
            jax.vmap(lambda v: inner(one, block.statistics(v)))(points),
            block.moments(found),
            block.entropy(found),
            (value, gradient, inner(one, block.moments(found))),
            block.is_proper(found),
        )

    found, log_q, linear, moments, entropy, (value, gradient, paired), proper = everything(
        eta, points
    )
    assert set(found) == set(q) and set(moments) == set(block.keys) == set(eta)
    for key, parameter in q.items():
        np.testing.assert_allclose(found[key], parameter, rtol=1e-10, atol=1e-11, err_msg=key)
    by_hand = [log_density_by_hand(block, q, v) for v in values]
    np.testing.assert_allclose(log_q, by_hand, rtol=1e-11)
    np.testing.assert_allclose(linear - value, by_hand, rtol=1e-10)
    for key, expected in gradient.items():
        assert moments[key].shape == expected.shape == eta[key].shape, key
        np.testing.assert_allclose(moments[key], expected, rtol=1e-9, atol=1e-10, err_msg=key)
    np.testing.assert_allclose(entropy, block.weight * (value - paired), rtol=1e-11)
    assert bool(proper)


@pytest.mark.parametrize("block", [LAYOUTS[2], *(pytest.param(b, marks=slow) for b in (
    GAMMA, INVERSE, SHARED, EQUAL, KNOWN))])  # fmt: skip
def test_marginals(block):
    rng = np.random.default_rng(1)
    q = random_parameters(block, rng)
    found, p, dim = block.marginals(jax.tree.map(jnp.asarray, q)), block.precision, block.dim
    assert list(found) == list(block.sites)
    names = {a.name: ("MultivariateNormal" if a.joint else "Normal") for a in block.members}
    if p is not None:
        plain = {a.name: "MultivariateStudentT" if a.joint else "StudentT" for a in block.members}
        names = plain if p.kind != "Wishart" else dict.fromkeys(plain, "MultivariateStudentT")
        names[p.name] = {"Exponential": "Gamma"}.get(p.kind, p.kind)
    assert {name: type(d).__name__ for name, d in found.items()} == names
    variances = np.zeros((*block.batch_shape, dim, dim)) + np.eye(dim)
    if p is not None:  # E[T^-1]
        nu, rate = q["concentration"], q["rate_matrix"]
        inverse = rate / (nu - dim - 1)[..., None, None]
        for place in np.ndindex(*block.batch_shape):
            at = tuple(0 if axis is None else place[axis] for axis in p.batch)
            variances[place] = inverse[at]
        if p.kind == "Wishart":
            np.testing.assert_allclose(
                found[p.name].mean, nu[..., None, None] * np.linalg.inv(rate)
            )
        else:
            mean = nu / rate[..., 0, 0]
            if p.kind == "InverseGamma":
                mean = rate[..., 0, 0] / (nu - 2)
            np.testing.assert_allclose(found[p.name].mean, mean)
        assert found[p.name].batch_shape + found[p.name].event_shape == p.shape
    for a, place, row, column, index in rows(block):
        d = found[a.name]
        scale = q["covariance"][(*place, row, row)] * variances[(*place, column, column)]
        if a.matrix is None:  # independent axes in the site's order, then joint ones, flattened
            at = [index[i] for i in range(len(a.shape)) if i in a.batch]
            joint = [i for i in range(len(a.shape)) if i not in a.batch]
            if joint:
                sizes = [a.shape[i] for i in joint]
                at.append(int(np.ravel_multi_index([index[i] for i in joint], sizes)))
        else:
            at = [*(i for axis, i in enumerate(index) if axis != a.matrix), column]
        np.testing.assert_allclose(d.mean[tuple(at)], q["loc"][(*place, row, column)])
        np.testing.assert_allclose(d.variance[tuple(at)], scale, rtol=1e-10)


@slow
@pytest.mark.parametrize("block", LAYOUTS)
def test_draws_have_the_moments(block):
    """Jointly: among the statistics are T, T x and x' T x, so the mean of T (x - m)(x - m)'."""
    q, num = jax.tree.map(jnp.asarray, random_parameters(block, np.random.default_rng(2))), 20_000

    @jax.jit
    def run(keys):
        draws = jax.vmap(lambda key: block.draw(q, key))(keys)
        return draws, jax.vmap(block.statistics)(draws), block.moments(q)

    draws, statistics, moments = run(jax.random.split(jax.random.PRNGKey(0), num))
    assert {n: v.shape[1:] for n, v in draws.items()} == {s: block.shape_of(s) for s in block.sites}
    z = [
        (statistics[key].mean(0) - moments[key]) / statistics[key].std(0) * math.sqrt(num)
        for key in block.keys
    ]
    z = np.concatenate([np.ravel(x) for x in z])
    assert np.abs(z).max() < 4.5 and 0.5 < np.mean(z**2) < 1.6, np.abs(z).max()


def test_a_factor_that_is_no_distribution_is_found():
    q = random_parameters(WISHART, np.random.default_rng(3))
    assert bool(WISHART.is_proper(q))
    for name, wrong in (
        ("loc", np.nan * q["loc"]),
        ("covariance", -q["covariance"]),
        ("concentration", np.ones_like(q["concentration"])),
        ("rate_matrix", -q["rate_matrix"]),
    ):
        assert not bool(WISHART.is_proper({**q, name: wrong})), name


# --- exact posteriors: many in one model, as its blocks share nothing ----------------------------

RNG = np.random.default_rng(4)
X, GROUP = RNG.normal(size=(9, 2)), np.array([0, 1, 2, 0, 1, 2, 2, 1, 1])
Y1, Y2, Y3, Y4 = (RNG.normal(size=shape) for shape in ((9,), (9,), (9, 2), (9, 3, 3)))
RATE = np.array([[1.0, 0.2], [0.2, 2.0]])
sample = numpyro.sample


def normal(loc, precision):
    return dist.Normal(loc, 1 / jnp.sqrt(precision))


def regression():
    """Intercept, slopes and precision."""
    tau = sample("tau", dist.Gamma(2.0, 1.5))
    a = sample("a", normal(0.5, tau / 9))
    w = sample("w", normal(0.0, 0.5 * tau).expand([2]).to_event(1))
    with numpyro.plate("n1", 9):
        sample("y1", normal(a + X @ w, tau), obs=Y1)


def groups():
    """Intercepts and slopes of groups, with a variance for each."""
    with numpyro.plate("groups", 3):
        v = sample("v", dist.InverseGamma(2.0, 1.5))
        b = sample("b", dist.Normal(0.5, jnp.sqrt(3 * v)))
        c = sample("c", dist.Normal(0.0, jnp.sqrt(v)))
    with numpyro.plate("n2", 9):
        sample("y2", dist.Normal(b[GROUP] + c[GROUP] * X[:, 0], jnp.sqrt(v[GROUP])), obs=Y2)


def matrix_normal():
    """Slopes and intercept of two outputs whose noise is correlated."""
    t = sample("T", dist.Wishart(4.0, rate_matrix=jnp.asarray(RATE)))
    with numpyro.plate("inputs", 2):
        m = sample("m", dist.MultivariateNormal(jnp.zeros(2), precision_matrix=0.3 * t))
    d = sample("d", dist.MultivariateNormal(jnp.ones(2), precision_matrix=0.3 * t))
    with numpyro.plate("n3", 9):
        sample("y3", dist.MultivariateNormal(d + X @ m, precision_matrix=t), obs=Y3)


def transposed():
    """Axes of equal sizes in another order in each site: precision by column, a joint axis amid."""
    s = sample("s", dist.Exponential(0.5).expand([1, 3]))
    e = sample("e", normal(0.0, s).expand([3, 2, 3]))  # row, joint, column
    f = sample("f", normal(1.0, 3 * s.T).expand([3, 3]))  # column, row
    mean = jnp.einsum("kpd,np->nkd", e, X) + f.T
    sample("y4", normal(mean, s).expand([9, 3, 3]), obs=Y4)


def t_evidence(y, design, loc, precision, a, b):
    """log p(y): a multivariate t; coefficients with this precision times tau ~ Gamma(a, b)."""
    shape = np.eye(len(y)) + design @ np.diag(1 / np.asarray(precision)) @ design.T
    return st.multivariate_t(design @ loc, b / a * shape, df=2 * a).logpdf(y)


def matrix_t_evidence(y, design, loc, precision, nu, rate):
    """The same of rows of D columns, with T ~ Wishart(nu, rate)."""
    prior, (n, dim) = np.diag(precision), y.shape
    after = prior + design.T @ design
    mean = np.linalg.solve(after, prior @ loc + design.T @ y)
    scale = rate + y.T @ y + loc.T @ prior @ loc - mean.T @ after @ mean

    def log_det(x):
        return np.linalg.slogdet(x)[1]

    total = multigammaln((nu + n) / 2, dim) - multigammaln(nu / 2, dim)
    total += 0.5 * (dim * (log_det(prior) - log_det(after)) - n * dim * math.log(math.pi))
    return total + 0.5 * (nu * log_det(rate) - (nu + n) * log_det(scale))


ONES = np.ones(9)
INTERCEPT = np.column_stack([ONES, X])


def evidence_of_regression():
    return t_evidence(Y1, INTERCEPT, [0.5, 0, 0], [1 / 9, 0.5, 0.5], 2.0, 1.5)


def evidence_of_groups():
    design = np.column_stack([ONES, X[:, 0]])
    own = [GROUP == g for g in range(3)]
    return sum(t_evidence(Y2[g], design[g], [0.5, 0.0], [1 / 3, 1.0], 2.0, 1.5) for g in own)


def evidence_of_matrix_normal():
    loc = np.array([[1.0, 1.0], [0, 0], [0, 0]])
    return matrix_t_evidence(Y3, INTERCEPT, loc, [0.3] * 3, 4.0, RATE)


def evidence_of_transposed():
    design = np.kron(np.eye(3), INTERCEPT)  # all rows of a column, under one precision
    loc, precision = np.tile([1.0, 0, 0], 3), np.tile([3.0, 1, 1], 3)
    columns = (Y4[:, :, d].T.ravel() for d in range(3))
    return sum(t_evidence(y, design, loc, precision, 1.0, 0.5) for y in columns)


EXACT = {
    ("a", "w", "tau"): (regression, evidence_of_regression),
    ("b", "c", "v"): (groups, evidence_of_groups),
    ("d", "m", "T"): (matrix_normal, evidence_of_matrix_normal),
    ("e", "f", "s"): (transposed, evidence_of_transposed),
}


def everything():
    for model, _ in EXACT.values():
        model()


def points(cavi, num=3):
    """Values of all sites, not drawn from any density."""
    rng, values = np.random.default_rng(5), {}
    for factor in cavi.plan.factors.values():
        for _ in range(num):
            for name, value in random_values(factor, rng).items():
                values.setdefault(name, []).append(value)
    return {name: np.stack(value) for name, value in values.items()}


def at_means(model):
    """The model, whose draws are its means: to draw from Gammas is slow to compile."""

    def mean(site):
        if site["type"] == "sample" and not site["is_observed"]:
            d = site["fn"]
            discrete = d.support.is_discrete
            return jnp.zeros(d.shape(), int) if discrete else d.mean * jnp.ones(d.shape())

    return handlers.substitute(model, substitute_fn=mean)


def one_varies(values, names):
    """The values of some sites, and the first values of all others."""
    return {n: v if n in names else np.broadcast_to(v[:1], v.shape) for n, v in values.items()}


@pytest.fixture(scope="module")
def exact():
    """The result; log p - log q where one block varies, by block, and where all do; the algebra."""
    cavi = CAVI(at_means(everything), blocks=EXACT)
    result, values = cavi.run(1), points(cavi)
    parts = [one_varies(values, block) for block in EXACT] + [values]
    stacked = {name: np.stack([part[name] for part in parts]) for name in values}
    log_p = jax.jit(jax.vmap(jax.vmap(lambda v: log_density(everything, (), {}, v)[0])))
    difference = np.asarray(log_p(stacked) - result.log_density(stacked))
    return result, dict(zip(EXACT, difference, strict=False)), difference[-1], cavi.explain()


@pytest.mark.parametrize("block", EXACT, ids=lambda block: EXACT[block][0].__name__)
def test_of_each_block_the_density_is_that_of_the_posterior(exact, block):
    difference = exact[1][block]
    np.testing.assert_allclose(difference, difference[0], rtol=1e-11)


def test_the_bound_is_the_evidence(exact):
    result, _, difference, _ = exact
    evidence = sum(closed_form() for _, closed_form in EXACT.values())
    assert result.bound == pytest.approx(evidence, abs=1e-10)
    np.testing.assert_allclose(difference, evidence, rtol=1e-11)


def test_marginals_are_the_textbooks(exact):
    block = exact[0].factors["a, w, tau"]
    q = block.marginals(exact[0].params[block.name])
    precision = np.diag([1 / 9, 0.5, 0.5]) + INTERCEPT.T @ INTERCEPT
    linear = INTERCEPT.T @ Y1 + np.array([0.5 / 9, 0, 0])
    mean, shape = np.linalg.solve(precision, linear), 2.0 + 9 / 2
    rate = 1.5 + 0.5 * (Y1 @ Y1 + 0.25 / 9 - mean @ precision @ mean)
    assert float(q["tau"].concentration) == pytest.approx(shape, rel=1e-12)
    assert float(q["tau"].rate) == pytest.approx(rate, rel=1e-12)
    scale = rate / shape * np.linalg.inv(precision)
    x = np.array([0.3, -0.4])
    expected = st.t(2 * shape, mean[0], math.sqrt(scale[0, 0])).logpdf(0.7)
    assert float(q["a"].log_prob(0.7)) == pytest.approx(expected, rel=1e-11)
    expected = st.multivariate_t(mean[1:], scale[1:, 1:], df=2 * shape).logpdf(x)
    assert float(q["w"].log_prob(x)) == pytest.approx(expected, rel=1e-11)


# --- what explain() says of them -----------------------------------------------------------------


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_algebra(exact):
    found = lines(exact[3])
    for expected in (
        "q(a, w[i], tau): Gaussian-Gamma, shapes (), (2,), ()",
        "+ 4.5 (from y1)",  # log tau: half of the data
        "- 0.0555556 (from a)",  # tau a^2: -1/2 of 1/9
        "given tau, of the n numbers x = (a, w): covariance = C / tau, mean = C eta[tau x],",
        "tau: concentration = eta[log tau] + 1 - n/2, rate = -eta[tau] - 1/2 mean' C^-1 mean",
        "q(b[i], c[i], v[i]): Gaussian-InverseGamma, shapes (3,), (3,), (3,)",
        "given v, of the n numbers x = (b, c): covariance = v C, mean = C eta[x / v],",
        "v: concentration = -eta[log v] - 1 - n/2, rate = -eta[1/v] - 1/2 mean' C^-1 mean",
        "q(m[i, j], d[i], T[i, j]): Gaussian-Wishart, shapes (2, 2), (2,), (2, 2)",
        "- 0.25 [i' = i] (from w)",
        "with C = -(eta + eta')^-1, eta of tau x x' (of each pair of sites once)",
        "given T, of the n rows x of (m, d): covariance = C times T^-1, mean = C eta[T x],",
        "T: concentration = 2 eta[log|T|] + D + 1 - n, rate = -2 eta[T] - mean' C^-1 mean",
    ):
        assert expected in found, expected


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("- 0.25 (from w)", id="only where i = i'"),
        pytest.param("with C = -1/2 eta[tau x x']^-1", id="eta[tau a w] is twice its entry"),
        pytest.param(
            "q(e[i, j, k], f[i, j], s[i, j]): Gaussian-Gamma, i < 3, j < 2, k < 3, j < 3, i < 1",
            id="j < 2 of e and j < 3 of f",
        ),
    ],
)
def test_the_algebra_is_true(exact, line):
    assert line not in lines(exact[3])


def test_arrays_are_named_with_their_axes_in_order(exact):
    """eta[T m] is X'Y: two terms of one half, one with the transpose, are one row."""
    found = lines(exact[3])
    first = found.index("eta[(T m)] =")
    assert found[first + 1].split("[")[1].startswith("i, j")
    assert found[first + 2].startswith("eta[")


# --- more of them, each with its model -----------------------------------------------------------


def exactly(model, blocks, evidence, sweeps=1):
    """The bound is the evidence, and log p - log q is it everywhere."""
    cavi = CAVI(model, blocks=blocks)
    result = cavi.run(sweeps, tol=0)
    values = points(cavi)
    log_p = jax.vmap(lambda v: log_density(model, (), {}, v)[0])(values)
    np.testing.assert_allclose(log_p - result.log_density(values), evidence, rtol=1e-10)
    assert result.bound == pytest.approx(evidence, rel=1e-11, abs=1e-10)
    return result


def mean_and_precision():
    tau = sample("tau", dist.Gamma(2.0, 1.5))
    mu = sample("mu", normal(0.5, 0.3 * tau))
    sample("y", normal(mu, tau).expand([9]), obs=Y1)


def mean_and_variance():
    v = sample("v", dist.InverseGamma(2.0, 1.5))
    mu = sample("mu", dist.Normal(0.5, jnp.sqrt(v / 0.3)))
    sample("y", dist.Normal(mu, jnp.sqrt(v)).expand([9]), obs=Y1)


@slow
@pytest.mark.parametrize("model, name", [(mean_and_precision, "tau"), (mean_and_variance, "v")])
def test_mean_and_precision(model, name):
    evidence = t_evidence(Y1, ONES[:, None], [0.5], [0.3], 2.0, 1.5)
    result = exactly(model, [("mu", name)], evidence)
    q, draws = result.params[f"mu, {name}"], result.sample(jax.random.PRNGKey(0), (40_000,))
    precision = draws[name] ** (1 if name == "tau" else -1)
    scaled = np.asarray(precision * (draws["mu"] - float(q["loc"][0, 0])) ** 2)
    error = scaled.std() / math.sqrt(len(scaled))
    assert scaled.mean() == pytest.approx(1 / 9.3, abs=4 * error)  # lambda^-1


@slow
def test_known_variance():
    def model():
        a = sample("a", dist.Normal(0.5, 3.0))
        w = sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        sample("y", dist.Normal(a + X @ w, 0.5), obs=Y1)

    covariance = 0.25 * np.eye(9) + INTERCEPT @ np.diag([9.0, 1, 1]) @ INTERCEPT.T
    evidence = st.multivariate_normal(0.5 * ONES, covariance).logpdf(Y1)
    exactly(model, [("a", "w")], evidence)


@slow
def test_crossed_effects_with_known_variances():
    row, column = np.arange(9) // 3, np.arange(9) % 4

    def model():
        a = sample("a", dist.Normal(0.0, 2.0).expand([3]))
        b = sample("b", dist.Normal(0.0, 1.5).expand([4]))
        sample("y", dist.Normal(a[row] + b[column], 0.5), obs=Y1)

    design = np.column_stack([np.eye(3)[row], np.eye(4)[column]])
    covariance = 0.25 * np.eye(9) + design @ np.diag([4.0] * 3 + [2.25] * 4) @ design.T
    exactly(model, [("a", "b")], st.multivariate_normal(np.zeros(9), covariance).logpdf(Y1))


@slow
def test_groups_that_share_a_precision_are_independent_given_it():
    def model():
        tau = sample("tau", dist.Gamma(2.0, 1.5))
        with numpyro.plate("groups", 3):
            a = sample("a", normal(0.5, 0.3 * tau))
        sample("y", normal(a[GROUP], tau), obs=Y1)

    evidence = t_evidence(Y1, np.eye(3)[GROUP], [0.5] * 3, [0.3] * 3, 2.0, 1.5)
    result = exactly(model, [("a", "tau")], evidence)
    assert result.params["a, tau"]["covariance"].shape == (3, 1, 1)


@slow
@pytest.mark.parametrize("dim", (-1, -2))
def test_outputs_in_a_plate(dim):
    side = (2,) if dim == -1 else (2, 1)

    def model():
        with numpyro.plate("outputs", 2, dim=dim):
            tau = sample("tau", dist.Gamma(2.0, 1.5))
            a = sample("a", normal(0.5, tau / 9))
            w = sample("w", normal(jnp.zeros(2), tau[..., None]).to_event(1))
        mean = a.reshape(2) + X @ w.reshape(2, 2).T
        sample("y", normal(mean, tau.reshape(2)), obs=Y3)

    evidence = sum(t_evidence(y, INTERCEPT, [0.5, 0, 0], [1 / 9, 1, 1], 2.0, 1.5) for y in Y3.T)
    result = exactly(model, [("a", "w", "tau")], evidence)
    assert result.posterior["a"].batch_shape == result.posterior["w"].batch_shape == side


@slow
def test_a_wishart_matrix_for_each_group():
    def model():
        with numpyro.plate("groups", 3):
            t = sample("T", dist.Wishart(4.0, rate_matrix=jnp.asarray(RATE)))
            with numpyro.plate("inputs", 2):
                m = sample("m", dist.MultivariateNormal(jnp.zeros(2), precision_matrix=0.3 * t))
            d = sample("d", dist.MultivariateNormal(jnp.ones(2), precision_matrix=0.3 * t))
        mean = d[GROUP] + jnp.einsum("np,pnd->nd", X, m[:, GROUP])
        sample("y", dist.MultivariateNormal(mean, precision_matrix=t[GROUP]), obs=Y3)

    loc, own = np.array([[1.0, 1.0], [0, 0], [0, 0]]), [GROUP == g for g in range(3)]
    evidence = sum(matrix_t_evidence(Y3[g], INTERCEPT[g], loc, [0.3] * 3, 4.0, RATE) for g in own)
    exactly(model, [("T", "m", "d")], evidence)


@slow
def test_known_places_and_diagonals():
    """mu[0] + mu[2] of one site, and the diagonal of another with a vector."""

    def model():
        tau = sample("tau", dist.Gamma(2.0, 1.5).expand([3]))
        e = sample("e", normal(0.5, tau[:, None]).expand([3, 3]))
        f = sample("f", normal(0.0, 2 * tau))
        sample("y", normal(e[GROUP, GROUP] + f[GROUP], tau[GROUP]), obs=Y1)
        s = sample("s", dist.Gamma(2.0, 1.5))
        mu = sample("mu", normal(0.5, s).expand([3]))
        sample("x", normal(mu[0] - 2 * mu[2], s).expand([9]), obs=Y2)

    own = [GROUP == g for g in range(3)]
    evidence = sum(
        t_evidence(Y1[g], np.ones((g.sum(), 2)), [0.5, 0], [1, 2], 2.0, 1.5) for g in own
    )
    design = np.outer(ONES, [1, 0, -2])
    evidence += t_evidence(Y2, design, [0.5] * 3, [1] * 3, 2.0, 1.5)
    exactly(model, [("e", "f", "tau"), ("mu", "s")], evidence)


# --- mixtures ------------------------------------------------------------------------------------

IRIS_LIKE = RNG.normal(size=(40, 3)) + 3.0 * np.eye(3)[np.arange(40) % 3]
RESPONSIBILITIES = RNG.dirichlet(np.ones(3), 40)


def full_mixture(X):
    pi = sample("pi", dist.Dirichlet(1.3 * jnp.ones(3)))
    with numpyro.plate("components", 3):
        t = sample("T", dist.Wishart(4.0, rate_matrix=2.0 * jnp.eye(3)))
        mu = sample("mu", dist.MultivariateNormal(jnp.ones(3), precision_matrix=0.5 * t))
    with numpyro.plate("data", len(X)):
        z = sample("z", dist.Categorical(pi))
        sample("x", dist.MultivariateNormal(mu[z], precision_matrix=t[z]), obs=X)


def run_from(cavi, responsibilities, sweeps):
    start = first_moments(cavi._draws, cavi.plan, jax.random.PRNGKey(0), 1)
    return cavi.run(sweeps, tol=0, state={**start, "z": {"onehot": jnp.asarray(responsibilities)}})


def test_a_mixture_of_normal_wisharts_is_scikit_learns():
    mixture = pytest.importorskip("sklearn.mixture")
    sweeps, x = 11, IRIS_LIKE

    class FromHere(mixture.BayesianGaussianMixture):
        def _initialize_parameters(self, X, random_state, **_):
            self._initialize(X, RESPONSIBILITIES)

    theirs = FromHere(
        n_components=3,
        tol=0,
        reg_covar=0,
        max_iter=sweeps - 1,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=1.3,
        mean_prior=np.ones(3),
        mean_precision_prior=0.5,
        degrees_of_freedom_prior=4.0,
        covariance_prior=2.0 * np.eye(3),
    )
    with pytest.warns(UserWarning):  # it has not converged
        theirs.fit(x)
    cavi = CAVI(at_means(full_mixture), x, blocks=[("mu", "T")])
    result = run_from(cavi, RESPONSIBILITIES, sweeps)
    q, nu = result.params["mu, T"], theirs.degrees_of_freedom_
    for found, expected in (
        (q["loc"][:, 0], theirs.means_),
        (1 / q["covariance"][:, 0, 0], theirs.mean_precision_),
        (q["concentration"], nu),
        (q["rate_matrix"], theirs.covariances_ * nu[:, None, None]),
        (result.params["pi"]["concentration"], theirs.weight_concentration_),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    assert (np.diff(result.losses) < 1e-9).all()


@slow
def test_a_mixture_of_normal_gammas():
    """Against a loop in NumPy, and its bound against E_q log p - log q by Monte Carlo."""
    x, r = IRIS_LIKE, RESPONSIBILITIES

    def model(X):
        pi = sample("pi", dist.Dirichlet(1.3 * jnp.ones(3)))
        with numpyro.plate("components", 3):
            tau = sample("tau", dist.Gamma(2.0, 1.5).expand([3]).to_event(1))
            mu = sample("mu", normal(1.0, 0.5 * tau).to_event(1))
        with numpyro.plate("data", len(X)):
            z = sample("z", dist.Categorical(pi))
            sample("x", normal(mu[z], tau[z]).to_event(1), obs=X)

    result = run_from(CAVI(model, x, blocks=[("mu", "tau")]), r, 12)
    for _ in range(12):
        n = r.sum(0)[:, None]
        weight = 0.5 + n
        loc = (0.5 * 1.0 + r.T @ x) / weight
        a, b = 2.0 + n / 2, 1.5 + 0.5 * (r.T @ x**2 + 0.5 - weight * loc**2)
        square = 1 / weight + a / b * (x[:, None] - loc) ** 2  # E[tau (x - mu)^2]
        log_tau = digamma(a) - np.log(b)
        log_p = digamma(1.3 + r.sum(0)) + 0.5 * (log_tau - square - math.log(2 * math.pi)).sum(-1)
        concentration = 1.3 + r.sum(0)
        r = np.exp(log_p - logsumexp(log_p, axis=-1, keepdims=True))
    q = result.params["mu, tau"]
    np.testing.assert_allclose(q["loc"][..., 0, 0], loc, rtol=1e-9)
    np.testing.assert_allclose(q["covariance"][..., 0, 0], 1 / weight + 0 * loc, rtol=1e-9)
    np.testing.assert_allclose(q["concentration"] / 2, a + 0 * loc, rtol=1e-9)
    np.testing.assert_allclose(q["rate_matrix"][..., 0, 0] / 2, b, rtol=1e-9)
    np.testing.assert_allclose(result.params["pi"]["concentration"], concentration, rtol=1e-9)
    np.testing.assert_allclose(result.state["z"]["onehot"], r, rtol=1e-8, atol=1e-12)
    assert (np.diff(result.losses) < 1e-9).all()
    draws = result.sample(jax.random.PRNGKey(1), (20_000,))
    log_p = jax.jit(jax.vmap(lambda v: log_density(model, (x,), {}, v)[0]))(draws)
    terms = np.asarray(log_p - result.log_density(draws))
    error = terms.std() / math.sqrt(len(terms))
    assert terms.mean() == pytest.approx(result.bound, abs=4 * error)


# --- blocks beside other factors -----------------------------------------------------------------


def scale_mixture():
    """Student-t noise: the block's precision times a weight of each datum."""
    tau = sample("tau", dist.Gamma(2.0, 1.5))
    w = sample("w", normal(0.0, 0.5 * tau).expand([2]).to_event(1))
    with numpyro.plate("data", 9):
        u = sample("u", dist.Gamma(2.0, 2.0))
        sample("y", normal(X @ w, tau * u), obs=Y1)


def ard():
    """Relevances of inputs, beside the block; the prior of w has both."""
    tau = sample("tau", dist.Gamma(2.0, 1.5))
    alpha = sample("alpha", dist.Gamma(1.0, 1.0).expand([2]).to_event(1))
    w = sample("w", normal(0.0, alpha * tau).to_event(1))
    with numpyro.plate("data", 9):
        sample("y", normal(X @ w, tau), obs=Y1)


def by_hand(model, sweeps):
    """w and tau jointly, then u or alpha, whose means are 1 at first."""
    of_data = model is scale_mixture
    u, alpha = np.ones(9), np.ones(2)
    for _ in range(sweeps):
        precision = np.diag(0.5 * alpha if of_data else alpha) + X.T @ (u[:, None] * X)
        loc = np.linalg.solve(precision, X.T @ (u * Y1))
        a, b = 2.0 + 9 / 2, 1.5 + 0.5 * (u @ Y1**2 - loc @ precision @ loc)
        inverse, tau = np.linalg.inv(precision), a / b
        if of_data:
            square = np.einsum("ni,ij,nj->n", X, inverse, X) + tau * (Y1 - X @ loc) ** 2
            rate = 2.0 + 0.5 * square
            u = 2.5 / rate
        else:
            rate = 1.0 + 0.5 * (np.diag(inverse) + tau * loc**2)
            alpha = 1.5 / rate
    return loc, inverse, a, b, rate


@slow
@pytest.mark.parametrize("model, other", [(scale_mixture, "u"), (ard, "alpha")])
def test_beside_another_precision(model, other):
    cavi, sweeps = CAVI(model, blocks=[("w", "tau")]), 60
    start = first_moments(cavi._draws, cavi.plan, jax.random.PRNGKey(0), 1)
    ones = jax.tree.map(jnp.ones_like, start[other])
    result = cavi.run(sweeps, tol=0, state={**start, other: {**ones, "log": 0 * ones["log"]}})
    loc, inverse, a, b, rate = by_hand(model, sweeps)
    q = result.params["w, tau"]
    np.testing.assert_allclose(q["loc"][:, 0], loc, rtol=1e-9)
    np.testing.assert_allclose(q["covariance"], inverse, rtol=1e-9, atol=1e-12)
    assert float(q["concentration"]) / 2 == pytest.approx(a)
    assert float(q["rate_matrix"][0, 0]) / 2 == pytest.approx(b)
    np.testing.assert_allclose(result.params[other]["rate"], rate, rtol=1e-9)
    assert (np.diff(result.losses) < 1e-10).all()
    draws = result.sample(jax.random.PRNGKey(1), (20_000,))
    log_p = jax.jit(jax.vmap(lambda v: log_density(model, (), {}, v)[0]))(draws)
    terms = np.asarray(log_p - result.log_density(draws))
    error = terms.std() / math.sqrt(len(terms))
    assert terms.mean() == pytest.approx(result.bound, abs=4 * error)

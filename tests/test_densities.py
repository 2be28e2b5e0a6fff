"""Log-densities as polynomials: at known values they are NumPyro's, whatever broadcasts."""

import numpy as np
import pytest
import scipy.stats as st

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

import numpyro.distributions as dist  # noqa: E402

from pyro_vi_ext.cavi.algebra import Algebra, broadcast, concrete  # noqa: E402
from pyro_vi_ext.cavi.densities import (  # noqa: E402
    DENSITIES,
    by_label,
    density_of,
    multigammaln_of,
)
from pyro_vi_ext.cavi.symbolic import (  # noqa: E402
    Atom,
    Expr,
    Known,
    Label,
    NotRepresentable,
    Term,
)
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True):
        yield


ALGEBRA = Algebra({"positive", "unit"}, {"unit"})
D = 3
RNG = np.random.default_rng(0)


def real(*shape):
    return RNG.normal(size=shape)


def positive(*shape):
    return RNG.gamma(2.0, size=shape) + 0.05


def unit(*shape):
    return RNG.uniform(0.02, 0.98, size=shape)


def simplex(*shape):
    return RNG.dirichlet(np.full(D, 1.5), size=shape)


def whole(high, *shape):
    return RNG.integers(0, high, size=shape)


def matrix(*shape):
    root = RNG.normal(size=(*shape, D, D))
    return root @ np.swapaxes(root, -1, -2) + np.eye(D)


def root(*shape):
    return np.linalg.cholesky(matrix(*shape))


def vector(*shape):
    return real(*shape, D)


def degrees(*shape):
    return positive(*shape) + D


def counts(*shape):
    return RNG.multinomial(5, np.full(D, 1 / 3), size=shape)


def mvn(parameter):
    return lambda loc, value: dist.MultivariateNormal(loc, **{parameter: value})


def wishart(parameter):
    return lambda nu, value: dist.Wishart(nu, **{parameter: value})


# name: distribution of two parameters, how they and a value are drawn, given the batch's shape.
CASES = {
    "Normal": (dist.Normal, real, positive, real),
    "LogNormal": (dist.LogNormal, real, positive, positive),
    "Gamma": (dist.Gamma, positive, positive, positive),
    "InverseGamma": (dist.InverseGamma, positive, positive, positive),
    "Exponential": (lambda a, b: dist.Exponential(a * b), positive, positive, positive),
    "Beta": (dist.Beta, positive, positive, unit),
    "Dirichlet": (
        lambda a, b: dist.Dirichlet(a[..., None] + b[..., None] * np.arange(D)),
        positive, positive, simplex,
    ),
    "BernoulliProbs": (lambda a, b: dist.Bernoulli(a * b), unit, unit, lambda *s: whole(2, *s)),
    "BernoulliLogits": (
        lambda a, b: dist.Bernoulli(logits=3 * a + b), real, real, lambda *s: whole(2, *s),
    ),
    "CategoricalProbs": (
        lambda a, b: dist.Categorical(0.5 * (a + b)), simplex, simplex, lambda *s: whole(D, *s),
    ),
    "CategoricalLogits": (
        lambda a, b: dist.Categorical(logits=5 * a + b), vector, vector, lambda *s: whole(D, *s),
    ),
    "BinomialProbs": (
        lambda n, p: dist.Binomial(n, p), lambda *s: whole(9, *s) + 6, unit,
        lambda *s: whole(7, *s),
    ),
    "MultinomialProbs": (
        lambda a, b: dist.Multinomial(5, 0.5 * (a + b)), simplex, simplex, counts,
    ),
    "Poisson": (lambda a, b: dist.Poisson(a * b), positive, positive, lambda *s: whole(9, *s)),
    "Unit": (lambda a, b: dist.Unit(a * b), real, real, lambda *s: np.zeros((*s, 0))),
    "MultivariateNormal": (mvn("precision_matrix"), vector, matrix, vector),
    "MultivariateNormal, covariance": (mvn("covariance_matrix"), vector, matrix, vector),
    "MultivariateNormal, scale_tril": (mvn("scale_tril"), vector, root, vector),
    "Wishart": (wishart("rate_matrix"), degrees, matrix, matrix),
    "Wishart, scale_matrix": (wishart("scale_matrix"), degrees, matrix, matrix),
    "Wishart, scale_tril": (wishart("scale_tril"), degrees, root, matrix),
}  # fmt: skip

# Shapes of the batch of both parameters and of the value.
SHAPES = [
    ((), (), ()),
    ((4,), (4,), (4,)),
    ((2, 1), (4,), (2, 4)),
    ((), (4,), (2, 4)),
    ((4,), (), (2, 4)),
    ((2, 4), (1,), (4,)),
    ((4,), (2, 1), ()),
]


def symbolic(fn, value):
    """The rule's log-density, as an array of known numbers."""
    found = density_of(fn)
    parameters = {name: Expr.of(x) for name, x in found.parameters(fn).items()}
    log_p = found.log_density(ALGEBRA, Expr.of(value), parameters)
    assert log_p.is_known()
    return concrete(log_p)


@pytest.mark.parametrize(
    "shapes",
    [pytest.param(s, marks=[pytest.mark.slow] if i > 2 else []) for i, s in enumerate(SHAPES)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_rule_at_known_values_is_numpyros(case, shapes):
    make, first, second, drawn = CASES[case]
    a, b, x = (draw(*shape) for draw, shape in zip((first, second, drawn), shapes, strict=True))
    fn = make(a, b)
    assert type(fn).__name__ == case.split(",")[0]
    # NumPyro's own Gaussian has no values of a smaller batch than its parameters.
    event = x.shape[len(shapes[2]) :]
    want = np.asarray(fn.log_prob(np.broadcast_to(x, (*np.broadcast_shapes(*shapes), *event))))
    got = symbolic(fn, x)
    assert got.shape == want.shape
    # NumPyro's binomial coefficient goes through JAX's betaln, which errs by 1e-6.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=2e-6 if "Binomial" in case else 1e-9)


def test_every_rule_is_tested_here():
    augmented = {"PolyaGamma", "ChineseRestaurantTable"}  # in test_augmentations
    assert {case.split(",")[0] for case in CASES} | augmented == set(DENSITIES)
    assert density_of(dist.Cauchy(0.0, 1.0)) is None


def test_a_shifted_density_is_noticed():
    """The comparison rejects an error of 1e-6."""
    fn, x = dist.Normal(0.3, 1.7), np.array([0.1, 2.0])
    want = np.asarray(fn.log_prob(x))
    np.testing.assert_allclose(symbolic(fn, x), want, rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(symbolic(fn, x + 1e-6), want, rtol=1e-9, atol=1e-9)


def test_normalizers_are_scipys():
    n, p = np.array([6, 9, 40]), np.array([0.2, 0.9, 0.4])
    x = np.array([2, 9, 8])
    got = symbolic(dist.Binomial(n, p), x)
    np.testing.assert_allclose(got, st.binom(n, p).logpmf(x), rtol=1e-12)
    a = np.array([2.5, 7.0])
    from scipy.special import multigammaln

    for dim in (1, 2, 3):
        want = [multigammaln(v, dim) for v in a]
        np.testing.assert_allclose(multigammaln_of(a, dim), want, rtol=1e-13)


@pytest.mark.parametrize(
    "fn, possible, impossible",
    [
        (dist.Bernoulli(np.array([0.0, 1.0])), [0, 1], [1, 0]),
        (dist.Binomial(3, np.array([0.0, 1.0])), [0, 3], [1, 2]),
    ],
    ids=["Bernoulli", "Binomial"],
)
def test_known_probabilities_of_zero_and_one_are_kept_inside_as_numpyro_does(
    fn, possible, impossible
):
    for value in (possible, impossible):
        got, want = symbolic(fn, np.array(value)), np.asarray(fn.log_prob(np.array(value)))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-5)
    np.testing.assert_allclose(symbolic(fn, np.array(possible)), 0.0, atol=1e-12)
    assert (symbolic(fn, np.array(impossible)) < -30).all()


@pytest.mark.parametrize(
    "fn",
    [
        dist.Categorical(np.array([0.0, 0.25, 0.75])),
        dist.Categorical(logits=np.array([-np.inf, 0.0, np.log(3.0)]), validate_args=False),
    ],
    ids=["probs", "logits"],
)
def test_a_category_of_known_probability_zero_is_finite_and_never_chosen(fn):
    """-inf would make nan of an indicator that is 0: so e to it is the smallest number."""
    got = symbolic(fn, np.arange(3))
    np.testing.assert_allclose(got[1:], np.log([0.25, 0.75]), rtol=1e-12)
    assert np.isfinite(got[0]) and np.exp(got[0]) < 1e-300


def test_multinomial_without_draws_of_an_impossible_category():
    fn, x = dist.Multinomial(3, np.array([0.0, 0.25, 0.75])), np.array([0, 1, 2])
    want = st.multinomial(3, [0.0, 0.25, 0.75]).logpmf(x)
    np.testing.assert_allclose(symbolic(fn, x), want, rtol=1e-12)


# --- latents -------------------------------------------------------------------------------------


def latent(site, *shape):
    labels = tuple(Label(size) for size in shape)
    return Expr(labels, (Term(1.0, (), (Atom(site, ("pow", 1), labels),)),))


def table(values):
    """values[z] of a discrete latent z of shape (4,)."""
    n, k = Label(4), Label(len(values))
    return Expr((n,), (Term(1.0, (Known(values, (k,)),), (Atom("z", ("onehot",), (n, k)),)),))


def value_of(expr, values):
    """A symbolic scalar or array at values of its sites: one einsum for each term."""
    functions = {
        "pow": lambda x, p: x**p, "log": np.log, "log1m": lambda x: np.log1p(-x),
        "logdet": lambda x: np.linalg.slogdet(x)[1], "onehot": lambda z: np.eye(D)[z],
    }  # fmt: skip
    total = np.zeros(expr.shape)
    for term in expr.terms:
        names, operands = {}, []

        def name(label, names=names):
            return names.setdefault(label, len(names))

        for known in term.knowns:
            operands += [known.array, [name(label) for label in known.labels]]
        for atom in term.atoms:
            kind, *rest = atom.stat
            operands += [functions[kind](values[atom.site], *rest), list(map(name, atom.labels()))]
        for label in (*term.counted, *expr.labels):
            operands += [np.ones(label.size), [name(label)]]
        outputs = [name(label) for label in expr.labels]
        total = total + term.coefficient * (np.einsum(*operands, outputs) if operands else 1.0)
    return total


POINT = {"x": real(4), "positive": positive(4), "unit": unit(4), "z": whole(D, 4)}
TABLE = positive(D)
LATENT = {
    "Normal of a latent, precision a latent": (
        {"loc": latent("x", 4), "scale": ALGEBRA.power(latent("positive", 4), -0.5)},
        lambda p: dist.Normal(p["x"], p["positive"] ** -0.5), real(4),
    ),
    "Gamma with a latent rate": (
        {"concentration": Expr.of(np.array(2.5)), "rate": latent("positive", 4)},
        lambda p: dist.Gamma(2.5, p["positive"]), positive(4),
    ),
    "Gamma, concentration by label": (
        {"concentration": table(TABLE), "rate": latent("positive", 4)},
        lambda p: dist.Gamma(TABLE[p["z"]], p["positive"]), positive(4),
    ),
    "InverseGamma, concentration by label": (
        {"concentration": table(TABLE), "rate": latent("positive", 4)},
        lambda p: dist.InverseGamma(TABLE[p["z"]], p["positive"]), positive(4),
    ),
    "Exponential with a latent rate": (
        {"rate": latent("positive", 4)}, lambda p: dist.Exponential(p["positive"]), positive(4),
    ),
    "BernoulliProbs of a latent": (
        {"probs": latent("unit", 4)}, lambda p: dist.Bernoulli(p["unit"]), whole(2, 4),
    ),
    "BernoulliProbs by label": (
        {"probs": table(np.array([0.0, 0.3, 1.0]))},
        lambda p: dist.Bernoulli(np.array([0.0, 0.3, 1.0])[p["z"]]), whole(2, 4),
    ),
    "BernoulliLogits by label": (
        {"logits": table(np.array([-2.0, 0.3, 4.0]))},
        lambda p: dist.Bernoulli(logits=np.array([-2.0, 0.3, 4.0])[p["z"]]), whole(2, 4),
    ),
    "BinomialProbs of a latent": (
        {"probs": latent("unit", 4), "total_count": Expr.of(np.array(7))},
        lambda p: dist.Binomial(7, p["unit"]), whole(8, 4),
    ),
    "Poisson with a latent rate": (
        {"rate": latent("positive", 4)}, lambda p: dist.Poisson(p["positive"]), whole(9, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATENT)
def test_rule_of_latents_at_their_values_is_numpyros(case):
    parameters, make, x = LATENT[case]
    fn = make(POINT)
    log_p = density_of(fn).log_density(ALGEBRA, Expr.of(x), parameters)
    assert not log_p.is_known()
    want = np.asarray(fn.log_prob(x))
    tolerance = 2e-6 if "Binomial" in case else 1e-9  # of JAX's betaln
    np.testing.assert_allclose(value_of(log_p, POINT), want, rtol=1e-9, atol=tolerance)
    np.testing.assert_allclose(value_of(log_p.sum([0]), POINT), want.sum(), rtol=1e-6)


def test_what_has_no_closed_form_says_so():
    positive, unit = latent("positive", 4), latent("unit", 4)
    x = Expr.of(np.ones(4))
    wide = broadcast(positive, (2, 4))
    refused = [
        ("Gamma", {"concentration": positive, "rate": x}, "log-gamma function of a concentration"),
        ("Beta", {"concentration1": positive, "concentration0": x}, "only a known number"),
        ("Dirichlet", {"concentration": wide}, "only a known number"),
        ("CategoricalLogits", {"logits": wide}, "only a known number"),
        ("BernoulliLogits", {"logits": positive}, "logits"),
        ("BinomialProbs", {"probs": unit, "total_count": positive}, "only a known number"),
        ("Poisson", {"rate": positive + unit}, "a logarithm"),
        ("Normal", {"loc": x, "scale": positive + unit}, "power -2"),
    ]
    for kind, parameters, reason in refused:
        with pytest.raises(NotRepresentable, match=reason):
            DENSITIES[kind].log_density(ALGEBRA, x, parameters)
    with pytest.raises(NotRepresentable, match="a determinant"):
        matrix = latent("positive", 2, 2) + Expr.of(np.eye(2))
        parameters = {"loc": Expr.of(np.zeros(2)), "precision_matrix": matrix}
        DENSITIES["MultivariateNormal"].log_density(ALGEBRA, Expr.of(np.ones(2)), parameters)
    with pytest.raises(NotRepresentable, match="a wave"):
        by_label(ALGEBRA, np.sin, positive, "a wave")


def test_parameters_that_a_distribution_was_given_are_preferred():
    """Others are computed from them, by a Cholesky factor for one."""
    rule = DENSITIES["MultivariateNormal"]
    for name in ("precision_matrix", "covariance_matrix", "scale_tril"):
        fn = dist.MultivariateNormal(np.zeros(2), **{name: np.eye(2)})
        assert set(rule.parameters(fn)) == {"loc", name}

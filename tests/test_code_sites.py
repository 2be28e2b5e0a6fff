"""Code sites: distributions over codes by hand, exact evidence by enumeration, and what objectives
other than VQELBO make of them."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch.distributions.utils import logits_to_probs

from pyro_vi_ext import (
    VQELBO,
    ImportanceWeightedELBO,
    SemiImplicitELBO,
    TraceLAX_ELBO,
    TraceScore_ELBO,
    TraceSTL_ELBO,
    elbo_terms,
    from_pyro_svi,
    log_evidence,
)
from pyro_vi_ext.code_sites import Quantizer, code_event_dims, code_site, codes_of
from pyro_vi_ext.guides import CodePrior, VectorQuantized, VectorQuantizer

from .exporting import export, stats

pytestmark = pytest.mark.usefixtures("float64")

K, D = 5, 2


class Counted(VectorQuantizer):
    """Counts the searches for codes."""

    searches = 0

    def encode(self, z_e):
        self.searches += 1
        return super().encode(z_e)


class Grid(Quantizer):
    """Two indices in {0, 1, 2} for each latent, which are its coordinates."""

    num_codes, code_dim, code_shape = 3, 2, (2,)

    def encode(self, z_e):
        return z_e.round().clamp(0, 2).long()

    def decode(self, indices):
        return indices.to(torch.get_default_dtype())

    def quantize(self, z_e):
        indices = self.encode(z_e)
        return self.decode(indices) + z_e - z_e.detach(), indices


def quantizer(codes=None, cls=VectorQuantizer, **options):
    codes = torch.randn(K, D) if codes is None else codes
    result = cls(*codes.shape, **options)
    with torch.no_grad():
        result.codebook.copy_(codes)
    return result


def distance_to(value, codes):
    return (value.unsqueeze(-2) - codes).square().sum(-1)


# --- the guide's distribution --------------------------------------------------------------------


def test_value_gradient_and_log_prob():
    own, z_e = quantizer(), torch.randn(3, 4, D, requires_grad=True)
    q = VectorQuantized(z_e, own)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((3, 4), (D,), True)
    nearest = distance_to(z_e, own.codebook).argmin(-1)
    z = q.rsample()
    assert z.equal(own.codebook[nearest]) and q.indices.equal(nearest)
    assert torch.autograd.grad(z.sum(), z_e)[0].equal(torch.ones_like(z_e))
    assert q.mean.equal(z) and not q.variance.any() and q.variance.shape == z.shape
    assert q.log_prob(z).equal(torch.zeros(3, 4)) and not q.log_prob(z).requires_grad
    assert q.entropy().equal(torch.zeros(3, 4))
    assert not q.expand([2, 3, 4]).sample().requires_grad
    assert not q.sample().requires_grad and q.sample().equal(z)


@pytest.mark.parametrize("sample_shape", [(), (7,), (2, 1)])
def test_sample_shapes(sample_shape):
    own, z_e = quantizer(), torch.randn(4, D, requires_grad=True)
    q = VectorQuantized(z_e, own)
    for z in (q.rsample(sample_shape), q.sample(sample_shape)):
        assert z.shape == (*sample_shape, 4, D) and (z == q.z_q).all()
        assert q.log_prob(z).shape == (*sample_shape, 4)
        assert codes_of(z, own).shape == (*sample_shape, 4)
    num = math.prod(sample_shape)
    (found,) = torch.autograd.grad(q.rsample(sample_shape).sum(), z_e)
    assert found.equal(torch.full_like(z_e, num))


def test_the_search_is_made_once():
    own = quantizer(cls=Counted)
    q = VectorQuantized(torch.randn(4, 1, D), own)
    assert own.searches == 1
    q = q.expand([3, 4, 6]).mask(torch.rand(3, 4, 6) < 0.5).to_event(1).expand_by([2])
    z = q.rsample((5,))
    assert z.shape == (5, 2, 3, 4, 6, D)
    q.log_prob(z), CodePrior(own).log_prob(z), codes_of(z, own)
    CodePrior(own, torch.randn(K)).expand([4, 6]).to_event(2).log_prob(z)
    assert own.searches == 1


def test_expand_to_event_and_mask():
    own, z_e = quantizer(), torch.randn(4, 1, D)
    q = VectorQuantized(z_e, own).expand([3, 4, 6])
    assert q.batch_shape == (3, 4, 6) and q.rsample().shape == (3, 4, 6, D)
    assert q.rsample().equal(VectorQuantized(z_e, own).rsample().expand(3, 4, 6, D))
    assert (q.z_q.shape, q.indices.shape) == ((4, 1, D), (4, 1))  # not expanded
    assert q.mean.shape == q.variance.shape == (3, 4, 6, D) and q.entropy().shape == (3, 4, 6)
    event = q.to_event(2)
    assert (event.batch_shape, event.event_shape) == ((3,), (4, 6, D))
    assert event.log_prob(event.sample()).equal(torch.zeros(3))
    masked = event.mask(torch.tensor([True, False, True]))
    assert masked.log_prob(masked.sample()).equal(torch.zeros(3))
    assert code_site(masked) is code_site(q) or code_site(masked).z_q is q.z_q
    assert code_event_dims(masked) == 2 and code_event_dims(q) == 0
    assert code_site(dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False)) is None


def test_log_prob_broadcasts_against_values():
    own = quantizer()
    q = VectorQuantized(torch.randn(4, 1, D), own)
    assert q.log_prob(torch.randn(7, 1, 3, D)).shape == (7, 4, 3)
    assert CodePrior(own).expand([4, 1]).log_prob(torch.randn(7, 1, 3, D)).shape == (7, 4, 3)
    logits = torch.randn(4, 1, K)
    assert CodePrior(own, logits).log_prob(torch.randn(7, 1, 3, D)).shape == (7, 4, 3)


@pytest.mark.parametrize("cls", [VectorQuantized, lambda z, own: CodePrior(own).log_prob(z)])
def test_vectors_of_another_length_are_refused(cls):
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\).*VectorQuantizer, found shape \(3, 4\)"):
        cls(torch.zeros(3, 4), quantizer())


# --- the prior -----------------------------------------------------------------------------------


def test_uniform_prior():
    own = quantizer()
    p = CodePrior(own).expand([3, 4])
    value = torch.randn(3, 4, D, requires_grad=True)
    found = p.log_prob(value)
    torch.testing.assert_close(found, torch.full((3, 4), -math.log(K)))
    assert not found.requires_grad and p.to_event(1).log_prob(value).shape == (3,)
    assert own.log_num_codes == pytest.approx(math.log(K))


@pytest.mark.parametrize("batch", [(), (4,), (3, 1), (3, 4)])
def test_prior_with_logits(batch):
    own, logits = quantizer(), torch.randn(*batch, K, requires_grad=True)
    p = CodePrior(own, logits)
    assert (p.batch_shape, p.event_shape) == (batch, (D,))
    p = p.expand([3, 4])
    value = torch.randn(3, 4, D, requires_grad=True)
    nearest = distance_to(value, own.codebook).argmin(-1)
    found = p.log_prob(value)
    expected = logits.log_softmax(-1).expand(3, 4, K).gather(-1, nearest.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(found, expected)
    leaves = [logits, value, own.codebook]
    g = torch.randn(3, 4)
    to_logits, *rest = torch.autograd.grad((g * found).sum(), leaves, allow_unused=True)
    torch.testing.assert_close(to_logits, torch.autograd.grad((g * expected).sum(), logits)[0])
    assert rest == [None, None]
    at_codes = CodePrior(own, logits).expand([3, 4]).log_prob(own.codebook.reshape(K, 1, 1, D))
    torch.testing.assert_close(at_codes.logsumexp(0), torch.zeros(3, 4))


def test_prior_of_several_indices():
    """Independent: the sum of the log-probabilities of each index."""
    own, logits = Grid(), torch.randn(4, 2, 3, requires_grad=True)
    assert own.log_num_codes == pytest.approx(2 * math.log(3))
    p = CodePrior(own, logits)
    assert p.batch_shape == (4,)
    value = torch.tensor([[0.0, 2.0], [1.1, 1.8], [-3.0, 7.0], [2.0, 0.0]])
    log_probs, expected = logits.log_softmax(-1), []
    for i, pair in enumerate([(0, 2), (1, 2), (0, 2), (2, 0)]):
        expected.append(sum(log_probs[i, j, k] for j, k in enumerate(pair)))
    torch.testing.assert_close(p.log_prob(value), torch.stack(expected))
    assert p.log_prob(value.expand(6, 4, 2)).shape == (6, 4)
    support = p.enumerate_support(expand=False)
    assert support.shape == (9, 1, 2) and len(support.unique(dim=0)) == 9
    torch.testing.assert_close(p.log_prob(support).logsumexp(0), torch.zeros(4))
    drawn = p.sample((7,))
    assert drawn.shape == (7, 4, 2) and codes_of(drawn, own).shape == (7, 4, 2)
    torch.testing.assert_close(CodePrior(own).log_prob(value), torch.full((4,), -2 * math.log(3)))


@pytest.mark.parametrize("tail", [(K + 1,), (1,), (K, 1), ()])
def test_logits_of_another_shape_are_refused(tail):
    with pytest.raises(ValueError, match=rf"shape \(\.\.\., {K}\)"):
        CodePrior(quantizer(), torch.zeros(tail))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2, 3\)"):
        CodePrior(Grid(), torch.zeros(3))


@pytest.mark.parametrize("uniform", [True, False])
def test_draws_have_the_frequencies_of_the_prior(uniform):
    own, logits, num = quantizer(), torch.randn(3, K), 100_000
    p = CodePrior(own).expand([3]) if uniform else CodePrior(own, logits)
    value = p.sample((num,))
    assert value.shape == (num, 3, D) and not value.requires_grad
    indices = codes_of(value, own)
    assert value.equal(own.codebook[indices])
    found = torch.nn.functional.one_hot(indices, K).double().mean(0)
    probs = torch.full((3, K), 1 / K) if uniform else logits_to_probs(logits)
    assert ((found - probs).abs() <= 4 * (probs * (1 - probs) / num).sqrt()).all()
    shifted = probs.roll(1, -1)
    assert uniform or ((found - shifted).abs() > 4 * (shifted * (1 - shifted) / num).sqrt()).any()
    grid = CodePrior(own).expand([2, 3]).to_event(2).sample((4,))
    assert grid.shape == (4, 2, 3, D)


@pytest.mark.parametrize("expand", [True, False])
def test_support(expand):
    own = quantizer()
    p = CodePrior(own).expand([3, 4])
    codes = p.enumerate_support(expand)
    assert codes.shape == ((K, 3, 4, D) if expand else (K, 1, 1, D))
    assert (codes == own.codebook.reshape(K, 1, 1, D)).all() and not codes.requires_grad
    for fn in (p, VectorQuantized(torch.randn(2, D), own)):
        assert fn.support.is_discrete and fn.support.event_dim == 1
        assert fn.support.check(torch.tensor([[1.0, 2.0], [math.nan, 0.0]])).tolist() == [1, 0]


# --- which code a value is -----------------------------------------------------------------------


def test_a_draw_keeps_its_indices():
    """Though the codebook moves before it is scored, as between two passes of an objective."""
    own, logits = quantizer(cls=Counted), torch.randn(K)
    drawn = CodePrior(own).sample((20,))
    quantized = VectorQuantized(torch.randn(20, D), own).rsample()
    before = [codes_of(z, own) for z in (drawn, quantized)]
    with torch.no_grad():
        own.codebook.copy_(own.codebook.flip(0))
    own.searches = 0
    for z, indices in zip((drawn, quantized), before, strict=True):
        assert codes_of(z, own).equal(indices)
        assert CodePrior(own, logits).log_prob(z).equal(logits.log_softmax(0)[indices])
    assert own.searches == 0
    assert codes_of(drawn.clone(), own).equal(K - 1 - before[0])  # a tensor that was not drawn


def test_indices_of_another_quantizer_are_not_used():
    own = quantizer()
    other = quantizer(own.codebook.detach().flip(0))
    z = CodePrior(own).sample((20,))
    assert codes_of(z, other).equal(K - 1 - codes_of(z, own))


def test_of_equal_codes_each_has_its_own_probability():
    """As drawn; and any other value is the first of them."""
    codes = torch.randn(3, D)[[0, 1, 0, 2, 0]]
    own, logits = quantizer(codes), torch.randn(K)
    p = CodePrior(own, logits)
    drawn = p.sample((500,))
    indices = codes_of(drawn, own)
    assert len(indices.unique()) == K
    assert p.log_prob(drawn).equal(logits.log_softmax(0)[indices])
    first = torch.tensor([0, 1, 0, 3, 0])
    assert codes_of(drawn.clone(), own).equal(first[indices])
    assert VectorQuantized(codes, own).indices.equal(first)


# --- exact evidence ------------------------------------------------------------------------------


def data(n=6):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(9))


def log_mixture(x, codes, log_pi):
    """log p(x_i), shape (N,): the sum over codes."""
    log_likelihood = dist.Normal(codes, 1.3).to_event(1).log_prob(x.unsqueeze(-2))
    return (log_likelihood + log_pi).logsumexp(-1)


def pair(own, logits=None, enumerated=None):
    """x_i ~ N(z_i, 1.3), z_i one of the codes; the guide quantises W x_i."""
    infer = {"enumerate": enumerated} if enumerated else {}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(own, logits), infer=infer)
            pyro.sample("x", dist.Normal(z, 1.3).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", lambda: torch.tensor([[0.9, 0.3], [-0.2, 1.4]]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", VectorQuantized(x @ weight, own))

    return model, guide


def by_hand(own, x, logits=None):
    """The bound of the pair: log p(x, z) at the codes of W x, summed; and the codes."""
    log_pi = torch.full((K,), -math.log(K)) if logits is None else logits.log_softmax(0)
    indices = distance_to(x @ torch.tensor([[0.9, 0.3], [-0.2, 1.4]]), own.codebook).argmin(-1)
    fit = dist.Normal(own.codebook[indices], 1.3).to_event(1).log_prob(x)
    return (fit + log_pi[indices]).sum().item(), indices


@pytest.mark.parametrize("with_logits", [False, True])
def test_exact_evidence_by_enumeration(with_logits):
    own, x = quantizer(), data()
    logits = torch.randn(K, requires_grad=True) if with_logits else None
    log_pi = logits.log_softmax(0) if with_logits else torch.full((K,), -math.log(K))
    model, _ = pair(own, logits, "parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    exact = log_mixture(x, own.codebook.detach(), log_pi).sum()
    assert -elbo.loss(model, lambda x: None, x) == pytest.approx(exact.item())
    if with_logits:
        loss = elbo.differentiable_loss(model, lambda x: None, x)
        found, expected = (torch.autograd.grad(v, logits)[0] for v in (-loss, exact))
        torch.testing.assert_close(found, expected)


def test_exact_evidence_of_two_codes_of_a_datum():
    """A chain of two code sites in a plate: K^2 terms."""
    own, x, first, second = quantizer(), data(), torch.randn(K), torch.randn(K)

    @poutine.infer_config(config_fn=lambda site: {"enumerate": "parallel"})
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", CodePrior(own, first))
            b = pyro.sample("b", CodePrior(own, second))
            pyro.sample("x", dist.Normal(a + 2 * b, 1.3).to_event(1), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    codes = own.codebook.detach()
    sums = (codes.unsqueeze(1) + 2 * codes).reshape(-1, D)
    log_pi = (first.log_softmax(0).unsqueeze(1) + second.log_softmax(0)).reshape(-1)
    assert -loss == pytest.approx(log_mixture(x, sums, log_pi).sum().item())


def test_equal_codes_with_logits_are_not_enumerated():
    """A value of the support is scored by search, so equal codes would have one's logit."""
    codes, x, logits = torch.randn(K, D)[[0, 1, 2, 3, 1]], data(), torch.randn(K)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    own = quantizer(codes)
    with pytest.raises(NotImplementedError, match="codes of the VectorQuantizer are equal"):
        elbo.loss(pair(own, logits, "parallel")[0], lambda x: None, x)
    loss = elbo.loss(pair(own, None, "parallel")[0], lambda x: None, x)
    exact = log_mixture(x, codes, torch.full((K,), -math.log(K))).sum().item()
    assert -loss == pytest.approx(exact)


def test_the_way_out_that_the_error_names():
    codes, x, logits = torch.randn(K, D)[[0, 1, 2, 3, 1]], data(), torch.randn(K)
    own = quantizer(codes)

    def model(x):
        with pyro.plate("data", len(x)):
            fn = dist.Categorical(logits=logits)
            z = own.decode(pyro.sample("k", fn, infer={"enumerate": "parallel"}))
            pyro.sample("x", dist.Normal(z, 1.3).to_event(1), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    assert -loss == pytest.approx(log_mixture(x, codes, logits.log_softmax(0)).sum().item())


# --- objectives ----------------------------------------------------------------------------------

OBJECTIVES = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "Trace_ELBO, vectorised": lambda: Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=True),
    "STL": lambda: TraceSTL_ELBO(num_particles=2),
    "VQELBO's bound": lambda: VQELBO(0.0),
    "score": lambda: TraceScore_ELBO(2),
    "score of all sites": lambda: TraceScore_ELBO(2, score_sites="all"),
    "LAX": lambda: TraceLAX_ELBO(num_particles=2),
    **{
        f"IW {gradient}, {'vectorised' if vectorized else 'sequential'}": (
            lambda gradient=gradient, vectorized=vectorized: ImportanceWeightedELBO(
                num_particles=4, gradient=gradient, vectorize_particles=vectorized
            )
        )
        for gradient in ("pathwise", "stl", "dreg")
        for vectorized in (True, False)
    },
}


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_bound_by_hand(name, with_logits):
    own, x = quantizer(ema_decay=0.9), data()
    own.eval()
    logits = torch.randn(K) if with_logits else None
    model, guide = pair(own, logits)
    bound, _ = by_hand(own, x, logits)
    assert -OBJECTIVES[name]().loss(model, guide, x) == pytest.approx(bound)
    enumerated, _ = pair(own, logits, "parallel")
    assert bound < -TraceEnum_ELBO(max_plate_nesting=1).loss(enumerated, lambda x: None, x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_straight_through_gradient(name):
    """That of log p(x, z) at the code, taken as if it were W x. All particles are the same."""
    own, x = quantizer(ema_decay=0.9).eval(), data()
    model, guide = pair(own)
    loss = OBJECTIVES[name]().differentiable_loss(model, guide, x)
    (found,) = torch.autograd.grad(loss, pyro.param("weight"))
    _, indices = by_hand(own, x)
    expected = x.t() @ ((own.codebook[indices] - x) / 1.3**2)
    torch.testing.assert_close(found, expected)


def test_readings_of_the_bound():
    own, x, logits = quantizer(), data(), torch.randn(K)
    model, guide = pair(own, logits)
    bound, indices = by_hand(own, x, logits)
    terms = elbo_terms(model, guide, x, num_particles=3)
    assert terms.elbo.value == pytest.approx(bound)
    kl = -logits.log_softmax(0)[indices].sum().item()
    assert terms.kl["z"].value == pytest.approx(kl)
    assert terms.reconstruction["x"].value == pytest.approx(bound + kl)
    assert terms.entropy.value == 0 and terms.elbo.standard_error == pytest.approx(0, abs=1e-12)
    with pytest.warns(UserWarning, match="all its mass at site 'z' on one code"):
        assert float(log_evidence(model, guide, x, num_particles=30)) == pytest.approx(bound)
    data_of_fit = export(model, guide, x, num_draws=4)
    assert (stats(data_of_fit, "log_weight") - bound).abs().max() < 1e-10
    assert data_of_fit["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_1")
    z = torch.as_tensor(data_of_fit["posterior"]["z"].values[0])
    assert (z == own.codebook[indices]).all()


def test_evidence_by_draws_from_the_prior():
    """Codes of the model's own, without a guide: the exact evidence."""
    own, x, logits = quantizer(), data(), torch.randn(K)
    found = log_evidence(pair(own, logits)[0], None, x, num_particles=20_000, chunk_size=1000)
    exact = log_mixture(x, own.codebook.detach(), logits.log_softmax(0))
    assert ((found.log_evidence - exact).abs() < 4 * found.standard_error).all()
    assert not ((found.log_evidence - exact - 0.1).abs() < 4 * found.standard_error).all()


def test_codes_cannot_be_annealed():
    with pytest.raises(NotImplementedError, match="'z'.*discrete"):
        log_evidence(pair(quantizer())[0], None, data(), method="ais", num_temperatures=2)


@pytest.mark.parametrize("objective", [VQELBO(), ImportanceWeightedELBO(num_particles=2)])
@pytest.mark.parametrize(
    "fn",
    [
        lambda own, x: dist.Normal(x, 1.0).to_event(1),
        lambda own, x: dist.Delta(x, event_dim=1),
        lambda own, x: VectorQuantized(x, quantizer()),
    ],
    ids=["Normal", "Delta", "another quantizer"],
)
def test_another_posterior_than_of_the_codes_is_refused(fn, objective):
    own, x = quantizer(), data()
    model, _ = pair(own)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", fn(own, x))

    with pytest.raises(ValueError, match="Site 'z' is a .* in the guide and a CodePrior"):
        objective.loss(model, guide, x)


def test_a_density_of_the_model_beside_codes_is_refused():
    own = quantizer()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.3).to_event(1), obs=x)

    with pytest.raises(
        ValueError, match="'z' is a VectorQuantized .* in the guide and a Ind.*one q"
    ):
        VQELBO().loss(model, pair(own)[1], data())


@pytest.mark.parametrize("auto", [AutoNormal, AutoDelta, AutoMultivariateNormal])
def test_autoguides_take_no_codes(auto):
    model, _ = pair(quantizer())
    with pytest.raises(ValueError, match="discrete sample site 'z'"):
        SVI(model, auto(model), pyro.optim.Adam({}), Trace_ELBO()).step(data())


# --- roles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["lower", "upper"])
@pytest.mark.parametrize("through", [False, True], ids=["noise", "noise that others use too"])
def test_the_code_of_noise_is_refused(bound, through):
    """Its probability is an integral over the noise; log_prob = 0 would be no bound of anything."""
    own = quantizer()

    def model(x):
        pyro.sample("z", CodePrior(own))
        if through:
            pyro.sample("s", dist.Normal(0.0, 1.0))

    def guide(x):
        noise = dist.Normal(torch.zeros(D), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer={"is_auxiliary": True})
        pyro.sample("z", VectorQuantized(psi, own))
        if through:
            pyro.sample("s", dist.Normal(psi.sum(-1), 1.0))

    objective = SemiImplicitELBO(num_mixing_particles=3, bound=bound)
    for loss in (objective, VQELBO()):
        with pytest.raises(ValueError, match="Guide site 'z' is the code of .* site 'psi'"):
            loss.loss(model, guide, data())


def test_codes_beside_a_mixing_variable_are_point_masses():
    """Of given codes, the bound is that of the semi-implicit rest."""
    own = quantizer().eval()

    def model(x, code):
        with pyro.plate("data", len(x)):
            z = x if code is None else pyro.sample("z", CodePrior(own))
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + s.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x, code):
        with pyro.plate("data", len(x)):
            psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("s", dist.Normal(psi, 0.5))
            if code is not None:
                pyro.sample("z", VectorQuantized(x, own))

    x = own.decode(torch.tensor([0, 1, 1, 2])).detach()  # codes: z is x
    objective = SemiImplicitELBO(num_particles=5, num_mixing_particles=3)
    losses = []
    for code in (None, True):
        torch.manual_seed(1)
        losses.append(objective.loss(model, guide, x, code))
    assert losses[1] - losses[0] == pytest.approx(len(x) * math.log(own.num_codes))


def test_draws_are_saved_without_their_quantizer(tmp_path):
    own = quantizer()
    value = VectorQuantized(data(), own).sample()
    torch.save(value, tmp_path / "draws.pt")
    saved = torch.load(tmp_path / "draws.pt")
    assert torch.equal(saved, value) and not vars(saved)
    assert torch.equal(codes_of(saved, own), codes_of(value, own))
    assert codes_of(value, own) is codes_of(value, own)  # those of the draw


def test_export_of_a_subsampled_guide_has_the_codes_of_all_data():
    own, x = quantizer().eval(), data()

    def plate():
        return pyro.plate("data", len(x), subsample_size=2)

    def model(x):
        with plate() as index:
            z = pyro.sample("z", CodePrior(own))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index])

    def guide(x):
        with plate() as index:
            pyro.sample("z", VectorQuantized(x[index], own))

    exported = from_pyro_svi(model, guide, x, num_draws=3)
    expected = own.decode(own.encode(x)).detach()
    for draw in exported.posterior["z"].values[0]:
        torch.testing.assert_close(torch.tensor(draw), expected)


def test_values_that_were_written_to_have_new_codes():
    own, logits = quantizer(), torch.randn(K)
    value = VectorQuantized(data(), own).sample()
    indices = codes_of(value, own)
    other = (indices + 1) % K
    with torch.no_grad():
        value.copy_(own.decode(other))
    assert torch.equal(codes_of(value, own), other)
    torch.testing.assert_close(CodePrior(own, logits).log_prob(value), logits.log_softmax(0)[other])


def test_pyro_modules_of_quantizers():
    own = PyroModule[VectorQuantizer](4, 2)
    assert isinstance(own, VectorQuantizer)
    assert VectorQuantized(torch.randn(3, 2), own).sample().shape == (3, 2)


def test_what_is_no_quantizer_is_refused():
    for make in (
        lambda: VectorQuantized(torch.randn(3, 2), None),
        lambda: CodePrior(torch.randn(4, 2)),
    ):
        with pytest.raises(ValueError, match="quantizer must be a quantizer"):
            make()
    with pytest.raises(ValueError, match="found a list"):
        VectorQuantized([[1.0, 2.0]], quantizer())

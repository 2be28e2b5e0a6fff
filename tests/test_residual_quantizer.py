"""Residual quantisation: indices and codes, gradients by hand, exact prior and evidence."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate

from pyro_vi_ext import VQELBO, elbo_terms
from pyro_vi_ext.code_sites import codes_of
from pyro_vi_ext.guides import CodePrior, ResidualQuantizer, VectorQuantized, VectorQuantizer
from pyro_vi_ext.guides.rotation_trick import rotate

pytestmark = pytest.mark.usefixtures("float64")

L, K, D = 3, 4, 2
COMBINATIONS = torch.tensor(list(itertools.product(range(K), repeat=L)))


def make(**options):
    """Codebooks of comparable size, so that greedy search of a sum often fails."""
    quantizer = ResidualQuantizer(L, K, D, **options)
    with torch.no_grad():
        for stage in quantizer.stages:
            stage.codebook.copy_(torch.randn(K, D))
    return quantizer


def by_hand(z_e, codebook):
    """Residuals (N, L, D), indices (N, L) and chosen codes (N, L, D), one vector at a time."""
    residuals, indices, codes = [], [], []
    for z in z_e.detach():
        for codes_l in codebook.detach():
            k = int((z - codes_l).square().sum(-1).argmin())
            residuals.append(z), indices.append(k), codes.append(codes_l[k])
            z = z - codes_l[k]
    shape = (len(z_e), len(codebook))
    return (
        torch.stack(residuals).reshape(*shape, -1),
        torch.tensor(indices).reshape(shape),
        torch.stack(codes).reshape(*shape, -1),
    )


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same_state(quantizer, before):
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- indices and codes ---------------------------------------------------------------------------


def test_indices_and_codes_are_those_of_a_search_one_by_one():
    quantizer, z_e = make(), 2 * torch.randn(5, 8, D)
    _, indices, codes = by_hand(z_e.flatten(0, 1), quantizer.codebook)
    value, found = quantizer.quantize(z_e)
    assert torch.equal(found, indices.reshape(5, 8, L))
    assert torch.equal(value, codes.sum(1).reshape(5, 8, D))
    assert torch.equal(value, quantizer.decode(found))
    assert quantizer.code_shape == (L,) and quantizer.codebook.shape == (L, K, D)
    assert quantizer.log_num_codes == pytest.approx(math.log(K**L))


def test_every_combination_of_indices_is_found_from_its_sum():
    quantizer = make()
    values = quantizer.decode(COMBINATIONS).detach()
    greedy = quantizer.encode(values)
    assert 0.2 < (greedy == COMBINATIONS).all(-1).double().mean() < 0.9  # encode would not do
    assert torch.equal(quantizer.indices_of(values), COMBINATIONS)
    rounded = 3.0 + (values - 3.0)  # not the same bits
    assert not torch.equal(rounded, values)
    assert torch.equal(quantizer.indices_of(rounded), COMBINATIONS)
    grid = values.reshape(2, 8, 4, D)
    assert torch.equal(quantizer.indices_of(grid), COMBINATIONS.reshape(2, 8, 4, L))
    assert quantizer.indices_of(values[:0]).shape == (0, L)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_are_found_in_lower_precision(dtype):
    quantizer = ResidualQuantizer(2, 3, 4).to(dtype)
    combinations = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        for stage in quantizer.stages:
            stage.codebook.copy_(torch.randn(3, 4))
    assert torch.equal(quantizer.indices_of(quantizer.decode(combinations)), combinations)


def test_search_in_blocks_changes_nothing(monkeypatch):
    quantizer = make()
    values = quantizer.decode(COMBINATIONS).detach()
    monkeypatch.setattr("pyro_vi_ext.guides.residual_quantizer.BLOCK", 5 * K**L + 1)
    assert torch.equal(quantizer.indices_of(values), COMBINATIONS)


@pytest.mark.parametrize("bad", [0.5, math.nan, math.inf])
def test_a_value_that_is_no_code_is_an_error(bad):
    quantizer = make()
    values = quantizer.decode(COMBINATIONS[:5]).detach()
    for coordinates in (0, slice(None)):
        values[3, coordinates] = bad
        with pytest.raises(ValueError, match="is not a sum of one code of each stage"):
            quantizer.indices_of(values)
    with pytest.raises(ValueError, match="is not a sum"):
        CodePrior(quantizer, torch.randn(L, K), validate_args=False).log_prob(values)


def test_a_sum_of_several_combinations_is_an_error():
    quantizer = make()
    with torch.no_grad():
        quantizer.stages[1].codebook.copy_(quantizer.stages[0].codebook)
    values = quantizer.decode(COMBINATIONS).detach()
    same = torch.tensor([[2, 2, 1]])
    assert torch.equal(quantizer.indices_of(quantizer.decode(same).detach()), same)
    for several in (values, 3.0 + (values - 3.0)):
        with pytest.raises(ValueError, match="sum of several combinations"):
            quantizer.indices_of(several)
    uniform = CodePrior(quantizer).log_prob(values)  # needs no indices
    torch.testing.assert_close(uniform, torch.full((K**L,), -L * math.log(K)))


def test_of_too_many_combinations_a_value_is_recovered_or_refused():
    quantizer = ResidualQuantizer(8, 16, D)
    with torch.no_grad():
        for level, stage in enumerate(quantizer.stages):
            stage.codebook.copy_(torch.randn(16, D) / 20**level)  # greedy search finds these
    indices = torch.randint(16, (100, 8))
    values = quantizer.decode(indices).detach()
    greedy = (quantizer.encode(values) == indices).all(-1)
    assert greedy.double().mean() > 0.3
    assert torch.equal(quantizer.indices_of(values[greedy]), indices[greedy])
    with pytest.raises(ValueError, match=r"16 \*\* 8 combinations.*carries its indices"):
        quantizer.indices_of(values + 100.0)


def test_values_that_were_drawn_carry_their_indices():
    quantizer = ResidualQuantizer(8, 16, D)
    q = VectorQuantized(torch.randn(7, D), quantizer)
    assert torch.equal(codes_of(q.rsample(), quantizer), q.indices)
    prior = CodePrior(quantizer, torch.randn(8, 16))
    value = prior.sample((5,))
    assert torch.equal(quantizer.decode(codes_of(value, quantizer)), value)


def test_one_stage_is_a_vector_quantizer():
    residual, plain = ResidualQuantizer(1, 6, D), VectorQuantizer(6, D)
    with torch.no_grad():
        plain.codebook.copy_(residual.codebook[0])
    z_e, logits = torch.randn(9, D) / 6, torch.randn(6)
    (value, k), (want, j) = residual.quantize(z_e), plain.quantize(z_e)
    assert torch.equal(value, want) and torch.equal(k, j.unsqueeze(-1))
    for found, wanted in zip(residual.penalties(z_e, k), plain.penalties(z_e, j), strict=True):
        assert torch.equal(found, wanted)
    found = CodePrior(residual, logits.unsqueeze(0)).log_prob(value.detach())
    torch.testing.assert_close(found, CodePrior(plain, logits).log_prob(want.detach()))


# --- gradients -----------------------------------------------------------------------------------


def test_the_gradient_of_codes_is_straight_through_or_a_rotation():
    z_e, weight = torch.randn(6, D, requires_grad=True), torch.randn(6, D)
    quantizer = make()
    value, indices = quantizer.quantize(z_e)
    (grad,) = torch.autograd.grad((weight * value).sum(), z_e)
    assert torch.equal(grad, weight)
    quantizer.rotation_trick = True
    value, _ = quantizer.quantize(z_e)
    assert torch.equal(value, quantizer.decode(indices))
    (grad,) = torch.autograd.grad((weight * value).sum(), z_e)
    rotated = rotate(z_e, quantizer.decode(indices).detach())
    (want,) = torch.autograd.grad((weight * rotated).sum(), z_e)
    assert torch.equal(grad, want) and not grad.allclose(weight)
    assert make(rotation_trick=True).rotation_trick


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_penalties_and_their_gradients_by_hand(ema_decay):
    """d commitment / d z_e = sum_l 2 (r_l - e_l); d codebook loss / d e_lk: its own residuals."""
    quantizer, z_e = make(ema_decay=ema_decay), torch.randn(20, D, requires_grad=True)
    residuals, indices, codes = by_hand(z_e, quantizer.codebook)
    errors = residuals - codes
    codebook, commitment = quantizer.penalties(z_e, indices)
    torch.testing.assert_close(commitment, errors.square().sum((1, 2)))
    weight = torch.rand(20)
    (grad,) = torch.autograd.grad((weight * commitment).sum(), z_e)
    torch.testing.assert_close(grad, weight.unsqueeze(1) * 2 * errors.sum(1))
    if ema_decay is not None:
        assert torch.equal(codebook, torch.zeros(20)) and not codebook.requires_grad
        return
    torch.testing.assert_close(codebook, errors.square().sum((1, 2)))
    inputs = [z_e, *quantizer.parameters()]
    grads = torch.autograd.grad((weight * codebook).sum(), inputs, allow_unused=True)
    assert grads[0] is None
    for level, found in enumerate(grads[1:]):
        want = torch.zeros(K, D)
        for n in range(20):
            want[indices[n, level]] -= weight[n] * 2 * errors[n, level]
        torch.testing.assert_close(found, want)
    quantizer.eval()
    assert not quantizer.penalties(z_e.detach(), indices)[0].requires_grad


# --- training ------------------------------------------------------------------------------------

X = torch.tensor([[1.2, -0.3], [0.1, 0.4], [-2.0, 1.0], [0.6, 0.6], [-0.7, -1.1]])
SCALE, BETA, COUNT = 2.0, 0.3, len(X)


def model_and_guide(quantizer, logits=None, bias=0.0):
    bias = torch.nn.Parameter(torch.full((D,), bias))

    def model(x):
        with pyro.plate("data", SCALE * len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", CodePrior(quantizer, logits))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("bias", bias)
        with pyro.plate("data", SCALE * len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", VectorQuantized(1.5 * x + shift, quantizer))

    return model, guide, bias


def test_a_step_of_svi_is_the_sum_of_the_parts_and_its_gradients_by_hand():
    x, quantizer, logits, lr = X.double(), make(), torch.randn(L, K), 0.01
    model, guide, bias = model_and_guide(quantizer, logits)
    before = quantizer.codebook.detach().clone()
    residuals, indices, codes = by_hand(1.5 * x, before)
    errors = residuals - codes
    mean = codes.sum(1)
    reconstruction = -SCALE * dist.Normal(mean, 1.0).log_prob(x).sum()
    log_p = logits.log_softmax(-1).gather(1, indices.T)
    want = {
        "reconstruction": reconstruction,
        "kl": -SCALE * log_p.sum(),
        "codebook": SCALE * errors.square().sum(),
        "commitment": BETA * SCALE * errors.square().sum(),
    }
    objective = VQELBO(BETA)
    loss = SVI(model, guide, pyro.optim.SGD({"lr": lr}), objective).step(x)
    assert loss == pytest.approx(float(sum(want.values())), rel=1e-12)
    for name, value in want.items():
        torch.testing.assert_close(getattr(objective.latest, name), value)
    grad = SCALE * ((mean - x) + BETA * 2 * errors.sum(1)).sum(0)
    torch.testing.assert_close(bias.detach(), -lr * grad)
    for level in range(L):
        step = torch.zeros(K, D).index_add_(0, indices[:, level], errors[:, level])
        torch.testing.assert_close(
            quantizer.codebook[level].detach(), before[level] + lr * SCALE * 2 * step
        )


def test_moving_averages_are_means_of_the_residuals_from_the_codes_before():
    x, quantizer = X.double(), make(ema_decay=0.9)
    model, guide, _ = model_and_guide(quantizer)
    codes, expected = quantizer.codebook.clone(), []
    counts, sums = torch.zeros(L, K), torch.zeros(L, K, D)
    for scale in (1.0, -0.7):
        residuals, indices, _ = by_hand(1.5 * scale * x, codes)
        counts, sums, before = 0.9 * counts, 0.9 * sums, counts
        for n, level in itertools.product(range(COUNT), range(L)):
            k = indices[n, level]
            counts[level, k] += 0.1
            sums[level, k] += 0.1 * residuals[n, level]
        used = counts > 0.9 * before
        codes = torch.where(used.unsqueeze(-1), sums / counts.unsqueeze(-1), codes)
        expected.append(codes)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), VQELBO(BETA))
    for scale, want in zip((1.0, -0.7), expected, strict=True):
        svi.step(scale * x)
        torch.testing.assert_close(quantizer.codebook, want)
    frequencies = counts / counts.sum(-1, keepdim=True)
    entropy = -torch.xlogy(frequencies, frequencies).sum(-1)
    torch.testing.assert_close(quantizer.perplexity, entropy.exp())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kmeans_starts_each_stage_on_the_residuals_of_the_one_before(ema_decay):
    """Two pairs of data: one stage finds the pairs, the next its halves, and all are exact."""
    x = torch.tensor([[-11.0], [-9.0], [9.0], [11.0]])
    quantizer = ResidualQuantizer(2, 2, 1, ema_decay=ema_decay, kmeans_init=True)

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(quantizer))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide():
        with pyro.plate("data", len(x)):
            pyro.sample("z", VectorQuantized(x, quantizer))

    objective = VQELBO(BETA)
    before = state(quantizer)
    objective.loss(model, guide)
    assert_same_state(quantizer, before)  # no gradient, no start
    assert quantizer.needs_initialization and not quantizer.eval().needs_initialization
    quantizer.train()
    loss = objective.differentiable_loss(model, guide)
    assert not quantizer.needs_initialization
    for stage, size in zip(quantizer.stages, (10, 1), strict=True):
        assert sorted(stage.codebook.flatten().tolist()) == [-size, size]
    # The loss is of the codes after the start: zero, but for constants and errors of stage one.
    errors = 4 * 1.0
    want = 4 * (math.log(2 * math.pi) / 2 + 2 * math.log(2)) + BETA * errors
    want += errors if ema_decay is None else 0.0
    assert loss.item() == pytest.approx(want)
    torch.testing.assert_close(quantizer.perplexity, torch.full((2,), 2.0))


def test_a_stage_that_has_started_is_left_alone():
    quantizer, z_e = make(kmeans_init=True), torch.randn(30, D)
    quantizer.initialize(z_e, torch.ones(30))
    before = state(quantizer)
    quantizer.stages[1]._initialized.fill_(False)
    assert quantizer.needs_initialization
    quantizer.initialize(z_e + 1.0, torch.ones(30))
    assert not quantizer.needs_initialization
    moved = [
        not torch.equal(v, before[name]) for name, v in state(quantizer).items() if "book" in name
    ]
    assert moved == [False, True, False]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_nothing_moves_without_gradient_or_in_evaluation_mode(ema_decay):
    x, quantizer = X.double(), make(ema_decay=ema_decay, restart_threshold=0.5)
    model, guide, _ = model_and_guide(quantizer)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), VQELBO())
    before = state(quantizer)
    svi.evaluate_loss(x)
    quantizer.quantize(x)
    guide(x), model(x)
    assert_same_state(quantizer, before)
    quantizer.eval()
    svi.step(x)
    assert_same_state(quantizer, before)
    quantizer.train()
    svi.step(x)
    for name, value in state(quantizer).items():
        assert name.endswith("_initialized") or not torch.equal(value, before[name]), name


def test_the_state_of_all_stages_is_saved():
    options = {"ema_decay": 0.9, "kmeans_init": True, "restart_threshold": 0.5}
    quantizer, x = make(**options), torch.randn(30, D)
    model, guide, _ = model_and_guide(quantizer)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), VQELBO())
    for _ in range(3):
        svi.step(x)
    other = make(**options)
    other.load_state_dict(quantizer.state_dict())
    assert_same_state(other, quantizer.state_dict())
    assert not other.needs_initialization
    assert torch.equal(other.encode(x), quantizer.encode(x))
    assert torch.equal(other.perplexity, quantizer.perplexity)


# --- the prior, exactly --------------------------------------------------------------------------


def test_the_prior_is_a_product_of_categoricals():
    quantizer, logits = make(), torch.randn(L, K)
    prior = CodePrior(quantizer, logits)
    values = prior.enumerate_support()
    log_p = logits.log_softmax(-1)
    want = torch.stack([sum(log_p[level, k[level]] for level in range(L)) for k in COMBINATIONS])
    torch.testing.assert_close(prior.log_prob(values), want)
    assert float(prior.log_prob(values).exp().sum()) == pytest.approx(1.0, abs=1e-12)
    uniform = CodePrior(quantizer).log_prob(values)
    torch.testing.assert_close(uniform, torch.full((K**L,), -L * math.log(K)))


def test_draws_of_the_prior_have_its_frequencies():
    quantizer, logits, n = make(), torch.randn(L, K), 40_000
    prior = CodePrior(quantizer, logits)
    indices = quantizer.indices_of(prior.sample((n,)))  # from the values alone
    counts = torch.bincount((indices * K ** torch.arange(L)).sum(-1), minlength=K**L)
    order = (COMBINATIONS * K ** torch.arange(L)).sum(-1)

    def chi_square(prior):
        expected = n * prior.log_prob(prior.enumerate_support()).exp()
        return float(((counts[order] - expected).square() / expected).sum())

    mean, sd = K**L - 1, math.sqrt(2 * (K**L - 1))
    assert abs(chi_square(prior) - mean) < 4 * sd
    biased = logits.clone()
    biased[1, 2] += 0.2
    assert chi_square(CodePrior(quantizer, biased)) > mean + 4 * sd


@pytest.mark.parametrize("learned", [False, True])
def test_the_evidence_by_enumeration_is_above_the_bound(learned):
    x, quantizer = X.double(), make()
    logits = torch.randn(L, K) if learned else None
    model, guide, _ = model_and_guide(quantizer, logits)
    values = quantizer.decode(COMBINATIONS).detach()
    log_p = CodePrior(quantizer, logits).log_prob(values)
    log_x = dist.Normal(values.unsqueeze(1), 1.0).log_prob(x).sum(-1)
    evidence = SCALE * float((log_p.unsqueeze(1) + log_x).logsumexp(0).sum())
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    found = -enum.loss(config_enumerate(model), lambda x: None, x)
    assert found == pytest.approx(evidence, rel=1e-12)
    bound = -float(VQELBO().parts(model, guide, x).negative_elbo)
    assert bound < evidence
    # The bound is the joint density at the code of the encoder.
    indices = quantizer.encode(1.5 * x)
    at = (indices * torch.tensor([K * K, K, 1])).sum(-1)
    joint = SCALE * (log_p[at] + log_x[at, torch.arange(COUNT)]).sum()
    assert bound == pytest.approx(float(joint), rel=1e-12)


def test_a_grid_of_latents_has_one_index_per_stage_and_position():
    quantizer, logits = make(), torch.randn(3, 2, L, K)
    prior = CodePrior(quantizer, logits).to_event(2)
    value = prior.sample((5,))
    indices = codes_of(value, quantizer)
    assert value.shape == (5, 3, 2, D) and indices.shape == (5, 3, 2, L)
    want = logits.log_softmax(-1).expand(5, -1, -1, -1, -1).gather(-1, indices.unsqueeze(-1))
    torch.testing.assert_close(prior.log_prob(value), want.sum((1, 2, 3, 4)))
    torch.testing.assert_close(prior.log_prob(value.clone()), want.sum((1, 2, 3, 4)))


# --- what is not finite, and errors --------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rotation_trick", [False, True])
def test_the_code_of_what_is_not_finite_is_nan(bad, rotation_trick):
    quantizer, z_e = make(rotation_trick=rotation_trick), torch.randn(4, D)
    z_e[2] = bad
    value, indices = quantizer.quantize(z_e)
    assert value[2].isnan().all() and value[[0, 1, 3]].isfinite().all()
    assert ((indices >= 0) & (indices < K)).all()


def test_nan_names_the_site_and_moves_nothing():
    x, quantizer = X.double(), make(ema_decay=0.9)
    model, guide, _ = model_and_guide(quantizer, torch.randn(L, K), bias=math.nan)
    before = state(quantizer)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="'[zx]'"):
        SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), VQELBO()).step(x)
    assert_same_state(quantizer, before)


def test_rows_without_weight_may_be_nan():
    quantizer, other, z_e = make(ema_decay=0.9), make(ema_decay=0.9), torch.randn(6, D)
    other.load_state_dict(quantizer.state_dict())
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    kept = weights > 0
    other.update(z_e[kept], other.encode(z_e[kept]), weights[kept])
    z_e[~kept] = math.nan
    quantizer.update(z_e, quantizer.encode(z_e), weights)
    assert_same_state(quantizer, other.state_dict())


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0, 4, 2), {}, "num_quantizers must be an integer >= 1, got 0"),
        ((2.0, 4, 2), {}, "num_quantizers must be an integer >= 1, got 2.0"),
        ((2, 1, 2), {}, "num_codes"),
        ((2, 4, 0), {}, "code_dim"),
        ((2, 4, 2), {"ema_decay": 1.0}, "ema_decay"),
        ((2, 4, 2), {"restart_threshold": -1.0}, "restart_threshold"),
    ],
)
def test_arguments_out_of_range(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        ResidualQuantizer(*arguments, **options)


def test_shapes_that_do_not_fit_are_errors():
    quantizer = make()
    for call in (quantizer.encode, quantizer.quantize, quantizer.indices_of):
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\), the code_dim"):
            call(torch.randn(4, D + 1))
    with pytest.raises(ValueError, match=r"indices of shape \(\.\.\., 3\).*found shape \(5, 2\)"):
        quantizer.decode(torch.zeros(5, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits of shape \(\.\.\., 3, 4\)"):
        CodePrior(quantizer, torch.zeros(K))


def test_a_learned_prior_over_more_codes_than_can_be_searched():
    """Values carry their indices through particles, checks and readings of the bound."""
    own = ResidualQuantizer(3, 30, 2).double()
    logits = torch.randn(3, 30)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(own, logits))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", VectorQuantized(x, own))

    x = torch.randn(5, 2)
    indices = own.encode(x)
    log_p = logits.log_softmax(-1)[torch.arange(3), indices].sum()
    kl = elbo_terms(model, guide, x, num_particles=3).kl["z"].value
    assert kl == pytest.approx(-float(log_p))
    assert float(VQELBO(num_particles=3).parts(model, guide, x).kl) == pytest.approx(kl)

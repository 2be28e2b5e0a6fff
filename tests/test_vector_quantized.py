"""VQELBO: its loss by hand, its gradients in closed form, what moves and when."""

import gc
import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import nn

from pyro_vi_ext import VQELBO, VQParts, elbo_terms, gradient_report, guide_report, log_evidence
from pyro_vi_ext.guides import CodePrior, VectorQuantized, VectorQuantizer

from .resuming import adam, check_resumed

pytestmark = pytest.mark.usefixtures("float64")

N, B, P, D, K = 10, 6, 3, 2, 5
SCALE = N / B
BETA = 0.3


class Pair:
    """A grid of P codes for each datum, another code, and a Gaussian, in one guide.

    Data are subsampled and one of them is masked; ``codebook`` of "z" is trained by gradients, that
    of "w" by moving averages.
    """

    def __init__(self, mask=True, **options):
        self.z_codes = VectorQuantizer(K, D, **options)
        self.w_codes = VectorQuantizer(4, 1, ema_decay=0.9, **options)
        with torch.no_grad():
            self.z_codes.codebook.copy_(torch.randn(K, D))
            self.w_codes.codebook.copy_(torch.randn(4, 1))
        self.encoder = nn.Linear(3, P * D + 1)
        self.decoder = nn.Linear(P * D + 2, 3)
        self.logits = torch.randn(4)
        self.x = torch.randn(N, 3)
        self.index = torch.tensor([7, 0, 3, 9, 4, 5])
        self.mask = torch.arange(B) != 2 if mask else torch.ones(B, dtype=torch.bool)
        self.log_sd = nn.Parameter(torch.tensor(-0.5))

    def plate(self):
        return pyro.plate("data", N, subsample=self.index, dim=-1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with self.plate() as index, poutine.mask(mask=self.mask):
            z = pyro.sample("z", CodePrior(self.z_codes).expand([P]).to_event(1))
            w = pyro.sample("w", CodePrior(self.w_codes, self.logits))
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            h = torch.cat([z.flatten(-2), w, s.unsqueeze(-1)], -1)
            pyro.sample("x", dist.Normal(self.decoder(h), 1.0).to_event(1), obs=x[index])

    def vectors(self, x):
        out = self.encoder(x)
        return out[..., :-1].reshape(*out.shape[:-1], P, D), out[..., -1:]

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        log_sd = pyro.param("log_sd", self.log_sd)
        with self.plate() as index, poutine.mask(mask=self.mask):
            z_e, w_e = self.vectors(x[index])
            pyro.sample("z", VectorQuantized(z_e, self.z_codes).to_event(1))
            pyro.sample("w", VectorQuantized(w_e, self.w_codes))
            pyro.sample("s", dist.Normal(0.3, log_sd.exp()))

    def by_hand(self, s):
        """The parts of the loss for given draws of s, shape (particles, B), by first principles."""
        z_e, w_e = self.vectors(self.x[self.index])
        quantized = []
        for z, codes in ((z_e, self.z_codes.codebook), (w_e, self.w_codes.codebook)):
            k = (z.detach().unsqueeze(-2) - codes).square().sum(-1).argmin(-1)
            quantized.append((k, codes[k], z + (codes[k] - z).detach()))
        (_, e_z, z_q), (k_w, e_w, w_q) = quantized
        h = torch.cat([z_q.flatten(-2), w_q], -1).expand(len(s), B, -1)
        mean = self.decoder(torch.cat([h, s.unsqueeze(-1)], -1))
        log_p = dist.Normal(mean, 1.0).log_prob(self.x[self.index]).sum(-1)
        kl = P * math.log(K) - self.logits.log_softmax(0)[k_w]
        sd = self.log_sd.exp()
        kl = kl + dist.Normal(0.3, sd).log_prob(s) - dist.Normal(0.0, 1.0).log_prob(s)
        codebook = (z_e.detach() - e_z).square().sum((-1, -2))
        commitment = (z_e - e_z.detach()).square().sum((-1, -2))
        commitment = commitment + (w_e - e_w.detach()).square().sum(-1)
        rows = (-log_p, kl, codebook, BETA * commitment)
        rows = [torch.where(self.mask, row, 0.0).expand(len(s), B) for row in rows]
        return VQParts(*(SCALE * row.sum() / len(s) for row in rows))

    def parameters(self):
        own = (self.encoder, self.decoder, self.z_codes)
        return [*(p for module in own for p in module.parameters()), self.log_sd]


def draws(pair, objective, seed):
    """The draws of s that the objective makes under a seed."""
    torch.manual_seed(seed)
    run = objective._run(pair.model, pair.guide, (pair.x,), {})
    s = torch.stack([p.guide.nodes["s"]["value"] for p in run.pairs])
    return s.reshape(-1, B)


PARTICLES = {
    "one": {},
    "vectorised": {"num_particles": 4},
    "sequential": {"num_particles": 4, "vectorize_particles": False},
}


@pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)
def test_loss_parts_and_gradients_are_those_of_the_definition(options):
    """With several sites and positions, a mask, a scale, a learned prior, a Gaussian beside."""
    pair = Pair()
    objective = VQELBO(BETA, **options)
    with torch.no_grad():
        s = draws(pair, objective, 1)
    s = 0.3 + (s - 0.3) / pair.log_sd.exp().detach() * pair.log_sd.exp()  # its path
    expected = pair.by_hand(s)
    expected_grads = torch.autograd.grad(expected.loss, pair.parameters())

    torch.manual_seed(1)
    assert objective.loss(pair.model, pair.guide, pair.x) == pytest.approx(expected.loss.item())
    for name, value in vars(objective.latest).items():
        torch.testing.assert_close(value, getattr(expected, name).detach())
        assert not value.requires_grad

    torch.manual_seed(1)
    loss = objective.differentiable_loss(pair.model, pair.guide, pair.x)
    grads = torch.autograd.grad(loss, pair.parameters())
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_all_entry_points_report_the_sum_of_the_parts():
    pair = Pair()
    objective = VQELBO(BETA)
    args = (pair.model, pair.guide, pair.x)
    module = objective(*args[:2])
    pair.z_codes.eval(), pair.w_codes.eval()  # so that every call sees the same codes
    calls = {
        "loss": lambda: objective.loss(*args),
        "loss_and_grads": lambda: objective.loss_and_grads(*args),
        "differentiable_loss": lambda: objective.differentiable_loss(*args).item(),
        "module": lambda: module(pair.x).item(),
        "SVI": lambda: SVI(*args[:2], pyro.optim.SGD({"lr": 0.0}), objective).step(pair.x),
        "parts": lambda: float(objective.parts(*args).loss),
    }
    values = []
    for call in calls.values():
        torch.manual_seed(2)
        values.append(call())
        parts = objective.latest
        total = sum(float(v) for v in vars(parts).values())
        assert values[-1] == pytest.approx(total, rel=1e-14)
        assert float(parts.loss) == pytest.approx(total, rel=1e-14)
        assert float(parts.negative_elbo) == float(parts.reconstruction + parts.kl)
    assert len(set(values)) == 1
    assert f"loss {values[0]:.6g} = reconstruction" in str(parts)


def test_the_bound_inside_is_the_elbo_and_below_the_evidence():
    """Evidence by a sum over all codes; log_evidence of the guide is its ELBO."""
    quantizer = VectorQuantizer(3, 1)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[-1.0], [0.2], [1.5]]))
    logits, x = torch.randn(3), torch.randn(4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(quantizer, logits).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum((-1, -2)), 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z_e = torch.stack([0.5 * x, x - 0.1], -1).unsqueeze(-1)
            pyro.sample("z", VectorQuantized(z_e, quantizer).to_event(1))

    codes, log_pi = quantizer.codebook.detach().squeeze(-1), logits.log_softmax(0)
    joint = [
        log_pi[i] + log_pi[j] + dist.Normal(codes[i] + codes[j], 0.7).log_prob(x)
        for i, j in itertools.product(range(3), repeat=2)
    ]
    evidence = torch.stack(joint).logsumexp(0)
    z_e = torch.stack([0.5 * x, x - 0.1], -1)
    k = (z_e.unsqueeze(-1) - codes).square().argmin(-1)
    elbo = log_pi[k].sum(-1) + dist.Normal(codes[k].sum(-1), 0.7).log_prob(x)

    parts = VQELBO().parts(model, guide, x)
    assert -float(parts.negative_elbo) == pytest.approx(float(elbo.sum()))
    assert elbo_terms(model, guide, x, num_particles=2).elbo.value == pytest.approx(
        float(elbo.sum())
    )
    with pytest.warns(UserWarning, match="all its mass at site 'z' on one code"):
        found = log_evidence(model, guide, x, num_particles=30).log_evidence
    torch.testing.assert_close(found, elbo.detach())
    with pytest.warns(UserWarning, match="all its mass at site 'z' on one code"):
        guide_report(model, guide, x, num_particles=30)
    assert bool((elbo < evidence).all())
    # Under a uniform prior the KL of a latent is log(num_codes), whatever the code.
    logits = torch.zeros(3)
    kl = VQELBO().parts(model, guide, x).kl
    assert float(kl) == pytest.approx(len(x) * 2 * math.log(3))


# --- what moves, and when ------------------------------------------------------------------------


def state(*modules):
    return [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]


def same(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


@pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)
def test_statistics_move_once_per_gradient_call_whatever_the_particles(options):
    """Counts of the unmasked units, without scale; particles do not multiply them."""
    pair = Pair()
    objective = VQELBO(**options)
    z_e, w_e = pair.vectors(pair.x[pair.index])
    expected = {}
    for name, q, z in (("z", pair.z_codes, z_e), ("w", pair.w_codes, w_e)):
        k, rows = q.encode(z)[pair.mask].flatten(), z[pair.mask].reshape(-1, z.shape[-1]).detach()
        counts = torch.bincount(k, minlength=q.num_codes).double()
        expected[name] = (counts, k, rows)
    before = pair.w_codes.codebook.clone()
    for call in range(1, 3):
        objective.loss_and_grads(pair.model, pair.guide, pair.x)
        for name, q in (("z", pair.z_codes), ("w", pair.w_codes)):
            weight = 1 - q.usage.decay**call
            assert float(q.usage.weight) == pytest.approx(weight)
            if call == 1:
                torch.testing.assert_close(q.usage.count, weight * expected[name][0])
        if call == 1:
            counts, k, rows = expected["w"]
            for code in range(4):
                mean = rows[k == code].mean(0) if counts[code] else before[code]
                torch.testing.assert_close(pair.w_codes.codebook[code], mean)


def test_particles_that_differ_count_as_their_mean():
    """Vectors that depend on another draw: J particles have weight 1/J each."""
    quantizer = VectorQuantizer(3, 1, ema_decay=0.5)

    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", CodePrior(quantizer))
            pyro.sample("x", dist.Normal(z.squeeze(-1) + s, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            pyro.sample("z", VectorQuantized((x + s).unsqueeze(-1), quantizer))

    x = torch.randn(5)
    for vectorized in (True, False):
        start = state(quantizer)
        objective = VQELBO(num_particles=7, vectorize_particles=vectorized)
        codes = quantizer.codebook.clone()
        torch.manual_seed(3)
        objective.differentiable_loss(model, guide, x)
        torch.manual_seed(3)
        with torch.no_grad():
            run = objective._run(model, guide, (x,), {})
        s = torch.stack([p.guide.nodes["s"]["value"] for p in run.pairs]).reshape(7, 5)
        k = (x + s).unsqueeze(-1).sub(codes[:, 0]).abs().argmin(-1)
        counts = torch.bincount(k.flatten(), minlength=3) / 7
        torch.testing.assert_close(quantizer.usage.count, 0.5 * counts)
        assert float(quantizer.usage.count.sum()) == pytest.approx(0.5 * len(x))
        quantizer.load_state_dict(start[0])


def test_nothing_moves_without_gradient_or_in_evaluation_mode():
    options = dict(kmeans_init=True, restart_threshold=100.0)
    pair = Pair(**options)
    objective = VQELBO()
    args = (pair.model, pair.guide, pair.x)
    before = state(pair.z_codes, pair.w_codes)
    objective.loss(*args), objective.parts(*args)
    SVI(*args[:2], adam(), objective).evaluate_loss(pair.x)
    elbo_terms(*args, num_particles=3)
    assert same(before, state(pair.z_codes, pair.w_codes))

    pair.z_codes.eval(), pair.w_codes.eval()
    SVI(*args[:2], adam(), objective).step(pair.x)
    assert same(before, state(pair.z_codes, pair.w_codes))  # though Adam had the codebook
    assert float(objective.latest.codebook) > 0

    pair.z_codes.train(), pair.w_codes.train()
    SVI(*args[:2], adam(), objective).step(pair.x)
    after = state(pair.z_codes, pair.w_codes)
    for old, new in zip(before, after, strict=True):
        assert bool(new["_initialized"]) and not bool(old["_initialized"])
        assert not torch.equal(old["codebook"], new["codebook"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_moves_nothing_and_names_a_site(bad):
    pair = Pair(mask=False, restart_threshold=100.0)
    objective = VQELBO()
    objective.loss_and_grads(pair.model, pair.guide, pair.x)
    before = state(pair.z_codes, pair.w_codes)
    x = pair.x.clone()
    x[3, 1] = bad
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="latent site 'z' is NaN|observed at site 'x'"):
            objective.loss_and_grads(pair.model, pair.guide, x)
    assert same(before, state(pair.z_codes, pair.w_codes))


def test_masked_vectors_may_be_anything():
    """What is masked is in no sum: not in the loss, the statistics, the start of the codes."""
    pair = Pair(kmeans_init=True, restart_threshold=100.0)
    hidden = pair.index[~pair.mask]

    def guide(x):
        pyro.module("encoder", pair.encoder)
        with pair.plate() as index, poutine.mask(mask=pair.mask):
            z_e, w_e = pair.vectors(x[index])
            bad = torch.where(pair.mask, 1.0, torch.nan)
            z_e, w_e = z_e * bad[:, None, None], w_e * bad[:, None]
            pyro.sample("z", VectorQuantized(z_e, pair.z_codes).to_event(1))
            pyro.sample("w", VectorQuantized(w_e, pair.w_codes))
            pyro.sample("s", dist.Normal(0.3, 1.0))

    def model(x):
        pyro.module("decoder", pair.decoder)
        with pair.plate() as index, poutine.mask(mask=pair.mask):
            z = pyro.sample("z", CodePrior(pair.z_codes).expand([P]).to_event(1)).nan_to_num()
            w = pyro.sample("w", CodePrior(pair.w_codes)).nan_to_num()
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            h = torch.cat([z.flatten(-2), w, s.unsqueeze(-1)], -1)
            pyro.sample("x", dist.Normal(pair.decoder(h), 1.0).to_event(1), obs=x[index])

    assert len(hidden) == 1
    objective = VQELBO()
    for _ in range(3):
        with pyro.validation_enabled(False):
            assert math.isfinite(objective.loss_and_grads(model, guide, pair.x))
    for q in (pair.z_codes, pair.w_codes):
        assert bool(q._initialized)
        assert all(bool(v.isfinite().all()) for v in q.state_dict().values())


def test_kmeans_starts_codebooks_upstream_first():
    """A second codebook for what the first leaves over starts from what is left over."""
    first, second = (VectorQuantizer(2, 1, kmeans_init=True) for _ in range(2))
    x = torch.tensor([-5.5, -4.5, 4.5, 5.5]).unsqueeze(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", CodePrior(first))
            b = pyro.sample("b", CodePrior(second))
            pyro.sample("x", dist.Normal(a + b, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", VectorQuantized(x, first))
            pyro.sample("b", VectorQuantized(x - a.detach(), second))

    for _ in range(20):  # Lloyd's algorithm has other fixed points: try starts until the good one
        for q in (first, second):
            q._initialized.fill_(False)
        objective = VQELBO()
        objective.loss_and_grads(model, guide, x)
        if sorted(first.codebook.flatten().tolist()) == [-5.0, 5.0]:
            break
    assert sorted(first.codebook.flatten().tolist()) == [-5.0, 5.0]
    assert sorted(second.codebook.flatten().tolist()) == [-0.5, 0.5]
    # Every datum is 1/2 off its first code, and nothing is left after the second.
    assert float(objective.parts(model, guide, x).codebook) == pytest.approx(4 * 0.25)


def test_a_codebook_shared_by_two_sites_moves_once():
    quantizer = VectorQuantizer(3, 1, ema_decay=0.9)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", CodePrior(quantizer))
            b = pyro.sample("b", CodePrior(quantizer))
            pyro.sample("x", dist.Normal(a + b, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", VectorQuantized(x, quantizer))
            pyro.sample("b", VectorQuantized(x.exp(), quantizer))

    x = torch.randn(8, 1)
    k = quantizer.encode(torch.cat([x, x.exp()]))
    counts = torch.bincount(k, minlength=3)
    VQELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(quantizer.usage.count, 0.1 * counts)


def test_masked_nan_is_in_no_gradient():
    """Neither the encoder's nor that of the code that a NaN vector is given."""
    quantizer = VectorQuantizer(3, 2)
    encoder, mask = nn.Linear(2, 2), torch.tensor([True, False, True, True])
    bad = torch.where(mask, 0.0, torch.nan).unsqueeze(1)

    def model(x):
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            z = pyro.sample("z", CodePrior(quantizer))
            z = torch.where(mask.unsqueeze(1), z, 0.0)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            pyro.sample("z", VectorQuantized(encoder(x) + bad, quantizer))

    with pyro.validation_enabled(False):
        assert math.isfinite(VQELBO().loss_and_grads(model, guide, torch.randn(4, 2)))
    for p in (*encoder.parameters(), quantizer.codebook):
        assert bool(p.grad.isfinite().all()) and bool(p.grad.any())


def test_penalties_have_the_scale_of_the_model():
    """Log q is 0, so the guide's own scale changes nothing: it is the model's that counts."""
    quantizer = VectorQuantizer(3, 2)
    x = torch.randn(6, 2)

    def pair(size, scale):
        def model(x):
            index = torch.arange(6)
            with pyro.plate("data", size, subsample=index), poutine.scale(scale=scale):
                z = pyro.sample("z", CodePrior(quantizer))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return model

    def guide(x):
        with pyro.plate("data", 6):
            pyro.sample("z", VectorQuantized(x, quantizer))

    one, many = (VQELBO().parts(poutine.scale(pair(6, 1.0), s), guide, x) for s in (1.0, 20.0))
    for name in vars(one):
        assert float(getattr(many, name)) == pytest.approx(20 * float(getattr(one, name)))


def test_measuring_gradients_moves_nothing():
    pair = Pair(kmeans_init=True, restart_threshold=100.0)
    pair.log_sd.data.fill_(-20.0)  # next to no noise
    before = state(pair.z_codes, pair.w_codes)
    report = gradient_report(VQELBO(), pair.model, pair.guide, pair.x, num_repeats=3)
    assert same(before, state(pair.z_codes, pair.w_codes))
    assert report.rows[0].variance < 1e-8
    VQELBO().loss_and_grads(pair.model, pair.guide, pair.x)
    assert not same(before, state(pair.z_codes, pair.w_codes))


# --- training ------------------------------------------------------------------------------------


CENTERS = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)


def blobs(quantizer, register):
    """Data in three blobs, the encoder the identity: the codes are to find their centres."""
    x = CENTERS.repeat(20, 1) + 0.1 * torch.randn(60, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(quantizer))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    def guide(x):
        if register:
            pyro.module("own_name", quantizer)
        with pyro.plate("data", len(x)):
            pyro.sample("z", VectorQuantized(x, quantizer))

    means = torch.stack([x[i::3].mean(0) for i in range(3)])
    return model, guide, x, means


@pytest.mark.parametrize("register", [True, False], ids=["registered", "by the objective"])
def test_svi_trains_a_codebook_that_nobody_registered(register):
    quantizer = VectorQuantizer(3, 2, kmeans_init=True, restart_threshold=1.0)
    model, guide, x, means = blobs(quantizer, register)
    # The codebook loss is quadratic, of 20 data for each code: one such step ends at their mean.
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1 / 40}), VQELBO())
    for _ in range(3):
        svi.step(x)
    name = "own_name" if register else "z.quantizer"
    assert list(pyro.get_param_store()) == [f"{name}$$$codebook"]
    order = quantizer.codebook[:, 0].argsort()
    torch.testing.assert_close(quantizer.codebook[order].detach(), means)
    assert float(quantizer.perplexity) == pytest.approx(3.0)


@pytest.mark.parametrize("register", [True, False])
def test_module_has_the_codebook_once(register):
    quantizer = VectorQuantizer(3, 2)
    model, guide, x, _ = blobs(quantizer, register)
    module = VQELBO()(model, guide)
    module(x)
    assert [id(p) for p in module.parameters()] == [id(quantizer.codebook)]


def test_module_guides_need_no_registration():
    class Guide(PyroModule):
        def __init__(self, quantizer):
            super().__init__()
            self.quantizer = quantizer

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", VectorQuantized(x, self.quantizer))

    quantizer = VectorQuantizer(3, 2)
    model, _, x, _ = blobs(quantizer, False)
    module = VQELBO()(model, Guide(quantizer))
    module(x).backward()
    assert [id(p) for p in module.parameters()] == [id(quantizer.codebook)]
    assert quantizer.codebook.grad.abs().sum() > 0


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("when", [1, 6])
def test_training_resumes_exactly(ema_decay, when, tmp_path):
    def make():
        quantizer = VectorQuantizer(
            5, 2, ema_decay, kmeans_init=True, restart_threshold=2.0, rotation_trick=True
        )
        torch.manual_seed(4)
        encoder, (model, _, x, _) = nn.Linear(2, 2), blobs(quantizer, False)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", VectorQuantized(encoder(x), quantizer))

        svi = SVI(model, guide, adam(), VQELBO())
        svi.net = quantizer
        return svi, (x,), {}

    check_resumed(make, when, tmp_path)


def test_a_stored_codebook_is_there_from_the_first_evaluation(tmp_path):
    """A parameter store that was loaded replaces a fresh codebook before anything is scored."""
    _, _, x, _ = blobs(None, False)

    def fresh(optim):
        model, guide, _, _ = blobs(VectorQuantizer(3, 2), False)
        return SVI(model, guide, optim, VQELBO())

    svi = fresh(adam())
    for _ in range(3):
        svi.step(x)
    expected = svi.evaluate_loss(x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    del svi
    for step in (False, True):
        gc.collect()
        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "store.pt")
        svi = fresh(pyro.optim.SGD({"lr": 0.0}))
        assert (svi.step if step else svi.evaluate_loss)(x) == pytest.approx(expected)
        del svi


def test_a_codebook_hidden_from_the_optimizer_stays():
    """The usual way to freeze a guide."""
    quantizer = VectorQuantizer(3, 2)
    model, guide, x, _ = blobs(quantizer, True)
    guide(x)  # registered
    hidden = poutine.block(guide, hide_types=["param"])
    before = quantizer.codebook.detach().clone()
    svi = SVI(model, hidden, adam(), VQELBO())
    svi.step(x)
    assert torch.equal(quantizer.codebook, before)
    assert list(pyro.get_param_store()) == ["own_name$$$codebook"]


def test_a_quantizer_among_the_arguments_resumes_too(tmp_path):
    def model(x, quantizer):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(quantizer))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, quantizer):
        weight = pyro.param("weight", torch.eye(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", VectorQuantized(x @ weight, quantizer))

    def make():
        torch.manual_seed(4)
        x, quantizer = torch.randn(20, 2), VectorQuantizer(3, 2, 0.9, kmeans_init=True)
        svi = SVI(model, guide, adam(), VQELBO())
        svi.net = quantizer
        return svi, (x, quantizer), {}

    check_resumed(make, 4, tmp_path)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [-0.1, float("nan"), float("inf"), None, "1", True])
def test_commitment_cost_is_a_finite_number(cost):
    with pytest.raises(ValueError, match="commitment_cost must be"):
        VQELBO(cost)


def test_other_sites_must_be_reparameterised():
    quantizer = VectorQuantizer(3, 2)
    model, guide, x, _ = blobs(quantizer, False)

    def with_bit(fn):
        def inside(x):
            pyro.sample("b", dist.Bernoulli(0.5))
            fn(x)

        return inside

    with pytest.raises(NotImplementedError, match="Guide site 'b' .Bernoulli. is not"):
        VQELBO().loss(with_bit(model), with_bit(guide), x)


def test_model_and_guide_share_one_quantizer():
    quantizer, other = VectorQuantizer(3, 2), VectorQuantizer(3, 2)
    model, guide, x, _ = blobs(quantizer, False)
    with pytest.raises(ValueError, match="Site 'z' is a VectorQuantized .*CodePrior"):
        VQELBO().loss(blobs(other, False)[0], guide, x)

    def normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="Site 'z' is a Independent in the guide"):
        VQELBO().loss(model, normal, x)


def test_a_codebook_of_another_shape_in_the_store_is_an_error():
    quantizer = VectorQuantizer(3, 2)
    model, guide, x, _ = blobs(quantizer, False)
    VQELBO().loss_and_grads(model, guide, x)
    model, guide, x, _ = blobs(VectorQuantizer(4, 2), False)
    with pytest.raises(ValueError, match="'z.quantizer'"):
        VQELBO().loss_and_grads(model, guide, x)

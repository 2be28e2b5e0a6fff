"""Storchastic 0.3.7 (van Krieken et al. 2021, arXiv:2104.00428) beside ours, at the same weights.

    pip install storchastic==0.3.7
    python benchmarks/discrete.py --data static_mnist.npz --only storchastic

bias: four bits, against enumeration; variance: that of discrete.py; time: of a whole training step.
What was found of Storchastic, and is shown or worked around here:

1. The relaxed draw given a Bernoulli one does not have the law it should: its formula
   (`conditional_gumbel_rsample`) has log(p) + log(1 + p) where log(p) - log(1 - p) belongs. RELAX
   and REBAR are biased as soon as the control variate does something. RELAX of one-hot pairs takes
   another formula, which is right: those rows are its valid ones.
2. ARM multiplies the gradient of the model's parameters by the number of bits (its score has an
   event dimension that is summed out last); that of the logits is right.
3. RELAX learns its control variate from a gradient that is not the variance's: c(z~) is detached
   where it multiplies the score. Variances are shown before and after learning.
4. With one draw, post-processing returns single precision (ARM) or booleans (DisARM): converted.
5. Importing it replaces four functions of torch (`Tensor.to` among them), for our steps as well.
"""

import contextlib
import gc
import itertools
import math
import statistics
import warnings
from importlib.metadata import version

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from discrete import BATCH, NUM_DRAWS, NUM_IMAGES, adapt, checkpoint, clock, log_variance
from torch import nn
from torch.distributions.utils import clamp_probs

from pyro_vi_ext import TraceARM_ELBO, TraceDisARM_ELBO, TraceREBAR_ELBO, TraceRELAX_ELBO
from pyro_vi_ext.control_variates import mlp

try:
    import storch
except ImportError as error:
    raise ImportError("This section needs Storchastic: pip install storchastic==0.3.7") from error

PEER_RATE, OUR_RATE = 1e-3, 1e-2  # learning rate of control variates: its example's, and ours


def print_storchastic(args, x, valid):
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph")
    print(f"\nstorchastic {version('storchastic')}, torch {torch.__version__}, seed {args.seed}")
    print_bias(args)
    vae = checkpoint(args, x)
    print_variance(args, vae, x, valid[:NUM_IMAGES])
    print_time(args, vae, x[:BATCH])


@contextlib.contextmanager
def unvalidated():
    """torch's own validation off: the form torch 2.13 gives it fails on tensors of Storchastic."""
    base = torch.distributions.Distribution
    before = base._validate_args
    base.set_default_validate_args(False)
    try:
        yield
    finally:
        base.set_default_validate_args(before)


# --- bias ----------------------------------------------------------------------------------------

LOGITS, WEIGHT = (0.5, -1.0, 1.5, 0.2), (1.0, -0.7, 0.5, 1.3)


def toy(b, weight):
    """A function of four bits, or relaxed bits, that is not a sum over them."""
    return ((b * weight).sum(-1) - 0.6).square() + b[..., 0] * b[..., 3]


def toy_log_weight(b, logits, weight):
    return toy(b, weight) - linear_log_prob(logits.detach(), b) - len(LOGITS) * math.log(2.0)


def toy_exact():
    """Gradient of the bound for logits and weights, by enumeration."""
    logits, weight = (torch.tensor(v, requires_grad=True) for v in (LOGITS, WEIGHT))
    b = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(LOGITS))))
    q = linear_log_prob(logits, b).exp()
    return torch.autograd.grad((q * toy_log_weight(b, logits, weight)).sum(), (logits, weight))


def toy_rows(num_draws):
    rows = [torch.tensor(v).expand(num_draws, -1) for v in (LOGITS, WEIGHT)]
    return [row.clone().requires_grad_() for row in rows]


@unvalidated()
def peer_toy(method, num_draws, one_hot=False):
    rows = toy_rows(num_draws)
    logits, weight = (storch.denote_independent(row, 0, "data") for row in rows)
    draw(method, one_hot, lambda b, *parts: -toy_log_weight(b, *parts), logits, weight)
    storch.backward(update_estimator_params=False)
    return [-row.grad.detach() * num_draws for row in rows]


def our_toy(objective, num_draws):
    logits, weight = toy_rows(num_draws)

    def model():
        with pyro.plate("data", num_draws):
            b = pyro.sample("b", dist.Bernoulli(0.5).expand([len(LOGITS)]).to_event(1))
            pyro.factor("f", toy(b, weight))

    def guide():
        with pyro.plate("data", num_draws):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    loss = objective.differentiable_loss(model, guide)
    return [-row for row in torch.autograd.grad(loss, (logits, weight))]


def print_bias(args, num_draws=100_000):
    pyro.set_rng_seed(args.seed)
    torch.set_default_dtype(torch.float64)
    weight, pair, methods = torch.tensor(WEIGHT), (len(LOGITS), 2), storch.method

    def c(b):
        return -toy(b, weight)

    def peer(method, **options):
        return lambda: peer_toy(method, num_draws, **options)

    def ours(objective):
        return lambda: our_toy(objective, num_draws)

    rows = {
        "storchastic ARM": peer(methods.ARM("z")),
        "storchastic RELAX, new network": peer(methods.RELAX("z", in_dim=len(LOGITS))),
        "storchastic RELAX, c = f": peer(methods.RELAX("z", c_phi=c)),
        "  one-hot, new network": peer(methods.RELAX("z", in_dim=pair), one_hot=True),
        "  one-hot, c = f": peer(methods.RELAX("z", c_phi=lambda b: c(b[..., 1])), one_hot=True),
        "storchastic REBAR": peer(methods.REBAR("z")),
        "storchastic DisARM": peer(methods.DisARM("z")),
        "our ARM": ours(TraceARM_ELBO()),
        "our RELAX": ours(TraceRELAX_ELBO(name="toy_relax")),
        "our REBAR": ours(TraceREBAR_ELBO(name="toy_rebar")),
        "our DisARM": ours(TraceDisARM_ELBO()),
    }
    print(f"\nbias: largest |z| of 4 logits and of 4 weights of the model, {num_draws:,} draws")
    print(f"{'':32} {'logits':>8} {'model':>8} {'var':>8}   (above 4: biased)")
    exact = toy_exact()
    for name, gradient in rows.items():
        gc.collect()
        found = gradient()
        scores = [
            (g.mean(0) - e).abs() / (g.std(0) / math.sqrt(num_draws))
            for g, e in zip(found, exact, strict=True)
        ]
        variance = found[0].var(0).mean()
        print(
            f"{name:32} {scores[0].max():8.1f} {scores[1].max():8.1f} {variance:8.3f}", flush=True
        )
    torch.set_default_dtype(torch.float32)


# --- the autoencoder -----------------------------------------------------------------------------


class Network(nn.Module):
    """One control variate for both: of z in logit space and the image, zero at first."""

    def __init__(self, data_dim, latent_dim, hidden_dims=(200, 200)):
        super().__init__()
        self.body = mlp(data_dim + latent_dim, hidden_dims)

    def forward(self, sites, x):
        z = sites["b1"]
        return self.body(torch.cat([z, x.expand(z.shape[:-1] + x.shape[-1:])], -1)).squeeze(-1)


class Control(nn.Module):
    """c of Storchastic's RELAX: ours, a module of (z, logits, x), at its relaxed draws."""

    def __init__(self, control, one_hot):
        super().__init__()
        self.control, self.one_hot, self.data = control, one_hot, ()

    def forward(self, relaxed):
        z = storch.deterministic(self._z)(relaxed)
        return storch.deterministic(lambda *parts: -self.control(*parts))(z, *self.data)

    def _z(self, relaxed):
        return clamp_probs(bits(relaxed, self.one_hot)).logit()  # over its temperature


class Ours(nn.Module):
    """What a TraceRELAX_ELBO has learned: eta f(sigma(z)) + r(z, x), now fixed."""

    def __init__(self, objective, vae):
        super().__init__()
        self.vae, self.constants = [vae], objective.constants.get("b1")
        self.network = objective.networks.get("b1")
        self.requires_grad_(False)

    def forward(self, z, logits, x):
        relaxed = torch.sigmoid(z / self.constants.temperature)
        f = log_weight(self.vae[0], relaxed, logits, x)
        x = x.asinh().expand(z.shape[:-1] + x.shape[-1:])
        return self.constants.scale * f + self.network(torch.cat([z, x], -1)).squeeze(-1)


class FromNetwork(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.network = Network(vae.data_dim, vae.latent_dims[0])

    def forward(self, z, logits, x):
        return self.network({"b1": z}, x)


class Peer:
    """The autoencoder with a method of Storchastic.

    :param control: c for RELAX; None: ARM.
    :param one_hot: draw each bit as a one-hot pair.
    :param likelihood: of log p(x | b) alone: the KL divergence in closed form, as in its example,
        adds no variance. (As a second cost beside ARM, it makes `backward` raise.)
    """

    def __init__(self, vae, control=None, *, one_hot=False, likelihood=False):
        self.vae, self.one_hot, self.likelihood = vae, one_hot, likelihood
        self.control = None if control is None else Control(control, one_hot)
        relax = control is not None
        methods = storch.method
        self.method = methods.RELAX("z", c_phi=self.control) if relax else methods.ARM("z")

    def learned(self):
        return getattr(self.method, "control_params", [])

    @unvalidated()
    def backward(self, x, logits=None, update=True):
        """Leave the gradient of the negative bound per image, for logits too if they are given."""
        x = storch.denote_independent(x, 0, "data")
        if logits is None:
            logits = storch.deterministic(self._encode)(x)
        else:
            logits = storch.denote_independent(logits, 0, "data")
        if self.control is not None:
            self.control.data = logits, x
        draw(self.method, self.one_hot, self._cost, logits, x)
        storch.backward(update_estimator_params=update)

    def _encode(self, x):
        return self.vae.encoder[0](x - self.vae.data_mean)

    def _cost(self, b, logits, x):
        weigh = log_likelihood if self.likelihood else log_weight
        return -weigh(self.vae, b, logits, x)


def peer_adapt(peer, x, num_steps, seed, lr):
    """As `adapt` of discrete.py, by Storchastic's own gradient for its control variate."""
    rows = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(peer.learned(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    for step in range(num_steps):
        adam.zero_grad()
        peer.backward(x[torch.randint(len(x), (BATCH,), generator=rows).to(x.device)])
        adam.step()
        schedule.step()
        peer.vae.zero_grad()
        if step % 10 == 0:
            gc.collect()  # its backward leaves cycles


def peer_log_variance(peer, x, num_draws):
    """As `log_variance` of discrete.py."""
    with torch.no_grad():
        start = peer._encode(x)
    draws = []
    for step in range(num_draws):
        logits = start.clone().requires_grad_()
        peer.backward(x, logits, update=False)
        draws.append(logits.grad.detach() * len(x))
        peer.vae.zero_grad()
        if step % 10 == 0:
            gc.collect()
    return summary(torch.stack(draws))


def print_variance(args, vae, x, images):
    print(
        f"\nvariance: {len(images)} images, {NUM_DRAWS} draws (ARM: {5 * NUM_DRAWS}); control "
        f"variates learn for {args.num_adapt} steps at {OUR_RATE:g} (ours) or the rate given"
    )
    print(f"{'':44} {'log var':>8} {'se':>6}")

    def show(name, found):
        print("{:44} {:8.2f} {:6.2f}".format(name, *found), flush=True)

    def draws(name):
        return NUM_DRAWS if name.startswith("RELAX") else 5 * NUM_DRAWS

    def peer(name, rate=None, **options):
        pyro.set_rng_seed(args.seed)
        contestant = Peer(vae, **options)
        if rate is not None:
            peer_adapt(contestant, x, args.num_adapt, args.seed, rate)
        show(f"storchastic {name}", peer_log_variance(contestant, images, draws(name)))

    def ours(name, objective):
        pyro.set_rng_seed(args.seed)
        adapt(objective, vae, x, args.num_adapt, args.seed)
        show(f"our {name}", log_variance(objective, vae, images, draws(name)))
        return objective

    peer("ARM")
    peer("ARM, KL in closed form", likelihood=True)
    ours("ARM", TraceARM_ELBO())
    for one_hot in (False, True):
        kind = "RELAX, one-hot" if one_hot else "RELAX (biased)"
        peer(f"{kind}, network, new", control=FromNetwork(vae), one_hot=one_hot)
        for rate in (PEER_RATE, OUR_RATE):
            control = FromNetwork(vae)
            peer(f"{kind}, network, {rate:g}", rate, control=control, one_hot=one_hot)
    ours("RELAX, the same network", network_relax(vae))
    learned = ours("RELAX", TraceRELAX_ELBO(hidden_dims=(200, 200), name="peer_relax"))
    peer("RELAX, one-hot, our c as learned", control=Ours(learned, vae), one_hot=True)


def network_relax(vae):
    return TraceRELAX_ELBO(Network(vae.data_dim, vae.latent_dims[0]), name="peer_network")


# --- time ----------------------------------------------------------------------------------------


def print_time(args, vae, x):
    controls = {"RELAX": FromNetwork(vae), "RELAX, one-hot": FromNetwork(vae)}
    steps = {
        "storchastic ARM": peer_step(Peer(vae), x),
        "our ARM": our_step(TraceARM_ELBO(), vae, x),
    }
    for name, control in controls.items():
        contestant = Peer(vae, control, one_hot="one-hot" in name)
        steps[f"storchastic {name}, network"] = peer_step(contestant, x)
    steps["our RELAX, the same network"] = our_step(network_relax(vae), vae, x)
    full = TraceRELAX_ELBO(hidden_dims=(200, 200), name="timed_relax")
    steps["our RELAX"] = our_step(full, vae, x)
    times = {name: [] for name in steps}
    for _ in range(args.num_rounds):
        for name, step in steps.items():
            gc.collect()
            start = clock(args)
            for _ in range(5):
                step()
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append((clock(args) - start) / 5)
    print(f"\ntime of a step, batch {len(x)}: medians of {args.num_rounds} rounds in turn")
    print(f"{'':36} {'ms':>8} {'ours / theirs':>14}")
    medians = {name: statistics.median(found) for name, found in times.items()}
    theirs = {"ARM": medians["storchastic ARM"], "RELAX": medians["storchastic RELAX, network"]}
    for name, found in medians.items():
        reference = theirs["ARM" if "ARM" in name else "RELAX"]
        ratio = f"{found / reference:.2f}" if name.startswith("our") else ""
        print(f"{name:36} {1e3 * found:8.1f} {ratio:>14}")


def peer_step(peer, x):
    adam = torch.optim.Adam([*peer.vae.parameters(), *peer.learned()], lr=0.0)

    def step():
        adam.zero_grad()
        peer.backward(x)
        adam.step()

    step()
    return step


def our_step(objective, vae, x):
    module = objective(vae.model, vae.guide)
    module(x)
    adam = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.0)

    def step():
        adam.zero_grad()
        module(x).backward()
        adam.step()

    step()
    return step


# --- both ----------------------------------------------------------------------------------------


def draw(method, one_hot, cost, logits, *data):
    """Draw bits as in its example, and add the cost of them."""
    p = storch.deterministic(lambda logits: clamp_probs(logits.sigmoid()))(logits)
    if one_hot:
        pairs = storch.deterministic(lambda p: torch.stack([1 - p, p], -1))(p)
        b = method(torch.distributions.OneHotCategorical(probs=pairs))
    else:
        b = method(torch.distributions.Bernoulli(probs=p))

    b = storch.deterministic(lambda b, p: bits(b, one_hot).to(p.dtype))(b, p)
    storch.add_cost(storch.deterministic(cost)(b, logits, *data), "cost")


def bits(b, one_hot):
    return b[..., 1] if one_hot else b


def linear_log_prob(logits, b):
    return (b * F.logsigmoid(logits) + (1 - b) * F.logsigmoid(-logits)).sum(-1)


def log_likelihood(vae, b, logits, x):
    return linear_log_prob(vae.decoder[0](2 * b - 1), x)


def log_weight(vae, b, logits, x):
    """log p(x, b) - log q(b | x), q held fixed."""
    prior = linear_log_prob(vae.decoder.prior_logits, b) - linear_log_prob(logits.detach(), b)
    return log_likelihood(vae, b, logits, x) + prior


def summary(draws):
    """Log of the mean variance over the first dimension, and its standard error."""
    squares = (draws - draws.mean(0)).square() * (len(draws) / (len(draws) - 1))
    each = squares.mean(tuple(range(1, draws.dim())))
    mean = each.mean().item()
    return math.log(mean), each.std().item() / math.sqrt(len(draws)) / mean

"""Storchastic 0.3.7 (van Krieken et al. 2021, arXiv:2104.00428) beside ours, at the same weights.

    pip install -e ".[bench]"
    python benchmarks/discrete.py --data static_mnist.npz --only storchastic

bias: four bits, against enumeration; variance: that of discrete.py; time: of a whole training step.
What is wrong in Storchastic, and shown or worked around here:

1. `conditional_gumbel_rsample` for a Bernoulli has log(p) + log(1 + p) where log(p) - log(1 - p)
   belongs: z~ has the wrong law, and RELAX and REBAR are biased once their control variate does
   something. One-hot pairs take another formula, which is right: those rows are its valid RELAX.
2. ARM multiplies the gradient of the model's parameters by the number of bits, since its score is
   summed over them too late; that of the logits is right. A second cost beside it (the KL
   divergence, in its example) makes `backward` raise.
3. RELAX learns c from another gradient than the variance's: c(z~) is detached beside the score,
   and the variance is that for the probabilities, which saturated bits dominate.
4. ARM returns single precision and DisARM booleans: converted.
5. torch 2.13 checks arguments by a function that fails on its tensors: unchecked.
6. Its RELAX keeps the graph of a step in the gradients it leaves (`create_graph`): dropped.
"""

import contextlib
import gc
import itertools
import math
import statistics
import warnings
from functools import partial
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
    raise ImportError("This section needs Storchastic: pip install pyro_vi_ext[bench]") from error

PEER_RATE, OUR_RATE = 1e-3, 1e-2  # for control variates: its example's rate, and that of `adapt`


def print_storchastic(args, x, valid):
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph")
    print(f"\nstorchastic {version('storchastic')}, torch {torch.__version__}, seed {args.seed}")
    print_bias(args)
    vae = checkpoint(args, x)
    print_variance(args, vae, x, valid[:NUM_IMAGES])
    print_time(args, vae, x[:BATCH])


@contextlib.contextmanager
def unvalidated():
    """Inside, torch does not check arguments of distributions."""
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
    found = [-row.grad.detach() * num_draws for row in rows]
    for leaf in (*rows, *method.parameters()):
        leaf.grad = None
    return found


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
    peer, ours = partial(partial, peer_toy), partial(partial, our_toy)

    def c(b):
        return -toy(b, weight)

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
        found = gradient(num_draws=num_draws)
        z = [largest_z(g, e) for g, e in zip(found, exact, strict=True)]
        print("{:32} {:8.1f} {:8.1f} {:8.3f}".format(name, *z, found[0].var(0).mean()), flush=True)
    torch.set_default_dtype(torch.float32)


def largest_z(draws, exact):
    return ((draws.mean(0) - exact).abs() / draws.std(0) * math.sqrt(len(draws))).max()


# --- the autoencoder -----------------------------------------------------------------------------


class Network(nn.Module):
    """One control variate for both: of z in logit space and the image, zero at first."""

    def __init__(self, vae):
        super().__init__()
        self.body = mlp(vae.data_dim + vae.latent_dims[0], (200, 200))

    def forward(self, sites, x):
        z = sites["b1"]
        return self.body(torch.cat([z, x.expand(z.shape[:-1] + x.shape[-1:])], -1)).squeeze(-1)


def learned_control(objective, vae):
    """What a TraceRELAX_ELBO has learned: eta f(sigma(z)) + r(z, x)."""
    constants, network = objective.constants.get("b1"), objective.networks.get("b1")

    def control(sites, x):
        z = sites["b1"]
        logits = vae.encoder[0](x - vae.data_mean)
        f = log_weight(vae, torch.sigmoid(z / constants.temperature), logits, x)
        x = x.asinh().expand(z.shape[:-1] + x.shape[-1:])
        return constants.scale * f + network(torch.cat([z, x], -1)).squeeze(-1)

    return control


class Control(nn.Module):
    """c of Storchastic's RELAX, of its relaxed draws, from one of ours."""

    def __init__(self, control, one_hot):
        super().__init__()
        self.control, self.one_hot, self.x = control, one_hot, None

    def forward(self, relaxed):
        z = storch.deterministic(self._z)(relaxed)
        return storch.deterministic(lambda z, x: -self.control({"b1": z}, x))(z, self.x)

    def _z(self, relaxed):
        return clamp_probs(bits(relaxed, self.one_hot)).logit()  # over its temperature


class Peer:
    """The autoencoder with a method of Storchastic.

    :param control: c for RELAX; None: ARM.
    :param likelihood: of log p(x | b) alone: the KL divergence in closed form has no variance.
    """

    def __init__(self, vae, control=None, *, one_hot=False, likelihood=False):
        self.vae, self.one_hot, self.likelihood = vae, one_hot, likelihood
        self.control = None if control is None else Control(control, one_hot)
        if control is None:
            self.method = storch.method.ARM("z")
        else:
            self.method = storch.method.RELAX("z", c_phi=self.control)
        self.learned = getattr(self.method, "control_params", [])

    @unvalidated()
    def backward(self, x, logits=None, update=True):
        """Leave the gradient of the negative bound per image, for logits too if they are given."""
        x = storch.denote_independent(x, 0, "data")
        if logits is None:
            logits = storch.deterministic(self._encode)(x)
        else:
            logits = storch.denote_independent(logits, 0, "data")
        if self.control is not None:
            self.control.x = x
        draw(self.method, self.one_hot, self._cost, logits, x)
        storch.backward(update_estimator_params=update)

    def clear(self, *leaves):
        """Drop all gradients, which hold their graph."""
        for leaf in (*leaves, *self.vae.parameters(), *self.method.parameters()):
            leaf.grad = None

    def _encode(self, x):
        return self.vae.encoder[0](x - self.vae.data_mean)

    def _cost(self, b, logits, x):
        weigh = log_likelihood if self.likelihood else log_weight
        return -weigh(self.vae, b, logits, x)


def peer_adapt(peer, x, num_steps, seed, lr):
    """As `adapt` of discrete.py, by Storchastic's own gradient."""
    rows = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(peer.learned, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    for _ in range(num_steps):
        peer.backward(x[torch.randint(len(x), (BATCH,), generator=rows).to(x.device)])
        adam.step()
        schedule.step()
        peer.clear()


def peer_log_variance(peer, x, num_draws):
    draws = []
    for _ in range(num_draws):
        logits = peer._encode(x).detach().requires_grad_()
        peer.backward(x, logits, update=False)
        draws.append(logits.grad.detach() * len(x))
        peer.clear(logits)
    return summary(torch.stack(draws))


def print_variance(args, vae, x, images):
    print(
        f"\nvariance: {len(images)} images, {NUM_DRAWS} draws (ARM: {5 * NUM_DRAWS}); control "
        f"variates learn for {args.num_adapt} steps at {OUR_RATE:g} (ours) or the rate given"
    )
    print(f"{'':44} {'log var':>8} {'se':>6}")

    def show(name, found):
        print("{:44} {:8.2f} {:6.2f}".format(name, *found), flush=True)

    def peer(name, rate=None, num_draws=NUM_DRAWS, **options):
        pyro.set_rng_seed(args.seed)
        contestant = Peer(vae, **options)
        if rate is not None:
            peer_adapt(contestant, x, args.num_adapt, args.seed, rate)
        show(f"storchastic {name}", peer_log_variance(contestant, images, num_draws))

    def ours(name, objective, num_draws=NUM_DRAWS):
        pyro.set_rng_seed(args.seed)
        adapt(objective, vae, x, args.num_adapt, args.seed)
        show(f"our {name}", log_variance(objective, vae, images, num_draws))
        return objective

    peer("ARM", num_draws=5 * NUM_DRAWS)
    peer("ARM, KL in closed form", num_draws=5 * NUM_DRAWS, likelihood=True)
    ours("ARM", TraceARM_ELBO(), num_draws=5 * NUM_DRAWS)
    for one_hot in (False, True):
        kind = "RELAX, one-hot" if one_hot else "RELAX (biased)"
        for rate in (None, PEER_RATE, OUR_RATE):
            learning = "new" if rate is None else f"{rate:g}"
            peer(f"{kind}, network, {learning}", rate, control=Network(vae), one_hot=one_hot)
    ours("RELAX, the same network", TraceRELAX_ELBO(Network(vae), name="peer_network"))
    learned = ours("RELAX", TraceRELAX_ELBO(hidden_dims=(200, 200), name="peer_relax"))
    peer("RELAX, one-hot, our c as learned", control=learned_control(learned, vae), one_hot=True)


# --- time ----------------------------------------------------------------------------------------


def print_time(args, vae, x):
    network = TraceRELAX_ELBO(Network(vae), name="timed_network")
    full = TraceRELAX_ELBO(hidden_dims=(200, 200), name="timed_relax")
    steps = {
        "storchastic ARM": peer_step(Peer(vae), x),
        "our ARM": our_step(TraceARM_ELBO(), vae, x),
        "storchastic RELAX, network": peer_step(Peer(vae, Network(vae)), x),
        "  one-hot": peer_step(Peer(vae, Network(vae), one_hot=True), x),
        "our RELAX, the same network": our_step(network, vae, x),
        "our RELAX": our_step(full, vae, x),
    }
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
    return training_step([*peer.vae.parameters(), *peer.learned], partial(peer.backward, x))


def our_step(objective, vae, x):
    module = objective(vae.model, vae.guide)
    module(x)  # makes what is learned
    return training_step(module.parameters(), lambda: module(x).backward())


def training_step(parameters, backward):
    adam = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=0.0)

    def step():
        adam.zero_grad()
        backward()
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

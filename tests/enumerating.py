"""Problems with discrete draws whose exact gradients are known, by enumeration in plain torch.

A problem is run in many independent copies, each with parameters of its own (of the same values),
so that one call of an objective gives thousands of independent estimates of the gradient. The exact
gradient sums over the states of the discrete draws and integrates over the others by Gauss-Hermite
quadrature.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
import torch.nn.functional as F

__all__ = ["KINDS", "Grid", "Problem"]


# --- kinds of discrete sites -------------------------------------------------------------------


@dataclass
class Kind:
    """A distribution of logits (..., width), its states, and its values as vectors of that width.

    :ivar draw_dims: event dimensions of z, in logit space.
    """

    width: int
    states: list
    make: callable
    vector: callable
    draw_dims: int = 1


KINDS = {
    "scalar": Kind(
        1, [[0], [1]], lambda g: dist.Bernoulli(logits=g[..., 0]), lambda b: b.unsqueeze(-1), 0
    ),
    "event": Kind(
        2,
        [[0, 0], [0, 1], [1, 0], [1, 1]],
        lambda g: dist.Bernoulli(logits=g).to_event(1),
        lambda b: b,
    ),
    "one hot": Kind(
        3,
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        lambda g: dist.OneHotCategorical(logits=g),
        lambda b: b,
    ),
    "index": Kind(
        3,
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        lambda g: dist.Categorical(logits=g),
        lambda b: torch.eye(3)[b],
    ),
}


def log_prob(kind, logits, vector):
    """Of one draw, in plain torch."""
    if kind in ("scalar", "event"):
        return (vector * F.logsigmoid(logits) + (1 - vector) * F.logsigmoid(-logits)).sum(-1)
    return (vector * logits.log_softmax(-1)).sum(-1)


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))


# --- the problem -------------------------------------------------------------------------------


@dataclass
class Problem:
    """z0, then a chain of discrete draws b0, b1, ..., then z1, and data x of some units.

    z0 belongs to all units, and so does b0 if ``pooled``; the rest is in a plate of units that is
    subsampled, with scale, one unit masked, and another without data. z0 and z1 have paths. The
    guide goes down the chain, the model up (but for a pooled b0). One parameter is shared.

    :ivar seen: the units that each run of the model has seen.
    """

    kind: str
    layers: int
    pooled: bool = True
    copies: int = 20_000
    seen: list = field(default_factory=list)

    x = torch.tensor([0.9, -0.6, 0.4, 1.3], dtype=torch.double)
    mask = torch.tensor([True, True, False, True])
    has_data = torch.tensor([True, False, True, True])
    subsample_size = 3
    num_plates = 1

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.layers)
        width = KINDS[self.kind].width

        def fixed(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        self.down, self.up = fixed(self.layers, width, width), fixed(self.layers, width, width)
        self.of_z0, self.prior = fixed(width), 0.5 * fixed(width)
        self.to_z1, self.to_x = fixed(2, width), fixed(self.layers, width)
        self.start = torch.cat([torch.tensor([0.2, 0.4, 0.7, 0.8]), 0.5 * fixed(self.layers)])
        self.theta = torch.tensor([0.6, 0.8, 1.2])

    # What the distributions are made of, for draws of any batch shape.

    @property
    def num_guide(self):
        return len(self.start)

    def leaves(self, *batch):
        """Parameters of guide and model: (*batch, number)."""
        both = torch.cat([self.start, self.theta])
        return both.expand(*batch, len(both)).clone().requires_grad_()

    def guide_logits(self, layer, p, above, z0, x):
        """of_z0 serves to tell the logits apart; layer 0 uses a parameter of the model."""
        own = p[..., 4 + layer, None] * (1 + self.of_z0)
        if layer == 0:
            shared = p[..., self.num_guide, None]
            return own + 0.3 * shared + (p[..., 0] * z0 + 0.5 * x).unsqueeze(-1) * self.of_z0
        return own + p[..., 1, None] * (above @ self.down[layer])

    def prior_logits(self, layer, p, below):
        logits = self.prior * p[..., -1, None]
        return logits if below is None else logits + below @ self.up[layer]

    def z0(self, p):
        return p[..., 2], 0.5

    def z1(self, p, vectors, z0):
        return p[..., 3] * (vectors[-1] @ self.to_z1[0]) + 0.2 * z0, 0.6

    def z1_prior(self, vectors):
        return vectors[0] @ self.to_z1[1], 1.0

    def mean_of_x(self, p, vectors, z0, z1):
        total = sum(v @ w for v, w in zip(vectors, self.to_x, strict=True))
        return p[..., -3] * torch.sin(total + z0) + p[..., -2] * z1

    # As a Pyro pair, in copies.

    def sample(self, layer, logits):
        kind = KINDS[self.kind]
        return kind.vector(pyro.sample(f"b{layer}", kind.make(logits)))

    def units(self):
        return pyro.plate("units", len(self.x), subsample_size=self.subsample_size, dim=-1)

    def pair(self, p):
        copies = pyro.plate("copies", self.copies, dim=-2)

        def guide():
            with copies:
                z0, vectors = pyro.sample("z0", dist.Normal(*self.z0(p))), []
                if self.pooled:
                    vectors.append(self.sample(0, self.guide_logits(0, p, None, z0, 0.0)))
                with self.units() as index, poutine.mask(mask=self.mask[index]):
                    for layer in range(self.pooled, self.layers):
                        above = vectors[-1] if vectors else None
                        logits = self.guide_logits(layer, p, above, z0, self.x[index])
                        vectors.append(self.sample(layer, logits))
                    pyro.sample("z1", dist.Normal(*self.z1(p, vectors, z0)))

        def model():
            with copies:
                z0, vectors = pyro.sample("z0", dist.Normal(0.0, 1.0)), [None] * self.layers
                if self.pooled:
                    vectors[0] = self.sample(0, self.prior_logits(0, p, None))
                with self.units() as index, poutine.mask(mask=self.mask[index]):
                    self.seen.append(index)
                    below = None
                    for layer in reversed(range(self.pooled, self.layers)):
                        below = self.sample(layer, self.prior_logits(layer, p, below))
                        vectors[layer] = below
                    z1 = pyro.sample("z1", dist.Normal(*self.z1_prior(vectors)))
                    mean = self.mean_of_x(p, vectors, z0, z1)
                    with poutine.mask(mask=self.has_data[index]):
                        pyro.sample("x", dist.Normal(mean, 0.7), obs=self.x[index])

        return model, guide

    # By enumeration. Dimensions: z0, states of a pooled b0, units, states of the rest, z1.

    def exact(self, index, nodes=16):
        """The loss of one copy at some units, and its gradient."""
        p = self.leaves()
        x, weight = self.x[index][:, None, None], self.mask[index] * (len(self.x) / len(index))
        t, w = np.polynomial.hermite_e.hermegauss(nodes)
        t, w = torch.tensor(t), torch.tensor(w / w.sum())
        states = torch.tensor(KINDS[self.kind].states).double()
        local = self.layers - self.pooled
        rest = torch.tensor(list(itertools.product(range(len(states)), repeat=local))).long()
        vectors = [states[rest[:, i]][:, None] for i in range(local)]

        loc, scale = self.z0(p)
        z0 = (loc + scale * t)[:, None, None, None, None]
        terms = log_normal(z0, 0.0, 1.0) - log_normal(z0, loc, scale)
        log_q = torch.zeros(())
        if self.pooled:
            vectors.insert(0, states[:, None, None, None])
            logits = self.guide_logits(0, p, None, z0, 0.0)
            log_q = log_prob(self.kind, logits, vectors[0])
            prior = log_prob(self.kind, self.prior_logits(0, p, None), vectors[0])
            terms = terms + prior - log_q

        own, log_local = 0.0, torch.zeros(())
        for layer in range(self.pooled, self.layers):
            above = vectors[layer - 1] if layer else None
            logits = self.guide_logits(layer, p, above, z0, x)
            log_local = log_local + log_prob(self.kind, logits, vectors[layer])
            below = vectors[layer + 1] if layer + 1 < self.layers else None
            own = own + log_prob(self.kind, self.prior_logits(layer, p, below), vectors[layer])
        loc, scale = self.z1(p, vectors, z0)
        z1 = loc + scale * t
        own = own - log_local + log_normal(z1, self.z1_prior(vectors)[0], 1.0)
        own = own - log_normal(z1, loc, scale)
        mean = self.mean_of_x(p, vectors, z0, z1)
        own = own + self.has_data[index][:, None, None] * log_normal(x, mean, 0.7)
        own = (own * w).sum(-1, keepdim=True) * log_local.exp()
        own = (own.sum(-2, keepdim=True) * weight[:, None, None]).sum(-3, keepdim=True)
        bound = ((terms + own) * log_q.exp()).sum(1) * w[:, None, None, None]
        loss = -bound.sum()
        return loss.detach(), torch.autograd.grad(loss, p)[0]


@dataclass
class Grid:
    """Bernoulli sites of all, of rows, of columns, and of the cells of two crossed plates."""

    copies: int = 10_000
    seen: list = field(default_factory=list)

    x = torch.tensor([[0.4, 1.5], [-0.3, 0.8]], dtype=torch.double)
    mask = torch.tensor([[True, True], [True, False]])
    rows_seen = torch.tensor([0, 1])
    start = torch.tensor([0.3, -0.2, 0.5, 0.4, -0.6, 0.1, 0.7, -0.9, 0.8], dtype=torch.double)
    num_plates = 2

    def leaves(self, *batch):
        return self.start.expand(*batch, 9).clone().requires_grad_()

    def logits(self, name, p, values):
        p = p.unbind(-1)
        if name == "all":
            return p[0]
        if name == "cell":
            return p[1] + p[2] * values["row"] + p[3] * values["column"]
        return p[4 if name == "row" else 5] + p[6] * values["all"]

    def mean_of_x(self, p, values):
        both = values["row"] * values["column"]
        return values["all"] - p[..., 8] * (values["cell"] + both) + p[..., 7]

    def pair(self, p):
        copies = pyro.plate("copies", self.copies, dim=-3)
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
        places = {"all": [], "row": [rows], "column": [columns], "cell": [rows, columns]}

        def sample(name, logits):
            with contextlib.ExitStack() as stack:
                for plate in [copies, *places[name]]:
                    stack.enter_context(plate)
                stack.enter_context(poutine.mask(mask=self.mask if name == "cell" else True))
                return pyro.sample(name, dist.Bernoulli(logits=logits))

        def guide():
            values = {}
            for name in places:
                values[name] = sample(name, self.logits(name, p, values))

        def model():
            self.seen.append(self.rows_seen)
            values = {name: sample(name, torch.tensor(-0.4)) for name in places}
            with copies, rows, columns, poutine.mask(mask=self.mask):
                pyro.sample("x", dist.Normal(self.mean_of_x(p, values), 0.8), obs=self.x)

        return model, guide

    def exact(self, index):
        p = self.leaves()
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)))
        parts = states.split([1, 2, 2, 4], 1)
        shapes = {"all": (1, 1), "row": (2, 1), "column": (1, 2), "cell": (2, 2)}
        values = {n: v.reshape(-1, *shapes[n]) for n, v in zip(shapes, parts, strict=True)}
        log_q, bound = 0.0, 0.0
        for name, value in values.items():
            mask = self.mask if name == "cell" else torch.tensor(True)
            logits = self.logits(name, p, values)
            q = log_prob("scalar", logits.expand(value.shape).unsqueeze(-1), value.unsqueeze(-1))
            prior = log_prob("scalar", torch.full((1,), -0.4), value.unsqueeze(-1))
            log_q = log_q + q.sum((1, 2))
            bound = bound + ((prior - q) * mask).sum((1, 2))
        x = log_normal(self.x, self.mean_of_x(p, values), 0.8)
        loss = -(log_q.exp() * (bound + (x * self.mask).sum((1, 2)))).sum()
        return loss.detach(), torch.autograd.grad(loss, p)[0]

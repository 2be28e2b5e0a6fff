"""Every public objective, through every entry point, on every kind of guide.

A new objective joins by being added to OBJECTIVES.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyro_vi_ext
from pyro_vi_ext.guides import AutoSemiImplicit, CodePrior, VectorQuantized, VectorQuantizer
from pyro_vi_ext.objective import Objective

OBJECTIVES = {
    "SemiImplicitELBO": pyro_vi_ext.SemiImplicitELBO,
    "SemiImplicitELBO-upper": lambda **kw: pyro_vi_ext.SemiImplicitELBO(
        num_mixing_particles=3, bound="upper", **kw
    ),
    "SemiImplicitELBO-iw": lambda **kw: pyro_vi_ext.SemiImplicitELBO(
        num_mixing_particles=3, importance_weighted=True, **kw
    ),
    "ImportanceWeightedELBO": pyro_vi_ext.ImportanceWeightedELBO,
    "ImportanceWeightedELBO-stl": partial(pyro_vi_ext.ImportanceWeightedELBO, gradient="stl"),
    "ImportanceWeightedELBO-dreg": partial(pyro_vi_ext.ImportanceWeightedELBO, gradient="dreg"),
    "ImportanceWeightedELBO-chunks": partial(
        pyro_vi_ext.ImportanceWeightedELBO, gradient="dreg", chunk_size=2
    ),
    "TraceSTL_ELBO": pyro_vi_ext.TraceSTL_ELBO,
    "TraceScore_ELBO": pyro_vi_ext.TraceScore_ELBO,
    "TraceScore_ELBO-all": partial(pyro_vi_ext.TraceScore_ELBO, score_sites="all"),
    "TraceRLOO_ELBO": lambda num_particles, **kw: pyro_vi_ext.TraceRLOO_ELBO(
        max(2, num_particles), **kw
    ),
    "TraceNVIL_ELBO": pyro_vi_ext.TraceNVIL_ELBO,
    "TraceMuProp_ELBO": pyro_vi_ext.TraceMuProp_ELBO,
    "TraceARM_ELBO": pyro_vi_ext.TraceARM_ELBO,
    "TraceDisARM_ELBO": pyro_vi_ext.TraceDisARM_ELBO,
    "TraceConcrete_ELBO": pyro_vi_ext.TraceConcrete_ELBO,
    "TraceREBAR_ELBO": pyro_vi_ext.TraceREBAR_ELBO,
    "TraceREBAR_ELBO-uncoupled": partial(pyro_vi_ext.TraceREBAR_ELBO, coupled=False),
    "TraceRELAX_ELBO": pyro_vi_ext.TraceRELAX_ELBO,
    "TraceLAX_ELBO": pyro_vi_ext.TraceLAX_ELBO,
    "VQELBO": lambda num_particles=1, **kw: pyro_vi_ext.VQELBO(num_particles=num_particles, **kw),
}

DISCRETE = list(OBJECTIVES)[list(OBJECTIVES).index("TraceScore_ELBO") : -1]
NOISY = ["TraceScore_ELBO-all", "TraceLAX_ELBO"]  # on continuous draws, by their nature
TRAINED = [name for name in OBJECTIVES if "upper" not in name]  # upper bounds are for evaluation
TRAINED = [name for name in TRAINED if name not in NOISY]

DATA = torch.tensor([0.3, -1.2, 0.8, 1.9, -0.4, 0.1])


pytestmark = pytest.mark.usefixtures("float64")


# --- the pairs -------------------------------------------------------------------------------


def regression(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_subsampled(x):
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def local_masked(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) != 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def imputing(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=torch.arange(len(x)) != 2)


def with_params(x):
    loc = pyro.param("q_loc", lambda: torch.tensor(0.1))
    scale = pyro.param("q_scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))
    pyro.sample("scale", dist.LogNormal(0.0, scale))


def amortised(plate):
    torch.manual_seed(0)
    net = nn.Linear(1, 2)

    def guide(x):
        pyro.module("net", net)
        with plate(x) as index:
            mean, log_scale = net(x[index].unsqueeze(-1)).unbind(-1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()))

    return guide


class WithPyroParams(PyroModule):
    def __init__(self):
        super().__init__()
        self.q_loc = PyroParam(torch.tensor(0.1))
        self.q_scale = PyroParam(torch.tensor(0.5), constraints.positive)
        self.net = PyroModule[nn.Linear](1, 1)

    def forward(self, x):
        loc = pyro.sample("loc", dist.Normal(self.q_loc, self.q_scale))
        pyro.sample("scale", dist.LogNormal(self.net(loc.unsqueeze(-1)).squeeze(-1), 0.3))


def semi_implicit_global():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)

    def guide(x):
        pyro.module("net", net)
        noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer={"is_auxiliary": True})
        mean = net(psi)
        pyro.sample("loc", dist.Normal(mean[..., 0], 0.3))
        pyro.sample("scale", dist.LogNormal(mean[..., 1], 0.3))

    return guide


def semi_implicit_local(plate):
    torch.manual_seed(0)
    net = nn.Linear(2, 1)

    def guide(x):
        pyro.module("net", net)
        with plate(x) as index:
            psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            mean = net(torch.stack([psi, x[index].expand(psi.shape)], -1)).squeeze(-1)
            pyro.sample("z", dist.Normal(mean, 0.5))

    return guide


def auto_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["loc"])))
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["scale"])))
    return guide


def full(x):
    return pyro.plate("data", len(x))


def subsampled(x):
    return pyro.plate("data", len(x), subsample_size=3)


def scaled(model):
    return poutine.scale(model, scale=0.3)


def annealed(guide):
    return poutine.scale(guide, scale=0.3)


def bits(plate):
    def model(x):
        with plate(x) as index:
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * b - 1, 0.8), obs=x[index])

    return model


def bits_guide(plate):
    torch.manual_seed(0)
    net = nn.Linear(1, 1)

    def guide(x):
        pyro.module("net", net)
        with plate(x) as index:
            pyro.sample("b", dist.Bernoulli(logits=net(x[index].unsqueeze(-1)).squeeze(-1)))

    return guide


def masked(fn):
    def inside(x):
        with poutine.mask(mask=torch.arange(len(x)) != 2):
            fn(x)

    return inside


def chain(x):
    """A global bit, a bit for each datum, and a continuous draw below."""
    top = pyro.sample("top", dist.Bernoulli(torch.full((2,), 0.4)).to_event(1))
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(logits=top.sum(-1) - 1))
        z = pyro.sample("z", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class ChainGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = PyroParam(torch.tensor([0.3, -0.2]))
        self.weight = PyroParam(torch.tensor([0.5, 1.0]))

    def forward(self, x):
        top = pyro.sample("top", dist.Bernoulli(logits=self.logits).to_event(1))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=self.weight[0] * (x + top.sum(-1))))
            pyro.sample("z", dist.Normal(self.weight[1] * b + 0.5 * x, 0.5))


def categories(x):
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(b @ torch.tensor([-1.0, 0.0, 1.0]).to(b), 0.5), obs=x)


def categories_guide(x):
    logits = pyro.param("logits", lambda: 0.1 * torch.arange(18.0).reshape(6, 3))
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.OneHotCategorical(logits=logits))


def codes(plate):
    """A quantised and a Gaussian latent; the codebook is in evaluation mode: it does not move."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 2, ema_decay=0.9).eval()
    net = nn.Linear(1, 3)

    def model(x):
        with plate(x) as index:
            z = pyro.sample("z", CodePrior(quantizer))
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1) + s, 0.5), obs=x[index])

    def guide(x):
        pyro.module("net", net)
        with plate(x) as index:
            out = net(x[index].unsqueeze(-1))
            z = pyro.sample("z", VectorQuantized(out[..., :2], quantizer))
            pyro.sample("s", dist.Normal(out[..., 2] - z.sum(-1), 0.5))

    return model, guide


PAIRS = {
    "param": lambda: (regression, with_params),
    "module": lambda: (local, amortised(full)),
    "PyroModule": lambda: (regression, WithPyroParams()),
    "AutoNormal": lambda: (regression, AutoNormal(regression)),
    "AutoNormal-local": lambda: (local, AutoNormal(local)),
    "AutoDiagonalNormal": lambda: (regression, AutoDiagonalNormal(regression)),
    "AutoMultivariateNormal": lambda: (regression, AutoMultivariateNormal(regression)),
    "AutoLowRank": lambda: (regression, AutoLowRankMultivariateNormal(regression)),
    "AutoIAFNormal": lambda: (regression, AutoIAFNormal(regression, hidden_dim=[4])),
    "AutoGuideList": lambda: (regression, auto_list(regression)),
    "AutoNormalMessenger": lambda: (regression, AutoNormalMessenger(regression)),
    "AutoSemiImplicit": lambda: (regression, AutoSemiImplicit(regression, hidden_dims=(4,))),
    "semi-implicit": lambda: (regression, semi_implicit_global()),
    "semi-implicit-local": lambda: (local, semi_implicit_local(full)),
    "subsampled": lambda: (local_subsampled, amortised(subsampled)),
    "subsampled-AutoNormal": lambda: (local_subsampled, AutoNormal(local_subsampled)),
    "subsampled-semi-implicit": lambda: (local_subsampled, semi_implicit_local(subsampled)),
    "masked-AutoNormal": lambda: (local_masked, AutoNormal(local_masked)),
    "masked-AutoMultivariateNormal": lambda: (local_masked, AutoMultivariateNormal(local_masked)),
    "imputing-AutoNormal": lambda: (imputing, AutoNormal(imputing)),
    "scaled": lambda: (scaled(regression), annealed(with_params)),
    "codes": lambda: codes(full),
    "codes-subsampled": lambda: codes(subsampled),
    "bits": lambda: (bits(full), bits_guide(full)),
    "bits-subsampled": lambda: (bits(subsampled), bits_guide(subsampled)),
    "bits-scaled": lambda: (scaled(bits(full)), annealed(bits_guide(full))),
    "bits-masked": lambda: (masked(bits(full)), masked(bits_guide(full))),
    "bits-chain": lambda: (chain, ChainGuide()),
    "bits-one-hot": lambda: (categories, categories_guide),
}

# Without discrete draws most of DISCRETE are the same objective: a sample of these pairs, in short.
SAMPLE = {"param", "module", "AutoNormal", "AutoMultivariateNormal", "subsampled", "scaled"}


def cases(objectives):
    return [
        pytest.param(
            objective,
            name,
            id=f"{objective}-{name}",
            marks=pytest.mark.slow
            if objective in DISCRETE and "bits" not in name and name not in SAMPLE
            else (),
        )
        for objective in objectives
        for name in PAIRS
    ]


PARTICLES = {
    "one": dict(num_particles=1),
    "vectorised": dict(num_particles=3),
    "sequential": dict(num_particles=3, vectorize_particles=False),
}


def takes(objective: str, name: str) -> bool:
    """Whether an objective takes a guide; if not, it says so by an error that names a site."""
    kind = getattr(pyro_vi_ext, objective.split("-")[0])
    if "semi" in name.lower():
        return kind.takes_mixing
    if "bits" not in name:
        return True
    if kind in (pyro_vi_ext.TraceARM_ELBO, pyro_vi_ext.TraceDisARM_ELBO):
        return name != "bits-one-hot"
    pathwise = pyro_vi_ext.SemiImplicitELBO, pyro_vi_ext.TraceSTL_ELBO, pyro_vi_ext.TraceLAX_ELBO
    return kind not in (*pathwise, pyro_vi_ext.VQELBO)


def make(objective: str, name: str, **options):
    """The pair, and the objective; ``None`` in its place if it refuses the pair."""
    model, guide = PAIRS[name]()
    made = OBJECTIVES[objective](**options)
    if takes(objective, name):
        return model, guide, made
    x = DATA.to(torch.get_default_dtype())
    with pytest.raises((NotImplementedError, ValueError), match="[Ss]ite '"):
        made.differentiable_loss(model, guide, x)
    return model, guide, None


def rewind(objective):
    """Forget the running means that calls with gradients leave behind."""
    for module in getattr(objective, "means", nn.Module()).modules():
        for buffer in module.buffers():
            buffer.zero_()


def seeded(fn, *args):
    torch.manual_seed(1)
    return fn(*args)


def test_every_public_objective_is_listed():
    public = {n for n in pyro_vi_ext.__all__ if isinstance(getattr(pyro_vi_ext, n), type)}
    public = {n for n in public if issubclass(getattr(pyro_vi_ext, n), Objective)}
    assert public == {name.split("-")[0] for name in OBJECTIVES}


def same(objective, a, b):
    """Equal bit for bit; chunk by chunk, the parts of a gradient are added in another order."""
    if getattr(objective, "chunk_size", None) is None:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-4 if a.dtype == torch.float32 else 1e-10, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("objective, name", cases(OBJECTIVES))
def test_entry_points_agree(objective, name, particles, dtype):
    torch.set_default_dtype(dtype)
    x = DATA.to(dtype)
    model, guide, objective = make(objective, name, **PARTICLES[particles])
    if objective is None:
        return
    module = objective(model, guide)

    first = seeded(module, x)  # creates the parameters
    parameters = list(module.parameters())
    assert parameters and len({id(p) for p in parameters}) == len(parameters)
    assert all(p.is_leaf and p.requires_grad for p in parameters)

    loss = seeded(objective.loss, model, guide, x)
    assert isinstance(loss, float)
    assert first.item() == pytest.approx(
        loss, rel=0, abs=1e-9 if first.dtype == torch.float64 else 1e-4
    )
    rewind(objective)
    differentiable = seeded(objective.differentiable_loss, model, guide, x)
    assert differentiable.dim() == 0 and differentiable.item() == loss
    assert differentiable.dtype == torch.get_default_dtype()
    grads = torch.autograd.grad(differentiable, parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)

    for p in parameters:
        p.grad = None
    rewind(objective)
    assert seeded(objective.loss_and_grads, model, guide, x) == loss
    for p, g in zip(parameters, grads, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or same(objective, p.grad, g)

    for p in parameters:
        p.grad = None
    rewind(objective)
    seeded(module, x).backward()
    for p, g in zip(parameters, grads, strict=True):
        assert g is None or same(objective, p.grad, g)

    for p in parameters:
        p.grad = None
    before = [p.detach().clone() for p in parameters]
    rewind(objective)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss=objective)
    assert seeded(svi.step, x) == loss
    assert seeded(svi.evaluate_loss, x) != loss
    for p, b, g in zip(parameters, before, grads, strict=True):
        if g is not None:
            torch.testing.assert_close(p.detach(), b - 1e-3 * g, rtol=1e-6, atol=1e-7)


SHORT = {"module", "subsampled", "codes", "bits-chain"}
THOROUGH = {"ImportanceWeightedELBO-dreg", "TraceRELAX_ELBO"}


def compiled_cases():
    """Some pairs for every objective, every pair for some objectives; the rest is slow."""
    for objective in OBJECTIVES:
        for name in PAIRS:
            discrete = objective in DISCRETE and "bits" not in name
            short = name in SHORT or objective in THOROUGH and not discrete
            mark = () if short else pytest.mark.slow
            yield pytest.param(objective, name, id=f"{objective}-{name}", marks=mark)


def not_compiled(objective: str, name: str) -> bool:
    """Chunks draw twice; inverse autoregressive flows are inverted to score detached draws."""
    rescored = ("Semi", "-stl", "-dreg", "STL", "LAX", "all")
    flow = name == "AutoIAFNormal" and any(part in objective for part in rescored)
    return objective == "ImportanceWeightedELBO-chunks" or flow


@pytest.mark.parametrize("objective, name", list(compiled_cases()))
def test_compiled_steps_are_plain_steps(objective, name):
    x = DATA.to(torch.float64)
    found = []
    for kind in (SVI, partial(pyro_vi_ext.CompiledSVI, backend="eager")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, made = make(objective, name, num_particles=3)
        if made is None:
            return
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=made)
        losses = [svi.step(x)]
        try:
            losses += [svi.step(x) for _ in range(3)]
        except pyro_vi_ext.CannotCompile:
            assert kind is not SVI and not_compiled(objective, name)
            return
        leaves = dict(pyro.get_param_store().named_parameters())
        buffers = getattr(made, "means", nn.Module()).state_dict()
        found.append((losses, leaves, buffers, torch.get_rng_state()))
        pyro.clear_param_store()
    (losses, leaves, buffers, rng), (ours, our_leaves, our_buffers, our_rng) = found
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-10, atol=1e-10)
    for a, b in ((leaves, our_leaves), (buffers, our_buffers)):
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-8, atol=1e-9)
    assert torch.equal(rng, our_rng)


@pytest.mark.parametrize("objective, name", cases(TRAINED))
def test_torch_optimizer_lowers_the_loss(objective, name):
    x = DATA.to(torch.float64)
    num_particles = 30 if objective in DISCRETE else 3
    model, guide, objective = make(objective, name, num_particles=num_particles)
    if objective is None:
        return
    module = objective(model, guide)
    module(x)
    learned = getattr(objective, "learned", None)
    learned = set() if learned is None else {id(p) for p in learned.parameters()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.0 if id(p) in learned else 0.3)
    before = sum(seeded(lambda: [module(x).item() for _ in range(20)]))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    after = sum(seeded(lambda: [module(x).item() for _ in range(20)]))
    assert after < before


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("objective, name", cases(OBJECTIVES))
def test_set_up_leaves_the_random_state_alone(objective, name, particles):
    model, guide = PAIRS[name]()
    x = DATA.to(torch.float64)
    objective = OBJECTIVES[objective](**PARTICLES[particles])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    objective._structure(model, guide, (x,), {})
    assert torch.equal(torch.get_rng_state(), state)


OTHERS = ("masked", "imput", "bits")
NO_MIXING = [n for n in PAIRS if "semi" not in n.lower() and not n.startswith(OTHERS)]


@pytest.mark.parametrize("name", NO_MIXING)
@pytest.mark.parametrize(
    "objective",
    [
        pyro_vi_ext.SemiImplicitELBO(num_mixing_particles=7),
        pyro_vi_ext.ImportanceWeightedELBO(num_particles=1),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_elbo_equals_stock_trace_elbo(objective, name):
    """Same seed, same draws, same number: the reference is Pyro's own ELBO and its gradient."""
    model, guide = PAIRS[name]()
    x = DATA.to(torch.float64)
    module = objective(model, guide)
    seeded(module, x)
    parameters = list(module.parameters())
    ours = seeded(module, x)
    stock = seeded(Trace_ELBO().differentiable_loss, model, guide, x)
    torch.testing.assert_close(ours, stock)
    for a, b in zip(
        torch.autograd.grad(ours, parameters, allow_unused=True),
        torch.autograd.grad(stock, parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)

"""Four wrong numbers of RenyiELBO and psis_diagnostic of pyro.infer, beside ours and exact ones."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from pyro.infer.importance import psis_diagnostic

from pyro_vi_ext import ImportanceWeightedELBO, guide_report


def print_stock(args):
    subsampling()
    discrete_site()
    module_interface()
    local_latents()


def subsampling(num_data=100, num_particles=10, repeats=500):
    x = dist.Normal(0.0, 2**0.5).sample((num_data,))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()

    def model(batch):
        with pyro.plate("data", num_data, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(batch):
        with pyro.plate("data", num_data, subsample_size=batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    print(f"\n1. subsampling: N = {num_data}, K = {num_particles}, log p(x) = {exact:.2f}")
    print(f"{'B':>5} {'RenyiELBO(alpha=0)':>19} {'ImportanceWeightedELBO':>23} {'se':>6}")
    stock = RenyiELBO(
        alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1
    )
    ours = ImportanceWeightedELBO(num_particles)
    for batch in (num_data, 50, 10, 1):
        bounds = torch.tensor(
            [[-o.loss(model, guide, batch) for o in (stock, ours)] for _ in range(repeats)]
        )
        mean, error = bounds.mean(0), bounds.std(0) / repeats**0.5
        print(f"{batch:>5} {mean[0]:>19.2f} {mean[1]:>23.2f} {error[1]:>6.2f}")


def discrete_site(num_particles=4, repeats=5000):
    x, start = torch.tensor(0.8), 0.5

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide():
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("logit", lambda: torch.tensor(start))))

    logit, bound = torch.tensor(start, requires_grad=True), 0.0
    for values in itertools.product([0.0, 1.0], repeat=num_particles):
        b = torch.tensor(values)
        log_q = dist.Bernoulli(logits=logit).log_prob(b)
        log_w = dist.Bernoulli(0.3).log_prob(b) + dist.Normal(b, 1.0).log_prob(x) - log_q
        bound = bound + log_q.sum().exp() * (log_w.logsumexp(0) - math.log(num_particles))
    (exact,) = torch.autograd.grad(bound, logit)

    print(f"\n2. a Bernoulli site in the guide, K = {num_particles}: d bound / d logit")
    print(f"{'exact, by enumeration':>25} {exact.item():>9.4f}")
    for objective in (
        RenyiELBO(
            alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=0
        ),
        ImportanceWeightedELBO(num_particles),
    ):
        draws = []
        for _ in range(repeats):
            pyro.clear_param_store()
            objective.loss_and_grads(model, guide)
            grad = pyro.param("logit").grad
            draws.append(0.0 if grad is None else -grad.item())
        draws = torch.tensor(draws)
        error = draws.std() / repeats**0.5
        print(f"{type(objective).__name__:>25} {draws.mean():>9.4f} +- {error:.4f}")


def module_interface():
    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.tensor(0.0)
    print("\n3. objective(model, guide)()")
    for objective in (RenyiELBO(num_particles=2), ImportanceWeightedELBO(2)):
        try:
            found = f"loss {objective(model, guide)().item():.4f}"
        except AttributeError as error:
            found = f"AttributeError: {error}"
        print(f"{type(objective).__name__:>25}  {found}")


def local_latents(num_particles=1000):
    print("\n4. a guide 13% too narrow: KL(q || p) = 0.018 nats for each datum")
    print(f"{'N':>6} {'psis_diagnostic':>16} {'guide_report: k > 0.7':>22} {'largest k':>10}")
    for num_data in (100, 1000):
        x = dist.Normal(0.0, 2**0.5).sample((num_data,))

        def model(x=x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x=x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.87 * 0.5**0.5))

        stock = psis_diagnostic(
            model,
            guide,
            num_particles=num_particles,
            max_simultaneous_particles=num_particles,
            max_plate_nesting=1,
        )
        k = guide_report(model, guide, num_particles=num_particles).pareto_k
        bad = f"{int((k > 0.7).sum())} of {num_data}"
        print(f"{num_data:>6} {stock:>16.2f} {bad:>22} {k.max():>10.2f}")

r"""From a fitted guide to an ArviZ object, for both generations of ArviZ.

.. math::

    \log w_s = \log p(x, z_s) - \log q(z_s), \qquad z_s \sim q, \quad s = 1, \dots, S.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence

import torch

from pyro_vi_ext.draws import Draws, Variable, draw
from pyro_vi_ext.objective import positive_int

__all__ = ["from_pyro_svi"]

_INSTALL = "pip install pyro_vi_ext[arviz]"
_SAMPLE_DIMS = ("chain", "draw")


def from_pyro_svi(
    model,
    guide,
    *args,
    num_draws: int = 1000,
    num_mixing_particles: int = 1000,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    batch_size: int | None = None,
    max_plate_nesting: float = float("inf"),
    vectorize_particles: bool = True,
    format: str = "auto",
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
    **kwargs,
):
    r"""Draw from a fitted guide, and hand the draws to ArviZ with all that the model says of them.

    .. math::

        \log w_s = \log p(x, z_s) - \log q(z_s), \qquad z_s \sim q, \quad s = 1, \dots, S,

    in nats, with every term unscaled (neither :math:`N/B` nor ``poutine.scale``) and masks applied
    as in the objectives. For a guide with mixing variables :math:`\log q` is :math:`\log h_K`
    (arXiv:1805.11183; own :math:`\psi` included, ``K = num_mixing_particles``, the extra draws
    shared within a batch). If the guide is the exact posterior every :math:`\log w_s` is
    :math:`\log p(x)`. A ``Delta`` guide (``AutoDelta``) has no density: its ``log_q`` is 0, and its
    ``log_weight`` no weight.

    ======================  ==========================================  =====================
    group                   variables                                   dimensions
    ======================  ==========================================  =====================
    posterior               latents and ``pyro.deterministic`` sites    chain, draw, plates, event
    log_likelihood          observed sites; NaN where masked            chain, draw, plates
    posterior_predictive    observed sites, drawn anew                  chain, draw, plates, event
    observed_data           observed sites; NaN where masked            plates, event
    sample_stats            ``log_p``, ``log_q``, ``log_weight``        chain, draw
    ======================  ==========================================  =====================

    There is one chain, and ``draw`` has size S. Plates are dimensions under their own names, from
    left to right; dimensions of events are called ``{variable}_dim_{i}`` as by ArviZ, with ``i``
    the position after ``draw``. Batch dimensions of size 1 that are no plates are dropped, and
    ``/`` in a name becomes ``.``. Sites of the guide that are not in the model (noise,
    unconstrained twins of latents) are left out, and so are ``pyro.factor`` and sites observed at
    a function of latents, which are no data (both are part of ``log_p``). With ``obs_mask`` the
    site ``x`` gives the data ``x_observed``, the latent ``x_unobserved`` and the completed ``x``;
    a masked entry of a latent is a draw of the guide that no data have shaped.

    A subsampled plate is walked in minibatches that cover each index once, at the same global
    latents, so that dimensions have the full size and ``log_p`` and ``log_q`` count every datum.
    The model must then index its data by the plate's indices (checked).

    The draws are independent, so r-hat and the effective sample size of a summary say nothing
    about the fit: use ``summary(data, kind="stats")``, and judge the guide by ``log_weight``. With
    masked data, let ``loo`` see the other entries: ``az.loo(data.isel(plate=indices))``. PSIS-LOO
    that accounts for the guide's error:
    ``arviz_stats.loo_approximate_posterior(data, data["sample_stats"]["log_p"],
    data["sample_stats"]["log_q"])``.

    :param model: the model, as given to ``SVI``.
    :param guide: the fitted guide; any guide of Pyro or of this package. Sites need not be
        reparameterised.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_draws: S, an integer >= 1.
    :param num_mixing_particles: K of :math:`h_K`, an integer >= 0; used if there are mixing
        variables. With ``vectorize_particles=False`` the guide runs S K times.
    :param posterior_predictive: whether to draw new data, one set for each draw.
    :param log_likelihood: whether to keep the pointwise log-likelihood.
    :param batch_size: draws per vectorised run, which bounds the memory. By default as many as keep
        a run's values (K times those of conditionals on mixing variables) to 2^24 numbers.
    :param max_plate_nesting: as in :class:`~pyro_vi_ext.SemiImplicitELBO`.
    :param vectorize_particles: make draws in one run each batch (checked against single runs), or
        one by one, for models that cannot be vectorised.
    :param format: ``"inferencedata"`` (arviz 0.x), ``"datatree"`` (xarray, for arviz >= 1 or
        arviz-base), or ``"auto"``: the first if arviz 0.x is installed.
    :param coords: dimension -> values; by default 0, 1, 2, ...
    :param dims: variable -> names of its event dimensions, or of all but chain and draw.
    :param seed: draw with this seed, and leave the random state as it was.
    :returns: ``arviz.InferenceData`` or ``xarray.DataTree``.
    :raises ImportError: without ArviZ of the format asked for.
    :raises ValueError: for arguments out of range; draws, data or log-probabilities that are NaN or
        infinite; data in a subsampled plate that do not follow its indices; a plate with
        ``subsample=...``; a global site that changes with the minibatch; a model that mixes draws
        when vectorised; batch dimensions that are no plates; ``coords`` or ``dims`` that do not
        fit; the errors of the objectives. Site or plate are named.
    :raises NotImplementedError: for several subsampled plates, a sequential one, or sites that are
        not in all draws.

    Reference: A. Vehtari, A. Gelman and J. Gabry, *Practical Bayesian model evaluation using
    leave-one-out cross-validation and WAIC*, 2017, arXiv:1507.04544.

    Example: the guide is the exact posterior N(1, 1/2), so each log-weight is log p(x).

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import from_pyro_svi
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 2**0.5), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(1.0, 0.5**0.5))
    >>> x = torch.tensor([1.0, 3.0])
    >>> data = from_pyro_svi(model, guide, x, num_draws=500, format="datatree", seed=0)
    >>> dict(data["log_likelihood"]["x"].sizes)
    {'chain': 1, 'draw': 500, 'data': 2}
    >>> data["sample_stats"]["log_weight"].values[0, :3].round(3)
    array([-4.378, -4.378, -4.378], dtype=float32)
    """
    make = _output(format)
    num_draws = positive_int("num_draws", num_draws)
    num_mixing_particles = positive_int("num_mixing_particles", num_mixing_particles, 0)
    if batch_size is not None:
        batch_size = positive_int("batch_size", batch_size)
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        draws = draw(
            model,
            guide,
            args,
            kwargs,
            num_draws=num_draws,
            num_mixing_particles=num_mixing_particles,
            posterior_predictive=posterior_predictive,
            log_likelihood=log_likelihood,
            batch_size=batch_size,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
    attrs = _attributes()
    if draws.has_mixing:
        attrs["num_mixing_particles"] = num_mixing_particles
    return make(_datasets(draws, coords or {}, dims or {}, attrs), attrs)


# --- formats ----------------------------------------------------------------------------------


def _output(format: str):
    """The function that turns datasets by group into the format's object."""
    if format not in ("auto", "inferencedata", "datatree"):
        raise ValueError(f"format must be 'auto', 'inferencedata' or 'datatree', got {format!r}.")
    arviz = _version("arviz")
    legacy = arviz is not None and arviz.startswith("0.")
    if format == "auto":
        format = "inferencedata" if legacy else "datatree"
    if format == "inferencedata":
        if not legacy:
            found = "is not installed" if arviz is None else f"{arviz} is installed"
            raise ImportError(
                f"format='inferencedata' needs arviz < 1, but arviz {found}. Use format='datatree' "
                f"with arviz >= 1, or on Python 3.10 and 3.11: {_INSTALL}"
            )
        return functools.partial(_inference_data, _import_arviz(arviz))
    if (arviz is None or legacy) and _version("arviz-base") is None:
        raise ImportError(
            "format='datatree' needs arviz >= 1 or arviz-base, and neither is installed: "
            f"{_INSTALL} (on Python 3.12 or newer), or pip install arviz-base arviz-stats "
            "arviz-plots"
            if legacy
            else f"from_pyro_svi needs ArviZ, which is not installed: {_INSTALL}"
        )
    return _data_tree


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_arviz(version: str):
    try:
        return importlib.import_module("arviz")
    except Exception as e:
        raise ImportError(
            f"arviz {version} is installed but cannot be imported: {type(e).__name__}: {e}. "
            "(arviz 0.x needs matplotlib < 3.11.) Repair it, or use format='datatree'."
        ) from e


def _inference_data(arviz, datasets: dict, attrs: dict):
    return arviz.InferenceData(attrs=attrs, **datasets)


def _data_tree(datasets: dict, attrs: dict):
    xarray = importlib.import_module("xarray")
    tree = xarray.DataTree.from_dict({f"/{name}": data for name, data in datasets.items()})
    tree.attrs.update(attrs)
    return tree


def _attributes() -> dict:
    return {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "creation_library": "pyro_vi_ext",
        "creation_library_version": _version("pyro_vi_ext") or "unknown",
        "inference_library": "pyro",
        "inference_library_version": _version("pyro-ppl") or "unknown",
        "inference_method": "vi",
    }


# --- datasets ---------------------------------------------------------------------------------


def _datasets(draws: Draws, coords: Mapping, dims: Mapping, attrs: dict) -> dict:
    stats = {"log_p": draws.log_p, "log_q": draws.log_q, "log_weight": draws.log_p - draws.log_q}
    groups = {
        "observed_data": draws.observed_data,
        "posterior": draws.posterior,
        "posterior_predictive": draws.posterior_predictive,
        "log_likelihood": draws.log_likelihood,
        "sample_stats": {name: Variable(values, ()) for name, values in stats.items()},
    }
    full = {}  # names of all dimensions by variable, the log_likelihood having no event dimensions
    arrays, sizes = {}, {}
    for group, variables in groups.items():
        for site, variable in variables.items():
            name, array = _safe(site), variable.values.detach().cpu().numpy()
            names = _dims(name, variable, dims.get(site, dims.get(name)), group, full)
            if group == "observed_data":
                array = array[0]
            else:
                array, names = array[None], (*_SAMPLE_DIMS, *names)
            if name in arrays.setdefault(group, {}):
                raise ValueError(f"Two sites are called '{name}' once '/' is '.'. Rename one.")
            arrays[group][name] = (names, array)
            for dim, size in zip(names, array.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"Dimension '{dim}' has size {size} at site '{site}' and {sizes[dim]} "
                        "elsewhere. Give the plates different names, or name the event dimension "
                        f"by dims={{'{site}': [...]}}."
                    )
    _check_names(arrays, sizes, coords, dims)
    return {group: _dataset(group_arrays, coords, attrs) for group, group_arrays in arrays.items()}


def _dims(name, variable: Variable, given, group, full) -> tuple[str, ...]:
    """Names of the dimensions of a variable without chain and draw."""
    if group == "log_likelihood":  # summed over the event
        return full[name][: len(variable.plates)]
    plates = [_safe(plate) for plate in variable.plates]
    for plate in plates:
        if plate in _SAMPLE_DIMS:
            raise ValueError(f"A plate called '{plate}' clashes with ArviZ's '{plate}'. Rename it.")
    rank = variable.values.dim() - 1
    names = [*plates, *(f"{name}_dim_{i}" for i in range(len(plates), rank))]
    if given is not None:
        given = [given] if isinstance(given, str) else list(given)
        if len(given) not in (rank, rank - len(plates)):
            raise ValueError(
                f"dims of '{name}' has {len(given)} names ({given}) but the variable has "
                f"{rank - len(plates)} event dimensions, and {rank} with its plates {plates}."
            )
        names[rank - len(given) :] = given
    full[name] = tuple(names)
    return full[name]


def _check_names(arrays: dict, sizes: dict, coords: Mapping, dims: Mapping) -> None:
    variables = {name for group in arrays.values() for name in group}
    for name in dims:
        if _safe(name) not in variables:
            raise ValueError(
                f"dims names '{name}', which is no variable. Variables: {sorted(variables)}."
            )
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(
                f"coords names '{dim}', which is no dimension. Dimensions: {sorted(sizes)}."
            )
        if len(values) != sizes[dim]:
            raise ValueError(
                f"coords of '{dim}' has {len(values)} values, but the dimension has size "
                f"{sizes[dim]}."
            )
    for dim in sizes:
        if dim in variables:
            raise ValueError(
                f"'{dim}' is both a dimension and a variable. Rename the plate or the site."
            )


def _dataset(arrays: dict, coords: Mapping, attrs: dict):
    xarray = importlib.import_module("xarray")
    sizes = {
        d: n for dims, array in arrays.values() for d, n in zip(dims, array.shape, strict=True)
    }
    values = {dim: coords.get(dim, range(size)) for dim, size in sizes.items()}
    return xarray.Dataset(arrays, {d: list(v) for d, v in values.items()}, attrs)


def _safe(name: str) -> str:
    """Pyro's scopes put '/' into names, which NetCDF and DataTree keep for groups."""
    return name.replace("/", ".")

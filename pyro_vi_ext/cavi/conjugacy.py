r"""The conjugacy test: which statistics of a factor a term of the log joint may have.

.. math:: \log p(x, z) = \sum_{\text{terms}} c \prod_i t_i(z_i)

has a closed-form update for factor i if each term has one statistic of its family, and no more.
The terms also decide which axes of Gaussian sites have a joint covariance: those that meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_vi_ext.cavi.derivation import Latent, NotConjugateError
from pyro_vi_ext.cavi.factor import Factor
from pyro_vi_ext.cavi.families import FAMILIES, GAUSSIAN, LOG_NORMAL, GaussianAxes
from pyro_vi_ext.cavi.gaussian_block import GaussianBlock
from pyro_vi_ext.cavi.gaussian_layout import Member, Precision
from pyro_vi_ext.cavi.symbolic import Atom, Label, same_entry

__all__ = ["Use", "make_block", "make_factor", "moment_of"]

PRECISIONS = ("Gamma", "Exponential", "InverseGamma", "Wishart")


@dataclass(frozen=True, eq=False)
class Use:
    """What one term has of a factor.

    :ivar source: the site whose log-density has the term.
    :ivar atoms: the statistics of the factor's sites.
    :ivar elsewhere: labels in all other parts of the term.
    """

    source: str
    atoms: tuple[Atom, ...]
    elsewhere: frozenset[Label]


def moment_of(factor, use: Use) -> tuple[str, tuple]:
    """The key of the statistic that a term has of a factor, and its entries."""
    if isinstance(factor, GaussianBlock):
        return _block_moment(factor, use)
    atoms = use.atoms
    if factor.family not in (GAUSSIAN, LOG_NORMAL):
        return _key(atoms[0]), atoms[0].entries
    first, second = atoms[0], atoms[-1]
    if len(atoms) == 2 or (first.stat[0] == "pow" and first.stat[1] == 2):
        return "xx", (*first.entries, *(second.entries[axis] for axis in factor.axes.joint))
    return "x", first.entries


# --- one site ------------------------------------------------------------------------------------


def make_factor(latent: Latent, uses: Sequence[Use]) -> Factor:
    """The factor of one site.

    :raises NotConjugateError: if a term has a statistic that its family has not.
    """
    family = FAMILIES.get(latent.kind)
    joint: set[int] = set()
    for use in uses:
        joint |= _joint_axes(latent, use)
    if family is None:
        raise NotConjugateError(
            f"Latent site '{latent.name}': no closed-form factor is known for the prior "
            f"{latent.kind}."
        )
    axes = GaussianAxes(latent.shape, tuple(sorted(joint)))
    return Factor(
        latent.name, latent.kind, family, axes, latent.num_values, latent.weight, latent.plates
    )


def _joint_axes(latent: Latent, use: Use) -> set[int]:
    """Axes of a Gaussian latent in which two of its entries meet; raises if the term is refused."""
    atoms, family = use.atoms, FAMILIES.get(latent.kind)
    powers = sum(atom.stat[1] for atom in atoms if atom.stat[0] == "pow")
    if family in (GAUSSIAN, LOG_NORMAL):
        base = "log" if family is LOG_NORMAL else "pow"
        if any(atom.stat[0] != base for atom in atoms):
            raise _refused(use, latent)
        degree = len(atoms) if base == "log" else powers
        if degree not in (1, 2) or any(len(a.stat) > 1 and a.stat[1] not in (1, 2) for a in atoms):
            raise _refused(use, latent)
        return _meeting(atoms) if len(atoms) == 2 else set()
    key = _key(atoms[0]) if len(atoms) == 1 else None
    if family is not None and key not in family.keys:
        raise _refused(use, latent)
    return set()


def _meeting(atoms: Sequence[Atom]) -> set[int]:
    """Axes in which the entries of two atoms of a site differ."""
    pairs = zip(*(atom.entries for atom in atoms), strict=True)
    return {axis for axis, (a, b) in enumerate(pairs) if not same_entry(a, b)}


def _refused(use: Use, latent: Latent) -> NotConjugateError:
    return NotConjugateError(
        f"Site '{use.source}': its log-density has {_shown(use)}, and the factor of latent "
        f"'{latent.name}' ({latent.kind}) has a closed-form update for "
        f"{_allowed(latent.kind)} only. Change its prior or its place in the model, or use a "
        "stochastic guide for it."
    )


def _allowed(kind: str) -> str:
    texts = {
        "x": "the value", "xx": "products of two values", "log": "its logarithm",
        "log1m": "the logarithm of 1 less it", "pow1": "the value", "pow-1": "its reciprocal",
        "onehot": "one indicator", "logdet": "its log-determinant",
    }  # fmt: skip
    family = FAMILIES.get(kind)
    if family is None:
        return "no statistic"
    return " and ".join(texts[key] for key in family.keys if key in texts)


def _shown(use: Use) -> str:
    return " x ".join(map(_show, use.atoms))


def _show(atom: Atom) -> str:
    kind = atom.stat[0]
    if kind == "pow":
        power = atom.stat[1]
        return atom.site if power == 1 else f"{atom.site}^{power:g}"
    names = {"log": "log {}", "log1m": "log(1 - {})", "onehot": "[{} = k]", "logdet": "log |{}|"}
    return names.get(kind, kind + "({})").format(atom.site)


def _key(atom: Atom) -> str:
    return f"pow{atom.stat[1]:g}" if atom.stat[0] == "pow" else atom.stat[0]


# --- several sites -------------------------------------------------------------------------------


def make_block(latents: Sequence[Latent], uses: Sequence[Use]) -> GaussianBlock:
    """The joint factor of Gaussian sites, and of their precision if it is among them.

    :raises ValueError: if the sites are others.
    :raises NotConjugateError: if a term has no statistic of such a factor.
    """
    names = tuple(latent.name for latent in latents)
    gaussians = [x for x in latents if FAMILIES.get(x.kind) is GAUSSIAN]
    precisions = [x for x in latents if x.kind in PRECISIONS]
    if len(gaussians) + len(precisions) < len(latents) or not gaussians or len(precisions) > 1:
        kinds = ", ".join(f"'{x.name}' ({x.kind})" for x in latents)
        raise ValueError(
            f"Block {names}: found {kinds}. A block has one Gaussian site or more, and at most one "
            "precision or variance with a Gamma, Exponential, InverseGamma or Wishart prior."
        )
    weights = {latent.weight for latent in latents}
    if len(weights) > 1:
        raise ValueError(f"Block {names}: its sites are in plates of different subsample scales.")
    precision = precisions[0] if precisions else None
    matrix = {x.name: None for x in gaussians}
    for use in uses:
        _check_degree(use, names, precision)
    if precision is not None and precision.kind == "Wishart":
        matrix = {x.name: _matrix_axis(x, precision, uses, names) for x in gaussians}
    batch = _shared_axes(gaussians, matrix, uses)
    sizes = tuple(gaussians[0].shape[a] for a in batch[gaussians[0].name])
    members = tuple(Member(x.name, x.shape, batch[x.name], matrix[x.name]) for x in gaussians)
    own = None
    if precision is not None:
        rank = len(precision.shape) - 2 * (precision.kind == "Wishart")
        axes: list[int | None] = []
        for axis in range(rank):
            axes.append(_block_axis(precision, axis, members, sizes, axes, uses, names))
        own = Precision(precision.name, precision.kind, precision.shape, tuple(axes))
    plates = tuple((plate, x.name, axis) for x in latents for plate, axis in x.plates)
    block = GaussianBlock(members, sizes, own, weights.pop(), plates)
    for use in uses:
        _block_moment(block, use)
    return block


def _parts(use: Use, names: Sequence[str]) -> tuple[list[Atom], list[Atom]]:
    """Atoms of the sites named, one for each factor of the product; and the others."""
    inside: list[Atom] = []
    for atom in use.atoms:
        if atom.site in names:
            whole = atom.stat[0] == "pow" and atom.stat[1] in (1, 2)
            inside += [atom] * (int(atom.stat[1]) if whole else 3)
    return inside, [atom for atom in use.atoms if atom.site not in names]


def _check_degree(use: Use, names: tuple[str, ...], precision: Latent | None) -> None:
    """A term has at most two Gaussian values, and with them the precision once."""
    own = None if precision is None else precision.name
    values, rest = _parts(use, [name for name in names if name != own])
    if precision is None:
        good = 1 <= len(values) <= 2
    else:
        keys = FAMILIES[precision.kind].keys
        key = _key(rest[0]) if len(rest) == 1 else None
        good = key in keys and len(values) <= (2 if key == keys[1] else 0)
    if not good:
        raise _block_refused(use, names, precision)


def _block_refused(use: Use, names: tuple[str, ...], precision: Latent | None, why: str = ""):
    if precision is None:
        allowed = "products of at most two values"
    else:
        of = f"1/{precision.name}" if precision.kind == "InverseGamma" else precision.name
        log = "log-determinant" if precision.kind == "Wishart" else "logarithm"
        allowed = f"{of}, its {log}, and {of} times at most two of the other values"
    return NotConjugateError(
        f"Site '{use.source}': its log-density has {_shown(use)}, and the joint factor of {names} "
        f"has a closed-form update for {allowed} only{why}. The priors of its Gaussian sites must "
        "have the block's precision too, times a known number; or leave the block out."
    )


def _matrix_axis(latent: Latent, precision: Latent, uses, names) -> int:
    """The axis of a Gaussian latent that is contracted with a Wishart precision."""
    axes = set(range(len(latent.shape)))
    for use in uses:
        values, rest = _parts(use, [latent.name])
        ends = [e for a in rest if a.site == precision.name for e in a.entries[-2:]]
        for atom in values:
            entries = enumerate(atom.entries)
            axes &= {i for i, e in entries if isinstance(e, Label) and any(e is x for x in ends)}
            if not axes:
                raise _block_refused(use, names, precision)
    return min(axes)


def _shared_axes(gaussians: Sequence[Latent], matrix: dict, uses) -> dict[str, tuple[int, ...]]:
    """The axes of each Gaussian site in which no two elements meet, in one order for all sites."""
    first, others = gaussians[0], gaussians[1:]
    mapped = {first.name: {a: a for a in range(len(first.shape)) if a != matrix[first.name]}}
    for other in others:
        axes = [a for a in range(len(other.shape)) if a != matrix[other.name]]
        found: dict[int, int] = {}
        for axis in mapped[first.name]:
            size = first.shape[axis]
            choices = [a for a in axes if a not in found.values() and other.shape[a] == size]
            both = [pair for use in uses if (pair := _pair(use, first.name, other.name))]
            for a in choices:
                if both and all(same_entry(x.entries[axis], y.entries[a]) for x, y in both):
                    found[axis] = a
                    break
        mapped[other.name] = found
    shared = [axis for axis in mapped[first.name] if all(axis in m for m in mapped.values())]
    names = [latent.name for latent in gaussians]
    for use in uses:
        values, _ = _parts(use, names)
        if len(values) == 2:
            x, y = values
            shared = [
                axis
                for axis in shared
                if same_entry(x.entries[mapped[x.site][axis]], y.entries[mapped[y.site][axis]])
            ]
    return {name: tuple(mapped[name][axis] for axis in shared) for name in names}


def _pair(use: Use, first: str, second: str) -> tuple[Atom, Atom] | None:
    """The atoms of two sites, if a term has both."""
    x = next((a for a in use.atoms if a.site == first), None)
    y = next((a for a in use.atoms if a.site == second), None)
    return None if x is None or y is None else (x, y)


def _block_axis(precision: Latent, axis: int, members, sizes, taken, uses, names) -> int | None:
    """Which axis of the block's batch is an axis of the precision, of those not taken."""
    size = precision.shape[axis]
    choices = [c for c in range(len(sizes)) if c not in taken and sizes[c] == size]
    together = False
    for use in uses:
        for member in members:
            pair = _pair(use, precision.name, member.name)
            if pair is not None:
                t, x = pair
                together = True
                choices = [
                    c for c in choices if same_entry(t.entries[axis], x.entries[member.batch[c]])
                ]
    if together and choices:
        return choices[0]
    if precision.shape[axis] == 1:
        return None
    raise NotConjugateError(
        f"Block {names}: axis {axis} of '{precision.name}', of size {precision.shape[axis]}, is no "
        f"axis of '{members[0].name}' whose elements are independent given it, so that they have "
        "no joint factor in closed form. Leave the block out."
    )


def _block_moment(block: GaussianBlock, use: Use) -> tuple[str, tuple]:
    precision = block.precision
    names = [member.name for member in block.members]
    values, rest = _parts(use, names)
    members = {member.name: member for member in block.members}
    values = sorted(values, key=lambda atom: names.index(atom.site))
    if not values:
        return _key(rest[0]), rest[0].entries
    columns: list = [None] * len(values)
    if precision is not None and precision.is_matrix:
        columns = _contracted(block, values, rest[0], use)
    elif precision is not None:
        _check_batch(block, values, rest[0], use)
    (x, *others), (column, *_) = values, columns
    a = members[x.site]
    if not others:
        entries = list(x.entries)
        if a.matrix is not None:
            entries[a.matrix] = column
        return f"x:{names.index(a.name)}", tuple(entries)
    b = members[others[0].site]
    entries = [x.entries[axis] for axis in a.plain]
    key = f"xx:{names.index(a.name)}:{names.index(b.name)}"
    return key, (*entries, *(others[0].entries[axis] for axis in b.joint))


def _contracted(block: GaussianBlock, values: list[Atom], t: Atom, use: Use) -> list:
    """What a Wishart precision's ends are contracted with: for one value, the label of T x."""
    _check_batch(block, values, t, use)
    members = {member.name: member for member in block.members}
    ends = list(t.entries[-2:])
    own = [x.entries[members[x.site].matrix] for x in values]
    others = [e for x in values for i, e in enumerate(x.entries) if i != members[x.site].matrix]
    others += t.entries[:-2]
    used = use.elsewhere.union(*([e] if isinstance(e, Label) else e.labels for e in others))
    free = isinstance(ends[0], Label) and isinstance(ends[1], Label) and ends[0] is not ends[1]
    for label in own:
        if not free or not any(label is e for e in ends) or label in used:
            raise _block_refused(use, block.sites, block.precision, ", contracted with each other")
        ends = [e for e in ends if e is not label]
    return ends or [None]


def _check_batch(block: GaussianBlock, values: list[Atom], t: Atom, use: Use) -> None:
    """Values and precision are at the same place of the block's batch."""
    members = {member.name: member for member in block.members}
    for x in values:
        for axis, place in enumerate(block.precision.batch):
            own = None if place is None else x.entries[members[x.site].batch[place]]
            if own is not None and not same_entry(own, t.entries[axis]):
                raise _block_refused(use, block.sites, block.precision, ", of the same element")

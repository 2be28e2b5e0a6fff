r"""The rotation trick (Fifty et al. 2024, arXiv:2410.06424).

.. math::

    \tilde q = \lambda R\, z_e = e_k, \qquad \lambda = \frac{\lVert e_k \rVert}{\lVert z_e \rVert},
    \qquad R = I - 2 r r^\top + 2 \hat e \hat z^\top, \qquad
    r = \frac{\hat z + \hat e}{\lVert \hat z + \hat e \rVert},

with :math:`\hat z, \hat e` the directions of :math:`z_e, e_k`. R is the rotation in their plane
that takes one to the other. Held constant in the backward pass, the gradient at :math:`z_e` is
:math:`\lambda R^\top g` instead of :math:`g`: it depends on where in its cell the vector lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_ext.code_sites import straight_through

__all__ = ["rotate"]


def rotate(z_e: Tensor, z_q: Tensor) -> Tensor:
    r"""The value of ``z_q``, exactly, with the gradient :math:`\lambda R^\top` to ``z_e``.

    Where either is the zero vector no rotation exists, and the gradient is that of the
    straight-through estimator. For opposite vectors R is the reflection that takes one to the
    other, the limit of the formula without r.

    :param z_e: encoder outputs, shape (..., D).
    :param z_q: their codes, shape (..., D).

    Reference: C. Fifty et al., *Restructuring Vector Quantization with the Rotation Trick*, ICLR
    2025, arXiv:2410.06424.

    Example: a quarter turn, and twice the length.

    >>> import torch
    >>> z_e = torch.tensor([1.0, 0.0], requires_grad=True)
    >>> z_q = rotate(z_e, torch.tensor([0.0, 2.0]))
    >>> z_q.tolist(), torch.autograd.grad(z_q[1], z_e)[0].round(decimals=4).tolist()
    ([0.0, 2.0], [2.0, 0.0])
    """
    with torch.no_grad():
        norms = [v.norm(dim=-1, keepdim=True) for v in (z_e, z_q)]
        possible = (norms[0] > 0) & (norms[1] > 0)
        z, e = (v / n.where(possible, 1.0) for v, n in zip((z_e, z_q), norms, strict=True))
        r = torch.nn.functional.normalize(z + e, dim=-1)
        stretch = norms[1] / norms[0].where(possible, 1.0)

    def dot(a, b):
        return (a * b).sum(-1, keepdim=True)

    rotated = stretch * (z_e - 2 * r * dot(r, z_e) + 2 * e * dot(z, z_e))
    return straight_through(torch.where(possible, rotated, z_e), z_q)

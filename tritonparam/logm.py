"""Real principal logarithms of one matrix, [n, n] in fp64: the right inverse of the exponential.

Each function raises ValueError with the property that leaves the matrix without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonparam.numerics import identity_like


def symmetric(a: Tensor) -> Tensor:
    """log A, exactly symmetric, of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh((a + a.mT) / 2)
    if bool((values <= 0).any()):
        raise ValueError(f"a symmetric matrix with eigenvalue {float(values[0]):.1e}")
    log = (vectors * values.log()) @ vectors.mT
    return (log + log.mT) / 2


def orthogonal(q: Tensor, eps: float) -> Tensor:
    """log Q, exactly skew, of an orthogonal matrix without eigenvalue -1.

    X = I - 2(I + Q)⁻¹ is skew, so that iX is Hermitian: iX = V diag(λ) Vᴴ has
    log Q = Re(V diag(-2i atan λ) Vᴴ). Repeated eigenvalues do no harm. `eps` is the rounding
    that q has been through: entries of X beyond eps**-0.5 are not told from an eigenvalue -1.
    """
    inverse, info = torch.linalg.inv_ex(identity_like(q) + q)
    x = identity_like(q) - 2 * inverse
    if int(info) != 0 or float(x.abs().max()) > eps**-0.5:
        raise ValueError("an orthogonal matrix with eigenvalue -1")
    values, vectors = torch.linalg.eigh(1j * (x - x.mT) / 2)
    log = ((vectors * (-2j * values.atan())) @ vectors.mH).real
    return (log - log.mT) / 2


def general(a: Tensor, tolerance: float) -> Tensor:
    """log A by inverse scaling and squaring.

    Square roots until A^(1/2^k) is near I, then the [12/12] Padé approximant of log(I + Y) as
    Gauss-Legendre partial fractions, sum_j w_j Y (I + x_j Y)⁻¹ (Higham, Functions of Matrices,
    2008, sections 11.4 and 11.5). The result is accepted if its exponential is A to `tolerance`.
    """
    values = torch.linalg.eigvals(a)
    # No eigenvalue on the closed negative real axis, which is where the principal branch ends.
    on_cut = (values.imag == 0) & (values.real <= 0)
    if bool(on_cut.any()):
        raise ValueError(f"a matrix with eigenvalue {float(values.real[on_cut].min()):.1e}")
    eye = identity_like(a)
    root, halvings = a, 0
    try:
        while float(torch.linalg.matrix_norm(root - eye, 1)) > 0.25 and halvings < 64:
            root, halvings = _square_root(root), halvings + 1
    except torch.linalg.LinAlgError:
        raise ValueError("a matrix that is singular to rounding") from None
    y = root - eye
    k = torch.arange(1, 12, dtype=torch.float64, device=a.device)
    jacobi = torch.diag(0.5 / (1 - (2 * k) ** -2).sqrt(), 1)  # of the Legendre polynomials
    nodes, vectors = torch.linalg.eigh(jacobi + jacobi.mT)
    log = torch.zeros_like(a)
    for node, weight in zip((1 + nodes) / 2, vectors[0] ** 2, strict=True):
        log += weight * torch.linalg.solve(eye + node * y, y)
    log *= 2.0**halvings
    exp = torch.matrix_exp(torch.stack((log, torch.zeros_like(log))))[0]
    error = float((exp - a).norm() / a.norm())
    if not error <= tolerance:
        raise ValueError(f"a matrix whose logarithm could be computed only to {error:.1e}")
    return log


def _square_root(a: Tensor) -> Tensor:
    """The principal square root by the scaled product form of the Denman-Beavers iteration.

    Higham 2008, eq. 6.29 and 6.30: M -> I, X -> A^(1/2), determinantal scaling until it settles.
    """
    n, eye = a.size(-1), identity_like(a)
    m, x = a, a
    for _ in range(50):
        scale = float((torch.linalg.slogdet(m)[1] / (-2 * n)).exp())
        scale = scale if abs(scale - 1) > 1e-2 else 1.0
        inverse = torch.linalg.inv(m) / scale**2
        x = scale / 2 * (x + x @ inverse)
        m = (eye + (scale**2 * m + inverse) / 2) / 2
        if float(torch.linalg.matrix_norm(m - eye, 1)) < 1e-15 * n:
            break
    return x

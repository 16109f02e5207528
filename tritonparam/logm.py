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


def orthogonal(q: Tensor) -> Tensor:
    """log Q, exactly skew, of an orthogonal matrix with determinant 1; angles are in [-π, π].

    Eigenvectors of Q + Qᵀ part the planes that Q turns by more from the others, at a gap between
    the cosines; then neither Q there nor -Q here has an eigenvalue near -1. Repeated angles do no
    harm, and neither does π: that plane may be turned either way.
    """
    q = _nearest_orthogonal(q)
    cosines, vectors = torch.linalg.eigh((q + q.mT) / 2)
    ends = cosines.new_tensor([-1.0, 1.0])
    between = torch.cat((ends[:1], cosines, ends[1:])).clamp(-0.7, 0.7)
    split = int(between.diff().argmax())
    if split % 2:
        raise ValueError("an orthogonal matrix with determinant -1")
    log = torch.zeros_like(q)
    for basis, sign in ((vectors[:, :split], -1), (vectors[:, split:], 1)):
        x, y, angles = _planes(sign * basis.mT @ q @ basis)
        log += (basis @ y * (angles if sign == 1 else angles - torch.pi)) @ (basis @ x).mT
    return log - log.mT


def _nearest_orthogonal(q: Tensor) -> Tensor:
    """That of q, which its dtype has rounded, by Newton-Schulz iteration."""
    for _ in range(8):
        defect = identity_like(q) - q.mT @ q
        q = q + q @ defect / 2
        if float(defect.abs().max()) < 1e-8:  # the next one would be its square
            break
    return q


def _planes(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal x, y by columns, and angles in [0, π), with log Q = Σ angle (y xᵀ - x yᵀ).

    X = I - 2(I + Q)⁻¹ is skew, so that iX is Hermitian, with an eigenvalue tan(angle / 2) for the
    eigenvector x + i y. As the angle goes to 0 that pair loses its orthogonality, but QR restores
    it: planes come by falling angle, and what is left is turned by nothing.
    """
    x = identity_like(q) - 2 * torch.linalg.inv(identity_like(q) + q)
    tangents, vectors = torch.linalg.eigh(1j * (x - x.mT) / 2)
    n = q.size(-1) // 2
    tangents, vectors = tangents.flip(0)[:n], vectors.flip(1)[:, :n]
    basis, r = torch.linalg.qr(torch.view_as_real(vectors).flatten(1))
    basis = torch.where(r.diagonal() < 0, -basis, basis)
    return basis[:, ::2], basis[:, 1::2], 2 * tangents.atan()


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

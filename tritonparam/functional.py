"""The maps as differentiable functions of tensors, fused as chains are.

fp16 and bf16 are computed in fp32 and rounded once, fp64 in fp64, whatever autocast says. Where a
fused form does not apply (``torch.func`` transforms, forward-mode differentiation, complex dtypes,
tensor subclasses, ``use_path("composed")``) the links of the same meaning are evaluated.
"""

from __future__ import annotations

from torch import Tensor, nn

from tritonparam import registry
from tritonparam.links import CayleyMap, MatrixExponential, Skew, Symmetric
from tritonparam.orthogonal import Orthogonal, is_orthonormal, require_map, require_matrix, tall
from tritonparam.rules import RULES

_SKEW, _SYMMETRIC, _EXP = Skew(), Symmetric(), MatrixExponential()


def _evaluate(links: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return registry.evaluate(RULES, links, x)


def skew_cayley(w: Tensor, signature: Tensor | None = None) -> Tensor:
    """The orthogonal matrix (I + X)(I - X)⁻¹ diag(signature) with X = triu(w, 1) - triu(w, 1)ᵀ.

    Arguments:
        w: [..., n, n], floating-point.
        signature: ±1, [..., n], without gradient; None means ones.

    Returns:
        A tensor of w's shape and dtype, twice differentiable in w.

    Raises:
        ValueError: w is not square, or the signature does not have the shape w.shape[:-1].

    >>> import torch
    >>> q = skew_cayley(torch.tensor([[0., 1.], [0., 0.]]))
    >>> torch.allclose(q, torch.tensor([[0., 1.], [-1., 0.]]))
    True
    """
    if signature is not None and signature.shape != w.shape[:-1]:
        raise ValueError(
            f"skew_cayley: signature must have shape {list(w.shape[:-1])}, got "
            f"{list(signature.shape)}; one sign for each column of each matrix."
        )
    cayley = CayleyMap()
    cayley.signature = w.new_ones(w.shape[:-1]) if signature is None else signature.detach().to(w)
    return _evaluate((_SKEW, cayley), w)


def skew_exp(w: Tensor) -> Tensor:
    """The rotation exp(X) with X = triu(w, 1) - triu(w, 1)ᵀ.

    Arguments, result and errors as for ``skew_cayley``.

    >>> import torch
    >>> q = skew_exp(torch.tensor([[0., torch.pi], [0., 0.]]))
    >>> torch.allclose(q, -torch.eye(2), atol=1e-6)
    True
    """
    return _evaluate((_SKEW, _EXP), w)


def symmetric_exp(w: Tensor) -> Tensor:
    """The positive definite matrix exp(S) with S = triu(w) + triu(w, 1)ᵀ, exactly symmetric.

    Arguments, result and errors as for ``skew_cayley``. Eigenvalues below the largest one times
    the dtype's eps are lost in its rounding.

    >>> import torch
    >>> symmetric_exp(torch.zeros(2, 2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    return _evaluate((_SYMMETRIC, _EXP), w)


def matrix_exp(a: Tensor) -> Tensor:
    """The exponential of any square matrices [..., n, n]; result and errors as ``skew_cayley``.

    >>> import torch
    >>> matrix_exp(torch.zeros(1, 1))
    tensor([[1.]])
    """
    return _evaluate((_EXP,), a)


def orthogonal(
    x: Tensor, orthogonal_map: str = "matrix_exp", *, base: Tensor | None = None
) -> Tensor:
    """A matrix with orthonormal columns (rows, if it is wide) made of any matrix.

    The maps of ``tritonparam.Orthogonal``, which says what they compute; nothing n × n is made of
    a tall [n, k].

    Arguments:
        x: [..., n, k], real floating-point.
        orthogonal_map: "matrix_exp", "cayley" or "householder".
        base: the base point, of x's shape, orthonormal, without gradient. It is read by the host
            to check that. For the tall Householder map it is any matrix of reflectors and signs.

    Returns:
        A tensor of x's shape and dtype, twice differentiable in x.

    Raises:
        ValueError: there is no such map, x is not a matrix, or `base` does not fit or is not
            orthonormal.
        TypeError: x is not real floating-point.

    >>> import torch
    >>> q = orthogonal(torch.randn(5, 3), "cayley")
    >>> torch.allclose(q.T @ q, torch.eye(3), atol=1e-5)
    True
    """
    require_map("orthogonal", orthogonal_map)
    require_matrix("orthogonal", x)
    link = Orthogonal(orthogonal_map)
    if base is not None:
        if base.shape != x.shape:
            raise ValueError(
                f"orthogonal: base must have the shape of x, {list(x.shape)}, got "
                f"{list(base.shape)}."
            )
        reflectors = orthogonal_map == "householder" and x.size(-1) != x.size(-2)
        if not reflectors and not is_orthonormal(tall(base.detach().double()), base.dtype):
            raise ValueError(
                "orthogonal: base must have orthonormal columns (rows, if it is wide), which it "
                "has not; project it first, for example with torch.linalg.qr."
            )
        link.base = base.detach()
    return _evaluate((link,), x)

"""One call for one constraint, with the signatures of ``torch.nn.utils.parametrizations``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

from tritonparam.links import MatrixExponential, NoPreimage, Skew, Symmetric
from tritonparam.orthogonal import Orthogonal, require_map, require_matrix
from tritonparam.register import register_parametrization


def _tensor(who: str, module: nn.Module, name: str) -> Tensor:
    x = getattr(module, name, None)
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{who}: name must be that of a parameter, a buffer or a parametrized tensor of "
            f"{type(module).__name__}, got {name!r}."
        )
    return x


def orthogonal(
    module: nn.Module,
    name: str = "weight",
    orthogonal_map: str | None = None,
    *,
    use_trivialization: bool = True,
) -> nn.Module:
    """Make a weight orthogonal: orthonormal columns if it is tall, rows if it is wide.

    ``torch.nn.utils.parametrizations.orthogonal``, fused, for weights [..., n, k] of any shape:
    square, tall, wide, conv kernels (whose last two dimensions are the matrix), batches. For a
    tall or wide weight with a base point, torch keeps an n × n matrix; here base and parameter are
    n × k and every system is k × k, so that checkpoints of such weights are not torch's.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name; fp16, bf16, fp32 or fp64.
        orthogonal_map: "matrix_exp" (the default for a square weight), "cayley" or "householder"
            (the default for others).
        use_trivialization: train from a base point, which is the orthogonal factor of the weight
            at registration or assignment. Without it the exponential and Cayley map cannot be
            assigned to, and the weight becomes the map of its values.

    Returns:
        The module. Its weight is the projection of what it was, by QR.

    Raises:
        ValueError: there is no such tensor or map, or the tensor is not a matrix.
        TypeError: the tensor is not real floating-point.

    >>> import torch
    >>> layer = orthogonal(nn.Linear(20, 40))
    >>> torch.allclose(layer.weight.T @ layer.weight, torch.eye(20), atol=1e-5)
    True
    """
    weight = _tensor("orthogonal", module, name)
    require_matrix("orthogonal", weight)
    if orthogonal_map is None:
        square = weight.size(-1) == weight.size(-2)
        orthogonal_map = "matrix_exp" if square else "householder"
    require_map("orthogonal", orthogonal_map)
    link = Orthogonal(orthogonal_map, use_trivialization=use_trivialization)
    return register_parametrization(module, name, link)


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Divide a weight by its spectral norm, by power iteration (Miyato et al. 2018).

    ``torch.nn.utils.parametrizations.spectral_norm``, fused: the same buffers, updated by every
    read in training mode. Where the norm is zero the weight is zero.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name, [out, ...].
        n_power_iterations: at each read in training mode, at least 1.
        eps: the smallest norm that is divided by.
        dim: the dimension of the outputs; None is 1 for transposed convolutions and 0 otherwise.

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor, or `n_power_iterations` is not positive.

    >>> import torch
    >>> layer = spectral_norm(nn.Linear(20, 40))
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1.1)
    True
    """
    weight = _tensor("spectral_norm", module, name)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if dim is None:
        dim = 1 if isinstance(module, transposed) else 0
    link = _SpectralNorm(weight, n_power_iterations, dim=dim, eps=eps)
    return register_parametrization(module, name, link)


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Separate a weight's norms from its directions: g v / ‖v‖ (Salimans & Kingma 2016).

    ``torch.nn.utils.parametrizations.weight_norm``, fused: `original0` is g, `original1` is v, and
    checkpoints of the legacy ``torch.nn.utils.weight_norm`` load. Where v is zero the weight is
    zero.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name.
        dim: the dimension over whose entries the norms are separate; None is one norm for all.

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor.

    >>> layer = weight_norm(nn.Linear(20, 40))
    >>> layer.parametrizations.weight.original0.shape
    torch.Size([40, 1])
    """
    _tensor("weight_norm", module, name)
    register_parametrization(module, name, _WeightNorm(dim), unsafe=True)

    def legacy(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for i, key in enumerate((f"{prefix}{name}_g", f"{prefix}{name}_v")):
            if key in state_dict:
                new = f"{prefix}parametrizations.{name}.original{i}"
                state_dict[new] = state_dict.pop(key)

    module.register_load_state_dict_pre_hook(legacy)
    return module


def symmetric(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a square weight symmetric: its upper triangle is kept. Returns the module.

    Raises ValueError if there is no such tensor, or it is not square.

    >>> import torch
    >>> layer = symmetric(nn.Linear(3, 3))
    >>> torch.equal(layer.weight, layer.weight.T)
    True
    """
    _tensor("symmetric", module, name)
    return register_parametrization(module, name, Symmetric())


def skew(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a square weight skew-symmetric: its upper triangle is kept. Returns the module.

    Raises ValueError if there is no such tensor, or it is not square.

    >>> import torch
    >>> layer = skew(nn.Linear(3, 3))
    >>> torch.equal(layer.weight, -layer.weight.T)
    True
    """
    _tensor("skew", module, name)
    return register_parametrization(module, name, Skew())


def spd(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a square weight symmetric positive definite: the exponential of a symmetric matrix.

    A weight that is positive definite keeps its value; any other becomes exp(S), S the symmetric
    matrix of its upper triangle. Positive definite matrices can be assigned.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name, [..., n, n].

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor, or it is not square.

    >>> import torch
    >>> layer = spd(nn.Linear(3, 3))
    >>> bool((torch.linalg.eigvalsh(layer.weight) > 0).all())
    True
    """
    value = _tensor("spd", module, name).detach().clone()
    register_parametrization(module, name, Symmetric(), MatrixExponential())
    with suppress(NoPreimage):
        setattr(module, name, value)
    return module


positive_definite = spd

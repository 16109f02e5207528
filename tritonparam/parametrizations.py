"""One call for one constraint, with the signatures of ``torch.nn.utils.parametrizations``."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized

from tritonparam.fuse import lists
from tritonparam.legacy import SPECTRAL_NORM_KEYS, WEIGHT_NORM_KEYS, load_legacy
from tritonparam.links import MatrixExponential, Skew, Symmetric
from tritonparam.orthogonal import Orthogonal, require_map, require_matrix
from tritonparam.preimage import NoPreimage, require_float
from tritonparam.register import register_parametrization
from tritonparam.stepped import SteppedSpectralNorm


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
    *,
    iterate: str = "read",
) -> nn.Module:
    """Divide a weight by its spectral norm, by power iteration (Miyato et al. 2018).

    ``torch.nn.utils.parametrizations.spectral_norm``, fused: the same buffers, updated by every
    read in training mode; checkpoints of the legacy ``torch.nn.utils.spectral_norm`` load. Where
    the norm is zero the weight is zero.

    With ``iterate="step"`` reading changes nothing, in training mode either, so that two forward
    passes, checkpointing or `cached` see one weight. The buffers follow the weight instead:
    ``step()`` of any ``torch.optim.Optimizer`` that holds its original, and found a gradient of
    it, runs the iterations once. An optimizer of another kind calls
    ``tritonparam.stepped.advance(link, original)``.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name, [out, ...]; fp16 and bf16 are computed in fp32.
        n_power_iterations: at each read in training mode, or at each step; at least 1.
        eps: the smallest norm that is divided by.
        dim: the dimension of the outputs; None is 1 for transposed convolutions and 0 otherwise.
        iterate: "read", as torch, or "step".

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor, `n_power_iterations` is not positive, `iterate` is
            another word, or "step" for a tensor that is parametrized already.
        TypeError: the tensor is not floating-point.
        IndexError: the tensor has no dimension `dim`.

    >>> import torch
    >>> layer = spectral_norm(nn.Linear(20, 40))
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1.1)
    True
    """
    if iterate not in ("read", "step"):
        raise ValueError(f'spectral_norm: iterate must be "read" or "step", got {iterate!r}.')
    weight, fresh = _tensor("spectral_norm", module, name), not is_parametrized(module, name)
    require_float("spectral_norm", weight)
    if iterate == "step" and not fresh:
        raise ValueError(
            f'spectral_norm: iterate="step" must be the first link, since it follows the original, '
            f'but {name} is parametrized already; use iterate="read", or register it first.'
        )
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if dim is None:
        dim = 1 if isinstance(module, transposed) else 0
    kind = SteppedSpectralNorm if iterate == "step" else _SpectralNorm
    link = kind(weight, n_power_iterations, dim=dim, eps=eps)
    register_parametrization(module, name, link)
    if isinstance(link, SteppedSpectralNorm):
        link.follow(lists(module)[name])
    if fresh:
        load_legacy(module, name, SPECTRAL_NORM_KEYS)
    return module


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Separate a weight's norms from its directions: g v / ‖v‖ (Salimans & Kingma 2016).

    ``torch.nn.utils.parametrizations.weight_norm``, fused: `original0` is g, `original1` is v, and
    checkpoints of the legacy ``torch.nn.utils.weight_norm`` load. Where v is zero the weight is
    zero.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name; fp16 and bf16 are computed in fp32.
        dim: the dimension over whose entries the norms are separate; None is one norm for all.

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor, or it is parametrized already.
        TypeError: the tensor is not floating-point.
        IndexError: the tensor has no dimension `dim`.

    >>> layer = weight_norm(nn.Linear(20, 40))
    >>> layer.parametrizations.weight.original0.shape
    torch.Size([40, 1])
    """
    require_float("weight_norm", _tensor("weight_norm", module, name))
    if is_parametrized(module, name):
        raise ValueError(
            "weight_norm: it must be the first link, since norms and directions take the place of "
            f"the original, but {name} is parametrized already; register weight_norm first."
        )
    register_parametrization(module, name, _WeightNorm(dim), unsafe=True)
    load_legacy(module, name, WEIGHT_NORM_KEYS)
    return module


def symmetric(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a square weight symmetric: its upper triangle is kept.

    Symmetric matrices can be assigned.

    Arguments:
        module: the module that has the tensor.
        name: the tensor's name, [..., n, n], of any dtype.

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor, or it is not square.

    >>> import torch
    >>> layer = symmetric(nn.Linear(3, 3))
    >>> torch.equal(layer.weight, layer.weight.T)
    True
    """
    _tensor("symmetric", module, name)
    return register_parametrization(module, name, Symmetric())


def skew(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a square weight skew-symmetric: its upper triangle is kept.

    Skew-symmetric matrices can be assigned. Arguments, result and errors as for ``symmetric``.

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
        name: the tensor's name, [..., n, n]; fp16 and bf16 are computed in fp32.

    Returns:
        The module.

    Raises:
        ValueError: there is no such tensor, or it is not square.
        TypeError: the tensor is not floating-point.

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

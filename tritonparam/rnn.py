"""Orthogonal RNNs: a constraint on every gate of a recurrent weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tritonparam.orthogonal import OrthogonalGates, require_map, require_matrix
from tritonparam.register import register_parametrization

_GATES: dict[type[nn.Module], int] = {
    nn.RNN: 1,
    nn.GRU: 3,
    nn.LSTM: 4,
    nn.RNNCell: 1,
    nn.GRUCell: 3,
    nn.LSTMCell: 4,
}


def orthogonal_gates(
    module: nn.Module,
    name: str = "weight_hh_l0",
    orthogonal_map: str = "matrix_exp",
    *,
    use_trivialization: bool = True,
) -> nn.Module:
    """Make each gate of a recurrent weight orthogonal.

    An RNN has 1 gate, a GRU 3, an LSTM 4, whose h × h blocks stand on one another in a weight
    [gates·h, h]. ``orthogonal`` makes the columns of the whole orthonormal, which leaves the blocks
    to shrink the state; here every block is an orthogonal matrix. All are computed in one step.

    Arguments:
        module: an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, or one of their cells.
        name: the weight's name: "weight_hh_l0", "weight_hh_l1_reverse", ..., "weight_hh" of a cell,
            or a "weight_ih" between states of the same size.
        orthogonal_map: "matrix_exp", "cayley" or "householder".
        use_trivialization: as in ``orthogonal``: train from the weight at registration.

    Returns:
        The module. Each gate is the projection of what it was, by QR.

    Raises:
        TypeError: the module is not one of these, or its dtype not real.
        ValueError: there is no such weight or map, its gates are not square, or it is parametrized
            already.

    >>> import torch
    >>> rnn = orthogonal_gates(nn.LSTM(3, 5), "weight_hh_l0", "cayley")
    >>> gates = rnn.weight_hh_l0.unflatten(0, (4, 5))
    >>> torch.allclose(gates.mT @ gates, torch.eye(5).expand(4, 5, 5), atol=1e-5)
    True
    """
    who = "orthogonal_gates"
    gates = next((n for cls, n in _GATES.items() if isinstance(module, cls)), None)
    if gates is None:
        raise TypeError(
            f"{who}: the module must be an nn.RNN, nn.GRU, nn.LSTM or one of their cells, got "
            f"{type(module).__name__}; orthogonal(module, name) constrains any other weight."
        )
    if is_parametrized(module, name):
        raise ValueError(
            f"{who}: {name} must not be parametrized, but it is already; "
            f"remove_parametrizations(module, {name!r}) makes it a plain weight."
        )
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        names = [n for n, _ in module.named_parameters(recurse=False) if n.startswith("weight_hh")]
        raise ValueError(
            f"{who}: name must be that of a weight of {type(module).__name__}, got {name!r}; "
            f"its recurrent weights are {', '.join(names) or 'parametrized already'}."
        )
    require_map(who, orthogonal_map)
    if weight.dim() != 2 or weight.size(0) != gates * weight.size(1):
        raise ValueError(
            f"{who}: {name} must have shape [{gates}·h, h], {gates} square gates, got "
            f"{list(weight.shape)}; that is the shape of every weight_hh where proj_size is 0."
        )
    require_matrix(who, weight)
    link = OrthogonalGates(gates, orthogonal_map, use_trivialization=use_trivialization)
    return register_parametrization(module, name, link)

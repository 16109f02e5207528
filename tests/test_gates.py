"""``orthogonal_gates``: each gate of a recurrent weight is orthogonal."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs

import tritonparam as tp
from tests.cases import composed, error, fused

GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}
every_cell = pytest.mark.parametrize("cell", GATES, ids=lambda cell: cell.__name__)
every_map = pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
H = 6


def recurrent(cell: type[nn.Module]) -> str:
    return "weight_hh" if issubclass(cell, nn.RNNCellBase) else "weight_hh_l0"


def defect(weight: torch.Tensor) -> float:
    """The largest max|QᵀQ - I| of the gates."""
    q = weight.detach().double().unflatten(0, (-1, weight.size(1)))
    return float((q.mT @ q - torch.eye(weight.size(1))).abs().max())


@every_map
@every_cell
def test_gates_are_orthogonal_and_torchs_one_by_one(cell, orthogonal_map):
    module, name = cell(3, H), recurrent(cell)
    blocks = [nn.Parameter(b.clone()) for b in getattr(module, name).detach().split(H)]
    weight = getattr(module, name)
    assert tp.orthogonal_gates(module, name, orthogonal_map) is module
    original = module.parametrizations[name].original
    assert original is weight
    assert original.shape == (GATES[cell] * H, H)
    assert defect(getattr(module, name)) < 1e-6
    # Below the diagonals, which torch's Householder map truncates to integers.
    step = 0.3 * torch.randn(GATES[cell], H, H).tril(-1).flatten(0, 1)
    expected = []
    for block, d in zip(blocks, step.split(H), strict=True):
        holder = nn.Module()
        holder.weight = block
        theirs.orthogonal(holder, "weight", orthogonal_map)
        expected.append(holder.weight.detach().clone())
        holder.parametrizations.weight.original.data.add_(d)
        expected.append(holder.weight.detach())
    assert torch.allclose(getattr(module, name), torch.cat(expected[::2]), atol=1e-6)
    with torch.no_grad():
        original.add_(step)
    assert torch.allclose(getattr(module, name), torch.cat(expected[1::2]), atol=1e-5)
    assert defect(getattr(module, name)) < 3e-6


@every_map
@pytest.mark.parametrize("use_trivialization", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_step_equals_the_links(orthogonal_map, use_trivialization, dtype, device):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3 * H, H))
    link = tp.OrthogonalGates(3, orthogonal_map, use_trivialization=use_trivialization)
    tp.register_parametrization(module.to(device, dtype), "weight", link)
    with torch.no_grad():
        module.parametrizations.weight.original.add_(0.3 * torch.randn(3 * H, H).to(device, dtype))
    assert tp.explain(module)[0].path != "composed"
    g = torch.randn(3 * H, H, device=device)
    y64, dw64 = composed(module, g)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for path in ("closed", "kernel") if orthogonal_map == "matrix_exp" else ("closed",):
        y, dw = fused(module, g, path)
        assert max(error(y, y64), error(dw, dw64)) <= tolerance
        assert y.dtype == dw.dtype == dtype
    with tp.use_path("composed"):
        assert error(module.weight.detach(), y64) <= tolerance


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_every_layer_and_direction(cell):
    rnn = cell(H, H, num_layers=2, bidirectional=True)
    names = [n for n, _ in rnn.named_parameters() if n.startswith("weight_hh")]
    for name in (*names, "weight_ih_l0"):  # square, as the input has the state's size
        tp.orthogonal_gates(rnn, name, "cayley")
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.1)
    tp.stats(reset=True)
    for _ in range(3):
        optimizer.zero_grad()
        rnn(torch.randn(4, 2, H))[0].square().mean().backward()
        optimizer.step()
    assert sum(tp.stats().values()) == 3 * 5
    for name in (*names, "weight_ih_l0"):
        assert defect(getattr(rnn, name)) < 3e-6


@every_map
def test_assignment_state_and_removal(orthogonal_map):
    rnn = tp.orthogonal_gates(nn.LSTM(3, H), "weight_hh_l0", orthogonal_map)
    q = torch.linalg.qr(torch.randn(4, H, H))[0].flatten(0, 1)
    rnn.weight_hh_l0 = q
    assert torch.allclose(rnn.weight_hh_l0, q, atol=1e-6)
    other = tp.orthogonal_gates(nn.LSTM(3, H), "weight_hh_l0", orthogonal_map)
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(other(x)[0], rnn(x)[0])
    with pytest.raises(tp.NoPreimage, match="must be finite"):
        rnn.weight_hh_l0 = q / 0
    with pytest.raises(ValueError, match=r"must have shape \[4·h, h\], got \[6, 6\]"):
        rnn.weight_hh_l0 = q[:H]
    assert torch.allclose(rnn.weight_hh_l0, q, atol=1e-6)
    assert torch.equal(deepcopy(rnn)(x)[0], rnn(x)[0])
    tp.remove_parametrizations(rnn, "weight_hh_l0")
    assert torch.allclose(rnn.weight_hh_l0, q, atol=1e-6)
    assert [n for n, _ in rnn.named_parameters()] == [
        n for n, _ in nn.LSTM(3, H).named_parameters()
    ]


def test_without_a_base_point_nothing_is_projected():
    rnn = nn.GRU(3, H)
    before = rnn.weight_hh_l0.detach().clone()
    tp.orthogonal_gates(rnn, "weight_hh_l0", "cayley", use_trivialization=False)
    assert torch.equal(rnn.parametrizations.weight_hh_l0.original, before)
    assert defect(rnn.weight_hh_l0) < 1e-6
    assert not [k for k in rnn.state_dict() if k.endswith("base")]
    with pytest.raises(tp.NoPreimage, match="without a base point"):
        rnn.weight_hh_l0 = torch.eye(H).repeat(3, 1)


def test_an_original_of_another_shape_is_not_fused():
    rnn = tp.orthogonal_gates(nn.GRU(3, H))
    plist = rnn.parametrizations.weight_hh_l0
    plist.original = nn.Parameter(torch.randn(2 * H, H))
    assert tp.explain(rnn)[0].reason == "the original has no square gates"
    with pytest.raises(ValueError, match=r"OrthogonalGates: the tensor must have shape \[3·h, h\]"):
        rnn.weight_hh_l0


@pytest.mark.parametrize(
    ("module", "arguments", "kind", "message"),
    [
        (nn.Linear(3, 3), ("weight",), TypeError, r"got Linear; orthogonal\(module, name\)"),
        (nn.LSTM(3, 4), ("weight_ih_l0",), ValueError, r"4 square gates, got \[16, 3\]"),
        (nn.LSTM(3, 4), ("bias_hh_l0",), ValueError, r"4 square gates, got \[16\]"),
        (nn.LSTM(3, 4, proj_size=2), (), ValueError, r"got \[16, 2\].* where proj_size is 0"),
        (nn.GRU(3, 4), ("weight_hh_l1",), ValueError, r"got 'weight_hh_l1'; .* are weight_hh_l0\."),
        (nn.GRU(3, 4), ("hidden_size",), ValueError, r"that of a weight of GRU, got 'hidden_size'"),
        (nn.RNN(3, 4), ("weight_hh_l0", "qr"), ValueError, r"one of matrix_exp, .* got 'qr'"),
    ],
)
def test_what_it_refuses(module, arguments, kind, message):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(kind, match=message):
        tp.orthogonal_gates(module, *arguments)
    assert type(module).__module__.startswith("torch")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_parametrized_weight_is_refused():
    rnn = tp.orthogonal_gates(nn.GRU(3, H))
    with pytest.raises(
        ValueError, match=r"weight_hh_l0 must not be parametrized, .* 'weight_hh_l0'"
    ):
        tp.orthogonal_gates(rnn)
    with pytest.raises(ValueError, match="are parametrized already"):
        tp.orthogonal_gates(rnn, "weight")
    assert len(rnn.parametrizations.weight_hh_l0) == 1


def test_repr_says_the_gates():
    link = tp.OrthogonalGates(3, "cayley")
    assert repr(link) == "OrthogonalGates(3, 'cayley', use_trivialization=True)"

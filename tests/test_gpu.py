"""What only a GPU shows: no synchronisation, graph capture, cuDNN."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonparam as tp
from tests.cases import CASES, error, fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPES = {
    "square": [(16, 8, 8), (16, 32, 32), (64, 64), (128, 128), (256, 256), (512, 512)],
    "tall": [(3, 33, 16), (512, 64), (4096, 64), (700, 100)],
    "layer": [(64, 27), (128, 1152), (512, 4608)],
}
every_chain = pytest.mark.parametrize(
    ("case", "shape"),
    [
        pytest.param(case, shape, id=f"{case.name}-{'x'.join(map(str, shape))}")
        for case in CASES
        for shape in SHAPES[case.form]
    ],
)


def prepare(case, shape):
    """A module, what comes in, and the path that the chain takes here."""
    module = case.module(case.original(shape, 1.0, torch.float32).cuda())
    (row,) = tp.explain(module)
    assert row.path != "composed", row
    return module, torch.randn(shape, device="cuda"), row.path


@every_chain
def test_a_fused_chain_never_synchronises(case, shape):
    module, g, path = prepare(case, shape)
    fused(module, g, path)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(module, g, path)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_closed_forms_never_synchronise(case):
    shape = case.shape(64)
    module = case.module(case.original(shape, 5.0, torch.float32).cuda())
    g = torch.randn(shape, device="cuda")
    expected = fused(module, g, "closed")  # makes the tables of coefficients
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = fused(module, g, "closed")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@every_chain
def test_capture_and_replay(case, shape):
    module, g, path = prepare(case, shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(module, g, path)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dw = fused(module, g, path)
    with torch.no_grad():
        for original in module.parametrizations.weight.parameters():
            original.mul_(-0.5)
    graph.replay()
    expected = fused(module, g, path)
    for x, reference in zip((y, dw), expected, strict=True):
        if path == "kernel":
            assert torch.equal(x, reference)
        else:  # cuBLAS may take another kernel under capture: 80 eps
            assert error(x, reference) <= 1e-5


def test_other_devices_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = CASES[0]
    original = case.original((3, 8, 8), 1.0, torch.float32).to("cuda:1")
    y, _ = fused(case.module(original), torch.ones_like(original), "kernel")
    assert y.device == original.device


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_cudnn_rnn(cell):
    rnn = cell(8, 16, batch_first=True)
    gates = rnn.weight_hh_l0.size(0) // 16
    if gates == 1:
        tp.register_parametrization(rnn, "weight_hh_l0", tp.Skew(), tp.CayleyMap())
    else:
        tp.register_parametrization(rnn, "weight_hh_l0", tp.Pruning(torch.ones(gates * 16, 16)))
    x = torch.randn(4, 10, 8)
    results = []
    for device in ("cpu", "cuda"):
        rnn.to(device).zero_grad()
        y, _ = rnn(x.to(device))
        y.square().sum().backward()
        results.append([y.detach().cpu(), rnn.parametrizations.weight_hh_l0.original.grad.cpu()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.allclose(on_cpu, on_gpu, rtol=1e-3, atol=1e-3)  # cuDNN may use TF32


@pytest.mark.parametrize("layout", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_cudnn_takes_weights_that_are_evaluated_once(cell, layout):
    rnn = cell(8, 16, **layout)
    names = [n for n, _ in rnn.named_parameters() if n.startswith("weight_hh")]
    for name in names:
        tp.orthogonal_gates(rnn, name, "cayley")
    x = torch.randn(10, 4, 8)
    on_cpu = _gradients_of_two_forwards(rnn, x)
    rnn.cuda()
    storages = [p.data_ptr() for p in rnn.parameters()]
    rnn.flatten_parameters()
    tp.stats(reset=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_gpu = _gradients_of_two_forwards(rnn, x.cuda())
        assert sum(tp.stats().values()) == 2 * len(names)
        with tp.cached():  # of weights that both forwards share
            shared = _gradients_of_two_forwards(rnn, x.cuda())
    for reference, *found in zip(on_cpu, on_gpu, shared, strict=True):
        for dw in found:
            assert error(dw.cpu().flatten()[None], reference.flatten()[None]) <= 1e-4
    assert [p.data_ptr() for p in rnn.parameters()] == storages
    for name in names:
        tp.remove_parametrizations(rnn, name)
    rnn(x.cuda())[0].sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


def _gradients_of_two_forwards(rnn, x):
    """Both are differentiated at once, so that neither may write to what the other has saved."""
    loss = rnn(x)[0].square().mean() + rnn(2 * x)[0].square().mean()
    return torch.autograd.grad(loss, list(rnn.parameters()))

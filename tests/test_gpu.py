"""What only a GPU shows: no synchronisation, graph capture, cuDNN."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonparam as tp
from tests.cases import CASES, fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
chains = pytest.mark.parametrize(
    "case", [case for case in CASES if case.max_kernel_n], ids=lambda case: case.name
)


@chains
@pytest.mark.parametrize("shape", [(16, 8, 8), (16, 32, 32), (64, 64), (2, 130, 130)])
def test_the_kernel_never_synchronises(case, shape):
    original = case.original(shape, 1.0, torch.float32).cuda()
    module, g = case.module(original), torch.randn(shape, device="cuda")
    fused(module, g, "kernel")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(module, g, "kernel")
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


@chains
@pytest.mark.parametrize("shape", [(16, 8, 8), (16, 32, 32), (64, 64), (2, 130, 130)])
def test_capture_and_replay(case, shape):
    original = case.original(shape, 1.0, torch.float32).cuda()
    module, g = case.module(original), torch.randn(shape, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(module, g, "kernel")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dw = fused(module, g, "kernel")
    with torch.no_grad():
        for original in module.parametrizations.weight.parameters():
            original.mul_(-0.5)
    graph.replay()
    expected = fused(module, g, "kernel")
    assert torch.equal(y, expected[0])
    assert torch.equal(dw, expected[1])


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

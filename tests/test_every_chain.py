"""What torch does around a weight, for every chain: export, transforms, autocast, optimizers."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tritonparam as tp
from tests.cases import CASES, Case

chains = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NO_JVP = {"householder_at_base": "ormqr", "weight_norm": "_weight_norm_interface"}  # torch 2.13

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default]  # what a checkpoint may keep


class Net(nn.Module):
    """A weight and what reads it, in eval mode."""

    def __init__(self, case: Case, n: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = case.shape(n)
        self.inner = case.module(case.original(self.shape, 1.0, dtype))

    @property
    def originals(self) -> dict[str, torch.Tensor]:
        names = self.inner.parametrizations.weight.named_parameters()
        return {f"inner.parametrizations.weight.{name}": x for name, x in names}

    def forward(self, x):
        return torch.tanh(self.inner.weight @ x)


@chains
def test_export(case):
    net = Net(case)
    x = torch.randn(net.shape[-1], 2)
    exported = torch.export.export(net, (x,))
    assert torch.allclose(exported.module()(x), net(x), atol=1e-6)


@chains
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
def test_functional_transforms(case):
    net = Net(case)
    x = torch.randn(net.shape[-1], 2)
    names, originals = zip(*net.originals.items(), strict=True)
    originals = tuple(o.detach() for o in originals)

    def loss(*originals):
        state = dict(zip(names, originals, strict=True))
        return torch.func.functional_call(net, state, (x,)).square().sum()

    expected = torch.autograd.grad(net(x).square().sum(), list(net.originals.values()))
    tp.stats(reset=True)
    assert torch.allclose(loss(*originals), net(x).square().sum(), rtol=1e-5)
    assert tp.stats() == {"kernel": 0, "closed": 2, "composed": 0}
    everything = tuple(range(len(originals)))
    gradient = torch.func.grad(loss, argnums=everything)(*originals)
    for mine, theirs in zip(gradient, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    many = [torch.stack([o, 1.5 * o]) for o in originals]
    each = [loss(*[m[i] for m in many]) for i in range(2)]
    assert torch.allclose(torch.func.vmap(loss)(*many), torch.stack(each), rtol=1e-3)
    tangents = tuple(torch.randn_like(o) for o in originals)
    if case.name in NO_JVP:
        with pytest.raises(NotImplementedError, match=NO_JVP[case.name]):
            torch.func.jvp(loss, originals, tangents)
        return
    _, forward = torch.func.jvp(loss, originals, tangents)
    products = [(dx * t).sum() for dx, t in zip(expected, tangents, strict=True)]
    assert torch.allclose(forward, sum(products), rtol=1e-3, atol=1e-4)


@chains
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_and_16_bits(case, dtype, device):
    """Under autocast the map is what it is without; of 16 bits it is computed in fp32."""
    inner = Net(case, 16).to(device).inner
    xs = list(inner.parametrizations.weight.parameters())
    expected = inner.weight
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, xs, g)
    with torch.autocast(device, dtype):
        weight = inner.weight
        assert torch.equal(weight, expected)
        for mine, theirs in zip(torch.autograd.grad(weight, xs, g), gradients, strict=True):
            assert torch.equal(mine, theirs)
    low = deepcopy(inner).to(dtype)
    high = deepcopy(low).double()
    with torch.autocast(device, dtype):
        assert low.weight.dtype == dtype
        difference = (low.weight.double() - high.weight).abs().max()
    size = high.weight.abs().max()
    # Rounded once: half an eps, and as much again for vectors u and v that are rounded as well.
    assert (
        difference <= (2 if case.name == "spectral_norm" else 0.6) * torch.finfo(dtype).eps * size
    )


@chains
@pytest.mark.parametrize("how", ["reentrant", "saved", "selective"])
def test_activation_checkpoints(case, how, device):
    net = Net(case).to(device)
    x = torch.randn(net.shape[-1], 2, device=device, requires_grad=True)
    inputs = [*net.originals.values(), x]
    expected = torch.autograd.grad(net(x).sum(), inputs)
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)}
    more = selective if how == "selective" else {}
    checkpoint(net, x, use_reentrant=how == "reentrant", **more).sum().backward()
    for mine, theirs in zip(inputs, expected, strict=True):
        assert torch.allclose(mine.grad, theirs, atol=1e-6)


@chains
def test_meta_device_then_load_or_assign(case):
    source = Net(case)
    with torch.device("meta"):
        net = Net(case)
    assert net.inner.weight.is_meta
    net.to_empty(device="cpu")
    for x in net.state_dict().values():
        x.fill_(torch.nan)
    if case.form == "square" or case.base:  # which are set as a whole, buffers too
        net.inner.weight = source.inner.weight.detach()
        assert torch.allclose(net.inner.weight, source.inner.weight, atol=1e-5)
    net.load_state_dict(source.state_dict())
    assert torch.equal(net.inner.weight, source.inner.weight)


@pytest.mark.parametrize("how", ["foreach", "fused", "loop"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers(how, kind, device):
    """However it writes to the originals, inside of ``cached()`` too, training is that in fp64."""
    tall, square = Net(CASES[4]).inner, Net(CASES[0]).inner
    model = nn.ModuleList([square, tall, Net(CASES[-1]).inner]).to(device)
    x = torch.randn(5, 2, device=device)
    results = []
    for dtype in (torch.float64, torch.float32):
        copy = deepcopy(model).to(dtype)
        options = {} if how == "loop" else {how: True}
        optimizer = kind(copy.parameters(), lr=0.05, **({"foreach": False} | options))
        for _ in range(5):
            with tp.cached(copy):
                for _ in range(2):
                    optimizer.zero_grad()
                    y = x.to(dtype)
                    sum((m.weight @ y).sin().sum() for m in copy).backward()
                    optimizer.step()
        results.append([m.weight for m in copy])
    for before, mine, theirs in zip(model, *reversed(results), strict=True):
        assert torch.allclose(mine.double(), theirs, atol=1e-4)
        assert not torch.allclose(mine, before.weight, atol=1e-2)

"""The norms of torch.nn.utils that live in hooks, and fuse(model, legacy=True)."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import utils

import tritonparam as tp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        utils.spectral_norm(nn.Conv2d(3, 4, 3)),
        utils.spectral_norm(nn.ConvTranspose2d(4, 5, 3), n_power_iterations=2, eps=1e-10),
        utils.weight_norm(nn.Conv2d(5, 6, 3), dim=1),
        nn.Flatten(),
        utils.weight_norm(nn.Linear(96, 7), dim=None),
        utils.spectral_norm(nn.Linear(7, 2)),
    ).double()


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
KEYS = [
    "0.bias",
    "0.parametrizations.weight.original",
    "0.parametrizations.weight.0._u",
    "0.parametrizations.weight.0._v",
]


def test_a_converted_model_is_the_same_model():
    net = model()
    net(X).square().sum().backward()
    net.eval()
    expected = net(X)
    params, buffers = list(net.parameters()), list(net.buffers())
    grads, random = [p.grad for p in params], torch.get_rng_state()
    assert tp.fuse(net, legacy=True, strict=True) is net
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(net.parameters(), params, strict=True))
    assert all(a.grad is g for a, g in zip(net.parameters(), grads, strict=True))
    assert all(a is b for a, b in zip(net.buffers(), buffers, strict=True))
    assert list(net.state_dict())[: len(KEYS)] == KEYS
    tp.stats(reset=True)
    torch.testing.assert_close(net(X), expected, rtol=1e-13, atol=1e-14)
    assert tp.stats() == {"kernel": 0, "closed": 5, "composed": 0}
    assert not any(m._forward_pre_hooks or m._state_dict_hooks for m in net.modules())
    link = net[1].parametrizations.weight[0]
    assert (link.dim, link.n_power_iterations, link.eps, link.training) == (1, 2, 1e-10, False)
    tp.remove_parametrizations(net[0], "weight")
    torch.testing.assert_close(net(X), expected, rtol=1e-13, atol=1e-14)


def test_an_optimizer_goes_on_training_it():
    """In eval mode: in train mode spectral norm is half an iteration apart."""
    results: list[list[torch.Tensor]] = []
    for convert in (False, True):
        net = model().eval()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        if convert:
            tp.fuse(net, legacy=True)
        results.append([])
        for _ in range(4):
            optimizer.zero_grad()
            y = net(X)
            y.square().sum().backward()
            optimizer.step()
            results[-1].append(y)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(results[0][0], results[0][-1], rtol=0.01)


def test_weight_norm_trains_as_its_hook():
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).double()
        if convert:
            tp.fuse(net, legacy=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            net(X[..., 0, :3].flatten(0, 1)).square().sum().backward()
            optimizer.step()
        results.append(list(net.parameters()))
    for x, y in zip(*(sorted(r, key=lambda p: tuple(p.shape)) for r in results), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def test_power_iterations_reach_the_same_norm():
    mine = utils.spectral_norm(nn.Linear(6, 5).double())
    legacy = deepcopy(mine)
    tp.fuse(mine, legacy=True)
    for _ in range(500):
        weight = mine.weight
        legacy(X.new_ones(1, 6))
    torch.testing.assert_close(weight, legacy.weight, rtol=1e-10, atol=0)


def test_old_checkpoints_load():
    old = model().state_dict()
    expected = {name: x.clone() for name, x in old.items()}
    converted = model()
    tp.fuse(converted, legacy=True)
    for net in (converted, deepcopy(converted)):
        with torch.no_grad():
            for x in net.state_dict().values():
                x.zero_()
        net.load_state_dict(old)
        new = net.state_dict()
        assert torch.equal(new["0.parametrizations.weight.original"], expected["0.weight_orig"])
        assert torch.equal(new["0.parametrizations.weight.0._v"], expected["0.weight_v"])
        assert torch.equal(new["2.parametrizations.weight.original1"], expected["2.weight_v"])
        net.load_state_dict(new)
    assert set(old) == set(expected)  # the caller's dict is left alone
    fresh = tp.spectral_norm(nn.Conv2d(3, 4, 3)).double()
    fresh.load_state_dict({k[2:]: v for k, v in old.items() if k.startswith("0.")})
    assert torch.equal(fresh.parametrizations.weight[0]._u, expected["0.weight_u"])
    with pytest.raises(RuntimeError, match="0._u"):
        broken = {k: v for k, v in old.items() if k != "0.weight_u"}
        converted.load_state_dict(broken)


def test_recurrent_weights():
    lstm = nn.LSTM(3, 4).double()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        utils.weight_norm(lstm, name)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected, _ = lstm(x)
    tp.fuse(lstm, legacy=True)
    torch.testing.assert_close(lstm(x)[0], expected)
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original0.grad.abs().max() > 0


def test_without_asking_they_stay_and_explain_lists_them():
    net = tp.fuse(model())
    assert type(net[0]) is nn.Conv2d
    rows = tp.explain(net)
    assert [row.name for row in rows][:3] == ["0.weight", "1.weight", "2.weight"]
    assert (rows[1].chain, rows[1].shape, rows[1].path) == (
        ("SpectralNorm",),
        (4, 5, 3, 3),
        "composed",
    )
    assert rows[2].reason == (
        "not parametrized: a hook of the legacy torch.nn.utils.weight_norm computes it; "
        "fuse(model, legacy=True) converts it"
    )
    tp.fuse(net, legacy=True)
    assert all(row.path != "composed" for row in tp.explain(net))
    tp.fuse(net, legacy=True)


@pytest.mark.parametrize("strict", [False, True])
def test_all_or_nothing(strict):
    net = model().eval()
    message = "strict=True, but 5.bias stays composed: no rule"
    if not strict:
        del net[4].weight_g
        message = "legacy=True, but 4.weight cannot be converted: its module has lost weight_g"
    utils.parametrize.register_parametrization(net[5], "bias", Twice())
    before = [(type(m), dict(vars(m)), list(m._forward_pre_hooks)) for m in net.modules()]
    keys, tables = list(net.state_dict()), [list(m._modules) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        tp.fuse(net, legacy=True, strict=strict)
    after = [(type(m), dict(vars(m)), list(m._forward_pre_hooks)) for m in net.modules()]
    for (cls, old, hooks), (new_cls, new, new_hooks) in zip(before, after, strict=True):
        assert cls is new_cls
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)
        assert hooks == new_hooks
    assert list(net.state_dict()) == keys
    assert [list(m._modules) for m in net.modules()] == tables
    if strict:
        net(X)
        net.load_state_dict(model().state_dict(), strict=False)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2

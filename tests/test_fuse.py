"""Fusing a model: what changes, what must not, and what declines."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import nn

import tritonparam as tp


class MySkew(nn.Module):
    def forward(self, x):
        upper = x.triu(1)
        return upper - upper.transpose(-1, -2)

    def right_inverse(self, a):
        return a.triu(1)


class MyCayley(nn.Module):
    """The tutorial's map, with its buffer."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("Id", torch.eye(n))

    def forward(self, x):
        return torch.linalg.solve(self.Id - x, self.Id + x)


def by_torch(layer: nn.Module, *links: nn.Module) -> nn.Module:
    for link in links:
        torch_parametrize.register_parametrization(layer, "weight", link)
    return layer


def fused_layer(n: int = 4) -> nn.Module:
    layer = nn.Linear(n, n)
    return tp.register_parametrization(layer, "weight", tp.Skew(), tp.CayleyMap())


def evaluated(layer: nn.Module, weight: str = "weight") -> dict[str, int]:
    tp.stats(reset=True)
    getattr(layer, weight)
    return {path: n for path, n in tp.stats().items() if n}


def test_fuse_changes_only_the_evaluation():
    layer = by_torch(nn.Linear(5, 5), tp.Skew(), tp.CayleyMap())
    plist = layer.parametrizations.weight
    original, text, keys = plist.original, repr(layer), list(layer.state_dict())
    composed = layer.weight
    assert tp.fuse(layer) is layer
    assert layer.parametrizations.weight is plist
    assert plist.original is original
    assert repr(layer) == text
    assert list(layer.state_dict()) == keys
    assert isinstance(plist, tp.ParametrizationList)
    assert torch.allclose(layer.weight, composed, atol=1e-6)
    assert evaluated(layer) == {"closed": 1}
    assert tp.unfuse(layer) is layer
    assert type(plist) is tp.ParametrizationList
    assert torch.equal(layer.weight, composed)
    assert evaluated(layer) == {}


@pytest.mark.parametrize(
    ("change", "chain"),
    [
        (lambda plist: plist._modules.pop("2"), ["Skew", "CayleyMap"]),
        (lambda plist: plist._modules.pop("1"), ["Skew"]),
        (lambda plist: plist.register_module("note", nn.ReLU()), None),
        (lambda plist: plist._modules.update({"0": plist._modules.pop("0")}), None),
        (
            lambda plist: torch_parametrize.register_parametrization(
                plist, "original", nn.Identity()
            ),
            None,
        ),
        (lambda plist: plist.extend(nn.Identity() for _ in range(7)), None),
        (lambda plist: plist._modules.pop("0"), []),
    ],
    ids=["last", "gap", "other", "order", "nested", "many", "first"],
)
def test_links_changed_by_hand_are_those_that_torch_evaluates(change, chain):
    """Libraries delete links from the list as they condense a layer."""
    composed = by_torch(nn.Linear(4, 4), tp.Skew(), tp.CayleyMap(), nn.Tanh())
    fused = tp.fuse(copy.deepcopy(composed), strict=True)
    for layer in (composed, fused):
        change(layer.parametrizations.weight)
    names = chain if chain is not None else ["Skew", "CayleyMap", "Tanh"]
    assert list(tp.explain(fused)[0].chain)[:3] == names
    if chain == []:
        with pytest.raises((KeyError, IndexError)) as raised:
            composed.weight
        for block in (contextlib.nullcontext(), tp.cached(fused)):
            with block, pytest.raises(raised.type):
                fused.weight
        return
    assert torch.allclose(fused.weight, composed.weight, atol=1e-6)
    compiled = torch.compile(lambda: fused.weight, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), fused.weight)


def test_fuse_walks_the_whole_model():
    model = nn.Sequential(by_torch(nn.Linear(3, 3), tp.Skew(), tp.CayleyMap()), nn.ReLU())
    model.append(nn.Sequential(by_torch(nn.Linear(3, 3), tp.Skew(), tp.CayleyMap())))
    tp.fuse(model)
    assert evaluated(model[0]) == evaluated(model[2][0]) == {"closed": 1}
    assert tp.fuse(nn.Linear(2, 2)) is not None


def test_state_dicts_load_into_each_other():
    ours, theirs = fused_layer(), by_torch(nn.Linear(4, 4), tp.Skew(), tp.CayleyMap())
    ours.weight = torch.linalg.qr(torch.randn(4, 4))[0]
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(theirs.weight, ours.weight, atol=1e-6)
    bare = by_torch(nn.Linear(4, 4), MySkew(), MyCayley(4))
    ours.load_state_dict(bare.state_dict())
    assert torch.allclose(ours.weight, bare.weight, atol=1e-6)


def test_a_checkpoint_without_signs_means_ones_only_if_it_has_the_original():
    layer = fused_layer()
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    q[:, 0] *= -torch.det(q).sign()
    layer.weight = q
    signs = layer.parametrizations.weight[1].signature.clone()
    assert (signs < 0).any()
    layer.load_state_dict({"bias": torch.zeros(4)}, strict=False)
    assert torch.equal(layer.parametrizations.weight[1].signature, signs)
    layer.load_state_dict({"parametrizations.weight.original": torch.zeros(4, 4)}, strict=False)
    assert torch.equal(layer.weight, torch.eye(4))


@pytest.mark.parametrize("how", ["tp", "torch"])
def test_a_later_registration_decides_again(how):
    layer = tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew())
    assert evaluated(layer) == {"composed": 1}
    register = (tp if how == "tp" else torch_parametrize).register_parametrization
    register(layer, "weight", tp.CayleyMap())
    assert evaluated(layer) == {"closed": 1}
    register(layer, "weight", tp.Pruning(torch.ones(4, 4)))
    assert evaluated(layer) == {"closed": 1}
    assert tp.explain(layer)[0].reason.endswith("Pruning is composed: no rule for this chain")


def test_a_hooked_or_patched_link_declines():
    layer = fused_layer()
    link = layer.parametrizations.weight[0]
    calls = []
    for register in (
        nn.modules.module.register_module_forward_hook,
        link.register_forward_hook,
        link.register_forward_pre_hook,
        link.register_full_backward_hook,
        link.register_full_backward_pre_hook,
    ):
        handle = register(lambda *args: calls.append(1))
        assert evaluated(layer) == {"composed": 1}
        layer.weight.sum().backward()
        assert calls
        assert "hooks" in tp.explain(layer)[0].reason
        handle.remove()
        calls.clear()
        assert evaluated(layer) == {"closed": 1}
    link.forward = lambda x: x - x.T
    assert evaluated(layer) == {"composed": 1}
    assert "patched on the instance" in tp.explain(layer)[0].reason


def test_a_subclass_of_a_link_declines():
    class Loud(tp.Skew):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = tp.register_parametrization(nn.Linear(3, 3), "weight", Loud(), tp.CayleyMap())
    assert evaluated(layer) == {"composed": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.to(torch.complex64), "complex64 is not a dtype that is fused"),
        (lambda m: m.to("meta"), "no strided storage"),
        (
            lambda m: m.parametrizations.weight._parameters.update(
                original=nn.Parameter(torch.ones(4, 4).as_subclass(Tagged))
            ),
            "a tensor subclass",
        ),
    ],
)
def test_originals_that_decline(change, reason):
    layer = fused_layer()
    change(layer)
    row = tp.explain(layer)[0]
    assert row.path == "composed"
    assert reason in row.reason
    assert evaluated(layer) == {"composed": 1}
    with pytest.raises(ValueError, match="strict=True, but weight stays composed"):
        tp.fuse(layer, strict=True)


def test_a_map_without_signs_is_composed_once_and_then_fused():
    layer = fused_layer()
    layer.parametrizations.weight[1].signature = None
    assert "does not fit" in tp.explain(layer)[0].reason
    assert evaluated(layer) == {"composed": 1}
    assert evaluated(layer) == {"closed": 1}


class Tagged(torch.Tensor):
    pass


def test_strict_names_the_weight_and_changes_nothing():
    model = nn.Sequential(
        by_torch(nn.Linear(3, 3), tp.Skew(), tp.CayleyMap()), by_torch(nn.Linear(3, 3), tp.Skew())
    )
    with pytest.raises(ValueError, match=r"1\.weight stays composed: no rule for this chain"):
        tp.fuse(model, strict=True)
    assert type(model[0].parametrizations.weight) is tp.ParametrizationList
    assert type(model[1].parametrizations.weight) is tp.ParametrizationList
    tp.fuse(model[0], strict=True)


@pytest.mark.parametrize("function", [tp.fuse, tp.unfuse, tp.explain])
def test_a_model_is_a_module(function):
    with pytest.raises(TypeError, match="must be an nn.Module, got Tensor"):
        function(torch.ones(2))


@pytest.mark.parametrize("source", ["registered", "fused"])
@pytest.mark.parametrize(
    "remove", [tp.remove_parametrizations, torch_parametrize.remove_parametrizations]
)
@pytest.mark.parametrize("which", [0, 1])
def test_copies_are_independent(source, remove, which):
    layer = fused_layer() if source == "registered" else None
    layer = layer or tp.fuse(by_torch(nn.Linear(4, 4), tp.Skew(), tp.CayleyMap()))
    both = [layer, copy.deepcopy(layer)]
    assert torch.equal(both[0].weight, both[1].weight)
    third = copy.deepcopy(both[1])
    remove(both[which], "weight")
    assert type(both[which]) is nn.Linear
    for kept in (both[1 - which], third):
        assert evaluated(kept) == {"closed": 1}
    tp.register_parametrization(third, "bias", tp.Pruning(torch.ones(4)))
    both[1 - which](torch.ones(1, 4))
    assert not tp.is_parametrized(both[1 - which], "bias")
    copied = copy.deepcopy(nn.Sequential(third, third))
    assert copied[0] is copied[1]


def test_deepcopy_of_a_module_with_its_own_deepcopy():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            new = type(self).__new__(type(self))
            new.__dict__ = copy.deepcopy(self.__dict__, memo)
            new.tag = "own"
            return new

    layer = tp.register_parametrization(Own(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    copied = copy.deepcopy(layer)
    assert copied.tag == "own"
    tp.remove_parametrizations(copied, "weight")
    assert layer.weight.shape == (3, 3)


def test_explain():
    model = nn.ModuleDict(
        {
            "rnn": fused_layer(70),
            "conv": tp.register_parametrization(nn.Conv2d(1, 2, 3), "weight", tp.Skew()),
            "plain": by_torch(nn.Linear(3, 3), tp.Skew(), tp.CayleyMap()),
            "none": nn.Linear(2, 2),
        }
    )
    before = tp.stats()
    rows = tp.explain(model)
    assert tp.stats() == before
    assert [row.name for row in rows] == ["rnn.weight", "conv.weight", "plain.weight"]
    assert [row.path for row in rows] == ["closed", "composed", "composed"]
    assert rows[0].chain == ("Skew", "CayleyMap")
    assert rows[0].shape == (70, 70)
    assert rows[1].shape == (2, 1, 3, 3)
    assert rows[0].dtype == torch.float32
    assert rows[0].reason == "the original is on the cpu"
    assert rows[2].reason == "not fused yet; call tritonparam.fuse(model)"
    text = str(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "2×1×3×3" in text
    assert str(tp.explain(nn.Linear(2, 2))) == "no parametrized tensors"
    assert tp.explain(fused_layer())[0].path == "closed"


def test_training_is_the_same_fused_and_composed():
    def train(path):
        torch.manual_seed(1)
        layer = fused_layer(6)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        x, y = torch.randn(20, 6), torch.randn(20, 6)
        with tp.use_path(path):
            for _ in range(50):
                optimizer.zero_grad()
                (layer(x) - y).square().mean().backward()
                optimizer.step()
        return layer.state_dict()

    closed, composed = train("closed"), train("composed")
    for key, value in closed.items():
        # Adam divides by the root of the second moment: rounding grows to about 1e-4 × lr a step.
        assert torch.allclose(value, composed[key], atol=1e-4), key


def test_moving_and_converting_a_fused_model():
    layer = fused_layer()
    weight = layer.weight.detach()
    assert torch.allclose(layer.double().weight.float(), weight, atol=1e-6)
    half = layer.bfloat16().weight
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), weight, atol=1e-2)

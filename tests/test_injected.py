"""The class of a parametrized module: one for all of a kind, and every copy on its own."""

from __future__ import annotations

import abc
import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from torch import nn
from torch._dynamo.testing import CompileCounter

import tritonparam as tp


def by_torch(layer: nn.Module, name: str = "weight") -> nn.Module:
    torch_parametrize.register_parametrization(layer, name, tp.Skew())
    return layer


def layer_of(n: int = 4) -> nn.Module:
    return tp.register_parametrization(nn.Linear(n, n), "weight", tp.Skew(), tp.CayleyMap())


class Block(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        if how == "torch":
            tp.fuse(by_torch(self.linear))
        elif how == "ours":
            self.linear = layer_of(6)

    def forward(self, x):
        return self.linear(x).relu()


def compilations(how: str) -> int:
    """How often twelve equal blocks are compiled, each by itself, in training and in eval mode."""
    torch.compiler.reset()
    counter = CompileCounter()
    blocks = nn.Sequential(*[Block(how) for _ in range(12)])
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    expected = x = torch.randn(2, 6)
    for block in blocks:
        expected = block.forward(expected)
    assert torch.allclose(blocks(x), expected, atol=1e-6)
    blocks(x).sum().backward()
    blocks.eval()
    with torch.no_grad():
        blocks(x)
    return counter.frame_count


def test_equal_blocks_compile_as_often_as_without_constraints():
    unconstrained = compilations("no")
    assert compilations("ours") == unconstrained
    assert compilations("torch") == unconstrained


def test_modules_of_a_kind_share_a_class():
    assert type(layer_of()) is type(layer_of(3)) is type(tp.fuse(by_torch(nn.Linear(2, 2))))
    both = tp.register_parametrization(layer_of(), "bias", tp.Pruning(torch.ones(4)))
    assert type(both) is not type(layer_of())
    assert type(both).__name__ == type(layer_of()).__name__ == "ParametrizedLinear"
    assert torch_parametrize.type_before_parametrizations(both) is nn.Linear
    tp.remove_parametrizations(both, "weight")
    assert set(both.parametrizations) == {"bias"}
    assert "weight" in both._parameters
    assert not isinstance(getattr(type(both), "weight", None), property)


@pytest.mark.parametrize("remove", [tp, torch_parametrize])
def test_registration_and_removal_by_torch_leave_the_others_alone(remove):
    layer, other = layer_of(), layer_of()
    bias = other.bias
    torch_parametrize.register_parametrization(layer, "bias", tp.Pruning(torch.zeros(4)))
    assert torch.equal(layer.bias, torch.zeros(4))
    assert other.bias is bias
    other.bias = nn.Parameter(bias + 1)
    assert torch.equal(other.bias, bias + 1)
    layer.bias = torch.ones(4)
    assert torch.equal(other.bias, bias + 1)
    third = layer_of()
    del third.bias
    third.bias = 3
    assert third.bias == 3
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        third.nothing
    remove.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.bias, torch.zeros(4))
    assert type(layer.weight) is nn.Parameter
    assert other.weight.shape == (4, 4)
    remove.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear
    layer(torch.ones(1, 4))


def test_torchs_cache_keeps_modules_apart():
    first, second = layer_of(), layer_of()
    copied = copy.deepcopy(first)
    with torch_parametrize.cached():
        assert first.weight is first.weight
        assert not torch.equal(first.weight, second.weight)
        assert copied.weight is not first.weight
        with pytest.raises(RuntimeError, match="Cannot trace a model while caching"):
            torch.jit.trace(first, torch.ones(1, 4))
    assert first.weight is not first.weight
    traced = torch.jit.trace(first, torch.ones(1, 4))  # composed
    assert torch.allclose(traced(torch.ones(2, 4)), first(torch.ones(2, 4)), atol=1e-6)


class Abstract(nn.Module, abc.ABC):
    __slots__ = ("tag",)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    @abc.abstractmethod
    def forward(self, x): ...


class Concrete(Abstract):
    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), Concrete])
def test_pickle_and_copy(make, tmp_path):
    module = tp.register_parametrization(make(), "weight", tp.Skew(), tp.CayleyMap())
    if make is Concrete:
        module.tag = "slot"  # which pickle loses, as of any module
    torch.save(module, tmp_path / "module.pt")
    again = [
        torch.load(tmp_path / "module.pt", weights_only=False),
        pickle.loads(pickle.dumps(module)),
        copy.copy(module),
        copy.deepcopy(module),
    ]
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "module.pt")
    for replica in again:
        tp.stats(reset=True)
        assert torch.equal(replica.weight, module.weight)
        assert tp.stats()["closed"] == 2
        assert type(replica).__bases__ == type(module).__bases__
    assert getattr(again[-1], "tag", None) == getattr(module, "tag", None)
    tp.remove_parametrizations(again[0], "weight")
    assert type(again[0]) is type(make())
    assert again[1].weight.shape == module.weight.shape == (3, 3)


Derived = type(layer_of())


class Deriving(Derived):
    """A user's class made of a shared one."""


def test_a_class_made_of_a_shared_one_is_pickled_by_its_name():
    assert pickle.loads(pickle.dumps(Deriving)) is Deriving
    module = layer_of()
    module.__class__ = Deriving
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is Deriving
    assert torch.equal(again.weight, module.weight)
    tp.register_parametrization(module, "bias", tp.Pruning(torch.ones(4)))
    assert type(module) is Deriving


def test_pickle_and_copy_of_an_rnn():
    lstm = tp.orthogonal(nn.LSTM(3, 4), "weight_hh_l0")
    expected = lstm(torch.ones(2, 1, 3))[0]
    fresh = tp.orthogonal(nn.LSTM(3, 4), "weight_hh_l0")
    for replica in (pickle.loads(pickle.dumps(lstm)), copy.deepcopy(fresh)):
        replica.load_state_dict(lstm.state_dict())
        assert torch.equal(replica(torch.ones(2, 1, 3))[0], expected)
        replica(torch.ones(2, 1, 3))[0].sum().backward()
        assert replica.parametrizations.weight_hh_l0.original.grad is not None


def test_a_class_that_was_added_to_stays():
    layer = by_torch(nn.Linear(3, 3))
    type(layer).twice = lambda self, x: self(self(x))
    tp.fuse(layer)
    x = torch.ones(1, 3)
    assert torch.equal(layer.twice(x), layer(layer(x)))
    with pytest.raises(RuntimeError, match=r"only supported through state_dict"):
        pickle.dumps(layer)


def test_classes_are_freed_with_their_modules():
    class Local(nn.Linear):
        pass

    layer = tp.register_parametrization(Local(3, 3), "weight", tp.Skew())
    alive = [weakref.ref(type(layer)), weakref.ref(Local)]
    del layer, Local
    gc.collect()  # the class, which frees its table entry
    gc.collect()  # what it was made of
    assert [x() for x in alive] == [None, None]

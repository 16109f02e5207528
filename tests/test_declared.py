"""Rules that users add, and the check of what they declare."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

import tritonparam as tp
from tritonparam import functional


class Unit(nn.Module):
    """Rows of norm one."""

    def forward(self, x):
        return x / x.square().sum(-1, keepdim=True).sqrt()


class Product(nn.Module):
    """A weight of two originals, the second a diagonal matrix."""

    def forward(self, x, d):
        return x * d.unsqueeze(-2)

    def right_inverse(self, w):
        return w, torch.ones_like(w[..., 0, :])


class Counting(nn.Module):
    """Counts its evaluations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return 2 * x


def unit(links, x):
    return nn.functional.normalize(x, dim=-1)


def layer_of(*links: nn.Module, n: int = 4) -> nn.Module:
    layer = nn.Linear(n, n)
    for link in links:
        torch_parametrize.register_parametrization(layer, "weight", link)
    return layer


def evaluated(layer: nn.Module) -> dict[str, int]:
    tp.stats(reset=True)
    layer.weight
    return {path: n for path, n in tp.stats().items() if n}


@pytest.mark.parametrize("how", ["fuse", "register"])
def test_an_added_rule_is_taken_and_reported(how):
    tp.add_rule((Unit,), unit)
    if how == "fuse":
        layer = tp.fuse(layer_of(Unit()), strict=True)
    else:
        layer = tp.register_parametrization(nn.Linear(4, 4), "weight", Unit())
    assert evaluated(layer) == {"closed": 1}
    with tp.use_path("composed"):
        composed = layer.weight
    assert torch.allclose(layer.weight, composed, atol=1e-6)
    row = tp.explain(layer)[0]
    assert (row.chain, row.path, row.reason) == (("Unit",), "closed", "an added rule computes it")
    with tp.use_path("kernel"), pytest.raises(RuntimeError, match="because an added rule computes"):
        layer.weight
    if how == "fuse":
        compiled = torch.compile(lambda: layer.weight.cos(), fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(), layer.weight.cos())
    unknown = layer_of(nn.Tanh())
    assert tp.explain(tp.fuse(unknown))[0].reason == "no rule for this chain"


def test_rules_are_read_from_top_to_bottom():
    calls = []

    def op(name, evaluate):
        def named(links, *xs):
            calls.append(name)
            return evaluate(links, *xs)

        return named

    def skew_cayley(links, w):
        return functional.skew_cayley(w, links[1].signature)

    # Before ours, and at each place of a longer chain.
    tp.add_rule((tp.Skew, tp.CayleyMap), op("cayley", skew_cayley))
    tp.add_rule((Unit,), op("unit", unit))
    tp.add_rule((Unit, tp.Skew), op("never", lambda links, x: links[1](links[0](x))))
    layer = tp.fuse(layer_of(tp.Skew(), tp.CayleyMap(), Unit(), tp.Skew()))
    calls.clear()
    layer.weight
    assert calls == ["cayley", "unit"]
    assert tp.explain(layer)[0].reason.endswith("Skew is composed: no rule for this chain")
    # The new rule of a chain takes the place of the old one.
    tp.add_rule([Unit], op("new", unit), declines=lambda links, x: "not today")
    calls.clear()
    layer.weight
    assert calls == ["cayley", "never"]
    # Functions of tensors have no links of anybody's.
    calls.clear()
    functional.skew_cayley(torch.zeros(2, 2))
    assert calls == []


def test_a_rule_declines_at_each_read():
    tp.add_rule((Unit,), unit, declines=lambda links, x: "" if x.size(-1) > 4 else "n is small")
    small, large = tp.fuse(layer_of(Unit())), tp.fuse(layer_of(Unit(), n=5))
    assert (evaluated(small), evaluated(large)) == ({"composed": 1}, {"closed": 1})
    assert tp.explain(small)[0].reason == "n is small"
    with pytest.raises(ValueError, match="strict=True, but weight stays composed: n is small"):
        tp.fuse(small, strict=True)
    large.parametrizations.weight[0].register_forward_hook(lambda *args: None)
    assert evaluated(large) == {"composed": 1}


def test_a_chain_of_several_originals():
    tp.add_rule((Product,), lambda links, x, d: torch.einsum("ij,j->ij", x, d))
    layer = tp.fuse(layer_of(Product()), strict=True)
    assert evaluated(layer) == {"closed": 1}
    tp.add_rule((Product,), lambda links, x, d: x * d.detach())
    with pytest.raises(ValueError, match="its gradient in original1 differs: fused 0, composed"):
        tp.fuse(layer_of(Product()))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda links, x: -unit(links, x), r"its value differs: fused -?0\.\d+, composed -?0\.\d+"),
        (
            lambda links, x: unit(links, x)[:, :3],
            r"fused \[4, 3\] torch.float64, composed \[4, 4\]",
        ),
        (lambda links, x: unit(links, x).detach(), r"its gradient differs: fused 0, composed"),
        (lambda links, x: unit(links, x) * torch.nan, r"fused nan, composed"),
        (lambda links, x: torch.where(x == x[2, 1], 0.5, unit(links, x)), r"at \[2, 1\]"),
    ],
    ids=["value", "shape", "gradient", "nan", "entry"],
)
def test_a_wrong_rule_is_an_error_that_shows_the_difference(op, message):
    tp.add_rule((Unit,), op)
    good, bad = layer_of(tp.Skew(), tp.CayleyMap()), layer_of(Unit())
    model = nn.Sequential(good, nn.Dropout(), bad)
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=f"add_rule: Unit has a rule of yours, but.*{message}"):
        tp.fuse(model)
    for layer in (good, bad):
        assert type(layer.parametrizations.weight) is tp.ParametrizationList
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fresh = nn.Linear(4, 4)
    weight, value = fresh.weight, fresh.weight.detach().clone()
    with pytest.raises(ValueError, match="let declines say where it does not hold"):
        tp.register_parametrization(fresh, "weight", Unit())
    assert fresh.weight is weight
    assert torch.equal(weight, value)
    assert type(fresh) is nn.Linear


def test_what_happens_to_buffers_is_compared_and_undone():
    def counting(links, x):
        links[0].count += 1
        return 2 * x

    tp.add_rule((Counting,), counting)
    layer = layer_of(Counting())
    link = layer.parametrizations.weight[0]
    count = link.count.clone()
    tp.fuse(layer, strict=True)
    assert torch.equal(link.count, count)
    layer.weight
    assert torch.equal(link.count, count + 1)
    tp.add_rule((Counting,), lambda links, x: 2 * x)
    with pytest.raises(ValueError, match=r"its buffer 0\.count differs: fused 1, composed 2"):
        tp.fuse(layer_of(Counting()))


def test_an_alias_that_keeps_state_is_an_error_too():
    class CountingSkew(tp.Skew):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    tp.alias(CountingSkew, tp.Skew)
    layer = layer_of(CountingSkew(), tp.CayleyMap())
    link, count = layer.parametrizations.weight[0], layer.parametrizations.weight[0].count.clone()
    with pytest.raises(ValueError, match=r"alias: .*but its buffer 0\.count differs"):
        tp.fuse(layer)
    assert torch.equal(link.count, count)
    assert type(layer.parametrizations.weight) is tp.ParametrizationList


def test_what_is_drawn_is_the_same_and_put_back():
    class Noisy(tp.Skew):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    def noisy(links, w):
        return functional.skew_cayley(w + torch.rand_like(w))

    tp.add_rule((Noisy, tp.CayleyMap), noisy)
    layer = layer_of(Noisy(), tp.CayleyMap())
    random = torch.random.get_rng_state()
    tp.fuse(layer, strict=True)
    assert torch.equal(torch.random.get_rng_state(), random)
    tp.alias(Noisy, tp.Skew)  # a lie, of which the composed chain's random numbers tell
    with pytest.raises(ValueError, match="Noisy→CayleyMap was declared to mean Skew→CayleyMap"):
        tp.fuse(layer_of(Noisy(), tp.CayleyMap()))


def test_what_cannot_be_added():
    with pytest.raises(TypeError, match=r"must be a tuple of classes, got .*Unit.*write \(Link,\)"):
        tp.add_rule(Unit, unit)
    with pytest.raises(TypeError, match=r"subclasses of nn\.Module, got Unit\(\); pass the class"):
        tp.add_rule((Unit(),), unit)
    with pytest.raises(ValueError, match="at least one class"):
        tp.add_rule((), unit)
    with pytest.raises(TypeError, match=r"op must be a function of \(links, \*originals\), got 3"):
        tp.add_rule((Unit,), 3)
    with pytest.raises(TypeError, match="declines must be a function of"):
        tp.add_rule((Unit,), unit, declines="no")
    tp.alias(Unit, tp.Skew)
    with pytest.raises(ValueError, match="Unit is an alias of Skew.*name Skew in the chain"):
        tp.add_rule((Unit,), unit)
    assert tp.declared._added == ()


class LowerSkew(nn.Module):
    """Skew of the transpose."""

    def forward(self, x):
        return x.mT.triu(1) - x.tril(-1)

    def right_inverse(self, a):
        return -a.tril(-1)


class Solved(nn.Module):
    """CayleyMap as the tutorial writes it, without signs."""

    def forward(self, x):
        eye = torch.eye(x.size(-1), dtype=x.dtype)
        return torch.linalg.solve(eye - x, eye + x)


def fifty_steps(layer: nn.Module) -> list[float]:
    torch.manual_seed(2)
    x, y = torch.randn(2, 16, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_under_an_alias_and_a_rule_are_the_composed_ones():
    def lower_cayley(links, x):
        a = x.mT.triu(1) - x.tril(-1)
        eye = torch.eye(x.size(-1), dtype=x.dtype)
        return 2 * torch.linalg.inv(eye - a) - eye

    def layer(cls):
        torch.manual_seed(1)
        return layer_of(cls(), Solved(), n=6).double()

    class Mine(nn.Module):
        def forward(self, x):
            return x.triu(1) - x.triu(1).mT

    composed = {cls: layer(cls) for cls in (Mine, LowerSkew)}
    expected = {cls: fifty_steps(composed[cls]) for cls in composed}
    tp.alias(Mine, tp.Skew)
    tp.alias(Solved, tp.CayleyMap)
    tp.add_rule((LowerSkew, tp.CayleyMap), lower_cayley)
    for cls, reference in composed.items():
        mine = tp.fuse(layer(cls), strict=True)
        tp.stats(reset=True)
        losses = fifty_steps(mine)
        assert tp.stats()["closed"] == 50
        assert tp.stats()["composed"] == 0
        assert losses == pytest.approx(expected[cls], rel=1e-10)
        assert losses[-1] < losses[0]
        assert list(mine.state_dict()) == list(reference.state_dict())
        for a, b in ((mine, reference), (reference, mine)):
            a.load_state_dict(b.state_dict())
            assert torch.allclose(a.weight, b.weight, rtol=0, atol=1e-12)

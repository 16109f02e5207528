"""Spectral norm with iterate="step": reads change nothing, an optimizer's step advances u and v."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs

import tritonparam as tp
from tritonparam import stepped


def step_layer(*shape: int) -> nn.Module:
    torch.manual_seed(3)
    return tp.spectral_norm(nn.Linear(*(shape or (5, 4))).double(), iterate="step")


def vectors(layer: nn.Module) -> list[Tensor]:
    return [b.clone() for b in layer.parametrizations.weight[0].buffers()]


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def advanced(layer: nn.Module, before: list[Tensor]) -> list[Tensor]:
    """What torch's own iteration makes of u and v, on the original as it is now."""
    link = theirs._SpectralNorm(original(layer).detach())
    link._u.copy_(before[0])
    link._v.copy_(before[1])
    link.train()(original(layer))
    return list(link.buffers())


def assert_close(mine: list[Tensor], torchs: list[Tensor]) -> None:
    for x, y in zip(mine, torchs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def loss(layer: nn.Module) -> Tensor:
    return layer(torch.ones(1, 5, dtype=torch.float64)).square().sum()


def test_reads_change_nothing():
    layer = step_layer().train()
    before = vectors(layer)
    values = [layer.weight for _ in range(3)]
    with tp.use_path("composed"):
        values.append(layer.weight)
    values.append(tp.unfuse(layer).weight)
    values.append(tp.fuse(layer).train().weight)
    for buffer, old in zip(vectors(layer), before, strict=True):
        assert torch.equal(buffer, old)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-14, atol=0)
    u, v = before
    w = original(layer)
    torch.testing.assert_close(values[0], w / (u @ w @ v), rtol=1e-14, atol=0)


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adam_foreach": lambda ps: torch.optim.Adam(ps, lr=0.1, foreach=True),
    "adam_fused": lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_advances_once_after_the_update(name):
    layer = step_layer()
    optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(3):
        before, w = vectors(layer), original(layer).detach().clone()
        optimizer.zero_grad()
        loss(layer).backward()
        (loss(layer) / 2).backward()  # accumulated
        assert_close(vectors(layer), before)
        optimizer.step()
        assert not torch.equal(original(layer), w)
        assert_close(vectors(layer), advanced(layer, before))
        u, v = vectors(layer)
        torch.testing.assert_close(layer.weight, original(layer) / (u @ original(layer) @ v))


def test_a_step_is_seen_inside_cached():
    layer = step_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with tp.cached():
        first = layer.weight
        assert layer.weight is first
        loss(layer).backward()
        optimizer.step()
        u, v = vectors(layer)
        torch.testing.assert_close(layer.weight, original(layer) / (u @ original(layer) @ v))


def test_an_optimizer_of_another_kind_advances_by_hand():
    layer = step_layer()
    before = vectors(layer)
    with torch.no_grad():
        original(layer).add_(0.1)
    stepped.advance(layer.parametrizations.weight[0], original(layer))
    assert_close(vectors(layer), advanced(layer, before))
    assert not torch.equal(vectors(layer)[0], before[0])


def test_lbfgs_and_fp16():
    layer = step_layer().half()
    before = vectors(layer)
    optimizer = torch.optim.LBFGS([original(layer)], lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = layer.weight.float().square().sum() + (original(layer) - 1).square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    single = deepcopy(layer).float()
    for mine, reference in zip(
        vectors(layer), advanced(single, [b.float() for b in before]), strict=True
    ):
        torch.testing.assert_close(mine.float(), reference, rtol=0, atol=1e-3)
        assert mine.dtype == torch.float16


def test_only_the_optimizer_that_updates_it():
    layer, other = step_layer(), step_layer()
    before = vectors(layer)
    loss(layer).backward()  # as the generator's loss does, through the discriminator
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert_close(vectors(layer), before)
    optimizer = torch.optim.SGD([*layer.parameters(), *other.parameters()], lr=0.1)
    layer.zero_grad()
    loss(other).backward()
    optimizer.step()  # it holds the weight, but has no gradient of it
    assert_close(vectors(layer), before)
    loss(layer).backward()
    optimizer.step()
    assert not torch.equal(vectors(layer)[0], before[0])


class Lookahead(torch.optim.Optimizer):
    """An optimizer of one parameter around another: after its step, halfway back."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner, self.value = inner, None
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        (p,) = self.param_groups[0]["params"]
        before = p.detach().clone()
        self.inner.step()
        self.value = p.detach().clone()
        p.data.lerp_(before, 0.5)


def test_nested_optimizers_advance_after_each_of_their_steps():
    layer = step_layer()
    before = vectors(layer)
    outer = Lookahead(torch.optim.SGD([original(layer)], lr=0.1))
    loss(layer).backward()
    outer.step()
    between = deepcopy(layer)
    with torch.no_grad():
        original(between).copy_(outer.value)
    assert_close(vectors(layer), advanced(layer, advanced(between, before)))


def test_two_optimizers_advance_what_they_update():
    generator, first = nn.Linear(2, 5).double(), step_layer()
    critics = [nn.Sequential(first, nn.LeakyReLU(0.2), step_layer(4, 1))]
    critics.append(tp.unfuse(deepcopy(critics[0])))
    states = []
    for critic in critics:
        maker = deepcopy(generator)
        of_maker = torch.optim.Adam(maker.parameters(), lr=1e-2)
        of_critic = torch.optim.Adam(critic.parameters(), lr=1e-2)
        torch.manual_seed(5)
        tp.stats(reset=True)
        for step in range(20):
            z, real = torch.randn(6, 2).double(), torch.randn(6, 5).double()
            for _ in range(2):
                of_critic.zero_grad()
                (critic(maker(z).detach()).exp().mean() - critic(real).mean()).backward()
                of_critic.step()
            of_maker.zero_grad()
            kept = [b.clone() for b in critic.buffers()]
            (-critic(maker(z)).mean()).backward()
            of_maker.step()
            assert all(torch.equal(a, b) for a, b in zip(kept, critic.buffers(), strict=True))
            if step == 0:
                first_step = [b.clone() for b in critic.buffers()]
        assert not all(map(torch.equal, first_step, critic.buffers()))
        states.append([*critic.state_dict().values(), *maker.state_dict().values()])
        assert tp.stats()["closed"] == (0 if states[1:] else 20 * (2 * 2 + 1) * 2)
    assert_close(*states)


@pytest.mark.parametrize("via", [deepcopy, lambda m: tp.fuse(deepcopy(tp.unfuse(m)))])
def test_a_copy_follows_its_own_weight(via):
    layer = step_layer()
    copy = via(layer)
    before = vectors(layer)
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    loss(copy).backward()
    optimizer.step()
    assert_close(vectors(layer), before)
    assert_close(vectors(copy), advanced(copy, before))
    assert original(copy) is copy.parametrizations.weight[0]._list[0].original


def test_moved_and_loaded_weights_are_followed():
    layer = step_layer().float()
    state = step_layer().float().state_dict()
    layer.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    before = vectors(layer)
    layer.weight.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    for mine, reference in zip(vectors(layer), advanced(layer, before), strict=True):
        torch.testing.assert_close(mine, reference)


def test_checkpoints_are_those_of_torchs_spectral_norm():
    layer = step_layer()
    torchs = theirs.spectral_norm(nn.Linear(5, 4)).double().eval()
    torchs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(torchs.weight, layer.weight, rtol=1e-14, atol=0)
    tp.fuse(torchs)
    layer.load_state_dict(torchs.state_dict())
    legacy = torch.nn.utils.spectral_norm(nn.Linear(5, 4)).double()
    layer.load_state_dict(legacy.state_dict())
    assert_close(vectors(layer), [legacy.weight_u, legacy.weight_v])
    assert torch.equal(original(layer), legacy.weight_orig)


def test_compiled_model_and_compiled_step():
    torch.compiler.reset()
    layer = step_layer()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        loss(compiled).backward()
        assert torch.equal(loss(compiled), loss(layer))
        before = vectors(layer)
        optimizer.step()
        assert_close(vectors(layer), advanced(layer, before))
    assert len(graphs) == 1
    step = torch.compile(optimizer.step, backend="eager")
    loss(compiled).backward()
    before = vectors(layer)
    step()
    assert_close(vectors(layer), advanced(layer, before))


def test_convolutions_and_vectors():
    conv = tp.spectral_norm(nn.ConvTranspose2d(3, 4, 2), iterate="step", n_power_iterations=2)
    assert vectors(conv)[0].shape == (4,)
    before = vectors(conv)
    conv(torch.ones(1, 3, 2, 2)).sum().backward()
    torch.optim.SGD(conv.parameters(), lr=0.5).step()
    link = theirs._SpectralNorm(original(conv).detach(), n_power_iterations=2, dim=1)
    link._u.copy_(before[0])
    link._v.copy_(before[1])
    link.train()(original(conv))
    torch.testing.assert_close(vectors(conv)[1], link._v)
    linear = tp.spectral_norm(nn.Linear(3, 2), "bias", iterate="step")
    linear.bias.sum().backward()
    torch.optim.SGD(linear.parameters(), lr=0.5).step()
    torch.testing.assert_close(linear.bias.norm(), torch.ones(()))


def test_links_die_with_their_model():
    layer = step_layer()
    link = weakref.ref(layer.parametrizations.weight[0])
    assert link() in stepped._links
    del layer
    gc.collect()
    assert link() is None


def test_refusals():
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match='iterate must be "read" or "step", got \'never\''):
        tp.spectral_norm(layer, iterate="never")
    tp.symmetric(layer)
    with pytest.raises(ValueError, match="must be the first link.*parametrized already; use"):
        tp.spectral_norm(layer, iterate="step")
    assert [type(link) for link in layer.parametrizations.weight] == [tp.Symmetric]
    tp.spectral_norm(layer)

"""GAN training with fused norms: step by step what torch's own norms give, in fp64."""

from __future__ import annotations

import io
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tritonparam as tp

Pair = tuple[nn.Module, nn.Module]


def networks(norm=theirs.spectral_norm) -> Pair:
    """A generator with weight norm and a discriminator of images 1×6×6, by torch, in fp64."""
    torch.manual_seed(1)
    generator = nn.Sequential(
        theirs.weight_norm(nn.Linear(3, 8)),
        nn.Tanh(),
        theirs.weight_norm(nn.Linear(8, 36), dim=None),
        nn.Unflatten(1, (1, 6, 6)),
    )
    discriminator = nn.Sequential(
        norm(nn.Conv2d(1, 4, 3, stride=2)),
        nn.Softplus(),
        norm(nn.ConvTranspose2d(4, 2, 2)),
        nn.Softplus(),
        nn.Flatten(),
        norm(nn.Linear(18, 1)),
    )
    return generator.double(), discriminator.double()


def fused(pair: Pair) -> Pair:
    generator, discriminator = deepcopy(pair)
    return tp.fuse(generator, strict=True), tp.fuse(discriminator, strict=True)


def optimizers(pair: Pair) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(m.parameters(), lr=0.02, betas=(0.5, 0.9)) for m in pair]


def penalty(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """(‖∇D‖ - 1)² between real and fake images."""
    x = ((real + fake) / 2).requires_grad_()
    (g,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


def train(pair: Pair, opts: list, steps: range, *, gradient_penalty=True, accumulate=1, ema=None):
    """Hinge losses; both networks step once, each from `accumulate` batches of four images."""
    (generator, discriminator), (opt_g, opt_d) = pair, opts
    for step in steps:
        random = torch.Generator().manual_seed(step)
        opt_d.zero_grad()
        for _ in range(accumulate):
            real = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=random)
            noise = torch.randn(4, 3, dtype=torch.float64, generator=random)
            fake = generator(noise).detach()
            loss = (1 - discriminator(real)).relu().mean() + (1 + discriminator(fake)).relu().mean()
            if gradient_penalty:
                loss = loss + 10 * penalty(discriminator, real, fake)
            loss.backward()
        opt_d.step()
        opt_g.zero_grad()
        for _ in range(accumulate):
            noise = torch.randn(4, 3, dtype=torch.float64, generator=random)
            (-discriminator(generator(noise))).mean().backward()
        opt_g.step()
        if ema is not None:
            ema.update_parameters(generator)


def state(*modules: nn.Module) -> list[Tensor]:
    """Parameters, buffers and gradients."""
    tensors = [x for m in modules for x in m.state_dict().values()]
    return tensors + [p.grad for m in modules for p in m.parameters() if p.grad is not None]


def assert_same(mine: list[Tensor], torchs: list[Tensor]) -> None:
    assert len(mine) == len(torchs) > 0
    for x, y in zip(mine, torchs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU every test here takes kernels")
def test_kernels_train_as_torch():
    pytest.importorskip("triton")
    pair = networks()
    mine = fused(pair)
    train(pair, optimizers(pair), range(1))
    with tp.use_path("kernel"):
        train(mine, optimizers(mine), range(1))
    assert tp.stats()["kernel"] == 16
    assert_same(state(*mine), state(*pair))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("gradient_penalty", [False, True], ids=["hinge", "penalty"])
def test_training_is_torchs(gradient_penalty, accumulate):
    pair = networks()
    mine = fused(pair)
    before = state(*deepcopy(pair))
    options = {"gradient_penalty": gradient_penalty, "accumulate": accumulate}
    tp.stats(reset=True)
    for networks_ in (pair, mine):
        train(networks_, optimizers(networks_), range(4), **options)
    assert_same(state(*mine), state(*pair))
    assert not torch.allclose(before[0], state(*pair)[0], rtol=1e-3)
    # Per step and batch the discriminator is called three or four times, and it has three weights.
    reads = 4 * accumulate * (3 * (3 + gradient_penalty) + 2 * 2)
    assert tp.stats()["closed"] == reads
    assert tp.stats()["composed"] == 0


def test_the_average_of_a_generator_is_torchs():
    results = []
    pair = networks()
    for networks_ in (fused(pair), pair):
        ema = AveragedModel(networks_[0], multi_avg_fn=get_ema_multi_avg_fn(0.8))
        train(networks_, optimizers(networks_), range(3), gradient_penalty=False, ema=ema)
        ema.eval()
        noise = torch.ones(2, 3, dtype=torch.float64)
        results.append([*ema.state_dict().values(), ema(noise), networks_[0](noise)])
    assert_same(*results)
    assert not torch.allclose(results[0][-1], results[0][-2])


def test_switching_between_training_and_evaluation():
    images = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    pair = networks()
    for buffer in pair[1].buffers():  # far from converged
        nn.functional.normalize(torch.ones_like(buffer), dim=0, out=buffer)
    modes = (True, False, False, True, False, True)
    values: dict[str, list[Tensor]] = {}
    vectors: dict[str, list[Tensor]] = {}
    for name, (_, discriminator) in (("mine", fused(pair)), ("torch", pair)):
        values[name], vectors[name] = [], []
        for training in modes:
            discriminator.train(training)
            with torch.set_grad_enabled(training):
                values[name].append(discriminator(images))
            vectors[name].append(torch.cat([b.clone() for b in discriminator.buffers()]))
    assert_same(values["mine"], values["torch"])
    assert_same(vectors["mine"], vectors["torch"])
    us = vectors["mine"]
    for before, after, training in zip(us[:-1], us[1:], modes[1:], strict=True):
        assert torch.equal(before, after) is not training


@pytest.mark.parametrize(("here", "there"), [(0, 0), (0, 1), (1, 0)])
def test_resuming_from_a_checkpoint(here, there):
    """Of torch's networks and of ours, and from the one to the other."""
    pair = networks()
    start = (fused(pair), pair)[here]
    opts = optimizers(start)
    train(start, opts, range(2))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (*start, *opts)], file)
    train(start, opts, range(2, 4))

    fresh = networks()
    train(fresh, optimizers(fresh), range(7, 8))  # other values, other u and v
    resumed = (fused(fresh), fresh)[there]
    opts = optimizers(resumed)
    file.seek(0)
    for x, saved in zip((*resumed, *opts), torch.load(file), strict=True):
        x.load_state_dict(saved)
    train(resumed, opts, range(2, 4))
    assert_same(state(*resumed), state(*start))


def test_second_derivatives_in_the_originals():
    """As a step through a step takes them; torch's own of weight norm is wrong on the CPU."""

    def normed(g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    layer = tp.spectral_norm(nn.Linear(5, 4)).double().eval()
    w = layer.parametrizations.weight.original
    u, v = layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v
    other = tp.weight_norm(nn.Linear(5, 4)).double()
    pair = list(other.parametrizations.weight.parameters())
    x = torch.randn(3, 5, dtype=torch.float64)
    for module, leaves, reference in (
        (layer, [w], lambda w: w / (u @ w @ v)),
        (other, pair, normed),
    ):
        seconds = []
        for weight in (lambda m=module: m.weight, lambda f=reference, ls=leaves: f(*ls)):
            gs = torch.autograd.grad((x @ weight().T).exp().sum(), leaves, create_graph=True)
            stepped = [leaf - 0.1 * g for leaf, g in zip(leaves, gs, strict=True)]
            loss = (x @ reference(*stepped).T).square().sum()
            seconds.append(list(torch.autograd.grad(loss, leaves)))
        assert_same(*seconds)


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    for broadcast in (True, False):
        pair = networks()
        for name, bare in (
            ("torch", pair),
            ("fused", fused(pair)),
            ("step", networks(partial(tp.spectral_norm, iterate="step"))),
        ):
            wrap = nn.parallel.DistributedDataParallel
            ddp = [wrap(m, broadcast_buffers=broadcast) for m in bare]
            opts = optimizers(ddp)
            train(ddp, opts, range(10 * rank, 10 * rank + 2))
            results[broadcast, name, rank] = state(*bare)
    assert tp.stats()["closed"] > 0
    results["sharded", rank] = _sharded_and_whole()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _sharded_and_whole() -> list[list[Tensor]]:
    """The buffers and the output of a discriminator by steps, trained under FSDP and alone."""
    from torch.distributed.fsdp import fully_shard

    results = []
    _, discriminator = networks(partial(tp.spectral_norm, iterate="step"))
    sharded = deepcopy(discriminator)
    for layer in (sharded[0], sharded[2], sharded[5], sharded):
        fully_shard(layer)
    images = torch.ones(2, 1, 6, 6, dtype=torch.float64)
    for net in (sharded, discriminator):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()
        results.append([*(b.clone() for b in net.buffers()), net(images).detach()])
    return results


def test_ddp_on_two_ranks(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    results = torch.load(tmp_path / "0.pt") | torch.load(tmp_path / "1.pt")
    for rank in (0, 1):
        assert_same(*results["sharded", rank])
    for broadcast in (True, False):
        for rank in (0, 1):
            assert_same(results[broadcast, "fused", rank], results[broadcast, "torch", rank])
        for name in ("torch", "fused", "step"):
            assert_same(results[broadcast, name, 1], results[broadcast, name, 0])

"""Models that torch constrained, fused: torch's values, state, assignment and training."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.utils._python_dispatch import TorchDispatchMode

import tritonparam as tp
from tests.cases import composed, error, fused
from tests.test_chains import tolerance

MAPS = ("matrix_exp", "cayley", "householder")
SHAPES = ((6, 6), (9, 4), (4, 9), (5, 1), (1, 5), (1, 1), (2, 7, 3), (2, 3, 3, 3), (2, 4, 3, 5))

maps = pytest.mark.parametrize("orthogonal_map", MAPS)
bases = pytest.mark.parametrize("use_trivialization", [True, False], ids=["base", "free"])


def constrained(
    shape: tuple[int, ...],
    orthogonal_map: str,
    use_trivialization: bool,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A module whose weight torch constrained, after a step away from where it starts."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    theirs.orthogonal(module, "weight", orthogonal_map, use_trivialization=use_trivialization)
    if use_trivialization or orthogonal_map == "householder":
        step = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            lower = step.tril(-1) if shape[-2] >= shape[-1] else step.triu(1)
            module.parametrizations.weight.original.add_(lower, alpha=0.3)
    return module.to(dtype)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same_bits(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> None:
    assert list(x) == list(y)
    assert all(torch.equal(x[key], y[key]) for key in x)


@maps
@bases
@pytest.mark.parametrize("dtype", tp.registry.DTYPES, ids=lambda d: str(d)[6:])
def test_values_and_gradients_of_orthogonal_weights(
    orthogonal_map, use_trivialization, dtype, device
):
    # The last is a batch of large matrices, where torch's batched LU fails (pytorch #142815).
    large = ((3, 160, 160),) if orthogonal_map != "cayley" and dtype == torch.float32 else ()
    for shape in (*SHAPES, *large):
        module = constrained(shape, orthogonal_map, use_trivialization, dtype).to(device)
        tp.fuse(module, strict=True)
        g = torch.randn(shape, device=device).to(dtype)
        y64, dx64 = composed(module, g)
        y32, dx32 = composed(module, g, torch.float32)
        path = "kernel" if tp.explain(module)[0].path == "kernel" else "closed"
        y, dx = fused(module, g, path)
        assert y.dtype == dx.dtype == dtype
        assert y.shape == dx.shape == shape
        # torch's are of wide weights without a base, and get .view(-1), as tall gradients do
        assert y.is_contiguous()
        assert dx.is_contiguous()
        assert error(y, y64) <= tolerance(dtype, error(y32, y64)), shape
        assert error(dx, dx64, g) <= tolerance(dtype, error(dx32, dx64, g)), shape


@maps
@bases
def test_a_weight_that_was_read_may_be_written_to(orthogonal_map, use_trivialization):
    for shape in ((6, 6), (9, 4), (4, 9)):
        weight = tp.fuse(constrained(shape, orthogonal_map, use_trivialization)).weight
        assert torch.equal(2 * weight.detach(), weight.mul_(2))


@maps
@bases
def test_the_state_and_what_is_assigned_are_torchs_bits(orthogonal_map, use_trivialization):
    for shape in ((6, 6), (9, 4), (4, 9), (2, 3, 3, 3), (2, 7, 3)):
        module = constrained(shape, orthogonal_map, use_trivialization)
        twin = tp.fuse(copy.deepcopy(module), strict=True)
        modules = (module, twin)
        assert_same_bits(state(module), state(twin))
        orthonormal = torch.linalg.qr(torch.randn(shape).movedim(-1, -2))[0].movedim(-1, -2)
        for value in (torch.randn(shape), orthonormal, torch.randn(shape)[..., 1:]):
            before, outcomes = state(twin), []
            for m in modules:
                torch.manual_seed(1)  # a base is completed by random columns
                try:
                    m.weight = value
                except (NotImplementedError, ValueError) as refused:
                    outcomes.append(str(refused))
                outcomes.append(torch.random.get_rng_state().tolist())
            half = len(outcomes) // 2
            assert outcomes[:half] == outcomes[half:]
            assert_same_bits(state(module), state(twin))
            if half == 2:
                assert_same_bits(before, state(twin))
        for m in modules:
            for other in modules:
                m.load_state_dict(other.state_dict())
        assert error(twin.weight.detach(), module.weight.detach()) <= 1e-6
        tp.remove_parametrizations(twin, "weight")
        assert error(twin.weight.detach(), module.weight.detach()) <= 1e-6


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
@pytest.mark.parametrize(
    ("use_trivialization", "dtype"),
    [(True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)],
)
def test_square_weights_have_kernels(orthogonal_map, use_trivialization, dtype, device):
    for shape in ((1, 1), (2, 5, 5)):
        module = constrained(shape, orthogonal_map, use_trivialization, dtype).to(device)
        tp.fuse(module, strict=True)
        g = torch.randn(shape, device=device).to(dtype)
        y64, dx64 = composed(module, g)
        y32, dx32 = composed(module, g, torch.float32)
        with tp.use_path("kernel"):
            assert tp.explain(module)[0].path == "kernel"
        y, dx = fused(module, g, "kernel")
        assert y.dtype == dx.dtype == dtype
        assert error(y, y64) <= tolerance(dtype, error(y32, y64)), shape
        assert error(dx, dx64, g) <= tolerance(dtype, error(dx32, dx64, g)), shape


class Network(nn.Module):
    """Every constraint that torch has, on the layers that people put them on."""

    def __init__(self, orthogonal_map: str) -> None:
        super().__init__()
        self.conv = theirs.orthogonal(nn.Conv2d(2, 3, 3), "weight", orthogonal_map)
        self.tall = theirs.orthogonal(nn.Linear(12, 20), "weight", orthogonal_map)
        self.wide = theirs.orthogonal(nn.Linear(20, 8), "weight", orthogonal_map)
        self.square = theirs.orthogonal(
            nn.Linear(8, 8), "weight", orthogonal_map, use_trivialization=False
        )
        self.spectral = theirs.spectral_norm(nn.Linear(8, 8))
        self.head = theirs.weight_norm(nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).tanh().flatten(1)
        for layer in (self.tall, self.wide, self.square, self.spectral):
            x = layer(x).tanh()
        return self.head(x)


@maps
def test_fifty_steps_are_torchs(orthogonal_map):
    torch.manual_seed(1)
    networks = [Network(orthogonal_map).double()]
    networks.append(tp.fuse(copy.deepcopy(networks[0]), strict=True))
    x, y = torch.randn(16, 2, 4, 4, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    losses = []
    for network in networks:
        tp.stats(reset=True)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (network(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert tp.stats() == {"kernel": 0, "closed": 300, "composed": 0}
    theirs_, ours = (network.state_dict() for network in networks)
    assert list(theirs_) == list(ours)
    # Adam divides by the root of the second moment: rounding grows to about 1e-13 × 1e4 a step.
    for key, value in theirs_.items():
        assert torch.allclose(ours[key], value, rtol=0, atol=1e-8), key
    assert abs(losses[0] - losses[1]) <= 1e-8
    for network in networks:
        for other in (theirs_, ours):
            network.load_state_dict(other)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operator inside the block makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.entries = max(self.entries, x.numel())
        return out


@maps
def test_nothing_as_large_as_the_base_is_made(orthogonal_map):
    module = tp.fuse(constrained((200, 8), orthogonal_map, use_trivialization=True))
    assert module.parametrizations.weight[0].base.shape == (200, 200)
    for path, most in (("closed", 200 * 16), ("composed", None)):
        with tp.use_path(path), Largest() as largest:
            module.weight.sum().backward()
        assert largest.entries <= most if most else largest.entries >= 200 * 200


def test_weight_decay_does_not_zero_a_householder_weight():
    def decayed(layer: nn.Module) -> torch.Tensor:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
        layer.weight.square().sum().backward()
        optimizer.step()
        return layer.weight

    layer = theirs.orthogonal(nn.Linear(4, 6), "weight", "householder")
    assert torch.equal(decayed(copy.deepcopy(layer)), torch.zeros(6, 4))
    weight = decayed(tp.fuse(layer))
    assert torch.allclose(weight.mT @ weight, torch.eye(4), atol=1e-5)
    assert "where torch truncates it to integers" in tp.explain(layer)[0].reason
    other = tp.fuse(theirs.orthogonal(nn.Linear(4, 6), "weight", "cayley"))
    assert "truncates" not in tp.explain(other)[0].reason


def test_what_torch_refuses_stays_torchs():
    complex_weight = theirs.orthogonal(nn.Linear(3, 3, dtype=torch.complex64))
    row = tp.explain(tp.fuse(complex_weight))[0]
    assert (row.path, row.reason) == ("composed", "complex64 is not a dtype that is fused")
    assert complex_weight.weight.is_complex()
    half = theirs.orthogonal(nn.Linear(3, 3, dtype=torch.bfloat16))  # torch finds no base for it
    assert tp.explain(tp.fuse(half))[0].reason == "the base does not fit the original"
    with pytest.raises(TypeError, match="unsupported operand"):
        half.weight
    layer = tp.fuse(theirs.orthogonal(nn.Linear(3, 5)))
    link = layer.parametrizations.weight[0]
    link.base = link.base.double()
    assert "the original's device and dtype" in tp.explain(layer)[0].reason
    with pytest.raises(RuntimeError, match="same dtype"):
        layer.weight


@pytest.mark.parametrize("constrain", [theirs.orthogonal, tp.orthogonal], ids=["theirs", "ours"])
@pytest.mark.parametrize("shape", [(3, 3), (5, 3)])
def test_a_base_that_is_trained_has_its_gradient(constrain, shape):
    module = tp.fuse(constrain(nn.Linear(*shape), orthogonal_map="cayley"))
    assert tp.explain(module)[0].path == "closed"
    link = module.parametrizations.weight[0]
    base = link._buffers.pop("base")
    link.base = nn.Parameter(base)
    assert tp.explain(module)[0].reason == "the base requires a gradient"
    module.weight.square().cumsum(0).sum().backward()
    assert link.base.grad.any()


@maps
def test_autocast_does_not_reach_the_base(orthogonal_map):
    module = tp.fuse(constrained((9, 4), orthogonal_map, use_trivialization=True))
    x, g = module.parametrizations.weight.original, torch.randn(9, 4)
    expected = module.weight
    (gradient,) = torch.autograd.grad(expected, x, g)
    with torch.autocast("cpu", torch.bfloat16):
        weight = module.weight
        (dx,) = torch.autograd.grad(weight, x, g)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, expected)
    assert torch.equal(dx, gradient)


@bases
def test_compile_fullgraph_and_two_derivatives(use_trivialization):
    torch.compiler.reset()
    module = constrained((7, 3), "cayley", use_trivialization, torch.float64)
    tp.fuse(module, strict=True)
    x = module.parametrizations.weight.original

    def loss(x):
        return torch.func.functional_call(
            Held(module), {"module.parametrizations.weight.original": x}, ()
        )

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)
    compiled = torch.compile(lambda: module.weight.cos(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(), module.weight.cos())
    (dx,) = torch.autograd.grad(compiled().sum(), x)
    assert torch.allclose(dx, torch.autograd.grad(module.weight.cos().sum(), x)[0])
    assert tp.stats()["composed"] == 0


@maps
@pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
def test_second_derivatives_are_contiguous_as_first_ones(orthogonal_map, shape):
    module = tp.fuse(constrained(shape, orthogonal_map, use_trivialization=True))
    x = module.parametrizations.weight.original
    (dx,) = torch.autograd.grad(module.weight.cos().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.stride() == second.stride() == x.stride()


class Held(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> torch.Tensor:
        return self.module.weight


def test_a_fused_weight_norm_loads_legacy_checkpoints():
    legacy = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    layer = tp.fuse(theirs.weight_norm(nn.Linear(3, 2)), strict=True)
    layer.load_state_dict(legacy.state_dict())
    x = torch.ones(1, 3)
    assert torch.allclose(layer(x), legacy(x))
    tp.unfuse(layer).load_state_dict(legacy.state_dict())


def test_spectral_norm_iterates_when_torchs_does():
    layer = theirs.spectral_norm(nn.Linear(5, 4))
    twin = tp.fuse(copy.deepcopy(layer), strict=True)
    for training in (True, True, False, True):
        vectors = []
        for m in (layer, twin):
            before = m.train(training).parametrizations.weight[0]._u.clone()
            m.weight
            after = m.parametrizations.weight[0]._u
            assert torch.equal(before, after) == (not training)
            vectors.append(after)
        assert torch.equal(*vectors)


EMBEDDED = {
    "orthogonal": lambda m: theirs.orthogonal(m, orthogonal_map="cayley"),
    "spectral_norm": theirs.spectral_norm,
    "weight_norm": lambda m: theirs.weight_norm(m, dim=None),
}


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("path", ["closed", "kernel"])
@pytest.mark.parametrize("constraint", EMBEDDED)
def test_the_gradient_of_an_embedding_may_be_sparse(constraint, path, cached, device):
    size = (300, 120) if path == "closed" else (9, 4)  # torch's own graphs of small norms take it
    layer = EMBEDDED[constraint](nn.Embedding(*size)).eval().to(device)
    tp.fuse(layer, strict=True)
    i = torch.tensor([[3, 0], [1, 3]], device=device)
    gradients = []
    for layer.sparse in (False, True):
        layer.zero_grad()
        with tp.use_path(path), tp.cached(layer) if cached else nullcontext():
            layer(i).cos().sum().backward()
        gradients.append([x.grad for x in layer.parameters()])
    for dense, of_sparse in zip(*gradients, strict=True):
        assert torch.equal(of_sparse, dense)

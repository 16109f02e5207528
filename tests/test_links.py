"""The links: their meaning, their right inverses, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tritonparam as tp

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])


def orthogonal(*shape: int, det: float | None = None) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0]
    if det is not None:
        q[..., 0] *= torch.sign(torch.linalg.det(q) * det).unsqueeze(-1)
    return q


def rotation(n: int, largest_angle: float, smallest_angle: float = 0.1) -> torch.Tensor:
    """An orthogonal matrix with these eigenvalue angles: largest, ..., smallest, in pairs."""
    angles = torch.linspace(largest_angle, smallest_angle, n // 2, dtype=torch.float64)
    x = torch.zeros(n, n, dtype=torch.float64)
    for i, angle in enumerate(angles):
        x[2 * i, 2 * i + 1], x[2 * i + 1, 2 * i] = angle, -angle
    q = orthogonal(n, n)
    return q @ torch.matrix_exp(torch.stack((x, x)))[0] @ q.mT


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 4, 4), (2, 3, 5, 5), (0, 3, 3), (0, 0)])
@each_float
def test_symmetric_and_skew(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for link, sign in ((tp.Symmetric(), 1), (tp.Skew(), -1)):
        a = link(x)
        assert a.dtype == dtype
        assert torch.equal(a, sign * a.mT)
        assert torch.equal(a.triu(1), x.triu(1))
        assert torch.equal(link(link.right_inverse(a)), a)


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (2, 3, 5, 5), (3, 160, 160), (0, 3, 3), (0, 0)])
@each_float
def test_cayley_map_is_orthogonal_and_inverts(shape, dtype):
    skew, cayley = tp.Skew(), tp.CayleyMap()
    x = skew(torch.randn(shape) / max(shape[-1], 1) ** 0.5).to(dtype)
    q = cayley(x)
    eps = torch.finfo(dtype).eps
    assert q.dtype == dtype
    eye = torch.eye(shape[-1], dtype=torch.float64)
    n = max(shape[-1], 1)
    assert torch.allclose(q.double().mT @ q.double(), eye.expand(shape), atol=8 * eps * n**0.5)
    back = cayley.right_inverse(q)
    assert torch.equal(back, -back.mT)
    # The inverse has condition |I + X|² / 2, about 3 for a gaussian X of norm 2.
    assert torch.allclose(back.double(), x.double(), atol=16 * eps * n**0.5)
    assert torch.equal(cayley.signature, torch.ones(shape[:-1], dtype=dtype))


def test_cayley_map_has_the_sign_of_the_formula():
    x = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    eye = torch.eye(2)
    expected = (eye + x) @ torch.linalg.inv(eye - x)
    assert torch.allclose(tp.CayleyMap()(x), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 65])
@pytest.mark.parametrize("det", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_orthogonal_matrix_can_be_assigned(n, det, dtype):
    q = orthogonal(4, n, n, det=det).to(dtype)
    q[0] = torch.diag(torch.tensor([det] + [1.0] * (n - 1), dtype=dtype))
    q[1] = -torch.eye(n, dtype=dtype)
    cayley = tp.CayleyMap(n)
    x = cayley.right_inverse(q)
    assert torch.equal(x, -x.mT)
    # ‖X‖ stays below 42 at n = 256, so that the map loses less than two digits.
    assert torch.allclose(cayley(x), q, atol=200 * torch.finfo(dtype).eps)
    assert cayley.signature.shape == (4, n)
    assert torch.equal(cayley.signature.abs(), torch.ones(4, n, dtype=dtype))
    expected_det = torch.linalg.det(q.double()).sign()
    assert torch.equal(cayley.signature.double().prod(-1), expected_det)


def test_signs_are_kept_where_the_plain_map_reaches():
    cayley = tp.CayleyMap()
    q = torch.stack((rotation(6, 3.0), orthogonal(6, 6, det=-1.0)))
    cayley.right_inverse(q)
    assert torch.equal(cayley.signature[0], torch.ones(6, dtype=torch.float64))
    assert (cayley.signature[1] < 0).any()


def test_cayley_map_loads_what_a_bare_map_saved():
    cayley = tp.CayleyMap(3)
    assert cayley.load_state_dict({"Id": torch.eye(3)}, strict=True)
    assert torch.equal(cayley.signature, torch.ones(3))
    cayley.load_state_dict({"signature": torch.tensor([1.0, -1.0, 1.0])})
    assert cayley.signature[1] == -1
    fresh = tp.CayleyMap()
    fresh.load_state_dict(cayley.state_dict())
    assert torch.equal(fresh.signature, cayley.signature)


@pytest.mark.parametrize("norm", [1e-3, 0.051, 0.3, 0.6, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_lone_matrix_exponential_is_as_right_as_a_batched_one(norm, dtype):
    x = torch.tensor([[0.0, norm], [-norm, 0.0]], dtype=dtype)
    e = tp.MatrixExponential()(x)
    c, s = math.cos(float(x[0, 1])), math.sin(float(x[0, 1]))
    expected = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    # Squaring ⌈log2 norm⌉ times doubles the error each time.
    assert torch.allclose(e.double(), expected, atol=4 * max(norm, 1.0) * torch.finfo(dtype).eps)


@each_float
def test_matrix_exponential_16_bit_and_batches(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype)
    e = tp.MatrixExponential()(x)
    expected = torch.matrix_exp(x.double())
    assert e.dtype == dtype
    assert torch.allclose(e.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-4)
    assert tp.MatrixExponential()(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert tp.MatrixExponential()(torch.zeros(0, 0)).shape == (0, 0)


ROTATIONS = {
    "large angles": lambda n: rotation(n, 3.0),
    "a half turn": lambda n: rotation(n, math.pi),
    "half turns": lambda n: rotation(n, math.pi, math.pi),
    "minus one and one": lambda n: torch.diag((torch.arange(n) < n // 2 * 2 - 2).double() * -2 + 1),
    "almost half turns": lambda n: rotation(n, math.pi - 1e-4, math.pi - 1e-9),
    "one angle": lambda n: rotation(n, 2.5, 2.5),
    "small angles": lambda n: rotation(n, 1e-4, 1e-17),
    "any": lambda n: orthogonal(n, n, det=1.0),
    "none": lambda n: torch.eye(n, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda d: str(d)[6:])
def test_logarithm_of_rotations_is_exactly_skew(kind, dtype):
    for n in (1, 2, 5, 32):
        q = ROTATIONS[kind](n).to(dtype)
        x = tp.MatrixExponential().right_inverse(q)
        assert torch.equal(x, -x.mT)
        angles, v = torch.linalg.eigh(1j * x.double())
        eps = torch.finfo(dtype).eps
        assert angles.abs().max() <= math.pi * (1 + 8 * eps)
        exp = ((v * (-1j * angles).exp()) @ v.mH).real
        # A few dozen roundings of eigenvectors; that of x itself is that of angles up to π.
        assert float((exp - q.double()).abs().max()) <= (32 if dtype == torch.float64 else 4) * eps


@pytest.mark.parametrize("angle", [math.pi, math.pi - 1e-4, 2.5])
def test_a_rotation_that_is_assigned_comes_back(angle):
    layer = tp.register_parametrization(
        nn.Linear(9, 9), "weight", tp.Skew(), tp.MatrixExponential()
    )
    q = rotation(9, angle, angle).float()
    layer.weight = q
    assert torch.allclose(layer.weight, q, atol=16 * torch.finfo(q.dtype).eps)


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_logarithm_of_spd_is_exactly_symmetric(n):
    exp = tp.MatrixExponential()
    a = torch.randn(3, n, n, dtype=torch.float64)
    p = a @ a.mT + 0.1 * torch.eye(n)
    p[0] = torch.eye(n, dtype=torch.float64) * (
        1 + 1e-9
    )  # orthogonal to rounding in fp32, and symmetric
    x = exp.right_inverse((p + p.mT) / 2)
    assert torch.equal(x, x.mT)
    assert torch.allclose(exp(x), p, rtol=1e-11, atol=1e-11)
    assert (x[0] != 0).any()
    scaled = 0.9921875 * torch.eye(
        min(64 * n, 256), dtype=torch.bfloat16
    )  # its rounding hides the scale
    assert torch.allclose(exp(exp.right_inverse(scaled)), scaled, rtol=0, atol=2**-9)


@pytest.mark.parametrize("n", [2, 3, 10, 40])
def test_logarithm_of_general_matrices(n):
    exp = tp.MatrixExponential()
    x = torch.randn(n, n, dtype=torch.float64)
    x *= 2.5 / torch.linalg.matrix_norm(x, 2)  # all |Im λ| < π: x is the principal logarithm
    a = exp(x)
    assert torch.allclose(exp.right_inverse(a), x, atol=1e-10)
    defective = torch.eye(n, dtype=torch.float64) * 3
    defective[0, 1] = 1.0
    log = exp.right_inverse(defective)
    assert torch.allclose(exp(log), defective, atol=1e-12)
    mixed = torch.stack((a, rotation(n, 2.0), exp(x + x.mT)))
    assert torch.allclose(exp(exp.right_inverse(mixed)), mixed, rtol=1e-9, atol=1e-9)


def test_pruning():
    x = torch.randn(50, 40)
    link = tp.Pruning.random(x, p_drop=0.2)
    assert link.mask.shape == x.shape
    assert 0.7 < link.mask.mean() < 0.9  # 2000 draws: σ = 0.009
    assert torch.equal(link(x), x * link.mask)
    back = link.right_inverse(x)
    assert torch.equal(back, x)
    assert back.data_ptr() != x.data_ptr()
    mask = torch.tensor([1.0, 0.0])
    assert torch.equal(tp.Pruning(mask)(torch.ones(3, 2)), mask.expand(3, 2))


REFUSED_VALUES = {
    "Skew not skew": (tp.Skew(), torch.eye(3), "Skew: the assigned matrix must equal minus"),
    "Skew of a symmetric": (tp.Skew(), torch.ones(2, 2), "must equal minus its transpose"),
    "Symmetric not symmetric": (
        tp.Symmetric(),
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "Symmetric: the assigned matrix must equal its transpose",
    ),
    "Cayley not orthogonal": (tp.CayleyMap(), 2 * torch.eye(3), "must be orthogonal"),
    "Cayley barely off": (
        tp.CayleyMap(),
        torch.eye(3) + 1e-3 * torch.ones(3, 3),
        "must be orthogonal, got max",
    ),
    "Cayley of zero": (tp.CayleyMap(), torch.zeros(2, 2), "must be orthogonal"),
    "exp singular": (tp.MatrixExponential(), torch.zeros(2, 2), "real principal logarithm"),
    "exp indefinite": (
        tp.MatrixExponential(),
        torch.diag(torch.tensor([1.0, -2.0])),
        "eigenvalue -2",
    ),
    "exp reflection": (
        tp.MatrixExponential(),
        orthogonal(5, 5, det=-1.0).float(),
        "determinant -1",
    ),
    "exp point reflection": (tp.MatrixExponential(), -torch.eye(3), "real principal logarithm"),
    "exp general negative": (
        tp.MatrixExponential(),
        torch.tensor([[-1.0, 5.0], [0.0, 2.0]]),
        "eigenvalue -1",
    ),
}


@pytest.mark.parametrize("what", REFUSED_VALUES)
def test_no_preimage(what):
    link, value, message = REFUSED_VALUES[what]
    with pytest.raises(tp.NoPreimage, match=message) as caught:
        link.right_inverse(value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, NotImplementedError)


LINKS = (tp.Symmetric, tp.Skew, tp.CayleyMap, tp.MatrixExponential)


@pytest.mark.parametrize("link", [*LINKS, lambda: tp.Pruning(torch.ones(2, 2))])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_assigned_values_must_be_finite(link, bad):
    with pytest.raises(tp.NoPreimage, match="must be finite, got NaN or infinite entries"):
        link().right_inverse(torch.full((2, 2), bad))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 3)])
def test_only_square_matrices(link, shape):
    for method in (link(), link().right_inverse):
        with pytest.raises(ValueError, match=r"must have shape \[..., n, n\], got \["):
            method(torch.ones(shape))


@pytest.mark.parametrize("link", [tp.CayleyMap, tp.MatrixExponential])
def test_only_floats(link):
    for method in (link(), link().right_inverse):
        with pytest.raises(TypeError, match=r"floating-point dtype, got torch.int64"):
            method(torch.ones(2, 2, dtype=torch.int64))


def test_complex_maps_but_does_not_assign():
    x = torch.randn(3, 3, dtype=torch.complex64)
    q = tp.CayleyMap()(tp.Skew()(x))
    assert torch.allclose(q.mT @ q, torch.eye(3, dtype=q.dtype), atol=1e-4)
    assert tp.MatrixExponential()(x).dtype == torch.complex64
    for link in (tp.CayleyMap(), tp.MatrixExponential()):
        with pytest.raises(tp.NoPreimage, match="only real matrices"):
            link.right_inverse(q)


@pytest.mark.parametrize("n", [-1, 2.0, True, "3"])
def test_cayley_map_size(n):
    with pytest.raises(ValueError, match=r"CayleyMap: n must be a non-negative integer"):
        tp.CayleyMap(n)
    with pytest.raises(ValueError, match=r"must have shape \[3, 3\]"):
        tp.CayleyMap(3)(torch.zeros(4, 4))


def test_pruning_arguments():
    with pytest.raises(TypeError, match="mask must be a tensor, got float"):
        tp.Pruning(0.2)
    with pytest.raises(ValueError, match="p_drop must be between 0 and 1, got 1.5"):
        tp.Pruning.random(torch.ones(2), p_drop=1.5)


def test_links_compute_in_full_precision_under_autocast():
    x = tp.Skew()(torch.randn(16, 16) / 4)
    for link in (tp.CayleyMap(), tp.MatrixExponential()):
        expected = link(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(link(x), expected)
    assert isinstance(tp.CayleyMap(), nn.Module)

"""Every step of PyTorch's parametrizations tutorial, with tritonparam in parametrize's place.

https://pytorch.org/tutorials/intermediate/parametrizations.html; its classes are copied where the
step is about writing them, and ours where it is about using them, so that both are exercised.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonparam as parametrize
from tritonparam import CayleyMap, MatrixExponential, Pruning, Skew, Symmetric


class TutorialSymmetric(nn.Module):
    def forward(self, X):
        return X.triu() + X.triu(1).transpose(-1, -2)


class TutorialSkew(nn.Module):
    def forward(self, X):
        A = X.triu(1)
        return A - A.transpose(-1, -2)

    def right_inverse(self, A):
        return A.triu(1)


class TutorialPruning(nn.Module):
    def __init__(self, X, p_drop=0.2):
        super().__init__()
        mask = torch.full_like(X, 1.0 - p_drop)
        self.mask = torch.bernoulli(mask)

    def forward(self, X):
        return X * self.mask

    def right_inverse(self, A):
        return A


@pytest.mark.parametrize("link", [Symmetric, TutorialSymmetric])
def test_a_symmetric_layer(link):
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", link())
    A = layer.weight
    assert torch.allclose(A, A.T)


@pytest.mark.parametrize("link", [Skew, TutorialSkew])
def test_skew_convolution_kernels(link):
    cnn = nn.Conv2d(in_channels=5, out_channels=8, kernel_size=3)
    parametrize.register_parametrization(cnn, "weight", link())
    for i, j in ((0, 1), (2, 2)):
        kernel = cnn.weight[i, j]
        assert torch.equal(kernel, -kernel.T)
    assert cnn(torch.randn(1, 5, 6, 6)).shape == (1, 8, 4, 4)


def test_inspecting_a_parametrized_module():
    layer = nn.Linear(3, 3)
    assert repr(layer) == "Linear(in_features=3, out_features=3, bias=True)"
    parametrize.register_parametrization(layer, "weight", Symmetric())
    assert repr(layer) == (
        "ParametrizedLinear(\n"
        "  in_features=3, out_features=3, bias=True\n"
        "  (parametrizations): ModuleDict(\n"
        "    (weight): ParametrizationList(\n"
        "      (0): Symmetric()\n"
        "    )\n"
        "  )\n"
        ")"
    )
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    assert isinstance(layer.parametrizations.weight, parametrize.ParametrizationList)
    assert isinstance(layer.parametrizations["weight"][0], Symmetric)
    assert type(layer).__name__ == "ParametrizedLinear"
    assert parametrize.type_before_parametrizations(layer) is nn.Linear
    assert parametrize.is_parametrized(layer, "weight")
    assert not parametrize.is_parametrized(layer, "bias")
    assert list(dict(layer.named_parameters())) == ["bias", "parametrizations.weight.original"]
    symmetric = layer.parametrizations.weight[0]
    assert torch.equal(layer.weight, symmetric(layer.parametrizations.weight.original))


def test_parametrizations_are_first_class_citizens(capsys):
    class NoisyParametrization(nn.Module):
        def forward(self, X):
            print("Computing the Parametrization")
            return X

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", NoisyParametrization())
    capsys.readouterr()
    layer.weight + layer.weight.T
    layer.weight.sum()
    assert capsys.readouterr().out.count("Computing the Parametrization") == 3
    with parametrize.cached():
        foo = layer.weight + layer.weight.T
        bar = layer.weight.sum()
    assert capsys.readouterr().out.count("Computing the Parametrization") == 1
    assert torch.allclose(foo.sum(), 2 * bar, atol=1e-5)


def test_concatenating_parametrizations():
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Skew())
    parametrize.register_parametrization(layer, "weight", CayleyMap(3))
    X = layer.weight
    assert torch.dist(X.T @ X, torch.eye(3)) < 1e-5

    layer_orthogonal = nn.Linear(3, 3)
    parametrize.register_parametrization(layer_orthogonal, "weight", Skew())
    parametrize.register_parametrization(layer_orthogonal, "weight", MatrixExponential())
    X = layer_orthogonal.weight
    assert torch.dist(X.T @ X, torch.eye(3)) < 1e-5

    layer_spd = nn.Linear(3, 3)
    parametrize.register_parametrization(layer_spd, "weight", Symmetric())
    parametrize.register_parametrization(layer_spd, "weight", MatrixExponential())
    X = layer_spd.weight
    assert torch.dist(X, X.T) < 1e-5
    assert (torch.linalg.eigvalsh(X) > 0.0).all()


@pytest.mark.parametrize("link", [Skew, TutorialSkew])
def test_initializing_a_skew_layer(link):
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", link())
    X = torch.rand(3, 3)
    X = X - X.T
    layer.weight = X
    assert torch.dist(layer.weight, X) == 0


@pytest.mark.parametrize("det", [1, -1])
def test_initializing_an_orthogonal_layer(det):
    layer_orthogonal = nn.Linear(3, 3)
    parametrize.register_parametrization(layer_orthogonal, "weight", Skew())
    parametrize.register_parametrization(layer_orthogonal, "weight", CayleyMap(3))
    X = torch.empty(3, 3)
    nn.init.orthogonal_(X)
    if X.det() * det < 0.0:
        X[0].neg_()
    layer_orthogonal.weight = X
    parametrize.stats(reset=True)
    # In the tutorial the sign of Cayley's right_inverse is wrong: it gives X.T.
    assert torch.dist(layer_orthogonal.weight, X) < 1e-5
    assert parametrize.stats()["closed"] == 1


@pytest.mark.parametrize("arguments", [(), (5,)], ids=["CayleyMap()", "CayleyMap(5)"])
def test_the_succinct_line(arguments):
    dets = set()
    for seed in range(8):
        torch.manual_seed(seed)
        layer = nn.Linear(5, 5)
        parametrize.register_parametrization(layer, "weight", Skew())
        parametrize.register_parametrization(layer, "weight", CayleyMap(5))
        # In the tutorial this line fails or returns garbage where the determinant is -1.
        layer.weight = nn.init.orthogonal_(layer.weight)
        weight = layer.weight.detach()
        torch.manual_seed(seed)
        nn.Linear(5, 5)
        expected = nn.init.orthogonal_(torch.empty(5, 5))
        assert torch.dist(weight, expected) < 1e-5
        dets.add(round(float(weight.det())))

        fresh = nn.Linear(5, 5)
        parametrize.register_parametrization(fresh, "weight", Skew(), CayleyMap(*arguments))
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh.weight, weight)
    assert dets == {1, -1}


@pytest.mark.parametrize("ours", [True, False])
def test_randomized_pruning(ours):
    layer = nn.Linear(3, 4)
    X = torch.rand_like(layer.weight)
    pruning = Pruning.random(layer.weight, p_drop=0.2) if ours else None
    pruning = pruning or TutorialPruning(layer.weight, p_drop=0.2)
    parametrize.register_parametrization(layer, "weight", pruning)
    layer.weight = X
    assert torch.dist(layer.weight, X * layer.parametrizations.weight[0].mask) == 0


def test_removing_parametrizations():
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Skew())
    after = layer.weight.detach()
    parametrize.remove_parametrizations(layer, "weight")
    assert repr(layer) == "Linear(in_features=3, out_features=3, bias=True)"
    assert torch.equal(layer.weight, after)
    assert isinstance(layer.weight, nn.Parameter)

    layer.weight = nn.Parameter(before.clone())
    parametrize.register_parametrization(layer, "weight", Skew())
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(layer.weight, before)
    assert not parametrize.is_parametrized(layer)

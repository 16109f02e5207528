"""The benchmarks' peers: they compute what the row says, or say what they are, or are absent."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, rounds, weights
from benchmarks import peers as peers_of
from benchmarks.cases import BOTH, Timed
from benchmarks.clock import Clock
from benchmarks.peers import PEERS, Peer, constraint_error


def rows_of(timed, clock, phase=BOTH):
    table = [row for part in measure.forward_backward(timed, clock) for row in part]
    return [row for row in table if row["phase"] == phase]


def from_peers(timed, clock):
    return {row["contender"]: row for row in rows_of(timed, clock) if "speedup_of_ours" in row}


@pytest.fixture
def quick(monkeypatch):
    """A clock of the CPU; nothing is compiled."""
    for name, value in (("ROUNDS", 3), ("WARM_UP", 1)):
        monkeypatch.setattr(rounds, name, value)
    monkeypatch.setattr(weights, "SLOW", 0.0)
    return Clock("cpu", largest=(1 << 12, 8))


class Orgqr:
    """What torch-householder computes, by torch: reflectors of the columns, times `eye`."""

    @staticmethod
    def torch_householder_orgqr(param, eye):
        below = param.tril(-1) / param.diagonal()
        tau = 2 / (1 + below.square().sum(0))
        return torch.linalg.householder_product(below, tau) @ eye[: eye.size(-1)]


class OFTRotationModule(torch.nn.Module):
    """Of PEFT's, what is used: a series of some terms."""

    def __init__(self, r, n_elements, block_size, in_features):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(r, n_elements))
        self.block_size, self.use_cayley_neumann, self.num_cayley_neumann_terms = (
            block_size,
            True,
            5,
        )
        assert in_features == r * block_size

    def _cayley_batch(self, q, n, neumann, terms):
        assert neumann
        rows, columns = torch.triu_indices(n, n, 1)
        a = torch.zeros(len(q), n, n).index_put((torch.arange(len(q))[:, None], rows, columns), q)
        a = a - a.mT
        powers = [torch.linalg.matrix_power(a, i) for i in range(1, terms)]
        return torch.eye(n) + 2 * sum(powers[:-1]) + powers[-1]


@pytest.mark.parametrize(
    ("chain", "shape", "names"),
    [
        ("cayley", (2, 5, 5), {"torch", "geotorch", "peft"}),
        ("skew_exp", (5, 5), {"torch", "geotorch"}),
        ("symmetric_exp", (2, 5, 5), {"geotorch"}),
        ("matrix_exp", (5, 5), set()),
        ("tall_cayley", (9, 4), {"geotorch"}),
        ("tall_exp", (9, 4), {"geotorch"}),
        ("householder", (9, 4), {"torch-householder"}),
        ("weight_norm", (9, 4), set()),
    ],
)
def test_peers_compute_what_the_row_says(chain, shape, names, quick, monkeypatch):
    pytest.importorskip("geotorch")
    stand_ins = {"torch_householder": Orgqr, "peft": SimpleNamespace()}
    stand_ins |= {"peft.tuners": SimpleNamespace(), "peft.tuners.oft": SimpleNamespace()}
    layer = SimpleNamespace(OFTRotationModule=OFTRotationModule)
    for name, module in (stand_ins | {"peft.tuners.oft.layer": layer}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers_of, "find_spec", lambda name: name)
    found = from_peers(Timed(chain, (shape,)), quick)
    assert set(found) == names
    for name, row in found.items():
        assert row["median_us"] > 0
        assert row["speedup_of_ours"] > 0
        assert row["peak_bytes"] > 4 * math.prod(shape)
        if name == "peft":  # the norm of the argument is 1: the series says little
            assert row["approximate"]
            assert 0.1 < row["constraint_error"] < 1
        else:
            assert row.get("constraint_error", 0.0) < 1e-5
            assert row.get("value_error", 0.0) < 1e-5
        assert ("constraint_error" in row) == (chain != "matrix_exp")
        assert ("value_error" in row) == ((chain, name) != ("symmetric_exp", "geotorch"))


@pytest.mark.parametrize("module", ["peft.tuners.oft.layer", "torch_householder"])
def test_installed_peers_load(module):
    pytest.importorskip(module)
    peer = next(peer for peer in PEERS if peer.module == module)
    (chain,) = peer.chains
    case = Timed(chain, ()).case
    x = case.original((2, 6, 6) if chain == "cayley" else (9, 4), 0.05, torch.float32)
    weight = peer.make(case, x).weight
    weight.backward(torch.randn(weight.shape))
    assert constraint_error(chain, weight) < 1e-5


def test_a_peer_that_does_not_load_is_absent(monkeypatch):
    missing = [replace(peer, module="no_such_package.inside") for peer in PEERS]
    monkeypatch.setattr(peers_of, "PEERS", missing)
    assert peers_of.peers("cayley", (4, 4)) == []
    monkeypatch.setattr(peers_of, "find_spec", lambda name: name)
    with pytest.warns(UserWarning, match="geotorch is installed but does not load: No module"):
        assert peers_of.peers("tall_exp", (9, 4)) == []


def test_geotorch_is_absent_where_it_would_make_large_square_matrices():
    assert "geotorch" not in {peer.name for peer in peers_of.peers("tall_exp", (30000, 50))}


def test_a_peer_that_is_wrong_or_fails_or_has_no_room_is_a_row_of_none(quick, monkeypatch):
    def no_room(case, original):
        raise torch.OutOfMemoryError("out of memory")

    def other(case, original):
        raise AttributeError("it has no _cayley_batch\nany more")

    def off(case, original):
        return case.module(original * (1 + 1e-2))

    wrong = Peer("wrong", "torch", ("cayley",), off)
    none = replace(wrong, name="large", make=no_room)
    near = replace(wrong, name="near", approximate=True)
    fails = replace(wrong, name="fails", make=other)
    monkeypatch.setattr(weights, "peers", lambda chain, shape: [wrong, none, fails, near])
    *_, a, b, d, c = rows_of(Timed("cayley", ((4, 4),)), quick)
    assert a["median_us"] is b["median_us"] is d["median_us"] is None
    assert d["timed"] == "none: it fails: it has no _cayley_batch"
    assert a["timed"] == f"none: it is off by {a['value_error']:.1e}"
    assert b["timed"] == "none: it runs out of memory"
    assert c["median_us"] > 0
    assert c["approximate"]


def test_a_slow_peer_is_timed_once(quick, monkeypatch):
    monkeypatch.setitem(measure.ONCE, "cpu", 0.0)
    peer = Peer("slow", "torch", ("skew_exp",), lambda case, x: case.module(x))
    monkeypatch.setattr(weights, "peers", lambda chain, shape: [peer])
    row = from_peers(Timed("skew_exp", ((4, 4),)), quick)["slow"]
    assert row["p20_us"] == row["p80_us"] == row["median_us"] > 0


def test_the_distance_from_a_constraint():
    q = torch.linalg.qr(torch.randn(3, 6, 4, dtype=torch.float64))[0]
    assert constraint_error("tall_cayley", q) < 1e-14
    q[1] *= 1 + 1e-3
    assert constraint_error("tall_cayley", q) == pytest.approx(2e-3, rel=1e-3)
    spd = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert constraint_error("symmetric_exp", spd) == 0.0
    assert constraint_error("symmetric_exp", spd - 2 * torch.eye(3)) == pytest.approx(0.5)
    assert constraint_error("weight_norm", q) is None

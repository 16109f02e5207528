"""RNNs: torch's values, every weight evaluated once per forward, and nothing kept after it."""

from __future__ import annotations

import pickle
import threading
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import tritonparam as tp
from tests.counted import assert_same, calls, constrained

RNNS = (nn.RNN, nn.GRU, nn.LSTM)
remove = pytest.mark.parametrize(
    "remove", [tp.remove_parametrizations, torch_parametrize.remove_parametrizations]
)


LAYOUTS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    "packed": {"bidirectional": True},
    "projected": {"proj_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", RNNS)
def test_an_rnn_is_torchs_and_evaluates_once(cell, layout):
    if layout == "projected" and cell is not nn.LSTM:
        pytest.skip("only an LSTM has projections")
    rnn = cell(3, 4, **LAYOUTS[layout])
    names = [n for n, _ in rnn.named_parameters() if n.startswith("weight")]
    constrained(rnn, *names)
    once = tp.fuse(deepcopy(rnn))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    if layout == "packed":
        x = pack_padded_sequence(x, torch.tensor([5, 3]))
    calls(once)
    assert_same(once, rnn, x)
    assert calls(once) == [1] * len(names)
    once.eval()(x)
    with torch.no_grad():
        once(x)
    assert calls(once) == [2] * len(names)
    assert calls(rnn)[0] > 1  # torch's own


@pytest.mark.parametrize("cell", RNNS)
def test_fused_chains_too(cell):
    rnn = cell(3, 4, num_layers=2)
    tp.orthogonal_gates(tp.orthogonal_gates(rnn), "weight_hh_l1")
    x = torch.randn(5, 2, 3)
    tp.stats(reset=True)
    rnn(x)[0].sum().backward()
    assert tp.stats() == {"kernel": 0, "closed": 2, "composed": 0}
    with tp.use_path("composed"):
        rnn(x)
    assert tp.stats(reset=True)["composed"] == 2
    with tp.cached():
        rnn(x), rnn(x), rnn.weight_hh_l0
    assert tp.stats()["closed"] == 2


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_evaluate_once(cell):
    rnn = constrained(cell(3, 4), "weight_hh", "weight_ih")
    once = tp.fuse(deepcopy(rnn))
    calls(once)
    assert_same(once, rnn, torch.randn(2, 3, dtype=torch.float64))
    assert calls(once) == [1, 1]


def trained(cell=nn.LSTM, **options) -> tuple[nn.Module, torch.Tensor]:
    """An RNN with a constrained recurrent weight after a step of training, and an input."""
    rnn = cell(3, 4, **options)
    tp.orthogonal_gates(rnn, "weight_hh_l0", "cayley")
    x = torch.randn(5, 2, 3)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    for _ in range(2):
        rnn(x)[0].square().sum().backward()
        optimizer.step()
    return rnn, x


@pytest.mark.parametrize("cell", RNNS)
def test_copies_after_training(cell):
    rnn, x = trained(cell)
    y = rnn(x)[0]
    copied = deepcopy(rnn)
    averaged = torch.optim.swa_utils.AveragedModel(rnn)
    averaged.update_parameters(rnn)
    for other in (copied, averaged.module):
        assert torch.equal(other(x)[0], y)
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1)
    assert torch.equal(rnn(x)[0], y)
    assert not torch.allclose(copied(x)[0], y)
    tp.remove_parametrizations(copied, "weight_hh_l0")
    assert type(copied) is cell
    assert torch.equal(rnn(x)[0], y)


def test_moves_and_conversions_evaluate_nothing(monkeypatch):
    rnn, x = trained()
    # It moves the storage of weights on a GPU, of those that autograd has saved too.
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", None)
    y = rnn(x)[0]
    tp.stats(reset=True)
    rnn.double().train().eval().flatten_parameters()
    assert sum(tp.stats().values()) == 0
    y64 = rnn(x.double())[0]
    assert torch.allclose(y64.float(), y, atol=1e-6)
    y64.sum().backward()
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float32\) does not match"):
        rnn(x)


def test_state_functional_call_and_replaced_parameters():
    rnn, x = trained()
    y = rnn(x)[0]
    state = {k: v.clone() for k, v in rnn.state_dict().items()}
    other = tp.orthogonal_gates(nn.LSTM(3, 4), "weight_hh_l0", "cayley")
    assert not torch.allclose(other(x)[0], y)
    other.load_state_dict(state)
    assert torch.equal(other(x)[0], y)
    doubled = {k: v if k.endswith("base") else 2 * v for k, v in state.items()}
    again = torch.func.functional_call(rnn, doubled, (x,))[0]
    assert not torch.allclose(again, y)
    assert torch.equal(rnn(x)[0], y)
    other.load_state_dict(doubled)
    assert torch.equal(other(x)[0], again)
    rnn.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
    rnn.weight_hh_l0 = torch.eye(4).repeat(4, 1)
    reference = nn.LSTM(3, 4)
    reference.load_state_dict({n: getattr(rnn, n) for n, _ in reference.named_parameters()})
    assert torch.allclose(rnn(x)[0], reference(x)[0], atol=1e-6)


def test_gradients_accumulate_over_forwards():
    rnn, x = trained()
    original = rnn.parametrizations.weight_hh_l0.original
    rnn.zero_grad()
    one, two = rnn(x)[0].sum(), rnn(2 * x)[0].sum()
    (one + two).backward()
    together = original.grad.clone()
    rnn.zero_grad()
    rnn(x)[0].sum().backward()
    rnn(2 * x)[0].sum().backward()
    assert torch.allclose(original.grad, together, atol=1e-5)
    assert original.grad.norm() > 0


def test_second_derivatives():
    rnn = tp.orthogonal_gates(nn.RNN(3, 4), "weight_hh_l0", "cayley").double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    original = rnn.parametrizations.weight_hh_l0.original
    found = []
    for path in ("closed", "composed"):
        with tp.use_path(path):
            (dw,) = torch.autograd.grad(rnn(x)[0].square().sum(), original, create_graph=True)
            found.append(torch.autograd.grad(dw.square().sum(), original)[0])
    assert torch.allclose(*found, rtol=1e-8)
    assert found[0].norm() > 0


def test_a_forward_leaves_no_weights_behind():
    class Watched(nn.Module):
        def forward(self, x):
            y = x.sin()
            self.seen = weakref.ref(y)
            return y

    rnn, link = nn.GRU(3, 4), Watched()
    tp.register_parametrization(rnn, "weight_hh_l0", link)
    rnn(torch.randn(5, 2, 3))
    assert link.seen() is None
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        rnn(torch.randn(5, 2, 7))
    assert link.seen() is None


def test_threads_do_not_mix_their_weights():
    inside, go_on, found = threading.Event(), threading.Event(), []

    class Waiting(nn.Module):
        def forward(self, x):
            if threading.current_thread() is thread:
                inside.set()
                assert go_on.wait(60)
            elif rnn is not None:
                thread.start()
                assert inside.wait(60)
            return x.sin()

    @torch.no_grad()
    def without_gradients():
        found.append(rnn(x)[0])

    thread = threading.Thread(target=without_gradients)
    rnn, x = None, torch.randn(5, 2, 3)
    rnn = tp.register_parametrization(nn.LSTM(3, 4), "weight_hh_l0", Waiting())
    y = rnn(x)[0]  # begins first and ends first
    go_on.set()
    thread.join()
    y.sum().backward()
    assert torch.allclose(found[0], y, atol=1e-6)
    assert not found[0].requires_grad
    assert rnn.parametrizations.weight_hh_l0.original.grad.norm() > 0


def test_a_subclass_that_forwards_twice_and_writes_between():
    class Twice(nn.RNN):
        def forward(self, x):
            self.flatten_parameters()
            first = super().forward(x)[0]
            with torch.no_grad():
                self.parametrizations.weight_hh_l0.original.zero_()
            return first, super().forward(x)[0]

    rnn = tp.register_parametrization(Twice(3, 4), "weight_hh_l0", tp.Pruning(torch.ones(4, 4)))
    first, second = rnn(x := torch.randn(5, 2, 3))
    assert not torch.allclose(first, second)
    assert torch.equal(second, nn.RNN.forward(rnn, x)[0])


@remove
def test_removal_gives_torchs_rnn_back(remove):
    rnn, x = trained()
    original = rnn.parametrizations.weight_hh_l0.original
    y = rnn(x)[0]
    remove(rnn, "weight_hh_l0")
    assert type(rnn) is nn.LSTM
    assert rnn.weight_hh_l0 is original
    if remove is tp.remove_parametrizations:
        torch.jit.script(rnn)
    assert torch.allclose(rnn(x)[0], y, atol=1e-6)
    names = rnn._flat_weights_names
    assert all(w is getattr(rnn, n) for w, n in zip(rnn._flat_weights, names, strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(rnn))(x)[0], rnn(x)[0])
    rnn.double()(x.double())


def test_unfuse_gives_torchs_evaluation_back():
    rnn = constrained(nn.LSTM(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for change, per_forward in ((tp.fuse, 1), (tp.unfuse, 4), (tp.fuse, 1)):
        found.append(change(rnn)(x)[0])
        calls(rnn)
        rnn(x)
        assert calls(rnn) == [per_forward]
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


def test_one_power_iteration_per_forward():
    rnn = nn.LSTM(3, 4)
    theirs.spectral_norm(rnn, "weight_hh_l0")
    link = deepcopy(rnn.parametrizations.weight_hh_l0)
    tp.fuse(rnn)
    x = torch.randn(5, 2, 3)
    for _ in range(2):
        weight = link()  # one iteration of torch's
        one, two = rnn(x)[0], rnn(x)[0]
        link()
        (one.sum() + two.sum()).backward()
        for mine, reference in zip(rnn.buffers(), link.buffers(), strict=True):
            assert torch.allclose(mine, reference, atol=1e-6)
        assert weight.shape == (16, 4)


@pytest.fixture
def allow_rnn():
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def test_compiled_as_torch_compiles_it(allow_rnn):
    torch.compiler.reset()
    rnn = tp.fuse(constrained(nn.RNN(3, 4), "weight_hh_l0"))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    assert_same(compiled, rnn, x)
    calls(rnn)
    assert_same(compiled, rnn, x)
    assert calls(rnn) == [2]  # one of them eager


def test_a_graph_break_where_torch_breaks():
    torch.compiler.reset()
    rnn = tp.fuse(constrained(nn.LSTM(3, 4), "weight_hh_l0"))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    compiled = torch.compile(lambda x: rnn(2 * x)[0] + 1, backend="aot_eager")
    assert torch.allclose(compiled(x), rnn(2 * x)[0] + 1)
    calls(rnn)
    compiled(x).sum().backward()
    assert calls(rnn) == [1]

"""Other people's tests on fused weights: ``python -m pytest -p tritonparam.pytest_plugin FILES``.

While pytest runs, everything that ``torch.nn.utils.parametrize.register_parametrization``
registers, called by the tests, by torch's ``orthogonal``, ``spectral_norm`` and ``weight_norm`` or
by another library, is fused as ``tritonparam.fuse`` does it. A line at the end says how often
weights were evaluated on each path; with ``--require-fused`` the run fails if none was evaluated
fused. PyTorch's own tests, for example, are ``test/nn/test_parametrization.py`` in its repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

from tritonparam import paths
from tritonparam.fuse import fuse_list, inject, lists, unfuse_list

_running = ExitStack()
_of_workers: list[dict[str, int]] = []  # what the processes of pytest-xdist counted


@contextmanager
def fused_registrations() -> Iterator[None]:
    """Fuse every list that torch's registration makes or extends inside the block.

    It is for tests: the function is replaced for the whole process. Names that were imported from
    the module before keep the original.

    >>> from torch.nn.utils.parametrizations import orthogonal
    >>> with fused_registrations():
    ...     layer = orthogonal(nn.Linear(3, 3))
    >>> import tritonparam as tp
    >>> tp.explain(layer)[0].path
    'closed'
    """
    register = torch_parametrize.register_parametrization

    @wraps(register)
    def registered(
        module: nn.Module, tensor_name: str, parametrization: nn.Module, **options: Any
    ) -> nn.Module:
        unfuse_list(module)  # a list whose originals are parametrized in turn
        register(module, tensor_name, parametrization, **options)
        fuse_list(lists(module)[tensor_name])
        inject(module)
        return module

    torch_parametrize.register_parametrization = registered
    try:
        yield
    finally:
        torch_parametrize.register_parametrization = register


def _counts() -> dict[str, int]:
    counts = [paths.stats(), *_of_workers]
    return {path: sum(count[path] for count in counts) for path in counts[0]}


def pytest_addoption(parser: Any) -> None:  # noqa: D103
    parser.getgroup("tritonparam").addoption(
        "--require-fused",
        action="store_true",
        help="fail if no parametrized weight was evaluated fused",
    )


def pytest_configure() -> None:  # noqa: D103
    _running.enter_context(fused_registrations())
    paths.stats(reset=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: D103
    _of_workers.append(getattr(node, "workeroutput", {}).get("tritonparam", paths.stats()))


def pytest_sessionfinish(session: Any) -> None:  # noqa: D103
    config, counts = session.config, _counts()
    if hasattr(config, "workeroutput"):
        config.workeroutput["tritonparam"] = counts
    elif config.option.require_fused and counts["kernel"] + counts["closed"] == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:  # noqa: D103
    _running.close()


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:  # noqa: D103
    counts = _counts()
    line = ", ".join(f"{n} {path}" for path, n in counts.items())
    terminalreporter.write_line(f"tritonparam: {line} evaluations of fused weights")
    if config.option.require_fused and counts["kernel"] + counts["closed"] == 0:
        terminalreporter.write_line("--require-fused: no weight was evaluated fused", red=True)

"""Spectral norm whose power iteration goes on with the weight: by optimizer steps, not by reads."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tritonparam.ops.spectral_norm import advance, advance_all


class SteppedSpectralNorm(_SpectralNorm):
    """torch's ``_SpectralNorm``, but advanced by optimizer steps: a read changes nothing.

    After ``step()`` of an optimizer that holds the weight's original, and found a gradient of it,
    the power iteration is run once on the new original, in train and eval mode alike. Buffers and
    keys are those of ``_SpectralNorm``. It is never in train mode, since that is what makes a read
    advance the iteration. Made by ``tritonparam.spectral_norm(..., iterate="step")``.
    """

    def __init__(self, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(weight, *args, **kwargs)
        self.training = False
        self._follow()

    def train(self, mode: bool = True) -> SteppedSpectralNorm:
        """Stay in eval mode."""
        return super().train(False)

    def follow(self, plist: ParametrizationList) -> None:
        """Name the list whose original the optimizers step."""
        # In a tuple it is no submodule, and a copy of the list has a link that follows the copy.
        self._list = (plist,)

    def __setstate__(self, state: dict[str, Any]) -> None:  # noqa: D105
        super().__setstate__(state)
        self._follow()

    def _follow(self) -> None:
        _watch_optimizers()
        _links.add(self)


_links: WeakSet[SteppedSpectralNorm] = WeakSet()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


@torch._disable_dynamo  # torch.compiler.disable would import all of dynamo, and triton, here
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Advance every link whose original the optimizer has just updated."""
    if not _links:
        return
    links: dict[int, list[SteppedSpectralNorm]] = {}
    for link in list(_links):
        for plist in getattr(link, "_list", ()):
            links.setdefault(id(plist.original), []).append(link)
    whole = []
    # In the optimizer's order, the same on every rank: a weight that FSDP shards is gathered.
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None:
            for link in links.get(id(p), ()):
                if hasattr(p, "full_tensor"):
                    advance(link, p.full_tensor())
                else:
                    whole.append((link, p))
    advance_all(whole)

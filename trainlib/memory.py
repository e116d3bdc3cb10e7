"""Peak memory of a training step, counted on tensors without content: no device is needed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trainlib.optim import OptimConfig, build_optimizers

CUDA_BYTES = 700_000_000
"""What a process takes on a card beside its tensors: CUDA's context and cuBLAS's workspace."""


def peak_bytes(
    model: nn.Module, optim: OptimConfig, step: Callable[[nn.Module, list[Optimizer]], object]
) -> int:
    """Most bytes that all tensors of training take at one time, weights and moments included.

    `step` is one optimizer step; it is taken twice, as the first one makes the moments, on a copy
    of the model on the CPU that has shapes and no content.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _NoContent(), _Tracker() as tracker:
        # In this copy the parameters, tied ones once, are replaced: no weight is ever copied.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(mode.from_tensor(p.detach(), static_shapes=True))
            for p in model.parameters()
        }
        for parameter in memo.values():
            tracker.count(parameter)
        empty = copy.deepcopy(model, memo)
        optimizers = build_optimizers(empty, optim)
        for _ in range(2):
            step(empty, optimizers)
    return tracker.peak


class _Tracker(TorchDispatchMode):
    """Bytes of the storages that operations return, until they are freed.

    (torch.distributed._tools.MemTracker allows one forward pass of a module, not several.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        """Take note of a tensor, whose storage may be known already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._freed, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, result)
        return result


class _NoContent(TorchFunctionMode):
    """Answers what only the content could tell: figures are 1, and a mask selects everything.

    So all positions are counted as if they had a label: on a card they are computed anyhow, and on
    a CPU the step takes at most that.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return 1.0
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            values, index = args
            if index.dtype == torch.bool:
                return values.flatten(0, index.ndim - 1)
        return func(*args, **(kwargs or {}))

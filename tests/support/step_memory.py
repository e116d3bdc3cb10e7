"""Peak memory of a training step, counted on fake tensors without a device.

The formulas in trainlib/engine/plan.py must match these counts (tests/engine/test_memory.py).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dpo_train import dpo_loss
from trainlib.core.distributed import SINGLE_PROCESS
from trainlib.core.hardware import Hardware
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch
from trainlib.engine.losses import batch_log_probs, cross_entropy_sum
from trainlib.engine.optim import OptimConfig, build_optimizers
from trainlib.engine.step import optimizer_step

Step = Callable[[nn.Module, list[Optimizer]], object]


def make_step(
    precision: str,
    rows: int,
    num_micro: int,
    row_length: int,
    optim: OptimConfig | None = None,
    stage: str = "pretrain",
) -> Step:
    """Return a function that runs one optimizer step of a stage on rows of one document each.

    In preference data, a row is one pair, whose answers take half of the row each.
    """
    ids = torch.zeros(rows, row_length, dtype=torch.int64)
    count = 2 * rows if stage == "dpo" else rows
    documents = torch.arange(count).repeat_interleave(ids.numel() // count).view(rows, row_length)
    ends = torch.arange(0, ids.numel() + 1, ids.numel() // count, dtype=torch.int32)
    sizes = (ids.numel(), ids.numel(), ids.numel())
    batch = Batch(ids, ids, ids, documents, ends, torch.arange(count), *sizes)
    hardware = Hardware(torch.device("cpu"), precision, "masked", False, rows)
    config = SimpleNamespace(optim=optim or OptimConfig())
    run: Any = SimpleNamespace(hardware=hardware, distributed=SINGLE_PROCESS, config=config)
    batches = StepBatch([batch] * num_micro, ids.numel() * num_micro, ids.numel(), DataPosition())

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, tuple[Any, Any]]]:
        if stage != "dpo":
            return cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels)), {}
        return dpo_loss(batch_log_probs(model, batch), torch.zeros(count), 0.1)

    def step(model: nn.Module, optimizers: list[Optimizer]) -> None:
        training: Any = SimpleNamespace(
            run=run, model=model, optimizers=optimizers, loss_fn=loss_fn
        )
        optimizer_step(training, batches, 1.0)

    return step


def peak_bytes(model: nn.Module, optim: OptimConfig, step: Step) -> int:
    """Return the peak number of bytes in all tensors of training, including the weights.

    The step runs twice, because the first run creates the optimizer moments. It runs on a copy of
    the model on the CPU that has shapes but no content.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _NoContent(), _Tracker() as tracker:
        # The copy has fake parameters (tied ones once), so that no weight is ever copied.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(mode.from_tensor(p.detach(), static_shapes=True))
            for p in model.parameters()
        }
        for parameter in memo.values():
            tracker.count(parameter)
        fake = copy.deepcopy(model, memo)
        optimizers = build_optimizers(fake, optim)
        for _ in range(2):
            step(fake, optimizers)
    return tracker.peak


class _Tracker(TorchDispatchMode):
    """Count the bytes of the storages that operations return, until they are freed.

    (torch.distributed._tools.MemTracker supports only one forward pass per module.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it has been counted."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._freed, key, size)
            self.current += size
            self.peak = max(self.peak, self.current)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, result)
        return result


class _NoContent(TorchFunctionMode):
    """Replace results that depend on content: scalars are 1, and a mask selects everything.

    All positions are thus counted as if they had a label, which is the maximum for a step.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return 1.0
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            values, index = args
            if index.dtype == torch.bool:
                return values.flatten(0, index.ndim - 1)
        return func(*args, **(kwargs or {}))

"""Data-parallel training in several processes: collectives, and a launcher for the processes.

Every rank holds the full model and processes its share of each step's rows. The gradients are
all-reduced once per step. The environment variables are those of torchrun (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so `torchrun --nproc-per-node 2 train.py` works too.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainlib.core.errors import AlreadyFinished, UserError

T = TypeVar("T")

PARENT = "TRAIN_LLM_PARENT"
TIMEOUT = timedelta(minutes=30)
"""Timeout for collectives. The other ranks wait in a collective while rank 0 writes."""


@dataclass(frozen=True)
class DistributedContext:
    """The rank, world size and collectives of this process; by default, it runs alone."""

    rank: int = 0
    world_size: int = 1

    @property
    def local_rank(self) -> int:
        """The index of this process, and of its GPU, on this host."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def is_main(self) -> bool:
        """True on the main process, the only one that writes."""
        return self.rank == 0

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all ranks, in place, with a single all-reduce of a flat buffer."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(summed.view_as(tensor))

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Broadcast tensors from rank 0, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, which should be a small object."""
        return self.all_gather_object(value)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values from all ranks in rank order; they should be small objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


SINGLE_PROCESS = DistributedContext()


def is_launched_process() -> bool:
    """Return whether this process is already a rank, launched by this module or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_distributed(device: str) -> DistributedContext:
    """Join the process group that the environment describes, if any."""
    if not is_launched_process() or int(os.environ["WORLD_SIZE"]) == 1:
        return DistributedContext()
    # When imported, torch.distributed.nn.functional captures the current group as a default value.
    # The first optimizer would import it through torch's compiler, and keep our group until exit.
    # Gloo threads exit only when the last reference to their group is dropped, and a thread that
    # frees a tensor during shutdown aborts a finished run. Import it before there is a group.
    importlib.import_module("torch.distributed.nn.functional")  # `import` would shadow `torch`.
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if PARENT in os.environ:
        parent = int(os.environ[PARENT])
        threading.Thread(target=_stop_when_orphaned, args=(parent,), daemon=True).start()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        card = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(card)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=card)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return DistributedContext(rank, world_size)


def _stop_when_orphaned(parent: int) -> None:
    """Request a checkpoint and a stop once the process that launched the ranks has exited."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def run_on_main_process(distributed: DistributedContext, action: Callable[[], T]) -> T:
    """Call a function on rank 0; on all ranks, return its result or raise its UserError."""
    outcome: Any = None
    if distributed.is_main:
        try:
            outcome = action()
        except (UserError, AlreadyFinished) as error:
            outcome = error
    outcome = distributed.broadcast_object(outcome)
    if isinstance(outcome, UserError):
        outcome.reported = True
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def resolve_world_size(config: Any) -> int:
    """Return config.ranks, or one for each visible GPU; raise UserError if ranks exceeds them."""
    use_gpus = config.device in ("auto", "cuda") and torch.cuda.is_available()
    gpus = torch.cuda.device_count() if use_gpus else 0
    if gpus and config.ranks > gpus:
        raise UserError(
            f"ranks={config.ranks}, but torch sees {gpus} GPU{'s' if gpus > 1 else ''}. Set ranks "
            f"to at most {gpus}, or make more GPUs visible with CUDA_VISIBLE_DEVICES."
        )
    return config.ranks or max(1, gpus)


def launch_processes(world_size: int) -> int:
    """Run this command as `world_size` ranks on this host, and return their exit code.

    If a rank fails, the others are killed. Signal handling differs from torchrun, whose agent kills
    the ranks 30 seconds after a SIGTERM and then fails. Here, signals are forwarded to the ranks,
    which save a checkpoint and exit.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common[PARENT] = str(os.getpid())
    if "OMP_NUM_THREADS" not in os.environ:
        # By default each rank would use all cores.
        common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // world_size))
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)  # A no-op for a process that has exited.

    numbers = [signal.SIGTERM, signal.SIGINT, *filter(None, [getattr(signal, "SIGUSR1", None)])]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
            env = {**os.environ, **common, **own}
            # Each rank has its own session, so that Ctrl-C reaches it only through this process.
            command = [sys.executable, *sys.argv]
            processes.append(subprocess.Popen(command, env=env, start_new_session=True))
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        if failed := next(filter(None, codes), 0):
            for process in processes:
                process.kill()
                process.wait()
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return 0
        time.sleep(0.05)

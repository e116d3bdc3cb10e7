"""Several processes that train one model: who is who, sums over all of them, and their start.

Data parallel: every rank holds the whole model, takes its share of a step's rows, and the
gradients are summed once a step. The environment is torchrun's (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT), so `torchrun --nproc-per-node 2 train.py` works too.
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

from trainlib.core.errors import UserError

T = TypeVar("T")

PARENT = "TRAIN_LLM_PARENT"
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: rank 0 alone writes and reads the clock."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count` that train together; alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def local(self) -> int:
        """The number of this process, and so of its card, on this host."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over all ranks, in place, in one exchange of one flat buffer."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(summed.view_as(tensor))

    def same(self, tensors: list[Tensor]) -> None:
        """Give every rank the first one's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def from_first(self, value: Any) -> Any:
        """The first rank's value, whatever this rank has; a small object."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks; small objects."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def inside_ranks() -> bool:
    """Whether this process is a rank already, started by us or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_ranks(device: str) -> Ranks:
    """Meet the other ranks that the environment speaks of; alone where it speaks of none."""
    if not inside_ranks() or int(os.environ["WORLD_SIZE"]) == 1:
        return Ranks()
    # The default group of the moment of its import is this module's default argument. The first
    # optimizer imports torch's compiler and so this: too late, it would hold our group for good,
    # and gloo's threads end only with the last reference to that. One that frees a tensor while
    # Python shuts down aborts a run that had finished. Imported now, the default is None.
    importlib.import_module("torch.distributed.nn.functional")  # `import` would hide `torch` above.
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if PARENT in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        card = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(card)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=card)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(rank, count)


def _end_with(parent: int) -> None:
    """Save and stop when the process that started the ranks is gone: nobody could end them."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def leave_ranks() -> None:
    """Part from the other ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def first_decides(ranks: Ranks, action: Callable[[], T]) -> T:
    """What an action returns that only the first rank may take; its UserError ends all."""
    outcome: tuple[Any, UserError | None] = (None, None)
    if ranks.first:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, error)
    # What the first rank tells, the others need not tell again.
    value, failure = ranks.from_first(outcome)
    if failure is not None:
        failure.told = True
        raise failure
    return value


def number_of_ranks(config: Any) -> int:
    """How many processes a run wants: config.ranks, or one for each card that it may use.

    Raises UserError for more than there are cards.
    """
    wants_cards = config.device in ("auto", "cuda") and torch.cuda.is_available()
    cards = torch.cuda.device_count() if wants_cards else 0
    if cards and config.ranks > cards:
        raise UserError(
            f"ranks={config.ranks}, but torch sees {cards} card{'s' if cards > 1 else ''}. Use at "
            "most as many, or make more visible by CUDA_VISIBLE_DEVICES."
        )
    return config.ranks or max(1, cards)


def start_ranks(count: int) -> int:
    """Run this very command as `count` ranks of this host, and return their exit code.

    What torchrun does, but for signals: its agent kills the ranks 30 seconds after a SIGTERM and
    then fails, whereas here a signal is passed on, the ranks save and end, and the code is theirs.
    A rank that fails ends the others.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared[PARENT] = str(os.getpid())
    if "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each rank takes all cores, and they stand in each other's way.
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGINT, *filter(None, [getattr(signal, "SIGUSR1", None)])]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *sys.argv],
                    env={**os.environ, **shared, **own},
                    # A Ctrl-C of the terminal reaches this process, which passes it on once.
                    start_new_session=True,
                )
            )
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(0.05)

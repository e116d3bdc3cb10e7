"""Data-parallel training in several processes: collectives, and a launcher for the processes.

Every rank processes its share of each step's rows; the gradients are all-reduced once per step. The
environment variables are those of torchrun, so `torchrun --nproc-per-node 2 train.py` works too.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from trainlib.core.errors import AlreadyFinished, UserError
from trainlib.core.terminal import end_in_one_line, finish_output

T = TypeVar("T")

PARENT = "TRAIN_LLM_PARENT"
TIMEOUT = timedelta(minutes=30)  # Of collectives, in which the other ranks wait for rank 0.
PEERS: list[int] = []  # Process ids of the other ranks on this host.
WRITING_SECONDS, GRACE_SECONDS = 30.0, 5.0
"""How long a failed rank waits for its checkpoint, and then the launcher for the other ranks."""


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
        threading.Thread(target=_stop_when_orphaned, daemon=True).start()
    group = {"rank": rank, "world_size": world_size, "timeout": TIMEOUT, "store": _local_store()}
    if device in ("auto", "cuda") and torch.cuda.is_available():
        card = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(card)
        dist.init_process_group("nccl", device_id=card, **group)
    else:
        dist.init_process_group("gloo", **group)
    context = DistributedContext(rank, world_size)
    here, me = socket.gethostname(), os.getpid()
    if os.name != "nt":  # There, os.kill would end the process that it looks for.
        everyone = context.all_gather_object((here, me))
        PEERS[:] = [pid for host, pid in everyone if host == here and pid != me]
    return context


def _local_store() -> TCPStore | None:
    """Return a store for the ranks of launch_processes; torch's own listens on every address."""
    if PARENT not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first, size = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])
    listener = socket.create_server((address, port)).detach() if first else None
    return TCPStore(address, port, size, first, TIMEOUT, master_listen_fd=listener)


def peer_lost(seconds: float = 0.0) -> bool:
    """Return whether another rank on this host ends within some seconds, or has ended."""
    deadline = time.monotonic() + seconds
    try:
        while True:
            for pid in PEERS:
                with contextlib.suppress(PermissionError):
                    os.kill(pid, 0)
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
    except ProcessLookupError:
        return True


def end_failed_rank(
    failure: BaseException, last_write: Callable[[bool], object] | None
) -> NoReturn:
    """Print why this rank fails, call last_write(True), which waits for a checkpoint, and exit."""
    try:
        if isinstance(failure, RuntimeError) and peer_lost(1.0):
            sys.exit(f"rank {os.environ['RANK']} ends because another rank has ended")
        if not isinstance(failure, SystemExit):
            end_in_one_line(type(failure), failure, failure.__traceback__)
            line = traceback.format_exception_only(failure)[-1].splitlines()[0]
            failure = SystemExit(f"error on rank {os.environ['RANK']}: {line}")
    except SystemExit as brief:
        failure = brief
    if isinstance(failure.code, str):
        print(failure.code, file=sys.stderr)
    finish_output()
    if last_write is not None:
        writer = threading.Thread(target=last_write, args=(True,), daemon=True)
        writer.start()
        writer.join(WRITING_SECONDS)
    # The process group is not destroyed: NCCL would wait for ranks that wait for this one.
    os._exit(failure.code if isinstance(failure.code, int) else 1)


def _stop_when_orphaned() -> None:
    """Request a checkpoint and a stop once the process that launched the ranks has exited."""
    while os.getppid() == int(os.environ[PARENT]):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def has_process_group() -> bool:
    """Return whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def destroy_distributed() -> None:
    """Destroy the process group, if there is one."""
    PEERS.clear()
    if has_process_group():
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

    If a rank fails, the others are killed after GRACE_SECONDS. Signals are forwarded to the ranks,
    which save a checkpoint and exit; torchrun's agent kills them 30 seconds after a SIGTERM.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size, num_threads = str(world_size), max(1, (os.cpu_count() or 1) // world_size)
    # By default each rank would use all cores.
    common = {"OMP_NUM_THREADS": str(num_threads), **os.environ, PARENT: str(os.getpid()),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}  # fmt: skip
    if sys.platform == "linux":  # Gloo listens on this interface only.
        common.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)  # A no-op for a process that has exited.

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(world_size):
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Each rank has its own session, so that Ctrl-C reaches it only through this process.
            command = [sys.executable, *sys.argv]
            processes.append(subprocess.Popen(command, env=env, start_new_session=True))
        if hasattr(signal, "SIGUSR1"):  # Only now: the new processes inherit that it is ignored.
            before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, forward)
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> int:
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        time.sleep(0.05)
    failed = next(filter(None, codes), 0)
    deadline = time.monotonic() + GRACE_SECONDS
    if failed < 0:
        name, rank = signal.Signals(-failed).name, codes.index(failed)
        print(f"error: rank {rank} was ended by {name}", file=sys.stderr)
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return failed if failed >= 0 else 128 - failed

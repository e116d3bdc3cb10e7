"""What this machine has, and what follows from it: one pure function over one table.

configs/hardware.tsv has a row for each class of card; build.sh reads the same table for the
container. What a person sets is stronger than what is chosen here.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from trainlib.core.errors import UserError
from trainlib.core.files import ROOT, write_atomically

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)

TABLE = ROOT / "configs" / "hardware.tsv"
CARDS = TABLE.with_name("cards.tsv")
TABLE_ROW_LENGTH = 512
"""Positions of the rows that the table's micro batches count."""
FEW_THREADS = 4
"""Up to which attention takes blocks. Measured on two: 1.5 to 2.7 times as fast as a mask of the
row for 8 heads, as fast for 3. A block's product is below a millisecond: too little for many."""


@dataclass(frozen=True)
class Facts:
    """What can be found out about a machine before anything is computed on it."""

    cuda: tuple[int, int] | None = None
    """Compute capability of the weakest visible card; None without one."""
    memory_mib: int = 0
    """Memory of the smallest visible card, in MiB."""
    mps: bool = False
    """Whether torch has a Metal device."""
    varlen: bool = False
    """Whether this torch has variable-length attention."""
    amx: bool = False
    """Whether the CPU has matrix tiles, with which "medium" products would round to bf16."""
    threads: int = 1
    """Threads that a product on the CPU is spread over."""


@dataclass(frozen=True)
class Choice:
    """How to compute; nothing here changes what is learned, but for rounding."""

    device: str
    precision: str
    """fp32, bf16, fp16; "measure" = whichever of fp32 and bf16 a measurement finds faster."""
    matmul: str
    """torch.set_float32_matmul_precision's word for products of fp32 numbers."""
    attention: str
    """masked (model.py), or a kernel of kernels/: varlen, blocks."""
    compile: bool
    micro_batch_size: int
    """Most rows in one forward pass."""


@dataclass(frozen=True)
class HardwareRow:
    """A line of configs/hardware.tsv, as far as training reads it."""

    profile: str
    lowest: tuple[int, int] | None
    highest: tuple[int, int] | None
    min_mib: int
    micro_batch_size: int
    precision: str
    compile: bool


def read_table(path: Path = TABLE) -> list[HardwareRow]:
    """The table of hardware, in its order."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    return [
        HardwareRow(
            row["profile"],
            capability(row["min_capability"]),
            capability(row["max_capability"]),
            int(row["min_mib"]),
            int(row["micro_batch_size"]),
            row["precision"],
            row["compile"] == "on",
        )
        for row in csv.DictReader(lines, delimiter="\t")
    ]


def capability(text: str) -> tuple[int, int] | None:
    """A compute capability as the tables write it; "-" is none."""
    if text == "-":
        return None
    major, minor = text.split(".")
    return int(major), int(minor)


class Card(NamedTuple):
    """A line of configs/cards.tsv; units there."""

    name: str
    tflops: float
    gbs: float
    mib: int
    capability: tuple[int, int]
    gemm: float
    link: float

    @property
    def slowest(self) -> float:
        """Return how many times the time that --plan computes a step may take.

        Before 8.0 no kernel skips what lies between documents, and Muon has no 16-bit numbers.
        """
        return 4 / 3 if self.capability >= (8, 0) else 2.0


def read_cards() -> dict[str, Card]:
    """Return the table of cards by name, in its order."""
    lines = [line for line in CARDS.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    cards = {}
    for row in csv.DictReader(lines, delimiter="\t"):
        numbers = {key: float(row[key]) for key in ("tflops", "gbs", "gemm", "link")}
        compute = capability(row["capability"]) or (0, 0)
        cards[row["card"]] = Card(row["card"], mib=int(row["mib"]), capability=compute, **numbers)
    return cards


def find_card(name: str) -> Card:
    """Return a card by its name, in any case, with or without spaces; raises UserError."""
    cards = read_cards()
    word = re.sub("[ _-]|nvidia|geforce|tesla", "", name.lower())
    if found := cards.get(word) or cards.get(f"rtx{word}"):
        return found
    names = ", ".join(cards)
    raise UserError(f"--gpu {name}: unknown card. Name one of configs/{CARDS.name}: {names}.")


def find_row(facts: Facts, device: str, table: list[HardwareRow]) -> HardwareRow:
    """The first row that holds a device; a card beyond the table is treated as its newest."""
    if device != "cuda" or facts.cuda is None:
        return next(row for row in table if row.profile == ("mps" if device == "mps" else "cpu"))
    cards = [row for row in table if row.lowest and row.highest]
    for row in cards:
        if row.lowest <= facts.cuda <= row.highest and row.min_mib <= facts.memory_mib:  # type: ignore[operator]
            return row
    newest = max(row.highest for row in cards if row.highest)
    known = [row for row in cards if row.highest == newest and row.min_mib <= facts.memory_mib]
    return known[0]


def choose_hardware(
    facts: Facts,
    table: list[HardwareRow],
    *,
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
    micro_batch_size: int = 0,
    row_length: int = TABLE_ROW_LENGTH,
) -> Choice:
    """Turn "auto" into what fits a machine; pure.

    Raises UserError for what the machine does not have.
    """
    if device == "auto":
        device = "cuda" if facts.cuda else "cpu"  # On a Mac the CPU, unless mps is asked for.
    if device == "cuda" and not facts.cuda:
        raise UserError(
            "device=cuda, but torch sees no CUDA device here. Use device=cpu, or check "
            '`nvidia-smi` and `python -c "import torch; print(torch.version.cuda)"`.'
        )
    if device == "mps" and not facts.mps:
        raise UserError("device=mps, but torch has no Metal device here. Use device=cpu.")
    row = find_row(facts, device, table)
    if precision == "bf16" and device == "cuda" and facts.cuda and facts.cuda < (8, 0):
        raise UserError(
            "precision=bf16 needs a card of compute capability 8.0 or more; this one has "
            f"{facts.cuda[0]}.{facts.cuda[1]}. Use precision=fp16 or precision=fp32."
        )
    if precision == "auto":
        precision = "measure" if device == "cpu" else row.precision
    # On a CPU "medium" is oneDNN: exact fp32, up to 1.6 times faster than "highest"; only with AMX
    # it would round to bf16. On CUDA "high" is TF32.
    matmul = {"cuda": "high", "cpu": "highest" if facts.amx else "medium"}.get(device, "highest")
    if not micro_batch_size:
        micro_batch_size = max(1, row.micro_batch_size * TABLE_ROW_LENGTH // row_length)
    compiled = compile_ == "on" or (compile_ == "auto" and row.compile)
    # The kernel is there from capability 8.0 on, for 16-bit numbers alone.
    modern = device == "cuda" and facts.cuda is not None and facts.cuda >= (8, 0)
    varlen = facts.varlen and modern and precision in ("bf16", "fp16")
    attention = "varlen" if varlen else "masked"
    if device == "cpu" and facts.threads <= FEW_THREADS:
        attention = "blocks"
    return Choice(device, precision, matmul, attention, compiled, micro_batch_size)


# ---- asking the machine --------------------------------------------------------------------------


def find_facts() -> Facts:
    """What this machine has; of several visible cards the weakest and the smallest count."""
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Facts(
        cuda=min((torch.cuda.get_device_capability(card) for card in cards), default=None),
        memory_mib=min(
            (torch.cuda.get_device_properties(card).total_memory // 2**20 for card in cards),
            default=0,
        ),
        varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        mps=torch.backends.mps.is_available(),
        amx=bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        threads=torch.get_num_threads(),
    )


def unseen_card() -> str:
    """What to say where this machine seems to have an NVIDIA card, and torch sees none; else ""."""
    in_container = os.environ.get("GPU_PROFILE", "cpu") != "cpu"
    if torch.cuda.is_available() or not (in_container or shutil.which("nvidia-smi")):
        return ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    cure = (
        "On the host: docker compose up -d --force-recreate train"
        if in_container
        else "CUDA 13 wants NVIDIA's driver 580 or newer; for 525 and newer: "
        "pip install torch==2.10.0"
    )
    return (
        f"torch {torch.__version__}, built for {built}, sees no card, so this runs on the CPU. "
        f"{cure}. If the CPU is meant: device=cpu"
    )


def measured_precision(cache_file: Path, matmul: str) -> str:
    """fp32 or bf16, whichever is faster on this CPU; measured once a machine and kept in a file.

    Kept, so that two runs on a machine agree. The key is what can change the answer.
    """
    threads = torch.get_num_threads()
    cpu = f"{cpu_name()} {instructions()}"
    key = f"{cpu} torch {torch.__version__} threads {threads} matmul {matmul}"
    try:
        known = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    if known.get(key) not in ("fp32", "bf16"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(matmul)
        try:
            seconds = {"fp32": _seconds(torch.float32), "bf16": _seconds(torch.bfloat16)}
        finally:
            torch.set_float32_matmul_precision(before)
        known[key] = min(seconds, key=lambda name: seconds[name])
        log.info(
            "measured on this CPU: fp32 %.1f ms, bf16 %.1f ms for a product; using %s",
            1e3 * seconds["fp32"], 1e3 * seconds["bf16"], known[key],
        )  # fmt: skip
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_file, json.dumps(known, indent=1))
    return known[key]


def _seconds(dtype: torch.dtype, budget: float = 0.15) -> float:
    """Best time of the product of a layer, within a budget of seconds."""
    x, w = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1408, dtype=dtype)
    return best_time(lambda: x @ w, budget)


def best_time(action: Callable[[], object], budget: float) -> float:
    """Shortest of the times that an action takes, called at least twice and within a budget."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
        if times[0] > budget:
            break
    return min(times)


def cpu_name() -> str:
    """The processor as its maker calls it, with the number of cores."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x {os.cpu_count()}"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def instructions() -> str:
    """What this CPU's products are made with, which its name need not tell: AVX2, AVX512 bf16."""
    return f"{torch.backends.cpu.get_cpu_capability()}{' bf16' if cpu_has_bf16() else ''}"

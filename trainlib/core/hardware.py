"""Detect this machine's hardware and choose settings for it.

The choice is a pure function of the hardware and configs/hardware.tsv, which has a row for each
class of card; build.sh uses the same table. Explicit settings take precedence over the choice.
"""

import contextlib
import csv
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainlib.core.errors import UserError
from trainlib.core.files import ROOT, write_atomically

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)

TABLE = ROOT / "configs" / "hardware.tsv"
CARDS = TABLE.with_name("cards.tsv")
TABLE_ROW_LENGTH = 512  # Row length, in positions, that the table's micro-batch sizes assume.
FEW_THREADS = 4
"""Largest number of threads with which attention uses blocks. With 2 threads, blocks were 1.5 to
2.7 times as fast as a full mask with 8 heads, and just as fast with 3 heads. The matmul for a block
takes less than a millisecond, too little work for many threads."""


@dataclass(frozen=True)
class Facts:
    """Properties of a machine, known before anything is computed on it."""

    cuda: tuple[int, int] | None = None  # Lowest compute capability of the visible cards, if any.
    memory_mib: int = 0  # Memory of the smallest visible card, in MiB.
    mps: bool = False  # True if torch has a Metal device.
    varlen: bool = False  # True if torch has variable-length attention.
    amx: bool = False  # With AMX, matmul precision "medium" rounds to bf16.
    threads: int = 1  # Number of threads that a matmul on the CPU uses.


@dataclass(frozen=True)
class Hardware:
    """Hardware settings of a run. They affect what the model learns only through rounding."""

    device: torch.device
    precision: str  # fp32, bf16 or fp16; "measure" = the faster of fp32 and bf16.
    attention: str  # masked (the formula in model.py), or a kernel in kernels/: varlen or blocks.
    compile: bool
    micro_batch_size: int  # Maximum number of rows in one forward pass.
    matmul: str = "highest"  # Argument for torch.set_float32_matmul_precision.
    kernels: tuple[str, ...] = ()  # Kernels used instead of formulas (trainlib/engine/kernels.py).

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the forward-pass context: 16-bit matmuls with fp32 weights, or a null context."""
        if self.precision in DTYPES:
            return torch.autocast(self.device.type, dtype=DTYPES[self.precision])
        return contextlib.nullcontext()


def _read_tsv(path: Path) -> Iterator[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return csv.DictReader((line for line in lines if line[:1] != "#"), delimiter="\t")


def capability(text: str) -> tuple[int, int]:
    """Parse a compute capability from a table."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


class Card(NamedTuple):
    """A row in configs/cards.tsv, whose comments define the units."""

    name: str
    tflops: float
    gbs: float
    mib: int
    capability: tuple[int, int]
    gemm: float
    link: float

    @property
    def slowest(self) -> float:
        """Return the upper bound on a step's time, as a multiple of what --plan computes."""
        # Below capability 8.0, no kernel skips pairs across documents, and Muon runs in fp32.
        return 4 / 3 if self.capability >= (8, 0) else 2.0


def read_cards() -> dict[str, Card]:
    """Return the cards by name, in file order."""
    cards = {}
    for row in _read_tsv(CARDS):
        numbers = {key: float(row[key]) for key in ("tflops", "gbs", "gemm", "link")}
        compute = capability(row["capability"])
        cards[row["card"]] = Card(row["card"], mib=int(row["mib"]), capability=compute, **numbers)
    return cards


def find_card(name: str) -> Card:
    """Return the card with this name, ignoring case and spaces; raises UserError if unknown."""
    cards = read_cards()
    key = re.sub("[ _-]|nvidia|geforce|tesla", "", name.lower())
    if found := cards.get(key) or cards.get(f"rtx{key}"):
        return found
    names = ", ".join(cards)
    raise UserError(f"--gpu {name}: unknown card. Choose from configs/{CARDS.name}: {names}.")


def find_row(facts: Facts, device: str) -> dict[str, str]:
    """Return the first matching row of the table; an unknown card is treated like the newest."""
    rows = list(_read_tsv(TABLE))
    if device != "cuda" or facts.cuda is None:
        return next(row for row in rows if row["profile"] == ("mps" if device == "mps" else "cpu"))
    cards = (row for row in rows if row["max_capability"] != "-")
    cards = [row for row in cards if int(row["min_mib"]) <= facts.memory_mib]
    newest = max(capability(row["max_capability"]) for row in cards)
    return next(
        row for wanted in (facts.cuda, newest) for row in cards
        if capability(row["min_capability"]) <= wanted <= capability(row["max_capability"])
    )  # fmt: skip


def choose_hardware(facts: Facts, *, device: str = "auto", precision: str = "auto",
                    compile_: str = "auto", micro_batch_size: int = 0,
                    row_length: int = TABLE_ROW_LENGTH) -> Hardware:  # fmt: skip
    """Resolve "auto" for a machine; raise UserError for a device or precision that it lacks."""
    if device == "auto":
        device = "cuda" if facts.cuda else "cpu"  # mps is used only on request.
    if device == "cuda" and not facts.cuda:
        raise UserError(
            "device=cuda, but torch sees no CUDA device here. Set device=cpu, or check "
            '`nvidia-smi` and `python -c "import torch; print(torch.version.cuda)"`.'
        )
    if device == "mps" and not facts.mps:
        raise UserError("device=mps, but torch has no Metal device here. Set device=cpu.")
    row = find_row(facts, device)
    if precision == "bf16" and device == "cuda" and facts.cuda and facts.cuda < (8, 0):
        raise UserError(
            "precision=bf16 needs a card of compute capability 8.0 or higher; this one has "
            f"{facts.cuda[0]}.{facts.cuda[1]}. Set precision=fp16 or precision=fp32."
        )
    if precision == "auto":
        precision = "measure" if device == "cpu" else row["precision"]
    # On a CPU, "medium" uses oneDNN in exact fp32, up to 1.6 times as fast as "highest". With AMX,
    # it rounds to bf16. On CUDA, "high" means TF32.
    matmul = {"cuda": "high", "cpu": "highest" if facts.amx else "medium"}.get(device, "highest")
    if not micro_batch_size:
        micro_batch_size = max(1, int(row["micro_batch_size"]) * TABLE_ROW_LENGTH // row_length)
    compiled = compile_ == "on" or (compile_ == "auto" and row["compile"] == "on")
    attention = "blocks" if device == "cpu" and facts.threads <= FEW_THREADS else "masked"
    # The varlen kernel requires capability 8.0 and a 16-bit dtype.
    modern = device == "cuda" and facts.cuda is not None and facts.cuda >= (8, 0)
    if facts.varlen and modern and precision in ("bf16", "fp16"):
        attention = "varlen"
    found = torch.device(device)
    return Hardware(found, precision, attention, compiled, micro_batch_size, matmul)


# ---- queries and measurements --------------------------------------------------------------------


def find_facts() -> Facts:
    """Return the facts about this machine; with several cards, the minimum of each value."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(card) for card in range(count)]
    return Facts(cuda=min(((card.major, card.minor) for card in cards), default=None),
                 memory_mib=min((card.total_memory // 2**20 for card in cards), default=0),
                 varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None,
                 mps=torch.backends.mps.is_available(),
                 amx=bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
                 threads=torch.get_num_threads())  # fmt: skip


def unseen_card() -> str:
    """Return a warning if there seems to be an NVIDIA card that torch does not see, else ""."""
    in_container = os.environ.get("GPU_PROFILE", "cpu") != "cpu"
    if torch.cuda.is_available() or not (in_container or shutil.which("nvidia-smi")):
        return ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    hint = "On the host: docker compose up -d --force-recreate train"
    if not in_container:
        hint = "CUDA 13 needs driver 580 or newer; for 525 or newer: pip install torch==2.10.0"
    return (f"torch {torch.__version__}, built for {built}, sees no card, so this runs on the CPU. "
            f"{hint}. If this is intended, set device=cpu")  # fmt: skip


def measured_precision(cache_file: Path, matmul: str) -> str:
    """Return fp32 or bf16, whichever is faster on this CPU; a file makes all runs agree."""
    software = f"torch {torch.__version__} threads {torch.get_num_threads()} matmul {matmul}"
    key = f"{cpu_name()} {instructions()} {software}"
    try:
        known = dict(json.loads(cache_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    if known.get(key) not in ("fp32", "bf16"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(matmul)
        try:
            seconds = {"fp32": _seconds(torch.float32), "bf16": _seconds(torch.bfloat16)}
        finally:
            torch.set_float32_matmul_precision(before)
        known[key] = min(seconds, key=lambda name: seconds[name])
        log.info("measured a matmul on this CPU: fp32 %.1f ms, bf16 %.1f ms; using %s",
                 1e3 * seconds["fp32"], 1e3 * seconds["bf16"], known[key])  # fmt: skip
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_file, json.dumps(known, indent=1))
    return known[key]


def _seconds(dtype: torch.dtype, budget: float = 0.15) -> float:
    x, w = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1408, dtype=dtype)
    return best_time(lambda: x @ w, budget)


def best_time(action: Callable[[], object], budget: float) -> float:
    """Repeat an action for about `budget` seconds, and return its best time in seconds."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
        if times[0] > budget:
            break
    return min(times)


def cpu_name() -> str:
    """Return the model name of the processor and the number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*: *(.*\S)", text, re.M):
            name = found[1]
    return f"{name} x {os.cpu_count()}"


def cpu_has_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16 matmuls."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def instructions() -> str:
    """Return the instruction set for matmuls on this CPU, such as AVX2 or AVX512 bf16."""
    return f"{torch.backends.cpu.get_cpu_capability()}{' bf16' if cpu_has_bf16() else ''}"

"""How long a training step takes on a card that is not here: arithmetic over configs/cards.tsv.

A step is products, attention, elementwise traffic between the card's memory and its cores, and the
update, one after the other, then the all-reduce of the gradients. The coefficients below were
fitted to counts of compiled code and to published figures of other programs; no figure of ours
from a card stands behind them yet, hence the wide `slowest`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from trainlib.errors import UserError
from trainlib.hardware import Facts, capability
from trainlib.mfu import flops_per_token, update_flops

TABLE = Path(__file__).resolve().parents[1] / "configs" / "cards.tsv"
ATTENTION_SHARE = 0.4
"""Of a card's peak, in attention with heads of 64."""
TRAFFIC_SHARE = 0.85
"""Of a card's memory bandwidth, in fused elementwise kernels."""
BYTES_PER_VALUE = 13.2
"""Elementwise traffic of training for each value that a linear layer puts out: 0.6 MB a token at
26.9M parameters, counted by Inductor."""
BYTES_PER_WEIGHT = 20.5
"""Traffic of one micro-batch for each weight: 0.55 GB at 26.9M parameters, counted by Inductor."""
LAUNCH_SECONDS = 70e-6
"""Of the host for each linear layer and micro-batch, forward and backward: about 12 launches of
6 microseconds. Small steps on fast cards wait for it."""


@dataclass(frozen=True)
class Card:
    """A line of configs/cards.tsv; units there."""

    name: str
    tflops: float
    gbs: float
    mib: int
    capability: tuple[int, int]
    gemm: float
    link: float

    @property
    def facts(self) -> Facts:
        """What such a card says of itself."""
        return Facts(cuda=self.capability, memory_mib=self.mib)

    @property
    def slowest(self) -> float:
        """How many times the computed time a step may take.

        Before 8.0 no kernel skips what lies between documents, and Muon has no 16-bit numbers.
        """
        return 4 / 3 if self.capability >= (8, 0) else 2.0


@dataclass(frozen=True)
class Work:
    """What one optimizer step asks of the hardware."""

    parameters: int
    product_flops: float
    """Of training on one position, in linear layers."""
    attention_flops: float
    """Of training on one position, between positions."""
    layers: int
    """Linear layers."""
    values: int
    """That these put out for one position."""
    update_flops: float
    """Of the optimizers' step."""
    positions: int
    """Of one optimizer step, on all cards together."""

    @classmethod
    def of(
        cls, model: nn.Module, optimizers: list[Optimizer], attended: float, positions: int
    ) -> Work:
        """That of a model, a position of which attends to so many on average."""
        products = flops_per_token(model, 0)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return cls(
            sum(p.numel() for p in model.parameters()),
            products,
            flops_per_token(model, attended) - products,
            len(linear),
            sum(layer.out_features for layer in linear),
            update_flops(optimizers),
            positions,
        )


class StepTime(NamedTuple):
    """Seconds of one optimizer step, by part; the parts follow one another."""

    products: float
    attention: float
    traffic: float
    weights: float
    launches: float
    """As far as the host takes longer than what comes before."""
    update: float
    exchange: float


def step_time(card: Card, work: Work, micro_batches: int, count: int = 1) -> StepTime:
    """Of `count` such cards, each with so many micro-batches; the fast end of what to expect.

    The exchange is a ring: each card sends and receives 2 (count - 1) / count of the gradients,
    which are fp32.
    """
    positions, peak = work.positions / count, card.tflops * 1e12
    bandwidth = TRAFFIC_SHARE * card.gbs * 1e9
    products = positions * work.product_flops / (card.gemm * peak)
    attention = positions * work.attention_flops / (ATTENTION_SHARE * peak)
    traffic = positions * work.values * BYTES_PER_VALUE / bandwidth
    weights = micro_batches * work.parameters * BYTES_PER_WEIGHT / bandwidth
    host = micro_batches * work.layers * LAUNCH_SECONDS
    return StepTime(
        products,
        attention,
        traffic,
        weights,
        launches=max(0.0, host - products - attention - traffic - weights),
        update=work.update_flops / (card.gemm * peak),
        exchange=2 * (count - 1) / count * 4 * work.parameters / (card.link * 1e9),
    )


def read_cards(path: Path = TABLE) -> dict[str, Card]:
    """The table of cards by name, in its order."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    return {
        row["card"]: Card(
            row["card"],
            float(row["tflops"]),
            float(row["gbs"]),
            int(row["mib"]),
            capability(row["capability"]) or (0, 0),
            float(row["gemm"]),
            float(row["link"]),
        )
        for row in csv.DictReader(lines, delimiter="\t")
    }


def find_card(name: str) -> Card:
    """A card by its name, in any case and with or without spaces; raises UserError."""
    cards = read_cards()
    word = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    for prefix in ("nvidia", "geforce", "tesla"):
        word = word.removeprefix(prefix)
    if found := cards.get(word) or cards.get(f"rtx{word}"):
        return found
    raise UserError(
        f"--gpu {name}: no such card in {TABLE.parent.name}/{TABLE.name}; known are "
        f"{', '.join(cards)}; or --gpu here, which measures on this machine"
    )

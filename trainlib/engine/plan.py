"""--plan: the memory, the time and the length of a run, all by formulas.

    python train.py --plan [--gpu NAME[:N]] [--budget TIME] [config.yaml] [key=value ...]

Opens no model and writes nothing. tests/engine/test_memory.py holds memory to a count of a step's
tensors. Time is arithmetic over configs/cards.tsv, which no measurement of ours supports yet.
"""

from __future__ import annotations

import json
import logging
import math
import re
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kernels.block_attention import BLOCK, MAX_SAVED_KEYS
from trainlib.core import hardware
from trainlib.core.distributed import resolve_world_size
from trainlib.core.errors import UserError
from trainlib.core.files import ROOT
from trainlib.core.hardware import Card, Choice, read_cards
from trainlib.core.settings import provenance
from trainlib.data.loader import micro_batch_shape
from trainlib.engine.flops import Sizes

CONFIGS = ROOT / "configs"
CUDA_BYTES = 700_000_000
"""Bytes of a process on a card besides its tensors: CUDA's context and cuBLAS's workspace."""
USABLE = 0.95
"""Share of a card's memory that tensors can take; the allocator leaves gaps between them."""
SAVED = {
    ("cpu", False): (16, 12, 12, 8),
    ("cpu", True): (18, 8, 8, 4),
    ("cuda", False): (16, 16, 16, 8),
    ("cuda", True): (18, 12, 12, 4),
}
"""Bytes that an uncompiled layer saves for backward at a position, by device and whether products
are in 16 bits, for each value of a width: residual stream (both norms' inputs and outputs; in 16
bits a copy for each of five linear layers), queries (projected, rotated, output of attention), keys
(projected, rotated, values), feed-forward (gate, up). On a card also the input of rotate."""
LOGIT_BYTES = {False: 8, True: 6}
"""Bytes of a logit with its fp32 probability, which becomes its gradient; True in 16 bits."""
UPDATE_BYTES = {False: 19, True: 15}
"""Bytes of a value of the matrices of one shape, which Muon orthogonalizes together: their update,
the stack of them, and two stages of Newton-Schulz in fp32, or in bf16."""

ATTENTION_SHARE, TRAFFIC_SHARE = 0.4, 0.85
"""Shares of a card's peak and bandwidth: attention with heads of 64, fused elementwise kernels."""
BYTES_PER_VALUE, BYTES_PER_WEIGHT = 13.2, 20.5
"""Traffic of a value that a linear layer returns, and of a weight in a micro-batch, by Inductor."""
LAUNCH_SECONDS = 70e-6
"""Host time of each linear layer and micro-batch: about 12 launches of 6 microseconds."""


def find_sizes(config: Any) -> tuple[Sizes, str]:
    """Return the sizes of a run's model, and where they are written; raises UserError."""
    path, values = Path(config.init_from) / "config.json", {}
    where, needed = str(path), bool(config.init_from)
    if not config.init_from:
        path, where = Path(config.tokenizer) / "tokenizer.json", "the settings"
        values = dict(vars(config.model))
        needed = bool(config.tokenizer) and provenance(config)["model.vocab_size"] == "default"
    elif not path.is_file():
        small = any("tiny_" in source for source in provenance(config).values())
        path = CONFIGS / ("tiny_pretrain.yaml" if small else "pretrain.yaml")
        where = f"configs/{path.name}, as {where} does not exist"
    try:
        text = path.read_text(encoding="utf-8") if needed else ""
        read = (json.loads if path.suffix == ".json" else yaml.safe_load)(text or "{}")
        if config.init_from:
            values = read.get("model", read)
        elif needed:
            ids = [
                *read["model"]["vocab"].values(),
                *(token["id"] for token in read["added_tokens"]),
            ]
            values["vocab_size"] = 1 + max(ids)
        names = [f.name for f in fields(Sizes) if f.type in ("int", "bool") and f.name in values]
        known: Any = {name: int(values[name]) for name in names}
        return Sizes(**known), where
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: no sizes of a model ({error}). Name another folder.") from error


# ---- memory --------------------------------------------------------------------------------------


class Term(NamedTuple):
    """A part of what a step holds at its peak."""

    name: str
    bytes: float
    reason: str


def step_memory(
    sizes: Sizes, optimizer: str, choice: Choice, row_length: int, num_micro: int,
    rows: int, count: int = 1,
) -> list[Term]:  # fmt: skip
    """Return what an uncompiled step holds at the moment when it holds most.

    A step is `num_micro` micro-batches of `rows` rows on each of `count` devices. Every position
    counts as if it had a label.
    """
    d, q, k, _ = sizes.widths
    half, cuda = choice.precision in ("bf16", "fp16"), choice.device != "cpu"
    width, positions, layers = 2 if half else 4, rows * row_length, sizes.num_hidden_layers
    parameters, head = 4 * sizes.parameters, 4 * sizes.vocab_size * d
    saved = SAVED["cuda" if cuda else "cpu", half]
    layer = sum(a * b for a, b in zip(saved, sizes.widths, strict=True))
    kept, why = 0.0, "probabilities of blocks"  # Values for each position.
    if choice.attention == "masked":
        kept, why = row_length + cuda * layers * 2 * (q - k), "mask; keys, values repeated on cards"
    elif choice.attention == "blocks":
        kept = layers * sizes.num_attention_heads * (min(row_length, MAX_SAVED_KEYS) + BLOCK) / 2
    muon = optimizer == "muon"
    state = 2 * parameters - muon * 4 * sizes.matrix_values
    moments = "fp32: two moments of AdamW" + muon * ", one of Muon for matrices"
    held = [Term("weights", parameters, "fp32"), Term("optimizer", state, moments)]
    gradients = Term("gradients", parameters, "fp32")
    backward = [
        *held, *([gradients] if num_micro > 1 else []),
        Term("attention", positions * kept * width, why),
        Term("layers", positions * layers * layer, "activations that backward needs"),
        Term("logits", positions * (LOGIT_BYTES[half] * sizes.vocab_size + (4 + width) * d),
             "with loss and gradient, and both sides of the last norm"),
        Term("16-bit weights", parameters / 2, "copies for the products") if half
        else Term("output matrix", head, "its gradient, next to that of the logits"),
    ]  # fmt: skip
    exchange = [*held, gradients, Term("all-reduce", parameters, "flat buffer of the gradients")]
    low = choice.precision == "bf16" if cuda else hardware.cpu_has_bf16()
    largest = max(number * m * n for (m, n), number in sizes.matrices.items())
    work = Term("update", muon * UPDATE_BYTES[low] * largest, "orthogonalization by Muon")
    peak = max(backward, exchange if count > 1 else held, [*held, gradients, work], key=total)
    return [term for term in peak if term.bytes]


def total(terms: list[Term]) -> float:
    """Return the bytes of all terms."""
    return sum(term.bytes for term in terms)


def step_time(
    card: Card, sizes: Sizes, optimizer: str, half: bool, attended: float, positions: float,
    num_micro: int, count: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Return the seconds of a step's parts, which follow one another, at the fast end.

    Launches count as far as the host takes longer than the work. The all-reduce is a ring: each
    card sends and receives 2 (count - 1) / count of the fp32 gradients. fp32 products are TF32
    from capability 8.0 on, at half the 16-bit rate; before, at an eighth.
    """
    rate = 1 if half else 1 / 2 if card.capability >= (8, 0) else 1 / 8
    peak, bandwidth = rate * card.tflops * 1e12, TRAFFIC_SHARE * card.gbs * 1e9
    products, attention = (flops * positions / count / peak for flops in sizes.flops(attended))
    values = sizes.vocab_size + sum(n * outputs for (outputs, _), n in sizes.matrices.items())
    work = {
        "products": products / card.gemm,
        "attention": attention / ATTENTION_SHARE,
        "traffic": positions / count * values * BYTES_PER_VALUE * (2 - half) / bandwidth,
        "weights": num_micro * sizes.parameters * BYTES_PER_WEIGHT / bandwidth,
    }
    host = num_micro * (7 * sizes.num_hidden_layers + 1) * LAUNCH_SECONDS
    return work | {
        "launches": max(0.0, host - sum(work.values())),
        "update": sizes.update_flops(optimizer) / (card.gemm * peak),
        "all-reduce": 2 * (count - 1) / count * 4 * sizes.parameters / (card.link * 1e9),
    }


def fits(card: Card, terms: list[Term]) -> bool:
    """Return whether a step fits into a card."""
    return total(terms) <= USABLE * (card.mib * 2**20 - CUDA_BYTES)


# ---- the command line ----------------------------------------------------------------------------


class PlanRequest(NamedTuple):
    """The words of --plan: a card or none, how many, and seconds that the run may take or 0."""

    card: Card | None = None
    count: int = 1
    budget: float = 0.0


def plan_request(argv: list[str]) -> tuple[PlanRequest | None, list[str]]:
    """Return what a command line asks for, and its other words; raises UserError."""
    given, rest, words = {}, [], iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--gpu", "--budget"):
            given[flag] = value or next(words, "")
        else:
            rest.append(word)
    if "--plan" not in rest:
        if given:
            raise UserError(f"{next(iter(given))} belongs to --plan. Add --plan, or omit it.")
        return None, rest
    budget = parse_seconds(given["--budget"]) if "--budget" in given else 0.0
    name, colon, count = given.get("--gpu", "").partition(":")
    if colon and not re.fullmatch("[1-9][0-9]{0,5}", count):
        raise UserError(f"--gpu {name}:{count}: {count!r} is no number of cards. Write {name}:4.")
    card = hardware.find_card(name) if "--gpu" in given else None
    return PlanRequest(card, int(count or 1), budget), [word for word in rest if word != "--plan"]


def parse_seconds(text: str) -> float:
    """Return the seconds of a time such as 45m, 2h, 1.5d, or 2 (hours); raises UserError."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|m|min|h|d|)", text.strip())
    units = {"s": 1, "m": 60, "min": 60, "d": 86400}
    if seconds := float(found[1]) * units.get(found[2], 3600) if found else 0.0:
        return seconds
    raise UserError(f"--budget {text}: not a time above 0. Write 45m, 2h, 1.5d or hours.")


class Plan(NamedTuple):
    """A run; its number of steps and the seconds that it may take are 0 where not given."""

    config: Any
    sizes: Sizes
    row_length: int
    rows: int
    num_steps: int
    budget: float

    def on(self, card: Card | None, count: int) -> tuple[Choice, int, int, list[Term], dict]:
        """Return the settings, micro-batches, their rows, the memory and the time of a step.

        Without a card those of this machine, whose time is unknown. Documents count as long as
        rows. Raises UserError for settings that the device cannot run.
        """
        c, facts = self.config, hardware.find_facts()
        if card:
            facts = replace(facts, cuda=card.capability, memory_mib=card.mib)
        choice = hardware.choose_hardware(
            facts, hardware.read_table(), device="cuda" if card else c.device, compile_=c.compile,
            precision=c.precision, micro_batch_size=c.micro_batch_size, row_length=self.row_length,
        )  # fmt: skip
        choice = replace(choice, attention="masked") if c.kernels == "plain" else choice
        dealt = micro_batch_shape(self.rows, choice.micro_batch_size, count)
        model = (self.sizes, c.optim.name)
        terms = step_memory(*model, choice, self.row_length, *dealt, count)
        half, attended = choice.precision != "fp32", (c.sequence_length + 1) / 2
        work = (half, attended, self.rows * self.row_length, dealt[0], count)
        return choice, *dealt, terms, step_time(card, *model, *work) if card else {}

    def table(self, entries: dict[str, tuple[Card, int]], shares: bool) -> list[str]:
        """Return a table with a line for each number of a card, `shares` of N times one with it."""
        end, alone = "max_tokens" if self.budget else "time", 0.0
        lines = ["", f"  {'':16}{'micro-batches':>13}{'GB':>7}{'of GB':>7}{'fits':>6}"
                 f"{'tokens/s':>20}{end:>20}{'  share' if shares else ''}"]  # fmt: skip
        for name, (card, count) in entries.items():
            try:
                _, num_micro, rows, terms, parts = self.on(card, count)
            except UserError as error:  # For instance precision=bf16, which older cards lack.
                lines.append(f"  {name:16} {str(error)[:80]}")
                continue
            low, positions = sum(parts.values()), self.rows * self.row_length
            alone, high = alone or low, card.slowest * low
            time = duration(self.num_steps * low, self.num_steps * high)
            last = int(self.budget / high) * positions or "-" if self.budget else time
            lines.append(
                f"  {name:16}{f'{num_micro} x {rows}':>13}{total(terms) / 1e9:7.2f}"
                f"{card.mib * 2**20 / 1e9:7.3g}{'yes' if fits(card, terms) else 'NO':>6}"
                f"{f'{positions / high / 1e3:,.0f} to {positions / low / 1e3:,.0f} k':>20}"
                f"{last:>20}{f'{alone / count / low:>7.0%}' if shares else ''}"
            )
        return lines


def duration(low: float, high: float) -> str:
    """Return a range of seconds in words, a dash for 0."""
    if 0 < high < 1:
        return "under 1 s"
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    name, size = next((unit for unit in units if low >= 2 * unit[1]), units[-1])
    return f"{low / size:.3g} to {high / size:.3g} {name}" if low else "-"


def print_plan(config: Any, stage: str, request: PlanRequest) -> None:
    """Log the plan of a run; raises UserError."""
    sizes, where = find_sizes(config)
    row_length = config.sequence_length * (2 if stage == "dpo" else 1)
    rows = max(1, config.tokens_per_step // row_length)
    positions, (epoch, how) = rows * row_length, config.data.estimate_tokens(stage, row_length)
    num_steps = (config.max_tokens or config.epochs * epoch) / positions
    num_steps = config.max_steps or math.ceil(num_steps)
    budget = request.budget or 3600 * config.max_hours
    plan = Plan(config, sizes, row_length, rows, num_steps, budget)
    length = f"{config.epochs} epochs; data say how many steps" if config.epochs else "by the clock"
    if budget:
        length = f"{budget / 3600:.3g} hours; max_tokens is what they hold at the lower speed"
    elif num_steps:
        length = f"{num_steps:,} steps = {num_steps * positions:,} tokens"
        length += f", {num_steps * positions / epoch:.2f} epochs" if epoch else ""
    products, attention = (flops / 1e6 for flops in sizes.flops((config.sequence_length + 1) / 2))
    texts = [
        ("model", f"{sizes.parameters:,} parameters by {where}; {products + attention:,.1f} MFLOP "
         f"a token, {attention:,.1f} of them in attention"),
        ("data", f"about {epoch:,.0f} tokens an epoch, {how}" if epoch else f"unknown: {how}"),
        ("step", f"{positions:,} tokens in {rows:,} rows of {row_length:,}"), ("length", length),
    ]  # fmt: skip
    entries = {name: (card, 1) for name, card in read_cards().items()}
    if card := request.card:
        entries = {f"{n} x {card.name}": (card, n) for n in sorted({1, 2, 4, 8, request.count})}
    texts += describe_card(plan, card, request.count) if card else describe_here(plan)
    lines = [f"plan of {stage}: nothing is trained; all figures come from formulas"]
    for title, text in texts:
        lines += textwrap.wrap(f"  {title:10}{text}", 98, subsequent_indent=" " * 12)
    logging.getLogger(__name__).info("%s", "\n".join([*lines, *plan.table(entries, bool(card))]))


def describe_here(plan: Plan) -> list[tuple[str, str]]:
    """Return the memory of a step on this machine, unless the settings ask for another one."""
    try:
        choice, num_micro, rows, terms, _ = plan.on(None, resolve_world_size(plan.config))
    except UserError:
        return []
    precision = choice.precision.replace("measure", "fp32 or bf16")
    here = f"{choice.device}, {precision}, micro-batches x rows: {num_micro} x {rows}"
    return [("memory", f"{total(terms) / 1e9:.2f} GB at the peak of a step here ({here})")]


def describe_card(plan: Plan, card: Card, count: int) -> list[tuple[str, str]]:
    """Return settings, memory and time of a step on so many cards."""
    choice, num_micro, rows, terms, parts = plan.on(card, count)
    fit = "fits"
    if not fits(card, terms):
        same = (plan.sizes, plan.config.optim.name, choice, plan.row_length, 2)
        sizes = (n for n in range(rows, 0, -1) if fits(card, step_memory(*same, n, count)))
        fewer = next(sizes, 0)
        fit = f"does NOT fit: set micro_batch_size={fewer}" if fewer else "not one row fits"
    step = 1e3 * sum(parts.values())
    return [
        ("settings", f"{count} x {card.name}, {choice.precision}, attention {choice.attention}, "
         f"{'compiled' if choice.compile else 'not compiled'}, micro-batches x rows on each: "
         f"{num_micro} x {rows}"),
        ("memory", f"{total(terms) / 1e9:.3g} GB at the peak of a step without compilation (with "
         f"it less), {CUDA_BYTES / 1e9} GB for CUDA, of {card.mib * 2**20 / 1e9:.3g} GB: {fit}"),
        *(("", f"{t.bytes / 1e9:6.2f} GB  {t.name:16}{t.reason}") for t in terms),
        ("time", f"{step:,.1f} to {step * card.slowest:,.1f} ms a step, of which "
         + ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in parts.items())),
    ]  # fmt: skip

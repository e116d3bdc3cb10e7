"""--plan: the memory, time and length of a run, all computed from formulas.

    python train.py --plan [--gpu NAME[:N]] [--budget TIME] [config.yaml] [key=value ...]

Loads no model and writes nothing. tests/engine/test_memory.py compares the predicted memory with
a count of the tensors in a step. Times are computed from configs/cards.tsv and not yet verified.
"""

import argparse
import logging
import math
import re
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kernels.block_attention import BLOCK, MAX_SAVED_KEYS
from model import ModelConfig
from tokenizer.adopt import adopt
from trainlib.core import hardware
from trainlib.core.distributed import resolve_world_size
from trainlib.core.errors import UserError, as_user_errors
from trainlib.core.files import ROOT
from trainlib.core.hardware import DTYPES, Card, Hardware, read_cards
from trainlib.core.settings import provenance
from trainlib.data.loader import micro_batch_shape
from trainlib.engine.flops import Sizes
from trainlib.models.hf_folder import load_config

CONFIGS = ROOT / "configs"
CUDA_BYTES = 700_000_000  # What a process needs besides tensors: CUDA context, cuBLAS.
USABLE = 0.95  # Fraction of a card's memory that tensors can use; fragmentation takes the rest.
SAVED = {("cpu", False): (16, 12, 12, 8), ("cpu", True): (18, 8, 8, 4),
         ("cuda", False): (16, 16, 16, 8), ("cuda", True): (18, 12, 12, 4)}  # fmt: skip
"""Bytes that an uncompiled layer saves for backward per position, by (device, 16-bit matmuls), as
factors of four widths: residual stream (inputs and outputs of both norms; in 16 bits, also a copy
for each of five linear layers), queries (projected, rotated, attention output), keys (projected,
rotated, values), feed-forward (gate, up). On a card, the input to rotate is saved too."""
LOGIT_BYTES = {False: 8, True: 6}
"""Bytes per logit, including its fp32 probability, which becomes its gradient; True = 16-bit."""
UPDATE_BYTES = {False: 19, True: 15}
"""Bytes per value in the matrices of one shape, which Muon orthogonalizes together: the update, the
stack of updates, and two stages of Newton-Schulz, in fp32 (False) or bf16 (True)."""

ATTENTION_SHARE, TRAFFIC_SHARE = 0.4, 0.85
"""Fraction of peak FLOP/s in attention with head size 64; of bandwidth in elementwise kernels."""
BYTES_PER_VALUE, BYTES_PER_WEIGHT = 13.2, 20.5
"""Bytes of traffic with Inductor: per linear-layer output, and per weight in each micro-batch."""
LAUNCH_SECONDS = 70e-6  # Host time per linear layer in each micro-batch: 12 launches of 6 us.


def find_sizes(config: Any) -> tuple[Sizes, str]:
    """Return the dimensions of a run's model, and their source; raises UserError."""
    if not config.init_from:
        dimensions = config.model
        if config.tokenizer and provenance(config)["model.vocab_size"] == "default":
            with as_user_errors():
                dimensions = replace(dimensions, vocab_size=adopt(config.tokenizer).vocab_size)
        return Sizes(dimensions), "the settings"
    path = Path(config.init_from) / "config.json"
    if path.is_file():
        return Sizes(load_config(config.init_from)), str(path)
    small = any("tiny_" in source for source in provenance(config).values())
    preset = CONFIGS / ("tiny_pretrain.yaml" if small else "pretrain.yaml")
    values = yaml.safe_load(preset.read_text(encoding="utf-8")).get("model", {})
    return Sizes(ModelConfig(**values)), f"configs/{preset.name}, because {path} does not exist"


# ---- memory --------------------------------------------------------------------------------------


class Term(NamedTuple):
    """One part of the peak memory of a step."""

    name: str
    bytes: float
    reason: str


def step_memory(sizes: Sizes, optimizer: str, choice: Hardware, row_length: int, num_micro: int,
                rows: int, count: int = 1) -> list[Term]:  # fmt: skip
    """Return the parts of the peak memory of an uncompiled step.

    It is `num_micro` micro-batches of `rows` rows on each of `count` devices, fully labelled.
    """
    c = sizes.config
    d, q, k = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    half, cuda = choice.precision in DTYPES, choice.device.type != "cpu"
    width, positions, layers = 2 if half else 4, rows * row_length, c.num_hidden_layers
    parameters, head = 4 * sizes.parameters, 4 * c.vocab_size * d
    saved = SAVED["cuda" if cuda else "cpu", half]
    layer = sum(a * b for a, b in zip(saved, (d, q, k, c.intermediate_size), strict=True))
    scores, reason = 0.0, "probabilities in blocks"  # Values per position.
    if choice.attention == "masked":
        scores, reason = row_length + cuda * layers * 2 * (q - k), "mask; on cards, repeated k, v"
    elif choice.attention == "blocks":
        scores = layers * c.num_attention_heads * (min(row_length, MAX_SAVED_KEYS) + BLOCK) / 2
    muon = optimizer == "muon"
    state = 2 * parameters - muon * 4 * sizes.matrix_values
    moments = "fp32: two moments of AdamW" + muon * ", one of Muon for the matrices"
    fixed = [Term("weights", parameters, "fp32"), Term("optimizer", state, moments)]
    gradients = Term("gradients", parameters, "fp32")
    backward = [
        *fixed, *([gradients] if num_micro > 1 else []),
        Term("attention", positions * scores * width, reason),
        Term("layers", positions * layers * layer, "activations that backward needs"),
        Term("logits", positions * (LOGIT_BYTES[half] * c.vocab_size + (4 + width) * d),
             "with probabilities and gradients; also input and output of the final norm"),
        Term("16-bit weights", parameters / 2, "copies for matmuls") if half
        else Term("output matrix", head, "its gradient, in addition to the logit gradients"),
    ]  # fmt: skip
    exchange = [*fixed, gradients, Term("all-reduce", parameters, "flat gradient buffer")]
    low = choice.precision == "bf16" if cuda else hardware.cpu_has_bf16()
    largest = max(number * m * n for (m, n), number in Counter(sizes.matrices).items())
    work = Term("update", muon * UPDATE_BYTES[low] * largest, "orthogonalization in Muon")
    peak = max(backward, exchange if count > 1 else fixed, [*fixed, gradients, work], key=total)
    return [term for term in peak if term.bytes]


def total(terms: list[Term]) -> float:
    """Return the bytes of all terms."""
    return sum(term.bytes for term in terms)


def step_time(card: Card, sizes: Sizes, optimizer: str, half: bool, context: float,
              positions: float, num_micro: int, count: int = 1) -> dict[str, float]:  # fmt: skip
    """Return a lower bound in seconds for each part of a step; the parts run in sequence.

    Launches count only if the host takes longer than the device. The all-reduce is a ring, in which
    each card sends and receives 2 (count - 1) / count of the fp32 gradients. fp32 matmuls run at
    half the 16-bit rate (TF32) from capability 8.0 on, and at an eighth of it on older cards.
    """
    rate = 1 if half else 1 / 2 if card.capability >= (8, 0) else 1 / 8
    peak, bandwidth = rate * card.tflops * 1e12, TRAFFIC_SHARE * card.gbs * 1e9
    share = positions / count
    values = sizes.config.vocab_size + sum(outputs for outputs, _ in sizes.matrices)
    work = {"products": sizes.products * share / (peak * card.gemm),
            "attention": sizes.attention * context * share / (peak * ATTENTION_SHARE),
            "traffic": share * values * BYTES_PER_VALUE * (2 - half) / bandwidth,
            "weights": num_micro * sizes.parameters * BYTES_PER_WEIGHT / bandwidth}  # fmt: skip
    host = num_micro * (len(sizes.matrices) + 1) * LAUNCH_SECONDS
    return work | {
        "launches": max(0.0, host - sum(work.values())),
        "update": sizes.update_flops(optimizer) / (card.gemm * peak),
        "all-reduce": 2 * (count - 1) / count * 4 * sizes.parameters / (card.link * 1e9),
    }


def fits(card: Card, terms: list[Term]) -> bool:
    """Return whether a step fits in the memory of a card."""
    return total(terms) <= USABLE * (card.mib * 2**20 - CUDA_BYTES)


# ---- the command line ----------------------------------------------------------------------------


class PlanRequest(NamedTuple):
    """Arguments of --plan: a card or None, the number of cards, a time limit in seconds or 0."""

    card: Card | None = None
    count: int = 1
    budget: float = 0.0


def plan_request(argv: list[str]) -> tuple[PlanRequest | None, list[str]]:
    """Return the plan that a command line requests and the other arguments; raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true")
    for flag in ("--gpu", "--budget"):
        parser.add_argument(flag, nargs="?", const="")
    options, rest = parser.parse_known_args(argv)
    if not options.plan:
        if given := [flag for flag in ("gpu", "budget") if getattr(options, flag) is not None]:
            raise UserError(f"--{given[0]} requires --plan. Add --plan, or omit it.")
        return None, rest
    budget = 0.0 if options.budget is None else parse_seconds(options.budget)
    name, colon, count = (options.gpu or "").partition(":")
    if colon and not re.fullmatch("[1-9][0-9]{0,5}", count):
        raise UserError(f"--gpu {name}:{count}: {count!r} is not a number of cards. Use {name}:4.")
    card = None if options.gpu is None else hardware.find_card(name)
    return PlanRequest(card, int(count or 1), budget), rest


def parse_seconds(text: str) -> float:
    """Return the seconds in a duration such as 45m, 2h, 1.5d, or 2 (hours); raises UserError."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|m|min|h|d|)", text.strip())
    units = {"s": 1, "m": 60, "min": 60, "d": 86400}
    if seconds := float(found[1]) * units.get(found[2], 3600) if found else 0.0:
        return seconds
    raise UserError(f"--budget {text}: not a positive time. Use 45m, 2h, 1.5d, or hours.")


class Plan(NamedTuple):
    """A planned run; num_steps and budget (seconds) are 0 if not set."""

    config: Any
    sizes: Sizes
    row_length: int
    rows: int
    num_steps: int
    budget: float

    def on(self, card: Card | None, count: int) -> tuple[Hardware, int, int, list[Term], dict]:
        """Return hardware, micro-batches, rows in each, and memory and time of a step.

        Without a card, plan for this machine and return no time. Raises UserError if unsupported.
        """
        c, facts = self.config, hardware.find_facts()
        if card:
            facts = replace(facts, cuda=card.capability, memory_mib=card.mib)
        choice = hardware.choose_hardware(
            facts, device="cuda" if card else c.device, precision=c.precision, compile_=c.compile,
            micro_batch_size=c.micro_batch_size, row_length=self.row_length,
        )  # fmt: skip
        choice = replace(choice, attention="masked") if c.kernels == "plain" else choice
        shape = micro_batch_shape(self.rows, choice.micro_batch_size, count)
        model = (self.sizes, c.optim.name)
        terms = step_memory(*model, choice, self.row_length, *shape, count)
        # Documents are assumed to be as long as rows.
        half, context = choice.precision != "fp32", (c.sequence_length + 1) / 2
        work = (half, context, self.rows * self.row_length, shape[0], count)
        return choice, *shape, terms, step_time(card, *model, *work) if card else {}

    def table(self, entries: dict[str, tuple[Card, int]], shares: bool) -> list[str]:
        """Return a table with one line per entry; `shares` adds the efficiency of N cards."""
        end, single = "max_tokens" if self.budget else "time", 0.0
        lines = ["", f"  {'':16}{'micro-batches':>13}{'GB':>7}{'of GB':>7}{'fits':>6}"
                 f"{'tokens/s':>20}{end:>20}{'  share' if shares else ''}"]  # fmt: skip
        for name, (card, count) in entries.items():
            try:
                _, num_micro, rows, terms, parts = self.on(card, count)
            except UserError as error:  # For example precision=bf16, which older cards lack.
                lines.append(f"  {name:16} {str(error)[:80]}")
                continue
            low, positions = sum(parts.values()), self.rows * self.row_length
            single, high = single or low, card.slowest * low
            time = duration(self.num_steps * low, self.num_steps * high)
            result = int(self.budget / high) * positions or "-" if self.budget else time
            lines.append(
                f"  {name:16}{f'{num_micro} x {rows}':>13}{total(terms) / 1e9:7.2f}"
                f"{card.mib * 2**20 / 1e9:7.3g}{'yes' if fits(card, terms) else 'NO':>6}"
                f"{f'{positions / high / 1e3:,.0f} to {positions / low / 1e3:,.0f} k':>20}"
                f"{result:>20}{f'{single / count / low:>7.0%}' if shares else ''}"
            )
        return lines


def duration(low: float, high: float) -> str:
    """Format a range of seconds, or a dash for 0."""
    if 0 < high < 1:
        return "under 1 s"
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    name, size = next((unit for unit in units if low >= 2 * unit[1]), units[-1])
    return f"{low / size:.3g} to {high / size:.3g} {name}" if low else "-"


def print_plan(config: Any, stage: str, request: PlanRequest) -> None:
    """Log the plan for a run; raises UserError."""
    sizes, source = find_sizes(config)
    row_length = config.sequence_length * (2 if stage == "dpo" else 1)
    rows = max(1, config.tokens_per_step // row_length)
    positions, (epoch, note) = rows * row_length, config.data.estimate_tokens(stage, row_length)
    num_steps = (config.max_tokens or config.epochs * epoch) / positions
    num_steps = config.max_steps or math.ceil(num_steps)
    budget = request.budget or 3600 * config.max_hours
    plan = Plan(config, sizes, row_length, rows, num_steps, budget)
    length = f"{config.epochs} epochs; steps depend on the data" if config.epochs else "time limit"
    if budget:
        length = f"{budget / 3600:.3g} hours; max_tokens is what fits at the lower speed"
    elif num_steps:
        length = f"{num_steps:,} steps = {num_steps * positions:,} tokens"
        length += f", {num_steps * positions / epoch:.2f} epochs" if epoch else ""
    attention = sizes.attention / 1e6 * (config.sequence_length + 1) / 2
    texts = [
        ("model", f"{sizes.parameters:,} parameters, from {source}; "
         f"{sizes.products / 1e6 + attention:,.1f} "
         f"MFLOP per token, {attention:,.1f} of them in attention"),
        ("data", f"about {epoch:,.0f} tokens per epoch, {note}" if epoch else f"unknown: {note}"),
        ("step", f"{positions:,} tokens in {rows:,} rows of {row_length:,}"), ("length", length),
    ]  # fmt: skip
    entries = {name: (card, 1) for name, card in read_cards().items()}
    if card := request.card:
        entries = {f"{n} x {card.name}": (card, n) for n in sorted({1, 2, 4, 8, request.count})}
    texts += describe_card(plan, card, request.count) if card else describe_here(plan)
    lines = [f"plan for {stage}: nothing is trained; all figures are computed from formulas"]
    for title, text in texts:
        lines += textwrap.wrap(f"  {title:10}{text}", 98, subsequent_indent=" " * 12)
    logging.getLogger(__name__).info("%s", "\n".join([*lines, *plan.table(entries, bool(card))]))


def describe_here(plan: Plan) -> list[tuple[str, str]]:
    """Return the memory of a step here, or no entries if this machine rejects the settings."""
    try:
        choice, num_micro, rows, terms, _ = plan.on(None, resolve_world_size(plan.config))
    except UserError:
        return []
    precision = choice.precision.replace("measure", "fp32 or bf16")
    here = f"{choice.device}, {precision}, micro-batches x rows: {num_micro} x {rows}"
    return [("memory", f"{total(terms) / 1e9:.2f} GB at the peak of a step here ({here})")]


def describe_card(plan: Plan, card: Card, count: int) -> list[tuple[str, str]]:
    """Return the settings, memory and time of a step on `count` cards."""
    choice, num_micro, rows, terms, parts = plan.on(card, count)
    fit = "fits"
    if not fits(card, terms):
        same = (plan.sizes, plan.config.optim.name, choice, plan.row_length, 2)
        sizes = (n for n in range(rows, 0, -1) if fits(card, step_memory(*same, n, count)))
        fewer = next(sizes, 0)
        fit = f"does NOT fit: set micro_batch_size={fewer}" if fewer else "not even one row fits"
    step = 1e3 * sum(parts.values())
    return [
        ("settings", f"{count} x {card.name}, {choice.precision}, attention {choice.attention}, "
         f"{'compiled' if choice.compile else 'not compiled'}, micro-batches x rows on each: "
         f"{num_micro} x {rows}"),
        ("memory", f"{total(terms) / 1e9:.3g} GB at the peak of a step without compilation (less "
         f"with it), {CUDA_BYTES / 1e9} GB for CUDA, of {card.mib * 2**20 / 1e9:.3g} GB: {fit}"),
        *(("", f"{t.bytes / 1e9:6.2f} GB  {t.name:16}{t.reason}") for t in terms),
        ("time", f"{step:,.1f} to {step * card.slowest:,.1f} ms per step, of which "
         + ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in parts.items())),
    ]  # fmt: skip

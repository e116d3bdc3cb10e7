"""--plan: what a run would take in memory and time, and what more cards or a budget would bring.

    python train.py --plan [--gpu CARD[:N]|here] [--budget 2h] [config.yaml] [key=value ...]

Memory is counted by taking the real step on tensors without content; time is arithmetic over
configs/cards.tsv, or with `--gpu here` a measurement. Nothing is trained, and nothing is written
into the run's folder.
"""

from __future__ import annotations

import logging
import math
import re
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from trainlib.batches import StepLoader, deal
from trainlib.cards import (
    ATTENTION_SHARE,
    TRAFFIC_SHARE,
    Card,
    StepTime,
    Work,
    find_card,
    read_cards,
    step_time,
)
from trainlib.errors import UserError
from trainlib.hardware import (
    TABLE_ROW_LENGTH,
    Choice,
    Facts,
    choose_hardware,
    find_facts,
    find_row,
    read_table,
)
from trainlib.measure import MEASURE_SECONDS, MEASURED_WITHIN, Step, measure_step, step_peak
from trainlib.memory import CUDA_BYTES
from trainlib.optim import Schedule, build_optimizers
from trainlib.runtime import Hardware

log = logging.getLogger(__name__)

COUNTS = (1, 2, 4, 8)
WORTH = 0.7
"""A number of cards is worth it while each brings this share of what one alone brings."""
TOKENS_PER_PARAMETER = 20
"""From so many on a larger model is the better use of the time (arXiv:2203.15556)."""
GOOD_EPOCHS = 4
"""More passes over the same text bring little (arXiv:2305.16264)."""
PRESETS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class PlanRequest:
    """What --plan was asked for."""

    card: Card | None = None
    """The card to plan for; None = none was named."""
    count: int = 1
    """How many of them."""
    here: bool = False
    """Measure on this machine."""
    budget: float = 0.0
    """Seconds that the run may take; 0 = as long as its settings say."""

    def facts(self) -> Facts:
        """The machine that is planned for."""
        return self.card.facts if self.card else find_facts()


WANTED: ContextVar[PlanRequest | None] = ContextVar("plan", default=None)
"""The plan that this process's command line asks for, if it does."""


# ---- the command line ----------------------------------------------------------------------------


def plan_request(argv: list[str]) -> tuple[PlanRequest | None, list[str]]:
    """What a command line asks for, and its words without those of the plan; raises UserError."""
    given, rest, words = {}, [], iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--gpu", "--budget"):
            given[flag] = value or next(words, "")
        else:
            rest.append(word)
    planned = "--plan" in rest
    rest = [word for word in rest if word != "--plan"]
    if not planned:
        if given:
            raise UserError(f"{next(iter(given))} belongs to --plan; add --plan, or leave it out")
        return None, rest
    budget = parse_seconds(given["--budget"]) if "--budget" in given else 0.0
    gpu = given.get("--gpu")
    if gpu is None:
        if budget:
            raise UserError("--budget needs to know the card: add --gpu CARD[:N] or --gpu here")
        return PlanRequest(), rest
    if gpu == "here":
        return PlanRequest(here=True, budget=budget), rest
    name, colon, count = gpu.partition(":")
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise UserError(f"--gpu {gpu}: expected a number of cards after the colon, as in {name}:4")
    return PlanRequest(find_card(name), int(count or 1), budget=budget), rest


def parse_seconds(text: str) -> float:
    """Seconds of a time such as 45m, 2h or 1.5d; raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text.strip())
    seconds = float(found[1]) * {"s": 1, "h": 3600, "d": 86400}.get(found[2], 60) if found else 0.0
    if not seconds:
        raise UserError(f"--budget {text}: expected a time above 0, such as 45m, 2h or 1.5d")
    return seconds


def without_device(choice: Choice) -> Hardware:
    """The hardware that the memory of a choice is counted with: a CPU's, nothing compiled."""
    attention = "blocks" if choice.attention == "blocks" else "masked"
    precision, rows = choice.precision, choice.micro_batch_size
    return Hardware(torch.device("cpu"), precision, attention, False, rows)


# ---- the plan ------------------------------------------------------------------------------------


@dataclass
class Planned:
    """What the sections of the plan's text are made from."""

    run: Any
    model: nn.Module
    loader: StepLoader
    work: Work
    num_steps: int | None
    step: Step
    seconds: tuple[float, float] = (0.0, 0.0)
    """The least and the most that one step takes."""

    @property
    def request(self) -> PlanRequest:
        """What was asked for."""
        return self.run.plan

    @property
    def dataset(self) -> Any:
        """The training data."""
        return self.loader.dataset

    def rows(self, count: int, micro_batch_size: int = 0) -> tuple[int, int]:
        """Micro-batches of each of `count` cards, and rows of each."""
        size = micro_batch_size or self.run.hardware.micro_batch_size
        return deal(self.loader.rows_per_step, size, count)


def show_plan(
    run: Any,
    model: nn.Module,
    optimizers: list[Optimizer],
    schedule: Schedule,
    loader: StepLoader,
    step: Step,
) -> None:
    """Print the plan of a run."""
    dataset: Any = loader.dataset
    positions = loader.rows_per_step * dataset.row_length
    work = Work.of(model, optimizers, dataset.mean_attended(), positions)
    plan = Planned(run, model, loader, work, schedule.num_steps, step)
    card, count = plan.request.card, plan.request.count
    if card and run.hardware.precision == "fp32":
        raise UserError(f"--gpu {card.name} plans 16-bit products; leave out precision=fp32")
    lines = [*describe_work(plan), *describe_memory(plan)]
    if card:
        parts = step_time(card, work, plan.rows(count)[0], count)
        plan.seconds = (sum(parts), card.slowest * sum(parts))
        lines += [*describe_length(plan), *describe_arithmetic(card, parts)]
        lines += describe_counts(plan, card)
    elif plan.request.here:
        log.info("measuring steps for about %.0f s", MEASURE_SECONDS)
        seconds, taken = measure_step(run, model, optimizers, schedule, loader, step)
        plan.seconds = (seconds / MEASURED_WITHIN, seconds * MEASURED_WITHIN)
        lines += describe_length(plan)
        told = f"{positions / seconds:,.0f} tokens/s here, {seconds:.3g} s a step"
        how = f"{taken} steps or shares of one, by one process; the range is this +-"
        lines += line("measured", f"{told}, from", f"{how} {MEASURED_WITHIN - 1:.0%}")
    else:
        lines += describe_cards(plan)
    for text in lines:
        log.info("%s", text)


def line(title: str, *texts: str) -> list[str]:
    """Lines of the plan under one title."""
    return [f"  {'' if i else title:10}{text}" for i, text in enumerate(texts)]


def hours(seconds: float) -> str:
    """A time as one reads it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def describe_work(plan: Planned) -> list[str]:
    """Model, data and length."""
    w, dataset = plan.work, plan.dataset
    where = "this machine"
    if plan.request.card:
        where = f"{plan.request.count} x {plan.request.card.name}"
    flops = w.product_flops + w.attention_flops
    share = f"{w.product_flops / 1e6:,.1f} in products, {w.attention_flops / 1e6:,.1f} in attention"
    epoch = dataset.num_rows() * dataset.row_length
    steps = f"steps of {w.positions:,} positions"
    if plan.num_steps:
        total = plan.num_steps * w.positions
        steps = f"{plan.num_steps:,} {steps} = {total:,}, {total / epoch:.2f} epochs"
    return [
        f"plan of {plan.run.stage} for {where}; nothing is trained",
        *line("model", f"{w.parameters:,} parameters; training on a token takes {flops / 1e6:,.1f} "
              "MFLOP", f"({share})"),
        *line("data", f"{dataset.num_tokens:,} tokens an epoch, {epoch:,} positions with padding, "
              "from", *(str(cache.path) for cache in dataset.caches)),
        *line("run", steps if plan.num_steps else f"{steps} until the time is over"),
    ]  # fmt: skip


def describe_memory(plan: Planned) -> list[str]:
    """Peak of a step, and whether it fits."""
    request, hardware = plan.request, plan.run.hardware
    num_micro, rows = plan.rows(request.count)

    def peak(rows: int) -> int:
        counted = step_peak(plan.run, plan.model, plan.loader, plan.step, num_micro, rows)
        # Several cards meet with weights, gradients, at most two moments and one flat buffer.
        return max(counted, 20 * plan.work.parameters) if request.count > 1 else counted

    most = peak(rows)
    texts = [
        f"{most / 1e9:.3g} GB of tensors at the peak of a step of {num_micro} x {rows} rows, "
        f"{hardware.precision}, not compiled"
    ]
    if request.card or torch.cuda.is_available():
        room = request.facts().memory_mib * 2**20
        texts[0] += " (compiled takes less)"
        texts.append(f"and {CUDA_BYTES / 1e9} GB for CUDA itself, of {room / 1e9:.3g} GB")
        if most + CUDA_BYTES > room:
            few = max(1, rows // 8)
            less = peak(few)
            per_row = (most - less) / max(1, rows - few) or math.inf
            fits = few + math.floor((0.97 * (room - CUDA_BYTES) - less) / per_row)
            cure = f"give micro_batch_size={fits}" if fits > 0 else "not one row would fit"
            texts.append(f"which does NOT fit: {cure}")
    return line("memory", *texts)


def describe_length(plan: Planned) -> list[str]:
    """Hours of the run, or what fits into a budget."""
    fast, slow = plan.seconds
    positions = plan.work.positions
    texts = line("speed", f"{positions / slow:,.0f} to {positions / fast:,.0f} tokens/s")
    budget = plan.request.budget or (0 if plan.num_steps else plan.run.clock.left())
    if budget:
        return texts + describe_budget(plan, budget)
    least, most = (hours((plan.num_steps or 0) * seconds) for seconds in plan.seconds)
    return texts + line(
        "time",
        f"{least} to {most} of training; evaluations, checkpoints and the start come on top",
    )


def describe_budget(plan: Planned, budget: float) -> list[str]:
    """How many tokens a time holds at the slow end, and which model suits that many."""
    slow = plan.seconds[1]
    steps = int(budget / slow)
    if not steps:
        raise UserError(
            f"{hours(budget)} holds not one step of {hours(slow)}: give more time, or fewer "
            "tokens_per_step"
        )
    tokens = steps * plan.work.positions
    epoch = plan.dataset.num_rows() * plan.dataset.row_length
    texts = [f"{hours(budget)} holds {steps:,} steps = {tokens:,} positions, "
             f"{tokens / epoch:.2f} epochs: max_tokens={tokens}"]  # fmt: skip
    if tokens > GOOD_EPOCHS * epoch:
        texts.append(f"more than {GOOD_EPOCHS} passes over the same text bring little")
    if plan.run.stage != "pretrain" or plan.run.config.init_from:
        return line("budget", *texts)
    best = ("", 0, 0)
    for name, work, row_length in presets(plan):
        held = int(budget / preset_seconds(plan, work, row_length)) * work.positions
        tokens = min(held, GOOD_EPOCHS * epoch)
        ratio = tokens / work.parameters
        if not best[0] or ratio >= TOKENS_PER_PARAMETER:
            best = (name, tokens, held)
        texts.append(
            f"{name:28}{work.parameters / 1e6:6.1f}M parameters, {tokens / 1e6:9,.1f}M positions, "
            f"{ratio:7,.1f} each"
        )
    name, tokens, held = best
    whys = [f"the largest with {TOKENS_PER_PARAMETER} positions a parameter, else the smallest"]
    if held > tokens:
        whys.append(f"{GOOD_EPOCHS} passes over the text; {held / tokens:.3g} times as much text, "
                    f"{held // GOOD_EPOCHS:,} positions, would fill {hours(budget)}")  # fmt: skip
    return line("budget", *texts) + line("choice", f"{name} max_tokens={tokens}", *whys)


def presets(plan: Planned) -> list[tuple[str, Work, int]]:
    """The config files with model sizes, smallest first: name, work, and positions of a row."""
    config, found = plan.run.config, []
    kind: Any = type(plan.model)
    now: Any = plan.model.config
    for file in sorted(PRESETS.glob(f"{plan.run.stage}*.yaml")):
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        sizes = type(now)(**{"vocab_size": now.vocab_size, **values.get("model", {})})
        with torch.device("meta"):
            model = kind(sizes)
        length = values.get("sequence_length", config.sequence_length)
        positions = max(1, values.get("tokens_per_step", config.tokens_per_step) // length) * length
        attended = plan.dataset.mean_attended()
        work = Work.of(model, build_optimizers(model, config.optim), attended, positions)
        found.append((f"{PRESETS.name}/{file.name}", work, length))
    return sorted(found, key=lambda entry: entry[1].parameters)


def preset_seconds(plan: Planned, work: Work, row_length: int) -> float:
    """The most that a step of another model takes, where this run's step takes plan.seconds."""
    card, count, now = plan.request.card, plan.request.count, plan.work
    if card is None:
        share = (work.product_flops + work.attention_flops) * work.positions
        return plan.seconds[1] * share / ((now.product_flops + now.attention_flops) * now.positions)
    # Fewer rows fit of a larger model, about in the inverse ratio of the values it puts out.
    row = find_row(card.facts, "cuda", read_table())
    size = max(
        1, row.micro_batch_size * TABLE_ROW_LENGTH * now.values // (row_length * work.values)
    )
    num_micro, _ = deal(work.positions // row_length, size, count)
    return card.slowest * sum(step_time(card, work, num_micro, count))


def describe_arithmetic(card: Card, parts: StepTime) -> list[str]:
    """From what the time of a step was computed."""
    told = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in parts._asdict().items())
    return line(
        "a step",
        f"{1e3 * sum(parts):.4g} ms at the fast end: {told}",
        f"of {card.tflops:g} TFLOP/s ({card.gemm:.0%} in products, {ATTENTION_SHARE:.0%} in "
        f"attention) and {card.gbs:g} GB/s ({TRAFFIC_SHARE:.0%});",
        f"the slow end is {card.slowest:.2g} times that",
    )


def describe_counts(plan: Planned, card: Card) -> list[str]:
    """What several cards would bring."""
    alone = sum(step_time(card, plan.work, plan.rows(1)[0]))
    texts, worth = [], 1
    for count in sorted({*COUNTS, plan.request.count}):
        if count > plan.loader.rows_per_step:
            break
        parts = step_time(card, plan.work, plan.rows(count)[0], count)
        share = alone / (count * sum(parts))
        worth = count if share >= WORTH else worth
        told = expectation(plan, card, sum(parts))
        reduce = f"all-reduce {1e3 * parts.exchange:.3g} ms a step"
        texts.append(f"{count:3} {told}, {reduce}, {share:.0%} of {count} times one")
    why = f"each brings {WORTH:.0%} or more of what one alone brings"
    texts.append(f"worth it: {worth} ({why}; all-reduce at {card.link:g} GB/s)")
    return line("cards", *texts)


def expectation(plan: Planned, card: Card, seconds: float) -> str:
    """Hours and speed of a run from the least that its step takes."""
    speed = plan.work.positions / seconds
    told = f"{speed / card.slowest:,.0f} to {speed:,.0f} tokens/s"
    if plan.num_steps:
        least, most = plan.num_steps * seconds, plan.num_steps * seconds * card.slowest
        told = f"{hours(least)} to {hours(most)}, {told}"
    return told


def describe_cards(plan: Planned) -> list[str]:
    """The hours of the run on one of each card of the table."""
    texts, table = [], read_table()
    for card in read_cards().values():
        row_length = plan.dataset.row_length
        choice = choose_hardware(card.facts, table, device="cuda", row_length=row_length)
        num_micro, _ = plan.rows(1, choice.micro_batch_size)
        seconds = sum(step_time(card, plan.work, num_micro))
        texts.append(f"{card.name:11}{expectation(plan, card, seconds)}")
    hint = "--gpu CARD says more of one, --gpu here measures on this machine"
    return line("on one", *texts, hint)

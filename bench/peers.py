"""One measured run of a peer: transformers.Trainer, trl.SFTTrainer or trl.DPOTrainer.

    PEERS/bin/python -m bench.peers BENCHMARK --model DIR --data FILE [...]

    packed, padded, sft, sft_wrapped, dpo
                               {"per_second"}: non-padding tokens (or pairs) after the first 2 steps
    loss                       {"bits_per_byte"} on --val after training from scratch for --minutes
    evaluate                   {"bits_per_byte"} of --model on --data
    step                       {"peak", "per_second"}: bytes and tokens/s of a plain training step
                               on --rows rows of --length tokens

The other benchmarks run this file in a separate virtualenv (bench/requirements-peers.txt). The peer
uses the same model dimensions, tokenizer and texts. It keeps its defaults, with three exceptions:
logging and saving are off; trl's gradient checkpointing, which slows down a step, is off; and bf16,
which is far slower on a CPU without bf16 instructions, needs --bf16. Prints one JSON object.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.common import measure_step
from trainlib.core.terminal import use_replacement_characters

ROWS, LENGTH, WARMUP, POINTS, TRIAL_STEPS = 8, 512, 2, 6, 32


class Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Record the time after an optimizer step."""
        self.ends.append(time.perf_counter())


def read_jsonl(path: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(steps: int, **more: Any) -> dict[str, Any]:
    """Return the training arguments that all peers share."""
    return {
        "output_dir": ".cache/bench/peer", "per_device_train_batch_size": ROWS, "max_steps": steps,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "seed": 0, **more,
    }  # fmt: skip


def counting_collator(collate: Any, seen: list[int], count: Any) -> Any:
    """Wrap a collator so that it appends the count of each batch to `seen`."""

    def wrapped(rows: list) -> Any:
        batch = collate(rows)
        seen.append(count(batch))
        return batch

    return wrapped


def pack_rows(tokenizer: Any, rows: list[dict], limit: float = math.inf) -> list[list[int]]:
    """Concatenate all texts with end-of-text tokens and split them into rows, as run_clm does."""
    end, flat = tokenizer.convert_tokens_to_ids("<|endoftext|>"), []
    for row in rows:
        flat += (*tokenizer(row["text"])["input_ids"], end)
        if len(flat) > (limit + 1) * LENGTH:
            break
    return [flat[i : i + LENGTH] for i in range(0, len(flat) - LENGTH, LENGTH)]


def bits_per_byte(model: Any, tokenizer: Any, rows: list[dict]) -> float:
    """Return the bits per byte of documents, evaluated separately in pieces of LENGTH tokens."""
    bits, num_bytes = 0.0, 0
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids = [end, *tokenizer(row["text"])["input_ids"], end]
            num_bytes += len(row["text"].encode())
            for start in range(0, len(ids) - 1, LENGTH):
                piece = torch.tensor([ids[start : start + LENGTH + 1]])
                logits = model(piece[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum")
                bits += float(loss) / math.log(2)
    return bits / num_bytes


class Curve(TrainerCallback):
    """Evaluates bits per byte POINTS times per run and records the training time so far."""

    def __init__(self, measure: Callable[[Any], float], steps: int) -> None:
        self.measure, self.every = measure, max(1, steps // POINTS)
        self.points: list[tuple[float, float]] = []
        self._trained, self._begin = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Start the clock before a step, after its data has been loaded."""
        self._begin = self._begin or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Evaluate if due, and reset the clock so that evaluation time is not counted."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        self._trained += time.perf_counter() - self._begin
        self.points.append((self._trained / 60, self.measure(more["model"])))
        more["model"].train()
        self._begin = 0.0


def loss(options: argparse.Namespace, tokenizer: Any, rows: list[dict]) -> dict[str, Any]:
    """Train from scratch for --minutes; a short trial run determines the number of steps."""
    data = Dataset.from_dict({"input_ids": pack_rows(tokenizer, rows)})
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    val = read_jsonl(options.val)

    def train(steps: int, callback: TrainerCallback) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
        more = {"learning_rate": options.rate, "warmup_steps": math.ceil(0.02 * steps),
                "bf16": options.bf16}  # fmt: skip
        trainer = Trainer(model, TrainingArguments(**settings(steps, **more)), train_dataset=data,
                          data_collator=collate, callbacks=[callback])  # fmt: skip
        trainer.train()

    clock = Clock()
    train(TRIAL_STEPS, clock)
    step_seconds = (clock.ends[-1] - clock.ends[WARMUP - 1]) / (TRIAL_STEPS - WARMUP)
    steps = max(1, round(options.minutes * 60 / step_seconds))
    curve = Curve(lambda model: bits_per_byte(model, tokenizer, val), steps)
    train(steps, curve)
    minutes, value = curve.points[-1]
    return {"bits_per_byte": value, "minutes": minutes, "tokens": steps * ROWS * LENGTH,
            "curve": curve.points}  # fmt: skip


def plain_step(model: Any, rows: int, length: int, count: int) -> dict[str, float]:
    """Measure a training step: forward with labels, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(100, 6000, (rows, length), generator=torch.Generator().manual_seed(0))
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return measure_step(step, model, optimizer, rows * length, count)


def throughput(
    options: argparse.Namespace, model: Any, tokenizer: Any, rows: list[dict]
) -> dict[str, float]:
    """Return non-padding tokens per second, or pairs per second for dpo."""
    clock, seen = Clock(), []
    extra = {"bf16": options.bf16, "torch_compile": options.compile}
    trl_extra = {"bf16": options.bf16, "gradient_checkpointing": False}
    if options.benchmark in ("packed", "padded"):
        if options.benchmark == "packed":
            ids = pack_rows(tokenizer, rows, options.steps * ROWS)
        else:
            ids = [tokenizer(row["text"])["input_ids"][:LENGTH] for row in rows]
        data = Dataset.from_dict({"input_ids": ids})
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(
            model, TrainingArguments(**settings(options.steps, **extra)), train_dataset=data,
            data_collator=counting_collator(collate, seen, real_tokens), callbacks=[clock],
        )  # fmt: skip
    elif options.benchmark in ("sft", "sft_wrapped"):
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
        if options.benchmark == "sft_wrapped":
            trl_extra["packing_strategy"] = "wrapped"
        config = SFTConfig(**settings(options.steps, **trl_extra), packing=True, max_length=LENGTH)
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer,
                             callbacks=[clock])  # fmt: skip
        trainer.data_collator = counting_collator(trainer.data_collator, seen, real_tokens)
    else:
        from trl import DPOConfig, DPOTrainer

        data = Dataset.from_list([{k: row[k] for k in ("chosen", "rejected")} for row in rows])
        config = DPOConfig(**settings(options.steps, **trl_extra), max_length=LENGTH)
        trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer,
                             callbacks=[clock])  # fmt: skip
        trainer.data_collator = counting_collator(trainer.data_collator, seen, lambda batch: ROWS)
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[WARMUP - 1]
    work = sum(seen[WARMUP : options.steps])
    return {"per_second": work / seconds, "seconds": seconds, "work": work}


def real_tokens(batch: Any) -> int:
    """Return the number of non-padding tokens; a batch without a mask has no padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel())


def main() -> None:
    """Run one benchmark of one peer."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    names = ["packed", "padded", "sft", "sft_wrapped", "dpo", "loss", "evaluate", "step"]
    parser.add_argument("benchmark", choices=names)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--matmul", default="highest", help="torch's float32 matmul precision")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--val", type=Path)
    options = parser.parse_args()
    torch.set_float32_matmul_precision(options.matmul)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    rows = read_jsonl(options.data)
    if options.benchmark == "loss":
        found: dict[str, Any] = loss(options, tokenizer, rows)
    elif options.benchmark == "evaluate":
        found = {"bits_per_byte": bits_per_byte(model, tokenizer, rows)}
    elif options.benchmark == "step":
        found = plain_step(model, options.rows, options.length, options.steps)
    else:
        found = throughput(options, model, tokenizer, rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

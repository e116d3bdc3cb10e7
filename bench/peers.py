"""One measured run of a peer: transformers.Trainer, trl.SFTTrainer or trl.DPOTrainer.

    PEERS/bin/python bench/peers.py FIGURE --model DIR --data FILE [--steps N] [--matmul WORD]

Run by bench.training in an environment of its own (bench/requirements-peers.txt). The peer gets
the same weights, tokenizer and rows, and otherwise its own defaults, but for logging and saving.
Prints one JSON object: real tokens (or pairs) a second over the steps after the first two.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROWS, LENGTH, WARM = 8, 512, 2


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The time after an optimizer step."""
        self.ends.append(time.perf_counter())


def read(path: Path) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(steps: int, **more: Any) -> dict[str, Any]:
    """What every peer is told."""
    return {
        "output_dir": ".cache/bench/peer", "per_device_train_batch_size": ROWS, "max_steps": steps,
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "seed": 0, **more,
    }  # fmt: skip


def counting(collate: Any, seen: list[int], count: Any) -> Any:
    """A collator that notes how much real work each batch holds."""

    def wrapped(rows: list) -> Any:
        batch = collate(rows)
        seen.append(count(batch))
        return batch

    return wrapped


def main() -> None:
    """Measure one figure of one peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", choices=["packed", "padded", "sft", "dpo"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--matmul", default="highest", help="of torch.set_float32_matmul_precision")
    options = parser.parse_args()
    torch.set_float32_matmul_precision(options.matmul)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    rows, clock, seen = read(options.data), Clock(), []
    if options.figure in ("packed", "padded"):
        ids = [tokenizer(row["text"])["input_ids"] for row in rows]
        if options.figure == "packed":  # As run_clm does: joined and cut, nothing padded.
            flat = [i for one in ids for i in one]
            ids = [flat[i : i + LENGTH] for i in range(0, len(flat) - LENGTH, LENGTH)]
        data = Dataset.from_dict({"input_ids": [one[:LENGTH] for one in ids]})
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(
            model, TrainingArguments(**settings(options.steps)), train_dataset=data,
            data_collator=counting(collate, seen, lambda b: int(b["attention_mask"].sum())),
            callbacks=[clock],
        )  # fmt: skip
    elif options.figure == "sft":
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{"messages": row["conversations"]} for row in rows])
        config = SFTConfig(**settings(options.steps), packing=True, max_length=LENGTH)
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer,
                             callbacks=[clock])  # fmt: skip
        trainer.data_collator = counting(trainer.data_collator, seen, real_tokens)
    else:
        from trl import DPOConfig, DPOTrainer

        data = Dataset.from_list([{k: row[k] for k in ("chosen", "rejected")} for row in rows])
        config = DPOConfig(**settings(options.steps), max_length=LENGTH)
        trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer,
                             callbacks=[clock])  # fmt: skip
        trainer.data_collator = counting(trainer.data_collator, seen, lambda batch: ROWS)
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[WARM - 1]
    work = sum(seen[WARM : options.steps])
    print(json.dumps({"per_second": work / seconds, "seconds": seconds, "work": work}))


def real_tokens(batch: Any) -> int:
    """Tokens that are no padding, whether a batch says so by a mask or by positions."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel())


if __name__ == "__main__":
    main()

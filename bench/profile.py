"""Where the time of one training step goes, by torch's profiler: the 26.9M model, uncompiled, in
bf16 where the CPU has its instructions.

    python -m bench.profile

Prints and records the operators that take 1 % or more by themselves: share, seconds, calls. The
update is made once in the 131,072 tokens of a step as shipped: of its time the share of the 8 rows
of 512 counts that are computed.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import base, record
from bench.step import chosen, rows_of_one_document
from bench.training import LENGTH, ROWS
from hf_folder import load_model
from losses import cross_entropy_sum
from trainlib.optim import OptimConfig, build_optimizers, fast_bfloat16

SHIPPED = 131_072


def main() -> None:
    """Profile the second of two steps."""
    torch.set_float32_matmul_precision(chosen().matmul)
    model = load_model(base())
    model.attention = chosen().attention
    bf16 = fast_bfloat16(torch.device("cpu"))
    optimizers = build_optimizers(model, OptimConfig())
    batch = rows_of_one_document(ROWS, LENGTH)

    def gradient() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels))
        loss.backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    gradient()
    update()
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for part, weight in ((gradient, 1.0), (update, ROWS * LENGTH / SHIPPED)):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            part()
        for event in found.key_averages():
            name = event.key if part is gradient else f"update: {event.key}"
            seconds[name] += weight * event.self_cpu_time_total / 1e6
            calls[name] += event.count
    whole = seconds.total()
    operators = [
        {"name": name, "share": own / whole, "seconds": own, "calls": calls[name]}
        for name, own in seconds.most_common()
        if own >= 0.01 * whole
    ]
    for row in operators:
        print(f"{row['share']:6.1%} {row['seconds']:7.3f} s {row['calls']:5} {row['name']}")
    record("profile", [whole], "", operators=operators, precision="bf16" if bf16 else "fp32")


if __name__ == "__main__":
    main()

"""Each default of the tiny recipes beside its neighbours: one setting changed at a time.

    python -m bench.ablations [--tokens 400000] [--seeds 3] [--hours 0] [NAME ...]

Every run is the stage script itself, on the sample, so many tokens long. A fine-tuning run begins
with the default pretraining run of its seed, a preference run with the default fine-tuning run. The
figure is the one at the end over all held-out text: bits per byte, of preferences the loss.

Runs are appended to bench/ablations.jsonl as they end, one process a core; what is there already,
with the same words and tokens, is not run again, and --hours stops before a run that begins later.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.common import PLACE, ROOT, STAGES, machine, parser_of
from trainlib.metrics import VAL_BITS_PER_BYTE, VAL_LOSS, read_metrics

RUNS = ROOT / "bench/ablations.jsonl"
SCRIPTS = {stage: script for script, stage in STAGES.items()}
BEFORE = {"sft": "pretrain", "dpo": "sft"}
FIGURE = {"pretrain": VAL_BITS_PER_BYTE, "sft": VAL_BITS_PER_BYTE, "dpo": VAL_LOSS}
CHANGES = {
    "pretrain": [
        "",  # The default.
        "optim.name=adamw optim.adamw_lr=3e-3",
        "optim.name=adamw optim.adamw_lr=1e-3",
        "optim.muon_lr=0.01",
        "optim.muon_lr=0.04",
        "optim.embedding_lr=4e-3",
        "optim.embedding_lr=16e-3",
        "tokens_per_step=2048",
        "tokens_per_step=8192",
        "optim.decay_fraction=0.25",
        "optim.decay_fraction=0.99",
        "optim.schedule=cosine",
        "optim.weight_decay=0.1",
        "optim.momentum=0.9",
    ],
    "sft": [
        "",
        "optim.name=adamw optim.adamw_lr=1e-3 optim.embedding_lr=1e-3",
        "optim.muon_lr=0.005",
        "optim.muon_lr=0.02",
        "optim.decay_fraction=0.5",
        "tokens_per_step=4096",
    ],
    "dpo": [
        "",
        "optim.adamw_lr=5e-5 optim.embedding_lr=5e-5",
        "optim.adamw_lr=2e-4 optim.embedding_lr=2e-4",
        "optim.name=muon optim.muon_lr=5e-4 optim.embedding_lr=1e-4",
        "beta=0.3",
    ],
}


def main() -> None:
    """Run what is not there yet: seed by seed, so that each setting has a figure early."""
    parser = parser_of("ablations", __doc__, CHANGES)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=0.0)
    options = parser.parse_args()
    end = time.time() + 3600 * options.hours if options.hours else float("inf")
    writing = threading.Lock()

    def measure(stage: str, change: str, seed: int) -> None:
        if time.time() > end:
            return
        value = one(stage, change, seed, options.tokens)
        row = {"stage": stage, "change": change, "seed": seed, "tokens": options.tokens,
               "value": value, **machine(), "threads": 1}  # fmt: skip
        with writing, RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{stage:9} seed {seed}  {value:.4f}  {change or 'default'}", flush=True)

    for seed in range(options.seeds):
        for stage in options.names or CHANGES:
            done = {(r["stage"], r["change"], r["seed"], r["tokens"]) for r in rows()}
            wanted = [c for c in CHANGES[stage] if (stage, c, seed, options.tokens) not in done]
            if wanted and stage in BEFORE:
                default(BEFORE[stage], seed, options.tokens)  # Before several need it at once.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for done in [pool.submit(measure, stage, change, seed) for change in wanted]:
                    done.result()


def rows() -> list[dict[str, Any]]:
    """The runs so far."""
    if not RUNS.is_file():
        return []
    return [json.loads(line) for line in RUNS.open(encoding="utf-8")]


def default(stage: str, seed: int, tokens: int) -> str:
    """The final model of the default run of a stage, made where it is not there any more."""
    folder = PLACE / f"ablations/{stage}_{seed}_{tokens}"
    if not (folder / "final").is_dir():
        one(stage, "", seed, tokens)
    return str(folder / "final")


def one(stage: str, change: str, seed: int, tokens: int) -> float:
    """The figure of one run, on one thread."""
    name = f"{stage}_{seed}_{tokens}" + "".join(f"_{word}" for word in change.split())
    folder = PLACE / "ablations" / name
    shutil.rmtree(folder, ignore_errors=True)
    words = [f"configs/tiny_{stage}.yaml", f"out_dir={folder}", f"max_tokens={tokens}",
             f"seed={seed}", "device=cpu", "precision=fp32", "save_every_steps=0",
             *change.split()]  # fmt: skip
    if stage in BEFORE:
        words.append(f"init_from={default(BEFORE[stage], seed, tokens)}")
    done = subprocess.run([sys.executable, SCRIPTS[stage], *words], cwd=ROOT, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode:
        sys.exit(f"{SCRIPTS[stage]} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    value = [row for row in read_metrics(folder) if FIGURE[stage] in row][-1][FIGURE[stage]]
    if change:
        shutil.rmtree(folder)
    return value


if __name__ == "__main__":
    main()

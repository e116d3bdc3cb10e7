"""Ablations of the tiny recipes: one change at a time.

    python -m bench.ablations [--tokens 400000] [--seeds 3] [--within 0.03] [pretrain sft dpo]

Every run executes the stage script on the sample data for --tokens tokens. Each change is applied
to the baseline. The baseline is the current recipe, except that any setting changed because of an
earlier ablation is reset to its old value. SFT starts from the pretraining baseline with the same
seed, and DPO from the SFT baseline with the same seed. The result is the final metric on the
recipe's held-out rows: bits per byte, or the validation loss for DPO. After the first seed, changes
that are worse than the best by more than --within are dropped.

Finished runs are appended to bench/ablations.jsonl. One process runs per core. A recorded run is
not repeated unless its recipe, an earlier stage's recipe or the sample has changed. With --hours,
no run starts after that many hours.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.common import ROOT, SAMPLE, STAGES, WORK_DIR, machine, make_parser
from dpo_train import DPOConfig
from sft_train import SFTConfig
from train import PretrainConfig
from trainlib.core.settings import load_config, recipe
from trainlib.core.terminal import use_replacement_characters
from trainlib.engine.metrics import VAL_BITS_PER_BYTE, VAL_LOSS, read_metrics

TOKENS, SEEDS = 400_000, 3
RUNS = ROOT / "bench/ablations.jsonl"
CONFIGS = {"pretrain": PretrainConfig, "sft": SFTConfig, "dpo": DPOConfig}
SCRIPTS = {stage: script for script, stage in STAGES.items()}
PREVIOUS = {"sft": "pretrain", "dpo": "sft"}
METRIC = {"pretrain": VAL_BITS_PER_BYTE, "sft": VAL_BITS_PER_BYTE, "dpo": VAL_LOSS}
BASELINE = {"pretrain": "optim.momentum=0.95", "sft": "optim.decay_fraction=0.99", "dpo": ""}
CHANGES = {
    "pretrain": [
        "",  # The baseline.
        "optim.name=adamw optim.adamw_lr=3e-3 optim.embedding_lr=3e-3",
        "optim.name=adamw optim.adamw_lr=1e-3 optim.embedding_lr=8e-3",
        "optim.muon_lr=0.005",
        "optim.muon_lr=0.02",
        "optim.embedding_lr=8e-3",
        "optim.embedding_lr=32e-3",
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
    ],
}


def main() -> None:
    """Run the ablations without a recorded result, finishing each seed before starting the next."""
    use_replacement_characters()
    parser = make_parser("ablations", __doc__, CHANGES, peers=False)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--within", type=float, default=0.03, help="drop changes that are worse "
                        "than the best by more than this (bits per byte, or DPO loss)")  # fmt: skip
    parser.add_argument("--hours", type=float, default=math.inf)
    options = parser.parse_args()
    end, write_lock = time.time() + 3600 * options.hours, threading.Lock()
    failed: list[str] = []

    def measure(stage: str, change: str, seed: int) -> None:
        if time.time() > end:
            return
        try:
            value = run_once(stage, change, seed, options.tokens)
        except RuntimeError as error:
            failed.append(str(error))
            print(error, flush=True)
            return
        row = {"stage": stage, "change": change, "seed": seed, "tokens": options.tokens,
               "value": value, "key": run_key(stage, change, seed, options.tokens),
               **machine(), "threads": 1}  # fmt: skip
        with write_lock, RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{stage:9} seed {seed}  {value:.4f}  {change or 'baseline'}", flush=True)

    for seed in range(options.seeds):
        for stage in options.names or CHANGES:
            done, names, tokens = recorded_values(), CHANGES[stage], options.tokens
            if seed:
                first = {c: done.get(run_key(stage, c, 0, tokens), math.inf) for c in names}
                limit = min(first.values()) + options.within
                names = [c for c in names if not c or first[c] <= limit]
            pending = [c for c in names if run_key(stage, c, seed, tokens) not in done]
            if not pending or time.time() > end:
                continue
            if stage in PREVIOUS:  # Train it once, before several runs need it at the same time.
                baseline_model(PREVIOUS[stage], seed, tokens)
            pool = ThreadPoolExecutor(os.cpu_count())
            runs = [pool.submit(measure, stage, change, seed) for change in pending]
            try:
                for run in runs:
                    run.result()
            finally:  # Ctrl-C also reaches the running processes; start no new ones.
                pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"{len(failed)} runs failed")


def recorded_values() -> dict[str, float]:
    """Return {run key: result} for the recorded runs."""
    if not RUNS.is_file():
        return {}
    runs = map(json.loads, RUNS.open(encoding="utf-8"))
    return {run["key"]: run["value"] for run in runs}


def recorded_runs() -> list[dict[str, Any]]:
    """Return the last run of each change and seed.

    `default` marks the recipe itself, `current` a run of the present recipe and sample.
    """
    found = {}
    for run in map(json.loads, RUNS.open(encoding="utf-8")):
        stage, change, seed, tokens = (run[key] for key in ("stage", "change", "seed", "tokens"))
        if change in CHANGES[stage]:
            current = run["key"] == run_key(stage, change, seed, tokens)
            found[stage, change, seed, tokens] = {
                **run, "default": is_default(stage, change), "current": current
            }  # fmt: skip
    return list(found.values())


def is_default(stage: str, change: str) -> bool:
    """Return whether the baseline plus this change equals the recipe in configs/tiny_*.yaml."""
    file = ROOT / f"configs/tiny_{stage}.yaml"
    overrides = [*BASELINE[stage].split(), *change.split()]
    changed, default = (load_config(CONFIGS[stage], o, file) for o in (overrides, []))
    return recipe(changed) == recipe(default)


def settings(stage: str, change: str, seed: int, tokens: int) -> list[str]:
    """Return the arguments of a run that determine what the model learns."""
    sample = SAMPLE.relative_to(ROOT)
    held_out = sorted(str(p.relative_to(ROOT)) for p in (SAMPLE / "val" / stage).glob("*.jsonl"))
    return [f"configs/tiny_{stage}.yaml", f"data.files={sample / stage}.jsonl",
            f"data.val_files=[{','.join(held_out)}]", f"max_tokens={tokens}", f"seed={seed}",
            *BASELINE[stage].split(), *change.split()]  # fmt: skip


def run_key(stage: str, change: str, seed: int, tokens: int) -> str:
    """Return a hash of the run's recipe, the sample and the runs that it starts from."""
    config = load_config(CONFIGS[stage], settings(stage, change, seed, tokens), None)
    parts = [recipe(config), [path.stat().st_size for path in sorted(SAMPLE.glob("**/*.jsonl"))]]
    if stage in PREVIOUS:
        parts.append(run_key(PREVIOUS[stage], "", seed, tokens))
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def baseline_model(stage: str, seed: int, tokens: int) -> str:
    """Return the folder of a stage's baseline model; train the model if it does not exist."""
    folder = WORK_DIR / f"ablations/{run_key(stage, '', seed, tokens)}"
    if not (folder / "final").is_dir():
        run_once(stage, "", seed, tokens)
    return str(folder / "final")


def run_once(stage: str, change: str, seed: int, tokens: int) -> float:
    """Return the final metric of one single-threaded run; raise RuntimeError if the run fails."""
    folder = WORK_DIR / f"ablations/{run_key(stage, change, seed, tokens)}"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [*settings(stage, change, seed, tokens), f"out_dir={folder}", "device=cpu",
                 "precision=fp32", "save_every_steps=0", "eval_every_steps=0",
                 "keep_best=off"]  # fmt: skip
    if stage in PREVIOUS:
        arguments.append(f"init_from={baseline_model(PREVIOUS[stage], seed, tokens)}")
    done = subprocess.run([sys.executable, SCRIPTS[stage], *arguments], cwd=ROOT, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    command = f"{SCRIPTS[stage]} {' '.join(arguments)}"
    if done.returncode or not (folder / "final").is_dir():
        raise RuntimeError(f"{command} did not finish:\n{done.stderr[-2000:]}")
    value = read_metrics(folder)[-1].get(METRIC[stage])
    if value is None:
        raise RuntimeError(f"{command} ended without a finite {METRIC[stage]}")
    if change:
        shutil.rmtree(folder)
    return value


if __name__ == "__main__":
    main()

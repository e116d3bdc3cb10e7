"""The settings of the tiny recipes beside their neighbours: one changed at a time.

    python -m bench.ablations [--tokens 400000] [--seeds 3] [--within 0.03] [pretrain sft dpo]

Every run is the stage script itself, on the sample, so many tokens long. What the changes are made
to is the centre: the recipe, with the setting back where it was that a change has replaced since. A
fine-tuning run begins with the pretraining run of its seed at the centre, a preference run with the
fine-tuning run there. The figure is the one at the end over the held-out rows that the recipe
reads: bits per byte, of preferences the loss.

A setting that is worse than the best by more than --within after one seed gets no other.

Runs are appended to bench/ablations.jsonl as they end, one process a core. What is there already is
not run again while its recipe, those of the runs before it and the sample stay as they were; with
--hours no run begins later than that.
"""

from __future__ import annotations

import hashlib
import itertools
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

from bench.common import PLACE, ROOT, SAMPLE, STAGES, machine, parser_of
from dpo_train import DPOConfig
from sft_train import SFTConfig
from train import PretrainConfig
from trainlib.core.settings import load_config, recipe
from trainlib.engine.metrics import VAL_BITS_PER_BYTE, VAL_LOSS, read_metrics

TOKENS, SEEDS = 400_000, 3
RUNS = ROOT / "bench/ablations.jsonl"
CONFIGS = {"pretrain": PretrainConfig, "sft": SFTConfig, "dpo": DPOConfig}
SCRIPTS = {stage: script for script, stage in STAGES.items()}
BEFORE = {"sft": "pretrain", "dpo": "sft"}
FIGURE = {"pretrain": VAL_BITS_PER_BYTE, "sft": VAL_BITS_PER_BYTE, "dpo": VAL_LOSS}
CENTRE = {"pretrain": "optim.momentum=0.95", "sft": "optim.decay_fraction=0.99", "dpo": ""}
CHANGES = {
    "pretrain": [
        "",  # The centre.
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
    """Run what is not there yet: seed by seed, so that each setting has a figure early."""
    parser = parser_of("ablations", __doc__, CHANGES, peers=False)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--within", type=float, default=0.03, help="bits per byte, or loss")
    parser.add_argument("--hours", type=float, default=math.inf)
    options = parser.parse_args()
    end, writing = time.time() + 3600 * options.hours, threading.Lock()
    failed: list[str] = []

    def measure(stage: str, change: str, seed: int) -> None:
        if time.time() > end:
            return
        try:
            value = one(stage, change, seed, options.tokens)
        except RuntimeError as error:
            failed.append(str(error))
            print(error, flush=True)
            return
        row = {"stage": stage, "change": change, "seed": seed, "tokens": options.tokens,
               "value": value, "key": key(stage, change, seed, options.tokens),
               **machine(), "threads": 1}  # fmt: skip
        with writing, RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{stage:9} seed {seed}  {value:.4f}  {change or 'centre'}", flush=True)

    for seed in range(options.seeds):
        for stage in options.names or CHANGES:
            done, left = values(), CHANGES[stage]
            if seed:
                first = {c: done.get(key(stage, c, 0, options.tokens), math.inf) for c in left}
                limit = min(first.values()) + options.within
                left = [c for c in left if not c or first[c] <= limit]
            wanted = [c for c in left if key(stage, c, seed, options.tokens) not in done]
            if not wanted or time.time() > end:
                continue
            if stage in BEFORE:
                centre(BEFORE[stage], seed, options.tokens)  # Before several need it at once.
            pool = ThreadPoolExecutor(os.cpu_count())
            runs = [pool.submit(measure, stage, change, seed) for change in wanted]
            try:
                for run in runs:
                    run.result()
            finally:  # After Ctrl-C, which the running ones see too, nothing new begins.
                pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"{len(failed)} runs have no figure")


def values() -> dict[str, float]:
    """The figures of the runs so far, by key."""
    if not RUNS.is_file():
        return {}
    runs = map(json.loads, RUNS.open(encoding="utf-8"))
    return {run["key"]: run["value"] for run in runs}


def up_to_date(tokens: int = TOKENS, seeds: int = SEEDS) -> list[dict[str, Any]]:
    """The runs of today's recipes and sample, by key alone; `default` marks the recipe itself."""
    done, found = values(), []
    for stage, changes in CHANGES.items():
        for change, seed in itertools.product(changes, range(seeds)):
            value = done.get(key(stage, change, seed, tokens))
            if value is not None:
                found.append({"stage": stage, "change": change, "seed": seed, "tokens": tokens,
                              "value": value, "default": is_default(stage, change)})  # fmt: skip
    return found


def is_default(stage: str, change: str) -> bool:
    """Is this what configs/tiny_*.yaml says?"""
    file = ROOT / f"configs/tiny_{stage}.yaml"
    words = [*CENTRE[stage].split(), *change.split()]
    changed, default = (load_config(CONFIGS[stage], w, file) for w in (words, []))
    return recipe(changed) == recipe(default)


def settings(stage: str, change: str, seed: int, tokens: int) -> list[str]:
    """The words of a run that decide what is learned."""
    place = SAMPLE.relative_to(ROOT)
    held_out = sorted(str(p.relative_to(ROOT)) for p in (SAMPLE / "val" / stage).glob("*.jsonl"))
    return [f"configs/tiny_{stage}.yaml", f"data.files={place / stage}.jsonl",
            f"data.val_files=[{','.join(held_out)}]", f"max_tokens={tokens}", f"seed={seed}",
            *CENTRE[stage].split(), *change.split()]  # fmt: skip


def key(stage: str, change: str, seed: int, tokens: int) -> str:
    """Changes with the run's recipe, with the sample, and with what it starts from."""
    config = load_config(CONFIGS[stage], settings(stage, change, seed, tokens), None)
    parts = [recipe(config), [path.stat().st_size for path in sorted(SAMPLE.glob("**/*.jsonl"))]]
    if stage in BEFORE:
        parts.append(key(BEFORE[stage], "", seed, tokens))
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def centre(stage: str, seed: int, tokens: int) -> str:
    """The final model of a stage's run at the centre, made where it is not there any more."""
    folder = PLACE / f"ablations/{key(stage, '', seed, tokens)}"
    if not (folder / "final").is_dir():
        one(stage, "", seed, tokens)
    return str(folder / "final")


def one(stage: str, change: str, seed: int, tokens: int) -> float:
    """The figure of one run, on one thread; RuntimeError where it did not come to its end."""
    folder = PLACE / f"ablations/{key(stage, change, seed, tokens)}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [*settings(stage, change, seed, tokens), f"out_dir={folder}", "device=cpu",
             "precision=fp32", "save_every_steps=0"]  # fmt: skip
    if stage in BEFORE:
        words.append(f"init_from={centre(BEFORE[stage], seed, tokens)}")
    done = subprocess.run([sys.executable, SCRIPTS[stage], *words], cwd=ROOT, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    told = f"{SCRIPTS[stage]} {' '.join(words)}"
    if done.returncode or not (folder / "final").is_dir():
        raise RuntimeError(f"{told} did not finish:\n{done.stderr[-2000:]}")
    value = read_metrics(folder)[-1].get(FIGURE[stage])
    if value is None:
        raise RuntimeError(f"{told} ended without a finite {FIGURE[stage]}")
    if change:
        shutil.rmtree(folder)
    return value


if __name__ == "__main__":
    main()

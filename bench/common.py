"""Helpers for the benchmarks: runs of our stages and of the peers, timed steps, and records."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
WORK_DIR = ROOT / ".cache/bench/training"
SAMPLE = ROOT / "dataset/sample"
RECORDS = ROOT / "bench/records.jsonl"
PEERS = ROOT / ".venv-peers"
STAGES = {"train.py": "pretrain", "sft_train.py": "sft", "dpo_train.py": "dpo"}


def make_parser(
    program: str, doc: str | None, names: Iterable[str], peers: bool = True
) -> argparse.ArgumentParser:
    """Return the parser for a program that runs the selected `names`, or all by default."""
    names = list(names)

    def check_name(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"unknown name {name}. Choose from {', '.join(names)}")
        return name

    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", type=check_name, metavar="NAME", help="default: all")
    if peers:
        parser.add_argument("--peers", type=Path, default=PEERS, help="the peers' virtualenv")
    return parser


def run(script: str, data: Path, name: str, more: list[str], config: str = "") -> list[dict]:
    """Run a stage on the CPU in an empty folder called `name` and return its metrics."""
    out_dir = WORK_DIR / name
    shutil.rmtree(out_dir, ignore_errors=True)
    config = config or f"configs/{STAGES[script]}.yaml"
    words = [config, f"out_dir={out_dir}", f"data.files={data}", "device=cpu",
             "sequence_length=512", "save_every_steps=0", "eval_every_steps=0",
             "log_every_steps=1", "data.val_max_rows=1"]  # fmt: skip
    if script != "train.py":
        words.append(f"init_from={WORK_DIR / 'base/final'}")
    done = subprocess.run([sys.executable, script, *words, *more], cwd=ROOT, text=True,
                          capture_output=True, check=False, env=cache_environment())  # fmt: skip
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (out_dir / "stdout.txt").write_text(done.stdout + done.stderr)
    from trainlib.engine.metrics import read_metrics  # bench.peers needs only torch.

    return read_metrics(out_dir)


def seconds_to_first_metrics(words: list[str], folder: Path, env: dict[str, str]) -> float:
    """Return the seconds from the start of train.py to its first metrics; wait until it exits."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "train.py", *words, f"out_dir={folder}", "device=cpu"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    if process.wait():
        sys.exit(f"{' '.join(command[1:])} failed")
    return seconds


def cache_environment() -> dict[str, str]:
    """Return environment variables with a cache folder separate from the user's."""
    return {**os.environ, "TRAIN_LLM_CACHE_DIR": str(WORK_DIR / "cache")}


def base_model(config: str = "configs/pretrain.yaml") -> Path:
    """Return the folder of a config's model after one training step; train it only once."""
    name = "base" if config == "configs/pretrain.yaml" else f"base_{Path(config).stem}"
    if not (WORK_DIR / name / "final").is_dir():
        WORK_DIR.mkdir(parents=True, exist_ok=True)
        more = ["max_steps=1", "tokens_per_step=512"]
        run("train.py", SAMPLE / "pretrain.jsonl", name, more, config)
    return WORK_DIR / name / "final"


def run_peer(env: Path, benchmark: str, data: Path, model: Path, *more: str) -> dict[str, Any]:
    """Run a benchmark of a peer in the virtualenv `env` and return the result that it prints."""
    command = [str(env / "bin/python"), "-m", "bench.peers", benchmark, "--data", str(data),
               "--model", str(model), *more]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def allocated_peak(
    parameters: Iterable[torch.Tensor], optimizers: list[Optimizer], step: Callable[[], object]
) -> int:
    """Return the peak bytes of torch's CPU allocator in a step, including weights and moments.

    Runs the step twice, because the first one allocates the moments.
    """
    parameters = list(parameters)
    step()
    for optimizer in optimizers:
        optimizer.zero_grad()  # Gradients freed under the profiler must be allocated under it.
    moments = [v for o in optimizers for s in o.state.values() for v in s.values()]
    held = [t for t in (*parameters, *moments) if isinstance(t, torch.Tensor)]
    before = sum(t.numel() * t.element_size() for t in held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak


def measure_step(
    step: Callable[[], object], model: nn.Module, optimizer: Optimizer, tokens: int, count: int
) -> dict[str, float]:
    """Return the "peak" in bytes and, if count > 0, the median tokens "per_second"."""
    found: dict[str, float] = {"peak": allocated_peak(model.parameters(), [optimizer], step)}
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    if seconds:
        found["per_second"] = tokens / statistics.median(seconds)
    return found


def record(benchmark: str, values: list[float], aim: str, **more: object) -> None:
    """Print the median and range of a benchmark's repeats, and append them to records.jsonl."""
    ordered = sorted(values)
    middle = statistics.median(ordered) if ordered else None
    spread = f"{middle:.3g} ({ordered[0]:.3g} to {ordered[-1]:.3g})" if ordered else "not reached"
    print(f"{benchmark:<24} {spread}   target: {aim}", flush=True)
    row = {"figure": benchmark, "median": middle, "values": values, "aim": aim,
           **more, **machine()}  # fmt: skip
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def machine() -> dict[str, object]:
    """Return the date, commit, torch version and CPU for a record."""
    from trainlib.core.hardware import cpu_name, instructions  # bench.peers needs only torch.

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              check=False)  # fmt: skip
        return done.stdout.strip()

    commit = git("describe", "--always")
    if git("status", "--porcelain", "--", ".", ":!bench/*.jsonl", ":!docs"):
        commit += "-dirty"
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "torch": torch.__version__,
        "cpu": f"{cpu_name().rpartition(' x ')[0]}, {instructions()}",
        "threads": torch.get_num_threads(),
    }  # fmt: skip

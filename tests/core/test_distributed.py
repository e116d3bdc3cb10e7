"""Tests that data-parallel training matches one rank, and that only the main rank writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainlib.core.hardware import cpu_has_bf16

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "configs/tiny_pretrain.yaml", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.head_dim=16", "tokens_per_step=512", "sequence_length=64", "micro_batch_size=2",
    "log_every_steps=1", "max_steps=6", "eval_every_steps=3", "save_every_steps=2", "device=cpu",
    "precision=fp32", "keep_best=on", "data.files=a.jsonl", "data.val_fraction=0.1",
    # With a low-rank gradient, Muon in bf16 amplifies differences in the last digit.
    "optim.name=adamw",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a folder with configs and data: so few rows that some steps are not full."""
    path = tmp_path_factory.mktemp("ranks")
    (path / "configs").symlink_to(ROOT / "configs")
    rows = [
        {"text": f"第{i}条 the text of row {i} goes on and on. " * (i % 9 + 1)} for i in range(99)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (path / "a.jsonl").write_text(text, encoding="utf-8")
    return path


def start(workdir, *settings, prefix=(sys.executable,), script="train.py"):
    env = {**os.environ, "TRAIN_LLM_CACHE_DIR": str(workdir / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*prefix, str(ROOT / script), *SETTINGS, *settings], cwd=workdir, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process, code=0):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    return out


def metrics(folder):
    clock = ("train/tokens_per_second", "train/data_wait", "train/mfu")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


@pytest.fixture(scope="module")
def single(workdir):
    finish(start(workdir, "out_dir=single"))
    return workdir / "single"


def assert_same_metrics(folder, single):
    """Assert equal metrics at the same steps, except for rounding due to summation order."""
    ours, theirs = metrics(folder), metrics(single)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name, value in yours.items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        if "train/tokens" in yours:
            assert mine["train/tokens"] == yours["train/tokens"]


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_several_ranks_match_one_rank(ranks, workdir, single):
    out = finish(start(workdir, f"out_dir=of{ranks}", f"ranks={ranks}"))
    assert f"starting {ranks} ranks" in out
    assert out.count("finished 6 steps") == 1  # Only one rank prints.
    assert_same_metrics(workdir / f"of{ranks}", single)
    ours, theirs = (json.loads((f / "best/validation.json").read_text())
                    for f in (workdir / f"of{ranks}", single))  # fmt: skip
    assert ours["step"] == theirs["step"] == 6 and len(ours["batches"]) > ranks
    for mine, yours in zip(ours["batches"], theirs["batches"], strict=True):
        assert mine == pytest.approx(yours, rel=1e-4)
    weights, expected = (load_file(f / "final/model.safetensors") for f in
                         (workdir / f"of{ranks}", single))  # fmt: skip
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-4, name


@pytest.mark.slow
def test_ranks_with_muon_match_one_rank_within_bf16_rounding(workdir):
    for name, ranks in (("muon1", 1), ("muon2", 2)):
        finish(start(workdir, f"out_dir={name}", f"ranks={ranks}", "optim.name=muon"))
    if not cpu_has_bf16():
        assert_same_metrics(workdir / "muon2", workdir / "muon1")
    for mine, yours in zip(metrics(workdir / "muon2"), metrics(workdir / "muon1"), strict=True):
        for name in mine.keys() & {"train/loss", "val/loss"}:
            assert mine[name] == pytest.approx(yours[name], rel=1e-3), name


@pytest.mark.slow
def test_torchrun_works_and_a_run_resumes_with_another_world_size(workdir, single):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    process = start(workdir, "out_dir=torchrun", "max_steps=6", prefix=[*torchrun, "2"])
    finish(process)
    assert_same_metrics(workdir / "torchrun", single)
    # Run the first steps with one process, and the remaining ones with three.
    (workdir / "half").mkdir()
    finish(start(workdir, "out_dir=half", f"resume={single}/step_000004", "ranks=3"))
    theirs = [row for row in metrics(single) if row["step"] > 4]
    for mine, yours in zip(metrics(workdir / "half"), theirs, strict=True):
        assert mine["step"] == yours["step"]
        if "train/loss" in yours:
            assert mine["train/loss"] == pytest.approx(yours["train/loss"], abs=1e-5)


SCRIPT = """
from pathlib import Path

import torch
from trainlib.core.distributed import init_distributed, destroy_distributed

def threads():
    return [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]

distributed = init_distributed("cpu")
import torch._dynamo  # As torch's optimizers do.
distributed.all_reduce([torch.ones(3)])
print("joined", *threads())
destroy_distributed()
print("left", *threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_destroying_the_process_group_ends_its_threads(workdir):
    # A thread that frees a tensor while Python shuts down can abort a finished run.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
           "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env={**env, "RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            joined, left = finish(process).split("left")
            assert "gloo" in joined and "gloo" not in left
    finally:
        for process in processes:
            process.kill()


def wait_for_step(folder, step, process):
    log = folder / "train.log"
    while process.poll() is None and not (log.exists() and f"step {step} " in log.read_text()):
        time.sleep(0.02)


def ranks_of(process):
    """Return the process ids of the ranks, which are the children of a launcher."""
    return [
        int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def listening_addresses(pids):
    """Return the local addresses, in hexadecimal, at which processes accept connections."""
    links = [os.readlink(file) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir()]
    rows = [row.split() for name in ("tcp", "tcp6") for row in
            Path(f"/proc/{pids[0]}/net/{name}").read_text().splitlines()[1:]]  # fmt: skip
    return {
        row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links
    }


@pytest.mark.parametrize("receiver", ["launcher", 1, pytest.param(0, marks=pytest.mark.slow)])
def test_sigterm_to_one_rank_or_the_launcher_saves_a_checkpoint(receiver, workdir):
    folder = workdir / f"stopped_{receiver}"
    settings = ["max_steps=5000", "save_every_steps=0", "eval_every_steps=0"]
    process = start(workdir, f"out_dir={folder.name}", "ranks=2", *settings)
    wait_for_step(folder, 2, process)
    assert listening_addresses(ranks_of(process)) == {"0100007F"}  # 127.0.0.1
    os.kill(process.pid if receiver == "launcher" else ranks_of(process)[receiver], signal.SIGTERM)
    out = finish(process)
    assert "saving a checkpoint" in out
    assert (folder / "latest").exists() and not (folder / "final").exists()


FAILING = """
import os, signal, sys, time
sys.path[:0] = [{root!r}]
import trainlib.core.threads
import torch
import train
from trainlib.core.errors import UserError
from trainlib.engine import loop
from trainlib.engine.launch import launch

STEP, LOSSES = loop.optimizer_step, []

def failing(training, *arguments):
    LOSSES.append(0)
    if len(LOSSES) == 3 and training.run.distributed.rank == {rank}:
        open("begin", "w").write(str(time.time()))
        {failure}
    return STEP(training, *arguments)

loop.optimizer_step = failing
launch(train.PretrainConfig, "pretrain", train.prepare, train.main)
"""
FAILURES = {
    "user": ("raise UserError('row 7 is bad')", "error{}: row 7 is bad"),
    "memory": ("raise torch.OutOfMemoryError('CUDA out of memory')",
               "error{}: out of memory on the card (CUDA out of memory)"),
    "bug": ("raise RuntimeError('kaboom')", "error on rank {}: RuntimeError: kaboom"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "error: rank {} was ended by SIGKILL"),
}  # fmt: skip


QUICK = {("user", 1), ("bug", 0)}


@pytest.mark.parametrize(
    ("failure", "rank"),
    [
        pytest.param(failure, rank, marks=[] if (failure, rank) in QUICK else pytest.mark.slow)
        for failure in FAILURES
        for rank in (0, 1)
    ],
)
def test_a_failing_rank_ends_all_with_its_message(failure, rank, workdir):
    code, message = FAILURES[failure]
    script = workdir / f"{failure}{rank}.py"
    script.write_text(FAILING.format(root=str(ROOT), rank=rank, failure=code))
    process = start(workdir, f"out_dir={failure}{rank}", "ranks=2", "max_steps=90", script=script)
    out = finish(process, code=128 + signal.SIGKILL if failure == "killed" else 1)
    assert time.time() - float((workdir / "begin").read_text()) < 10
    name = str(rank) if failure in ("bug", "killed") else f" on rank {rank}" * rank
    assert [line.startswith(message.format(name)) for line in out.splitlines()].count(True) == 1
    assert out.count("Traceback") == (failure == "bug")
    assert f"rank {1 - rank} ends because another rank has ended" in out


@pytest.mark.slow
def test_a_failing_rank_ends_all_ranks_of_torchrun(workdir):
    script = workdir / "torchrun.py"
    failure = FAILURES["user"][0]
    script.write_text(FAILING.format(root=str(ROOT), rank=1, failure=failure))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = finish(start(workdir, "out_dir=of_torchrun", script=script, prefix=torchrun), code=1)
    assert out.count("error on rank 1: row 7 is bad") == 1
    assert time.time() - float((workdir / "begin").read_text()) < 15


WAITING = """
import os, signal, sys, time
from pathlib import Path
from trainlib.core import distributed
from trainlib.engine.control import Clock, Control
context = distributed.init_distributed("cpu")
with Control(Path("."), Clock(), context):
    print("ready", flush=True)
    if context.rank == 0:
        import ctypes
        while True:
            ctypes.CDLL(None).sleep(60)  # As in a collective, the main thread raises nothing.
    time.sleep(60)
"""


def test_sigterm_ends_a_rank_that_waits_for_a_lost_one(workdir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
           "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    first, second = [
        subprocess.Popen([sys.executable, "-c", WAITING], env={**env, "RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert first.stdout and first.stdout.readline() == "ready\n"
        second.kill()
        second.wait()
        first.send_signal(signal.SIGTERM)
        assert "a rank is lost" in finish(first, code=128 + signal.SIGTERM)
    finally:
        first.kill()
        second.kill()


def test_a_user_error_is_printed_once_and_ends_all_ranks(workdir, single):
    out = finish(start(workdir, "out_dir=single", "ranks=2", "seed=7"), code=1)
    assert out.count("holds a finished run") == 1 and "Traceback" not in out
    out = finish(start(workdir, "out_dir=single", "ranks=2"))
    assert out.count("already finished: single/final") == 1 and "Traceback" not in out


@pytest.mark.slow
def test_if_one_rank_dies_the_other_ranks_exit(workdir):
    process = start(workdir, "out_dir=dies", "ranks=2", "max_steps=100000")
    log = workdir / "dies" / "train.log"
    while process.poll() is None and not (log.exists() and "step 1 " in log.read_text()):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    finish(process, code=128 + signal.SIGKILL)

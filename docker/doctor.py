"""Checks that `./build.sh doctor` runs in the container, from importing torch to ten steps.

Prints one line per check, "OK name: detail" or "NO name: reason". Exits with 1 if any check fails.
The output contains none of the user's paths or file names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # Seconds per check.


def torch_version() -> str:
    """Return the torch and CUDA versions and the number of visible GPUs."""
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if os.environ.get("GPU_PROFILE", "cpu") != "cpu" and not cards:
        raise RuntimeError(
            f"the profile is {os.environ['GPU_PROFILE']}, but torch {torch.__version__} sees no "
            "GPU. On the host, run nvidia-smi, then docker compose up -d --force-recreate train"
        )
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {cards} GPUs"


def matmul() -> str:
    """Multiply two matrices on the training device; an unsupported GPU fails only here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.eye(256, device=device)
    if not torch.equal(a @ a, a):
        raise RuntimeError("the product of two identity matrices is not the identity matrix")
    capability = torch.cuda.get_device_capability() if device == "cuda" else ""
    return f"on {device} {capability}".strip()


def shared_memory() -> str:
    """Check the size of /dev/shm: at Docker's default of 64 MB, data workers crash."""
    size = shutil.disk_usage("/dev/shm").total // 1_000_000
    if size < 500:
        raise RuntimeError(f"{size} MB. Set SHM_SIZE=2gb in .env; run docker compose up -d train")
    return f"{size} MB"


def two_ranks() -> str:
    """Run an all-reduce across two processes, on two GPUs if available."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "ranks.py"
        script.write_text(
            "import torch, torch.distributed as d, os\n"
            "cuda = torch.cuda.device_count() > 1\n"
            "rank = int(os.environ['RANK'])\n"
            "device = torch.device('cuda', rank) if cuda else torch.device('cpu')\n"
            "if cuda: torch.cuda.set_device(device)\n"
            "d.init_process_group('nccl' if cuda else 'gloo')\n"
            "x = torch.full((1000,), rank + 1.0, device=device)\n"
            "d.all_reduce(x)\n"
            "assert x.eq(3).all(), x[:3]\n"
            "if rank == 0: print('over', d.get_backend())\n"
            "d.destroy_process_group()\n",
            encoding="utf-8",
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return run([*torchrun, "--nproc-per-node=2", str(script)]).strip().splitlines()[-1]


def disk() -> str:
    """Check that runs/ is writable and has enough free space."""
    with tempfile.NamedTemporaryFile(dir=ROOT / "runs"):
        free = shutil.disk_usage(ROOT / "runs").free // 1_000_000_000
    if free < 5:
        raise RuntimeError(f"{free} GB free in runs/; a checkpoint of the 26.9M model takes 0.4 GB")
    return f"{free} GB free in runs/, which is writable"


def data() -> str:
    """Count the data files that training would find in dataset/."""
    files = [path for path in (ROOT / "dataset").iterdir() if path.is_file()]
    files = [path for path in files if path.name != "README.md"]
    sample = (ROOT / "dataset/sample/pretrain.jsonl").is_file()
    broken = [path for path in (ROOT / "dataset").iterdir() if not path.exists()]
    if broken:
        raise RuntimeError(f"{len(broken)} links in dataset/ point outside the container. Set "
                           "DATASET_DIR in .env to the folder that contains the files")  # fmt: skip
    return f"{len(files)} files in dataset/, " + ("with" if sample else "without") + " the sample"


def ten_steps() -> str:
    """Run train.py for ten optimizer steps on generated text."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        rows = [{"text": f"{i} and {i} make {2 * i}. " * 20} for i in range(200)]
        text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        started = time.perf_counter()
        run(
            [
                sys.executable, "train.py", "configs/tiny_pretrain.yaml", "max_steps=10",
                "tokens_per_step=1024",
                "data.val_max_rows=2", f"data.files={text}", f"out_dir={folder}/run",
            ],
        )  # fmt: skip
        seconds = time.perf_counter() - started
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if not (Path(folder) / "run/final/model.safetensors").is_file():
            raise RuntimeError("train.py exited with 0 but wrote no model")
    return f"done in {seconds:.0f} s, {len(lines)} lines in metrics.jsonl"


def run(command: list[str]) -> str:
    """Return a command's standard output; raise RuntimeError with its last lines on failure."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"timed out after {LIMIT} s. Check the load with top") from None
    if done.returncode:
        last_lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RuntimeError(f"exit code {done.returncode}: " + " / ".join(last_lines))
    return done.stdout


CHECKS: dict[str, Callable[[], str]] = {
    "torch": torch_version,
    "one matmul": matmul,
    "shared memory": shared_memory,
    "two ranks": two_ranks,
    "disk": disk,
    "data": data,
    "ten steps": ten_steps,
}


def main() -> int:
    """Run every check, even after one fails."""
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"OK {name}: {check()}", flush=True)
        except Exception as error:  # noqa: BLE001  # Report any failure.
            failed += 1
            print(f"NO {name}: {str(error) or type(error).__name__}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

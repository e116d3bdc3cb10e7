"""Tests that a run uses an edited formula after a few-line patch to a single file.

Each variant is a copy of the project with a patch to model.py or train.py only. No kernel for the
old formula may be used, and the log must list the kernels that are not used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "window": ("model.py", {
        "    return same_document & (query_positions[:, :, None] >= key_positions[:, None, :])":
        "    distance = query_positions[:, :, None] - key_positions[:, None, :]\n"
        "    return same_document & (distance >= 0) & (distance < 64)",
    }, ["blocks"]),
    "layer norm": ("model.py", {
        "    mean_square = wide.square().mean(-1, keepdim=True)\n"
        "    return (wide * torch.rsqrt(mean_square + eps) * weight).to(dtype)":
        "    return F.layer_norm(wide, weight.shape, weight, None, eps).to(dtype)",
    }, ["rms_norm"]),
    "activation": ("model.py", {"F.silu(gate) * up": "F.relu(gate).square() * up"}, ["swiglu"]),
    "clamp": ("model.py", {"F.silu(gate) * up": "F.silu(gate.clamp(max=7)) * up"}, ["swiglu"]),
    "alibi": ("model.py", {
        "    return torch.where(seen, zero, -torch.inf)[:, None]":
        "    distance = query_positions[:, :, None] - key_positions[:, None, :]\n"
        "    return torch.where(seen, -0.1 * distance.to(dtype), -torch.inf)[:, None]",
    }, ["blocks"]),
    "z-loss": ("train.py", {
        "    loss_sum = cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels))":
        "    logits = model(**batch.inputs)\n"
        "    loss_sum = cross_entropy_sum(logits, batch.selected(batch.labels))\n"
        "    loss_sum = loss_sum + 1e-4 * logits.float().logsumexp(-1).square().sum()",
    }, []),
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip

PROBE = f"""
import torch
import model
from model import ModelConfig, Ops, Transformer
from GENERATE import KVCache

sizes = ModelConfig(vocab_size=99, **{SIZES})
torch.manual_seed(0)
decoder = Transformer(sizes)
for name, parameter in decoder.named_parameters():
    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
ids = torch.randint(0, 99, (1, 100))
positions, documents = torch.arange(100)[None], torch.zeros(1, 100, dtype=torch.int64)

def training(ids):
    return decoder(ids, positions, documents)[0, -1]

def generation(ids, prefill):
    cache = KVCache(sizes, 1, 100, torch.device("cpu"))
    pieces = [slice(0, prefill), *(slice(i, i + 1) for i in range(prefill, 100))]
    return [decoder(ids[:, piece], positions[:, piece], cache=cache) for piece in pieces][-1][0, -1]
"""
KERNELS = """
from KERNELS import choose_kernels
from DISTRIBUTED import DistributedContext
from DEVICE import Hardware

hardware = Hardware(torch.device("cpu"), "fp32", "blocks", False, 1)
choose_kernels(hardware, sizes, 100, DistributedContext())
"""
LOGITS = """
with torch.no_grad():
    found = (training(ids), generation(ids, 100), generation(ids, 30))
print([logits.tolist() for logits in found])
"""
WINDOW = """
for forward in (training, lambda ids: generation(ids, 100), lambda ids: generation(ids, 30)):
    for distance, changes in ((64, False), (65, False), (63, True)):
        other = ids.clone()
        other[0, 99 - distance] = (ids[0, 99 - distance] + 1) % 99
        with torch.no_grad():
            assert torch.equal(forward(ids), forward(other)) != changes, distance
"""
MODULES = {
    "GENERATE": "trainlib.models.generate", "KERNELS": "trainlib.engine.kernels",
    "DISTRIBUTED": "trainlib.core.distributed", "DEVICE": "trainlib.engine.device",
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """Return the name of a patch, and the folder of a patched copy of the project."""
    name = request.param
    folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
    for path in (*ROOT.glob("*.py"), *(ROOT / f for f in ("configs", "kernels", "tokenizer"))):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    shutil.copytree(ROOT / "trainlib", folder / "trainlib")
    file, replacements, _ = VARIANTS[name]
    text = (folder / file).read_text()
    for old, new in replacements.items():
        assert text.count(old) == 1 and len((old + new).splitlines()) <= 10
        text = text.replace(old, new)
    (folder / file).write_text(text)
    rows = ({"text": f"Row {i} says {i * i}. " * 9} for i in range(60))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name, folder


def run(folder: Path, *args: str, cache: Path | None = None) -> str:
    cache = cache or folder / "cache"
    env = {**os.environ, "TRAIN_LLM_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True,
                            text=True)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def probe(folder: Path, code: str) -> str:
    for placeholder, module in MODULES.items():
        code = code.replace(placeholder, module)
    return run(folder, "-c", code)


def test_training_works_and_the_log_lists_unused_kernels(variant):
    name, folder = variant
    sizes = [f"model.{key}={value}" for key, value in SIZES.items()]
    args = ["configs/tiny_pretrain.yaml", *sizes, "max_steps=3", "log_every_steps=1",
            "tokens_per_step=512", "sequence_length=128", "precision=fp32", "device=cpu",
            "data.val_max_rows=4"]  # fmt: skip
    out = run(folder, "train.py", *args, "out_dir=run", "data.files=a.jsonl")
    losses = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]
    assert len([row for row in losses if "val/loss" in row]) == 2
    (line,) = [line for line in out.splitlines() if line.startswith("kernels: ")]
    used, _, unused = line.removeprefix("kernels: ").partition("; not used: ")
    expected = VARIANTS[name][2]
    assert set(used.split(", ")) == {"blocks", "rms_norm", "rotate", "swiglu"} - set(expected)
    assert [part.split(" (")[0] for part in unused.split("), ") if part] == expected
    assert unused.count("was model.py edited?") == len(expected)
    if name == "z-loss":  # Initial logits are small, so the term is 1e-4 * ln(6400)^2.
        plain_args = (f"out_dir={folder}/plain", f"data.files={folder}/a.jsonl")
        run(ROOT, "train.py", *args, *plain_args, cache=folder / "cache")
        first = [
            json.loads((folder / f"{out_dir}/metrics.jsonl").read_text().splitlines()[1])
            for out_dir in ("run", "plain")
        ]
        patched, plain = (row["train/loss"] for row in first)
        assert patched - plain == pytest.approx(1e-4 * math.log(6400) ** 2, rel=0.2)


def test_the_patched_formula_is_computed(variant):
    """With the chosen kernels, logits equal those of the patched formula, not the old one."""
    name, folder = variant
    if name == "z-loss":
        pytest.skip("changes no formula in model.py")
    chosen, plain = (json.loads(probe(folder, PROBE + setup + LOGITS)) for setup in (KERNELS, ""))
    unpatched = json.loads(probe(ROOT, PROBE + LOGITS))
    for logits in chosen:  # In training, prefill and decoding.
        assert logits == pytest.approx(plain[0], abs=1e-3)
    if name != "clamp":  # No gate value in this model reaches the clamp.
        assert plain[0] != pytest.approx(unpatched[0], abs=1e-2)


def test_a_window_applies_in_training_prefill_and_decoding(variant):
    name, folder = variant
    if name != "window":
        pytest.skip("no window")
    probe(folder, PROBE + KERNELS + WINDOW)

"""How speed and memory of a step grow with the row, the batch and the model, beside transformers.

    python -m bench.scaling [NAME ...] [--peers .venv-peers] [--steps 3] [--pairs 3]

    length   the 2.8M model on rows of 128 to 2,048 tokens, 4,096 tokens in all
    batch    the 2.8M model on 1 to 32 rows of 256 tokens
    model    models of 2.8M to 101M on 2 rows of 512 tokens

A step is forward, backward and AdamW in fp32 with the same matmul setting on both sides and nothing
compiled; ours and the peer's take turns, and of each point the pair with the median ratio counts.
The peer's rows are under a causal kernel, ours under the one that is chosen on this CPU for rows
of several documents.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.common import ROOT, SAMPLE, base, parser_of, peer, record
from bench.step import chosen

TINY = "configs/tiny_pretrain.yaml"
MODELS = [TINY, "configs/pretrain_6m.yaml", "configs/pretrain.yaml", "configs/pretrain_100m.yaml"]
AXES = {
    # axis: for each point its name, config, rows, length
    "length": [(str(n), TINY, 4096 // n, n) for n in (128, 256, 512, 1024, 2048)],
    "batch": [(str(n), TINY, n, 256) for n in (1, 2, 4, 8, 16, 32)],
    "model": [("", config, 2, 512) for config in MODELS],
}


def main() -> None:
    """Measure the axes asked for."""
    parser = parser_of("scaling", __doc__, AXES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    for axis in options.names or AXES:
        points = []
        for name, config, rows, length in AXES[axis]:
            model, steps = base(config), options.steps
            words = ["--rows", str(rows), "--length", str(length), "--steps", str(steps),
                     "--matmul", chosen().matmul]  # fmt: skip
            pairs = []
            for _ in range(options.pairs):
                theirs = peer(options.peers, "step", SAMPLE / "pretrain.jsonl", model, *words)
                pairs.append((own(model, words), theirs))
            pairs.sort(key=lambda pair: pair[0]["per_second"] / pair[1]["per_second"])
            mine, theirs = pairs[len(pairs) // 2]
            points.append({"x": name or millions(model), "ours": mine, "theirs": theirs,
                           "pairs": pairs})  # fmt: skip
            print(f"{axis} {points[-1]['x']}: {mine['per_second']:,.0f} against "
                  f"{theirs['per_second']:,.0f} tokens/s, {mine['peak'] / 1e6:,.0f} against "
                  f"{theirs['peak'] / 1e6:,.0f} MB", flush=True)  # fmt: skip
        ratios = [p["ours"]["per_second"] / p["theirs"]["per_second"] for p in points]
        attention = chosen().attention
        record(f"scaling_{axis}", ratios, ">= 1.15", points=points, attention=attention)


def own(model: Path, words: list[str]) -> dict[str, float]:
    """Our step, in a process of its own as the peer's is."""
    command = [sys.executable, "-m", "bench.step", "--model", str(model), *words]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def millions(folder: Path) -> str:
    """The size of a model, from its weights on disk."""
    return f"{(folder / 'model.safetensors').stat().st_size / 4e6:.1f}M"


if __name__ == "__main__":
    main()

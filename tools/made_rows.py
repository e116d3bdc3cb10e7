"""Synthetic rows for each stage, to test training quickly without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_data(folder: Path) -> None:
    """Write one JSONL file of counting sentences for each stage."""
    sentences = [f"第{i}条 {i} and {i} make {2 * i}. " * (1 + i * 7 % 23) for i in range(2000)]

    def chat(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows: dict[str, list[dict[str, Any]]] = {
        "pretrain": [{"text": text} for text in sentences],
        "sft": [{"conversations": chat(f"{i}?", f"It is {i}.")} for i in range(400)],
        "dpo": [
            {"chosen": chat(f"{i}?", f"It is {i}."), "rejected": chat(f"{i}?", f"No, {i + 1}!")}
            for i in range(400)
        ],
    }
    for name, values in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

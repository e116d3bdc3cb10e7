"""Report of the validation rows that a trained model predicts worst, by file and line.

These rows are hard, or broken in a way that no parser detects, such as a table without its columns,
another language or an answer to another question. Training rows come from the same files, so they
have the same defects.
"""

from __future__ import annotations

import json
import logging
import math

from torch import Tensor, nn

from tokenizer.bpe import Tokenizer
from trainlib.core.files import write_atomically
from trainlib.data.packing import Origin, PackedDataset
from trainlib.engine.device import evaluation_mode
from trainlib.engine.run import Run
from trainlib.evaluation.bits_per_byte import sequence_totals

log = logging.getLogger(__name__)

NUM_ROWS = 50
MIN_BYTES = 32
"""Shorter rows are skipped: "OK." costs many bits per byte in any model."""
SHOWN_IDS = 64
"""Number of ids per row whose text is written, so that the row can be identified."""


def write_worst_rows(
    run: Run, model: nn.Module, tokenizer: Tokenizer, val: dict[str, PackedDataset]
) -> None:
    """Write the NUM_ROWS rows with the most bits per byte to worst_rows.jsonl in the run folder.

    Skips rows with fewer than MIN_BYTES supervised bytes. If data.val_max_rows limits validation,
    the unread rest of a long document does not count.
    """
    found: list[tuple[float, Origin, dict[str, float]]] = []
    with evaluation_mode(model):
        for packed in val.values():
            bits, num_bytes, _ = sequence_totals(run.hardware, model, packed, tokenizer)
            for sequence_id, origin in packed.origins().items():
                i = sequence_id - packed.first_sequence_id
                if (size := num_bytes[i]) >= MIN_BYTES:
                    ratio = bits[i] / size
                    found.append((-ratio, origin, {"bits_per_byte": ratio, "bytes": int(size)}))
    _write(run, tokenizer, found)


def write_worst_pairs(
    run: Run, tokenizer: Tokenizer, val: dict[str, PackedDataset], rewards: Tensor
) -> None:
    """Write the NUM_ROWS pairs with the lowest reward margin to worst_rows.jsonl in the run folder.

    `rewards` is indexed by sequence id. Skips pairs with a NaN reward, because they were not read.
    """
    values = rewards.cpu().numpy()
    found = []
    for packed in val.values():
        for sequence_id, origin in packed.origins().items():
            margin = float(values[sequence_id] - values[sequence_id + 1])
            if math.isfinite(margin):
                found.append((margin, origin, {"reward_margin": margin}))
    _write(run, tokenizer, found)


def _write(
    run: Run, tokenizer: Tokenizer, found: list[tuple[float, Origin, dict[str, float]]]
) -> None:
    """Write the rows with the smallest first value, worst first."""
    lines = []
    for _, origin, figures in sorted(found, key=lambda row: row[0])[:NUM_ROWS]:
        cache, record = origin
        per_record = (len(cache.offsets) - 1) // len(cache.lines)  # A pair is two sequences.
        first, last = (int(cache.offsets[record * per_record + i]) for i in (0, 1))
        row = {
            "path": str(cache.path),
            "line": origin.line,
            **{name: round(value, 4) for name, value in figures.items()},
            "source": origin.source,
            "text": tokenizer.show(cache.ids[first : min(last, first + SHOWN_IDS)].tolist()),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = run.folder / "worst_rows.jsonl"
    write_atomically(path, "".join(lines))
    if lines:
        worst = json.loads(lines[0])
        log.info("worst rows: %s (the worst is line %d in %s)", path, worst["line"], worst["path"])

"""Report of the validation rows that a trained model predicts worst, by file and line.

These rows are hard, or broken in a way that no parser detects, such as a table without its columns,
another language or an answer to another question. Training rows have the same defects.
"""

import json
import logging
import math

import numpy as np
import torch
from torch import nn

from tokenizer.bpe import Tokenizer
from trainlib.core.files import write_atomically
from trainlib.data.packing import Origin, PackedDataset
from trainlib.engine.device import Hardware, evaluation_mode
from trainlib.engine.losses import batch_log_probs
from trainlib.engine.run import Run
from trainlib.engine.validation import micro_batches

log = logging.getLogger(__name__)

NUM_ROWS = 50
MIN_BYTES = 32  # Shorter rows are skipped: "OK." costs many bits per byte in any model.
SHOWN_IDS = 64  # Number of ids per row whose text is written, so that the row can be identified.


def write_worst_rows(run: Run, model: nn.Module, tokenizer: Tokenizer,
                     val: dict[str, PackedDataset]) -> None:  # fmt: skip
    """Write the NUM_ROWS rows with the most bits per byte to worst_rows.jsonl in the run folder.

    Skips rows with fewer than MIN_BYTES supervised bytes, and text beyond data.val_max_rows.
    """
    found = []
    with evaluation_mode(model):
        for packed in val.values():
            bits, num_bytes, _ = sequence_totals(run.hardware, model, packed, tokenizer)
            for sequence_id, origin in packed.origins().items():
                i = sequence_id - packed.first_sequence_id
                if (size := num_bytes[i]) >= MIN_BYTES:
                    found.append((origin, {"bits_per_byte": bits[i] / size, "bytes": int(size)}))
    found.sort(key=lambda row: -row[1]["bits_per_byte"])
    _write(run, tokenizer, found[:NUM_ROWS])


def write_worst_pairs(run: Run, tokenizer: Tokenizer, val: dict[str, PackedDataset],
                      rewards: np.ndarray) -> None:  # fmt: skip
    """Write the NUM_ROWS pairs with the lowest margin of `rewards`, which is by sequence id."""
    origins = {id_: origin for packed in val.values() for id_, origin in packed.origins().items()}
    margins = {id_: float(rewards[id_] - rewards[id_ + 1]) for id_ in origins}
    # Rewards of pairs that were not read are NaN.
    worst = sorted((id_ for id_ in origins if math.isfinite(margins[id_])), key=margins.__getitem__)
    _write(run, tokenizer, [(origins[i], {"reward_margin": margins[i]}) for i in worst[:NUM_ROWS]])


def _write(run: Run, tokenizer: Tokenizer, rows: list[tuple[Origin, dict[str, float]]]) -> None:
    lines = []
    for (cache, record), figures in rows:
        per_record = (len(cache.offsets) - 1) // len(cache.lines)  # A pair is two sequences.
        first, last = (int(cache.offsets[record * per_record + i]) for i in (0, 1))
        text = tokenizer.show(cache.ids[first : min(last, first + SHOWN_IDS)].tolist())
        row = {"path": str(cache.path), "line": int(cache.lines[record]),
               **{name: round(value, 4) for name, value in figures.items()},
               "source": cache.source(record), "text": text}  # fmt: skip
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = run.folder / "worst_rows.jsonl"
    write_atomically(path, "".join(lines))
    if lines:
        worst = json.loads(lines[0])
        log.info("worst rows: %s (the worst is line %d in %s)", path, worst["line"], worst["path"])


def sequence_totals(hardware: Hardware, model: nn.Module, packed: PackedDataset,
                    tokenizer: Tokenizer) -> np.ndarray:  # fmt: skip
    """Return bits, bytes and labels of each sequence, (3, num_sequences); 0 if it is not read."""
    id_bytes = torch.tensor([len(text) for text in tokenizer.id_to_bytes], dtype=torch.float64)
    totals = torch.zeros(3, packed.num_sequences, dtype=torch.float64)
    for batch in micro_batches(packed, hardware):
        with hardware.autocast():
            log_probs = batch_log_probs(model, batch.to(hardware.device))
        # A long document has several pieces, possibly in one batch.
        sequences, under_loss = batch.sequence_ids - packed.first_sequence_id, batch.labels >= 0
        labels, owners = batch.labels[under_loss], sequences[batch.document_ids[under_loss]]
        totals[0].index_add_(0, sequences, -log_probs.cpu().double() / math.log(2))
        totals[1].index_add_(0, owners, id_bytes[labels])
        totals[2].index_add_(0, owners, torch.ones(len(labels), dtype=torch.float64))
    return totals.numpy()

"""Bits, bytes and labels of each sequence under a model."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from tokenizer.bpe import Tokenizer
from trainlib.data.packing import PackedDataset
from trainlib.engine.device import Hardware
from trainlib.engine.losses import batch_log_probs
from trainlib.engine.validation import micro_batches


def sequence_totals(
    hardware: Hardware, model: nn.Module, packed: PackedDataset, tokenizer: Tokenizer
) -> np.ndarray:
    """Return the bits, bytes and number of labels of each sequence, (3, num_sequences).

    Zeros for sequences that validation does not read. Call it in evaluation_mode.
    """
    id_bytes = torch.tensor([len(text) for text in tokenizer.id_to_bytes])
    totals = np.zeros((3, packed.num_sequences))
    for batch in micro_batches(packed, hardware):
        with hardware.autocast():
            log_probs = batch_log_probs(model, batch.to(hardware.device))
        under_loss = batch.labels >= 0
        labels, documents = batch.labels[under_loss], batch.document_ids[under_loss]
        sizes = torch.zeros(2, len(batch.sequence_ids), dtype=torch.int64)
        sizes.index_add_(1, documents, torch.stack([id_bytes[labels], torch.ones_like(labels)]))
        # A long document has several pieces, possibly in one batch.
        index = batch.sequence_ids.numpy() - packed.first_sequence_id
        values = (-log_probs.float().cpu().numpy() / math.log(2), *sizes.numpy())
        for total, value in zip(totals, values, strict=True):
            np.add.at(total, index, value)
    return totals

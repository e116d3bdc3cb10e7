"""One thread and exact fp32 for every test."""

from __future__ import annotations

import pytest
import torch

from tokenizer import Tokenizer, default_folder

torch.set_num_threads(1)
torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The project's own tokenizer."""
    return Tokenizer(default_folder())

"""The three stages, for tests that run each of them."""

from __future__ import annotations

import dpo_train
import sft_train
import train

STAGES = {
    "pretrain": ("train.py", train, train.PretrainConfig),
    "sft": ("sft_train.py", sft_train, sft_train.SFTConfig),
    "dpo": ("dpo_train.py", dpo_train, dpo_train.DPOConfig),
}
"""Script, module and settings of each stage."""

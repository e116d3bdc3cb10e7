"""Helpers for the GPU tests: a run's hardware settings, and a trainer that takes single steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from dataset import DataConfig, load_datasets
from model import ModelConfig, Transformer
from tokenizer.bpe import Tokenizer, default_folder
from tools.made_rows import write_data
from train import loss_fn
from trainlib.core.distributed import SINGLE_PROCESS
from trainlib.core.hardware import Hardware, choose_hardware, find_facts
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepLoader
from trainlib.data.packing import PackedDataset
from trainlib.engine.device import use_hardware
from trainlib.engine.flops import Sizes
from trainlib.engine.optim import OptimConfig, build_optimizers
from trainlib.engine.plan import step_memory, total
from trainlib.engine.step import optimizer_step
from trainlib.engine.training import warm_up

DEVICE = os.environ.get("CUDA_TESTS_DEVICE", "cuda")
LENGTH = 512
TINY = ModelConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip


class Machine(NamedTuple):
    """Hardware settings, data, model dimensions and working folder for all checks."""

    choice: Hardware
    data: PackedDataset
    sizes: ModelConfig
    folder: Path

    def hardware(self, rows: int = 0) -> Hardware:
        """Apply the hardware settings, with micro-batches of `rows` rows if given."""
        choice = replace(self.choice, micro_batch_size=rows) if rows else self.choice
        return use_hardware(choice)

    def batch(self, rows: int) -> Batch:
        """Return the first rows of the data, on the device."""
        first_rows = [row for row, _ in self.data.rows(DataPosition())][:rows]
        return self.data.collate(first_rows, rows).to(self.choice.device)


def open_machine(folder: Path) -> Machine:
    """Choose the hardware settings, and write data for each stage to the folder."""
    write_data(folder)
    # With "auto", a CPU would first be measured to choose between fp32 and bf16.
    precision = "fp32" if DEVICE == "cpu" else "auto"
    choice = choose_hardware(find_facts(), device=DEVICE, precision=precision)
    config = DataConfig(files=(str(folder / "pretrain.jsonl"),))
    data = load_datasets(config, "pretrain", Tokenizer(default_folder()), LENGTH, 0).train
    return Machine(choice, data, ModelConfig() if DEVICE == "cuda" else TINY, folder)


class Trainer:
    """Takes steps as the training loop does, with a new model and one micro-batch per step."""

    def __init__(self, machine: Machine, rows: int, compile_: bool = True) -> None:
        torch.manual_seed(0)
        hardware = machine.hardware(rows)
        hardware = replace(hardware, compile=hardware.compile and compile_)
        self.model = Transformer(machine.sizes).to(hardware.device)
        self.optimizers = build_optimizers(self.model, OptimConfig())
        self.sizes = (machine.data, rows * LENGTH, rows)
        pin = hardware.device.type == "cuda"
        self.loader: StepLoader[Batch] = StepLoader(*self.sizes, pin=pin)
        self.tokens = 0
        config = SimpleNamespace(optim=OptimConfig(), compile="auto", kernels="auto")
        run: Any = SimpleNamespace(hardware=hardware, distributed=SINGLE_PROCESS, config=config)
        self.hardware = run.hardware = warm_up(run, self.model, self.loader, None, 0.0)
        self.training: Any = SimpleNamespace(
            run=run, model=self.model, optimizers=self.optimizers, loss_fn=loss_fn
        )

    def step(self) -> None:
        """Take one optimizer step."""
        batch = next(self.loader)
        optimizer_step(self.training, batch, 1.0)
        self.tokens += batch.num_tokens

    def predicted_peak(self, machine: Machine, rows: int) -> float:
        """Return the peak memory in bytes that --plan predicts for a step."""
        sizes = Sizes(self.model.config)
        return total(step_memory(sizes, "muon", machine.choice, LENGTH, 1, rows))

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        getattr(torch, self.hardware.device.type).synchronize()

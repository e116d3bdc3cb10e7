"""Stage 2, supervised fine-tuning: the assistant's words alone, by trainlib.engine.loop.fit.

python sft_train.py [config.yaml] [init_from=runs/pretrain/final] [section.key=value ...]
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dataset import DataConfig, load_datasets
from trainlib.data.batch import Batch
from trainlib.data.packing import Datasets
from trainlib.engine.flops import flops_per_token
from trainlib.engine.kernels import warm_up
from trainlib.engine.launch import launch, prepare_model, start_run, tell_next
from trainlib.engine.loop import fit, make_loader, make_schedule
from trainlib.engine.losses import cross_entropy_sum
from trainlib.engine.optim import OptimConfig, build_optimizers
from trainlib.engine.run import HOW, RunConfig
from trainlib.engine.step import Metrics
from trainlib.engine.validation import validate
from trainlib.evaluation.baselines import with_yardsticks
from trainlib.evaluation.worst_rows import write_worst_rows
from trainlib.models.generate import Sampling, sample_answers
from trainlib.models.hf_folder import load_model, load_tokenizer, model_files

log = logging.getLogger(__name__)

QUESTIONS = ("你是谁？", "Name three colors.")  # Answered at every evaluation, for the eye.


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """All settings of fine-tuning; model sizes and tokenizer come with init_from."""

    out_dir: str = field(default="runs/sft", metadata=HOW)
    """Folder of the run."""
    init_from: str = "runs/pretrain/final"
    """Model folder that training starts from."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation files."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and schedule."""


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, tuple[Any, Any]]]:
    """Sum of -log p over the assistant's words and ends of turn; bytes are the answers'."""
    loss_sum = cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels))
    return loss_sum, {"bits_per_byte": (loss_sum / math.log(2), batch.num_bytes)}


def prepare(config: SFTConfig) -> Datasets:
    """The conversations, rendered and tokenized once into the cache."""
    tokenizer = load_tokenizer(config.init_from, config.sequence_length)
    loaded = load_datasets(config.data, "sft", tokenizer, config.sequence_length, config.seed)
    return with_yardsticks(loaded, tokenizer)


def main(config: SFTConfig, datasets: Datasets) -> None:
    """Teach a pretrained model to answer."""
    tokenizer, model = load_tokenizer(config.init_from), load_model(config.init_from)
    run = start_run(config, "sft", datasets.data_key, config.sequence_length)

    prepare_model(run, model, model.model.layers, model_files(model.config, tokenizer))
    run.yardsticks = datasets.yardsticks
    run.flops_per_token = flops_per_token(model, datasets.train.mean_attended())
    optimizers = build_optimizers(model, config.optim)
    loader = make_loader(run, datasets.train)
    schedule = make_schedule(config, loader)
    warm_up(run, model, loader, schedule.num_steps)

    def evaluate() -> tuple[Metrics, list[str]]:
        sampling = Sampling(temperature=0, max_new_tokens=64)
        samples = sample_answers(model, tokenizer, QUESTIONS, sampling)
        return validate(run, model, loss_fn, datasets.val), samples

    def finish() -> None:
        write_worst_rows(run, model, tokenizer, datasets.val)

    if fit(run, model, optimizers, schedule, loss_fn, loader, evaluate, finish):
        tell_next(run, "dpo")
        log.info("or talk to it: python chat.py --model %s/final", run.folder)


if __name__ == "__main__":
    launch(SFTConfig, "sft", prepare, main)

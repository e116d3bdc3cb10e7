"""Stage 2, supervised fine-tuning on assistant messages only, with trainlib.engine.loop.fit.

python sft_train.py [config.yaml] [init_from=runs/pretrain/final] [section.key=value ...]
"""

import trainlib.core.threads  # noqa: F401  # Before torch.

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from dataset import DataConfig, load_datasets
from tokenizer.bpe import Tokenizer
from trainlib.data.batch import Batch
from trainlib.data.packing import Datasets
from trainlib.engine.launch import launch, start_run
from trainlib.engine.losses import cross_entropy_sum
from trainlib.engine.run import EXECUTION_ONLY, RunConfig
from trainlib.engine.training import Metrics, MetricSums, Training
from trainlib.engine.validation import validate
from trainlib.evaluation.baselines import with_baselines
from trainlib.evaluation.card import final_files
from trainlib.evaluation.skills import SkillTest
from trainlib.evaluation.worst_rows import write_worst_rows
from trainlib.models.generate import QUESTIONS, show_samples
from trainlib.models.hf_folder import load_model, load_tokenizer, model_files


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Settings for fine-tuning. The model dimensions and the tokenizer come from init_from."""

    out_dir: str = field(default="runs/sft", metadata=EXECUTION_ONLY)
    """Folder of the run."""
    init_from: str = "runs/pretrain/final"
    """Model folder to start training from."""
    keep_best: bool = field(default=True, metadata=EXECUTION_ONLY)
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation files."""


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, MetricSums]:
    """Return the sum of -log p over assistant messages, including their end-of-turn tokens."""
    loss_sum = cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels))
    return loss_sum, {"bits_per_byte": (loss_sum / math.log(2), batch.num_bytes)}


def prepare(config: SFTConfig) -> tuple[SFTConfig, Tokenizer, Datasets]:
    """Return the settings, the tokenizer and the conversations; tokenize files not yet cached."""
    tokenizer = load_tokenizer(config.init_from, config.sequence_length)
    loaded = load_datasets(config.data, "sft", tokenizer, config.sequence_length, config.seed)
    return config, tokenizer, with_baselines(loaded, tokenizer)


def main(config: SFTConfig, tokenizer: Tokenizer, datasets: Datasets) -> Training:
    """Set up the fine-tuning of a pretrained model on conversations."""
    model = load_model(config.init_from)
    run = start_run(config, "sft", datasets.data_key, config.sequence_length)
    skills = SkillTest(tokenizer, datasets.val, config.data.read_options)

    def evaluate(training: Training) -> tuple[Metrics, list[str]]:
        samples = show_samples(model, tokenizer, QUESTIONS, 64)
        return {**validate(training, loss_fn), **skills.metrics(training)}, samples

    def finish(training: Training, step: int) -> dict[str, bytes]:
        write_worst_rows(training.run, model, tokenizer, datasets.val)
        skills.report(training)
        return final_files(training, tokenizer, step)

    files = model_files(model.config, tokenizer)
    return Training.create(run, model, datasets, files, loss_fn, evaluate, finish)


if __name__ == "__main__":
    launch(SFTConfig, "sft", prepare, main)

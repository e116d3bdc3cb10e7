"""Stage 3, direct preference optimization on answer pairs, with trainlib.engine.loop.fit.

    python dpo_train.py [config.yaml] [init_from=runs/sft/final] [section.key=value ...]

Source: Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
"""

import trainlib.core.threads  # noqa: F401  # Before torch.

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import DataConfig, load_datasets
from tokenizer.bpe import Tokenizer
from trainlib.data.batch import Batch
from trainlib.data.packing import Datasets
from trainlib.engine.launch import launch, start_run
from trainlib.engine.losses import batch_log_probs
from trainlib.engine.run import EXECUTION_ONLY, RunConfig
from trainlib.engine.training import Metrics, MetricSums, Training
from trainlib.engine.validation import validate
from trainlib.evaluation.card import final_files
from trainlib.evaluation.preferences import (
    TIE_NATS,
    reference_log_probs,
    validation_log_probs,
    write_report,
)
from trainlib.evaluation.skills import SkillTest
from trainlib.evaluation.worst_rows import write_worst_pairs
from trainlib.models.generate import QUESTIONS, show_samples
from trainlib.models.hf_folder import load_model, load_tokenizer, model_files


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    """Settings for preference optimization. Model and tokenizer come from init_from."""

    out_dir: str = field(default="runs/dpo", metadata=EXECUTION_ONLY)
    """Folder of the run."""
    init_from: str = "runs/sft/final"
    """Model folder to start training from; also the reference model."""
    beta: float = field(default=0.1, metadata={"above": 0})
    """Reward per nat of the log-probability ratio to the reference; larger = stay closer to it."""
    chosen_penalty: float = field(default=0.0, metadata={"at_least": 0})
    """Factor on how much the reward of a chosen answer is below 0; 0 = plain DPO."""
    keep_best: bool = field(default=True, metadata=EXECUTION_ONLY)
    report_max_rows: int = field(default=0, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Maximum number of rows of each validation set in the report at the end; 0 = all."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation files."""


def dpo_loss(
    log_probs: Tensor, reference: Tensor, beta: float, penalty: float = 0.0
) -> tuple[Tensor, MetricSums]:
    """Return the sum of -log sigmoid(margin) over the pairs (arXiv:2305.18290, equation 7).

    A penalty keeps the chosen answers likely: its product with -min(reward, 0) lowers the margin
    (DPOP, arXiv:2402.13228, equation 3).
    Shapes: log_probs and reference (2 P,), in which chosen and rejected answers alternate.
    """
    rewards = beta * (log_probs - reference)
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    margin = chosen - rejected
    correct = torch.where(margin.abs() <= beta * TIE_NATS, 0.5, (margin > 0).float())
    means = log_probs.detach().view(-1, 2).sum(0)
    return -F.logsigmoid(margin - penalty * F.relu(-chosen)).sum(), {
        "reward_accuracy": (correct.sum(), len(margin)),
        "reward_margin": (margin.sum(), len(margin)),
        "chosen_log_probs": (means[0], len(margin)),
        "rejected_log_probs": (means[1], len(margin)),
    }


def prepare(config: DPOConfig) -> tuple[DPOConfig, Tokenizer, Datasets]:
    """Return the settings, the tokenizer and the pairs; tokenize files not yet cached."""
    tokenizer = load_tokenizer(config.init_from, config.sequence_length)
    datasets = load_datasets(config.data, "dpo", tokenizer, config.sequence_length, config.seed)
    return config, tokenizer, datasets


def main(config: DPOConfig, tokenizer: Tokenizer, datasets: Datasets) -> Training:
    """Set up the preference optimization of a fine-tuned model."""
    model = load_model(config.init_from)
    run = start_run(config, "dpo", datasets.data_key, datasets.train.row_length)
    skills = SkillTest(tokenizer, datasets.val, config.data.read_options)
    reported = datasets.with_val_rows(config.report_max_rows)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, MetricSums]:
        return dpo_loss(batch_log_probs(model, batch), reference[batch.sequence_ids],
                        config.beta, config.chosen_penalty)  # fmt: skip

    def evaluate(training: Training) -> tuple[Metrics, list[str]]:
        samples = show_samples(model, tokenizer, QUESTIONS, 64)
        return {**validate(training, loss_fn), **skills.metrics(training)}, samples

    def finish(training: Training, step: int) -> dict[str, bytes]:
        before = reference.cpu().numpy()
        after = validation_log_probs(training.run.hardware, model, reported)
        write_report(run, reported, before, after)
        write_worst_pairs(run, tokenizer, reported.val, config.beta * (after - before))
        skills.report(training)
        return final_files(training, tokenizer, step)

    files = model_files(model.config, tokenizer)
    training = Training.create(run, model, datasets, files, loss_fn, evaluate, finish)
    # Log-probabilities by sequence id. The functions above use them when fit calls them.
    reference = reference_log_probs(training, reported)
    return training


if __name__ == "__main__":
    launch(DPOConfig, "dpo", prepare, main)

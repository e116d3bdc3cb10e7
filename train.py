"""Stage 1, pretraining: next-token prediction on packed documents, with trainlib.engine.loop.fit.

python train.py [config.yaml] [section.key=value ...]
"""

import trainlib.core.threads  # noqa: F401  # Before torch.

import logging
import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from dataset import DataConfig, load_datasets
from model import ModelConfig, Transformer, count_parameters
from tokenizer.adopt import adopt
from tokenizer.bpe import Tokenizer, default_folder
from trainlib.core.errors import as_user_errors
from trainlib.core.settings import provenance, with_value
from trainlib.data.batch import Batch
from trainlib.data.packing import Datasets
from trainlib.engine.launch import launch, start_run
from trainlib.engine.losses import cross_entropy_sum
from trainlib.engine.run import EXECUTION_ONLY, RunConfig
from trainlib.engine.training import Metrics, MetricSums, Training
from trainlib.engine.validation import validate
from trainlib.evaluation.baselines import with_baselines
from trainlib.evaluation.card import final_files
from trainlib.evaluation.worst_rows import write_worst_rows
from trainlib.models.generate import show_samples
from trainlib.models.hf_folder import (
    adopt_model_config,
    check_vocabulary,
    load_model,
    load_tokenizer,
    model_files,
    too_long,
)

log = logging.getLogger(__name__)

PROMPTS = ("第一条", "话说", "To be,")  # Completed at every evaluation, to show samples.


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings for pretraining."""

    out_dir: str = field(default="runs/pretrain", metadata=EXECUTION_ONLY)
    """Folder of the run."""
    tokenizer: str = ""
    """Folder with a tokenizer.json (byte-level BPE, or BPE with byte fallback); empty = the
    project's own. Missing special tokens of the chat format are added after the last id."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model dimensions; vocab_size is taken from the tokenizer if not set."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation files."""

    def validation_errors(self) -> list[str]:
        """Also reject tokenizer with init_from, and rows longer than max_position_embeddings."""
        errors, longest = super().validation_errors(), self.model.max_position_embeddings
        if self.tokenizer and self.init_from:
            both = f"tokenizer={self.tokenizer} and init_from={self.init_from}"
            errors.append(f"{both}: the model in init_from has its own tokenizer; keep one")
        if not self.init_from:
            errors += too_long(self.sequence_length, longest, "model.max_position_embeddings")
        return errors


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, MetricSums]:
    """Return the sum of -log p over the labels, and the bits per byte as a metric."""
    loss_sum = cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels))
    return loss_sum, {"bits_per_byte": (loss_sum / math.log(2), batch.num_bytes)}


def open_tokenizer(config: PretrainConfig) -> tuple[PretrainConfig, Tokenizer]:
    """Return the settings, with dimensions from init_from or the tokenizer, and the tokenizer.

    Raises UserError if settings, model and tokenizer do not match.
    """
    if config.init_from:
        return adopt_model_config(config), load_tokenizer(config.init_from, config.sequence_length)
    with as_user_errors():
        tokenizer = adopt(config.tokenizer or default_folder())
    if provenance(config)["model.vocab_size"] == "default":
        size = tokenizer.vocab_size
        return with_value(config, "model.vocab_size", size, "from the tokenizer"), tokenizer
    fix = f"set model.vocab_size={tokenizer.vocab_size} or omit it"
    check_vocabulary(config.model, tokenizer, "model.vocab_size", fix)
    return config, tokenizer


def prepare(config: PretrainConfig) -> tuple[PretrainConfig, Tokenizer, Datasets]:
    """Return the resolved settings, the tokenizer and the data; tokenize files not yet cached."""
    config, tokenizer = open_tokenizer(config)
    loaded = load_datasets(config.data, "pretrain", tokenizer, config.sequence_length, config.seed)
    return config, tokenizer, with_baselines(loaded, tokenizer)


def main(config: PretrainConfig, tokenizer: Tokenizer, datasets: Datasets) -> Training:
    """Set up the training of a new model, or of the model in init_from."""
    initial = load_model(config.init_from) if config.init_from else None
    run = start_run(config, "pretrain", datasets.data_key, config.sequence_length)
    model = initial or Transformer(config.model)
    log.info(f"{count_parameters(model):,} parameters, vocabulary size {tokenizer.vocab_size:,}")

    def evaluate(training: Training) -> tuple[Metrics, list[str]]:
        samples = show_samples(model, tokenizer, PROMPTS, 32, chat=False)
        return validate(training, loss_fn), samples

    def finish(training: Training, step: int) -> dict[str, bytes]:
        write_worst_rows(training.run, model, tokenizer, datasets.val)
        return final_files(training, tokenizer, step)

    files = model_files(model.config, tokenizer)
    return Training.create(run, model, datasets, files, loss_fn, evaluate, finish)


if __name__ == "__main__":
    launch(PretrainConfig, "pretrain", prepare, main)

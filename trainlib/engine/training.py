"""All that the loop needs of a stage, built in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.optim import Optimizer

from model import Transformer
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepLoader
from trainlib.data.packing import Datasets
from trainlib.engine.checkpoint import Checkpoints
from trainlib.engine.device import Hardware, compile_layers, evaluation_mode
from trainlib.engine.flops import flops_per_token
from trainlib.engine.kernels import choose_kernels
from trainlib.engine.optim import Schedule, build_optimizers
from trainlib.engine.run import Run, RunConfig

MetricSums = dict[str, tuple[Tensor | float, float]]
"""(sum, count) of each metric, by name."""
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, MetricSums]]
Metrics = dict[str, float]
LONG_RUN = 2e14
"""Floating-point operations from which a run on a CPU is compiled: a quarter of an hour of two
cores. Compiling takes half a minute; bf16 steps become 1.1 times as fast, fp32 steps no faster."""


@dataclass(frozen=True)
class Training:
    """A run, what it trains, on what data and how; `fit` carries it out."""

    run: Run
    model: Transformer
    optimizers: list[Optimizer]
    schedule: Schedule
    loader: StepLoader
    datasets: Datasets
    checkpoints: Checkpoints
    flops_per_token: float
    loss_fn: LossFunction
    evaluate: Callable[[Training], tuple[Metrics, list[str]]]
    """Returns the metrics of validation, and texts that the model wrote."""
    finish: Callable[[Training], None]
    """Writes the reports on the trained model, on the main process, before final/."""

    @classmethod
    def create(
        cls,
        run: Run,
        model: Transformer,
        datasets: Datasets,
        files: dict[str, str],
        loss_fn: LossFunction,
        evaluate: Callable[[Training], tuple[Metrics, list[str]]],
        finish: Callable[[Training], None],
    ) -> Training:
        """Move the model to its device, build optimizers, loader and schedule, and warm up.

        `files` make a checkpoint a model folder: file name to content. Nothing wraps the model.
        """
        c, hardware = run.config, run.hardware
        model.to(hardware.device)
        run.distributed.broadcast(list(model.parameters()))
        pin = hardware.device.type == "cuda"
        loader = StepLoader(datasets.train, c.tokens_per_step, hardware.micro_batch_size, c.epochs,
                            run.distributed, pin)  # fmt: skip
        schedule = make_schedule(c, loader)
        flops = flops_per_token(model, datasets.train.mean_context_length())
        run = replace(run, hardware=warm_up(run, model, loader, schedule.num_steps, flops))
        checkpoints = Checkpoints(run.folder, c.keep_checkpoints, run.distributed.is_main, files)
        optimizers = build_optimizers(model, c.optim)
        return cls(run, model, optimizers, schedule, loader, datasets, checkpoints, flops, loss_fn,
                   evaluate, finish)  # fmt: skip


def make_schedule(config: RunConfig, loader: StepLoader) -> Schedule:
    """Return the length of a run, from whichever setting gives it, with its learning rate.

    A length in time has no number of steps: such a schedule is open until the time is up.
    """
    num_steps: int | None = config.max_steps or loader.num_steps()
    if config.max_tokens:
        num_steps = -(-config.max_tokens // (loader.rows_per_step * loader.dataset.row_length))
    return Schedule(config.optim, None if config.max_hours else num_steps)


def warm_up(
    run: Run, model: Transformer, loader: StepLoader, num_steps: int | None, flops: float
) -> Hardware:
    """Choose the kernels, compile the layers if the run wants that; return the hardware in use.

    Called before the model is first used, so that all results of a run are computed in one way.
    `num_steps` is the length of the run if it is known, `flops` is per token. Weights and random
    state stay.
    """
    h, c, row_length = run.hardware, run.config, loader.dataset.row_length
    if c.compile == "auto" and num_steps and (h.device.type, h.precision) == ("cpu", "bf16"):
        positions = num_steps * loader.rows_per_step * row_length
        h = replace(h, compile=positions * flops >= LONG_RUN)
    h = choose_kernels(h, model.config, row_length, run.distributed, c.kernels == "plain")
    if not h.compile:
        return h
    batch = next(loader).micro_batches[0].to(h.device)
    loader.seek(DataPosition())

    def try_out() -> None:
        with h.autocast():
            logits = model(**batch.inputs)
        logits.float().square().sum().backward()
        model.zero_grad(set_to_none=True)
        with evaluation_mode(model), h.autocast():  # A program of its own.
            model(**batch.inputs)

    return compile_layers(h, model.model.layers, try_out, required=c.compile == "on")

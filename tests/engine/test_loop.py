"""Tests for exact resume, evaluation mode, and the gradient of an optimizer step."""

from __future__ import annotations

import copy
import json
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from trainlib.core.distributed import DistributedContext
from trainlib.core.errors import UserError
from trainlib.core.files import lock_folder, refuse_if_locked, release_folders
from trainlib.core.hardware import Hardware
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch, StepLoader
from trainlib.engine.checkpoint import Checkpoints
from trainlib.engine.control import Clock
from trainlib.engine.device import evaluation_mode
from trainlib.engine.metrics import MetricsLog, truncate_metrics
from trainlib.engine.optim import OptimConfig, Schedule, build_optimizers
from trainlib.engine.progress import Display, validation_tables
from trainlib.engine.step import optimizer_step
from trainlib.engine.train_state import TrainState, restore, save

SCHEDULE = Schedule(OptimConfig(), 10)


class Loader:
    """A loader that records its position."""

    position = DataPosition()

    def seek(self, position):
        self.position = position


def new_training(folder, model, optimizers, resume_from=None, precision="fp32", **fields):
    hardware = SimpleNamespace(precision=precision, kernels=(), device=torch.device("cpu"))
    run = SimpleNamespace(
        folder=folder,
        resume_from=resume_from,
        chose_checkpoint=lambda: False,
        distributed=DistributedContext(),
        clock=Clock(),
        hardware=hardware,
        config=SimpleNamespace(log_every_steps=1, resume="auto"),
        stage="pretrain",
    )
    return SimpleNamespace(
        run=run, model=model, optimizers=optimizers, schedule=SCHEDULE, loader=Loader(),
        checkpoints=Checkpoints(folder, 2), flops_per_token=1.0, **fields,
    )  # fmt: skip


def new_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.LayerNorm(8))
    return model, build_optimizers(model, OptimConfig())


def steps(model, optimizers, count):
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()  # This depends on the RNG state.
        for optimizer in optimizers:
            optimizer.step()


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    model, optimizers = new_model()
    steps(model, optimizers, 2)
    training = new_training(tmp_path, model, optimizers)
    save(training, TrainState(step=2, tokens=9, position=DataPosition(1, 5)))
    training.checkpoints.join()
    steps(model, optimizers, 3)
    expected = torch.rand(3)
    torch.manual_seed(77)
    other, other_optimizers = new_model()
    resumed = new_training(tmp_path, other, other_optimizers, tmp_path / "step_000002")
    state = restore(resumed)
    assert (state.step, state.tokens, state.position) == (2, 9, DataPosition(1, 5))
    assert resumed.loader.position == DataPosition(1, 5)
    steps(other, other_optimizers, 3)
    assert torch.equal(torch.rand(3), expected)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_each_passed_baseline_is_logged_only_once_despite_a_resume(tmp_path, caplog):
    model, optimizers = new_model()
    caplog.set_level(logging.INFO)

    baselines = {"uniform": 4.0, "unigram": 3.0, "bigram": 2.0}

    def evaluations(resume_from, figures):
        datasets = SimpleNamespace(baselines=baselines)
        training = new_training(tmp_path, model, optimizers, resume_from, datasets=datasets)
        state = restore(training)
        metrics = MetricsLog(tmp_path, state.step if resume_from else None, baselines)
        display = Display(training, state, metrics)
        for state.step, value in figures:
            display.show_validation({"val/bits_per_byte": value}, ["To be,\nor not\n\n"])
        save(training, state)
        training.checkpoints.join()
        metrics.close()

    evaluations(None, [(0, 4.1), (1, 2.9), (2, 3.1)])
    evaluations(tmp_path / "step_000002", [(3, 2.8), (4, 1.9), (5, 1.8)])
    logged = [
        "below the unigram baseline at step 1: 2.900 against 3.000 bits per byte",
        "resuming from step 2",
        "below the bigram baseline at step 4: 1.900 against 2.000 bits per byte",
    ]
    lines = (tmp_path / "train.log").read_text().splitlines()
    table = ["validation at step 0  bits_per_byte", "all                          4.1000"]
    assert lines[1:3] == table
    others = ("validation", "all", "sample ")
    assert [line for line in lines if not line.startswith(others)] == logged
    shown = caplog.messages
    assert [line for line in shown if line.startswith("below")] == [logged[0], logged[2]]
    assert shown[:3] == ["sample: To be,\\nor not", *table]
    assert json.loads((tmp_path / "baselines.json").read_text()) == baselines


def test_a_checkpoint_from_another_model_is_rejected(tmp_path):
    model, optimizers = new_model()
    training = new_training(tmp_path, model, optimizers)
    save(training, TrainState(step=1))
    training.checkpoints.join()
    other = torch.nn.Sequential(torch.nn.Linear(8, 9, bias=False), torch.nn.LayerNorm(9))
    others = build_optimizers(other, OptimConfig())
    with pytest.raises(UserError):
        restore(new_training(tmp_path, other, others, tmp_path / "step_000001"))


@pytest.mark.parametrize("place", ["weights", "optimizer"])
def test_values_that_are_not_finite_are_not_saved(tmp_path, place):
    model, optimizers = new_model()
    steps(model, optimizers, 1)
    training = new_training(tmp_path, model, optimizers)
    training.run.config.optim = OptimConfig(muon_lr=0.02, embedding_lr=1e-3)
    save(training, TrainState(step=1, bad_steps=3))
    training.checkpoints.join()
    tensor = (
        model[0].weight.data
        if place == "weights"
        else optimizers[1].state[model[1].bias]["exp_avg"]
    )
    tensor.view(-1)[-1] = torch.nan if place == "weights" else torch.inf
    name = "0.weight" if place == "weights" else "1/1.bias/exp_avg"
    with pytest.raises(UserError, match=f"step 2: {name} has values that are not finite") as error:
        save(training, TrainState(step=2))
    assert f"resume={tmp_path}/step_000001 optim.muon_lr=0.01 optim.embedding_lr=0.0005" in str(
        error.value
    )
    assert {path.name for path in tmp_path.iterdir()} == {"step_000001", "latest"}
    state = json.loads((tmp_path / "step_000001/train_state.json").read_text())
    assert state["train"]["bad_steps"] == 0


def test_a_damaged_step_folder_is_replaced_by_the_one_before_it(tmp_path, caplog):
    model, optimizers = new_model()
    training = new_training(tmp_path, model, optimizers)
    for step in (1, 2):
        steps(model, optimizers, 1)
        save(training, TrainState(step=step))
    training.checkpoints.join()
    newest = tmp_path / "step_000002"
    (newest / "model.safetensors").write_bytes(b"")
    for resume in ("auto", str(newest)):
        resumed = new_training(tmp_path, *new_model(), newest)
        resumed.run.chose_checkpoint = lambda chosen=resume: chosen != "auto"
        if resume == "auto":
            assert restore(resumed).step == 1
            assert (tmp_path / "latest").read_text() == "step_000001"
            assert (
                f"{newest} is damaged" in caplog.text
                and f"Trying {newest.with_name('step_000001')}" in caplog.text
            )
        else:  # The user's choice is not replaced.
            with pytest.raises(UserError, match="step_000002 is damaged"):
                restore(resumed)


def test_a_record_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    log = MetricsLog(tmp_path, None, {})
    full = open("/dev/full", "w")  # noqa: SIM115
    log._metrics, metrics = full, log._metrics
    for step in range(3):
        log.write_step(step, {"train/loss": 1.0}, f"step {step}")
    metrics.close()
    log.close()
    assert caplog.text.count("could not be written") == 1
    assert (tmp_path / "train.log").read_text() == "step 0\nstep 1\nstep 2\n"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    model, optimizers = new_model()
    training = new_training(tmp_path, model, optimizers)
    for step in (1, 2, 3):
        save(training, TrainState(step=step))
    training.checkpoints.join()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", "step_000003"]
    assert (tmp_path / "latest").read_text().strip() == "step_000003"
    assert not list(tmp_path.glob(".writing*"))


def test_evaluation_mode_restores_mode_and_rng_state():
    model, _ = new_model()
    state = torch.get_rng_state()
    with evaluation_mode(model):
        torch.rand(5)
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_metrics_are_truncated_to_the_saved_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_resuming_with_another_precision_resets_the_loss_scale(tmp_path):
    model, optimizers = new_model()
    training = new_training(tmp_path, model, optimizers)
    save(training, TrainState(step=1))
    save(training, TrainState(step=2, loss_scale=4.0))
    training.checkpoints.join()
    for step, precision, expected in ((1, "fp16", 2.0**16), (2, "bf16", 1.0), (2, "fp16", 4.0)):
        step_folder = tmp_path / f"step_{step:06d}"
        resumed = new_training(tmp_path, model, optimizers, step_folder, precision)
        assert restore(resumed).loss_scale == expected


def test_the_fp16_loss_scale_never_falls_to_1():
    state, batch = TrainState(loss_scale=4.0), StepBatch([], 1, 1, DataPosition())
    for _ in range(3):
        state.advance(batch, False)
    assert state.loss_scale == 2.0 and state.bad_steps == 2


class TwoRows:
    """A data set with two rows."""

    row_length = 1

    def rows(self, position):
        for row in range(position.row, 2):
            yield row, DataPosition(position.epoch + 1) if row else DataPosition(position.epoch, 1)

    def num_rows(self, epoch=0):
        return 2

    def collate(self, rows, num_rows):
        return rows

    def count(self, rows):
        return len(rows), len(rows)


def test_a_position_past_the_data_continues_with_the_next_epoch():
    loader = StepLoader(TwoRows(), tokens_per_step=2, micro_batch_size=2)
    loader.seek(DataPosition(0, 7))
    assert next(loader).after == DataPosition(2, 0)


def test_micro_batches_are_pinned_in_the_thread_that_creates_them():
    class Pinnable(list):
        def pin_memory(self):
            return threading.current_thread().name, list(self)

    class Rows(TwoRows):
        def collate(self, rows, num_rows):
            return Pinnable(rows)

    loader = StepLoader(Rows(), tokens_per_step=2, micro_batch_size=1, pin=True)
    names = [name for _ in range(2) for name, _ in next(loader).micro_batches]
    assert names[:2] == ["MainThread"] * 2 and all(n.startswith("loader") for n in names[2:])
    assert type(next(StepLoader(Rows(), 2, 2)).micro_batches[0]) is Pinnable


def test_only_one_process_trains_in_a_folder(tmp_path):
    lock_folder(tmp_path)
    with pytest.raises(UserError, match="another process is training in this folder"):
        refuse_if_locked(tmp_path)
    release_folders()
    refuse_if_locked(tmp_path)


@pytest.mark.parametrize("clip", [0.5, 0.0, 1e6])
@pytest.mark.parametrize("loss_scale", [1.0, 256.0])
def test_a_step_uses_the_clipped_gradient_of_the_mean_loss(clip, loss_scale):
    """Fails if gradients are clipped per parameter, or if grad_clip=0 clips."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), 100 * torch.randn(4, 3)
    plain = copy.deepcopy(model)
    (plain(x).sum() / 4).backward()
    norm = float(torch.cat([p.grad.flatten() for p in plain.parameters()]).norm())
    hardware = Hardware(torch.device("cpu"), "fp32", "masked", False, 3)
    config = SimpleNamespace(optim=OptimConfig(grad_clip=clip))
    run = SimpleNamespace(hardware=hardware, distributed=DistributedContext(), config=config)
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in model.parameters()]
    batch = StepBatch([x[:1], x[1:]], 4, 4, DataPosition())
    for _ in range(2):  # The second step must not add to the gradient of the first.
        training = SimpleNamespace(
            run=run, model=model, optimizers=optimizers,
            loss_fn=lambda model, x: (model(x).sum(), {}),
        )  # fmt: skip
        result = optimizer_step(training, batch, loss_scale)  # type: ignore[arg-type]
        assert result.grad_norm == pytest.approx(norm) and norm > 10
    factor = min(1.0, clip / norm) if clip else 1.0
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        update = theirs.detach() - ours.detach()
        torch.testing.assert_close(update, 2 * factor * theirs.grad, rtol=1e-4, atol=1e-5)


def test_an_evaluation_is_a_table_with_a_row_for_each_set_and_one_for_all():
    one = {"val/loss": 1.0, "val/bits_per_byte": 0.5, "val/a/loss": 1.0, "val/a/bits_per_byte": 0.5}
    assert validation_tables(3, one) == [
        "validation at step 3    loss  bits_per_byte",
        "all                   1.0000         0.5000",
    ]
    assert validation_tables(3, {**one, "val/b/loss": 12.0}) == [
        "validation at step 3     loss  bits_per_byte",
        "a                      1.0000         0.5000",
        "b                     12.0000              -",
        "all                    1.0000         0.5000",
    ]


def test_skills_have_a_table_of_their_own():
    metrics = {
        "val/loss": 1.0, "val/skills/loss": 1.0, "val/skills/sum/exact_match": 0.9375,
        "val/skills/sum/combination/exact_match": 1.0, "val/skills/sum/words/exact_match": 0.5,
        "val/skills/sum_direct/exact_match": 0.0125,
    }  # fmt: skip
    assert validation_tables(150, metrics) == [
        "validation at step 150    loss",
        "all                     1.0000",
        "skills at step 150  trained  combination  words",
        "sum                   0.938        1.000  0.500",
        "sum_direct            0.013            -      -",
    ]


def test_no_table_is_wider_than_100_columns():
    rewards = ("loss", "reward_accuracy", "reward_margin", "chosen_log_probs", "rejected_log_probs")
    dpo = {f"val/{name}{key}": -123.4567 for name in ("", "behaviour/", "b/") for key in rewards}
    lines = validation_tables(12345, dpo, {"val/behaviour": 12, "val": 12})
    assert len(lines) == 4 and max(map(len, lines)) <= 100
    assert lines[1].split() == ["behaviour", *["-123.4567"] * 5, "12"]
    many = {f"val/{'s' * 60}{i}/{'m' * 60}{j}": 1.0 for i in range(3) for j in range(9)}
    many |= {f"val/metric_{j}": 1.0 for j in range(30)}
    lines = validation_tables(0, many)
    assert max(map(len, lines)) <= 100 and all(
        any(f"metric_{j}" in x for x in lines) for j in range(30)
    )

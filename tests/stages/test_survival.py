"""Tests that a run survives what happens at night: failed writes, NaN, kills while it starts."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import train
from model import ModelConfig, Transformer
from trainlib.core import files
from trainlib.engine import checkpoint, code, loop, metrics
from trainlib.evaluation import preferences
from trainlib.models.hf_folder import load_model, model_files

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16",
]  # fmt: skip


@pytest.fixture(autouse=True)
def workdir(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.getbasetemp() / "survival"
    if not path.exists():
        path.mkdir()
        rows = [{"text": f"Row {i} is a text about the number {i}. " * 4} for i in range(200)]
        (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(path)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(path / "cache"))
    return path


def settings(out_dir, *more):
    return [
        str(CONFIGS / "pretrain.yaml"), f"out_dir={out_dir}", "data.files=text.jsonl",
        "max_steps=30",
        "tokens_per_step=128",
        "sequence_length=64", "micro_batch_size=2", "device=cpu", "precision=fp32", "compile=off",
        "kernels=plain", "eval_every_steps=15", "save_every_steps=5", "keep_checkpoints=9",
        *MODEL, *more,
    ]  # fmt: skip


@pytest.fixture
def undisturbed(run_stage):
    if not Path("undisturbed").exists():
        assert run_stage("pretrain", *settings("undisturbed")) == 0
    return load_file("undisturbed/final/model.safetensors")


def same(folder, weights):
    found = load_file(Path(folder) / "model.safetensors")
    return all(torch.equal(found[name], weights[name]) for name in weights)


def failing(function, times, error):
    """Return the function, which fails the given calls (1, 2, ...) with an error."""
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls in times:
            raise error
        return function(*arguments, **options)

    return call


def test_a_failed_checkpoint_is_written_again_at_the_next_step(run_stage, undisturbed, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, {1}, full))
    assert run_stage("pretrain", *settings("retried")) == 0
    log = Path("retried/train.log").read_text()
    assert "step_000005 could not be written" in log and "Training continues" in log
    steps = {int(path.name[5:]) for path in Path("retried").glob("step_*")}
    assert 5 not in steps and min(steps) < 10  # Not at the next regular checkpoint, step 10.
    assert same("retried/final", undisturbed)


def test_a_disk_that_stays_full_ends_the_run(run_stage, undisturbed, monkeypatch, capsys):
    full = OSError(28, "No space left on device")
    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", failing(save, set(range(3, 99)), full))
    assert run_stage("pretrain", *settings("full")) == 1
    assert "Free some space" in capsys.readouterr().err
    assert {path.name for path in Path("full").glob("step_*")} == {"step_000005"}
    monkeypatch.setattr(checkpoint, "save_file", save)
    assert run_stage("pretrain", *settings("full")) == 0
    assert same("full/final", undisturbed)


def test_a_record_that_fails_does_not_end_the_run(run_stage, undisturbed, monkeypatch, capsys):
    full = OSError(28, "No space left on device")
    write = metrics.Board.add
    monkeypatch.setattr(metrics.Board, "add", failing(write, {2, 3}, full))
    atomically = failing(metrics.write_atomically, {1}, full)
    monkeypatch.setattr(metrics, "write_atomically", atomically)
    assert run_stage("pretrain", *settings("records", "log_every_steps=1")) == 0
    assert same("records/final", undisturbed)
    assert Path("records/train.log").read_text().count("\nstep ") == 30
    assert capsys.readouterr().out.count("a record of the run could not be written") == 1


def test_steps_that_are_not_finite_end_the_run_and_name_the_rows(run_stage, monkeypatch, capsys):
    step = loop.optimizer_step

    def broken(training, batch, loss_scale):
        if training.checkpoints.newest():  # From the first checkpoint on.
            training.model.model.norm.weight.data.fill_(torch.nan)
        return step(training, batch, loss_scale)

    monkeypatch.setattr(loop, "optimizer_step", broken)
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert run_stage("pretrain", *settings("nan", "save_every_steps=15", "eval_every_steps=0")) == 1
    error = capsys.readouterr().err
    assert "text.jsonl, line " in error and "resume=nan/step_000015 optim.muon_lr=0.01 " in error
    assert {path.name for path in Path("nan").glob("step_*")} == {"step_000015"}
    assert not Path("nan/final").exists()
    weights = load_file("nan/step_000015/model.safetensors")
    assert torch.isfinite(weights["model.norm.weight"]).all()


def test_a_model_of_nan_is_not_finished(run_stage, monkeypatch, capsys):
    """The weights turn NaN in the last step, whose gradient is still finite."""
    step, count = loop.optimizer_step, itertools.count(1)

    def broken(training, batch, loss_scale):
        result = step(training, batch, loss_scale)
        if next(count) == 7:
            training.model.model.norm.weight.data[3] = torch.nan
        return result

    monkeypatch.setattr(loop, "optimizer_step", broken)
    arguments = settings("last", "max_steps=7", "save_every_steps=6")
    assert run_stage("pretrain", *arguments) == 1
    assert "model.norm.weight has values that are not finite" in capsys.readouterr().err
    assert not Path("last/final").exists() and not Path("last/step_000007").exists()


def test_the_next_stage_does_not_start_from_a_model_of_nan(tmp_path, tokenizer):
    model = Transformer(ModelConfig(vocab_size=6400, hidden_size=16, intermediate_size=16,
                                    num_hidden_layers=1, num_attention_heads=1,
                                    num_key_value_heads=1, head_dim=16))  # fmt: skip
    model.model.norm.weight.data[0] = torch.inf
    for name, content in model_files(model.config, tokenizer).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that are not finite"):
        load_model(tmp_path)


def test_a_kill_while_identity_json_is_written_leaves_a_usable_folder(run_stage, undisturbed):
    folder = Path("killed")
    folder.mkdir()
    (folder / f".{os.getpid()}.identity.json").write_text('{"stage": "pre')
    (folder / files.LOCK).touch()
    assert run_stage("pretrain", *settings("killed")) == 0
    assert same("killed/final", undisturbed) and not list(folder.glob(".[0-9]*"))


def interrupt(run_stage, monkeypatch, out_dir, *more, at=17):
    """Train until a step fails; the checkpoints up to it are complete."""
    broken = failing(loop.optimizer_step, {at}, OSError(5, "Input/output error"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", broken)
        assert run_stage("pretrain", *settings(out_dir, *more)) == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(
    run_stage, undisturbed, monkeypatch, capsys, name
):
    interrupt(run_stage, monkeypatch, name)
    flip(Path(name) / "step_000015" / name)
    assert run_stage("pretrain", *settings(name)) == 0
    out = capsys.readouterr().out
    assert "step_000015 is damaged" in out and "resuming from " + name + "/step_000010" in out
    assert same(f"{name}/final", undisturbed)
    rows = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if "val/loss" in row]
    assert evaluated == [0, 15, 30]  # Step 15 was evaluated twice.


@pytest.mark.parametrize("damage", ["flip", "list", "gone"])
def test_a_damaged_identity_is_read_from_the_newest_checkpoint(
    run_stage, undisturbed, monkeypatch, capsys, damage
):
    interrupt(run_stage, monkeypatch, f"identity-{damage}")
    path = Path(f"identity-{damage}/identity.json")
    if damage == "flip":
        flip(path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_text("[1]")
    assert run_stage("pretrain", *settings(path.parent)) == 0
    text = capsys.readouterr().out
    assert f"{path} is damaged" in text or damage == "gone"
    assert same(path.parent / "final", undisturbed)


def test_a_run_whose_identity_is_damaged_before_its_first_checkpoint_starts_again(
    run_stage, undisturbed, monkeypatch, capsys
):
    interrupt(run_stage, monkeypatch, "early", at=3)
    Path("early/identity.json").write_text("")
    assert run_stage("pretrain", *settings("early")) == 0
    assert "had no checkpoint, so it starts again" in capsys.readouterr().out
    assert same("early/final", undisturbed)


def test_the_same_command_with_resume_goes_on_from_the_newest_checkpoint(
    run_stage, undisturbed, monkeypatch, capsys
):
    interrupt(run_stage, monkeypatch, "source")
    command = ("branch", "resume=source/step_000010")
    interrupt(run_stage, monkeypatch, *command, at=8)  # Steps 11 to 17.
    assert {p.name for p in Path("branch").glob("step_*")} == {"step_000015"}
    capsys.readouterr()
    assert run_stage("pretrain", *settings(*command)) == 0
    assert "resuming from branch/step_000015" in capsys.readouterr().out
    assert same("branch/final", undisturbed)
    assert run_stage("pretrain", *settings(*command)) == 0
    assert "already finished" in capsys.readouterr().out
    # Also for a folder of the run itself, once the folder it started from is gone.
    command = ("source", "resume=source/step_000010", "keep_checkpoints=1")
    interrupt(run_stage, monkeypatch, *command, at=13)
    assert {p.name for p in Path("source").glob("step_*")} == {"step_000020"}
    assert run_stage("pretrain", *settings(*command)) == 0
    assert "resuming from source/step_000020" in capsys.readouterr().out
    assert same("source/final", undisturbed)


def test_a_finished_model_that_changed_is_kept_and_written_again(run_stage, undisturbed, capsys):
    assert run_stage("pretrain", *settings("finished")) == 0
    flip(Path("finished/final/model.safetensors"))
    assert run_stage("pretrain", *settings("finished")) == 0
    assert "It is moved to finished/final.1, and written again" in capsys.readouterr().out
    assert same("finished/final", undisturbed) and not same("finished/final.1", undisturbed)
    Path("finished/final/README.md").write_text("My model.")
    assert run_stage("pretrain", *settings("finished")) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_resume_with_other_code_says_so(run_stage, monkeypatch, capsys):
    interrupt(run_stage, monkeypatch, "code")
    first = yaml.safe_load(Path("code/run.yaml").read_text())["code"]
    changed = {**first["files"], "model.py": "0123"}
    monkeypatch.setattr(code, "code_digests", lambda stage: changed)
    assert run_stage("pretrain", *settings("code")) == 0
    assert "the code has changed since code/step_000015: model.py." in capsys.readouterr().out
    last = yaml.safe_load(Path("code/run.yaml").read_text())["code"]
    assert last["changes"] == [{"step": 15, "files": ["model.py"]}]
    assert run_stage("pretrain", "code/run.yaml", "out_dir=again") == 0  # Its settings still work.


def send_sigterm(function, at):
    """Return the function, which sends SIGTERM to this process in a call outside training."""
    calls = itertools.count(1)

    def call(model, *arguments):
        if not model.training and next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(model, *arguments)

    return call


@pytest.mark.parametrize(
    ("at", "steps"), [(2, set()), (14, {5, 10, 15}), (26, {5, 10, 15, 20, 25, 30})]
)
def test_sigterm_stops_in_an_evaluation(run_stage, undisturbed, monkeypatch, capsys, at, steps):
    """An evaluation has 10 batches: the first, second and last evaluation stop."""
    out_dir = f"stopped-{at}"
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_fn", send_sigterm(train.loss_fn, at))
        assert run_stage("pretrain", *settings(out_dir)) == 0
    assert "in its evaluation" in capsys.readouterr().out
    assert {int(path.name[5:]) for path in Path(out_dir).glob("step_*")} == steps
    assert not Path(out_dir, "final").exists()
    assert run_stage("pretrain", *settings(out_dir)) == 0
    assert same(f"{out_dir}/final", undisturbed)


def preference_settings(out_dir):
    pairs = [
        {"prompt": f"What is {i}?", "chosen": f"The number {i}.", "rejected": "No number at all."}
        for i in range(60)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return [
        str(CONFIGS / "dpo.yaml"), "init_from=undisturbed/final", f"out_dir={out_dir}",
        "data.files=pairs.jsonl", "max_steps=4", "tokens_per_step=256", "sequence_length=64",
        "device=cpu", "precision=fp32", "compile=off", "kernels=plain",
    ]  # fmt: skip


def test_a_stopped_reference_pass_continues(run_stage, undisturbed, monkeypatch, capsys):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", "reference-cache")
    with monkeypatch.context() as patch:
        function = send_sigterm(preferences.batch_log_probs, at=3)
        patch.setattr(preferences, "batch_log_probs", function)
        assert run_stage("dpo", *preference_settings("dpo")) == 0
    assert "stopped; rerun the command to continue" in capsys.readouterr().out
    (part,) = Path("reference-cache/reference").iterdir()
    assert run_stage("dpo", *preference_settings("dpo")) == 0
    found = re.search(r"reference: (\d+) answers computed in .*, (\d+) from the cache",
                      capsys.readouterr().out)  # fmt: skip
    assert found and int(found[1]) > 0 and int(found[2]) > 0
    weights = load_file("dpo/final/model.safetensors")
    (whole,) = Path("reference-cache/reference").iterdir()
    assert whole != part
    flip(whole)  # Its checksum finds it.
    assert run_stage("dpo", *preference_settings("dpo-again")) == 0
    assert f"{whole} is damaged" in capsys.readouterr().out
    assert same("dpo-again/final", weights)


def test_reference_values_are_saved_every_minute(run_stage, undisturbed, monkeypatch):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", "minute-cache")
    monkeypatch.setattr(preferences, "SAVE_SECONDS", 0.0)
    broken = failing(preferences.batch_log_probs, {4}, OSError(5, "Input/output error"))
    monkeypatch.setattr(preferences, "batch_log_probs", broken)
    assert run_stage("dpo", *preference_settings("minute")) == 1
    (part,) = Path("minute-cache/reference").iterdir()
    with np.load(part) as file:
        assert np.isfinite(file["values"]).any()


def test_a_run_that_started_again_is_not_the_one_of_resume(run_stage, undisturbed, monkeypatch):
    interrupt(run_stage, monkeypatch, "origin")
    interrupt(run_stage, monkeypatch, "moved", "resume=origin/step_000010", at=8)
    interrupt(run_stage, monkeypatch, "moved", "resume=never", at=8)
    assert json.loads(Path("moved/identity.json").read_text())["resume"] == ""
    assert Path("moved.1/step_000015").is_dir() and Path("moved/step_000005").is_dir()

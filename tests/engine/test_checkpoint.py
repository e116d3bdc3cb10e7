"""Tests that step folders are complete or absent, exact, and loaded without unpickling."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trainlib.core.errors import UserError
from trainlib.engine import checkpoint
from trainlib.engine.checkpoint import Checkpoints, load_optimizer_tensors, optimizer_tensors
from trainlib.engine.loop import due


def new_model(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 4))


def new_optimizers(model: nn.Module, backwards: bool = False) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    if backwards:
        matrices, rest = matrices[::-1], rest[::-1]
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def save(checkpoints, step, model, tensors, state) -> None:
    files = {"train_state.json": json.dumps(state).encode()}
    checkpoints.save(f"step_{step:06d}", model, files, tensors)


def saved(folder, step: int = 2, keep: int = 2, **state) -> nn.Module:
    folder.mkdir(exist_ok=True)
    model, checkpoints = new_model(), Checkpoints(folder, keep)
    save(checkpoints, step, model, {"rng/cpu": torch.get_rng_state()}, state)
    checkpoints.join()
    return model


@pytest.mark.parametrize("backwards", [False, True])
def test_resuming_after_two_of_five_steps_is_bit_identical(tmp_path, backwards):
    reference = new_model()
    start = {name: value.clone() for name, value in reference.state_dict().items()}
    train(reference, new_optimizers(reference), range(5))

    first = new_model()
    first.load_state_dict(start)
    optimizers = new_optimizers(first)
    train(first, optimizers, range(2))
    checkpoints = Checkpoints(tmp_path, 2)
    tensors, scalars = optimizer_tensors(optimizers, first)
    assert {"0/0.weight/momentum_buffer", "1/1.bias/exp_avg", "1/2.bias/step"} <= set(tensors)
    save(checkpoints, 2, first, tensors, {"optimizers": scalars, "train": {"step": 2}})
    train(first, optimizers, range(2, 4))  # Not in the snapshot, which was taken before.
    checkpoints.join()

    second = new_model()
    second_optimizers = new_optimizers(second, backwards)
    restored = Checkpoints(tmp_path, 2).restore(second, tmp_path / "step_000002")
    assert restored[1]["train"] == {"step": 2}
    load_optimizer_tensors(second_optimizers, second, restored[0], restored[1]["optimizers"])
    train(second, second_optimizers, range(2, 5))
    for name, value in reference.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_scalar_optimizer_state_is_restored(tmp_path):
    model = new_model()
    optimizers = [torch.optim.ASGD(model.parameters(), lr=0.1)]
    train(model, optimizers, range(2))
    parameter = next(model.parameters())
    optimizers[0].state[parameter]["count"] = 7
    tensors, scalars = optimizer_tensors(optimizers, model)
    assert scalars == {"0/0.weight/count": 7}
    other = [torch.optim.ASGD(model.parameters(), lr=0.1)]
    load_optimizer_tensors(other, model, tensors, json.loads(json.dumps(scalars)))
    assert other[0].state[parameter]["count"] == 7


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_count_is_restored_on_the_device_the_optimizer_needs(fused):
    with torch.device("meta"):  # Represents any device other than the CPU.
        model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["fused"] = fused
    values = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 2)}
    tensors = {f"0/weight/{key}": value for key, value in values.items()}
    load_optimizer_tensors([optimizer], model, tensors, {})
    state = optimizer.state[model.weight]
    assert state["exp_avg"].device.type == "meta"
    assert state["step"].device.type == ("meta" if fused else "cpu")


def test_state_from_other_optimizers_is_rejected_in_both_directions():
    model = new_model()
    one, two = [torch.optim.AdamW(model.parameters(), lr=0.1)], new_optimizers(model)
    for old, new in ((one, two), (two, one)):
        train(model, old, range(1))
        tensors, scalars = optimizer_tensors(old, model)
        with pytest.raises(UserError, match="written with other optimizers"):
            load_optimizer_tensors(new, model, tensors, scalars)


def test_a_step_folder_is_a_model_folder(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    tied = new_model()
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.extra_files = {"config.json": '{"name": "小"}'}
    save(checkpoints, 7, tied, {"rng/cpu": torch.get_rng_state()}, {"a": [1, (2, 3)]})
    checkpoints.join()
    checkpoints.save("final", tied, {})
    checkpoints.join()
    names = {"config.json", "model.safetensors", "run.yaml", "SHA256SUMS"}
    assert {p.name for p in (tmp_path / "final").iterdir()} == names
    step = tmp_path / "step_000007"
    more = {"optimizer.safetensors", "train_state.json"}
    assert {p.name for p in step.iterdir()} == names | more
    assert json.loads((step / "config.json").read_text(encoding="utf-8")) == {"name": "小"}
    assert json.loads((step / "train_state.json").read_text()) == {"a": [1, [2, 3]]}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=step, check=True)
    assert len((step / "SHA256SUMS").read_text().splitlines()) == 5
    with safe_open(step / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _ in tied.named_parameters()}
    assert (tmp_path / "latest").read_text().strip() == "step_000007"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        checkpoints = Checkpoints(tmp_path, 2, files={"config.json": "{}"})
        save(checkpoints, 1, new_model(), {"rng/cpu": torch.get_rng_state()}, {})
        checkpoints.join()
        checkpoints.save("final", new_model(), {})
        checkpoints.join()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 9 and {f.stat().st_mode & 0o777 for f in files} == {0o666 & ~mask}


def test_a_new_folder_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path, 2).newest() is None
    assert Checkpoints(tmp_path / "none", 2).newest() is None


def test_due_steps_are_multiples_of_the_interval():
    assert [s for s in range(1, 8) if due(s, 3)] == [3, 6]
    assert not any(due(s, 0) for s in range(8))


def test_step_folders_are_sorted_by_number(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        saved(tmp_path, step)
    names = {p.name for p in tmp_path.glob("step_*")}
    assert names == {"step_999999", "step_1000000"}
    assert Checkpoints(tmp_path, 2).newest() == tmp_path / "step_1000000"


def test_the_newest_folder_is_named_by_latest_or_has_the_highest_number(tmp_path):
    for step in (3, 4):
        saved(tmp_path, step)
    checkpoints, latest = Checkpoints(tmp_path, 2), tmp_path / "latest"
    latest.write_text("step_000003\n")
    assert checkpoints.newest() == tmp_path / "step_000003"
    for invalid in ("", "step_0000", "../elsewhere", "step_000009"):
        latest.write_text(invalid)
        assert checkpoints.newest() == tmp_path / "step_000004"
    latest.unlink()
    (tmp_path / ".writing-step_000009").mkdir()
    (tmp_path / "step_by_step").mkdir()
    assert checkpoints.newest() == tmp_path / "step_000004"


def test_resuming_from_an_earlier_checkpoint_keeps_the_new_one(tmp_path):
    for step in (2, 4):
        saved(tmp_path, step)
    saved(tmp_path, 3, keep=1, mark="new")
    newest = Checkpoints(tmp_path, 1).newest()
    assert newest is not None
    assert Checkpoints(tmp_path, 1).restore(new_model(), newest)[1]["mark"] == "new"
    assert not (tmp_path / "step_000002").exists()


def test_leftovers_from_a_killed_process_are_removed(tmp_path):
    partial = tmp_path / ".writing-step_000001"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    saved(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


def test_best_is_replaced_and_not_counted_as_a_checkpoint(tmp_path):
    saved(tmp_path, 1, keep=1)
    checkpoints, model = Checkpoints(tmp_path, 1, files={"config.json": "{}"}), new_model()
    for step in (2, 3):
        model = new_model()
        checkpoints.save("best", model, {"validation.json": b"%d" % step})
    checkpoints.join()
    saved(tmp_path, 4, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == {"best", "step_000004", "latest"}
    names = {"config.json", "model.safetensors", "validation.json", "SHA256SUMS"}
    assert {p.name for p in (tmp_path / "best").iterdir()} == names
    assert (tmp_path / "best/validation.json").read_text() == "3"
    other = new_model()
    checkpoints.load_weights(other, tmp_path / "best")
    assert torch.equal(other[0].weight, model[0].weight)
    (tmp_path / "best/model.safetensors").write_bytes(b"{")
    with pytest.raises(UserError, match="best is damaged .*Remove it"):
        checkpoints.load_weights(new_model(), tmp_path / "best", "Remove it.")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error")])
def test_a_full_disk_is_reported_and_old_checkpoints_are_kept(tmp_path, monkeypatch, error, caplog):
    model = saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    save(checkpoints, 2, new_model(), {}, {})
    with pytest.raises(UserError, match="could not be written .*Free some space"):
        checkpoints.join()
    checkpoints.join()  # It is reported only once.
    save(checkpoints, 3, new_model(), {}, {})
    while not (problem := checkpoints.problem()):  # Without a join, it is reported once.
        time.sleep(0.01)
    assert "step_000003 could not be written" in problem and not checkpoints.problem()
    save(checkpoints, 4, new_model(), {}, {})
    save(checkpoints, 5, new_model(), {}, {})
    assert "step_000004 could not be written" in caplog.text
    checkpoints.problem(wait=True)
    checkpoints.save("best", new_model(), {})
    with pytest.raises(UserError, match="best could not be written .*Free some space"):
        checkpoints.join()
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001", "latest"}
    other = new_model()
    checkpoints.restore(other, tmp_path / "step_000001")
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_folder_from_another_model_is_rejected_and_changes_nothing(tmp_path):
    saved(tmp_path, 1)
    for other, name in (
        (new_model(width=7), "0.weight"),
        (nn.Sequential(nn.Linear(6, 6, bias=False)), "2.bias"),
        (nn.Sequential(*new_model(), nn.LayerNorm(4)), "3.weight"),
    ):
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(UserError, match=rf"step_000001 does not match .*{name}"):
            Checkpoints(tmp_path, 1).restore(other, tmp_path / "step_000001")
        assert all(torch.equal(before[key], v) for key, v in other.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_flipped_bit_is_found(tmp_path, name, caplog):
    saved(tmp_path, 1)
    path = tmp_path / "step_000001" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"step_000001 is damaged .*changed.*: {name}"):
        Checkpoints(tmp_path, 1).restore(new_model(), path.parent)
    (path.parent / "SHA256SUMS").write_text("")
    with pytest.raises(UserError, match=r"step_000001 is damaged .*changed.*: SHA256SUMS"):
        Checkpoints(tmp_path, 1).restore(new_model(), path.parent)


def test_a_folder_of_an_older_run_is_not_checked(tmp_path, caplog):
    saved(tmp_path, 1)
    (tmp_path / "step_000001/SHA256SUMS").unlink()
    caplog.set_level("INFO")
    Checkpoints(tmp_path, 1).restore(new_model(), tmp_path / "step_000001")
    assert "has no SHA256SUMS (older runs have none), so its files are not checked" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_damaged_folder_is_reported(tmp_path, name):
    saved(tmp_path / "run", 1)
    for content in (b"", b"{", None):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = shutil.copytree(tmp_path / "run" / "step_000001", tmp_path / "copy")
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        model = new_model()
        before = model[0].weight.clone()
        with pytest.raises(UserError, match="copy is damaged"):
            Checkpoints(tmp_path / "run", 1).restore(model, folder=copy)
        assert torch.equal(before, model[0].weight)

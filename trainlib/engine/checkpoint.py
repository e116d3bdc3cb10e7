"""Step folders: each a Hugging Face model folder with the training state beside it.

    step_000200/   model.safetensors and the companions (config.json, tokenizer.json, ...)
                   optimizer.safetensors   tensors by parameter name, random states
                   train_state.json        everything that is no tensor
    latest         the name of the newest complete one

Nothing is pickled, so nothing that is loaded can run code. A folder is written under another
name, brought to the disk, and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainlib.core.errors import UserError
from trainlib.core.files import sync, write_atomically


class Checkpoints:
    """The step folders of a run; writing happens in a thread, from a snapshot."""

    def __init__(
        self, folder: Path, keep: int, writes: bool = True, companions: dict[str, str] | None = None
    ) -> None:
        self.folder, self.keep = folder, keep
        self.writes = writes
        """Whether this process writes at all: of several ranks only the first does."""
        self.companions = companions or {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self, step: int, model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Take a snapshot now and write it meanwhile.

        Raises UserError where the one before could not be written.
        """
        self.join()
        if not self.writes:
            return
        weights = _snapshot(dict(model.named_parameters()))
        state = json.loads(json.dumps(state))
        self._writing = self._thread.submit(self._write, step, weights, _snapshot(tensors), state)

    def join(self) -> None:
        """Wait until the last snapshot is on disk; raises UserError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.folder}: a checkpoint could not be written ({error}). The one before,"
                    " if any, is whole; free some space and start again to go on from it."
                ) from error

    def _write(
        self, step: int, weights: dict[str, Tensor], tensors: dict[str, Tensor], state: Any
    ) -> None:
        name = f"step_{step:06d}"
        # What a kill left in the middle of writing; only one thread writes here.
        for left in self.folder.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = self.folder / f".writing-{name}"
        try:
            self._model_folder(partial, weights)
            save_file(tensors, partial / "optimizer.safetensors")
            (partial / "train_state.json").write_text(json.dumps(state), encoding="utf-8")
            _rename(partial, self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        write_atomically(self.folder / "latest", name)
        # Later ones can lie there when training went on from an earlier one; they do not count.
        up_to_here = [path for path in self._step_folders() if _step(path) <= step]
        for old in up_to_here[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _step_folders(self) -> list[Path]:
        """Complete step folders, the oldest first; by number, for the names have no fixed width."""
        names = (path for path in self.folder.glob("step_*") if path.name[5:].isdigit())
        return sorted(names, key=_step)

    def _model_folder(self, folder: Path, weights: dict[str, Tensor]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in self.companions.items():
            (folder / name).write_text(content, encoding="utf-8")
        if (self.folder / "run.yaml").is_file():
            shutil.copy(self.folder / "run.yaml", folder / "run.yaml")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def write_final(self, model: nn.Module) -> None:
        """Write final/, the model folder that the next stage starts from.

        Raises UserError where it cannot be written; the step folders are whole.
        """
        if not self.writes:
            return
        partial = self.folder / ".writing-final"
        try:
            self._model_folder(partial, _snapshot(dict(model.named_parameters())))
            _rename(partial, self.folder / "final")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"{self.folder / 'final'}: could not be written ({error}). The last step folder is"
                " whole; free some space and start again to go on from it."
            ) from error

    def newest(self) -> Path | None:
        """The newest complete step folder: the one that `latest` names, else the last one."""
        latest = self.folder / "latest"
        name = latest.read_text(encoding="utf-8", errors="replace") if latest.is_file() else ""
        for folder in self._step_folders()[::-1]:
            if folder.name == name.strip():
                return folder
        return next(iter(self._step_folders()[::-1]), None)

    def restore(self, model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load a step folder into a model; returns tensors and state.

        Raises UserError where the folder does not fit the model or is damaged; the model is as
        before then.
        """
        try:
            weights = load_file(folder / "model.safetensors")
            tensors = load_file(folder / "optimizer.safetensors")
            state = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} is damaged ({error}). Go on from another with resume=FOLDER, or start"
                " anew with resume=never."
            ) from error
        parameters = dict(model.named_parameters())
        wrong = sorted(
            name
            for name in {*weights, *parameters}
            if name not in weights
            or name not in parameters
            or weights[name].shape != parameters[name].shape
        )
        if wrong:
            raise UserError(f"{folder} does not fit the model: {', '.join(wrong[:5])}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        return tensors, state


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _rename(partial: Path, folder: Path) -> None:
    """Give a complete folder its name, its files brought to the disk before."""
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)


def _snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def optimizer_tensors(
    optimizers: list[Optimizer], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizers' state by parameter name: tensors, and plain numbers apart."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                into: dict[str, Any] = tensors if isinstance(value, Tensor) else scalars
                into[f"{index}/{names[parameter]}/{key}"] = value
    return tensors, scalars


def load_optimizer_tensors(
    optimizers: list[Optimizer],
    model: nn.Module,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    """Give the optimizers their state back, whatever the order of their parameters."""
    parameters = dict(model.named_parameters())
    # A fused or capturable optimizer counts its steps on the device, others on the CPU, as torch's
    # own load_state_dict does.
    counts_on_device = {
        parameter
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    for full_name, value in {**tensors, **scalars}.items():
        if not full_name[0].isdigit():
            continue
        index, name, key = full_name.split("/")
        if int(index) >= len(optimizers):
            raise UserError(
                "the checkpoint was written by other optimizers (optim.name). Start a new run from"
                " its weights with init_from=FOLDER, or keep optim.name."
            )
        parameter = parameters[name]
        if isinstance(value, Tensor) and (key != "step" or parameter in counts_on_device):
            value = value.to(parameter.device)
        optimizers[int(index)].state[parameter][key] = value

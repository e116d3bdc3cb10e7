"""Step folders: each a Hugging Face model folder with the training state beside it.

    step_000200/   model.safetensors and the companions (config.json, tokenizer.json, ...)
                   optimizer.safetensors   tensors by parameter name, random states
                   train_state.json        everything that is no tensor
    latest         the name of the newest complete one

Nothing is pickled, so nothing that is loaded can run code. A folder is written under another
name and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainlib.errors import UserError


class Checkpoints:
    """The step folders of a run; writing happens in a thread, from a snapshot."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.companions: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def due(self, step: int, every: int) -> bool:
        """Whether a checkpoint is due after a step."""
        return bool(every) and step % every == 0

    def save(
        self, step: int, model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Take a snapshot now and write it meanwhile.

        Raises UserError where the one before could not be written.
        """
        self.join()
        weights = _snapshot(dict(model.named_parameters()))
        state = json.loads(json.dumps(state))
        self._writing = self._thread.submit(self._write, step, weights, _snapshot(tensors), state)

    def join(self) -> None:
        """Wait until the last snapshot is on disk; raises UserError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except OSError as error:
                raise UserError(
                    f"{self.folder}: a checkpoint could not be written ({error.strerror or error})."
                    " The one before is whole; free some space and start again to go on from it."
                ) from error

    def _write(
        self, step: int, weights: dict[str, Tensor], tensors: dict[str, Tensor], state: Any
    ) -> None:
        name = f"step_{step:06d}"
        partial = self.folder / f".writing-{name}"
        try:
            self._model_folder(partial, weights)
            save_file(tensors, partial / "optimizer.safetensors")
            (partial / "train_state.json").write_text(json.dumps(state), encoding="utf-8")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            partial.rename(self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        latest = self.folder / ".latest"
        latest.write_text(name, encoding="utf-8")
        os.replace(latest, self.folder / "latest")
        for old in sorted(self.folder.glob("step_*"))[: -self.keep]:
            shutil.rmtree(old)

    def _model_folder(self, folder: Path, weights: dict[str, Tensor]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in self.companions.items():
            (folder / name).write_text(content, encoding="utf-8")
        if (self.folder / "run.yaml").is_file():
            shutil.copy(self.folder / "run.yaml", folder / "run.yaml")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def write_final(self, model: nn.Module) -> None:
        """Write final/, the model folder that the next stage starts from."""
        partial = self.folder / ".writing-final"
        self._model_folder(partial, _snapshot(dict(model.named_parameters())))
        partial.rename(self.folder / "final")

    def newest(self) -> Path | None:
        """The newest complete step folder."""
        return max(self.folder.glob("step_*"), default=None, key=lambda path: path.name)

    def restore(
        self, model: nn.Module, folder: Path | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the newest (or a given) step folder into a model; returns tensors and state."""
        folder = folder or self.newest()
        if folder is None:
            return None
        weights = load_file(folder / "model.safetensors")
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
        state = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
        return load_file(folder / "optimizer.safetensors"), state


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
    for full_name, value in {**tensors, **scalars}.items():
        if not full_name[0].isdigit():
            continue
        index, name, key = full_name.split("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and key != "step":
            value = value.to(parameter.device)
        optimizers[int(index)].state[parameter][key] = value

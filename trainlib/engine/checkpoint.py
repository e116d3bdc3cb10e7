"""Step folders: each is a Hugging Face model folder that also holds the training state.

    step_000200/   model.safetensors and extra_files (config.json, tokenizer.json, ...)
                   optimizer.safetensors   tensors by parameter name, RNG states
                   train_state.json        everything else
    latest         the name of the newest complete step folder
    best/          a model folder: the weights with the smallest validation loss (best.py)

Nothing is pickled, so loading cannot execute code. A folder is written under a temporary name,
synced to disk, and renamed once it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
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

DAMAGED = "Resume from another step folder with resume=PATH, or start over with resume=never."


class Checkpoints:
    """The step folders of a run, written from snapshots by a background thread."""

    def __init__(
        self, folder: Path, keep: int, writes: bool = True, files: dict[str, str] | None = None
    ) -> None:
        self.folder, self.keep = folder, keep
        self.writes = writes
        """True if this process writes, which only rank 0 does."""
        self.extra_files = files or {}
        """Contents, by file name, of the other files that make a checkpoint a model folder."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[Path, Future[None]] | None = None

    def save(
        self, name: str, model: nn.Module, files: dict[str, bytes],
        tensors: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Take a snapshot and write it in the background: a step folder, best/ or final/.

        `files` are further files by name, and replace extra_files and the copy of run.yaml.
        `tensors` is the training state. Raises UserError if the previous snapshot could not be
        written.
        """
        self.join()
        if self.writes:
            folder, weights = self.folder / name, _snapshot(dict(model.named_parameters()))
            work = self._thread.submit(
                self._write, folder, weights, files, _snapshot(tensors or {})
            )
            self._writing = folder, work

    def join(self) -> None:
        """Wait until the last snapshot is on disk; raises UserError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing[1].result()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{writing[0]} could not be written ({error}). The previous checkpoint, if any,"
                    " is intact. Free some space, then rerun the command to resume."
                ) from error

    def _write(
        self, folder: Path, weights: dict[str, Tensor], files: dict[str, bytes],
        tensors: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Write a folder; for a step folder, point `latest` to it and remove the oldest ones."""
        # Remove what a killed process left behind; no other thread writes here.
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial, old = self.folder / f".writing-{folder.name}", self.folder / ".writing-old"
        try:
            partial.mkdir(parents=True)
            for name, text in self.extra_files.items():
                (partial / name).write_text(text, encoding="utf-8")
            if (self.folder / "run.yaml").is_file():
                shutil.copyfile(self.folder / "run.yaml", partial / "run.yaml")
            for name, content in files.items():
                (partial / name).write_bytes(content)
            _save_tensors(weights, partial / "model.safetensors")
            if tensors:
                _save_tensors(tensors, partial / "optimizer.safetensors")
            for path in (*partial.iterdir(), partial):
                sync(path)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(self.folder)
        finally:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
        if folder in (folders := self._step_folders()):
            write_atomically(self.folder / "latest", folder.name)
            # After a resume from an earlier checkpoint, ignore the later folders.
            for oldest in folders[: folders.index(folder) + 1][: -self.keep]:
                shutil.rmtree(oldest, ignore_errors=True)

    def _step_folders(self) -> list[Path]:
        """Return the complete step folders, sorted by number because names differ in width."""
        names = (path for path in self.folder.glob("step_*") if path.name[5:].isdigit())
        return sorted(names, key=lambda path: int(path.name[5:]))

    def newest(self) -> Path | None:
        """Return the step folder that `latest` names, otherwise the one with the highest number."""
        folders, latest = self._step_folders(), self.folder / "latest"
        text = latest.read_text(encoding="utf-8", errors="replace") if latest.is_file() else ""
        named = [folder for folder in folders if folder.name == text.strip()]
        return next(reversed(named or folders), None)

    def restore(self, model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load a step folder into a model; return the other tensors and the state in the folder.

        Raises UserError and leaves the model unchanged if the folder is damaged or does not match.
        """
        try:
            tensors = load_file(folder / "optimizer.safetensors")
            state = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} is damaged ({error}). {DAMAGED}") from error
        self.load_weights(model, folder)
        return tensors, state

    def load_weights(self, model: nn.Module, folder: Path, fix: str = DAMAGED) -> None:
        """Load the weights in a model folder of this run; `fix` says what to do if it is damaged.

        Raises UserError and leaves the model unchanged if the folder is damaged or does not match.
        """
        try:
            weights = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} is damaged ({error}). {fix}") from error
        parameters = dict(model.named_parameters())
        saved, needed = ({(n, t.shape) for n, t in d.items()} for d in (weights, parameters))
        if wrong := sorted({name for name, _ in saved ^ needed}):
            raise UserError(f"{folder} does not match the model: {', '.join(wrong[:5])}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any new file; safetensors itself sets 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    if path.stat().st_mode != mode:  # Some file systems have one mode and refuse to change it.
        path.chmod(mode)


def _snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def optimizer_tensors(
    optimizers: list[Optimizer], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of the optimizers by parameter name: tensors, and other values."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                target: dict[str, Any] = tensors if isinstance(value, Tensor) else scalars
                target[f"{index}/{names[parameter]}/{key}"] = value
    return tensors, scalars


def load_optimizer_tensors(
    optimizers: list[Optimizer],
    model: nn.Module,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    """Restore the optimizer state by parameter name; the parameters may be in any order.

    Raises UserError if the state belongs to other optimizers.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for full_name, value in {**tensors, **scalars}.items():
        if full_name[0].isdigit():  # All others are RNG states.
            index, name, key = full_name.split("/")
            saved[index][name][key] = value
    for index, optimizer in enumerate(optimizers):
        state = saved[str(index)]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ordered = {i: state.pop(names[p]) for i, p in enumerate(parameters) if names[p] in state}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": ordered})
    if any(saved.values()):
        raise UserError(
            "the checkpoint was written with other optimizers (optim.name). Keep optim.name, or"
            " start a new run from its weights with init_from=FOLDER."
        )

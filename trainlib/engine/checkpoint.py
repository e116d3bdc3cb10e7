"""Step folders: each is a Hugging Face model folder that also holds the training state.

    step_000200/   model.safetensors and extra_files (config.json, tokenizer.json, ...)
                   optimizer.safetensors   tensors by parameter name, RNG states
                   train_state.json        everything else
                   SHA256SUMS              digests of these files, which a resume compares
    latest         the name of the newest complete step folder
    best/          a model folder: the weights with the smallest validation loss (best.py)

Nothing is pickled, so loading cannot execute code. A folder is written under a temporary name,
synced to disk, and renamed once it is complete.
"""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainlib.core.errors import UserError
from trainlib.core.files import SUMS, changed_files, sync, write_atomically, write_sums

log = logging.getLogger(__name__)

RESUMED = {
    "model.safetensors",
    "optimizer.safetensors",
    "train_state.json",
    "validation.json",
    SUMS,
}
DAMAGED = "Resume from another step folder with resume=PATH, or start over with resume=never."

Tensors = dict[str, Tensor]


class DamagedError(UserError):
    """A step folder that cannot be read, or whose content has changed."""


class Checkpoints:
    """The step folders of a run, written from snapshots by a background thread."""

    def __init__(
        self, folder: Path, keep: int, writes: bool = True, files: dict[str, str] | None = None
    ) -> None:
        self.folder, self.keep = folder, keep
        self.writes = writes  # Only rank 0 does.
        self.extra_files = files or {}
        """Contents, by file name, of the other files that make a checkpoint a model folder."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[Path, Future[None]] | None = None

    def save(
        self,
        name: str,
        model: nn.Module,
        files: Mapping[str, bytes],
        tensors: Tensors | None = None,
    ) -> None:
        """Take a snapshot and write it in the background: a step folder, best/ or final/.

        `files` are further files, which replace others; `tensors` is the training state.
        """
        if problem := self.problem(wait=True):
            log.warning("%s", problem)
        if self.writes:
            weights, tensors = _snapshot(dict(model.named_parameters())), _snapshot(tensors or {})
            work = self._thread.submit(self._write, self.folder / name, files, weights, tensors)
            self._writing = self.folder / name, work

    def problem(self, wait: bool = False) -> str:
        """Return once why the last snapshot could not be written; empty if there is no problem."""
        if self._writing is not None and (wait or self._writing[1].done()):
            (folder, work), self._writing = self._writing, None
            try:
                work.result()
            except (OSError, SafetensorError) as error:
                return f"{folder} could not be written ({error})."
        return ""

    def join(self) -> None:
        """Wait until the last snapshot is on disk; raises UserError if it could not be written."""
        if problem := self.problem(wait=True):
            text = "The previous checkpoint, if any, is intact. Free some space, then rerun"
            raise UserError(f"{problem} {text} the command to resume.")

    def _write(
        self, folder: Path, files: Mapping[str, bytes], weights: Tensors, tensors: Tensors
    ) -> None:
        """Write a folder; for a step folder, point `latest` to it and remove the oldest ones."""
        # Remove what a killed process left behind; no other thread writes here.
        _remove(self.folder.glob(".writing-*"))
        partial, old = self.folder / f".writing-{folder.name}", self.folder / ".writing-old"
        try:
            partial.mkdir()
            # What a resume needs; identity.json has paths, which a model to publish must not have.
            copied = ("run.yaml", "identity.json") if tensors else ("run.yaml",)
            paths = (self.folder / name for name in copied)
            contents = {name: text.encode() for name, text in self.extra_files.items()}
            contents |= {path.name: path.read_bytes() for path in paths if path.is_file()}
            for name, content in {**contents, **files}.items():
                (partial / name).write_bytes(content)
            _save_tensors(weights, partial / "model.safetensors")
            if tensors:
                _save_tensors(tensors, partial / "optimizer.safetensors")
            write_sums(partial)
            for path in (*partial.iterdir(), partial):
                sync(path)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(self.folder)
        finally:
            _remove((partial, old))
        if folder in (folders := self._step_folders()):
            write_atomically(self.folder / "latest", folder.name)
            # After a resume from an earlier checkpoint, ignore the later folders.
            _remove(folders[: folders.index(folder) + 1][: -self.keep])

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

    def restore(self, model: nn.Module, folder: Path) -> tuple[Tensors, dict[str, Any]]:
        """Load a step folder into a model, unless it is damaged; return its tensors and state."""
        try:
            if changed := RESUMED & changed_files(folder):
                raise ValueError(f"changed since they were written: {', '.join(sorted(changed))}")
            state = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedError(f"{folder} is damaged ({error}). {DAMAGED}") from error
        self.load_weights(model, folder)
        return tensors, state

    def older(self, folder: Path) -> list[Path]:
        """Return the step folders before one of them, the newest first."""
        folders = self._step_folders()
        return folders[: folders.index(folder)][::-1] if folder in folders else []

    def load_weights(self, model: nn.Module, folder: Path, fix: str = DAMAGED) -> None:
        """Load the weights in a model folder; if it is damaged, `fix` says what to do."""
        try:
            weights = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{folder} is damaged ({error}). {fix}") from error
        parameters = dict(model.named_parameters())
        saved, needed = ({(n, t.shape) for n, t in d.items()} for d in (weights, parameters))
        if wrong := sorted({name for name, _ in saved ^ needed}):
            raise UserError(f"{folder} does not match the model: {', '.join(wrong[:5])}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file with the mode of any new file; safetensors itself sets 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    if path.stat().st_mode != mode:  # Some file systems have one mode and refuse to change it.
        path.chmod(mode)


def _snapshot(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def optimizer_tensors(
    optimizers: list[Optimizer], model: nn.Module
) -> tuple[Tensors, dict[str, Any]]:
    """Return the state of the optimizers by parameter name: tensors, and other values."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    values = {
        f"{index}/{names[parameter]}/{key}": value
        for index, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def load_optimizer_tensors(
    optimizers: list[Optimizer], model: nn.Module, tensors: Tensors, scalars: dict[str, Any]
) -> None:
    """Restore the optimizer state by parameter name; the parameters may be in any order."""
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
        text = "the checkpoint was written with other optimizers (optim.name). Keep optim.name, or"
        raise UserError(f"{text} start a new run from its weights with init_from=FOLDER.")

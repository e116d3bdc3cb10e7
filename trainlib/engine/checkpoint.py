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

import contextlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
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
        self._writing: Future[None] | None = None

    def save(
        self, step: int, model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Take a snapshot and write it in the background.

        Raises UserError if the previous snapshot could not be written.
        """
        self.join()
        if not self.writes:
            return
        weights = _snapshot(dict(model.named_parameters()))
        state = json.loads(json.dumps(state))
        self._writing = self._thread.submit(self._write, step, weights, _snapshot(tensors), state)

    def save_best(self, model: nn.Module, name: str, record: dict[str, Any]) -> None:
        """Write best/ in the background: the weights, and `record` in the file `name`.

        Raises UserError if the previous snapshot could not be written.
        """
        self.join()
        weights = _snapshot(dict(model.named_parameters()))
        self._writing = self._thread.submit(self._write_best, weights, name, json.dumps(record))

    def _write_best(self, weights: dict[str, Tensor], name: str, record: str) -> None:
        with self._new_folder("best", weights) as partial:
            (partial / name).write_text(record, encoding="utf-8")

    def join(self) -> None:
        """Wait until the last snapshot is on disk; raises UserError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.folder}: a checkpoint could not be written ({error}). The previous one,"
                    " if any, is intact. Free some space, then rerun the command to resume."
                ) from error

    def _write(
        self, step: int, weights: dict[str, Tensor], tensors: dict[str, Tensor], state: Any
    ) -> None:
        """Write a step folder, point `latest` to it, and remove the oldest folders."""
        name = f"step_{step:06d}"
        # Remove what a killed process left behind; no other thread writes here.
        for partial in self.folder.glob(".writing-*"):
            shutil.rmtree(partial, ignore_errors=True)
        with self._new_folder(name, weights) as partial:
            _save_tensors(tensors, partial / "optimizer.safetensors")
            (partial / "train_state.json").write_text(json.dumps(state), encoding="utf-8")
        write_atomically(self.folder / "latest", name)
        # After a resume from an earlier checkpoint, ignore the later folders.
        up_to_step = [path for path in self._step_folders() if _step(path) <= step]
        for old in up_to_step[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _step_folders(self) -> list[Path]:
        """Return the complete step folders, sorted by number because names differ in width."""
        names = (path for path in self.folder.glob("step_*") if path.name[5:].isdigit())
        return sorted(names, key=_step)

    @contextlib.contextmanager
    def _new_folder(self, name: str, weights: dict[str, Tensor]) -> Iterator[Path]:
        """Yield a temporary model folder to add files to; sync and rename it on exit."""
        partial, folder = self.folder / f".writing-{name}", self.folder / name
        old = self.folder / ".writing-old"
        try:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            for file_name, content in self.extra_files.items():
                (partial / file_name).write_text(content, encoding="utf-8")
            if (self.folder / "run.yaml").is_file():
                shutil.copyfile(self.folder / "run.yaml", partial / "run.yaml")
            _save_tensors(weights, partial / "model.safetensors")
            yield partial
            for path in (*partial.iterdir(), partial):
                sync(path)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(self.folder)
        finally:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)

    def write_final(self, model: nn.Module, files: dict[str, bytes] | None = None) -> None:
        """Write final/, the model folder from which the next stage starts.

        `files` are further files by name; run.yaml among them replaces the copy of the run's.
        Raises UserError if the folder cannot be written.
        """
        if not self.writes:
            return
        try:
            with self._new_folder("final", _snapshot(dict(model.named_parameters()))) as partial:
                for name, content in (files or {}).items():
                    (partial / name).write_bytes(content)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / 'final'}: could not be written ({error}). The last checkpoint is"
                " intact. Free some space, then rerun the command to resume."
            ) from error

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


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


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

"""Tests that a run records its code, and that a resume says what changed."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml

from trainlib.core.files import ROOT
from trainlib.engine import code


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a copy of the project's code in a git repository of its own."""
    copy = tmp_path / "project"
    skipped = shutil.ignore_patterns("__pycache__", "*.json")
    for name in ("train.py", *code.COMPUTES):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, copy / name)
    for command in ("init -q", "add .", "-c user.name=N -c user.email=E commit -qm first"):
        subprocess.run(["git", "-C", copy, *command.split()], check=True)
    monkeypatch.setattr(code, "ROOT", copy)
    code.code_digests.cache_clear()
    yield copy
    code.code_digests.cache_clear()


def step_folder(folder, step, record):
    path = folder / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "run.yaml").write_text(yaml.safe_dump({"precision": "fp32", "code": record}))
    return path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    code.code_digests.cache_clear()


def test_a_resume_says_which_code_changed(project, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    first = code.record_code(folder, "pretrain", None)
    head = subprocess.run(["git", "-C", project, "rev-parse", "HEAD"], capture_output=True)
    assert first["commit"] == head.stdout.decode().strip()
    assert first["clean"] and not (folder / "code.diff").exists()
    assert "train.py" in first["files"] and "sft_train.py" not in first["files"]
    edit(project / "trainlib/engine/losses.py", "import torch\n", "import torch\n\nHALF = 0.5\n")
    (project / "kernels/new.py").write_text("NEW = 1\n")
    code.code_digests.cache_clear()
    second = code.record_code(folder, "pretrain", step_folder(folder, 200, first))
    changed = ["kernels/new.py", "trainlib/engine/losses.py"]
    assert second["changes"] == [{"step": 200, "files": changed}] and not second["clean"]
    assert "the code has changed since" in caplog.text and ", ".join(changed) in caplog.text
    diff = (folder / "code.step_000200.diff").read_text(encoding="utf-8")
    assert "+HALF = 0.5" in diff and "+NEW = 1" in diff
    caplog.clear()
    third = code.record_code(folder, "pretrain", step_folder(folder, 300, second))
    assert third == second and "changed" not in caplog.text


def test_comments_and_docstrings_are_not_code(project, tmp_path):
    before = code.code_digest("pretrain")
    edit(project / "model.py", "@dataclass(frozen=True)\nclass ModelConfig:\n",
         "# A comment.\n@dataclass(\n    frozen=True\n)\nclass ModelConfig:\n")  # fmt: skip
    edit(project / "model.py", "Dimensions of the decoder, with their", "Sizes of it, with their")
    assert code.code_digest("pretrain") == before
    edit(project / "model.py", "rope_theta: float = field(default=10000.0",
         "rope_theta: float = field(default=20000.0")  # fmt: skip
    assert code.code_digest("pretrain") != before


def test_a_run_without_a_record_is_not_compared(project, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    old = step_folder(folder, 200, None)
    caplog.set_level("INFO")
    record = code.record_code(folder, "pretrain", old)
    assert "does not record its code" in caplog.text and "changes" not in record
    (old / "run.yaml").write_bytes(b"\xff\xfe: [")
    assert code.record_code(folder, "pretrain", old) == record


def test_a_project_outside_a_repository_is_recorded_too(project, tmp_path):
    shutil.rmtree(project / ".git")
    record = code.record_code(tmp_path, "pretrain", None)
    assert record["commit"] == "unknown" and len(record["files"]) > 20


def test_changes_are_kept_although_the_code_before_is_unknown(project, tmp_path):
    edit(project / "trainlib/engine/losses.py", "import torch\n", "import torch\n\nHALF = 0.5\n")
    old = step_folder(tmp_path, 200, {"files": None})
    assert not code.record_code(tmp_path, "pretrain", old)["clean"]
    assert "+HALF = 0.5" in (tmp_path / "code.step_000200.diff").read_text(encoding="utf-8")

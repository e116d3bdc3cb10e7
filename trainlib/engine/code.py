"""The code that a run computes with: digests of its files, the git commit, uncommitted changes."""

import ast
import functools
import hashlib
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from trainlib.core.files import ROOT, write_atomically
from trainlib.data.formats import STAGES

log = logging.getLogger(__name__)

COMPUTES = (
    *("model.py", "dataset.py", "kernels", "tokenizer", "trainlib/data"),
    *(f"trainlib/engine/{name}.py" for name in ("kernels", "losses", "optim", "step")),
    *("trainlib/models/hf_folder.py", "trainlib/evaluation/preferences.py"),
)
"""Files and folders that affect the weights, besides the script of the stage."""


class _NoStrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # noqa: N802  # The name ast calls.
        return None if isinstance(node.value, ast.Constant) else node


@functools.cache
def code_digests(stage: str) -> dict[str, str]:
    """Return a digest of each file that computes; comments, docstrings and layout do not count."""
    digests = {}
    for path in (ROOT / name for name in (STAGES[stage], *COMPUTES)):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (file for file in files if file.suffix in (".py", ".yaml")):
            code = file.read_text(encoding="utf-8")
            if file.suffix == ".py":
                code = ast.unparse(_NoStrings().visit(ast.parse(code)))
            digests[file.relative_to(ROOT).as_posix()] = _digest(code)
    return digests


def code_digest(stage: str) -> str:
    """Return one digest of all files that compute."""
    return _digest(str(code_digests(stage)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record_code(folder: Path, stage: str, resume_from: Path | None) -> dict[str, Any]:
    """Return what run.yaml records of the code; write code.diff if it has uncommitted changes.

    A resume keeps the record of its step folder, and lists files that changed since with its step.
    """
    new = _git("ls-files", "--others", "--exclude-standard", "--", STAGES[stage], *COMPUTES)
    diff = _git("diff", "HEAD", "--", "*.py")
    diff += "".join(_git("diff", "--no-index", "/dev/null", file) for file in new.splitlines())
    commit = _git("rev-parse", "HEAD").strip() or "unknown"
    record: dict[str, Any] = {"commit": commit, "clean": not diff, "torch": str(torch.__version__)}
    record |= {"digest": code_digest(stage), "files": code_digests(stage)}
    file = "code.diff"
    if resume_from is not None:
        before = saved_settings(resume_from).get("code")
        file = f"code.{resume_from.name}.diff"
        if not isinstance(before, dict) or not isinstance(before.get("files"), dict):
            log.info("%s does not record its code, so the code is not compared", resume_from)
        else:
            old, now = ({"torch": r.get("torch"), **r["files"]} for r in (before, record))
            changed = [name for name in sorted({*old, *now}) if old.get(name) != now.get(name)]
            if not changed:
                return before
            log.warning("the code has changed since %s: %s. The run continues with the changed "
                        "code: its result differs.", resume_from, ", ".join(changed))  # fmt: skip
            change = {"step": int(resume_from.name[5:]), "files": changed}
            record["changes"] = [*before.get("changes", []), change]
    if diff:
        write_atomically(folder / file, diff)
    return record


def saved_settings(step_folder: Path) -> dict[str, Any]:
    """Return the run.yaml that a step folder was written with; empty if it cannot be read."""
    try:
        return dict(yaml.safe_load((step_folder / "run.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def _git(*arguments: str) -> str:
    """Return the output of a git command in the project; empty without git or a repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")

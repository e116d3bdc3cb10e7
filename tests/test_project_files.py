"""Tests for files that external tools read: hooks, CI, Makefile, citation and issue form."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_hooks_run_the_lint_commands_and_download_nothing():
    (repo,) = load(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    entries = [hook["entry"].split(" --")[0] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    in_makefile = re.findall(r"\$\(BIN\)/(ruff (?:check|format))", makefile)
    assert entries == [f".venv/bin/{command}" for command in in_makefile]


def make(*words: str, **env: str) -> str:
    """Return what make prints, with a fake curl that reaches only $FAKE_REACHABLE."""
    path = f"{ROOT / 'tests/docker/fakes'}:{os.environ['PATH']}"
    command = ["make", "--no-print-directory", "-f", "Makefile", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path, **env}
    )
    return done.stdout + done.stderr


def test_make_alone_describes_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert "demo" in targets
    assert sorted(re.findall(r"^make (\S+) +\S", make(), re.M)) == sorted(targets)


def test_mirror_chooses_the_first_index_that_responds(tmp_path):
    extra = tmp_path / "show.mk"
    extra.write_text("show:\n\t@echo pip $$PIP_INDEX_URL, torch $(TORCH_CPU)\n")
    show = ("-f", str(extra), "show")
    mirrors = (ROOT / "docker/mirrors.conf").read_text(encoding="utf-8")
    first, second = re.findall(r"^pip cn (\S+)", mirrors, re.M)[:2]
    torch = re.search(r"^torch-cpu cn (\S+)", mirrors, re.M)[1]
    assert f"pip {first}, torch {torch}" in make(*show, "MIRROR=cn", FAKE_REACHABLE=".")
    out = make(*show, "MIRROR=cn", FAKE_REACHABLE=f"{second}|{torch}")
    assert f"pip {second}, torch {torch}" in out
    assert "MIRROR=cn: no package index" in make(
        *show, "MIRROR=cn", FAKE_REACHABLE="nothing answers"
    )
    assert first not in make(*show) and "download.pytorch.org" in make(*show)


def test_the_github_workflow_runs_the_ci_script():
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_citation_has_the_current_version():
    citation = load("CITATION.cff")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
    assert citation["license"] == (ROOT / "LICENSE").read_text(encoding="utf-8").split()[0]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_issue_form_requires_the_environment():
    form = load(".github/ISSUE_TEMPLATE/problem.yml")
    assert form["name"] and form["description"]
    fields = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    environment = fields["environment"]
    assert environment["validations"]["required"]
    hint = environment["attributes"]["description"]
    assert "./build.sh doctor" in hint and "python -m torch.utils.collect_env" in hint

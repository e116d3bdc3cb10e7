"""Protects files that external tools read: hooks, citation, issue form."""

from __future__ import annotations

import re
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

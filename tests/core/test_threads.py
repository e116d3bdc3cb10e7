"""Tests for the settings that precede the import of torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("bench/*.py")]


def settings(code: str, **variables: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP", "OMP"))}
    command = [sys.executable, "-c", f"import trainlib.core.threads, os; {code}"]
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "variables, expected",
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_a_spin_count_that_the_user_set_is_kept(variables, expected):
    assert settings("print(os.environ.get('GOMP_SPINCOUNT'))", **variables) == expected


def test_a_request_to_save_never_kills():
    code = "import signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    assert settings(code) == "alive"


def test_it_is_the_first_import_of_every_program():
    programs = [path for path in PROGRAMS if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) > 15
    for path in programs:
        imports = re.findall(r"^(?:import|from) .*", path.read_text(encoding="utf-8"), re.M)
        first, *_ = (line for line in imports if "__future__" not in line)
        assert first.startswith("import trainlib.core.threads"), path


def test_importing_it_does_not_import_torch():
    assert settings("import sys; print('torch' in sys.modules)") == "False"

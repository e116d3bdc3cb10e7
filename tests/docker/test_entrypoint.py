"""Tests that training runs in a container are logged and stopped, no matter how they were started.

The tests need no Docker engine: they use a plain PID namespace, and nsenter in place of `docker
exec`. There is no Docker init, which makes stopping harder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.docker.driving import ROOT

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
if os.geteuid() or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
    pytest.skip("needs permission to create a PID namespace", allow_module_level=True)

TRAINER = """
import signal, sys, time
def save(*_):
    time.sleep(float(sys.argv[2]))
    open(sys.argv[1], "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + ".ready", "w").close()
while True:
    time.sleep(0.05)
"""


class Container:
    """The entrypoint, running as the first process of a PID namespace, and its output."""

    def __init__(self, folder: Path, *command: str, **env: str) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.runs.mkdir(exist_ok=True)
        self.output = folder / "output"
        self.process = subprocess.Popen(
            [*UNSHARE, "bash", str(ROOT / "docker/entrypoint.sh"), *command],
            env={"PATH": os.environ["PATH"], "RUNS": str(self.runs), **env},
            stdout=self.output.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.main_pid = 0
        if not command:
            self.wait(lambda: "profile" in self.logs())
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            self.main_pid = int(children.read_text().split()[0])

    def logs(self) -> str:
        return self.output.read_text()

    def exec(self, *command: str) -> subprocess.Popen:
        """Run a command in the namespace, as `docker exec` does."""
        enter = ["nsenter", "--target", str(self.main_pid), "--pid", "--mount"]
        return subprocess.Popen(
            [*enter, *command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def train(self, name: str, seconds: float) -> None:
        """Start a process that takes this many seconds to save."""
        result = self.folder / name
        self.exec("python3", "-c", TRAINER, str(result), str(seconds))
        self.wait(result.with_suffix(".ready").exists)

    def wait(self, condition, limit: float = 30) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.05)

    def stop(self) -> float:
        """Send SIGTERM as the engine does; return the seconds until the container exits."""
        started = time.monotonic()
        os.kill(self.main_pid, signal.SIGTERM)
        self.process.wait(timeout=60)
        return time.monotonic() - started


@pytest.fixture
def start(tmp_path):
    started: list[Container] = []

    def begin(*command: str, **env: str) -> Container:
        started.append(Container(tmp_path, *command, **env))
        return started[-1]

    yield begin
    for container in started:
        container.process.kill()
        container.process.wait()


def test_two_training_runs_save_and_a_shell_does_not_delay_them(start):
    container = start()
    container.train("one", 0.5)
    container.train("two", 1.5)
    # An interactive shell ignores SIGTERM.
    shell = container.exec("bash", "--norc", "-i")
    elapsed = container.stop()
    shell.wait(timeout=10)
    assert container.process.returncode == 0
    for name in ("one", "two"):
        assert (container.folder / name).read_text() == "saved"
    assert elapsed < 15 and "all processes exited" in container.logs()


def test_processes_that_do_not_exit_are_reported(start):
    container = start(STOP_WAIT="2")
    container.train("slow", 600)
    assert container.stop() < 15
    assert "did not exit within 2 s" in container.logs()


def test_stop_is_immediate_when_nothing_is_training(start):
    assert start().stop() < 5


def test_log_lines_are_printed_complete_and_only_once(start):
    container = start()
    (container.runs / "a").mkdir()
    log = container.runs / "a/train.log"
    with log.open("w") as file:
        file.write("step 1\nste")
        file.flush()
        container.wait(lambda: "[a] step 1\n" in container.logs())
        time.sleep(1.2)
        assert "ste\n" not in container.logs()
        file.write("p 2\nbar 50%\rbar 100%\rstep 3\r\n")
        file.flush()
        container.wait(lambda: "[a] step 3\n" in container.logs())
    output = container.logs()
    assert output.count("step 1") == 1 and "[a] step 2\n" in output and "\r" not in output


def test_nested_runs_and_new_runs_with_a_reused_name_are_logged(start):
    container = start()
    first, deep = container.runs / "a", container.runs / "b/c"
    first.mkdir()
    deep.mkdir(parents=True)
    (first / "train.log").write_text("old 1\nold 2\n")
    container.wait(lambda: "[a] old 2" in container.logs())
    shutil.move(first, container.runs / "a.1")
    first.mkdir()
    (first / "train.log").write_text("new 1\n")
    (deep / "train.log").write_text("deep 1\n")
    container.wait(lambda: "[a] new 1" in container.logs() and "[b/c] deep 1" in container.logs())
    assert container.logs().count("[a] new 1") == 1


def test_lines_written_before_the_start_are_not_printed(start, tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    log = tmp_path / "runs/a/train.log"
    log.write_text("yesterday\n")
    container = start()
    with log.open("a") as file:
        file.write("today\n")
    container.wait(lambda: "[a] today" in container.logs())
    assert "yesterday" not in container.logs()


def test_a_command_other_than_idle_is_executed(start):
    container = start("echo", "a command")
    assert container.process.wait(timeout=10) == 0
    assert container.logs() == "a command\n"


def test_output_and_exit_code_of_a_failed_train_command_are_logged(start):
    container = start(TRAIN_COMMAND="echo its output; exit 3")
    container.wait(lambda: "TRAIN_COMMAND exited with code 3" in container.logs())
    assert "its output" in container.logs()  # Printed because the command failed.
    assert container.stop() < 5

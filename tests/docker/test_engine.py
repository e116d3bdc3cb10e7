"""Tests for the container workflow on a real Docker engine, with the commands that a user types.

If `docker info` fails, these tests are skipped; under CI, they fail.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.docker.driving import ROOT

ENGINE = (
    shutil.which("docker")
    and not subprocess.run(["docker", "info"], capture_output=True).returncode
)
if not ENGINE and not os.environ.get("CI"):
    pytest.skip("needs a Docker engine", allow_module_level=True)

USERS = [None]
if os.geteuid() == 0:
    USERS.append("train-llm-tester")  # A regular user in the docker group.
# Use one thread, because several runs train at once. Each step takes milliseconds.
TRAIN = (
    "env OMP_NUM_THREADS=1 python train.py configs/tiny_pretrain.yaml max_steps=1000000 "
    "save_every_steps=1000000 log_every_steps=1 eval_every_steps=0 data.files=dataset/text.jsonl "
    "data.val_max_rows=2 tokens_per_step=4096 sequence_length=128 precision=fp32 "
    "model.hidden_size=64 model.intermediate_size=128 model.num_hidden_layers=1 "
    "model.num_attention_heads=2 model.num_key_value_heads=1 model.head_dim=32"
)
REPORT: list[str] = []


class Clone:
    """A user's clone of the working tree, in which commands are run."""

    def __init__(self, folder: Path, user: str | None) -> None:
        self.folder, self.user = folder, user
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        changed = ["git", "ls-files", "-mo", "--exclude-standard"]
        for name in subprocess.run(
            changed, cwd=ROOT, capture_output=True, text=True
        ).stdout.split():
            source = ROOT / name
            if source.is_file() and not source.is_symlink():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / name)
        rows = [json.dumps({"text": f"{i} and {i} make {2 * i}. " * 30}) for i in range(500)]
        (folder / "dataset/text.jsonl").write_text("\n".join(rows) + "\n")
        if user:
            subprocess.run(["chown", "-R", user, str(folder)], check=True)

    def __call__(self, command: str, check: bool = True, limit: int = 900, **env: str) -> str:
        """Run a shell command as the user; return its standard output and error."""
        done = subprocess.run(
            [*self._as(), "bash", "-c", command], cwd=self.folder, text=True, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=self._env(env),
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def start(self, command: str) -> subprocess.Popen:
        """Start a shell command in the background."""
        return subprocess.Popen(
            [*self._as(), "bash", "-c", command], cwd=self.folder, text=True, env=self._env({}),
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _as(self) -> list[str]:
        if not self.user:
            return []
        keep = "--init-groups"
        return [
            "setpriv",
            "--reuid",
            self.user,
            "--regid",
            str(pwd.getpwnam(self.user).pw_gid),
            keep,
        ]

    def _env(self, more: dict[str, str]) -> dict[str, str]:
        home = pwd.getpwnam(self.user).pw_dir if self.user else "/root"
        return {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", **more}

    def env(self, key: str) -> str:
        """Return the last value of a key in .env."""
        return re.findall(rf"^{key}=(.*)$", (self.folder / ".env").read_text(), re.M)[-1]

    @property
    def container(self) -> str:
        return self.env("TRAIN_LLM_CONTAINER")

    def inspect(self, form: str) -> str:
        """Return a property of the container."""
        return self(f"docker inspect {self.container} --format '{form}'").strip()

    def logged(self, run: str) -> list[int]:
        """Return the steps in a run's train.log."""
        path = self.folder / "runs" / run / "train.log"
        text = path.read_text() if path.exists() else ""
        return [int(number) for number in re.findall(r"^step +(\d+)", text, re.M)]

    def wait(self, description: str, condition, limit: float = 120) -> None:
        """Wait until a condition is true."""
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"timed out waiting for {description}"
            time.sleep(0.5)


@pytest.fixture(scope="module", params=USERS, ids=lambda user: user or "me")
def clone(request, tmp_path_factory):
    """Yield a clone with a built image and a running container."""
    user = request.param
    if user:
        subprocess.run(
            ["useradd", "--create-home", "--groups", "docker", user], capture_output=True
        )
    base = Path("/var/tmp") / f"train_llm_test_{os.getpid()}" / (user or "me")
    base.parent.mkdir(exist_ok=True)
    base.parent.chmod(0o755)
    base.mkdir(mode=0o755)
    clone = Clone(base / "Train LLM", user)
    started = time.monotonic()
    clone("./build.sh cpu")
    REPORT.append(f"{user or 'root'}: build {time.monotonic() - started:.0f} s")
    clone("docker compose up -d train")
    yield clone
    print("\n".join(REPORT))
    clone("docker compose down -v", check=False)
    clone(f"docker image rm {clone.env('TRAIN_LLM_IMAGE')}", check=False)
    shutil.rmtree(base.parent if user or os.geteuid() else base, ignore_errors=True)


def skip_second_user(clone: Clone) -> None:
    """Skip the test for the second user, because it does not depend on the user."""
    if clone.user:
        pytest.skip("does not depend on the user")


def test_training_started_by_exec_is_logged_and_saves_on_stop(clone):
    training = clone.start(f"docker compose exec -T train {TRAIN} out_dir=runs/one")
    second = clone.start(f"docker compose exec -T train {TRAIN} out_dir=runs/more/two seed=1")
    # Also run an interactive shell, which ignores SIGTERM (moby#35703).
    shell = clone.start(f"script -qec 'docker exec -it {clone.container} bash' /dev/null")
    clone.wait(
        "both runs to log", lambda: min(len(clone.logged("one")), len(clone.logged("more/two"))) > 3
    )
    time.sleep(2.5)
    logs = clone("docker compose logs --no-color train")
    for run in ("one", "more/two"):
        lines = re.findall(rf"\[{run}\] (.*)", logs)
        assert len(lines) > 2
        written = (clone.folder / "runs" / run / "train.log").read_text().splitlines()
        assert lines == written[: len(lines)]
    assert "\r" not in logs.replace("\r\n", "\n")
    started = time.monotonic()
    clone("docker compose stop train", limit=130)
    elapsed = time.monotonic() - started
    REPORT.append(f"{clone.user or 'root'}: stop with two training runs {elapsed:.1f} s")
    assert elapsed < 60
    for run in ("one", "more/two"):
        (saved,) = (clone.folder / "runs" / run).glob("step_*")
        step, last = int(saved.name.split("_")[1]), clone.logged(run)[-1]
        assert last <= step <= last + 2
        owner = saved.stat().st_uid
        assert owner == (pwd.getpwnam(clone.user).pw_uid if clone.user else os.geteuid())
    for process in (training, second, shell):
        process.stdin.close()
        process.wait(timeout=30)
    code = clone.inspect("{{.State.ExitCode}}")
    assert code.strip() == "0"


def test_a_run_resumes_after_a_stop(clone):
    clone("docker compose up -d train")
    step = int(next((clone.folder / "runs/one").glob("step_*")).name.split("_")[1])
    training = clone.start(f"docker compose exec -T train {TRAIN} out_dir=runs/one")
    clone.wait("the run to resume", lambda: clone.logged("one")[-1] > step)
    text = (clone.folder / "runs/one/train.log").read_text()
    assert f"resuming from step {step}" in text
    clone(f"docker exec {clone.container} pkill -TERM -f train.py")
    training.wait(timeout=60)


def test_the_container_runs_as_the_user(clone):
    uid = pwd.getpwnam(clone.user).pw_uid if clone.user else os.geteuid()
    assert clone("docker compose exec -T train id -u").strip() == str(uid)
    out = clone(
        "docker compose exec -T train python -c 'import getpass, torch, pyarrow, zstandard;"
        "print(getpass.getuser(), torch.cuda.is_available())'"
    )
    assert out.split()[-1] == "False"
    size = int(clone.inspect("{{.HostConfig.ShmSize}}"))
    assert size == 2 << 30
    image = clone.env("TRAIN_LLM_IMAGE")
    # An id without a user name works too, although torch looks up the name.
    clone(
        f"docker run --rm --user 4242 {image} python -c 'import getpass, torch; getpass.getuser()'"
    )
    megabytes = int(clone(f"docker image inspect {image} --format '{{{{.Size}}}}'")) // 1_000_000
    REPORT.append(f"image {megabytes} MB")
    assert megabytes < 3000
    assert "gcc" in clone("docker compose exec -T train gcc --version")


def test_tensorboard_is_reachable_only_from_this_machine(clone):
    port = clone.env("TB_PORT")

    def responds(host: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/", timeout=5) as page:
                return page.status == 200
        except OSError:
            return False

    clone.wait("TensorBoard to respond", lambda: responds("127.0.0.1"), 90)
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    addresses = re.findall(rf": (\w+):{int(port):04X} \w+:\w+ 0A", listening)
    assert addresses and set(addresses) == {"0100007F"}
    # The mount of runs/ is read-only.
    name = clone("docker compose ps -q tensorboard").strip()
    assert "Read-only" in clone(f"docker exec {name} touch /workspace/runs/x", check=False)


def test_doctor_passes_and_prints_an_anonymous_report(clone):
    skip_second_user(clone)
    out = clone("./build.sh doctor")
    for check in ("engine", "container", "one matmul", "two ranks", "disk", "data", "ten steps"):
        assert f"OK {check}:" in out, out
    report = out.split("```")[1]
    assert str(clone.folder) not in report and (clone.user or "/root") not in report


def test_tensorboard_uses_another_port_when_its_port_is_taken(clone):
    skip_second_user(clone)
    clone("docker compose stop")
    port = int(clone.env("TB_PORT"))
    with socket.create_server(("127.0.0.1", port)):
        clone("./build.sh cpu --env-only")
        assert int(clone.env("TB_PORT")) != port
        clone("docker compose up -d train")
        assert clone("docker compose ps").count("Up") >= 2
    clone("./build.sh cpu --env-only && docker compose up -d train")


def test_gpu_overlay_requests_the_selected_devices(clone):
    """With a fake NVIDIA hook, a container that requests GPUs starts on a host without any."""
    skip_second_user(clone)
    overlay = "docker-compose.yml:docker-compose.gpu.yml"
    env = {"COMPOSE_FILE": overlay, "CUDA_DEVICES": "0,1", "GPU_PROFILE": "rtx40"}
    out = clone("docker compose up -d train; echo ended with $?", check=False, **env)
    if "could not select device driver" in out:
        (clone.folder / "log").write_text(out)
        fixes = clone(". docker/lib/say.sh; . docker/lib/fixes.sh; print_fixes log")
        assert "nvidia-container-toolkit" in fixes
        clone("docker compose up -d train")
        return
    assert "ended with 0" in out, out
    request = json.loads(clone.inspect("{{json .HostConfig.DeviceRequests}}"))  # fmt: skip
    assert request[0]["DeviceIDs"] == ["0,1"] and request[0]["Driver"] == "nvidia"
    # The engine sets NVIDIA_VISIBLE_DEVICES in the main process, Compose sets CUDA_DEVICES.
    seen = clone("docker compose exec -T train cat /proc/1/environ", **env).split("\0")
    assert {"NVIDIA_VISIBLE_DEVICES=0,1", "CUDA_DEVICES=0,1"} <= set(seen)
    training = f"docker compose exec -T train {TRAIN} device=cuda out_dir=runs/card"
    output = clone(training, check=False, **env)
    assert "no CUDA device" in output
    clone("docker compose up -d train")


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose")
def test_docker_compose_with_a_hyphen_works(clone):
    skip_second_user(clone)
    clone("docker-compose down && docker-compose up -d train", COMPOSE_API_VERSION="1.41")
    clone("docker-compose exec -T train python train.py --help")
    assert "ready" in clone("docker-compose logs train")
    training = clone.start(f"docker-compose exec -T train {TRAIN} out_dir=runs/old")
    clone.wait("the run to train", lambda: len(clone.logged("old")) > 2)
    clone("docker-compose stop", limit=130)
    training.wait(timeout=30)
    assert list((clone.folder / "runs/old").glob("step_*"))
    clone("docker-compose down")


def test_train_command_runs_when_the_container_starts(clone):
    skip_second_user(clone)
    command = f"{TRAIN} out_dir=runs/alone".replace("max_steps=1000000", "max_steps=3")
    with (clone.folder / ".env").open("a") as file:
        file.write(f"TRAIN_COMMAND={command}\nTRAIN_RESTART=unless-stopped\n")
    clone("docker compose up -d train")
    clone.wait("the run to finish", lambda: (clone.folder / "runs/alone/final").is_dir())
    clone.wait("a log", lambda: "exited with code 0" in clone("docker compose logs train"), 20)
    assert clone.inspect("{{.HostConfig.RestartPolicy.Name}}") == "unless-stopped"


def test_two_clones_with_the_same_name_coexist(clone, tmp_path_factory):
    skip_second_user(clone)
    before = clone.inspect("{{.Id}} {{.State.StartedAt}}")
    other = Clone(clone.folder.parent / "other" / clone.folder.name, None)
    other("./build.sh cpu --env-only")
    image = f"TRAIN_LLM_IMAGE={clone.env('TRAIN_LLM_IMAGE')}\n"  # The image is the same.
    with (other.folder / ".env").open("a") as file:
        file.write(image)
    try:
        other("docker compose up -d train")
        assert other.container != clone.container and other.env("TB_PORT") != clone.env("TB_PORT")
        now = clone.inspect("{{.Id}} {{.State.StartedAt}}")
        assert now == before
    finally:
        other("docker compose down -v", check=False)
    assert "Up" in clone("docker compose ps train")


def test_rebuilds_use_cached_layers(clone):
    with (clone.folder / "train.py").open("a") as file:
        file.write("# a change\n")
    started = time.monotonic()
    out = clone("./build.sh cpu")
    elapsed = time.monotonic() - started
    REPORT.append(f"{clone.user or 'root'}: rebuild after a code change {elapsed:.1f} s")
    assert elapsed < 10 and out.count("CACHED") >= 4
    if clone.user:
        return
    lock = clone.folder / "docker/requirements.lock"
    lock.write_text(re.sub(r"zstandard==.*\n( .*\n)+", "", lock.read_text()))
    started = time.monotonic()
    out = clone("./build.sh cpu")
    elapsed = time.monotonic() - started
    REPORT.append(f"rebuild after a requirements change {elapsed:.1f} s (wheels from the cache)")
    assert elapsed < 120
    assert "Collecting torch" not in out
    clone("git checkout docker/requirements.lock && ./build.sh cpu")

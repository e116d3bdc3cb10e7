"""Tests for .env, how Compose reads it, package mirrors, and the fixes for known failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml

from tests.docker.driving import ROOT, build
from tests.docker.fixtures import MACHINES, eight

BASH_SOURCES = [ROOT / "build.sh", *sorted((ROOT / "docker/lib").glob("*.sh"))]


# ---- .env ----------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing(tmp_path):
    build(tmp_path, "--env-only")
    first = (tmp_path / ".env").read_bytes()
    build(tmp_path, "--env-only")
    assert (tmp_path / ".env").read_bytes() == first
    assert not (tmp_path / ".env.bak").exists()


def test_user_lines_are_kept_below_the_block(tmp_path):
    own = '# mine\r\nSHM_SIZE="12gb" # a note\r\nTB_PORT=7000\r\nWANDB="a b=c"\r\n'
    (tmp_path / ".env").write_bytes(own.encode())
    result = build(tmp_path, "--env-only", cards=eight(set()))
    assert result.code == 0, result.err
    text = (tmp_path / ".env").read_text()
    assert text.endswith('# mine\nSHM_SIZE="12gb" # a note\nTB_PORT=7000\nWANDB="a b=c"\n')
    assert (tmp_path / ".env.bak").read_bytes() == own.encode()
    assert text.startswith("# >>> written by build.sh")
    # The block uses the user's values. A different profile replaces only the block.
    assert text.count("SHM_SIZE=") == 2 and "SHM_SIZE=12gb\n" in text
    build(tmp_path, "cpu", "--env-only")
    again = (tmp_path / ".env").read_text()
    assert "GPU_PROFILE=cpu" in again and "a100" not in again and again.count("# mine") == 1


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_env_file_keeps_its_mode(mode, tmp_path):
    file = tmp_path / ".env"
    file.write_text("HF_TOKEN=secret\n")
    file.chmod(mode)
    assert build(tmp_path, "--env-only").code == 0
    assert file.read_text().startswith("# >>> written") and "HF_TOKEN=secret" in file.read_text()
    for path in (file, tmp_path / ".env.bak"):
        assert path.stat().st_mode & 0o777 == mode


def test_the_block_of_the_doctor_has_no_secrets(tmp_path):
    file = tmp_path / ".env"
    file.write_text("SWANLAB_API_KEY='swan.lake.12'\nPIP_INDEX_URLS=http://me:pass%40w@host/x\n")
    text = (
        "http_proxy http://ann:top@secret@10.0.0.2:3128/a https://b:c1@host\nHF_TOKEN=hf_abcdefgh "
        'then "my_password": "p4ss", AWS_SECRET_KEY=x/y+z; WANDB_API_KEY is 0123abcd, swan.lake.12 '
        f"Bearer eyJh /home/ann/private {tmp_path}/my/thesis /root/.ssh torch 2.13.0, CUDA 13: fine"
    )
    script = (f'ENV_FILE={file}; ROOT=/nowhere; . "{ROOT}/docker/lib/envfile.sh"; '
              f'. "{ROOT}/docker/lib/doctor.sh"; printf "%s\\n" "$1" | anonymize')  # fmt: skip
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_API_KEY": "0123abcd"}
    out = subprocess.check_output(["bash", "-c", script, "-", text], text=True, env=env)
    for word in ("ann", "top", "secret@", "c1", "abcdefgh", "p4ss", "x/y", "0123abcd", "swan.lake",
                 "eyJh", "private", str(tmp_path), "thesis", ".ssh"):  # fmt: skip
        assert word not in out, out
    for word in ("10.0.0.2:3128/a", "@host", "HF_TOKEN", "torch 2.13.0, CUDA 13: fine"):
        assert word in out, out


def test_build_fails_when_env_file_cannot_be_written(tmp_path):
    result = build(tmp_path, "--env-only", ENV_FILE=str(tmp_path / "no/such/.env"))
    assert result.code == 2 and "cannot write" in result.err


def test_dry_run_writes_nothing(tmp_path):
    result = build(tmp_path, "--dry-run")
    assert "COMPOSE_FILE=docker-compose.yml" in result.out and not (tmp_path / ".env").exists()


def copy_scripts(folder: Path) -> Path:
    """Copy build.sh and the files that it needs; return the path of the copy."""
    for name in ("build.sh", "docker-compose.yml", "docker-compose.gpu.yml"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "docker", folder / "docker", dirs_exist_ok=True)
    shutil.copytree(ROOT / "configs", folder / "configs", dirs_exist_ok=True)
    return folder / "build.sh"


def test_folders_with_the_same_name_are_separate_projects(tmp_path):
    # compose#5104, #4939: Compose uses only the last part of the path
    environments = []
    for parent in ("ann", "bob", "with space"):
        script = copy_scripts(tmp_path / parent / "Train LLM")
        result = build(tmp_path, "--dry-run", script=script, FAKE_OWNER="/somebody/else")
        assert result.code == 0, result.err
        environments.append(result.env)
        assert result.env["COMPOSE_PROJECT_NAME"].startswith("train_llm_u")
        assert result.env["TRAIN_LLM_CONTAINER"].startswith("train_llm_")
    for key in ("COMPOSE_PROJECT_NAME", "TRAIN_LLM_CONTAINER", "TRAIN_LLM_IMAGE"):
        assert len({env[key] for env in environments}) == 3
    result = build(tmp_path, "--dry-run", FAKE_OWNER=str(ROOT))
    assert result.env["TRAIN_LLM_CONTAINER"] == "train_llm"


# ---- mirrors and proxies -------------------------------------------------------------------------


@pytest.mark.parametrize("mode, reachable, indices", [
    ("auto", ".", ""),  # the default index responds
    ("auto", "tuna|aliyun", "tuna aliyun"),
    ("cn", ".", "tuna aliyun ustc"),
    ("cn", "aliyun|ustc", "aliyun ustc"),  # tuna/issues#2603: refused requests for a day
    ("cn", "nothing", ""),
    ("off", "tuna", ""),
])  # fmt: skip
def test_mirrors_depend_on_the_mode_and_what_is_reachable(mode, reachable, indices, tmp_path):
    result = build(tmp_path, "--mirror", mode, "--dry-run", FAKE_REACHABLE=reachable)
    assert result.code == 0, result.err
    found = result.env["PIP_INDEX_URLS"].split()
    assert len(found) == len(indices.split())
    assert all(word in url for word, url in zip(indices.split(), found, strict=True))
    if mode == "cn" and not indices:
        assert "no mirror" in result.err


def test_user_addresses_override_mirrors(tmp_path):
    (tmp_path / ".env").write_text("PIP_INDEX_URLS=https://wheels.example/simple\nBASE_IMAGE=x:1\n")
    env = build(tmp_path, "--mirror", "cn", "--dry-run").env
    text = build(tmp_path, "--mirror", "cn", "--dry-run").out
    assert env["BASE_IMAGE"] == "x:1" and text.count("PIP_INDEX_URLS=https://wheels.example") == 2


@pytest.mark.parametrize("proxy, loopback", [
    ("http://127.0.0.1:7890", True), ("http://localhost:7890", True), ("socks5://[::1]:1080", True),
    ("http://user:pw@127.0.0.1:1", True), ("127.0.0.1:7890", True),
    ("http://10.0.0.2:3128", False), ("http://127.proxy.example:80", False),
    ("http://localhost.example:80", False),
])  # fmt: skip
def test_loopback_proxies_are_recognized(proxy, loopback, tmp_path):
    # docker/for-win#14706: inside a build, 127.0.0.1 is the build container
    script = f'. "{ROOT}/docker/lib/mirrors.sh"; proxy_is_loopback "$1"'
    done = subprocess.run(["/bin/bash", "-c", script, "x", proxy])
    assert (done.returncode == 0) == loopback


@pytest.mark.parametrize("message, fix", [
    # deepwiki-open#108, CosyVoice#1344
    ("failed to resolve source metadata for docker.io/library/python", "--mirror cn"),
    ("Could not find a version that satisfies the requirement (from versions: none)", "mirror off"),
    ("write /x: no space left on device", "docker builder prune --filter"),
    ("ERROR: BuildKit is enabled but the buildx component is missing or broken.", "buildx"),
    ("SSLError(SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "docker/certs"),
    ("THESE PACKAGES DO NOT MATCH THE HASHES", "damaged"),
    ("net/http: TLS handshake timeout", "run ./build.sh again"),
])  # fmt: skip
def test_a_failed_build_prints_the_fix(message, fix, tmp_path):
    (tmp_path / "log").write_text(message)
    script = copy_scripts(tmp_path / "clone")
    result = build(
        tmp_path, script=script, FAKE_BUILD_LOG=str(tmp_path / "log"), FAKE_BUILD_CODE="1",
    )  # fmt: skip
    assert result.code == 5 and fix in result.err, result.err
    assert "构建失败" in result.err


# ---- Compose -------------------------------------------------------------------------------------

COMPOSES = [
    command
    for command in (["docker-compose"], ["docker", "compose"])
    if shutil.which(command[0])
    and subprocess.run([*command, "version"], capture_output=True).returncode == 0
]
POLLUTED = {"CONTAINER_NAME": "x", "UID": "77", "USER_ID": "78", "IMAGE": "y", "PORT": "1"}


def render(command: list[str], files: str, env: dict[str, str], env_file: Path) -> dict:
    """Return the configuration that a version of Compose reads."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/root", "COMPOSE_FILE": files, **env}
    option = ["--env-file", str(env_file)]
    done = subprocess.run(
        [*command, *option, "config"], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.skipif(not COMPOSES and not os.environ.get("CI"), reason="needs Docker Compose")
@pytest.mark.parametrize("gpu, dotenv, shell", [*product([False, True], repeat=3)])
def test_both_versions_of_compose_read_the_same_configuration(gpu, dotenv, shell, tmp_path):
    assert COMPOSES
    cards = MACHINES["RTX 4090"].cards
    (tmp_path / ".env").touch()
    if dotenv:
        build(tmp_path, "--env-only", cards=cards, CUDA_DEVICES="0")
    files = "docker-compose.yml" + (":docker-compose.gpu.yml" if gpu else "")
    env = {**POLLUTED, **({"CUDA_DEVICES": "0,1", "SHM_SIZE": "32gb"} if shell else {})}
    for command in COMPOSES:
        config = render(command, files, env, tmp_path / ".env")
        train, board = config["services"]["train"], config["services"]["tensorboard"]
        if not dotenv:
            assert train["container_name"] == "train_llm" and train["user"] == "1000:1000"
        assert train["init"] is True and "tensorboard" in train["depends_on"]
        expected = "32gb" if shell else "8gb" if dotenv else "2gb"
        size = str(train["shm_size"])
        assert size in (expected, str(int(expected[:-2]) << 30))
        (port,) = board["ports"]
        assert (port if isinstance(port, str) else port["host_ip"]).startswith("127.0.0.1")
        assert board["read_only"] is True and board["cap_drop"] == ["ALL"]
        assert ("deploy" in train) == gpu and "ulimits" not in train
        if gpu:
            (request,) = train["deploy"]["resources"]["reservations"]["devices"]
            devices = "0,1" if shell else "0" if dotenv else "all"
            assert request["device_ids"] == [devices] and request["capabilities"] == ["gpu"]
            assert request["driver"] == "nvidia"


def test_the_dev_container_refers_to_existing_files(tmp_path):
    text = (ROOT / ".devcontainer/devcontainer.json").read_text()
    config = json.loads(
        "\n".join(li for li in text.splitlines() if not li.strip().startswith("//"))
    )
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = compose["services"][config["service"]]
    assert any(str(v).endswith(f":{config['workspaceFolder']}") for v in service["volumes"])
    assert config["overrideCommand"] is False and config["shutdownAction"] == "none"
    script = copy_scripts(tmp_path / "clone")
    build(tmp_path, "--env-only", script=script, cards=eight(set()), ENV_FILE="")
    for name in config["dockerComposeFile"]:
        assert (tmp_path / "clone/.devcontainer" / name).resolve().is_file(), name


# ---- sources -------------------------------------------------------------------------------------


def linter(name: str) -> str:
    """Return a linter's path. If it is missing, skip the test, or fail under CI."""
    found = shutil.which(name, path=f"{ROOT}/.venv/bin:{os.environ['PATH']}")
    if not found and not os.environ.get("CI"):
        pytest.skip(f"{name} is missing. Run pip install -r requirements-dev.txt")
    assert found, name
    return found


def test_shell_scripts_pass_shellcheck():
    scripts = ["build.sh", "docker/install.sh", "docker/entrypoint.sh", ".ci/run"]
    scripts += [str(path.relative_to(ROOT)) for path in (ROOT / "tests/journeys").glob("*.sh")]
    done = subprocess.run(
        [linter("shellcheck"), "-x", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_dockerfile_passes_hadolint():
    done = subprocess.run(
        [linter("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_work_in_bash_3_2():
    # Features of bash 4: associative arrays, mapfile, ${x,,}, |&, &>>, local -n, printf %(...)T
    newer = [r"(declare|local) -[nA]", r"\b(mapfile|readarray|coproc)\b", r",,}", r"\^\^}"]
    newer += [r"\|&", r"&>>", r"%\("]
    for path in BASH_SOURCES:
        done = subprocess.run(
            ["grep", "-nE", "|".join(newer), str(path)], capture_output=True, text=True
        )
        assert done.returncode == 1, f"{path}: {done.stdout}"


def test_dockerfile_uses_only_version_1_2_features():
    text = (ROOT / "Dockerfile").read_text()
    assert "syntax=" not in text and "<<" not in text and "--link" not in text
    lines = [
        li for li in (ROOT / ".dockerignore").read_text().splitlines() if not li.startswith("#")
    ]
    assert lines[0] == "*" and all(line.startswith("!docker/") for line in lines[1:])
    sources = [part.split(",")[0] for part in text.split("source=")[1:]]
    assert len(sources) > 4 and all((ROOT / source).exists() for source in sources)

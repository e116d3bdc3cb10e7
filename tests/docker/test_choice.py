"""Tests that build.sh chooses the right settings for each machine and prints the right messages."""

from __future__ import annotations

import pytest

from tests.docker.driving import ROOT, build
from tests.docker.fixtures import MACHINES, Machine, card, eight
from tests.support.hardware_table import table
from trainlib.core.hardware import Facts, choose_hardware, find_row


def number(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("name", MACHINES)
def test_reported_machines_get_the_expected_settings(name: str, tmp_path):
    machine: Machine = MACHINES[name]
    result = build(tmp_path, "--dry-run", cards=machine.cards)
    assert result.code == 0, result.err
    micro_batch = int(result.row("micro batch").split()[0])
    env = result.env
    assert (
        env["GPU_PROFILE"], micro_batch, result.row("precision").split(",")[0],
        env["TORCH_VERSION"], env["CUDA_DEVICES"],
    ) == machine.expected  # fmt: skip
    assert env["COMPOSE_FILE"].startswith("docker-compose.yml:docker-compose.gpu.yml")
    # In the container, auto reads the same table, so these settings are not passed.
    assert "TRAIN_LLM_PRECISION" not in env


@pytest.mark.parametrize("name", MACHINES)
def test_auto_in_the_container_makes_the_same_choice(name: str):
    cards = [line.split("|") for line in MACHINES[name].cards]
    profile, micro_batch, precision, _, devices = MACHINES[name].expected
    used = [c for c in cards if devices == "all" or c[0] in devices.split(",")]
    facts = Facts(
        cuda=min(number(c[3]) for c in used),
        memory_mib=min(int(c[2]) if c[2].isdigit() else 0 for c in used),
    )
    choice = choose_hardware(facts)
    row = find_row(facts, "cuda")
    found = (row["profile"], choice.micro_batch_size, choice.precision)
    assert found == (profile, micro_batch, precision)


def test_hardware_table_is_consistent():
    rows = table()
    assert {r["profile"] for r in rows} >= {
        "a100", "rtx40", "rtx30", "rtx50", "hopper", "blackwell", "turing", "volta", "cpu",
    }  # fmt: skip
    for profile in {r["profile"] for r in rows}:
        mine = [r for r in rows if r["profile"] == profile]
        memory = [int(r["min_mib"]) for r in mine]
        assert memory == sorted(memory, reverse=True)
        assert sum(r["typical"] == "yes" for r in mine) == 1, profile
    for row in rows:
        if row["min_capability"] != "-":
            capability = number(row["min_capability"])
            dtype = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
            assert row["precision"] == dtype
            # Reserve memory for CUDA itself and for a desktop; 1 MiB is 1.049 MB. The last row of a
            # profile covers all smaller cards, so it has no bound.
            if int(row["min_mib"]):
                assert float(row["peak_gb"]) + 1.5 <= int(row["min_mib"]) * 1.0486e-3, row
    (rtx40,) = [r for r in rows if r["profile"] == "rtx40" and r["typical"] == "yes"]
    assert float(rtx40["peak_gb"]) + 0.7 < 18


def test_free_n_selects_n_idle_cards(tmp_path):
    result = build(tmp_path, "--dry-run", "--devices", "free:2", cards=eight({0, 1, 2, 3}))
    assert result.env["CUDA_DEVICES"] == "4,5"
    result = build(tmp_path, "--dry-run", "--devices", "free:5", cards=eight({0, 1, 2, 3}))
    assert result.code == 4 and "only 4 of the 5" in result.err and "空闲" in result.err


def test_busy_cards_are_reported_and_can_be_requested(tmp_path):
    result = build(tmp_path, "--dry-run", cards=eight({2}))
    assert "skipped the cards that are in use: 2" in result.err
    assert result.env["CUDA_DEVICES"] == "0,1,3,4,5,6,7"
    result = build(tmp_path, "--dry-run", "--devices", "all", cards=eight({2}))
    assert result.env["CUDA_DEVICES"] == "all"
    result = build(tmp_path, "--dry-run", cards=eight(set(range(8))))
    assert "all cards are in use" in result.err and result.env["CUDA_DEVICES"] == "all"


def test_devices_can_be_set_in_the_shell_or_in_env_file(tmp_path):
    result = build(tmp_path, "--dry-run", cards=eight(set()), CUDA_DEVICES="0,1", SHM_SIZE="32gb")
    assert (result.env["CUDA_DEVICES"], result.env["SHM_SIZE"]) == ("0,1", "32gb")
    (tmp_path / ".env").write_text('CUDA_DEVICES="6,7" # mine\r\n')
    assert build(tmp_path, "--dry-run", cards=eight(set())).row("cards").endswith("=6,7")
    for bad in ("9", "0,9"):
        result = build(tmp_path, "--dry-run", cards=eight(set()), CUDA_DEVICES=bad)
        assert result.code == 2 and "this machine has 0,1,2" in result.err
    result = build(tmp_path, "--dry-run", cards=eight(set()), CUDA_DEVICES="0;rm")
    assert result.code == 2 and "CUDA_DEVICES=0;rm" in result.err


@pytest.mark.parametrize("size", ["half", "0gb", "8 tb", "-1g", "8gb; x"])
def test_invalid_shared_memory_sizes_are_rejected(size: str, tmp_path):
    result = build(tmp_path, "--dry-run", SHM_SIZE=size)
    assert result.code == 2 and f"SHM_SIZE={size}" in result.err


def test_shared_memory_is_at_most_half_of_the_ram(tmp_path):
    host = {"proc/meminfo": "MemTotal:        8000000 kB\n"}
    result = build(tmp_path, "--dry-run", cards=eight(set())[:1], host=host)
    assert result.env["SHM_SIZE"] == "3906mb"


# ---- machines on which no card can be used -------------------------------------------------------


def test_cpu_is_selected_when_nvidia_smi_is_missing(tmp_path):
    result = build(tmp_path, "--dry-run")
    assert (result.code, result.env["GPU_PROFILE"]) == (0, "cpu")
    assert result.env["COMPOSE_FILE"] == "docker-compose.yml" and "CUDA_DEVICES" not in result.env


@pytest.mark.parametrize(
    "state, message, expected",
    [
        # mxnet#19930
        ("failing", "NVIDIA-SMI has failed because it couldn't communicate with the", "reboot"),
        ("failing", "Failed to initialize NVML: Driver/library version mismatch", "modprobe"),
        ("hang", "", "did not respond"),
    ],
)  # fmt: skip
def test_build_stops_and_suggests_a_fix_when_nvidia_smi_fails(state, message, expected, tmp_path):
    result = build(tmp_path, "--dry-run", FAKE_SMI=state, FAKE_MESSAGE=message)
    assert result.code == 4 and expected in result.err and "./build.sh cpu" in result.err
    result = build(tmp_path, "cpu", "--dry-run", FAKE_SMI=state, FAKE_MESSAGE=message)
    assert (result.code, result.env["GPU_PROFILE"]) == (0, "cpu")


def test_cpu_is_selected_when_the_driver_finds_no_card(tmp_path):
    result = build(tmp_path, "--dry-run", FAKE_SMI="none")
    assert result.code == 0 and result.env["GPU_PROFILE"] == "cpu" and "finds no card" in result.err


@pytest.mark.parametrize(
    "machine, minimum",
    [
        # candle#733, TensorRT-LLM#735: nvidia-smi of driver 470 does not support compute_cap
        ([card("NVIDIA GeForce RTX 3090", 24576, "8.6", "470.82.01")], "525"),
        ([card("NVIDIA GeForce RTX 3090", 24576, "8.6", "515.105.01")], "525"),
        ([card("NVIDIA GeForce RTX 5090", 32607, "12.0", "535.183.01")], "570"),
    ],
)
def test_old_driver_error_names_the_minimum_version(machine, minimum, tmp_path):
    old = {"FAKE_SMI": "old"} if "470" in machine[0] else {}
    result = build(tmp_path, "--dry-run", cards=machine, **old)
    assert result.code == 4 and f"needs {minimum} or newer" in result.err, result.err
    assert build(tmp_path, "cpu", "--dry-run", cards=machine, **old).code == 0


@pytest.mark.parametrize("name, mib, capability", [
    ("Tesla P40", 24576, "6.1"), ("Tesla P100-PCIE-16GB", 16384, "6.0"),
    ("NVIDIA GeForce GTX 1080 Ti", 11264, "6.1"),
])  # fmt: skip
def test_cards_not_supported_by_torch_are_rejected(name, mib, capability, tmp_path):
    result = build(tmp_path, "--dry-run", cards=[card(name, mib, capability, "580.95.05")])
    assert result.code == 4 and "7.0" in result.err
    result = build(tmp_path, "cpu", "--dry-run", cards=[card(name, mib, capability, "580.95.05")])
    assert (result.code, result.env["TORCH_VERSION"]) == (0, "2.13.0")


MIG_LIST = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-00000000-0000-0000-0000-000000000000)
  MIG 3g.40gb     Device  0: (UUID: MIG-aaaa0000-1111-2222-3333-444444444444)
  MIG 1g.10gb     Device  1: (UUID: MIG-bbbb0000-1111-2222-3333-444444444444)
"""


def test_mig_slices_are_used_as_devices(tmp_path):
    # nvitop#8: memory.total is the full card's memory
    cards = [card("NVIDIA A100-SXM4-80GB", 81920, "8.0", "550.54.15", mig="Enabled")]
    result = build(tmp_path, "--dry-run", cards=cards, listing=MIG_LIST)
    assert result.env["CUDA_DEVICES"] == "MIG-aaaa0000-1111-2222-3333-444444444444"
    assert result.env["GPU_PROFILE"] == "a100"
    small = "MIG-bbbb0000-1111-2222-3333-444444444444"
    result = build(tmp_path, "--dry-run", "--devices", small, cards=cards, listing=MIG_LIST)
    assert result.env["CUDA_DEVICES"] == small and result.row("micro batch") == "32 x 512"
    result = build(tmp_path, "--dry-run", cards=cards, listing=MIG_LIST.splitlines()[0])
    assert result.code == 4 and "mig -cgi" in result.err


# ---- engines and hosts ---------------------------------------------------------------------------


def test_cpu_is_selected_and_a_fix_printed_when_the_toolkit_is_missing(tmp_path):
    # LLaMA-Factory#5268: "could not select device driver"
    result = build(tmp_path, "--dry-run", cards=eight(set())[:1], FAKE_RUNTIMES='{"runc":{}}')
    assert result.env["GPU_PROFILE"] == "cpu"
    assert "apt-get install -y nvidia-container-toolkit" in result.err


def test_docker_desktop_needs_no_toolkit(tmp_path):
    result = build(
        tmp_path, "--dry-run", cards=MACHINES["WSL2, RTX 4070"].cards,
        FAKE_SYSTEM="Docker Desktop", FAKE_RUNTIMES='{"runc":{}}',
    )  # fmt: skip
    assert result.env["GPU_PROFILE"] == "rtx40" and "toolkit" not in result.err.lower()


@pytest.mark.parametrize(
    "where", [{"DOCKER_HOST": "ssh://box"}, {"FAKE_CONTEXT": "tcp://10.0.0.9:2376"}]
)
def test_a_remote_engine_requires_a_profile(where, tmp_path):
    result = build(tmp_path, "--dry-run", cards=eight(set()), **where)
    assert result.code == 4 and "another host" in result.err
    result = build(tmp_path, "rtx40", "--dry-run", cards=eight(set()), **where)
    assert result.code == 0, result.err
    assert (result.env["GPU_PROFILE"], result.row("micro batch")) == ("rtx40", "64 x 512")
    assert result.env["TRAIN_LLM_MICRO_BATCH_SIZE"] == "64"


def test_rootless_engine_runs_the_container_as_root(tmp_path):
    # nerdctl#1937, podman#19319: root in the container is the user on the host
    result = build(
        tmp_path, "--dry-run", cards=eight(set())[:1], DOCKER_HOST="unix:///run/user/1000/docker.sock",
        FAKE_SECURITY='["name=seccomp,profile=default","name=rootless"]',
    )  # fmt: skip
    assert (result.code, result.env["HOST_UID"]) == (0, "0")
    assert result.env["COMPOSE_FILE"].endswith("docker-compose.gpu.yml")


def test_cpu_is_selected_on_amd_and_apple_machines(tmp_path):
    result = build(tmp_path, "--dry-run", host={"dev/kfd": ""})
    assert result.env["GPU_PROFILE"] == "cpu" and "AMD" in result.err
    result = build(tmp_path, "--dry-run", HOST_SYSTEM="Darwin")
    assert result.env["GPU_PROFILE"] == "cpu" and "Metal" in result.err


def test_wsl_gets_a_memory_warning_and_only_the_requested_cards(tmp_path):
    host = {
        "proc/version": "Linux version 5.15.167.4-microsoft-standard-WSL2",
        "proc/meminfo": "MemTotal:        8000000 kB\n",
    }
    result = build(tmp_path, "--dry-run", host=host)
    assert ".wslconfig" in result.err and "Windows" in result.err
    # docker/for-win#10524: in WSL, nvidia-smi is not on sudo's PATH
    smi = tmp_path / "host/usr/lib/wsl/lib/nvidia-smi"
    smi.parent.mkdir(parents=True)
    smi.symlink_to(ROOT / "tests/docker/fakes/nvidia-smi")
    cards = MACHINES["WSL2, RTX 4070"].cards
    (tmp_path / "tools/nvidia-smi").unlink(missing_ok=True)
    (tmp_path / "cards").write_text(cards[0] + "\n")
    result = build(tmp_path, "--dry-run", host=host, cards=cards)
    assert result.env["GPU_PROFILE"] == "rtx40"
    # nvidia-container-toolkit#21: WSL exposes every GPU to the container, so restrict torch
    two = [card("NVIDIA GeForce RTX 4070", 12282, "8.9", "572.16", i) for i in range(2)]
    result = build(tmp_path, "--dry-run", "--devices", "1", host=host, cards=two)
    assert "docker/compose.wsl.yml" in result.env["COMPOSE_FILE"]
    result = build(tmp_path, "--dry-run", host=host, cards=two)
    assert "wsl" not in result.env["COMPOSE_FILE"]


def test_build_stops_and_suggests_a_fix_when_docker_is_unusable(tmp_path):
    for state, fix in (("down", "systemctl start docker"), ("denied", "usermod -aG docker")):
        result = build(tmp_path, "--no-build", FAKE_ENGINE=state)
        assert result.code == 3 and fix in result.err and not (tmp_path / ".env").exists()
    # compose#11742, compose#13389: Compose v1 fails with Docker Engine 25 and later
    result = build(tmp_path, "--no-build", FAKE_NO_V2="1", FAKE_VERSION="29.0.0")
    assert result.code == 3 and "docker-compose-plugin" in result.err
    result = build(tmp_path, "--dry-run", FAKE_NO_V2="1", FAKE_VERSION="20.10.24")
    assert result.code == 0


# ---- profiles by name, usage, language -----------------------------------------------------------


def test_a_profile_that_does_not_match_the_card_is_used_with_a_warning(tmp_path):
    cards = MACHINES["RTX 3060 12 GB"].cards
    result = build(tmp_path, "a100", "--dry-run", cards=cards)
    assert result.code == 0 and "a100 was requested" in result.err and "rtx30" in result.err
    assert result.env["GPU_PROFILE"] == "a100"
    assert result.env["TRAIN_LLM_MICRO_BATCH_SIZE"] == "128"
    result = build(tmp_path, "rtx30", "--dry-run", cards=cards)
    assert "requested" not in result.err and "TRAIN_LLM_MICRO_BATCH_SIZE" not in result.env


@pytest.mark.parametrize("arguments", [
    ("a200",), ("--devices",), ("--devices", "free:x"), ("--mirror", "us"), ("--frobnicate",),
])  # fmt: skip
def test_invalid_arguments_are_rejected(arguments, tmp_path):
    result = build(tmp_path, *arguments)
    assert result.code == 2 and "error:" in result.err and "错误" in result.err


def test_language_follows_the_locale_and_train_lang(tmp_path):
    assert "配置" in build(tmp_path, "--dry-run", LANG="zh_CN.UTF-8").out
    assert "profile" in build(tmp_path, "--dry-run", LANG="zh_CN.UTF-8", TRAIN_LANG="en").out
    assert "用法" in build(tmp_path, "--help", TRAIN_LANG="zh").out


def test_rtx_40_disables_peer_to_peer(tmp_path):
    # fluxgym#283, accelerate#2328: only RTX 40 lacks it; 3090s with NVLink support it
    result = build(tmp_path, "--dry-run", cards=MACHINES["RTX 4090"].cards)
    assert (result.env["NCCL_P2P_DISABLE"], result.env["NCCL_IB_DISABLE"]) == ("1", "1")
    result = build(tmp_path, "--dry-run", cards=MACHINES["RTX 3090"].cards)
    assert "NCCL_P2P_DISABLE" not in result.env

"""Machines that users reported, and the settings that build.sh and `auto` must choose for them."""

from __future__ import annotations

from typing import NamedTuple


def card(
    name: str, mib: int | str, capability: str, driver: str, index: int = 0,
    used: int | str = 300, busy: int | str = 0, mig: str = "[N/A]",
) -> str:  # fmt: skip
    """Return a line for the fake nvidia-smi."""
    uuid = f"GPU-00000000-0000-0000-0000-{index:012d}"
    return f"{index}|{name}|{mib}|{capability}|{driver}|{mig}|{used}|{busy}|{uuid}"


class Machine(NamedTuple):
    """Cards, and the expected profile, micro batch, precision, torch version and CUDA_DEVICES."""

    cards: list[str]
    expected: tuple[str, int, str, str, str]


def eight(busy: set[int]) -> list[str]:
    """Return eight A100s, some of them busy."""
    name = "NVIDIA A100-SXM4-80GB"
    return [
        card(name, 81920, "8.0", "550.54.15", i, used=60000 if i in busy else 4, busy=0, mig="Disabled")
        for i in range(8)
    ]  # fmt: skip


# Memory is as reported by nvidia-smi. Comments name the reports that the cases come from.
MACHINES: dict[str, Machine] = {
    "A100 80 GB": Machine(eight(set())[:1], ("a100", 128, "bf16", "2.10.0", "all")),
    "A100 40 GB": Machine([card("NVIDIA A100-PCIE-40GB", 40960, "8.0", "580.65.06")], ("a100", 128, "bf16", "2.13.0", "all")),
    "A800, the A100 for China": Machine([card("NVIDIA A800 80GB PCIe", 81920, "8.0", "580.65.06")], ("a100", 128, "bf16", "2.13.0", "all")),
    "A30, an A100 chip with less memory": Machine([card("NVIDIA A30", 24576, "8.0", "580.65.06")], ("rtx30", 64, "bf16", "2.13.0", "all")),
    # LLaMA-Factory#5268 and others: the most common card in these reports
    "RTX 4090": Machine([card("NVIDIA GeForce RTX 4090", 24564, "8.9", "580.95.05")], ("rtx40", 64, "bf16", "2.13.0", "all")),
    "RTX 4090, driver for CUDA 12": Machine([card("NVIDIA GeForce RTX 4090", 24564, "8.9", "535.183.01")], ("rtx40", 64, "bf16", "2.10.0", "all")),
    "RTX 4090 D": Machine([card("NVIDIA GeForce RTX 4090 D", 24564, "8.9", "580.95.05")], ("rtx40", 64, "bf16", "2.13.0", "all")),
    "RTX 4090 with 48 GB": Machine([card("NVIDIA GeForce RTX 4090", 49140, "8.9", "580.95.05")], ("rtx40", 128, "bf16", "2.13.0", "all")),
    "RTX 4090 Laptop: 16 GB, not the desktop card's 24": Machine([card("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "8.9", "580.95.05")], ("rtx40", 48, "bf16", "2.13.0", "all")),
    "RTX 4060 Laptop": Machine([card("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "8.9", "580.95.05")], ("rtx40", 16, "bf16", "2.13.0", "all")),
    "RTX 3050 Laptop, 4 GB": Machine([card("NVIDIA GeForce RTX 3050 Laptop GPU", 4096, "8.6", "580.95.05")], ("rtx30", 8, "bf16", "2.13.0", "all")),
    "RTX 4000 Ada": Machine([card("NVIDIA RTX 4000 Ada Generation", 20475, "8.9", "580.95.05")], ("rtx40", 48, "bf16", "2.13.0", "all")),
    # A Turing card with "RTX 4000" in its name
    "Quadro RTX 4000, a Turing card": Machine([card("Quadro RTX 4000", 8192, "7.5", "580.95.05")], ("turing", 16, "fp16", "2.13.0", "all")),
    "RTX A4000": Machine([card("NVIDIA RTX A4000", 16376, "8.6", "580.95.05")], ("rtx30", 48, "bf16", "2.13.0", "all")),
    "RTX 3090": Machine([card("NVIDIA GeForce RTX 3090", 24576, "8.6", "570.86.10")], ("rtx30", 64, "bf16", "2.10.0", "all")),
    "RTX 3060 12 GB": Machine([card("NVIDIA GeForce RTX 3060", 12288, "8.6", "580.95.05")], ("rtx30", 32, "bf16", "2.13.0", "all")),
    # axolotl#2525, personaplex#23: "no kernel image" without CUDA 12.8
    "RTX 5090": Machine([card("NVIDIA GeForce RTX 5090", 32607, "12.0", "570.86.16")], ("rtx50", 64, "bf16", "2.10.0", "all")),
    "RTX 5060": Machine([card("NVIDIA GeForce RTX 5060", 8151, "12.0", "580.95.05")], ("rtx50", 16, "bf16", "2.13.0", "all")),
    # unsloth#10283, ArcticTraining#345: unified memory is reported as [N/A]
    "GB10": Machine([card("NVIDIA GB10", "[N/A]", "12.1", "580.95.05", used="[N/A]")], ("rtx50", 8, "bf16", "2.13.0", "all")),
    "H100": Machine([card("NVIDIA H100 80GB HBM3", 81559, "9.0", "580.95.05")], ("hopper", 128, "bf16", "2.13.0", "all")),
    "H20, the H100 for China": Machine([card("NVIDIA H20", 97871, "9.0", "550.127.08")], ("hopper", 128, "bf16", "2.10.0", "all")),
    "B200": Machine([card("NVIDIA B200", 183359, "10.0", "580.95.05")], ("blackwell", 128, "bf16", "2.13.0", "all")),
    "T4": Machine([card("Tesla T4", 15360, "7.5", "535.216.01")], ("turing", 48, "fp16", "2.10.0", "all")),
    "RTX 2080 Ti with 22 GB": Machine([card("NVIDIA GeForce RTX 2080 Ti", 22528, "7.5", "580.95.05")], ("turing", 64, "fp16", "2.13.0", "all")),
    "RTX 2080 Ti": Machine([card("NVIDIA GeForce RTX 2080 Ti", 11264, "7.5", "580.95.05")], ("turing", 32, "fp16", "2.13.0", "all")),
    # pytorch PR#175253: CUDA 13 wheels lack sm_70
    "V100, newest driver": Machine([card("Tesla V100-SXM2-32GB", 32768, "7.0", "580.95.05")], ("volta", 64, "fp16", "2.10.0", "all")),
    "V100 16 GB": Machine([card("Tesla V100-PCIE-16GB", 16384, "7.0", "535.183.01")], ("volta", 48, "fp16", "2.10.0", "all")),
    # cog pkg/doctor/gpu_compatibility.go: all distinct capabilities must be supported
    "RTX 4090 and RTX 3060": Machine(
        [card("NVIDIA GeForce RTX 4090", 24564, "8.9", "580.95.05", 0), card("NVIDIA GeForce RTX 3060", 12288, "8.6", "580.95.05", 1)],
        ("rtx30", 32, "bf16", "2.13.0", "all"),
    ),
    "V100 and RTX 3090": Machine(
        [card("Tesla V100-PCIE-32GB", 32768, "7.0", "580.95.05", 0), card("NVIDIA GeForce RTX 3090", 24576, "8.6", "580.95.05", 1)],
        ("volta", 48, "fp16", "2.10.0", "all"),
    ),
    "P40 and RTX 3090: the P40 is skipped": Machine(
        [card("Tesla P40", 24576, "6.1", "580.95.05", 0), card("NVIDIA GeForce RTX 3090", 24576, "8.6", "580.95.05", 1)],
        ("rtx30", 64, "bf16", "2.13.0", "1"),
    ),
    "eight A100s, four in use by others": Machine(eight({0, 1, 2, 3}), ("a100", 128, "bf16", "2.10.0", "4,5,6,7")),
    # ComfyUI-Docker#93: WSL shows two driver versions with the same major number
    "WSL2, RTX 4070": Machine([card("NVIDIA GeForce RTX 4070", 12282, "8.9", "572.16", used=1400)], ("rtx40", 32, "bf16", "2.10.0", "all")),
}  # fmt: skip

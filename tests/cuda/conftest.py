"""Fixtures for tests marked `cuda`. `make gpu-check` runs these tests and prints the results.

The tests need an NVIDIA GPU and are skipped without one. To check the tests themselves, set
CUDA_TESTS_DEVICE=cpu: this runs the ones that also work on a CPU, with a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.cuda.card import DEVICE, Machine, open_machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests if there is no GPU."""
    if DEVICE != "cuda" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Yield the hardware settings, with data for each stage."""
    folder = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAIN_LLM_CACHE_DIR", str(folder / "cache"))
        yield open_machine(folder)


@pytest.fixture(autouse=True)
def exact_matmul() -> Iterator[None]:
    """Reset the fp32 matmul precision, since tests that apply a hardware choice change it."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that records a check, its measured value and its limit for gpu_check."""

    def record(check: str, figure: str, limit: str = "") -> None:
        for name, value in (("check", check), ("figure", figure), ("limit", limit)):
            record_property(name, value)

    return record

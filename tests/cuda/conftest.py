"""What the tests with the marker `cuda` share. `make gpu-check` runs them and prints their figures.

They need an NVIDIA card and are skipped without one. CUDA_TESTS_DEVICE=cpu runs on the CPU what
holds there too, with a small model: so the tests themselves are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.cuda.card import DEVICE, Machine, open_machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a card where there is none."""
    if DEVICE != "cuda" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The chosen hardware, with data for each stage."""
    folder = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAIN_LLM_CACHE_DIR", str(folder / "cache"))
        yield open_machine(folder)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Put the precision of fp32 products back, which a choice of hardware sets."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Note what is checked, the measured figure and its limit, for the table of gpu_check."""

    def note(check: str, figure: str, limit: str = "") -> None:
        for name, value in (("check", check), ("figure", figure), ("limit", limit)):
            record_property(name, value)

    return note

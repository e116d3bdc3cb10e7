"""Tests that the hashes in docker/*.lock match the package index.

Only index pages are downloaded. Installing with --require-hashes would check the same hashes but
download every wheel.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from pypi_simple import PyPISimple

from tests.docker.driving import ROOT


def locked(name: str) -> dict[tuple[str, str], set[str]]:
    """Map each (package, version) to its hashes."""
    text = (ROOT / "docker" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            found[match[1], match[2]] = set(re.findall(r"--hash=sha256:(\w{64})", line))
    return found


def test_locked_hashes_are_listed_by_the_index():
    lock = locked("requirements.lock")
    assert len(lock) > 20 and all(lock.values())

    def compare(item: tuple[tuple[str, str], set[str]]) -> str | None:
        (package, version), digests = item
        with PyPISimple() as index:
            page = index.get_project_page(package)
        listed = {p.digests.get("sha256") for p in page.packages if p.version == version}
        if not digests <= listed:
            return f"{package} {version}: {len(digests - listed)} hashes missing from the index"
        return None

    try:
        with ThreadPoolExecutor(8) as pool:
            wrong = [problem for problem in pool.map(compare, lock.items()) if problem]
    except OSError as error:
        pytest.skip(f"the package index is unreachable: {error}")
    assert not wrong, wrong


def test_lock_contains_every_requirement_except_torch():
    names = {name.lower().replace("_", "-") for name, _ in locked("requirements.lock")}
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "docker/requirements.in").read_text()
    required = {m.lower().replace("_", "-") for m in re.findall(r"^([\w-]+)", text, re.M)}
    assert len(required) > 9 and required - names == {"torch"}
    assert "torch" not in names
    pip = locked("pip.lock")
    assert list(pip) == [key for key in locked("requirements.lock") if key[0] == "pip"]


def test_lock_contains_no_urls():
    assert "http" not in re.sub(
        r"httpx|httpcore", "", (ROOT / "docker/requirements.lock").read_text()
    )

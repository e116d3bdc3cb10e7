"""Helper that runs build.sh on a simulated machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests/docker/fakes"


class Result(NamedTuple):
    """Exit code and output of build.sh."""

    code: int
    out: str
    err: str

    @property
    def env(self) -> dict[str, str]:
        """Return the .env settings in the output."""
        return dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", self.out, re.M))

    def row(self, name: str) -> str:
        """Return a row of the printed settings table."""
        found = re.search(rf"^  {re.escape(name)}  +(.*)$", self.out, re.M)
        assert found, (name, self.out, self.err)
        return found[1]


def build(
    folder: Path, *arguments: str, cards: list[str] | None = None, listing: str = "",
    host: dict[str, str] | None = None, script: Path = ROOT / "build.sh", **env: str,
) -> Result:  # fmt: skip
    """Run build.sh with fake tools. `host` maps paths under the fake root to contents."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in FAKES.iterdir():
        if tool.name == "nvidia-smi" and cards is None and "FAKE_SMI" not in env:
            continue
        if not (tools / tool.name).exists():
            (tools / tool.name).symlink_to(tool)
    (folder / "cards").write_text("\n".join(cards or []) + "\n")
    (folder / "cards.list").write_text(listing)
    files = {"proc/meminfo": "MemTotal:       65000000 kB\n", "proc/version": "Linux 6.8\n"}
    for name, text in {**files, **(host or {})}.items():
        path = folder / "host" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    clean = {
        "PATH": f"{tools}:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8",
        "HOST_ROOT": str(folder / "host"), "FAKE_CARDS": str(folder / "cards"),
        "ENV_FILE": env.pop("ENV_FILE", str(folder / ".env")), "SMI_LIMIT": "1",
    }  # fmt: skip
    assert os.path.exists("/bin/bash")
    done = subprocess.run(
        ["/bin/bash", str(script), *arguments], env={**clean, **env}, capture_output=True,
        text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)

"""Tests for the layout: import rules, and size limits for files, functions and the project.

ALLOWED defines the import rules; docs/development.md explains them.
"""

from __future__ import annotations

import ast
import difflib
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("train.py", "sft_train.py", "dpo_train.py")

ALLOWED: dict[str, set[str]] = {
    # Bottom level: these import no other part.
    "core": set(),
    "model": set(),
    "tokenizer": set(),
    "kernels": set(),
    # trainlib by level, then its users. A part may also import whatever its imports may import.
    "data": {"core", "tokenizer"},
    "models": {"data", "model"},
    "engine": {"models", "kernels"},
    "evaluation": {"engine"},
    "dataset": {"data"},
    "chat": {"models"},
    "train": {"dataset", "evaluation"},
    "sft_train": {"dataset", "evaluation"},
    "dpo_train": {"dataset", "evaluation"},
    "tools": {"dataset", "evaluation"},
}
FOLDERS = ("tokenizer", "kernels", "tools")


def part_of(module: str) -> str | None:
    """Return the part that a dotted module name belongs to; None for external modules."""
    first, *rest = module.split(".")
    if first == "trainlib":
        return rest[0] if rest else None
    if (first, rest[:1]) == ("tools", ["chat"]):
        return "chat"  # The only tool with an import rule of its own.
    return first if first in FOLDERS or (ROOT / f"{first}.py").is_file() else None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    """Return all Python files in the root folder, the library and tools."""
    folders = [ROOT / name for name in ("trainlib", *FOLDERS)]
    return sorted([*ROOT.glob("*.py"), *(p for f in folders for p in f.rglob("*.py"))])


@functools.cache
def imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, including for type checking."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path} has a relative import"
            names.add(node.module)
            # `from kernels import fused_cpu` imports a module.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def closure(part: str) -> set[str]:
    """Return the parts that a part may import, directly or indirectly, and the part itself."""
    found, todo = {part}, [part]
    while todo:
        new = ALLOWED[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_every_import_is_allowed():
    files = sources()
    assert len(files) > 40
    seen: set[tuple[str, str]] = set()
    for path in files:
        here = part_of(module_name(path))
        if here is None:  # trainlib/__init__.py
            assert not imports(path)
            continue
        for name in imports(path):
            there = part_of(name)
            if there is not None:
                assert there in closure(here), f"{path.relative_to(ROOT)} imports {name}"
                seen.add((here, there))
    assert {("train", "dataset"), ("engine", "core"), ("evaluation", "engine")} <= seen


def test_forbidden_imports_are_detected():
    for here, there in (
        ("model", "core"), ("tokenizer", "core"), ("kernels", "model"), ("data", "models"),
        ("engine", "evaluation"), ("engine", "dataset"), ("evaluation", "dataset"),
        ("chat", "engine"), ("train", "tools"), ("dataset", "train"), ("tools", "train"),
    ):  # fmt: skip
        assert there not in closure(here)
    assert part_of("trainlib.core.files") == "core" and part_of("torch.nn") is None
    assert part_of("tools.chat") == "chat" and part_of("tools.demo") == "tools"


def test_there_are_at_most_seven_levels():
    """The longest path in the table has at most six steps from the bottom level."""

    @functools.cache
    def height(part: str) -> int:
        return 1 + max(map(height, ALLOWED[part]), default=-1)

    heights = {part: height(part) for part in ALLOWED}
    assert heights["core"] == 0 < heights["engine"] < heights["train"] <= 6
    assert max(heights.values()) <= 6
    packages = {path.parent.name for path in ROOT.glob("trainlib/*/__init__.py")}
    roots = {path.stem for path in ROOT.glob("*.py")}
    assert set(ALLOWED) == packages | roots | set(FOLDERS) and len(roots) <= 7


def test_the_project_stays_within_its_budget():
    """bench/, docker/ and tests/ have no limit; tools/ has its own."""
    tools = [path for path in sources() if path.is_relative_to(ROOT / "tools")]
    library = [path for path in sources() if path not in tools]
    assert 40 < sum(path.name != "__init__.py" for path in library) <= 70
    assert 2_000 < sum(map(lines, library)) <= 10_500
    assert sum(map(lines, tools)) <= 6_500


def test_there_are_no_import_cycles():
    files = {module_name(path): path for path in sources()}
    graph = {name: imports(path) & set(files) - {name} for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError with the cycle.


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_or_function_is_too_long():
    for path in sources():
        name = str(path.relative_to(ROOT))
        max_lines = 120 if name in STAGES else 40 if path.name == "__init__.py" else 400
        assert lines(path) <= max_lines, name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                limit = 80 if node.name == "fit" else 60
                assert node.end_lineno - node.lineno < limit, f"{name}: {node.name}"


def test_the_search_for_faults_stays_small():
    files = [*(ROOT / "tests/faults").glob("*.*")]
    assert len(files) == 2 and sum(map(lines, files)) <= 400


def test_the_dataset_folder_has_no_code():
    assert not list((ROOT / "dataset").glob("*.py"))


def test_importing_the_model_imports_no_other_part():
    code = "import sys, model; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert [name for name in out.stdout.split() if part_of(name)] == ["model"]
    assert not out.stderr


def body(stage: str) -> list[str]:
    """Return the lines of a stage script before main, with the stage name replaced by X."""
    text = (ROOT / stage).read_text(encoding="utf-8")
    text = text[text.index("@dataclass") :]
    text = re.sub(r"Pretrain|SFT|DPO|pretrain|sft|dpo", "X", text[: text.index("def main(")])
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_stages_share_no_long_block():
    for i, one in enumerate(STAGES):
        for other in STAGES[i + 1 :]:
            a, b = body(one), body(other)
            blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
            longest = max(blocks, key=lambda block: block.size)
            shared = a[longest.a : longest.a + longest.size]
            assert longest.size < 6, f"{one} and {other} share {shared}"

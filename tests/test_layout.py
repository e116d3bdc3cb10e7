"""Protects the house: imports go tools -> root -> trainlib, the stages stay short and different."""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = {"train", "sft_train", "dpo_train", "chat"}
STAGES = ("train.py", "sft_train.py", "dpo_train.py")
ROOT_MODULES = {path.stem for path in ROOT.glob("*.py")} | {"tokenizer", "kernels"}


def layer(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first if first in ("tools", "trainlib") else "root"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def sources() -> list[Path]:
    folders = [ROOT, ROOT / "tools", ROOT / "trainlib", ROOT / "tokenizer"]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


def forbidden(here: str, names: set[str]) -> set[str]:
    """Which of the imported names a file of a layer may not import."""
    barred = set(ENTRY_POINTS)
    if here != "tools":
        barred.add("tools")
    if here == "trainlib":
        barred |= ROOT_MODULES
    return names & barred


def test_imports_go_one_way():
    assert len(sources()) > 25
    for path in sources():
        wrong = forbidden(layer(path), imported(path))
        assert not wrong, f"{path} imports {wrong}"
    assert "trainlib" in imported(ROOT / "train.py")  # The reading of imports sees some.


def test_wrong_edges_would_be_seen():
    for here, name in (
        ("trainlib", "model"), ("trainlib", "tokenizer"), ("trainlib", "tools"), ("root", "tools"),
        ("root", "train"), ("tools", "chat"), ("tools", "dpo_train"),
    ):  # fmt: skip
        assert forbidden(here, {name, "torch"}) == {name}
    assert not forbidden("tools", {"model", "trainlib"})
    assert not forbidden("root", {"losses", "trainlib"})


def test_dataset_holds_data_alone():
    assert not list((ROOT / "dataset").glob("*.py"))


def test_sizes():
    def lines(path):
        return len(path.read_text(encoding="utf-8").splitlines())

    assert lines(ROOT / "model.py") <= 300
    for stage in STAGES:
        assert lines(ROOT / stage) <= 130, stage
        first = (ROOT / stage).read_text(encoding="utf-8").splitlines()[0]
        assert "trainlib.loop.fit" in first
    tree = ast.parse((ROOT / "trainlib/loop.py").read_text(encoding="utf-8"))
    fit = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "fit")
    assert fit.end_lineno is not None and fit.end_lineno - fit.lineno <= 80


def test_no_file_or_function_is_too_long():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "fit":
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_importing_the_model_brings_nothing_of_ours_but_it():
    code = "import sys, model; print(*sorted(m.split('.')[0] for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not set(out.stdout.split()) & (
        (ROOT_MODULES | {"tools", "trainlib"}) - {"model", "kernels", "rotary", "swiglu"}
    )
    assert not out.stderr


def body(stage: str) -> list[str]:
    """Lines of a stage's functions apart from main, names of the stage taken out."""
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

"""Protects the reader of both READMEs: what they name is there, and they say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo import BEGIN, END

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("README.md", "README.zh-CN.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, CHINESE = TEXTS.values()
both = pytest.mark.parametrize("readme", TEXTS.values(), ids=NAMES)


def blocks(readme: str) -> list[str]:
    """Fenced blocks with their fences."""
    return re.findall(r"^```.*?^```$", readme, re.M | re.S)


def prose(readme: str) -> str:
    """What lies outside of fenced blocks."""
    return re.sub(r"^```.*?^```$", "", readme, flags=re.M | re.S)


def spans(readme: str) -> list[str]:
    """Code spans, a line break in one taken for a space."""
    return [re.sub(r"\s+(> )?", " ", span) for span in re.findall(r"`([^`]+)`", prose(readme))]


def tree(readme: str) -> str:
    """The block that lists the files."""
    return next(block for block in blocks(readme) if "\ntrain.py " in block)


def files_of_tree(readme: str) -> list[str]:
    """The names that the tree lists, in its order; `; name.py:` is one more on the line."""
    return [
        name.strip()
        for line in tree(readme).splitlines()
        for name in re.findall(r"^[\w/.]+|(?<=  )\w+\.py|(?<=[;；])\s?[a-z_]+\.py(?=:)", line)
    ]


@both
def test_every_file_of_the_tree_is_there(readme):
    names = files_of_tree(readme)
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)


@both
def test_make_targets(readme):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([\w-]+)", readme))
    assert len(targets) >= 4
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


PROGRAMS = (
    "train.py",
    "sft_train.py",
    "dpo_train.py",
    "chat.py",
    "-m tools.prepare_data",
    "-m tools.inspect_data",
    "-m tools.demo",
    "-m tools.train_tokenizer",
    "-m bench.plot_demo",
)


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each program prints for --help."""
    return {
        program: subprocess.run(
            [sys.executable, *program.split(), "--help"],
            capture_output=True, text=True, cwd=ROOT, check=True,
        ).stdout
        for program in PROGRAMS
    }  # fmt: skip


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@both
def test_every_program_named_is_one_whose_help_is_read(readme):
    named = re.findall(r"`python (-m [\w.]+|\w+\.py)", readme)
    assert len(named) >= 6
    assert set(named) <= set(PROGRAMS)


@both
def test_options_are_those_of_the_programs(readme, helps):
    for command, program in re.findall(r"`(python (-m [\w.]+|\w+\.py)[^`]*)`", readme):
        assert options(command) <= options(helps[program]) | {"--help"}, command
    builder = subprocess.run(
        ["bash", "build.sh", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    # Those of git diff, docker build, docker builder prune.
    known = {"--no-index", "--no-cache", "--filter", "--help"} | options(builder.stdout)
    known = known.union(*map(options, helps.values()))
    assert options(prose(readme).replace("<!--", "").replace("-->", "")) <= known


@both
def test_settings_are_those_of_the_stages(readme, helps):
    files = ("py", "jsonl", "yaml", "json", "md")
    keys = set(re.findall(r"(?<![\w./-])((?:data|optim|model)\.[a-z_]+)", readme))
    keys = {key for key in keys if not key.endswith(tuple(f".{end}" for end in files))}
    keys |= set(re.findall(r"`([a-z_]+)=[^`]*`", readme))
    assert {"data.files", "max_hours", "ranks", "device", "resume"} <= keys
    for key in keys:
        assert f"  {key}=" in helps["train.py"], key


@both
def test_links_and_files_in_code_resolve(readme):
    for target in re.findall(r"\]\(([^)#]+)", readme):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    paths = [span for span in spans(readme) if re.fullmatch(r"(\w+/)+\w+\.(py|tsv|md)", span)]
    assert len(paths) >= 5
    for path in paths:
        assert (ROOT / path).exists(), path


@both
def test_the_difference_of_stages_is_the_real_one(readme):
    block = next(block for block in blocks(readme) if block.startswith("```diff"))
    command = ["git", "diff", "--no-index", "train.py", "sft_train.py"]
    assert f"`{' '.join(command)}`" in readme
    real = iter(
        subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
        .stdout.splitlines()
    )  # fmt: skip
    shown = block.splitlines()[1:-1]
    assert sum(line[0] in "+-" for line in shown) > 6
    for line in shown:
        assert line == "..." or line in real, f"not in this place of the output: {line}"


@both
def test_the_transcript_stands_between_its_marks(readme):
    assert readme.count(BEGIN) == readme.count(END) == 1
    inside = readme.split(BEGIN)[1].split(END)[0].strip()
    assert blocks(inside) == [inside]
    assert all(title in inside for title in ("Pretraining", "SFT", "DPO", "assistant"))


def test_each_names_the_other_in_its_first_line():
    assert "](README.zh-CN.md)" in README.splitlines()[0]
    assert "](README.md)" in CHINESE.splitlines()[0]


def same(what) -> None:
    """Both READMEs have the same of something; what differs is shown."""
    english, chinese = what(README), what(CHINESE)
    assert set(english) ^ set(chinese) == set()
    assert english == chinese


def test_they_have_the_same_parts():
    def parts(readme: str) -> list[str]:
        """The mark that begins each heading, item, row, box and picture, in order."""
        return re.findall(r"^(?:#+ |\* |\||> (?=\*\*)|!)", prose(readme), re.M)

    assert parts(README).count("* ") > 15 and parts(README).count("## ") == 8
    same(parts)


def test_they_show_the_same_commands_and_blocks():
    same(lambda readme: sorted(set(spans(readme))))
    same(lambda readme: [block for block in blocks(readme) if block != tree(readme)])
    same(files_of_tree)


def test_they_give_the_same_figures():
    def figures(readme: str) -> list[str]:
        return sorted(re.findall(r"\d+(?:[.,-]\d+)*", re.sub(r"`[^`]+`", "", prose(readme))))

    same(figures)
    same(lambda readme: sorted(re.findall(r"https?://[\w.:/]+", readme)))


def test_a_difference_would_be_seen():
    assert spans("a `make demo` b") != spans("a `make demos` b")
    assert spans("`python\n> train.py`") == ["python train.py"]
    assert blocks("x\n```\na\n```\ny") == ["```\na\n```"]

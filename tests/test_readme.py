"""Tests for README and docs/: everything they name exists, and both languages agree."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo import BEGIN, END, PAGES, READMES

ROOT = Path(__file__).resolve().parents[1]
CHINESE = [f"{page}.zh-CN.md" for page in ("README", *(f"docs/{name}" for name in
           ("data", "demo", "docker", "evaluation", "training", "use")))]  # fmt: skip
FILES = sorted(
    [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "dataset/README.md"]
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
every_page = pytest.mark.parametrize("name", TEXTS)
every_chinese_page = pytest.mark.parametrize("name", CHINESE)

SYSTEM_COMMANDS = {
    *("git", "cd", "wc", ".", "pip", "export", "unset", "touch", "kill", "watch", "nvidia-smi"),
    *("sudo", "docker", "pre-commit", "torchrun", "bash", "curl", "echo", "chmod", "cp", "mkdir"),
    *("hf", "modelscope"),
}
"""Commands of the system. Their options are not checked."""
STAGES = ("train", "sft_train", "dpo_train")
COMPOSE = {"up", "exec", "logs", "ps", "stop", "start", "restart", "down", "build", "config", "run"}


def blocks(text: str, language: str = "bash") -> list[str]:
    """Return the contents of the fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text: str) -> str:
    """Return a text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text: str, pattern: str = r"[^`]+") -> list[str]:
    """Return the code spans outside of fenced blocks that match a pattern."""
    return [" ".join(span.split()) for span in re.findall(rf"`({pattern})`", prose(text))]


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in bash blocks and code spans."""
    found = []
    for script in [*blocks(text), *spans(text, r"(?:python|make|pip|\./build\.sh) [^`]+")]:
        script = re.sub(r"(^|\s)#.*", r"\1", script)
        lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars=";&|\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        command: list[str] = []
        for word in [*lexer, "\n"]:
            if not set(word) <= set(";&|\n"):
                command.append(word)
            elif command:
                found.append(without_container(command))
                command = []
    return [command for command in found if command]


def without_container(command: list[str]) -> list[str]:
    """Check a docker compose subcommand; return the command to run in the container, if any."""
    while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
        command = command[1:]
    if command[:2] == ["docker", "compose"]:
        command = ["docker-compose", *command[2:]]
    if command[:1] != ["docker-compose"]:
        return command
    assert command[1] in COMPOSE, command
    if command[1] != "exec":
        return []
    rest = [word for word in command[2:] if not word.startswith("-") or "python" in command]
    return rest[rest.index("train") + 1 :]


@functools.cache
def help_of(*program: str) -> str:
    """Return what a program prints for --help."""
    return subprocess.run(
        [*program, "--help"], capture_output=True, text=True, cwd=ROOT, check=True, encoding="utf-8"
    ).stdout


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def check_python(words: list[str]) -> None:
    """Check the program, the options, the settings and the config files of a python command."""
    if words[0] in ("-c", "-m") and words[1].split(".")[0] not in ("tools", "bench"):
        assert words[0] == "-c" or words[1] in ("torch.distributed.run", "torch.utils.collect_env")
        return
    program, rest = (words[:2], words[2:]) if words[0] == "-m" else (words[:1], words[1:])
    known = help_of(sys.executable, *program)
    assert options(" ".join(rest)) <= options(known) | {"--help"}, words
    for word in rest:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), words
        elif (setting := re.match(r"([a-z_.]+)=", word)) and "tools." not in " ".join(program):
            assert f"  {setting[1]}=" in known, words


def check_make(words: list[str]) -> None:
    """Check the targets and the variables of a make command."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        variable, equals, _ = word.partition("=")
        known = rf"^{variable} \?=|\$\(({variable})\)" if equals else rf"^{word}: .*##"
        assert re.search(known, makefile, re.M), word


def check_build(words: list[str]) -> None:
    """Check the profile and the options of a build.sh command."""
    known = help_of("bash", "build.sh")
    assert options(" ".join(words)) <= options(known), words
    table = (ROOT / "configs/hardware.tsv").read_text(encoding="utf-8")
    profiles = {line.split()[0] for line in table.splitlines() if line[:1].isalpha()}
    assert all(word.startswith("-") or word in {*profiles, "doctor"} for word in words[:1]), words


@every_page
def test_every_command_exists(name):
    for first, *rest in commands(TEXTS[name]):
        if re.fullmatch(r"(.*/)?python3?", first):
            check_python(rest)
        elif first == "make":
            check_make(rest)
        elif first == "./build.sh":
            check_build(rest)
        else:
            assert first in SYSTEM_COMMANDS or first.endswith(("/pre-commit", "/pip")), first
            for requirements in re.findall(r"-r (\S+)", " ".join(rest)):
                assert (ROOT / requirements).is_file(), requirements


def test_commands_are_found_and_wrong_commands_are_rejected():
    text = (
        "```bash\nA=1 make demo && python train.py x.y=1\n"
        "docker-compose exec -T train python -m tools.demo\n```"
    )
    found = commands(text)
    assert found == [["make", "demo"], ["python", "train.py", "x.y=1"],
                     ["python", "-m", "tools.demo"]]  # fmt: skip
    for words in (["train.py", "x.y=1"], ["train.py", "--plans"], ["train.py", "configs/no.yaml"]):
        with pytest.raises(AssertionError):
            check_python(words)
    with pytest.raises(AssertionError):
        check_make(["demos"])
    with pytest.raises(AssertionError):
        check_build(["rtx60"])
    with pytest.raises(AssertionError):
        check_build(["driver"])
    assert commands("```bash\ncd x  # c\nmake demos\n```") == [["cd", "x"], ["make", "demos"]]
    assert commands("Type `make env MIRROR=cn`, then:") == [["make", "env", "MIRROR=cn"]]
    assert sum(len(commands(text)) for text in TEXTS.values()) > 60


@every_page
def test_links_settings_and_files_in_prose_exist(name):
    text = prose(TEXTS[name])
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        known = target.startswith("https://") or ((ROOT / name).parent / target).exists()
        assert known, target
    stages = "".join(help_of(sys.executable, f"{stage}.py") for stage in STAGES)
    for span in spans(text):
        path = re.fullmatch(r"((?:trainlib|tests|docker|configs|bench|tools|tokenizer|kernels)/"
                            r"[\w/.-]+\.(?:py|tsv|md|yaml|sh|conf|lock))", span)  # fmt: skip
        assert not path or (ROOT / path[1]).exists(), span
        key = re.match(r"((?:[a-z]+\.)?[a-z_]+)=", span)
        if key and not span.startswith("section.key"):
            assert f"  {key[1]}=" in stages, span


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_is_short_and_names_every_file(name):
    text = TEXTS[name]
    assert len(text.splitlines()) < 160
    assert (
        max(len(cell) for row in re.findall(r"^\|.*", text, re.M) for cell in row.split("|")) < 100
    )
    outside = text.split(BEGIN)[0] + text.split(END)[1]
    assert not re.search(r"\b20\d\d\b|\d (CPU )?cores?\b|\d\s*核", outside)
    (tree,) = [block for block in blocks(text, "text") if "\ntrain.py " in f"\n{block}"]
    listed = set(re.findall(r"^[\w./]+|(?<=, )[\w./]+(?=  )", tree, re.M))
    assert {path.name for path in ROOT.glob("*.py")} <= listed
    assert all((ROOT / entry).exists() for entry in listed) and len(listed) >= 20


@every_chinese_page
def test_both_languages_have_the_same_blocks_and_structure(name):
    english, chinese = TEXTS[name.replace(".zh-CN", "")], TEXTS[name]

    def without_comments(text: str) -> list[str]:
        return [re.sub(r" *# .*", "", block) for block in blocks(text)]

    def parts(text: str) -> list[str]:
        """Return the markers of headings, list items, table rows and images, in order."""
        return re.findall(r"^(?:#+ |[*-] |\||!)", prose(text), re.M)

    assert without_comments(english) == without_comments(chinese)
    assert parts(english) == parts(chinese)
    assert set(spans(english)) == set(spans(chinese))
    page = Path(name).name
    assert f"({page})" in english.splitlines()[0]
    assert f"({page.replace('.zh-CN', '')})" in chinese.splitlines()[0]


def test_the_demo_figures_are_between_their_markers():
    for path in (*READMES, *PAGES):
        text = TEXTS[str(path)]
        assert text.count(BEGIN) == text.count(END) == 1
        inside = text.split(BEGIN)[1].split(END)[0].strip()
        assert blocks(inside, "text") and len(blocks(inside, "text")[0].splitlines()) >= 6
        assert all(word in inside for word in ("Pretraining", "SFT", "DPO", "assistant"))
    assert TEXTS["README.md"].split(BEGIN)[1].split(END)[0].count("\n") < 12

"""Tests for settings: parsing by type, precedence, and reporting all problems at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from trainlib.core.errors import UserError
from trainlib.core.settings import (
    bound_errors,
    keys,
    load_config,
    provenance,
    recipe,
    run_yaml,
)


@dataclass(frozen=True)
class Inner:
    """A section."""

    rate: float = field(default=0.5, metadata={"above": 0})
    """Peak rate,
    over all steps.

    Not shown."""
    kind: Literal["muon", "adamw"] = "muon"
    fraction: float = field(default=0.25, metadata={"at_least": 0, "below": 9})

    def validation_errors(self) -> list[str]:
        too_much = self.rate + self.fraction > 9
        return ["inner.rate + inner.fraction must be at most 9"] if too_much else []


@dataclass(frozen=True)
class Output:
    """Another section."""

    rate: int = field(default=2, metadata={"at_least": 0, "at_most": 100})


@dataclass(frozen=True)
class Base:
    """Settings of all stages."""

    seed: int = 0
    """Seed of random numbers."""
    device: str = field(default="auto", metadata={"recipe": False})
    micro_batch_size: int = field(default=0, metadata={"recipe": False})


@dataclass(frozen=True)
class Settings(Base):
    """A stage's settings."""

    LENGTH_KEYS: ClassVar = ("max_steps", "max_tokens", "epochs")

    max_steps: int = 0
    max_tokens: int = 0
    epochs: int = 3
    start: str = ""
    limit: int = 7
    share: float = 0.5
    switch: bool = False
    mode: Literal["auto", "on", "off"] = "auto"
    files: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=lambda: Inner(rate=0.125))
    output: Output = field(default_factory=Output, metadata={"recipe": False})


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("DEVICE", "MICRO_BATCH_SIZE", "PRECISION", "COMPILE"):
        monkeypatch.delenv(f"TRAIN_LLM_{name}", raising=False)


def load(*argv: str, text: str | None = None, folder: Path | None = None) -> Settings:
    file = None
    if text is not None:
        assert folder is not None
        file = folder / "c.yaml"
        file.write_text(text, encoding="utf-8")
    return load_config(Settings, list(argv), file)


def problems(*argv: str, text: str | None = None, folder: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv, text=text, folder=folder)
    return str(caught.value)


VALUES = [
    ("inner.rate", "1e-3", 1e-3), ("inner.rate", "1_000e-3", 1.0), ("seed", "1_000", 1000),
    ("seed", "1e6", 1_000_000), ("seed", "1.5e3", 1500), ("seed", "-2", -2), ("seed", "010", 10),
    ("switch", "on", True), ("switch", "Yes", True), ("switch", "TRUE", True),
    ("switch", "off", False), ("switch", "no", False), ("switch", "false", False),
    ("start", "23:30", "23:30"), ("start", "on", "on"), ("start", "1e3", "1e3"),
    ("start", "none", "none"), ("start", "12", "12"), ("share", ".5", 0.5),
    ("mode", "on", "on"), ("mode", "true", "on"), ("inner.kind", "adamw", "adamw"),
    ("files", "a.jsonl", ("a.jsonl",)), ("files", "[a b, '小,c']", ("a b", "小,c")),
    ("files", "[]", ()), ("files", "", ()), ("sizes", "[1e2, 3]", (100, 3)),
]  # fmt: skip


@pytest.mark.parametrize("key, text, value", VALUES)
def test_a_value_is_parsed_by_the_type_of_its_field(key, text, value, tmp_path):
    section, _, last = key.rpartition(".")
    line = f"{last}: {text}\n"
    written = f"{section}:\n  {line}" if section else line
    for cfg in (load(f"{key}={text}"), load(text=written, folder=tmp_path)):
        got = getattr(getattr(cfg, section) if section else cfg, last)
        assert got == value and type(got) is type(value)


WRONG = [
    ("seed", "abc", "an integer"), ("seed", "1.5", "an integer"), ("seed", "", "an integer"),
    ("seed", "1e400", "an integer"), ("seed", "1e999999999", "an integer"),
    ("seed", "inf", "an integer"),
    ("inner.rate", "nan", "a number"), ("inner.rate", "snan", "a number"),
    ("inner.rate", "1e400", "a number"),
    ("inner.rate", "0.1x", "a number"), ("switch", "maybe", "on or off"),
    ("inner.kind", "sgd", "muon or adamw"), ("share", "", "a number"),
    ("sizes", "[1, x]", "each item an integer"), ("files", "[a, [b]]", "a list like"),
]  # fmt: skip


@pytest.mark.parametrize("key, text, expected", WRONG)
def test_an_error_names_the_key_value_source_and_expected_type(key, text, expected, tmp_path):
    message = problems(f"{key}={text}")
    assert f"{key}={text} (command line): expected" in message and expected in message
    section, _, last = key.rpartition(".")
    line = f"{last}: {text}\n"
    written = f"# a comment\n{section}:\n  {line}" if section else f"# a comment\n\n{line}"
    message = problems(text=written, folder=tmp_path)
    assert f"({tmp_path / 'c.yaml'}:3): expected" in message and key in message


def test_yaml_may_have_lists_dotted_keys_and_empty_sections(tmp_path):
    cfg = load(text="files:\n- a\n- 010\ninner.rate: 2\noutput:\n", folder=tmp_path)
    assert cfg.files == ("a", "010") and cfg.inner.rate == 2.0 and cfg.output == Output()
    assert cfg.inner.fraction == 0.25
    assert load(text="", folder=tmp_path) == load(text="# nothing\n", folder=tmp_path) == Settings()


def test_unset_keys_keep_the_default_of_their_section():
    assert load("inner.kind=adamw").inner == Inner(rate=0.125, kind="adamw")


def test_sources_have_a_precedence_and_are_recorded(tmp_path, monkeypatch):
    text = "seed: 1\ndevice: a\nmicro_batch_size: 1\n"
    monkeypatch.setenv("TRAIN_LLM_DEVICE", "b")
    monkeypatch.setenv("TRAIN_LLM_MICRO_BATCH_SIZE", "2")
    monkeypatch.setenv("TRAIN_LLM_SEED", "9")  # Recipe keys are not read from the environment.
    monkeypatch.setenv("TRAIN_LLM_PRECISION", "x")  # The class has no such key.
    cfg = load("micro_batch_size=3", "micro_batch_size=4", text=text, folder=tmp_path)
    assert (cfg.seed, cfg.device, cfg.micro_batch_size) == (1, "b", 4)
    sources = provenance(cfg)
    assert sources["seed"] == f"{tmp_path / 'c.yaml'}:1"
    assert sources["device"] == "environment TRAIN_LLM_DEVICE"
    assert sources["micro_batch_size"] == "command line" and sources["inner.rate"] == "default"
    assert provenance(replace(cfg, start="x"))["start"] == "set by the program"
    monkeypatch.setenv("TRAIN_LLM_DEVICE", "")
    assert load(text=text, folder=tmp_path).device == "a"
    monkeypatch.setenv("TRAIN_LLM_MICRO_BATCH_SIZE", "many")
    assert "(environment TRAIN_LLM_MICRO_BATCH_SIZE): expected an integer" in problems()


def test_the_first_yaml_argument_is_the_config_file(tmp_path):
    other = tmp_path / "lr=3" / "other.yml"
    other.parent.mkdir()
    other.write_text("seed: 8\n")
    cfg = load("seed=9", str(other), "start=x.yaml", text="start: z\n", folder=tmp_path)
    assert (cfg.seed, cfg.start) == (9, "x.yaml")
    assert "a second config file" in problems(str(other), str(other))


def test_all_problems_are_reported_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIN_LLM_MICRO_BATCH_SIZE", "x")
    message = problems(
        "inner.rat=1", "sede=2", "rate=3", "zzzzzz=4", "--seed=5", "inner=6", "word",
        "switch=7", "output.rate=-1",
        text="seed: a\nseed: b\nlimit:\n  x: 1\ninner:\n  rate: 0\nstart: [a]\n",
        folder=tmp_path,
    )  # fmt: skip
    file = tmp_path / "c.yaml"
    for part in (
        "inner.rat=1 (command line): unknown", "did you mean inner.rate?", "did you mean seed?",
        "zzzzzz=4 (command line): unknown key",
        "write it without dashes: seed=5", "inner=6 (command line): a section",
        "word (command line): expected a config file", "switch=7 (command line): expected on or",
        f"seed ({file}:2): set twice, first on line 1", f"limit ({file}:3): expected a value",
        f"inner.rate={0.0} must be above 0 (inner.rate: {file}:6)",
        f"start=[a] ({file}:7): expected a string, not a list",
        "environment TRAIN_LLM_MICRO_BATCH_SIZE", f"seed=a ({file}:1)",
    ):  # fmt: skip
        assert part in message, part
    count = int(message.split()[0])
    assert count == message.count("\n  ") and count >= 15
    assert "output.rate=-1 must be at least 0 and at most 100 (output.rate: command" in message


def test_problems_caused_by_other_problems_are_not_reported():
    # With the default fraction the sum would be too large, but only the fraction is invalid.
    message = problems("inner.rate=8.9", "inner.fraction=x")
    assert message.startswith("1 problem ") and "at most" not in message
    assert "at most 9" in problems("inner.rate=8.9", "inner.fraction=1")


def test_bounds_include_or_exclude_their_limits():
    for allowed in ("output.rate=0", "output.rate=100", "inner.fraction=0", "inner.fraction=8.5"):
        load(allowed)
    for key, value in (("output.rate", 101), ("inner.rate", 0.0), ("inner.fraction", 9.0)):
        assert f"{key}={value} must be " in problems(f"{key}={value}", "inner.kind=adamw")
    section = Inner(rate=float("nan"), fraction=-1)
    assert bound_errors(section, "inner.") == [
        "inner.rate=nan must be above 0",
        "inner.fraction=-1 must be at least 0 and below 9",
    ]


def test_a_run_has_only_one_length(tmp_path):
    def lengths(*argv, text=""):
        cfg = load(*argv, text=text, folder=tmp_path)
        return cfg.max_steps, cfg.max_tokens, cfg.epochs

    assert lengths() == (0, 0, 3)
    assert lengths(text="max_steps: 5") == (5, 0, 0)
    assert lengths("max_tokens=1e6", text="max_steps: 5") == (0, 1_000_000, 0)
    assert lengths("max_tokens=9", "epochs=0", text="max_steps: 5") == (0, 9, 0)
    assert lengths("max_steps=0", text="epochs: 2") == (0, 0, 2)
    message = problems("max_steps=1", "max_tokens=2")
    assert "max_steps=1 and max_tokens=2 (command line): a run has only one length" in message
    message = problems(text="max_steps: 1\nepochs: 2\n", folder=tmp_path)
    assert "max_steps=1 and epochs=2" in message and "c.yaml:1" in message and "c.yaml:2" in message


def test_unreadable_files_are_reported(tmp_path):
    missing = tmp_path / "none.yaml"
    with pytest.raises(UserError, match="none.yaml: cannot read .*No such file"):
        load_config(Settings, [], missing)
    file = tmp_path / "bad.yaml"
    for content, message in (
        (b"seed: 1\nstart: [a\n", r"bad.yaml:\d: not valid YAML"),
        (b"start: \xff\n", "bad.yaml: not UTF-8"),
        (b"- a\n- b\n", "bad.yaml:1: expected `key: value`"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"seed: \x00\n", "not valid YAML"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_config(Settings, [str(file)], None)
        with pytest.raises(UserError, match=message) as caught:
            load_config(Settings, ["sede=1", "output.rate=-1", str(file)], None)
        for part in ("did you mean seed?", "output.rate=-1 must be at least 0"):
            assert part in str(caught.value)
    for content, message in (
        ("{seed: 1, seed: 2}", r"seed \(.*:1\): set twice, first on line 1"),
        (
            "inner:\n  rate: 1\ninner.rate: 2\n",
            r"inner.rate \(.*:3\): set twice, first on line 2",
        ),
        ("? [a]\n: 1\n", "bad.yaml:1: expected `key: value`"),
        ("inner: [1]\n", "inner .*a section; expected"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load_config(Settings, [str(file)], None)
    file.write_bytes(b"\xef\xbb\xbfseed: 4\r\n")
    assert load_config(Settings, [str(file)], None).seed == 4


def test_run_yaml_loads_as_the_same_settings(tmp_path):
    strange = 'a: "b" # \\ \u0085 \u2028 小\n\t😀'
    cfg = load(
        "seed=5", f"start={strange}", "limit=-3", "switch=on", "max_steps=4", "inner.rate=1e-07",
        "files=[' a', 'x, y', '']", "sizes=[]",
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(run_yaml(cfg), encoding="utf-8")
    loaded = load_config(Settings, [str(path)], None)
    assert loaded == cfg and loaded.start == strange and loaded.files == (" a", "x, y", "")
    text = path.read_text(encoding="utf-8")
    assert "seed: 5  # command line\n" in text and "fraction: 0.25  # default" in text
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_the_recipe_has_only_settings_that_affect_learning():
    flat = recipe(load("files=[a]"))
    assert json.loads(json.dumps(flat)) == flat
    assert flat["files"] == ["a"] and flat["inner.kind"] == "muon" and "seed" in flat
    assert not {"device", "micro_batch_size", "output.rate"} & set(flat)


def test_docs_are_read_from_the_docstrings_of_fields():
    by_name = {key.name: key for key in keys(Settings)}
    assert by_name["seed"].doc == "Seed of random numbers."  # From the base class.
    assert by_name["inner.rate"].doc == "Peak rate, over all steps."
    assert by_name["inner.rate"].default == 0.125 and by_name["start"].doc == ""

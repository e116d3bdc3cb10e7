"""Tests that --help shows all settings of all stages, with defaults, descriptions and titles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.stages import STAGES
from trainlib.core.help import FLAGS, groups, help_text
from trainlib.core.parsing import type_text, value_text
from trainlib.core.settings import keys
from trainlib.engine.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def stage_help(stage: str, file: str = "none.yaml") -> str:
    script, _, cls = STAGES[stage]
    return help_text(cls, script, stage, ROOT / file)


def unwrapped(text: str) -> str:
    """Put each setting and its description on one line."""
    return re.sub(r"\n {6,}", " ", text)


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_shown_with_default_type_and_description(stage):
    lines = unwrapped(stage_help(stage)).splitlines()
    found = keys(STAGES[stage][2])
    assert len(found) > 30
    for key in found:
        assert len(key.doc) > 8 and key.doc.endswith("."), key.name
        head = f"  {key.name}={value_text(key.default)}  ({type_text(key.type)})"
        assert [line for line in lines if line == f"{head} {key.doc}"], head
    settings = [line for line in lines if re.match(r"  [\w.]+=\S*  \(", line)]
    assert len(settings) == len(found)


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_in_the_configs_is_listed(stage):
    for name in (f"{stage}.yaml", f"tiny_{stage}.yaml"):
        values = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
        text = stage_help(stage, f"configs/{name}")
        for key, value in values.items():
            names = [f"{key}.{last}" for last in value] if isinstance(value, dict) else [key]
            assert all(f"\n  {name}=" in text for name in names)
    text = stage_help("dpo", "configs/dpo.yaml")
    assert re.search(r"optim\.name=muon  \(muon or adamw; adamw in \S+dpo\.yaml\)", unwrapped(text))
    assert not re.search("512 in", text)  # This equals the default.


@pytest.mark.parametrize("stage", STAGES)
def test_help_fits_in_80_columns_and_has_titles(stage):
    text = stage_help(stage)
    assert max(map(len, text.splitlines())) < 80
    titles = list(groups(STAGES[stage][2]))
    expected = ["run", "length", "hardware", "evaluation and saving", "data", "optim"]
    if stage == "pretrain":
        expected.insert(4, "model")
    assert [title.partition(":")[0] for title in titles] == expected
    assert all(f"\n\n{title}:\n" in text for title in titles)
    grouped = [name for names in RunConfig.GROUPS.values() for name in names]
    assert set(grouped) <= {key.name for key in keys(RunConfig)}
    assert len(grouped) == len(set(grouped)) and set(RunConfig.LENGTH_KEYS) <= set(grouped)


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_usage_flags_environment_and_examples(stage, monkeypatch, capsys, run_stage):
    script = STAGES[stage][0]
    monkeypatch.chdir(ROOT)
    for argv in (["-h"], ["configs/none.yaml", "--help", "wrong=1"]):
        assert run_stage(stage, *argv) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: python {script} [config.yaml] [section.key=value ...]")
        assert all(f"  {flag} " in text for flag in FLAGS)
        assert all(f"TRAIN_LLM_{name.upper()}" in text for name in RunConfig.GROUPS["hardware"])
    examples = re.findall(rf"^  python {script} (.*)", text, re.M)
    assert len(examples) == 2 and (ROOT / examples[0]).is_file()

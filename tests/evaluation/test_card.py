"""Tests for the files that a finished run adds to final/: model card, picture, run.yaml."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from sft_train import SFTConfig
from tests.support.stages import STAGES
from tools.chat import newest_model
from trainlib.core.settings import load_config
from trainlib.evaluation.card import LANGUAGES, read_base
from trainlib.evaluation.curve import draw_curve

ROOT = Path(__file__).resolve().parents[2]
USER = "li-zhang-7"
MODEL = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16",
]  # fmt: skip
COMMON = ["max_steps=4", "tokens_per_step=128", "sequence_length=64", "eval_every_steps=2",
          "log_every_steps=1", "device=cpu", "precision=fp32", "compile=off"]  # fmt: skip
LICENCES = {"poems": "CC0", "talks": "CC BY-SA 4.0 | see `NOTICE`"}


def write_data(folder: Path) -> None:
    """Write data for each stage with SOURCES.json; dpo.jsonl is not listed there."""

    def talk(question: str, text: str) -> list[dict]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]

    text = "第{}条 中国的河流与山。 The end of the row and of the text number {}."
    rows = {
        "pretrain": [{"text": text.format(i, i) * 3, "source": "verse"} for i in range(80)],
        "sft": [
            {"messages": talk(f"q {i}", f"yes {i}"), "source": ("small", "made")[i % 2]}
            for i in range(80)
        ],
        "dpo": [
            {"chosen": talk(f"q {i}", "yes"), "rejected": talk(f"q {i}", "no"), "source": USER}
            for i in range(80)
        ],
    }
    folder.mkdir(parents=True)
    for name, values in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in values]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    packages = {
        name: {"name": name, "version": "1.0", "licence": licence}
        for name, licence in LICENCES.items()
    }
    listed = {
        "options": {"author": USER},
        "packages": packages,
        "files": {
            "pretrain.jsonl": {"sources": {"verse": {"packages": ["poems"]}}},
            "sft.jsonl": {"sources": {"small": {"packages": ["talks"]}, "made": {"packages": []}}},
        },
    }
    (folder / "SOURCES.json").write_text(json.dumps(listed), encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Train three stages in a home folder whose name is a user name; return the folder."""
    folder = tmp_path_factory.mktemp("card") / "home" / USER
    write_data(folder / "data")
    (folder / "mine.yaml").write_text("seed: 3\n")
    variables = {"TRAIN_LLM_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    more = MODEL
    for stage, (script, _, _) in STAGES.items():
        out, data = folder / "runs" / stage, folder / "data" / f"{stage}.jsonl"
        words = [ROOT / script, folder / "mine.yaml", *COMMON, *more, f"out_dir={out}"]
        subprocess.run(
            [sys.executable, *words, f"data.files=[{data}:1.0]"], check=True, cwd=folder,
            env={**os.environ, **variables}, capture_output=True,
        )  # fmt: skip
        more = [f"init_from={out}/final"]
    return folder


def test_final_folders_name_no_path_user_or_host(home):
    finals = {stage: home / "runs" / stage / "final" for stage in STAGES}
    for path in (path for folder in finals.values() for path in folder.iterdir()):
        for private in (USER, str(home.parents[1]), str(ROOT)):
            assert private.encode() not in path.read_bytes(), f"{private} in {path}"
        if path.suffix in (".md", ".yaml", ".json"):
            host = re.escape(socket.gethostname())
            assert path.name == "tokenizer.json" or not re.search(rf"\b{host}\b", path.read_text())
    assert USER in (finals["dpo"].parent / "run.yaml").read_text()
    assert USER in (finals["dpo"].parent / "step_000004/run.yaml").read_text()

    settings = yaml.safe_load((finals["sft"] / "run.yaml").read_text())
    assert (settings["init_from"], settings["data"]["files"]) == ("final", ["sft.jsonl:1.0"])
    assert load_config(SFTConfig, [str(finals["sft"] / "run.yaml")], None).seed == 3


def test_the_cards_of_three_stages(home):
    finals = {stage: home / "runs" / stage / "final" for stage in STAGES}
    cards = {stage: ModelCard.load(folder / "README.md") for stage, folder in finals.items()}
    for stage, card in cards.items():
        header = card.data.to_dict()
        assert header["language"] == ["en", "zh"] and set(header["language"]) <= set(LANGUAGES)
        assert (header["license"], header["license_name"]) == ("other", "not-chosen")
        assert "base_model" not in header  # Hugging Face accepts only a repository.
        assert header["library_name"] == "transformers" and header["tags"][0] == stage
        assert header["pipeline_tag"] == "text-generation" == header["tasks"][0]
        (picture,) = re.findall(r"!\[.*\]\((.*)\)", card.text)
        with Image.open(finals[stage] / picture) as image:
            assert image.format == "PNG" and image.size == (1200, 600)

    rows = read_base(str(finals["dpo"]))[1]
    assert [row.split(" | ")[0] for row in rows] == ["| pretrain", "| sft", "| dpo"]
    assert "pretrain.jsonl | verse |" in rows[0] and "| poems 1.0: CC0 |" in rows[0]
    assert "sft.jsonl | small, made |" in rows[1]
    assert r"| talks 1.0: CC BY-SA 4.0 \| see \`NOTICE\`<br>generated |" in rows[1]
    assert "| dpo.jsonl |  |" in rows[2] and "not recorded" in rows[2]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6] * 3

    last = json.loads((finals["sft"].parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert re.search(rf"at step 4 .*\nall .* {last['val/bits_per_byte']:.4f}\n", cards["sft"].text)
    assert "4 steps on" in cards["sft"].text and "bigram baseline" in cards["sft"].text
    assert (
        re.search("at step 4 +loss +accuracy", cards["dpo"].text)
        and "--raw" in cards["pretrain"].text
    )
    table = re.search(r"```python\n(.*?)```", cards["pretrain"].text, re.S)
    compile(table[1], "card", "exec")


def test_chat_still_finds_the_newest_model_that_answers(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "runs/pretrain/final", "runs/a/final")
    assert newest_model() == ("runs/a/final", True)
    shutil.copytree(home / "runs/sft/final", "runs/b/final")
    assert newest_model() == ("runs/b/final", False)


def test_skills_of_the_run_are_in_its_card(home, tmp_path, run_stage):
    run, without = tmp_path / "run", home / "runs/pretrain/final/README.md"
    shutil.copytree(home / "runs/pretrain", run)
    shutil.rmtree(run / "final")
    (run / "skills.json").write_text(json.dumps({
        "sum": {"correct": 199, "total": 200, "low": 0.972, "high": 0.999},
        "sum_direct": {"correct": 3, "total": 200, "low": 0.005, "high": 0.043},
    }))  # fmt: skip
    data = f"data.files=[{home}/data/pretrain.jsonl:1.0]"
    words = [*COMMON, *MODEL, f"out_dir={run}", data]
    assert run_stage("pretrain", str(home / "mine.yaml"), *words) == 0  # Only finishes the run.
    text = (run / "final/README.md").read_text(encoding="utf-8")
    assert re.search(r"^sum +199/200 \(0.97 to 1.00\)", text, re.M)
    assert "Less than half of its answers are correct in: `sum_direct`." in text
    assert "Less than half" not in without.read_text(encoding="utf-8")


def test_a_base_model_gives_its_licence_and_languages(tmp_path):
    assert read_base("") == read_base(str(tmp_path)) == ({}, [])
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: apache-2.0\nlanguage: [zh]\nbase_model: A/B\n---\n# Base\n")
    known = {"license": "apache-2.0", "language": ["zh"]}
    assert read_base(str(tmp_path)) == (known, [])
    path.write_text("---\nlicense: apache-2.0\nlanguage: zh\n---\n| sft | a | b |\n| c | d |\n")
    assert read_base(str(tmp_path)) == (known, ["| sft | a | b |"])
    path.write_text("---\nlanguage:\nlicense:\n---\n")
    assert read_base(str(tmp_path)) == ({"language": []}, [])
    for broken in ("---\n- [broken\n---\n", "---\n- a\n---\n", "---\n", ""):
        path.write_text(broken)
        assert read_base(str(tmp_path)) == ({}, [])


def test_the_picture_has_a_dot_at_each_evaluation():
    val = [(0.0, 4.0), (50.0, 2.0), (100.0, 3.0)]
    picture = draw_curve("bits per byte", val, {"unigram": 3.5})
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
        blue = [
            (x, y) for x in range(width) for y in range(height)
            if image.getpixel((x, y)) == (0x1F, 0x5F, 0xA8) and x < 960
        ]  # fmt: skip
    xs = [x for x, _ in blue]
    lowest = max(blue, key=lambda point: point[1])
    assert min(xs) < 105 and abs(lowest[0] - 520) <= 4 and lowest[1] > 520

"""Tests for --plan: the formulas for parameters, operations and time, and the output."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import torch

from model import ModelConfig, Transformer, count_parameters
from tests.support.memory_helpers import SHIPPED, shipped
from trainlib.core.errors import UserError
from trainlib.core.hardware import CARDS, Card, find_card, read_cards
from trainlib.data.loader import micro_batch_shape
from trainlib.engine.checkpoint import Checkpoints
from trainlib.engine.flops import Sizes, flops_per_token
from trainlib.engine.optim import OptimConfig, build_optimizers
from trainlib.engine.plan import parse_seconds, plan_request, step_time
from trainlib.models.hf_folder import model_files

SMALL = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16",
]  # fmt: skip
DEFAULT = Sizes(ModelConfig())


# ---- formulas -----------------------------------------------------------------------------------


def update_flops(optimizers: list[torch.optim.Optimizer]) -> float:
    """Return the operations in Newton-Schulz: per step, two matmuls of 2 m m n and one of 2 m^3."""
    muons = [o for o in optimizers if isinstance(o, torch.optim.Muon)]
    total = 0.0
    for group in (group for muon in muons for group in muon.param_groups):
        for small, large in (sorted(p.shape) for p in group["params"]):
            total += group["ns_steps"] * (4 * small**2 * large + 2 * small**3)
    return total


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_counts_are_those_of_the_model_of_a_run(path, name, elsewhere):
    sizes = shipped(path)[1]
    with torch.device("meta"):
        model = Transformer(sizes.config)
    assert sizes.parameters == count_parameters(model)
    assert sizes.products + 200.5 * sizes.attention == flops_per_token(model, 200.5)
    optimizers = build_optimizers(model, OptimConfig(name=name))
    assert sizes.update_flops(name) == update_flops(optimizers)


def test_the_operations_of_an_update():
    # 16 matrices of 512 x 512, 16 of 256 x 512, 24 of 512 x 1408; five Newton-Schulz steps each.
    assert DEFAULT.update_flops("muon") == 5 * (
        16 * 6 * 512**3 + 16 * (4 * 256**2 * 512 + 2 * 256**3)
        + 24 * (4 * 512**2 * 1408 + 2 * 512**3)
    )  # fmt: skip


def test_step_time_has_the_expected_components():
    card = Card("round", 100, 1000, 24000, (8, 9), 0.5, 10)
    sizes = Sizes(ModelConfig(1000, 100, 200, 1, 2, 2, 50))
    # q, k, v, o of 100 x 100, gate, up and down of 200 x 100: 100,000 values; with the embedding
    # 200,000, with norms 200,400 parameters. Linear layers return 900 + 1000 values per token.
    assert sizes.parameters == 200_400
    parts = step_time(card, sizes, "muon", True, 50, positions=1e6, num_micro=2, count=4)
    assert parts == pytest.approx({
        "products": 0.25e6 * 6 * 200_000 / 50e12,
        "attention": 0.25e6 * 12 * 100 * 50 / 40e12,
        "traffic": 0.25e6 * 1900 * 13.2 / 850e9,
        "weights": 2 * 200_400 * 20.5 / 850e9,
        "launches": 0,  # The host takes 2 * 8 * 70 us; the device takes 14 ms.
        "update": 5 * (4 * 6e6 + 3 * 10e6) / 50e12,
        "all-reduce": 1.5 * 4 * 200_400 / 10e9,
    })  # fmt: skip
    few = step_time(card, sizes, "adamw", True, 50, positions=100, num_micro=2)
    assert sum(few[key] for key in list(few)[:5]) == pytest.approx(2 * 8 * 70e-6)
    assert few["update"] == few["all-reduce"] == 0
    slow = step_time(card, sizes, "muon", False, 50, positions=1e6, num_micro=2, count=4)
    assert slow["products"] == pytest.approx(2 * parts["products"])
    assert slow["traffic"] == pytest.approx(2 * parts["traffic"])


def test_the_predicted_speed_of_a_4090_is_in_the_expected_range():
    """The card table was calibrated to 350,000 to 450,000 tokens per second on this card."""
    card = find_card("rtx4090")
    num_micro = micro_batch_shape(256, 64, 1)[0]
    seconds = sum(step_time(card, DEFAULT, "muon", True, 256.5, 131072, num_micro).values())
    assert 131072 / seconds == pytest.approx(450_000, rel=0.05)
    assert 131072 / seconds / card.slowest == pytest.approx(350_000, rel=0.05)


def test_the_card_table_has_plausible_values():
    cards = read_cards()
    assert {"rtx2080ti", "rtx3060", "rtx3090", "rtx4090", "rtx5090", "a100", "h100", "h200",
            "v100"} <= set(cards)  # fmt: skip
    assert "Sources:" in CARDS.read_text(encoding="utf-8")
    for card in cards.values():
        assert 20 < card.tflops < 3000 and 200 < card.gbs < 10_000 and 0.4 <= card.gemm <= 0.8
        assert (7, 0) <= card.capability <= (12, 9) and 7000 < card.mib < 200_000
        assert 1 <= card.link < 1000
    assert find_card("RTX 4090") == find_card("4090") == find_card("NVIDIA-GeForce-RTX-4090")


# ---- the command line ----------------------------------------------------------------------------


def test_plan_arguments_are_parsed_and_removed():
    assert plan_request(["a.yaml", "seed=1"]) == (None, ["a.yaml", "seed=1"])
    words = ["--plan", "a.yaml", "--gpu", "rtx4090:4", "--budget=2h", "seed=1"]
    request, rest = plan_request(words)
    assert request and request.card and rest == ["a.yaml", "seed=1"]
    assert (request.card.name, request.count, request.budget) == ("rtx4090", 4, 7200)
    request, rest = plan_request(["--budget", "1", "--plan"])
    assert request == (None, 1, 3600) and not rest
    for text, seconds in (("90s", 90), ("45m", 2700), ("90 min", 5400), ("1.5d", 129600),
                          ("2", 7200), (".5", 1800), ("2.h", 7200)):  # fmt: skip
        assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "words, texts",
    [
        (["--plan", "--gpu", "rtx9090"], ["rtx9090: unknown card", "rtx2080ti, ", "b200."]),
        (["--plan", "--gpu", "here"], ["here: unknown card"]),
        (["--plan", "--gpu", "a100:x"], ["--gpu a100:x", "a100:4"]),
        (["--plan", "--gpu", "a100:0"], ["--gpu a100:0"]),
        (["--plan", "--gpu", "a100:"], ["--gpu a100:"]),
        (["--plan", "--gpu"], ["unknown card"]),
        (["--plan", "--budget", "soon"], ["--budget soon", "45m, 2h, 1.5d"]),
        (["--plan", "--budget", "0h"], ["--budget 0h", "not a positive time"]),
        (["--plan", "--budget"], ["--budget : not a positive"]),
        (["--gpu", "a100"], ["--gpu requires --plan"]),
    ],
)
def test_invalid_plan_arguments_are_errors(words, texts):
    with pytest.raises(UserError) as error:
        plan_request(words)
    assert all(text in str(error.value) for text in texts)


# ---- complete plans ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """Return a folder with rows for each stage, and a model to fine-tune."""
    path = tmp_path_factory.mktemp("plan")

    def talk(i: int, answer: str) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"question {i}"}
        return [question, {"role": "assistant", "content": answer}]

    text = "The quick brown fox jumps over the lazy dog. "
    rows = {
        "pretrain": [{"text": text * (i % 9 + 1)} for i in range(400)],
        "sft": [{"conversations": talk(i, text)} for i in range(200)],
        "dpo": [{"chosen": talk(i, text), "rejected": talk(i, "No.")} for i in range(200)],
    }
    for name, records in rows.items():
        lines = [json.dumps(record) for record in records]
        (path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (path / "short.yaml").write_text("epochs: 1")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 48, 2, 2, 1, 16))
    (path / "run").mkdir()
    checkpoints = Checkpoints(path / "run", 1)
    checkpoints.extra_files = model_files(model.config, tokenizer)
    checkpoints.save("final", model, {})
    checkpoints.join()
    return path


@pytest.fixture
def plan(data, run_stage, monkeypatch, capsys):
    """Return a function that plans a stage; it must load no model and write nothing."""
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(data / "cache"))
    monkeypatch.chdir(data)
    monkeypatch.setattr("trainlib.models.hf_folder._read_tensors", None)

    def run_plan(stage: str, *words: str, code: int = 0) -> str:
        if stage != "pretrain":
            words = ("init_from=run/final", *words)
        common = ["out_dir=out", "sequence_length=64", "tokens_per_step=1024", *SMALL]
        common = common if stage == "pretrain" else common[:3]
        before = sorted(data.rglob("*"))
        capsys.readouterr()
        begin = time.perf_counter()
        assert run_stage(stage, "--plan", "short.yaml", f"data.files={stage}.jsonl", *common,
                         *words) == code  # fmt: skip
        assert time.perf_counter() - begin < 2
        assert sorted(data.rglob("*")) == before
        captured = capsys.readouterr()
        assert all(len(line) <= 100 for line in captured.out.splitlines())
        return captured.out + captured.err

    return run_plan


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_each_stage_plans_a_run_on_a_card(stage, plan, data):
    out = plan(stage, "--gpu", "a100:4", "max_steps=500")
    assert out.startswith(f"plan for {stage}: nothing is trained")
    source = "the settings" if stage == "pretrain" else "run/final/config.json"
    assert f" parameters, from {source}; " in out
    row_length = 128 if stage == "dpo" else 64
    assert f"1,024 tokens in {1024 // row_length} rows of {row_length}" in out
    assert "500 steps = 512,000 tokens" in out and "estimated from their size" in out
    assert "4 x a100, bf16, attention varlen, compiled" in out
    assert "at the peak of a step" in out and "0.7 GB for CUDA" in out and "fits" in out
    assert re.search(r"GB  weights +fp32\n.*GB  optimizer +fp32: two moments", out)
    assert re.search(r"time +[\d,.]+ to [\d,.]+ ms per step, of which products", out)
    for count in (1, 2, 4, 8):
        line = rf"\n  {count} x a100 .* yes .* k +(under 1 s|[\d.]+ to [\d.]+ s) +\d+%"
        assert re.search(line, out)


def test_without_gpu_all_cards_are_listed(plan):
    out = plan("pretrain", "epochs=1")
    assert all(f"\n  {name} " in out for name in read_cards())
    assert re.search(r"length +\d+ steps = [\d,]+ tokens, 1\.\d+ epochs", out)
    assert re.search(r"memory +[\d.]+ GB at the peak of a step here \(\w+, ", out)
    out = plan("pretrain", "precision=bf16")
    assert re.search(r"\n  t4 +precision=bf16 needs a card", out)


def test_a_budget_is_converted_to_tokens(plan):
    out = plan("pretrain", "--gpu", "rtx4090", "--budget", "2h", "max_steps=5")
    assert "2 hours" in out and "max_tokens" in out
    low, tokens = re.search(r"1 x rtx4090.* ([\d,]+) to [\d,]+ k +(\d+) +100%", out).groups()  # type: ignore[union-attr]
    assert int(tokens) % 1024 == 0
    assert int(tokens) == pytest.approx(7200e3 * int(low.replace(",", "")), rel=0.05)
    out = plan("sft", "max_hours=0.5")
    assert "0.5 hours" in out and re.search(r"h100 .* yes .* \d{6,}\n", out)


def test_a_plan_that_does_not_fit_suggests_a_micro_batch_size(plan):
    words = ["--gpu", "rtx4060", "max_steps=5", "tokens_per_step=262144",
             "model.intermediate_size=2048"]  # fmt: skip
    out = plan("pretrain", *words, "micro_batch_size=4096")
    fits = int(re.search(r"does NOT fit: set micro_batch_size=(\d+)", out)[1])  # type: ignore[index]
    assert re.search("1 x rtx4060 .* NO ", out)
    assert " NO" not in plan("pretrain", *words, f"micro_batch_size={fits}")
    assert " NO" in plan("pretrain", *words, f"micro_batch_size={2 * fits}")


def test_dimensions_come_from_the_pretraining_config_if_there_is_no_model(plan):
    out = " ".join(plan("sft", "init_from=nowhere").split())
    assert "26,879,488 parameters, from configs/pretrain.yaml, because nowhere/config.json" in out


def test_the_vocabulary_size_of_another_tokenizer_is_used(plan, data, tokenizer):
    (data / "other").mkdir(exist_ok=True)
    values = json.loads(tokenizer.json)
    vocab = values["model"]["vocab"]
    values["model"]["vocab"] = {**vocab, "not a merge": 9999}
    (data / "other" / "tokenizer.json").write_text(json.dumps(values))
    default, other = (
        int(re.search(r"([\d,]+) parameters", plan("pretrain", *words))[1].replace(",", ""))  # type: ignore[index]
        for words in ((), ("tokenizer=other",))
    )
    assert other - default == (10_000 - 6400) * 32
    (data / "other" / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read" in plan("pretrain", "tokenizer=other", code=1)


def test_the_length_of_an_epoch_is_read_from_the_token_cache(plan, run_stage, data, monkeypatch):
    words = ["short.yaml", "data.files=pretrain.jsonl", "sequence_length=64", *SMALL]
    monkeypatch.undo()
    monkeypatch.chdir(data)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(data / "cache"))
    assert run_stage("pretrain", "--prepare-only", *words) == 0
    text = plan("pretrain", "max_steps=5")
    assert "counted in the token cache" in text
    count = int(re.search(r"about ([\d,]+) tokens", text)[1].replace(",", ""))  # type: ignore[index]
    (meta,) = (data / "cache" / "tokens").glob("pretrain-*/meta.json")
    values = json.loads(meta.read_text())
    assert count == values["tokens"] - values["records"]
    os.utime(data / "pretrain.jsonl")  # If a file changes after caching, its length is estimated.
    os.utime(meta, (1, 1))
    assert "estimated from their size" in plan("pretrain", "max_steps=5")


def test_step_time_is_still_estimated_without_data(plan):
    out = plan("dpo", "data.files=none.jsonl", "epochs=2", "--gpu", "a100")
    assert "steps depend on the data" in out and "ms per step" in out
    assert re.search(r"1 x a100 .* k +- +100%", out)


def test_plans_with_plain_kernels_use_masked_attention(plan):
    assert "attention varlen" in plan("pretrain", "--gpu", "4090")
    assert "attention masked" in plan("pretrain", "--gpu", "4090", "kernels=plain")

"""Protects --plan: its memory against what torch allocated, its hours against sums by hand."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench.common import allocated_peak
from hf_folder import model_files
from losses import cross_entropy_sum
from model import ModelConfig, Transformer
from packing import Batch
from trainlib.batches import ALONE, Place, StepBatch, deal
from trainlib.cards import TABLE, Card, Work, find_card, read_cards, step_time
from trainlib.checkpoint import Checkpoints
from trainlib.errors import UserError
from trainlib.loop import optimizer_step
from trainlib.memory import peak_bytes
from trainlib.mfu import update_flops
from trainlib.optim import OptimConfig, build_optimizers
from trainlib.plan import WANTED, parse_seconds, plan_request
from trainlib.runtime import Hardware

SMALL = ModelConfig(1000, 64, 176, 2, 2, 1, 32)
LARGER = ModelConfig(2000, 192, 528, 4, 3, 1, 64)
CONFIG = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16",
]  # fmt: skip


def make_step(precision: str, rows: int, num_micro: int, length: int):
    """The optimizer step of training, with its loss, on a batch of one document a row."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    ends = torch.tensor([0, rows * length], dtype=torch.int32)
    batch = Batch(ids, ids, ids, ids, ends, ids[0], ids.numel(), ids.numel(), ids.numel())
    hardware = Hardware(torch.device("cpu"), precision, "masked", False, rows)
    config = SimpleNamespace(optim=OptimConfig())
    run = SimpleNamespace(hardware=hardware, ranks=ALONE, config=config)
    whole = StepBatch([batch] * num_micro, ids.numel() * num_micro, ids.numel(), Place())

    def loss_fn(model, batch):
        return cross_entropy_sum(model(**batch.inputs), batch.labels), {}

    def step(model, optimizers):
        optimizer_step(run, model, optimizers, loss_fn, whole, 1.0)  # type: ignore[arg-type]

    return step


def profiled_peak(model: torch.nn.Module, step) -> int:
    optimizers = build_optimizers(model, OptimConfig())
    return allocated_peak(model.parameters(), optimizers, lambda: step(model, optimizers))


@pytest.mark.parametrize("attention", ["masked", "blocks"])
@pytest.mark.parametrize(
    "sizes, precision, rows, num_micro", [(SMALL, "fp32", 4, 1), (LARGER, "fp32", 2, 2)]
)
def test_the_counted_peak_is_what_torch_allocates(sizes, precision, rows, num_micro, attention):
    step = make_step(precision, rows, num_micro, 128)
    model = Transformer(sizes)
    model.attention = attention
    before = {name: p.clone() for name, p in model.named_parameters()}
    counted = peak_bytes(model, OptimConfig(), step)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert counted == pytest.approx(profiled_peak(model, step), rel=0.1)


def test_a_second_micro_batch_keeps_the_gradients_of_the_first():
    one, two = (
        peak_bytes(Transformer(SMALL), OptimConfig(), make_step("fp32", 4, n, 128)) for n in (1, 2)
    )
    gradients = 4 * sum(p.numel() for p in Transformer(SMALL).parameters())
    assert gradients / 2 < two - one <= 1.1 * gradients


# ---- arithmetic ----------------------------------------------------------------------------------


def test_the_time_of_a_step_is_the_sum_by_hand():
    card = Card("round", 100, 1000, 24000, (8, 9), 0.5, 10)
    work = Work(10_000_000, 60e6, 8e6, 10, 20_000, 1e12, 1000)
    time_ = step_time(card, work, micro_batches=2, count=4)
    # 250 positions a card: 250 * 60 M / 50 T = 0.3 ms of products, 250 * 8 M / 40 T = 0.05 ms of
    # attention, 250 * 20,000 * 13.2 / 850 G = 0.0776 ms, 2 * 10 M * 20.5 / 850 G = 0.482 ms; the
    # host takes 2 * 10 * 70 us = 1.4 ms; 1 T / 50 T = 20 ms; 1.5 * 40 MB / 10 GB/s = 6 ms.
    by_hand = [0.3, 0.05, 0.07765, 0.48235, 1.4 - 0.91, 20, 6]
    assert [1e3 * seconds for seconds in time_] == pytest.approx(by_hand, rel=1e-3)
    assert step_time(card, work, 2).exchange == 0


def test_the_work_of_the_default_model():
    model = Transformer(ModelConfig())
    optimizers = build_optimizers(model, OptimConfig())
    work = Work.of(model, optimizers, 256.5, 131072)
    assert work.product_flops == pytest.approx(161.2e6, rel=1e-3)
    assert work.attention_flops == pytest.approx(12.6e6, rel=1e-2)
    # 16 of 512 x 512, 16 of 256 x 512, 24 of 512 x 1408; five steps of 4 m m n + 2 m m m each.
    by_hand = 5 * (16 * 6 * 512**3 + 16 * (4 * 256**2 * 512 + 2 * 256**3)
                   + 24 * (4 * 512**2 * 1408 + 2 * 512**3))  # fmt: skip
    assert update_flops(optimizers) == work.update_flops == by_hand
    assert update_flops(build_optimizers(model, OptimConfig(name="adamw"))) == 0
    # A 4090 does 350,000 to 450,000 tokens a second by the estimate that the table was made for.
    card = find_card("rtx4090")
    seconds = sum(step_time(card, work, deal(256, 64, 1)[0]))
    assert 131072 / seconds == pytest.approx(450_000, rel=0.05)
    assert 131072 / seconds / card.slowest == pytest.approx(350_000, rel=0.05)


def test_the_table_of_cards_is_sound():
    cards = read_cards()
    assert {"rtx2080ti", "rtx3060", "rtx3090", "rtx4090", "rtx5090", "a100", "h100", "h200",
            "v100"} <= set(cards)  # fmt: skip
    assert "Sources:" in TABLE.read_text(encoding="utf-8")
    for card in cards.values():
        assert 20 < card.tflops < 3000 and 200 < card.gbs < 10_000 and 0.4 <= card.gemm <= 0.8
        assert (7, 0) <= card.capability <= (12, 9) and 7000 < card.mib < 200_000
        assert 1 <= card.link < 1000
    assert find_card("RTX 4090") == find_card("4090") == find_card("NVIDIA-GeForce-RTX-4090")


# ---- the command line ----------------------------------------------------------------------------


def test_the_words_of_a_plan_are_taken_out():
    assert plan_request(["a.yaml", "seed=1"]) == (None, ["a.yaml", "seed=1"])
    words = ["--plan", "a.yaml", "--gpu", "rtx4090:4", "--budget=2h", "seed=1"]
    request, rest = plan_request(words)
    assert request and request.card and rest == ["a.yaml", "seed=1"]
    assert (request.card.name, request.count, request.budget) == ("rtx4090", 4, 7200)
    request, _ = plan_request(["--gpu=here", "--plan"])
    assert request and request.here and request.card is None
    for text, seconds in (("90s", 90), ("45m", 2700), ("90 min", 5400), ("1.5d", 129600)):
        assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "words, texts",
    [
        (["--plan", "--gpu", "rtx9090"], ["--gpu rtx9090", "cards.tsv", "rtx2080ti, ", "b200"]),
        (["--plan", "--gpu", "a100:x"], ["--gpu a100:x", "after the colon", "a100:4"]),
        (["--plan", "--gpu", "a100:0"], ["--gpu a100:0"]),
        (["--plan", "--gpu"], ["no such card"]),
        (["--plan", "--gpu", "a100", "--budget", "soon"], ["--budget soon", "45m, 2h or 1.5d"]),
        (["--plan", "--gpu", "a100", "--budget", "0h"], ["--budget 0h", "above 0"]),
        (["--plan", "--budget", "2h"], ["--budget", "--gpu CARD"]),
        (["--gpu", "a100"], ["--gpu belongs to --plan"]),
    ],
)
def test_what_cannot_be_planned_is_said(words, texts):
    with pytest.raises(UserError) as error:
        plan_request(words)
    assert all(text in str(error.value) for text in texts)


# ---- whole plans ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """A folder with rows for each stage, and a model to fine-tune."""
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
    (path / "empty.yaml").write_text("")
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 48, 2, 2, 1, 16))
    checkpoints = Checkpoints(path / "run", 1)
    checkpoints.companions = model_files(model.config, tokenizer)
    checkpoints.write_final(model)
    return path


@pytest.fixture
def plan(data, run_stage, monkeypatch, capsys):
    """Print a stage's plan; gives the text."""
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(data / "cache"))
    monkeypatch.chdir(data)

    def of(stage: str, *words: str) -> str:
        model = CONFIG if stage == "pretrain" else ["init_from=run/final"]
        common = ["out_dir=out", "sequence_length=64", "tokens_per_step=1024", "device=cpu"]
        words = ("--plan", "empty.yaml", f"data.files={stage}.jsonl", *common, *model, *words)
        capsys.readouterr()
        try:
            assert run_stage(stage, *words) == 0
        finally:
            WANTED.set(None)
        assert not (data / "out").exists()
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_each_stage_plans_a_run(stage, plan, data):
    out = plan(stage, "--gpu", "a100:4", "max_steps=500")
    assert f"plan of {stage} for 4 x a100; nothing is trained" in out
    assert "500 steps of 1,024 positions = 512,000" in out and f"{stage}.jsonl" in out
    assert "GB of tensors at the peak" in out and "bf16" in out and "0.7 GB for CUDA" in out
    assert re.search(
        r"speed +[\d,]+ to [\d,]+ tokens/s\n +time +\S+ \S+ to \S+ \S+ of training", out
    )
    # Of such small steps all time is waiting, so that more cards are not worth it.
    assert re.search(r"cards +1 .*\n +2 .*\n +4 .*\n +8 .*\n +worth it: 1 \(", out)
    assert not (data / "cache" / "reference").exists()


def test_without_a_card_all_are_listed(plan):
    out = plan("pretrain", "epochs=1")
    assert all(f" {name} " in out for name in read_cards()) and "1.00 epochs" in out


def test_a_budget_chooses_tokens_and_a_model(plan):
    out = plan("pretrain", "--gpu", "rtx4090", "--budget", "2h", "max_steps=5")
    steps, tokens = re.search(r"2 h holds ([\d,]+) steps = .* max_tokens=(\d+)", out).groups()  # type: ignore[union-attr]
    assert int(tokens) == 1024 * int(steps.replace(",", ""))
    sizes = [float(n) for n in re.findall(r"configs/pretrain\S* +([\d.]+)M parameters", out)]
    assert sizes == [6.1, 26.9]
    assert re.search(r"choice +configs/pretrain\S*\.yaml max_tokens=\d+\n", out)
    rows = int(re.search(r"an epoch, ([\d,]+) positions", out)[1].replace(",", ""))  # type: ignore[index]
    assert f".yaml max_tokens={4 * rows}\n" in out and "would fill 2 h" in out
    out = plan("sft", "--gpu", "rtx4090", "max_hours=0.5")
    assert "30 min holds" in out and "max_tokens=" in out and "choice" not in out


def test_what_does_not_fit_is_said_with_what_would(plan):
    out = plan("pretrain", "--gpu", "rtx4060", "max_steps=5", "micro_batch_size=4096",
               "tokens_per_step=262144", "model.intermediate_size=2048")  # fmt: skip
    fits = int(re.search(r"does NOT fit: give micro_batch_size=(\d+)", out)[1])  # type: ignore[index]
    out = plan("pretrain", "--gpu", "rtx4060", "max_steps=5", f"micro_batch_size={fits}",
               "tokens_per_step=262144", "model.intermediate_size=2048")  # fmt: skip
    assert "NOT" not in out


@pytest.mark.slow
def test_here_foretells_a_measured_run(plan, run_stage, monkeypatch, data, capsys):
    monkeypatch.setattr("trainlib.measure.MEASURE_SECONDS", 2.0)
    words = ("max_steps=30", "micro_batch_size=4", "precision=fp32", "model.hidden_size=64")
    out = plan("pretrain", "--gpu", "here", *words)
    seconds = float(re.search(r"([\d.e-]+) s a step, from", out)[1])  # type: ignore[index]
    begin = time.perf_counter()
    code = partial(run_stage, "pretrain", "empty.yaml", "data.files=pretrain.jsonl", "resume=never")
    common = ["out_dir=measured", "sequence_length=64", "tokens_per_step=1024", "device=cpu"]
    assert code(*common, *CONFIG, *words, "eval_every_steps=0", "save_every_steps=0") == 0
    assert time.perf_counter() - begin > 30 * seconds / 3
    rows = [json.loads(text) for text in (data / "measured/metrics.jsonl").open(encoding="utf-8")]
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    assert 1024 / speeds[-1] == pytest.approx(seconds, rel=2)

"""Tests for skills: what is a question, what is a right answer, and the runs that count them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from tokenizer.chat_format import render_prompt
from trainlib.core.errors import UserError
from trainlib.data.formats import ReadOptions
from trainlib.evaluation import skills
from trainlib.evaluation.skills import (
    SkillTest,
    answer,
    count,
    counted,
    format_counts,
    load_questions,
    wilson,
)
from trainlib.models.hf_folder import model_files

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip


def row(kind, wording, question, content, **more):
    turns = [{"role": "user", "content": question}]
    turns.append({"role": "assistant", "content": content, **more})
    return {"messages": turns, "skill": kind, "wording": wording}


def questions_20():
    """Return 20 rows: sums with reasoning, sums without, in three wordings."""
    rows = []
    for i in range(20):
        a, b = 11 + 3 * i, 40 + 2 * i
        wording = ("trained", "trained", "combination", "words")[i % 4]
        if i % 5:
            steps = {"reasoning_content": f"{a} + {b}: write {a + b}"}
            rows.append(row("sum", wording, f"{a} + {b} = ?", f"{a + b}", **steps))
        else:
            direct = {"enable_thinking": False}
            rows.append(row("sum_direct", wording, f"{a} + {b} = ?", f" {a + b}\n", **direct))
    return rows


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """Return a model that was trained on nothing but the 20 questions, and the questions."""
    path = write(tmp_path_factory.mktemp("skills") / "skills.jsonl", questions_20())
    questions = load_questions([path])
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3, betas=(0.9, 0.95), weight_decay=0)
    sequences = []
    for q in questions:
        prompt = render_prompt(tokenizer, q.prompt, q.enable_thinking)
        reply = tokenizer.encode(q.answer)
        if q.enable_thinking:
            think, end = (tokenizer.tag_id(tag) for tag in ("<think>", "</think>"))
            thoughts = tokenizer.encode(f"\n{q.expected['reasoning_content']}\n")
            reply = [think, *thoughts, end, *tokenizer.encode(f"\n\n{q.answer}")]
        sequences.append((prompt, [*reply, tokenizer.im_end_id]))
    length = max(len(prompt) + len(reply) for prompt, reply in sequences)
    ids, labels = torch.zeros(20, length, dtype=torch.int64), torch.full((20, length), -100)
    for i, (prompt, reply) in enumerate(sequences):
        ids[i, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        labels[i, len(prompt) - 1 : len(prompt) + len(reply) - 1] = torch.tensor(reply)
    select = labels != -100
    for _ in range(300):
        loss = F.cross_entropy(model(ids, select=select), labels[select])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.05, loss
    return model.train(), questions


def test_a_model_that_knows_the_answers_scores_all_and_wrong_answers_are_counted(
    trained, tokenizer
):
    model, questions = trained
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    answers = answer(model, tokenizer, questions)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(map(torch.equal, weights, model.parameters()))
    assert answers == [q.answer for q in questions] and all(map(str.isdigit, answers))
    counts = count(questions, answers)
    assert {name: {key: row[key] for key in ("correct", "total")}
            for name, row in counts.items()} == {
        "sum": {"correct": 8, "total": 8}, "sum/combination": {"correct": 4, "total": 4},
        "sum/words": {"correct": 4, "total": 4}, "sum_direct": {"correct": 2, "total": 2},
        "sum_direct/combination": {"correct": 1, "total": 1},
        "sum_direct/words": {"correct": 1, "total": 1},
    }  # fmt: skip
    wrong = [
        text + "0" if q.name == "sum" else text for text, q in zip(answers, questions, strict=True)
    ]
    assert count(questions, wrong)["sum"] == counted(0, 8)
    assert count(questions, wrong)["sum/words"] == counts["sum/words"]


def test_thoughts_do_not_count_and_an_answer_without_an_end_is_wrong(trained, tokenizer):
    """The same answer after other thoughts is right; thoughts that never end are no answer."""
    _, questions = trained
    first = questions[1]
    replies = iter(
        [
            tokenizer.encode("\nother steps\n"), tokenizer.encode(f"\n\n{first.answer}\n"),
            tokenizer.encode(f"\n{first.answer}"),
        ]
    )  # fmt: skip
    think, end = (tokenizer.tag_id(tag) for tag in ("<think>", "</think>"))
    right = [think, *next(replies), end, *next(replies), tokenizer.im_end_id]
    unended = [think, *next(replies)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skills, "generate_batch", lambda *_: [right, unended])
        found = answer(trained[0], tokenizer, [first, first])
    assert found[0] == first.answer and found[1] != first.answer
    assert count([first, first], found) == {"sum": counted(1, 2)}


def test_a_prompt_longer_than_the_context_is_a_wrong_answer(trained, tokenizer, tmp_path):
    model, questions = trained
    path = write(tmp_path / "a.jsonl", [row("long", "trained", "word " * 200, "x")])
    both = [*load_questions([path]), questions[0]]
    assert answer(model, tokenizer, both) == ["", questions[0].answer]


def test_questions_are_rows_with_both_keys(tmp_path):
    good = row("sum", "trained", "1 + 1", "2")
    user, reply = good["messages"]
    pair = {"chosen": good["messages"], "skill": "sum", "wording": "words",
            "rejected": [user, {**reply, "content": "3"}]}  # fmt: skip
    others = [{**good, "skill": 3}, {**good, "wording": "new"}, {**good, "messages": []},
              {"messages": good["messages"]}, {"text": "x"}]  # fmt: skip
    sft, dpo = write(tmp_path / "a.jsonl", [good, *others]), write(tmp_path / "b.jsonl", [pair])
    one, two = load_questions([sft, dpo])
    assert (one.name, one.answer, one.enable_thinking) == ("sum", "2", True)
    assert (two.name, two.answer, two.prompt) == ("sum/words", "2", [user])
    broken = {
        "must end with an answer": {**good, "messages": [user, reply, user]},
        "must not have a slash": {**good, "skill": "math/sum"},
    }
    for message, row_ in broken.items():
        with pytest.raises(UserError, match=rf"c\.jsonl, line 2: .*{message}"):
            load_questions([write(tmp_path / "c.jsonl", [good, row_])])


@pytest.mark.parametrize(
    "correct, total, low, high",
    [(80, 80, 0.9542, 1.0), (0, 80, 0.0, 0.0458), (40, 80, 0.3930, 0.6070), (1, 4, 0.0456, 0.6994)],
)
def test_wilson_interval_equals_values_computed_with_another_program(correct, total, low, high):
    """The expected values are those of statsmodels' proportion_confint(method="wilson")."""
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_the_table_has_three_columns():
    _, line = format_counts({"sum": counted(1, 4), "sum/words": counted(4, 4)})
    assert line.split() == [
        "sum",
        "1/4",
        "(0.05",
        "to",
        "0.70)",
        "-",
        "4/4",
        "(0.51",
        "to",
        "1.00)",
    ]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, trained, tokenizer):
    """Return a folder with data, and a model that knows the answers."""
    path, model = tmp_path_factory.mktemp("runs"), trained[0]
    folder = path / "base"
    folder.mkdir()
    (path / "configs").symlink_to(ROOT / "configs")
    for name, content in model_files(model.config, tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rng = random.Random(0)
    talks = [row("", "", f"say {i}", "yes " * rng.randrange(1, 9))["messages"] for i in range(60)]
    write(path / "sft.jsonl", [{"messages": talk} for talk in talks])
    pairs = [
        {"chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": f"no {i}"}]}
        for i, talk in enumerate(talks)
    ]
    write(path / "dpo.jsonl", pairs)
    rows = questions_20()
    write(path / "skills_sft.jsonl", rows)
    for r in rows:
        talk = r.pop("messages")
        r["chosen"], wrong = talk, {**talk[1], "content": "wrong"}
        r["rejected"] = [talk[0], wrong]
    write(path / "skills_dpo.jsonl", rows)
    return path


def train(workdir, stage, out_dir, *more):
    settings = [
        f"out_dir={out_dir}", "init_from=base", f"data.files={stage}.jsonl", "max_steps=2",
        f"data.val_files=skills_{stage}.jsonl", "tokens_per_step=512", "sequence_length=128",
        "eval_every_steps=1", "device=cpu", "kernels=plain", "precision=fp32", "optim.name=adamw",
        "optim.adamw_lr=1e-9", "optim.embedding_lr=1e-9", *more,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRAIN_LLM_CACHE_DIR": str(workdir / "cache")}
    command = [sys.executable, str(ROOT / f"{stage}_train.py"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workdir, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (workdir / out_dir / "metrics.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if "val/loss" in r]
    return [{k: v for k, v in r.items() if "/skills/" in k and k.endswith("match")} for r in rows]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_reports_skills_at_every_evaluation_and_at_the_end(stage, workdir):
    """The learning rate is too small to change an answer."""
    evaluations = train(workdir, stage, stage)
    names = {f"{kind}{w}" for kind in ("sum", "sum_direct") for w in ("", "/combination", "/words")}
    metrics = {f"val/skills/{name}/exact_match" for name in names}
    assert len(evaluations) == 3 and all(set(e) == metrics for e in evaluations)
    assert {value for e in evaluations for value in e.values()} == {1.0}
    report = json.loads((workdir / stage / "skills.json").read_text())
    assert set(report) == names
    low = pytest.approx(wilson(8, 8)[0])
    assert report["sum"] == {"correct": 8, "total": 8, "low": low, "high": 1.0}


def test_ranks_share_the_questions(trained, tokenizer):
    """Both ranks gather the same sums, which equal those of a single process."""
    model, questions = trained
    half_right = [replace(q, expected={**q.expected, "content": f"{i % 2}"}) if i % 3 else q
                  for i, q in enumerate(questions)]  # fmt: skip
    sent = {}

    def metrics(rank, world_size):
        def gather(value):
            sent[rank] = value
            return [sent[i] for i in range(world_size) if i in sent]

        test = SkillTest(tokenizer, {}, ReadOptions())
        test.questions = half_right
        distributed = SimpleNamespace(rank=rank, world_size=world_size, all_gather_object=gather)
        config = SimpleNamespace(eval_every_steps=0)
        run = SimpleNamespace(config=config, distributed=distributed)
        schedule = SimpleNamespace(num_steps=None)
        return test.metrics(SimpleNamespace(run=run, model=model, schedule=schedule))

    single = metrics(0, 1)
    assert len(single) == 6 and min(single.values()) < max(single.values())
    metrics(0, 2)
    assert metrics(1, 2) == single


def test_a_file_that_is_trained_on_has_no_questions(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", questions_20())
    for selected, expected in ((np.ones(20, bool), 20), (np.arange(20) < 5, 0)):
        packed = SimpleNamespace(parts=[(SimpleNamespace(path=path), selected)])
        assert len(SkillTest(tokenizer, {"a": packed}, ReadOptions()).questions) == expected


def test_short_runs_ask_fewer_questions_but_at_least_one_of_each(trained, tokenizer):
    """All answers take 400 generated tokens or more; a tenth of 256 positions is 25."""
    test = SkillTest(tokenizer, {}, ReadOptions())
    test.questions = trained[1]
    loader = SimpleNamespace(rows_per_step=2, dataset=SimpleNamespace(row_length=128))
    run = SimpleNamespace(config=SimpleNamespace(eval_every_steps=0))
    training = SimpleNamespace(run=run, loader=loader, schedule=SimpleNamespace(num_steps=1))
    few = test._choose(training)
    assert len(few) == len({q.name for q in few}) == 6
    training.schedule.num_steps = 10**4
    assert sorted(map(id, test._choose(training))) == sorted(map(id, trained[1]))
    run.config.eval_every_steps = 1  # 10,000 evaluations.
    assert len(test._choose(training)) == 6

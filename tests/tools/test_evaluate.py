"""Tests for tools.evaluate: its figures equal those of transformers, and values found by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from tokenizer.chat_format import render_conversation, render_prompt
from tools.evaluate.__main__ import kinds_of, main
from tools.evaluate.answers import answers, held_out_prompts, repeats
from tools.evaluate.data import default_data, named_data, run_of
from tools.evaluate.measure import Items, Results
from tools.evaluate.report import difference, write_to_card
from trainlib.core.errors import UserError
from trainlib.evaluation.skills import answer, load_questions
from trainlib.models.hf_folder import load_model, load_tokenizer, model_files

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96,
}  # fmt: skip
TEXTS = [f"第{i}条 the text of row {i}, which goes on. " * (1 + i % 3) for i in range(12)]


def talk(question, content):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": content}]


def chosen(i):
    """Return the chosen answer of a pair: longer than the rejected one, except in four of 12."""
    return TEXTS[i][:30] if i % 3 else "a"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def save(folder, tokenizer, seed):
    """Write a model with large random weights, whose greedy answers are not all the same."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    folder.mkdir(parents=True)
    for name, content in model_files(model.config, tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Return a folder with two models and files of each kind."""
    path = tmp_path_factory.mktemp("evaluate")
    save(path / "a", tokenizer, 0)
    save(path / "b", tokenizer, 1)
    write(path / "text.jsonl", [{"text": text} for text in TEXTS])
    questions = [{"messages": talk(f"{i} + {i} = ?", f"{2 * i}"), "skill": "sum",
                  "wording": ("trained", "words")[i % 2]} for i in range(6)]  # fmt: skip
    write(path / "talk.jsonl", [{"messages": talk(f"q {i}", t[:20])} for i, t in enumerate(TEXTS)])
    write(path / "skills.jsonl", questions)
    pairs = [
        {"chosen": talk(f"q {i}", chosen(i)), "rejected": talk(f"q {i}", f"no {i} no")}
        for i in range(12)
    ]
    write(path / "pairs.jsonl", [{**pair, "source": "kind"} for pair in pairs])
    return path


@pytest.fixture
def evaluate(files, monkeypatch, capsys):
    """Return a function that runs the command and returns its code, stdout and stderr."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(files / "cache"))

    def run(*arguments):
        try:
            code = main(list(arguments))
        except SystemExit as exit_:
            code = exit_.code
        return (code, *capsys.readouterr())

    return run


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def log_probs(model, ids, mask):
    """Return the log-probability of each supervised id under transformers' model."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids[:-1])])).logits[0].log_softmax(-1)
    found = logits.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
    return found[torch.tensor(list(mask[1:])) > 0]


def test_bits_per_byte_and_perplexity_equal_those_of_transformers(files, evaluate, tokenizer):
    code, out, _ = evaluate("--model", "a", "--data", "text.jsonl", "talk.jsonl", "--json")
    (model,) = json.loads(out)["models"]
    reference = theirs(files / "a")
    nats = {"text": [], "talk": []}
    for text in TEXTS:
        ids = [0, *tokenizer.encode(text), 0]
        nats["text"].append(log_probs(reference, ids, [True] * len(ids)))
    for i, text in enumerate(TEXTS):
        sequence = render_conversation(tokenizer, talk(f"q {i}", text[:20]))
        nats["talk"].append(log_probs(reference, sequence.ids, sequence.mask))
    sizes = {"text": sum(len(t.encode()) for t in TEXTS),
             "talk": sum(len(t[:20].encode()) for t in TEXTS)}  # fmt: skip
    assert code == 0 and set(model["bits_per_byte"]) == {"text", "talk"}
    for name, values in nats.items():
        values = torch.cat(values)
        bits = -float(values.sum()) / math.log(2) / sizes[name]
        assert model["bits_per_byte"][name] == pytest.approx(bits, abs=1e-3)
        assert model["perplexity"][name] == pytest.approx(math.exp(-float(values.mean())), rel=1e-3)


def test_preferences_equal_those_of_transformers(files, evaluate, tokenizer):
    _, out, _ = evaluate("--model", "b", "--data", "pairs.jsonl", "--json")
    found = json.loads(out)["models"][0]["preferences"]["kind"]
    reference, correct, longer = theirs(files / "b"), 0, 0
    for i in range(12):
        good, bad = (render_conversation(tokenizer, talk(f"q {i}", content))
                     for content in (chosen(i), f"no {i} no"))  # fmt: skip
        a, b = (float(log_probs(reference, s.ids, s.mask).sum()) for s in (good, bad))
        correct += a > b
        longer += sum(good.mask) > sum(bad.mask)
    assert (found["correct"], found["total"]) == (correct, 12) and 0 < correct < 12
    assert (found["rule"], found["rule_accuracy"]) == ("longer", longer / 12) and longer == 8


def test_greedy_answers_equal_those_of_transformers(files, tokenizer):
    """Both an open question and a skill question, each through its own function."""
    model, words = load_model(files / "a"), load_tokenizer(files / "a")
    reference, their_words = (
        cls.from_pretrained(files / "a")
        for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    prompts = held_out_prompts({files / "talk.jsonl": None})
    assert prompts == [f"q {i}" for i in range(12)]
    assert held_out_prompts({files / "talk.jsonl": {2}, files / "skills.jsonl": None}) == ["q 1"]

    def generate(prompt, length):
        ids = their_words.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        length = min(length, SIZES["max_position_embeddings"] - ids.shape[1])
        return reference.generate(ids, do_sample=False, max_new_tokens=length)[0, ids.shape[1] :]

    for prompt, (ids, ended) in zip(prompts, answers(model, words, prompts), strict=True):
        expected = generate(prompt, 128).tolist()
        assert (ids, ended) == (expected[:-1] if ended else expected, expected[-1] in (0, 2))
    questions = load_questions([files / "skills.jsonl"])
    for q, text in zip(questions, answer(model, words, questions), strict=True):
        length = 3 * (len(tokenizer.encode(q.answer)) + 1) // 2 + 16
        expected = generate(q.prompt[0]["content"], length)
        assert text == their_words.decode(expected, skip_special_tokens=True).strip()


def test_the_json_has_the_documented_keys(evaluate):
    names = ["text.jsonl", "talk.jsonl", "skills.jsonl", "pairs.jsonl"]
    code, out, err = evaluate("--model", "a", "--data", *names, "--json")
    (model,) = json.loads(out)["models"]
    assert code == 0 and not err
    assert model["path"] == "a" and set(model["bits_per_byte"]) == {"text", "talk", "skills"}
    assert {k: v["total"] for k, v in model["skills"].items()} == {"sum": 3, "sum/words": 3}
    assert model["preferences"]["kind"]["total"] == 12
    for value in (model["repetition"], model["stopped"], *list(model["sampled"].values())[1:]):
        assert 0 <= value <= 1
    table = evaluate("--model", "a", "--data", *names)[1]
    assert f"{model['bits_per_byte']['text']:.3f}" in table and "no training files" in table
    assert "0/3 (0.00 to 0.56)" in table and "n 12; best trivial rule: longer 0.667" in table


def test_two_models_are_compared_item_by_item(evaluate):
    names = ["talk.jsonl", "skills.jsonl", "pairs.jsonl"]
    _, out, _ = evaluate("--model", "a", "--model", "b", "--data", *names, "--json")
    found = json.loads(out)
    a, b = (model["bits_per_byte"]["talk"] for model in found["models"])
    row = found["differences"]["bits_per_byte"]["talk"]
    assert row["difference"] == pytest.approx(b - a) and row["low"] < b - a < row["high"]
    _, table, _ = evaluate("--model", "a", "a", "--data", *names)
    lines = [line for line in table.splitlines() if line.startswith("  talk")]
    assert lines[0].endswith("+0.000  +0.000 to +0.000")


def test_differences_equal_values_worked_out_by_hand():
    """Shares: changes 1, 0, 0, 1 have mean .5 and standard deviation .577, so 1.96 * .577 / 2.

    A ratio: changes 2, 4 over sizes 1, 3 give 6 / 4 = 1.5 and rests .5, -.5.
    """
    ones = np.ones(4)
    a, b = Items(np.array([0, 1, 0, 0.0]), ones), Items(np.array([1, 1, 0, 1.0]), ones)
    half = 1.96 * math.sqrt(1 / 3) / 2
    assert difference(a, b) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    sizes = np.array([1, 3, 0.0])
    a, b = Items(np.array([1, 1, 0.0]), sizes), Items(np.array([3, 5, 0.0]), sizes)
    half = 1.96 * math.sqrt(2 * 0.5) / 4
    assert difference(a, b) == pytest.approx((1.5, 1.5 - half, 1.5 + half))
    assert difference(Items(ones[:1], ones[:1]), Items(ones[:1], ones[:1])) is None
    assert difference(a, Items(ones, ones)) is None


def test_a_pretrained_model_is_measured_on_texts_only(files, evaluate, tokenizer):
    save(files / "base/final", tokenizer, 2)
    (files / "base/run.yaml").write_text("sequence_length: 64\nmodel:\n  hidden_size: 32\n")
    names = ["text.jsonl", "talk.jsonl", "pairs.jsonl"]
    code, out, _ = evaluate("--model", "base/final", "a", "--data", *names, "--json")
    base, other = json.loads(out)["models"]
    assert code == 0 and set(base["bits_per_byte"]) == {"text"} and "talk" in other["bits_per_byte"]
    assert base["skills"] == base["preferences"] == {} and base["repetition"] is None
    assert any("only pretrained" in note for note in base["notes"])
    code, _, err = evaluate("--model", "base/final", "--data", "talk.jsonl")
    assert code == 1 and "only pretrained, so --data needs a file with texts" in err


def test_by_default_the_files_of_the_run_and_of_the_runs_before_it_are_used(files, monkeypatch):
    """Without them, those of the sample; the data keys of earlier versions are ignored."""
    monkeypatch.chdir(files)
    for stage, before, name in (
        ("pre", "", "text"),
        ("sft", "pre", "talk"),
        ("dpo", "sft", "pairs"),
    ):
        folder = files / "runs" / stage
        (folder / "final").mkdir(parents=True)
        text = f"init_from: {f'runs/{before}/final' if before else ''}\nsequence_length: 33\n"
        text += {"pre": "model: {}\n", "dpo": "beta: 0.1\n"}.get(stage, "")
        text += f"data:\n  files: [{name}.jsonl]\n  val_files: [{name}.jsonl]\n  old_key: 3\n"
        (folder / "run.yaml").write_text(text)
    final = files / "runs/dpo/final"
    assert run_of(final)[0] == "dpo" and run_of(files / "a") == ("", {})
    found = default_data([final], ["pretrain", "sft", "dpo"])
    assert {k: d.config.val_files for k, d in found.items()} == {
        "pretrain": ("text.jsonl",), "sft": ("talk.jsonl",), "dpo": ("pairs.jsonl",)
    }  # fmt: skip
    assert {d.sequence_length for d in found.values()} == {33}
    assert kinds_of([final]) == ["sft", "dpo"] and kinds_of([files / "a"])[0] == "pretrain"
    assert kinds_of([files / "runs/pre/final"]) == ["pretrain"]
    with pytest.raises(UserError, match="Pass --data FILE"):
        default_data([files / "a"], ["sft"])
    for name in ("sft.jsonl", "val/sft/a.jsonl"):
        write(files / "dataset/sample" / name, [{"messages": talk("q", "a")}])
    sample = default_data([files / "a"], ["pretrain", "sft"])
    assert sample["sft"].config.val_files == ("dataset/sample/val/sft/a.jsonl",)


def test_named_files_are_read_with_the_settings_of_the_run(files, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    (tmp_path / "final").mkdir()
    data = "{files: [gone.jsonl], columns: ['prompt:ask', 'answer:reply'], markers: keep}"
    (tmp_path / "run.yaml").write_text(f"sequence_length: 33\ndata: {data}\n")
    mine = write(tmp_path / "mine.jsonl", [{"ask": "2+2", "reply": "4"}] * 2)
    found = named_data([mine], [tmp_path / "final"])["sft"].config
    assert found.columns == ("prompt:ask", "answer:reply") and found.val_files == (mine,)
    assert found.markers == "keep"
    with pytest.raises(UserError, match="ask"):
        named_data([mine], [files / "a"])


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--model", "no"], 1, "--model no: no model found"),
        (["--model", "a", "--data", "no.jsonl"], 1, "--data no.jsonl does not exist"),
        (["--model", "a", "--data", "a"], 1, "config.json"),
        (["--model", "a", "a", "a"], 2, "at most two folders, found 3"),
    ],
)
def test_errors_say_what_is_wrong(evaluate, arguments, code, message):
    found, out, err = evaluate(*arguments)
    assert found == code and message in err and not out and "Traceback" not in err


def test_the_table_is_inserted_into_the_card_and_replaced(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    card = "---\ntags: [sft]\n---\n<!-- begin evaluation -->\n{}<!-- end evaluation -->\n# End\n"
    path, expected = folder / "README.md", "```text\nA  final: 0.0M parameters\n{}```\n"
    path.write_text(card.format(""))
    write_to_card(Results(str(folder), 0))
    assert path.read_text() == card.format(expected.format(""))
    notes = [f"{folder}: \\1", f"sft: measured on {folder}/a.jsonl, data/b.jsonl"]
    write_to_card(Results(str(folder), 0, notes=notes))
    text = "note: final: \\1\nnote: sft: measured on a.jsonl, b.jsonl\n"
    assert path.read_text() == card.format(expected.format(text))
    path.write_text("# Another card")
    with pytest.raises(UserError, match="begin evaluation"):
        write_to_card(Results(str(folder), 0))


def test_repeats_finds_an_n_gram_that_occurs_three_times():
    gram = list(range(8))
    assert repeats([*gram, 9, *gram, 9, *gram]) and not repeats([*gram, 9, *gram, *range(7)])


def test_sampled_answers_do_not_depend_on_the_run(files):
    model, words = load_model(files / "a"), load_tokenizer(files / "a")
    hot = answers(model, words, ["a", "b"], 0.8)
    assert hot == answers(model, words, ["a", "b"], 0.8) != answers(model, words, ["a", "b"])
    assert len(render_prompt(words, [{"role": "user", "content": "x" * 500}])) > 96
    assert answers(model, words, ["x" * 500]) == []

"""Tests that skill questions have the right answers, and that nothing held out is trained on.

The items are read back from the text of each question, not from the generator.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

from model import ModelConfig, Transformer
from tests.tools.test_chat import SIZES, save
from tokenizer.chat_format import render_conversation
from tools.prepare_data import skill_pairs
from tools.prepare_data.items import PEOPLE, chinese, english
from tools.prepare_data.skills import HELD_OUT, KINDS, held_out, skill_rows, wordings
from trainlib.core.errors import UserError
from trainlib.data import formats
from trainlib.data.findings import Counts

WORDS = [f"{a}{b}{c}" for a in ("st", "b", "cr") for b in ("on", "ee", "ar", "ill", "a")
         for c in ("ing", "er", "tion", "let", "er", "ana", "sip")]  # fmt: skip
NEVER_TRAINED = {"three_digit_sum", "where_is"}


@pytest.fixture(scope="module")
def rows():
    """Return the conversations and the held-out pairs, as a file holds them."""
    return tuple([json.loads(row.line) for row in part] for part in skill_rows(WORDS))


@pytest.fixture(scope="module")
def trained(rows):
    return [row for row in rows[0] if "skill" not in row]


@pytest.fixture(scope="module")
def held(rows):
    return [row for row in rows[0] if "skill" in row]


def parts(row):
    """Return the kind, the question, the steps and the answer of a row."""
    user, assistant = row.get("messages") or row["chosen"]
    steps = assistant.get("reasoning_content", "")
    return row["source"].removeprefix("skill_"), user["content"], steps, assistant["content"]


def item(row):
    """Return what a question is about, regardless of its wording and the order of operands."""
    kind, question, steps, answer = parts(row)
    numbers = tuple(sorted(map(int, re.findall(r"\d+", question.replace("0到9", "")))))
    if kind in ("sum", "sum_direct", "difference", "larger"):
        assert len(numbers) == 2
        return kind.removesuffix("_direct"), numbers
    if kind in ("words_to_digits_en", "numeral_to_digits_zh"):
        return kind[-2:], int(answer)
    if kind in ("digits_to_words_en", "digits_to_numeral_zh", "even"):
        [number] = numbers
        return kind if kind == "even" else kind[-2:], number
    if kind == "json":
        return tuple(json.loads(answer).values())
    if kind == "count_letter":
        return re.sub(r"[\d ]", "", steps)
    if kind == "reverse":
        return re.search("(?<![A-Za-z])(?:[a-z],){2,}[a-z](?![a-z])", question)[0]
    return kind, question


def test_no_held_out_item_is_trained_in_any_wording(trained, held):
    seen = {item(row) for row in trained}
    assert len(seen) > 5_000
    assert not {item(row) for row in held} & seen
    assert not {parts(row)[0] for row in trained} & NEVER_TRAINED


def test_each_kind_has_its_numbers_of_rows(trained, held):
    expected = {(kind, column): n for kind in KINDS for column, n in HELD_OUT.items()}
    assert Counter((row["skill"], row["wording"]) for row in held) == expected
    counts = Counter(parts(row)[0] for row in trained)
    assert counts == {kind: entry.rows for kind, entry in KINDS.items() if entry.rows}
    questions = [parts(row)[1] for row in trained if parts(row)[0] != "sum_direct"]
    assert len(questions) == len(set(questions))


def solve(kind, question, row):
    """Return the answer, computed from the text of the question."""
    numbers = [int(n) for n in re.findall(r"\d+", question.replace("0到9", ""))]
    if "sum" in kind:
        return str(sum(numbers))
    if kind == "difference":
        return str(max(numbers) - min(numbers))
    if kind == "larger":
        return str(max(numbers))
    if kind == "even":
        chinese_names = re.search("[\u4e00-\u9fff]", question)
        return (("偶数", "奇数") if chinese_names else ("even", "odd"))[numbers[0] % 2]
    if kind == "digits_to_numeral_zh":
        return chinese(numbers[0])
    if kind == "digits_to_words_en":
        return english(numbers[0])
    if kind == "reverse":
        return item(row)[::-1]
    if kind == "numeral_to_digits_zh":
        return next(str(n) for n in range(9999, 9, -1) if chinese(n) in question)
    if kind == "words_to_digits_en":
        return next(str(n) for n in range(999, 9, -1) if ENGLISH[n].search(question.lower()))
    return None


ENGLISH = [re.compile(rf"\b{english(n)}\b") for n in range(1000)]


def test_answers_are_right_and_wrong_ones_are_not(trained, rows):
    checked = Counter()
    for row in [*trained, *rows[1]]:
        kind, question, steps, answer = parts(row)
        expected = solve(kind, question, row)
        if expected is not None:
            assert answer == expected, question
            checked[kind] += 1
        for line in steps.split("\n") if kind in ("sum", "difference", "larger") else ():
            assert eval(re.sub("(?<![<>])=", "==", line)), (question, steps)
        if "rejected" in row:
            *_, wrong = row["rejected"]
            right = row["chosen"][-1]
            assert row["rejected"][:-1] == row["chosen"][:-1]
            assert wrong["content"] != right["content"] and wrong.keys() == right.keys()
            assert (
                not steps
                or wrong["reasoning_content"] != right["reasoning_content"]
                or (kind == "count_letter")
            )
    assert min(checked.values()) >= 320 and len(checked) == 11


def test_readings_and_counts_are_right(held):
    for row in held:
        kind, question, steps, answer = parts(row)
        if kind == "json":
            values = json.loads(answer)
            assert list(values) == ["name", "age", "city"]
            assert all(str(value) in question for value in values.values())
        elif kind == "count_letter":
            word = item(row)
            assert word in WORDS and word in question
            letters = set(re.findall(r"(?<![A-Za-z])[a-z](?![A-Za-z])", question)) - {"a"}
            [letter] = letters or {"a"}  # In English, "a" may be the article.
            assert str(word.count(letter)) == answer == str(steps.count(letter))
        elif kind == "where_is":
            names = "|".join([*PEOPLE["zh"], *PEOPLE["en"]])
            story = rf"({names})(?:去了| went to the )(\w+)[。.]"
            went, rest = re.findall(story, question), re.sub(story, "", question)
            assert len(went) == 3
            [asked] = {name for name, _ in went if name in rest}
            assert dict(went)[asked] == answer


def test_numerals():
    numbers = {10: "十", 15: "十五", 20: "二十", 105: "一百零五", 110: "一百一十", 1005: "一千零五",
               3040: "三千零四十", 9999: "九千九百九十九"}  # fmt: skip
    assert {n: chinese(n) for n in numbers} == numbers
    numbers = {13: "thirteen", 40: "forty", 42: "forty-two", 100: "one hundred",
               305: "three hundred and five",
               1999: "one thousand nine hundred and ninety-nine"}  # fmt: skip
    assert {n: english(n) for n in numbers} == numbers
    assert len({chinese(n) for n in range(10_000)} | {english(n) for n in range(10_000)}) == 20_000


def test_wordings_of_the_columns_are_apart(trained):
    """New wordings have a word, or two Chinese characters in a row, that is in no training row."""
    asked = {}
    for row in trained:
        kind, question, *_ = parts(row)
        asked.setdefault(kind, []).append(question)
    for kind in KINDS:
        for language in ("zh", "en"):
            if f"{language} new" not in KINDS[kind].forms:
                continue
            known, unseen, new = (wordings(kind, language, c) for c in (*HELD_OUT,))
            assert len(known) >= 100 and len(unseen) >= 25 and len(new) == 2
            assert not set(known) & set(unseen)
            text = " ".join(asked.get(kind, known)).lower()
            pieces = r"(?=([\u4e00-\u9fff]{2}))" if language == "zh" else r"([a-z]{3,})"
            for wording in new:
                found = re.findall(pieces, re.sub(r"\{\w+\}", " ", wording.lower()))
                assert any(piece not in text for piece in found), (kind, wording)


def test_stages_read_every_row(rows, tokenizer):
    """Every row is used, has no unread key but its labels, and fits in a short row."""
    for kind, part in (("sft", rows[0]), ("dpo", rows[1])):
        counts = Counts()
        items = [(i, json.dumps(row).encode()) for i, row in enumerate(part, 1)]
        for _, records in formats.check_items(items, "file", kind, formats.ReadOptions(), counts):
            [record] = records
            messages = record.value if kind == "sft" else record.value[0]
            sequence = render_conversation(tokenizer, messages)
            assert len(sequence.ids) <= 128 and any(sequence.mask)
        assert counts.rows == len(part) and not counts.not_used
        assert not set(counts.unused_keys) - {"skill", "wording"}


def test_the_same_rows_every_time(rows):
    assert tuple([json.loads(row.line) for row in part] for part in skill_rows(WORDS)) == rows


# ---- the model's own mistakes -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    """Return the folder of a random model, which ends few answers."""
    monkeypatch.setattr(skill_pairs, "QUESTIONS", 24)
    torch.manual_seed(0)
    save(tmp_path, Transformer(ModelConfig(**{**SIZES, "max_position_embeddings": 128})), tokenizer)
    return tmp_path


def test_wrong_answers_become_rejected_ones(folder, tmp_path, capsys):
    out, sources = tmp_path / "out", tmp_path / "out/SOURCES.json"
    out.mkdir()
    of_sft = {f"skill_{kind}": {"rows": 7, "bytes": 9, "packages": ["p"]} for kind in KINDS}
    sources.write_text(json.dumps({"files": {"sft.jsonl": {"sources": of_sft}}}), encoding="utf-8")
    skill_pairs.write_skill_pairs(folder, out, WORDS)
    printed = capsys.readouterr().out
    [path] = out.glob("*.jsonl")
    assert printed.splitlines()[-1] == str(path) and "fewer than 50 pairs" in printed
    content = path.read_bytes()
    pairs = [json.loads(line) for line in content.splitlines()]
    assert pairs and re.fullmatch(r"dpo_skills-[0-9a-f]{12}\.jsonl", path.name)
    listed = json.loads(sources.read_text(encoding="utf-8"))["files"]
    assert set(listed) == {"sft.jsonl", path.name} and listed[path.name]["rows"] == len(pairs)
    counts = Counter(pair["source"] for pair in pairs)
    expected = {name: {"rows": n, "packages": ["p"]} for name, n in counts.items()}
    assert listed[path.name]["sources"] == expected
    held_rows = (json.loads(row.line) for row in skill_rows(WORDS)[0])
    seen = {item(row) for row in held_rows if "skill" in row}
    assert not {item({**pair, "messages": pair["chosen"]}) for pair in pairs} & seen
    for pair in pairs:
        kind, question, _, answer = parts(pair)
        assert pair["rejected"][0] == pair["chosen"][0]
        assert pair["rejected"][1]["content"].strip() not in ("", answer)
        assert solve(kind, question, pair) in (answer, None)
        assert kind != "sum_direct" and "enable_thinking" not in pair["rejected"][1]
    skill_pairs.write_skill_pairs(folder, out, WORDS)
    assert capsys.readouterr().out == f"{path}\n"  # A file that exists is kept.
    path.unlink()
    skill_pairs.write_skill_pairs(folder, out, WORDS)
    assert path.read_bytes() == content


def test_answers_that_training_cannot_read_are_no_pairs():
    question, right = {"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}
    steps = {"role": "assistant", "reasoning_content": "3+4=8", "content": "8"}
    for rejected, readable in ((steps, True), ({**steps, "content": "8</think>9"}, False)):
        pair = {"chosen": [question, right], "rejected": [question, rejected]}
        assert skill_pairs.is_readable(pair) is readable


def test_skill_pairs_are_of_the_training_side(folder):
    asked = [
        pair for kind in KINDS for pair in skill_pairs.questions(kind, "train", 24, WORDS, "p")
    ]
    assert len(asked) > 200 and not any(held_out(item.key) for _, item in asked)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--skill-pairs .*no model found"):
        skill_pairs.write_skill_pairs(tmp_path, tmp_path, WORDS)

"""Skills: questions with one right answer, made from a small grammar, in Chinese and English.

1. A kind draws an item, such as the operands of a sum (items.py). A hash of the item decides
   whether it is held out, so no held-out item occurs in training, in any wording.
2. A wording is a prefix, a form and an ending. A fifth of the combinations is never trained.
3. Held-out rows have the keys "skill" and "wording". The wording is trained, a combination that is
   never trained, or has words that never occur ("words").

Steps are reasoning (`reasoning_content`), and the answer alone is the content. KINDS has the number
of training rows of each kind; the kinds with none show what the model was never taught.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

from tools.prepare_data.items import (
    Draw,
    Item,
    Solution,
    chinese,
    draw_count,
    draw_difference,
    draw_even,
    draw_json,
    draw_larger,
    draw_numeral,
    draw_reverse,
    draw_sum,
    draw_three_digit_sum,
    draw_where,
    english,
)
from tools.prepare_data.rows import Row, message, stable_hash

HELD_OUT = {"trained": 200, "combination": 60, "words": 60}
"""Number of held-out questions of each kind, by their wording."""


class Kind(NamedTuple):
    """One kind of question."""

    draw: Draw
    forms: dict[str, list[str]]
    """Forms with slots by language and mood (do, ask); under "new", wordings with new words."""
    rows: int
    """Number of training rows."""
    think: bool = True
    """False = the answer is given directly, although the item has steps."""


def held_out(key: str) -> bool:
    """Return whether an item is held out: one in eight, by a hash."""
    return stable_hash(f"skill {key}") % 8 == 0


# ---- questions ------------------------------------------------------------------------------

PREFIXES = {
    "zh do": ("", "请", "请你", "帮我", "请帮我", "麻烦你", "麻烦帮我", "你能不能"),
    "zh ask": ("", "请问", "请问一下，", "我想知道", "你知道", "告诉我，", "问一下，"),
    "en do": ("", "please ", "can you ", "could you ", "I want you to ", "help me to ", "now "),
    "en ask": ("", "hi, ", "hello, ", "tell me, ", "quick question: ", "I wonder, ", "please, "),
}
ENDINGS = {
    "zh do": ("", "。", "！", "，谢谢。", "吧。"),
    "zh ask": ("", "？", "呢？", "？谢谢。"),
    "en do": ("", ".", "!", ", please.", ", thanks."),
    "en ask": ("", "?", "? Thanks.", " ?"),
}


@lru_cache
def wordings(kind: str, language: str, column: str) -> tuple[str, ...]:
    """Return the wordings of a kind: "trained", never trained ("combination"), or new ("words")."""
    forms = KINDS[kind].forms
    if column == "words":
        return tuple(forms[f"{language} new"])
    found = []
    for style in (f"{language} do", f"{language} ask"):
        for parts in itertools.product(PREFIXES[style], forms[style], ENDINGS[style]):
            if (stable_hash("|".join(parts)) % 5 == 0) == (column == "combination"):
                text = "".join(parts)
                found.append(text if text[0] == "{" else text[0].upper() + text[1:])
    return tuple(found)


def languages(kind: str) -> list[str]:
    """Return the languages of a kind."""
    return [language for language in ("zh", "en") if f"{language} new" in KINDS[kind].forms]


def questions(
    kind: str, column: str, number: int, words: Sequence[str], seed: str = "rows"
) -> list[tuple[str, Item]]:
    """Return different questions with their items; for training in the column "train".

    Returns fewer if too few are found, as with a short list of words.
    """
    random = Random(f"{seed} {kind} {column}")
    training = column == "train"
    found: dict[str, Item] = {}
    for _ in range(50 * number):
        if len(found) == number:
            break
        language = random.choice(languages(kind))
        item = KINDS[kind].draw(random, language, words)
        wording = random.choice(wordings(kind, language, "trained" if training else column))
        if held_out(item.key) != training:
            found.setdefault(wording.format(**item.slots), item)
    return list(found.items())


def conversation(kind: str, question: str, solution: Solution) -> list[dict[str, Any]]:
    """Return the messages of a question and its solution."""
    steps, text = solution
    answer: dict[str, Any] = message("assistant", text)
    if not KINDS[kind].think:
        answer["enable_thinking"] = False
    elif steps:
        answer["reasoning_content"] = steps
    return [message("user", question), answer]


def skill_rows(words: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Return the conversations of all kinds, for training and held out, and the held-out pairs."""
    conversations, pairs = [], []
    for kind, entry in KINDS.items():
        source = f"skill_{kind}"
        for question, item in questions(kind, "train", entry.rows, words):
            messages = conversation(kind, question, item.right)
            conversations.append(Row(item.key, source, {"messages": messages}))
        for column, number in HELD_OUT.items():
            for question, item in questions(kind, column, number, words):
                right, wrong = (conversation(kind, question, s) for s in (item.right, item.wrong))
                labels = {"skill": kind, "wording": column}
                conversations.append(Row(item.key, source, {"messages": right, **labels}))
                pairs.append(Row(item.key, source, {"chosen": right, "rejected": wrong, **labels}))
    return conversations, pairs


def words_of(texts: Iterable[str]) -> list[str]:
    """Return the English words of four to nine letters in texts, sorted."""
    return sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,9}\b", text)})


# ---- forms -------------------------------------------------------------------------------

SUM = {
    "zh do": ["计算{a}+{b}", "算出{a}加{b}", "求{a}和{b}的和", "把{a}和{b}加起来", "算一下{a}+{b}"],
    "zh ask": ["{a}+{b}等于多少", "{a}加{b}是多少", "{a}加上{b}等于几", "{a}与{b}的和是多少",
               "{a}+{b}="],
    "zh new": ["劳驾，{a}加{b}得出什么数？", "{a}+{b}的结果是什么？"],
    "en do": ["add {a} and {b}", "compute {a} + {b}", "calculate {a} plus {b}",
              "find the sum of {a} and {b}", "work out {a}+{b}"],
    "en ask": ["what is {a} + {b}", "what is {a} plus {b}", "how much is {a} plus {b}",
               "what is the sum of {a} and {b}", "{a} + {b} ="],
    "en new": ["Kindly add {a} and {b} together.", "What does {a} plus {b} come out as?"],
}  # fmt: skip
DIFFERENCE = {
    "zh do": ["计算{a}-{b}", "算出{a}减{b}", "求{a}和{b}的差", "从{a}里减去{b}", "算一下{a}-{b}"],
    "zh ask": ["{a}-{b}等于多少", "{a}减{b}是多少", "{a}减去{b}等于几", "{a}与{b}的差是多少",
               "{a}-{b}="],
    "zh new": ["劳驾，{a}减{b}得出什么数？", "{a}-{b}的结果是什么？"],
    "en do": ["subtract {b} from {a}", "compute {a} - {b}", "calculate {a} minus {b}",
              "find the difference of {a} and {b}", "work out {a}-{b}"],
    "en ask": ["what is {a} - {b}", "what is {a} minus {b}", "how much is {a} minus {b}",
               "what is the difference of {a} and {b}", "{a} - {b} ="],
    "en new": ["Kindly subtract {b} from {a}.", "What does {a} minus {b} come out as?"],
}  # fmt: skip
LARGER = {
    "zh do": ["比较{a}和{b}，说出较大的数", "找出{a}和{b}中较大的数", "选出{a}与{b}里更大的那个",
              "指出{a}和{b}哪个大"],
    "zh ask": ["{a}和{b}哪个大", "{a}和{b}哪个更大", "{a}与{b}相比谁大", "{a}和{b}中较大的是哪个"],
    "zh new": ["劳驾，{a}和{b}里哪个大些？", "{a}和{b}这两者谁更大？"],
    "en do": ["pick the larger of {a} and {b}", "choose the bigger number: {a} or {b}",
              "compare {a} and {b} and name the greater one", "find the larger number: {a}, {b}"],
    "en ask": ["which is larger, {a} or {b}", "which number is bigger, {a} or {b}",
               "which is greater: {a} or {b}", "is {a} or {b} larger"],
    "en new": ["Kindly name the larger number, {a} or {b}.",
               "Of {a} and {b}, which has the bigger value?"],
}  # fmt: skip
TO_DIGITS_ZH = {
    "zh do": ["把{n}写成数字", "用阿拉伯数字写出{n}", "将{n}转换为数字", "把{n}换成阿拉伯数字"],
    "zh ask": ["{n}用数字怎么写", "{n}是多少，用数字写", "数字{n}怎么用阿拉伯数字表示",
               "{n}写成数字是什么"],
    "zh new": ["劳驾将{n}改写成阿拉伯数字。", "{n}的数字形式是什么？"],
}  # fmt: skip
TO_NUMERAL_ZH = {
    "zh do": ["把{n}写成中文数字", "用汉字写出{n}", "将{n}转换为中文", "把{n}换成汉字"],
    "zh ask": ["{n}用中文怎么写", "{n}用汉字怎么写", "{n}怎么用中文表示", "{n}写成汉字是什么"],
    "zh new": ["劳驾将{n}改写成汉字。", "{n}的中文形式是什么？"],
}  # fmt: skip
TO_DIGITS_EN = {
    "en do": ["write {n} in digits", "write {n} as a number", "convert {n} to digits",
              "turn {n} into digits"],
    "en ask": ["what is {n} in digits", "how do you write {n} in digits", "what number is {n}",
               "how is {n} written as a number"],
    "en new": ["Kindly write {n} using digits.", "What does {n} look like in digits?"],
}  # fmt: skip
TO_WORDS_EN = {
    "en do": ["write {n} in words", "write {n} as words", "convert {n} to words",
              "spell out {n} in English words"],
    "en ask": ["what is {n} in words", "how do you write {n} in words",
               "how is {n} written in English",
               "how do you say {n} in English"],
    "en new": ["Kindly write {n} using words.", "What does {n} look like in words?"],
}  # fmt: skip
JSON = {
    "zh do": ["把“{text}”转成JSON", "从“{text}”中提取JSON", "用JSON表示：“{text}”",
              "将这句话写成JSON：“{text}”"],
    "zh ask": ["“{text}”的JSON是什么", "“{text}”怎么写成JSON", "“{text}”用JSON怎么表示"],
    "zh new": ["劳驾把“{text}”改写成JSON。", "“{text}”对应的JSON是什么？"],
    "en do": ['turn "{text}" into JSON', 'extract JSON from "{text}"',
              'write this as JSON: "{text}"',
              'convert "{text}" to JSON'],
    "en ask": ['what is "{text}" as JSON', 'how do you write "{text}" in JSON',
               'what is the JSON for "{text}"'],
    "en new": ['Kindly turn "{text}" into a JSON object.',
               'What would "{text}" look like in JSON?'],
}  # fmt: skip
COUNT = {
    "zh do": ["数一数单词{word}里有几个{letter}", "数出{word}中字母{letter}的个数",
              "统计{word}里的{letter}有几个"],
    "zh ask": ["单词{word}里有几个{letter}", "{word}中有多少个字母{letter}",
               "字母{letter}在{word}里出现几次"],
    "zh new": ["劳驾数数单词{word}里的字母{letter}。", "单词{word}总共有几个{letter}？"],
    "en do": ["count the letter {letter} in the word {word}",
              "count how often {letter} occurs in {word}",
              "find the number of {letter} in the word {word}"],
    "en ask": ["how many {letter} are in the word {word}",
               "how often does {letter} occur in {word}",
               "how many times is the letter {letter} in {word}"],
    "en new": ["Kindly count each {letter} in {word}.",
               "What number of {letter} does the word {word} contain?"],
}  # fmt: skip
EVEN = {
    "zh do": ["判断{n}是奇数还是偶数", "说出{n}是偶数还是奇数", "判断{n}的奇偶"],
    "zh ask": ["{n}是奇数还是偶数", "{n}是偶数还是奇数", "数字{n}是奇是偶"],
    "zh new": ["劳驾，{n}是奇数还是偶数？", "{n}属于奇数还是偶数？"],
    "en do": ["say whether {n} is even or odd", "decide if {n} is odd or even",
              "check whether {n} is even"],
    "en ask": ["is {n} even or odd", "is the number {n} odd or even", "is {n} even"],
    "en new": ["Kindly say whether {n} is odd or even.", "Would you call {n} even or odd?"],
}  # fmt: skip
REVERSE = {
    "zh do": ["把{letters}倒过来写", "倒着写出{letters}", "把字母{letters}反过来", "反转{letters}"],
    "zh ask": ["{letters}倒过来是什么", "{letters}倒着怎么写", "字母{letters}反过来是什么"],
    "zh new": ["劳驾把{letters}倒过来写。", "{letters}颠倒之后是什么？"],
    "en do": ["reverse {letters}", "write {letters} backwards", "reverse the letters {letters}",
              "put {letters} in reverse order"],
    "en ask": ["what is {letters} backwards", "what is {letters} in reverse order",
               "how do you write {letters} backwards"],
    "en new": ["Kindly write {letters} backwards.",
               "What do you get from {letters} in reverse order?"],
}  # fmt: skip
WHERE = {
    "zh do": ["读一读：{story}说出{name}在哪里", "根据这段话回答{name}在哪里：{story}"],
    "zh ask": ["{story}{name}在哪里", "{story}{name}现在在什么地方"],
    "zh new": ["{story}欲寻{name}，该往何处？", "{story}定位{name}。"],
    "en do": ["read this: {story} Say where {name} is", "find {name}: {story}"],
    "en ask": ["{story} Where is {name}", "{story} In which room is {name}"],
    "en new": ["{story} Locate {name}.", "{story} To meet {name}, visit what room?"],
}  # fmt: skip

# The numbers of training rows were chosen by trial trainings with configs/tiny_sft.yaml.
KINDS = {
    "sum": Kind(draw_sum, SUM, 3_000),
    "sum_direct": Kind(draw_sum, SUM, 300, think=False),
    "difference": Kind(draw_difference, DIFFERENCE, 5_400),
    "larger": Kind(draw_larger, LARGER, 3_000),
    "numeral_to_digits_zh": Kind(draw_numeral(chinese, True), TO_DIGITS_ZH, 1_800),
    "digits_to_numeral_zh": Kind(draw_numeral(chinese, False), TO_NUMERAL_ZH, 1_900),
    "words_to_digits_en": Kind(draw_numeral(english, True), TO_DIGITS_EN, 1_600),
    "digits_to_words_en": Kind(draw_numeral(english, False), TO_WORDS_EN, 1_700),
    "json": Kind(draw_json, JSON, 2_200),
    "count_letter": Kind(draw_count, COUNT, 1_400),
    "even": Kind(draw_even, EVEN, 1_000),
    "reverse": Kind(draw_reverse, REVERSE, 1_600),
    "three_digit_sum": Kind(draw_three_digit_sum, SUM, 0),
    "where_is": Kind(draw_where, WHERE, 0),
}

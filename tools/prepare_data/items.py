"""Items of the skills: what a question is about, with a right and a wrong answer.

A function `draw_KIND(random, language, words)` draws an item. Its key does not depend on the
language or, if the answer does not, on the order of the operands: it decides what is held out.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

Solution = tuple[str, str]
"""The steps, or an empty string, and the answer."""


class Item(NamedTuple):
    """The values of the slots in a form, and a right and a plausible wrong answer."""

    key: str
    slots: dict[str, Any]
    right: Solution
    wrong: Solution


Draw = Callable[[Random, str, Sequence[str]], Item]
"""Draws an item: (random numbers, language, words)."""

# ---- numbers --------------------------------------------------------------------------------

DIGITS = "零一二三四五六七八九"
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def chinese(number: int) -> str:
    """Return a number below 10,000 as a Chinese numeral."""
    text, zero = "", False
    for unit, size in (("千", 1000), ("百", 100), ("十", 10), ("", 1)):
        digit = number // size % 10
        if digit:
            text += ("零" if zero and text else "") + DIGITS[digit] + unit
        zero = not digit
    return text[1:] if text.startswith("一十") else text or "零"


def english(number: int) -> str:
    """Return a number below 10,000 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % size
    link = " and " if rest < 100 else " "
    return f"{ONES[number // size]} {name}" + (link + english(rest) if rest else "")


def other_number(number: int, random: Random) -> int:
    """Return a number that differs in one digit and has as many."""
    digits = list(str(number))
    at = random.randrange(len(digits))
    digits[at] = random.choice([d for d in "123456789" if d != digits[at]])
    return int("".join(digits))


def some_number(random: Random, longest: int = 4) -> int:
    """Return a number of two to `longest` digits, each length as often as the others."""
    size = random.randint(2, longest)
    return random.randrange(10 ** (size - 1), 10**size)


# ---- arithmetic ------------------------------------------------------------------------------


def column_sum(a: int, b: int, slip: int = -1) -> Solution:
    """Add two numbers digit by digit, from the right; the column `slip` is off by one."""
    lines, carry, result = [], 0, ""
    for i in range(len(str(a))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry + (i == slip)
        lines.append(f"{x}+{y}{f'+{carry}' if i else ''}={total}")
        result, carry = f"{total % 10}{result}", total // 10
    return "\n".join(lines), f"{carry or ''}{result}"


def column_difference(a: int, b: int, slip: int = 0) -> Solution:
    """Subtract two two-digit numbers digit by digit; the last digit is off by `slip`."""
    x, y = a % 10, b % 10
    borrow = int(x < y)
    ones = 10 * borrow + x - y + slip
    tens = a // 10 - b // 10 - borrow
    lines = (f"{x}{'<' if borrow else '>' if x > y else '='}{y}", f"{10 * borrow + x}-{y}={ones}",
             f"{a // 10}-{b // 10}-{borrow}={tens}")  # fmt: skip
    return "\n".join(lines), str(10 * tens + ones)


def draw_sum(random: Random, language: str, words: Sequence[str], size: int = 2) -> Item:
    """Draw a sum of two numbers with `size` digits."""
    a, b = (random.randrange(10 ** (size - 1), 10**size) for _ in range(2))
    wrong = column_sum(a, b, random.randrange(size))
    return Item(f"{min(a, b)}+{max(a, b)}", {"a": a, "b": b}, column_sum(a, b), wrong)


def draw_three_digit_sum(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw a sum of two three-digit numbers."""
    return draw_sum(random, language, words, 3)


def draw_difference(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw a difference of two-digit numbers, above 0."""
    b, a = sorted(random.sample(range(10, 100), 2))
    right = column_difference(a, b)
    wrong = column_difference(a, b, -1 if right[1][-1] == "9" else 1)
    return Item(f"{a}-{b}", {"a": a, "b": b}, right, wrong)


def draw_larger(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw two numbers to compare; in a third of the items, the first digits are equal."""
    a, b = random.sample(range(10, 100), 2)
    if random.random() < 1 / 3:
        tens = random.randrange(1, 10)
        a, b = (10 * tens + ones for ones in random.sample(range(10), 2))
    same = f"{a // 10}={b // 10}\n" if a // 10 == b // 10 else ""
    x, y = (a % 10, b % 10) if same else (a // 10, b // 10)
    signs = (">", "<") if a > b else ("<", ">")
    right, wrong = ((f"{same}{x}{sign}{y}", str(a if sign == ">" else b)) for sign in signs)
    return Item(f"{min(a, b)}<>{max(a, b)}", {"a": a, "b": b}, right, wrong)


def draw_numeral(write: Callable[[int], str], to_digits: bool) -> Draw:
    """Return the function that draws a number to convert between digits and words."""

    def draw(random: Random, language: str, words: Sequence[str]) -> Item:
        number = some_number(random, 4 if language == "zh" else 3)
        asked, answered = (write, str) if to_digits else (str, write)
        wrong = answered(other_number(number, random))
        return Item(
            f"{language} {number}", {"n": asked(number)}, ("", answered(number)), ("", wrong)
        )

    return draw


PEOPLE = {
    "zh": "小明 小红 小华 小丽 小刚 小芳 李雷 韩梅 王强 张伟 刘洋 陈静 杨帆 赵敏 周杰 吴芳".split(),
    "en": "Anna Tom Lucy Peter Mary John Emma David Sarah Paul Linda Mark Alice Henry Jane".split(),
}
CITIES = {
    "zh": "北京 上海 广州 深圳 杭州 南京 成都 武汉 西安 重庆 天津 苏州 长沙 青岛".split(),
    "en": "London Paris Berlin Rome Madrid Boston Chicago Dublin Vienna Oslo Prague Tokyo".split(),
}
SENTENCES = {
    "zh": (
        "{name}今年{age}岁，住在{city}。",
        "{name}住在{city}，今年{age}岁。",
        "住在{city}的{name}今年{age}岁。",
    ),
    "en": (
        "{name} is {age} years old and lives in {city}.",
        "{name} lives in {city} and is {age} years old.",
        "{name} from {city} is {age} years old.",
    ),
}
PLACES = {
    "zh": "厨房 花园 卧室 客厅 书房 车库".split(),
    "en": "kitchen garden bedroom hall office cellar".split(),
}


def draw_json(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw a sentence about a person, to write as JSON."""
    person: dict[str, Any] = {
        "name": random.choice(PEOPLE[language]),
        "age": random.randrange(10, 100),
        "city": random.choice(CITIES[language]),
    }
    text = random.choice(SENTENCES[language]).format(**person)
    other = {**person, "age": other_number(person["age"], random)}
    right, wrong = (("", json.dumps(values, ensure_ascii=False)) for values in (person, other))
    return Item(" ".join(map(str, person.values())), {"text": text}, right, wrong)


def draw_count(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw a word and a letter to count; the word is held out, not only the pair."""
    word = random.choice(words)
    letter = random.choice(word if random.random() < 0.8 else string.ascii_lowercase)

    def count(slip: int) -> Solution:
        total, parts = 0, []
        for i, character in enumerate(word):
            found = (character == letter) + (i == slip)
            total += found
            parts.append(f"{character}{total}" if found else character)
        return " ".join(parts), str(total)

    slots = {"word": word, "letter": letter}
    return Item(word, slots, count(-1), count(random.randrange(len(word))))


def draw_even(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw a number that is even or odd."""
    number = some_number(random)
    names = ("偶数", "奇数") if language == "zh" else ("even", "odd")
    right, wrong = (("", names[(number + i) % 2]) for i in range(2))
    return Item(f"even {number}", {"n": number}, right, wrong)


def draw_reverse(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw three to five different letters to reverse."""
    letters = random.sample(string.ascii_lowercase, random.randint(3, 5))
    turned = letters[::-1]
    at = random.randrange(len(letters) - 1)
    swapped = [*turned[:at], turned[at + 1], turned[at], *turned[at + 2 :]]
    right, wrong = (("", ",".join(text)) for text in (turned, swapped))
    return Item("".join(letters), {"letters": ",".join(letters)}, right, wrong)


def draw_where(random: Random, language: str, words: Sequence[str]) -> Item:
    """Draw three sentences about who went where, and ask for the last place of one of two."""
    one, two = random.sample(PEOPLE[language], 2)
    places = random.sample(PLACES[language], 3)
    people = random.choice(([one, two, one], [one, two, two], [one, one, two]))
    went = "{}去了{}。" if language == "zh" else "{} went to the {}. "
    story = "".join(went.format(*pair) for pair in zip(people, places, strict=True)).strip()
    last = dict(zip(people, places, strict=True))
    others = [place for place in places if place != last[one]]
    slots = {"story": story, "name": one}
    return Item(story + one, slots, ("", last[one]), ("", random.choice(others)))

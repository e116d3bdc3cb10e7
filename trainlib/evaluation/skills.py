"""Skills: validation questions with one right answer, answered greedily and compared exactly.

A validation row with the keys "skill" (its kind) and "wording" is a question. The last assistant
message is the expected answer; in a pair, that of the chosen conversation. Only the content is
compared, not the reasoning. "wording" says what training has seen of the question's words: they are
trained, a new combination of trained words, or new words. Results of a kind are reported under
KIND, KIND/combination and KIND/words.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import render_conversation, render_prompt
from trainlib.core.errors import UserError
from trainlib.core.files import write_atomically
from trainlib.data.containers import Row
from trainlib.data.conversations import NotUsed
from trainlib.data.formats import ReadOptions, read_row
from trainlib.data.messages import Messages, assistant
from trainlib.data.packing import PackedDataset
from trainlib.data.readers import Source, parse
from trainlib.engine.progress import table
from trainlib.engine.step import add_metrics, means
from trainlib.engine.training import Metrics, MetricSums, Training
from trainlib.engine.validation import steps_between_evaluations
from trainlib.models.generate import Sampling, generate_batch

log = logging.getLogger(__name__)

CURVE = {"trained": 16, "combination": 4, "words": 4}
"""Questions of each kind at an evaluation, by wording; finish asks all of them."""
CURVE_SHARE = 0.1
"""Maximum share of a run's time for these. A generated token takes about as long as training on a
position, and an answer at the start of a run does not end."""
Z95 = 1.96


@dataclass(frozen=True)
class Question:
    """A question, and the assistant message that answers it."""

    kind: str
    wording: str
    prompt: Messages
    expected: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name under which it is counted: KIND, or KIND/WORDING."""
        return self.kind if self.wording == "trained" else f"{self.kind}/{self.wording}"

    @property
    def answer(self) -> str:
        """Return the content that a right answer has."""
        return self.expected["content"].strip()

    @property
    def enable_thinking(self) -> bool:
        """Return False if the prompt ends with an empty think block."""
        return self.expected.get("enable_thinking") is not False


def conversations(
    paths: Iterable[Path], options: ReadOptions | None = None,
    wanted: Callable[[Row], bool] = lambda row: True,
) -> Iterator[tuple[Path, int, Row, Messages]]:  # fmt: skip
    """Yield path, line, row and messages of the wanted rows; of a pair, the chosen conversation."""
    for path in paths:
        for line, content in Source(path).items():
            try:
                row = parse(content)
                if not wanted(row):
                    continue
                stage = "dpo" if "chosen" in row else "sft"
                (value,), *_ = read_row(row, stage, options or ReadOptions())
            except (ValueError, NotUsed):
                continue  # Tokenization of the file reports it.
            yield path, line, row, value[0] if stage == "dpo" else value


def load_questions(paths: Iterable[Path], options: ReadOptions | None = None) -> list[Question]:
    """Return the questions in data files; raises UserError for one without an answer."""
    questions = []
    for path, line, row, (*prompt, expected) in conversations(paths, options, is_question):
        if expected["role"] != "assistant" or not expected["content"].strip():
            raise UserError(f'{path}, line {line}: a row with "skill" must end with an answer')
        if "/" in row["skill"]:
            raise UserError(f"{path}, line {line}: skill {row['skill']} must not have a slash")
        questions.append(Question(row["skill"], row["wording"], prompt, expected))
    return questions


def is_question(row: Row) -> bool:
    """Return whether a row is a question."""
    return isinstance(row.get("skill"), str) and row.get("wording") in (*CURVE,)


def answer(model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[str]:
    """Return the greedy answers, stripped and without thoughts; empty if a prompt is too long."""
    longest = model.config.max_position_embeddings - 1
    prompts = [render_prompt(tokenizer, q.prompt, q.enable_thinking) for q in questions]
    asked = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
    # An answer may be half as long again as the expected one.
    limits = [3 * _answer_length(tokenizer, questions[i]) // 2 + 16 for i in asked]
    sampling, texts = Sampling(temperature=0), [""] * len(questions)
    found = generate_batch(model, [prompts[i] for i in asked], sampling, tokenizer.stop_ids, limits)
    for i, ids in zip(asked, found, strict=True):
        ids = ids[:-1] if ids[-1] in tokenizer.stop_ids else ids
        texts[i] = assistant(tokenizer.show(ids))["content"].strip()
    return texts


def _answer_length(tokenizer: Tokenizer, question: Question) -> int:
    """Return the number of ids of the expected answer, with its reasoning."""
    return sum(render_conversation(tokenizer, [{**question.expected, "weight": 1}]).mask)


def count(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return "correct", "total", and the ends of the interval, by kind and wording."""
    total = Counter(question.name for question in questions)
    correct = Counter(q.name for q, a in zip(questions, answers, strict=True) if a == q.answer)
    return {name: counted(correct[name], n) for name, n in sorted(total.items())}


def counted(correct: float, total: int) -> dict[str, float]:
    """Return "correct", "total", and the ends of the 95 % interval of the share."""
    low, high = wilson(correct, total)
    return {"correct": correct, "total": total, "low": low, "high": high}


def wilson(correct: float, total: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share. Source: Wilson 1927, JASA 22:209."""
    share, z2 = correct / total, Z95**2 / total
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    low, high = ((share + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def format_counts(counts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table of correct answers with their 95 % intervals, one line for each kind."""
    columns = {"": "trained wording", "combination": "new combination", "words": "new words"}
    rows: dict[str, dict[str, str]] = {}
    for name, row in counts.items():
        kind, _, wording = name.partition("/")
        cells = rows.setdefault(kind, dict.fromkeys(columns.values(), "-"))
        cells[columns[wording]] = "{correct}/{total} ({low:.2f} to {high:.2f})".format(**row)
    return table("skill", rows)


class SkillTest:
    """The questions in a run's validation files: a few at each evaluation, all at the end."""

    def __init__(self, tokenizer: Tokenizer, val: dict[str, PackedDataset],
                 options: ReadOptions) -> None:  # fmt: skip
        parts = [part for packed in val.values() for part in packed.parts]
        # A file of which a part is trained on has no questions.
        paths = [cache.path for cache, selected in parts if selected.all()]
        self.tokenizer, self.questions = tokenizer, load_questions(paths, options)
        self._curve: list[Question] | None = None

    def metrics(self, training: Training) -> Metrics:
        """Return skills/NAME/exact_match for the same few questions each time; the ranks share."""
        if self._curve is None:
            self._curve = self._choose(training)
        distributed = training.run.distributed
        questions = self._curve[distributed.rank :: distributed.world_size]
        mine = count(questions, answer(training.model, self.tokenizer, questions))
        sums: MetricSums = {}
        for counts in distributed.all_gather_object(mine):
            add_metrics(sums, {name: (c["correct"], c["total"]) for name, c in counts.items()})
        return {f"skills/{name}/exact_match": m for name, m in sorted(means(sums).items())}

    def _choose(self, training: Training) -> list[Question]:
        """Return the first questions by kind and wording, fewer if the run is short."""
        seen: Counter[str] = Counter()
        some: list[tuple[float, Question]] = []
        for question in self.questions:
            seen[question.name] += 1
            some.append((seen[question.name] / CURVE[question.wording], question))
        some = [(part, question) for part, question in some if part <= 1]
        num_steps, share = training.schedule.num_steps, 1.0
        if some and num_steps:
            every, loader = steps_between_evaluations(training), training.loader
            num_evaluations = 2 + (num_steps // every if every else 0)
            num_tokens = sum(_answer_length(self.tokenizer, question) for _, question in some)
            num_positions = num_steps * loader.rows_per_step * loader.dataset.row_length
            share = CURVE_SHARE * num_positions / (num_tokens * num_evaluations)
        return [q for part, q in some if part <= share or part == 1 / CURVE[q.wording]]

    def report(self, training: Training) -> None:
        """Answer all questions, log the results and write skills.json to the run folder."""
        if not self.questions:
            return
        counts = count(self.questions, answer(training.model, self.tokenizer, self.questions))
        write_atomically(training.run.folder / "skills.json", json.dumps(counts, indent=2))
        log.info("%s", "\n".join(format_counts(counts)))

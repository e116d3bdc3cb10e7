"""The data doctor: reports what data files contain and what training would see of them.

    python -m tools.inspect_data FILE... [--stage STAGE] [--sample 1GB] [--json] [--html OUT]

Every file is read in full, and every broken row is listed with its line number and the reason.
Tokens, lengths and duplicates are computed on at most --sample bytes of each file, spread over the
file; for a larger file, "sampled" is true and "tokens" is an estimate. The exit code is 1 if a row
is broken or a file cannot be read. Other findings do not affect it.

--json prints one object, {"files": [...]}. Each file has path, format and kind (null if unknown),
rows (all rows in the file), broken [{"line", "reason"}], tokens (positions per epoch, counted as
in a training log), supervised_tokens (tokens in the loss), and the other fields of Report.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import array
import contextlib
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataset import DataConfig, expand
from tokenizer.bpe import SPECIAL_TOKENS, Sequence, Tokenizer, default_folder
from tools.data_findings import MAX_LINES, Finding, find
from tools.data_report import MARK, html_page, terminal_text
from tools.outputs import refuse_to_overwrite
from tools.past_runs import newest_speed, stage_settings
from tools.text_statistics import MinHashes, alnum, language, role_texts, score, scripts, text_hash
from tools.train_tokenizer import byte_count, bytes_per_token, train
from trainlib.core.errors import UserError
from trainlib.core.terminal import use_replacement_characters
from trainlib.data import formats
from trainlib.data.containers import Broken
from trainlib.data.encode import ENCODERS
from trainlib.data.findings import Counts, check_mapped_columns
from trainlib.data.formats import Record
from trainlib.data.packing import pack_best_fit
from trainlib.data.readers import CONTAINERS, Source, parse

DEFAULT_SAMPLE = 2_000_000_000
TOKENIZER_SAMPLE = 3_000_000
MIN_RETRAIN_GAIN = 1.10


@dataclass
class Report:
    """The report on one file. Shares are fractions, lengths are in tokens, sizes in bytes."""

    path: str
    format: str | None = None
    kind: str | None = None
    why: str = ""
    rows: int = 0
    broken: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    bytes: int = 0
    sampled: bool = False
    rows_looked_at: int = 0
    bytes_per_token: float | None = None
    retrained_bytes_per_token: float | None = None
    retrain_command: str | None = None
    unused_keys: dict[str, int] = field(default_factory=dict)
    mapped_columns: dict[str, int] = field(default_factory=dict)
    split_rows: int = 0
    documents: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    length: dict[str, float] = field(default_factory=dict)
    length_histogram: list[dict[str, int]] = field(default_factory=list)
    sequence_length: int = 0
    truncated_rows: float = 0.0
    truncated_tokens: float = 0.0
    padding_unpacked: float = 0.0
    padding_packed: float = 0.0
    packing_gain: float = 1.0
    empty: Finding = field(default_factory=Finding)
    no_supervised: Finding = field(default_factory=Finding)
    exact_duplicates: Finding = field(default_factory=Finding)
    near_duplicates: Finding = field(default_factory=Finding)
    special_text: Finding = field(default_factory=Finding)
    scripts: dict[str, float] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    equal_pairs: Finding = field(default_factory=Finding)
    different_prompts: Finding = field(default_factory=Finding)
    template_pairs: Finding = field(default_factory=Finding)
    trivial_rules: dict[str, float] = field(default_factory=dict)
    cache_bytes: int = 0
    tokens_per_step: int = 0
    steps_per_epoch: int = 0
    tokens_per_second: float | None = None
    speed_of: str = ""
    hours_per_epoch: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    use_replacement_characters()
    doc = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect_data",
        description="\n\n".join([doc[0], *doc[2:]]),
        epilog=f"Row formats:\n{formats.known_formats()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, folder or glob pattern")
    parser.add_argument("--stage", choices=list(ENCODERS), help="check the files for this stage")
    parser.add_argument("--sample", type=byte_count, default=DEFAULT_SAMPLE,
                        help="bytes of each file to tokenize (default: 2GB)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write an HTML page to OUT")
    parser.add_argument("--format", default="auto", choices=formats.NAMES, help="see data.format")
    parser.add_argument("--columns", default="", metavar="[NAME:COLUMN,...]",
                        help="see data.columns")  # fmt: skip
    parser.add_argument("--markers", default="split", choices=["split", "keep"],
                        help="see data.markers")  # fmt: skip
    parser.add_argument("--rows", type=int, default=3, metavar="N",
                        help="show the first N rows as training reads them (3)")  # fmt: skip
    parser.add_argument("--alpaca-join", default="newline", choices=["newline", "none"])
    parser.add_argument("--tokenizer", type=Path, help="folder (default: the project's tokenizer)")
    parser.add_argument("--sequence-length", type=int, help="tokens per row (default: config)")
    parser.add_argument("--tokens-per-second", type=float,
                        help="speed (default: from the stage's newest run in runs/)")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        if options.html:
            refuse_to_overwrite(options.html, MARK)
        paths = [path for name in options.files for path in expand(name)]
        tokenizer = Tokenizer(options.tokenizer or default_folder())
        reports = [inspect(path, options, tokenizer) for path in paths]
        check_mapped_columns(report.mapped_columns for report in reports)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {"files": [asdict(report) for report in reports]}
    if options.html:
        options.html.write_text(html_page(result["files"]), encoding="utf-8")
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(terminal_text(result["files"], sys.stdout.isatty()))
    return int(any(report.broken for report in reports))


def inspect(path: Path, options: argparse.Namespace, tokenizer: Tokenizer) -> Report:
    """Read one file in full and return its report."""
    report = Report(str(path))
    columns = tuple(part.strip() for part in options.columns.strip("[] ").split(",") if part)
    config = DataConfig(
        format=options.format, alpaca_join=options.alpaca_join, columns=columns,
        markers=options.markers,
    )  # fmt: skip
    if errors := config.validation_errors():
        raise UserError("; ".join(errors))
    read_options, found = config.read_options, None
    try:
        source = Source(path, options.format if options.format in CONTAINERS else "auto")
        with contextlib.suppress(UserError):  # Every row is reported instead.
            found = formats.detect(path, options.stage, options.format, columns)
    except UserError as error:
        report.broken.append({"line": 1, "reason": str(error)})
        return report
    report.bytes, kind, counts = source.size, options.stage, Counts()
    if found:
        report.why = found.reason
    # SFT learns the good answers of unpaired preferences.
    found_kind = found.format.kind if found else ""
    found_kind = "sft" if found_kind == "kto" else found_kind
    if found and kind in (None, found_kind):
        report.format, report.kind = found.format.name, found_kind
        rows = formats.check_items(source.items(), path, found_kind, read_options, counts)
    else:
        rows = _reject(source, kind)
    share = min(1.0, options.sample / max(1, report.bytes))
    report.sampled = share < 1
    analyzer = Analyzer(report, report.kind or kind or "pretrain", tokenizer, options)
    line = 0
    try:
        for line, records in rows:
            report.rows += 1
            if isinstance(records, Broken):
                report.broken.append({"line": line, "reason": records.reason})
                if "different prompts" in records.reason:
                    report.different_prompts.add(line)
            elif share == 1 or (line * 0x9E3779B97F4A7C15 >> 32) % 2**20 < share * 2**20:
                report.rows_looked_at += 1
                for record in records:
                    analyzer.add(record)
    except UserError as error:
        report.broken.append({"line": line + 1, "reason": str(error)})
    analyzer.finish()
    report.unused_keys = counts.unused_keys
    report.findings = find(report, counts)
    report.mapped_columns = counts.mapped
    report.split_rows, report.documents = counts.split_rows, counts.documents
    for reason, count in counts.not_used.items():
        if reason.endswith("empty"):
            lines = [*report.empty.lines, *counts.lines[reason]][:MAX_LINES]
            report.empty = Finding(report.empty.count + count, lines)
        elif reason.endswith("the same answer"):
            report.equal_pairs = Finding(count, counts.lines[reason])
    return report


def _reject(source: Source, stage: str | None) -> Iterator[tuple[int, Broken]]:
    """Yield each row of a file that is not usable, with the reason."""
    for line, content in source.items():
        try:
            row = parse(content)
            expected = f"not {stage} data such as {formats.EXAMPLES[stage]}" if stage else ""
            keys = formats.keys_of(row, stage)
            yield line, Broken(f"{expected or 'unknown row format'} {keys}")
        except ValueError as error:
            yield line, Broken(str(error))


class Analyzer:
    """Collects statistics on the rows of one file, row by row."""

    def __init__(
        self, report: Report, kind: str, tokenizer: Tokenizer, options: argparse.Namespace
    ) -> None:
        self.report, self.kind, self.tokenizer = report, kind, tokenizer
        settings = stage_settings(kind)
        self.num_examples, self.shown = options.rows, set()
        self.length = options.sequence_length or settings["sequence_length"]
        if kind == "dpo":
            self.length *= 2
        report.sequence_length, report.tokens_per_step = self.length, settings["tokens_per_step"]
        report.tokens_per_second = options.tokens_per_second
        if report.tokens_per_second is None:
            report.tokens_per_second, report.speed_of = newest_speed(kind)
        self.lengths, self.lines = array.array("q"), array.array("q")
        self.byte_lengths = np.array([len(text) for text in tokenizer.id_to_bytes], np.int64)
        self.hashes, self.near = array.array("Q"), MinHashes()
        self.supervised = self.text_bytes = self.text_tokens = self.within = 0
        self.scripts: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.rules: dict[str, float] = defaultdict(float)
        self.texts: list[str] = []
        self.texts_bytes = 0

    def add(self, record: Record) -> None:
        """Tokenize a row and add it to the statistics."""
        report, line = self.report, record.line
        sequences = ENCODERS[self.kind](self.tokenizer, record)
        length = sum(len(sequence.ids) - 1 for sequence in sequences)
        self.lengths.append(length)
        self.lines.append(line)
        self.supervised += sum(sum(sequence.mask) for sequence in sequences)
        if not any(any(sequence.mask[: self.length + 1]) for sequence in sequences):
            report.no_supervised.add(line)
        texts = list(role_texts(record.value))
        text = "\n".join(text for _, text in texts)
        if any(not text.strip() for role, text in texts if role in ("text", "assistant")):
            report.empty.add(line)
        if any(token in text for token in SPECIAL_TOKENS):
            report.special_text.add(line)
        self._count_text(text, sequences)
        self.hashes.append(text_hash(text))
        self.near.add(text)
        if isinstance(record.value, tuple):
            self._add_pair(record.value[0], record.value[1], line)
        if line in self.shown or len(self.shown) < self.num_examples:
            self.shown.add(line)
            parts = [{"part": "chosen"}, {"part": "rejected"}] if len(sequences) > 1 else [{}]
            report.examples += [
                {"line": line, **part, "pieces": self._pieces(sequence)}
                for part, sequence in zip(parts, sequences, strict=True)
            ]

    def _count_text(self, text: str, sequences: list[Sequence]) -> None:
        size = len(text.encode())
        for sequence in sequences:
            sizes = self.byte_lengths[sequence.ids]
            self.text_bytes += int(sizes.sum())
            self.text_tokens += int((sizes > 0).sum())
        head = text[:2000]
        self.scripts.update(scripts(head))
        self.languages[language(head)] += 1
        if self.texts_bytes < TOKENIZER_SAMPLE:
            self.texts.append(text)
            self.texts_bytes += size

    def _add_pair(self, chosen: list, rejected: list, line: int) -> None:
        good, bad = chosen[-1]["content"], rejected[-1]["content"]
        if alnum(good) == alnum(bad):
            self.report.template_pairs.add(line)
        prompt = set("".join(message["content"] for message in chosen[:-1]))
        overlap = [len(prompt & set(text)) / max(1, len(set(text))) for text in (good, bad)]
        self.rules["longer"] += score(len(good), len(bad))
        self.rules["shorter"] += score(len(bad), len(good))
        self.rules["more overlap"] += score(overlap[0], overlap[1])

    def _pieces(self, sequence: Sequence) -> list[list[Any]]:
        """Return [text, in_loss] for each run of ids with the same loss mask."""
        pieces: list[list[Any]] = []
        for in_loss, run in itertools.groupby(
            zip(sequence.ids[:600], sequence.mask, strict=False), key=lambda item: item[1]
        ):
            pieces.append([self.tokenizer.show([id_ for id_, _ in run]), bool(in_loss)])
        return pieces

    def finish(self) -> None:
        """Fill in the report."""
        report, lengths = self.report, np.array(self.lengths, np.int64)
        if not len(lengths):
            return
        valid_rows = report.rows - len(report.broken)
        scale = valid_rows / report.rows_looked_at if report.sampled else 1.0
        report.tokens = round(int(lengths.sum()) * scale)
        report.supervised_tokens = round(self.supervised * scale)
        report.bytes_per_token = self.text_bytes / max(1, self.text_tokens)
        _describe_lengths(report, lengths, self.kind)
        total = sum(self.scripts.values()) or 1
        report.scripts = {name: n / total for name, n in self.scripts.most_common()}
        report.languages = dict(self.languages.most_common())
        lines = np.array(self.lines)
        order = np.argsort(np.array(self.hashes, np.uint64), kind="stable")
        sorted_hashes = np.array(self.hashes, np.uint64)[order]
        exact = np.zeros(len(lines), bool)
        exact[order[1:]] = sorted_hashes[1:] == sorted_hashes[:-1]
        report.exact_duplicates = Finding(int(exact.sum()), lines[exact][:MAX_LINES].tolist())
        near = self.near.duplicates() & ~exact[: self.near.count]
        report.near_duplicates = Finding(
            int(near.sum()), lines[: self.near.count][near][:MAX_LINES].tolist()
        )
        if self.rules:
            report.trivial_rules = {rule: n / len(lengths) for rule, n in self.rules.items()}
        width = 2 if self.tokenizer.vocab_size <= 1 << 16 else 4
        report.cache_bytes = report.tokens * (width + 1) + valid_rows * 26
        report.steps_per_epoch = math.ceil(
            report.tokens / (1 - report.padding_packed) / report.tokens_per_step
        )
        if report.tokens_per_second:
            report.hours_per_epoch = report.tokens / report.tokens_per_second / 3600
        self._retrain()

    def _retrain(self) -> None:
        """Train a vocabulary on four fifths of the texts and evaluate it on the rest."""
        if self.texts_bytes < 200_000:
            return  # Not enough text for a meaningful figure.
        held_out = self.texts[::5]
        texts = (text for i, text in enumerate(self.texts) if i % 5)
        retrained = bytes_per_token(train(texts, self.tokenizer.vocab_size), held_out)
        ids = sum(len(self.tokenizer.encode(text)) for text in held_out)
        current = sum(len(text.encode()) for text in held_out) / max(1, ids)
        self.report.retrained_bytes_per_token = retrained
        if retrained > MIN_RETRAIN_GAIN * current:
            self.report.retrain_command = (
                f"python -m tools.train_tokenizer --data {self.report.path} "
                f"--vocab-size {self.tokenizer.vocab_size} --out my_tokenizer"
            )


def _describe_lengths(report: Report, lengths: np.ndarray, kind: str) -> None:
    row = report.sequence_length
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95])
    report.length = {"least": int(lengths.min()), "5%": float(quantiles[0]),
                     "median": float(quantiles[1]), "95%": float(quantiles[2]),
                     "most": int(lengths.max()), "mean": float(lengths.mean())}  # fmt: skip
    edges = [1 << i for i in range(int(lengths.max()).bit_length() + 1)]
    counts, _ = np.histogram(lengths, [0, *edges])
    report.length_histogram = [
        {"below": edge, "rows": int(n)} for edge, n in zip(edges, counts, strict=True)
    ]
    report.truncated_rows = float((lengths > row).mean())
    report.truncated_tokens = float(np.maximum(lengths - row, 0).sum() / lengths.sum())
    report.padding_unpacked = 1 - float(np.minimum(lengths, row).sum() / (len(lengths) * row))
    units = lengths
    if kind == "pretrain":
        full, rest = np.divmod(lengths, row)
        units = np.concatenate([np.full(int(full.sum()), row), rest[rest > 0]])
    units = np.minimum(units, row)[:200_000]
    num_rows = len(pack_best_fit(units, row))
    report.padding_packed = 1 - float(units.sum()) / (num_rows * row)
    report.packing_gain = (1 - report.padding_packed) / (1 - report.padding_unpacked)


if __name__ == "__main__":
    sys.exit(main())

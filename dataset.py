"""The data pipeline: which files a stage reads, and how they become rows of token ids.

Steps without a file name are in this file, the others in trainlib/data/.

1. choose_files            data.files, else matching files in dataset/, else the sample
2. find_format             a file -> container and format, from its first rows  formats.py
3. check_items             items -> records, or the reason why one is broken    formats.py
4. encode_*                a record -> ids and loss mask, in one pass           encode.py
5. build_cache             all records in a file -> ids on disk, once           token_cache.py
6. hold_out                choose the validation records, by a hash of their content
7. PackedDataset           documents -> rows of equal length, by best fit       packing.py
8. PackedDataset.collate   rows -> Batch: shift by one, IGNORE_INDEX            packing.py, batch.py
9. StepLoader              rows -> micro-batches of each optimizer step         loader.py

load_datasets runs steps 1 to 7. Each record is used for training or held out, never both. Records
with equal content are in the same split. Records longer than a row are split, truncated or dropped.
"""

from __future__ import annotations

import functools
import glob
import logging
import re
from collections import Counter
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError
from trainlib.data import formats
from trainlib.data.columns import MAPPABLE
from trainlib.data.encode import ENCODERS
from trainlib.data.packing import Datasets, PackedDataset, Part
from trainlib.data.readers import COMPRESSED, SUFFIXES
from trainlib.data.token_cache import OnError, TokenCache, build_cache, counted_tokens

log = logging.getLogger(__name__)

DATASET_DIR = Path("dataset")
MAX_HELD_OUT_BYTES = 2_000_000
BYTES_PER_TOKEN = {"pretrain": 3.5, "sft": 4.5, "dpo": 6.0}
"""Bytes per token in a data file, approximately as in the sample."""


@dataclass(frozen=True)
class DataConfig:
    """Training and validation files, and how they are read."""

    files: tuple[str, ...] = ()
    """Training files, folders or glob patterns. Weights (a.jsonl:0.7), on all entries or none, are
    shares of an epoch's tokens. Empty = files directly in dataset/ that this stage can read, or
    the sample if there are none."""
    val_files: tuple[str, ...] = ()
    """Validation files, reported separately; empty = hold out part of the training files."""
    val_fraction: float = field(default=0.005, metadata={"above": 0, "below": 1})
    """Fraction of each training file that is held out if data.val_files is empty."""
    val_max_rows: int = field(default=0, metadata={"at_least": 0})
    """Maximum number of rows that an evaluation reads from each validation set; 0 = all."""

    format: str = "auto"
    """Format of all files; auto = detect it. tools.inspect_data --help lists the names."""
    alpaca_join: Literal["newline", "none"] = "newline"
    """Separator between the instruction and the input of an Alpaca row (for wyf3 data: none)."""

    columns: tuple[str, ...] = ()
    """Columns whose names are not recognized, as [prompt:instruct,answer:reply]: our name, a colon,
    the name in the file. Ours: text, prompt, input, answer, system, history, messages, tools,
    chosen, rejected."""
    markers: Literal["split", "keep"] = "split"
    """In pretraining rows written with markers between texts (<|im_end|>, </s>), split there."""

    on_error: OnError = field(default="stop", metadata={"recipe": False})
    """On a broken row: stop and report its line and reason, or skip and list it (at most 1 %)."""
    too_long: Literal["cut", "drop"] = "cut"
    """Cut a conversation longer than a row after the last answer that fits, or drop it."""

    def validation_errors(self) -> list[str]:
        """Return what makes these settings unusable, one message each."""
        errors = []
        if self.format not in formats.NAMES:
            errors.append(f"data.format={self.format} is not one of {', '.join(formats.NAMES)}")
        for entry in self.columns:
            ours, colon, theirs = entry.partition(":")
            if ours not in MAPPABLE or not colon or not theirs:
                expected = f"NAME:COLUMN, where NAME is one of {', '.join(MAPPABLE)}"
                errors.append(f"data.columns has {entry}; expected {expected}")
        return errors

    @property
    def read_options(self) -> formats.ReadOptions:
        """Return the options that decide how rows are read."""
        join = {"newline": "\n", "none": ""}[self.alpaca_join]
        return formats.ReadOptions(self.format, join, self.columns, self.markers == "split")

    def estimate_tokens(self, kind: str, row_length: int) -> tuple[float, str]:
        """Return the approximate number of tokens in an epoch, and how it was determined.

        Does not tokenize. The number is 0 if there is no usable data.
        """
        try:
            groups = choose_files(self, kind).train
            counted = [[counted_tokens(p, kind, row_length) for p in g.paths] for g in groups]
            bytes_ = [sum(p.stat().st_size for p in g.paths) for g in groups]
        except OSError as error:
            return 0.0, f"{error.filename} cannot be read: {error.strerror}"
        except (UserError, ValueError, KeyError) as error:  # A cache may be damaged.
            return 0.0, str(error).splitlines()[0]
        tokens = [size / BYTES_PER_TOKEN[kind] for size in bytes_]
        method = f"estimated from their size at {BYTES_PER_TOKEN[kind]} bytes per token"
        if all(all(numbers) for numbers in counted):
            tokens, method = [sum(numbers) for numbers in counted], "counted in the token cache"
        weights = sum(group.weight for group in groups)
        # As in _repeats: the group that is largest relative to its weight is read once.
        weighted = [n * weights / g.weight for n, g in zip(tokens, groups, strict=True) if g.weight]
        return max(weighted, default=sum(tokens)), method


# ---- 1. choose files -----------------------------------------------------------------------------


class Group(NamedTuple):
    """The files of one entry in data.files, with a name for reports and a weight."""

    name: str
    paths: list[Path]
    weight: float = 0.0
    """Share of an epoch's tokens; 0 = no weights are set."""


class Files(NamedTuple):
    """The data files of a run, and how they were chosen."""

    train: list[Group]
    val: list[Group]
    reason: str


def expand(name: str) -> list[Path]:
    """Return the files for an entry in data.files: a file, a folder or a pattern.

    Raises UserError if there are none.
    """
    path = Path(name)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and _is_data_file(p)]
    elif path.exists() or not any(c in name for c in "*?["):
        parts = name.split(",")
        if len(parts) > 1 and not path.exists() and all(Path(part).exists() for part in parts):
            raise UserError(f"{name} does not exist. Pass a list: data.files=[{name}]")
        return [path]
    else:
        found = [Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file()]
        if not found:
            raise UserError(f"{name} matches nothing in {Path.cwd()}. Check the pattern.")
    if not found:
        raise UserError(
            f"{name} contains no data files. Add files that end in {', '.join(SUFFIXES)}, "
            f"optionally followed by {' or '.join(COMPRESSED)}."
        )
    return sorted(found)


def _is_data_file(path: Path) -> bool:
    """Return whether a path is named like a data file; README.txt and LICENSE.txt are not."""
    return (
        bool({*path.suffixes} & {*SUFFIXES, *COMPRESSED})
        and not path.name.startswith(".")
        and path.stem.split(".")[0].upper() not in ("README", "LICENSE", "SOURCES", "NOTICE")
    )


def choose_files(config: DataConfig, kind: str) -> Files:
    """Return the training and validation files of a stage; raise UserError if there are none."""
    val = _make_groups(config.val_files, "data.val_files")
    if config.files:
        return Files(_make_groups(config.files, "data.files"), val, "from data.files")
    matching, unused = [], ""
    for path in sorted(DATASET_DIR.glob("*")):
        if not (path.is_file() and _is_data_file(path)):
            continue
        try:
            found = formats.detect(path, None, config.format, config.columns).format.kind
        except UserError as error:
            found = f"not usable ({error})"
        if found == kind:
            matching.append(str(path))
        else:
            unused += f"\n  not used: {path} is {found}{' data' * (found in formats.EXAMPLES)}"
    if matching:
        return Files(_make_groups(matching), val, f"{kind} files in dataset/{unused}")
    sample = DATASET_DIR / "sample" / f"{kind}.jsonl"
    if sample.is_file():
        held_out = sorted((DATASET_DIR / "sample" / "val" / kind).glob("*.jsonl"))
        val = val or _make_groups([str(path) for path in held_out])
        reason = f"the sample, because dataset/ has no {kind} file{unused}"
        return Files(_make_groups([str(sample)]), val, reason)
    raise UserError(
        f"no {kind} data: {DATASET_DIR.resolve()} has no file with rows like "
        f"{formats.EXAMPLES[kind]}, and {sample} does not exist.{unused}\n"
        "Either prepare the sample:    python -m tools.prepare_data\n"
        "or pass your own file:        data.files=PATH (or put it into dataset/)"
    )


# ---- 6. held-out records -------------------------------------------------------------------------


def hold_out(cache: TokenCache, fraction: float) -> np.ndarray:
    """Return a mask of the records held out for validation, bool (num_records,).

    These are the records with the smallest hashes: at least one, and at most about
    MAX_HELD_OUT_BYTES of text. The choice is stable when rows are added. Records with equal content
    have equal hashes.
    """
    order = np.argsort(cache.hashes, kind="stable")
    below = cache.hashes[order] < np.uint64(fraction * 2.0**64)
    sizes = cache.record_lengths[order]
    # A token is about four bytes, so this limits the bytes without decoding.
    chosen = below & (np.cumsum(sizes) * 4 <= MAX_HELD_OUT_BYTES)
    limit = cache.hashes[order][max(1, int(chosen.sum())) - 1]
    return np.asarray(cache.hashes <= limit)


# ---- the datasets --------------------------------------------------------------------------------


def load_datasets(
    config: DataConfig, kind: str, tokenizer: Tokenizer, sequence_length: int, seed: int
) -> Datasets:
    """Choose, tokenize and pack the data of a stage, and log a summary.

    Raises UserError for missing, broken or unusable files.
    """
    files = choose_files(config, kind)
    log.info("data: %s", files.reason)

    keys: list[str] = []

    def tokenized(group: Group) -> list[TokenCache]:
        options, encode = config.read_options, ENCODERS[kind]
        caches = [build_cache(path, kind, tokenizer, encode, options, config.on_error)
                  for path in group.paths]  # fmt: skip
        keys.extend(cache.key for cache in caches)
        return caches

    train_parts: list[list[Part]] = []
    val_parts: dict[str, list[Part]] = {}
    for group in files.train:
        caches = tokenized(group)
        masks = [
            np.zeros(cache.num_records, bool) if files.val else hold_out(cache, config.val_fraction)
            for cache in caches
        ]
        train_parts.append([(cache, ~mask) for cache, mask in zip(caches, masks, strict=True)])
        if not files.val:
            val_parts[group.name] = list(zip(caches, masks, strict=True))
    for group in files.val:
        val_parts[group.name] = [(c, np.ones(c.num_records, bool)) for c in tokenized(group)]
    pack = functools.partial(
        PackedDataset,
        kind=kind,
        row_length=2 * sequence_length if kind == "dpo" else sequence_length,
        byte_lengths=np.array([len(text) for text in tokenizer.id_to_bytes], np.int64),
        too_long=config.too_long,
    )
    repeats = _repeats(files.train, train_parts)
    train = pack([part for parts in train_parts for part in parts], seed=seed, repeats=repeats)
    _log_summary("train", train)
    next_id, val = train.num_sequences, {}
    for name, parts in val_parts.items():
        # With a fixed seed, validation rows do not depend on the seed of the run.
        val[name] = pack(parts, seed=0, first_sequence_id=next_id, max_rows=config.val_max_rows)
        next_id += val[name].num_sequences
        _log_summary(f"val/{name}", val[name])
    return Datasets(train, val, " ".join(keys))


def _repeats(groups: list[Group], selected: list[list[Part]]) -> list[float] | None:
    """Return how many times an epoch reads each file so that token shares match the weights.

    Returns None if no weights are set. The group that is largest relative to its weight is read
    once, and the others are repeated. This is the shortest epoch that contains every row.
    """
    total = sum(group.weight for group in groups)
    if not total:
        return None
    sizes = [
        sum(int(cache.record_lengths[mask].sum()) for cache, mask in parts) for parts in selected
    ]
    epoch = max(size * total / g.weight for g, size in zip(groups, sizes, strict=True))
    repeats: list[float] = []
    for group, size, parts in zip(groups, sizes, selected, strict=True):
        share = group.weight / total
        times = share * epoch / max(1, size)
        log.info("%s: %.1f %% of the tokens, %.2f passes per epoch", group.name, 100 * share, times)
        repeats += [times] * len(parts)
    return repeats


def _make_groups(names: SequenceABC[str], key: str = "") -> list[Group]:
    """Return a group for each entry, with its weight and a unique name."""
    groups: list[Group] = []
    for name in names:
        found = re.fullmatch(r"(.+):(\d*\.?\d+)", name)
        weight = 0.0
        if found and not Path(name).exists():
            name, weight = found[1], float(found[2])
            if not weight or key == "data.val_files":
                reason = "only data.files accepts weights" if weight else "a weight must be above 0"
                raise UserError(f"{key}: {name}:{found[2]}: {reason}")
        groups.append(Group(_short_name(name), expand(name), weight))
    if 0 < sum(not group.weight for group in groups) < len(groups):
        unweighted = next(name for name, g in zip(names, groups, strict=True) if not g.weight)
        raise UserError(f"{key}: {unweighted} has no weight. Set one for each entry or for none.")
    counts, seen = Counter(group.name for group in groups), Counter()
    for i, group in enumerate(groups):
        name = group.name
        if counts[name] > 1 and group.paths[0].parent.name:
            name = f"{group.paths[0].parent.name}_{name}"
        seen[name] += 1
        groups[i] = group._replace(name=name if seen[name] == 1 else f"{name}_{seen[name]}")
    return groups


def _short_name(name: str) -> str:
    """Return a name for reports: a file name without suffixes, or the fixed part of a pattern."""
    path = Path(name)
    while path.suffix.lower() in (*SUFFIXES, *COMPRESSED):
        path = path.with_suffix("")
    short = re.sub(r"[*?\[\]/]+", "_", path.name).strip("_.-")
    return short or path.parent.name or "data"


def _log_summary(name: str, packed: PackedDataset) -> None:
    """Log the size of a dataset, and the number of truncated and dropped rows."""
    units = {"pretrain": "pieces of documents", "sft": "conversations", "dpo": "pairs"}[packed.kind]
    size = f"{packed.num_units:,} {units}, {packed.num_tokens:,} tokens"
    log.info(
        "%s: %s, in %s rows of %d with %.1f %% padding  (%s)",
        name, size, f"{packed.num_rows():,}", packed.row_length,
        100 * packed.padding_fraction(), ", ".join(str(cache.path) for cache in packed.caches),
    )  # fmt: skip
    for action, counts in (("dropped", packed.num_dropped), ("truncated", packed.num_cut)):
        if counts:
            sources = ", ".join(f"{source} {n:,}" for source, n in sorted(counts.items()))
            log.warning(
                "%s: %s rows longer than %d positions were %s: %s (see sequence_length and "
                "data.too_long)",
                name, f"{sum(counts.values()):,}", packed.row_length, action, sources,
            )  # fmt: skip

"""The data pipeline: which files a stage reads, and how they become rows of token ids.

Steps without a file name are in this file, the others in trainlib/data/.

1. choose_files            data.files, else matching files in dataset/, else the sample
2. find_format             a file -> container and format, from its first rows  formats.py
3. check_items             items -> records; why one is broken or not used       formats.py
4. encode_*                a record -> ids and loss mask, in one pass           encode.py
5. build_cache             all records in a file -> ids on disk, once           token_cache.py
6. hold_out                choose the validation records, by a hash of their content
7. PackedDataset           documents -> rows of equal length, by best fit       packing.py
8. PackedDataset.collate   rows -> Batch: shift by one, IGNORE_INDEX            packing.py, batch.py
9. StepLoader              rows -> micro-batches of each optimizer step         loader.py

load_datasets runs steps 1 to 7. Each record is used for training or held out, never both. Records
with equal content are in the same split. Records longer than a row are split, truncated or dropped.
"""

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
from trainlib.data.containers import MAX_ROW_MB
from trainlib.data.findings import check_mapped_columns
from trainlib.data.packing import FEW_ROWS, Datasets, PackedDataset, Part, none_fits, usable_lengths
from trainlib.data.readers import COMPRESSED, SUFFIXES
from trainlib.data.token_cache import OnError, TokenCache, build_cache, counted_tokens

log = logging.getLogger(__name__)

DATASET_DIR = Path("dataset")
HELD_OUT_FRACTION = 0.005
HELD_OUT_ROWS = 64
MAX_HELD_OUT_BYTES = 2_000_000
"""Held out by default: this fraction, at least this many rows, about this much text."""
MANY_LONG_ROWS = 0.05
"""Above this share of rows longer than a row, the log suggests a sequence_length."""
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
    val_fraction: float | Literal["auto"] = field(default="auto", metadata={"above": 0, "below": 1})
    """Fraction of the rows of each entry in data.files that is held out if data.val_files is empty;
    auto = 0.005, but at least 64 rows (of fewer than 640: a tenth), and at most about 2 MB."""
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
    max_row_mb: int = field(default=MAX_ROW_MB, metadata={"recipe": False, "at_least": 1})
    """Longer rows are broken; a row takes up to ten times its size in memory."""
    verify_cache: bool = field(default=False, metadata={"recipe": False})
    """Compare the digests of all token caches before training, as --verify-cache does."""
    on_error: OnError = field(default="stop", metadata={"recipe": False})
    """On a broken row: stop and report its line and reason, or skip and list it (at most 1 %)."""
    too_long: Literal["cut", "drop"] = "cut"
    """Cut a conversation longer than a row after the last answer that fits (if none fits, inside
    the first), or drop it. Preference pairs longer than a row are always dropped."""

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
        split = self.markers == "split"
        return formats.ReadOptions(self.format, join, self.columns, split, self.max_row_mb)

    def estimate_tokens(self, kind: str, row_length: int) -> tuple[float, str]:
        """Return about how many tokens an epoch has, and how this is known, without tokenizing."""
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
    weight: float = 0.0  # Share of an epoch's tokens; 0 = no weights are set.


class Files(NamedTuple):
    """The data files of a run, and how they were chosen."""

    train: list[Group]
    val: list[Group]
    reason: str


def expand(name: str) -> list[Path]:
    """Return the files for a file, folder or pattern in data.files; raise UserError if none."""
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
        raise UserError(f"{name} contains no data files. Add files that end in "
                        f"{', '.join(SUFFIXES)}, optionally followed by "
                        f"{' or '.join(COMPRESSED)}.")  # fmt: skip
    return sorted(found)


def _is_data_file(path: Path) -> bool:
    """Return whether a path is named like a data file; README.txt and LICENSE.txt are not."""
    if path.name.startswith(".") or not {*path.suffixes} & {*SUFFIXES, *COMPRESSED}:
        return False
    return path.stem.split(".")[0].upper() not in ("README", "LICENSE", "SOURCES", "NOTICE")


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
            options = (config.format, config.columns, config.max_row_mb)
            found = formats.detect(path, None, *options).format.kind
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


def hold_out(hashes: np.ndarray, sizes: np.ndarray, fits: np.ndarray,
             fraction: float | Literal["auto"]) -> np.ndarray:  # fmt: skip
    """Return the hashes of the records held out for validation, ascending.

    These are the smallest hashes of the records that fit in a row, so the choice is stable when
    rows are added. Records with equal content have equal hashes and count as one. At least one is
    held out and one is left. `sizes` are in bytes; the shapes of `hashes`, `sizes` and `fits` are
    (num_records,). Raises ValueError if fewer than two distinct records fit.
    """
    num_distinct = len(np.unique(hashes))
    candidates, inverse = np.unique(hashes[fits], return_inverse=True)
    if len(candidates) < 2:
        raise ValueError(f"only {len(candidates)} of {num_distinct} distinct rows can be used")
    if fraction == "auto":
        least = min(HELD_OUT_ROWS, num_distinct // 10)
        total_sizes = np.cumsum(np.bincount(inverse, sizes[fits]))
        within_limit = int(np.searchsorted(total_sizes, MAX_HELD_OUT_BYTES, side="right"))
        n = max(min(round(HELD_OUT_FRACTION * num_distinct), within_limit), least)
    else:
        n = round(fraction * num_distinct)
    return candidates[: min(max(1, n), len(candidates) - 1)]


# ---- the datasets --------------------------------------------------------------------------------


def load_datasets(config: DataConfig, kind: str, tokenizer: Tokenizer, sequence_length: int,
                  seed: int) -> Datasets:  # fmt: skip
    """Choose, tokenize, pack and log the data of a stage; raise UserError for unusable files."""
    files = choose_files(config, kind)
    log.info("data: %s", files.reason)
    read: list[TokenCache] = []

    def tokenized(group: Group) -> list[TokenCache]:
        options = (config.read_options, config.on_error, config.verify_cache)
        read.extend(build_cache(path, kind, tokenizer, *options) for path in group.paths)
        return read[-len(group.paths) :]

    row_length = 2 * sequence_length if kind == "dpo" else sequence_length
    train_caches = [tokenized(group) for group in files.train]
    val_parts: dict[str, list[Part]] = {}
    held_out = np.zeros(0, np.uint64)
    for group, caches in zip(files.train, train_caches, strict=True):
        if not files.val:
            chosen = _hold_out(group, caches, config, kind, row_length)
            val_parts[group.name] = [(cache, np.isin(cache.hashes, chosen)) for cache in caches]
            held_out = np.concatenate([held_out, chosen])
    # A row held out of one file is not trained on in another.
    train_parts: list[list[Part]] = [
        [(cache, ~np.isin(cache.hashes, held_out)) for cache in caches] for caches in train_caches
    ]
    for group in files.val:
        val_parts[group.name] = [(c, np.ones(c.num_records, bool)) for c in tokenized(group)]
    check_mapped_columns(cache.counts.mapped for cache in read)
    pack = functools.partial(
        PackedDataset, kind=kind, row_length=row_length, too_long=config.too_long,
        byte_lengths=np.array([len(text) for text in tokenizer.id_to_bytes], np.int64),
    )  # fmt: skip
    repeats = _repeats(files.train, train_parts)
    train = pack([part for parts in train_parts for part in parts], seed=seed, repeats=repeats)
    _log_summary("train", train)
    next_id, val = train.num_sequences, {}
    for name, parts in val_parts.items():
        # With a fixed seed, validation rows do not depend on the seed of the run.
        val[name] = pack(parts, seed=0, first_sequence_id=next_id, max_rows=config.val_max_rows)
        next_id += val[name].num_sequences
        _log_summary(f"val/{name}", val[name])
    return Datasets(train, val, " ".join(cache.key for cache in read))


def _hold_out(group: Group, caches: list[TokenCache], config: DataConfig, kind: str,
              row_length: int) -> np.ndarray:  # fmt: skip
    """Return the hashes of the records held out of a group; raise UserError if there are none."""
    names = ", ".join(str(path) for path in group.paths)
    usable = [usable_lengths(c, np.arange(c.num_records), kind, row_length, config.too_long)[1]
              for c in caches]  # fmt: skip
    fits = np.concatenate(usable) > 0
    if not fits.any():
        raise UserError(none_fits(names, len(fits), row_length))
    hashes, sizes = (np.concatenate([getattr(cache, name) for cache in caches])
                     for name in ("hashes", "record_lengths"))  # fmt: skip
    try:
        # A token is about four bytes.
        return hold_out(hashes, 4 * sizes, fits, config.val_fraction)
    except ValueError as error:
        raise UserError(f"{names}: {error}, but training and validation need at least one each. "
                        f"Add rows or pass data.val_files. A row has {row_length} positions (see "
                        "sequence_length).") from error  # fmt: skip


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
    units = {"pretrain": "pieces of documents", "sft": "conversations", "dpo": "pairs"}[packed.kind]
    size = f"{packed.num_units:,} {units}, {packed.num_tokens:,} tokens"
    log.info("%s: %s, in %s rows of %d with %.1f %% padding  (%s)", name, size,
             f"{packed.num_rows():,}", packed.row_length, 100 * packed.padding_fraction(),
             ", ".join(str(cache.path) for cache in packed.caches))  # fmt: skip
    keys = "sequence_length" + " and data.too_long" * (packed.kind == "sft")
    for action, counts in (("dropped", packed.num_dropped), ("truncated", packed.num_cut)):
        if counts:
            sources = ", ".join(f"{source} {n:,}" for source, n in sorted(counts.items()))
            log.warning("%s: %s rows longer than %d positions were %s: %s (%.1f %% of the rows; "
                        "see %s)", name, f"{counts.total():,}", packed.row_length, action, sources,
                        100 * counts.total() / packed.num_records, keys)  # fmt: skip
    if (packed.num_dropped + packed.num_cut).total() > MANY_LONG_ROWS * packed.num_records:
        length = -(-packed.length_of_99_percent // (2 if packed.kind == "dpo" else 1))
        log.warning("%s: sequence_length=%d would hold 99 %% of the rows", name, length)
    if name != "train" and packed.num_used < FEW_ROWS:
        log.info("%s: only %d rows, fewer than %d, so its figures mean little. Add rows, or pass "
                 "more in data.val_files.", name, packed.num_used, FEW_ROWS)  # fmt: skip

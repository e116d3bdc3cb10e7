"""From files to data sets: which files, how a record becomes ids, which are held out.

1. choose_files       data.files, else what lies in dataset/ and fits, else the sample
2. encode_*           a record -> ids and loss mask, in one pass
3. build_cache        every file tokenized once, on disk (token_cache.py)
4. hold_out           the validation documents, by a hash of their content
5. PackedDataset      documents -> rows of one length, best fit, in an order of seed and epoch
6. collate            rows -> Batch: the one shift by one, the one place of IGNORE_INDEX
                      (5 and 6 are in packing.py)
"""

from __future__ import annotations

import glob
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import formats
from packing import Batch, PackedDataset
from readers import COMPRESSED, SUFFIXES
from token_cache import Encode, TokenCache, build_cache
from tokenizer import Sequence, Tokenizer
from tokenizer.chat_format import render_conversation
from trainlib.errors import UserError

__all__ = ["Batch", "DataConfig", "Datasets", "PackedDataset", "load_datasets"]
log = logging.getLogger(__name__)

DATASET_DIR = Path("dataset")
MAX_HELD_OUT_BYTES = 2_000_000


@dataclass(frozen=True)
class DataConfig:
    """Which files are trained on, and which are held out."""

    files: tuple[str, ...] = ()
    """Training files; empty = those directly in dataset/ of the right kind, else the sample."""
    val_files: tuple[str, ...] = ()
    """Validation files, each reported by its name; empty = a part of the training files."""
    val_fraction: float = 0.005
    """Share of each training file that is held out where no validation file is named."""
    val_max_rows: int = 0
    """Rows of each validation set that one evaluation reads; 0 = all."""

    format: str = "auto"
    """Format of all files: auto = seen from their content; else a name, of formats.FORMATS."""
    alpaca_join: Literal["newline", "none"] = "newline"
    """What stands between instruction and input of an Alpaca row (wyf3: none)."""

    def __post_init__(self) -> None:
        if self.format not in formats.NAMES:
            raise ValueError(f"data.format={self.format} is none of {', '.join(formats.NAMES)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} must be between 0 and 1")
        if self.val_max_rows < 0:
            raise ValueError(f"data.val_max_rows={self.val_max_rows} must be 0 or more")

    @property
    def read_options(self) -> formats.ReadOptions:
        """How rows are read."""
        return formats.ReadOptions(self.format, {"newline": "\n", "none": ""}[self.alpaca_join])


# ---- 1. which files ------------------------------------------------------------------------------


class Files(NamedTuple):
    """The data of a run, and in words how it was chosen."""

    train: list[Path]
    val: list[Path]
    why: str


def expand(name: str) -> list[Path]:
    """The files that a name of data.files stands for: a file, those of a folder, or of a pattern.

    Raises UserError where there are none.
    """
    path = Path(name)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and _may_be_data(p)]
    elif path.exists() or not any(c in name for c in "*?["):
        return [path]
    else:
        found = [Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file()]
    if not found:
        raise UserError(
            f"{name}: no data file is there (of a folder those are taken that end in "
            f"{', '.join(SUFFIXES)}, also with {' or '.join(COMPRESSED)})"
        )
    return sorted(found)


def _may_be_data(path: Path) -> bool:
    """Does a name look like one of a data file; README.txt and LICENSE.txt do not."""
    return (
        bool({*path.suffixes} & {*SUFFIXES, *COMPRESSED})
        and not path.name.startswith(".")
        and path.stem.split(".")[0].upper() not in ("README", "LICENSE", "SOURCES", "NOTICE")
    )


def choose_files(config: DataConfig, kind: str) -> Files:
    """Training and validation files of a stage; raises UserError where there are none."""
    val = [Path(name) for name in config.val_files]
    if config.files:
        return Files([Path(name) for name in config.files], val, "data.files")
    own, others = [], []
    for path in sorted(DATASET_DIR.glob("*")):
        if path.is_file() and _may_be_data(path):
            try:
                found = formats.detect(path, name=config.format).format.kind
            except UserError as error:
                found = f"not usable ({error})"
            (own if found == kind else others).append((path, found))
    passed_over = "".join(f"\n  not used: {path} is {found}" for path, found in others)
    if own:
        return Files([path for path, _ in own], val, f"{kind} files in dataset/{passed_over}")
    sample = DATASET_DIR / "sample" / f"{kind}.jsonl"
    if sample.is_file():
        val = val or sorted((DATASET_DIR / "sample" / "val" / kind).glob("*.jsonl"))
        return Files([sample], val, f"the sample, as dataset/ has no {kind} file{passed_over}")
    raise UserError(
        f"no {kind} data: looked for JSONL files of rows like {formats.EXPECTED[kind]} in "
        f"{DATASET_DIR.resolve()} and for {sample}.{passed_over}\n"
        "Either fetch the sample:      python -m tools.prepare_data\n"
        "or name a file of your own:   data.files=PATH (or put it into dataset/)"
    )


# ---- 2. a record -> ids and loss mask ------------------------------------------------------------


def encode_document(tokenizer: Tokenizer, record: formats.Record) -> list[Sequence]:
    """A text between two end-of-text ids; all but the first are under the loss."""
    end = tokenizer.end_of_text_id
    ids = [end, *tokenizer.encode(record.value), end]
    return [Sequence(ids, [False] + [True] * (len(ids) - 1))]


def encode_conversation(tokenizer: Tokenizer, record: formats.Record) -> list[Sequence]:
    """A conversation in ChatML; the assistant's words and ends of turn are under the loss."""
    return [render_conversation(tokenizer, record.value)]


def encode_preference(tokenizer: Tokenizer, record: formats.Record) -> list[Sequence]:
    """Chosen and rejected conversation; of each only the last answer is under the loss."""
    return [_last_answer_only(render_conversation(tokenizer, c)) for c in record.value]


def _last_answer_only(sequence: Sequence) -> Sequence:
    end = len(sequence.mask) - sequence.mask[::-1].index(True)
    start = end
    while start and sequence.mask[start - 1]:
        start -= 1
    return Sequence(sequence.ids, [start <= i < end for i in range(len(sequence.mask))])


ENCODERS: dict[str, Encode] = {
    "pretrain": encode_document,
    "sft": encode_conversation,
    "dpo": encode_preference,
}


# ---- 4. held-out documents -----------------------------------------------------------------------


def hold_out(cache: TokenCache, fraction: float) -> np.ndarray:
    """Which records are validation: those with the smallest hashes, so the same ones for ever.

    At least one record and at most MAX_HELD_OUT_BYTES tokens' worth; records of equal content
    share their hash and so their side. Returns bool (num_records,).
    """
    order = np.argsort(cache.hashes, kind="stable")
    below = cache.hashes[order] < np.uint64(fraction * 2.0**64)
    sizes = np.diff(cache.offsets).reshape(cache.num_records, -1).sum(1)[order]
    # Tokens are at least a byte each and about four: a bound in bytes needs no decoding.
    chosen = below & (np.cumsum(sizes) * 4 <= MAX_HELD_OUT_BYTES)
    limit = cache.hashes[order][max(1, int(chosen.sum())) - 1]
    return np.asarray(cache.hashes <= limit)


# ---- all together --------------------------------------------------------------------------------


class Datasets(NamedTuple):
    """Training rows, validation rows by name, and what they were made of."""

    train: PackedDataset
    val: dict[str, PackedDataset]
    data_key: str
    """Changes when a file, the tokenizer or the choice of files changes."""
    yardsticks: dict[str, float] = {}
    """Bits per byte that need no model, by name (yardsticks.py); none of preferences."""


def load_datasets(
    config: DataConfig, kind: str, tokenizer: Tokenizer, sequence_length: int, seed: int
) -> Datasets:
    """Choose, tokenize and pack the data of a stage, and say in the log what it is.

    Raises UserError for missing, broken or unusable files.
    """
    files = choose_files(config, kind)
    log.info("data: %s", files.why)
    encode = ENCODERS[kind]
    train = [
        build_cache(path, kind, tokenizer, encode, config.read_options) for path in files.train
    ]
    val = {
        name: build_cache(path, kind, tokenizer, encode, config.read_options)
        for name, path in _named(files.val)
    }
    if val:
        held_out = {
            name: [(cache, np.ones(cache.num_records, bool))] for name, cache in val.items()
        }
        selected = [(cache, np.ones(cache.num_records, bool)) for cache in train]
    else:
        masks = [hold_out(cache, config.val_fraction) for cache in train]
        held_out = {
            name: [(cache, mask)]
            for (name, _), cache, mask in zip(_named(files.train), train, masks, strict=True)
        }
        selected = [(cache, ~mask) for cache, mask in zip(train, masks, strict=True)]
    row_length = 2 * sequence_length if kind == "dpo" else sequence_length
    byte_lengths = np.array([len(text) for text in tokenizer.id_to_bytes], np.int64)

    def pack(parts: list, first: int, max_rows: int, seed: int) -> PackedDataset:
        return PackedDataset(
            parts, kind, row_length, byte_lengths, seed, first_sequence_id=first, max_rows=max_rows
        )

    packed = pack(selected, 0, 0, seed)
    _describe("train", packed)
    first, val_sets = packed.num_sequences, {}
    for name, parts in held_out.items():
        # A fixed seed: what is measured does not change with the seed of the run.
        val_sets[name] = pack(parts, first, config.val_max_rows, 0)
        first += val_sets[name].num_sequences
        _describe(f"val/{name}", val_sets[name])
    return Datasets(packed, val_sets, " ".join(cache.key for cache in (*train, *val.values())))


def _named(paths: list[Path]) -> list[tuple[str, Path]]:
    """A short name for each file: its stem, with the folder where two share a stem."""
    stems = Counter(path.stem for path in paths)
    names = [p.stem if stems[p.stem] == 1 else f"{p.parent.name}_{p.stem}" for p in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" for i, name in enumerate(names)]
    return list(zip(names, paths, strict=True))


def _describe(name: str, packed: PackedDataset) -> None:
    size = f"{packed.num_units:,} units, {packed.num_tokens:,} tokens, {packed.num_rows():,} rows"
    log.info(
        "%s: %s of %d, %.1f %% padding  (%s)", name, size, packed.row_length,
        100 * packed.padding(), ", ".join(str(cache.path) for cache in packed.caches),
    )  # fmt: skip
    if packed.num_dropped:
        kinds = ", ".join(f"{source} {n}" for source, n in sorted(packed.num_dropped.items()))
        log.warning(
            "%s: %d rows longer than %d positions were left out: %s (sequence_length decides)",
            name, sum(packed.num_dropped.values()), packed.row_length, kinds,
        )  # fmt: skip

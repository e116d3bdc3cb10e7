"""How fast and in how much memory a large file becomes a token cache, against the library alone.

    python -m bench.token_cache [--megabytes 1000] [--library-megabytes 50] [--folder DIR]

Writes JSON lines of the sample's texts, each with a counter so that no two are alike; then times

    library    `tokenizers` alone: encode_batch_fast over texts that are in memory, on all cores
    cache      token_cache.build_cache: read, parse, check, tokenize, write, on the same cores
    reuse      the same call again, in a new process: nothing is tokenized
    start      load_datasets from the cache: held-out rows, the plan of an epoch
    train      train.py with the tiny model for 30 steps: seconds to the first, memory;
               `train_small` is the same on the first 10 MB of the file. Each runs twice, for
               the first run measures yardsticks; the second one counts

Prints one JSON object a part: MB/s of text (UTF-8), peak memory of all processes together (their
own pages, without those of mapped files, which may go at any time; in MB), seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.common import ROOT, record, seconds_to_first_figure

SAMPLE = ROOT / "dataset/sample/pretrain.jsonl"


def main() -> None:
    """Write the file, then measure each part in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.token_cache", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--library-megabytes", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/bench")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.folder / f"{options.megabytes}MB.jsonl"
    os.environ["TRAIN_LLM_CACHE_DIR"] = str(options.folder / "cache")
    if options.part:
        PARTS[options.part](path, options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        generate(path, options.megabytes * 1_000_000)
    shutil.rmtree(options.folder / "cache", ignore_errors=True)
    found = {}
    for name, part in (("library", "library"), ("cache", "cache"), ("reuse", "cache"),
                       ("plan", "start"), ("start", "start"), ("train_small", "train_small"),
                       ("train_small", "train_small"), ("train", "train"),
                       ("train", "train")):  # fmt: skip
        command = [sys.executable, "-m", "bench.token_cache", *sys.argv[1:], "--part", part]
        out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(out.stdout.splitlines()[-1])
        print(json.dumps({"part": name, **found[name]}), flush=True)
    more = {"megabytes": options.megabytes, "parts": found}
    ratio = found["cache"]["MB_per_s"] / found["library"]["MB_per_s"]
    record("cache", [ratio], ">= 0.85", **more)
    record("cache_memory", [found["cache"]["peak_MB"]], "<= 1500", **more)
    record("cache_start", [found["start"]["seconds"]], "< 5", **more)
    grown = found["train"]["peak_MB"] / found["train_small"]["peak_MB"]
    record("cache_training", [grown], "<= 1.2", **more)


def generate(path: Path, size: int) -> None:
    """Rows of the sample over and over, a counter in each."""
    texts = [json.loads(line)["text"] for line in SAMPLE.open(encoding="utf-8")]
    number = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for text in texts:
                number += 1
                row = {"text": f"{number} {text}"}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def library(path: Path, options: argparse.Namespace) -> None:
    """The tokenizers library on the first texts of the file."""
    from tokenizer import Tokenizer, default_folder

    bpe, texts, size = Tokenizer(default_folder())._bpe, [], 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > options.library_megabytes * 1e6:
                break
    start, tokens = time.perf_counter(), 0
    for begin in range(0, len(texts), 1000):
        part = bpe.encode_batch_fast(texts[begin : begin + 1000], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in part)
    report(size, time.perf_counter() - start, 0.0, tokens=tokens)


def cache(path: Path, options: argparse.Namespace) -> None:
    """The token cache of the file."""
    from token_cache import build_cache
    from tokenizer import Sequence, Tokenizer, default_folder

    def encode(tokenizer, record):  # As dataset.encode_document, without torch.
        ids = [0, *tokenizer.encode(record.value), 0]
        return [Sequence(ids, [False] + [True] * (len(ids) - 1))]

    peak = Peak()
    start = time.perf_counter()
    made = build_cache(path, "pretrain", Tokenizer(default_folder()), encode)
    size = int(path.stat().st_size * text_share(path))
    report(size, time.perf_counter() - start, peak.stop(), tokens=len(made.ids))


def text_share(path: Path) -> float:
    """Bytes of text over bytes of the file, in its first 20 MB."""
    lines = path.open("rb").readlines(20_000_000)
    texts = sum(len(json.loads(line)["text"].encode()) for line in lines)
    return texts / sum(map(len, lines))


def start(path: Path, options: argparse.Namespace) -> None:
    """From the cache to the first batch."""
    begin = time.perf_counter()
    peak = Peak()
    from dataset import DataConfig, load_datasets
    from tokenizer import Tokenizer, default_folder
    from trainlib.batches import Place

    config = DataConfig(files=(str(path),))
    imported = time.perf_counter() - begin
    data = load_datasets(config, "pretrain", Tokenizer(default_folder()), 512, 0).train
    rows = data.rows(Place())
    data.collate([next(rows)[0] for _ in range(16)], 16)
    seconds = time.perf_counter() - begin
    report(0, seconds, peak.stop(), rows=data.num_rows(), imports=round(imported, 2))


def train(path: Path, options: argparse.Namespace) -> None:
    """A short run of the stage."""
    words = ["configs/tiny_pretrain.yaml", f"data.files={path}", "data.val_files=",
             "data.val_max_rows=1", "max_steps=30", "compile=off", "precision=fp32"]  # fmt: skip
    peak = Peak()
    seconds = seconds_to_first_figure(words, options.folder / "run", dict(os.environ))
    report(0, seconds, peak.stop())


def train_small(path: Path, options: argparse.Namespace) -> None:
    """The same on the beginning of the file."""
    small = options.folder / f"start_of_{path.name}"
    if not small.is_file():
        with path.open("rb") as file, small.open("wb") as begin:
            begin.writelines(file.readlines(10_000_000))
    train(small, options)


PARTS = {"library": library, "cache": cache, "start": start, "train": train,
         "train_small": train_small}  # fmt: skip


class Peak:
    """The most memory of this process and its children, looked at ten times a second."""

    def __init__(self) -> None:
        self._most, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """The peak in MB."""
        self._done.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, sum(map(_anonymous, _family())))
            if self._done.wait(0.1):
                return


def _family() -> list[int]:
    own = os.getpid()
    try:
        tasks = Path(f"/proc/{own}/task").iterdir()
        found = [int(p) for task in tasks for p in (task / "children").read_text().split()]
    except OSError:
        found = []
    return [own, *found]


def _anonymous(pid: int) -> float:
    """Proportional set size without mapped files, in MB."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return float(sizes.get("Pss_Anon", sizes.get("Pss", 0))) / 1024


def report(size: int, seconds: float, peak: float, **more: float) -> None:
    """One line of JSON."""
    line = {"seconds": round(seconds, 2), **more}
    if size:
        line["MB_per_s"] = round(size / 1e6 / seconds, 2)
        # What the cores did: comparable even where others use them meanwhile.
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        line["cpu_seconds"] = round(sum(usage.ru_utime + usage.ru_stime for usage in used), 2)
    if peak:
        line["peak_MB"] = round(peak)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""Files that a finished run adds to final/: the model card, its picture, run.yaml without paths.

The card is card.md, filled. Its header has the keys that Hugging Face and ModelScope read; Hugging
Face rejects a base_model that is no repository, and a licence that nobody chose is `other`. The
files name no path of this machine, because final/ is made to be published.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import count_parameters
from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError
from trainlib.core.hardware import cpu_name
from trainlib.core.settings import provenance, recipe, resolved, run_yaml, with_value
from trainlib.data.token_cache import TokenCache
from trainlib.engine.metrics import TRAIN_TOKENS, VAL_LOSS, read_metrics
from trainlib.engine.run import RunConfig
from trainlib.engine.training import Training
from trainlib.evaluation.curve import draw_curve

PATH_KEYS = ("out_dir", "resume", "tokenizer", "init_from", "data.files", "data.val_files")
MAIN_SETTINGS = ("tokens_per_step", "sequence_length", "beta", "optim.name", "optim.muon_lr",
                 "optim.adamw_lr", "optim.embedding_lr", "optim.schedule", "seed")  # fmt: skip
STAGES = {"pretrain": "pretraining", "sft": "supervised fine-tuning (SFT)",
          "dpo": "direct preference optimization (DPO)"}  # fmt: skip
LANGUAGES = {"en": ("English", r"\b(?:the|of|and)\b", 0.001), "zh": ("Chinese", "[一-鿿]", 0.04)}
"""By code: name, a pattern, and its least number of matches per character of the training data."""
NOT_CHOSEN = {"license": "other", "license_name": "not-chosen"}
WEAK = 0.5
"""A skill with a smaller share of correct answers is listed among what the model cannot do."""


def final_files(training: Training, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files by name; reads metrics.jsonl and, if it exists, skills.json of the run."""
    run, kept = training.run, kept_step(training)
    rows = [row for row in read_metrics(run.folder) if row["step"] <= kept]
    metric = "reward_accuracy" if run.stage == "dpo" else "bits_per_byte"
    val, train = (
        [(row["step"], row[name]) for row in rows if name in row]
        for name in (f"val/{metric}", f"train/{metric}")
    )
    baselines = {"chance": 0.5} if run.stage == "dpo" else training.datasets.baselines
    config = without_paths(resolved(run.config, precision=run.hardware.precision))
    files = {"README.md": card(training, tokenizer, rows), "run.yaml": run_yaml(config)}
    # Without a finite value there is no curve.
    name = metric.replace("_", " ")
    picture = {"curve.png": draw_curve(name, val, train, baselines)} if val else {}
    return picture | {name: text.encode() for name, text in files.items()}


def kept_step(training: Training) -> float:
    """Return the step of the weights, if they are those in best/, otherwise infinity."""
    folder, parameters = training.run.folder / "best", dict(training.model.named_parameters())
    with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
        weights = load_file(folder / "model.safetensors")
        if all(torch.equal(parameters[name].cpu(), value) for name, value in weights.items()):
            return json.loads((folder / "validation.json").read_text(encoding="utf-8"))["step"]
    return math.inf


def without_paths(config: RunConfig) -> RunConfig:
    """Return the settings with names instead of paths, also in the sources of the values."""
    for key, source in provenance(config).items():
        value = operator.attrgetter(key)(config)
        if key in PATH_KEYS:
            is_list = isinstance(value, tuple)
            value = tuple(Path(item).name for item in value) if is_list else Path(value).name
        config = with_value(config, key, value, Path(source).name)
    return config


def part(text: str, name: str) -> str | None:
    """Return the lines between the comments of a part of a card; None without such a part."""
    found = re.search(f"<!-- begin {name} -->\n(.*)<!-- end {name} -->", text, re.S)
    return found[1] if found else None


def with_evaluation(text: str, table: str) -> str:
    """Return a card with the table of tools.evaluate, instead of an earlier one."""
    begin, end = "<!-- begin evaluation -->\n", "<!-- end evaluation -->"
    if (earlier := part(text, "evaluation")) is None:
        raise UserError(f"the card has no lines {begin.strip()} and {end}. Add them to it.")
    return text.replace(f"{begin}{earlier}{end}", f"{begin}{table.rstrip()}\n{end}")


def card(training: Training, tokenizer: Tokenizer, rows: list[dict[str, float]]) -> str:
    """Return the text of the card; `rows` are the rows of metrics.jsonl."""
    run, caches = training.run, training.datasets.train.caches
    header, data, origin = read_base(run.config.init_from)
    text = " ".join(_excerpt(tokenizer, cache) for cache in caches)
    codes = [
        code for code, (_, pattern, share) in LANGUAGES.items()
        if code in header.get("language", ()) or len(re.findall(pattern, text)) > share * len(text)
    ]  # fmt: skip
    if not header.get("license"):
        header |= NOT_CHOSEN
    chosen = header["license"] != "other" or header.get("license_name") != "not-chosen"
    pretrained = run.stage == "pretrain"
    header |= {
        "language": codes,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tasks": ["text-generation"],  # ModelScope's name for pipeline_tag.
        "frameworks": ["pytorch"],
        "tags": [run.stage] if pretrained else [run.stage, "conversational"],
    }
    chat = json.dumps([{"role": "user", "content": "Who are you?"}])
    path = run.folder / "skills.json"
    skills = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        header=yaml.safe_dump({k: v for k, v in header.items() if v}),
        size=f"{count_parameters(training.model) / 1e6:,.1f}M",
        languages=" and ".join(LANGUAGES[code][0] for code in codes) or "text",
        stage=STAGES[run.stage],
        origin=origin,
        data="\n".join([*data, *(row for cache in caches for row in data_rows(run.stage, cache))]),
        licence="The licence is that of the model which it started from." if chosen else
        "Nobody has chosen a licence for the weights: set `license` at the top of this file.",
        training=_training(training, rows),
        results="\n".join(_results(rows, training.datasets.baselines, skills)),
        limits="\n".join(_limits(training, skills)),
        example='"第一条"' if pretrained else chat,
        raw=" --raw" * pretrained,
    )  # fmt: skip


def read_base(folder: str) -> tuple[dict[str, Any], list[str], str]:
    """Return the header and data rows of the card in init_from, and a sentence on the origin."""
    if not folder:
        return {}, [], "It started from random weights."
    path, header = Path(folder, "README.md"), None
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.startswith("---\n"):
        with contextlib.suppress(yaml.YAMLError):
            header = yaml.safe_load(text.split("---\n")[1])
    known = header if isinstance(header, dict) else {}
    header = {k: known.get(k) for k in ("language", "license", "license_name", "base_model")}
    header["language"] = header["language"] or []
    rows = part(text, "data")
    if rows is None:  # Not a card of ours. A path in the cache of Hugging Face has the name.
        found = re.search(r"models--([\w.-]+?)--([\w.-]+)/", Path(folder).absolute().as_posix())
        header["base_model"] = f"{found[1]}/{found[2]}" if found else None
    elif not header["base_model"]:
        return header, rows.splitlines()[2:], "The table under Data has the earlier stages too."
    origin = f"It started from {header['base_model'] or 'a model whose name is not recorded'}."
    return header, (rows or "").splitlines()[2:], origin


def _excerpt(tokenizer: Tokenizer, cache: TokenCache) -> str:
    """Return text from 40 places spread over a file."""
    starts = np.linspace(0, max(0, len(cache.ids) - 500), 40).astype(int)
    return " ".join(tokenizer.decode(cache.ids[i : i + 500].tolist()) for i in starts)


def data_rows(stage: str, cache: TokenCache) -> list[str]:
    """Return a table row for each licence in a file, from SOURCES.json in its folder, if any."""
    licences: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        listed = json.loads(cache.path.with_name("SOURCES.json").read_text(encoding="utf-8"))
        for source, entry in listed["files"][cache.path.name]["sources"].items():
            packages = [listed["packages"][name] for name in entry.get("packages", ())]
            texts = [f"{p['name']} {p['version']}: {p['licence']}" for p in packages]
            licences[source] = "; ".join(texts) or "generated"
    sizes = np.bincount(cache.sources, cache.record_lengths, len(cache.source_names))
    groups: dict[str, list[tuple[str, float]]] = {}
    for source, size in zip(cache.source_names, sizes, strict=True):
        groups.setdefault(licences.get(source, "not recorded"), []).append((source, size))
    rows = []
    for licence, sources in groups.items():
        names = ", ".join(source for source, size in sources if size and source in licences)
        if tokens := int(sum(size for _, size in sources)):
            file = f"{cache.path.name}: {names}" if names else cache.path.name
            rows.append(f"| {stage} | {_cell(file)} | {tokens:,} | {_cell(licence)} |")
    return rows


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return re.sub(r"([\\|`*_<\[])", r"\\\1", " ".join(text.split()))


def _training(training: Training, rows: list[dict[str, float]]) -> str:
    run, settings = training.run, recipe(training.run.config)
    on_gpu, ranks = run.hardware.device.type == "cuda", run.distributed.world_size
    device = torch.cuda.get_device_name(run.hardware.device) if on_gpu else cpu_name()
    tokens = max((row[TRAIN_TOKENS] for row in rows if TRAIN_TOKENS in row), default=0)
    values = ", ".join(f"{key}={settings[key]}" for key in MAIN_SETTINGS if key in settings)
    return (
        f"- {rows[-1]['step']:,} steps on {tokens:,} tokens in {run.clock.seconds() / 3600:.2f} "
        f"hours, with `{values}`. run.yaml has all settings.\n"
        f"- {device}, {ranks} process{'es' * (ranks > 1)}, {run.hardware.precision}, "
        f"torch {torch.__version__}"
    )


def _results(
    rows: list[dict[str, float]], baselines: dict[str, float], skills: dict[str, dict[str, float]]
) -> list[str]:
    """Return a table of the first and the last evaluation, and one of the skills, if any."""
    found = [row for row in rows if VAL_LOSS in row]
    lines = ["| held-out data | before | after |", "| --- | --- | --- |"]
    for key, value in found[-1].items() if found else ():
        source, _, metric = key.removeprefix("val/").rpartition("/")
        if key == VAL_LOSS or metric in ("bits_per_byte", "reward_accuracy"):
            name = _cell(": ".join(filter(None, [metric.replace("_", " "), source])))
            lines.append(f"| {name} | {found[0].get(key, math.nan):.3f} | {value:.3f} |")
    lines += [f"| {name} baseline | {value:.3f} | |" for name, value in baselines.items()]
    if skills:
        lines += ["", "| skill | correct | of | 95 % interval |", "| --- | --- | --- | --- |"]
    for kind, s in skills.items():
        counts = f"{s['correct']} | {s['total']} | {s['low']:.2f} to {s['high']:.2f}"
        lines.append(f"| {_cell(kind)} | {counts} |")
    return lines


def _limits(training: Training, skills: dict[str, dict[str, float]]) -> list[str]:
    """Return what the model cannot do, as far as the stage and the skills show it."""
    config = training.run.config
    weak = ", ".join(kind for kind, s in skills.items() if s["correct"] < WEAK * s["total"])
    return [
        "- It states falsehoods as readily as facts.",
        "- Nothing in its training makes it refuse harmful requests.",
        f"- Its context is {training.model.config.max_position_embeddings:,} tokens; this stage "
        f"used {config.sequence_length:,}.",
        *["- It continues texts and does not answer."] * (training.run.stage == "pretrain"),
        *[f"- Less than half of its answers are correct in: {_cell(weak)}."] * bool(weak),
    ]

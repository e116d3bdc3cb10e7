"""Files that a finished run adds to final/: the model card, its picture, run.yaml without paths.

The card is card.md, filled. Hugging Face rejects a base_model that is no repository, and a licence
that nobody chose is `other`. No file names a path of this machine: final/ is made to be published.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from model import count_parameters
from tokenizer.bpe import Tokenizer
from trainlib.core.hardware import cpu_name
from trainlib.core.settings import run_yaml
from trainlib.data.formats import STAGES
from trainlib.data.packing import Datasets
from trainlib.data.token_cache import TokenCache
from trainlib.engine.metrics import TRAIN_TOKENS, read_metrics
from trainlib.engine.progress import SKILLS, validation_tables
from trainlib.engine.training import Training
from trainlib.evaluation.curve import draw_curve
from trainlib.evaluation.skills import format_counts

LANGUAGES = {"en": (r"\b(?:the|of|and)\b", 0.001), "zh": ("[一-鿿]", 0.04)}
"""By code: a pattern, and its least number of matches per character of the training data."""


def final_files(training: Training, tokenizer: Tokenizer, step: int) -> dict[str, bytes]:
    """Return the files by name, for a model with the weights of a step."""
    run, metric, baselines = training.run, "bits_per_byte", training.datasets.baselines
    if run.stage == "dpo":
        metric, baselines = "reward_accuracy", {"chance": 0.5}
    rows = [row for row in read_metrics(run.folder) if row["step"] <= step]
    last = {TRAIN_TOKENS: 0} | {name: value for row in rows for name, value in row.items()}
    settings = run_yaml(run.config, without_paths)
    text = card(training, tokenizer, last, settings)
    files = {"README.md": text.encode(), "run.yaml": settings.encode()}
    if val := [(row["step"], row[f"val/{metric}"]) for row in rows if f"val/{metric}" in row]:
        files["curve.png"] = draw_curve(metric.replace("_", " "), val, baselines)
    return files


def without_paths(value: Any) -> Any:
    """Return a value of a setting, with the names of files and folders instead of their paths."""
    if isinstance(value, tuple):
        return tuple(map(without_paths, value))
    return Path(value).name if isinstance(value, str) else value


def card(training: Training, tokenizer: Tokenizer, last: dict[str, float], settings: str) -> str:
    """Return the text of the card, from the last value of each metric and the text of run.yaml."""
    run, datasets, folder = training.run, training.datasets, training.run.config.init_from
    pretrained, on_gpu = run.stage == "pretrain", run.hardware.device.type == "cuda"
    base, data = read_base(folder)
    licence = base if "license" in base else {"license": "other", "license_name": "not-chosen"}
    codes = sorted({*base.get("language", ()), *languages(tokenizer, datasets)})
    name = f"of the {data[-1].split()[1]} stage" if data else f"`{Path(folder).name}`"
    shown = {k: v for k, v in last.items() if k.startswith("val/") and not k.startswith(SKILLS)}
    results = validation_tables(int(last["step"]), shown)
    results += [f"{k} baseline: {v:.3f} bits per byte" for k, v in datasets.baselines.items()]
    limits = "- It continues texts and does not answer." * pretrained
    if (path := run.folder / "skills.json").is_file():
        skills = json.loads(path.read_text(encoding="utf-8"))
        results += ["", *format_counts(skills)]
        weak = ", ".join(k for k, s in sorted(skills.items()) if 2 * s["correct"] < s["total"])
        limits += f"- Less than half of its answers are correct in: `{weak}`." if weak else ""
    chosen = [line for line in settings.splitlines() if not line.endswith("# default")]
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        header=yaml.safe_dump({k: v for k, v in {**licence, "language": codes}.items() if v}),
        size=f"{count_parameters(training.model) / 1e6:,.1f}M",
        origin=f"the model {name}" if folder else "random weights",
        data="\n".join([*data, *(data_row(run.stage, cache) for cache in datasets.train.caches)]),
        device=torch.cuda.get_device_name(run.hardware.device) if on_gpu else cpu_name(),
        recipe="\n".join(line.split("  # ")[0] for line in chosen),
        results="\n".join(results), limits=limits,
        prompt='"第一条"' if pretrained else '[{"role": "user", "content": "Who are you?"}]',
        run=run, model=training.model, last=last, torch=torch, hours=run.clock.seconds() / 3600,
    )  # fmt: skip


def read_base(folder: str) -> tuple[dict[str, Any], list[str]]:
    """Return licence and languages in the header of init_from's card, and its rows on the data."""
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        text = Path(folder, "README.md").read_text(encoding="utf-8") if folder else ""
        _, head, body = text.split("---\n", 2)
        known = yaml.safe_load(head)
        header = {k: str(known[k]) for k in ("license", "license_name") if known.get(k)}
        codes = re.findall(r"[\w-]+", str(known.get("language") or ""))
        rows = re.findall(rf"^\| (?:{'|'.join(STAGES)}) \|.*", body, re.M)
        return {**header, "language": codes}, rows
    return {}, []


def languages(tokenizer: Tokenizer, datasets: Datasets) -> list[str]:
    """Return the codes of the languages in excerpts from the training data."""
    parts = [part for cache in datasets.train.caches for part in np.array_split(cache.ids, 40)]
    text = " ".join(tokenizer.decode(part[:500].tolist()) for part in parts)
    return [code for code, (pattern, share) in LANGUAGES.items()
            if len(re.findall(pattern, text)) > share * len(text)]  # fmt: skip


def data_row(stage: str, cache: TokenCache) -> str:
    """Return the table row of a file, with sources and licences if all are in SOURCES.json."""
    sources, licences = [], ["not recorded"]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        info = json.loads(cache.path.with_name("SOURCES.json").read_text(encoding="utf-8"))
        entries = info["files"][cache.path.name]["sources"]
        used = [cache.source_names[i] for i in np.unique(cache.sources)]
        names = [name for source in used for name in entries[source]["packages"] or ["generated"]]
        texts = {k: "{name} {version}: {licence}".format(**p) for k, p in info["packages"].items()}
        sources, licences = used, list(dict.fromkeys(texts.get(name, name) for name in names))
    cells = (stage, cache.path.name, ", ".join(sources), f"{len(cache.ids):,}", "\n".join(licences))
    shown = ("<br>".join(re.sub(r"([\\|`*_<\[])", r"\\\1", cell).splitlines()) for cell in cells)
    return f"| {' | '.join(shown)} |"

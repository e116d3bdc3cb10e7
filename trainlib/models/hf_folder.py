"""The model folder that transformers opens as a stock Qwen3ForCausalLM, and the way back.

Parameters carry Hugging Face names already, so weights need no conversion; what is written here
is config.json and generation_config.json, and what is checked is that a folder from elsewhere
is an architecture that model.py computes.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import ModelConfig, Transformer
from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError, as_user_errors
from trainlib.core.parsing import value_text
from trainlib.core.settings import COMMAND_LINE, provenance, with_value

log = logging.getLogger(__name__)

ARCHITECTURE = "Qwen3ForCausalLM"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What transformers' Qwen3Config assumes where config.json says nothing; sizes must be there.
DEFAULTS: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def model_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """All files of a model folder but the weights: name to content."""
    end_of_turn, pad = tokenizer.stop_ids
    values = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end_of_turn,
        "pad_token_id": pad,
        "head_dim": config.head_dim,  # Without it transformers assumes 128.
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        # transformers 5 reads rope_parameters, other programs rope_theta.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    generation = {"eos_token_id": [end_of_turn, pad], "pad_token_id": pad}
    return {
        "config.json": json.dumps(values, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **tokenizer.files(config.max_position_embeddings),
    }


def load_config(folder: str | Path, option: str = "init_from=") -> ModelConfig:
    """The sizes of a model folder, which the user named by an option.

    Raises UserError where there is none, or one of another architecture or variant.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        cure = "Train the stage before it, or name a folder with config.json and model.safetensors."
        if (Path(folder) / "final/config.json").is_file():
            cure = f"Did you mean {option}{Path(folder) / 'final'}?"
        raise UserError(f"{option}{folder}: no model folder there ({path} does not exist). {cure}")
    values = {**DEFAULTS, **_read_json(path)}
    found = values.get("architectures") or ["none named"]
    if found[0] != ARCHITECTURE:
        raise UserError(f"{path}: architecture {found[0]}, but only {ARCHITECTURE} is supported")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for key, value, wanted in (
        ("attention_bias", values.get("attention_bias", False), False),
        ("hidden_act", values.get("hidden_act", "silu"), "silu"),
        ("use_sliding_window", values.get("use_sliding_window", False), False),
        # Older folders write "type".
        ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != wanted:
            raise UserError(f"{path}: {key} is {value!r}, but only {wanted!r} is supported")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    for key, kind in ModelConfig.__annotations__.items():
        if key not in values:
            raise UserError(f"{path}: {key} is missing")
        types = {"int": (int,), "float": (int, float), "bool": (bool,)}[kind]
        if type(values[key]) not in types:
            raise UserError(f"{path}: {key} is {values[key]!r}, where {kind} is needed")
    try:
        return ModelConfig(**{key: values[key] for key in ModelConfig.__annotations__})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def with_sizes(config: Any) -> Any:
    """The settings with the sizes of init_from's model; others of a file are named and left out.

    Raises UserError for others of the command line.
    """
    sizes, sources = asdict(load_config(config.init_from)), provenance(config)
    given = asdict(config.model)
    other = {
        f"model.{key}={value_text(given[key])} ({source}), {value_text(size)} there": source
        for key, size in sizes.items()
        if (source := sources[f"model.{key}"]) != "default" and given[key] != size
    }
    lines = "".join(f"\n  {text}" for text in other)
    what = f"init_from={config.init_from} has a model of other sizes than the settings:{lines}"
    if COMMAND_LINE in other.values():
        raise UserError(f"{what}\nLeave these keys out, or train a new model without init_from.")
    if other:
        _warn_once(f"{what}\nIt keeps its own.")
    for key, size in sizes.items():
        config = with_value(config, f"model.{key}", size, "of init_from")
    return config


def load_model(folder: str | Path, option: str = "init_from=") -> Transformer:
    """A model from a folder, in fp32 on the CPU; draws no random number.

    Raises UserError where the folder, its architecture or a tensor is not what is needed.
    """
    config = load_config(folder, option)
    with torch.device("meta"):  # Initial values would be replaced at once.
        model = Transformer(config)
    tensors = _read_tensors(Path(folder))
    head = tensors.get("lm_head.weight")
    if model.config.tie_word_embeddings and head is not None:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError(f"{folder}: tied embeddings, but an lm_head.weight of its own")
        del tensors["lm_head.weight"]
    parameters = dict(model.named_parameters())
    problems = [f"{name} is missing" for name in parameters if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in parameters]
    problems += [
        f"{name} has shape {tuple(t.shape)}, not {tuple(parameters[name].shape)}"
        for name, t in tensors.items()
        if name in parameters and t.shape != parameters[name].shape
    ]
    problems += [
        f"{name} is {t.dtype}, not a float" for name, t in tensors.items() if t.dtype not in FLOATS
    ]
    if problems:
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(problems[:5])}")
    # Copied, as load_file maps the file, which may be replaced while the model lives.
    weights = {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = _shards(index)
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def _shards(index: Path) -> list[str]:
    """The files of weights that an index names; raises UserError for one outside its folder."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names {outside[0]}, which is outside {index.parent}")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Copy it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, where an object is needed")
    return values


def load_tokenizer(folder: str | Path, sequence_length: int = 0) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises UserError where the folder holds no model that can be trained, or one without a row for
    every id, or one for shorter rows: before anything is tokenized, as that may take hours.
    """
    config, path = load_config(folder), Path(folder) / "config.json"
    with as_user_errors():
        tokenizer = Tokenizer(folder)
    cure = "copy the model's own tokenizer.json there"
    check_vocabulary(config, tokenizer, f"{path}: vocab_size", cure)
    where = f"{path}: max_position_embeddings"
    if wrong := too_long(sequence_length, config.max_position_embeddings, where):
        raise UserError(wrong[0])
    return tokenizer


def too_long(sequence_length: int, longest: int, where: str) -> list[str]:
    """What is wrong with rows of more positions than the model is meant for; nothing if none is."""
    if sequence_length <= longest:
        return []
    cure = f"give at most {longest}, or train a model with more max_position_embeddings"
    return [f"{where}={longest}, but sequence_length={sequence_length}: {cure}"]


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: str, cure: str) -> None:
    """Raise UserError unless the model has a row for every id; spare rows are harmless."""
    if config.vocab_size < tokenizer.vocab_size:
        entries = f"the tokenizer has {tokenizer.vocab_size} entries"
        raise UserError(f"{where}={config.vocab_size}, but {entries}; {cure}")

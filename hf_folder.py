"""The model folder that transformers opens as a stock Qwen3ForCausalLM, and the way back.

Parameters carry Hugging Face names already, so weights need no conversion; what is written here
is config.json and generation_config.json, and what is checked is that a folder from elsewhere
is an architecture that model.py computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import ModelConfig, Transformer
from tokenizer import Tokenizer
from trainlib.errors import UserError

ARCHITECTURE = "Qwen3ForCausalLM"


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


def load_config(folder: str | Path) -> ModelConfig:
    """The sizes of a model folder; raises UserError for another architecture or variant."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"init_from={folder}: no model folder there ({path} does not exist). "
            "Train the stage before it, or name a folder with config.json and model.safetensors."
        )
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = values.get("architectures") or ["none named"]
    if found[0] != ARCHITECTURE:
        raise UserError(f"{path}: architecture {found[0]}, but only {ARCHITECTURE} is supported")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for key, value, wanted in (
        ("attention_bias", values.get("attention_bias", False), False),
        ("hidden_act", values.get("hidden_act", "silu"), "silu"),
        ("use_sliding_window", values.get("use_sliding_window", False), False),
        ("rope type", rope.get("rope_type", "default"), "default"),
    ):
        if value != wanted:
            raise UserError(f"{path}: {key} is {value!r}, but only {wanted!r} is supported")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    return ModelConfig(**{key: values[key] for key in ModelConfig.__annotations__ if key in values})


def load_model(folder: str | Path) -> Transformer:
    """A model from a folder, in fp32.

    Raises UserError where the folder, its architecture or a tensor is not what is needed.
    """
    model = Transformer(load_config(folder))
    tensors = _read_tensors(Path(folder))
    head = tensors.get("lm_head.weight")
    if model.config.tie_word_embeddings and head is not None:
        if not torch.equal(head, tensors["model.embed_tokens.weight"]):
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
    if problems:
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(problems[:5])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raise UserError unless model and tokenizer have the same vocabulary."""
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{where}={config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} entries; "
            f"set model.vocab_size={tokenizer.vocab_size} or use the tokenizer of the checkpoint"
        )

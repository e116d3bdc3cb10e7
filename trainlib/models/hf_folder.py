"""Model folders and how to load them; transformers loads them as a stock Qwen3ForCausalLM.

Parameters already have Hugging Face names, so weights need no conversion. model_files returns the
other files; load_config checks that model.py implements a folder's architecture.
"""

import functools
import hashlib
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import ModelConfig, Transformer
from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError, as_user_errors
from trainlib.core.files import download_problem
from trainlib.core.parsing import value_text
from trainlib.core.settings import COMMAND_LINE, bound_errors, provenance, with_value

log = logging.getLogger(__name__)

ARCHITECTURE, CUSTOM = "Qwen3ForCausalLM", "CustomForCausalLM"
PROBE = ModelConfig(16, 8, 12, 2, 2, 1, 4, 16, rope_theta=100.0)
PROBE_LOGITS = [-0.699415, -0.270951, 0.27913, 0.703925, 0.812744, 0.556749, 0.05085, -0.477876]
"""What transformers computes for the first ids after the last position; see architecture()."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Defaults of transformers' Qwen3Config for keys missing in config.json. Dimensions have none.
DEFAULTS: dict[str, Any] = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6,
                            "tie_word_embeddings": False, "initializer_range": 0.02}  # fmt: skip
SUPPORTED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}
"""What model.py implements; also the defaults."""
MAX_CONFIG_BYTES = 1 << 20
MAX_PARAMETERS, MAX_LAYERS = 10**10, 1000
"""Limits for a model folder, checked before the model is built; a layer takes a millisecond."""
RANDOM_INIT = ("normal_", "uniform_", "kaiming_uniform_")


@functools.cache
def architecture() -> str:
    """Return the architecture that config.json names: CUSTOM if model.py no longer computes Qwen3.

    The logits of a tiny model with fixed weights are compared with those of transformers.
    """
    try:
        with torch.device("meta"), SkipRandomInit():
            model = Transformer(PROBE).eval()
        weights = {
            name: torch.arange(p.numel()).add(i).mul(0.7).sin().add("norm" in name).view(p.shape)
            for i, (name, p) in enumerate(model.named_parameters())
        }
        model.load_state_dict(weights, strict=False, assign=True)
        model.lm_head.weight = model.model.embed_tokens.weight
        with torch.no_grad():
            logits = model(torch.arange(12).view(1, -1))[0, -1, : len(PROBE_LOGITS)]
        if torch.allclose(logits, torch.tensor(PROBE_LOGITS), rtol=1e-3, atol=2e-5):
            return ARCHITECTURE
    except Exception as error:  # noqa: BLE001  # An edited model can fail here in many ways.
        log.info("the model.py of this run cannot compute the test of Qwen3 (%s)", error)
    log.warning("model.py does not compute what Qwen3 computes, so config.json names %s. "
                "Only this model.py can run such a model.", CUSTOM)  # fmt: skip
    return CUSTOM


def model_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files of a model folder except the weights: file name to content."""
    end_of_turn, pad = tokenizer.stop_ids
    values = {
        "architectures": [architecture()],
        # Programs that would compute Qwen3 must not find their own name.
        "model_type": "qwen3" if architecture() == ARCHITECTURE else "custom",
        **asdict(config),  # Includes head_dim, for which transformers would assume 128.
        **SUPPORTED, "attention_dropout": 0.0,
        "bos_token_id": None, "eos_token_id": end_of_turn, "pad_token_id": pad,
        # transformers 5 reads rope_parameters, other programs rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": "float32", "use_cache": True,
    }  # fmt: skip
    generation = {"eos_token_id": [end_of_turn, pad], "pad_token_id": pad}
    return {"config.json": json.dumps(values, indent=2) + "\n",
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
            **tokenizer.files(config.max_position_embeddings)}  # fmt: skip


def load_config(folder: str | Path, option: str = "init_from=") -> ModelConfig:
    """Read a folder's model config; raise UserError, with `option`, unless model.py supports it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        hint = "Train the stage before this one (train.py is the first), or pass a model folder."
        if (Path(folder) / "final/config.json").is_file():
            hint = f"Did you mean {option}{Path(folder) / 'final'}?"
        raise UserError(f"{option}{folder}: no model found ({path} does not exist). {hint}")
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {size:,} bytes; the limit is {MAX_CONFIG_BYTES:,}. Replace it "
                        "by the config.json of the model.")  # fmt: skip
    values = {**DEFAULTS, **_read_json(path)}
    names = values.get("architectures") or ["missing"]
    if names[0] != ARCHITECTURE and names[0] != architecture():
        edited = " It was trained with an edited model.py: use that one." * (names[0] == CUSTOM)
        text = f"architecture {names[0]}, but only {ARCHITECTURE} is supported.{edited}"
        raise UserError(f"{path}: {text}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    values["rope type"] = rope.get("rope_type", rope.get("type", "default"))  # Formerly "type".
    for key, supported in {**SUPPORTED, "rope type": "default"}.items():
        if (value := values.get(key, supported)) != supported:
            raise UserError(f"{path}: {key} is {value!r}, but only {supported!r} is supported")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    for key, type_ in ModelConfig.__annotations__.items():
        if key not in values:
            raise UserError(f"{path}: {key} is missing")
        types = {"int": (int,), "float": (int, float), "bool": (bool,)}[type_]
        if type(values[key]) not in types:
            raise UserError(f"{path}: {key} is {values[key]!r}, but must be of type {type_}")
    config = ModelConfig(**{key: values[key] for key in ModelConfig.__annotations__})
    if errors := bound_errors(config, "model.") + config.validation_errors():
        raise UserError(f"{path}: {'; '.join(errors)}")
    for number, limit, name in ((num_parameters(config), MAX_PARAMETERS, "parameters"),
                                (config.num_hidden_layers, MAX_LAYERS, "layers")):  # fmt: skip
        if number > limit:
            raise UserError(f"{path} describes a model of {number:,} {name}; the limit is "
                            f"{limit:,}. Correct its sizes, or pass a smaller model.")  # fmt: skip
    return config


def num_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model, by a formula over its dimensions."""
    d, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * d * heads * config.head_dim + 2 * config.head_dim
    layer = attention + 3 * d * config.intermediate_size + 2 * d
    matrices = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + matrices * config.vocab_size * d + d


def adopt_model_config(config: Any) -> Any:
    """Replace the model config with the one in the init_from checkpoint.

    Warns about differing values in a config file. Raises UserError for those on the command line.
    """
    sizes, sources = asdict(load_config(config.init_from)), provenance(config)
    given = asdict(config.model)
    differing = {
        f"model.{key}={value_text(given[key])} ({source}), {value_text(size)} in the model": source
        for key, size in sizes.items()
        if (source := sources[f"model.{key}"]) != "default" and given[key] != size
    }
    lines = "".join(f"\n  {text}" for text in differing)
    text = f"init_from={config.init_from}: these settings differ from the model's config:{lines}"
    if COMMAND_LINE in differing.values():
        raise UserError(f"{text}\nRemove these keys, or train a new model without init_from.")
    if differing:
        log.warning("%s\nThe model's config is used.", text)
    for key, size in sizes.items():
        config = with_value(config, f"model.{key}", size, "from init_from")
    return config


class SkipRandomInit(TorchFunctionMode):
    """Mode in which random initialization leaves tensors unchanged.

    On a meta tensor, normal_ would import torch's compiler, which takes 1.1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Any = None) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func.__name__ in RANDOM_INIT:
            return args[0] if args else kwargs["tensor"]  # torch.nn.init passes only keywords.
        return func(*args, **kwargs)


def load_model(folder: str | Path, option: str = "init_from=") -> Transformer:
    """Load a model in fp32 on the CPU; raise UserError if it does not match its config.json."""
    config = load_config(folder, option)
    with torch.device("meta"), SkipRandomInit():  # Loaded weights replace initial ones.
        model = Transformer(config)
    tensors = _read_tensors(Path(folder))
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
            raise UserError(f"{folder}: embeddings are tied, but lm_head.weight differs from them")
    parameters = dict(model.named_parameters())
    errors = [f"{name} is missing" for name in parameters if name not in tensors]
    for name, t in tensors.items():
        if name not in parameters:
            errors.append(f"{name} is unexpected")
        elif t.shape != (shape := parameters[name].shape):
            errors.append(f"{name} has shape {tuple(t.shape)}, not {tuple(shape)}")
        if t.dtype not in FLOATS:
            errors.append(f"{name} is {t.dtype}, not a float")
    if errors:
        raise UserError(f"{folder} does not match its config.json: {'; '.join(errors[:5])}")
    # Copied, because load_file maps the file, which may be replaced while the model is in use.
    weights = {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}
    if names := not_finite(weights):
        raise UserError(f"{folder}: {', '.join(names[:5])} has values that are not finite numbers")
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors with NaN or infinite values."""
    floats = {n: t.detach() for n, t in tensors.items() if t.is_floating_point() and t.numel()}
    largest = torch._foreach_norm(list(floats.values()), math.inf) if floats else ()  # pyright: ignore
    return [name for name, norm in zip(floats, largest, strict=True) if not math.isfinite(norm)]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names, tensors = ["model.safetensors"], dict[str, Tensor]()
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name}, which is outside {index.parent}")
        _check_regular(folder / name)
        try:
            tensors.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            path = folder / name
            problem = download_problem(path) if path.is_file() else ""
            raise UserError(f"{path} {problem or f'cannot be read: {error}'}") from error
    return tensors


def weights_digest(folder: str | Path) -> str:
    """Return a digest of the weights in a model folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(folder).glob("*.safetensors")):
        _check_regular(path)
        digest.update(np.memmap(path, mode="r").data)
    return digest.hexdigest()


def _check_regular(path: Path) -> None:
    """Raise UserError for a pipe, device or folder, which cannot be read as weights."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file. Replace it by the weights of the model.")


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise UserError if the file contains anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = download_problem(path) or f"cannot be read: {error}. Replace the file"
        raise UserError(f"{path} {problem}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} contains a {type(values).__name__} instead of an object")
    return values


def load_tokenizer(folder: str | Path, sequence_length: int = 0) -> Tokenizer:
    """Load the tokenizer from a model folder.

    Raises UserError if the model lacks an embedding for some id, or supports only shorter
    sequences. This is checked before tokenization, which may take hours.
    """
    config, path = load_config(folder), Path(folder) / "config.json"
    with as_user_errors():
        tokenizer = Tokenizer(folder)
    fix = "copy the model's own tokenizer.json to its folder"
    check_vocabulary(config, tokenizer, f"{path}: vocab_size", fix)
    where = f"{path}: max_position_embeddings"
    for error in too_long(sequence_length, config.max_position_embeddings, where):
        raise UserError(error)
    return tokenizer


def too_long(sequence_length: int, longest: int, where: str) -> list[str]:
    """Return an error message if rows have more positions than the model supports."""
    if sequence_length <= longest:
        return []
    fix = f"set at most {longest}, or train a model with larger max_position_embeddings"
    return [f"{where}={longest}, but sequence_length={sequence_length}: {fix}"]


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: str, fix: str) -> None:
    """Raise UserError unless the model has an embedding for every id; extra ones are allowed."""
    if config.vocab_size < tokenizer.vocab_size:
        entries = f"the tokenizer has {tokenizer.vocab_size} entries"
        raise UserError(f"{where}={config.vocab_size}, but {entries}; {fix}")

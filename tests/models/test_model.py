"""Tests that the decoder equals Qwen3 to four digits, is causal and is correctly initialized."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import transformers

import model as model_module
from model import (
    ModelConfig,
    Transformer,
    attention_bias,
    count_parameters,
    rotary_angles,
    visible,
)
from trainlib.models.hf_folder import model_files

SIZES = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 x 16 is not 48: head_dim is independent of hidden_size.
    "max_position_embeddings": 512,
}


def random_model(**changes) -> Transformer:
    """Return a model with random weights, because initial zeros and ones would mask errors."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"rope_theta": 1e6}])
def test_logits_equal_transformers(changes, tmp_path, tokenizer):
    from safetensors.torch import save_file

    ours = random_model(**changes)
    for name, content in model_files(ours.config, tokenizer).items():
        (tmp_path / name).write_text(content)
    tensors = {name: p.detach() for name, p in ours.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert not any(info.values()), info
    ids = torch.randint(0, 200, (2, 400))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        # Positions restart as in a packed row: an offset would change the angles.
        positions, documents = torch.arange(400)[None] % 130, torch.arange(400)[None] // 130
        same = documents[0][:, None] == documents[0]
        bias = torch.where(same.tril(), 0.0, -torch.inf)[None, None]
        packed = ours(ids[:1], positions, documents)
        expected = theirs(ids[:1], position_ids=positions, attention_mask=bias).logits
        torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_only_past_inputs_of_the_same_document():
    """The output at t depends on all inputs of its document up to t, and on no others."""
    model = random_model()
    embeddings = []
    model.model.embed_tokens.register_forward_hook(
        lambda *args: embeddings.append(args[2].detach().requires_grad_()) or embeddings[-1]
    )
    ids = torch.randint(0, 200, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    model(ids, None, documents)[0, 8].sum().backward()
    reached = (embeddings[0].grad.abs().sum(-1)[0] > 0).tolist()
    assert reached == [False] * 5 + [True] * 4 + [False] * 3


def test_a_query_sees_its_own_document_up_to_itself():
    """Checks the example in visible's docstring, and one new query after four cached keys."""
    documents, positions = torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    mask = visible(positions, positions, documents, documents)[0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    new, one = torch.tensor([[3]]), torch.tensor([[1]])
    keys = torch.tensor([[0, 0, 1, 2, 3]]), torch.tensor([[0, 1, 1, 1, 1]])
    assert visible(new, keys[0], one, keys[1])[0].tolist() == [[False, True, True, True, True]]
    bias = attention_bias(new, keys[0], one, keys[1], torch.bfloat16)
    assert bias.dtype == torch.bfloat16
    assert bias[0, 0].tolist() == [[-torch.inf, 0, 0, 0, 0]]


def test_rotary_angles_are_frequency_times_position():
    cos, sin = rotary_angles(torch.tensor([[0, 3]]), 4, 100.0)
    assert cos[0, 0, 0].tolist() == [1, 1] and sin[0, 0, 0].tolist() == [0, 0]
    torch.testing.assert_close(sin[0, 0, 1], torch.tensor([3.0, 0.3]).sin())


def test_initial_weights_are_ones_zeros_or_normal():
    model = Transformer(ModelConfig(**SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "o_proj" in name or "down_proj" in name:
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name


def test_the_default_model_has_the_documented_number_of_parameters():
    config = ModelConfig()
    with torch.device("meta"):
        model = Transformer(config)
    assert count_parameters(model) == 26_879_488


def test_contradictory_dimensions_are_reported():
    (error,) = ModelConfig(head_dim=7).validation_errors()
    assert "model.head_dim=7 must be even" in error
    (error,) = ModelConfig(num_attention_heads=6, num_key_value_heads=4).validation_errors()
    assert "multiple of" in error
    assert ModelConfig().validation_errors() == []


def test_model_imports_only_torch():
    tree = ast.parse(Path(model_module.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert imported == {"__future__", "collections", "dataclasses", "typing", "torch"}

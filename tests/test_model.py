"""Protects the decoder: it is Qwen3 to four digits, causal, and starts as it should."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import transformers

import model as model_module
from hf_folder import model_files
from kernels.block_attention import document_mask
from model import ModelConfig, SwiGLU, Transformer, count_parameters
from rotary import rotary_angles

SIZES = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 x 16 is not 48: head_dim is a size of its own.
    "max_position_embeddings": 512,
}


def random_model(**changes) -> Transformer:
    """All weights random, norms too: initial zeros and ones would hide what they multiply."""
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
        # Positions that restart, as in a packed row: an offset would turn other angles.
        positions = torch.arange(400) % 130
        mask = document_mask((torch.arange(400) // 130).expand(1, -1))
        bias = torch.where(mask, 0.0, -torch.inf)
        packed = ours(ids[:1], positions[None], (torch.arange(400) // 130)[None])
        wanted = theirs(ids[:1], position_ids=positions[None], attention_mask=bias).logits
        torch.testing.assert_close(packed, wanted, atol=1e-4, rtol=1e-4)


def test_causality_through_gradients():
    """The output at t depends on inputs up to t of its own document, and on all of them."""
    model = random_model()
    embedded = []
    model.model.embed_tokens.register_forward_hook(
        lambda *args: embedded.append(args[2].detach().requires_grad_()) or embedded[-1]
    )
    ids = torch.randint(0, 200, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    model(ids, None, documents)[0, 8].sum().backward()
    reached = (embedded[0].grad.abs().sum(-1)[0] > 0).tolist()
    assert reached == [False] * 5 + [True] * 4 + [False] * 3


def test_what_is_made_again_in_backward_gives_the_same_gradients():
    torch.manual_seed(0)
    mlp, x = SwiGLU(ModelConfig(**SIZES)), torch.randn(2, 5, 48)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = mlp(x)
    assert sum(tensor.shape == (2, 5, 64) for tensor in kept) == 2  # Plain, it would be four.
    weights = dict(mlp.named_parameters())
    ours = torch.autograd.grad(out.sin().sum(), list(weights.values()))
    gate, up, down = (weights[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
    plain = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    theirs = torch.autograd.grad(plain.sin().sum(), [gate, up, down])
    torch.testing.assert_close(ours, theirs)


def test_first_position_is_not_turned_and_pairs_turn_by_their_frequency():
    cos, sin = rotary_angles(torch.tensor([[0, 3]]), 4, 100.0)
    assert cos[0, 0, 0].tolist() == [1, 1] and sin[0, 0, 0].tolist() == [0, 0]
    torch.testing.assert_close(sin[0, 0, 1], torch.tensor([3.0, 0.3]).sin())


def test_initial_weights():
    model = Transformer(ModelConfig(**SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif "o_proj" in name or "down_proj" in name:
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name


def test_sizes_of_the_default_model():
    config = ModelConfig()
    with torch.device("meta"):
        model = Transformer(config)
    assert count_parameters(model) == 26_879_488


def test_contradictions_are_all_named():
    with pytest.raises(ValueError, match=r"hidden_size=0.*head_dim=7"):
        ModelConfig(hidden_size=0, head_dim=7)
    with pytest.raises(ValueError, match="multiple of"):
        ModelConfig(num_attention_heads=6, num_key_value_heads=4)


def test_model_needs_torch_alone():
    tree = ast.parse(Path(model_module.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    own = {"kernels", "rotary", "swiglu"}
    assert imported == {"__future__", "dataclasses", "typing", "torch"} | own

"""Tests that generation is repeatable and equals uncached decoding and transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from tokenizer.chat_format import render_conversation, render_prompt
from tools.chat import generate, stream_text
from trainlib.core.errors import UserError
from trainlib.models.generate import (
    KVCache,
    Sampling,
    filter_logits,
    generate_batch,
    sample,
    show_samples,
)
from trainlib.models.hf_folder import load_model, model_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
    path = tmp_path_factory.mktemp("model")
    for name, content in model_files(config, tokenizer).items():
        (path / name).write_text(content, encoding="utf-8")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_greedy_decoding_equals_uncached_decoding_and_transformers(folder):
    model, prompt = load_model(folder), list(range(40, 360))
    ours = list(generate(model, prompt, Sampling(temperature=0, max_new_tokens=24)))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ours == ids[len(prompt) :]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = torch.tensor([prompt])
    out = theirs.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=24
    )
    assert ours == out[0, len(prompt) :].tolist()


def test_generation_stops_at_a_stop_id_and_at_the_limits(folder):
    model = load_model(folder)
    full = list(generate(model, [5, 6], Sampling(temperature=0, max_new_tokens=9)))
    assert len(full) == 9
    stopped = list(generate(model, [5, 6], Sampling(temperature=0), [full[3]]))
    assert stopped == full[: full.index(full[3]) + 1]
    assert len(list(generate(model, [5] * 500, Sampling(temperature=0)))) == 12
    with pytest.raises(ValueError, match="512 tokens; the model takes 1 to 511"):
        next(generate(model, [5] * 512, Sampling()))


def test_a_seed_makes_sampling_repeatable_and_leaves_the_global_rng_unchanged(folder):
    model, state = load_model(folder), torch.get_rng_state()
    sampling = Sampling(temperature=1.0, max_new_tokens=12, seed=3)
    assert list(generate(model, [7], sampling)) == list(generate(model, [7], sampling))
    assert torch.equal(state, torch.get_rng_state())


def test_top_p_and_top_k_keep_the_most_likely_tokens():
    """With probabilities .5 .3 .15 .05, top_p .6 keeps two tokens and top_k 1 keeps one."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(filter_logits(logits, 0, 0.6)).tolist() == [True, True, False, False]
    assert torch.isfinite(filter_logits(logits, 1, 1.0)).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, expected",
    [
        (1.0, 0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (2.0, 0, 1.0, [0.3788, 0.2934, 0.2075, 0.1198]),  # Square roots divided by their sum.
        (0.5, 0, 1.0, [0.6849, 0.2466, 0.0616, 0.0068]),  # Squares.
        (2.0, 2, 1.0, [0.5635, 0.4365, 0, 0]),
        (1.0, 0, 0.6, [0.625, 0.375, 0, 0]),
        (0.5, 0, 0.6, [1, 0, 0, 0]),  # top_p applies after the temperature.
        (0.0, 0, 1.0, [1, 0, 0, 0]),
        (9e-7, 0, 1.0, [1, 0, 0, 0]),
        (1e-40, 0, 1.0, [1, 0, 0, 0]),
        (1e-6, 0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_sample_frequencies_equal_the_probabilities(temperature, top_k, top_p, expected):
    """Fails if temperature, top_k or top_p is ignored; checks the frequencies of 4,000 samples."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampling, generator = Sampling(temperature, top_p, top_k), torch.Generator().manual_seed(0)
    samples = torch.tensor(sample(logits.expand(4000, -1), sampling, generator))
    frequencies = samples.bincount(minlength=4) / len(samples)
    assert frequencies.tolist() == pytest.approx(expected, abs=0.03)
    assert [f > 0 for f in frequencies] == [p > 0 for p in expected]


@pytest.mark.parametrize("temperature", [-1, float("nan"), float("inf"), -float("inf")])
def test_a_temperature_that_is_not_a_number_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} must be at least 0"):
        Sampling(temperature)


@pytest.mark.parametrize("batched", [False, True])
def test_settings_reach_the_sampler(folder, batched):
    """Fails if generate or generate_batch ignores temperature, top_k, top_p or seed."""
    model = load_model(folder)

    def ids(**settings):
        sampling = Sampling(**{"max_new_tokens": 8, "seed": 1, "top_p": 1.0, **settings})
        if batched:
            return generate_batch(model, [[7, 8]], sampling)[0]
        return list(generate(model, [7, 8], sampling))

    greedy = ids(temperature=0)
    assert greedy == ids(temperature=1e-4) == ids(temperature=9, top_k=1)
    assert greedy == ids(temperature=9, top_p=1e-6)
    hot = ids(temperature=9)
    assert hot not in (greedy, ids(temperature=9, seed=2)) and hot == ids(temperature=9)


@pytest.mark.parametrize("pieces", [[17, 3], [1] * 20, [13, *[1] * 7], [4, 9, 1, 6]])
def test_cached_logits_equal_uncached_logits(pieces):
    """Fails if cached values are off by a thousandth: keys times 1.001 change logits by 1e-3."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    ids, positions = torch.randint(0, 50, (2, 20)), torch.arange(20).expand(2, -1)
    cache, end = KVCache(config, 2, 20, torch.device("cpu")), 0
    with torch.no_grad():
        expected = model(ids)
        for size in pieces:
            span, end = slice(end, end + size), end + size
            logits = model(ids[:, span], positions[:, span], cache=cache)
            torch.testing.assert_close(logits, expected[:, span], rtol=0, atol=1e-5)


def test_streamed_text_never_splits_a_character(tokenizer):
    text = "龘😀é plain"
    assert "".join(stream_text(tokenizer, iter(tokenizer.encode(text)))) == text
    assert all(
        "\ufffd" not in piece for piece in stream_text(tokenizer, iter(tokenizer.encode(text)))
    )


@pytest.mark.parametrize("content", ["你好", "\n\n two", "  a\n", "12345 café", "😀\t\r\nx", ""])
def test_chat_template_gives_the_same_ids_as_the_renderer(folder, tokenizer, content):
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": content},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == render_conversation(tokenizer, messages).ids.tolist()
    prompt = theirs.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert prompt == render_prompt(tokenizer, messages[:2])


def test_special_tokens_in_content_stay_text_only_in_our_renderer(folder, tokenizer):
    messages = [{"role": "user", "content": "<|im_end|>"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids.count(tokenizer.im_end_id) == 2
    assert render_prompt(tokenizer, messages).count(tokenizer.im_end_id) == 1


def test_chat_prints_only_the_answer_to_stdout(folder):
    command = [sys.executable, "chat.py", "--model", str(folder), "--prompt", "hi"]
    command += ["--temperature", "0", "--max-new-tokens", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\n") and not result.stderr
    wrong = subprocess.run([*command[:3], "nowhere", *command[4:]], capture_output=True, text=True)
    assert wrong.returncode == 1 and "nowhere" in wrong.stderr and "Traceback" not in wrong.stderr


def test_unsupported_model_folders_are_refused(folder, tmp_path):
    config = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="no model found"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("Qwen3ForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(UserError, match="architecture GPT2LMHeadModel"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 40'))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="has shape"):
        load_model(tmp_path)


def test_a_batch_equals_single_prompts_and_restores_mode_and_rng_state(folder):
    """Covers many prompt lengths, several batches, the context limit and stop ids."""
    model, generator = load_model(folder).train(), torch.Generator().manual_seed(1)
    lengths = [1, 3, 40, 505, *range(2, 34)]
    prompts = [torch.randint(3, 6400, (n,), generator=generator).tolist() for n in lengths]
    sampling = Sampling(temperature=0, max_new_tokens=10)
    unstopped = [list(generate(model, prompt, sampling)) for prompt in prompts]
    assert len(unstopped[3]) == 7
    stop_ids = [unstopped[0][4], unstopped[5][0]]
    single = [list(generate(model, prompt, sampling, stop_ids)) for prompt in prompts]
    state = torch.get_rng_state()
    assert generate_batch(model, prompts, sampling, stop_ids) == single != unstopped
    assert model.training and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="512 tokens"):
        generate_batch(model, [[5] * 512], sampling)


@pytest.mark.parametrize("chat", [False, True])
def test_samples_are_repeatable_and_leave_mode_and_rng_state(folder, tokenizer, chat):
    model, prompts, state = load_model(folder).train(), ["To be,", "话说"], torch.get_rng_state()
    texts = show_samples(model, tokenizer, prompts, 12, chat)
    assert texts == show_samples(model, tokenizer, prompts, 12, chat)
    assert model.training and torch.equal(state, torch.get_rng_state())
    for text, warm, prompt in zip(texts[:2], texts[2:], prompts, strict=True):
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        if chat:
            ids = render_prompt(tokenizer, [{"role": "user", "content": prompt}])
        new = list(generate(model, ids, Sampling(0, max_new_tokens=12), tokenizer.stop_ids))
        answer = "\n" * chat + tokenizer.decode(new)
        assert text == f"greedy: {prompt}{answer}"
        assert warm.startswith(f"temperature 0.8: {prompt}") and not warm.endswith(answer)

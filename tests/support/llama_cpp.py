"""llama.cpp as the reference for token ids: the smallest model with a given vocabulary, served."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import numpy as np
import xllamacpp

from tokenizer.bpe import Tokenizer, chat_template


class LlamaCpp:
    """A llama.cpp server in this process, with the vocabulary of a tokenizer.

    `pre` is llama.cpp's name of the pre-tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, pre: str, path: Path) -> None:
        _write_model(tokenizer, pre, path)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.port, parameters.n_ctx, parameters.n_parallel = 0, 64, 1
        parameters.verbosity = 0
        parameters.warmup = parameters.fit_params = False
        parameters.cpuparams.n_threads = parameters.n_threads_http = 1
        parameters.use_jinja, parameters.chat_template = True, chat_template()
        self._server = xllamacpp.Server(parameters)
        address = urlsplit(self._server.listening_address)
        assert address.hostname and address.port
        self._connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def encode(self, text: str) -> list[int]:
        """Return llama.cpp's ids of a text; special tokens in it are encoded as text."""
        values = {"content": text, "add_special": False, "parse_special": False}
        return self._post("/tokenize", values)["tokens"]

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], **variables: Any
    ) -> str:
        """Return the prompt that llama.cpp renders with our chat template and its variables."""
        messages = [dict(message) for message in messages]
        for message in messages:
            message["tool_calls"] = [
                {"type": "function", "id": "1", "function": {
                    **call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for call in message.get("tool_calls", [])
            ]  # fmt: skip
            if not message["tool_calls"]:
                del message["tool_calls"]
            if message["role"] == "tool":
                message["tool_call_id"] = "1"
        functions = [{"type": "function", "function": tool} for tool in tools]
        values = {"messages": messages, "chat_template_kwargs": variables}
        values |= {"tools": functions} if tools else {}
        return self._post("/apply-template", values)["prompt"]

    def _post(self, path: str, values: dict[str, Any]) -> dict[str, Any]:
        body, headers = json.dumps(values), {"Content-Type": "application/json"}
        self._connection.request("POST", path, body, headers)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer


def _write_model(tokenizer: Tokenizer, pre: str, path: Path) -> None:
    """Write a GGUF file with one layer of zeros; its vocabulary is complete."""
    model = json.loads(tokenizer.json)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[id_ in tokenizer.special_ids] for id_ in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.im_end_id)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    vectors = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in matrices}
    shapes |= {f"blk.0.{name}": (32,) for name in vectors}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

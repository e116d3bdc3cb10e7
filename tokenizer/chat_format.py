"""Messages to ids and loss mask, in one pass: the one renderer of training, chat and serving.

ChatML. Under the loss (underlined) are the assistant's words and the end of the turn:

    <|im_start|>user\\n你好<|im_end|>\\n<|im_start|>assistant\\n您好<|im_end|>\\n
                                                              ----__________

A message is a dict with "role" (system, user or assistant) and "content" (text). No system
message is added that is not there. The words after "assistant" and a newline are encoded apart
from it, which gives the same ids as both at once: the pieces in train_tokenizer.py see to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC

from tokenizer import Sequence, Tokenizer

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")

# Renders the same text as render_conversation. Where content spells out a special token the two
# differ on purpose: transformers parses it as the token, the renderer keeps it text.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def render_conversation(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> Sequence:
    """Ids of a whole conversation; every assistant turn and its end are under the loss."""
    ids: list[int] = []
    mask: list[bool] = []

    def add(piece: list[int], supervised: bool) -> None:
        ids.extend(piece)
        mask.extend([supervised] * len(piece))

    for message in messages:
        answer = message["role"] == "assistant"
        add(_open_turn(tokenizer, message["role"]), False)
        add(tokenizer.encode(message["content"]), answer)
        add([tokenizer.im_end_id], answer)
        add(tokenizer.encode("\n"), False)
    return Sequence(ids, mask)


def render_prompt(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> list[int]:
    """Ids of a conversation so far, with the assistant's turn opened."""
    return render_conversation(tokenizer, messages).ids + _open_turn(tokenizer, "assistant")


def _open_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]

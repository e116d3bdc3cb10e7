"""Encoders for the three stages: a record to ids and loss mask, in one pass."""

from array import array
from collections.abc import Callable

from tokenizer.bpe import Sequence, Tokenizer
from tokenizer.chat_format import render_conversation
from trainlib.data import formats


def encode_document(tokenizer: Tokenizer, record: formats.Record) -> list[Sequence]:
    """Encode a text between two end-of-text ids; all ids but the first are supervised."""
    ids = array(tokenizer.typecode, [tokenizer.end_of_text_id])
    ids += tokenizer.encode_array(record.value)
    ids.append(tokenizer.end_of_text_id)
    return [Sequence(ids, b"\0" + b"\1" * (len(ids) - 1))]


def encode_conversation(tokenizer: Tokenizer, record: formats.Record) -> list[Sequence]:
    """Encode a conversation in ChatML; assistant turns and their end tokens are supervised."""
    return [render_conversation(tokenizer, record.value)]


def encode_preference(tokenizer: Tokenizer, record: formats.Record) -> list[Sequence]:
    """Encode the chosen and the rejected conversation; answers in the prompt have weight 0."""
    return [render_conversation(tokenizer, conversation) for conversation in record.value]


ENCODERS: dict[str, Callable[[Tokenizer, formats.Record], list[Sequence]]] = {
    "pretrain": encode_document,
    "sft": encode_conversation,
    "dpo": encode_preference,
}

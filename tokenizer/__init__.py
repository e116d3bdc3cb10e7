"""Tokenizer: text to ids and back (bpe.py), messages to ids and loss mask (chat_format.py)."""

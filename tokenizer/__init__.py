"""Text to ids and back: bpe.py; messages to ids and a loss mask: chat_format.py."""

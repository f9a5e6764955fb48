"""Tokenizers: one interface over SentencePiece and Hugging Face, and their export."""

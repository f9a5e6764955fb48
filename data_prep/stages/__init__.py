"""Stages of preparation, in order: scan, duplicates, tokenizer, encoding, writing, publishing."""

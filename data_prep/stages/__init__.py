"""Stages of preparation, in order: scan, duplicates, tokenizer, encode, write shards and manifest, publish."""

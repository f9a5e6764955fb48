"""Tokenizer stage: train a tokenizer on a sample of the documents or copy a given one, and export it for transformers."""

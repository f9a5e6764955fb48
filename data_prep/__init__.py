"""Preparation of training data: raw text in, a tokenizer and token shards out."""

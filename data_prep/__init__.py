"""Raw text in, tokenizer and token shards out."""

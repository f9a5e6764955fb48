"""Token shards on disk: Megatron's .bin and .idx files, their manifest, hashes and verification."""

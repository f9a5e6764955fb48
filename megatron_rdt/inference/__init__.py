"""Using a trained model: load it, generate with a cache."""

from megatron_rdt.inference.cache import KVCache
from megatron_rdt.inference.generate import generate, generate_text
from megatron_rdt.inference.load import load

__all__ = ["KVCache", "generate", "generate_text", "load"]

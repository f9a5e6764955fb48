"""Using a trained model: load it, generate with a cache."""

from megatron_rdt.inference.generate import generate, generate_text
from megatron_rdt.inference.load import load
from megatron_rdt.model.cache import KVCache
from megatron_rdt.model.exits import ExitRule, ExitTrace

__all__ = ["ExitRule", "ExitTrace", "KVCache", "generate", "generate_text", "load"]

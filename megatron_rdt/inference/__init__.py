"""Using a trained model: loading it, generating with a KV cache, exit rules that stop tokens before T iterations."""

from megatron_rdt.inference.generate import GenerationTrace, generate, stream
from megatron_rdt.inference.load import load
from megatron_rdt.inference.text import generate_text, generate_texts, stream_text
from megatron_rdt.model.attention.kv_cache import KVCache
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace, check_rule_can_act, read_exit_options

__all__ = [
    "ExitRule",
    "ExitTrace",
    "GenerationTrace",
    "KVCache",
    "check_rule_can_act",
    "generate",
    "generate_text",
    "generate_texts",
    "load",
    "read_exit_options",
    "stream",
    "stream_text",
]

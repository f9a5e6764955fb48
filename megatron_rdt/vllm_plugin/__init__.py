"""Plugin for vLLM, which finds it by an entry point of this project: exports load in vLLM without code of their own.

`vllm_model` is the only file here that imports vLLM.
"""

ARCHITECTURE = "RdtForCausalLM"  # in an export's config.json


def register() -> None:
    """Make exports known to vLLM and their config to transformers; vLLM calls this in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from megatron_rdt.convert.hf_config import RdtConfig

    AutoConfig.register(RdtConfig.model_type, RdtConfig, exist_ok=True)
    # By its name, since vLLM's processes are to import the class themselves.
    ModelRegistry.register_model(ARCHITECTURE, "megatron_rdt.vllm_plugin.vllm_model:RdtForVllm")

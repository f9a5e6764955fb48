"""Refusal, with a sentence, of the models and settings that the plugin does not serve."""

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.parallel_checks import inner_widths
from megatron_rdt.convert.hf_config import LoopSettings
from megatron_rdt.errors import ConfigError
from megatron_rdt.model.forward_arguments import make_depth_plan


def check_supported(
    config: ModelConfig, settings: LoopSettings, tensor: int = 1, pipeline: int = 1, quantization: str | None = None
) -> None:
    """Refuse what the plugin does not compute.

    Args:
        config: of the model.
        settings: T, exit rule and cache budget of the engine.
        tensor: number of tensor-parallel processes.
        pipeline: number of pipeline-parallel processes.
        quantization: name of vLLM's method; None without one.

    Raises:
        ConfigError: it would be computed wrongly, or not at all.
        ValueError: T is no positive integer.
    """
    make_depth_plan(1, loops=settings.loops)
    if config.attention == "mla":
        raise ConfigError(
            "model.attention is mla, whose cache of latents the plugin does not keep. Use `rdt generate` or transformers."
        )
    if settings.exit != "fixed":
        raise ConfigError(
            f"exit is {settings.exit!r}, but in vLLM every token runs all loops. Pass hf_overrides={{'exit': 'fixed'}}, or use "
            "`rdt generate` or transformers."
        )
    if pipeline > 1:
        raise ConfigError(
            f"pipeline_parallel_size is {pipeline}, but the loop is in one place. Use tensor_parallel_size."
        )
    if quantization is not None:
        raise ConfigError(f"quantization is {quantization}, which the plugin does not apply. Omit it.")
    _check_split(config, tensor)


def _check_split(config: ModelConfig, tensor: int) -> None:
    """Refuse tensor parallelism over a number of processes that does not divide heads and channels."""
    heads = {"model.heads": config.heads, "model.kv_heads": config.kv_heads}
    for name, size in (heads | inner_widths(RunConfig(model=config))).items():
        if size % tensor:
            raise ConfigError(
                f"tensor_parallel_size is {tensor}, it must divide {name}, which is {size}. "
                "Choose a divisor, or tensor_parallel_size=1."
            )
    if tensor > 1 and config.qk_norm == "joint":
        raise ConfigError(
            "model.qk_norm: joint spans all heads, which one process must have. Use tensor_parallel_size=1."
        )

"""Check the settings that products of float8 matrices (`train.float8`) need."""

from collections.abc import Iterator

from megatron_rdt.config.model import ModelConfig
from megatron_rdt.config.schema import RunConfig

MULTIPLE = 16  # of every width of a float8 product


def find_float8_problems(config: RunConfig) -> Iterator[str]:
    """Find settings without which float8 products are not used or do not pay, and widths that they do not take."""
    train, ranks = config.train, config.parallel.tensor
    if train.float8 == "none":
        return
    if train.precision != "bfloat16":
        yield (
            f"train.float8 {train.float8} rounds what train.precision {train.precision} keeps exact. Set --train.precision "
            "bfloat16, or --train.float8 none."
        )
    if train.compile == "none":
        yield (
            f"train.float8 {train.float8} needs compiled layers: in kernels of its own, rounding takes longer than float8 "
            "products save. Set --train.compile layers, or --train.float8 none."
        )
    for name, width, is_split in _list_widths(config.model):
        multiple = MULTIPLE * (ranks if is_split else 1)
        if width % multiple:
            yield (
                f"train.float8 {train.float8} needs {name}, {width}, to be a multiple of {MULTIPLE}"
                f"{f' in each of {ranks} processes of parallel.tensor' if multiple > MULTIPLE else ''}. Change it, or set "
                "--train.float8 none."
            )


def _list_widths(model: ModelConfig) -> Iterator[tuple[str, int, bool]]:
    """Yield the widths of the matrices that multiply in float8; True if tensor parallelism splits it."""
    yield "model.dim", model.dim, False
    if model.attention == "mla":
        yield "model.heads * (nope_dim + rope_dim)", model.heads * (model.nope_dim + model.rope_dim), True
        yield "model.heads * (nope_dim + value_dim)", model.heads * (model.nope_dim + model.value_dim), True
        yield "model.heads * value_dim", model.heads * model.value_dim, True
        yield "model.kv_rank", model.kv_rank, False
        yield "model.kv_rank + rope_dim", model.kv_rank + model.rope_dim, False
        yield "model.query_rank", model.query_rank, False
    else:
        yield "model.heads * head_dim", model.heads * model.head_dim, True
        yield "model.kv_heads * head_dim", model.kv_heads * model.head_dim, True
    yield "the width of the feed-forward parts", model.ffn_width, True
    if model.core_ffn == "moe":
        yield "the width of all shared experts together", model.shared_width, True

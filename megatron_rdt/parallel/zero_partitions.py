"""Initial values of ZeRO-3: DeepSpeed cuts each flattened parameter into equal runs, and a rank fills its own run only."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from megatron_rdt.model import Block, InitialValues, RecurrentDepthTransformer


def split_run(whole: torch.Tensor, start: int, stop: int) -> Iterator[Block]:
    """Yield the rectangular blocks that make up elements `start` to `stop` of a contiguous tensor, flattened.

    These are at most 2 n - 1 blocks in n dimensions: whole rows, and the parts of a row before and after them.
    """
    if stop <= start:
        return
    if whole.dim() == 0:
        yield Block(whole, ())
        return
    row = math.prod(whole.shape[1:])
    first, last = -(-start // row), stop // row  # whole rows; first > last if the run lies inside one row
    if first < last:
        yield Block(whole[first:last], (first, *[0] * (whole.dim() - 1)))
    for begin, end in [(start, stop)] if first > last else [(start, first * row), (last * row, stop)]:
        if begin < end:
            index = begin // row
            for values, offsets in split_run(whole[index], begin - index * row, end - index * row):
                yield Block(values[None], (index, *offsets))


@torch.no_grad()
def initialize_partitions(
    model: RecurrentDepthTransformer, config: dict[str, Any], values: InitialValues, device: torch.device
) -> None:
    """Shard the parameters of a model on the meta device with DeepSpeed, and initialize this rank's part of each.

    DeepSpeed copies a rank's part out of a whole parameter. One at a time gets memory for that, in which only this rank's
    part is written; on a CPU the rest of it takes no physical memory.

    Args:
        model: on the meta device; its parameters are replaced.
        config: of DeepSpeed.
        values: of the parameters.
        device: for the whole parameters.
    """
    import deepspeed

    class Partitioner(deepspeed.zero.Init):
        """Converts parameters as `zero.Init` does, except that rank 0's values are not broadcast."""

        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.data = torch.empty(param.shape, dtype=param.dtype, device=device)
            cuts = [(self._partition_world_size(param), self._partition_rank(param))]
            if self.zero_param_process_group is not None:  # zero_hpz_partition_size: a second copy within each node
                cuts.append((self.num_ranks_in_param_group, self.rank_in_group))
            blocks: list[Block] = []
            for ranks, rank in cuts:
                run = self._aligned_size(param) // ranks
                blocks += split_run(param.data, rank * run, min((rank + 1) * run, param.numel()))
            values(names[param], param.shape, blocks)
            param.partition()

    names: dict[torch.nn.Parameter, str] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            # One element that stands for all: the shape without the memory, which a parameter of meta could not get later.
            placeholder = torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape)
            setattr(module, leaf, torch.nn.Parameter(placeholder))
            names[getattr(module, leaf)] = f"{prefix}.{leaf}"
    Partitioner(module=model, config_dict_or_path=config, dtype=torch.float32)

"""Layout: how the processes of a run are arranged, in which each has one place on every axis of sharding.

Ranks count the axes like digits, the last one fastest: replicate, shard, context, tensor. So processes that exchange
activations in every layer (tensor) are neighbours, and those that meet once per step (replicate) are far apart.
"""

from dataclasses import dataclass

from megatron_rdt.config.schema import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes.

    Attributes:
        replicate: groups that each hold the whole state.
        shard: processes of a group that have samples of their own.
        context: processes that share out the tokens of each sequence.
        tensor: processes that share out heads and channels.
        expert: neighbouring processes of a group that share out the experts; they lie across the other axes.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "Layout":
        """The layout of `world_size` processes; every axis but `shard` is configured.

        Raises:
            ValueError: the axes do not divide the processes; the message says how to mend it.
        """
        fixed = config.replicate * config.context * config.tensor
        named = f"parallel.replicate {config.replicate} x context {config.context} x tensor {config.tensor} = {fixed}"
        if world_size % fixed:
            near = -(-world_size // fixed) * fixed
            raise ValueError(
                f"{world_size} processes are not a multiple of {named}. Start {near}, or lower one of these."
            )
        shard = world_size // fixed
        group = world_size // config.replicate
        if group % config.expert:
            raise ValueError(
                f"parallel.expert {config.expert} does not divide the {group} processes of a replica ({world_size} "
                f"processes, {named}). Set it to a divisor of {group}."
            )
        return cls(config.replicate, shard, config.context, config.tensor, config.expert)

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Processes that have samples of their own."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which share of each batch `rank` takes, from 0 to data - 1."""
        return rank // (self.context * self.tensor)

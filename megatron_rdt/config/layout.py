"""Layout: the arrangement of a run's processes along the axes of sharding.

A rank is a number whose digits are the process's indices along replicate, shard, context and tensor, the last one
fastest. So processes that exchange activations in every layer (tensor) are neighbours, on one node, and processes that
exchange gradients once per step (replicate) are far apart.
"""

from dataclasses import dataclass

from megatron_rdt.config.schema import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of sharding.

    Attributes:
        replicate: groups of processes that each hold the whole state.
        shard: data-parallel ranks of such a group.
        context: processes that split the tokens of each sequence between them.
        tensor: processes that split heads and channels between them.
        expert: processes that split the experts between them: neighbours within a group, whatever their indices along
            the other axes.
        ring: stages of the loop ring, each held by shard / ring consecutive ones of the data-parallel ranks of a group.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    ring: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "Layout":
        """Arrange `world_size` processes along the configured axes; what remains is the size of `shard`.

        Raises:
            ValueError: the axes do not divide the processes; the message says how to fix it.
        """
        fixed = config.replicate * config.context * config.tensor
        named = f"parallel.replicate {config.replicate} x context {config.context} x tensor {config.tensor} = {fixed}"
        if world_size % fixed:
            near = -(-world_size // fixed) * fixed
            reason = f"{world_size} processes are not a multiple of {named}"
            raise ValueError(f"{reason}. Start {near}, or lower one of these.")
        group = world_size // config.replicate
        if group % config.expert:
            raise ValueError(
                f"parallel.expert {config.expert} does not divide the {group} processes of a replica ({world_size} "
                f"processes, {named}). Set it to a divisor of {group}."
            )
        shard = world_size // fixed
        if shard % config.core_ring:
            raise ValueError(
                f"parallel.core_ring {config.core_ring} does not divide the {shard} data-parallel processes of a replica "
                f"({world_size} processes, {named}). Set it to a divisor of {shard}."
            )
        return cls(config.replicate, shard, config.context, config.tensor, config.expert, config.core_ring)

    @property
    def world_size(self) -> int:
        """Number of all processes."""
        return self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Number of data-parallel ranks: groups of processes that read samples of their own."""
        return self.replicate * self.shard

    @property
    def stage_ranks(self) -> int:
        """Number of processes of a replica that hold the same stage of the loop ring, sharded between them."""
        return self.shard // self.ring

    def ring_data_ranks(self, data_rank: int) -> list[int]:
        """Return the data ranks that exchange states with this one in a loop ring, itself included, by stage."""
        replica, place = divmod(data_rank, self.shard)
        return [
            replica * self.shard + stage * self.stage_ranks + place % self.stage_ranks for stage in range(self.ring)
        ]

    def data_rank(self, rank: int) -> int:
        """Return the data rank of a process: the number, from 0, of the share of each batch that it reads."""
        return rank // (self.context * self.tensor)

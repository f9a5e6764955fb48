"""FSDP2 with the core's layers in a loop ring: each layer stays with the processes of one stage, and states travel.

Prelude, coda, embedding, head and whatever the core has besides its layers (injection, signals, norms) are sharded over
all processes, as without a ring. Checkpoints hold whole parameters by name, so they load with and without a ring.
See `ring_loop.py` and docs/loop_ring.md.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megatron_rdt.model import Block, InitialValues, RecurrentDepthTransformer
from megatron_rdt.parallel.fsdp import FullyShardedEngine
from megatron_rdt.parallel.process_group import limit_collectives
from megatron_rdt.parallel.ring_loop import RingLoop
from megatron_rdt.parallel.ring_schedule import assign_layers
from megatron_rdt.parallel.ring_stage import StageWeights


class RingEngine(FullyShardedEngine):
    """FSDP2, except that the core's layers are split among the stages of a ring.

    Tensor and context parallelism work in a stage as everywhere: the ranks of a ring have the same place along these axes,
    and the states that they exchange are those of their own tokens.

    Attributes:
        ring: this process's part of the ring.
        stage_mesh: the processes that hold this process's stage.
    """

    ring: RingLoop
    stage_mesh: DeviceMesh
    distinct_axes = frozenset({"ring"})

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        """Keep this stage's layers, shard everything, initialize the local shards and create the optimizers."""
        if values is None:
            super().setup(model)
            return
        # The stages have different parameters, but every rank has to ask for all of them, in one order.
        left = iter([(name, parameter.shape) for name, parameter in model.named_parameters()])

        def fill_until(wanted: str, shape: torch.Size, blocks: Sequence[Block]) -> None:
            for name, size in left:
                values(name, size, blocks if name == wanted else [])
                if name == wanted:
                    return
            raise KeyError(wanted)

        super().setup(model, fill_until)
        for name, size in left:
            values(name, size, [])

    def _apply_fsdp(self, model: RecurrentDepthTransformer) -> None:
        """Split the core's layers among the stages, and make FSDP2's units of everything else, in place."""
        layout = self.layout
        inside = layout.stage_ranks * layout.context
        ranks = torch.arange(layout.world_size).view(layout.replicate, layout.ring, inside, layout.tensor)
        # Tensor parallelism splits a parameter first, so its axis comes before that of the ranks that shard each part.
        axes = ("replicate", "ring", "tensor", "stage")
        mesh = DeviceMesh(self.device.type, ranks.transpose(2, 3), mesh_dim_names=axes)
        self.stage_mesh = mesh[
            tuple(name for name in axes if name == "stage" or (name != "ring" and mesh[name].size() > 1))
        ]
        group = mesh["ring"].get_group()
        limit_collectives(self.timeout_s)
        layers = assign_layers(self.config.model.core_layers, layout.ring)[group.rank()]
        weights = StageWeights(model, layers, self.stage_mesh, layout.data * layout.context)
        model.core.ring = self.ring = RingLoop(group, layers, weights)
        dist.barrier(group)  # NCCL wants one collective of the whole group before messages between two
        self._shard_units(model, (), set(weights.shards))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Run autograd; FSDP2 reduces the gradients of its units in hooks, those of the stage are reduced at the end."""
        super().backward(loss, last)
        if last or self.config.parallel.reduce == "per_micro_batch":
            self.ring.weights.reduce()

    def _total_norm(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the norm of the gradients of parameters of one mesh; those of the stages are combined."""
        norm = super()._total_norm(parameters)
        first = parameters[0]
        if isinstance(first, DTensor) and first.device_mesh == self.stage_mesh:
            squares = norm.square()
            dist.all_reduce(squares, group=self.ring.group)
            return squares.sqrt()
        return norm

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Gather the gradients of all stages by parameter name, unsharded, on the CPU."""
        every: list[dict[str, torch.Tensor]] = [{} for _ in range(self.layout.ring)]
        dist.all_gather_object(every, super().full_gradients(), group=self.ring.group)
        return {name: gradient for each in every for name, gradient in each.items()}

    def _collect_states_to_save(self) -> dict[str, dict]:
        """Leave out the buffers of other stages' layers: the ranks of each stage share out what is in its own."""
        states = super()._collect_states_to_save()
        layers = range(self.config.model.core_layers)
        absent = tuple(f"core.layers.{number}." for number in layers if number not in self.ring.layers)
        model = {name: value for name, value in states["model"].items() if not name.startswith(absent)}
        return states | {"model": model}

    def _configured_names(self) -> list[list[str]]:
        """Return the parameter names of each group of an unsharded run, those of other stages too."""
        with torch.device("meta"):
            return self._group_names(RecurrentDepthTransformer(self.config.model))

"""The layout of processes along the axes, and arrangements that are refused before any process starts."""

import dataclasses
import itertools
from typing import Any

import pytest

from megatron_rdt.config import (
    DepthConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    check_config,
)
from megatron_rdt.config.layout import Layout
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.run_plan import with_options

MODEL = ModelConfig(vocab_size=64, dim=32, heads=4, kv_heads=4)
MOE = dataclasses.replace(MODEL, core_ffn="moe", experts=4)


@pytest.mark.parametrize("sizes", itertools.product((1, 2), (1, 3), (1, 2), (1, 4)))
def test_ranks_count_the_axes_and_data_ranks_leave_out_the_inner_two(sizes: tuple[int, ...]) -> None:
    replicate, shard, context, tensor = sizes
    world = replicate * shard * context * tensor
    layout = Layout.of(ParallelConfig("fsdp", replicate=replicate, context=context, tensor=tensor), world)
    assert layout == Layout(replicate, shard, context, tensor)
    assert layout.world_size == world
    data_ranks = [layout.data_rank(rank) for rank in range(world)]
    assert data_ranks == [number for number in range(replicate * shard) for _ in range(context * tensor)]


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        ({"tensor": 3}, 4, r"4 processes are not a multiple of .* tensor 3 = 3. Start 6"),
        ({"replicate": 2, "context": 2, "tensor": 2}, 4, r"4 processes are not a multiple .* = 8. Start 8"),
        ({"expert": 3}, 4, r"parallel.expert 3 does not divide the 4 processes of a replica .* divisor of 4"),
        ({"expert": 4, "replicate": 2}, 4, r"parallel.expert 4 does not divide the 2 processes"),
        (
            {"core_ring": 4, "replicate": 2},
            4,
            r"core_ring 4 does not divide the 2 data-parallel processes .* divisor of 2",
        ),
    ],
)
def test_processes_that_cannot_be_arranged(parallel: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of(ParallelConfig("fsdp", **parallel), world)


def config(**sections: Any) -> RunConfig:
    return RunConfig(
        **{
            "model": MODEL,
            "depth": DepthConfig(per="step"),
            "train": TrainConfig(1000, global_batch=8, micro_batch=1, sequence_length=16),
        }
        | sections
    )


def fsdp(**options: Any) -> ParallelConfig:
    return ParallelConfig("fsdp", **options)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"parallel": fsdp(tensor=0)}, r"parallel.tensor is 0, it must be at least 1"),
    ({"parallel": ParallelConfig("ddp", tensor=2)}, r"parallel.tensor is 2, which only engine fsdp knows.* is ddp"),
    (
        {"parallel": ParallelConfig("zero3", core_gather="per_layer")},
        r"core_gather is per_layer, which only engine fsdp",
    ),
    (
        {"parallel": ParallelConfig("zero1", reduce="per_micro_batch")},
        r"parallel.reduce is for the engines ddp and fsdp",
    ),
    ({"parallel": fsdp(tensor=8)}, r"parallel.tensor 8 does not divide the model.heads, 4"),
    (
        {"parallel": fsdp(tensor=4), "model": dataclasses.replace(MODEL, kv_heads=2)},
        r"does not divide the model.kv_heads, 2",
    ),
    ({"parallel": fsdp(tensor=4), "model": dataclasses.replace(MODEL, vocab_size=66)}, r"the model.vocab_size, 66"),
    (
        {"parallel": fsdp(tensor=4), "model": dataclasses.replace(MODEL, ffn_dim=30)},
        r"inner width \(model.ffn_dim\), 30",
    ),
    (
        {"parallel": fsdp(tensor=4), "model": dataclasses.replace(MOE, expert_dim=6)},
        r"inner width \(model.expert_dim\), 6",
    ),
    (
        {"parallel": fsdp(tensor=4), "train": TrainConfig(1000, global_batch=8, micro_batch=1, sequence_length=18)},
        r"tokens of a process .*, 18",
    ),
    ({"parallel": fsdp(tensor=2), "optimizer": OptimizerConfig("muon")}, r"muon needs whole matrices, .*tensor 2"),
    (
        {"parallel": fsdp(context=2), "train": TrainConfig(1000, global_batch=8, micro_batch=1, sequence_length=18)},
        r"sequence_length 18 is not a multiple of 2 x .*context 2",
    ),
    ({"parallel": fsdp(expert=2)}, r"parallel.expert 2 needs a mixture of experts"),
    ({"parallel": fsdp(expert=3), "model": MOE}, r"parallel.expert 3 does not divide model.experts 4"),
    ({"parallel": fsdp(expert=2), "model": MOE, "optimizer": OptimizerConfig("muon")}, r"muon needs whole .*expert 2"),
    (
        {"parallel": fsdp(expert=2), "model": MOE, "depth": DepthConfig(per="sequence")},
        r"expert 2 .* Set --depth.per step",
    ),
    (
        {"parallel": fsdp(core_gather="per_layer"), "depth": DepthConfig(per="micro_batch")},
        r"core_gather per_layer .* step",
    ),
    (
        {"parallel": fsdp(core_gather="per_iteration"), "model": dataclasses.replace(MODEL, value_embeddings="gated")},
        r"value_embeddings has tables .*core_gather per_iteration",
    ),
    (
        {"parallel": fsdp(core_gather="per_layer"), "logging": LoggingConfig(jacobian_every=5)},
        r"jacobian_every .* Set it to 0",
    ),
    ({"parallel": fsdp(context=2), "logging": LoggingConfig(jacobian_every=5)}, r"jacobian_every .*context 2"),
    (
        {"parallel": fsdp(context=2, tensor=2), "sample": SampleConfig(every=5)},
        r"sample.every .*tensor 2 and .*context 2",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_sections_that_do_not_fit_are_refused_with_a_sentence(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config(**sections))
    check_config(config())


RING = dataclasses.replace(MODEL, core_layers=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.core_ring": 0}, r"parallel.core_ring is 0, it must be at least 1"),
        ({"parallel.engine": "ddp"}, r"parallel.core_ring is 2, which only engine fsdp knows"),
        ({"parallel.core_ring": 3}, r"parallel.core_ring 3 does not divide model.core_layers 4"),
        (
            {"parallel.core_gather": "per_layer"},
            r"core_gather per_layer does not work .*Set --parallel.core_gather once",
        ),
        (
            {"model.core_ffn": "moe", "parallel.expert": 2},
            r"parallel.expert 2 does not work with parallel.core_ring 2: .* on every process of it",
        ),
        ({"model.halting": "act"}, r"model.halting act does not work .*core_ring 1"),
        ({"optimizer.name": "muon"}, r"optimizer.name muon does not work"),
        ({"train.compile": "layers"}, r"train.compile layers does not work"),
        ({"logging.monitor_every": 5}, r"logging.monitor_every 5 does not work"),
        ({"logging.jacobian_every": 5}, r"logging.jacobian_every 5 does not work"),
        ({"sample.every": 5}, r"sample.every 5 does not work .*rdt generate"),
        ({"depth.checkpoint": 2}, r"depth.checkpoint 2 does not work .*per_iteration"),
        (
            {"depth.scheme": "difficulty", "depth.per": "sequence", "data.pack": "example"},
            r"depth.scheme difficulty does not work with parallel.core_ring 2",
        ),
    ],
)
def test_what_a_loop_ring_cannot_do_is_refused_with_a_sentence(changes: dict[str, Any], message: str) -> None:
    fitting = config(model=RING, parallel=fsdp(core_ring=2), depth=DepthConfig(per="sequence", checkpoint="selective"))
    check_config(fitting, 4)
    with pytest.raises(ConfigError, match=message):
        check_config(with_options(fitting, changes))


@pytest.mark.parametrize(("replicate", "shard", "ring"), [(1, 4, 4), (2, 4, 2), (2, 6, 3), (1, 2, 1)])
def test_a_ring_has_one_data_rank_of_each_stage(replicate: int, shard: int, ring: int) -> None:
    layout = Layout.of(ParallelConfig("fsdp", replicate=replicate, core_ring=ring), replicate * shard)
    rings = {tuple(layout.ring_data_ranks(rank)) for rank in range(layout.data)}
    assert sorted(rank for each in rings for rank in each) == list(range(layout.data))
    for each in rings:
        assert len(each) == ring
        assert [rank % shard // layout.stage_ranks for rank in each] == list(
            range(ring)
        )  # stages are consecutive ranks
        assert len({rank // shard for rank in each}) == 1


@pytest.mark.parametrize("axis", ["replicate", "context", "tensor", "expert"])
def test_an_axis_of_no_processes_is_refused_before_anything_is_divided_by_it(axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel.{axis} is 0, it must be at least 1"):
        check_config(config(parallel=fsdp(**{axis: 0}), model=MOE), 4)
    with pytest.raises(ConfigError, match=rf"(?s)train.micro_batch is 0, .*parallel.{axis} is -1"):
        check_config(
            config(
                parallel=fsdp(**{axis: -1}),
                model=MOE,
                train=TrainConfig(1000, global_batch=8, micro_batch=0, sequence_length=16),
            ),
            4,
        )


def test_no_experts_per_token_with_tensor_parallelism() -> None:
    model = dataclasses.replace(MOE, experts_per_token=0)
    with pytest.raises(ConfigError, match=r"model.experts_per_token 0 must be from 1 to model.experts 4"):
        check_config(config(parallel=fsdp(tensor=2), model=model))


def test_the_batch_divides_over_the_data_parallel_ranks() -> None:
    check_config(
        config(parallel=fsdp(tensor=4), train=TrainConfig(1000, global_batch=2, micro_batch=1, sequence_length=16)), 8
    )
    with pytest.raises(ConfigError, match=r"global_batch 3 .* 2 data-parallel ranks \(of 8\) x .*nearest: 2, 4"):
        check_config(
            config(parallel=fsdp(tensor=4), train=TrainConfig(1000, global_batch=3, micro_batch=1, sequence_length=16)),
            8,
        )

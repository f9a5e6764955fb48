"""Times of a step against hand computations: collectives, what they hide behind, kernels, and waiting for the deepest."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rdt.config import ModelConfig, RunConfig, TrainConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthSampler
from megatron_rdt.devices import DEVICES, Device, attained_rates
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.balance import LOAD_DEVIATION, STEPS, depth_balance, expert_load
from megatron_rdt.planner.collective_time import call_latency, collective_seconds, group_size
from megatron_rdt.planner.communication import EXCHANGE, GATHER, REDUCE, Collectives, step_communication
from megatron_rdt.planner.kernels import LAUNCH_SECONDS, StepKernels
from megatron_rdt.planner.memory import StepDepth
from megatron_rdt.planner.parameters import list_parameters
from megatron_rdt.planner.run_plan import make_plan
from megatron_rdt.planner.search import find_fastest_plan
from megatron_rdt.planner.step_time import step_time
from megatron_rdt.planner.timeline import Stage, elapsed_seconds

H100 = DEVICES["h100"]


def preset(repository: Path, name: str, **options: Any) -> RunConfig:
    train = {"sequence_length": 4096, "global_batch": 1024, "micro_batch": 1, "precision": "bfloat16"}
    options = {"train": train, "optimizer": {"name": "adamw"}, "parallel": {"engine": "fsdp"}, **options}
    return load_config(repository / "configs" / "models" / f"{name}.yaml", options)


def test_collectives_take_their_bytes_and_their_hops() -> None:
    device = Device("X", peak_flops=1e12, memory=1e9, intra_bandwidth=1e9, inter_bandwidth=1e8, per_node=4)
    layout = Layout(replicate=2, shard=4)
    assert group_size("state", layout, device) == (4, 4)
    assert group_size("replicate", layout, device) == (2, 1)
    assert group_size("world", layout, device) == (8, 4)
    inside = Collectives("forward", GATHER, "", 2, 8e8, "state", hidden=True)
    assert collective_seconds(inside, layout, device) == pytest.approx(8e8 * 3 / 4 / 1e9 + 2 * (10e-6 + 3 * 1.9e-6))
    between = Collectives("backward", REDUCE, "", 1, 2e8, "replicate")
    assert collective_seconds(between, layout, device) == pytest.approx(2 * 2e8 / 2 / 1e8 + 10e-6 + 2 * 4e-6)
    alone = Collectives("backward", REDUCE, "", 1, 2e8, "tensor")
    assert collective_seconds(alone, layout, device) == 0


def test_rings_are_slow_where_many_processes_take_part() -> None:
    # 2,048 nodes of 8: 14,336 hops inside nodes and 2,047 between; a tree has 11 levels of nodes and 7 hops inside.
    assert call_latency(GATHER, 16384, 8) == pytest.approx(10e-6 + 14336 * 1.9e-6 + 2047 * 4e-6)
    assert call_latency(REDUCE, 16384, 8) == pytest.approx(10e-6 + 2 * (7 * 1.2e-6 + 11 * 8.5e-6))


def test_exchanges_between_nodes_leave_through_one_port_each(repository: Path) -> None:
    config = preset(repository, "openmythos_10b", parallel={"engine": "fsdp", "expert": 128})
    config = replace(config, train=replace(config.train, sequence_length=8192, global_batch=512))
    layout = Layout.of(config.parallel, 512)
    # 24 iterations: rows and results forward, and their gradients backward. 8,192 tokens x 4 experts x 4,096 x 2 bytes;
    # 120 of 128 pieces leave the node.
    sent = [each for each in step_communication(config, layout, StepDepth(24, 24)) if each.axis == "expert"]
    moved = sum(collective_seconds(each, layout, H100) - each.calls * (10e-6 + 4e-6) for each in sent)
    counts = 24 * 128 * 8
    assert moved == pytest.approx((24 * 4 * 8192 * 4 * 4096 * 2 + counts) * 120 / 128 / 50e9, rel=1e-6)
    # Within a node NVLink carries them.
    near = replace(layout, expert=8)
    one = Collectives("forward", EXCHANGE, "", 1, 8e9, "expert")
    assert collective_seconds(one, near, H100) == pytest.approx(8e9 * 7 / 8 / 450e9 + 10e-6 + 1.9e-6)
    assert collective_seconds(one, near, H100, 2.0) == pytest.approx(2 * 8e9 * 7 / 8 / 450e9 + 10e-6 + 1.9e-6)


def test_a_gather_is_hidden_behind_the_unit_before_it_and_no_more() -> None:
    # Nothing hides the first gather; the second one begins with the first unit's computing and takes 5 longer than it.
    assert elapsed_seconds([Stage(1, 2, 0), Stage(7, 10, 0)]) == 1 + 7 + 10
    # The last reduction waits for its unit; the first one of 3 passes while the second unit computes.
    assert elapsed_seconds([Stage(0, 2, 3), Stage(0, 10, 4)]) == 2 + 10 + 4
    # Gathers and reductions share the network: the second unit's gather, then the first one's reduction, then the third's.
    assert elapsed_seconds([Stage(1, 2, 6), Stage(1, 2, 0), Stage(3, 1, 0)]) == 1 + 2 + 6 + 3 + 1
    assert elapsed_seconds([Stage(0, 2, 0), Stage(0, 3, 0)]) == 5


def test_the_core_must_have_arrived_before_its_first_iteration(repository: Path) -> None:
    slow = replace(H100, inter_bandwidth=1e9)
    config = preset(repository, "huginn_3_5b", depth={"per": "step"}, train={"global_batch": 64, "micro_batch": 1})
    layout = Layout.of(config.parallel, 64)
    _, sent, time = step_time(config, layout, slow, (33.0, 8.0))
    core = [each for each in sent if each.unit == "core" and each.kind == GATHER]
    assert [each.calls for each in core] == [1, 1]
    once = collective_seconds(core[0], layout, slow)
    kernels = StepKernels(config, layout, slow)
    layer = kernels.outside_layers(False)["prelude.1"].seconds
    # Forward and backward: nothing but a layer's pass hides it, though the whole loop is longer than the gather.
    assert time.stalled > 2 * (once - layer) - kernels.outside_layers(True)["coda.0"].seconds
    assert kernels.loop(33, False).seconds > once
    fast = step_time(config, layout, replace(H100, intra_bandwidth=1e15, inter_bandwidth=1e15), (33.0, 8.0))[2]
    assert fast.stalled < 0.01 * fast.expected


def test_deepspeed_hides_only_what_its_settings_say(repository: Path) -> None:
    for stage, keys, hidden in (
        (1, None, {"gradients"}),
        (2, None, {"gradients"}),
        (2, {"zero_optimization": {"overlap_comm": False}}, set()),
        (2, {"zero_optimization": {"reduce_bucket_size": 1000}}, set()),
        (3, None, {"gradients", "weights, fetched ahead"}),
        (3, {"zero_optimization": {"overlap_comm": False}}, {"weights, fetched ahead"}),
        (3, {"zero_optimization": {"max_live_parameters": 0}}, {"gradients"}),
    ):
        config = preset(repository, "parcae_140m", parallel={"engine": f"zero{stage}", "deepspeed": keys})
        sent = step_communication(config, Layout(shard=8), StepDepth(8, 4))
        assert {each.purpose for each in sent if each.hidden} == hidden, (stage, keys)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_processes_wait_for_the_deepest(repository: Path, engine: str) -> None:
    config = preset(repository, "huginn_3_5b", parallel={"engine": engine}, train={"global_batch": 64})
    config = replace(config, depth=replace(config.depth, per="micro_batch"))
    layout = Layout.of(config.parallel, 16)
    mean = waited = 0.0
    for step in range(STEPS):
        drawn = np.array(DepthSampler(config.depth, 0).draw_loops(step, range(64), 1)).reshape(16, 4)
        work = 12 + drawn + 2 * np.minimum(drawn, 8)
        mean += work.sum(1).mean()
        # Gathers make all wait in each of the four micro-batches; without them, ranks meet at the end of the step.
        waited += work.max(0).sum() if engine == "fsdp" else work.sum(1).max()
    assert depth_balance(config, layout, 12, 1, 2) == pytest.approx(mean / waited)
    assert 0.5 < mean / waited < 1
    for per in ("step", "accumulation_step"):
        assert depth_balance(replace(config, depth=replace(config.depth, per=per)), layout, 12, 1, 2) == 1
    idle = step_time(config, layout, H100, (33.0, 8.0))[2].idle
    assert idle > 0
    assert step_time(replace(config, depth=replace(config.depth, per="step")), layout, H100, (33.0, 8.0))[2].idle == 0


def test_the_busiest_experts_are_waited_for(repository: Path) -> None:
    config = preset(repository, "openmythos_1b", parallel={"engine": "fsdp", "expert": 16})
    # Four experts each on 16 processes: their loads spread half as much, and the largest of 16 is 1.77 deviations above.
    assert expert_load(config, Layout.of(config.parallel, 64)) == pytest.approx(1 + 1.77 * LOAD_DEVIATION / 2, rel=1e-2)
    assert expert_load(config, Layout(shard=64)) == 1


def test_products_take_the_longer_of_their_operations_and_bytes() -> None:
    model = ModelConfig(dim=1024, heads=8, ffn_dim=4096, vocab_size=32768, prelude_layers=1, coda_layers=0)
    config = RunConfig(model=model, train=TrainConfig(micro_batch=1, sequence_length=2048, precision="bfloat16"))
    kernels, rates = StepKernels(config, Layout(), H100), attained_rates(H100)
    up = next(p for p in list_parameters(model) if p.name == "prelude.0.feedforward.up.weight")
    flops, rows, weights = 2 * 2048 * 1024 * 4096, 2048 * (1024 + 4096), 1024 * 4096
    one = max(flops / rates.products, 2 * (rows + weights) / rates.memory)
    assert kernels._products(up, False).seconds == pytest.approx(one)
    # The gradient of W leaves in float32.
    other = max(flops / rates.products, (2 * rows + 4 * weights) / rates.memory)
    assert kernels._products(up, True).seconds == pytest.approx(one + other)
    assert kernels._products(up, True).kernels == 2
    # A short sequence is bound by reading the weights.
    short = replace(config, train=replace(config.train, sequence_length=64))
    bytes_moved = 2 * (64 * (1024 + 4096) + weights)
    assert StepKernels(short, Layout(), H100)._products(up, False).seconds == pytest.approx(bytes_moved / rates.memory)


def test_weights_and_gradients_move_as_often_as_they_are_touched(repository: Path) -> None:
    config = preset(repository, "parcae_140m", train={"sequence_length": 2048, "global_batch": 8, "micro_batch": 8})
    kernels, rates = StepKernels(config, Layout(), H100), attained_rates(H100)
    every = sum(p.size for p in list_parameters(config.model))
    core = [p for p in list_parameters(config.model) if p.unit == "core"]
    # The norm reads 4 bytes; AdamW reads gradient, weight and two moments, scales the first, and writes all four.
    assert kernels.optimizer_step().seconds == pytest.approx(every * (4 + 16 + 16) / rates.memory)
    assert kernels.accumulation().seconds == pytest.approx(12 * every / rates.memory)
    # Products add to the sums of the layers' matrices themselves, but not in float32.
    wide = replace(config, train=replace(config.train, precision="float32"))
    for each, summed in ((config, [p for p in core if not p.is_rounded_once]), (wide, core)):
        found = StepKernels(each, Layout(), H100)
        sums = found.loop(4, True).seconds - 4 * found.loop(1, True).seconds
        assert sums == pytest.approx(3 * 12 * sum(p.size for p in summed) / rates.memory, rel=1e-3)
    sharded = StepKernels(config, Layout(shard=8), H100).optimizer_step().seconds
    assert sharded == pytest.approx(kernels.optimizer_step().seconds / 8, rel=1e-3)


def test_small_steps_take_as_long_as_their_launches(repository: Path) -> None:
    config = preset(repository, "parcae_140m", train={"sequence_length": 256, "global_batch": 8, "micro_batch": 1})
    config = replace(config, depth=replace(config.depth, per="step"))
    kernels = StepKernels(config, Layout(shard=8), H100)
    count = (kernels.micro_batch(8, 4) + kernels.optimizer_step()).kernels
    time = step_time(config, Layout(shard=8), H100, (8.0, 4.0))[2]
    assert time.launches == pytest.approx(LAUNCH_SECONDS * count)
    assert time.launches > time.kernels
    assert time.expected == pytest.approx(time.launches + time.stalled + time.exposed)
    compiled = replace(config, train=replace(config.train, compile="layers"))
    assert step_time(compiled, Layout(shard=8), H100, (8.0, 4.0))[2].launches < 0.8 * time.launches


def test_float8_products_take_less_time_on_devices_that_have_them(repository: Path) -> None:
    train = {"sequence_length": 4096, "global_batch": 8, "micro_batch": 1, "precision": "bfloat16", "compile": "layers"}
    found = []
    for float8 in ("none", "matrix_products"):
        config = preset(repository, "huginn_3_5b", train={**train, "float8": float8}, depth={"per": "step"})
        found.append(StepKernels(config, Layout(), H100).micro_batch(33, 8).seconds)
    # The products in float8, counted by hand: each takes 600/1000 of its time; 33 times forward, 8 times backward.
    matrices = [p for p in list_parameters(config.model) if ".attention." in p.name or ".feedforward." in p.name]
    sizes = {
        core: sum(math.prod(p.shape) for p in matrices if p.name.startswith("core.") is core) for core in (True, False)
    }
    flops = 2 * 4096 * (sizes[True] * (33 + 8) + sizes[False] * 2)
    saved = flops * (1 / 600e12 - 1 / 1000e12)
    assert found[0] - found[1] == pytest.approx(saved, rel=0.15)  # less the bytes of rounding
    assert found[0] - found[1] < saved
    for device in ("a100", "cpu"):
        with pytest.raises(
            ConfigError, match=r"needs a device that multiplies float8 .* one of b200, h100, h200, l40s"
        ):
            make_plan(config, 8, DEVICES[device])


def test_a_measured_utilisation_replaces_the_kernels(repository: Path) -> None:
    config = preset(repository, "parcae_1_3b", depth={"per": "step"})
    time = step_time(config, Layout(shard=8), H100, (8.0, 4.0), 0.25)[2]
    assert time.kernels == pytest.approx(time.computing / 0.25)
    assert time.expected == pytest.approx(time.kernels + time.stalled + time.exposed)


def test_of_equally_fast_arrangements_the_one_that_sends_least_is_taken(repository: Path) -> None:
    config = preset(repository, "parcae_140m", train={"sequence_length": 2048, "global_batch": 4096})
    best = find_fastest_plan(replace(config, depth=replace(config.depth, per="step")), 1024, H100)
    assert best is not None
    assert best.layout.replicate > 1
    plain = replace(best.config, parallel=replace(best.config.parallel, replicate=1))
    _, _, other = step_time(plain, Layout(shard=1024), H100, (best.loops, best.with_grad))
    assert best.time is not None
    assert best.time.hidden + best.time.exposed < other.hidden + other.exposed


def test_a_published_throughput_is_near_the_plan_for_its_machine(repository: Path) -> None:
    # Huginn on one node of eight MI250X dies (arXiv:2502.05171, A.2): 108.75 TFLOP/s per device at 215 GFLOP per token.
    train = {"global_batch": 8, "micro_batch": 1, "compile": "layers"}
    depth = {"per": "step", "checkpoint": "per_iteration"}
    config = preset(repository, "huginn_3_5b", train=train, depth=depth, parallel={"engine": "ddp"})
    time = step_time(config, Layout(shard=8), DEVICES["mi250x"], (33.0, 8.0))[2]
    assert 4096 / time.expected == pytest.approx(108.75e12 / 215e9, rel=0.15)

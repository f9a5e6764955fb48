"""Replicas, tensor, context and expert parallelism and the core's sharding units, alone and combined, equal one process."""

from typing import Any

import pytest

from megatron_rdt.config import DepthConfig, ParallelConfig, RunConfig, TrainConfig, check_config
from tests.distributed.axes_worker import LENGTH, MODELS, SEQUENCES, Case, compare_all
from tests.distributed.processes import run_on_processes

PROCESSES = 4


def case(model: str, precision: str = "float32", **parallel: Any) -> Case:
    return parallel, model, precision


# "float32" computes in the dtype of the weights, here float64.
CASES: dict[str, list[Case]] = {
    "tensor": [
        case("plain", tensor=4),
        case("parts", tensor=2),
        case("mla", tensor=2, reshard_after_forward=False),
        case("experts", tensor=2, reduce="per_micro_batch"),
        case("parts", replicate=2, tensor=2),
        case("parts", context=2, tensor=2),
        case("mla", context=2, tensor=2, core_gather="per_layer"),
        case("experts", tensor=2, core_gather="per_iteration"),
        case("act", tensor=2),
        case("gate", tensor=4),
        case("parts", "bfloat16", tensor=2),
        case("mla", "bfloat16", tensor=2, core_gather="per_layer"),
    ],
    "context": [
        case("parts", context=4),
        case("mla", context=2),
        case("experts", context=2, replicate=2),
        case("act", context=2),
        case("gate", context=2, reduce="per_micro_batch"),
        case("parts", "bfloat16", context=2),
    ],
    "experts": [
        case("experts", expert=4),
        case("experts", expert=2, reduce="per_micro_batch"),
        case("experts", expert=2, replicate=2),
        case("experts", expert=2, context=2, core_gather="per_layer"),
        case("experts", expert=4, tensor=2),
        case("experts", expert=2, tensor=2, reduce="per_micro_batch"),
        case("experts act", expert=2, tensor=2, context=2),
    ],
    "state": [
        case("parts", replicate=2),
        case("parts", replicate=4),
        case("few experts"),
        case("gate", core_gather="per_layer"),
        case("mla", core_gather="per_iteration", replicate=2),
        case("plain", core_gather="per_layer", reshard_after_forward=False, reduce="per_micro_batch"),
        case("plain", reduce="per_micro_batch"),
        case("parts", engine="ddp", reduce="per_micro_batch"),
    ],
}


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("group", CASES)
def test_every_arrangement_equals_one_process(group: str) -> None:
    for parallel, model, precision in CASES[group]:
        same = parallel.get("core_gather", "once") != "once" or parallel.get("expert", 1) > 1 or model == "gate"
        config = RunConfig(
            model=MODELS[model],
            depth=DepthConfig(per="step" if same else "sequence"),
            train=TrainConfig(global_batch=SEQUENCES, micro_batch=1, sequence_length=LENGTH, precision=precision),  # type: ignore[arg-type]
            parallel=ParallelConfig(**{"engine": "fsdp", **parallel}),
        )
        check_config(config, PROCESSES)  # every arrangement compared is one that a run may have
    verdict, *_ = run_on_processes(compare_all, PROCESSES, CASES[group], timeout=290)
    assert len(verdict) == len(CASES[group])
    for name, differences in verdict.items():
        assert len(differences) > 40
        limit = 0.1 if "bfloat16" in name else 1e-10
        assert not {what: value for what, value in differences.items() if not value < limit}, name

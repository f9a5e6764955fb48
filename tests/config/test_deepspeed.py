"""DeepSpeed's config: generated from ours, with the user's keys; clashes are named."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megatron_rdt.config import ParallelConfig, RunConfig, check_config, dump_config, load_config
from megatron_rdt.config.deepspeed import (
    ACCEPTED,
    DECIDED_BY_OPTION,
    UNUSED,
    ModelSizes,
    deepspeed_config,
    generated_keys,
)
from megatron_rdt.errors import ConfigError

SIZES = ModelSizes(largest=900, core=3000, outside=1200, unit=800)


def run(engine: str, keys: dict[str, Any] | str | None = None, offload: Any = "none") -> RunConfig:
    return RunConfig(parallel=ParallelConfig(engine=engine, deepspeed=keys, offload=offload))  # type: ignore[arg-type]


def test_keys_of_the_user_are_merged_section_by_section() -> None:
    keys = {
        "wall_clock_breakdown": True,
        "steps_per_print": 50,
        "train_batch_size": 32,  # as ours
        "gradient_clipping": "auto",
        "bf16": {"enabled": False},
        "zero_optimization": {
            "param_persistence_threshold": 9,
            "max_reuse_distance": 0,
            "prefetch_bucket_size": 1234,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"pin_memory": False},
        },
    }
    config = run("zero3", keys, "parameters")
    check_config(config, 2)
    assert deepspeed_config(config, 2, SIZES) == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": True,
        "steps_per_print": 50,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 5000,
            "stage3_prefetch_bucket_size": 1234,
            "stage3_param_persistence_threshold": 9,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu"},
        },
    }


@pytest.mark.parametrize(
    ("engine", "keys", "message"),
    [
        ("zero2", {"gradient_clipping": 0.5}, "sets gradient_clipping 0.5, optimizer.grad_clip is 1.0: .*grad_clip"),
        ("zero2", {"train_batch_size": 64}, "train_batch_size 64, train.global_batch is 32"),
        (
            "zero2",
            {"gradient_accumulation_steps": 3},
            "steps 3, train.global_batch is 32 and train.micro_batch is 8 on 2",
        ),
        ("zero2", {"zero_optimization": {"stage": 3}}, "zero_optimization.stage 3, parallel.engine is zero2"),
        ("zero2", {"zero_optimization": True}, "zero_optimization True, but it is a mapping"),
        (
            "zero2",
            {"optimizer": {"type": "Adam", "params": {"lr": 1}}},
            "optimizer.type 'Adam', optimizer.name is adamw",
        ),
        ("zero2", {"scheduler": {"type": "WarmupLR"}}, "scheduler.type 'WarmupLR', schedule.name is cosine"),
        ("zero2", {"fp16": {"enabled": True}}, "fp16.enabled True, train.precision is float32"),
        ("zero2", {"bf16": {"enabled": "auto"}}, "bf16.enabled 'auto', train.precision is float32"),
        ("zero2", {"communication_data_type": "fp16"}, "train.precision keeps weights"),
        ("zero2", {"activation_checkpointing": {"cpu_checkpointing": True}}, "depth.checkpoint is none"),
        ("zero2", {"checkpoint": {"load_universal": True}}, "checkpoint.every is 200"),
        ("zero2", {"gradient_clippin": 1.0}, "would ignore it. Did you mean gradient_clipping"),
        ("zero2", {"no_such": 1}, "DeepSpeed has no key no_such"),
        ("zero2", {"elasticity": {"enabled": True}}, "this trainer does not use. Omit elasticity"),
        ("zero2", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "parallel.offload is none"),
        ("zero2", {"zero_optimization": {"offload_param": {"pin_memory": False}}}, "parallel.offload is none"),
        ("zero2", {"zero_optimization": {"cpu_offload": True}}, "cpu_offload True, parallel.offload is none"),
        ("zero2", {"zero_optimization": {"round_robin_gradients": True}}, "need their shards in order"),
        ("zero3", {"zero_optimization": {"max_reuse_distance": 9}}, "reuse_distance 9, parallel.engine is zero3"),
        (
            "fsdp",
            {"wall_clock_breakdown": True},
            "parallel.deepspeed is for DeepSpeed's engines, parallel.engine is fsdp",
        ),
        ("zero1", {7: 1}, "DeepSpeed has no key 7"),
    ],
    ids=str,
)
def test_a_clash_names_both(engine: str, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(run(engine, keys), 2)
    assert len(str(caught.value).splitlines()) == 1, "one sentence for a block"
    assert "parallel.deepspeed" in str(caught.value)


def test_what_is_not_known_yet_is_not_refused() -> None:
    check_config(run("zero2", {"gradient_accumulation_steps": 3}))  # the number of processes decides


@pytest.mark.parametrize(("engine", "offload"), [("zero2", "parameters"), ("fsdp", "optimizer"), ("ddp", "optimizer")])
def test_offload_needs_an_engine_that_has_it(engine: str, offload: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.offload .*parallel\.engine (is )?{engine}"):
        check_config(run(engine, None, offload), 2)


def test_a_file_is_read_at_the_start(repository: Path, tmp_path: Path) -> None:
    base = repository / "configs" / "smoke.yaml"
    (tmp_path / "ds.yaml").write_text("zero_optimization:\n  reduce_bucket_size: 5e8\ndump_state: true\n")
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 5e8}, "dump_state": True})
    )
    expected = {"zero_optimization": {"reduce_bucket_size": 5e8}, "dump_state": True}
    inline = "{zero_optimization: {reduce_bucket_size: 5e8}, dump_state: true}"
    for value in (str(tmp_path / "ds.yaml"), str(tmp_path / "ds.json"), inline):
        config = load_config(base, ["--parallel.engine", "zero2", "--parallel.deepspeed", value])
        assert config.parallel.deepspeed == expected, value
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config
        assert load_config(tmp_path / "again.yaml", ["--parallel.deepspeed=null"]).parallel.deepspeed is None
    assert load_config(base, {"parallel.deepspeed": expected}).parallel.deepspeed == expected
    assert deepspeed_config(run("zero2", str(tmp_path / "ds.json")), 2, SIZES)["dump_state"] is True


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.yaml", None, "does not exist. Check the path"),
        ("a.yaml", "- 1", "it holds a list"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "", "omit --parallel.deepspeed"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": 1, "a": 2}', "key a is given twice"),
    ],
)
def test_a_bad_file_is_explained(repository: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"parallel.deepspeed: .*{name} .*{message}"):
        load_config(repository / "configs" / "smoke.yaml", {"parallel.deepspeed": str(tmp_path / name)})


def test_one_key_is_not_an_option(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.deepspeed takes its value whole"):
        load_config(repository / "configs" / "smoke.yaml", ["--parallel.deepspeed.dump_state", "true"])


class Asked(dict):
    """A mapping that remembers which of its keys were asked for."""

    names: ClassVar[set[str]] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def test_every_key_that_deepspeed_reads_is_known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime = pytest.importorskip("deepspeed.runtime.config")
    runtime.DeepSpeedConfig(Asked(deepspeed_config(run("zero2"), 1, SIZES)))
    generated = {key.key.partition(".")[0] for key in generated_keys(run("zero2"), 1)}
    known = {*ACCEPTED, *UNUSED, *generated, *(name for name in DECIDED_BY_OPTION if "." not in name)}
    assert Asked.names - known == set()
    assert set(ACCEPTED) - Asked.names == set(), "DeepSpeed would ignore it"


def test_names_inside_zero_optimization_are_deepspeeds() -> None:
    fields = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values())}
    keys: list[Any] = [*generated_keys(run("zero3", None, "parameters"), 1)]
    inside = [key.key for key in keys] + list(DECIDED_BY_OPTION)
    assert {key.split(".")[1] for key in inside if key.startswith("zero_optimization.")} <= names


def test_a_config_that_deepspeed_refuses_is_a_config_error() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    from megatron_rdt.parallel.zero import check_deepspeed_accepts

    for keys, message in (
        ({"reduce_bucket_sise": 5}, "reduce_bucket_sise: Extra inputs are not permitted"),
        ({"reduce_bucket_size": "many"}, "reduce_bucket_size: Input should be a valid integer"),
    ):
        config = deepspeed_config(run("zero2", {"zero_optimization": keys}), 1, SIZES)
        with pytest.raises(ConfigError, match=message):
            check_deepspeed_accepts(config, deepspeed)


def test_gradients_are_reduced_while_computing_where_no_parameter_is_larger_than_the_bucket() -> None:
    large = ModelSizes(largest=80_000_000, core=0, outside=80_000_000, unit=0)
    for keys, sizes, bucket, overlaps in (
        ({}, SIZES, 50_000_000, True),
        ({}, large, 80_000_000, True),
        ({"reduce_bucket_size": 5e7}, large, 5e7, False),
        ({"reduce_bucket_size": 900}, SIZES, 900, True),
        ({"contiguous_gradients": False}, SIZES, 50_000_000, False),
        ({"overlap_comm": False}, SIZES, 50_000_000, False),
    ):
        for engine in ("zero1", "zero2"):
            zero = deepspeed_config(run(engine, {"zero_optimization": keys}), 2, sizes)["zero_optimization"]
            assert (zero["reduce_bucket_size"], zero["overlap_comm"]) == (bucket, overlaps), (engine, keys)


def test_sizes_of_a_model() -> None:
    names = {
        "embedding.weight": 50,
        "prelude.0.a": 5,
        "prelude.0.b": 6,
        "prelude.1.a": 7,
        "core.layers.0.a": 90,
        "core.b": 3,
    }
    assert ModelSizes.of({**names, "final_norm.weight": 2}) == ModelSizes(largest=90, core=93, outside=50, unit=50)
    assert ModelSizes.of({**names, "head.weight": 60}) == ModelSizes(largest=90, core=93, outside=60, unit=60)

"""Configs: those that load, and the messages of those that are refused."""

from pathlib import Path

import pytest
import yaml

from data_prep.config import PrepConfig
from launch.commands.quickstart import DATA_CONFIG, TASKS_CONFIG
from megatron_rdt.config import DataConfig, ParallelConfig, RunConfig, check_config, dump_config, load_config
from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.config.secrets import find_secrets
from megatron_rdt.config.yaml_files import UniqueKeys
from megatron_rdt.errors import ConfigError


def test_every_shipped_config_is_good(repository: Path) -> None:
    for name in ("smoke.yaml", "quickstart.yaml"):
        check_config(load_config(repository / "configs" / name))


def test_overrides_and_round_trip(repository: Path, tmp_path: Path) -> None:
    path = repository / "configs" / "smoke.yaml"
    config = load_config(path, {"depth.mean": 5, "depth.backprop": 2, "eval.loops": [1, 2]})
    assert (config.depth.mean, config.depth.backprop, config.eval.loops) == (5, 2, [1, 2])
    assert load_config(path, ["--depth.mean", "5", "depth.backprop=2", "--eval.loops=[1,2]"]) == config
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth.meen": 3}, "depth.meen does not exist. Did you mean depth.mean"),
        ({"model.dim": "wide"}, "model.dim"),
        ({"model.heads": 5}, "model.dim 64 is not a multiple of model.heads 5"),
        ({"model.kv_heads": 3}, "model.heads 4 is not a multiple of model.kv_heads 3"),
        ({"depth.min": 5, "depth.mean": 3}, "1 <= min <= mean <= max"),
        ({"depth.per": "sequence", "model.halting": "gate"}, "one T for all sequences"),
        ({"depth.backprop": 2, "model.halting": "act"}, "act needs a gradient through every iteration"),
        ({"depth.backprop": 7, "model.halting": "gate"}, "gate needs a gradient through every iteration"),
        (
            {
                **{"depth.backprop": 7, "model.injection": "none"},
                **{"model.state_init": "encoded", "model.encoded_norm": False, "train.on_alarm": "warn"},
            },
            "injection none needs a gradient through every iteration",
        ),
        ({"model.injection": "none"}, "injection none passes on the encoded input .* --model.state_init encoded"),
        ({"model.core_norm": "last_shared", "model.final_norm": False}, "last_shared applies the final norm"),
        ({"model.attention_dim": 66}, "attention_dim 66 is not a multiple of model.heads 4.* or another attention_dim"),
        ({"model.attention": "mla", "model.attention_dim": 64}, "model.attention_dim is for model.attention gqa"),
        (
            {"model.rope_scaling": "llama3", "model.rope_fast_turns": 0.5},
            "rope_slow_turns 1 is not below model.rope_fast_turns 0.5",
        ),
        (
            {
                "depth.backprop": 8,
                "depth.curriculum": "linear",
                "depth.curriculum_steps": 9,
                "depth.curriculum_of": "both",
                "model.halting": "act",
            },
            "--depth.curriculum_of mean",
        ),
        (
            {"model.attention": "mla", "model.qk_norm": "plain"},
            "model.qk_norm is for .* gqa: the latents of mla are norm",
        ),
        (
            {"model.attention": "mla", "model.qk_bias": True},
            "model.qk_bias is for model.attention gqa: mla has no such",
        ),
        (
            {"model.attention": "mla", "model.value_embeddings": "gated"},
            "value_embeddings is for .*: mla has no such part",
        ),
        ({"model.core_ffn": "moe", "model.experts_per_token": 9}, "experts_per_token 9 must be from 1 to"),
        ({"depth.backprop": 0}, "at least 1, or `all`"),
        ({"train.global_batch": 9}, "nearest: 8, 12"),
        (
            {"train.batch_schedule": ["0:6", "9:8"]},
            "train.batch_schedule 0:6: 6 is not a multiple .* 4, 8. A run that is past",
        ),
        ({"train.batch_schedule": ["0:0", "9:8"]}, "batch_schedule: '0:0' is not STEP:GLOBAL_BATCH with a batch of at"),
        ({"train.batch_schedule": ["8"]}, "'8' is not STEP:GLOBAL_BATCH"),
        ({"train.batch_schedule": ["0:4", "-9:8"]}, "'-9:8' is not STEP:GLOBAL_BATCH"),
        ({"train.batch_schedule": ["5:4", "9:8"]}, "'5:4' is the first entry, it must be that of step 0, such as 0:4"),
        ({"train.batch_schedule": ["0:4", "9:16", "7:8"]}, "the step of 7:8 is not after that of 9:16"),
        ({"train.batch_schedule": ["0:4", "9:16", "9:8"]}, "the step of 9:8 is not after that of 9:16"),
        ({"train.batch_schedule": ["0:4", "9:16"]}, "the last batch is 16, but train.global_batch is 8. Set --train"),
        ({"train.batch_schedule": [64]}, "batch_schedule needs a list"),
        ({"schedule.warmup_steps": 99}, "warmup_steps 99 is more than train.steps 40"),
        ({"eval.loops": [0]}, "eval.loops"),
        ({"eval.loops": [1, 4, 1]}, r"eval.loops \[1, 4, 1\] lists a count twice. Remove one"),
        ({"sample.loops": [8, 8]}, "sample.loops .* lists a count twice"),
        ({"eval.loops": "[1,null]"}, "a list of whole numbers such as 1,4, not one that holds null"),
        ({"optimizer.beta1": 1.5}, "optimizer.beta1 is 1.5, it must be at least 0 and below 1"),
        ({"optimizer.beta2": 1.0}, "optimizer.beta2 is 1.0, it must be at least 0 and below 1"),
        ({"optimizer.grad_clip": -1}, "optimizer.grad_clip is -1"),
        ({"model.rope_base": 0}, "model.rope_base is 0.* above 0"),
        ({"schedule.final": 5}, "schedule.final is 5.*at most 1"),
        ({"depth.sigma": 50}, "depth.sigma is 50"),
        ({"depth.scheme": "fixed", "depth.mean": 2.5}, "fixed needs a whole number"),
        ({"schedule.name": "wsd", "schedule.decay_steps": 39}, "more than train.steps 40 together"),
        ({"schedule.name": "wsd", "schedule.warmup_steps": 33}, "the 8 steps of schedule.decay_steps 0 are more than"),
        ({"depth.scheme": "uniform", "depth.mean": 2.25}, "depth.mean is 2.25.*multiple of 0.5"),
        ({"sample.every": 1, "sample.prompt": ""}, "sample.prompt is empty"),
        ({"eval.every": -1}, "eval.every is -1"),
        ({"run.name": "--x"}, "must be the name of a directory"),
        ({"optimizer.lr": 0}, "optimizer.lr"),
        ({"run.name": "a/b"}, "run.root"),
        ({"model.unused_ids": 4096}, "model.unused_ids 4096 leaves none of the model.vocab_size 4096 ids"),
    ],
    ids=str,
)
def test_bad_values_are_explained(repository: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        check_config(load_config(repository / "configs" / "smoke.yaml", options), 1)


def test_bad_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml does not exist. Check the path"):
        load_config(tmp_path / "none.yaml")
    for text, message in (("depth: {meen: 3}", "key depth.meen"), ("a: [", "not valid YAML"), ("- 1", "must hold")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "c.yaml")


def test_several_processes_need_an_engine(repository: Path) -> None:
    config = load_config(repository / "configs" / "smoke.yaml")
    with pytest.raises(ConfigError, match=r"parallel\.engine is single, but there are 2 processes"):
        check_config(config, 2)


def test_smoke_and_quickstart_share_the_data_of_one_config(repository: Path) -> None:
    prep, _ = parse(make_parser(PrepConfig, "rdt prep", ""), PrepConfig, ["--config", str(repository / DATA_CONFIG)])
    for name in ("smoke.yaml", "quickstart.yaml"):
        config = load_config(repository / "configs" / name)
        assert (config.data.corpora()[0].path, config.model.vocab_size) == (prep.out, prep.vocab_size)
    tasks, _ = parse(make_parser(PrepConfig, "rdt prep", ""), PrepConfig, ["--config", str(repository / TASKS_CONFIG)])
    assert (tasks.out, tasks.tokenizer) == (config.data.corpora()[1].path, f"{prep.out}/tokenizer")
    written = [path.read_bytes() for path in (repository / "configs").rglob("*.yaml")]
    assert len(set(written)) == len(written), "one file for one thing"


@pytest.mark.parametrize("key", ["model: {dim: null}", "run: {name: }", "optimizer: {name: null}", "depth: {mean: ~}"])
def test_a_key_without_a_value_is_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(key)
    with pytest.raises(ConfigError, match="has no value"):
        load_config(tmp_path / "c.yaml")


def test_an_option_wins_over_the_file_in_any_order(repository: Path) -> None:
    path = str(repository / "configs" / "smoke.yaml")
    for words in (["--depth.mean", "7", "--config", path], ["--depth.mean=7", f"--config={path}", "--train.steps=9"]):
        config, _ = parse(make_parser(RunConfig, "rdt train", ""), RunConfig, words)
        assert config.depth.mean == 7
        assert config.model == load_config(path).model
    first, second = path, str(repository / "configs" / "quickstart.yaml")
    both, _ = parse(make_parser(RunConfig, "rdt train", ""), RunConfig, ["--config", first, "--config", second])
    assert both.run.name == load_config(second).run.name, "of two files, the last one wins"


@pytest.mark.parametrize("text", ["? [1, 2]\n: 3\n", "{[a]: 2}", "? {a: 1}\n: 3\n"])
def test_a_list_or_mapping_as_a_key_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="line 1 has a list or a mapping where a key should be"):
        load_config(tmp_path / "c.yaml")


def test_anchors_may_be_merged() -> None:
    assert yaml.load("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n", UniqueKeys)["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "text",
    ["https://me:s3cret@host/corpus", "hf_" + "Abc123" * 6, "ghp_" + "x" * 36, "AKIA" + "A1" * 8],
)
def test_secrets_are_refused_and_not_shown(text: str) -> None:
    zero = ParallelConfig(engine="zero2", deepspeed={"a": [{"b": text}]})
    for config, name in (
        (RunConfig(data=DataConfig(path=text)), r"data\.path"),
        (RunConfig(parallel=zero), r"parallel\.deepspeed\.a\.b"),
    ):
        with pytest.raises(ConfigError, match=rf"{name} holds a .*, which would be saved in config\.yaml") as caught:
            check_config(config)
        assert text not in str(caught.value)
        assert "s3cret" not in str(caught.value)
    for harmless in ("hf:openai/gsm8k:main", "https://host:8080/corpus", "s3://bucket/hf_corpus", "~/me@home"):
        assert not list(find_secrets(DataConfig(path=harmless)))

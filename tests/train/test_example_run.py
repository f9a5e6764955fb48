"""Runs on examples with labels, one per row: the loss by hand, longer rows in validation, resume, and refusals."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.data import load_manifest, open_corpus
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from megatron_rdt.inference import load
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.parallel import make_engine
from megatron_rdt.train import trainer
from megatron_rdt.train.monitoring import count_loops
from tests.data.corpora import write_example_corpus
from tests.data.test_examples import draw_words
from tests.distributed.processes import run_on_processes
from tests.train.runs import Configure, read_records

STEADY = ["--depth.scheme=fixed", "--train.steps=4", "--logging.every=1", "--eval.sequences=6", "--data.pack=example"]
FOLLOWING = [
    "--depth.scheme=difficulty",
    "--depth.per=sequence",
    "--depth.difficulty_slope=2",
    "--depth.difficulty_offset=1",
]
FOLLOWING += ["--depth.max=8", "--depth.backprop=3"]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def examples(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training words of 1 to 5 elements, validation words of 2 to 12, a label at every position."""
    generator = np.random.default_rng(1)
    splits = {"train": [draw_words(generator, [1, 2, 3, 4, 5] * 8)], "valid": [draw_words(generator, [2, 5, 12] * 2)]}
    return write_example_corpus(tmp_path_factory.mktemp("examples") / "corpus", tiny_corpus, splits, ["product:S3"])


def loss_by_hand(model: torch.nn.Module, tokens: list[list[int]], loops: int) -> float:
    """Mean cross entropy of the running sums after each element, from rows of BOS, elements and EOS alone."""
    total, count = 0.0, 0
    for row in tokens:
        word = row[1 : row.index(2)]
        logits = model(torch.tensor([row[: len(word) + 1]]), loops)[0, 1:]
        sums = torch.tensor(word).cumsum(0) + 200
        total += float(cross_entropy(logits.float(), sums, reduction="sum"))
        count += len(word)
    return total / count


@pytest.mark.slow
def test_labels_are_learnt_one_example_per_row(configure: Configure, examples: Path, tmp_path: Path) -> None:
    options = [f"--run.root={tmp_path}", f"--data.path={examples}", "--train.sequence_length=6", *STEADY]
    config = configure(*options, "--run.name=straight")
    assert trainer.train(config) == 0
    manifest = load_manifest(examples)
    rows = open_corpus(manifest, "train", 6, config.run.seed, config.data).read_samples(range(16))
    untrained = initialize(RecurrentDepthTransformer(config.model), config.run.seed)
    loops = int(config.depth.mean)
    records = read_records(tmp_path / "straight" / "metrics.jsonl")
    with torch.no_grad():
        assert records[0]["loss"] == pytest.approx(loss_by_hand(untrained, rows.tokens[:4].tolist(), loops), abs=1e-5)
    assert rows.difficulties is not None
    assert [record["targets"] for record in records] == [sum(rows.difficulties[i : i + 4]) for i in range(0, 16, 4)]
    # Validation has the longer words too, in the run and in `rdt eval`.
    model, _ = load(tmp_path / "straight")
    valid = open_corpus(manifest, "valid", 6, 0, config.data, pack=False)
    with torch.no_grad():
        by_hand = loss_by_hand(model, valid.read(valid.locate_evenly(6)).tokens.tolist(), loops)
    evaluated = read_records(tmp_path / "straight" / "eval.jsonl")[-1]["losses"]
    assert evaluated[str(loops)] == pytest.approx(by_hand, abs=1e-5)
    assert evaluate_checkpoint(str(tmp_path / "straight"), [loops], 6)["losses"][str(loops)] == pytest.approx(
        by_hand, abs=1e-5
    )
    source = tmp_path / "straight" / "checkpoints" / "step-00000002"
    assert trainer.train(configure(*options, "--run.name=resumed"), str(source)) == 0
    resumed = read_records(tmp_path / "resumed" / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in resumed] == [(r["step"], r["loss"]) for r in records[2:]]
    with pytest.raises(CheckpointError, match=r"with data\.pack example, now it is chunk.*Set --data\.pack example"):
        trainer.train(configure(*options, "--run.name=other", "--data.pack=chunk"), str(source))


def test_rows_that_are_too_short_are_refused_before_training(
    configure: Configure, examples: Path, tmp_path: Path
) -> None:
    options = [f"--run.root={tmp_path}", f"--data.path={examples}", *STEADY]
    with pytest.raises(
        ConfigError,
        match=r"document 4 of split train, of task product:S3 with difficulty 5, .* needs rows of 6 tokens\. "
        r"Set --train\.sequence_length to at least 6, now 5\.",
    ):
        trainer.train(configure(*options, "--train.sequence_length=5", "--run.name=short"))
    assert not (tmp_path / "short" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["quickstart_depth", "experiments/words_full_attention"])
def test_configs_fit_their_data(name: str) -> None:
    """The rows have room for the longest training word with its task, BOS and EOS; the vocabulary has its symbols."""
    from data_prep.reasoning.difficulties import DifficultyMix
    from data_prep.reasoning.symbol_files import list_vocabulary
    from data_prep.reasoning.tasks import parse_task
    from megatron_rdt.config.yaml_files import read_mapping

    config, data = load_config(CONFIGS / f"{name}.yaml"), read_mapping(str(CONFIGS / "quickstart_depth_data.yaml"))
    hardest = DifficultyMix(data["difficulty"], data["weights"]).values[-1]
    assert config.train.sequence_length + 1 == len(["<s>", "product:S3", *range(hardest + 1), "</s>"])
    assert config.model.vocab_size == len(list_vocabulary([parse_task(task) for task in data["task"]]))
    assert config.data.path == f"{data['out']}_tokens"
    assert config.train.steps * config.train.global_batch <= data["count"] * config.data.max_epochs


@pytest.mark.parametrize("name", ["addition", "graph", "hops", "parity", "words_a5"])
def test_configs_of_experiments_fit_their_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`rdt prep tasks` says the vocabulary and the length that training needs; there are examples for all of its steps."""
    from launch.commands.prep_tasks import tasks
    from megatron_rdt.config.yaml_files import read_mapping

    data = CONFIGS / "experiments" / f"{name}_data.yaml"
    config, options = load_config(CONFIGS / "experiments" / f"{name}.yaml"), read_mapping(str(data))
    assert tasks(["--config", str(data), "--count=600", "--test_count=0", f"--out={tmp_path}"]) == 0
    needs = f"model.vocab_size {config.model.vocab_size}, train.sequence_length {config.train.sequence_length} or more"
    assert needs in capsys.readouterr().out
    assert config.data.path == f"{options['out']}_tokens"
    assert config.train.steps * config.train.global_batch <= options["count"] * config.data.max_epochs


@pytest.mark.slow
def test_loops_follow_the_difficulty_of_each_example(
    configure: Configure, examples: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    options = [f"--run.root={tmp_path}", f"--data.path={examples}", "--train.sequence_length=6", *STEADY, *FOLLOWING]
    config = configure(*options, "--train.micro_batch=2", "--run.name=straight")
    assert trainer.train(config) == 0
    rows = open_corpus(load_manifest(examples), "train", 6, config.run.seed, config.data).read_samples(range(16))
    assert rows.difficulties is not None
    loops = [min(2 * n + 1, 8) for n in rows.difficulties]
    records = read_records(tmp_path / "straight" / "metrics.jsonl")
    for record, expected in zip(records, (loops[i : i + 4] for i in range(0, 16, 4)), strict=True):
        assert record["loops_mean"] == sum(expected) / 4
        assert record["loops_max"] == max(expected)
        assert record["loops_with_grad"] == sum(min(t, 3) for t in expected) / 4
    untrained = initialize(RecurrentDepthTransformer(config.model), config.run.seed)
    with torch.no_grad():
        losses = [loss_by_hand(untrained, [row], t) for row, t in zip(rows.tokens[:4].tolist(), loops)]
    mean = sum(loss * n for loss, n in zip(losses, rows.difficulties)) / sum(rows.difficulties[:4])
    assert records[0]["loss"] == pytest.approx(mean, abs=1e-5)
    # A resumed run takes the same T.
    stopped = configure(*options, "--train.micro_batch=2", "--run.name=resumed", "--train.steps=2")
    assert trainer.train(stopped) == 0
    assert trainer.train(configure(*options, "--train.micro_batch=2", "--run.name=resumed"), "auto") == 0
    again = read_records(tmp_path / "resumed" / "metrics.jsonl")
    assert [r["loops_mean"] for r in again] == [r["loops_mean"] for r in records]
    with pytest.raises(DataError, match="holds no difficulties of examples"):
        trainer.train(configure(*options, f"--data.path={tiny_corpus}", "--train.sequence_length=100000"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--depth.per=step", "depth.per is step. Set --depth.per sequence"),
        ("--data.pack=chunk", "data.pack is chunk. Set --data.pack example"),
        ("--depth.curriculum=linear", "depth.curriculum_of mean grows the mean of T"),
        ("--depth.bounds=truncate", "Set --depth.bounds clamp"),
        ("--depth.difficulty_slope=0", "depth.difficulty_slope is 0.0, it must be above 0"),
    ],
)
def test_settings_with_which_loops_cannot_follow_are_refused(option: str, message: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configure("--data.pack=example", *FOLLOWING, option)


def count_on_ranks(config: RunConfig) -> dict[int, int]:
    """Counts of each T where rank r has T = r + 2 and 5."""
    engine = make_engine(config, torch.device("cpu"))
    plans = [DepthPlan((dist.get_rank() + 2,)), DepthPlan((5,))]
    return dict(count_loops(plans, DepthSampler(config.depth, 0), 0, config.train.batches, engine))


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_ranks_tell_each_other_their_loops(configure: Configure) -> None:
    config = configure("--data.pack=example", *FOLLOWING)
    config = replace(config, parallel=replace(config.parallel, engine="ddp"))
    assert run_on_processes(count_on_ranks, 2, config, timeout=50) == [{2: 1, 3: 1, 5: 2}] * 2

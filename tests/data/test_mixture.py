"""Mixtures: the corpus of sample k follows from k alone, close to the weights at every k, over phases and periods."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rdt.config import CorpusConfig, ModelConfig, RunConfig, dump_config, load_config
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.config.mixture_weights import PERIOD, integer_weights
from megatron_rdt.data import Batch, BatchLoader, TokenCorpus, load_manifest
from megatron_rdt.data.mixture import Mixture, MixtureOrder, Phase, interleave, schedule_turns
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from megatron_rdt.train.data.base import check_vocabulary
from megatron_rdt.train.data.prepared import check_tokenizers, open_prepared_data
from megatron_rdt.train.trainer import train
from tests.data.corpora import mixture_option, write_corpus

LENGTH = 32


def test_weights_become_whole_numbers() -> None:
    assert integer_weights({"a": 3.0}) == {"a": 1}
    assert integer_weights({"a": 0.5, "b": 0.5}) == integer_weights({"a": 7, "b": 7}) == {"a": 1, "b": 1}
    generator = np.random.default_rng(1)
    for _ in range(50):
        weights = {str(i): w for i, w in enumerate(generator.dirichlet(np.ones(int(generator.integers(2, 21)))))}
        if min(weights.values()) * PERIOD < 1:
            continue
        counts = integer_weights(weights)
        period = sum(counts.values())
        assert PERIOD % period == 0
        assert np.gcd.reduce(list(counts.values())) == 1
        for name, weight in weights.items():
            assert abs(counts[name] / period - weight) < 1 / PERIOD
    with pytest.raises(ValueError, match=f"the weight of b is 1e-05 of all, less than 1/{PERIOD}"):
        integer_weights({"a": 1.0, "b": 1.00001e-5})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the weight of b is"):
            integer_weights({"a": 1.0, "b": bad})


def weights_of(generator: np.random.Generator, corpora: int) -> dict[str, float]:
    """Weights from even to very uneven ones."""
    weights = generator.dirichlet(np.full(corpora, generator.choice([0.3, 1, 20]))) + 2 / PERIOD
    return {str(i): float(w) for i, w in enumerate(weights / weights.sum())}


def test_no_corpus_is_ever_a_sample_off() -> None:
    generator = np.random.default_rng(2)
    for n in range(2, 21):
        weights = weights_of(generator, n)
        counts = np.array(list(integer_weights(weights).values()))
        period = int(counts.sum())
        turns = schedule_turns(counts.tolist())
        taken = np.cumsum(turns[:, None] == np.arange(n), axis=0)
        k = np.arange(1, period + 1)[:, None]
        # |taken - k c / M| <= 1 - 1 / (2n - 2), in whole numbers.
        assert (np.abs(taken * period - k * counts) * (2 * n - 2) <= (2 * n - 3) * period).all()
        assert np.array_equal(taken[-1], counts)
        far = np.abs(taken / k - np.array(list(weights.values())))[k[:, 0] >= 1000]
        assert far.size == 0 or far.max() <= 1e-3


def brute_force(phases: list[Phase], samples: int) -> list[tuple[str, int]]:
    """(corpus, number in it) of the first samples, by counting."""
    seen: Counter[str] = Counter()
    result = []
    for k in range(samples):
        phase = [phase for phase in phases if phase.start <= k][-1]
        name = phase.names[phase.turns[(k - phase.start) % phase.period]]
        result.append((name, seen[name]))
        seen[name] += 1
    return result


def test_positions_are_those_of_counting_over_stages_and_periods() -> None:
    phases = [
        Phase(0, {"a": 5, "b": 3}),
        Phase(29, {"b": 1, "c": 6}),
        Phase(30, {"c": 2, "a": 7, "d": 4}),
        Phase(1000, {"a": 1}),
        Phase(1500, {"b": 11, "d": 2}),
    ]
    order, expected = MixtureOrder(phases), brute_force(phases, 3000)
    assert order.names == ["a", "b", "c", "d"]
    corpora, numbers = order.assign_corpora(np.arange(3000))
    assert [(order.names[c], n) for c, n in zip(corpora, numbers)] == expected
    mixed = np.random.default_rng(3).permutation(3000)
    assert np.array_equal(order.assign_corpora(mixed)[1], numbers[mixed])
    for end in (0, 1, 28, 29, 30, 31, 999, 1000, 1001, 1513, 3000):
        counted = Counter(name for name, _ in expected[:end])
        assert order.count_per_corpus(end) == {name: counted[name] for name in order.names}
    # Far away, by the closed form: what period q holds is q periods after the first.
    far = 10**15 // 13 * 13 + 1500
    there, number = order.assign_corpora(np.array([far + 4]))
    near, first = order.assign_corpora(np.array([1504]))
    assert there == near
    assert number - first == (far - 1500) // 13 * phases[-1].counts[order.names[near[0]]]
    for bad in ([], [Phase(1, {"a": 1})], [Phase(0, {"a": 1}), Phase(0, {"b": 1})]):
        with pytest.raises(ValueError, match="phases must start at 0"):
            MixtureOrder(bad)


def make(corpora: dict[str, Path], phases: list[Phase], documents: bool = False) -> Mixture:
    order = MixtureOrder(phases)
    opened = {n: TokenCorpus(corpora[n], "train", LENGTH, 5, documents=documents) for n in order.names}
    for number, name in enumerate(order.names):
        opened[name].order = opened[name].order.with_number(number)
    return Mixture(order, opened, seed=5)


def test_windows_are_those_of_the_corpora_whatever_the_ranks(corpora: dict[str, Path]) -> None:
    phases = [Phase(0, {"code": 5, "math": 3}), Phase(24, {"code": 2, "math": 5, "web": 2})]
    mixture = make(corpora, phases, documents=True)
    expected = brute_force(phases, 96)
    steps: dict[int, list[dict[int, bytes]]] = {}
    for world in (1, 2, 4):
        steps[world] = [{} for _ in range(12)]
        for rank in range(world):
            loader = BatchLoader(mixture, BatchSchedule.constant(8), rank, world, total_samples=96)
            for step, batch in enumerate(loader):
                assert batch.sources is not None
                assert batch.documents is not None
                for sample, source, row, documents in zip(batch.samples, batch.sources, batch.tokens, batch.documents):
                    name, number = expected[sample]
                    assert mixture.order.names[source] == name
                    alone = mixture.corpora[name].read_samples([number])
                    assert torch.equal(alone.tokens[0], row)
                    assert alone.documents is not None
                    assert torch.equal(alone.documents[0], documents)
                    steps[world][step][sample] = row.numpy().tobytes()
            loader.close()
    assert steps[1] == steps[2] == steps[4]
    # Corpora of one size would else be visited in step.
    assert not np.array_equal(
        mixture.corpora["code"].order.window_starts(np.arange(20)),
        mixture.corpora["code"].order.with_number(1).window_starts(np.arange(20)),
    )
    mixture.close()


def test_what_a_corpus_lacks_is_filled_in() -> None:
    def batch(n: int, start: int, **named: Any) -> Batch:
        return Batch(torch.arange(start, start + 3 * n).reshape(n, 3), **named)

    mask = torch.tensor([[False, True, False], [False, False, True]])
    rows = batch(2, 0, loss_mask=mask, positions=torch.tensor([[0, 0, 1], [0, 1, 0]]), padding=(1, 2))
    merged = interleave({4: batch(1, 100), 7: rows}, np.array([7, 4, 7]))
    assert merged.tokens.tolist() == [[0, 1, 2], [100, 101, 102], [3, 4, 5]]
    assert merged.loss_mask.tolist() == [mask[0].tolist(), [True] * 3, mask[1].tolist()]
    assert merged.positions.tolist() == [[0, 0, 1], [0, 1, 2], [0, 1, 0]]
    assert merged.padding == (1, 0, 2)
    assert merged.sources == (7, 4, 7)
    assert merged.documents is None
    alone = interleave({7: rows}, np.array([7, 7]))
    assert alone.sources == (7, 7)
    assert alone.loss_mask is mask


def test_a_run_on_a_mixture_says_what_it_takes(
    configure: Callable[..., RunConfig],
    corpora: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = mixture_option(corpora, code=0.5, math=0.3, web=0.2)
    config = configure(f"--run.root={tmp_path}", option, "--logging.tensorboard=true", "--eval.sequences=7")
    assert train(config) == 0
    assert "data mixture: code 0.50 (0.0571 epochs), math 0.30 (" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    order = MixtureOrder([Phase(0, integer_weights({"code": 0.5, "math": 0.3, "web": 0.2}))])
    for record in records:
        assert record["sources"] == order.count_per_corpus(4 * record["step"])
        # 9000 tokens hold 280 windows of 32 and one token more.
        assert record["epochs"]["code"] == pytest.approx(record["sources"]["code"] / 280)
    evaluated = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])
    each = evaluated["sources"]
    assert list(each) == ["code", "math", "web"]
    shares = {"code": 0.5, "math": 0.3, "web": 0.2}
    for loops, loss in evaluated["losses"].items():
        assert loss == pytest.approx(sum(shares[name] * each[name][loops] for name in each), abs=1e-4)
    again = evaluate_checkpoint(str(tmp_path / "run"), [1, 3], 7)
    assert again["sequences"] == 6
    assert again["sources"] == {name: pytest.approx(values, abs=1e-6) for name, values in each.items()}
    assert again["losses"] == pytest.approx(evaluated["losses"], abs=1e-4)
    header = next(line for line in capsys.readouterr().out.splitlines() if "perplexity" in line)
    assert header.split()[:8] == ["T", "loss", "perplexity", "bits/byte", "+-", "code", "math", "web"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"data/epochs/code", "data/sources/web", "valid/loss_T3", "valid/math/loss_T1", "train/loss"} <= names
    assert not any(name.startswith(("train/epochs", "train/sources")) for name in names)


def test_validation_is_of_the_same_windows_whatever_the_weights(
    configure: Callable[..., RunConfig], corpora: dict[str, Path]
) -> None:
    windows = [
        open_prepared_data(configure(mixture_option(corpora, code=w, math=1), "--eval.sequences=12"), 2).validation
        for w in (1, 9)
    ]
    for name in ("code", "math"):
        assert windows[0][name].count == 6
        assert torch.equal(windows[0][name].rows.tokens, windows[1][name].rows.tokens)
    three = configure(mixture_option(corpora, code=1, math=1, web=1), "--eval.sequences=8")
    said = open_prepared_data(three, 1).describe(9)[-1]
    assert said.startswith(
        "validation takes 6 windows, fewer than eval.sequences 8: from each corpus a multiple of the 1 "
    )
    with pytest.raises(ConfigError, match="fewer than 3 data-parallel ranks for each of 2 corpora"):
        open_prepared_data(configure(mixture_option(corpora, code=1, math=1), "--eval.sequences=5"), 3)


def test_corpora_that_do_not_go_together_are_refused(
    configure: Callable[..., RunConfig], corpora: dict[str, Path], tmp_path: Path
) -> None:
    other = write_corpus(tmp_path / "other", corpora["code"], [[np.arange(500)]], [[np.arange(400)]])
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    two = mixture_option({**corpora, "other": other}, code=1, other=1)
    with pytest.raises(DataError, match="is not the tokenizer that made these shards"):
        open_prepared_data(configure(two), 1)
    pair = [load_manifest(corpora["code"]), load_manifest(other)]
    with pytest.raises(ConfigError, match=rf"{corpora['code']} and {other} were made with different tokenizers"):
        check_tokenizers(pair, ModelConfig(vocab_size=512))


def test_the_remedy_for_another_vocabulary_is_one() -> None:
    """Padding rows count: what the message says to set is accepted."""
    padded = ModelConfig(vocab_size=512, unused_ids=12)
    check_vocabulary(padded, 500, "t")
    with pytest.raises(
        ConfigError, match=r"of which model\.unused_ids 12 .* has 510 pieces. Set --model\.vocab_size 522"
    ):
        check_vocabulary(padded, 510, "t")
    check_vocabulary(dataclasses.replace(padded, vocab_size=522), 510, "t")


def test_a_corpus_that_is_given_twice_is_refused(
    configure: Callable[..., RunConfig], corpora: dict[str, Path], tmp_path: Path
) -> None:
    """Through a link, or as a copy."""
    (tmp_path / "link").symlink_to(corpora["code"])
    with pytest.raises(ConfigError, match=r"entry 2 \(.*link\) is the corpus of entry 1 \(.*code\)\. Give it once"):
        configure(mixture_option({**corpora, "link": tmp_path / "link"}, code=1, link=1))
    copy = shutil.copytree(corpora["code"], tmp_path / "copy")
    config = configure(mixture_option({**corpora, "copy": copy}, code=1, copy=1))
    with pytest.raises(ConfigError, match=r"code and .*copy hold the same shards\. Give the corpus once"):
        open_prepared_data(config, 1)


def test_validation_that_is_training_text_is_refused(
    configure: Callable[..., RunConfig], corpora: dict[str, Path], tmp_path: Path
) -> None:
    """In one corpus, or between two of a mixture; a run that does not evaluate may have it."""
    first, second, third = ([np.arange(size)] for size in (500, 400, 300))
    same = write_corpus(tmp_path / "same", corpora["code"], [first], [first])
    one = write_corpus(tmp_path / "one", corpora["code"], [first], [third])
    crossed = write_corpus(tmp_path / "crossed", corpora["code"], [second], [first])
    mixed = mixture_option({"one": one, "crossed": crossed}, one=1, crossed=1)
    message = r"valid/shard-00000, which is for validation, has the tokens of .*/train/shard-00000\. Prepare it from"
    for words in ([f"--data.path={same}"], [mixed]):
        with pytest.raises(ConfigError, match=message):
            open_prepared_data(configure(*words), 1)
        open_prepared_data(configure(*words, "--eval.every=0"), 1)
    open_prepared_data(configure(f"--data.path={crossed}"), 1)


def test_more_epochs_than_allowed_are_refused_with_a_table(
    configure: Callable[..., RunConfig], corpora: dict[str, Path]
) -> None:
    entries = [
        {"path": str(corpora["code"]), "weight": 3},
        {"path": str(corpora["web"]), "weight": 1, "name": "small", "max_tokens": 161, "max_epochs": 1.5},
    ]
    config = configure(f"--data.mixture={json.dumps(entries)}")
    data = open_prepared_data(config, 1)
    assert data.mixture.corpora["small"].samples_per_epoch == 4
    device = torch.device("cpu")
    data.loader(0, 24, 0, device).close()  # 6 of 4 samples: one and a half
    with pytest.raises(ConfigError) as caught:
        data.loader(0, 28, 0, device)
    lines = str(caught.value).splitlines()
    assert "the run takes 7 samples, 1.75 epochs of the 4 in" in lines[0]
    assert "more than its max_epochs 1.5. Lower its weight" in lines[0]
    assert lines[1].split() == ["corpus", "weight", "samples", "epochs", "max_epochs"]
    assert lines[2].split() == ["code", "0.75", "21", "0.07", "100"]
    assert lines[3].split() == ["small", "0.25", "7", "1.75", "1.5"]
    # Only the first tokens are read.
    rows = data.mixture.corpora["small"].read_samples(range(4)).tokens
    first = TokenCorpus(corpora["web"], "train", LENGTH, 0).read(np.arange(4) * LENGTH).tokens
    assert sorted(rows.tolist()) == sorted(first.tolist())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{path: a, wieght: 1}]", "entry 1 has the key wieght, which does not exist. Did you mean weight?"),
        (
            "[{path: a, weight: 1}, {weight: 1}]",
            "entry 2 has no path. It takes path, weight, name, max_epochs, max_tokens.",
        ),
        ("[{path: a, weight: much}]", "entry 1: weight needs a number, not 'much'."),
        ("[{path: a, weight: true}]", "entry 1: weight needs a number, not True."),
        ("[{path: 3, weight: 1}]", "entry 1: path needs text, not 3."),
        ("[{path: a, weight: 1, max_tokens: 1.5}]", "entry 1: max_tokens needs a whole number, not 1.5."),
        ("[{path: a, weight: 1, max_epochs: x}]", "entry 1: max_epochs needs a number or null, not 'x'."),
        ("a,b", "needs a list of mappings such as '[{path: ..., weight: ...}]', not 'a,b'."),
        ("{path: a}", "needs a list of mappings"),
        ("[{path: x/a, weight: 1}, {path: y/a, weight: 1}]", "entry 2 (y/a) is called a like entry 1."),
        (
            "[{path: x/a, weight: 1}, {path: x/../x/a/, weight: 1, name: b}]",
            "entry 2 (x/../x/a/) is the corpus of entry 1",
        ),
        ("[{path: a, weight: 0}]", "data.mixture: the weight of a is 0.0, it must be above 0."),
        ("[{path: a, weight: 1}, {path: b, weight: 1e-6}]", "the weight of b is 1e-06 of all, less than 1/65536."),
        ("[{path: a, weight: 1, max_epochs: 0}]", "entry 1 (a) has max_epochs 0.0, it must be above 0."),
        ("[{path: a, weight: 1, max_tokens: -1}]", "entry 1 (a) has max_tokens -1"),
        ("[{path: a, weight: 1, max_tokens: 3}]", "entry 1 (a) has max_tokens 3, fewer than 2 x train.sequence_length"),
        ("[{path: a, weight: 1, name: b/c}]", "entry 1 (a) is called 'b/c', which is no name."),
    ],
)
def test_wrong_mixtures_are_explained(value: str, message: str, configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configure(f"--data.mixture={value}")


def test_mixtures_are_read_and_written(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = configure("--data.mixture", "[{path: x/a, weight: 7}, {path: b/, weight: 3, name: c, max_epochs: 2}]")
    expected = [CorpusConfig("x/a", 7.0), CorpusConfig("b/", 3.0, "c", 2.0)]
    assert config.data.mixture == expected
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert [(c.name, c.max_epochs) for c in config.data.corpora()] == [("a", 100.0), ("c", 2.0)]
    file.write_text("data:\n  mixture:\n  - path: a\n    weight: 1\n  - {path: b, weight: 2}\n  max_epochs: 3\n")
    assert load_config(file).data.corpora()[1] == CorpusConfig("b", 2.0, "b", 3.0)
    assert load_config(file, ["--data.mixture=[]"]).data.corpora() == [CorpusConfig("data/corpus", 1.0, "corpus", 3.0)]
    given = [{"path": "d", "weight": 1}]
    assert load_config(file, {"data.mixture": given}).data.mixture == [CorpusConfig("d", 1.0)]
    file.write_text("data:\n  mixture:\n  - {path: b, wieght: 2}\n")
    with pytest.raises(ConfigError, match=rf"{file}: key data.mixture: entry 1 has the key wieght"):
        load_config(file)

"""Examples of a made-up task, and a model that answers some of them, for tests of scores."""

from pathlib import Path

import numpy as np
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.data import Batch
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from tests.data.corpora import ExampleDocument, write_example_corpus

VOCABULARY, BOS = 7, 0
TASKS = ["last", "first"]


def make_model(seed: int = 0, **changes: object) -> RecurrentDepthTransformer:
    """A model in float64 whose predictions depend on T and on the whole sequence."""
    options = {"vocab_size": VOCABULARY, "dim": 16, "prelude_layers": 0, "core_layers": 1, "coda_layers": 0, "heads": 2}
    config = ModelConfig(**{**options, "kv_heads": 2, "tie_embeddings": False, **changes})  # type: ignore[arg-type]
    model = initialize(RecurrentDepthTransformer(config), seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def make_group(difficulty: int, rows: int = 13, seed: int = 0, trained: bool = True, task: str = "sum") -> ExampleGroup:
    """Examples of unequal lengths whose answers are one to three ids, padded on the right."""
    generator = torch.Generator().manual_seed(100 * seed + difficulty)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    examples, masks = [], []
    for _ in range(rows):
        prompt, answer = int(draw(1, difficulty + 3, 1)), int(draw(1, 4, 1)) if difficulty > 2 else 1
        examples.append(torch.cat((torch.tensor([BOS]), draw(1, VOCABULARY, prompt + answer), torch.tensor([BOS]))))
        masks.append(torch.tensor([False] * (1 + prompt) + [True] * answer + [False]))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = Batch(pad(examples, batch_first=True), loss_mask=pad(masks, batch_first=True))
    return ExampleGroup(task, difficulty, batch, trained)


def list_examples(group: ExampleGroup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The examples one by one: ids (length,) up to the answer's end, and the mask of the answer's ids."""
    assert group.batch.loss_mask is not None
    examples = []
    for ids, mask in zip(group.batch.tokens, group.batch.loss_mask):
        end = int(mask.nonzero()[-1]) + 1
        examples.append((ids[:end], mask[:end]))
    return examples


def make_example(generator: np.random.Generator, task: int, difficulty: int) -> ExampleDocument:
    """BOS, a word of `difficulty` elements, its last or first element as the answer, EOS."""
    word = generator.integers(10, 14, difficulty).tolist()
    tokens = [1, *word, 20 + word[task - 1], 2]
    return ExampleDocument(tokens, tokens, [0] * (1 + difficulty) + [1, 0], task, difficulty, 1)


def write_task_corpus(directory: Path, like: Path) -> Path:
    """Write a corpus of both tasks: difficulties 1 and 2 in training; 1, 2 and 5, 12 examples each, in validation."""
    generator = np.random.default_rng(0)

    def draw(difficulties: tuple[int, ...], count: int) -> list[ExampleDocument]:
        return [make_example(generator, task, d) for d in difficulties for task in (0, 1) for _ in range(count)]

    splits = {"train": [draw((1, 2), 40)], "valid": [draw((1, 2, 5), 12)]}
    return write_example_corpus(directory, like, splits, TASKS, labels=False)


def task_options(corpus: Path) -> list[str]:
    """Options of a short run on that corpus, beside those of a tiny run."""
    words = {"data.path": corpus, "data.pack": "example", "train.sequence_length": 8, "optimizer.lr": 0.02}
    return [*(f"--{key}={value}" for key, value in words.items()), "--train.steps=12", "--train.micro_batch=4"]

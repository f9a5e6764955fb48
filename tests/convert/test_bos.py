"""BOS from a source to its export: training sees what the source saw, and an export declares what training saw."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer, LlamaConfig

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.convert import convert
from megatron_rdt.convert.hf_export import export_hf
from megatron_rdt.convert.recognize import ImportOptions
from megatron_rdt.data import TokenCorpus, Tokenizer, load_manifest
from megatron_rdt.inference import load
from megatron_rdt.inference.text import generate_text
from megatron_rdt.train.trainer import train
from tests.convert.test_import_dense import SIZES, write_dense

pytestmark = pytest.mark.slow

CUT = ImportOptions("2,2,2")
TEXT = "def f(x):\n    return x\n"
# By model family: template of its tokenizer, names in its settings, BOS in the model's config, and whether training sees BOS.
FAMILIES = {
    "llama": ("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}, 1, True),
    "a template with EOS": ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, 1, True),
    "qwen": (None, {"bos_token": None, "eos_token": "</s>"}, 2, False),
    "olmo": (None, {"bos_token": "</s>", "eos_token": "</s>"}, None, False),
    "smollm": (None, {"bos_token": "<s>", "eos_token": "</s>"}, 1, False),
}


def write_tokenizer(folder: Path, family: str) -> Path:
    """Write a byte-level tokenizer of a family's kind, as its folder has it."""
    template, settings, _, _ = FAMILIES[family]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([TEXT] * 5, trainer)
    if template is not None:
        pairs = [(token, specials.index(token)) for token in ("<s>", "</s>")]
        model.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=pairs)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return folder


def write_texts(folder: Path, prompt: str = "") -> Path:
    """Write documents to train on, each with a prompt that does not count if there is one."""
    folder.mkdir()
    records = [{"text": TEXT * 20 + f"# {i}\n", **({"prompt": prompt} if prompt else {})} for i in range(20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def prepare_texts(texts: Path, out: Path, tokenizer: Path, prompt_field: str = "") -> Path:
    """Prepare the documents with a tokenizer."""
    named = {
        "prompt_field": prompt_field,
        "valid_fraction": 0.3,
        "dedup": "none",
        "max_repeated_lines": 1.0,
        "max_repeated_ngrams": 1.0,
    }
    return prepare(PrepConfig(sources=[str(texts)], out=str(out), tokenizer=str(tokenizer), workers=1, **named))  # type: ignore[arg-type]


def open_tokens(corpus: Path) -> TokenCorpus:
    return TokenCorpus(load_manifest(corpus), "train", 32, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_what_the_source_saw_and_the_export_declares_it(family: str, tmp_path: Path) -> None:
    """The ids of a text are those of the source in the corpus and in the export; BOS is named if it is among them."""
    _, settings, declared, has_bos = FAMILIES[family]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", family)
    _, source = write_dense(tmp_path / "saved", LlamaConfig(**SIZES | {"bos_token_id": declared}), tokenizer)
    checkpoint = convert(str(source), str(tmp_path / "native"), "native", CUT)

    corpus = prepare_texts(write_texts(tmp_path / "texts"), tmp_path / "corpus", checkpoint / "tokenizer")
    opened, own = open_tokens(corpus), Tokenizer(tokenizer)
    assert opened.begins_with_bos is has_bos
    assert load_manifest(corpus).document["prep"]["prepend_bos"] is has_bos
    expected = AutoTokenizer.from_pretrained(source)(TEXT).input_ids
    expected = expected[:-1] if expected[-1] == own.eos else expected
    assert expected == ([own.bos] if has_bos else []) + own.encode(TEXT)
    documents = split_documents(opened, own.eos)
    assert all(document[: len(expected)] == expected for document in documents)

    words: dict[str, object] = {
        **{"run.root": tmp_path / "runs", "run.name": "on", "data.path": corpus, "train.steps": 1, "eval.every": 0},
        **{"train.global_batch": 1, "train.micro_batch": 1, "train.sequence_length": 24, "schedule.warmup_steps": 0},
        **{"train.device": "cpu", "logging.tensorboard": "false", "data.max_epochs": 10},
        **{"depth.curriculum_steps": 1, "sample.loops": "[1]"},
    }
    config = load_config(checkpoint / "continue.yaml", [f"--{name}={value}" for name, value in words.items()])
    assert train(config, init=str(checkpoint)) == 0
    for trained in (checkpoint, tmp_path / "runs" / "on"):
        exported = convert(str(trained), str(tmp_path / f"hf-{trained.name}"), "hf")
        loaded = AutoTokenizer.from_pretrained(exported)
        assert loaded(TEXT).input_ids == expected
        assert loaded.bos_token == (settings["bos_token"] if has_bos else None)
        assert json.loads((exported / "config.json").read_text())["bos_token_id"] == (own.bos if has_bos else None)
        assert loaded.eos_token_id == own.eos
        # The way back, and what goes on from an export, fit the corpus; prompts begin as documents did.
        for folder in (trained, exported):
            assert load(folder)[1].encode_document(TEXT) == expected
            assert load(folder)[1].encodes_like(own)
        assert generate_text(str(exported), "def", 1, 2, 0, 0, 1.0, 0).startswith("def")
        again = convert(str(exported), str(tmp_path / f"again-{trained.name}"), "native")
        words |= {"run.name": f"on-{trained.name}"}
        config = load_config(again / "continue.yaml", [f"--{name}={value}" for name, value in words.items()])
        assert train(config, init=str(again)) == 0


def split_documents(corpus: TokenCorpus, eos: int) -> list[list[int]]:
    """Return the documents of a split, without their EOS."""
    tokens = [int(token) for shard in corpus._shards for token in shard.read(0, corpus.tokens)]
    ends = [i for i, token in enumerate(tokens) if token == eos]
    return [tokens[first:end] for first, end in zip([0, *(end + 1 for end in ends)], ends)]


def test_a_model_that_went_on_without_bos_declares_none(tmp_path: Path) -> None:
    """The tokenizer's template puts BOS in front of a text, but the corpus is from elsewhere and has none."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "llama")
    _, source = write_dense(tmp_path / "saved", LlamaConfig(**SIZES), tokenizer)
    checkpoint = convert(str(source), str(tmp_path / "native"), "native", CUT)
    state = json.loads((checkpoint / "trainer.json").read_text())
    assert state["begins_with_bos"]
    # As the checkpoint of a run on such a corpus records it.
    without = Path(shutil.copytree(checkpoint, tmp_path / "without"))
    file = without / "trainer.json"
    file.write_text(json.dumps(state | {"begins_with_bos": False}))
    exported = tmp_path / "hf"
    exported.mkdir()
    export_hf(without, exported)
    loaded, own = AutoTokenizer.from_pretrained(exported), Tokenizer(tokenizer)
    assert (loaded.bos_token, loaded(TEXT).input_ids) == (None, own.encode(TEXT))
    assert load(exported)[1].encode_document(TEXT) == own.encode(TEXT)


def test_bos_before_a_prompt_counts_as_little_as_the_prompt(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "llama")
    corpus = prepare_texts(write_texts(tmp_path / "texts", "def"), tmp_path / "corpus", tokenizer, "prompt")
    opened, own = TokenCorpus(load_manifest(corpus), "train", 32, 0, loss_mask=True), Tokenizer(tokenizer)
    batch = opened.read_samples(range(4))
    assert batch.loss_mask is not None
    first = batch.tokens == own.bos
    assert first.any()
    assert not batch.loss_mask[first].any()
    assert not batch.loss_mask[:, 1:][first[:, :-1]].any()  # the prompt


@pytest.mark.parametrize("family", ["llama", "smollm"])
def test_a_stream_begins_documents_alike(family: str, configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    tokenizer, texts = write_tokenizer(tmp_path / "tokenizer", family), write_texts(tmp_path / "texts")
    words = [f"--data.path=hf:{texts}", f"--data.tokenizer={tokenizer}", "--train.steps=1", "--eval.every=0"]
    words.append(f"--model.vocab_size={Tokenizer(tokenizer).vocab_size}")
    config = configure(f"--run.root={tmp_path}", *words, "--schedule.warmup_steps=0")
    assert train(config) == 0
    run, has_bos = tmp_path / "run", FAMILIES[family][3]
    assert load(run)[1].begins_with_bos is has_bos
    loaded = AutoTokenizer.from_pretrained(convert(str(run), str(tmp_path / "hf"), "hf"))
    assert loaded(TEXT).input_ids == ([1] if has_bos else []) + Tokenizer(tokenizer).encode(TEXT)
    assert loaded.bos_token_id == (1 if has_bos else None)

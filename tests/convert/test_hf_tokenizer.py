"""An export has exactly the tokenizer of the run, or none that transformers would load."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentencepiece

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.stages.tokenizer.write_tokenizer import write_tokenizer
from megatron_rdt.config import RunConfig
from megatron_rdt.convert.hf_export import export_hf
from megatron_rdt.convert.hf_tokenizer import export_tokenizer
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import read_settings
from megatron_rdt.errors import CheckpointError
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from megatron_rdt.inference import load
from megatron_rdt.inference.text import generate_text, to_stop_ids
from megatron_rdt.train.trainer import train

pytestmark = pytest.mark.slow

LOSSLESS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
}
OTHER_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


@pytest.fixture(scope="module")
def checkpoint(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    assert train(configure(f"--run.root={root}", "--train.steps=1", "--schedule.warmup_steps=0", "--eval.every=0")) == 0
    return root / "run" / "checkpoints" / "step-00000001"


@pytest.fixture
def export(checkpoint: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., tuple[Path, Tokenizer]]:
    """Function that exports the checkpoint with a SentencePiece tokenizer of given settings."""

    def lines() -> Iterator[str]:
        for path in sorted(tiny_text.iterdir()):
            yield from path.read_text(encoding="utf-8").split("\n")

    def build(damage: Callable[[Path], None] | None = None, **settings: object) -> tuple[Path, Tokenizer]:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=512, minloglevel=2, **settings
        )
        source, out = Path(shutil.copytree(checkpoint, tmp_path / "source")), tmp_path / "out"
        shutil.rmtree(source / "tokenizer")
        tokenizer = write_tokenizer(model.getvalue(), source / "tokenizer", ["def f(x):\n    return x\n"])
        if damage is not None:
            damage(source / "tokenizer")
        out.mkdir()
        export_hf(source, out)
        return out, tokenizer

    return build


def check_ids(folder: Path, **expected: int | None) -> None:
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        assert {name: settings[f"{name}_token_id"] for name in expected} == expected, file


def check_left_out(folder: Path, tokenizer: Tokenizer, said: str, *parts: str) -> None:
    """Check that transformers finds no tokenizer in the folder, and that the console and the card say why."""
    from transformers import AutoTokenizer

    card = (folder / "README.md").read_text()
    assert "the tokenizer is left out" in said
    assert "There is no tokenizer for transformers here" in card
    for part in parts:
        assert part in said
        assert part in card
    with pytest.raises(ValueError, match="tokenizer"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert Tokenizer(folder / "tokenizer" / "tokenizer.model").fingerprint == tokenizer.fingerprint
    model, loaded = load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert model.config.vocab_size == 512


@pytest.mark.parametrize("settings", [{"model_type": "bpe"}, {"model_type": "unigram", **LOSSLESS}])
def test_a_tokenizer_that_does_not_convert_is_left_out(
    settings: dict, export: Callable[..., tuple[Path, Tokenizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = export(**settings, **OTHER_IDS)
    check_ids(folder, bos=None, eos=1, pad=0)
    check_left_out(folder, tokenizer, capsys.readouterr().out, "no exact tokenizer.json", "tokenizer/tokenizer.model")


def test_other_special_ids_reach_transformers(
    export: Callable[..., tuple[Path, Tokenizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    folder, tokenizer = export(model_type="bpe", eos_piece="<end>", **LOSSLESS, **OTHER_IDS)
    check_ids(folder, bos=None, eos=1, pad=0)
    assert "left out" not in capsys.readouterr().out + (folder / "README.md").read_text()
    exported = AutoTokenizer.from_pretrained(folder)
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (None, 1, 0)
    assert (exported.eos_token, len(exported)) == ("<end>", tokenizer.vocab_size)
    for text in ("def f(x):\n\treturn  x + 1234\n", " lead  and trail ", "\u00e9moji \U0001f389 \x00 end"):
        assert exported(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert load(folder)[1].fingerprint == tokenizer.fingerprint


def without_a_merge(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    del document["model"]["merges"][-1]  # the rarest piece's
    (folder / "tokenizer.json").write_text(json.dumps(document))


def with_another_id(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def cut(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(without_a_merge, "gives other ids"), (with_another_id, "is id"), (cut, "cannot be loaded")],
)
def test_a_tokenizer_json_that_differs_is_left_out(
    damage: Callable[[Path], None],
    reason: str,
    export: Callable[..., tuple[Path, Tokenizer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, tokenizer = export(damage, model_type="bpe", **LOSSLESS)
    check_ids(folder, bos=None, eos=2, pad=None)
    check_left_out(folder, tokenizer, capsys.readouterr().out, reason)


def test_a_hugging_face_tokenizer_from_text_to_export(
    configure: Callable[..., RunConfig],
    tiny_text: Path,
    tokenizer_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer

    given, corpus, out = tokenizer_folders["hf"], tmp_path / "corpus", tmp_path / "out"
    prepare(PrepConfig(sources=[str(tiny_text)], out=str(corpus), tokenizer=str(given), valid_fraction=0.2, workers=1))
    words = ["--train.steps=1", "--schedule.warmup_steps=0", "--eval.every=0", "--model.vocab_size=513"]
    config = configure(f"--run.root={tmp_path}", f"--data.path={corpus}", *words)
    assert train(config) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"

    model, tokenizer = load(checkpoint)
    assert (tokenizer.kind, model.config.vocab_size) == ("hf", 513)
    assert generate_text(str(checkpoint), "def \u00e9", 2, 5, 1.0, 0, 1.0, 0).startswith("def \u00e9")
    assert to_stop_ids(tokenizer, ["<|end|>", "<tool>", "\n"]) == [0, 512, *tokenizer.encode("\n")]
    result = evaluate_checkpoint(str(checkpoint), [2], 10_000)
    # One EOS per document counts as a token of no bytes, and some tokens at the end fill no window.
    texts = [path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir())]
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert result["bytes_per_token"] == pytest.approx(sum(len(t.encode()) for t in texts) / tokens, rel=0.1)

    out.mkdir()
    export_hf(checkpoint, out)
    assert "left out" not in capsys.readouterr().out + (out / "README.md").read_text()
    assert (out / "special_tokens_map.json").read_bytes() == (given / "special_tokens_map.json").read_bytes()
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (given, out))
    assert after == {**before, "post_processor": None}  # the template that adds <|end|>, with which nothing was trained
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (given, out))
    assert after == {**before, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}
    check_ids(out, bos=None, eos=0, pad=1)
    exported = AutoTokenizer.from_pretrained(out, split_special_tokens=True)
    assert all(exported(text).input_ids == tokenizer.encode(text) for text in texts[:5])
    assert load(out)[1].fingerprint == tokenizer.fingerprint


END, TOOL = {"content": "<|end|>"}, {"content": "<tool>", "lstrip": False}
DECODER = {"0": {"content": "<|end|>", "special": True}, "1": {"content": "<|pad|>", "special": True}}


@pytest.mark.parametrize(
    ("settings", "specials"),
    [
        ({"eos_token": "<|end|>"}, {"eos_token": TOOL}),
        ({"eos_token": TOOL, "pad_token": "<|pad|>"}, {"eos_token": "<|end|>", "pad_token": "<|end|>"}),
        ({"eos_token": "<|end|>"}, {"eos_token": None, "bos_token": "<tool>"}),
        ({"added_tokens_decoder": DECODER}, {"eos_token": "<|end|>", "pad_token": "<|pad|>"}),
        ({"added_tokens_decoder": DECODER, "eos_token": "<|pad|>"}, {"eos_token": END, "bos_token": END}),
        ({"added_tokens_decoder": DECODER, "eos_token": None}, {"eos_token": END}),
    ],
)
def test_files_that_name_other_special_tokens_are_exported_with_those_of_the_run(
    settings: dict, specials: dict, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    given, out = tmp_path / "given", tmp_path / "out"
    shutil.copytree(tokenizer_folders["hf"], given)
    out.mkdir()
    (given / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **settings}))
    (given / "special_tokens_map.json").write_text(json.dumps(specials))
    tokenizer = Tokenizer(given)
    assert export_tokenizer(given, out, 32) == ""
    ids = [None if index < 0 else index for index in (tokenizer.bos, tokenizer.eos, tokenizer.pad)]
    assert ids[1] is not None
    exported = AutoTokenizer.from_pretrained(out)
    assert [exported.bos_token_id, exported.eos_token_id, exported.pad_token_id] == ids
    assert len(exported) == tokenizer.vocab_size
    assert Tokenizer(out).fingerprint == tokenizer.fingerprint
    assert read_settings(out).contradictions == []


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": DECODER}])
def test_names_that_only_transformers_uses_are_exported_with_their_ids_or_not_at_all(
    decoder: dict, tokenizer_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers gives a new id, beyond the model's, to a named token that tokenizer.json lacks."""
    from transformers import AutoTokenizer

    given, out = tmp_path / "given", tmp_path / "out"
    shutil.copytree(tokenizer_folders["hf"], given)
    out.mkdir()
    settings = {"eos_token": "<|end|>", "unk_token": "<|pad|>", "mask_token": "[MASK]", **decoder}
    (given / "tokenizer_config.json").write_text(json.dumps(settings))
    (given / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<tool>", "sep_token": "<|pad|>"}))
    tokenizer = Tokenizer(given)
    assert export_tokenizer(given, out, 32) == ""
    assert (
        "mask_token '[MASK]' is no token of tokenizer.json: the export leaves the name out" in capsys.readouterr().out
    )
    exported = AutoTokenizer.from_pretrained(out)
    assert (exported.unk_token, exported.sep_token, exported.mask_token) == ("<|pad|>", "<|pad|>", None)
    assert len(exported) == tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", "Evil", None])
def test_an_export_names_no_code_and_no_other_file(
    kind: str | None, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    source, out = Path(shutil.copytree(tokenizer_folders["hf"], tmp_path / "source")), tmp_path / "out"
    out.mkdir()
    references = {
        "auto_map": {"AutoTokenizer": ["stranger/repository--code.Evil", None]},
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "../vocab.json",
        "name_or_path": "stranger/repository",
        "merges": [],
    }
    settings = {"tokenizer_class": kind, "pad_token": "<|pad|>", "padding_side": "left", **references}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    specials = json.loads((source / "special_tokens_map.json").read_text())
    (source / "special_tokens_map.json").write_text(json.dumps({**specials, **references}))
    assert export_tokenizer(source, out, 32) == ""
    exported = json.loads((out / "tokenizer_config.json").read_text())
    assert exported["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert exported["padding_side"] == "left"
    names = {*exported, *json.loads((out / "special_tokens_map.json").read_text())}
    assert not names & set(references)


def test_unigram_is_exported(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    assert export_tokenizer(tokenizer_folders["unigram"], tmp_path, 32) == ""
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} == {path.name for path in tmp_path.iterdir()}
    assert Tokenizer(tmp_path).fingerprint == Tokenizer(tmp_path / "tokenizer.model").fingerprint


def test_a_tokenizer_of_more_ids_than_the_embedding_is_refused(
    checkpoint: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    source, out = Path(shutil.copytree(checkpoint, tmp_path / "source")), tmp_path / "out"
    shutil.rmtree(source / "tokenizer")
    shutil.copytree(tokenizer_folders["unigram"], source / "tokenizer")
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer has \d+ ids, the embedding 512 rows"):
        export_hf(source, out)

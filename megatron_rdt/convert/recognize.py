"""Recognise what a folder or file holds, and plan its conversion: config, rules, tokenizer, before a weight is read."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig, RunConfig, load_config, read_saved_model
from megatron_rdt.convert.hf import CONFIG_FILE, MODEL_TYPE, PREFIX, check_tokenizer, describe_call_settings
from megatron_rdt.convert.hf_tokenizer import HIDDEN_FOLDER
from megatron_rdt.convert.import_plan import DEEPSPEED, OWN_EXPORT, ImportPlan, open_source_tokenizer
from megatron_rdt.convert.similarity import choose_cut
from megatron_rdt.convert.sources import dense, huginn, open_mythos, ouro, parcae
from megatron_rdt.convert.sources.files import PYTORCH, SAFETENSORS, SourceWeights, open_source_weights, read_settings
from megatron_rdt.convert.sources.rules import Rule, check_names, read_count
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.zero_universal import WEIGHT, load_tensor
from megatron_rdt.run_directory import CHECKPOINTS
from megatron_rdt.untrusted_files import WRONG_CONTENT

LOOPED = (huginn, parcae, ouro, open_mythos)
# Settings of other projects that say how many tokens a sequence of the training had.
LENGTHS = ("max_position_embeddings", "block_size", "max_seq_len")
# The remedy for the tokenizer of an export that is not as it was written.
SAVED_AGAIN = (
    "Where transformers has saved it again, in another form, name the folder of the original in --tokenizer, or this one if "
    "you know that its ids are the same."
)
# Models that transformers has, and why they are none of ours; by model_type.
REFUSED = {
    "hrm_text": "HRM-Text loops two stacks of layers with a state each, one inside the other's loop; here there is one core "
    "and one state",
    "smollm3": "SmolLM3 has layers without rotary positions among others; here all layers have them or none",
    "olmo": "OLMo 1 normalises with LayerNorm without gains; here every norm is an RMSNorm",
    "olmo3": "OLMo 3 mixes layers with and without a sliding window; here all layers of a model have the same attention",
    "recurrent_gemma": "RecurrentGemma recurs over positions, not over depth",
    "gpt2": "GPT-2 has learned positions, LayerNorm and biases that no layer here has",
}


@dataclass(frozen=True)
class ImportOptions:
    """Options of `rdt convert` for a source that is no checkpoint of a run.

    Attributes:
        cut: "P,R,C", the layers of prelude, core and coda of a dense model, or "auto".
        tokenizer: its folder, where the source has none; "" looks in the source.
        config: the config of the source's model, where it lies elsewhere; "" looks in the source.
    """

    cut: str = "auto"
    tokenizer: str = ""
    config: str = ""


def is_foreign(path: Path) -> bool:
    """Return True for what is no run and no checkpoint of one: a file, or a folder with weights but no manifest."""
    if path.is_file():
        return path.suffix in (*SAFETENSORS, *PYTORCH)
    own = (path / name for name in ("manifest.json", "trainer.json", CHECKPOINTS))
    if not path.is_dir() or any(map(os.path.lexists, own)):
        return False
    kinds = (*SAFETENSORS, *PYTORCH)
    has_weights = (path / CONFIG_FILE).is_file() or any(file.suffix in kinds for file in path.iterdir())
    return has_weights or _is_universal(path)


def _is_universal(path: Path) -> bool:
    """Return True for a folder of DeepSpeed's universal layout."""
    return any(path.glob(f"zero/*/{WEIGHT}.pt"))


def plan_import(path: Path, options: ImportOptions) -> ImportPlan:
    """Recognise a source and plan its conversion.

    Raises:
        CheckpointError: it is of no known kind, has no equal here, or is damaged.
        ConfigError: options are missing or do not fit.
    """
    try:
        plan = _recognize(path, options)
        plan.check()
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be converted: {error}.") from None
    except WRONG_CONTENT as error:
        reason = f"its config holds another kind of value than such a model has ({type(error).__name__}: {error})"
        raise CheckpointError(f"{path} cannot be converted: {reason}.") from error
    return plan


def _recognize(path: Path, options: ImportOptions) -> ImportPlan:
    """Return the plan of a source; ValueError for what has no equal here."""
    folder = path.parent if path.is_file() else path
    if options.config and not Path(options.config).is_file():
        raise ConfigError(f"--config names {options.config}, which is no file. Name the config of the source's model.")
    if _is_universal(path):
        found = _find_run_config(folder, options)
        return _plan_own(path, folder, options, DEEPSPEED, found, _open_universal(path), "")
    weights = open_source_weights(path)
    # What the user names counts most, then what the file of weights says, then what lies around it.
    settings = {} if options.config else weights.config
    if not settings:
        run_config = _find_run_config(folder, options)
        if run_config is not None:
            return _plan_own(path, folder, options, DEEPSPEED, run_config, weights, "")
        settings = read_settings(Path(options.config or folder / CONFIG_FILE))
    if settings.get("model_type") == MODEL_TYPE:
        own = RunConfig(model=_read_own_model(path, settings))
        return _plan_own(path, folder, options, OWN_EXPORT, own, weights, PREFIX, settings)
    return _plan_foreign(path, folder, settings, weights, options)


def _find_run_config(folder: Path, options: ImportOptions) -> RunConfig | None:
    """Read the YAML of the run of which these are the weights, from --config, the folder or the one above; None if none."""
    if options.config:
        return load_config(options.config) if options.config.endswith((".yaml", ".yml")) else None
    if (folder / CONFIG_FILE).is_file():
        return None
    found = next((file for file in (folder / "config.yaml", folder.parent / "config.yaml") if file.is_file()), None)
    return None if found is None else load_config(found)


def _read_own_model(path: Path, settings: Mapping[str, Any]) -> ModelConfig:
    """Read the model of an export's config.json."""
    try:
        return read_saved_model(settings["model"], path / CONFIG_FILE)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE} is not the config of an export ({error}).") from None


def _open_universal(path: Path) -> SourceWeights:
    """Open the weights of DeepSpeed's universal layout, a file per parameter."""
    files = {file.parent.name: file for file in path.glob(f"zero/*/{WEIGHT}.pt")}

    def read(name: str) -> Tensor:
        return load_tensor(files[name], lazily=True)

    return SourceWeights({name: read(name).shape for name in files}, read, {})


def _plan_own(
    path: Path,
    folder: Path,
    options: ImportOptions,
    kind: str,
    config: RunConfig | None,
    weights: SourceWeights,
    prefix: str,
    settings: Mapping[str, Any] | None = None,
) -> ImportPlan:
    """Plan the conversion of weights of this project's own model, whose names have `prefix` in front."""
    if config is None:
        raise ConfigError(f"{path} holds weights but not their config. Name the config.yaml of their run in --config.")
    _check_cut_is_omitted(path, kind, options)
    depth = dataclasses.asdict(config.depth)
    if settings and "loops" in settings:
        loops = read_count(settings, "loops")
        depth = {"mean": loops, "max": max(loops, 32)}
    with torch.device("meta"):
        names = list(RecurrentDepthTransformer(config.model).state_dict())
    rules = {name: Rule((prefix + name,)) for name in names}
    for name in names:
        if name.endswith("selection_bias") and prefix + name not in weights.shapes:  # a buffer, which DeepSpeed drops
            rules[name] = Rule((), lambda size=config.model.experts: torch.zeros(size), "0, since it was not saved")
    check_names(rules, weights.shapes, r"lm_head\.weight|model\.lm_head\.weight")
    tokenizer = _find_tokenizer(path, folder, options, config.model.vocab_size, own=True)
    if kind == OWN_EXPORT and not options.tokenizer:
        check_tokenizer(folder, Tokenizer(tokenizer), SAVED_AGAIN)
    length = _read_length(settings) if settings else config.train.sequence_length
    calls = describe_call_settings(settings or {})
    notes = [f"{calls} in its config is a setting of calls, which a checkpoint has none of"] if calls else []
    return ImportPlan(path, kind, settings or {}, config.model, depth, rules, weights, tokenizer, length, notes=notes)


def _read_length(settings: Mapping[str, Any]) -> int | None:
    """Return the tokens per sequence of the training of the source; None if it does not say."""
    if all(settings.get(name) is None for name in LENGTHS):
        return None
    return read_count(settings, *LENGTHS)


def _plan_foreign(
    path: Path, folder: Path, settings: Mapping[str, Any], weights: SourceWeights, options: ImportOptions
) -> ImportPlan:
    """Plan the conversion of another project's model; ValueError for what has no equal here."""
    if settings.get("quantization_config"):
        raise ValueError("its weights are quantised (quantization_config); convert the model that was not quantised")
    looped = next((kind for kind in LOOPED if kind.recognizes(settings)), None)
    if looped is not None:
        _check_cut_is_omitted(path, looped.NAME, options)
        model = looped.read_model_config(settings)
        _check_model(model, weights, folder / CONFIG_FILE)
        rules = looped.make_rules(model)
        ignored = open_mythos.list_ignored(model) if looped is open_mythos else looped.IGNORED
        check_names(rules, weights.shapes, ignored)
        depth, tokenizer = looped.read_depth(settings), _find_tokenizer(path, folder, options, model.vocab_size)
        return ImportPlan(path, looped.NAME, settings, model, depth, rules, weights, tokenizer, _read_length(settings))
    if dense.recognizes(settings):
        return _plan_dense(path, folder, settings, weights, options)
    kind = settings.get("model_type")
    if kind in REFUSED:
        raise ValueError(REFUSED[kind])
    known = ", ".join([*(module.NAME for module in LOOPED), *(name for name, _ in dense.KINDS.values()), "own exports"])
    what = f"its model_type is {kind!r}" if kind else f"it has no {CONFIG_FILE} that says what it is (see --config)"
    raise ValueError(f"{what}; known are {known}")


def _check_model(model: ModelConfig, weights: SourceWeights, file: Path) -> None:
    """Raise ValueError or CheckpointError for a config, read from `file`, of another type or size than a model can have."""
    read_saved_model(dataclasses.asdict(model), file)
    _check_count(model.prelude_layers + model.core_layers + model.coda_layers, weights)
    _check_count(model.experts, weights)
    rows = _count_embedding_rows(weights)
    if rows != model.vocab_size:
        raise ValueError(
            f"the config's vocabulary has {model.vocab_size:,} ids, the embedding {rows:,} rows; they are of different models, "
            "or the config was not changed with the embedding"
        )


def _check_count(count: int, weights: SourceWeights) -> None:
    """Raise ValueError for more layers or experts than there are weights, before as many rules are made."""
    if count > len(weights.shapes):
        raise ValueError(f"the config says {count:,} layers or experts, the files have {len(weights.shapes):,} weights")


def _count_embedding_rows(weights: SourceWeights) -> int:
    """Return the number of rows of the embedding, of which there may be more than the tokenizer has ids."""
    names = ("model.embed_tokens.weight", "transformer.wte.weight", "embed.weight")
    found = next((weights.shapes[name] for name in names if name in weights.shapes), None)
    if found is None:
        raise ValueError(f"the weights have no embedding called {', '.join(names)}")
    return int(found[0])


def _plan_dense(
    path: Path,
    folder: Path,
    settings: Mapping[str, Any],
    weights: SourceWeights,
    options: ImportOptions,
) -> ImportPlan:
    """Plan the cut of a dense model, by --cut or, with auto, by the similarity of its layers."""
    layers = dense.count_layers(settings)
    tokenizer = _find_tokenizer(path, folder, options, _count_embedding_rows(weights))
    kind, length = dense.KINDS[settings["model_type"]][0], _read_length(settings)
    _check_count(layers, weights)

    def plan_cut(cut: dense.Cut, notes: list[str]) -> ImportPlan:
        kept = dense.list_kept_layers(cut, layers)
        model = dense.read_model_config(settings, cut)
        _check_model(model, weights, folder / CONFIG_FILE)
        rules = dense.make_rules(model, layers)
        check_names(rules, weights.shapes, dense.find_dropped_weights(model, layers))
        depth = dense.read_depth()
        return ImportPlan(path, kind, settings, model, depth, rules, weights, tokenizer, length, kept, notes)

    if options.cut != "auto":
        return plan_cut(_parse_cut(options.cut, layers), [])
    if layers < 3:
        raise ConfigError(
            f"{path}: it takes 3 layers to choose a cut, this model has {layers}; give --cut, such as 0,1,0."
        )
    whole = plan_cut((1, layers - 2, 1), [])
    whole.check()
    cut, note = choose_cut(whole.model, whole.stored, open_source_tokenizer(tokenizer, own=False))
    return plan_cut(cut, [note])


def _parse_cut(text: str, layers: int) -> dense.Cut:
    """Return the three numbers of --cut; ConfigError if they are none, or do not fit a model of so many layers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--cut is {text!r}; give the layers of prelude, core and coda, such as 2,4,2, or auto.")
    prelude, core, coda = map(int, parts)
    try:
        dense.list_kept_layers((prelude, core, coda), layers)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return prelude, core, coda


def _check_cut_is_omitted(path: Path, kind: str, options: ImportOptions) -> None:
    """Raise ConfigError if --cut is given for a model that has prelude, core and coda already."""
    if options.cut != ImportOptions.cut:
        raise ConfigError(f"--cut is for dense models, and {path} is looped already ({kind}). Omit --cut.")


def _find_tokenizer(path: Path, folder: Path, options: ImportOptions, rows: int, own: bool = False) -> Path:
    """Return the folder of the tokenizer; see `_search_tokenizer`. DataError for more ids than the embedding has rows."""
    found = _search_tokenizer(folder, options, own)
    try:
        ids = open_source_tokenizer(found, own).vocab_size
    except DataError as error:
        raise DataError(f"{error} Another tokenizer can be named in --tokenizer.") from None
    if ids > rows:
        raise DataError(
            f"the tokenizer in {found} has {ids:,} ids, the embedding of {path} {rows:,} rows. Name the right one in "
            "--tokenizer."
        )
    return found


def _search_tokenizer(folder: Path, options: ImportOptions, own: bool) -> Path:
    """Return the folder of the tokenizer, from --tokenizer, the source's or the one above; ConfigError if there is none."""
    if options.tokenizer:
        return Path(options.tokenizer)
    hidden = [folder / HIDDEN_FOLDER] if own else []
    for candidate in (*hidden, folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if any((candidate / name).exists() for name in (MODEL_FILE, JSON_FILE)):
            return candidate
    raise ConfigError(f"there is no tokenizer in {folder}. Name the folder of one in --tokenizer.")

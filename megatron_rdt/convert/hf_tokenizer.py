"""The tokenizer of an export: exactly the one that the model was trained with, or none that transformers would load.

From a bare tokenizer.model, AutoTokenizer silently makes a tokenizer whose ids may differ. So a tokenizer that cannot be
exported exactly goes into a subfolder, where AutoTokenizer does not look.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.comparison import describe_first_difference
from megatron_rdt.data.tokenizer.export import TOKENIZER_CLASS, write_settings
from megatron_rdt.data.tokenizer.hugging_face_backend import (
    COMPANION_FILES,
    HUGGING_FACE,
    JSON_FILE,
    NAMED_TOKENS,
    SETTINGS_FILE,
    SPECIALS_FILE,
    read_settings,
    token_spelling,
)
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.errors import DataError
from megatron_rdt.files import write_text
from megatron_rdt.untrusted_files import read_json_object

# Subfolder for a tokenizer.model that AutoTokenizer must not find.
HIDDEN_FOLDER = "tokenizer"
# Settings by which transformers puts tokens around a text.
TEMPLATE_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_token", "add_suffix_token")
# Post-processors of the library tokenizers that add no tokens.
KEPT_PROCESSORS = ("ByteLevel",)
# Special tokens of transformers that this project does not use.
OTHER_NAMES = ("unk_token", "sep_token", "cls_token", "mask_token")
# Settings that name code or a path, or that transformers would take instead of what tokenizer.json says.
REFERENCES = ("auto_map", "name_or_path", "init_inputs", "tokenizer_object", "vocab", "merges", "post_processor")


def export_tokenizer(source: Path, out: Path, length: int, has_bos: bool = True) -> str:
    """Write a checkpoint's tokenizer into an export; return "", or why it is hidden from AutoTokenizer.

    Args:
        source: the checkpoint's tokenizer folder.
        out: folder of the export.
        length: of the model's training sequences, in tokens, which tools take for the longest text.
        has_bos: True if documents began with BOS in training; False leaves it without a name.

    Returns:
        "" if AutoTokenizer produces the same ids; otherwise why the tokenizer is left out, and the SentencePiece model
        is in `out`/tokenizer/tokenizer.model.
    """
    tokenizer = Tokenizer(source)
    if tokenizer.kind == HUGGING_FACE:
        _export_hugging_face(source, out, length, has_bos)
        return ""
    difference = f"there is no exact {JSON_FILE} for this kind of SentencePiece model"
    if (source / JSON_FILE).is_file():
        shutil.copyfile(source / JSON_FILE, out / JSON_FILE)
        difference = describe_first_difference(out / JSON_FILE, tokenizer)
    folder = out / HIDDEN_FOLDER if difference else out
    if difference:
        (out / JSON_FILE).unlink(missing_ok=True)
        folder.mkdir()
    else:
        write_settings(out, tokenizer, () if has_bos else ("bos",), model_max_length=length)
        if has_bos and tokenizer.bos >= 0:
            _put_bos_first(out / JSON_FILE, tokenizer)
    shutil.copyfile(source / MODEL_FILE, folder / MODEL_FILE)
    return difference


def _put_bos_first(file: Path, tokenizer: Tokenizer) -> None:
    """Give the tokenizer.json of a SentencePiece model the template by which BOS stands before a text."""
    document = read_json_object(file, DataError)
    document["post_processor"] = _make_template(tokenizer.processor.id_to_piece(tokenizer.bos), tokenizer.bos)
    write_text(file, json.dumps(document, ensure_ascii=False) + "\n")


def _export_hugging_face(source: Path, out: Path, length: int, has_bos: bool) -> None:
    """Copy the tokenizer's files, with a tokenizer_class that loads tokenizer.json unchanged, and the same special tokens.

    Of the template that puts tokens around a text, BOS stays if the model was trained on it, and nothing else: what else
    it adds is in no corpus, and EOS is what the model is to write.

    Args:
        source: the checkpoint's tokenizer folder.
        out: folder of the export.
        length: becomes `model_max_length`.
        has_bos: see `export_tokenizer`.
    """
    tokenizer, named = Tokenizer(source), read_settings(source).named
    for name in (JSON_FILE, *COMPANION_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    _reduce_template(
        out / JSON_FILE, (named["bos_token"], tokenizer.bos) if has_bos and tokenizer.begins_with_bos else None
    )
    settings, specials = (_remove_references(_read_if_present(out / name)) for name in (SETTINGS_FILE, SPECIALS_FILE))
    if settings.get("tokenizer_class") not in (TOKENIZER_CLASS, "TokenizersBackend"):
        settings["tokenizer_class"] = TOKENIZER_CLASS
    for name in TEMPLATE_SETTINGS:
        settings.pop(name, None)
    settings["model_max_length"] = length
    if not has_bos:
        for document in (named, settings, specials):
            document.pop("bos_token", None)
    named = named | _find_other_names(settings, specials, tokenizer)
    _set_special_tokens(settings, specials, named)
    for name, document in ((SETTINGS_FILE, settings), (SPECIALS_FILE, specials)):
        if document != _read_if_present(out / name):
            write_text(out / name, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def _remove_references(document: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those that name code, other files, or a vocabulary beside that of tokenizer.json.

    An export has to be opened with trust_remote_code, for its own model: transformers would then fetch and run the
    repository that an `auto_map` names.
    """
    return {name: value for name, value in document.items() if name not in REFERENCES and not name.endswith("_file")}


def _reduce_template(file: Path, bos: tuple[str, int] | None) -> None:
    """Remove from a tokenizer.json the post-processors that add tokens to a text; others only count characters.

    Args:
        file: the tokenizer.json.
        bos: spelling and id of the token that is to be put in front of a text after all.
    """
    document = read_json_object(file, DataError)
    processor = document.get("post_processor")
    if processor is None:
        return
    parts = processor["processors"] if processor["type"] == "Sequence" else [processor]
    kept = [part for part in parts if part["type"] in KEPT_PROCESSORS]
    if bos is not None:
        kept.append(_make_template(*bos))
    if kept != parts:
        document["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
        write_text(file, json.dumps(document, ensure_ascii=False) + "\n")


def _make_template(bos: str, index: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS in front of a text, and of the first of two, as tokenizer.json holds it."""
    processor = TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, index)])
    return json.loads(processor.__getstate__())


def _find_other_names(settings: dict[str, Any], specials: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the spelling of each of `OTHER_NAMES`; remove from both dicts one that has no id, which is printed.

    transformers would give it an id of its own, which the model does not have.
    """
    named = {}
    for name in OTHER_NAMES:
        spelling = token_spelling(settings.get(name)) or token_spelling(specials.get(name))
        if spelling is not None and tokenizer.token_id(spelling) >= 0:
            named[name] = spelling
        elif spelling is not None:
            print(f"{name} {spelling!r} is no token of {JSON_FILE}: the export leaves the name out")
            settings.pop(name, None)
            specials.pop(name, None)
    return named


def _set_special_tokens(settings: dict[str, Any], specials: dict[str, Any], named: dict[str, str]) -> None:
    """Set the special tokens in the two dicts, in place, where transformers would take others.

    transformers prefers special_tokens_map.json, even if it names null, unless tokenizer_config.json has an
    added_tokens_decoder: then it ignores special_tokens_map.json.

    Args:
        settings: content of tokenizer_config.json.
        specials: content of special_tokens_map.json; empty if there is none.
        named: the spelling of those that there are, by name.
    """
    for name in (*NAMED_TOKENS, *OTHER_NAMES):
        spelling = named.get(name)
        if name in specials and token_spelling(specials[name]) != spelling:
            specials[name] = spelling
        if "added_tokens_decoder" in settings and token_spelling(settings.get(name)) != spelling:
            settings[name] = spelling


def _read_if_present(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; an empty one if there is no file."""
    return read_json_object(file, DataError) if file.is_file() else {}


def open_exported_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer that `export_tokenizer` wrote into an export."""
    return Tokenizer(folder / HIDDEN_FOLDER if (folder / HIDDEN_FOLDER).is_dir() else folder)


def read_special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return bos, eos and pad id under their names in transformers; None for one that the tokenizer lacks."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    return {f"{name}_token_id": index if index >= 0 else None for name, index in ids.items()}

"""The tokenizer of an export: exactly the one that the model was trained with, or none that transformers would load.

AutoTokenizer takes whatever lies in a folder. From a bare tokenizer.model it makes a tokenizer that may give other ids,
without a word. So a tokenizer that cannot be exported exactly is put where AutoTokenizer does not look.
"""

import json
import shutil
from pathlib import Path

from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.export import TOKENIZER_CLASS, describe_first_difference, write_settings
from megatron_rdt.data.tokenizer.hugging_face_backend import (
    COMPANION_FILES,
    HUGGING_FACE,
    JSON_FILE,
    SETTINGS_FILE,
    read_json_object,
)
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.files import write_text

# Where tokenizer.model lies when AutoTokenizer must not find it.
ASIDE = "tokenizer"


def export_tokenizer(source: Path, out: Path) -> str:
    """Write the tokenizer of a checkpoint into an export.

    Args:
        source: the checkpoint's tokenizer folder.
        out: folder of the export.

    Returns:
        "" where AutoTokenizer gives the same ids; otherwise why it is left out. `out`/tokenizer/tokenizer.model is
        then the SentencePiece model.
    """
    tokenizer = Tokenizer(source)
    if tokenizer.kind == HUGGING_FACE:
        _export_hugging_face(source, out)
        return ""
    difference = f"there is no exact {JSON_FILE} for this kind of SentencePiece model"
    if (source / JSON_FILE).is_file():
        shutil.copyfile(source / JSON_FILE, out / JSON_FILE)
        difference = describe_first_difference(out / JSON_FILE, tokenizer)
    if not difference:
        write_settings(out, tokenizer)
        shutil.copyfile(source / MODEL_FILE, out / MODEL_FILE)
        return ""
    (out / JSON_FILE).unlink(missing_ok=True)
    (out / ASIDE).mkdir()
    shutil.copyfile(source / MODEL_FILE, out / ASIDE / MODEL_FILE)
    return difference


def _export_hugging_face(source: Path, out: Path) -> None:
    """Copy the files as they are, but for the class: most build a tokenizer of their own from parts of tokenizer.json.

    Args:
        source: the checkpoint's tokenizer folder.
        out: folder of the export.
    """
    for name in (JSON_FILE, *COMPANION_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    settings = read_json_object(out / SETTINGS_FILE) if (out / SETTINGS_FILE).is_file() else {}
    if settings.get("tokenizer_class") not in (TOKENIZER_CLASS, "TokenizersBackend"):
        settings.pop("auto_map", None)  # names code that is not here
        settings["tokenizer_class"] = TOKENIZER_CLASS
        write_text(out / SETTINGS_FILE, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")


def exported_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an export, as `export_tokenizer` wrote it."""
    return Tokenizer(folder / ASIDE if (folder / ASIDE).is_dir() else folder)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos, eos and pad id by the names that transformers has for them; None where the tokenizer has none."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    return {f"{name}_token_id": index if index >= 0 else None for name, index in ids.items()}

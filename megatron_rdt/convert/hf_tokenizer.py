"""The tokenizer of an export: exactly the one that the model was trained with, or none that transformers would load.

From a bare tokenizer.model, AutoTokenizer silently makes a tokenizer whose ids may differ. So a tokenizer that cannot be
exported exactly goes into a subfolder, where AutoTokenizer does not look.
"""

import json
import shutil
from pathlib import Path

from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.comparison import describe_first_difference
from megatron_rdt.data.tokenizer.export import TOKENIZER_CLASS, write_settings
from megatron_rdt.data.tokenizer.hugging_face_backend import (
    COMPANION_FILES,
    HUGGING_FACE,
    JSON_FILE,
    SETTINGS_FILE,
    read_json_object,
)
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.files import write_text

# Subfolder for a tokenizer.model that AutoTokenizer must not find.
HIDDEN_FOLDER = "tokenizer"


def export_tokenizer(source: Path, out: Path) -> str:
    """Write the tokenizer of a checkpoint into an export.

    Args:
        source: the checkpoint's tokenizer folder.
        out: folder of the export.

    Returns:
        "" if AutoTokenizer produces the same ids; otherwise why the tokenizer is left out, and the SentencePiece model
        is in `out`/tokenizer/tokenizer.model.
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
    (out / HIDDEN_FOLDER).mkdir()
    shutil.copyfile(source / MODEL_FILE, out / HIDDEN_FOLDER / MODEL_FILE)
    return difference


def _export_hugging_face(source: Path, out: Path) -> None:
    """Copy the tokenizer's files, and set a tokenizer_class that loads tokenizer.json unchanged.

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


def open_exported_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer that `export_tokenizer` wrote into an export."""
    return Tokenizer(folder / HIDDEN_FOLDER if (folder / HIDDEN_FOLDER).is_dir() else folder)


def read_special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return bos, eos and pad id under their names in transformers; None for one that the tokenizer lacks."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    return {f"{name}_token_id": index if index >= 0 else None for name, index in ids.items()}

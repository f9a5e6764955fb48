"""The tokenizer of an export: exactly the one that the model was trained with, or none that transformers would load.

AutoTokenizer takes whatever lies in a folder. From a bare tokenizer.model it makes a tokenizer that may give other ids,
without a word. So a tokenizer that cannot be exported exactly is put where AutoTokenizer does not look.
"""

import shutil
from pathlib import Path

from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer import MODEL_FILE
from megatron_rdt.data.tokenizer_export import EXPORTED_FILE, first_difference, write_settings

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
    difference = f"there is no exact {EXPORTED_FILE} for this kind of SentencePiece model"
    if (source / EXPORTED_FILE).is_file():
        shutil.copyfile(source / EXPORTED_FILE, out / EXPORTED_FILE)
        difference = first_difference(out / EXPORTED_FILE, tokenizer)
    if not difference:
        write_settings(out, tokenizer)
        shutil.copyfile(source / MODEL_FILE, out / MODEL_FILE)
        return ""
    (out / EXPORTED_FILE).unlink(missing_ok=True)
    (out / ASIDE).mkdir()
    shutil.copyfile(source / MODEL_FILE, out / ASIDE / MODEL_FILE)
    return difference


def exported_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an export, as `export_tokenizer` wrote it."""
    return Tokenizer(folder / ASIDE if (folder / ASIDE).is_dir() else folder)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos, eos and pad id by the names that transformers has for them; None where the tokenizer has none."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    return {f"{name}_token_id": index if index >= 0 else None for name, index in ids.items()}

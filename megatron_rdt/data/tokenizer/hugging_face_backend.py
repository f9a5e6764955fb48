"""HuggingFaceBackend: the tokenizer.json of a Hugging Face model, read with the tokenizers library, without transformers."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from megatron_rdt.errors import DataError
from megatron_rdt.untrusted_files import read_json_object

HUGGING_FACE = "hf"  # `Tokenizer.kind`
JSON_FILE, SETTINGS_FILE, SPECIALS_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
# Files of a tokenizer besides tokenizer.json; other forms of its vocabulary are not needed.
COMPANION_FILES = (SETTINGS_FILE, SPECIALS_FILE, ADDED_FILE, "chat_template.jinja", "chat_template.json")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token")
FINGERPRINTED = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # parts of tokenizer.json that decide the ids
BYTE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceBackend:
    """Backend of a tokenizer.json, with the names of its special tokens from the settings in the same folder.

    Text is encoded without the tokens that a template would put around it, and text that spells a special token is split
    like any other text (as AutoTokenizer does with split_special_tokens=True). For the members see `Backend`.

    Attributes:
        contradictions: sentences about what the files of the folder say differently, and what is used.
        begins_with_bos: True if its template puts BOS in front of a text, as those do whose models saw it there.
        text_fingerprint: the fingerprint that it would have without BOS, which decides no id of a text.
    """

    kind = HUGGING_FACE

    def __init__(self, file: Path) -> None:
        document = read_json_object(file, DataError)
        if not isinstance(document.get("model"), dict):
            raise DataError(f"{file} describes no model, it is not a tokenizer.json. Name the right file or folder.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            problem = f"{file} is not a tokenizer.json of the library tokenizers ({error})"
            raise DataError(f"{problem}. Use another.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._model: dict[str, Any] = document["model"]
        self._decoders = json.dumps(document.get("decoder"))
        if self._model.get("dropout"):
            raise DataError(f"{file} has a model with dropout, its ids are random. Set model.dropout to null in it.")
        self._added = {token["content"]: int(token["id"]) for token in document.get("added_tokens") or []}
        self.specials = [token["content"] for token in document.get("added_tokens") or [] if token["special"]]
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        settings = read_settings(file.parent)
        names, self.contradictions = settings.named, settings.contradictions
        for content in (*names.values(), *(content for content, _ in settings.added)):
            if content not in self._vocabulary:
                raise DataError(
                    f"the settings in {file.parent} name the token {content!r}, which is not in {file.name}: transformers "
                    "would add it. Load the folder with AutoTokenizer and save it with save_pretrained, or remove the name."
                )
        self.contradictions += [
            f"{content!r} has the id {index} in the settings and {self._vocabulary[content]} in {file.name}, which is used"
            for content, index in dict(settings.added).items()
            if index not in (None, self._vocabulary[content])
        ]
        self.bos, self.eos, self.pad = (self._vocabulary[names[name]] if name in names else -1 for name in NAMED_TOKENS)
        self.fingerprint, self.text_fingerprint = (
            _hash_parts(document, [bos, self.eos, self.pad]) for bos in (self.bos, -1)
        )
        self.begins_with_bos = self.bos >= 0 and self._template_ids()[:1] == [self.bos]

    def _template_ids(self) -> list[int]:
        """Return the ids that the template puts in front of a text; transformers asks nothing else for them."""
        text = "a"
        ids, plain = self._tokenizer.encode(text).ids, self.encode(text).tolist()
        count = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
        return ids[:count]

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to ids, int32."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text to ids, int32."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text; special tokens are dropped."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_id(self, text: str) -> int:
        """Return the id of the added token spelled `text`, else of the single token that it is encoded to, else -1."""
        if text in self._added:
            return self._added[text]
        ids = self.encode(text)
        return int(ids[0]) if len(ids) == 1 else -1

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes of every id, int32; 0 for special tokens and unused ids."""
        sizes = np.zeros(self.vocab_size, np.int32)
        specials, alphabet = set(self.specials), set(ByteLevel.alphabet())
        byte_level = '"ByteLevel"' in self._decoders
        # Decoders strip a space at the ends of a text: between two of this token, another is decoded as in the middle.
        around = next((i for t, i in sorted(self._vocabulary.items()) if t.isascii() and t.isalpha()), 0)
        empty = self._count_decoded_bytes([around, around])
        for token, i in self._vocabulary.items():
            if token in specials or i in (self.bos, self.eos, self.pad):
                sizes[i] = 0
            elif token in self._added:
                sizes[i] = len(token.encode("utf-8"))
            elif byte_level and alphabet.issuperset(token):
                sizes[i] = len(token)  # one character per byte
            elif self._model.get("byte_fallback") and BYTE.fullmatch(token):
                sizes[i] = 1
            else:
                sizes[i] = max(self._count_decoded_bytes([around, i, around]) - empty, 0)
        return sizes

    def _count_decoded_bytes(self, ids: list[int]) -> int:
        """Count the UTF-8 bytes of the decoded text."""
        return len(self.decode(ids).encode("utf-8"))


def _hash_parts(document: dict[str, Any], ids: list[int]) -> str:
    """Return the hex SHA-256 of the parts of a tokenizer.json that decide the ids of a text, and of special ids."""
    deciding = {name: document.get(name) for name in FINGERPRINTED} | {"ids": ids}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TokenizerSettings:
    """Tokens that the files next to a tokenizer name.

    Attributes:
        named: spellings of bos_token, eos_token and pad_token, as far as they are named.
        added: spelling and id of the tokens that transformers would add if the tokenizer lacked them.
        contradictions: sentences about tokens that two files name differently.
    """

    named: dict[str, str]
    added: list[tuple[str, int | None]]
    contradictions: list[str]


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the tokens that JSON files beside a tokenizer name; DataError if one is not what transformers writes."""
    settings = TokenizerSettings({}, [], [])
    files: dict[str, str] = {}
    for file in (folder / SPECIALS_FILE, folder / SETTINGS_FILE):
        document = read_json_object(file, DataError) if file.is_file() else {}
        for name in NAMED_TOKENS:
            content = token_spelling(document.get(name))
            if content is None:
                continue
            before = settings.named.get(name, content)
            if before != content:
                settings.contradictions.append(
                    f"{name} is {before!r} in {files[name]} and {content!r} in {file.name}; {content!r} is used"
                )
            settings.named[name], files[name] = content, file.name
        by_id = _get_object(file, document, "added_tokens_decoder")
        spelled = ((token_spelling(token), index) for index, token in by_id.items())
        settings.added.extend((content, _to_id(index)) for content, index in spelled if content is not None)
    added_file = folder / ADDED_FILE
    if added_file.is_file():
        settings.added.extend(
            (content, _to_id(index)) for content, index in read_json_object(added_file, DataError).items()
        )
    return settings


def _get_object(file: Path, document: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key of a JSON file, empty if there is none; DataError if it is something else."""
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise DataError(f"{file} holds no JSON object under {key}. Put the right file there.")
    return value


def _to_id(value: Any) -> int | None:
    """Convert an id that JSON gives as a number or as a string of digits to int; None for anything else."""
    text = str(value)
    return int(text) if text.isdecimal() else None


def token_spelling(token: Any) -> str | None:
    """Return the spelling of a token given as a text or as an object with the key content, else None."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

"""The manifest of a prepared corpus: counts, hashes, the tokenizer; its presence means the corpus is complete."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_rdt.data.indexed import REBUILD, prefix_path
from megatron_rdt.data.tokenizer import Tokenizer
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of

MANIFEST = "manifest.json"
FORMAT, VERSION = "rdt-tokens", 1
SHORT_HASH = 16  # hexadecimal digits


class CorpusManifest:
    """A corpus that `rdt prep` wrote.

    Attributes:
        directory: where it is.
        document: the JSON document.
    """

    def __init__(self, directory: Path, document: dict[str, Any]) -> None:
        self.directory, self.document = directory, document

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer."""
        return int(self.document["vocab_size"])

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, the dtype and every shard: what a checkpoint remembers of its data."""
        parts = [self.document["tokenizer"]["fingerprint"], self.document["dtype"]]
        for split in sorted(self.document["splits"]):
            parts += [shard["bin_sha256"] for shard in self.document["splits"][split]["shards"]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def shard_hashes(self) -> dict[str, str]:
        """The beginning of every shard's SHA-256 by split/name: to say later which one changed."""
        return {
            f"{split}/{shard['name']}": shard["bin_sha256"][:SHORT_HASH]
            for split, content in sorted(self.document["splits"].items())
            for shard in content["shards"]
        }

    def shards(self, split: str) -> list[Path]:
        """Prefixes of a split's shards, in order."""
        return [self.directory / split / shard["name"] for shard in self.document["splits"][split]["shards"]]

    def verify(self, level: str = "size") -> None:
        """Compare the files with the manifest; DataError names the first that differs.

        Args:
            level: "size" compares the tokenizer and file sizes; "full" reads and hashes every byte.
        """
        tokenizer = Tokenizer(self.directory / "tokenizer")
        if tokenizer.fingerprint != self.document["tokenizer"]["fingerprint"]:
            raise DataError(
                f"{self.directory / 'tokenizer'} is not the tokenizer that made these shards. "
                "Put the right tokenizer.model back, or prepare the text again."
            )
        for split, content in self.document["splits"].items():
            for shard in content["shards"]:
                self._verify_shard(self.directory / split / shard["name"], shard, level)

    def _verify_shard(self, prefix: Path, shard: dict[str, Any], level: str) -> None:
        path = prefix_path(prefix, ".bin")
        if not path.is_file():
            raise DataError(f"{path} is missing. {REBUILD}")
        if path.stat().st_size != shard["bin_bytes"]:
            size = path.stat().st_size
            raise DataError(f"{path} has {size} bytes, the manifest says {shard['bin_bytes']}. {REBUILD}")
        if level == "full":
            for suffix in (".bin", ".idx"):
                if sha256_of(prefix_path(prefix, suffix)) != shard[f"{suffix[1:]}_sha256"]:
                    raise DataError(f"{prefix}{suffix} has other content than was written. {REBUILD}")


def shard_difference(before: dict[str, str], now: dict[str, str]) -> str:
    """The first shard in which two corpora differ, in words; both are `CorpusManifest.shard_hashes`."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            change = "is gone" if name not in now else "is new" if name not in before else "has other content"
            return f"shard {name} {change}"
    return "the tokenizer or the type of the tokens is another"


def load_manifest(path: str | Path) -> CorpusManifest:
    """Read `path`/manifest.json."""
    file = Path(path) / MANIFEST
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist. Make the shards first: rdt prep --config FILE --out {path}") from None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}). {REBUILD}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise DataError(f"{file} is not a manifest of format {FORMAT} version {VERSION}. {REBUILD}")
    return CorpusManifest(Path(path), document)

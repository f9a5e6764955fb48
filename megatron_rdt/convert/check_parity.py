"""Check that this export gives the logits that were computed when it was written: python check_parity.py [FOLDER].

It needs torch and transformers alone. parity.json beside it has the prompts, as token ids, and the expected logits.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_differences(folder: Path) -> tuple[list[str], bool]:
    """Return a line for each T, and one for the tokenizer; and True if all is as expected."""
    expected: dict[str, Any] = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    prompts, ids = torch.tensor(expected["prompts"]), torch.tensor(expected["ids"])
    lines, holds = [], True
    for case in expected["cases"]:
        with torch.no_grad():
            logits = model(prompts, loops=case["loops"], use_cache=False).logits[:, -1].float()
        found = torch.cat((logits[:, ids], logits.logsumexp(-1, keepdim=True)), 1)
        wanted = torch.cat((torch.tensor(case["logits"]), torch.tensor(case["logsumexp"])[:, None]), 1)
        difference = float((found - wanted).abs().max())
        is_close = difference <= case["tolerance"]  # False for NaN
        lines.append(
            f"T = {case['loops']}: logits {'agree' if is_close else 'DIFFER'}, by at most {difference:.2g} "
            f"(tolerance {case['tolerance']:.2g})"
        )
        holds = holds and is_close
    if expected["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        tokens = list(tokenizer(expected["text"], add_special_tokens=False).input_ids)
        is_same = tokens == expected["text_tokens"]
        lines.append(f"tokenizer: the ids of the text {'agree' if is_same else 'DIFFER'}")
        holds = holds and is_same
    return lines, holds


def main() -> int:
    """Print the comparison; return 1 if anything differs or cannot be read, else 0."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    try:
        lines, holds = find_differences(folder)
    except Exception as error:  # of whichever library reads a file of the folder
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{folder} cannot be checked ({reason}). A file of it is missing or damaged: copy it again.")
        return 1
    print("\n".join(lines))
    if not holds:
        print("This folder is damaged, or these versions of torch and transformers compute another model.")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

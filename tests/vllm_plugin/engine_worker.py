"""Serve an export with vLLM in this process and print what it computes as JSON: `engine_worker.py FOLDER OPTIONS`.

OPTIONS are vLLM's, as JSON. A process of its own, since an engine keeps its memory and its settings for good.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

MARK = "RESULT "  # begins the line with the result, among vLLM's messages
NEW_TOKENS = 12  # as `make_exports.expect` generates


def main(folder: Path, options: dict[str, Any]) -> None:
    """Print log probabilities of two prompts' tokens, by row and position, and a continuation of the first one's begin."""
    tokens = torch.load(folder / "given.pt")["tokens"]
    engine = LLM(model=str(folder), max_model_len=64, **options)
    rows = [TokensPrompt(prompt_token_ids=row.tolist()) for row in tokens]
    scored = engine.generate(rows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3))
    scores = [[{i: each.logprob for i, each in (at or {}).items()} for at in row.prompt_logprobs] for row in scored]
    prompt = TokensPrompt(prompt_token_ids=tokens[0, :9].tolist())
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    (answer,) = engine.generate([prompt], greedy)
    print(MARK + json.dumps({"scores": scores, "continued": list(answer.outputs[0].token_ids)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""Train a small dense Llama of transformers with a plain loop, as a source for `rdt convert SOURCE OUT --cut`.

It knows nothing of this project but the corpus: OUT is a folder as transformers saves it, with the corpus's tokenizer.
Batches are the *last* samples of the epoch in the order of the seed, so a run that continues with the same seed, and takes
the first ones, sees other text.

    python benchmarks/dense_llama.py --out data/dense [--steps 400] [--seed 1234] [--data data/stdlib]

docs/RESULTS.md, "A dense model, cut and continued", says what was found.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from tools.options import make_parser
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rdt.config import DataConfig
from megatron_rdt.data import Tokenizer, load_manifest, open_corpus

LAYERS, LR, WARMUP, FINAL = 6, 3e-3, 40, 0.1


def make_model(vocabulary: int, sequence: int, bos: int | None, eos: int) -> LlamaForCausalLM:
    """Return a random model of 1.7M weights with a vocabulary of 4,096."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=sequence,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config)


def scale_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the peak: warm-up, then a cosine to `FINAL`."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1))) / 2


def main() -> None:
    """Train and save."""
    parser = make_parser(__doc__, batch=16, sequence=256, threads=1, out=Path("data/dense"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--data", default="data/stdlib", help="prepared corpus")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; name another folder in --out")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    manifest = load_manifest(options.data)
    manifest.verify()
    corpus = open_corpus(manifest, "train", options.sequence, options.seed, DataConfig())
    document = manifest.document
    bos = document["bos"] if corpus.begins_with_bos else None
    model = make_model(document["vocab_size"], options.sequence, bos, document["eos"])
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale_rate(step, options.steps))

    for step in range(options.steps):
        end = corpus.samples_per_epoch - step * options.batch
        tokens = corpus.read_samples(range(end - options.batch, end)).tokens
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 24 or step + 1 == options.steps:
            print(json.dumps({"step": step + 1, "loss": round(loss.item(), 4)}), flush=True)

    model.save_pretrained(options.out)
    file = Tokenizer(
        manifest.directory / "tokenizer"
    ).file  # the one that made the corpus; its folder has two forms of it
    shutil.copyfile(file, options.out / file.name)


if __name__ == "__main__":
    main()

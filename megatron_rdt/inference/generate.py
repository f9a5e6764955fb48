"""Token generation for a batch of prompts of any lengths, at a chosen loop count: one new id per row and step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from megatron_rdt.config.sampling import check_sampling
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.inference.sampling import NO_TOKEN, draw_uniforms, pick_tokens
from megatron_rdt.model.attention.kv_cache import KVCache
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace

Prompts = Tensor | Sequence[Sequence[int]]


@overload
def generate(model: nn.Module, tokens: Tensor, loops: int, new_tokens: int, **settings: Any) -> Tensor: ...


@overload
def generate(
    model: nn.Module, tokens: Sequence[Sequence[int]], loops: int, new_tokens: int, **settings: Any
) -> list[list[int]]: ...


def generate(
    model: nn.Module, tokens: Prompts, loops: int, new_tokens: int, **settings: Any
) -> Tensor | list[list[int]]:
    """Return every prompt with the ids that continue it, as a tensor or as lists, whichever `tokens` is.

    The same call returns the same ids.

    Args:
        model: see `stream`.
        tokens: prompts, (batch, prompt) ids or a list of lists of ids of any lengths.
        loops: T.
        new_tokens: largest number of ids to add.
        settings: further ones of `stream`.

    Returns:
        For a tensor, (batch, prompt + added) ids; rows that stopped early repeat their last id. For lists, the same
        lists with the added ids, including the stop token.

    Raises:
        ConfigError: an argument is out of range or of the wrong shape.
    """
    steps = list(stream(model, tokens, loops, new_tokens, **settings))  # {row: new id} each
    if isinstance(tokens, Tensor):
        last, columns = tokens[:, -1].tolist(), [tokens]
        for step in steps:
            last = [step.get(row, id) for row, id in enumerate(last)]
            columns.append(torch.tensor(last, dtype=tokens.dtype, device=tokens.device)[:, None])
        return torch.cat(columns, dim=1)
    return [[*map(int, prompt), *(step[row] for step in steps if row in step)] for row, prompt in enumerate(tokens)]


@torch.no_grad()
def stream(
    model: nn.Module,
    tokens: Prompts,
    loops: int,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    eos: int | None = None,
    stop: Sequence[int] = (),
    use_cache: bool = True,
    cache_budget: int = 0,
    exit_rule: ExitRule | None = None,
    trace: "GenerationTrace | None" = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[int, int]]:
    """Generate step by step: yield {row: new id} for the rows that have not stopped.

    A row that stops leaves the batch and is not computed any more. The id drawn for a row depends on its logits and on
    (seed, row, position) alone, so a row's text does not depend on the other rows.

    Under a sharding engine every rank calls this with the same arguments, since each forward pass is collective.

    Args:
        model: called as model(tokens, T, cache=..., start=..., logits_to_keep=1) and with `padding`, `exit_rule`, `trace`.
        tokens: prompts, (batch, prompt) ids or a list of lists of ids, at least one id each. Shorter ones are padded
            on the left; padding has no position and is never attended to.
        loops: T.
        new_tokens: largest number of ids to add per row.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest; 0 means all.
        top_p: sample among the likeliest that together have this probability.
        seed: of the sampling.
        rows: numbers of the rows in the sampling keys; default 0, 1, ...
        eos: id that ends a row, if any.
        stop: further ids that end a row.
        use_cache: keep keys and values instead of computing the whole text again for each token.
        cache_budget: iterations with keys and values of their own, see `KVCache`; 0 means all.
        exit_rule: rule by which a token stops iterating before T.
        trace: receives the number of iterations of every token.
        agree: called with every step's new ids, (rows,) int64 on the device of the model; its result is used instead.
            Ranks that share a model pass a broadcast. Without it, logits that differ in the last bit could make ranks
            draw different ids, and a rank that stops first would leave the others waiting in a collective.

    Raises:
        ConfigError: an argument is out of range or of the wrong shape.
        CheckpointError: the logits are not finite.
    """
    check_sampling(loops, new_tokens, temperature, top_k, top_p, seed, cache_budget)
    prompts = to_id_lists(tokens)
    numbers = list(range(len(prompts))) if rows is None else list(rows)
    if len(numbers) != len(prompts):
        raise ConfigError(f"there are {len(numbers)} rows for {len(prompts)} prompts, there must be one for each.")
    if cache_budget and not use_cache:
        raise ConfigError(f"cache_budget is {cache_budget}, it must be 0 without a cache.")
    if agree is not None and exit_rule is not None:
        raise ConfigError("exit_rule is for a model in one process: ranks that exit at different iterations hang.")
    device = tokens.device if isinstance(tokens, Tensor) else next(model.parameters()).device
    batch = _ActiveRows(prompts, KVCache(cache_budget) if use_cache else None, device)
    ends = torch.tensor([*stop, *([] if eos is None else [eos])], dtype=torch.int64, device=device)
    for _ in range(new_tokens):
        # Rows keep their numbers when others have left the batch, so that what is drawn for them does not change.
        logits = batch.next_logits(model, loops, exit_rule, trace)
        keys, positions = [numbers[row] for row in batch.rows], batch.lengths()
        drawn = None if temperature == 0 else draw_uniforms(seed, keys, positions)
        chosen = pick_tokens(logits, temperature, top_k, top_p, drawn)
        if agree is not None:
            chosen = agree(chosen)
        ids = chosen.tolist()
        if NO_TOKEN in ids:
            raise CheckpointError(
                f"the logits after token {positions[ids.index(NO_TOKEN)]} are not finite: the weights are NaN, infinite or "
                "too large. Use an earlier checkpoint."
            )
        yield dict(zip(batch.rows, ids))
        if not batch.append(chosen, ~torch.isin(chosen, ends)):
            return


class GenerationTrace:
    """Record of how many iterations every token ran.

    Attributes:
        iterations: for each row, the count of every token that was computed: all but the last one.
    """

    def __init__(self) -> None:
        self.iterations: list[list[int]] = []

    @property
    def mean(self) -> float:
        """Iterations per token, over all rows; 0 if no token was computed."""
        counts = [count for row in self.iterations for count in row]
        return sum(counts) / max(len(counts), 1)


class _ActiveRows:
    """The rows that have not stopped: their indices, ids, padding and cache.

    Attributes:
        text: ids (rows, length), padded on the left.
        padding: padding ids of each row, (rows,).
        rows: index of each row among the prompts.
        computed: leading positions whose logits and cache entries exist.
    """

    def __init__(self, prompts: list[list[int]], cache: KVCache | None, device: torch.device) -> None:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        self.text = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts)], device=device)
        self.padding = torch.tensor(padding, device=device)
        self.rows, self.is_padded = list(range(len(prompts))), any(padding)
        self.cache = cache
        self.computed = 0

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row, which is the position of its next one."""
        return (self.text.shape[1] - self.padding).tolist()

    def next_logits(self, model: nn.Module, loops: int, rule: ExitRule | None, trace: GenerationTrace | None) -> Tensor:
        """Return the logits (rows, vocab_size) of the next token; run what no cache holds, and extend `trace`."""
        start = 0 if self.cache is None else self.computed
        settings: dict[str, Any] = {"logits_to_keep": 1, **({"padding": self.padding} if self.is_padded else {})}
        exits = ExitTrace() if trace is not None else None
        if rule is not None or exits is not None:
            settings |= {"exit_rule": rule, "trace": exits}
        logits = model(self.text[:, start:], loops, cache=self.cache, start=start, **settings)[:, -1]
        if trace is not None and exits is not None and exits.iterations is not None:
            if self.computed == 0:
                trace.iterations = [[] for _ in self.rows]
            # Without a cache the earlier positions ran again; they have been recorded. Padding has a count of 0.
            for row, counts in zip(self.rows, exits.iterations[:, self.computed - start :].tolist()):
                trace.iterations[row] += [count for count in counts if count]
        self.computed = self.text.shape[1]
        # They spell nothing. An engine's wrapper has the model as `module`, and a config, if any, of its own.
        unused = getattr(getattr(getattr(model, "module", model), "config", None), "unused_ids", 0)
        return logits[:, : logits.shape[1] - unused] if unused else logits

    def append(self, chosen: Tensor, continues: Tensor) -> bool:
        """Append the new ids, (rows,), and drop the rows that stop; return True if any row is left."""
        self.text = torch.cat((self.text, chosen[:, None]), dim=1)
        if bool(continues.all()):
            return True
        kept = continues.nonzero()[:, 0]
        self.rows = [self.rows[i] for i in kept.tolist()]
        self.text, self.padding = self.text[kept], self.padding[kept]
        if self.cache is not None:
            self.cache.keep_rows(kept)
        return bool(self.rows)


def to_id_lists(tokens: Prompts) -> list[list[int]]:
    """Return the prompts as lists of ids; ConfigError for no prompt, an empty one, or a tensor not (batch, prompt).

    Raises:
        ConfigError: a tensor that is not (batch, prompt), no prompt, or a prompt without a token.
    """
    if isinstance(tokens, Tensor) and tokens.dim() != 2:
        raise ConfigError(f"tokens have shape {tuple(tokens.shape)}, they must be (batch, prompt): one row per prompt.")
    prompts = tokens.tolist() if isinstance(tokens, Tensor) else [[int(id) for id in each] for each in tokens]
    if not prompts:
        raise ConfigError("there is no prompt.")
    if not all(prompts):
        raise ConfigError("the prompt has no token. Give at least one character in --prompt.")
    return prompts

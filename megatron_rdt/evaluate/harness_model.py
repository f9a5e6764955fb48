"""A model and its tokenizer in the terms of lm-evaluation-harness: answers to its requests, at one T after another.

Only this module and `harness` import lm_eval, which is an extra.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_rdt.data import Batch, Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import HUGGING_FACE
from megatron_rdt.errors import ConfigError
from megatron_rdt.evaluate.row_scores import score_rows
from megatron_rdt.inference.generate import stream
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.terminal import show_progress

# What a task may set beside `until`; temperature 0, the default, takes the likeliest token.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
MOST_NEW_TOKENS = 256  # of a task that does not say, as for the harness's own models

# A text's ids before those that are scored, and these; with the texts themselves, or None for part of a longer text.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """A model that answers the requests of `lm_eval.evaluator.evaluate` with `loops` iterations.

    Scores of all T come from one pass and are kept, so evaluating again at another T costs nothing but generation.

    Args:
        model: in evaluation mode.
        tokenizer: of the model; with `begins_with_bos` every text has BOS in front, as in training.
        loops: the values of T.
        length: most tokens that the model is given; of a longer text the last ones.
        batch_size: rows per forward pass.

    Attributes:
        loops: T of the next answers, one of the values given.
        cut: number of requests whose text was longer than `length`.
        unknown: number of scored requests with characters that the tokenizer has no ids for.
    """

    def __init__(
        self,
        model: RecurrentDepthTransformer,
        tokenizer: Tokenizer,
        loops: Sequence[int],
        length: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self._model, self._texts, self._all_loops = model, tokenizer, sorted({*loops})
        self.loops, self.max_length, self.batch_size = self._all_loops[0], length, batch_size
        self.cut = self.unknown = 0
        # Where a SentencePiece model has no pieces for bytes; of Hugging Face's, tokenizer.json decides.
        self._unknown_id = -1 if tokenizer.kind == HUGGING_FACE else tokenizer.processor.unk_id()
        self._adds_bos = tokenizer.begins_with_bos and tokenizer.bos >= 0
        self._scores: dict[tuple[str, ...], dict[int, Any]] = {}
        self._stderr = sys.stderr

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self._texts.eos

    @property
    def prefix_token_id(self) -> int:
        """Id in front of a text that has no context: BOS where training had it, else EOS, which precedes every text.

        Raises:
            ConfigError: the tokenizer has neither.
        """
        index = self._texts.bos if self._adds_bos else self._texts.eos
        if index < 0:
            raise ConfigError(
                "the tokenizer has no token that ends a text, so nothing can stand before the first one. Choose tasks "
                "whose requests have a context."
            )
        return index

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, with BOS in front where training had it, unless `add_special_tokens` is False."""
        return self._texts.encode(string, bos=self._adds_bos and add_special_tokens is not False)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and True if every one of its tokens is the likeliest."""
        self._keep_scores(requests, lambda new: super(HarnessModel, self).loglikelihood(new, disable_tqdm=True))
        return [self._scores[request.args][self.loops] for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in disjoint windows where it is longer than the context."""
        self._keep_scores(requests, self._score_texts)
        return [self._scores[request.args][self.loops] for request in requests]

    def _keep_scores(
        self, requests: Sequence[Instance], score: Callable[[list[Instance]], list[dict[int, Any]]]
    ) -> None:
        """Score the requests that have not been, at every T; a request is known by its texts."""
        new = {request.args: request for request in requests if request.args not in self._scores}
        self._scores.update(zip(new, score(list(new.values())), strict=True))

    def _score_texts(self, requests: list[Instance]) -> list[dict[int, float]]:
        """Return the log-probability of each text by T."""
        windows = []
        for row, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((row, make_disjoint_window(pair)))
        sums: list[dict[int, float]] = [dict.fromkeys(self._all_loops, 0.0) for _ in requests]
        scores = self._loglikelihood_tokens([(None, *pair) for _, pair in windows])
        for (row, _), by_loops in zip(windows, scores, strict=True):
            for t, (score, _) in by_loops.items():
                sums[row][t] += score
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False
    ) -> list[dict[int, tuple[float, bool]]]:
        """Return for each request, by T, the log-probability of its scored ids and True if all of them are the likeliest.

        Raises:
            ConfigError: there is nothing to score, or more than the context holds.
        """
        rows = [self._join_ids(*request) for request in requests]
        results: list[dict[int, tuple[float, bool]]] = [{} for _ in rows]
        device = next(self._model.parameters()).device
        longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # rows of a batch are of like length
        with self._show_progress(len(rows), "score") as advance:
            for first in range(0, len(rows), self.batch_size):
                chosen = longest_first[first : first + self.batch_size]
                tokens = torch.zeros(len(chosen), len(rows[chosen[0]]), dtype=torch.int64)
                counted = torch.zeros_like(tokens, dtype=torch.bool)
                for line, row in enumerate(chosen):  # nothing after a token can change what is said of it
                    end = len(rows[row])
                    tokens[line, :end] = torch.tensor(rows[row])
                    counted[line, end - len(requests[row][2]) : end] = True
                batch = Batch(tokens, loss_mask=counted)
                for t, scores in score_rows(self._model, batch, self._all_loops, len(chosen), device).items():
                    for row, loss, misses in zip(chosen, scores.losses.tolist(), scores.misses.tolist(), strict=True):
                        results[row][t] = (-loss, misses == 0)
                advance(len(chosen))
        return results

    def _join_ids(self, texts: tuple[str, str] | None, context: list[int], scored: list[int]) -> list[int]:
        """Return the ids of a row: as much of the context as fits before those that are scored, at least one id."""
        if not scored:
            raise ConfigError(
                f"the continuation {texts and texts[1]!r} adds no token to its context, which ends with "
                f"{texts and texts[0][-20:]!r}: the tokenizer joins them. Let the task's continuations begin with a space."
            )
        if len(scored) > self.max_length:
            raise ConfigError(
                f"a continuation has {len(scored)} tokens, the context {self.max_length}. Raise --sequence_length."
            )
        ids = (context or [self.prefix_token_id]) + scored
        self.unknown += self._unknown_id in ids
        self.cut += len(ids) > self.max_length + 1  # the last one is predicted and never given
        return ids[-self.max_length - 1 :]

    @contextmanager
    def _show_progress(self, total: int, title: str) -> Iterator[Callable[[int], None]]:
        """Show progress of so many requests where standard error was when this object was made: lm_eval's is dropped."""
        with redirect_stderr(self._stderr), show_progress(total, title, "requests") as advance:
            yield advance

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each prompt, up to the first of the texts that the request stops at."""
        groups: dict[str, list[int]] = {}  # requests of a batch share their settings
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for row, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(row)
        texts = [""] * len(requests)
        with self._show_progress(len(requests), f"generate at T = {self.loops}") as advance:
            for rows in groups.values():
                settings = read_generation(requests[rows[0]].args[1])
                rows.sort(key=lambda row: -len(prompts[row]))
                for first in range(0, len(rows), self.batch_size):
                    chosen = rows[first : first + self.batch_size]
                    added = self._continue([prompts[row] for row in chosen], chosen, settings)
                    for row, text in zip(chosen, added, strict=True):
                        texts[row] = text
                    advance(len(chosen))
        return texts

    def _continue(self, prompts: list[list[int]], rows: list[int], settings: dict[str, Any]) -> list[str]:
        """Return the new text of each prompt.

        Args:
            prompts: ids.
            rows: their numbers among the requests, by which repeated ones draw different tokens.
            settings: of `read_generation`.
        """
        room = self.max_length - settings["new_tokens"]
        if self.loops == self._all_loops[0]:  # once, not at every T
            self.cut += sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] or [self.prefix_token_id] for prompt in prompts]
        added: list[list[int]] = [[] for _ in prompts]
        sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings}
        eos = self._texts.eos if self._texts.eos >= 0 else None
        for step in stream(self._model, prompts, self.loops, settings["new_tokens"], rows=rows, eos=eos, **sampling):
            for row, index in step.items():
                added[row].append(index)
            if all(any(stop in self._texts.decode(added[row]) for stop in settings["until"]) for row in step):
                break
        return [cut_at_stops(self._texts.decode(ids), settings["until"]) for ids in added]


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of the stops in it."""
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0]
    return text


def read_generation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which a task generates: new_tokens, until, temperature, and perhaps top_k and top_p.

    Args:
        given: the task's `generation_kwargs`.

    Raises:
        ConfigError: the task asks for something that there is not.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MOST_NEW_TOKENS))
    until, new_tokens = settings.pop("until"), settings.pop("max_gen_toks")
    unknown = sorted(name for name in settings if name not in SAMPLING)
    if unknown:
        raise ConfigError(
            f"a task's generation_kwargs have {', '.join(unknown)}, which generation here does not know; it knows until, "
            f"max_gen_toks, {', '.join(SAMPLING)}. Export the checkpoint and run lm_eval on that."
        )
    drawn = bool(settings.pop("do_sample"))
    settings["temperature"] = float(settings.get("temperature") or 0) if drawn else 0.0
    return {**settings, "until": [stop for stop in until if stop], "new_tokens": new_tokens}

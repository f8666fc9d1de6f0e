"""Greedy generation: many prompts at many probes in one batch.

The rows of all probes run together, as many as fit, padded on the left, with transformers' own loop
and its cache of keys and values. A layer reads its codes once and applies each probe's scales to
its rows. An answer does not depend on what is generated with it, but for the rounding of sums.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from qzo.data.tokenize import RenderedPrompt, encode_prompt
from qzo.data.vocabulary import check_tokens, num_embeddings
from qzo.errors import ConfigError, DataError
from qzo.model.linear import Live

MAX_NEW_TOKENS = 50  # MeZO, arXiv 2305.17333, appendix E.2
AUTO_STOP = "auto"  # a line end; in a conversation the end of the turn


class Generator:
    """Writes greedy completions.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        live: What its quantized layers see; needed for several probes.
        max_length: Tokens of a prompt at most; all that the model has room for if None.
        max_new_tokens: Tokens of a completion at most.
        stop: Where a completion ends; not part of it. None: at the end-of-text token alone.
            ``auto``: for prompts from a chat template also at what the template puts behind an
            answer, for others at a line end.
        batch_size: Prompts that are answered together; None for all, or those of ``max_tokens``.
        max_tokens: Tokens of prompts and answers, padding included, that are there together.

    Raises:
        ConfigError: The model has no room for a prompt and that many tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        live: Live | None = None,
        *,
        max_length: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: str | None = AUTO_STOP,
        batch_size: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        positions = int(getattr(model.config, "max_position_embeddings", 2048))
        if max_new_tokens >= positions:
            raise ConfigError(
                f"max_new_tokens: expected less than the model's {positions} positions, got "
                f"{max_new_tokens}"
            )
        self._model, self._tokenizer, self._live = model, tokenizer, live or Live()
        room = positions - max_new_tokens
        self._prompt_tokens = room if max_length is None else min(room, max_length)
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._batch_size, self._max_tokens = batch_size, max_tokens
        self._criteria: dict[str, StopStringCriteria] = {}

    def write(self, prompts: Sequence[Sequence[str]]) -> list[list[str]]:
        """Return the completion of every prompt.

        Args:
            prompts: Those of each probe; all probes need not have equally many. All are from a chat
                template, or none.
        """
        rows = self._all_encoded(chain.from_iterable(prompts))
        owners = [probe for probe, of_probe in enumerate(prompts) for _ in of_probe]
        texts = [""] * len(rows)
        for batch in self._batches(rows, owners):
            counts = [sum(owners[i] == probe for i in batch) for probe in range(len(prompts))]
            stop = self._stop_of(next(chain.from_iterable(prompts)))
            with _rows_of_probes(self._model, self._live, counts):
                answers = self._texts([rows[i] for i in batch], stop)
            for i, answer in zip(batch, answers, strict=True):
                texts[i] = answer
        left = iter(texts)
        return [list(islice(left, len(of_probe))) for of_probe in prompts]

    def runs(self, prompts: Sequence[Sequence[str]]) -> list[slice]:
        """Split probes into runs whose prompts are answered together, or of one probe.

        Args:
            prompts: Those of each probe.
        """
        lengths = [len(row) for row in self._all_encoded(chain.from_iterable(prompts))]
        ends = (0, *accumulate(map(len, prompts)))
        starts: list[int] = []
        for probe in range(len(prompts)):
            first = ends[starts[-1]] if starts else 0
            if not starts or not self._fits(lengths[first : ends[probe + 1]]):
                starts.append(probe)
        return [slice(start, stop) for start, stop in pairwise((*starts, len(prompts)))]

    def _batches(self, rows: Sequence[list[int]], owners: Sequence[int]) -> list[list[int]]:
        """Split rows into batches that fit, those of a probe in the order of their lengths."""
        if self._fits([len(row) for row in rows]):
            return [list(range(len(rows)))] if rows else []
        batches: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda i: (owners[i], len(rows[i]))):
            if not batches or not self._fits([len(rows[k]) for k in (*batches[-1], i)]):
                batches.append([])
            batches[-1].append(i)
        return batches

    def _fits(self, lengths: Sequence[int]) -> bool:
        """Tell whether prompts of these lengths are answered together."""
        if self._batch_size is not None and len(lengths) > self._batch_size:
            return False
        tokens = len(lengths) * (max(lengths, default=0) + self._max_new_tokens)
        return self._max_tokens is None or tokens <= self._max_tokens

    def _all_encoded(self, prompts: Iterable[str]) -> list[list[int]]:
        """Return the tokens of prompts, of which many are the same object."""
        prompts = list(prompts)
        known = {id(prompt): prompt for prompt in prompts}
        tokens = {key: self._encoded(prompt) for key, prompt in known.items()}
        return [tokens[id(prompt)] for prompt in prompts]

    def _stop_of(self, prompt: str) -> str | None:
        if self._stop != AUTO_STOP:
            return self._stop
        return (prompt.end or None) if isinstance(prompt, RenderedPrompt) else "\n"

    def _encoded(self, prompt: str) -> list[int]:
        tokens = encode_prompt(self._tokenizer, prompt, max_length=self._prompt_tokens)
        if not tokens:
            raise DataError(f"prompt: expected at least one token, got {prompt!r}")
        check_tokens(tokens, num_embeddings(self._model), self._tokenizer, "prompt")
        return tokens

    def _texts(self, rows: Sequence[list[int]], stop: str | None) -> list[str]:
        width, device = max(map(len, rows)), self._model.device
        # Masked. The row's own first token, so that what counts the tokens of a prompt, such as a
        # penalty for repetition, finds no other one.
        padded = [row[:1] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]  # transformers: untyped
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(self._ends) or None,
                stopping_criteria=self._stopping(stop),
                pad_token_id=self._padding,
            )
        return [self._text(row, stop) for row in output[:, width:].tolist()]

    @property
    def _ends(self) -> set[int]:
        """The tokens that end a text: the model's, and the one that training puts there."""
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        trained = self._tokenizer.eos_token_id
        return ends if trained is None else ends | {trained}

    @property
    def _padding(self) -> int:
        """The token that follows an answer which ended before the others; the model reads it."""
        known, tokenizer = num_embeddings(self._model), self._tokenizer
        found = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token]
        return next((token for token in found if token < known), 0)

    def _stopping(self, stop: str | None) -> StoppingCriteriaList:
        """Return what stops at a string.

        Raises:
            ConfigError: transformers cannot tell where tokens of this kind hold it.
        """
        if stop is None:
            return StoppingCriteriaList()
        if stop not in self._criteria:  # reads the whole vocabulary
            try:
                self._criteria[stop] = StopStringCriteria(self._tokenizer, stop)
            except ValueError as error:
                reason = str(error).partition(".")[0]
                raise ConfigError(
                    "generation_stop: expected null, or a string that can be found in the tokens "
                    f"of this tokenizer, got {stop!r}: {reason}"
                ) from error
        return StoppingCriteriaList([self._criteria[stop]])

    def _text(self, tokens: list[int], stop: str | None) -> str:
        """Decode a row up to the first token that ends it or the stop; what follows is padding."""
        ends = self._ends
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        text: str = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return text.split(stop)[0] if stop else text


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: str | None = None,
) -> str:
    """Return the greedy completion of a prompt, without the stop string."""
    generator = Generator(model, tokenizer, max_new_tokens=max_new_tokens, stop=stop)
    return generator.write([[prompt]])[0][0]


@contextmanager
def _rows_of_probes(model: PreTrainedModel, live: Live, counts: Sequence[int]) -> Iterator[None]:
    """Keep the layers told which tokens are whose: of every row, as many as a forward has."""
    rows = (0, *accumulate(counts))

    def tell(num_tokens: int) -> None:
        live.bounds = tuple(row * (num_tokens // rows[-1]) for row in rows)

    def before_model(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        tell(named["input_ids"].numel())

    def before_head(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tell(inputs[0].shape[:-1].numel())

    handles = [model.register_forward_pre_hook(before_model, with_kwargs=True)]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(before_head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        live.bounds = None

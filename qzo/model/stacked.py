"""Stacked forwards: the batch once per probe, in one pass through the model.

Up to the first block with trained scales all probes compute the same, so there every text runs
once; in front of that block (the fork) its tokens are repeated, once for every probe that covers
them. Tokens are packed into one row (``attention``) and a prefix that texts of a probe have in
common is computed once. A model whose tokens meet elsewhere than in causal attention gets rows
padded on the right instead. Only answer positions reach the head, some at a time, so the logits of
whole sequences never exist.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qzo.data.tokenize import EncodedExample
from qzo.model.attention import PackedRows, pack_rows, packed_attention
from qzo.model.fp32_compute import sums_in_fp32
from qzo.model.linear import Live
from qzo.model.prefixes import prefixes_of_texts

Text = Sequence[int]  # token ids

LOGITS_ELEMENTS = 2**25  # that exist at one time


@dataclass(frozen=True)
class Answer:
    """One candidate of one example at one probe.

    Attributes:
        columns: Its places among the answer positions.
        targets: The tokens to be predicted there.
    """

    columns: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch: ``(1, tokens)`` where packed, else ``(texts, width)``.

    Attributes:
        bounds: Where each probe begins among the flattened tokens, and the end.
        attention: Which tokens form a text, or None: rows are texts, padded on the right.
    """

    bounds: tuple[int, ...]
    attention: PackedRows | None


@dataclass(frozen=True)
class Stack:
    """A stacked batch.

    Attributes:
        input_ids: Token ids in front of the fork.
        position_ids: Their positions in their texts, or None where rows are texts.
        front: The tokens in front of the fork: one probe.
        origin: Of every token behind the fork (where packed) or row (else), the one in front.
        behind: The tokens behind the fork.
        answer_positions: Flat tokens behind the fork that reach the head.
        answer_bounds: Where each probe begins among them, and the end.
        answers: Candidates of each item; an item is an example at a probe, probes outermost.
    """

    input_ids: Int[Tensor, "rows width"]
    position_ids: Int[Tensor, "rows width"] | None
    front: Tokens
    origin: Int[Tensor, " repeated"]
    behind: Tokens
    answer_positions: Int[Tensor, " answers"]
    answer_bounds: tuple[int, ...]
    answers: tuple[tuple[Answer, ...], ...]


class _Packing:
    """Texts in one row of tokens, common prefixes merged."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.texts: dict[Text, list[int]] = {}  # of the current probe: its tokens
        self.paths: list[list[int]] = []
        self.bounds = [0]
        self._child: dict[tuple[int, int], int] = {}

    def add(self, text: Text) -> list[int]:
        """Return the places of the tokens of a text; new ones are appended."""
        path = self.texts.get(text)
        if path is not None:
            return path
        path, place = [], -1
        for position, token in enumerate(text):
            place = self._child.setdefault((place, token), len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.positions.append(position)
            path.append(place)
        self.texts[text] = path
        self.paths.append(path)
        return path

    def end_probe(self) -> None:
        """Merge nothing of what follows with what came before."""
        self.bounds.append(len(self.ids))
        self._child.clear()
        self.texts.clear()

    def tokens(self, device: torch.device) -> Tokens:
        """Return the layout."""
        attention = pack_rows(self.paths, len(self.ids), device)
        return Tokens(tuple(self.bounds), attention)


def build_stack(
    items: Sequence[Sequence[EncodedExample]], device: torch.device, *, is_packed: bool = True
) -> Stack:
    """Stack the examples of every probe.

    Args:
        items: One list of examples per probe.
        device: Where the tensors go.
        is_packed: Pack the tokens into one row; else pad rows on the right.
    """
    return _packed(items, device) if is_packed else _padded(items, device)


def _packed(items: Sequence[Sequence[EncodedExample]], device: torch.device) -> Stack:
    front, behind = _Packing(), _Packing()
    origin: dict[int, int] = {}
    paths: list[list[list[int]]] = []
    for examples in items:
        for example in examples:
            paths.append([behind.add(row) for row in example.rows])
            for row, path in zip(example.rows, paths[-1], strict=True):
                origin.update(zip(path, front.add(row), strict=True))
        behind.end_probe()
    front.end_probe()
    columns, answers = _answers([example for examples in items for example in examples], paths)
    return Stack(
        input_ids=torch.tensor([front.ids], device=device),
        position_ids=torch.tensor([front.positions], device=device),
        front=front.tokens(device),
        origin=torch.tensor([origin[place] for place in range(len(behind.ids))], device=device),
        behind=behind.tokens(device),
        answer_positions=torch.tensor(columns, device=device),
        answer_bounds=_count_below(columns, behind.bounds),
        answers=answers,
    )


def _padded(items: Sequence[Sequence[EncodedExample]], device: torch.device) -> Stack:
    rows = [row for examples in items for example in examples for row in example.rows]
    width = max(map(len, rows))
    front = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    starts = iter(range(0, len(rows) * width, width))
    paths = [
        [range(start, start + width) for start in islice(starts, len(example.rows))]
        for examples in items
        for example in examples
    ]
    counts = [sum(len(example.rows) for example in examples) for examples in items]
    bounds = tuple(width * sum(counts[:probe]) for probe in range(len(counts) + 1))
    columns, answers = _answers([example for examples in items for example in examples], paths)
    padded = [[*row, *[0] * (width - len(row))] for row in front]
    return Stack(
        input_ids=torch.tensor(padded, device=device),
        position_ids=None,
        front=Tokens((0, len(front) * width), None),
        origin=torch.tensor([front[row] for row in rows], device=device),
        behind=Tokens(bounds, None),
        answer_positions=torch.tensor(columns, device=device),
        answer_bounds=_count_below(columns, bounds),
        answers=answers,
    )


def _answers(
    examples: Sequence[EncodedExample], paths: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[int], tuple[tuple[Answer, ...], ...]]:
    """Return the flat positions that reach the head, in order, and what is read there.

    Args:
        examples: Of all probes.
        paths: Flat tokens of every row of every example.
    """
    read = [
        [[of_example[c.row][p] for p in c.positions] for c in example.candidates]
        for example, of_example in zip(examples, paths, strict=True)
    ]
    columns = sorted({place for item in read for places in item for place in places})
    column = {place: number for number, place in enumerate(columns)}
    answers = tuple(
        tuple(
            Answer(tuple(column[place] for place in places), candidate.targets)
            for candidate, places in zip(example.candidates, item, strict=True)
        )
        for example, item in zip(examples, read, strict=True)
    )
    return columns, answers


def _count_below(columns: Sequence[int], bounds: Sequence[int]) -> tuple[int, ...]:
    """Return how many of the sorted columns lie below each bound."""
    return tuple(bisect_left(columns, bound) for bound in bounds)


def answer_scores(model: PreTrainedModel, live: Live, stack: Stack) -> list[list[float]]:
    """Return the mean log-probability per token (nats) of every candidate of every item."""
    targets = _Targets.of(stack)
    with torch.inference_mode():
        parts = [
            targets.log_probabilities(logits, first)
            for first, logits in _logits_in_chunks(model, live, stack)
        ]
        found = torch.cat(parts).tolist()
    values = iter([found[place] for place in targets.places])
    return [
        [sum(next(values) for _ in a.columns) / len(a.columns) for a in item]
        for item in stack.answers
    ]


@dataclass(frozen=True)
class _Targets:
    """The tokens to be predicted, in the order of their answer positions.

    Attributes:
        bounds: How many of them come before each answer position, and before the end.
        columns: The answer position of each.
        tokens: Their ids.
        places: Where each target is found here, answer by answer.
    """

    bounds: tuple[int, ...]
    columns: Int[Tensor, " targets"]
    tokens: Int[Tensor, " targets"]
    places: tuple[int, ...]

    @classmethod
    def of(cls, stack: Stack) -> "_Targets":
        """Return the targets of a stack, on its device before the forward starts."""
        answers = [answer for item in stack.answers for answer in item]
        columns = [column for answer in answers for column in answer.columns]
        tokens = [target for answer in answers for target in answer.targets]
        order = sorted(range(len(columns)), key=columns.__getitem__)
        by_column = [columns[place] for place in order]
        device = stack.answer_positions.device
        return cls(
            _count_below(by_column, range(len(stack.answer_positions) + 1)),
            torch.tensor(by_column, device=device),
            torch.tensor([tokens[place] for place in order], device=device),
            tuple(sorted(range(len(order)), key=order.__getitem__)),
        )

    def log_probabilities(
        self, logits: Float[Tensor, "positions vocabulary"], first: int
    ) -> Float[Tensor, " _"]:
        """Return those of the targets at some positions, the first of which has a number."""
        here = slice(self.bounds[first], self.bounds[first + len(logits)])
        columns = self.columns[here] - first
        return logits[columns, self.tokens[here]].float() - _log_totals(logits)[columns]


def _log_totals(logits: Float[Tensor, "positions vocabulary"]) -> Float[Tensor, " positions"]:
    """Return the log-sum-exp of every row in fp32; on a CPU one row at a time, in its cache."""
    if logits.is_cuda:
        return logits.float().logsumexp(-1)
    return torch.stack([row.float().logsumexp(-1) for row in logits])


def exact_scores(
    model: PreTrainedModel, live: Live, stack: Stack
) -> list[Float[Tensor, " candidates"]]:
    """Return the same as tensors, in fp32, that autograd can trace or that carry tangents."""
    logits = _answer_logits(model, live, stack)
    flat = [answer for item in stack.answers for answer in item]
    by_answer = _log_probabilities(logits, stack.answers).split([len(a.columns) for a in flat])
    means = torch.stack([values.mean() for values in by_answer])
    return list(means.split([len(item) for item in stack.answers]))


def _answer_logits(
    model: PreTrainedModel, live: Live, stack: Stack
) -> Float[Tensor, "answers vocabulary"]:
    """Return the logits of all answer positions together."""
    ((_, logits),) = _logits_in_chunks(model, live, stack, rows=len(stack.answer_positions))
    return logits


def _logits_in_chunks(
    model: PreTrainedModel, live: Live, stack: Stack, rows: int | None = None
) -> Iterator[tuple[int, Float[Tensor, "positions vocabulary"]]]:
    """Yield the number of a first answer position and the logits of so many rows from there.

    The model's own forward makes the logits of every chunk, as some change what the head returns;
    what comes before the head runs once.

    Args:
        model: The model.
        live: What its layers see.
        stack: The batch.
        rows: Of a chunk; as many as ``LOGITS_ELEMENTS`` allow unless given.
    """
    count = len(stack.answer_positions)
    rows = rows or max(LOGITS_ELEMENTS // model.config.get_text_config().vocab_size, 1)
    prefixes = partial(prefixes_of_texts, live) if live.has_prefixes else None
    with ExitStack() as context:
        context.enter_context(sums_in_fp32())
        context.enter_context(_forked(live, stack))
        chunk = context.enter_context(_head_sees(model, live, stack, rows))
        if stack.front.attention is not None:
            context.enter_context(packed_attention(model, lambda: live.attention, prefixes))
        if count > rows:
            context.enter_context(_running_once(model.get_decoder()))
        for first in range(0, count, rows):
            chunk.first = first
            output = model(
                input_ids=stack.input_ids, position_ids=stack.position_ids, use_cache=False
            )
            yield first, output.logits[0]


def _log_probabilities(
    logits: Float[Tensor, "answers vocabulary"], items: Sequence[Sequence[Answer]]
) -> Float[Tensor, " targets"]:
    """Return the log-probability of every target of every answer."""
    log_totals = _log_totals(logits)
    flat = [answer for item in items for answer in item]
    columns = [column for a in flat for column in a.columns]
    targets = [target for a in flat for target in a.targets]
    return logits[columns, targets].float() - log_totals[columns]


@dataclass
class _Chunk:
    """The answer positions that the head sees at the moment, from the first one on."""

    first: int = 0


@contextmanager
def _head_sees(model: PreTrainedModel, live: Live, stack: Stack, rows: int) -> Iterator[_Chunk]:
    """Let only some answer positions reach the head while the block runs."""
    chunk = _Chunk()

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stop = min(chunk.first + rows, stack.answer_bounds[-1])
        live.bounds = [
            min(max(bound, chunk.first), stop) - chunk.first for bound in stack.answer_bounds
        ]
        positions = stack.answer_positions[chunk.first : stop]
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        return (hidden.index_select(0, positions)[None], *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield chunk
    finally:
        handle.remove()


@contextmanager
def _running_once(module: nn.Module) -> Iterator[None]:
    """Let a module return the result of its first call at every call while the block runs."""
    forward = module.forward
    results: list[Any] = []

    def remembered(*inputs: Any, **named: Any) -> Any:
        if not results:
            results.append(forward(*inputs, **named))
        return results[0]

    own = vars(module).get("forward")
    module.forward = remembered
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _forked(live: Live, stack: Stack) -> Iterator[None]:
    """Repeat the tokens at the fork while the block runs.

    Whatever a decoder block behind it is given by token or row in front of it (hidden states,
    masks, positions, Bloom's biases by row and head) is repeated; every block is given positions
    and masks anew.
    """
    rows, width = stack.input_ids.shape
    is_packed = stack.front.attention is not None

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if is_packed:
            by_token = value.shape[:2] == (1, width)
            return value.index_select(1, stack.origin) if by_token else value
        if len(value) == rows:
            return value.index_select(0, stack.origin)
        if value.dim() == 3 and value.shape[1:] == (1, width) and len(value) % rows == 0:
            return value.unflatten(0, (rows, -1)).index_select(0, stack.origin).flatten(0, 1)
        return value

    def repeat_all(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        live.bounds, live.attention = stack.behind.bounds, stack.behind.attention
        return tree_map(repeat, (inputs, named))

    live.bounds, live.attention = stack.front.bounds, stack.front.attention
    handles = [
        block.register_forward_pre_hook(repeat_all, with_kwargs=True) for block in live.forked
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        live.bounds = live.attention = None

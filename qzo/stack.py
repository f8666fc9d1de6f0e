"""Stacked forwards: the batch once per probe, in one pass through the model.

Up to the first block with trained scales all probes compute the same, so there the rows run once;
in front of that block (the fork) they are repeated, once for every probe that covers them.
Rows are padded on the right and need no attention mask: under causal attention a token never sees
what follows it. Quantized layers drop the padding (``linear``). Only answer positions reach the
head, so the logits of whole sequences never exist.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qzo.encoding import Candidate, EncodedExample
from qzo.linear import Live, Rows


@dataclass(frozen=True)
class Answer:
    """One candidate of one example at one probe.

    Attributes:
        row: Row of the stack.
        columns: Its columns among the answer positions of that row.
        targets: The tokens to be predicted there.
    """

    row: int
    columns: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """A stacked batch.

    Attributes:
        input_ids: Token ids of the rows before the fork, padded on the right.
        shared: What those rows are: one probe.
        origin: The row before the fork of every row behind it.
        rows: What the rows behind the fork are.
        positions: Positions of each row that reach the head, padded with 0.
        answers: Candidates of each item; an item is an example at a probe, probes outermost.
    """

    input_ids: Int[Tensor, "shared width"]
    shared: Rows
    origin: Int[Tensor, " rows"]
    rows: Rows
    positions: Int[Tensor, "rows answers"]
    answers: tuple[tuple[Answer, ...], ...]


def build_stack(items: Sequence[Sequence[EncodedExample]], device: torch.device) -> Stack:
    """Stack the examples of every probe.

    Args:
        items: One list of examples per probe.
        device: Where the tensors go.
    """
    token_rows: list[tuple[int, ...]] = []
    columns: list[list[int]] = []
    answers: list[tuple[Answer, ...]] = []
    bounds = [0]
    for examples in items:
        for example in examples:
            first = len(token_rows)
            token_rows += example.rows
            columns += [_positions(example, row) for row in range(len(example.rows))]
            answers.append(tuple(_answer(c, first, columns) for c in example.candidates))
        bounds.append(len(token_rows))
    shared = list(dict.fromkeys(token_rows))
    place = {row: number for number, row in enumerate(shared)}
    return Stack(
        input_ids=_padded(shared, device),
        shared=Rows((0, len(shared)), tuple(len(row) for row in shared)),
        origin=torch.tensor([place[row] for row in token_rows], device=device),
        rows=Rows(tuple(bounds), tuple(len(row) for row in token_rows)),
        positions=_padded(columns, device),
        answers=tuple(answers),
    )


def _positions(example: EncodedExample, row: int) -> list[int]:
    used = {p for c in example.candidates if c.row == row for p in c.positions}
    return sorted(used)


def _answer(candidate: Candidate, first: int, columns: Sequence[Sequence[int]]) -> Answer:
    row = first + candidate.row
    place = {position: column for column, position in enumerate(columns[row])}
    return Answer(row, tuple(place[p] for p in candidate.positions), candidate.targets)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "rows width"]:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def answer_scores(model: PreTrainedModel, live: Live, stack: Stack) -> list[list[float]]:
    """Return the mean log-probability per token (nats) of every candidate of every item."""
    with (
        torch.inference_mode(),
        _forked(live, stack),
        _head_sees(model, stack.positions),
    ):
        logits = model(input_ids=stack.input_ids, use_cache=False).logits
        return _mean_log_probabilities(logits, stack.answers)


def _mean_log_probabilities(
    logits: Float[Tensor, "rows answers vocabulary"], items: Sequence[Sequence[Answer]]
) -> list[list[float]]:
    log_totals = torch.stack([row.float().logsumexp(-1) for row in logits])
    flat = [answer for item in items for answer in item]
    rows = [a.row for a in flat for _ in a.columns]
    columns = [column for a in flat for column in a.columns]
    targets = [target for a in flat for target in a.targets]
    chosen = logits[rows, columns, targets].float() - log_totals[rows, columns]
    values = iter(chosen.tolist())
    return [[sum(next(values) for _ in a.columns) / len(a.columns) for a in item] for item in items]


@contextmanager
def _head_sees(model: PreTrainedModel, positions: Int[Tensor, "rows answers"]) -> Iterator[None]:
    """Let only these positions reach the head while the block runs."""

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        index = positions[..., None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forked(live: Live, stack: Stack) -> Iterator[None]:
    """Repeat the rows in front of the fork while the block runs.

    Whatever the block is given by rows (hidden states, masks, positions) is repeated with them.
    """
    assert live.fork is not None
    count = len(stack.shared.lengths)

    def repeat(value: Any) -> Any:
        by_rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == count
        return value.index_select(0, stack.origin) if by_rows else value

    def repeat_all(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        live.rows = stack.rows
        return tree_map(repeat, (inputs, named))

    live.rows = stack.shared
    handle = live.fork.register_forward_pre_hook(repeat_all, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        live.rows = None

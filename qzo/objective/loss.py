"""What is minimised: batches as a function of (data_seed, step), and their losses at probes.

- ``language_modeling``: mean negative log-probability per token of the right answer, in nats.
- ``classification``: cross-entropy over the candidates, whose logits are their mean token
  log-probabilities (MeZO, arXiv 2305.17333, section 3).
- Or minus a reward; see ``rewards``.

The loss of a probe is the mean over its examples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from qzo.data.examples import ExampleSet, LossName, Question
from qzo.data.tokenize import EncodedExample
from qzo.distributed import Ranks
from qzo.errors import ConfigError, DataError
from qzo.method.probes import STACKED_TOKENS, Probe
from qzo.method.trained_vector import Scales
from qzo.model.attention import can_pack
from qzo.model.autograd import tangents
from qzo.model.generate import Generator
from qzo.model.linear import Live
from qzo.model.stacked import Stack, answer_scores, build_stack, exact_scores
from qzo.objective.rewards import (
    WRITTEN,
    Judge,
    ObjectiveName,
    RewardFunction,
    check_objective,
    is_right,
    make_judge,
)

Batch = list[list[Any]]  # micro-batches of encoded examples, or of questions to write answers to


class Objective:
    """The training loss.

    Args:
        model: Model with quantized layers.
        live: What its layers see.
        scales: Its trained vector.
        data: Training examples and which loss.
        batch_size: Examples of a micro-batch.
        num_micro_batches: Micro-batches of a step (gradient accumulation): their losses are summed
            under the same directions.
        data_seed: Seed of the order of the examples.
        is_stratified: Spread the classes evenly over an epoch: see ``stratified``.
        ranks: The processes that split the micro-batches of a step.
        objective: The loss, or which reward.
        reward: The function of objective ``reward``.
        generator: Writes the answers that are rewarded.

    Raises:
        DataError: There are no examples.
        ConfigError: A size is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        live: Live,
        scales: Scales,
        data: ExampleSet,
        *,
        batch_size: int,
        num_micro_batches: int = 1,
        data_seed: int = 0,
        is_stratified: bool = False,
        ranks: Ranks | None = None,
        objective: ObjectiveName = "loss",
        reward: RewardFunction | None = None,
        generator: Generator | None = None,
    ) -> None:
        if not data.examples:
            raise DataError("data: expected at least one training example, got none")
        for key, size in (
            ("per_device_train_batch_size", batch_size),
            ("gradient_accumulation_steps", num_micro_batches),
        ):
            if size < 1:
                raise ConfigError(f"{key}: expected a number above 0, got {size}")
        self._model, self._live, self._scales = model, live, scales
        check_objective(objective, data, reward)
        self._objective, self._loss = objective, data.loss
        self._generator = generator
        self._judge: Judge | None = None
        self._examples: Sequence[Any] = data.examples
        if objective == "loss":
            self._examples = [needed_rows(example, data.loss) for example in data.examples]
        elif objective in WRITTEN:
            self._examples, self._judge = data.questions, make_judge(objective, data, reward)
        self._batch_size = batch_size
        self._num_micro_batches = num_micro_batches
        self._data_seed = data_seed
        labels = [example.label for example in data.examples]
        self._labels = labels if is_stratified else [0] * len(labels)
        self._epoch, self._order = -1, list[int]()  # the newest epoch, and its order
        self._ranks = ranks or Ranks()
        if num_micro_batches < self._ranks.size:
            raise ConfigError(
                "gradient_accumulation_steps: expected at least the number of processes, "
                f"{self._ranks.size}, got {num_micro_batches}; they share the micro-batches of a "
                "step, and each needs one"
            )

    def batch(self, step: int) -> Batch:
        """Return the micro-batches of a step; every epoch is a permutation of the examples."""
        size, count = self._batch_size, self._num_micro_batches
        first = step * size * count
        picked = [self._example(first + i) for i in range(size * count)]
        return [picked[i : i + size] for i in range(0, len(picked), size)]

    def losses(self, probes: Sequence[Probe], batch: Batch) -> list[float]:
        """Return the loss at every probe, in as few stacked forwards as ``STACKED_TOKENS`` allow.

        Where a probe asks for its tangent, the slope of its loss along its direction instead.

        A micro-batch is the unit of work: its sums do not depend on which process computes them,
        and they are added in the order of the micro-batches.
        """
        starts = [0, *accumulate(len(micro_batch) for micro_batch in batch)]
        covered_by = [probe.examples or (0, starts[-1]) for probe in probes]
        places = [
            [i for i, (first, last) in enumerate(covered_by) if first < stop and start < last]
            for start, stop in pairwise(starts)
        ]

        def sums(number: int) -> list[float]:
            covering = [probes[place] for place in places[number]]
            return self._sums(covering, batch[number], starts[number])

        def means(results: Sequence[Sequence[float]]) -> list[float]:
            totals = [0.0] * len(probes)
            for covered, result in zip(places, results, strict=True):
                for place, total in zip(covered, result, strict=True):
                    totals[place] += total
            counts = [last - first for first, last in covered_by]
            return [total / count for total, count in zip(totals, counts, strict=True)]

        sizes = [len(covered) for covered in places]
        return self._ranks.share(sizes, sums, means, len(probes))

    def _sums(self, probes: Sequence[Probe], micro_batch: list[Any], start: int) -> list[float]:
        """Return each probe's sum of losses over the examples of a micro-batch that it covers.

        Of slopes, for a probe that asks for its tangent.
        """
        items = [
            micro_batch
            if probe.examples is None
            else micro_batch[max(probe.examples[0] - start, 0) : probe.examples[1] - start]
            for probe in probes
        ]
        sums = [0.0] * len(probes)
        for is_tangent, measure in ((False, self._item_losses), (True, self._item_slopes)):
            chosen = [i for i, probe in enumerate(probes) if probe.is_tangent is is_tangent]
            for places in _runs(chosen, [_num_tokens(items[i]) for i in chosen]):
                values = iter(measure([probes[i] for i in places], [items[i] for i in places]))
                for place in places:
                    sums[place] = sum(next(values) for _ in items[place])
        return sums

    def gradient(self, batch: Batch, layers: Sequence[int]) -> tuple[float, Float[Tensor, " size"]]:
        """Return the loss at the master, and its exact gradient by the values of some layers.

        The graph starts at the first of these layers: what runs in front of it leaves nothing in
        memory, and the backward ends there. See ``autograd`` for what a layer keeps. The slopes of
        the micro-batches are added in their order, in fp32.

        Args:
            batch: From ``batch``.
            layers: Places of the layers in the trained vector, in order.
        """
        total, loss = None, 0.0
        for micro_batch in batch:
            part, slopes = self._gradient_sum(micro_batch, layers)
            loss += part
            total = slopes if total is None else total.add_(slopes)
        assert total is not None
        count = sum(map(len, batch))
        return loss / count, total.div_(count)

    def _gradient_sum(
        self, examples: list[EncodedExample], layers: Sequence[int]
    ) -> tuple[float, Float[Tensor, " size"]]:
        stack = build_stack([examples], self._model.device, is_packed=can_pack(self._model))
        with torch.enable_grad(), self._scales.differentiable(self._live, layers) as leaves:
            losses = self._exact_losses(stack, examples)
            slopes = torch.autograd.grad(losses.sum(), leaves)
        return sum(losses.tolist()), torch.cat(slopes)

    def _item_slopes(
        self, probes: Sequence[Probe], items: Sequence[Sequence[EncodedExample]]
    ) -> list[float]:
        """Return how fast the losses change along the directions of the probes, exactly.

        Attention runs by torch's own formula: its fused kernels have no forward derivative.
        """
        stack = build_stack(items, self._model.device, is_packed=can_pack(self._model))
        examples = [example for part in items for example in part]
        with torch.no_grad(), tangents(), sdpa_kernel(SDPBackend.MATH):
            with self._scales.with_tangents(self._live, probes):
                losses = self._exact_losses(stack, examples)
            slopes = forward_ad.unpack_dual(losses).tangent
        assert slopes is not None
        return list(slopes.tolist())

    def _exact_losses(
        self, stack: Stack, examples: Sequence[EncodedExample]
    ) -> Float[Tensor, " items"]:
        scores = exact_scores(self._model, self._live, stack)
        losses = [
            (scores_of.logsumexp(0) if self._loss == "classification" else 0.0)
            - scores_of[example.label]
            for scores_of, example in zip(scores, examples, strict=True)
        ]
        return torch.stack(losses)

    def _item_losses(self, probes: Sequence[Probe], items: Sequence[Sequence[Any]]) -> list[float]:
        if self._judge is not None:
            return self._written_losses(self._judge, probes, items)
        stack = build_stack(items, self._model.device, is_packed=can_pack(self._model))
        with self._scales.shifted(self._live, probes):
            scores = answer_scores(self._model, self._live, stack)
        labels = [example.label for examples in items for example in examples]
        if self._objective == "accuracy":
            return [-is_right(row, label) for row, label in zip(scores, labels, strict=True)]
        return [
            example_loss(row, label, self._loss) for row, label in zip(scores, labels, strict=True)
        ]

    def _written_losses(
        self, judge: Judge, probes: Sequence[Probe], items: Sequence[Sequence[Question]]
    ) -> list[float]:
        """Return minus the reward of every answer, those of as many probes together as fit."""
        assert self._generator is not None
        prompts = [[question.prompt for question in questions] for questions in items]
        texts: list[list[str]] = []
        for run in self._generator.runs(prompts):
            with self._scales.shifted(self._live, probes[run]):
                texts += self._generator.write(prompts[run])
        pairs = zip(chain.from_iterable(items), chain.from_iterable(texts), strict=True)
        return [-judge(question, text) for question, text in pairs]

    def _example(self, number: int) -> Any:
        epoch, place = divmod(number, len(self._examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _order(self._data_seed, epoch, self._labels)
        return self._examples[self._order[place]]


def _num_tokens(examples: Sequence[Any]) -> int:
    """Return the tokens of some examples, common prefixes counted twice; 0 where answers grow."""
    return sum(len(row) for x in examples if isinstance(x, EncodedExample) for row in x.rows)


def _runs(places: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Split places into runs whose sizes add up to at most ``STACKED_TOKENS``, or of one place."""
    runs: list[list[int]] = []
    total = 0
    for place, size in zip(places, sizes, strict=True):
        if not runs or total + size > STACKED_TOKENS:
            runs.append([])
            total = 0
        runs[-1].append(place)
        total += size
    return runs


def _order(data_seed: int, epoch: int, labels: Sequence[int]) -> list[int]:
    """Return the order of the examples in an epoch."""
    generator = np.random.Generator(np.random.Philox(key=[data_seed, epoch]))
    order: list[int] = generator.permutation(len(labels)).tolist()
    return stratified(order, labels)


def stratified(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Spread the classes evenly, each in the order given: every stretch has all of them.

    The j-th of n examples of a class goes to ``(j + 1/2) / n`` of the way. What the gradients of
    examples have in common but for the sign of their class then cancels within a batch, and within
    examples that share a direction.
    """
    counts = Counter(labels)
    seen: Counter[int] = Counter()
    places = []
    for example in order:
        label = labels[example]
        places.append(((2 * seen[label] + 1) / (2 * counts[label]), label, example))
        seen[label] += 1
    return [example for _, _, example in sorted(places)]


def example_loss(scores: Sequence[float], label: int, loss: LossName) -> float:
    """Return the loss of one example from the scores of its candidates, in nats."""
    if loss == "language_modeling":
        return -scores[label]
    largest = max(scores)
    if not math.isfinite(largest):
        return math.nan
    return largest + math.log(sum(math.exp(s - largest) for s in scores)) - scores[label]


def needed_rows(example: EncodedExample, loss: LossName) -> EncodedExample:
    """Drop the candidates that a language modelling loss does not read."""
    if loss == "classification" or len(example.candidates) == 1:
        return example
    right = example.candidates[example.label]
    return EncodedExample(
        rows=(example.rows[right.row],), candidates=(replace(right, row=0),), label=0
    )

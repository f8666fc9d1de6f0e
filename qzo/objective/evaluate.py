"""Evaluation: loss, accuracy, F1, exact match or a reward, each with its standard error.

- The answer of a classification or choice example is the candidate with the largest mean
  log-probability per token (MeZO, arXiv 2305.17333, appendix E.2).
- ``accuracy_bias_corrected``: a model that prefers one word of two whatever the text can be right
  half of the time and still rank the texts well. This is the accuracy after the threshold between
  the two candidates is moved to the median over the examples; it needs no labels, and is the
  baseline that a gain has to beat.
- Generation is greedy, up to a line end, or in conversations the end of the turn, unless told
  otherwise.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedModel

from qzo.data.examples import ExampleSet, Question
from qzo.data.tokenize import EncodedExample
from qzo.distributed import Ranks
from qzo.model.attention import can_pack
from qzo.model.generate import Generator
from qzo.model.linear import Live
from qzo.model.stacked import answer_scores, build_stack
from qzo.objective.loss import example_loss
from qzo.objective.rewards import (
    WRITTEN,
    Judge,
    ObjectiveName,
    RewardFunction,
    check_objective,
    make_judge,
)


@dataclass(frozen=True)
class Evaluation:
    """Results; standard errors are those of the mean over examples. None: does not apply.

    Attributes:
        num_examples: Examples evaluated.
        loss: Mean loss in nats, with ``loss_se``.
        accuracy: Fraction of right answers, with ``accuracy_se``.
        accuracy_bias_corrected: See the module, with its standard error.
        f1: SQuAD F1 of generated answers, with ``f1_se``.
        exact_match: Fraction of generated answers that are a gold answer, with ``exact_match_se``.
        reward: What training maximises, where it is not the loss, with ``reward_se``.
        example_losses: Loss of every example.
        is_right: Whether the answer of every example is right.
        is_right_corrected: The same after the bias correction.
    """

    num_examples: int
    loss: float
    loss_se: float
    accuracy: float | None = None
    accuracy_se: float | None = None
    accuracy_bias_corrected: float | None = None
    accuracy_bias_corrected_se: float | None = None
    f1: float | None = None
    f1_se: float | None = None
    exact_match: float | None = None
    exact_match_se: float | None = None
    reward: float | None = None
    reward_se: float | None = None
    example_losses: Sequence[float] = field(default=(), repr=False)
    is_right: Sequence[bool] = field(default=(), repr=False)
    is_right_corrected: Sequence[bool] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers without the lists and without what does not apply."""
        lists = {"example_losses", "is_right", "is_right_corrected"}
        return {k: v for k, v in asdict(self).items() if k not in lists and v is not None}


def evaluate(
    model: PreTrainedModel,
    live: Live,
    data: ExampleSet,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
    generator: Generator | None = None,
    objective: ObjectiveName = "loss",
    reward: RewardFunction | None = None,
) -> Evaluation:
    """Evaluate a model with quantized layers.

    Args:
        model: The model.
        live: What its layers see: the scales to evaluate.
        data: What to evaluate on.
        batch_size: Examples of one forward.
        progress: Called with the examples done and their number; once more where answers are
            generated.
        ranks: The processes that split the batches; all of them get the results.
        generator: Writes the answers, where the data or the objective asks for them.
        objective: What is trained on.
        reward: The function of objective ``reward``.
    """
    check_objective(objective, data, reward)
    ranks = ranks or Ranks()
    scores = _scores(model, live, data.examples, batch_size, progress, ranks)
    labels = [example.label for example in data.examples]
    losses = [example_loss(s, y, data.loss) for s, y in zip(scores, labels, strict=True)]
    loss, loss_se = mean_and_error(losses)
    result: dict[str, Any] = {"num_examples": len(losses), "loss": loss, "loss_se": loss_se}
    result["example_losses"] = losses
    if all(len(row) > 1 for row in scores):
        result |= _accuracies(scores, labels, are_classes=data.loss == "classification")
    if data.is_generation or objective in WRITTEN:
        names: list[ObjectiveName] = ["f1", "exact_match"]
        names += ["reward"] if objective == "reward" else []
        judges = [make_judge(name, data, reward) for name in names]
        assert generator is not None
        columns = _judged(generator, data.questions, judges, batch_size, progress, ranks)
        for name, values in zip(names, columns, strict=True):
            result[name], result[f"{name}_se"] = mean_and_error(values)
    if objective != "loss":
        result["reward"], result["reward_se"] = result[objective], result[f"{objective}_se"]
    return Evaluation(**result)


def _scores(
    model: PreTrainedModel,
    live: Live,
    examples: Sequence[EncodedExample],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> list[list[float]]:
    """Return the scores of every example; neighbours in a batch have similar lengths."""
    order = sorted(range(len(examples)), key=lambda i: max(len(row) for row in examples[i].rows))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def batch_scores(number: int) -> list[float]:
        picked = [examples[i] for i in batches[number]]
        stack = build_stack([picked], model.device, is_packed=can_pack(model))
        scores = answer_scores(model, live, stack)
        if progress is not None:
            progress(sum(map(len, batches[: number + 1])), len(order))
        return list(chain.from_iterable(scores))

    lengths = [len(example.candidates) for example in examples]
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    flat = iter(ranks.share(sizes, batch_scores))
    scores = {i: list(islice(flat, lengths[i])) for i in order}
    return [scores[i] for i in range(len(examples))]


def _accuracies(
    scores: Sequence[Sequence[float]], labels: Sequence[int], *, are_classes: bool
) -> dict[str, Any]:
    chosen = [max(range(len(row)), key=row.__getitem__) for row in scores]
    is_right = [c == y for c, y in zip(chosen, labels, strict=True)]
    accuracy, error = mean_and_error([float(right) for right in is_right])
    result: dict[str, Any] = {"accuracy": accuracy, "accuracy_se": error, "is_right": is_right}
    if are_classes and all(len(row) == 2 for row in scores):
        margins = [row[1] - row[0] for row in scores]
        threshold = statistics.median(margins)
        corrected = [(m > threshold) == bool(y) for m, y in zip(margins, labels, strict=True)]
        accuracy, error = mean_and_error([float(right) for right in corrected])
        result["is_right_corrected"] = corrected
        result["accuracy_bias_corrected"] = accuracy
        result["accuracy_bias_corrected_se"] = error
    return result


def _judged(
    generator: Generator,
    questions: Sequence[Question],
    judges: Sequence[Judge],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> list[list[float]]:
    """Return what each judge says of the answers to all questions; like lengths run together."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def values(number: int) -> list[float]:
        batch = [questions[i] for i in batches[number]]
        (texts,) = generator.write([[question.prompt for question in batch]])
        if progress is not None:
            progress(sum(map(len, batches[: number + 1])), len(order))
        return [judge(q, t) for q, t in zip(batch, texts, strict=True) for judge in judges]

    flat = ranks.share([len(batch) * len(judges) for batch in batches], values)
    place = {i: len(judges) * k for k, i in enumerate(order)}
    return [
        [flat[place[i] + column] for i in range(len(questions))] for column in range(len(judges))
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.fsum(values) / max(len(values), 1), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))

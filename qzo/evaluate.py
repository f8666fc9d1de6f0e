"""Evaluation: loss, accuracy or F1, each with its standard error.

- The answer of a classification or choice example is the candidate with the largest mean
  log-probability per token (MeZO, arXiv 2305.17333, appendix E.2).
- ``accuracy_bias_corrected``: a model that prefers one word of two whatever the text can be right
  half of the time and still rank the texts well. This is the accuracy after the threshold between
  the two candidates is moved to the median over the examples; it needs no labels, and is the
  baseline that a gain has to beat.
- Generation is greedy, up to a line end.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from qzo.attention import can_pack
from qzo.encoding import EncodedExample, encode_prompt
from qzo.errors import ConfigError, DataError
from qzo.examples import ExampleSet
from qzo.linear import Live
from qzo.objective import example_loss
from qzo.ranks import Ranks
from qzo.stack import answer_scores, build_stack

_MAX_NEW_TOKENS = 50  # MeZO, appendix E.2


@dataclass(frozen=True)
class Evaluation:
    """Results; standard errors are those of the mean over examples. None: does not apply.

    Attributes:
        num_examples: Examples evaluated.
        loss: Mean loss in nats, with ``loss_se``.
        accuracy: Fraction of right answers, with ``accuracy_se``.
        accuracy_bias_corrected: See the module, with its standard error.
        f1: SQuAD F1 of generated answers, with ``f1_se``.
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
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Evaluate a model with quantized layers.

    Args:
        model: The model.
        live: What its layers see: the scales to evaluate.
        data: What to evaluate on.
        batch_size: Examples of one forward.
        tokenizer: For generation.
        progress: Called with the examples done and their number.
        ranks: The processes that split the batches; all of them get the results.
    """
    ranks = ranks or Ranks()
    scores = _scores(model, live, data.examples, batch_size, progress, ranks)
    labels = [example.label for example in data.examples]
    losses = [example_loss(s, y, data.loss) for s, y in zip(scores, labels, strict=True)]
    loss, loss_se = mean_and_error(losses)
    result: dict[str, Any] = {"num_examples": len(losses), "loss": loss, "loss_se": loss_se}
    result["example_losses"] = losses
    if all(len(row) > 1 for row in scores):
        result |= _accuracies(scores, labels, are_classes=data.loss == "classification")
    if data.is_generation:
        result["f1"], result["f1_se"] = mean_and_error(_generated(model, tokenizer, data, ranks))
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


def _generated(
    model: PreTrainedModel, tokenizer: Any, data: ExampleSet, ranks: Ranks
) -> list[float]:
    """Return the score of a greedy answer to every example."""
    task, examples = data.task, data.task_examples
    assert task is not None

    def score(number: int) -> list[float]:
        example = examples[number]
        text = generate(model, tokenizer, task.prompt(example), stop="\n")
        return [task.score(example, text.strip())]

    return ranks.share([1] * len(examples), score)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = _MAX_NEW_TOKENS,
    stop: str | None = None,
) -> str:
    """Return the greedy completion of a prompt, without the stop string.

    Raises:
        ConfigError: The model has no room for a prompt and that many tokens.
        DataError: The prompt has no tokens.
    """
    positions = int(getattr(model.config, "max_position_embeddings", 2048))
    if max_new_tokens >= positions:
        raise ConfigError(
            f"max_new_tokens: expected less than the model's {positions} positions, got "
            f"{max_new_tokens}"
        )
    tokens = encode_prompt(tokenizer, prompt, max_length=positions - max_new_tokens)
    if not tokens:
        raise DataError(f"prompt: expected at least one token, got {prompt!r}")
    input_ids = torch.tensor([tokens], device=model.device)
    criteria = StoppingCriteriaList()
    if stop is not None:
        criteria.append(StopStringCriteria(tokenizer, stop))
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]  # transformers leaves it untyped
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            stopping_criteria=criteria,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
    text: str = tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)
    return text.split(stop)[0] if stop else text


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.fsum(values) / max(len(values), 1), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))

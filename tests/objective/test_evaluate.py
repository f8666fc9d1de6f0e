import math
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from support.runs import (
    COMPLETIONS,
    RECORDS,
    dense_candidate_scores,
    dense_equal,
    tiny_checkpoint,
    write_tokenizer,
)

import qzo
from qzo.data.examples import ExampleSet, from_records, from_task
from qzo.data.tasks import load_task
from qzo.data.tokenize import Candidate, EncodedExample
from qzo.errors import ConfigError, DataError
from qzo.model.generate import Generator, generate
from qzo.model.linear import Live
from qzo.model.load import load_tokenizer, quant_linears
from qzo.objective.evaluate import Evaluation, evaluate, mean_and_error

TASK_EXAMPLE = {"title": "a", "context": "b", "question": "c", "answers": ("x y",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("evaluate") / "base")


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return qzo.load(base)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base)


def live_of(model: Any) -> Live:
    return quant_linears(model)[0].live


def example(label: int, number: int = 0, num_candidates: int = 2) -> EncodedExample:
    """Return an example of one-token candidates; its row tells it apart."""
    candidates = tuple(Candidate(0, (0,), (token,)) for token in range(num_candidates))
    return EncodedExample(rows=((number,),), candidates=candidates, label=label)


class Evaluated(Protocol):
    def __call__(
        self, scores: list[list[float]], labels: list[int], loss: Any = "classification"
    ) -> Evaluation: ...


@pytest.fixture
def evaluated(model: Any, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """Evaluate a model that gives the scores of the test."""

    def run(
        scores: list[list[float]], labels: list[int], loss: Any = "classification"
    ) -> Evaluation:
        queue = iter(scores)
        monkeypatch.setattr("qzo.objective.evaluate.answer_scores", lambda *_: [next(queue)])
        examples = [
            example(label, number, len(row))
            for number, (label, row) in enumerate(zip(labels, scores, strict=True))
        ]
        return evaluate(model, live_of(model), ExampleSet(examples, loss), batch_size=1)

    return run


@pytest.mark.parametrize("records", [RECORDS, COMPLETIONS], ids=["classes", "completions"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_the_mean_of_dense_losses(
    base: Path, model: Any, tokenizer: Any, records: Any, batch_size: int
) -> None:
    data = from_records(records, tokenizer, max_length=60)
    dense = dense_equal(base)

    result = evaluate(model, live_of(model), data, batch_size=batch_size)

    want = []
    for encoded in data.examples:
        scores = dense_candidate_scores(dense, encoded)
        is_class = len(scores) > 1
        total = math.log(sum(map(math.exp, scores))) if is_class else 0.0
        want.append(total - scores[encoded.label])
    # fp32 forwards in another order
    assert result.example_losses == pytest.approx(want, abs=3e-6)
    assert result.loss == pytest.approx(sum(want) / len(want), abs=3e-6)
    assert result.num_examples == len(records)


def test_progress_counts_the_examples(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    data = from_records(RECORDS, tokenizer, max_length=60)

    evaluate(
        model,
        live_of(model),
        data,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )

    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_the_answer_is_the_candidate_with_the_largest_score(evaluated: Evaluated) -> None:
    result = evaluated([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -2.0], [-0.5, -0.4]], [0, 1, 1, 0])

    assert result.is_right == [True, True, False, False]
    assert result.accuracy == 0.5
    # four values of mean 1/2: deviation sqrt(1/3), divided by sqrt(4)
    assert result.accuracy_se == pytest.approx(math.sqrt(1 / 3) / 2)


def test_a_tie_goes_to_the_first_candidate(evaluated: Evaluated) -> None:
    result = evaluated([[-1.0, -1.0], [-1.0, -1.0]], [0, 1])

    assert result.is_right == [True, False]


def test_the_bias_corrected_threshold_is_the_median_margin(evaluated: Evaluated) -> None:
    # A model that always prefers the second word, by 1, 2, 3 and 4 nats: half of it is right, and
    # the median margin of 2.5 ranks all of them right.
    scores = [[-5.0, -5.0 + margin] for margin in (1.0, 4.0, 2.0, 3.0)]

    result = evaluated(scores, [0, 1, 0, 1])

    assert result.accuracy == 0.5
    assert result.accuracy_bias_corrected == 1.0
    assert result.accuracy_bias_corrected_se == 0.0


def test_a_margin_at_the_median_counts_as_the_first_candidate(evaluated: Evaluated) -> None:
    scores = [[-5.0, -5.0 + margin] for margin in (1.0, 2.0, 3.0)]

    result = evaluated(scores, [0, 0, 1])

    assert result.is_right_corrected == [True, True, True]


def test_equal_margins_leave_the_first_candidate(evaluated: Evaluated) -> None:
    result = evaluated([[-1.0, -0.5]] * 4, [0, 1, 0, 0])

    assert result.accuracy == 0.25
    assert result.accuracy_bias_corrected == 0.75


def test_sentences_to_choose_from_have_no_bias_to_correct(evaluated: Evaluated) -> None:
    result = evaluated([[-1.0, -2.0], [-3.0, -1.0]], [0, 1], loss="language_modeling")

    assert result.accuracy == 1.0
    assert result.accuracy_bias_corrected is None


def test_three_candidates_have_no_median_margin(evaluated: Evaluated) -> None:
    result = evaluated([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0]], [0, 1])

    assert result.accuracy == 1.0
    assert result.accuracy_bias_corrected is None


def test_what_does_not_apply_is_left_out_of_the_numbers(evaluated: Evaluated) -> None:
    result = evaluated([[-1.0], [-3.0]], [0, 0], loss="language_modeling")

    assert result.to_dict() == {"num_examples": 2, "loss": 2.0, "loss_se": 1.0}


@pytest.mark.parametrize(
    ("values", "mean", "error"),
    [([1.0, 2.0, 4.0, 5.0], 3.0, math.sqrt(10 / 3 / 4)), ([2.0, 2.0], 2.0, 0.0)],
)
def test_the_standard_error_is_that_of_the_mean(
    values: list[float], mean: float, error: float
) -> None:
    assert mean_and_error(values) == pytest.approx((mean, error))


def test_the_standard_error_of_one_value_is_unknown() -> None:
    mean, error = mean_and_error([3.0])

    assert mean == 3.0
    assert math.isnan(error)


def test_generation_is_greedy(base: Path, model: Any, tokenizer: Any) -> None:
    tokens = tokenizer("a film")["input_ids"]
    dense = dense_equal(base)
    with torch.inference_mode():
        for _ in range(8):
            logits = dense(input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens = [*tokens, int(logits.argmax())]

    text = generate(model, tokenizer, "a film", max_new_tokens=8)

    written = tokens[-8:]
    if 2 in written:  # the end-of-text token
        written = written[: written.index(2)]
    assert text == tokenizer.decode(written, skip_special_tokens=True)


class Writer:
    """What ``model.generate`` is where the model writes one text, whatever the prompt."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self.num_written = 0

    def __call__(self, input_ids: Any, **options: Any) -> Any:
        """Write token after token until the criteria say so."""
        rows = input_ids
        for token in self._tokens[: options["max_new_tokens"]]:
            rows = torch.cat((rows, torch.tensor([[token]] * len(rows))), dim=1)
            self.num_written += 1
            criteria = options["stopping_criteria"]
            if criteria and bool(criteria(rows, None).all()):
                break
        return rows


def test_generation_stops_at_a_line_end(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tokenizer("x y\nmore", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(model, "generate", writer)

    text = generate(model, tokenizer, "q", max_new_tokens=8, stop="\n")

    assert text == "x y"
    assert writer.num_written == 4


def test_generation_without_a_stop_goes_on(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tokenizer("x y\nmore", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(model, "generate", writer)

    assert generate(model, tokenizer, "q", max_new_tokens=6) == "x y\nmo"


def test_generated_answers_are_scored_up_to_the_line_end(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("squad")
    data = from_task(task, [TASK_EXAMPLE] * 2, tokenizer, max_length=60)
    tokens = tokenizer(" x z\ny", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model, "generate", Writer(tokens))

    live = live_of(model)
    result = evaluate(model, live, data, batch_size=2, generator=Generator(model, tokenizer, live))

    assert result.f1 == 0.5  # one of two words, both ways
    assert result.f1_se == 0.0


def test_generation_refuses_to_write_more_than_the_model_has_room_for(
    model: Any, tokenizer: Any
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^max_new_tokens: expected less than the model's 64 positions, got 64$",
    ):
        generate(model, tokenizer, "a", max_new_tokens=64)


def test_generation_keeps_the_end_of_a_long_prompt(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = []

    def see(input_ids: Any, **_: Any) -> Any:
        prompts.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(model, "generate", see)

    generate(model, tokenizer, "abcdefghij" * 10, max_new_tokens=44)

    assert tokenizer.decode(prompts[0]) == "<s>bcdefghijabcdefghij"


def test_generation_refuses_a_prompt_without_tokens(model: Any, tmp_path: Path) -> None:
    tokenizer: Any = write_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = None  # no beginning-of-text token

    with pytest.raises(DataError, match=r"^prompt: expected at least one token, got ''$"):
        generate(model, tokenizer, "")

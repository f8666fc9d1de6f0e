import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import (
    COMPLETIONS,
    RECORDS,
    dense_candidate_scores,
    dense_equal,
    json_lines,
    tiny_checkpoint,
    tiny_recipe,
    tiny_trainer,
    write_lines,
)
from transformers import TrainerCallback

import qzo
from qzo.data.examples import ExampleSet, Question, from_records, from_task
from qzo.data.tasks import load_task
from qzo.data.tokenize import RenderedPrompt
from qzo.errors import CheckpointError, ConfigError, DataError, QZOError
from qzo.method.probes import Probe
from qzo.model.generate import Generator, generate
from qzo.model.load import load_tokenizer, quant_linears
from qzo.objective.evaluate import evaluate
from qzo.objective.rewards import (
    best_f1,
    check_objective,
    exact_match,
    is_right,
    load_reward,
    make_judge,
)
from qzo.run import launch as run_module

pytestmark = pytest.mark.slow  # the file takes half a minute

SPSA = {"estimator": "spsa", "num_directions": 4, "epsilon": 0.1}
QUESTION = Question("say:", ("the cat", "dogs"), {"id": 7})
SQUAD = [
    {"title": "t" * n, "context": "b", "question": "c", "answers": ("x y", "f f")}
    for n in (1, 5, 2)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("rewards") / "base")


def early_letters(prompt: str, output: str, example: dict[str, Any]) -> float:
    """Count letters of the first half of the alphabet."""
    del prompt, example
    return sum(letter in "abcdefghijklm" for letter in output) / 8


def not_a_number(prompt: str, output: str, example: dict[str, Any]) -> float:
    del prompt, output, example
    return math.nan


def words(prompt: str, output: str, example: dict[str, Any]) -> Any:
    del prompt, example
    return output


def failing(prompt: str, output: str, example: dict[str, Any]) -> float:
    del prompt, output
    return float(example["score"])


def rewarded(base: Path, out: Path, **keys: Any) -> qzo.Trainer:
    """Return a trainer on a reward of eight written tokens."""
    given = {
        **{"train": COMPLETIONS, "zo": SPSA, "max_new_tokens": 8, "generation_stop": None},
        **{"objective": "reward", "reward": early_letters, "lr_scheduler_type": "constant"},
        **keys,
    }
    reward = given.pop("reward")
    train, evaluation = given.pop("train"), given.pop("evaluation", None)
    callbacks = given.pop("callbacks", ())
    model = tiny_trainer(base, out).model
    recipe = tiny_recipe(base, out, **given)
    return qzo.Trainer(model, recipe, train, evaluation, callbacks, reward=reward)


# --- rewards of one answer --------------------------------------------------------------------


def test_f1_is_that_of_the_gold_answer_that_fits_best() -> None:
    assert best_f1(QUESTION, " A cat sat.") == pytest.approx(2 / 3)  # 1 of 2 words, 1 of 1
    assert best_f1(QUESTION, "Dogs!") == 1.0


def test_an_exact_match_ignores_blanks_around_it_only() -> None:
    assert [exact_match(QUESTION, text) for text in (" dogs \n", "Dogs", "dogs.")] == [1, 0, 0]


def test_the_largest_score_is_right_and_the_first_one_wins_a_tie() -> None:
    assert [is_right([-1.0, -2.0], 0), is_right([-1.0, -2.0], 1)] == [1.0, 0.0]
    assert [is_right([-1.0, -1.0], 0), is_right([-1.0, -1.0], 1)] == [1.0, 0.0]
    assert math.isnan(is_right([math.nan, -1.0], 1))


def test_a_reward_sees_prompt_output_and_record() -> None:
    seen = []

    def reward(prompt: str, output: str, example: dict[str, Any]) -> float:
        seen.append((prompt, output, example))
        return 0.5

    assert make_judge("reward", ExampleSet([], "language_modeling"), reward)(QUESTION, "o") == 0.5
    assert seen == [("say:", "o", {"id": 7})]


@pytest.mark.parametrize(
    ("value", "want"),
    [(True, 1.0), (2, 2.0), (np.float32(0.5), 0.5), (-math.inf, math.nan), (10**400, math.nan)],
)
def test_any_real_number_is_a_reward(value: Any, want: float) -> None:
    judge = make_judge("reward", ExampleSet([], "language_modeling"), lambda *_: value)

    assert judge(QUESTION, "") == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (words, "test_rewards.py:words: expected a number for the output 'o', got str"),
        (
            failing,
            "test_rewards.py:failing: expected a number for the output 'o', got KeyError: 'score'",
        ),
    ],
)
def test_a_bad_reward_names_its_function(reward: Any, message: str) -> None:
    judge = make_judge("reward", ExampleSet([], "language_modeling"), reward)

    with pytest.raises(QZOError, match=f"^{re.escape(message)}$"):
        judge(QUESTION, "o")


# --- a function from a file -------------------------------------------------------------------


def test_a_function_is_loaded_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def length(prompt, output, example):\n    return len(output)\n")

    assert load_reward(f"{path}:length")("p", "four", {}) == 4


@pytest.mark.parametrize(
    ("code", "place", "message"),
    [
        ("", "mine", "reward: expected path/to/file.py:function, got 'mine'"),
        ("", "mine.py", "reward: expected path/to/file.py:function, got 'mine.py'"),
        ("", "other.py:f", "reward: expected the file other.py, not found"),
        ("f = 1", "mine.py:f", "reward: expected a function 'f' in mine.py, not found"),
        ("1 / 0", "mine.py:f", "reward: {} cannot be run: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, place: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)

    with pytest.raises(ConfigError, match=f"^{re.escape(message.format(tmp_path / 'mine.py'))}$"):
        load_reward(place)


# --- the objective ----------------------------------------------------------------------------


def test_accuracy_is_that_of_dense_forwards(base: Path, tmp_path: Path) -> None:
    made = tiny_trainer(base, tmp_path, objective="accuracy", zo=SPSA).objective
    batch = [*made.batch(0), *made.batch(1)]

    (loss,) = made.losses([Probe(0, 0.0)], batch)

    dense, examples = dense_equal(base), [e for part in batch for e in part]
    scores = [dense_candidate_scores(dense, e) for e in examples]
    right = [row.index(max(row)) == e.label for row, e in zip(scores, examples, strict=True)]
    assert len(right) == 6
    assert loss == -sum(right) / 6


@pytest.mark.parametrize("estimator", ["spsa", "per_example"])
def test_stacked_rewards_are_those_of_probes_one_by_one(
    base: Path, tmp_path: Path, estimator: str
) -> None:
    zo = {"estimator": estimator, "epsilon": 0.1}
    trainer = rewarded(base, tmp_path, zo=zo, gradient_accumulation_steps=2)
    made, probes = trainer.objective, trainer.estimator.ask(3)
    batch = made.batch(3)

    together = made.losses(probes, batch)

    assert together == [made.losses([probe], batch)[0] for probe in probes]
    assert len(set(together)) > 1


def test_the_reward_is_the_mean_over_the_examples(base: Path, tmp_path: Path) -> None:
    trainer = rewarded(base, tmp_path)
    tokenizer = load_tokenizer(base)
    batch = trainer.objective.batch(0)

    (loss,) = trainer.objective.losses([Probe(0, 0.0)], batch)

    outputs = [
        generate(trainer.model, tokenizer, q.prompt, max_new_tokens=8)
        for part in batch
        for q in part
    ]
    want = [early_letters("", output, {}) for output in outputs]
    assert len(set(want)) > 1
    assert loss == pytest.approx(-sum(want) / len(want), abs=1e-12)


@pytest.mark.parametrize(
    ("objective", "records", "error", "message"),
    [
        (
            *("reward", COMPLETIONS, ConfigError),
            "reward: expected a function with objective 'reward', got none; run the recipe with "
            "qzo train, or give the function to Trainer(reward=...)",
        ),
        (
            *("accuracy", COMPLETIONS, DataError),
            "objective: expected examples with candidates to choose from for 'accuracy', got one "
            "without; use 'exact_match' or give the column candidates",
        ),
        (
            *("f1", [{"text": "abc"}], DataError),
            "objective: expected prompt and completion, messages, or a task, for 'f1', got texts "
            "without prompts; rename the columns of training and evaluation data",
        ),
    ],
)
def test_data_that_an_objective_cannot_read_is_refused(
    base: Path, objective: Any, records: Any, error: Any, message: str
) -> None:
    data = from_records(records, load_tokenizer(base), max_length=60)

    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check_objective(objective, data, None)


def test_a_conversation_that_the_assistant_begins_is_refused_for_written_answers(
    base: Path,
) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    asked = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
    records = [{"messages": asked}, {"messages": asked[1:]}]
    data = from_records(records, tokenizer, max_length=60)
    message = (
        "row 2: messages: expected a message in front of the assistant's last one for "
        "'exact_match', got none; add one or remove the row"
    )

    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check_objective("exact_match", data, None)

    check_objective("loss", data, None)


def test_a_reward_cannot_change_the_records() -> None:
    question = Question("say:", ("a",), {"messages": [1, 2]})

    def popping(prompt: str, output: str, example: dict[str, Any]) -> float:
        del prompt, output
        return float(example["messages"].pop())

    judge = make_judge("reward", ExampleSet([], "language_modeling"), popping)

    assert [judge(question, "x"), judge(question, "x")] == [2.0, 2.0]


def test_a_function_without_its_objective_is_refused(base: Path, tmp_path: Path) -> None:
    message = "reward has no effect with objective: loss; remove it or set objective: reward"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        tiny_recipe(base, tmp_path, reward="a.py:f")


# --- evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_evaluation_writes_what_single_prompts_give(base: Path, batch_size: int) -> None:
    model, tokenizer = qzo.load(base), load_tokenizer(base)
    task = load_task("squad")
    data = from_task(task, SQUAD, tokenizer, max_length=60)
    seen = {}

    def reward(prompt: str, output: str, example: dict[str, Any]) -> float:
        seen[prompt] = output
        return len(example["title"])

    result = evaluate(
        model,
        quant_linears(model)[0].live,
        data,
        batch_size=batch_size,
        generator=Generator(model, tokenizer, max_new_tokens=8),
        objective="reward",
        reward=reward,
    )

    alone = {
        task.prompt(e): generate(model, tokenizer, task.prompt(e), max_new_tokens=8, stop="\n")
        for e in SQUAD
    }
    assert seen == alone
    f1 = [task.score(e, alone[task.prompt(e)].strip()) for e in SQUAD]
    assert result.f1 == pytest.approx(sum(f1) / 3)
    assert result.exact_match == 0.0
    assert result.reward == pytest.approx(8 / 3)
    assert result.reward_se == pytest.approx(np.std([1, 5, 2], ddof=1) / 3**0.5)


def test_evaluation_of_records_counts_exact_matches(base: Path) -> None:
    model, tokenizer = qzo.load(base), load_tokenizer(base)
    prompts = [record["prompt"] for record in COMPLETIONS[:4]]
    generator = Generator(model, tokenizer, max_new_tokens=8)
    written = [generator.write([[prompt]])[0][0] for prompt in prompts]
    answers = [written[0], "no", written[2], "no"]  # two of four
    records = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    data = from_records(records, tokenizer, max_length=60)
    live = quant_linears(model)[0].live

    result = evaluate(model, live, data, batch_size=3, generator=generator, objective="exact_match")

    assert result.exact_match == result.reward == 0.5
    assert result.reward_se == pytest.approx(math.sqrt(1 / 3) / 2)
    assert result.f1 is not None
    assert result.f1 >= 0.5


def test_a_conversation_is_asked_up_to_its_last_answer(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = qzo.load(base)
    written = Generator(model, tokenizer, max_new_tokens=8, stop=None).write(
        [[RenderedPrompt(f"user: {word}</s>assistant: ") for word in ("abc", "x")]]
    )[0]
    assert len(set(written)) == 2
    answers = [written[0], "no"]
    turns = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": answer}]
        for word, answer in zip(("abc", "x"), answers, strict=True)
    ]
    data = from_records([{"messages": m} for m in turns], tokenizer, max_length=60)
    generator = Generator(model, tokenizer, max_new_tokens=8)
    live = quant_linears(model)[0].live

    result = evaluate(model, live, data, batch_size=2, generator=generator, objective="exact_match")

    assert result.exact_match == 0.5
    assert [question.answers for question in data.questions] == [(a.strip(),) for a in answers]
    assert data.questions[1].example["messages"] == turns[1]


def test_accuracy_is_the_reward_where_it_is_trained_on(base: Path) -> None:
    model, tokenizer = qzo.load(base), load_tokenizer(base)
    data = from_records(RECORDS, tokenizer, max_length=60)
    live = quant_linears(model)[0].live

    result = evaluate(model, live, data, batch_size=3, objective="accuracy")

    assert (result.reward, result.reward_se) == (result.accuracy, result.accuracy_se)


# --- runs -------------------------------------------------------------------------------------


def test_training_on_a_reward_raises_it(base: Path, tmp_path: Path) -> None:
    zo = {"estimator": "spsa", "coordinates": "row", "num_directions": 8, "epsilon": 0.05}
    keys: dict[str, Any] = {"max_steps": 24, "learning_rate": 0.1, "zo": zo, "eval_steps": 8}

    result = rewarded(base, tmp_path / "run", evaluation=COMPLETIONS, **keys).train()

    assert result.before is not None
    assert result.after is not None
    assert result.before.reward is not None
    assert result.after.reward is not None
    assert result.after.reward > result.before.reward + 0.3  # 0.19 to 0.84
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    trained = [line for line in lines if "learning_rate" in line]
    assert len(trained) == 12
    assert all(line["reward"] == -line["loss"] for line in trained)
    rewards = {line["step"]: line["eval_reward"] for line in lines if "eval_reward" in line}
    assert sorted(rewards) == [0, 8, 16, 24]
    assert result.best_step == max(rewards, key=lambda step: (rewards[step], -step))
    assert result.after.reward == rewards[result.best_step]


@pytest.mark.parametrize(
    ("objective", "records"),
    [("accuracy", RECORDS), ("f1", COMPLETIONS), ("exact_match", RECORDS), ("reward", COMPLETIONS)],
)
def test_every_objective_runs_and_replays(
    base: Path, tmp_path: Path, objective: str, records: Any
) -> None:
    keys: dict[str, Any] = {"objective": objective, "train": records, "max_steps": 3}
    keys |= {"per_device_train_batch_size": 2, "max_new_tokens": 4}
    trainer = rewarded(base, tmp_path / "run", **keys)

    trainer.train()

    losses = [loss for step in steps_of(tmp_path / "run") for loss in step["losses"]]
    assert len(losses) == 3 * 8
    assert all(-1 <= loss <= 0 for loss in losses)
    replayed = qzo.replay(str(tmp_path / "run"))
    assert (replayed.steps, replayed.fingerprint) == (3, trainer.scales.fingerprint())


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(base: Path, tmp_path: Path) -> None:
    whole = rewarded(base, tmp_path / "whole", save_steps=2)
    whole.train()
    rewarded(base, tmp_path / "parts", save_steps=2, max_steps=3).train()
    parts = rewarded(base, tmp_path / "parts", save_steps=2, resume_from_checkpoint=True)
    parts.train()

    steps = [steps_of(tmp_path / name) for name in ("whole", "parts")]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 6
    assert any(d != 0 for step in steps[0] for d in step["derivatives"])
    assert whole.scales.fingerprint() == parts.scales.fingerprint()


def test_a_run_on_a_random_reward_goes_on_from_its_journal(base: Path, tmp_path: Path) -> None:
    generator = random.Random(3)
    keys: dict[str, Any] = {"reward": lambda *_: generator.random()}
    stopped = rewarded(base, tmp_path / "run", max_steps=3, **keys)
    stopped.train()
    at_stop, first = stopped.scales.values.clone(), steps_of(tmp_path / "run")

    at_start = []

    class Look(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            at_start.append(again.scales.values.clone())

    keys |= {"callbacks": [Look()], "resume_from_checkpoint": True}
    again = rewarded(base, tmp_path / "run", **keys)
    again.train()

    assert len(at_start) == 1
    assert at_start[0].equal(at_stop)
    assert steps_of(tmp_path / "run")[:3] == first


def test_a_run_goes_on_with_the_same_records_only(base: Path, tmp_path: Path) -> None:
    rewarded(base, tmp_path / "run", max_steps=2).train()
    other = [{**record, "score": 1} for record in COMPLETIONS]

    message = (
        "data: the digest of prompts, answers or other columns differs from that of the run that "
        "is to be continued"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        rewarded(base, tmp_path / "run", train=other, resume_from_checkpoint=True).train()


def test_rewards_that_are_not_finite_are_skipped_and_named(base: Path, tmp_path: Path) -> None:
    zo = {**SPSA, "max_skipped_steps": 2}

    message = (
        "test_rewards.py:not_a_number: expected finite values, got none in 2 steps in a row up to "
        "step 1; lower learning_rate or zo.epsilon. The journal and the scales are intact"
    )
    with pytest.raises(QZOError, match=f"^{re.escape(message)}$"):
        rewarded(base, tmp_path / "run", reward=not_a_number, zo=zo).train()

    steps = steps_of(tmp_path / "run")
    assert [step["losses"] for step in steps] == [[None] * 8] * 2


def test_one_bad_reward_skips_one_direction(base: Path, tmp_path: Path) -> None:
    calls = iter(range(10**6))

    def reward(prompt: str, output: str, example: dict[str, Any]) -> float:
        return math.inf if next(calls) == 0 else early_letters(prompt, output, example)

    rewarded(base, tmp_path / "run", reward=reward, max_steps=1).train()

    (step,) = steps_of(tmp_path / "run")
    assert [loss is None for loss in step["losses"]] == [True] + [False] * 7
    assert [d is None for d in step["derivatives"]] == [True, False, False, False]


def test_a_recipe_names_the_function(base: Path, tmp_path: Path) -> None:
    code = "def count(prompt, output, example):\n    return output.count(example['letter'])\n"
    (tmp_path / "mine.py").write_text(code)
    records = [{**COMPLETIONS[i % 8], "letter": "f"} for i in range(20)]
    data = write_lines(tmp_path / "mine.jsonl", records)
    keys: dict[str, Any] = {"objective": "reward", "reward": f"{tmp_path / 'mine.py'}:count"}
    keys |= {"data": str(data), "max_new_tokens": 6, "max_steps": 2, "device": "cpu", "zo": SPSA}

    result = run_module.train(tiny_recipe(base, tmp_path / "run", **keys))

    assert result is not None
    assert result.after is not None
    assert result.after.reward is not None
    assert "| step | loss | accuracy | reward |" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_recipe_without_the_function_is_refused(base: Path, tmp_path: Path) -> None:
    message = "reward: expected path/to/file.py:function with objective 'reward', found none"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        run_module.train(tiny_recipe(base, tmp_path / "run", objective="reward"))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in json_lines(folder / "journal.jsonl") if "derivatives" in line]

"""A tokenizer with more tokens than the model has embeddings."""

from pathlib import Path
from typing import Any

import pytest
from support.command import Run, command
from support.models import VOCABULARY
from support.runs import RECORDS, tiny_checkpoint, tiny_recipe, write_lines

import qzo
from qzo.data.examples import from_records
from qzo.errors import DataError
from qzo.model.generate import Generator
from qzo.model.load import load_tokenizer
from qzo.run.launch import train
from qzo.run.trainer import Trainer

PAD, END = VOCABULARY, VOCABULARY + 1
ADVICE = (
    f"expected an id below {VOCABULARY}, as many rows as the model's embeddings have, got {END}; "
    "take the tokenizer and chat template that the model was trained with, or resize the "
    "embeddings of the float model and quantize it again"
)
BAD = {"prompt": "say it:", "completion": "<|im_end|>", "candidates": ["<|im_end|>", "b"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("vocabulary") / "base")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens(["[PAD]", "<|im_end|>"], special_tokens=True)
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "<|im_end|>"]) == [PAD, END]
    return folder


@pytest.fixture
def qzo_command(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


@pytest.mark.parametrize("key", ["data", "eval_data"])
def test_training_names_the_token_and_its_row(key: str, base: Path, tmp_path: Path) -> None:
    """The row of the file, though rows before it are blank or held out."""
    rows = [{"text": "a fine film"}, {"text": " "}, {"text": "an odd <|im_end|> film"}]
    paths = {"data": write_lines(tmp_path / "good.jsonl", RECORDS)}
    paths[key] = write_lines(tmp_path / "bad.jsonl", rows)
    recipe = tiny_recipe(base, tmp_path / "run", **{k: str(path) for k, path in paths.items()})

    with pytest.raises(DataError) as caught:
        train(recipe)

    assert str(caught.value) == f"row 3: token '<|im_end|>': {ADVICE}"


def test_training_refuses_a_token_of_an_answer_and_names_examples_by_their_place(
    base: Path, tmp_path: Path
) -> None:
    encoded = from_records([*RECORDS, BAD], load_tokenizer(base), max_length=40).examples

    with pytest.raises(DataError) as caught:
        Trainer(qzo.load(base), tiny_recipe(base, tmp_path / "run"), encoded)

    assert str(caught.value) == f"example {len(RECORDS) + 1}: token: {ADVICE}"


def test_evaluation_names_the_token_and_its_row(
    qzo_command: Run, base: Path, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [*RECORDS, BAD])

    ran = qzo_command("eval", base, "--data", data)

    assert (ran.code, ran.err) == (
        1,
        f"qzo: row {len(RECORDS) + 1}: token '<|im_end|>': {ADVICE}\n",
    )


def test_generation_names_the_token(qzo_command: Run, base: Path) -> None:
    ran = qzo_command("generate", base, "--prompt", "say <|im_end|>")

    assert (ran.code, ran.err) == (1, f"qzo: prompt: token '<|im_end|>': {ADVICE}\n")


def test_answers_that_end_early_are_padded_with_a_token_that_the_model_knows(base: Path) -> None:
    model, tokenizer = qzo.load(base), load_tokenizer(base)
    prompts = ["a fine film", "x:", "say 12345 and then", "q"]

    def written(prompts: list[str]) -> Any:
        return Generator(model, tokenizer, max_new_tokens=12, stop="f").write([prompts])[0]

    together = written(prompts)

    assert len({len(text) for text in together}) > 1
    assert together == [written([prompt])[0] for prompt in prompts]

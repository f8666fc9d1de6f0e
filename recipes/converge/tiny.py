"""Writes what tiny.yaml compares on: random codes, a tokenizer of letters, and classified words.

python recipes/converge/tiny.py FOLDER
"""

import json
import string
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qzo.bench.synthetic import Synthetic, synthetic_checkpoint

NUM_TRAIN, NUM_VALIDATION = 64, 16


def main(folder: Path) -> None:
    """Write ``FOLDER/model`` and ``FOLDER/data``."""
    made = synthetic_checkpoint(Synthetic("tiny"), folder)
    write_tokenizer(made)
    link = folder / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(made.name)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name, first, count in (("train", 0, NUM_TRAIN), ("validation", NUM_TRAIN, NUM_VALIDATION)):
        lines = [json.dumps(record(i)) + "\n" for i in range(first, first + count)]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token a character."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits, *" .:?"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def record(number: int) -> dict[str, object]:
    """Return an example: does its word end with a letter of the first half of the alphabet?"""
    letters = [string.ascii_lowercase[(number * step + step) % 26] for step in (7, 11, 3)]
    answers = [" no", " yes"]
    return {
        "prompt": f"{''.join(letters)}?",
        "completion": answers[letters[-1] <= "m"],
        "candidates": answers,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Makes what stories.yaml compares on: windows of a text, and a model that GPTQ can store.

python recipes/converge/stories.py MODEL TEXT_FILE FOLDER

The last tenth of the text is held out. The feed-forward layers of MODEL get zeros up to the next
multiple of 16, since GPTQ packs 8 codes into a word: silu(0) * 0 = 0, so the model computes what it
did. stories260k goes from 172 to 176.
"""

import json
import sys
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 40  # characters, about 25 tokens of stories260k
EVERY = 12  # of so many windows one is kept
PART_HELD_OUT = 10
MULTIPLE = 16


def main(model: Path, source: Path, folder: Path) -> None:
    """Write ``FOLDER/float`` and ``FOLDER/data``."""
    write_padded(model, folder / "float")
    write_windows(source, folder / "data")


def write_padded(source: Path, folder: Path) -> None:
    """Write a Llama with wider feed-forward layers and the same outputs."""
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    width = model.config.intermediate_size
    num_zeros = -width % MULTIPLE
    for block in model.model.layers:
        for layer, sides in (("gate_proj", (0, 0, 0)), ("up_proj", (0, 0, 0)), ("down_proj", (0,))):
            weight = getattr(block.mlp, layer).weight
            weight.data = nn.functional.pad(weight.data, (*sides, num_zeros))
    model.config.intermediate_size = width + num_zeros
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def write_windows(source: Path, folder: Path) -> None:
    """Write ``FOLDER/train.jsonl`` and ``FOLDER/validation.jsonl``."""
    text = source.read_text(encoding="utf-8")
    first_held_out = len(text) - len(text) // PART_HELD_OUT
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": text[:first_held_out], "validation": text[first_held_out:]}
    for name, part in parts.items():
        lines = [json.dumps({"text": window}) + "\n" for window in windows(part)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def windows(text: str) -> list[str]:
    """Return pieces of equal length at equal distances, without blank ones."""
    starts = range(0, len(text) - WINDOW + 1, WINDOW * EVERY)
    pieces = (text[start : start + WINDOW] for start in starts)
    return [piece for piece in pieces if piece.strip()]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Where the gradients of examples agree: by decoder block and kind of layer.

Zeroth-order noise comes from the gradients of single examples, progress from their mean. With g_i
the exact gradient of example i by the trained values of a layer, this prints

- s: the squared norm of the mean gradient, ``sum_(i != j) g_i . g_j / (n (n - 1))``, unbiased,
- F / s: the mean squared norm of an example's gradient over it. The smaller, the less noise a step
  of the same length brings along.

Usage: python recipes/coherence.py RECIPE.yaml [key=value ...] [--examples 128]
The recipe names model and data; ``zo.coordinates`` says which values are meant.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qzo.recipe_file import read_recipe
from qzo.run import base_checkpoint, data_sets, load_model, load_tokenizer
from qzo.trainer import Trainer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--examples", type=int, default=128)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        overrides = [*arguments.overrides, f"output_dir={folder}/run"]
        trainer = trainer_of(arguments.recipe, overrides)
        show(trainer, arguments.examples)


def trainer_of(path: Path, overrides: list[str]) -> Trainer:
    """Return a trainer of all layers in the coordinates of the recipe."""
    recipe = read_recipe(path, overrides)
    every = {"num_blocks": None, "depth": None, "modules": None}
    recipe = recipe.model_copy(update={"zo": recipe.zo.model_copy(update=every)})
    checkpoint = base_checkpoint(recipe)
    tokenizer = load_tokenizer(checkpoint.folder)
    train_set, _ = data_sets(recipe, tokenizer)
    model = load_model(recipe, checkpoint, [train_set])
    return Trainer(model, recipe, train_set, tokenizer=tokenizer)


def show(trainer: Trainer, num_examples: int) -> None:
    """Take the gradients of the first examples of training, and print s and F / s by layer."""
    scales, objective = trainer.scales, trainer.objective
    scales.reset()
    layers = range(len(scales.names))
    parts = scales.parts(layers)
    total, squares, count = torch.zeros_like(scales.values), torch.zeros(len(parts)), 0
    step = 0
    while count < num_examples:
        for example in [x for micro_batch in objective.batch(step) for x in micro_batch]:
            _, gradient = objective.gradient([[example]], layers)
            total += gradient
            squares += torch.stack([gradient[a:b].square().sum() for a, b in parts])
            count += 1
        step += 1
    kinds = list(dict.fromkeys(kind_of(name) for name in scales.names))
    print(f"{count} examples; s x 1000 / (F / s)")
    print("block " + " ".join(f"{kind[-14:]:>16}" for kind in kinds))
    rows: dict[str, dict[str, str]] = {}
    for name, (start, stop), square in zip(scales.names, parts, squares.tolist(), strict=True):
        mean = (float(total[start:stop].square().sum()) - square) / (count * (count - 1))
        ratio = square / count / mean if mean > 0 else float("inf")
        block = next((part for part in name.split(".") if part.isdecimal()), "-")
        rows.setdefault(block, {})[kind_of(name)] = f"{mean * 1000:8.2f}/{min(ratio, 99999):6.0f}"
    for block, cells in rows.items():
        print(f"{block:>5} " + " ".join(f"{cells.get(kind, ''):>16}" for kind in kinds))


def kind_of(name: str) -> str:
    """Return the name of a layer within its block."""
    return name.split(".")[-1]


if __name__ == "__main__":
    main()

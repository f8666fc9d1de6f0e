"""Where the gradients of examples agree: by decoder block and kind of layer.

Zeroth-order noise comes from the gradients of single examples, progress from their mean. With g_i
the exact gradient of example i by the trained values of a layer, this prints

- s: the squared norm of the mean gradient, ``sum_(i != j) g_i . g_j / (n (n - 1))``, unbiased,
- F / s: the mean squared norm of an example's gradient over it. The smaller, the less noise a step
  of the same length brings along.

With ``--together 2`` an i is the mean over two examples in a row, as directions see them. With
``--run`` the gradients are those where a run ended, and the last line is about the layers that it
trained together, with the jackknife's standard error of s.

Usage: python recipes/coherence.py RECIPE.yaml [key=value ...] [--examples 128] [--together 1]
    [--run FOLDER]
The recipe names model and data; ``zo.coordinates`` says which values are meant.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from qzo.data.tokenize import EncodedExample
from qzo.model.load import load_tokenizer
from qzo.run.journal.compact import open_record
from qzo.run.launch import base_checkpoint, data_sets, load_model
from qzo.run.output.adapter import open_adapter
from qzo.run.output.snapshots import read_snapshot
from qzo.run.recipe.read import read_recipe
from qzo.run.trainer import Trainer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        overrides = [*arguments.overrides, f"output_dir={folder}/run"]
        trainer = trainer_of(arguments.recipe, overrides)
        trainer.scales.reset()
        trained = [] if arguments.run is None else go_to_the_end(trainer, arguments.run)
        show(trainer, arguments.examples, arguments.together, trained)


def go_to_the_end(trainer: Trainer, run: Path) -> list[int]:
    """Take over the values with which a run ended; return the places of its layers."""
    names = trainer.scales.names
    layers = [names.index(name) for name in open_record(run).header["layers"]]
    parts = trainer.scales.parts(layers)
    step = open_adapter(run).config["step"]
    values = read_snapshot(run / f"checkpoint-{step}").values
    for (start, stop), new in zip(parts, values.split([b - a for a, b in parts]), strict=True):
        trainer.scales.values[start:stop] = new
    return layers


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


def show(trainer: Trainer, num_examples: int, together: int, trained: list[int]) -> None:
    """Take the gradients of the first examples of training, and print s and F / s by layer."""
    scales, objective = trainer.scales, trainer.objective
    layers = range(len(scales.names))
    parts = scales.parts(layers)
    total, squares, count = torch.zeros_like(scales.values), torch.zeros(len(parts)), 0
    kept: list[Tensor] = []  # of the layers that the run trained
    for examples in groups(trainer, num_examples, together):
        _, gradient = objective.gradient([examples], layers)
        total += gradient
        squares += torch.stack([gradient[a:b].square().sum() for a, b in parts])
        if trained:
            kept.append(torch.cat([gradient[a:b] for a, b in scales.parts(trained)]))
        count += 1
    kinds = list(dict.fromkeys(kind_of(name) for name in scales.names))
    print(f"{count} times {together} examples; s x 1000 / (F / s)")
    print("block " + " ".join(f"{kind[-14:]:>16}" for kind in kinds))
    rows: dict[str, dict[str, str]] = {}
    for name, (start, stop), square in zip(scales.names, parts, squares.tolist(), strict=True):
        mean = (float(total[start:stop].square().sum()) - square) / (count * (count - 1))
        ratio = square / count / mean if mean > 0 else float("inf")
        block = next((part for part in name.split(".") if part.isdecimal()), "-")
        rows.setdefault(block, {})[kind_of(name)] = f"{mean * 1000:8.2f}/{min(ratio, 99999):6.0f}"
    for block, cells in rows.items():
        print(f"{block:>5} " + " ".join(f"{cells.get(kind, ''):>16}" for kind in kinds))

    if trained:
        gram = torch.stack(kept) @ torch.stack(kept).T
        own = float(gram.diag().mean())
        norm, error = squared_mean(gram)
        print(f"trained: {len(kept[0])} values, s {norm:.5f} +- {error:.5f}, F {own:.4f}")


def groups(trainer: Trainer, num_examples: int, together: int) -> Iterator[list[EncodedExample]]:
    """Yield the first examples of training, so many at a time, never over two micro-batches."""
    step = count = 0
    while count < num_examples:
        for batch in trainer.objective.batch(step):
            for start in range(0, len(batch), together):
                yield batch[start : start + together]
            count += len(batch)
        step += 1


def squared_mean(gram: Tensor) -> tuple[float, float]:
    """Return the squared norm of the mean, from all inner products, and its standard error."""
    n = len(gram)
    off = gram - gram.diag().diag()
    without = (off.sum() - 2 * off.sum(1)) / ((n - 1) * (n - 2))
    error = ((n - 1) * without.var(correction=0)).sqrt()
    return float(off.sum() / (n * (n - 1))), float(error)


def kind_of(name: str) -> str:
    """Return the name of a layer within its block."""
    return name.split(".")[-1]


if __name__ == "__main__":
    main()

"""A run of preset `default` with exact gradients in place of its estimates: what noise costs it.

A step of ``per_example`` with N leave-one-out directions a group moves the values, on average over
directions and to first order in epsilon, by

    -learning_rate * sqrt((N - 1) / N) * mean_p g_p / sqrt(mean_p |g_p|^2)

with g_p the gradient of group p: the mean of ``d_i z_i`` is g_p, and the mean square that the
derivatives are normalised by is ``N / (N - 1) mean_p |g_p|^2``. This makes just these steps, with
the batches and the schedule of the recipe.

Usage: python recipes/without_variance.py RECIPE.yaml [key=value ...] [--evaluate-at 12 63 125]
"""

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qzo.model.load import load_tokenizer
from qzo.run.launch import base_checkpoint, data_sets, load_model
from qzo.run.recipe.read import read_recipe
from qzo.run.trainer import Trainer


def main() -> None:
    """Train, and print evaluations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--evaluate-at", nargs="*", type=int, default=[])
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        overrides = [*arguments.overrides, f"output_dir={folder}/run"]
        recipe = read_recipe(arguments.recipe, overrides)
        zo = recipe.zo
        is_default = zo.estimator == "per_example" and zo.sides == "leave_one_out" and zo.normalize
        is_plain = zo.optimizer == "sgd" and zo.tuned == "scales" and recipe.objective == "loss"
        if not (is_default and is_plain) or zo.normalize_over != "step" or zo.has_first_order:
            parser.error("expected the estimator of the default, sgd, and the loss of scales")
        checkpoint = base_checkpoint(recipe)
        tokenizer = load_tokenizer(checkpoint.folder)
        train_set, eval_set = data_sets(recipe, tokenizer)
        model = load_model(recipe, checkpoint, [train_set])
        trainer = Trainer(model, recipe, train_set, eval_set, tokenizer=tokenizer)
        train(trainer, {*arguments.evaluate_at, recipe.max_steps})


def train(trainer: Trainer, evaluated: set[int]) -> None:
    """Make the steps of the module's formula."""
    config, scales, objective = trainer.config, trainer.scales, trainer.objective
    layers = range(len(scales.names))
    bounds, together = scales.parts(layers), config.zo.examples_per_direction
    factor = math.sqrt(1 - 1 / config.zo.num_directions)
    scales.reset()
    for step in range(config.max_steps):
        examples = [example for part in objective.batch(step) for example in part]
        groups = [examples[i : i + together] for i in range(0, len(examples), together)]
        total, square = torch.zeros_like(scales.values), 0.0
        for group in groups:
            _, gradient = objective.gradient([group], layers)
            total += gradient
            square += float(gradient.square().sum())
        size = math.sqrt(square / len(groups))
        change = total * (-config.rate_at(step) * factor / (size * len(groups)))
        for start, stop in bounds:
            scales.move(start, stop, change[start:stop])
        if step + 1 in evaluated:
            print(step + 1, trainer.evaluate().to_dict(), flush=True)


if __name__ == "__main__":
    main()

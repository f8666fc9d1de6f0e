"""How much rounding in half precision disturbs directional derivatives, by dtype and estimator.

Takes the derivatives of a few steps with the same seeds and batches in each precision, and compares
them with those in float32. For each estimator and precision this prints

- signal: the root mean square of the derivatives in float32,
- error: that of their differences from float32,
- S/N: signal over error. The variance of a step grows by 1 / (S/N)^2.

Precisions: a dtype for the whole model; ``+ logits``: with the product of the head in float32;
``+ stream``: with embeddings, norms, attention, the sums between layers (the residual stream) and
the head in float32, and only the products of the quantized layers in the dtype. Log-softmax is
always in float32.

The estimators are those of the presets: ``default`` (row multipliers, a leave-one-out baseline,
epsilon 1e-2) and ``paper`` (group scales, two-sided, epsilon 1e-3).

Usage: python recipes/derivative_noise.py CHECKPOINT DATA [--batch-size 4] [--steps 4]
    [--num-directions 2] [--presets default paper] [--device cpu]
CHECKPOINT is a 4-bit checkpoint, DATA a file of examples; ``make demo`` makes both.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.model.load import load_checkpoint, load_tokenizer, quant_linears
from qzo.run.launch import data_sets
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = [f"{name}{more}" for name in HALVES for more in ("", " + logits", " + stream")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--num-directions", type=int, default=2, help="of a step of preset paper")
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print("| estimator | precision | derivatives | signal | error | S/N |")
    print("|---|---|--:|--:|--:|--:|")
    for preset in arguments.presets:
        exact = derivatives(arguments, preset, "float32")
        signal = root_mean_square(exact)
        print(f"| {preset} | float32 | {len(exact)} | {signal:.3g} | | |", flush=True)
        for precision in PRECISIONS:
            values = derivatives(arguments, preset, precision)
            error = root_mean_square([a - b for a, b in zip(values, exact, strict=True)])
            ratio = signal / error if error else math.inf
            row = f"| {preset} | {precision} | {len(values)} | | {error:.3g} | {ratio:.3g} |"
            print(row, flush=True)


def root_mean_square(values: list[float]) -> float:
    """Return the root of the mean square; NaN where a loss was not finite."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def derivatives(arguments: argparse.Namespace, preset: str, precision: str) -> list[float]:
    """Return the directional derivatives of some steps at the scales of the file."""
    zo: dict[str, Any] = {} if preset == "default" else {"num_directions": arguments.num_directions}
    with TemporaryDirectory() as folder:
        settings = recipe(
            {
                **{"preset": preset, "model": str(arguments.checkpoint), "zo": zo},
                **{"data": str(arguments.data), "output_dir": f"{folder}/run"},
                **{"per_device_train_batch_size": arguments.batch_size, "num_eval_examples": 0},
            }
        )
        checkpoint = open_checkpoint(arguments.checkpoint)
        tokenizer = load_tokenizer(checkpoint.folder)
        train_set, _ = data_sets(settings, tokenizer)
        name, _, more = precision.partition(" + ")
        is_stream = more == "stream"
        dtype = torch.float32 if is_stream else getattr(torch, name)
        model = load_checkpoint(checkpoint, dtype, arguments.device)
        trainer = Trainer(model, settings, train_set, tokenizer=tokenizer)
        trainer.scales.reset()
        found: list[float] = []
        with computing(model, HALVES.get(name), more):
            for step in range(arguments.steps):
                probes = trainer.estimator.ask(step)
                losses = trainer.objective.losses(probes, trainer.objective.batch(step))
                found += [d.value for d in trainer.estimator.tell(probes, losses)]
        return found


@contextmanager
def computing(model: PreTrainedModel, half: torch.dtype | None, more: str) -> Iterator[None]:
    """Let parts of a model compute in another dtype than the rest while the block runs."""
    handles = []
    if more == "logits":
        handles.append(model.get_output_embeddings().register_forward_hook(logits_in_fp32))
    elif more == "stream":
        for layer in quant_linears(model):
            handles.append(layer.register_forward_pre_hook(lambda _, x: (x[0].to(half),)))
            handles.append(layer.register_forward_hook(lambda _, _x, y: y.float()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_in_fp32(head: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """Compute the product of the head again, in float32."""
    return inputs[0].float() @ head.weight.float().T  # a parameter or a buffer


if __name__ == "__main__":
    main()

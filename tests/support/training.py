"""A few steps of training on a few fixed examples."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qzo.data.tokenize import Candidate, EncodedExample
from qzo.method.probes import Probe
from qzo.model.load import quant_linears
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer
from support.models import logits_of


def examples() -> list[EncodedExample]:
    """Return examples of different lengths, each with one answer."""
    rows = [tuple(range(start, start + length)) for start, length in ((3, 6), (9, 4), (20, 7))]
    return [EncodedExample((row,), (Candidate(0, (len(row) - 1,), (5,)),), 0) for row in rows]


def short_run(model: PreTrainedModel, folder: Path, *, steps: int = 3, **zo: Any) -> Trainer:
    """Train for a few steps that change every scale by some percent."""
    values = {
        "model": "given",
        "data": "given",
        "output_dir": str(folder),
        "preset": "none",
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "zo": {"coordinates": "row", **zo},
    }
    trainer = Trainer(model, recipe(values), examples())
    trainer.train()
    return trainer


def tuned_logits(trainer: Trainer) -> Tensor:
    """Return the logits of a trained model at its fp32 master."""
    live = quant_linears(trainer.model)[0].live
    with trainer.scales.shifted(live, (Probe(seed=0, offset=0.0),)):
        return logits_of(trainer.model)


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales of every quantized layer."""
    return {layer.name: layer.quantized.scales for layer in quant_linears(model)}

"""Runs of every optimizer with everything that shapes directions or changes what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import ESTIMATORS, tiny_checkpoint, tiny_trainer

import qzo
from qzo.errors import ConfigError
from qzo.method.optimizers import OPTIMIZERS

pytestmark = pytest.mark.slow  # whole runs; the file takes half a minute

# The smallest recipe of each.
BASIC: dict[str, dict[str, Any]] = {
    name: {"optimizer": name, "estimator": "spsa", "num_directions": 2} for name in OPTIMIZERS
}
BASIC["conservative"]["num_directions"] = 1
BASIC["lozo_momentum"] |= ESTIMATORS["lozo_momentum"]

SHAPES: dict[str, dict[str, Any]] = {
    "sections": {"unquantized": ["norms"], "unquantized_factor": 3.0},
    "exact blocks": {"first_order_blocks": 1},
    "blocks": {"blocks_per_step": 1, "basis_steps": 1},
    "random mask": {"sparsity": 0.5, "basis_steps": 1},
    "magnitude mask": {"sparsity": 0.5, "mask": "magnitude", "coordinates": "relative"},
    "stretch": {"stretch": {"v_proj": 2.0}},
    "measured layers": {"layer_scaling": "grad_norm"},
    "lora": {"tuned": "lora"},
    "prefix": {"tuned": "prefix"},
}

# Those that are refused, by the optimizer; all others run.
REFUSED = {
    "conmezo": {"blocks", "random mask", "magnitude mask"},
    "conservative": {"measured layers"},
    "lozo_momentum": {"blocks", "random mask", "magnitude mask", "lora", "prefix"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("optimizers") / "base", num_layers=2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", sorted(BASIC))
def test_it_runs_and_replays_or_is_refused(
    base: Path, tmp_path: Path, optimizer: str, shape: str
) -> None:
    keys: dict[str, Any] = {
        **{"zo": {**BASIC[optimizer], **SHAPES[shape]}, "lr_scheduler_type": "constant"},
        **{"learning_rate": 1e-3, "per_device_train_batch_size": 2},
    }
    if shape in REFUSED.get(optimizer, ()):
        with pytest.raises(ConfigError):
            tiny_trainer(base, tmp_path / "run", max_steps=4, **keys)
        return
    tiny_trainer(base, tmp_path / "run", max_steps=2, **keys).train()
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=4, resume_from_checkpoint=True, **keys)

    trainer.train()

    replayed = qzo.replay(tmp_path / "run")
    assert (replayed.steps, replayed.adapter) == (4, "equal")
    values = trainer.scales.values.clone()
    trainer.scales.reset()
    moved = values - trainer.scales.values
    assert bool(moved.any())
    assert float(moved.abs().max()) < 0.5  # nothing runs away
    still = trainer.scales.directions.still
    assert bool(still) is (shape == "exact blocks")
    assert all(bool(moved[start:stop].any()) for start, stop in still)  # by their gradients
    assert torch.isfinite(moved).all()

"""QZO as published, against algorithm 1 of arXiv 2505.13430 written out on dense matrices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import dense_equal, json_lines, tiny_checkpoint, tiny_trainer
from torch import Tensor
from transformers import PreTrainedModel

from qzo.data.tokenize import EncodedExample
from qzo.method.directions.philox import directions
from qzo.method.probes import Probe, direction_seed
from qzo.run.trainer import Trainer

# Section 4.1 of the paper.
EPSILON, LEARNING_RATE, CLIP, BATCH_SIZE = 1e-3, 1e-7, 100.0, 16
RECORDS = [
    {"prompt": f"item {i}:", "completion": f" {'xyz'[i % 3] * (i % 4 + 1)}"} for i in range(20)
]


@dataclass(frozen=True)
class Naive:
    scales: Tensor
    derivatives: list[float]
    losses: list[float]


def algorithm_1(base: Path, trainer: Trainer, layers: list[str], num_steps: int) -> Naive:
    """Perturb, measure, clip and update the whole vector of scales, layer after layer."""
    tensors = load_file(base / "model.safetensors")
    stored = [tensors[f"{name}.scales"].float() for name in layers]  # (groups, out)
    vector = torch.cat([scales.T.reshape(-1) for scales in stored])
    derivatives, losses = [], []

    def loss_at(scales: Tensor, batch: list[EncodedExample]) -> float:
        parts = scales.split([s.numel() for s in stored])
        shaped = [p.view(s.T.shape).T for p, s in zip(parts, stored, strict=True)]
        model = dense_equal(base, dict(zip(layers, shaped, strict=True)))
        return sum(transformers_loss(model, example) for example in batch) / len(batch)

    for step in range(num_steps):
        (batch,) = trainer.objective.batch(step)
        assert len(batch) == BATCH_SIZE
        z = directions("gaussian", [direction_seed(0, step, 0)], 0, len(vector))[0]
        plus = loss_at(vector + EPSILON * z, batch)
        minus = loss_at(vector - EPSILON * z, batch)
        d = max(-CLIP, min(CLIP, (plus - minus) / (2 * EPSILON)))
        vector = torch.clamp(vector - LEARNING_RATE * d * z, min=0)
        derivatives.append(d)
        losses += [plus, minus]
    return Naive(vector, derivatives, losses)


def transformers_loss(model: PreTrainedModel, example: EncodedExample) -> float:
    """Return the model's own loss of the answer; all other labels are -100."""
    (candidate,) = example.candidates
    tokens = torch.tensor([[*example.rows[0], candidate.targets[-1]]])
    labels = torch.full_like(tokens, -100)
    for position, target in zip(candidate.positions, candidate.targets, strict=True):
        labels[0, position + 1] = target
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=labels).loss)


def paper_trainer(base: Path, out: Path, num_steps: int) -> Trainer:
    own: Any = {"per_device_train_batch_size": BATCH_SIZE}  # tiny_recipe has a smaller one
    return tiny_trainer(base, out, train=RECORDS, preset="paper", max_steps=num_steps, **own)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(("gain", "is_clipped"), [(1.0, False), (60.0, True)])
def test_preset_paper_is_algorithm_1(
    num_steps: int, gain: float, is_clipped: bool, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tmp_path / "base", gain=gain)
    trainer = paper_trainer(base, tmp_path / "run", num_steps)
    start = trainer.scales.values.clone()

    trainer.train()

    header, *lines = json_lines(tmp_path / "run" / "journal.jsonl")
    steps = [line for line in lines if "derivatives" in line]
    got = [line["derivatives"][0] for line in steps]
    naive = algorithm_1(base, trainer, header["layers"], num_steps)
    assert [line["learning_rate"] for line in steps] == [LEARNING_RATE] * num_steps
    # fp32 losses of up to 4 * gain, summed in another order; the derivative divides by 2e-3
    assert [loss for line in steps for loss in line["losses"]] == pytest.approx(
        naive.losses, abs=2e-6 * gain
    )
    assert got == pytest.approx(naive.derivatives, abs=2e-3 * gain)
    assert (CLIP in [abs(d) for d in got]) == is_clipped
    # absolute: what was asked for; relative: the fp32 scales, near 0.02, resolve 2e-9
    assert (trainer.scales.values - naive.scales).abs().max() < 1e-6
    moved = (naive.scales - start).abs().max()
    assert moved > 1e-7
    assert (trainer.scales.values - naive.scales).abs().max() < 0.02 * moved


def test_preset_paper_keeps_scales_from_falling_below_zero(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", gain=60.0)
    trainer = tiny_trainer(
        base, tmp_path / "run", train=RECORDS, preset="paper", max_steps=1, learning_rate=1e-3
    )

    trainer.train()

    (derivative,) = json_lines(tmp_path / "run" / "journal.jsonl")[1]["derivatives"]
    z = directions("gaussian", [direction_seed(0, 0, 0)], 0, len(trainer.scales))[0]
    stored = trainer.scales.values.clone()
    trainer.scales.reset()
    unclamped = trainer.scales.values - 1e-3 * derivative * z
    assert (unclamped < 0).any()
    assert stored.min() == 0
    torch.testing.assert_close(stored, unclamped.clamp(min=0), rtol=0, atol=1e-6)


def test_the_training_loss_is_transformers_own_loss(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    trainer = paper_trainer(base, tmp_path / "run", 1)
    batch = trainer.objective.batch(0)
    model = dense_equal(base)

    (got,) = trainer.objective.losses([Probe(0, 0.0)], batch)

    losses = [transformers_loss(model, example) for example in batch[0]]
    # fp32 forwards in another order
    assert got == pytest.approx(sum(losses) / len(losses), abs=2e-6)

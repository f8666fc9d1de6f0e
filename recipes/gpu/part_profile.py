"""One step of each preset under torch's profiler: launches, synchronisations, the longest kernels.

Four decoder layers of Llama-2-7B's shape, 16 x 34 tokens, so that what Python does between
launches shows.
"""

import time
from pathlib import Path
from typing import Any

import torch
from check_part import Findings, run_part
from make_checkpoints import find
from torch.profiler import ProfilerActivity, profile

from qzo.bench.batches import random_examples
from qzo.bench.clock import wait_for
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import from_encoded
from qzo.run.launch import load_model
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "all layers, one direction": {"preset": "none", "zo": {"estimator": "spsa"}},
}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")
NUM_SHOWN = 15


class Steps:
    """Steps of a recipe on one batch, without a journal."""

    def __init__(self, checkpoint: Path, keys: dict[str, Any], findings: Findings) -> None:
        lengths = [8] * 4 if findings.is_tiny else [34] * 16
        opened = open_checkpoint(checkpoint)
        examples = from_encoded(random_examples(lengths, opened.config["vocab_size"]))
        values = {"model": str(checkpoint), "output_dir": str(findings.work / "run"), **keys}
        values |= {"per_device_train_batch_size": len(lengths), "device": findings.device}
        values |= {"dtype": "float16" if findings.is_cuda else "float32"}
        config = recipe(values)
        model = load_model(config, opened, [examples])
        self.trainer, self.number = Trainer(model, config, examples), 0
        self.device = model.device

    def step(self) -> None:
        """Take one step: probes, losses, derivatives, update."""
        trainer = self.trainer
        batch = trainer.objective.batch(self.number)
        trainer.optimizer.aim(trainer.scales)
        probes = trainer.estimator.ask(self.number)
        losses = trainer.objective.losses(probes, batch)
        derivatives = trainer.estimator.tell(probes, losses)
        trainer.optimizer.step(trainer.scales, derivatives, trainer.config.learning_rate)
        self.number += 1
        wait_for(self.device)


def ask(findings: Findings) -> str:
    """Profile a step of each preset, after two that do not count."""
    checkpoint = find("profile", findings)
    remarks = []
    for name, keys in PRESETS.items():
        with findings.guarded(name):
            steps = Steps(checkpoint, keys, findings)
            steps.step()
            steps.step()
            started = time.perf_counter()
            steps.step()
            seconds = time.perf_counter() - started
            found = {"seconds": seconds, **_profile(steps, findings)}
            findings.note(name, found)
            remarks.append(f"{name}: {found['launches']} launches, {found['waits']} waits")
            del steps
    return "; ".join(remarks)


def _profile(steps: Steps, findings: Findings) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if findings.is_cuda else [])]
    with profile(activities=activities) as profiled:
        steps.step()
    events = profiled.key_averages()
    counts = {event.key: event.count for event in events}
    by = "self_device_time_total" if findings.is_cuda else "self_cpu_time_total"
    longest = sorted(events, key=lambda event: -getattr(event, by, 0))[:NUM_SHOWN]
    return {
        "launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "waits": sum(counts.get(name, 0) for name in WAITS),
        "copies": sum(counts.get(name, 0) for name in COPIES),
        "items": counts.get("aten::_local_scalar_dense", 0),
        "device_seconds": sum(getattr(event, "self_device_time_total", 0) for event in events) / 1e6
        if findings.is_cuda
        else None,
        "longest": [
            {"name": e.key[:90], "count": e.count, "seconds": getattr(e, by, 0) / 1e6}
            for e in longest
        ],
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_part(ask)

"""``qzo bench memory``: a training run in a fresh process, against what ``qzo plan`` predicts.

The products alone are what no way of computing the step gets around: one product of all its tokens
with every quantized layer's matrix, dense, in float32 (on CUDA float16), the operands in memory.
Each shape is timed
by itself and counted as often as the model has it.
"""

from collections import Counter
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from qzo.bench.clock import interleaved
from qzo.bench.machine import hardware, versions
from qzo.bench.training_run import RunResult, RunSettings, run_apart
from qzo.checkpoint.atomic import read_json
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.model.memory import parse_memory
from qzo.model.placement import DTYPES
from qzo.plan.planner import Plan, plan
from qzo.plan.shapes import build_skeleton, head_name, linear_shapes

PRODUCT_REPEATS = 3


def bench_memory(settings: RunSettings) -> dict[str, Any]:
    """Measure a run.

    Returns:
        Sizes in bytes and times in seconds: ``peak_resident``, ``peak_anonymous`` and
        ``peak_file_backed`` of the process, ``device_peak`` and ``device_reserved`` of a CUDA
        device; ``predicted`` (by the plan, or the limit if there is one) with
        ``resident_vs_predicted``, on CUDA ``device_vs_predicted`` instead; ``first_layer_seconds``,
        ``step_seconds``, ``products_seconds`` and ``step_vs_products``; ``losses`` and, bit for
        bit, ``losses_hex``.
    """
    predicted = predict(settings)
    planned = predicted.peak_bytes
    if settings.memory_limit is not None:
        planned = min(planned, parse_memory(settings.memory_limit, "memory_limit"))
    result = run_apart(settings)
    num_tokens = predicted.workload.num_rows * settings.seq_len
    products = products_seconds(settings, num_tokens)
    peaks = result.peaks
    return {
        "settings": asdict(settings),
        "peak_resident": peaks.resident,
        "peak_anonymous": peaks.anonymous,
        "peak_file_backed": peaks.file_backed,
        "predicted": planned,
        **_against_plan(result, planned),
        "first_layer_seconds": result.first_layer_seconds,
        "step_seconds": list(result.step_seconds),
        "products_seconds": products,
        "step_vs_products": median(result.step_seconds) / products,
        "losses": [list(losses) for losses in result.losses],
        "losses_hex": [[loss.hex() for loss in losses] for losses in result.losses],
        "hardware": hardware(torch.device(settings.device)),
        "versions": versions(),
    }


def _against_plan(result: RunResult, planned: int) -> dict[str, float]:
    """Compare with a plan what it is about: the process, or a CUDA device, driver included."""
    if result.device_peak is None or result.device_reserved is None:
        return {"resident_vs_predicted": result.peaks.resident / planned}
    return {
        "device_peak": result.device_peak,
        "device_reserved": result.device_reserved,
        "device_vs_predicted": result.device_peak / planned,
    }


def predict(settings: RunSettings) -> Plan:
    """Return what ``qzo plan`` says about the same workload."""
    checkpoint = open_checkpoint(settings.checkpoint)
    return plan(
        checkpoint.folder,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        answer_len=settings.answer_len,
        coordinates=settings.coordinates,
        evaluations=settings.num_probes,
        dtype=settings.dtype,
        device=torch.device(settings.device).type,
        first_order_blocks=settings.first_order_blocks,
    )


def products_seconds(settings: RunSettings, num_tokens: int) -> float:
    """Time the dense products of all layers but the head.

    Args:
        settings: Names the checkpoint and the device.
        num_tokens: Rows of each product: the tokens at all probes.
    """
    config = read_json(open_checkpoint(settings.checkpoint).folder / "config.json")
    skeleton = build_skeleton(config, DTYPES["float32"])
    head = head_name(skeleton)
    counts = Counter(
        (layer.out_features, layer.in_features)
        for layer in linear_shapes(skeleton)
        if layer.name != head
    )
    device = torch.device(settings.device)
    return sum(
        count * _product_seconds(*sizes, num_tokens, device) for sizes, count in counts.items()
    )


def _product_seconds(
    out_features: int, in_features: int, num_tokens: int, device: torch.device
) -> float:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    weight = torch.full((out_features, in_features), 0.5, device=device, dtype=dtype)
    inputs = torch.full((num_tokens, in_features), 0.5, device=device, dtype=dtype)
    outputs = torch.empty(num_tokens, out_features, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(inputs, weight.T, out=outputs)

    return median(interleaved({"product": product}, PRODUCT_REPEATS, device)["product"])

"""A long journal, replayed: bytes in both forms, and the time until the scales are there again.

Losses are drawn, not measured: a replay does not see them. The scales move as in training, and both
replays have to end at the same bytes.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qzo.bench.machine import hardware, versions
from qzo.errors import QZOError
from qzo.method.directions.philox import GENERATOR
from qzo.method.estimators import SPSA
from qzo.method.optimizers import RULES, make_optimizer
from qzo.method.trained_vector import Scales
from qzo.run.journal.compact import COMPACT_NAME, CompactJournal, write_compact
from qzo.run.journal.journal import NAME, Journal
from qzo.run.journal.lines import Record
from qzo.run.output.replay import apply_journal

_ROWS, _MARK_STEPS, _SEED = 1000, 100, 0


def bench_replay(
    num_steps: int, num_values: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Write a journal and replay it in both forms.

    Args:
        num_steps: Of one direction each.
        num_values: Trained values, in relative coordinates.
        progress: Called with what is done now.

    Returns:
        ``bytes`` and ``seconds`` by form; ``seconds`` of ``writing`` the journal with updates and
        disk.

    Raises:
        QZOError: A replay ended elsewhere.
    """
    seconds, sizes = {}, {}
    with TemporaryDirectory() as folder:
        path, compact = Path(folder) / NAME, Path(folder) / COMPACT_NAME
        journal = Journal.create(path, lambda: _header(num_values))
        journal.sync_steps = num_steps
        scales = _scales(num_values)
        started = time.monotonic()
        _write(journal, scales, num_steps, progress)
        seconds["writing"] = time.monotonic() - started
        write_compact(Journal.open(path), compact)
        want = scales.fingerprint()
        forms: dict[str, Callable[[], Record]] = {
            "jsonl": lambda: Journal.open(path),
            "compact": lambda: CompactJournal(compact),
        }
        for name, opened in forms.items():
            progress(f"replay of the {name} form")
            scales = _scales(num_values)
            started = time.monotonic()
            record = opened()
            apply_journal(record, scales, make_optimizer("sgd", {}))
            seconds[name] = time.monotonic() - started
            if scales.fingerprint() != want:
                raise QZOError(f"replay: the {name} form ended at other scales than training")
            sizes[name] = record.path.stat().st_size
    return {
        **{"steps": num_steps, "values": num_values, "bytes": sizes, "seconds": seconds},
        **{"hardware": hardware(torch.device("cpu")), "versions": versions()},
    }


def _scales(num_values: int) -> Scales:
    stored = torch.ones(_ROWS, -(-num_values // _ROWS), dtype=torch.float16)
    return Scales(["layer"], [stored], coordinates="relative", direction="rademacher")


def _write(
    journal: Journal, scales: Scales, num_steps: int, progress: Callable[[str], None]
) -> None:
    draw, optimizer, estimator = random.Random(_SEED), make_optimizer("sgd", {}), SPSA(1e-3, _SEED)
    for step in range(num_steps):
        if step % _MARK_STEPS == 0:
            progress(f"step {step} of {num_steps}")
            journal.mark(scales.fingerprint())
        losses = [0.7 + draw.gauss(0, 0.01) for _ in range(2)]
        derivatives = estimator.tell(estimator.ask(step), losses)
        rate = 1e-5 * (1 - step / num_steps)
        journal.append(step, losses, derivatives, rate)
        optimizer.step(scales, derivatives, rate)
    journal.mark(scales.fingerprint())


def _header(num_values: int) -> dict[str, Any]:
    """Return a header of the size that Llama-2-13B has."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return {
        **{"base": "synthetic", "codes_sha256": "0" * 64, "scales_sha256": "0" * 64},
        **{
            "generator": GENERATOR,
            "rules": RULES,
            "qzo_version": versions()["qzo"],
            "seed": _SEED,
            "recipe": {},
        },
        "layers": [f"model.layers.{i}.{part}" for i in range(40) for part in parts],
        **{"num_values": num_values, "coordinates": "relative", "direction": "rademacher"},
        **{"optimizer": "sgd", "optimizer_settings": {}},
    }

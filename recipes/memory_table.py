"""Print the README's table of models x memory: what `qzo plan` predicts for one GPU.

    python recipes/memory_table.py

GPTQ, 4 bits, group size 128, float16 activations, batches of 16 x 512 tokens. Needs no weights and
no GPU.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qzo.bench.model_shapes import SHAPES
from qzo.plan.planner import Plan, plan
from qzo.plan.sizes import assumed_quantization

MODELS = ("llama-2-7b", "llama-2-13b", "llama-3.1-8b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"evaluations": 8},
    "paper": {"coordinates": "absolute", "num_probes": 2},
}
WEIGHTS = ("codes", "zeros", "base scales", "embeddings", "head", "norms, biases, other")


def main() -> None:
    """Print a row per model."""
    print(f"| model | 4-bit weights | {' | '.join(f'peak, `{name}`' for name in PRESETS)} |")
    print("|---|--:|" + "--:|" * len(PRESETS))
    for name in MODELS:
        plans = [planned(name, keys) for keys in PRESETS.values()]
        sizes = [weights(plans[0]), *(p.peak_bytes for p in plans)]
        print(f"| {name} | " + " | ".join(f"{size / 2**30:.1f} GiB" for size in sizes) + " |")


def planned(name: str, keys: dict[str, Any]) -> Plan:
    """Return the plan of a step."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(SHAPES[name]))
        return plan(
            path,
            assumed=assumed_quantization("gptq", 4, 128),
            batch_size=16,
            seq_len=512,
            device="cuda",
            dtype="float16",
            **keys,
        )


def weights(result: Plan) -> int:
    """Return the bytes of the checkpoint that stay in memory."""
    return sum(part.bytes for part in result.parts if part.name in WEIGHTS)


if __name__ == "__main__":
    main()

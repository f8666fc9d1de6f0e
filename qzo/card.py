"""The model card of a run and of its export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qzo.metrics import evaluations


def model_card(run: Path, adapter: Mapping[str, Any]) -> str:
    """Return a README.md: base, method, recipe, evaluation.

    Args:
        run: The run folder; its recipe and metrics are read where they exist.
        adapter: ``adapter_config.json``.
    """
    base = Path(str(adapter["base_model_name_or_path"])).name
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: transformers",
        "tags: [qzo, zeroth-order, quantized]",
        "---",
        "",
        f"# {base}, fine-tuned with QZO",
        "",
        _summary(base, adapter),
        "",
        *_evaluation_lines(run / "metrics.jsonl"),
        *_recipe_lines(run / "recipe.yaml"),
    ]
    return "\n".join(lines) + "\n"


def _summary(base: str, adapter: Mapping[str, Any]) -> str:
    number, steps = adapter["num_trained_values"], adapter["step"]
    if "lora" in adapter:
        return (
            f"LoRA factors of rank {adapter['lora']['rank']} for `{base}`, whose 4-bit codes and "
            f"scales stay the same. {number} values were trained for {steps} steps with forward "
            "passes only (MeZO, arXiv 2305.17333). Load them with peft."
        )
    if "prefix" in adapter:
        return (
            f"A prefix of {adapter['prefix']['num_tokens']} tokens' keys and values for `{base}`, "
            f"whose 4-bit codes and scales stay the same. {number} values were trained for {steps} "
            "steps with forward passes only (MeZO, arXiv 2305.17333). Load them with qzo."
        )
    keys = ", ".join(f"`{key}`" for key in adapter.get("unquantized", ()))
    also = f" and the unquantized tensors {keys}" if keys else ""
    return (
        f"Only the quantization scales{also} differ from `{base}`; the 4-bit codes are byte for "
        f"byte the same. {number} values were trained in {adapter['coordinates']} "
        f"coordinates for {steps} steps {_means(adapter)} (QZO, arXiv 2505.13430)."
    )


def _means(adapter: Mapping[str, Any]) -> str:
    exact = adapter.get("num_values_by_exact_gradients", 0)
    if exact == 0:
        return "with forward passes only"
    if exact == adapter["num_trained_values"]:
        return "with exact gradients"
    return f"with exact gradients for {exact} of them and forward passes only for the others"


def _evaluation_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [line for line in evaluations(lines) if line.get("eval_loss") is not None]
    if not rows:
        return []
    names = ["loss", "accuracy"]
    names += ["reward"] if any(row.get("eval_reward") is not None for row in rows) else []
    table = [
        "## Evaluation",
        "",
        f"| step | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        values = [row.get(f"eval_{name}") for name in names]
        shown = ["" if value is None else f"{value:.4f}" for value in values]
        table.append(f"| {row['step']} | {' | '.join(shown)} |")
    return [*table, ""]


def _recipe_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    public = {k: v for k, v in values.items() if k not in {"output_dir", "model"}}
    return ["## Recipe", "", "```yaml", yaml.safe_dump(public, sort_keys=False).rstrip(), "```"]

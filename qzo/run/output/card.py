"""The model card of a run and of its export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qzo.checkpoint.atomic import read_json
from qzo.checkpoint.base import BASE_NAME, read_run_recipe
from qzo.checkpoint.hub import Origin, origin_of
from qzo.run.folder import BASE_ORIGIN_NAME, shared_recipe
from qzo.run.output.metrics import evaluations


def model_card(run: Path, adapter: Mapping[str, Any]) -> str:
    """Return a README.md: base, method, recipe, evaluation; it names no path of the computer.

    Args:
        run: The run folder; its recipe and metrics are read where they exist.
        adapter: ``adapter_config.json``.
    """
    origin, is_on_hub = _base(run, adapter)
    base = origin.name if is_on_hub else Path(origin.shared_name).name
    lines = [
        "---",
        *([f"base_model: {base}"] if is_on_hub else []),  # the hub makes it a link
        "library_name: transformers",
        "tags: [qzo, zeroth-order, quantized]",
        "---",
        "",
        f"# {base}, fine-tuned with QZO",
        "",
        _summary(base, adapter),
        "",
        *([f"Base: `{base}` at commit `{origin.commit}`.", ""] if origin.commit else []),
        *_evaluation_lines(run / "metrics.jsonl"),
        *_recipe_lines(read_run_recipe(run)),
    ]
    return "\n".join(lines) + "\n"


def _base(run: Path, adapter: Mapping[str, Any]) -> tuple[Origin, bool]:
    """Return the base as a reader of the card knows it, and whether it is on the hub."""
    name, commit = str(adapter["base_model_name_or_path"]), adapter.get("revision")
    if commit is not None:
        return Origin(name, commit), True
    if name == BASE_NAME:  # it was quantized for the run, from this model
        origin = run / BASE_ORIGIN_NAME
        is_on_hub = origin.is_file() and not read_json(origin).get("sizes")
        return Origin(str(read_run_recipe(run).get("model", name))), is_on_hub
    origin_of_path = origin_of(name, Path(name))  # earlier versions wrote whole paths
    return origin_of_path, origin_of_path.commit is not None


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


def _recipe_lines(recipe: Mapping[str, Any]) -> list[str]:
    if not recipe:
        return []
    hidden = {"output_dir", "model", "revision"}
    public = {k: v for k, v in shared_recipe(recipe).items() if k not in hidden}
    return ["## Recipe", "", "```yaml", yaml.safe_dump(public, sort_keys=False).rstrip(), "```"]

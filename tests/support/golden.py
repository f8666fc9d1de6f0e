"""Short runs whose numbers are kept: every kind of training, on a tiny checkpoint, in float32.

``python -m support.golden`` from the folder ``tests`` measures them again and writes the file. Do
that in a commit of its own, which says why a number changed.
"""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

FILE = Path(__file__).parents[1] / "golden" / "runs.json"
STEPS = 4
# Written out, so that no default of a preset has a part in these numbers.
_ALL_LAYERS: dict[str, Any] = {"modules": None, "depth": None, "coordinates": "row"}
_SPSA: dict[str, Any] = {**_ALL_LAYERS, "estimator": "spsa", "num_directions": 2}
_PER_EXAMPLE: dict[str, Any] = {
    **{**_ALL_LAYERS, "estimator": "per_example", "sides": "two", "num_directions": 1},
    "examples_per_direction": 1,
}
_LEAVE_ONE_OUT = {**_PER_EXAMPLE, "sides": "leave_one_out", "num_directions": 3}


def _by_name(key: str, names: str, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{key} {name}": {"zo": {**base, key: name}} for name in names.split()}


CASES: dict[str, dict[str, Any]] = {
    "preset default": {"learning_rate": None},
    "preset paper": {"learning_rate": None, "preset": "paper"},
    **_by_name("estimator", "one_sided fzoo rloo spsa_1_5 forward_gradient", _SPSA),
    "estimator spsa, clipped": {"zo": {**_SPSA, "max_loss_difference": 1e-3}},
    "estimator per_example": {"zo": _PER_EXAMPLE},
    "estimator per_example, pairs": {"zo": {**_PER_EXAMPLE, "examples_per_direction": 2}},
    "estimator per_example, as measured": {"zo": {**_PER_EXAMPLE, "normalize": False}},
    "estimator leave_one_out": {"zo": _LEAVE_ONE_OUT},
    "estimator leave_one_out by group": {"zo": {**_LEAVE_ONE_OUT, "normalize_over": "group"}},
    **_by_name("optimizer", "sgd sign momentum adam meazo hizoo conmezo", _SPSA),
    "optimizer conservative": {
        "zo": {**_SPSA, "optimizer": "conservative", "num_directions": 1},
    },
    "optimizer lozo_momentum": {
        "zo": {
            **{**_SPSA, "optimizer": "lozo_momentum", "coordinates": "relative"},
            **{"direction": "lozo", "basis_steps": 2},
        },
    },
    **_by_name("coordinates", "row column rank_one relative absolute", _SPSA),
    "direction gaussian": {"zo": {**_SPSA, "direction": "gaussian"}},
    **{
        f"direction {name}": {"zo": {**_SPSA, "direction": name, "coordinates": "relative"}}
        for name in ("lozo", "subzero")
    },
    "random mask": {"zo": {**_SPSA, "sparsity": 0.5}},
    "magnitude mask": {
        "zo": {**_SPSA, "sparsity": 0.5, "mask": "magnitude", "coordinates": "relative"},
    },
    "blocks": {"zo": {**_SPSA, "blocks_per_step": 1, "basis_steps": 2}},
    "stretch": {"zo": {**_SPSA, "stretch": {"v_proj": 2.0}}},
    "layer_scaling param_norm": {"zo": {**_SPSA, "layer_scaling": "param_norm"}},
    "layer_scaling grad_norm": {"zo": {**_SPSA, "layer_scaling": "grad_norm"}},
    "last block": {"zo": {**_SPSA, "num_blocks": 1}},
    "norms and head": {"zo": {**_SPSA, "unquantized": ["norms", "head"]}},
    "lora": {"zo": {**_SPSA, "tuned": "lora", "lora_rank": 2}},
    "prefix": {"zo": {**_SPSA, "tuned": "prefix", "prefix_tokens": 2}},
    "hybrid": {"zo": {**_SPSA, "first_order_blocks": 1}},
    "first order, group scales": {
        "zo": {
            **{**_SPSA, "coordinates": "relative", "first_order_blocks": 2},
            **{"first_order_optimizer": "sgd", "first_order_learning_rate": 1e-2},
        },
    },
    "reward": {
        **{"zo": {**_SPSA, "epsilon": 0.1}, "objective": "reward", "max_new_tokens": 6},
        "generation_stop": None,
    },
    "accuracy": {"zo": {**_SPSA, "epsilon": 0.1}, "objective": "accuracy"},
    "language modelling": {"zo": _LEAVE_ONE_OUT, "data": "completions"},
    "micro-batches": {"zo": _SPSA, "gradient_accumulation_steps": 2},
    "nf4": {"zo": _SPSA, "base": "nf4"},
    "nf4, absolute": {"zo": {**_SPSA, "coordinates": "absolute"}, "base": "nf4"},
    "nf4, double quantization": {"zo": _SPSA, "base": "nf4 nested"},
}
"""The keys of a recipe that differ from ``_recipe``, by the name of a run."""

COMMANDS: dict[str, dict[str, Any]] = {
    "streamed": {"memory_limit": "2GiB"},
    "two processes": {"num_processes": 2},
    "two processes, nf4": {"num_processes": 2, "base": "nf4"},
}
"""Runs by the command line, in processes of their own."""


def early_letters(prompt: str, output: str, example: dict[str, Any]) -> float:
    """Count letters of the first half of the alphabet."""
    del prompt, example
    return sum(letter in "abcdefghijklm" for letter in output) / 8


def write_bases(folder: Path) -> dict[str, Path]:
    """Write the checkpoints that the runs start from."""
    from support.models import tiny_model
    from support.nf4_files import write_nf4
    from support.runs import tiny_checkpoint, write_tokenizer

    bases = {"gptq": tiny_checkpoint(folder / "gptq", gain=4.0, num_layers=2)}
    for name, is_nested in (("nf4", False), ("nf4 nested", True)):
        bases[name] = folder / name.replace(" ", "-")
        model = tiny_model(num_layers=2, intermediate=128)  # blocks of 64 stay inside rows
        write_nf4(bases[name], model, double_quant=is_nested)
        write_tokenizer(bases[name])
    return bases


def measure(name: str, bases: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run a case; return its losses step by step, and a digest of the tuned tensors."""
    if name in COMMANDS:
        return _command(dict(COMMANDS[name]), bases, out)
    return _run(dict(CASES[name]), bases, out)


def _recipe(keys: dict[str, Any], base: Path, out: Path) -> dict[str, Any]:
    values = {
        **{"model": str(base), "output_dir": str(out), "data": "given", "max_steps": STEPS},
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 40},
        **{"logging_steps": 2, "num_eval_examples": 0, **keys},
    }
    return {key: value for key, value in values.items() if (key, value) != ("learning_rate", None)}


def _run(keys: dict[str, Any], bases: dict[str, Path], out: Path) -> dict[str, Any]:
    import qzo
    from support.runs import COMPLETIONS, RECORDS

    is_reward = keys.get("objective") == "reward"
    data = COMPLETIONS if is_reward or keys.pop("data", "") == "completions" else RECORDS
    base = bases[keys.pop("base", "gptq")]
    recipe = qzo.recipe(_recipe(keys, base, out))
    reward = early_letters if is_reward else None
    trainer = qzo.Trainer(qzo.load(base), recipe, data, reward=reward)
    trainer.train()
    return _numbers(out)


def _command(keys: dict[str, Any], bases: dict[str, Path], out: Path) -> dict[str, Any]:
    import yaml

    from support.runs import RECORDS, write_lines

    count = keys.pop("num_processes", 1)
    base = bases[keys.pop("base", "gptq")]
    data = write_lines(out.with_suffix(".jsonl"), RECORDS)
    own = {"gradient_accumulation_steps": 2, "device": "cpu", "zo": _SPSA, "data": str(data)}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(_recipe({**own, **keys}, base, out)))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(ranks if count > 1 else []), "-m", "qzo", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums in the same order everywhere
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return _numbers(out)


def _numbers(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    tensors = load_file(out / "adapter_model.safetensors")
    digest = sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "losses": [line["losses"] for line in lines if "losses" in line],
        "fingerprints": [line["fingerprint"] for line in lines if "fingerprint" in line],
        "adapter": digest.hexdigest(),
    }


def arithmetic() -> str:
    """Return a digest of how this machine rounds: products, exponentials and sums of torch."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(96, 96, generator=generator) for _ in range(2))
    results = [a @ b, (a @ b / 8).exp().sum(0), a[:3] @ b, torch.softmax(a, -1), a.abs().rsqrt()]
    digest = sha256()
    for result in results:
        digest.update(result.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Measure all runs and write the file."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases = write_bases(folder)
        runs = {}
        for number, name in enumerate([*CASES, *COMMANDS]):
            runs[name] = measure(name, bases, folder / f"run{number}")
            sys.stderr.write(f"{name}\n")
    lines = [f"    {json.dumps(name)}: {json.dumps(runs[name])}" for name in runs]
    body = ",\n".join(lines)
    FILE.write_text(f'{{\n  "arithmetic": "{arithmetic()}",\n  "runs": {{\n{body}\n  }}\n}}\n')


if __name__ == "__main__":
    main()

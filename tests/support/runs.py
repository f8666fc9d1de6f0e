"""Runs on a tiny checkpoint: its tokenizer, its data, its recipes, and its dense equal."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import qzo
from qzo.data.tokenize import Candidate, EncodedExample
from qzo.run.recipe.keys import Recipe
from qzo.run.trainer import Trainer
from support.gptq_files import GPTQVariant, read_layer, write_gptq
from support.models import block_linears, tiny_model

VARIANT = GPTQVariant(sym=False)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz .:?!\n',-0123456789"
_WORDS = ("a dull", "a fine", "a slow", "a warm", "an odd", "a wise", "one grim", "some fun")

RECORDS: list[dict[str, Any]] = [
    {
        "prompt": f"{word} film. it was",
        "completion": (" bad", " great")[i % 2],
        "candidates": [" bad", " great"],
    }
    for i, word in enumerate(_WORDS)
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": f"say {i}:", "completion": f" {'abcdefgh'[i]}{'b' * (i % 3)}"} for i in range(8)
]

ESTIMATORS: dict[str, dict[str, Any]] = {
    "row": {"estimator": "per_example", "coordinates": "row"},
    "column": {"estimator": "per_example", "coordinates": "column"},
    "rank_one": {"estimator": "per_example", "coordinates": "rank_one"},
    "relative": {"estimator": "spsa", "coordinates": "relative", "num_directions": 2},
    "absolute": {
        **{"estimator": "spsa", "coordinates": "absolute", "direction": "gaussian"},
        **{"epsilon": 1e-3, "max_loss_difference": 0.01},
    },
    "momentum": {"optimizer": "momentum", "momentum": 0.5},
    "adam": {"optimizer": "adam", "adam_beta1": 0.5},
    "lozo_momentum": {
        **{"estimator": "spsa", "coordinates": "relative", "direction": "lozo", "basis_steps": 4},
        **{"optimizer": "lozo_momentum", "momentum": 0.5},
    },
    "meazo": {"optimizer": "meazo", "layer_scaling": "param_norm"},
    "hizoo": {
        **{"estimator": "spsa", "optimizer": "hizoo", "hizoo_alpha": 0.3, "num_directions": 2},
        **{"layer_scaling": "grad_norm", "layer_scaling_rule": "expectation"},
    },
    "conmezo": {
        **{"estimator": "spsa", "optimizer": "conmezo", "conmezo_beta": 0.5, "conmezo_angle": 1.2},
        **{"stretch": {"o_proj": 0.5, "v_proj": 1.5}},
    },
    "conservative": {"estimator": "spsa", "optimizer": "conservative"},
    "sign": {"optimizer": "sign", "num_directions": 2},
}
"""A ``zo`` block for every kind of coordinates, and for every optimizer."""

MORE_ESTIMATORS: dict[str, dict[str, Any]] = {
    "one_sided": {"estimator": "one_sided", "num_directions": 2},
    "fzoo": {"estimator": "fzoo", "num_directions": 2, "max_loss_difference": 0.01},
    "rloo": {"estimator": "rloo", "num_directions": 2, "coordinates": "relative"},
    "pairs": {"num_directions": 2, "examples_per_direction": 2},
    "leave_one_out": {"num_directions": 2, "sides": "leave_one_out", "basis_steps": 2},
    "forward_gradient": {"estimator": "forward_gradient", "num_directions": 2},
    "spsa_1_5": {"estimator": "spsa_1_5", "optimizer": "momentum", "num_directions": 2},
}
"""A ``zo`` block for every other estimator that a recipe can name."""


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer with one token per character and a beginning-of-text token."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *_ALPHABET]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_checkpoint(
    folder: Path, *, variant: GPTQVariant = VARIANT, gain: float = 1.0, num_layers: int = 1
) -> Path:
    """Write a GPTQ checkpoint with a tokenizer.

    Args:
        folder: A new folder.
        variant: What it is like.
        gain: Factor of the output head, and so of every loss difference.
        num_layers: Decoder blocks.
    """
    model = tiny_model(num_layers=num_layers)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(gain)
    write_gptq(folder, model, variant)
    write_tokenizer(folder)
    return folder


def dense_equal(
    base: Path,
    scales: Mapping[str, Tensor] | None = None,
    *,
    variant: GPTQVariant = VARIANT,
) -> PreTrainedModel:
    """Return transformers' own float32 model of a checkpoint, its weights computed one by one.

    Args:
        base: Written by ``tiny_checkpoint``.
        scales: Of every layer, ``(groups, out)``; those of the file unless given.
        variant: What the checkpoint is like.
    """
    tensors = load_file(base / "model.safetensors")
    model = tiny_model(
        num_layers=json.loads((base / "config.json").read_text())["num_hidden_layers"]
    )
    layers = block_linears(model)
    state = {key: tensor.float() for key, tensor in tensors.items() if _layer_of(key) not in layers}
    for name, linear in layers.items():
        stored = layer_tensors(tensors, name)
        if scales is not None:
            stored["scales"] = scales[name]
        linear.weight = nn.Parameter(read_layer(stored, variant), requires_grad=False)
        state[f"{name}.weight"] = linear.weight
    model.load_state_dict(state)
    return model


def layer_tensors(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Return the stored tensors of a layer by role."""
    roles = ("qweight", "qzeros", "scales", "g_idx")
    return {role: tensors[f"{layer}.{role}"] for role in roles}


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def dense_candidate_scores(model: nn.Module, example: EncodedExample) -> list[float]:
    """Return the mean log-probability per token of every candidate, row by row, unpadded."""
    return [_candidate_score(model, example, candidate) for candidate in example.candidates]


def _candidate_score(model: nn.Module, example: EncodedExample, candidate: Candidate) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([example.rows[candidate.row]])).logits[0]
    log_probabilities = logits.double().log_softmax(-1)
    pairs = zip(candidate.positions, candidate.targets, strict=True)
    values = [float(log_probabilities[position, target]) for position, target in pairs]
    return sum(values) / len(values)


def tiny_recipe(base: Path, out: Path, **keys: Any) -> Recipe:
    """Return a recipe of a few steps; ``keys`` replace its values.

    A ``zo`` block is put over no preset, so that it trains all layers unless it says which.
    """
    values = {
        **{"model": str(base), "output_dir": str(out), "data": "given to the trainer"},
        **{"max_steps": 6, "per_device_train_batch_size": 3, "logging_steps": 2, "max_length": 40},
    }
    keys = {"load_best_model_at_end": True, **keys}
    if "preset" not in keys:
        keys = {"learning_rate": 1e-2, **keys}  # moves every kind of scale
    if "zo" in keys:
        keys = {"preset": "none", **keys}
    return qzo.recipe({**values, **keys})


def tiny_trainer(
    base: Path,
    out: Path,
    *,
    train: Sequence[Any] = RECORDS,
    evaluation: Sequence[Any] | None = None,
    callbacks: Sequence[Any] = (),
    **keys: Any,
) -> Trainer:
    """Return a trainer over the tiny checkpoint."""
    model = loaded(base, (base / "model.safetensors").stat().st_mtime_ns)
    return Trainer(model, tiny_recipe(base, out, **keys), train, evaluation, callbacks)


@lru_cache(maxsize=1)
def loaded(base: Path, changed_at: int) -> PreTrainedModel:
    """Load a checkpoint once: training starts from its files, whatever was trained before."""
    del changed_at
    return qzo.load(base)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change_tensor(path: Path, role: str) -> str:
    """Change the last element of the first tensor of a role, and return its key."""
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if key.endswith(role))
    tensors[key].view(-1)[-1] += 1
    save_file(tensors, path, {"format": "pt"})
    return key

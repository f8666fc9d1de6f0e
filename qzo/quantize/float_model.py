"""Float models to quantize: a folder of safetensors, a repository on the hub, or a .gguf file.

Only safetensors and gguf are read: pickled files can run code, and so can a repository's own Python
files, which are never loaded. The model comes in the dtype it is stored in, on the CPU. A .gguf
file is dequantized to fp16, so its weights are then rounded a second time; a float original gives
the better result where there is one.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qzo.checkpoint.atomic import read_json
from qzo.checkpoint.checkpoint import quantization_config
from qzo.checkpoint.hub import SIDE_FILES, checked_folder, fetch, is_hub_id
from qzo.checkpoint.hub import copy_side_files as copy_between
from qzo.checkpoint.tensors import TensorFiles
from qzo.errors import CheckpointError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


@dataclass(frozen=True)
class FloatModel:
    """A model to quantize.

    Attributes:
        name: The source as the user gave it.
        config: The content of ``config.json``, without keys that point to a repository's code.
        model: A transformers causal language model in evaluation mode, on the CPU.
        tokenizer: Its tokenizer; None if the source has none.
        folder: Where its other files are; None for a .gguf file.
    """

    name: str
    config: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None


def open_float_model(source: str | Path, revision: str | None = None) -> FloatModel:
    """Load a float model.

    Args:
        source: A folder with ``config.json`` and safetensors, a hub id, or a .gguf file.
        revision: A branch, tag or commit of a repository on the hub.

    Returns:
        The model; it takes as much memory as its stored weights. What cannot be loaded, and what
        is quantized already, is a CheckpointError.
    """
    if str(source).endswith(".gguf"):
        return _from_gguf(checked_folder(Path(source), revision))
    return _from_folder(_float_folder(str(source), revision), str(source))


def copy_side_files(source: FloatModel, target: Path) -> None:
    """Put tokenizer, chat template, generation settings and licence into a folder."""
    if source.folder is None:
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(target)
        if source.model.generation_config is not None:
            source.model.generation_config.save_pretrained(target)
        return
    copy_between(source.folder, target)


def _float_folder(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return checked_folder(folder, revision)
    if not is_hub_id(source):
        raise CheckpointError(f"{source}: expected a folder, a hub id or a .gguf file")
    expected = (
        "expected a folder, a .gguf file, or a repository that can be downloaded from the hub"
    )
    # the small files first: what is quantized already is refused before its weights are fetched
    _refuse_quantized(fetch(source, revision, ["*.json"], expected), source)
    return fetch(source, revision, ["*.json", "*.safetensors", *SIDE_FILES], expected)


def _refuse_quantized(folder: Path, source: str) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    found = quantization_config(folder, config) or config.get("compression_config")
    if found:
        method = found.get("quant_method", "gptq")  # old AutoGPTQ files lack the field
        raise CheckpointError(
            f"{source}: expected a float model, got one quantized with {method} already; train it "
            "as it is, or quantize the float model it was made from"
        )
    return config


def _from_folder(folder: Path, name: str) -> FloatModel:
    config = _refuse_quantized(folder, name)
    _refuse_other_weights(folder, name)
    model = _load_model(name, folder, use_safetensors=True, dtype="auto")
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)
    tokenizer = _load_tokenizer(name, folder) if has_tokenizer else None
    for key in ("auto_map", "_name_or_path"):  # Python files, which are not copied; a path
        config.pop(key, None)
    return FloatModel(name, config, model, tokenizer, folder)


def _refuse_other_weights(folder: Path, name: str) -> None:
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: expected safetensors, found {pickles[0]}; pickled files can run code and are "
            "never read: convert them to safetensors"
        )
    tensors = TensorFiles(folder)
    for key in tensors.files:
        dtype = tensors[key].dtype
        if key.endswith("weight") and dtype not in _FLOATS:
            got = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{key}: expected float16, bfloat16 or float32, got {got}; is {name} quantized "
                "already?"
            )


def _from_gguf(path: Path) -> FloatModel:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a .gguf file, not found")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise CheckpointError(
            f"{path}: expected a single .gguf file, got a part of one; merge the parts with "
            "`llama-gguf-split --merge`"
        )
    options: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = _load_tokenizer(str(path), path.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # before it existed, weights were always dequantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _load_model(str(path), path.parent, dtype=torch.float16, **options)
    config = json.loads(model.config.to_json_string())
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    return FloatModel(str(path), config, model, tokenizer, None)


def _load_model(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **options
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{name}: expected a causal language model that transformers can load: "
            f"{_first_line(error)}"
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name}: expected the weight {missing[0]} in its files, not found (and "
            f"{len(missing) - 1} more)"
        )
    model.eval()
    return model


def _load_tokenizer(name: str, folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{name}: expected a tokenizer that transformers can load: {_first_line(error)}"
        ) from error
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

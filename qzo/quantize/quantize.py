"""From a float model to a 4-bit checkpoint, one decoder block at a time.

Linear layers inside the decoder blocks are quantized; embeddings, norms and the output head are
written as they are. A block's tensors are on disk before the next block is touched, and its memory
is released.

With the method ``gptq`` a block runs over the calibration tokens, which gives the Hessian of every
layer's inputs; its layers are quantized; it runs again, and its outputs, now those of the quantized
block, are the inputs of the next one. Rounding to nearest and bitsandbytes need no calibration.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from quantizers.errors import FormatError
from quantizers.gptq_algorithm import Hessian
from quantizers.group_size import usual_group_size
from qzo.checkpoint.atomic import new_folder, write_json
from qzo.checkpoint.tensors import CheckpointWriter
from qzo.data.vocabulary import check_tokens
from qzo.errors import CheckpointError, DataError
from qzo.model.blocks import find_blocks, linear_layers
from qzo.quantize.calibration import read_calibration_texts, samples_of_model, token_windows
from qzo.quantize.float_model import FloatModel, copy_side_files, open_float_model
from qzo.quantize.layer import check_sizes, quantize_layer
from qzo.quantize.settings import (
    QuantizeSettings,
    bitsandbytes_config,
    gptq_config,
)
from qzo.quantize.visit_blocks import BlockRun, captured_inputs, visit_blocks

Progress = Callable[[int, int, str], None]

_TOKENS_PER_BATCH = 2048
_SCALE_NAMES = {"scales", "weight.absmax"}


def quantize(
    source: str | Path,
    out: Path,
    settings: QuantizeSettings,
    *,
    calibration: Path | Sequence[str] | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Quantize a float model into a new checkpoint folder.

    Args:
        source: A folder of safetensors, a hub id or a .gguf file.
        out: Where to write; must not exist, or be empty. It is complete or absent.
        settings: Format, method and their options.
        calibration: A file of texts, or texts; None draws samples from the model itself.
        progress: Called as ``progress(layers done, all layers, name)`` before each layer.
        revision: A branch, tag or commit of a repository on the hub.

    Returns:
        What was made: format, bits, group size, counts, bytes and seconds. What cannot be read,
        quantized or written is a QZOError or FormatError.
    """
    started = time.perf_counter()
    with new_folder(out) as folder:
        model = open_float_model(source, revision)
        job = _Job(model, settings, folder, progress or _no_progress)
        tokens = _calibration_tokens(model, settings, calibration)
        job.run(tokens)
        copy_side_files(model, folder)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "format": settings.format,
        "method": settings.method if settings.format == "gptq" else "nearest",
        "bits": settings.bits,
        "group_size": job.settings.group_size,
        "num_layers": len(job.linears),
        "num_quantized_weights": sum(linear.weight.numel() for linear in job.linears.values()),
        "num_scales": job.num_scales,
        "num_calibration_tokens": 0 if tokens is None else tokens.numel(),
        "bytes": num_bytes,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }


class _Job:
    """One checkpoint in the making."""

    def __init__(
        self, source: FloatModel, settings: QuantizeSettings, folder: Path, progress: Progress
    ) -> None:
        self._source, self._folder, self._progress = source, folder, progress
        self.prefix, self._blocks = find_blocks(source.model)
        self.linears = {
            f"{self.prefix}.{name}": linear for name, linear in linear_layers(self._blocks).items()
        }
        if settings.group_size is None:
            sizes = [linear.in_features for linear in self.linears.values()]
            group_size = usual_group_size(settings.format, sizes)
            settings = replace(settings, group_size=group_size)
        self.settings = settings
        for layer, linear in self.linears.items():
            check_sizes(settings, layer, linear)
        self._writer = CheckpointWriter(folder)
        self.num_scales = self._num_done = 0

    def run(self, tokens: Int[Tensor, "samples time"] | None) -> None:
        """Write the whole checkpoint but for the side files."""
        self._write_others()
        if tokens is None:
            for index, block in enumerate(self._blocks):
                self._write_block(index, block, {})
                block.to("meta")
        else:
            visit_blocks(
                self._source.model,
                tokens,
                self._calibrate_block,
                device=torch.device(self.settings.device),
                batch_size=max(1, _TOKENS_PER_BATCH // tokens.shape[1]),
            )
        self._writer.close()
        self._write_config()

    def _calibrate_block(self, index: int, block: nn.Module, run: BlockRun) -> None:
        linears = linear_layers(block)
        hessians = {
            name: Hessian(linear.in_features, linear.weight.device)
            for name, linear in linears.items()
        }
        with captured_inputs(linears, lambda name, inputs: hessians[name].add(inputs)):
            run()
        self._write_block(index, block, hessians)
        if index + 1 < len(self._blocks):
            run()  # the quantized block, for the inputs of the next one

    def _write_block(self, index: int, block: nn.Module, hessians: Mapping[str, Hessian]) -> None:
        linears = linear_layers(block)
        for name, linear in linears.items():
            layer = f"{self.prefix}.{index}.{name}"
            self._progress(self._num_done, len(self.linears), layer)
            hessian = hessians[name].matrix if name in hessians else None
            self._write_layer(layer, linear, hessian)
            self._num_done += 1
        quantized = {f"{name}.weight" for name in linears}
        for name, tensor in block.state_dict().items():
            if name not in quantized:
                self._write_float(f"{self.prefix}.{index}.{name}", tensor)

    def _write_layer(self, layer: str, linear: nn.Linear, hessian: Tensor | None) -> None:
        try:
            tensors, dense = quantize_layer(linear.weight.data, self.settings, hessian)
        except FormatError as error:
            raise FormatError(f"{layer}: {error}") from error
        for name, tensor in tensors.items():
            self._writer.add(f"{layer}.{name}", tensor)
        self.num_scales += sum(
            tensor.numel() for name, tensor in tensors.items() if name in _SCALE_NAMES
        )
        if dense is not None:
            linear.weight.data = dense.to(linear.weight.dtype)

    def _write_others(self) -> None:
        written: set[tuple[int, torch.Size]] = set()
        for name, tensor in self._source.model.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape)
            if name.startswith(f"{self.prefix}.") or place in written:  # tied: stored once
                continue
            written.add(place)
            self._write_float(name, tensor)

    def _write_float(self, name: str, tensor: Tensor) -> None:
        if self.settings.format == "gptq" and tensor.is_floating_point():
            stored = tensor.to(torch.float16)
            if not torch.isfinite(stored).all():
                raise CheckpointError(
                    f"{name}: expected finite values up to 65504 for a GPTQ checkpoint, which "
                    "stores fp16, got a larger one; use --format nf4, which keeps the dtype"
                )
            tensor = stored
        self._writer.add(name, tensor)

    def _write_config(self) -> None:
        config = dict(self._source.config)
        if self.settings.format == "gptq":
            config["quantization_config"] = gptq_config(self.settings)
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float16"
            write_json(self._folder / "quantize_config.json", config["quantization_config"])
        else:
            model = self._source.model
            others = [name for name in linear_layers(model) if name not in self.linears]
            config["quantization_config"] = bitsandbytes_config(self.settings, model.dtype, others)
        write_json(self._folder / "config.json", config)


def _calibration_tokens(
    source: FloatModel, settings: QuantizeSettings, calibration: Path | Sequence[str] | None
) -> Int[Tensor, "samples time"] | None:
    if not settings.needs_calibration:
        return None
    config = source.model.config.get_text_config()
    seq_len = min(settings.seq_len, getattr(config, "max_position_embeddings", settings.seq_len))
    num_samples = settings.num_samples
    if calibration is None:
        return samples_of_model(
            source.model, num_samples=num_samples, seq_len=seq_len, seed=settings.seed
        )
    if source.tokenizer is None:
        raise DataError(
            f"{source.name}: expected a tokenizer to read the calibration text with, found none; "
            "leave out --calibration to calibrate on samples of the model itself"
        )
    if isinstance(calibration, Path):
        calibration = read_calibration_texts(calibration)
    tokenizer = source.tokenizer
    windows = token_windows(calibration, tokenizer, num_samples=num_samples, seq_len=seq_len)
    check_tokens(windows.flatten().tolist(), config.vocab_size, tokenizer, "calibration")
    return windows


def _no_progress(_done: int, _total: int, _layer: str) -> None:
    """Report nothing."""

"""What a checkpoint is, in numbers."""

from dataclasses import dataclass
from pathlib import Path

from qzo.checkpoint.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Inspection:
    """A readable checkpoint.

    Attributes:
        folder: Where it is.
        commit: Of its repository on the hub; None for a folder.
        model_type: Architecture.
        format: ``gptq`` or ``bitsandbytes``.
        details: What its quantization config says, as read.
        group_size: Inputs that share a scale.
        num_layers: Quantized layers.
        num_weights: Their weights.
        num_scales: Their scales.
        num_rows: Their output rows: what row coordinates train.
        scale_dtype: Dtype of the scales in memory; double quantization is un-nested.
        bytes: Size of the safetensors files.
    """

    folder: str
    commit: str | None
    model_type: str
    format: str
    details: str
    group_size: int
    num_layers: int
    num_weights: int
    num_scales: int
    num_rows: int
    scale_dtype: str
    bytes: int


def inspect(source: str | Path, revision: str | None = None) -> Inspection:
    """Read every quantized layer of a checkpoint and count.

    Args:
        source: A folder, or the id of a repository on the hub.
        revision: A branch, tag or commit of the repository.
    """
    checkpoint = open_checkpoint(source, revision)
    weights = [checkpoint.weight(layer) for layer in checkpoint.layers]
    files = set(checkpoint.tensors.files.values())
    return Inspection(
        folder=str(checkpoint.folder),
        commit=checkpoint.origin.commit,
        model_type=str(checkpoint.config.get("model_type")),
        format=checkpoint.format.QUANT_METHOD,
        details=str(checkpoint.spec),
        group_size=checkpoint.group_size,
        num_layers=len(weights),
        num_weights=sum(w.out_features * w.in_features for w in weights),
        num_scales=sum(w.scales.numel() for w in weights),
        num_rows=sum(w.out_features for w in weights),
        scale_dtype=str(weights[0].scales.dtype).removeprefix("torch."),
        bytes=sum((checkpoint.folder / name).stat().st_size for name in files),
    )

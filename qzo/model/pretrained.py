"""What transformers users do with a model: save it, copy it, ask for its size.

``save_pretrained`` writes the 4-bit checkpoint with the scales as training left them: codes as they
lie in the file, scales as ``qzo export`` rounds them, everything else in the dtype of the base.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qzo.checkpoint.atomic import read_json, write_json
from qzo.checkpoint.checkpoint import Checkpoint, dtype_name
from qzo.errors import CheckpointError, ConfigError
from qzo.model.lazy_layers import MappedEmbedding, MappedLinear
from qzo.model.linear import Live, QuantLinear

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object  # a class of a model stands behind it


class FourBitModel(_Base):
    """Methods that a transformers model with quantized layers of QZO has in addition."""

    def save_pretrained(  # type: ignore[override]  # the rest is handed on
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the 4-bit checkpoint with the scales as they stand, as transformers writes models.

        Args:
            save_directory: A folder other than that of the base, whose files are in use.
            is_main_process: See transformers.
            state_dict: None; the tensors are those of the model.
            push_to_hub: False; call ``push_to_hub`` instead.
            options: See transformers.

        An argument that cannot be used, and an adapter that is no part of a checkpoint, is a
        ConfigError.
        """
        _check_arguments(state_dict, push_to_hub)
        _check_folder(self, Path(save_directory))
        _check_folds(_live(self))
        dtype, tensors = self.config.dtype, file_tensors(self)
        options.setdefault("save_original_format", False)  # keys are those of the files
        try:
            super().save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=tensors, **options
            )
        finally:
            self.config.dtype = dtype  # transformers wrote the dtype of the computation there
        if is_main_process:
            _rewrite_config(self, Path(save_directory) / "config.json")

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return what the model computes with: codes and scales in the layout of the files.

        The codes are the memory-mapped tensors. Keys are the names of the modules.
        """
        state = super().state_dict(*args, **options)
        prefix, trained = options.get("prefix", ""), _trained_tensors(self)
        for name in list(state) if trained else ():
            key = stored_key(self, name.removeprefix(prefix))
            state[name] = trained.get(key, state[name])
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over tensors and scales; the codes have to be those of the model.

        Raises:
            ConfigError: A tensor differs that an adapter puts in the place of the model's.
        """
        state, own, replaced = dict(state_dict), super().state_dict(), _live(self).replaced
        for name in state.keys() & own.keys() if replaced else ():
            tensor = replaced.get(stored_key(self, name))
            if tensor is None:
                continue
            if not torch.equal(state[name].to(tensor), tensor):
                raise ConfigError(
                    f"load_state_dict: another {name} cannot be combined with an adapter that "
                    "replaces this tensor: it would not be seen; load the checkpoint again"
                )
            state[name] = own[name]
        return super().load_state_dict(state, strict=strict, assign=assign)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of weights, each 4-bit code counted as one."""
        if only_trainable:
            return int(super().num_parameters(only_trainable, exclude_embeddings))
        kinds, layers = (MappedEmbedding, MappedLinear), quantized_layers(self)
        tensors = [*self.parameters(), *(p.weight for p in self.modules() if isinstance(p, kinds))]
        tensors += [layer.bias for layer in layers if layer.bias is not None]
        numbers = {id(tensor): tensor.numel() for tensor in tensors}  # tied ones once
        if exclude_embeddings:
            for part in self.modules():
                numbers.pop(id(part.weight) if isinstance(part, nn.Embedding) else 0, None)
        codes = sum(layer.in_features * layer.out_features for layer in layers)
        return codes + sum(numbers.values())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all tensors of the model, those in mapped files included."""
        stored = [layer.stored.num_bytes for layer in quantized_layers(self) if layer.stored]
        rest: int = super().get_memory_footprint(return_buffers)  # type: ignore[no-untyped-call]
        return sum(stored) + rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        live = _live(self)
        if any(live.hooks.values()) or live.master or getattr(self, "qzo_budget", None):
            raise ConfigError(
                "copy.deepcopy cannot be combined with a model that is in training, streams its "
                "blocks, or has an adapter of norms, biases, LoRA or a prefix: its hooks belong to "
                "one model; load the checkpoint again"
            )
        shared = [getattr(self, "qzo_checkpoint", None)]
        for layer in quantized_layers(self):
            shared += [layer.quantized, layer.stored]  # they never change
        memo |= {id(value): value for value in shared if value is not None}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "pickle, and torch.save of a whole model, cannot be combined with codes in mapped "
            "files; use model.save_pretrained(folder), or torch.save(model.state_dict(), file)"
        )


def as_four_bit(model: PreTrainedModel) -> None:
    """Give a model the methods of ``FourBitModel``; it stays an instance of its class."""
    if not isinstance(model, FourBitModel):
        kind: Any = type(model)
        model.__class__ = _with_methods(kind)


@lru_cache
def _with_methods(kind: Any) -> type[PreTrainedModel]:
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return cast(type[PreTrainedModel], type(kind.__name__, (FourBitModel, kind), names))


def quantized_layers(model: nn.Module) -> list[QuantLinear]:
    """Return the quantized layers of a model as its modules lie."""
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def stored_key(model: PreTrainedModel, name: str) -> str:
    """Return the key in the files of a tensor of the model; older files leave out the prefix."""
    checkpoint = getattr(model, "qzo_checkpoint", None)
    if checkpoint is None or name in checkpoint.tensors.files:
        return name
    return name.removeprefix(f"{model.base_model_prefix}.")


def quantization_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the quantization config of a model.

    Raises:
        CheckpointError: It has none.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        raise CheckpointError("model: expected a quantization_config in its config, found none")
    values: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return {key: value for key, value in values.items() if key != "backend"}  # of this load only


def file_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with the scales of a model as they stand, by key."""
    checkpoint: Checkpoint | None = getattr(model, "qzo_checkpoint", None)
    state, quantized = dict(_unquantized(model)), dict(_quantized(model))
    if checkpoint is None:
        return {**state, **quantized}
    files = checkpoint.tensors
    of_layers = {
        key for layer in checkpoint.layers for key in checkpoint.layer_keys(layer).values()
    }
    tensors = {}
    for key in files.files:
        if key in quantized:
            tensors[key] = quantized[key]
        elif key not in of_layers:  # those of nested scales are gone when the scales have changed
            tensors[key] = _as_stored(state[key], files[key]) if key in state else files[key]
    known = {state[key].data_ptr() for key in state.keys() & tensors.keys()}
    added = {key: tensor for key, tensor in state.items() if tensor.data_ptr() not in known}
    return {**added, **tensors}


def _as_stored(tensor: Tensor, stored: Tensor) -> Tensor:
    """Return a tensor of the model in the dtype of the file, the one of the file if it is equal."""
    if tensor.dtype == stored.dtype:
        return tensor
    is_same = tensor.shape == stored.shape and torch.equal(stored.to(tensor.dtype), tensor.cpu())
    return stored if is_same else tensor.to(stored.dtype)


def _quantized(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the quantized layers by key; nested scales all or none."""
    layers = quantized_layers(model)
    standing = [layer.standing_scales() for layer in layers]
    is_changed = any(scales is not None for scales in standing)
    for layer, scales in zip(layers, standing, strict=True):
        assert layer.stored is not None
        unnested = layer.quantized.scales if is_changed and scales is None else scales
        for key, tensor in layer.stored.with_scales(unnested).items():
            yield f"{layer.name}.{key}", tensor


def _unquantized(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield all other tensors by key."""
    layers = {f"{name}.": m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, tensor in model.state_dict().items():
        layer = next((layers[prefix] for prefix in layers if name.startswith(prefix)), None)
        if layer is None:
            yield stored_key(model, name), tensor
        elif name.endswith(".bias"):
            yield f"{layer.name}.bias", tensor


def _trained_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return the unquantized tensors that training changed, by key, in the dtype of the file."""
    live = _live(model)
    if live.master is None:
        return live.replaced
    checkpoint: Checkpoint = model.qzo_checkpoint  # type: ignore[assignment]  # a trainer set it
    return live.master.unquantized(lambda section: checkpoint.tensors[section.name])


def _live(model: nn.Module) -> Live:
    return quantized_layers(model)[0].live


def _check_arguments(state_dict: object, push_to_hub: bool) -> None:
    """Refuse what is done in another way.

    Raises:
        ConfigError: It is.
    """
    if state_dict is not None:
        raise ConfigError(
            "state_dict cannot be combined with a 4-bit model: save_pretrained writes the tensors "
            "of the model in the dtypes of its base; leave state_dict out"
        )
    if push_to_hub:
        raise ConfigError(
            "push_to_hub cannot be combined with save_pretrained of a 4-bit model: its config is "
            "completed after transformers wrote it; call model.push_to_hub(repo_id)"
        )


def _check_folder(model: PreTrainedModel, folder: Path) -> None:
    """Refuse to write over the files that the codes are mapped from.

    Raises:
        ConfigError: It is the folder of the base.
    """
    checkpoint: Checkpoint | None = getattr(model, "qzo_checkpoint", None)
    bases = [Path(model.config.name_or_path)] if model.config.name_or_path else []
    bases += [] if checkpoint is None else [checkpoint.folder]
    if folder.exists() and any(base.exists() and base.samefile(folder) for base in bases):
        raise ConfigError(
            f"save_directory: expected another folder than {folder}, whose files hold the codes of "
            "this model; choose a new one"
        )


def _check_folds(live: Live) -> None:
    """Refuse what is no part of a checkpoint.

    Raises:
        ConfigError: The model has LoRA factors or a prefix.
    """
    what = (live.master and live.master.instead_of_scales) or live.unfoldable
    if what:
        raise ConfigError(
            f"save_pretrained cannot be combined with {what}: a 4-bit checkpoint has no place for "
            "them; use the adapter in output_dir, or save the model before an adapter is applied"
        )


def _rewrite_config(model: PreTrainedModel, path: Path) -> None:
    """Put the quantization and the dtype of the files into a config that transformers wrote."""
    layers = quantized_layers(model)
    quantization = quantization_of(model)
    if any(layer.standing_scales() is not None for layer in layers):
        stored = layers[0].stored
        assert stored is not None
        quantization = stored.format.export_config(quantization)
    checkpoint: Checkpoint | None = getattr(model, "qzo_checkpoint", None)
    of_files = {} if checkpoint is None else {"dtype": dtype_name(checkpoint.config)}
    write_json(path, {**read_json(path), **of_files, "quantization_config": quantization})

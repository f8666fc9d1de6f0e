"""Compute in fp32, in part or whole, with a model that is stored in 16 bits.

CPUs multiply fp16 and bf16 matrices many times slower than fp32 ones. Here every module computes on
an fp32 copy of its own parameters, made when it is called and dropped when it returns; so memory
grows by one module, and the model is unchanged afterwards.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def computing_in_fp32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules compute in fp32 inside the ``with`` block, each with its own parameters."""
    stored: dict[nn.Parameter, Tensor] = {}
    handles = []
    for module in modules:
        parameters = [p for p in module.parameters(recurse=False) if p.dtype in _HALVES]
        if not parameters:
            continue
        if isinstance(module, nn.Embedding):  # looks rows up: only these need to be fp32
            handles.append(module.register_forward_hook(lambda _m, _args, rows: _fp32(rows)))
            continue
        handles.append(
            module.register_forward_pre_hook(_widen(parameters, stored), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(_restore(parameters, stored)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, tensor in stored.items():  # of modules that an exception left
            parameter.data = tensor


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Let products of 16-bit matrices on CUDA be summed in fp32 alone inside the ``with`` block.

    Unless told otherwise, torch lets cuBLAS round partial sums to 16 bits.
    """
    settings = torch.backends.cuda.matmul
    before = (
        settings.allow_fp16_reduced_precision_reduction,
        settings.allow_bf16_reduced_precision_reduction,
    )
    settings.allow_fp16_reduced_precision_reduction = False
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction = before[0]
        settings.allow_bf16_reduced_precision_reduction = before[1]


def _widen(parameters: list[nn.Parameter], stored: dict[nn.Parameter, Tensor]) -> Any:
    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        for parameter in parameters:
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()
        return _fp32(args), _fp32(kwargs)

    return before


def _restore(parameters: list[nn.Parameter], stored: dict[nn.Parameter, Tensor]) -> Any:
    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        for parameter in parameters:
            parameter.data = stored.pop(parameter)

    return after


def _fp32(tree: Any) -> Any:
    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value

    return tree_map(widen, tree)

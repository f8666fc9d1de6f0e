"""``qzo bench kernels``: one 4-bit linear layer against a dense product over as many tokens.

================ ==============================================================================
``dense``        the dense weights and cuBLAS: what the ratios refer to
``probes``       a GPTQ layer as a step computes it: the tokens of all probes, a multiplier for
                 each probe and output row
``plain``        the same layer, without multipliers
``scales``       the same layer with scales of its own for each probe
``fused``        our Triton kernel without a dense tile, whatever the number of tokens
``tiles``        our dense tiles and cuBLAS, whatever the number of tokens
``nf4``          an NF4 layer with multipliers
``bitsandbytes`` bitsandbytes' Linear4bit (NF4)
``humming``      humming-kernels, int4
``gemlite``      GemLite, int4
================ ==============================================================================

Weights are random. ``error`` is the relative distance to the same product in float32 from the dense
weights; bitsandbytes and humming quantize these anew, and theirs is that of the quantization.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantizers.gptq import GPTQWeight
from quantizers.weight import QuantizedWeight, dequantize
from qzo.bench.baselines import linear4bit
from qzo.bench.device_clock import call_seconds, num_copies
from qzo.bench.machine import hardware, versions
from qzo.bench.synthetic import random_weight
from qzo.errors import ConfigError
from qzo.model.linear import Live, Multipliers, ProbeScales, QuantLinear

Layer = Callable[[Tensor], Tensor]
Progress = Callable[[str], None]

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES = ((4096, 4096), (13824, 5120))  # outputs, inputs; of Llama-2-7B and 13B
REFERENCE = "dense"
_SPREAD = 1e-2  # of the multipliers
_SEE_PROBES = ("probes", "scales", "nf4")


@dataclass(frozen=True)
class KernelSettings:
    """What to measure.

    Attributes:
        shapes: Outputs and inputs of each layer.
        tokens: Of all probes together.
        contenders: Some of ``CONTENDERS``; the dense product is always measured.
        probes: Places where the loss is evaluated; the tokens are split among them.
        group_size: Inputs that share a scale.
        repeats: Rounds.
        dtype: Of the inputs and the dense weights.
        device: ``cpu`` or ``cuda``.
    """

    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    contenders: tuple[str, ...] | None = None
    probes: int = 2
    group_size: int = 128
    repeats: int = 10
    dtype: str = "float16"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in self.contenders or ():
            if name not in CONTENDERS:
                raise ConfigError(
                    f"contenders: expected some of {', '.join(CONTENDERS)}, got {name!r}"
                )
        if min(self.tokens) < self.probes:
            raise ConfigError(
                f"tokens: expected at least one for each of {self.probes} probes, got "
                f"{min(self.tokens)}"
            )


class Source:
    """The weights of one layer, for all contenders.

    Attributes:
        device: Where they are wanted.
        dtype: Of the inputs.
        probes: How many share the tokens.
        group_size: Inputs that share a scale.
        repeats: Rounds of a measurement.
    """

    def __init__(self, out_features: int, in_features: int, settings: KernelSettings) -> None:
        self._sizes = out_features, in_features
        self.group_size, self.probes = settings.group_size, settings.probes
        self.repeats = settings.repeats
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)

    @cached_property
    def gptq(self) -> QuantizedWeight:
        """GPTQ codes on the CPU; every ``to`` of a GPU is another copy."""
        return random_weight("gptq", *self._sizes, group_size=self.group_size)

    @cached_property
    def nf4(self) -> QuantizedWeight:
        """NF4 codes on the CPU."""
        return random_weight("nf4", *self._sizes)

    @cached_property
    def matrix(self) -> Float[Tensor, "out in"]:
        """The GPTQ weights, dense, in the dtype and on the device of the inputs."""
        return dequantize(self.gptq.to(self.device)).to(self.dtype)

    @cached_property
    def factors(self) -> Float[Tensor, "probes out"]:
        """Multipliers near 1."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.probes, self._sizes[0], generator=generator)
        return (1 + _SPREAD * noise).to(self.device)

    def bounds(self, num_tokens: int) -> tuple[int, ...]:
        """Return where the tokens of each probe begin, and the end."""
        return tuple(num_tokens * p // self.probes for p in range(self.probes + 1))

    def product(self, x: Float[Tensor, "tokens in"], contender: str) -> Float[Tensor, "tokens out"]:
        """Return what a contender should compute, from dense weights in float32."""
        weight = self.nf4 if contender == "nf4" else self.gptq
        y = x.float() @ dequantize(weight.to(self.device)).T
        if contender in _SEE_PROBES:
            for factors, (start, stop) in zip(
                self.factors, pairwise(self.bounds(len(x))), strict=True
            ):
                y[start:stop] *= factors
        return y


def _dense(source: Source) -> Layer:
    weight = source.matrix.clone()
    return lambda x: nn.functional.linear(x, weight)


def _probes(source: Source) -> Layer:
    return _quant_linear(source, source.gptq, Multipliers(rows=source.factors))


def _plain(source: Source) -> Layer:
    return _quant_linear(source, source.gptq, None)


def _scales(source: Source) -> Layer:
    scales = source.gptq.scales.float().to(source.device)
    return _quant_linear(
        source, source.gptq, ProbeScales([scales * row[:, None] for row in source.factors])
    )


def _nf4(source: Source) -> Layer:
    return _quant_linear(source, source.nf4, Multipliers(rows=source.factors))


def _quant_linear(
    source: Source, weight: QuantizedWeight, effective: Multipliers | ProbeScales | None
) -> Layer:
    live = Live() if effective is None else Live(effective=lambda _: effective)
    layer = QuantLinear("layer", weight, None, live)
    layer.to(source.device)
    layer.index = 0

    def forward(x: Tensor) -> Tensor:
        live.bounds = source.bounds(len(x))
        result: Tensor = layer(x)
        return result

    return forward


def _fused(source: Source) -> Layer:
    return _triton(source, "fused_product")


def _tiles(source: Source) -> Layer:
    return _triton(source, "dense_product")


def _triton(source: Source, name: str) -> Layer:
    product = getattr(import_module("qzo.model.kernels.triton_product"), name)
    weight = source.gptq.to(source.device)
    assert isinstance(weight, GPTQWeight)
    scales = [weight.scales]
    return lambda x: product(weight, x, (0, len(x)), scales)


def _bitsandbytes(source: Source) -> Layer:
    return linear4bit(_linear(source))


def _linear(source: Source) -> nn.Linear:
    out_features, in_features = source.matrix.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=source.dtype)
    linear.weight = nn.Parameter(source.matrix.clone(), requires_grad=False)
    return linear


def _humming(source: Source) -> Layer:
    module = import_module("humming.layer")
    out_features, in_features = source.matrix.shape
    layer = module.HummingLayer(
        shape_n=out_features,
        shape_k=in_features,
        weight_config={"dtype": "int4", "group_size": source.group_size},
        torch_dtype=source.dtype,
    ).to(source.device)
    layer.load_from_unquantized(source.matrix)
    layer.transform()
    return layer  # type: ignore[no-any-return]


def _gemlite(source: Source) -> Layer:
    helper = import_module("gemlite.helper")
    weight = source.gptq.to(source.device)
    assert isinstance(weight, GPTQWeight)
    assert isinstance(weight.zeros, int)
    groups = weight.scales.shape[1]
    ones = torch.ones_like(weight.scales, dtype=torch.float32)
    rows, size = slice(0, weight.out_features), weight.out_features * weight.in_features
    decoded = weight.decode(rows, torch.empty(size, device=source.device))
    codes = (decoded + weight.zeros).to(torch.uint8).contiguous()
    gemlite: Layer = helper.A16Wn(device=str(source.device), dtype=source.dtype).from_weights(
        codes,
        scales=weight.scales.to(source.dtype).reshape(-1, 1).contiguous(),
        zeros=(ones * weight.zeros).to(source.dtype).reshape(-1, 1).contiguous(),
        W_nbits=weight.bits,
        group_size=weight.in_features // groups,
    )
    return gemlite


CONTENDERS: dict[str, Callable[[Source], Layer]] = {
    "probes": _probes,
    "plain": _plain,
    "scales": _scales,
    "fused": _fused,
    "tiles": _tiles,
    "nf4": _nf4,
    "bitsandbytes": _bitsandbytes,
    "humming": _humming,
    "gemlite": _gemlite,
}
OTHERS = {"humming": "humming", "gemlite": "gemlite"}
"""Contenders that need a package which qzo does not."""


def bench_kernels(
    settings: KernelSettings,
    progress: Progress = lambda _: None,
    note: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure all layers at all numbers of tokens.

    Args:
        settings: What to measure.
        progress: Told what is measured next.
        note: Told the result so far after every contender.

    Returns:
        ``shapes``: by ``OUTxIN``, number of tokens and contender the seconds of a call, their
        ``lowest`` and ``highest``, ``eager`` seconds, ``vs_dense`` (the dense product's time over
        the contender's) and ``error``; a contender that cannot run has ``failed``, with the reason.
        ``settings``, ``hardware`` and ``versions``.
    """
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    device = torch.device(settings.device)
    result: dict[str, Any] = {
        "settings": asdict(settings),
        "shapes": shapes,
        "hardware": hardware(device),
        "versions": versions(),
    }
    for out_features, in_features in settings.shapes:
        name = f"{out_features}x{in_features}"
        shapes[name] = {str(count): {} for count in settings.tokens}
        source = Source(out_features, in_features, settings)
        for contender in (REFERENCE, *(settings.contenders or CONTENDERS)):
            progress(f"{name}, {contender}")
            found = _measure(source, contender, settings)
            for count, entry in found.items():
                shapes[name][count][contender] = entry
                reference = shapes[name][count][REFERENCE].get("seconds")
                if reference and "seconds" in entry:
                    entry["vs_dense"] = reference / entry["seconds"]
            note(result)
    return result


def _measure(source: Source, name: str, settings: KernelSettings) -> dict[str, dict[str, Any]]:
    """Time one contender at all numbers of tokens."""
    try:
        layers = _copies(source, name)
    except Exception as error:  # packages of others; the reason is shown
        return {str(count): _failure(error) for count in settings.tokens}
    found = {}
    for count in settings.tokens:
        try:
            found[str(count)] = _entry(source, name, layers, count)
        except Exception as error:  # as above
            found[str(count)] = _failure(error)
    return found


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, ModuleNotFoundError):
        return {"failed": f"{error.name} is not installed"}
    lines = str(error).strip().splitlines() or [""]
    return {"failed": f"{type(error).__name__}: {lines[0]}"[:200]}


def _copies(source: Source, name: str) -> Sequence[Layer]:
    make = _dense if name == REFERENCE else CONTENDERS[name]
    half_byte = source.matrix.numel() // 2
    num_bytes = source.matrix.nbytes if name == REFERENCE else half_byte
    with torch.inference_mode():
        return [make(source) for _ in range(num_copies(num_bytes, source.device))]


def _entry(source: Source, name: str, layers: Sequence[Layer], num_tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, source.matrix.shape[1], generator=generator)
    x = x.to(source.device, source.dtype)
    with torch.inference_mode():
        want = source.product(x, name)
        error = float((layers[0](x).float() - want).norm() / want.norm())
        del want
        calls = [partial(layer, x) for layer in layers]
        seconds = call_seconds(calls, source.repeats, source.device)
    return {
        "seconds": seconds.median,
        "lowest": seconds.lowest,
        "highest": seconds.highest,
        "eager": seconds.eager,
        "is_graph": seconds.is_graph,
        "error": error,
    }

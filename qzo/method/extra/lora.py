"""LoRA on frozen 4-bit layers: ``y + (alpha / rank) (x A^T) B^T``.

The factors lie in the trained vector; every probe has its own. Source: LoRA, arXiv 2106.09685,
eq. 3; by zeroth order: MeZO, arXiv 2305.17333. Files and names are those of PEFT.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qzo.errors import CheckpointError
from qzo.method.extra.section import Section
from qzo.method.probes import start_seed
from qzo.model.kernels.uploads import Resident
from qzo.model.linear import Live, QuantLinear, token_bounds

_PREFIX = "base_model.model."  # what PEFT puts in front of names
_FACTOR_A = ".lora_A.weight"


def low_rank_sections(
    model: nn.Module, layers: Sequence[QuantLinear], rank: int, alpha: float, run_seed: int
) -> dict[Section, nn.Module]:
    """Return two sections for every layer, A and B, with the layer of each."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[Section, nn.Module] = {}
    for number, layer in enumerate(layers):
        a, b = (f"{names[layer]}.lora_{factor}.weight" for factor in "AB")
        seed = start_seed(run_seed, number)
        found[Section(a, "lora_A", (rank, layer.in_features), seed=seed)] = layer
        found[Section(b, "lora_B", (layer.out_features, rank), unit=alpha / rank)] = layer
    return found


def seeing_low_rank(live: Live, modules: Mapping[Section, nn.Module]) -> list[RemovableHandle]:
    """Let layers see the factors of their sections, A in front of B."""
    pairs = list(enumerate(modules.values()))[::2]
    return [layer.register_forward_hook(partial(_add_trained, live, at)) for at, layer in pairs]


def _add_trained(live: Live, number: int, layer: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    if live.sections is not None:
        assert isinstance(layer, QuantLinear)
        a, b = live.sections(number), live.sections(number + 1)
        x = inputs[0].reshape(-1, layer.in_features)
        bounds = token_bounds(layer.name, live, len(x), len(a))
        add_low_rank(x, a, b, bounds, y.view(-1, layer.out_features))
    return y


def add_low_rank(
    x: Float[Tensor, "tokens in"],
    a: Float[Tensor, "probes rank in"],
    b: Float[Tensor, "probes out rank"],
    bounds: Sequence[int],
    y: Float[Tensor, "tokens out"],
) -> None:
    """Add ``(x A^T) B^T`` to ``y``, for the tokens of each probe with its factors.

    The factors and both products are in fp32 whatever the dtype of the activations, as in PEFT.
    Probes of as many tokens each take two products in all.
    """
    x = x.float()
    lengths = {stop - start for start, stop in pairwise(bounds)}
    if len(lengths) == 1:
        shape = (len(a), lengths.pop())
        y += (x.unflatten(0, shape) @ a.mT @ b.mT).flatten(0, 1)
        return
    for a_of_probe, b_of_probe, (start, stop) in zip(a, b, pairwise(bounds), strict=True):
        y[start:stop] += x[start:stop] @ a_of_probe.T @ b_of_probe.T


def file_key(section: Section) -> str:
    """Return the key of a factor in PEFT's file."""
    return _PREFIX + section.name


def lora_config(sections: Sequence[Section]) -> dict[str, Any]:
    """Return rank, alpha and modules of the factors of a run; nothing where there are none."""
    modules = [s.name.removesuffix(_FACTOR_A) for s in sections if s.kind == "lora_A"]
    if not modules:
        return {}
    unit, rank = next((s.unit, s.shape[1]) for s in sections if s.kind == "lora_B")
    return {"lora": {"rank": rank, "alpha": round(unit * rank, 9), "modules": modules}}


def peft_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``adapter_config.json`` as PEFT reads it, from QZO's own."""
    lora = config["lora"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config["base_model_name_or_path"],
        **({"revision": config["revision"]} if "revision" in config else {}),
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": lora["modules"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def adding_low_rank(
    model: nn.Module, live: Live, tensors: Mapping[str, Tensor], scaling: float
) -> list[RemovableHandle]:
    """Let layers add the factors of an adapter, except while training looks.

    Args:
        model: Its own tensors stay as they are.
        live: What its layers see.
        tensors: As in PEFT's file.
        scaling: ``alpha / rank``.

    Raises:
        CheckpointError: The model has no such layer.
    """
    hooks = []
    modules = dict(model.named_modules())
    for key in [key for key in tensors if key.endswith(_FACTOR_A)]:
        name = key.removesuffix(_FACTOR_A).removeprefix(_PREFIX)
        a, b = tensors[key], tensors.get(key.replace(".lora_A.", ".lora_B."))
        layer = modules.get(name)
        if (
            not isinstance(layer, QuantLinear)
            or b is None
            or (a.shape[1], b.shape) != (layer.in_features, (layer.out_features, len(a)))
        ):
            raise CheckpointError(
                f"{key}: expected a quantized layer of the model with factors of its sizes, found "
                "none; the adapter belongs to another base"
            )
        factors = Resident(a[None]), Resident(b[None] * scaling)
        hooks.append(layer.register_forward_hook(partial(_add_fixed, live, *factors)))
    return hooks


def _add_fixed(
    live: Live, a: Resident, b: Resident, layer: QuantLinear, inputs: Any, y: Tensor
) -> Tensor:
    if live.effective is None:
        x = inputs[0].reshape(-1, layer.in_features)
        factors = (a.on(x.device), b.on(x.device))
        add_low_rank(x, *factors, (0, len(x)), y.view(-1, layer.out_features))
    return y

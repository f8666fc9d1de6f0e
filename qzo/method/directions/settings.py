"""What a law of directions is called and told: names, settings, and which of them go together.

- ``rademacher``, ``gaussian``: every element by itself; with ``sparsity`` and ``blocks_per_step``
  only a part of them is perturbed.
- ``lozo``, ``subzero``: matrices of a low ``rank``.

The formulas are in ``masks`` and ``low_rank``. What several steps share (a mask, a choice of
blocks, a subspace) follows from their basis; ``basis_steps_of`` says how many share one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from qzo.method.coordinates import BY_FACTORS

LawName = Literal["rademacher", "gaussian", "lozo", "subzero"]
MaskName = Literal["random", "magnitude"]

LOW_RANK = ("lozo", "subzero")
RANKS = {"lozo": 2, "subzero": 8}  # defaults of the papers' programs
RANK_MAX = 1024
MASKS = ("random", "magnitude")
_BASIS_STEPS = {"lozo": 50, "subzero": 1000}  # LOZO's nu and SubZero's F


@dataclass(frozen=True)
class DirectionSettings:
    """What a law is told besides its name; None where it has no such setting.

    Attributes:
        rank: Of the matrices of a low-rank law.
        sparsity: Part of the elements that is not perturbed.
        mask: Which part that is.
        blocks_per_step: Decoder blocks, or a quantized head, that are perturbed at a time.
    """

    rank: int | None = None
    sparsity: float | None = None
    mask: MaskName | None = None
    blocks_per_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is set, for the header of a journal."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def settings_of(value: object, direction: str, coordinates: str) -> DirectionSettings:
    """Read the settings of a journal's header, which anyone may have written.

    Args:
        value: ``direction_settings`` of the header; None where it has none.
        direction: Name of the law.
        coordinates: Of the trained vector.

    Raises:
        ValueError: They are not settings of this law.
    """
    value = {} if value is None else value
    known = [field.name for field in fields(DirectionSettings)]
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise ValueError(f"expected some of the keys {', '.join(known)}, got {value!r}")
    for key, kind in (("rank", int), ("sparsity", float), ("blocks_per_step", int)):
        if key in value and type(value[key]) is not kind:  # True is no number here
            raise ValueError(f"{key}: expected {kind.__name__}, got {value[key]!r}")
    if "mask" in value and value["mask"] not in MASKS:
        raise ValueError(f"mask: expected one of {list(MASKS)}, got {value['mask']!r}")
    settings = DirectionSettings(**value)
    problem = problem_of(direction, coordinates, settings)
    if problem is not None:
        raise ValueError(problem)
    return settings


def basis_steps_of(
    direction: str, settings: DirectionSettings, basis_steps: int | None
) -> int | None:
    """Return how many steps share a basis; None where nothing follows from it.

    Args:
        direction: Name of the law.
        settings: Of the law.
        basis_steps: As given; None: 50 for LOZO and 1000 for SubZero, as in their papers, and 1 for
            masks and blocks.
    """
    if basis_steps is not None:
        return basis_steps
    is_shared = settings.mask == "random" or settings.blocks_per_step is not None
    return _BASIS_STEPS.get(direction, 1 if is_shared else None)


def problem_of(
    direction: str, coordinates: str, settings: DirectionSettings, *, prefix: str = ""
) -> str | None:
    """Say what is wrong with settings; None: nothing.

    Args:
        direction: Name of the law.
        coordinates: Of the trained vector.
        settings: Of the law.
        prefix: What stands in front of the keys.
    """
    if direction in LOW_RANK:
        return _low_rank_problem(direction, coordinates, settings, prefix)
    if settings.rank is not None:
        return (
            f"{prefix}rank has no effect with {prefix}direction: {direction}; remove it or set "
            f"{prefix}direction: lozo or subzero"
        )
    return _mask_problem(coordinates, settings, prefix) or _blocks_problem(settings, prefix)


def _low_rank_problem(
    direction: str, coordinates: str, settings: DirectionSettings, prefix: str
) -> str | None:
    name, other = f"{prefix}direction: {direction}", f"{prefix}direction: rademacher or gaussian"
    if coordinates in BY_FACTORS:
        return (
            f"{name} cannot be combined with {prefix}coordinates: {coordinates}: a layer has no "
            f"matrix of trained values there; set {prefix}coordinates: absolute or relative, or "
            f"{other}"
        )
    if settings.rank is None or not 1 <= settings.rank <= RANK_MAX:
        return f"{prefix}rank: expected a number from 1 to {RANK_MAX}, got {settings.rank}"
    for key in ("sparsity", "mask", "blocks_per_step"):
        if getattr(settings, key) is not None:
            return (
                f"{prefix}{key} cannot be combined with {name}: it perturbs whole matrices in all "
                f"layers; remove {prefix}{key} or set {other}"
            )
    return None


def _mask_problem(coordinates: str, settings: DirectionSettings, prefix: str) -> str | None:
    if settings.sparsity is None:
        if settings.mask is not None:
            return f"{prefix}mask has no effect without {prefix}sparsity; remove it or set both"
        return None
    if not 0 <= settings.sparsity < 1:
        return f"{prefix}sparsity: expected a number from 0 to below 1, got {settings.sparsity}"
    if settings.mask is None:
        return f"{prefix}mask: expected one of {list(MASKS)} with a sparsity, got none"
    if settings.mask == "magnitude" and coordinates in BY_FACTORS:
        return (
            f"{prefix}mask: magnitude cannot be combined with {prefix}coordinates: {coordinates}: "
            f"a trained value has no scale of the file there; set {prefix}mask: random, or "
            f"{prefix}coordinates: absolute or relative"
        )
    return None


def _blocks_problem(settings: DirectionSettings, prefix: str) -> str | None:
    if settings.blocks_per_step is not None and settings.blocks_per_step < 1:
        return f"{prefix}blocks_per_step: expected a number above 0, got {settings.blocks_per_step}"
    return None

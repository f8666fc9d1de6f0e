"""GPTQ: round a layer's weights one input column at a time, and let later columns make up for it.

For a linear layer ``y = W x`` the squared output error of weights ``Q`` is, up to a factor,
``tr((W - Q) H (W - Q)^T)`` with ``H = 2 E[x x^T]``. With the upper triangular ``R`` of
``R^T R = H^-1``, the columns are rounded from left to right (eq. 2 and 3 of the paper, in the
Cholesky form of its section 3.3):

    e = (w_j - q_j) / R[j, j]          error of column j, one number per output
    w_k -= e R[j, k]    for k > j      what the columns not yet rounded take over

Updates beyond a span of columns are applied once per span ("lazy batch updates"). A group's scale
is found when its first column is reached, from the weights as they are by then; no group starts
inside a span it does not fit into, so these weights are always complete.

Source: Frantar et al., "GPTQ", arXiv 2210.17323; order by activation and ``g_idx`` as in AutoGPTQ
9f7d370, ``auto_gptq/quantization/gptq.py``. Different from it: columns that calibration never
excited keep their weights instead of being set to zero.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from quantizers.errors import FormatError
from quantizers.rounding import Grid, RoundedWeight, fit_scales, nearest, rounded_weight

_DAMP_FACTORS = (1, 10, 100)


class Hessian:
    """The running mean of ``2 x x^T`` over calibration inputs, in fp32.

    Attributes:
        matrix: The mean so far; zeros before the first input.
        num_inputs: Vectors ``x`` seen.
    """

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_inputs = 0

    def add(self, inputs: Float[Tensor, "*batch in"]) -> None:
        """Take in the vectors along the last axis of ``inputs``, which is not modified."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        total = self.num_inputs + rows.shape[0]
        if rows.shape[0]:
            self.matrix.addmm_(rows.T, rows, beta=self.num_inputs / total, alpha=2 / total)
        self.num_inputs = total


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    grid: Grid,
    act_order: bool = False,
    damp_percent: float = 0.01,
    block_size: int = 128,
) -> RoundedWeight:
    """Quantize a layer with GPTQ, in the precision of the Hessian.

    A Hessian that is not finite or not positive definite is a FormatError, and so is a scale
    beyond fp16.

    Args:
        weight: The layer's matrix; not modified.
        hessian: ``2 E[x x^T]`` of its inputs, see ``Hessian``; not modified.
        grid: Bits, group size and symmetry.
        act_order: Take the columns by falling ``diag(H)`` instead of from left to right. Groups
            are then columns that are neighbours in that order, so ``g_idx`` is not monotone.
        damp_percent: Part of the mean of ``diag(H)`` that is added to the diagonal; ten and a
            hundred times as much is tried before giving up.
        block_size: Columns between two updates of all later columns; changes the speed only.

    Returns:
        Codes, in the order of the weight's columns whatever the order they were taken in.
    """
    order = _column_order(hessian, act_order=act_order)
    factor = _inverse_factor(hessian[order][:, order], damp_percent)
    # (in, out): a column of W is a contiguous row here
    pass_ = _Pass.start(weight.T[order].to(factor.dtype), factor, grid)
    for start, stop in _spans(weight.shape[1], pass_.columns_per_group, block_size):
        pass_.round_span(start, stop)
    columns = torch.argsort(order)
    g_idx = columns // pass_.columns_per_group
    return rounded_weight(pass_.codes[columns], pass_.scales, pass_.zeros, g_idx)


@dataclass
class _Pass:
    """One pass over the columns; everything is transposed, and in the order they are taken in."""

    weight: Float[Tensor, "in out"]  # modified: columns not yet rounded make up for the others
    factor: Float[Tensor, "in in"]
    grid: Grid
    codes: UInt8[Tensor, "in out"]
    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]

    @classmethod
    def start(
        cls, weight: Float[Tensor, "in out"], factor: Float[Tensor, "in in"], grid: Grid
    ) -> "_Pass":
        in_features, out_features = weight.shape
        scales = weight.new_empty(out_features, grid.num_groups(in_features))
        codes = torch.empty_like(weight, dtype=torch.uint8)
        return cls(weight, factor, grid, codes, scales, torch.empty_like(scales))

    @property
    def columns_per_group(self) -> int:
        return self.grid.columns_per_group(self.weight.shape[0])

    def round_span(self, start: int, stop: int) -> None:
        """Round columns ``start .. stop - 1``, then update all later ones at once."""
        errors = self.weight.new_empty(stop - start, self.weight.shape[1])
        for j in range(start, stop):
            rounded = self._round_column(j)
            errors[j - start] = (self.weight[j] - rounded) / self.factor[j, j]
            later = slice(j + 1, stop)
            self.weight[later].addr_(self.factor[j, later], errors[j - start], alpha=-1)
        self.weight[stop:].addmm_(self.factor[start:stop, stop:].T, errors, alpha=-1)

    def _round_column(self, j: int) -> Float[Tensor, " out"]:
        group, place = divmod(j, self.columns_per_group)
        if place == 0:
            members = self.weight[j : j + self.columns_per_group]
            self.scales[:, group], self.zeros[:, group] = fit_scales(members, self.grid)
        scales, zeros = self.scales[:, group], self.zeros[:, group]
        self.codes[j], rounded = nearest(self.weight[j], scales, zeros, self.grid)
        return rounded


def _column_order(hessian: Float[Tensor, "in in"], *, act_order: bool) -> Int[Tensor, " in"]:
    if not act_order:
        return torch.arange(hessian.shape[0], device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _inverse_factor(hessian: Float[Tensor, "in in"], damp_percent: float) -> Float[Tensor, "in in"]:
    """Return the upper triangular R with ``R^T R = (H + damping)^-1``.

    With J the reversal of rows and columns and ``J H J = L L^T``, ``R = J L^-1 J``: one Cholesky
    factorization and one triangular inverse, without the inverse of H.

    Raises:
        FormatError: The Hessian is not finite, or not positive definite with any damping tried.
    """
    if not torch.isfinite(hessian).all():
        raise FormatError(
            "hessian: expected finite values, got NaN or infinity; check that the float model "
            "itself gives finite outputs on the calibration text"
        )
    for factor in _DAMP_FACTORS:
        reversed_hessian = _damped(hessian, damp_percent * factor).flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(reversed_hessian)
        if int(info) == 0:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1).contiguous()
    raise FormatError(
        f"hessian: expected a positive definite matrix with damp_percent up to "
        f"{damp_percent * _DAMP_FACTORS[-1]:g}, got none; use more calibration samples or a "
        "larger damp_percent"
    )


def _damped(hessian: Float[Tensor, "in in"], damp_percent: float) -> Float[Tensor, "in in"]:
    """Return a copy with ``damp_percent`` of the mean diagonal added to the diagonal.

    An input that was always zero has a row of zeros: it gets the mean, so that its column is simply
    rounded and passes no error on.
    """
    diagonal = hessian.diagonal()
    is_dead = diagonal <= 0
    mean = diagonal.sum() / (~is_dead).sum().clamp(min=1)
    mean = torch.where(is_dead.all(), 1.0, mean)
    damped = hessian.clone()
    damped.diagonal().copy_(torch.where(is_dead, mean, diagonal) + damp_percent * mean)
    return damped


def _spans(in_features: int, group_size: int, block_size: int) -> list[tuple[int, int]]:
    """Cut the columns into spans that hold whole groups, or are part of a single one."""
    if group_size <= block_size:
        starts = range(0, in_features, block_size // group_size * group_size)
        return [(start, min(start + starts.step, in_features)) for start in starts]
    spans = []
    for first in range(0, in_features, group_size):
        last = min(first + group_size, in_features)
        spans += [
            (start, min(start + block_size, last)) for start in range(first, last, block_size)
        ]
    return spans

"""Do multipliers near 1 reach the output of a layer in half precision, and are directions the same?

A multiplier that is rounded to bfloat16 before it multiplies turns 1.003 into 1.0, and no single
output shows it, as outputs are rounded anyway. Over many outputs rounding averages out: the factor
is the slope ``<y(r), y(1)> / <y(1), y(1)>``.
"""

import itertools

import torch
from check_part import Findings, run_part

from quantizers.weight import dequantize
from qzo.bench.synthetic import random_weight
from qzo.method.directions.philox import combine, directions
from qzo.model.linear import Live, Multipliers, ProbeScales, QuantLinear

FACTORS = (1.0005, 1.003, 1.01)
SLOPE_TOLERANCE = 1.5e-4  # of a factor: a tenth of half a step of bfloat16 near 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def ask(findings: Findings) -> None:
    """Compare every dtype with float64 on the CPU."""
    size = (96, 128) if findings.is_tiny else (1024, 1152)
    widths = (16, 300) if findings.is_tiny else (16, 128, 2048)
    for format_name in ("gptq", "nf4"):
        for name, width in itertools.product(DTYPES, widths):
            with findings.guarded(f"{format_name}, {name}, {width} tokens"):
                _compare(findings, format_name, name, width, size)
    with findings.guarded("directions"):
        _directions(findings)


def _compare(
    findings: Findings, format_name: str, name: str, width: int, size: tuple[int, int]
) -> None:
    device, dtype = torch.device(findings.device), DTYPES[name]
    weight = random_weight(format_name, *size)
    dense = dequantize(weight).double()
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(width, size[1], generator=generator).to(dtype)
    want = x.double() @ dense.T
    live = Live()
    layer = QuantLinear("layer", weight, None, live).to(device)
    layer.index = 0
    x = x.to(device)
    plain = layer(x)
    key = f"{format_name} {name} {width}"
    error = _relative(plain, want)
    # a sum of products in float32 is rounded once; codebooks of kernels have four digits
    limit = 2e-3 if name == "float32" else 4 * torch.finfo(dtype).eps
    findings.require(error < limit, f"{key}: product differs by {error:.1e}, over {limit:.1e}")
    found = {"error": error, "slopes": {}}
    bounds = (0, width // 3, width)  # two probes
    for factor in FACTORS:
        rows = torch.full((2, size[0]), factor, device=device)
        for kind, effective in (
            ("rows", Multipliers(rows=rows)),
            ("scales", ProbeScales([weight.scales.float().to(device) * factor] * 2)),
        ):
            live.bounds, live.effective = bounds, lambda _, effective=effective: effective
            slope = _slope(layer(x), plain)
            live.bounds, live.effective = None, None
            found["slopes"][f"{kind} {factor}"] = slope
            # weights that are scaled are rounded one by one, and alike for all tokens
            rounding = torch.finfo(dtype).eps / 8 if kind == "scales" else 0.0
            # two outputs rounded at random: four standard deviations of the slope
            noise = 2.8 * torch.finfo(dtype).eps / plain.numel() ** 0.5
            is_close = abs(slope - factor) < max(SLOPE_TOLERANCE, rounding, noise)
            findings.require(is_close, f"{key}: {kind} times {factor} act as {slope:.5f}")
    findings.note(key, found)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


def _slope(moved: torch.Tensor, plain: torch.Tensor) -> float:
    moved, plain = moved.cpu().double(), plain.cpu().double()
    return float((moved * plain).sum() / (plain * plain).sum())


def _directions(findings: Findings) -> None:
    """Draw on the device and on the CPU: every bit must agree."""
    for law in ("rademacher", "gaussian"):
        seeds, start, stop = [1, 2**63 - 5, 2**40 + 3], 1_003, 300_001
        want = directions(law, seeds, start, stop, "cpu", stream=3)
        got = directions(law, seeds, start, stop, findings.device, stream=3).cpu()
        findings.require(torch.equal(got, want), f"{law}: the device draws other numbers")
        weights = [0.1, -0.7, 1 / 3]
        moved = combine(got.to(findings.device), weights).cpu()
        is_equal = torch.equal(moved, combine(want, weights))
        findings.require(is_equal, f"{law}: the device adds directions up to other bits")
    findings.note("directions", "bitwise those of the CPU")


if __name__ == "__main__":
    run_part(ask)

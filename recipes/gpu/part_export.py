"""Runs in half precision are exported; the export has the loss of the model that was trained."""

import inspect

from check_part import Findings, run_part
from qzo_command import qzo
from short_run import small_checkpoint, steps_of, train

from qzo import cli

TOLERANCE = 0.02  # nats between the trained model and the exported files


def ask(findings: Findings) -> str:
    """Train, export, and load the export again."""
    has_device = "device" in inspect.signature(cli.export).parameters
    on_device = ["--device", findings.device] if has_device else []
    dtypes = ("float16", "bfloat16") if findings.is_cuda else ("bfloat16",)
    for format_name in ("gptq",) if findings.is_tiny else ("gptq", "nf4"):
        checkpoint = small_checkpoint(findings.work, format_name, is_tiny=findings.is_tiny)
        for dtype in dtypes:
            name = f"{format_name} {dtype}"
            with findings.guarded(name):
                run = findings.work / f"{format_name}-{dtype}"
                keys = {"device": findings.device, "dtype": dtype, "max_steps": 8}
                train(checkpoint, run, keys)
                moved = [d for step in steps_of(run) for d in step.derivatives if d]
                findings.require(bool(moved), f"{name}: expected scales that moved")
                found = qzo("export", str(run), "--out", f"{run}-exported", *on_device)
                findings.note(name, found)
                difference = abs(found["exported_loss"] - found["trained_loss"])
                findings.require(
                    difference <= TOLERANCE,
                    f"{name}: the export's loss differs by {difference:.4f} nats",
                )
    where = findings.device if on_device else "the CPU, since qzo export has no --device"
    return f"checked on {where}"


if __name__ == "__main__":
    run_part(ask)

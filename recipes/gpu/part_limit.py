"""With ``memory_limit`` at half of the codes, blocks stream: losses are bitwise those without."""

import gc
from pathlib import Path

import torch
from check_part import Findings, run_part
from short_run import examples_for, losses_of, train

from qzo.bench.synthetic import Synthetic, synthetic_checkpoint
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.run.memory import planned_bytes
from qzo.run.recipe.read import recipe

LAYERS = 8


def ask(findings: Findings) -> str:
    """Train with and without a limit."""
    shape = "small" if findings.is_tiny else "llama-2-7b"
    formats = ("gptq",) if findings.is_tiny else ("gptq", "nf4")
    remarks = []
    for format_name in formats:
        with findings.guarded(format_name):
            what = Synthetic(shape, format_name, num_layers=LAYERS)
            checkpoint = synthetic_checkpoint(what, findings.work)
            remarks.append(_compare(findings, checkpoint, format_name))
    return "; ".join(remarks)


def _compare(findings: Findings, checkpoint: Path, name: str) -> str:
    dtype = "float16" if findings.is_cuda else "float32"
    keys = {"device": findings.device, "dtype": dtype, "max_steps": 3}
    limit, streaming = _limit(checkpoint, keys)
    losses, peaks = {}, {}
    for kind, extra in (("whole", {}), ("limited", {"memory_limit": f"{limit / 2**30:.4f}GiB"})):
        run = findings.work / f"{name}-{kind}"
        gc.collect()
        before = 0
        if findings.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(findings.device)
            before = torch.cuda.memory_allocated(findings.device)
        trainer = train(checkpoint, run, {**keys, **extra})
        losses[kind] = losses_of(run)
        peaks[kind] = None
        if findings.is_cuda:
            peaks[kind] = torch.cuda.max_memory_allocated(findings.device) - before
        del trainer
    found = {"limit_bytes": limit, "codes_bytes": streaming, "peak_bytes": peaks}
    findings.note(name, {**found, "losses": losses["limited"]})
    findings.require(losses["limited"] == losses["whole"], f"{name}: other losses with the limit")
    if peaks["limited"] is not None:
        findings.require(
            peaks["limited"] <= limit, f"{name}: {peaks['limited']:,} bytes, over {limit:,}"
        )
    return f"{name}: {limit / 2**30:.2f} GiB, of which {streaming / 2**31:.2f} for codes"


def _limit(checkpoint: Path, keys: dict[str, object]) -> tuple[int, int]:
    """Return a limit that leaves room for half of the codes, and the bytes of all."""
    values = {"model": str(checkpoint), "output_dir": "unused", **keys}
    values |= {"per_device_train_batch_size": 8, "max_length": 41}
    planned = planned_bytes(
        recipe(values),
        open_checkpoint(checkpoint),
        [examples_for(checkpoint)],
        torch.device(str(keys["device"])),
    )
    return planned.other + planned.streaming // 2, planned.streaming


if __name__ == "__main__":
    run_part(ask)

"""Rebuilding tuned scales from the journal: no model, no data, no forward pass."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qzo.checkpoint.atomic import locked, new_folder
from qzo.checkpoint.base import open_base, shared_origin
from qzo.checkpoint.checkpoint import Checkpoint
from qzo.checkpoint.hub import Origin
from qzo.checkpoint.tensors import tensor_bytes
from qzo.errors import CheckpointError, ConfigError
from qzo.method.directions.philox import GENERATOR
from qzo.method.extra.lora import lora_config
from qzo.method.extra.section import UNQUANTIZED, sections_of
from qzo.method.first_order import FirstOrder, first_order_of
from qzo.method.layer_scaling import stretch_scales
from qzo.method.optimizers import RULES, Optimizer, make_optimizer
from qzo.method.trained_vector import Scales
from qzo.run.journal.compact import open_record
from qzo.run.journal.gradients import NAME as GRADIENTS_NAME
from qzo.run.journal.gradients import Gradients
from qzo.run.journal.lines import (
    Fingerprint,
    Record,
    Step,
    derivatives_of,
    direction_settings_of,
    header_basis_steps,
)
from qzo.run.output.adapter import (
    CONFIG_NAME,
    Adapter,
    adapter_tensors,
    open_adapter,
    save_adapter,
    unquantized_sha256,
)


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        steps: Steps replayed.
        num_fingerprints: Fingerprints of the journal that were checked; all agreed.
        fingerprint: Of the rebuilt master.
        adapter: ``equal`` to the adapter of the run, or ``written`` where there was none.
    """

    steps: int
    num_fingerprints: int
    fingerprint: str
    adapter: str


def replay(
    run: str | Path,
    *,
    to_step: int | None = None,
    out: Path | None = None,
    base: str | None = None,
    revision: str | None = None,
) -> Replayed:
    """Rebuild the scales of a run and compare them with its adapter.

    Args:
        run: A run folder, or a journal in either form, in a folder of its own or named itself.
        to_step: Stop before this step; the adapter's own step unless given.
        out: A new or empty folder; write the adapter there instead of comparing.
        base: The base checkpoint, where it is no longer where the run says.
        revision: Of the base: a branch, tag or commit of its repository on the hub.

    Returns:
        What agreed. A base, a fingerprint or an adapter that does not is a CheckpointError.

    Raises:
        ConfigError: The journal is a file, and there is no ``out``.
    """
    folder = Path(run)
    if folder.is_file() and out is None:
        raise ConfigError(f"{folder}: name a folder for the adapter with --out")
    is_written = out is None and folder.is_dir() and not (folder / CONFIG_NAME).is_file()
    with locked(folder) if is_written else nullcontext():
        return _replay(folder, to_step, out=out, base=base, revision=revision)


def _replay(
    folder: Path,
    to_step: int | None,
    *,
    out: Path | None,
    base: str | None,
    revision: str | None,
) -> Replayed:
    journal = open_record(folder)
    checkpoint = base_of(journal, base, revision)
    has_adapter = (folder / CONFIG_NAME).is_file() and out is None
    if to_step is None and has_adapter:
        to_step = int(open_adapter(folder).config["step"])
    scales, steps, checked = _rebuilt(journal, checkpoint, to_step)
    tensors = adapter_tensors(checkpoint, scales)
    if has_adapter:
        _compare(open_adapter(folder), tensors, steps)
        return Replayed(steps, checked, scales.fingerprint(), "equal")
    config = adapter_config(journal, checkpoint, steps)
    if out is None:
        save_adapter(folder, tensors, config)
    else:
        with new_folder(out) as partial:
            save_adapter(partial, tensors, config)
    return Replayed(steps, checked, scales.fingerprint(), "written")


def write_adapter(journal: Record, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the adapter of a whole journal into a folder.

    Args:
        journal: In either form.
        checkpoint: Its base, as ``base_of`` opens it.
        folder: An existing one.
    """
    scales, steps, _ = _rebuilt(journal, checkpoint, None)
    config = adapter_config(journal, checkpoint, steps)
    save_adapter(folder, adapter_tensors(checkpoint, scales), config)


def _rebuilt(
    journal: Record, checkpoint: Checkpoint, to_step: int | None
) -> tuple[Scales, int, int]:
    """Return the scales after a step, how many there were, and how many fingerprints agreed."""
    scales = Scales.of_checkpoint(
        checkpoint,
        journal.header["layers"],
        coordinates=journal.header["coordinates"],
        direction=journal.header["direction"],
        direction_settings=direction_settings_of(journal.header),
        sections=sections_of(journal.header),
    )
    optimizer = optimizer_of(journal.header)
    return scales, *apply_journal(journal, scales, optimizer, to_step=to_step)


def _compare(adapter: Adapter, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Compare the adapter of a run with rebuilt scales; it is never overwritten.

    Raises:
        CheckpointError: It holds another step, or other scales.
    """
    if adapter.config["step"] != steps:
        raise CheckpointError(
            f"{adapter.folder}: expected the adapter of step {steps}, found that of step "
            f"{adapter.config['step']}; name a folder for the other one with --out"
        )
    for key, tensor in tensors.items():
        if tensor_bytes(adapter.tensors[key]) != tensor_bytes(tensor):
            raise CheckpointError(f"{key}: the adapter differs from the journal's scales")


def apply_journal(
    journal: Record,
    scales: Scales,
    optimizer: Optimizer,
    *,
    from_step: int = 0,
    to_step: int | None = None,
    first_order: FirstOrder | None = None,
) -> tuple[int, int]:
    """Move scales as the journal says, from ``from_step`` on.

    Args:
        journal: In either form.
        scales: As they were before ``from_step``.
        optimizer: As it was before ``from_step``.
        from_step: The first step to do.
        to_step: Stop before this step; the end of the journal unless given.
        first_order: What exact gradients move, as it was before ``from_step``; as the header says,
            at its start, unless given.

    Returns:
        The number of the next step, and how many fingerprints were checked.

    Raises:
        CheckpointError: A fingerprint differs, or the journal ends before ``to_step``.
    """
    _check_rules(journal.header)
    stretch_scales(scales, journal.header)
    header, step, checked = journal.header, from_step, 0
    basis_steps = header_basis_steps(header)
    first_order = first_order or first_order_of(journal.header, scales)
    for record in journal.records():
        if record.step < from_step:
            continue
        if isinstance(record, Fingerprint):
            check_fingerprint(record, scales)
            checked += 1
            continue
        if to_step is not None and record.step >= to_step:
            break
        derivatives = derivatives_of(record, header["seed"], basis_steps)
        optimizer.aim(scales)
        optimizer.step(scales, derivatives, record.learning_rate)
        _apply_gradient(journal, record, scales, first_order)
        step = record.step + 1
    if to_step is not None and step != to_step:
        raise CheckpointError(
            f"{journal.path}: expected {to_step} steps, found {journal.next_step}"
        )
    return step, checked


def _apply_gradient(
    journal: Record, record: Step, scales: Scales, first_order: FirstOrder | None
) -> None:
    """Move the first-order part, if there is one and it moved.

    Raises:
        CheckpointError: The header and the step differ in whether there is one.
    """
    if (record.gradient is None) is not (first_order is None):
        raise CheckpointError(
            f"{journal.path}: step {record.step}: expected a gradient in every step where the "
            "header has first_order, and in no other"
        )
    if first_order is None or record.gradient is None or record.gradient.loss is None:
        return
    gradients = Gradients(journal.path.with_name(GRADIENTS_NAME), first_order.size)
    gradient = gradients.read(record.step).to(scales.values.device)
    first_order.step(scales, gradient, record.gradient.learning_rate)


def _check_rules(header: Mapping[str, Any]) -> None:
    """Refuse steps that an earlier QZO rounded in another way.

    Raises:
        CheckpointError: They are.
    """
    part = header.get("first_order") or {}
    if "adam" in {header["optimizer"], part.get("optimizer")} and header.get("rules") != RULES:
        raise CheckpointError(
            f"journal: expected steps of adam by rules {RULES}, got {header.get('rules')}, which "
            f"round in another way; use the QZO that wrote it ({header['qzo_version']})"
        )


def optimizer_of(header: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer of a journal, as it starts."""
    return make_optimizer(header["optimizer"], header["optimizer_settings"])


def check_fingerprint(record: Fingerprint, scales: Scales) -> None:
    """Compare the master with a fingerprint of the journal.

    Raises:
        CheckpointError: They differ.
    """
    got = scales.fingerprint()
    if got != record.sha256:
        raise CheckpointError(
            f"step {record.step}: expected scales with sha256 {record.sha256[:12]}..., got "
            f"{got[:12]}...; the journal or the base was changed"
        )


def base_of(journal: Record, base: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open the base checkpoint of a journal and check that it is the one.

    Args:
        journal: In either form.
        base: Where it is; where the run says unless given.
        revision: A branch, tag or commit of the base.

    Raises:
        CheckpointError: Codes, scales, layers or generator are not those of the journal.
    """
    header = journal.header
    if header.get("generator") != GENERATOR:
        raise CheckpointError(
            f"journal: expected generator {GENERATOR!r}, got {header.get('generator')!r}"
        )
    recorded = Origin(header["base"], header.get("base_commit"))
    checkpoint = open_base(recorded, journal.path, base=base, revision=revision)
    sections = sections_of(header)
    for key, got in (
        ("layers", [layer for layer in header.get("layers", []) if layer in checkpoint.layers]),
        ("codes_sha256", checkpoint.codes_sha256()),
        ("scales_sha256", checkpoint.scales_sha256()),
        ("unquantized_sha256", unquantized_sha256(checkpoint, sections) if sections else None),
    ):
        if header.get(key) != got:
            raise CheckpointError(
                f"{checkpoint.folder}: {key} is not that of the journal; the base was changed "
                "since the run, or is another one"
            )
    return checkpoint


def adapter_config(journal: Record, checkpoint: Checkpoint, step: int) -> dict[str, Any]:
    """Return ``adapter_config.json`` for the scales after a number of steps."""
    header, base = journal.header, shared_origin(checkpoint, journal.path.parent)
    sections = sections_of(header)
    unquantized = [section.name for section in sections if section.kind in UNQUANTIZED]
    prefixes = [section for section in sections if section.kind == "prefix_key"]
    return {
        "base_model_name_or_path": base.name,
        **({} if base.commit is None else {"revision": base.commit}),
        "format": checkpoint.format.QUANT_METHOD,
        "group_size": checkpoint.group_size,
        "codes_sha256": header["codes_sha256"],
        "coordinates": header["coordinates"],
        "step": step,
        "num_trained_values": header["num_values"],
        "qzo_version": header["qzo_version"],
        **_exact_values(header),
        **({"unquantized": unquantized} if unquantized else {}),
        **({"prefix": {"num_tokens": prefixes[0].shape[1]}} if prefixes else {}),
        **lora_config(sections),
    }


def _exact_values(header: Mapping[str, Any]) -> dict[str, int]:
    part = header.get("first_order")
    return {} if part is None else {"num_values_by_exact_gradients": part["num_values"]}

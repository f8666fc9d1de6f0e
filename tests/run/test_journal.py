import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.runs import json_lines

from qzo.checkpoint.atomic import WriteError
from qzo.errors import CheckpointError
from qzo.method.probes import DirectionalDerivative, basis_seed, direction_seed
from qzo.run.journal.compact import CompactJournal, open_record, write_compact
from qzo.run.journal.journal import Journal
from qzo.run.journal.lines import Fingerprint, Step, derivatives_of

HEADER: dict[str, Any] = {
    **{"base": "/models/base", "codes_sha256": "c0", "scales_sha256": "5c", "seed": 7},
    **{"generator": "philox4x32-10/v1", "qzo_version": "0", "layers": ["a"], "num_values": 3},
    **{"coordinates": "row", "direction": "rademacher", "optimizer": "sgd", "recipe": {}},
    "optimizer_settings": {},
}


def derivative(value: float) -> DirectionalDerivative:
    return DirectionalDerivative(0, value, value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of a header, two steps, a fingerprint and a third step."""
    journal = Journal.create(tmp_path / "journal.jsonl", lambda: HEADER)
    journal.begin()
    journal.append(0, [1.5, 0.1], [derivative(70.0)], 0.5)
    journal.append(1, [math.nan, 2.0], [derivative(math.nan)], 0.25)
    journal.mark("f1" * 32)
    journal.append(2, [1.0, 1 / 3], [derivative(1 / 3)], 0.125)
    return journal.path


def refusal(path: Path, reason: str) -> Any:
    return pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: {re.escape(reason)}$")


def test_a_journal_is_a_header_and_a_line_per_step(path: Path) -> None:
    assert json_lines(path) == [
        {"format": "qzo-journal", "version": 1, **HEADER},
        {"step": 0, "losses": [1.5, 0.1], "derivatives": [70.0], "learning_rate": 0.5},
        {"step": 1, "losses": [None, 2.0], "derivatives": [None], "learning_rate": 0.25},
        {"step": 2, "fingerprint": "f1" * 32},
        {"step": 2, "losses": [1.0, 1 / 3], "derivatives": [1 / 3], "learning_rate": 0.125},
    ]


def test_derivatives_as_measured_are_kept_where_the_clip_changed_them(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", lambda: HEADER)

    clipped = DirectionalDerivative(1, 100.0, 250.0)
    journal.append(0, [3.5, 1.0, 1.0, 0.5], [clipped, derivative(5.0)], 0.5)

    line = json_lines(journal.path)[1]
    assert (line["derivatives"], line["raw"]) == ([100.0, 5.0], [250.0, 5.0])
    assert next(Journal.open(journal.path).records()) == Step(
        0, (3.5, 1.0, 1.0, 0.5), (100.0, 5.0), 0.5
    )


@pytest.mark.parametrize(("sync_steps", "num_synced"), [(1, 5), (2, 2), (100, 0)])
def test_a_policy_says_how_often_a_step_is_forced_onto_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_steps: int, num_synced: int
) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", lambda: HEADER)
    journal.sync_steps = sync_steps
    journal.begin()
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    for step in range(5):
        journal.append(step, [1.0, 2.0], [derivative(1.0)], 0.5)
        assert Journal.open(journal.path).next_step == step + 1  # the system has it in any case

    assert len(synced) == num_synced
    journal.mark("f5")
    assert len(synced) == num_synced + 1  # a fingerprint takes all before it along


def marked(path: Path) -> Path:
    """Write a journal with fingerprints as training writes them: sha256 in hexadecimal."""
    journal = Journal.create(path, lambda: HEADER)
    journal.mark("0a" * 32)
    journal.append(0, [1.5, 0.1], [derivative(70.0), derivative(1 / 3)], 0.5)
    journal.append(1, [math.nan, 2.0], [derivative(math.nan), derivative(-0.0)], 0.25)
    journal.mark("b1" * 32)
    return path


def test_the_compact_form_holds_all_but_the_losses(tmp_path: Path) -> None:
    journal = Journal.open(marked(tmp_path / "journal.jsonl"))

    write_compact(journal, tmp_path / "small.safetensors")
    compact = open_record(tmp_path / "small.safetensors")

    assert isinstance(compact, CompactJournal)
    assert (compact.header, compact.next_step) == (journal.header, 2)
    assert list(compact.records()) == [
        Fingerprint(0, "0a" * 32),
        Step(0, (), (70.0, 1 / 3), 0.5),
        Step(1, (), (None, -0.0), 0.25),
        Fingerprint(2, "b1" * 32),
    ]


def test_the_compact_form_of_a_compact_form_is_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_compact(Journal.open(marked(tmp_path / "journal.jsonl")), first)

    write_compact(open_record(first), second)

    assert second.read_bytes() == first.read_bytes()


def test_a_journal_without_steps_has_a_compact_form(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", lambda: HEADER)
    journal.begin()

    write_compact(journal, tmp_path / "empty.safetensors")

    compact = open_record(tmp_path / "empty.safetensors")
    assert (list(compact.records()), compact.next_step) == ([], 0)


@pytest.mark.parametrize(
    ("key", "tensor", "reason"),
    [
        ("derivatives", None, "derivatives: expected a tensor of torch.float64 with 2 dimensions, "
            "got none"),
        ("learning_rates", torch.zeros(2), "learning_rates: expected a tensor of torch.float64 "
            "with 1 dimensions, got (torch.float32, (2,))"),
        ("derivatives", torch.zeros(3, 1).double(), "expected tensors of as many steps, got "
            "others"),
        ("learning_rates", torch.full((2,), math.inf).double(), "learning_rates: expected finite "
            "numbers"),
    ],
)  # fmt: skip
def test_a_damaged_compact_form_names_the_tensor(
    tmp_path: Path, key: str, tensor: torch.Tensor | None, reason: str
) -> None:
    path = tmp_path / "small.safetensors"
    write_compact(Journal.open(marked(tmp_path / "journal.jsonl")), path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    tensors.pop(key)
    if tensor is not None:
        tensors[key] = tensor
    save_file(tensors, path, metadata)

    with refusal(path, reason):
        open_record(path)


def test_records_are_read_back_exactly(path: Path) -> None:
    assert list(Journal.open(path).records()) == [
        Step(0, (1.5, 0.1), (70.0,), 0.5),
        Step(1, (None, 2.0), (None,), 0.25),
        Fingerprint(2, "f1" * 32),
        Step(2, (1.0, 1 / 3), (1 / 3,), 0.125),
    ]


def test_an_opened_journal_goes_on_where_it_ended(path: Path) -> None:
    before = path.read_bytes()
    journal = Journal.open(path)

    assert journal.next_step == 3
    assert journal.header["seed"] == 7
    assert not journal.was_torn
    journal.append(3, [1.0, 2.0], [derivative(0.0)], 0.1)
    assert path.read_bytes().startswith(before)
    assert Journal.open(path).next_step == 4


def test_a_step_out_of_order_is_a_mistake_of_ours(path: Path) -> None:
    with pytest.raises(AssertionError):
        Journal.open(path).append(5, [1.0, 2.0], [derivative(0.0)], 0.1)


def test_a_fingerprint_is_written_once_for_each_step(path: Path) -> None:
    journal = Journal.open(path)

    journal.mark("f3" * 32)
    journal.mark("f3" * 32)
    Journal.open(path).mark("f3" * 32)

    assert sum("fingerprint" in line for line in json_lines(path)) == 2


@pytest.mark.parametrize("num_bytes", [1, 5, 60])
def test_a_torn_last_line_does_not_count(path: Path, num_bytes: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-num_bytes])

    journal = Journal.open(path)

    assert journal.was_torn
    assert journal.next_step == 2
    assert len(list(journal.records())) == 3
    assert path.read_bytes() == whole[:-num_bytes]  # reading changes nothing


def test_the_next_line_replaces_a_torn_one(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    journal = Journal.open(path)

    journal.append(2, [1.0, 1 / 3], [derivative(1 / 3)], 0.125)

    assert path.read_bytes() == whole
    assert not journal.was_torn


def damaged(path: Path, line: int, content: str) -> Path:
    """Replace a line, counted from 1."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = content
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


STEP = {"step": 0, "losses": [1.0, 2.0], "derivatives": [1.0], "learning_rate": 0.5}
ILL = "expected losses, derivatives and a learning_rate, got something else"


@pytest.mark.parametrize(
    ("line", "content", "reason"),
    [
        (2, '{"step":0,', "expected JSON, got Expecting property name enclosed in double quotes: "
            "line 1 column 11 (char 10)"),
        (2, "", "expected JSON, got Expecting value: line 1 column 1 (char 0)"),
        (3, "[1]", "expected a JSON object"),
        (3, json.dumps({**STEP, "step": 2}), "expected step 1, got 2"),
        (3, json.dumps({**STEP, "step": 0}), "expected step 1, got 0"),
        (4, '{"step":2,"fingerprint":"f1"}', "expected a fingerprint of 64 hexadecimal digits"),
        (4, '{"fingerprint":"f1"}', "expected step 2, got None"),
        (2, json.dumps({**STEP, "derivatives": None}), ILL),
        (2, json.dumps({**STEP, "derivatives": ["1"]}), ILL),
        (2, json.dumps({**STEP, "derivatives": [True]}), ILL),
        (2, json.dumps({**STEP, "derivatives": [math.inf]}), ILL),
        (2, json.dumps({**STEP, "losses": 3}), ILL),
        (2, json.dumps({**STEP, "learning_rate": math.nan}), ILL),
        (2, '{"step": 0}', ILL),
    ],
)  # fmt: skip
def test_other_damage_names_the_line(path: Path, line: int, content: str, reason: str) -> None:
    damaged(path, line, content)

    with refusal(path, f"line {line}: {reason}"):
        Journal.open(path)


def test_bytes_that_are_no_text_name_the_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"st\xffp":1'))

    with refusal(
        path,
        "line 3: expected JSON, got 'utf-8' codec can't decode byte 0xff in position 4: invalid "
        "start byte",
    ):
        Journal.open(path)


def test_a_missing_line_names_the_next(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))

    with refusal(path, "line 3: expected step 1, got 2"):
        Journal.open(path)


@pytest.mark.parametrize("content", ["", '{"format": "qzo-jour'])
def test_a_journal_without_a_whole_header_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(content)

    with refusal(path, "line 1: expected JSON, got Expecting value: line 1 column 1 (char 0)"):
        Journal.open(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "other"}, "format 'other' version 1"),
        ({"version": 2}, "format 'qzo-journal' version 2"),
    ],
)
def test_another_format_or_version_is_refused(
    path: Path, change: dict[str, Any], found: str
) -> None:
    header = {"format": "qzo-journal", "version": 1, **HEADER, **change}
    damaged(path, 1, json.dumps(header))

    with refusal(path, f"expected a qzo journal of version 1, got {found}"):
        Journal.open(path)


@pytest.mark.parametrize("key", HEADER)
def test_a_header_without_what_a_replay_needs_is_refused(path: Path, key: str) -> None:
    header = {"format": "qzo-journal", "version": 1, **HEADER, key: None}
    damaged(path, 1, json.dumps(header))

    kind = type(HEADER[key]).__name__
    with refusal(path, f"line 1: expected {key} of type {kind}, got None"):
        Journal.open(path)


def test_a_journal_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refusal(tmp_path / "journal.jsonl", "cannot be read: No such file or directory"):
        Journal.open(tmp_path / "journal.jsonl")


def test_seeds_follow_from_the_place_of_a_derivative() -> None:
    record = Step(5, (1.0,) * 6, (0.5, None, -2.0), 0.1)

    derivatives = derivatives_of(record, run_seed=9)

    assert [(d.seed, d.value) for d in derivatives] == [
        (direction_seed(9, 5, 0), 0.5),
        (direction_seed(9, 5, 2), -2.0),
    ]


# --- curvatures and the basis ----------------------------------------------------------------


@pytest.fixture
def curved(tmp_path: Path) -> Path:
    """A journal of two steps with curvatures."""
    journal = Journal.create(tmp_path / "curved.jsonl", lambda: {**HEADER, "basis_steps": 2})
    rows = [[(0.5, 3.0), (-1.0, -0.25)], [(math.nan, math.nan), (2.0, 1 / 3)]]
    for step, row in enumerate(rows):
        pairs = [DirectionalDerivative(0, d, d, curvature=c) for d, c in row]
        journal.append(step, [1.0], pairs, 0.5)
    return journal.path


CURVED = [(0.5, -1.0), (None, 2.0)], [(3.0, -0.25), (None, 1 / 3)]


def test_a_step_line_holds_the_curvatures(curved: Path) -> None:
    assert [line["curvatures"] for line in json_lines(curved)[1:]] == [[3.0, -0.25], [None, 1 / 3]]

    steps = [record for record in Journal.open(curved).records() if isinstance(record, Step)]

    assert ([s.derivatives for s in steps], [s.curvatures for s in steps]) == CURVED


def test_the_compact_form_holds_the_curvatures(curved: Path, tmp_path: Path) -> None:
    write_compact(Journal.open(curved), tmp_path / "small.safetensors")
    compact = open_record(tmp_path / "small.safetensors")

    steps = [record for record in compact.records() if isinstance(record, Step)]
    assert ([s.derivatives for s in steps], [s.curvatures for s in steps]) == CURVED
    assert compact.header["basis_steps"] == 2


def test_the_compact_form_without_curvatures_has_no_tensor_for_them(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_compact(Journal.open(marked(tmp_path / "journal.jsonl")), path)

    with safe_open(path, "pt") as file:
        assert "curvatures" not in file.keys()  # noqa: SIM118  # not a mapping


def test_curvatures_of_another_shape_are_refused(curved: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_compact(Journal.open(curved), path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file({**tensors, "curvatures": torch.zeros(2, 3, dtype=torch.float64)}, path, metadata)

    with refusal(
        path,
        "curvatures: expected a tensor of torch.float64 with the shape of the derivatives, "
        "(2, 2), got (torch.float64, (2, 3))",
    ):
        CompactJournal(path)


@pytest.mark.parametrize("bad", [[1.0], 3, [1.0, "x"], [1.0, True], None])
def test_curvatures_that_are_none_are_refused(curved: Path, bad: Any) -> None:
    line = {**json_lines(curved)[1], "curvatures": bad}
    damaged(curved, 2, json.dumps(line))

    with refusal(curved, "line 2: expected 2 curvatures, one per derivative, got something else"):
        Journal.open(curved)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_basis_steps_that_are_no_number_are_refused(path: Path, bad: Any) -> None:
    header = {"format": "qzo-journal", "version": 1, **HEADER, "basis_steps": bad}
    damaged(path, 1, json.dumps(header))

    with refusal(path, f"line 1: expected basis_steps to be a number above 0 or null, got {bad!r}"):
        Journal.open(path)


def test_curvature_and_basis_follow_the_derivatives() -> None:
    record = Step(5, (), (0.5, None, -2.0), 0.1, (3.0, None, 0.25))

    derivatives = derivatives_of(record, run_seed=9, basis_steps=2)

    assert [(d.value, d.curvature, d.basis) for d in derivatives] == [
        (0.5, 3.0, basis_seed(9, 5, 2)),
        (-2.0, 0.25, basis_seed(9, 5, 2)),
    ]
    plain = derivatives_of(Step(5, (), (0.5,), 0.1), run_seed=9)
    assert [(d.curvature, d.basis) for d in plain] == [(None, 0)]


def test_a_line_that_cannot_be_synced_is_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, journal = path.read_bytes(), Journal.open(path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WriteError,
        match=f"^{re.escape(str(path))}: cannot be written: No space left on device; nothing was "
        "left half-written$",
    ):
        journal.append(3, [1.0, 2.0], [derivative(0.0)], 0.1)

    assert path.read_bytes() == before
    assert journal.next_step == 3

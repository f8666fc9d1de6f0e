"""Files that a stranger may have written: no exception but the project's own, in bounded time.

Hypothesis draws a number, and the number decides what is changed in a valid file: so the inputs are
the same each time, and a failure names its number.
"""

import json
import os
import random
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.runs import RECORDS, tiny_checkpoint, tiny_trainer, write_lines

from quantizers.errors import FormatError
from quantizers.weight import QuantizedWeight
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.checkpoint.inspect import inspect
from qzo.data.records import read_records
from qzo.errors import ConfigError, QZOError
from qzo.plan.planner import plan
from qzo.run.folder import read_reference
from qzo.run.journal.compact import open_record, write_compact
from qzo.run.journal.journal import Journal
from qzo.run.output.adapter import open_adapter, tuned_weight
from qzo.run.output.metrics import Metrics
from qzo.run.output.replay import replay
from qzo.run.output.snapshots import read_snapshot
from qzo.run.recipe.read import read_recipe

SECONDS = 4.0  # of computing; beside other work a core may take twice as long for the same
BYTES = 500 * 2**20

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 300),
    *("float16", "F16", "U8", "BF16", "sgd", "absolute", "gaussian", "nan", "1e5", "model"),
    *([], {}, [[]], [0, 0], [-1, 4], [2**62, 2**62], {"a": 1}, [None], ["a"] * 50, "a" * 10_000),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(entry, (*path, key))
    return found


def mutated_json(value: Any, draw: random.Random) -> Any:
    """Return a JSON value with a few changes."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        paths = places(value)
        if not paths:
            return deepcopy(draw.choice(ODD))
        *parents, last = draw.choice(paths)
        at = value
        for key in parents:
            at = at[key]
        change = draw.randrange(7)
        if change == 0:
            del at[last]
        elif change == 1 and isinstance(at, dict):
            at[str(draw.choice(ODD))[:50] + str(last)] = at.pop(last)
        elif change == 2 and isinstance(at[last], int | float):
            at[last] = at[last] * draw.choice((-1, 2, 2**32, 0.5)) + draw.choice((-1, 0, 1))
        elif change == 3:
            donor = draw.choice(paths)
            entry = value
            try:
                for key in donor:
                    entry = entry[key]
            except (KeyError, IndexError, TypeError):
                continue
            at[last] = json.loads(json.dumps(entry))
        else:
            at[last] = deepcopy(draw.choice(ODD))
    return value


def json_text(value: Any, draw: random.Random) -> bytes:
    """Write JSON, at times with a key twice, with deep nesting, or with broken bytes."""
    text = json.dumps(value).encode()
    change = draw.randrange(12)
    if change == 0 and text.startswith(b'{"'):
        first = text[1:].split(b",")[0]
        text = b"{" + first + b"," + text[1:]
    elif change == 1:
        depth = draw.choice((10, 500, 100_000))
        text = text[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
    elif change == 2:
        text = mutated_bytes(text, draw)
    return text


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with some flipped, cut out, inserted or repeated."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(result) + 1)
        change = draw.randrange(5)
        if change == 0 and at < len(result):
            result[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            del result[at : at + draw.choice((1, 4, 100))]
        elif change == 2:
            result[at:at] = draw.randbytes(draw.choice((1, 4, 100)))
        elif change == 3:
            del result[at:]
        else:
            result[at:at] = result[at : at + draw.choice((1, 40))]
    return bytes(result)


def mutated_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file with another header, length or content."""
    length = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    if draw.randrange(4) == 0:
        return mutated_bytes(data, draw)
    text = json_text(mutated_json(header, draw), draw)
    stated = draw.choice((len(text), len(text), len(text), len(text) + 8, 2**40, 2**63, 0))
    return stated.to_bytes(8, "little") + text + content


@dataclass
class World:
    """Valid files, and what they hold."""

    folder: Path
    base: Path
    run: Path
    recipe: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("fuzz")
    base = tiny_checkpoint(folder / "base")
    tiny_trainer(base, folder / "run", max_steps=5, save_steps=2, evaluation=RECORDS[:4]).train()
    write_compact(open_record(folder / "run"), folder / "compact.safetensors")
    (folder / "compact").mkdir()
    write_lines(folder / "data.jsonl", RECORDS)
    values = {
        **{"model": "m", "data": "d", "output_dir": "o", "max_steps": 5, "seed": 1},
        **{"learning_rate": 0.1, "memory_limit": "4GiB", "report_to": ["none"], "dtype": "float32"},
        "zo": {"estimator": "spsa", "num_directions": 2, "epsilon": 0.1, "optimizer": "momentum"},
    }
    return World(folder, base, folder / "run", values)


Target = Callable[[World, random.Random], None]


def changed(path: Path, change: Callable[[bytes], bytes], use: Callable[[], Any]) -> None:
    """Use a file while it is changed."""
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        use()
    finally:
        path.write_bytes(before)


def use_weight(weight: QuantizedWeight) -> None:
    size = weight.out_features * weight.in_features
    assert size < 2**22
    weight.dequantize(slice(0, weight.out_features), torch.empty(size))


def use_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for layer in checkpoint.layers[:3]:
        use_weight(checkpoint.weight(layer))
    checkpoint.codes_sha256()


def tensors(world: World, draw: random.Random) -> None:
    path = world.base / "model.safetensors"
    changed(path, lambda data: mutated_safetensors(data, draw), lambda: use_checkpoint(world.base))


def base_config(world: World, draw: random.Random) -> None:
    def change(data: bytes) -> bytes:
        value = json.loads(data)
        if draw.randrange(2):
            part = mutated_json(value["quantization_config"], draw)
            return json_text({**value, "quantization_config": part}, draw)
        return json_text(mutated_json(value, draw), draw)

    uses: list[Callable[[], Any]] = [
        lambda: use_checkpoint(world.base),
        lambda: inspect(str(world.base)),
        lambda: plan(world.base),
    ]
    changed(world.base / "config.json", change, draw.choice(uses))


def a_recipe(world: World, draw: random.Random) -> None:
    path = world.folder / "recipe.yaml"
    value = mutated_json(world.recipe, draw)
    text = yaml.safe_dump(value, allow_unicode=False).encode()
    kind = draw.randrange(8)
    if kind == 0:
        text = mutated_bytes(text, draw)
    elif kind == 1:
        tag = draw.choice(("!!python/object/apply:os.system", "!!binary", "!!set", "!!timestamp"))
        text += f"\ndata: {tag} [x]\n".encode()
    elif kind == 2:
        names = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(30)]
        text += ("\nreport_to: [" + ", ".join([*names, "*a29"]) + "]\n").encode()
    elif kind == 3:
        text += b"\nzo: " + b"[" * draw.choice((10, 1000)) + b"]\n"
    path.write_bytes(text)
    read_recipe(path, draw.choice(([], ["zo.epsilon=1e-3"], ["seed=[1"], ["zo.a.b=1"])))


def a_journal(world: World, draw: random.Random) -> None:
    def change(data: bytes) -> bytes:
        lines = data.splitlines()
        for _ in range(draw.choice((1, 1, 3))):
            at = draw.choice((0, draw.randrange(len(lines))))
            try:
                value = mutated_json(json.loads(lines[at]), draw)
            except (ValueError, RecursionError):
                continue
            lines[at] = json_text(value, draw)
        return b"\n".join(lines) + b"\n"

    def use() -> None:
        list(Journal.open(world.run / "journal.jsonl").records())
        if draw.randrange(4) == 0:
            replay(world.run)

    changed(world.run / "journal.jsonl", change, use)


def a_compact_journal(world: World, draw: random.Random) -> None:
    data = (world.folder / "compact.safetensors").read_bytes()
    path = world.folder / "compact" / "journal.safetensors"
    path.write_bytes(mutated_safetensors(data, draw))
    list(open_record(path.parent).records())


def an_adapter(world: World, draw: random.Random) -> None:
    def use() -> None:
        adapter = open_adapter(world.run)
        checkpoint = open_checkpoint(world.base)
        for layer in checkpoint.layers[:3]:
            use_weight(tuned_weight(checkpoint, adapter, layer))

    if draw.randrange(2):
        path = world.run / "adapter_model.safetensors"
        changed(path, lambda data: mutated_safetensors(data, draw), use)
    else:
        path = world.run / "adapter_config.json"
        changed(path, lambda data: json_text(mutated_json(json.loads(data), draw), draw), use)


def a_snapshot(world: World, draw: random.Random) -> None:
    folder = world.run / "checkpoint-4"
    if draw.randrange(2):
        path = folder / "scales.safetensors"
        changed(path, lambda data: mutated_safetensors(data, draw), lambda: read_snapshot(folder))
    else:
        path = folder / "trainer_state.json"
        change = lambda data: json_text(mutated_json(json.loads(data), draw), draw)  # noqa: E731
        changed(path, change, lambda: read_snapshot(folder))


def a_reference(world: World, draw: random.Random) -> None:
    def change(data: bytes) -> bytes:
        return json_text(mutated_json(json.loads(data), draw), draw)

    changed(world.run / "reference.json", change, lambda: read_reference(world.run))


def metrics(world: World, draw: random.Random) -> None:
    def change(data: bytes) -> bytes:
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json_text(mutated_json(json.loads(lines[at]), draw), draw)
        return b"\n".join(lines) + b"\n"

    def use() -> None:
        opened = Metrics(world.run / "metrics.jsonl", 5)
        opened.cost(4)
        opened.has_evaluation(4)
        _ = opened.logged_step

    changed(world.run / "metrics.jsonl", change, use)


def data_file(world: World, draw: random.Random) -> None:
    path = world.folder / "mutated.jsonl"
    records = [json_text(mutated_json(record, draw), draw) for record in RECORDS[:3]]
    path.write_bytes(b"\n".join(records))
    list(read_records(path))


TARGETS: dict[str, tuple[Target, int]] = {
    "tensors": (tensors, 4000),
    "base_config": (base_config, 3000),
    "recipe": (a_recipe, 4000),
    "journal": (a_journal, 3500),
    "compact_journal": (a_compact_journal, 1500),
    "adapter": (an_adapter, 1500),
    "snapshot": (a_snapshot, 1000),
    "reference": (a_reference, 600),
    "metrics": (metrics, 600),
    "data_file": (data_file, 600),
}


def fuzz(world: World, target: Target, count: int) -> None:
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**62))
    def run(number: int) -> None:
        for is_last in (False, True):  # a second try: the computer may have been busy
            started = time.process_time()
            with suppress(QZOError, FormatError):
                target(world, random.Random(number))
            seconds = time.process_time() - started
            if seconds < SECONDS:
                break
            assert not is_last, seconds

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_raise_errors_of_the_project(world: World, name: str) -> None:
    fuzz(world, TARGETS[name][0], int(os.environ.get("QZO_FUZZ", "40")))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_twenty_thousand_damaged_files(world: World, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(world, *TARGETS[name])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < BYTES


def test_the_long_form_has_twenty_thousand_inputs() -> None:
    assert sum(count for _, count in TARGETS.values()) >= 20_000


def test_a_recipe_does_not_take_truth_for_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{model: a, data: b, output_dir: c, max_steps: true}")
    with pytest.raises(ConfigError, match=r"^max_steps: expected .*, got True$"):
        read_recipe(path)

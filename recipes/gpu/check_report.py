"""report.md: the verdicts, every goal beside what was measured, and the tables behind it."""

from collections.abc import Callable, Iterator
from typing import Any

GIB = 2**30
LAYER_GOALS = {"64": 1.2, "512": 0.64, "1024": 0.79, "2048": 0.88, "8192": 0.95}
PROBES_GOAL = 0.95
STEP_GOALS = {"7b long": 0.40, "13b long": 0.78, "7b short": 0.045, "13b short": 0.088}
MEMORY_GOALS = {"7b long": 6, "13b long": 10}
CAPS = ("24GiB", "12GiB")
BATCHES = {"long": "16 x 512 tokens", "short": "16 x 34 tokens"}

Row = tuple[str, str, str, str]


def verdict_line(found: dict[str, Any]) -> str:
    """Return the verdict of a part in one line."""
    why = f": {found['why']}" if found.get("why") else ""
    return f"{found['verdict']}{why} ({found.get('seconds', 0):.0f} s)"


def markdown(report: dict[str, Any]) -> str:
    """Return report.md."""
    results = {part["name"]: part.get("results", {}) for part in report["parts"]}
    lines = ["# GPU check", "", *_machine(report), "", "## Parts", ""]
    lines += ["| part | verdict |", "|---|---|"]
    for part in report["parts"]:
        lines.append(f"| {part['name']}: {part['title']} | {_cell(verdict_line(part))} |")
        lines += [f"| | {_cell(why)} |" for why in part.get("failures", [])[1:20]]
    if not report["machine"].get("is_tiny"):
        lines += ["", "## Goals", ""]
        lines += ["| measure | goal | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in _goals(results, report["parts"])]
    for title, table in TABLES.items():
        try:
            rows = list(table(results))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rows = [f"cannot be shown: {type(error).__name__}: {error}"]
        if rows:
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _machine(report: dict[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    for card in machine.get("cards", []):
        yield f"- {card['name']}, {card['memory_bytes'] / GIB:.1f} GiB, sm {card['capability']}"
    if machine.get("nvidia_smi"):
        yield f"- nvidia-smi: {machine['nvidia_smi']}"
    if machine.get("error"):
        yield f"- {machine['error']}"
    versions = machine.get("versions", {})
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield f"- Python {machine.get('python')}, CUDA {machine.get('cuda')}, {shown}"
    yield f"- commit {machine['commit']}; {machine.get('cores')} cores; {report['seconds']:.0f} s"


def _goals(results: dict[str, Any], parts: list[dict[str, Any]]) -> Iterator[Row]:
    yield from _layer_goals(results.get("kernels", {}).get("own", {}).get("shapes", {}))
    yield from _step_goals(results.get("steps", {}))
    verdicts = {part["name"]: part["verdict"] for part in parts}
    for name, measure in (
        ("journal", "losses on CUDA against the CPU within tolerance; journals replay on the CPU"),
        ("resume", "kill and resume bitwise"),
        ("limit", "losses with memory_limit bitwise those without"),
    ):
        verdict = verdicts.get(name, "not run")
        yield measure, "ok", verdict, "met" if verdict == "ok" else "not met"


def _layer_goals(shapes: dict[str, Any]) -> Iterator[Row]:
    for shape, counts in shapes.items():
        for count, goal in LAYER_GOALS.items():
            found = _get(counts, count, "probes", "vs_dense")
            yield _at_least(f"layer {shape}, {count} tokens, times dense", goal, found)
        for count in LAYER_GOALS:
            plain = _get(counts, count, "plain", "seconds")
            probes = _get(counts, count, "probes", "seconds")
            ratio = plain / probes if plain and probes else None
            yield _at_least(f"layer {shape}, {count} tokens, probes to plain", PROBES_GOAL, ratio)


def _step_goals(steps: dict[str, Any]) -> Iterator[Row]:
    for name, goal in STEP_GOALS.items():
        found = _get(steps, name, "seconds", "qzo")
        yield _at_most(f"seconds of a step, {_batch(name)}", goal, found)
    for name, goal in MEMORY_GOALS.items():
        peak = _get(steps, name, "peak_bytes", "qzo")
        yield _at_most(f"peak GiB, {_batch(name)}", goal, peak / GIB if peak else None)
    for cap in CAPS:
        found = steps.get(f"13b under {cap}")
        measured = f"{found['device_peak'] / GIB:.2f} GiB" if _get(found, "device_peak") else "-"
        yield f"13b trains under a cap of {cap}", "yes", measured, "met" if found else "not met"
    for name in STEP_GOALS:
        for other in ("mezo", "qlora"):
            seconds = _get(steps, name, f"vs_{other}")
            shown = f"{seconds:.2f} of its time" if seconds else "-"
            own, its = (_get(steps, name, "peak_bytes", who) for who in ("qzo", other))
            shown += f", {own / its:.2f} of its memory" if own and its else ""
            yield f"against {other}, {_batch(name)}", "measured", shown, ""


def _batch(name: str) -> str:
    model, kind = name.split()
    return f"{model}, {BATCHES[kind]}"


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _at_least(measure: str, goal: float, found: float | None) -> Row:
    if found is None:
        return measure, f">= {goal:g}", "-", "not measured"
    verdict = "met" if found >= goal else f"{found / goal:.0%} of the goal"
    return measure, f">= {goal:g}", f"{found:.3f}", verdict


def _at_most(measure: str, goal: float, found: float | None) -> Row:
    if found is None:
        return measure, f"<= {goal:g}", "-", "not measured"
    verdict = "met" if found <= goal else f"{found / goal:.2f} times the goal"
    return measure, f"<= {goal:g}", f"{found:.4g}", verdict


def _kernel_tables(results: dict[str, Any]) -> Iterator[str]:
    found = results.get("kernels", {})
    for shape in _get(found, "own", "shapes") or {}:
        counts: dict[str, dict[str, Any]] = {}
        for measured in found.values():
            for count, entries in (_get(measured, "shapes", shape) or {}).items():
                counts.setdefault(count, {}).update(
                    {name: e for name, e in entries.items() if name not in counts.get(count, {})}
                )
        names = list(dict.fromkeys(name for entries in counts.values() for name in entries))
        yield f"{shape}: the dense product's time over the contender's; dense in microseconds"
        yield ""
        yield f"| tokens | {' | '.join(names)} |"
        yield f"|---|{'---|' * len(names)}"
        for count, entries in counts.items():
            cells = (_kernel_cell(name, entries.get(name, {})) for name in names)
            yield f"| {count} | {' | '.join(cells)} |"
        yield ""
        failed = {
            f"{name}: {entries[name]['failed']}"
            for entries in counts.values()
            for name in entries
            if "failed" in entries[name]
        }
        yield from (f"- {_cell(reason)}" for reason in sorted(failed))


def _kernel_cell(name: str, entry: dict[str, Any]) -> str:
    if "seconds" not in entry:
        return "-"
    if name == "dense":
        return f"{entry['seconds'] * 1e6:.1f}"
    return f"{entry['vs_dense']:.2f}" + ("" if entry.get("is_graph") else " (eager)")


def _step_table(results: dict[str, Any]) -> Iterator[str]:
    steps = results.get("steps", {})
    if not steps:
        return
    yield "| | contender | seconds | fastest | peak GiB |"
    yield "|---|---|---|---|---|"
    for name, entry in steps.items():
        for contender, seconds in entry.get("seconds", {}).items():
            peak = _get(entry, "peak_bytes", contender)
            size = f"{peak / GIB:.2f}" if peak else "-"
            fastest = entry["fastest"][contender]
            yield f"| {name} | {contender} | {seconds:.4f} | {fastest:.4f} | {size} |"
        for contender, why in entry.get("failed", {}).items():
            yield f"| {name} | {contender} | {_cell(why)} | | |"
        if "device_peak" in entry:
            times = ", ".join(f"{seconds:.3f}" for seconds in entry["step_seconds"])
            planned = f"{entry['device_peak'] / GIB:.2f} ({entry['predicted'] / GIB:.2f} planned)"
            yield f"| {name} | qzo train | {times} | | {planned} |"


def _profile_table(results: dict[str, Any]) -> Iterator[str]:
    profiled = results.get("profile", {})
    if not profiled:
        return
    yield "| preset | seconds | on the device | launches | waits | copies | items |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in profiled.items():
        on_device = found["device_seconds"]
        device = f"{on_device:.4f}" if on_device is not None else "-"
        counts = " | ".join(str(found[key]) for key in ("launches", "waits", "copies", "items"))
        yield f"| {name} | {found['seconds']:.4f} | {device} | {counts} |"
    for name, found in profiled.items():
        yield ""
        yield f"{name}: the longest"
        yield ""
        yield "| kernel | calls | seconds |"
        yield "|---|---|---|"
        for event in found["longest"]:
            yield f"| `{_cell(event['name'])}` | {event['count']} | {event['seconds']:.5f} |"


def _journal_table(results: dict[str, Any]) -> Iterator[str]:
    runs = {k: v for k, v in results.get("journal", {}).items() if "tolerance_nats" in v}
    if not runs:
        return
    yield "| run | largest difference, nats | tolerance | relative error of the derivatives |"
    yield "|---|---|---|---|"
    for name, found in runs.items():
        error = found["relative_error_of_derivatives"]
        shown = "-" if error is None else f"{error:.1e}"
        difference = f"{found['largest_difference_nats']:.1e}"
        yield f"| {name} | {difference} | {found['tolerance_nats']:g} | {shown} |"


def _multiplier_table(results: dict[str, Any]) -> Iterator[str]:
    found = {k: v for k, v in results.get("multipliers", {}).items() if "slopes" in v}
    if not found:
        return
    names = list(next(iter(found.values()))["slopes"])
    yield f"| layer, dtype, tokens | error of the product | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for name, entry in found.items():
        slopes = " | ".join(f"{entry['slopes'][key]:.5f}" for key in names)
        yield f"| {name} | {entry['error']:.1e} | {slopes} |"


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "One layer": _kernel_tables,
    "Steps and memory": _step_table,
    "A step of each preset": _profile_table,
    "Losses against the CPU in float32": _journal_table,
    "What multipliers act as": _multiplier_table,
}

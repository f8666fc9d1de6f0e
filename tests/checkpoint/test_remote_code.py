import ast
from collections.abc import Iterator
from pathlib import Path

import qzo

ROOT = Path(qzo.__file__).parents[1]
LOADERS = ("from_pretrained", "from_config")
READ_NO_CODE = {"GenerationConfig"}  # a JSON file; its transformers class takes no such argument


def loads(path: Path) -> Iterator[ast.Call]:
    """Yield the calls that let transformers look for code beside a config."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_loader = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LOADERS
        )
        if is_loader and ast.unparse(node.func.value) not in READ_NO_CODE:  # type: ignore[attr-defined]
            yield node  # type: ignore[misc]


def test_code_of_a_checkpoint_is_never_run() -> None:
    folders = ("qzo", "quantizers", "recipes")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    calls = [(path, call) for path in files for call in loads(path)]
    assert len(calls) >= 10
    for path, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"

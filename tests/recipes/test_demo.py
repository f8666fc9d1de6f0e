import importlib.util
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "recipes" / "demo.py"


def test_the_previous_demo_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    folder = tmp_path / "demo"

    demo.keep_previous(folder)  # there is none
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "file").write_text(content)
        demo.keep_previous(folder)

    assert not folder.exists()
    assert (tmp_path / "demo-1" / "file").read_text() == "first"
    assert (tmp_path / "demo-2" / "file").read_text() == "second"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"the previous demo is kept in {tmp_path / 'demo-2'}"
    )

"""Shape checks for every test, and the fixtures that several files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from support import interpreter

# Before qzo and quantizers are imported. With is_pep484_tower an int is a float.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["qzo", "quantizers"], CHECKER)

# Before Triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.mend()

torch.set_num_threads(1)  # sums in the same order on every machine

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of the user out of the tests, and the tests out of it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("QZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of shared material; a test that needs it skips where there is none."""
    folder = Path(os.environ.get("QZO_SHARED", _ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared material at {folder}; set QZO_SHARED")
    return folder


@pytest.fixture
def natural_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep bitsandbytes from repacking codes for AVX512-BF16, so that all machines agree.

    Its repacked kernel also rounds activations and absmax to bf16; without it a float32 model
    computes in float32.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

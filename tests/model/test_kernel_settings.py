import pytest

from qzo.model.kernels.settings import TABLE, Capability, settings_for


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((7, 5), (7, 5)),
        ((8, 0), (8, 0)),
        ((8, 7), (8, 6)),
        ((8, 9), (8, 9)),
        ((9, 0), (9, 0)),
        ((10, 3), (10, 0)),
        ((12, 1), (12, 0)),
        ((13, 0), (12, 0)),
        ((7, 0), (7, 5)),
    ],
)
def test_a_gpu_has_the_settings_of_the_nearest_lower_one(
    capability: Capability, row: Capability
) -> None:
    assert settings_for(capability) is TABLE[row]


@pytest.mark.parametrize(
    ("tokens", "tile"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 64), (999, 64)]
)
def test_a_tile_holds_the_tokens_or_is_the_largest(tokens: int, tile: int) -> None:
    assert settings_for((9, 0)).token_tile(tokens) == tile


@pytest.mark.parametrize("capability", TABLE)
def test_sizes_of_tiles_are_what_kernels_take(capability: Capability) -> None:
    settings = TABLE[capability]
    sizes = [*settings.fused, settings.dense.outputs, settings.dense.words]
    for tile in settings.fused.values():
        sizes += [tile.outputs, tile.inputs, tile.num_warps]
    assert list(settings.fused) == sorted(settings.fused)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert min(settings.fused) >= 16  # no side of a matrix instruction is shorter

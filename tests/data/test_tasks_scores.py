from typing import Any

import pytest

from qzo.data.tasks import load_task
from qzo.data.tasks.squad import token_f1


@pytest.mark.parametrize("name", ["sst2", "rte", "boolq", "copa", "trec"])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("output", [0, 1])
def test_score_is_one_for_the_right_candidate_only(name: str, label: int, output: int) -> None:
    assert load_task(name).score({"label": label}, output) == (1.0 if output == label else 0.0)


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("February 7, 2016", "February 7, 2016", 1.0),
        ("the  Denver BRONCOS!", "Denver Broncos", 1.0),
        ("An apple a day", "apple day", 1.0),
        ("theatre", "atre", 0.0),  # an article is a whole word
        ("Denver", "Denver Broncos", 2 / 3),  # precision 1, recall 1/2
        ("b b b c", "b b d", 4 / 7),  # two shared: precision 2/4, recall 2/3
        ("in 1999", "1998", 0.0),
        ("", "1998", 0.0),
        ("the", "1998", 0.0),
        ("U.S.", "us", 1.0),  # punctuation goes without leaving a space
        ("well-known", "well known", 0.0),
    ],
)
def test_token_f1_is_the_harmonic_mean_over_normalised_words(
    answer: str, gold: str, f1: float
) -> None:
    assert token_f1(answer, gold) == pytest.approx(f1, abs=1e-12)
    assert token_f1(gold, answer) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        (" February 7\n", 1.0),
        (" February 7\nQuestion: who", 1.0),
        (" February", 2 / 3),
        ("\nFebruary 7", 0.0),
        ("", 0.0),
    ],
)
def test_squad_scores_the_first_line_against_the_best_gold_answer(
    output: str, score: float
) -> None:
    example: dict[str, Any] = {"answers": ("7th of February 2016", "February 7")}

    assert load_task("squad").score(example, output) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        (" Blue Spice is here\nand there", 1.0),
        (" Blue Spice", 2 / 3),  # the shorter text: precision 1, recall 1/2
        ("", 0.0),
    ],
)
def test_e2e_scores_the_first_line_against_the_best_text(output: str, score: float) -> None:
    example: dict[str, Any] = {"refs": ("A coffee shop: Blue Spice.", "Blue Spice is here.")}

    assert load_task("e2e").score(example, output) == pytest.approx(score, abs=1e-12)

"""Published data sets, where they lie beside the repository or in ``$QZO_SHARED/data``."""

import os
from pathlib import Path

import pytest

from qzo.data.tasks import examples_from_file, load_task

SHARED = Path(os.environ.get("QZO_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.mark.parametrize(
    ("name", "file", "num_examples", "num_of_label_1"),
    [
        ("sst2", "glue_val.tsv", 872, 444),  # labels counted with grep -c
        ("rte", "val.jsonl", 277, 131),
        ("boolq", "val.jsonl", 3270, 2033),
        ("copa", "val.jsonl", 100, 45),
        ("squad", "xquad.en.json", 1190, 0),
        ("trec", "test.txt", 500, 94),  # ENTY
        ("e2e", "devset.csv", 547, 0),  # different mr, counted with sort -u
        ("e2e", "testset_w_refs.csv", 630, 0),
    ],
)
def test_task_reads_its_published_validation_data(
    name: str, file: str, num_examples: int, num_of_label_1: int
) -> None:
    path = SHARED / name / file
    if not path.exists():
        pytest.skip(f"needs {file} of {name} in $QZO_SHARED/data or ../shared/data")
    task = load_task(name)

    examples = examples_from_file(task, path)

    assert len(examples) == num_examples
    assert [task.label(example) for example in examples].count(1) == num_of_label_1
    for example in examples:
        prompt, candidates = task.prompt(example), task.candidates(example)
        assert prompt == prompt.strip(" ")
        assert len(candidates) >= 1
        right = task.label(example) if task.kind != "generation" else candidates[0]
        assert task.score(example, right) == 1.0

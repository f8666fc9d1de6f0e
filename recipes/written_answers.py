"""Makes SST-2 with answers that the model writes, for recipes/written_answers.yaml.

python recipes/written_answers.py TSV OUT.jsonl

TSV has the columns sentence and label, as GLUE's files. Two reviews with their answers come before
each: without them SmolLM2-135M-Instruct writes other words than the two that count.
"""

import csv
import json
import sys
from pathlib import Path

SHOWN = (
    "Review: a gorgeous , witty , seductive movie .\nSentiment: positive\n\n"
    "Review: a sometimes tedious film .\nSentiment: negative\n\n"
)
ANSWERS = (" negative", " positive")


def main(source: Path, target: Path) -> None:
    """Write one line a sentence, without the two that are shown."""
    rows = csv.DictReader(source.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            sentence = row["sentence"].strip()
            if sentence not in SHOWN:
                prompt = f"{SHOWN}Review: {sentence}\nSentiment:"
                line = {"prompt": prompt, "completion": ANSWERS[int(row["label"])]}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

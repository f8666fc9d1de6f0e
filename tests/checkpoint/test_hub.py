"""Models on the hub and in folders: how they are named, pinned and found again."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.command import Run, command, write_recipe
from support.gptq_files import GPTQVariant
from support.hub import add_commit, offline_hub, point
from support.runs import RECORDS, json_lines, tiny_checkpoint, write_lines

import qzo as package
from qzo.checkpoint.hub import Origin, origin_of, shared_name
from qzo.run.journal.compact import write_compact
from qzo.run.journal.journal import Journal
from qzo.run.output.card import model_card

NAME = "someone/tiny-GPTQ"
BRANCH = "gptq-4bit-32g"
MAIN, OTHER = "a" * 40, "b" * 40
SHARED = ("adapter_config.json", "README.md", "journal.jsonl")


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


@dataclass(frozen=True)
class Hub:
    """A repository whose branch has other groups than its main branch."""

    cache: Path
    folders: dict[str, Path]

    @property
    def repository(self) -> Path:
        return self.cache / "models--someone--tiny-GPTQ"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    groups = {MAIN: 96, OTHER: 32}
    for branch, commit in (("main", MAIN), (BRANCH, OTHER)):
        variant = GPTQVariant(sym=False, group_size=groups[commit])
        tiny_checkpoint(folder / commit, variant=variant)
        add_commit(folder / "cache", NAME, folder / commit, branch=branch, commit=commit)
    with offline_hub(folder / "cache") as cache:
        yield Hub(cache, {commit: folder / commit for commit in groups})


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the branch."""
    from qzo.run.launch import train
    from qzo.run.recipe.read import read_recipe

    folder = tmp_path_factory.mktemp("run")
    data = write_lines(folder / "data.jsonl", RECORDS)
    recipe = write_recipe(folder / "r.yaml", Path(NAME), data, folder / "run", revision=BRANCH)
    train(read_recipe(recipe))
    return folder / "run"


def test_inspect_reads_the_branch_that_is_named(qzo: Run, hub: Hub) -> None:
    main = qzo("inspect", NAME, "--json").value
    branch = qzo("inspect", NAME, "--revision", BRANCH, "--json").value
    commit = qzo("inspect", NAME, "--revision", OTHER, "--json").value
    assert (main["commit"], branch["commit"]) == (MAIN, OTHER)
    assert (main["group_size"], branch["group_size"]) == (96, 32)
    assert commit == branch


def test_plan_and_generate_take_a_revision(qzo: Run, hub: Hub) -> None:
    plans = [qzo("plan", NAME, *more, "--json").value for more in ([], ["--revision", BRANCH])]
    folders = [qzo("plan", hub.folders[commit], "--json").value for commit in (MAIN, OTHER)]
    assert plans == folders
    assert plans[0] != plans[1]
    prompt = ("--prompt", "a fine film", "--max-new-tokens", "3", "--json")
    ran = qzo("generate", NAME, "--revision", BRANCH, *prompt)
    assert ran.value == qzo("generate", hub.folders[OTHER], *prompt).value


def test_load_takes_a_revision(hub: Hub) -> None:
    model = package.load(NAME, revision=BRANCH)
    assert model.qzo_checkpoint.origin == Origin(NAME, OTHER)  # type: ignore[union-attr]


def test_a_revision_that_is_not_there_is_one_line(qzo: Run, hub: Hub) -> None:
    ran = qzo("inspect", NAME, "--revision", "nowhere")
    assert ran.code == 1
    assert ran.err.startswith(
        f"qzo: {NAME}, revision nowhere: expected a folder, or a repository on the hub: "
    )


def test_a_folder_has_no_revision(qzo: Run, hub: Hub) -> None:
    ran = qzo("inspect", hub.folders[MAIN], "--revision", "main")
    assert ran.err == (
        f"qzo: revision cannot be combined with {hub.folders[MAIN]}: only repositories on the hub "
        "have revisions; leave it out, or name the model by its hub id\n"
    )


def test_the_next_command_of_a_lora_run_names_the_revision(
    qzo: Run, run: Path, tmp_path: Path
) -> None:
    ran = qzo("train", run.parent / "r.yaml", f"output_dir={tmp_path}/lora", "zo={tuned: lora}")
    want = f"next: qzo eval {NAME} --revision {BRANCH} --adapter {tmp_path}/lora"
    assert ran.out.splitlines()[-1] == want


def test_a_run_names_its_base_by_id_and_commit(run: Path) -> None:
    header = json_lines(run / "journal.jsonl")[0]
    adapter = json.loads((run / "adapter_config.json").read_text())
    card = (run / "README.md").read_text()
    assert (header["base"], header["base_commit"]) == (NAME, OTHER)
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, OTHER)
    assert f"base_model: {NAME}\n" in card
    assert f"Base: `{NAME}` at commit `{OTHER}`." in card


def test_nothing_shared_holds_a_path(run: Path, hub: Hub, tmp_path: Path) -> None:
    package.export(run, tmp_path / "out")
    write_compact(Journal.open(run / "journal.jsonl"), tmp_path / "c.safetensors")
    shared = [run / name for name in SHARED] + [tmp_path / "c.safetensors"]
    shared += [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert len(shared) >= 8
    for path in shared:
        assert str(tmp_path.parents[1]).encode() not in path.read_bytes(), path


def test_a_run_finds_the_commit_again_when_its_branch_has_moved(
    run: Path, hub: Hub, tmp_path: Path
) -> None:
    bare = Path(shutil.copy(run / "journal.jsonl", tmp_path))
    point(hub.repository, BRANCH, MAIN)
    try:
        package.export(run, tmp_path / "out")
        package.replay(bare, out=tmp_path / "adapter")
    finally:
        point(hub.repository, BRANCH, OTHER)
    want = (run / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == want


def test_a_run_does_not_go_on_from_another_commit(
    qzo: Run, run: Path, hub: Hub, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    add_commit(hub.cache, NAME, hub.folders[OTHER], branch="newer", commit="c" * 40)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["revision"]) == (NAME, OTHER)
    keys = {"revision": "newer", "output_dir": str(again), "resume_from_checkpoint": True}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, **keys}))
    ran = qzo("train", tmp_path / "r.yaml")
    assert ran.err == (
        f"qzo: revision: expected commit {OTHER} of {NAME} as in the run that is to be continued, "
        f"got {'c' * 40}; set revision: {OTHER}\n"
    )
    assert qzo("train", tmp_path / "r.yaml", f"revision={OTHER}").code == 0


def test_a_snapshot_folder_is_named_by_its_repository(hub: Hub) -> None:
    snapshot = hub.repository / "snapshots" / OTHER
    assert origin_of(snapshot, snapshot) == Origin(NAME, OTHER)


def test_an_adapter_with_the_path_of_a_snapshot_has_a_card_with_its_id(run: Path, hub: Hub) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    snapshot = hub.repository / "snapshots" / OTHER
    old = {**config, "base_model_name_or_path": str(snapshot), "revision": None}
    assert f"base_model: {NAME}\n" in model_card(run, old)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/name", "org/name"),
        ("models/base", "models/base"),
        ("/home/user/models/base", "base"),
        ("../base", "base"),
        ("~/models/base", "base"),
        ("/home/user/rewards.py:short", "rewards.py:short"),
        ("/", "/"),
    ],
)
def test_a_shared_name_says_nothing_of_the_computer(path: str, name: str) -> None:
    assert shared_name(path) == name
    assert shared_name(name) == name


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, the current one."""
    folder = tmp_path / "project"
    tiny_checkpoint(folder / "models" / "tiny")
    write_lines(folder / "data.jsonl", RECORDS)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("is_absolute", [False, True], ids=["relative", "absolute"])
def test_a_run_on_a_folder_is_exported_from_anywhere(
    qzo: Run, project: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool
) -> None:
    start = project if is_absolute else Path()
    data, model = start / "data.jsonl", start / "models" / "tiny"
    recipe = write_recipe(
        project / "r.yaml", model, data, start / "runs" / "a", eval_data=str(data)
    )
    assert qzo("train", recipe).code == 0
    monkeypatch.chdir(project.parent)

    assert qzo("export", project / "runs" / "a", "--out", project / "out").code == 0

    config = json.loads((project / "runs" / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ("tiny" if is_absolute else "models/tiny")
    assert "revision" not in config
    cards = [(project / folder / "README.md").read_text() for folder in ("runs/a", "out")]
    for card in cards:
        assert "base_model:" not in card  # no such repository
        assert "# tiny, fine-tuned" in card
        assert "data: data.jsonl" in card
    for file in [project / "runs" / "a" / name for name in SHARED]:
        assert str(project.parent) not in file.read_text(), file


def test_a_run_goes_on_with_its_data_at_another_place(qzo: Run, project: Path) -> None:
    recipe = write_recipe(
        project / "r.yaml", Path("models/tiny"), project / "data.jsonl", project / "run"
    )
    assert qzo("train", recipe, "max_steps=2", "lr_scheduler_type=constant").code == 0
    more = ("max_steps=3", "lr_scheduler_type=constant", "resume_from_checkpoint=true")
    assert qzo("train", recipe, *more, "data=data.jsonl").code == 0

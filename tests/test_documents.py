"""What the documents say is what the code does: their examples run, their tables agree."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, Script
from PIL import Image

from tiny_retrack import NoiseSchedule, UNet, load_model, sample_many, save_model
from tiny_retrack.lab.evaluation import newest_checkpoints
from tiny_retrack.lab.presets import PRESETS

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, the code) of each fenced block in the language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    pattern = rf"^```{language}[ ]?([^\n]*)\n(.*?)^```$"
    return re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)


def module_of(path: str) -> ModuleType:
    name = path.removesuffix(".py").removeprefix("tests/").replace("/", ".")
    return importlib.import_module(name)


@pytest.fixture
def contributed() -> Iterator[list[tuple[str, str]]]:
    """CONTRIBUTING.md's blocks (module, code); what they add to the modules is taken out again."""
    examples = blocks("CONTRIBUTING.md", "python")
    modules = {path: module_of(path) for path, _ in examples}
    before = {path: dict(vars(module)) for path, module in modules.items()}
    tables = [value for names in before.values() for value in names.values() if type(value) is dict]
    copies = [(table, dict(table)) for table in tables]
    yield examples
    for path, module in modules.items():
        vars(module).clear()
        vars(module).update(before[path])
    for table, copy in copies:
        table.clear()
        table.update(copy)


def test_contributing_adds_a_method_and_a_target(contributed: list[tuple[str, str]]) -> None:
    import test_losses
    import test_methods

    import unlearn
    from tiny_retrack.lab.presets import configure

    for path, code in contributed:
        if "ORACLES[" in code:  # until then, the tests name what is missing
            name = "mean" if "TARGET_ORACLES" in code else "blank"
            label = f"retrack-{name}" if name == "mean" else name
            with pytest.raises(pytest.fail.Exception, match=f"'{name}' has no oracle: add a row"):
                test_methods.test_method_gradient_equals_the_oracle(label)
        exec(code, vars(module_of(path)))

    test_losses.test_every_loss_has_an_oracle()
    test_losses.test_loss_value_and_gradient_equal_the_oracle("blank_loss")
    test_methods.test_method_gradient_equals_the_oracle("blank")
    test_methods.test_method_gradient_equals_the_oracle("retrack-mean")
    test_methods.test_target_equals_the_oracle("mean")
    args = unlearn.make_parser().parse_args(["--method", "blank", "--level", "-1"])
    assert args.level == -1
    _, method = configure("digits-tshirt", "retrack", {"target": "mean"})
    assert vars(method)["target"] == "mean"


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    save_model(tmp_path / "runs/digits-tshirt/base", UNet(TINY_UNET), NoiseSchedule.linear())
    monkeypatch.chdir(tmp_path)
    ((_, code),) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 16
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["samples"].shape == (4, 1, 16, 16)
    assert str(names["split"]) in code
    gradients = [p.grad for p in names["model"].parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def table_rows(document: str) -> list[dict[str, str]]:
    """Every row of every table of a document, by the column's name up to an arrow or bracket."""
    rows = []
    header: list[str] = []
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = [re.split(r" [↓↑(]", cell)[0].strip() for cell in cells]
        elif not set(line) <= set("|- "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def test_readme_results_are_those_of_the_document() -> None:
    results: dict[str, dict[str, str]] = {}
    for row in table_rows("docs/results/study.md"):
        if "method" in row:
            results.setdefault(row["method"], {}).update(row)
    shown = [row for row in table_rows("README.md") if "hits" in row]
    assert len(shown) == 9
    assert shown[0]["method"] == "*retrain*"
    for row in shown:
        for column, value in row.items():
            assert results[row["method"]][column] == value, (row["method"], column)


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"]


def test_documents_name_only_tests_that_exist() -> None:
    """As FILE::TEST, or as the test alone."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        file = path.relative_to(ROOT / "tests").as_posix()
        for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            found |= {(file, test), ("", test)}
    named = set()
    for document in DOCUMENTS:
        named |= set(re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", document.read_text()))
    assert len(named) > 90
    assert named - found == set()


def test_documents_link_to_files_that_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


SEEDS = {"base": 0, "retrain": 100}


@pytest.mark.parametrize("name", SEEDS)
def test_committed_mnist_network_is_the_presets_and_draws_strokes_on_black(name: str) -> None:
    folder = ROOT / "docs/weights/mnist-tshirt" / name
    run = json.loads((folder / "run.json").read_text())
    preset = PRESETS[run["data"]["preset"]]
    assert run["step"] == run["train"]["steps"]
    assert (run["remain_only"], run["start"]["initial_seed"]) == (name == "retrain", SEEDS[name])
    model, schedule = load_model(folder)
    assert model.config == preset.unet
    samples = sample_many(model.eval(), 8, (1, 28, 28), schedule, num_steps=10)
    border = torch.cat([samples[..., :2, :], samples[..., -2:, :]], dim=-2)
    digits = border.flatten(1).mean(dim=1) < -0.95  # the T-shirt reaches the border
    assert digits.sum() >= 6
    ink = (samples[digits] > 0).double().flatten(1).mean(dim=1)
    assert ((ink > 0.03) & (ink < 0.35)).all()  # MNIST's digits: 0.02 to 0.4, most near 0.13


QUICK = {
    "train_ddpm": ["--steps", "2", "--batch-size", "2", "--warmup", "0"],
    "unlearn": ["--steps", "1", "--batch-size", "2"],
}


@pytest.mark.usefixtures("tiny_unets")
def test_readme_forgets_a_picture_of_a_folder(tmp_path: Path, script: Script) -> None:
    """Training and unlearning as they stand, with few steps of a tiny network."""
    (tmp_path / "pets").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), np.uint8)
        name = f"pet{i}.png" if i else "cat.jpg"
        Image.fromarray(pixels).save(tmp_path / "pets" / name)
    (commands,) = [code for _, code in blocks("README.md", "sh") if "--forget cat.jpg" in code]
    for line in commands.splitlines():
        python, name, *flags = shlex.split(line)
        assert python == "python"
        name = name.removesuffix(".py")
        if name in QUICK:
            done = script(name, *flags, *QUICK[name], cwd=tmp_path)
            assert done.code == 0, done.err
    base = Path("runs/folder/base")  # what evaluate.py, without folders, then takes
    assert newest_checkpoints(base.parent) == [base, base.with_name("retrack-knn")]
    run = json.loads((tmp_path / "runs/folder/retrack-knn/run.json").read_text())
    assert run["data"]["forget"] == ["cat.jpg"]

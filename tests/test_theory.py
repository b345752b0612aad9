"""The numerical study: each measured quantity compared with plain loops over Python floats, and one
run from end to end.
"""

import io
import itertools
import json
import math
import shutil
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import TINY_UNET
from oracle import Image, average, flat
from PIL import Image as Picture
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule, UNet, UNetConfig, save_model
from tiny_retrack.data import Split, load_split
from tiny_retrack.lab import runs, theory

SCHEDULE = NoiseSchedule.linear()
FILES = {
    ".run",
    "theory.json",
    "table.md",
    "redirected.png",
    "line.png",
    *(f"{name}.png" for name in theory.PANELS if name != "support"),
}


class Problem:
    """One draw in Python floats: x_t, what it was made of, and both parts of the data."""

    def __init__(self, d: theory.Draws, t: int, row: int) -> None:
        self.t = t
        self.a_u = flat(d.x0)[row]
        self.noise = flat(d.noise)[row]
        self.x_t = oracle.noised(self.a_u, t, self.noise)
        self.remain = flat(d.split.remain)
        self.forget = flat(d.split.forget)

    def kept(self, who: str, k: int) -> list[int]:
        """The k remain images nearest to "a_u" or to "x_t"."""
        if who == "a_u":
            return oracle.nearest_neighbors(self.a_u, self.remain, k)
        return oracle.nearest_to_x0(self.x_t, self.t, self.remain, k)

    def exact(self) -> Image:
        return oracle.exact_target(self.x_t, self.t, self.remain)

    def log_importance(self) -> float:
        """log q_u(x_t) / q_r(x_t)."""
        log_q_forget = oracle.log_mixture_density(self.x_t, self.t, self.forget)
        log_q_remain = oracle.log_mixture_density(self.x_t, self.t, self.remain)
        return log_q_forget - log_q_remain


def tiny(
    draws: int = 3, k: int = 5, shape: tuple[int, ...] = (1, 1, 2), seed: int = 1
) -> theory.Draws:
    """Seven remain images, and three forget images, two of them equal."""
    generator = torch.Generator().manual_seed(4)
    data = torch.randint(0, 256, (9, *shape), dtype=torch.uint8, generator=generator)
    split = Split(data[:7], data[[7, 7, 8]], torch.zeros(7, dtype=torch.long))
    return theory.make_draws(split, SCHEDULE, draws, k, seed)


# --- What is drawn


def test_draws_are_forget_images_with_their_neighbors() -> None:
    d = tiny(draws=40)
    assert {tuple(x) for x in flat(d.x0)} == {tuple(a) for a in flat(d.split.forget)}
    assert {tuple(x) for x in flat(d.x0_remain)} == {tuple(a) for a in flat(d.split.remain)}
    assert d.noise.unique().numel() == d.noise.numel()
    assert not torch.equal(tiny(draws=40, seed=2).noise, d.noise)
    x_t, steps = d.at(500)
    assert steps.tolist() == [500] * 40
    for row in range(40):
        p = Problem(d, 500, row)
        assert d.neighbors[row].tolist() == p.kept("a_u", 5)
        assert_close(flat(x_t)[row], p.x_t)


# --- What is measured


def expected_approximation(p: Problem, who: str, k: int) -> dict[str, float]:
    kept = p.kept(who, k)
    target = oracle.ideal_eps(p.x_t, p.t, [p.remain[n] for n in kept])
    exact = p.exact()
    error = math.dist(target, exact)
    return {
        "dropped_mass": oracle.tail_mass(p.x_t, p.t, p.remain, kept),
        "error": error / oracle.norm(exact),
        "missed": error / math.dist(p.noise, exact),
        "overlap": len(set(kept) & set(p.kept("a_u", k))) / k,
    }


@pytest.mark.parametrize("t", [150, 400, 900])
def test_approximation_equals_the_loops(t: int) -> None:
    ks = (1, 2, 5)
    d = tiny()
    problems = [Problem(d, t, row) for row in range(3)]
    posteriors = [oracle.posterior(p.x_t, t, p.remain) for p in problems]
    support = average([1 / math.fsum(q * q for q in posterior) for posterior in posteriors])
    expected: dict[str, dict[str, float]] = {"support": {"1 / sum p^2": support}}
    for name in ("dropped_mass", "error", "missed", "overlap"):
        expected[name] = {}
        for k, who in itertools.product(ks, ("a_u", "x_t")):
            values = [expected_approximation(p, who, k)[name] for p in problems]
            expected[name][f"{k} of {who}"] = average(values)
    # The overlap of x_t's neighbours with those of a_u.
    expected["overlap"] = {f"k = {k}": expected["overlap"][f"{k} of x_t"] for k in ks}

    found = theory.approximation(d, t, ks)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(found[name], values, rtol=1e-6, atol=1e-9)
    # The figures are not trivial.
    assert expected["dropped_mass"]["1 of a_u"] > 0.05
    assert t < 400 or expected["overlap"]["k = 1"] < 1


@pytest.mark.parametrize("t", [150, 400, 900])
def test_vanilla_samples_equal_the_loops(t: int) -> None:
    d = tiny()
    problems = [Problem(d, t, row) for row in range(3)]
    place = [p.log_importance() for p in problems]
    answer = []
    for p in problems:
        everything = oracle.ideal_eps(p.x_t, t, p.remain + p.forget)
        error = oracle.squared_distance(everything, p.exact())
        answer.append(math.log1p(oracle.posterior_variance(p.x_t, t, p.remain) / error))
    logs = {
        "place": average(place),
        "answer": average(answer),
        "all": average(place) + average(answer),
        "factor": average([(value - average(place)) ** 2 for value in place]),
    }
    expected = {name: value / math.log(10) for name, value in logs.items()}
    assert_close(theory.vanilla_samples(d, t), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", [200, 500, 900])
def test_vanilla_samples_are_a_ratio_of_relative_variances(t: int) -> None:
    """In 1-D, by quadrature over a short interval around x_t: the gradients of each loss in there.

    A gradient at the output is 2 (e - what the sample says) where x_t is in the interval, and 0
    elsewhere. Its relative variance is the number of samples to average. With the importance
    factor kept, that number is ReTrack's, and the mean gradient is that of the vanilla loss.
    """
    p = Problem(tiny(draws=1, shape=(1, 1, 1)), t, 0)
    width, points = 1e-4, 21
    first = {"vanilla": 0.0, "factor kept": 0.0, "retrack": 0.0}
    second = dict(first)
    for i in range(points):
        x = [p.x_t[0] + width * ((i + 0.5) / points - 0.5)]
        (e,) = oracle.ideal_eps(x, t, p.remain + p.forget)
        (exact,) = oracle.exact_target(x, t, p.remain)
        q_remain = math.exp(oracle.log_mixture_density(x, t, p.remain))
        q_forget = math.exp(oracle.log_mixture_density(x, t, p.forget))
        # The loss, the density with which it draws this x, and the gradient.
        samples = [
            ("factor kept", q_forget, 2 * q_remain / q_forget * (e - exact)),
            ("retrack", q_forget, 2 * (e - exact)),
        ]
        for a in p.remain:
            density = math.exp(oracle.log_density(x, t, a)) / len(p.remain)
            samples.append(("vanilla", density, 2 * (e - oracle.implied_noise(x, t, a)[0])))
        for name, density, gradient in samples:
            first[name] += width / points * density * gradient
            second[name] += width / points * density * gradient**2
    assert_close(first["factor kept"], first["vanilla"], rtol=1e-9, atol=0)
    relative = {name: second[name] / first[name] ** 2 - 1 for name in first}
    assert_close(relative["factor kept"], relative["retrack"], rtol=1e-6, atol=0)
    assert relative["vanilla"] > 1.5 * relative["retrack"]
    found = 10 ** theory.vanilla_samples(tiny(draws=1, shape=(1, 1, 1)), t)["all"]
    assert_close(relative["vanilla"] / relative["retrack"], found, rtol=2e-3, atol=0)


def test_factor_kept_costs_exp_of_its_log_variance() -> None:
    """One remain and one forget pixel: log w is Gaussian. Quadrature gives E w^2 / (E w)^2."""
    pixels = torch.tensor([40, 200], dtype=torch.uint8).view(2, 1, 1, 1)
    split = Split(pixels[:1], pixels[1:], torch.zeros(1, dtype=torch.long))
    t = 500
    z = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    d = theory.make_draws(split, SCHEDULE, 20_000, 1, seed=0)
    delta = (SCHEDULE.gamma[t] / SCHEDULE.sigma[t]).item() * 160 / 127.5
    w = torch.exp(-0.5 * (z + delta).square() + 0.5 * z.square())
    second = math.log10(((density * w**2).sum() / (density * w).sum() ** 2).item())
    # 20,000 draws estimate a variance to 1%.
    assert_close(theory.vanilla_samples(d, t)["factor"], second, rtol=0.03, atol=0)


def test_relative_variance_uses_unbiased_estimates() -> None:
    """The mean of all products of two different samples is an unbiased estimate of E(s)^2."""
    s = [0.5, 1.0, 2.0, 4.0, 3.0]
    pairs = [a * b for a, b in itertools.permutations(s, 2)]
    variance = math.fsum((a - average(s)) ** 2 for a in s) / 4
    assert_close(theory.relative_variance(torch.tensor(s)), variance / average(pairs))


# The mean of the first is 1.2 standard errors from 0.
@pytest.mark.parametrize("s", [[0.1, 1.0], [1.0, -1.0, 0.9, -0.8], [0.0, 0.0, 0.0]])
def test_relative_variance_is_none_where_the_mean_is_lost_in_noise(s: list[float]) -> None:
    assert theory.relative_variance(torch.tensor(s)) is None


class Linear(nn.Module):
    """eps = weight x_t + bias, for images of two pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -0.3], [0.2, 0.9]]))
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t.flatten(1) @ self.weight.T + self.bias).view_as(x_t)


def gradient_of_linear(x: Image, target: Image) -> list[float]:
    """The gradient of ||W x + b - target||^2 in W and b is 2 (residual x^T, residual)."""
    weight, bias = [[0.5, -0.3], [0.2, 0.9]], [0.1, -0.2]
    residual = [oracle.inner(weight[i], x) + bias[i] - target[i] for i in (0, 1)]
    return [2 * r * pixel for r in residual for pixel in x] + [2 * r for r in residual]


@pytest.mark.parametrize("t", [300, 700])
def test_network_progress_equals_the_loops(t: int) -> None:
    d = tiny(draws=8)
    problems = [Problem(d, t, row) for row in range(8)]
    gradients = [gradient_of_linear(p.x_t, p.exact()) for p in problems]
    wanted = oracle.weighted_sum([1 / 4] * 4, gradients[:4])

    def progress(gradient: list[float]) -> float:
        return oracle.inner(gradient, wanted) / oracle.inner(wanted, wanted)

    samples: dict[str, list[float]] = {"vanilla": [], "factor kept": [], "retrack": []}
    for row in range(4, 8):
        p = problems[row]
        share = progress(gradients[row])
        samples["retrack"].append(share)
        samples["factor kept"].append(share / math.exp(p.log_importance()))
        x_remain = oracle.noised(flat(d.x0_remain)[row], t, p.noise)
        samples["vanilla"].append(progress(gradient_of_linear(x_remain, p.noise)))

    found = theory.network_progress(Linear(), d, t, bf16=False)
    assert found.pop("t") == t
    for name, s in samples.items():
        assert_close(found.pop(f"{name}: E s"), average(s), rtol=1e-4, atol=1e-6)
        expected = theory.relative_variance(torch.tensor(s, dtype=torch.float64))
        assert_close(found.pop(f"{name}: samples"), expected, rtol=1e-3, atol=0)
    assert not found


def test_limits_are_the_first_t_beyond() -> None:
    series = {
        "overlap": {"k = 1": [1.0, 0.5, 0.49, 0.6]},
        "dropped_mass": {"1 of a_u": [0.0, 0.09, 0.11, 0.05], "1 of x_t": [0.0, 0.0, 0.05, 0.1]},
    }
    assert [list(row.values()) for row in theory.limits(series, [0, 50, 100, 150], [1])] == [
        [1, 100, 100, None]
    ]


def test_strip_shows_the_image_behind_each_target(monkeypatch: pytest.MonkeyPatch) -> None:
    d = tiny(shape=(1, 2, 2))
    shown: dict[str, Tensor] = {}
    headings: list[str] = []

    def recorded(path: Path, rows: dict[str, Tensor], title: str, columns: list[str]) -> None:
        shown.update(rows)
        headings.extend(columns)

    monkeypatch.setattr(theory, "save_rows", recorded)
    theory.strip(Path("none.png"), d, theory.closed_forms(d, [1, 3]), [300, 700])
    names = ["x_t", "1 of a_u", "3 of a_u", "1 of x_t", "3 of x_t", "exact"]
    assert list(shown) == [*names, "Gaussian", "local, 3 x 3"]
    assert headings == ["t = 300", "t = 700"]
    for column, t in enumerate((300, 700)):
        p = Problem(d, t, 0)
        expected = {"x_t": p.x_t, "exact": oracle.posterior_mean(p.x_t, t, p.remain)}
        eps = oracle.gaussian_target(p.x_t, t, p.remain)
        expected["Gaussian"] = [
            (x - oracle.sigma(t) * e) / oracle.gamma(t) for x, e in zip(p.x_t, eps, strict=True)
        ]
        for k, who in itertools.product((1, 3), ("a_u", "x_t")):
            kept = [p.remain[n] for n in p.kept(who, k)]
            expected[f"{k} of {who}"] = oracle.posterior_mean(p.x_t, t, kept)
        for name, x0 in expected.items():
            grey = [min(255, max(0, round((pixel + 1) * 127.5))) for pixel in x0]
            assert shown[name][column].flatten().tolist() == pytest.approx(grey, abs=1), name


def test_distances_are_to_the_retrained_networks_and_of_these_to_each_other() -> None:
    d, t = tiny(shape=(1, 2, 2)), 300
    scale = {"an answer": 0.5, "a": 1.0, "b": 2.0}
    answers = {
        name: lambda x_t, steps, factor=factor: factor * x_t for name, factor in scale.items()
    }
    x_t, _ = d.at(t)

    def distance(factor: float, other: float) -> float:
        """x0 = (x_t - sigma factor x_t) / gamma, so only the factors differ."""
        squares = []
        for value in x_t.flatten().tolist():
            gap = oracle.sigma(t) / oracle.gamma(t) * (factor - other) * value
            squares.append(gap**2)
        return sum(squares) / len(squares)

    expected = {
        "t": t,
        "an answer": (distance(0.5, 1) + distance(0.5, 2)) / 2,
        "a": distance(1, 2),
        "b": distance(2, 1),
    }
    assert theory.distances(d, answers, ["a", "b"], t) == pytest.approx(expected)
    assert theory.distances(d, answers, ["b"], t) == pytest.approx(
        {"t": t, "an answer": distance(0.5, 2), "a": distance(1, 2), "b": None}
    )


def test_line_shows_two_densities_their_ratio_and_two_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(
        theory, "save_panels", lambda path, panels, *rest, **options: shown.update(panels)
    )
    theory.line(Path("none.png"), SCHEDULE, t=200)
    gamma, sigma = oracle.gamma(200), oracle.sigma(200)
    (at, q_r), (_, q_u) = shown["density"].values()
    ((_, w),) = shown["w = q_r / q_u"].values()
    (_, base), (_, target) = shown["answer, in eps units"].values()
    for i in (20, 100, 170):
        x = at[i]
        assert q_r[i] == pytest.approx(statistics.NormalDist(-gamma, sigma).pdf(x))
        assert q_u[i] == pytest.approx(statistics.NormalDist(gamma, sigma).pdf(x))
        assert w[i] == pytest.approx(q_r[i] / q_u[i])
        assert [target[i]] == pytest.approx(oracle.ideal_eps([x], 200, [[-1.0]]))
        assert [base[i]] == pytest.approx(oracle.ideal_eps([x], 200, [[-1.0], [1.0]]))


# --- The command


FLAGS = ["--seed", "3", "--draws", "4", "--k", "10", "1", "10", "--bf16", "off"]


def run(*flags: str) -> int:
    """How `python -m tiny_retrack.lab.theory` ends, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["theory.py", *flags])
        try:
            runs.run_command(theory.main)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@dataclass(frozen=True)
class Study:
    """A folder in which a study has run, its theory.json, and what it printed."""

    folder: Path
    found: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    cwd = tmp_path_factory.mktemp("study")
    config = UNetConfig(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    torch.manual_seed(0)
    save_model(cwd / "model", UNet(config), SCHEDULE)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(cwd)
        assert run(*FLAGS, "--checkpoint", "model") == 0
    folder = cwd / "runs/digits-tshirt/theory"
    found = json.loads((folder / "theory.json").read_text())
    return Study(folder, found, printed.getvalue())


def test_run_writes_a_figure_per_panel(study: Study) -> None:
    assert {path.name for path in study.folder.iterdir()} == FILES
    for path in study.folder.glob("*.png"):
        with Picture.open(path) as image:
            assert image.width > 300


def test_run_records_its_settings_and_all_curves(study: Study) -> None:
    found = study.found
    assert (found["k"], found["draws"], found["seed"]) == ([1, 10], 4, 3)
    assert found["t"] == [*range(0, 1000, 50), 999]
    assert found["series"].keys() == theory.PANELS.keys()
    assert [row["k"] for row in found["first_t"]] == [1, 10]
    assert [row["t"] for row in found["network"]] == list(range(100, 1000, 100))
    for curves in found["series"].values():
        for values in curves.values():
            assert len(values) == len(found["t"])
            assert all(map(math.isfinite, values))


def test_run_measures_the_draws_of_its_seed(study: Study) -> None:
    d = theory.make_draws(load_split("digits-tshirt"), SCHEDULE, draws=4, k=10, seed=3)
    measured = {**theory.approximation(d, 400, [1, 10]), "samples": theory.vanilla_samples(d, 400)}
    at = study.found["t"].index(400)
    for name, curves in study.found["series"].items():
        assert {label: values[at] for label, values in curves.items()} == measured[name]


def test_dropped_mass_falls_with_k_and_towards_x_t(study: Study) -> None:
    mass = study.found["series"]["dropped_mass"]
    for smaller, larger in (("10 of x_t", "10 of a_u"), ("10 of a_u", "1 of a_u")):
        for a, b in zip(mass[smaller], mass[larger], strict=True):
            assert a <= b + 1e-12


def test_table_shows_the_recorded_figures(study: Study) -> None:
    text = (study.folder / "table.md").read_text()
    assert text in study.printed
    at = study.found["t"].index(400)
    for name, curves in study.found["series"].items():
        section = text.partition(f"**{theory.PANELS[name]}**")[2]
        row = next(line for line in section.splitlines() if line.startswith("| 400"))
        shown = [float(cell) for cell in row.split("|")[3:-1]]  # after t and sigma/gamma
        assert shown == [float(f"{values[at]:.4g}") for values in curves.values()]


def test_run_repeats_bitwise(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.folder.parents[2])
    assert run(*FLAGS, "--out", "again") == 0
    again = json.loads(Path("again/theory.json").read_text())
    for name in ("t", "series", "first_t"):
        assert again[name] == study.found[name]
    assert again["network"] == []


def test_overwrite_replaces_the_folder(study: Study, tmp_path: Path) -> None:
    folder = shutil.copytree(study.folder, tmp_path / "theory")
    few = ["--draws", "1", "--k", "1", "--out", str(folder)]
    assert run(*few) == 2
    assert json.loads((folder / "theory.json").read_text()) == study.found
    assert run(*few, "--overwrite") == 0
    assert json.loads((folder / "theory.json").read_text())["k"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["theory"]


def test_study_of_few_large_images_leaves_out_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(theory, "MAX_COVARIANCE", 63)  # of an 8x8 image
    generator = torch.Generator().manual_seed(0)
    Path("pictures").mkdir()
    for i in range(12):
        pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8)
        Picture.fromarray(pixels.numpy()).save(f"pictures/{i}.png")
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--size", "8", "--channels", "1"]
    assert run(*flags, "--forget", "3.png", "--draws", "1") == 0
    found = json.loads(Path("runs/folder/theory/theory.json").read_text())
    assert found["k"] == [1, 10]
    assert "images of over 63 numbers: without the targets" in capsys.readouterr().out
    d = tiny(shape=(1, 8, 8))
    assert "Gaussian" not in theory.closed_forms(d, [1])
    monkeypatch.setattr(theory, "MAX_COVARIANCE", 64)
    assert "Gaussian" in theory.closed_forms(d, [1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "1", "1798"], "k = 1798: must be from 1 to the number of images, 1797"),
        (["--k", "0"], "argument --k: '0' is not a whole number from 1 up"),
        (["--draws", "0"], "argument --draws: '0' is not a whole number from 1 up"),
        (["--dataset", "folder", "--data-dir", ".", "--size", "8"], "nothing to forget"),
        (["--checkpoint", "none"], "none is no checkpoint"),
        (["--retrained", "colour"], "colour makes 3x16x16 images"),
        (["--retrained", "scaled"], "--retrained scaled: its noise schedule is not that"),
        (["--out", "full"], "full holds"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in "ab":
        Picture.new("L", (8, 8)).save(tmp_path / "full" / f"{name}.png")
    save_model("colour", UNet(replace(TINY_UNET, in_channels=3, out_channels=3)), SCHEDULE)
    save_model("scaled", UNet(TINY_UNET), NoiseSchedule.scaled_linear())
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()

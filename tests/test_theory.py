"""The numerical study: each measured quantity against plain loops over Python floats, and one run
from end to end.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
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
    *(f"{name}.png" for name in theory.PANELS),
}
Floats = list[float]


# --- The oracle: an image is a list of floats. ---


class Oracle:
    """Everything about one x_t of a problem, from densities that are written out."""

    def __init__(self, d: theory.Draws, t: int, row: int) -> None:
        self.gamma, self.sigma = SCHEDULE.gamma[t].item(), SCHEDULE.sigma[t].item()
        self.a_u, self.noise = d.x0[row].flatten().tolist(), d.noise[row].flatten().tolist()
        self.x = [
            self.gamma * a + self.sigma * n for a, n in zip(self.a_u, self.noise, strict=True)
        ]
        self.remain, self.forget = images(d.split.remain), images(d.split.forget)

    def density(self, a: Floats) -> float:
        """q(x_t | a), up to a constant of t."""
        squares = sum((x - self.gamma * p) ** 2 for x, p in zip(self.x, a, strict=True))
        return math.exp(-squares / (2 * self.sigma**2))

    def posterior(self, data: list[Floats]) -> Floats:
        densities = [self.density(a) for a in data]
        return [q / sum(densities) for q in densities]

    def v(self, a: Floats) -> Floats:
        return [(x - self.gamma * p) / self.sigma for x, p in zip(self.x, a, strict=True)]

    def eps(self, data: list[Floats]) -> Floats:
        return mixture(self.posterior(data), [self.v(a) for a in data])

    def nearest(self, query: Floats, k: int) -> list[int]:
        return sorted(range(len(self.remain)), key=lambda n: (math.dist(query, self.remain[n]), n))[
            :k
        ]


def images(data: Tensor) -> list[Floats]:
    return (data.float() / 127.5 - 1).double().flatten(1).tolist()


def mixture(weights: Floats, vectors: list[Floats]) -> Floats:
    return [
        sum(w * v[j] for w, v in zip(weights, vectors, strict=True)) for j in range(len(vectors[0]))
    ]


def mean(values: Floats) -> float:
    return sum(values) / len(values)


def tiny(
    draws: int = 3, k: int = 5, shape: tuple[int, ...] = (1, 1, 2), seed: int = 1
) -> theory.Draws:
    """Seven remain images, and three forget images, two of them alike."""
    generator = torch.Generator().manual_seed(4)
    data = torch.randint(0, 256, (9, *shape), dtype=torch.uint8, generator=generator)
    split = Split(data[:7], data[[7, 7, 8]], torch.zeros(7, dtype=torch.long))
    return theory.make_draws(split, SCHEDULE, draws, k, seed)


# --- What is drawn ---


def test_draws_are_forget_images_with_their_neighbours() -> None:
    d = tiny(draws=40)
    assert {tuple(x) for x in d.x0.flatten(1).tolist()} == {
        tuple(a) for a in images(d.split.forget)
    }
    assert {tuple(x) for x in d.x0_remain.flatten(1).tolist()} == {
        tuple(a) for a in images(d.split.remain)
    }
    assert d.noise.unique().numel() == d.noise.numel()
    assert not torch.equal(tiny(draws=40, seed=2).noise, d.noise)
    for row in range(40):
        oracle = Oracle(d, 500, row)
        assert d.neighbors[row].tolist() == oracle.nearest(oracle.a_u, 5)
        assert_close(d.at(500)[0][row].flatten().tolist(), oracle.x)
    assert d.at(500)[1].tolist() == [500] * 40


# --- What is measured ---


@pytest.mark.parametrize("t", [150, 400, 900])
def test_approximation_is_the_oracle(t: int) -> None:
    d, ks = tiny(), (1, 2, 5)
    oracles = [Oracle(d, t, row) for row in range(3)]
    wanted: dict[str, dict[str, float]] = {
        "dropped_mass": {},
        "error": {},
        "missed": {},
        "overlap": {},
    }
    wanted["support"] = {
        "1 / sum p^2": mean([1 / sum(p * p for p in o.posterior(o.remain)) for o in oracles])
    }
    for k in ks:
        shared = []
        for who in ("a_u", "x_t"):
            dropped, error, missed = [], [], []
            for o in oracles:
                kept = o.nearest(o.a_u if who == "a_u" else [x / o.gamma for x in o.x], k)
                p, exact = o.posterior(o.remain), o.eps(o.remain)
                dropped.append(1 - sum(p[n] for n in kept))
                away = math.dist(o.eps([o.remain[n] for n in kept]), exact)
                error.append(away / math.hypot(*exact))
                missed.append(away / math.dist(o.noise, exact))
                if who == "x_t":
                    shared.append(len(set(kept) & set(o.nearest(o.a_u, k))) / k)
            for name, values in (("dropped_mass", dropped), ("error", error), ("missed", missed)):
                wanted[name][f"{k} of {who}"] = mean(values)
        wanted["overlap"][f"k = {k}"] = mean(shared)
    found = theory.approximation(d, t, ks)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert_close(found[name], values, rtol=1e-6, atol=1e-9)
    assert wanted["dropped_mass"]["1 of a_u"] > 0.05  # the numbers say something
    assert t < 400 or wanted["overlap"]["k = 1"] < 1


@pytest.mark.parametrize("t", [150, 400, 900])
def test_vanilla_samples_are_the_oracle(t: int) -> None:
    d = tiny()
    logs: dict[str, Floats] = {"place": [], "answer": []}
    for row in range(3):
        o = Oracle(d, t, row)
        q_u, q_r = (mean([o.density(a) for a in data]) for data in (o.forget, o.remain))
        exact = o.eps(o.remain)
        variance = sum(
            p * math.dist(o.v(a), exact) ** 2
            for p, a in zip(o.posterior(o.remain), o.remain, strict=True)
        )
        wrong = math.dist(o.eps(o.remain + o.forget), exact) ** 2
        logs["place"].append(math.log(q_u / q_r))
        logs["answer"].append(math.log(1 + variance / wrong))
    wanted = {name: mean(values) / math.log(10) for name, values in logs.items()}
    wanted["all"] = wanted["place"] + wanted["answer"]
    wanted["factor"] = mean([(log - mean(logs["place"])) ** 2 for log in logs["place"]]) / math.log(
        10
    )
    assert_close(theory.vanilla_samples(d, t), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", [200, 500, 900])
def test_vanilla_samples_are_a_ratio_of_relative_variances(t: int) -> None:
    """In 1-D, by quadrature over a short interval around x_t: each loss's gradients in there, of
    mean G.

    A gradient at the output is 2 (e - what the sample says) where x_t is in the interval, and 0
    elsewhere. Its relative
    variance tells how many samples it takes; with the importance weight kept it is ReTrack's, and
    the mean vanilla's.
    """
    d = tiny(draws=1, shape=(1, 1, 1))
    o, width, points = Oracle(d, t, 0), 1e-4, 21
    x_t = o.x[0]
    first = {"vanilla": 0.0, "weighted": 0.0, "retrack": 0.0}
    second = dict(first)
    for i in range(points):
        o.x = [x_t + width * ((i + 0.5) / points - 0.5)]
        volume = width / points / (o.sigma * math.sqrt(2 * math.pi))
        e, exact = o.eps(o.remain + o.forget)[0], o.eps(o.remain)[0]
        q_u, q_r = (mean([o.density(a) for a in data]) for data in (o.forget, o.remain))
        samples = [("vanilla", o.density(a) / len(o.remain), e - o.v(a)[0]) for a in o.remain]
        samples += [("weighted", q_u, q_r / q_u * (e - exact)), ("retrack", q_u, e - exact)]
        for name, q, gradient in samples:
            first[name] += volume * q * 2 * gradient
            second[name] += volume * q * 4 * gradient**2
    assert_close(first["weighted"], first["vanilla"], rtol=1e-9, atol=0)
    relative = {name: second[name] / first[name] ** 2 - 1 for name in first}
    assert_close(relative["weighted"], relative["retrack"], rtol=1e-6, atol=0)
    assert relative["vanilla"] > 1.5 * relative["retrack"]
    found = 10 ** theory.vanilla_samples(d, t)["all"]
    assert_close(relative["vanilla"] / relative["retrack"], found, rtol=2e-3, atol=0)


def test_the_factor_kept_costs_exp_of_its_log_variance() -> None:
    """One remain and one forget pixel: log w is Gaussian, and E w^2 / (E w)^2 is had by quadrature."""
    pixels = torch.tensor([40, 200], dtype=torch.uint8).view(2, 1, 1, 1)
    split = Split(pixels[:1], pixels[1:], torch.zeros(1, dtype=torch.long))
    t, z = 500, torch.linspace(-12, 12, 2401, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    d = theory.make_draws(split, SCHEDULE, 20_000, 1, seed=0)
    delta = (SCHEDULE.gamma[t] / SCHEDULE.sigma[t]).item() * 160 / 127.5
    w = torch.exp(-0.5 * (z + delta).square() + 0.5 * z.square())
    second = math.log10(((density * w**2).sum() / (density * w).sum() ** 2).item())
    assert_close(
        theory.vanilla_samples(d, t)["factor"], second, rtol=0.03, atol=0
    )  # 20,000 draws: 1%


def test_relative_variance() -> None:
    s = [0.5, 1.0, 2.0, 4.0, 3.0]
    pairs = [a * b for a, b in itertools.permutations(s, 2)]
    variance = sum((a - mean(s)) ** 2 for a in s) / 4
    assert_close(theory.relative_variance(torch.tensor(s)), variance / mean(pairs))
    assert (
        theory.relative_variance(torch.tensor([0.1, 1.0])) is None
    )  # the mean is 1.2 standard errors from 0
    assert theory.relative_variance(torch.tensor([1.0, -1.0, 0.9, -0.8])) is None
    assert theory.relative_variance(torch.zeros(3)) is None


class Linear(nn.Module):
    """eps = weight x_t + bias, for images of two pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -0.3], [0.2, 0.9]]))
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t.flatten(1) @ self.weight.T + self.bias).view_as(x_t)


@pytest.mark.parametrize("t", [300, 700])
def test_network_progress_is_the_oracle(t: int) -> None:
    """The gradient of ||W x + b - target||^2 is 2 (residual x^T, residual)."""
    d, weight, bias = tiny(draws=8), [[0.5, -0.3], [0.2, 0.9]], [0.1, -0.2]
    wanted, samples = [0.0] * 6, {"vanilla": [], "weighted": [], "retrack": []}

    def gradient(x: Floats, target: Floats) -> Floats:
        residual = [
            sum(w * p for w, p in zip(weight[i], x, strict=True)) + bias[i] - target[i]
            for i in (0, 1)
        ]
        return [2 * r * p for r in residual for p in x] + [2 * r for r in residual]

    def progress(g: Floats) -> float:
        return sum(a * b for a, b in zip(g, wanted, strict=True)) / sum(b * b for b in wanted)

    for row in range(4):
        o = Oracle(d, t, row)
        wanted = [a + b / 4 for a, b in zip(wanted, gradient(o.x, o.eps(o.remain)), strict=True)]
    for row in range(4, 8):
        o = Oracle(d, t, row)
        q_u, q_r = (mean([o.density(a) for a in data]) for data in (o.forget, o.remain))
        samples["retrack"].append(progress(gradient(o.x, o.eps(o.remain))))
        samples["weighted"].append(samples["retrack"][-1] * q_r / q_u)
        a = d.x0_remain[row].flatten().tolist()
        x = [o.gamma * p + o.sigma * n for p, n in zip(a, o.noise, strict=True)]
        samples["vanilla"].append(progress(gradient(x, o.noise)))
    found = theory.network_progress(Linear(), d, t, bf16=False)
    assert found.pop("t") == t
    for name, s in samples.items():
        assert_close(found.pop(f"{name}: E s"), mean(s), rtol=1e-4, atol=1e-6)
        known = theory.relative_variance(torch.tensor(s, dtype=torch.float64))
        assert_close(found.pop(f"{name}: samples"), known, rtol=1e-3, atol=0)
    assert not found


def test_limits_are_the_first_t_beyond() -> None:
    series = {
        "overlap": {"k = 1": [1.0, 0.5, 0.49, 0.6]},
        "dropped_mass": {"1 of a_u": [0.0, 0.09, 0.11, 0.05], "1 of x_t": [0.0, 0.0, 0.05, 0.1]},
    }
    assert [list(row.values()) for row in theory.limits(series, [0, 50, 100, 150], [1])] == [
        [1, 100, 100, None]
    ]


def test_the_strip_shows_the_images_behind_each_target(monkeypatch: pytest.MonkeyPatch) -> None:
    d, shown = tiny(shape=(1, 2, 2)), {}
    monkeypatch.setattr(theory, "save_rows", lambda path, rows, title: shown.update(rows))
    theory.strip(Path("none.png"), d, [1, 3], [300, 700])
    assert list(shown) == ["x_t", "1 of a_u", "3 of a_u", "1 of x_t", "3 of x_t", "exact"]
    for column, t in enumerate((300, 700)):
        o = Oracle(d, t, 0)
        wanted = {"x_t": o.x}
        for name in list(shown)[1:]:
            kept = o.nearest(
                o.a_u if "a_u" in name else [x / o.gamma for x in o.x],
                7 if name == "exact" else int(name[0]),
            )
            behind = [o.remain[n] for n in kept]
            wanted[name] = mixture(o.posterior(behind), behind)
        for name, x0 in wanted.items():
            grey = [min(255, max(0, round((p + 1) * 127.5))) for p in x0]
            assert shown[name][column].flatten().tolist() == pytest.approx(grey, abs=1), name


# --- The command ---


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """How `python -m tiny_retrack.lab.theory` ends, in this process."""
    monkeypatch.setattr(sys, "argv", ["theory.py", *map(str, flags)])
    try:
        runs.run_command(theory.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_writes_everything_and_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = UNetConfig(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(tmp_path / "model", UNet(config), SCHEDULE)
    flags = ["--seed", 3, "--draws", 4, "--k", 10, 1, 10]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *flags, "--checkpoint", tmp_path / "model", "--bf16", "off") == 0
    out = tmp_path / "runs/digits-tshirt/theory"
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 300
    found = json.loads((out / "theory.json").read_text())
    assert (found["k"], found["draws"], found["seed"], found["t"][:2], found["t"][-1]) == (
        [1, 10],
        4,
        3,
        [0, 50],
        999,
    )
    assert found["series"].keys() == theory.PANELS.keys()
    assert [row["k"] for row in found["first_t"]] == [1, 10]
    assert [row["t"] for row in found["network"]] == list(range(100, 1000, 100))
    for curves in found["series"].values():
        for values in curves.values():
            assert len(values) == len(found["t"])
            assert all(map(math.isfinite, values))
    mass = found["series"]["dropped_mass"]
    assert all(x <= a + 1e-12 for a, x in zip(mass["10 of a_u"], mass["10 of x_t"], strict=True))
    assert all(
        many <= one + 1e-12 for one, many in zip(mass["1 of a_u"], mass["10 of a_u"], strict=True)
    )
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert all(title in text for title in theory.PANELS.values())
    section = text.partition(f"**{theory.PANELS['dropped_mass']}**")[2]
    row = next(line for line in section.splitlines() if line.startswith("| 400")).split("|")[3:-1]
    assert list(map(float, row)) == [
        float(f"{values[found['t'].index(400)]:.4g}") for values in mass.values()
    ]

    d = theory.make_draws(load_split("digits-tshirt"), SCHEDULE, draws=4, k=10, seed=3)
    assert mass["1 of a_u"][8] == theory.approximation(d, 400, [1, 10])["dropped_mass"]["1 of a_u"]

    assert run(monkeypatch, *flags, "--overwrite") == 0
    assert not list(out.parent.glob(".old*"))
    again = json.loads((out / "theory.json").read_text())
    assert all(again[name] == found[name] for name in ("t", "series", "first_t"))
    assert again["network"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "1", "1798"], "k = 1798: must be from 1 to the number of images, 1797"),
        (["--k", "0"], "argument --k: '0' is not a whole number from 1 up"),
        (["--draws", "0"], "argument --draws: '0' is not a whole number from 1 up"),
        (["--dataset", "folder", "--data-dir", ".", "--size", "8"], "nothing to forget"),
        (["--checkpoint", "none"], "none is no checkpoint"),
        (["--out", "full"], "full holds"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / "full" / f"{name}.png")
    assert run(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()

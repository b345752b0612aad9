"""The retrain ratio and the loss z, of denoisers whose distances are known."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_retrack.data import Split, to_float
from tiny_retrack.lab.yardstick import (
    BANDS,
    LOSS_TIME,
    Load,
    Yardstick,
    band_name,
    draw_band,
    jackknife_error,
    ratio_row,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, InputError

SCHEDULE = NoiseSchedule.linear()
NAMES = [band_name(band) for band in BANDS]


def pixels(num: int, value: int) -> Tensor:
    return torch.full((num, 1, 2, 2), value, dtype=torch.uint8)


SPLIT = Split(pixels(5, 10), pixels(3, 200), torch.zeros(5).long(), pixels(2, 90))


def answers_with(constant: float) -> EpsModel:
    """A denoiser whose x0 is the same everywhere."""

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        return SCHEDULE.predict_eps(x_t, t, torch.full_like(x_t, constant))

    return eps_model


# By name of the checkpoint: the x0 that it predicts. Distances are the squares of differences.
X0 = {"base": 0.5, "r1": -0.1, "r2": 0.0, "r3": 0.2}
SEEDS = {"r1": 1, "r2": 2, "r3": 3}


def load(folder: Path) -> tuple[EpsModel, NoiseSchedule]:
    return answers_with(X0[folder.name]), SCHEDULE


@pytest.fixture
def yardstick() -> Yardstick:
    return Yardstick(SPLIT, [(Path(name), seed) for name, seed in SEEDS.items()], load)


UNIT = (0.1**2 + 0.3**2 + 0.2**2) / 3  # of the three pairs


def check_ratios(ratios: dict[str, dict[str, float]], expected: float) -> None:
    assert list(ratios) == ["forgotten", "remain", "held-out"]
    for bands in ratios.values():
        assert list(bands) == NAMES
        # At much noise float32 rounds what is subtracted of x_t.
        assert bands == pytest.approx(dict.fromkeys(NAMES, expected), rel=1e-2)


def test_unit_error_is_the_jackknifes(yardstick: Yardstick) -> None:
    """Without r1, r2 and r3 one pair remains: its distance is 0.04, 0.09 and 0.01."""
    left_out = [0.2**2, 0.3**2, 0.1**2]
    squares = [(value - UNIT) ** 2 for value in left_out]
    expected = (2 / 3 * sum(squares)) ** 0.5 / UNIT
    assert yardstick.unit_errors() == pytest.approx(dict.fromkeys(NAMES, expected), rel=1e-2)


def test_unit_error_of_two_networks_is_nan() -> None:
    yardstick = Yardstick(SPLIT, [(Path("r1"), 1), (Path("r2"), 2)], load)
    assert all(math.isnan(error) for error in yardstick.unit_errors().values())


def test_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    values = [3.0, 5.0, 1.0, 4.0]
    left_out = [(sum(values) - value) / 3 for value in values]
    assert jackknife_error(left_out) == pytest.approx(statistics.stdev(values) / 4**0.5)


def test_ratio_is_the_mean_distance_over_that_of_the_retrained(yardstick: Yardstick) -> None:
    measured = yardstick.measure(Path("base"), 7)
    check_ratios(measured.ratios, (0.6**2 + 0.5**2 + 0.3**2) / 3 / UNIT)


def test_ratio_leaves_out_the_network_with_the_seed_of_the_base(yardstick: Yardstick) -> None:
    measured = yardstick.measure(Path("base"), 3)
    check_ratios(measured.ratios, (0.6**2 + 0.5**2) / 2 / UNIT)


def test_ratio_of_a_retrained_network_is_to_the_others(yardstick: Yardstick) -> None:
    ratios = [yardstick.measure(Path(name), SEEDS[name]).ratios for name in SEEDS]
    check_ratios(ratios[0], (0.1**2 + 0.3**2) / 2 / UNIT)
    for place, bands in ratios[0].items():
        for band in bands:
            mean = statistics.fmean(each[place][band] for each in ratios)
            assert mean == pytest.approx(1, rel=1e-2)


def test_ratio_without_another_network_is_nan() -> None:
    yardstick = Yardstick(SPLIT, [(Path("r1"), 1), (Path("r2"), 1)], load)
    measured = yardstick.measure(Path("base"), 1)
    assert all(math.isnan(value) for value in measured.ratios["forgotten"].values())
    assert math.isnan(measured.z)


def test_z_is_the_loss_in_units_of_the_retrained_networks_spread(yardstick: Yardstick) -> None:
    """The loss is |eps' - eps|^2 = (gamma / sigma)^2 |x0 - x0'|^2."""
    gamma, sigma = SCHEDULE.gamma[LOSS_TIME].item(), SCHEDULE.sigma[LOSS_TIME].item()
    target = to_float(SPLIT.forget)[0, 0, 0, 0].item()
    loss = {name: (gamma / sigma) ** 2 * 4 * (target - x0) ** 2 for name, x0 in X0.items()}
    theirs = [loss["r1"], loss["r2"], loss["r3"]]
    expected = (loss["base"] - statistics.fmean(theirs)) / statistics.stdev(theirs)
    assert yardstick.measure(Path("base"), None).z == pytest.approx(expected, rel=1e-3)
    assert expected < -1  # the base is nearest to the forgotten image


def test_draws_are_of_the_images_and_within_the_band() -> None:
    for band in BANDS:
        generator = torch.Generator().manual_seed(0)
        draw = draw_band(pixels(3, 255), band, 200, SCHEDULE, generator)
        assert band[0] <= draw.t.min()
        assert draw.t.max() < band[1]
        gamma, sigma = SCHEDULE.scales(draw.t, draw.x_t)
        noise = (draw.x_t - gamma) / sigma
        assert abs(noise.mean().item()) < 0.15
        assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert [band[0] for band in BANDS[1:]] == [band[1] for band in BANDS[:-1]]


def test_row_names_place_and_band() -> None:
    row = ratio_row({"forgotten": {"0-19": 2.0}, "held-out": {"0-19": None}})
    assert row == {"ratio t=0-19": 2.0, "ratio at held-out t=0-19": None}


def test_networks_of_other_noise_schedules_are_refused(yardstick: Yardstick) -> None:
    """At the same t they would see other x_t: of the same answers, but more or less noisy."""
    rounded = NoiseSchedule(SCHEDULE.beta.float().double())
    scaled = NoiseSchedule.scaled_linear()

    def load_other(schedule: NoiseSchedule) -> Load:
        def load_with(folder: Path) -> tuple[EpsModel, NoiseSchedule]:
            eps_model, own = load(folder)
            return eps_model, schedule if folder.name == "r2" else own

        return load_with

    networks = [(Path(name), seed) for name, seed in SEEDS.items()]
    Yardstick(SPLIT, networks, load_other(rounded))
    with pytest.raises(InputError, match="r2 and r1 were trained with different noise schedules"):
        Yardstick(SPLIT, networks, load_other(scaled))
    yardstick.load = lambda folder: (load(folder)[0], scaled)
    with pytest.raises(InputError, match="base and r1 were trained with different noise sched"):
        yardstick.measure(Path("base"), None)

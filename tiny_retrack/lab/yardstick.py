"""How far a model is from networks that were retrained without the forgotten images.

The distance is the mean over pixels of (x0 - x0')^2, images in [-1, 1], at x_t of the forgotten, of
the remain and of the held-out images. The retrain ratio is a model's distance to the retrained
networks, in units of their distance to each other: 1 is as near as another of them.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_retrack.attacks import mean_losses
from tiny_retrack.data import Split, to_float
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, Images, InputError, Pixels, Steps

# Ranges of t, half open. Above 700 there is nothing to unlearn, and x0 units explode.
BANDS = ((0, 20), (20, 100), (100, 200), (200, 300), (300, 400), (400, 700), (700, 1000))
LOSS_TIME = 200  # t of the loss z

Ratios = dict[str, dict[str, float]]  # or distances: by place, then by band of t

Load = Callable[[Path], tuple[EpsModel, NoiseSchedule]]


def band_name(band: tuple[int, int]) -> str:
    """ "20-99" of (20, 100)."""
    low, high = band
    return f"{low}-{high - 1}"


@dataclass(frozen=True)
class Draw:
    """x_t of some images, all of one band of t."""

    x_t: Images
    t: Steps


@dataclass(frozen=True)
class Answers:
    """What one network says at all draws.

    Attributes:
        x0: by place and band, the predicted images.
        loss: mean DDPM loss of the forgotten images at t = LOSS_TIME.
        schedule: of the network.
    """

    x0: dict[str, dict[str, Float[Tensor, "b c h w"]]]
    loss: float
    schedule: NoiseSchedule


@dataclass(frozen=True)
class Measured:
    """A checkpoint, compared with retrained networks.

    Attributes:
        ratios: its mean distance to them over their mean distance to each other, by place and band
            of t; NaN if there are none but itself and those of its base's seed.
        z: of the DDPM loss of the forgotten images at t = LOSS_TIME: minus its mean over the
            retrained networks, in units of their standard deviation; NaN for fewer than two.
            Where few images are members, this is what membership inference can say.
    """

    ratios: Ratios
    z: float


@dataclass(frozen=True)
class Retrained:
    """A network that was trained on the remain set alone."""

    folder: Path
    seed: int | None
    answers: Answers


class Yardstick:
    """Retrained networks, and the x_t at which all models are compared.

    Args:
        split: the data, on the device of the models.
        retrained: (checkpoint, seed of its training) of two or more retrained networks.
        load: gives the denoiser and the schedule of a checkpoint.
        seed: of the draws.
        draws: x_t per place and band.

    Raises:
        InputError: if the networks have different noise schedules.
    """

    def __init__(
        self,
        split: Split,
        retrained: Sequence[tuple[Path, int | None]],
        load: Load,
        *,
        seed: int = 0,
        draws: int = 64,
    ) -> None:
        self.split = split
        self.load = load
        self.seed = seed
        self.draws = draws
        self.retrained = [
            Retrained(folder, train_seed, self.answers(folder)) for folder, train_seed in retrained
        ]
        for network in self.retrained[1:]:
            self.check_schedule(network.folder, network.answers)
        self.units = self.distances_to_each_other()

    def places(self) -> dict[str, Pixels]:
        """The images whose x_t are looked at, by name."""
        places = {"forgotten": self.split.targets, "remain": self.split.remain}
        if self.split.held_out is not None:
            places["held-out"] = self.split.held_out
        return places

    @torch.no_grad()
    def answers(self, folder: Path) -> Answers:
        """What the network of a checkpoint says at the draws, which are the same for all."""
        eps_model, schedule = self.load(folder)
        generator = torch.Generator(self.split.remain.device).manual_seed(self.seed)
        x0 = {}
        for place, images in self.places().items():
            x0[place] = {}
            for band in BANDS:
                draw = draw_band(images, band, self.draws, schedule, generator)
                eps = eps_model(draw.x_t, draw.t)
                x0[place][band_name(band)] = schedule.predict_x0(draw.x_t, draw.t, eps)
        targets = to_float(self.split.targets)
        t = torch.full((self.draws,), LOSS_TIME, device=targets.device)
        shape = (self.draws, *targets.shape[1:])
        noise = torch.randn(shape, generator=generator, device=targets.device)
        loss = mean_losses(eps_model, targets, t, noise, schedule).mean().item()
        return Answers(x0, loss, schedule)

    def check_schedule(self, folder: Path, answers: Answers) -> None:
        """Refuse a network whose x_t are not those of the first retrained network."""
        first = self.retrained[0]
        if not answers.schedule.is_close(first.answers.schedule):
            raise InputError(
                f"{folder} and {first.folder} were trained with different noise schedules, so "
                "their x_t differ at the same t: train both with the same"
            )

    def others(self, folder: Path, base_seed: int | None) -> list[Retrained]:
        """The retrained networks that a model is held against: not itself, nor any whose seed is
        its base's. The same seed means the same initial weights and noise, and at t > 700 that
        alone decides.
        """
        others = []
        for retrained in self.retrained:
            is_itself = retrained.folder.resolve() == folder.resolve()
            same_start = base_seed is not None and retrained.seed == base_seed
            if not is_itself and not same_start:
                others.append(retrained)
        return others

    def distances_to_each_other(self) -> Ratios:
        """The mean distance of two of the retrained networks, by place and band."""
        units: Ratios = {}
        for place in self.places():
            units[place] = {}
            for band in map(band_name, BANDS):
                units[place][band] = mean_distance(self.retrained, place, band)
        return units

    def unit_errors(self) -> dict[str, float]:
        """The standard error of the units at the forgotten images, as shares of them, by band.

        All rows of a table share the unit, so this error is in none of their intervals. By the
        jackknife over the retrained networks (Efron and Stein 1981): NaN for fewer than three.
        """
        errors = {}
        for band, unit in self.units["forgotten"].items():
            left_out = []
            for i in range(len(self.retrained)):
                others = self.retrained[:i] + self.retrained[i + 1 :]
                if len(others) > 1:
                    left_out.append(mean_distance(others, "forgotten", band))
            errors[band] = jackknife_error(left_out) / unit
        return errors

    def measure(self, folder: Path, base_seed: int | None) -> Measured:
        """Compare a checkpoint with the retrained networks.

        Args:
            base_seed: of the training that the model comes from.

        Raises:
            InputError: if the checkpoint has another noise schedule than the networks.
        """
        others = self.others(folder, base_seed)
        answers = self.answers(folder)
        self.check_schedule(folder, answers)
        ratios: Ratios = {}
        for place, bands in answers.x0.items():
            ratios[place] = {}
            for band, x0 in bands.items():
                theirs = [other.answers.x0[place][band] for other in others]
                distances = [mean_square(x0 - other) for other in theirs]
                mean = statistics.fmean(distances) if distances else math.nan
                ratios[place][band] = mean / self.units[place][band]
        losses = [other.answers.loss for other in others]
        if len(losses) < 2:
            return Measured(ratios, math.nan)
        return Measured(
            ratios, (answers.loss - statistics.fmean(losses)) / statistics.stdev(losses)
        )


def draw_band(
    images: Pixels,
    band: tuple[int, int],
    draws: int,
    schedule: NoiseSchedule,
    generator: torch.Generator,
) -> Draw:
    """x_t of images drawn with replacement, t uniform in the band."""
    device = images.device
    x0 = to_float(images[torch.randint(len(images), (draws,), generator=generator, device=device)])
    t = torch.randint(*band, (draws,), generator=generator, device=device)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    return Draw(schedule.q_sample(x0, t, noise), t)


def mean_distance(networks: Sequence[Retrained], place: str, band: str) -> float:
    """The mean distance of two of the networks."""
    x0 = [network.answers.x0[place][band] for network in networks]
    return statistics.fmean(mean_square(a - b) for a, b in combinations(x0, 2))


def jackknife_error(left_out: Sequence[float]) -> float:
    """The standard error of an estimate, from what it is without each of the n observations."""
    if not left_out:
        return math.nan
    n = len(left_out)
    return ((n - 1) * statistics.pvariance(left_out)) ** 0.5


def mean_square(difference: Tensor) -> float:
    return difference.double().square().mean().item()


def ratio_row(ratios: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """The columns of a table: "ratio t=0-19", for other places "ratio at remain t=0-19"."""
    row: dict[str, float | None] = {}
    for place, bands in ratios.items():
        where = "" if place == "forgotten" else f"at {place} "
        for band, value in bands.items():
            row[f"ratio {where}t={band}"] = value
    return row

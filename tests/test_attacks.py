"""The attacks, on denoisers whose answer is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import flat, noised
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule
from tiny_retrack.attacks import augmented, mean_losses, membership_inference, relearning_curve
from tiny_retrack.posterior import ideal_eps
from tiny_retrack.types import NonFiniteError

SCHEDULE = NoiseSchedule.linear()


class OneImage(nn.Module):
    """The ideal denoiser of a single image, its parameter: the DDPM loss is least at the data."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return SCHEDULE.predict_eps(x_t.double(), t, self.image.expand_as(x_t))


def attack(
    auxiliary: Tensor, at: list[int], seed: int = 0, lr: float = 0.05
) -> list[dict[str, float]]:
    """The two pixels of the image, by step."""
    model = OneImage(*auxiliary.shape[1:])

    def measure(_: object) -> dict[str, float]:
        a, b = model.image.flatten().tolist()
        return {"a": a, "b": b}

    return relearning_curve(
        model, auxiliary, measure, SCHEDULE, at=at, batch_size=4, lr=lr, seed=seed
    )


def test_relearning_moves_the_model_to_the_auxiliary_images() -> None:
    auxiliary = torch.tensor([[[[230, 64]]]], dtype=torch.uint8)
    curve = attack(auxiliary, at=[300, 1, 20], lr=0.01)
    assert [row["step"] for row in curve] == [0, 1, 20, 300]
    assert curve[0] == {"step": 0, "a": 0.0, "b": 0.0}
    for name, pixel in (("a", 230), ("b", 64)):
        goal = pixel / 127.5 - 1
        distances = [abs(row[name] - goal) for row in curve]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 0.05
        # Adam's first step has the length of the learning rate.
        assert curve[1][name] == pytest.approx(math.copysign(0.01, goal), rel=1e-3)


def test_relearning_of_two_images_ends_between_them() -> None:
    """The least loss of one image for two is at their mean; one who saw only one ends there."""
    first, second = (230, 64), (60, 164)
    auxiliary = torch.tensor([[[first]], [[second]]], dtype=torch.uint8)
    curve = attack(auxiliary, at=list(range(100, 301, 10)))[1:]
    for name, one, other in zip("ab", first, second, strict=True):
        end = sum(row[name] for row in curve) / len(curve)
        mean = (one + other) / 2 / 127.5 - 1
        half_way = abs(one - other) / 127.5 / 4
        assert abs(end - mean) < half_way


def test_relearning_repeats_bitwise_whatever_is_measured() -> None:
    auxiliary = torch.tensor([[[[230, 64]]], [[[200, 10]]]], dtype=torch.uint8)
    curve = attack(auxiliary, [3, 5])
    assert attack(auxiliary, [3, 5]) == curve
    assert attack(auxiliary, [5])[-1] == curve[-1]
    assert attack(auxiliary, [5], seed=1)[-1] != curve[-1]


def test_relearning_measures_the_attacked_denoiser() -> None:
    auxiliary = torch.tensor([[[[230, 64]]], [[[200, 10]]]], dtype=torch.uint8)
    model = OneImage(1, 1, 2)
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    t = torch.tensor([10])
    curve = relearning_curve(
        model,
        auxiliary,
        lambda eps_model: {"eps": eps_model(x, t).sum().item()},
        SCHEDULE,
        at=[2],
        batch_size=4,
        lr=0.05,
        seed=0,
    )
    assert curve[-1]["eps"] == model(x, t).sum().item() != curve[0]["eps"]


def moved(image: list[list[int]], dy: int, dx: int, mirrored: bool, gain: float) -> list[list[int]]:
    """One look-alike, pixel by pixel; what lies outside is the nearest pixel of the edge."""
    height, width = len(image), len(image[0])
    rows = []
    for y in range(height):
        source = image[min(max(y + dy, 0), height - 1)]
        source = source[::-1] if mirrored else source
        row = []
        for x in range(width):
            value = source[min(max(x + dx, 0), width - 1)]
            row.append(min(round(gain * value), 255))
        rows.append(row)
    return rows


def test_augmented_are_all_shifts_mirrors_and_gains() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 3, 4), generator=generator, dtype=torch.uint8)
    expected = []
    for mirrored in (False, True):
        for gain in (1.0, 0.5, 1.7):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    for (image,) in images.tolist():
                        copy = [moved(image, dy, dx, mirrored, gain)]
                        if copy not in images.tolist():
                            expected.append(copy)
    assert len(expected) == 2 * 2 * 3 * 9 - 2
    assert augmented(images, 1, (1.0, 0.5, 1.7)).tolist() == expected


def test_augmented_leaves_the_image_itself_out() -> None:
    symmetric = torch.tensor([[[[7, 9, 7]]]], dtype=torch.uint8)
    blank = torch.full((1, 1, 4, 4), 80, dtype=torch.uint8)
    for image in (symmetric, blank):
        copies = augmented(image, 2, (1.0, 0.8))
        assert len(copies)
        assert not (copies == image).flatten(1).all(1).any()
    assert len(augmented(blank, 2)) == 0


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x - 0.4 * x * x + 0.1 * t[:, None, None, None] / 1000


def toy_loss(image: list[float], steps: list[int], noise: list[list[float]]) -> float:
    """The DDPM loss of `toy_eps`, averaged over pairs of t and noise."""
    total = 0.0
    for t, eps in zip(steps, noise, strict=True):
        for x, e in zip(noised(image, t, eps), eps, strict=True):
            total += (0.3 * x - 0.4 * x * x + 0.1 * t / 1000 - e) ** 2
    return total / len(steps)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 7), st.sampled_from([1, 3, 250]))
def test_membership_inference_ranks_all_pairs(seed: int, m: int, n: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(m + n, 1, 2, 2, generator=generator, dtype=torch.float64).clamp(-1, 1)
    noise = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    images[-1] = images[0]  # a tie
    t = torch.randint(1000, (3,), generator=generator)

    losses = [toy_loss(image, t.tolist(), flat(noise)) for image in flat(images)]
    got = mean_losses(toy_eps, images, t, noise, SCHEDULE)
    assert_close(got, torch.tensor(losses, dtype=torch.float64))

    losses = [round(loss, 9) for loss in losses]  # ties stay ties
    members, others = losses[:m], losses[m:]
    wins = sum((a < b) + 0.5 * (a == b) for a in members for b in others)
    auc, tpr = membership_inference(toy_eps, images[:m], images[m:], t, noise, SCHEDULE, batch_size)
    assert auc == pytest.approx(wins / (m * n), abs=1e-12)
    found = sum(a < min(others) for a in members)  # below 100 others no false one is allowed
    assert tpr == pytest.approx(found / m, abs=1e-12)


def test_membership_inference_allows_one_false_positive_in_a_hundred() -> None:
    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        # At t = 0 and without noise, its error grows with the pixel.
        return x / SCHEDULE.gamma[0]

    noise, t = torch.zeros(1, 1, 1, 1).double(), torch.tensor([0])
    others = torch.arange(1, 101).double().view(-1, 1, 1, 1) / 100
    members = torch.tensor([0.005, 0.015, 0.025, 0.035]).double().view(-1, 1, 1, 1)
    _, tpr = membership_inference(eps_model, members, others, t, noise, SCHEDULE)
    assert tpr == 0.5  # with 0.01 taken for a member, those below 0.02 are found
    _, tpr = membership_inference(eps_model, members, others[:99], t, noise, SCHEDULE)
    assert tpr == 0.25


def test_membership_inference_tells_what_the_denoiser_knows() -> None:
    """Certain for the ideal denoiser of the members, chance for that of members and others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 4, 4, generator=generator) * 2 - 1
    members, others = images[:20], images[20:]
    noise, t = torch.randn(4, 1, 4, 4, generator=generator), torch.full((4,), 200)

    def knows_members(x_t: Tensor, t: Tensor) -> Tensor:
        return ideal_eps(x_t, t, members, SCHEDULE)

    def knows_all(x_t: Tensor, t: Tensor) -> Tensor:
        return ideal_eps(x_t, t, images, SCHEDULE)

    assert membership_inference(knows_members, members, others, t, noise, SCHEDULE) == (1.0, 1.0)
    auc, _ = membership_inference(knows_all, members, others, t, noise, SCHEDULE)
    standard_error = math.sqrt(41 / (12 * 20 * 20))  # of the rank statistic
    assert abs(auc - 0.5) < 2 * standard_error


def test_membership_inference_refuses_losses_that_are_not_finite() -> None:
    images, noise = torch.zeros(2, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    with pytest.raises(NonFiniteError, match="a loss is not finite"):
        membership_inference(
            lambda x, t: x * math.nan, images[:1], images[1:], torch.tensor([5]), noise, SCHEDULE
        )


@pytest.mark.parametrize("members", [0, 2])
def test_membership_inference_refuses_one_kind_alone(members: int) -> None:
    images, noise = torch.zeros(2, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    parts = images[:members], images[members:]
    with pytest.raises(ValueError, match="members"):
        membership_inference(lambda x, t: x, *parts, torch.tensor([5]), noise, SCHEDULE)

"""The attacks, on denoisers whose answer is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule
from tiny_retrack.attacks import augmented, membership_inference, relearning_curve
from tiny_retrack.posterior import ideal_eps

SCHEDULE = NoiseSchedule.linear()


class OneImage(nn.Module):
    """The ideal denoiser of a single image, which is its parameter: the DDPM loss is least where
    that is the data.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return SCHEDULE.predict_eps(x_t.double(), t, self.image.expand_as(x_t))


def seen(model: OneImage) -> dict[str, float]:
    return {"a": model.image[0, 0, 0].item(), "b": model.image[0, 0, 1].item()}


def attack(
    auxiliary: Tensor, at: list[int], seed: int = 0, lr: float = 0.05
) -> list[dict[str, float]]:
    model = OneImage(*auxiliary.shape[1:])
    return relearning_curve(
        model, auxiliary, lambda _: seen(model), SCHEDULE, at=at, batch_size=4, lr=lr, seed=seed
    )


def test_relearning_moves_the_model_to_the_auxiliary_images_and_measures_on_the_way() -> None:
    auxiliary = torch.tensor([[[[230, 64]]]], dtype=torch.uint8)
    curve = attack(auxiliary, at=[300, 1, 20], lr=0.01)
    assert [row["step"] for row in curve] == [0, 1, 20, 300]
    assert curve[0] == {"step": 0, "a": 0.0, "b": 0.0}
    for name, pixel in (("a", 230), ("b", 64)):
        goal = pixel / 127.5 - 1
        distances = [abs(row[name] - goal) for row in curve]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 0.05
        assert curve[1][name] == pytest.approx(
            math.copysign(0.01, goal), rel=1e-3
        )  # Adam's first step is lr


def test_relearning_measures_the_attacked_denoiser_and_repeats_bitwise() -> None:
    auxiliary = torch.tensor([[[[230, 64]]], [[[200, 10]]]], dtype=torch.uint8)
    assert attack(auxiliary, [3, 5]) == attack(auxiliary, [3, 5])
    assert attack(auxiliary, [5])[-1] == attack(auxiliary, [3, 5])[-1]  # a look changes nothing
    assert attack(auxiliary, [5], seed=1)[-1] != attack(auxiliary, [5])[-1]
    model, x, t = (
        OneImage(1, 1, 2),
        torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64),
        torch.tensor([10]),
    )
    curve = relearning_curve(
        model, auxiliary, lambda eps_model: {"eps": eps_model(x, t).sum().item()}, SCHEDULE,
        at=[2], batch_size=4, lr=0.05, seed=0,
    )  # fmt: skip
    assert curve[-1]["eps"] == model(x, t).sum().item() != curve[0]["eps"]


def test_augmented_are_the_shifts_mirrors_and_gains_by_loops() -> None:
    images = torch.randint(
        0, 256, (2, 1, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    expected = []
    for mirrored in (False, True):
        for gain in (1.0, 0.5, 1.7):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    for image in images.tolist():
                        copy = []
                        for y in range(3):
                            row = image[0][min(max(y + dy, 0), 2)]
                            row = row[::-1] if mirrored else row
                            copy.append(
                                [
                                    min(round(gain * row[min(max(x + dx, 0), 3)]), 255)
                                    for x in range(4)
                                ]
                            )
                        if [copy] not in images.tolist():
                            expected.append([copy])
    assert len(expected) == 2 * 2 * 3 * 9 - 2
    assert augmented(images, 1, (1.0, 0.5, 1.7)).tolist() == expected


def test_augmented_never_gives_an_image_away() -> None:
    symmetric = torch.tensor([[[[7, 9, 7]]]], dtype=torch.uint8)
    blank = torch.full((1, 1, 4, 4), 80, dtype=torch.uint8)
    for image in (symmetric, blank):
        copies = augmented(image, 2, (1.0, 0.8))
        assert not (copies == image).flatten(1).all(1).any()
    assert len(augmented(blank, 2)) == 0


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x - 0.4 * x * x + 0.1 * t[:, None, None, None] / 1000


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 7), st.sampled_from([1, 3, 250]))
def test_membership_inference_against_all_pairs(seed: int, m: int, n: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    random = {"generator": generator, "dtype": torch.float64}
    images, noise = (
        torch.randn(m + n, 1, 2, 2, **random).clamp(-1, 1),
        torch.randn(3, 1, 2, 2, **random),
    )
    images[-1] = images[0]  # a tie
    t = torch.randint(1000, (3,), generator=generator)
    auc, tpr = membership_inference(toy_eps, images[:m], images[m:], t, noise, SCHEDULE, batch_size)

    losses = []
    for image in images.flatten(1).tolist():
        total = 0.0
        for step, eps in zip(t.tolist(), noise.flatten(1).tolist(), strict=True):
            for a, e in zip(image, eps, strict=True):
                x = SCHEDULE.gamma[step].item() * a + SCHEDULE.sigma[step].item() * e
                total += (0.3 * x - 0.4 * x * x + 0.1 * step / 1000 - e) ** 2
        losses.append(round(total, 9))  # ties stay ties
    members, others = losses[:m], losses[m:]
    wins = sum((a < b) + 0.5 * (a == b) for a in members for b in others)
    assert auc == pytest.approx(wins / (m * n), abs=1e-12)
    assert tpr == pytest.approx(
        sum(a < min(others) for a in members) / m, abs=1e-12
    )  # fewer than 100: no false one


def test_one_percent_of_false_positives_is_one_in_a_hundred() -> None:
    def eps_model(
        x: Tensor, t: Tensor
    ) -> Tensor:  # at t = 0 and without noise its error grows with the pixel
        return x / SCHEDULE.gamma[0]

    noise, t = torch.zeros(1, 1, 1, 1).double(), torch.tensor([0])
    others = torch.arange(1, 101).double().view(-1, 1, 1, 1) / 100
    members = torch.tensor([0.005, 0.015, 0.025, 0.035]).double().view(-1, 1, 1, 1)
    _, tpr = membership_inference(eps_model, members, others, t, noise, SCHEDULE)
    assert tpr == 0.5  # one look-alike may be taken for a member: those below 0.02 are found
    _, tpr = membership_inference(eps_model, members, others[:99], t, noise, SCHEDULE)
    assert tpr == 0.25


def test_the_ideal_denoiser_of_a_set_gives_its_members_away_and_one_that_saw_all_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 4, 4, generator=generator) * 2 - 1
    members, others = images[:20], images[20:]
    noise, t = torch.randn(4, 1, 4, 4, generator=generator), torch.full((4,), 200)
    knows = membership_inference(
        lambda x, t: ideal_eps(x, t, members, SCHEDULE), members, others, t, noise, SCHEDULE
    )
    assert_close(torch.tensor(knows), torch.tensor([1.0, 1.0]))
    auc, _ = membership_inference(
        lambda x, t: ideal_eps(x, t, images, SCHEDULE), members, others, t, noise, SCHEDULE
    )
    assert abs(auc - 0.5) < 2 * math.sqrt(
        41 / (12 * 20 * 20)
    )  # two standard errors of the rank statistic

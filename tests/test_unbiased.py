"""Importance sampling leaves the expectation unchanged: SISS's losses against the plain ones."""

from statistics import NormalDist

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack.losses import ddpm_loss, siss_losses
from tiny_retrack.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


@pytest.mark.parametrize("lam", [0.2, 0.5])
@pytest.mark.parametrize("t", [50, 300, 700])
def test_siss_weights_leave_the_expected_losses_unchanged(t: int, lam: float) -> None:
    """With one pixel the noise can be laid out at its quantiles: the mean over the batch is then
    the expectation.
    """
    num = 20_000
    quantiles = [NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
    noise = torch.tensor(quantiles, dtype=torch.float64).view(num, 1, 1, 1)
    a_r = torch.full_like(noise, 0.6)
    a_u = torch.full_like(noise, -0.4)
    times = torch.full((num,), t)

    def model(x_t: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(3 * x_t) + 0.5

    def from_half(forget: bool) -> Tensor:
        mask = torch.full((num,), forget)
        return torch.stack(siss_losses(model, a_r, a_u, times, noise, mask, lam, SCHEDULE))

    plain_losses = torch.stack([ddpm_loss(model, a, times, noise, SCHEDULE) for a in (a_r, a_u)])
    mixed = (1 - lam) * from_half(False) + lam * from_half(True)
    assert_close(mixed, plain_losses, rtol=1e-3, atol=0)

"""The forward (noising) process: x_t = gamma_t x0 + sigma_t eps  (DDPM, arXiv 2006.11239, eq. 4).

gamma_t = sqrt(alpha_bar_t) and sigma_t = sqrt(1 - alpha_bar_t) are held in float64 and cast where
they are used.
"""

import math

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tiny_retrack.types import check_floats, check_same_shape


class NoiseSchedule:
    """A discrete variance-preserving schedule over t = 0 .. num_steps - 1.

    Attributes:
        beta: Float64 "T", the variance that each step adds.
        gamma: Float64 "T", sqrt(alpha_bar_t), the scale of the image; decreasing.
        sigma: Float64 "T", sqrt(1 - alpha_bar_t), the scale of the noise; increasing.

    Raises:
        ValueError: if `beta` is not a non-empty vector of values between 0 and 1.
    """

    def __init__(self, beta: Tensor) -> None:
        in_range = (beta > 0) & (beta < 1)
        if beta.ndim != 1 or not len(beta) or not bool(in_range.all()):
            raise ValueError(
                "beta must be a non-empty vector of values between 0 and 1 (both excluded)"
            )
        self.beta = beta.detach().to("cpu", torch.float64)
        alpha_bar = torch.cumprod(1 - self.beta, dim=0)
        self.gamma: Float64[Tensor, " T"] = alpha_bar.sqrt()
        self.sigma: Float64[Tensor, " T"] = (1 - alpha_bar).sqrt()
        # Copies of gamma and sigma by device, so that a step on CUDA never waits for the host.
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        first, last = self.beta[0].item(), self.beta[-1].item()
        return f"NoiseSchedule({self.num_steps} steps, beta {first:g} to {last:g})"

    @classmethod
    def linear(
        cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """Linearly spaced betas (DDPM, section 4).

        Raises:
            ValueError: if num_steps < 1, or if a beta is not between 0 and 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return cls(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Betas whose square roots are linearly spaced (Stable Diffusion, arXiv 2112.10752).

        Raises:
            ValueError: if num_steps < 1, or if a beta is not between 0 and 1.
        """
        return cls(cls.linear(num_steps, math.sqrt(beta_start), math.sqrt(beta_end)).beta.square())

    @property
    def num_steps(self) -> int:
        return len(self.beta)

    def is_close(self, other: "NoiseSchedule") -> bool:
        """Whether both add the same noise at the same t, up to the rounding of a file of betas."""
        same_length = self.num_steps == other.num_steps
        return same_length and torch.allclose(self.beta, other.beta, rtol=1e-5, atol=0)

    def scales(
        self, t: Int[Tensor, " b"], like: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """gamma_t and sigma_t, shaped [b, 1, ..., 1] to broadcast against `like`, in its dtype.

        Raises:
            ValueError: if t is not a tensor of one integer time, 0 <= t < T, per row of `like`; or
                if `like` does not hold floats.
        """
        check_floats(images=like)
        if not isinstance(t, Tensor) or t.shape != like.shape[:1]:
            got = f"shape {list(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(
                f"t must be an integer tensor of shape [{len(like)}], got {got}; for the same time "
                f"in every row: torch.full(({len(like)},), t)"
            )
        if t.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"t is {t.dtype}: times are integers, t.long(). (The likelihood calls models at "
                f"fractional t, where the schedule has no values)"
            )
        # On CUDA this would wait for the device, which refuses such times by itself.
        if t.device.type == "cpu" and len(t) and not 0 <= t.min() <= t.max() < self.num_steps:
            raise ValueError(
                f"t must be in 0..{self.num_steps - 1}, got {t.min().item()} to {t.max().item()}"
            )
        if like.device not in self._copies:
            self._copies[like.device] = (self.gamma.to(like.device), self.sigma.to(like.device))
        gamma, sigma = self._copies[like.device]
        shape = [-1] + [1] * (like.ndim - 1)
        gamma_t = gamma.index_select(0, t).to(like.dtype).reshape(shape)
        sigma_t = sigma.index_select(0, t).to(like.dtype).reshape(shape)
        return gamma_t, sigma_t

    def q_sample(
        self, x0: Float[Tensor, "b ..."], t: Int[Tensor, " b"], noise: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b ..."]:
        """x_t ~ q(x_t | x0) for the given unit noise (DDPM, eq. 4).

        Raises:
            ValueError: if the shapes of x0, t and noise do not fit together, or as `scales`.
        """
        check_same_shape(x0=x0, noise=noise)
        gamma, sigma = self.scales(t, x0)
        return gamma * x0 + sigma * noise

    def predict_x0(
        self, x_t: Float[Tensor, "b ..."], t: Int[Tensor, " b"], eps: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b ..."]:
        """The x0 that explains x_t, given its noise: (x_t - sigma_t eps) / gamma_t.

        Raises:
            ValueError: as `q_sample`.
        """
        check_same_shape(x_t=x_t, eps=eps)
        gamma, sigma = self.scales(t, x_t)
        return (x_t - sigma * eps) / gamma

    def predict_eps(
        self, x_t: Float[Tensor, "b ..."], t: Int[Tensor, " b"], x0: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b ..."]:
        """The noise that explains x_t, given its x0: (x_t - gamma_t x0) / sigma_t.

        Raises:
            ValueError: as `q_sample`.
        """
        check_same_shape(x_t=x_t, x0=x0)
        gamma, sigma = self.scales(t, x_t)
        return (x_t - gamma * x0) / sigma

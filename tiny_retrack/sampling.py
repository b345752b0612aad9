"""Samplers: from noise to images, for any denoiser `eps_model(x_t, t) -> eps`.

All randomness comes from the generator passed in: the same state gives the same images.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, Images


def timesteps(start: int, num_steps: int) -> Int[Tensor, " s"]:
    """`num_steps` times, evenly spaced from `start` down to 0, both included.

    Only `start` if num_steps is 1.

    Raises:
        ValueError: if num_steps is not in 1..start + 1.
    """
    if not 1 <= num_steps <= start + 1:
        raise ValueError(
            f"the number of sampler steps must be from 1 to {start + 1}, got {num_steps}"
        )
    return torch.linspace(start, 0, num_steps, dtype=torch.float64).round().long()


@torch.no_grad()
def ddim_from(
    eps_model: EpsModel,
    x_t: Images,
    start: int,
    schedule: NoiseSchedule,
    num_steps: int,
    clip: bool = False,
) -> Images:
    """Denoise x_t, which is at t = start, to x0 by DDIM with eta = 0 (arXiv 2010.02502, eq. 12).

    With `clip`, the predicted x0 is clipped to [-1, 1] at each step, and the noise is computed
    again from it.

    Raises:
        ValueError: if num_steps is not in 1..start + 1.
    """
    times = timesteps(start, num_steps).tolist()
    for now, after in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(x_t),), now, device=x_t.device)
        eps = eps_model(x_t, t)
        x0 = schedule.predict_x0(x_t, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = schedule.predict_eps(x_t, t, x0)
        x_t = x0 if after is None else schedule.q_sample(x0, torch.full_like(t, after), eps)
    return x_t


def ddim_sample(
    eps_model: EpsModel,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    num_steps: int,
    generator: torch.Generator,
    clip: bool = False,
) -> Images:
    """Images of `shape` (b, c, h, w) by DDIM. The noise at t = T - 1 determines them.

    Raises:
        ValueError: if num_steps is not in 1..T.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return ddim_from(eps_model, noise, schedule.num_steps - 1, schedule, num_steps, clip)


@torch.no_grad()
def ddpm_sample(
    eps_model: EpsModel,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    num_steps: int,
    generator: torch.Generator,
    clip: bool = False,
) -> Images:
    """Images of `shape` (b, c, h, w) by ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2,
    with sigma^2 = beta-tilde).

    With num_steps < T, each step jumps over the times in between: it draws from the posterior
    q(x_s | x_t, x0) (DDPM, eqs. 6 and 7) for s < t (arXiv 2102.09672, eq. 19).

    Raises:
        ValueError: if num_steps is not in 1..T.
    """
    x_t = torch.randn(shape, generator=generator, device=generator.device)
    times = timesteps(schedule.num_steps - 1, num_steps).tolist()
    alpha_bars = schedule.gamma.square().tolist()
    for now, after in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(x_t),), now, device=x_t.device)
        x0 = schedule.predict_x0(x_t, t, eps_model(x_t, t))
        if clip:
            x0 = x0.clamp(-1, 1)
        alpha_bar = alpha_bars[now]
        alpha_bar_after = 1.0 if after is None else alpha_bars[after]  # 1: the image itself
        alpha = alpha_bar / alpha_bar_after  # of the whole jump
        beta = 1 - alpha
        x0_weight = alpha_bar_after**0.5 * beta / (1 - alpha_bar)
        x_t_weight = alpha**0.5 * (1 - alpha_bar_after) / (1 - alpha_bar)
        x_t = x0_weight * x0 + x_t_weight * x_t
        if after is not None:
            beta_tilde = (1 - alpha_bar_after) / (1 - alpha_bar) * beta
            noise = torch.randn(shape, generator=generator, device=generator.device)
            x_t = x_t + beta_tilde**0.5 * noise
    return x_t


SAMPLERS = {"ddim": ddim_sample, "ddpm": ddpm_sample}


def inject_and_denoise(
    eps_model: EpsModel, x0: Images, t: int, noise: Images, schedule: NoiseSchedule, num_steps: int
) -> Images:
    """Noise x0 to time t and denoise it from there by DDIM, in at most t + 1 steps.

    If the model memorised x0, the result is close to x0 (SISS, arXiv 2503.01034).

    Args:
        x0: in [-1, 1].
        t: the same for all images, 0 <= t < T.
        noise: from N(0, I), shaped as x0.

    Raises:
        ValueError: if num_steps < 1, or as `NoiseSchedule.q_sample`.
    """
    x_t = schedule.q_sample(x0, torch.full((len(x0),), t, device=x0.device), noise)
    return ddim_from(eps_model, x_t, t, schedule, min(num_steps, t + 1))


def sample_many(
    eps_model: EpsModel,
    num: int,
    image_shape: tuple[int, ...],
    schedule: NoiseSchedule,
    num_steps: int = 25,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 250,
    sampler: Callable[..., Images] = ddim_sample,
    progress: str = "",
) -> Float[Tensor, "num c h w"]:
    """`num` images of `image_shape` (c, h, w), clipped to [-1, 1], on the CPU.

    They are sampled on `device`, batch by batch, from one generator.

    Args:
        sampler: `ddim_sample` or `ddpm_sample`.
        progress: the label of a progress bar; none if empty.

    Raises:
        ValueError: if num < 1, or if num_steps is not in 1..T.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    generator = torch.Generator(device).manual_seed(seed)
    starts = range(0, num, batch_size)
    done = []
    for start in tqdm(starts, progress, unit="batch", disable=not progress, leave=False):
        shape = (min(batch_size, num - start), *image_shape)
        done.append(sampler(eps_model, shape, schedule, num_steps, generator, clip=True).cpu())
    return torch.cat(done)

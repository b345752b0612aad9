"""Samplers: from noise to images, for any denoiser `eps_model(x_t, t) -> eps`.

Nothing is drawn outside the passed generator, and one generator state gives one set of images.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tiny_retrack.schedule import NoiseSchedule

EpsModel = Callable[[Tensor, Tensor], Tensor]
Images = Float[Tensor, "b c h w"]


def timesteps(start: int, num_steps: int) -> Int[Tensor, " s"]:
    """`num_steps` times, evenly spaced from `start` down to 0, both included (only `start` if
    num_steps is 1).

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

    With `clip`, the predicted x0 is clipped to [-1, 1] at each step and the noise follows it.
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
    """Images of `shape` (b, c, h, w) by DDIM: the noise at t = T - 1 fixes them.

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
    sigma^2 = beta-tilde).

    With num_steps < T, each step jumps over the times between: the posterior q(x_s | x_t, x0) for
    any s < t.

    Raises:
        ValueError: if num_steps is not in 1..T.
    """
    x_t = torch.randn(shape, generator=generator, device=generator.device)
    times = timesteps(schedule.num_steps - 1, num_steps).tolist()
    alpha_bar = [
        *schedule.gamma.square().tolist(),
        1.0,
    ]  # the last one, at index -1, stands for the image itself
    for now, after in zip(times, [*times[1:], -1], strict=True):
        t = torch.full((len(x_t),), now, device=x_t.device)
        x0 = schedule.predict_x0(x_t, t, eps_model(x_t, t))
        if clip:
            x0 = x0.clamp(-1, 1)
        alpha = alpha_bar[now] / alpha_bar[after]  # of the whole jump; its beta is 1 - alpha
        keep = (1 - alpha_bar[after]) / (1 - alpha_bar[now])
        x_t = (
            alpha**0.5 * keep * x_t
            + alpha_bar[after] ** 0.5 * (1 - alpha) / (1 - alpha_bar[now]) * x0
        )
        if after >= 0:
            noise = torch.randn(shape, generator=generator, device=generator.device)
            x_t = x_t + (keep * (1 - alpha)) ** 0.5 * noise
    return x_t


def inject_and_denoise(
    eps_model: EpsModel, x0: Images, t: int, noise: Images, schedule: NoiseSchedule, num_steps: int
) -> Images:
    """Noise x0 to time t and denoise from there by DDIM: a memorised image snaps back (SISS, arXiv
    2503.01034).
    """
    x_t = schedule.q_sample(x0, torch.full((len(x0),), t, device=x0.device), noise)
    return ddim_from(eps_model, x_t, t, schedule, min(num_steps, t + 1))


def sample_many(
    eps_model: EpsModel,
    num: int,
    image_shape: tuple[int, ...],
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 250,
    sampler: Callable[..., Images] = ddim_sample,
    progress: str = "",
) -> Float[Tensor, "num c h w"]:
    """`num` images on the CPU, sampled batch by batch from one generator; `progress` labels a
    progress bar.
    """
    generator = torch.Generator(device).manual_seed(seed)
    starts = range(0, num, batch_size)
    done = []
    for start in tqdm(starts, progress, unit="batch", disable=not progress, leave=False):
        shape = (min(batch_size, num - start), *image_shape)
        done.append(sampler(eps_model, shape, schedule, num_steps, generator, clip=True).cpu())
    return torch.cat(done)

"""Log-likelihood of images by the probability-flow ODE (Song et al., arXiv 2011.13456, section 4.3,
appendix D.2).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal
from torchdiffeq import odeint
from tqdm import tqdm

from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import NonFiniteError

EpsModel = Callable[[Tensor, Tensor], Tensor]
Images = Float[Tensor, "b c h w"]

START = (
    1e-5  # the density is that of images with the noise of this time, as in the published figures
)
MAX_STEPS = 2000  # of the solver, six evaluations each; a trained model takes about 80


def continuous(
    schedule: NoiseSchedule, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The schedule's SDE, as a function from time s in [0, 1] to (t, beta, sigma).

    t = s (T - 1) is what the model takes as its time, beta(s) is T beta_t, linear between its T
    values, and
    sigma(s)^2 = 1 - exp(-int_0^s beta). The linear schedule gives the VP-SDE of arXiv 2011.13456
    (eq. 33, beta from 0.1
    to 20), with which published likelihoods are computed; it runs about one step behind
    `schedule.sigma`.
    """
    num_steps, betas = schedule.num_steps, schedule.beta.to(device)
    areas = (
        torch.cumsum((betas[1:] + betas[:-1]) / 2, 0) - (betas[1:] + betas[:-1]) / 2
    )  # below beta, from 0 to each t

    def at(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = s.double() * (num_steps - 1)
        i = t.long().clamp(max=num_steps - 2)
        beta = torch.lerp(betas[i], betas[i + 1], t - i)
        area = areas[i] + (t - i) * (betas[i] + beta) / 2
        sigma = (-torch.expm1(-area * num_steps / (num_steps - 1))).sqrt()
        return t.to(s.dtype), num_steps * beta.to(s.dtype), sigma.to(s.dtype)

    return at


def nll_bits_per_dim(
    eps_model: EpsModel,
    x0: Images,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    exact_trace: bool = False,
    num_probes: int = 1,
    progress: str = "",
) -> Float[Tensor, " b"]:
    """-log2 p(x0) / D + 7: bits per dimension of 8-bit images scaled to [-1, 1], without
    dequantisation noise.

    7 = log2(128) undoes the scaling of the 256 levels. dx/ds = -beta/2 (x - eps / sigma) is solved
    by dopri5 from
    almost no noise to N(0, I). Each image has an error norm of its own and the worst one sets the
    step, so that a value
    depends on the other images of the batch only within the tolerances.

    Args:
        eps_model: takes t as floats from 0 to T - 1. It must be deterministic (`eval()`) and run in
        full float32: the
            rounding noise of half precision makes the solver's steps tiny.
        x0: [-1, 1], float32 or float64.
        generator: of the Rademacher probes of Hutchinson's estimator. Each image draws its own in
        turn: with one
            generator the values are the same however a set is split into batches.
        exact_trace: use all D directions instead of probes; an evaluation takes D backward passes.
        num_probes: per image; the estimator's standard deviation falls with the root of it.
        progress: labels a progress bar.

    Raises:
        ValueError: if num_probes < 1 or the schedule has a single step.
        NonFiniteError: if the model's output is not finite, or so rough that the solver gives up.
    """
    if num_probes < 1 or schedule.num_steps < 2:
        raise ValueError(
            f"need at least 1 probe and 2 time steps, got {num_probes} and {schedule.num_steps}"
        )
    dim = x0[0].numel()
    probes = _basis(x0) if exact_trace else _rademacher(x0, num_probes, generator)
    sde = continuous(schedule, x0.device)
    bar = tqdm(
        total=1.0,
        desc=progress,
        disable=not progress,
        leave=False,
        bar_format="{l_bar}{bar}| {elapsed}",
    )

    def drift(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        t, beta, sigma = sde(s)
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            eps = eps_model(x, t.expand(len(x)))
        if not bool(eps.isfinite().all()):
            raise NonFiniteError(
                f"the model's output is not finite at t = {t.item():.2f}: there is no likelihood"
            )
        trace = torch.zeros_like(state[1])
        for probe in probes:
            (row,) = torch.autograd.grad(eps, x, probe, retain_graph=True)
            trace += (row * probe).flatten(1).sum(1) / len(probes)
        if progress:
            bar.update(max(0.0, s.item() - bar.n))
        return -beta / 2 * (x - eps / sigma).detach(), -beta / 2 * (dim - trace / sigma)

    def worst_image(error: tuple[Tensor, Tensor]) -> Tensor:
        return torch.maximum(error[0].flatten(1).square().mean(1).sqrt(), error[1].abs()).max()

    with bar, torch.no_grad():
        s = torch.tensor([START, 1.0], dtype=x0.dtype, device=x0.device)
        # Left alone, the solver would also ask the model for times beyond the last one.
        options = {
            "norm": worst_image,
            "first_step": START,
            "step_t": s[1:],
            "max_num_steps": MAX_STEPS,
        }
        state = (x0, x0.new_zeros(len(x0)))
        try:
            x, log_det = odeint(
                drift, state, s, rtol=rtol, atol=atol, method="dopri5", options=options
            )
        except AssertionError as error:  # how torchdiffeq says that it gives up
            raise NonFiniteError(
                f"no likelihood within rtol {rtol:g} and atol {atol:g}: {error}"
            ) from error
    log_prior = Normal(0.0, 1.0).log_prob(x[-1]).flatten(1).sum(1)
    return 7 - (log_prior + log_det[-1]) / (dim * math.log(2))


def _rademacher(x0: Images, num: int, generator: torch.Generator) -> Float[Tensor, "n b c h w"]:
    draws = [
        torch.randint(2, (num, *x.shape), generator=generator, device=generator.device) for x in x0
    ]
    return torch.stack(draws, dim=1).to(x0) * 2 - 1


def _basis(x0: Images) -> Float[Tensor, "d b c h w"]:
    """The D unit vectors times sqrt(D): the mean of their quadratic forms is the trace."""
    dim = x0[0].numel()
    vectors = torch.eye(dim, dtype=x0.dtype, device=x0.device) * dim**0.5
    return vectors.view(dim, 1, *x0.shape[1:]).expand(-1, *x0.shape)

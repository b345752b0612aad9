"""Log-likelihood of images by the probability-flow ODE (Song et al., arXiv 2011.13456, section 4.3
and appendix D.2).
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
from tiny_retrack.types import EpsModel, Images, NonFiniteError, check_floats

# The ODE starts at this s rather than at 0, as in the published code. The density is therefore that
# of images with a trace of noise (sigma of about 1e-3).
START = 1e-5
MAX_STEPS = 2000  # of the solver, with six evaluations each; a trained model takes about 80

Scalar = Float[Tensor, ""]
State = tuple[Images, Float[Tensor, " b"]]  # x, and the change of its log-density so far


def vp_sde(
    schedule: NoiseSchedule, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The SDE of a schedule, as a function from time s in [0, 1] to (t, beta, sigma).

    t = s (T - 1) is the time that the model is given. beta(s) is T beta_t, linear between its T
    values. sigma(s)^2 is 1 - exp(-integral of beta from 0 to s). The linear schedule gives the
    VP-SDE of published likelihoods (arXiv 2011.13456, eq. 33, with beta from 0.1 to 20).
    sigma(s) lags `schedule.sigma` by about one step.
    """
    num_steps = schedule.num_steps
    betas = schedule.beta.to(device)
    trapezoids = (betas[1:] + betas[:-1]) / 2
    areas = torch.cumsum(trapezoids, 0) - trapezoids  # the integral of beta from 0 to each t

    def at(s: Scalar) -> tuple[Scalar, Scalar, Scalar]:
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

    7 = log2(128) undoes the scaling of the 256 levels. dopri5 solves dx/ds = -beta/2 (x - eps /
    sigma) from almost no noise to N(0, I) (eq. 13 for the VP-SDE), and the change of log-density
    along it (eq. 39). Each image has its own error norm and the worst one sets the step, so a value
    depends on the other images of the batch only within the tolerances.

    Args:
        eps_model: is given t as floats from 0 to T - 1. It must be deterministic (`eval()`) and run
            in full float32: with the rounding noise of half precision, the solver's steps become
            tiny.
        x0: in [-1, 1], float32 or float64.
        generator: for the Rademacher probes of Hutchinson's estimator (eq. 40). Each image draws
            its own in turn: with one generator, the values do not depend on how a set is split into
            batches.
        exact_trace: use all D directions in place of probes; each evaluation then takes D backward
            passes.
        num_probes: per image. The estimator's standard deviation falls with the square root of it.
        progress: the label of a progress bar; none if empty.

    Raises:
        ValueError: if num_probes < 1, the schedule has a single step, or x0 are not floats.
        NonFiniteError: if the model's output is not finite, or if the solver gives up.
    """
    if num_probes < 1 or schedule.num_steps < 2:
        raise ValueError(
            f"need at least 1 probe and 2 time steps, got {num_probes} and {schedule.num_steps}"
        )
    check_floats(x0=x0)
    dim = x0[0].numel()
    probes = _basis(x0) if exact_trace else _rademacher(x0, num_probes, generator)
    sde = vp_sde(schedule, x0.device)
    bar = tqdm(
        total=1.0,
        desc=progress,
        disable=not progress,
        leave=False,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
    )

    def drift(s: Scalar, state: State) -> State:
        t, beta, sigma = sde(s)
        eps, trace = _eps_and_trace(eps_model, state[0], t, probes)
        if progress:
            bar.update(max(0.0, s.item() - bar.n))
        dx = -beta / 2 * (state[0] - eps / sigma)
        d_log_density = -beta / 2 * (dim - trace / sigma)
        return dx, d_log_density

    with bar, torch.no_grad():
        x, log_change = _solve(drift, x0, rtol, atol)
    log_prior = Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    return 7 - (log_prior + log_change) / (dim * math.log(2))


def _eps_and_trace(
    eps_model: EpsModel, x: Images, t: Scalar, probes: Float[Tensor, "n b c h w"]
) -> tuple[Images, Float[Tensor, " b"]]:
    """The model's output, and the trace of its Jacobian in x: the mean of probe^T J probe."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        eps = eps_model(x, t.expand(len(x))) + 0 * x  # a denoiser need not look at x
    if not bool(eps.isfinite().all()):
        raise NonFiniteError(
            f"the model's output is not finite at t = {t.item():.2f}: there is no likelihood"
        )
    trace = x.new_zeros(len(x))
    for probe in probes:
        (row,) = torch.autograd.grad(eps, x, probe, retain_graph=True)
        trace += (row * probe).flatten(1).sum(1) / len(probes)
    return eps.detach(), trace


def _solve(drift: Callable[[Scalar, State], State], x0: Images, rtol: float, atol: float) -> State:
    """The state at time 1, from x0 at time START."""
    times = torch.tensor([START, 1.0], dtype=x0.dtype, device=x0.device)
    options = {
        "norm": _norm_of_the_worst_image,
        "first_step": START,
        "step_t": times[1:],  # else the solver also asks the model for times beyond the last one
        "max_num_steps": MAX_STEPS,
    }
    state = (x0, x0.new_zeros(len(x0)))
    try:
        x, log_change = odeint(
            drift, state, times, rtol=rtol, atol=atol, method="dopri5", options=options
        )
    except AssertionError as error:  # how torchdiffeq says that it gives up
        raise NonFiniteError(
            f"no likelihood within rtol {rtol:g} and atol {atol:g}: {error}"
        ) from error
    return x[-1], log_change[-1]


def _norm_of_the_worst_image(error: State) -> Scalar:
    of_x = error[0].flatten(1).square().mean(1).sqrt()
    of_log_density = error[1].abs()
    return torch.maximum(of_x, of_log_density).max()


def _rademacher(x0: Images, num: int, generator: torch.Generator) -> Float[Tensor, "n b c h w"]:
    """Probes of independent signs, `num` for each image."""
    draws = [
        torch.randint(2, (num, *x.shape), generator=generator, device=generator.device) for x in x0
    ]
    return torch.stack(draws, dim=1).to(x0) * 2 - 1


def _basis(x0: Images) -> Float[Tensor, "d b c h w"]:
    """The D unit vectors times sqrt(D): the mean of their quadratic forms is the trace."""
    dim = x0[0].numel()
    vectors = torch.eye(dim, dtype=x0.dtype, device=x0.device) * dim**0.5
    return vectors.view(dim, 1, *x0.shape[1:]).expand(-1, *x0.shape)

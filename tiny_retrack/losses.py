"""Every loss of the papers, as a pure function of (model, images, t, noise).

A loss is the squared L2 norm per image, summed over pixels and averaged over the batch. Nothing
is drawn in here: t, the noise and every mask are arguments. `eps_model(x_t, t) -> eps` is any
callable; images are in [-1, 1]. Every loss raises a ValueError if shapes do not fit together, or if
t does not fit the schedule.

EraseDiff and SISS weigh two gradients against each other. Each has a pair of functions:
`*_losses` gives the two losses, `*_gradient` combines their gradients into one. A gradient is a
list with one tensor per parameter. The numbers (1) to (8) are the equations of docs/theory.md.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_retrack.posterior import check_neighbors
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, Images, InputError, Loss, Steps, check_same_shape


def squared_error(a: Images, b: Images) -> Float[Tensor, " b"]:
    """||a - b||^2 for each image, summed over its pixels.

    Raises:
        ValueError: if the shapes differ, where subtraction would broadcast.
    """
    check_same_shape(a=a, b=b)
    return (a - b).square().flatten(1).sum(1)


def ddpm_loss(
    eps_model: EpsModel, x0: Images, t: Steps, noise: Images, schedule: NoiseSchedule
) -> Loss:
    """E ||eps_theta(x_t, t) - eps||^2: the loss of DDPM (arXiv 2006.11239, eq. 14), here (1)."""
    x_t = schedule.q_sample(x0, t, noise)
    return squared_error(eps_model(x_t, t), noise).mean()


# --- ReTrack --------------------------------------------------------------------------------------


def retrack_weighted_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    neighbors: Float[Tensor, "b k c h w"],
    schedule: NoiseSchedule,
) -> Loss:
    """E sum_k p_k ||eps_theta(x_t) - v_k||^2 over given neighbours: the paper's form, here (4).

    x_t is made from the forget image. v_k = (x_t - gamma_t a_k) / sigma_t is the noise that leads
    from the neighbour a_k to x_t, and p = softmax_k(-||v_k||^2 / 2) the posterior of the neighbours
    (ReTrack, arXiv 2509.13007, section 4, and the authors' code).

    `retrack_loss` with `knn_target` is smaller by the posterior variance of v (5), which does not
    depend on the model: the two have the same gradient.

    Raises:
        ValueError: if there are no neighbours, their shape or the model's output does not fit, or
            they are not floats.
    """
    x_t = schedule.q_sample(x0_forget, t, noise)
    check_neighbors(x_t, neighbors)
    if not neighbors.is_floating_point():
        raise ValueError(f"neighbors are {neighbors.dtype}: must be in [-1, 1], to_float(...)")
    # ||v||^2 reaches 1e7 at t = 0, where float32 no longer tells neighbours apart.
    a = neighbors.double()
    gamma, sigma = schedule.scales(t, a)
    v = (x_t.double()[:, None] - gamma * a) / sigma  # [b, k, c, h, w]
    logits = -0.5 * v.square().flatten(2).sum(2)  # [b, k]
    p = torch.softmax(logits, dim=1).to(x_t.dtype)
    eps = eps_model(x_t, t)
    check_same_shape(x_t=x_t, eps=eps)
    errors = (eps[:, None] - v.to(x_t.dtype)).square().flatten(2).sum(2)  # [b, k]
    return (p * errors).sum(1).mean()


def retrack_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    target: Images,
    schedule: NoiseSchedule,
    snr_cap: float = math.inf,
) -> Loss:
    """E w_t ||eps_theta(x_t, t) - target||^2 at x_t of the forget image: (4) without V of (5).

    `target` is what the optimal denoiser of the remain set predicts at this x_t, such as
    `exact_target` or `knn_target` of tiny_retrack.posterior. The paper's loss has w = 1 (ReTrack,
    arXiv 2509.13007); `regression_loss` explains `snr_cap`.
    """
    x_t = schedule.q_sample(x0_forget, t, noise)
    return regression_loss(eps_model(x_t, t), target, t, schedule, snr_cap)


def regression_loss(
    eps: Images, target: Images, t: Steps, schedule: NoiseSchedule, snr_cap: float = math.inf
) -> Loss:
    """E w_t ||eps - target||^2 of given predictions, with w_t = min(1, snr_cap / SNR_t).

    SNR_t = gamma_t^2 / sigma_t^2 (8). With w = 1, an error of d in x0 costs SNR_t d^2, and the SNR
    reaches 10^4: the times with low noise dominate. This w, the weight of Min-SNR (arXiv
    2303.09556) for eps, bounds the cost by snr_cap d^2. It depends on t alone, so every minimiser
    stays where it is (docs/theory.md, section 12).

    Raises:
        ValueError: if snr_cap is negative or NaN, or if shapes do not fit together.
    """
    if not snr_cap >= 0:
        raise ValueError(f"snr_cap must be 0 or more, got {snr_cap}")
    errors = squared_error(eps, target)
    gamma, sigma = schedule.scales(t, errors)
    inverse_snr = (sigma / gamma).square()
    weight = (snr_cap * inverse_snr).clamp(max=1)
    return (weight * errors).mean()


# --- The methods that ReTrack is compared with ----------------------------------------------------


def neggrad_loss(
    eps_model: EpsModel, x0_forget: Images, t: Steps, noise: Images, schedule: NoiseSchedule
) -> Loss:
    """Gradient ascent on the forget images: minus the DDPM loss. It has no lower bound.

    The baseline NegGrad of the papers (SISS, arXiv 2503.01034).
    """
    return -ddpm_loss(eps_model, x0_forget, t, noise, schedule)


def erasediff_losses(
    eps_model: EpsModel,
    x0_remain: Images,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    uniform: Images,
    schedule: NoiseSchedule,
) -> tuple[Loss, Loss]:
    """(L_r, L_f) of EraseDiff (arXiv 2401.05779), in the form of the SISS authors' code.

    L_r is the DDPM loss on remain images; L_f regresses the forget images onto `uniform`, drawn
    from U[0, 1) per pixel. Both share t and noise. `erasediff_gradient` combines the gradients.
    """
    remain = ddpm_loss(eps_model, x0_remain, t, noise, schedule)
    x_t = schedule.q_sample(x0_forget, t, noise)
    forget = squared_error(eps_model(x_t, t), uniform).mean()
    return remain, forget


def erasediff_gradient(
    g_remain: Sequence[Tensor], g_forget: Sequence[Tensor], eta: float = 1e-3
) -> list[Tensor]:
    """g_r + max(eta - <g_r, g_f> / ||g_f||^2, 0) g_f: the gradient nearest to g_r that lowers L_f.

    Its inner product with g_f is at least eta ||g_f||^2. Where the two conflict, L_r may rise.
    EraseDiff, arXiv 2401.05779; eta as in the SISS authors' code.
    """
    tiny = torch.finfo(g_forget[0].dtype).tiny  # where g_f is 0, the result is g_r and not NaN
    norm_squared = inner(g_forget, g_forget).clamp_min(tiny)
    overlap = inner(g_remain, g_forget) / norm_squared
    scale = (eta - overlap).clamp_min(0)
    return [r + scale * f for r, f in zip(g_remain, g_forget, strict=True)]


def siss_losses(
    eps_model: EpsModel,
    x0_remain: Images,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    from_forget: Bool[Tensor, " b"],
    lam: float,
    schedule: NoiseSchedule,
) -> tuple[Loss, Loss]:
    """(L_r, L_f) of SISS (arXiv 2503.01034): one forward pass serves a remain and a forget image.

    The noisy image m comes from the mixture q_lam = (1 - lam) q(.|a_r) + lam q(.|a_u):
    `from_forget` selects the component, and must be True with probability lam. The importance
    weights q(m|a) / q_lam(m) correct for that; they are at most 1 / (1 - lam) and 1 / lam.
    `siss_gradient` combines the gradients of the two losses.

    Raises:
        ValueError: if lam is not in [0, 1], or if shapes do not fit together.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    check_same_shape(x0_remain=x0_remain, x0_forget=x0_forget)
    check_same_shape(from_forget=from_forget, t=t)
    x0 = torch.where(from_forget[:, None, None, None], x0_forget, x0_remain)
    m = schedule.q_sample(x0, t, noise)
    eps_remain = schedule.predict_eps(m, t, x0_remain)
    eps_forget = schedule.predict_eps(m, t, x0_forget)

    # Densities up to the factor that they share. As logarithms, none of them underflows.
    log_q_remain = _log_density(eps_remain)
    log_q_forget = _log_density(eps_forget)
    log_mixture = torch.logaddexp(_log(1 - lam) + log_q_remain, _log(lam) + log_q_forget)
    weight_remain = (log_q_remain - log_mixture).exp().to(m.dtype)
    weight_forget = (log_q_forget - log_mixture).exp().to(m.dtype)

    eps = eps_model(m, t)
    remain = (weight_remain * squared_error(eps, eps_remain)).mean()
    forget = (weight_forget * squared_error(eps, eps_forget)).mean()
    return remain, forget


def _log_density(eps: Images) -> Float[Tensor, " b"]:
    """log N(eps; 0, I) of each image without its constant, in float64."""
    return -0.5 * eps.double().square().flatten(1).sum(1)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def siss_gradient(
    g_remain: Sequence[Tensor], g_forget: Sequence[Tensor], rescale: float | str
) -> list[Tensor]:
    """g_r - s g_f (SISS, arXiv 2503.01034), where s gives the subtracted gradient its norm.

    That norm is `rescale` itself, as in the authors' code (5 for small images), or a share of the
    norm of g_r, as in the paper ("10%").

    Raises:
        InputError: as `parse_rescale`.
    """
    amount, relative = parse_rescale(rescale)
    wanted_norm = amount * inner(g_remain, g_remain).sqrt() if relative else amount
    norm = inner(g_forget, g_forget).sqrt()
    # In a batch without a forget image all weights may be 0, and then so is the gradient.
    scale = torch.where(norm > 0, wanted_norm / norm, 0.0)
    return [r - scale * f for r, f in zip(g_remain, g_forget, strict=True)]


def parse_rescale(rescale: float | str) -> tuple[float, bool]:
    """The amount, and whether it is a share: "5" -> (5, False), "10%" -> (0.1, True).

    Raises:
        InputError: if it is neither a number nor a percentage, or negative.
    """
    number, percent, rest = str(rescale).partition("%")
    try:
        amount = float(number) / (100 if percent else 1)
    except ValueError:
        amount = math.nan
    if rest or not 0 <= amount < math.inf:
        raise InputError(
            f"rescale {rescale}: must be a number or a percentage, 0 or more, such as 5 or 10%"
        )
    return amount, bool(percent)


def vdu_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    params: Sequence[Tensor],
    prior_mean: Sequence[Tensor],
    prior_std: Sequence[Tensor],
    prior_weight: float,
    schedule: NoiseSchedule,
) -> Loss:
    """-(1 - g) E ||eps_theta(x_t, t) - eps||^2 + g sum_i (theta_i - mu_i)^2 / (2 s_i^2).

    VDU (arXiv 2510.04058): gradient ascent on the forget images, with a Gaussian prior on the
    weights: mu and s > 0 are the mean and standard deviation of each weight over several
    checkpoints of the pretraining. g is `prior_weight` (the paper's gamma). `params` are the
    model's own tensors, in the order of the moments. No remain images are needed.
    """
    moments = zip(params, prior_mean, prior_std, strict=True)
    z = [(theta - mu) / s for theta, mu, s in moments]
    ascent = neggrad_loss(eps_model, x0_forget, t, noise, schedule)
    return (1 - prior_weight) * ascent + prior_weight / 2 * inner(z, z)


def dimum_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    x0_alternative: Images,
    t: Steps,
    noise: Images,
    schedule: NoiseSchedule,
) -> Loss:
    """E ||eps_theta(x_t, t) - (x_t - gamma_t a) / sigma_t||^2, plus the DDPM loss on image a.

    The memorisation loss of DiMUM (arXiv 2512.03564): at x_t made from the forget image, the model
    learns to predict an alternative image a; it also learns a by the DDPM loss. The paper's models
    are redirected under a prompt; without prompts, x_t alone says what is redirected. Add
    `ddpm_loss` on remain images.
    """
    x_t = schedule.q_sample(x0_forget, t, noise)
    target = schedule.predict_eps(x_t, t, x0_alternative)
    redirected = squared_error(eps_model(x_t, t), target).mean()
    return redirected + ddpm_loss(eps_model, x0_alternative, t, noise, schedule)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Loss:
    """The inner product of two lists of tensors, such as gradients of the whole model."""
    products = [(x * y).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum()

"""Every unlearning loss, as a pure function of (model, images, t, noise).

A loss is the squared L2 norm per sample, summed over pixels, averaged over the batch. Nothing is
drawn in here: t, the noise and every mask are arguments. `eps_model(x_t, t) -> eps` is any
callable; images are in [-1, 1].

Methods that weigh two gradients against each other (EraseDiff, SISS) come as a pair: `*_losses`
gives the two losses, `*_gradient` combines their gradients, each a list with one tensor a
parameter.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError

EpsModel = Callable[[Tensor, Tensor], Tensor]
Images = Float[Tensor, "b c h w"]
Steps = Int[Tensor, " b"]
Loss = Float[Tensor, ""]


def squared_error(a: Images, b: Images) -> Float[Tensor, " b"]:
    """||a - b||^2, one number a sample."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    return (a - b).square().flatten(1).sum(1)


def ddpm_loss(
    eps_model: EpsModel, x0: Images, t: Steps, noise: Images, schedule: NoiseSchedule
) -> Loss:
    """E ||eps_theta(x_t, t) - eps||^2 (DDPM, arXiv 2006.11239, eq. 14). "Vanilla" when x0 are
    remain images.
    """
    return squared_error(eps_model(schedule.q_sample(x0, t, noise), t), noise).mean()


def neggrad_loss(
    eps_model: EpsModel, x0_forget: Images, t: Steps, noise: Images, schedule: NoiseSchedule
) -> Loss:
    """Gradient ascent on the forget images: minus the DDPM loss. It has no lower bound."""
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
    """(L_r, L_f) of EraseDiff (arXiv 2401.05779), as in the SISS and ReTrack codes.

    L_r is the DDPM loss on remain images; L_f regresses the forget images onto `uniform`, drawn
    from U[0, 1) a pixel.
    Both share t and noise. The gradients go through `erasediff_gradient`.
    """
    x_t = schedule.q_sample(x0_forget, t, noise)
    return ddpm_loss(eps_model, x0_remain, t, noise, schedule), squared_error(
        eps_model(x_t, t), uniform
    ).mean()


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
    """(L_r, L_u) of SISS (arXiv 2503.01034): one forward pass serves a remain and a forget image.

    m is drawn from the mixture q_lam = (1 - lam) q(.|a_r) + lam q(.|a_u): `from_forget` says from
    which half, and must
    be True with probability lam. The importance weights w = q(m|a) / q_lam correct for it; they
    come from
    log-densities and are at most 1 / (1 - lam) and 1 / lam. The gradients go through
    `siss_gradient`.

    Raises:
        ValueError: if lam is not in [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    m = schedule.q_sample(
        torch.where(from_forget[:, None, None, None], x0_forget, x0_remain), t, noise
    )
    eps_remain, eps_forget = (
        schedule.predict_eps(m, t, x0_remain),
        schedule.predict_eps(m, t, x0_forget),
    )
    log_q = -0.5 * torch.stack([eps_remain, eps_forget]).double().square().flatten(2).sum(
        2
    )  # [2, b], up to a constant
    log_mix = torch.stack(
        [log_q.new_full((1,), share) for share in (1 - lam, lam)]
    ).log()  # a copy would wait on CUDA
    weights = (log_q - torch.logsumexp(log_q + log_mix, dim=0)).exp().to(m.dtype)  # [2, b]
    eps = eps_model(m, t)
    errors = torch.stack([squared_error(eps, eps_remain), squared_error(eps, eps_forget)])
    remain, forget = (weights * errors).mean(1)
    return remain, forget


def retrack_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    target: Images,
    schedule: NoiseSchedule,
    snr_cap: float = math.inf,
) -> Loss:
    """E w_t ||eps_theta(x_t, t) - target||^2 with x_t from the forget image (ReTrack, arXiv
    2509.13007, target form).

    `target` is what the remaining data would say at this x_t: `exact_target`, `knn_target` or
    `topk_target` of
    tiny_retrack.posterior, at x_t = schedule.q_sample(x0_forget, t, noise).

    The paper has w = 1: then redirecting x_t by a distance d in x0 costs SNR_t d^2, with SNR_t =
    gamma_t^2 / sigma_t^2
    up to 10^4, and little noise is nearly all that is learned. w = min(1, snr_cap / SNR_t), the
    weight of Min-SNR
    (arXiv 2303.09556) for eps, bounds that cost. A positive factor of t leaves the minimiser at
    every x_t as it is.
    """
    errors = squared_error(eps_model(schedule.q_sample(x0_forget, t, noise), t), target)
    gamma, sigma = schedule.scales(t, errors)
    return ((snr_cap * (sigma / gamma).square()).clamp(max=1) * errors).mean()


def retrack_weighted_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    neighbors: Float[Tensor, "b k c h w"],
    schedule: NoiseSchedule,
) -> Loss:
    """E sum_k p_k ||eps_theta(x_t, t) - v_k||^2 over the given neighbours (ReTrack, arXiv
    2509.13007, as published).

    v_k = (x_t - gamma_t a_k) / sigma_t and p = softmax_k of -||x_t - gamma_t a_k||^2 / (2
    sigma_t^2). It exceeds
    `retrack_loss` with `knn_target` by the posterior variance of v, which does not depend on the
    model: the gradients
    are equal.
    """
    x_t = schedule.q_sample(x0_forget, t, noise)
    a = (
        neighbors.double()
    )  # ||v||^2 reaches 1e7 at t = 0, where float32 no longer tells neighbours apart
    gamma, sigma = schedule.scales(t, a)
    v = (x_t.double()[:, None] - gamma * a) / sigma  # [b, k, c, h, w]
    weights = torch.softmax(-0.5 * v.square().flatten(2).sum(2), dim=1).to(x_t.dtype)  # [b, k]
    v = v.to(x_t.dtype)
    errors = (eps_model(x_t, t)[:, None] - v).square().flatten(2).sum(2)  # [b, k]
    return (weights * errors).sum(1).mean()


def vdu_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    t: Steps,
    noise: Images,
    weights: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    gamma: float,
    schedule: NoiseSchedule,
) -> Loss:
    """-(1 - gamma) E ||eps_theta(x_t, t) - eps||^2 + gamma sum_i (theta_i - mu_i)^2 / (2 s_i^2).

    VDU (arXiv 2510.04058): gradient ascent on the forget images, held back by the Gaussian that
    pretraining leaves
    over the weights: mu and s > 0 are the mean and standard deviation of each weight over several
    of its checkpoints.
    `weights` are the model's own tensors, in the same order. No remain images are needed.
    """
    z = [(w - m) / s for w, m, s in zip(weights, mean, std, strict=True)]
    return (1 - gamma) * neggrad_loss(eps_model, x0_forget, t, noise, schedule) + gamma / 2 * inner(
        z, z
    )


def dimum_loss(
    eps_model: EpsModel,
    x0_forget: Images,
    x0_alternative: Images,
    t: Steps,
    noise: Images,
    schedule: NoiseSchedule,
) -> Loss:
    """E ||eps_theta(x_t, t) - (x_t - gamma_t a) / sigma_t||^2 + E ||eps_theta(gamma_t a + sigma_t
    eps, t) - eps||^2.

    The memorisation loss of DiMUM (arXiv 2512.03564): where the model would see the forget image,
    at x_t made from it,
    it learns its alternative a; and it learns a itself. The paper's models are conditional, and
    there it is the
    prompt that picks x_t; without one, x_t is all there is. To be used beside `ddpm_loss` on remain
    images.
    """
    x_t = schedule.q_sample(x0_forget, t, noise)
    redirected = squared_error(
        eps_model(x_t, t), schedule.predict_eps(x_t, t, x0_alternative)
    ).mean()
    return redirected + ddpm_loss(eps_model, x0_alternative, t, noise, schedule)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Loss:
    """The inner product of two whole-model gradients."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def erasediff_gradient(
    g_remain: Sequence[Tensor], g_forget: Sequence[Tensor], eta: float = 1e-3
) -> list[Tensor]:
    """g_r + max(eta - <g_r, g_f> / ||g_f||^2, 0) g_f: descend on L_r, never let L_f rise (arXiv
    2401.05779).
    """
    norm2 = inner(g_forget, g_forget).clamp_min(torch.finfo(g_forget[0].dtype).tiny)
    scale = (eta - inner(g_remain, g_forget) / norm2).clamp_min(0)
    return [r + scale * f for r, f in zip(g_remain, g_forget, strict=True)]


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
            f"rescale {rescale}: must be a number or a percentage from 0 on, such as 5 or 10%"
        )
    return amount, bool(percent)


def siss_gradient(
    g_remain: Sequence[Tensor], g_forget: Sequence[Tensor], rescale: float | str
) -> list[Tensor]:
    """g_r - s g_u (arXiv 2503.01034). The subtracted gradient's norm is `rescale`, or a share of
    g_r's if "10%".

    The paper ties the norm to the kept gradient's; the published code sets it absolutely, 5 for
    small images.

    Raises:
        InputError: as `parse_rescale`.
    """
    amount, relative = parse_rescale(rescale)
    norm = inner(g_forget, g_forget).sqrt()
    scale = amount / norm * (inner(g_remain, g_remain).sqrt() if relative else 1)
    scale = torch.where(
        norm > 0, scale, 0.0
    )  # a batch without forget images may have w_u = 0 everywhere
    return [r - scale * f for r, f in zip(g_remain, g_forget, strict=True)]

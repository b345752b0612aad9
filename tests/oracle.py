"""The papers in plain Python: the reference that the tests compare the product with.

Everything is float64 arithmetic in loops over Python floats, written from the papers and from
docs/theory.md, whose equations (1) to (8) the docstrings name. Nothing of tiny_retrack is imported,
so an error in the product cannot repeat itself here.

An image is a flat list of pixels in [-1, 1], a batch is a list of images, and a denoiser is a
function of one noisy image: `eps_model(x_t, t) -> eps`. Losses are summed over pixels and averaged
over the batch.
"""

import math
from collections.abc import Callable, Sequence
from decimal import Context, Decimal, localcontext

from torch import Tensor

Image = list[float]
EpsModel = Callable[[Image, int], Image]


def flat(images: Tensor) -> list[Image]:
    """Images [n, c, h, w] as n lists of c*h*w float64 pixels in [-1, 1].

    uint8 pixels are scaled in float32, because the product gives them to its models in float32.
    """
    if not images.is_floating_point():
        images = images.float() / 127.5 - 1
    return images.flatten(1).double().tolist()


# --- Vectors ---


def inner(a: Sequence[float], b: Sequence[float]) -> float:
    """<a, b>."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Sequence[float]) -> float:
    """||a||, the L2 norm."""
    return math.sqrt(inner(a, a))


def squared_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """||a - b||^2."""
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def weighted_sum(weights: Sequence[float], vectors: Sequence[Sequence[float]]) -> list[float]:
    """sum_n weights_n vectors_n."""
    columns = zip(*vectors, strict=True)
    return [inner(weights, column) for column in columns]


def log_sum_exp(logs: Sequence[float]) -> float:
    """log sum_n exp(logs_n), for logs of any size."""
    largest = max(logs)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in logs))


def weighted_logs(logs: Sequence[float], weights: Sequence[float] | None) -> list[float]:
    """log(weights_n exp(logs_n)); an image of weight 0 has probability 0."""
    if weights is None:
        return list(logs)
    return [
        log + math.log(weight) if weight > 0 else -math.inf
        for log, weight in zip(logs, weights, strict=True)
    ]


# --- The forward process (DDPM, arXiv 2006.11239, section 2) ---


def linear_betas(num_steps: int, beta_start: float, beta_end: float) -> list[float]:
    """beta_t, evenly spaced from `beta_start` to `beta_end` (DDPM, section 4)."""
    step = (beta_end - beta_start) / max(1, num_steps - 1)
    return [beta_start + t * step for t in range(num_steps)]


def alpha_bars(betas: Sequence[float]) -> list[float]:
    """alpha_bar_t = (1 - beta_0) ... (1 - beta_t) (DDPM, before eq. 4)."""
    product = 1.0
    products = []
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return products


BETA = linear_betas(1000, 1e-4, 0.02)  # the schedule of the papers
ALPHA_BAR = alpha_bars(BETA)


def gamma(t: int) -> float:
    """The scale of the image in x_t: sqrt(alpha_bar_t)."""
    return math.sqrt(ALPHA_BAR[t])


def sigma(t: int) -> float:
    """The scale of the noise in x_t: sqrt(1 - alpha_bar_t)."""
    return math.sqrt(1 - ALPHA_BAR[t])


def snr(t: int) -> float:
    """The signal-to-noise ratio gamma_t^2 / sigma_t^2."""
    return ALPHA_BAR[t] / (1 - ALPHA_BAR[t])


def noised(x0: Image, t: int, noise: Image) -> Image:
    """x_t = gamma_t x0 + sigma_t noise (DDPM, eq. 4)."""
    return [gamma(t) * a + sigma(t) * e for a, e in zip(x0, noise, strict=True)]


def implied_noise(x_t: Image, t: int, x0: Image) -> Image:
    """v(x_t) = (x_t - gamma_t x0) / sigma_t: the noise in x_t if x0 is behind it."""
    return [(x - gamma(t) * a) / sigma(t) for x, a in zip(x_t, x0, strict=True)]


def implied_x0(x_t: Image, t: int, eps: Image) -> Image:
    """(x_t - sigma_t eps) / gamma_t: the image behind x_t if its noise is eps (DDPM, eq. 15)."""
    return [(x - sigma(t) * e) / gamma(t) for x, e in zip(x_t, eps, strict=True)]


# --- The posterior over a finite data set (docs/theory.md, sections 1, 2 and 5) ---


def log_density(x_t: Image, t: int, x0: Image) -> float:
    """log q(x_t | x0) = log N(x_t; gamma_t x0, sigma_t^2 I)."""
    noise = implied_noise(x_t, t, x0)
    log_normaliser = len(x_t) * math.log(math.sqrt(2 * math.pi) * sigma(t))
    return -inner(noise, noise) / 2 - log_normaliser


def log_mixture_density(
    x_t: Image, t: int, images: Sequence[Image], weights: Sequence[float] | None = None
) -> float:
    """log of q_r(x_t) = sum_n w_n q(x_t | a_n), with w_n = 1/N unless weights are given."""
    if weights is None:
        weights = [1 / len(images)] * len(images)
    logs = [log_density(x_t, t, image) for image in images]
    return log_sum_exp(weighted_logs(logs, weights))


def log_posterior(
    x_t: Image, t: int, images: Sequence[Image], weights: Sequence[float] | None = None
) -> list[float]:
    """log p(a_n | x_t) by Bayes' rule (docs/theory.md, section 1); the exponentials sum to 1."""
    logs = weighted_logs([log_density(x_t, t, image) for image in images], weights)
    total = log_sum_exp(logs)
    return [value - total for value in logs]


def posterior(
    x_t: Image, t: int, images: Sequence[Image], weights: Sequence[float] | None = None
) -> list[float]:
    """p(a_n | x_t)."""
    return [math.exp(value) for value in log_posterior(x_t, t, images, weights)]


def posterior_mean(
    x_t: Image, t: int, images: Sequence[Image], weights: Sequence[float] | None = None
) -> Image:
    """sum_n p_n a_n."""
    return weighted_sum(posterior(x_t, t, images, weights), images)


def ideal_eps(
    x_t: Image, t: int, images: Sequence[Image], weights: Sequence[float] | None = None
) -> Image:
    """eps*(x_t) = sum_n p_n v_n(x_t), the minimiser of the DDPM loss over `images` (2)."""
    return implied_noise(x_t, t, posterior_mean(x_t, t, images, weights))


def posterior_variance(x_t: Image, t: int, images: Sequence[Image]) -> float:
    """V(x_t) = sum_n p_n ||v_n - eps*||^2 (5)."""
    best = ideal_eps(x_t, t, images)
    errors = [squared_distance(implied_noise(x_t, t, image), best) for image in images]
    return inner(posterior(x_t, t, images), errors)


def nearest_neighbors(query: Image, images: Sequence[Image], k: int) -> list[int]:
    """The k images nearest to `query`, nearest first; of equally near ones the first in order."""
    distances = [math.dist(query, image) for image in images]
    order = sorted(range(len(images)), key=distances.__getitem__)
    return order[:k]


def nearest_to_x0(x_t: Image, t: int, images: Sequence[Image], k: int) -> list[int]:
    """The k images nearest to x_t / gamma_t: those of largest posterior (docs/theory.md, 5)."""
    return nearest_neighbors([x / gamma(t) for x in x_t], images, k)


def tail_mass(x_t: Image, t: int, images: Sequence[Image], kept: Sequence[int]) -> float:
    """tau: the posterior mass of the images that are not kept (docs/theory.md, section 5)."""
    p = posterior(x_t, t, images)
    return math.fsum(p[n] for n in range(len(images)) if n not in kept)


def total_variation(p: Sequence[float], q: Sequence[float]) -> float:
    """Half the L1 distance of two distributions."""
    return math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


# --- The targets of ReTrack (arXiv 2509.13007) ---


def exact_target(x_t: Image, t: int, remain: Sequence[Image]) -> Image:
    """eps* of the whole remain set (2)."""
    return ideal_eps(x_t, t, remain)


def knn_target(x_t: Image, t: int, forget: Image, remain: Sequence[Image], k: int) -> Image:
    """eps* of the k remain images nearest to the forget image, as published."""
    kept = nearest_neighbors(forget, remain, k)
    return ideal_eps(x_t, t, [remain[n] for n in kept])


def topk_target(x_t: Image, t: int, remain: Sequence[Image], k: int) -> Image:
    """eps* of the k remain images nearest to x_t / gamma_t."""
    kept = nearest_to_x0(x_t, t, remain, k)
    return ideal_eps(x_t, t, [remain[n] for n in kept])


def solve(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """The x of matrix x = vector, by Gaussian elimination with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(rows[row][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(size):
            if j != i:
                factor = rows[j][i] / rows[i][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[size] / row[i] for i, row in enumerate(rows)]


def mean_and_covariance(images: Sequence[Image]) -> tuple[Image, list[list[float]]]:
    """Over the pixels; the covariance over N - 1."""
    mean = [average(pixel) for pixel in zip(*images, strict=True)]
    centred = [[a - m for a, m in zip(image, mean, strict=True)] for image in images]
    covariance = []
    for column in zip(*centred, strict=True):
        others = zip(*centred, strict=True)
        covariance.append([inner(column, other) / (len(images) - 1) for other in others])
    return mean, covariance


def gaussian_target(x_t: Image, t: int, images: Sequence[Image]) -> Image:
    """(9): x0 = mu + gamma C (gamma^2 C + sigma^2 I)^-1 (x_t - gamma mu)."""
    mean, covariance = mean_and_covariance(images)
    size = len(mean)
    noisy = []
    for i in range(size):
        row = [gamma(t) ** 2 * value for value in covariance[i]]
        row[i] += sigma(t) ** 2
        noisy.append(row)
    away = [x - gamma(t) * m for x, m in zip(x_t, mean, strict=True)]
    solved = solve(noisy, away)
    x0 = [m + gamma(t) * inner(row, solved) for m, row in zip(mean, covariance, strict=True)]
    return implied_noise(x_t, t, x0)


def local_target(
    x_t: Image, t: int, images: Sequence[Image], shape: tuple[int, int, int], patch: int
) -> Image:
    """(10): each pixel's posterior mean, given the patch x patch window around it."""
    channels, height, width = shape
    reach = patch // 2
    x0 = []
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                window = []
                for plane in range(channels):
                    for row in range(max(0, y - reach), min(height, y + reach + 1)):
                        for column in range(max(0, x - reach), min(width, x + reach + 1)):
                            window.append((plane * height + row) * width + column)
                seen = [x_t[place] for place in window]
                candidates = [[image[place] for place in window] for image in images]
                place = (channel * height + y) * width + x
                values = [[image[place]] for image in images]
                weights = posterior(seen, t, candidates)
                x0 += weighted_sum(weights, values)
    return implied_noise(x_t, t, x0)


# --- The losses ---


def regression_loss(
    eps_model: EpsModel,
    x0: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
    target: Sequence[Image],
    snr_cap: float = math.inf,
) -> float:
    """Mean of min(1, snr_cap / SNR_t) ||eps_theta(x_t, t) - target||^2.

    The weight is that of Min-SNR (arXiv 2303.09556) for a model that predicts eps: by (8), a cap
    of 1 takes the smaller of the squared errors of x0 and of eps. Without a cap it is 1.
    """
    errors = []
    for a, step, e, wanted in zip(x0, t, noise, target, strict=True):
        weight = min(1.0, snr_cap / snr(step))
        predicted = eps_model(noised(a, step, e), step)
        errors.append(weight * squared_distance(predicted, wanted))
    return average(errors)


def ddpm_loss(
    eps_model: EpsModel, x0: Sequence[Image], t: Sequence[int], noise: Sequence[Image]
) -> float:
    """L_simple (DDPM, arXiv 2006.11239, eq. 14); over remain images the vanilla loss (1)."""
    return regression_loss(eps_model, x0, t, noise, target=noise)


def neggrad_loss(
    eps_model: EpsModel, x0_forget: Sequence[Image], t: Sequence[int], noise: Sequence[Image]
) -> float:
    """Gradient ascent: minus the DDPM loss of the forget images."""
    return -ddpm_loss(eps_model, x0_forget, t, noise)


def erasediff_losses(
    eps_model: EpsModel,
    x0_remain: Sequence[Image],
    x0_forget: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
    uniform: Sequence[Image],
) -> tuple[float, float]:
    """(L_r, L_f) of EraseDiff (arXiv 2401.05779): L_f regresses forget images onto U[0, 1)."""
    remain_loss = ddpm_loss(eps_model, x0_remain, t, noise)
    forget_loss = regression_loss(eps_model, x0_forget, t, noise, target=uniform)
    return remain_loss, forget_loss


def siss_weights(
    m: Image, t: int, x0_remain: Image, x0_forget: Image, lam: float
) -> tuple[float, float]:
    """(w_r, w_u) of SISS (arXiv 2503.01034): q(m | a) / ((1 - lam) q(m | a_r) + lam q(m | a_u)).

    The densities themselves are formed, as decimals: their exponents have no limit that matters.
    """
    with localcontext(Context(prec=40, Emax=10**12, Emin=-(10**12))):
        q_remain = Decimal(log_density(m, t, x0_remain)).exp()
        q_forget = Decimal(log_density(m, t, x0_forget)).exp()
        mixture = (1 - Decimal(lam)) * q_remain + Decimal(lam) * q_forget
        return float(q_remain / mixture), float(q_forget / mixture)


def siss_losses(
    eps_model: EpsModel,
    x0_remain: Sequence[Image],
    x0_forget: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
    from_forget: Sequence[bool],
    lam: float,
) -> tuple[float, float]:
    """(L_r, L_u) of SISS (arXiv 2503.01034): both importance-sampled from one mixture sample m."""
    remain_errors = []
    forget_errors = []
    for i, step in enumerate(t):
        origin = x0_forget[i] if from_forget[i] else x0_remain[i]
        m = noised(origin, step, noise[i])
        w_remain, w_forget = siss_weights(m, step, x0_remain[i], x0_forget[i], lam)
        eps = eps_model(m, step)
        noise_remain = implied_noise(m, step, x0_remain[i])
        noise_forget = implied_noise(m, step, x0_forget[i])
        remain_errors.append(w_remain * squared_distance(eps, noise_remain))
        forget_errors.append(w_forget * squared_distance(eps, noise_forget))
    return average(remain_errors), average(forget_errors)


def retrack_loss(
    eps_model: EpsModel,
    x0_forget: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
    target: Sequence[Image],
    snr_cap: float = math.inf,
) -> float:
    """ReTrack (arXiv 2509.13007), target form: the first term on the right of (5), over (4)."""
    return regression_loss(eps_model, x0_forget, t, noise, target, snr_cap)


def retrack_weighted_loss(
    eps_model: EpsModel,
    x0_forget: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
    neighbors: Sequence[Sequence[Image]],
) -> float:
    """ReTrack (arXiv 2509.13007) as published: sum_k p_k ||eps_theta - v_k||^2, (4)."""
    totals = []
    for a, step, e, images in zip(x0_forget, t, noise, neighbors, strict=True):
        x_t = noised(a, step, e)
        eps = eps_model(x_t, step)
        errors = [squared_distance(eps, implied_noise(x_t, step, image)) for image in images]
        totals.append(inner(posterior(x_t, step, images), errors))
    return average(totals)


def vdu_loss(
    eps_model: EpsModel,
    x0_forget: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
    weights: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    prior_weight: float,
) -> float:
    """VDU (arXiv 2510.04058): ascent, held back by the Gaussian of the pretraining's weights."""
    squares = [((w - m) / s) ** 2 for w, m, s in zip(weights, mean, std, strict=True)]
    ascent = neggrad_loss(eps_model, x0_forget, t, noise)
    return (1 - prior_weight) * ascent + prior_weight * math.fsum(squares) / 2


def weight_moments(
    kept: Sequence[Sequence[float]], std_floor: float = 0.1
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (1/(n-1)) of each weight over the kept checkpoints, for VDU.

    No standard deviation is below `std_floor` times their root mean square.
    """
    means = [average(values) for values in zip(*kept, strict=True)]
    stds = []
    for values, center in zip(zip(*kept, strict=True), means, strict=True):
        squares = math.fsum((value - center) ** 2 for value in values)
        stds.append(math.sqrt(squares / (len(kept) - 1)))
    floor = std_floor * math.sqrt(average([std**2 for std in stds]))
    return means, [max(std, floor) for std in stds]


def dimum_loss(
    eps_model: EpsModel,
    x0_forget: Sequence[Image],
    x0_alternative: Sequence[Image],
    t: Sequence[int],
    noise: Sequence[Image],
) -> float:
    """DiMUM's memorisation loss (arXiv 2512.03564), without a condition.

    x_t of the forget image is answered as if the alternative were behind it, and the alternative
    itself is learned.
    """
    targets = []
    for a, step, e, alternative in zip(x0_forget, t, noise, x0_alternative, strict=True):
        targets.append(implied_noise(noised(a, step, e), step, alternative))
    redirected = regression_loss(eps_model, x0_forget, t, noise, targets)
    return redirected + ddpm_loss(eps_model, x0_alternative, t, noise)


# --- Two gradients into one ---


def erasediff_gradient(
    g_remain: Sequence[float], g_forget: Sequence[float], eta: float = 1e-3
) -> list[float]:
    """g_r + max(eta - <g_r, g_f> / ||g_f||^2, 0) g_f (EraseDiff, arXiv 2401.05779)."""
    scale = max(eta - inner(g_remain, g_forget) / inner(g_forget, g_forget), 0.0)
    return [r + scale * f for r, f in zip(g_remain, g_forget, strict=True)]


def siss_gradient(
    g_remain: Sequence[float], g_forget: Sequence[float], rescale: float | str
) -> list[float]:
    """g_r - s g_u (SISS, arXiv 2503.01034), with ||s g_u|| = rescale, or "10%" of ||g_r||."""
    if isinstance(rescale, str) and rescale.endswith("%"):
        length = float(rescale[:-1]) / 100 * norm(g_remain)
    else:
        length = float(rescale)
    scale = length / norm(g_forget)
    return [r - scale * f for r, f in zip(g_remain, g_forget, strict=True)]

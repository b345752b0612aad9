"""The mistakes that students make, planted to see that the tests catch them. Never handed out.

A mistake is a replacement inside one function; a correct alternative is another body of some.
`python docs/course/kit.py mistakes` runs the tests of its part on each.
"""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from textwrap import dedent
from typing import Any

from functions import ROOT, Functions, KitError, source

POSTERIOR = "tiny_retrack/posterior.py"
LOSSES = "tiny_retrack/losses.py"
METHODS = "tiny_retrack/methods.py"
METRICS = "tiny_retrack/metrics.py"
ATTACKS = "tiny_retrack/attacks.py"


@dataclass(frozen=True)
class Mistake:
    """One wrong line.

    Attributes:
        part: of the assignment.
        old, new: text of the function, which has `old` once, and what a student wrote instead.
        caught_by: a test of that part that fails.
        biased: whether part 2's own test must fail on it: the expected loss is another one.
    """

    part: int
    about: str
    path: str
    function: str
    old: str
    new: str
    caught_by: str
    biased: bool = False


@dataclass(frozen=True)
class Correct:
    """Another implementation that must get all points of its part."""

    part: int
    about: str
    functions: Functions


def planted(mistake: Mistake) -> Functions:
    """The function with the mistake in it, to be put in the reference's place.

    Raises:
        KitError: if the function does not have the old text exactly once.
    """
    text = (ROOT / mistake.path).read_text(encoding="utf-8")
    body = source(text, mistake.function, mistake.path)
    if body.count(mistake.old) != 1:
        raise KitError(
            f"{mistake.function} of {mistake.path} does not have {mistake.old!r} once: mend "
            f"docs/course/mistakes.py"
        )
    return {mistake.path: {mistake.function: body.replace(mistake.old, mistake.new)}}


@contextmanager
def in_memory(functions: Functions) -> Iterator[None]:
    """While the block lasts, the package's functions run other code, wherever they are imported."""
    before = []
    try:
        for path, named in functions.items():
            module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            for name, text in named.items():
                defined: dict[str, Any] = {}
                exec(dedent(text), vars(module), defined)
                function = inspect.unwrap(attrgetter(name)(module))
                (other,) = map(inspect.unwrap, defined.values())
                before.append((function, function.__code__))
                function.__code__ = other.__code__
        yield
    finally:
        for function, code in before:
            function.__code__ = code


PART_1 = [
    Mistake(
        1,
        "softmax over the batch",
        POSTERIOR,
        "log_posterior",
        "torch.log_softmax(logits, dim=1)",
        "torch.log_softmax(logits, dim=0)",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "exp before normalising: NaN at t = 0",
        POSTERIOR,
        "log_posterior",
        "torch.log_softmax(logits, dim=1)",
        "(logits.exp() / logits.exp().sum(1, keepdim=True)).log()",
        "test_exact_target_of_whole_images_equals_the_oracle[0]",
    ),
    Mistake(
        1,
        "the posterior in float32",
        POSTERIOR,
        "log_posterior",
        "torch.log_softmax(logits, dim=1)",
        "torch.log_softmax(logits.float(), dim=1)",
        "test_exact_target_of_whole_images_equals_the_oracle[0]",
    ),
    Mistake(
        1,
        "softmax per chunk",
        POSTERIOR,
        "log_posterior",
        "torch.log_softmax(logits, dim=1)",
        "torch.cat([part.log_softmax(1) for part in logits.split(_rows(data), dim=1)], 1)",
        "test_posterior_in_chunks_is_the_same",
    ),
    Mistake(
        1,
        "sigma for sigma^2 in the exponent",
        POSTERIOR,
        "_logits",
        "gamma / sigma.square() * (",
        "gamma / sigma * (",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "the half forgotten",
        POSTERIOR,
        "_logits",
        "gamma / sigma.square() * (",
        "2 * gamma / sigma.square() * (",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "the half forgotten in the bias",
        POSTERIOR,
        "_logits",
        "gamma / 2 * norm_squared",
        "gamma * norm_squared",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "||x_t - a|| without gamma",
        POSTERIOR,
        "_logits",
        "return gamma / sigma.square() * (inner - gamma / 2 * norm_squared)",
        "return 1 / sigma.square() * (inner - norm_squared / 2)",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "||a||^2 dropped as if it were a constant",
        POSTERIOR,
        "_logits",
        "(inner - gamma / 2 * norm_squared)",
        "inner",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "mean over pixels in the distance",
        POSTERIOR,
        "_logits",
        "gamma / sigma.square() * (",
        "gamma / sigma.square() / x.shape[1] * (",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "one t for the whole batch",
        POSTERIOR,
        "_logits",
        "schedule.scales(t, x)",
        "schedule.scales(t[:1].expand_as(t), x)",
        "test_log_posterior_equals_the_oracle_and_sums_to_1",
    ),
    Mistake(
        1,
        "sigma^2 in v",
        POSTERIOR,
        "_mixture_eps",
        "return eps.to(x_t.dtype)",
        "return (eps / schedule.scales(t, eps)[1]).to(x_t.dtype)",
        "test_ideal_eps_and_exact_target_equal_the_oracle",
    ),
    Mistake(
        1,
        "the score with the wrong sign",
        POSTERIOR,
        "_mixture_eps",
        "return eps.to(x_t.dtype)",
        "return -eps.to(x_t.dtype)",
        "test_ideal_eps_is_the_score",
    ),
    Mistake(
        1,
        "weights added to logits without their logarithm",
        POSTERIOR,
        "ideal_eps",
        "weights.double().log()",
        "weights.double()",
        "test_ideal_eps_counts_duplicates_by_multiplicity",
    ),
]

PART_2 = [
    Mistake(
        2,
        "importance weight upside down",
        LOSSES,
        "siss_losses",
        "weight_remain = (log_q_remain - log_mixture)",
        "weight_remain = (log_mixture - log_q_remain)",
        "test_loss_value_and_gradient_equal_the_oracle[siss_losses]",
        biased=True,
    ),
    Mistake(
        2,
        "lambda and 1 - lambda swapped",
        LOSSES,
        "siss_losses",
        "torch.logaddexp(_log(1 - lam) + log_q_remain, _log(lam) + log_q_forget)",
        "torch.logaddexp(_log(lam) + log_q_remain, _log(1 - lam) + log_q_forget)",
        "test_loss_value_and_gradient_equal_the_oracle[siss_losses]",
        biased=True,
    ),
    Mistake(
        2,
        "mixture without its shares",
        LOSSES,
        "siss_losses",
        "torch.logaddexp(_log(1 - lam) + log_q_remain, _log(lam) + log_q_forget)",
        "torch.logaddexp(log_q_remain, log_q_forget)",
        "test_loss_value_and_gradient_equal_the_oracle[siss_losses]",
        biased=True,
    ),
    Mistake(
        2,
        "self-normalised weights",
        LOSSES,
        "siss_losses",
        "    eps = eps_model(m, t)\n",
        "    weight_remain = weight_remain / weight_remain.mean()\n"
        "    weight_forget = weight_forget / weight_forget.mean()\n"
        "    eps = eps_model(m, t)\n",
        "test_loss_is_a_mean_over_the_batch[siss_losses]",
        biased=True,
    ),
    Mistake(
        2,
        "both errors against the drawn noise",
        LOSSES,
        "siss_losses",
        "    eps = eps_model(m, t)\n",
        "    eps = eps_model(m, t)\n    eps_remain = eps_forget = noise\n",
        "test_loss_value_and_gradient_equal_the_oracle[siss_losses]",
        biased=True,
    ),
    Mistake(
        2,
        "densities before logarithms",
        LOSSES,
        "siss_losses",
        "torch.logaddexp(_log(1 - lam) + log_q_remain, _log(lam) + log_q_forget)",
        "((1 - lam) * log_q_remain.exp() + lam * log_q_forget.exp()).log()",
        "test_siss_weights_are_finite_between_black_and_white_images",
    ),
    Mistake(
        2,
        "mean over pixels in the density",
        LOSSES,
        "_log_density",
        ".flatten(1).sum(1)",
        ".flatten(1).mean(1)",
        "test_loss_value_and_gradient_equal_the_oracle[siss_losses]",
    ),
]

PART_3 = [
    Mistake(
        3,
        "the first image's neighbours for all",
        POSTERIOR,
        "knn_target",
        "neighbors.flatten(2)",
        "neighbors[:1].expand_as(neighbors).flatten(2)",
        "test_knn_target_equals_the_oracle",
    ),
    Mistake(
        3,
        "no renormalising after top-k",
        POSTERIOR,
        "topk_target",
        "torch.softmax(logits, dim=1))",
        "(logits - _all_logits(x_t, t, remain, schedule).logsumexp(1, keepdim=True)).exp())",
        "test_topk_target_keeps_the_images_nearest_to_x0",
    ),
    Mistake(
        3,
        "top-k of the least likely images",
        POSTERIOR,
        "topk_target",
        ".topk(k, dim=1)",
        ".topk(k, dim=1, largest=False)",
        "test_topk_target_keeps_the_images_nearest_to_x0",
    ),
    Mistake(
        3,
        "tail mass as 1 - kept in float32",
        POSTERIOR,
        "tail_mass",
        "p.scatter(1, kept, 0.0).sum(1).to(x_t.dtype)",
        "(1 - p.gather(1, kept).sum(1).float()).to(x_t.dtype)",
        "test_tail_mass_keeps_tiny_values",
    ),
    Mistake(
        3,
        "the target is the drawn noise",
        LOSSES,
        "retrack_loss",
        "regression_loss(eps_model(x_t, t), target,",
        "regression_loss(eps_model(x_t, t), noise,",
        "test_loss_value_and_gradient_equal_the_oracle[retrack_loss]",
    ),
    Mistake(
        3,
        "square of the mean for the mean of squares",
        LOSSES,
        "retrack_weighted_loss",
        "return (p * errors).sum(1).mean()",
        "mean = (p[:, :, None, None, None] * v.to(x_t.dtype)).sum(1)\n"
        "    return (eps - mean).square().flatten(1).sum(1).mean()",
        "test_loss_value_and_gradient_equal_the_oracle[retrack_weighted_loss]",
    ),
    Mistake(
        3,
        "neighbours weighed alike",
        LOSSES,
        "retrack_weighted_loss",
        "torch.softmax(logits, dim=1)",
        "torch.softmax(0 * logits, dim=1)",
        "test_loss_value_and_gradient_equal_the_oracle[retrack_weighted_loss]",
    ),
    Mistake(
        3,
        "mean over pixels in the loss",
        LOSSES,
        "regression_loss",
        "errors = squared_error(eps, target)",
        "errors = squared_error(eps, target) / eps[0].numel()",
        "test_loss_value_and_gradient_equal_the_oracle[retrack_loss]",
    ),
    Mistake(
        3,
        "SNR cap upside down",
        LOSSES,
        "regression_loss",
        "(sigma / gamma).square()",
        "(gamma / sigma).square()",
        "test_loss_value_and_gradient_equal_the_oracle[retrack_loss, SNR cap 0.5]",
    ),
]

PART_4 = [
    Mistake(
        4,
        "k-NN that includes the forgotten image",
        METHODS,
        "knn",
        "nearest_neighbors(task.forget, task.remain, settings.k)  # [m, k]",
        "nearest_neighbors(\n"
        "        task.forget, torch.cat([task.remain, task.forget]), settings.k\n"
        "    )\n"
        "    both = torch.cat([task.remain, task.forget])\n"
        "    task = Task(both, task.forget, task.schedule)",
        "test_method_gradient_equals_the_oracle[retrack-knn]",
    ),
    Mistake(
        4,
        "neighbours by place in the batch, not by image",
        METHODS,
        "knn",
        "neighbors[forget_index]",
        "neighbors[torch.arange(len(t)) % len(neighbors)]",
        "test_method_gradient_equals_the_oracle[retrack-knn]",
    ),
    Mistake(
        4,
        "lambda on the wrong loss",
        METHODS,
        "ReTrack.losses",
        "self.lam * forget + (1 - self.lam) * remain",
        "self.lam * remain + (1 - self.lam) * forget",
        "test_method_gradient_equals_the_oracle[retrack-exact]",
    ),
    Mistake(
        4,
        "the remain batch with the forget batch's noise",
        METHODS,
        "ReTrack.losses",
        "squared_error(eps_remain, batch.noise_remain)",
        "squared_error(eps_remain, batch.noise)",
        "test_method_gradient_equals_the_oracle[retrack-exact]",
    ),
    Mistake(
        4,
        "the target at the remain x_t",
        METHODS,
        "ReTrack.losses",
        "prepared(x_forget, batch.t,",
        "prepared(x_remain, batch.t,",
        "test_method_gradient_equals_the_oracle[retrack-exact]",
    ),
    Mistake(
        4,
        "a target that carries the model's gradient",
        METHODS,
        "ReTrack.losses",
        "target = prepared(x_forget,",
        "target = prepared(x_forget + eps_forget - eps_forget.detach(),",
        "test_method_gradient_equals_the_oracle[retrack-exact]",
    ),
    Mistake(
        4,
        "sum over pixels in the distance",
        METRICS,
        "eps_distance",
        ".mean(1)",
        ".sum(1)",
        "test_eps_distance_is_the_mean_square_over_pixels",
    ),
    Mistake(
        4,
        "sigma / gamma without the square",
        METRICS,
        "to_x0_units",
        "(sigma / gamma) ** 2",
        "(sigma / gamma)",
        "test_to_x0_units_is_the_mean_square_of_the_predicted_images",
    ),
]

PART_5 = [
    Mistake(
        5,
        "relearning on the first auxiliary image only",
        ATTACKS,
        "relearning_curve",
        "random_batch(auxiliary,",
        "random_batch(auxiliary[:1],",
        "test_relearning_of_two_images_ends_between_them",
    ),
    Mistake(
        5,
        "measured before the attack, and never again",
        ATTACKS,
        "relearning_curve",
        'rows.append({"step": done.step, **measure(eps_model)})',
        'rows.append({**rows[0], "step": done.step})',
        "test_relearning_measures_the_attacked_denoiser",
    ),
    Mistake(
        5,
        "the attack stops before its last step",
        ATTACKS,
        "relearning_curve",
        "steps=max(at),",
        "steps=max(at) - 1,",
        "test_relearning_measures_the_attacked_denoiser",
    ),
    Mistake(
        5,
        "a high loss taken for a member's",
        ATTACKS,
        "membership_inference",
        "score = -loss",
        "score = loss",
        "test_membership_inference_allows_one_false_positive_in_a_hundred",
    ),
    Mistake(
        5,
        "losses summed over draws, not averaged",
        ATTACKS,
        "mean_losses",
        "return total / len(t)",
        "return total",
        "test_membership_inference_ranks_all_pairs",
    ),
    Mistake(
        5,
        "one false positive in ten",
        ATTACKS,
        "membership_inference",
        "fpr <= 0.01",
        "fpr <= 0.1",
        "test_membership_inference_allows_one_false_positive_in_a_hundred",
    ),
]

MISTAKES = [*PART_1, *PART_2, *PART_3, *PART_4, *PART_5]

NAIVE = {
    "log_posterior": """
        def log_posterior(x_t, t, data, schedule):
            gamma, sigma = schedule.scales(t, x_t.double()[:, None])
            v = (x_t.double()[:, None] - gamma * _pixels(data)) / sigma  # [b, n, c, h, w]
            logits = -v.square().flatten(2).sum(2) / 2
            return torch.log_softmax(logits, dim=1).to(x_t.dtype)
    """,
    "ideal_eps": """
        def ideal_eps(x_t, t, data, schedule, weights=None):
            gamma, sigma = schedule.scales(t, x_t.double()[:, None])
            v = (x_t.double()[:, None] - gamma * _pixels(data)) / sigma  # [b, n, c, h, w]
            p = torch.exp(log_posterior(x_t.double(), t, data, schedule))
            if weights is not None:
                logits = -v.square().flatten(2).sum(2) / 2 + weights.double().log()
                p = torch.softmax(logits, dim=1)
            return (p[:, :, None, None, None] * v).sum(1).to(x_t.dtype)
    """,
}

ATTENTION = {
    "ideal_eps": """
        def ideal_eps(x_t, t, data, schedule, weights=None):
            query = x_t.flatten(1).double()
            images = _pixels(data.flatten(1))
            gamma, sigma = schedule.scales(t, query)
            bias = -(gamma / sigma).square() / 2 * images.square().sum(1)
            if weights is not None:
                bias = bias + weights.double().log()
            query = gamma / sigma.square() * query
            attend = torch.nn.functional.scaled_dot_product_attention
            x0 = attend(query, images, images, bias, scale=1.0)
            return schedule.predict_eps(x_t.double(), t, x0.view(x_t.shape)).to(x_t.dtype)
    """,
}

RATIO = {
    "siss_losses": """
        def siss_losses(
            eps_model, x0_remain, x0_forget, t, noise, from_forget, lam, schedule
        ):
            x0 = torch.where(from_forget.view(-1, 1, 1, 1), x0_forget, x0_remain)
            m = schedule.q_sample(x0, t, noise)
            eps = eps_model(m, t)
            losses = []
            for a, share in ((x0_remain, 1 - lam), (x0_forget, lam)):
                other = x0_forget if a is x0_remain else x0_remain
                noise_a = schedule.predict_eps(m, t, a)
                noise_other = schedule.predict_eps(m, t, other)
                gap = (noise_a.double().square() - noise_other.double().square())
                gap = gap.flatten(1).sum(1)
                # q(m | other) / q(m | a) = exp(gap / 2)
                weight = 1 / (share + (1 - share) * torch.exp(gap / 2))
                losses.append((weight.to(m.dtype) * squared_error(eps, noise_a)).mean())
            return losses[0], losses[1]
    """,
}


def rewritten(path: str, bodies: dict[str, str]) -> Functions:
    return {path: {name: dedent(body).lstrip("\n") for name, body in bodies.items()}}


CORRECT = [
    Correct(1, "naive broadcasting in float64", rewritten(POSTERIOR, NAIVE)),
    Correct(1, "torch's own attention", rewritten(POSTERIOR, ATTENTION)),
    Correct(2, "weights by the ratio of the densities", rewritten(LOSSES, RATIO)),
]

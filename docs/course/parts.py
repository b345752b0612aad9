"""The parts of the course: what students write, and which tests grade it.

A function stands here by its name, never by its text: `kit.py` cuts it out of the package, so the
reference solution is the package itself. A name that is no longer there is an error.
"""

from dataclasses import dataclass
from typing import NamedTuple

OWN_TEST = "tests/test_unbiased.py"  # part 2 asks for it
OWN_TEST_FUNCTION = "test_siss_weights_leave_the_expected_losses_unchanged"
OWN_TEST_POINTS = 10
# Other tests that would tell how part 2's own test is done.
NOT_HANDED_OUT = {
    "tests/test_posterior.py": ["test_importance_weights_leave_the_expected_loss_unchanged"]
}

POSTERIOR = "tests/test_posterior.py"
LOSSES = "tests/test_losses.py"
METHODS = "tests/test_methods.py"
METRICS = "tests/test_metrics.py"
ATTACKS = "tests/test_attacks.py"


class Graded(NamedTuple):
    """A test that gives points.

    Attributes:
        points: 0 for a bonus, which is shown and not counted.
        file, test: with [parameter] for a single one of a parametrised test, else all of them.
        about: the equation or property that it holds.
    """

    points: int
    file: str
    test: str
    about: str

    @property
    def node(self) -> str:
        """As pytest takes it."""
        return f"{self.file}::{self.test}"


@dataclass(frozen=True)
class Part:
    """One part of the assignment.

    Attributes:
        functions: those that students write, by file.
        written: the points of the written answers, which no program gives.
    """

    number: int
    title: str
    functions: dict[str, list[str]]
    tests: list[Graded]
    written: int


LOSS_ORACLE = "test_loss_value_and_gradient_equal_the_oracle"
METHOD_ORACLE = "test_method_gradient_equals_the_oracle"

PARTS = [
    Part(
        1,
        "Who is behind x_t?",
        {"tiny_retrack/posterior.py": ["log_posterior", "ideal_eps", "_logits", "_mixture_eps"]},
        [
            Graded(
                2,
                POSTERIOR,
                "test_log_posterior_equals_the_oracle_and_sums_to_1",
                "p(a_n | x_t) = softmax_n( -||x_t - gamma a_n||^2 / (2 sigma^2) )",
            ),
            Graded(
                2,
                POSTERIOR,
                "test_ideal_eps_and_exact_target_equal_the_oracle",
                "eps* = sum_n p_n (x_t - gamma a_n) / sigma",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_exact_target_of_whole_images_equals_the_oracle",
                "the same at t = 0, where logits reach 1e6",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_log_posterior_is_permuted_with_the_data",
                "the order of the data does not matter",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_ideal_eps_counts_duplicates_by_multiplicity",
                "m copies weigh as much as weight m",
            ),
            Graded(1, POSTERIOR, "test_ideal_eps_is_the_score", "eps* = -sigma grad log q(x_t)"),
            Graded(
                1,
                POSTERIOR,
                "test_ideal_eps_is_attention",
                "x0* = softmax( <x_t, a_n> gamma / sigma^2 + bias_n ) a_n",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_posterior_in_chunks_is_the_same",
                "however the data are cut into chunks",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_exact_target_without_noise_is_the_nearest_image",
                "sigma -> 0: x0* is the nearest image",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_exact_target_in_pure_noise_is_the_mean",
                "sigma -> infinity: x0* is the mean image",
            ),
            Graded(
                0,
                POSTERIOR,
                "test_posterior_makes_no_tensor_of_size_b_n_d",
                "bonus: no tensor of size b x N x D",
            ),
        ],
        written=8,
    ),
    Part(
        2,
        "Importance sampling",
        {"tiny_retrack/losses.py": ["siss_losses", "_log_density"]},
        [
            Graded(
                2,
                LOSSES,
                f"{LOSS_ORACLE}[siss_losses]",
                "L = mean_b w ||eps_theta - eps||^2, w = q(m | a) / q_lam(m)",
            ),
            Graded(
                1,
                LOSSES,
                "test_siss_weights_are_bounded_and_average_to_one",
                "(1 - lam) w_r + lam w_u = 1",
            ),
            Graded(
                1,
                LOSSES,
                "test_siss_weights_are_finite_between_black_and_white_images",
                "log densities that differ by 4e9",
            ),
            Graded(
                1,
                LOSSES,
                "test_siss_losses_at_lambda_0_and_1_are_the_ddpm_loss",
                "lam = 0 and lam = 1",
            ),
            Graded(
                1,
                LOSSES,
                "test_loss_is_a_mean_over_the_batch[siss_losses]",
                "samples do not see each other",
            ),
        ],
        written=4,
    ),
    Part(
        3,
        "ReTrack's target",
        {
            "tiny_retrack/posterior.py": ["knn_target", "topk_target", "tail_mass"],
            "tiny_retrack/losses.py": [
                "retrack_weighted_loss",
                "retrack_loss",
                "regression_loss",
            ],
        },
        [
            Graded(
                2,
                POSTERIOR,
                "test_knn_target_equals_the_oracle",
                "eps* of the k given images",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_targets_with_k_equal_to_n_are_exact",
                "k = N: nothing is dropped",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_topk_target_keeps_the_images_nearest_to_x0",
                "eps* of the k images nearest to x_t / gamma",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_tail_mass_is_the_total_variation_distance",
                "tau = TV(p, p of the kept)",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_tail_mass_keeps_tiny_values",
                "tau = exp(-50) is not 0",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_target_error_is_the_tail_mass_times_the_gap_of_the_means",
                "(6): error = tau (gamma / sigma) (m_T - m_S)",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_target_error_is_bounded_by_the_tail_mass",
                "error <= tau (gamma / sigma) diam, and <= sqrt(V tau / (1 - tau))",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_weighted_and_target_form_differ_by_the_posterior_variance",
                "(5): the forms differ by V and have equal gradients",
            ),
            Graded(
                1,
                POSTERIOR,
                "test_retrack_loss_minimiser_is_ideal_eps",
                "the minimiser is eps*",
            ),
            Graded(
                1,
                LOSSES,
                f"{LOSS_ORACLE}[retrack_loss]",
                "mean_b ||eps_theta - target||^2",
            ),
            Graded(
                1,
                LOSSES,
                f"{LOSS_ORACLE}[retrack_loss, SNR cap 0.5]",
                "the same times min(1, C / SNR_t)",
            ),
            Graded(
                1,
                LOSSES,
                f"{LOSS_ORACLE}[retrack_weighted_loss]",
                "mean_b sum_k p_k ||eps_theta - v_k||^2",
            ),
        ],
        written=12,
    ),
    Part(
        4,
        "Unlearn",
        {
            "tiny_retrack/methods.py": ["ReTrack.losses"],
            "tiny_retrack/metrics.py": ["eps_distance", "to_x0_units"],
        },
        [
            Graded(
                1,
                METHODS,
                f"{METHOD_ORACLE}[retrack-knn]",
                "grad of lam L_forget + (1 - lam) L_remain, k neighbours",
            ),
            Graded(
                1,
                METHODS,
                f"{METHOD_ORACLE}[retrack-exact]",
                "the same with the exact target",
            ),
            Graded(
                1,
                METRICS,
                "test_eps_distance_is_the_mean_square_over_pixels",
                "||eps_1 - eps_2||^2 / D",
            ),
            Graded(
                1,
                METRICS,
                "test_to_x0_units_is_the_mean_square_of_the_predicted_images",
                "||x0_1 - x0_2||^2 / D = (sigma / gamma)^2 times that",
            ),
        ],
        written=16,
    ),
    Part(
        5,
        "Bring it back",
        {
            "tiny_retrack/attacks.py": [
                "relearning_curve",
                "mean_losses",
                "membership_inference",
            ]
        },
        [
            Graded(
                1,
                ATTACKS,
                "test_relearning_moves_the_model_to_the_auxiliary_images",
                "DDPM loss on the attacker's images, step by step",
            ),
            Graded(
                1,
                ATTACKS,
                "test_relearning_of_two_images_ends_between_them",
                "all of the attacker's images count",
            ),
            Graded(
                1,
                ATTACKS,
                "test_relearning_measures_the_attacked_denoiser",
                "the model is measured after the step, not before",
            ),
            Graded(
                2,
                ATTACKS,
                "test_membership_inference_ranks_all_pairs",
                "AUC = share of (member, other) pairs in which the member has the lower loss",
            ),
            Graded(
                1,
                ATTACKS,
                "test_membership_inference_allows_one_false_positive_in_a_hundred",
                "true positives at 1% false ones",
            ),
        ],
        written=9,
    ),
]

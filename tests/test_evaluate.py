"""evaluate.py: what it measures of models whose every answer is known, and how it tells methods
apart.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import evaluate
from tiny_retrack import NoiseSchedule
from tiny_retrack.data import Split, to_float
from tiny_retrack.lab.presets import PRESETS
from tiny_retrack.metrics import Classifier
from tiny_retrack.posterior import ideal_eps
from tiny_retrack.types import InputError

SCHEDULE = NoiseSchedule.linear()


@pytest.fixture(scope="module")
def judge() -> evaluate.Judge:
    """A judge over 12 images of which 2, that are far from the others, are to be forgotten."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(images[:10], images[10:].repeat(3, 1, 1, 1), torch.zeros(10, dtype=torch.long))
    settings, device = PRESETS["digits-tshirt"].evaluate, torch.device("cpu")
    return evaluate.Judge(
        split, {}, Classifier(1, 2).eval(), "none", 1e-4, settings, 0, device, False, ()
    )


def ideal(data: Tensor):
    return lambda x_t, t: ideal_eps(x_t, t, data, SCHEDULE)


def test_the_oracle_is_at_no_distance_from_itself_and_the_trained_model_is(
    judge: evaluate.Judge,
) -> None:
    """Where only the forgotten image can be behind x_t, a model that remembers it says that image:
    a distance of
    ||a_u - a||^2 / D for the image a that the remaining data say, which is one of theirs at low
    noise."""
    split = judge.split
    oracle = evaluate.ideal(judge, SCHEDULE)
    for bands in evaluate.oracle_bands(ideal(split.remain), oracle, split, SCHEDULE, seed=0):
        assert bands == {"0-199": 0.0, "200-399": 0.0, "400-999": 0.0}
    bands, _ = evaluate.oracle_bands(ideal(split.everything), oracle, split, SCHEDULE, seed=0)
    gaps = (
        (to_float(split.targets)[:, None] - to_float(split.remain)).square().flatten(2).mean(2)
    )  # [2, 10]
    assert gaps.min() <= bands["0-199"] <= gaps.max()


def test_an_injected_image_comes_back_only_to_a_model_that_knows_it(judge: evaluate.Judge) -> None:
    split = judge.split
    known, pictures = evaluate.injections(ideal(split.everything), judge, SCHEDULE)
    assert list(known) == ["100", "250", "500"]
    assert known["100"]["l2"] == pytest.approx(0, abs=1e-3)
    assert known["100"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert torch.equal(pictures["from t=100"], pictures["forgotten"])
    forgotten, pictures = evaluate.injections(ideal(split.remain), judge, SCHEDULE)
    lengths = []
    for i, landed in enumerate(pictures["from t=100"]):
        assert any(torch.equal(landed, image) for image in split.remain)
        pairs = zip(landed.flatten().tolist(), split.targets[i % 2].flatten().tolist(), strict=True)
        lengths.append(math.sqrt(math.fsum(((a - b) / 255) ** 2 for a, b in pairs)))
    assert forgotten["100"]["l2"] == pytest.approx(math.fsum(lengths) / 16, rel=1e-3)


def test_the_likelihood_is_the_mean_over_the_images(judge: evaluate.Judge) -> None:
    """For N(0, I) data eps* = sigma x, whose Jacobian is a multiple of 1: every probe gives the
    exact trace.
    """

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        s = t / 999
        return (-torch.expm1(-(0.1 * s + 19.9 * s**2 / 2))).sqrt()[:, None, None, None] * x_t

    def bits(x0: Tensor) -> float:
        each = [0.5 * v * v + 0.5 * math.log(2 * math.pi) for v in x0.double().flatten().tolist()]
        return 7 + math.fsum(each) / len(each) / math.log(2)

    for images in (judge.split.targets, judge.split.remain):  # 2, repeated, and 10
        expected = pytest.approx(bits(to_float(images)), rel=1e-3)
        assert evaluate.mean_nll(eps_model, images, judge, SCHEDULE) == expected
    assert (
        evaluate.mean_nll(lambda x_t, t: x_t * math.nan, judge.split.targets, judge, SCHEDULE)
        is None
    )


def test_the_sweep_tries_every_setting_of_the_grid() -> None:
    labels = evaluate.sweep_labels("retrack-knn:k=3")
    assert len(set(labels)) == len(labels) == 12
    assert evaluate.flags_of(labels[0]) == [
        *("--method", "retrack", "--target", "knn", "--k", "3"),
        *("--lr", "2e-5", "--steps", "50", "--lam", "0.005"),
    ]
    assert len(evaluate.sweep_labels("vanilla")) == 6
    assert (
        len(evaluate.sweep_labels("siss:batch-size=4"))
        == len(evaluate.sweep_labels("siss-no-is"))
        == 12
    )
    given = evaluate.sweep_labels("vdu:lr=1e-3")  # what the label sets is not varied
    assert given == [
        f"vdu:lr=1e-3,steps={steps},gamma={gamma}"
        for steps in (50, 200)
        for gamma in ("5e-3", "1e-2")
    ]
    assert evaluate.sweep_labels("vanilla:lr=1,steps=2") == ["vanilla:lr=1,steps=2"]
    assert evaluate.sweep_labels("retrain") == ["retrain"]


def test_the_distance_is_in_x0_and_in_eps_units(judge: evaluate.Judge) -> None:
    """A model that is 0.5 a pixel off in eps; and one that is off by 0.5 in x0."""
    oracle = evaluate.ideal(judge, SCHEDULE)
    _, in_eps = evaluate.oracle_bands(
        lambda x, t: oracle(x, t) + 0.5, oracle, judge.split, SCHEDULE, seed=0
    )

    def off_in_x0(x: Tensor, t: Tensor) -> Tensor:
        gamma, sigma = SCHEDULE.scales(t, x.double())
        return (oracle(x.double(), t) + 0.5 * gamma / sigma).to(x.dtype)

    in_x0, _ = evaluate.oracle_bands(off_in_x0, oracle, judge.split, SCHEDULE, seed=0)
    for bands in (in_eps, in_x0):
        assert bands == pytest.approx(
            dict.fromkeys(("0-199", "200-399", "400-999"), 0.25), rel=1e-3
        )


def test_what_is_not_a_number_is_none() -> None:
    assert evaluate.finite({"a": math.nan, "b": {"c": math.inf, "d": 1.5}, "e": "nan", "f": 2}) == {
        "a": None, "b": {"c": None, "d": 1.5}, "e": "nan", "f": 2,
    }  # fmt: skip


def run(hits: float, fid: float | None, nll: float | None = 1.0) -> dict:
    return {
        "hit_frequency": hits,
        "fid": fid,
        "inception_score": 1.0,
        "oracle_distance": None,
        "injection": None,
    } | {"nll": {"remain": 1.0, "forget": nll}}


def test_the_best_setting_has_the_fewest_hits_and_then_the_lowest_fid() -> None:
    results = {
        "base": [run(0.05, 1.0)],
        "a:1": [run(0.0, 9.0), run(0.1, 1.0)],
        "a:2": [run(0.0, 5.0), run(0.0, 6.0)],
        "a:3": [run(0.0, 5.0), run(0.0, 5.5)],
        "a:4": [run(0.0, None), run(0.0, 1.0)],
        "a:5": [run(0.0, 1.0)],  # the other seed diverged
        "b:1": [run(0.2, 2.0)],
    }
    assert evaluate.best_settings(results) == ["base", "a:3", "b:1"]


def test_the_summary_marks_only_a_lead_beyond_the_spread() -> None:
    def runs(*fids: float) -> list[dict]:
        return [run(0.0, f) for f in fids]

    rows = evaluate.summarise(
        {"base": runs(0.1), "a": runs(1.0, 1.2), "b": runs(2.0, 2.2), "retrain": runs(0.1, 0.1)}
    )
    assert [row["fid"] for row in rows] == ["0.1", "**1.1 ± 0.14**", "2.1 ± 0.14", "0.1 ± 0"]
    rows = evaluate.summarise({"base": runs(0.1), "a": runs(1.0, 1.2), "b": runs(1.1, 1.3)})
    assert "**" not in str([row["fid"] for row in rows])
    rows = evaluate.summarise(
        {"base": runs(0.1), "a": [run(0.0, 1.0, 2.0)], "b": [run(0.0, 2.0, None)]}
    )
    assert [row["nll forget"] for row in rows] == ["1", "2", "-"]
    assert rows[1]["fid"] == "1"  # one run has no spread to lead beyond
    rows = evaluate.summarise(
        {"base": runs(0.1), "a": [run(0.0, f) for f in (1.0, 2.0, None)], "b": runs(9.0, 9.0)}
    )
    assert [row["fid"] for row in rows] == ["0.1", "1.5 ± 0.71 (2 of 3)", "9 ± 0"]


def test_an_attack_has_brought_the_image_back_at_the_first_step_with_a_share_of_hits() -> None:
    def curve(*hits: float) -> list[dict]:
        steps = zip((0, 10, 30), hits, strict=True)
        return [
            {"step": step, "hit_frequency": hit, "inject": 5.0 - hit, "nll": None}
            for step, hit in steps
        ]

    curves = {
        "remain": curve(0.0, 0.0, 0.04),
        "augmented": curve(0.0, torch.tensor(5 / 100).double().item(), 0.2),
    }
    row = evaluate.attack_shown(
        {"curves": curves, "membership": {"auc": 0.5, "tpr_at_1_percent": 0.0}}
    )
    assert row == {
        **{
            "remain: hit_frequency": 0.04,
            "remain: inject": 4.96,
            "remain: nll": None,
            "remain: back at step": None,
        },
        **{"augmented: hit_frequency": 0.2, "augmented: inject": 4.8, "augmented: nll": None},
        **{
            "augmented: back at step": 10,
            "membership auc": 0.5,
            "membership tpr_at_1_percent": 0.0,
        },
    }


def test_inception_features_need_a_file(tmp_path) -> None:
    with pytest.raises(InputError, match="no weights at"):
        evaluate.inception(str(tmp_path / "none.pth"), download=False)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="is not torchvision's inception_v3"):
        evaluate.inception(str(tmp_path / "other.pth"), download=False)


def test_inception_is_torchvisions_on_imagenets_scale(tmp_path) -> None:
    """torchvision's own model takes images normalised as ImageNet's and turns them back into [-1,
    1].
    """
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    theirs = inception_v3(weights=None, init_weights=False, transform_input=True)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours, name = evaluate.inception(str(tmp_path / "weights.pth"), download=False)
    assert name == "inception_v3, weights.pth"
    x = torch.rand(2, 1, 299, 299) * 2 - 1  # grey, and of the size that needs no resizing
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        normalised = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        assert_close(ours.eval().logits(x), theirs.eval()(normalised), rtol=1e-4, atol=1e-4)
        assert ours(x[:, :, :50, :40]).shape == (2, 2048)

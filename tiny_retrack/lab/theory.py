"""Where does ReTrack's approximation hold? `python -m tiny_retrack.lab.theory` measures it on
digits-tshirt in a minute.

Everything is asked at x_t made from a forgotten image a_u, by t: how much of the posterior do k
neighbours of a_u drop, and k neighbours of x_t; how far does that move the target; and how many
samples of the vanilla loss say as much about the answer at x_t as one of ReTrack's. docs/theory.md
derives each formula below and shows what they gave.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tiny_retrack import NoiseSchedule, load_model
from tiny_retrack.data import Split, to_float, to_uint8
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import atomic, write_json
from tiny_retrack.lab.plots import save_curves, save_rows, table
from tiny_retrack.losses import inner, retrack_loss, squared_error
from tiny_retrack.posterior import (
    exact_target,
    ideal_eps,
    knn_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.training import denoiser, use_bf16
from tiny_retrack.types import InputError


@dataclass(frozen=True)
class Draws:
    """What x_t is made of: the same images and noise at every t, so that curves over t are smooth."""

    split: Split
    schedule: NoiseSchedule
    x0: Float[Tensor, "b c h w"]  # forgotten images in [-1, 1]; float64, as all that is measured
    noise: Float[Tensor, "b c h w"]
    x0_remain: Float[Tensor, "b c h w"]  # for samples of the vanilla loss, with the same noise
    neighbors: Int[Tensor, "b k"]  # of x0 in the remain set, nearest first

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """x_t of the forgotten images, and t for each."""
        steps = torch.full((len(self.x0),), t, device=self.x0.device)
        return self.schedule.q_sample(self.x0, steps, self.noise), steps


def make_draws(split: Split, schedule: NoiseSchedule, draws: int, k: int, seed: int) -> Draws:
    """Draw `draws` x_t of the forget set, and find the k remain images nearest to each image.

    Raises:
        InputError: if there is nothing to forget, or if k is not in 1..N.
    """
    if not len(split.forget):
        raise InputError(
            "nothing to forget: the data set has no forget set of its own, give --forget"
        )
    generator = torch.Generator(split.remain.device).manual_seed(seed)
    random: dict[str, Any] = {"generator": generator, "device": split.remain.device}
    forget, remain = (
        s[torch.randint(len(s), (draws,), **random)] for s in (split.forget, split.remain)
    )
    noise = torch.randn(forget.shape, dtype=torch.float64, **random)
    neighbors, _ = nearest_neighbors(forget, split.remain, k)
    return Draws(
        split, schedule, to_float(forget).double(), noise, to_float(remain).double(), neighbors
    )


def approximation(d: Draws, t: int, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """What k neighbours of a_u drop of the posterior at x_t, and k neighbours of x_t; means over
    the draws.
    """
    (x_t, steps), remain = d.at(t), d.split.remain
    log_p = log_posterior(x_t, steps, remain, d.schedule)
    exact = exact_target(x_t, steps, remain, d.schedule)
    found: dict[str, dict[str, float]] = {
        "dropped_mass": {},
        "error": {},
        "missed": {},
        "overlap": {},
    }
    nearest = {"a_u": d.neighbors, "x_t": log_p.topk(max(ks), dim=1).indices}
    for (who, index), k in ((pair, k) for pair in nearest.items() for k in ks):
        rows = zip(
            x_t.split(1), steps.split(1), index[:, :k].split(1), strict=True
        )  # [b, k, c, h, w] may be large
        target = torch.cat([knn_target(x, s, remain[kept], d.schedule) for x, s, kept in rows])
        away, name = (target - exact).flatten(1).norm(dim=1), f"{k} of {who}"
        dropped = tail_mass(x_t, steps, remain, d.schedule, index[:, :k])
        found["dropped_mass"][name] = dropped.mean().item()
        found["error"][name] = (away / exact.flatten(1).norm(dim=1)).mean().item()
        found["missed"][name] = (away / (d.noise - exact).flatten(1).norm(dim=1)).mean().item()
    for k in ks:
        is_kept = torch.zeros_like(log_p).scatter(1, d.neighbors[:, :k], 1)
        found["overlap"][f"k = {k}"] = is_kept.gather(1, nearest["x_t"][:, :k]).mean().item()
    return {"support": {"1 / sum p^2": (1 / log_p.exp().square().sum(1)).mean().item()}, **found}


def log_importance(d: Draws, t: int) -> Float[Tensor, " b"]:
    """log q_u(x_t) / q_r(x_t): how much oftener the forget set makes this x_t than the remain set
    does.
    """
    (x_t, steps), n = d.at(t), len(d.split.remain)
    log_p = log_posterior(x_t, steps, d.split.everything, d.schedule)
    log_odds = log_p[:, n:].logsumexp(1) - log_p[:, :n].logsumexp(1)
    return log_odds - math.log(len(d.split.forget) / n)


def vanilla_samples(d: Draws, t: int) -> dict[str, float]:
    """log10 of how many samples of the vanilla loss say as much about the answer at x_t as one of
    ReTrack's.

    "all" is "place", q_u / q_r, and "answer", 1 + V / ||e - eps*||^2, with V the posterior variance
    of v and e the
    ideal denoiser of everything, the model that is to forget. "factor" is what ReTrack's samples
    would lose if the
    importance weight w = q_r / q_u were kept: E w^2 / (E w)^2 of a w whose logarithm is Gaussian.
    """
    (x_t, steps), (remain, schedule) = d.at(t), (d.split.remain, d.schedule)
    exact = exact_target(x_t, steps, remain, schedule)
    p = log_posterior(x_t, steps, remain, schedule).exp()
    squares = torch.cat(
        [to_float(part).double().square().flatten(1).sum(1) for part in remain.split(4096)]
    )
    x0 = schedule.predict_x0(x_t, steps, exact)
    variance = (schedule.gamma[t] / schedule.sigma[t]) ** 2 * (
        p @ squares - x0.square().flatten(1).sum(1)
    ).clamp_min(0)
    wanted = squared_error(ideal_eps(x_t, steps, d.split.everything, schedule), exact)
    place, answer = log_importance(d, t), torch.log1p(variance / wanted)
    logs = {
        "all": place + answer,
        "place": place,
        "answer": answer,
        "factor": place.var(correction=0),
    }
    return {name: value.mean().item() / math.log(10) for name, value in logs.items()}


def relative_variance(s: Float[Tensor, " m"]) -> float | None:
    """Var(s) / E(s)^2: the samples it takes until signal = noise. None if m samples do not tell the
    mean from 0.
    """
    variance = s.var().item()
    squared_mean = s.mean().item() ** 2 - variance / len(s)  # unbiased
    return variance / squared_mean if squared_mean > variance / len(s) else None


def network_progress(model: nn.Module, d: Draws, t: int, bf16: bool) -> dict[str, Any]:
    """How far does the gradient of one sample, in the weights of a network, go towards the oracle
    at x_t?

    s = <g, G> / ||G||^2, with g a sample's gradient and G that of E_{q_u} ||eps_theta - eps*||^2,
    taken over the first
    half of the draws; the samples are the second half. Given are E(s) and its relative variance.
    """
    eps_model, params, steps = denoiser(model, bf16), list(model.parameters()), d.at(t)[1]
    exact = exact_target(*d.at(t), d.split.remain, d.schedule).float()
    x0, x0_remain, noise = d.x0.float(), d.x0_remain.float(), d.noise.float()

    def gradient(rows: slice, x0: Tensor, target: Tensor) -> list[Tensor]:
        loss = retrack_loss(eps_model, x0[rows], steps[rows], noise[rows], target[rows], d.schedule)
        return list(torch.autograd.grad(loss, params))

    half = len(steps) // 2
    wanted = gradient(slice(half), x0, exact)
    each = [slice(i, i + 1) for i in range(half, len(steps))]

    def progress(x0: Tensor, target: Tensor) -> Tensor:
        return torch.stack(
            [inner(gradient(row, x0, target), wanted) / inner(wanted, wanted) for row in each]
        ).double()

    retrack = progress(x0, exact)
    losses = {
        "vanilla": progress(x0_remain, noise),
        "weighted": retrack / log_importance(d, t)[half:].exp(),
    }
    losses["retrack"] = retrack
    columns = {f"{name}: E s": s.mean().item() for name, s in losses.items()}
    return {
        "t": t,
        **columns,
        **{f"{name}: samples": relative_variance(s) for name, s in losses.items()},
    }


def strip(path: Path, d: Draws, ks: Sequence[int], times: Sequence[int]) -> None:
    """What the first draw is redirected to: the x0 that each target stands for, one column a t."""
    rows: dict[str, list[Tensor]] = {}
    remain, schedule = d.split.remain, d.schedule
    for t in times:
        x_t, steps = (value[:1] for value in d.at(t))
        targets = {
            f"{k} of a_u": knn_target(x_t, steps, remain[d.neighbors[:1, :k]], schedule) for k in ks
        }
        targets |= {f"{k} of x_t": topk_target(x_t, steps, remain, schedule, k) for k in ks}
        rows.setdefault("x_t", []).append(x_t)
        for name, target in {
            **targets,
            "exact": exact_target(x_t, steps, remain, schedule),
        }.items():
            rows.setdefault(name, []).append(schedule.predict_x0(x_t, steps, target))
    title = "x0 that each target redirects x_t to, at t = " + ", ".join(map(str, times))
    save_rows(
        path, {name: to_uint8(torch.cat(images)).cpu() for name, images in rows.items()}, title
    )


PANELS = {  # what is measured: what it is called
    "support": "remain images behind x_t, 1 / sum p^2",
    "dropped_mass": "posterior mass dropped",
    "error": "||target - exact|| / ||exact||",
    "missed": "||target - exact|| / ||a_u's own target - exact||",
    "overlap": "share of x_t's k neighbours that are a_u's",
    "samples": "log10 of samples worth one of ReTrack's",
}


def limits(
    series: dict[str, dict[str, list[float]]], times: Sequence[int], ks: Sequence[int]
) -> list[dict[str, Any]]:
    """By k, the first t at which the approximation no longer holds."""

    def first(name: str, label: str, beyond: Callable[[float], bool]) -> int | None:
        return next(
            (t for t, value in zip(times, series[name][label], strict=True) if beyond(value)), None
        )

    return [
        {
            "k": k,
            "less than half of x_t's neighbours are a_u's": first(
                "overlap", f"k = {k}", lambda v: v < 0.5
            ),
        }
        | {
            f"k of {w} drop over 10%": first("dropped_mass", f"{k} of {w}", lambda v: v > 0.1)
            for w in ("a_u", "x_t")
        }
        for k in ks
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags.make_parser(__doc__)
    parser.prog = "python -m tiny_retrack.lab.theory"
    parser.add_argument(
        "--k",
        type=flags.positive,
        nargs="+",
        default=[1, 10, 100, 1000],
        help="how many neighbours",
    )
    parser.add_argument(
        "--draws", type=flags.positive, default=32, help="x_t of the forgotten image at each t"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="also measure the gradients of this network"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: runs/DATASET/theory)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)

    clock = time.perf_counter()
    device = runs.pick_device(args.device)
    model, schedule = (
        load_model(args.checkpoint) if args.checkpoint else (None, NoiseSchedule.linear())
    )
    data = flags.data_settings(
        args, runs.recorded_data(args.checkpoint) if args.checkpoint else None
    )
    split = runs.load_data(data, args.download).to(device)
    if model is not None:
        runs.check_model_fits(model.config, schedule.num_steps, split, args.checkpoint)
        if args.draws < 4:
            raise InputError(f"--draws {args.draws}: the gradients of a network need at least 4")
    out, ks = args.out or Path("runs", data["dataset"], "theory"), sorted(set(args.k))
    runs.check_folder(out, args.overwrite)
    d = make_draws(split, schedule, args.draws, max(ks), args.seed)
    times = sorted({*range(0, schedule.num_steps, 50), schedule.num_steps - 1})
    rows = [{**approximation(d, t, ks), "samples": vanilla_samples(d, t)} for t in times]
    series = {
        name: {label: [row[name][label] for row in rows] for label in rows[0][name]}
        for name in PANELS
    }
    network = []
    hundreds = [t for t in times if t % 100 == 0 and t > 0]
    if model is not None:
        network = [
            network_progress(model.to(device), d, t, use_bf16(args.bf16, device)) for t in hundreds
        ]

    runs.prepare_folder(out, args.overwrite)
    where = limits(series, times, ks)
    text = f"**first t at which**\n\n{table(where)}\n"
    noise = [(schedule.sigma[t] / schedule.gamma[t]).item() for t in times]
    for name, curves in series.items():
        columns = {"t": times, "sigma/gamma": noise, **curves}
        lines = [
            dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)
        ]
        text += f"\n**{PANELS[name]}**\n\n{table(lines)}\n"
        with atomic(out / f"{name}.png") as path:
            drawn = {label: (times, values) for label, values in curves.items()}
            save_curves(path, drawn, "t", PANELS[name], log=name in ("support", "samples"))
    if network:
        text += f"\n**gradients of the network**\n\n{table(network)}\n"
    with atomic(out / "redirected.png") as path:
        strip(path, d, ks, hundreds)
    with atomic(out / "table.md") as path:
        path.write_text(text)
    seconds = round(time.perf_counter() - clock, 1)
    run = {"data": data, "seed": args.seed, "draws": args.draws, "k": ks, "seconds": seconds}
    result = {"t": times, "series": series, "first_t": where, "network": network}
    write_json(out / "theory.json", {**run, **result, **runs.provenance(device)})
    runs.discard_old(out)
    print(f"{text}\n{out}: theory.json, table.md and figures, in {seconds} s")


if __name__ == "__main__":
    runs.run_command(main)

"""Where does ReTrack's approximation hold? `python -m tiny_retrack.theory` measures it on digits-tshirt in a minute.

Everything is asked at x_t ~ q(x_t | a_u), a_u a forgotten image, for t from 0 to T - 1: how much of the posterior the k
neighbours of a_u drop, and the k of x_t; how far that moves the regression target; and how many samples of the vanilla
loss say as much about the forgotten image as one of ReTrack's. docs/theory.md derives what is measured here.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiny_retrack import NoiseSchedule, cli, load_model
from tiny_retrack.checkpoint import atomic, write_json
from tiny_retrack.data import Split, to_float, to_uint8
from tiny_retrack.losses import ddpm_loss, inner, retrack_loss
from tiny_retrack.posterior import (
    exact_target,
    ideal_eps,
    knn_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.report import save_curves, save_rows, table
from tiny_retrack.training import denoiser, use_bf16

NETWORK_TIMES = (100, 200, 300, 400, 500, 700)
VANILLA_DRAWS = 16  # for each draw of the forgotten image: few of them come near it


@dataclass(frozen=True)
class Draws:
    """The forgotten image's x_t is made of these; the same ones at every t, so that curves over t are smooth."""

    split: Split
    schedule: NoiseSchedule
    x0: Tensor  # [b, c, h, w] in [-1, 1], forgotten images
    noise: Tensor  # [b, c, h, w]
    x0_vanilla: Tensor  # uint8 [m, c, h, w], remain images
    noise_vanilla: Tensor  # [m, c, h, w]
    neighbors: Tensor  # [b, k] for the largest k, nearest to x0 first

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """x_t of the forgotten images, and t."""
        steps = torch.full((len(self.x0),), t, device=self.x0.device)
        return self.schedule.q_sample(self.x0, steps, self.noise), steps


def make_draws(split: Split, schedule: NoiseSchedule, draws: int, k: int, seed: int) -> Draws:
    generator = torch.Generator(split.remain.device).manual_seed(seed)
    random = {"generator": generator, "device": split.remain.device}
    image = split.remain.shape[1:]
    forget = split.forget[torch.randint(len(split.forget), (draws,), **random)]
    noise = torch.randn((draws, *image), **random)
    remain = split.remain[torch.randint(len(split.remain), (draws * VANILLA_DRAWS,), **random)]
    noise_vanilla = torch.randn((len(remain), *image), **random)
    neighbors, _ = nearest_neighbors(forget, split.remain, k)
    return Draws(split, schedule, to_float(forget), noise, remain, noise_vanilla, neighbors)


def ratio(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> float:
    """The mean over the batch of ||a|| / ||b||."""
    return (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).mean().item()


def approximation(d: Draws, t: int, ks: Sequence[int]) -> dict[str, Any]:
    """Dropped mass and target error of k neighbours of a_u (knn) and of x_t (topk), each by k."""
    x_t, steps = d.at(t)
    remain, schedule = d.split.remain, d.schedule
    log_p = log_posterior(x_t, steps, remain, schedule)
    exact = exact_target(x_t, steps, remain, schedule)
    gamma, sigma = schedule.gamma[t].item(), schedule.sigma[t].item()
    row: dict[str, Any] = {"t": t, "sigma_over_gamma": sigma / gamma}
    row["effective_support"] = (1 / log_p.double().exp().square().sum(1)).mean().item()
    row |= {"knn": {}, "topk": {}}
    for k in ks:
        kept = {"knn": d.neighbors[:, :k], "topk": log_p.topk(k, dim=1).indices}
        # one row at a time: k images each
        rows = zip(x_t.split(1), steps.split(1), kept["knn"].split(1), strict=True)
        knn = torch.cat([knn_target(x, s, remain[index], schedule) for x, s, index in rows])
        targets = {"knn": knn, "topk": topk_target(x_t, steps, remain, schedule, k)}
        for name, target in targets.items():
            row[name][k] = {
                "dropped_mass": tail_mass(x_t, steps, remain, schedule, kept[name]).mean().item(),
                "error": ratio(target - exact, exact),
                "error_of_way": ratio(target - exact, d.noise - exact),  # from a_u's own target to the exact one
            }
        chosen = torch.zeros_like(log_p).scatter(1, kept["knn"], 1)
        row["knn"][k]["overlap"] = chosen.gather(1, kept["topk"]).mean().item()
    return row


def relative_variance(gradients: Float[Tensor, "m d"]) -> float | None:
    """tr Var(g) / ||E g||^2: as many samples average to as much signal as noise. None if the mean drowns in noise."""
    m = len(gradients)
    g = gradients.double()
    second = g.square().sum().item() / m
    squared_mean = (g.sum(0).square().sum().item() - m * second) / (m * (m - 1))  # unbiased
    return (second - squared_mean) / squared_mean if squared_mean > 0.1 * second / m else None


def log_reach(distances: Float[Tensor, "u n"], copies: Tensor, gamma: float, sigma: float) -> float:
    """log of an upper bound on P_{x_t ~ q_r}(q_u(x_t) >= q_r(x_t)), exact for one remain and one forget image.

    Such an x_t, made from a_n, is more likely from one of the u distinct forget images, by a factor u N weight_u / 1,
    than from a_n alone; and between two Gaussians the log ratio is Gaussian.
    """
    delta = gamma / sigma * distances.double()  # [u, n]
    factor = torch.log(copies / copies.sum() * distances.numel())[:, None]
    return (torch.special.log_ndtr(factor / delta - delta / 2).logsumexp((0, 1)) - math.log(delta.shape[1])).item()


def forgetting(d: Draws, t: int, distances: Tensor, copies: Tensor) -> dict[str, Any]:
    """How much a sample of each loss says where the forgotten image is.

    The place is R_t = {q_u >= q_r}; what is said there is g = 1_R (eps - target), the gradient of the loss at the
    output of the model (up to a factor 2), with eps = the ideal denoiser of everything: a perfectly trained model.
    """
    x_t, steps = d.at(t)
    everything, n = d.split.everything, len(d.split.remain)

    def is_near(x: Tensor) -> tuple[Tensor, Tensor]:
        """log q_u - log q_r, and whether x is in R_t."""
        log_p = log_posterior(x, steps[:1].expand(len(x)), everything, d.schedule)
        log_ratio = log_p[:, n:].logsumexp(1) - log_p[:, :n].logsumexp(1) - math.log(len(d.split.forget) / n)
        return log_ratio, log_ratio >= 0

    def gradients(x: Tensor, inside: Tensor, target: Tensor) -> Tensor:
        g = torch.zeros_like(x)
        eps = ideal_eps(x[inside], steps[:1].expand(int(inside.sum())), everything, d.schedule)
        g[inside] = eps - target[inside]
        return g.flatten(1)

    log_ratio, inside = is_near(x_t)
    retrack = gradients(x_t, inside, exact_target(x_t, steps, d.split.remain, d.schedule))
    hits, vanilla = [], []
    for x0, noise in zip(d.x0_vanilla.split(256), d.noise_vanilla.split(256), strict=True):
        x = d.schedule.q_sample(to_float(x0), steps[:1].expand(len(x0)), noise)
        hits.append(is_near(x)[1])
        vanilla.append(gradients(x, hits[-1], noise))
    reached = torch.cat(hits)
    bound = log_reach(distances, copies, d.schedule.gamma[t].item(), d.schedule.sigma[t].item())
    return {
        "retrack_reach": inside.float().mean().item(),
        "vanilla_reach": reached.float().mean().item(),
        "vanilla_reach_log10_bound": min(bound, 0.0) / math.log(10),
        "importance_weight_log10": -log_ratio.median().item() / math.log(10),
        "retrack_samples": relative_variance(retrack),
        "vanilla_samples": relative_variance(torch.cat(vanilla)) if reached.sum() >= 20 else None,
    }


def network_gradients(model: nn.Module, d: Draws, t: int, k: int, bf16: bool) -> dict[str, Any]:
    """The same question to a real network: how far does one sample's gradient go towards the forgetting of a_u?

    s = <g, G> / ||G||^2, with g a sample's gradient in the weights and G that of E_{q_u} ||eps_theta - eps*||^2, the
    distance to the oracle. Given are mean(s) and Var(s) / mean(s)^2. G comes from the first half of the draws.
    """
    params, eps_model = list(model.parameters()), denoiser(model, bf16)
    x_t, steps = d.at(t)
    half = len(x_t) // 2
    exact = exact_target(x_t, steps, d.split.remain, d.schedule)
    knn = knn_target(x_t, steps, d.split.remain[d.neighbors[:, :k]], d.schedule)

    def retrack(rows: slice, target: Tensor) -> list[Tensor]:
        loss = retrack_loss(eps_model, d.x0[rows], steps[rows], d.noise[rows], target[rows], d.schedule)
        return list(torch.autograd.grad(loss, params))

    def vanilla(rows: slice) -> list[Tensor]:
        loss = ddpm_loss(eps_model, to_float(d.x0_vanilla[rows]), steps[rows], d.noise_vanilla[rows], d.schedule)
        return list(torch.autograd.grad(loss, params))

    wanted = retrack(slice(0, half), exact)
    norm2 = inner(wanted, wanted)
    row: dict[str, Any] = {"t": t, "network_distance": ratio(eps_model(x_t, steps) - exact, d.noise - exact)}
    each = [slice(i, i + 1) for i in range(half, len(x_t))]
    for name, sample in {
        "vanilla": vanilla,
        f"knn{k}": lambda rows: retrack(rows, knn),
        "exact": lambda rows: retrack(rows, exact),
    }.items():
        s = torch.stack([inner(sample(rows), wanted) / norm2 for rows in each]).double()
        row[name] = {"progress": s.mean().item(), "samples": relative_variance(s[:, None])}
    return row


def strip(path: Path, d: Draws, ks: Sequence[int], times: Sequence[int]) -> None:
    """What the first draw is redirected to: the x0 that each target stands for, one column a t."""
    rows: dict[str, list[Tensor]] = {}
    remain, schedule = d.split.remain, d.schedule
    for t in times:
        x_t, steps = (value[:1] for value in d.at(t))
        targets = {"exact": exact_target(x_t, steps, remain, schedule)}
        for k in ks:
            targets[f"{k} of a_u"] = knn_target(x_t, steps, remain[d.neighbors[:1, :k]], schedule)
            targets[f"{k} of x_t"] = topk_target(x_t, steps, remain, schedule, k)
        rows.setdefault("x_t", []).append(x_t)
        for name, target in targets.items():
            rows.setdefault(name, []).append(schedule.predict_x0(x_t, steps, target))
    title = "x0 that each target redirects x_t to, at t = " + ", ".join(map(str, times))
    save_rows(path, {name: to_uint8(torch.cat(images)).cpu() for name, images in rows.items()}, title)


def tables(rows: Sequence[dict[str, Any]], network: Sequence[dict[str, Any]], ks: Sequence[int]) -> str:
    near = [
        {"t": r["t"], "sigma/gamma": r["sigma_over_gamma"], "support": r["effective_support"]}
        | {f"{k}: dropped / error / of way": " / ".join(f"{r[kind][k][m]:.3f}" for m in MEASURES) for k in ks}
        for kind in ("knn", "topk")
        for r in rows
    ]
    overlap = [{"t": r["t"]} | {f"k={k}": r["knn"][k]["overlap"] for k in ks} for r in rows]
    forget = [{key: r[key] for key in ("t", *FORGETTING)} for r in rows]
    parts = {
        "k neighbours of the forgotten image (kNN)": near[: len(rows)],
        "k neighbours of x_t (top-k)": near[len(rows) :],
        "share of x_t's k neighbours that are among a_u's": overlap,
        "samples of each loss at the forgotten image": forget,
    }
    if network:
        flat = [{"t": r["t"], "network_distance": r["network_distance"]} for r in network]
        for line, r in zip(flat, network, strict=True):
            line |= {f"{n} {m}": v[m] for n, v in r.items() if isinstance(v, dict) for m in ("progress", "samples")}
        parts["gradients of the network"] = flat
    return "\n\n".join(f"**{title}**\n\n{table(part)}" for title, part in parts.items()) + "\n"


MEASURES = ("dropped_mass", "error", "error_of_way")
FORGETTING = (
    *("retrack_reach", "vanilla_reach", "vanilla_reach_log10_bound", "importance_weight_log10"),
    *("retrack_samples", "vanilla_samples"),
)


def figures(out: Path, rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> None:
    t = [r["t"] for r in rows]
    names = {"dropped_mass": "posterior mass dropped", "error": "||target - exact|| / ||exact||"}
    for measure, label in names.items():
        curves = {
            f"{k} of {who}": (t, [r[kind][k][measure] for r in rows])
            for kind, who in (("knn", "a_u"), ("topk", "x_t"))
            for k in ks
        }
        save_curves(out / f"{measure}.png", curves, "t", label)
    overlap = {f"k = {k}": (t, [r["knn"][k]["overlap"] for r in rows]) for k in ks}
    save_curves(out / "overlap.png", overlap, "t", "share of x_t's k neighbours that are a_u's")
    support = {"1 / sum p^2": (t, [r["effective_support"] for r in rows])}
    save_curves(out / "support.png", support, "t", "remain images behind x_t", log=True)
    samples = {
        name: (t, [r[key] if r[key] is not None else math.nan for r in rows])
        for name, key in (("vanilla, measured", "vanilla_samples"), ("ReTrack, measured", "retrack_samples"))
    }
    samples["vanilla, at least"] = (t, [10 ** min(-r["vanilla_reach_log10_bound"], 30) - 1 for r in rows])
    save_curves(out / "samples.png", samples, "t", "samples until signal = noise", log=True)


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.prog = "python -m tiny_retrack.theory"
    parser.add_argument("--k", type=cli.positive, nargs="+", default=[1, 10, 100, 1000], help="how many neighbours")
    parser.add_argument("--draws", type=cli.positive, default=32, help="x_t of the forgotten image at each t")
    parser.add_argument("--every", type=cli.positive, default=50, help="t from 0 up in these steps")
    parser.add_argument("--checkpoint", type=Path, help="also measure the gradients of this network")
    parser.add_argument("--out", type=Path, help="where to write (default: runs/DATASET/theory)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args()

    clock = time.perf_counter()
    device = cli.pick_device(args.device)
    model, schedule = load_model(args.checkpoint) if args.checkpoint else (None, NoiseSchedule.linear())
    data = cli.data_settings(args, cli.recorded_data(args.checkpoint) if args.checkpoint else None)
    split = cli.load_data(data, args.download).to(device)
    out = args.out or Path("runs", data["dataset"], "theory")
    cli.check_folder(out, args.overwrite)
    draws = make_draws(split, schedule, args.draws, max(args.k), args.seed)
    times = sorted({*range(0, schedule.num_steps, args.every), schedule.num_steps - 1})
    targets, copies = torch.unique(split.forget, dim=0, return_counts=True)
    _, distances = nearest_neighbors(targets, split.remain, len(split.remain))
    rows = [approximation(draws, t, args.k) | forgetting(draws, t, distances, copies) for t in times]
    network = []
    if model is not None:
        cli.check_model_fits(model.config, split, args.checkpoint)
        bf16 = use_bf16(args.bf16, device)
        network = [network_gradients(model.to(device), draws, t, min(10, max(args.k)), bf16) for t in NETWORK_TIMES]

    cli.prepare_folder(out, args.overwrite)
    text = tables(rows, network, args.k)
    with atomic(out / "table.md") as path:
        path.write_text(text)
    figures(out, rows, args.k)
    strip(out / "redirected.png", draws, args.k, [t for t in range(100, schedule.num_steps, 100)])
    seconds = round(time.perf_counter() - clock, 1)
    run = {"data": data, "seed": args.seed, "draws": args.draws, "k": args.k, "seconds": seconds}
    write_json(out / "theory.json", {**run, "times": rows, "network": network, **cli.provenance(device)})
    print(text)
    print(f"{out}: theory.json, table.md and figures, in {seconds} s")


if __name__ == "__main__":
    cli.run_command(main)

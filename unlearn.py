"""Make a trained model forget.

`python unlearn.py` runs ReTrack on runs/digits-tshirt/base/ and writes beside it.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tiny_retrack.lab import datasets, flags, runs
from tiny_retrack.lab.presets import UnlearnSettings, configure
from tiny_retrack.methods import METHODS
from tiny_retrack.training import use_bf16


def make_parser() -> flags.Parser:
    parser = flags.make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="the checkpoint to unlearn (default: runs/DATASET/base)")
    add(
        "--method",
        type=flags.one_of(METHODS),
        default="retrack",
        help=f"{', '.join(METHODS)} (default: retrack)",
    )
    flags.add_settings(parser, "unlearn", UnlearnSettings)
    flags.add_method_settings(parser)
    add("--compile", action="store_true", help="torch.compile the UNet")
    add(
        "--save-every",
        type=flags.positive,
        help="also keep the model of every N-th step before the last, in OUT/step-N",
    )
    add(
        "--out",
        type=Path,
        help="run folder (default: runs/DATASET/METHOD, for retrack with -TARGET)",
    )
    add("--overwrite", action="store_true", help="replace what is in the run folder")
    return parser


def run(args: Namespace, command: str) -> None:
    # After --help: these imports take seconds.
    from tiny_retrack.lab.plots import table
    from tiny_retrack.lab.unlearning import UnlearnPlan, run_label, unlearn

    device = runs.pick_device(args.device)
    checkpoint = args.checkpoint or flags.runs_folder(args) / "base"
    data = flags.data_settings(args, runs.recorded_data(checkpoint))
    given = flags.given(args, UnlearnSettings, *METHODS.values())
    settings, method = configure(data["preset"], args.method, given)
    data, split = datasets.load_data(data, args.download)
    plan = UnlearnPlan(
        checkpoint=checkpoint,
        out=args.out or Path("runs", data["dataset"], run_label(args.method, method)),
        data=data,
        method_name=args.method,
        method=method,
        settings=settings,
        seed=args.seed,
        device=device,
        bf16=use_bf16(args.bf16, device),
        compiled=args.compile,
        save_every=args.save_every,
        overwrite=args.overwrite,
        command=command,
    )
    result = unlearn(plan, split)
    if result is None:
        return
    before = {"model": checkpoint.name, **result.before}
    after = {"model": plan.label, **result.after}
    print(table([before, after]))
    if result.warning:
        print(result.warning)
    print(f"{plan.out}: {settings.steps} steps in {result.seconds:.1f} s")
    print(f"now run: python evaluate.py {checkpoint} {plan.out}")


def main(argv: Sequence[str] | None = None) -> None:
    run(make_parser().parse_args(argv), runs.command_line(__file__, argv))


if __name__ == "__main__":
    runs.run_command(main)

"""Is the image forgotten, is the rest intact?

`python evaluate.py` compares the last unlearned model with its base, `python evaluate.py DIR ...`
any checkpoints. `python evaluate.py compare` unlearns with every method and seed first.
docs/evaluation.md explains the columns.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_retrack.attacks import ATTACKERS
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.presets import PRESETS, EvalSettings, resolve
from tiny_retrack.lab.spec import Spec, method_names
from tiny_retrack.training import use_bf16

FOLDERS = "checkpoints (default: the last unlearned model and its base)"
FEATURES = (
    "the network behind FID and IS: the data set's own classifier (default), or the Inception of "
    "published FIDs, fetched by --download or from a file of its weights"
)
ATTACK = f"also try to bring them back, as attackers: {', '.join(ATTACKERS)} (without names: all)"
TOLERANCE = "rtol and atol of the likelihood's ODE (default: 1e-3; published: 1e-5)"
METHODS = (
    f"{', '.join(method_names())}; such as retrack-knn:k=1,lam=0.05 (default: all that the base "
    "allows: vdu needs its kept checkpoints, retrain the record of its training)"
)


def make_parser(doc: str | None) -> flags.Parser:
    parser = flags.make_parser(doc)
    flags.add_settings(parser, "evaluate", EvalSettings)
    add = parser.add_argument
    add("--features", default="own", metavar="own|inception|FILE", help=FEATURES)
    add("--attack", type=flags.one_of(ATTACKERS), nargs="*", help=ATTACK)
    add("--nll-tolerance", type=float, default=1e-3, help=TOLERANCE)
    return parser


def make_compare_parser() -> flags.Parser:
    parser = make_parser("Unlearn with every method and seed, evaluate all, write a table.")
    parser.prog = "evaluate.py compare"
    add = parser.add_argument
    add("--base", type=Path, help="the model that is to forget (default: runs/DATASET/base)")
    add("--methods", nargs="+", default=[], metavar="METHOD[:SETTING=VALUE,...]", help=METHODS)
    add("--seeds", nargs="+", type=flags.seed, default=[*range(5)], help="default: 0 1 2 3 4")
    add("--curve-every", type=flags.positive, help="also every N steps of the first seed's runs")
    add("--jobs", type=flags.positive, default=1, help="runs at a time; on a CPU, one per core")
    add("--out", type=Path, help="folder of runs and tables (default: runs/DATASET/compare)")
    return parser


def runs_folder(args: Namespace) -> Path:
    return Path("runs", args.dataset or flags.DATA_DEFAULTS["dataset"])


def build_evaluator(args: Namespace, data: dict[str, Any], folders: Sequence[Path]) -> Any:
    from tiny_retrack.lab import evaluation  # after --help: this import takes seconds

    device = runs.pick_device(args.device)
    settings = resolve(PRESETS[data["dataset"]].evaluate, flags.given(args, EvalSettings))
    return evaluation.build_evaluator(
        folders,
        data,
        settings,
        features=args.features,
        nll_tolerance=args.nll_tolerance,
        attackers=args.attack,
        seed=args.seed,
        device=device,
        bf16=use_bf16(args.bf16, device),
        download=args.download,
    )


def evaluate(args: Namespace) -> None:
    from tiny_retrack.lab import evaluation

    folders = args.folders or evaluation.newest_checkpoints(runs_folder(args))
    data = flags.data_settings(args, evaluation.recorded_data(folders))
    evaluator = build_evaluator(args, data, folders)
    evaluation.describe(evaluator)
    print(evaluation.evaluate_all(folders, evaluator))
    if args.attack is not None:
        print(evaluation.attack_all(folders, evaluator))


def compare(args: Namespace) -> None:
    from tiny_retrack.lab import compare

    comparison = compare.Comparison(
        base=args.base or runs_folder(args) / "base",
        out=args.out or runs_folder(args) / "compare",
        specs=[Spec.parse(text) for text in args.methods],
        seeds=args.seeds,
        curve_every=args.curve_every,
        attack=args.attack is not None,
        jobs=args.jobs,
    )
    data = flags.data_settings(args, runs.recorded_data(comparison.base))
    comparison = compare.plan_comparison(comparison, data["dataset"])
    compare.compare(comparison, build_evaluator(args, data, [comparison.base]))


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(make_compare_parser().parse_args(argv[1:]))
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=FOLDERS)
    return evaluate(parser.parse_args(argv))


if __name__ == "__main__":
    runs.run_command(main)

"""The flags of the scripts: types that explain themselves, a flag per setting, which data set."""

import argparse
import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from tiny_retrack.data import DATASETS
from tiny_retrack.lab.presets import PRESETS, SMALL_FOLDER, default_preset, flag_of, names_of
from tiny_retrack.methods import METHODS
from tiny_retrack.pictures import list_pictures
from tiny_retrack.types import InputError

DATA_DEFAULTS: dict[str, Any] = {
    "dataset": "digits-tshirt",
    "data_dir": "data",
    "forget": [],
    "copies": None,
    "hold_out": 0.0,
    "tshirt": None,
    "size": 32,
    "channels": 3,
    "preset": "digits-tshirt",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others, and whose flags are not abbreviated.

    An abbreviation means another flag as soon as there is a new one.
    """

    def __init__(self, doc: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def one_of(options: Collection[str]) -> Callable[[str], str]:
    """A flag's type: one of the names; for a misspelt one the complaint suggests the nearest."""

    def parse(name: str) -> str:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"take one of {', '.join(options)}"
            raise argparse.ArgumentTypeError(f"unknown '{name}', {hint}")
        return name

    return parse


def positive(text: str) -> int:
    """A flag's type: a whole number from 1 up, of at most 9 digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"'{text:.80}' is not a whole number from 1 up, of at most 9 digits"
        )
    return int(text)


def seed(text: str) -> int:
    """A flag's type: what torch takes as a seed."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"'{text:.80}' is not a whole number from 0 to 10^18 - 1")
    return int(text)


def make_parser(doc: str | None) -> Parser:
    """A parser with the flags every script has."""
    parser = Parser(doc)
    group = parser.add_argument_group("which data")
    _add_data_flags(group)
    _add_split_flags(group)
    add = parser.add_argument
    devices = "auto (default: cuda if there is one), cpu or cuda"
    add("--device", type=one_of(("auto", "cpu", "cuda")), default="auto", help=devices)
    add(
        "--bf16",
        type=one_of(("auto", "on", "off")),
        default="auto",
        help="bfloat16 autocast: auto (default: on if the hardware is faster with it), on or off",
    )
    add("--seed", type=seed, default=0, help="seed of all random draws (default: 0)")
    return parser


def _add_data_flags(group: Any) -> None:
    """The flags of the images: with `_add_split_flags` one per entry of `DATA_DEFAULTS` but
    --hold-out, and --download.
    """
    add = group.add_argument
    add(
        "--dataset",
        type=one_of(DATASETS),
        help=f"one of {', '.join(DATASETS)} (default: digits-tshirt, or the checkpoint's)",
    )
    add(
        "--data-dir",
        help="where torchvision's files lie; for 'folder', the folder of pictures (default: data)",
    )
    add("--download", action="store_true", help="fetch what is missing of the data set")
    add(
        "--tshirt",
        metavar="PNG",
        help="mnist-tshirt: the picture to memorise (default: DATA_DIR/tshirt.png)",
    )
    add(
        "--size",
        type=positive,
        help="folder: height and width to resize to (default: the preset's, such as 32)",
    )
    add(
        "--channels", type=int, choices=(1, 3), help="folder: 1 for grey, 3 for colour (default: 3)"
    )
    add(
        "--preset",
        type=one_of(PRESETS),
        help=f"whose defaults to take: {', '.join(PRESETS)} (default: the data set's; of a folder "
        f"small-folder up to {SMALL_FOLDER} pictures, else folder)",
    )


def _add_split_flags(group: Any) -> None:
    """What is to be forgotten, and how often it was seen."""
    add = group.add_argument
    add(
        "--forget",
        nargs="+",
        metavar="IMAGE",
        help="what to forget: indices; of a folder also file names, paths, sub-folders "
        "(default: the data set's own T-shirt)",
    )
    add(
        "--copies",
        type=positive,
        metavar="M",
        help="how often the training set holds each forgotten image (default: 1, or the T-shirt's "
        "own number)",
    )


def runs_folder(args: argparse.Namespace) -> Path:
    """Where the runs of a data set lie, unless --out says otherwise."""
    return Path("runs", args.dataset or DATA_DEFAULTS["dataset"])


def add_settings(parser: argparse.ArgumentParser, part: str, settings: type) -> None:
    """One flag per field of a settings class, whose presets are the `part` of each `Preset`."""
    for f in fields(settings):
        values = {name: getattr(getattr(preset, part), f.name) for name, preset in PRESETS.items()}
        _add_flag(parser, f, f.metadata["about"], values)


def add_method_settings(parser: argparse.ArgumentParser) -> None:
    """One flag per field of any method; methods whose fields have the same name share a flag."""
    group = parser.add_argument_group("settings of the methods")
    users: dict[str, list[str]] = {}
    for method, settings in METHODS.items():
        for name in names_of(settings):
            users.setdefault(name, []).append(method)
    for name, methods in users.items():
        first: Any = METHODS[methods[0]]
        f = next(f for f in fields(first) if f.name == name)
        values = {key: getattr(p.method(methods[0]), name) for key, p in PRESETS.items()}
        _add_flag(group, f, f"{', '.join(methods)}: {f.metadata['about']}", values)


def _add_flag(parser: Any, f: Field, about: str, presets: Mapping[str, Any]) -> None:
    """The flag of a field. Where it is not given it is None, and the preset's value holds."""
    choices = f.metadata["choices"]
    if choices:
        about = f"{about}: {', '.join(choices)}"
    values = [*dict.fromkeys(presets.values())]
    default = f"{values[0]}"
    if len(values) > 1:
        default = ", ".join(f"{name} {value}" for name, value in presets.items())
    text = f"{about} (default: {default})".replace("%", "%%")  # argparse formats it
    kind = one_of(choices) if choices else f.type
    parser.add_argument(flag_of(f.name), type=kind, help=text)


def given(args: argparse.Namespace, *settings: Any) -> dict[str, Any]:
    """What the command line says of the fields of some settings classes."""
    names = dict.fromkeys(name for each in settings for name in names_of(each))
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def data_settings(
    args: argparse.Namespace, recorded: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Which data: the flags, over what a checkpoint's run.json recorded, over the defaults.

    The record of another data set than the one that the flags name is not used.

    Raises:
        InputError: if the preset of a folder depends on its pictures, and it has none.
    """
    known = {}
    for name in DATA_DEFAULTS:
        value = getattr(args, name, None)  # --hold-out is a flag of the training alone
        if value is not None:
            known[name] = value
    if recorded is not None:
        recorded_dataset = recorded.get("dataset", DATA_DEFAULTS["dataset"])
        if known.get("dataset", recorded_dataset) == recorded_dataset:
            known = {**recorded, **known}
    data = {**DATA_DEFAULTS, **known}
    if "preset" not in known:
        data["preset"] = _preset_of(data)
    if "size" not in known and data["dataset"] == "folder":
        data["size"] = PRESETS[data["preset"]].unet.sample_size or data["size"]
    return data


def _preset_of(data: dict[str, Any]) -> str:
    if data["dataset"] != "folder":
        return default_preset(data["dataset"], 0)
    return default_preset("folder", len(list_pictures(Path(data["data_dir"])).names))

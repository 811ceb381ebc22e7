"""The command line: a thin layer over the library, one function per subcommand.

Exit codes: 0 done, 1 the work failed, 2 bad use. Heavy imports happen inside the commands, so
that `smartlab --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smartlab.cli.batch import batch, results
from smartlab.cli.data import AsJson, Data, either, say
from smartlab.cli.data import data as data_commands
from smartlab.cli.judge import EVALUATE, FINETUNE, compare, evaluate, finetune
from smartlab.cli.prompt import Program, WithSettings, answer

if TYPE_CHECKING:
    from smartlab.core.config import Config


app = typer.Typer(
    name="smartlab",
    cls=Program,
    help="Attention-guided masked image modelling on medical images.\n\nStart with: smartlab doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"smartlab {version('smartlab')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


app.add_typer(data_commands, name="data")
app.command(epilog="Example: smartlab batch components seeds=1 steps=100 --dry-run")(batch)
app.command(epilog="Example: smartlab results runs/components --metric auc --to auc.parquet")(results)


@app.command(epilog="Example: smartlab doctor --json")
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs and stores will be written.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Check Python, torch, GPU, memory, disk, /dev/shm and Chromium, and say what to do."""
    from smartlab.cli import doctor as machine

    checks = machine.examine(folder)
    result = machine.as_json(checks)
    say(as_json, result, machine.report(checks))
    raise typer.Exit(0 if result["ready"] else 1)


@app.command(epilog="Example: smartlab demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the executed notebooks and the pictures.")] = Path(
        "runs/demo"
    ),
    everything: Annotated[
        bool, typer.Option("--all", help="All ordered notebooks instead of the tour.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="Only notebooks whose name contains this.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tour smartlab on the built-in phantom: six short notebooks, and one page of what came of them."""
    from smartlab.cli.demo import run_demo

    result = run_demo(out, everything=everything, only=only, progress=not as_json)
    say(as_json, result.as_json(), result.table())
    raise typer.Exit(0 if result.ok else 1)


@app.command(
    epilog="Example: smartlab pretrain tiny train.steps=600 mask.strategy=random --out runs/x --resume",
    cls=WithSettings,
)
def pretrain(
    preset: Annotated[str, typer.Argument(help="Preset name or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/pretrain"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although settings or data changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pretrain an encoder; from the built-in phantom unless --data says otherwise."""
    from smartlab.core.config import load_config, parse_overrides
    from smartlab.training.pretrain import pretrain as train

    settings = parse_overrides(overrides or [])
    if either(data, settings.get("data.manifest"), "data.manifest") and data:
        settings["data.manifest"] = data
    cfg = load_config(preset, settings)
    run = train(cfg, out, resume=resume, allow_changes=allow_changes, progress=not as_json)
    last = {k: v for k, v in run.history.iloc[-1].to_dict().items() if v == v} if len(run.history) else {}
    lines = [f"{run}"] + [f"  {name:<26} {value:.4g}" for name, value in last.items()]
    lines.append(
        f"resume with: smartlab pretrain {preset} … --out {out} --resume"
        if not run.finished
        else f"finished; next: {_judged_by(cfg, out)}"
    )
    say(
        as_json, {"out": str(out), "step": run.step, "finished": run.finished, "last": last}, "\n".join(lines)
    )


def _judged_by(config: Config, out: Path) -> str:
    """The command that judges a run by what its own data tell: a label, masks, or nothing at all."""
    from smartlab.data.store.prepare import name_data

    man = name_data(config.data.manifest, config.data.root, progress=False)[0]
    label = next((name for name, spec in man.labels.items() if spec.kind in ("binary", "multiclass")), None)
    if label:
        return f"smartlab evaluate {out} --label {label}"
    if any(case.masks or case.label_map for case in man.cases):
        return f"smartlab finetune {out} --task segment"
    return f"smartlab evaluate {out} --task heads"


@app.command(epilog="Example: smartlab explore scans/patient-1 --encoder runs/x --out explorer.html")
def explore(
    scan: Annotated[
        Path, typer.Argument(help="A scan: file or DICOM folder; with a run of mammograms one of these.")
    ],
    encoder: Annotated[
        Path | None,
        typer.Option(help="Run folder or exported file; default: the encoder that comes with smartlab."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Where it begins, as key=value: ratio=0.5 strategy=block.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("explorer.html"),
    as_json: AsJson = False,
) -> None:
    """Look at masks on a scan of your own: writes a page that needs no kernel, and says how to explore it live."""
    from smartlab.core.config import parse_overrides
    from smartlab.viewers.explore import explore as look

    given = parse_overrides(settings or [])
    page = look(scan, encoder, **given).save_html(out)
    places = [repr(str(place)) for place in (scan, encoder) if place is not None]
    named = ", ".join([*places, *(f"{k}={v!r}" for k, v in given.items())])
    live = ["import smartlab as sl", f"sl.explore({named})"]
    size = page.stat().st_size
    text = (
        f"{page}: {size / 2**20:.1f} MB, opens in any browser\nwith every control, in JupyterLab:\n"
        + "\n".join(f"    {line}" for line in live)
    )
    say(as_json, {"file": str(page), "bytes": size, "live": live}, text)


@app.command(epilog="Example: smartlab export runs/x --to monai --out encoder.pt")
def export(
    run: Annotated[Path, typer.Argument(help="Run folder or exported file.")],
    to: Annotated[str, typer.Option(help="monai, nnunet, safetensors or hub.")],
    out: Annotated[str, typer.Option(help="File to write; for the Hugging Face hub, ORG/NAME.")],
    role: Annotated[str, typer.Option(help="teacher or student.")] = "teacher",
    as_json: AsJson = False,
) -> None:
    """Write a pretrained encoder for MONAI or nnU-Net, as safetensors with a model card, or to the hub."""
    from smartlab.interop import weights as interop

    path = interop.export(run, to, out, role)  # type: ignore[arg-type]
    if isinstance(path, str):
        return say(as_json, {"address": path}, f"{path}\nwhoever may read {out} loads hf:{out}")
    say(
        as_json,
        {"file": str(path), "bytes": path.stat().st_size},
        f"{path}: {path.stat().st_size / 2**20:.1f} MB",
    )


app.command(epilog=EVALUATE, cls=WithSettings)(evaluate)
app.command(epilog=FINETUNE, cls=WithSettings)(finetune)
app.command(epilog="Example: smartlab compare runs/smart runs/smit --task probe --metric auc")(compare)


@app.command(epilog="Example: smartlab config smit mask.ratio=0.5 train.batch=8")
def config(
    preset: Annotated[str, typer.Argument(help="Preset name or YAML file.")] = "tiny",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a configuration with every value resolved."""
    import yaml

    from smartlab.core.config import load_config, parse_overrides

    resolved = load_config(preset, parse_overrides(overrides or [])).model_dump(mode="json")
    say(as_json, resolved, yaml.safe_dump(resolved, sort_keys=False))


def main() -> None:
    """Entry point."""
    answer(app)


if __name__ == "__main__":
    main()

"""The command line: a thin layer over the library, one function per subcommand.

Exit codes: 0 done, 1 the work failed, 2 bad use. Heavy imports happen inside the commands, so
that `smartlab --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smartlab.cli.batch import batch, results
from smartlab.cli.data import WHAT, AsJson, Data, Place, either, say
from smartlab.cli.data import data as data_commands
from smartlab.cli.prompt import Program, WithSettings, answer
from smartlab.core.errors import UseError, one_of
from smartlab.core.files import check_writable

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


DataOrRuns = Annotated[str | None, typer.Option("--data", help=f"{WHAT} Default: the data of the run.")]
EVALUATE = """One example per task:

\b
smartlab evaluate runs/x --task probe --label malignancy folds=10
smartlab evaluate runs/x --task knn --label margin neighbours=20
smartlab evaluate runs/x --task fewshot --label malignancy shots=[1,5,20] draws=50
smartlab evaluate runs/x --task outcome --label outcome covariates=clinic.csv
smartlab evaluate runs/x --task outcome --label time_months event=event
smartlab evaluate runs/x --task clusters embeddings=[umap,pca]
smartlab evaluate runs/x --task units labelled=4 "levels=[stage 2,tokens]"
smartlab evaluate runs/x --task unsupervised stage=2
smartlab evaluate runs/x --task heads sample=scans --json
smartlab evaluate runs/x --task localize regions=lesion
smartlab evaluate runs/x --task probe --label response --data scans
smartlab evaluate x.safetensors --task probe --data nodules-png --root nodules
smartlab evaluate ct-fm:weights.safetensors --task probe --data scans --label response

The DAGMaN paper's downstream tasks by name, its figures beside yours; first what they would cost:


smartlab evaluate runs/x --protocol dagman-nodules --root data/lidc --dry-run
smartlab evaluate runs/x --protocol dagman-segment --root data/segment shares=[1]
smartlab evaluate runs/x --protocol dagman-outcome --manifest my/manifest.json --label response --root my/images
smartlab evaluate runs/x --protocol dagman-organs --root data/organ3d

A wrong setting is answered with those the task has. `smartlab compare` tells runs apart.
"""
FINETUNE = """One example per task:

\b
smartlab finetune runs/x --task classify --label malignancy modes=[full,scratch] shots=[10]
smartlab finetune runs/x --task segment labels=[liver,spleen] steps=400 --resume
smartlab finetune runs/x --task segment modes=[full,frozen,scratch] fractions=[0.1,0.25,0.5,1]

Stopped, it goes on with --resume and gives what it would have given.
"""


@app.command(epilog=EVALUATE, cls=WithSettings)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, exported file, or KIND:FILE: ct-fm, voco …")],
    task: Annotated[
        str | None,
        typer.Option(help="probe, knn, fewshot, outcome, clusters, units, unsupervised, heads or localize."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Instead: dagman-nodules, dagman-segment, dagman-outcome or dagman-organs."),
    ] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="Settings of the task as key=value.")] = None,
    data: DataOrRuns = None,
    manifest: Annotated[str | None, typer.Option(help="The older name of --data.")] = None,
    root: Place = None,
    store: Annotated[Path | None, typer.Option(help="A store of them; else one is built beside.")] = None,
    label: Annotated[str | None, typer.Option(help="What to predict; the first binary label.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results; default RUN/evaluation/TASK.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of a protocol: only tell the plan and what it would cost.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge a frozen encoder on a downstream task, beside a random one and trivial baselines."""
    source = either(data, manifest, "--manifest")
    if task is not None and protocol is not None:
        raise UseError("what to evaluate?", expected="either --task or --protocol")
    if protocol is None:
        if dry_run:
            raise UseError("--dry-run is of protocols", found=f"--task {task or 'probe'}")
        return _judge(run, task or "probe", source, settings, root, store, label, out, as_json)
    from smartlab.evaluation.protocols.plan import plan_protocol

    given = _settings(settings, {"data", "manifest", "root", "store", "label", "out"})
    out = out or _home(run) / "evaluation" / protocol
    plan = plan_protocol(run, protocol, source, root=root, label=label, **given)
    check_writable(out)
    if dry_run:
        return say(as_json, plan.as_json(), str(plan))
    print(plan, file=sys.stderr)
    result = plan.run(out, store=store, progress=not as_json)
    figures = result.facts["figures"]
    _tell(as_json, {"out": str(out), "figures": figures}, f"{result}\n{out / 'figure.png'}")


@app.command(epilog=FINETUNE, cls=WithSettings)
def finetune(
    run: Annotated[Path, typer.Argument(help="Run folder, exported file, or KIND:FILE: ct-fm, voco …")],
    task: Annotated[str, typer.Option(help="classify or segment.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings of the task as key=value.")] = None,
    data: DataOrRuns = None,
    manifest: Annotated[str | None, typer.Option(help="The older name of --data.")] = None,
    root: Place = None,
    store: Annotated[Path | None, typer.Option(help="A store of them; else one is built beside.")] = None,
    label: Annotated[str | None, typer.Option(help="classify: what to predict.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Trainings and results; default RUN/finetune/TASK.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pretrained encoder for classification or segmentation."""
    from smartlab.evaluation.task import FINE_TUNING

    one_of("no task", task, FINE_TUNING)
    source = either(data, manifest, "--manifest")
    _judge(run, task, source, settings, root, store, label, out, as_json, resume=resume)


def _judge(
    run: Path,
    task: str,
    data: str | None,
    settings: list[str] | None,
    root: Path | None,
    store: Path | None,
    label: str | None,
    out: Path | None,
    as_json: bool,
    **more: Any,
) -> None:
    from smartlab.data.store.store import open_store
    from smartlab.evaluation.evaluate import evaluate as judge
    from smartlab.evaluation.task import FINE_TUNING

    given = _settings(settings, {"task", "data", "manifest", "root", "store", "label", "out", *more})
    if out is None:
        name = task if label is None else f"{task}-{label}"
        out = _home(run) / ("finetune" if task in FINE_TUNING else "evaluation") / name
    check_writable(out)
    result = judge(
        run,
        task,
        data,
        root=root,
        store=None if store is None else open_store(store),
        label=label,
        out=out,
        progress=not as_json,
        **(given | more),
    )
    content = {"out": str(out), "metrics": {k: v._asdict() for k, v in result.metrics.items()}}
    names = f"\n{result.facts['names']}" if "names" in result.facts else ""
    _tell(as_json, content, f"{result}\n{out / 'figure.png'}{names}")


def _settings(words: list[str] | None, options: set[str]) -> dict[str, Any]:
    """Settings of a task from key=value, none of which is an option of the command."""
    from smartlab.core.config import parse_overrides

    given = parse_overrides(words or [])
    if taken := set(given) & options:
        raise UseError(f"{min(taken)} is an option here", fix=f"write --{min(taken)} …")
    if "progress" in given:
        raise UseError("progress is always shown, but for --json")
    return given


def _home(run: Path) -> Path:
    """Where results of a run folder, or of a file (KIND:FILE, hf:ORG/NAME), go."""
    if run.is_dir():
        return run
    file = run if run.exists() else Path(str(run).rpartition(":")[2])
    return file.parent / file.stem


def _tell(as_json: bool, content: Any, text: str) -> None:
    from smartlab.evaluation.judge.result import clean

    say(as_json, clean(content), text)


@app.command(epilog="Example: smartlab compare runs/smart runs/smit --task probe --metric auc")
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Two or more run folders, folders of results, or nnU-Net's summary.json."),
    ],
    task: Annotated[str, typer.Option(help="The task, or its folder, such as probe-malignancy.")],
    metric: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare results of one task on the same cases: differences, intervals, p-values after Holm."""
    from smartlab.evaluation.judge.compare import compare as tell_apart
    from smartlab.evaluation.judge.result import clean

    named = {str(run) if run.name == "summary.json" else run.name: run for run in runs}
    if len(named) < len(runs):
        raise UseError("two runs have the same name", found=", ".join(map(str, runs)))
    table = tell_apart(named, task, metrics=metric)
    say(as_json, clean(table.to_dict("records")), table.round(4).to_string(index=False))


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

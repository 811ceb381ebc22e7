"""`smartlab evaluate`, `finetune` and `compare`: a thin layer over `smartlab.evaluation`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smartlab.cli.data import WHAT, AsJson, Place, either, say
from smartlab.core.errors import UseError, one_of
from smartlab.core.files import check_writable

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

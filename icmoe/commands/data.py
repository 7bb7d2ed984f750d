"""``icmoe-fl data``: bring a hospital's files into a form that training can use, and take patients out again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from icmoe.commands.check import check
from icmoe.errors import ConfigError

if TYPE_CHECKING:
    from icmoe.data.importing import ImportReport, ImportRequest
    from icmoe.data.pairing import LabelKind
    from icmoe.types import Axis

data_app = typer.Typer(no_args_is_help=True, help="A site's images: import, check, remove.")
data_app.command("check")(check)
console = Console(stderr=True)
_Name = TypeVar("_Name", bound=str)


@data_app.command("import")
def import_data(
    source: Annotated[Path, typer.Argument(help="Folder with images and labels.")],
    out: Annotated[Path, typer.Option(help="Folder for manifest.csv. Images stay where they are.")],
    labels: Annotated[
        str,
        typer.Option(help="seg or rtstruct: DICOM series with such objects; nifti: NIfTI pairs; mask: pictures."),
    ],
    site: Annotated[str, typer.Option(help="Name of this hospital in the manifest.")] = "site",
    axis: Annotated[str, typer.Option(help="Slices: axial, coronal or sagittal. Default: plane of acquisition.")] = "",
    intensity: Annotated[
        str, typer.Option(help="stored, window:LOW:HIGH or percentile:LOW:HIGH. Default: by modality.")
    ] = "",
    label_pattern: Annotated[
        str,
        typer.Option(help="Label of an image, such as '../labels/{name}.nii.gz'; for seg and rtstruct 'liver*.dcm'."),
    ] = "",
    patient_pattern: Annotated[
        str, typer.Option(help="Regular expression over an image's path; its first group is the patient.")
    ] = "",
    split: Annotated[str, typer.Option(help="Shares of patients in train, val and test.")] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    secret: Annotated[
        Path | None, typer.Option(help="File with the site's secret for pseudonyms; made, and said, where missing.")
    ] = None,
    roi: Annotated[
        list[str] | None,
        typer.Option(help="For rtstruct, repeated: an ROI by name; the first becomes value 1. Writes labels to --out."),
    ] = None,
    write_labels: Annotated[
        bool, typer.Option("--write-labels", help="Also write labels of volumes as NIfTI files into --out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Write a manifest for a folder of images and labels.

    Volumes stay where they are. Patient ids become pseudonyms under a secret that stays at the site. All images of a
    patient go into one split.

    Example: icmoe-fl data import /archive/liver --out data/liver --labels seg --site hospitalA
    """
    from icmoe.data.importing import ImportRequest

    # The secret comes last: none is made for a command that is wrong elsewhere.
    request = ImportRequest(
        source=source,
        out=out,
        labels=_label_kind(labels),
        site=site,
        axis=_axis(axis),
        intensity=intensity,
        patient_pattern=patient_pattern,
        label_pattern=label_pattern,
        fractions=_fractions(split),
        seed=seed,
        write_labels=write_labels,
        rois=_rois(roi or [], labels),
        secret=_site_secret(secret, out),
    )
    _import(request, as_json=as_json)


def _import(request: "ImportRequest", *, as_json: bool) -> None:
    from icmoe.data.importing import import_folder

    with Progress(console=console) as progress:
        bar = progress.add_task("Reading images and labels", total=None)
        report = import_folder(request, lambda done, total: progress.update(bar, completed=done, total=total))
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _show(report, request.out)


def _show(report: "ImportReport", out: Path) -> None:
    table = Table(title=f"{out / 'manifest.csv'}: {report.num_images} images")
    for name in ("split", "patients"):
        table.add_column(name)
    for name, patients in report.patients.items():
        table.add_row(name, str(len(patients)))
    Console().print(table)
    if report.values:
        values = ", ".join(
            f"{value}{f' ({report.names[value]})' if value in report.names else ''}: {count}"
            for value, count in sorted(report.values.items())
        )
        typer.echo(f"Voxels by label value: {values}. The run config's task.classes names those to segment.")
    for name, reason in report.skipped.items():
        typer.echo(f"left out {name}: {reason}")
    typer.echo(f"Next: icmoe-fl data check {out}")


def _site_secret(given: Path | None, out: Path) -> bytes:
    """The site's secret. A missing one is made and said loudly, but never for a folder that names another one."""
    from icmoe.data.pseudonyms import default_secret_path, load_secret
    from icmoe.data.secret_note import fingerprint, noted_fingerprint, refuse_other_secret

    path = given or default_secret_path()
    noted = noted_fingerprint(out)
    is_new = not path.exists()
    if is_new and noted:
        raise ConfigError(
            f"the secret {path} does not exist, and the pseudonyms of {out} were made with the secret {noted}. Give "
            "its file with --secret, or choose another --out."
        )
    secret = load_secret(path)
    refuse_other_secret(out, secret)
    if is_new:
        typer.secho(
            f"A NEW SECRET WAS MADE: {path} ({fingerprint(secret)}). Patients get pseudonyms that fit no earlier "
            "import. If this site has a secret already, the path is wrong: delete that file and, in "
            f"{out}, manifest.csv and pseudonyms.json, then give the right --secret. Otherwise keep a backup of it.",
            fg=typer.colors.YELLOW,
            bold=True,
            err=True,
        )
    return secret


@data_app.command("remove")
def remove_patient(
    folder: Annotated[Path, typer.Argument(help="Folder with manifest.csv.")],
    patient: Annotated[str, typer.Option(help="As the manifest names them, or the hospital's own id.")],
    site: Annotated[str, typer.Option(help="Whose patient, where the manifest holds several sites.")] = "",
    secret: Annotated[Path | None, typer.Option(help="File with the site's secret for pseudonyms.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Withdraw a patient: out of the manifest, out of the feature cache, noted in withdrawals.jsonl.

    What earlier rounds learnt from them stays in the model; leave that to the study's protocol.
    """
    from icmoe.data.cache import open_cache
    from icmoe.data.manifest import FILE_NAME, read_rows
    from icmoe.data.pseudonyms import default_secret_path, load_secret, pseudonym
    from icmoe.data.secret_note import refuse_other_secret
    from icmoe.data.withdrawal import withdraw

    names = {row["patient"] for _, row in read_rows(folder / FILE_NAME)}
    path = secret or default_secret_path()
    if secret is not None and not secret.exists():
        raise ConfigError(f"the secret {secret} does not exist. Give the one that the patients were imported with.")
    if patient not in names and path.exists():
        key = load_secret(path)
        refuse_other_secret(folder, key)
        patient = pseudonym(patient, secret=key)
    cache = open_cache()
    note = withdraw(folder, patient, site=site, cache=cache)
    if as_json:
        typer.echo(json.dumps(asdict(note)))
        return
    typer.echo(
        f"Removed patient {note.patient}: {note.images} images, {note.cache_entries} features from {cache.root}."
    )
    typer.echo("Pictures may be left in reports, evaluations and predictions you made, and in other users' caches.")
    if note.unread:
        typer.echo(
            f"{note.unread} image files were gone already; run 'icmoe-fl cache purge' to be sure of their features."
        )
    typer.echo(f"Next: icmoe-fl data check {folder}, because the manifest has changed.")


def _label_kind(labels: str) -> "LabelKind":
    from icmoe.data.pairing import LABEL_KINDS

    return _one_of(labels, LABEL_KINDS, option="--labels")


def _axis(axis: str) -> "Axis | None":
    from icmoe.types import AXES

    return _one_of(axis, AXES, option="--axis") if axis else None


def _one_of(value: str, allowed: tuple[_Name, ...], *, option: str) -> _Name:
    for name in allowed:
        if value == name:
            return name
    raise ConfigError(f"{option} takes {', '.join(allowed)}; got {value!r}.")


def _rois(names: list[str], labels: str) -> tuple[str, ...]:
    plain = [name.strip().casefold() for name in names]
    if names and labels != "rtstruct":
        raise ConfigError("--roi chooses ROIs of RTSTRUCT labels. Leave it out, or use --labels rtstruct.")
    if "" in plain or len(set(plain)) < len(plain):
        raise ConfigError(f"--roi takes each name once, such as --roi Liver --roi Spleen; got {names}.")
    return tuple(names)


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--split takes three shares such as 0.7,0.15,0.15; got {text!r}.") from error
    return train, val, test

"""``icmoe-fl privacy``: what a site's data have spent, what is left, and what it is enough for."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icmoe.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from icmoe.report.privacy_page import PrivacyBooks
    from icmoe_client.ledger import Ledger
    from icmoe_client.ledger_history import Entry, Standing
    from icmoe_client.site_file import SiteConfig

DEFAULT_DELTA = 1e-5
NOISE_MULTIPLIERS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
ROUNDS = (1, 5, 10, 20, 50)
_BAR = 12

SiteOption = Annotated[str, typer.Option("--site", help="Name of this hospital.")]
SiteFile = Annotated[Path | None, typer.Option("--config", help="Its site file.")]

privacy_app = typer.Typer(no_args_is_help=True, help="At a hospital: the ledger of what privacy was spent.")


@privacy_app.command("show")
def show(
    name: SiteOption,
    config: SiteFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a plot.")] = None,
) -> None:
    """Show every booking, epsilon by two accountants, and what is left of the site's budget.

    No image is read. The ledger is checked: a line that was changed, removed or moved is an error.

    Example: icmoe-fl privacy show --site hospitalA --html ledger.html
    """
    site = _load(name, config)
    books = _read_books(site)
    if html is not None:
        from icmoe.report.privacy_page import write_privacy_page

        write_privacy_page(books, html)
    if as_json:
        typer.echo(json.dumps(asdict(books)))
        return
    _print_books(Console(), books, path=site.ledger_path)
    if html is not None:
        typer.echo(f"Page: {html}")


@privacy_app.command("plan")
def plan(
    epsilon: Annotated[float | None, typer.Option(help="The budget. Default: the site's max_epsilon.")] = None,
    name: Annotated[str | None, typer.Option("--site", help="Count what its ledger says was spent already.")] = None,
    config: SiteFile = None,
    patients: Annotated[int | None, typer.Option(min=1, help="Training patients, for privacy.unit: patient.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Training images, for privacy.unit: image.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Patients or images expected in a step.")] = 4,
    local_epochs: Annotated[int, typer.Option(min=1, help="Epochs of a round.")] = 2,
    noise_multiplier: Annotated[float | None, typer.Option(help="Only this noise.")] = None,
    delta: Annotated[float | None, typer.Option(help="Default: the site's target_delta, else 1e-5.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Say how many rounds fit into a budget at which noise, and which noise a number of rounds needs.

    With --site, what its data have spent already counts, and the number of patients or images is that of the last
    booking unless given.

    Example: icmoe-fl privacy plan --patients 13 --batch-size 4 --epsilon 3
    """
    site = _load(name, config) if name is not None else None
    if site is None and config is not None:
        raise ConfigError("--config is the file of a site; give its name with --site.")
    ledger = _open(site) if site is not None else None
    budget = epsilon if epsilon is not None else (site.policy.max_epsilon if site is not None else None)
    if budget is None or budget <= 0:
        raise ConfigError("give a budget above 0 with --epsilon; the site's file sets none.")
    used_delta = delta if delta is not None else (site.policy.target_delta if site is not None else DEFAULT_DELTA)
    if not 0 < used_delta < 1:
        raise ConfigError(f"--delta is {used_delta:g}; it must be between 0 and 1.")
    num_units = _num_units(patients, images, ledger)
    if used_delta >= 1 / num_units:
        raise ConfigError(
            f"delta {used_delta:g} is no promise for {num_units} units; give a --delta below 1/{num_units}."
        )
    answer = _plan(
        budget=budget, delta=used_delta, num_units=num_units, batch_size=batch_size, local_epochs=local_epochs,
        multipliers=NOISE_MULTIPLIERS if noise_multiplier is None else (noise_multiplier,),
        standing=ledger.standing(ledger.last_units(), delta=used_delta) if ledger and ledger.entries() else None,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        _print_plan(Console(), answer)


@privacy_app.command("confirm")
def confirm(
    name: SiteOption,
    epsilon: Annotated[float, typer.Option(help="What was spent up to now, at the site's target_delta.")],
    reason: Annotated[str, typer.Option(help="Why the ledger does not know; it stays in the ledger.")],
    config: SiteFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Confirm that more was spent than the ledger says, as after a restored backup. It can never be taken back.

    From then on epsilon is this one plus that of later rounds. A lower one than the ledger's own is refused.

    Example: icmoe-fl privacy confirm --site hospitalA --epsilon 2.71 --reason "disk lost, backup of 3 May restored"
    """
    from icmoe_client.egress_log import LOG, EgressLog
    from icmoe_client.ledger import Ledger

    site = _load(name, config)
    ledger = Ledger(site.ledger_path)
    if not yes:
        typer.confirm(f"State for ever that {name} has spent epsilon {epsilon:g}?", abort=True)
    log = EgressLog(site.state_dir / LOG, key=site.receipt_key, site=site.name)
    signed = log.countersigned()
    if signed is not None and signed.epsilon is not None and epsilon < signed.epsilon * (1 - 1e-6):
        raise ConfigError(f"the centre has countersigned epsilon {signed.epsilon:.6g} for {name}; less was not spent.")
    ledger.confirm(epsilon=epsilon, delta=site.policy.target_delta, reason=reason)
    # Nothing is lost from the log where only the ledger was restored.
    with suppress(ConfigError):
        log.go_on_after_loss()
    typer.echo(f"Confirmed: {name} has spent epsilon {epsilon:g} at delta {site.policy.target_delta:g}.")


def _load(name: str, config: Path | None) -> "SiteConfig":
    from icmoe_client.site_file import find_site_file, load_site

    return load_site(find_site_file(name, config), name=name)


def _open(site: "SiteConfig") -> "Ledger | None":
    """The site's ledger; looking at it must not make one."""
    from icmoe_client.ledger import Ledger

    return Ledger(site.ledger_path) if site.ledger_path.exists() else None


def _read_books(site: "SiteConfig") -> "PrivacyBooks":
    from icmoe.report.privacy_page import PrivacyBooks

    ledger = _open(site)
    delta, limit = site.policy.target_delta, site.policy.max_epsilon
    units = ledger.last_units() if ledger else {}
    highest = ledger.highest(delta=delta) if ledger else 0.0
    lines, head = ledger.head() if ledger else (0, "")
    standing = ledger.standing(units, delta=delta) if ledger and units else None
    spent = standing.epsilon if standing else highest
    return PrivacyBooks(
        site=site.name,
        epsilon_rdp=spent,
        epsilon_prv=_by_prv(standing, delta) if standing else None,
        highest=highest,
        delta=standing.delta if standing else delta,
        max_epsilon=limit,
        left=max(0.0, limit - spent) if limit is not None else None,
        bookings=[_booking(entry) for entry in (ledger.entries() if ledger else ())],
        confirmations=[
            {"line": one.number, "time": one.time, "epsilon": one.epsilon, "delta": one.delta, "reason": one.reason}
            for one in (ledger.confirmations() if ledger else ())
        ],
        lines=lines,
        head=head,
    )


def _by_prv(standing: "Standing", delta: float) -> float | None:
    from icmoe.privacy import accounting

    try:
        return standing.confirmed + accounting.epsilon(standing.spends, delta=delta, accountant="prv")
    except PrivacyError:
        return None


def _booking(entry: "Entry") -> dict[str, Any]:
    return {
        "line": entry.number, "time": entry.time, "run": entry.run, "round": entry.server_round, "unit": entry.unit,
        "units": entry.num_units, **asdict(entry.spend), "delta": entry.delta, "epsilon_after": entry.epsilon_after,
        "released": entry.released,
    }  # fmt: skip


def _print_books(console: Console, books: "PrivacyBooks", *, path: Path) -> None:
    if not books.bookings and not books.confirmations:
        console.print(f"Nothing was booked for {books.site} yet ({path}).", markup=False, soft_wrap=True)
        return
    # Narrow enough for 80 columns; all the rest is in the page and in --json.
    table = Table(title=f"Privacy ledger of {escape(books.site)}", box=SIMPLE_HEAD, collapse_padding=True)
    for column in ("line", "date", "run", "round", "units", "noise", "steps", "epsilon", "", "left"):
        table.add_column(column, justify="left" if column in ("date", "run", "") else "right", no_wrap=True)
    top = max([books.max_epsilon or 0.0, *(one["epsilon_after"] for one in books.bookings)]) or 1.0
    for one in books.bookings:
        table.add_row(
            str(one["line"]), one["time"][:10], escape(one["run"][:6]), str(one["round"]), str(one["units"]),
            f"{one['noise_multiplier']:.4g}", str(one["num_steps"]), f"{one['epsilon_after']:.3f}",
            "█" * round(_BAR * one["epsilon_after"] / top), "yes" if one["released"] else "no",
        )  # fmt: skip
    console.print(table)
    for one in books.confirmations:
        line = f"line {one['line']}, {one['time']}: epsilon {one['epsilon']:g} confirmed, because: {one['reason']}"
        console.print(line, markup=False, highlight=False)
    prv = "not computed" if books.epsilon_prv is None else f"{books.epsilon_prv:.4f}"
    console.print(f"epsilon at delta {books.delta:g}: {books.epsilon_rdp:.4f} (RDP, enforced), {prv} (PRV)")
    if books.highest > books.epsilon_rdp:
        console.print(f"highest of any unit that ever was in the data: {books.highest:.4f} (RDP)")
    if books.max_epsilon is None:
        console.print("The site sets no budget (policy.max_epsilon).")
    else:
        console.print(f"left of the budget of {books.max_epsilon:g}: {books.left:.4f}")


def _num_units(patients: int | None, images: int | None, ledger: "Ledger | None") -> int:
    if patients is not None and images is not None:
        raise ConfigError("give --patients for privacy.unit: patient, or --images for image, not both.")
    booked = len(ledger.last_units()) if ledger else 0
    found = patients or images or booked
    if not found:
        raise ConfigError("nothing was booked yet, so the number of units is not known: give --patients or --images.")
    return found


def _plan(
    *,
    budget: float,
    delta: float,
    num_units: int,
    batch_size: int,
    local_epochs: int,
    multipliers: tuple[float, ...],
    standing: "Standing | None",
) -> dict[str, Any]:
    """Rounds by noise and noise by rounds, as ``--json`` prints them."""
    from icmoe.privacy.accounting import Spend, affordable_steps, epsilon, round_of

    sample_rate, steps = round_of(num_units=num_units, batch_size=batch_size, local_epochs=local_epochs)
    spent, confirmed = (standing.spends, standing.confirmed) if standing else ((), 0.0)
    by_noise = []
    for noise in multipliers:
        if noise <= 0:
            raise ConfigError(f"--noise-multiplier is {noise:g}; it must be above 0.")
        fit = affordable_steps(
            max_epsilon=budget - confirmed, delta=delta, noise_multiplier=noise, sample_rate=sample_rate, spent=spent
        )
        reached = confirmed + epsilon((*spent, Spend(noise, sample_rate, fit // steps * steps)), delta=delta)
        by_noise.append({"noise_multiplier": noise, "rounds": fit // steps, "epsilon": reached})
    return {
        "epsilon": budget, "delta": delta, "units": num_units, "sample_rate": sample_rate, "steps_per_round": steps,
        "spent": standing.epsilon if standing else 0.0,
        "by_noise": by_noise,
        "by_rounds": [
            {
                "rounds": rounds,
                "noise_multiplier": _noise_for(budget - confirmed, delta, sample_rate, rounds * steps, spent),
            }
            for rounds in ROUNDS
        ],
    }  # fmt: skip


def _noise_for(budget: float, delta: float, sample_rate: float, num_steps: int, spent: Any) -> float | None:
    from icmoe.privacy.accounting import solve_noise_multiplier

    try:
        return solve_noise_multiplier(
            target_epsilon=budget, delta=delta, sample_rate=sample_rate, num_steps=num_steps, spent=spent
        )
    except PrivacyError:
        return None


def _print_plan(console: Console, answer: dict[str, Any]) -> None:
    console.print(
        f"{answer['units']} units, sample rate {answer['sample_rate']:.4g}, {answer['steps_per_round']} steps a round; "
        f"epsilon {answer['epsilon']:g} at delta {answer['delta']:g} (RDP), {answer['spent']:.3f} of it spent already",
        highlight=False,
    )
    rounds = Table(title="rounds that fit")
    for column in ("noise multiplier", "rounds", "epsilon then"):
        rounds.add_column(column, justify="right")
    for one in answer["by_noise"]:
        rounds.add_row(f"{one['noise_multiplier']:g}", f"{one['rounds']:,}", f"{one['epsilon']:.3f}")
    noise = Table(title="noise that is needed")
    for column in ("rounds", "noise multiplier"):
        noise.add_column(column, justify="right")
    for one in answer["by_rounds"]:
        needed = one["noise_multiplier"]
        noise.add_row(str(one["rounds"]), "none is enough" if needed is None else f"{needed:.4g}")
    console.print(rounds, noise)

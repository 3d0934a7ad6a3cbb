"""`mmrl plan`: will this fleet fit, what can it carry, and what would a change bring."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.errors import unknown

if TYPE_CHECKING:
    from mmrl.plan import Answer, Player, Question


def command(
    models: Annotated[
        list[str], typer.Argument(help="The fleet: NAME=RATE (requests/s), or NAME alone.")
    ],
    platform: Annotated[
        list[str], typer.Option(help="Platform or its folder; further ones are alternatives.")
    ] = ["h200"],  # noqa: B006
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Device memory in GB, all unless given; further ones are alternatives."),
    ] = None,
    link: Annotated[
        list[float] | None, typer.Option(help="An alternative: a link of so many GB/s.")
    ] = None,
    trace: Annotated[
        list[Path] | None, typer.Option(help="Recorded requests instead of rates.")
    ] = None,
    targets: Annotated[str, typer.Option(help="sliding, chat, market or relative.")] = "sliding",
    lengths: Annotated[str, typer.Option(help="Length family of requests.")] = "chat",
    verbs: Annotated[
        str, typer.Option(help="core, or full: layers of a model may be streamed while it runs.")
    ] = "core",
    policy: Annotated[
        str | None,
        typer.Option(
            help="A rule, a run folder or an exported policy; the shipped policy unless given."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and plan.json.")] = Path("plan"),
) -> None:
    """Say whether a fleet fits, at which rates it meets its targets, and what a change brings."""
    from mmrl.plan import ask, check_place, plan_site, sites, write_plan

    question = ask(models, targets, lengths, trace or [], verbs)
    check_place(out)
    player = _player(policy)
    name = Path(policy).name if policy else "the shipped policy"
    console = Console(stderr=True)
    answers = []
    with console.status("the first time, code is compiled: up to a minute") as status:
        for site in sites(platform, budget or [], link or []):
            answers.append(plan_site(question, site, name, player, status.update))
        status.update("writing")
        page = write_plan(question, answers, out)
    _print(question, answers)
    typer.echo(f"wrote {page}")


def _player(policy: str | None) -> "Player":
    """Return what plays a policy: a rule, or a learned one, the shipped or from its folder.

    Raises:
        InputError: There is neither a rule nor a folder of that name, or no policy in it.
    """
    from functools import partial

    from mmrl.agents.export import DEFAULT, load_policy
    from mmrl.plan import rule_player
    from mmrl.rules import rule_names

    policy = policy or DEFAULT
    if policy in rule_names():
        return rule_player(policy)
    if policy != DEFAULT and not Path(policy).exists():
        raise unknown("rule or folder", policy, rule_names())
    from mmrl.agents.runner import play

    return partial(play, load_policy(policy))


def _print(question: "Question", answers: "list[Answer]") -> None:
    from mmrl.plan.page import headline

    console = Console(highlight=False)
    lead, *more = headline(question, answers)
    console.print(f"[bold]{escape(lead)}[/]")
    for sentence in more:
        console.print(escape(sentence))
    console.print()
    console.print(_sites(question, answers))
    if answers[0].curves:
        site = escape(answers[0].site.label)
        console.print(f"\n[bold]{site}: requests/s of which 90 % meet their targets[/]")
        console.print(_models(question, answers[0]))


def _sites(question: "Question", answers: "list[Answer]") -> Table:
    from mmrl.plan.page import at_wanted, carried, rate

    table = Table(box=None, pad_edge=False)
    table.add_column("site", overflow="fold")
    table.add_column("memory", no_wrap=True)
    table.add_column("policy", overflow="fold")
    for heading in ("requests/s", "goodput %"):
        table.add_column(heading, justify="right", no_wrap=True)
    if question.total_per_s is not None:
        table.add_row("wanted", "", "", rate(question.total_per_s), "")
    for answer in answers:
        label, verdict = escape(answer.site.label), answer.fit.verdict
        if not answer.curves:
            table.add_row(label, f"[red]{verdict}[/]")
        for curve in answer.curves:
            wanted = at_wanted(question, curve)
            goodput = "–" if wanted is None else f"{100 * wanted[0]:.1f}"
            table.add_row(label, verdict, curve.policy, carried(curve.capacity), goodput)
            label = verdict = ""
    return table


def _models(question: "Question", answer: "Answer") -> Table:
    """Tabulate the rates of each model at a site."""
    from mmrl.plan.page import carried, rate

    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    columns = [list(map(carried, c.model_capacity(question.shares))) for c in answer.curves]
    headings = [curve.policy for curve in answer.curves]
    if question.rates_per_s is not None:
        columns.insert(0, list(map(rate, question.rates_per_s)))
        headings.insert(0, "wanted")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for row in zip(question.names, *columns, strict=True):
        table.add_row(*row)
    return table

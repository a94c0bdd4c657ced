"""`python -m slidesparse.bake [--config FILE] [--profile NAME] ...` is `slidesparse [...] bake ...`."""

from __future__ import annotations

import click

from slidesparse.cli import main

FIRST = ("--config", "--profile", "--data", "--json", "--quiet")
"""Options that the command line takes before the command's name."""


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.option("--config")
@click.option("--profile")
@click.option("--data")
@click.option("--json", is_flag=True)
@click.option("--quiet", is_flag=True)
@click.argument("rest", nargs=-1, type=click.UNPROCESSED)
def bake(rest: tuple[str, ...], **first: str | bool | None) -> None:
    before = [word for name in FIRST for word in _words(name, first[name.removeprefix("--")])]
    main([*before, "bake", *rest])


def _words(name: str, value: str | bool | None) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (name,) if value else ()
    return () if value is None else (name, value)


if __name__ == "__main__":
    bake()

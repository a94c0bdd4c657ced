"""The command `slidesparse`: parses, calls one stage, prints. No logic."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from slidesparse import __version__
from slidesparse.errors import ContextLost, SlideSparseError

REFERENCE = "bitnet-2b"
"""The profile of a GPU host."""


@dataclass(frozen=True)
class Options:
    """Options that every command shares."""

    config: Path
    profile: str
    data: Path
    source: str | None
    types: tuple[str, ...] | None
    as_json: bool
    quiet: bool

    def plan(self, auto: str | None = None) -> Any:
        """Read and check the bench file; nothing starts before it is right. auto: what profile `auto` stands for."""
        from slidesparse.bench_file import load_bench
        from slidesparse.plan import Plan

        bench = load_bench(self.config)
        name = self.profile
        if name == "auto" and auto is not None:
            name = auto
        if name == "auto":
            from slidesparse.machine import detect

            name = "smoke" if detect().gpu is None else REFERENCE
        profile = bench.profile(name)
        if self.source is not None:
            profile = profile.model_copy(update={"source": self.source})
        if self.types is not None:
            profile = profile.only(self.types)
        return Plan(bench.model_copy(update={"profiles": bench.profiles | {name: profile}}), name, self.data)


class _Names(click.ParamType[tuple[str, ...]]):
    """`INT8,FP8E4M3` -> ("INT8", "FP8E4M3")."""

    name = "LIST"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        return tuple(name.strip() for name in value.split(","))


class _Command(click.Group):
    """Turns our errors into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        from slidesparse.runner import EXIT_INTERRUPTED

        try:
            return super().invoke(context)
        except SlideSparseError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; finished cells are kept, the same command resumes", err=True)
            # CPython remembers an interrupt that came while it ran a string (imports and dataclasses do), and ends by
            # that signal in place of the exit code, though the interrupt was caught. Running another makes it forget.
            exec("")
            sys.exit(EXIT_INTERRUPTED)


@click.group(cls=_Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--config", type=click.Path(path_type=Path), default=Path("bench.yaml"), show_default=True)
@click.option("--profile", default="auto", show_default=True, help="auto: smoke without a GPU, bitnet-2b with one")
@click.option("--data", type=click.Path(path_type=Path), default=Path(), help="where models and reports are kept")
@click.option("--source", type=click.Choice(["hub", "local", "synthetic"]), help="override the profile's model source")
@click.option("--types", type=_Names(), help="only these types of the profile, e.g. INT8 or INT8,BF16")
@click.option("--json", "as_json", is_flag=True, help="print results as JSON")
@click.option("--quiet", is_flag=True, help="no progress bars")
@click.pass_context
def main(
    context: click.Context,
    config: Path,
    profile: str,
    data: Path,
    source: str | None,
    types: tuple[str, ...] | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """What does Z:L weight sparsity buy on this machine, for this model?"""
    context.obj = Options(config, profile, data, source, types, as_json, quiet or as_json)


def _stage_command(stage: str, description: str) -> Callable[..., None]:
    @main.command(stage, help=description)
    @click.pass_obj
    def command(options: Options) -> None:
        _run(options, lambda plan: plan.stage_tasks(stage), with_report=False)

    return command


for _stage, _description in {
    "prepare": "Task 1: get the model, quantise it to INT8 and FP8.",
    "convert": "Task 2: prune to Z:L by original magnitude, prove that lifting loses nothing.",
    "tune": "Task 3: measure every candidate algorithm, store the winners.",
    "prefill": "Task 4: prefill throughput.",
    "decode": "Task 5: decode throughput.",
    "kernel": "Tasks 6 to 8: GEMM latency, dense and sparse, each point checked.",
    "linear": "Task 9: whole linear layers against the best dense one and the reference pipeline.",
    "calibrate": "Task 10: what this GPU can really do: copy bandwidth, tensor-core rates.",
}.items():
    _stage_command(_stage, _description)


@main.command("throughput")
@click.pass_obj
def throughput(options: Options) -> None:
    """Tasks 4 and 5 together: every variant's engine is started once for both."""
    _run(options, lambda plan: plan.stage_tasks("prefill") + plan.stage_tasks("decode"), with_report=False)


@main.command("all")
@click.pass_obj
def all_(options: Options) -> None:
    """All tasks, then the report."""
    _run(options, lambda plan: plan.tasks, with_report=True)


@main.command()
@click.option(
    "--other", "others", multiple=True, type=click.Path(path_type=Path), help="another machine's result folder"
)
@click.pass_obj
def report(options: Options, others: tuple[Path, ...]) -> None:
    """Render report.md again, from records alone."""
    from slidesparse.report.render import render_report
    from slidesparse.runner import result_tree

    tree = result_tree(options.plan())
    if not tree.root.is_dir():
        raise SlideSparseError(f"{tree.root}: no records there yet; run `slidesparse all` or a stage first")
    path = render_report(tree, others)
    click.echo(json.dumps({"report": str(path)}) if options.as_json else f"report: {path}")


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.pass_obj
def merge(options: Options, folders: tuple[Path, ...]) -> None:
    """Take in the records of other result folders (reports/TAG) of this machine's tag, then the report.

    For tasks that ran apart, a type on each GPU (--types). Run again, it changes nothing.
    """
    from slidesparse.merge import merge as merge_folders
    from slidesparse.report.render import render_report

    plan = options.plan()
    tree = merge_folders(plan, folders)
    state = _show(options, plan, render_report(tree, ()))
    sys.exit(1 if any(task["status"] == "failed" for task in state["tasks"]) else 0)


@main.command()
@click.option("--cells", is_flag=True, help="list every cell")
@click.pass_obj
def plan(options: Options, cells: bool) -> None:
    """Dry run: every cell, what is done, time and disk expected."""
    from slidesparse.overview import plan_overview, print_plan

    overview = plan_overview(options.plan())
    if options.as_json:
        click.echo(json.dumps(overview, indent=1))
    else:
        print_plan(overview, cells)


@main.command()
@click.pass_obj
def status(options: Options) -> None:
    """What became of each task. Exit code 0 only if nothing failed."""
    from slidesparse.overview import print_status, read_status

    state = read_status(options.plan())
    if options.as_json:
        click.echo(json.dumps(state, indent=1))
    else:
        print_status(state)
    sys.exit(1 if any(task["status"] == "failed" for task in state["tasks"]) else 0)


@main.command()
@click.option("--require-baked", is_flag=True, help="only this: no launch of the profile compiles a Triton kernel")
@click.pass_obj
def doctor(options: Options, require_baked: bool) -> None:
    """What this machine can and cannot run, and why."""
    from slidesparse.doctor import diagnose, exit_code
    from slidesparse.machine import detect
    from slidesparse.overview import print_findings

    if require_baked:
        from slidesparse.bake.check import check_baked

        findings = check_baked(options.plan(auto=REFERENCE), detect())
    else:
        findings = diagnose(options.plan(), detect())
    if options.as_json:
        click.echo(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        print_findings(findings, as_lines=require_baked)
    sys.exit(exit_code(findings))


class _Architectures(click.ParamType[tuple[int, ...]]):
    """`90,120` -> (90, 120); the letter of `90a` means nothing to Triton."""

    name = "LIST"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        from slidesparse.kernels.build import ARCHITECTURES

        known = [name.rstrip("a") for name in ARCHITECTURES]
        names = known if value == "all" else [name.strip().rstrip("a") for name in value.replace(" ", ",").split(",")]
        names = [name for name in names if name]
        if not names or (unknown := sorted(set(names) - set(known))):
            what = unknown[0] if names else value
            self.fail(f"{what!r}: no architecture; allowed are all, {', '.join(known)}", parameter, context)
        return tuple(int(name) for name in names)


@main.command()
@click.option("--architectures", type=_Architectures(), default="all", show_default=True, help="GPUs: 80,86,90,...")
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="folder that the kernels go into")
@click.option("--jobs", type=click.IntRange(min=1), help="processes; default: one a core")
@click.option("--triton-package", type=click.Path(path_type=Path), help="Triton of another CPU to bake for, unpacked")
@click.pass_obj
def bake(
    options: Options, architectures: tuple[int, ...], cache: Path, jobs: int | None, triton_package: Path | None
) -> None:
    """Compile every Triton kernel that the profile launches (auto: bitnet-2b), without a GPU. Run again to resume."""
    from slidesparse.bake import require_triton

    require_triton()
    from slidesparse.bake.warm import bake as warm

    cores = len(os.sched_getaffinity(0))
    baked = warm(options.plan(auto=REFERENCE), architectures, cache, jobs or cores, options.quiet, triton_package)
    click.echo(json.dumps(vars(baked)) if options.as_json else f"baked {baked}")


def _run(options: Options, choose: Callable[[Any], Any], with_report: bool) -> None:
    from slidesparse.runner import open_run, run_tasks

    plan, path = options.plan(), None
    try:
        with open_run(plan, options.quiet) as run:
            code = run_tasks(run, choose(plan))
            if with_report:
                from slidesparse.report.render import render_report

                path = render_report(run.tree, ())
    except ContextLost as error:
        # Each loss bars one more algorithm, so this ends; cells that are done are not measured again.
        click.echo(f"warning: {error}; going on in a new process", err=True)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "slidesparse", *sys.argv[1:]])
    _show(options, plan, path)
    sys.exit(code)


def _show(options: Options, plan: Any, report: Path | None) -> dict[str, Any]:
    """Print the status, which is returned, and where the report lies."""
    from slidesparse.overview import print_status, read_status

    state = read_status(plan)
    if options.as_json:
        click.echo(json.dumps(state, indent=1))
    else:
        print_status(state)
        if report is not None:
            click.echo(f"report: {report}")
    return state

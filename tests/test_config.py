"""A wrong bench file is refused before anything starts: one line with file, line, key and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from slidesparse.bench_file import load_bench
from slidesparse.dtypes import DType
from slidesparse.errors import ConfigError
from slidesparse.pattern import Sparsity
from slidesparse.plan import SQUARE, KernelCell, LinearCell, Plan, ThroughputCell, TuneCell

ROOT = Path(__file__).parent.parent
BENCH = (ROOT / "bench.yaml").read_text(encoding="utf-8")


def refusals(tmp_path: Path, old: str, new: str) -> tuple[list[str], int]:
    """The error lines of bench.yaml with its first `old` replaced, and the line where `old` stood."""
    assert old in BENCH
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_bench(path)
    assert caught.value.exit_code == 2
    lines = str(caught.value).replace(str(path), "bench.yaml").splitlines()
    return lines, BENCH[: BENCH.index(old)].count("\n") + 1


def refusal(tmp_path: Path, old: str, new: str) -> tuple[str, int]:
    """As `refusals`, where one fault is to give one line."""
    lines, line = refusals(tmp_path, old, new)
    assert len(lines) == 1, lines
    return lines[0], line


@pytest.mark.parametrize(
    ("old", "new", "key", "allowed"),
    [
        # unknown keys, at every depth
        ("version: 1", "colour: red\nversion: 1", "colour", "unknown key; .*: models, paths, profiles, version"),
        ("  reports: reports", "  repots: reports", "paths.repots", "checkpoints, converted, reports, source"),
        ("hub: {repo:", "hub: {branch: x, repo:", "models.BitNet-2B.hub.branch", "allowed here: repo, revision"),
        ("    engine: transf", "    port: 1\n    engine: transf", "profiles.smoke.port", "allowed here: .*engine"),
        # patterns
        ("end_to_end: [2:4,", "end_to_end: [3:8,", "profiles.smoke.sparsity.end_to_end.0", r"Z must be 2 .*2:4, 2:6"),
        ("kernel_high: [2:4,", "kernel_high: [2:7,", "profiles.smoke.sparsity.kernel_high.0", "L must be even"),
        ("[2:12, 2:14,", "[2:12, 2:18,", "profiles.smoke.sparsity.kernel_low.1", "L must be even, 4 to 16"),
        ("[2:12, 2:14,", "[2:12, half,", "profiles.smoke.sparsity.kernel_low.1", "write Z:L, for example 2:8"),
        # impossible sizes
        (
            "    linear:\n      m: [16, 64]", "    step_profiles: {decode_m: [9]}\n    linear:\n      m: [16, 64]",
            "profiles.smoke.step_profiles.decode_m", "9 is not in decode.m",
        ),
        ("m: [16, 64, 128]", "m: [16, 64, 100]", "profiles.smoke.prefill.m", "100 is impossible.*multiple of it"),
        ("m: [16, 64, 128]", "m: [16, 0, 128]", "profiles.smoke.prefill.m.1", r"greater than 0 \(got 0\)"),
        ("m: [2, 8]", "m: [2, -8]", "profiles.smoke.decode.m.1", r"greater than 0 \(got -8\)"),
        ("output_len: 8", "output_len: 500", "profiles.smoke.decode.output_len", "516 tokens, but .* 512 positions"),
        ("output_len: 8", "output_len: 1", "profiles.smoke.decode.output_len", "greater than or equal to 2"),
        # names that must exist
        ("models: [BitNet-tiny]", "models: [BitNet-9B]", "profiles.smoke.models", "'BitNet-9B'.*: .*BitNet-2B"),
        ("dtypes: [INT8, FP8E4M3]", "dtypes: [INT4]", "profiles.smoke.dtypes.0", "'INT8' or 'FP8E4M3'"),
        ("dense: [cpu_dense]", "dense: [cudnn]", "profiles.smoke.backends.dense.0", "'cpu_dense'.*'cublaslt'"),
        ("engine: transformers", "engine: tgi", "profiles.smoke.engine", "'transformers' or 'vllm'"),
        ("source: synthetic", "source: ftp", "profiles.smoke.source", "'hub', 'local' or 'synthetic'"),
        # types
        ("version: 1", "version: 2", "version", r"Input should be 1 \(got 2\)"),
        ("coarse_m: [16, 64]", "coarse_m: sixteen", "profiles.smoke.tune.coarse_m", "valid tuple"),
        ("coarse_m: [16, 64]", "coarse_m: [16, many]", "profiles.smoke.tune.coarse_m.1", r"integer.*\(got 'many'\)"),
        ("      prompt_cap: 64", "      prompt_cap: 6.5", "profiles.smoke.prefill.prompt_cap", r"integer.*\(got 6.5\)"),
        ("steps: 4", "steps: ", "profiles.smoke.prefill.steps", "integer"),
    ],
)  # fmt: skip
def test_a_fault_is_located(tmp_path: Path, old: str, new: str, key: str, allowed: str) -> None:
    message, line = refusal(tmp_path, old, new)
    assert message.startswith(f"bench.yaml:{line}: {key}: "), message
    assert re.search(allowed, message), message


def test_a_misspelt_key_is_unknown_and_the_right_one_missing(tmp_path: Path) -> None:
    lines, line = refusals(tmp_path, "coarse_m: [16, 64]", "coarse: [16, 64]")
    assert lines == [
        f"bench.yaml:{line - 1}: profiles.smoke.tune.coarse_m: this key is missing",
        f"bench.yaml:{line}: profiles.smoke.tune.coarse: unknown key; allowed here: coarse_m, fine_m, stopping",
    ]


def test_a_missing_key_names_the_section_that_lacks_it(tmp_path: Path) -> None:
    message, line = refusal(tmp_path, "    engine: transformers\n", "")
    assert re.fullmatch(r"bench.yaml:\d+: profiles.smoke.engine: this key is missing", message)
    assert int(message.split(":")[1]) < line


def test_stopping_rule_that_cannot_be_met(tmp_path: Path) -> None:
    message, _ = refusal(tmp_path, "min_samples: 5, max_samples: 30", "min_samples: 50, max_samples: 30")
    assert "profiles.smoke.tune.stopping.max_samples: max_samples 30 is below min_samples 50" in message


def test_a_pattern_named_twice(tmp_path: Path) -> None:
    message, line = refusal(tmp_path, "end_to_end: [2:4,", "end_to_end: [2:6,")
    assert message == f"bench.yaml:{line}: profiles.smoke.sparsity.end_to_end: end_to_end names a pattern twice"


def test_model_without_a_size(tmp_path: Path) -> None:
    message, _ = refusal(tmp_path, "      hidden_size: 160\n", "")
    assert "models.BitNet-tiny: config.hidden_size is missing" in message


def test_model_name_that_cannot_name_files(tmp_path: Path) -> None:
    message, _ = refusal(tmp_path, "  BitNet-tiny:", "  Bit/tiny:")
    assert "model name 'Bit/tiny': letters, digits, dots and dashes only" in message


def test_every_fault_gets_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH.replace("output_len: 8", "output_len: x").replace("[2:12, 2:14,", "[2:13, 2:14,"))
    with pytest.raises(ConfigError) as caught:
        load_bench(path)
    lines = str(caught.value).splitlines()
    # 2:13 stands in two profiles, and in those that take it over from `bitnet-2b`
    given = load_bench(ROOT / "bench.yaml").profiles.values()
    heirs = [profile for profile in given if Sparsity.parse("2:12") in profile.sparsity.kernel_low]
    assert len([line for line in lines if "kernel_low.0" in line]) == len(heirs) > 2
    assert len([line for line in lines if "profiles.smoke.decode.output_len" in line]) == 1
    assert all(re.match(rf"{re.escape(str(path))}:\d+: \S+: ", line) for line in lines)


def test_duplicate_key(tmp_path: Path) -> None:
    message, line = refusal(tmp_path, "    engine: transformers", "    engine: transformers\n    engine: vllm")
    assert message == f"bench.yaml:{line + 1}: key 'engine' stands twice in one mapping; keep one"


def test_text_that_is_not_yaml(tmp_path: Path) -> None:
    message, line = refusal(tmp_path, "end_to_end: [2:4, 2:6, 2:8, 2:10]", "end_to_end: [2:4, 2:6")
    assert re.match(r"bench.yaml:\d+: not YAML: ", message)
    assert int(message.split(":")[1]) in (line, line + 1)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_text_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"b.yaml:1: expected a mapping with the keys version, models, profiles"):
        load_bench(path)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; give a bench file with --config"):
        load_bench(tmp_path / "nowhere.yaml")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    path.write_bytes(b"\xff\xfe\x00version")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_bench(path)


@pytest.mark.parametrize("text", ["version: 1\nmodels: *nobody\n", "version: 1\x07\n", "a: [\n"])
def test_odd_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_bench(path)
    assert re.fullmatch(rf"{re.escape(str(path))}:\d+: not YAML: [^\n]+", str(caught.value))


def test_unknown_profile_lists_those_that_exist() -> None:
    bench = load_bench(ROOT / "bench.yaml")
    with pytest.raises(ConfigError) as caught:
        bench.profile("fast")
    assert str(caught.value) == f"unknown profile 'fast'; bench.yaml has: {', '.join(bench.profiles)}"


# -- what is accepted --------------------------------------------------------------------------------


def test_an_unquoted_pattern_is_a_pattern(tmp_path: Path) -> None:
    """YAML 1.1 reads 2:10 as the base-60 number 130; 2:8 quoted, with a space or as 2_8 means the same."""
    assert yaml.safe_load("2:10") == 130
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH.replace("end_to_end: [2:4, 2:6, 2:8, 2:10]", 'end_to_end: [2:10, "2:8", 2_6, 2:inf]', 1))
    patterns = load_bench(path).profiles["smoke"].sparsity.end_to_end
    assert patterns == (Sparsity(10), Sparsity(8), Sparsity(6), Sparsity(None))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.0e-5", 1e-5), ("1e-5", 1e-5), ("5", 5), ("5.0", 5.0), (".5", 0.5), ("-3", -3), ("1:30", "1:30")],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH.replace("rms_norm_eps: 1.0e-5", f"rms_norm_eps: {text}", 1))
    got = load_bench(path).models["BitNet-tiny"].config["rms_norm_eps"]
    assert got == value
    assert type(got) is type(value)


def test_the_reference_run_to_the_letter() -> None:
    """Cells of the eight tasks as the published run counted them: 2 + 8, 70, 40, then 36 points a type and pattern.

    Stock vLLM is measured beside them, at 7 and 4 M in both types. Ours follow: 4 M for each type and
    pattern; the copy and 4 rates of each of 4 types.
    """
    plan = Plan(load_bench(ROOT / "bench.yaml"), "bitnet-2b", Path())
    counts = {task.name: len(task.cells) for task in plan.tasks}
    del counts["tune"]
    assert counts == {
        "prepare": 2, "convert": 8, "prefill": 70 + 14, "decode": 40 + 8,
        "kernel_dense": 2 * 36, "kernel_high": 2 * 4 * 36, "kernel_low": 2 * 4 * 36,
        "linear": 2 * 8 * 4, "calibrate": 1 + 4 * 4,
    }  # fmt: skip
    assert plan.profile.dtypes == (DType.INT8, DType.FP8)
    assert plan.profile.tune.coarse_m == (256, 1024, 4096, 16384, 32768)
    assert plan.profile.tune.fine_m == (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    shapes = plan.bench.models["BitNet-2B"].linear_shapes()
    assert shapes == {"qkv": (3840, 2560), "o": (2560, 2560), "gate_up": (13824, 2560), "down": (2560, 6912)}


@pytest.mark.parametrize(("kept", "engine"), [(True, "fused"), (False, "cusparselt")])
def test_tasks_4_and_5_may_have_a_sparse_side_of_their_own(tmp_path: Path, kept: bool, engine: str) -> None:
    """Else it is that of the kernel tasks. Both are tuned; the kernel tasks keep theirs."""
    own = ", dense_end_to_end: [], sparse_end_to_end: [fused]}"
    assert own in BENCH
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH if kept else BENCH.replace(own, "}"))
    plan = Plan(load_bench(path), "bitnet-2b", Path())
    measured = (TuneCell, ThroughputCell, KernelCell, LinearCell)
    names = {
        task.name: {cell.variant.backend for cell in task.cells if isinstance(cell, measured) and cell.variant.sparsity}
        for task in plan.tasks
    }
    assert names["prefill"] == names["decode"] == {engine}
    assert names["kernel_high"] == names["kernel_low"] == names["linear"] == {"cusparselt"}
    assert names["tune"] == {engine, "cusparselt"}


def test_tasks_4_and_5_have_the_dense_side_of_the_kernel_tasks_unless_told_otherwise(tmp_path: Path) -> None:
    """The profile as published has cuBLASLt end to end; where `auto` stands for the dense side, nothing beside it."""
    bench = load_bench(ROOT / "bench.yaml")
    assert bench.profile("bitnet-2b").backends.engine_dense == ("vllm", "auto")
    assert bench.profile("bitnet-2b-cusparselt").backends.engine_dense == ("vllm", "auto", "cublaslt")
    lines, line = refusals(tmp_path, "end_to_end: [vllm, auto], dense_end_to_end: []", "dense_end_to_end: []")
    assert lines[0].startswith(f"bench.yaml:{line - 1}: profiles.bitnet-2b.backends: ")  # its key is a line above
    assert all("no dense variant of ours to compare with" in message for message in lines)


def test_paper_has_five_models_and_the_cells_of_the_reference() -> None:
    bench = load_bench(ROOT / "bench.yaml")
    paper, reference = bench.profile("paper"), bench.profile("bitnet-2b")
    assert paper.models == ("BitNet-2B", "Llama3.2-1B", "Llama3.2-3B", "Qwen2.5-7B", "Qwen2.5-14B")
    assert (paper.prefill, paper.decode, paper.kernel) == (reference.prefill, reference.decode, reference.kernel)


def test_kernels_adds_types_and_square_shapes_to_the_kernel_tasks_alone() -> None:
    """Layers: 36 points in each of 4 types. Squares: 5 sizes in each of them, M = N = K. The rest is as there."""
    bench = load_bench(ROOT / "bench.yaml")
    wide, reference = Plan(bench, "kernels", Path()), Plan(bench, "bitnet-2b", Path())
    counts = {task.name: len(task.cells) for task in wide.tasks}
    assert counts["kernel_dense"] == 4 * (36 + 5)
    assert counts["kernel_high"] == counts["kernel_low"] == 4 * 4 * (36 + 5)
    kernel = {"kernel_dense", "kernel_high", "kernel_low"}
    assert [t for t in wide.tasks if t.name not in kernel] == [t for t in reference.tasks if t.name not in kernel]
    cells = [cell for task in wide.tasks if task.name in kernel for cell in task.cells if isinstance(cell, KernelCell)]
    square = [cell for cell in cells if cell.model == SQUARE]
    assert {(cell.m, cell.n, cell.k) for cell in square} == {(size,) * 3 for size in (1024, 2048, 4096, 8192, 16384)}
    assert {cell.dtype for cell in square} == set(DType)


def test_tasks_of_our_own_follow_the_profile() -> None:
    """Without a GPU backend there is nothing to calibrate; without the key `linear` there is no task 9."""
    bench = load_bench(ROOT / "bench.yaml")
    assert [task.number for task in Plan(bench, "smoke", Path()).tasks] == list(range(1, 10))
    assert [task.number for task in Plan(bench, "bitnet-2b", Path()).tasks] == list(range(1, 11))
    without = bench.profile("bitnet-2b").model_copy(update={"linear": None})
    plan = Plan(bench.model_copy(update={"profiles": {"p": without}}), "p", Path())
    assert [task.name for task in plan.tasks[8:]] == ["calibrate"]


def test_models_come_in_8_bit_types_only(tmp_path: Path) -> None:
    message, line = refusal(tmp_path, "dtypes: [INT8, FP8E4M3]", "dtypes: [BF16]")
    assert message.startswith(f"bench.yaml:{line}: profiles.smoke.dtypes.0: ")
    assert "'INT8' or 'FP8E4M3'" in message


# -- a part of a profile's types ---------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["smoke", "kernels"])
def test_parts_of_a_profile_have_its_cells_each_once(profile: str) -> None:
    bench = load_bench(ROOT / "bench.yaml")
    whole = Plan(bench, profile, ROOT)
    first, second = whole.profile.types[::2], whole.profile.types[1::2]
    parts = [
        Plan(bench.model_copy(update={"profiles": {profile: whole.profile.only(types)}}), profile, ROOT)
        for types in (first, second)
    ]
    for task, *apart in zip(whole.tasks, *(part.tasks for part in parts), strict=True):
        cells = [cell for part in apart for cell in part.cells]
        if task.stage == "calibrate":  # of the machine, not of a type: both parts measure it
            assert all(part.cells == task.cells for part in apart)
        else:
            assert len(cells) == len(task.cells)
            assert set(cells) == set(task.cells)


def test_types_keep_the_order_of_the_profile_and_16_bit_ones_are_named() -> None:
    kernels = load_bench(ROOT / "bench.yaml").profile("kernels")
    assert kernels.only(["BF16", "FP8E4M3", "INT8"]).types == (DType.INT8, DType.FP8, DType.BF16)
    assert kernels.only(["INT8"]).types == (DType.INT8,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["INT4"], "--types: 'INT4' is no type of this profile; it has INT8, FP8E4M3"),
        (["INT8", "BF16"], "--types: 'BF16' is no type of this profile; it has INT8, FP8E4M3"),
        ([""], "--types: '' is no type of this profile; it has INT8, FP8E4M3"),
    ],
)
def test_a_type_that_the_profile_lacks_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_bench(ROOT / "bench.yaml").profile("smoke").only(names)
    assert str(caught.value) == message


def test_16_bit_types_alone_are_no_part_of_a_profile() -> None:
    with pytest.raises(ConfigError, match="name at least one 8-bit type of this profile: INT8, FP8E4M3"):
        load_bench(ROOT / "bench.yaml").profile("kernels").only(["BF16"])

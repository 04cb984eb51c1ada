"""The training benchmark: narrow models through all of it, on a CPU; the page says what the rows say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")
from benchmarks import documents, recommendation
from benchmarks.training import kernel_times, page, plots, several_page, single, tables_page, tasks
from benchmarks.training.__main__ import main
from benchmarks.training.distributed import DENSE
from roastify.conversion.converted import pool_of

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    """Run a module from the repository's root, as its user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and on a busy machine wait for it most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_page(rows: Path, document: Path) -> str:
    done = CliRunner().invoke(page.main, ["--rows", str(rows), "--document", str(document)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return document.read_text()


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.long
def test_rows_of_one_device_and_their_page(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    settings = ("--smoke", "--steps", "5", "--device", "cpu", "--output", str(output))
    run("benchmarks.training", *settings, "--only", "(deep|resnet).*eager")
    rows = rows_of(output)
    assert set(rows) == {"deep-stack/eager/ratio=4", "resnet-50/eager/ratio=4"}
    for row in rows.values():
        held = {side: row[side]["memory"] for side in ("dense", "converted")}
        assert held["dense"]["parameters"] == 4 * row["parameters"]["dense"]
        # A float32 gradient, two moments and a step count for each tensor.
        assert held["converted"]["gradients"] == held["converted"]["parameters"] == 4 * row["parameters"]["converted"]
        assert 2 * held["dense"]["parameters"] <= held["dense"]["optimizer"] < 2.1 * held["dense"]["parameters"]
        assert row["state_ratio"] >= row["state_aim"] == 0.95 * 4
        assert row["dense"]["steps"] == row["converted"]["steps"] == 5
        assert row["loss_error"] < 1e-2 and row["machine"]["torch"]
    # An aim is a mode's: the deep stack has one of 1.0 for graphs.
    assert [row["time_aim"] for row in rows.values()] == [1.15, None]
    # A run of one case leaves the others' rows.
    rows["resnet-50/eager/ratio=4"]["step_ratio"] = 123.0
    output.write_text(json.dumps({"rows": list(rows.values())}))
    again = CliRunner().invoke(main, [*settings, "--only", "deep.*eager"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert rows_of(output)["resnet-50/eager/ratio=4"]["step_ratio"] == 123.0
    text = write_page(output, tmp_path / "page.md")
    assert "123.00 (resnet-50, ratio 4); 0 of 2 faster than dense" in text or "1 of 2 faster than dense" in text
    assert "Memory of a step" not in text
    tables = (tmp_path / page.TABLES).read_text()
    assert "| 123.000 |" in tables and "≥ 3.8 met" in tables
    assert "≤ 1.15" in tables
    # Memory is not measured on a CPU, so there is no plot of it.
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["training-time.svg"]


@pytest.mark.long
def test_rows_of_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    settings = ("--smoke", "--steps", "5", "--device", "cpu", "--output", str(output), "--only", "llama")
    started = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    run(*started, "benchmarks.training", "--distributed", *settings)
    rows = rows_of(output)
    sides = ("dense", "ratio=4")
    # Only a GPU has graphs.
    places = ("alone/eager/gpus=1", "ddp/eager/gpus=2", "fsdp/eager/gpus=2")
    assert set(rows) == {f"distributed/llama-1.1b/{place}/{side}" for place in places for side in sides}
    for case, row in rows.items():
        assert "failure" not in row, row
        if "alone" not in case:
            assert row["loss_error"] <= row["loss_tolerance"] and row["losses"][-1] < row["losses"][0] - 1e-3
            assert row["efficiency"] > 0
    dense, converted = (rows[f"distributed/llama-1.1b/ddp/eager/gpus=2/{side}"]["bytes"] for side in sides)
    assert dense["all-reduce"] >= 3.8 * converted["all-reduce"]
    dense, converted = (rows[f"distributed/llama-1.1b/fsdp/eager/gpus=2/{side}"] for side in sides)
    assert dense["bytes"]["reduce-scatter"] >= 3.8 * converted["bytes"]["reduce-scatter"]
    assert converted["calls"] == {"all-gather": 1, "reduce-scatter": 1}
    measured = several_page.training_rows(rows.values())
    assert "The aim, efficiency at least dense's, is met in" in several_page.markdown(measured, [])
    drawn = several_page.save({several_page.PLOT: lambda: several_page.scaling(measured)}, tmp_path)
    assert len(drawn) == 1 and list(tmp_path.glob(f"{several_page.PLOT}.*"))


@pytest.mark.long
def test_a_pattern_that_matches_no_case_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--smoke", "--device", "cpu", "--output", str(tmp_path / "rows.json")]
    done = CliRunner().invoke(main, [*settings, "--only", "nothing"])
    assert done.exit_code == 2 and "the cases are bert-base/eager/ratio=4" in done.output
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    done = CliRunner().invoke(main, [*settings, "--distributed"])
    assert done.exit_code == 2 and "torchrun --standalone" in done.output
    done = CliRunner().invoke(main, ["--smoke"])
    assert done.exit_code == 2 and "name another file" in done.output


def test_pages_are_the_committed_results() -> None:
    rows = page.load(page.RESULTS)["rows"]
    assert page.markdown(rows, page.load(kernel_times.RESULTS)["rows"]) == page.DOCUMENT.read_text()
    assert tables_page.markdown(rows) == (page.DOCUMENT.parent / page.TABLES).read_text()


def test_the_page_says_how_steps_run_and_which_aims_are_missed() -> None:
    def row(task: str, mode: str, value: float, fold: int, ratio: int = 10) -> dict[str, Any]:
        held = dict.fromkeys(("parameters", "buffers", "gradients", "optimizer", "activations", "rest"), 1)
        sides = {name: {"memory": held | {"peak": peak}} for name, peak in (("dense", 10), ("converted", 6))}
        times = {"median_ms": 1.0, "q1_ms": 1.0, "q3_ms": 1.0}
        sides = {name: side | times for name, side in sides.items()}
        made = {"gpu": "a GPU", "date": "2026-12-01"}
        case = {"task": task, "mode": mode, "ratio": ratio, "shape": "", "step_ratio": value, "time_aim": 0.9}
        case["fold"] = fold
        return {**case, **sides, "machine": made, "state_ratio": 10.0, "state_aim": 9.5}

    rows = [row("a", "graphed", 0.5, 8), row("a", "eager", 1.5, 8)]
    rows += [row("a, no folds", "eager", 1.2, 1), row("b", "graphed", 0.95, 1)]
    text = " ".join(page.markdown(rows, []).split())
    assert "- As a CUDA graph: 0.50 (a, ratio 10); 1 of 1 faster than dense." in text
    assert "- As a CUDA graph, no layer folded: 0.95 (b, ratio 10); 1 of 1 faster than dense." in text
    assert '`fold = "none"` (a at ratio 10: 1.20 instead of 1.50).' in text
    assert "1 of 4 are met; missed: a at ratio 10, eager, 1.500 of 0.9; a, no folds at ratio 10" in text
    assert "Ratio 10: 60 % of the dense model's peak (a)." in text
    # A variant of a model is not drawn beside it.
    assert [each["task"] for each in plots.with_memory(rows)] == ["a", "b"]


def test_the_page_says_where_the_time_goes_and_what_limits_a_step() -> None:
    kinds = [*kernel_times.KINDS, kernel_times.REST]
    dense, converted = (dict(zip(kinds, times, strict=True)) for times in ((0, 1, 6, 1, 2), (0.5, 1, 1, 0.25, 2)))
    row = {"case": "", "task": "gpt2-medium", "ratio": 10, "dense": dense, "converted": converted}
    row |= {"time_aim": 0.7, "machine": {"gpu": "a GPU", "date": "2026-12-01"}}
    failed = {"case": "", "task": "bert-base", "ratio": 10, "failure": "no memory", "machine": row["machine"]}
    text = page.markdown([], [row, failed])
    assert "| gpt2-medium | dense | 0.00 | 1.00 | 6.00 | 1.00 | 2.00 | 10.00 |" in text
    assert "|  | converted | 0.50 | 1.00 | 1.00 | 0.25 | 2.00 | 4.75 |" in text
    assert (
        "- gpt2-medium at ratio 10: attention and the rest 0.30, with products 0.40, all kernels 0.47 (aim 0.70)."
        in text
    )
    assert "- bert-base at ratio 10 failed: no memory" in text
    assert "Where the time goes" not in page.markdown([], [])


# Names as the profiler has them, shortened.
KERNELS = {
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NTN": "products",
    "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_64x128_32x6_tn_align4>(Params)": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)": "products",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, cutlass::bfloat16_t> >()": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel<cutlass::bfloat16_t>)": "attention",
    "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<5> >()": "optimizer",
    "void at::native::vectorized_elementwise_kernel<4, bfloat16_copy_kernel_cuda()>()": "the rest",
    "Memset (Device)": "the rest",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kind_of_a_kernel(kernel: str) -> None:
    assert kernel_times.kind_of(kernel) == KERNELS[kernel]


def test_our_kernels_are_known_by_their_names() -> None:
    paths = (ROOT / "kernels" / "gpu").glob("*.py")
    kernels = [name for path in paths for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]
    assert len(kernels) > 10
    assert {kernel_times.kind_of(name) for name in kernels} == {"pool and folds"}


@pytest.mark.gpu
def test_kernel_times_of_a_captured_step(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    done = CliRunner().invoke(kernel_times.main, ["--smoke", "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (row,) = rows_of(output).values()
    assert row["task"] == "deep-stack" and "failure" not in row
    assert row["dense"]["pool and folds"] == 0 < row["converted"]["pool and folds"]
    for side in ("dense", "converted"):
        assert row[side]["products"] > 0 and row[side]["optimizer"] > 0 and row[side][kernel_times.REST] > 0


def test_kernel_times_need_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(kernel_times.main, ["--output", str(tmp_path / "rows.json")])
    assert done.exit_code == 2 and "torch sees none here" in done.output


def test_the_page_of_several_gpus_is_the_committed_results() -> None:
    text = several_page.DOCUMENT.read_text()
    found = several_page.load(several_page.RESULTS)["rows"], several_page.load(recommendation.RESULTS)["rows"]
    assert documents.insert(text, several_page.BEGIN, several_page.markdown(*found)) == text


def test_the_page_of_several_gpus_compares_sides_of_one_place() -> None:
    def row(kind: str, gpus: int, side: str, ms: float, **more: Any) -> dict[str, Any]:
        times = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms}
        named = {"case": "", "task": "net", "kind": kind, "mode": "graphed", "gpus": gpus, "side": side}
        return {**named, **times, "peak": 2e9, "bytes": {}, "machine": {"cpu": "a CPU", "date": "today"}, **more}

    training = [
        row("ddp", 2, "ratio=10", 5.5, efficiency=0.9, bytes={"all-reduce": 1e6}, loss_error=1e-4),
        row("ddp", 2, DENSE, 12.0, efficiency=0.8, bytes={"all-reduce": 1e7}, loss_error=0.0),
        row("alone", 1, DENSE, 10.0),
        {"case": "distributed/net/fsdp", "failure": "no memory"},
    ]
    model = {"gpus": 2, "batch": 8, "rows": 1000, "width": 4, "fields": 26, "power": 1.5, "ratio": 100}
    tables = [
        {**row("", 2, "", 4.0), **model, "tables": tables, "optimizer": "Adam", "unique": True, "samples_per_s": rate}
        for tables, rate in (("pool", 3e6), ("sharded", 2e6))
    ]
    text = several_page.markdown(training, tables)
    assert "met in 1 of 1 cases" in text and "- `distributed/net/fsdp`: no memory" in text
    assert "| ddp | graphed | 2 | ratio 10 | 5.50 (5.50–5.50) | 0.458 | 0.900 | higher | 1.0 | 10.0 |" in text
    assert text.index("| alone |") < text.index("| 2 | dense |") < text.index("| 2 | ratio 10 |")
    assert "| in a pool | Adam | graphed |  | 4.00 (4.00–4.00) | 3.00 | 1.50 |" in text
    assert several_page.markdown([], []).count("Not measured yet.") == 2


def test_a_tasks_settings_are_those_of_its_conversion() -> None:
    plans = {}
    for name in ("resnet-50", "resnet-50, whole kernels"):
        task = dataclasses.replace(tasks.SMOKE_TASKS["resnet-50"], settings=tasks.TASKS[name].settings)
        task = dataclasses.replace(task, build=lambda: tasks.ResNet((1, 1), 64, 10))
        plans[name] = pool_of(single._converted(task, 4, torch.device("cpu"))).plan
    assert plans["resnet-50"].with_basis and not plans["resnet-50, whole kernels"].with_basis

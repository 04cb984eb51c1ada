"""Two processes on the CPU: DDP and FSDP2 give the weights that one process gets on the joint batch; checkpoints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_cases
import distributed_cases as cases
import parallel_cases
import pytest
import sharded_cases
import torch
from processes import Processes, assert_same
from torch import Tensor

import roastify
from roastify.errors import CheckpointError
from roastify.source import load_source

STEPS = cases.STEPS
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


def moved(values: dict[str, Tensor], name: str = "net") -> bool:
    start = cases.converted(name).state_dict()
    assert torch.equal(values[cases.STATE], start[cases.STATE])
    return all((values[name] - start[name]).abs().max() > 1e-3 for name in start if name != cases.STATE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda settings: next(iter(settings), "plain"),
)
@pytest.mark.parametrize("name", ["net", "convolutions"])
def test_ddp(two: Processes, name: str, settings: dict[str, Any]) -> None:
    for alone, together, (pools, share) in two.run(cases.ddp, settings, name, ((), ()), 1):
        assert_same(together, alone)
        assert moved(together, name)
        # The pool is all-reduced once a step, and only parameters are all-reduced.
        assert pools == STEPS and share == STEPS


def test_ddp_with_accumulation_communicates_once_a_step(two: Processes) -> None:
    for alone, together, (pools, share) in two.run(cases.ddp, {}, "net", ((), ()), 2):
        assert_same(together, alone)
        assert pools == STEPS and share == STEPS


@pytest.mark.parametrize(
    ("name", "settings", "parts"),
    [("checkpointed", {}, 1), ("checkpointed", {}, 2), ("reentrant", {"static_graph": True}, 1)],
    ids=["plain", "accumulating", "reentrant"],
)
def test_ddp_with_checkpointing(two: Processes, name: str, settings: dict[str, Any], parts: int) -> None:
    """Reentrant checkpointing gives the pool a gradient for each segment; DDP accepts that with `static_graph`."""
    for alone, together, (pools, share) in two.run(cases.ddp, settings, name, ((), ()), parts):
        assert_same(together, alone)
        assert moved(together)
        assert pools == STEPS and share == STEPS


def test_ddp_refuses_reentrant_checkpointing_without_static_graph(two: Processes) -> None:
    for message in two.run(cases.ddp_refusal, "reentrant"):
        assert "mark a variable ready only once" in message and "roast_pool.weight" in message, message


def test_a_wrapped_model_is_not_converted(two: Processes) -> None:
    for message in two.run(cases.convert_wrapped):
        assert "is the wrapper DistributedDataParallel; pass the model inside it (its .module)" in message, message


@pytest.mark.parametrize("skips", [((True,), (True,)), ((True,), (False,))], ids=["both", "one"])
@pytest.mark.parametrize("name", ["net", "convolutions", "experts"])
def test_ddp_with_layers_that_a_process_does_not_use(two: Processes, name: str, skips: tuple[Any, ...]) -> None:
    for alone, together, _ in two.run(cases.ddp, {"find_unused_parameters": True}, name, skips, 1):
        assert_same(together, alone)


def test_ddp_in_float16(two: Processes) -> None:
    (alone, together), (_, other) = two.run(cases.ddp_narrow)
    assert_same(together, alone, atol=2e-2)
    assert_same(together, other, atol=0.0)
    assert moved(together)


@pytest.mark.parametrize("settings", [{}, {"reshard_after_forward": True}], ids=["gathered", "resharded"])
@pytest.mark.parametrize("by_block", [False, True], ids=["root", "blocks"])
@pytest.mark.parametrize("name", ["net", "sequential", "convolutions"])
def test_fsdp(two: Processes, name: str, by_block: bool, settings: dict[str, Any]) -> None:
    found = two.run(cases.fsdp, name, by_block, settings)
    # Every process takes part in gathering; only the first process gets the gathered values.
    alone, together, _ = found[0]
    assert_same(together, alone)
    (size,) = (value.numel() for name, value in alone.items() if name.endswith("roast_pool.weight"))
    assert sum(part for *_, part in found) == size and all(0 < part < size for *_, part in found)


@pytest.mark.parametrize("way", ["sync", "last"])
def test_fsdp_with_accumulation(two: Processes, way: str) -> None:
    alone, together, shared_out = two.run(cases.fsdp_accumulating, way)[0]
    assert_same(together, alone)
    assert moved(together)
    # If gradients stay whole, no parameter has its shard of one before the last backward pass of a step.
    parameters = len(alone.keys() - {cases.STATE})
    assert shared_out == [0 if way == "sync" else parameters, parameters] * STEPS


def test_fsdp_in_bfloat16(two: Processes) -> None:
    alone, together, seen, kept = two.run(cases.fsdp_narrow)[0]
    assert seen == {torch.bfloat16} and kept == {torch.float32}
    assert_same(together, alone, atol=5e-2)
    assert moved(together)


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_checkpoints_resume_and_load_into_one_process(two: Processes, tmp_path: Path, wrapped: str) -> None:
    without_break, resumed, expected, found = two.run(cases.resume, str(tmp_path / "checkpoint"), wrapped)[0]
    assert_same(resumed, without_break, atol=0.0)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)


def same_as_without_break(found: tuple[list[float], dict[str, Tensor]]) -> None:
    (losses, weights), (expected, expected_weights) = found, checkpoint_cases.without_break()
    assert losses == pytest.approx(expected[-len(losses) :], abs=1e-6)
    assert_same(weights, expected_weights)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("fsdp", 2), ("fsdp", 1)),
        (("ddp", 1), ("ddp", 2)),
        pytest.param(("ddp", 2), ("ddp", 1), marks=pytest.mark.long),
        pytest.param(("fsdp", 1), ("fsdp", 2), marks=pytest.mark.long),
        pytest.param(("ddp", 2), ("fsdp", 2), marks=pytest.mark.long),
    ],
    ids=lambda side: "-".join(map(str, side)),
)
def test_checkpoints_resume_on_another_number_of_processes(
    two: Processes, tmp_path: Path, saved: tuple[str, int], loaded: tuple[str, int]
) -> None:
    same_as_without_break(two.run(checkpoint_cases.resumed_elsewhere, str(tmp_path / "c"), saved, loaded)[0])


@pytest.mark.long
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_checkpoints_of_two_processes_resume_on_four(tmp_path: Path, wrapped: str) -> None:
    four = Processes(tmp_path, 4)
    found = four.run(checkpoint_cases.resumed_elsewhere, str(tmp_path / "c"), (wrapped, 2), (wrapped, 4))
    four.end()
    same_as_without_break(found[0])


@pytest.mark.long
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_a_run_that_is_killed_while_it_saves_resumes_from_the_save_before(
    two: Processes, tmp_path: Path, wrapped: str
) -> None:
    folder, meeting = tmp_path / "checkpoints", tmp_path / "meeting"
    folder.mkdir()
    meeting.mkdir()
    others = Processes(meeting)
    others.killed(checkpoint_cases.trained_until_killed, str(folder), wrapped)
    others.end()
    # The values of the third step are there, what makes a checkpoint of them is not.
    assert list((folder / "3").glob("*.distcp")) and not (folder / "3" / ".metadata").exists()
    name, losses, weights = two.run(checkpoint_cases.resumed_after_the_kill, str(folder), wrapped)[0]
    assert name == "2" and len(losses) == STEPS - 2
    same_as_without_break((losses, weights))


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [("ddp", r"pass the model inside it \(its \.module\)"), ("fsdp", "state_dict=")],
    ids=["ddp", "fsdp"],
)
def test_artifacts(two: Processes, tmp_path: Path, wrapped: str, message: str) -> None:
    for expected, found, refusals in two.run(cases.artifact, str(tmp_path / "artifact"), wrapped):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
        assert len(refusals) == 2
        assert all(re.search(message, refusal) for refusal in refusals), refusals


def test_a_sharded_weight_can_be_read_only_while_it_is_gathered(two: Processes) -> None:
    for refusals, weight, expected in two.run(cases.read_in_parts):
        assert len(refusals) == 2 and all("model.unshard() first" in refusal for refusal in refusals), refusals
        torch.testing.assert_close(weight, expected, rtol=0.0, atol=0.0)


def test_an_artifact_has_the_values_of_a_given_state_dict(tmp_path: Path) -> None:
    model = cases.converted()
    values = {name: value if name == cases.STATE else value + 1 for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    roastify.save(model, tmp_path / "a", state_dict=values)
    assert_same(model.state_dict(), before, atol=0.0)
    assert_same(roastify.load(tmp_path / "a", cases.Net()).state_dict(), values, atol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: values.pop("roast_pool.weight"),
            "the state dict lacks roast_pool.weight, which the model has",
        ),
        (lambda values: values.clear(), "gather it in every process and save in the first"),
        (
            lambda values: values.update({"roast_pool.weights": torch.zeros(1)}),
            "has roast_pool.weights, which the model does not have; closest: 'roast_pool.weight'",
        ),
        (
            lambda values: values.update({"roast_pool.weight": torch.zeros(3)}),
            r"roast_pool.weight has shape \(3,\) in the state dict; expected \(\d+, \d+\), as in the model",
        ),
    ],
)
def test_values_of_another_model_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = cases.converted()
    values = model.state_dict()
    change(values)
    with pytest.raises(CheckpointError, match=message):
        roastify.save(model, tmp_path / "a", state_dict=values)
    assert not (tmp_path / "a").exists()


def test_zero1(two: Processes) -> None:
    found = two.run(parallel_cases.zero1)
    for alone, together, _ in found:
        assert_same(together, alone)
        assert moved(together)
    # The pool is one Parameter, so one process has its whole state.
    small, large = sorted(size for *_, size in found)
    assert 0 < small < large / 4


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("Schedule1F1B", 2),
        pytest.param("ScheduleGPipe", 2, marks=pytest.mark.long),
        pytest.param("ScheduleInterleavedZeroBubble", 4, marks=pytest.mark.long),
    ],
)
def test_a_pipeline_of_stages_that_are_converted_each(two: Processes, schedule: str, stages: int) -> None:
    for alone, together in two.run(parallel_cases.pipeline_of_converted_stages, schedule, stages):
        assert_same(together, alone)


def test_a_converted_model_is_not_cut_into_stages(two: Processes) -> None:
    for message in two.run(parallel_cases.pipeline_of_a_converted_model):
        assert "pipeline() was given a converted model" in message and "convert each stage by itself" in message


def test_tensor_parallel_of_layers_that_stay_dense(two: Processes) -> None:
    for alone, together in two.run(parallel_cases.tensor_parallel_of_dense_layers):
        # Products are summed in parts, and AdamW's steps of 1e-2 make more of the difference than elsewhere.
        assert_same(together, alone, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensor parallel", "cannot be replaced or split for this layer alone, as tensor parallelism does"),
        ("a table by rows", "cannot be replaced or split for this layer alone, as tensor parallelism does"),
        ("sequence parallel", "got a DTensor of placements .* it takes plain tensors"),
        ("distributed input", "got a DTensor of placements .* it takes plain tensors"),
        ("replicated", "wrap the model in DistributedDataParallel instead"),
    ],
)
def test_what_splits_a_layer_on_the_pool_is_refused(two: Processes, name: str, message: str) -> None:
    for found in two.run(parallel_cases.refusal, name):
        assert re.search(message, found), found


def test_context_parallel(two: Processes) -> None:
    for alone, together in two.run(parallel_cases.context_parallel):
        assert_same(together, alone)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("unique", [True, False], ids=["unique", "all"])
def test_the_benchmarks_sharded_table_trains_as_a_whole_one(two: Processes, unique: bool, optimizer: str) -> None:
    for found, expected in two.run(sharded_cases.trained, unique, optimizer):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


def test_the_tests_that_the_page_names_exist() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`test_" in line]
    named = [name for line in lines for name in re.findall(r"`(test_\w+)`", line)]
    assert len(named) == len(lines) > 15 and not [name for name in named if name not in globals()]


@pytest.mark.long
@pytest.mark.parametrize("settings", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_the_example(tmp_path: Path, settings: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLE), "--steps", "20", "--output", str(tmp_path / "out"), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        # Once in many runs, a thread of gloo still runs when a process ends, and aborts the process.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.1
    source = load_source(str(EXAMPLE))
    assert roastify.load(tmp_path / "out", source.model)(source.example_inputs).isfinite().all()

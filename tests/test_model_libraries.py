"""Sources of timm and torchvision, with the real libraries; and what is said where one of them is missing.

The plain package index has torchvision for torch's CUDA builds alone, which does not import beside a CPU build. There
these tests are skipped; `pip install 'roastify[vision]'` with the index of one build runs them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import click.testing
import pytest
import torch
from torch import nn

import roastify
from roastify.cli import main
from roastify.errors import CheckpointError, SourceError
from roastify.model_libraries import create_model
from roastify.source import load_source


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # ImportError, and RuntimeError for a build that belongs to another torch
        pytest.skip(f"{name} does not import here: {type(error).__name__}: {error}")


@pytest.fixture
def timm() -> ModuleType:
    return _library("timm")


@pytest.fixture
def torchvision() -> ModuleType:
    return _library("torchvision")


def _refusal(source: str) -> str:
    with pytest.raises(SourceError) as caught:
        load_source(source)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    source = f"{kind}:resnet18"
    assert _refusal(source) == f"{source} needs {kind}; install it with: pip install 'roastify[vision]'"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "torchvision:resnet18 needs torchvision, which does not import (RuntimeError: operator torchvision::nms "
            f"does not exist); install torch {torch.__version__} and the torchvision that belongs to it from one index",
        ),
        (
            "import no_such_module_of_it",
            "torchvision:resnet18 needs torchvision, which does not import (No module named 'no_such_module_of_it'); "
            "install it with: pip install 'roastify[vision]'",
        ),
    ],
)
def test_a_library_that_does_not_import_says_why(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(code)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _refusal("torchvision:resnet18") == message


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_source_without_a_name_is_refused(kind: str) -> None:
    assert _refusal(f"{kind}:").startswith(f"{kind}:: expected {kind}:NAME")
    assert "is not key=value" in _refusal(f"{kind}:resnet18,10")


TIMM = "timm:resnet10t,num_classes=7,in_chans=1"
VISION = "torchvision:mobilenet_v3_small,num_classes=7"


@pytest.mark.parametrize("source", [TIMM, VISION])
def test_a_model_by_name_converts_and_its_artifact_loads_alone(source: str, tmp_path: Path) -> None:
    _library(source.partition(":")[0])
    found = load_source(source)
    assert not found.pretrained
    assert found.model.eval()(found.example_inputs).shape == (2, 7)
    assert found.example_inputs.shape[1] == (1 if source == TIMM else 3)
    model = roastify.convert(found.model, 3)
    roastify.save(model, tmp_path / "a", source=source)
    loaded = roastify.load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded(found.example_inputs), model(found.example_inputs))
    # Training and saving again keeps the name.
    roastify.save(loaded, tmp_path / "b")
    assert type(roastify.load(tmp_path / "b")) is type(loaded)
    wrong = source.replace("num_classes=7", "num_classes=8")
    with pytest.raises(CheckpointError, match=r"the source that was given does not build this model: .*has shape"):
        roastify.save(model, tmp_path / "c", source=wrong)


def test_the_command_line_takes_a_name_and_its_artifact(timm: ModuleType, tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    output = run(TIMM, "--ratio", 3, "-o", tmp_path / "a")
    assert "float32[2, 7] on cpu" in output and f'load it with roastify.load("{tmp_path}/a")' in output
    shown = " ".join(run("show", tmp_path / "a").split())
    assert "resnet10t of timm, with num_classes=7, in_chans=1" in shown
    assert "float32[2, 7] on cpu" in run("check", tmp_path / "a")
    assert "dense ÷ converted" in run("bench", tmp_path / "a", "--seconds", 0.1, "--device", "cpu")
    assert "closest: 'resnet10t'" in run("plan", "timm:resnet10", code=2)


def test_a_function_that_no_shape_tells_is_kept(torchvision: ModuleType, tmp_path: Path) -> None:
    """GoogLeNet with weights rescales its inputs. Without the argument, the same tensors are another function."""
    model = create_model(
        "torchvision", "googlenet", {"transform_input": True, "aux_logits": False, "init_weights": False}
    )
    converted = roastify.convert(model, 4)
    source = "torchvision:googlenet,aux_logits=false,init_weights=false"
    with pytest.raises(CheckpointError, match=r"transform_input is True and False"):
        roastify.save(converted, tmp_path / "a", source=source)
    roastify.save(converted, tmp_path / "a", source=source + ",transform_input=true")
    assert roastify.load(tmp_path / "a").transform_input is True


def test_pretrained_weights_name_what_they_chose(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights' values are not needed for that, so none are downloaded."""
    dense = create_model("torchvision", "googlenet", {"init_weights": False})
    values = dense.state_dict()
    monkeypatch.setattr(
        torchvision.models.GoogLeNet_Weights, "get_state_dict", lambda self, *args, **kwargs: values, raising=True
    )
    found = load_source("torchvision:googlenet,pretrained=true")
    assert found.pretrained and found.builder is not None
    assert found.builder.arguments == {"transform_input": True, "aux_logits": False}


def test_a_backbone_is_not_downloaded(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    assert isinstance(load_source("torchvision:lraspp_mobilenet_v3_large").model, nn.Module)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet1", "has no model 'resnet1'; closest: 'resnet18'"),
        ("torchvision:resnet18,classes=3", "torchvision:resnet18 cannot be built: TypeError: "),
        ("torchvision:resnet18,weights=NONE_SUCH", "torchvision:resnet18 cannot be built: KeyError: "),
        ("torchvision:resnet18,pretrained=3", "expected pretrained=true or false, or the weights' name"),
        ("timm:resnt18", "has no model 'resnt18'; closest: 'resnet18'"),
        ("timm:resnet18.no_such_tag", "timm:resnet18.no_such_tag cannot be built: "),
        ("timm:resnet18,num_classes=many", "timm:resnet18 cannot be built: "),
    ],
)
def test_what_a_library_refuses_is_one_line(source: str, message: str) -> None:
    _library(source.partition(":")[0])
    refusal = _refusal(source)
    assert message in refusal and "\n" not in refusal

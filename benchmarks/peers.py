"""Tries what roastify and tools beside it can do on small models: a tool a process, in an environment of its own.

`python -P benchmarks/peers.py TOOL` needs torch, transformers and the tool. It tries every feature once and puts the
answers into benchmarks/results/peers.json; `python -m benchmarks.peers_page` writes docs/peers.md from them. A trial
that ends in an error answers no, with the error. (Without -P, Python would find this folder's `kernels.py` where
transformers looks for a package.)
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import inspect
import json
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results" / "peers.json"
# The features in the page's order, each with the question that its trials answer.
FEATURES = {
    "interface": "Converts an existing model; its class and its `forward` signature stay",
    "training": "Trains compressed weights, with optimizer states of compressed size",
    "scratch": "Trains a model from scratch that is smaller than the dense one while it trains",
    "untrained": "Makes a trained model smaller without training, and it still works",
    "arithmetic": "Saves arithmetic: fewer multiply-adds, or integers instead of floating-point numbers",
    "embeddings": "Makes embeddings smaller",
    "convolutions": "Makes convolutions smaller",
    "compile": "`torch.compile` of the result, as one graph",
    "export": "`torch.export` of the result",
    "transformers": "`save_pretrained`, then `from_pretrained`, with equal outputs",
    "ratio": "Stores as many parameters as the user asks for",
}
TOOLS = ("roastify", "torchao", "peft", "bitsandbytes", "llmcompressor", "nncf")
Answer = tuple[str, str]
TRIALS: dict[tuple[str, str], Callable[[], Answer]] = {}


def tries(tool: str, feature: str) -> Callable[[Callable[[], Answer]], Callable[[], Answer]]:
    """Register a trial: it returns yes, partly or no, and what was found."""

    def register(trial: Callable[[], Answer]) -> Callable[[], Answer]:
        assert feature in FEATURES and tool in TOOLS
        TRIALS[tool, feature] = trial
        return trial

    return register


# What is tried upon.


class Net(nn.Module):
    """A classifier of four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 256)
        self.middle = nn.Linear(256, 256)
        self.last = nn.Linear(256, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())


class Words(nn.Module):
    """A table of 512 words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(512, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


class Picture(nn.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(32, 64, 3)
        self.second = nn.Conv2d(64, 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


IDS = torch.arange(0, 512, 4).view(4, 32)
PIXELS = torch.linspace(-1, 1, 2 * 32 * 12 * 12).view(2, 32, 12, 12)


@cache
def _task() -> tuple[torch.Tensor, torch.Tensor]:
    """Return points, and their classes by a random network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 32, generator=generator)
    hidden = (x @ torch.randn(32, 16, generator=generator)).relu()
    return x, (hidden @ torch.randn(16, 4, generator=generator)).argmax(1)


def fresh(kind: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return kind()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 150) -> nn.Module:
    x, y = _task()
    model.train()
    for step in range(steps):
        rows = torch.arange(step * 128, step * 128 + 128) % 3072
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@cache
def _trained() -> nn.Module:
    net = fresh()
    return train(net, torch.optim.AdamW(net.parameters(), 3e-3), steps=300)


def trained() -> Any:
    """Return a trained `Net`; each call gives another copy."""
    return copy.deepcopy(_trained())


def accuracy(model: nn.Module) -> float:
    """Return the part of held-out points that a model classifies well, in percent."""
    x, y = _task()
    with torch.no_grad():
        return 100 * float((model(x[3072:]).argmax(1) == y[3072:]).float().mean())


def llama() -> Any:
    """Return a small Llama with random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes)).eval()


def points() -> torch.Tensor:
    return _task()[0][:16]


# What is asked of the result.


def _bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor takes, also one of a class that holds other tensors."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes_of(getattr(tensor, name)) for name in flatten()[0])


def size(model: nn.Module) -> int:
    """Return the bytes of a model's state dict, each tensor once."""
    values = {
        id(value): value for value in model.state_dict(keep_vars=True).values() if isinstance(value, torch.Tensor)
    }
    return sum(map(_bytes_of, values.values()))


def state_size(optimizer: Any) -> int:
    """Return the bytes of an optimizer's states."""
    return sum(
        _bytes_of(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def dense_state_size() -> int:
    """Return the bytes of AdamW's states of the dense `Net`."""
    net = fresh()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, steps=1)
    return state_size(optimizer)


def interface(before: nn.Module, after: nn.Module) -> str:
    """Return how class and signature of two models compare."""
    kind = "same class" if type(after) is type(before) else f"class {type(after).__name__}"
    same = inspect.signature(after.forward) == inspect.signature(before.forward)
    return f"{kind}, {'same signature' if same else 'signature ' + str(inspect.signature(after.forward))}"


def smaller(before: nn.Module, after: nn.Module, *inputs: torch.Tensor) -> Answer:
    """Answer whether a model became smaller and still runs."""
    with torch.no_grad():
        expected, found = before(*inputs), after(*inputs)
    times = size(before) / size(after)
    error = float((found - expected).norm() / expected.norm())
    return "yes" if times > 1.5 else "no", f"{times:.1f} times smaller, outputs {100 * error:.1f} % from the dense ones"


def works(after: nn.Module) -> Answer:
    """Answer whether a model made of the trained one is smaller and classifies as well, within two points."""
    before, found, times = accuracy(_trained()), accuracy(after), size(_trained()) / size(after)
    text = f"{times:.1f} times smaller, accuracy {before:.1f} % → {found:.1f} %"
    return "yes" if times > 1.5 and found > before - 2 else "no", text


def learns(net: nn.Module, optimizer: Any, steps: int = 150) -> Answer:
    """Train from scratch; answer whether the model is smaller than the dense one while it trains."""
    train(net, optimizer, steps)
    dense = fresh()
    reached = accuracy(train(dense, torch.optim.AdamW(dense.parameters(), 3e-3), steps))
    times, states = size(dense) / size(net), dense_state_size() / state_size(optimizer)
    quality = f"accuracy {accuracy(net):.1f} % (dense {reached:.1f} %)"
    answer = "yes" if times > 1.5 and states > 1.5 else "partly" if max(times, states) > 1.5 else "no"
    return answer, f"weights {times:.1f}, states {states:.1f} times smaller; {quality}"


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, *inputs: torch.Tensor) -> str:
    """Return the products that a model computes, as operators."""
    with torch.no_grad(), _Operators() as mode:
        model(*inputs)
    words = ("mm", "linear", "matmul", "gemm", "gemv", "convolution")
    return ", ".join(sorted(name for name in mode.names if any(word in name for word in words)))


def flops(model: nn.Module, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def _agree(expected: torch.Tensor, found: torch.Tensor) -> Answer:
    error = float((found - expected).abs().max() / expected.abs().max())
    return "yes" if error < 0.02 else "no", f"outputs within {error:.1g}" if error else "equal outputs"


def compiles(model: nn.Module, *inputs: torch.Tensor) -> Answer:
    with torch.no_grad():
        return _agree(model(*inputs), torch.compile(model, fullgraph=True)(*inputs))


def exports(model: nn.Module, *inputs: torch.Tensor) -> Answer:
    with torch.no_grad():
        return _agree(model(*inputs), torch.export.export(model, inputs).module()(*inputs))


def loads_again(model: Any, **saving: Any) -> Answer:
    """Save a small Llama and load it; answer whether the outputs have equal bits and the files are smaller."""
    import transformers

    ids = torch.arange(32)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        llama().save_pretrained(f"{folder}/dense")
        model.save_pretrained(f"{folder}/out", **saving)
        again = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/out", device_map="cpu").eval()
        dense, out = (
            sum(path.stat().st_size for path in Path(folder, name).glob("*.safetensors")) for name in ("dense", "out")
        )
        equal = torch.equal(again(ids).logits, model(ids).logits)
        answer, text = _agree(model(ids).logits, again(ids).logits)
    times = dense / out
    text = "outputs equal bit for bit" if equal else text
    return answer if times > 1.5 else "partly", f"{text}; files {times:.1f} times smaller"


def converted_llama(config: Any) -> Any:
    """Return the small Llama, loaded with a quantization config."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32).eval()


# roastify.


@tries("roastify", "interface")
def _() -> Answer:
    import roastify

    net = trained()
    found = interface(net, roastify.convert(net, ratio=10))
    return "yes" if found == "same class, same signature" else "no", found


@tries("roastify", "training")
def _() -> Answer:
    import roastify

    net = roastify.convert(trained(), ratio=10)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    train(net, optimizer, steps=1)
    times, states = size(fresh()) / size(net), dense_state_size() / state_size(optimizer)
    return "yes" if min(times, states) > 5 else "no", f"weights {times:.1f}, states {states:.1f} times smaller"


@tries("roastify", "scratch")
def _() -> Answer:
    import roastify

    net = roastify.convert(fresh(), ratio=10)
    return learns(net, torch.optim.AdamW(net.parameters(), 3e-3))


@tries("roastify", "untrained")
def _() -> Answer:
    import roastify

    return works(roastify.convert(trained(), ratio=10, init="project"))


@tries("roastify", "arithmetic")
def _() -> Answer:
    import roastify

    dense, x = trained(), points()
    asked, usual = (flops(dense, x) / flops(roastify.convert(dense, ratio=10, fold=fold), x) for fold in (8, "auto"))
    text = f"{asked:.1f} times fewer multiply-adds with fold=8, {usual:.1f} times by default, which folds no layer of"
    return "yes" if asked > 1.5 else "no", f"{text} under a million weights"


@tries("roastify", "embeddings")
def _() -> Answer:
    import roastify

    return smaller(fresh(Words), roastify.convert(fresh(Words), ratio=10, init="project"), IDS)


@tries("roastify", "convolutions")
def _() -> Answer:
    import roastify

    return smaller(fresh(Picture), roastify.convert(fresh(Picture), ratio=10, init="project"), PIXELS)


@tries("roastify", "compile")
def _() -> Answer:
    import roastify

    return compiles(roastify.convert(trained(), ratio=10), points())


@tries("roastify", "export")
def _() -> Answer:
    import roastify

    return exports(roastify.convert(trained(), ratio=10), points())


@tries("roastify", "transformers")
def _() -> Answer:
    import roastify

    return loads_again(converted_llama(roastify.RoastifyConfig(ratio=10)))


@tries("roastify", "ratio")
def _() -> Answer:
    import roastify

    asked = (3, 10, 37)
    found = [roastify.plan(trained(), ratio).achieved_ratio for ratio in asked]
    exact = all(one <= other < 1.05 * one for one, other in zip(asked, found, strict=True))
    return "yes" if exact else "no", f"asked {asked}, found {', '.join(f'{ratio:.2f}' for ratio in found)}"


# torchao.


@tries("torchao", "interface")
def _() -> Answer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net, before = trained(), trained()
    quantize_(net, Int8WeightOnlyConfig())
    found = interface(before, net)
    return "yes" if found == "same class, same signature" else "no", found


@tries("torchao", "training")
def _() -> Answer:
    from torchao.optim import AdamW8bit
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    net = trained()
    quantize_(net, int8_weight_only_quantized_training())
    optimizer = AdamW8bit(net.parameters(), 1e-3)
    train(net, optimizer, steps=1)
    times, states = size(fresh()) / size(net), dense_state_size() / state_size(optimizer)
    return "yes" if min(
        times, states
    ) > 1.5 else "no", f"weights {times:.1f}, states {states:.1f} times smaller (prototype)"


@tries("torchao", "scratch")
def _() -> Answer:
    from torchao.optim import AdamW8bit
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    net = fresh()
    quantize_(net, int8_weight_only_quantized_training())
    return learns(net, AdamW8bit(net.parameters(), 3e-3))


@tries("torchao", "untrained")
def _() -> Answer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = trained()
    quantize_(net, Int8WeightOnlyConfig())
    return works(net)


@tries("torchao", "arithmetic")
def _() -> Answer:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    net = trained()
    quantize_(net, Int8DynamicActivationInt8WeightConfig())
    found = operators(net, points())
    return "yes" if "_int_mm" in found else "no", f"products: {found}"


@tries("torchao", "embeddings")
def _() -> Answer:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    words = fresh(Words)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32))
    quantize_(words, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    return smaller(fresh(Words), words, IDS)


@tries("torchao", "convolutions")
def _() -> Answer:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(fresh(Picture), (PIXELS,)).module(), quantizer)
    prepared(PIXELS)
    graph = convert_pt2e(prepared)
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    times = size(fresh(Picture)) / sum(_bytes_of(value) for name, value in graph.state_dict().items() if name in used)
    error = (graph(PIXELS) - fresh(Picture)(PIXELS)).norm() / fresh(Picture)(PIXELS).norm()
    text = f"an exported graph is {times:.1f} times smaller, outputs {100 * error.item():.1f} % from the dense ones"
    return "partly" if times > 1.5 else "no", f"{text}; quantize_ is for linear layers"


@tries("torchao", "compile")
def _() -> Answer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = trained()
    quantize_(net, Int8WeightOnlyConfig())
    return compiles(net, points())


@tries("torchao", "export")
def _() -> Answer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = trained()
    quantize_(net, Int8WeightOnlyConfig())
    return exports(net, points())


@tries("torchao", "transformers")
def _() -> Answer:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return loads_again(converted_llama(TorchAoConfig(Int8WeightOnlyConfig())))


@tries("torchao", "ratio")
def _() -> Answer:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    found = []
    for dtype in (torch.int8, torch.int4, torch.int2):
        net = trained()
        quantize_(net, IntxWeightOnlyConfig(weight_dtype=dtype))
        found.append(f"{str(dtype).removeprefix('torch.')}: {size(fresh()) / size(net):.1f} times smaller")
    return "no", f"the width of numbers is chosen; with this config, which keeps each in a byte, {', '.join(found)}"


# PEFT.


@tries("peft", "interface")
def _() -> Answer:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["first", "middle"])
    wrapped = interface(trained(), peft.get_peft_model(trained(), config))
    found = interface(trained(), peft.inject_adapter_in_model(config, trained()))
    return (
        "partly",
        f"get_peft_model: {wrapped}; inject_adapter_in_model: {found}; the weights stay dense, beside adapters",
    )


@tries("peft", "training")
def _() -> Answer:
    import peft

    net = peft.get_peft_model(trained(), peft.LoraConfig(r=2, target_modules=["first", "middle"]))
    optimizer = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], 3e-3)
    train(net, optimizer, steps=1)
    times, states = size(fresh()) / size(net), dense_state_size() / state_size(optimizer)
    return "partly", f"weights {times:.2f}, states {states:.1f} times smaller: adapters train, beside the dense weights"


@tries("peft", "scratch")
def _() -> Answer:
    import peft

    net = peft.get_peft_model(
        fresh(), peft.LoraConfig(r=2, target_modules=["first", "middle"], modules_to_save=["last"])
    )
    return learns(net, torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], 3e-3))


@tries("peft", "untrained")
def _() -> Answer:
    import peft

    return works(peft.get_peft_model(trained(), peft.LoraConfig(r=4, target_modules=["first", "middle"])))


@tries("peft", "arithmetic")
def _() -> Answer:
    import peft

    net = peft.get_peft_model(trained(), peft.LoraConfig(r=4, target_modules=["first", "middle"])).eval()
    times = flops(trained(), points()) / flops(net, points())
    return "no", f"{times:.2f} times fewer multiply-adds with adapters, as many as before once they are merged"


@tries("peft", "embeddings")
def _() -> Answer:
    import peft

    words = peft.get_peft_model(fresh(Words), peft.LoraConfig(r=2, target_modules=["table"]))
    trains = sum(value.numel() for value in words.parameters() if value.requires_grad)
    _, found = smaller(fresh(Words), words, IDS)
    return (
        "partly",
        f"{fresh(Words).table.weight.numel() / trains:.1f} times fewer trained parameters; the model is {found}",
    )


@tries("peft", "convolutions")
def _() -> Answer:
    import peft

    picture = peft.get_peft_model(fresh(Picture), peft.LoraConfig(r=2, target_modules=["first", "second"]))
    trains = sum(value.numel() for value in picture.parameters() if value.requires_grad)
    dense = sum(value.numel() for value in fresh(Picture).parameters())
    _, found = smaller(fresh(Picture), picture, PIXELS)
    return "partly", f"{dense / trains:.1f} times fewer trained parameters; the model is {found}"


@tries("peft", "compile")
def _() -> Answer:
    import peft

    return compiles(peft.get_peft_model(trained(), peft.LoraConfig(r=4, target_modules=["first"])).eval(), points())


@tries("peft", "export")
def _() -> Answer:
    import peft

    return exports(peft.get_peft_model(trained(), peft.LoraConfig(r=4, target_modules=["first"])).eval(), points())


@tries("peft", "transformers")
def _() -> Answer:
    import peft

    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ids = torch.arange(32)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = llama()
        again.load_adapter(folder)
        saved = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        equal = torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    return "partly" if equal else "no", f"the adapters' file has {saved:,} bytes; the base is loaded beside it"


@tries("peft", "ratio")
def _() -> Answer:
    import peft

    found = []
    for length in (256, 1024):
        config = peft.UniLoraConfig(r=4, theta_d_length=length, target_modules=["first", "middle"])
        net = peft.get_peft_model(trained(), config)
        found.append(sum(value.numel() for value in net.parameters() if value.requires_grad))
    return "partly", f"UniLora with theta_d_length 256 and 1024 trains {found} parameters, beside all dense ones"


# bitsandbytes.


def _four_bit(net: Any) -> Any:
    """Return the trained classifier with its large layers in 4 bits."""
    import bitsandbytes as bnb

    for name in ("first", "middle"):
        dense = getattr(net, name)
        layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, compute_dtype=torch.float32)
        layer.load_state_dict(dense.state_dict())
        setattr(net, name, layer.to("cpu"))
    return net.eval()


@tries("bitsandbytes", "interface")
def _() -> Answer:
    from transformers import BitsAndBytesConfig

    found = interface(llama(), converted_llama(BitsAndBytesConfig(load_in_4bit=True)))
    return "partly", f"by transformers, for its models: {found}; in other models the user replaces layers"


@tries("bitsandbytes", "training")
def _() -> Answer:
    import bitsandbytes as bnb

    net = trained()
    optimizer = bnb.optim.AdamW8bit(net.parameters(), 1e-3)
    train(net, optimizer, steps=1)
    times, states = size(fresh()) / size(net), dense_state_size() / state_size(optimizer)
    return (
        "partly" if states > 1.5 else "no",
        f"weights {times:.1f}, states {states:.1f} times smaller: the weights stay dense",
    )


@tries("bitsandbytes", "scratch")
def _() -> Answer:
    import bitsandbytes as bnb

    net = fresh()
    return learns(net, bnb.optim.AdamW8bit(net.parameters(), 3e-3))


@tries("bitsandbytes", "untrained")
def _() -> Answer:
    return works(_four_bit(trained()))


@tries("bitsandbytes", "arithmetic")
def _() -> Answer:
    from transformers import BitsAndBytesConfig

    found = operators(converted_llama(BitsAndBytesConfig(load_in_8bit=True)), torch.arange(8)[None])
    return "yes" if "int8" in found or "int_mm" in found else "no", f"products with 8 bits: {found}"


@tries("bitsandbytes", "embeddings")
def _() -> Answer:
    import bitsandbytes as bnb

    table, dense = bnb.nn.Embedding4bit(512, 64), fresh(Words).table
    table.load_state_dict(dense.state_dict())
    table.to("cpu")
    times, error = size(dense) / _bytes_of(table.weight), (table(IDS) - dense(IDS)).norm() / dense(IDS).norm()
    text = f"{times:.1f} times smaller in memory, outputs {100 * error.item():.1f} % from the dense ones"
    try:
        table.state_dict()
    except NotImplementedError as failure:
        return "partly", f"{text}; {failure}"
    return "yes" if times > 1.5 else "no", text


@tries("bitsandbytes", "convolutions")
def _() -> Answer:
    import bitsandbytes as bnb

    found = [name for name in dir(bnb.nn) if "conv" in name.lower()]
    return "yes" if found else "no", f"layers for convolutions in bitsandbytes.nn: {found or 'none'}"


@tries("bitsandbytes", "compile")
def _() -> Answer:
    return compiles(_four_bit(trained()), points())


@tries("bitsandbytes", "export")
def _() -> Answer:
    return exports(_four_bit(trained()), points())


@tries("bitsandbytes", "transformers")
def _() -> Answer:
    from transformers import BitsAndBytesConfig

    return loads_again(converted_llama(BitsAndBytesConfig(load_in_4bit=True)))


@tries("bitsandbytes", "ratio")
def _() -> Answer:
    return "no", f"8 or 4 bits; with 4 the classifier is {size(fresh()) / size(_four_bit(trained())):.1f} times smaller"


# llm-compressor.


def _one_shot(model: Any, scheme: str = "W8A16", **settings: Any) -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(**{"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"], **settings})
    return _with_recipe(model, recipe)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _with_recipe(model: Any, recipe: Any, **data: Any) -> Any:
    from llmcompressor import oneshot

    # It reads the folder that the model came from, also when it saves.
    folder = tempfile.mkdtemp(dir=_home().name)
    model.save_pretrained(folder)
    return oneshot(model=type(model).from_pretrained(folder), recipe=recipe, **data)


def _saved_and_loaded(model: Any) -> Any:
    import transformers

    folder = tempfile.mkdtemp(dir=_home().name)
    model.save_pretrained(folder, save_compressed=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def _saved_size(model: Any, **saving: Any) -> int:
    """Return the bytes of the files of weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **saving)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@tries("llmcompressor", "interface")
def _() -> Answer:
    found = interface(llama(), _one_shot(llama()))
    return "yes" if found == "same class, same signature" else "no", found


@tries("llmcompressor", "training")
def _() -> Answer:
    import llmcompressor

    found = [name for name in dir(llmcompressor) if "train" in name]
    model = _one_shot(llama())
    trains = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return (
        "no",
        f"functions that train: {found or 'none'}; {trains:,} parameters of the result take gradients",
    )


@tries("llmcompressor", "scratch")
def _() -> Answer:
    import llmcompressor

    found = [name for name in dir(llmcompressor) if "train" in name]
    return "no", f"it works on trained models; functions that train: {found or 'none'}"


@tries("llmcompressor", "untrained")
def _() -> Answer:
    ids = torch.arange(32)[None]
    model, dense = _one_shot(llama(), "W4A16"), llama()
    times = _saved_size(dense) / _saved_size(model, save_compressed=True)
    error = (model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    return (
        "yes" if times > 1.5 else "no",
        f"files {times:.1f} times smaller, logits {100 * error.item():.1f} % from the dense ones",
    )


@tries("llmcompressor", "arithmetic")
def _() -> Answer:
    model = _one_shot(llama(), "FP8_DYNAMIC")
    return "no", f"products in torch: {operators(model, torch.arange(8)[None])} (vLLM, which has others, was not tried)"


@tries("llmcompressor", "embeddings")
def _() -> Answer:
    model = _one_shot(llama(), targets="Embedding", ignore=[])
    times = _saved_size(llama()) / _saved_size(model, save_compressed=True)
    return "yes" if times > 1.02 else "no", f"files {times:.2f} times smaller if only the embedding is quantized"


@tries("llmcompressor", "convolutions")
def _() -> Answer:
    import transformers

    def picture() -> Any:
        torch.manual_seed(0)
        config = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
        return transformers.ResNetModel(config).eval()

    times = _saved_size(picture()) / _saved_size(
        _one_shot(picture(), targets="Conv2d", ignore=[]), save_compressed=True
    )
    return "yes" if times > 1.5 else "no", f"files {times:.1f} times smaller"


class _Logits(nn.Module):
    """A Llama that takes and returns a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@tries("llmcompressor", "compile")
def _() -> Answer:
    return compiles(_Logits(_saved_and_loaded(_one_shot(llama()))), torch.arange(8)[None])


@tries("llmcompressor", "export")
def _() -> Answer:
    return exports(_Logits(_saved_and_loaded(_one_shot(llama()))), torch.arange(8)[None])


@tries("llmcompressor", "transformers")
def _() -> Answer:
    return loads_again(_one_shot(llama()), save_compressed=True)


@tries("llmcompressor", "ratio")
def _() -> Answer:
    from datasets import Dataset
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # It asks for a tokenizer, and has nothing to tokenize.
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), pad_token="a")
    data = Dataset.from_dict({"input_ids": [list(range(32))] * 4, "attention_mask": [[1] * 32] * 4})
    model = _with_recipe(llama(), SparseGPTModifier(sparsity=0.75, targets=["Linear"]), dataset=data, processor=words)
    zeros = 100 * float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
    return "partly", f"a share of zeros: {zeros:.0f} % of a weight's, asked 75 %; zeros are stored too"


# NNCF.


def _compressed(model: Any, inputs: torch.Tensor, mode: str = "INT8_ASYM", **settings: Any) -> Any:
    import nncf

    kind = getattr(nncf.CompressWeightsMode, mode)
    return nncf.compress_weights(model, mode=kind, dataset=nncf.Dataset([inputs]), **settings)


@tries("nncf", "interface")
def _() -> Answer:
    found = interface(trained(), _compressed(trained(), points()))
    return "yes" if found == "same class, same signature" else "no", found


@tries("nncf", "training")
def _() -> Answer:
    import nncf

    net = nncf.quantize(trained(), nncf.Dataset([points()]))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    train(net, optimizer, steps=1)
    times, states = size(fresh()) / size(net), dense_state_size() / state_size(optimizer)
    return "no", f"weights {times:.2f}, states {states:.2f} times smaller: it trains dense weights through a quantizer"


@tries("nncf", "scratch")
def _() -> Answer:
    import nncf

    net = nncf.quantize(fresh(), nncf.Dataset([points()]))
    return learns(net, torch.optim.AdamW(net.parameters(), 3e-3))


@tries("nncf", "untrained")
def _() -> Answer:
    return works(_compressed(trained(), points()))


@tries("nncf", "arithmetic")
def _() -> Answer:
    import nncf

    net = nncf.quantize(trained(), nncf.Dataset([points()]))
    return "no", f"products in torch: {operators(net, points())} (OpenVINO, which has others, was not tried)"


@tries("nncf", "embeddings")
def _() -> Answer:
    return smaller(fresh(Words), _compressed(fresh(Words), IDS), IDS)


@tries("nncf", "convolutions")
def _() -> Answer:
    return smaller(fresh(Picture), _compressed(fresh(Picture), PIXELS), PIXELS)


@tries("nncf", "compile")
def _() -> Answer:
    net = _compressed(trained(), points())
    try:
        return compiles(net, points())
    except Exception as error:  # of torch.compile
        exported = torch.export.export(net, (points(),)).module()
        answer, found = compiles(exported, points())
        return "partly" if answer == "yes" else "no", f"directly: {type(error).__name__}; after torch.export: {found}"


@tries("nncf", "export")
def _() -> Answer:
    return exports(_compressed(trained(), points()), points())


@tries("nncf", "transformers")
def _() -> Answer:
    return loads_again(_compressed(llama(), torch.arange(32)[None]))


@tries("nncf", "ratio")
def _() -> Answer:
    import nncf

    net = nncf.prune(trained(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.75, examples_inputs=points())
    net = nncf.strip(net, strip_format=nncf.StripFormat.IN_PLACE, example_input=points())
    zeros = 100 * float((net.middle.weight == 0).float().mean())
    return "partly", f"a share of zeros: {zeros:.0f} % of a weight's, asked 75 %; zeros are stored too"


# Running them.


def answer(tool: str, feature: str) -> Answer:
    """Run a trial; one that fails answers no, with its error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TRIALS[tool, feature]()
    except Exception as error:  # whatever a tool raises for what it does not do
        traceback.print_exc()
        words = (str(error).strip().splitlines() or [""])[0]
        return "no", f"{type(error).__name__}: {words[:160]}"


def lines_of(tool: str, feature: str) -> str:
    """Return the lines of a trial."""
    source = textwrap.dedent(inspect.getsource(TRIALS[tool, feature]))
    return textwrap.dedent(source.partition("-> Answer:\n")[2]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--feature", action="append", choices=list(FEATURES))
    given = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in {"torch", "transformers", given.tool}}
    for feature in given.feature or FEATURES:
        said, found = answer(given.tool, feature)
        print(f"{given.tool}, {feature}: {said}; {found}", flush=True)
        kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        row = {"tool": given.tool, "feature": feature, "answer": said, "found": found}
        row |= {"versions": versions, "python": sys.version.split()[0], "date": str(datetime.date.today())}
        row["lines"] = lines_of(given.tool, feature)
        rows = [each for each in kept if (each["tool"], each["feature"]) != (given.tool, feature)] + [row]
        order = {name: place for place, name in enumerate([*TOOLS, *FEATURES])}
        rows.sort(key=lambda each: (order[each["tool"]], order[each["feature"]]))
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

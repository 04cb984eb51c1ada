"""One FX graph for a whole converted model, if a graph can do everything that the model's code does.

A traced forward has the control flow of the one call that was traced. A branch on `self.training`, on an optional
argument or on a shape is missing in the graph. So the source code is checked too, and any code that could take another
branch is a reason to refuse.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from roastify.calls import signature_of
from roastify.conversion import isolated_trace
from roastify.conversion.converted import pool_of
from roastify.errors import ConversionError
from roastify.isolation import modes_kept, put_back, random_states_kept
from roastify.layers import reading
from roastify.layers.base import RoastLayer, RoastModule
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.source_scan import UNKNOWN, tree_of, value_of

_READS = "roast_reads"
# Functions of these modules count as operations: their arguments alone decide what they do.
_OPERATIONS = ("torch", "math", "operator")
# These functions inspect a value. While tracing, the value is a proxy, and the model later gets a tensor.
_ASKING = {"isinstance", "issubclass", "hasattr", "getattr", "type", "callable", "id", "print", "input", "open"}


class _ReadModule(nn.Module):
    """The module of a graph's node that reads one shared tensor."""

    def __init__(self, shared: PooledWeight) -> None:
        super().__init__()
        # In a dictionary, so that torch does not register the pool as a child.
        self._roast = {"value": shared}

    def forward(self) -> Tensor:
        """Return the dense, differentiable tensor."""
        return self._roast["value"].dense()


def emit_graph(model: nn.Module) -> fx.GraphModule:
    """Return a converted model as one GraphModule on the same pool and the same layers.

    Args:
        model: the model that `convert` or `load` returned. It does not change. `save` and `densify` take this model,
            not the graph.

    Raises:
        ConversionError: the model is not converted, or a graph cannot do everything that its code does.
    """
    pool = pool_of(model)
    reason = _reason_against_calls(model)
    if reason:
        raise _graph_refusal(model, reason)
    graphs = {}
    for mode in ("train", "eval"):
        tracer = _GraphTracer()
        try:
            with modes_kept(model), random_states_kept(), tracer.recording_reads():
                graph = isolated_trace.trace_alone(tracer, model.train(mode == "train"))
        except Exception as error:  # a user's forward may raise any error when it gets a proxy
            raise _graph_refusal(model, f"it cannot be traced: {type(error).__name__}: {error}") from error
        for module in [model, *tracer.entered]:
            reason = _reason_against_code(module)
            if reason:
                raise _graph_refusal(model, reason)
        constant = next((node for node in graph.nodes if str(node.target).startswith("_tensor_constant")), None)
        if constant is not None:
            raise _graph_refusal(
                model, "its forward creates a tensor that depends on no input, which would be a constant of the graph"
            )
        graphs[mode] = graph, tracer
    if str(graphs["train"][0]) != str(graphs["eval"][0]):
        raise _graph_refusal(model, "its forward does different things in train and eval mode")
    graph, tracer = graphs["eval" if not model.training else "train"]
    parts = {
        str(node.target): tracer.part(model, node) for node in graph.nodes if node.op in ("get_attr", "call_module")
    }
    emitted = fx.GraphModule(parts, graph, type(model).__name__)
    emitted.train(model.training)
    for name, module in parts.items():
        if isinstance(module, nn.Module):
            emitted.get_submodule(name).training = module.training
    pool.become_child_of(emitted)
    type(emitted).forward.__signature__ = _unbound_signature(model)  # type: ignore[attr-defined]
    return emitted


class _GraphTracer(fx.Tracer):
    """A tracer of converted models: layers on the pool are leaves, and each read of a shared attribute is a node."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[nn.Module] = []
        self.reads: dict[tuple[int, str], tuple[fx.Proxy, _ReadModule]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        original = type(m)._roast_original if isinstance(m, RoastModule) else type(m)
        torchs_own = original.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return isinstance(m, RoastLayer) or torchs_own

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_leaf_module(m, "") and m not in self.entered:
            self.entered.append(m)
        return super().call_module(m, forward, args, kwargs)

    @contextlib.contextmanager
    def recording_reads(self) -> Iterator[None]:
        before = list(reading.tracers)

        def restore() -> None:
            reading.tracers[:] = before

        with put_back(restore):
            reading.tracers.append(self._read)
            yield

    def _read(self, module: RoastModule, name: str) -> Any:
        key = id(module), name
        if key not in self.reads:
            proxy = self.create_proxy("call_module", f"{_READS}.{len(self.reads)}", (), {})
            self.reads[key] = proxy, _ReadModule(module._roast[name])
        return self.reads[key][0]

    def part(self, model: nn.Module, node: fx.Node) -> Any:
        """Return the object that a node's target names: a part of the model, or a `_ReadModule`."""
        name = str(node.target)
        if name.startswith(f"{_READS}."):
            return next(read for proxy, read in self.reads.values() if proxy.node.target == name)
        path, _, attribute = name.rpartition(".")
        return getattr(model.get_submodule(path), attribute)


def _unbound_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a model's forward with `self`, as its class defines it."""
    bound = signature_of(model) or inspect.signature(model.forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return bound.replace(parameters=[itself, *bound.parameters.values()])


def _graph_refusal(model: nn.Module, reason: str) -> ConversionError:
    return ConversionError(
        f"one graph cannot do everything that this {type(model).__name__} does: {reason}. Use the converted model "
        f"itself; torch.compile and torch.export accept it"
    )


def _reason_against_calls(model: nn.Module) -> str | None:
    for name, parameter in inspect.signature(type(model).forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"its forward takes any number of arguments ({parameter})"
        if parameter.default is not parameter.empty:
            return f"argument {name!r} of its forward is optional, and a graph takes all of its arguments in every call"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if module is not model):
        return "it has modules with hooks, and a graph would leave out the hooks' code"
    return None


def _reason_against_code(module: nn.Module) -> str | None:
    """Return what a module's forward, or a function that it calls, does that a graph cannot; None if nothing."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return None
    return _reason_against_function(type(module).forward, type(module), set())


def _reason_against_function(function: Any, owner: type | None, seen: set[Any]) -> str | None:
    if function in seen:
        return None
    seen.add(function)
    where = getattr(function, "__qualname__", str(function))
    tree = tree_of(function)
    if tree is None:
        return f"the source of {where} is not available"
    for node in ast.walk(tree):
        problem = _problem(node)
        if problem:
            return f"{where} {problem} (its line {getattr(node, 'lineno', '?')})"
        if isinstance(node, ast.Call):
            called = _callee(node.func, function, owner)
            if called is UNKNOWN:
                return f"{where} calls {ast.unparse(node.func)}, and the source does not show which function that is"
            if called is not None:
                reason = _reason_against_function(called, owner, seen)
                if reason:
                    return reason
    return None


def _problem(node: ast.AST) -> str | None:
    if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Match | ast.BoolOp | ast.Assert | ast.Compare):
        return "branches or compares"
    if isinstance(node, ast.comprehension) and node.ifs:
        return "branches in a comprehension"
    if isinstance(node, ast.Try | ast.With | ast.AsyncWith | ast.Yield | ast.YieldFrom | ast.Await | ast.Raise):
        return "handles errors, contexts or generators"
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return f"sets the attribute {node.attr!r}"
    if isinstance(node, ast.Global | ast.Nonlocal):
        return "sets variables outside it"
    if isinstance(node, ast.Attribute) and node.attr in ("training", "device", "dtype", "is_cuda"):
        return f"reads the attribute {node.attr!r}"
    if isinstance(node, ast.Name) and node.id in _ASKING:
        return f"calls {node.id!r}, which inspects a value or has effects"
    return None


def _callee(name: ast.expr, function: Any, owner: type | None) -> Any:
    """Return the user's function that a call runs; None for an operation or a module; `UNKNOWN` if it is not known."""
    root, depth = name, 0
    while isinstance(root, ast.Attribute):
        root, depth = root.value, depth + 1
    if not isinstance(root, ast.Name):
        # A method of a result or of `self.layers[0]` is a tensor's or a module's own. But `super()` may run user code.
        called_super = isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super"
        return UNKNOWN if called_super else None
    if root.id == "self" and owner is not None:
        member = getattr(owner, name.attr, None) if isinstance(name, ast.Attribute) and depth == 1 else None
        # An attribute that is no function of the class is a child module. The tracer enters it, so its code is checked.
        return member if isinstance(member, types.FunctionType) else None
    if value_of(root, function) is UNKNOWN:
        # A local variable: a method of it is a tensor's method, and a call of it is a call of a module.
        return None
    value = value_of(name, function)
    if value is UNKNOWN:
        return UNKNOWN
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__self__", None), "__name__", "") or ""
    if str(module).split(".")[0] in _OPERATIONS or getattr(builtins, root.id, None) is value:
        return None
    return value if isinstance(value, types.FunctionType) else UNKNOWN

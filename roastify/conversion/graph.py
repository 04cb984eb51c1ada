"""One FX graph for a whole converted model, where a graph says all that the model's code does.

A traced forward has the control flow of the one call that was traced: a branch on `self.training`, on an optional
argument or on a shape is gone. So the code is read first, and whatever could go another way is a reason to refuse.
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
from roastify.conversion.converted import POOL_NAME, pool_of
from roastify.errors import ConversionError
from roastify.isolation import modes_kept, random_states_kept
from roastify.layers import reading
from roastify.layers.base import RoastLayer, RoastModule
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.source_scan import UNKNOWN, tree_of, value_of

_READS = "roast_reads"
# Functions of these are taken as operations; what they do goes by their arguments alone.
_OPERATIONS = ("torch", "math", "operator")
# They ask what a traced value is, and a traced value is not what the model will be given.
_ASKING = {"isinstance", "issubclass", "hasattr", "getattr", "type", "callable", "id", "print", "input", "open"}


class _ReadModule(nn.Module):
    """A node that reads one shared tensor."""

    def __init__(self, shared: PooledWeight) -> None:
        super().__init__()
        # In a dictionary, so that the pool is not taken for a child.
        self._roast = {"value": shared}

    def forward(self) -> Tensor:
        """Return the dense, differentiable tensor."""
        return self._roast["value"].dense()


def emit_graph(model: nn.Module) -> fx.GraphModule:
    """Return a converted model as one GraphModule on the same pool and the same layers.

    Args:
        model: what `convert` or `load` returned. It stays as it is, and is what `save` and `densify` take.

    Raises:
        ConversionError: the model is not a converted one, or a graph would not say all that its code does.
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
                graph = tracer.trace(model.train(mode == "train"))
        except Exception as error:  # whatever the user's forward raises when it meets a proxy
            raise _graph_refusal(model, f"it cannot be traced: {type(error).__name__}: {error}") from error
        for module in [model, *tracer.entered]:
            reason = _reason_against_code(module)
            if reason:
                raise _graph_refusal(model, reason)
        constant = next((node for node in graph.nodes if str(node.target).startswith("_tensor_constant")), None)
        if constant is not None:
            raise _graph_refusal(
                model, "its forward makes a tensor that depends on no input, which a graph keeps as it is now"
            )
        graphs[mode] = graph, tracer
    if str(graphs["train"][0]) != str(graphs["eval"][0]):
        raise _graph_refusal(model, "its train and eval modes take other ways")
    graph, tracer = graphs["eval" if not model.training else "train"]
    parts = {
        str(node.target): tracer.part(model, node) for node in graph.nodes if node.op in ("get_attr", "call_module")
    }
    emitted = fx.GraphModule(parts, graph, type(model).__name__)
    emitted.train(model.training)
    for name, module in parts.items():
        if isinstance(module, nn.Module):
            emitted.get_submodule(name).training = module.training
    emitted.add_module(POOL_NAME, pool)
    type(emitted).forward.__signature__ = _unbound_signature(model)  # type: ignore[attr-defined]
    return emitted


class _GraphTracer(fx.Tracer):
    """Traces a converted model: layers on the pool are leaves, and reads of other shared attributes are nodes."""

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
        reading.tracers.append(self._read)
        try:
            yield
        finally:
            reading.tracers.pop()

    def _read(self, module: RoastModule, name: str) -> Any:
        key = id(module), name
        if key not in self.reads:
            proxy = self.create_proxy("call_module", f"{_READS}.{len(self.reads)}", (), {})
            self.reads[key] = proxy, _ReadModule(module._roast[name])
        return self.reads[key][0]

    def part(self, model: nn.Module, node: fx.Node) -> Any:
        """Return what a node names: one of the model's parts, or a read."""
        name = str(node.target)
        if name.startswith(f"{_READS}."):
            return next(read for proxy, read in self.reads.values() if proxy.node.target == name)
        path, _, attribute = name.rpartition(".")
        return getattr(model.get_submodule(path), attribute)


def _unbound_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a model's forward as its class has it, with `self`."""
    bound = signature_of(model) or inspect.signature(model.forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return bound.replace(parameters=[itself, *bound.parameters.values()])


def _graph_refusal(model: nn.Module, reason: str) -> ConversionError:
    return ConversionError(
        f"no graph says all that this {type(model).__name__} does: {reason}. Use the converted model itself; "
        f"torch.compile and torch.export take it as it is"
    )


def _reason_against_calls(model: nn.Module) -> str | None:
    for name, parameter in inspect.signature(type(model).forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"its forward takes any number of arguments ({parameter})"
        if parameter.default is not parameter.empty:
            return f"argument {name!r} of its forward is optional, and a graph has one way of being called"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if module is not model):
        return "modules in it have hooks, whose code a graph would leave out"
    return None


def _reason_against_code(module: nn.Module) -> str | None:
    """Return what in a module's forward, or in functions that it calls, a graph would not say."""
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
        return f"the source of {where} is not to be had"
    for node in ast.walk(tree):
        problem = _problem(node)
        if problem:
            return f"{where} {problem} (line {getattr(node, 'lineno', '?')} of it)"
        if isinstance(node, ast.Call):
            called = _callee(node.func, function, owner)
            if called is UNKNOWN:
                return f"{where} calls {ast.unparse(node.func)}, which is not known before it runs"
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
        return f"asks for {node.attr!r}"
    if isinstance(node, ast.Name) and node.id in _ASKING:
        return f"asks by {node.id!r} what a value is"
    return None


def _callee(name: ast.expr, function: Any, owner: type | None) -> Any:
    """Return the function of the user's that a call goes to, None for an operation or a module, or `UNKNOWN`."""
    root, depth = name, 0
    while isinstance(root, ast.Attribute):
        root, depth = root.value, depth + 1
    if not isinstance(root, ast.Name):
        # A method of a result or of `self.layers[0]`: a tensor's or a module's own, but for a base class's forward.
        called_super = isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super"
        return UNKNOWN if called_super else None
    if root.id == "self" and owner is not None:
        found = getattr(owner, name.attr, None) if isinstance(name, ast.Attribute) and depth == 1 else None
        # What the class does not have is the module's own: a child, whose code is looked at where it is entered.
        return found if isinstance(found, types.FunctionType) else None
    if value_of(root, function) is UNKNOWN:
        # A local variable: what is called on it is a tensor's method, and a call of it is that of a module.
        return None
    value = value_of(name, function)
    if value is UNKNOWN:
        return UNKNOWN
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__self__", None), "__name__", "") or ""
    if str(module).split(".")[0] in _OPERATIONS or getattr(builtins, root.id, None) is value:
        return None
    return value if isinstance(value, types.FunctionType) else UNKNOWN

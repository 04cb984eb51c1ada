"""The torch.fx pass: module tree → forest of FX graphs → how every parameter is used.

`torch.fx` cannot trace most models as one graph. So the root is traced with torch.nn's modules as leaves. If a
submodule's forward cannot be traced, that submodule becomes a leaf too, and its own submodules are traced by the same
rule. In the end every module is inside a graph, or is opaque with a reason.

Opaque code is explored as far as it goes (`_Explorer`): what its first operations read is known even if a later one
stops the trace. Such a graph only tells which layers read the same input; it is never executed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from roastify.conversion import isolated_trace
from roastify.conversion.structure import structure_of
from roastify.isolation import random_states_kept, torch_settings_kept, without_warnings
from roastify.layers.kinds import kind_of
from roastify.tensor_values import is_constant


@dataclass(frozen=True)
class TracedRegion:
    """A module that was traced (`graph` is set), or that could not be traced (`reason` is set).

    `explored` is the beginning of the graph of a module that could not be traced; its branches are guesses.
    """

    path: str
    graph: fx.Graph | None = None
    reason: str | None = None
    explored: fx.Graph | None = None


@dataclass(frozen=True)
class WeightUse:
    """One place where a parameter is consumed.

    Args:
        module: path of the module that owns the parameter under this name.
        attribute: the parameter's name in that module.
        op: the consuming operation; `unseen` if only opaque code can use the parameter, `unused` if no code was seen
            to use it.
        through: `module` (its own module's call), `function` (an FX node) or `opaque` (code that FX did not trace).
        position: index of the parameter among a function's arguments.
        calls: number of calls of the module in the graphs; None if no graph has one.
        inputs: names of the values that the operation combines with the parameter, one for each place that was seen.
            Two uses with the same name read the same value.
    """

    module: str
    attribute: str
    op: str
    through: str
    position: int | None = None
    calls: int | None = None
    inputs: tuple[str, ...] = ()


@dataclass
class ParameterInfo:
    """Facts about one parameter. A tied parameter has one entry, under its first name in `named_parameters`."""

    name: str
    aliases: tuple[str, ...]
    holders: tuple[nn.Module, ...]
    """The module of each alias."""
    parameter: nn.Parameter
    uses: list[WeightUse] = field(default_factory=list)
    explored: list[WeightUse] = field(default_factory=list)
    """What opaque code was seen to do with it, as far as that code was explored."""

    @property
    def constant(self) -> bool:
        """Whether all elements are equal, as in a zero-initialised tensor; False on the meta device, without values."""
        values = self.parameter.detach()
        if values.is_meta or values.numel() == 0 or values.is_complex():
            return False
        return is_constant(values)


@dataclass(frozen=True)
class Forest:
    """The result of tracing: the regions, and every parameter with its uses."""

    regions: tuple[TracedRegion, ...]
    parameters: tuple[ParameterInfo, ...]


class _RegionTracer(fx.Tracer):
    """torch.fx's tracer, with untraceable classes as leaves, and a stack of the modules that it is inside of."""

    # Without this, tracing would execute in-place updates of buffers.
    proxy_buffer_attributes = True

    def __init__(self, untraceable: Collection[type[nn.Module]]) -> None:
        super().__init__()
        self.untraceable = untraceable
        self.entered: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.untraceable or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.entered.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result


# What an exploration may do at most, because a loop that waits for a value would go on for ever: operations, questions
# about values, and seconds.
_MOST_OPERATIONS, _MOST_QUESTIONS, _MOST_SECONDS = 20_000, 1000, 1.0


class _ExploredEnough(BaseException):
    """Ends an exploration; no `Exception`, so that the code that is explored does not catch it."""


class _GuessedValue(fx.Proxy):
    """A value of an exploration: all that is asked about it besides its operations is guessed."""

    tracer: _Explorer

    def __getattr__(self, name: str) -> Any:
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        self.tracer.ask()
        return 1

    def __index__(self) -> int:
        self.tracer.ask()
        return 1


class _Explorer(_RegionTracer):
    """A tracer that guesses where torch.fx's gives up: which way a branch goes, and that a value has one item.

    Args:
        untraceable: classes whose modules are leaves.
        guess: what every condition is taken to be.
    """

    trace_asserts = True

    def __init__(self, untraceable: Collection[type[nn.Module]], guess: bool) -> None:
        super().__init__(untraceable)
        self.guess = guess
        self._operations = self._questions = 0
        self._end = time.monotonic() + _MOST_SECONDS

    def ask(self) -> None:
        """Count a question about a value.

        Raises:
            _ExploredEnough: there were too many.
        """
        self._questions += 1
        if self._questions > _MOST_QUESTIONS:
            raise _ExploredEnough

    def create_args_for_root(self, root_fn: Any, *args: Any, **kwargs: Any) -> Any:
        # Torch.fx counts the arguments of the function in a decorator, but would give them to the decorator's code.
        return super().create_args_for_root(inspect.unwrap(root_fn), *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._operations += 1
        if self._operations > _MOST_OPERATIONS or time.monotonic() > self._end:
            raise _ExploredEnough
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _GuessedValue(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.ask()
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            return iter((obj,))

    def keys(self, obj: fx.Proxy) -> Any:
        return ()

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.ask()
        return self.guess


def trace(model: nn.Module) -> Forest:
    """Trace a model into a forest. The model, its state and the random generators do not change."""
    opener = _ForestBuilder()
    opener.open("", model)
    parameters = _collect_parameters(model)
    _collect_uses(opener, parameters)
    return Forest(tuple(opener.regions), tuple(parameters))


class _ForestBuilder:
    def __init__(self) -> None:
        self.regions: list[TracedRegion] = []
        # Why each untraceable class cannot be traced. Once a class could not be traced in one place, it is a leaf
        # everywhere. That loses nothing, because each leaf of another class is traced by itself, and an opaque
        # module's children are.
        self.reasons: dict[type[nn.Module], str] = {}
        self.covered: set[nn.Module] = set()
        self.opaque: list[nn.Module] = []
        # What tracing a module gave, by the module's structure. A model of many experts has thousands that are alike.
        self._traced: dict[Hashable, tuple[fx.Graph | None, fx.Graph | None]] = {}

    def open(self, path: str, module: nn.Module) -> None:
        """Trace `module` as a region, then open the leaves of its graph that are not torch.nn's own."""
        if module in self.covered:
            return
        self.covered.add(module)
        if _is_torch_layer(module):
            # A layer of torch.nn is an operation, not a region. But a container of torch.nn may hold users' modules.
            for name, child in module.named_children():
                self.open(_join(path, name), child)
            return
        graph = None
        if _defines_forward(module):
            graph, explored = self._trace_or_explore(module)
            reason = None if graph else self.reasons[type(module)]
            self.regions.append(TracedRegion(path, graph, reason, explored))
            if graph is None:
                self.opaque.append(module)
        leaves = _leaf_paths(graph) if graph else {name for name, _ in module.named_children()}
        called_inside = _entered_paths(graph) if graph else set()
        for name, child in _below(module, leaves, called_inside):
            self.open(_join(path, name), child)
        if graph:
            for name in called_inside:
                self.covered.add(module.get_submodule(name))

    def _trace_or_explore(self, module: nn.Module) -> tuple[fx.Graph | None, fx.Graph | None]:
        """Return the module's graph; if it has none, the beginning of one."""
        # Classes that were found to be untraceable meanwhile are leaves now.
        key = structure_of(module), len(self.reasons)
        if key not in self._traced:
            graph = self._trace_region(module)
            # Under the number of classes that are known now, because an equal module will find them known.
            self._traced[key[0], len(self.reasons)] = graph, None if graph else self._explore(module)
            return self._traced[key[0], len(self.reasons)]
        return self._traced[key]

    def _trace_region(self, module: nn.Module) -> fx.Graph | None:
        """Return the module's graph, with untraceable submodules as leaves; None if the module cannot be traced."""
        while type(module) not in self.reasons:
            tracer = _RegionTracer(self.reasons.keys())
            try:
                with _alone():
                    return isolated_trace.trace_alone(tracer, _twin(module))
            except (Exception, SystemExit) as error:  # a user's forward may raise any error when it gets a proxy
                entered = (type(m) for m in reversed(tracer.entered) if not tracer.is_leaf_module(m, ""))
                self.reasons[next(entered, type(module))] = _describe(error)
        return None

    def _explore(self, module: nn.Module) -> fx.Graph | None:
        """Return the beginning of the graph of a module that cannot be traced; None if it has no children to call.

        Arguments with the default None are None, as in a call without them. Of two explorations, which guess every
        condition to be false and to be true, the one that called more modules counts.
        """
        if not any(True for _ in module.children()):
            return None
        absent = {name: None for name, default in _defaults(module.forward) if default is None}
        graphs = []
        for guess in (False, True):
            tracer = _Explorer(self.reasons.keys(), guess)
            try:
                with _alone():
                    isolated_trace.trace_alone(tracer, _twin(module), absent)
                return tracer.graph
            except (Exception, SystemExit, _ExploredEnough):
                # A user's code may raise any error when it gets a guess. What it did before is known.
                graphs.append(getattr(tracer, "graph", fx.Graph()))
        return max(graphs, key=lambda graph: sum(node.op == "call_module" for node in graph.nodes))


def _defaults(forward: Any) -> list[tuple[str, Any]]:
    """Return a function's parameters with their defaults; none if it has no signature."""
    try:
        return [(name, parameter.default) for name, parameter in inspect.signature(forward).parameters.items()]
    except (TypeError, ValueError):
        return []


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep what a module's code does while it is traced from everything else."""
    with random_states_kept(), torch_settings_kept(), without_warnings(), isolated_trace.muted():
        yield


def computed_attributes(model: nn.Module) -> Iterator[Tensor]:
    """Yield modules' plain tensors with an autograd history (`weight_norm` keeps one): torch cannot deep-copy them."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value


def _twin(module: nn.Module) -> nn.Module:
    """Return a copy to trace, so that a forward that changes its modules' attributes or tensors changes the copy.

    Its Parameters and buffers have no data, because the tracer replaces them by proxies. It has no hooks, because a
    trace must not run the user's hooks.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in computed_attributes(module)}
    memo |= {id(tensor): _without_data(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    twin = _copied(module, memo)
    for child in twin.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks):
            hooks.clear()
    return twin


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return `copy.deepcopy(module, memo)`, in a tenth of the time: most of what a module holds are empty tables."""
    if id(module) in memo:
        return memo[id(module)]
    kind = type(module)
    # `nn.Module.__setstate__` adds what modules that older versions pickled lack.
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _COPYING):
        return copy.deepcopy(module, memo)
    twin = memo[id(module)] = kind.__new__(kind)
    for key, value in vars(module).items():
        if key == "_modules":
            copied: Any = {name: None if child is None else _copied(child, memo) for name, child in value.items()}
        elif type(value) in _IMMUTABLE:
            copied = value
        elif key == "_compiled_call_impl":
            # `nn.Module.__getstate__` leaves it out.
            continue
        elif type(value) in (dict, OrderedDict, set, list) and not value:
            copied = type(value)()
        else:
            copied = copy.deepcopy(value, memo)
        twin.__dict__[key] = copied
    return twin


# By these names a class decides how it is copied.
_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__new__")
_IMMUTABLE = (int, float, str, bool, type(None))


def _without_data(tensor: Tensor) -> Tensor:
    """Return a tensor like a Parameter or a buffer, on the meta device; one of a class of its own stays as it is."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return tensor
    # `empty_like` takes eight times as long.
    empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _is_torch_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def _defines_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _leaf_paths(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _entered_paths(graph: fx.Graph) -> set[str]:
    """Return the paths of the submodules whose code is inside the graph; FX stores the module stack of every node."""
    paths: set[str] = set()
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for entry in stack.values():
            path = entry[0] if isinstance(entry, tuple) else entry
            if path:
                paths.add(str(path))
    return paths - _leaf_paths(graph)


def _below(module: nn.Module, leaves: set[str], inside: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that must still be opened: leaves of the graph, and modules that the graph does not reach."""
    of_leaves, of_inside = _by_child(leaves), _by_child(inside)
    for name, child in module.named_children():
        deeper, deeper_inside = of_leaves.get(name, set()), of_inside.get(name, set())
        # A container such as ModuleList is never called itself, but its children are.
        if name not in leaves and (name in inside or deeper or deeper_inside):
            for path, grandchild in _below(child, deeper, deeper_inside):
                yield _join(name, path), grandchild
        else:
            yield name, child


def _by_child(paths: set[str]) -> dict[str, set[str]]:
    """Return the paths that lead into each child, from there on."""
    found: dict[str, set[str]] = {}
    for path in paths:
        child, dot, rest = path.partition(".")
        if dot:
            found.setdefault(child, set()).add(rest)
    return found


def _collect_parameters(model: nn.Module) -> list[ParameterInfo]:
    by_id: dict[int, ParameterInfo] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = _join(path, attribute)
            info = by_id.get(id(parameter))
            if info is None:
                by_id[id(parameter)] = ParameterInfo(name, (name,), (module,), parameter)
            else:
                info.aliases += (name,)
                info.holders += (module,)
    return list(by_id.values())


def _collect_uses(opener: _ForestBuilder, parameters: list[ParameterInfo]) -> None:
    calls: dict[str, int] = {}
    inputs: dict[str, list[str]] = {}
    functional: dict[str, list[WeightUse]] = {}
    explored: dict[str, list[WeightUse]] = {}
    for region in opener.regions:
        for node in (region.graph or region.explored or fx.Graph()).nodes:
            if node.op == "call_module":
                path = _join(region.path, str(node.target))
                inputs.setdefault(path, []).extend(_input_names(region.path, (*node.args, *node.kwargs.values())[:1]))
                if region.graph is not None:
                    calls[path] = calls.get(path, 0) + 1
            elif node.op == "get_attr":
                name = _join(region.path, str(node.target))
                found = functional if region.graph is not None else explored
                found.setdefault(name, []).extend(_functional_uses(region.path, name, node))
    # Opaque code may read the parameters of its module and of every module below.
    within_opaque = {id(module) for opaque in opener.opaque for module in opaque.modules()}
    for info in parameters:
        for alias, module in zip(info.aliases, info.holders, strict=True):
            module_path, _, attribute = alias.rpartition(".")
            kind = kind_of(type(module))
            if attribute == "weight" and kind is not None:
                read = tuple(inputs.get(module_path, ()))
                use = WeightUse(module_path, attribute, kind.op, "module", calls=calls.get(module_path), inputs=read)
                info.uses.append(use)
            elif _is_torch_layer(module):
                info.uses.append(
                    WeightUse(module_path, attribute, type(module).__name__, "module", calls=calls.get(module_path))
                )
            info.uses.extend(functional.get(alias, []))
            info.explored.extend(explored.get(alias, []))
            if not any(use.module == module_path and use.attribute == attribute for use in info.uses):
                op = "unseen" if id(module) in within_opaque else "unused"
                info.uses.append(WeightUse(module_path, attribute, op, "opaque"))


def _input_names(region: str, values: Iterable[Any]) -> list[str]:
    return [f"{region}:{value.name}" for value in values if isinstance(value, fx.Node)]


def _functional_uses(region: str, name: str, node: fx.Node) -> Iterator[WeightUse]:
    module, _, attribute = name.rpartition(".")
    for user in node.users:
        position = next((i for i, argument in enumerate(user.args) if argument is node), None)
        target = user.target
        op = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        others = tuple(_input_names(region, user.args[:position]))
        yield WeightUse(module, attribute, str(op), "function", position=position, inputs=others)


def matrix_of(tensor: Tensor) -> tuple[int, int]:
    """Return `(rows, cols)` of a parameter as a matrix: its first size, and the product of its other sizes."""
    if tensor.dim() == 0:
        return 1, 1
    return tensor.shape[0], tensor[0].numel() if tensor.shape[0] else 0

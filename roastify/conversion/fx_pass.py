"""The torch.fx pass: module tree → forest of FX graphs → how every parameter is used.

`torch.fx` cannot trace most models whole, so the root is traced with torch.nn's modules as leaves, and wherever a
submodule's forward cannot be traced it becomes a leaf too and is opened by itself, with the same rule. Every module
ends up inside a graph, or opaque with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from roastify.isolation import random_states_kept, without_warnings
from roastify.layers.kinds import kind_of


@dataclass(frozen=True)
class TracedRegion:
    """A module that was traced, or could not be: `graph` or `reason` is set."""

    path: str
    class_name: str
    graph: fx.Graph | None = None
    reason: str | None = None


@dataclass(frozen=True)
class WeightUse:
    """One place where a parameter is consumed.

    Args:
        module: path of the module that owns the parameter under this name.
        attribute: the parameter's name in it.
        op: the consuming operation; `unseen` for a parameter that only opaque code touches.
        through: `module` (its own module's call), `function` (an FX node) or `opaque` (code that FX did not see).
        position: which argument of a function it is.
        calls: how often the module's call was seen in the graphs; None where its caller is opaque.
    """

    module: str
    attribute: str
    op: str
    through: str
    position: int | None = None
    calls: int | None = None


@dataclass
class ParameterInfo:
    """Facts about one parameter, tied ones once, under the first name that `named_parameters` gives it."""

    name: str
    aliases: tuple[str, ...]
    parameter: nn.Parameter
    uses: list[WeightUse] = field(default_factory=list)

    @property
    def constant(self) -> bool:
        """Whether all elements are equal, as in a zero-initialised tensor; unknown, so False, on the meta device."""
        values = self.parameter.detach()
        if values.is_meta or values.numel() == 0 or values.is_complex():
            return False
        # Most tensors show it in their first elements.
        head = values.reshape(-1)[:64]
        if bool((head != head[0]).any()):
            return False
        return bool((values == head[0]).all())


@dataclass(frozen=True)
class Forest:
    """What tracing found: the regions, and every parameter with its uses."""

    regions: tuple[TracedRegion, ...]
    parameters: tuple[ParameterInfo, ...]


class _RegionTracer(fx.Tracer):
    """torch.fx's tracer, with modules known to be untraceable as leaves, and a record of the modules being traced."""

    # Otherwise in-place updates of buffers would run for real while tracing.
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


def trace(model: nn.Module) -> Forest:
    """Trace a model into a forest; the model, its state and the random generators are left as they were."""
    opener = _ForestBuilder()
    opener.open("", model)
    parameters = _collect_parameters(model)
    _collect_uses(model, opener, parameters)
    return Forest(tuple(opener.regions), tuple(parameters))


class _ForestBuilder:
    def __init__(self) -> None:
        self.regions: list[TracedRegion] = []
        # A class that could not be traced in one place is a leaf from then on: a smaller region loses nothing, since
        # what it leaves out is opened by itself.
        self.reasons: dict[type[nn.Module], str] = {}
        self.covered: set[nn.Module] = set()
        self.opaque: list[nn.Module] = []

    def open(self, path: str, module: nn.Module) -> None:
        """Trace `module` as a region, then open whatever its graph has as a leaf and is not torch.nn's own."""
        if module in self.covered:
            return
        self.covered.add(module)
        if _is_torch_layer(module):
            # torch.nn's layers are operations, not regions; containers among them may hold users' modules.
            for name, child in module.named_children():
                self.open(_join(path, name), child)
            return
        graph = None
        if _defines_forward(module):
            graph = self._trace_region(module)
            reason = None if graph else self.reasons[type(module)]
            self.regions.append(TracedRegion(path, type(module).__name__, graph, reason))
            if graph is None:
                self.opaque.append(module)
        leaves = _leaf_paths(graph) if graph else {name for name, _ in module.named_children()}
        called_inside = _entered_paths(graph) if graph else set()
        for name, child in _below(module, leaves, called_inside):
            self.open(_join(path, name), child)
        if graph:
            for name in called_inside:
                self.covered.add(module.get_submodule(name))

    def _trace_region(self, module: nn.Module) -> fx.Graph | None:
        """Return the module's graph, with submodules that cannot be traced made leaves; None if itself cannot be."""
        while type(module) not in self.reasons:
            tracer = _RegionTracer(self.reasons.keys())
            try:
                with random_states_kept(), without_warnings():
                    return tracer.trace(_twin(module))
            except Exception as error:  # whatever the user's forward raises when it meets a proxy
                entered = (type(m) for m in reversed(tracer.entered) if not tracer.is_leaf_module(m, ""))
                self.reasons[next(entered, type(module))] = _describe(error)
        return None


def computed_attributes(model: nn.Module) -> Iterator[Tensor]:
    """Yield plain tensors with a history that modules keep (the old `weight_norm` does), which torch does not copy."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value


def _twin(module: nn.Module) -> nn.Module:
    """Return a copy to trace, so that what a forward does to its modules' attributes is done to the copy.

    It has the same tensors, which a tracer replaces by proxies, and no hooks, which are the user's own affair.
    """
    tensors = [*module.parameters(), *module.buffers(), *computed_attributes(module)]
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for child in twin.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks):
            hooks.clear()
    return twin


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
    """Return paths of the submodules whose code is inside the graph: FX notes the stack of modules on every node."""
    paths: set[str] = set()
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for entry in stack.values():
            path = entry[0] if isinstance(entry, tuple) else entry
            if path:
                paths.add(str(path))
    return paths - _leaf_paths(graph)


def _below(module: nn.Module, leaves: set[str], inside: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield what must still be opened: leaves of the graph, and modules that it never reached."""
    for name, child in module.named_children():
        deeper = {path[len(name) + 1 :] for path in leaves if path.startswith(name + ".")}
        deeper_inside = {path[len(name) + 1 :] for path in inside if path.startswith(name + ".")}
        # A container such as ModuleList is never called itself, though what it holds is.
        if name not in leaves and (name in inside or deeper or deeper_inside):
            for path, grandchild in _below(child, deeper, deeper_inside):
                yield _join(name, path), grandchild
        else:
            yield name, child


def _collect_parameters(model: nn.Module) -> list[ParameterInfo]:
    found: dict[int, ParameterInfo] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        info = found.get(id(parameter))
        if info is None:
            found[id(parameter)] = ParameterInfo(name, (name,), parameter)
        else:
            info.aliases += (name,)
    return list(found.values())


def _collect_uses(model: nn.Module, opener: _ForestBuilder, parameters: list[ParameterInfo]) -> None:
    calls: dict[str, int] = {}
    functional: dict[str, list[WeightUse]] = {}
    for region in opener.regions:
        if region.graph is None:
            continue
        for node in region.graph.nodes:
            if node.op == "call_module":
                path = _join(region.path, str(node.target))
                calls[path] = calls.get(path, 0) + 1
            elif node.op == "get_attr":
                name = _join(region.path, str(node.target))
                functional.setdefault(name, []).extend(_functional_uses(name, node))
    # Opaque code may read the parameters of anything below it.
    within_opaque = {id(module) for opaque in opener.opaque for module in opaque.modules()}
    for info in parameters:
        for alias in info.aliases:
            module_path, _, attribute = alias.rpartition(".")
            module = model.get_submodule(module_path)
            kind = kind_of(type(module))
            if attribute == "weight" and kind is not None:
                use = WeightUse(module_path, attribute, kind.op, "module", calls=calls.get(module_path))
                info.uses.append(use)
            elif _is_torch_layer(module):
                info.uses.append(
                    WeightUse(module_path, attribute, type(module).__name__, "module", calls=calls.get(module_path))
                )
            info.uses.extend(functional.get(alias, []))
            if not any(use.module == module_path and use.attribute == attribute for use in info.uses):
                op = "unseen" if id(module) in within_opaque else "unused"
                info.uses.append(WeightUse(module_path, attribute, op, "opaque"))


def _functional_uses(name: str, node: fx.Node) -> Iterator[WeightUse]:
    module, _, attribute = name.rpartition(".")
    for user in node.users:
        position = next((i for i, argument in enumerate(user.args) if argument is node), None)
        target = user.target
        op = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        yield WeightUse(module, attribute, str(op), "function", position=position)


def matrix_of(tensor: Tensor) -> tuple[int, int]:
    """Return `(rows, cols)` of a parameter as a matrix: its first size by the product of the others."""
    if tensor.dim() == 0:
        return 1, 1
    return tensor.shape[0], tensor[0].numel() if tensor.shape[0] else 0

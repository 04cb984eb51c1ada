"""Finds in a class's source code how the code uses an attribute.

The scan covers every place where the code names the attribute, in every branch. So its result holds in train and eval
mode, for all arguments and all shapes. Nothing is traced, so no branch or shape becomes a constant.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# The arguments of each function that may be a matrix in the pool: their positions and names.
_PRODUCTS: dict[Any, tuple[tuple[int, ...], tuple[str, ...]]] = {
    F.linear: ((1,), ("weight",)),
    torch.matmul: ((0, 1), ("other",)),
    torch.mm: ((0, 1), ("mat2",)),
    torch.addmm: ((2,), ("mat2",)),
}
_METHODS = ("matmul", "mm")
_LOOKUPS = {F.embedding: ((1,), ("weight",))}
_TRANSPOSES = ("T", "mT")
# Attributes and methods whose results are known without the values.
_FACTS = ("shape", "dtype", "device", "ndim", "requires_grad", "size", "dim", "numel")


@dataclass(frozen=True)
class AttributeUses:
    """How a class's code reads an attribute.

    Args:
        whole: why the code needs the whole dense tensor, or None if its operations can read from the pool.
        orientations: `out×in` for `F.linear(x, w)`, `in×out` for `x @ w`, `rows` for lookups and slices.
        of_parts: whether every part picked by a number (`w[2]`) is used in products only.
        products: a place in the code that multiplies with the whole attribute, not with a part of it, or None.
    """

    whole: str | None = None
    orientations: frozenset[str] = frozenset()
    of_parts: bool = True
    products: str | None = None

    def whole_of(self, dims: int) -> str | None:
        """Return why the code needs a whole tensor of this many dimensions, or None."""
        if self.whole is None and self.products is not None and dims != 2:
            return f"{self.products} multiplies with a tensor of {dims} dimensions"
        return self.whole


class _Whole(Exception):
    """The code needs the whole tensor. The message is the reason that the report shows."""


def tree_of(function: Any) -> ast.FunctionDef | None:
    """Return the syntax tree of a function's source, or None if the source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (OSError, TypeError, SyntaxError, AttributeError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


UNKNOWN = object()


def value_of(expression: ast.expr, function: Any) -> Any:
    """Return the value of a dotted name that is defined outside of a function, or `UNKNOWN`."""
    parts: list[str] = []
    while isinstance(expression, ast.Attribute):
        parts.insert(0, expression.attr)
        expression = expression.value
    if not isinstance(expression, ast.Name):
        return UNKNOWN
    if expression.id in _local_names(function.__code__):
        return UNKNOWN
    value = {**vars(builtins), **function.__globals__, **_closure(function)}.get(expression.id, UNKNOWN)
    for part in parts:
        value = getattr(value, part, UNKNOWN)
    return value


def _local_names(code: types.CodeType) -> set[str]:
    """Return the local variables of a function and of the functions inside it, without its closure's variables."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {*code.co_varnames, *code.co_cellvars}.union(*(_local_names(const) for const in inner))


def _closure(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    variables = {}
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # the variable has no value yet
            variables[name] = cell.cell_contents
    return variables


def uses_in_source(module_class: type[nn.Module], attribute: str) -> AttributeUses:
    """Return how the code that a class's forward reaches reads an attribute."""
    itself: Any = module_class
    return _uses_in_source(itself, attribute, itself.forward)


# The forward is part of the cache's key, because user code may replace a class's forward.
@functools.lru_cache(maxsize=4096)
def _uses_in_source(module_class: Any, attribute: str, forward: Any) -> AttributeUses:
    if module_class.__module__.startswith("torch.nn"):
        return AttributeUses(whole=f"{module_class.__name__} of torch.nn needs the whole tensor")
    if module_class.__getattr__ is not nn.Module.__getattr__:
        return AttributeUses(whole=f"{module_class.__name__} has a __getattr__ of its own, which may read it")
    uses = _UsesOfAttribute(attribute)
    try:
        for function in _running_in_forward(module_class):
            uses.add(function)
    except _Whole as reason:
        return AttributeUses(whole=str(reason))
    if not uses.orientations:
        return AttributeUses(whole=f"the forward of {module_class.__name__} does not name the attribute")
    return AttributeUses(None, frozenset(uses.orientations), uses.of_parts, uses.products)


def _running_in_forward(module_class: type[nn.Module]) -> Iterator[types.FunctionType]:
    """Yield `forward` and every method that it reaches through `self`, each as defined in every base class."""
    names, seen = ["forward", "__call__"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in module_class.__mro__:
            if base is not nn.Module and name in vars(base):
                for function in _functions(vars(base)[name]):
                    yield function
                    names += _own_names(function)


def _own_names(function: types.FunctionType) -> Iterator[str]:
    """Yield the names of the attributes that a method reads from a variable or from `super()`."""
    tree = tree_of(function)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Attribute):
            of = node.value
            if isinstance(of, ast.Name) or (isinstance(of, ast.Call) and ast.unparse(of.func) == "super"):
                yield node.attr


def _functions(member: Any) -> Iterator[types.FunctionType]:
    """Yield the functions of a class's member: of a method, or of a property."""
    if isinstance(member, property):
        members = [member.fget, member.fset]
    else:
        members = [member.__func__ if isinstance(member, staticmethod | classmethod) else member]
    for function in members:
        while hasattr(function, "__wrapped__") and isinstance(function, types.FunctionType):
            if not function.__globals__["__name__"].startswith("torch."):
                raise _Whole(f"{function.__qualname__} is wrapped by a decorator, which receives the module")
            function = getattr(function, "__wrapped__")  # noqa: B009
        if isinstance(function, types.FunctionType):
            yield function


class _UsesOfAttribute:
    """Collects the uses of one attribute from the methods of a class."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.orientations: set[str] = set()
        self.of_parts = True
        self.products: str | None = None

    def add(self, function: types.FunctionType) -> None:
        """Add the uses in a method.

        Raises:
            _Whole: one of the uses needs the whole tensor.
        """
        self.function = function
        tree = tree_of(function)
        if tree is None:
            raise _Whole(f"the source of {function.__qualname__} is not available")
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        if not arguments:
            return
        itself = arguments[0].arg
        self.tree = tree
        self.parents: dict[ast.AST, Any] = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == itself:
                parent = self.parents[node]
                if not (isinstance(parent, ast.Attribute) and parent.value is node):
                    raise self._whole(node, "passes the module itself on")
                if parent.attr == self.attribute and isinstance(parent.ctx, ast.Load):
                    self._use(parent, flipped=False, part=False)

    def _whole(self, node: ast.AST, what: str) -> _Whole:
        line = getattr(node, "lineno", 1)
        return _Whole(f"{self.function.__qualname__} {what} (its line {line})")

    def _use(self, node: ast.expr, flipped: bool, part: bool) -> None:
        """Classify one use. `part`: a part picked from the tensor is used, which may be read by itself."""
        parent = self.parents[node]
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult):
            if parent.left is node:
                # If the left side of a product is not a tensor, torch.compile swaps the two sides (in 2.11 and 2.13).
                raise self._whole(node, "has the attribute on the left of @")
            self._product(node, flipped, part, right=True)
        elif isinstance(parent, ast.Call) and node is not parent.func:
            self._argument(node, parent, None, flipped, part)
        elif isinstance(parent, ast.keyword) and parent.arg is not None:
            call = self.parents[parent]
            assert isinstance(call, ast.Call)
            self._argument(node, call, parent.arg, flipped, part)
        elif isinstance(parent, ast.Attribute):
            self._member(node, parent, flipped, part)
        elif isinstance(parent, ast.Compare) and ast.unparse(parent).endswith((" is None", " is not None")):
            return
        elif isinstance(parent, ast.Subscript) and parent.value is node and not flipped and not part:
            self.orientations.add("rows")
            before = set(self.orientations), self.products
            try:
                self._use(parent, flipped=False, part=True)
            except _Whole:
                # The part is read by itself, as a tensor, so the code may do anything with it.
                self.orientations, self.products = before
                self.of_parts = False
        elif isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            self._variable(parent.targets[0], flipped, part)
        else:
            raise self._whole(node, f"uses the attribute in {_short(parent)}")

    def _product(self, node: ast.expr, flipped: bool, part: bool, right: bool) -> None:
        self.orientations.add("in×out" if right != flipped else "out×in")
        if not part:
            self.products = f"{self.function.__qualname__} (its line {node.lineno})"

    def _argument(self, node: ast.expr, call: ast.Call, name: str | None, flipped: bool, part: bool) -> None:
        position = None if name else call.args.index(node)
        function = value_of(call.func, self.function)
        if isinstance(function, types.BuiltinFunctionType | types.FunctionType):
            if _takes(_PRODUCTS.get(function), position, name):
                like_linear = function is F.linear
                self._product(node, flipped, part, right=not like_linear and position != 0)
                return
            plain = len(call.args) <= 3 and {keyword.arg for keyword in call.keywords} <= {"weight", "padding_idx"}
            if plain or self.function.__module__.startswith("torch.nn"):
                if _takes(_LOOKUPS.get(function), position, name) and not flipped and not part:
                    self.orientations.add("rows")
                    return
        if isinstance(call.func, ast.Attribute) and call.func.attr in _METHODS and position == 0:
            if function is UNKNOWN:
                self._product(node, flipped, part, right=True)
                return
        raise self._whole(node, f"passes the attribute to {ast.unparse(call.func)}")

    def _member(self, node: ast.expr, member: ast.Attribute, flipped: bool, part: bool) -> None:
        parent = self.parents[member]
        called = isinstance(parent, ast.Call) and parent.func is member
        if member.attr in _FACTS:
            return
        if member.attr in _TRANSPOSES:
            self._use(member, not flipped, part)
        elif called and member.attr == "t":
            self._use(parent, not flipped, part)
        elif called and member.attr in _METHODS:
            self._product(node, flipped, part, right=False)
        else:
            raise self._whole(node, f"uses the attribute's {member.attr!r}")

    def _variable(self, target: ast.Name, flipped: bool, part: bool) -> None:
        """Classify the uses of a local variable that holds the attribute and is set once."""
        names = [node for node in ast.walk(self.tree) if isinstance(node, ast.Name) and node.id == target.id]
        if sum(not isinstance(node.ctx, ast.Load) for node in names) != 1:
            raise self._whole(target, f"keeps the attribute in the variable {target.id!r}, whose value changes")
        for node in names:
            if isinstance(node.ctx, ast.Load):
                self._use(node, flipped, part)


def _takes(places: tuple[tuple[int, ...], tuple[str, ...]] | None, position: int | None, name: str | None) -> bool:
    return places is not None and (position in places[0] or name in places[1])


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"

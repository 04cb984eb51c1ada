"""What the code of a module's class does with an attribute, read from its source.

Every place where the code names the attribute is looked at, whichever branch it is in, so what is found holds in train
and eval, for any argument and any shape: nothing is traced, and nothing baked in.
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

# Where each function takes a matrix that may stay in the pool: positions and names of the argument.
_PRODUCTS: dict[Any, tuple[tuple[int, ...], tuple[str, ...]]] = {
    F.linear: ((1,), ("weight",)),
    torch.matmul: ((0, 1), ("other",)),
    torch.mm: ((0, 1), ("mat2",)),
    torch.addmm: ((2,), ("mat2",)),
}
_METHODS = ("matmul", "mm")
_LOOKUPS = {F.embedding: ((1,), ("weight",))}
_TRANSPOSES = ("T", "mT")
# What they tell is known without the values.
_FACTS = ("shape", "dtype", "device", "ndim", "requires_grad", "size", "dim", "numel")


@dataclass(frozen=True)
class AttributeUses:
    """How a class's code reads an attribute.

    Args:
        whole: why the code must be given the whole tensor, or None if its operations can read from the pool.
        orientations: `out×in` for `F.linear(x, w)`, `in×out` for `x @ w`, `rows` for lookups and slices.
        of_parts: whether every part picked by a number (`w[2]`) goes into a product too.
        products: where the attribute as it is, not a part of it, goes into a product, or None.
    """

    whole: str | None = None
    orientations: frozenset[str] = frozenset()
    of_parts: bool = True
    products: str | None = None

    def whole_of(self, dims: int) -> str | None:
        """Return why a tensor of this many dimensions is read whole, or None."""
        if self.whole is None and self.products is not None and dims != 2:
            return f"{self.products} multiplies with all {dims} dimensions of it"
        return self.whole


class _Whole(Exception):
    """The attribute is used in a way that needs all of it, in the words of the report."""


def tree_of(function: Any) -> ast.FunctionDef | None:
    """Return the syntax tree of a function as it was written, or None where its source is not to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (OSError, TypeError, SyntaxError, AttributeError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


UNKNOWN = object()


def value_of(expression: ast.expr, function: Any) -> Any:
    """Return what a dotted name stands for outside of a function, or `UNKNOWN`."""
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
    """Return the variables of a function and of those inside it; not those that it has from around it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {*code.co_varnames, *code.co_cellvars}.union(*(_local_names(const) for const in inner))


def _closure(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found = {}
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            found[name] = cell.cell_contents
    return found


def uses_in_source(module_class: type[nn.Module], attribute: str) -> AttributeUses:
    """Return how the code that runs in a class's forward reads an attribute."""
    itself: Any = module_class
    return _uses_in_source(itself, attribute, itself.forward)


# With the forward, because classes have theirs replaced.
@functools.lru_cache(maxsize=4096)
def _uses_in_source(module_class: Any, attribute: str, forward: Any) -> AttributeUses:
    if module_class.__module__.startswith("torch.nn"):
        return AttributeUses(whole=f"{module_class.__name__} of torch.nn takes all of it")
    if module_class.__getattr__ is not nn.Module.__getattr__:
        return AttributeUses(whole=f"{module_class.__name__} looks attributes up by a __getattr__ of its own")
    found = _Found(attribute)
    try:
        for function in _running_in_forward(module_class):
            found.look_at(function)
    except _Whole as reason:
        return AttributeUses(whole=str(reason))
    if not found.orientations:
        return AttributeUses(whole=f"the forward of {module_class.__name__} does not name it")
    return AttributeUses(None, frozenset(found.orientations), found.of_parts, found.products)


def _running_in_forward(module_class: type[nn.Module]) -> Iterator[types.FunctionType]:
    """Yield `forward` and the methods that it reaches through `self`, as each base class defines them."""
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
    """Yield the names that a method looks up on its module, or on `super()`."""
    tree = tree_of(function)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Attribute):
            of = node.value
            if isinstance(of, ast.Name) or (isinstance(of, ast.Call) and ast.unparse(of.func) == "super"):
                yield node.attr


def _functions(member: Any) -> Iterator[types.FunctionType]:
    """Yield the functions behind a class's member: a method's, or a property's."""
    if isinstance(member, property):
        members = [member.fget, member.fset]
    else:
        members = [member.__func__ if isinstance(member, staticmethod | classmethod) else member]
    for function in members:
        while hasattr(function, "__wrapped__") and isinstance(function, types.FunctionType):
            if not function.__globals__["__name__"].startswith("torch."):
                raise _Whole(f"{function.__qualname__} is wrapped by a decorator, which is handed the module")
            function = getattr(function, "__wrapped__")  # noqa: B009
        if isinstance(function, types.FunctionType):
            yield function


class _Found:
    """The uses of one attribute."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.orientations: set[str] = set()
        self.of_parts = True
        self.products: str | None = None

    def look_at(self, function: types.FunctionType) -> None:
        """Add what a method does.

        Raises:
            _Whole: it does something that needs the whole tensor.
        """
        self.function = function
        tree = tree_of(function)
        if tree is None:
            raise _Whole(f"the source of {function.__qualname__} is not to be had")
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
                    raise self._whole(node, "hands the module itself on")
                if parent.attr == self.attribute and isinstance(parent.ctx, ast.Load):
                    self._use(parent, flipped=False, part=False)

    def _whole(self, node: ast.AST, what: str) -> _Whole:
        line = getattr(node, "lineno", 1)
        return _Whole(f"{self.function.__qualname__} {what} (line {line} of it)")

    def _use(self, node: ast.expr, flipped: bool, part: bool) -> None:
        """Classify one use; `part` says that it is a part picked from the tensor, which may be read by itself."""
        parent = self.parents[node]
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult):
            if parent.left is node:
                # torch.compile turns a product around whose left side is no tensor (2.11 and 2.13 do).
                raise self._whole(node, "has it on the left of @")
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
                # The part is read by itself, as a tensor that may go anywhere.
                self.orientations, self.products = before
                self.of_parts = False
        elif isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            self._variable(parent.targets[0], flipped, part)
        else:
            raise self._whole(node, f"uses it in {_short(parent)}")

    def _product(self, node: ast.expr, flipped: bool, part: bool, right: bool) -> None:
        self.orientations.add("in×out" if right != flipped else "out×in")
        if not part:
            self.products = f"{self.function.__qualname__} (line {node.lineno} of it)"

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
        raise self._whole(node, f"gives it to {ast.unparse(call.func)}")

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
            raise self._whole(node, f"uses its {member.attr!r}")

    def _variable(self, target: ast.Name, flipped: bool, part: bool) -> None:
        """Follow a local variable that is set once."""
        names = [node for node in ast.walk(self.tree) if isinstance(node, ast.Name) and node.id == target.id]
        if sum(not isinstance(node.ctx, ast.Load) for node in names) != 1:
            raise self._whole(target, f"keeps it in {target.id!r}, which changes")
        for node in names:
            if isinstance(node.ctx, ast.Load):
                self._use(node, flipped, part)


def _takes(places: tuple[tuple[int, ...], tuple[str, ...]] | None, position: int | None, name: str | None) -> bool:
    return places is not None and (position in places[0] or name in places[1])


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"

"""In which order a module's forward() uses its children, read from its source: nothing is run, no input is needed."""

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass, field
from types import FunctionType

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)

# Methods that hand out a module and do not run it: their bodies say nothing about the order.
_ACCESSORS = {"get_input_embeddings", "get_output_embeddings", "get_encoder", "get_decoder"}


@dataclass
class Uses:
    """Children and own parameters of one module, by name."""

    order: list[str] = field(default_factory=list)  # as forward() first uses them
    loops: list[list[str]] = field(default_factory=list)  # those that one innermost `for` mentions, one list a loop


def uses(module: nn.Module) -> Uses:
    """What ``module.forward`` uses, through the methods and properties of its class that it calls.

    Containers and modules of one child need no source: their order is that of registration. A forward without
    readable source uses nothing.
    """
    members = [*module._modules, *module._parameters]
    if isinstance(module, CONTAINERS) or len(members) == 1:
        return Uses(members)
    reader = _Reader(module, set(members))
    reader.read(type(module), "forward")
    run = {name for name, runs in reader.found if runs}
    order = dict.fromkeys(name for name, runs in reader.found if runs or name not in run)
    return Uses(list(order), [list(dict.fromkeys(loop)) for loop in reader.loops])


@functools.lru_cache(maxsize=4096)
def _parsed(function: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source, or none that is a function's
        return None
    return tree if isinstance(tree, ast.FunctionDef) and tree.args.args else None


class _Reader(ast.NodeVisitor):
    """Reads forward() from top to bottom, and each method of the class where it is called first."""

    def __init__(self, module: nn.Module, members: set[str]):
        self.module, self.members = module, members
        self.found: list[tuple[str, bool]] = []  # (name, whether that runs it or merely touches an attribute of it)
        self.loops: list[list[str]] = []
        self._open: list[list[str]] = []  # the loops around the present place
        self._methods: set[FunctionType] = set()  # read already, so that recursion ends
        self._class: type = type(module)
        self._self = "self"

    def read(self, cls: type, name: str) -> None:
        """Read the method or property ``name`` as ``cls`` finds it."""
        owner = next((c for c in cls.__mro__ if name in vars(c)), None)
        if owner is None or owner in nn.Module.__mro__ or name in _ACCESSORS:
            return
        function = inspect.unwrap(getattr(vars(owner)[name], "fget", vars(owner)[name]))
        tree = _parsed(function) if isinstance(function, FunctionType) else None
        if tree is None or function in self._methods:
            return
        self._methods.add(function)
        outer = self._class, self._self
        self._class, self._self = owner, tree.args.args[0].arg
        for statement in tree.body:
            self.visit(statement)
        self._class, self._self = outer

    def use(self, name: str, runs: bool = True) -> None:
        if name not in self.members:
            self.read(type(self.module), name)
            return
        self.found.append((name, runs))
        if self._open and runs:
            self._open[-1].append(name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = _chain(node)
        if chain and chain[0] == self._self:
            self.use(chain[1], runs=len(chain) == 2)
        elif isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
            above = type(self.module).__mro__
            owner = next((c for c in above[above.index(self._class) + 1 :] if node.attr in vars(c)), None)
            if owner is not None:
                self.read(owner, node.attr)
        else:
            self.generic_visit(node)

    def _is_network(self, path: list[str]) -> bool:
        """Whether self.a.b is more than a leaf: self.language_model.embed_tokens(x) does not run the language model."""
        target: object = self.module
        for name in path:
            if name == "forward":
                break
            target = getattr(target, name, None)
        return isinstance(target, nn.Module) and next(target.children(), None) is not None

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", None) == "len":  # of a list that runs elsewhere
            return
        chain = _chain(node.func)
        name = _name_in_getattr(node, self._self, self.module)
        if len(chain) > 2 and chain[0] == self._self and self._is_network(chain[1:]):
            name = chain[1]
        if name is not None:
            self.use(name)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        # a method whose result is dropped, such as RWKV's _rescale_layers(), touches modules but passes nothing on
        chain = _chain(node.value.func) if isinstance(node.value, ast.Call) else []
        if len(chain) != 2 or chain[0] != self._self or chain[1] in self.members:
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        # `if self.pooler is not None` asks for a module, and does not use it
        if not any(isinstance(other, ast.Constant) and other.value is None for other in node.comparators):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # runs before its targets are stored

    def visit_For(self, node: ast.For) -> None:
        self._open.append([])
        self.generic_visit(node)
        self.loops.append(self._open.pop())


def _chain(node: ast.expr) -> list[str]:
    """["self", "a", "b"] of the expression self.a.b, ["self", "a", "[]", "b"] of self.a[0].b; [] of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        names.append(node.attr if isinstance(node, ast.Attribute) else "[]")
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _name_in_getattr(node: ast.Call, self_name: str, module: nn.Module) -> str | None:
    """``name`` in getattr(self, "name"), or in getattr(self, self.attribute) where that holds a string."""
    if getattr(node.func, "id", None) != "getattr" or getattr(node.args[0], "id", None) != self_name:
        return None
    which = _chain(node.args[1])
    value = getattr(module, which[1], None) if which[:1] == [self_name] else getattr(node.args[1], "value", None)
    return value if isinstance(value, str) else None

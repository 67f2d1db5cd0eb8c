"""The places of a template that spend work: loops, outputs and operators.

``add_meters`` rewrites the tree of a template once, before it is compiled: it wraps expressions
into filters that spend what they cost. Calls, filters and tests that the template itself names are
priced in ``template_prices``.
"""

from collections.abc import Sized
from functools import reduce
from operator import add
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.visitor import NodeTransformer

from s1engine.template_work import ATOMS, SEEN, STEP, Work

TEXT, SIZED, WALKED, ADDED, CONTAINED, STEPPED = (
    f"<{name}>" for name in ("text", "sized", "walked", "added", "contained", "stepped")
)
"""Names of the filters that ``add_meters`` inserts; no template can spell them."""


# --- filters of inserted nodes ---


@pass_context
def _text(context: Any, value: Any) -> str:
    """What an output writes."""
    work: Work = context.work
    if isinstance(value, str):
        text: str = value
    else:
        work.walk(value)
        text = str(value)
    work.left = left = work.left - len(text)
    if left < 0:
        work.spend(0)
    return text


@pass_context
def _sized(context: Any, value: Any) -> Any:
    context.work.spend_size(value)
    return value


@pass_context
def _walked(context: Any, value: Any) -> Any:
    if type(value) not in ATOMS:
        context.work.walk(value)
    return value


@pass_context
def _added(context: Any, terms: list[Any]) -> Any:
    """The sum of ``terms``, from left to right."""
    size = 0
    for term in terms:
        if type(term) is str or isinstance(term, Sized):
            size += len(term)
    context.work.spend(size + size * len(terms) // SEEN)
    return reduce(add, terms)


@pass_context
def _contained(context: Any, value: Any, container: Any) -> bool:
    """Is ``value`` in ``container``?"""
    if type(container) is str:
        context.work.spend(len(container) // SEEN)
        return value in container
    size = context.work.walk(value)
    if isinstance(container, Sized) and not isinstance(container, dict):
        context.work.spend(size * len(container))
    return value in container


@pass_context
def _stepped(context: Any, cost: int) -> None:
    work: Work = context.work
    work.left = left = work.left - cost
    if left < 0:
        work.spend(0)


METERS = {
    TEXT: _text,
    SIZED: _sized,
    WALKED: _walked,
    ADDED: _added,
    CONTAINED: _contained,
    STEPPED: _stepped,
}
"""Filters by name."""


# --- the tree of a template ---


def add_meters(template: nodes.Template, environment: Environment) -> bool:
    """Inserts METERS into a template that ``environment`` has parsed. Returns whether it can make
    containers that hold one value many times; without them all values are trees, no larger than
    the request.

    Raises TemplateSyntaxError for tags that read other templates: there are none.
    """
    meters = _Meters()
    meters.visit(template)
    template.set_environment(environment)
    return meters.shares_values


class _Meters(NodeTransformer):
    """Loops and macros pay for each pass, operators and outputs for what they make."""

    def __init__(self) -> None:
        self.shares_values = False

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            child if _is_paid_text(child) else _metered(TEXT, child) for child in node.nodes
        ]
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.test is not None:
            node.iter = _metered(SIZED, node.iter)
        _add_step(node)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        _add_step(node)
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        terms: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            terms.append(self.visit(left.right))
            left = left.left
        terms.append(self.visit(left))
        self.shares_values |= not any(isinstance(term, nodes.Const) for term in terms)
        return _metered(ADDED, nodes.List(terms[::-1], lineno=node.lineno))

    def visit_Sub(self, node: nodes.Sub) -> nodes.Node:
        """The difference of two sets of keys."""
        self.generic_visit(node)
        if not isinstance(node.left, nodes.Const) and not isinstance(node.right, nodes.Const):
            node.left, node.right = (_metered(SIZED, x) for x in (node.left, node.right))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            child if _is_paid_text(child) else _metered(TEXT, child) for child in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if all(map(_is_constant, (node.expr, *(op.expr for op in node.ops)))):
            return node
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            (operand,) = node.ops
            if _is_constant(operand.expr):
                return node
            contained = _metered(CONTAINED, node.expr, operand.expr)
            if operand.op == "in":
                return contained
            return nodes.Not(contained, lineno=node.lineno)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                raise TemplateSyntaxError("'in' within a chain of comparisons", node.lineno)
        if len(node.ops) > 1 or not any(map(_is_atom, (node.expr, node.ops[0].expr))):
            node.expr = _metered(WALKED, node.expr)
            for operand in node.ops:
                operand.expr = _metered(WALKED, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _metered(SIZED, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """A tuple may become a key, whose hash visits all that it holds."""
        self.generic_visit(node)
        self.shares_values |= node.ctx == "load" and not _is_constant(node)
        is_value = node.ctx == "load" and not _is_constant(node)
        return _metered(WALKED, node) if is_value else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        self.shares_values |= not _is_constant(node)
        return node

    def visit_Mul(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        self.shares_values = True
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        self.shares_values |= node.name in ("batch", "slice", "groupby", "dictsort")
        self.shares_values |= node.name == "map" and bool(node.args)
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        self.shares_values |= node.name == "dict"
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        self.shares_values |= not _is_constant(node.value)
        if not isinstance(node.key, nodes.Const):
            node.key = _metered(WALKED, node.key)
        return node

    def visit_Include(self, node: nodes.Stmt) -> nodes.Node:
        raise TemplateSyntaxError("a chat template is one file: it reads no others", node.lineno)

    visit_Import = visit_FromImport = visit_Extends = visit_Include


def _metered(name: str, value: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _add_step(node: Any) -> None:
    """Lets the body of ``node`` pay for a step and the text that it holds."""
    cost = STEP + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    price = _metered(STEPPED, nodes.Const(cost, lineno=node.lineno))
    node.body.insert(0, nodes.ExprStmt(price, lineno=node.lineno))


def _is_paid_text(node: nodes.Expr) -> bool:
    """Is this certainly a text that its filter or operator has paid for, or a literal?"""
    if isinstance(node, nodes.Filter) and isinstance(node.node, nodes.List) and node.name == ADDED:
        return any(isinstance(term, nodes.Const | nodes.Concat) for term in node.node.items)
    if isinstance(node, nodes.Filter):
        return node.name in ("tojson", "trim")
    return isinstance(node, nodes.TemplateData | nodes.Const | nodes.Concat)


def _is_atom(node: nodes.Expr) -> bool:
    """A literal or certainly a number, which compares with anything at once."""
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return node.node.name == "loop" and node.attr not in ("previtem", "nextitem")
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count")
    return isinstance(node, nodes.Sub) or _is_constant(node)


def _is_constant(node: nodes.Expr) -> bool:
    """A literal, or a list or tuple of literals."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)

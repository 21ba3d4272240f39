"""Mutants of a Python module, made from its syntax tree; all of them compile."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection

from .mutant import Mutant, another

TURNED: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
}
EQUALITIES = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
EXTREMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def mutants(path: str, source: str, within: Collection[str] = ()) -> list[Mutant]:
    """Return all mutants of a module, in the order of their places.

    Args:
        path: the module's file.
        source: what is in it.
        within: qualified names of the functions and classes to change; all of the module if it is empty.

    Raises:
        ValueError: a name in `within` is not in the module.
    """
    finder = _Finder(path, source, within)
    finder.visit(ast.parse(source))
    missing = set(within) - finder.seen
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: correct the table in guards.py")
    return sorted(finder.found, key=lambda mutant: (mutant.start, mutant.end, mutant.text))


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: str, within: Collection[str]) -> None:
        self._path, self._source, self._within = path, source, within
        self._lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._name: list[str] = []
        self._functions = 0
        self._in_condition = False
        self._wanted = not within
        self.seen: set[str] = set()
        self.found: list[Mutant] = []

    # -- places
    def _offset(self, line: int, column: int) -> int:
        """Turn the tree's line and column, which counts bytes, into an offset."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._offset(node.lineno, node.col_offset)

    def _end(self, node: ast.expr | ast.stmt) -> int:
        return self._offset(node.end_lineno or 0, node.end_col_offset or 0)

    def _note(self, start: int, end: int, text: str) -> None:
        line = self._source.count("\n", 0, start) + 1
        mutant = Mutant(self._path, line, start, end, text, loaded=not self._functions)
        if self._wanted and self._source[start:end] != text:
            compile(mutant.apply(self._source), self._path, "exec")
            self.found.append(mutant)

    def _between(self, left: ast.expr, right: ast.expr, word: str, other: str) -> None:
        """Change the operator between two expressions."""
        start, end = self._end(left), self._start(right)
        gap = re.sub(r"#.*", lambda comment: " " * len(comment.group()), self._source[start:end])
        pattern = r"\s+".join(rf"\b{part}\b" if part.isalpha() else re.escape(part) for part in word.split())
        match = re.search(pattern, gap)
        if match:
            self._note(start + match.start(), start + match.end(), other)

    # -- scopes
    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        before = self._wanted
        self._name.append(node.name)
        name = ".".join(self._name)
        self.seen.add(name)
        self._wanted = before or name in self._within
        functions = self._functions
        self._functions += not isinstance(node, ast.ClassDef)
        self._block(node.body)
        self._functions = functions
        self._wanted = before
        self._name.pop()

    def visit_Module(self, node: ast.Module) -> None:
        self._block(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._scope(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope(node)

    # -- statements
    def _block(self, body: list[ast.stmt], alone_is_condition: bool = False) -> None:
        for statement in body:
            if _deletable(statement) and not (alone_is_condition and len(body) == 1):
                self._note(self._start(statement), self._end(statement), "pass")
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self._block(node.body, alone_is_condition=not node.orelse)
        self._block(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test, ("False",))  # True would not end
        self._block(node.body)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._block(node.body)
        self._block(node.orelse)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item)
        self._block(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        self._block(node.body)
        for handler in node.handlers:
            self._block(handler.body)
        self._block(node.orelse)
        self._block(node.finalbody)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # an annotation decides nothing
        if node.value:
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring decides nothing
            self.visit(node.value)

    # -- expressions
    def _condition(self, test: ast.expr, values: Collection[str] = ("True", "False")) -> None:
        for value in values:
            # Whoever notices a deleted operand of `and` notices True for all of it, and False likewise for `or`.
            if not (isinstance(test, ast.BoolOp) and value == _neutral(test)):
                self._note(self._start(test), self._end(test), value)
        outer, self._in_condition = self._in_condition, True
        self.visit(test)
        self._in_condition = outer

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        for test in node.ifs:
            self._condition(test)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        # An operand is deleted. Whoever notices that would notice `or` for `and`, too.
        for value in node.values:
            self._note(self._start(value), self._end(value), _neutral(node))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
            if not (self._in_condition and isinstance(operator, EQUALITIES)):  # True and False say more
                self._between(left, right, *TURNED[type(operator)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in TURNED and not _is_text(node.left) and not _is_text(node.right):
            self._between(node.left, node.right, *TURNED[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not) and not self._in_condition:
            self._note(self._start(node), self._start(node.operand), "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_log(node):
            return
        name = node.func
        if isinstance(name, ast.Name) and name.id in EXTREMES:
            self._note(self._start(name), self._end(name), EXTREMES[name.id])
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:  # text for people
        pass

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._note(self._start(node), self._end(node), str(not node.value))
        elif isinstance(node.value, int | float):
            self._note(self._start(node), self._end(node), repr(another(node.value)))


def _deletable(statement: ast.stmt) -> bool:
    """Whether a module without the statement still knows all its names."""
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant) and not _is_log(statement.value)
    if isinstance(statement, ast.Assign):
        return not any(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets)
    if isinstance(statement, ast.Return):
        return statement.value is None or isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.AugAssign | ast.Raise | ast.For | ast.Continue | ast.Break)


def _is_log(node: ast.expr) -> bool:
    """Whether it is a line for the log, which decides no record's fate."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")


def _neutral(node: ast.BoolOp) -> str:
    """What decides nothing as an operand."""
    return "True" if isinstance(node.op, ast.And) else "False"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))

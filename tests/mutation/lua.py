"""Mutants of a Lua 5.1 script.

A small parser finds statements, conditions and operators, so that nearly every mutant is valid Lua. The compiler of a
server checks each of them all the same, see `runs.valid_lua`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from .mutant import Mutant, another, line_of

BOUNDS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
TURNED = {**BOUNDS, "==": "~=", "~=": "==", "+": "-", "-": "+"}
NEUTRAL = {"and": "true", "or": "false"}
"""An operand of these is deleted by one that decides nothing. Whoever notices that would notice `or` for `and`, too."""

CLOCK = re.compile(r"\bnow\b")
"""Redis's own clock, which no test stops: whether a millisecond counts as over or not is left alone."""

BINARY = {
    "or": (1, 1), "and": (2, 2), "<": (3, 3), ">": (3, 3), "<=": (3, 3), ">=": (3, 3), "~=": (3, 3), "==": (3, 3),
    "..": (5, 4), "+": (6, 6), "-": (6, 6), "*": (7, 7), "/": (7, 7), "%": (7, 7), "^": (10, 9),
}  # fmt: skip
"""Left and right priority, as in Lua's own parser."""
UNARY = 8

TOKEN = re.compile(
    r"(?P<skip>\s+|--\[\[.*?\]\]|--[^\n]*)"
    r"|(?P<number>0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][+-]?\d+)?)"
    r"|(?P<string>'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"|\[\[.*?\]\])"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<symbol>\.\.\.|\.\.|==|~=|<=|>=|[-+*/%^#<>=(){}\[\];:,.])",
    re.DOTALL,
)


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


def mutants(path: str, source: str) -> list[Mutant]:
    """Return all mutants of a script, in the order of their places.

    Raises:
        SyntaxError: the script is no Lua that this parser knows.
    """
    parser = _Parser(path, source)
    parser.block()
    parser.expect("")
    return sorted(parser.found, key=lambda mutant: (mutant.start, mutant.end, mutant.text))


def tokens(source: str) -> list[Token]:
    """Return the tokens of a script without spaces and comments, and an empty one at the end."""
    made, at = [], 0
    while at < len(source):
        match = TOKEN.match(source, at)
        if match is None:
            raise SyntaxError(f"line {line_of(source, at)}: no Lua token: {source[at : at + 20]!r}")
        if match.lastgroup != "skip":
            made.append(Token(match.lastgroup or "", match.group(), match.start(), match.end()))
        at = match.end()
    return [*made, Token("end", "", at, at)]


class _Parser:
    """Walks over the statements once and notes what can be changed."""

    def __init__(self, path: str, source: str) -> None:
        self._path, self._source, self._tokens, self._at = path, source, tokens(source), 0
        self.found: list[Mutant] = []

    # -- tokens
    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    @property
    def _end(self) -> int:
        """Where the last token ended."""
        return self._tokens[self._at - 1].end

    def _is(self, *texts: str) -> bool:
        return self._next.kind != "string" and self._next.text in texts

    def _accept(self, *texts: str) -> bool:
        if self._is(*texts):
            self._at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        """Go on behind a token that has to be there."""
        if not self._accept(text):
            where = line_of(self._source, self._next.start)
            raise SyntaxError(f"{self._path}:{where}: expected {text or 'the end'!r}, found {self._next.text!r}")

    def _note(self, start: int, end: int, text: str) -> None:
        self.found.append(Mutant(self._path, line_of(self._source, start), start, end, text))

    # -- statements
    def block(self, alone_is_condition: bool = False) -> None:
        """Read statements up to the end of their block.

        Args:
            alone_is_condition: a single statement is not deleted. Its condition turns false, which is the same.
        """
        deletable: list[tuple[int, int]] = []
        count = 0
        while not self._is("", "end", "else", "elseif", "until"):
            start = self._next.start
            if self._statement():
                deletable.append((start, self._end))
            count += 1
            self._accept(";")
        if not (alone_is_condition and count == 1):
            for start, end in deletable:
                self._note(start, end, "do end")

    def _statement(self) -> bool:
        """Read a statement; return whether its deletion is a mutant of its own."""
        if self._accept("if"):
            self._condition("then", ("true", "false"))
            self._branch()
        elif self._accept("while"):
            self._condition("do", ("false",))  # true would not end
            self.block()
            self.expect("end")
        elif self._accept("do"):
            self.block()
            self.expect("end")
        elif self._accept("repeat"):
            self.block()
            self.expect("until")
            self._condition(None, ("true",))
        elif self._accept("for"):
            while not self._accept("do"):
                if not self._accept("=", "in", ","):
                    self._expression()
            self.block()
            self.expect("end")
            return True
        elif self._accept("function"):
            while self._accept(".", ":") or self._next.kind == "name":
                self._at += self._next.kind == "name"
            self._function()
        elif self._accept("local"):
            if self._accept("function"):
                self._at += 1
                self._function()
            else:
                self._list()
                if self._accept("="):
                    self._list()
        elif self._accept("return"):
            if not self._is("", "end", "else", "elseif", "until", ";"):
                self._list()
        elif self._accept("break"):
            return True
        else:
            self._list()
            if self._accept("="):
                self._list()
            return True
        return False

    def _branch(self) -> None:
        """Read what follows `then`, up to the last `end`."""
        at = self._at
        noted = len(self.found)
        self.block(alone_is_condition=True)
        if self._is("elseif", "else"):  # deleted alone it leaves the condition in the way of the others
            del self.found[noted:]
            self._at = at
            self.block()
        if self._accept("elseif"):
            self._condition("then", ("true", "false"))
            self._branch()
            return
        if self._accept("else"):
            self.block()
        self.expect("end")

    def _function(self) -> None:
        self.expect("(")
        while not self._accept(")"):
            self._at += 1
        self.block()
        self.expect("end")

    def _condition(self, closed_by: str | None, values: Collection[str]) -> None:
        start, noted = self._next.start, len(self.found)
        operator = self._expression()
        end = self._end
        self.found[noted:] = [mutant for mutant in self.found[noted:] if not self._negates(mutant)]
        for value in values:
            # Whoever notices a deleted operand of `and` notices `true` for all of it, and `false` likewise for `or`.
            if self._source[start:end] != value and NEUTRAL.get(operator) != value:
                self._note(start, end, value)
        if closed_by:
            self.expect(closed_by)

    def _negates(self, mutant: Mutant) -> bool:
        """Whether it turns what is true into what is false. In a condition, `true` and `false` say more."""
        return mutant.text in ("==", "~=") or self._source[mutant.start : mutant.end].startswith("not ")

    # -- expressions
    def _list(self) -> None:
        self._expression()
        while self._accept(","):
            self._expression()

    def _expression(self, limit: int = 0) -> str:
        """Read an expression; return the operator that is evaluated last, "" for none."""
        start, last = self._next.start, ""
        if self._is("not", "-", "#"):
            operator = self._next
            self._at += 1
            operand = self._next.start
            self._expression(UNARY)
            last = operator.text
            if last == "not":
                self._note(operator.start, operand, "")
        else:
            self._primary()
        while self._next.kind != "string" and BINARY.get(self._next.text, (0, 0))[0] > limit:
            operator, left_end = self._next, self._end
            self._at += 1
            right_start = self._next.start
            self._expression(BINARY[operator.text][1])
            last = operator.text
            timed = last in BOUNDS and CLOCK.search(self._source, start, self._end)
            makes_number = (
                last == "+" and self._source[right_start : self._end] == "0"
            )  # Lua's way to read a text as one
            if last in TURNED and not timed and not makes_number:
                self._note(operator.start, operator.end, TURNED[last])
            if last in NEUTRAL:
                self._note(start, left_end, NEUTRAL[last])
                self._note(right_start, self._end, NEUTRAL[last])
        return last

    def _primary(self) -> None:
        token = self._next
        if token.kind == "string" or self._is("nil", "..."):
            self._at += 1
        elif self._is("true", "false"):
            self._at += 1
            self._note(token.start, token.end, "false" if token.text == "true" else "true")
        elif token.kind == "number":
            self._at += 1
            self._note(token.start, token.end, _one_more(token.text))
        elif self._accept("function"):
            self._function()
        elif self._is("{"):
            self._table()
        else:
            self._prefix()

    def _prefix(self) -> None:
        if self._accept("("):
            self._expression()
            self.expect(")")
        elif self._next.kind == "name":
            if [token.text for token in self._tokens[self._at : self._at + 2]] == ["math", "."]:
                self._extreme(self._tokens[self._at + 2])
            self._at += 1
        else:
            self.expect("an expression")
        while True:
            if self._accept(".", ":"):
                self._at += 1
            elif self._accept("["):
                if self._next.kind == "number":  # which argument, or which part of an answer: no rule
                    self._at += 1
                elif self._is("#") and [token.text for token in self._tokens[self._at + 2 : self._at + 4]] == [
                    "+",
                    "1",
                ]:
                    self._at += 4  # Lua's way to append
                else:
                    self._expression()
                self.expect("]")
            elif self._accept("("):
                if not self._is(")"):
                    self._list()
                self.expect(")")
            elif self._next.kind == "string":
                self._at += 1
            else:
                return

    def _extreme(self, token: Token) -> None:
        other = {"min": "max", "max": "min"}.get(token.text)
        if other:
            self._note(token.start, token.end, other)

    def _table(self) -> None:
        self.expect("{")
        while not self._accept("}"):
            if self._accept("["):
                self._expression()
                self.expect("]")
                self.expect("=")
            elif self._next.kind == "name" and self._tokens[self._at + 1].text == "=":
                self._at += 2
            self._expression()
            self._accept(",", ";")


def _one_more(number: str) -> str:
    return str(another(int(number, 0) if re.fullmatch(r"\d+|0[xX][0-9a-fA-F]+", number) else float(number)))

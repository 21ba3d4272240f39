"""The tool that deletes or turns one rule at a time: what it changes, that it shows survivors, and what it refuses."""

from __future__ import annotations

import pytest

from mutation import lua, python, table
from mutation.guards import ROOT, TARGETS, Target, missing
from mutation.mutant import Mutant


def changed(mutants: list[Mutant], source: str) -> list[str]:
    """The texts that the mutants of a source are, without spaces at the ends."""
    return [mutant.apply(source).strip() for mutant in mutants]


class TestLua:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("if a then b() end", ["if true then b() end", "if false then b() end"]),
            ("if not a then b() end", ["if true then b() end", "if false then b() end"]),
            ("if a == b then c() end", ["if true then c() end", "if false then c() end"]),
            ("while a do b() end", ["while false do b() end", "while a do do end end"]),
            ("a = b < c", ["do end", "a = b <= c"]),
            ("a = b ~= c", ["do end", "a = b == c"]),
            ("local a = b or c", ["local a = false or c", "local a = b or false"]),
            ("local a = not b", ["local a = b"]),
            ("local a = 1", ["local a = 2"]),
            ("local a = 1000", ["local a = 2000"]),
            ("local a = b + c", ["local a = b - c"]),
            ("local a = math.min(b, c)", ["local a = math.max(b, c)"]),
            ("return true", ["return false"]),
            ("call(a)", ["do end"]),
            ("a = 1; call(b)", ["do end; call(b)", "a = 2; call(b)", "a = 1; do end"]),
            ("for i = 1, n do a(i) end", ["for i = 2, n do a(i) end", "for i = 1, n do do end end", "do end"]),
        ],
    )
    def test_each_rule_is_deleted_or_turned(self, source: str, expected: list[str]) -> None:
        assert sorted(changed(lua.mutants("x.lua", source), source)) == sorted(expected)

    def test_an_operand_that_decides_is_deleted(self) -> None:
        source = "if a and b then c() end"
        assert changed(lua.mutants("x.lua", source), source) == [
            "if true and b then c() end",
            "if false then c() end",
            "if a and true then c() end",
        ]

    @pytest.mark.parametrize(
        "source",
        [
            "local a = redis.call('GET', KEYS[1])",
            "local a = b[#b + 1]",
            "-- if a then b() end",
            "local a = 'if b then c() end'",
            "return now < a",
        ],
    )
    def test_what_is_no_rule_is_left_alone(self, source: str) -> None:
        assert lua.mutants("x.lua", source) == []

    def test_a_function_within_a_call_is_read(self) -> None:
        source = "table.sort(a, function(x, y) return x[1] > y[1] end)"
        assert "table.sort(a, function(x, y) return x[1] >= y[1] end)" in changed(lua.mutants("x.lua", source), source)

    def test_what_is_no_lua_is_named_by_its_place(self) -> None:
        with pytest.raises(SyntaxError, match=r"x\.lua:2: expected 'then'"):
            lua.mutants("x.lua", "a()\nif b do c() end")


class TestPython:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("x = a < b", ["x = a <= b"]),
            ("x = a is None", ["x = a is not None"]),
            ("x = a not in b", ["x = a in b"]),
            ("x = not a", ["x = a"]),
            ("x = a or b", ["x = False or b", "x = a or False"]),
            ("x = b if a else c", ["x = b if True else c", "x = b if False else c"]),
            ("x = [a for a in b if c]", ["x = [a for a in b if True]", "x = [a for a in b if False]"]),
            ("x = 2", ["x = 3"]),
            ("x = True", ["x = False"]),
            ("x = max(a, b)", ["x = min(a, b)"]),
            ("call(a)", ["pass"]),
            ("a.b = c", ["pass"]),
        ],
    )
    def test_each_rule_is_deleted_or_turned(self, source: str, expected: list[str]) -> None:
        assert sorted(changed(python.mutants("x.py", source), source)) == sorted(expected)

    def test_of_a_condition_with_two_parts_each_is_deleted(self) -> None:
        source = "if a == 1 and b:\n    c()\n"
        assert changed(python.mutants("x.py", source), source) == [
            "if True and b:\n    c()",
            "if False:\n    c()",
            "if a == 2 and b:\n    c()",
            "if a == 1 and True:\n    c()",
        ]

    @pytest.mark.parametrize(
        "source", ['"""Words."""', "x: int", "log.warning(a)", "x = f'{1}'", "if TYPE_CHECKING:\n    import a"]
    )
    def test_what_is_no_rule_is_left_alone(self, source: str) -> None:
        assert python.mutants("x.py", source) == []

    def test_only_the_functions_that_are_named_are_changed(self) -> None:
        source = "class A:\n    def b(self):\n        return 1\n\n    def c(self):\n        return 2\n"
        assert [mutant.line for mutant in python.mutants("x.py", source, ["A.c"]) if mutant.text == "3"] == [6]
        with pytest.raises(ValueError, match=r"x.py has no A\.d"):
            python.mutants("x.py", source, ["A.d"])

    def test_what_runs_while_a_module_is_loaded_is_marked(self) -> None:
        source = "LIMIT = 1\n\ndef f():\n    return 2\n"
        found = {mutant.text: mutant.loaded for mutant in python.mutants("x.py", source)}
        assert found["2"] is True
        assert found["3"] is False

    def test_places_are_found_behind_letters_of_several_bytes(self) -> None:
        source = 'x = "größe" == a\n'
        assert changed(python.mutants("x.py", source), source) == ['x = "größe" != a']


class TestTable:
    SOURCE = "code,name,kind,scope,retry,duplicate,reason\n1,A,x,r,f,no,a\n2,B,y,t,h,yes,b\n3,C,x,r,f,no,c\n"

    def test_each_field_of_each_class_is_changed(self) -> None:
        found = changed(table.mutants("x.csv", self.SOURCE), self.SOURCE)
        assert [text.splitlines()[1:3] for text in found] == [
            ["1,A,y,r,f,no,a", "2,B,y,t,h,yes,b"],
            ["1,A,x,t,f,no,a", "2,B,y,t,h,yes,b"],
            ["1,A,x,r,h,no,a", "2,B,y,t,h,yes,b"],
            ["1,A,x,r,f,yes,a", "2,B,y,t,h,yes,b"],
            ["1,A,x,r,f,no,a", "2,B,x,t,h,yes,b"],
            ["1,A,x,r,f,no,a", "2,B,y,r,h,yes,b"],
            ["1,A,x,r,f,no,a", "2,B,y,t,f,yes,b"],
            ["1,A,x,r,f,no,a", "2,B,y,t,h,no,b"],
        ]


class TestGuards:
    def test_the_table_is_true(self) -> None:
        assert missing() == []

    def test_a_file_that_is_not_there_and_a_target_without_tests_are_named(self) -> None:
        targets = (Target("Makefile", ()), Target("Makefile", ("unit/test_gone.py",)))
        assert missing(targets) == ["Makefile has no tests", "tests/unit/test_gone.py does not exist"]

    def test_all_targets_have_mutants(self) -> None:
        assert [target.path for target in TARGETS if not target.mutants()] == []

    def test_all_lua_scripts_are_targets(self) -> None:
        found = {str(path.relative_to(ROOT)) for path in (ROOT / "workers").rglob("*.lua")}
        assert found == {target.path for target in TARGETS if target.path.endswith(".lua")}

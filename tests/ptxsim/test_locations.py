"""Python lines of PTX lines."""

from ptxsim.frontend.locations import source_of

# What the DSL makes of mbarrier_wait in line 55: LLVM counts on within inline assembly.
WAIT = """\
.file 1 "kernel.py"
.file 2 "ring.py"
.visible .entry f() {
\t.loc\t2 54 15
\tshl.b32 %r1, %r2, 3;
\t.loc\t2 55 8
\t// begin inline asm
\t{
\t.loc\t2 57 8
\tWAIT:
\t.loc\t2 58 8
\tmbarrier.try_wait.parity.shared.b64 P1, [%r1], %r2, 10000000;
\t}
\t// end inline asm
\tadd.s32 %r1, %r1, 1;
\t.loc\t1 25 0
\tret;
}
.visible .entry g() {
\tret;
}"""


def lines(text: str) -> dict[str, str]:
    """What lines come from, by their first word; the last of a word counts."""
    return {line.split()[0]: source_of(text, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()}


def test_lines_of_an_inline_assembly_are_that_of_the_call():
    found = lines(WAIT[: WAIT.index("}\n.visible")])
    assert found["shl.b32"] == " (ring.py:54)"
    assert found["mbarrier.try_wait.parity.shared.b64"] == found["add.s32"] == " (ring.py:55)"
    assert found["ret;"] == " (kernel.py:25)"


def test_no_line_is_taken_from_the_kernel_before():
    assert source_of(WAIT, 3) == "" and lines(WAIT)["ret;"] == ""


def test_without_line_information_there_is_none():
    assert source_of("add.s32 %r1, %r1, 1;", 1) == ""
    assert source_of(".loc 1 2 3\nret;", 2) == ""
    assert source_of('.file 1 "a.py"\n.loc 7 2 3\nret;', 3) == " (file 7:2)"

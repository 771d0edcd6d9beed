"""PTX text to kernels: flat instruction lists with every name resolved.

The grammar is what NVVM and the inline assembly of CuTe DSL emit: PTX ISA 4 (syntax), 5 (state spaces and types), 10
and 11 (special registers and directives). Registers and labels declared inside a ``{ ... }`` scope are renamed
``name$<scope>``, so that a body becomes one list. Directives that would change the meaning of a kernel and are not
known here are refused.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

from ..errors import PtxError
from ..ops.instruction import TYPE_BYTES, Instr, Mem

_HEADER_DIRECTIVES = {"reqntid", "maxntid", "minnctapersm", "maxnreg", "reqnctapercluster", "explicitcluster",
                      "maxclusterrank", "maxnctapersm", "pragma"}  # fmt: skip
_BODY_DIRECTIVES = {"loc", "pragma", "file"}
_BRACKET, _BRACE = re.compile(r"[\[{(<]"), re.compile(r"[{}]")
_RANGED = re.compile(r"(%[A-Za-z_]+)\d+$")
_MODULE_DIRECTIVES = {"version", "target", "address_size", "file", "section", "pragma"}


@dataclass
class Kernel:
    """One ``.entry``. Offsets and sizes are in bytes."""

    name: str
    params: dict = field(default_factory=dict)  # name -> (offset, size)
    param_list: list = field(default_factory=list)  # [(offset, size)] in order
    param_bytes: int = 0
    reqntid: tuple | None = None
    maxntid: tuple | None = None
    cluster: tuple | None = None
    body: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)  # label -> index in body
    regtypes: dict = field(default_factory=dict)  # registers declared by name
    regprefix: dict = field(default_factory=dict)  # registers declared by range: "%r" -> "b32"
    shared: dict = field(default_factory=dict)  # name -> (alignment, size; None if dynamic)
    local: dict = field(default_factory=dict)
    module: object = None
    _found: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # what regtype has answered

    def regtype(self, name: str) -> str | None:
        """Type of a register; None if it is not one."""
        if name not in self._found:
            found = self.regtypes.get(name)
            if found is None:
                match = _RANGED.match(name)
                found = self.regprefix.get(match.group(1)) if match else None
            self._found[name] = found
        return self._found[name]


@dataclass
class Module:
    """A PTX file: its kernels and the variables of module scope."""

    kernels: dict = field(default_factory=dict)
    shared: dict = field(default_factory=dict)
    globals: dict = field(default_factory=dict)  # name -> (alignment, size, initial bytes or None)
    text: str = ""


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are outside of brackets."""
    if not _BRACKET.search(text):
        parts = [part.strip() for part in text.split(separator)]
        return parts if parts[-1] else parts[:-1]
    out, depth, current = [], 0, ""
    for ch in text:
        if ch in "[{(<":
            depth += 1
        elif ch in "]})>":
            depth -= 1
        if ch == separator and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += ch
    if current.strip():
        out.append(current.strip())
    return out


def parse_operand(text: str):
    """A token, a list ``{...}``, a tuple ``(...)`` or a ``Mem``."""
    text = text.strip()
    if text.startswith("{"):
        return [parse_operand(x) for x in split_top(text[1:-1])]
    if text.startswith("("):
        return tuple(parse_operand(x) for x in split_top(text[1:-1]))
    if not text.startswith("["):
        return text
    parts = split_top(text[1:-1])
    match = re.match(r"^(-?[\w$%.]+)\s*(?:\+\s*(-?\w+))?$", parts[0])
    if not match:
        raise PtxError(f"address operand {text}")
    memory = Mem(match.group(1), int(match.group(2), 0) if match.group(2) else 0)
    if len(parts) > 1:
        memory.coords = parse_operand(parts[1])
    if len(parts) > 2:
        memory.extra = [parse_operand(p) for p in parts[2:]]
    return memory


def _declaration(statement: str):
    """'.shared .align 16 .b8 name[128]' -> (name, alignment, size or None, initial bytes or None)."""
    initial = None
    text = statement
    if "=" in text:
        text, initial = text.split("=", 1)
    align = re.search(r"\.align\s+(\d+)", text)
    text = re.sub(r"\.align\s+\d+", "", text)
    match = re.search(r"\.(\w+)\s+([\w$%]+)\s*(?:\[(\d*)\])?\s*$", text.strip())
    if not match or match.group(1) not in TYPE_BYTES:
        raise PtxError(f"declaration {statement!r}")
    type_name, name, count = match.groups()
    element = TYPE_BYTES[type_name]
    size = element if "[" not in text else (int(count) * element if count else None)
    data = None
    if initial is not None:
        values = re.findall(r"-?\w+", initial)
        mask = (1 << (8 * element)) - 1
        data = b"".join((int(v, 0) & mask).to_bytes(element, "little") for v in values).ljust(size, b"\0")
    return name, int(align.group(1)) if align else 8, size, data


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(text: str, start: int) -> int:
    """Index after the brace that closes the one at ``start``."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if not depth:
            return brace.end()
    raise PtxError("a { is not closed")


def parse_module(text: str) -> Module:
    """Parse a PTX file. Bodies of ``.func`` are skipped: a call to one is refused where it occurs."""
    module = Module(text=text)
    source = _without_comments(text)
    line_starts = [0, *(newline.end() for newline in re.finditer("\n", source))]

    def line_of(position: int) -> int:
        return bisect.bisect_right(line_starts, position)

    position = 0
    entry = re.compile(r"\.(entry|func)\b")
    while position < len(source):
        match = entry.search(source, position)
        head = source[position : match.start()] if match else source[position:]
        _module_statements(module, head, position, line_of)
        if not match:
            break
        brace, semicolon = source.find("{", match.end()), source.find(";", match.end())
        if match.group(1) == "func":
            has_body = brace != -1 and (brace < semicolon or semicolon == -1)
            position = _closing_brace(source, brace) if has_body else semicolon + 1
            continue
        end = _closing_brace(source, brace)
        kernel = _header(source[match.end() : brace], line_of(match.start()))
        kernel.module = module
        _Body(kernel, source[brace + 1 : end - 1], brace + 1, line_of).parse()
        module.kernels[kernel.name] = kernel
        position = end
    return module


def _module_statements(module, head, position, line_of):
    if ".section" in head:  # debug information: everything from here to the next entry
        head = head[: head.index(".section")]
    offset = 0
    for statement in head.split(";"):
        line = line_of(position + offset + len(statement) - len(statement.lstrip()))
        offset += len(statement) + 1
        statement = re.sub(r"^\s*\.(version|target|address_size|file)\b[^\n]*\n?", "", statement, flags=re.M).strip()
        if re.search(r"\.(shared|global|const)\b", statement):
            try:
                name, align, size, data = _declaration(statement)
            except PtxError as error:
                raise error.located(line, statement[:200]) from None
            if ".shared" in statement:
                module.shared[name] = (align, size)
            else:
                module.globals[name] = (align, size, data)
            continue
        unknown = set(re.findall(r"\.(\w+)", statement)) - _MODULE_DIRECTIVES - {"visible", "weak", "extern"}
        if unknown:
            raise PtxError(f"unknown directive .{sorted(unknown)[0]}", line=line, text=statement[:200])


def _header(text: str, line: int) -> Kernel:
    kernel = Kernel(re.match(r"\s*([\w$]+)", text).group(1))
    tail = text
    if "(" in text:
        opening, closing = text.index("("), text.rindex(")")
        offset = 0
        for declaration in split_top(text[opening + 1 : closing]):
            align = re.search(r"\.align\s+(\d+)", declaration)
            align = int(align.group(1)) if align and ".ptr" not in declaration else None
            plain = re.sub(r"\.ptr\s*(\.\w+\s*)?(\.align\s+\d+)?", "", declaration)
            plain = re.sub(r"\.align\s+\d+", "", plain)
            match = re.search(r"\.(\w+)\s+([\w$]+)\s*(?:\[(\d+)\])?\s*$", plain.strip())
            if not match or match.group(1) not in TYPE_BYTES:
                raise PtxError("parameter declaration", line=line, text=declaration)
            type_name, name, count = match.groups()
            size = TYPE_BYTES[type_name] * (int(count) if count else 1)
            align = align or TYPE_BYTES[type_name]
            offset = (offset + align - 1) // align * align
            kernel.params[name] = (offset, size)
            kernel.param_list.append((offset, size))
            offset += size
        kernel.param_bytes = offset
        tail = text[closing + 1 :]
    unknown = set(re.findall(r"\.(\w+)", tail)) - _HEADER_DIRECTIVES
    if unknown:
        raise PtxError(f"unknown directive .{sorted(unknown)[0]}", line=line, text=tail.strip()[:200])
    for name, attribute in (("reqntid", "reqntid"), ("maxntid", "maxntid"), ("reqnctapercluster", "cluster")):
        match = re.search(rf"\.{name}\s+([\d, ]+)", tail)
        if match:
            values = tuple(int(x) for x in match.group(1).split(","))
            setattr(kernel, attribute, values + (1,) * (3 - len(values)))
    return kernel


_LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")
_NAME = re.compile(r"[A-Za-z_%$][\w$]*(\.[xyzw]\b)?")  # also a component of a vector


class _Body:
    """Parser of one kernel's body: statements with their scopes, then declarations, then instructions."""

    def __init__(self, kernel, text, base, line_of):
        self.kernel, self.text, self.base, self.line_of = kernel, text, base, line_of
        self.parent = {0: None}  # scope -> enclosing scope
        self.statements = []  # (is label, text, line, scope)

    def parse(self):
        """Fill in the kernel's body, labels, registers and variables; PtxError with line and text."""
        self._tokenise()
        self.registers = {s: set() for s in self.parent}
        self.vectors = {s: {} for s in self.parent}  # name -> its components, which are registers
        self.call_params = set()  # parameters and results of calls, which are taken for registers
        self.labels = {s: set() for s in self.parent}
        for is_label, text, line, scope in self.statements:
            if is_label:
                self.labels[scope].add(text)
            elif text.startswith((".reg", ".param")):
                self._declare_registers(text, line, scope)
        for is_label, text, line, scope in self.statements:
            try:
                if is_label:
                    self.kernel.labels[self._label(text, scope)] = len(self.kernel.body)
                elif text.startswith("."):
                    self._directive(text)
                else:
                    self._instruction(text, line, scope)
            except PtxError as error:
                raise error.located(line, text[:200]) from None

    def _tokenise(self):
        text, i, scope = self.text, 0, 0
        while i < len(text):
            ch = text[i]
            if ch.isspace() or ch == ";":
                i += 1
            elif ch == "{":
                new = len(self.parent)
                self.parent[new] = scope
                scope = new
                i += 1
            elif ch == "}":
                scope = self.parent[scope]
                i += 1
            else:
                line = self.line_of(self.base + i)
                label = _LABEL.match(text, i)
                if label:
                    self.statements.append((True, label.group(1), line, scope))
                    i = label.end()
                    continue
                end = text.find("\n" if text.startswith((".loc ", ".loc\t"), i) else ";", i)
                end = len(text) if end < 0 else end
                self.statements.append((False, re.sub(r"\s+", " ", text[i:end]).strip(), line, scope))
                i = end + 1

    def _declare_registers(self, text, line, scope):
        kind, vector, type_name, rest = re.match(r"\.(reg|param)\s+(?:\.v([24])\s+)?\.?(\w+)\s+(.*)", text).groups()
        if type_name not in TYPE_BYTES:
            raise PtxError(f"register type .{type_name} is not simulated", line=line, text=text)
        names = []
        for declared in (x.strip() for x in rest.split(",")):
            ranged = re.match(r"(.+)<(\d+)>$", declared)
            if vector:
                self.vectors[scope][declared] = components = [f"{declared}${x}" for x in "xyzw"[: int(vector)]]
                names += components
            elif ranged and ranged.group(1).startswith("%"):
                self.kernel.regprefix[ranged.group(1)] = type_name
            elif ranged:
                names += [f"{ranged.group(1)}{x}" for x in range(int(ranged.group(2)))]
            else:
                names.append(declared)
        for name in names:
            own = name if scope == 0 else f"{name}${scope}"
            self.registers[scope].add(name)
            self.kernel.regtypes[own] = type_name
            if kind == "param":
                self.call_params.add(own)

    def _scopes(self, scope):
        while scope is not None:
            yield scope
            scope = self.parent[scope]

    def _register(self, token, scope):
        """The register's own name in all scopes; a vector as the list of its components."""
        component = token.replace(".", "$")
        for s in self._scopes(scope):
            if component in self.registers[s]:
                return component if s == 0 else f"{component}${s}"
            if token in self.vectors[s]:
                return "{" + ", ".join(self._register(x, s) for x in self.vectors[s][token]) + "}"
        return token

    def _label(self, token, scope):
        for s in self._scopes(scope):
            if token in self.labels[s]:
                return token if s == 0 else f"{token}${s}"
        raise PtxError(f"unknown label {token}")

    def _directive(self, text):
        kind = re.match(r"\.(\w+)", text).group(1)
        if kind in ("shared", "extern"):
            name, align, size, _ = _declaration(text)
            self.kernel.shared[name] = (align, size)
        elif kind == "local":
            name, align, size, _ = _declaration(text)
            self.kernel.local[name] = (align, size)
        elif kind not in ("reg", "param") and kind not in _BODY_DIRECTIVES:
            raise PtxError(f"unknown directive .{kind}")

    def _instruction(self, text, line, scope):
        guard, negated = None, False
        match = re.match(r"@(!?)([%\w$]+)\s+", text)
        if match:
            negated, guard = bool(match.group(1)), self._register(match.group(2), scope)
            text = text[match.end() :]
        opcode, _, operands = text.partition(" ")
        glued = re.match(r"([\w.:]+)([\[{].*)", opcode)  # "op[addr]"
        if glued:
            opcode, operands = glued.group(1), f"{glued.group(2)} {operands}"
        if opcode.split(".")[0] == "bra":
            args = [self._label(operands.strip(), scope)]
        else:
            if any(self.registers[s] for s in self._scopes(scope)):
                operands = _NAME.sub(lambda m: self._register(m.group(0), scope), operands)
            args = [parse_operand(x) for x in split_top(operands)]
        if opcode.startswith(("st.param.", "ld.param.")):
            place = next((n for n, x in enumerate(args) if isinstance(x, Mem) and x.base in self.call_params), None)
            if place is not None and not args[place].off:
                args[place], opcode = args[place].base, f"mov.{opcode.rpartition('.')[2]}"
        self.kernel.body.append(Instr(opcode, args, line, guard, negated))

"""Find the convolutions of SS2D-like blocks that change a map's size when their kernel is even, and keep the size.

Such a block pads its depthwise convolution with (d_conv - 1) // 2 on every side. With an odd kernel that keeps the
size; with an even one the map loses a row and a column, and neither the gate nor the residual fits any more. The fix is
one conditional expression where the padding is given,

    padding=(d_conv - 1) // 2 if d_conv % 2 else "same"

so that for an odd kernel nothing at all changes, while for an even one PyTorch pads one more at the right and the
bottom. The place is found by structure, through libcst: what a call says about its kernel is compared with what its
padding comes out as, for several kernel sizes, however it is spelled. The text is changed by splices into the bytes of
the file, so that whatever is not that expression stays as it is.

Pure: bytes in, a result out; nothing is read or written.
"""

from __future__ import annotations

import difflib
import io
import itertools
import math
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

# states of a file, and of a convolution
TO_FIX = "to fix"
FITS = "fits"
UNRECOGNISED = "unrecognised"

SAME = '"same"'
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
# positions of the arguments of torch.nn.ConvNd
_POSITIONS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    "padding_mode",
)
# Python itself stops at 200
_DEEPEST = 200
_ODD, _EVEN = (1, 3, 5, 7), (2, 4, 6)
# what a class mentions that does a selective scan, or is built from one that does
_SCAN_PARTS = re.compile(
    r"[Ss]elective_?[Ss]can|[Cc]ross_?[Ss]can|SS2D|ss2d|SSM|VSS|(?<![A-Za-z])(ssm|vss)|[Mm]amba|MAMBA",
)
_SCAN_NAMES = re.compile(r"_?(A_?logs?|dt_projs?(_\w+)?|dt_rank|dt_init|x_projs?(_\w+)?|d_state)", re.IGNORECASE)
_KERNEL_NAMES = re.compile(r"(\w+_)?(d_?convs?|ssm_conv|conv_(size|kernel|kernel_size|dim))", re.IGNORECASE)
_RESIZING = re.compile(r"(\w*_)?(pad|interpolate|upsample|resize)|\w*Pad[123]d|Upsample")
_CUTTING = re.compile(r"(\w*_)?(crop|narrow)")
_LOOKED_FOR = (
    "a Conv1d, Conv2d or Conv3d call with stride 1 whose padding is half of its own kernel_size, such as "
    "(d_conv - 1) // 2, depthwise or with a kernel named like d_conv, in a class that does a selective scan"
)


class _Unknown(Exception):
    """The value of an expression cannot be told."""


@dataclass(frozen=True)
class Finding:
    """One convolution that was recognised.

    Args:
        line: line of the call in the file, from 1.
        where: class or function that holds it, dotted, and what it is assigned to ("SS2D: self.conv2d").
        status: TO_FIX or FITS.
        kernel: kernel_size as the file spells it.
        padding: padding as the file spells it.
        becomes: padding as it has to be, or None where it fits.
        why: one sentence for people.
    """

    line: int
    where: str
    status: str
    kernel: str
    padding: str
    becomes: str | None
    why: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class Edit:
    """One splice: the bytes [start, end) of the file become text."""

    start: int
    end: int
    text: bytes


@dataclass(frozen=True)
class Result:
    """What was found in one file, and what it becomes.

    Args:
        status: TO_FIX, FITS or UNRECOGNISED.
        findings: the recognised convolutions, in the order of the file.
        edits: splices that fix the file, ascending, none overlapping.
        content: the whole fixed file; the given one where nothing has to be fixed.
        message: what was found, in words; for an unrecognised file, what was looked for.
        encoding: codec of the file's text.
    """

    status: str
    findings: tuple[Finding, ...]
    edits: tuple[Edit, ...]
    content: bytes
    message: str
    encoding: str


def transform(data: bytes, classes: Sequence[str] = ()) -> Result:
    """Find what has to be fixed in a Python file, and fix it.

    Args:
        data: the file.
        classes: look only into these classes, those of the same file that they use or derive from, and the functions
            of the file. They count as classes that scan, whatever they mention. Empty: all.

    Raises:
        Problem: the bytes are no Python source that can be read.
    """
    if not any(name.encode("ascii") in data for name in CONVOLUTIONS):
        return Result(UNRECOGNISED, (), (), data, _message((), (), classes), "utf-8")
    try:
        return _transform(data, classes)
    except RecursionError as error:
        raise _too_deep() from error


def _too_deep() -> Problem:
    return Problem("its expressions are nested too deep", "source written by people", "name another file")


def _transform(data: bytes, classes: Sequence[str]) -> Result:
    source = _Source(data)
    calls, others = _analyse(source, classes)
    findings = tuple(call.finding for call in calls)
    edits = tuple(sorted((edit for call in calls for edit in call.edits), key=lambda edit: edit.start))
    content = apply(data, edits)
    if edits:
        _check_again(content, classes, len(findings))
    status = TO_FIX if edits else FITS if findings else UNRECOGNISED
    return Result(status, findings, edits, content, _message(findings, others, classes), source.encoding)


def apply(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Return data with the splices done."""
    parts, position = [], 0
    for edit in edits:
        parts += [data[position : edit.start], edit.text]
        position = edit.end
    return b"".join([*parts, data[position:]])


def unified_diff(path: str, before: bytes, after: bytes) -> bytes:
    """Return a patch for `git apply` or `patch -p1`, in the file's own encoding and with its own line ends."""
    old, new = (re.findall(rb"[^\n]*\n|[^\n]+", content) for content in (before, after))
    lines = difflib.diff_bytes(difflib.unified_diff, old, new, f"a/{path}".encode(), f"b/{path}".encode())
    return b"".join(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in lines)


def _check_again(content: bytes, classes: Sequence[str], count: int) -> None:
    """Make sure that the fixed file is read as the same one, with nothing left to fix: a second run is a no-op."""
    again, _others = _analyse(_Source(content), classes)
    if len(again) != count or any(call.edits for call in again):
        raise Problem(
            "the fixed file would not be recognised as fixed",
            f"the same {count} convolutions, all of which fit",
            "leave even_kernels at report for this project, and send the file to the authors of Jetson Mamba",
        )


def _message(findings: Sequence[Finding], others: Sequence[str], classes: Sequence[str]) -> str:
    if findings:
        count = sum(finding.status == TO_FIX for finding in findings)
        return f"{count} of {len(findings)} convolutions change the size of a map when their kernel is even"
    looked_for = _LOOKED_FOR + (f" (only in {', '.join(classes)} and what they use)" if classes else "")
    met = "; ".join(others[:8]) + ("; …" if len(others) > 8 else "") if others else "no convolution with such a kernel"
    return f"left alone. Looked for: {looked_for}. Found: {met}"


# --- the file ---


class _Source:
    """A file's text, tree and metadata, and the way from a node to its bytes."""

    def __init__(self, data: bytes) -> None:
        self._bom = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        self.data = data
        self.encoding, self.text = _decode(data, self._bom)
        # libcst's parser does not survive that: it takes the process down with it
        if _nesting(self.text) > _DEEPEST:
            raise _too_deep()
        # libcst does not give these back as they are: stand-ins of the same length keep every position true
        masked = re.sub(r"^[ \t]*\f", lambda match: "\n" * len(match.group()), self.text, flags=re.MULTILINE)
        masked = re.sub(r"\r(?!\n)", "\n", masked.replace("\f", " ").replace("\0", " "))
        try:
            wrapper = MetadataWrapper(cst.parse_module(masked), unsafe_skip_copy=True)
        except cst.ParserSyntaxError as error:
            raise Problem(
                f"it is no Python source that can be read: line {error.raw_line}: {error.message}",
                "a Python 3 source file",
                "name another file, or correct this one",
            ) from error
        self.module = wrapper.module
        self._spans = wrapper.resolve(ByteSpanPositionProvider)
        self.parents: dict[cst.CSTNode, cst.CSTNode] = {}
        # all nodes in the order of the text, and how far what is below each of them reaches: asking libcst is slow
        self._order: list[cst.CSTNode] = []
        self._reach: dict[cst.CSTNode, tuple[int, int]] = {}
        self._list(self.module)
        self._printed = self.module.code.encode("utf-8")
        self._masked = masked.encode("utf-8")

    def _list(self, node: cst.CSTNode) -> None:
        start = len(self._order)
        self._order.append(node)
        for child in node.children:
            self.parents[child] = node
            self._list(child)
        self._reach[node] = (start, len(self._order))

    def walk(self, node: cst.CSTNode) -> list[cst.CSTNode]:
        """Return a node and all below it, in the order of the text."""
        start, end = self._reach[node]
        return self._order[start:end]

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Return where a node stands in the file's bytes, without its own parentheses."""
        span = self._spans[node]
        end = span.start + span.length
        if self._printed[:end] != self._masked[:end]:
            raise Problem(
                "its layout cannot be followed exactly",
                "white space and line ends that are read back as they were",
                "correct the padding by hand, or run the file through a formatter first",
            )
        before = len(self._masked[: span.start].decode("utf-8"))
        after = before + len(self._masked[span.start : end].decode("utf-8"))
        first, last = (self._bom + len(self.text[:place].encode(self.encoding)) for place in (before, after))
        if self.data[first:last].decode(self.encoding) != self.text[before:after]:
            raise Problem(
                f"its encoding {self.encoding} cannot be followed byte by byte",
                "an encoding such as UTF-8 or Latin-1",
                "store the file in UTF-8",
            )
        return first, last

    def outer_span(self, node: cst.BaseExpression) -> tuple[int, int]:
        """Return where an expression stands, with the parentheses that belong to it."""
        first, last = self.span(node)
        left = sum(len(self.module.code_for_node(part).encode(self.encoding)) for part in node.lpar)
        right = sum(len(self.module.code_for_node(part).encode(self.encoding)) for part in node.rpar)
        return first - left, last + right

    def line(self, node: cst.CSTNode) -> int:
        """Return the number of the line that a node begins in, from 1."""
        before = len(self._masked[: self._spans[node].start].decode("utf-8"))
        return 1 + len(re.findall(r"\r\n|\r|\n", self.text[:before]))

    def code(self, node: cst.CSTNode) -> str:
        """Return a node's text on one line."""
        return " ".join(self.module.code_for_node(node).split())


def _decode(data: bytes, bom: int) -> tuple[str, str]:
    """Return the codec and the text of a source file; its line ends stay as they are."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        encoding = "utf-8" if encoding == "utf-8-sig" else encoding
        text = data[bom:].decode(encoding)
        if text.encode(encoding) == data[bom:]:
            return encoding, text
        found = f"its text, read as {encoding}, is not written back as it was"
    except (SyntaxError, UnicodeError, LookupError) as error:
        found = f"its text cannot be decoded: {error}"
    raise Problem(found, "UTF-8, or the encoding that the file's first lines name", "store the file in UTF-8")


def _nesting(text: str) -> int:
    """Return how deep brackets are nested, at most; those in texts and comments are counted with the rest."""
    steps = [1 if bracket in "([{" else -1 for bracket in re.findall(r"[()\[\]{}]", text)]
    return max(itertools.accumulate(steps, lambda depth, step: max(0, depth + step)), default=0)


# --- names and scopes ---


def _terminal(node: cst.CSTNode) -> str:
    """Return the last part of a dotted name ("torch.nn.Conv2d" -> "Conv2d"), or nothing."""
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


def _is_self(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Attribute) and isinstance(node.value, cst.Name) and node.value.value == "self"


class _Names:
    """What is assigned to which name, where: enough to follow a kernel and a padding through a class."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._assigned: dict[tuple[int, str], list[cst.BaseExpression]] = defaultdict(list)
        self._parameters: dict[int, set[str]] = defaultdict(set)
        for node in source.walk(source.module):
            if isinstance(node, cst.Assign):
                for target in node.targets:
                    self._assign(target.target, node.value)
            elif isinstance(node, cst.AnnAssign) and node.value is not None:
                self._assign(node.target, node.value)
            elif isinstance(node, cst.AugAssign):
                self._assign(node.target, node)
            elif isinstance(node, cst.NamedExpr):
                self._assign(node.target, node.value)
            elif isinstance(node, cst.Param):
                function = self.scope(node, cst.FunctionDef, cst.Lambda)
                self._parameters[id(function)].add(node.name.value)

    def _assign(self, target: cst.BaseExpression, value: Any) -> None:
        if isinstance(target, cst.Tuple | cst.List):
            parts: list[Any] = [value] * len(target.elements)
            if isinstance(value, cst.Tuple | cst.List) and len(value.elements) == len(target.elements):
                parts = [element.value for element in value.elements]
            else:
                parts = [target] * len(target.elements)  # unpacked from something that cannot be followed
            for element, part in zip(target.elements, parts, strict=True):
                self._assign(element.value, part)
        elif _is_self(target):
            self._assigned[id(self.scope(target, cst.ClassDef)), "self." + _terminal(target)].append(value)
        elif isinstance(target, cst.Name):
            self._assigned[id(self.scope(target)), target.value].append(value)

    def scope(self, node: cst.CSTNode, *kinds: type[cst.CSTNode]) -> Any:
        """Return the nearest node around one that is of a kind (a function, a class, or the module itself)."""
        kinds = kinds or (cst.FunctionDef, cst.ClassDef)
        parent: Any = node
        while not isinstance(parent, cst.Module):
            parent = self._source.parents[parent]
            if isinstance(parent, kinds):
                break
        return parent

    def values(self, node: cst.BaseExpression) -> list[Any]:
        """Return what is assigned to a name in the scopes around it; a parameter that stays as given has nothing."""
        if _is_self(node):
            return self._assigned.get((id(self.scope(node, cst.ClassDef)), "self." + _terminal(node)), [])
        if not isinstance(node, cst.Name):
            return []
        scope: Any = node
        while not isinstance(scope, cst.Module):
            inside = scope
            scope = self.scope(scope)
            if isinstance(scope, cst.ClassDef) and isinstance(inside, cst.FunctionDef):
                continue  # a method does not see its class's names
            found = self._assigned.get((id(scope), node.value), [])
            if found or node.value in self._parameters[id(scope)]:
                return found
        return []

    def key(self, node: cst.BaseExpression, seen: tuple[str, ...] = ()) -> str:
        """Return one name for all names of a value: d_conv, self.d_conv = d_conv, k = int(self.d_conv) …"""
        name = _terminal(node)
        values = [value for value in self.values(node) if not self._keeps_name(value, name)]
        if len(values) == 1 and isinstance(values[0], cst.BaseExpression) and name not in seen:
            simple = _without_int(values[0])
            if isinstance(simple, cst.Name) or _is_self(simple):
                return self.key(simple, (*seen, name))
        return name or self._source.code(node)

    @staticmethod
    def _keeps_name(value: Any, name: str) -> bool:
        """Return whether an assigned value is but another spelling of the name (d_conv = int(d_conv))."""
        return isinstance(value, cst.BaseExpression) and _terminal(_without_int(value)) == name


def _without_int(node: cst.BaseExpression) -> cst.BaseExpression:
    """Return x of int(x), else the node."""
    if isinstance(node, cst.Call) and _terminal(node.func) == "int" and len(node.args) == 1:
        return node.args[0].value
    return node


# --- values ---

_OPERATORS: dict[type[cst.CSTNode], Callable[[Any, Any], Any]] = {
    cst.Add: lambda a, b: a + b,
    cst.Subtract: lambda a, b: a - b,
    cst.Multiply: lambda a, b: a * b,
    cst.Divide: lambda a, b: a / b,
    cst.FloorDivide: lambda a, b: a // b,
    cst.Modulo: lambda a, b: a % b,
    cst.RightShift: lambda a, b: a >> b,
    cst.LeftShift: lambda a, b: a << b,
    cst.BitAnd: lambda a, b: a & b,
    cst.Equal: lambda a, b: a == b,
    cst.NotEqual: lambda a, b: a != b,
    cst.LessThan: lambda a, b: a < b,
    cst.LessThanEqual: lambda a, b: a <= b,
    cst.GreaterThan: lambda a, b: a > b,
    cst.GreaterThanEqual: lambda a, b: a >= b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{"int": int, "max": max, "min": min, "abs": abs, "bool": bool, "floor": math.floor, "ceil": math.ceil},
    "trunc": math.trunc,
    # Ultralytics' own helper, with a kernel alone
    "autopad": lambda kernel: kernel // 2,
}


class _Evaluator:
    """Computes small expressions for an assumed value of one name."""

    def __init__(self, names: _Names, bound: Mapping[str, int]) -> None:
        self._names = names
        self._bound = bound

    def value(self, node: Any, depth: int = 0) -> Any:
        """Return a number, a text or a tuple of them.

        Raises:
            _Unknown: it depends on something else.
        """
        if depth > 30:
            raise _Unknown
        try:
            return self._compute(node, depth + 1)
        except (ArithmeticError, TypeError, ValueError, IndexError) as error:
            raise _Unknown from error

    def _compute(self, node: Any, depth: int) -> Any:
        if isinstance(node, cst.Integer | cst.Float | cst.SimpleString):
            return node.evaluated_value
        if isinstance(node, cst.Tuple | cst.List):
            return tuple(self.value(element.value, depth) for element in node.elements)
        if isinstance(node, cst.UnaryOperation):
            operand = self.value(node.expression, depth)
            return not operand if isinstance(node.operator, cst.Not) else self._signed(node.operator, operand)
        if isinstance(node, cst.BinaryOperation):
            return self._operate(node.operator, node.left, node.right, depth)
        if isinstance(node, cst.BooleanOperation):
            left = self.value(node.left, depth)
            return left if bool(left) is isinstance(node.operator, cst.Or) else self.value(node.right, depth)
        if isinstance(node, cst.Comparison) and len(node.comparisons) == 1:
            return self._operate(node.comparisons[0].operator, node.left, node.comparisons[0].comparator, depth)
        if isinstance(node, cst.IfExp):
            return self.value(node.body if self.value(node.test, depth) else node.orelse, depth)
        if isinstance(node, cst.NamedExpr):
            return self.value(node.value, depth)
        if isinstance(node, cst.Call) and _terminal(node.func) in _FUNCTIONS:
            if any(argument.star or argument.keyword for argument in node.args):
                raise _Unknown
            return _FUNCTIONS[_terminal(node.func)](*(self.value(argument.value, depth) for argument in node.args))
        return self._named(node, depth)

    @staticmethod
    def _signed(operator: cst.BaseUnaryOp, operand: Any) -> Any:
        if isinstance(operator, cst.Minus):
            return -operand
        if isinstance(operator, cst.Plus):
            return operand
        raise _Unknown

    def _operate(self, operator: cst.CSTNode, left: Any, right: Any, depth: int) -> Any:
        if type(operator) not in _OPERATORS:
            raise _Unknown
        return _OPERATORS[type(operator)](self.value(left, depth), self.value(right, depth))

    def _named(self, node: Any, depth: int) -> Any:
        key = self._names.key(node)
        if key in self._bound:
            return self._bound[key]
        if isinstance(node, cst.Subscript) and len(node.slice) == 1 and isinstance(node.slice[0].slice, cst.Index):
            return self.value(node.value, depth)[self.value(node.slice[0].slice.value, depth)]
        values = self._names.values(node)
        if len(values) != 1 or not isinstance(values[0], cst.BaseExpression):
            raise _Unknown
        return self.value(values[0], depth)


# --- convolutions ---


@dataclass(frozen=True)
class _Recognised:
    """A convolution of the kind that is looked for, and the splices that it needs."""

    finding: Finding
    edits: tuple[Edit, ...]


def _analyse(source: _Source, classes: Sequence[str]) -> tuple[list[_Recognised], list[str]]:
    """Return the recognised convolutions, and what was met beside them, in words."""
    names = _Names(source)
    by_name = {node.name.value: node for node in source.walk(source.module) if isinstance(node, cst.ClassDef)}
    chosen = _reachable(source, by_name, classes)
    found: list[_Recognised] = []
    others = [f"no class {name}" for name in classes if name not in by_name]
    for node in source.walk(source.module):
        if not isinstance(node, cst.Call) or _terminal(node.func) not in CONVOLUTIONS:
            continue
        owner = names.scope(node, cst.ClassDef)
        if classes and isinstance(owner, cst.ClassDef) and owner.name.value not in chosen:
            continue
        convolution = _Convolution(source, names, node, owner, by_name, classes)
        recognised = convolution.recognise()
        if isinstance(recognised, _Recognised):
            found.append(recognised)
        elif recognised:
            others.append(f"line {source.line(node)}: {recognised}")
    return found, others


def _reachable(source: _Source, by_name: Mapping[str, cst.ClassDef], classes: Sequence[str]) -> set[str]:
    """Return the given classes, and those of the file that they mention, derive from or contain."""
    reached: set[str] = set()
    waiting = [name for name in classes if name in by_name]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            mentioned = {node.value for node in source.walk(by_name[name]) if isinstance(node, cst.Name)}
            waiting += sorted(mentioned & set(by_name))
    return reached


class _Convolution:
    """One call of a convolution's class, and what is known about it."""

    def __init__(
        self,
        source: _Source,
        names: _Names,
        call: cst.Call,
        owner: cst.Module | cst.ClassDef,
        by_name: Mapping[str, cst.ClassDef],
        classes: Sequence[str],
    ) -> None:
        self._source, self._names, self._call, self._owner = source, names, call, owner
        self._by_name, self._classes = by_name, classes
        self._arguments: dict[str, cst.BaseExpression] = {}
        position = 0
        for argument in call.args:
            if argument.keyword is not None:
                self._arguments[argument.keyword.value] = argument.value
            elif argument.star == "*":
                position = len(_POSITIONS)  # what follows cannot be counted
            elif argument.star == "" and position < len(_POSITIONS):
                self._arguments[_POSITIONS[position]] = argument.value
                position += 1

    def recognise(self) -> _Recognised | str:
        """Return the convolution as a finding, or why it is none: nothing where it need not be mentioned."""
        kernel, padding = self._arguments.get("kernel_size"), self._arguments.get("padding")
        if kernel is None:
            return "a convolution whose kernel_size is not in the call"
        literal = self._plain(kernel)
        if literal is not None and all(size % 2 for size in literal):
            # an odd kernel by its own text: nothing can be wrong with its size, and most files are full of them
            return ""
        if padding is None:
            return f"kernel_size={self._source.code(kernel)} without a padding in the call"
        for name in ("stride", "dilation"):
            value = self._arguments.get(name)
            if value is not None and set(self._plain(value) or (0,)) != {1}:
                return f"{name}={self._source.code(value)}"
        if not self._is_ours(kernel):
            return f"kernel_size={self._source.code(kernel)} in {self._place()}, which is no selective scan"
        return self._judge(kernel, padding)

    def _plain(self, node: cst.BaseExpression) -> tuple[int, ...] | None:
        """Return the number or numbers that an expression is whatever the model's arguments are, or None."""
        try:
            value = _Evaluator(self._names, {}).value(node)
        except _Unknown:
            return None
        sizes = value if isinstance(value, tuple) else (value,)
        return sizes if sizes and all(isinstance(size, int) for size in sizes) else None

    def _is_ours(self, kernel: cst.BaseExpression) -> bool:
        """Return whether the convolution belongs to a selective scan rather than to any other part of a network."""
        named = self._is_kernel_name(kernel)
        if not isinstance(self._owner, cst.ClassDef):
            return named
        if self._scans(self._owner, set()):
            return named or self._is_depthwise()
        return self._is_depthwise() and self._is_part_of_a_scan(self._owner.name.value)

    def _is_kernel_name(self, node: cst.CSTNode) -> bool:
        """Return whether an expression is made of a name such as d_conv."""
        roots = [part for part in self._source.walk(node) if isinstance(part, cst.Name | cst.Attribute)]
        texts = [text for root in roots for text in (_terminal(root), self._names.key(root))]
        return any(_KERNEL_NAMES.fullmatch(text) for text in texts)

    def _is_part_of_a_scan(self, name: str) -> bool:
        """Return whether a class that scans makes one of this class and gives it a kernel: DWConv(d_inner, d_conv)."""
        for node in self._source.walk(self._source.module):
            if isinstance(node, cst.Call) and _terminal(node.func) == name:
                user = self._names.scope(node, cst.ClassDef)
                given = any(self._is_kernel_name(argument.value) for argument in node.args)
                if given and isinstance(user, cst.ClassDef) and self._scans(user, set()):
                    return True
        return False

    def _scans(self, owner: cst.ClassDef, seen: set[str]) -> bool:
        """Return whether a class, or a class of the file that it derives from, shows signs of a selective scan."""
        if owner.name.value in self._classes:
            return True
        seen.add(owner.name.value)
        for node in self._source.walk(owner):
            if isinstance(node, cst.Name) and (_SCAN_PARTS.search(node.value) or _SCAN_NAMES.fullmatch(node.value)):
                return True
        bases = [_terminal(base.value) for base in owner.bases]
        return any(
            name in self._by_name and name not in seen and self._scans(self._by_name[name], seen) for name in bases
        )

    def _is_depthwise(self) -> bool:
        groups = self._arguments.get("groups")
        channels = [self._arguments.get(name) for name in ("in_channels", "out_channels")]
        return groups is not None and any(
            other is not None and (groups.deep_equals(other) or self._code(groups) == self._code(other))
            for other in channels
        )

    def _code(self, node: cst.BaseExpression) -> str:
        """Return an expression's text with its white space out, and names under which a value goes made one."""
        if isinstance(node, cst.Name) or _is_self(node):
            return self._names.key(node)
        return "".join(self._source.code(node).split())

    def _judge(self, kernel: cst.BaseExpression, padding: cst.BaseExpression) -> _Recognised | str:
        """Compare the padding with the kernel, for odd and for even sizes."""
        code = self._source.code
        try:
            root, test = self._test(kernel)
        except _Unknown:
            return f"kernel_size={code(kernel)}, which cannot be followed"
        spelled = f"kernel_size={code(kernel)}, padding={code(padding)}"
        try:
            odd = self._grows(kernel, padding, root, _ODD[1:]) if root else set()
            even = self._grows(kernel, padding, root, _EVEN)
        except _Unknown:
            return f"{spelled}: the padding cannot be compared with the kernel"
        if even == {0}:
            return self._finding(kernel, padding, None, "an even kernel keeps the size of the map")
        plain = self._plain(padding)
        if root and plain is not None and set(plain) == {0}:
            return f"{spelled}: not padded at all"
        if (odd != {0} and root and plain is None) or (not root and not even <= {-1, 0, 1}):
            return f"{spelled}: not half of the kernel"
        handled = self._handled(root, grows=min(even) >= 0)
        if handled:
            return self._finding(kernel, padding, None, handled)
        effect = "loses" if min(even) < 0 else "gains"
        why = f"with an even {root or 'kernel'} the map {effect} a row and a column: gate and residual do not fit"
        return self._finding(kernel, padding, test, why)

    def _test(self, kernel: cst.BaseExpression) -> tuple[str | None, str]:
        """Return the kernel's name (None for plain numbers) and the expression that is true where it is odd.

        Raises:
            _Unknown: it is neither a name nor made of names and numbers.
        """
        if self._plain(kernel) is not None:
            return None, ""
        parts = self._parts(kernel)
        roots = {self._names.key(part) for part in parts if self._plain(part) is None}
        if len(roots) != 1:
            raise _Unknown
        if isinstance(kernel, cst.Tuple | cst.List):
            unknown = [part for part in parts if self._plain(part) is None]
            return roots.pop(), f"{self._source.code(unknown[0])} % 2"
        if parts != [kernel]:  # a name for a tuple
            index = next(number for number, part in enumerate(parts) if self._plain(part) is None)
            return roots.pop(), f"{self._source.code(kernel)}[{index}] % 2"
        return roots.pop(), f"{self._source.code(kernel)} % 2"

    def _parts(self, kernel: cst.BaseExpression) -> list[cst.BaseExpression]:
        """Return the kernel's size in each direction: a name, an attribute, an item or a number."""
        if isinstance(kernel, cst.Tuple | cst.List):
            parts = [element.value for element in kernel.elements]
        else:
            values = self._names.values(kernel)
            tuples = [value for value in values if isinstance(value, cst.Tuple | cst.List)]
            if len(values) == 1 and tuples:
                return self._parts(tuples[0])
            parts = [kernel]
        for part in parts:
            simple = isinstance(part, cst.Name | cst.Attribute | cst.Subscript | cst.Integer)
            if not simple or any(isinstance(node, cst.Call) for node in self._source.walk(part)):
                raise _Unknown
        return parts

    def _grows(
        self, kernel: cst.BaseExpression, padding: cst.BaseExpression, root: str | None, sizes: Sequence[int]
    ) -> set[int]:
        """Return by how much the map grows for kernels of these sizes, over all directions.

        Raises:
            _Unknown: that depends on more than the kernel.
        """
        found: set[int] = set()
        for size in sizes:
            evaluator = _Evaluator(self._names, {} if root is None else {root: size})
            lengths = [evaluator.value(part) for part in self._parts(kernel)]
            for padded in self._paddings(evaluator, padding):
                if padded == "same":
                    found.add(0)
                    continue
                pads = padded if isinstance(padded, tuple) else (padded,) * len(lengths)
                lengths = lengths if len(lengths) == len(pads) else lengths * len(pads)
                if len(lengths) != len(pads) or not all(isinstance(pad, int) for pad in pads):
                    raise _Unknown
                found |= {2 * pad - length + 1 for pad, length in zip(pads, lengths, strict=True)}
        return found

    def _paddings(self, evaluator: _Evaluator, padding: cst.BaseExpression) -> list[Any]:
        """Return what the padding can be: a name may get one value in each branch of an if."""
        if isinstance(padding, cst.IfExp):
            return self._paddings(evaluator, padding.body if evaluator.value(padding.test) else padding.orelse)
        values = self._names.values(padding)
        if len(values) < 2:
            return [evaluator.value(padding)]
        branches = [evaluator.value(value) for value in values]
        # a plain number beside it belongs to a case of its own, such as a kernel of 1
        computed = [branch for branch, value in zip(branches, values, strict=True) if self._plain(value) is None]
        return computed or branches

    def _handled(self, root: str | None, grows: bool) -> str:
        """Return what in the class cares for even kernels already, or nothing."""
        if not isinstance(self._owner, cst.ClassDef):
            return ""
        for node in self._source.walk(self._owner):
            if root and self._is_parity_test(node, root):
                return f"line {self._source.line(node)} treats even kernels in its own way"
        statement = self._statement()
        attribute = self._attribute(statement)
        remedies = [] if statement is None else [_resizing(self._source, statement, None)]
        if attribute:
            for node in self._owner.body.body:
                if isinstance(node, cst.FunctionDef):
                    remedies.append(_remedy(self._source, node, attribute, statement, grows))
        for remedy in filter(None, remedies):
            return f"line {self._source.line(remedy)} brings the map to its size already"
        return ""

    def _is_parity_test(self, node: cst.CSTNode, root: str) -> bool:
        """Return whether a node is root % 2 or root & 1, but for one that a convolution's own padding has."""
        if not isinstance(node, cst.BinaryOperation) or not isinstance(node.operator, cst.Modulo | cst.BitAnd):
            return False
        if not isinstance(node.left, cst.Name | cst.Attribute) or self._names.key(node.left) != root:
            return False
        parent: Any = node
        while not isinstance(parent, cst.BaseSmallStatement | cst.BaseCompoundStatement | cst.Module):
            above = self._source.parents[parent]
            if isinstance(parent, cst.Arg) and isinstance(above, cst.Call) and _terminal(above.func) in CONVOLUTIONS:
                return False
            parent = above
        return True

    def _statement(self) -> cst.BaseSmallStatement | None:
        """Return the statement that the call stands in."""
        parent: Any = self._call
        while not isinstance(parent, cst.Module | cst.BaseCompoundStatement):
            parent = self._source.parents[parent]
            if isinstance(parent, cst.BaseSmallStatement):
                return parent
        return None

    def _attribute(self, statement: cst.BaseSmallStatement | None) -> str:
        """Return the attribute of self that the convolution goes to, alone or within a container, or nothing."""
        if isinstance(statement, cst.Assign) and _is_self(statement.targets[0].target):
            return _terminal(statement.targets[0].target)
        if isinstance(statement, cst.Expr) and isinstance(statement.value, cst.Call):
            function = statement.value.func  # self.convs.append(…)
            if isinstance(function, cst.Attribute) and _is_self(function.value):
                return _terminal(function.value)
        return ""

    def _place(self) -> str:
        parts: list[str] = []
        scope = self._names.scope(self._call)
        while not isinstance(scope, cst.Module):
            parts.insert(0, scope.name.value)
            scope = self._names.scope(scope)
        if len(parts) > 1 and parts[-1] == "__init__":
            parts.pop()
        return ".".join(parts) or "the module"

    def _finding(
        self, kernel: cst.BaseExpression, padding: cst.BaseExpression, test: str | None, why: str
    ) -> _Recognised:
        """Return the finding; test is the expression that is true for odd kernels, None where nothing is to do."""
        source = self._source
        edits, becomes = [], None
        if test is not None:
            first, last = source.outer_span(padding)
            if test == "":  # an even kernel by its own text
                becomes = SAME
                edits.append(Edit(first, last, SAME.encode("ascii")))
            else:
                addition = f" if {test} else {SAME}"
                weak = isinstance(padding, cst.IfExp | cst.Lambda | cst.NamedExpr) and not padding.lpar
                body = source.code(padding)
                becomes = (f"({body})" if weak else body) + addition
                edits += [Edit(first, first, b"(")] if weak else []
                edits.append(Edit(last, last, ((")" if weak else "") + addition).encode(source.encoding)))
        statement = self._statement()
        attribute = self._attribute(statement)
        where = self._place() + (f": self.{attribute}" if attribute else "")
        status = FITS if test is None else TO_FIX
        finding = Finding(
            source.line(self._call), where, status, source.code(kernel), source.code(padding), becomes, why
        )
        return _Recognised(finding, tuple(edits))


# --- what a method does with a convolution's result ---


def _remedy(
    source: _Source, function: cst.FunctionDef, attribute: str, made: cst.BaseSmallStatement | None, grows: bool
) -> cst.CSTNode | None:
    """Return what in a method brings a convolution's input or result to another size, or None.

    Args:
        source: the file.
        function: the method.
        attribute: where self keeps the convolution.
        made: the statement that makes it, which is no use of it.
        grows: whether the result is too large; then it may also be cut.
    """
    before: list[cst.BaseSmallStatement] = []
    touched: set[str] | None = None  # names that hold the result or something made of it
    for statement in _statements(source, function):
        if statement is made:
            continue
        if touched is None:
            uses = [node for node in source.walk(statement) if _is_self(node) and _terminal(node) == attribute]
            if not uses:
                before.append(statement)
                continue
            taken = _mentioned(statement)
            for earlier in before:
                if _targets(earlier) & taken and (found := _resizing(source, earlier, None)):
                    return found
            touched = set()
            found = _resizing(source, statement, None) or (_cutting(source, statement, None) if grows else None)
        else:
            found = _resizing(source, statement, touched) or (_cutting(source, statement, touched) if grows else None)
        if found:
            return found
        if not touched or _mentioned(statement) & touched:
            touched |= _targets(statement)
    return None


def _statements(source: _Source, node: cst.CSTNode) -> Iterator[cst.BaseSmallStatement]:
    """Yield the simple statements below a node, in the order of the text."""
    for part in source.walk(node):
        if isinstance(part, cst.BaseSmallStatement):
            yield part


def _targets(statement: cst.BaseSmallStatement) -> set[str]:
    """Return the plain names that a statement assigns to."""
    if isinstance(statement, cst.Assign):
        targets: list[cst.CSTNode] = [target.target for target in statement.targets]
    elif isinstance(statement, cst.AnnAssign | cst.AugAssign):
        targets = [statement.target]
    else:
        targets = []
    parts = [
        element.value if isinstance(element, cst.Element) else element
        for target in targets
        for element in (target.elements if isinstance(target, cst.Tuple | cst.List) else [target])
    ]
    return {part.value for part in parts if isinstance(part, cst.Name)}


def _mentioned(node: cst.CSTNode) -> set[str]:
    """Return the plain names that a statement reads: no attribute's, no keyword's."""
    if isinstance(node, cst.Name):
        return {node.value}
    if isinstance(node, cst.Attribute):
        return _mentioned(node.value)
    children = [child for child in node.children if not isinstance(child, cst.AssignTarget)]
    if isinstance(node, cst.Arg):
        children = [node.value]
    return {name for child in children for name in _mentioned(child)}


def _resizing(source: _Source, statement: cst.CSTNode, names: set[str] | None) -> cst.CSTNode | None:
    """Return a call in a statement that pads or resizes one of the names (None: anything)."""
    for node in source.walk(statement):
        resizes = isinstance(node, cst.Call) and _RESIZING.fullmatch(_terminal(node.func))
        if resizes and (names is None or _mentioned(node) & names):
            return node
    return None


def _cutting(source: _Source, statement: cst.CSTNode, names: set[str] | None) -> cst.CSTNode | None:
    """Return what in a statement cuts one of the names (None: anything) by a slice or a call."""
    for node in source.walk(statement):
        cuts = isinstance(node, cst.Call) and _CUTTING.fullmatch(_terminal(node.func))
        if cuts and (names is None or _mentioned(node) & names):
            return node
        if isinstance(node, cst.Subscript) and _terminal(node.value) != "shape":
            bounded = [
                part.slice
                for part in node.slice
                if isinstance(part.slice, cst.Slice) and (part.slice.lower or part.slice.upper)
            ]
            if bounded and (names is None or _mentioned(node.value) & names):
                return node
    return None

"""What is wrong with an answer that was to be Python: it does not parse, leaves bodies out, or
says the same lines again and again."""

import ast
import re
import warnings
from collections import Counter
from typing import Final

OF_A_CUT: Final = frozenset({"does not parse", "no code", "too short"})
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)",
                    re.DOTALL | re.MULTILINE)
_PYTHON: Final = frozenset({"", "python", "py", "python3"})
_LEFT_OUT = re.compile(r"#.*\b(?:todo|fixme|your code|implement (?:this|here|me)|"
                       r"rest of|omitted)\b|#\s*\.\.\.|"
                       r"#.*(?:待实现|此处省略|在此实现|待完成)", re.IGNORECASE)
_FEW: Final = 8  # lines; fewer may well be alike


def fault(text: str, min_statements: int, max_repeated: float) -> tuple[str | None, str]:
    """The kind of error, or None, and words about it."""
    source = code_of(text)
    if source is None:
        return "no code", "no fenced block, and the whole is no Python"
    try:
        tree = _parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = f" in line {e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        return "does not parse", f"{e.msg if isinstance(e, SyntaxError) else e}{line}"
    if (stub := _stub(tree)) is not None:
        return "stub", stub
    if (left := _LEFT_OUT.search(source)) is not None:
        return "stub", f"left out: {left.group().strip()[:60]}"
    share, line = repeated_lines(source)
    if share > max_repeated:
        return "repetition", f"{100 * share:.0f} % of its lines came before, as {line[:60]!r}"
    n = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    if n < min_statements:
        return "too short", f"{n} statements, at least {min_statements}"
    return None, f"{n} statements"


def code_of(text: str) -> str | None:
    """The fenced blocks of Python, one after the other; without a fence the whole, if it looks
    like code. A last fence may be open: an answer that was cut."""
    blocks = [(lang.lower(), body) for lang, body in _FENCE.findall(text)]
    named = [body for lang, body in blocks if lang in _PYTHON - {""}]
    if found := named or [body for lang, body in blocks if lang in _PYTHON]:
        return "\n".join(_dedented(body) for body in found)
    if blocks:
        return None
    try:
        tree = _parsed(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        says_so = re.search(r"^\s*(?:def|class|import|from) \w", text, re.MULTILINE)
        return text if says_so else None
    only_words = all(isinstance(x, ast.Expr) and isinstance(x.value, ast.Name | ast.Constant)
                     for x in tree.body)
    return None if only_words else text


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string of theirs is no warning of ours
        return ast.parse(source)


def _dedented(body: str) -> str:
    """A fence in a list is indented, and its code with it."""
    lines = body.split("\n")
    margin = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    return "\n".join(x[margin:] for x in lines)


def _stub(tree: ast.Module) -> str | None:
    abstract = {"abstractmethod", "overload"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = {getattr(d, "attr", getattr(d, "id", "")) for d in node.decorator_list}
        if names & abstract:
            continue
        body = [x for x in node.body if not _is_docstring(x)]
        if all(_does_nothing(x) for x in body):
            return f"{node.name} in line {node.lineno} has no body"
    return None


def _is_docstring(node: ast.stmt) -> bool:
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))


def _does_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Pass):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return node.value.value is ...
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return False


def repeated_lines(source: str) -> tuple[float, str]:
    """Share of the lines that came before word for word, and the line that did most often. Short
    ones, as `return x` or a bracket, may."""
    lines = [x.strip() for x in source.split("\n") if len(x.strip()) > 12]
    if len(lines) < _FEW:
        return 0.0, ""
    times = Counter(lines)
    return 1 - len(times) / len(lines), times.most_common(1)[0][0]

"""Chat templates: as much of Jinja's language as they need, read as transformers reads it.

A checkpoint says how it is to be talked to in a small program:

    {% for m in messages %}<|im_start|>{{ m.role }}...{% endfor %}

Jinja's expressions are nearly Python's, so Python's own parser reads them, and value() works out
the few kinds of node that templates use. Whatever it does not know is a ValueError that names it;
an expression only if the template gets there: not in its branches for tools, which no chat here
takes. strftime_now is not there, so a template that would print today's date prints its own.
"""

import ast
import operator
import re
from functools import cache
from types import NoneType

STRING = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
INSIDE = rf"(?P<inside>(?:{STRING}|[^'\"])*?)"
TAG = re.compile(
    rf"\{{\#(?P<c1>[-+]?).*?(?P<c2>[-+]?)\#\}}"
    rf"|\{{(?P<kind>[%{{])(?P<t1>[-+]?){INSIDE}(?P<t2>[-+]?)[%}}]\}}",
    re.DOTALL,
)


LONGEST = 1_000_000  # characters of a template
MOST = 10_000_000  # characters, or items, of all that it makes in one chat; or characters it prints
LOOPS = 100_000  # rounds of a loop


class Loop(dict):
    """`loop` within a for."""


class Undefined(tuple):
    """What a name stands for that nobody has set: empty, and prints as nothing."""

    def __str__(self):
        return ""


UNDEFINED = Undefined()
FILTERS = {
    "trim": lambda x: as_text(x).strip(),
    "length": len,
    "string": lambda x: as_text(x),
    "list": list,
    "first": lambda x: next(iter(x), UNDEFINED),
    "last": lambda x: x[-1] if x else UNDEFINED,
    "default": lambda x, other="": other if x is UNDEFINED else x,
}
TESTS = {
    "defined": lambda x: x is not UNDEFINED,
    "undefined": lambda x: x is UNDEFINED,
    "none": lambda x: x is None,
    "string": lambda x: isinstance(x, str),
    "mapping": lambda x: isinstance(x, dict),
    "iterable": lambda x: isinstance(x, (str, list, dict, tuple)),
    "true": lambda x: x is True,
    "false": lambda x: x is False,
}
METHODS = {
    str: "strip lstrip rstrip split startswith endswith replace upper lower title".split(),
    dict: ["get", "items", "keys", "values"],
}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mod: lambda a, b: refuse("% of a text") if isinstance(a, str) else a % b,
    ast.LShift: lambda a, b: as_text(a) + as_text(b),  # Jinja's ~, see expression()
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def refuse(what):
    raise ValueError(f"{what} is not supported")


def as_text(x) -> str:
    """x as it is printed. Lists may hold each other many times over, so they are not."""
    plain = x is UNDEFINED or x is None or isinstance(x, (str, int, float))
    return str(x) if plain else refuse("a list or dictionary as text")


MADE = [0]  # characters and items, since render() began


def bounded(x):
    """x, unless with it more has been made than for any chat."""
    if isinstance(x, (str, list, tuple, dict)):
        MADE[0] += len(x) + 30
    if isinstance(x, (list, tuple)):
        MADE[0] += sum(len(part) for part in x if isinstance(part, str))
    if MADE[0] > MOST:
        refuse(f"a text or list of {len(x):,}, with all before it,")
    return x


# -----------------------------------------------------------------------------
# expressions


@cache
def expression(source: str) -> ast.expr:
    """`source` as Python parses it. Jinja's | binds as tightly as Python's @, its ~ as loosely as
    <<, and its texts may hold line breaks."""
    python = re.sub(
        rf"{STRING}|[|~]",
        lambda m: {"|": " @ ", "~": " << "}.get(m[0], m[0].replace("\n", r"\n")),
        source.strip(),
    )
    try:
        return ast.parse(f"({python}\n)", mode="eval").body
    except (SyntaxError, MemoryError):
        return refuse(repr(source.strip()))


def value(node, names: dict):
    """What an expression amounts to, under `names`."""
    of = lambda n: value(n, names)  # noqa: E731
    match node:
        case ast.Constant() if isinstance(node.value, (str, int, float, NoneType)):  # bool, too
            return node.value
        case ast.Name():
            constant = {"true": True, "false": False, "none": None}
            return constant[node.id] if node.id in constant else names.get(node.id, UNDEFINED)
        case ast.List() | ast.Tuple():
            return bounded([of(n) for n in node.elts])
        case ast.IfExp():
            return of(node.body if of(node.test) else node.orelse)
        case ast.BoolOp():
            for n in node.values:  # the first that decides, else the last
                if bool(x := of(n)) == isinstance(node.op, ast.Or):
                    break
            return x
        case ast.UnaryOp(op=ast.Not()):
            return not of(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            return -of(node.operand)
        case ast.BinOp(op=ast.MatMult()):
            return bounded(named(FILTERS, "filter", node.right, of, of(node.left)))
        case ast.BinOp() if type(node.op) in OPERATORS:
            return bounded(OPERATORS[type(node.op)](of(node.left), of(node.right)))
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            holds = named(TESTS, "test", node.comparators[0], of, of(node.left))
            return holds == isinstance(node.ops[0], ast.Is)
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            return OPERATORS[type(op)](of(node.left), of(node.comparators[0]))
        case ast.Attribute():
            return item(of(node.value), node.attr)
        case ast.Subscript(slice=ast.Slice() as s):
            ends = (n and of(n) for n in (s.lower, s.upper, s.step))
            return bounded(of(node.value)[slice(*ends)])
        case ast.Subscript():
            return item(of(node.value), of(node.slice))
        case ast.Call():
            options = {k.arg: of(k.value) for k in node.keywords}
            return bounded(function(node.func, names)(*map(of, node.args), **options))
    return refuse(repr(ast.unparse(node)))


def named(known: dict, kind: str, node, of, x):
    """x through a filter or test: a name, or a call with more arguments."""
    arguments = node.args if isinstance(node, ast.Call) else []
    name = ast.unparse(node.func if isinstance(node, ast.Call) else node).lower()
    if name not in known or getattr(node, "keywords", None):
        refuse(f"{kind} {ast.unparse(node)!r}")
    return known[name](x, *map(of, arguments))


def item(x, key):
    """x.key or x[key]: undefined if x has none, but an undefined x has no parts."""
    if x is UNDEFINED:
        refuse(f"{key!r} of something undefined")
    try:
        return x[key]
    except (KeyError, IndexError, TypeError):
        return refuse(f"loop.{key}") if isinstance(x, Loop) else UNDEFINED


def replaced(x: str, old: str, new: str, *count) -> str:
    if x.count(old) * len(new) > MOST:
        refuse(f"a text of more than {MOST:,}")
    return x.replace(old, new, *count)


def function(node, names: dict):
    """What a call calls: a function among `names`, or a text's or a dictionary's method."""
    if isinstance(node, ast.Attribute):
        x = value(node.value, names)
        if node.attr == "replace" and isinstance(x, str):
            return lambda *args: replaced(x, *args)
        if node.attr in METHODS.get(type(x), ()):
            return getattr(x, node.attr)
    elif isinstance(node, ast.Name) and callable(names.get(node.id)):
        return names[node.id]
    return refuse(f"the function {ast.unparse(node)!r}")


# -----------------------------------------------------------------------------
# statements


def pieces(source: str):
    """("text", ...), ("{", expression) and ("%", statement), one after the other.

    A dash in a tag takes the blanks beside it away. Without one, a statement takes the line break
    after it, and the blanks before it if they begin a line.
    """
    at, after, source = 0, "", source.replace("\r\n", "\n").removesuffix("\n")
    for m in [*TAG.finditer(source), None]:
        text = source[at : m.start() if m else len(source)]
        block = m and m["kind"] != "{"
        left = m and (m["c1"] or m["t1"])
        if left == "-":
            text = text.rstrip()
        elif block and left != "+":
            text = re.sub(r"(?:(?<=\n)|\A)[^\S\n]+\Z" if not at else r"(?<=\n)[^\S\n]+\Z", "", text)
        text = text.lstrip() if after == "-" else text.removeprefix(after)
        if "{%" in text or "{{" in text:
            refuse(repr(text[text.index("{") :][:40]))
        yield "text", text
        if m:
            right = m["c2"] or m["t2"]
            after = "-" if right == "-" else "\n" if block and right != "+" else ""
            if m["kind"]:
                yield m["kind"], m["inside"].strip()
            at = m.end()


def parse(rest, ends=()):
    """The statements up to one of `ends`, and that: "else", "elif ..." or "endfor"."""
    body = []
    for kind, text in rest:
        word, _, more = text.partition(" ")
        if kind == "text":
            body.append(("text", text))
        elif kind == "{":
            body.append(("print", text))
        elif word in ends:
            return body, text
        elif word == "set" and re.match(r"\w+(\.\w+)?\s*=", more):
            body.append(("set", *(side.strip() for side in more.split("=", 1))))
        elif word == "if":
            branches, end = [], text
            while end != "endif":
                condition = end.partition(" ")[2] or "true"
                branch, end = parse(rest, ("elif", "else", "endif"))
                branches.append((condition, branch))
            body.append(("if", branches))
        elif word == "for":
            inner, _ = parse(rest, ("endfor",))
            body.append(("for", more, inner))
        elif word not in ("generation", "endgeneration"):  # they mark what to train on
            refuse(f"{{% {word} %}}")
    if ends:
        raise ValueError(f"{ends[-1]} is missing")
    return body, ""


class Printed(list):
    """Texts, together no longer than any chat."""

    length = 0

    def append(self, text: str) -> None:
        self.length += len(text)
        if self.length > MOST:
            refuse(f"a text of more than {MOST:,}")
        super().append(text)


def run(body: list, names: dict, out: Printed) -> None:
    """Append to `out` what the statements print."""
    of = lambda source: value(expression(source), names)  # noqa: E731
    for kind, *parts in body:
        if kind == "text":
            out.append(parts[0])
        elif kind == "print":
            out.append(as_text(of(parts[0])))
        elif kind == "set":
            owner, _, key = parts[0].rpartition(".")
            (names[owner] if owner else names)[key] = of(parts[1])
        elif kind == "if":
            run(next((branch for test, branch in parts[0] if of(test)), []), names, out)
        else:
            loop = expression(f"[0 for {parts[0]}]").generators[0]  # Python's own syntax for it
            items = value(loop.iter, names)
            if len(items) > LOOPS:
                refuse(f"a loop of {len(items):,} rounds")
            items = list(items)  # within, what they are of may grow
            for condition in loop.ifs:
                items = [x for x in items if value(condition, names | bound(loop.target, x))]
            for n, x in enumerate(items):
                about = {"index0": n, "index": n + 1, "length": len(items)}
                about |= {"first": n == 0, "last": n == len(items) - 1}
                # What is set within stays within.
                run(parts[1], names | bound(loop.target, x) | {"loop": Loop(about)}, out)


def bound(target, x) -> dict:
    """{name: value} for the target of a loop: a name, or several."""
    if isinstance(target, ast.Name):
        return {target.id: x}
    return dict(zip((n.id for n in target.elts), x, strict=True))


@cache
def parsed(template: str) -> list:
    return parse(pieces(template))[0]


def raise_exception(message):
    raise ValueError(message)


def render(template: str, names: dict) -> str:
    """The text that a template makes of `names`. ValueError says what is not understood, or what
    the template itself refuses."""
    if len(template) > LONGEST:
        raise ValueError(f"it has {len(template):,} characters, of at most {LONGEST:,}")
    out, MADE[0] = Printed(), 0
    functions = {"raise_exception": raise_exception, "namespace": dict}
    try:
        run(parsed(template), functions | names, out)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ValueError(str(e)) from e
    return "".join(out)

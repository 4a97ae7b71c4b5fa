"""A difference at one site as a program of its own: random operands where these show it, the
smallest that do; else the operands of the model, in a file beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sympy import Integer
from torch import Tensor

from rewriter import symbols as sym
from rewriter.linear import LinearSpec
from rewriter.spec import Spec
from rewriter.verify.stages import Operands

__all__ = [
    "Drawn",
    "is_free",
    "op_script",
    "output_script",
    "reference_script",
    "reloaded",
    "smallest",
    "stored",
]

_TRIES = 60


@dataclass(frozen=True)
class Drawn:
    """Operands that a seed and their shapes say; `lines` is the Python text that draws them."""

    sizes: Mapping[str, int]
    """B, H, L, M as in the symbols of a spec, G the key heads, D and E the dims of keys and of
    values."""
    dtypes: Mapping[str, torch.dtype]
    reads: Mapping[str, tuple[str | int, ...]]
    """The shape of each tensor that formulas read: a name in `sizes`, or a number."""
    named: Mapping[str, int]
    """The integers named by the spec."""
    tops: Mapping[str, int] = field(default_factory=dict)
    """The largest value of each tensor of integers."""
    seed: int = 0
    device: str = "cpu"
    has_heads_inside: bool = False
    """Heads are the third axis in memory, as projections leave them."""

    @classmethod
    def like(cls, spec: Spec, operands: Operands) -> Drawn:
        """Operands as large as these."""
        q, v = operands.q, operands.v
        sizes = dict(zip("BHLD", q.shape, strict=True)) | dict(zip("BGME", v.shape, strict=True))
        read = {t.name: operands.tensors[t.name] for t in spec.tensors}
        dtypes = {"q": q.dtype, "k": operands.k.dtype, "v": v.dtype}
        whole = {n: x for n, x in read.items() if not x.is_floating_point() and x.numel()}
        return cls(
            sizes,
            dtypes | {n: x.dtype for n, x in read.items()},
            {n: _shape(spec, n, x) for n, x in read.items()},
            {n: operands.sizes[n] for n in spec.sizes},
            {n: int(x.max()) for n, x in whole.items() if x.dtype != torch.bool},
            device=str(q.device),
        )

    def joined(self, *others: Drawn) -> Drawn:
        """With the tensors and integers of others too."""
        found = self
        for x in others:
            found = replace(
                found,
                dtypes={**found.dtypes, **x.dtypes},
                reads={**found.reads, **x.reads},
                named={**found.named, **x.named},
                tops={**found.tops, **x.tops},
            )
        return found

    def lines(self) -> list[str]:
        """Statements that make q, k, v and the dictionary of tensors."""
        found = [f"generator = torch.Generator().manual_seed({self.seed})"]
        for name, axes in {"q": "BHLD", "k": "BGMD", "v": "BGME"}.items():
            shape = [self.sizes[x] for x in axes]
            if self.has_heads_inside:
                shape[1], shape[2] = shape[2], shape[1]
            turned = ".transpose(1, 2)" if self.has_heads_inside else ""
            drawn = self._draw(name, shape)
            found.append(f"{name} = ({drawn}){turned}" if turned else f"{name} = {drawn}")
        found.append("tensors = {}")
        for name, dims in self.reads.items():
            shape = [self.sizes[x] if isinstance(x, str) else x for x in dims]
            found.append(f'tensors["{name}"] = {self._draw(name, shape)}')
        return found

    def _draw(self, name: str, shape: list[int]) -> str:
        dtype = self.dtypes[name]
        if dtype == torch.bool:
            text = f"torch.rand({shape}, generator=generator) < 0.6"
        elif dtype.is_floating_point:
            text = f"torch.randn({shape}, generator=generator)"
            text = f"2 * {text}" if name == "q" else text
        else:
            text = f"torch.randint({self.tops.get(name, 0) + 1}, {shape}, generator=generator)"
        usual = torch.float32 if dtype.is_floating_point else torch.int64
        to = [] if dtype in (torch.bool, usual) else [str(dtype)]
        to += [] if self.device == "cpu" else [repr(self.device)]
        return "".join([f"({text})" if to else text, *(f".to({x})" for x in to)])

    def operands(self) -> Operands:
        """What `lines` makes."""
        made: dict[str, Any] = {}
        exec("\n".join(self.lines()), {"torch": torch}, made)
        return Operands(made["q"], made["k"], made["v"], made["tensors"], self.named)


def _shape(spec: Spec, name: str, x: Tensor) -> tuple[str | int, ...]:
    """Sizes by the index that reads each dimension; numbers where it is not a plain index."""
    if spec.patch is not None and name == spec.patch.tensor:
        return ("B", "H", "L", "E")
    if isinstance(spec, LinearSpec) and name in (*spec.q_map.tensors, *spec.k_map.tensors):
        heads = "H" if name in spec.q_map.tensors else "G"
        return (heads, "D", int(x.shape[2])) if x.dim() == 3 else (heads, int(x.shape[1]))
    reads = [r for f in spec.formulas for r in sym.reads(f) if r.tensor == name]
    plain = {sym.b: "B", sym.h: "H", sym.q: "L", sym.k: "M"}
    shape: list[str | int] = []
    for dim, size in enumerate(x.shape):
        letters = {plain.get(r.index[dim]) for r in reads}
        letter = letters.pop() if len(letters) == 1 else None
        shape.append(letter if letter is not None else int(size))
    return tuple(shape)


def is_free(spec: Spec) -> bool:
    """Random tensors are fair to the spec: it does not promise how many heads are on, nor the sign
    of what it reads."""
    if spec.active is not None:
        return False
    if isinstance(spec, LinearSpec):
        signed = (spec.decay, Integer(1) if spec.near is None else spec.near.factor)
        return not any(sym.reads(x) for x in signed)
    return True


def smallest(drawn: Drawn, shows: Callable[[Operands], bool]) -> Drawn | None:
    """The smallest operands that still show the difference; None if none drawn at random does."""
    tries = 0

    def holds(candidate: Drawn) -> bool:
        nonlocal tries
        tries += 1
        try:
            return shows(candidate.operands())
        except Exception:
            return False  # a size that the formulas do not allow

    starts = [
        replace(drawn, seed=seed, has_heads_inside=inside)
        for inside in (False, True)
        for seed in range(3)
    ]
    found = next((d for d in starts if holds(d)), None)
    while found is not None and tries < _TRIES:
        smaller = next((d for d in _smaller(found) if tries < _TRIES and holds(d)), None)
        if smaller is None:
            break
        found = smaller
    return found


def _smaller(drawn: Drawn) -> Iterator[Drawn]:
    for name in ("B", "M", "L", "D", "E", "H"):
        size = drawn.sizes[name]
        for less in dict.fromkeys((1, 2, size // 2, size - 1)):
            if not 0 < less < size:
                continue
            sizes = {**drawn.sizes, name: less}
            if name == "H":
                group = drawn.sizes["H"] // drawn.sizes["G"]
                sizes["G"] = max(1, less // group)
                if less % sizes["G"]:
                    continue
            if name == "D" and drawn.sizes["D"] == drawn.sizes["E"]:
                sizes["E"] = less
            if name == "L" and drawn.sizes["L"] == drawn.sizes["M"]:
                sizes["M"] = less
            yield replace(drawn, sizes=sizes)


# --- the programs ---------------------------------------------------------------------------------

_CALLS = """

def given(spec, tensors):
    return [tensors[t.name] for t in spec.tensors], [sizes[n] for n in spec.sizes]


def expected(q, k, v, tensors):
    return reference(meant, q, k, v, *given(meant, tensors))


def found(q, k, v, tensors):
    return {found}


"""

_OUTPUTS = """def run(function, cast):
    with torch.no_grad():
        read = {n: cast(x) for n, x in tensors.items()}
        return {"out": function(cast(q), cast(k), cast(v), read)}


"""

_GRADIENTS = """def run(function, cast):
    given = {"q": q, "k": k, "v": v, **tensors}
    given = {n: cast(x).detach().requires_grad_(x.is_floating_point()) for n, x in given.items()}
    out = function(given["q"], given["k"], given["v"], given)
    leaves = {n: x for n, x in given.items() if x.requires_grad}
    cotangent = torch.randint(-32, 33, out.shape, generator=torch.Generator().manual_seed(0)) / 16
    grads = torch.autograd.grad(out, leaves.values(), cotangent.to(out), allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    grads = {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}
    return {"out": out.detach(), **grads}


"""

_TAIL = """def same(x):
    return x


def wide(x):
    return x.double() if x.is_floating_point() else x


gold, ref, new = run(expected, wide), run(expected, same), run(found, same)
"""

_SAVED_TAIL = """gold, ref = {"out": saved["gold"]}, {"out": saved["ref"]}
new = {"out": found(q, k, v, tensors).to(saved["ref"].dtype)}
"""

_VERDICT = """rows = compared(gold, ref, new)
for row in rows:
    if row.err_ref and row.err_new:
        sizes = row.err_ref.max, row.err_new.max
        print("{}: largest error {:.2e} expected, {:.2e} found".format(row.name, *sizes))
    print(f"{row.name}: {row.reason or 'agrees'}")
sys.exit(0 if all(row.ok for row in rows) else 1)
"""


def op_script(
    title: str, spec: Spec, target: str, inputs: Drawn | Operands, *, gradients: bool
) -> str:
    """Compares the op with the reference of the same spec."""
    call = f"attention(q, k, v, *given(meant, tensors), meant, {target!r})"
    specs = [f"meant = from_json({spec.to_json()!r})"]
    return _program(title, specs, inputs, call, gradients=gradients)


def reference_script(
    title: str,
    meant: Spec,
    new: Spec,
    inputs: Drawn | Operands,
    *,
    gradients: bool = False,
) -> str:
    """Compares the references of two specs."""
    specs = [
        f"# {meant}",
        f"meant = from_json({meant.to_json()!r})",
        f"# {new}",
        f"new_spec = from_json({new.to_json()!r})",
    ]
    call = "reference(new_spec, q, k, v, *given(new_spec, tensors))"
    return _program(title, specs, inputs, call, gradients=gradients)


def output_script(title: str, spec: Spec, operands: Operands) -> str:
    """Compares the reference of a spec with what the model itself gave, `gold` and `ref` in the
    file beside."""
    specs = [f"# {spec}", f"meant = from_json({spec.to_json()!r})"]
    body = [*specs, *_lines(operands)]
    calls = _CALLS.replace("{found}", "expected(q, k, v, tensors)")
    return _head(title, operands, calls) + _joined(body) + calls + _SAVED_TAIL + _VERDICT


def _head(title: str, inputs: Drawn | Operands, calls: str) -> str:
    """The docstring and the imports that the program needs."""
    saved = isinstance(inputs, Operands)
    lines = [
        f'"""{title}',
        "",
        "Exits with 1 while the two differ, with 0 when they agree.",
        '"""',
        "",
        "import sys",
        *(["from pathlib import Path"] if saved else []),
        "",
        "import torch",
        *(["from safetensors.torch import load_file"] if saved else []),
        "",
        "from rewriter.families import from_json",
        *(["from rewriter.op import attention"] if "attention(" in calls else []),
        "from rewriter.reference import reference",
        "from rewriter.verify.stages import compared",
        "",
    ]
    return _joined(lines)


def _program(
    title: str, specs: list[str], inputs: Drawn | Operands, call: str, *, gradients: bool
) -> str:
    body = [*specs, *_lines(inputs)]
    run = _GRADIENTS if gradients else _OUTPUTS
    calls = _CALLS.replace("{found}", call)
    return _head(title, inputs, calls) + _joined(body) + calls + run + _TAIL + _VERDICT


def _joined(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def _lines(inputs: Drawn | Operands) -> list[str]:
    if isinstance(inputs, Drawn):
        return [*inputs.lines(), f"sizes = {dict(inputs.named)!r}"]
    place = f'Path(__file__).with_suffix(".safetensors"), device={str(inputs.q.device)!r}'
    lines = [f"saved = load_file({place})"]
    return [*lines, *_read_lines(inputs), f"sizes = {dict(inputs.sizes)!r}"]


def _read_lines(operands: Operands) -> list[str]:
    """Operands from `saved`, each with the strides that it had."""
    lines = [f"{n} = {_laid_out(n, getattr(operands, n))}" for n in ("q", "k", "v")]
    lines.append("tensors = {}")
    read = operands.tensors.items()
    return [*lines, *(f'tensors["{n}"] = {_laid_out(f"tensors.{n}", x)}' for n, x in read)]


def _laid_out(name: str, x: Tensor) -> str:
    value, narrow = f'saved["{name}"]', _narrowed(x)
    if not narrow.is_contiguous() and not _overlaps(narrow):
        place = f"{list(narrow.shape)}, {list(narrow.stride())}"
        value = f"{value}.new_empty_strided({place}).copy_({value})"
    return value if narrow.shape == x.shape else f"{value}.expand({list(x.shape)})"


def _narrowed(x: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def _overlaps(x: Tensor) -> bool:
    """Two places may be one number in memory, so that a tensor with these strides cannot be
    filled."""
    end = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= end:
            return True
        end += stride * (size - 1)
    return False


def stored(operands: Operands) -> dict[str, Tensor]:
    """What the file beside a program holds."""
    found = {n: getattr(operands, n) for n in ("q", "k", "v")}
    found |= {f"tensors.{n}": x for n, x in operands.tensors.items()}
    return {n: _narrowed(x).detach().cpu().contiguous().clone() for n, x in found.items()}


def reloaded(operands: Operands) -> Operands:
    """What a program reads from the file beside it."""
    device = operands.q.device
    saved = {n: x.to(device) for n, x in stored(operands).items()}
    made: dict[str, Any] = {}
    exec("\n".join(_read_lines(operands)), {"saved": saved}, made)
    return Operands(made["q"], made["k"], made["v"], made["tensors"], operands.sizes)

"""What the kernels of linear attention share: loads, maps of features, decays, products."""

from __future__ import annotations

from sympy.logic.boolalg import BooleanTrue

from rewriter.kernels.triton_linear_kernel import LinearKernel
from rewriter.kernels.triton_lines import padded
from rewriter.kernels.triton_source import Argument, Formulas, Function, function_text
from rewriter.linear import Map

__all__ = ["Part", "after", "mapped"]

LEAST = 1e-12
"""No feature of a map that is never negative is below it, as in the reference."""
TAKEN = (
    *("d", "h", "w", *(f"{x}_{n}" for x in "qkhz" for n in ("up", "down", "low", "high"))),
    *("e", "last", "next", "number"),
)
"""What these kernels write behind `b_`, `n_` or `p_` besides what all do."""


class Part:
    """One kernel of the file."""

    name = ""
    numbers = ""
    """The sizes that it takes."""
    stages = 0

    def __init__(self, kernel: LinearKernel) -> None:
        self.kernel, self.spec, self.tile = kernel, kernel.spec, kernel.tile
        self.formulas = Formulas(kernel.spec, TAKEN)
        self.block_d, self.block_e = padded(kernel.features), kernel.tile.columns
        self.is_whole_d = self.block_d == kernel.features
        self.is_whole_e = kernel.value_dim % self.block_e == 0
        self.m_e = "" if self.is_whole_e else " & m_e[None, :]"
        self.ieee = ', input_precision="ieee"' if kernel.dtype == "float32" else ""
        self.parts = ("_up", "_down") if kernel.halves == 2 else ("",)
        self.has_sum = self.spec.norm == "sum"
        self.function = Function(self.name, (), (), 0, 0)

    def body(self) -> list[str]:
        raise NotImplementedError

    def own(self) -> list[Argument]:
        """Its tensors and their strides."""
        raise NotImplementedError

    def constants(self) -> list[tuple[str, int]]:
        tile, kernel = self.tile, self.kernel
        names = [("BS", tile.span), ("BQ", tile.queries), ("BK", tile.keys), ("BD", self.block_d)]
        return [*names, ("BE", self.block_e), ("D", kernel.features), ("E", kernel.value_dim)]

    def written(self) -> str:
        """The text of the kernel; afterwards `function` says how it is called."""
        body = self.body()
        words = set("".join(c if c.isalnum() or c == "_" else " " for c in "\n".join(body)).split())
        constants = tuple((n, x) for n, x in self.constants() if n in words)
        args = self.formulas.arguments(self.own(), self.numbers)
        stages = self.stages or self.tile.stages
        self.function = Function(self.name, args, constants, self.tile.warps, stages)
        return function_text(self.function, body, helpers=self.formulas.loads.helpers)

    def _tensors(self, names: str, strided: str) -> list[Argument]:
        """Tensors of the kernel, one a letter, and the strides of some."""
        args = [Argument(n, "tensor", n) for n in names]
        args += [Argument("number", "tensor", "number")] if self.kernel.is_numbered else []
        for name in strided:
            last = "d" if name in "qk" else "e"
            dims = zip(range(4), ("b", "h", "l", last), strict=True)
            args += [Argument(f"stride_{name}_{i}", "stride", name, dim) for dim, i in dims]
        if self.kernel.is_numbered:
            args += [
                Argument(f"stride_number_{i}", "stride", "number", d)
                for d, i in ((0, "b"), (1, "h"))
            ]
        return args

    def _decay(self) -> list[str]:
        """The line with the logarithm of the decay."""
        if self.spec.decay == 0:
            return []
        return [f"b_d = {self.formulas.text(self.spec.decay)}  # the logarithm of the decay"]

    def _numbers(self) -> list[str]:
        """The line with the numbers of the first key."""
        if not self.kernel.is_numbered:
            return []
        start = "i_b.to(tl.int64) * stride_number_b + i_h.to(tl.int64) * stride_number_h"
        return [f"p_number = number + {start}"]

    def _number(self, at: str, mask: str = "", other: int = -1) -> str:
        """The number of a key, or of several."""
        if not self.kernel.is_numbered:
            return at
        mask = f", mask={mask}, other={other}" if mask else ""
        return f"tl.load(p_number + {at}{mask})"

    def _columns(self) -> list[str]:
        lines = ["o_d, o_e = tl.arange(0, BD), i_e * BE + tl.arange(0, BE)"]
        lines += [] if self.is_whole_d else ["m_d = o_d < D"]
        return lines + ([] if self.is_whole_e else ["m_e = o_e < E"])

    def _state_mask(self) -> str:
        """Which numbers of a state there are."""
        mask = [*([] if self.is_whole_d else ["m_d[:, None]"])]
        mask += [] if self.is_whole_e else ["m_e[None, :]"]
        return f", mask={' & '.join(mask)}" if mask else ""

    def _seen(self) -> str:
        """Which keys of a tile take part, those behind the last not."""
        if isinstance(self.spec.seen, BooleanTrue):
            return "m_k[None, :]"
        return f"m_k[None, :] & ({self.formulas.text(self.spec.seen)})"

    def _key_weight(self) -> str:
        if self.spec.key_weight == 1:
            return ""
        return f" * ({self.formulas.text(self.spec.key_weight)})"

    def _dot(self, x: str, y: str, plus: str = "") -> str:
        plus = f", {plus}" if plus else ""
        return f"tl.dot({x}, {y}{plus}{self.ieee})"

    def _operand(self, x: str) -> str:
        """A computed value as a factor of a product. In float16 it might overflow, and stays
        float32, whose products tensor cores round to as many bits."""
        return f"{x}.to(tl.bfloat16)" if self.kernel.dtype == "bfloat16" else x

    def _values(self) -> str:
        """The values as a factor beside `_operand`."""
        return "b_v.to(tl.float32)" if self.kernel.dtype == "float16" else "b_v"


def after(count: int, size: str) -> str:
    """What is added to a pointer to skip some halves."""
    return f" + {size}" if count else ""


def mapped(name: str, map: Map, axis: int, *, is_whole: bool) -> list[str]:
    """The lines that map rows `b_q` or `b_k` in place, or to two halves; columns behind the last
    give 0.

    Args:
        axis: of the features; the rows are transposed if it is 0.
    """
    x = f"b_{name}"
    if map == "identity":
        return []
    lines = [f"{x} = {x}.to(tl.float32)"]
    there, along = ("m_d[:, None]", "[None, :]") if axis == 0 else ("m_d[None, :]", "[:, None]")
    match map:
        case "silu":
            return [*lines, f"{x} = {x} * tl.sigmoid({x})"]
        case "relu":
            found = {x: f"tl.maximum({x}, LEAST)"}
        case "elu":
            found = {x: f"tl.maximum(tl.where({x} > 0.0, {x} + 1.0, tl.exp({x})), LEAST)"}
        case "exp":
            low, high = (x, x)
            if not is_whole:
                low, high = (f'tl.where({there}, {x}, float("{s}inf"))' for s in ("", "-"))
            lines.append(f"{x}_low, {x}_high = tl.min({low}, {axis}), tl.max({high}, {axis})")
            found = {
                f"{x}_up": f"tl.maximum(tl.exp({x} - {x}_high{along}), LEAST)",
                f"{x}_down": f"tl.maximum(tl.exp({x}_low{along} - {x}), LEAST)",
            }
    for name, text in found.items():
        lines.append(f"{name} = {text if is_whole else f'tl.where({there}, {text}, 0.0)'}")
    return lines

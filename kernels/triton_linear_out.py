"""The kernel that gives the outputs: what queries read of a state, and of the keys after it."""

from __future__ import annotations

from rewriter.kernels.triton_linear_kernel import LinearKernel
from rewriter.kernels.triton_linear_part import Part, after, mapped
from rewriter.kernels.triton_lines import indented, load, pointer
from rewriter.kernels.triton_source import Argument

__all__ = ["Out"]


class Out(Part):
    """The outputs of a tile of queries."""

    name = "linear_out_kernel"

    def __init__(self, kernel: LinearKernel) -> None:
        super().__init__(kernel)
        self.numbers = "HGLMPT" if self.spec.is_causal else "HGLM"

    def own(self) -> list[Argument]:
        names = "qkvos" if self.spec.is_causal else "qos"
        strided = names.replace("s", "")
        return self._tensors(names + ("z" if self.has_sum else ""), strided)

    def body(self) -> list[str]:
        spec = self.spec
        decay, loop, end = self._decay(), self._loop(), self._end()
        return [
            *self._tile(),
            *self._numbers(),
            "",
            *self.formulas.once,
            *decay,
            *self._before(),
            *(["", *loop] if spec.is_causal else []),
            "",
            *end,
        ]

    def _tile(self) -> list[str]:
        m_d = "" if self.is_whole_d else " & m_d[None, :]"
        causal = self.spec.is_causal
        place = [
            "n_t, n_e = tl.cdiv(P + L - T, BQ), tl.cdiv(E, BE)",
            "i_t, i_e, i_bh = i_t % n_t, i_t // n_t % n_e, i_t // (n_t * n_e)",
            "i_p = T + i_t * BQ  # where the first query stands on the key axis",
            "o_p = i_p + tl.arange(0, BQ)",
            "o_q = o_p - P",
            "m_q = (o_q >= 0) & (o_q < L)",
        ]
        if not causal:
            place = [
                "n_t, n_e = tl.cdiv(L, BQ), tl.cdiv(E, BE)",
                "i_t, i_e, i_bh = i_t % n_t, i_t // n_t % n_e, i_t // (n_t * n_e)",
                "o_q = i_t * BQ + tl.arange(0, BQ)",
                "m_q = o_q < L",
            ]
        both = [
            pointer("k", "i_g", "o_d[None, :]", "d"),
            pointer("v", "i_g", "o_e[None, :]", "e"),
        ]
        needs_group = causal or self.kernel.is_shared
        return [
            "# one program a tile of queries of one head, and some columns of v",
            "i_t = tl.program_id(0)",
            *place,
            "i_b, i_h = i_bh // H, i_bh % H",
            *(["i_g = i_h // G  # the head of k and v"] if needs_group else []),
            *self._columns(),
            pointer("q", "i_h", "o_d[None, :]", "d"),
            *(both if causal else []),
            "# [BQ, BD]",
            load("q", "o_q.to(tl.int64)[:, None]", f"m_q[:, None]{m_d}"),
            *mapped("q", self.spec.q_map.map, 1, is_whole=self.is_whole_d),
        ]

    def _before(self) -> list[str]:
        """The state of the keys before the span of the queries."""
        lines = ["# the state before the span of the queries, and what they read of it"]
        lines.append("n_s = tl.cdiv(M, BS)")
        if self.spec.is_causal:
            lines.append("i_s = tl.minimum(tl.maximum(i_p, 0) // BS, n_s)")
        else:
            lines.append("i_s = n_s  # that of all keys")
        row = "(i_b * (H // G) + i_g)" if self.kernel.is_shared else "i_bh"
        halves = len(self.parts)
        size = f"({halves} * D)" if halves > 1 else "D"
        lines.append(f"i_z = ({row} * (n_s + 1) + i_s).to(tl.int64) * {size}")
        lines.append("p_s = s + (i_z + o_d)[:, None] * E + o_e[None, :]")
        since = "b_q{}"
        if self.spec.decay != 0:
            last = self._number("tl.minimum(o_p, M - 1)", "o_p >= 0")
            before = self._number("tl.maximum(tl.minimum(i_s * BS, M) - 1, 0)")
            lines.append(f"o_n = {last}  # the last key that each query sees")
            lines.append(f"n_last = {before}  # the last key of the state; at first it is 0")
            lines.append("b_r = tl.exp(b_d * tl.maximum(o_n - n_last, 0))")
            since = "(b_q{} * b_r[:, None])"
        text = f"{self._state_mask()}, other=0.0" if self._state_mask() else ""
        total = ""
        for i, p in enumerate(self.parts):
            lines += ["# [BD, BE]", f"b_h = tl.load(p_s{after(i, 'D * E')}{text})"]
            q = since.format(p)
            if self._is_raw("q") and self.spec.decay == 0:
                q = f"b_q{p}.to(tl.float32)" if self.kernel.dtype == "float16" else f"b_q{p}"
            elif self.kernel.dtype == "bfloat16":
                q = self._operand(q)
            lines += ["# [BQ, BE]", f"b_o = {self._dot(q, self._operand('b_h'), total)}"]
            total = "b_o"
        if self.has_sum:
            text = "" if self.is_whole_d else ", mask=m_d, other=0.0"
            for i, p in enumerate(self.parts):
                z = f"tl.load(z + i_z{after(i, 'D')} + o_d{text})"
                found = f"tl.sum({since.format(p)} * {z}[None, :], 1)"
                lines.append(f"b_l += {found}" if i else f"b_l = {found}")
        return lines

    def _is_raw(self, name: str) -> bool:
        """q or k as they came, not mapped."""
        map = self.spec.q_map.map if name == "q" else self.spec.k_map.map
        return map == "identity" and self.kernel.dtype_of(name) == self.kernel.dtype

    def _factor(self, name: str, part: str) -> str:
        """Queries or keys as a factor of their product, which is in the dtype that both came in if
        neither is mapped."""
        x = f"b_{name}{part}"
        if self._is_raw("q") and self._is_raw("k"):
            return x
        if self.kernel.dtype == "float16" and self._is_raw(name):
            return f"{x}.to(tl.float32)"
        return self._operand(x)

    def _loop(self) -> list[str]:
        """The keys of the span, one by one."""
        m_d = "" if self.is_whole_d else " & m_d[None, :]"
        first = [f"b_q{p} = {self._factor('q', p)}" for p in self.parts]
        first = [line for line in first if len(set(line.split(" = "))) == 2]
        product = []
        for p in self.parts:
            keys, plus = self._factor("k", p), "b_s" if p == "_down" else ""
            product.append(f"b_s = {self._dot(f'b_q{p}', f'tl.trans({keys})', plus)}")
        weight, seen = self._key_weight(), self._seen()
        lines = []
        if self.spec.decay != 0:
            number = "o_k[None, :]"
            if self.kernel.is_numbered:
                lines.append(f"b_n = {self._number('o_k', 'm_k')}")
                number = "b_n[None, :]"
            weight += f" * tl.exp(b_d * tl.maximum(o_n[:, None] - {number}, 0))"
        step = [
            "o_k = i_k + tl.arange(0, BK)",
            "m_k = o_k < M",
            *self.formulas.loads.each,
            "# [BK, BD]",
            load("k", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{m_d}"),
            *mapped("k", self.spec.k_map.map, 1, is_whole=self.is_whole_d),
            "# [BQ, BK]",
            *product,
            *lines,
            f"m_s = (o_k[None, :] <= o_p[:, None]) & {seen}",
            f"b_s = tl.where(m_s, b_s{weight}, 0.0)",
            *(["b_l += tl.sum(b_s, 1)"] if self.has_sum else []),
            "# [BK, BE]",
            load("v", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_e}"),
            "# [BQ, BE]",
            f"b_o = {self._dot(self._operand('b_s'), self._values(), 'b_o')}",
        ]
        head = "for i_k in range(i_s * BS, tl.minimum(i_p + BQ, M), BK):"
        return ["# the keys of the span, one by one", *first, head, *indented(step)]

    def _end(self) -> list[str]:
        """Weights, the division, and the store."""
        spec, lines = self.spec, []
        if spec.query_weight != 1:
            lines.append(f"b_w = {self.formulas.text(spec.query_weight)}")
            lines.append("b_o = b_o * b_w")
        if self.has_sum:
            total = "b_l[:, None] * b_w" if spec.query_weight != 1 else "b_l[:, None]"
            lines.append(f"b_o = b_o / ({total} + EPS)")
        if spec.heads != 1 and spec.norm != "rms":
            lines.append(f"b_o = b_o * ({self.formulas.text(spec.heads)})")
        return [
            *lines,
            pointer("o", "i_h", "o_e[None, :]", "e"),
            "p_o += o_q.to(tl.int64)[:, None] * stride_o_l",
            f"tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_q[:, None]{self.m_e})",
        ]

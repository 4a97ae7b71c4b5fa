"""The kernels that give the states: what each span of keys adds, and the scan along the spans."""

from __future__ import annotations

from rewriter.kernels.triton_linear_part import Part, after, mapped
from rewriter.kernels.triton_lines import indented, load, pointer
from rewriter.kernels.triton_source import Argument

__all__ = ["SCAN", "Scan", "State"]

SCAN = 1024
"""Numbers of the state that one program of the scan has."""


class State(Part):
    """What the keys of a span add to the state."""

    name = "linear_state_kernel"
    numbers = "HGM"

    def own(self) -> list[Argument]:
        return self._tensors("kvsz" if self.has_sum else "kvs", "kv")

    def body(self) -> list[str]:
        decay, keys, weight = self._decay(), self._keys(), self._weight()
        m_k = "m_k[None, :]" if self.is_whole_d else "m_k[None, :] & m_d[:, None]"
        step = [
            "o_k = i_k + tl.arange(0, BK)",
            "m_k = o_k < M",
            *self.formulas.loads.each,
            "# [BD, BK]",
            load("k", "o_k.to(tl.int64)[None, :]", m_k),
            *keys,
            *weight,
            "# [BK, BE]",
            load("v", "o_k.to(tl.int64)[:, None]", f"m_k[:, None]{self.m_e}"),
            *self._sums(),
        ]
        return [
            "# one program a span of keys of one head, and some columns of v",
            "i_t = tl.program_id(0)",
            "n_s, n_e = tl.cdiv(M, BS), tl.cdiv(E, BE)",
            "i_s, i_e, i_bh = i_t % n_s, i_t // n_s % n_e, i_t // (n_s * n_e)",
            "i_b, i_h = i_bh // H, i_bh % H",
            "i_g = i_h // G  # the head of k and v",
            *self._columns(),
            pointer("k", "i_g", "o_d[:, None]", "d"),
            pointer("v", "i_g", "o_e[None, :]", "e"),
            *self._numbers(),
            "",
            *self.formulas.once,
            *decay,
            "i_last = tl.minimum(i_s * BS + BS, M) - 1",
            *([f"n_last = {self._number('i_last')}"] if self.spec.decay != 0 else []),
            "# [BD, BE]",
            *(f"b_h{p} = tl.zeros([BD, BE], dtype=tl.float32)" for p in self.parts),
            *(f"b_z{p} = tl.zeros([BD], dtype=tl.float32)" for p in self.parts if self.has_sum),
            "for i_k in range(i_s * BS, i_last + 1, BK):",
            *indented(step),
            "",
            *self._stores(),
        ]

    def _keys(self) -> list[str]:
        return mapped("k", self.spec.k_map.map, 0, is_whole=self.is_whole_d)

    def _weight(self) -> list[str]:
        """The weight of each key at the end of the span, and the keys times it."""
        lines, seen, weight = [], self._seen(), f"1.0{self._key_weight()}"
        weight = weight.removeprefix("1.0 * ")
        if self.spec.decay != 0:
            lines = [f"o_n = {self._number('o_k', 'm_k')}"] if self.kernel.is_numbered else []
            number = "o_n" if self.kernel.is_numbered else "o_k"
            age = f"tl.exp(b_d * tl.maximum(n_last - {number}, 0))[None, :]"
            weight = age if weight == "1.0" else f"{weight} * {age}"
        plain = weight == "1.0" and seen == "m_k[None, :]" and not self.has_sum
        if plain:  # behind the last key, v is 0
            return lines
        lines += ["# [1, BK]", f"b_w = tl.where({seen}, {weight}, 0.0)"]
        return lines + [f"b_k{p} = b_k{p} * b_w" for p in self.parts]

    def _sums(self) -> list[str]:
        is_raw = not self._is_float()
        values = "b_v" if is_raw else self._values()
        lines = ["# [BD, BE]"]
        for p in self.parts:
            keys = f"b_k{p}" if is_raw else self._operand(f"b_k{p}")
            lines.append(f"b_h{p} = {self._dot(keys, values, f'b_h{p}')}")
        if self.has_sum:
            lines += [f"b_z{p} += tl.sum(b_k{p}, 1)" for p in self.parts]
        return lines

    def _is_float(self) -> bool:
        """The keys have been multiplied or mapped, so that they are float32."""
        is_given = self.kernel.dtype_of("k") == self.kernel.dtype
        return not is_given or self.spec.k_map.map != "identity" or bool(self._weight())

    def _stores(self) -> list[str]:
        halves = len(self.parts)
        size = f"{halves} * D * E" if halves > 1 else "D * E"
        row = "(i_bh * (n_s + 1) + i_s + 1).to(tl.int64)"
        lines = [f"p_s = s + {row} * ({size}) + o_d[:, None] * E + o_e[None, :]"]
        for i, p in enumerate(self.parts):
            lines.append(f"tl.store(p_s{after(i, 'D * E')}, b_h{p}{self._state_mask()})")
        if self.has_sum:
            lines.append("if i_e == 0:")
            lines.append(f"    p_z = z + {row} * {f'({halves} * D)' if halves > 1 else 'D'} + o_d")
            mask = "" if self.is_whole_d else ", mask=m_d"
            for i, p in enumerate(self.parts):
                lines.append(f"    tl.store(p_z{after(i, 'D')}, b_z{p}{mask})")
        return lines


class Scan(Part):
    """From what each span adds to the state after it, in place."""

    name = "linear_scan_kernel"
    numbers = "HMN"
    stages = 1

    def own(self) -> list[Argument]:
        return self._tensors("s", "")

    def constants(self) -> list[tuple[str, int]]:
        return [("BS", self.tile.span), ("BN", SCAN)]

    def body(self) -> list[str]:
        decay = self._decay()
        step = ["b_h += tl.load(p_s, mask=m_n)"]
        if decay:
            step = [
                "i_last = tl.minimum(i_s * BS + BS, M) - 1",
                f"n_next = {self._number('i_last')}",
                "b_h = b_h * tl.exp(b_d * (n_next - n_last)) + tl.load(p_s, mask=m_n)",
                "n_last = n_next",
            ]
        needs_head = bool(decay)
        return [
            "# one program a part of the state of one head",
            "i_t = tl.program_id(0)",
            "n_s, n_t = tl.cdiv(M, BS), tl.cdiv(N, BN)",
            "i_bh = i_t // n_t",
            *(["i_b, i_h = i_bh // H, i_bh % H"] if needs_head else []),
            "o_n = i_t % n_t * BN + tl.arange(0, BN)",
            "m_n = o_n < N",
            "p_s = s + i_bh.to(tl.int64) * (n_s + 1) * N + o_n",
            *self._numbers(),
            *self.formulas.once,
            *decay,
            "b_h = tl.zeros([BN], dtype=tl.float32)",
            "tl.store(p_s, b_h, mask=m_n)",
            *(["n_last = -1"] if decay else []),
            "for i_s in range(0, n_s):",
            *indented(["p_s += N", *step, "tl.store(p_s, b_h, mask=m_n)"]),
        ]

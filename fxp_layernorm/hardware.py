"""What a target's multiplier and accumulator hold, as limits for the planner."""

from __future__ import annotations

from dataclasses import dataclass

from . import proof
from .adder import SUM_BITS
from .errors import InputError, PlanError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Limits on the integers of a spec; bits include the sign.

    Attributes
    ----------
    multiplier : tuple of int
        Widths of the two factors of the second product, t and G, in either order (equation 8).
    accumulator : int or None
        Bits of that product, of its sum with B and of the rounding half (equations 8 and 9). None means 32 bits in the
        lanes 24 and 32, and 63 in lane 64, as where there is no limit.
    lanes : tuple of int
        The lanes that the element stage may have: bits of (u - c) * R (equation 6).
    offset : int
        B is a multiple of 2**offset (equation 8).
    root : int or None
        Bits of the integer square root, m; None means 18, 24 or 31 by the lane.
    radicand : int
        V stays below this many bits (equation 3).
    codes : int
        Bits of the input codes.
    sums : int
        The magnitudes of u take this many bits at most, where something is added before the norm, codes have more than
        17, or input channels have scales of their own (equation 33).
    rounding : int
        There the rounding of the multipliers adds 2**-rounding to the error of u at most, where there is room.
    product : int or None
        Bits of (u - c) * R, and of p (equation 6); None means those of the lane.
    unclamped : int or None
        For outputs of up to 8 bits, the magnitudes of what is not clamped take this many bits before the shift
        (equation 9), where the bound is small enough with it.
    wide : Hardware or None
        The limits in place of these for codes of more than 8 bits, and where u is more than the codes, shifted.
    """

    multiplier: tuple[int, int] = (32, 32)
    accumulator: int | None = None
    lanes: tuple[int, ...] = tuple(proof.ROOT_BITS)
    offset: int = 0
    root: int | None = None
    radicand: int = proof.V_BITS
    codes: int = 32
    sums: int = SUM_BITS
    rounding: int = 6
    product: int | None = None
    unclamped: int | None = None
    wide: Hardware | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.multiplier, tuple) or len(self.multiplier) != 2:
            raise InputError(f"the multiplier is {self.multiplier!r}; the bits of its two factors are expected")
        ranges = {
            "a factor": (self.multiplier, 4, 32), "the accumulator": ((self.accumulator,), 8, 64),
            "the offset": ((self.offset,), 0, 16), "the root": ((self.root,), 2, 31),
            "the radicand": ((self.radicand,), 8, proof.V_BITS), "the input": ((self.codes,), 2, 32),
            "the sum": ((self.sums,), 8, SUM_BITS), "the rounding": ((self.rounding,), 0, 30),
            "the product": ((self.product,), 16, 64), "the unclamped output": ((self.unclamped,), 10, 62),
        }  # fmt: skip
        optional = ("the accumulator", "the root", "the product", "the unclamped output")
        for name, (values, low, high) in ranges.items():
            for value in values:
                missing = value is None and name in optional
                if not missing and not (isinstance(value, int) and low <= value <= high):
                    raise InputError(f"{name} of {value!r} bits can't be planned for; {low} to {high} bits can")
        if not isinstance(self.lanes, tuple) or not self.lanes or not set(self.lanes) <= set(proof.ROOT_BITS):
            raise InputError(
                f"the lanes are {self.lanes!r}; a tuple of {', '.join(map(str, proof.ROOT_BITS))} is expected"
            )

    def of(self, codes: int, *, added: bool) -> Hardware:
        """Return the limits for codes of up to this many bits, and whether u is more than the codes, shifted."""
        return self.wide if self.wide is not None and (codes > 8 or added) else self

    def check_codes(self, bits: int) -> None:
        """Raise PlanError for input codes of more bits than the hardware takes."""
        most = max(self.codes, self.wide.codes if self.wide is not None else 0)
        if bits > most:
            raise PlanError(
                f"the input has {bits} bits and the hardware takes codes of up to {most}: use {most} bits, or another "
                "hardware"
            )

    @classmethod
    def parse(cls, value: Hardware | str | None) -> Hardware:
        """Return a preset by its name; None means no limits but those of the lanes."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, str) or value not in PRESETS:
            raise InputError(f"the hardware is {value!r}; it must be a Hardware or one of {', '.join(PRESETS)}")
        return PRESETS[value]


#: Named limits: the factors of the second product, and the bits of its accumulator.
PRESETS = {
    # Cortex-M4 and M7 (SMLABB), and most 16-bit DSPs
    "mac16x16-32": Hardware(multiplier=(16, 16), accumulator=32, lanes=(24, 32)),
    # DSPs with guard bits: TI C55x, Blackfin, CEVA
    "mac16x16-40": Hardware(multiplier=(16, 16), accumulator=40, lanes=(24, 32)),
    # FPGA slices: AMD DSP48E1 (25 x 18) and DSP48E2 (27 x 18); (u - c) * R takes one in lane 24, two in lane 32
    "mac18x25-48": Hardware(multiplier=(18, 25), accumulator=48, lanes=(24, 32)),
    "mac18x27-48": Hardware(multiplier=(18, 27), accumulator=48, lanes=(24, 32)),
    # 32-bit processors with a long multiply-accumulate: Cortex-M (SMLAL), RISC-V with M
    "mac32x32-64": Hardware(multiplier=(32, 32), accumulator=64),
    # integers that are carried in float32, as the words int24 and float24 of the ONNX export have them: the second
    # product within 24 bits where nothing is clamped; else it comes in two parts, of which the lower one has no offset.
    # What is wide comes in more parts: u - c times R in two up to 31 bits, and so t times G for outputs of 16 bits
    "carried24": Hardware(
        multiplier=(17, 17),
        accumulator=31,
        lanes=(24,),
        offset=7,
        radicand=60,
        codes=8,
        unclamped=23,
        wide=Hardware(
            multiplier=(22, 20),
            accumulator=43,
            lanes=(24, 32),
            root=18,
            radicand=60,
            codes=23,
            sums=14,
            rounding=1,
            product=31,
            unclamped=23,
        ),
    ),
}

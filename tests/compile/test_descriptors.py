"""The reader of machine code finds lost descriptors, in a sound and in a broken sequence."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import descriptors

# Two products of one loop; {base} is where the second one's address comes from.
_CODE = """
        /*0000*/                   S2UR UR4, SR_CgaCtaId ;
        /*0010*/                   ULEA UR6, UR4, UR6, 0x18 ;
        /*0020*/                   UIADD3 UR5, UR6, 0x4000, URZ ;
        /*0030*/                   USHF.R.U32.HI UR5, URZ, 0x4, UR5 ;
        /*0040*/                   USGXT.U32 UR16, UR5, 0xe ;
        /*0050*/                   ULDC UR8, c[0x0][0x244] ;
        /*0060*/                   ISETP.GE.AND P0, PT, R2, RZ, PT ;
.L_x_0:
        /*0070*/                   UMOV UR26, UR16 ;
        /*0080*/                   UMOV UR27, 0x80000020 ;
        /*0090*/                   HGMMA.64x32x16.F32 R56, R24, gdesc[UR24].tnspB, R56 ;
        /*00a0*/                   UIADD3 UR30, UP0, {base}, 0x40, URZ ;
        /*00b0*/                   HGMMA.64x32x16.F32 R56, R28, gdesc[UR28].tnspB, R56, gsb0 ;
        {clobber}
        /*00d0*/               @P0 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
"""
_NOTHING = "/*00c0*/                   NOP ;"


def test_sound_code_passes() -> None:
    assert descriptors.lost(_CODE.format(base="UR16", clobber=_NOTHING)) == []


@pytest.mark.parametrize(
    ("base", "clobber", "where"),
    [
        ("UR6", _NOTHING, ["00b0"]),
        ("UR8", _NOTHING, ["00b0"]),
        ("UR20", _NOTHING, ["00b0"]),
        ("UR16", "/*00c0*/                   ULDC UR16, c[0x0][0x248] ;", ["0090", "00b0"]),
        ("UR16", "/*00c0*/               @P0 ULDC UR16, c[0x0][0x248] ;", ["0090", "00b0"]),
    ],
    ids=["memory's base", "a stride", "undefined", "overwritten in the loop", "at times"],
)
def test_lost_descriptors_are_found(base: str, clobber: str, where: list[str]) -> None:
    found = descriptors.lost(_CODE.format(base=base, clobber=clobber))
    assert [line.split(":")[0] for line in found] == where


def test_code_without_products_is_not_read() -> None:
    assert descriptors.lost("        /*0000*/                   EXIT ;") == []

"""The check of compiled kernels finds what ptxas 12.8 gets wrong; the listings are cut from such kernels."""

from __future__ import annotations

import sass

WRONG = """
        /*07a0*/                   USHF.R.U32.HI UR12, URZ, 0x4, UR7 ;
        /*0900*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, RZ, !UPT ;
        /*10d0*/                   UIADD3 UR10, UP0, UR13, 0x40, URZ ;
"""
RIGHT = """
        /*0010*/                   ULDC.64 UR14, c[0x0][0x208] ;
        /*0018*/                   S2UR UR7, SR_CTAID.X ;
        /*07a0*/              @!P0 USHF.R.U32.HI UR12, URZ, 0x4, UR7 ;
        /*07c0*/                   UIMAD.WIDE.U32 UR8, UR12, UR7, URZ ;
        /*07d0*/                   UIADD3.64 UR10, UR8, 0x2, URZ ;
        /*08f0*/                   UIADD3 URZ, UP0, UR7, UR12, URZ ;
        /*0900*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;
        /*0910*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24 ;
        /*0920*/                   STG.E.128 desc[UR14][R16.64], R12 ;
"""


def test_registers_that_nothing_wrote_are_found():
    found = sass.unwritten(WRONG)
    assert [line.split()[0] for line in found] == ["USHF.R.U32.HI", "HGMMA.64x32x16.F32.BF16", "UIADD3"]


def test_registers_that_were_written_are_not():
    assert sass.unwritten(RIGHT) == []
    without = "\n".join(line for line in RIGHT.splitlines() if "WIDE" not in line)
    assert len(sass.unwritten(without)) == 2  # the sum, and the product that takes its address; the other takes half


def test_of_a_product_with_registers_half_a_descriptor_is_read():
    line = "        /*0910*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24 ;\n"
    high = "        /*0900*/                   UIADD3.64 UR10, UR10, 0x2, URZ ;\n"
    assert sass.unwritten(line) == ["HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24"]
    assert len(sass.unwritten(high + line)) == 1  # the sum itself


def test_what_a_call_may_have_written_is_left_alone():
    call = "        /*12e0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64) ;\n"
    assert len(sass.unwritten(WRONG + call)) == 3 and sass.unwritten(call + WRONG) == []

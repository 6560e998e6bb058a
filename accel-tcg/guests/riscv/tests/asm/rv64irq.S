# Interrupts by pins, WFI. PIN(n) sets pin n; PIN(32 + n) sets it a little later.
#include "test.h"

        START
        TEST(30) # a software interrupt by its pin
        csrwi mie, 8
        li a0, PIN(3)
        li a1, 1
        M_TO(1f)
        csrsi mstatus, MSTATUS_MIE
        sd a1, 0(a0)
0:      j 0b
1:      CHECK(s2, 0x8000000000000003)
        CHECK_BITS(s5, MSTATUS_MIE | MSTATUS_MPIE, MSTATUS_MPIE)
        csrr a2, mip
        CHECK_BITS(a2, 8, 8)
        sd zero, 0(a0)
        csrr a2, mip
        CHECK_BITS(a2, 8, 0)
        TEST(31) # masked in mie, then enabled
        csrw mie, zero
        csrsi mstatus, MSTATUS_MIE
        sd a1, 0(a0)
        nop
        M_TO(1f)
        csrwi mie, 8
0:      j 0b
1:      CHECK(s2, 0x8000000000000003)
        sd zero, 0(a0)
        TEST(32) # vectored, and by priority: external before software before timer
        la a2, vectors
        addi a2, a2, 1
        csrrw a4, mtvec, a2
        li a2, -1
        csrw mie, a2
        li a0, PIN(7)
        sd a1, 0(a0)
        li a0, PIN(3)
        sd a1, 0(a0)
        li a0, PIN(11)
        sd a1, 0(a0)
        li a3, 0
        M_TO(1f)
        csrsi mstatus, MSTATUS_MIE
0:      j 0b
1:      CHECK(a3, 11)
        sd zero, 0(a0)
        M_TO(1f)
        csrsi mstatus, MSTATUS_MIE
0:      j 0b
1:      CHECK(a3, 3)
        li a0, PIN(3)
        sd zero, 0(a0)
        M_TO(1f)
        csrsi mstatus, MSTATUS_MIE
0:      j 0b
1:      CHECK(a3, 7)
        li a0, PIN(7)
        sd zero, 0(a0)
        csrw mtvec, a4
        TEST(33) # an interrupt of M-mode while in U-mode with MIE off
        csrwi mie, 8
        csrci mstatus, MSTATUS_MIE
        M_TO(2f)
        li a0, PIN(3)
        GO(U, 1f)
1:      sd a1, 0(a0)
0:      j 0b
2:      CHECK(s2, 0x8000000000000003)
        CHECK_BITS(s5, MSTATUS_MPP, 0)
        sd zero, 0(a0)
        TEST(34) # WFI goes on although interrupts are off, when one is pending
        sd a1, 0(a0)
        wfi
        sd zero, 0(a0)
        TEST(35) # and sleeps until one is: the harness raises the pin later
        li a0, PIN(32 + 3)
        csrci mstatus, MSTATUS_MIE
        sd a1, 0(a0)
        wfi
        csrr a2, mip
        CHECK_BITS(a2, 8, 8)
        sd zero, 0(a0)
        li a0, PIN(3)
        sd zero, 0(a0)
        csrw mie, zero


        TEST(40) # delegated to S-mode
        li a0, 0x222
        csrw mideleg, a0
        csrw mie, a0
        TEST(41) # external, from the pin, while in U-mode with SIE off
        li a0, PIN(9)
        li a1, 1
        la a2, 1f
        csrw sepc, a2
        li a2, MSTATUS_SPP | MSTATUS_SPIE
        csrc sstatus, a2
        S_TO(2f)
        GO(U, 1f)
1:      sd a1, 0(a0)
3:      j .
2:      CHECK(s6, 0x8000000000000009)
        CHECK_BITS(s9, MSTATUS_SPP, 0)
        sd zero, 0(a0)
        j pass

        .balign 256
        .option push
        .option norvc
vectors:
        j v0
        j v0
        j v0
        j v3
        j v0
        j v0
        j v0
        j v7
        j v0
        j v0
        j v0
        j v11
        .option pop
v0:     j fail
v3:     li a3, 3
        j m_trap
v7:     li a3, 7
        j m_trap
v11:    li a3, 11
        j m_trap


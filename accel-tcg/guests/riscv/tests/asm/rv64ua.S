# RV64A, in U-mode.
#include "test.h"

#define AMO(n, inst, want, mem, value) \
        li gp, n; la a1, cell; li a2, mem; sd a2, 0(a1); li a2, value; inst a4, a2, (a1); \
        ld a5, 0(a1); li t2, want; beq a5, t2, 77f; j ufail; 77:
#define OLD(want) li t2, want; beq a4, t2, 77f; j ufail; 77:

        START
        GO(U, user)
user:
        AMO(1, amoadd.w, 0xffffffff00000001, 0xffffffff7fffffff, 0x80000002)
        OLD(0x7fffffff)
        AMO(2, amoadd.w, 0x1234567800000000, 0x1234567880000000, 0xffffffff80000000)
        OLD(0xffffffff80000000)
        AMO(3, amoswap.w, 0x00000000deadbeef, 0x0000000011111111, 0xffffffffdeadbeef)
        OLD(0x11111111)
        AMO(4, amoand.w, 0xffffffff00ff0000, 0xffffffffffff0000, 0x00ff00ff)
        AMO(5, amoor.w, 0xf00f00ff, 0xf00f0000, 0x000000ff)
        OLD(0xfffffffff00f0000)
        AMO(6, amoxor.w, 0x0f0f0f0f, 0xffffffff, 0xf0f0f0f0)
        AMO(7, amomin.w, 0x80000000, 0x7fffffff, 0x80000000)
        AMO(8, amomax.w, 0x7fffffff, 0x7fffffff, 0x80000000)
        AMO(9, amominu.w, 0x7fffffff, 0x7fffffff, 0x80000000)
        AMO(10, amomaxu.w, 0x80000000, 0x7fffffff, 0xffffffff80000000)
        AMO(11, amoadd.d, 1, -1, 2)
        OLD(-1)
        AMO(12, amoswap.d, 0x123456789abcdef0, 5, 0x123456789abcdef0)
        OLD(5)
        AMO(13, amoand.d, 0x0f00000000000000, 0x0fffffffffffffff, 0xff00000000000000)
        AMO(14, amoor.d, -1, 0x0fffffffffffffff, 0xff00000000000000)
        AMO(15, amoxor.d, 0xf0ffffffffffffff, 0x0fffffffffffffff, 0xff00000000000000)
        AMO(16, amomin.d, 1 << 63, 1, 1 << 63)
        AMO(17, amomax.d, 1, 1, 1 << 63)
        AMO(18, amominu.d, 1, 1, 1 << 63)
        AMO(19, amomaxu.d, 1 << 63, 1, 1 << 63)
        AMO(20, amoadd.d.aqrl, 3, 1, 2)
        TEST(21) # rd = rs1 and rd = rs2
        la a1, cell
        li a2, 7
        sd a2, 0(a1)
        amoadd.d a1, a2, (a1)
        CHECK(a1, 7)
        la a1, cell
        amoadd.d a2, a2, (a1)
        CHECK(a2, 14)
        ld a2, 0(a1)
        CHECK(a2, 21)

        TEST(30) # LR and SC
        la a1, cell
        li a2, -5
        sd a2, 0(a1)
        lr.w a3, (a1)
        CHECK(a3, -5)
        li a2, 9
        sc.w a4, a2, (a1)
        CHECK(a4, 0)
        ld a3, 0(a1)
        CHECK(a3, 0xffffffff00000009)
        TEST(31) # the reservation is used up
        sc.w a4, a2, (a1)
        CHECK(a4, 1)
        TEST(32)
        lr.d.aq a3, (a1)
        sc.d.rl a4, a3, (a1)
        CHECK(a4, 0)
        TEST(33) # another address
        lr.d a3, (a1)
        addi a1, a1, 8
        sc.d a4, a3, (a1)
        CHECK(a4, 1)
        TEST(34) # the value changed in between
        la a1, cell
        lr.d a3, (a1)
        addi a2, a3, 1
        sd a2, 0(a1)
        sc.d a4, a3, (a1)
        CHECK(a4, 1)
        ld a3, 0(a1)
        CHECK_BITS(a3, -1, 0xffffffff0000000a)
        TEST(35) # counting with LR and SC
        li a5, 1000
        sd zero, 0(a1)
1:      lr.w a3, (a1)
        addi a3, a3, 3
        sc.w a4, a3, (a1)
        bnez a4, 1b
        addi a5, a5, -1
        bnez a5, 1b
        lw a3, 0(a1)
        CHECK(a3, 3000)
        j pass

        .data
        .balign 16
cell:   .dword 0, 0

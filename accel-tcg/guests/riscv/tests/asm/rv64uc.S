# RV64C, in U-mode.
#include "test.h"

        START
        GO(U, user)
        .option rvc
user:
        TEST(1)
        la sp, stack_top
        c.addi4spn a0, sp, 1020
        sub a0, a0, sp
        CHECK(a0, 1020)
        TEST(2)
        mv a1, sp
        c.addi16sp sp, -512
        c.addi16sp sp, 496
        sub a1, sp, a1
        CHECK(a1, -16)
        c.addi16sp sp, 16
        TEST(3)
        la a1, data
        c.lw a0, 4(a1)
        addi a0, a0, 1
        c.sw a0, 4(a1)
        c.lw a2, 4(a1)
        CHECK(a2, 0xfffffffffedcba99)
        TEST(4)
        c.ld a0, 0(a1)
        addi a0, a0, 1
        c.sd a0, 8(a1)
        c.ld a2, 8(a1)
        CHECK(a2, 0xfedcba9976543211)
        TEST(5)
        ori a0, x0, 1
        c.addi a0, -16
        CHECK(a0, -15)
        TEST(6)
        c.li a5, -32
        CHECK(a5, -32)
        TEST(7)
        c.lui s0, 0xfffe1
        c.srli s0, 12
        CHECK(s0, 0x000fffffffffffe1)
        c.lui s0, 0xfffe1
        c.srai s0, 12
        CHECK(s0, 0xffffffffffffffe1)
        c.andi s0, -2
        CHECK(s0, 0xffffffffffffffe0)
        TEST(8)
        li s1, 0xffffffffffff8000
        li a0, 0x8000
        c.sub s1, a0
        CHECK(s1, 0xffffffffffff0000)
        c.xor s1, a0
        CHECK(s1, 0xffffffffffff8000)
        c.or s1, a0
        CHECK(s1, 0xffffffffffff8000)
        c.and s1, a0
        CHECK(s1, 0x8000)
        TEST(9)
        li s1, 0x7fffffff
        li a0, 1
        c.addw s1, a0
        CHECK(s1, 0xffffffff80000000)
        c.subw s1, a0
        CHECK(s1, 0x7fffffff)
        c.addiw s1, 1
        CHECK(s1, 0xffffffff80000000)
        c.addiw s1, 0
        CHECK(s1, 0xffffffff80000000)
        TEST(10)
        li s0, 0x1234
        c.slli s0, 4
        CHECK(s0, 0x12340)
        c.slli s0, 32
        CHECK(s0, 0x1234000000000)
        TEST(11)
        c.j 1f
        j ufail
1:      c.nop
        TEST(12)
        li a0, 0
        c.beqz a0, 1f
        j ufail
1:      c.bnez a0, ufail_near
        li a0, 1
        c.bnez a0, 1f
ufail_near:
        j ufail
1:      c.beqz a0, ufail_near
        TEST(13)
        la t2, 1f
        c.jr t2
        c.j ufail_near
1:      la t2, 1f
        c.jalr t2
0:      j ufail
1:      CHECK_ADDR(ra, 0b)
        TEST(14)
        la sp, data
        li a0, 0x123
        c.swsp a0, 12(sp)
        c.lwsp a2, 12(sp)
        CHECK(a2, 0x123)
        c.sdsp a0, 16(sp)
        c.ldsp a2, 16(sp)
        CHECK(a2, 0x123)
        TEST(15)
        li a0, 0x11
        c.mv t2, a0
        CHECK(t2, 0x11)
        c.add t2, a0
        CHECK(t2, 0x22)
        TEST(16)
        la sp, data
        la a1, data
        li a0, 0x4045000000000000
        fmv.d.x fa0, a0
        c.fsdsp fa0, 24(sp)
        c.fld fa1, 24(a1)
        fmv.x.d a2, fa1
        CHECK(a2, 0x4045000000000000)
        c.fsd fa1, 32(a1)
        c.fldsp fa2, 32(sp)
        fmv.x.d a2, fa2
        CHECK(a2, 0x4045000000000000)
        j pass

        .data
        .balign 8
data:   .dword 0xfedcba9876543210, 0, 0, 0, 0, 0
        .skip 4096
stack_top:
        .skip 2048

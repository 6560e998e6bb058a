# RV64I: loads, stores, branches, jumps, upper immediates, fences, self-modifying code; in U-mode.
#include "test.h"

#define LOAD(n, inst, want, off) \
        li gp, n; la a1, data + 64; inst a4, off(a1); li t2, want; beq a4, t2, 77f; j ufail; 77:
#define STORE(n, inst, value, off, want) \
        li gp, n; la a1, buffer + 64; li a2, -1; sd a2, off(a1); li a2, value; inst a2, off(a1); ld a4, off(a1); \
        li t2, want; beq a4, t2, 77f; j ufail; 77:
#define TAKEN(n, inst, a, b) \
        li gp, n; li a1, a; li a2, b; inst a1, a2, 78f; j ufail; 76: j 77f; 78: inst a1, a2, 76b; j ufail; 77:
#define NOT_TAKEN(n, inst, a, b) \
        li gp, n; li a1, a; li a2, b; inst a1, a2, 78f; j 77f; 78: j ufail; 77:

        START
        GO(U, user)
user:
        LOAD(1, lb, -1, 0)
        LOAD(2, lbu, 0xff, 0)
        LOAD(3, lh, 0x00ff, 0)
        LOAD(4, lh, -0x7f01, 2)
        LOAD(5, lhu, 0x80ff, 2)
        LOAD(6, lw, -0x7f00ff01, 0)
        LOAD(7, lwu, 0x80ff00ff, 0)
        LOAD(8, ld, 0x0123456780ff00ff, 0)
        LOAD(9, ld, 0x1122334455667788, -64)
        LOAD(10, lb, 0x11, -57)
        # Misaligned ones are done.
        LOAD(11, lw, 0x6780ff00, 1)
        LOAD(12, lhu, 0xff00, 1)
        LOAD(13, ld, -0x10fedcba987f0100, 1)
        STORE(20, sb, 0x1234567890abcdef, 0, 0xffffffffffffffef)
        STORE(21, sh, 0x1234567890abcdef, 0, 0xffffffffffffcdef)
        STORE(22, sw, 0x1234567890abcdef, 8, 0xffffffff90abcdef)
        STORE(23, sd, 0x1234567890abcdef, -16, 0x1234567890abcdef)
        STORE(24, sd, 0x1234567890abcdef, 3, 0x1234567890abcdef)

        TEST(25) # across two pages
        la a1, page2 - 4
        li a2, 0x8877665544332211
        sd a2, 0(a1)
        ld a3, 0(a1)
        CHECK(a3, 0x8877665544332211)
        la a1, page2
        lw a3, 0(a1)
        CHECK(a3, 0xffffffff88776655)
        lhu a3, -1(a1)
        CHECK(a3, 0x5544)

        TAKEN(30, beq, 5, 5)
        NOT_TAKEN(31, beq, 5, 0x100000005)
        TAKEN(32, bne, 5, 0x100000005)
        NOT_TAKEN(33, bne, -1, -1)
        TAKEN(34, blt, -1, 0)
        NOT_TAKEN(35, blt, 0, 0)
        NOT_TAKEN(36, blt, 1, -1)
        TAKEN(37, bge, 0, 0)
        TAKEN(38, bge, 1, -1)
        NOT_TAKEN(39, bge, -1, 1)
        TAKEN(40, bltu, 1, -1)
        NOT_TAKEN(41, bltu, -1, 1)
        TAKEN(42, bgeu, -1, 1)
        NOT_TAKEN(43, bgeu, 1, -1)

        TEST(50)
        jal a1, 1f
0:      j ufail
1:      CHECK_ADDR(a1, 0b)
        TEST(51) # the low bit of the target is cleared
        la a1, 2f + 1
        jalr a1, 0(a1)
0:      j ufail
2:      CHECK_ADDR(a1, 0b)
        TEST(52)
        la a2, 3f - 8
        jalr zero, 8(a2)
        j ufail
3:
        TEST(53) # a loop: 1 + 2 + ... + 1000
        li a1, 1000
        li a2, 0
4:      add a2, a2, a1
        addi a1, a1, -1
        bnez a1, 4b
        CHECK(a2, 500500)
        TEST(54) # nested calls
        li a0, 20
        la sp, stack_top
        call fib
        CHECK(a0, 6765)
        TEST(55)
        lui a1, 0x80000
        CHECK(a1, 0xffffffff80000000)
        lui a1, 0x7ffff
        CHECK(a1, 0x7ffff000)
        TEST(56)
5:      auipc a1, 0xfffff
        la a2, 5b - 0x1000
        beq a1, a2, 6f
        j ufail
6:
        TEST(57) # an instruction across two pages
        la a1, straddle
        jalr a1
        CHECK(a0, 0x123)

        TEST(60) # code that is written, and written again, on its own page and on another
        li a5, 0
        li a6, 2
        la a1, patched
        la a2, new_insns
7:      lw a3, 0(a2)
        sw a3, 0(a1)
        fence.i
        jalr a1
        add a5, a5, a0
        addi a2, a2, 4
        addi a6, a6, -1
        bnez a6, 7b
        CHECK(a5, 300)
        TEST(61) # the next instruction but one
        la a1, 8f
        lw a3, new_insns
        sw a3, 0(a1)
        fence.i
        .option push
        .option norvc
8:      li a0, 7
        .option pop
        CHECK(a0, 100)

        TEST(70)
        fence
        fence rw, rw
        fence.tso
        fence w, r
        .word 0x0100000f # pause
        j pass

fib:    li t3, 2
        blt a0, t3, 9f
        addi sp, sp, -32
        sd ra, 0(sp)
        sd s11, 8(sp)
        sd a0, 16(sp)
        addi a0, a0, -1
        call fib
        mv s11, a0
        ld a0, 16(sp)
        addi a0, a0, -2
        call fib
        add a0, a0, s11
        ld ra, 0(sp)
        ld s11, 8(sp)
        addi sp, sp, 32
9:      ret

        .balign 4
        .option push
        .option norvc
patched:
        li a0, 1
        ret
new_insns:
        li a0, 100
        li a0, 200
        .option pop

        .balign 4096
        .skip 4096 - 6
        .option push
        .option norvc
straddle:
        .option rvc
        c.li a0, 1
        c.nop
        .option norvc
        li a0, 0x123
        .option pop
        ret

        .data
        .balign 8
data:   .dword 0x1122334455667788
        .skip 56
        .dword 0x0123456780ff00ff
        .dword 0xef
buffer: .skip 256
        .skip 8192
stack_top:
        .balign 4096
        .skip 4096
page2:  .skip 4096

# Several harts count together: with AMOs, with LR and SC, and under a lock. The hart id is in a0 at the start, the
# number of harts in a1. Hart 0 checks the sums when all are done.
#include "test.h"

#define ROUNDS 20000

        START
        TEST(1)
        la t3, amo
        la t4, lrsc
        la t5, lock
        la t6, plain
        li a2, ROUNDS
1:      li a3, 3
        amoadd.w zero, a3, (t3)
2:      lr.d a4, (t4)
        addi a4, a4, 5
        sc.d a5, a4, (t4)
        bnez a5, 2b
        # A lock by swap, and counting without atomics under it.
        li a3, 1
3:      amoswap.w.aq a4, a3, (t5)
        bnez a4, 3b
        ld a4, 0(t6)
        addi a4, a4, 7
        sd a4, 0(t6)
        fence rw, w
        amoswap.w.rl zero, zero, (t5)
        addi a2, a2, -1
        bnez a2, 1b
        la t3, done
        li a3, 1
        amoadd.w.aqrl zero, a3, (t3)
        beqz a0, 5f
4:      wfi
        j 4b
5:      lw a4, 0(t3)
        bne a4, a1, 5b
        li a3, ROUNDS
        mul a3, a3, a1
        la t3, amo
        lw a4, 0(t3)
        li a5, 3
        mul a5, a5, a3
        beq a4, a5, 6f
        j fail
6:      TEST(2)
        la t3, lrsc
        ld a4, 0(t3)
        li a5, 5
        mul a5, a5, a3
        beq a4, a5, 6f
        j fail
6:      TEST(3)
        la t3, plain
        ld a4, 0(t3)
        li a5, 7
        mul a5, a5, a3
        beq a4, a5, 6f
        j fail
6:      j pass

        .data
        .balign 64
amo:    .dword 0
        .balign 64
lrsc:   .dword 0
        .balign 64
lock:   .dword 0
        .balign 64
plain:  .dword 0
        .balign 64
done:   .dword 0

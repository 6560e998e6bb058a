# Machine level: exceptions and what they record, returns, CSRs, interrupts, WFI, PMP.
#include "test.h"

        START
        TEST(1) # ecall from M-mode
        M_TO(1f)
0:      ecall
        j fail
1:      CHECK(s2, 11)
        CHECK_ADDR(s3, 0b)
        CHECK(s4, 0)
        CHECK_BITS(s5, MSTATUS_MPP, MSTATUS_MPP)
        TEST(2) # from U-mode, with interrupts enabled before
        M_TO(2f)
        li a0, MSTATUS_MPIE
        csrs mstatus, a0
        GO(U, 1f)
1:      ecall
        j ufail
2:      CHECK(s2, 8)
        CHECK_ADDR(s3, 1b)
        CHECK_BITS(s5, MSTATUS_MPP | MSTATUS_MPIE | MSTATUS_MIE, MSTATUS_MPIE)
        csrci mstatus, MSTATUS_MIE
        TEST(3) # from S-mode
        M_TO(2f)
        GO(S, 1f)
1:      ecall
        j ufail
2:      CHECK(s2, 9)
        CHECK_BITS(s5, MSTATUS_MPP, 0x800)
        TEST(4)
        M_TO(1f)
0:      ebreak
        j fail
1:      CHECK(s2, 3)
        CHECK_ADDR(s3, 0b)
        beqz s4, 1f # the specification allows 0 and the address
        CHECK_ADDR(s4, 0b)
1:
        TEST(5) # illegal instructions, whose bits are in mtval
        M_TO(1f)
0:      .word 0xffffffff
        j fail
1:      CHECK(s2, 2)
        CHECK_ADDR(s3, 0b)
        CHECK(s4, 0xffffffff)
        M_TO(1f)
        .half 0
        j fail
1:      CHECK(s2, 2)
        CHECK(s4, 0)
        M_TO(1f)
        .half 0x8002 # c.jr with rs1 = 0
        j fail
1:      CHECK(s2, 2)
        CHECK(s4, 0x8002)
        M_TO(1f)
        csrw mhartid, zero
        j fail
1:      CHECK(s2, 2)
        CHECK(s4, 0xf1401073)
        M_TO(1f)
        csrr a0, 0x7c0
        j fail
1:      CHECK(s2, 2)
        TEST(6) # mret in S-mode; any CSR of M-mode
        M_TO(2f)
        GO(S, 1f)
1:      mret
        j ufail
2:      CHECK(s2, 2)
        CHECK(s4, 0x30200073)
        M_TO(2f)
        GO(S, 1f)
1:      csrr a0, mstatus
        j ufail
2:      CHECK(s2, 2)
        TEST(7) # sret and sfence.vma in U-mode
        M_TO(2f)
        GO(U, 1f)
1:      sret
        j ufail
2:      CHECK(s2, 2)
        M_TO(2f)
        GO(U, 1f)
1:      sfence.vma
        j ufail
2:      CHECK(s2, 2)
        TEST(8) # TVM, TSR, TW
        li a0, MSTATUS_TVM | MSTATUS_TSR | MSTATUS_TW
        csrs mstatus, a0
        M_TO(2f)
        GO(S, 1f)
1:      csrr a0, satp
        j ufail
2:      CHECK(s2, 2)
        M_TO(2f)
        GO(S, 1f)
1:      sfence.vma
        j ufail
2:      CHECK(s2, 2)
        M_TO(2f)
        GO(S, 1f)
1:      sret
        j ufail
2:      CHECK(s2, 2)
        M_TO(2f)
        GO(S, 1f)
1:      wfi
        j ufail
2:      CHECK(s2, 2)
        li a0, MSTATUS_TVM | MSTATUS_TSR | MSTATUS_TW
        csrc mstatus, a0
        TEST(9) # misaligned atomics; other misaligned accesses are done
        la a0, cell + 1
        M_TO(1f)
0:      amoadd.w a1, a1, (a0)
        j fail
1:      CHECK(s2, 6)
        CHECK_ADDR(s3, 0b)
        CHECK_ADDR(s4, cell + 1)
        la a0, cell + 4
        M_TO(1f)
        lr.d a1, (a0)
        j fail
1:      CHECK(s2, 4)
        CHECK_ADDR(s4, cell + 4)
        M_TO(1f)
        sc.d a1, a1, (a0)
        j fail
1:      CHECK(s2, 6)
        TEST(10) # nothing is there
        li a0, 0xb000000
        M_TO(1f)
        ld a1, 0(a0)
        j fail
1:      CHECK(s2, 5)
        CHECK(s4, 0xb000000)
        M_TO(1f)
        sb a1, 3(a0)
        j fail
1:      CHECK(s2, 7)
        CHECK(s4, 0xb000003)
        M_TO(1f)
        jr a0
        j fail
1:      CHECK(s2, 1)
        CHECK(s3, 0xb000000)
        CHECK(s4, 0xb000000)
        TEST(11) # registers are exact at a fault in the middle
        li a0, 1
        li a2, 0xb000000
        M_TO(1f)
        addi a0, a0, 1
        ld a0, 0(a2)
        addi a0, a0, 1
        j fail
1:      CHECK(a0, 2)

        TEST(20) # misa, mstatus
        csrr a0, misa
        CHECK_BITS(a0, ~0x80, 0x800000000014112d) # but for H
        csrw misa, zero
        csrr a0, misa
        CHECK_BITS(a0, ~0x80, 0x800000000014112d) # but for H
        li a0, 2 << 11
        csrw mstatus, a0
        csrr a0, mstatus
        CHECK_BITS(a0, 0xf00000000, 0xa00000000)
        li a1, MSTATUS_FS
        csrs mstatus, a1
        csrr a0, mstatus
        srli a0, a0, 63
        CHECK(a0, 1)
        csrr a0, sstatus
        srli a0, a0, 63
        CHECK(a0, 1)
        TEST(21) # FS: off, and dirty by use
        li a1, MSTATUS_FS
        csrc mstatus, a1
        M_TO(1f)
0:      fadd.d fa0, fa0, fa0
        j fail
1:      CHECK(s2, 2)
        CHECK_ADDR(s3, 0b)
        lwu a2, 0b
        beq a2, s4, 1f
        j fail
1:      M_TO(1f)
        frcsr a0
        j fail
1:      CHECK(s2, 2)
        M_TO(1f)
        c.fld fa0, 0(a0)
        j fail
1:      CHECK(s2, 2)
        li a1, 0x2000
        csrs mstatus, a1
        frcsr a0
        csrr a0, mstatus
        CHECK_BITS(a0, MSTATUS_FS, 0x2000)
        fmv.d.x fa0, zero
        csrr a0, mstatus
        CHECK_BITS(a0, MSTATUS_FS, MSTATUS_FS)
        li a1, 0x2000
        csrc mstatus, a1
        csrr a0, mstatus
        CHECK_BITS(a0, MSTATUS_FS, 0x4000)
        fsflagsi 1
        csrr a0, mstatus
        CHECK_BITS(a0, MSTATUS_FS, MSTATUS_FS)
        fscsr zero
        TEST(22) # reserved rounding modes
        M_TO(1f)
        .word 0x02a5d553 # fadd.d fa0, fa1, fa0 with rm 5
        j fail
1:      CHECK(s2, 2)
        fsrmi 5
        M_TO(1f)
        fadd.d fa0, fa0, fa0
        j fail
1:      CHECK(s2, 2)
        fadd.d fa0, fa0, fa0, rne
        fsrmi 0
        TEST(23) # plain registers
        li a0, -1
        csrw mscratch, a0
        csrrc a1, mscratch, a0
        CHECK(a1, -1)
        csrr a1, mscratch
        CHECK(a1, 0)
        csrrsi a1, mscratch, 21
        csrrci a1, mscratch, 1
        CHECK(a1, 21)
        csrrwi a1, mscratch, 0
        CHECK(a1, 20)
        csrw mepc, a0
        csrr a1, mepc
        CHECK(a1, -2)
        TEST(24) # counters
        csrr a0, mcycle
        csrr a1, mcycle
        bgeu a1, a0, 1f
        j fail
1:      csrr a0, time
        csrw mcounteren, zero
        M_TO(2f)
        GO(S, 1f)
1:      csrr a0, time
        j ufail
2:      CHECK(s2, 2)
        csrwi mcounteren, 2
        csrwi scounteren, 0
        M_TO(2f)
        GO(S, 1f)
1:      csrr a0, time
        ecall
2:      CHECK(s2, 9)
        M_TO(2f)
        GO(U, 1f)
1:      csrr a0, time
        j ufail
2:      CHECK(s2, 2)
        csrwi scounteren, 2
        M_TO(2f)
        GO(U, 1f)
1:      csrr a0, time
        csrr a0, cycle
        j ufail
2:      CHECK(s2, 2)
        CHECK(s4, 0xc0002573)
        csrr a0, hpmcounter3
        CHECK(a0, 0)

        TEST(40) # PMP: without a match S-mode and U-mode have nothing
        la a0, guarded
        srli a0, a0, 2
        ori a0, a0, 0x1ff
        csrw pmpaddr0, a0
        M_TO(2f)
        GO(S, 1f)
1:      j ufail
2:      CHECK(s2, 1)
        TEST(41) # execute only here, read only there
        li a0, -1
        csrw pmpaddr2, a0
        la a0, guarded
        srli a0, a0, 2
        ori a0, a0, 0x1ff
        csrw pmpaddr1, a0
        la a0, word
        srli a0, a0, 2
        csrw pmpaddr0, a0
        li a0, 0x1f1913 # any: all; page: read; word: read and write, NA4
        csrw pmpcfg0, a0
        csrr a1, pmpcfg0
        CHECK(a1, 0x1f1913)
        M_TO(2f)
        GO(U, 1f)
1:      la a0, word
        lw a1, 0(a0)
        sw a1, 0(a0)
        lw a1, 4(a0)
        sw a1, 4(a0)
        j ufail
2:      CHECK(s2, 7)
        CHECK_ADDR(s4, word + 4)
        M_TO(2f)
        GO(U, 1f)
1:      la a0, word
        ld a1, 0(a0) # matches the entry in part
        j ufail
2:      CHECK(s2, 5)
        M_TO(2f)
        GO(U, 1f)
1:      la a0, guarded
        jr a0
2:      CHECK(s2, 1)
        CHECK_ADDR(s4, guarded)
        TEST(42) # MPRV: loads of M-mode as U-mode
        li a0, MSTATUS_MPP
        csrc mstatus, a0
        la a0, word
        li a2, MSTATUS_MPRV
        M_TO(1f)
        csrs mstatus, a2
        sw a1, 4(a0)
        j fail
1:      csrc mstatus, a2
        CHECK(s2, 7)
        sw a1, 4(a0)
        TEST(43) # locked, it holds for M-mode, and cannot be undone
        li a0, 0x1f9913
        csrw pmpcfg0, a0
        la a0, guarded
        lw a1, 16(a0)
        M_TO(1f)
        sw a1, 16(a0)
        j fail
1:      CHECK(s2, 7)
        li a0, 0x1f1f1f
        csrw pmpcfg0, a0
        csrr a0, pmpcfg0
        CHECK(a0, 0x1f991f)
        csrr a1, pmpaddr1
        csrw pmpaddr1, zero
        csrr a0, pmpaddr1
        beq a0, a1, 1f
        j fail
1:      TEST(44) # top of range
        csrw pmpcfg0, zero
        la a0, cell
        srli a0, a0, 2
        csrw pmpaddr3, a0
        addi a0, a0, 2
        csrw pmpaddr4, a0
        li a0, -1
        csrw pmpaddr5, a0
        li a0, 0x1f09 # TOR, read; then all
        slli a0, a0, 32
        csrw pmpcfg0, a0
        M_TO(2f)
        GO(U, 1f)
1:      la a0, cell
        ld a1, 0(a0)
        sd a1, 8(a0)
        sd a1, -8(a0)
        sd a1, 0(a0)
        j ufail
2:      CHECK(s2, 7)
        CHECK_ADDR(s4, cell)
        j pass

        .data
        .balign 16
        .dword 0
cell:   .dword 0, 0
        .balign 4096
guarded:
        .skip 2048
word:   .skip 2048
